"""A Sphinx extension: pages show the outputs that are stored in the chapter's notebook.

MyST-NB asks :func:`read_page` for the notebook behind a page's text. It answers with the cells of the text and the
outputs of the executed notebook, so building a page executes nothing. A chapter whose outputs are stale stops the
build.
"""

from __future__ import annotations

import base64
import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from docutils import nodes
from sphinx.errors import SphinxError

from tools import generated, project
from tools.chapters import CATALOGUES, PREVIEW, ROOT, StaleChapterError, all_notebooks, code_cells
from tools.provenance import deciding_code, record_path
from tools.reader import (
    BOUND,
    LATER,
    SourceError,
    bound_pages,
    caption_numbers,
    execution_facts,
    insert_bound,
    insert_facts,
    number_captions,
    records_told,
)

COVERS = "_static/covers"  # made by the build, not committed


class StaleError(SphinxError):  # type: ignore[misc]
    """Stops the build with one line instead of a traceback."""

    category = "Stale chapter"


def read_page(text: str) -> Any:
    """The notebook of a page: for a chapter with its stored outputs, for other pages the text alone."""
    if os.environ.get(CATALOGUES):
        return jupytext.reads(text, fmt="md:myst")
    page = jupytext.reads(generated.insert(text), fmt="md:myst")
    slug = page.metadata.get("slug")
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = resolve(cell.source, f"chapters/{slug}.md" if slug else "a page without cells")
    if slug is None:
        return page
    chapter = next(c for c in all_notebooks() if c.slug == slug)
    try:
        chapter.require_fresh()
    except StaleChapterError as error:
        if not os.environ.get(PREVIEW):
            raise StaleError(str(error)) from None
    facts, captions = execution_facts(chapter), caption_numbers(chapter)
    words: dict[str, str] = generated.words() if chapter.number else {}
    linked: set[str] = set()
    for cell in page.cells:
        if cell.cell_type == "markdown":
            cell.source = generated.link_words(cell.source, words, linked)
            cell.source = generated.with_names(insert_facts(number_captions(cell.source, captions), facts), chapter)
    for cell, stored in pairs(page, chapter.notebook):
        cell.outputs = copy.deepcopy(stored.outputs)
        cell.execution_count = stored.execution_count
    if chapter.kind == "chapter":
        page.cells.append(nbformat.v4.new_markdown_cell(generated.citation(chapter)))
    return page


def pairs(page: Any, notebook: Any | None) -> Iterator[tuple[Any, Any]]:
    """The code cells of a page, each with the one of its notebook; in a preview those that have one."""
    if not os.environ.get(PREVIEW):
        yield from zip(code_cells(page), code_cells(notebook), strict=True)
        return
    stored = {cell.source.strip(): cell for cell in code_cells(notebook)} if notebook else {}
    for cell in code_cells(page):
        if cell.source.strip() in stored:
            yield cell, stored[cell.source.strip()]


def resolve(text: str, where: str) -> str:
    """The text with the numbers that it takes from other pages."""
    try:
        return insert_bound(text, ROOT, where)
    except SourceError as error:
        if os.environ.get(PREVIEW):
            return BOUND.sub(LATER, text)
        raise StaleError(str(error)) from None


def take_addresses(app: Any, config: Any) -> None:
    """The book's and the repository's address, which ``pyproject.toml`` names."""
    urls = project.urls(Path(app.srcdir))
    config.html_baseurl = urls["Documentation"]
    config.html_theme_options["repository_url"] = urls["Repository"]


def check_chapters(app: Any) -> None:
    """Stop before anything is read: Sphinx would skip an unchanged page, stale or not."""
    try:
        for chapter in [] if os.environ.get(PREVIEW) else all_notebooks(Path(app.srcdir)):
            chapter.require_fresh()
    except StaleChapterError as error:
        raise StaleError(str(error)) from None


