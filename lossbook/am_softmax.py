r"""Margin softmax: classify into groups so that the embeddings can be searched.

The cross-entropy of scaled cosines, the target's cosine made smaller by a margin. The cosines come from
:class:`CosineClassifier`; the linear forms take embeddings and class vectors and hold no more than a few cosines. A
module of the same name wraps each function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lossbook._checks import (
    check_classes,
    check_distribution,
    check_ignore_index,
    check_integer,
    check_number,
    check_reduction,
    check_rows,
    check_scores,
    describe,
)
from lossbook._classifier import CosineClassifier, check_vectors, unit
from lossbook._common import ABSENT, LossModule, if_counted, logsumexp, reduce_loss, rest_margins, softplus
from lossbook._fast.am_softmax import few, linear_rest, margin_rows, rest_rows, value_and_slope
from lossbook._margins import (
    AdditiveAngularMargin,
    AdditiveCosineMargin,
    Less,
    MultipliedAngle,
    Psi,
    additive_angular_margin,
    additive_cosine_margin,
    check_psi,
    multiplied_angle,
    shaped,
)
from lossbook._retrieval import RetrievalAccuracy, retrieval_accuracy
from lossbook._torch import full_precision, readable

__all__ = [
    "AdditiveAngularMargin",
    "AdditiveCosineMargin",
    "AmSoftmaxLoss",
    "CosineClassifier",
    "LinearAmSoftmaxLoss",
    "LinearMarginSoftmaxLoss",
    "MarginSoftmaxLoss",
    "MultipliedAngle",
    "RetrievalAccuracy",
    "additive_angular_margin",
    "additive_cosine_margin",
    "am_softmax_loss",
    "linear_am_softmax_loss",
    "linear_margin_softmax_loss",
    "margin_softmax_loss",
    "multiplied_angle",
    "retrieval_accuracy",
]

Scale: TypeAlias = float | Tensor


# ------------------------------------------------------------------------------------------------------------ formulas


def rest_and_target(cosine: Tensor, t: Tensor, counted: Tensor | None, scale: Scale) -> Tensor:
    """``(..., 2)``: the log-sum-exp of the other classes' scores, and the target's cosine."""
    cosine = if_counted(cosine, counted)
    at = t.unsqueeze(-1)
    rest = logsumexp((scale * cosine).scatter(-1, at, ABSENT))
    return torch.stack((rest, cosine.gather(-1, at).squeeze(-1)), -1)


def margin_softmax(rest_and_target: Tensor, counted: Tensor | None, psi: Psi, scale: Scale) -> Tensor:
    """``log(1 + e^z)``, z the rest's log-sum-exp less the target's score."""
    rest, cosine_t = rest_and_target[..., 0], rest_and_target[..., 1]
    return if_counted(softplus(rest - scale * psi(cosine_t)), counted)


def soft_margin_softmax(cosine: Tensor, tau: Tensor, psi: Psi, scale: Scale) -> Tensor:
    """The loss of each class as target, with its own margin, weighted by the soft target."""
    s = scale * cosine
    rest = rest_margins(s) + s
    absent = tau == 0
    z = (rest - scale * psi(cosine.masked_fill(absent, 0))).masked_fill(absent, 0)
    return (tau * softplus(z)).sum(-1)


def linear_rest_and_target(z: Tensor, weight: Tensor, t: Tensor, size: int | None) -> Tensor:
    """``(R, 2)``: the rest and the target's score, of unit embeddings times the scale ``(R, D)`` and class vectors.

    With ``size`` so many classes at a time are held, and the backward pass computes them anew.
    """

    def rest(z: Tensor, t: Tensor, w: Tensor, places: Tensor) -> Tensor:
        with full_precision(z.device):
            s = z @ unit(w, z).t()
        # ABSENT by its digits: dynamic=True of torch.compile lets no global number in
        return logsumexp(s.masked_fill(places == t.unsqueeze(-1), -1e32))

    places = torch.arange(len(weight), device=t.device)
    if size is None:
        total = rest(z, t, weight, places)
    else:
        again = partial(checkpoint, rest, z, t, use_reentrant=False)
        chunks = map(again, torch.split(weight, size), torch.split(places, size))
        total = torch.stack(list(chunks)).logsumexp(0)
    return torch.stack((total, (z * unit(weight[t], z)).sum(-1)), -1)


# -------------------------------------------------------------------------------------------------------------- losses


def margin_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    psi: Psi,
    scale: Scale = 30.0,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of scaled cosines, the target's cosine made smaller by a margin.

    .. math::

        -\log \frac{e^{\gamma\,\psi(\theta_t)}}{e^{\gamma\,\psi(\theta_t)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}}

    with :math:`\gamma` = ``scale``. The loss is never negative, and small losses keep their digits.

    Args:
        cosine: cosines ``(..., C)``, as :class:`CosineClassifier` gives them. A class with cosine ``-inf`` is left out.
        target: class indices ``(...)``, or soft targets ``(..., C)``, which weight the loss of each class as target.
        psi: the margin, an elementwise function of the target's cosines: :func:`additive_cosine_margin`,
            :func:`additive_angular_margin`, :func:`multiplied_angle` or any other that does not raise them.
        scale: factor of the cosines, a number > 0 or a tensor of one that learns. At 1 the loss stays far from 0.
        ignore_index: rows with this target do not count, and their gradient is 0.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``, of shape ``(...)``.

    Returns:
        The loss, in float32 for float16 and bfloat16 cosines. With a single class, and where no row counts, it is 0.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape or option. On the CPU also a class index outside [0, C), and a cosine outside [-1, 1]
            by more than 0.02; on an accelerator these two checks would wait for the device and are skipped.

    Example:
        >>> cosine = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.5, 0.1]])
        >>> margin_softmax_loss(cosine, torch.tensor([0, 1]), psi=additive_angular_margin(0.5), scale=10)
        tensor(1.4768)

    Equation :eq:`am-margin` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018) and 8656 (2021).
    """
    check_reduction(reduction)
    scale, psi = _check_scale(scale), check_psi(psi)
    s = check_scores(cosine, name="cosine", dim=dim)
    classes, call = check_classes(s, "cosine"), shaped(psi, cosine.dtype)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if soft and target.dim() == s.dim():
        tau = check_distribution(target, cosine.shape, dim=dim).to(s.dtype)
        _check_cosines(s, tau)
        return reduce_loss(soft_margin_softmax(s, tau, call, scale), reduction)
    ignored = check_ignore_index(ignore_index)
    t, counted = check_rows(target, s.shape[:-1], classes, ignored)
    _check_cosines(s, t, counted)
    loss = _by_index(s, t, counted, psi, call, scale)
    return reduce_loss(loss, reduction, counted)


