"""Focal and softly truncated cross-entropy of one class out of many; :mod:`lossbook.focal` says what holds for all."""

from __future__ import annotations

import torch
from torch import Tensor

from lossbook._checks import (
    check_classes,
    check_gamma,
    check_per_class,
    check_reduction,
    check_row_options,
    check_scores,
    check_sharpness,
    check_target,
)
from lossbook._common import LossModule, finite, reduce_loss, rest_margin, rest_margins, sigmoid, softplus
from lossbook._fast import focal as fast


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
    :math:`p_t` nears 1. Only differences of scores count. A single class is always right, with loss 0. A soft target
    :math:`\tau`, whose rows sum to 1, gives :math:`\sum_c \tau_c L_c`. Class weights receive a gradient if they ask
    for one.

    Args:
        input: scores :math:`s`, shape ``(..., C)``, or with the classes in dimension ``dim``.
        target: class indices :math:`t`, shape ``(...)``; or soft targets in the shape of ``input``.
        gamma: the power :math:`\gamma` in [0, 1000]; 0 gives cross-entropy.
        weight: a weight :math:`w \ge 0` per class, shape ``(C,)``; None for ones.
        ignore_index: rows with this target are left out, whatever their scores; it may be a class.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over rows (``torch.nn.functional.cross_entropy`` divides by the weights), ``"sum"`` or
            ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> softmax_focal_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.0457, 1.9936])

    Equation :eq:`focal-softmax` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017); focal loss, arXiv
    1708.02002.
    """
    g = check_gamma(gamma)
    s, t, counted = _read(input, target, ignore_index, dim, reduction)
    w = None if weight is None else check_per_class("weight", weight, s.shape[-1]).to(s)

    def focal(z: Tensor) -> Tensor:  # z: how far the other classes lie above class t
        return torch.exp(-g * softplus(-z)) * softplus(z)

    def formula(s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
        return focal(rest_margin(finite(s), t, counted))

    def soft(s: Tensor, t: Tensor) -> Tensor:
        return (t * focal(rest_margins(_below_top(s)))).sum(-1)

    if t.is_floating_point():
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
        target: class indices :math:`t`, shape ``(...)``; or soft targets in the shape of ``input``.
        sharpness: :math:`K \ge 0`; 0 gives cross-entropy divided by the number of classes.
        ignore_index: rows with this target are left out.
        dim: the dimension of the classes.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows).

    Raises:
        TypeError, ValueError: an argument has a wrong type, dtype, shape or value.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> soft_truncated_cross_entropy(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.0367, 1.6016])

    Equation :eq:`focal-soft-softmax` of the chapter. Source: Su Jianlin, scientific spaces 4733 (2017).
    """
    k = check_sharpness(sharpness)
    s, t, counted = _read(input, target, ignore_index, dim, reduction)

    def formula(s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
        s = finite(s)
        # subtracted first, so a common offset costs no digits
        turned = finite(-k * (s - s.detach().amin(-1, keepdim=True)))
        weight = sigmoid(-rest_margin(turned, t, counted))
        return weight * softplus(rest_margin(s, t, counted))

    def soft(s: Tensor, t: Tensor) -> Tensor:
        d = _below_top(s)
        weight = sigmoid(-rest_margins(finite(-k * d)))
        return (t * weight * softplus(rest_margins(d))).sum(-1)

    if t.is_floating_point():
        loss = fast.soft_truncated_soft(soft, s, t, k)
    else:
        loss = fast.soft_truncated_rows(formula, s, t, counted, k)
    return reduce_loss(loss, reduction, counted)


def _read(
    input: Tensor, target: Tensor, ignore_index: int, dim: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores with the classes last; class indices, or soft targets; which rows count, None for all."""
    check_reduction(reduction)
    s = check_scores(input, dim=dim)
    check_classes(s)
    t, counted = check_target(target, input.shape, ignore_index, dim)
    return s, t.to(s.dtype) if t.is_floating_point() else t, counted


def _below_top(s: Tensor) -> Tensor:
    """The scores below the highest one: what is subtracted first costs no digits later."""
    s = finite(s)
    return s - s.detach().amax(-1, keepdim=True)


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
        rows = check_row_options(ignore_index, dim, reduction)
        super().__init__(gamma=check_gamma(gamma), weight=weight, **rows)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return softmax_focal_loss(input, target, **self.options)


class SoftTruncatedCrossEntropy(LossModule):
    """:func:`soft_truncated_cross_entropy` as a module."""

    def __init__(
        self, *, sharpness: float = 1.0, ignore_index: int = -100, dim: int = -1, reduction: str = "mean"
    ) -> None:
        rows = check_row_options(ignore_index, dim, reduction)
        super().__init__(sharpness=check_sharpness(sharpness), **rows)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_truncated_cross_entropy(input, target, **self.options)
