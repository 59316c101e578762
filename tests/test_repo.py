"""The rules of the repository, each as a function from a project's root to a list of complaints, and each shown to fail.

`test_rule` runs every rule on this project. `test_planted` runs each on a small project that keeps them all, which must pass,
and then on the same project with one thing broken, which must not.

Figures in the README. A number with a unit (one of UNITS) in README.md, other than in a block of code to type, must stand in a
file of nbs/results/*.json that one of the project's own commands wrote. The JSON's keys end in the unit, whatever they hang
under: {"demo": {"model nats/char": 1.2345, "time s": 118.2}} allows "1.23 nats/char", "1.2 nats/char" and "118 s". A quoted
number must be the stored one rounded to the digits quoted.

Figures in the chapters. A number with a measured unit (one of MEASURED) in the prose of a notebook must stand in such a file as
well, or, digit by digit, in what the same notebook printed. Sizes that are not measured but given (gigabytes of a model, pages of
4 kB) have units that are not in the list, and shares that are given are words: nine tenths.
"""
import ast, builtins, importlib.util, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
UNITS = ["nats/char", "nats/token", "bits/char", "bits/byte", "tokens/s", "characters/s", "%", "MB", "GB", "ms", "s", "minutes", "×"]
MEASURED = [unit for unit in UNITS if unit != "GB"] + ["GB/s", "GFLOP/s", "TFLOP/s", "µs", "ns", "seconds", "hours"]
# These import no framework at module level.
LIGHT = {"core", "generator", "model_files", "lstm", "loop", "rnn", "recurrence", "rnn_trainer", "ways", "tokenizer", "tokenizer_io", "corpus", "files", "cleaning", "folders", "sources", "encoding", "data", "rows",
         "constrained", "evaluate", "quality", "originality", "recipe", "fitting", "resume", "runs", "cli", "data_commands", "export", "peers", "rounds", "workloads",
         "benchmark", "training", "jobs", "batch", "lstm_benchmark", "testing", "evaluation", "harness", "receipts", "replay", "measurement", "figures", "data_benchmark", "all_benchmarks"}
NUMBER = r"\d\d[a-z]?_"  # of a chapter
FOR_ALL = set(sys.stdlib_module_names) | {"numpy", "pydantic", "yaml"}
EXTRA = {name: {"torch", "safetensors"} for name in [
    "attention", "rotary", "surprise", "decoder", "llama", "weights", "checkpoint", "gguf", "sampling", "penalties", "choosing", "slots", "kernels",
    "native", "scoring", "seats", "graphs", "int8", "engine", "speculative",
    "gpt", "train", "muon", "trainer", "processes", "lora", "baseline",
    "hf", "masked"]}
EXTRA |= {"resume": {"safetensors"}}
EXTRA |= {name: {"typer"} for name in ["cli", "data_commands", "export", "benchmark", "training", "batch", "lstm_benchmark", "evaluation", "harness", "replay", "measurement", "figures", "data_benchmark", "all_benchmarks"]}
AT_MOST = dict(cell_lines=30, function_lines=25, exported_lines=400, cells=90, words=100, line_width=120)
IN_USE, NEAR = 0.9, 3  # this share of the exported definitions is used within so many cells


# Reading a project

