r"""Accuracy as the objective: the probability that noisy scores pick the right class (EXACT).

Accuracy is a step function of the scores and has no gradient. With Gaussian noise on every score it becomes a
probability, smooth in the scores, and for independent noise that probability is a one-dimensional integral:
:func:`expected_accuracy`, and its logarithm :func:`log_expected_accuracy`. :func:`exact_loss` turns either into a loss.
With Gumbel noise the same probability is the softmax: :func:`soft_accuracy_loss`. A module of the same name wraps each.
The page Recipes of the book shows them in training code.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lossbook._checks import (
    check_classes,
    check_distribution,
    check_flag,
    check_ignore_index,
    check_index,
    check_integer,
    check_number,
    check_reduction,
    check_rows,
    check_scores,
)
from lossbook._common import LossModule, finite, if_counted, one_hot, reduce_loss, rest_margin, rest_margins, sigmoid
from lossbook._fast.accuracy import exact_rows, log_product, place, soft_accuracy_rows, soft_target_rows

__all__ = [
    "ExactLoss",
    "ExpectedAccuracy",
    "LogExpectedAccuracy",
    "SoftAccuracyLoss",
    "exact_loss",
    "expected_accuracy",
    "log_expected_accuracy",
    "soft_accuracy_loss",
]

# A margin of 200 standard deviations is won: Phi(z + 200) rounds to 1 at every node, so infinity may count as 200.
# A lost margin is squared: 1e15 squared and summed over a million classes is 1e36, where float32 ends at 3e38.
_WON, _LOST = 200.0, -1e15


# ------------------------------------------------------------------------------------------------------------ formulas


def margins(s: Tensor, t: Tensor, counted: Tensor, sigma: float) -> Tensor:
    """(s_t - s_i) / sigma with the classes first; won at the target itself and in rows that do not count."""
    d = (s.gather(-1, t.unsqueeze(-1)) - s) / sigma
    d = d.masked_fill(d > _WON, _WON).masked_fill(d < _LOST, _LOST)
    won = one_hot(t, s.shape[-1]) | ~counted.unsqueeze(-1)
    return d.masked_fill(won, _WON).movedim(-1, 0)


def noisy_error(s: Tensor, t: Tensor, counted: Tensor, sigma: float, nodes: int, log: bool) -> Tensor:
    """1 - P or -log P of each row, P = int phi(z) prod Phi(z + d_i) dz."""
    d = margins(s, t, counted, sigma)
    z, log_w, sure = place(d.detach(), nodes)  # log_w: the step times phi(z)
    log_e = log_product(d, z)  # log prod Phi(z + d_i)
    # in sure rows int phi(z) (1 - prod Phi) dz, where nothing cancels
    miss = torch.where(log_e < -1, 1 - log_e.exp(), -torch.expm1(log_e))
    error = (log_w.exp() * miss).sum(-1).masked_fill(~sure, 0)
    # in the others P itself, a log-sum-exp
    g = log_e + log_w
    top = g.detach().amax(-1)
    log_p = (g - top.unsqueeze(-1)).exp().sum(-1).log() + top
    log_p = log_p.masked_fill(d.amin(0) <= _LOST, -math.inf)
    if log:
        return 0 - torch.where(sure, torch.log1p(-error), log_p)
    return torch.where(sure, error, 1 - log_p.exp())


def soft_accuracy(s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
    """1 - p_t, as the sigmoid of how far the others lie above class t: nothing is subtracted from 1."""
    s = finite(if_counted(s, counted))
    return if_counted(sigmoid(rest_margin(s, t)), counted)


def soft_accuracy_of_soft_targets(s: Tensor, tau: Tensor) -> Tensor:
    """1 - sum tau_c p_c for tau that sum to 1: every class by its own error."""
    return (tau * sigmoid(rest_margins(finite(s)))).sum(-1)


# -------------------------------------------------------------------------------------------------------------- losses


def expected_accuracy(input: Tensor, target: Tensor, *, sigma: float = 1.0, nodes: int = 32, dim: int = -1) -> Tensor:
    r"""Probability that scores with Gaussian noise pick the target.

    .. math::

        P_t = P\bigl(\operatorname{argmax}_i (s_i + \sigma \varepsilon_i) = t\bigr)
        = \int_{-\infty}^{\infty} \varphi(z) \prod_{i \ne t} \Phi\Bigl(z + \frac{s_t - s_i}{\sigma}\Bigr)\, dz,
        \qquad \varepsilon_i \sim \mathcal{N}(0, 1) \text{ independent}

    Given the target's own noise :math:`z` the other classes lose independently, so the :math:`(C - 1)`-dimensional
    orthant integral becomes this one. With two classes it is :math:`\Phi((s_t - s_o) / (\sigma \sqrt 2))`. The
    :math:`P_t` of all targets sum to 1.

    The rule is deterministic: trapezoidal on nodes around the integrand's mode. Where :math:`P_t` is near 1, its error
    is integrated in its place, :math:`1 - P_t = \int \varphi(z) (1 - \prod_i \Phi(z + d_i))\, dz`, whose mass lies near
    :math:`-d/2` for the lowest margin d, and so :func:`exact_loss` and the gradient keep their digits in sure rows.

    At 32 nodes and float64 the relative error of value and gradient is about 1e-10 in rows that are not sure, and 1e-12
    in sure rows of up to 10 classes, 1e-7 of 100, 1e-6 of 1000 and 1e-5 of 10 000; that of the gradient counts against
    the row's largest entry. 64 nodes bring that to 1e-10. float32 adds its rounding, about 4e-7, and like every
    computation in the dtype the rounding of the margins: :math:`d^2 / 4` units in the last place.

    Time is that of C x nodes evaluations of :math:`\log\Phi` a row: one core takes about 9 ns each in
    float32, 3 ms for 256 rows of 10 classes and 0.2 s for 64 rows of 10 000. Temporary memory does not grow
    with the number of rows: a piece of them is worked on at a time, one row at the least. Second derivatives, and all
    under ``torch.func`` and ``torch.compile``, keep arrays of C x nodes numbers a row.

    Far below the best class :math:`P_t` rounds to 0 and so does its gradient; :func:`log_expected_accuracy` goes on.
    Only :math:`s / \sigma` counts, so :math:`\sigma` is a temperature.

    With one class the row is right, whatever its score. A rival at :math:`-\infty` is a rival less; a target at
    :math:`+\infty` with finite rivals is right, with gradient 0; a target at :math:`-\infty` or a rival at
    :math:`+\infty` is lost: 0, with gradient 0. A row with NaN gives NaN, and so does one where target and rival are
    infinite with the same sign.

    Args:
        input: scores :math:`s`, with classes in dimension ``dim``.
        target: class indices :math:`t`, the shape of the input without ``dim``, of any integer dtype but bool; none is
            ignored.
        sigma: standard deviation :math:`\sigma > 0` of the noise, in the unit of the scores: a finite number of Python
            or NumPy, or a tensor of one number; no smaller than the smallest normal number of the computation, 1.2e-38
            in float32.
        nodes: how many points the integrand is evaluated at, at least 8.
        dim: the dimension of the classes.

    Returns:
        Probabilities, the shape of ``target``. float16 and bfloat16 scores are computed and returned in float32.
        Differentiable three times; a fourth derivative is infinite or NaN.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not of an integer dtype, or an option is no number.
        ValueError: shapes do not fit, an index lies outside [0, C), or an option is out of range. The values of
            ``target`` are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s = torch.tensor([2.0, 1.0, 0.0]).expand(3, 3)
        >>> expected_accuracy(s, torch.arange(3)).round(decimals=4)
        tensor([0.7288, 0.2241, 0.0472])
        >>> expected_accuracy(s, torch.arange(3), sigma=0.1).round(decimals=4)
        tensor([1., 0., 0.])

    Equation :eq:`acc-integral` of the chapter. Source: EXACT, arXiv 2205.09615; Su Jianlin, scientific spaces 9098
    (2022) and 6620 (2019).
    """
    p = log_expected_accuracy(input, target, sigma=sigma, nodes=nodes, dim=dim).exp()
    return p.clone()  # exp keeps its result, and whoever gets this one may edit it


def log_expected_accuracy(
    input: Tensor, target: Tensor, *, sigma: float = 1.0, nodes: int = 32, dim: int = -1
) -> Tensor:
    r"""Logarithm of :func:`expected_accuracy`, exact far below the best class too.

    .. math::

        \log P_t = \log \int_{-\infty}^{\infty} \varphi(z) \prod_{i \ne t} \Phi(z + d_i)\, dz, \qquad
        \frac{\partial \log P_t}{\partial d_i} = E\left[\frac{\varphi(z + d_i)}{\Phi(z + d_i)}\right], \qquad
        d_i = \frac{s_t - s_i}{\sigma}

    The expectation is over the integrand as a density in :math:`z`. The integrand is log-concave; its mode is found by
    Newton's method and the nodes are laid around it, so that the relative error of :math:`P_t` does not depend on how
    small it is. Near 1 it is :math:`\log(1 - (1 - P_t))`, whose small number has an integral of its own. A row with a
    margin :math:`d_i` of -1e15 or below is lost: :math:`-\infty` with gradient 0.

    Args:
        input: scores :math:`s`, with classes in dimension ``dim``.
        target: class indices :math:`t`, the shape of the input without ``dim``; none is ignored.
        sigma: standard deviation of the noise, as in :func:`expected_accuracy`.
        nodes: how many points the integrand is evaluated at, at least 8.
        dim: the dimension of the classes.

    Returns:
        Log-probabilities, never above 0, the shape of ``target``; dtype and derivatives as in
        :func:`expected_accuracy`.

    Raises:
        TypeError: as :func:`expected_accuracy`.
        ValueError: as :func:`expected_accuracy`.

    Example:
        >>> s = torch.tensor([0.0, 30.0, 20.0])
        >>> print(round(log_expected_accuracy(s, torch.tensor(0)).item(), 2))
        -239.56

    Equation :eq:`acc-log` of the chapter, its gradient :eq:`acc-gradient`. Source: EXACT, arXiv 2205.09615; Su Jianlin,
    scientific spaces 9098 (2022) and 6620 (2019).
    """
    loss, _ = _exact(input, target, sigma, nodes, None, dim, log=True)
    return 0 - loss


def exact_loss(
    input: Tensor,
    target: Tensor,
    *,
    sigma: float = 1.0,
    log: bool = False,
    nodes: int = 32,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Expected error under Gaussian noise on the scores, or the negative logarithm of the expected accuracy.

    .. math::

        L = 1 - P_t \quad \text{or} \quad L = -\log P_t, \qquad
        P_t = P\bigl(\operatorname{argmax}_i (s_i + \sigma \varepsilon_i) = t\bigr)

    :math:`1 - P_t` is bounded, and its gradient vanishes on samples that are far off: the model has to be warm. The
    logarithm pulls them back. Both agree to first order near :math:`P_t = 1`, and there both keep their digits, value
    and gradient, however small. See :func:`expected_accuracy` for the integral, its accuracy, its cost and its corner
    cases. A lost row has the loss 1, with ``log=True`` infinity, and gradient 0.

    Args:
        input: scores :math:`s`, with classes in dimension ``dim``.
        target: class indices :math:`t`, the shape of the input without ``dim``, of any integer dtype but bool.
        sigma: standard deviation of the noise, as in :func:`expected_accuracy`.
        log: ``-log P`` instead of ``1 - P``; True or False and nothing else.
        nodes: how many points the integrand is evaluated at, at least 8.
        ignore_index: rows with this target are left out, whatever their scores, NaN too; an int, no bool and no None.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the rows that count, 0 where none does; ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or the shape of ``target`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores
        are computed in float32, and the loss is float32; float64 stays float64. The gradient of :math:`-\log P_t` grows
        to :math:`(\max_i s_i - s_t) / \sigma^2`; it goes back in the dtype of the scores, and float16 ends at 65504.
        Where the loss is infinite the gradient is 0.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not of an integer dtype, or an option has the wrong
            type.
        ValueError: as :func:`expected_accuracy`, or ``reduction`` is unknown.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> exact_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.2712, 0.9528])
        >>> exact_loss(s, torch.tensor([0, 2]), log=True, reduction="none").round(decimals=4)
        tensor([0.3164, 3.0544])

    Equation :eq:`acc-exact` of the chapter. Source: EXACT, arXiv 2205.09615; Su Jianlin, scientific spaces 9098 (2022).
    """
    check_reduction(reduction)
    loss, counted = _exact(
        input,
        target,
        sigma,
        nodes,
        check_ignore_index(ignore_index),
        dim,
        log=check_flag("log", log),
    )
    return reduce_loss(loss, reduction, counted)


