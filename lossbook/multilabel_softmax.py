r"""Softmax cross-entropy for several labels at once.

:func:`multilabel_softmax_loss` pushes every positive label above a threshold and every negative label below it, with
one softmax on each side, so that it needs no class weights. :func:`sparse_multilabel_softmax_loss` takes the positive
labels as indices, for very many labels. :func:`multilabel_predict` reads the answer off the scores.
:func:`multilabel_pairwise_loss` and :func:`subset_softmax_loss` are the two roads that lead there. A module of the same
name wraps each.

Plain torch::

    loss = multilabel_softmax_loss(model(images), labels)
    loss.backward()
    optimizer.step()

Lightning::

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return multilabel_softmax_loss(self(images), labels)

Hugging Face ``Trainer``::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return multilabel_softmax_loss(outputs.logits, labels)
    trainer = Trainer(..., compute_loss_func=compute_loss)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from lossbook._common import (
    check_ignore_index,
    check_index_target,
    check_labels,
    check_mask,
    check_number,
    check_reduction,
    check_scores,
    describe,
    eager,
    reduce_loss,
    values_readable,
)

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

# A label that does not take part has this score: so low that e^-1e30 is 0 beside any other. It is finite, because
# -inf - -inf would be NaN where no label takes part at all.
_ABSENT = -1e30
# Infinite scores count as this, so that every real score stays above an absent one.
_FAR = 1e29
_LOG2_E = math.log2(math.e)
# Up to so many scores, splitting the work costs more than it saves; and so many are worked on at once, to stay in a
# core's cache. An accelerator wants larger numbers.
_CPU_SIZES, _DEVICE_SIZES = (2**15, 2**18), (2**22, 2**24)
# Of so few scores the memory does not matter.
_TINY = 2**12
# Above it log(1 + e^x) is x to the last digit of float64; torch's own softplus returns x above 20 already.
_FULL = 40.0


def multilabel_softmax_loss(
    input: Tensor, target: Tensor, *, mask: Tensor | None = None, threshold: float = 0.0, reduction: str = "mean"
) -> Tensor:
    r"""Softmax cross-entropy for any number of positive labels per row.

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_{i \in \mathrm{neg}} e^{s_i}\Bigr)
          + \log\Bigl(e^{-s_0} + \sum_{j \in \mathrm{pos}} e^{-s_j}\Bigr)

    Targets of a float dtype are soft labels :math:`t_i` in [0, 1]:

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_i (1 - t_i)\, e^{s_i}\Bigr) + \log\Bigl(e^{-s_0} + \sum_i t_i\, e^{-s_i}\Bigr)

    At :math:`t_i = 0` and :math:`t_i = 1` the two are equal, whatever the score. Shifting the scores and the threshold
    together changes nothing.

    Shapes: ``input`` and ``target`` (..., C), ``mask`` broadcastable to them; the loss (...), or () once reduced.

    Args:
        input: Scores :math:`s` (logits), never probabilities. float16 and bfloat16 are computed in float32.
        target: Hard labels of a boolean or integer dtype (0 or 1), or soft labels of a float dtype. It takes no
            gradient.
        mask: Boolean; False removes a label as if its column were deleted, whatever its score.
        threshold: The score :math:`s_0` that positives should exceed and negatives should not.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 or in the float64 of ``input``. It is never negative.

    Raises:
        TypeError: ``input`` is not real-valued, ``target`` is no tensor of a real dtype, ``mask`` is not boolean, or
            ``threshold`` is not a number.
        ValueError: The shapes do not fit, ``target`` asks for a gradient, a label lies outside [0, 1] (looked at on
            the CPU only, elsewhere it would stall the device), or an option has no such value.

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
    s = check_scores(input)
    check_labels(target, input.shape)
    check_mask(mask, input.shape)
    s_0 = check_number("threshold", threshold)
    check_reduction(reduction)
    if target.requires_grad:
        raise ValueError("target must not ask for a gradient, pass target.detach()")

    if target.is_floating_point():
        t = target.to(s.dtype)
    elif target.dtype == torch.bool:
        t = target
    else:
        t = target != 0
    if s.numel() == 0:
        loss = s.sum(-1)  # no label: log 1 + log 1
    elif eager(s, t, *_given(mask)):
        loss = _Dense.apply(_followed(s), t, mask, s_0)  # type: ignore[no-untyped-call]
    else:
        loss = _two_sides(s, t, mask, s_0)
    return reduce_loss(loss, reduction)


