r"""Margin softmax: classify into groups so that the embeddings can be searched.

Cosines with class vectors (:class:`CosineClassifier`), cross-entropy with a margin on the target's cosine
(:func:`margin_softmax_loss`, :func:`am_softmax_loss`), three margins, the same losses for very many classes
(:func:`linear_margin_softmax_loss`, :func:`linear_am_softmax_loss`) and the share of searches that succeed
(:func:`retrieval_accuracy`). The page Recipes shows them in training loops, Lightning and Hugging Face.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lossbook._checks import (
    HALF,
    check_classes,
    check_distribution,
    check_floating,
    check_ignore_index,
    check_index,
    check_integer,
    check_number,
    check_reduction,
    check_scores,
    describe,
    refuse_sharded,
)
from lossbook._common import ABSENT, LossModule, reduce_loss, rest_margins, softplus
from lossbook._fast.am_softmax import UNSHIFTED, LinearRest, margin_rows, rest_rows
from lossbook._torch import compiling, full_precision, plain, readable

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

Psi = Callable[[Tensor], Tensor]

# Cosines that were rounded may leave [-1, 1]: two steps of bfloat16 above 1 are 1.0156.
_ROUNDING = 0.02
# The chunks that torch.compile unrolls, unless chunk_size says otherwise.
_UNROLLED = 16


# ---------------------------------------------------------------------------------------------------------- cosines


def _inverse_norm(vectors: Tensor) -> Tensor:
    """``1 / |v|`` of each vector as a column, 0 for a vector without direction, NaN where the squares overflow."""
    square = vectors.square().sum(-1, keepdim=True)
    square = square.masked_fill(square.isinf(), float("nan"))  # 1 / inf would be a silent cosine of 0
    long = ~(square < 1e-24)  # shorter than 1e-12: no direction. NaN stays NaN
    # the inner where keeps 1 / sqrt(0) and its derivatives out of the graph: inf * 0 would be NaN
    return torch.where(long, 1 / torch.where(long, square, 1.0).sqrt(), 0.0)


def _unit(vectors: Tensor, *others: Tensor) -> Tensor:
    """The vectors at length 1, in float64 where one of the tensors is, else in float32."""
    wide = any(v.dtype == torch.float64 for v in (vectors, *others))
    vectors = vectors.to(torch.float64 if wide else torch.float32)
    return vectors * _inverse_norm(vectors)


class CosineClassifier(nn.Module):
    r"""Cosines of embeddings with one vector per class: the last layer for a margin softmax.

    .. math:: \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    Shapes: embeddings ``(..., in_features)`` to cosines ``(..., num_classes)`` in [-1, 1].

    The class vectors stay in float32: autocast, a bfloat16 or float16 embedding, ``.half()`` and
    ``.to(torch.bfloat16)`` leave them as they are. In bfloat16, which keeps three digits, a step of a thousandth of a
    weight would be lost. ``.double()`` widens them. FSDP2 with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)``
    steps them in float32, but hands a rounded copy to ``forward``, which warns. Give the head a group of its own,
    before the model's: ``fully_shard(head, mp_policy=MixedPrecisionPolicy())``.

    The cosines are float32, or float64 where the embedding or the class vectors are. A vector shorter than 1e-12 has
    cosine 0 with every other and gradient 0. One whose squares overflow (longer than 1e19, 1e154 in float64), and one
    with NaN or infinity, have cosine NaN. An embedding with NaN spoils the gradient of all class vectors, even where
    the loss ignores its row: put zeros in its place, or take :func:`linear_am_softmax_loss`, which does so.

    Class vectors made on the meta device are drawn when ``to_empty`` gives them memory. Those that a checkpoint lacks
    are drawn by ``from_pretrained`` of Hugging Face (transformers 5), unless the model's own ``_init_weights`` does it.

    Args:
        in_features: length of an embedding.
        num_classes: number of class vectors.
        device: where the class vectors are made.
        dtype: float32, which is the default, or float64.

    Attributes:
        weight: the class vectors ``(num_classes, in_features)``, of length about 1 at the start.

    Raises:
        TypeError: a size that is not an integer; an embedding that is not a real-valued tensor.
        ValueError: a size below 1; another dtype; an embedding of another length.

    Example:
        >>> import torch
        >>> head = CosineClassifier(2, 3)
        >>> with torch.no_grad():
        ...     _ = head.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]))
        >>> head(torch.tensor([[3.0, 4.0]])).detach()
        tensor([[ 0.6000,  0.8000, -0.6000]])

    Equation :eq:`am-cosine` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); normalised class
    vectors also in arXiv 1801.05599.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, low=1)
        self.num_classes = check_integer("num_classes", num_classes, low=1)
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        shape = (self.num_classes, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype or torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors anew: directions uniform, lengths about 1."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        self._undrawn = self.weight.is_meta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CosineClassifier:
        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.is_floating_point() and changed.dtype in HALF:
                return tensor.to(changed.device)  # moves, and skips the rounding
            return changed

        undrawn = self.weight.is_meta
        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        if undrawn and not self.weight.is_meta:  # to_empty: memory with anything in it
            self.reset_parameters()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # transformers sets this once _init_weights, which knows no class vectors, has seen the module. Parameters read
        # from a checkpoint bear the mark already (since version 5), and what was drawn in place has a version.
        if name == "_is_hf_initialized" and getattr(self, "_undrawn", False) and not self.weight.is_meta:
            known = int(getattr(sys.modules.get("transformers"), "__version__", "0").partition(".")[0]) >= 5
            if known and not getattr(self.weight, name, False) and self.weight._version == 0:
                self.reset_parameters()
            self._undrawn = False

    def forward(self, embedding: Tensor) -> Tensor:
        """Cosines ``(..., num_classes)`` of ``embedding`` ``(..., in_features)``."""
        check_floating(embedding, "embedding")
        if embedding.dim() < 1 or embedding.shape[-1] != self.in_features:
            raise ValueError(
                f"embedding must have in_features={self.in_features} as its last dimension, got {describe(embedding)}"
            )
        if self.weight.dtype in HALF and not compiling():
            warnings.warn(
                f"the class vectors are rounded to {self.weight.dtype}: give the CosineClassifier a group of its own, "
                "fully_shard(head, mp_policy=MixedPrecisionPolicy()), before the model's",
                stacklevel=2,
            )
        with full_precision(embedding.device):
            cosine = F.linear(_unit(embedding, self.weight), _unit(self.weight, embedding))
            return cosine.clamp(-1, 1)  # rounding gives 1 + 1e-7

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"


# ---------------------------------------------------------------------------------------------------------- margins


class _Margin(nn.Module):
    """A function of the cosine with one number."""

    m: float

    def extra_repr(self) -> str:
        return f"m={self.m:g}"


class AdditiveCosineMargin(_Margin):
    """The module that :func:`additive_cosine_margin` returns."""

    def __init__(self, m: float = 0.35) -> None:
        super().__init__()
        self.m = check_number("m", m, low=0)

    def forward(self, cosine: Tensor) -> Tensor:
        """``cosine - m``, elementwise."""
        return check_scores(cosine, name="cosine", rows=False) - self.m


class AdditiveAngularMargin(_Margin):
    """The module that :func:`additive_angular_margin` returns."""

    def __init__(self, m: float = 0.5) -> None:
        super().__init__()
        self.m = check_number("m", m, low=0, high=math.pi / 2)

    def forward(self, cosine: Tensor) -> Tensor:
        """``cos(theta + m)``, elementwise, with its continuation."""
        c = check_scores(cosine, name="cosine", rows=False)
        c = c + (c.clamp(-1, 1) - c).detach()  # 1 + 1e-7 counts as 1, with the slope at 1
        square = (1 - c) * (1 + c)  # sin^2, without the cancellation of 1 - c^2
        # sin^2 at the largest cosine below 1 that the dtype holds. From there to 1 the chord replaces the root:
        # no value changes, and the slope 1 / 0 at 1 becomes the finite one between these two neighbours.
        step = torch.finfo(cosine.dtype).eps / 2
        least = step * (2 - step)
        rounded = square < least
        sine = torch.where(rounded, square / math.sqrt(least), torch.where(rounded, least, square).sqrt())
        shifted = c * math.cos(self.m) - sine * math.sin(self.m)
        # a border rounded to the dtype may leave a cosine beyond it in the first case: no slope the wrong way there
        beyond = sine * math.cos(self.m) + c * math.sin(self.m) < 0
        shifted = torch.where(beyond, shifted.detach(), shifted)
        return torch.where(c < -math.cos(self.m), c - self.m * math.sin(self.m), shifted)


class MultipliedAngle(_Margin):
    """The module that :func:`multiplied_angle` returns."""

    def __init__(self, m: int = 4) -> None:
        super().__init__()
        self.m = check_integer("m", m)
        if self.m not in (2, 3, 4):
            raise ValueError(f"m must be 2, 3 or 4, got {m}")

    def forward(self, cosine: Tensor) -> Tensor:
        """``min(cos m theta, cos theta)``, elementwise."""
        c = check_scores(cosine, name="cosine", rows=False)
        double = 2 * c * c - 1  # Chebyshev's polynomials: cos 2 theta, cos 3 theta, cos 4 theta
        multiple = {2: double, 3: c * (2 * double - 1), 4: 2 * double * double - 1}[int(self.m)]
        return torch.minimum(multiple, c)


def additive_cosine_margin(m: float = 0.35) -> AdditiveCosineMargin:
    r"""The margin of AM-softmax and CosFace, ``m`` >= 0: subtract a constant from the target's cosine.

    .. math:: \psi(\theta) = \cos\theta - m

    Example:
        >>> import torch
        >>> additive_cosine_margin(0.35)(torch.tensor([1.0, 0.0]))
        tensor([ 0.6500, -0.3500])

    Equation :eq:`am-additive` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    return AdditiveCosineMargin(m)


def additive_angular_margin(m: float = 0.5) -> AdditiveAngularMargin:
    r"""The margin of ArcFace, ``m`` from 0 to :math:`\pi / 2` radians: add a constant to the target's angle.

    .. math::

        \psi(\theta) = \begin{cases}
            \cos(\theta + m) & \theta + m \le \pi \\
            \cos\theta - m \sin m & \theta + m > \pi
        \end{cases}

    The second case keeps :math:`\psi` decreasing in :math:`\theta`. At the border it steps down, from -1 to
    :math:`-\cos m - m \sin m`, about -1.12 for m = 0.5. Where rounding puts an angle beyond the border into the first
    case, the slope there is 0. The derivative by the cosine is infinite at cosine 1. There the function returns the
    slope of the chord to the next smaller number of the cosine's dtype, :math:`\cos m + 2 \sin m / \sqrt{\epsilon}` to
    rounding: about 2800 in float32, 32 in float16, for m = 0.5. To an embedding the choice makes no difference beyond
    rounding: the cosine's own derivative vanishes there. A cosine outside [-1, 1] counts as the nearer end.

    Example:
        >>> import torch
        >>> additive_angular_margin(0.5)(torch.tensor([1.0, 0.0, -1.0]))
        tensor([ 0.8776, -0.4794, -1.2397])

    Equation :eq:`am-arc` of the chapter. Source: ArcFace, arXiv 1801.07698; Su Jianlin, scientific spaces 5743 (2018).
    """
    return AdditiveAngularMargin(m)


def multiplied_angle(m: int = 4) -> MultipliedAngle:
    r"""Multiply the target's angle by ``m`` (2, 3 or 4), and never exceed its cosine: the post's short form.

    .. math:: \psi(\theta) = \min(\cos m\theta,\, \cos\theta)

    Where :math:`\cos m\theta` is the smaller of the two and falls with growing cosine, the gradient pulls the embedding
    away from its class: for m = 4 between 45 and 72 degrees, and again between 135 and 144. The paper that multiplied
    the angle first (SphereFace, arXiv 1704.08063) has another form, which falls with the angle everywhere:
    :math:`(-1)^r \cos m\theta - 2r`, r the integer part of :math:`m\theta / \pi`.

    Example:
        >>> import torch
        >>> multiplied_angle(4)(torch.tensor([1.0, 0.5, 0.0]))
        tensor([ 1.0000, -0.5000,  0.0000])

    Equation :eq:`am-multiplied` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018).
    """
    return MultipliedAngle(m)


# ------------------------------------------------------------------------------------------------ loss from cosines


def rest_and_target(cosine: Tensor, t: Tensor, counted: Tensor, scale: float | Tensor) -> Tensor:
    """``(..., 2)``: the log-sum-exp of the other classes' scores, and the target's cosine."""
    cosine = cosine.masked_fill(~counted.unsqueeze(-1), 0)
    at = t.unsqueeze(-1)
    rest = (scale * cosine).scatter(-1, at, ABSENT).logsumexp(-1)
    return torch.stack((rest, cosine.gather(-1, at).squeeze(-1)), -1)


def margin_softmax(rest_and_target: Tensor, counted: Tensor, psi: Psi, scale: float | Tensor) -> Tensor:
    """``log(1 + e^z)``, z the rest's log-sum-exp less the target's score: never negative, and no digit is lost."""
    rest, cosine_t = rest_and_target[..., 0], rest_and_target[..., 1]
    return softplus(rest - scale * psi(cosine_t)).masked_fill(~counted, 0)


def soft_margin_softmax(cosine: Tensor, target: Tensor, psi: Psi, scale: float | Tensor) -> Tensor:
    """The loss of each class as target, with its own margin, weighted by the soft target."""
    s = scale * cosine
    rest = rest_margins(s) + s
    absent = target == 0
    loss = softplus((rest - scale * psi(cosine.masked_fill(absent, 0))).masked_fill(absent, 0))
    return (target * loss).sum(-1)


def _check_psi(psi: Psi) -> Psi:
    if not callable(psi):
        raise TypeError(f"psi must be a function of the cosine, got {describe(psi)}")
    return psi


def _check_scale(scale: float | Tensor) -> float | Tensor:
    """``scale`` as a number, or as a tensor of no dimension where it takes a gradient or cannot be read."""
    if not isinstance(scale, Tensor) or (readable(scale) and not scale.requires_grad):
        return check_number("scale", scale, low=0, open_low=True)
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ValueError(f"scale must be a number or a floating tensor of one, got {describe(scale)}")
    if readable(scale):
        check_number("scale", scale.detach().reshape(()), low=0, open_low=True)
    return scale if isinstance(scale, nn.Parameter) and scale.dim() == 0 else scale.reshape(())


def _shaped(psi: Psi, dtype: torch.dtype | None = None) -> Psi:
    """``psi``, checked to return the shape it is given; the angular margin, whose slope at 1 depends on it, in dtype.

    A float32's slope is too steep for a float16 gradient.
    """

    def call(cosine_t: Tensor) -> Tensor:
        shape = cosine_t.shape
        psi_t = psi(cosine_t.to(dtype) if dtype and isinstance(psi, AdditiveAngularMargin) else cosine_t)
        if not isinstance(psi_t, Tensor) or psi_t.shape != shape:
            raise ValueError(
                f"psi must return a tensor of the shape it is given, {tuple(shape)}, got {describe(psi_t)}"
            )
        return psi_t

    return call


def _check_cosines(cosine: Tensor, cosine_t: Callable[[], Tensor], counted: Tensor | None = None) -> None:
    """Raise if values far outside [-1, 1] show that these are no cosines; -inf is a class left out, never a target."""
    if not readable(cosine) or cosine.numel() == 0:
        return
    low, high = (float(x) for x in torch.aminmax(cosine.detach()))
    if low >= -1 - _ROUNDING and high <= 1 + _ROUNDING:
        return
    rows = cosine.detach() if counted is None else cosine.detach()[counted]
    wrong = (rows.abs() > 1 + _ROUNDING) & (rows != -math.inf)
    if bool(wrong.any()):
        first = float(rows[wrong][0])
        raise ValueError(f"cosine must hold cosines, in [-1, 1] up to rounding (CosineClassifier), got {first:g}")
    if bool((cosine_t() == -math.inf).any()):
        raise ValueError("cosine must be finite at the target, got -inf")


def margin_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    psi: Psi,
    scale: float | Tensor = 30.0,
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
        target: class indices ``(...)``, or soft targets of the shape of ``cosine``: the loss of each class as target,
            with its own margin, is weighted by them.
        psi: the margin, a function of the target's cosines ``(...)``, elementwise: :func:`additive_cosine_margin`,
            :func:`additive_angular_margin`, :func:`multiplied_angle` or any other with
            :math:`\psi(\theta) \le \cos\theta`.
        scale: factor of the cosines, a number > 0 or a tensor of one that learns. Cosines alone span too little:
            without it the loss stays far from 0.
        ignore_index: rows with this target do not count, and their gradient is 0.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``, of shape ``(...)``.

    Returns:
        The loss, in float32 for float16 and bfloat16 cosines.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape or option. On the CPU also a class index outside [0, C), and a cosine outside [-1, 1]
            by more than 0.02; on an accelerator these two checks would wait for the device and are skipped.

    Example:
        >>> import torch
        >>> cosine = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.5, 0.1]])
        >>> margin_softmax_loss(cosine, torch.tensor([0, 1]), psi=additive_angular_margin(0.5), scale=10)
        tensor(1.4768)

    Equation :eq:`am-margin` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018) and 8656 (2021).
    """
    check_reduction(reduction)
    scale, psi = _check_scale(scale), _check_psi(psi)
    s = check_scores(cosine, name="cosine", dim=dim)
    classes, call = check_classes(s, "cosine"), _shaped(psi, cosine.dtype)
    if isinstance(target, Tensor) and target.is_floating_point() and target.dim() == cosine.dim():
        tau = check_distribution(target, cosine.shape, dim=dim).to(s.dtype)
        _check_cosines(s, lambda: s[tau > 0])
        return reduce_loss(soft_margin_softmax(s, tau, call, scale), reduction)
    t, counted = check_index(target, s.shape[:-1], classes, ignore_index)
    _check_cosines(s, lambda: s.gather(-1, t.unsqueeze(-1)).squeeze(-1)[counted], counted)
    shifted = isinstance(scale, Tensor) or scale > UNSHIFTED or not readable(s)
    if isinstance(scale, Tensor):  # the scores by autograd, so that the scale gets its gradient
        both = rest_rows(rest_and_target, scale * s, t, counted, 1.0, shifted)
        loss = margin_softmax(both, counted, lambda s_t: call(s_t / scale), scale)
    elif isinstance(psi, (_Margin, _Less)):  # no parameters of its own

        def formula(s: Tensor, t: Tensor, counted: Tensor) -> Tensor:
            return margin_softmax(rest_and_target(s, t, counted, scale), counted, call, scale)

        loss = margin_rows(formula, partial(_value_and_slope, call, psi), s, t, counted, scale, shifted)
    else:
        both = rest_rows(rest_and_target, s, t, counted, scale, shifted)
        loss = margin_softmax(both, counted, call, scale)
    return reduce_loss(loss, reduction, counted)


