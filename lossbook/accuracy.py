r"""Accuracy as the objective: the probability that noisy scores pick the right class (EXACT).

Accuracy is a step function of the scores and has no gradient. With Gaussian noise on every score it becomes a
probability, smooth in the scores, and for independent noise that probability is a one-dimensional integral:
:func:`expected_accuracy`, and its logarithm :func:`log_expected_accuracy`. :func:`exact_loss` turns either into a loss.
With Gumbel noise the same probability is the softmax: :func:`soft_accuracy_loss`. A module of the same name wraps each.

Plain torch::

    loss = exact_loss(model(images), labels, sigma=1.0)
    loss.backward()
    optimizer.step()

Lightning::

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return exact_loss(self(images), labels, log=True)

Hugging Face ``Trainer``::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return exact_loss(outputs.logits, labels, log=True)
    trainer = Trainer(..., compute_loss_func=compute_loss)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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
# Right of -12 the normal density and tail are ordinary numbers in float32; left of it the rough hazard is a line.
_FAR = -12.0
# So many (class, row, node) triples are worked on at once: an eighth of all, but no less than keeps a core busy between
# two operators (fewer than torch would split among threads) and no more than lies in cache.
_PIECE = {"cpu": (2**15 - 1, 2**16)}
_DEVICE_PIECE = (2**20, 2**24)
# Newton steps to the mode where nobody may look whether it is reached; 300 000 classes took 11.
_STEPS = 12
_TINY = 1e-37  # keeps a quotient of two zeros at zero in float32
_LOG2_E = math.log2(math.e)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_LOG_SQRT_2PI = math.log(2 * math.pi) / 2

# erfcx(a / sqrt 2) / 2 = P(y) / (a + 4) with y = (a - 4) / (a + 4) in [-1, 1), for every a >= 0: the Chebyshev
# interpolants of degree 9 and 23 in powers of y. Their relative errors, 7e-8 and 3e-17, are below the dtype's rounding.
_TAIL = {
    torch.float32: (
        0.755285127,
        -0.607896404,
        0.387137563,
        -0.186526711,
        0.0603952959,
        -0.00751223138,
        -0.00347616789,
        0.0015637869,
        0.000129325681,
        -0.00015732057,
    ),
    torch.float64: (
        0.7552851304157514,
        -0.6078966419718923,
        0.3871374007422266,
        -0.1865218579596366,
        0.06039657489036092,
        -0.007540188967386312,
        -0.0034796923566515025,
        0.0016308184674099085,
        0.00013334420916014778,
        -0.00023109501736277426,
        -1.907676030719098e-06,
        3.514511190283765e-05,
        7.146021531267462e-07,
        -5.921611045923978e-06,
        -6.249551077565178e-07,
        1.0247851016552774e-06,
        2.647337281979868e-07,
        -1.597739614223922e-07,
        -7.878360342693638e-08,
        1.7844927772981415e-08,
        1.60673869573294e-08,
        -5.873626764987191e-10,
        -1.6886576966786735e-09,
        -1.1997782031253095e-10,
    ),
}


def expected_accuracy(input: Tensor, target: Tensor, *, sigma: float = 1.0, nodes: int = 32) -> Tensor:
    r"""Probability that scores with Gaussian noise pick the target.

    .. math::

        P_t = P\bigl(\operatorname{argmax}_i (s_i + \sigma \varepsilon_i) = t\bigr)
        = \int_{-\infty}^{\infty} \varphi(z) \prod_{i \ne t} \Phi\Bigl(z + \frac{s_t - s_i}{\sigma}\Bigr)\, dz,
        \qquad \varepsilon_i \sim \mathcal{N}(0, 1) \text{ independent}

    Given the target's own noise :math:`z` the other classes lose independently, so the :math:`(C - 1)`-dimensional
    orthant integral becomes this one. With two classes it is :math:`\Phi((s_t - s_o) / (\sigma \sqrt 2))`. The
    :math:`P_t` of all targets sum to 1.

    The rule is deterministic: trapezoidal on nodes around the integrand's mode. At 32 nodes and float64 the relative
    error is about 1e-10. Where a rival ahead meets very many behind it is larger, 1e-6 for 10 000 of them; 64 nodes
    bring that to 1e-10. float32 adds its rounding, about 4e-7. The gradient is an integral over the same nodes.
    Temporary memory does not grow with the number of rows: a piece of them is worked on at a time, one row at the
    least.

    Far below the best class :math:`P_t` rounds to 0 and so does its gradient; :func:`log_expected_accuracy` goes on.
    A row with NaN gives NaN, and so does one where target and rival are infinite with the same sign.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices :math:`t`, shape ``(...)``; none is ignored.
        sigma: standard deviation :math:`\sigma > 0` of the noise, in the unit of the scores; no smaller than the
            smallest normal number of the computation, 1.2e-38 in float32.
        nodes: how many points the integrand is evaluated at, at least 8.

    Returns:
        Probabilities, shape ``(...)``. float16 and bfloat16 scores are computed and returned in float32. Differentiable
        twice.

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
    return log_expected_accuracy(input, target, sigma=sigma, nodes=nodes).exp()


