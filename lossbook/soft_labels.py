r"""Soft labels for the multi-label softmax: making them, and reading probabilities off the scores.

The loss itself takes soft labels as they are, see :func:`lossbook.multilabel_softmax.multilabel_softmax_loss`. This
module holds what stands around it: :func:`smooth_labels` and :func:`mixup` make soft labels,
:func:`multilabel_probabilities` turns scores into the probabilities that the loss recovers, and
:func:`multilabel_symmetric_kl` compares two predictions of the same sample. A module of the same name wraps each. The
page Recipes shows how to train with them.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lossbook._checks import (
    HALF,
    check_floating,
    check_integer,
    check_labels,
    check_mask,
    check_number,
    check_reduction,
    check_scores,
    describe,
)
from lossbook._common import LossModule, finite, reduce_loss, sigmoid
from lossbook._fast.soft_labels import two_predictions
from lossbook._torch import standard_gamma

__all__ = [
    "Mixup",
    "MultilabelProbabilities",
    "MultilabelSymmetricKl",
    "SmoothLabels",
    "mixup",
    "multilabel_probabilities",
    "multilabel_symmetric_kl",
    "smooth_labels",
]


def multilabel_probabilities(input: Tensor, *, threshold: float = 0.0) -> Tensor:
    r"""The probability of each label under the multi-label softmax with soft labels.

    .. math::

        p_i = \sigma\bigl(2\,(s_i - s_0)\bigr)

    The loss of soft labels is stationary where :math:`t_i e^{s_0 - s_i} = (1 - t_i)\, e^{s_i - s_0}`, that is at
    :math:`t_i = p_i`. The factor 2 belongs there: :math:`\sigma(s_i - s_0)` is not calibrated. Read so where each
    target is itself the chance, as a teacher's probability is. Where the doubt lies between rows, as with hard labels
    and with hard labels that smoothing or mixup has softened, fit the factor: :func:`lossbook.metrics.fit_scale`.

    Args:
        input: scores :math:`s`, any shape.
        threshold: the score :math:`s_0` that the loss was given.

    Returns:
        Probabilities in the shape of ``input``. float16 and bfloat16 scores are computed in float32, and the
        probabilities are float32.

    Raises:
        TypeError: ``input`` is not a floating tensor, or ``threshold`` is no number.
        ValueError: ``threshold`` is not finite.

    Example:
        >>> multilabel_probabilities(torch.tensor([-1.0, 0.0, 2.0])).round(decimals=4)
        tensor([0.1192, 0.5000, 0.9820])

    Equation :eq:`soft-probability` of the chapter. Source: Su Jianlin, scientific spaces 9064 (2022).
    """
    s_0 = check_number("threshold", threshold)
    return sigmoid(2 * (check_scores(input, rows=False) - s_0))


def smooth_labels(target: Tensor, smoothing: float, *, mask: Tensor | None = None) -> Tensor:
    r"""Labels moved towards one half.

    .. math::

        \tilde t = t\,(1 - \varepsilon) + \frac{\varepsilon}{2}

    Each label is a choice of two, so the mass :math:`\varepsilon` is shared by two. Name a label that is masked by a
    score of -1e12 in ``mask`` instead, here and in the loss: smoothed, it asks for a score of its own.

    Args:
        target: labels :math:`t` in [0, 1] in any real dtype, any shape. What rounding left outside by at most 1e-4 is
            clamped.
        smoothing: :math:`\varepsilon` in [0, 1]; 0 changes nothing, 1 makes every label 1/2.
        mask: boolean, broadcastable to ``target``; where it is False the label is unknown and stays as it is.

    Returns:
        Soft labels in the shape of ``target`` and its dtype; labels of a boolean or integer dtype become float32.

    Raises:
        TypeError: ``target`` is not a real tensor, or ``smoothing`` is no number.
        ValueError: a label lies outside [0, 1], or ``smoothing`` does. The values of ``target`` are checked on CPU
            tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> smooth_labels(torch.tensor([0, 1, 1]), 0.1)
        tensor([0.0500, 0.9500, 0.9500])

    Equation :eq:`soft-smooth` of the chapter. Source: Su Jianlin, scientific spaces 9064 (2022); label smoothing, arXiv
    1512.00567.
    """
    mask = check_mask(mask, getattr(target, "shape", ()))
    t = read_labels(target, mask)
    e = check_number("smoothing", smoothing, low=0.0, high=1.0)
    smooth = t * (1 - e) + e / 2
    if mask is None:
        return smooth
    return torch.where(mask, smooth, target.to(smooth.dtype))


def mixup(
    input: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.2,
    generator: Generator | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    r"""Convex mixtures of the samples of a batch and of their labels.

    .. math::

        \tilde x_i = \lambda x_i + (1 - \lambda)\, x_{\pi(i)}, \qquad
        \tilde t_i = \lambda t_i + (1 - \lambda)\, t_{\pi(i)}, \qquad
        \lambda \sim \operatorname{Beta}(\alpha, \alpha)

    One :math:`\lambda` and one permutation :math:`\pi` serve the whole batch, inputs and labels alike; a row may meet
    itself. Small :math:`\alpha` puts :math:`\lambda` near 0 or 1, large :math:`\alpha` near one half. Gradients flow
    through samples and labels. Samples must be finite where :math:`\lambda` may be exactly 0 or 1: 0 times infinity is
    NaN.

    Args:
        input: samples :math:`x`, shape ``(B, ...)``, of a floating dtype.
        target: labels :math:`t` in [0, 1] in any real dtype, shape ``(B, ...)``; multi-hot, not class indices.
        alpha: :math:`\alpha \ge 0`; 0 mixes nothing and draws nothing, 1 draws :math:`\lambda` evenly from [0, 1].
        generator: source of the random numbers; None for torch's own. The draws are made on its device.
        mask: boolean, broadcastable to ``target``; False marks a label that is unknown, whatever stands there. A mixed
            label is known where both of its labels are.

    Returns:
        The mixed samples in the dtype of ``input``; the mixed labels, float32 where ``target`` is boolean or integer;
        and :math:`\lambda` as a scalar float32 tensor. float16 and bfloat16 are mixed in float32. With ``mask`` a
        fourth: the mask of the mixed labels, which are 0 where it is False.

    Raises:
        TypeError: ``input`` is not a floating tensor, ``target`` is not a real tensor, ``alpha`` is no number, or
            ``generator`` is no generator.
        ValueError: the batches differ in size, a label lies outside [0, 1], or ``alpha`` is negative. The values of
            ``target`` are checked on CPU tensors only: on an accelerator the check would wait for the device.

    Example:
        >>> x, t = torch.tensor([[0.0], [10.0]]), torch.tensor([[1, 0], [0, 1]])
        >>> generator = torch.Generator().manual_seed(5)
        >>> mixed_x, mixed_t, lam = mixup(x, t, alpha=1.0, generator=generator)
        >>> bool(mixed_x[1] == 10 * mixed_t[1, 1])
        True

    Equation :eq:`soft-mixup` of the chapter. Source: Su Jianlin, scientific spaces 9064 (2022); mixup, arXiv
    1710.09412.
    """
    x, t, known = read_batch(input, target, mask)
    a = check_number("alpha", alpha, low=0.0)
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {describe(generator)}",
        )
    n, here = len(input), input.device
    lam, order = torch.ones((), device=here), torch.arange(n, device=here)
    if a > 0:
        device = here if generator is None else generator.device
        lam = beta(a, device, generator).to(here, torch.float32)
        order = torch.randperm(n, generator=generator, device=device).to(here)

    def mixed(x: Tensor) -> Tensor:
        if a == 0:
            return x.clone()
        share = lam.to(x.dtype)
        return torch.addcmul(x[order] * (1 - share), x, share)  # lerp of inf is NaN

    y = mixed(t.float() if t.dtype in HALF else t).to(t.dtype)
    result = mixed(x).to(input.dtype), y, lam
    if known is None:
        return result
    known = known & known[order]
    return result[0], y.masked_fill(~known, 0), lam, known


def multilabel_symmetric_kl(
    input: Tensor,
    other: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    dim: int = -1,
    reduction: str = "mean",
) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two predictions of independent labels.

    .. math::

        L = \sum_i (p_i - q_i)\, k\, (s_i - r_i), \qquad p = \sigma(k s), \quad q = \sigma(k r)

    Two passes through a network with dropout give two predictions of one sample; R-Drop adds this divergence to the
    loss. Scores of the multi-label softmax have :math:`k = 2` with soft labels that are chances, those of BCE have
    :math:`k = 1`. Both arguments carry gradient. The sum over many labels outweighs a loss whose pushes are bounded, so
    try small weights first. Infinite scores count as 1e30 in size: two of one sign have divergence 0, and against a
    finite score of probability :math:`q` that of +inf is :math:`(1 - q)\, k\, 10^{30}`, with a gradient of such a size
    for the finite score. Mask such labels.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        other: scores :math:`r`, the shape of ``input``.
        scale: :math:`k > 0`.
        mask: boolean, broadcastable to ``input``; False removes a label, whatever its scores. A row without labels does
            not count in the mean.
        dim: the dimension of the labels.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"``; never negative. float16 and bfloat16 scores are computed
        in float32, and the divergence is float32.

    Raises:
        TypeError: ``input`` or ``other`` is not a floating tensor, ``mask`` is not boolean, or ``scale`` is no number.
        ValueError: the shapes do not fit, or an option is out of range.

    Example:
        >>> s, r = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, -1.0]])
        >>> print(round(multilabel_symmetric_kl(s, r).item(), 4))
        0.1497

    Equation :eq:`soft-kl` of the chapter's evidence. Source: Su Jianlin, scientific spaces 9039 (2022); R-Drop, arXiv
    2106.14448.
    """
    s, r = check_scores(input, dim=dim), check_scores(other, name="other", dim=dim)
    if input.shape != other.shape:
        wanted = f"the shape of input, {tuple(input.shape)}"
        raise ValueError(f"other must have {wanted}, got {describe(other)}")
    k = check_number("scale", scale, low=0.0, open_low=True)
    m = check_mask(mask, input.shape, dim)
    check_reduction(reduction)
    if m is not None:
        s, r = s.masked_fill(~m, 0), r.masked_fill(~m, 0)

    def formula(s: Tensor, r: Tensor) -> Tensor:
        s, r = finite(s), finite(r)
        d = k * (s - r)
        (p, not_p), (q, not_q) = probabilities(k * s), probabilities(k * r)
        gap = torch.tanh(d / 2) * (p * not_q + q * not_p)  # p - q without cancellation
        return (with_value(p - q, gap) * d).sum(-1)

    dtype = torch.promote_types(s.dtype, r.dtype)
    loss = two_predictions(formula, s.to(dtype), r.to(dtype), k)
    return reduce_loss(loss, reduction, None if m is None else m.any(-1))


