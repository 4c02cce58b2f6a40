"""Losses of one class out of many, as functions of the rest's margin z: one softmax forward, one product backward.

With p the softmax and the target's entry set to 0, the others sum to e = 1 - p_t without cancellation. Then
dL/ds_i = L'(z) p_i / e and dL/ds_t = -L'(z): with -e at the target, all are L'(z) / e times an entry.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lossbook._fast._function import Kept, fused
from lossbook._torch import readable

# the loss of a row and L'(z) / e from e = 1 - p_t, p_t and a call for -log p_t
Row = Callable[[Tensor, Tensor, Callable[[], Tensor]], "tuple[Tensor, Tensor]"]


def softmax_rows(formula: Callable[..., Tensor], row: Row, s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
    """``formula(s, t, counted)``, the losses of rows, 0 where ``counted`` is False; ``row`` is its fast form."""

    def value(s: Tensor, t: Tensor, counted: Tensor | None) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        p, p_t, e = others(s, at)
        loss, slope = row(e, p_t, lambda: cross_entropy(s, at, p, p_t, e))
        p.scatter_(-1, at, e.neg().unsqueeze(-1))
        if counted is not None:
            ignored = ~counted
            p.masked_fill_(ignored.unsqueeze(-1), 0)
            loss.masked_fill_(ignored, 0)
            slope.masked_fill_(ignored, 0)
        return loss, (p, slope)

    if s.shape[-1] == 1:  # no other class
        return formula(s, t, counted)
    return fused(formula, value, weighed, s, t, counted)


def others(s: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax with 0 at the target; the target's p and 1 - p."""
    p = torch.softmax(s, -1)
    p_t = p.gather(-1, at).squeeze(-1)
    return p, p_t, p.scatter_(-1, at, 0).sum(-1)


def cross_entropy(s: Tensor, at: Tensor, p: Tensor, p_t: Tensor, e: Tensor) -> Tensor:
    """-log p_t = log(1 + e / p_t), from what ``others`` gives."""
    ce = (e / p_t).log1p_()
    if readable(p_t) and p_t.numel() > 0 and p_t.amin().item() > 1e-30:
        return ce
    # the top class, which is another one here, has p = 1 / sum_i e^(s_i - top)
    log_p = (s.gather(-1, at) - s.amax(-1, keepdim=True)).add_(p.amax(-1, keepdim=True).log_())
    return torch.where(p_t > 1e-30, ce, log_p.neg_().view(p_t.shape))


def weighed(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    """A ``slope``: the gradient of each row's loss but for a factor of the row, times factor and what arrives."""
    slope, factor = kept
    return torch.mul(slope, (g * factor).unsqueeze(-1), out=slope if spare else None)