def log_expected_accuracy(input: Tensor, target: Tensor, *, sigma: float = 1.0, nodes: int = 32) -> Tensor:
    r"""Logarithm of :func:`expected_accuracy`, exact far below the best class too.

    .. math::

        \log P_t = \log \int_{-\infty}^{\infty} \varphi(z) \prod_{i \ne t} \Phi(z + d_i)\, dz, \qquad
        \frac{\partial \log P_t}{\partial d_i} = E\left[\frac{\varphi(z + d_i)}{\Phi(z + d_i)}\right], \qquad
        d_i = \frac{s_t - s_i}{\sigma}

    The expectation is over the integrand as a density in :math:`z`. The integrand is log-concave; its mode is found by
    Newton's method and the nodes are laid around it, so that the relative error of :math:`P_t` does not depend on how
    small it is. A row with a margin :math:`d_i` of -1e15 or below is lost: :math:`-\infty` with gradient 0.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices :math:`t`, shape ``(...)``; none is ignored.
        sigma: standard deviation :math:`\sigma > 0` of the noise, in the unit of the scores; no smaller than the
            smallest normal number of the computation, 1.2e-38 in float32.
        nodes: how many points the integrand is evaluated at, at least 8.

    Returns:
        Log-probabilities, never above 0, shape ``(...)``. float16 and bfloat16 scores are computed and returned in
        float32. Differentiable twice.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not of an integer dtype, or an option is no number.
        ValueError: shapes do not fit, an index lies outside [0, C), or an option is out of range. The values of
            ``target`` are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s = torch.tensor([0.0, 30.0, 20.0])
        >>> print(round(log_expected_accuracy(s, torch.tensor(0)).item(), 2))
        -239.56

    Equation :eq:`acc-log` of the chapter, its gradient :eq:`acc-gradient`. Source: EXACT, arXiv 2205.09615; Su Jianlin,
    scientific spaces 9098 (2022) and 6620 (2019).
    """
    s, t, _ = _checked(input, target, sigma, nodes, None)
    return _log_accuracy(s, t, None, float(sigma), nodes)