def probabilities(x: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`p = \sigma(x)` and :math:`1 - p`, both exact, with exact derivatives of every order."""
    least = torch.sigmoid(torch.where(x > 0, -x, x))
    most = 1 - least
    return torch.where(x > 0, most, least), torch.where(x > 0, least, most)


def with_value(x: Tensor, value: Tensor) -> Tensor:
    """``value``, with the derivatives of ``x``."""
    x = x.clone()
    x.detach().copy_(value.detach())
    return x


def read_labels(target: Tensor, mask: Tensor | None) -> Tensor:
    """Labels in a floating dtype, clamped where rounding left them outside [0, 1]; a gradient passes through."""
    fixed = target.detach() if isinstance(target, Tensor) else target
    t = check_labels(fixed, getattr(target, "shape", ()), mask=mask)
    if not t.is_floating_point():
        return t.float()
    return target if t is fixed else torch.where(t == target, target, t)


def read_batch(input: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """``input`` in the dtype it is mixed in, labels with 0 for unknown ones, and the mask in their shape."""
    check_floating(input, "input", what=" of samples")
    mask = check_mask(mask, getattr(target, "shape", ()))
    t = read_labels(target, mask)
    if input.dim() < 1 or t.dim() < 1 or len(input) != len(t):
        raise ValueError(
            "input and target must have the same first dimension, the batch, got "
            f"{describe(input)} and {describe(target)}"
        )
    x = check_scores(input, rows=False)
    if mask is None:
        return x, t, None
    mask = mask.expand(t.shape)
    return x, t.masked_fill(~mask, 0), mask


def beta(a: float, device: torch.device, generator: Generator | None) -> Tensor:
    """One draw from Beta(a, a), float64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    a = max(a, 1e-30)  # below, lambda is 0 or 1 in either case; 1 / a might overflow
    # A draw of Gamma(a) is one of Gamma(a + 1) times u^(1/a).
    # Small a make it underflow, so take its logarithm.
    shape = torch.full((2,), a + 1, dtype=dtype, device=device)
    gamma = standard_gamma(shape, generator)
    u = 1 - torch.rand(2, dtype=dtype, device=device, generator=generator)  # above 0
    x, y = (gamma.log() + u.log() / a).unbind()
    return torch.sigmoid(x - y)


class MultilabelProbabilities(LossModule):
    """:func:`multilabel_probabilities` as a module."""

    def __init__(self, *, threshold: float = 0.0) -> None:
        super().__init__(threshold=check_number("threshold", threshold))

    def forward(self, input: Tensor) -> Tensor:
        """The probabilities of ``input``."""
        return multilabel_probabilities(input, **self.options)


class SmoothLabels(LossModule):
    """:func:`smooth_labels` as a module."""

    def __init__(self, smoothing: float) -> None:
        smoothing = check_number("smoothing", smoothing, low=0.0, high=1.0)
        super().__init__(smoothing=smoothing)

    def forward(self, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """The smoothed labels."""
        return smooth_labels(target, mask=mask, **self.options)


class Mixup(LossModule):
    """:func:`mixup` as a module. In evaluation mode it mixes nothing: lambda is 1."""

    def __init__(self, *, alpha: float = 0.2, generator: Generator | None = None) -> None:
        super().__init__(alpha=check_number("alpha", alpha, low=0.0))
        self.generator = generator

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """The mixed samples, the mixed labels, lambda and, with ``mask``, the mixed mask."""
        if self.training:
            options = {"generator": self.generator, **self.options}
            return mixup(input, target, mask=mask, **options)
        _, t, known = read_batch(input, target, mask)
        found = input, t, torch.ones((), device=input.device)
        return found if known is None else (*found, known)


class MultilabelSymmetricKl(LossModule):
    """:func:`multilabel_symmetric_kl` as a module."""

    def __init__(self, *, scale: float = 1.0, dim: int = -1, reduction: str = "mean") -> None:
        scale = check_number("scale", scale, low=0.0, open_low=True)
        dim, reduction = check_integer("dim", dim), check_reduction(reduction)
        super().__init__(scale=scale, dim=dim, reduction=reduction)

    def forward(self, input: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """The divergence of ``input`` and ``other``."""
        return multilabel_symmetric_kl(input, other, mask=mask, **self.options)