def soft_accuracy_loss(
    input: Tensor, target: Tensor, *, ignore_index: int = -100, dim: int = -1, reduction: str = "mean"
) -> Tensor:
    r"""Expected error under Gumbel noise on the scores: one minus the softmax.

    .. math::

        L = 1 - P\bigl(\operatorname{argmax}_i (s_i + g_i) = t\bigr) = 1 - \operatorname{softmax}(s)_t

    :math:`g_i` are independent standard Gumbel variables. With soft targets :math:`\tau` it is
    :math:`1 - \sum_c \tau_c p_c = \sum_c \tau_c (1 - p_c)`. The error comes from the other classes' scores, not from a
    subtraction, so it keeps its digits as it nears 0; the gradient keeps its digits as the loss nears 1, too.

    With one class the loss is 0. Two scores that are infinite with the same sign count as equal.

    Args:
        input: scores :math:`s`, with classes in dimension ``dim``.
        target: class indices :math:`t`, the shape of the input without ``dim``, of any integer dtype but bool; or soft
            targets, the shape of the input and of a floating dtype, each row summing to 1.
        ignore_index: rows with this target are left out, whatever their scores, NaN too; an int, no bool and no None.
        dim: the dimension of the classes.
        reduction: ``"mean"`` over the rows that count, 0 where none does; ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or one loss for each row with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores
        are computed in float32, and the loss is float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is neither of an integer dtype nor floating, or
            ``ignore_index`` is no int.
        ValueError: shapes do not fit, an index lies outside [0, C), a soft target outside [0, 1], or an option is out
            of range. The values of ``target`` are checked on CPU tensors only: on an accelerator the check would wait
            for the device.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> soft_accuracy_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.3348, 0.9100])

    Equation :eq:`acc-soft` of the chapter. Source: Su Jianlin, scientific spaces 9098 (2022) and 6620 (2019).
    """
    check_reduction(reduction)
    s = check_scores(input, dim=dim)
    ignored = check_ignore_index(ignore_index)
    soft = isinstance(target, Tensor) and target.is_floating_point()
    if soft and target.shape == input.shape:
        tau = check_distribution(target, input.shape, dim=dim).to(s.dtype)
        check_classes(s)
        loss = soft_target_rows(soft_accuracy_of_soft_targets, s, tau)
        return reduce_loss(loss, reduction)
    t, counted = check_rows(target, s.shape[:-1], check_classes(s), ignored)
    loss = soft_accuracy_rows(soft_accuracy, s, t, counted)
    return reduce_loss(loss, reduction, counted)


