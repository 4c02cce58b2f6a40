"""The symmetric KL of two predictions in whole-tensor operations, with both gradients.

|p - q| = max(p, q) max(1 - p, 1 - q) (1 - e^-|d|) with d = k (s - r), and 1 - p is the sigmoid of -k s: nothing is
subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lossbook._torch import last_backward, plain, readable


def two_predictions(formula: Callable[[Tensor, Tensor], Tensor], s: Tensor, r: Tensor, k: float) -> Tensor:
    """``formula(s, r)``, the divergence of each row, by the fast road where the tensors are plain."""
    if not (plain(s, r) and readable(s, r)):
        return formula(s, r)
    if torch.is_grad_enabled() and (s.requires_grad or r.requires_grad):
        loss: Tensor = _Divergence.apply(s, r, formula, k)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            loss, *_ = _parts(s, r, k)
    return loss if bool(loss.isfinite().all()) else formula(s, r)


def _parts(s: Tensor, r: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row; d, p - q, p (1 - p) and q (1 - q)."""
    d = torch.sub(s, r)
    p, q = (x.sigmoid() if k == 1 else torch.mul(x, k).sigmoid_() for x in (s, r))
    apart = torch.maximum(p, q)
    not_p, not_q = (torch.mul(x, -k).sigmoid_() for x in (s, r))
    p.mul_(not_p)
    q.mul_(not_q)
    apart.mul_(torch.maximum(not_p, not_q, out=not_p))
    gap = torch.abs(d, out=not_p).mul_(-k).expm1_().neg_()
    d = d if k == 1 else d.mul_(k)
    apart = torch.copysign(apart.mul_(gap), d, out=apart)
    return torch.mul(d, apart, out=gap).sum(-1), d, apart, p, q


class _Divergence(Function):
    """The loss with both gradients by hand; derivatives of these come from the formula."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, r: Tensor, formula: Callable[[Tensor, Tensor], Tensor], k: float) -> Tensor:
        loss, *parts = _parts(s, r, k)
        ctx.save_for_backward(s, r, *parts)
        ctx.formula, ctx.scale = formula, k
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (s, r, d, apart, of_p, of_q) = gradients, ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or not plain(g):
            with torch.enable_grad():
                names = s.view_as(s), r.view_as(r)  # other names: hooks on the first ones run only once
                wanted = [name for name, need in zip(names, needed) if need]  # noqa: B905 - torch 2.6 traces no strict
                loss = ctx.formula(*names)
            found = iter(torch.autograd.grad(loss, wanted, g, create_graph=torch.is_grad_enabled()))
            by_s, by_r = (next(found) if need else None for need in needed)
        else:
            spare, factor = last_backward(), g.mul(ctx.scale).unsqueeze(-1)
            by_s, by_r = (
                _slope(d, apart, variance, sign, spare) if need else None
                for variance, sign, need in zip((of_p, of_q), (factor, -factor), needed)  # noqa: B905
            )
        return by_s, by_r, None, None


def _slope(d: Tensor, apart: Tensor, variance: Tensor, factor: Tensor, spare: bool) -> Tensor:
    """k (p (1 - p) d + (p - q)) times the gradient of the loss."""
    return torch.addcmul(apart, variance, d, out=variance if spare else None).mul_(factor)
