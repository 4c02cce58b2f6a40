"""EMO of a vocabulary that lies on several ranks; :mod:`lossbook.distributed` says what holds for all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist  # noqa: F401 - for the examples
from torch import Tensor

from lossbook._checks import (
    check_floating,
    check_ignore_index,
    check_index,
    check_layer,
    check_linear_options,
    check_reduction,
    check_scores,
    describe,
)
from lossbook._collectives import (
    ANY_CLASS,
    Given,
    Group,
    GroupModule,
    agree,
    check_whole,
    group_of,
    local,
    shared,
    words,
)
from lossbook._common import reduce_loss
from lossbook._fast.sharded_emo import linear_emo
from lossbook._sharded_rows import emo_rows, linear_emo_rows
from lossbook.emo import Sums


def sharded_emo_loss(
    input: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    group: Group | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`~lossbook.emo.emo_loss` of a vocabulary that lies on several ranks.

    .. math::

        L = \sum_i p_i\, c_{it}, \qquad p = \operatorname{softmax}(s), \qquad c_{it} = 1 - \cos(e_i, e_t)

    All-reduces: the wanted words' vectors (D numbers a row); the largest score of the other words (one); the cost of
    the word that has it, and how many share it (two), from which costs are measured, since those of a sure row would
    cancel; and sums of exponentials, of these times costs, and the wanted word's score (three). None in the backward
    pass.

    Args:
        input: this rank's columns of the scores, ``(..., C_r)``, or a DTensor ``(..., C)`` sharded along the last one.
        target: class indices ``(...)`` among all C classes, the same on every rank.
        embedding: this rank's rows of the word vectors, ``(C_r, D)``; constants.
        group: the ranks that hold the shards; not for a DTensor.
        ignore_index: rows with this target do not count.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        The loss, the same on every rank.

    Raises:
        TypeError, ValueError: as the unsharded loss, and where ranks differ in more than the classes; on every rank.
        RuntimeError: there is no process group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(sharded_emo_loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), e).item(), 4))
        0.278
        >>> dist.destroy_process_group()

    Equation :eq:`emo-loss` of the chapter. Source: as the unsharded loss.
    """
    options = (group, ignore_index, reduction)
    return _emo("sharded_emo_loss", False, input, target, embedding, *options)


