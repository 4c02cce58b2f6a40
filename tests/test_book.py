"""The built pages, read as a reader's browser reads them: from disk, with no network.

Needs Debian's Chromium (``apt-get install chromium``) or the program that LOSSBOOK_CHROMIUM names. Without it these
tests are skipped, unless LOSSBOOK_REQUIRE_BROWSER is set, as CI does.
"""

import html
import html.parser
import json
import os
import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import yaml
from pypdf import PdfReader

from tools import catalogues, languages, pdf, picture, project
from tools.build import build
from tools.chapters import ROOT, all_chapters, all_notebooks, pages_of, toc_pages
from tools.limits import SCREENS
from tools.reader import labelled_equations

PAGES = [name for name, _ in toc_pages()]
TRANSLATED = [
    f"{languages.folder(language)}{name}" for language, names in catalogues.languages().items() for name in names
]
CHAPTERS = pytest.mark.parametrize("chapter", all_chapters(), ids=lambda c: c.slug)
PARTS = pytest.mark.parametrize("chapter", [p for p in all_notebooks() if p.number], ids=lambda c: c.slug)
AXE = ROOT / "tests/vendor/axe-core/axe.min.js"


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The book, built from nothing with warnings as errors, or what is at LOSSBOOK_SITE, while pages are written."""
    if built_before := os.environ.get("LOSSBOOK_SITE"):
        return Path(built_before).resolve()
    output = tmp_path_factory.mktemp("site")
    done = build(output=output)
    assert done.returncode == 0, done.stdout
    return output / "_build" / "html"


def built(site, page):
    """The HTML of a page with cells."""
    return (site / "chapters" / f"{page.slug}.html").read_text(encoding="utf-8")


class Page:
    """A page opened from disk, with what went wrong while it loaded."""

    def __init__(self, browser, url, *, scheme="light", width=1280, height=900, scripts=True):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, java_script_enabled=scripts
        )
        self.tab = self.context.new_page()
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", lambda m: self.problems.append(m.text) if m.type in ("error", "warning") else None)
        self.tab.on("pageerror", lambda e: self.problems.append(str(e)))
        self.tab.on("requestfailed", lambda r: self.problems.append(f"{r.url} failed"))
        self.tab.on("request", lambda r: self.requests.append(r.url))
        self.tab.goto(url, wait_until="load")
        if not scripts:
            return
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


@pytest.mark.parametrize("name", PAGES + TRANSLATED)
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


# ---------------------------------------------------------------- limits and accessibility

UNFOLD = """() => {
  document.querySelectorAll('main details').forEach(d => { d.open = true; });
  document.querySelectorAll('main button.toggle-button-hidden').forEach(b => b.click());
}"""
# Rules of axe-core that these pages may break, each with its reason.
ALLOWED: dict[str, str] = {}


@pytest.mark.parametrize("name", PAGES + TRANSLATED)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_meets_wcag(open_page, name, scheme):
    """WCAG 2.2 AA as far as axe-core can see it, with everything unfolded."""
    tab = open_page(f"{name}.html", scheme=scheme).tab
    tab.add_style_tag(content="* { animation: none !important; transition: none !important; }")  # no half-faded text
    tab.evaluate(UNFOLD)
    tab.evaluate(AXE.read_text(encoding="utf-8"))
    levels = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = tab.evaluate("tags => axe.run(document, {runOnly: tags}).then(r => r.violations)", levels)
    said = [
        f"{rule['id']} ({rule['help']}): {node['target']} {node['html'][:160]}"
        for rule in found
        if rule["id"] not in ALLOWED
        for node in rule["nodes"][:4]
    ]
    assert not said, "\n".join(said)


@CHAPTERS
def test_a_chapter_is_read_in_twenty_screens(open_page, chapter):
    tab = open_page(f"chapters/{chapter.slug}.html", height=800).tab
    assert tab.evaluate("document.documentElement.scrollHeight") / 800 <= SCREENS


CUT_OFF = """() => [...document.querySelectorAll('main :is(pre, table, .output, mjx-container[display=true])')]
  .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => `${e.tagName}, ${e.scrollWidth - e.clientWidth} pixels too wide: ${e.textContent.trim().slice(0, 60)}`)"""


@PARTS
def test_no_code_formula_or_output_is_cut_off(open_page, chapter):
    tab = open_page(f"chapters/{chapter.slug}.html", height=800).tab
    tab.evaluate(UNFOLD)
    assert tab.evaluate(CUT_OFF) == []


@CHAPTERS
def test_the_verdict_and_its_lines_are_on_the_first_screen(open_page, chapter):
    tab = open_page(f"chapters/{chapter.slug}.html", height=800).tab
    assert tab.evaluate("document.querySelector('.verdict').getBoundingClientRect().bottom") <= 800


@CHAPTERS
def test_the_first_formula_is_set_within_two_seconds(browser, site, chapter):
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    tab = context.new_page()
    tab.goto(f"{site.as_uri()}/chapters/{chapter.slug}.html", wait_until="commit")
    tab.wait_for_selector("main mjx-container", state="attached", timeout=2000)
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_light(site, name):
    """At most 1 MB on the wire, where text shrinks to a quarter, without what all pages share."""
    page = site / f"{name}.html"
    pictures = set(re.findall(r'src="[^"]*(_images|_static/covers)/([^"]+)"', page.read_text(encoding="utf-8")))
    size = sum((site / folder / unquote(picture)).stat().st_size for folder, picture in pictures)
    assert page.stat().st_size / 4 + size <= 1_000_000


def test_the_picture_in_readme_shows_the_front_page(site):
    assert picture.stale(site, ROOT / picture.PICTURE) == [], "make picture"


def test_what_all_pages_share_is_light(site):
    assert sum(path.stat().st_size for path in (site / "_static").rglob("*") if path.is_file()) <= 15_000_000


@pytest.mark.parametrize("name", ["chapters/status", "chapters/speed"])
def test_a_wide_table_on_a_phone_keeps_its_first_column(open_page, name):
    table = open_page(f"{name}.html", width=390, height=844).tab.locator("main table").first
    assert table.evaluate("t => t.scrollWidth > t.clientWidth")
    moved = table.evaluate("""t => {
      const left = () => [0, 1].map(i => t.rows[1].cells[i].getBoundingClientRect().left), before = left();
      t.scrollLeft = 40;
      return left().map((x, i) => x - before[i]);
    }""")
    assert moved == [0, -40]


@pytest.mark.parametrize("name", ["chapters/speed", "chapters/results"])
def test_a_wide_table_on_a_phone_fades_where_it_goes_on_and_shows_its_caption(open_page, name):
    tab = open_page(f"{name}.html", width=390, height=844).tab
    assert tab.locator("main table.more").count() > 0
    cut = """t => t.scrollWidth > t.clientWidth + 1 !== t.matches('.more')
      || t.caption?.getBoundingClientRect().right > t.getBoundingClientRect().right + 1"""
    assert tab.evaluate(f"[...document.querySelectorAll('main table')].filter({cut}).length") == 0
    table = tab.locator("main table.more").first.element_handle()
    assert "linear-gradient" in table.evaluate("t => getComputedStyle(t).maskImage")
    table.evaluate("t => { t.scrollLeft = t.scrollWidth; }")
    tab.wait_for_function("t => !t.matches('.more')", arg=table)
    assert table.evaluate("t => t.caption.getBoundingClientRect().left >= t.getBoundingClientRect().left")


LETTERS = (
    """() => [...document.querySelectorAll('.loss-map img')].map(i => 11 / 72 * 144 * i.clientWidth / i.naturalWidth)"""
)


@pytest.mark.parametrize("width", [390, 1280])
def test_letters_on_the_map_can_be_read(open_page, width):
    """Covers have letters of 11 points at 144 dots an inch."""
    sizes = open_page("index.html", width=width).tab.evaluate(LETTERS)
    assert min(sizes) >= 9


@PARTS
def test_without_scripts_a_page_has_its_text_and_pictures(open_page, chapter):
    tab = open_page(f"chapters/{chapter.slug}.html", scripts=False).tab
    assert tab.locator("main section h1").first.inner_text()
    assert tab.locator("main img:visible").count() >= (3 if chapter.kind == "chapter" else 0)


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
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_figure_to_touch_is_live(open_page, chapter, scheme):
    """Its scripts come with the page, from disk, and on no other page; it turns dark with the page."""
    page = open_page(f"chapters/{chapter.slug}.html", scheme=scheme)
    figure = page.tab.locator(f'.touch[data-figure="{chapter.slug}"][data-live]')
    figure.locator(".touch-says:not(:empty)").wait_for()
    assert figure.get_attribute("data-scheme") == scheme
    assert not figure.locator(".touch-picture").is_visible()
    page.tab.evaluate(f"document.documentElement.dataset.theme = '{'light' if scheme == 'dark' else 'dark'}'")
    assert figure.get_attribute("data-scheme") != scheme
    assert not page.outside()
    assert not page.problems
    assert "jsxgraphcore" not in open_page(f"chapters/{chapter.slug}_evidence.html").tab.content()


@CHAPTERS
def test_copy_buttons_copy_the_code(open_page, chapter):
    page = open_page(f"chapters/{chapter.slug}.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = page.tab.locator(".verdict .highlight-python").first
    code.hover()
    code.locator("button.copybtn").click()
    page.tab.wait_for_selector("button.copybtn.success")
    copied = page.tab.evaluate("navigator.clipboard.readText()")
    assert copied.strip() == code.locator("pre").inner_text().strip()
    assert "from lossbook" in copied


@PARTS
def test_download_and_colab_give_the_readers_notebook(site, chapter):
    page = (site / "chapters" / f"{chapter.slug}.html").read_text(encoding="utf-8")
    (link,) = set(re.findall(r'href="([^"]+\.ipynb)"[^>]*download|href="(\.\./_sources/[^"]+\.ipynb)"', page)) or [()]
    target = (site / "chapters" / (link[0] or link[1])).resolve()
    assert target.read_bytes() == chapter.notebook_path.read_bytes()
    branch = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["branch"]
    path = project.urls()["Repository"].removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{path}/blob/{branch}/chapters/{chapter.slug}.ipynb"
    assert colab in page


@PARTS
def test_answers_and_solutions_are_hidden_until_asked_for(open_page, chapter):
    if chapter.kind == "evidence":
        return
    tab = open_page(f"chapters/{chapter.slug}.html").tab
    solution = tab.locator(".admonition.dropdown").first
    body = solution.locator("p:not(.admonition-title), .highlight").first
    assert not body.is_visible()
    solution.locator("button.toggle-button").click()
    assert body.is_visible()


# ---------------------------------------------------------------- page and notebook agree


def text_of(page):
    """The Markdown of a reader's notebook."""
    return "\n".join(cell.source for cell in page.notebook.cells if cell.cell_type == "markdown")


