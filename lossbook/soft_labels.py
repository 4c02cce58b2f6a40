r"""Soft labels for the multi-label softmax: making them, and reading probabilities off the scores.

The loss itself takes soft labels as they are, see :func:`lossbook.multilabel_softmax.multilabel_softmax_loss`. This
module holds what stands around it: :func:`smooth_labels` and :func:`mixup` make soft labels,
:func:`multilabel_probabilities` turns scores into the probabilities that the loss recovers, and
:func:`multilabel_symmetric_kl` compares two predictions of the same sample. A module of the same name wraps each.

Plain torch::

    images, labels, _ = mixup(images, labels)
    loss = multilabel_softmax_loss(model(images), smooth_labels(labels, 0.1))
    loss.backward()

Lightning::

    def training_step(self, batch, batch_idx):
        images, labels, _ = mixup(*batch)
        return multilabel_softmax_loss(self(images), labels)

Hugging Face ``Trainer``::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        return multilabel_softmax_loss(outputs.logits, smooth_labels(labels, 0.1))
    trainer = Trainer(..., compute_loss_func=compute_loss)
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from lossbook._common import (
    check_labels,
    check_mask,
    check_number,
    check_reduction,
    check_scores,
    describe,
    reduce_loss,
)

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

# infinite scores count as this: inf - inf would be NaN where both predictions are sure
_FAR = 1e30


def multilabel_probabilities(input: Tensor, *, threshold: float = 0.0) -> Tensor:
    r"""The probability of each label under the multi-label softmax with soft labels.

    .. math::

        p_i = \sigma\bigl(2\,(s_i - s_0)\bigr)

    The loss of soft labels is stationary where :math:`t_i e^{s_0 - s_i} = (1 - t_i)\, e^{s_i - s_0}`, that is at
    :math:`t_i = p_i`. The factor 2 belongs there: :math:`\sigma(s_i - s_0)` is not calibrated.

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
    return torch.sigmoid(2 * (check_scores(input, rows=False) - s_0))


