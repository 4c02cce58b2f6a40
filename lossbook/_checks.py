"""Reading arguments: what every loss takes is checked here, once, and every message says what was got and wanted.

Each function returns what the loss computes with, so that one line of a loss reads one argument. Values of tensors are
looked at on the CPU only, outside traces and transforms: elsewhere looking would wait for the device or break a graph.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lossbook._torch import readable

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS = ("mean", "sum", "none")
HALF = (torch.float16, torch.bfloat16)
FLOATING = (*HALF, torch.float32, torch.float64)
# a soft label this far outside [0, 1] is a rounded one (resized masks, averages of votes, sums of a softmax)
ROUNDED = 1e-4
# float32 rounds an error near 1 by 6e-8, and its power by so much times gamma
MOST_GAMMA = 1e3


def describe(value: object) -> str:
    """A tensor as ``float32 tensor of shape (2, 3)``, anything else as its type: what an error message shows."""
    if isinstance(value, Tensor):
        layout = "" if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} "
        return f"{layout}{str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = repr(value) if isinstance(value, (str, numbers.Number, bool, type(None))) else ""
    return f"{type(value).__name__} {text[:60]}".rstrip()


# ------------------------------------------------------------------------------------------------------------ options


def check_reduction(reduction: str) -> str:
    """``reduction``, one of the three names."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {describe(reduction)}")
    return reduction


