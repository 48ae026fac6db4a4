"""Opens the built site in Chromium: python tests/site/look.py SITE [--screenshots DIR].

Every page loads without an error in its console and without a failed request, or one to another
host; pictures are there; it fits a phone; no code scrolls sideways on a desk; links and anchors
resolve, and lead to every page in two clicks; tables of figures name the script that made them;
copied code has no prompts; search, dark mode and `llms.txt` work.
"""

import argparse
import functools
import http.server
import inspect
import os
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

import eqx_cogvae
from eqx_cogvae import diffusers, training, video

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
_WIDEST = "document.documentElement.scrollWidth"
_PICTURES = "[...document.querySelectorAll('article img')].map(i => [i.src, i.naturalWidth])"
_VIDEOS = "[...document.querySelectorAll('article video')]"
_UNSEEN = f"{_VIDEOS}.filter(v => v.error || !v.videoWidth).length"
_LOADED = f"{_VIDEOS}.every(v => v.error || v.readyState > 0)"
# A formula outside of its paragraph, and lists that were not seen as such.
_RAW = """[
    ...[...document.querySelectorAll('article > math:not([display=block])')].map(_ => 'a formula'),
    ...[...document.querySelectorAll('article p')].map(p => p.textContent)
        .filter(t => /\\n- \\S|^\\.\\s*- /.test(t)).map(t => t.slice(0, 60)),
]"""
# Folded code is measured too. A signature and a notebook's output wrap instead of scrolling.
_WIDE = """[...document.querySelectorAll('details')].forEach(d => d.open = true) ||
    [...document.querySelectorAll('article pre, article pre > code')]
        .filter(e => e.scrollWidth > e.clientWidth && e.clientWidth)
        .map(e => e.innerText.split('\\n').sort((a, b) => b.length - a.length)[0])"""
# Tables of measured figures where neither their caption nor anything between them and the last
# heading names the script that made them.
_UNSIGNED = """[...document.querySelectorAll('article table')].filter(table => {
    const cells = [...table.querySelectorAll('tbody td:not(:first-child)')];
    const texts = cells.map(c => c.textContent.trim());
    const figures = texts.filter(t => /^[\\d.,e+-]+( (s|ms|dB|[KMG]i?B))?$/.test(t));
    if (figures.length <= cells.length / 2 || !figures.some(t => / |e-/.test(t))) return false;
    const script = /(benchmarks|scripts|tests)\\/\\w+\\.py/;
    let above = table.closest('.md-typeset__scrollwrap') || table;
    if (script.test(above.nextElementSibling?.textContent || '')) return false;  // its caption
    while ((above = above.previousElementSibling) && !/^H[1-6]$/.test(above.tagName))
        if (script.test(above.textContent)) return false;
    return true;
}).map(table => table.textContent.trim().split('\\n')[0])"""
_SEEN_LINKS = """[...document.querySelectorAll('a[href]')]
    .filter(a => a.getClientRects().length).map(a => a.href)"""
_LINKS = "[...document.querySelectorAll('a[href]')].map(a => a.href)"
_IDS = "[...document.querySelectorAll('[id]')].map(e => e.id)"


def main() -> int:
    """Prints what is wrong; the exit status says whether anything is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--screenshots", type=Path)
    options = parser.parse_args()
    if (chromium := shutil.which("chromium")) is None:
        print("no chromium, the site was not looked at")
        return 1 if os.environ.get("CI") else 0
    root, server = _served(options.site)
    names = sorted(p.relative_to(options.site).as_posix() for p in options.site.rglob("*.html"))
    names = [name for name in names if name != "404.html"]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        wrong, ids = _pages(browser, root, names, options.screenshots)
        wrong += [f"{name} is not in the API" for name in public() if name not in ids]
        wrong += _search(browser, root) + _dark(browser, root) + _copied(browser, root)
        wrong += _drawings(browser, root)
        browser.close()
    server.shutdown()
    wrong += _llms(options.site)
    print(*wrong, f"{len(names)} pages, {len(wrong)} faults", sep="\n")
    return 1 if wrong else 0


def public() -> list[str]:
    """Returns the full names of what the package exports: anchors on the API's pages."""
    own = [name for name in vars(eqx_cogvae) if name[0] != "_"]
    own = [name for name in own if not inspect.ismodule(getattr(eqx_cogvae, name))]
    modules = {m.__name__: m.__all__ for m in (diffusers, training, video)} | {"eqx_cogvae": own}
    return [f"{module}.{name}" for module, names in modules.items() for name in names]


def _served(site: Path) -> tuple[str, http.server.ThreadingHTTPServer]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/", server


def _pages(
    browser: Browser, root: str, names: list[str], pictures: Path | None
) -> tuple[list[str], set[str]]:
    """Returns the faults of the pages, and all anchors in them."""
    wrong, links, seen, ids = [], {}, {}, {}
    for name in names:
        page = browser.new_page(viewport=DESK)
        _watch(page, root, name, wrong)
        page.goto(root + name, wait_until="networkidle")
        wrong += [f"{name}: no picture {src[:80]}" for src, w in page.evaluate(_PICTURES) if not w]
        wrong += [f"{name}: raw markup, {text!r}" for text in page.evaluate(_RAW)]
        try:
            page.wait_for_function(_LOADED, timeout=15_000)
        except TimeoutError:
            wrong.append(f"{name}: a video does not load")
        if unseen := page.evaluate(_UNSEEN):
            wrong.append(f"{name}: {unseen} videos that do not play")
        if name.startswith("notebooks/") and "index" not in name and not page.evaluate(_PICTURES):
            wrong.append(f"{name}: has no pictures")
        links[name], ids[name] = page.evaluate(_LINKS), set(page.evaluate(_IDS))
        seen[name] = page.evaluate(_SEEN_LINKS)
        wrong += [f"{name}: no script is named above {text!r}" for text in page.evaluate(_UNSIGNED)]
        _shot(page, pictures, name)
        wrong += [f"{name}: code scrolls sideways, {line!r}" for line in page.evaluate(_WIDE)]
        page.set_viewport_size(PHONE)
        if (width := page.evaluate(_WIDEST)) > PHONE["width"]:
            wrong.append(f"{name}: {width} pixels wide on a phone of {PHONE['width']}")
        _shot(page, pictures, f"phone-{name}")
        page.close()
    wrong += _far(root, links, seen) + _unresolved(browser, root, links, ids)
    return wrong, set().union(*ids.values())