@CHAPTERS
def test_equations_have_the_same_numbers_on_page_and_in_notebook(site, chapter):
    """Counted over the chapter, its evidence and its exercises."""
    found = []
    for page in pages_of(chapter):
        numbers = re.findall(r'<span class="eqno">\((\d+\.\d+)\)', built(site, page))
        assert re.findall(r"\\tag\{(\d+\.\d+)\}", text_of(page)) == numbers
        found += numbers
    assert found == [f"{chapter.number}.{i}" for i in range(1, len(found) + 1)]
    assert len(found) >= 5


@CHAPTERS
def test_references_to_equations_agree_with_the_page(site, chapter):
    """Each label's number, taken from the pages' own links, is the number that the notebooks show."""
    pages = pages_of(chapter)
    cells = [cell.source for page in pages for cell in page.source.cells if cell.cell_type == "markdown"]
    labels = labelled_equations("\n\n".join(cells))
    for page in pages:
        shown = dict(re.findall(r'href="#equation-([\w-]+)">\((\d+\.\d+)\)', built(site, page)))
        assert shown or page.kind != "chapter"
        for label, number in shown.items():
            assert number == f"{chapter.number}.{labels.index(label) + 1}"


@CHAPTERS
def test_captions_have_the_same_numbers_on_page_and_in_notebook(site, chapter):
    found = []
    for page in pages_of(chapter):
        numbers = re.findall(r'caption-line">\s*<em>Figure (\d+\.\d+): ', built(site, page))
        assert re.findall(r"^\*Figure (\d+\.\d+): ", text_of(page), re.MULTILINE) == numbers
        found += numbers
    assert found == [f"{chapter.number}.{i}" for i in range(1, len(found) + 1)]
    assert found


