r"""Earth mover distance between a predicted and a wanted distribution over words (EMO).

Cross-entropy asks how likely the wanted word is and ignores which other words got the rest. These losses charge a
probability :math:`p_i` by how far word :math:`i` lies from the wanted word, measured with fixed word vectors.

The word vectors come from a trained model and stay as they are, such as
``model.get_input_embeddings().weight.detach().clone()``: if they learned along, every distance would become 0.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lossbook._checks import (
    Reduction,
    check_classes,
    check_integer,
    check_layer,
    check_linear_options,
    check_reduction,
    check_scores,
    check_target,
    check_vectors,
)
from lossbook._common import LossModule, finite, if_counted, one_hot, reduce_loss, rest_margin, rest_margins, softplus
from lossbook._fast.emo import emo_fast, linear_emo, linear_scores
from lossbook._torch import beside, full_precision

__all__ = [
    "EmoCeLoss",
    "EmoLoss",
    "LinearEmoCeLoss",
    "LinearEmoLoss",
    "emo_ce_loss",
    "emo_loss",
    "linear_emo_ce_loss",
    "linear_emo_loss",
]

Sums = Literal["float32", "weight"]

# ------------------------------------------------------------------------------------------------------- the formulas
# Scores s (..., C); target indices (...) or a distribution (..., C); embedding e (C, D). Rows not counted give 0.


def emo_rows(s: Tensor, target: Tensor, counted: Tensor | None, embedding: Tensor) -> Tensor:
    """EMO of each row: sum_i p_i c_i = c_m + sum_i p_i (c_i - c_m), m the most probable word."""
    p = finite(if_counted(s, counted)).softmax(-1)
    c = costs(target, unit_vectors(embedding, s.dtype))
    # where p_m is next to 1 its gradient p_m (c_m - L) would cancel
    c_m = c.gather(-1, p.detach().argmax(-1, keepdim=True))
    return if_counted(c_m.squeeze(-1) + (p * (c - c_m)).sum(-1), counted)


def emo_ce_rows(s: Tensor, target: Tensor, counted: Tensor | None, embedding: Tensor) -> Tensor:
    """(CE + sg(CE / EMO) EMO) / 2 of each row."""
    s = finite(if_counted(s, counted))
    emo = emo_rows(s, target, counted, embedding)
    if target.is_floating_point():
        ce = (target * softplus(rest_margins(s))).sum(-1)  # -sum_j tau_j log p_j
    else:
        ce = softplus(rest_margin(s, target))  # -log p_t
    # EMO = 0 makes the ratio infinite, and above 1e30 it overflows float32
    regular = emo > 1e-30 * ce
    ratio = torch.where(regular, ce / emo, 0).detach()
    loss = (ce + torch.where(regular, ratio * emo, ce.detach())) / 2
    return if_counted(loss, counted)


def costs(target: Tensor, u: Tensor) -> Tensor:
    """c_i = sum_j tau_j (1 - cos(e_i, e_j)) of every word from the unit vectors u."""
    terms = u.shape[1]
    if target.is_floating_point():
        target = target.to(u.dtype)
        c = target.sum(-1, keepdim=True) - (target @ u) @ u.mT
        c = c - target * ~u.any(-1)  # a zero row costs nothing to itself
        terms = max(u.shape)
    else:
        c = 1 - F.embedding(target, u) @ u.mT
        c = c.masked_fill(one_hot(target, len(u)), 0)  # exactly
    # What parallel vectors come out at; the composition would scale it up.
    return c.masked_fill(c <= 4 * torch.finfo(c.dtype).eps * terms**0.5, 0)


def unit_vectors(embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """e_i / |e_i|, and 0 where the norm is below the smallest normal number."""
    e = embedding.to(dtype)
    # by the largest number first: the squares of others leave float32
    e = e / e.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)
    norm = torch.linalg.vector_norm(e, dim=-1, keepdim=True)
    return torch.where(norm < 1, 0, e / norm)


def linear_rows(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, counted: Tensor, embedding: Tensor, *options: Any
) -> Tensor:
    """The loss of each row of hidden states h, with the scores of all of them."""
    with_ce, scale, softcap, _, _, dtype = options
    with full_precision(h.device):
        s = linear_scores(h, w, b, counted, scale, softcap, dtype)
        return (emo_ce_rows if with_ce else emo_rows)(s, target, counted, embedding)


# ---------------------------------------------------------------------------------------------------------- the losses


def emo_loss(
    input: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Expected distance between the predicted word and the wanted one.

    .. math::

        L = \sum_i p_i\, c_{it}, \qquad p = \operatorname{softmax}(s), \qquad c_{it} = 1 - \cos(e_i, e_t)

    With one wanted word there is one way to move the mass: this is the earth mover distance, in [0, 2]. Soft targets
    :math:`\tau` are charged for the product plan, :math:`\sum_{i,j} p_i\, \tau_j\, c_{ij}`, an upper bound. The
    gradient is :math:`\partial L / \partial s_i = p_i\,(c_{it} - L)`.

    A zero row of ``embedding`` has cosine 0 with every other row and 1 with itself; a row whose norm is below the
    smallest normal number of the loss's dtype counts as zero. The costs are computed in the dtype of the loss. A cost
    of at most :math:`4 \epsilon \sqrt{D}` (soft targets: :math:`\sqrt{\max(D, C)}`), with the dtype's machine epsilon,
    may be rounding alone and counts as 0. Infinite scores count as :math:`\pm 10^{30}`; NaN gives NaN. A language model
    predicts the *next* word: pass the scores of places 0 to T - 2 with the words 1 to T - 1.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices of any integer dtype, shape ``(...)``; or a distribution :math:`\tau` of any floating
            dtype, shape ``(..., C)``, a constant that is never rescaled.
        embedding: finite word vectors :math:`e`, shape ``(C, D)``; constants, they get no gradient. Where they share a
            direction all costs are near 0: subtract their mean first.
        ignore_index: rows with this index target are left out, whatever their scores. Soft targets know none.
        dim: the dimension of the classes in ``input`` and in a soft target.
        reduction: ``"mean"`` over the rows that count (0 where none does), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores are
        computed in float32, also under autocast, and the loss is float32; the gradient has the dtype of the scores.

    Raises:
        TypeError: ``input`` or ``embedding`` is no dense floating tensor, or ``target`` neither indices nor floating.
        ValueError: shapes do not fit, an index lies outside [0, C), a soft target outside [0, 1] by more than 1e-4,
            does not sum to 1 within 0.01 or requires a gradient. Values are looked at on the CPU only.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0]])
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(emo_loss(s, torch.tensor([0]), e).item(), 4))
        0.278
        >>> print(round(emo_loss(s, torch.tensor([[0.5, 0.5, 0.0]]), e).item(), 4))
        0.344

    Equation :eq:`emo-loss` of the chapter, for soft targets :eq:`emo-soft`; costs :eq:`emo-cosine`,
    :eq:`emo-zero-row` and :eq:`emo-rounding`, gradient :eq:`emo-gradient`. Source: Su Jianlin, scientific spaces 9797
    (2023); EMO, arXiv 2310.04691.
    """
    return _scores_loss(False, input, target, embedding, ignore_index, dim, reduction)


