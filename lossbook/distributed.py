r"""Losses whose classes lie on several ranks: each holds some class vectors, or some columns of the scores.

Value and gradients are those of the unsharded losses. The shards lie in the order of the ranks; they may be uneven or
empty. Every rank calls with the same rows, gets the same loss and calls ``backward()``. The gradient of its shard, and
that of the rows, are then whole: nothing is left to average over these ranks. What a rank sends grows with the rows,
never with the number of classes. ``sharded_am_softmax_loss`` and the two ``sharded_linear_emo`` losses take the layer
instead of its scores, and hold those of one chunk of classes, or of one chunk of rows.

A DTensor with ``Shard`` on its classes says which ranks belong together; for plain tensors ``group`` says it, without
it the default group. Over a mesh's copies of the shards nothing is summed: average the gradients there, as DDP does.

Before they compute, the ranks tell one another what they were given. So a shape, dtype or option that differs, an
argument that one rank refuses, or a class index that no shard holds is the same error on every rank, and none waits for
another. This takes a backend for CPU tensors, which ``init_process_group()`` makes beside NCCL. With NCCL alone nothing
is compared, since to read the answers would be to wait for the device; nor are class indices on a device.

A module of the same name wraps each function. ``torch.compile`` breaks its graph at these losses and runs them eagerly.
Not for ``torch.func``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lossbook._checks import (
    check_floating,
    check_ignore_index,
    check_index,
    check_labels,
    check_mask,
    check_number,
    check_reduction,
    check_scores,
    describe,
)
from lossbook._classifier import unit
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
from lossbook._margins import Less, Psi, check_psi, shaped
from lossbook._sharded_classifier import ShardedCosineClassifier
from lossbook._sharded_emo import (
    ShardedEmoCeLoss,
    ShardedEmoLoss,
    ShardedLinearEmoCeLoss,
    ShardedLinearEmoLoss,
    sharded_emo_ce_loss,
    sharded_emo_loss,
    sharded_linear_emo_ce_loss,
    sharded_linear_emo_loss,
)
from lossbook._sharded_rows import rest_and_target, sampled, several_labels
from lossbook.am_softmax import Scale, _check_scale, _own_scale, margin_softmax

__all__ = [
    "ShardedAmSoftmaxLoss",
    "ShardedCosineClassifier",
    "ShardedEmoCeLoss",
    "ShardedEmoLoss",
    "ShardedLinearEmoCeLoss",
    "ShardedLinearEmoLoss",
    "ShardedMultilabelSoftmaxLoss",
    "sharded_am_softmax_loss",
    "sharded_emo_ce_loss",
    "sharded_emo_loss",
    "sharded_linear_emo_ce_loss",
    "sharded_linear_emo_loss",
    "sharded_multilabel_softmax_loss",
]


# ---------------------------------------------------------------------------------------------------------- the losses


def sharded_multilabel_softmax_loss(
    input: Tensor,
    target: Tensor,
    *,
    group: Group | None = None,
    mask: Tensor | None = None,
    threshold: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`~lossbook.multilabel_softmax.multilabel_softmax_loss` of labels that lie on several ranks.

    .. math::

        L = \log\Bigl(e^{s_0} + \sum_i (1 - t_i)\, e^{s_i}\Bigr) + \log\Bigl(e^{-s_0} + \sum_i t_i\, e^{-s_i}\Bigr)

    One all-reduce of maxima (two numbers a row) and one of sums (two, with a mask three); none in the backward pass.

    Args:
        input: this rank's columns of the scores, ``(..., C_r)``, or a DTensor ``(..., C)`` sharded along the last one.
        target: its columns of the labels, hard or soft.
        group: the ranks that hold the shards; not for a DTensor.
        mask: its columns of the mask, on every rank or on none.
        threshold: the score :math:`s_0`.
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss, the same on every rank.

    Raises:
        TypeError, ValueError: as the unsharded loss, and where ranks differ in more than the classes; on every rank.
        RuntimeError: there is no process group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> s = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 1.0, -2.0]])
        >>> y = torch.tensor([[True, False, True], [False, True, False]])
        >>> round(sharded_multilabel_softmax_loss(s, y).item(), 4)
        0.6757
        >>> dist.destroy_process_group()

    Equation :eq:`mls-loss` of the chapter. Source: as the unsharded loss.
    """
    group = group_of("input", input, -1, group)

    def read() -> tuple[tuple[Tensor, Tensor, Tensor | None, float], Given]:
        s = check_scores(local(input))
        m = check_mask(local(mask), s.shape, -1)
        t = check_labels(local(target), s.shape, mask=local(mask))
        t = t.to(s.dtype) if t.is_floating_point() else t.bool()
        s_0 = check_number("threshold", threshold)
        options = {"threshold": s_0, "reduction": check_reduction(reduction)}
        tensors = {"input": (s, -1), "target": (t, -1)} | ({} if m is None else {"mask": (m, -1)})
        said = words("sharded_multilabel_softmax_loss", tensors, **options)
        return (s, t, m, s_0), Given(said, s.shape[-1])

    tensors, shards = agree(group, read)
    loss, counted = several_labels(*tensors, shards)
    return reduce_loss(loss, reduction, counted)


