"""The earth mover losses of a linear layer whose classes lie on several ranks, a chunk of rows at a time.

As in the unsharded loss the gradient is at hand with the value, once the ranks have told one another their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from lossbook._collectives import Shards
from lossbook._common import ABSENT, sigmoid, softplus
from lossbook._fast.emo import PIECE, Out, by_chunks, chunks_of, highest, inverse_norms, products, room_of, rounding
from lossbook._torch import full_precision, last_backward, plain

Options = tuple[bool, float, float | None, int, bool, torch.dtype]


class Answers(Protocol):
    """Who says what the shards add up to."""

    def sums(self, *terms: Tensor) -> tuple[Tensor, ...]: ...
    def tops(self, *scores: Tensor) -> tuple[Tensor, ...]: ...


class _Noted:
    """The shards, whose answers are kept for the backward pass: a few numbers and a word vector for each row."""

    def __init__(self, shards: Shards) -> None:
        self.shards, self.notes = shards, list[Tensor]()

    def sums(self, *terms: Tensor) -> tuple[Tensor, ...]:
        self.notes += self.shards.sums(*terms)
        return tuple(self.notes[-len(terms) :])

    def tops(self, *scores: Tensor) -> tuple[Tensor, ...]:
        self.notes += self.shards.tops(*scores)
        return tuple(self.notes[-len(scores) :])


class _Again:
    """The answers to the same questions once more; nothing is sent."""

    def __init__(self, notes: Sequence[Tensor]) -> None:
        self.notes = iter(notes)

    def sums(self, *terms: Tensor) -> tuple[Tensor, ...]:
        return tuple(next(self.notes) for _ in terms)

    tops = sums


def linear_emo(
    formula: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: Tensor,
    here: Tensor,
    counted: Tensor,
    embedding: Tensor,
    shards: Shards,
    rows: bool,
    options: Options,
) -> Tensor:
    """``formula(hidden, weight, bias, place, here, counted, embedding, shards, *options)``, the loss of each row, or
    unless ``rows`` their sum. The gradient of ``hidden`` is that of this rank's classes.
    """
    tensors = (hidden, weight, bias, place, here, counted, embedding)
    found: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        *tensors, formula, shards, rows, torch.is_grad_enabled(), options
    )
    return found


class _Linear(Function):
    """Gradients come with the sum of the losses, and anew for the loss of each row."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.formula, ctx.shards, ctx.rows, graph, ctx.options = arguments
        answers = _Noted(ctx.shards) if graph and ctx.rows else ctx.shards
        wanted = [graph and not ctx.rows and need for need in ctx.needs_input_grad[:3]]
        loss, *grads = _run(*tensors, wanted=wanted, rows=ctx.rows, answers=answers, options=ctx.options)
        ctx.save_for_backward(*tensors, *(answers.notes if isinstance(answers, _Noted) else grads))
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        (g,), need = gradients, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            with torch.enable_grad():
                names = [x.view_as(x) if n else x for x, n in zip(tensors, need, strict=False)]  # hooks run once
                loss = ctx.formula(*names, *tensors[3:], ctx.shards, *ctx.options)
            wanted = [x for x, n in zip(names, need, strict=True) if n]
            found = iter(torch.autograd.grad(loss if ctx.rows else loss.sum(), wanted, g, create_graph=True))
            return (*(next(found) if n else None for n in need), *[None] * 9)
        if ctx.rows:
            again = _Again(kept)
            _, *grads = _run(*tensors, wanted=need, rows=True, answers=again, options=ctx.options, upstream=g)
        else:
            spare = plain(g) and last_backward()
            grads = [x.mul_(g) if spare else x * g for x in kept]
        both = zip(grads, tensors[:3], need, strict=True)
        return (*(x.to(y.dtype) if n else None for x, y, n in both), *[None] * 9)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    place: Tensor,
    here: Tensor,
    counted: Tensor,
    embedding: Tensor,
    *,
    wanted: Sequence[bool],
    rows: bool,
    answers: Answers,
    options: Options,
    upstream: Tensor | None = None,
) -> Out:
    """Losses and gradients. A piece is a whole chunk: its size must not depend on the shard's."""
    with_ce, scale, softcap, chunk_size, wide, dtype = options
    out, chunks = room_of(hidden, weight, wanted, rows, wide), chunks_of(len(hidden), chunk_size)
    with full_precision(hidden.device):
        inverse = inverse_norms(embedding, out[0].dtype) if len(embedding) else out[0].new_empty(0)
        # without a column where the shard is empty
        at, own = (x.unsqueeze(-1)[:, : len(embedding)] for x in (place, here))

        def rows_of(x: Tensor, few: slice, counted: Tensor | None) -> tuple[Tensor, Tensor]:
            return _chunk(x, at[few], own[few], counted, embedding, inverse, with_ce, any(wanted), answers)

        layer = (hidden, weight, bias, counted, upstream, wanted, scale, softcap, dtype)
        by_chunks(out, rows_of, chunks, chunk_size, *layer)
    return out


