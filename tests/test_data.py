"""What chapters 02c to 03 cannot check in one process: the known corpora, the hub, killed and concurrent preparation, a full disk, bad input.

The known corpora lie in the folder that TEXTGEN_DATA names; where it names none, their tests are skipped."""
import json, os, pty, random, re, resource, shutil, subprocess, sys, time, types
from pathlib import Path

import numpy as np
import pytest
from conftest import KNOWN, needs_gpt2, needs_known

from textgen import data, encoding, folders, sources
from textgen.core import TextgenError, UsageError
from textgen.data import Chunks, Prepared, data_folders, prepare, repair
from textgen.encoding import encode_all
from textgen.files import Block, read_blocks
from textgen.folders import damage
from textgen.sources import documents, read_source
from textgen.tokenizer import BPETokenizer

ROOT = Path(__file__).resolve().parent.parent
FEW = dict(train=40, validation=5)  # stories


def python(code, **settings):
    "A process that runs some code, with `data` and `root`, its folder, at hand."
    code = ("import sys, time\nfrom pathlib import Path\nfrom textgen import data, encoding, folders, sources\n"
            "root = Path(sys.argv[1])\n") + code
    env = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, str(settings.pop("root"))], env=env, text=True, **settings)


def visible(folder): return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


def splits(source): return {split: list(documents(source.blocks(split))) for split in source.splits}


# The known corpora

@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("data")


@needs_known
def test_wikitext_rows(root):
    rows = splits(read_source("wikitext-2", root))
    assert [len(part) for part in rows.values()] == [36_718, 3_760, 4_358]
    assert all(row == "" or row.endswith("\n") and row.strip() for part in rows.values() for row in part)
    assert rows["test"][:3] == ["", " = Robert Boulter = \n", ""]
    for file in ["wiki.train.raw", "wiki.valid.raw", "wiki.test.raw"]:
        assert (root/"raw/wikitext-2"/file).read_bytes() == Path(KNOWN, "wikitext-2-raw", file).read_bytes()


@needs_known
@needs_gpt2
def test_wikitext_tokens(root):
    prepared = prepare("wikitext-2", "gpt2", root)
    tokens = {name: len(prepared.split(name)) for name in ["train", "validation", "test"]}
    assert tokens == {"train": 2_391_884, "validation": 247_289, "test": 283_287}
    assert prepared.split("test").tokens.dtype == np.uint16 and prepared.eos_id is None
    assert len(Chunks(prepared.split("train").tokens, 1024)) == 2_391_883 // 1024
    assert prepared.texts("test") == list(documents(read_source("wikitext-2", root).blocks("test")))
    assert prepare("wikitext-2", "gpt2", root).path == prepared.path and not damage(prepared.path)


def pages_of(text):
    "WikiText's pages as lm-evaluation-harness has them: a page begins at a heading of the first level; what is blank before the first is no page."
    starts = [match.start() for match in re.finditer(r"(?m)^ = (?!= )[^\n]*(?<! =) = $", text)]
    ends = [start - 1 for start in starts[1:]] + [len(text)]  # without the newline between two pages
    assert not text[:starts[0]].strip()
    return [text[start:end] for start, end in zip(starts, ends)]


@needs_known
@needs_gpt2
def test_wikitext_facts(root):
    "The other ways to count: each whole file in one go, the rows joined, and lm-eval's pages, words and bytes."
    from textgen.tokenizer import gpt2_tokenizer
    tokenizer, whole, source = gpt2_tokenizer(), [], read_source("wikitext-2", root)
    for split, (name, pages, words, size) in {"train": ("train", 629, 2_053_168, 10_940_117), "validation": ("valid", 60, 214_006, 1_146_785),
                                              "test": ("test", 62, 241_335, 1_290_527)}.items():
        text = (root/f"raw/wikitext-2/wiki.{name}.raw").read_text(encoding="utf-8")
        ids = tokenizer.encode(text)
        assert np.array_equal(np.concatenate([part.ids for part in encode_all(read_blocks(root/f"raw/wikitext-2/wiki.{name}.raw"), tokenizer)]), ids)
        whole.append(len(ids))
        found = pages_of(text)
        assert len(found) == pages
        assert sum(len(re.split(r"\s+", page)) for page in found) == words and sum(len(page.encode()) for page in found) == size
    assert whole == [2_417_786, 249_887, 286_221]
    rows = list(documents(source.blocks("test")))
    assert len(tokenizer.encode("\n\n".join(rows))) == 287_644


