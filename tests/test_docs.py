"""The documentation against the package: names, parts of docstrings, tests, links."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import eqx_cogvae as cv
from eqx_cogvae import dataset, diffusers, preview, training, video

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
TEXTS = [*ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *DOCS.rglob("*.md")]
PARTS = (cv, dataset, preview, video)
# Methods that the API pages show too.
METHODS = (cv.VAE, cv.Encoder, cv.Decoder, cv.Config, cv.DiagonalGaussian, preview.Preview)


def exported(module):
    names = getattr(module, "__all__", None)
    if names is not None:
        return names
    return [n for n, x in vars(module).items() if n[0] != "_" and not inspect.ismodule(x)]


@pytest.mark.parametrize(
    "module", [*PARTS, diffusers, training], ids=lambda module: module.__name__
)
def test_every_public_name_is_on_a_page_of_the_api(module):
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    names = {f"{module.__name__}.{name}" for name in exported(module)}
    assert len(names) > 1
    assert names - listed == set()


def documented():
    """Every public function, class and method, with its name."""
    for module in PARTS:
        for name in exported(module):
            thing = getattr(module, name)
            if inspect.isroutine(thing) or inspect.isclass(thing):
                yield f"{module.__name__}.{name}", thing
    for kind in METHODS:
        for name, method in vars(kind).items():
            function = getattr(method, "__func__", method)
            if name[0] != "_" or name == "__call__":
                yield f"{kind.__name__}.{name}", function


def fields_without_a_docstring(kind):
    """Names of fields that neither the class's docstring nor one of their own explains."""
    tree = ast.parse(inspect.cleandoc(inspect.getsource(kind))).body[0]
    told = set(re.findall(r"`(\w+)`", kind.__doc__ or ""))
    for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and statement.target.id not in told:
            own = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if not own:
                yield statement.target.id


@pytest.mark.parametrize(
    ("name", "thing"), [pytest.param(*each, id=each[0]) for each in documented()]
)
def test_docstrings_have_their_parts(name, thing):
    """What goes in and what comes out; a class has its fields or its arguments."""
    text = inspect.getdoc(getattr(thing, "_fun", thing)) or ""
    assert text, name
    if isinstance(thing, property):
        return
    if inspect.isclass(thing):
        told = "**Arguments:**" in text
        assert told or not list(fields_without_a_docstring(thing)), name
        return
    signature = inspect.signature(thing)
    given = [parameter for parameter in signature.parameters if parameter not in ("self", "cls")]
    assert not given or "**Arguments:**" in text, name
    if signature.return_annotation not in (None, "None"):
        assert "**Returns:**" in text, name


FRAGMENT = re.compile(r"(What|Of|How|Whether|Where|That|Which|By|For|On|To|From|As)\b")


def test_few_docstrings_open_with_a_fragment():
    found, count = [], 0
    for path in (ROOT / "eqx_cogvae").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                count += text is not None
                if text and FRAGMENT.match(text):
                    found.append(f"{path.name}: {text.splitlines()[0]}")
    assert len(found) <= 0.02 * count, found


def test_promises_name_tests_that_are_there():
    """Pages name tests as `file.py::function`."""
    named = set()
    for page in DOCS.rglob("*.md"):
        named |= set(re.findall(r"`(\w+\.py)::(\w+)`", page.read_text()))
    assert len(named) > 40
    there = {}
    for file, _ in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        there[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert [name for name in sorted(named) if name[1] not in there[name[0]]] == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    """Links between files of the repository; the site's own check sees anchors too."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", text)
    wrong = []
    for link in links:
        target = (path.parent / link).resolve()
        # Notebooks are written as percent files, and become pages.
        source = ROOT / "notebooks" / f"{target.stem}.py"
        if not target.exists() and not (target.parent.name == "notebooks" and source.exists()):
            wrong.append(link)
    assert wrong == []


DIARY = (
    *("no script is kept", "slow hour", "beside other work", "by earlier notes"),
    *("version before", "other work beside"),
)


def test_pages_are_no_diary():
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    found = [(page.name, words) for page in pages for words in DIARY if words in page.read_text()]
    assert found == []


def test_code_on_pages_fits_the_column():
    """On the site no line of code scrolls sideways: a column holds 88 characters."""
    wide = []
    for page in DOCS.rglob("*.md"):
        for block in re.findall(r"^ *```\w.*?\n(.*?)^ *```", page.read_text(), re.S | re.M):
            wide += [(page.name, line) for line in block.splitlines() if len(line) > 88]
    assert wide == []