def readme_maker(root):
    "The module .ci/readme.py; the planted projects use the real one."
    path = root/".ci/readme.py" if (root/".ci/readme.py").exists() else ROOT/".ci/readme.py"
    spec = importlib.util.spec_from_file_location("readme", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebooks(root):
    "Every notebook under nbs/ that nbdev looks at, in order."
    return sorted(path for path in (root/"nbs").rglob("*.ipynb") if not re.search(r"/[_.]", path.relative_to(root).as_posix()))


def chapters(root):
    "{module name: notebook} of the numbered notebooks, in reading order: 02_corpus, 02a_files, 03_data."
    return {re.sub(NUMBER, "", path.stem): path for path in notebooks(root) if re.match(NUMBER, path.name) and path.parent.name == "nbs"}


class Cell:
    "A cell: its kind, its `#|` options, its source without them, its outputs, and where it stands."
    def __init__(self, path, index, raw):
        source = raw["source"] if isinstance(raw["source"], str) else "".join(raw["source"])
        self.kind, self.outputs, self.where = raw["cell_type"], raw.get("outputs", []), f"{path.name} cell {index}"
        found = re.findall(r"^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)$", source, flags=re.M) if self.kind == "code" else []
        self.options = dict(found)
        self.source = source if self.kind != "code" else re.sub(r"^\s*#\s*\|.*\n?", "", source, flags=re.M)
        self.exported = bool(self.options.keys() & {"export", "exports", "exporti"})
        self.visible = self.kind == "code" and not self.options.keys() & {"hide", "export", "exporti"}

    def tree(self):
        "The cell as a syntax tree; lines for the shell and magics are left out."
        lines = [line for line in self.source.splitlines() if not re.match(r"\s*[%!]", line)]
        try: return ast.parse("\n".join(lines))
        except SyntaxError: return ast.parse("")


def cells(path): return [Cell(path, i, raw) for i, raw in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"])]


def joined(text): return text if isinstance(text, str) else "".join(text)


def run_in_copy(root, command, tmp):
    "Run one of nbdev's commands in a copy of what it reads, so that nothing here changes."
    copy = Path(tmp)/command
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    shutil.copy(root/"settings.ini", copy)
    shutil.copytree(root/"nbs", copy/"nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints", ".*"))
    env = {key: value for key, value in os.environ.items() if key != "IN_TEST"}
    code = f"from nbdev.{'doclinks' if command == 'nbdev_export' else 'clean'} import {command}; {command}()"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy


# The rules

def package_is_exported(root, tmp):
    "textgen/*.py is what nbdev_export makes of the notebooks, byte for byte; so no module is without a notebook."
    fresh = run_in_copy(root, "nbdev_export", tmp)/"textgen"
    here = {path.relative_to(root/"textgen") for path in (root/"textgen").rglob("*.py")}
    made = {path.relative_to(fresh) for path in fresh.rglob("*.py")}
    yield from (f"textgen/{name}: no notebook exports it" for name in sorted(here - made))
    yield from (f"textgen/{name}: exported by a notebook but missing; run nbdev_export" for name in sorted(made - here))
    yield from (f"textgen/{name}: differs from its notebook; run nbdev_export, or nbdev_update if you edited the module"
                for name in sorted(here & made) if (root/"textgen"/name).read_bytes() != (fresh/name).read_bytes())


def notebooks_are_clean(root, tmp):
    "nbdev_clean would change nothing."
    copy = run_in_copy(root, "nbdev_clean", tmp)
    for path in notebooks(root):
        name = path.relative_to(root)
        if path.read_bytes() != (copy/name).read_bytes(): yield f"{name}: not clean; run nbdev_clean"


def modules_are_named_after_chapters(root, tmp):
    "The notebook's name less its number is its module; every module has a chapter; the rest of textgen/ is recipes."
    for module, path in chapters(root).items():
        named = [cell.options["default_exp"] for cell in cells(path) if "default_exp" in cell.options]
        if named != [module]: yield f"{path.name}: default_exp is {named}, not {module}"
    for path in sorted((root/"textgen").rglob("*")):
        name = path.relative_to(root/"textgen").as_posix()
        if path.is_dir() or "__pycache__" in name or re.fullmatch(r"__init__\.py|_modidx\.py|recipes/[\w-]+\.yaml", name): continue
        if name.removesuffix(".py") not in chapters(root): yield f"textgen/{name}: no chapter of that name"


def imported(tree, everywhere=True):
    "The dotted names that a module imports: anywhere in it, or only when it is itself imported."
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop(0)
        if not everywhere and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)): continue
        if not everywhere and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test): continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import): yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["textgen" if node.level else "", node.module]))
            yield from ([f"{base}.{alias.name}" for alias in node.names] if base == "textgen" else [base])
        called = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
        if called in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


def chapters_import_upward(root, tmp):
    "A chapter imports only chapters before it, in its module (functions included) and in its notebook."
    order = {module: place for place, module in enumerate(chapters(root))}
    for module, path in chapters(root).items():
        sources = [(f"textgen/{module}.py", ast.parse(file.read_text(encoding="utf-8")), False)
                   for file in [root/f"textgen/{module}.py"] if file.exists()]
        sources += [(cell.where, cell.tree(), True) for cell in cells(path) if cell.kind == "code"]
        for where, tree, itself in sources:
            for name in imported(tree):
                other = name.split(".")[1] if name.startswith("textgen.") else None
                if other in order and not (order[other] < order[module] or itself and other == module):
                    yield f"{where}: imports textgen.{other}, which is not a chapter before {module}"


