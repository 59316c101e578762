"""Build the site into _docs without Quarto: nbdev prepares the notebooks in _proc, smalldocs renders them.

In between, _proc is mended where smalldocs differs from Quarto: pages get the names nbdev gives them (00_core.ipynb becomes
core.html), and links to them, absolute ones to the published site too, become relative. A `show_doc` box beside the very source
it was made from is dropped: the source says it all. KaTeX and Mermaid come with npm, once, and are served from the site; where
there is no npm, pages with maths or diagrams load them from the web.
"""
import ast, json, os, re, shutil, subprocess, sys, tarfile
from pathlib import Path, PurePosixPath

try: import smalldocs.layout
except ImportError: sys.exit("the docs need Quarto, or Python 3.11 or newer (for smalldocs): PYTHON=python3.12 make docs in a fresh clone")
import yaml
from nbdev.config import get_config
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

ROOT = Path(__file__).resolve().parent.parent
os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:nbdev.processors"   # the tests say which cells mix imports with work
CDN = {"katex": smalldocs.layout.KATEX, "mermaid": smalldocs.layout.MERMAID}
NPM = {"katex": "katex@0.16.22", "mermaid": "mermaid@11.4.1"}
WANTED = {"katex": r"package/(dist/(katex\.min\.(js|css)|contrib/auto-render\.min\.js|fonts/.*\.woff2)|LICENSE)",
          "mermaid": r"package/(dist/mermaid\.min\.js|LICENSE)"}


def page_name(path):
    "nbdev's name for a notebook's page: lower case, without the number."
    path = PurePosixPath(path)
    return path.with_name(re.sub(r"^\d+[a-z0-9]*_", "", path.name.lower()))


def relink(markdown, folder):
    "Links to notebooks by their file names, and to the published site, become links between the pages."
    config = get_config()
    up = "../" * len(folder.parts)
    markdown = markdown.replace(f'{config.doc_host}{config.doc_baseurl}/', up)
    markdown = re.sub(r"(\.html#\w+)\.\w+\)", r"\1)", markdown)   # a method has no anchor of its own: its class has
    return re.sub(r"(\]\()([\w./-]+\.ipynb)", lambda match: match[1] + str(page_name(match[2])), markdown)


def defined(source):
    try: return {node.name for node in ast.parse(source).body if hasattr(node, "name")}
    except SyntaxError: return set()


def whole(outputs):
    "A cell's outputs, with what it printed in several goes as one."
    last = None
    for output in outputs:
        if output["output_type"] != "stream": last = None
        elif last and last["name"] == output["name"]:
            last["text"] = "".join(last["text"]) + "".join(output["text"])
            continue
        else: last = output
        yield output


def mend(notebook, page):
    "One processed notebook, as smalldocs should read it."
    cells, shown, folder = [], set(), page.parent
    for cell in notebook["cells"]:
        source = cell["source"] = "".join(cell["source"])
        if 'code-summary: "Exported source"' in source:
            shown |= defined(source)
            cell["source"] = source.replace("Exported source", f"textgen/{page.stem}.py")
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code": cell["source"] = relink(cell["source"], folder)
        if "outputs" in cell: cell["outputs"] = list(whole(cell["outputs"]))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "text/markdown" in data: data["text/markdown"] = relink("".join(data["text/markdown"]), folder)
        box = re.search(r"^show_doc\((\w+)\)$", cell["source"], flags=re.M)
        if box and box[1] in shown:   # an anchor stays, for links to the name
            cell = {"cell_type": "markdown", "metadata": {}, "source": f'```{{=html}}\n<a id="{box[1].lower()}"></a>\n```'}
        cells.append(cell)
    return {**notebook, "cells": cells}


def sidebar(entries, root):
    "The sidebar's entries by page name, without those whose notebook is not there."
    for entry in entries:
        if "section" in entry:
            if inner := list(sidebar(entry["contents"], root)): yield {**entry, "contents": inner}
        elif (root/entry["href"]).exists(): yield {**entry, "href": str(page_name(entry["href"]))}


def prepare():
    "Process the notebooks into _proc and mend what came out."
    refresh_quarto_yml()
    root = Path(proc_nbs(force=True))
    config = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))
    config["format"]["html"].pop("grid", None)   # smalldocs takes widths from styles.css
    website = config["website"]
    website["sidebar"]["contents"] = list(sidebar(website["sidebar"]["contents"], root))
    (root/"_quarto.yml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    for path in sorted(root.rglob("*.ipynb")):
        page = page_name(path.relative_to(root))
        notebook = mend(json.loads(path.read_text(encoding="utf-8")), page)
        path.unlink()
        (root/page).write_text(json.dumps(notebook), encoding="utf-8")
    return root


def library(name):
    "The folder of a JavaScript library, fetched by npm into .venv the first time; None where that fails."
    folder = ROOT/".venv/docs"/NPM[name]
    if not folder.exists():
        making = folder.with_name("making")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        try: done = subprocess.run(["npm", "pack", "--silent", NPM[name]], cwd=making, capture_output=True, text=True)
        except OSError: return None
        if done.returncode: return None
        with tarfile.open(making/done.stdout.split()[-1]) as archive:
            for member in archive:
                if not (member.isfile() and re.fullmatch(WANTED[name], member.name)): continue
                target = making/"whole"/member.name.removeprefix("package/").removeprefix("dist/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.extractfile(member).read())
        os.replace(making/"whole", folder)
        shutil.rmtree(making)
    return folder


def serve_locally(site, name):
    "Let the pages that use a library load it from the site itself."
    pages = [path for path in site.rglob("*.html") if CDN[name] in path.read_text(encoding="utf-8")]
    if not pages: return
    folder = library(name)
    if not folder: return print(f"no {NPM[name]} from npm: {len(pages)} pages will load it from the web", file=sys.stderr)
    shutil.copytree(folder, site/"site_libs"/name, dirs_exist_ok=True)
    for path in pages:
        text, here = path.read_text(encoding="utf-8"), "../" * (len(path.relative_to(site).parts) - 1) + f"site_libs/{name}"
        if name == "mermaid":
            text = text.replace(f"import mermaid from '{CDN[name]}';", "")
            script = f'<script src="{here}/mermaid.min.js" defer></script><script type="module">mermaid.initialize('
            text = text.replace('<script type="module">mermaid.initialize(', script, 1)   # it must be there before it is set up
        path.write_text(text.replace(CDN[name], here), encoding="utf-8")


def contents_with_maths(site):
    "The table of contents says a heading's maths as the heading does, not as bare TeX."
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        for name, heading in re.findall(r'<h\d class="anchored" data-anchor-id="([^"]+)">(.*?)</h\d>', text):
            if 'class="math' in heading:
                text = re.sub(rf'(data-scroll-target="#{re.escape(name)}">).*?(</a>)', lambda link: link[1] + heading + link[2], text)
        path.write_text(text, encoding="utf-8")


def main():
    root = prepare()
    made = build(root, quiet=True).out
    contents_with_maths(made)
    for name in NPM: serve_locally(made, name)
    shutil.rmtree(ROOT/"_docs", ignore_errors=True)
    shutil.move(made, ROOT/"_docs")
    print(f"{len(list((ROOT/'_docs').rglob('*.html')))} pages: open _docs/index.html")


if __name__ == "__main__": main()