def functions_of(slug):
    import importlib
    import inspect

    module = importlib.import_module(f"lossbook.{slug}")
    return [name for name in module.__all__ if inspect.isfunction(getattr(module, name))]


@CHAPTERS
def test_functions_and_equations_link_to_each_other(site, chapter):
    pages = {page.slug: built(site, page) for page in pages_of(chapter)}
    reference = (site / "chapters" / "reference.html").read_text(encoding="utf-8")
    labels = set()
    for name in functions_of(chapter.slug):
        anchor = f"lossbook.{chapter.slug}.{name}"
        assert f'id="{anchor}"' in reference
        assert any(f'href="reference.html#{anchor}"' in page for page in pages.values()), f"no equation links to {name}"
        entry = reference.split(f'id="{anchor}"')[1].split('class="sig ')[0]
        links = re.findall(rf'href="({chapter.slug}\w*)\.html#equation-([\w-]+)"', entry)
        assert links, f"the docstring of {name} names no equation"
        labels |= set(links)
    assert all(f'id="equation-{label}"' in pages[slug] for slug, label in labels)


def test_the_index_of_questions_leads_to_each_of_them(site):
    index = (site / "chapters/questions.html").read_text(encoding="utf-8")
    for page in all_notebooks():
        for name in re.findall(r'id="((?:question|exercise)-\d+-\d+)"', built(site, page)):
            assert f'href="{page.slug}.html#{name}"' in index
    assert index.count("html#question-") == 3 * len(all_chapters())


