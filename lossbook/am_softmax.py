r"""Margin softmax: classify into groups so that the embeddings can be searched.

What is here: cosines with class vectors (:class:`CosineClassifier`), cross-entropy with a margin on the target's cosine
(:func:`margin_softmax_loss`, :func:`am_softmax_loss`), three margins (:func:`additive_cosine_margin`,
:func:`additive_angular_margin`, :func:`multiplied_angle`), the same loss for very many classes
(:func:`linear_am_softmax_loss`) and the share of searches that succeed (:func:`retrieval_accuracy`).

Plain torch, with ``head = CosineClassifier(128, num_classes)`` among the optimizer's parameters::

    loss = am_softmax_loss(head(encoder(x)), y)
    loss.backward()
    optimizer.step()

Lightning::

    def training_step(self, batch, batch_idx):
        x, y = batch
        return am_softmax_loss(self.head(self.encoder(x)), y)

Hugging Face ``Trainer``, for a model whose ``logits`` come from a :class:`CosineClassifier`::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return am_softmax_loss(outputs.logits, labels)
    trainer = Trainer(..., compute_loss_func=compute_loss)
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lossbook._common import (
    check_ignore_index,
    check_index_target,
    check_number,
    check_reduction,
    check_scores,
    describe,
    eager,
    reduce_loss,
    values_readable,
)

__all__ = [
    "AdditiveAngularMargin",
    "AdditiveCosineMargin",
    "AmSoftmaxLoss",
    "CosineClassifier",
    "LinearAmSoftmaxLoss",
    "MarginSoftmaxLoss",
    "MultipliedAngle",
    "RetrievalAccuracy",
    "additive_angular_margin",
    "additive_cosine_margin",
    "am_softmax_loss",
    "linear_am_softmax_loss",
    "margin_softmax_loss",
    "multiplied_angle",
    "retrieval_accuracy",
]

Psi = Callable[[Tensor], Tensor]

# A vector shorter than this has no direction: its cosine with everything is 0, and so is its gradient.
_SHORTEST = 1e-12
# Cosines that were rounded may leave [-1, 1]: two steps of bfloat16 above 1 are 1.0156.
_ROUNDING = 0.02


def _computing_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where one of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off: a bfloat16 product gives cosines of three digits, a margin needs more."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _check_real(tensor: Tensor, name: str, *, dims: int | None = None) -> None:
    """Raise unless ``tensor`` is real-valued, with at least one dimension, or exactly ``dims``; converts nothing."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(tensor)}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, one vector a row, got {describe(tensor)}")
    if tensor.dim() < 1:
        raise ValueError(f"{name} must have at least one dimension, got {describe(tensor)}")


def _inverse_norm(vectors: Tensor) -> Tensor:
    """``1 / |v|`` of each vector as a column, 0 for a vector without direction, NaN where the squares overflow."""
    square = vectors.square().sum(-1, keepdim=True)
    square = square.masked_fill(square.isinf(), math.nan)  # 1 / inf would be a silent cosine of 0
    long = ~(square < _SHORTEST**2)  # NaN stays NaN
    # the inner where keeps 1 / sqrt(0) and its derivatives out of the graph: inf * 0 would be NaN
    return torch.where(long, 1 / torch.where(long, square, 1.0).sqrt(), 0.0)


def _unit(vectors: Tensor) -> Tensor:
    """The vectors at length 1."""
    return vectors * _inverse_norm(vectors)


