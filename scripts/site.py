"""What mkdocs lacks for this site: pages of executed notebooks, and formulas without a script.

A hook of `mkdocs.yml`. Notebooks come from `build/notebooks`, where `make docs` and the tests
leave them with their outputs.
"""

import re
from pathlib import Path

import latex2mathml.converter
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
SOURCES, EXECUTED = ROOT / "notebooks", ROOT / "build" / "notebooks"
_CODE = re.compile(r"(^(?P<fence>`{3,}).*?^(?P=fence)\s*$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_FORMULA = re.compile(
    r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^$\n]+?)\$(?!\w)", re.DOTALL
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds a page, its pictures and the notebook itself for each notebook."""
    for source in sorted(SOURCES.glob("*.py")):
        path = EXECUTED / f"{source.stem}.ipynb"
        if not path.exists():
            raise PluginError(f"{path} is missing: `make docs` executes the notebooks.")
        text, pictures = _page(path)
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        files.append(
            File.generated(config, f"notebooks/{path.name}", content=path.read_text("utf-8"))
        )
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Formulas, outside of code, as MathML, which browsers draw themselves."""
    parts = _CODE.split(markdown)
    # The split leaves text, code and the code's fence in turn.
    return "".join(
        _FORMULA.sub(_mathml, part) if i % 3 == 0 else part
        for i, part in enumerate(parts)
        if i % 3 < 2
    )


def _mathml(formula: re.Match[str]) -> str:
    block = formula["block"]
    made = latex2mathml.converter.convert(
        block or formula["inline"], display="block" if block else "inline"
    ).replace("\n", " ")
    # A line that begins with `<math` would be a block of HTML to Markdown.
    return made if block else f"<span>{made}</span>"


def _page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The notebook as markdown, and the pictures in it by name."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = _ANSI.sub("", output["text"])
    resources = {"unique_key": path.stem, "output_files_dir": f"{path.stem}_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    # Links between notebooks lead from page to page; the download is the notebook itself.
    text = re.sub(r"\]\((\d\d_\w+)\.ipynb", r"](\1.md", text)
    title, rest = text.lstrip().split("\n", 1)
    download = f"[:material-download: Download as a notebook]({path.name}){{ .md-button download }}"
    needs = "[What it needs](index.md)"
    return f"{title}\n\n{download} {needs}\n{rest}", resources["outputs"]
