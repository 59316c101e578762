"""`textgen benchmark all`: every benchmark has its turn whatever becomes of the others, and the end says what each found."""
import json, re, signal
from dataclasses import replace

import pytest

from textgen import all_benchmarks, lstm_benchmark, rounds
from textgen.all_benchmarks import PARTS, Part, found
from textgen.cli import main
from textgen.core import TextgenError, UsageError
from textgen.figures import reporting
from textgen.peers import CONTESTANTS
from textgen.ways import open_numpy

pytestmark = pytest.mark.usefixtures("one_thread")


def part(act=lambda: None):
    "A benchmark that measures one thing, then does `act`."
    def run(folder, results, command, threads, quick):
        results.update(targets={"it: ours, s": {"wanted": 2, "measured": 1.0, "interval": [0.5, 1.25], "met": True}}, command=command)
        act()
    return Part(run, lambda results: ["all is well"])


def throw(error):
    def act(): raise error
    return act


@pytest.fixture
def parts(tmp_path, monkeypatch):
    "What stands for the benchmarks."
    monkeypatch.chdir(tmp_path)
    made = {}
    monkeypatch.setattr(all_benchmarks, "PARTS", made)
    return made


def test_one_that_fails_loses_nobody_else(parts, capsys):
    parts.update(one=part(throw(TextgenError("libraries disagree"))), two=part(throw(ValueError("no\nroom"))), three=part())
    assert main(["benchmark", "all"]) == 1
    out, error = capsys.readouterr()
    assert re.findall(r"== (\w+)", error) == ["one", "two", "three"] and out.count("all is well") == out.count("1 ±0.5, wanted 2") == 3
    assert "fault   TextgenError: libraries disagree" in out and "fault   ValueError: no room" in out and "Traceback" not in error
    assert "  met     it: ours, s: 1 ±0.5, wanted 2" in out.splitlines()


def test_one_that_is_not_installed_is_left_out(parts, capsys):
    parts.update(one=part(throw(UsageError('it needs TensorFlow; install it: pip install "textgen[lstm]"'))), two=part())
    assert main(["benchmark", "all"]) == 0
    assert 'left out: it needs TensorFlow; install it: pip install "textgen[lstm]"' in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_them_all_and_keeps_what_was_measured(number, parts, capsys):
    kept = []
    def interrupted():
        with reporting(lambda: kept.append("reported")): signal.raise_signal(number)
    parts.update(one=part(), two=part(interrupted), three=part())
    assert main(["benchmark", "all"]) == 130
    out, error = capsys.readouterr()
    assert kept == ["reported"] and error.endswith("interrupted\n") and "== three" not in error
    assert "two: 0.0 minutes\n  fault   interrupted\n" in out and "three: not begun" in out and out.count("all is well") == 2


def test_a_target_that_was_missed_or_not_measured_is_told():
    aims = {"a: b, s": {"wanted": 2, "measured": 3.0, "met": False}, "a: c, s": {"wanted": 2, "measured": None, "why": "not installed (x)"}}
    lines = [*found("data", {"minutes": 1.0, "targets": aims, "machine": {"processor": "it", "cores": 2}})]
    assert lines[0] == "data: 1.0 minutes" and lines[-2:] == ["  missed  a: b, s: 3, wanted 2", "  none    a: c, s: not installed (x), wanted 2"]
    assert "  targets 0 of 2 met, 1 missed, 1 not measured" in lines


def test_all_of_them_quickly(tmp_path, monkeypatch, capsys):
    "With one contestant each where a process or a graph would take its time: four files that say which command made them, and their plots."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rounds, "CONTESTANTS", [one for one in CONTESTANTS if one.name == "textgen eager"])
    monkeypatch.setattr(lstm_benchmark, "PARTS", {"write": [one for one in lstm_benchmark.WRITERS if one.open is open_numpy]})
    monkeypatch.setattr(lstm_benchmark, "AGAINST", {"write": []})
    assert main("benchmark all --quick --output out".split()) == 0
    out, error = capsys.readouterr()
    assert {path.name for path in (tmp_path/"out").iterdir()} == {*(f"{name}.{kind}" for name in PARTS for kind in ("json", "png")), "generate-batches.png"}
    for name in PARTS:
        results = json.loads((tmp_path/f"out/{name}.json").read_text(encoding="utf-8"))
        assert results["machine"]["command"] == "textgen benchmark all --quick" and results["figures"] and re.search(rf"^{name}: \d+\.\d minutes$", out, re.M)


@pytest.mark.slow
def test_all_of_them_quickly_with_everybody(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("benchmark all --quick --output out".split()) == 0
    assert "fault" not in capsys.readouterr().out and len([*(tmp_path/"out").glob("*.json")]) == len(PARTS)