class CosineClassifier(nn.Module):
    r"""Cosines of embeddings with one vector per class: the last layer for a margin softmax.

    .. math:: \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    Shapes: embeddings ``(..., in_features)`` to cosines ``(..., num_classes)`` in [-1, 1].

    The class vectors stay in float32: autocast, a bfloat16 or float16 embedding, ``.half()`` and
    ``.to(torch.bfloat16)`` leave them as they are. In bfloat16, which keeps three digits, a step of a thousandth of a
    weight would be lost. ``.double()`` widens them. The cosines are float32, or float64 where the embedding or the
    class vectors are. A vector shorter than 1e-12 has cosine 0 with every other and gradient 0. A vector longer than
    1e19 (1e154 in float64), whose squares overflow, and one with NaN or infinity have cosine NaN with every other.

    An embedding with NaN spoils the gradient of all class vectors, even where the loss ignores its row: 0 times NaN is
    NaN. Put zeros in its place, or take :func:`linear_am_softmax_loss`, which does so.

    Args:
        in_features: length of an embedding.
        num_classes: number of class vectors.
        device: where the class vectors are made.

    Attributes:
        weight: the class vectors ``(num_classes, in_features)``, of length about 1 at the start.

    Raises:
        TypeError: a size that is not an integer; an embedding that is not a real-valued tensor.
        ValueError: a size below 1; an embedding of another length.

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

    def __init__(self, in_features: int, num_classes: int, *, device: torch.device | str | int | None = None) -> None:
        super().__init__()
        self.in_features = _check_count("in_features", in_features)
        self.num_classes = _check_count("num_classes", num_classes)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, dtype=torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors anew: directions uniform, lengths about 1."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CosineClassifier:
        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.is_floating_point() and torch.finfo(changed.dtype).bits < 32:
                return tensor.to(changed.device)  # moves, and skips the rounding
            return changed

        return cast(CosineClassifier, super()._apply(keep_precision, recurse))  # type: ignore[no-untyped-call]

    def forward(self, embedding: Tensor) -> Tensor:
        """Cosines ``(..., num_classes)`` of ``embedding`` ``(..., in_features)``."""
        _check_real(embedding, "embedding")
        if embedding.shape[-1] != self.in_features:
            raise ValueError(
                f"embedding must have in_features={self.in_features} as its last dimension, got {describe(embedding)}"
            )
        dtype = _computing_dtype(embedding, self.weight)
        with _full_precision(embedding.device):
            cosine = F.linear(_unit(embedding.to(dtype)), _unit(self.weight.to(dtype)))
            return cosine.clamp(-1, 1)  # rounding gives 1 + 1e-7

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"


def _check_count(name: str, value: int) -> int:
    """``value`` as an integer of at least 1, or an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {describe(value)}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


class AdditiveCosineMargin(nn.Module):
    """The module that :func:`additive_cosine_margin` returns.

    Args:
        m: the margin, a cosine.

    Example:
        >>> AdditiveCosineMargin(0.35)
        AdditiveCosineMargin(m=0.35)
    """

    def __init__(self, m: float = 0.35) -> None:
        super().__init__()
        self.m = check_number("m", m, low=0)

    def forward(self, cosine: Tensor) -> Tensor:
        """``cosine - m``, elementwise."""
        return check_scores(cosine, name="cosine", rows=False) - self.m

    def extra_repr(self) -> str:
        return f"m={self.m:g}"


class AdditiveAngularMargin(nn.Module):
    """The module that :func:`additive_angular_margin` returns.

    Args:
        m: the margin in radians.

    Example:
        >>> AdditiveAngularMargin(0.5)
        AdditiveAngularMargin(m=0.5)
    """

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

    def extra_repr(self) -> str:
        return f"m={self.m:g}"


class MultipliedAngle(nn.Module):
    """The module that :func:`multiplied_angle` returns.

    Args:
        m: the factor, 2, 3 or 4.

    Example:
        >>> MultipliedAngle(4)
        MultipliedAngle(m=4)
    """

    def __init__(self, m: int = 4) -> None:
        super().__init__()
        if isinstance(m, bool) or not isinstance(m, int):
            raise TypeError(f"m must be an integer, got {describe(m)}")
        if m not in (2, 3, 4):
            raise ValueError(f"m must be 2, 3 or 4, got {m}")
        self.m = m

    def forward(self, cosine: Tensor) -> Tensor:
        """``min(cos m theta, cos theta)``, elementwise."""
        c = check_scores(cosine, name="cosine", rows=False)
        double = 2 * c * c - 1  # Chebyshev's polynomials: cos 2 theta, cos 3 theta, cos 4 theta
        multiple = {2: double, 3: c * (2 * double - 1), 4: 2 * double * double - 1}[self.m]
        return torch.minimum(multiple, c)

    def extra_repr(self) -> str:
        return f"m={self.m}"