def am_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: Scale = 30.0,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""AM-softmax: :func:`margin_softmax_loss` with :func:`additive_cosine_margin`, the usual choice.

    .. math::

        -\log \frac{e^{\gamma(\cos\theta_t - m)}}{e^{\gamma(\cos\theta_t - m)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}}

    with m = ``margin``, at least 0. All else is as in :func:`margin_softmax_loss`.

    Example:
        >>> cosine = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.5, 0.1]])
        >>> am_softmax_loss(cosine, torch.tensor([0, 1]), scale=10)
        tensor(0.9090)

    Equation :eq:`am-loss` of the chapter. Source: as :func:`additive_cosine_margin`.
    """
    rows: Any = {"ignore_index": ignore_index, "dim": dim, "reduction": reduction}
    return margin_softmax_loss(cosine, target, psi=Less(margin), scale=scale, **rows)


def linear_margin_softmax_loss(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    psi: Psi,
    scale: Scale = 30.0,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`margin_softmax_loss` from embeddings and class vectors, without the matrix of all cosines.

    .. math:: \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    One chunk of classes at a time is held; the backward pass computes it again. So beside inputs and gradients, the
    memory does not grow with the number of classes. Derivatives of second order, forward mode and the transforms of
    ``torch.func`` hold the whole ``(..., C)`` matrix. ``torch.compile`` and ``torch.export`` unroll the chunks.

    Args:
        embedding: embeddings ``(..., D)``, of any length, within the bounds of :class:`CosineClassifier`.
        weight: class vectors ``(C, D)``, of length as embeddings, best in float32.
        target: class indices ``(...)``.
        psi: the margin, as for :func:`margin_softmax_loss`.
        scale: factor of the cosines, a number > 0 or a tensor of one that learns.
        chunk_size: how many classes at a time. Without it a chunk's scores and vectors have four million numbers
            together (16 million on an accelerator), and the chunk at least 128 classes; compiled code has 16 chunks.
        ignore_index: rows with this target do not count, whatever the embedding holds, and their gradient is 0.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``, of shape ``(...)``.

    Returns:
        The loss, computed in float32, in float64 where one of the inputs is. Each gradient has its input's dtype.

    Raises:
        TypeError: an argument of the wrong type; class vectors that are a sharded DTensor, as FSDP2 leaves them
            outside their module's ``forward``. The message names the three ways that give the right gradient.
        ValueError: as :func:`margin_softmax_loss`.

    Example:
        >>> embedding, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        >>> linear_margin_softmax_loss(embedding, weight, torch.tensor([1]), psi=additive_angular_margin(), scale=10)
        tensor(2.0011)

    Equation :eq:`am-margin` of the chapter. Source: as :func:`margin_softmax_loss`.
    """
    check_reduction(reduction)
    scale, call = _check_scale(scale), shaped(check_psi(psi))
    check_vectors(embedding, weight)
    rows, size = embedding.shape[:-1], _check_chunk(chunk_size)
    t, counted = check_rows(target, rows, len(weight), check_ignore_index(ignore_index))
    # a row that does not count is a zero vector: whatever it holds reaches no gradient
    z = unit(if_counted(embedding, counted), weight, look=True)
    if size is None and few(z, weight):
        with full_precision(z.device):
            cosine = F.linear(z, unit(weight, z, look=True))
        loss = _by_index(cosine, t, counted, psi, call, scale)
        return reduce_loss(loss, reduction, counted)
    z, index = (z * scale).reshape(-1, z.shape[-1]), t.reshape(-1)
    both = linear_rest(linear_rest_and_target, z, weight, index, size, scale)
    both = both.reshape(*rows, 2)
    loss = margin_softmax(both, counted, lambda s_t: call(s_t / scale), scale)
    return reduce_loss(loss, reduction, counted)


