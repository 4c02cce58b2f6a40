"""Losses of one class out of many, as functions of the rest's margin z: one softmax forward, one product backward.

With p the softmax and the target's entry set to 0, the others sum to e = 1 - p_t without cancellation. Then
dL/ds_i = L'(z) p_i / e and dL/ds_t = -L'(z).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lossbook._fast._function import Kept, fused
from lossbook._torch import readable

# the loss of a row and L'(z) / e from e = 1 - p_t, -log p_t and p_t
Row = Callable[[Tensor, Tensor, Tensor], "tuple[Tensor, Tensor]"]


def softmax_rows(formula: Callable[..., Tensor], row: Row, s: Tensor, t: Tensor, counted: Tensor) -> Tensor:
    """``formula(s, t, counted)``, the losses of rows, 0 where ``counted`` is False; ``row`` is its fast form."""

    def value(s: Tensor, t: Tensor, counted: Tensor) -> tuple[Tensor, Kept]:
        p, p_t, e, ce = softmax_terms(s, t.unsqueeze(-1))
        e = e.squeeze(-1)
        loss, slope = row(e, ce.squeeze(-1), p_t.squeeze(-1))
        return loss.masked_fill_(~counted, 0), (p, slope.masked_fill_(~counted, 0), slope * e, t, counted)

    if s.shape[-1] == 1:  # no other class
        return formula(s, t, counted)
    return fused(formula, value, _slope, s, t, counted)


def softmax_terms(s: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The softmax with 0 at the target; the target's p, 1 - p and -log p, each (..., 1)."""
    p = torch.softmax(s, -1)
    p_t = p.gather(-1, at)
    if readable(p_t) and not bool((p_t < 1e-30).any()):
        log_p = p_t.log()
    else:  # the top class has p = 1 / sum_i e^(s_i - top)
        log_p = s.gather(-1, at).sub_(s.amax(-1, keepdim=True)).add_(p.amax(-1, keepdim=True).log_())
    e = p.scatter_(-1, at, 0).sum(-1, keepdim=True)
    return p, p_t, e, torch.where(e < 0.5, torch.log1p(-e), log_p).neg_()


def _slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    p, others, own, t, counted = kept
    grad = torch.mul(p, (g * others).unsqueeze(-1), out=p if spare else None)
    grad.scatter_(-1, t.unsqueeze(-1), (g * own).neg_().unsqueeze(-1))
    whole = readable(counted) and bool(counted.all())
    return grad if whole else grad.masked_fill_(~counted.unsqueeze(-1), 0)
