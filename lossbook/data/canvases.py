"""The canvases of chapter 1 in three sets: to train on, to choose on, to measure on."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lossbook.data import Split, digit_canvases

SIZES: dict[Split, int] = {"train": 2000, "validation": 500, "test": 1000}
"""How many canvases each set has."""


class Canvases(NamedTuple):
    """Images, float32 ``(N, 1, 8 * cells, 8 * cells)``, and labels, bool ``(N, 10 * cells * cells)``."""

    images: Tensor
    labels: Tensor


class CanvasSets(NamedTuple):
    """Three sets of canvases. No two share a handwritten digit."""

    train: Canvases
    validation: Canvases
    test: Canvases


def canvas_sets(cells: int) -> CanvasSets:
    """Canvases of ``cells`` by ``cells`` cells with up to three digits; the same every time.

    A label is a pair of a cell and a digit, so there are ``10 * cells**2`` labels, of which at most three are true (see
    :func:`lossbook.data.digit_canvases`).

    Args:
        cells: Cells along a side.

    Example:
        >>> sets = canvas_sets(4)
        >>> sets.train.images.shape, sets.test.labels.shape
        (torch.Size([2000, 1, 32, 32]), torch.Size([1000, 160]))
        >>> int(sets.train.labels.sum(1).max())
        3
    """
    made = [
        Canvases(*digit_canvases(n, grid=(cells, cells), seed=seed, split=split))
        for seed, (split, n) in enumerate(SIZES.items())
    ]
    return CanvasSets(*made)
