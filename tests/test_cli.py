"""The command line as a user meets it: typed lines, exit codes, and one line for every mistake.

What works, what is interrupted, and one mistake of each kind run in processes of their own. The other mistakes run in this one, which
has imported PyTorch already; what they leave on its standard output and error, down to the file descriptors, is all that is looked at.
Everything shares one tiny run by characters (`work/runs/fox`, on `fable.txt`), which the first test that needs it trains.
"""
import json, os, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest

from textgen.cli import deliver, main, written
from textgen.core import GenerationConfig
from textgen.generator import Piece

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())"]  # what the script `textgen` does
FABLE = "The fox looked up at the grapes, and the grapes looked down at the fox.\n" * 40
TINY = ["--set", "tokenizer=char", "--set", "device=cpu", "--set", "steps=40", "--set", "length=32", "--set", "batch_size=4",
        "--set", "model.n_layer=1", "--set", "model.n_embd=32", "--set", "model.n_positions=32", "--set", "evaluate_every=20",
        "--set", "checkpoint_every=20", "--set", "sample.prompts=1", "--set", "sample.settings.max_new_tokens=20"]


def environment(): return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}


def textgen(line, cwd, stdin=None, more=()):
    "Type a line; the finished process, its output as text."
    return subprocess.run([*PROGRAM, *shlex.split(line), *more], cwd=cwd, env=environment(), input=stdin, capture_output=True,
                          text=not isinstance(stdin, bytes))


@pytest.fixture
def typed(capfd, monkeypatch):
    "The same in this process."
    def type_it(line, cwd, more=()):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["-c"])   # as in a process of its own
        code, said = main([*shlex.split(line), *map(str, more)]), capfd.readouterr()
        return SimpleNamespace(returncode=code, stdout=said.out, stderr=said.err)
    return type_it


def refused(done, *parts, code=2):
    "A wrong input: the code, one line on standard error that begins with 'error: ' and has these parts, nothing of a trace."
    error = done.stderr.decode() if isinstance(done.stderr, bytes) else done.stderr
    assert done.returncode == code, error
    assert re.fullmatch(r"error: [^\n]+\n", error), error
    for part in parts: assert part in error, error


@pytest.fixture(scope="module")
def work(tmp_path_factory, compiled_step):
    "A folder with a text and, in runs/fox, a small run on it."
    folder = tmp_path_factory.mktemp("work")
    (folder/"fable.txt").write_text(FABLE, encoding="utf-8")
    done = textgen("train demo --data fable.txt --out runs/fox", folder, more=TINY)
    assert done.returncode == 0, done.stderr
    (folder/"trained.txt").write_text(done.stdout, encoding="utf-8")
    return folder


@pytest.fixture
def run(work, tmp_path):
    "A copy of the run, to damage."
    return Path(shutil.copytree(work/"runs/fox", tmp_path/"fox"))


# What is printed

