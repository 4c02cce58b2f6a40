r"""Losses that let the easy samples go: truncated, softly truncated, focal and asymmetric cross-entropy.

Each multiplies cross-entropy by a weight that falls as the sample is got right: to zero past a margin, along a sigmoid,
or as a power of the error. Four take a label for each score, the two softmax forms one class out of many. A module of
the same name wraps each. The page Recipes shows them in training loops.

What holds for all: float16 and bfloat16 scores are computed in float32, and the loss is float32. ``reduction`` is
``"mean"`` over what counts (0 if nothing does), ``"sum"`` or ``"none"``; the losses of ``"none"`` may be edited in
place. ``mask`` is boolean and broadcastable to ``input``, which the target is not: False leaves an element out,
whatever stands there, with loss and gradient 0. Labels that rounding left outside [0, 1] by at most 1e-4 are clamped.
Values of targets and weights are checked on the CPU only, since elsewhere the check would wait for the device. A
target carries no gradient.

A score beyond 1e30, infinite or not, counts as 1e30: on the right side loss and gradient are 0, on the wrong side the
loss is huge but finite and the gradient is its limit. NaN in what counts gives NaN. Second derivatives, ``torch.func``
and mostly ``torch.compile`` run the function called ``formula`` in each loss; plain training runs the same in fewer
passes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lossbook import _checks as checks
from lossbook._checks import check_number, check_per_class, check_reduction, check_scores
from lossbook._common import FAR, LossModule, finite, sigmoid, softplus
from lossbook._fast import focal as fast
from lossbook._softmax_focal import (
    SoftmaxFocalLoss,
    SoftTruncatedCrossEntropy,
    soft_truncated_cross_entropy,
    softmax_focal_loss,
)

__all__ = [
    "AsymmetricLoss",
    "HardTruncatedBce",
    "SigmoidFocalLoss",
    "SoftTruncatedBce",
    "SoftTruncatedCrossEntropy",
    "SoftmaxFocalLoss",
    "asymmetric_loss",
    "hard_truncated_bce",
    "sigmoid_focal_loss",
    "soft_truncated_bce",
    "soft_truncated_cross_entropy",
    "softmax_focal_loss",
]


def hard_truncated_bce(
    input: Tensor, target: Tensor, *, margin: float = 0.5, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Binary cross-entropy that stops once the label's probability passes a margin.

    .. math::

        L = \begin{cases}
            -\bigl(1 - \theta(p - m)\bigr) \log p & y = 1 \\
            -\bigl(1 - \theta(1 - m - p)\bigr) \log (1 - p) & y = 0
        \end{cases}
        \qquad p = \sigma(s), \quad
        \theta(x) = \begin{cases} 1 & x > 0 \\ \tfrac12 & x = 0 \\ 0 & x < 0 \end{cases}

    The weight carries no gradient. With a margin above 1/2 an untrained model starts inside the region that counts.
    The comparison is made in scores, in their dtype, so a sample exactly at the border is met reliably at a margin of
    1/2 only. At a margin of 0 nothing counts, at 1 everything.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`y`, 0 or 1 in any dtype, the shape of ``input``.
        margin: the probability :math:`m` in [0, 1] from which a sample no longer counts.
        mask: the elements that count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Example:
        >>> s, y = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1, 1, 1])
        >>> hard_truncated_bce(s, y, reduction="none").round(decimals=4)
        tensor([0.0000, 0.3466, 1.3133])

    Equation :eq:`focal-hard` of the chapter. Source: Su Jianlin, scientific spaces 4293 (2017).
    """
    m = check_number("margin", margin, low=0.0, high=1.0)
    # p_t < m in scores: a probability may round to 0 or 1, and so meet such a margin
    z_m = math.log((1 - m) / m) if 0 < m < 1 else math.copysign(math.inf, 0.5 - m)

    def formula(s: Tensor, y: Tensor) -> Tensor:
        z = (1 - 2 * y) * finite(s)  # how far the score lies on the wrong side
        weight = (z > z_m).to(z.dtype) + 0.5 * (z == z_m).to(z.dtype)
        return weight * softplus(z)

    steps = fast.hard_truncated_steps(z_m)
    read = _read(input, target, mask, reduction, hard=True)
    return fast.elementwise(formula, steps, *read)


