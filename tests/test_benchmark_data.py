"""`textgen benchmark data`: all sides make the same, whoever fails or is absent loses nobody else's figures, and what is saved.

No test says how fast anything is: the machine that runs them has other things to do.
"""
import json, re, signal, sys
from dataclasses import replace
from pathlib import Path

import pytest

from textgen import data_benchmark
from textgen.cli import main
from textgen.core import TextgenError
from textgen.data_benchmark import (AGAINST, AT_MOST, COLUMNS, PARTS, SIZES, TARGETS, check_made, compare, consume, effort_here, find_targets, items,
                                    measure, measure_open, measure_prepare, quick_effort, race, run_python, summary, tree_memory, write_copies)

pytestmark = pytest.mark.usefixtures("one_thread")
EFFORT = replace(quick_effort(), rounds=1, options={"train": 30, "validation": 2}, tokens=3000, length=16, batch=4)
NOBODY = lambda name: None


def test_all_take_turns_and_who_fails_is_out():
    turns, told, entries = [], [], {"textgen": {}, "dies": {}, "other": {}}
    fail = lambda turn: 1 / 0 if turn == 1 else 5
    race({"textgen": lambda turn: turns.append(turn) or 5, "dies": fail, "other": lambda turn: 5}, entries, 3, told.append)
    assert turns == [0, 1, 2, 3] and [len(entries[name].get("rounds s", [])) for name in entries] == [3, 0, 3]
    assert told == ["textgen", "dies", "other"] * 2 + ["textgen", "other"] * 2 and entries["dies"]["lost"] == "ZeroDivisionError: division by zero"
    assert [entry["made"] for entry in entries.values()] == [5, 5, 5]
    check_made({"figures": {"adding": entries}})
    entries["other"]["made"] = 6
    with pytest.raises(TextgenError, match="adding: other made 6, and textgen 5"): check_made({"figures": {"adding": entries}})


def test_medians_of_neighbours():
    entries = {"textgen": {"rounds s": [1.0, 2.0, 4.0]}, "DataLoader": {"rounds s": [2.0, 6.0, 4.0]}, "DataLoader, quick items": {"lost": "no"}}
    results = {"figures": {"epoch": entries, "open": {SIZES[1]: {"rounds open ms": [1.0, 3.0], "rounds open MB": [0.5, 0.5]}}}}
    compare(results)
    compare(results)   # again: nothing changes
    ours = entries["textgen"]
    assert ours["s"] == 2 and ours["DataLoader ×"] == 2 and ours["interval DataLoader ×"] == [1, 3] and "DataLoader, quick items ×" not in ours
    assert results["figures"]["open"][SIZES[1]]["open ms"] == 2
    found = find_targets(results)
    assert found["epoch: textgen, DataLoader ×"]["met"] is False and found["open: a large text, open MB"]["met"] is True
    assert found["open: a large text, prepare peak MB"]["why"] == "not measured"


def test_every_target_names_what_is_measured():
    for (part, row), wanted in TARGETS.items():
        assert part in PARTS and wanted.keys() <= {*COLUMNS[part]} and row in (SIZES if part == "open" else ["textgen"])
    assert PARTS.keys() == COLUMNS.keys() == AGAINST.keys() and AT_MOST <= {*COLUMNS["open"]}


def test_who_is_not_installed_is_named_with_its_line(tmp_path, monkeypatch):
    "tiktoken is in the extra for developers only; the others make the same tokens of the same text without it."
    class Absent:
        def find_spec(self, name, *more):
            if name == "tiktoken": raise ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiktoken"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    measure_prepare(EFFORT, tmp_path, entries := {}, NOBODY)
    assert entries["tiktoken, 2 threads"] == {"lost": "not installed (tiktoken); pip install tiktoken"}
    assert entries["textgen"]["made"] == entries["datasets.map, 2 processes"]["made"] > 1000
    results = {"machine": {"processor": "it", "cores": 1}, "figures": {"prepare": entries}}
    assert [*summary(results)][-1] == "missing tiktoken; to have them measured: pip install tiktoken"


def test_a_part_that_cannot_begin_is_a_row(monkeypatch):
    def broken(*given): raise TextgenError("GPT-2's tokenizer is not here")
    monkeypatch.setitem(PARTS, "prepare", broken)
    measure(["prepare", "epoch"], EFFORT, results := {})
    assert results["figures"]["prepare"]["textgen"]["lost"] == "GPT-2's tokenizer is not here"
    assert find_targets(results)["prepare: textgen, tiktoken, 2 threads ×"]["why"] == "GPT-2's tokenizer is not here"
    assert len({entry["made"] for entry in results["figures"]["epoch"].values()}) == 1 and len(results["figures"]["epoch"]) == 3


