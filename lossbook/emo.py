r"""Earth mover distance between a predicted and a wanted distribution over words (EMO).

Cross-entropy asks how likely the wanted word is and ignores which other words got the rest. These losses charge a
probability :math:`p_i` by how far word :math:`i` lies from the wanted word, measured with fixed word vectors.

The module holds the loss on scores (:func:`emo_loss`), its composition with cross-entropy (:func:`emo_ce_loss`), both
from hidden states without the whole matrix of scores (:func:`linear_emo_loss`, :func:`linear_emo_ce_loss`), and a
module for each.

Plain torch::

    loss = emo_ce_loss(model(tokens[:, :-1]), tokens[:, 1:], frozen_embedding)
    loss.backward()
    optimizer.step()

Lightning::

    def training_step(self, batch, batch_idx):
        hidden = self.encoder(batch["input_ids"][:, :-1])
        return linear_emo_ce_loss(hidden, self.head.weight, batch["input_ids"][:, 1:], self.frozen_embedding)

Hugging Face ``Trainer``::

    def compute_loss(outputs, labels, num_items_in_batch=None):
        total = emo_ce_loss(outputs.logits[:, :-1], labels[:, 1:], frozen_embedding, reduction="sum")
        return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    trainer = Trainer(..., compute_loss_func=compute_loss)

The word vectors come from a trained model and stay as they are, for example
``frozen_embedding = model.get_input_embeddings().weight.detach().clone()``. Vectors that learned along would move
together until every distance is 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from lossbook._common import (
    check_ignore_index,
    check_index_target,
    check_reduction,
    check_scores,
    describe,
    eager,
    reduce_loss,
    values_readable,
)

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

# so many word vectors are converted or scaled at once: a copy of all may be as large as the model's largest layer
_TILE = 1024


def emo_loss(
    input: Tensor, target: Tensor, embedding: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Expected distance between the predicted word and the wanted one.

    .. math::

        L = \sum_i p_i\, c_{it}, \qquad p = \operatorname{softmax}(s), \qquad
        c_{it} = 1 - \cos(e_i, e_t)

    With one wanted word there is one way to move the mass, so this is the earth mover distance itself. Soft targets
    :math:`\tau` are charged for the product plan, an upper bound of the distance:

    .. math::

        L = \sum_{i,j} p_i\, \tau_j\, c_{ij}

    The gradient is :math:`\partial L / \partial s_i = p_i\,(c_{it} - L)`. The loss lies in [0, 2].

    A zero row of ``embedding`` has cosine 0 with every other row and 1 with itself; a row whose norm is below the
    smallest normal number of the loss's dtype counts as zero. The costs are computed in the dtype of the loss. A cost
    of at most :math:`4 \epsilon \sqrt{D}` (soft targets: :math:`\sqrt{\max(D, C)}`), with the dtype's machine epsilon,
    may be rounding alone and counts as 0.

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices, shape ``(...)``; or a distribution :math:`\tau`, floating, shape ``(..., C)``.
        embedding: word vectors :math:`e`, shape ``(C, D)``; constants, they get no gradient.
        ignore_index: index targets of this value are left out. Soft targets know no ignored rows.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or shape ``(...)`` with ``reduction="none"`` (0 at ignored rows). float16 and bfloat16 scores are
        computed in float32, and the loss is float32.

    Raises:
        TypeError: ``input`` or ``embedding`` is not a floating tensor, or ``target`` is neither indices nor floating.
        ValueError: shapes do not fit, an index lies outside [0, C), a soft target is negative or does not sum to 1
            within 0.01, or ``reduction`` is unknown. The values of ``target`` are checked on CPU tensors only: on an
            accelerator the check would wait for the device.

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
    return _plain(input, target, embedding, ignore_index, reduction, with_ce=False)


def emo_ce_loss(
    input: Tensor, target: Tensor, embedding: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    r"""Cross-entropy and earth mover distance, scaled to the same size in every row.

    .. math::

        L = \tfrac12 \left( \mathrm{CE} + \operatorname{sg}\!\left(\frac{\mathrm{CE}}{\mathrm{EMO}}\right)
        \mathrm{EMO} \right)

    ``sg`` stops the gradient. So the value of a row is its cross-entropy, and the gradient is
    :math:`\tfrac12 (\nabla \mathrm{CE} + \tfrac{\mathrm{CE}}{\mathrm{EMO}} \nabla \mathrm{EMO})`: not the gradient of
    the value, and numerical differentiation finds another. Where EMO is not above 1e-30 of CE, EMO adds no gradient:
    the ratio would be infinite. So it is where all words with some probability have parallel vectors, as costs of
    rounding size are 0 (see :func:`emo_loss`).

    Args:
        input: scores :math:`s`, shape ``(..., C)``.
        target: class indices, shape ``(...)``; or a distribution :math:`\tau`, floating, shape ``(..., C)``.
        embedding: word vectors :math:`e`, shape ``(C, D)``; constants, they get no gradient.
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        As :func:`emo_loss`.

    Raises:
        TypeError: as :func:`emo_loss`.
        ValueError: as :func:`emo_loss`.

    Example:
        >>> s = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> loss = emo_ce_loss(s, torch.tensor([0]), e)
        >>> print(round(loss.item(), 4), round(F.cross_entropy(s, torch.tensor([0])).item(), 4))
        0.4076 0.4076
        >>> loss.backward()
        >>> print([round(g, 4) for g in s.grad[0].tolist()])
        [-0.303, 0.1443, 0.1587]

    Equation :eq:`emo-compose` of the chapter, gradient :eq:`emo-compose-gradient`. Source: Su Jianlin, scientific
    spaces 9797 (2023); EMO, arXiv 2310.04691.
    """
    return _plain(input, target, embedding, ignore_index, reduction, with_ce=True)


def linear_emo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`emo_loss` of ``hidden @ weight.T + bias`` without ever holding all those scores.

    .. math::

        L = \sum_i p_i\, c_{it}, \qquad p = \operatorname{softmax}(W h + b), \qquad c_{it} = 1 - \cos(e_i, e_t)

    The rows pass in equal chunks of at most ``chunk_size``. With ``"mean"`` and ``"sum"`` the forward pass also
    computes the gradients, as :math:`\partial L / \partial s_i = p_i (c_{it} - L)` needs nothing from later on. Besides
    the inputs and the gradients it holds two arrays of ``chunk_size * C`` numbers. With ``"none"``, under
    ``torch.func``, in forward mode and under ``torch.compile`` the backward pass computes each chunk a second time
    instead. Only a second differentiation (``create_graph=True``) holds the scores of all rows.

    The scores are the layer's own: in the dtype of its inputs, and under autocast in autocast's dtype, as
    ``torch.nn.functional.linear`` gives them. The loss is computed from them as in :func:`emo_loss`; gradients of half
    precision layers add up in float32 over the chunks (in the layer's dtype where chunks are computed twice).

    Args:
        hidden: hidden states :math:`h`, shape ``(..., H)``.
        weight: output weights :math:`W`, shape ``(C, H)``, dtype of ``hidden``.
        target: class indices, shape ``(...)``; or a distribution, floating, shape ``(..., C)``, a constant.
        embedding: word vectors :math:`e`, shape ``(C, D)``; constants, they get no gradient. May be ``weight`` itself.
        bias: output biases :math:`b`, shape ``(C,)``, dtype of ``hidden``.
        chunk_size: how many rows of scores are held at most.
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        As :func:`emo_loss`.

    Raises:
        TypeError: as :func:`emo_loss`; dtypes of the layer differ outside autocast; ``chunk_size`` is no integer.
        ValueError: as :func:`emo_loss`; ``chunk_size`` is not positive; a soft target requires a gradient.

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
    return _linear(hidden, weight, target, embedding, bias, chunk_size, ignore_index, reduction, with_ce=False)


def linear_emo_ce_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`emo_ce_loss` of ``hidden @ weight.T + bias`` without ever holding all those scores.

    .. math::

        L = \tfrac12 \left( \mathrm{CE} + \operatorname{sg}\!\left(\frac{\mathrm{CE}}{\mathrm{EMO}}\right)
        \mathrm{EMO} \right), \qquad s = W h + b

    Memory, dtypes and chunks are those of :func:`linear_emo_loss`.

    Args:
        hidden: hidden states :math:`h`, shape ``(..., H)``.
        weight: output weights :math:`W`, shape ``(C, H)``, dtype of ``hidden``.
        target: class indices, shape ``(...)``; or a distribution, floating, shape ``(..., C)``, a constant.
        embedding: word vectors :math:`e`, shape ``(C, D)``; constants, they get no gradient. May be ``weight`` itself.
        bias: output biases :math:`b`, shape ``(C,)``, dtype of ``hidden``.
        chunk_size: how many rows of scores are held at most.
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        As :func:`emo_loss`.

    Raises:
        TypeError: as :func:`linear_emo_loss`.
        ValueError: as :func:`linear_emo_loss`.

    Example:
        >>> h = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> w = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(linear_emo_ce_loss(h, w, torch.tensor([0, 1]), e).item(), 4))
        0.4795

    Equation :eq:`emo-linear-compose` of the chapter. Source: Su Jianlin, scientific spaces 9797 (2023); EMO, arXiv
    2310.04691.
    """
    return _linear(hidden, weight, target, embedding, bias, chunk_size, ignore_index, reduction, with_ce=True)