def sharded_am_softmax_loss(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    group: Group | None = None,
    psi: Psi | None = None,
    margin: float = 0.35,
    scale: Scale = 30.0,
    sample: float | None = None,
    generator: torch.Generator | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r""":func:`~lossbook.am_softmax.linear_margin_softmax_loss` with class vectors that lie on several ranks.

    .. math::

        -\log \frac{e^{\gamma\,\psi(\theta_t)}}{e^{\gamma\,\psi(\theta_t)} + \sum_{i \ne t} e^{\gamma \cos\theta_i}}

    Each rank takes its class vectors a chunk at a time, so that the scores of all its classes are never held. One
    all-reduce of maxima (a number a row), one of sums (two a row), and one of the embeddings' gradient.

    With ``sample`` each shard of :math:`C_r` classes keeps round(``sample`` :math:`C_r`) of them, and no fewer than
    there are rows: the targets, and others drawn anew in every call, with equal chances. The loss is then that of fewer
    classes, so it is smaller, and vectors that were not drawn get gradient 0. Time and memory of the scores fall by the
    share; the gradient keeps the shape of ``weight``.

    Args:
        embedding: embeddings ``(..., D)``, the same on every rank.
        weight: this rank's class vectors ``(C_r, D)``, or a DTensor ``(C, D)`` with ``Shard(0)``.
        target: class indices ``(...)`` among all C classes, the same on every rank.
        group: the ranks that hold the shards; not for a DTensor.
        psi: the margin, a function of the target's cosine; without it :math:`\cos\theta - m` with m = ``margin``.
        margin: m, at least 0; without meaning beside ``psi``.
        scale: :math:`\gamma`, a number > 0 or a tensor of one that learns, the same on every rank. On the CPU ranks
            compare it, but for rounding, and so the parameters of a ``psi`` that is a module; nobody compares what
            another function holds.
        sample: the share of the classes that takes part, in (0, 1]; without it all do.
        generator: a generator on the CPU for the draw. Ranks may seed theirs alike: each draws for its own place in the
            group, so that replicas of a shard draw the same and other shards do not.
        ignore_index: rows with this target do not count.
        reduction: ``"mean"`` over the rows that count, ``"sum"`` or ``"none"``.

    Returns:
        The loss, the same on every rank; the gradient of ``embedding`` is the whole one on every rank.

    Raises:
        TypeError, ValueError: as the unsharded loss, and where ranks differ in more than the classes; on every rank.
        RuntimeError: there is no process group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> embedding, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
        >>> sharded_am_softmax_loss(embedding, weight, torch.tensor([1]), scale=10)
        tensor(1.7014)
        >>> dist.destroy_process_group()

    Equation :eq:`am-margin` of the chapter. Source: as the unsharded loss; sampling is that of Partial FC, arXiv
    2203.15565.
    """
    group = group_of("weight", weight, 0, group)
    check_whole(group, embedding=embedding, target=target, scale=scale)
    options = (psi, margin, scale, sample, generator, ignore_index, reduction)
    read = partial(_read_vectors, embedding, weight, target, *options)
    (z, w, t, counted, margin_of, gamma, share), shards = agree(group, read)
    z = unit(z.masked_fill(~counted.unsqueeze(-1), 0), w) * gamma
    z = shared(z.reshape(-1, z.shape[-1]), group)
    place, here = shards.place(t.reshape(-1), len(w))
    if share is not None:
        w, place = sampled(w, place, here, share, generator, dist.get_rank(group))
    both = rest_and_target(z, w, place, here, gamma, shards).reshape(*t.shape, 2)
    loss = margin_softmax(both, counted, lambda s_t: margin_of(s_t / gamma), gamma)
    return reduce_loss(loss, reduction, counted)


# ------------------------------------------------------------------------------------------------------------- modules


class ShardedMultilabelSoftmaxLoss(GroupModule):
    """:func:`sharded_multilabel_softmax_loss` as a module with the same options."""

    def __init__(self, *, group: Group | None = None, threshold: float = 0.0, reduction: str = "mean") -> None:
        threshold = check_number("threshold", threshold)
        super().__init__(group=group, threshold=threshold, reduction=check_reduction(reduction))

    def forward(self, input: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """The loss of this rank's columns of scores and labels."""
        return sharded_multilabel_softmax_loss(input, target, mask=mask, **self.options)


class ShardedAmSoftmaxLoss(GroupModule):
    """:func:`sharded_am_softmax_loss` as a module with the same options; it holds no class vectors of its own."""

    def __init__(
        self,
        *,
        group: Group | None = None,
        psi: Psi | None = None,
        margin: float = 0.35,
        scale: Scale = 30.0,
        sample: float | None = None,
        generator: torch.Generator | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        margins = {"psi": psi if psi is None else check_psi(psi), "margin": Less(margin).m, "scale": _own_scale(scale)}
        draws = {"sample": _check_sample(sample), "generator": _check_generator(generator)}
        rows = {"ignore_index": check_ignore_index(ignore_index), "reduction": check_reduction(reduction)}
        super().__init__(group=group, **margins, **draws, **rows)

    def forward(self, embedding: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of the embeddings, this rank's class vectors and the class indices."""
        return sharded_am_softmax_loss(embedding, weight, target, **self.options)


# -------------------------------------------------------------------------------------------------------------- checks


def _read_vectors(
    embedding: Tensor,
    weight: Tensor,
    target: Tensor,
    psi: Psi | None,
    margin: float,
    scale: Scale,
    sample: float | None,
    generator: torch.Generator | None,
    ignore_index: int,
    reduction: str,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Psi, Scale, float | None], Given]:
    """The arguments of :func:`sharded_am_softmax_loss`, local and checked."""
    z, w = local(embedding), local(weight)
    _check_shard(z, w)
    t, counted = check_index(local(target), z.shape[:-1], ANY_CLASS, ignore_index)
    t = t.masked_fill(~counted, -1)  # no class of any shard
    share = _check_sample(sample)
    _check_generator(generator)
    lowered = Less(margin) if psi is None else check_psi(psi)
    gamma = _check_scale(local(scale))
    said = words(
        "sharded_am_softmax_loss",
        {"embedding": (z, None), "weight": (w, 0), "target": (t, None)},
        psi=f"cosine - {lowered.m:g}" if isinstance(lowered, Less) else lowered,
        scale=gamma,
        sample=share,
        ignore_index=ignore_index,
        reduction=check_reduction(reduction),
    )
    return (z, w, t, counted, shaped(lowered), gamma, share), Given(said, len(w), t, gamma, lowered)


def _check_shard(embedding: Tensor, weight: Tensor) -> None:
    """Raise if these are no embeddings ``(..., D)`` and class vectors ``(C_r, D)``."""
    check_floating(embedding, "embedding")
    check_floating(weight, "weight", dims=2)
    if embedding.dim() < 1 or embedding.shape[-1] != weight.shape[1]:
        wanted = f"the length of a class vector, {weight.shape[1]}, as its last dimension"
        raise ValueError(f"embedding must have {wanted}, got {describe(embedding)}")


def _check_sample(sample: Any) -> float | None:
    return None if sample is None else check_number("sample", sample, low=0, high=1, open_low=True)


def _check_generator(generator: Any) -> Any:
    if generator is not None and (not isinstance(generator, torch.Generator) or generator.device.type != "cpu"):
        got = f"one on {generator.device}" if isinstance(generator, torch.Generator) else describe(generator)
        raise TypeError(f"generator must be a torch.Generator on the CPU, whose draws can be read at once, got {got}")
    return generator
