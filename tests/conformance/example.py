"""The model of the chapter "Add your own model", as its notebook has it: what a reader copies is what is tested here."""
import json, re, types
from pathlib import Path

from textgen.corpus import stories

NOTEBOOK = Path(__file__).resolve().parents[2]/"nbs/11b_testing.ipynb"


def source():
    "Its imports and its class, as a module."
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    model, = [number for number, cell in enumerate(cells) if cell.startswith("class Markov(")]
    imports = next(cell for cell in cells if cell.startswith("import json"))
    train, = [cell for cell in cells if cell.startswith("def train")]
    return "\n\n".join([imports, cells[model], train])


def example():
    "The module, with `Markov` and `train`."
    module = types.ModuleType("example_model")
    exec(compile(source(), "example_model", "exec"), vars(module))
    return module


def sentences():
    "Short lines to learn from, so that texts end by themselves as well."
    return "\n".join(re.split(r"[.!?]\"? ?\n?", "".join(stories(200, seed=1))))