class _Loss(nn.Module):
    """The options that all four modules share."""

    def __init__(self, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.ignore_index = check_ignore_index(ignore_index)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class _LinearLoss(_Loss):
    """The options of the two modules that start from hidden states."""

    def __init__(self, *, chunk_size: int = 1024, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__(ignore_index=ignore_index, reduction=reduction)
        _check_chunk_size(chunk_size)
        self.chunk_size = chunk_size

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}, {super().extra_repr()}"


class EmoLoss(_Loss):
    """:func:`emo_loss` as a module.

    Args:
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``reduction`` is unknown.

    Example:
        >>> EmoLoss(reduction="sum")(torch.zeros(2, 4), torch.tensor([0, 3]), torch.eye(4))
        tensor(1.5000)
    """

    def forward(self, input: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """The loss of scores ``(..., C)`` with word vectors ``(C, D)``."""
        return emo_loss(input, target, embedding, ignore_index=self.ignore_index, reduction=self.reduction)


class EmoCeLoss(_Loss):
    """:func:`emo_ce_loss` as a module.

    Args:
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        ValueError: ``reduction`` is unknown.

    Example:
        >>> EmoCeLoss()(torch.zeros(2, 4), torch.tensor([0, 3]), torch.eye(4))
        tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """The loss of scores ``(..., C)`` with word vectors ``(C, D)``."""
        return emo_ce_loss(input, target, embedding, ignore_index=self.ignore_index, reduction=self.reduction)


class LinearEmoLoss(_LinearLoss):
    """:func:`linear_emo_loss` as a module.

    Args:
        chunk_size: how many rows of scores are held at most.
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError: ``chunk_size`` is no integer.
        ValueError: ``chunk_size`` is not positive, or ``reduction`` is unknown.

    Example:
        >>> LinearEmoLoss(chunk_size=1)(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]), torch.eye(4))
        tensor(0.7500)
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, embedding: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states ``(..., H)`` with output weights ``(C, H)`` and word vectors ``(C, D)``."""
        return linear_emo_loss(
            hidden,
            weight,
            target,
            embedding,
            bias=bias,
            chunk_size=self.chunk_size,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


class LinearEmoCeLoss(_LinearLoss):
    """:func:`linear_emo_ce_loss` as a module.

    Args:
        chunk_size: how many rows of scores are held at most.
        ignore_index: index targets of this value are left out.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError: ``chunk_size`` is no integer.
        ValueError: ``chunk_size`` is not positive, or ``reduction`` is unknown.

    Example:
        >>> LinearEmoCeLoss()(torch.zeros(2, 3), torch.ones(4, 3), torch.tensor([0, 3]), torch.eye(4))
        tensor(1.3863)
    """

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, embedding: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of hidden states ``(..., H)`` with output weights ``(C, H)`` and word vectors ``(C, D)``."""
        return linear_emo_ce_loss(
            hidden,
            weight,
            target,
            embedding,
            bias=bias,
            chunk_size=self.chunk_size,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )


# The formula ---------------------------------------------------------------------------------------------------------
# Rows are flat here: s and c are (n, C), an index target is (n,), a soft one (n, C).


def _tiles(length: int, size: int) -> list[slice]:
    """``range(length)`` in parts of at most ``size``."""
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _inverse_norms(embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |e_i|, shape ``(C,)``, and 0 for a zero row, whose cosine with every other row is 0."""
    tiny = torch.finfo(dtype).tiny
    inverse = []
    for tile in _tiles(len(embedding), _TILE):
        e = embedding[tile].to(dtype)
        # by the largest number first: the squares of numbers below 1e-19 or above 1e19 leave float32
        largest = torch.maximum(e.amax(-1, keepdim=True), -e.amin(-1, keepdim=True)).clamp(min=tiny)
        norm = torch.linalg.vector_norm(e / largest, dim=-1) * largest.squeeze(-1)
        inverse.append(torch.where(norm >= tiny, 1 / norm, 0))
    return torch.cat(inverse)


def _costs(target: Tensor, embedding: Tensor, inverse: Tensor, out: Tensor | None = None) -> Tensor:
    """c_i = sum_j tau_j (1 - cos(e_i, e_j)), shape ``(n, C)``, in the dtype of ``inverse``; ``out`` is room for it.

    Costs within rounding of 0 are 0, see :func:`_rounding`.
    """
    dtype = inverse.dtype
    # embeddings of another dtype pass tile by tile, so that no copy of them all is made
    tiles = _tiles(len(embedding), len(embedding) if embedding.dtype == dtype else _TILE)
    if target.is_floating_point():
        mass = target.sum(-1, keepdim=True)
        units = [(target[:, tile] * inverse[tile]) @ embedding[tile].to(dtype) for tile in tiles]
        unit = torch.stack(units).sum(0)
    else:
        mass = inverse.new_ones(())
        unit = embedding[target].to(dtype) * inverse[target].unsqueeze(-1)
    room = [None if out is None else out[:, tile] for tile in tiles]
    dots = [torch.mm(unit, embedding[t].to(dtype).t(), out=part) for t, part in zip(tiles, room, strict=True)]
    c = torch.cat(dots, dim=-1) if out is None else out
    c = torch.addcmul(mass, c, inverse, value=-1, out=out)
    if target.is_floating_point():
        c = torch.sub(c, target * (inverse == 0), out=out)  # a zero row costs nothing to itself
    else:
        c = torch.scatter(c, -1, target.unsqueeze(-1), 0, out=out)  # exactly: 1 - cos(e_t, e_t) may come out as 1e-7
    rounding = _rounding(target, embedding, dtype)
    if target.is_floating_point() and (target.requires_grad or not eager(target)):
        return c - (c - torch.threshold(c, rounding, 0)).detach()  # its gradient is the cost of each word as it is
    return torch.threshold(c, rounding, 0, out=out)


def _rounding(target: Tensor, embedding: Tensor, dtype: torch.dtype) -> float:
    """The largest cost that may be rounding alone: what parallel vectors come out at, above 0 or below.

    The composition would scale such costs up to the size of cross-entropy. Rounding grows about as the square root of
    the number of terms: D in a product of two vectors, C in the average over the words of a soft target.
    """
    words, features = embedding.shape
    terms = max(features, words) if target.is_floating_point() else features
    return 4 * torch.finfo(dtype).eps * math.sqrt(terms)


def _cross_entropy(log_p: Tensor, target: Tensor) -> Tensor:
    """-sum_i tau_i log p_i of each row."""
    if target.is_floating_point():
        # 0 * -inf is NaN. Elsewhere a target of 0 keeps its log p: that is the gradient by the target.
        return -(target * log_p.masked_fill((target == 0) & (log_p == -torch.inf), 0)).sum(-1)
    return -log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _compose(ce: Tensor, emo: Tensor) -> tuple[Tensor, Tensor]:
    """(CE + sg(CE / EMO) EMO) / 2 of each row, and the ratio."""
    # EMO = 0 makes the ratio infinite or NaN: the words with p_i > 0 share one direction, or t alone has p_i > 0.
    # Ratios above 1e30 overflow float32 when they meet a cost. There the second half is the value of CE without a
    # gradient. Where p_t rounds to 1, CE is 0 while EMO, the sum over the others, is not: the ratio is 0.
    regular = emo > ce * 1e-30
    ratio = torch.where(regular, ce / emo, 0).detach()
    return (ce + torch.where(regular, ratio * emo, ce.detach())) / 2, ratio


def _row_losses(s: Tensor, c: Tensor, target: Tensor, with_ce: bool) -> Tensor:
    """The loss of each row, differentiable by torch."""
    if not with_ce:
        p = s.softmax(-1)
        return (p * c).sum(-1)
    log_p = s.log_softmax(-1)
    emo = (log_p.exp() * c).sum(-1)
    return _compose(_cross_entropy(log_p, target), emo)[0]


def _row_gradients(s: Tensor, c: Tensor, target: Tensor, with_ce: bool) -> Tensor:
    """d L / d s of each row: p_i (c_i - L), and with cross-entropy half of (p - tau) + CE/EMO of it."""
    log_p = s.log_softmax(-1)
    p = log_p.exp()
    emo = (p * c).sum(-1, keepdim=True)
    gradient = p * (c - emo)
    if not with_ce:
        return gradient
    _, ratio = _compose(_cross_entropy(log_p, target).unsqueeze(-1), emo)
    if target.is_floating_point():
        pull = p * target.sum(-1, keepdim=True) - target
    else:
        pull = p.scatter_add(-1, target.unsqueeze(-1), -torch.ones_like(p[..., :1]))
    return (pull + ratio * gradient) / 2


def _plain(
    input: Tensor, target: Tensor, embedding: Tensor, ignore_index: int, reduction: str, *, with_ce: bool
) -> Tensor:
    check_reduction(reduction)
    s = check_scores(input)
    embedding = _check_embedding(embedding, s.shape[-1])
    target, counted = _check_target(target, s.shape, ignore_index)
    with torch.autocast(s.device.type, enabled=False):
        rows = s.shape[:-1]
        s = s.reshape(-1, s.shape[-1])
        if counted is None:
            target = target.reshape(s.shape).to(s.dtype)
        else:
            target = target.reshape(-1)
            s = s.masked_fill(~counted.reshape(-1, 1), 0)  # an ignored row may hold NaN
        c = _costs(target, embedding, _inverse_norms(embedding, s.dtype))
        loss = _row_losses(s, c, target, with_ce).reshape(rows)
        if counted is not None:
            loss = loss.masked_fill(~counted, 0)
        return reduce_loss(loss, reduction, counted)


# The linear forms ----------------------------------------------------------------------------------------------------


def _linear(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    chunk_size: int,
    ignore_index: int,
    reduction: str,
    *,
    with_ce: bool,
) -> Tensor:
    check_reduction(reduction)
    _check_chunk_size(chunk_size)
    dtype = _check_layer(hidden, weight, bias)
    embedding = _check_embedding(embedding, weight.shape[0])
    rows = hidden.shape[:-1]
    target, counted = _check_target(target, torch.Size((*rows, weight.shape[0])), ignore_index)
    if counted is None and target.requires_grad:
        raise ValueError("target must not require a gradient in the linear forms: pass target.detach()")

    device = hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        # as autocast does for torch.nn.functional.linear; the casts back are part of the graph
        low = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(low), weight.to(low), None if bias is None else bias.to(low)
    with torch.autocast(device, enabled=False):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        target = target.reshape(hidden.shape[0], *target.shape[len(rows) :])
        flat = None if counted is None else counted.reshape(-1)
        inverse = _inverse_norms(embedding, dtype)
        constants = (target, flat, embedding, inverse, chunk_size, with_ce)
        if reduction == "none" or not eager(*(x for x in (hidden, weight, bias) if x is not None)):
            return reduce_loss(_recomputed(hidden, weight, bias, *constants).reshape(rows), reduction, counted)
        graph = torch.is_grad_enabled()
        wanted = [graph and x is not None and x.requires_grad for x in (hidden, weight, bias)]
        loss: Tensor = _Fused.apply(hidden, weight, bias, *constants, reduction, wanted)  # type: ignore[no-untyped-call]
        return loss


def _chunks(rows: int, chunk_size: int) -> list[slice]:
    """As few chunks as possible, equal to one row; one empty chunk of no rows."""
    count = max(-(-rows // chunk_size), 1)
    return _tiles(rows, -(-rows // count)) if rows else [slice(0, 0)]


def _without_ignored(hidden: Tensor, counted: Tensor | None) -> Tensor:
    """Zeros in ignored rows, which may hold NaN."""
    return hidden if counted is None else hidden.masked_fill(~counted.unsqueeze(-1), 0)


class _Fused(Function):
    """Mean or sum over the rows. The forward pass computes the gradients too; the backward pass scales them.

    A differentiable backward pass computes them anew from the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        counted: Tensor | None,
        embedding: Tensor,
        inverse: Tensor,
        chunk_size: int,
        with_ce: bool,
        reduction: str,
        wanted: list[bool],
    ) -> Tensor:
        dtype = inverse.dtype
        soft = counted is None
        chunks = _chunks(len(hidden), chunk_size)
        # The room for two arrays of scores is taken once, not chunk by chunk.
        room = [inverse.new_empty(chunks[0].stop, len(weight)) for _ in range(2)]
        grads = [
            torch.zeros_like(x, dtype=dtype) if x is not None and want else None
            for x, want in zip((hidden, weight, bias), wanted, strict=True)
        ]
        total = inverse.new_zeros(())
        for chunk in chunks:
            h = _without_ignored(hidden[chunk], None if counted is None else counted[chunk])
            t = target[chunk].to(dtype) if soft else target[chunk]
            a, b = (x[: len(h)] for x in room)
            # s in a, then p in b, then c and the gradient in a
            if h.dtype != dtype:
                s = a.copy_(F.linear(h, weight, bias))
            elif bias is None:
                s = torch.mm(h, weight.t(), out=a)
            else:
                s = torch.addmm(bias, h, weight.t(), out=a)
            if with_ce:
                p = torch.log_softmax(s, -1, out=b)
                ce = _cross_entropy(p, t)
                p.exp_()
            else:
                p = torch.softmax(s, -1, out=b)
            c = _costs(t, embedding, inverse, out=a)
            pc = c.mul_(p)
            emo = pc.sum(-1)
            if with_ce:
                loss, ratio = _compose(ce, emo)
            else:
                loss = emo
            total += loss.sum() if counted is None else loss.masked_fill(~counted[chunk], 0).sum()
            if not any(wanted):
                continue

            g = pc.addcmul_(p, emo.unsqueeze(-1), value=-1)
            if with_ce:
                # the ratio last: it may be 1e30, but ratio * p_i * c_i <= CE
                g.mul_(ratio.unsqueeze(-1) / 2).add_(p * t.sum(-1, keepdim=True) - t if soft else p, alpha=0.5)
                if not soft:
                    g.scatter_add_(-1, t.unsqueeze(-1), torch.full_like(g[:, :1], -0.5))
            counts = g.new_ones(len(h)) if counted is None else counted[chunk].to(dtype)
            grad_h, grad_w, grad_b = grads
            if grad_h is not None:
                grad_h[chunk] = (g.to(h.dtype) @ weight) * counts.unsqueeze(-1)
            if grad_w is not None:
                # h is 0 in ignored rows. In float16 the sum over a thousand rows of h near 100 passes 65504.
                if h.dtype == torch.bfloat16:
                    grad_w.add_(g.to(h.dtype).t() @ h)
                else:
                    grad_w.addmm_(g.t(), h.to(dtype))
            if grad_b is not None:
                grad_b.addmv_(g.t(), counts)
        ctx.save_for_backward(hidden, weight, bias, target, counted, embedding, inverse)
        ctx.options = (chunk_size, with_ce, reduction)
        ctx.divisor = divisor = _divisor(counted, len(hidden), reduction)
        ctx.grads = grads
        return total / divisor

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, counted, embedding, inverse = ctx.saved_tensors
        layer = (hidden, weight, bias)
        if torch.is_grad_enabled():
            chunk_size, with_ce, reduction = ctx.options
            rows = _recomputed(hidden, weight, bias, target, counted, embedding, inverse, chunk_size, with_ce)
            wanted = [x for x, need in zip(layer, ctx.needs_input_grad, strict=False) if need]
            loss = reduce_loss(rows, reduction, counted)
            found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=True))
            return (*(next(found) if need else None for need in ctx.needs_input_grad[:3]), *[None] * 8)
        scale = upstream / ctx.divisor
        # In place where nobody comes back for the same numbers: the weight's gradient may be the largest array of all.
        # A node that is kept, or differentiated for many upstream gradients at once, answers with a copy.
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        last = not kept and eager(upstream)
        scaled = [None if g is None else g.mul_(scale) if last else g * scale for g in ctx.grads]
        if last:
            ctx.grads = None
        return (*(g if g is None else g.to(x.dtype) for g, x in zip(scaled, layer, strict=True)), *[None] * 8)