def soft_truncated_bce(
    input: Tensor, target: Tensor, *, sharpness: float = 1.0, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Binary cross-entropy under a sigmoid weight, the softened truncation.

    .. math::

        L = -\sigma(-K s) \log \sigma(s) \text{ for } y = 1, \qquad -\sigma(K s) \log \sigma(-s) \text{ for } y = 0

    For :math:`K \to \infty` it becomes :func:`hard_truncated_bce` at a margin of 1/2. At :math:`K = 1` it is
    :func:`sigmoid_focal_loss` with :math:`\gamma = 1`. The weight carries gradient.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`y`, 0 or 1 in any dtype, the shape of ``input``.
        sharpness: :math:`K \ge 0`; 0 gives half the cross-entropy, above 1e30 counts as 1e30.
        mask: the elements that count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Example:
        >>> s, y = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1, 1, 1])
        >>> soft_truncated_bce(s, y, reduction="none").round(decimals=4)
        tensor([0.0151, 0.3466, 0.9601])

    Equation :eq:`focal-soft` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017).
    """
    k = checks.check_sharpness(sharpness)

    def formula(s: Tensor, y: Tensor) -> Tensor:
        z = (1 - 2 * y) * finite(s)  # how far the score lies on the wrong side
        return sigmoid(finite(k * z)) * softplus(z)

    steps = fast.soft_truncated_steps(k)
    read = _read(input, target, mask, reduction, hard=True)
    return fast.elementwise(formula, steps, *read)


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | Tensor | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss of independent labels: cross-entropy times a power of the error.

    .. math::

        L = \bigl(\alpha t + (1 - \alpha)(1 - t)\bigr)\, (1 - p_t)^\gamma\,
            \bigl(-t \log p - (1 - t) \log (1 - p)\bigr), \qquad
        p = \sigma(s), \quad p_t = p\, t + (1 - p)(1 - t)

    Without ``alpha`` the first factor is 1, while ``alpha=0.5`` halves the loss. For a soft label the loss is a product
    of two averages, whose minimum is in general not at :math:`p = t`. The mean divides by all elements; in dense
    detection take the sum and divide by the number of positives. For :math:`\gamma > 0` the sigmoid of a score is no
    probability: :eq:`focal-minimum` tells the share of positives.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`t` in [0, 1] in any dtype, the shape of ``input``; values between are soft labels.
        gamma: the power :math:`\gamma` in [0, 1000]; 0 gives cross-entropy. It ends where a rounded error would show.
        alpha: weight :math:`\alpha` in [0, 1] of positives; a number, a tensor of one per label, or None for none.
        mask: the elements that count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Example:
        >>> s, t = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.5])
        >>> sigmoid_focal_loss(s, t, reduction="none").round(decimals=4)
        tensor([0.0018, 0.1733, 0.2033])

    Equation :eq:`focal-loss` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017); focal loss, arXiv
    1708.02002.
    """
    g, read = checks.check_gamma(gamma), _read(input, target, mask, reduction)
    w = _alpha(alpha, read[0])

    def formula(s: Tensor, t: Tensor) -> Tensor:
        s = finite(s)
        m = torch.where(s > 0, -s, s)  # -|s|, with a slope at 0
        v = torch.exp(m)
        a = torch.where(s > 0, 1 - t, t)  # the label on the side without the score
        bce = torch.log1p(v) - a * m
        # 1 - p_t = (a + (1 - a) v) / (1 + v); log v is m, also where v has rounded to 0
        odds = torch.log(torch.where(a > 0, a + (1 - a) * v, 1))
        log_error = torch.where(a > 0, odds, m) - torch.log1p(v)
        loss = torch.exp(g * log_error) * bce
        return loss if w is None else (w * t + (1 - w) * (1 - t)) * loss

    return fast.elementwise(formula, fast.focal_steps(g, w), *read)


