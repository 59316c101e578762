"""Make README.md from nbs/index.ipynb, with nothing but the standard library.

    python .ci/readme.py            write README.md
    python .ci/readme.py --check    exit with 1 when README.md is not what would be written

Markdown cells stay as they are, code cells become fenced blocks (`%%bash` and `!` ones are bash), text outputs become
fenced blocks, Markdown outputs stay Markdown. Pictures are left out: a README cannot hold them without files of their own.
Options are kept to as in the docs: hide, export and exporti drop the cell, so does include: false; echo: false drops the code and
output: false what it printed.
"""
import json, posixpath, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEAD = "<!-- Made from nbs/index.ipynb by .ci/readme.py: edit the notebook, then run it. -->"


def text(lines):
    "A notebook stores text as one string or as a list of lines."
    return lines if isinstance(lines, str) else "".join(lines)


def options(source):
    "The `#|` lines of a cell as {name: value}, and the source without them."
    found, rest = {}, []
    for line in source.splitlines():
        match = re.match(r"\s*#\s*\|\s*([\w-]+):?\s*(.*)", line)
        if match: found[match[1]] = match[2].strip().lower()
        else: rest.append(line)
    return found, "\n".join(rest).strip("\n")


def relink(markdown):
    "Links relative to nbs/ become relative to the root, except inside code fences."
    def target(match):
        if re.match(r"[a-z]+:|#|/", match[2]): return match[0]
        return match[1] + posixpath.normpath(posixpath.join("nbs", match[2])) + match[3]
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.M | re.S)
    return "".join(part if part.startswith("```") else re.sub(r"(\]\()([^)\s]+)([^)]*\))", target, part) for part in parts)


def fence(language, body):
    "A fenced block whose fence is longer than any in the body."
    ticks = "`" * max([3] + [len(run) + 1 for run in re.findall(r"^`{3,}", body, flags=re.M)])
    return f"{ticks}{language}\n{body}\n{ticks}"


def output(data):
    "One output of a cell as Markdown, or '' when it has no text."
    if data["output_type"] == "stream": return fence("", text(data["text"]).strip("\n"))
    if data["output_type"] == "error": raise SystemExit("nbs/index.ipynb holds an error: run it again")
    bundle = data.get("data", {})
    if "text/markdown" in bundle: return relink(text(bundle["text/markdown"]).strip("\n"))
    if any(kind.startswith("image/") for kind in bundle): return ""
    return fence("", text(bundle["text/plain"]).strip("\n")) if "text/plain" in bundle else ""


def parts(notebook):
    "The README's parts in order: (kind, Markdown) with kind one of prose, code, output."
    for cell in notebook["cells"]:
        opts, source = options(text(cell["source"]))
        if cell["cell_type"] == "markdown" and text(cell["source"]).strip(): yield "prose", relink(text(cell["source"]).strip("\n"))
        if cell["cell_type"] != "code" or opts.keys() & {"hide", "export", "exporti"} or opts.get("include") == "false" or not source.strip(): continue
        if opts.get("echo") != "false":
            shell = source.startswith(("%%bash", "%%sh", "!"))
            body = re.sub(r"^(%%(bash|sh)[^\n]*\n|!)", "", source, flags=re.M)
            yield "code", fence("bash" if shell else "python", body)
        if opts.get("output") != "false":
            yield from (("output", made) for made in map(output, cell.get("outputs", [])) if made)


def readme(root=ROOT):
    "README.md as the index notebook of the project at `root` says it."
    notebook = json.loads((root/"nbs/index.ipynb").read_text(encoding="utf-8"))
    return "\n\n".join([HEAD, *(markdown for _, markdown in parts(notebook))]) + "\n"


def main(check):
    path = ROOT/"README.md"
    if not check: path.write_text(readme(), encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != readme():
        raise SystemExit("README.md is not what nbs/index.ipynb says: run python .ci/readme.py")


if __name__ == "__main__": main("--check" in sys.argv[1:])
