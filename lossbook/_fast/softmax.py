"""Losses of one class out of many, as functions of the rest's margin z: exponentials forward, one product backward.

With 0 at the target, the others' exponentials sum to what is e = 1 - p_t but for the unit, without cancellation. Then
dL/ds_i = L'(z) p_i / e and dL/ds_t = -L'(z): with minus that sum at the target, all are one number times an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lossbook._fast._function import Kept, fused
from lossbook._torch import readable

# scores this near 0 need no shift: as exponents of 2 they stay under 16, so a rounding of one costs at most 3.3e-7
NEAR = 11.0
# the loss of a row and L'(z) / e from e = 1 - p_t, p_t and a call for -log p_t
Row = Callable[[Tensor, Tensor, Callable[[], Tensor]], "tuple[Tensor, Tensor]"]


def softmax_rows(formula: Callable[..., Tensor], row: Row, s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
    """``formula(s, t, counted)``, the losses of rows, 0 where ``counted`` is False; ``row`` is its fast form."""

    def value(s: Tensor, t: Tensor, counted: Tensor | None) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        x, own, rest, near = exponentials(s, at)
        total = own + rest
        loss, slope = row(rest / total, own / total, lambda: cross_entropy(s, at, x, own, rest, near))
        factor = slope / total
        x.scatter_(-1, at, rest.neg_().unsqueeze(-1))
        if counted is not None:
            ignored = ~counted
            x.masked_fill_(ignored.unsqueeze(-1), 0)
            loss.masked_fill_(ignored, 0)
            factor.masked_fill_(ignored, 0)
        return loss, (x, factor)

    if s.shape[-1] == 1:  # no other class
        return formula(s, t, counted)
    return fused(formula, value, weighed, s, t, counted)


def exponentials(s: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, bool]:
    """e^s with 0 at the target, the target's own, the sum of the others, each row in a unit of its own.

    And whether all scores are seen to be near 0.
    """
    low, high = (bound.item() for bound in torch.aminmax(s)) if readable(s) and s.numel() > 0 else (0, math.inf)
    near = low > -NEAR and high < NEAR
    # 2^x takes a third of the time of a softmax
    x = (s * math.log2(math.e)).exp2_() if near else torch.softmax(s, -1)
    own = x.gather(-1, at).squeeze(-1)
    return x, own, x.scatter_(-1, at, 0).sum(-1), near


def cross_entropy(s: Tensor, at: Tensor, x: Tensor, own: Tensor, rest: Tensor, near: bool = False) -> Tensor:
    """-log p_t = log(1 + rest / own), from what ``exponentials`` gives."""
    ce = (rest / own).log1p_()
    if near or (readable(own) and own.numel() > 0 and own.amin().item() > 1e-30):
        return ce
    # x is a softmax, and of the top class, which is another one here, 1 / sum_i e^(s_i - top)
    log_p = (s.gather(-1, at) - s.amax(-1, keepdim=True)).add_(x.amax(-1, keepdim=True).log_())
    return torch.where(own > 1e-30, ce, log_p.neg_().view(own.shape))


def weighed(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    """A ``slope``: the gradient of each row's loss but for a factor of the row, times factor and what arrives."""
    slope, factor = kept
    return torch.mul(slope, (g * factor).unsqueeze(-1), out=slope if spare else None)
