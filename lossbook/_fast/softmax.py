"""Losses of one class out of many, as functions of the rest's margin z: exponentials forward, one product backward.

With 0 at the target, the others' exponentials sum to what is e = 1 - p_t but for the unit, without cancellation. Then
dL/ds_i = L'(z) p_i / e and dL/ds_t = -L'(z): with minus that sum at the target, all are one number times an entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lossbook._common import FAR, if_counted
from lossbook._fast._compiled import Step, compiled, left_out, one_step
from lossbook._fast._function import LOG2_E, Kept, clear, fused
from lossbook._torch import readable

# the loss of a row and L'(z) / e from e = 1 - p_t, p_t and a call for -log p_t
Row = Callable[[Tensor, Tensor, Callable[[], Tensor]], "tuple[Tensor, Tensor]"]


def softmax_rows(
    formula: Callable[..., Tensor], row: Row, s: Tensor, t: Tensor, counted: Tensor | None, step: Step
) -> Tensor:
    """``formula(s, t, counted)``, the losses of rows, 0 where ``counted`` is False; ``row`` is its fast form.

    A compiler takes the whole as one ``step``.
    """

    def value(s: Tensor, t: Tensor, counted: Tensor | None) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        x, own, rest = exponentials(s, at)
        total = own + rest
        loss, slope = row(rest / total, own / total, lambda: cross_entropy(s, at, x, own, rest))
        factor = slope / total
        x.scatter_(-1, at, rest.neg_().unsqueeze(-1))
        clear(counted, x, loss, factor)
        return loss, (x, factor, counted)

    if s.shape[-1] == 1:  # no other class
        return formula(s, t, counted)
    if compiled(s):
        return one_step(step, s, left_out(t, counted), counted=counted)
    return fused(formula, value, weighed, s, t, counted)


def exponentials(s: Tensor, at: Tensor, k: float = 1.0) -> tuple[Tensor, Tensor | float, Tensor]:
    """e^(k s_i) with 0 at the target, the target's own, and the sum of the others, each row in a unit of its own.

    The unit is the target's, so a common offset costs no digits. Where the others come out too large for it, their sum
    is NaN: the formula knows them. Where nobody can look, the unit is that of a softmax.
    """
    d = s - s.gather(-1, at)
    if not readable(s):
        x = torch.softmax(d.mul_(k).clamp_(-FAR, FAR), -1)
        own = x.gather(-1, at).squeeze(-1)
        return x.scatter_(-1, at, 0), own, x.sum(-1)
    x = d.mul_(k * LOG2_E).exp2_().scatter_(-1, at, 0)  # on a CPU three times as fast as exp
    rest = x.sum(-1)
    return x, 1.0, rest.masked_fill_(rest > FAR, math.nan)


def cross_entropy(s: Tensor, at: Tensor, x: Tensor, own: Tensor | float, rest: Tensor) -> Tensor:
    """-log p_t = log(1 + rest / own), of what ``exponentials`` or a softmax gives."""
    if isinstance(own, float):
        return torch.log1p(rest)
    ce = (rest / own).log1p_()
    if readable(own) and own.numel() > 0 and own.amin().item() > 1e-30:
        return ce
    # x is a softmax, and of the top class, which is another one here, 1 / sum_i e^(s_i - top)
    log_p = (s.gather(-1, at) - s.amax(-1, keepdim=True)).add_(x.amax(-1, keepdim=True).log_())
    return torch.where(own > 1e-30, ce, log_p.neg_().view(own.shape))


def weighed(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    """A ``slope``: the gradient of each row's loss but for a factor of the row, times factor and what arrives."""
    slope, factor, counted = kept
    return torch.mul(slope, (if_counted(g, counted) * factor).unsqueeze(-1), out=slope if spare else None)