def _recomputed(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    counted: Tensor | None,
    embedding: Tensor,
    inverse: Tensor,
    chunk_size: int,
    with_ce: bool,
) -> Tensor:
    """The loss of each row, 0 at ignored ones; the backward pass computes each chunk a second time."""
    function = _Rows if torch.compiler.is_compiling() else _TransformableRows
    losses = []
    for chunk in _chunks(len(hidden), chunk_size):
        rows = None if counted is None else counted[chunk]
        h = _without_ignored(hidden[chunk], rows)
        options = (target[chunk], embedding, inverse, with_ce)
        loss: Tensor = function.apply(h, weight, bias, *options)  # type: ignore[no-untyped-call]
        losses.append(loss if rows is None else loss.masked_fill(~rows, 0))
    return torch.cat(losses)


class _Rows(Function):
    """The losses of one chunk from its hidden states; saves its inputs only."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        embedding: Tensor,
        inverse: Tensor,
        with_ce: bool,
    ) -> Tensor:
        return _row_losses(*_scores_and_costs(hidden, weight, bias, target, embedding, inverse), with_ce)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.with_ce = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *_ = ctx.saved_tensors
        g = upstream.unsqueeze(-1) * _row_gradients(*_scores_and_costs(*ctx.saved_tensors), ctx.with_ce)
        low = g.to(hidden.dtype)
        need = ctx.needs_input_grad
        return (
            low @ weight if need[0] else None,
            low.t() @ hidden if need[1] else None,
            low.sum(0) if need[2] else None,
            *[None] * 4,
        )


class _TransformableRows(_Rows):
    """With what ``torch.func`` asks for besides, and ``torch.compile`` refuses."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Rows.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:-1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        hidden, weight, *_ = ctx.saved_tensors
        s, c, target = _scores_and_costs(*ctx.saved_tensors)
        dh, dw, db, *_ = tangents  # zeros where an input has none
        ds = F.linear(dh, weight) + F.linear(hidden, dw, db)
        return (_row_gradients(s, c, target, ctx.with_ce) * ds).sum(-1)


