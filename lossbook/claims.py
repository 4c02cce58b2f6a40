"""Claims that check themselves, numbers that the text takes from a cell, and sources shown beside their formulas."""

from __future__ import annotations

import ast
import inspect
import io
import itertools
import re
import textwrap
import tokenize
from typing import Any

import numpy as np
from torch import Tensor

from lossbook._checks import describe

HIDDEN = "application/papermill.record/"  # what MyST-NB puts before the type of an output that only the text uses
# A zero with a sign, a minus before or inside a number, the digits of a large one, a size such as "64 x 10": no part of
# a word, a range, a version or a date.
ZERO = re.compile(r"(?<![\w.\-−–])[-−+](0(?:\.0+)?)(?!\.?\d|\w)")
MINUS = re.compile(r"(?<![\w.\-−–])-(?=\.?\d|inf\b)|(?<=\de)-(?=\d)")
LARGE = re.compile(r"(?<![\w.,/:\-–])\d{5,}(?![\w,/:]|\.\d)")
TIMES = re.compile(r"(?<=\d) x (?=\d)")


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
        fmt: A format such as ``".1%"``. None gives three significant digits to fractions, commas to whole numbers.
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if fmt is None:
        fmt = ".3g" if isinstance(value, float) else "," if type(value) is int else ""
    return typeset(format(value, fmt))


def typeset(text: str) -> str:
    """Numbers as a book prints them: a minus sign, no sign before a zero, commas in thousands, a sign for "times".

    Example:
        >>> typeset("-0.4 (-0.0 to +0.3), 100000 x 80, clinc-150, 1e-9")
        '−0.4 (0.0 to +0.3), 100,000 × 80, clinc-150, 1e−9'
    """
    text = MINUS.sub("−", ZERO.sub(r"\1", text))
    return TIMES.sub(" × ", LARGE.sub(lambda found: f"{int(found[0]):,}", text))


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
    """Show the source of a function or class, without its docstrings, with its comments, in lines of 88 columns.

    Args:
        obj: What to show. Outside a notebook it is printed.
    """
    source = narrow(without_docstrings(textwrap.dedent(inspect.getsource(obj))))
    if _in_notebook():
        from IPython.display import Markdown, display

        display(Markdown(f"```python\n{source}\n```"))
    else:
        print(source)


def narrow(source: str, width: int = 88) -> str:
    """Python with its long lines broken: behind an opening bracket and before the closing one, comments moved above.

    A line that has no bracket to break at stays as it is.

    Example:
        >>> print(narrow("def f(first: float, second: float) -> float:\\n    return first", 30))
        def f(
            first: float,
            second: float,
        ) -> float:
            return first
    """
    lines: list[str] = []
    for line in source.split("\n"):
        inside = bool(lines) and lines[-1].endswith(("(", "[", "{"))  # a formatter put all arguments on one line
        lines += _narrow_line(line, width, inside=inside)
    broken = "\n".join(lines)
    try:
        same = ast.dump(ast.parse(broken)) == ast.dump(ast.parse(source))
    except SyntaxError:
        same = False
    return broken if same else source


def _narrow_line(line: str, width: int, *, inside: bool = False) -> list[str]:
    """One line as several, none longer than ``width`` where that can be done."""
    if len(line) <= width:
        return [line]
    indent = line[: len(line) - len(line.lstrip())]
    pairs, comment, commas = _brackets(line)
    if comment is not None:
        moved = [f"{indent}{line[comment:]}", *_narrow_line(line[:comment].rstrip(), width)]
        return moved if line[:comment].strip() else [line]
    if inside and commas[0]:
        return [f"{indent}{part}," for part in _parts(line, [-1, *commas[0], len(line)])]
    if not pairs:
        return [line]
    is_def = re.match(r"\s*(async )?def ", line)
    # a signature opens its first bracket, any other statement the largest of those that are in no other
    opening, closing = pairs[0] if is_def else max(pairs, key=lambda pair: pair[1] - pair[0])
    own = [i for i in commas[1] if opening < i < closing]
    deeper = indent + "    "
    body = [deeper + line[opening + 1 : closing]]
    if is_def or len(body[0]) > width:
        body = [deeper + part + "," * bool(own or is_def) for part in _parts(line, [opening, *own, closing])]
    body = [part for entry in body for part in _narrow_line(entry, width)]
    return [line[: opening + 1], *body, indent + line[closing:]]


def _parts(line: str, cuts: list[int]) -> list[str]:
    """What stands between the characters at ``cuts``."""
    parts = [line[a + 1 : b].strip() for a, b in itertools.pairwise(cuts)]
    return [part for part in parts if part]


def _brackets(line: str) -> tuple[list[tuple[int, int]], int | None, dict[int, list[int]]]:
    """Of one line: the outermost pairs of brackets, where a comment begins, and the commas outside and one deep."""
    pairs: list[tuple[int, int]] = []
    open_at: list[int] = []
    commas: dict[int, list[int]] = {0: [], 1: []}
    try:
        for token in tokenize.generate_tokens(io.StringIO(line.strip()).readline):
            at = token.start[1] + len(line) - len(line.lstrip())
            if token.type == tokenize.COMMENT:
                return pairs, at, commas
            if token.type != tokenize.OP:
                continue
            if token.string in "([{":
                open_at.append(at)
            elif token.string in ")]}" and open_at:
                start = open_at.pop()
                pairs += [] if open_at else [(start, at)]
            elif token.string == "," and len(open_at) in commas:
                commas[len(open_at)].append(at)
    except (tokenize.TokenError, SyntaxError):
        pass  # part of a statement: what was read so far is right
    return pairs, None, commas


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
