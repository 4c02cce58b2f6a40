"""What all the losses share: reading arguments, computing in a safe dtype, reducing.

Private. Everything here is a few lines so that a loss reads as its formula.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")


def values_readable(*tensors: Tensor) -> bool:
    """Whether the values can be looked at without waiting for a device or breaking a trace.

    False on accelerators (looking would synchronise), inside ``torch.compile`` (it would break the graph), under
    ``torch.func`` transforms (a batched tensor has no single value) and for fake tensors (they have no values).
    """
    return not torch.compiler.is_compiling() and all(
        t.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)
        and not isinstance(t, FakeTensor)
        for t in tensors
    )


def describe(value: object) -> str:
    """A tensor as ``float32 tensor of shape (2, 3)``, anything else as its type: what an error message shows."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def check_reduction(reduction: str) -> None:
    """Raise unless ``reduction`` is one of the three names."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def check_number(
    name: str,
    value: float,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` as a finite float within its bounds, or an error that names the argument.

    ``open_low`` and ``open_high`` leave the bound itself out.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    number = float(value)
    too_low = low is not None and (number < low or (open_low and number == low))
    too_high = high is not None and (number > high or (open_high and number == high))
    if number != number or number in (float("inf"), float("-inf")) or too_low or too_high:
        bounds = [f"{'>' if open_low else '>='} {low:g}"] if low is not None else []
        bounds += [f"{'<' if open_high else '<='} {high:g}"] if high is not None else []
        raise ValueError(f"{name} must be a finite number{' ' + ' and '.join(bounds) if bounds else ''}, got {value!r}")
    return number


def check_scores(input: Tensor, *, name: str = "input", rows: bool = True) -> Tensor:
    """``input`` in the dtype the loss is computed in: float16 and bfloat16 become float32, the others stay.

    ``rows`` asks for at least one dimension (the class dimension).
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{name} must be a tensor of scores, got {describe(input)}")
    if not input.is_floating_point():
        raise TypeError(
            f"{name} must be real-valued scores (float16, bfloat16, float32 or float64), got {describe(input)}"
        )
    if rows and input.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension, the classes last, got {describe(input)}")
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


def check_ignore_index(ignore_index: int) -> int:
    """``ignore_index``, or a TypeError unless it is an int."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {describe(ignore_index)}")
    return ignore_index


def check_index_target(
    target: Tensor, rows: tuple[int, ...], num_classes: int, ignore_index: int | None, *, name: str = "target"
) -> Tensor:
    """Which rows count, for class indices of shape ``rows``: a boolean tensor, False where ``ignore_index`` stands.

    With ``ignore_index=None`` every row counts.
    """
    if ignore_index is not None:
        check_ignore_index(ignore_index)
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor of class indices, got {describe(target)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{name} must be class indices of an integer dtype, got {describe(target)}")
    if tuple(target.shape) != tuple(rows):
        raise ValueError(f"{name} must have the shape of the rows, {tuple(rows)}, got {describe(target)}")
    target = target.long()  # a small dtype would wrap what it is compared with: in uint8, -100 is 156
    counted = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    if values_readable(target):
        wrong = counted & ((target < 0) | (target >= num_classes))
        if bool(wrong.any()):
            first = int(target[wrong].flatten()[0])
            ignored = "" if ignore_index is None else f" or ignore_index={ignore_index}"
            raise ValueError(f"{name} must be class indices in [0, {num_classes}){ignored}, got {first}")
    return counted


def reduce_loss(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """Mean, sum or none of the losses of the rows.

    ``counted`` (boolean, the shape of ``loss``) says which rows enter the mean; the loss of the others must be 0
    already. The mean over no row is 0 with zero gradient, never NaN.
    """
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if counted is None:
        return total / max(loss.numel(), 1)
    return total / counted.sum().clamp(min=1)


_LEGACY_BATCHED = torch._C._dispatch_key_parse("Batched")


def eager(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors run one operator at a time.

    Not so in a trace, under a ``torch.func`` transform, in forward mode, and in the batched backward passes of
    ``torch.autograd.grad(..., is_grads_batched=True)``. Only where it is so may a loss take a road of its own: in-place
    work, pieces, a hand-written backward pass.
    """
    return not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()) and all(
        torch.autograd.forward_ad.unpack_dual(t).tangent is None  # type: ignore[no-untyped-call]
        and not torch._C._dispatch_keys(t).has(_LEGACY_BATCHED)
        for t in tensors
    )


def check_labels(target: Tensor, shape: tuple[int, ...], *, hard: bool = False, name: str = "target") -> None:
    """Raise unless ``target`` has this shape and holds labels in [0, 1], or with ``hard`` only 0 and 1.

    The values are looked at only where that waits for no device.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"{name} must be a tensor of labels, got {describe(target)}")
    if target.is_complex():
        raise TypeError(f"{name} must be labels of a real dtype, got {describe(target)}")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape of input, {tuple(shape)}, got {describe(target)}")
    if target.dtype == torch.bool or target.numel() == 0 or not values_readable(target):
        return
    values = target.detach()
    low, high = (bound.item() for bound in torch.aminmax(values))
    if not (low >= 0 and high <= 1):  # NaN compares with nothing, so it ends here too
        wrong = values[~((values >= 0) & (values <= 1))][0].item()
        raise ValueError(f"{name} must be labels in [0, 1], got {wrong}")
    if hard and target.is_floating_point():
        # a few rows at a time: the square of the whole would be as large as the scores
        for part in values.reshape(-1).split(2**18):  # type: ignore[no-untyped-call]
            if not torch.equal(part * part, part):
                wrong = part[(part != 0) & (part != 1)][0].item()
                raise ValueError(f"{name} must be 0 or 1, got {wrong}")


def check_mask(mask: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless ``mask`` is None or boolean and broadcastable to ``shape``."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a boolean tensor, got {describe(mask)}")
    fits = all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape), strict=False))
    if mask.dim() > len(shape) or not fits:
        raise ValueError(f"mask must be broadcastable to the shape of input, {tuple(shape)}, got {describe(mask)}")