def additive_cosine_margin(m: float = 0.35) -> AdditiveCosineMargin:
    r"""The margin of AM-softmax and CosFace: subtract a constant from the target's cosine.

    .. math:: \psi(\theta) = \cos\theta - m

    Args:
        m: the margin, a cosine, at least 0.

    Returns:
        A function of the cosine, elementwise, for ``psi`` of :func:`margin_softmax_loss`. float16 and bfloat16 give
        float32.

    Raises:
        TypeError: ``m`` is not a number.
        ValueError: ``m`` is negative or not finite.

    Example:
        >>> import torch
        >>> additive_cosine_margin(0.35)(torch.tensor([1.0, 0.0]))
        tensor([ 0.6500, -0.3500])

    Equation :eq:`am-additive` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    return AdditiveCosineMargin(m)


def additive_angular_margin(m: float = 0.5) -> AdditiveAngularMargin:
    r"""The margin of ArcFace: add a constant to the target's angle.

    .. math::

        \psi(\theta) = \begin{cases}
            \cos(\theta + m) & \theta + m \le \pi \\
            \cos\theta - m \sin m & \theta + m > \pi
        \end{cases}

    The second case keeps :math:`\psi` decreasing in :math:`\theta`. At the border it steps down, from -1 to
    :math:`-\cos m - m \sin m`, about -1.12 for m = 0.5. Where rounding puts an angle beyond the border into the first
    case, the slope there is 0.

    The derivative by the cosine is :math:`\sin(\theta + m) / \sin\theta`, infinite at cosine 1. There the function
    returns the slope of the chord from 1 to the next smaller number of the cosine's dtype,
    :math:`\cos m + 2 \sin m / \sqrt{\epsilon}` to rounding: about 2800 in float32, 32 in float16, for m = 0.5. The
    values are those of the formula at every number the dtype holds. To an embedding the choice makes no difference
    beyond rounding: the cosine's own derivative, of length :math:`\sin\theta / \lVert z\rVert`, vanishes there. A
    cosine that rounding left outside [-1, 1] counts as the nearer end.

    Args:
        m: the margin in radians, from 0 to :math:`\pi / 2`.

    Returns:
        A function of the cosine, elementwise, for ``psi`` of :func:`margin_softmax_loss`. float16 and bfloat16 give
        float32.

    Raises:
        TypeError: ``m`` is not a number.
        ValueError: ``m`` is not from 0 to :math:`\pi / 2`.

    Example:
        >>> import torch
        >>> additive_angular_margin(0.5)(torch.tensor([1.0, 0.0, -1.0]))
        tensor([ 0.8776, -0.4794, -1.2397])

    Equation :eq:`am-arc` of the chapter. Source: ArcFace, arXiv 1801.07698; Su Jianlin, scientific spaces 5743 (2018).
    """
    return AdditiveAngularMargin(m)


def multiplied_angle(m: int = 4) -> MultipliedAngle:
    r"""Multiply the target's angle, and never exceed the target's cosine: the post's short form.

    .. math:: \psi(\theta) = \min(\cos m\theta,\, \cos\theta)

    :math:`\cos m\theta` is a polynomial of the cosine (Chebyshev's), so no angle is computed. Where it is the smaller
    of the two and falls with growing cosine, the gradient pulls the embedding away from its class: for m = 4 between
    45 and 72 degrees, and again between 135 and 144. Where the two are equal, the gradient is the mean of theirs. The
    paper that multiplied the angle first (SphereFace, arXiv 1704.08063) has another form, which falls with the angle
    everywhere: :math:`(-1)^r \cos m\theta - 2r`, r the integer part of :math:`m\theta / \pi`.

    Args:
        m: the factor, 2, 3 or 4.

    Returns:
        A function of the cosine, elementwise, for ``psi`` of :func:`margin_softmax_loss`. float16 and bfloat16 give
        float32.

    Raises:
        TypeError: ``m`` is not an integer.
        ValueError: ``m`` is not 2, 3 or 4.

    Example:
        >>> import torch
        >>> multiplied_angle(4)(torch.tensor([1.0, 0.5, 0.0]))
        tensor([ 1.0000, -0.5000,  0.0000])

    Equation :eq:`am-multiplied` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018).
    """
    return MultipliedAngle(m)


# --- The loss from cosines ---
#
# With s the scale, the loss of a row is log(1 + e^(lse - s psi(c_t))), where c_t is the target's cosine and
# lse = log sum_(i != t) e^(s c_i). Written so it is never negative, also at scale 64 with c_t = 1: the published short
# cut, the log-sum-exp of all scores corrected for the target, cancels there. A row's work is therefore (c_t, lse), here
# from the cosines, further down from embeddings and class vectors.


def _split_formula(cosine: Tensor, index: Tensor, counted: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The target's cosine, and the log-sum-exp of the other classes' scores; rows not counted have no gradient."""
    cosine = torch.where(counted.unsqueeze(-1), cosine, 0.0)
    at = index.unsqueeze(-1)
    s = cosine.to(_computing_dtype(cosine)) * scale
    # the lowest number, not -inf: with a single class the log-sum-exp of nothing must stay finite
    return cosine.gather(-1, at).squeeze(-1), s.scatter(-1, at, torch.finfo(s.dtype).min).logsumexp(-1)


