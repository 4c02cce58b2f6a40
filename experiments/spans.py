"""Losses on spans and relations, and taggers, on public sentences: what is the multi-label softmax for?

Five tasks, each with everything fixed but the loss and its start:

- ``Résumé NER``: find the entities in Chinese résumés, and the same with 20 % and with 5 % of the sentences to train,
  drawn from the run's seed.
- ``WNUT17``: find the rare and new entities in English posts.
- ``CoNLL04``: find the entities in English news and the relations between them. A triple is read off four matrices:
  subjects, objects, and for each predicate the pairs of heads and of tails.

Two LSTMs, one in each direction, read the tokens; a GlobalPointer scores all pairs of tokens. Each type has a last bias
of its own. Rivals on these scores, about one pair in two thousand being true:

- the multi-label softmax, one row for each sentence and type;
- BCE as mean over the pairs of a batch, and as sum over those of a sentence, both from a last bias of 0; batches hold
  sentences of like length, so the mean makes long sentences count less;
- the same sum from the base rate: each last bias starts at the log-odds of its type's share;
- weighted BCE and focal loss, sums from the base rate as well; where there is a weight it counts in the share;
- power BCE, a sum for the n-th power of a probability. It starts where the power is 2^-n, near the base rate, and its
  scores count from where the power is 1/2.

Where entities are flat, two taggers on the same LSTMs are outside rivals: a softmax over tags of BIO for each token,
and a linear-chain conditional random field (CRF) over them.

Measured: F1 of spans, or triples, on test data, at the threshold 0 and at the one that was best in validation (a tagger
has none, and the same value twice), F1 in validation after an eighth, a quarter, half and all of the steps, seconds a
step. Settings are chosen by F1 in validation at the threshold 0. The learning rates are three, a factor of about 3
apart; where the best lies at an edge, the grid goes on. The rate falls linearly to 0. All methods make the same steps
on the same batches.

    python -m experiments.spans --scale smoke
    torchrun --standalone --nproc-per-node 2 -m experiments.spans
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from experiments.focal import IGNORED, Size, entities, hashed, padded, token_pieces
from experiments.harness import SEEDS, Experiment, Job, Settings, Task, main
from lossbook.data.entities import Span, SpanSplit, Triple, conll04, resume_ner
from lossbook.data.public import TaggedSplit, wnut17
from lossbook.focal import sigmoid_focal_loss
from lossbook.spans import (
    GlobalPointer,
    decode_spans,
    decode_triples,
    power_bce,
    span_f1,
    span_loss,
    span_mask,
    spans_to_index,
    triple_f1,
)

Found = list[dict[Any, float]]  # for each sentence its spans or triples, each with its score
PairLoss = Callable[[Tensor, Tensor, Tensor], Tensor]

RESUME, FIFTH, TWENTIETH = "Résumé NER", "Résumé NER, 20 % of the sentences", "Résumé NER, 5 % of the sentences"
POSTS, NEWS = "WNUT17", "CoNLL04"
SETS = {RESUME: "resume-ner", FIFTH: "resume-ner", TWENTIETH: "resume-ner", POSTS: "wnut17", NEWS: "conll04"}
SHARES = {FIFTH: 0.2, TWENTIETH: 0.05}  # of the sentences to train

MULTI, MEAN, SUM, BASE = "multi-label softmax", "BCE, mean", "BCE, sum", "BCE, base rate"
WEIGHTED, FOCAL, POWER = "weighted BCE", "focal loss", "power BCE"
SOFTMAX, CRF = "softmax tagger", "CRF tagger"
KNOBS: dict[str, Settings] = {
    **{method: {} for method in (MULTI, MEAN, SUM, BASE)},
    WEIGHTED: {"weight": 10.0},
    FOCAL: {"gamma": 2.0, "alpha": 0.75},
    POWER: {"n": 11.0},
    **{method: {} for method in (SOFTMAX, CRF)},
}
FROM_BASE_RATE = (BASE, WEIGHTED, FOCAL)

# Shares of the steps behind which a final run looks at validation data.
LOOKS = {"eighth": 0.125, "quarter": 0.25, "half": 0.5, "whole": 1.0}
HEAD = 16  # size of a token's q and k
DROPOUT = 0.3
MOST_SPANS, MOST_ENDS = 64, 16  # so many spans, or subjects and objects, of a sentence are read off, the highest ones
LOWEST = -8.0  # a tuned threshold is at least this
METRICS = {
    "f1": "F1, threshold 0",
    "f1_tuned": "F1, tuned threshold",
    "entity_f1": "F1 of entities, threshold 0",
    **{f"f1_{share}": f"F1 in validation, {share} of the steps" for share in LOOKS},
    "seconds": "seconds a step",
}

SIZES = {
    "smoke": {
        **dict.fromkeys((RESUME, FIFTH, TWENTIETH), Size(8, 8, 512, 1, 4, 3, rows=16)),
        POSTS: Size(8, 8, 512, 1, 4, 16, rows=16),
        NEWS: Size(8, 8, 512, 1, 4, 16, rows=8),
    },
    "cpu": {
        RESUME: Size(64, 64, 2**12, 2, 12, 3),
        FIFTH: Size(64, 64, 2**12, 6, 8, 3),
        TWENTIETH: Size(64, 64, 2**12, 12, 4, 3),
        POSTS: Size(64, 64, 2**13, 5, 24, 16),
        NEWS: Size(64, 64, 2**12, 9, 16, 16),
    },
    "gpu": {
        RESUME: Size(256, 256, 2**16, 20, 32, 3),
        FIFTH: Size(256, 256, 2**16, 40, 16, 3),
        TWENTIETH: Size(256, 256, 2**16, 80, 8, 3),
        POSTS: Size(256, 256, 2**16, 20, 32, 24),
        NEWS: Size(256, 256, 2**16, 60, 16, 24),
    },
}
RATES = {"smoke": (0.003, 0.01), "cpu": (0.003, 0.01, 0.03), "gpu": (0.001, 0.003, 0.01)}


# Sentences


@dataclass(frozen=True)
class Form:
    """What there is to find: so many types of entities, so many predicates.

    With predicates, the matrices of a sentence are those of the types, of subjects, of objects, of the heads of each
    predicate, and of the tails of each.
    """

    types: int
    predicates: int = 0

    @property
    def triangular(self) -> int:
        """The matrices of spans, which come first."""
        return self.types + (2 if self.predicates else 0)

    @property
    def matrices(self) -> int:
        """All matrices."""
        return self.triangular + 2 * self.predicates

    def cells(self, spans: Sequence[Span], triples: Sequence[Triple]) -> list[Span]:
        """The true cells (matrix, row, column) of a sentence, each once."""
        found = set(spans)
        for s_h, s_t, p, o_h, o_t in triples:
            head = self.triangular + p
            found |= {(self.types, s_h, s_t), (self.types + 1, o_h, o_t)}
            found |= {(head, s_h, o_h), (head + self.predicates, s_t, o_t)}
        return sorted(found)

    def mask(self, lengths: Tensor, length: int) -> Tensor:
        """The cells that count, ``(B, matrices, L, L)``."""
        spans = span_mask(lengths, length=length).expand(-1, self.triangular, -1, -1)
        if not self.predicates:
            return spans
        pairs = span_mask(lengths, length=length, triangular=False)
        return torch.cat([spans, pairs.expand(-1, 2 * self.predicates, -1, -1)], 1)


@dataclass(frozen=True, eq=False)
class Batch:
    """Sentences of like length: pieces ``(B, L, P)``, lengths ``(B,)``, true cells ``(B, matrices, k)``, BIO tags."""

    pieces: Tensor
    lengths: Tensor
    index: Tensor
    tags: Tensor
    spans: list[list[Span]]
    triples: list[list[Triple]]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("pieces", "lengths", "index", "tags")}
        return replace(self, **moved)


def bio(spans: Sequence[Span], length: int) -> list[int]:
    """A tag for each token: 0 outside, 2 a + 1 where a span of type a begins, 2 a + 2 where it goes on.

    Example:
        >>> bio([(1, 0, 2), (0, 3, 3)], 5)
        [3, 4, 4, 1, 0]
    """
    tags = [0] * length
    for kind, start, end in spans:
        tags[start : end + 1] = [2 * kind + 1] + [2 * kind + 2] * (end - start)
    return tags


def spans_of_bio(tags: Sequence[int]) -> list[Span]:
    """The spans that tags of :func:`bio` mark, read as the script conlleval does.

    Example:
        >>> spans_of_bio([3, 4, 4, 1, 0])
        [(1, 0, 2), (0, 3, 3)]
    """
    names = ("O" if tag == 0 else f"{'IB'[tag % 2]}-{(tag - 1) // 2}" for tag in tags)
    return [(int(kind), start, end - 1) for start, end, kind in sorted(entities(names))]


def untagged(split: TaggedSplit) -> SpanSplit:
    """Sentences with tags as sentences with spans."""
    return SpanSplit(split.tokens, [spans_of_bio(row.tolist()) for row in split.tags], [[] for _ in split.tokens])


def characters(tokens: Sequence[str]) -> list[list[str]]:
    """The pieces of the characters of a text: the character, and it with either neighbour.

    Example:
        >>> characters("很好")
        [['很', '<很', '很好'], ['好', '很好', '好>']]
    """
    marked = ["<", *tokens, ">"]
    return [[c, before + c, c + behind] for before, c, behind in zip(marked, tokens, marked[2:], strict=False)]


@cache
def sentences(name: str) -> tuple[dict[str, SpanSplit], Form]:
    """The splits of a public set."""
    if name == "conll04":
        news = conll04()
        form, splits = Form(len(news.types), len(news.predicates)), (news.train, news.validation, news.test)
    elif name == "wnut17":
        posts = wnut17()
        form = Form(len(posts.tags) // 2)
        splits = untagged(posts.train), untagged(posts.validation), untagged(posts.test)
    else:
        resumes = resume_ner()
        form, splits = Form(len(resumes.types)), (resumes.train, resumes.validation, resumes.test)
    return dict(zip(("train", "validation", "test"), splits, strict=True)), form


def batch_of(split: SpanSplit, rows: Sequence[int], form: Form, size: Size, chinese: bool) -> Batch:
    """Some sentences of a split."""
    tokens = [split.tokens[i] for i in rows]
    lengths = torch.tensor([len(row) for row in tokens])
    length = int(lengths.max())
    pieces = torch.zeros(len(rows), length, size.longest, dtype=torch.long)
    for i, row in enumerate(tokens):
        found = characters(row) if chinese else map(token_pieces, row)
        table = padded([[hashed(piece, size.buckets) for piece in each] for each in found], size.longest)
        pieces[i, : table.shape[0], : table.shape[1]] = table
    spans, triples = [split.spans[i] for i in rows], [split.triples[i] for i in rows]
    cells = [form.cells(*each) for each in zip(spans, triples, strict=True)]
    index = spans_to_index(cells, length, form.matrices, lengths=lengths, triangular=False)
    tags = [torch.tensor(bio(*each)) for each in zip(spans, lengths.tolist(), strict=True)]
    return Batch(pieces, lengths, index, pad_sequence(tags, True, IGNORED), spans, triples)


@lru_cache(maxsize=12)
def batches(task: str, part: str, size: Size, seed: int) -> list[Batch]:
    """A split in batches of sentences of like length; the seed draws which sentences, and how ties are broken."""
    splits, form = sentences(SETS[task])
    split = splits[part]
    rows = range(len(split.tokens[: size.rows]))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = torch.randperm(len(rows), generator=generator).tolist()
    if part == "train":
        order = order[: math.ceil(SHARES.get(task, 1.0) * len(rows))]
    order.sort(key=lambda i: len(split.tokens[i]))
    parts = [order[i : i + size.batch] for i in range(0, len(order), size.batch)]
    return [batch_of(split, rows, form, size, SETS[task] == "resume-ner") for rows in parts]


def base_rates(data: Sequence[Batch], form: Form) -> Tensor:
    """The log-odds of a true cell in each matrix, as :func:`lossbook.training.base_rate_bias` has them."""
    true = sum(((batch.index != IGNORED).sum((0, 2)) for batch in data), torch.zeros(form.matrices))
    every = sum((batch.lengths**2).sum() for batch in data)
    half = sum((batch.lengths * (batch.lengths + 1)).sum() for batch in data) / 2
    total = torch.where(torch.arange(form.matrices) < form.triangular, half, every)
    return ((true + 1) / (total - true + 1)).log()


# Networks


def turned(x: Tensor, lengths: Tensor) -> Tensor:
    """The tokens of each sentence in reverse; what is behind its end stays there. Features ``(B, L, H)``."""
    places, ends = torch.arange(x.shape[1], device=x.device), lengths.unsqueeze(-1)
    places = torch.where(places < ends, ends - 1 - places, places)
    return x.gather(1, places.unsqueeze(-1).expand_as(x))


class Reader(nn.Module):
    """Features of tokens ``(B, L, 2 hidden)``: the mean of a token's pieces, read by an LSTM in each direction.

    What drops out is the same at all tokens of a sentence.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.pieces = nn.EmbeddingBag(size.buckets, size.vector, mode="mean", padding_idx=0)
        self.forth, self.back = (nn.LSTM(size.vector, size.hidden, batch_first=True) for _ in range(2))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, pieces: Tensor, lengths: Tensor) -> Tensor:
        """The features of pieces ``(B, L, P)``."""
        x = self.thinned(self.pieces(pieces.flatten(0, 1)).unflatten(0, pieces.shape[:2]))
        back = turned(self.back(turned(x, lengths))[0], lengths)
        return self.thinned(torch.cat([self.forth(x)[0], back], -1))

    def thinned(self, x: Tensor) -> Tensor:
        """Features after dropout."""
        kept: Tensor = self.dropout(x.new_ones(len(x), 1, x.shape[-1]))
        return x * kept