TITLES = "selector => [...document.querySelectorAll(selector)].map(a => [a.href, a.innerText.trim()])"


def test_the_front_page_leads_to_every_chapter_by_its_title(open_page):
    tab = open_page("index.html").tab
    shown = dict(tab.evaluate(TITLES, ".loss-map li li a"))
    beside = dict(tab.evaluate(TITLES, ".bd-sidebar-primary .toctree-l1 > a"))
    assert len(shown) == len(all_chapters())
    for link, title in shown.items():
        assert beside[link].split(". ", 1)[1] == title


# ---------------------------------------------------------------- links


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.anchors |= {given[k] for k in ("id", "name") if given.get(k)}
        if tag != "base":  # of the page at addresses that lead nowhere: where the book is on its server
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


# ---------------------------------------------------------------- what the world sees, and other languages


def meta(site, name):
    """The metadata of a page by name, and its canonical address."""
    text = (site / f"{name}.html").read_text(encoding="utf-8")
    found = {m[2]: html.unescape(m[1]) for m in re.finditer(r'<meta content="([^"]*)" name="([^"]*)"', text)}
    found |= {
        m[1]: html.unescape(m[2]) for m in re.finditer(r'<meta (?:name|property)="([^"]*)" content="([^"]*)"', text)
    }
    return found | {"canonical": re.search(r'<link rel="canonical" href="([^"]*)"', text)[1]}


def test_every_page_introduces_itself(site):
    book = project.urls()["Documentation"]
    found = {name: meta(site, name) for name in PAGES + TRANSLATED}
    for name, tags in found.items():
        assert tags["canonical"] == tags["og:url"] == f"{book}{name}.html"
        assert tags["og:site_name"] == "lossbook"
        assert 30 <= len(tags["description"]) <= 200
        assert tags["description"] == tags["og:description"]
        assert (site / tags["og:image"].removeprefix(book)).stat().st_size < 150_000
    for key in ("og:title", "og:description"):
        assert len({tags[key] for tags in found.values()}) == len(found)
    assert len({tags["og:image"] for tags in found.values()}) == len(PAGES)


