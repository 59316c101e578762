"Recurrent models by the command line and the registry: trained, stopped, resumed, refused; and no other framework is loaded."
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

from textgen import runs
from textgen.cli import main
from textgen.core import TextgenError, UsageError, load
from textgen.fitting import Interrupted, fit
from textgen.recipe import load_recipe
from textgen.resume import changes, checkpoints, restore, save_checkpoint
from textgen.rnn_trainer import start, started

pytest.importorskip("tensorflow")

ROOT = Path(__file__).resolve().parent.parent
TEXT = "".join(f"{name} has {count} red {thing}s.\n" for name in ("Ann", "Bob", "Cleo") for count in range(2, 10)
               for thing in ("hat", "kite", "bell", "drum"))
TINY = {"data": "text.txt", "data_options": {}, "tokenizer": "char", "rows": "streams", "length": 16, "batch_size": 4,
        "steps": 12, "evaluate_every": 6, "checkpoint_every": 6, "log_every": 1, "device": "cpu", "precision": "fp32",
        "model.units": 16, "model.n_embd": 8, "model.tie_word_embeddings": False, "sample.prompts": 1, "sample.stories": 0,
        "sample.settings.max_new_tokens": 8}
TYPED = [word for key, value in TINY.items() if key != "data" for word in ("--set", f"{key}={json.dumps(value)}")]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "An empty folder with a text in it, to be in."
    (tmp_path/"text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "draw_curve", lambda folder: None)
    monkeypatch.setattr("textgen.rnn_trainer.matmul_peak", lambda device, dtype: 1e9)
    return tmp_path


def recipe(name="lstm-demo", **more): return load_recipe(name, {**TINY, **{key.replace("__", "."): value for key, value in more.items()}})


def go(out, resume=False, force=False, name="lstm-demo", **more): return runs.train(recipe(name, **more), out, resume, force=force)[1]


def losses(folder): return [line["nats_per_token"] for line in runs.read_lines(folder)]


@pytest.mark.parametrize("name, more", [("lstm-demo", {}), ("gru-demo", {"rows": "chunks"}),
                                        ("lstm-demo", {"model.tie_word_embeddings": True, "optimizer.weight_decay": 0.1})], ids=str)
def test_a_run_by_the_command_line(name, more, home, capsys):
    "Trains, says what it got, and leaves a model that opens, writes the same, and has the loss that was said."
    words = [word for key, value in more.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["train", name, "--data", "text.txt", "--out", "run", *TYPED, *words]) == 0
    said = capsys.readouterr().out
    result = json.loads(Path("run/result.json").read_text())
    assert f"val {result['nats_per_char']:.4f} nats/char" in said and result["samples"][0]["prompt"] in said
    assert re.search("tensorflow", json.dumps(result["machine"])) and result["mfu_percent"] > 0 and result["parameters"] > 1000
    model, config = load("run", device="cpu"), runs.read_config("run")
    assert config.generator == "rnn" and config.model.cell == name[: name.index("-")] == model.shape.cell
    sample = result["samples"][0]
    prepared = start(config, home/"again", "data").prepared
    assert prepared.tokenizer.pieces == model.tokenizer.pieces
    with started(config, lambda: home/"again", "data") as run: assert run.score(model).nats_per_char == pytest.approx(result["nats_per_char"], rel=1e-5)
    assert main(["generate", "--model", "run", "--prompt", sample["prompt"], "--temperature", "0", "--max-new-tokens", "5"]) == 0
    text = sample["prompt"] + model.generate(sample["prompt"], temperature=0, max_new_tokens=5)[0].text
    assert capsys.readouterr().out == text + "\n" * (not text.endswith("\n"))


@pytest.mark.parametrize("more", [{}, {"rows": "documents", "data": "stories", "data_options": {"train": 60, "validation": 9}},
                                  {"model__dropout": 0.3, "model__cell": "gru"}], ids=str)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(more, home):
    "Bit for bit, by the record as well: weights, Adam's memories, the state of the streams, the best loss."
    whole = go("whole", **more)
    run = start(recipe(**more), "cut", "data")
    run.folder.mkdir()
    runs.write_config(run.config, run.folder)
    with pytest.raises(Interrupted, match="after step 8 of 12"):
        fit(run, runs.recorder(run), lambda: run.step == 8, save_checkpoint)
    cut = go("cut", resume=True, **more)
    assert losses("cut") == losses("whole") and len(losses("cut")) == 12
    assert cut["nats_per_token"] == whole["nats_per_token"] and cut["samples"] == whole["samples"]
    last = [load(Path(name), device="cpu").network.get_weights() for name in ("whole", "cut")]
    for ours, theirs in zip(*last): assert np.array_equal(ours, theirs)


def test_the_layers_of_keras_go_on_as_well(home):
    "On a GPU the step is that of Keras's layers; their dropout follows from the seed and the step, too."
    runs_of = []
    for stop in (None, 5):
        run = start(recipe(model__dropout=0.3), home/"keras", "data")
        run.__class__ = type("OnGPU", (type(run),), {"lags": True, "score": lambda self, model=None: judged})
        judged = type("Score", (), {"nats_per_token": 1.0, "nats_per_char": 1.0})
        while run.step < (stop or 9): loss = run.learn()
        if stop:
            path = save_checkpoint(run)
            run = start(recipe(model__dropout=0.3), home/"keras", "data")
            run.__class__ = type("OnGPU", (type(run),), {"lags": True})
            restore(run)
            assert run.step == stop and checkpoints(run.folder) == [path]
            while run.step < 9: loss = run.learn()
        runs_of.append((float(loss), run.network.get_weights()))
    assert runs_of[0][0] == runs_of[1][0]
    for ours, theirs in zip(*(weights for _, weights in runs_of)): assert np.array_equal(ours, theirs)


def test_a_kind_means_its_newest_run(home, capsys):
    "`--model lstm`, `--model gpt`: which run was taken is said; without one, how to make it."
    assert main(["generate", "--model", "lstm", "--prompt", "Ann"]) == 2
    assert capsys.readouterr().err == "error: no lstm run in runs; make one: textgen train lstm-demo\n"
    assert main(["generate", "--model", "gpt", "--prompt", "Ann"]) == 2
    assert "textgen train demo" in capsys.readouterr().err
    for number in (1, 2): go(None, steps=2, seed=number)
    go(None, name="gru-demo", steps=2)
    for kind, folder in (("lstm", "runs/lstm-demo-2"), ("gru", "runs/gru-demo"), ("rnn", "runs/gru-demo")):
        assert main(["generate", "--model", kind, "--prompt", "Ann", "--seed", "3", "--max-new-tokens", "5"]) == 0
        said = capsys.readouterr()
        assert said.err == f"model {folder}\nseed 3\n" and said.out.startswith("Ann")
        assert load(kind).shape == load(folder).shape
    assert main(["generate", "--model", "hf", "--prompt", "Ann"]) == 2
    assert "as in hf:gpt2" in capsys.readouterr().err
    (home/"lstm").mkdir()  # a folder of that name is the folder
    with pytest.raises(UsageError, match="no config.json"): load("lstm")


def test_other_settings_make_another_run(home):
    go("run", steps=6)
    (home/"run/result.json").unlink()
    with pytest.raises(UsageError, match="model.units was 16, not 24"): go("run", resume=True, steps=6, model__units=24)
    assert changes(recipe(), recipe(log_every=3)) == (["log_every was 1, not 3"], [])
    with pytest.raises(TextgenError, match="was made with another text, tokenizer, model"):
        restore(start(recipe(model__units=24), "run", "data"))
    with pytest.raises(TextgenError, match="was made with another text, tokenizer, model"):
        restore(start(recipe(tokenizer="bpe:300"), "run", "data"))
    with pytest.raises(UsageError, match="generator was 'rnn', not 'gpt'"):
        runs.train(load_recipe("demo", {"data": "text.txt"}), "run", resume=True)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(home, capsys):
    go("run")
    (home/"run/result.json").unlink()
    newest = checkpoints("run")[-1]
    (newest/"model.keras").write_bytes((newest/"model.keras").read_bytes()[:500])
    assert go("run", resume=True)["steps"] == 12
    said = capsys.readouterr().err
    assert "model.keras is damaged" in said and "going on from step-000006" in said


def test_patience_and_the_best_weights(home):
    "Early stopping: what is handed on is the best, and its loss is the one that is said."
    result = go("run", patience=1, keep_best=True, steps=200, evaluate_every=4, optimizer__learning_rate=1.0, optimizer__floor=1.0)
    scores = [line["validation"]["nats_per_token"] for line in runs.read_lines("run") if "validation" in line]
    assert result["steps"] < 200 and result["nats_per_token"] == min(scores) < scores[-1]
    run = start(runs.read_config("run"), "again", "data")
    assert run.score(load("run", device="cpu")).nats_per_token == pytest.approx(min(scores), rel=1e-6)


def test_a_loss_that_is_no_number_is_named(home):
    run = start(recipe(), "run", "data")
    run.network.get_layer("head").bias.assign(np.full(run.prepared.tokenizer.vocab_size, np.nan))
    with pytest.raises(TextgenError, match="at step 1 the loss is nan"): fit(run)
    with pytest.raises(TextgenError, match="some weights are no numbers"): save_checkpoint(run)


def test_what_is_refused(home, monkeypatch):
    def told(part, **more):
        with pytest.raises(UsageError, match=part) as error: go("run", **more)
        assert "\n" not in str(error.value) and not Path("run").exists()
    told("too few for 400 streams of 16; give more text", batch_size=400)
    told("one chunk with its shifted targets takes 90001", length=90000)
    told("number of rows to learn from", rows="chunks", batch_size=4000)
    told("no device 'cuda:99' here", device="cuda:99")
    told("is no token", sample__settings__stop_token_ids=[999])
    told("unknown key 'optimizer.momentum'", optimizer__momentum=0.9)
    told("unknown key 'lora'", lora=None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told("without torchrun")


def test_a_letter_that_training_never_saw_is_named(home):
    go("run", steps=1)
    with pytest.raises(UsageError, match="'é'.* was not in the training text"): load("run").generate("é")


def test_training_one_kind_loads_no_framework_of_the_other_and_ctrl_c_saves(home):
    "A process of its own, stopped by Ctrl-C on its way, goes on where it was; torch is never imported."
    code = ("import sys\nfrom textgen import runs, rnn_trainer\nfrom textgen.cli import main\n"
            "rnn_trainer.matmul_peak = lambda device, dtype: 1e9\nruns.draw_curve = lambda folder: None\ncode = main()\n"
            "assert 'torch' not in sys.modules and 'tensorflow' in sys.modules, 'frameworks'\nsys.exit(code)")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = ["train", "lstm-demo", "--data", "text.txt", "--out", "run", *TYPED, "--set", "steps=100000", "--set", "checkpoint_every=100000"]
    process = subprocess.Popen([sys.executable, "-c", code, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.time() + 120
        while len(runs.read_lines("run")) < 20 and time.time() < end and process.poll() is None: time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally: process.kill()
    assert process.returncode == 130 and "and saved; go on with: textgen train --resume --out run" in err and "Traceback" not in err
    [path] = checkpoints("run")
    step = int(path.name[5:])
    assert go("run", resume=True, force=True, steps=step + 3, checkpoint_every=100000)["steps"] == step + 3


@pytest.mark.gpu
def test_on_a_gpu(home):
    "Keras's layers, which cuDNN computes, in mixed precision; the model is as good on the processor."
    from textgen.lstm import load_tensorflow
    if not load_tensorflow().config.list_physical_devices("GPU"): pytest.skip("TensorFlow sees no GPU")
    result = go("run", device="cuda", precision="auto", model__dropout=0.1)
    assert result["machine"]["device"] == "cuda" and result["peak_memory_bytes"] > 0
    run = start(recipe(model__dropout=0.1), "again", "data")
    assert run.score(load("run", device="cpu")).nats_per_token == pytest.approx(result["nats_per_token"], rel=0.02)


@pytest.mark.slow
def test_the_shipped_recipe_reaches_its_target(home):
    "Tiny Shakespeare within 1.88 nats per character; ten minutes of two cores."
    data = Path(os.environ.get("TEXTGEN_DATA", ROOT.parent/"shared/data"))/"tinyshakespeare/input.txt"
    if not data.is_file(): pytest.skip("no Tiny Shakespeare")
    assert runs.train(load_recipe("lstm-shakespeare"), "run")[1]["nats_per_char"] < 1.88