class _Less:
    """The additive margin without a module around it."""

    def __init__(self, m: float) -> None:
        self.m = m

    def __call__(self, cosine_t: Tensor) -> Tensor:
        return cosine_t - self.m


def _value_and_slope(call: Psi, psi: Psi, cosine_t: Tensor) -> tuple[Tensor, Tensor | None]:
    """``psi`` of the target's cosines and its slope, None for 1."""
    if isinstance(psi, (_Less, AdditiveCosineMargin)):
        return cosine_t - psi.m, None
    with torch.enable_grad():
        psi_t = call(cosine_t.requires_grad_())
        return psi_t.detach(), torch.autograd.grad(psi_t.sum(), cosine_t)[0]


def am_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 30.0,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""AM-softmax: :func:`margin_softmax_loss` with :func:`additive_cosine_margin`, the usual choice.

    .. math::

        -\log \frac{e^{\gamma(\cos\theta_t - m)}}{e^{\gamma(\cos\theta_t - m)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}}

    with m = ``margin``, at least 0, and :math:`\gamma` = ``scale``. All else is as in :func:`margin_softmax_loss`.

    Example:
        >>> import torch
        >>> cosine = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.5, 0.1]])
        >>> am_softmax_loss(cosine, torch.tensor([0, 1]), scale=10)
        tensor(0.9090)

    Equation :eq:`am-loss` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    m = check_number("margin", margin, low=0)
    return margin_softmax_loss(
        cosine, target, psi=_Less(m), scale=scale, ignore_index=ignore_index, dim=dim, reduction=reduction
    )