def exact_loss(
    input: Tensor,
    target: Tensor,
    *,
    sigma: float = 1.0,
    log: bool = False,
    nodes: int = 32,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Expected error under Gaussian noise on the scores, or the negative logarithm of the expected accuracy.

    .. math::

        L = 1 - P_t \quad \text{or} \quad L = -\log P_t, \qquad
        P_t = P\bigl(\operatorname{argmax}_i (s_i + \sigma \varepsilon_i) = t\bigr)

    :math:`1 - P_t` is bounded, and its gradient vanishes on samples that are far off: the model has to be warm. The
    logarithm pulls them back. Both agree to first order near :math:`P_t = 1`. See :func:`expected_accuracy` for the
    integral and its accuracy.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices :math:`t`, shape ``(...)``.
        sigma: standard deviation :math:`\sigma > 0` of the noise, in the unit of the scores; no smaller than the
            smallest normal number of the computation, 1.2e-38 in float32.
        log: ``-log P`` instead of ``1 - P``.
        nodes: how many points the integrand is evaluated at, at least 8.
        ignore_index: rows with this target are left out; an int.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores are
        computed in float32, and the loss is float32. The gradient of :math:`-\log P_t` grows to
        :math:`(\max_i s_i - s_t) / \sigma^2`; it goes back in the dtype of the scores, and float16 ends at 65504.
        Where the loss is infinite the gradient is 0.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not of an integer dtype, or an option has the wrong
            type.
        ValueError: shapes do not fit, an index lies outside [0, C), or an option is out of range. The values of
            ``target`` are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> exact_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.2712, 0.9528])
        >>> exact_loss(s, torch.tensor([0, 2]), log=True, reduction="none").round(decimals=4)
        tensor([0.3164, 3.0544])

    Equation :eq:`acc-exact` of the chapter. Source: EXACT, arXiv 2205.09615; Su Jianlin, scientific spaces 9098 (2022).
    """
    check_reduction(reduction)
    check_ignore_index(ignore_index)
    _check_log(log)
    s, t, counted = _checked(input, target, sigma, nodes, ignore_index)
    gaps = not values_readable(counted) or not bool(counted.all())
    log_p = _log_accuracy(s, t, counted if gaps else None, float(sigma), nodes)
    loss = 0 - log_p if log else 1 - log_p.exp()  # 0 - 0 is 0, and -0 would print as such
    return reduce_loss(loss.masked_fill(~counted, 0), reduction, counted)


def soft_accuracy_loss(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    r"""Expected error under Gumbel noise on the scores: one minus the softmax.

    .. math::

        L = 1 - P\bigl(\operatorname{argmax}_i (s_i + g_i) = t\bigr) = 1 - \operatorname{softmax}(s)_t

    :math:`g_i` are independent standard Gumbel variables. The error comes from the other classes' scores, not from a
    subtraction, so it keeps its digits as it nears 0; the gradient keeps its digits as the loss nears 1, too.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices :math:`t`, shape ``(...)``.
        ignore_index: rows with this target are left out; an int.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores are
        computed in float32, and the loss is float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not of an integer dtype, or ``ignore_index`` is no
            int.
        ValueError: shapes do not fit, an index lies outside [0, C), or an option is out of range. The values of
            ``target`` are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0], [2.0, 1.0, 0.0]])
        >>> soft_accuracy_loss(s, torch.tensor([0, 2]), reduction="none").round(decimals=4)
        tensor([0.3348, 0.9100])

    Equation :eq:`acc-soft` of the chapter. Source: Su Jianlin, scientific spaces 9098 (2022) and 6620 (2019).
    """
    check_reduction(reduction)
    check_ignore_index(ignore_index)
    s, t, counted = _read(input, target, ignore_index)
    if s.shape[-1] == 1:
        loss = _zero(s)
    else:
        t = t.unsqueeze(-1)
        # the target's score goes first, so that a common offset costs no digits; ignored rows may hold anything
        s = (s - s.gather(-1, t)).masked_fill(~counted.unsqueeze(-1), 0)
        # finite, as the slope of logsumexp at infinity is none; unlike in a clamp, NaN keeps its gradient
        s = torch.where(s.isinf(), s.detach().clamp(_LOST, -_LOST), s)
        behind = s.scatter(-1, t, -math.inf).logsumexp(-1)
        # sigmoid(behind); where that nears 1, autograd would find the slope from what is left of 1 and round it away
        loss = torch.where(behind > 0, 1 - torch.sigmoid(-behind), torch.sigmoid(behind))
    return reduce_loss(loss.masked_fill(~counted, 0), reduction, counted)


class ExpectedAccuracy(nn.Module):
    """:func:`expected_accuracy` as a module."""

    def __init__(self, *, sigma: float = 1.0, nodes: int = 32) -> None:
        super().__init__()
        self.sigma = _check_sigma(sigma)
        self.nodes = _check_nodes(nodes)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The probability of each row's target."""
        return expected_accuracy(input, target, sigma=self.sigma, nodes=self.nodes)

    def extra_repr(self) -> str:
        """The options."""
        return f"sigma={self.sigma:g}, nodes={self.nodes}"


class LogExpectedAccuracy(ExpectedAccuracy):
    """:func:`log_expected_accuracy` as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The log-probability of each row's target."""
        return log_expected_accuracy(input, target, sigma=self.sigma, nodes=self.nodes)


