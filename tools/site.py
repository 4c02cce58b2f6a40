"""A Sphinx extension: what the world sees of the pages before it reads them.

Each page gets a description and a card with its title and its chapter's cover for those who share it, and the date on
which its text changed, by git. The site gets a sitemap, ``robots.txt`` and a page for addresses that lead nowhere.
"""

from __future__ import annotations

import io
import subprocess
import textwrap
from collections.abc import Iterator
from datetime import date
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from babel.dates import format_date
from docutils import nodes

from tools.chapters import ROOT, all_notebooks
from tools.languages import folder

CARDS = "_images/cards"
INK, BLUE, ORANGE, MUTED = "#14181f", "#2763F9", "#CC4303", "#48566b"


# ---------------------------------------------------------------- when a page changed


def changed(root: Path = ROOT) -> dict[str, str]:
    """The date of the last commit of each page's text; empty without git.

    A shallow clone knows its last commits alone: the first of them seems to add everything, and is left out.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True).stdout

    try:
        shallow = git("rev-parse", "--is-shallow-repository").strip() == "true"
        log = git("log", "--relative", "--name-only", "--format=%x00%cs %P", "--", "index.md", "chapters/*.md")
    except OSError:
        return {}
    found: dict[str, str] = {}
    for entry in log.split("\0")[1:]:
        head, *names = entry.split("\n")
        day, *parents = head.split()
        if parents or not shallow:
            for name in filter(None, names):
                found.setdefault(name.removesuffix(".md"), day)
    return found


# ---------------------------------------------------------------- cards


def card(title: str, cover: bytes | None, path: Path) -> None:
    """Draw a card of 1200 x 630 pixels: the title, below it the cover or the name of the book."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    def font(name: str, size: int) -> Any:
        return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{name}.ttf", size)

    image = Image.new("RGB", (1200, 630), "white")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 1200, 14), BLUE)
    size, wide = (58, 30) if len(title) < 60 else (46, 38)
    draw.multiline_text((60, 52), textwrap.fill(title, wide), INK, font("DejaVuSans-Bold", size), spacing=12)
    if cover:
        picture = Image.open(io.BytesIO(cover)).convert("RGBA")
        picture = picture.resize((850, round(850 * picture.height / picture.width)), Image.Resampling.LANCZOS)
        image.paste(picture, (60, 610 - picture.height), picture)
    draw.line((960, 470, 1130, 470), ORANGE, 6)
    draw.text((960, 490), "lossbook", BLUE, font("DejaVuSans-Bold", 36))
    draw.text((960, 545), "losses, derived\nand measured", MUTED, font("DejaVuSans", 21), spacing=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def describe(doctree: Any) -> str:
    """The first lines of a page's text, with the question that they answer."""
    first = next(
        (p for p in doctree.findall(nodes.paragraph) if p.astext() and not isinstance(p.parent, nodes.entry)), None
    )
    if first is None:
        return ""
    above = first.parent[0] if isinstance(first.parent, nodes.admonition) else None
    text = f"{above.astext()} {first.astext()}" if isinstance(above, nodes.title) else first.astext()
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:199].rstrip()}…"


def present(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """The page's date, description and card."""
    if doctree is None or app.builder.name != "html":
        return
    root, language = Path(app.srcdir), app.config.language
    if day := app.changed.get(pagename):
        context["last_updated"] = format_date(date.fromisoformat(day), "long", locale=language)
    title = app.env.titles[pagename].astext()
    own = next((meta["content"] for meta in doctree.findall(nodes.meta) if meta.get("name") == "description"), "")
    tags = {
        "og:type": "article",
        "og:site_name": app.config.html_title,
        "og:title": title,
        "og:description": own or describe(doctree),
        "og:url": context["pageurl"],
        "og:locale": language,
        "og:image": f"{app.config.html_baseurl.removesuffix(folder(language))}{CARDS}/{pagename}.png",
        "og:image:width": "1200",
        "og:image:height": "630",
        "twitter:card": "summary_large_image",
    }
    lines = [f'<meta property="{name}" content="{escape(text)}" />' for name, text in tags.items()]
    if not own:
        lines.append(f'<meta name="description" content="{escape(tags["og:description"])}" />')
    context["metatags"] = "\n".join([context.get("metatags", ""), *lines, ""])
    target = Path(app.outdir) / CARDS / f"{pagename}.png"
    if not folder(language):  # the letters of the card are Latin: pages in other languages show that of the book
        main = next((page.main for page in all_notebooks(root) if page.slug == pagename.rpartition("/")[2]), "")
        cover = root / "_static" / "covers" / f"{main}.png"
        card(title, cover.read_bytes() if cover.exists() else None, target)


# ---------------------------------------------------------------- the site


def lost(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The page that a server shows at an address that leads nowhere; its links start from the book's own."""
    base = urlparse(app.config.html_baseurl).path
    text = (
        "<section><h1>There is no such page</h1>"
        "<p>The address may be mistyped, or the page has moved.</p>"
        '<p>Go to the <a href="index.html">front page</a>, to <a href="chapters/choosing.html">Which loss should I '
        'use?</a>, or <a href="search.html">search</a> the book.</p></section>'
    )
    tags = f'<base href="{escape(base)}" /><meta name="robots" content="noindex" />'
    yield "404", {"title": "There is no such page", "body": text, "metatags": tags}, "page.html"


def list_pages(app: Any, exception: Exception | None) -> None:
    """Write ``sitemap.xml`` and ``robots.txt``."""
    if exception is not None or app.builder.name != "html":
        return
    from tools.catalogues import languages

    base, output = app.config.html_baseurl, Path(app.outdir)
    places = [("", sorted(app.env.found_docs)), *((folder(lang), names) for lang, names in languages(ROOT).items())]
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">']
    for place, names in places:
        for name in names:
            day = f"<lastmod>{app.changed[name]}</lastmod>" if name in app.changed else ""
            lines.append(f"<url><loc>{escape(f'{base}{place}{name}.html')}</loc>{day}</url>")
    (output / "sitemap.xml").write_text("\n".join([*lines, "</urlset>", ""]), encoding="utf-8")
    (output / "robots.txt").write_text(f"User-agent: *\nAllow: /\nSitemap: {base}sitemap.xml\n", encoding="utf-8")


def note_dates(app: Any) -> None:
    app.changed = changed(Path(app.srcdir))


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", note_dates)
    app.connect("html-page-context", present)
    app.connect("html-collect-pages", lost)
    app.connect("build-finished", list_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