def module_level_imports(root, tmp):
    "At module level each module imports what the design's table allows; the rest goes inside the function that needs it."
    for path in sorted((root/"textgen").glob("*.py")):
        module, tree = path.stem, ast.parse(path.read_text(encoding="utf-8"))
        for name in imported(tree, everywhere=False):
            top, _, rest = name.partition(".")
            if top == "textgen":
                heavy = rest.split(".")[0] in EXTRA.keys() - LIGHT
                if heavy and "torch" not in EXTRA.get(module, ()): yield f"textgen/{path.name}: imports {name}, which loads torch"
            elif top not in FOR_ALL | EXTRA.get(module, set()): yield f"textgen/{path.name}: imports {top} at module level"


def definitions(tree): return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def budgets(root, tmp):
    "Cells, functions and chapters stay small enough to read."
    for path in notebooks(root):
        every = cells(path)
        exported = {cell.where: cell.source.strip("\n").splitlines() for cell in every if cell.exported}
        for where, lines in exported.items():
            if len(lines) > AT_MOST["cell_lines"]: yield f"{where}: {len(lines)} exported lines in one cell"
        total = sum(map(len, exported.values()))
        if total > AT_MOST["exported_lines"]: yield f"{path.name}: {total} exported lines"
        if len(every) > AT_MOST["cells"]: yield f"{path.name}: {len(every)} cells"
        for cell in every:
            if cell.kind == "markdown" and (words := prose_words(cell.source)) > AT_MOST["words"]: yield f"{cell.where}: {words} words"
            if cell.kind != "code" or "hide" in cell.options: continue
            for line in cell.source.splitlines():
                if len(line) > AT_MOST["line_width"]: yield f"{cell.where}: a line of {len(line)} characters"
            if not cell.exported: continue
            for node in definitions(cell.tree()):
                lines = node.end_lineno - node.lineno + 1
                if lines > AT_MOST["function_lines"]: yield f"{cell.where}: {node.name} has {lines} lines"


def prose_words(markdown):
    "Words of a Markdown cell, without its fenced blocks, display equations, tables and link addresses."
    for pattern in [r"^```.*?^```", r"\$\$.*?\$\$", r"^\s*\|.*$", r"(?<=\])\([^)]*\)"]:
        markdown = re.sub(pattern, " ", markdown, flags=re.M | re.S if "```" in pattern or "$$" in pattern else re.M)
    return len(re.findall(r"\S*\w\S*", markdown))


def unused(root):
    "Every public function and class a chapter exports, and where those stand that no visible cell near them uses."
    public, missing = 0, []
    for path in chapters(root).values():
        every = cells(path)
        for i, cell in enumerate(every):
            if not cell.exported: continue
            near = [other for other in every[i + 1:] if other.kind == "code"][:NEAR]
            used = {getattr(node, "id", getattr(node, "attr", None)) for other in near if other.visible for node in ast.walk(other.tree())}
            names = [node.name for node in cell.tree().body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
            public += sum(not name.startswith("_") for name in names)
            missing += [f"{cell.where}: {name}" for name in names if not name.startswith("_") and name not in used]
    return public, missing


def definitions_are_shown_in_use(root, tmp):
    "Nine of ten exported definitions are used in a visible code cell right after their own."
    public, missing = unused(root)
    if len(missing) > (1 - IN_USE) * public: yield f"{len(missing)} of {public} definitions are not shown in use: " + "; ".join(missing)


def bound(tree):
    "Every name that code binds anywhere: by assignment, import, definition, parameter."
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load): yield node.id
        elif isinstance(node, ast.alias): yield (node.asname or node.name).split(".")[0]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): yield node.name
        elif isinstance(node, ast.arg): yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name: yield node.name


def import_cells_stand_alone(root, tmp):
    "The docs build runs exported cells and cells with an import, wherever it stands, and no others: those must run by themselves."
    for path in chapters(root).values():
        known = set(dir(builtins)) | {"__name__", "__file__", "display", "get_ipython"}
        for cell in cells(path):
            tree = cell.tree() if cell.kind == "code" else ast.parse("")
            runs = cell.exported or any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.walk(tree))
            if not runs or "nbdev_export" in cell.source or cell.options.get("eval") == "false": continue
            known |= set(bound(tree))
            used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
            if "import *" in cell.source: break   # what a star brings is not known
            if cell.exported: continue
            if missing := sorted(used - known):
                yield f"{cell.where}: imports, so the docs build runs it, without {', '.join(missing)}; move the import to a cell of its own"


