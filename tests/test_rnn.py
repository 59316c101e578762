"""Recurrent models: each framework stays out of the other's process, TensorFlow keeps quiet, and what is wrong with a model is said."""
import os, subprocess, sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="needs the extra lstm")
import textgen
from textgen import rnn
from textgen.core import TextgenError, UsageError
from textgen.loop import TURNS, layers_of, writer
from textgen.lstm import RNNShape, build_network, load_tensorflow
from textgen.rnn import FIRST, ROWS, RNN, tensorflow_device
from textgen.tokenizer import CharTokenizer

tf = load_tensorflow()
import keras

ROOT = Path(__file__).resolve().parent.parent
CHARS = CharTokenizer("abcdefgh .")
SHAPE = RNNShape(units=16, n_embd=8)


def made(shape=SHAPE, scale=3):
    keras.utils.set_random_seed(0)
    network = build_network(shape, CHARS.vocab_size)
    network.set_weights([scale * weight for weight in network.get_weights()])
    return RNN(network, shape, CHARS)


@pytest.fixture(scope="module")
def model(): return made()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rnn")/"model"
    model.save(folder)
    return folder


def alone(code, *arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in ("TF_CPP_MIN_LOG_LEVEL", "KERAS_BACKEND"): env.pop(name, None)
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120)


def test_no_torch_and_no_noise(saved, model, tmp_path):
    "Load, write with and without XLA, score, save, generate and batch at the command line: without PyTorch, and without a word."
    code = ("import sys, textgen\nmodel = textgen.load(sys.argv[1])\n"
            "for model.compile in (False, True): print(model.generate('ab', seed=1, max_new_tokens=20, top_p=0.9)[0].text)\n"
            "model.nll('abc'); model.save(sys.argv[2])\n"
            "import contextlib, io, os\nfrom textgen.cli import main\nos.chdir(sys.argv[3])\n"
            "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:\n"
            "    codes = [main(['generate', '--model', sys.argv[1], '--prompt', 'ab', '--max-new-tokens', '3']),\n"
            "             main(['batch', '--model', sys.argv[1], '--prompts', 'prompts.txt', '--output', 'texts.jsonl'])]\n"
            "assert codes == [0, 0], said.getvalue()\n"
            "print(*[name for name in ('torch', 'jax') if name in sys.modules])")
    (tmp_path/"prompts.txt").write_text("ab\nba\n")
    done = alone(code, saved, tmp_path/"again", tmp_path)
    text = model.generate("ab", seed=1, max_new_tokens=20, top_p=0.9)[0].text
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"{text}\n{text}\n\n"


def test_no_tensorflow(tmp_path):
    "A decoder trains and writes without it."
    code = ("import sys, textgen\nfrom textgen.decoder import Decoder, DecoderConfig\nfrom textgen.gpt import GPT\nimport textgen.trainer, textgen.runs\n"
            "from textgen.tokenizer import CharTokenizer\n"
            "model = GPT(Decoder(DecoderConfig(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=2)), CharTokenizer('abc'))\n"
            "model.save(sys.argv[1]); textgen.load(sys.argv[1]).generate('ab', max_new_tokens=3)\n"
            "print(*[name for name in ('tensorflow', 'keras') if name in sys.modules])")
    done = alone(code, tmp_path/"gpt")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


def test_errors_of_tensorflow_are_said():
    done = alone("from textgen.lstm import quiet\nimport os\n"
                 "with quiet():\n    os.write(2, b'I0000 1 a.cc:1] fine\\nE0000 2 b.cc:2] not fine\\n')\n    raise SystemExit(3)")
    assert (done.returncode, done.stderr) == (3, "E0000 2 b.cc:2] not fine\n")


def test_another_backend_was_there_first():
    done = alone("import sys, types\nkeras = types.ModuleType('keras')\nkeras.backend = types.SimpleNamespace(backend=lambda: 'jax')\n"
                 "sys.modules['keras'] = keras\nfrom textgen.lstm import load_tensorflow\nload_tensorflow()")
    assert "Keras was imported before, on jax; set KERAS_BACKEND=tensorflow first" in done.stderr


@pytest.mark.parametrize("compile", [False, True])
def test_one_graph_for_all_lengths_temperatures_and_seeds(compile):
    model = made(RNNShape(units=8 + compile, n_embd=4))
    model.compile, graph = compile, writer("lstm", compile)
    model.generate("ab", max_new_tokens=9, temperature=0.7, seed=0)
    before = graph.experimental_get_tracing_count()
    for count, temperature, seed in ((1, 0.5, 1), (FIRST + 1, 1.3, 2), (TURNS * 2 + 3, 0.9, 3), (4, 1.0, 4)):
        model.generate("abc", max_new_tokens=count, temperature=temperature, seed=seed)
    assert graph.experimental_get_tracing_count() == before
    model.generate(["ab"] * 3, max_new_tokens=2, temperature=0.5)   # three rows are four
    assert graph.experimental_get_tracing_count() == before + 1
    model.generate(["ab"] * 4, max_new_tokens=2, temperature=0.5)
    assert graph.experimental_get_tracing_count() == before + 1


