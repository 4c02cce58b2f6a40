"""Reading the arguments of the losses on several labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lossbook._checks import check_index, classes_last, describe
from lossbook._torch import readable


def check_positives(index: Tensor, s: Tensor, ignore_index: int, dim: int) -> tuple[Tensor, Tensor]:
    """Indices as int64 with the positives last, at least one a row, and which of them are no padding."""
    C = s.shape[-1]
    if isinstance(index, Tensor) and index.dim() == s.dim():
        index = classes_last(index, dim, "index")
    if isinstance(index, Tensor) and index.shape[:-1] != s.shape[:-1]:
        wanted = ", ".join([*map(str, s.shape[:-1]), "k"])
        raise ValueError(
            f"index must have the shape ({wanted}), the rows of input (labels last, or pass dim), got {describe(index)}"
        )
    shape = getattr(index, "shape", ())
    index, given = check_index(index, shape, C, ignore_index, name="index")
    if index.shape[-1] == 0:
        index, given = F.pad(index, (0, 1)), F.pad(given, (0, 1))
    return index, given


def most_exchanged(pos: Tensor, neg: Tensor, most: int | None) -> int:
    """The most labels that any row may exchange; an error where one has more than ``most`` positives."""
    k = pos.sum(-1)
    seen = readable(k) and k.numel() > 0
    if most is not None and seen and bool((k > most).any()):
        raise ValueError(f"target must have at most max_positives={most} positives in a row, got {int(k.max())}")
    if most is None:
        most = int(torch.minimum(k, neg.sum(-1)).max()) if seen else pos.shape[-1] // 2
    return max(1, min(most, pos.shape[-1]))


def only(mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """The tensors with 0 for labels that do not take part."""
    return [x if mask is None else x.masked_fill(~mask, 0) for x in tensors]


def counted_rows(mask: Tensor | None) -> Tensor | None:
    """Which rows have a label."""
    return None if mask is None else mask.any(-1)