def smooth_labels(target: Tensor, smoothing: float) -> Tensor:
    r"""Labels moved towards one half.

    .. math::

        \tilde t = t\,(1 - \varepsilon) + \frac{\varepsilon}{2}

    Each label is a choice of two, so the mass :math:`\varepsilon` is shared by two.

    Args:
        target: labels :math:`t` in [0, 1] in any real dtype, any shape.
        smoothing: :math:`\varepsilon` in [0, 1]; 0 changes nothing, 1 makes every label 1/2.

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
    check_labels(target, getattr(target, "shape", ()))
    e = check_number("smoothing", smoothing, low=0.0, high=1.0)
    return _soft(target) * (1 - e) + e / 2


def mixup(
    input: Tensor, target: Tensor, *, alpha: float = 0.2, generator: Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Convex mixtures of the samples of a batch and of their labels.

    .. math::

        \tilde x_i = \lambda x_i + (1 - \lambda)\, x_{\pi(i)}, \qquad
        \tilde t_i = \lambda t_i + (1 - \lambda)\, t_{\pi(i)}, \qquad
        \lambda \sim \operatorname{Beta}(\alpha, \alpha)

    One :math:`\lambda` and one permutation :math:`\pi` serve the whole batch, inputs and labels alike.

    Args:
        input: samples :math:`x`, shape ``(B, ...)``, of a floating dtype.
        target: labels :math:`t` in [0, 1] in any real dtype, shape ``(B, ...)``; multi-hot, not class indices.
        alpha: :math:`\alpha \ge 0`; 0 mixes nothing and draws nothing, 1 draws :math:`\lambda` evenly from [0, 1].
        generator: source of the random numbers; None for torch's own. The draws are made on its device.

    Returns:
        The mixed samples in the dtype of ``input``; the mixed labels, float32 where ``target`` is boolean or integer;
        and :math:`\lambda` as a scalar float32 tensor. float16 and bfloat16 are mixed in float32.

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
    x = _check_batch(input, target)
    a = check_number("alpha", alpha, low=0.0)
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {describe(generator)}")
    if a == 0:
        return input.clone(), _soft(target.clone()), torch.ones((), device=input.device)
    device = input.device if generator is None else generator.device
    lam = _beta(a, device, generator).to(input.device, torch.float32)
    order = torch.randperm(input.shape[0], generator=generator, device=device).to(input.device)

    def mixed(x: Tensor) -> Tensor:
        share = lam.to(x.dtype)
        # no lerp: from infinity to infinity it gives NaN
        return torch.addcmul(x[order] * (1 - share), x, share)

    t = _soft(target)
    half = t.dtype in (torch.float16, torch.bfloat16)
    return mixed(x).to(input.dtype), mixed(t.float() if half else t).to(t.dtype), lam


def multilabel_symmetric_kl(
    input: Tensor, other: Tensor, *, scale: float = 1.0, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    r"""Symmetric Kullback-Leibler divergence of two predictions of independent labels.

    .. math::

        L = \sum_i (p_i - q_i)\, k\, (s_i - r_i), \qquad p = \sigma(k s), \quad q = \sigma(k r)

    Two passes through a network with dropout give two predictions of one sample; R-Drop adds this divergence to the
    loss. Scores of the multi-label softmax with soft labels have :math:`k = 2`. Both arguments carry gradient. Infinite
    scores count as 1e30 / k in size. They take no gradient, but the other score does, a very large one: keep them out.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        other: scores :math:`r`, the shape of ``input``.
        scale: :math:`k > 0`.
        mask: boolean, broadcastable to ``input``; False removes a label, whatever its scores.
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

    Equation :eq:`soft-kl` of the chapter. Source: Su Jianlin, scientific spaces 9039 (2022); R-Drop, arXiv 2106.14448.
    """
    s, r = check_scores(input), check_scores(other, name="other")
    if s.shape != r.shape:
        raise ValueError(f"other must have the shape of input, {tuple(s.shape)}, got {describe(other)}")
    k = check_number("scale", scale, low=0.0, open_low=True)
    check_mask(mask, tuple(s.shape))
    check_reduction(reduction)
    if mask is not None:
        s, r = torch.where(mask, s, 0), torch.where(mask, r, 0)
    s, r = (k * s).clamp(-_FAR, _FAR), (k * r).clamp(-_FAR, _FAR)
    # p - q = tanh((s - r) / 2) (p (1 - q) + q (1 - p)): no subtraction, so that two predictions near 1 keep the digits
    # of their difference and the divergence its sign
    d = s - r
    either = torch.sigmoid(s) * torch.sigmoid(-r) + torch.sigmoid(r) * torch.sigmoid(-s)
    return reduce_loss((torch.tanh(d / 2) * either * d).sum(-1), reduction)


def _soft(target: Tensor) -> Tensor:
    """Labels of a floating dtype."""
    return target if target.is_floating_point() else target.float()


def _check_batch(input: Tensor, target: Tensor) -> Tensor:
    """``input`` in the dtype it is mixed in, or an error."""
    if not isinstance(input, Tensor) or not input.is_floating_point():
        raise TypeError(f"input must be a tensor of samples of a floating dtype, got {describe(input)}")
    check_labels(target, getattr(target, "shape", ()))
    if input.dim() < 1 or target.dim() < 1 or input.shape[0] != target.shape[0]:
        raise ValueError(
            f"input and target must have the same first dimension, the batch, got {describe(input)} and "
            f"{describe(target)}"
        )
    return check_scores(input)


def _beta(a: float, device: torch.device, generator: Generator | None) -> Tensor:
    """One draw from Beta(a, a), float64 where the device has it."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    a = max(a, 1e-30)  # below, lambda is 0 or 1 in either case, and 1 / a might overflow
    # A draw of Gamma(a) is one of Gamma(a + 1) times u^(1/a). Small a make it underflow, so take its logarithm.
    gamma = torch._standard_gamma(torch.full((2,), a + 1, dtype=dtype, device=device), generator=generator)
    u = 1 - torch.rand(2, dtype=dtype, device=device, generator=generator)  # above 0
    x, y = (gamma.log() + u.log() / a).unbind()
    return torch.sigmoid(x - y)


class MultilabelProbabilities(nn.Module):
    """:func:`multilabel_probabilities` as a module."""

    def __init__(self, *, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = check_number("threshold", threshold)

    def forward(self, input: Tensor) -> Tensor:
        """The probabilities of ``input``."""
        return multilabel_probabilities(input, threshold=self.threshold)

    def extra_repr(self) -> str:
        """The options."""
        return f"threshold={self.threshold:g}"


class SmoothLabels(nn.Module):
    """:func:`smooth_labels` as a module."""

    def __init__(self, smoothing: float) -> None:
        super().__init__()
        self.smoothing = check_number("smoothing", smoothing, low=0.0, high=1.0)

    def forward(self, target: Tensor) -> Tensor:
        """The smoothed labels."""
        return smooth_labels(target, self.smoothing)

    def extra_repr(self) -> str:
        """The options."""
        return f"smoothing={self.smoothing:g}"


class Mixup(nn.Module):
    """:func:`mixup` as a module. In evaluation mode it mixes nothing: lambda is 1."""

    def __init__(self, *, alpha: float = 0.2, generator: Generator | None = None) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, low=0.0)
        self.generator = generator

    def forward(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mixed samples, the mixed labels and lambda."""
        if self.training:
            return mixup(input, target, alpha=self.alpha, generator=self.generator)
        _check_batch(input, target)
        return input, _soft(target), torch.ones((), device=input.device)

    def extra_repr(self) -> str:
        """The options."""
        return f"alpha={self.alpha:g}"


class MultilabelSymmetricKl(nn.Module):
    """:func:`multilabel_symmetric_kl` as a module."""

    def __init__(self, *, scale: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.scale = check_number("scale", scale, low=0.0, open_low=True)
        self.reduction = reduction

    def forward(self, input: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """The divergence of ``input`` and ``other``."""
        return multilabel_symmetric_kl(input, other, scale=self.scale, mask=mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options."""
        return f"scale={self.scale:g}, reduction={self.reduction!r}"
