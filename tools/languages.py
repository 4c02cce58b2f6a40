"""A Sphinx extension: the pages that have a catalogue are built in its language, too, below ``zh/`` and the like.

Once the book is built, the same Sphinx reads the sources of these pages again, translated by ``tools/catalogues.py``,
and writes them into their own folder. So numbers, equations, citations and links are those of the book; a link to a
page that is not translated, and all that pages share, leads back to it. A page that has no text in one of the
languages links to the front page there. What cells printed, records say and the theme writes on its buttons is put into
the language by ``phrases.po``, without executing a cell again.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pydata_sphinx_theme
import sphinx
import sphinx_book_theme
from babel import Locale
from docutils import nodes
from sphinx import addnodes
from sphinx.locale import init as init_locale
from sphinx.locale import translators
from sphinx.util.build_phase import BuildPhase

from tools import catalogues
from tools.chapters import all_notebooks
from tools.reader import FACT, execution_facts

OWN = "en"
SHARED = re.compile(r"""(?<=["'(=])((?:\./)?(?:\.\./)*)(?=_(?:static|images|sources)/|searchindex\.js)""")
CELL = re.compile(r"(?<=>)([^<>]+)(?=</(?:th|td|caption)>)")  # a text in a table that a cell printed
THEMES = {
    "sphinx": [Path(sphinx.__file__).parent / "locale", Path(pydata_sphinx_theme.__file__).parent / "locale"],
    "booktheme": [Path(sphinx_book_theme.__file__).parent / "theme/sphinx_book_theme/static/locales"],
}


def folder(language: str) -> str:
    """The folder of a language's pages: ``zh`` for ``zh_CN``, none for the book's own."""
    return "" if language == OWN else language.partition("_")[0] + "/"


def tag(language: str) -> str:
    """How HTML calls a language."""
    return language.replace("_", "-")


# ---------------------------------------------------------------- reading


def translate_source(app: Any, docname: str, source: list[str]) -> None:
    """Read the translated text in the place of the page's own, and what it tells of records."""
    root, language = Path(app.srcdir), app.config.language
    if language == OWN:
        return
    text = catalogues.replace(source[0], catalogues.translations(language, docname, root))
    chapter = next((page for page in all_notebooks(root) if docname == f"chapters/{page.slug}"), None)
    facts, phrases = execution_facts(chapter) if chapter else {}, phrases_of(app)
    source[0] = FACT.sub(lambda m: catalogues.say(facts[m["name"]], phrases) if m["name"] in facts else m[0], text)


def phrases_of(app: Any) -> dict[str, str]:
    """What the language has for the phrases of cells, records and the theme."""
    return catalogues.translations(app.config.language, catalogues.PHRASES, Path(app.srcdir))


def say_table(text: str, phrases: dict[str, str]) -> str:
    """A table in HTML whose cells are said in another language.

    Example:
        >>> say_table("<tr><td>1 &lt; 2</td><td>holds</td></tr>", {"holds": "成立"})
        '<tr><td>1 &lt; 2</td><td>成立</td></tr>'
    """
    return CELL.sub(lambda m: html.escape(catalogues.say(html.unescape(m[1]), phrases), quote=False), text)


def translate_values(app: Any, doctree: Any) -> None:
    """Translate what cells put into the page and the names of the book's parts; headings keep their addresses."""
    if app.config.language == OWN:
        return
    for section, own in zip(
        doctree.findall(nodes.section), app.env.get_doctree(app.env.docname).findall(nodes.section), strict=True
    ):
        section["ids"] = own["ids"]
    phrases = phrases_of(app)
    for value in doctree.findall(nodes.inline):
        if "pasted-text" in value["classes"]:
            value.children = [nodes.Text(catalogues.say(value.astext(), phrases))]
    for cell in doctree.findall(nodes.container):
        for prompt in ("prompt_show", "prompt_hide"):
            if prompt in cell:
                cell[prompt] = catalogues.say(cell[prompt], phrases)
        if "cell_output" not in cell["classes"]:
            continue
        for table in cell.findall(nodes.raw):
            table.children = [nodes.Text(say_table(table.astext(), phrases))]
        for printed in cell.findall(nodes.literal_block):
            lines = [catalogues.say(line, phrases) for line in printed.astext().split("\n")]
            printed.rawsource = "\n".join(lines)
            printed.children = [nodes.Text(printed.rawsource)]
    names = catalogues.translations(app.config.language, app.env.docname, Path(app.srcdir))
    for contents in doctree.findall(addnodes.toctree):
        for name in contents.extract_original_messages():
            contents.apply_translated_message(name, names.get(catalogues.normal(name), name))


# ---------------------------------------------------------------- writing


@contextmanager
def spoken(app: Any, language: str, pages: list[str]) -> Iterator[None]:
    """Sphinx, its theme and its addresses in another language."""
    builder, own = app.builder, app.builder.get_target_uri
    config: dict[str, Any] = {"language": language, "html_baseurl": app.config.html_baseurl + folder(language)}
    writer: dict[str, Any] = {
        "outdir": Path(app.outdir) / folder(language),
        "doctreedir": Path(app.doctreedir) / folder(language),
        "copysource": False,
        "load_indexer": lambda docnames: None,  # the search is that of the book
        "get_target_uri": lambda name, typ=None: own(name, typ) if name in pages else f"../{own(name, typ)}",
    }
    with ExitStack() as stack:
        stack.enter_context(patch.dict(translators, clear=True))
        stack.enter_context(patch.multiple(app.config, **config))
        stack.enter_context(patch.multiple(builder, **writer))
        for catalogue, places in THEMES.items():
            translator, _ = init_locale(map(str, places), language, catalogue)
            if catalogue == "sphinx":
                builder.templates.environment.install_gettext_translations(translator)
        yield


def write_pages(app: Any, exception: Exception | None) -> None:
    """Read and write the translated pages."""
    if exception is not None or app.builder.name != "html":
        return
    builder, env = app.builder, app.env
    for language, pages in catalogues.languages(Path(app.srcdir)).items():
        with spoken(app, language, pages):
            app.phase = BuildPhase.READING
            builder._read_serial(pages)
            app.emit("env-updated", env)
            for page in pages:  # the contents of the front page are those of the sidebar
                env._pickled_doctree_cache[page] = (builder.doctreedir / f"{page}.doctree").read_bytes()
            vars(env).pop("master_doctree", None)
            builder.prepare_writing(set(pages))
            builder._write_serial(pages)
            for page in pages:
                file = Path(builder.get_outfilename(page))
                file.write_text(SHARED.sub(r"\1../", file.read_text(encoding="utf-8")), encoding="utf-8")


def offer_languages(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Links to the page in the other languages: for readers, and for those who list pages."""
    pages = catalogues.languages(Path(app.srcdir))
    here = app.config.language
    top = "../" * (pagename.count("/") + folder(here).count("/"))
    if folder(here):
        context["content_root"] = top
    # The addresses of pages begin with that of the book, whose own language has no folder.
    book = app.config.html_baseurl.removesuffix(folder(here)) if folder(here) else app.config.html_baseurl
    context["languages"] = [
        {"name": Locale.parse(language).language_name.capitalize(), "tag": tag(language), "url": f"{top}{page}.html"}
        for language, names in {OWN: [pagename], **pages}.items()
        for page in [folder(language) + (pagename if pagename in names else "index")]
        if language != here
    ]
    spoken_in = [OWN, *(language for language, names in pages.items() if pagename in names)]
    if len(spoken_in) > 1:
        context["metatags"] = context.get("metatags", "") + "".join(
            f'<link rel="alternate" hreflang="{tag(language)}" href="{book}{folder(language)}{pagename}.html" />\n'
            for language in spoken_in
        )


def name_buttons(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Name the theme's buttons in the language of the page, where the theme has no word for them."""
    if app.config.language == OWN:
        return
    phrases = phrases_of(app)
    for group in context.get("header_buttons", []):
        for button in [group, *group.get("buttons", [])]:
            for key in {"text", "tooltip"} & button.keys():
                button[key] = catalogues.say(button[key], phrases)


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", translate_source)
    app.connect("doctree-read", translate_values, priority=400)  # before Sphinx collects the contents
    app.connect("html-page-context", offer_languages)
    app.connect("html-page-context", name_buttons, priority=900)  # after the theme has put them there
    app.connect("build-finished", write_pages, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