# ------------------------------------------------------------------------------------------------------------- modules


class ExpectedAccuracy(LossModule):
    """:func:`expected_accuracy` as a module."""

    def __init__(self, *, sigma: float = 1.0, nodes: int = 32, dim: int = -1) -> None:
        sigma, nodes = _check_sigma(sigma), _check_nodes(nodes)
        super().__init__(sigma=sigma, nodes=nodes, dim=check_integer("dim", dim))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The probability of each row's target."""
        return expected_accuracy(input, target, **self.options)


class LogExpectedAccuracy(ExpectedAccuracy):
    """:func:`log_expected_accuracy` as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The log-probability of each row's target."""
        return log_expected_accuracy(input, target, **self.options)


class ExactLoss(LossModule):
    """:func:`exact_loss` as a module.

    ``sigma`` may be changed between steps, to anneal the noise:
    ``loss.sigma = start * (end / start) ** (step / last)``.
    """

    def __init__(
        self,
        *,
        sigma: float = 1.0,
        log: bool = False,
        nodes: int = 32,
        ignore_index: int = -100,
        dim: int = -1,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            sigma=_check_sigma(sigma),
            log=check_flag("log", log),
            nodes=_check_nodes(nodes),
            ignore_index=check_ignore_index(ignore_index),
            dim=check_integer("dim", dim),
            reduction=check_reduction(reduction),
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return exact_loss(input, target, **self.options)


class SoftAccuracyLoss(LossModule):
    """:func:`soft_accuracy_loss` as a module."""

    def __init__(self, *, ignore_index: int = -100, dim: int = -1, reduction: str = "mean") -> None:
        super().__init__(
            ignore_index=check_ignore_index(ignore_index),
            dim=check_integer("dim", dim),
            reduction=check_reduction(reduction),
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_accuracy_loss(input, target, **self.options)


# -------------------------------------------------------------------------------------------------------------- checks


def _check_sigma(sigma: Any) -> float:
    return check_number("sigma", sigma, low=0.0, open_low=True)


def _check_nodes(nodes: Any) -> int:
    return check_integer("nodes", nodes, low=8)


def _exact(
    input: Tensor, target: Tensor, sigma: Any, nodes: Any, ignored: int | None, dim: int, *, log: bool
) -> tuple[Tensor, Tensor]:
    """1 - P or -log P of each row, and which rows count."""
    sigma, nodes = _check_sigma(sigma), _check_nodes(nodes)
    s = check_scores(input, dim=dim)
    classes, every = check_classes(s), ignored is None
    t, counted = check_index(target, s.shape[:-1], classes, ignored, every_row=every)
    tiny = torch.finfo(s.dtype).tiny
    if sigma < tiny:
        least = f"{tiny:.4g}, the smallest normal number of {s.dtype}"
        raise ValueError(f"sigma must be at least {least}, got {sigma!r}")
    rows = (s, t, counted, sigma, nodes, log)
    return exact_rows(noisy_error, margins, _LOST, *rows), counted
