r"""Losses that let the easy samples go: truncated, softly truncated, focal and asymmetric cross-entropy.

Each multiplies cross-entropy by a weight that falls as the sample is got right: to zero past a margin
(:func:`hard_truncated_bce`), along a sigmoid (:func:`soft_truncated_bce`), or as a power of the error
(:func:`sigmoid_focal_loss`, :func:`asymmetric_loss`). The softmax forms are :func:`soft_truncated_cross_entropy` and
:func:`softmax_focal_loss`. A module of the same name wraps each. The page Recipes shows them in training loops.

float16 and bfloat16 scores are computed in float32, and the loss is float32. Values of targets and weights are checked
on the CPU only: elsewhere the check would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lossbook import _checks as checks
from lossbook._checks import check_index, check_number, check_per_class, check_reduction, check_scores
from lossbook._common import FAR, LossModule, finite, reduce_loss, rest_margin, rest_margins, sigmoid, softplus
from lossbook._fast import focal as fast

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

# float32 rounds an error near 1 by 6e-8, and its power by so much times gamma
MOST_GAMMA = 1e3


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

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`y`, 0 or 1 in any dtype, the shape of ``input``.
        margin: the probability :math:`m` in [0, 1] from which a sample no longer counts.
        mask: boolean, broadcastable to ``input``; False leaves an element out, whatever stands there.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes differ, a label is neither 0 nor 1, or an option is out of range.

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
    return _each(formula, steps, input, target, mask, reduction, hard=True)


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
        sharpness: :math:`K \ge 0`; 0 gives half the cross-entropy.
        mask: boolean, broadcastable to ``input``; False leaves an element out, whatever stands there.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes differ, a label is neither 0 nor 1, or an option is out of range.

    Example:
        >>> s, y = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1, 1, 1])
        >>> soft_truncated_bce(s, y, reduction="none").round(decimals=4)
        tensor([0.0151, 0.3466, 0.9601])

    Equation :eq:`focal-soft` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017).
    """
    k = _sharpness(sharpness)

    def formula(s: Tensor, y: Tensor) -> Tensor:
        z = (1 - 2 * y) * finite(s)  # how far the score lies on the wrong side
        return sigmoid(finite(k * z)) * softplus(z)

    steps = fast.soft_truncated_steps(k)
    return _each(formula, steps, input, target, mask, reduction, hard=True)


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

    Without ``alpha`` the first factor is 1.

    Args:
        input: scores :math:`s`, any shape.
        target: labels :math:`t` in [0, 1] in any dtype, the shape of ``input``; values between are soft labels.
        gamma: the power :math:`\gamma` in [0, 1000]; 0 gives cross-entropy.
        alpha: weight of the positive label in [0, 1], the negative one gets ``1 - alpha``; a number, or a tensor with
            one value per label (the last dimension); None for no weights.
        mask: boolean, broadcastable to ``input``; False leaves an element out, whatever stands there.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes differ, a label lies outside [0, 1], or an option is out of range.

    Example:
        >>> s, t = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 1.0, 0.5])
        >>> sigmoid_focal_loss(s, t, reduction="none").round(decimals=4)
        tensor([0.0018, 0.1733, 0.2033])

    Equation :eq:`focal-loss` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017); focal loss, arXiv
    1708.02002.
    """
    g, w = _gamma("gamma", gamma), _alpha(alpha, input)

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

    steps = fast.focal_steps(g, w)
    return _each(formula, steps, input, target, mask, reduction)


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
        mask: boolean, broadcastable to ``input``; False leaves an element out, whatever stands there.
        reduction: ``"mean"`` over the elements that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``input`` with ``reduction="none"``.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes differ, a label lies outside [0, 1], or an option is out of range.

    Example:
        >>> s, t = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([1, 0, 0])
        >>> asymmetric_loss(s, t, reduction="none").round(decimals=4)
        tensor([0.0151, 0.8464, 0.0000])

    Source: asymmetric loss, arXiv 2009.14119. With equal powers and no clip it is :eq:`focal-loss` of the chapter.
    """
    given = _asymmetric_options(gamma_neg, gamma_pos, clip, detach_weight)
    minus, plus, c, constant = given.values()
    score = math.log(c) - math.log1p(-c) if c else 0.0  # the score of the clip
    high = round(score * 2**16) / 2**16  # exact in float32: s - high keeps every digit
    options = (minus, plus, c, (high, score - high), constant)

    def formula(s: Tensor, t: Tensor) -> Tensor:
        return _asymmetric(s, t, *options)

    steps = fast.asymmetric_steps(*options)
    return _each(formula, steps, input, target, mask, reduction)


