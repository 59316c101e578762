"""nbs/train/gpt.ipynb and its twin lstm.ipynb as papermill runs them, and what the run is good for afterwards: here, at the command line, in transformers."""
import json, os, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = {name: ROOT/f"nbs/train/{name}.ipynb" for name in ("gpt", "lstm")}
FABLE = "The fox looked up at the grapes, and the grapes looked down at the fox.\nTh\u00e9 \u201csour\u201d grapes\t\u2026\n" * 40
TINY = {"device": "cpu", "steps": 20, "length": 32, "batch_size": 4, "model.n_layer": 2, "model.n_embd": 32, "evaluate_every": 10,
        "data": "fable.txt", "data_options": {}, "sample.prompts": 1, "sample.settings.max_new_tokens": 20}
RUNS = {"char": ("gpt", "demo", {"tokenizer": "char"}), "bpe": ("gpt", "demo", {"tokenizer": "bpe:300"}),
        "recurrent": ("lstm", "lstm-demo", {"tokenizer": "char", "model.units": 24, "rows": "streams"})}  # notebook, recipe, changes
papermill = pytest.importorskip("papermill", reason="papermill is not installed: pip install 'textgen[dev]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A folder with the runs that papermill made."
    folder, old = tmp_path_factory.mktemp("papermill"), dict(os.environ)
    (folder/"fable.txt").write_text(FABLE, encoding="utf-8")
    os.environ.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))   # of the kernels
    try:
        for name, (notebook, recipe, changes) in RUNS.items():
            papermill.execute_notebook(NOTEBOOKS[notebook], folder/f"{name}.ipynb", cwd=folder, progress_bar=False, log_output=False, parameters={
                "recipe": recipe, "changes": {**TINY, **changes}, "seed": 5, "out": name, "data_dir": "data"})
    finally:
        os.environ.clear()
        os.environ.update(old)
    return folder


@pytest.mark.parametrize("notebook", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_parameters_are_named(notebook):
    "What papermill may replace; it only warns of names that are not among them, so whoever starts it must look here first."
    names = papermill.inspect_notebook(notebook)
    assert set(names) == {"recipe", "changes", "seed", "out", "data_dir"}
    assert {"recipe": "demo", "chnages": {}}.keys() - names.keys() == {"chnages"}


@pytest.mark.parametrize("name", RUNS)
def test_the_run_is_whole(name, runs):
    "Model, tokenizer, record; and in the page the result, the values as given and the curve."
    there = {path.name for path in (runs/name).iterdir()}
    assert there >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                     "config.yaml", "metrics.jsonl", "result.json", "curve.png", "checkpoints",
                     "model.keras" if name == "recurrent" else "model.safetensors"}
    page = json.loads((runs/f"{name}.ipynb").read_text(encoding="utf-8"))
    outputs = [output for cell in page["cells"] for output in cell.get("outputs", [])]
    said = "".join("".join(output.get("text", "")) for output in outputs)
    result = json.loads((runs/name/"result.json").read_text())
    assert f"val {result['nats_per_char']:.4f} nats/char" in said and result["steps"] == 20 and result["seed"] == 5
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert any("| `model.n_embd` | 32 |" in "".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)


@pytest.mark.parametrize("name", RUNS)
def test_python_and_command_line_write_the_same(name, runs):
    import textgen
    text = "The fox" + textgen.load(runs/name).generate("The fox", max_new_tokens=40, temperature=0.8, top_p=0.9, seed=11)[0].text
    command = ["generate", "--model", runs/name, "--prompt", "The fox", "--max-new-tokens", "40", "--temperature", "0.8", "--top-p", "0.9",
               "--seed", "11", "--output", runs/f"{name}.txt"]
    subprocess.run([sys.executable, "-c", "import sys; from textgen.cli import main; sys.exit(main())", *command], check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=runs)
    assert (runs/f"{name}.txt").read_text(encoding="utf-8") == text + "\n" * (not text.endswith("\n"))


@pytest.mark.parametrize("name", ["char", "bpe"])
def test_transformers_opens_it(name, runs):
    "The same ids and texts, the same logits, the same greedy text."
    import torch, textgen
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ours, theirs, tokenizer = textgen.load(runs/name), AutoModelForCausalLM.from_pretrained(runs/name), AutoTokenizer.from_pretrained(runs/name)
    for text in FABLE.splitlines(True)[:2] + ["the  fox\n\nThe", " sour"]:
        ids = ours.tokenizer.encode(text)
        assert tokenizer(text)["input_ids"] == ids and tokenizer.decode(ids) == ours.tokenizer.decode(ids) == text
    ids = torch.tensor([ours.tokenizer.encode(FABLE)[:32]])
    with torch.inference_mode():
        assert torch.allclose(theirs.eval()(ids).logits, ours.decoder.eval()(ids), atol=1e-4)
        written = theirs.generate(ids[:, :8], max_new_tokens=20, do_sample=False, top_p=None, temperature=None)[0, 8:].tolist()
    prompt = ours.tokenizer.decode(ids[0, :8].tolist())
    assert ours.tokenizer.encode(prompt) == ids[0, :8].tolist()
    assert ours.generate(prompt, max_new_tokens=20, temperature=0)[0].token_ids == written
