"""The data commands as a user meets them: typed lines, exit codes, one line for every mistake, damaged files.

What is prepared first, and what looks at signals, pipes, rights or the terminal, runs in processes of its own; the other lines in this one.
All share one data folder (`work/data`), with the stories and a fable prepared in it; what damages anything works on a copy.
"""
import contextlib, io, os, re, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace

import pytest

from textgen.cli import main

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())"]  # what the script `textgen` does
FABLE = "The fox looked up at the grapes, and the grapes looked down at the fox.\n" * 40
COMMANDS = ["list", "prepare", "info", "sample", "verify", "repair"]


def environment(): return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "", "TEXTGEN_DATA": ""}


def process(line, cwd):
    "Type a line; the finished process."
    return subprocess.run([*PROGRAM, "data", *shlex.split(line)], cwd=cwd, env=environment(), capture_output=True, text=True)


def textgen(line, cwd):
    "The same in this process."
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["-c"])
        patch.setenv("TEXTGEN_DATA", "")
        code = main(["data", *shlex.split(line)])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def said(line, cwd, code=0, typed=textgen):
    "What a line writes, if it ends with this code and no error."
    done = typed(line, cwd)
    assert done.returncode == code and done.stderr == "", done.stderr
    return done.stdout


def refused(done, *parts, code=2):
    "A wrong input: the code, one line on standard error that begins with 'error: ' and has these parts, nothing on standard output."
    assert done.returncode == code and done.stdout == "" and re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    for part in parts: assert part in done.stderr, done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    (folder/"fable.txt").write_text(FABLE, encoding="utf-8")
    said("prepare fable.txt", folder, typed=process)
    said("prepare stories --tokenizer bpe:400 --set train=300 --set validation=30", folder, typed=process)
    return folder


@pytest.fixture
def copy(work, tmp_path):
    "A copy of the data, to damage; the fable is still that of `work`."
    shutil.copytree(work/"data", tmp_path/"data")
    return tmp_path


def one(folder, pattern):
    found, = folder.glob(pattern)
    return found


def flip(file):
    "Flip one bit in the middle of a file; its size and times stay."
    state, data = file.stat(), bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


# Help

@pytest.mark.parametrize("command", COMMANDS)
def test_help(command, work):
    "Fits 80 columns, and its examples are lines of this program."
    shown = said(f"{command} --help", work)
    assert re.search(rf"Examples?:\n +textgen data {command}", shown) and "--root" in shown, shown
    assert max(map(len, shown.splitlines())) <= 80


def test_the_group_lists_them(work):
    assert re.findall(r"^  (\w+)  +[A-Z]", said("--help", work).partition("Commands:")[2], flags=re.M) == COMMANDS
    refused(textgen("", work), "Missing command", "textgen data --help")
    refused(textgen("verfy", work), "verfy", "'verify'")