class _Split(Function):
    """:func:`_split_formula` with one array of the size of the cosines at a time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, cosine: Tensor, index: Tensor, counted: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        at = index.unsqueeze(-1)
        s = cosine.to(_computing_dtype(cosine), copy=True).mul_(scale)
        s.scatter_(-1, at, torch.finfo(s.dtype).min)
        top = s.amax(-1, keepdim=True)
        lse = s.sub_(top).exp_().sum(-1).log_().add_(top.squeeze(-1))
        ctx.scale = scale
        ctx.save_for_backward(cosine, index, counted, lse)
        return cosine.gather(-1, at).squeeze(-1), lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cosine, index, counted, lse = ctx.saved_tensors
        again = torch.is_grad_enabled()  # a derivative of this derivative was asked for
        if again or not eager(*grads):
            with torch.enable_grad():
                outputs = _split_formula(cosine, index, counted, ctx.scale)
            return *torch.autograd.grad(outputs, cosine, grads, create_graph=again), None, None, None
        grad_t, grad_lse = grads
        s = cosine.to(lse.dtype, copy=True).mul_(ctx.scale)
        grad = s.sub_(lse.unsqueeze(-1)).exp_().mul_((grad_lse * ctx.scale).unsqueeze(-1))
        grad.scatter_(-1, index.unsqueeze(-1), grad_t.to(grad.dtype).unsqueeze(-1))
        return grad.masked_fill_(~counted.unsqueeze(-1), 0.0).to(cosine.dtype), None, None, None


def _check_cosines(cosine: Tensor, index: Tensor, counted: Tensor) -> None:
    """Raise if values far outside [-1, 1] show that these are no cosines; -inf is a class left out."""
    least, most = (float(x) for x in torch.aminmax(cosine.detach()))
    if least >= -1 - _ROUNDING and most <= 1 + _ROUNDING:
        return
    rows = cosine.detach()[counted]
    rows = rows.to(_computing_dtype(rows))  # compared in bfloat16, the limit itself would be rounded
    wrong = (rows.abs() > 1 + _ROUNDING) & (rows != -math.inf)
    if bool(wrong.any()):
        first = float(rows[wrong][0])
        raise ValueError(f"cosine must hold cosines, in [-1, 1] up to rounding (CosineClassifier), got {first:g}")
    if bool((rows.gather(-1, index[counted].unsqueeze(-1)) == -math.inf).any()):
        raise ValueError("cosine must be finite at the target, got -inf")


def _margin_loss(cosine_t: Tensor, lse: Tensor, counted: Tensor, *, psi: Psi, scale: float, reduction: str) -> Tensor:
    """``log(1 + e^(lse - s psi(c_t)))`` of each row, reduced."""
    # the angular margin's slope at cosine 1 depends on the dtype: a float32's is too steep for a float16 gradient
    psi_t = psi(cosine_t if isinstance(psi, AdditiveAngularMargin) else cosine_t.to(lse.dtype))
    if not isinstance(psi_t, Tensor) or psi_t.shape != cosine_t.shape:
        raise ValueError(
            f"psi must return a tensor of the shape it is given, {tuple(cosine_t.shape)}, got {describe(psi_t)}"
        )
    # torch's threshold of 20 would be wrong in the tenth digit of a float64
    loss = F.softplus(torch.where(counted, lse - scale * psi_t, 0.0), threshold=40)
    return reduce_loss(torch.where(counted, loss, 0.0), reduction, counted)


def margin_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    psi: Psi,
    scale: float = 30.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of scaled cosines, the target's cosine made smaller by a margin.

    .. math::

        -\log \frac{e^{\gamma\,\psi(\theta_t)}}{e^{\gamma\,\psi(\theta_t)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}}

    with :math:`\gamma` = ``scale``. The loss is never negative, and small losses keep their digits.

    Shapes: cosines ``(..., C)``, targets ``(...)``; the loss is a scalar, or ``(...)`` with ``reduction="none"``.

    Args:
        cosine: cosines ``(..., C)``, as :class:`CosineClassifier` gives them. A class with cosine ``-inf`` is left out.
        target: class indices ``(...)``.
        psi: the margin, a function of the target's cosines ``(...)``, elementwise: :func:`additive_cosine_margin`,
            :func:`additive_angular_margin`, :func:`multiplied_angle` or any other with
            :math:`\psi(\theta) \le \cos\theta`.
        scale: factor of the cosines. Cosines alone span too little: without it the loss stays far from 0.
        ignore_index: rows with this target do not count, and their gradient is 0.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

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
    scale = check_number("scale", scale, low=0, open_low=True)
    if not callable(psi):
        raise TypeError(f"psi must be a function of the cosine, got {describe(psi)}")
    _check_real(cosine, "cosine")
    if cosine.shape[-1] == 0:
        raise ValueError(f"cosine must have at least one class, got {describe(cosine)}")
    counted = check_index_target(target, tuple(cosine.shape[:-1]), cosine.shape[-1], check_ignore_index(ignore_index))
    index = torch.where(counted, target, 0).long()
    if values_readable(cosine, target) and cosine.numel() > 0:
        _check_cosines(cosine, index, counted)
    if eager(cosine, target):
        cosine_t, lse = cast(tuple[Tensor, Tensor], _Split.apply(cosine, index, counted, scale))  # type: ignore[no-untyped-call]
    else:
        cosine_t, lse = _split_formula(cosine, index, counted, scale)
    return _margin_loss(cosine_t, lse, counted, psi=psi, scale=scale, reduction=reduction)


def am_softmax_loss(
    cosine: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 30.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""AM-softmax: :func:`margin_softmax_loss` with :func:`additive_cosine_margin`, the usual choice.

    .. math::

        -\log \frac{e^{\gamma(\cos\theta_t - m)}}{e^{\gamma(\cos\theta_t - m)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}}

    with m = ``margin`` and :math:`\gamma` = ``scale``.

    Shapes: cosines ``(..., C)``, targets ``(...)``; the loss is a scalar, or ``(...)`` with ``reduction="none"``.

    Args:
        cosine: cosines ``(..., C)``, as :class:`CosineClassifier` gives them. A class with cosine ``-inf`` is left out.
        target: class indices ``(...)``.
        margin: what the target's cosine must lead by, at least 0.
        scale: factor of the cosines.
        ignore_index: rows with this target do not count, and their gradient is 0.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        The loss, in float32 for float16 and bfloat16 cosines.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: as :func:`margin_softmax_loss`, and a negative ``margin``.

    Example:
        >>> import torch
        >>> cosine = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.5, 0.1]])
        >>> am_softmax_loss(cosine, torch.tensor([0, 1]), scale=10)
        tensor(0.9090)

    Equation :eq:`am-loss` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    margin = check_number("margin", margin, low=0)
    return margin_softmax_loss(
        cosine,
        target,
        psi=lambda cosine_t: cosine_t - margin,
        scale=scale,
        ignore_index=ignore_index,
        reduction=reduction,
    )


# --- The loss from embeddings and class vectors, some classes at a time ---


def _chunk_of(rows: int, size: int, chunk_size: int | None, device: torch.device) -> int:
    """How many classes at a time: given, or so many that a chunk's scores and vectors have a fixed size together."""
    if chunk_size is not None:
        return chunk_size
    # 16 MB lie in a CPU's last cache, 64 MB keep an accelerator busy; less, and the threads wait for each other
    numbers = 2**22 if device.type == "cpu" else 2**24
    return max(numbers // (rows + size), 128)


def _chunk_formula(z: Tensor, weight: Tensor, index: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(c_t, lse) of one chunk of classes; ``index`` counts from the chunk's first, and c_t is 0 outside the chunk."""
    with _full_precision(z.device):
        cosine = z @ _unit(weight.to(z.dtype)).t()
    inside = (index >= 0) & (index < weight.shape[0])
    at = torch.where(inside, index, 0).unsqueeze(-1)
    cosine_t = cosine.gather(-1, at).squeeze(-1)
    s = cosine * scale
    there = torch.where(inside, torch.finfo(s.dtype).min, cosine_t * scale)
    return torch.where(inside, cosine_t, 0.0), s.scatter(-1, at, there.unsqueeze(-1)).logsumexp(-1)


def _linear_split_formula(
    embedding: Tensor, weight: Tensor, index: Tensor, scale: float, chunk: int
) -> tuple[Tensor, Tensor]:
    """(c_t, lse) of embeddings ``(R, D)`` by differentiable operations.

    With more than one chunk, the backward pass computes each chunk anew.
    """
    z = _unit(embedding.to(_computing_dtype(embedding, weight)))
    if chunk >= weight.shape[0]:
        return _chunk_formula(z, weight, index, scale)
    cosines, parts = [], []
    for k, w in enumerate(torch.split(weight, chunk)):
        cosine_t, part = checkpoint(_chunk_formula, z, w, index - k * chunk, scale, use_reentrant=False)
        cosines.append(cosine_t)
        parts.append(part)
    return torch.stack(cosines).sum(0), torch.stack(parts).logsumexp(0)


class _Chunk:
    """One chunk of classes: vectors, inverse norms, scores, and where each row's target is (and whether)."""

    def __init__(self, sz: Tensor, weight: Tensor, index: Tensor, first: int, size: int) -> None:
        self.w = weight[first : first + size].to(sz.dtype)
        norm = torch.linalg.vector_norm(self.w, dim=1, keepdim=True)
        self.inverse = torch.where(norm < _SHORTEST, 0.0, 1 / norm.masked_fill(norm.isinf(), math.nan))
        self.product = sz @ self.w.t()  # the scores, but for the norm of w
        inside = (index >= first) & (index < first + self.w.shape[0])
        self.inside = inside.unsqueeze(1)
        self.at = torch.where(inside, index - first, 0).unsqueeze(1)


class _LinearSplit(Function):
    """:func:`_linear_split_formula` by hand: one chunk of scores at a time, and the gradients in place."""

    @staticmethod
    def forward(
        ctx: Any, embedding: Tensor, weight: Tensor, index: Tensor, scale: float, size: int
    ) -> tuple[Tensor, Tensor]:
        with _full_precision(embedding.device):
            sz = _unit(embedding.to(_computing_dtype(embedding, weight))) * scale
            lowest = torch.finfo(sz.dtype).min
            s_t = sz.new_zeros(len(sz), 1)
            total = sz.new_zeros(len(sz), 1)  # sum of e^(s - top) over the chunks so far
            # scores are at most scale, and 1e9 classes of e^64 are 6e36, within float32: no need to look for the top
            top = sz.new_full((len(sz), 1), 0.0 if scale <= 64 else lowest)
            for first in range(0, len(weight), size):
                chunk = _Chunk(sz, weight, index, first, size)
                s = chunk.product.mul_(chunk.inverse.t())
                there = s.gather(1, chunk.at)
                s_t = torch.where(chunk.inside, there, s_t)
                s.scatter_(1, chunk.at, torch.where(chunk.inside, lowest, there))
                if scale > 64:
                    higher = torch.maximum(top, s.amax(1, keepdim=True))
                    total *= (top - higher).exp()
                    top = higher
                    s.sub_(top)
                total += s.exp_().sum(1, keepdim=True)
            lse = total.log_().add_(top).clamp_(min=lowest).squeeze(1)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(embedding, weight, index, lse)
        return s_t.squeeze(1) / scale, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        embedding, weight, index, lse = ctx.saved_tensors
        scale, size = ctx.scale, ctx.size
        wanted = ctx.needs_input_grad[:2]
        again = torch.is_grad_enabled()  # a derivative of this derivative was asked for
        if again or not eager(*grads):
            with torch.enable_grad():
                outputs = _linear_split_formula(embedding, weight, index, scale, len(weight))
            inputs = [x for x, needed in zip((embedding, weight), wanted, strict=True) if needed]
            found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=again))
            return *(next(found) if needed else None for needed in wanted), None, None, None
        grad_t, grad_lse = (g.unsqueeze(1) for g in grads)
        with _full_precision(embedding.device):
            inverse_z = _inverse_norm(embedding.to(lse.dtype))
            z = embedding.to(lse.dtype) * inverse_z
            sz = z * scale
            grad_z = torch.zeros_like(z)
            grad_weight = torch.empty_like(weight) if wanted[1] else None
            for first in range(0, len(weight), size):
                chunk = _Chunk(sz, weight, index, first, size)
                s = chunk.product
                torch.addcmul(-lse.unsqueeze(1), s, chunk.inverse.t(), out=s)
                grad_s = s.exp_().mul_(grad_lse)
                grad_s.scatter_(1, chunk.at, torch.where(chunk.inside, grad_t / scale, grad_s.gather(1, chunk.at)))
                grad_s.mul_(chunk.inverse.t())
                if wanted[0]:
                    grad_z.addmm_(grad_s, chunk.w)
                if grad_weight is not None:
                    place = grad_weight[first : first + size]
                    part = torch.mm(grad_s.t(), sz, out=place if place.dtype == sz.dtype else None)
                    # so far the gradient by w / |w|, divided by |w|; less its share along w
                    part.addcmul_(chunk.w, (part * chunk.w).sum(1, keepdim=True) * chunk.inverse.square(), value=-1)
                    if part is not place:
                        place.copy_(part)
            grad_z = (grad_z - (grad_z * z).sum(1, keepdim=True) * z) * (inverse_z * scale)
        return grad_z.to(embedding.dtype) if wanted[0] else None, grad_weight, None, None, None


