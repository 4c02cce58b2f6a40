"""Scenes for a detector: two digits among wrecks and noise, and the few window positions where a digit stands."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lossbook.data import DIGIT_SIZE, SPLITS, Split, _source_digits

SIDE = 32
"""Pixels, the side of a scene."""
SPOTS = SIDE - DIGIT_SIZE + 1
"""Positions of a window of 8 by 8 pixels along one side; a scene has ``SPOTS ** 2`` of them."""
_DIGITS, _PIECES = 2, 6  # of the six things in a scene two are digits
_SWAPS = ((4, 0), (0, 4), (4, 4))  # upper and lower half, left and right half, both


def digit_scenes(n: int, *, split: Split = "train", seed: int) -> tuple[Tensor, Tensor]:
    """Scenes of 32 by 32 pixels with two handwritten digits, four wrecks and noise.

    A wreck is a digit whose halves or quarters are swapped. The six things keep apart from one another. A label says
    for each position of an 8 by 8 window, row by row, whether a digit stands exactly there: two of 625 are true. The
    digits are those inside scikit-learn; no two splits share one.

    Args:
        n: How many scenes.
        split: Which digits to draw from: ``"train"``, ``"validation"`` or ``"test"``.
        seed: Same seed, same scenes.

    Returns:
        Images, float32 ``(n, 1, 32, 32)`` in [0, 1], and targets, bool ``(n, 625)``.

    Raises:
        ValueError: ``n`` is negative, or there is no such split.

    Example:
        >>> images, truth = digit_scenes(3, seed=0)
        >>> images.shape, truth.shape, truth.sum(1).tolist()
        (torch.Size([3, 1, 32, 32]), torch.Size([3, 625]), [2, 2, 2])
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
    rng = np.random.default_rng(seed)
    source = _source_digits()[0][SPLITS[split]]
    images = np.zeros((n, SIDE, SIDE), np.float32)
    truth = np.zeros((n, SPOTS, SPOTS), bool)
    for image, true in zip(images, truth, strict=True):
        shift = rng.integers(3, size=2)
        for k, block in enumerate(rng.permutation(9)[:_PIECES]):  # six of nine blocks of 10 by 10 pixels
            row, column = shift + 10 * np.array(divmod(block, 3)) + rng.integers(3, size=2)
            piece = source[rng.integers(len(source))]
            if k < _DIGITS:
                true[row, column] = True
            else:
                piece = np.roll(piece, _SWAPS[rng.integers(len(_SWAPS))], (0, 1))
            image[row : row + DIGIT_SIZE, column : column + DIGIT_SIZE] = piece
    images += np.float32(0.2) * rng.standard_normal(images.shape, dtype=np.float32)
    return torch.from_numpy(images.clip(0, 1))[:, None], torch.from_numpy(truth).flatten(1)