def sharded_emo_ce_loss(
    input: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    group: Group | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`~lossbook.emo.emo_ce_loss` of a vocabulary that lies on several ranks.

    .. math::

        L = \tfrac12 \left( \mathrm{CE} + \operatorname{sg}\!\left(\frac{\mathrm{CE}}{\mathrm{EMO}}\right)
        \mathrm{EMO} \right)

    Args, Returns, Raises and what is sent are those of :func:`sharded_emo_loss`.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(sharded_emo_ce_loss(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), e).item(), 4))
        0.4076
        >>> dist.destroy_process_group()

    Equation :eq:`emo-compose` of the chapter. Source: as the unsharded loss.
    """
    options = (group, ignore_index, reduction)
    return _emo("sharded_emo_ce_loss", True, input, target, embedding, *options)


def sharded_linear_emo_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    group: Group | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
    accumulate: Sums = "float32",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`~lossbook.emo.linear_emo_loss` with an output layer whose words lie on several ranks.

    .. math::

        L = \sum_i p_i\, c_{it}, \qquad p = \operatorname{softmax}(W h + b), \qquad c_{it} = 1 - \cos(e_i, e_t)

    The rows pass in equal chunks of at most ``chunk_size``, and each rank holds the scores of a chunk by its own
    :math:`C_r` words. The all-reduces are those of :func:`sharded_emo_loss`, for every chunk, and in the backward pass
    one of the gradient of ``hidden`` (H numbers a row). With ``"mean"`` and ``"sum"`` the forward pass computes the
    gradients too; with ``"none"`` the backward pass computes each chunk a second time, from D + 6 numbers a row that
    the forward pass kept, and sends nothing more. Beside inputs, gradient of ``hidden`` and a few numbers a row a rank
    holds at most

    .. math::

        \max\bigl(g\, C_r H + (b + 8)\, n\, C_r + 256\, C_r + 8\, n D,\; (g + w)\, C_r H\bigr) \text{ bytes},

    with :math:`n` rows in a chunk, :math:`b` bytes a score, :math:`w` a weight and :math:`g` a number of the weight's
    gradient as it adds up. In float32 :math:`b + 4` stands for :math:`b + 8`, since the scores are overwritten. A
    softcap takes :math:`4\, n\, C_r` more, word vectors of another dtype than the loss up to 16 MiB, a weight of
    another dtype than the scores a copy of :math:`b\, C_r H`. A smaller ``chunk_size`` takes less memory and more
    collectives, of the same numbers in all. In a second differentiation (``create_graph=True``) a rank holds the scores
    of all rows by its words.

    Args:
        hidden: hidden states :math:`h`, shape ``(..., H)``, the same on every rank.
        weight: this rank's rows of the output weights, ``(C_r, H)``, or a DTensor ``(C, H)`` with ``Shard(0)``.
        target: class indices ``(...)`` among all C classes, the same on every rank.
        embedding: this rank's rows of the word vectors, ``(C_r, D)``; constants. May be ``weight`` itself.
        group: the ranks that hold the shards; not for a DTensor.
        bias: this rank's output biases ``(C_r,)``, on every rank or on none.
        logit_scale: what the scores are multiplied by.
        logit_softcap: bound of the scores, above 0.
        chunk_size: how many rows of scores are held at most.
        accumulate: ``"float32"`` (float64 for float64 layers) or ``"weight"``, the dtype in which the gradient of
            ``weight`` adds up.
        ignore_index: rows with this target do not count, whatever their hidden states.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        The loss, the same on every rank; the gradient of ``hidden`` is the whole one on every rank. Dtypes are those of
        the unsharded loss.

    Raises:
        TypeError, ValueError: as the unsharded loss, and where ranks differ in more than the classes; on every rank.
        RuntimeError: there is no process group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> h, w = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(sharded_linear_emo_loss(h, w, torch.tensor([0, 1]), e, chunk_size=1).item(), 4))
        0.3509
        >>> dist.destroy_process_group()

    Equation :eq:`emo-linear` of the chapter. Source: as the unsharded loss.
    """
    options = (group, logit_scale, logit_softcap, chunk_size, accumulate, ignore_index, reduction)
    return _linear_emo("sharded_linear_emo_loss", False, hidden, weight, target, embedding, bias, *options)


def sharded_linear_emo_ce_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    *,
    group: Group | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
    accumulate: Sums = "float32",
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`~lossbook.emo.linear_emo_ce_loss` with an output layer whose words lie on several ranks.

    .. math::

        L = \tfrac12 \left( \mathrm{CE} + \operatorname{sg}\!\left(\frac{\mathrm{CE}}{\mathrm{EMO}}\right)
        \mathrm{EMO} \right), \qquad s = W h + b

    Args, Returns, Raises, memory and what is sent are those of :func:`sharded_linear_emo_loss`.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> h, w = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> e = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
        >>> print(round(sharded_linear_emo_ce_loss(h, w, torch.tensor([0, 1]), e).item(), 4))
        0.4795
        >>> dist.destroy_process_group()

    Equation :eq:`emo-linear-compose` of the chapter. Source: as the unsharded loss.
    """
    options = (group, logit_scale, logit_softcap, chunk_size, accumulate, ignore_index, reduction)
    return _linear_emo("sharded_linear_emo_ce_loss", True, hidden, weight, target, embedding, bias, *options)


# ------------------------------------------------------------------------------------------------------------- modules


class ShardedEmoLoss(GroupModule):
    """:func:`sharded_emo_loss` as a module with the same options."""

    def __init__(self, *, group: Group | None = None, ignore_index: int = -100, reduction: str = "mean") -> None:
        rows = {"ignore_index": check_ignore_index(ignore_index), "reduction": check_reduction(reduction)}
        super().__init__(group=group, **rows)

    def forward(self, input: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """The loss of this rank's columns of scores, the class indices and its rows of the word vectors."""
        return sharded_emo_loss(input, target, embedding, **self.options)