def _chunk(
    s: Tensor,
    at: Tensor,
    own: Tensor,
    counted: Tensor | None,
    embedding: Tensor,
    inverse: Tensor,
    with_ce: bool,
    wanted: bool,
    answers: Answers,
) -> tuple[Tensor, Tensor]:
    """The losses of some rows and, if ``wanted``, their gradient by these scores of the shard, which are overwritten.

    ``at`` is the place of the wanted word in the shard, where it is its ``own``. The letters are those of
    :func:`~lossbook._sharded_rows.emo_terms`.
    """
    put = partial(_put, at=at, own=own)
    vectors = embedding[at].to(s.dtype) * inverse[at].unsqueeze(-1)
    (u_t,) = answers.sums(vectors.masked_fill_(~own.unsqueeze(-1), 0).sum(1))
    c = products(u_t, embedding)
    c = torch.addcmul(c.new_ones(()), c, inverse, value=-1, out=c)
    F.threshold(c, rounding(c.dtype, embedding.shape[1]), 0, inplace=True)
    s_t = s.gather(-1, at).masked_fill_(~own, 0).sum(-1)
    put(s, ABSENT)
    lead = highest(s).unsqueeze(-1) if len(inverse) else at
    tops = s.gather(-1, lead)
    (top,) = answers.tops(tops)
    leads = (tops == top.unsqueeze(-1)).to(s.dtype)
    c_m, leaders = answers.sums((leads * c.gather(-1, lead)).sum(-1), leads.sum(-1))
    c_m = c_m / leaders
    e = s.sub_(top.unsqueeze(-1)).exp_()
    apart = c.sub_(c_m.unsqueeze(-1))
    # a few rows at a time: vecdot holds all products
    few = zip(torch.split(e, PIECE), torch.split(apart, PIECE), strict=True)
    moved = torch.cat([torch.linalg.vecdot(*both) for both in few])
    total, moved, s_t = answers.sums(e.sum(-1), moved, s_t)
    z = total.log() + (top - s_t)
    rest, p_t, more = sigmoid(z), sigmoid(-z), moved / total
    emo = rest * (c_m + more)
    loss = softplus(z) if with_ce else emo
    if wanted:
        # p_i (c_i - EMO), p_i = rest e_i / total: what is subtracted from c_i cancels no digits
        g, g_t = apart.add_((c_m * p_t - rest * more).unsqueeze(-1)), -p_t * emo
        if with_ce:
            ratio = (loss / emo).masked_fill_(emo <= 1e-30 * loss, 0)
            g.mul_(ratio.unsqueeze(-1) / 2).add_(0.5)
            g_t = (rest - ratio * g_t) / -2
        put(g.mul_(e).mul_((rest / total).unsqueeze(-1)), g_t.unsqueeze(-1))
    if counted is not None:
        loss.masked_fill_(~counted, 0)
        c.masked_fill_(~counted.unsqueeze(-1), 0)
    return loss, c


def _put(x: Tensor, value: Tensor | float, at: Tensor, own: Tensor) -> Tensor:
    """``value`` at the place of each row's wanted word, in this shard."""
    return x.scatter_(-1, at, torch.where(own, value, x.gather(-1, at)))
