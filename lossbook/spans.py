r"""Spans and relations: a score for every pair of tokens, and the few pairs that are true as indices.

:class:`GlobalPointer` scores the pairs, :func:`spans_to_index` makes the labels, :func:`span_loss` is the multi-label
softmax on them, :func:`decode_spans` and :func:`decode_triples` read the answer off. :func:`power_bce` is a rival for
rare positives. Three lines of a training loop::

    scores = pointer(encoder(tokens))
    index = spans_to_index(spans, length=scores.shape[-1], num_types=pointer.num_types, lengths=lengths)
    loss = span_loss(scores, index, mask=span_mask(lengths, length=scores.shape[-1]))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lossbook._checks import (
    check_ignore_index,
    check_labels,
    check_mask,
    check_number,
    check_reduction,
    check_scores,
)
from lossbook._common import LossModule, finite, reduce_loss, softplus
from lossbook._pointer import GlobalPointer
from lossbook._span_lists import (
    check_pairs,
    decode_spans,
    decode_triples,
    index_to_spans,
    span_f1,
    span_mask,
    spans_to_index,
    triple_f1,
)
from lossbook._torch import readable
from lossbook.multilabel_softmax import sparse_multilabel_softmax_loss

__all__ = [
    "GlobalPointer",
    "PowerBce",
    "SpanLoss",
    "decode_spans",
    "decode_triples",
    "index_to_spans",
    "power_bce",
    "span_f1",
    "span_loss",
    "span_mask",
    "spans_to_index",
    "triple_f1",
]


def span_loss(
    input: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The multi-label softmax over the pairs of tokens: one row for each sentence and type.

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_{(i, j) \notin P} e^{s_{ij}}\Bigr)
          + \log\Bigl(e^{-s_0} + \sum_{(i, j) \in P} e^{-s_{ij}}\Bigr)

    :math:`P` holds the spans of the type. It is :func:`lossbook.multilabel_softmax.sparse_multilabel_softmax_loss` on
    the flattened matrices, so labels cost a few bytes a span.

    Args:
        input: Scores ``(B, num_types, L, L)``, of :class:`GlobalPointer` for example.
        index: Positions ``(B, num_types, k)``, as :func:`spans_to_index` makes them.
        mask: Boolean, broadcastable to ``input``, as :func:`span_mask` makes it; False takes a pair away.
        threshold: The score :math:`s_0` that spans should exceed.
        ignore_index: What pads the rows of ``index``. A row of nothing else has no span; it counts.
        reduction: ``"mean"`` over sentences and types, ``"sum"`` or ``"none"``, of shape ``(B, num_types)``.

    Raises:
        TypeError: An argument is of the wrong kind or dtype.
        ValueError: A shape does not fit, an option is out of range, or a span lies outside the mask (seen on the CPU).

    Example:
        >>> scores = torch.zeros(1, 1, 3, 3)
        >>> index = spans_to_index([[(0, 0, 1)]], length=3, num_types=1)
        >>> span_loss(scores, index, mask=span_mask(torch.tensor([3]))).item().__round__(4)  # log 6 + log 2
        2.4849

    Equation :eq:`spans-loss` of the chapter. Source: Su Jianlin, scientific spaces 8373 (2021) and 8888 (2022).
    """
    check_pairs(input)
    m = check_mask(mask, input.shape)
    m = m if m is None else m.expand(input.shape).flatten(-2)
    loss = sparse_multilabel_softmax_loss(
        input.flatten(-2),
        index,
        mask=m,
        threshold=threshold,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    if m is not None and m.numel() and readable(index, m):
        _refuse_outside(m, index.long(), ignore_index)
    return loss


def _refuse_outside(mask: Tensor, index: Tensor, ignore_index: int) -> None:
    """A span outside the mask would vanish from the labels; ``index`` is one that the loss has taken."""
    given = index != check_ignore_index(ignore_index)
    lost = given & ~mask.gather(-1, index.masked_fill(~given, 0))
    if bool(lost.any()):
        length = math.isqrt(mask.shape[-1])
        sentence, kind, _ = lost.nonzero()[0].tolist()
        start, end = divmod(int(index[lost][0]), length)
        span = f"the span {(kind, start, end)} of sentence {sentence}"
        raise ValueError(f"{span} lies outside the mask")


def power_bce(
    input: Tensor, target: Tensor, n: float, *, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Binary cross-entropy of the n-th power of the probability, for rare positives.

    .. math:: L = -t \log p^n - (1 - t) \log(1 - p^n), \qquad p = \sigma(s)

    A score of 0 means :math:`2^{-n}`, so an untrained model starts near the base rate. Both halves are exact at any
    score: :math:`1 - p^n` is never formed by subtraction.

    Args:
        input: Scores :math:`s`, any shape.
        target: Labels :math:`t` in [0, 1], the shape of ``input``.
        n: The power, at least 1. At 1 it is binary cross-entropy.
        mask: Boolean, broadcastable to ``input``: the elements that count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: An argument has a wrong type, dtype, shape or value.

    Example:
        >>> s, t = torch.tensor([0.0, 0.0]), torch.tensor([1, 0])
        >>> power_bce(s, t, 4, reduction="none").round(decimals=4)  # 4 log 2, -log(15 / 16)
        tensor([2.7726, 0.0645])

    Equation :eq:`spans-power` of the chapter's evidence. Source: Su Jianlin, scientific spaces 7161 (2020).
    """
    n = check_power(n)
    s = check_scores(input, rows=False)
    t = check_labels(target, input.shape, mask=mask)
    m = check_mask(mask, input.shape)
    check_reduction(reduction)
    t = t.to(s.dtype)
    if m is not None:
        m = m.expand(input.shape)
        s, t = s.masked_fill(~m, 0), t.masked_fill(~m, 0)
    s = finite(s)
    loss = t * n * softplus(-s) - (1 - t) * log_rest_of_power(s, n)
    return reduce_loss(loss if m is None else loss.masked_fill(~m, 0), reduction, m)


def log_rest_of_power(s: Tensor, n: float) -> Tensor:
    """log(1 - p^n): with q = -log p^n it is log(1 - e^-q), and beyond s = far, where q < e^-40, log q = log n - s."""
    far = 40 + math.log(n)
    q = n * softplus(-torch.where(s > far, far, s))
    half = math.log(2)
    rare = torch.log1p(-torch.exp(-torch.where(q > half, q, half)))  # p^n < 1/2
    often = torch.log(-torch.expm1(-torch.where(q > half, half, q)))
    return torch.where(s > far, math.log(n) - s, torch.where(q > half, rare, often))


def check_power(n: float) -> float:
    """The power of a probability."""
    return check_number("n", n, low=1.0, high=1e6)


class SpanLoss(LossModule):
    """:func:`span_loss` as a module."""

    def __init__(self, *, threshold: float = 0.0, ignore_index: int = -100, reduction: str = "mean") -> None:
        options = {"threshold": check_number("threshold", threshold)}
        options["ignore_index"] = check_ignore_index(ignore_index)
        super().__init__(**options, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and the positions in ``index``."""
        return span_loss(input, index, mask=mask, **self.options)


class PowerBce(LossModule):
    """:func:`power_bce` as a module."""

    def __init__(self, n: float, *, reduction: str = "mean") -> None:
        super().__init__(n=check_power(n), reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return power_bce(input, target, mask=mask, **self.options)