class ExactLoss(nn.Module):
    """:func:`exact_loss` as a module; ``sigma`` may be changed between steps, to anneal the noise."""

    def __init__(
        self,
        *,
        sigma: float = 1.0,
        log: bool = False,
        nodes: int = 32,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        self.sigma = _check_sigma(sigma)
        self.log = _check_log(log)
        self.nodes = _check_nodes(nodes)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return exact_loss(
            input,
            target,
            sigma=self.sigma,
            log=self.log,
            nodes=self.nodes,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options."""
        return (
            f"sigma={self.sigma:g}, log={self.log}, nodes={self.nodes}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


class SoftAccuracyLoss(nn.Module):
    """:func:`soft_accuracy_loss` as a module."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of ``input`` and ``target``."""
        return soft_accuracy_loss(input, target, ignore_index=self.ignore_index, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class _LogAccuracy(Function):
    """log P of each row by hand: the gradient comes from the same sweep over the nodes, and no node is kept."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, t: Tensor, counted: Tensor | None, sigma: float, nodes: int) -> Tensor:
        log_p, slope = _sweep(s, t, counted, sigma, nodes, with_slope=ctx.needs_input_grad[0])
        ctx.save_for_backward(s, t, counted, slope)
        ctx.options = sigma, nodes
        return log_p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        s, t, counted, slope = ctx.saved_tensors
        if torch.is_grad_enabled():
            slope = _Slope.apply(s, t, counted, slope, *ctx.options)  # type: ignore[no-untyped-call]
        return g.unsqueeze(-1) * slope, None, None, None, None


class _Slope(Function):
    """The gradient of log P, computed already, and its own derivative."""

    @staticmethod
    def forward(
        ctx: Any, s: Tensor, t: Tensor, counted: Tensor | None, slope: Tensor, sigma: float, nodes: int
    ) -> Tensor:
        ctx.save_for_backward(s, t, counted)
        ctx.options = sigma, nodes
        return slope.view_as(slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        s, t, counted = ctx.saved_tensors
        return _curvature(s, t, counted, v, *ctx.options), None, None, None, None, None


def _log_accuracy(s: Tensor, t: Tensor, counted: Tensor | None, sigma: float, nodes: int) -> Tensor:
    """log P of each row of ``s``, shape (..., C); 0 where ``counted`` is False."""
    rows, classes = s.shape[:-1], s.shape[-1]
    if classes == 1 or s.numel() == 0:
        return _zero(s)
    s, t = s.reshape(-1, classes), t.reshape(-1)
    counted = None if counted is None else counted.reshape(-1)
    if eager(s, t):
        log_p: Tensor = _LogAccuracy.apply(s, t, counted, sigma, nodes)  # type: ignore[no-untyped-call]
    else:
        log_p = _plain(s, t, counted, sigma, nodes)
    return log_p.reshape(rows)


def _plain(s: Tensor, t: Tensor, counted: Tensor | None, sigma: float, nodes: int) -> Tensor:
    """log P of each row in operators that any transform understands; every node is kept for the backward pass."""
    d = _margins(s, t, counted, sigma)
    z, log_w, lost = _place(d.detach(), nodes)
    x = d.unsqueeze(-1) + z
    at = x.detach()
    log_phi, h = _log_ndtr(at, _tail(at))
    # log Phi as its Taylor series at itself: the value and two derivatives are exact, whoever asks for them
    step = x - at
    g = (log_phi + step * (h - step * h * _excess(at, h) / 2)).sum(0) + log_w
    # not torch.logsumexp: where g is huge its weights in the backward pass do not sum to 1
    top = g.detach().amax(-1)
    log_p = top + (g - top.unsqueeze(-1)).exp().sum(-1).log()
    log_p = log_p - log_p.detach().clamp(min=0)  # a probability that rounds past 1 is 1, and keeps its gradient
    log_p = log_p.masked_fill(lost, -math.inf)
    # rows with NaN: the whole gradient is NaN, also where the clamp would stop it
    spoiled = log_p.isnan()
    nan = s.masked_fill(~spoiled.unsqueeze(-1), 0).sum(-1) * math.nan
    return torch.where(spoiled, nan, log_p)


def _margins(s: Tensor, t: Tensor, counted: Tensor | None, sigma: float) -> Tensor:
    """(s_t - s_i) / sigma with the classes first; won at the target itself and in rows that do not count."""
    s = s.mT
    t = t.unsqueeze(0)
    d = ((s.gather(0, t) - s) / sigma).clamp(_LOST, _WON).scatter(0, t, _WON)
    return d if counted is None else d.masked_fill(~counted, _WON)


def _place(d: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's integrand lives: nodes z (rows, nodes), log weights times phi(z), and which rows are lost.

    The logarithm of the integrand is concave. Its mode solves z = sum of h(z + d_i), h = phi / Phi, whose right side
    falls and is convex: Newton's steps from the left never pass the mode.
    """
    lowest = d.amin(0)
    readable = values_readable(d)
    far = not readable or bool((lowest < _FAR).any())
    z = (lowest * -0.5).clamp(min=0)  # the mode for the nearest rival alone lies to the right of here
    for _ in range(_STEPS):
        h, excess = _rough_hazard(d + z, far)
        total, h = h.sum(0), h.mul_(excess)
        bend, h = h.sum(0), h.mul_(excess)
        lam = h.sum(0) / bend.clamp(min=_TINY)
        move = (total - z) / (1 + bend)
        z = z + move
        # what the next step would be, in units of the integrand's width
        if readable and not bool((lam * bend * move * move * torch.rsqrt(1 + bend) > 0.2).any()):
            break
    # Off the mode the hazards sum to a constant plus q e^(-lambda u): the two-point bound with these moments.
    bend = bend * torch.exp(-lam * move)
    reach = min(1.1 * math.sqrt(nodes), 5.7 if d.dtype == torch.float32 else 8.3)
    # The integrand falls by e^(-reach^2 / 2) from the mode to either end. To the right it falls by at least
    # u^2/2 (1 + bend / (1 + lambda u / 2)), solved for u from above.
    right = reach * torch.rsqrt(1 + bend / (1 + lam * (reach / 2)))
    right = reach * torch.rsqrt(1 + bend / (1 + lam * right / 2))
    # To the left by at least u^2/2 (1 + bend), and by u^2/2 - q u + q/lambda (e^(lambda u - u^2/2) - 1) as far as
    # u = lambda, as (log h)'' > -1; beyond that by the tangent, as the fall is convex.
    left = reach * torch.rsqrt(1 + bend)
    fall = reach * reach / 2
    rise = torch.log1p(lam * lam * fall / bend.clamp(min=_TINY) + bend / 2)
    root = lam * lam - 2 * rise
    near = 2 * rise / (lam + root.clamp(min=0).sqrt())
    q = bend / lam.clamp(min=_TINY)
    steep = lam + q * torch.expm1((lam * lam / 2).clamp(max=80))  # e^88 ends float32
    beyond = lam + (fall - lam * lam / 2 - (steep - lam) / lam.clamp(min=_TINY) + bend) / steep.clamp(min=_TINY)
    left = torch.minimum(left, torch.where(root > 0, near, beyond))
    # z = mode + scale (e^(beta u) - 1) meets both ends at u = -1 and 1; the trapezoidal rule in u
    beta = torch.log(right / left).clamp(min=0.01)
    scale = left / -torch.expm1(-beta)
    bu = beta.unsqueeze(-1) * torch.linspace(-1, 1, nodes, dtype=d.dtype, device=d.device)
    x = torch.expm1(bu).mul_(scale.unsqueeze(-1)).add_(z.unsqueeze(-1))
    log_step = torch.log(beta * scale * (2 / (nodes - 1))) - _LOG_SQRT_2PI
    return x, bu.add_(log_step.unsqueeze(-1)).sub_(x * x, alpha=0.5), lowest <= _LOST


def _rough_hazard(x: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """h(x) = phi(x) / Phi(x) and x + h(x), close enough to place nodes by; ``far`` if x may lie left of -12."""
    near = x.clamp(min=_FAR) if far else x
    h = (near * near).mul_(-0.5 * _LOG2_E).exp2_().mul_(2 * _INV_SQRT_2PI).div_((near * -math.sqrt(0.5)).erfc_())
    if not far:
        return h, x + h
    beyond = near - x
    return h + beyond, (near + h) / (1 - beyond / _FAR)


def _log_ndtr(
    x: Tensor, coefficients: Sequence[Tensor], room: Sequence[Tensor | None] = (None,) * 5
) -> tuple[Tensor, Tensor]:
    """log Phi(x) and the hazard phi(x) / Phi(x), to rounding for every x; the coefficients are those of ``_tail``.

    ``room`` holds five tensors like ``x`` to work in, the last of which may be ``x`` itself; the results lie in two of
    them. Where pieces follow each other, that spares the allocator's handing every page back and forth.
    """
    r = torch.abs(x, out=room[0]).add_(4).reciprocal_()
    y = torch.sub(r, 0.125, out=room[1])
    tail = coefficients[0]
    for c in coefficients[1:]:
        tail = torch.addcmul(c, tail, y, out=room[2])
    tail.mul_(r)
    e = torch.clamp(x, min=0, out=room[1])
    e.mul_(e).mul_(-0.5 * _LOG2_E).exp2_()
    tail.mul_(e)  # right of 0: 1 - Phi(x). Left of 0: Phi(x) e^(x^2/2), as e is 1 there
    below = torch.clamp(x, max=0, out=room[0])
    side = torch.sign(below, out=room[3])  # -1 left of 0, 0 right of it
    # log(1 - tail) on the right, log(tail) - x^2/2 on the left. log1p keeps a tail that 1 - tail would round away; the
    # factor, half a rounding short of -1, keeps a tail below 6e-8 from log 0.
    log_phi = torch.add(side, tail, out=room[4]).abs_().mul_(torch.finfo(e.dtype).eps / 2 - 1).log1p_()
    log_phi.sub_(below.mul_(below), alpha=0.5)
    phi = tail.sub_(side.add_(1)).abs_()  # 1 - tail on the right, tail on the left
    return log_phi, e.mul_(_INV_SQRT_2PI).div_(phi)


def _excess(x: Tensor, h: Tensor) -> Tensor:
    """x + h(x), by its continued fraction where that sum would cancel."""
    a = -x.clamp(max=-1)
    return torch.where(x < -50, 1 / (a + 2 / (a + 3 / (a + 4 / a))), x + h)


def _tail(like: Tensor) -> list[Tensor]:
    """Coefficients of the tail in powers of 1 / (a + 4) - 1 / 8, the highest first, as scalars on the device.

    As tensors they halve the passes of the polynomial; filled one by one, no device waits for a copy.
    """
    powers = [c * (-8) ** j for j, c in enumerate(_TAIL[like.dtype])]
    return [torch.full((), c, dtype=like.dtype, device=like.device) for c in reversed(powers)]


def _pieces(total: int, each: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``total`` rows of about one size, none with more numbers than a piece where a row takes ``each``."""
    low, high = _PIECE.get(device.type, _DEVICE_PIECE)
    most = max(1, min(max(total * each // 8, low), high) // each)
    size = math.ceil(total / math.ceil(total / most))
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _blocks(
    s: Tensor, t: Tensor, counted: Tensor | None, sigma: float, nodes: int
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Rows a piece at a time: which, d (classes, rows), z and log weights (rows, nodes), lost."""
    rows, classes = s.shape
    for outer in _pieces(rows, classes, s.device):
        d = _margins(s[outer], t[outer], None if counted is None else counted[outer], sigma).contiguous()
        z, log_w, lost = _place(d, nodes)
        for i in _pieces(d.shape[1], classes * nodes, s.device):
            yield slice(outer.start + i.start, outer.start + i.stop), d[:, i], z[i], log_w[i], lost[i]


def _sweep(
    s: Tensor, t: Tensor, counted: Tensor | None, sigma: float, nodes: int, *, with_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """log P of each row, and its gradient by the scores."""
    log_p = s.new_empty(s.shape[0])
    slope = torch.empty_like(s, memory_format=torch.contiguous_format) if with_slope else None
    coefficients = _tail(s)
    work: list[Tensor] = []
    for i, d, z, log_w, lost in _blocks(s, t, counted, sigma, nodes):
        shape = (*d.shape, nodes)
        if not work or work[0].numel() < math.prod(shape):
            work = [s.new_empty(math.prod(shape)) for _ in range(5)]
        room = [w[: math.prod(shape)].view(shape) for w in work]
        log_phi, h = _log_ndtr(torch.add(d.unsqueeze(-1), z, out=room[4]), coefficients, room)
        weight, value = _normalised(log_phi.sum(0).add_(log_w))
        log_p[i] = value.clamp_(max=0).masked_fill_(lost, -math.inf)
        if slope is not None:
            # d log P / d d_i = E[h(z + d_i)] under the integrand as a density; 0 where log P is -inf
            weight.masked_fill_(lost.unsqueeze(-1), 0)
            slope[i] = _to_scores(h.mul_(weight).sum(-1), t[i], sigma)
    return log_p, slope


def _curvature(s: Tensor, t: Tensor, counted: Tensor | None, v: Tensor, sigma: float, nodes: int) -> Tensor:
    """The second derivatives of log P times ``v``, row by row: Cov[sum v_j h_j, h_i] - v_i E[h_i (x_i + h_i)]."""
    coefficients, out = _tail(s), []
    for i, d, z, log_w, lost in _blocks(s, t, counted, sigma, nodes):
        x = d.unsqueeze(-1) + z
        log_phi, h = _log_ndtr(x, coefficients)
        weight, _ = _normalised(log_phi.sum(0).add_(log_w))
        v_d = ((v[i].gather(1, t[i].unsqueeze(1)) - v[i]) / sigma).mT.unsqueeze(-1)
        a = (h * v_d).sum(0)
        a = a - (weight * a).sum(-1, keepdim=True)
        bent = _to_scores((h * weight * (a - v_d * _excess(x, h))).sum(-1), t[i], sigma)
        out.append(bent.masked_fill_(lost.unsqueeze(-1), 0))
    return torch.cat(out)


def _normalised(g: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and log-sum-exp of ``g`` over the nodes."""
    top = g.amax(-1, keepdim=True)
    weight = g.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    return weight.div_(total), total.log_().add_(top).squeeze(-1)


def _to_scores(g: Tensor, t: Tensor, sigma: float) -> Tensor:
    """A gradient by the margins (classes, rows) as one by the scores (rows, classes)."""
    g = g.mT / sigma
    return g.neg().scatter_(1, t.unsqueeze(1), g.sum(-1, keepdim=True))


def _zero(s: Tensor) -> Tensor:
    """0 for each row, with gradient 0 whatever the scores."""
    return s.sum(-1).masked_fill(torch.ones(s.shape[:-1], dtype=torch.bool, device=s.device), 0)


def _check_sigma(sigma: float) -> float:
    return check_number("sigma", sigma, low=0.0, open_low=True)


def _check_nodes(nodes: int) -> int:
    if isinstance(nodes, bool) or not isinstance(nodes, int):
        raise TypeError(f"nodes must be an int, got {describe(nodes)}")
    if nodes < 8:
        raise ValueError(f"nodes must be at least 8, got {nodes}")
    return nodes


def _check_log(log: bool) -> bool:
    if not isinstance(log, bool):
        raise TypeError(f"log must be True or False, got {describe(log)}")
    return log


def _read(input: Tensor, target: Tensor, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores in the dtype of the computation, targets that may index, and which rows count."""
    s = check_scores(input)
    if s.shape[-1] == 0:
        raise ValueError(f"input must have at least one class in its last dimension, got {describe(input)}")
    counted = check_index_target(target, tuple(s.shape[:-1]), s.shape[-1], ignore_index)
    return s, target.long().masked_fill(~counted, 0), counted


def _checked(
    input: Tensor, target: Tensor, sigma: float, nodes: int, ignore_index: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same, and the options of the integral."""
    _check_sigma(sigma)
    _check_nodes(nodes)
    s, t, counted = _read(input, target, ignore_index)
    tiny = torch.finfo(s.dtype).tiny
    if sigma < tiny:
        raise ValueError(f"sigma must be at least {tiny:.4g}, the smallest normal number of {s.dtype}, got {sigma!r}")
    return s, t, counted
