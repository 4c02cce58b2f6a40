"""Figures that a reader moves: one for each chapter, the same in the pages, in Jupyter and in Colab.

A figure is a piece of HTML with its scripts in it; nothing is fetched. Where scripts are off, in print and on GitHub a
picture of its first setting stands in its place.
"""

from __future__ import annotations

import base64
import html
import json
from importlib import resources

from lossbook._extras import require

LIBRARY = ("<!-- touch: scripts -->", "<!-- touch: end -->")
"""What stands around the styles and scripts in the HTML; pages and stored notebooks leave that out."""

_FOLDER = resources.files("lossbook") / "_touch"


def figures() -> dict[str, str]:
    """The names of the figures, each with what it shows in words.

    Example:
        >>> sorted(figures())
        ['accuracy', 'am_softmax', 'emo', 'focal', 'multilabel_softmax', 'soft_labels', 'spans']
    """
    words: dict[str, str] = json.loads((_FOLDER / "figures.json").read_text(encoding="utf-8"))
    return words


def touch(name: str) -> None:
    """Display a figure to touch; the last line of a notebook's cell.

    The cell's tags are ``touch``, ``hide-input`` and ``nbval-ignore-output``: what the cell shows is HTML with scripts,
    which is not compared when the notebook runs again.

    Args:
        name: the figure's name, a chapter's slug; :func:`figures` lists them.

    Raises:
        ValueError: there is no such figure.
    """
    require("IPython.display", "notebook").display(bundle(name), raw=True)


def bundle(name: str) -> dict[str, str]:
    """What a cell shows: the figure as HTML, its picture, and words for who sees neither."""
    return {"image/png": _picture(name), "text/html": page(name), "text/plain": _words(name)}


def page(name: str) -> str:
    """The HTML of a figure, with everything that it needs."""
    words, picture = html.escape(_words(name)), _picture(name)
    start, end = LIBRARY
    # once in a document, and not as a module of a notebook that has its own loader
    library = f"window.JXG || (function (define, module, exports) {{\n{_text('jsxgraphcore.js')}\n}})();"
    parts = (library, _text("common.js"), _text(f"{name}.js"))
    scripts = "\n".join(f"<script>\n{part}\n</script>" for part in parts)
    return (
        f'<div class="touch" data-figure="{name}">'
        f'<img class="touch-picture" src="data:image/png;base64,{picture}" width="460" alt="{words}"></div>\n'
        f"{start}\n<style>\n{_text('touch.css')}\n</style>\n{scripts}\n{end}\n"
    )


def stored(text: str) -> str:
    """A figure's HTML as it is kept in a notebook, without its styles and scripts: the picture, until it is run."""
    start, end = LIBRARY
    before, found, rest = text.partition(start)
    return before.rstrip() + rest.partition(end)[2] if found else text


def _words(name: str) -> str:
    known = figures()
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(sorted(known))}, got {name!r}")
    return known[name]


def _picture(name: str) -> str:
    return base64.b64encode((_FOLDER / f"{name}.png").read_bytes()).decode("ascii")


def _text(file: str) -> str:
    return (_FOLDER / file).read_text(encoding="utf-8")
