"""The rest's log-sum-exp and the target's score: from cosines in three passes, from vectors some classes at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lossbook._classifier import inverse_norm
from lossbook._common import ABSENT, if_counted
from lossbook._fast._function import LOG2_E, Kept, clear, fused
from lossbook._fast.softmax import weighed
from lossbook._margins import AdditiveAngularMargin, AdditiveCosineMargin, Less, Psi
from lossbook._torch import compiling, full_precision, known_true, plain, readable

Formula = Callable[..., Tensor]
Margin = Callable[[Tensor], "tuple[Tensor, Tensor | None]"]
# e^64 times a billion classes is within float32, and so is e^-65: no need to look for a row's largest score
_UNSHIFTED = 64.0
# the chunks that torch.compile unrolls, unless a size is asked for
_UNROLLED = 16
# scores that cost no memory
_FEW = 2**16


def wide(scale: float | Tensor) -> bool:
    """Whether scores may lie beyond +-64."""
    return isinstance(scale, Tensor) or scale > _UNSHIFTED


def margin_rows(
    formula: Formula, psi: Margin, cosine: Tensor, t: Tensor, counted: Tensor | None, scale: float
) -> Tensor:
    """``formula(cosine, t, counted)``, the losses of rows.

    ``psi(cosine_t)`` returns the margin's values and its slope, None for 1.
    """

    def value(cosine: Tensor, t: Tensor, counted: Tensor | None) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        e, total, rest = _exponentials(cosine, at, scale, wide(scale) or not readable(cosine))
        psi_t, slope = psi(cosine.gather(-1, at).squeeze(-1))
        z = rest.sub_(psi_t, alpha=scale)
        loss = F.softplus(z, threshold=40)  # e^-40 is nothing beside 40
        factor = z.sigmoid_().mul_(scale).div_(total)
        own = (total if slope is None else total.mul_(slope)).neg_()
        e.scatter_(-1, at, own.unsqueeze(-1))
        clear(counted, e, loss, factor)
        return loss, (e, factor, counted)

    return fused(formula, value, weighed, cosine, t, counted)


def few(z: Tensor, weight: Tensor) -> bool:
    """Whether a linear layer's scores and vectors are so small that to hold them costs no memory and saves time."""
    return readable(z, weight) and len(weight) * max(z.shape[:-1].numel(), z.shape[-1]) <= _FEW


def value_and_slope(psi: Psi, cosine: Tensor, t: Tensor) -> Margin | None:
    """What gives ``psi`` of the target's cosines and its slope, where both have closed forms, else None."""
    if type(psi) in (Less, AdditiveCosineMargin):
        return lambda cosine_t: (cosine_t - psi.m, None)  # type: ignore[attr-defined]
    if type(psi) is not AdditiveAngularMargin or t.numel() == 0 or not readable(cosine, t):
        return None
    cos, sin = math.cos(psi.m), math.sin(psi.m)
    low, high = (bound.item() for bound in torch.aminmax(cosine.detach().gather(-1, t.unsqueeze(-1))))
    if not (0.01 - cos < low and high < 0.99):  # an end is near
        return None

    def turned(cosine_t: Tensor) -> tuple[Tensor, Tensor]:
        sine = (1 - cosine_t).mul_(1 + cosine_t).sqrt_()
        return cosine_t * cos - sine * sin, (cosine_t / sine).mul_(sin).add_(cos)

    return turned


def rest_rows(formula: Formula, cosine: Tensor, t: Tensor, counted: Tensor | None, scale: float | Tensor) -> Tensor:
    """``formula(cosine, t, counted, scale)``, ``(..., 2)``: the rest and the target's cosine, for any margin.

    With a tensor as scale, ``cosine`` is multiplied by it already, and so is the target's.
    """
    shifted = wide(scale) or not readable(cosine)

    def value(cosine: Tensor, t: Tensor, counted: Tensor | None, scale: float) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        e, total, rest = _exponentials(cosine, at, scale, shifted)
        both = torch.stack((rest, cosine.gather(-1, at).squeeze(-1)), -1)
        return if_counted(both, counted), (e, scale / total, at, counted)

    return fused(formula, value, _rest_slope, cosine, t, counted, 1.0 if isinstance(scale, Tensor) else scale)


def _rest_slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    e, factor, at, counted = kept
    grad = torch.mul(e, (g[..., 0] * factor).unsqueeze(-1), out=e if spare else None)
    return if_counted(grad.scatter_(-1, at, g[..., 1:]), counted)  # a row that does not count may hold NaN


