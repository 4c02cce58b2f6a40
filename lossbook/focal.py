r"""Losses that let the easy samples go: truncated, softly truncated and focal cross-entropy.

Most samples of a detector are easy, and their many small losses outweigh the few hard ones. Each loss here multiplies
cross-entropy by a weight that falls as the sample is got right: to zero past a margin (:func:`hard_truncated_bce`),
along a sigmoid (:func:`soft_truncated_bce`), or as a power of the error (:func:`sigmoid_focal_loss`). The softmax forms
are :func:`soft_truncated_cross_entropy` and :func:`softmax_focal_loss`. A module of the same name wraps each.

Plain torch::

    loss = sigmoid_focal_loss(model(images), labels, gamma=2.0)
    loss.backward()
    optimizer.step()

Lightning::

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return sigmoid_focal_loss(self(images), labels, gamma=2.0)

Hugging Face ``Trainer``::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return softmax_focal_loss(outputs.logits, labels, gamma=2.0)
    trainer = Trainer(..., compute_loss_func=compute_loss)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from lossbook._common import (
    check_ignore_index,
    check_index_target,
    check_labels,
    check_number,
    check_reduction,
    check_scores,
    describe,
    eager,
    reduce_loss,
    values_readable,
)

__all__ = [
    "HardTruncatedBce",
    "SigmoidFocalLoss",
    "SoftTruncatedBce",
    "SoftTruncatedCrossEntropy",
    "SoftmaxFocalLoss",
    "hard_truncated_bce",
    "sigmoid_focal_loss",
    "soft_truncated_bce",
    "soft_truncated_cross_entropy",
    "softmax_focal_loss",
]

# infinite scores count as this: 0 * inf would be NaN where a label of 0 meets a score of -inf
_FAR = 1e30
# farther from 0 than every score: where no other class may be found
_BEYOND = 1e32
# float32 rounds an error near 1 by 6e-8, and its power by so much times gamma
_MOST_GAMMA = 1e3
# So many scores are worked on at once: a sixteenth of all, so that the dozen temporaries of a piece take little room,
# but no fewer than keep a core busy and no more than its cache holds. An accelerator wants larger pieces.
_PIECE = {"cpu": (2**14, 2**19)}
_DEVICE_PIECE = (2**20, 2**24)

Elementwise = Callable[[Tensor, Tensor], Tensor]


def hard_truncated_bce(input: Tensor, target: Tensor, *, margin: float = 0.5, reduction: str = "mean") -> Tensor:
    r"""Binary cross-entropy that stops once the label's probability passes a margin.

    .. math::

        L = \begin{cases}
            -\bigl(1 - \theta(p - m)\bigr) \log p & y = 1 \\
            -\bigl(1 - \theta(1 - m - p)\bigr) \log (1 - p) & y = 0
        \end{cases}
        \qquad p = \sigma(s), \quad
        \theta(x) = \begin{cases} 1 & x > 0 \\ \tfrac12 & x = 0 \\ 0 & x < 0 \end{cases}

    The weight carries no gradient. With a margin above 1/2 an untrained model starts inside the region that counts.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`y`, 0 or 1 in any dtype, the shape of ``input``.
        margin: the probability :math:`m` in [0, 1] from which a sample no longer counts.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``. float16 and bfloat16 scores are computed in
        float32, and the loss is float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not a real tensor, or ``margin`` is no number.
        ValueError: shapes differ, a label is neither 0 nor 1, or an option is out of range. The values of ``target``
            are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s, y = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1, 1, 1])
        >>> hard_truncated_bce(s, y, reduction="none").round(decimals=4)
        tensor([0.0000, 0.3466, 1.3133])

    Equation :eq:`focal-hard` of the chapter. Source: Su Jianlin, scientific spaces 4293 (2017).
    """
    m = check_number("margin", margin, low=0.0, high=1.0)
    # p_t < m in scores: a probability may round to 0 or 1, a margin of exactly that would then be met
    z_m = math.log((1 - m) / m) if 0 < m < 1 else math.copysign(math.inf, 0.5 - m)

    def weight(z: Tensor) -> Tensor:
        return (z > z_m).to(z.dtype) + 0.5 * (z == z_m).to(z.dtype)

    def value(s: Tensor, y: Tensor) -> Tensor:
        z = _wrongness(s, y)
        return weight(z) * _softplus(z)

    def slope(s: Tensor, y: Tensor) -> Tensor:
        z = _wrongness(s, y)
        return (1 - 2 * y) * weight(z) * torch.sigmoid(z)

    return _binary(value, slope, input, target, reduction, hard=True)


def soft_truncated_bce(input: Tensor, target: Tensor, *, sharpness: float = 1.0, reduction: str = "mean") -> Tensor:
    r"""Binary cross-entropy under a sigmoid weight, the softened truncation.

    .. math::

        L = \begin{cases}
            -\sigma(-K s) \log \sigma(s) & y = 1 \\
            -\sigma(K s) \log \sigma(-s) & y = 0
        \end{cases}

    For :math:`K \to \infty` it becomes :func:`hard_truncated_bce` at a margin of 1/2. At :math:`K = 1` it is
    :func:`sigmoid_focal_loss` with :math:`\gamma = 1`. The weight carries gradient.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`y`, 0 or 1 in any dtype, the shape of ``input``.
        sharpness: :math:`K \ge 0`; 0 gives half the cross-entropy.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``. float16 and bfloat16 scores are computed in
        float32, and the loss is float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not a real tensor, or ``sharpness`` is no number.
        ValueError: shapes differ, a label is neither 0 nor 1, or an option is out of range. The values of ``target``
            are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s, y = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1, 1, 1])
        >>> soft_truncated_bce(s, y, reduction="none").round(decimals=4)
        tensor([0.0151, 0.3466, 0.9601])

    Equation :eq:`focal-soft` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017).
    """
    k = _sharpness(sharpness)

    def value(s: Tensor, y: Tensor) -> Tensor:
        z = _wrongness(s, y)
        return torch.sigmoid(k * z) * _softplus(z)

    def slope(s: Tensor, y: Tensor) -> Tensor:
        z = _wrongness(s, y)
        w = torch.sigmoid(k * z)
        return (1 - 2 * y) * w * (torch.sigmoid(z) + k * torch.sigmoid(-k * z) * _softplus(z))

    return _binary(value, slope, input, target, reduction, hard=True)


def sigmoid_focal_loss(
    input: Tensor, target: Tensor, *, gamma: float = 2.0, alpha: float | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Focal loss of independent labels: cross-entropy times a power of the error.

    .. math::

        L = \bigl(\alpha t + (1 - \alpha)(1 - t)\bigr)\, (1 - p_t)^\gamma\,
            \bigl(-t \log p - (1 - t) \log (1 - p)\bigr), \qquad
        p = \sigma(s), \quad p_t = p\, t + (1 - p)(1 - t)

    Without ``alpha`` the first factor is 1. Value, gradient and Hessian stay finite for every :math:`\gamma` and every
    finite score.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`t` in [0, 1] in any dtype, the shape of ``input``; values between are soft labels.
        gamma: the power :math:`\gamma` in [0, 1000]; 0 gives cross-entropy.
        alpha: weight of the positive label in [0, 1], the negative one gets ``1 - alpha``; None for no weights.
        reduction: ``"mean"`` over all elements, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``. float16 and bfloat16 scores are computed in
        float32, and the loss is float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not a real tensor, or an option is no number.
        ValueError: shapes differ, a label lies outside [0, 1], or an option is out of range. The values of ``target``
            are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s, t = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.5])
        >>> sigmoid_focal_loss(s, t, reduction="none").round(decimals=4)
        tensor([0.0018, 0.1733, 0.2033])
        >>> print(round(sigmoid_focal_loss(s, t, gamma=0.5, alpha=0.25).item(), 4))
        0.1403

    Equation :eq:`focal-loss` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017); focal loss, arXiv
    1708.02002.
    """
    g = check_number("gamma", gamma, low=0.0, high=_MOST_GAMMA)
    a = None if alpha is None else check_number("alpha", alpha, low=0.0, high=1.0)

    def weighted(loss: Tensor, t: Tensor) -> Tensor:
        return loss if a is None else loss * ((1 - a) + (2 * a - 1) * t)

    def terms(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = s.clamp(-_FAR, _FAR)
        minus_s = -s
        p, not_p = torch.sigmoid(s), torch.sigmoid(minus_s)
        # lerp(a, b, t) = (1 - t) a + t b without cancellation, so that neither p near 0 nor p near 1 loses digits
        q = torch.lerp(p, not_p, t).clamp(min=_tiny(s))
        return p, not_p, q, torch.lerp(F.logsigmoid(minus_s), F.logsigmoid(s), t)

    def value(s: Tensor, t: Tensor) -> Tensor:
        _, _, q, minus_bce = terms(s, t)
        return weighted(-q.pow(g) * minus_bce, t)

    def slope(s: Tensor, t: Tensor) -> Tensor:
        p, not_p, q, minus_bce = terms(s, t)
        return weighted(q.pow(g) * (torch.lerp(p, -not_p, t) + (2 * g * t - g) * (p * not_p / q) * minus_bce), t)

    return _binary(value, slope, input, target, reduction)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss of one class out of many.

    .. math::

        L = -w_t\, (1 - p_t)^\gamma \log p_t, \qquad p = \operatorname{softmax}(s)

    The error :math:`1 - p_t` comes from the other classes' scores, not from a subtraction, so it keeps its digits as
    :math:`p_t` nears 1.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices :math:`t`, shape ``(...)``.
        gamma: the power :math:`\gamma` in [0, 1000]; 0 gives cross-entropy.
        weight: a weight :math:`w \ge 0` per class, shape ``(C,)``; None for ones.
        ignore_index: rows with this target are left out.
        reduction: ``"mean"`` over the rows that count (their number, not the sum of their weights), ``"sum"`` or
            ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores are
        computed in float32, and the loss is float32.

    Raises:
        TypeError: ``input`` or ``weight`` is not a floating tensor, ``target`` is not of an integer dtype, or ``gamma``
            is no number.
        ValueError: shapes do not fit, an index lies outside [0, C), a weight is negative or not finite, or an option is
            out of range. The values of ``target`` and ``weight`` are checked on CPU tensors only: on an accelerator the
            check would wait for the device.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> softmax_focal_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.0457, 1.9936])

    Equation :eq:`focal-softmax` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017); focal loss, arXiv
    1708.02002.
    """
    g = check_number("gamma", gamma, low=0.0, high=_MOST_GAMMA)
    check_reduction(reduction)
    dtype = _dtype(input, rows=True)
    classes = _classes(input)
    counted = check_index_target(target, tuple(input.shape[:-1]), classes, check_ignore_index(ignore_index))
    if weight is not None:
        _check_weight(weight, classes)
    index = target.long().masked_fill(~counted, 0)
    (z,) = _rest_margins(input, index, counted, (1.0,), dtype)
    # (1 - p_t)^gamma as an exponential: its derivatives hold no negative power of an error that has rounded to 0
    loss = torch.exp(-g * _softplus(-z)) * _softplus(z)
    if weight is not None:
        loss = loss * weight.to(loss.dtype)[index]
    return reduce_loss(loss.masked_fill(~counted, 0), reduction, counted)


def soft_truncated_cross_entropy(
    input: Tensor, target: Tensor, *, sharpness: float = 1.0, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Softly truncated cross-entropy of one class out of many.

    .. math::

        L = -\operatorname{softmax}(-K s)_t\, \log \operatorname{softmax}(s)_t

    With two classes it is :func:`soft_truncated_bce` of the difference of the scores. One other class far below all
    the rest takes the whole weight: a score of :math:`-\infty` on it gives a loss of 0.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices :math:`t`, shape ``(...)``.
        sharpness: :math:`K \ge 0`; 0 gives cross-entropy divided by the number of classes.
        ignore_index: rows with this target are left out.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores are
        computed in float32, and the loss is float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not of an integer dtype, or ``sharpness`` is no
            number.
        ValueError: shapes do not fit, an index lies outside [0, C), or an option is out of range. The values of
            ``target`` are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> soft_truncated_cross_entropy(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.0367, 1.6016])

    Equation :eq:`focal-soft-softmax` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017).
    """
    k = _sharpness(sharpness)
    check_reduction(reduction)
    dtype = _dtype(input, rows=True)
    counted = check_index_target(target, tuple(input.shape[:-1]), _classes(input), check_ignore_index(ignore_index))
    index = target.long().masked_fill(~counted, 0)
    z, turned = _rest_margins(input, index, counted, (1.0, -k), dtype)
    # sigmoid(-turned) as an exponential: its derivative is not taken from 1 minus a number that has rounded to 1
    loss = torch.exp(-_softplus(turned)) * _softplus(z)
    return reduce_loss(loss.masked_fill(~counted, 0), reduction, counted)