def sparse_multilabel_softmax_loss(
    input: Tensor,
    index: Tensor,
    *,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""The multi-label softmax loss with the positive labels given as indices.

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_{i \notin P} e^{s_i}\Bigr) + \log\Bigl(e^{-s_0} + \sum_{j \in P} e^{-s_j}\Bigr)

    Here :math:`P` holds the indices of a row. The sum over the negatives leaves the positives out. It does not subtract
    them from a sum over all labels, so nothing cancels once the positives dominate, and the loss is never negative. It
    costs about one pass over the scores.

    Shapes: ``input`` (..., C), ``index`` (..., k), ``mask`` broadcastable to ``input``; the loss (...), or () once
    reduced.

    Args:
        input: Scores :math:`s` (logits), never probabilities. float16 and bfloat16 are computed in float32.
        index: The positive labels of each row, of an integer dtype. A repeated label counts once.
        mask: Boolean; False removes a label as if its column were deleted, whatever its score, also a positive one.
        threshold: The score :math:`s_0` that positives should exceed and negatives should not.
        ignore_index: The value that pads the rows of ``index``. A row of nothing else has no positive label; it counts.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 or in the float64 of ``input``: that of :func:`multilabel_softmax_loss`, to rounding.

    Raises:
        TypeError: ``input`` is not real-valued, ``index`` is not of an integer dtype, ``mask`` is not boolean, or an
            option is not a number.
        ValueError: The shapes do not fit, an index lies outside [0, C) (looked at on the CPU only, elsewhere it would
            stall the device), or an option has no such value.

    Example:
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> index = torch.tensor([[0, 2], [1, -100]])
        >>> round(sparse_multilabel_softmax_loss(s, index).item(), 4)
        0.6757

    Equation :eq:`mls-sparse` of the chapter, the value of :eq:`mls-loss`. Source: Su Jianlin, scientific spaces 8888
    (2022), whose form subtracts; the paper is ZLPR, arXiv 2208.02955.
    """
    s = check_scores(input)
    P = _check_index(index, input.shape, ignore_index)
    check_mask(mask, input.shape)
    s_0 = check_number("threshold", threshold)
    check_reduction(reduction)

    if s.numel() == 0:
        loss = s.sum(-1)  # no label: log 1 + log 1
    elif eager(s, P, *_given(mask)):
        loss = _Sparse.apply(_followed(s), P, mask, s_0)  # type: ignore[no-untyped-call]
    else:
        loss = _two_sides_of_indices(s, P, mask, s_0)
    return reduce_loss(loss, reduction)


def multilabel_pairwise_loss(
    input: Tensor,
    target: Tensor,
    *,
    scale: float = 1.0,
    margin: float = 0.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Every positive label above every negative one, with no threshold.

    .. math::

        L = \log\Bigl(1 + \sum_{i \in \mathrm{neg}} \sum_{j \in \mathrm{pos}} e^{\gamma (s_i - s_j + m)}\Bigr)

    The double sum is a product of two sums, so it costs two log-sum-exps and not one term per pair.

    Shapes: ``input`` and ``target`` (..., C), ``mask`` broadcastable to them; the loss (...), or () once reduced.

    Args:
        input: Scores :math:`s`. float16 and bfloat16 are computed in float32.
        target: Labels, 0 or 1 in any real dtype.
        scale: :math:`\gamma > 0`, multiplies the scores and the margin.
        margin: :math:`m`, by how much a positive should exceed a negative, in units of the scores.
        mask: Boolean; False removes a label as if its column were deleted, whatever its score.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 or in the float64 of ``input``: 0 for a row without a positive or without a negative.

    Raises:
        TypeError: ``input`` is not real-valued, ``target`` is no tensor of a real dtype, ``mask`` is not boolean, or an
            option is not a number.
        ValueError: The shapes do not fit, a label is neither 0 nor 1 (looked at on the CPU only, elsewhere it would
            stall the device), or an option has no such value.

    Example:
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> y = torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> round(multilabel_pairwise_loss(s, y).item(), 4)
        0.1536

    Equation :eq:`mls-pairwise` of the chapter. Source: Su Jianlin, scientific spaces 7359 (2020); equation (1) of the
    Circle Loss paper, arXiv 2002.10857.
    """
    s = check_scores(input)
    check_labels(target, input.shape, hard=True)
    check_mask(mask, input.shape)
    gamma = check_number("scale", scale, low=0, open_low=True)
    m = check_number("margin", margin)
    check_reduction(reduction)

    if s.numel() == 0:
        return reduce_loss(s.sum(-1), reduction)
    pos = target == 1
    neg = ~pos
    if mask is not None:
        s, pos, neg = torch.where(mask, s, 0), pos & mask, neg & mask
    s = s.clamp(-_FAR, _FAR)
    # only differences count, so measure from the lowest positive: then large scores do not cancel
    s = s - _lowest(s, pos, 0.0)
    log_neg = torch.logsumexp(torch.where(neg, gamma * (s + m), _ABSENT), -1)  # log sum_i e^(gamma (s_i + m))
    log_pos = torch.logsumexp(torch.where(pos, -gamma * s, _ABSENT), -1)  # log sum_j e^(-gamma s_j)
    return reduce_loss(_softplus(log_neg + log_pos), reduction)