def linear_am_softmax_loss(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    margin: float = 0.35,
    scale: float = 30.0,
    chunk_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""AM-softmax from embeddings and class vectors, without the matrix of all cosines.

    .. math::

        -\log \frac{e^{\gamma(\cos\theta_t - m)}}
        {e^{\gamma(\cos\theta_t - m)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}},
        \qquad \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    with m = ``margin`` and :math:`\gamma` = ``scale``. Value and gradients are those of :func:`am_softmax_loss` on the
    cosines of a :class:`CosineClassifier`. One chunk of classes at a time is held; the backward pass computes it
    again. So beside inputs and gradients, the memory does not grow with the number of classes. Exceptions:
    derivatives of second order (``create_graph=True``), batched gradients, forward mode and the transforms of
    ``torch.func`` hold the whole ``(..., C)`` matrix. ``torch.compile`` keeps to the chunks and unrolls them.

    Shapes: embeddings ``(..., D)``, class vectors ``(C, D)``, targets ``(...)``; the loss is a scalar, or ``(...)``
    with ``reduction="none"``.

    Args:
        embedding: embeddings ``(..., D)`` of any length up to 1e19, 1e154 in float64. One shorter than 1e-12 has
            cosine 0 with every class, and gradient 0; so has a class vector. NaN, infinity and longer ones give NaN.
        weight: class vectors ``(C, D)``, of length as embeddings, best in float32.
        target: class indices ``(...)``.
        margin: what the target's cosine must lead by, at least 0.
        scale: factor of the cosines.
        chunk_size: how many classes at a time. Without it a chunk's scores and vectors have four million numbers
            together (16 million on an accelerator), and the chunk at least 128 classes.
        ignore_index: rows with this target do not count, and their gradient is 0.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        The loss, computed in float32, in float64 where one of the inputs is. Each gradient has its input's dtype.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a wrong shape or option. On the CPU also a class index outside [0, C); on an accelerator this check
            would wait for the device and is skipped.

    Example:
        >>> import torch
        >>> embedding, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        >>> linear_am_softmax_loss(embedding, weight, torch.tensor([1]), scale=10, chunk_size=2)
        tensor(1.7014)

    Equation :eq:`am-linear` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    check_reduction(reduction)
    margin = check_number("margin", margin, low=0)
    scale = check_number("scale", scale, low=0, open_low=True)
    if chunk_size is not None:
        chunk_size = _check_count("chunk_size", chunk_size)
    _check_real(embedding, "embedding")
    _check_real(weight, "weight", dims=2)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one class vector, got {describe(weight)}")
    if embedding.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"embedding must have the length of a class vector, {weight.shape[1]}, as its last dimension, "
            f"got {describe(embedding)}"
        )
    rows = embedding.shape[:-1]
    counted = check_index_target(target, tuple(rows), weight.shape[0], check_ignore_index(ignore_index))
    index = torch.where(counted, target, 0).long().reshape(-1)
    # a row that does not count is a zero vector: whatever it holds reaches no gradient
    vectors = torch.where(counted.unsqueeze(-1), embedding, 0.0).reshape(target.numel(), weight.shape[1])
    chunk = _chunk_of(target.numel(), weight.shape[1], chunk_size, vectors.device)
    if eager(embedding, weight, target):
        cosine_t, lse = cast(tuple[Tensor, Tensor], _LinearSplit.apply(vectors, weight, index, scale, chunk))  # type: ignore[no-untyped-call]
    else:
        chunk = chunk if torch.compiler.is_compiling() else weight.shape[0]
        cosine_t, lse = _linear_split_formula(vectors, weight, index, scale, chunk)
    return _margin_loss(
        cosine_t.reshape(rows),
        lse.reshape(rows),
        counted,
        psi=lambda cosine_t: cosine_t - margin,
        scale=scale,
        reduction=reduction,
    )