def test_another_order_is_another_epoch():
    import numpy as np, torch
    tokens = np.arange(200, dtype=np.uint16)
    for quick in (False, True):
        one, other = ([items(tokens, 8, quick)[i] for i in order] for order in ([0, 3, 5], [0, 5, 3]))
        assert consume(one, 0) != consume(other, 0) and consume(one, 1) == consume(other, 1)
        assert all(torch.equal(x[1:], y[:-1]) and x.dtype == torch.int64 and len(x) == 8 for x, y in one)
    assert consume([items(tokens, 8, True)[3]], 0) == consume([items(tokens, 8, False)[3]], 0)


def test_copies_have_new_words(tmp_path):
    write_copies("Zoo, zebra. ", 27, tmp_path/"it.txt")
    copies = re.findall(r"Z.*?\. ", (tmp_path/"it.txt").read_text())
    assert len(copies) == 27 and copies[:2] == ["Zoo, zebra. ", "Zpp, afcsb. "] and copies[26] == copies[0] and len({*copies}) == 26


def test_little_and_much_text_are_opened(tmp_path):
    measure_open(EFFORT, tmp_path, entries := {}, NOBODY)
    small, large = (entries[name] for name in SIZES)
    assert large["text GB"] == pytest.approx(3 * small["text GB"]) and small["prepare s"] > 0 and not any("lost" in entry for entry in entries.values())
    assert len(large["rounds open ms"]) == 1 and large["rounds open ms"][0] > 0
    if Path("/proc/self/statm").exists(): assert large["prepare peak MB"] > 10
    assert not [*tmp_path.glob("*.txt")]


def test_a_program_is_watched_and_its_fault_is_told():
    seen = []
    assert run_python("import time; time.sleep(0.3); print(6 * 7)", watch=seen.append) == "42" and len({*seen}) == 1
    with pytest.raises(TextgenError, match="^ValueError: no room$"): run_python("raise ValueError('no room')")
    with pytest.raises(TextgenError, match="it ended with code 3"): run_python("import sys; sys.exit(3)")
    assert tree_memory(2**22 + 1) == 0


def test_stories_do_where_there_is_no_known_text(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTGEN_DATA", str(tmp_path))
    assert effort_here(copies=2).text == "stories" and effort_here(copies=2).copies == 2
    (tmp_path/"wikitext-2-raw").mkdir()
    (tmp_path/"wikitext-2-raw/wiki.train.raw").touch()
    assert effort_here().text == "wikitext-2" and effort_here().options == {}


# The command

@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_benchmark, "quick_effort", lambda: EFFORT)
    return tmp_path


def test_the_command(here, capsys):
    assert main("benchmark data --quick --only prepare,epoch --output out".split()) == 0
    out, error = capsys.readouterr()
    results = json.loads((here/"out/data.json").read_text(encoding="utf-8"))
    assert list(results["figures"]) == ["prepare", "epoch"] and results["targets"] == {} and results["text"] == "stories" and "Traceback" not in error
    assert results["machine"]["command"] == "textgen benchmark data --only prepare,epoch --quick" and results["machine"]["seeds"]["ids"] == 0
    for part, rows in results["figures"].items():
        assert part in out and rows["textgen"]["s"] > 0 and len({entry["made"] for entry in rows.values() if "made" in entry}) == 1
    keys = {key for rows in results["figures"].values() for entry in rows.values() for key in entry} - {"lost", "made", "batches"}
    assert all(re.search(r"(^| )(s|ms|MB|GB|×)$", key) for key in keys), keys
    assert (here/"out/data.png").read_bytes().startswith(b"\x89PNG") and "the text is stories" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_measured(number, here, monkeypatch, capsys):
    def interrupted(*given): signal.raise_signal(number)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(PARTS, "prepare", interrupted)
    assert main("benchmark data --quick --only epoch,prepare --output out".split()) == 130
    assert capsys.readouterr().err.endswith("interrupted\n") and signal.getsignal(signal.SIGTERM) is before
    assert json.loads((here/"out/data.json").read_text(encoding="utf-8"))["figures"]["epoch"]["textgen"]["s"] > 0


def test_nothing_measured_nothing_saved(here, monkeypatch, capsys):
    monkeypatch.setitem(PARTS, "epoch", lambda *given: 1 / 0)
    assert main("benchmark data --quick --only epoch --output out".split()) == 0
    assert "nothing was measured, and nothing is saved" in capsys.readouterr().out and not (here/"out/data.json").exists()


@pytest.mark.parametrize("words, code, said", [(["--only", "nothing"], 2, "--only: no 'nothing'"), (["--copies", "0"], 2, "--copies"),
                                               (["--output", "file"], 1, "could not write to file")])
def test_refused_at_once(words, code, said, here, capsys):
    (here/"file").touch()
    assert main(["benchmark", "data", *words]) == code
    out, error = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", error) and said in error
