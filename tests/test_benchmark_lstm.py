"""`textgen benchmark lstm`: every way is the same model, ratios and targets are what they say, and no fault loses the others' figures.

No test says how fast anything is: the machine that runs them has other things to do.
"""
import json, os, re, signal, statistics, subprocess, sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="needs the extra lstm")
from textgen import lstm_benchmark, ways
from textgen.figures import check_same, draw_bars, draw_table, targets
from textgen.cli import main
from textgen.core import TextgenError
from textgen.lstm import RNNShape
from textgen.lstm_benchmark import (AT_MOST, PARTS, SEEDED, STARTERS, TARGETS, TRAINERS, WRITERS, Effort, Here, check_losses, compare,
                                    confined, note_texts, quick_effort, race, start_anew, task_of)
from textgen.peers import Contestant, Lost

pytestmark = pytest.mark.usefixtures("one_thread")
EFFORT = Effort(rounds=2, count=12, few=3, batch=2, steps=2, size=(2, 5), least=0, starts=1, processes=False)
NOBODY = lambda name: None


def saved(folder, cell="lstm"):
    ways.write_model(folder, RNNShape(cell=cell, units=8, n_embd=4))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory): return saved(tmp_path_factory.mktemp("lstm"))


@pytest.fixture(scope="module")
def gru(tmp_path_factory): return saved(tmp_path_factory.mktemp("gru"), "gru")


def opened(contestants, folder):
    "Runners in this process, and their entries."
    return {one.name: Here(one, folder) for one in contestants}, {one.name: {} for one in contestants}


# Ways

def test_all_write_the_same(folder):
    "Greedily all of them; from a seed those who say so; what has a window too short for it is asked for less."
    runners, entries = opened(WRITERS, folder)
    race("batch", replace(EFFORT, contestants=WRITERS), ways.read_arrays(folder), runners, entries, NOBODY)
    assert list(runners) == [one.name for one in WRITERS] and [len(entry["rounds ms"]) for entry in entries.values()] == [2] * 6
    assert all(not entry.keys() & {"differs", "lost"} for entry in entries.values())
    assert [name for name, entry in entries.items() if "remarks" in entry] == ["predict loop"]
    task = task_of("batch", replace(EFFORT, count=20), WRITERS[1])
    rows = [runners[name].ask(task.prompts, 20, (0.8, 3))[1] for name in sorted(SEEDED)]
    assert rows[0] == rows[1] == rows[2] and len(set(rows[0])) == 2 and all(len(row) == 20 for row in rows[0])
    other = [runners[name].ask(task.prompts, 20, (0.8, 4))[1] for name in ("NumPy", "OneStep", "torch")]
    assert other[0] != rows[0] and all(set("".join(found)) <= set(ways.LETTERS) for found in other)


def test_a_gru_too(gru):
    some = [one for one in WRITERS if one.name in ("torch", "NumPy", "textgen graph")]
    runners, entries = opened(some, gru)
    race("write", replace(EFFORT, contestants=some), ways.read_arrays(gru), runners, entries, NOBODY)
    assert len(runners) == len(some) and not any("differs" in entry or "remarks" in entry for entry in entries.values())
    some = [one for one in TRAINERS if one.name in ("torch", "textgen float32")]
    runners, entries = opened(some, gru)
    race("train", replace(EFFORT, contestants=some), None, runners, entries, NOBODY)
    losses = [entry["loss nats/char"] for entry in entries.values()]
    assert losses == pytest.approx([losses[0]] * 2, abs=1e-3)


def test_all_learn_the_same(folder):
    some = [one for one in TRAINERS if one.name in ("Keras layers: own step", "torch", "textgen float32")]   # the others take seconds to compile
    runners, entries = opened(some, folder)
    race("train", replace(EFFORT, contestants=some, rounds=1), None, runners, entries, NOBODY)
    losses = [entry["loss nats/char"] for entry in entries.values()]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-3)
    [later] = runners["textgen float32"].ask([EFFORT.size], 2, None)[1]
    assert statistics.mean(later) < losses[0]