def asymmetric_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    detach_weight: bool = False,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Asymmetric loss (ASL) of independent labels: focal loss with a power for each label and a clip for negatives.

    .. math::

        L = -t\, (1 - p)^{\gamma_+} \log p - (1 - t)\, q^{\gamma_-} \log (1 - q), \qquad
        p = \sigma(s), \quad q = \max(p - c, 0)

    A negative with a probability up to the clip :math:`c` costs nothing and has gradient 0. The paper sums over labels
    and samples, ``reduction="sum"``. Labels between 0 and 1 weigh the two terms, while the published code takes one
    power of a mixture for them.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`t` in [0, 1] in any dtype, the shape of ``input``.
        gamma_neg: the power :math:`\gamma_-` of negatives in [0, 1000].
        gamma_pos: the power :math:`\gamma_+` of positives in [0, 1000].
        clip: the probability :math:`c` in [0, 1) taken off negatives.
        detach_weight: let no gradient through the powers (``disable_torch_grad_focal_loss`` of the published code).
        mask: the elements that count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Example:
        >>> s, t = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([1, 0, 0])
        >>> asymmetric_loss(s, t, reduction="none").round(decimals=4)
        tensor([0.0151, 0.8464, 0.0000])

    Source: asymmetric loss, arXiv 2009.14119. With equal powers and no clip it is :eq:`focal-loss` of the chapter.
    """
    given = _asymmetric(gamma_neg, gamma_pos, clip, detach_weight)
    minus, plus, c, constant = given.values()
    high, low = _score_of(c)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        s = finite(s)
        log_p, log_n = -softplus(-s), -softplus(s)
        log_q, rest, above = log_p, -log_n, s == s
        if c:  # q = (1 - c) p (1 - e^-d), 1 - q = 1 - p + c
            d = (s - high) - low
            above = d > 0
            log_q = log_p + math.log1p(-c) + _log_of_rest(torch.where(above, d, 1))
            q = torch.exp(log_q)
            near = torch.log1p(-torch.where(q < 0.5, q, 0))
            rest = -torch.where(q < 0.5, near, torch.log(torch.exp(log_n) + c))
        weights = torch.exp(plus * log_n), torch.exp(minus * log_q)
        pos, neg = (w.detach() for w in weights) if constant else weights
        return -t * pos * log_p + (1 - t) * torch.where(above, neg * rest, 0)

    steps = fast.asymmetric_steps(minus, plus, c, (high, low), constant)
    return fast.elementwise(formula, steps, *_read(input, target, mask, reduction))


def _score_of(c: float) -> tuple[float, float]:
    """The score of a probability in two parts; float32 scores lose no digit when they are subtracted in turn."""
    score = math.log(c) - math.log1p(-c) if c else 0.0
    high = round(score * 2**16) / 2**16
    return high, score - high


def _log_of_rest(d: Tensor) -> Tensor:
    """log(1 - e^-d) for d > 0, right in every derivative."""
    near = d < 0.7
    close = torch.log(-torch.expm1(-torch.where(near, d, 0.5)))
    far = torch.log1p(-torch.exp(-torch.where(near, 1, d)))
    return torch.where(near, close, far)


# ------------------------------------------------------------------------------------------------------------ arguments


def _read(
    input: Tensor, target: Tensor, mask: Tensor | None, reduction: str, *, hard: bool = False
) -> tuple[Tensor, Tensor, Any]:
    """Scores, labels, and what the sum of the losses is divided by, None for no sum."""
    check_reduction(reduction)
    s = check_scores(input, rows=False)
    mask = checks.check_mask(mask, input.shape)
    t = checks.check_labels(target, input.shape, hard=hard, mask=mask)
    count: Any = {"mean": max(s.numel(), 1), "sum": 1}.get(reduction)
    if mask is None:
        return s, t, count
    if reduction == "mean":
        count = mask.expand(s.shape).sum().clamp(min=1)
    # a negative far below 0 costs nothing in any of these losses
    return s.masked_fill(~mask, -FAR), t.masked_fill(~mask, 0), count


def _alpha(alpha: float | Tensor | None, s: Tensor | None = None) -> float | Tensor | None:
    if isinstance(alpha, Tensor) and alpha.dim():
        labels = None if s is None else (*s.shape, 1)[s.dim() - 1]
        check_per_class("alpha", alpha, labels, high=1.0)
        checks.check_constant(alpha, "alpha")
        return alpha if s is None else alpha.to(s.dtype)
    return None if alpha is None else check_number("alpha", alpha, low=0.0, high=1.0)


def _asymmetric(gamma_neg: float, gamma_pos: float, clip: float, detach_weight: bool) -> dict[str, Any]:
    return {
        "gamma_neg": checks.check_gamma(gamma_neg, "gamma_neg"),
        "gamma_pos": checks.check_gamma(gamma_pos, "gamma_pos"),
        "clip": check_number("clip", clip, low=0.0, high=1.0, open_high=True),
        "detach_weight": checks.check_flag("detach_weight", detach_weight),
    }


# -------------------------------------------------------------------------------------------------------------- modules


class HardTruncatedBce(LossModule):
    """:func:`hard_truncated_bce` as a module."""

    def __init__(self, *, margin: float = 0.5, reduction: str = "mean") -> None:
        margin = check_number("margin", margin, low=0.0, high=1.0)
        super().__init__(margin=margin, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return hard_truncated_bce(input, target, mask=mask, **self.options)


class SoftTruncatedBce(LossModule):
    """:func:`soft_truncated_bce` as a module."""

    def __init__(self, *, sharpness: float = 1.0, reduction: str = "mean") -> None:
        sharpness = checks.check_sharpness(sharpness)
        super().__init__(sharpness=sharpness, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_truncated_bce(input, target, mask=mask, **self.options)


class SigmoidFocalLoss(LossModule):
    """:func:`sigmoid_focal_loss` as a module; an ``alpha`` per label is a buffer and moves with it."""

    def __init__(self, *, gamma: float = 2.0, alpha: float | Tensor | None = None, reduction: str = "mean") -> None:
        gamma, alpha = checks.check_gamma(gamma), _alpha(alpha)
        super().__init__(gamma=gamma, alpha=alpha, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return sigmoid_focal_loss(input, target, mask=mask, **self.options)


class AsymmetricLoss(LossModule):
    """:func:`asymmetric_loss` as a module."""

    def __init__(
        self,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 1.0,
        clip: float = 0.05,
        detach_weight: bool = False,
        reduction: str = "mean",
    ) -> None:
        options = _asymmetric(gamma_neg, gamma_pos, clip, detach_weight)
        super().__init__(**options, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return asymmetric_loss(input, target, mask=mask, **self.options)