def _asymmetric(
    s: Tensor, t: Tensor, minus: float, plus: float, c: float, level: tuple[float, float], constant: bool
) -> Tensor:
    """The formula of :func:`asymmetric_loss`."""
    s = finite(s)
    log_p, log_n = -softplus(-s), -softplus(s)
    log_q, rest, above = log_p, -log_n, s == s
    if c:  # q = (1 - c) p (1 - e^-d), 1 - q = 1 - p + c
        d = (s - level[0]) - level[1]
        above = d > 0
        log_q = log_p + math.log1p(-c) + _log_of_rest(torch.where(above, d, 1))
        q = torch.exp(log_q)
        near = torch.log1p(-torch.where(q < 0.5, q, 0))
        rest = -torch.where(q < 0.5, near, torch.log(torch.exp(log_n) + c))
    weight_pos, weight_neg = torch.exp(plus * log_n), torch.exp(minus * log_q)
    if constant:
        weight_pos, weight_neg = weight_pos.detach(), weight_neg.detach()
    negative = torch.where(above, weight_neg * rest, 0)
    return -t * weight_pos * log_p + (1 - t) * negative


def _log_of_rest(d: Tensor) -> Tensor:
    """log(1 - e^-d) for d > 0, right in every derivative."""
    near = d < 0.7
    close = torch.log(-torch.expm1(-torch.where(near, d, 0.5)))
    far = torch.log1p(-torch.exp(-torch.where(near, 1, d)))
    return torch.where(near, close, far)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Focal loss of one class out of many.

    .. math::

        L = -w_t\, (1 - p_t)^\gamma \log p_t, \qquad p = \operatorname{softmax}(s)

    The error :math:`1 - p_t` comes from the other classes' scores, not from a subtraction, so it keeps its digits as
    :math:`p_t` nears 1. A soft target :math:`\tau` gives :math:`\sum_c \tau_c L_c`.

    Args:
        input: scores :math:`s`, shape ``(..., C)``, or with the classes in dimension ``dim``.
        target: class indices :math:`t`, shape ``(...)``; or soft targets, floating, the shape of ``input``.
        gamma: the power :math:`\gamma` in [0, 1000]; 0 gives cross-entropy.
        weight: a weight :math:`w \ge 0` per class, shape ``(C,)``; None for ones.
        ignore_index: rows with this target are left out.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the rows that count (not the sum of their weights), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes do not fit, a target, a weight or an option is out of range.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> softmax_focal_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.0457, 1.9936])

    Equation :eq:`focal-softmax` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017); focal loss, arXiv
    1708.02002.
    """
    g = _gamma("gamma", gamma)
    s, t, counted = _rows(input, target, ignore_index, dim, reduction)
    w = None if weight is None else check_per_class("weight", weight, s.shape[-1]).to(s)

    def focal(z: Tensor) -> Tensor:  # z: how far the other classes lie above class t
        return torch.exp(-g * softplus(-z)) * softplus(z)

    def formula(s: Tensor, t: Tensor, counted: Tensor) -> Tensor:
        return focal(rest_margin(finite(s), t, counted))

    def soft(s: Tensor, t: Tensor) -> Tensor:
        return (t * focal(rest_margins(_below_top(s)))).sum(-1)

    if counted is None:  # soft targets
        t = t if w is None else t * w
        loss = soft(s, t) if t.requires_grad else fast.softmax_focal_soft(soft, s, t, g)
    else:
        loss = fast.softmax_focal(formula, s, t, counted, g)
        loss = loss if w is None else loss * w[t]
    return reduce_loss(loss, reduction, counted)


def soft_truncated_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    sharpness: float = 1.0,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Softly truncated cross-entropy of one class out of many.

    .. math::

        L = -\operatorname{softmax}(-K s)_t\, \log \operatorname{softmax}(s)_t

    With two classes it is :func:`soft_truncated_bce` of the difference of the scores. One other class far below all
    the rest takes the whole weight: a score of :math:`-\infty` on it gives a loss of 0. A soft target :math:`\tau`
    gives :math:`\sum_c \tau_c L_c`.

    Args:
        input: scores :math:`s`, shape ``(..., C)``, or with the classes in dimension ``dim``.
        target: class indices :math:`t`, shape ``(...)``; or soft targets, floating, the shape of ``input``.
        sharpness: :math:`K \ge 0`; 0 gives cross-entropy divided by the number of classes.
        ignore_index: rows with this target are left out.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows).

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes do not fit, a target or an option is out of range.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> soft_truncated_cross_entropy(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.0367, 1.6016])

    Equation :eq:`focal-soft-softmax` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017).
    """
    k = _sharpness(sharpness)
    s, t, counted = _rows(input, target, ignore_index, dim, reduction)

    def formula(s: Tensor, t: Tensor, counted: Tensor) -> Tensor:
        s = finite(s)
        # subtracted first, so a common offset costs no digits
        turned = finite(-k * (s - s.detach().amin(-1, keepdim=True)))
        weight = sigmoid(-rest_margin(turned, t, counted))
        return weight * softplus(rest_margin(s, t, counted))

    def soft(s: Tensor, t: Tensor) -> Tensor:
        d = _below_top(s)
        weight = sigmoid(-rest_margins(finite(-k * d)))
        return (t * weight * softplus(rest_margins(d))).sum(-1)

    if counted is None:  # soft targets
        loss = fast.soft_truncated_soft(soft, s, t, k)
    else:
        loss = fast.soft_truncated_rows(formula, s, t, counted, k)
    return reduce_loss(loss, reduction, counted)