def test_the_window_is_all_that_predict_sees(folder):
    "A character that is forty back counts, one that is further back does not."
    network, ids = ways.keras_network(ways.read_arrays(folder), last=True), np.arange(ways.WINDOW + 1)[None]
    seen = []
    predict, network.predict = network.predict, lambda ids, verbose: seen.append(ids) or predict(ids, verbose=verbose)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ways, "keras_network", lambda *_, **__: network)
        [text] = ways.open_predict(folder, "float32")(["".join(ways.LETTERS[i] for i in ids[0])], 2, (0, 1))
    assert [found.shape for found in seen] == [(1, ways.WINDOW)] * 2 and seen[0].tolist() == ids[:, 1:].tolist()
    assert seen[1][0, -1] == ways.LETTERS.index(text[0])


def test_drawing():
    logits = np.log(np.array([[0.5, 0.25, 0.25]] * 4, "float32"))
    assert ways.drawn(logits, 1.0, np.array([0, 0.49, 0.51, 0.99])).tolist() == [0, 0, 1, 2]
    assert ways.drawn(logits, 0.5, np.array([0.66, 0.67, 0.8, 0.9])).tolist() == [0, 1, 1, 2]   # 4 : 1 : 1
    assert ways.drawn(logits, 0, np.array([0.99] * 4)).tolist() == [0] * 4


def test_the_same_weights_each_time(folder, tmp_path):
    one, other = (ways.read_arrays(where) for where in (folder, saved(tmp_path)))
    assert np.array_equal(one["embedding"], other["embedding"]) and np.array_equal(one["layers"][1][1], other["layers"][1][1])
    assert (one["layers"][0][2][8:16] == 1).all() and len(one["bias"]) == len(ways.LETTERS) == 65   # Keras's bias for what is kept


# Figures

def test_another_model_is_found_out(folder):
    tasks = {name: task_of("write", EFFORT, Contestant(name, None)) for name in ("NumPy", "torch", "textgen XLA")}
    text = Here(WRITERS[3], folder).ask(tasks["NumPy"].prompts, 12, (0.0, 1))[1]
    wrong = [text[0][:4] + chr(32 + (ord(text[0][4]) - 31) % 65) + text[0][5:]]
    entries = {name: {} for name in tasks}
    written = {"torch": (wrong, text), "textgen XLA": (text, wrong), "NumPy": (text, text)}
    note_texts(ways.read_arrays(folder), written, entries, tasks, dict.fromkeys(tasks, 1e-3))
    assert entries["torch"]["differs"]["token"] == 4 and "remarks" not in entries["torch"]   # its dice are its own
    assert entries["textgen XLA"] == {"remarks": ["another text from the same seed in 1 of 1"]} and entries["NumPy"] == {}
    with pytest.raises(TextgenError, match="write: torch writes other tokens in float32"): check_same({"figures": {"write": entries}})
    assert "another text from the same seed" in draw_table("write", entries, ["ms"], {}).caption
    entries = {"fit": {"loss nats/char": 4.5}, "torch": {"loss nats/char": 4.52}, "textgen bfloat16": {"loss nats/char": 4.6}}
    with pytest.raises(TextgenError, match="train: torch has a loss of 4.5200 after the same steps, and fit of 4.5000"): check_losses(entries)
    check_losses({**entries, "torch": {"lost": "not there"}})


def test_medians_of_ratios_and_targets():
    "Neighbouring turns are compared: the machine was slow in the second round, for both."
    entry = lambda *ms: {"characters": 500, "rounds ms": [*ms]}
    results = {"figures": {"write": {"predict loop": entry(30000, 90000, 31000), "OneStep": entry(280, 840, 290), "textgen XLA": entry(28, 90, 27)},
                           "batch": {"predict loop": {"lost": "no Keras"}, "OneStep": entry(600, 600, 600), "textgen XLA": entry(500, 500, 500)},
                           "first-call": {"textgen XLA": {"rounds first call s": [1.5, 2.5, 1.6], "rounds traces": [1, 1, 1], "rounds again ms": [5, 6, 7]}}}}
    compare(results)
    compare(results)   # again: nothing changes
    ours = results["figures"]["write"]["textgen XLA"]
    assert ours["ms"] == 28 and ours["characters/s"] == pytest.approx(500 / 0.028) and ours["OneStep ×"] == 10
    assert ours["predict ×"] == pytest.approx(30000 / 28) and "predict ×" not in results["figures"]["write"]["predict loop"]
    found = targets(results, TARGETS, AT_MOST)
    assert [one.get("met") for one in found.values()] == [True, True, None, False, True, True]   # no training was asked for
    assert found["batch: textgen XLA, predict ×"]["why"] == "no Keras" and found["first-call: textgen XLA, first call s"]["measured"] == 1.6


