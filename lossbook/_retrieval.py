"""The share of searches by cosine that succeed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lossbook._checks import check_floating, check_integer, describe
from lossbook._classifier import unit
from lossbook._common import LossModule
from lossbook._torch import full_precision, readable


@torch.no_grad()
def retrieval_accuracy(embedding: Tensor, label: Tensor, *, k: int | Iterable[int] = (1, 5, 10)) -> dict[int, Tensor]:
    r"""How often a search by cosine finds one of the query's own group among the first k.

    .. math::

        \frac{\bigl|\{ q \in Q : n_q < k \}\bigr|}{|Q|}, \qquad
        n_q = \Bigl|\Bigl\{ j : y_j \ne y_q,\ \cos(z_q, z_j) \ge
            \max_{i \ne q,\ y_i = y_q} \cos(z_q, z_i) \Bigr\}\Bigr|

    Every row is a query against all the others; Q are those whose group has another member. A stranger who ties with
    the best of the own group, within 8 roundings, counts as nearer, so that equal embeddings score 0. N x N cosines
    are never held at once.

    Args:
        embedding: embeddings ``(N, D)`` of any length, within the bounds of :class:`CosineClassifier`.
        label: the group of each, integers ``(N,)``.
        k: how many of the nearest to look at: one number or several. N - 1 and more are all the others.

    Returns:
        For each k a scalar tensor, on the embeddings' device, without gradient. NaN where a cosine is.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape, or a k below 1, or no k. On the CPU also when no group has two members: there is no
            query; on an accelerator this check would wait for the device, and the result is NaN.

    Example:
        >>> embedding = torch.tensor([[1.0, 0.0], [1.0, 0.4], [0.0, 1.0], [0.6, 1.0]])
        >>> retrieval_accuracy(embedding, torch.tensor([0, 0, 1, 1]), k=(1, 2))
        {1: tensor(1.), 2: tensor(1.)}

    Equation :eq:`am-retrieval` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018), which reports top
    1, 5 and 10.
    """
    ks, z = _check_ks(k), unit(check_floating(embedding, "embedding", dims=2))
    y = _check_label(label, len(z))
    step = max(2**22 // max(len(z), 1), 1)  # 16 MB of cosines
    pieces = [strangers_ahead(z, y, first, step) for first in range(0, len(z), step)]
    ahead = torch.cat([y[:0], *(piece[0] for piece in pieces)])
    asked = torch.cat([y[:0] > 0, *(piece[1] for piece in pieces)])
    if readable(embedding, label) and not bool(asked.any()):
        raise ValueError("label must hold a group of at least two: no query has another member to find")
    # NaN compares with nothing, so no stranger would be nearer: a diverged encoder would look perfect
    whole = z.isfinite().all()
    share = {n: (asked & (ahead < n)).sum() / asked.sum() for n in ks}
    return {n: torch.where(whole, x, math.nan) for n, x in share.items()}


def strangers_ahead(z: Tensor, y: Tensor, first: int, step: int) -> tuple[Tensor, Tensor]:
    """Of ``step`` queries: how many strangers are as near as the best of the group, and whether the group has one."""
    rows = slice(first, first + step)
    with full_precision(z.device):
        cosine = z[rows] @ z.t()
    places = torch.arange(len(z), device=z.device)
    group = y[rows].unsqueeze(1) == y
    others = group & (places[rows].unsqueeze(1) != places)
    best = cosine.masked_fill(~others, -math.inf).amax(1, keepdim=True)
    near = cosine >= best - 8 * torch.finfo(z.dtype).eps
    return (near & ~group).sum(1), others.any(1)


class RetrievalAccuracy(LossModule):
    """:func:`retrieval_accuracy` as a module."""

    def __init__(self, *, k: int | Iterable[int] = (1, 5, 10)) -> None:
        super().__init__(k=_check_ks(k))

    def forward(self, embedding: Tensor, label: Tensor) -> dict[int, Tensor]:
        """The share for each k, of ``embedding`` ``(N, D)`` and ``label`` ``(N,)``."""
        return retrieval_accuracy(embedding, label, **self.options)


def _check_label(label: Tensor, n: int) -> Tensor:
    if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise TypeError(f"label must be a tensor of an integer dtype, got {describe(label)}")
    if tuple(label.shape) != (n,):
        wanted = f"one number per embedding, shape {(n,)}"
        raise ValueError(f"label must have {wanted}, got {describe(label)}")
    return label.long()


def _check_ks(k: Any) -> tuple[int, ...]:
    several = isinstance(k, Iterable) and getattr(k, "ndim", 1) > 0
    ks = tuple(check_integer("k", one, low=1) for one in (k if several else [k]))
    if not ks:
        raise ValueError("k must hold at least one number, got none")
    return ks