class Pointer(nn.Module):
    """Scores of all pairs of tokens.

    Args:
        size: Of the network.
        form: What there is to find.
        bias: The last bias of each matrix at the start.
        pair_loss: The loss of scores, true cells and mask.
    """

    def __init__(self, size: Size, form: Form, bias: Tensor, pair_loss: PairLoss) -> None:
        super().__init__()
        self.form, self.pair_loss = form, pair_loss
        self.reader = Reader(size)
        heads = [GlobalPointer(2 * size.hidden, form.triangular, head_features=HEAD)]
        if form.predicates:
            heads.append(GlobalPointer(2 * size.hidden, 2 * form.predicates, head_features=HEAD, triangular=False))
        self.heads = nn.ModuleList(heads)
        self.bias = nn.Parameter(bias.clone().view(-1, 1, 1))

    def forward(self, batch: Batch) -> Tensor:
        """The scores ``(B, matrices, L, L)``."""
        features = self.reader(batch.pieces, batch.lengths)
        return torch.cat([head(features) for head in self.heads], 1) + self.bias

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        scores = self(batch)
        return self.pair_loss(scores, batch.index, self.form.mask(batch.lengths, scores.shape[-1]))

    def found(self, batch: Batch, lowest: float) -> tuple[Found, Found]:
        """The spans and triples whose scores are above ``lowest``; a triple's is the least of its four."""
        scores = self(batch)
        scores = scores.masked_fill(~self.form.mask(batch.lengths, scores.shape[-1]), -math.inf).cpu()
        types = self.form.types
        kinds = highest(scores[:, :types], MOST_SPANS)
        spans = [scored(row, kinds[i], (0, 1, 2)) for i, row in enumerate(decode_spans(kinds, threshold=lowest))]
        if not self.form.predicates:
            return spans, [{} for _ in spans]
        subjects, objects = (highest(scores[:, types + i : types + i + 1], MOST_ENDS) for i in (0, 1))
        heads, tails = scores[:, self.form.triangular :].chunk(2, 1)
        triples = []
        for i, row in enumerate(decode_triples(subjects, objects, heads, tails, threshold=lowest)):
            parts = [(subjects[i, 0], (0, 1)), (objects[i, 0], (3, 4)), (heads[i], (2, 0, 3)), (tails[i], (2, 1, 4))]
            four = [scored(row, values, places) for values, places in parts]
            triples.append({triple: min(each[triple] for each in four) for triple in row})
        return spans, triples