def test_help_teaches():
    "Each command's help has an example; the first answer needs no framework, and so is quick."
    done = textgen("--help", ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    code = "import sys; from textgen.cli import main; main(['--help']); print(*{'torch', 'tensorflow', 'transformers'} & {*sys.modules})"
    same = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert same.stdout == done.stdout + "\n"
    assert "train" in done.stdout and "generate" in done.stdout and "data" in done.stdout
    assert textgen("", ROOT).stdout == done.stdout
    for command in ["train", "generate"]:
        shown = textgen(f"{command} --help", ROOT).stdout
        assert re.search(rf"Examples?:\n +textgen {command} ", shown), shown


@pytest.mark.parametrize("broken", [False, True])
def test_command_of_another_package(broken, tmp_path):
    "An entry point of the group textgen.commands is a command; one that cannot be loaded takes no other with it."
    (tmp_path/"shouting-1.0.dist-info").mkdir()
    (tmp_path/"shouting-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (tmp_path/"shouting-1.0.dist-info/entry_points.txt").write_text("[textgen.commands]\nshout = shouting:app\ntrain = shouting:app\n")
    (tmp_path/"shouting.py").write_text("import nothing_at_all\n" if broken else (
        "import typer\napp = typer.Typer()\n@app.command()\ndef louder(text: str):\n    'Say it louder.'\n    print(text.upper())\n"))
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    shown, done = (subprocess.run([*PROGRAM, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
                   for words in (["--help"], ["shout", "what a fox"]))
    assert shown.returncode == 0 and "generate" in shown.stdout and ("Say it louder." in shown.stdout) == (not broken)
    assert "Train a model by a recipe." in shown.stdout  # ours stay ours
    if broken:
        line = "the command 'shout' is left out: shouting:app cannot be loaded (ModuleNotFoundError)\n"
        assert shown.stderr == line and done.stderr.startswith(f"{line}error: No such command 'shout'") and done.returncode == 2
    else: assert (done.returncode, done.stdout, done.stderr) == (0, "WHAT A FOX\n", "")


def test_version():
    from textgen import __version__
    assert textgen("--version", ROOT).stdout == f"textgen {__version__}\n"


def test_first_line_comes_before_the_framework(work, tmp_path):
    "Within a breath of typing, while PyTorch is still to be imported."
    process = subprocess.Popen([*PROGRAM, "train", "demo", "--out", work/"runs/fox"], cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.perf_counter()
    first = process.stdout.readline()
    seconds = time.perf_counter() - began
    rest, error = process.communicate()
    total = time.perf_counter() - began
    assert first == "textgen train demo: data stories, 1,000 steps of 16 × 112 tokens\n"
    assert seconds < total / 2 and rest == "" and "exists" in error


def test_train_ends_with_the_loss(work):
    "Samples, the run, the curve, what to try next, and last the loss on the whole held-out part."
    lines = (work/"trained.txt").read_text(encoding="utf-8").splitlines()
    result = json.loads((work/"runs/fox/result.json").read_text())
    assert lines[-1] == f"val {result['nats_per_char']:.4f} nats/char" and result["tokens"] == 287   # a tenth of 2,880, less the first
    assert lines[0] == "textgen train demo: data fable.txt, 40 steps of 4 × 32 tokens"
    assert "\x1b" not in "\n".join(lines) and (work/"runs/fox/curve.png").stat().st_size > 1000
    shown = next(line for line in lines if " generate --model " in line)
    done = textgen(f"{shown.strip().removeprefix('textgen')} --seed 1", work)   # the suggestion works as it stands
    assert done.returncode == 0 and done.stdout.startswith(result["samples"][0]["prompt"])
    python = [line.strip().removeprefix(">>> ") for line in lines if ">>>" in line]
    same = subprocess.run([sys.executable, "-c", "\n".join(python)], cwd=work, env=environment(), capture_output=True, text=True)
    assert result["samples"][0]["prompt"] + same.stdout == done.stdout.rstrip("\n") + "\n"


def test_stories_are_held_against_the_floor(tmp_path, typed):
    "On the embedded corpus the last two lines are floor and loss; the grammar judges the samples."
    more = ["--set", "data_options={train: 300, validation: 20}", "--set", "tokenizer=bpe:300", "--set", "steps=5", "--set", "batch_size=4",
            "--set", "model.n_layer=1", "--set", "model.n_embd=16", "--set", "sample.stories=4", "--set", "sample.settings.max_new_tokens=8"]
    done = typed("train demo", tmp_path, more)
    assert done.returncode == 0, done.stderr
    *_, before, last = done.stdout.splitlines()
    floor, model, excess = map(float, re.match(r"floor (\S+) model (\S+) excess (\S+) nats/char", before).groups())
    assert last.startswith(f"val {model:.4f} nats/char") and abs(model - floor - excess) < 2e-4 and 0 < floor < model
    assert "0 of 4 sampled stories are right by the grammar" in done.stdout and (tmp_path/"runs/demo/model.safetensors").exists()


def test_generate(work, tmp_path, typed):
    "Standard output holds the text alone, standard error the seed; the same seed writes the same text, from Python too."
    import textgen as package
    line = "generate --model runs/fox --prompt 'The fox' --max-new-tokens 30 --temperature 0.9 --top-k 9 --top-p 0.95"
    first = textgen(line, work)
    seed = re.fullmatch(r"seed (\d+)\n", first.stderr)[1]
    asked = line.replace(shlex.quote("The fox"), "-")   # the prompt comes through a pipe, the text goes to a file
    again = textgen(f"{asked} --seed {seed} --output {tmp_path}/new/fox.txt", work, stdin="The fox\n")
    assert again.stdout == "" and again.stderr.startswith("saved ") and str(tmp_path/"new/fox.txt") in again.stderr
    assert (tmp_path/"new/fox.txt").read_text(encoding="utf-8") == first.stdout
    model = package.load(work/"runs/fox")
    settings = dict(max_new_tokens=30, temperature=0.9, top_k=9, top_p=0.95, seed=int(seed))
    text = "The fox" + model.generate("The fox", **settings)[0].text
    assert first.stdout == text + "\n" * (not text.endswith("\n"))
    assert "".join(piece.text for piece in model.stream("The fox", **settings)) == text.removeprefix("The fox")
    for more in ("--lookup", "--draft-model runs/fox"): assert typed(f"{line} --seed {seed} {more}", work).stdout == first.stdout
    several = typed(f"{line} --seed {seed} --n 2", work)
    texts = ["The fox" + one.text for one in model.generate("The fox", n=2, **settings)]
    assert several.stdout == "\n".join(f"[{i}]\n" + one.removesuffix("\n") + "\n" for i, one in enumerate(texts, 1))
    assert several.stderr == f"seed {', '.join(str(one.seed) for one in model.generate('The fox', n=2, **settings))}\n"


def test_broken_pipe_is_quiet(work):
    "`textgen generate ... | head -c 5`"
    command = shlex.join([*PROGRAM, "generate", "--model", "runs/fox", "--prompt", "The fox", "--max-new-tokens", "20000"])
    done = subprocess.run(f"{command} | head -c 5", shell=True, cwd=work, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "The f" and done.stderr == ""


def test_debug_shows_the_trace(work):
    done = textgen("generate --model nowhere --debug", work)
    assert done.returncode == 1 and "Traceback" in done.stderr and "UsageError" in done.stderr


# What is wrong with the text

def write(folder, name, data):
    (folder/name).write_bytes(data)
    return folder/name


@pytest.mark.parametrize("name, data, parts", [
    ("missing.txt", None, ["missing.txt", "no file or folder"]),
    ("empty.txt", b"", ["empty.txt", "nothing", "give some text"]),
    ("blank.txt", b" \n \n", ["blank.txt", "white space"]),
    ("latin.txt", "gr\u00fcn\n".encode("latin-1") * 50, ["latin.txt", "not UTF-8", "offset 2", "save it again as UTF-8"]),
    ("short.txt", b"The fox.", ["7 tokens", "takes 33", "give more text"]),
], ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_text(name, data, parts, tmp_path, typed):
    if data is not None: write(tmp_path, name, data)
    refused((textgen if name == "latin.txt" else typed)(f"train demo --data {name}", tmp_path, more=TINY), *parts)
    assert not (tmp_path/"runs").exists()


# What is wrong with the recipe

@pytest.mark.parametrize("line, parts", [
    ("train dmeo", ["unknown recipe 'dmeo'", "did you mean 'demo'?"]),
    ("train demo --set stesp=5", ["unknown key 'stesp'", "did you mean 'steps'?"]),
    ("train demo --set model.n_lyer=5", ["unknown key 'model.n_lyer'", "did you mean 'n_layer'?"]),
    ("train demo --set steps=-5", ["steps", "greater than or equal to 1", "-5"]),
    ("train demo --set model.n_embd=-8", ["n_embd", "-8"]),
    ("train demo --set model.n_embd=30", ["n_embd", "30", "n_head", "4"]),
    ("train demo --set steps", ["--set steps", "KEY=VALUE"]),
    ("train", ["RECIPE", "demo"]),
    ("train demo --set optimizer.betas=[1,1]", ["optimizer.betas.0", "less than 1"]),
    ("train demo --setp 5", ["--setp", "textgen train --help"]),
    ("tran demo", ["tran", "train"]),
], ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_recipe(line, parts, tmp_path):
    refused(textgen(line, tmp_path), *parts)
    assert not list(tmp_path.iterdir())


# What is wrong with the prompt

@pytest.mark.parametrize("more, parts", [
    (["--prompt", "The w\u00f6lf"], ["character '\u00f6'", "position 5", "not in the training text"]),
    (["--prompt", "The " * 20], ["80 tokens", "context of 32", "slide"]),
    (["--prompt", "The", "--overflow", "error", "--max-new-tokens", "30"], ["max_new_tokens", "context of 32"]),
    ([], ["prompt is empty", "no end-of-text token"]),
    (["--prompt", "The", "--max-new-tokens", "-3"], ["max_new_tokens", "-3"]),
    (["--prompt", "The", "--temperature", "warm"], ["--temperature", "textgen generate --help"]),
    (["--prompt", "The", "--output", "runs"], ["runs", "name a file in it"]),
    (["--prompt", "The", "--regex", "[a"], ["regex '[a'", "unclosed character class"]),
], ids=["unseen", "long", "overflow", "empty", "negative", "word", "folder", "regex"])
def test_wrong_prompt(more, parts, work, typed):
    done = typed("generate --model runs/fox", work, more)
    refused(done, *parts)
    assert done.stdout == ""


def test_prompt_that_is_not_text(work):
    refused(textgen("generate --model runs/fox --prompt -", work, stdin=b"The \xff"), "not UTF-8", "byte 4")


# What is wrong with the run

def test_run_exists(work): refused(textgen("train demo --out runs/fox", work), "'runs/fox' exists", "--resume")


def test_run_is_cut_off(run):
    weights = (run/"model.safetensors").read_bytes()
    (run/"model.safetensors").write_bytes(weights[:len(weights) // 2])
    refused(textgen("generate --prompt The --model", run.parent, more=[run]), "model.safetensors", "damaged")


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_run_lacks_a_file(name, run, typed):
    (run/name).unlink()
    if name == "config.json": (run/"config.yaml").unlink()
    refused(typed("generate --prompt The --model", run.parent, [run]), name)


def test_run_of_another_architecture(run, typed):
    config = json.loads((run/"config.json").read_text())
    (run/"config.json").write_text(json.dumps(config | {"model_type": "mambo"}))
    refused(typed("generate --prompt The --model", run.parent, [run]), "no model of type 'mambo'", "nor to transformers")
    (run/"config.json").write_text(json.dumps(config | {"model_type": "mamba"}))  # which transformers knows, but these weights are others
    refused(typed("generate --prompt The --model", run.parent, [run]), "tensors are missing or of another shape")


def test_a_draft_model_of_other_tokens(work, tmp_path, typed):
    other = tmp_path/"other"
    (tmp_path/"hare.txt").write_text(FABLE.replace("fox", "hare"), encoding="utf-8")
    assert typed(f"train demo --data {tmp_path}/hare.txt --out {other}", tmp_path, [*TINY, "--set", "steps=1"]).returncode == 0
    refused(typed("generate --model runs/fox --prompt The --draft-model", work, [other]), "not the tokens of the model")


def test_run_is_not_there(tmp_path): refused(textgen("generate --prompt The --model ./nowhere", tmp_path), "'nowhere'", "no such directory")


def test_other_text_is_not_resumed(work, tmp_path, typed):
    "The text changed after the run was stopped: another alphabet, or other ids for the same one."
    shutil.copytree(work/"runs/fox", tmp_path/"fox")
    (tmp_path/"fox/result.json").unlink()
    for change in [("fox", "cat"), ("grapes", "fox")]:
        (tmp_path/"fable.txt").write_text(FABLE.replace(*change), encoding="utf-8")
        refused(typed("train --resume --out fox", tmp_path), "another text", "'fable.txt'", "--out", code=1)


@pytest.mark.parametrize("name, text", [("same.txt", "a" * 3000), ("one.txt", "a word and another one " * 40)])
def test_plain_texts_give_no_warnings(name, text, tmp_path):
    "One character over and over, one line, one point on the curve."
    (tmp_path/name).write_text(text, encoding="utf-8")
    done = textgen(f"train demo --data {name} --out run", tmp_path, more=[*TINY, "--set", "steps=1"])
    assert done.returncode == 0 and re.fullmatch(r"step 1 of 1: [^\n]*\n", done.stderr), done.stderr


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_output_into_a_pipe_leaves_it_one(work, tmp_path):
    os.mkfifo(tmp_path/"pipe")
    reader = subprocess.Popen(["cat", tmp_path/"pipe"], stdout=subprocess.PIPE, text=True)
    done = textgen("generate --model runs/fox --prompt The --max-new-tokens 5", work, more=["--output", tmp_path/"pipe"])
    assert done.returncode == 0 and reader.communicate(timeout=30)[0].startswith("The") and (tmp_path/"pipe").is_fifo()


def test_nothing_to_resume(tmp_path, work, typed):
    refused(typed("train --resume --out nowhere", tmp_path), "'nowhere' is no run directory")
    refused(typed("train --resume --out runs/fox", work), "runs/fox", "has ended")


# Ctrl-C

def test_interrupt_saves_and_goes_on(work, tmp_path, typed):
    "Stopped in the middle, resumed by the line that it said: the same weights, to the bit, and the same losses."
    shutil.copy(work/"fable.txt", tmp_path)
    slow = [*TINY, "--set", "log_every=1", "--set", "steps=200", "--set", "checkpoint_every=200", "--set", "evaluate_every=200"]
    process = subprocess.Popen([*PROGRAM, "train", "demo", "--data", "fable.txt", "--out", "runs/half", *slow], cwd=tmp_path,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics, began = tmp_path/"runs/half/metrics.jsonl", time.time()
    while not (metrics.exists() and metrics.read_text().count("\n") > 20):
        assert process.poll() is None and time.time() - began < 60, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and re.fullmatch(r"stopped after step \d+ of 200, and saved; go on with: [^\n]*\n", error), error
    assert list((tmp_path/"runs/half/checkpoints").glob("step-*")) and not (tmp_path/"runs/half/result.json").exists()
    refused(typed("generate --prompt The --model runs/half", tmp_path), "textgen train --resume --out runs/half")
    done = textgen(error.split("go on with: textgen ")[1], tmp_path)
    assert done.returncode == 0, done.stderr
    whole = textgen("train demo --data fable.txt --out runs/whole", tmp_path, more=slow)
    assert whole.returncode == 0 and whole.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    half, whole = tmp_path/"runs/half", tmp_path/"runs/whole"
    assert (half/"model.safetensors").read_bytes() == (whole/"model.safetensors").read_bytes()
    losses = [[(line["step"], line["nats_per_char"]) for line in map(json.loads, (run/"metrics.jsonl").read_text().splitlines())]
              for run in (half, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 200


def test_interrupt_elsewhere_is_one_line(work):
    "While it writes there is nothing to save; what was written stays, and the message has a line of its own."
    process = subprocess.Popen([*PROGRAM, "generate", "--model", "runs/fox", "--prompt", "The", "--max-new-tokens", "1000000"], cwd=work,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.read(20).startswith("The")
    process.send_signal(signal.SIGINT)
    text, error = process.communicate(timeout=60)
    assert process.returncode == 130 and re.fullmatch(r"seed \d+\ninterrupted\n", error) and text.endswith("\n")


def test_several_interrupted_show_what_there_is(capsys):
    class Stopped:
        tokenizer, defaults = None, GenerationConfig()
        def stream(self, prompt, **settings):
            yield Piece(1, " ran", [3])
            yield Piece(0, " sat", [4])
            yield Piece(1, " off", [5], "stop")
            raise KeyboardInterrupt

    parts = written(Stopped(), "It", {"n": 3, "seed": 1})
    with pytest.raises(KeyboardInterrupt): deliver(parts, None, lambda: "1")
    assert capsys.readouterr() == ("[1]\nIt sat\n\n[2]\nIt ran off\n\n[3]\nIt\n", "seed 1\n")


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_evaluate_replaces_no_folder(option, tmp_path, capsys):
    (tmp_path/"kept").mkdir()
    assert main(["evaluate", "--model", "m", "--data", "stories", option, str(tmp_path/"kept")]) == 2
    assert "is a directory" in capsys.readouterr().err and (tmp_path/"kept").is_dir()