def emo_ce_loss(
    input: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy and earth mover distance, scaled to the same size in every row.

    .. math::

        L = \tfrac12 \left( \mathrm{CE} + \operatorname{sg}\!\left(\frac{\mathrm{CE}}{\mathrm{EMO}}\right)
        \mathrm{EMO} \right)

    ``sg`` stops the gradient. So the value of a row is its cross-entropy, and the gradient is
    :math:`\tfrac12 (\nabla \mathrm{CE} + \tfrac{\mathrm{CE}}{\mathrm{EMO}} \nabla \mathrm{EMO})`: not the gradient of
    the value, and numerical differentiation finds another. The push on the wanted word is free of the costs, and a
    wrong word rises where :math:`c_{it} < \mathrm{EMO}\,(1 - 1 / \mathrm{CE})`. Where EMO is not above 1e-30 of CE it
    adds no gradient, since the ratio would be infinite: where all probable words are parallel.

    Args, Returns and Raises are those of :func:`emo_loss`.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> loss = emo_ce_loss(s, torch.tensor([0]), e)
        >>> print(round(loss.item(), 4), round(F.cross_entropy(s, torch.tensor([0])).item(), 4))
        0.4076 0.4076
        >>> loss.backward()
        >>> print([round(g, 4) for g in s.grad[0].tolist()])
        [-0.303, 0.1443, 0.1587]

    Equation :eq:`emo-compose` of the chapter, gradient :eq:`emo-compose-gradient`, the words that rise
    :eq:`emo-lift`. Source: Su Jianlin, scientific spaces 9797 (2023); EMO, arXiv 2310.04691.
    """
    return _scores_loss(True, input, target, embedding, ignore_index, dim, reduction)


def linear_emo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
    accumulate: Sums = "float32",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r""":func:`emo_loss` of ``hidden @ weight.T + bias`` without ever holding all those scores.

    .. math::

        L = \sum_i p_i\, c_{it}, \qquad p = \operatorname{softmax}(W h + b), \qquad c_{it} = 1 - \cos(e_i, e_t)

    With ``logit_scale`` :math:`a` the scores are :math:`a (W h + b)`; with ``logit_softcap`` :math:`k` these become
    :math:`k \tanh(s / k)`.

    The rows pass in equal chunks of at most ``chunk_size``, or of as many as have :math:`1.5 \cdot 2^{20}` scores:
    these few are held at once. With ``"mean"`` and ``"sum"`` the forward pass of a chunk computes its gradients too, as
    :math:`\partial L / \partial s_i = p_i (c_{it} - L)` needs nothing from later on; with ``"none"`` the backward pass
    computes each chunk a second time. Beside inputs, gradient of ``hidden`` and a few numbers a row, this holds at most

    .. math::

        \max\bigl(g\, C H + b\, n\, C + r,\; (g + w)\, C H\bigr) \text{ bytes}, \qquad
        r = 16 \max(64\, C,\; 2^{22}) ,

    with :math:`n` the rows of a chunk, :math:`b` the bytes of a score and :math:`w` those of a number of ``weight`` (2
    in bfloat16), :math:`g` those of a number in which the gradient of ``weight`` adds up: 4 with
    ``accumulate="float32"``, :math:`w` with ``"weight"``; where :math:`g = w`, the second term is :math:`g\, C H`. A
    weight of another dtype than the scores is copied: :math:`b\, C H` more. ``torch.compile`` and ``torch.export`` take
    all this as one operator, for any number of rows.

    All scores are held under ``torch.func``, in forward mode, in a second differentiation (``create_graph=True``) and
    with soft targets under ``torch.compile``. Soft targets, which are as large as all scores, are computed twice chunk
    by chunk, and their gradients add up in the layer's dtype.

    The scores are the layer's own: in the dtype of ``hidden``, and under autocast in autocast's dtype, as
    ``torch.nn.functional.linear`` gives them. float16 and bfloat16 hidden states take a float32 weight as well, which
    is rounded for the product; its gradient is float32. The loss is computed in float32 as in :func:`emo_loss`.

    Args:
        hidden: hidden states :math:`h`, shape ``(..., H)``.
        weight: output weights :math:`W`, shape ``(C, H)``.
        target: class indices, shape ``(...)``; or a distribution, floating, shape ``(..., C)``; a constant.
        embedding: word vectors :math:`e`, shape ``(C, D)``; constants, they get no gradient. May be ``weight`` itself.
        bias: output biases :math:`b`, shape ``(C,)``.
        logit_scale: what the scores are multiplied by. A scale that learns goes into ``hidden``.
        logit_softcap: bound of the scores, as in Gemma, above 0.
        chunk_size: how many rows of scores are held at most, beyond those few.
        accumulate: ``"float32"`` (float64 for float64 layers) or ``"weight"``, the dtype of ``weight``: less memory,
            and rounding after each chunk. In float16 the sum of a few thousand rows may overflow.
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        As :func:`emo_loss`.

    Raises:
        TypeError: as :func:`emo_loss`; the dtypes of the layer do not fit; ``weight`` or ``bias`` is a sharded DTensor,
            as FSDP2 leaves it outside the module's forward.
        ValueError: as :func:`emo_loss`; an option is out of its range.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> t = torch.tensor([0, 1])
        >>> print(round(linear_emo_loss(h, w, t, e, chunk_size=1).item(), 4))
        0.3509
        >>> print(round(emo_loss(F.linear(h, w), t, e).item(), 4))
        0.3509

    Equation :eq:`emo-linear` of the chapter. Source: Su Jianlin, scientific spaces 9797 (2023); EMO, arXiv 2310.04691.
    """
    options = check_linear_options(logit_scale, logit_softcap, chunk_size, accumulate)
    tensors = (hidden, weight, bias, target, embedding)
    return _linear_loss(*tensors, ignore_index, reduction, False, *options.values())


def linear_emo_ce_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
    accumulate: Sums = "float32",
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r""":func:`emo_ce_loss` of ``hidden @ weight.T + bias`` without ever holding all those scores.

    .. math::

        L = \tfrac12 \left( \mathrm{CE} + \operatorname{sg}\!\left(\frac{\mathrm{CE}}{\mathrm{EMO}}\right)
        \mathrm{EMO} \right), \qquad s = W h + b

    Args, Returns, Raises, memory and dtypes are those of :func:`linear_emo_loss`.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(linear_emo_ce_loss(h, w, torch.tensor([0, 1]), e).item(), 4))
        0.4795

    Equation :eq:`emo-linear-compose` of the chapter. Source: Su Jianlin, scientific spaces 9797 (2023); EMO, arXiv
    2310.04691.
    """
    options = check_linear_options(logit_scale, logit_softcap, chunk_size, accumulate)
    tensors = (hidden, weight, bias, target, embedding)
    return _linear_loss(*tensors, ignore_index, reduction, True, *options.values())


class EmoLoss(LossModule):
    """:func:`emo_loss` as a module with the same options.

    Example:
        >>> EmoLoss(reduction="sum")(torch.zeros(2, 4), torch.tensor([0, 3]), torch.eye(4))
        tensor(1.5000)
    """

    def __init__(self, *, ignore_index: int = -100, dim: int = -1, reduction: Reduction = "mean") -> None:
        super().__init__(**_options(reduction, ignore_index=ignore_index, dim=dim))

    def forward(self, input: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """The loss of scores ``(..., C)`` with word vectors ``(C, D)``."""
        return emo_loss(input, target, embedding, **self.options)


class EmoCeLoss(LossModule):
    """:func:`emo_ce_loss` as a module with the same options.

    Example:
        >>> EmoCeLoss()(torch.zeros(2, 4), torch.tensor([0, 3]), torch.eye(4))
        tensor(1.3863)
    """

    def __init__(self, *, ignore_index: int = -100, dim: int = -1, reduction: Reduction = "mean") -> None:
        super().__init__(**_options(reduction, ignore_index=ignore_index, dim=dim))

    def forward(self, input: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """The loss of scores ``(..., C)`` with word vectors ``(C, D)``."""
        return emo_ce_loss(input, target, embedding, **self.options)


class _LinearLoss(LossModule):
    def __init__(
        self,
        *,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        chunk_size: int = 1024,
        accumulate: Sums = "float32",
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> None:
        sizes = (logit_scale, logit_softcap, chunk_size, accumulate)
        rest = _options(reduction, ignore_index=ignore_index)
        super().__init__(**check_linear_options(*sizes), **rest)


class LinearEmoLoss(_LinearLoss):
    """:func:`linear_emo_loss` as a module with the same options.

    Example:
        >>> LinearEmoLoss(chunk_size=1)(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]), torch.eye(4))
        tensor(0.7500)
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, embedding: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states ``(..., H)`` with output weights ``(C, H)`` and word vectors ``(C, D)``."""
        tensors = (hidden, weight, target, embedding)
        return linear_emo_loss(*tensors, bias=bias, **self.options)


class LinearEmoCeLoss(_LinearLoss):
    """:func:`linear_emo_ce_loss` as a module with the same options.

    Example:
        >>> LinearEmoCeLoss()(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]), torch.eye(4))
        tensor(1.3863)
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, embedding: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states ``(..., H)`` with output weights ``(C, H)`` and word vectors ``(C, D)``."""
        tensors = (hidden, weight, target, embedding)
        return linear_emo_ce_loss(*tensors, bias=bias, **self.options)


# ----------------------------------------------------------------------------------------------- from arguments to rows


def _scores_loss(
    with_ce: bool, input: Tensor, target: Tensor, embedding: Tensor, ignore_index: int, dim: int, reduction: str
) -> Tensor:
    check_reduction(reduction)
    s = check_scores(input, dim=dim)
    e = beside(check_vectors(embedding, check_classes(s)), s)
    target, counted = check_target(target, input.shape, ignore_index, dim)
    with full_precision(s.device):
        formula = emo_ce_rows if with_ce else emo_rows
        loss = emo_fast(formula, s, target, counted, e, with_ce=with_ce)
        return reduce_loss(loss, reduction, counted)


def _linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    embedding: Tensor,
    ignore_index: int,
    reduction: str,
    *linear: Any,
) -> Tensor:
    check_reduction(reduction)
    *first, accumulate = linear
    options = (*first, accumulate == "float32", check_layer(hidden, weight, bias))
    e = check_vectors(embedding, len(weight))
    shape = (*hidden.shape[:-1], len(weight))
    target, counted = check_target(target, shape, ignore_index)
    t = target.reshape(-1, *target.shape[hidden.dim() - 1 :])
    loss = linear_emo(hidden, weight, bias, t, counted, e, reduction == "none", options)
    if loss.dim() == 1:
        return reduce_loss(loss.reshape(hidden.shape[:-1]), reduction, counted)
    n = max(len(t), 1) if counted is None else counted.sum().clamp(min=1)
    return loss if reduction == "sum" else loss / n


def _options(reduction: str, **integers: int) -> dict[str, Any]:
    checked: dict[str, Any] = {n: check_integer(n, v) for n, v in integers.items()}
    return {**checked, "reduction": check_reduction(reduction)}
