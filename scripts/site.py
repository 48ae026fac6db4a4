"""A hook of `mkdocs.yml`: notebooks as pages, formulas, drawings inline, code without prompts.

Notebooks come from `build/notebooks`, where `make docs` and the tests leave them with their
outputs. Cells with a tag of `FOLDS` are folded; the picture of a cell tagged `cover` stands beside
the notebook in the index.
"""

import base64
import html
import re
from pathlib import Path
from typing import Any

import latex2mathml.converter
import nbformat
import pygments
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonConsoleLexer

ROOT = Path(__file__).resolve().parents[1]
SOURCES, EXECUTED = ROOT / "notebooks", ROOT / "build" / "notebooks"
ASSETS = ROOT / "docs" / "assets"
FOLDS = {"setup": "Setup", "check": "Check", "drawing": "Code of the picture"}
_CODE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)\s*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_FORMULA = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?!\w)", re.DOTALL
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_DRAWING = re.compile(r'<img alt="(?P<alt>[^"]*)" src="(?:\.\./)*assets/(?P<name>[\w-]+)\.svg" />')
_BLOCK = re.compile(
    r'<div class="(?P<class>[^"]*highlight)"><pre><span></span>'
    r"<code>(?P<code>.*?)</code></pre></div>",
    re.DOTALL,
)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds a page, its pictures and the notebook itself for each notebook."""

    def add(name: str, content: str | bytes) -> None:
        files.append(File.generated(config, name, content=content))

    for source in sorted(SOURCES.glob("*.py")):
        path = EXECUTED / f"{source.stem}.ipynb"
        if not path.exists():
            raise PluginError(f"{path} is missing: `make docs` executes the notebooks.")
        text, pictures = page(path)
        for name, content in pictures.items():
            add(f"notebooks/{name}", content)
        add(f"notebooks/{path.stem}.md", text)
        add(f"notebooks/{path.name}", path.read_text("utf-8"))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turns formulas outside of code into MathML, which browsers draw themselves."""
    parts = _CODE.split(markdown)
    # The split leaves text, code and the code's fence in turn.
    return "".join(
        _FORMULA.sub(_mathml, part) if i % 3 == 0 else part
        for i, part in enumerate(parts)
        if i % 3 < 2
    )


def on_page_content(content: str, **_: object) -> str:
    """Puts drawings inline, and marks the prompts and the results of examples as such.

    Inline, drawings follow the site's switch between light and dark. Prompts and results are not
    copied: `site.css` hides them from the button and from a selection.
    """
    return _BLOCK.sub(_console, _DRAWING.sub(_drawing, content))


def _drawing(image: re.Match[str]) -> str:
    path = ASSETS / f"{image['name']}.svg"
    if not path.exists():
        raise PluginError(f"{path} is missing: `python scripts/drawings.py` draws it.")
    drawing = path.read_text("utf-8").replace("\n", " ")
    if 'class="drawing"' not in drawing:
        return image[0]
    # An image stands in a paragraph, which may hold a span and no figure.
    return f'<span class="drawn">{drawing}</span>'


def _console(block: re.Match[str]) -> str:
    code = html.unescape(re.sub(r"<[^>]+>", "", block["code"]))
    if not code.lstrip().startswith(">>> "):
        return block[0]
    lines = pygments.highlight(code, PythonConsoleLexer(), HtmlFormatter(nowrap=True))
    return f'<div class="{block["class"]}"><pre><span></span><code>{lines}</code></pre></div>'


def _mathml(formula: re.Match[str]) -> str:
    block = formula["block"]
    made = latex2mathml.converter.convert(
        block or formula["inline"], display="block" if block else "inline"
    ).replace("\n", " ")
    # A line that begins with `<math` would be a block of HTML to Markdown.
    return made if block else f"<span>{made}</span>"


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Returns the notebook as markdown, and the pictures in it by name."""
    notebook = nbformat.read(path, as_version=4)
    pictures: dict[str, bytes] = {}
    covers = [i for i, cell in enumerate(notebook.cells) if "cover" in _tags(cell)]
    parts = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            # Links between notebooks, and to the docs, lead from page to page.
            text = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.md", cell.source)
            parts.append(text.replace("](../docs/", "](../"))
        elif cell.source.strip():
            parts.append(_code(cell))
            outputs = [_output(each, f"{path.stem}_{i}", pictures) for each in cell.outputs]
            parts += filter(None, outputs)
            if pictures and (i in covers or not covers):
                pictures.setdefault(f"{path.stem}.png", list(pictures.values())[-1])
    title, rest = "\n\n".join(parts).lstrip().split("\n", 1)
    download = f"[:material-download: Download as a notebook]({path.name}){{ .md-button download }}"
    needs = "[What it needs](index.md#to-run-them)"
    return f"{title}\n{rest}\n\n---\n\n{download} {needs}\n", pictures


def _tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def _code(cell: Any) -> str:
    """Returns a cell's code, folded if a tag asks for it."""
    fenced = f"```python\n{cell.source}\n```"
    fold = next((FOLDS[tag] for tag in _tags(cell) if tag in FOLDS), None)
    if fold is None:
        return fenced
    indented = "\n".join(f"    {line}".rstrip() for line in fenced.splitlines())
    return f'??? code "{fold}"\n\n{indented}'


def _output(output: Any, name: str, pictures: dict[str, bytes]) -> str:
    """Returns what a cell showed, and puts its pictures into `pictures`."""
    data = output.get("data", {})
    if "image/png" in data:
        own = f"{name}_{len(pictures)}.png"
        pictures[own] = base64.b64decode(data["image/png"])
        return f"![The figure that the code draws]({own})"
    if "text/html" in data:
        return data["text/html"]
    shown = output.get("text") or data.get("text/plain", "")
    if not shown.strip():
        return ""
    return f"```{{ .text .output .no-copy }}\n{_ANSI.sub('', shown).rstrip()}\n```"