def subset_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    max_positives: int | None = None,
    threshold: float = 0.0,
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

    Every set is reached from the right one by taking positives away and adding negatives. The sums over what is taken
    and what is added are elementary symmetric polynomials. They are computed apart and in log space, by a tree of
    products. Nothing is subtracted, so the loss is never negative and stays exact for large scores.

    Time and memory per row grow as C D, and as :math:`D^2` with ``max_positives``. D is the largest number of labels
    exchanged: K, or without it the largest min(k, C - k) of the rows. Where the targets cannot be read without waiting
    (an accelerator, ``torch.compile``, ``torch.func``), D is C // 2 unless ``max_positives`` is given.

    Shapes: ``input`` and ``target`` (..., C); the loss (...), or () once reduced.

    Args:
        input: Scores :math:`s`. float16 and bfloat16 are computed in float32.
        target: Labels, 0 or 1 in any real dtype. Rows may have different numbers of positives.
        max_positives: :math:`K \ge 1`, the most positives that a row may have; None for the form of known k.
        threshold: The score :math:`s_0` of the threshold class; without ``max_positives`` it plays no part.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 or in the float64 of ``input``: 0 for k = 0 and k = C without ``max_positives``.

    Raises:
        TypeError: ``input`` is not real-valued, ``target`` is no tensor of a real dtype, or an option is not a number.
        ValueError: The shapes do not fit, a label is neither 0 nor 1 or a row has more than ``max_positives`` positives
            (both looked at on the CPU only, elsewhere it would stall the device), or an option has no such value.

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
    s = check_scores(input)
    check_labels(target, input.shape, hard=True)
    K = _check_count("max_positives", max_positives)
    s_0 = check_number("threshold", threshold)
    check_reduction(reduction)
    pos = target == 1
    k = pos.sum(-1)
    C = s.shape[-1]
    if s.numel() == 0:
        return reduce_loss(s.sum(-1), reduction)
    if K is not None and values_readable(k) and bool((k > K).any()):
        raise ValueError(f"target must have at most max_positives={K} positives in a row, got {int(k.max())}")

    if K is not None:
        D = K
    elif values_readable(k):
        D = int(torch.minimum(k, C - k).max())
    else:
        D = C // 2
    D = max(1, min(D, C))  # the products below want a degree
    s = s.clamp(-_FAR, _FAR)
    c = _lowest(s, pos, s_0)  # scores are measured from the lowest positive: then large scores do not cancel
    taken = _log_elementary(torch.where(pos, c - s, _ABSENT), D)  # log e_a(e^-s_j) over the positives, a = 0..D
    added = _log_elementary(torch.where(pos, _ABSENT, s - c), D)  # log e_b(e^s_i) over the negatives, b = 0..D
    if K is None:
        sets = (taken + added)[..., 1:]  # as many added as taken
    else:
        a = torch.arange(D + 1, device=s.device).unsqueeze(-1)
        b = a.squeeze(-1)
        sets = taken.unsqueeze(-1) + added.unsqueeze(-2) + (b - a) * (c - s_0).unsqueeze(-1)
        others = (b - a <= (K - k)[..., None, None]) & (a + b > 0)  # at most K members, and not the right set
        sets = torch.where(others, sets, _ABSENT).flatten(-2)
    return reduce_loss(_softplus(torch.logsumexp(sets, -1)), reduction)


