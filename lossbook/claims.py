"""Claims that check themselves, numbers that the text takes from a cell, and sources shown beside their formulas."""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

import numpy as np
from torch import Tensor

from lossbook._checks import describe

HIDDEN = "application/papermill.record/"  # what MyST-NB puts before the type of an output that only the text uses


class ClaimError(AssertionError):
    """A claim that does not hold."""


def claim(text: str, condition: object, **measured: object) -> None:
    """Print a claim with what was measured, or raise if it does not hold.

    Args:
        text: The claim, as a sentence a reader can quote.
        condition: Whether it holds: one truth value (of Python, NumPy or torch).
        **measured: The numbers that decide it, by name.

    Raises:
        ClaimError: The claim does not hold. The message has the text and the numbers.
        TypeError: ``condition`` is no truth value, for example an array or a number.

    Example:
        >>> claim("two is more than one", 2 > 1, two=2, ratio=2.0)
        ✓ two is more than one (two = 2, ratio = 2)
    """
    holds = _truth(condition)
    numbers = ", ".join(f"{name} = {as_text(value)}" for name, value in measured.items())
    line = f"{text} ({numbers})" if numbers else text
    if not holds:
        raise ClaimError(f"does not hold: {line}")
    print(f"✓ {line}")


def _truth(condition: object) -> bool:
    """``condition`` as a bool. Numbers and arrays are refused: their truth is an accident."""
    if isinstance(condition, Tensor) and condition.dim() == 0:
        condition = condition.item()
    if isinstance(condition, np.ndarray) and condition.ndim == 0:
        condition = condition[()]
    if not isinstance(condition, (bool, np.bool_)):
        what = f"array of shape {condition.shape}" if isinstance(condition, np.ndarray) else describe(condition)
        raise TypeError(f"condition must be one truth value, got {what}")
    return bool(condition)


def as_text(value: object, fmt: str | None = None) -> str:
    """A value as a reader should see it.

    Args:
        value: A number, a one-element tensor or array, or anything with a text form.
        fmt: A format such as ``".1%"``. None gives three significant digits to fractions.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if fmt is None:
        fmt = ".3g" if isinstance(value, float) else ""
    return format(value, fmt)


def glue(name: str, value: object, fmt: str | None = None) -> str | None:
    """Give the chapter's text a number: ``{glue:text}`name``` then shows it. The cell shows nothing.

    Args:
        name: Unique in the chapter, without a colon.
        value: See :func:`as_text`.
        fmt: See :func:`as_text`.

    Returns:
        Outside a notebook the text that the page would show, and nothing else happens. In a notebook None, since a
        cell shows the value of its last line.

    Raises:
        ValueError: ``name`` is empty or has a colon.
    """
    if not name or ":" in name:
        raise ValueError(f"name must be some text without a colon (the page reads it as a format), got {name!r}")
    text = as_text(value, fmt)
    if not _in_notebook():
        return text
    from IPython.display import display

    # The page evaluates what it finds as a Python literal. The quotes keep "0.50" from becoming 0.5.
    metadata = {"scrapbook": {"name": name, "mime_prefix": HIDDEN}}
    display({f"{HIDDEN}text/plain": repr(text)}, raw=True, metadata=metadata)
    return None


def show_source(obj: Any) -> None:
    """Show the source of a function or class, without its docstrings, with its comments.

    Args:
        obj: What to show. Outside a notebook it is printed.
    """
    source = without_docstrings(textwrap.dedent(inspect.getsource(obj)))
    if _in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(f"```python\n{source}\n```"))
    else:
        print(source)


def without_docstrings(source: str) -> str:
    """The lines of Python ``source`` that belong to no docstring."""
    lines = source.splitlines()
    removed: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            docstring = node.body[0]
            first, last = docstring.lineno - 1, docstring.end_lineno or docstring.lineno
            if lines[first][: docstring.col_offset].strip():
                continue  # it shares its line with the def
            removed.update(range(first, last))
            if len(node.body) == 1:  # nothing else: the body needs a statement
                lines[first] = " " * docstring.col_offset + "..."
                removed.discard(first)
    return "\n".join(line for number, line in enumerate(lines) if number not in removed).strip("\n")


def _in_notebook() -> bool:
    """Whether IPython runs this, so that outputs can be displayed."""
    try:
        from IPython import get_ipython
    except ModuleNotFoundError:
        return False
    return get_ipython() is not None