def chapters_begin_with_their_name(root, tmp):
    "`# Name`, then `> one sentence`: the module's docstring and the page's title."
    for path in chapters(root).values():
        first = cells(path)[:1]
        if not (first and re.match(r"# \S.*\n+> \S", first[0].source)): yield f"{path.name}: does not begin with '# Name' and '> sentence'"


def light_imports(root, tmp):
    "Importing textgen, or a module that needs no framework, loads none."
    heavy = ["torch", "tensorflow", "keras", "transformers", "datasets", "matplotlib", "tokenizers", "pandas"]
    names = ["textgen", *(f"textgen.{name}" for name in sorted(LIGHT) if (root/f"textgen/{name}.py").exists())]

    def complaint(*names):
        code = f"import sys, {', '.join(names)}; print(*(name for name in {heavy} if name in sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
        if done.returncode: return f"import {names[-1]}: {done.stderr.strip().splitlines()[-1]}"
        if done.stdout.strip(): return f"import {names[-1]} loads {done.stdout.strip()}"

    if together := complaint(*names): yield from [*filter(None, map(complaint, names))] or [together]   # which one is it?


def readme_is_fresh(root, tmp):
    "README.md is what .ci/readme.py makes of the index notebook."
    if not (root/"nbs/index.ipynb").exists(): return
    path = root/"README.md"
    if not path.exists(): yield "README.md: missing; run python .ci/readme.py"
    elif path.read_text(encoding="utf-8") != readme_maker(root).readme(root): yield "README.md: stale; run python .ci/readme.py"


def leaves(tree, key=""):
    "(key, number) of every number in a JSON tree."
    if isinstance(tree, dict):
        for name, value in tree.items(): yield from leaves(value, name)
    elif isinstance(tree, list):
        for value in tree: yield from leaves(value, key)
    elif isinstance(tree, (int, float)) and not isinstance(tree, bool): yield key, tree


def stored_figures(root):
    "(unit, number) of every figure in the results files."
    files = sorted((root/"nbs/results").glob("*.json"))
    return [(re.split(r"\s", key)[-1], value) for path in files for key, value in leaves(json.loads(path.read_text(encoding="utf-8")))]


def quoted_figures(text, units):
    "(number as it stands there, unit) of every figure in a text."
    return re.findall(rf"(?<![\w.])(\d[\d,]*(?:\.\d+)?)[ \u00a0]?({'|'.join(units)})(?![\w/'’]| \d)", text)


def is_stored(quoted, unit, stored):
    "Whether a figure is one of the stored ones, rounded to its digits."
    digits = len(quoted.partition(".")[2])
    return any(of == unit and f"{value:.{digits}f}" == quoted.replace(",", "") for of, value in stored)


def readme_figures_are_measured(root, tmp):
    "Each number with a unit in the README stands in a results file (the convention is at the top of this file)."
    if not (root/"nbs/index.ipynb").exists(): return
    stored, notebook = stored_figures(root), json.loads((root/"nbs/index.ipynb").read_text(encoding="utf-8"))
    for kind, text in readme_maker(root).parts(notebook):
        if kind == "code": continue
        for quoted, unit in quoted_figures(text, UNITS):
            if not is_stored(quoted, unit, stored): yield f"README.md: {quoted} {unit} is in no file of nbs/results/"


def printed(path):
    "All text that a notebook's cells have put out."
    every = [output for cell in cells(path) for output in cell.outputs]
    return "\n".join(joined(output.get("text", "")) + "".join(joined(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/"))
                     for output in every)


def prose_figures_are_measured(root, tmp):
    "Each number with a measured unit in a notebook's prose stands in a results file, or in an output of the same notebook."
    stored = stored_figures(root)
    for path in notebooks(root):
        text = printed(path)
        for cell, prose in prose_of(path):
            for quoted, unit in quoted_figures(prose, MEASURED):
                if not is_stored(quoted, unit, stored) and not re.search(rf"(?<![\d.,]){re.escape(quoted)}(?!\d|[.,]\d)", text):
                    yield f"{cell.where}: {quoted} {unit} is in no file of nbs/results/ and in no output of the notebook"


def version_is_the_same_everywhere(root, tmp):
    "textgen.__version__ is settings.ini's."
    version = settings(root)["version"]
    source = (root/"textgen/__init__.py").read_text(encoding="utf-8") if (root/"textgen/__init__.py").exists() else ""
    if (found := re.search(r'^__version__ = "(.*)"', source, flags=re.M)) and found[1] != version:
        yield f"textgen/__init__.py: version {found[1]}, settings.ini: {version}"


def outputs_are_sound(root, tmp):
    "What the notebooks printed holds no error, no progress bar and no path of the machine it ran on; pictures have a text."
    paths = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|work|var|private|opt|mnt|usr)/\w|\b[A-Z]:\\\w")
    for path in notebooks(root):
        for cell in cells(path):
            for output in cell.outputs:
                data = output.get("data", {})
                text = joined(output.get("text", "")) + "".join(joined(value) for kind, value in data.items() if kind.startswith("text/"))
                if output["output_type"] == "error" or "Traceback (most recent call last)" in text: yield f"{cell.where}: holds an error"
                if found := paths.search(text): yield f"{cell.where}: shows the path {text[found.start():][:40]!r}"
                if re.search(r"\d%\|.*\||\d(it|tokens)/s\]", text): yield f"{cell.where}: holds a progress bar"
                if any(kind.startswith("image/") for kind in data) and not cell.options.get("fig-alt", "").strip("\"' "):
                    yield f"{cell.where}: a picture without fig-alt"


def prose_of(path): return [(cell, re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S)) for cell in cells(path) if cell.kind == "markdown"]