def multilabel_predict(input: Tensor, *, threshold: float = 0.0) -> Tensor:
    r"""Which labels are positive.

    .. math::

        P = \{\, i : s_i > s_0 \,\}

    Shapes: ``input`` of any shape; the answer has the same.

    Args:
        input: Scores :math:`s`, never probabilities.
        threshold: :math:`s_0`, the one that the loss was given.

    Returns:
        A boolean tensor. NaN is above nothing.

    Raises:
        TypeError: ``input`` is not real-valued or ``threshold`` is not a number.
        ValueError: ``threshold`` is not finite.

    Example:
        >>> multilabel_predict(torch.tensor([2.0, -1.0, 0.5, 0.0]))
        tensor([ True, False,  True, False])

    Equation :eq:`mls-predict` of the chapter. Source: Su Jianlin, scientific spaces 7359 (2020).
    """
    return check_scores(input, rows=False) > check_number("threshold", threshold)


# ------------------------------------------------------------------------------------------------ the loss, two ways


def _two_sides(s: Tensor, t: Tensor, mask: Tensor | None, s_0: float) -> Tensor:
    """The loss of rows as its formula says, in operators that every transform of torch can follow."""
    if mask is not None:
        s, t = torch.where(mask, s, 0), t.masked_fill(~mask, 0)
    s = s.clamp(-_FAR, _FAR)
    if t.dtype == torch.bool:
        neg, pos = torch.where(t, _ABSENT, s), torch.where(t, -s, _ABSENT)
    else:  # a label of 0 or 1 is absent from one side, whatever its score: there is no 0 * inf
        neg = torch.where(t < 1, s + torch.log1p(-t), _ABSENT)
        pos = torch.where(t > 0, torch.log(t) - s, _ABSENT)
    if mask is not None:
        neg = torch.where(mask, neg, _ABSENT)
    return _softplus(torch.logsumexp(neg, -1) - s_0) + _softplus(torch.logsumexp(pos, -1) + s_0)


def _two_sides_of_indices(s: Tensor, index: Tensor, mask: Tensor | None, s_0: float) -> Tensor:
    """The same for positives given as indices; C, one past the last, stands for none."""
    t = torch.zeros_like(F.pad(s, (0, 1)), dtype=torch.bool).scatter(-1, index, True)
    return _two_sides(s, t[..., :-1], mask, s_0)


class _Rows(Function):
    """A loss of rows that keeps the gradient of each row, computed along with its value, for the backward pass."""

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        s, t, mask, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative may follow, so let autograd see the formula
            s = s.view_as(s)  # another name for the scores: hooks on the first one run only once
            loss = ctx.formula(s, t, mask, ctx.threshold)
            (grad,) = torch.autograd.grad(loss, s, grad_output, create_graph=True)
        else:
            grad = grad_output.unsqueeze(-1) * gradient
        return grad, None, None, None


