"""The margins of the margin softmax: functions of the target's cosine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lossbook._checks import check_integer, check_number, check_scores, describe

Psi: TypeAlias = Callable[[Tensor], Tensor]


def check_psi(psi: Any) -> Psi:
    """``psi``, a function."""
    if not callable(psi):
        raise TypeError(f"psi must be a function of the cosine, got {describe(psi)}")
    return psi  # type: ignore[no-any-return]


def shaped(psi: Psi, dtype: torch.dtype | None = None) -> Psi:
    """``psi``, checked to return the shape it is given.

    The angular margin, whose slope at 1 depends on the dtype, is called in this one: a float32's slope is too steep for
    a float16 gradient.
    """

    def call(cosine_t: Tensor) -> Tensor:
        shape = tuple(cosine_t.shape)
        psi_t = psi(cosine_t.to(dtype) if dtype and isinstance(psi, AdditiveAngularMargin) else cosine_t)
        if not isinstance(psi_t, Tensor) or psi_t.shape != shape:
            raise ValueError(f"psi must return a tensor of the shape it is given, {shape}, got {describe(psi_t)}")
        return psi_t

    return call


class Less:
    """The additive margin of a loss with the option ``margin``, without a module around it."""

    def __init__(self, margin: float) -> None:
        self.m = check_number("margin", margin, low=0)

    def __call__(self, cosine_t: Tensor) -> Tensor:
        return cosine_t - self.m


class Margin(nn.Module):
    """A function of the target's cosine with one number."""

    def __init__(self, m: float) -> None:
        super().__init__()
        self.m = m

    def extra_repr(self) -> str:
        return f"m={self.m:g}"


class AdditiveCosineMargin(Margin):
    """The module that :func:`additive_cosine_margin` returns."""

    def __init__(self, m: float = 0.35) -> None:
        super().__init__(check_number("m", m, low=0))

    def forward(self, cosine: Tensor) -> Tensor:
        """``cosine - m``, elementwise."""
        return check_scores(cosine, name="cosine", rows=False) - self.m


class AdditiveAngularMargin(Margin):
    """The module that :func:`additive_angular_margin` returns."""

    def __init__(self, m: float = 0.5) -> None:
        super().__init__(check_number("m", m, low=0, high=math.pi / 2))

    def forward(self, cosine: Tensor) -> Tensor:
        """``cos(theta + m)``, elementwise, with its continuation."""
        c = check_scores(cosine, name="cosine", rows=False)
        c = c + (c.clamp(-1, 1) - c).detach()  # 1 + 1e-7 counts as 1, with the slope at 1
        square = (1 - c) * (1 + c)  # sin^2, without the cancellation of 1 - c^2
        # From the largest cosine below 1 that the dtype holds, the chord replaces the root:
        # no value changes, and the slope 1 / 0 at 1 becomes the one between these two.
        step = torch.finfo(cosine.dtype).eps / 2
        least = step * (2 - step)
        near = square < least
        root = torch.where(near, least, square).sqrt()
        sine = torch.where(near, square / math.sqrt(least), root)
        shifted = c * math.cos(self.m) - sine * math.sin(self.m)
        # a cosine beyond a rounded border may be in the first case: no slope the wrong way
        beyond = sine * math.cos(self.m) + c * math.sin(self.m) < 0
        shifted = torch.where(beyond, shifted.detach(), shifted)
        return torch.where(c < -math.cos(self.m), c - self.m * math.sin(self.m), shifted)


class MultipliedAngle(Margin):
    """The module that :func:`multiplied_angle` returns."""

    def __init__(self, m: int = 4) -> None:
        super().__init__(check_integer("m", m))
        if self.m not in (2, 3, 4):
            raise ValueError(f"m must be 2, 3 or 4, got {m}")

    def forward(self, cosine: Tensor) -> Tensor:
        """``min(cos m theta, cos theta)``, elementwise."""
        c = check_scores(cosine, name="cosine", rows=False)
        double = 2 * c * c - 1  # Chebyshev's polynomials: cos 2 theta, cos 3 theta, cos 4 theta
        multiple = {2: double, 3: c * (2 * double - 1), 4: 2 * double * double - 1}
        return torch.minimum(multiple[int(self.m)], c)


def additive_cosine_margin(m: float = 0.35) -> AdditiveCosineMargin:
    r"""The margin of AM-softmax and CosFace: :math:`\psi(\theta) = \cos\theta - m` with ``m`` >= 0.

    Example:
        >>> additive_cosine_margin(0.35)(torch.tensor([1.0, 0.0]))
        tensor([ 0.6500, -0.3500])

    Equation :eq:`am-additive` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); AM-softmax, arXiv
    1801.05599; CosFace, arXiv 1801.09414.
    """
    return AdditiveCosineMargin(m)


def additive_angular_margin(m: float = 0.5) -> AdditiveAngularMargin:
    r"""The margin of ArcFace: add ``m`` in :math:`[0, \pi / 2]` radians to the target's angle.

    .. math::

        \psi(\theta) = \begin{cases}
            \cos(\theta + m) & \theta + m \le \pi \\
            \cos\theta - m \sin m & \theta + m > \pi
        \end{cases}

    At the border :math:`\psi` steps down, from -1 to about -1.12 for m = 0.5; in the second case it goes on to fall.
    The derivative by the cosine is infinite at cosine 1. There it is the slope of the chord to the next smaller number
    of the cosine's dtype, :math:`\cos m + 2 \sin m / \sqrt{\epsilon}`: about 2800 in float32, 32 in float16, for
    m = 0.5. To an embedding the choice makes no difference beyond rounding: the cosine's own derivative vanishes there.
    A cosine outside [-1, 1] counts as the nearer end. The first case holds down to cosine -cos m, rounded to the dtype;
    where that leaves an angle beyond the border in it, the slope is 0, so that no gradient pulls the wrong way.

    Example:
        >>> additive_angular_margin(0.5)(torch.tensor([1.0, 0.0, -1.0]))
        tensor([ 0.8776, -0.4794, -1.2397])

    Equation :eq:`am-arc` of the chapter. Source: ArcFace, arXiv 1801.07698; Su Jianlin, scientific spaces 5743 (2018).
    """
    return AdditiveAngularMargin(m)


def multiplied_angle(m: int = 4) -> MultipliedAngle:
    r"""The target's angle times ``m`` (2, 3 or 4): :math:`\psi(\theta) = \min(\cos m\theta,\, \cos\theta)`.

    Where :math:`\cos m\theta` is the smaller of the two and falls with growing cosine, the gradient pulls the embedding
    away from its class: for m = 4 between 45 and 72 degrees, and again between 135 and 144. SphereFace (arXiv
    1704.08063) has another form, which falls with the angle everywhere. Where both are equal the slope is the mean of
    the two, (m^2 + 1) / 2 at cosine 1. A cosine outside [-1, 1] is taken as it is: both are polynomials of it.

    Example:
        >>> multiplied_angle(4)(torch.tensor([1.0, 0.5, 0.0]))
        tensor([ 1.0000, -0.5000,  0.0000])

    Equation :eq:`am-multiplied` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018).
    """
    return MultipliedAngle(m)
