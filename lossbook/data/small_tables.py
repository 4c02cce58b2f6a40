"""Four tables that come with scikit-learn, cut into many splits at once, with wrong labels on demand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossbook._extras import require

TABLES = {
    "iris": "load_iris",
    "wine": "load_wine",
    "breast cancer": "load_breast_cancer",
    "digits": "load_digits",
}
"""The tables, each with the scikit-learn function that loads it: 150, 178, 569 and 1797 rows."""


class Part(NamedTuple):
    """The rows of one part of every split."""

    x: Tensor
    """Standardised features, (splits, rows, features), float32."""
    t: Tensor
    """Classes, (splits, rows), int64."""


class Splits(NamedTuple):
    """Every split of a table: half of the rows, a quarter, a quarter."""

    train: Part
    validation: Part
    test: Part


def small_table(name: str) -> tuple[Tensor, Tensor]:
    """A whole table.

    Args:
        name: A key of :data:`TABLES`.

    Returns:
        Features standardised over all rows, (rows, features), float64; classes, (rows,), int64.

    Example:
        >>> x, t = small_table("iris")
        >>> x.shape, int(t.max()) + 1
        (torch.Size([150, 4]), 3)
    """
    features, classes = _load(name)
    return torch.tensor((features - features.mean(0)) / (features.std(0) + 1e-6)), torch.tensor(classes)


def split_table(name: str, *, splits: int = 10, wrong: float = 0.0) -> Splits:
    """Splits of a table, side by side in one tensor, so that one model a split trains in one step.

    Each split shuffles the rows with its own number as the seed. Features are standardised by its training rows.

    Args:
        name: A key of :data:`TABLES`.
        splits: How many.
        wrong: The share of labels replaced by another class, each other one as likely. They are replaced in the
            training and validation rows; test rows stay as they are.

    Returns:
        The splits.

    Raises:
        ValueError: There is no such table, or ``splits`` or ``wrong`` is out of range.

    Example:
        >>> parts = split_table("iris", splits=2)
        >>> [tuple(part.x.shape) for part in parts]
        [(2, 75, 4), (2, 37, 4), (2, 38, 4)]
    """
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    if not 0 <= wrong < 1:
        raise ValueError(f"wrong must be a share in [0, 1), got {wrong}")
    features, classes = _load(name)
    n, most = len(features), int(classes.max())
    cuts = slice(0, n // 2), slice(n // 2, 3 * n // 4), slice(3 * n // 4, n)
    parts: tuple[list[tuple[np.ndarray, np.ndarray]], ...] = ([], [], [])
    for seed in range(splits):
        rng = np.random.default_rng(seed)
        order = rng.permutation(n)
        x, t = features[order], classes[order]
        x = (x - x[cuts[0]].mean(0)) / (x[cuts[0]].std(0) + 1e-6)
        replaced = (rng.random(n) < wrong) & (np.arange(n) < cuts[2].start)
        t = np.where(replaced, (t + rng.integers(1, most + 1, n)) % (most + 1), t)
        for part, cut in zip(parts, cuts, strict=True):
            part.append((x[cut].astype(np.float32), t[cut]))
    return Splits(*(Part(*(torch.tensor(np.stack(each)) for each in zip(*part, strict=True))) for part in parts))


def _load(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name not in TABLES:
        raise ValueError(f"there is no table {name!r}; there are {', '.join(map(repr, TABLES))}")
    features, classes = getattr(require("sklearn.datasets", "data"), TABLES[name])(return_X_y=True)
    return np.asarray(features, dtype=np.float64), np.asarray(classes, dtype=np.int64)