class _Dense(_Rows):
    """:func:`_two_sides` in few passes, a block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, mask: Tensor | None, s_0: float) -> Tensor:
        C = s.shape[-1]
        rows = s.numel() // C
        flat: list[Any] = [None if x is None else x.expand(s.shape).reshape(rows, C) for x in (s, t, mask)]
        size = _rows_at_once(rows, C, s.device)
        if size == rows:
            loss, gradient = _dense_block(s_0, *flat)
        else:
            loss, gradient = s.new_empty(rows), s.new_empty(rows if ctx.needs_input_grad[0] else 0, C)
            for i in range(0, rows, size):
                block: list[Any] = [None if x is None else x[i : i + size] for x in flat]
                out = gradient[i : i + size]
                loss[i : i + size], _ = _dense_block(s_0, *block, out=out if len(out) else None)
        ctx.save_for_backward(s, t, mask, gradient.view(s.shape) if ctx.needs_input_grad[0] else None)
        ctx.formula, ctx.threshold = _two_sides, s_0
        return loss.view(s.shape[:-1])


def _dense_block(
    s_0: float, s: Tensor, t: Tensor, mask: Tensor | None, *, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The losses (R,) of some rows and their gradients (R, C), written to ``out`` where it is given."""
    if mask is not None:
        s, t = torch.where(mask, s, 0), t.masked_fill(~mask, 0)
    # Labels leave a side by arithmetic: torch.where and masked_fill take several times as long on a CPU, and so does
    # turning booleans into numbers unless they are read as bytes.
    hard = t.dtype == torch.bool
    marks = t.view(torch.uint8) if hard else t
    # In one buffer one operator serves both sides. But what is kept until the backward pass needs a buffer of its own.
    neg, pos = sides = s.new_empty(2, *s.shape) if out is not None else (s.new_empty(s.shape), s.new_empty(s.shape))
    torch.clamp(s, -_FAR, _FAR, out=neg)
    _ = pos.copy_(marks) if hard else torch.ceil(marks, out=pos)  # 0 for a label that is no positive at all
    pos.sub_(1).mul_(-_ABSENT).sub_(neg)
    flat_neg, flat_marks = neg.view(-1), marks.reshape(-1)
    pieces = _pieces(s)
    for piece in pieces:
        mark = flat_marks[piece]
        flat_neg[piece].add_(mark if hard else mark.floor(), alpha=_ABSENT)  # 0: a negative, at least in part
    if mask is not None:
        neg.masked_fill_(~mask, _ABSENT)

    def by_labels(x: Tensor) -> None:
        if x is not pos:
            for piece in pieces:
                flat_neg[piece].mul_(1 - flat_marks[piece])
        if x is not neg:
            pos.mul_(t)

    weigh = None if hard else by_labels
    if isinstance(sides, Tensor):
        loss, _ = _side(sides, s.new_tensor([s_0, -s_0]).view(2, 1, 1) if s_0 else None, weigh)
        return loss.sum(0).squeeze(-1), torch.sub(neg, pos, out=out)
    log_neg, p = _side(neg, s_0 or None, weigh)
    log_pos, q = _side(pos, -s_0 or None, weigh)
    return log_neg.add_(log_pos).squeeze(-1), p.sub_(q)