def anchors(path):
    "What a link into a notebook may name: its headings as pandoc spells them, and the labels of its cells."
    headings = [heading for _, prose in prose_of(path) for heading in re.findall(r"^#+ +(.+)$", prose, flags=re.M)]
    words = ["-".join(re.sub(r"[^\w\s.-]", "", heading.lower()).split()) for heading in headings]
    return {re.sub(r"^[\W\d_]+", "", word) for word in words} | {cell.options.get("label") for cell in cells(path)}


def links_lead_somewhere(root, tmp):
    "A link that stays in the project names a file that is there and a heading in it; a backtick in a link's text would break the page."
    for path in notebooks(root):
        for cell, prose in prose_of(path):
            for text, target in re.findall(r"\[([^][]*)\]\(([^)\s]+)\)", prose):
                if "`" in text: yield f"{cell.where}: a backtick in the text of the link [{text}]"
                if re.match(r"[a-z]+:", target): continue  # to elsewhere
                name, _, anchor = target.partition("#")
                page = path.parent/name if name else path
                if not page.is_file(): yield f"{cell.where}: no file {name}"
                elif anchor and anchor not in anchors(page): yield f"{cell.where}: no heading #{anchor} in {page.name}"


def every_notebook_is_on_the_map(root, tmp):
    "The site's sidebar has every notebook, chapters in reading order; the index links to every chapter."
    import yaml
    sidebar = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    listed = [entry["href"] for part in sidebar for entry in part.get("contents", [part])]
    there = {path.relative_to(root/"nbs").as_posix() for path in notebooks(root)}
    yield from (f"_quarto.yml: {name} is not in the sidebar" for name in sorted(there - {*listed}))
    yield from (f"_quarto.yml: there is no {name}" for name in listed if name not in there)
    numbered = [name for name in listed if re.match(NUMBER, name)]
    yield from (f"_quarto.yml: {name} stands after {before}" for before, name in zip(numbered, numbered[1:]) if name < before)
    index = "".join(prose for _, prose in prose_of(root/"nbs/index.ipynb")) if (root/"nbs/index.ipynb").exists() else ""
    yield from (f"index.ipynb: no link to {path.name}" for path in chapters(root).values() if f"({path.name})" not in index)