def test_the_graph_is_looked_for_once_a_text(monkeypatch):
    model, looked = made(RNNShape(units=8, n_embd=4)), []
    model.compile, find = False, writer("lstm", False).get_concrete_function
    found = type("Found", (), {"get_concrete_function": lambda self, *given: looked.append(given) or find(*given)})
    expected = model.generate("ab", max_new_tokens=2 * TURNS, seed=1)[0].text
    monkeypatch.setattr(rnn, "writer", lambda *_: found())
    assert model.generate("ab", max_new_tokens=2 * TURNS, seed=1)[0].text == expected and len(looked) == 1


def test_a_network_of_given_weights_sees_no_constants():
    "Two models of one shape share a graph: weights are arguments of it."
    one, other = made(), made(scale=2)
    one.generate("ab", max_new_tokens=3, seed=0)
    before = writer("lstm", False).experimental_get_tracing_count()
    texts = [model.generate("ab", max_new_tokens=30, seed=0)[0].text for model in (one, other)]
    assert texts[0] != texts[1] and writer("lstm", False).experimental_get_tracing_count() == before


def test_more_rows_than_one_company(model):
    prompts = ["ab", "c", "fed"] * 30
    rows = model.generate(prompts, max_new_tokens=5, seed=4)
    assert len(rows) == 90 > ROWS and rows[:3] == rows[-3:] == model.generate(prompts[:3], max_new_tokens=5, seed=4)


def test_a_long_prompt_is_read_in_parts(model):
    prompt = "abc. fed " * 40
    assert len(prompt) > 2 * TURNS
    first = model.generate(prompt, max_new_tokens=1, temperature=0, logprobs=0)[0]
    told = model.nll([prompt + first.text, prompt])
    assert first.logprobs[0].logprob == pytest.approx(told[1] - told[0], abs=1e-3)


def test_broken_weights_are_named(model):
    weights = model.network.get_weights()
    network = build_network(SHAPE, CHARS.vocab_size)
    network.set_weights([*weights[:-1], np.full_like(weights[-1], np.nan)])
    with pytest.raises(TextgenError, match="gave no numbers at new token 1 of row 0: its weights hold NaN"):
        RNN(network, SHAPE, CHARS).generate("ab")


def test_what_is_wrong_with_a_request(model):
    with pytest.raises(UsageError, match="'z'"): model.generate("abz")
    with pytest.raises(UsageError, match="no end-of-text token to start from"): model.generate("")
    with pytest.raises(UsageError, match="the tokenizer has 3 tokens and the model 10"): RNN(model.network, SHAPE, CharTokenizer("abc"))
    with pytest.raises(UsageError, match=r"regex '\('"): model.stream("ab", regex="(")


def test_a_folded_table_is_the_layer(monkeypatch):
    "With a vocabulary too large for a table of products, the first layer multiplies; texts stay the same."
    for shape in (SHAPE, RNNShape(cell="gru", units=16, n_embd=8)):
        folded = made(shape).generate(["ab", "c"], seed=1, max_new_tokens=40)
        monkeypatch.setattr("textgen.loop.FOLDED", 0)
        assert layers_of(made(shape).network, shape)["layers"][0]["kernel"] is not None
        assert made(shape).generate(["ab", "c"], seed=1, max_new_tokens=40) == folded
        monkeypatch.undo()


def test_a_full_disk_leaves_the_model(saved, model, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr("textgen.rnn.write_object", full)
    with pytest.raises(TextgenError, match="No space left"): model.save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_the_first_of_several_gpus(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a GPU"] * 2)
    assert [tensorflow_device(name) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["/GPU:0", "/GPU:0", "/GPU:1", "/CPU:0"]


def test_textgen_loads_it_from_the_command_line(saved, capsys):
    from textgen.cli import main
    assert main(["generate", "--model", str(saved), "--prompt", "ab", "--seed", "1", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("ab")
    assert main(["generate", "--model", str(saved), "--prompt", "ab", "--device", "cuda:5"]) == 2
    assert "no device 'cuda:5' here" in capsys.readouterr().err
    assert type(textgen.load(saved)).__name__ == "RNN"