def test_every_target_names_what_is_measured():
    for (part, row), wanted in TARGETS.items():
        assert row in [one.name for one in PARTS[part]] and wanted.keys() <= {*lstm_benchmark.COLUMNS[part]}
    assert all(peer in [one.name for one in PARTS[part]] for part, peers in lstm_benchmark.AGAINST.items() for peer in peers)
    assert AT_MOST < {key for one in TARGETS.values() for key in one} and SEEDED < {one.name for one in WRITERS}


def test_a_turn_of_few_characters_is_reckoned(folder):
    "A clock that always says 0.1 s: for three characters of twelve that is 400 ms, and turns are repeated until they last."
    class Still:
        asked = 0
        def ask(self, prompts, count, how):
            self.asked += 1
            return 0.1, [["a" * count]]
    entry, runner = {}, Still()
    lstm_benchmark.take_turn(runner, entry, task := task_of("write", EFFORT, WRITERS[0]), 0.25)
    assert entry["rounds ms"] == pytest.approx([400]) and runner.asked == 3 and (task.count, task.unit, task.characters) == (3, 12, 12)
    assert task_of("train", EFFORT, TRAINERS[0]) == lstm_benchmark.Task([(2, 5)], 2, 1, 10)


# Processes and faults

def test_a_new_process_for_the_first_call(folder):
    "By hand, which needs no TensorFlow: two processes, two first calls, and no graphs; who fails is not asked again."
    some = [replace(STARTERS[0], name="NumPy", settings={"way": ways.open_numpy}), replace(STARTERS[0], name="broken", settings={"way": int})]
    entries, told = {}, []
    with confined(1): start_anew(replace(EFFORT, starts=2, contestants=some), folder, entries, told.append)
    assert entries["broken"].keys() == {"lost"} and "TypeError" in entries["broken"]["lost"] and told == ["NumPy", "NumPy"]
    assert [len(entries["NumPy"][f"rounds {key}"]) for key in ("first call s", "again ms", "traces")] == [2, 2, 2]
    assert entries["NumPy"]["rounds traces"] == [0, 0] and min(entries["NumPy"]["rounds first call s"]) > 0