@pytest.mark.parametrize("line", ["--help", "data --help"])
def test_help_needs_no_framework(line):
    code = ("import sys; from textgen.cli import main; main(sys.argv[1:]); "
            "print(*sys.modules.keys() & {'torch', 'transformers', 'datasets', 'tokenizers', 'matplotlib', 'pyarrow'})")
    done = subprocess.run([sys.executable, "-c", code, *line.split()], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "" and "data" in done.stdout, done.stdout


# Prepare and list

def test_prepare(work):
    "How much there is of each split, and that the second time nothing is made again."
    first = said("prepare fable.txt --tokenizer bpe:300 --root new", work)
    rows = {line.split()[0]: [int(word.replace(",", "")) for word in re.findall(r"[\d,]+", line)]
            for line in first.splitlines()[:-1]}
    assert rows["train"][1:] == [1, 2592] and rows["validation"][1:] == [1, 288]
    name, rest = first.splitlines()[-1].split(": ")
    assert re.fullmatch(r"made now in [\d.]+ s, [\d.]+ MB/s", rest) and Path(name).parent == Path("new/processed")
    made = {path: path.stat().st_mtime_ns for path in (work/name).rglob("*")}
    second = said("prepare fable.txt --tokenizer bpe:300 --root new", work)
    assert second.splitlines()[:-1] == first.splitlines()[:-1] and second.endswith(": it was there, nothing was remade\n")
    assert made == {path: path.stat().st_mtime_ns for path in (work/name).rglob("*")}


def test_prepare_with_options(tmp_path):
    "Lines, a column of a table, cleaning, the share held out; each is another corpus, and `info` knows of it."
    (tmp_path/"table.csv").write_text("id,words\n1,“one”\n2,two\n3,three\n4,four\n", encoding="utf-8")
    (tmp_path/"lines.txt").write_text("".join(f"line {i}\n" for i in range(8)), encoding="utf-8")
    shown = said("prepare table.csv --column words --val-fraction 0.5 --clean quotes --workers 1", tmp_path)
    assert "8 characters" in shown
    asked = said("info table", tmp_path)
    assert "column=words" in asked and "val_fraction=0.5" in asked and re.search(r"^cleaning +quotes$", asked, flags=re.M)
    assert re.search(r"^train +\d+ tokens +4 documents", said("prepare lines.txt --lines --val-fraction 0.5", tmp_path), flags=re.M)


@pytest.mark.parametrize("line, parts", [
    ("prepare", ["NAME|PATH", "textgen data prepare --help"]),
    ("prepare nowhere.txt", ["nowhere.txt", "no file or folder"]),
    ("prepare stories --set tokenizer=char", ["--set tokenizer", "textgen data prepare --help"]),
    ("prepare stories --set tain=3", ["unknown key 'tain'", "did you mean 'train'?"]),
    ("prepare stories --set train=0", ["train", "greater than or equal to 1"]),
    ("prepare stories --tokenizer bqe:300 --set train=3", ["'bqe'", "did you mean 'bpe'?"]),
    ("prepare stories --val-fraction 1.5", ["val_fraction", "between 0 and 1"]),
    ("prepare stories --clean qoutes", ["qoutes"]),
    ("prepare stories --workers 0", ["--workers"]),
    ("info", ["Missing argument", "textgen data info --help"]),
    ("info stories", ["nothing is prepared in data", "textgen data prepare stories"]),
    ("info x --plot x.gif", ["x.gif", ".png, .svg or .pdf"]),
    ("sample stories -n 0", ["-n", "textgen data sample --help"]),
    ("verify", ["nothing in data", "textgen data prepare stories"]),
    ("repair stories", ["nothing is prepared in data"]),
], ids=lambda part: part if isinstance(part, str) else "")
def test_wrong_line(line, parts, tmp_path):
    refused(textgen(line, tmp_path), *parts)
    assert not list(tmp_path.glob("data/processed/*/*"))


def test_list(work):
    "Everything in aligned columns that another program can read; TEXTGEN_DATA is looked into."
    shown = said("list", work)
    assert max(map(len, shown.splitlines())) <= 80 and "\x1b" not in shown
    rows = [line.split() for line in shown.splitlines()]
    processed = {row[0]: row for row in rows if len(row) == 6}
    name = one(work, "data/processed/stories-*").name
    assert processed[name][1] == "bpe:400" and processed[name][3] == "330" and re.fullmatch(r"[\d.]+kB", processed[name][4])
    tokens = re.findall(r"([\d,]+) tokens", said("prepare stories --tokenizer bpe:400 --set train=300 --set validation=30", work))
    assert int(processed[name][2].replace(",", "")) == sum(int(count.replace(",", "")) for count in tokens)
    assert re.search(r"^stories +train,validation +raw +Apache-2.0", shown, flags=re.M)
    assert re.search(r"^wikitext-2 +train,validation,test +hub +CC BY-SA", shown, flags=re.M)
    assert re.search(r"^fable-\w+ +[\d.]+k?B [\d-]+ fable.txt$", shown, flags=re.M)


def test_list_of_nothing(tmp_path):
    shown = said("list --root empty", tmp_path)
    assert shown.splitlines()[-1] == "nothing in empty yet; begin with: textgen data prepare stories" and not list(tmp_path.iterdir())
    (tmp_path/"tinyshakespeare").mkdir()
    (tmp_path/"tinyshakespeare/input.txt").touch()
    for name, where in [(str(tmp_path), "TEXTGEN_DATA"), ("", "nowhere")]:
        done = subprocess.run([*PROGRAM, "data", "list"], cwd=tmp_path, env={**environment(), "TEXTGEN_DATA": name}, capture_output=True, text=True)
        assert re.search(rf"^shakespeare +train,validation +{where} +public domain$", done.stdout, flags=re.M)


def test_list_of_damaged_ones(copy):
    "What is damaged is listed all the same."
    for name in ["manifest.json", "manifest.backup.json"]: (one(copy, "data/processed/fable-*")/name).write_text("{")
    for name in ["manifest.json", "manifest.backup.json"]: (one(copy, "data/raw/fable-*")/name).unlink()
    shown = said("list", copy)
    assert re.search(r"^fable-char-\w+ +damaged +- +- +[\d.]+kB -$", shown, flags=re.M)
    assert re.search(r"^fable-\w+ +0B - +damaged$", shown, flags=re.M)


# Info and sample

def test_info(work, tmp_path):
    "The facts as Python has them; the picture really is one."
    import numpy as np
    from textgen.data import Prepared
    shown = said(f"info stories --plot {tmp_path}/new/picture.png", work)
    assert (tmp_path/"new/picture.png").read_bytes().startswith(b"\x89PNG\r\n") and shown.endswith(f"picture: {tmp_path}/new/picture.png\n")
    assert [path.name for path in (tmp_path/"new").iterdir()] == ["picture.png"]
    prepared = Prepared(one(work, "data/processed/stories-*"))
    facts = dict(line.split(maxsplit=1) for line in shown.splitlines()[:10])
    assert facts["licence"] == "Apache-2.0, as this package" and facts["source"] == "textgen.corpus" and facts["corpus"] == "stories"
    assert facts["tokenizer"].startswith("bpe:400") and facts["vocabulary"] == "400 tokens, ids as uint16"
    for name in ["train", "validation"]:
        split = prepared.split(name)
        counts = [f"{count:,}" for count in (len(split), len(split.documents) - 1, split.characters, split.bytes)]
        assert [name, *counts, f"{split.characters / len(split):.2f}", f"{split.bytes / len(split):.2f}"] in map(str.split, shown.splitlines())
    split, lengths = prepared.split("train"), np.diff(prepared.split("train").documents)
    assert f"tokens in a document: {lengths.min()} to {lengths.max()}, quartiles {int(np.quantile(lengths, 0.25))} " in shown
    counts = np.bincount(split.tokens, minlength=400)
    assert f"{(counts > 0).sum()} of 400 tokens occur" in shown
    top = re.findall(r"^(b?'.*'|b?\".*\") +(\d+) +([\d,]+) +[\d.]+%$", shown, flags=re.M)
    assert [(eval(token), int(id), count) for token, id, count in top] == [
        (prepared.tokenizer.decode([id]), id, f"{counts[id]:,}") for id in np.argsort(-counts, kind="stable")[:10]]
    assert "licence      as its owner says" in said("info fable", work) and "source       fable.txt" in said("info fable", work)


def test_names(work):
    "A path, the whole name, its beginning; what is several or unknown."
    name = one(work, "data/processed/stories-*").name
    assert said("info stories", work) == said(f"info {name}", work) == said(f"info data/processed/{name}/", work)
    said("prepare fable.txt --tokenizer bpe:290 --root two", work), said("prepare fable.txt --root two", work)
    for command in ["info", "sample"]:
        refused(textgen(f"{command} fable --root two", work), "may be any of 2", "fable-bpe-290-", "fable-char-")
        refused(textgen(f"{command} storeis", work), "did you mean 'stories'?", "textgen data prepare")
        refused(textgen(f"{command} fable --root two/", work), "name one of")
    assert said("verify fable --root two", work).count(": ok\n") == 3
    assert f"{name}: ok\n" in said(f"verify {name} --root nowhere", work/"data/processed")  # a path, from where it lies


def test_sample(work):
    "The same seed draws the same; whole documents are those of the split."
    from textgen.data import Prepared
    texts = Prepared(one(work, "data/processed/stories-*")).texts("validation")
    first = said("sample stories --split validation -n 5 --seed 3 --length 9999", work)
    parts = re.findall(r"^--- validation, document (\d+) of 30\n(.*)\n", first, flags=re.M)
    assert len(parts) == 5 and all(texts[int(number) - 1] == text + "\n" for number, text in parts)
    assert first == said("sample stories --split validation -n 5 --seed 3 --length 9999", work)
    assert first != said("sample stories --split validation -n 5 --seed 4 --length 9999", work)
    stretches = re.split(r"--- .*\n", said("sample fable -n 4 --length 50", work))[1:]
    assert len(stretches) == 4 and all(part.removesuffix("\n") in FABLE and len(part) == 51 for part in stretches)


# Damage

def test_verify_and_repair(copy):
    "Flipped bits in a raw and a prepared corpus: named, mended raw first, and then nothing is wrong."
    raw, prepared = one(copy, "data/raw/stories-*"), one(copy, "data/processed/stories-*")
    assert said("verify", copy).count(": ok\n") == 4
    files = [raw/"validation.txt", prepared/"train.safetensors", prepared/"tokenizer/tokenizer.json", prepared/"manifest.json"]
    whole = {file: file.read_bytes() for file in files}
    for file in files: flip(file)
    lines = said("verify", copy, code=1).splitlines()
    for file, name in [(raw, "validation.txt has changed"), (prepared, "train.safetensors has changed"),
                       (prepared, "tokenizer/tokenizer.json has changed"), (prepared, "manifest.json is missing or damaged")]:
        assert any(line.startswith(f"{file.relative_to(copy)}: {name}") for line in lines), lines
    assert sum(line.endswith(": ok") for line in lines) == 2 and lines[-1] == "2 damaged; to mend: textgen data repair"
    assert said("verify stories", copy, code=1).endswith("to mend: textgen data repair stories\n")
    mended = said("repair", copy).splitlines()
    assert mended == [f"{raw.relative_to(copy)}: mended", f"{prepared.relative_to(copy)}: mended"]
    assert all(file.read_bytes() == data for file, data in whole.items() if file.name != "manifest.json")
    assert said("verify", copy).count(": ok\n") == 4
    assert said("repair", copy) == "nothing is damaged\n"


def test_repair_line_works_as_it_stands(copy):
    "With another root, and a name that the shell would split."
    (copy/"data").rename(copy/"my data")
    flip(one(copy, "my data/raw/stories-*")/"train.txt")
    last = said("verify --root 'my data' stories", copy, code=1).splitlines()[-1]
    assert said(last.split("to mend: textgen data ")[1], copy).endswith(": mended\n")
    assert ": ok\n" in said("verify --root 'my data'", copy)


def test_record_of_a_changed_text(tmp_path):
    "The record of a user's text follows the text; what was prepared from the old one stays, and is told if it is damaged as well."
    (tmp_path/"fable.txt").write_text(FABLE, encoding="utf-8")
    said("prepare fable.txt", tmp_path)
    (tmp_path/"fable.txt").write_text("Another fable.\n" * 9, encoding="utf-8")
    assert "fable.txt has 135 bytes, not 2,880" in said("verify fable", tmp_path, code=1)
    flip(one(tmp_path, "data/processed/fable-*")/"train.safetensors")
    first, second = said("repair fable", tmp_path, code=1).splitlines()
    assert first.startswith("data/raw/fable-") and first.endswith(": mended") and "not mended: " in second and "changed since" in second
    assert said("verify fable", tmp_path, code=1).count(": ok\n") == 1


def test_one_that_cannot_be_mended_keeps_no_other(copy):
    "Both manifests of the fable are lost; the stories are mended."
    fable, stories = one(copy, "data/processed/fable-*"), one(copy, "data/processed/stories-*")
    for name in ["manifest.json", "manifest.backup.json"]: (fable/name).unlink()
    (stories/"validation.safetensors").unlink()
    refused(textgen("info stories", copy), "validation.safetensors", "textgen data repair", code=1)
    lines = said("repair", copy, code=1).splitlines()
    assert "not mended: " in lines[0] and "both its manifests are lost" in lines[0] and lines[1:] == [f"{stories.relative_to(copy)}: mended"]
    assert said("sample stories", copy).startswith("--- train, document ")


# Pipes, keys, permissions

def test_broken_pipe_is_quiet(work):
    for line in ["list", "sample stories -n 300", "verify"]:
        done = subprocess.run(f"{shlex.join([*PROGRAM, 'data', *line.split()])} | head -c 3", shell=True, cwd=work, env=environment(),
                              capture_output=True, text=True, timeout=60)
        assert len(done.stdout) == 3 and done.stderr == "", done.stderr


def test_interrupt_is_one_line(tmp_path):
    "While it prepares: exit code 130, one line, and nothing half-made."
    process = subprocess.Popen([*PROGRAM, "data", "prepare", "stories", "--set", "train=400000"], cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    began = time.time()
    while not list(tmp_path.glob("data/raw/.stories-*.tmp")):
        assert process.poll() is None and time.time() - began < 60, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n") and not list(tmp_path.glob("data/*/[!.]*"))


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_read_only_folder(copy):
    "To look is allowed; to mend is refused in one line that names the folder."
    for name in ["fable", "stories"]: flip(one(copy, f"data/processed/{name}-*")/"train.safetensors")
    folders = [copy/"data/raw", copy/"data/processed"]
    code = ("import filelock, os, rich.progress, sys, textgen.corpus, textgen.data, tokenizers; from textgen.core import registered, resolve\n"
            "[resolve('commands', name) for name in registered('commands')]\n"
            "from textgen.cli import main\nif not os.geteuid(): os.setuid(65534)\n"  # root may write anywhere: give that up
            "sys.exit(main())")
    type_it = lambda line: subprocess.run([sys.executable, "-c", code, "data", *line.split()], cwd=copy, env=environment(), capture_output=True, text=True)
    try:
        for folder in [copy, *copy.parents][:3]: folder.chmod(0o755)  # pytest's own folders
        for folder in folders: folder.chmod(0o555)
        assert [type_it(line).returncode for line in ["info stories", "list", "verify"]] == [0, 0, 1]
        *others, stories = type_it("repair").stdout.splitlines()  # the fable cannot even be read
        assert others and all(": not mended: " in line for line in others)
        assert ": not mended: cannot write into data/processed: Permission denied" in stories
        refused(type_it("prepare stories"), "cannot write into data/raw: Permission denied", code=1)
    finally:
        for folder in folders: folder.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_bar_on_a_terminal(copy):
    "Standard error is a terminal: a bar there, and not a byte of it on standard output."
    terminal, theirs = os.openpty()
    process = subprocess.Popen([*PROGRAM, "data", "verify"], cwd=copy, env={**environment(), "TERM": "xterm", "COLUMNS": "80"},
                               stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    out, drawn = process.communicate(timeout=60)[0], b""
    while True:
        try: data = os.read(terminal, 65536)
        except OSError: break  # how a pseudo-terminal ends
        if not data: break
        drawn += data
    os.close(terminal)
    assert process.returncode == 0 and out.count(": ok\n") == 4 and "\x1b" not in out and b"verifying" in drawn