def linear_am_softmax_loss(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: Scale = 30.0,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """:func:`linear_margin_softmax_loss` with :func:`additive_cosine_margin`: AM-softmax for very many classes.

    Example:
        >>> embedding, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        >>> linear_am_softmax_loss(embedding, weight, torch.tensor([1]), scale=10, chunk_size=2)
        tensor(1.7014)

    Equation :eq:`am-linear` of the chapter. Source: as :func:`additive_cosine_margin`.
    """
    psi, options = Less(margin), {"scale": scale, "chunk_size": chunk_size}
    rows: Any = {**options, "ignore_index": ignore_index, "reduction": reduction}
    return linear_margin_softmax_loss(embedding, weight, target, psi=psi, **rows)


# ------------------------------------------------------------------------------------------------------------- modules


class MarginSoftmaxLoss(LossModule):
    """:func:`margin_softmax_loss` as a module; a ``scale`` that is a parameter is its own."""

    def __init__(
        self, *, psi: Psi, scale: Scale = 30.0, ignore_index: int = -100, dim: int = -1, reduction: str = "mean"
    ) -> None:
        rows = _checked(ignore_index=ignore_index, dim=dim, reduction=reduction)
        super().__init__(**_checked(psi=psi, scale=scale), **rows)

    def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of ``cosine`` ``(..., C)`` and ``target``."""
        return margin_softmax_loss(cosine, target, **self.options)


class AmSoftmaxLoss(LossModule):
    """:func:`am_softmax_loss` as a module."""

    def __init__(
        self,
        *,
        margin: float = 0.35,
        scale: Scale = 30.0,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: str = "mean",
    ) -> None:
        rows = _checked(ignore_index=ignore_index, dim=dim, reduction=reduction)
        super().__init__(**_checked(margin=margin, scale=scale), **rows)

    def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of ``cosine`` ``(..., C)`` and ``target``."""
        return am_softmax_loss(cosine, target, **self.options)


class LinearMarginSoftmaxLoss(LossModule):
    """:func:`linear_margin_softmax_loss` as a module; it holds no class vectors of its own."""

    def __init__(
        self,
        *,
        psi: Psi,
        scale: Scale = 30.0,
        chunk_size: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        rows = _checked(ignore_index=ignore_index, reduction=reduction)
        linear = _checked(psi=psi, scale=scale, chunk_size=chunk_size)
        super().__init__(**linear, **rows)

    def forward(self, embedding: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of ``embedding`` ``(..., D)``, class vectors ``weight`` ``(C, D)`` and ``target`` ``(...)``."""
        return linear_margin_softmax_loss(embedding, weight, target, **self.options)


class LinearAmSoftmaxLoss(LossModule):
    """:func:`linear_am_softmax_loss` as a module; it holds no class vectors of its own."""

    def __init__(
        self,
        *,
        margin: float = 0.35,
        scale: Scale = 30.0,
        chunk_size: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        rows = _checked(ignore_index=ignore_index, reduction=reduction)
        linear = _checked(margin=margin, scale=scale, chunk_size=chunk_size)
        super().__init__(**linear, **rows)

    def forward(self, embedding: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of ``embedding`` ``(..., D)``, class vectors ``weight`` ``(C, D)`` and ``target`` ``(...)``."""
        return linear_am_softmax_loss(embedding, weight, target, **self.options)


# ----------------------------------------------------------------------------------------------- from scores to rows


def _by_index(s: Tensor, t: Tensor, counted: Tensor | None, psi: Psi, call: Psi, scale: Scale) -> Tensor:
    """The losses of rows; ``call`` is ``psi`` with its checks."""
    if isinstance(scale, Tensor):  # by autograd, so that the scale gets its gradient
        both = rest_rows(rest_and_target, scale * s, t, counted, scale)
        return margin_softmax(both, counted, lambda s_t: call(s_t / scale), scale)
    known = value_and_slope(psi, s, t)
    if known is None:
        both = rest_rows(rest_and_target, s, t, counted, scale)
        return margin_softmax(both, counted, call, scale)

    def formula(s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
        both = rest_and_target(s, t, counted, scale)
        return margin_softmax(both, counted, call, scale)

    return margin_rows(formula, known, s, t, counted, scale)


# -------------------------------------------------------------------------------------------------------------- checks


def _check_scale(scale: Any) -> Scale:
    """A number, or a tensor of no dimension where it takes a gradient or cannot be read."""
    if not isinstance(scale, Tensor) or (readable(scale) and not scale.requires_grad):
        return check_number("scale", scale, low=0, open_low=True)
    if scale.numel() != 1 or not scale.is_floating_point():
        wanted = "a number or a floating tensor of one"
        raise ValueError(f"scale must be {wanted}, got {describe(scale)}")
    if readable(scale):
        check_number("scale", scale.detach().reshape(()), low=0, open_low=True)
    return scale.reshape(()) if scale.dim() else scale


def _own_scale(scale: Any) -> Scale:
    """What a module keeps: a parameter as it is."""
    checked = _check_scale(scale)
    return scale if isinstance(scale, nn.Parameter) else checked


def _check_chunk(chunk_size: int | None) -> int | None:
    some = chunk_size is not None
    return check_integer("chunk_size", chunk_size, low=1) if some else None


def _check_cosines(cosine: Tensor, target: Tensor, counted: Tensor | None = None) -> None:
    """Raise if values far outside [-1, 1] show that these are no cosines; -inf is a class left out, never a target."""
    if not readable(cosine) or cosine.numel() == 0:
        return
    low, high = (float(x) for x in torch.aminmax(cosine.detach()))
    far = 1.02  # two steps of bfloat16 above 1 are 1.0156
    if -far <= low and high <= far:
        return
    rows, t = cosine.detach(), target
    if counted is not None:
        rows, t = rows[counted], t[counted]
    wrong = rows[(rows.abs() > far) & (rows != -math.inf)]
    if wrong.numel() > 0:
        wanted = "cosines, in [-1, 1] up to rounding (CosineClassifier)"
        raise ValueError(f"cosine must hold {wanted}, got {float(wrong[0]):g}")
    own = rows[t > 0] if t.is_floating_point() else rows.gather(-1, t.unsqueeze(-1))
    if bool((own == -math.inf).any()):
        raise ValueError("cosine must be finite at the target, got -inf")


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "psi": check_psi,
    "margin": lambda margin: Less(margin).m,
    "scale": _own_scale,
    "chunk_size": _check_chunk,
    "ignore_index": check_ignore_index,
    "dim": partial(check_integer, "dim"),
    "reduction": check_reduction,
}


def _checked(**options: Any) -> dict[str, Any]:
    return {name: _CHECKS[name](value) for name, value in options.items()}
