"""A file of prompts as a user meets it: what is wrong in it, several processes, and processes that are killed, stopped or fail."""
import io, itertools, json, os, re, shlex, signal, socket, subprocess, sys, time
from pathlib import Path

import pytest
import torch

from textgen.batch import claimed, digest, told, write_batch
from textgen.cli import main
from textgen.core import UsageError
from textgen.decoder import Decoder, DecoderConfig
from textgen.gpt import GPT
from textgen.jobs import by_engine, jobs_of
from textgen.tokenizer import CharTokenizer

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "import sys; from textgen.cli import main; sys.exit(main())"
TEXT = "the moon rose over the hill, and the hill was white."
pytestmark = pytest.mark.usefixtures("one_thread")


def save(path, seed=0):
    torch.manual_seed(seed)
    tokenizer = CharTokenizer.train([TEXT, "\n"])
    shape = DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=24, n_head=3, n_layer=2)
    GPT(Decoder(shape), tokenizer).save(path)


def lines_of(path): return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "A folder with a model and ragged prompts, some with settings of their own; and what becomes of them."
    folder = tmp_path_factory.mktemp("batch")
    save(folder/"moon")
    rows = [{"prompt": TEXT[i % 9:i % 9 + 1 + 5 * i % 23], "id": f"row {i}"} for i in range(31)]
    for row, own in zip(rows[::4], itertools.cycle([{"n": 3}, {"max_new_tokens": 2}, {"temperature": 0}, {"seed": 5}, {"stop": "o"}])): row |= own
    (folder/"prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder/"many.txt").write_text("".join(f"{TEXT[i % 20:i % 20 + 9]}\n" for i in range(300)))
    write_batch(folder/"expected.jsonl", folder/"moon", folder/"prompts.jsonl", {"max_new_tokens": 30, "seed": 3}, device="cpu")
    return folder


def environment(**more): return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


def start(line, cwd, program=PROGRAM, **more):
    return subprocess.Popen([sys.executable, "-c", program, *shlex.split(line)], cwd=cwd, env=environment(**more),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def pair(line, cwd, programs=(PROGRAM, PROGRAM)):
    "Two processes that find each other, as a launcher starts them, but with nobody who ends one when the other fails."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [start(line, cwd, program, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port) for rank, program in enumerate(programs)]


# What is written

def test_each_line_is_what_generate_writes(work):
    "In the order of the prompts, with a seed that gives the same text alone; the counts are right."
    model, lines, rows = GPT.load(work/"moon"), lines_of(work/"expected.jsonl"), lines_of(work/"prompts.jsonl")
    assert [line["index"] for line in lines] == [*range(31)] and not (work/"expected.jsonl.parts").exists()
    for line, row in zip(lines, rows):
        own = {name: value for name, value in row.items() if name not in ("prompt", "id")}
        alone = model.generate(row["prompt"], **{"max_new_tokens": 30, **own, "seed": line["seed"]})
        assert (line["prompt"], line["id"], line["texts"]) == (row["prompt"], row["id"], [one.text for one in alone])
        assert line["finish_reasons"] == [one.finish_reason for one in alone] and line["prompt_tokens"] == len(row["prompt"])
        assert line["new_tokens"] == [len(one.token_ids) for one in alone]
    assert len({line["seed"] for line in lines}) == 31
    assert {reason for line in lines for reason in line["finish_reasons"]} == {"length", "stop"}


def test_equal_prompts_get_other_texts(work, tmp_path):
    "Of two samples each, no two are alike: the second seed of a prompt is not the first one of the next."
    (tmp_path/"same.txt").write_text("the moon\n" * 4)
    write_batch(tmp_path/"out.jsonl", work/"moon", tmp_path/"same.txt", {"n": 2, "max_new_tokens": 20, "seed": 0}, device="cpu")
    assert len({text for line in lines_of(tmp_path/"out.jsonl") for text in line["texts"]}) == 8


def test_prompts_are_read_as_they_are_needed(work):
    "From a file without end, no more wait than are written at once."
    model, taken = GPT.load(work/"moon"), []
    job = next(jobs_of(model, work/"prompts.jsonl", {"max_new_tokens": 5}, 0))
    endless = (job.__class__(i, "", job.prompt, None, job.config) for i in itertools.count() if not taken.append(i))
    steps = by_engine(model, endless, 4, 40, 1000)
    done = sum(len(next(steps)) for _ in range(100))
    assert done > 20 and len(taken) - done <= 2 * 4 + 3


def test_logprobs_are_written(work, tmp_path):
    (tmp_path/"one.txt").write_text("the moon\n")
    write_batch(tmp_path/"out.jsonl", work/"moon", tmp_path/"one.txt", {"max_new_tokens": 4, "logprobs": 2}, device="cpu")
    line, = lines_of(tmp_path/"out.jsonl")
    assert [len(token["top"]) for token in line["logprobs"][0]] == [2] * 4 and all(token["logprob"] < 0 for token in line["logprobs"][0])


def test_standard_input(work, tmp_path, monkeypatch):
    "Lines, or objects."
    for data, prompts in ((b"the moon\r\nhill\n", ["the moon", "hill"]), (b'\n{"prompt": "the\\nmoon"}\n', ["the\nmoon"])):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        write_batch(tmp_path/"out.jsonl", work/"moon", "-", {"max_new_tokens": 3}, device="cpu", force=True)
        assert [line["prompt"] for line in lines_of(tmp_path/"out.jsonl")] == prompts


def test_progress_without_a_terminal(capsys):
    "A line at a time, to standard error; none where nothing is to be shown."
    told(iter([1, 0, 2]), 4, 1000, pause=0)
    assert capsys.readouterr().err.splitlines() == ["5 of 1,000 prompts", "5 of 1,000 prompts", "7 of 1,000 prompts"]
    told(iter([1, 0, 2]), 4, 1000, progress=False, pause=0)
    assert capsys.readouterr().err == ""


# What is refused

@pytest.mark.parametrize("name, data, said", [
    ("a.txt", b"", "a.txt has no prompt in it"), ("a.txt", b" \n\n", "a.txt has no prompt in it"),
    ("a.txt", b"the moon\nthe m\xff\n", "a.txt, line 2: not UTF-8"),
    ("a.jsonl", b'{"prompt": "hill"}\n{"promt": "hill"}', "a.jsonl, line 2: an object with a text"),
    ("a.jsonl", b'{"prompt": 7}', "a.jsonl, line 1: an object with a text"), ("a.jsonl", b'"hill"', "a.jsonl, line 1: an object"),
    ("a.jsonl", b'\n{"prompt": "hill"', "a.jsonl, line 2: "), ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: "),
    ("a.jsonl", b'{"prompt": "hill", "id": [1]}', 'line 1: "id" must be'), ("a.jsonl", b'{"prompt": "\\ud800"}', "line 1: "),
    ("a.jsonl", b'{"prompt": "hill"}\n{"prompt": "hill", "temprature": 1}', "a.jsonl, line 2: unknown key 'temprature'"),
    ("a.jsonl", b'{"prompt": "hill", "top_p": 7}', "a.jsonl, line 1: top_p: "),
    ("a.jsonl", b'{"prompt": "hill", "stop_token_ids": [999]}', "a.jsonl, line 1: stop_token_ids: 999 is no token"),
    ("a.jsonl", b'{"prompt": "hill"}\n{"prompt": "%s", "overflow": "error"}' % (b"moon" * 15), "a.jsonl, line 2: 60 prompt tokens + max"),
    ("a.txt", b"hill\n" + b"moon" * 30, "a.txt, line 2: prompt of 120 tokens is longer"),
    ("a.txt", "hill\nmön".encode(), "a.txt, line 2: "),
    ("a.csv", b"hill", "call it .txt"),
])
def test_mistakes_in_the_file_name_it_and_the_line(name, data, said, work, tmp_path):
    "Before anything is written, and nothing is left behind but what has been begun."
    (tmp_path/name).write_bytes(data)
    with pytest.raises(UsageError) as error:
        write_batch(tmp_path/"out.jsonl", work/"moon", tmp_path/name, {"max_new_tokens": 10}, device="cpu")
    assert said in str(error.value) and "\n" not in str(error.value), error.value
    assert not (tmp_path/"out.jsonl").exists() and not [*tmp_path.glob("out.jsonl.parts/part-*.jsonl")]


def test_other_mistakes(work, tmp_path):
    def refused(said, output="out.jsonl", model=work/"moon", prompts=work/"prompts.jsonl", **more):
        with pytest.raises(UsageError, match=re.escape(said)): write_batch(tmp_path/output, model, prompts, device="cpu", **more)
        assert not (tmp_path/f"{output}.parts").exists()
    (tmp_path/"there.jsonl").write_text("mine")
    refused("exists; name another --output", "there.jsonl")
    refused("has ended, with nothing left to do", "there.jsonl", resume=True)
    refused("is no file; name one", "", force=True)
    refused("no model in", model=tmp_path/"none")
    refused("no such file", prompts="none.txt")
    refused("--model is missing", model=None)
    refused("settings: temperature: ", settings={"temperature": -1})
    refused("seed: ", settings={"seed": -1})
    with claimed(tmp_path/"busy.jsonl", False, False):
        with pytest.raises(UsageError, match="another batch is writing"): write_batch(tmp_path/"busy.jsonl", work/"moon", work/"many.txt")
    assert (tmp_path/"there.jsonl").read_text() == "mine"


# Several processes

def test_two_processes_write_the_same_file(work):
    processes = pair("batch --model moon --prompts prompts.jsonl --output two.jsonl --max-new-tokens 30 --seed 3 --device cpu", work)
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert (work/"two.jsonl").read_bytes() == (work/"expected.jsonl").read_bytes()
    assert [error.count("31 prompts") for error in errors] == [1, 0] and not (work/"two.jsonl.parts").exists()


FAILS = """import sys, textgen.jobs as jobs
from textgen.cli import main
from textgen.core import TextgenError
real = jobs.hear
def broken(engine, asked, token):
    if token.row[0] == 7: raise TextgenError("the card is broken")
    return real(engine, asked, token)
jobs.hear = broken
sys.exit(main())"""


def test_one_process_fails_and_the_other_does_not_hang(work):
    "It ends within seconds and says why; what both have written stays, and one process alone goes on with it."
    line = "batch --model moon --prompts prompts.jsonl --output half.jsonl --max-new-tokens 30 --seed 3 --device cpu --batch-size 2"
    processes = pair(line, work, (PROGRAM, FAILS))
    errors = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1], errors
    assert "another process has failed" in errors[0] and "error: the card is broken" in errors[1] and not (work/"half.jsonl").exists()
    kept = sum(len(lines_of(part)) for part in (work/"half.jsonl.parts").glob("part-*.jsonl"))
    assert 0 < kept < 31
    with pytest.raises(UsageError, match="has been begun; go on with: textgen batch --resume --output"):
        write_batch(work/"half.jsonl", work/"moon", work/"prompts.jsonl", device="cpu")
    write_batch(work/"half.jsonl", resume=True, device="cpu")
    assert (work/"half.jsonl").read_bytes() == (work/"expected.jsonl").read_bytes()


# Stopped and resumed

def begun(work, name, signal_number):
    "A batch that was ended by a signal when some lines were there: the process's code, and what it said."
    line = f"batch --model moon --prompts many.txt --output {name} --max-new-tokens 60 --seed 4 --device cpu --batch-size 2"
    process, part = start(line, work), work/f"{name}.parts/part-00000.jsonl"
    while process.poll() is None and not (part.is_file() and part.stat().st_size > 1000): time.sleep(0.01)
    process.send_signal(signal_number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


def test_killed_and_resumed(work):
    "By SIGKILL, with half a line at the end: the rest is written, and what was there stays as it was; another batch is refused."
    code, _ = begun(work, "killed.jsonl", signal.SIGKILL)
    part = work/"killed.jsonl.parts/part-00000.jsonl"
    whole = part.read_bytes().rpartition(b"\n")[0] + b"\n"
    part.write_bytes(whole + b'{"index": 299, "prompt": "cut')
    assert code == -signal.SIGKILL and 0 < whole.count(b"\n") < 300
    save(work/"other", seed=1)
    for said, more in (("another model", {"model": work/"other"}), ("another file of prompts", {"prompts": work/"prompts.jsonl"}),
                       ("temperature as the model has it, not 0.5", {"settings": {"temperature": 0.5}}), ("seed 4, not 5", {"settings": {"seed": 5}})):
        with pytest.raises(UsageError, match=f"was begun with {said}"): write_batch(work/"killed.jsonl", resume=True, device="cpu", **more)
    write_batch(work/"killed.jsonl", resume=True, device="cpu")
    write_batch(work/"whole.jsonl", work/"moon", work/"many.txt", {"max_new_tokens": 60, "seed": 4}, device="cpu")
    assert (work/"killed.jsonl").read_bytes() == (work/"whole.jsonl").read_bytes()
    assert {*whole.splitlines()} < {*(work/"killed.jsonl").read_bytes().splitlines()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_says_what_to_type(number, work, monkeypatch):
    "Exit code 130, one line, and what it says to type works as it stands."
    name = f"stopped{number}.jsonl"
    code, error = begun(work, name, number)
    assert code == 130, error
    found = re.fullmatch(rf"stopped after (\d+) of 300 prompts; go on with: (textgen batch --resume --output {name})\n", error)
    assert found and 0 < int(found[1]) < 300, error
    if number == signal.SIGINT:
        monkeypatch.chdir(work)
        assert main(shlex.split(found[2])[1:]) == 0 and len(lines_of(name)) == 300


@pytest.mark.parametrize("name", ["model.safetensors", "model.keras", "config.json", "tokenizer.json"])
def test_another_file_is_another_model(name, tmp_path):
    "Whatever the framework that wrote it; what a run leaves beside the model does not count."
    (tmp_path/name).write_bytes(b"one")
    first = digest(tmp_path)
    (tmp_path/"metrics.jsonl").write_text("{}")
    assert digest(tmp_path) == first
    (tmp_path/name).write_bytes(b"two")
    assert digest(tmp_path) != first