@needs_known
def test_shakespeare(root):
    prepared = prepare("shakespeare", root=root)
    assert [prepared.split(name).characters for name in ["train", "validation"]] == [1_003_854, 111_540]
    assert prepared.tokenizer.vocab_size == 65 and prepared.split("train").tokens.dtype == np.uint8
    text = Path(KNOWN, "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    assert prepared.texts("train") == [text[:1_003_854]] and prepared.texts("validation") == [text[1_003_854:]]
    own = prepare(Path(KNOWN, "tinyshakespeare/input.txt"), root=root)  # the same, given by its path
    assert own.name == "input" and (own.split("validation").tokens == prepared.split("validation").tokens).all()


@needs_known
def test_another_file_of_that_name(tmp_path, monkeypatch):
    shutil.copytree(Path(KNOWN, "wikitext-2-raw"), tmp_path/"wikitext-2-raw")
    file = tmp_path/"wikitext-2-raw/wiki.valid.raw"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b"the", b"The", 1))
    monkeypatch.setenv("TEXTGEN_DATA", str(tmp_path))
    with pytest.raises(TextgenError, match=r"^wiki.valid.raw of wikitext-2, .* SHA-256 begins with \w{8}, not 4cd0f687; get it again$"):
        read_source("wikitext-2", tmp_path/"data")
    assert not visible(tmp_path/"data/raw")


# The hub

@needs_known
def test_hub_gives_the_official_bytes(tmp_path, monkeypatch):
    import datasets, huggingface_hub
    rows = {split: [{"text": text} for text in texts] for split, texts in splits(read_source("wikitext-2", tmp_path/"one")).items()}
    asked = []
    monkeypatch.delenv("TEXTGEN_DATA")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: asked.append(name))
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, revision: asked.append(name) or rows)
    source = read_source("wikitext-2", tmp_path/"two")  # checks their SHA-256
    assert list(documents(source.blocks("test"))) == [row["text"] for row in rows["test"]]
    assert asked == ["Salesforce/wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1")]
    source = read_source("wikitext-103", tmp_path/"two")  # the same stand-in: what counts is that another configuration was asked for
    assert asked[2:] == ["Salesforce/wikitext", ("Salesforce/wikitext", "wikitext-103-raw-v1")] and len(list(source.blocks("train"))) == 36_718


def hub_has(monkeypatch, made):
    "Let the hub have what a function makes of a name and a configuration."
    import datasets, huggingface_hub
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, name, timeout: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, revision: made(name, config))