# --------------------------------------------------------------------------- loss from embeddings and class vectors


def linear_rest_and_target(z: Tensor, weight: Tensor, t: Tensor, size: int | None = None) -> Tensor:
    """``(R, 2)``: :func:`rest_and_target` of ``z`` ``(R, D)``, the unit embeddings times the scale, as scores.

    With ``size`` so many classes at a time are held, and the backward pass computes them anew.
    """

    def rest(z: Tensor, t: Tensor, w: Tensor, places: Tensor) -> Tensor:
        with full_precision(z.device):
            s = z @ _unit(w, z).t()
        # ABSENT by its digits: torch.compile with dynamic=True lets no global number into a checkpoint
        return s.masked_fill(places == t.unsqueeze(-1), -1e32).logsumexp(-1)

    places = torch.arange(len(weight), device=t.device)
    if size is None:
        parts = [rest(z, t, weight, places)]
    else:
        chunks = zip(torch.split(weight, size), torch.split(places, size))  # noqa: B905 - torch 2.6 traces no strict
        parts = [cast(Tensor, checkpoint(rest, z, t, w, p, use_reentrant=False)) for w, p in chunks]
    s_t = (z * _unit(weight[t], z)).sum(-1)
    return torch.stack((torch.stack(parts).logsumexp(0), s_t), -1)