def _far(root: str, links: dict[str, list[str]], seen: dict[str, list[str]]) -> list[str]:
    """Returns a fault for each page that is more than two clicks from home.

    A link in a folded section of the navigation takes two clicks: one opens the section.
    """

    def targets(urls: list[str]) -> set[str]:
        own = {url.removeprefix(root).partition("#")[0] for url in urls if url.startswith(root)}
        return {name or "index.html" for name in own}

    near = targets(links["index.html"])
    for name in targets(seen["index.html"]) & seen.keys():
        near |= targets(seen[name])
    return [f"{name}: more than two clicks from home" for name in sorted(links.keys() - near)]


def _watch(page: Page, root: str, name: str, wrong: list[str]) -> None:
    """Notes errors in the console, and requests that fail or go to another host."""

    def asked(url: str) -> None:
        if not url.startswith((root, "data:", "blob:")):
            wrong.append(f"{name}: asks {url}")

    def said(kind: str, text: str) -> None:
        if kind == "error":
            wrong.append(f"{name}: {text}")

    page.on("console", lambda m: said(m.type, m.text))
    page.on("pageerror", lambda error: wrong.append(f"{name}: {error}"))
    page.on("requestfailed", lambda r: wrong.append(f"{name}: failed {r.url[:100]}"))
    page.on("request", lambda r: asked(r.url))


def _unresolved(
    browser: Browser, root: str, links: dict[str, list[str]], ids: dict[str, set[str]]
) -> list[str]:
    wrong, known, request = [], {}, browser.new_context().request
    for name, targets in links.items():
        for target in sorted({t for t in targets if t.startswith(root)}):
            path, _, anchor = target.removeprefix(root).partition("#")
            if (path := path or "index.html") not in known:
                known[path] = request.get(root + path).status
            if known[path] != 200:
                wrong.append(f"{name}: leads to {path}, {known[path]}")
            elif anchor and not anchor.startswith("__") and anchor not in ids.get(path, {anchor}):
                wrong.append(f"{name}: leads to {path}#{anchor}, which is not there")
    return wrong


def _search(browser: Browser, root: str) -> list[str]:
    page = browser.new_page(viewport=DESK)
    page.goto(root, wait_until="networkidle")
    page.click(".md-search__input")
    page.type(".md-search__input", "framewise", delay=20)
    found = ".md-search-result a[href*='api/transforms'][href*='#eqx_cogvae.framewise']"
    try:
        page.wait_for_selector(found, state="attached", timeout=15_000)
    except TimeoutError:
        return ["search does not find framewise in the API"]
    finally:
        page.close()
    return []


def _dark(browser: Browser, root: str) -> list[str]:
    page = browser.new_page(viewport=DESK, color_scheme="light")
    page.goto(root, wait_until="networkidle")
    scheme = "document.body.getAttribute('data-md-color-scheme')"
    before = page.evaluate(scheme)
    page.click("form[data-md-component=palette] label:visible")
    after = page.evaluate(scheme)
    page.close()
    return [] if (before, after) == ("default", "slate") else [f"dark mode: {before} to {after}"]


def _copied(browser: Browser, root: str) -> list[str]:
    """Presses the copy button of an example with prompts, and reads the clipboard."""
    context = browser.new_context(viewport=DESK)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=root)
    page = context.new_page()
    page.goto(root + "api/vae.html", wait_until="networkidle")
    example = page.locator(".highlight:has(.gp)").first
    example.hover()
    example.locator("button[data-md-type=copy], .md-clipboard, .md-code__button").first.click()
    copied = page.evaluate("navigator.clipboard.readText()")
    context.close()
    if "import" not in copied or ">>>" in copied or "(1, 5, 8, 12, 16)" in copied:
        return [f"api/vae.html: an example is copied as {copied!r}"]
    return []


def _drawings(browser: Browser, root: str) -> list[str]:
    """Looks whether the lines of a drawing stand out from the page, light and dark."""
    wrong = []
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport=DESK, color_scheme=scheme)
        page.goto(root + "devices.html", wait_until="networkidle")
        shade = """e => getComputedStyle(e).getPropertyValue(%r).match(/\\d+/g).slice(0, 3)
            .reduce((sum, each) => sum + Number(each), 0)"""
        ink = page.locator(".drawing text").first.evaluate(shade % "fill")
        paper = page.locator("body").evaluate(shade % "background-color")
        if abs(ink - paper) < 300:
            wrong.append(f"devices.html: a drawing's text is {ink} on {paper}, {scheme}")
        page.close()
    return wrong


def _llms(site: Path) -> list[str]:
    text = (site / "llms.txt").read_text("utf-8")
    return [f"llms.txt lacks {name}" for name in public() if f"### {name}\n" not in text]


def _shot(page: Page, folder: Path | None, name: str) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / (name.replace("/", "-") + ".png"))


if __name__ == "__main__":
    sys.exit(main())
