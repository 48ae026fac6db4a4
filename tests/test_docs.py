"""The documentation against the sources: names, parts of docstrings, tests, links. No imports."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "eqx_cogvae"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *PAGES]
MODULES = {
    "eqx_cogvae": PACKAGE / "__init__.py",
    "eqx_cogvae.dataset": PACKAGE / "dataset" / "__init__.py",
    "eqx_cogvae.diffusers": PACKAGE / "diffusers" / "__init__.py",
    "eqx_cogvae.preview": PACKAGE / "preview.py",
    "eqx_cogvae.training": PACKAGE / "training" / "__init__.py",
    "eqx_cogvae.video": PACKAGE / "video" / "__init__.py",
}
DEFINITIONS = ast.FunctionDef | ast.ClassDef


@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def imported(path):
    """The names that a file imports from the package, by the files that they come from."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
            yield from ((alias.asname or alias.name, alias.name, file) for alias in node.names)


def exported(path):
    """Names of `__all__`, or those that are imported as themselves."""
    for node in parsed(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return [name for name, _, _ in imported(path) if name[0] != "_"]


def definition(path, name):
    """The class or function of a name; None for a constant or an alias of a type."""
    for node in parsed(path).body:
        if isinstance(node, DEFINITIONS) and node.name == name:
            return node
    for known, original, file in imported(path):
        if known == name and file.exists():
            return definition(file, original)
    return None


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_on_a_page_of_the_api(module):
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    names = {f"{module}.{name}" for name in exported(MODULES[module])}
    assert len(names) > 1
    assert names - listed == set()


def documented():
    """Every public class, function and method."""
    for module, path in MODULES.items():
        nodes = [(name, definition(path, name)) for name in exported(path)]
        for name, node in nodes:
            if node is None:
                continue
            yield pytest.param(node, id=f"{module}.{name}")
            methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
            for method in methods if isinstance(node, ast.ClassDef) else ():
                if method.name[0] != "_" or method.name == "__call__":
                    yield pytest.param(method, id=f"{module}.{name}.{method.name}")


@pytest.mark.parametrize("node", list(documented()))
def test_docstrings_have_their_parts(node):
    """Every argument by its name, and what is returned; a class may have a line for each field."""
    text = ast.get_docstring(node) or ""
    assert text
    if isinstance(node, ast.ClassDef):
        assert "**Arguments:**" in text or list(bare_fields(node)) == []
        return
    if any("property" in ast.unparse(each) for each in node.decorator_list):
        return
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given = {each.arg for each in arguments} - {"self", "cls"}
    assert not given or "**Arguments:**" in text
    if "**Arguments:** as" not in text:
        assert given - set(re.findall(r"`(\w+)`", text)) == set()
    assert node.returns is None or ast.unparse(node.returns) == "None" or "**Returns:**" in text


def bare_fields(node):
    """Public fields without a docstring below them."""
    for field, below in zip(node.body, [*node.body[1:], None], strict=True):
        told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        name = ast.unparse(field.target) if isinstance(field, ast.AnnAssign) else "_"
        if not (told or name.startswith("_")):
            yield name


FRAGMENT = re.compile(r"(What|Of|How|Whether|Where|That|Which|By|For|On|To|From|As)\b")


def test_few_docstrings_open_with_a_fragment():
    found, count = [], 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(parsed(path)):
            text = ast.get_docstring(node) if isinstance(node, ast.Module | DEFINITIONS) else None
            count += text is not None
            if text and FRAGMENT.match(text):
                found.append(f"{path.name}: {text.splitlines()[0]}")
    assert count > 300
    assert len(found) <= 0.02 * count, found


def test_promises_name_tests_that_are_there():
    """Pages name a test as `file.py::function`."""
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"`(\w+\.py)::(\w+)`", text))
    assert len(named) > 40
    wrong = [
        f"{file}::{name}"
        for file, name in sorted(named)
        if name not in {getattr(node, "name", "") for node in parsed(ROOT / "tests" / file).body}
    ]
    assert wrong == []


def blocks(text):
    return re.findall(r"^ *```\w.*?\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    """Links between files; the site's own check sees anchors too."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    wrong = []
    for link in re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", text):
        target = (path.parent / link).resolve()
        # A notebook is a percent file here, and a page of the site.
        is_page = (ROOT / "notebooks" / f"{target.stem}.py").exists()
        if not target.exists() and not (target.parent.name == "notebooks" and is_page):
            wrong.append(link)
    assert wrong == []


DIARY = (
    *("no script is kept", "slow hour", "beside other work", "other work beside"),
    *("by earlier notes", "version before"),
)


def test_pages_are_no_diary():
    pages = [ROOT / "README.md", *PAGES]
    found = [(page.name, words) for page in pages for words in DIARY if words in page.read_text()]
    assert found == []


def test_code_on_pages_fits_the_column():
    """On the site no line of code scrolls sideways: a column holds 88 characters."""
    lines = [
        (page.name, line)
        for page in PAGES
        for b in blocks(page.read_text())
        for line in b.splitlines()
    ]
    assert [each for each in lines if len(each[1]) > 88] == []