def _check_ks(k: int | Iterable[int]) -> tuple[int, ...]:
    """``k`` as a tuple of integers of at least 1, or an error."""
    if not isinstance(k, (int, Iterable)):
        raise TypeError(f"k must be an integer or several, got {describe(k)}")
    ks = tuple(_check_count("k", number) for number in (k if isinstance(k, Iterable) else [k]))
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
    other tie. With k beyond N - 1 all the others are the first k.

    Shapes: embeddings ``(N, D)``, labels ``(N,)``. Some rows at a time are compared with all, never N x N at once.

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
    _check_real(embedding, "embedding", dims=2)
    if not isinstance(label, Tensor) or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        raise TypeError(f"label must be a tensor of an integer dtype, got {describe(label)}")
    n = embedding.shape[0]
    if tuple(label.shape) != (n,):
        raise ValueError(f"label must have one number per embedding, shape {(n,)}, got {describe(label)}")
    z = _unit(embedding.to(_computing_dtype(embedding)))
    tie = 8 * torch.finfo(z.dtype).eps
    queries = torch.zeros((), dtype=torch.long, device=z.device)
    hits = [queries for _ in ks]
    places = torch.arange(n, device=z.device)
    step = max(2**22 // max(n, 1), 1)  # 16 MB of cosines
    for first in range(0, n, step):
        rows = slice(first, first + step)
        with _full_precision(z.device):
            cosine = z[rows] @ z.t()
        group = label[rows].unsqueeze(1) == label
        own = group & (places[rows].unsqueeze(1) != places)
        best = cosine.masked_fill(~own, -math.inf).amax(1, keepdim=True)
        nearer = ((cosine >= best - tie) & ~group).sum(1)
        found = own.any(1)
        queries = queries + found.sum()
        hits = [hit + (found & (nearer < number)).sum() for hit, number in zip(hits, ks, strict=True)]
    if values_readable(embedding, label) and not bool(queries):
        raise ValueError("label must hold a group of at least two: no query has another member to find")
    # NaN compares with nothing, so no stranger would be nearer and a diverged encoder would look perfect
    whole = z.isfinite().all()
    return {number: torch.where(whole, hit / queries, math.nan) for number, hit in zip(ks, hits, strict=True)}


# --- Modules ---


class MarginSoftmaxLoss(nn.Module):
    """Module of :func:`margin_softmax_loss`, with the same options.

    Example:
        >>> MarginSoftmaxLoss(psi=additive_angular_margin(0.5), scale=64)
        MarginSoftmaxLoss(
          scale=64, ignore_index=-100, reduction='mean'
          (psi): AdditiveAngularMargin(m=0.5)
        )
    """

    def __init__(self, *, psi: Psi, scale: float = 30.0, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        if not callable(psi):
            raise TypeError(f"psi must be a function of the cosine, got {describe(psi)}")
        self.psi = psi
        self.scale = check_number("scale", scale, low=0, open_low=True)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of ``cosine`` ``(..., C)`` and ``target`` ``(...)``."""
        return margin_softmax_loss(
            cosine,
            target,
            psi=self.psi,
            scale=self.scale,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        psi = "" if isinstance(self.psi, nn.Module) else f"psi={self.psi!r}, "
        return f"{psi}scale={self.scale:g}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class AmSoftmaxLoss(nn.Module):
    """Module of :func:`am_softmax_loss`, with the same options.

    Example:
        >>> AmSoftmaxLoss(margin=0.2)
        AmSoftmaxLoss(margin=0.2, scale=30, ignore_index=-100, reduction='mean')
    """

    def __init__(
        self,
        *,
        margin: float = 0.35,
        scale: float = 30.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.margin = check_number("margin", margin, low=0)
        self.scale = check_number("scale", scale, low=0, open_low=True)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def forward(self, cosine: Tensor, target: Tensor) -> Tensor:
        """The loss of ``cosine`` ``(..., C)`` and ``target`` ``(...)``."""
        return am_softmax_loss(
            cosine,
            target,
            margin=self.margin,
            scale=self.scale,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin:g}, scale={self.scale:g}, ignore_index={self.ignore_index}, "
            f"reduction={self.reduction!r}"
        )


class LinearAmSoftmaxLoss(nn.Module):
    """Module of :func:`linear_am_softmax_loss`, with the same options. It holds no class vectors of its own.

    Example:
        >>> LinearAmSoftmaxLoss(chunk_size=4096)
        LinearAmSoftmaxLoss(margin=0.35, scale=30, chunk_size=4096, ignore_index=-100, reduction='mean')
    """

    def __init__(
        self,
        *,
        margin: float = 0.35,
        scale: float = 30.0,
        chunk_size: int | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.margin = check_number("margin", margin, low=0)
        self.scale = check_number("scale", scale, low=0, open_low=True)
        self.chunk_size = None if chunk_size is None else _check_count("chunk_size", chunk_size)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def forward(self, embedding: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of ``embedding`` ``(..., D)``, class vectors ``weight`` ``(C, D)`` and ``target`` ``(...)``."""
        return linear_am_softmax_loss(
            embedding,
            weight,
            target,
            margin=self.margin,
            scale=self.scale,
            chunk_size=self.chunk_size,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return (
            f"margin={self.margin:g}, scale={self.scale:g}, chunk_size={self.chunk_size}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


class RetrievalAccuracy(nn.Module):
    """Module of :func:`retrieval_accuracy`, with the same option.

    Example:
        >>> RetrievalAccuracy(k=(1, 5))
        RetrievalAccuracy(k=(1, 5))
    """

    def __init__(self, *, k: int | Iterable[int] = (1, 5, 10)) -> None:
        super().__init__()
        self.k = _check_ks(k)

    def forward(self, embedding: Tensor, label: Tensor) -> dict[int, Tensor]:
        """The share for each k, of ``embedding`` ``(N, D)`` and ``label`` ``(N,)``."""
        return retrieval_accuracy(embedding, label, k=self.k)

    def extra_repr(self) -> str:
        return f"k={self.k}"