# ------------------------------------------------------------------------------------------------------------ arguments


def _each(
    formula: Callable[[Tensor, Tensor], Tensor],
    steps: fast.Steps,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: str,
    hard: bool = False,
) -> Tensor:
    """Reduce ``formula(s, t)``, the loss of each element; ``steps`` compute the same."""
    check_reduction(reduction)
    s = check_scores(input, rows=False)
    mask = checks.check_mask(mask, input.shape)
    t = checks.check_labels(target, input.shape, hard=hard, mask=mask)
    if mask is not None:  # a negative far below 0 costs nothing in any of these losses
        s, t = s.masked_fill(~mask, -FAR), t.masked_fill(~mask, 0)
    count: Any = {"mean": max(s.numel(), 1), "sum": 1}.get(reduction)
    if mask is not None and reduction == "mean":
        count = mask.expand(s.shape).sum().clamp(min=1)
    return fast.elementwise(formula, steps, s, t, count)


def _rows(
    input: Tensor, target: Tensor, ignore_index: int, dim: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores with the classes last, class indices, which rows count; or soft targets, None."""
    check_reduction(reduction)
    s = check_scores(input, dim=dim)
    classes = checks.check_classes(s)
    if isinstance(target, Tensor) and target.is_floating_point():
        checks.check_ignore_index(ignore_index)
        soft = checks.check_distribution(target, input.shape, dim=dim)
        return s, soft.to(s.dtype), None
    index, counted = check_index(target, s.shape[:-1], classes, checks.check_ignore_index(ignore_index))
    return s, index, counted


def _below_top(s: Tensor) -> Tensor:
    """The scores below the highest one: what is subtracted first costs no digits later."""
    s = finite(s)
    return s - s.detach().amax(-1, keepdim=True)


def _gamma(name: str, value: float) -> float:
    return check_number(name, value, low=0.0, high=MOST_GAMMA)


def _sharpness(value: float) -> float:
    """K of the soft truncations; from 1e30 on the sigmoid is a step anyway, and float32 ends."""
    return min(check_number("sharpness", value, low=0.0), FAR)


def _alpha(alpha: float | Tensor | None, input: Tensor | None = None) -> float | Tensor | None:
    if isinstance(alpha, Tensor) and alpha.dim():
        labels = None if input is None else (*input.shape, 1)[input.dim() - 1]
        checks.check_constant(check_per_class("alpha", alpha, labels, high=1.0), "alpha")
        return alpha if input is None else alpha.to(check_scores(input, rows=False).dtype)
    return None if alpha is None else check_number("alpha", alpha, low=0.0, high=1.0)


def _asymmetric_options(gamma_neg: float, gamma_pos: float, clip: float, detach_weight: bool) -> dict[str, Any]:
    return {
        "gamma_neg": _gamma("gamma_neg", gamma_neg),
        "gamma_pos": _gamma("gamma_pos", gamma_pos),
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
        super().__init__(sharpness=_sharpness(sharpness), reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_truncated_bce(input, target, mask=mask, **self.options)


class SigmoidFocalLoss(LossModule):
    """:func:`sigmoid_focal_loss` as a module; an ``alpha`` per label is a buffer and moves with it."""

    def __init__(self, *, gamma: float = 2.0, alpha: float | Tensor | None = None, reduction: str = "mean") -> None:
        check_reduction(reduction)
        super().__init__(gamma=_gamma("gamma", gamma), alpha=_alpha(alpha), reduction=reduction)

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
        options = _asymmetric_options(gamma_neg, gamma_pos, clip, detach_weight)
        super().__init__(**options, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return asymmetric_loss(input, target, mask=mask, **self.options)


class SoftmaxFocalLoss(LossModule):
    """:func:`softmax_focal_loss` as a module; the class weights are a buffer and move with it."""

    def __init__(
        self,
        *,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: str = "mean",
    ) -> None:
        weight = None if weight is None else check_per_class("weight", weight)
        gamma, rows = _gamma("gamma", gamma), _row_options(ignore_index, dim, reduction)
        super().__init__(gamma=gamma, weight=weight, **rows)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return softmax_focal_loss(input, target, **self.options)


class SoftTruncatedCrossEntropy(LossModule):
    """:func:`soft_truncated_cross_entropy` as a module."""

    def __init__(
        self, *, sharpness: float = 1.0, ignore_index: int = -100, dim: int = -1, reduction: str = "mean"
    ) -> None:
        rows = _row_options(ignore_index, dim, reduction)
        super().__init__(sharpness=_sharpness(sharpness), **rows)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_truncated_cross_entropy(input, target, **self.options)


def _row_options(ignore_index: int, dim: int, reduction: str) -> dict[str, Any]:
    return {
        "ignore_index": checks.check_ignore_index(ignore_index),
        "dim": checks.check_integer("dim", dim),
        "reduction": check_reduction(reduction),
    }