def _exponentials(cosine: Tensor, at: Tensor, scale: float, shifted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """e^score with 0 at the target, the sums of rows, and their logarithms; with ``shifted``, e^(score - row's top)."""
    e = cosine * (scale * LOG2_E)  # 2^x takes a third of the time of e^x
    least = torch.finfo(e.dtype).tiny  # with no other class the sum is 0
    if not shifted:
        total = e.exp2_().scatter_(-1, at, 0).sum(-1)
        rest = total.log()
        return e, total.clamp_(min=least), rest
    top = e.scatter_(-1, at, ABSENT).amax(-1, keepdim=True)
    total = e.sub_(top).exp2_().scatter_(-1, at, 0).sum(-1).clamp_(min=least)
    return e, total, total.log2().add_(top.squeeze(-1)).mul_(math.log(2))


class _Chunk:
    """Some classes: vectors, inverse lengths, scores but for these, and where each row's target is, and whether."""

    def __init__(self, z: Tensor, weight: Tensor, t: Tensor, first: int, size: int) -> None:
        self.w = weight[first : first + size].to(z.dtype)
        self.inverse = inverse_norm(self.w)
        self.product = z @ self.w.t()
        inside = (t >= first) & (t < first + self.w.shape[0])
        self.inside = inside.unsqueeze(1)
        self.at = torch.where(inside, t - first, 0).unsqueeze(1)


def linear_rest(
    formula: Formula, z: Tensor, weight: Tensor, t: Tensor, size: int | None, scale: float | Tensor
) -> Tensor:
    """``formula(z, weight, t, size)``, ``(R, 2)``, for ``z`` ``(R, D)``; ``size`` classes are held at a time."""
    classes, length = weight.shape
    if not plain(z, weight, t):
        at_once = not compiling() or known_true(z.shape[0] * classes <= _FEW)
        return formula(z, weight, t, None if at_once else size or -(-classes // _UNROLLED))
    # 16 MB lie in a CPU's last cache, 64 MB keep an accelerator busy; less, and the threads wait for each other
    numbers = 2**22 if z.device.type == "cpu" else 2**24
    size = size or max(numbers // (len(z) + length), 128)
    both: Tensor = _LinearRest.apply(z, weight, t, size, wide(scale), formula)  # type: ignore[no-untyped-call]
    return both


class _LinearRest(Function):
    """One chunk of scores at a time, and the backward pass anew."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, t: Tensor, size: int, shifted: bool, formula: Formula) -> Tensor:
        with full_precision(z.device):
            s_t, total = z.new_zeros(len(z), 1), z.new_zeros(len(z), 1)  # total: sum of e^(s - top) so far
            top = z.new_full((len(z), 1), ABSENT if shifted else 0.0)
            for first in range(0, len(weight), size):
                chunk = _Chunk(z, weight, t, first, size)
                s = chunk.product.mul_(chunk.inverse.t())
                there = s.gather(1, chunk.at)
                s_t = torch.where(chunk.inside, there, s_t)
                s.scatter_(1, chunk.at, torch.where(chunk.inside, ABSENT, there))
                if shifted:
                    higher = torch.maximum(top, s.amax(1, keepdim=True))
                    total *= (top - higher).exp()
                    top = higher
                    s.sub_(top)
                total += s.exp_().sum(1, keepdim=True)
            rest = total.log_().add_(top).clamp_(min=ABSENT)
        ctx.size, ctx.formula = size, formula
        ctx.save_for_backward(z, weight, t, rest)
        return torch.cat((rest, s_t), 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, t, rest = ctx.saved_tensors
        (g,) = grads
        wanted, again = ctx.needs_input_grad[:2], torch.is_grad_enabled()
        if again or not plain(g):
            with torch.enable_grad():
                names = [z.view_as(z), weight.view_as(weight)]  # hooks on the first names run only once
                both = ctx.formula(*names, t, None)
            needed = [name for name, need in zip(names, wanted) if need]  # noqa: B905 - torch 2.6 traces no strict
            found = iter(torch.autograd.grad(both, needed, g, create_graph=again))
            return (*(next(found) if need else None for need in wanted), None, None, None, None)
        grad_z = torch.zeros_like(z) if wanted[0] else None
        grad_weight = torch.empty_like(weight) if wanted[1] else None
        with full_precision(z.device):
            for first in range(0, len(weight), ctx.size):
                chunk = _Chunk(z, weight, t, first, ctx.size)
                s = chunk.product
                grad_s = torch.addcmul(-rest, s, chunk.inverse.t(), out=s).exp_().mul_(g[:, :1])
                grad_s.scatter_(1, chunk.at, torch.where(chunk.inside, g[:, 1:], grad_s.gather(1, chunk.at)))
                grad_s.mul_(chunk.inverse.t())
                if grad_z is not None:
                    grad_z.addmm_(grad_s, chunk.w)
                if grad_weight is not None:
                    place = grad_weight[first : first + ctx.size]
                    part = torch.mm(grad_s.t(), z, out=place if place.dtype == z.dtype else None)
                    # so far the gradient by w / |w|, divided by |w|; less its share along w
                    part.addcmul_(chunk.w, (part * chunk.w).sum(1, keepdim=True) * chunk.inverse.square(), value=-1)
                    if part is not place:
                        place.copy_(part)
        return grad_z, grad_weight, None, None, None, None
