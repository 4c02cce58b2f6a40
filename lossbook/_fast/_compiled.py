"""The fast roads under ``torch.compile``: one operator, which the compiler takes as it is.

On a CPU its own code for a formula takes up to ten times as long as the fast road.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossbook._common import if_counted
from lossbook._torch import batched, can_record, compiling, exporting, known_true, operator, recording, transformed

_CAN_RECORD = can_record()
# the name of a loss and its options
Step = tuple[str, dict[str, float]]
# with fewer scores the compiler's own code is quicker
FEW = 30_000


def compiled(s: Tensor, few: int = FEW) -> bool:
    """Whether a compiler reads the code of a loss that is to be one step, of no fewer scores than these."""
    if not compiling() or exporting() or transformed() or not _CAN_RECORD:
        return False
    return type(s) in (Tensor, nn.Parameter) and s.device.type == "cpu" and not known_true(s.numel() < few)


def one_step(
    step: Step,
    s: Tensor,
    target: Tensor,
    embedding: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    counted: Tensor | None = None,
    rows: bool = True,
) -> Tensor:
    """The unreduced loss, of rows or of every score, 0 where ``counted`` is False."""
    wanted, (name, options) = torch.is_grad_enabled() and s.requires_grad, step
    # a number that varies from call to call would be compiled anew each time, a product with it is not
    one = torch.ones(len(options), dtype=torch.float64, device=s.device)
    numbers = torch.stack([x * number for x, number in zip(one.unbind(), options.values(), strict=True)] or [one.sum()])
    call = " ".join((name, *options))
    found: Tensor = torch.ops.lossbook.one_step(call, s, target, embedding, mask, numbers, rows, wanted)[0]
    return if_counted(found, counted)


def left_out(t: Tensor, counted: Tensor | None) -> Tensor:
    """Class indices as a loss takes them."""
    return t if counted is None else t.masked_fill(~counted, -100)


def _eager(
    call: str, s: Tensor, target: Tensor, embedding: Tensor | None, mask: Tensor | None, options: Tensor
) -> Tensor:
    import lossbook

    name, *names = call.split()
    given: dict[str, Any] = dict(zip(names, options.tolist(), strict=False))
    given |= {n: x for n, x in (("embedding", embedding), ("mask", mask)) if x is not None}
    loss: Tensor = getattr(lossbook, name)(s, target, reduction="none", **given)
    return loss


def _run(call: str, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their sum."""
    *given, _, wanted = rest
    if not wanted:
        return _eager(call, s, *given).contiguous(), s.new_empty(0)
    with torch.enable_grad(), recording():
        x = s.detach().requires_grad_()
        loss = _eager(call, x, *given)
        (slope,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    return loss.detach().contiguous(), slope.contiguous()


def _shapes(call: str, s: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, wanted = rest[-2:]
    return s.new_empty(s.shape[:-1] if rows else s.shape), s.new_empty(s.shape if wanted else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.call, *tensors, ctx.rows, _ = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    slope, s, *others = ctx.saved_tensors
    if g is None:
        grad = None
    elif torch.is_grad_enabled() or batched(g):
        with torch.enable_grad():
            loss = _eager(ctx.call, s, *others)
        (grad,) = torch.autograd.grad(loss, s, g, create_graph=torch.is_grad_enabled())
    else:
        grad = slope * (g.unsqueeze(-1) if ctx.rows else g)
    return None, grad, *[None] * 6


operator(
    "one_step(str call, Tensor s, Tensor target, Tensor? embedding, Tensor? mask, Tensor options, bool rows, "
    "bool wanted) -> (Tensor, Tensor)",
    _run,
    _shapes,
    _setup,
    _backward,
)