def _pieces(s: Tensor) -> list[slice]:
    """Parts of the flat scores: torch makes copies of labels as numbers, and a copy of a part takes less memory."""
    n, (small, _) = s.numel(), _sizes(s.device)
    step = n if n <= _TINY else min(small, -(-n // 4))
    return [slice(i, i + step) for i in range(0, n, step)]


def _rows_at_once(rows: int, num_classes: int, device: torch.device) -> int:
    """How many rows to work on at once; of many scores never more than a third, so that the buffers stay small."""
    small, most = _sizes(device)
    return rows if rows * num_classes <= small else max(1, min(most // num_classes, (rows + 2) // 3))


def _sizes(device: torch.device) -> tuple[int, int]:
    return _CPU_SIZES if device.type == "cpu" else _DEVICE_SIZES


class _Sparse(_Rows):
    """:func:`_two_sides_of_indices` without a mark for every label."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, index: Tensor, mask: Tensor | None, s_0: float) -> Tensor:
        C = s.shape[-1]
        ordered = index.sort(-1).values  # padding last, repeats side by side
        given = ordered < C
        at = ordered.clamp(max=C - 1)
        first = given.clone()
        first[..., 1:] &= ordered[..., 1:] != ordered[..., :-1]
        neg = (s if mask is None else torch.where(mask, s, 0)).clamp(-_FAR, _FAR)
        if mask is not None:
            whole = mask.expand(s.shape)
            neg.masked_fill_(~whole, _ABSENT)
            first &= whole.gather(-1, at)
        pos = torch.where(first, -neg.gather(-1, at), _ABSENT)
        # "amin" with inf leaves a label as it is, so padding may point anywhere
        neg.scatter_reduce_(-1, at, torch.where(given, _ABSENT, math.inf).to(s.dtype), "amin")
        log_neg, p = _side(neg, s_0 or None)
        log_pos, q = _side(pos, -s_0 or None)
        gradient = p.scatter_reduce_(-1, at, torch.where(first, -q, math.inf), "amin")
        ctx.save_for_backward(s, index, mask, gradient)
        ctx.formula, ctx.threshold = _two_sides_of_indices, s_0
        return log_neg.add_(log_pos).squeeze(-1)


def _side(
    x: Tensor, s_0: Tensor | float | None, weigh: Callable[[Tensor], None] | None = None
) -> tuple[Tensor, Tensor]:
    r"""One half of the loss, :math:`\log(1 + \sum_i w_i e^{x_i - s_0})`, and its gradient, written over ``x``.

    ``weigh`` multiplies the exponentials, which it finds in ``x``, by the weights.
    """
    m = x.amax(-1, keepdim=True)
    # 2^(x log2 e): on a CPU torch's exp2 is faster than its exp; x - m has rounded as much already
    e = x.sub_(m).mul_(_LOG2_E).exp2_()
    if weigh is not None:
        weigh(x)
    z = e.sum(-1, keepdim=True)
    if weigh is not None:
        z.clamp_(min=torch.finfo(z.dtype).tiny)  # every weight may be 0: log 0 and 0 / 0
    log_odds = z.log().add_(m)
    if s_0 is not None:
        log_odds.sub_(s_0)
    e.mul_(log_odds.sigmoid().div_(z))
    return F.softplus(log_odds, threshold=_FULL), e


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x) at full precision: torch's own softplus returns x above 20."""
    return -F.logsigmoid(-x)


# ---------------------------------------------------------------------------------------------------- other parts


def _lowest(s: Tensor, pos: Tensor, default: float) -> Tensor:
    """The lowest positive score of each row, (..., 1), or ``default`` where there is none; without gradient."""
    lowest = torch.where(pos, s.detach(), -_ABSENT).amin(-1, keepdim=True)
    return torch.where(pos.any(-1, keepdim=True), lowest, default)


def _log_elementary(x: Tensor, degree: int) -> Tensor:
    r"""Logarithms of the elementary symmetric polynomials :math:`e_0, \dots, e_D` of :math:`e^{x_i}`: (..., D + 1).

    They are the coefficients of :math:`\prod_i (1 + e^{x_i} z)`. The factors are multiplied in pairs, and so on.
    """
    n = x.shape[-1]
    x = F.pad(x, (0, (1 << max(n - 1, 1).bit_length()) - n), value=_ABSENT)  # a power of 2, and at least 2
    product = torch.stack((torch.zeros_like(x), x), -1)
    while product.shape[-2] > 1:
        product = _log_multiply(product[..., 0::2, :], product[..., 1::2, :], degree)
    product = product.squeeze(-2)
    return F.pad(product, (0, degree + 1 - product.shape[-1]), value=_ABSENT)


def _log_multiply(f: Tensor, g: Tensor, degree: int) -> Tensor:
    """The product of two polynomials of equal degree, all in logarithms, up to ``degree``."""
    n = f.shape[-1]
    terms = f.unsqueeze(-1) + g.unsqueeze(-2)  # f_i g_j, (n, n)
    # row i moves i places to the right, so that terms of equal i + j stand in one column
    skewed = F.pad(terms, (0, n), value=_ABSENT).flatten(-2)[..., :-n]
    return torch.logsumexp(skewed.reshape(*terms.shape[:-1], 2 * n - 1), -2)[..., : degree + 1]


def _followed(s: Tensor) -> Tensor:
    """The scores; detached where no gradient is recorded, so that none is prepared."""
    return s if torch.is_grad_enabled() else s.detach()


def _given(mask: Tensor | None) -> tuple[Tensor, ...]:
    return () if mask is None else (mask,)


def _check_index(index: Tensor, shape: tuple[int, ...], ignore_index: int) -> Tensor:
    """The indices as int64 with C in place of padding, at least one per row, or an error that names the argument."""
    check_ignore_index(ignore_index)
    *rows, C = shape
    if isinstance(index, Tensor) and (index.dim() != len(shape) or list(index.shape[:-1]) != rows):
        wanted = ", ".join([*map(str, rows), "k"])
        raise ValueError(f"index must have the shape ({wanted}), the rows of input, got {describe(index)}")
    given = check_index_target(index, getattr(index, "shape", ()), C, ignore_index, name="index")
    P = index.long().masked_fill(~given, C)
    return P if P.shape[-1] > 0 else F.pad(P, (0, 1), value=C)


def _check_count(name: str, value: int | None) -> int | None:
    """Raise unless ``value`` is None or an integer of at least 1."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer or None, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


# --------------------------------------------------------------------------------------------------------- modules


class MultilabelSoftmaxLoss(nn.Module):
    """:func:`multilabel_softmax_loss` as a module."""

    def __init__(self, *, threshold: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold)
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return multilabel_softmax_loss(input, target, mask=mask, threshold=self.threshold, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"threshold={self.threshold:g}, reduction={self.reduction!r}"


class SparseMultilabelSoftmaxLoss(nn.Module):
    """:func:`sparse_multilabel_softmax_loss` as a module."""

    def __init__(self, *, threshold: float = 0.0, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold)
        self.ignore_index = check_ignore_index(ignore_index)
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Tensor, index: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and the positives in ``index``."""
        return sparse_multilabel_softmax_loss(
            input,
            index,
            mask=mask,
            threshold=self.threshold,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"threshold={self.threshold:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class MultilabelPairwiseLoss(nn.Module):
    """:func:`multilabel_pairwise_loss` as a module."""

    def __init__(self, *, scale: float = 1.0, margin: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.scale = check_number("scale", scale, low=0, open_low=True)
        self.margin = check_number("margin", margin)
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return multilabel_pairwise_loss(
            input, target, scale=self.scale, margin=self.margin, mask=mask, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"scale={self.scale:g}, margin={self.margin:g}, reduction={self.reduction!r}"


class SubsetSoftmaxLoss(nn.Module):
    """:func:`subset_softmax_loss` as a module."""

    def __init__(self, *, max_positives: int | None = None, threshold: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        self.max_positives = _check_count("max_positives", max_positives)
        self.threshold = check_number("threshold", threshold)
        check_reduction(reduction)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return subset_softmax_loss(
            input,
            target,
            max_positives=self.max_positives,
            threshold=self.threshold,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"max_positives={self.max_positives}, threshold={self.threshold:g}, reduction={self.reduction!r}"


class MultilabelPredict(nn.Module):
    """:func:`multilabel_predict` as a module."""

    def __init__(self, *, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold)

    def forward(self, input: Tensor) -> Tensor:
        """Which labels are positive."""
        return multilabel_predict(input, threshold=self.threshold)

    def extra_repr(self) -> str:
        """The options."""
        return f"threshold={self.threshold:g}"