def _dtype(input: Tensor, *, rows: bool) -> torch.dtype:
    """The dtype the loss is computed in, without converting the scores yet; the errors of ``check_scores``."""
    half = isinstance(input, Tensor) and input.dtype in (torch.float16, torch.bfloat16) and input.dim() >= rows
    return torch.float32 if half else check_scores(input, rows=rows).dtype


def _sharpness(value: float) -> float:
    """K of the soft truncations; float32 ends at 3.4e38, and from 1e30 on the sigmoid is a step anyway."""
    return min(check_number("sharpness", value, low=0.0), _FAR)


def _classes(input: Tensor) -> int:
    """The number of classes, at least one."""
    if input.shape[-1] == 0:
        raise ValueError(f"input must have at least one class in its last dimension, got {describe(input)}")
    return input.shape[-1]


def _check_weight(weight: Tensor, classes: int | None = None) -> None:
    """Raise unless there is a real weight for every class; values are looked at only where that waits for no device."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"weight must be a floating tensor with one weight per class, got {describe(weight)}")
    if weight.dim() != 1 or classes not in (None, weight.numel()):
        shape = "(C,)" if classes is None else f"({classes},)"
        raise ValueError(f"weight must have one weight per class, shape {shape}, got {describe(weight)}")
    if values_readable(weight):
        wrong = ~(weight.isfinite() & (weight >= 0))
        if bool(wrong.any()):
            raise ValueError(f"weight must hold finite numbers >= 0, got {weight.detach()[wrong][0].item():g}")


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own softplus turns linear past 20, which costs float64 seven digits."""
    return -F.logsigmoid(-x)


