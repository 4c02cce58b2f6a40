"""The formulas of losses whose classes lie on several ranks: what a shard adds to each sum, and what follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lossbook._collectives import Shards
from lossbook._common import ABSENT, finite, sigmoid, softplus
from lossbook._fast.am_softmax import linear_rest
from lossbook._fast.emo import linear_scores
from lossbook._several_labels import only
from lossbook._torch import full_precision
from lossbook.am_softmax import Scale, linear_rest_and_target
from lossbook.emo import unit_vectors


def several_labels(
    s: Tensor, t: Tensor, mask: Tensor | None, s_0: float, shards: Shards
) -> tuple[Tensor, Tensor | None]:
    """log(e^s0 + sum_i (1 - t_i) e^s_i) + log(e^-s0 + sum_i t_i e^-s_i), and which rows have a label."""
    s, neg, pos = only(mask, s, ~t if t.dtype == torch.bool else 1 - t, t)
    s, neg, pos = finite(s), neg.to(s.dtype), pos.to(s.dtype)
    least = torch.finfo(s.dtype).tiny
    down, up = torch.where(neg >= least, s, ABSENT), torch.where(pos >= least, -s, ABSENT)
    tops = shards.tops(down, up)
    terms = [
        (neg * (down - tops[0].unsqueeze(-1)).exp()).sum(-1),
        (pos * (up - tops[1].unsqueeze(-1)).exp()).sum(-1),
    ]
    labels = [] if mask is None else [mask.any(-1).to(s.dtype)]
    below, above, *labels = shards.sums(*terms, *labels)
    n = below.masked_fill(below == 0, 1).log() + tops[0]
    p = above.masked_fill(above == 0, 1).log() + tops[1]
    loss = softplus(n - s_0) + softplus(p + s_0)
    return loss, labels[0] > 0 if labels else None


def rest_and_target(z: Tensor, weight: Tensor, place: Tensor, here: Tensor, scale: Scale, shards: Shards) -> Tensor:
    """``(R, 2)``: the log-sum-exp of the other classes' scores over all shards, and the target's score."""
    if len(weight):
        here_or_none = place.masked_fill(~here, -1)
        rest, s_t = linear_rest(linear_rest_and_target, z, weight, here_or_none, None, scale).unbind(-1)
    else:  # nothing but its part in the backward pass
        s_t = z.sum(-1) * 0 + weight.sum()
        rest = s_t + ABSENT
    (top,) = shards.tops(rest.unsqueeze(-1))
    total, s_t = shards.sums((rest - top).exp(), s_t.masked_fill(~here, 0))
    return torch.stack((total.log() + top, s_t), -1)


def emo_rows(
    s: Tensor, embedding: Tensor, place: Tensor, here: Tensor, counted: Tensor, shards: Shards, with_ce: bool
) -> Tensor:
    """EMO of each row, or (CE + sg(CE / EMO) EMO) / 2."""
    with full_precision(s.device):
        s = finite(s.masked_fill(~counted.unsqueeze(-1), 0))
        emo, z = emo_terms(s, unit_vectors(embedding, s.dtype), place, here, shards)
        if with_ce:
            ce = softplus(z)
            regular = emo > 1e-30 * ce  # EMO = 0 makes the ratio infinite, and above 1e30 it overflows float32
            ratio = torch.where(regular, ce / emo, 0).detach()
            emo = (ce + torch.where(regular, ratio * emo, ce.detach())) / 2
        return emo.masked_fill(~counted, 0)


def linear_emo_rows(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    place: Tensor,
    here: Tensor,
    counted: Tensor,
    embedding: Tensor,
    shards: Shards,
    *options: Any,
) -> Tensor:
    """:func:`emo_rows` of hidden states h, with the scores of all rows."""
    with_ce, scale, softcap, _, _, dtype = options
    with full_precision(h.device):
        s = linear_scores(h, w, b, counted, scale, softcap, dtype)
        return emo_rows(s, embedding, place, here, counted, shards, with_ce)


def emo_terms(s: Tensor, u: Tensor, place: Tensor, here: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
    """EMO of each row, and its z: with A the mean cost of the other words, EMO = sigmoid(z) A and CE = log(1 + e^z)."""
    own = (torch.arange(len(u), device=s.device) == place.unsqueeze(-1)) & here.unsqueeze(-1)
    (u_t,) = shards.sums(own.to(u.dtype) @ u)
    c = (1 - u_t @ u.mT).masked_fill(own, 0)  # a word costs nothing to itself
    c = c.masked_fill(c <= 4 * torch.finfo(c.dtype).eps * u.shape[1] ** 0.5, 0)
    others = s.masked_fill(own, ABSENT)
    (top,) = shards.tops(others)
    # measured from the cost of the most probable of them: its gradient would cancel
    leads = (others == top.unsqueeze(-1)).to(s.dtype)
    c_m, leaders = shards.sums((leads * c).sum(-1), leads.sum(-1))
    c_m = c_m / leaders
    e = (others - top.unsqueeze(-1)).exp()
    apart = (e * (c - c_m.unsqueeze(-1))).sum(-1)
    total, moved, s_t = shards.sums(e.sum(-1), apart, s.masked_fill(~own, 0).sum(-1))
    z = total.log() + (top - s_t)
    return sigmoid(z) * (c_m + moved / total), z


def sampled(
    weight: Tensor, place: Tensor, here: Tensor, share: float, generator: torch.Generator | None, rank: int
) -> tuple[Tensor, Tensor]:
    """The class vectors that take part, and the places of the targets among them; sizes need no look at a value."""
    count = len(weight)
    kept = min(count, max(round(share * count), place.numel()))
    seed = int(torch.randint(2**62, (), generator=generator, device="cpu")) + rank
    drawn = torch.rand(count + 1, generator=torch.Generator(weight.device).manual_seed(seed), device=weight.device)
    drawn = drawn.scatter(0, torch.where(here, place, count), 2.0)[:count]  # all positives
    index = drawn.topk(kept).indices.sort().values
    places = torch.zeros_like(drawn, dtype=torch.long).scatter(0, index, torch.arange(kept, device=index.device))
    return weight[index], places[place] if count else place
