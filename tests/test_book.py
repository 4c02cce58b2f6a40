"""The built pages, read as a reader's browser reads them: from disk, with no network.

Needs Debian's Chromium (``apt-get install chromium``) or the program that LOSSBOOK_CHROMIUM names. Without it these
tests are skipped, unless LOSSBOOK_REQUIRE_BROWSER is set, as CI does.
"""

import html.parser
import json
import os
import re
import shutil
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml

from tools.build import build
from tools.chapters import ROOT, all_chapters, toc_pages
from tools.reader import labelled_equations

CHROMIUM = os.environ.get("LOSSBOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PAGES = [name for name, _ in toc_pages()]
CHAPTERS = pytest.mark.parametrize("chapter", all_chapters(), ids=lambda c: c.slug)
# Chromium on its own asks its maker for updates at every start.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The book, built from nothing with warnings as errors."""
    output = tmp_path_factory.mktemp("site")
    done = build(output=output)
    assert done.returncode == 0, done.stdout
    return output / "_build" / "html"


@pytest.fixture(scope="session")
def browser():
    if not CHROMIUM:
        message = "Chromium is missing, so NO PAGE IS READ IN A BROWSER: apt-get install chromium"
        if os.environ.get("LOSSBOOK_REQUIRE_BROWSER"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield launched
        launched.close()


class Page:
    """A page opened from disk, with what went wrong while it loaded."""

    def __init__(self, browser, url, *, scheme="light", width=1280, height=900):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        self.tab = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda e: self.problems.append(str(e)))
        self.tab.on("requestfailed", lambda r: self.problems.append(f"{r.url} failed"))
        self.tab.on("request", lambda r: self.requests.append(r.url))
        self.tab.goto(url, wait_until="load")
        # MathJax sets formulas after the page has loaded.
        self.tab.wait_for_function("() => !document.querySelector('.math') || document.querySelector('mjx-container')")
        self.tab.evaluate("() => window.MathJax?.startup?.promise")

    def outside(self):
        return [url for url in self.requests if not url.startswith(("file:", "data:", "blob:"))]

    def close(self):
        self.context.close()


@pytest.fixture
def open_page(browser, site):
    opened = []

    def opener(name, **options):
        page = Page(browser, f"{site.as_uri()}/{name}", **options)
        opened.append(page)
        return page

    yield opener
    for page in opened:
        page.close()


# ---------------------------------------------------------------- every page, every way of reading it


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("way", ["light", "dark", "phone"])
def test_page_reads_well(open_page, name, way):
    size = {"width": 390, "height": 844} if way == "phone" else {}
    page = open_page(f"{name}.html", scheme="dark" if way == "dark" else "light", **size)
    assert not page.outside()
    assert not page.problems
    tab = page.tab
    assert tab.evaluate("document.documentElement.dataset.theme") == ("dark" if way == "dark" else "light")
    assert tab.evaluate("document.documentElement.scrollWidth") <= tab.evaluate("window.innerWidth"), "scrolls sideways"
    assert tab.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)") == []
    assert tab.evaluate("[...document.querySelectorAll('main img')].filter(i => !i.alt.trim()).length") == 0
    assert tab.locator("mjx-merror, [data-mml-node=merror]").count() == 0
    assert (
        tab.evaluate(
            "[...document.querySelectorAll('main .math')].filter(m => !m.querySelector('mjx-container')).length"
        )
        == 0
    )
    faint = tab.evaluate(FAINT_TEXT)
    assert faint == [], "text with too little contrast"


# Text whose contrast with what lies behind it is under 4.5 to 1 (WCAG AA), 3 to 1 for large text.
FAINT_TEXT = """() => {
  const number = c => { const m = c.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = number(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.5) return c;
    }
    return [255, 255, 255, 1];
  };
  const aside = 'script, style, .headerlink, .visually-hidden, mjx-assistive-mml, button';
  const found = new Set();
  const walker = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const e = node.parentElement;
    const shown = e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
    if (!node.textContent.trim() || !shown || e.closest(aside)) continue;
    const style = getComputedStyle(e), size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const [a, b] = [light(number(style.color)), light(behind(e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = size >= 24 || (bold && size >= 18.6), text = node.textContent.trim().slice(0, 40);
    if (ratio < (large ? 3 : 4.5)) found.add(`${ratio.toFixed(2)} ${e.className} ${text}`);
  }
  return [...found];
}"""


# ---------------------------------------------------------------- what a reader can do on a page


def test_search_finds_a_word_without_a_server(open_page):
    page = open_page("search.html?q=threshold")
    page.tab.wait_for_selector("#search-results li a")
    found = page.tab.evaluate("[...document.querySelectorAll('#search-results li a')].map(a => a.href)")
    assert any("chapters/multilabel_softmax.html" in link for link in found)
    assert not page.outside()
    assert not page.problems


def test_the_theme_button_turns_the_page_dark(open_page):
    page = open_page("index.html")
    button = page.tab.locator("button.theme-switch-button:visible").first
    seen = set()
    for _ in range(3):
        button.click()
        seen.add(page.tab.evaluate("document.documentElement.dataset.theme"))
    assert seen == {"light", "dark"}
    assert not page.problems