class ShardedEmoCeLoss(ShardedEmoLoss):
    """:func:`sharded_emo_ce_loss` as a module with the same options."""

    def forward(self, input: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """The loss of this rank's columns of scores, the class indices and its rows of the word vectors."""
        return sharded_emo_ce_loss(input, target, embedding, **self.options)


class ShardedLinearEmoLoss(GroupModule):
    """:func:`sharded_linear_emo_loss` as a module with the same options; it holds no layer of its own."""

    def __init__(
        self,
        *,
        group: Group | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        chunk_size: int = 1024,
        accumulate: Sums = "float32",
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        linear = check_linear_options(logit_scale, logit_softcap, chunk_size, accumulate)
        rows = {"ignore_index": check_ignore_index(ignore_index), "reduction": check_reduction(reduction)}
        super().__init__(group=group, **linear, **rows)

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, embedding: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of the hidden states, this rank's part of the layer, the class indices and its word vectors."""
        return sharded_linear_emo_loss(hidden, weight, target, embedding, bias=bias, **self.options)


class ShardedLinearEmoCeLoss(ShardedLinearEmoLoss):
    """:func:`sharded_linear_emo_ce_loss` as a module with the same options; it holds no layer of its own."""

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor, embedding: Tensor, *, bias: Tensor | None = None
    ) -> Tensor:
        """The loss of the hidden states, this rank's part of the layer, the class indices and its word vectors."""
        return sharded_linear_emo_ce_loss(hidden, weight, target, embedding, bias=bias, **self.options)


# ----------------------------------------------------------------------------------------------- from arguments to rows


def _emo(
    name: str,
    with_ce: bool,
    input: Tensor,
    target: Tensor,
    embedding: Tensor,
    group: Group | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    group = group_of("input", input, -1, group)
    check_whole(group, target=target)

    def read() -> tuple[tuple[Tensor, ...], Given]:
        s = check_scores(local(input))
        e = _vectors(embedding, s.shape[-1])
        t, counted = _indices(target, s.shape[:-1], ignore_index)
        tensors = {"input": (s, -1), "target": (t, None), "embedding": (e, 0)}
        said = words(name, tensors, ignore_index=ignore_index, reduction=check_reduction(reduction))
        return (s, e, t, counted), Given(said, len(e), t)

    (s, e, t, counted), shards = agree(group, read)
    loss = emo_rows(s, e, *shards.place(t, len(e)), counted, shards, with_ce)
    return reduce_loss(loss, reduction, counted)


def _linear_emo(
    name: str,
    with_ce: bool,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    embedding: Tensor,
    bias: Tensor | None,
    group: Group | None,
    logit_scale: float,
    logit_softcap: float | None,
    chunk_size: int,
    accumulate: str,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    group = group_of("weight", weight, 0, group)
    check_whole(group, hidden=hidden, target=target)

    def read() -> tuple[tuple[Any, ...], Given]:
        linear = check_linear_options(logit_scale, logit_softcap, chunk_size, accumulate)
        h, w, b = (local(x) for x in (hidden, weight, bias))
        dtype = check_layer(h, w, b)
        e = _vectors(embedding, len(w))
        t, counted = _indices(target, h.shape[:-1], ignore_index)
        tensors = {"hidden": (h, None), "weight": (w, 0), "target": (t, None), "embedding": (e, 0)}
        tensors |= {} if b is None else {"bias": (b, 0)}
        rows = {"ignore_index": ignore_index, "reduction": check_reduction(reduction)}
        said = words(name, tensors, **linear, **rows, scores=dtype)
        *first, sums = linear.values()
        return (h, w, b, t, counted, e, (with_ce, *first, sums == "float32", dtype)), Given(said, len(e), t)

    (h, w, b, t, counted, e, options), shards = agree(group, read)
    z = shared(h.reshape(-1, h.shape[-1]), group)
    places = shards.place(t.reshape(-1), len(e))
    rows = reduction == "none"
    loss = linear_emo(linear_emo_rows, z, w, b, *places, counted.reshape(-1), e, shards, rows, options)
    if rows:
        return loss.reshape(t.shape)
    return loss if reduction == "sum" else loss / counted.sum().clamp(min=1)


def _vectors(embedding: Tensor, classes: int) -> Tensor:
    """This rank's word vectors, without their graph."""
    e = check_floating(local(embedding), "embedding", what=" of word vectors", dims=2).detach()
    if len(e) != classes or e.shape[1] == 0:
        raise ValueError(f"embedding must have the shape ({classes}, D), got {describe(e)}")
    return e


def _indices(target: Tensor, rows: torch.Size, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The class indices, -1 where a row does not count: no class of any shard; and which rows count."""
    t, counted = check_index(local(target), rows, ANY_CLASS, ignore_index)
    return t.masked_fill(~counted, -1), counted
