"""The symmetric KL of two predictions, some rows at a time, with both gradients at once.

p - q = tanh(d / 2) (p (1 - q) + q (1 - p)) with d = k (s - r), and 1 - p is the sigmoid of -k s: nothing is subtracted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from lossbook._fast._threads import each, numbers, slices
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
    # NaN or an infinite score: the formula knows what they mean
    return loss if math.isfinite(loss.detach().sum()) else formula(s, r)


def _parts(s: Tensor, r: Tensor, k: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each row; by s and by -r its gradients over k."""
    loss, by_s, by_r = s.new_empty(s.shape[:-1]), s.new_empty(s.shape), s.new_empty(s.shape)
    if s.numel() <= numbers(s.device):
        _piece(k, [torch.empty_like(by_s) for _ in range(3)], s, r, loss, by_s, by_r)
        return loss, by_s, by_r
    C = s.shape[-1]
    size = max(numbers(s.device) // C, 1)
    whole = (s.reshape(-1, C), r.reshape(-1, C), loss.view(-1), by_s.view(-1, C), by_r.view(-1, C))

    def work(part: slice, room: Tensor) -> None:
        _piece(k, list(room[:, : part.stop - part.start]), *(x[part] for x in whole))

    each(s.device, slices(s.device, len(whole[0]), size), lambda: s.new_empty(3, size, C), work)
    return loss, by_s, by_r


def _piece(k: float, spare: list[Tensor], s: Tensor, r: Tensor, loss: Tensor, by_s: Tensor, by_r: Tensor) -> None:
    """Write the loss and the gradients of some rows."""
    gap, not_p, not_q = spare
    p, q = by_s, by_r
    for x, yes, no in ((s, p, not_p), (r, q, not_q)):
        torch.sigmoid(x if k == 1 else torch.mul(x, k, out=yes), out=yes)
        (torch.neg(x, out=no) if k == 1 else torch.mul(x, -k, out=no)).sigmoid_()
    torch.mul(p, not_q, out=gap).addcmul_(q, not_p)
    p.mul_(not_p)
    q.mul_(not_q)
    d = torch.sub(s, r, out=not_q)
    half = torch.mul(d, k / 2, out=not_p).numpy()
    np.tanh(half, out=half)  # six times as fast as torch's
    gap.mul_(not_p)
    if k != 1:
        d.mul_(k)
    torch.addcmul(gap, p, d, out=by_s)
    torch.addcmul(gap, q, d, out=by_r)
    torch.sum(gap.mul_(d), -1, out=loss)


class _Divergence(Function):
    """The loss with both gradients by hand; derivatives of these come from the formula."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, r: Tensor, formula: Callable[[Tensor, Tensor], Tensor], k: float) -> Tensor:
        loss, by_s, by_r = _parts(s, r, k)
        ctx.save_for_backward(s, r, by_s, by_r)
        ctx.formula, ctx.scale = formula, k
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,), (s, r, *slopes) = gradients, ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or not plain(g):
            with torch.enable_grad():
                names = s.view_as(s), r.view_as(r)  # other names: hooks on the first ones run only once
                wanted = [name for name, need in zip(names, needed) if need]  # noqa: B905 - torch 2.6 traces no strict
                loss = ctx.formula(*names)
            found = iter(torch.autograd.grad(loss, wanted, g, create_graph=torch.is_grad_enabled()))
            by_s, by_r = (next(found) if need else None for need in needed)
        else:
            spare, factor = last_backward(), (g if ctx.scale == 1 else g * ctx.scale).unsqueeze(-1)
            by_s, by_r = (
                torch.mul(slope, sign, out=slope if spare else None) if need else None
                for slope, sign, need in zip(slopes, (factor, -factor), needed)  # noqa: B905
            )
        return by_s, by_r, None, None