def settings(root):
    parser = ConfigParser(delimiters=["="], interpolation=None)
    parser.read(root/"settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def pins_cover_the_requirements(root, tmp):
    "constraints.txt has one exact version, within settings.ini's range, of all that any extra asks for, on each Python."
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    lines = (root/"constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    asked = [Requirement(word) for key, value in settings(root).items() if key.endswith("requirements") for word in value.split()]
    for python in ["3.10.0", "3.11.9", "3.12.0", "3.13.0", "3.14.0"]:
        env = {"python_version": python.rpartition(".")[0], "python_full_version": python}
        holds = lambda requirement: requirement.marker is None or requirement.marker.evaluate(env)
        pinned = {}
        for pin in filter(holds, pins):
            if canonicalize_name(pin.name) in pinned: yield f"constraints.txt: {pin.name} twice on Python {python}"
            pinned[canonicalize_name(pin.name)] = pin.specifier
        for want in filter(holds, asked):
            exact = [one.version for one in pinned.get(canonicalize_name(want.name), []) if one.operator == "=="]
            if not exact or exact[0] not in want.specifier: yield f"constraints.txt: no exact pin within {want} on Python {python}"


RULES = [package_is_exported, notebooks_are_clean, modules_are_named_after_chapters, chapters_import_upward, module_level_imports,
         budgets, definitions_are_shown_in_use, import_cells_stand_alone, chapters_begin_with_their_name, light_imports, readme_is_fresh,
         readme_figures_are_measured, prose_figures_are_measured, version_is_the_same_everywhere, outputs_are_sound, links_lead_somewhere,
         every_notebook_is_on_the_map, pins_cover_the_requirements]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule, tmp_path):
    if complaints := list(rule(ROOT, tmp_path)): pytest.fail("\n  ".join([rule.__doc__, *complaints]), pytrace=False)


# Each rule shown to fail: a small project that keeps them all, and what breaks it.

SMALL = {
    "00_core": ["# Core\n\n> The first chapter", "#| default_exp core", "#| export\nimport math",
                '#| exports\ndef area(r: float) -> float:\n    "Of a circle."\n    return math.pi * r**2', "area(1)"],
    "01_attention": ["# Attention\n\n> The second chapter", "#| default_exp attention", "#| export\nfrom textgen.core import area",
                     '#| exports\ndef twice(r: float) -> float:\n    "Two circles."\n    return 2 * area(r)', "twice(1)"],
    "index": ["# Small\n\n> A project\n\nIt reaches 1.23 nats/char in 118 s; see [core](00_core.ipynb)\n"
              "and [attention](01_attention.ipynb).", "#| default_exp __init__",
              '#| export\n__version__ = "0.1.0"', "print('hello')"],
}


def write_notebook(root, name, sources, outputs={}):
    "A notebook of these cells (Markdown where it begins with '# ' or a plain word); outputs by cell index."
    made = []
    for i, source in enumerate(sources):
        code = not re.match(r"# \w|[A-Z]\w* \w", source)
        made.append({"cell_type": "code" if code else "markdown", "id": f"{i:08x}", "metadata": {}, "source": source.splitlines(True),
                     **({"execution_count": None, "outputs": outputs.get(i, [])} if code else {})})
    notebook = {"cells": made, "metadata": {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}},
                "nbformat": 4, "nbformat_minor": 5}
    (root/f"nbs/{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")


def build(root):
    "Export, clean, and write the README."
    for command in ["nbdev_export", "nbdev_clean"]:
        copy = run_in_copy(root, command, root.parent)
        for part in ["textgen", "nbs"]:
            if (copy/part).exists(): shutil.copytree(copy/part, root/part, dirs_exist_ok=True)
    (root/"README.md").write_text(readme_maker(root).readme(root), encoding="utf-8")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("planted")/"small"
    (root/"nbs/results").mkdir(parents=True)
    for name in ["settings.ini", "constraints.txt"]: shutil.copy(ROOT/name, root)
    (root/"_quarto.yml").write_text("website: {sidebar: {contents: [{href: index.ipynb}, {section: I, contents: "
                                    "[{href: 00_core.ipynb}, {href: 01_attention.ipynb}]}]}}")
    (root/"nbs/results/demo.json").write_text('{"demo": {"val nats/char": 1.2345, "time s": 118.2}}')
    for name, sources in SMALL.items(): write_notebook(root, name, sources)
    (root/"settings.ini").write_text(re.sub(r"(?m)^version = .*", "version = 0.1.0", (root/"settings.ini").read_text()))
    build(root)
    return root


def again(name, *sources, outputs={}, at=None):
    "A plant that writes a notebook again with cells added (before cell `at`, or at the end), and exports it."
    def plant(root):
        old = SMALL.get(name, [])
        cut = len(old) if at is None else at
        write_notebook(root, name, [*old[:cut], *sources, *old[cut:]], outputs)
        build(root)
    return plant


def edit(path, old, new):
    "A plant that changes a file by hand; an empty `old` adds to its end."
    def plant(root):
        file = root/path
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        assert old in text
        file.write_text(text.replace(old, new) if old else text + new, encoding="utf-8")
    return plant


def stream(text): return {5: [{"output_type": "stream", "name": "stdout", "text": [text]}]}


