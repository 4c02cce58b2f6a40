"""The multi-label losses from one exponential of each score.

With e = e^(s - s0), both sums come from it: (1 - t) e for the negatives and t / e for the positives. Nothing is
subtracted, and log1p of the sums is the loss to the last digit. Scores must lie within about +-80 in float32, apart
from those of labels that the side ignores, as negatives at -1e12. Other scores take the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossbook._fast._compiled import Step, compiled, left_out, one_step
from lossbook._fast._function import LOG2_E, Formula, Kept, fused, scaled
from lossbook._torch import readable

# up to so many scores are worked on at once; of more, a third of the rows
WHOLE = 2**17
# so many factors times degrees are multiplied in one go
FEW = 2**14
# the loss of a row and its slopes along both sums, from these sums
Row = Callable[[Tensor, Tensor], "tuple[Tensor, Tensor, Tensor]"]


def threshold_sums(formula: Formula, row: Row, s: Tensor, t: Tensor, mask: Tensor | None, threshold: float) -> Tensor:
    """``formula(s, t, mask)``, the loss with a threshold."""
    return _two_sums(formula, row, s, t, mask, threshold, 1.0, ("multilabel_softmax_loss", {"threshold": threshold}))


def pair_sums(
    formula: Formula, row: Row, s: Tensor, t: Tensor, mask: Tensor | None, scale: float, margin: float
) -> Tensor:
    """``formula(s, t, mask)``, the loss over pairs."""
    if abs(scale * margin) > 80:  # e^(scale margin) may overflow
        return formula(s, t, mask)
    step: Step = ("multilabel_pairwise_loss", {"scale": scale, "margin": margin})
    return _two_sums(formula, row, s, t, mask, 0.0, scale, step)


def _two_sums(
    formula: Formula,
    row: Row,
    s: Tensor,
    t: Tensor,
    mask: Tensor | None,
    shift: float,
    scale: float,
    step: Step,
) -> Tensor:
    """``formula(s, t, mask)``; ``row`` is its fast form, of the sums of e^(scale (s - shift)) and its inverse.

    A compiler takes the whole as one ``step``.
    """

    def value(s: Tensor, t: Tensor, mask: Tensor | None) -> tuple[Tensor, Kept]:
        slope = s.new_empty(s.shape)
        kept = slope, None if mask is None else mask.any(-1)
        if s.numel() <= WHOLE:
            return _block(row, shift, scale, s, t, mask, slope), kept
        loss = s.new_empty(s.shape[:-1])
        every = [None if x is None else torch.atleast_2d(x) for x in (s, t, mask, slope)]  # type: ignore[no-untyped-call]
        losses = torch.atleast_1d(loss)  # type: ignore[no-untyped-call]
        size = -(-len(losses) // 3)
        for i in range(0, len(losses), size):
            block: list[Any] = [None if x is None else x[i : i + size] for x in every]
            losses[i : i + size] = _block(row, shift, scale, *block)
        return loss, kept

    if s.numel() == 0:
        return s.sum(-1)  # no label: log 1 + log 1
    if compiled(s):
        return one_step(step, s, t, mask=mask, counted=None if mask is None else mask.any(-1))
    return fused(formula, value, scaled, s, t, mask) if readable(s, t) else formula(s, t, mask)


def _block(row: Row, shift: float, scale: float, s: Tensor, t: Tensor, mask: Tensor | None, slope: Tensor) -> Tensor:
    """The losses of some rows; their gradients are written to ``slope``. NaN where the formula is needed."""
    if mask is not None:
        s, t = s.masked_fill(~mask, shift), t.masked_fill(~mask, 0)
    t = t.view(torch.uint8) if t.dtype == torch.bool else t  # arithmetic with booleans is slow
    e = torch.sub(s, shift).mul_(scale * LOG2_E) if shift else torch.mul(s, scale * LOG2_E)
    low, high = (bound.item() for bound in torch.aminmax(e))
    info = torch.finfo(e.dtype)
    bound = 0.9 * math.log2(info.max)
    wide = not (-bound < low and high < bound)
    if wide and (low != low or bool((((e <= -bound) & (t > 0)) | ((e >= bound) & (t < 1))).any())):
        return s.new_full(s.shape[:-1], math.nan)
    e.exp2_()  # on a CPU three times as fast as exp
    neg = torch.sub(t.new_ones(()), t, out=slope) if t.is_floating_point() else slope.copy_(1 - t)
    neg.mul_(e.clamp(max=info.max) if wide else e)  # 0 where the weight is 0
    if wide:
        e.clamp_(min=info.tiny)
    pos = torch.div(t, e, out=e)
    if mask is not None:
        neg.mul_(mask.view(torch.uint8))
    loss, a, b = row(neg.sum(-1), pos.sum(-1))
    neg.mul_(a.unsqueeze(-1)).addcmul_(pos, b.unsqueeze(-1), value=-1)
    return loss


def indexed_sums(
    formula: Callable[..., Tensor], s: Tensor, index: Tensor, given: Tensor, mask: Tensor | None, shift: float
) -> Tensor:
    """``formula(s, index, given, mask)``, the loss of positives given as indices, without a mark for every label."""

    def value(s: Tensor, index: Tensor, given: Tensor, mask: Tensor | None) -> tuple[Tensor, Kept]:
        some = None  # which rows have a positive, where not all do
        if not bool(given.all()):
            # padding repeats an index of its row, or in a row of none writes label 0 back
            at = torch.where(given, index, -1)
            last = at.amax(-1, keepdim=True)
            index, some = torch.where(given, index, last).clamp_(min=0), last >= 0
        e = s.new_empty(s.shape)
        place = torch.arange(index.shape[-1], dtype=s.dtype, device=s.device).expand(index.shape)
        first = e.scatter_(-1, index, place).gather(-1, index) == place  # of repeats one stays
        if some is not None:
            first &= some
        if mask is not None:
            s = s.masked_fill(~mask, 0)
            own_mask = mask.gather(-1, index)
            first &= own_mask
        own = torch.exp(shift - s.gather(-1, index))
        if some is not None:
            own.masked_fill_(~some, 0)  # label 0 stands in the place of none and may be far below
        pos = torch.mul(own, first).sum(-1)
        e = torch.sub(s, shift, out=e).mul_(LOG2_E) if shift else torch.mul(s, LOG2_E, out=e)
        e.exp2_()
        if mask is not None:
            e.mul_(mask.view(torch.uint8))
        e.scatter_(-1, index, torch.zeros_like(own) if some is None else e.gather(-1, index).masked_fill_(some, 0))
        neg = e.sum(-1)
        e.mul_((neg + 1).reciprocal_().unsqueeze(-1))
        own.div_((pos + 1).neg_().unsqueeze(-1))
        if mask is not None:
            own.mul_(own_mask)
        e.scatter_(-1, index, own if some is None else torch.where(some, own, e.gather(-1, index)))
        return neg.log1p_().add_(pos.log1p_()), (e, None if mask is None else mask.any(-1))

    if s.numel() == 0:
        return s.sum(-1)
    if compiled(s):
        step, counted = ("sparse_multilabel_softmax_loss", {"threshold": shift}), None if mask is None else mask.any(-1)
        return one_step(step, s, left_out(index, given), mask=mask, counted=counted)
    return fused(formula, value, scaled, s, index, given, mask) if readable(s) else formula(s, index, given, mask)


def exchanged_sets(
    formula: Callable[..., Tensor],
    s: Tensor,
    neg: Tensor,
    pos: Tensor,
    degree: int,
    room: tuple[Tensor, float] | None,
) -> Tensor:
    """``formula(s, neg, pos)``, the loss over sets, from polynomials in float64, a factor for each label.

    ``room`` is how many labels each row may gain and the threshold, or None where it keeps its number.
    """

    def value(s: Tensor, neg: Tensor, pos: Tensor) -> tuple[Tensor, Kept]:
        shape, C = s.shape[:-1], s.shape[-1]
        x, neg, pos = (y.reshape(-1, C).T for y in (s, neg, pos))  # labels first
        there = neg | pos
        x = x.double().masked_fill(~there, 0)
        # only differences count, so the middle of the scores may be 0; the threshold class fixes it
        x -= (x.amax(0) + x.amin(0)) / 2 if room is None else room[1]
        x = torch.where(pos, -x, x).masked_fill_(~there, 0)
        reach = x.abs().topk(min(2 * degree, C), 0).values.sum(0).max().item()
        reach += 2 * min(C * math.log(2), degree * math.log(math.e * C / degree))  # and of how many sets there are
        if not reach < 650:  # e^709 is the end of float64
            return s.new_full(shape, math.nan), ()
        y = x.exp_()
        most = int(pos.sum(0).max())
        where = pos.to(torch.uint8).topk(most, 0).indices
        removed = torch.where(pos.gather(0, where), y.gather(0, where), 0)
        added = y.masked_fill(pos | ~neg, 0)
        parts = [_segments(y, degree) for y in (removed, added)]
        taken, gained = (p[-1][0] for p in parts)  # (D + 1, rows)
        if room is None:
            other = gained.clone(), taken.clone()
            other[0][0], other[1][0] = 0, 0
            total = (taken * other[0]).sum(0)
        else:
            steps = torch.arange(degree + 1, device=s.device)
            fits = (steps - steps.unsqueeze(-1)).unsqueeze(-1) <= room[0].reshape(-1)  # (a, b, rows)
            fits[0, 0] = False
            other = torch.einsum("abr,br->ar", fits.double(), gained), torch.einsum("abr,ar->br", fits.double(), taken)
            total = (taken * other[0]).sum(0)
        weight = 1 / (1 + total)
        slope = added.mul_(_slopes(parts[1], other[1] * weight))
        own = removed.mul_(_slopes(parts[0], other[0] * weight)).neg_()
        slope.scatter_add_(0, where, own)
        loss = s.new_empty(shape).copy_(torch.log1p(total).view(shape))  # no view: losses may be edited in place
        return loss, (slope.T.to(s.dtype).reshape(*shape, C), there.any(0).view(shape))

    if s.numel() == 0:
        return s.sum(-1)
    return fused(formula, value, scaled, s, neg, pos) if readable(s, neg, pos) else formula(s, neg, pos)


def _history(start: Tensor, y: Tensor) -> Tensor:
    """The polynomials ``start`` (D + 1, rows) and those after each factor 1 + y_i z: (n + 1, D + 1, rows)."""
    e = start.new_empty(len(y) + 1, *start.shape)
    e[0] = start
    e[:, 0] = 1
    lower, upper = e[:, :-1].unbind(), e[:, 1:].unbind()
    for i, y_i in enumerate(y.unbind()):
        torch.addcmul(upper[i], lower[i], y_i, out=upper[i + 1])
    return e


def _segments(y: Tensor, degree: int) -> list[tuple[Tensor, Tensor]]:
    """Parts of the factors, each with the polynomials before it, and at last nothing with the product.

    One part where little is worked on, else about sqrt(n).
    """
    start = y.new_zeros(degree + 1, y.shape[1])
    start[0] = 1
    parts = []
    size = len(y) if y.numel() * degree <= FEW else math.isqrt(len(y))
    for part in y.split(max(1, size)):  # type: ignore[no-untyped-call]
        parts.append((start, part))
        start = _history(start, part)[-1].clone()
    return [*parts, (start, y[:0])]


def _slopes(parts: list[tuple[Tensor, Tensor]], g: Tensor) -> Tensor:
    """The gradient of the factors for the gradient ``g`` of their product; everything added is positive."""
    found = []
    now, before = g.clone(), g.clone()
    for start, y in reversed(parts):  # the polynomials of one part at a time are computed anew
        slopes = torch.empty_like(y)
        for i, lower in reversed(list(enumerate(_history(start, y)[:-1, :-1].unbind()))):
            torch.mul(now[1:], lower, out=before[1:])
            torch.sum(before[1:], 0, out=slopes[i])
            torch.addcmul(now[:-1], now[1:], y[i], out=before[:-1])
            before[-1] = now[-1]
            now, before = before, now
        found.append(slopes)
    return torch.cat(found[::-1])
