"""The book's data that need no network: digit canvases, questions, the files beside the book, and records."""

from __future__ import annotations

import csv
import importlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossbook._extras import require

DIGIT_SIZE = 8  # pixels, the side of one of scikit-learn's digits
Split = Literal["train", "validation", "test"]
# Where scikit-learn's 1797 digits are cut. The file is ordered by writer, so blocks keep most writers apart.
SPLITS: dict[str, slice] = {"train": slice(0, 1100), "validation": slice(1100, 1400), "test": slice(1400, 1797)}


@cache
def _source_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """All 1797 digits, (1797, 8, 8) in [0, 1], and which digit each is, (1797,)."""
    bundle = require("sklearn.datasets", "data").load_digits()
    return (bundle.images / 16).astype(np.float32), bundle.target.astype(np.int64)


def digit_canvases(
    n: int,
    *,
    grid: tuple[int, int] = (4, 4),
    max_digits: int = 3,
    noise: float = 0.2,
    seed: int,
    split: Split = "train",
) -> tuple[Tensor, Tensor]:
    """Canvases with a few handwritten digits, and which digit stands in which cell.

    A canvas is a grid of 8 x 8 pixel cells. Each has 0 to ``max_digits`` digits, every number equally likely, in
    different cells. Label ``cell * 10 + digit`` is true where that digit stands in that cell, cells counted row by row.
    The digits are those inside scikit-learn; no two splits share one.

    Args:
        n: How many canvases.
        grid: Rows and columns of cells. There are ``10 * rows * columns`` labels.
        max_digits: The most digits on a canvas, cut to the number of cells.
        noise: Standard deviation of the normal noise on each pixel. Pixels are clipped to [0, 1] after it.
        seed: Same seed, same canvases.
        split: Which digits to draw from: ``"train"``, ``"validation"`` or ``"test"``.

    Returns:
        Images, float32 ``(n, 1, 8 * rows, 8 * columns)`` in [0, 1], and targets, bool ``(n, 10 * rows * columns)``.

    Raises:
        ValueError: A size, the noise or the split is out of range.

    Example:
        >>> images, targets = digit_canvases(5, grid=(2, 3), seed=0)
        >>> images.shape, targets.shape
        (torch.Size([5, 1, 16, 24]), torch.Size([5, 60]))
    """
    rows, columns = grid
    if n < 0 or rows < 1 or columns < 1 or max_digits < 0 or noise < 0:
        raise ValueError(
            "n, max_digits and noise must be at least 0 and both sides of grid at least 1, "
            f"got n={n}, max_digits={max_digits}, noise={noise}, grid={grid}"
        )
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    digits, names = (array[SPLITS[split]] for array in _source_digits())
    rng = np.random.default_rng(seed)

    # Every canvas draws max_digits different cells and as many digits, then keeps the first 0 to max_digits of them.
    cells = rows * columns
    most = min(max_digits, cells)
    cell = rng.random((n, cells)).argsort(axis=1)[:, :most]
    source = rng.integers(len(digits), size=(n, most))
    kept = np.arange(most) < rng.integers(most + 1, size=(n, 1))
    canvas = np.nonzero(kept)[0]
    cell, source = cell[kept], source[kept]

    cells_of = np.zeros((n, rows, DIGIT_SIZE, columns, DIGIT_SIZE), dtype=np.float32)
    cells_of[canvas, cell // columns, :, cell % columns, :] = digits[source]
    images = cells_of.reshape(n, 1, rows * DIGIT_SIZE, columns * DIGIT_SIZE)
    if noise:
        images += np.float32(noise) * rng.standard_normal(images.shape, dtype=np.float32)
        np.clip(images, 0, 1, out=images)

    targets = np.zeros((n, cells * 10), dtype=bool)
    targets[canvas, cell * 10 + names[source]] = True
    return torch.from_numpy(images), torch.from_numpy(targets)


def _data_folder() -> Path:
    """``data/`` of the checkout, or its copy inside the installed package."""
    package = Path(__file__).parent.parent
    checkout = package.parent
    # An installed package has a stranger's folders beside it, so a checkout must show its pyproject.toml.
    return checkout / "data" if (checkout / "pyproject.toml").is_file() else package / "_data"


def book_file(relative: str) -> Path:
    """The path of a file that the book reads, for example ``"questions.csv"``.

    Args:
        relative: The file's path inside ``data/``.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = _data_folder() / relative
    if not path.is_file():
        raise FileNotFoundError(
            f"the book has no data file {relative!r}: neither the checkout nor the package holds it"
        )
    return path


class Questions(NamedTuple):
    """Questions in groups of paraphrases (see :func:`questions`)."""

    text: list[str]
    """N questions, as people type them."""
    group: Tensor
    """Which group each belongs to, int64 ``(N,)``."""
    names: list[str]
    """The name of each group, in the order of its number."""
    topics: list[str]
    """The topic of each group. Several groups share one."""


def questions() -> Questions:
    """The everyday questions of ``data/questions.csv``: 126 groups, each one question in 11 to 13 wordings.

    They were written for this book; ``data/README.md`` says how.

    Example:
        >>> q = questions()
        >>> len(q.text), len(q.names), len(set(q.topics))
        (1518, 126, 18)
        >>> q.names[q.group[0]], q.text[0]
        ('shop_cancel_order', 'How do I cancel an order I placed an hour ago?')
    """
    with open(book_file("questions.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    topics = {row["group"]: row["topic"] for row in rows}  # in the order of the file
    names = list(topics)
    group = torch.tensor([names.index(row["group"]) for row in rows])
    return Questions([row["question"] for row in rows], group, names, list(topics.values()))


def load_record(slug: str) -> Any:
    """The record ``data/results/<slug>.json`` of an experiment or a benchmark, or None where none was made yet."""
    try:
        # Opening without looking first lets whoever watches opened files see a missing record too.
        with open(_data_folder() / "results" / f"{slug}.json", encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return None


def load_published(slug: str) -> Any:
    """Figures that others published for the loss of a chapter, from ``data/published/<slug>.json``.

    Returns:
        A dict with ``what`` (what was measured), ``source`` (a key of the bibliography) and ``rows``.

    Raises:
        FileNotFoundError: The book has no such record.
    """
    return json.loads(book_file(f"published/{slug}.json").read_text(encoding="utf-8"))


MARKUP = str.maketrans("", "", '"*')  # what the topics put around code and around emphasis


@cache
def python_text() -> tuple[tuple[str, ...], ...]:
    """The English prose inside CPython: the help topics of the interpreter, as paragraphs of words.

    ``help("in")`` and its like read these texts. A paragraph counts as prose if it has at least six words, most of
    them letters only, and ends like a sentence. Code, grammar and tables drop out, and so does every paragraph that
    was there before, since topics share paragraphs. Words are lower-case; punctuation marks are words of their own;
    quotation marks and asterisks, which are markup here, are left out.

    The text belongs to the Python that runs, so it differs a little from version to version.

    Returns:
        The paragraphs, in the order of the topics' names.

    Raises:
        ModuleNotFoundError: This Python came without ``pydoc_data``.

    Example:
        >>> paragraphs = python_text()
        >>> len(paragraphs) == len(set(paragraphs)) > 500
        True
    """
    from pydoc_data.topics import topics

    paragraphs: dict[tuple[str, ...], None] = {}  # a set that keeps the order
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            if _is_prose(paragraph):
                paragraphs[tuple(re.findall(r"\w+(?:['’]\w+)*|[^\w\s]", paragraph.translate(MARKUP).lower()))] = None
    return tuple(paragraphs)


def _is_prose(paragraph: str) -> bool:
    """Whether these are sentences: six words or more, 70 % of them plain, and a mark at the end."""
    words = paragraph.translate(MARKUP).split()
    plain = sum(re.fullmatch(r"\(?[A-Za-z'’-]+[).,;:!?]*", word) is not None for word in words)
    return len(words) >= 6 and plain >= 0.7 * len(words) and words[-1][-1] in ".:!?)"


# The public names of `lossbook.data.public` are names of this package too. They are looked up on first use and neither
# imported nor listed here: the stamp of a chapter covers every module that its imports lead to, so an import here would
# make all chapters stale whenever a loader changes, and a list whenever one is added, though no chapter runs one. Who
# wants types checked imports from that module.
def __getattr__(name: str) -> Any:
    """A loader of public data or what belongs to it, imported when it is first asked for."""
    if not name.startswith("_"):
        public = importlib.import_module("lossbook.data.public")
        if name in public.__all__:
            return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The names of this module and the public ones of ``lossbook.data.public``."""
    return sorted({*globals(), *importlib.import_module("lossbook.data.public").__all__})