PICTURE = {5: [{"output_type": "display_data", "data": {"image/png": "aGk="}, "metadata": {}}]}
ERROR = {5: [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]}
LONG = "#| exports\ndef long(x):\n" + "    x += 1\n" * 24 + "    return x"
PLANTS = [
    (package_is_exported, edit("textgen/core.py", "math.pi", "3.14")),
    (package_is_exported, edit("textgen/orphan.py", "", "x = 1\n")),
    (package_is_exported, edit("textgen/__init__.py", "", "x = 1\n")),
    (package_is_exported, lambda root: (root/"textgen/attention.py").unlink()),
    (notebooks_are_clean, edit("nbs/00_core.ipynb", '"execution_count": null', '"execution_count": 3')),
    (modules_are_named_after_chapters, edit("textgen/orphan.py", "", "x = 1\n")),
    (modules_are_named_after_chapters, edit("textgen/recipes.txt", "", "x = 1\n")),
    (modules_are_named_after_chapters, edit("nbs/00_core.ipynb", "default_exp core", "default_exp heart")),
    (chapters_import_upward, again("00_core", "#| export\ndef later():\n    from textgen.attention import twice\n    return twice")),
    (chapters_import_upward, again("00_core", "#| export\ndef later():\n    from textgen import attention\n    return attention")),
    (chapters_import_upward, again("00_core", "#| export\ndef later():\n    import importlib\n"
                                              "    return importlib.import_module('textgen.attention')")),
    (chapters_import_upward, again("00_core", "from textgen.attention import twice")),
    (module_level_imports, again("00_core", "#| export\nimport torch")),
    (module_level_imports, again("00_core", "#| export\ntry:\n    import torch\nexcept ImportError:\n    torch = None")),
    (module_level_imports, again("00_core", "#| export\nfrom textgen.attention import twice")),
    (module_level_imports, again("01_attention", "#| export\nfrom transformers import GPT2Config")),
    (budgets, again("00_core", "#| export\n" + "x = 1\n" * 31)),
    (budgets, again("00_core", LONG)),
    (budgets, again("00_core", *["#| export\n" + "x = 1\n" * 20] * 21)),
    (budgets, again("00_core", *["x = 1"] * 90)),
    (budgets, again("00_core", "Many words " * 51)),
    (budgets, again("00_core", f"x = '{'y' * 120}'")),
    (definitions_are_shown_in_use, again("00_core", "#| exports\ndef alone(): pass", "1", "2", "3", "alone()")),
    (definitions_are_shown_in_use, again("00_core", "#| exports\ndef alone(): pass", "#| hide\nalone()")),
    (import_cells_stand_alone, again("00_core", "radius = 1", "#| hide\nimport random\nassert area(radius) > 0")),
    (import_cells_stand_alone, again("00_core", "radius = 1", "def later():\n    import random\n    return radius")),
    (chapters_begin_with_their_name, edit("nbs/00_core.ipynb", "> The first", "The first")),
    (light_imports, again("00_core", "#| export\nimport matplotlib")),
    (light_imports, again("00_core", "#| export\nimport no_such_module")),
    (readme_is_fresh, edit("README.md", "reaches", "gets to")),
    (readme_is_fresh, lambda root: (root/"README.md").unlink()),
    (readme_figures_are_measured, edit("nbs/index.ipynb", "1.23 nats", "1.24 nats")),
    (readme_figures_are_measured, edit("nbs/index.ipynb", "118 s", "118.3 s")),
    (readme_figures_are_measured, edit("nbs/index.ipynb", "118 s", "118 minutes")),
    (readme_figures_are_measured, edit("nbs/results/demo.json", "1.2345", "1.3")),
    (prose_figures_are_measured, again("00_core", "Reading it takes 118.3 s here.")),
    (prose_figures_are_measured, again("00_core", "Memory gives 12.5 GB/s here.", "area(0)", outputs={6: stream("12.53 GB/s, 112.5")[5]})),
    (prose_figures_are_measured, again("00_core", "It reaches 1.23 nats/char there.\nThat is 3 % more.")),
    (version_is_the_same_everywhere, edit("settings.ini", "version = 0.1.0", "version = 0.2.0")),
    (outputs_are_sound, again("00_core", "area(0)", outputs=ERROR)),
    (outputs_are_sound, again("00_core", "area(0)", outputs=stream("wrote /home/me/runs/demo"))),
    (outputs_are_sound, again("00_core", "area(0)", outputs=stream(" 50%|#####     | 5/10 [00:01<00:01, 4.9it/s]"))),
    (outputs_are_sound, again("00_core", "area(0)", outputs=PICTURE)),
    (links_lead_somewhere, again("00_core", "More follows in [the last chapter](09_last.ipynb).")),
    (links_lead_somewhere, again("00_core", "More follows in [the next one](01_attention.ipynb#the-third-chapter).")),
    (links_lead_somewhere, again("00_core", "It stands\n[further down](#nowhere).")),
    (links_lead_somewhere, again("00_core", "It uses [`twice`](01_attention.ipynb) there.")),
    (every_notebook_is_on_the_map, again("02_more", "# More\n\n> A third", "#| default_exp more")),
    (every_notebook_is_on_the_map, edit("_quarto.yml", "{href: 00_core.ipynb}, ", "")),
    (every_notebook_is_on_the_map, edit("_quarto.yml", "[{href: 00_core.ipynb}, {href: 01_attention.ipynb}]", "[{href: 01_attention.ipynb}, {href: 00_core.ipynb}]")),
    (every_notebook_is_on_the_map, edit("_quarto.yml", "{href: 00_core.ipynb}", "{href: 00_core.ipynb}, {href: 00a_gone.ipynb}")),
    (every_notebook_is_on_the_map, edit("nbs/index.ipynb", "01_attention.ipynb", "00_core.ipynb")),
    (pins_cover_the_requirements, edit("constraints.txt", "torch==2.13.0\n", "")),
    (pins_cover_the_requirements, edit("constraints.txt", "torch==2.13.0\n", "torch>=2.13\n")),
    (pins_cover_the_requirements, edit("settings.ini", "torch>=2.13,<3", "torch>=2.14,<3")),
    (pins_cover_the_requirements, edit("constraints.txt", "", "torch==2.12.0\n")),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_planted_nothing(rule, small, tmp_path):
    assert list(rule(small, tmp_path)) == []


@pytest.mark.parametrize("rule, plant", PLANTS, ids=lambda part: getattr(part, "__name__", ""))
def test_planted(rule, plant, small, tmp_path):
    root = tmp_path/"small"
    shutil.copytree(small, root)
    plant(root)
    assert list(rule(root, tmp_path))


def test_every_rule_is_planted(): assert {rule for rule, _ in PLANTS} == set(RULES)


def test_figure_alt_and_figures_pass(small, tmp_path):
    "What the rules must let through: a described picture, a rounded figure, a path within a web address, links to headings and labels."
    root = tmp_path/"small"
    shutil.copytree(small, root)
    write_notebook(root, "00_core", [*SMALL["00_core"], "#| fig-alt: a circle\narea(0)"], PICTURE)
    write_notebook(root, "01_attention", [*SMALL["01_attention"], "area(0)"], stream("see https://example.org/home/me, 10% | 3/4"))
    edit("nbs/index.ipynb", "1.23 nats/char in 118 s", "1.2 nats/char in 118 s; GPT-2's 3 × 4")(root)
    write_notebook(root, "02_more", ["# More\n\n> The third chapter\n\n## 2. What *is* it, then?", "#| label: fig-it\n1",
                                     "Compare with [the question](#what-is-it-then), [it](#fig-it), [two](01_attention.ipynb#attention) and [all](https://a.org/`b`)."])
    write_notebook(root, "03_last", ["# Last\n\n> The fourth chapter\n\nIt took 118 s, of which 3.1% were lost at 12.5 GB/s; a model of 28 GB has pages of 4 kB.",
                                     "It prints `20 ms`:\n\n```\n99 ms\n```", "print()"], {2: stream("20 ms, 3.1 % of it, 12.5")[5]})
    rules = [outputs_are_sound, readme_figures_are_measured, prose_figures_are_measured, links_lead_somewhere]
    assert not [complaint for rule in rules for complaint in rule(root, tmp_path)]


@pytest.mark.slow
@pytest.mark.net
def test_wheel_runs_without_nbdev(tmp_path):
    "The wheel, installed in a fresh virtual environment with the pins, answers `textgen --help`; nbdev is not there."
    source = tmp_path/"source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "_docs", "_proc", "runs", "*.egg-info", "raw", "processed"))
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path/"dist", source], check=True)   # the sdist, and the wheel from it
    wheel, = (tmp_path/"dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"venv"], check=True)
    python = tmp_path/"venv/bin/python"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}   # where pip would find textgen installed
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", ROOT/"constraints.txt", wheel], check=True, env=env)
    assert subprocess.run([python, "-c", "import nbdev"], env=env, cwd=tmp_path, capture_output=True).returncode
    done = subprocess.run([tmp_path/"venv/bin/textgen", "--help"], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "train" in done.stdout and "generate" in done.stdout