def _scores_and_costs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, embedding: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """s, c and the target of one chunk, as :func:`_row_losses` takes them."""
    dtype = inverse.dtype
    target = target.to(dtype) if target.is_floating_point() else target
    return F.linear(hidden, weight, bias).to(dtype), _costs(target, embedding, inverse), target


def _divisor(counted: Tensor | None, rows: int, reduction: str) -> Tensor | int:
    """What the sum over the rows is divided by."""
    if reduction == "sum":
        return 1
    return max(rows, 1) if counted is None else counted.sum().clamp(min=1)


# Checks --------------------------------------------------------------------------------------------------------------


def _check_embedding(embedding: Tensor, num_classes: int) -> Tensor:
    """``embedding`` without its graph."""
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        raise TypeError(f"embedding must be a floating tensor of word vectors, got {describe(embedding)}")
    if num_classes < 1:
        raise ValueError(f"there must be at least one class, got none (embedding: {describe(embedding)})")
    if embedding.dim() != 2 or 0 in embedding.shape or embedding.shape[0] != num_classes:
        raise ValueError(f"embedding must have the shape ({num_classes}, D), got {describe(embedding)}")
    return embedding.detach()


def _check_target(target: Tensor, shape: torch.Size, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The target, and for indices which rows count; in ignored rows it is 0. ``shape`` is that of the scores."""
    check_ignore_index(ignore_index)
    if not (isinstance(target, Tensor) and target.is_floating_point()):
        counted = check_index_target(target, tuple(shape[:-1]), shape[-1], ignore_index)
        return torch.where(counted, target, 0).long(), counted
    if target.shape != shape:
        raise ValueError(f"soft target must have the shape of the scores, {tuple(shape)}, got {describe(target)}")
    if values_readable(target):
        if not bool((target >= 0).all()):
            raise ValueError("soft target must not be negative or NaN")
        sums = target.detach().sum(-1, dtype=torch.float64)
        wrong = (sums - 1).abs() > 1e-2  # what bfloat16 rounds off
        if bool(wrong.any()):
            raise ValueError(f"each row of a soft target must sum to 1 within 0.01, got {float(sums[wrong][0]):.6g}")
    return target, None


def _check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype the loss of this layer is computed in."""
    named = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, x in named.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {describe(x)}")
    if hidden.dim() < 1:
        raise ValueError(f"hidden must have at least one dimension, the features last, got {describe(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have the shape (C, {hidden.shape[-1]}), got {describe(weight)}")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"bias must have the shape ({len(weight)},), got {describe(bias)}")
    dtypes = {x.dtype for x in named.values()}
    if len(dtypes) > 1 and (torch.float64 in dtypes or not torch.is_autocast_enabled(hidden.device.type)):
        got = ", ".join(f"{name} {describe(x)}" for name, x in named.items())
        raise TypeError(f"{' and '.join(named)} must have the same dtype, got {got}")
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _check_chunk_size(chunk_size: int) -> None:
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size must be an integer, got {describe(chunk_size)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