@CHAPTERS
def test_copy_buttons_copy_the_code(open_page, chapter):
    page = open_page(f"chapters/{chapter.slug}.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    cell = page.tab.locator(".cell_input .highlight:visible").first
    cell.hover()
    cell.locator("button.copybtn").click()
    page.tab.wait_for_selector("button.copybtn.success")
    assert "import torch" in page.tab.evaluate("navigator.clipboard.readText()")


@CHAPTERS
def test_download_and_colab_give_the_readers_notebook(site, chapter):
    page = (site / "chapters" / f"{chapter.slug}.html").read_text(encoding="utf-8")
    (link,) = set(re.findall(r'href="([^"]+\.ipynb)"[^>]*download|href="(\.\./_sources/[^"]+\.ipynb)"', page)) or [()]
    target = (site / "chapters" / (link[0] or link[1])).resolve()
    assert target.read_bytes() == chapter.notebook_path.read_bytes()
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    path = repository["url"].removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{path}/blob/{repository['branch']}/chapters/{chapter.slug}.ipynb"
    assert colab in page


@CHAPTERS
def test_solutions_are_hidden_until_asked_for(open_page, chapter):
    tab = open_page(f"chapters/{chapter.slug}.html").tab
    solution = tab.locator(".admonition.dropdown").first
    body = solution.locator(".highlight").first
    assert not body.is_visible()
    solution.locator("button.toggle-button").click()
    assert body.is_visible()


# ---------------------------------------------------------------- page and notebook agree


@CHAPTERS
def test_equations_have_the_same_numbers_on_page_and_in_notebook(site, chapter):
    page = (site / "chapters" / f"{chapter.slug}.html").read_text(encoding="utf-8")
    numbers = re.findall(r'<span class="eqno">\((\d+\.\d+)\)', page)
    text = "\n".join(c.source for c in chapter.notebook.cells if c.cell_type == "markdown")
    tags = re.findall(r"\\tag\{(\d+\.\d+)\}", text)
    assert tags == numbers == [f"{chapter.number}.{i}" for i in range(1, len(tags) + 1)]
    assert len(tags) >= 5


@CHAPTERS
def test_references_to_equations_agree_with_the_page(site, chapter):
    """Each label's number, taken from the page's own links, is the number that the notebook shows."""
    page = (site / "chapters" / f"{chapter.slug}.html").read_text(encoding="utf-8")
    shown = dict(re.findall(r'href="#equation-([\w-]+)">\((\d+\.\d+)\)', page))
    labels = labelled_equations("\n\n".join(c.source for c in chapter.source.cells if c.cell_type == "markdown"))
    assert shown
    for label, number in shown.items():
        assert number == f"{chapter.number}.{labels.index(label) + 1}"


def functions_of(slug):
    import importlib
    import inspect

    module = importlib.import_module(f"lossbook.{slug}")
    return [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]


@CHAPTERS
def test_functions_and_equations_link_to_each_other(site, chapter):
    chapter_page = (site / "chapters" / f"{chapter.slug}.html").read_text(encoding="utf-8")
    reference = (site / "chapters" / "reference.html").read_text(encoding="utf-8")
    labels = set()
    for name in functions_of(chapter.slug):
        anchor = f"lossbook.{chapter.slug}.{name}"
        assert f'id="{anchor}"' in reference
        assert f'href="reference.html#{anchor}"' in chapter_page, f"no equation links to {name}"
        entry = reference.split(f'id="{anchor}"')[1].split('class="sig ')[0]
        links = re.findall(rf'href="{chapter.slug}\.html#equation-([\w-]+)"', entry)
        assert links, f"the docstring of {name} names no equation"
        labels |= set(links)
    assert all(f'id="equation-{label}"' in chapter_page for label in labels)


# ---------------------------------------------------------------- links


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        self.targets += [given[k] for k in ("href", "src") if given.get(k)]


@cache
def links_of(path: Path) -> Links:
    parser = Links()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser


def test_no_link_inside_the_book_is_broken(site):
    broken = []
    pages = [page for page in sorted(site.rglob("*.html")) if "_static" not in page.parts]
    assert len(pages) > len(PAGES)
    for page in pages:
        for target in links_of(page).targets:
            url = urlparse(target)
            if url.scheme or url.netloc:
                continue
            file = (page.parent / unquote(url.path)).resolve() if url.path else page
            if not file.exists():
                broken.append(f"{page.name}: {target}")
            elif url.fragment and file.suffix == ".html" and unquote(url.fragment) not in links_of(file).anchors:
                broken.append(f"{page.name}: {target} (no such anchor)")
    assert not broken


def test_nothing_on_the_pages_is_loaded_from_elsewhere(site):
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="https?:[^"]*"|<link[^>]+rel="(?:stylesheet|preload)"[^>]+href="https?:'
    )
    found = {p.name: loads.findall(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    assert not {name: hits for name, hits in found.items() if hits}


def test_the_search_index_knows_every_page(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    names = json.loads(re.search(r'"docnames":\s*(\[[^\]]*\])', index).group(1))
    assert set(PAGES) <= set(names)
