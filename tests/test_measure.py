"""`textgen measure` as a user meets it: files of all kinds, side by side, what is missing, what is wrong, and ctrl-C."""
import io, json, os, re, signal, subprocess, sys
from pathlib import Path

import pytest, yaml

from textgen.cli import main
from textgen.core import REGISTRY, UsageError
from textgen.corpus import stories
from textgen.measurement import Column, excerpt, longest, pairs, read_column
from textgen.originality import TrainingText, check
from textgen.quality import measure

ROOT = Path(__file__).resolve().parent.parent
FIRST, SECOND, LEARNT = ([text.rstrip("\n") for text in stories(12, seed=seed)] for seed in (1, 2, 3))


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    "A folder with texts, in which commands run."
    monkeypatch.chdir(tmp_path)
    write("first.txt", FIRST)
    write("second.txt", SECOND)
    write("learnt.txt", LEARNT)
    return tmp_path


def write(name, texts): Path(name).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def ask(capsys, *words):
    "The exit code, and what was said."
    capsys.readouterr()
    code = main(["measure", *words])
    return code, *capsys.readouterr()


def refused(capsys, said, *words):
    code, out, err = ask(capsys, *words)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err, (code, out, err)


def saved(*words, code=0):
    assert main(["measure", *words, "--json", "figures.json"]) == code
    return json.loads(Path("figures.json").read_text(encoding="utf-8"))


# What is read

def test_the_figures_are_those_of_the_chapter():
    found = saved("first.txt")["files"][0]["figures"]
    expected = measure(FIRST)
    expected["loop line"] = expected.pop("loop sample") + 1
    del expected["not measured"]
    assert found == expected


