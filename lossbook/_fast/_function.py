"""The one autograd function of the fast roads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lossbook._common import FAR, if_counted
from lossbook._torch import last_backward, plain, readable

LOG2_E = math.log2(math.e)
Kept = tuple[Any, ...]
Formula = Callable[..., Tensor]
Value = Callable[..., "tuple[Tensor, Kept]"]
Slope = Callable[[Tensor, Kept, bool], Tensor]


def fused(formula: Formula, value: Value, slope: Slope, s: Tensor, *constants: Any) -> Tensor:
    """``formula(s, *constants)``, by the fast road where the tensors are plain.

    ``value(s, *constants)`` returns the losses, in a tensor of its own (no view), and what it keeps for ``slope``.
    ``slope(g, kept, spare)`` returns the gradient of ``s`` for the gradient ``g`` of the losses; with ``spare`` it may
    overwrite what was kept. Both run without a graph. ``s`` alone takes a gradient.
    """
    if not plain(s, *(c for c in constants if isinstance(c, Tensor))):
        return formula(s, *constants)
    if s.requires_grad and torch.is_grad_enabled():
        loss: Tensor = _Fused.apply(s, formula, value, slope, constants)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            loss, _ = value(_near(s), *constants)
    # NaN or an infinite score: the formula knows what they mean
    return loss if not readable(loss) or math.isfinite(loss.detach().sum()) else formula(s, *constants)


def _near(s: Tensor) -> Tensor:
    """The scores, on an accelerator with infinities at +-1e30: there nobody looks whether the loss came out finite."""
    return s if s.device.type == "cpu" else s.clamp(-FAR, FAR)


def clear(counted: Tensor | None, *tensors: Tensor) -> None:
    """Write 0 to the rows where ``counted`` is False; None counts every row."""
    if counted is not None:
        for x in tensors:
            x.masked_fill_(~(counted if x.dim() == counted.dim() else counted.unsqueeze(-1)), 0)


def scaled(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    """A ``slope``: the gradient of each row's loss, made along with its value, times what arrives for that loss.

    What arrives for a row that does not count may be NaN.
    """
    slope, counted = kept
    return torch.mul(slope, if_counted(g, counted).unsqueeze(-1), out=slope if spare else None)


class _Fused(Function):
    """A loss with a gradient by hand; derivatives of that gradient come from the formula."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, formula: Formula, value: Value, slope: Slope, constants: tuple[Any, ...]
    ) -> Tensor:
        loss, kept = value(_near(s), *constants)
        # a tensor that is saved raises where it was changed in place since
        tensors = [c if isinstance(c, Tensor) else None for c in constants]
        ctx.save_for_backward(s, *tensors, *kept)
        ctx.formula, ctx.slope = formula, slope
        ctx.constants = [None if isinstance(c, Tensor) else c for c in constants]
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        s, *kept = ctx.saved_tensors
        constants = [c if t is None else t for c, t in zip(ctx.constants, kept, strict=False)]
        kept = kept[len(constants) :]
        ctx.maybe_clear_saved_tensors()
        (g,) = gradients
        if torch.is_grad_enabled() or not plain(g):
            with torch.enable_grad():
                name = s.view_as(s)  # another name for the scores: hooks on the first one run only once
                loss = ctx.formula(name, *constants)
            (grad,) = torch.autograd.grad(loss, name, g, create_graph=torch.is_grad_enabled())
        else:
            grad = ctx.slope(g, tuple(kept), last_backward())
        return grad, None, None, None, None