def _chunk_of(rows: int, size: int, device: torch.device) -> int:
    """How many classes at a time, so that a chunk's scores and vectors have a fixed size together."""
    # 16 MB lie in a CPU's last cache, 64 MB keep an accelerator busy; less, and the threads wait for each other
    return max((2**22 if device.type == "cpu" else 2**24) // (rows + size), 128)


def linear_margin_softmax_loss(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    psi: Psi,
    scale: float | Tensor = 30.0,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`margin_softmax_loss` from embeddings and class vectors, without the matrix of all cosines.

    .. math::

        -\log \frac{e^{\gamma\,\psi(\theta_t)}}{e^{\gamma\,\psi(\theta_t)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}},
        \qquad \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    One chunk of classes at a time is held; the backward pass computes it again. So beside inputs and gradients, the
    memory does not grow with the number of classes. Derivatives of second order, forward mode and the transforms of
    ``torch.func`` hold the whole ``(..., C)`` matrix. ``torch.compile`` and ``torch.export`` unroll the chunks.

    Args:
        embedding: embeddings ``(..., D)`` of any length up to 1e19, 1e154 in float64. One shorter than 1e-12 has
            cosine 0 with every class, and gradient 0; so has a class vector. NaN, infinity and longer ones give NaN.
        weight: class vectors ``(C, D)``, of length as embeddings, best in float32.
        target: class indices ``(...)``.
        psi: the margin, as for :func:`margin_softmax_loss`.
        scale: factor of the cosines, a number > 0 or a tensor of one that learns.
        chunk_size: how many classes at a time. Without it a chunk's scores and vectors have four million numbers
            together (16 million on an accelerator), and the chunk at least 128 classes; compiled code has 16 chunks.
        ignore_index: rows with this target do not count, and their gradient is 0.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``, of shape ``(...)``.

    Returns:
        The loss, computed in float32, in float64 where one of the inputs is. Each gradient has its input's dtype.

    Raises:
        TypeError: an argument of the wrong type; class vectors that are a sharded DTensor, as FSDP2 leaves them
            outside their module's ``forward``. The message names the three ways that give the right gradient.
        ValueError: a wrong shape or option. On the CPU also a class index outside [0, C); on an accelerator this check
            would wait for the device and is skipped.

    Example:
        >>> import torch
        >>> embedding, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        >>> linear_margin_softmax_loss(embedding, weight, torch.tensor([1]), psi=additive_angular_margin(), scale=10)
        tensor(2.0011)

    Equation :eq:`am-margin` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018) and 8656 (2021).
    """
    check_reduction(reduction)
    scale, psi = _check_scale(scale), _shaped(_check_psi(psi))
    check_floating(embedding, "embedding")
    refuse_sharded("weight", check_floating(weight, "weight", dims=2))
    classes, length = weight.shape
    if classes == 0:
        raise ValueError(f"weight must have at least one class vector, got {describe(weight)}")
    if embedding.dim() < 1 or embedding.shape[-1] != length:
        raise ValueError(
            f"embedding must have the length of a class vector, {length}, as its last dimension, "
            f"got {describe(embedding)}"
        )
    t, counted = check_index(target, embedding.shape[:-1], classes, ignore_index)
    # a row that does not count is a zero vector: whatever it holds reaches no gradient
    z = _unit(embedding.masked_fill(~counted.unsqueeze(-1), 0), weight).reshape(-1, length) * scale
    size = None if chunk_size is None else check_integer("chunk_size", chunk_size, low=1)
    if plain(z, weight, t):
        size = size or _chunk_of(len(z), length, z.device)
        shifted = isinstance(scale, Tensor) or scale > UNSHIFTED
        both = cast(
            Tensor,
            LinearRest.apply(z, weight, t.reshape(-1), size, shifted, _inverse_norm, linear_rest_and_target),  # type: ignore[no-untyped-call]
        )
    else:
        both = linear_rest_and_target(
            z, weight, t.reshape(-1), (size or -(-classes // _UNROLLED)) if compiling() else None
        )
    loss = margin_softmax(both.reshape(*t.shape, 2), counted, lambda s_t: psi(s_t / scale), scale)
    return reduce_loss(loss, reduction, counted)


def linear_am_softmax_loss(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float | Tensor = 30.0,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`linear_margin_softmax_loss` with :func:`additive_cosine_margin`: AM-softmax for very many classes.

    .. math::

        -\log \frac{e^{\gamma(\cos\theta_t - m)}}
        {e^{\gamma(\cos\theta_t - m)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}},
        \qquad \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    with m = ``margin``, at least 0. All else is as in :func:`linear_margin_softmax_loss`.

    Example:
        >>> import torch
        >>> embedding, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        >>> linear_am_softmax_loss(embedding, weight, torch.tensor([1]), scale=10, chunk_size=2)
        tensor(1.7014)

    Equation :eq:`am-linear` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    m = check_number("margin", margin, low=0)
    return linear_margin_softmax_loss(
        embedding,
        weight,
        target,
        psi=_Less(m),
        scale=scale,
        chunk_size=chunk_size,
        ignore_index=ignore_index,
        reduction=reduction,
    )


# -------------------------------------------------------------------------------------------------------- retrieval


def _check_ks(k: int | Iterable[int]) -> tuple[int, ...]:
    """``k`` as a tuple of integers of at least 1, or an error."""
    several = isinstance(k, Iterable) and getattr(k, "ndim", 1) > 0
    if not several and not isinstance(k, int) and not hasattr(k, "item"):
        raise TypeError(f"k must be an integer or several, got {describe(k)}")
    ks = tuple(check_integer("k", number, low=1) for number in (cast(Iterable[int], k) if several else [k]))
    if not ks:
        raise ValueError("k must hold at least one number, got none")
    return ks


@torch.no_grad()
def retrieval_accuracy(embedding: Tensor, label: Tensor, *, k: int | Iterable[int] = (1, 5, 10)) -> dict[int, Tensor]:
    r"""How often a search by cosine finds one of the query's own group among the first k.

    .. math::

        \frac{\bigl|\{ q \in Q : n_q < k \}\bigr|}{|Q|}, \qquad
        n_q = \Bigl|\Bigl\{ j : y_j \ne y_q,\ \cos(z_q, z_j) \ge
            \max_{i \ne q,\ y_i = y_q} \cos(z_q, z_i) \Bigr\}\Bigr|

    Every row is a query against all the others; Q are those whose group has another member. A stranger who ties with
    the best of the own group counts as nearer, so that equal embeddings score 0. Cosines within 8 roundings of each
    other tie. With k beyond N - 1 all the others are the first k. N x N cosines are never held at once.

    Args:
        embedding: embeddings ``(N, D)`` of any length up to 1e19, 1e154 in float64; a zero vector has cosine 0 with
            every other.
        label: the group of each, integers ``(N,)``.
        k: how many of the nearest to look at: one number or several.

    Returns:
        For each k a scalar tensor, on the embeddings' device, without gradient. NaN if an embedding holds NaN or
        infinity, or is longer than that.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape, or a k below 1, or no k. On the CPU also when no group has two members: there is no
            query; on an accelerator this check would wait for the device, and the result is NaN.

    Example:
        >>> import torch
        >>> embedding = torch.tensor([[1.0, 0.0], [1.0, 0.4], [0.0, 1.0], [0.6, 1.0]])
        >>> retrieval_accuracy(embedding, torch.tensor([0, 0, 1, 1]), k=(1, 2))
        {1: tensor(1.), 2: tensor(1.)}

    Equation :eq:`am-retrieval` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018), which reports top
    1, 5 and 10.
    """
    ks = _check_ks(k)
    z = _unit(check_floating(embedding, "embedding", dims=2))
    if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise TypeError(f"label must be a tensor of an integer dtype, got {describe(label)}")
    n = len(z)
    if tuple(label.shape) != (n,):
        raise ValueError(f"label must have one number per embedding, shape {(n,)}, got {describe(label)}")
    label, places = label.long(), torch.arange(n, device=z.device)
    tie = 8 * torch.finfo(z.dtype).eps
    queries = torch.zeros((), dtype=torch.long, device=z.device)
    hits = [queries for _ in ks]
    step = max(2**22 // max(n, 1), 1)  # 16 MB of cosines
    for first in range(0, n, step):
        rows = slice(first, first + step)
        with full_precision(z.device):
            cosine = z[rows] @ z.t()
        group = label[rows].unsqueeze(1) == label
        own = group & (places[rows].unsqueeze(1) != places)
        best = cosine.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        nearer = ((cosine >= best - tie) & ~group).sum(1)
        found = own.any(1)
        queries = queries + found.sum()
        hits = [hit + (found & (nearer < number)).sum() for hit, number in zip(hits, ks)]  # noqa: B905 - torch 2.6
    if readable(embedding, label) and not bool(queries):
        raise ValueError("label must hold a group of at least two: no query has another member to find")
    # NaN compares with nothing, so no stranger would be nearer and a diverged encoder would look perfect
    whole = z.isfinite().all()
    return {number: torch.where(whole, hit / queries, math.nan) for number, hit in zip(ks, hits)}  # noqa: B905


# ---------------------------------------------------------------------------------------------------------- modules


class MarginSoftmaxLoss(LossModule):
    """Module of :func:`margin_softmax_loss`, with the same options; a ``scale`` that is a parameter is its own.

    Example:
        >>> MarginSoftmaxLoss(psi=additive_angular_margin(0.5), scale=64)
        MarginSoftmaxLoss(
          scale=64, ignore_index=-100, dim=-1, reduction='mean'
          (psi): AdditiveAngularMargin(m=0.5)
        )
    """

    def __init__(
        self,
        *,
        psi: Psi,
        scale: float | Tensor = 30.0,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(psi=_check_psi(psi), **_checked(scale, ignore_index, reduction, dim=dim))

    def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of ``cosine`` ``(..., C)`` and ``target``."""
        return margin_softmax_loss(cosine, target, **self.options)