def test_kinds_of_files_say_the_same(capsys):
    Path("text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in FIRST))
    Path("batch.jsonl").write_text("\ufeff" + "".join(json.dumps({"prompt": "p", "texts": FIRST[i:i + 3]}) + "\n" for i in range(0, 12, 3)))
    Path("lines.txt").write_bytes("\r\n".join(FIRST).encode("utf-8-sig"))
    Path("table.csv").write_text("text\n" + "".join(f'"{text.replace(chr(34), chr(34) * 2)}"\n' for text in FIRST))
    names = ["first.txt", "text.jsonl", "batch.jsonl", "lines.txt", "table.csv"]
    files = saved(*names, "--metrics", "distinct,lengths")["files"]
    assert [one["name"] for one in files] == names and all(one["texts"] == 12 for one in files)
    assert all(one["figures"] == files[0]["figures"] for one in files)


def test_whole(capsys):
    files = saved("first.txt", "--whole", "--metrics", "lengths")["files"]
    assert files[0]["texts"] == 1 and files[0]["figures"]["characters max"] == len("".join(FIRST)) + 12


@pytest.mark.parametrize("text", ["".join(f"{text}\n" for text in FIRST), "".join(json.dumps({"texts": [text]}) + "\n" for text in FIRST)])
def test_standard_input(text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    files = saved("-", "first.txt", "--metrics", "distinct")["files"]
    assert files[0]["name"] == "standard input" and files[0]["figures"] == files[1]["figures"]


def test_empty_texts_are_left_out(capsys):
    write("holes.txt", ["", FIRST[0], "  ", FIRST[1], "round and round and round and round and round"])
    code, out, err = ask(capsys, "holes.txt", "--metrics", "repetition,lengths")
    assert code == 0 and "left out of holes.txt: 2 empty texts" in out
    assert re.search(r"texts +│ +3 ", out) and re.search(r"loop line +│ +5 ", out)  # the line of the file, not the third text


@pytest.mark.parametrize("name, data, said", [
    ("a.jsonl", b'{"text": "a"}\n{"prompt": "b"}\n', 'a.jsonl, line 2: an object with a "text" is expected'),
    ("a.jsonl", b'{"texts": ["a", 1]}\n', "a.jsonl, line 1: an object"),
    ("a.jsonl", b'["a"]\n', "a.jsonl, line 1: an object"),
    ("a.jsonl", b'{"text": \n', "a.jsonl, line 1: "),
    ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl, line 2: not UTF-8; mend the line"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: "),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: "),
    ("a.txt", b"one\ntwo \xff\n", "a.txt is not UTF-8: byte 0xFF in line 2"),
    ("a.txt", b"", "a.txt has no text in it"),
    ("a.txt", b"\n \n", "a.txt has no text in it"),
    ("a.jsonl", b'{"text": " "}\n{"texts": []}\n', "a.jsonl has no text in it"),
])
def test_a_bad_file_is_named(capsys, name, data, said):
    Path(name).write_bytes(data)
    refused(capsys, said, "first.txt", name)


def test_standard_input_is_named_and_no_path(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n")))
    refused(capsys, "error: standard input is not UTF-8: byte 0xFF in line 2", "-")
    refused(capsys, "standard input can be read only once", "-", "--references", "-")


def test_what_is_no_file(capsys):
    Path("folder").mkdir()
    refused(capsys, "nobody.txt is no file", "nobody.txt")
    refused(capsys, "nobody.jsonl is no file", "first.txt", "--references", "nobody.jsonl")
    refused(capsys, "folder is a folder", "folder")
    refused(capsys, "is a directory", "first.txt", "--json", "folder")
    refused(capsys, "is a directory", "first.txt", "--plot", "folder")
    assert Path("folder").is_dir()  # not replaced by a file
    refused(capsys, "Missing argument")


# What is asked

def test_metrics_are_chosen_by_name(capsys):
    code, out, err = ask(capsys, "first.txt", "--metrics", "distinct, zipf,distinct")
    assert code == 0 and err == "" and "distinct-4" in out and "zipf ranks" in out and "rep-1" not in out and "not measured" not in out
    refused(capsys, "--metrics: no 'nonsense'; choose from bleu, chrf, distinct, grammar, lengths, mauve", "first.txt", "--metrics", "zipf,nonsense")
    refused(capsys, "did you mean 'distinct'?", "first.txt", "--metrics", "distnct")


def test_options_that_nobody_takes(capsys):
    refused(capsys, "--training is for originality", "first.txt", "--training", "learnt.txt", "--metrics", "bleu")
    refused(capsys, "--model is for mauve", "first.txt", "--model", "m", "--metrics", "bleu")


def test_what_is_missing_is_said_and_no_error(capsys):
    code, out, err = ask(capsys, "first.txt")
    assert code == 0 and err == ""
    for name in ("bleu", "chrf", "mauve"): assert f"not measured: {name}: there are no references" in out
    assert "not measured: originality: originality needs the documents" in out


def test_what_is_asked_for_and_missing_is_an_error(capsys):
    code, out, err = ask(capsys, "first.txt", "--metrics", "distinct,bleu", "--json", "a.json")
    assert code == 2 and "distinct-1" in out and err == "error: first.txt: bleu: there are no references to compare with; give some\n"
    assert "distinct-1" in json.loads(Path("a.json").read_text())["files"][0]["figures"]  # what could be measured is kept
    code, out, err = ask(capsys, "first.txt", "--metrics", "bleu", "--json", "b.json")
    assert code == 2 and out == "" and not Path("b.json").exists()


def test_a_metric_of_ones_own(monkeypatch, capsys):
    monkeypatch.setitem(REGISTRY["metrics"], "commas", lambda samples, references=None: {"commas [each]": sum(text.count(",") for text in samples)})
    code, out, err = ask(capsys, "first.txt", "--metrics", "commas")
    assert code == 0 and re.search(rf"commas \[each\] +│ +{''.join(FIRST).count(',')} ", out)


# References

def test_references_are_a_column(capsys):
    code, out, err = ask(capsys, "first.txt", "--references", "second.txt", "--metrics", "bleu,distinct", "--json", "a.json")
    assert code == 0 and err == "" and "(references)" in out and "not measured" not in out
    found = json.loads(Path("a.json").read_text())
    assert found["files"][0]["figures"]["bleu"] == measure(FIRST, SECOND, ["bleu"])["bleu"]
    assert "bleu" not in found["references"]["figures"]
    assert found["references"]["figures"] == measure(SECOND, None, ["distinct"])


def test_unequal_counts(capsys):
    write("short.txt", FIRST[:5])
    code, out, err = ask(capsys, "first.txt", "short.txt", "--references", "second.txt")
    assert code == 0 and err == "" and "bleu signature" in out
    assert "bleu: each text is held against the reference of the same number, and there are 5 texts and 12 references (short.txt)" in out
    code, out, err = ask(capsys, "first.txt", "short.txt", "--references", "second.txt", "--metrics", "bleu")
    assert code == 2 and "bleu signature" in out and err.startswith("error: short.txt: bleu: each text") and err.count("\n") == 1


def test_pairs_with_an_empty_text_are_left_out_together(capsys):
    write("holes.txt", ["", *FIRST[1:]])
    write("others.txt", [*SECOND[:-1], ""])
    code, out, err = ask(capsys, "holes.txt", "--references", "others.txt", "--metrics", "bleu,chrf", "--json", "a.json")
    assert code == 0 and "left out of BLEU and chrF of holes.txt: 2 pairs with an empty text" in out
    found = json.loads(Path("a.json").read_text())["files"][0]["figures"]
    assert found == measure(FIRST[1:-1], SECOND[1:-1], ["bleu", "chrf"])
    with pytest.raises(UsageError, match="one is empty"): pairs(Column("a", [(1, "a"), (2, "")]), Column("b", [(1, ""), (2, "b")]))


def test_files_side_by_side(capsys):
    code, out, err = ask(capsys, "first.txt", "second.txt", "first.txt", "--metrics", "lengths")
    head = out.splitlines()[1]
    assert head.index("first.txt") < head.index("second.txt") and head.count("first.txt") == 1
    row = next(line for line in out.splitlines() if "characters max" in line)
    assert [int(number) for number in re.findall(r"\d+", row)] == [max(map(len, FIRST)), max(map(len, SECOND))]


# The training text

def test_what_is_copied(capsys):
    write("thief.txt", [FIRST[0], f"Then {LEARNT[4]} And so on."])
    code, out, err = ask(capsys, "thief.txt", "--training", "learnt.txt", "--metrics", "originality", "--json", "a.json")
    place = len("".join(f"{text}\n" for text in LEARNT[:4]))
    length = len(LEARNT[4])
    assert code == 0 and err == ""
    assert f"thief.txt, line 2: {length:,} of {length + 16:,} characters are copied in one stretch" in out
    assert re.search(rf"the longest overlap, {length:,} characters, is 1 time in the training text, first in document 0 at {place:,}\n", out)
    first, second = json.loads(Path("a.json").read_text())["files"][0]["samples"]
    assert second["marked"] == f"Then ⟦{LEARNT[4]}⟧ And so on." and second["overlap"]["offset"] == place and second["line"] == 2
    assert first["stretches"] == [] and first["marked"] == FIRST[0]


def test_training_text_of_a_run_is_what_it_read(capsys):
    Path("run").mkdir()
    recipe = yaml.safe_load((ROOT/"textgen/recipes/demo.yaml").read_text()) | {"data": "learnt.txt", "data_options": {"lines": True}, "val_fraction": 0.5}
    Path("run/config.yaml").write_text(yaml.safe_dump(recipe))
    write("thief.txt", [LEARNT[0], LEARNT[-1]])
    found = saved("thief.txt", "--training", "run", "--metrics", "originality")["files"][0]["samples"]
    assert found[0]["share"] == 1 and found[1]["share"] < 0.5  # the last line was held out
    found = saved("thief.txt", "--training", "learnt.txt", "--metrics", "originality")["files"][0]["samples"]
    assert found[0]["share"] == found[1]["share"] == 1  # of a file of one's own all is read


def test_bad_training_text(capsys, monkeypatch):
    code, out, err = ask(capsys, "first.txt", "--training", "nobody.txt")
    assert code == 2 and out == "" and "'nobody.txt' is no file or folder" in err and err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    code, out, err = ask(capsys, "first.txt", "second.txt", "--training", "learnt.txt")
    assert code == 2 and "distinct-1" in out and err == \
        'error: first.txt, second.txt: originality: originality needs pydivsufsort; pip install "textgen[eval]"\n'


def test_excerpts_are_short():
    training = TrainingText(["x" * 5000])
    one = check("a" * 500 + "x" * 2000 + "b" * 500, training)
    assert longest(one) == (500, 2500)
    shown = excerpt("a" * 500 + "x" * 2000 + "b" * 500, one)
    assert len(shown) < 500 and shown.startswith("a" * 80 + "⟦x") and shown.endswith("x⟧" + "b" * 80) and " … " in shown
    assert excerpt("abc", check("abc", TrainingText(["zbz"]))) == "a⟦b⟧c"
    assert "⟦⟧" not in excerpt("abc", check("abc", TrainingText(["z"])))


# What is said and saved

def test_json_says_what_was_asked_and_with_what():
    found = saved("first.txt", "--training", "learnt.txt", "--metrics", "originality,zipf")
    assert found["asked"] == {"metrics": ["originality", "zipf"], "whole": False, "training": "learnt.txt"}
    assert found["machine"]["python"] and found["machine"]["versions"]["numpy"] and found["references"] is None
    assert not [path for path in Path().iterdir() if path.name.endswith(".tmp")]


def test_plot():
    from PIL import Image
    assert main(["measure", "first.txt", "second.txt", "--references", "learnt.txt", "--plot", "a.png"]) == 0
    with Image.open("a.png") as many: size = many.size
    assert main(["measure", "first.txt", "--metrics", "bleu,zipf", "--references", "learnt.txt", "--plot", "b.png"]) == 0
    with Image.open("b.png") as few: assert few.height < size[1] and few.width < size[0]


def test_interrupt_keeps_what_was_measured(monkeypatch, capsys):
    def stop(samples, references=None): os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setitem(REGISTRY["metrics"], "stop", stop)
    code, out, err = ask(capsys, "first.txt", "--metrics", "distinct,stop,zipf", "--json", "a.json")
    assert code == 130 and err == "interrupted\n" and "distinct-1" in out and "zipf" not in out
    assert [*json.loads(Path("a.json").read_text())["files"][0]["figures"]] == [f"distinct-{n}" for n in range(1, 5)]


def test_help_has_examples(capsys):
    code, out, err = ask(capsys, "--help")
    assert code == 0 and "textgen measure early.jsonl late.jsonl --references" in out


def test_no_framework_is_loaded_without_a_model():
    program = ("import sys; from textgen.cli import main; code = main(sys.argv[1:]); "
               "print(code, [name for name in ('torch', 'tensorflow', 'transformers', 'keras') if name in sys.modules])")
    words = ["measure", "first.txt", "--references", "second.txt", "--training", "learnt.txt"]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout.splitlines()[-1] == "0 []" and done.stderr == "", done


@pytest.fixture
def model():
    import torch
    from textgen.decoder import Decoder, DecoderConfig
    from textgen.gpt import GPT
    from textgen.tokenizer import CharTokenizer
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train([*FIRST, *SECOND, "\n"])
    GPT(Decoder(DecoderConfig(vocab_size=tokenizer.vocab_size, n_positions=64, n_embd=24, n_head=3, n_layer=1)), tokenizer).save("model")
    return "model"


def test_what_batch_writes_is_measured(model, one_thread, compiled_step):
    write("prompts.txt", [text[:9] for text in FIRST])
    assert main("batch --model model --prompts prompts.txt --output texts.jsonl --max-new-tokens 20 --seed 1 --n 2".split()) == 0
    found = saved("texts.jsonl", "--metrics", "lengths")["files"][0]
    texts = [text for line in Path("texts.jsonl").read_text().splitlines() for text in json.loads(line)["texts"]]
    assert [text for _, text in read_column("texts.jsonl").rows] == texts and len(texts) == 24
    assert found["texts"] == sum(bool(text.strip()) for text in texts)
    assert found["figures"]["characters max"] == max(map(len, texts))


def test_mauve_takes_a_model(model, one_thread, capsys):
    pytest.importorskip("mauve")
    write("first.txt", FIRST * 2)
    write("second.txt", SECOND * 2)
    found = saved("first.txt", "second.txt", "--references", "second.txt", "--model", model, "--metrics", "mauve")
    values = [one["figures"]["mauve"] for one in found["files"]]
    assert 0 < values[0] < 1 and values[1] == pytest.approx(1) and found["asked"]["model"] == model
    code, out, err = ask(capsys, "first.txt", "--references", "second.txt", "--model", "./nobody")
    assert code == 2 and "no model in 'nobody'" in err and err.count("\n") == 1