def highest(scores: Tensor, most: int) -> Tensor:
    """Scores ``(B, types, L, L)``: all but a sentence's ``most`` highest become minus infinity."""
    flat = scores.flatten(1)
    least = flat.topk(min(most, flat.shape[1])).values[:, -1:]
    return flat.masked_fill(flat < least, -math.inf).view_as(scores)


def scored(items: Sequence[tuple[int, ...]], values: Tensor, places: Sequence[int]) -> dict[Any, float]:
    """Each item with the entry of ``values`` that its numbers at ``places`` name."""
    if not items:
        return {}
    columns = torch.tensor(items).T
    return dict(zip(items, values[tuple(columns[i] for i in places)].tolist(), strict=True))


class Tagger(nn.Module):
    """Scores of the tags of each token, judged one by one or as a chain."""

    def __init__(self, size: Size, form: Form, chained: bool) -> None:
        super().__init__()
        self.reader = Reader(size)
        self.last = nn.Linear(2 * size.hidden, 2 * form.types + 1)
        self.chain = Chain(2 * form.types + 1) if chained else None

    def forward(self, batch: Batch) -> Tensor:
        """The scores ``(B, L, tags)``."""
        scores: Tensor = self.last(self.reader(batch.pieces, batch.lengths))
        return scores

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch."""
        scores = self(batch)
        if self.chain is not None:
            return self.chain.loss(scores, batch.tags, batch.lengths)
        return F.cross_entropy(scores.flatten(0, 1), batch.tags.flatten(), ignore_index=IGNORED)

    def found(self, batch: Batch, lowest: float) -> tuple[Found, Found]:
        """The spans, all with the score 1, and no triples."""
        scores = self(batch)
        tags = scores.argmax(-1) if self.chain is None else self.chain.best(scores, batch.lengths)
        lengths = batch.lengths.tolist()
        spans = [spans_of_bio(row[:n]) for row, n in zip(tags.tolist(), lengths, strict=True)]
        return [dict.fromkeys(row, 1.0) for row in spans], [{} for _ in spans]


class Chain(nn.Module):
    r"""A linear-chain conditional random field over tags.

    .. math::

        P(y) \propto \exp\Bigl(a_{y_1} + \sum_{i=1}^n s_{i, y_i} + \sum_{i=2}^n m_{y_{i-1}, y_i} + b_{y_n}\Bigr)

    The best chain is the slope of its value: the sum over chains with a maximum in place of the logarithm of sums
    depends on the scores through those that the best chain takes, each with slope 1.
    """

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.zeros(tags)), nn.Parameter(torch.zeros(tags))
        self.moves = nn.Parameter(torch.zeros(tags, tags))

    def over_all(self, scores: Tensor, lengths: Tensor, gather: Callable[[Tensor, int], Tensor]) -> Tensor:
        """``gather``, the log of sums or the maximum, over all chains: ``(B,)`` of scores ``(B, L, tags)``."""
        value = self.first + scores[:, 0]
        for i in range(1, scores.shape[1]):
            longer = gather(value.unsqueeze(-1) + self.moves, 1) + scores[:, i]
            value = torch.where((i < lengths).unsqueeze(-1), longer, value)
        return gather(value + self.last, 1)

    def value(self, scores: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """The exponent of the chains ``tags`` ``(B, L)``; what is behind the end does not count."""
        inside = torch.arange(tags.shape[1], device=tags.device) < lengths.unsqueeze(-1)
        tags = tags.masked_fill(~inside, 0)
        own = scores.gather(-1, tags.unsqueeze(-1)).squeeze(-1).masked_fill(~inside, 0).sum(1)
        moves = self.moves[tags[:, :-1], tags[:, 1:]].masked_fill(~inside[:, 1:], 0).sum(1)
        ends = tags.gather(1, lengths.unsqueeze(-1) - 1).squeeze(-1)
        return own + moves + self.first[tags[:, 0]] + self.last[ends]

    def loss(self, scores: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """The mean over sentences of -log P."""
        total = self.over_all(scores, lengths, torch.logsumexp)
        return (total - self.value(scores, tags, lengths)).mean()

    def best(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """The most probable chains ``(B, L)``."""
        with torch.enable_grad():
            scores = scores.detach().requires_grad_()
            value = self.over_all(scores, lengths, lambda x, dim: x.max(dim).values)
            (slope,) = torch.autograd.grad(value.sum(), scores)
        return slope.argmax(-1)


# Losses


def pair_loss(method: str, settings: Settings) -> PairLoss:
    """The loss of a method for scores ``(B, T, L, L)``, true cells ``(B, T, k)`` and a mask like the scores."""
    if method == MULTI:
        return lambda scores, index, mask: span_loss(scores, index, mask=mask)
    bce: Callable[..., Tensor] = F.binary_cross_entropy_with_logits
    if method == FOCAL:
        bce = partial(sigmoid_focal_loss, gamma=settings["gamma"], alpha=settings["alpha"])
    elif method not in (MEAN, SUM, BASE, WEIGHTED, POWER):
        raise ValueError(f"no method {method!r} for pairs of tokens")

    def of_pairs(s: Tensor, t: Tensor) -> Tensor:
        if method == WEIGHTED:
            return bce(s, t, 1 + (settings["weight"] - 1) * t, reduction="none")
        if method == POWER:
            return power_bce(s + even_score(settings["n"]), t, settings["n"], reduction="none")
        return bce(s, t, reduction="none")

    def loss(scores: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        each = of_pairs(scores.masked_fill(~mask, 0), dense(index, scores))
        return each.masked_fill(~mask, 0).sum() / (mask.sum() if method == MEAN else len(scores))

    return loss


def even_score(n: float) -> float:
    """The score at which the n-th power of the probability is 1/2.

    Example:
        >>> torch.tensor(even_score(11.0)).sigmoid().pow(11.0).item().__round__(6)
        0.5
    """
    return -math.log(math.expm1(math.log(2) / n))


def dense(index: Tensor, scores: Tensor) -> Tensor:
    """The true cells as zeros and ones like the scores."""
    target = torch.zeros_like(F.pad(scores.flatten(-2), (0, 1)))  # one place more, for the padding
    target = target.scatter(-1, index.masked_fill(index == IGNORED, target.shape[-1] - 1), 1)
    return target[..., :-1].view_as(scores)


def start(method: str, settings: Settings, data: Sequence[Batch], form: Form) -> Tensor:
    """The last bias of each matrix at the start."""
    if method == POWER:
        return torch.full((form.matrices,), -even_score(settings["n"]))
    if method not in FROM_BASE_RATE:
        return torch.zeros(form.matrices)
    return base_rates(data, form) + math.log(settings.get("weight", 1.0))


# Measures


@torch.no_grad()
def look(
    model: Pointer | Tagger, data: Sequence[Batch], device: torch.device, lowest: float = 0.0
) -> tuple[Found, Found]:
    """What a model finds in all sentences: spans and triples."""
    model.eval()
    spans: Found = []
    triples: Found = []
    for batch in data:
        for every, own in zip((spans, triples), model.found(batch.to(device), lowest), strict=True):
            every += own
    model.train()
    return spans, triples


def above(found: Found, threshold: float) -> list[list[Any]]:
    """What has a score above the threshold."""
    return [[item for item, score in row.items() if score > threshold] for row in found]


def best_cut(found: Found, true: Sequence[Sequence[Any]]) -> float:
    """The threshold with the greatest F1, midway between two scores; what was not found at all counts as missed.

    Example:
        >>> best_cut([{"a": 3.0, "b": 1.0}, {"c": 2.0}], [["a"], ["c", "d"]])
        1.5
    """
    ranked = sorted(
        ((score, item in row) for own, row in zip(found, true, strict=True) for item, score in own.items()),
        reverse=True,
    )
    total, hits, most, cut = sum(map(len, true)), 0, 0.0, 0.0
    behind = [(ranked[-1][0] - 1, False)] if ranked else []
    for n, ((score, right), (below, _)) in enumerate(pairwise(ranked + behind), 1):
        hits += right
        if score > below and 2 * hits / (n + total) > most:
            most, cut = 2 * hits / (n + total), (score + below) / 2
    return cut


# Runs


def fit(
    model: Pointer | Tagger, data: Sequence[Batch], job: Job, epochs: int, after: Callable[[str], None]
) -> tuple[int, float]:
    """Train in place; calls ``after`` with the name of each of ``LOOKS``. Returns the steps and the seconds of one."""
    order = torch.cat([torch.randperm(len(data)) for _ in range(epochs)])
    optimizer = torch.optim.Adam(model.parameters(), lr=job.settings["lr"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(order))
    seconds = 0.0
    places = [round(share * len(order)) for share in LOOKS.values()]
    for name, part in zip(LOOKS, order.tensor_split(places), strict=False):  # behind the last there is nothing
        began = time.perf_counter()
        for i in part.tolist():
            optimizer.zero_grad()
            model.loss(data[i].to(job.device)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)
        seconds += time.perf_counter() - began
        after(name)
    return len(order), seconds / len(order)


def run(job: Job) -> dict[str, float]:
    """One run."""
    size = SIZES[job.scale][job.task.name]
    form = sentences(SETS[job.task.name])[1]
    train = batches(job.task.name, "train", size, job.seed)
    validation, test = (batches(job.task.name, part, size, 0) for part in ("validation", "test"))
    model: Pointer | Tagger
    if job.method in (SOFTMAX, CRF):
        model = Tagger(size, form, job.method == CRF)
    else:
        bias = start(job.method, job.settings, train, form)
        model = Pointer(size, form, bias, pair_loss(job.method, job.settings))
    model.to(job.device)
    goal, f1 = (1, triple_f1) if form.predicates else (0, span_f1)

    def wanted(data: Sequence[Batch]) -> tuple[list[Any], list[Any]]:
        return [row for batch in data for row in batch.spans], [row for batch in data for row in batch.triples]

    metrics: dict[str, float] = {}

    def after(name: str) -> None:
        if job.final:
            found = look(model, validation, job.device)[goal]
            metrics[f"f1_{name}"] = f1(above(found, 0.0), wanted(validation)[goal])

    metrics["steps"], metrics["seconds"] = fit(model, train, job, size.epochs, after)
    if not job.final:
        return {"f1": f1(above(look(model, validation, job.device)[goal], 0.0), wanted(validation)[goal])}
    cut = best_cut(look(model, validation, job.device, LOWEST)[goal], wanted(validation)[goal])
    found, true = look(model, test, job.device, LOWEST), wanted(test)
    metrics["f1"], metrics["f1_tuned"] = (f1(above(found[goal], t), true[goal]) for t in (0.0, cut))
    metrics["entity_f1"] = span_f1(above(found[0], 0.0), true[0])
    return metrics


def facts(name: str, size: Size) -> dict[str, Any]:
    """What a reader of the record should know of a task."""
    network = "mean of the vectors of a token's pieces, two LSTMs, one in each direction, GlobalPointer with biases"
    chinese = SETS[name] == "resume-ner"
    shape = "a token's shape, itself, itself in lower case, its runs of three letters; all hashed"
    drawn = {"to train": f"{SHARES[name]:.0%} of the sentences, drawn from the seed"} if name in SHARES else {}
    return {
        "network": network,
        "splits": "the makers' own",
        **drawn,
        "pieces": "a character, and it with either neighbour; all hashed" if chinese else shape,
        "knobs": {method: dict(knob) for method, knob in KNOBS.items() if knob},
        "head": HEAD,
        "dropout": DROPOUT,
        "rate": "falls linearly to 0",
        **asdict(size),
    }


def tasks(scale: str) -> list[Task]:
    """The five tasks."""

    def methods(name: str) -> Mapping[str, Sequence[Settings]]:
        flat = name != NEWS
        return {
            method: [{"lr": lr, **knob} for lr in RATES[scale]]
            for method, knob in KNOBS.items()
            if flat or method not in (SOFTMAX, CRF)
        }

    return [
        Task(
            name,
            sets=(SETS[name],),
            methods=methods(name),
            score="f1",
            seeds=SEEDS if scale != "smoke" else SEEDS[:1],
            metrics=tuple(metric for metric in METRICS if name == NEWS or metric != "entity_f1"),
            extend="" if scale == "smoke" else "lr",
            facts=facts(name, SIZES[scale][name]),
        )
        for name in SETS
    ]


EXPERIMENT = Experiment(
    "spans",
    "the multi-label softmax, six forms of BCE and two taggers on spans and relations of public sentences",
    tasks,
    run,
    metrics=METRICS,
    baseline=BASE,
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
