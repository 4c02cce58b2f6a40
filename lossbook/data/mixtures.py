"""Mixtures of digit canvases: two pictures shown through each other, as mixup makes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lossbook.data import Split, digit_canvases

__all__ = ["Mixtures", "mixed_canvases"]


class Mixtures(NamedTuple):
    """Mixtures of two canvases (see :func:`mixed_canvases`)."""

    images: Tensor
    """The mixtures, float32 ``(n, 1, height, width)``."""
    one: Tensor
    """The labels of the first canvas of each, boolean ``(n, labels)``."""
    two: Tensor
    """The labels of the second, boolean, of the same shape."""
    lam: Tensor
    """The weight of the first canvas, float32 ``(n, 1)``; the second has the rest."""

    @property
    def target(self) -> Tensor:
        """The soft labels: those of both canvases, mixed as the images are. Float32 ``(n, labels)``."""
        return self.lam * self.one + (1 - self.lam) * self.two


def mixed_canvases(
    n: int,
    *,
    grid: tuple[int, int] = (4, 4),
    lam: float | None = None,
    pool: int = 1000,
    seed: int,
    split: Split = "train",
) -> Mixtures:
    """Mixtures of pairs of canvases of a pool (see :func:`lossbook.data.digit_canvases`).

    The pool is gone through in random order again and again, so every canvas comes first and second equally often.

    Args:
        n: How many mixtures.
        grid: Rows and columns of cells of a canvas.
        lam: The weight of the first canvas in all mixtures. None draws one for each, evenly from 0 to 1.
        pool: How many canvases there are to mix.
        seed: Same seed, same canvases and same pairs, whatever ``lam``.
        split: Which digits to draw from.

    Raises:
        ValueError: The pool is empty, or ``lam`` lies outside [0, 1].

    Example:
        >>> mixed = mixed_canvases(6, grid=(2, 2), lam=0.75, pool=4, seed=0)
        >>> mixed.images.shape, sorted(set(mixed.target.flatten().tolist()) | {0.0, 0.25, 0.75, 1.0})
        (torch.Size([6, 1, 16, 16]), [0.0, 0.25, 0.75, 1.0])
    """
    if pool < 1:
        raise ValueError(f"pool must be at least 1, got {pool}")
    if lam is not None and not 0 <= lam <= 1:
        raise ValueError(f"lam must lie in [0, 1] or be None, got {lam}")
    images, truth = digit_canvases(pool, grid=grid, seed=seed, split=split)
    generator = torch.Generator().manual_seed(seed)

    def places() -> Tensor:
        rounds = [torch.randperm(pool, generator=generator) for _ in range(-(-n // pool))]
        return torch.cat([*rounds, torch.arange(0)])[:n]

    first, second = places(), places()
    share = torch.rand(n, 1, generator=generator) if lam is None else torch.full((n, 1), float(lam))
    weight = share.view(-1, 1, 1, 1)
    mixed = weight * images[first] + (1 - weight) * images[second]
    return Mixtures(mixed, truth[first], truth[second], share)
