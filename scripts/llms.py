"""Writes the whole public API as one text for language models: python scripts/llms.py.

A hook of `mkdocs.yml`, which puts the text beside the home page as `llms.txt`.
The text has every name that a page under `docs/api` lists, with its signature and its docstring.
It is read off the source by griffe, as the site's pages are: nothing is imported.
"""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
_ENTRY = re.compile(r"^::: eqx_cogvae\.(?P<name>[\w.]+)\n(?:    .*\n?)*", re.MULTILINE)
_ORDER = ["vae", "checkpoints", "transforms", "planning", "video", "preview", "training"]


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds `llms.txt` to the site."""
    files.append(File.generated(config, "llms.txt", content=text()))
    return files


def text() -> str:
    """Returns the text: an opening, then each page of the API with what it lists."""
    package = griffe.load("eqx_cogvae", search_paths=[ROOT], try_relative_path=False)
    opening = (
        "# eqx_cogvae\n\n"
        "> The CogVideoX video VAE in JAX, as Equinox modules and composable transforms.\n\n"
        "Video is (batch, time, height, width, channels) in [-1, 1]. `import eqx_cogvae as cv`.\n"
    )
    pages = sorted((ROOT / "docs" / "api").glob("*.md"), key=_place)
    entry = lambda found: _described(package, found["name"])  # noqa: E731
    parts = [
        # A page's own headings go one level down, below the title of the text.
        _ENTRY.sub(entry, re.sub(r"^#", "##", page.read_text("utf-8"), flags=re.MULTILINE))
        for page in pages
        if page.stem != "index"
    ]
    return "\n".join([opening, *parts])


def _place(page: Path) -> tuple[int, str]:
    return _ORDER.index(page.stem) if page.stem in _ORDER else len(_ORDER), page.stem


def _described(package: griffe.Object, name: str) -> str:
    """Returns an entry for the object, and one for each public method with a docstring."""
    found = package[name]
    found = found.final_target if found.is_alias else found
    methods = [
        (f"{name}.{each.name}", each)
        for each in found.members.values()
        if found.is_class
        and each.is_function
        and each.docstring is not None
        and (each.name == "__call__" or each.name[0] != "_")
    ]
    return "\n".join(_entry(*each) for each in [(name, found), *methods])


def _entry(name: str, found: griffe.Object) -> str:
    if isinstance(found, griffe.Attribute):
        head = f"{found.name}: {found.annotation or ''} = {found.value}".replace(":  =", " =")
    else:
        signature = found.signature() if isinstance(found, griffe.Class | griffe.Function) else ""
        head = f"{'class' if found.is_class else 'def'} {signature or found.name}"
    doc = "" if found.docstring is None else found.docstring.value
    return f"### eqx_cogvae.{name}\n\n```python\n{head}\n```\n\n{doc}\n"


if __name__ == "__main__":
    print(text(), end="")
