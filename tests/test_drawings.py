"""The site's drawings: as their script draws them, and of the figures that the pages state."""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("drawings", ROOT / "scripts" / "drawings.py")
assert SPEC is not None and SPEC.loader is not None
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)
DRAWINGS = script.drawings()


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_kept_as_it_is_drawn(name):
    kept = (ROOT / "docs" / "assets" / f"{name}.svg").read_text("utf-8")
    assert kept == DRAWINGS[name], "run `python scripts/drawings.py`"
    drawing = ElementTree.fromstring(kept)
    assert drawing.get("class") == "drawing", "the site puts no other inline"
    assert drawing.findtext("{*}title")
    # Text and lines beyond the edge would be cut off.
    width, height = map(float, drawing.attrib["viewBox"].split()[2:])
    for each in drawing.iter("{*}text"):
        assert 0 <= float(each.attrib["x"]) <= width
        assert 10 <= float(each.attrib["y"]) <= height


@pytest.mark.parametrize("rows", [script.GPU, script.CPU], ids=["gpu", "cpu"])
def test_bars_have_the_figures_of_the_pages(rows):
    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))
    for seconds in rows.values():
        for each in seconds:
            assert f"{each:.2f} s" in pages