class AmSoftmaxLoss(LossModule):
    """Module of :func:`am_softmax_loss`, with the same options.

    Example:
        >>> AmSoftmaxLoss(margin=0.2)
        AmSoftmaxLoss(margin=0.2, scale=30, ignore_index=-100, dim=-1, reduction='mean')
    """

    def __init__(
        self,
        *,
        margin: float = 0.35,
        scale: float | Tensor = 30.0,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            margin=check_number("margin", margin, low=0), **_checked(scale, ignore_index, reduction, dim=dim)
        )

    def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of ``cosine`` ``(..., C)`` and ``target``."""
        return am_softmax_loss(cosine, target, **self.options)


class LinearMarginSoftmaxLoss(LossModule):
    """Module of :func:`linear_margin_softmax_loss`, with the same options. It holds no class vectors of its own."""

    def __init__(
        self,
        *,
        psi: Psi,
        scale: float | Tensor = 30.0,
        chunk_size: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(psi=_check_psi(psi), **_checked(scale, ignore_index, reduction, chunk_size=chunk_size))

    def forward(self, embedding: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of ``embedding`` ``(..., D)``, class vectors ``weight`` ``(C, D)`` and ``target`` ``(...)``."""
        return linear_margin_softmax_loss(embedding, weight, target, **self.options)