def test_who_fails_loses_only_itself(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.functional", None)
    with pytest.raises(Lost, match="ModuleNotFoundError"): Here(next(one for one in TRAINERS if one.name == "torch"), folder)
    bad = Contestant("bad", lambda *_: lambda *_: 1 / 0)
    runners, entries = opened([bad, WRITERS[3]], folder)
    race("write", replace(EFFORT, contestants=[bad, WRITERS[3]]), ways.read_arrays(folder), runners, entries, NOBODY)
    assert "ZeroDivisionError" in entries["bad"]["lost"] and len(entries["NumPy"]["rounds ms"]) == 2


def test_threads_of_processes_to_come(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(KeyError), confined(2):
        assert os.environ["OMP_NUM_THREADS"] == "2" and os.environ["CUDA_VISIBLE_DEVICES"] == "-1"
        raise KeyError
    assert os.environ["OMP_NUM_THREADS"] == "7" and "CUDA_VISIBLE_DEVICES" not in os.environ


def test_without_tensorflow(tmp_path):
    code = ("import importlib.util as util, sys\nreal = util.find_spec\n"
            "util.find_spec = lambda name, *more: None if name == 'tensorflow' else real(name, *more)\n"
            "from textgen.cli import main\nsys.exit(main(['benchmark', 'lstm', '--quick', '--output', 'out']))")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path/"out").exists()
    assert done.stderr == 'error: recurrent models need TensorFlow; install it: pip install "textgen[lstm]"\n'


# The command

@pytest.fixture
def few(monkeypatch):
    "Those that need no compiler."
    torch, steps = WRITERS[2], next(one for one in TRAINERS if one.name == "torch")
    some = {"write": [torch, WRITERS[3]], "batch": [replace(torch, name="predict loop"), WRITERS[3]], "train": [replace(steps, name="fit"), steps],
            "first-call": [replace(STARTERS[0], name="NumPy", settings={"way": ways.open_numpy})]}
    monkeypatch.setattr(lstm_benchmark, "PARTS", some)
    monkeypatch.setattr(lstm_benchmark, "AGAINST", {"write": ["torch"], "batch": ["predict loop"], "train": ["fit"], "first-call": []})


def leaves(tree, key=""):
    if isinstance(tree, dict):
        for name, value in tree.items(): yield from leaves(value, name)
    elif isinstance(tree, list):
        for value in tree: yield from leaves(value, key)
    elif isinstance(tree, float): yield key


def test_the_command(few, tmp_path, monkeypatch, capsys):
    "A quick run: all parts and rows in the table and in JSON, keys that end in units, a picture, no targets."
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", "lstm", "--quick", "--output", "out"]) == 0
    out, error = capsys.readouterr()
    results = json.loads((tmp_path/"out/lstm.json").read_text(encoding="utf-8"))
    assert {part: list(rows) for part, rows in results["figures"].items()} == {
        "write": ["torch", "NumPy"], "batch": ["predict loop", "NumPy"], "train": ["fit", "torch"], "first-call": ["NumPy"]}
    assert results["targets"] == {} and results["shape"]["units"] == 32 and results["machine"]["versions"]["tensorflow"]
    for part in ("write", "batch", "train"):
        assert part in out and all(entry["characters/s"] > 0 and len(entry["rounds ms"]) == 2 for entry in results["figures"][part].values())
    assert results["figures"]["train"]["torch"]["fit ×"] > 0 and results["figures"]["first-call"]["NumPy"]["traces"] == 0
    assert "predict loop: measured on 1 characters a text, and reckoned for 60" in " ".join(out.split()) and "Traceback" not in error
    kept = {key for key in leaves({**results, "shape": {}})}
    assert all(re.search(r" ?(characters/s|nats/char|ms|s|×|traces)$", key) for key in kept), kept
    assert (tmp_path/"out/lstm.png").read_bytes().startswith(b"\x89PNG")


def test_a_gru_by_the_command(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("benchmark lstm --quick --cell gru --only write --output out".split()) == 0
    results = json.loads((tmp_path/"out/gru.json").read_text(encoding="utf-8"))
    assert results["shape"]["cell"] == "gru" and list(results["figures"]) == ["write"] and (tmp_path/"out/gru.png").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_measured(number, few, tmp_path, monkeypatch, capsys):
    "In the second part: the first one is saved, the exit code is 130, and nobody else's ctrl-C is changed."
    act, before = lstm_benchmark.take_turn, signal.getsignal(signal.SIGTERM)

    def interrupted(runner, entry, task, least):
        if len(task.prompts) > 1: signal.raise_signal(number)
        act(runner, entry, task, least)

    monkeypatch.setattr(lstm_benchmark, "take_turn", interrupted)
    monkeypatch.chdir(tmp_path)
    assert main("benchmark lstm --quick --only write,batch --output out".split()) == 130
    out, error = capsys.readouterr()
    assert error.endswith("interrupted\n") and signal.getsignal(signal.SIGTERM) is before
    figures = json.loads((tmp_path/"out/lstm.json").read_text(encoding="utf-8"))["figures"]
    assert figures["write"]["NumPy"]["characters/s"] > 0 and "ms" not in figures["batch"]["NumPy"]


def test_nothing_measured_nothing_saved(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lstm_benchmark, "PARTS", {"write": [Contestant("textgen XLA", int)]})
    monkeypatch.setattr(lstm_benchmark, "AGAINST", {"write": []})
    lstm_benchmark.run(["write"], quick_effort(), tmp_path/"out", {})
    out = " ".join(capsys.readouterr().out.split())
    assert "TypeError" in out and "nothing was measured, and nothing is saved" in out and "? 1000" in out and "0 of 2 met" in out
    assert not (tmp_path/"out/lstm.json").exists()


def test_a_picture_of_what_is_there(tmp_path):
    results = {"figures": {"write": {"OneStep": {"characters/s": 5.0}, "torch": {"lost": "no"}}, "train": {"fit": {"lost": "no"}}}}
    draw_bars(results, lstm_benchmark.SHOWN, tmp_path/"one.png")
    assert (tmp_path/"one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, code, said", [(["--only", "nothing"], 2, "--only: no 'nothing'"), (["--cell", "rnn"], 2, "'rnn'"),
                                               (["--rounds", "0"], 2, "--rounds"), (["--output", "file"], 1, "could not write to file")])
def test_refused_at_once(words, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").touch()
    assert main(["benchmark", "lstm", *words]) == code
    out, error = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: [^\n]+\n", error) and said in error