def check_number(
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` as a finite float within its bounds; numpy's scalars and tensors of one number count as numbers.

    ``open_low`` and ``open_high`` leave the bound itself out.
    """
    number = _one(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    number = float(number)
    too_low = low is not None and (number < low or (open_low and number == low))
    too_high = high is not None and (number > high or (open_high and number == high))
    if not -math.inf < number < math.inf or too_low or too_high:  # torch.compile cannot trace isfinite
        bounds = [f"{'>' if open_low else '>='} {low:g}"] if low is not None else []
        bounds += [f"{'<' if open_high else '<='} {high:g}"] if high is not None else []
        raise ValueError(f"{name} must be a finite number{' ' + ' and '.join(bounds) if bounds else ''}, got {number}")
    return number


def check_integer(name: str, value: Any, *, low: int | None = None) -> int:
    """``value`` as an int of at least ``low``; numpy's integers and integer tensors of one number count as ints."""
    number = _one(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if low is not None and number < low:
        raise ValueError(f"{name} must be at least {low}, got {number}")
    return int(number)


def check_ignore_index(ignore_index: Any) -> int:
    """``ignore_index`` as an int."""
    return check_integer("ignore_index", ignore_index)


def check_gamma(gamma: Any, name: str = "gamma") -> float:
    """The power of an error."""
    return check_number(name, gamma, low=0.0, high=MOST_GAMMA)


def check_sharpness(sharpness: Any) -> float:
    """K of a sigmoid weight; from 1e30 on it is a step anyway, and float32 ends."""
    return min(check_number("sharpness", sharpness, low=0.0), 1e30)


def check_row_options(ignore_index: Any, dim: Any, reduction: str) -> dict[str, Any]:
    """What the losses of rows share."""
    numbers = {"ignore_index": check_ignore_index(ignore_index), "dim": check_integer("dim", dim)}
    return {**numbers, "reduction": check_reduction(reduction)}


def check_flag(name: str, value: Any) -> bool:
    """``value`` as True or False; numpy's booleans count."""
    flag = _one(value)
    if not isinstance(flag, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return flag


def _one(value: Any) -> Any:
    """The Python number in a numpy scalar or in a tensor of one number."""
    is_number = isinstance(value, (int, float)) or not hasattr(value, "item")
    return value if is_number or getattr(value, "size", 1) == 0 or getattr(value, "ndim", 0) > 0 else value.item()


# ------------------------------------------------------------------------------------------------------------- tensors


def check_scores(input: Tensor, *, name: str = "input", rows: bool = True, dim: int = -1) -> Tensor:
    """``input`` with its classes last, in the dtype of the computation: float16 and bfloat16 become float32.

    ``rows`` asks for at least one dimension, ``dim`` says which one holds the classes.
    """
    check_floating(input, name, what=" of scores")
    if rows:
        if input.dim() < 1:
            raise ValueError(f"{name} must have at least one dimension, the classes last, got {describe(input)}")
        input = classes_last(input, dim, name)
    return input.float() if input.dtype in HALF else input


def check_floating(tensor: Tensor, name: str, *, what: str = "", dims: int | None = None) -> Tensor:
    """``tensor`` as it is, if it is a dense one of a floating dtype (with ``dims`` dimensions)."""
    _check_tensor(tensor, name, what)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(tensor)}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got {describe(tensor)}")
    return tensor


def _check_tensor(value: Any, name: str, what: str = "") -> None:
    if not isinstance(value, Tensor):
        hint = f"; pass torch.as_tensor({name})" if isinstance(value, Sequence) or hasattr(value, "__array__") else ""
        raise TypeError(f"{name} must be a tensor{what}, got {describe(value)}{hint}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {describe(value)}; pass {name}.to_dense()")


def classes_last(x: Tensor, dim: Any, name: str = "input") -> Tensor:
    """A view of ``x`` with dimension ``dim`` last."""
    dim = check_integer("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must name a dimension of {name}, in [{-x.dim()}, {x.dim()}), got {dim}")
    return x if dim in (-1, x.dim() - 1) else x.movedim(dim, -1)


def check_classes(s: Tensor, name: str = "input") -> int:
    """The number of classes, at least one."""
    if s.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one class, got {describe(s)}")
    return s.shape[-1]


def check_constant(target: Tensor, name: str = "target") -> Tensor:
    """``target``, which takes no gradient: an error instead of a gradient that is silently missing."""
    if target.requires_grad:
        raise ValueError(f"{name} must not require a gradient, pass {name}.detach()")
    return target


def check_index(
    target: Tensor,
    rows: Sequence[int],
    num_classes: int,
    ignore_index: Any = None,
    *,
    every_row: bool = False,
    name: str = "target",
) -> tuple[Tensor, Tensor]:
    """Class indices of shape ``rows`` as int64, 0 where ``ignore_index`` stands; and which rows count, boolean.

    With ``every_row`` no index is ignored.
    """
    ignored = None if every_row else check_ignore_index(ignore_index)
    target, counted = check_rows(target, rows, num_classes, ignored, name)
    return target, torch.ones_like(target, dtype=torch.bool) if counted is None else counted


def check_rows(
    target: Tensor, rows: Sequence[int], num_classes: int, ignored: int | None, name: str = "target"
) -> tuple[Tensor, Tensor | None]:
    """:func:`check_index` with None instead of a mask where every row is seen to count: nothing is left to do then."""
    _check_tensor(target, name, " of class indices")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"{name} must be class indices of an integer dtype, got {describe(target)}")
    if tuple(target.shape) != tuple(rows):
        raise ValueError(
            f"{name} must have the shape of the rows, {tuple(rows)} (classes last, or pass dim), got {describe(target)}"
        )
    target = target.long()  # a small dtype would wrap what it is compared with: in uint8, -100 is 156
    if readable(target) and target.numel() > 0:
        low, high = (int(bound) for bound in torch.aminmax(target))
        if low >= 0 and high < num_classes and (ignored is None or not low <= ignored <= high):
            return target, None
    counted = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
    if readable(target) and target.numel() > 0:
        wrong = counted & ((target < 0) | (target >= num_classes))
        if bool(wrong.any()):
            or_ignored = "" if ignored is None else f" or ignore_index={ignored}"
            raise ValueError(
                f"{name} must be class indices in [0, {num_classes}){or_ignored}, got {int(target[wrong][0])}"
            )
    return target.masked_fill(~counted, 0), counted


def check_labels(
    target: Tensor,
    shape: Sequence[int],
    *,
    hard: bool = False,
    mask: Tensor | None = None,
    dim: int = -1,
    name: str = "target",
) -> Tensor:
    """Labels in [0, 1] of this shape with the classes last, or with ``hard`` only 0 and 1.

    ``shape`` is the one of the input as it was passed. Float labels that rounding left outside [0, 1] by at most 1e-4
    are clamped. Values are looked at only where ``mask`` (as passed, checked before) is not False.
    """
    _check_tensor(target, name, " of labels")
    if target.is_complex():
        raise TypeError(f"{name} must be labels of a real dtype, got {describe(target)}")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(f"{name} must have the shape of input, {tuple(shape)}, got {describe(target)}")
    check_constant(target, name)
    if target.dtype in (torch.uint16, torch.uint32, torch.uint64):
        target = target.long()  # torch computes little in these
    if target.dtype != torch.bool and target.numel() > 0 and readable(target, mask):
        outside = _look(target, mask, hard, name)
    else:
        outside = True  # unknown
    if target.is_floating_point() and not hard and outside:
        target = target.clamp(0, 1)
    return classes_last(target, dim, name) if target.dim() else target


def _look(target: Tensor, mask: Tensor | None, hard: bool, name: str) -> bool:
    """Raise if a label is no label; say whether one lies outside [0, 1] by rounding."""

    def refuse(wrong: Tensor, wanted: str) -> None:
        found = target[wrong if mask is None else wrong & mask]
        if found.numel() > 0:
            raise ValueError(f"{name} must be {wanted}, got {found[0].item()}")

    low, high = (bound.item() for bound in torch.aminmax(target))
    inside = low >= 0 and high <= 1  # NaN compares with nothing
    if not inside:
        slack = ROUNDED if target.is_floating_point() and not hard else 0
        refuse(~((target >= -slack) & (target <= 1 + slack)), "0 or 1" if hard else "labels in [0, 1]")
    if hard and target.is_floating_point():
        # t - t^2 is above 0 only between 0 and 1; a few at a time: for the whole it would be as large as the scores
        small = target.numel() <= 2**16
        parts = (target,) if small else target.reshape(-1).split(2**16)  # type: ignore[no-untyped-call]
        if not inside or any(torch.addcmul(part, part, part, value=-1).amax().item() > 0 for part in parts):
            refuse((target != 0) & (target != 1), "0 or 1")
    return not inside


def check_distribution(
    target: Tensor, shape: Sequence[int], *, dim: int = -1, name: str = "target", total: bool = True
) -> Tensor:
    """Soft targets of rows: floating, of the input's shape, classes last; with ``total`` rows sum to 1 within 0.01.

    A value that rounding left outside [0, 1] by at most 1e-4 is clamped.
    """
    target = check_labels(target, shape, dim=dim, name=name)
    if total and target.numel() > 0 and readable(target):
        sums = target.sum(-1, dtype=torch.float64)
        wrong = (sums - 1).abs() > 1e-2  # what bfloat16 rounds off
        if bool(wrong.any()):
            raise ValueError(f"each row of a soft {name} must sum to 1 within 0.01, got {float(sums[wrong][0]):.6g}")
    return target


def check_mask(mask: Tensor | None, shape: Sequence[int], dim: int | None = None) -> Tensor | None:
    """The mask as it is passed, None or boolean and broadcastable to ``shape``.

    With ``dim`` it is expanded to ``shape`` with the classes last.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout != torch.strided:
        raise TypeError(f"mask must be a boolean tensor, got {describe(mask)}")
    fits = all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(shape)))  # noqa: B905 - torch 2.6 traces no strict
    if mask.dim() > len(shape) or not fits:
        raise ValueError(f"mask must be broadcastable to the shape of input, {tuple(shape)}, got {describe(mask)}")
    return mask if dim is None else classes_last(mask.expand(tuple(shape)), dim, "mask")


def check_per_class(name: str, value: Tensor, classes: int | None = None, *, high: float | None = None) -> Tensor:
    """One finite number >= 0, and at most ``high``, for each of the ``classes``, shape (C,)."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor with one value per class, got {describe(value)}")
    if value.dim() != 1 or classes not in (None, value.numel()):
        shape = "(C,)" if classes is None else f"({classes},)"
        raise ValueError(f"{name} must have one value per class, shape {shape}, got {describe(value)}")
    if readable(value):
        wrong = ~(value.isfinite() & (value >= 0) & (value <= (math.inf if high is None else high)))
        if bool(wrong.any()):
            wanted = "finite numbers >= 0" if high is None else f"numbers in [0, {high:g}]"
            raise ValueError(f"{name} must hold {wanted}, got {value.detach()[wrong][0].item():g}")
    return value


def refuse_sharded(name: str, tensor: Tensor) -> Tensor:
    """``tensor``, which is no shard of a DTensor, as FSDP2 leaves parameters outside their module's forward."""
    if any(getattr(p, "is_shard", bool)() for p in getattr(tensor, "placements", ())):
        raise TypeError(
            f"{name} is a sharded DTensor: compute the loss inside the forward of the module that holds it, or call "
            f'unshard() on that module first, or pass {name}.full_tensor(grad_placements=[Partial("avg")]); a plain '
            "full_tensor() would not average the gradient over the ranks"
        )
    return tensor


def check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype in which ``hidden @ weight.T + bias`` is computed: autocast's, or that of ``hidden``.

    A half precision ``hidden`` takes float32 weights; other dtypes are not mixed.
    """
    layer = {"hidden": hidden, "weight": weight, **({} if bias is None else {"bias": bias})}
    for name, x in layer.items():
        check_floating(x if name == "hidden" else refuse_sharded(name, x), name)
    if hidden.dim() < 1:
        raise ValueError(f"hidden must have at least one dimension, the features last, got {describe(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have the shape (C, {hidden.shape[-1]}), got {describe(weight)}")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"bias must have the shape ({len(weight)},), got {describe(bias)}")
    dtypes = {x.dtype for x in layer.values()}
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in dtypes:
        return torch.get_autocast_dtype(hidden.device.type)
    if len(dtypes) > 1 and (hidden.dtype not in HALF or dtypes != {hidden.dtype, torch.float32}):
        got = ", ".join(f"{name} {describe(x)}" for name, x in layer.items())
        raise TypeError(
            f"{' and '.join(layer)} must have the same dtype, or hidden float16 or bfloat16 and the rest float32; "
            f"got {got}"
        )
    return hidden.dtype


def check_linear_options(scale: Any, softcap: Any, chunk_size: Any, accumulate: str) -> dict[str, Any]:
    """The options of a linear layer whose scores are held a chunk at a time."""
    if accumulate not in ("float32", "weight"):
        raise ValueError(f"accumulate must be 'float32' or 'weight', got {describe(accumulate)}")
    for name, value in (("logit_scale", scale), ("logit_softcap", softcap)):
        if isinstance(value, Tensor):
            check_constant(value, name)
    return {
        "logit_scale": check_number("logit_scale", scale),
        "logit_softcap": None if softcap is None else check_number("logit_softcap", softcap, low=0, open_low=True),
        "chunk_size": check_integer("chunk_size", chunk_size, low=1),
        "accumulate": accumulate,
    }


def check_vectors(embedding: Tensor, num_classes: int) -> Tensor:
    """``embedding`` without its graph."""
    e = check_floating(embedding, "embedding", what=" of word vectors").detach()
    if num_classes < 1:
        raise ValueError(f"there must be at least one class, got none (embedding: {describe(e)})")
    if e.dim() != 2 or 0 in e.shape or len(e) != num_classes:
        raise ValueError(f"embedding must have the shape ({num_classes}, D), got {describe(e)}")
    return e


def check_target(
    target: Tensor, shape: tuple[int, ...], ignore_index: int, dim: int = -1
) -> tuple[Tensor, Tensor | None]:
    """The target, classes last, and which rows count, None for all. ``shape`` is that of the scores as passed."""
    ignored = check_ignore_index(ignore_index)
    if isinstance(target, Tensor) and target.is_floating_point():
        return check_distribution(target, shape, dim=dim), None
    at = dim % len(shape)
    return check_rows(target, shape[:at] + shape[at + 1 :], shape[at], ignored)