def draw_covers(app: Any) -> None:
    """Put the picture of each chapter's cell with the tag ``cover`` where the front page finds it."""
    for chapter in all_notebooks(Path(app.srcdir)):
        for cell, stored in pairs(chapter.source, chapter.notebook):
            pictures = [output.data["image/png"] for output in stored.outputs if "image/png" in output.get("data", {})]
            if "cover" in cell.metadata.get("tags", []) and pictures:
                path = Path(app.srcdir) / COVERS / f"{chapter.slug}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(pictures[-1]))


def note_dependencies(app: Any, docname: str, source: list[str]) -> None:
    """Read a page again when its notebook or a record that it shows changed, though its text did not."""
    for file in generated.sources(source[0], Path(app.srcdir)):
        app.env.note_dependency(str(file))
    for page in bound_pages(source[0]):
        app.env.note_dependency(str(Path(app.srcdir) / "chapters" / f"{page}.ipynb"))
    app.env.note_dependency(str(Path(app.srcdir) / "chapters" / "notation.md"))  # the words of the glossary
    notebook = Path(app.srcdir) / f"{docname}.ipynb"
    if notebook.exists():
        app.env.note_dependency(str(notebook))
        root = Path(app.srcdir)
        app.env.note_dependency(str(root / "data/results/timings.json"))
        # where a page speaks of a record, it says whether the code behind it has changed
        for slug in records_told(next(page for page in all_notebooks(root) if page.slug == notebook.stem)).values():
            for name in (record_path(slug, root), *map(root.joinpath, deciding_code(slug, root))):
                app.env.note_dependency(str(name))


def mark_captions(app: Any, doctree: Any) -> None:
    """The line in italics under a figure is its caption: a paragraph that holds nothing else."""
    for paragraph in doctree.findall(nodes.paragraph):
        if len(paragraph.children) == 1 and isinstance(paragraph.children[0], nodes.emphasis):
            paragraph["classes"] += ["caption-line"] if paragraph.astext().startswith("Figure") else []


def tidy_page(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Leave out what the theme loads for live code: it needs a network, and twice loaded it fails in the console."""
    for kind in ("script_files", "css_files"):
        context[kind] = [file for file in context.get(kind, []) if not is_thebe(file)]


def is_thebe(file: Any) -> bool:
    """Whether a script or style belongs to the live-code extension."""
    return "thebe" in f"{getattr(file, 'filename', file)} {getattr(file, 'attributes', '')}".lower()


def offer_notebooks(app: Any, exception: Exception | None) -> None:
    """Let the download button give the reader's notebook instead of the page's own."""
    if exception is None and app.builder.format == "html":
        for chapter in [page for page in all_notebooks(Path(app.srcdir)) if page.notebook]:
            target = Path(app.outdir) / "_sources" / "chapters" / chapter.notebook_path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(chapter.notebook_path, target)


def drop_unused(app: Any, exception: Exception | None) -> None:
    """Leave out what no page loads: MathJax's other bundles and drawings, and maps for who debugs the theme."""
    static = Path(app.outdir) / "_static"
    if exception is not None or app.builder.format != "html" or not (static / "mathjax").exists():
        return
    for bundle in (static / "mathjax").glob("*.js"):
        if bundle.name not in ("tex-chtml.js", "core.js", "loader.js", "startup.js"):
            bundle.unlink()
    shutil.rmtree(static / "mathjax" / "output" / "svg", ignore_errors=True)
    shutil.rmtree(static / "mathjax" / "input" / "mml", ignore_errors=True)
    for path in static.rglob("*.map"):
        path.unlink()


def setup(app: Any) -> dict[str, bool]:
    for name in ("bound", "stamp") if os.environ.get(CATALOGUES) else ():
        app.add_generic_role(name, nodes.literal)
    app.connect("config-inited", take_addresses)
    app.connect("builder-inited", check_chapters)
    app.connect("builder-inited", draw_covers)
    app.connect("source-read", note_dependencies)
    app.connect("doctree-read", mark_captions)
    app.connect("html-page-context", tidy_page, priority=900)
    app.connect("build-finished", offer_notebooks)
    app.connect("build-finished", drop_unused)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
