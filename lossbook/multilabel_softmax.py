r"""Softmax cross-entropy for several labels at once.

:func:`multilabel_softmax_loss` pushes every positive label above a threshold and every negative label below it, with
one softmax on each side, so that it needs no class weights. :func:`sparse_multilabel_softmax_loss` takes the positive
labels as indices, for very many labels. :func:`multilabel_predict` reads the answer off the scores.
:func:`multilabel_pairwise_loss` and :func:`subset_softmax_loss` are two other routes to it. A module of the same
name wraps each. The page Recipes shows how to train with them.

All losses compute float16 and bfloat16 scores in float32. Infinite scores count as 1e30 in size. ``mask`` removes a
label as if its column were deleted, whatever its score and its target; a row without labels has loss 0 and does not
count in the mean. Targets take no gradient. Their values are looked at on the CPU only: elsewhere it would stall the
device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lossbook._checks import (
    check_ignore_index,
    check_integer,
    check_labels,
    check_mask,
    check_number,
    check_reduction,
    check_scores,
)
from lossbook._common import ABSENT, LossModule, finite, reduce_loss, softplus
from lossbook._fast.multilabel_softmax import exchanged_sets, indexed_sums, pair_sums, threshold_sums
from lossbook._log_sums import log_elementary, log_sum
from lossbook._several_labels import check_positives, counted_rows, most_exchanged, only

__all__ = [
    "MultilabelPairwiseLoss",
    "MultilabelPredict",
    "MultilabelSoftmaxLoss",
    "SparseMultilabelSoftmaxLoss",
    "SubsetSoftmaxLoss",
    "multilabel_pairwise_loss",
    "multilabel_predict",
    "multilabel_softmax_loss",
    "sparse_multilabel_softmax_loss",
    "subset_softmax_loss",
]


def multilabel_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax cross-entropy for any number of positive labels per row.

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_{i \in \mathrm{neg}} e^{s_i}\Bigr)
          + \log\Bigl(e^{-s_0} + \sum_{j \in \mathrm{pos}} e^{-s_j}\Bigr)

    Targets of a float dtype are soft labels :math:`t_i` in [0, 1]:

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_i (1 - t_i)\, e^{s_i}\Bigr) + \log\Bigl(e^{-s_0} + \sum_i t_i\, e^{-s_i}\Bigr)

    At :math:`t_i = 0` and :math:`t_i = 1` the two are equal, whatever the score.

    Args:
        input: Scores :math:`s` (logits), never probabilities, (..., C).
        target: Hard labels of a boolean or integer dtype (0 or 1), or soft labels of a float dtype, in the shape of
            ``input``. What rounding left outside [0, 1] by at most 1e-4 is clamped.
        mask: Boolean, broadcastable to ``input``; False removes a label.
        threshold: The score :math:`s_0` that positives should exceed and negatives should not.
        dim: The dimension of the labels: 1 for a picture (N, C, H, W), whose pixels are the rows.
        reduction: ``"mean"`` over the rows, also those without a positive label, ``"sum"`` or ``"none"``.

    Returns:
        The loss, never negative, in float32 or in the float64 of ``input``; () or, unreduced, the shape of the rows.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape does not fit, an option or a label is out of range, or ``target`` requires a gradient.

    Example:
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> y = torch.tensor([[True, False, True], [False, True, False]])
        >>> round(multilabel_softmax_loss(s, y).item(), 4)
        0.6757
        >>> soft = torch.tensor([[0.9, 0.1, 0.5], [0.0, 1.0, 0.0]])
        >>> round(multilabel_softmax_loss(s, soft).item(), 4)
        1.0373

    Equation :eq:`mls-loss` of the chapter, for soft labels :eq:`mls-soft`, which chapter 2 derives as :eq:`soft-loss`.
    Source: Su Jianlin, scientific spaces 7359 (2020) and 9064 (2022); the paper is ZLPR, arXiv 2208.02955.
    """
    s = check_scores(input, dim=dim)
    m = check_mask(mask, input.shape, dim)
    t = check_labels(target, input.shape, mask=mask, dim=dim)
    s_0 = check_number("threshold", threshold)
    check_reduction(reduction)
    t = t.to(s.dtype) if t.is_floating_point() else t.bool()

    def formula(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        return two_sides(s, t, mask, s_0)

    # from the sums of e^(s - s0) and of e^(s0 - s)
    def row(neg: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.log1p(neg) + torch.log1p(pos), 1 / (1 + neg), 1 / (1 + pos)

    loss = threshold_sums(formula, row, s, t, m, s_0)
    return reduce_loss(loss, reduction, counted_rows(m))


def two_sides(s: Tensor, t: Tensor, mask: Tensor | None, s_0: float) -> Tensor:
    """log(e^s0 + sum_i (1 - t_i) e^s_i) + log(e^-s0 + sum_i t_i e^-s_i); hard labels are t_i = 0 and 1."""
    s, neg, pos = only(mask, s, ~t if t.dtype == torch.bool else 1 - t, t)
    s = finite(s)
    return softplus(log_sum(s, neg) - s_0) + softplus(log_sum(-s, pos) + s_0)


def sparse_multilabel_softmax_loss(
    input: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""The multi-label softmax loss with the positive labels given as indices.

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_{i \notin P} e^{s_i}\Bigr) + \log\Bigl(e^{-s_0} + \sum_{j \in P} e^{-s_j}\Bigr)

    :math:`P` holds the indices of a row. The sum over the negatives leaves them out, it does not subtract them from a
    sum over all labels: nothing cancels once the positives dominate.

    Args:
        input: Scores :math:`s`, as in :func:`multilabel_softmax_loss`, (..., C).
        index: The positive labels of each row, (..., k), of an integer dtype. A repeated label counts once.
        mask: Boolean, broadcastable to ``input``; False removes a label, also from the positives.
        threshold: The score :math:`s_0` that positives should exceed and negatives should not.
        ignore_index: The value that pads the rows of ``index``. A row of nothing else has no positive label; it counts.
        dim: The dimension of ``input`` with the labels, and of ``index`` with the positives.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss of :func:`multilabel_softmax_loss`, to rounding.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape does not fit, or an option or an index is out of range.

    Example:
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> index = torch.tensor([[0, 2], [1, -100]])
        >>> round(sparse_multilabel_softmax_loss(s, index).item(), 4)
        0.6757

    Equation :eq:`mls-sparse` of the chapter, the value of :eq:`mls-loss`. Source: Su Jianlin, scientific spaces 8888
    (2022), whose form subtracts; the paper is ZLPR, arXiv 2208.02955.
    """
    s = check_scores(input, dim=dim)
    positives, given = check_positives(index, s, ignore_index, dim)
    m = check_mask(mask, input.shape, dim)
    s_0 = check_number("threshold", threshold)
    check_reduction(reduction)

    def formula(s: Tensor, index: Tensor, given: Tensor, mask: Tensor | None) -> Tensor:
        # padding marks one label past the last, which is then cut off
        none = torch.zeros_like(F.pad(s, (0, 1)), dtype=torch.bool)
        t = none.scatter(-1, index.masked_fill(~given, s.shape[-1]), 1)[..., :-1]
        return two_sides(s, t, mask, s_0)

    loss = indexed_sums(formula, s, positives, given, m, s_0)
    return reduce_loss(loss, reduction, counted_rows(m))


def multilabel_pairwise_loss(
    input: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    margin: float = 0.0,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Every positive label above every negative one, with no threshold.

    .. math::

        L = \log\Bigl(1 + \sum_{i \in \mathrm{neg}} \sum_{j \in \mathrm{pos}} e^{\gamma (s_i - s_j + m)}\Bigr)

    The double sum is a product of two sums, so it costs two log-sum-exps and not one term per pair.

    Args:
        input: Scores :math:`s`, (..., C).
        target: Labels, 0 or 1 in any real dtype, in the shape of ``input``.
        scale: :math:`\gamma > 0`, multiplies the scores and the margin.
        margin: :math:`m`, by how much a positive should exceed a negative, in units of the scores.
        mask: Boolean, broadcastable to ``input``; False removes a label.
        dim: The dimension of the labels.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 or in the float64 of ``input``: 0 for a row without a positive or without a negative.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape does not fit, an option or a label is out of range, or ``target`` requires a gradient.

    Example:
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> y = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> round(multilabel_pairwise_loss(s, y).item(), 4)
        0.1536

    Equation :eq:`mls-pairwise` of the chapter. Source: Su Jianlin, scientific spaces 7359 (2020); equation (1) of the
    Circle Loss paper, arXiv 2002.10857.
    """
    s = check_scores(input, dim=dim)
    m = check_mask(mask, input.shape, dim)
    t = check_labels(target, input.shape, hard=True, mask=mask, dim=dim).bool()
    gamma = check_number("scale", scale, low=0, open_low=True)
    margin = check_number("margin", margin)
    apart = gamma * margin
    check_reduction(reduction)

    def formula(s: Tensor, t: Tensor, mask: Tensor | None) -> Tensor:
        s, neg, pos = only(mask, s, ~t, t)
        s = finite(s)
        s = gamma * (s - lowest(s, pos, 0.0))
        return softplus(log_sum(s, neg) + log_sum(-s, pos) + apart)

    def row(neg: Tensor, pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = math.exp(apart) * neg * pos
        slope = gamma * math.exp(apart) / (1 + z)
        return torch.log1p(z), slope * pos, slope * neg

    loss = pair_sums(formula, row, s, t, m, gamma, margin)
    return reduce_loss(loss, reduction, counted_rows(m))


def lowest(s: Tensor, pos: Tensor, default: float) -> Tensor:
    """The lowest positive score of each row, (..., 1), or ``default``: measured from it, large scores do not cancel."""
    least = torch.where(pos, s.detach(), math.inf).amin(-1, keepdim=True)
    return torch.where(pos.any(-1, keepdim=True), least, default)


def subset_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    max_positives: int | None = None,
    threshold: float = 0.0,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Softmax over all sets of k labels, k being the row's number of positives.

    .. math::

        L = \log Z_k - \sum_{j \in \mathrm{pos}} s_j,
        \qquad Z_k = \sum_{|S| = k} \exp \sum_{i \in S} s_i

    With ``max_positives=K`` the number of positives is unknown too. A threshold class of score :math:`s_0`, which may
    repeat, fills every set up to K members:

    .. math::

        L = \log \bar Z_K - \sum_{j \in \mathrm{pos}} s_j - (K - k)\, s_0,
        \qquad \bar Z_K = Z_K + e^{s_0} \bar Z_{K-1}, \quad \bar Z_0 = Z_0 = 1

    Every set is reached from the right one by taking positives away and adding negatives. The sums over both are
    elementary symmetric polynomials, computed apart. Nothing is subtracted, so the loss stays exact for large scores.

    Time and memory per row grow as C D, and as :math:`D^2` with ``max_positives``. D is the largest number of labels
    exchanged: K, or without it the largest min(k, C - k) of the rows, and C // 2 where nobody may look at the targets
    (an accelerator, ``torch.compile``, ``torch.func``).

    Args:
        input: Scores :math:`s`, (..., C).
        target: Labels, 0 or 1 in any real dtype, in the shape of ``input``. Rows may differ in their number.
        max_positives: :math:`K \ge 1`, the most positives that a row may have; None for the form of known k.
        threshold: The score :math:`s_0` of the threshold class; without ``max_positives`` it plays no part.
        mask: Boolean, broadcastable to ``input``; False removes a label.
        dim: The dimension of the labels.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 or in the float64 of ``input``: 0 for k = 0 and k = C without ``max_positives``.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape does not fit, an option or a label is out of range, a row has more than ``max_positives``
            positives, or ``target`` requires a gradient.

    Example:
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> y = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> round(subset_softmax_loss(s, y).item(), 4)
        0.1536
        >>> round(subset_softmax_loss(s, y, max_positives=2).item(), 4)
        0.6197

    Equations :eq:`mls-subset` and, with ``max_positives``, :eq:`mls-subset-padded` of the chapter. Source: Su Jianlin,
    scientific spaces 7359 (2020).
    """
    s = check_scores(input, dim=dim)
    m = check_mask(mask, input.shape, dim)
    t = check_labels(target, input.shape, hard=True, mask=mask, dim=dim) == 1
    K = max_positives
    if K is not None:
        K = check_integer("max_positives", K, low=1)
    s_0 = check_number("threshold", threshold)
    check_reduction(reduction)
    neg, pos = only(m, ~t, t)
    D = most_exchanged(pos, neg, K)

    def formula(s: Tensor, neg: Tensor, pos: Tensor) -> Tensor:
        return other_sets(s, neg, pos, D, K, s_0)

    room = None if K is None else (K - pos.sum(-1), s_0)
    loss = exchanged_sets(formula, s, neg, pos, D, room)
    return reduce_loss(loss, reduction, counted_rows(m))


def other_sets(s: Tensor, neg: Tensor, pos: Tensor, degree: int, most: int | None, s_0: float) -> Tensor:
    """log(1 + the weights of all sets but the right one, divided by its own weight)."""
    s = finite(torch.where(neg | pos, s, 0))
    c = lowest(s, pos, s_0)
    # log e_a(e^-s_j) and log e_b(e^s_i) for a, b = 0, 1, ..., degree
    taken = log_elementary(torch.where(pos, c - s, ABSENT), degree)
    added = log_elementary(torch.where(neg, s - c, ABSENT), degree)
    if most is None:
        sets = (taken + added)[..., 1:]  # as many added as taken
    else:
        b = torch.ones_like(added).cumsum(-1) - 1
        more = b.unsqueeze(-2) - b.unsqueeze(-1)  # b - a
        gain = more * (c - s_0).unsqueeze(-1)
        sets = taken.unsqueeze(-1) + added.unsqueeze(-2) + gain
        fits = more <= (most - pos.sum(-1))[..., None, None]
        sets = torch.where(fits, sets, ABSENT).flatten(-2)[..., 1:]  # without a = b = 0
    return softplus(log_sum(sets, ~(sets <= ABSENT / 2)))


def multilabel_predict(input: Tensor, *, mask: Tensor | None = None, threshold: float = 0.0) -> Tensor:
    r"""Which labels are positive.

    .. math::

        P = \{\, i : s_i > s_0 \,\}

    Args:
        input: Scores :math:`s` of any shape, never probabilities.
        mask: Boolean, broadcastable to ``input``; where it is False no label is positive.
        threshold: :math:`s_0`, the one that the loss was given.

    Returns:
        A boolean tensor in the shape of ``input``. NaN is above nothing.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: ``mask`` does not fit or ``threshold`` is not finite.

    Example:
        >>> multilabel_predict(torch.tensor([2.0, -1.0, 0.5, 0.0]))
        tensor([ True, False,  True, False])

    Equation :eq:`mls-predict` of the chapter. Source: Su Jianlin, scientific spaces 7359 (2020).
    """
    above = check_scores(input, rows=False) > check_number("threshold", threshold)
    m = check_mask(mask, input.shape)
    return above if m is None else above & m


class RowsLoss(LossModule):
    """What the modules of losses of rows share."""

    def __init__(self, dim: int, reduction: str, **options: Any) -> None:
        options["dim"] = check_integer("dim", dim)
        super().__init__(**options, reduction=check_reduction(reduction))


class MultilabelSoftmaxLoss(RowsLoss):
    """:func:`multilabel_softmax_loss` as a module."""

    def __init__(self, *, threshold: float = 0.0, dim: int = -1, reduction: str = "mean") -> None:
        super().__init__(dim, reduction, threshold=check_number("threshold", threshold))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return multilabel_softmax_loss(input, target, mask=mask, **self.options)


class SparseMultilabelSoftmaxLoss(RowsLoss):
    """:func:`sparse_multilabel_softmax_loss` as a module."""

    def __init__(
        self, *, threshold: float = 0.0, ignore_index: int = -100, dim: int = -1, reduction: str = "mean"
    ) -> None:
        options = {"threshold": check_number("threshold", threshold)}
        options["ignore_index"] = check_ignore_index(ignore_index)
        super().__init__(dim, reduction, **options)

    def forward(self, input: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and the positives in ``index``."""
        return sparse_multilabel_softmax_loss(input, index, mask=mask, **self.options)


class MultilabelPairwiseLoss(RowsLoss):
    """:func:`multilabel_pairwise_loss` as a module."""

    def __init__(self, *, scale: float = 1.0, margin: float = 0.0, dim: int = -1, reduction: str = "mean") -> None:
        scale = check_number("scale", scale, low=0, open_low=True)
        margin = check_number("margin", margin)
        super().__init__(dim, reduction, scale=scale, margin=margin)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return multilabel_pairwise_loss(input, target, mask=mask, **self.options)


class SubsetSoftmaxLoss(RowsLoss):
    """:func:`subset_softmax_loss` as a module."""

    def __init__(
        self, *, max_positives: int | None = None, threshold: float = 0.0, dim: int = -1, reduction: str = "mean"
    ) -> None:
        K, s_0 = max_positives, check_number("threshold", threshold)
        if K is not None:
            K = check_integer("max_positives", K, low=1)
        super().__init__(dim, reduction, max_positives=K, threshold=s_0)

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return subset_softmax_loss(input, target, mask=mask, **self.options)


class MultilabelPredict(LossModule):
    """:func:`multilabel_predict` as a module."""

    def __init__(self, *, threshold: float = 0.0) -> None:
        super().__init__(threshold=check_number("threshold", threshold))

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which labels are positive."""
        return multilabel_predict(input, mask=mask, **self.options)