def test_the_map_of_the_site_names_every_page(site):
    book = project.urls()["Documentation"]
    listed = re.findall(r"<loc>([^<]+)</loc>", (site / "sitemap.xml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(f"{book}{name}.html" for name in PAGES + TRANSLATED)
    assert f"Sitemap: {book}sitemap.xml" in (site / "robots.txt").read_text(encoding="utf-8")


def test_who_is_lost_finds_the_book(open_page, site):
    """Whatever the depth of the address, the page has its looks and leads on."""
    book = urlparse(project.urls()["Documentation"])
    page = open_page("index.html")
    tab = page.tab

    def serve(route):
        file = site / unquote(urlparse(route.request.url).path).removeprefix(book.path)
        route.fulfill(path=file) if file.is_file() else route.fulfill(status=404, path=site / "404.html")

    tab.route(f"{book.scheme}://{book.netloc}/**", serve)
    page.problems.clear()
    tab.goto(f"{book.geturl()}chapters/no/such.html")
    assert [text for text in page.problems if "404" not in text] == []
    assert tab.get_by_role("heading", name="There is no such page").is_visible()
    assert tab.evaluate("getComputedStyle(document.querySelector('.bd-sidebar-primary')).display") != "none"
    tab.locator("main a", has_text="front page").click()
    assert tab.locator("h1").first.inner_text().startswith("When should you replace")


def test_a_reader_goes_to_another_language_and_back(open_page):
    tab = open_page("chapters/choosing.html").tab
    for language in ("zh-CN", "en"):
        tab.locator(f'.language-switch[hreflang="{language}"]').click()
        assert tab.evaluate("document.documentElement.lang") == language
        assert "/chapters/choosing.html" in tab.url
    tab.goto(tab.url.replace("choosing", "focal"))
    assert tab.locator(".language-switch").get_attribute("href") == "../zh/index.html"


def numbers(site, name):
    """The numbers of a page's text that come from cells and records."""
    text = (site / f"{name}.html").read_text(encoding="utf-8").split("<main", 1)[1]
    bound = re.findall(r'<span class="pasted-text">([^<]*)</span>|<strong>([\d,]+)', text)
    return sorted(re.findall(r"\d[\d.,]*\d|\d", " ".join(a or b for a, b in bound)))


@pytest.mark.parametrize("name", TRANSLATED)
def test_a_translation_shows_the_numbers_of_the_page(site, name):
    own = name.partition("/")[2]
    assert numbers(site, name) == numbers(site, own)
    assert len(numbers(site, name)) > (100 if own == "chapters/choosing" else 1)


@CHAPTERS
def test_a_chapter_ends_with_its_citation(open_page, chapter):
    tab = open_page(f"chapters/{chapter.slug}.html").tab
    box = tab.locator(".admonition.cite")
    assert not box.locator("pre").is_visible()
    box.locator("button.toggle-button").click()
    assert f"@incollection{{lossbook_{chapter.slug}," in box.locator("pre").inner_text()
    assert box.locator("button.copybtn").count() == 1


# ---------------------------------------------------------------- print


def test_the_book_is_printed_as_one_pdf(browser, tmp_path):
    """Every page of the book is in it, with links of the contents and notes for those that lead out."""
    page = pdf.one_page(ROOT, tmp_path)
    target = tmp_path / "book.pdf"
    tab = browser.new_page()
    tab.goto(page.as_uri(), wait_until="load")
    assert tab.evaluate(pdf.PREPARE) == len(PAGES) - 1
    assert tab.locator(".print-contents a").count() == len(PAGES) - 1
    assert tab.locator(".link-notes li").count() >= 20
    links = tab.evaluate("[...document.querySelectorAll('.print-contents a')].map(a => a.hash.slice(1))")
    tab.close()
    pdf.print_tab(browser, page, target)
    starts = pdf.pages_of(target)
    assert [starts[link] for link in links] == sorted(starts[link] for link in links)
    contents = "\n".join(sheet.extract_text() for sheet in PdfReader(target).pages[:2])
    assert all(re.search(rf"\b{starts[link]}\b", contents) for link in links), "the contents lack a page number"
    data = target.read_bytes()
    assert data.startswith(b"%PDF")
    assert max(int(count) for count in re.findall(rb"/Count (\d+)", data)) >= 100