def test_any_dataset_of_the_hub(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict
    tales = [f"Tale {n} of a wolf." for n in range(40)]
    table = Dataset.from_dict({"id": list(range(40)), "text": tales, "title": ["a wolf"] * 40})
    calls = []
    hub_has(monkeypatch, lambda name, config: calls.append((name, config)) or DatasetDict({"train": table, "valid": table.select(range(5))}))
    made = prepare("someone/tales", root=tmp_path, config="small")
    assert made.texts("train") == tales and made.texts("validation") == tales[:5] and made.name == "someone--tales"
    assert prepare("someone/tales", root=tmp_path, config="small").path == made.path and calls == [("someone/tales", "small")]
    titles = prepare("someone/tales", root=tmp_path, column="title")
    assert titles.texts("validation") == ["a wolf"] * 5
    [raw] = {path for path in (tmp_path/"raw").glob("someone--tales-*") if folders.read_manifest(path)["options"]["config"] == "small"}
    assert visible(raw) == ["manifest.backup.json", "manifest.json", "train.parquet", "validation.parquet"]
    (raw/"train.parquet").write_bytes(b"?")
    assert damage(raw)
    repair(raw, tmp_path)
    assert not damage(raw) and len(calls) == 3
    hub_has(monkeypatch, lambda name, config: DatasetDict({"train": table}))
    cut = prepare("someone/other", root=tmp_path)
    assert "".join(cut.texts("train") + cut.texts("validation")) == "".join(tales) and len(cut.texts("validation")) in (4, 5)


def test_bad_datasets_of_the_hub(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict
    table = Dataset.from_dict({"a": ["x"], "b": ["y"], "n": [1]})
    hub_has(monkeypatch, lambda name, config: DatasetDict({"train": table}))
    for options, part in [({}, "has no column 'text', and not just one other of strings"), ({"column": "c"}, "has no column 'c'"),
                          ({"colum": "a"}, "unknown key 'colum'; did you mean 'column'?")]:
        with pytest.raises(UsageError, match=re.escape(part)): prepare("someone/tales", root=tmp_path, **options)
    hub_has(monkeypatch, lambda name, config: DatasetDict({"test": table}))
    with pytest.raises(UsageError, match="has no split 'train', only test"): prepare("someone/tales", root=tmp_path)
    def fail(name, config): raise ValueError("Config name is missing.\nPlease pick one: ['small', 'large']")
    hub_has(monkeypatch, fail)
    with pytest.raises(TextgenError, match=r"someone/tales .*ValueError: Config name is missing") as caught: prepare("someone/tales", root=tmp_path)
    assert "\n" not in str(caught.value) and not visible(tmp_path/"raw")


def test_no_network(tmp_path):
    "One line, promptly, that says what to do."
    closed = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"], "http://127.0.0.1:9")
    env = {**closed, "TEXTGEN_DATA": "", "HF_HOME": str(tmp_path/"hub"), "NO_PROXY": "", "no_proxy": ""}
    code = ("import datasets\nstart = time.time()\ntry: data.prepare('wikitext-2', root=root)\n"
            "except data.TextgenError as error: print(error, end='|')\nprint(time.time() - start)")
    out, _ = python(code, root=tmp_path, env=env, stdout=subprocess.PIPE).communicate(timeout=60)
    message, seconds = out.split("|")
    assert message.startswith("Salesforce/wikitext cannot be had from the Hugging Face hub") and "\n" not in message
    assert "set TEXTGEN_DATA to a folder that holds wikitext-2-raw/wiki.train.raw" in message and float(seconds) < 5
    assert not visible(tmp_path/"raw")


# Made once, whole or not at all

HANG = {
    "raw": "sources.write_manifest = lambda folder, facts: print('now', flush=True) or time.sleep(60)",
    "train": "real = encoding._header\nencoding._header = lambda tensors: print('now', flush=True) or time.sleep(60) or real(tensors)",
    "manifest": "real = data.write_manifest\ndef hang(folder, facts):\n    real(folder, facts)\n"
                "    print('now', flush=True)\n    time.sleep(60)\ndata.write_manifest = hang",
}


@pytest.mark.parametrize("place", HANG)
def test_killed(place, tmp_path):
    process = python(f"{HANG[place]}\ndata.prepare('stories', root=root, train=40, validation=5)", root=tmp_path, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.wait()
    process.stdout.close()
    assert visible(tmp_path/"processed") == [] and len(visible(tmp_path/"raw")) == (place != "raw")
    assert list(tmp_path.glob("*/.*.tmp"))  # what it left, under no name that anybody trusts
    prepared = prepare("stories", root=tmp_path, **FEW)
    assert prepared.texts("train") == list(documents(read_source("stories", tmp_path, **FEW).blocks("train")))
    assert not list(tmp_path.glob("*/.*.tmp")) and len(visible(tmp_path/"processed")) == len(visible(tmp_path/"raw")) == 1


def test_killed_at_random_moments(tmp_path):
    "kill -9, 20 times, at moments drawn from the whole length of a preparation; what is there afterwards is whole, and a good run ends it."
    code = ("print('now', flush=True)\ndata.prepare('stories', 'bpe:300', root=root, workers=2, train=3000, validation=300)\n")
    start = time.time()
    process = python(code, root=tmp_path/"whole", stdout=subprocess.PIPE)
    process.stdout.readline(), process.stdout.close()
    begun = time.time()
    assert process.wait(120) == 0
    length, moments = time.time() - begun, random.Random(0)
    for n in range(20):
        process = python(code, root=tmp_path/"killed", stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(moments.random() * length)
        process.kill()
        process.wait(), process.stdout.close()
        for folder in data_folders(tmp_path/"killed"): assert not damage(folder), (n, folder)
    prepared = prepare("stories", "bpe:300", tmp_path/"killed", train=3000, validation=300)
    [whole] = (tmp_path/"whole/processed").glob("stories-*")
    assert prepared.path.name == whole.name and not damage(prepared.path) and not list((tmp_path/"killed").glob("*/.*.tmp"))
    for split in ("train", "validation"):
        assert (prepared.path/f"{split}.safetensors").read_bytes() == (whole/f"{split}.safetensors").read_bytes()


def test_killed_while_repairing(tmp_path):
    "The damaged folder stays until the new one is whole."
    prepared = prepare("stories", root=tmp_path, **FEW)
    file = prepared.path/"train.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert damage(prepared.path)
    for place in ("train", "manifest"):
        process = python(f"{HANG[place]}\ndata.repair(next((root/'processed').glob('stories-*')), root)", root=tmp_path, stdout=subprocess.PIPE)
        assert process.stdout.readline() == "now\n"
        process.kill()
        process.wait(), process.stdout.close()
        assert damage(prepared.path) == ["train.safetensors has changed: " + damage(prepared.path)[0].partition(": ")[2]]
    repair(prepared.path, tmp_path)
    assert not damage(prepared.path) and not list(tmp_path.glob("*/.*.tmp"))


def test_repair_when_the_tokenizer_is_gone(tmp_path):
    "The folder's own copy of a tokenizer that was given serves as well."
    text = write("mine.txt", b"a text of one's own, twice as long as need be")(tmp_path)
    prepare(text, root=tmp_path/"data").tokenizer.save(tmp_path/"mine")
    made = prepare(text, tmp_path/"mine", tmp_path/"data")
    shutil.rmtree(tmp_path/"mine")
    (made.path/"train.safetensors").write_bytes(b"?")
    repair(made.path, tmp_path/"data")
    assert not damage(made.path) and made.texts("train") + made.texts("validation") == [text.read_text()[:40], text.read_text()[40:]]


def test_eight_at_once(tmp_path):
    code = """
def counted(module, name):
    real = getattr(module, name)
    def call(*args):
        (root/f"{name}-{time.time_ns()}").touch()
        time.sleep(0.3)
        return real(*args)
    setattr(module, name, call)
counted(data, "_process"), counted(sources, "_write_raw")
print("ready", flush=True)
sys.stdin.readline()
print(data.prepare("stories", root=root, train=40, validation=5).path.name)
"""
    processes = [python(code, root=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(8)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 8
    for process in processes: process.stdin.write("go\n"), process.stdin.flush()
    names = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 8 and len(names) == 1
    assert len(list(tmp_path.glob("_process-*"))) == len(list(tmp_path.glob("_write_raw-*"))) == 1


def test_processes_end_with_their_parent(tmp_path):
    "kill -9 of the process that prepares leaves no worker behind."
    code = ("import os, threading, loky\nreal = loky.ProcessPoolExecutor.submit\n"
            "def submit(pool, *job):\n    done = real(pool, *job)\n    done.result()\n"
            "    print(*pool._processes, flush=True)\n    time.sleep(60)\nloky.ProcessPoolExecutor.submit = submit\n"
            "data.prepare('stories', root=root, workers=2, train=400, validation=5)")
    process = python(code, root=tmp_path, stdout=subprocess.PIPE)
    workers = process.stdout.readline().split()
    assert len(workers) == 2
    process.kill()
    process.wait(), process.stdout.close()
    def running(pid): return Path(f"/proc/{pid}/stat").is_file() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    for _ in range(300):
        if not any(map(running, workers)): break
        time.sleep(0.1)
    else: pytest.fail(f"still there: {workers}")


def test_memory_does_not_grow_with_the_text(tmp_path):
    import tracemalloc
    peaks = []
    for megabytes in (8, 32):
        text = tmp_path/f"{megabytes}.txt"
        text.write_text("It was the best of times, it was the worst of times.\n" * (megabytes * 10**6 // 53))
        tracemalloc.start()
        prepare(text, "byte", tmp_path/"data", workers=1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 60e6


def test_a_huge_corpus_is_opened_and_shuffled_in_little_memory(tmp_path):
    "A file of 10 GB (most of it a hole, which takes no disk): to open it and to draw batches from its end costs next to nothing."
    import tracemalloc
    from textgen.data import Batches
    path, n = tmp_path/"train.safetensors", 5 * 10**9
    tensors = {"tokens": (np.dtype(np.uint16), n), "documents": (np.dtype(np.int64), 2)}
    with open(path, "wb") as file:
        file.write(encoding._header(tensors))
        file.truncate(encoding.HEADER + 2 * n)
        file.seek(0, 2)
        file.write(np.array([0, n]).tobytes())
    tracemalloc.start()
    chunks = Chunks(encoding.read_tensors(path)["tokens"], 128)
    batches = Batches(chunks, 32, seed=3, step=10**6)
    x, y = batches[0]
    assert len(chunks) == (n - 1) // 128 and x.shape == (32, 128) and not x.any()
    assert tracemalloc.get_traced_memory()[1] < 3e6
    tracemalloc.stop()


@pytest.mark.parametrize("size", [2_000, 40_000, 100_000])
def test_full_disk(size, tmp_path):
    "No file can grow beyond `size`: an error in one line, nothing half-made, and what was there stays."
    text = tmp_path/"mine.txt"
    text.write_text("A text of one's own. " * 3000)
    first = prepare(text, root=tmp_path/"data", val_fraction=0.2)
    code = (f"import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
            "for corpus, options in [('stories', dict(train=3000, validation=5)), (root/'mine.txt', {})]:\n"
            "    try: data.prepare(corpus, root=root/'data', **options)\n    except data.TextgenError as error: print(error.exit_code, error)")
    out, _ = python(code, root=tmp_path, stdout=subprocess.PIPE).communicate(timeout=60)
    lines = out.splitlines()
    assert len(lines) == (2 if size < 50_000 else 1) and all(line.startswith("1 could not write") and "File too large" in line for line in lines)
    assert not list((tmp_path/"data").glob("*/.*.tmp")) and not damage(first.path)
    assert all(not damage(folder) for folder in data_folders(tmp_path/"data"))


def test_a_tokenizer_that_is_killed(tmp_path):
    "A worker that dies (out of memory, say) is an error in one line."
    code = ("import os, signal\nreal = encoding._in_processes\n"
            "encoding._encode_there = type(encoding._encode_there)(compile('lambda *job: __import__(\"os\").kill(__import__(\"os\").getpid(), 9)', '', 'eval').co_consts[0], {})\n"
            "try: data.prepare('stories', root=root, workers=2, train=40, validation=5)\nexcept data.TextgenError as error: print(error)")
    out, _ = python(code, root=tmp_path, stdout=subprocess.PIPE).communicate(timeout=60)
    assert out.startswith("a process that encoded text was killed, perhaps for lack of memory; close other programs, or use fewer workers")
    assert not visible(tmp_path/"processed")


def test_nothing_is_made_twice(tmp_path, monkeypatch):
    text = tmp_path/"a.txt"
    text.write_text("one two three " * 50)
    for corpus, options in [("stories", FEW), (text, {})]:
        for tokenizer in ["char", "bpe:280"]:
            first = prepare(corpus, tokenizer, tmp_path/"data", **options)
            times = {path: path.stat().st_mtime_ns for path in (tmp_path/"data").rglob("*")}
            with monkeypatch.context() as patch:
                for module, name in [(data, "_process"), (sources, "_write_raw"), (sources, "read_blocks")]:
                    patch.setattr(module, name, lambda *a: pytest.fail("called"))
                assert prepare(corpus, tokenizer, tmp_path/"data", **options).path == first.path
            assert times == {path: path.stat().st_mtime_ns for path in (tmp_path/"data").rglob("*")}
    text.write_text("one two four " * 50)
    assert prepare(text, "bpe:280", tmp_path/"data").path != first.path


def test_another_grammar_is_another_corpus(tmp_path, monkeypatch):
    first = prepare("stories", root=tmp_path, **FEW)
    changed = tmp_path/"corpus.py"
    changed.write_text("# a grammar of tomorrow")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=changed))
    again = prepare("stories", root=tmp_path, **FEW)
    assert len(visible(tmp_path/"raw")) == 2 and again.path == first.path  # written again; the same text is the same corpus


def test_bar(tmp_path):
    "progress=True draws on a terminal's stderr, and says nothing elsewhere."
    code = "data.prepare('stories', root=root/sys.argv[0], progress=True, train=40, validation=5)"
    out, err = python(code, root=tmp_path/"log", stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate(timeout=60)
    assert out == err.strip() == ""
    ours, theirs = pty.openpty()
    process = python(code, root=tmp_path/"terminal", stdout=subprocess.PIPE, stderr=theirs, env={"TERM": "xterm"})
    assert process.wait(60) == 0 and process.stdout.read() == ""
    assert b"tokenizing train" in os.read(ours, 100_000)
    for end in (ours, theirs): os.close(end)
    process.stdout.close()


# Bad input

def write(name, content):
    def make(folder):
        path = folder/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path
    return make


BAD = {
    "missing": (lambda folder: folder/"mine.txt", "is no file or folder, and no dataset of that name"),
    "near": (lambda folder: "wikitext2", "did you mean 'wikitext-2'?"),
    "empty": (write("mine.txt", b""), "mine.txt: there is nothing"),
    "blank": (write("mine.txt", b" \r\n\t \n"), "mine.txt: there is nothing, or only white space"),
    "latin-1": (write("mine.txt", "good\nline\nnaïve".encode("latin-1")), "mine.txt is not UTF-8: byte 0xEF in line 3, at offset 12;"),
    "utf-16": (write("mine.txt", "good".encode("utf-16")), "mine.txt is binary or UTF-16"),
    "binary": (write("mine.txt", bytes(range(256))), "mine.txt is binary"),
    "no text": (lambda folder: write("pictures/a.png", b"x")(folder).parent, "pictures: no file ends in .txt"),
    "no match": (lambda folder: folder/"*.txt", "no file matches"),
    "no column": (write("mine.csv", b"a,b\n1,2\n"), "mine.csv has no column 'text'"),
    "bad json": (write("mine.jsonl", b'{"text": "good"}\n{"text": 7}\n'), "mine.jsonl, line 2: "),
    "cut short": (write("mine.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0"), "mine.txt.gz is damaged or cut short"),
    "bad file in a folder": (lambda folder: write("books/b/bad.md", b"\xff")(folder).parent.parent, "bad.md is not UTF-8: byte 0xFF in line 1"),
    "blank folder": (lambda folder: write("books/empty.txt", b"")(folder).parent, "empty.txt: there is nothing"),
}


@pytest.mark.parametrize("make, part", BAD.values(), ids=BAD)
def test_bad_input(make, part, tmp_path):
    with pytest.raises(UsageError) as caught: prepare(make(tmp_path), root=tmp_path/"data")
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert not visible(tmp_path/"data/processed")


def test_shorter_than_a_chunk(tmp_path):
    prepared = prepare(write("mine.txt", b"just a little text")(tmp_path), root=tmp_path/"data")
    with pytest.raises(UsageError, match="^the train split has 16 tokens, and one chunk of 64 needs 65; use a longer text or shorter chunks$"):
        Chunks(prepared.split("train").tokens, 64, "the train split")


def test_read_only_folder(tmp_path):
    "Nobody may write there: an error, unless the corpus is prepared already."
    text, ready, locked = write("mine.txt", b"a text of one's own")(tmp_path), tmp_path/"ready", tmp_path/"locked"
    made = prepare(text, root=ready)
    locked.mkdir()
    closed = [locked, ready, *ready.iterdir()]
    for folder in closed: folder.chmod(0o555)
    code = ("import filelock, os\nif not os.geteuid(): os.setuid(65534)\n"  # root may write anywhere: give up its rights
            "print(data.prepare(root/'mine.txt', root=root/'ready').path.name)\n"
            "try: data.prepare(root/'mine.txt', root=root/'locked')\nexcept data.TextgenError as error: print(error)")
    try:
        for folder in [tmp_path, *tmp_path.parents][:4]:  # pytest's own folders, one more where several processes test
            if folder.stat().st_mode & 0o777 == 0o700: folder.chmod(0o755)
        out, _ = python(code, root=tmp_path, stdout=subprocess.PIPE).communicate(timeout=60)
    finally:
        for folder in closed: folder.chmod(0o755)
    name, message = out.splitlines()
    assert name == made.path.name and message.startswith("cannot write into") and "Permission denied; make it writable" in message


# What must not be taken for what was there before

def test_the_same_bytes_read_in_another_way(tmp_path):
    "In a .csv and in a .txt of one name, they are other documents."
    for name in ("a.txt", "a.csv", "a.md"): (tmp_path/name).write_bytes(b"text\nhello\n" * 9)
    plain, table, other = (prepare(tmp_path/name, root=tmp_path/"data", val_fraction=0.3) for name in ("a.txt", "a.csv", "a.md"))
    assert "".join(plain.texts("train") + plain.texts("validation")) == "text\nhello\n" * 9 and other.path == plain.path
    assert "|".join(table.texts("train") + table.texts("validation")).replace("|", "") == "hello" + "texthello" * 8


def test_another_text_of_the_same_size_and_time(tmp_path, monkeypatch):
    "Even where a program sets the time of the text back, as cp -p does."
    monkeypatch.setattr(sources, "GRAIN", 0)
    text, paths = tmp_path/"a.txt", []
    for words in ("one two ", "two one "):
        text.write_text(words * 20)
        os.utime(text, (1e9, 1e9))
        time.sleep(0.05)
        paths += [prepare(text, root=tmp_path/"data").path]
    assert paths[0] != paths[1] and Prepared(paths[1]).texts("train")[0].startswith("two one two")


@pytest.mark.parametrize("name", ["{}", "hf:{}"])
def test_another_tokenizer_in_the_same_directory(tmp_path, monkeypatch, name):
    "In GPT-2's two files, or through transformers; the directory may be named from where one is."
    (tmp_path/"a.txt").write_text("one two one three " * 20)
    monkeypatch.chdir(tmp_path)
    paths = []
    for size in (258, 262):
        tokenizer = BPETokenizer.train(["one two one three " * 9], size)
        tokenizer.save("tokenizer")
        if name == "{}":
            model = json.loads(Path("tokenizer/tokenizer.json").read_text())["model"]
            Path("tokenizer/vocab.json").write_text(json.dumps(model["vocab"]))
            Path("tokenizer/merges.txt").write_text("#version\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
            Path("tokenizer/tokenizer.json").unlink()
        prepared = prepare("a.txt", name.format("tokenizer"), "data", val_fraction=0.5)
        assert prepared.tokenizer.vocab_size == size and prepared.manifest["asked"]["tokenizer"] == name.format(tmp_path/"tokenizer")
        paths += [prepared.path.resolve()]
    assert paths[0] != paths[1]
    (tmp_path/"else").mkdir()
    monkeypatch.chdir(tmp_path/"else")
    repair(paths[1], tmp_path/"data")
    assert not damage(paths[1])


@pytest.mark.parametrize("ids, told", [([3, 300], "from 3 to 300"), ([-1, 5], "from -1 to 5")])
def test_a_tokenizer_that_says_too_little(ids, told):
    "Ids beyond its vocabulary are an error, and not cut to fit the file."
    tokenizer = types.SimpleNamespace(vocab_size=200, encode_batch=lambda texts: [np.array(ids) for text in texts])
    with pytest.raises(UsageError, match=told): encoding.encode_blocks([Block("ab")], tokenizer)


# Names and places

def test_a_folder_called_like_a_dataset_or_a_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("stories", "char"): (tmp_path/name).mkdir()
    prepared = prepare("stories", "char", "data", **FEW)
    assert [prepared.manifest["asked"][key] for key in ("data", "tokenizer")] == ["stories", "char"]
    repair(prepared.path, "data")
    assert not damage(prepared.path)


def test_the_folder_around_root(tmp_path, monkeypatch):
    "Its text is the user's, not what was fetched into root."
    monkeypatch.chdir(tmp_path)
    prepare("stories", root="data", **FEW)
    with pytest.raises(UsageError, match="^no text of your own in .*; name a file, or add one$"): prepare(".", root="data")
    (tmp_path/"a.txt").write_text("mine " * 20)
    first = prepare(".", root="data")
    prepare("stories", root="data", train=50, validation=5)
    assert prepare(".", root="data").path == first.path and first.texts("train") == [("mine " * 20)[:90]]
    fetched = next(Path("data/raw").glob("stories-*"))
    assert prepare(fetched, root="data").manifest["splits"]["train"]["documents"] == 2  # just this was asked for


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"a.txt").write_text("at home " * 20)
    BPETokenizer.train(["at home"], 257).save(tmp_path/"tokenizer")
    prepared = prepare("~/a.txt", "~/tokenizer", "~/data")
    assert prepared.path.parent == tmp_path/"data/processed" and set(data_folders("~/data")) == set(data_folders(tmp_path/"data"))


@pytest.mark.parametrize("name", ["", "~nobody-of-that-name/a.txt", "é" * 300, "\0"])
def test_no_name_of_a_file(name, tmp_path):
    with pytest.raises(UsageError, match="is no file or folder"): prepare(name, root=tmp_path)


def test_a_step_that_is_no_list(tmp_path):
    with pytest.raises(UsageError, match=r"give a list of names, as in \['nfc'\]"): prepare("stories", root=tmp_path, clean="nfc")


def test_a_raw_folder_is_not_prepared(tmp_path):
    prepare("stories", root=tmp_path, **FEW)
    raw = next(folder for folder in data_folders(tmp_path) if folder.parent.name == "raw")
    with pytest.raises(UsageError, match="has a corpus as it came, and no ids"): Prepared(raw)


def test_leftovers_of_another_folder(tmp_path):
    "Of two folders with names that begin alike, one does not take the other's unfinished work for its own."
    left, other = tmp_path/".books.0a1b2c3d.tmp", tmp_path/".books.old-1234.0a1b2c3d.tmp"
    for folder in (left, other): folder.mkdir()
    folders.make_once(tmp_path/"books", lambda folder: folders.write_manifest(folder, {}))
    assert other.is_dir() and not left.exists()