class LinearAmSoftmaxLoss(LossModule):
    """Module of :func:`linear_am_softmax_loss`, with the same options. It holds no class vectors of its own.

    Example:
        >>> LinearAmSoftmaxLoss(chunk_size=4096)
        LinearAmSoftmaxLoss(margin=0.35, scale=30, chunk_size=4096, ignore_index=-100, reduction='mean')
    """

    def __init__(
        self,
        *,
        margin: float = 0.35,
        scale: float | Tensor = 30.0,
        chunk_size: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            margin=check_number("margin", margin, low=0),
            **_checked(scale, ignore_index, reduction, chunk_size=chunk_size),
        )

    def forward(self, embedding: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of ``embedding`` ``(..., D)``, class vectors ``weight`` ``(C, D)`` and ``target`` ``(...)``."""
        return linear_am_softmax_loss(embedding, weight, target, **self.options)


def _checked(scale: float | Tensor, ignore_index: int, reduction: str, **own: int | None) -> dict[str, Any]:
    """The options of every module, checked, in the order of the signatures."""
    if own.get("chunk_size") is not None:
        own["chunk_size"] = check_integer("chunk_size", own["chunk_size"], low=1)
    if "dim" in own:
        own["dim"] = check_integer("dim", own["dim"])
    before, after = ({}, own) if "dim" in own else (own, {})
    options: dict[str, Any] = {"scale": _check_scale(scale), **before}
    options.update(ignore_index=check_ignore_index(ignore_index), **after, reduction=check_reduction(reduction))
    return options


class RetrievalAccuracy(LossModule):
    """Module of :func:`retrieval_accuracy`, with the same option.

    Example:
        >>> RetrievalAccuracy(k=(1, 5))
        RetrievalAccuracy(k=(1, 5))
    """

    def __init__(self, *, k: int | Iterable[int] = (1, 5, 10)) -> None:
        super().__init__(k=_check_ks(k))

    def forward(self, embedding: Tensor, label: Tensor) -> dict[int, Tensor]:
        """The share for each k, of ``embedding`` ``(N, D)`` and ``label`` ``(N,)``."""
        return retrieval_accuracy(embedding, label, **self.options)