def _tiny(s: Tensor) -> float:
    """The smallest error whose second derivative of a power, q^(gamma - 2), the dtype can hold.

    The square of 1e-19 is the end of float32. A smaller error changes a loss that is smaller still.
    """
    return 1e-150 if s.dtype == torch.float64 else 1e-19


def _wrongness(s: Tensor, y: Tensor) -> Tensor:
    """How far the score lies on the wrong side: s where the label is 0, -s where it is 1, so that 1 - p_t = sigmoid."""
    return (1 - 2 * y) * s.clamp(-_FAR, _FAR)


def _split(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Views of ``size`` rows each; of nothing, one empty view."""
    parts: tuple[Tensor, ...] = x.split(size)  # type: ignore[no-untyped-call]
    return parts


def _piece(x: Tensor) -> int:
    """How many elements to work on at once."""
    least, most = _PIECE.get(x.device.type, _DEVICE_PIECE)
    return min(max(x.numel() // 16, least), most)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The elements of tensors of one shape, a piece at a time."""
    return zip(*(_split(x.reshape(-1), _piece(x)) for x in tensors), strict=True)


def _binary(
    value: Elementwise, slope: Elementwise, input: Tensor, target: Tensor, reduction: str, *, hard: bool = False
) -> Tensor:
    """Reduce ``value(s, t)``, the loss of each element; ``slope`` is its derivative by s."""
    check_reduction(reduction)
    dtype = _dtype(input, rows=False)
    check_labels(target, tuple(input.shape), hard=hard)
    if eager(input, target) and not target.requires_grad:
        loss: Tensor = _Elementwise.apply(  # type: ignore[no-untyped-call]
            input, target, value, slope, dtype, reduction != "none"
        )
        return loss / max(input.numel(), 1) if reduction == "mean" else loss
    return reduce_loss(value(input.to(dtype), target.to(dtype)), reduction)


class _Elementwise(Function):
    """A loss of single elements that holds nothing between forward and backward but its arguments.

    Both passes work through the elements a piece at a time, so that what they need beside the result stays small.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        value: Elementwise,
        slope: Elementwise,
        dtype: torch.dtype,
        total: bool,
    ) -> Tensor:
        ctx.save_for_backward(input, target)
        ctx.slope, ctx.dtype = slope, dtype
        if total:
            return torch.stack([value(s.to(dtype), t.to(dtype)).sum() for s, t in _pieces(input, target)]).sum()
        loss = torch.empty(input.shape, dtype=dtype, device=input.device)
        for part, s, t in _pieces(loss, input, target):
            part.copy_(value(s.to(dtype), t.to(dtype)))
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, target = ctx.saved_tensors
        dtype = ctx.dtype
        if torch.is_grad_enabled() or not eager(grad_output):
            # a second derivative may follow: the same slope once more, in operators that autograd follows
            grad = (grad_output * ctx.slope(input.to(dtype), target.to(dtype))).to(input.dtype)
        else:
            grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
            for part, s, t, c in _pieces(grad, input, target, grad_output.expand(input.shape)):
                part.copy_(c * ctx.slope(s.to(dtype), t.to(dtype)))
        return grad, None, None, None, None, None


def _rest_margins(
    input: Tensor, index: Tensor, counted: Tensor, scales: tuple[float, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    r"""How far the other classes lie above the wanted one, at each scale k: log(sum_(i != t) e^(k (s_i - s_t))).

    Softmax against the rest is a sigmoid: with z this margin, softmax(k s)_t = sigmoid(-z). 0 at ignored rows.
    """
    at, row = index.unsqueeze(-1), counted.unsqueeze(-1)
    if input.shape[-1] == 1:  # no other class: below every score, with zero gradient
        none = input.masked_fill(~row, 0).squeeze(-1).to(dtype).clamp(-_BEYOND, -_BEYOND)
        return (none,) * len(scales)
    if eager(input, index):
        z: Tensor = _RestMargins.apply(input, at, row, scales, dtype)  # type: ignore[no-untyped-call]
    else:
        s = input.masked_fill(~row, 0).to(dtype).clamp(-_FAR, _FAR)
        z = torch.cat([_rest_margin(*_rivals(s, at, k)) for k in scales], -1)
    return z.masked_fill(~row, 0).unbind(-1)


def _rivals(s: Tensor, at: Tensor, k: float) -> tuple[Tensor, Tensor]:
    r"""k (s_i - top) of the other classes, far below 0 at the wanted one, and k (top - s_t).

    ``top`` is the score of the other class with the largest k s. Scores are subtracted before anything else is done to
    them, and never from a number that has been rounded: neither a common offset nor a far class costs digits.
    """
    others = s.scatter(-1, at, -_BEYOND if k >= 0 else _BEYOND)
    top = others.detach().amax(-1, keepdim=True) if k >= 0 else others.detach().amin(-1, keepdim=True)
    x, gap = others.sub_(top), top - s.gather(-1, at)
    if k != 1:
        x, gap = x.mul_(k), gap.mul(k).clamp(-_FAR, _FAR)
    if abs(k) * _BEYOND < 1e4:  # so small a factor brings the wanted class back
        x = x.scatter(-1, at, -math.inf)
    return x, gap


def _rest_margin(rivals: Tensor, gap: Tensor) -> Tensor:
    """The margin of the rest, (..., 1)."""
    return gap + rivals.exp_().sum(-1, keepdim=True).log()


def _row_pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of several tensors, a piece at a time; the first one's last dimension decides how many rows fit."""
    rows = max(_piece(tensors[0]) // tensors[0].shape[-1], 1)
    return zip(*(_split(x.reshape(-1, x.shape[-1]), rows) for x in tensors), strict=True)


class _RestMargins(Function):
    """The margins of the rest, a piece of the rows at a time.

    Holds nothing but its arguments between forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, at: Tensor, row: Tensor, scales: tuple[float, ...], dtype: torch.dtype
    ) -> Tensor:
        z = torch.empty((*input.shape[:-1], len(scales)), dtype=dtype, device=input.device)
        for s, at_part, z_part in _row_pieces(input, at, z):
            s = s.to(dtype).clamp(-_FAR, _FAR)
            for j, k in enumerate(scales):
                z_part[:, j : j + 1] = _rest_margin(*_rivals(s, at_part, k))
        ctx.save_for_backward(input, at, row)
        ctx.scales, ctx.dtype = scales, dtype
        return z

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grad_outputs
        input, at, row = ctx.saved_tensors
        scales, dtype = ctx.scales, ctx.dtype
        if torch.is_grad_enabled() or not eager(grad_output):
            # a second derivative may follow: the same softmax of the rest in operators that autograd follows
            s = input.masked_fill(~row, 0).to(dtype).clamp(-_FAR, _FAR)
            columns = grad_output.unsqueeze(-2).unbind(-1)
            shares = [torch.softmax(_rivals(s, at, k)[0], -1).scatter(-1, at, -1.0) for k in scales]
            parts = [k * share * c for k, share, c in zip(scales, shares, columns, strict=True)]
            grad = torch.stack(parts).sum(0).masked_fill(~row, 0).to(input.dtype)
        else:
            grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
            for part, s, at_part, row_part, c in _row_pieces(grad, input, at, row, grad_output):
                s = s.to(dtype).clamp(-_FAR, _FAR)
                total = torch.zeros((), dtype=dtype, device=input.device)
                for j, k in enumerate(scales):
                    share = torch.softmax(_rivals(s, at_part, k)[0], -1).scatter_(-1, at_part, -1.0)
                    total = total + share.mul_(k * c[:, j : j + 1])
                part.copy_(total.masked_fill_(~row_part, 0))
        return grad, None, None, None, None


class HardTruncatedBce(nn.Module):
    """:func:`hard_truncated_bce` as a module."""

    def __init__(self, *, margin: float = 0.5, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.margin = check_number("margin", margin, low=0.0, high=1.0)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return hard_truncated_bce(input, target, margin=self.margin, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"margin={self.margin:g}, reduction={self.reduction!r}"


class SoftTruncatedBce(nn.Module):
    """:func:`soft_truncated_bce` as a module."""

    def __init__(self, *, sharpness: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.sharpness = check_number("sharpness", sharpness, low=0.0)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_truncated_bce(input, target, sharpness=self.sharpness, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"sharpness={self.sharpness:g}, reduction={self.reduction!r}"


class SigmoidFocalLoss(nn.Module):
    """:func:`sigmoid_focal_loss` as a module."""

    def __init__(self, *, gamma: float = 2.0, alpha: float | None = None, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.gamma = check_number("gamma", gamma, low=0.0, high=_MOST_GAMMA)
        self.alpha = None if alpha is None else check_number("alpha", alpha, low=0.0, high=1.0)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return sigmoid_focal_loss(input, target, gamma=self.gamma, alpha=self.alpha, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"gamma={self.gamma:g}, alpha={self.alpha}, reduction={self.reduction!r}"


class SoftmaxFocalLoss(nn.Module):
    """:func:`softmax_focal_loss` as a module; the class weights are a buffer and move with it."""

    weight: Tensor | None

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        if weight is not None:
            _check_weight(weight)
        self.gamma = check_number("gamma", gamma, low=0.0, high=_MOST_GAMMA)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return softmax_focal_loss(
            input,
            target,
            gamma=self.gamma,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        weight = "None" if self.weight is None else describe(self.weight)
        return f"gamma={self.gamma:g}, weight={weight}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class SoftTruncatedCrossEntropy(nn.Module):
    """:func:`soft_truncated_cross_entropy` as a module."""

    def __init__(self, *, sharpness: float = 1.0, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.sharpness = check_number("sharpness", sharpness, low=0.0)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_truncated_cross_entropy(
            input, target, sharpness=self.sharpness, ignore_index=self.ignore_index, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """The options."""
        return f"sharpness={self.sharpness:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"
