"""Focal and truncated losses on public texts, against cross-entropy that starts at the base rate.

Three tasks, each with everything fixed but the loss and the start of the last bias:

- ``WNUT17``: find the named entities in posts, one of 13 tags for each token, most of them ``O``. A GRU reads the
  tokens both ways. Compared: cross-entropy, also with class weights, and the softmax forms of focal loss and of soft
  truncation. Measured: F1, precision and recall of entities, where the whole span and its type have to be right.
- ``rt-polarity 1:20``: find the positive sentences where one in twenty is positive. A bag of words and letters.
  Measured: average precision, and F1 of the rare class at the threshold 0 and at the one that was best in validation.
- ``sentiment-zh``: are Chinese reviews positive, about half of them are. A bag of characters and their pairs and
  triples. Hard truncation after a warm-up is compared as in post 4293 of scientific spaces. Measured: accuracy. A third
  of the test texts also stand in the training split, so accuracy is measured on the others too, and settings are chosen
  on validation texts that stand in neither of the other splits.

"Bias 0" starts with a last bias of 0, "base rate" and all others with the log-odds of the classes' shares in training.
Where a loss has weights, they count in the shares. Hard truncation warms up with cross-entropy in the first half of the
steps, within one run of the optimizer. All methods of a task make the same number of steps on the same batches.

    python -m experiments.focal --scale smoke
    torchrun --standalone --nproc-per-node 2 -m experiments.focal
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from experiments.harness import Experiment, Job, Settings, Task, main
from lossbook.data.public import TaggedSplit, rt_polarity, sentiment_zh, wnut17
from lossbook.focal import (
    hard_truncated_bce,
    sigmoid_focal_loss,
    soft_truncated_bce,
    soft_truncated_cross_entropy,
    softmax_focal_loss,
)
from lossbook.metrics import average_precision, best_threshold, micro_f1
from lossbook.models import WORD
from lossbook.training import predict, train

Loss = Callable[[Tensor, Tensor], Tensor]

TAGGING, RARE, CHINESE = "WNUT17", "rt-polarity 1:20", "sentiment-zh"
ZERO, BASE = "cross-entropy, bias 0", "cross-entropy, base rate"
WEIGHTED, FOCAL, SOFT, HARD = "weighted cross-entropy", "focal loss", "soft truncation", "hard truncation, warmed up"
METRICS = {
    "entity_f1": "entity F1",
    "entity_precision": "entity precision",
    "entity_recall": "entity recall",
    "average_precision": "average precision",
    "f1_tuned": "F1, tuned threshold",
    "f1_zero": "F1, threshold 0",
    "accuracy": "accuracy, all texts",
    "accuracy_unseen": "accuracy, unseen texts",
}
RARITY = 20  # negatives for each positive sentence of rt-polarity 1:20
IGNORED = -100  # the tag of a place behind the end of a sentence


@dataclass(frozen=True)
class Size:
    """The network of a task and its training.

    Attributes:
        vector: Length of the vector of a piece of text.
        hidden: Units of the hidden layer, or of the GRU in each direction.
        buckets: Different pieces of text, after hashing.
        epochs: Passes over the training data.
        batch: Texts in a step.
        longest: So many pieces are read, the first ones: of a text, or of each token.
        rows: So many texts of each split are used; None for all.
    """

    vector: int
    hidden: int
    buckets: int
    epochs: int
    batch: int
    longest: int
    rows: int | None = None


SIZES = {
    "smoke": {
        TAGGING: Size(8, 8, 512, 1, 32, 16, rows=64),
        RARE: Size(8, 8, 512, 2, 32, 100, rows=400),
        CHINESE: Size(8, 8, 512, 2, 32, 60, rows=200),
    },
    "cpu": {
        TAGGING: Size(64, 48, 2**13, 7, 96, 16),
        RARE: Size(16, 32, 2**14, 6, 64, 300),
        CHINESE: Size(16, 32, 2**15, 4, 128, 400),
    },
    "gpu": {
        TAGGING: Size(256, 256, 2**15, 20, 64, 24),
        RARE: Size(128, 256, 2**16, 10, 64, 600),
        CHINESE: Size(128, 256, 2**17, 8, 128, 2000),
    },
}
# Learning rates: two (or three) for each of three values of a method's own knob, and as many in all for cross-entropy.
RATES: dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "smoke": dict.fromkeys((TAGGING, RARE, CHINESE), ((0.01,), (0.01, 0.02))),
    "cpu": {
        TAGGING: ((0.003, 0.006), (0.001, 0.002, 0.003, 0.006, 0.01, 0.02)),
        RARE: ((0.003, 0.01), (0.0005, 0.001, 0.003, 0.006, 0.01, 0.02)),
        CHINESE: ((0.001, 0.003), (0.0003, 0.0005, 0.001, 0.002, 0.003, 0.006)),
    },
    "gpu": dict.fromkeys(
        (TAGGING, RARE, CHINESE),
        ((0.0005, 0.001, 0.003), (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.003, 0.006, 0.01, 0.02)),
    ),
}


def grids(scale: str) -> dict[str, dict[str, list[Settings]]]:
    """The settings of each method of each task. All grids of a task have the same length."""
    ends = 2 if scale == "smoke" else 3

    def plain(task: str) -> list[Settings]:
        return [{"lr": lr} for lr in RATES[scale][task][1]]

    def crossed(task: str, *knobs: Settings) -> list[Settings]:
        return [{"lr": lr, **knob} for knob in knobs[:ends] for lr in RATES[scale][task][0]]

    def knob(name: str, *values: float) -> list[Settings]:
        return [{name: value} for value in values]

    gammas, sharps, margins = (
        knob("gamma", 0.5, 2.0, 1.0),
        knob("sharpness", 1.0, 5.0, 2.0),
        knob("margin", 0.5, 0.6, 0.9),
    )
    balanced: list[Settings] = [{"gamma": 0.5}, {"gamma": 2.0}, {"gamma": 2.0, "alpha": 0.25}]
    return {
        TAGGING: {
            ZERO: plain(TAGGING),
            BASE: plain(TAGGING),
            WEIGHTED: crossed(TAGGING, *knob("power", 0.25, 1.0, 0.5)),
            FOCAL: crossed(TAGGING, *gammas),
            SOFT: crossed(TAGGING, *knob("sharpness", 0.1, 1.0, 0.03)),  # more than two classes want a small one
        },
        RARE: {
            ZERO: plain(RARE),
            BASE: plain(RARE),
            WEIGHTED: crossed(RARE, *knob("weight", 3.0, RARITY, 0.3)),
            FOCAL: crossed(RARE, *balanced),
            SOFT: crossed(RARE, *sharps),
            HARD: crossed(RARE, *margins),
        },
        CHINESE: {
            BASE: plain(CHINESE),
            FOCAL: crossed(CHINESE, *gammas),
            SOFT: crossed(CHINESE, *sharps),
            HARD: crossed(CHINESE, *margins),
        },
    }


# Losses


class Warmed:
    """One loss in the first calls and another one in all later ones."""

    def __init__(self, first: Loss, then: Loss, calls: int) -> None:
        self.first, self.then, self.left = first, then, calls

    def __call__(self, scores: Tensor, target: Tensor) -> Tensor:
        self.left -= 1
        return (self.first if self.left >= 0 else self.then)(scores, target)


def binary_loss(method: str, settings: Settings, steps: int) -> Loss:
    """The loss of a method for scores and boolean targets; ``steps`` is how often it will be called."""
    bce = partial(sigmoid_focal_loss, gamma=0.0)
    if method in (ZERO, BASE):
        return bce
    if method == WEIGHTED:

        def weighted(s: Tensor, t: Tensor) -> Tensor:
            return F.binary_cross_entropy_with_logits(s, t.to(s.dtype), 1 + (settings["weight"] - 1) * t.to(s.dtype))

        return weighted
    if method == FOCAL:
        return partial(sigmoid_focal_loss, gamma=settings["gamma"], alpha=settings.get("alpha"))
    if method == SOFT:
        return partial(soft_truncated_bce, sharpness=settings["sharpness"])
    if method == HARD:
        return Warmed(bce, partial(hard_truncated_bce, margin=settings["margin"]), steps // 2)
    raise ValueError(f"no method {method!r} for binary targets")


def tag_loss(method: str, settings: Settings, weight: Tensor) -> Loss:
    """The loss of a method for scores ``(B, T, tags)`` and tags ``(B, T)``; the weights are those of the tags."""
    if method == FOCAL:
        return partial(softmax_focal_loss, gamma=settings["gamma"], ignore_index=IGNORED)
    if method == SOFT:
        return partial(soft_truncated_cross_entropy, sharpness=settings["sharpness"], ignore_index=IGNORED)
    if method not in (ZERO, BASE, WEIGHTED):
        raise ValueError(f"no method {method!r} for tags")

    def loss(s: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(s.flatten(0, 1), t.flatten(), weight, ignore_index=IGNORED)

    return loss


def tag_weights(target: Tensor, tags: int, power: float) -> tuple[Tensor, Tensor]:
    """How often each tag stands in a table, plus one, and its weight: a power of its rarity.

    Its rarity is the count of the most frequent tag divided by its own. Power 0 weighs all alike. At power 1
    all tags weigh the same in sum.
    """
    counts = torch.bincount(target[target != IGNORED], minlength=tags) + 1.0
    return counts, (counts.max() / counts) ** power


def log_odds(share: float, weight: float = 1.0) -> float:
    """The score at which weighted BCE of a constant score rests; without a weight, the base rate."""
    return math.log(weight * share / (1 - share))


# Texts as numbers


def hashed(piece: str, buckets: int) -> int:
    """A number from 1 to ``buckets - 1``."""
    return 1 + zlib.crc32(piece.encode()) % (buckets - 1)


def shape(token: str) -> str:
    """How a token is written: X, x and 0 for capitals, letters and digits, others as they are, without repetitions.

    Example:
        >>> shape("@McDonalds2017"), shape("#NYC"), shape("USA-based")
        ('@XxXx0', '#X', 'X-x')
    """
    kinds = ("X" if c.isupper() else "0" if c.isdigit() else "x" if c.isalpha() else c for c in token)
    return "".join(kind for kind, _ in groupby(kinds))


def token_pieces(token: str) -> list[str]:
    """The pieces of a token: its shape, itself as it is and in lower case, and all its runs of three letters.

    A link is one piece whatever its address.
    """
    if token.lower().startswith(("http", "www.")):
        return ["s:link"]
    marked = f"<{token.lower()}>"
    runs = [marked[i : i + 3] for i in range(len(marked) - 2)]
    return ["s:" + shape(token), "w:" + token, "l:" + token.lower(), *runs]


def padded(rows: Sequence[Sequence[int]], longest: int) -> Tensor:
    """Lists of numbers as the rows of one table, cut at ``longest`` and filled with 0; one column at least."""
    width = max(1, min(longest, max(map(len, rows), default=0)))
    return torch.tensor([[*row[:width], *[0] * (width - len(row))] for row in rows]).reshape(len(rows), width)


def tagged(split: TaggedSplit, size: Size) -> tuple[Tensor, Tensor]:
    """Pieces ``(N, tokens, pieces)`` and tags ``(N, tokens)`` of the sentences."""
    sentences = split.tokens[: size.rows]
    length = max(map(len, sentences))
    pieces = torch.zeros(len(sentences), length, size.longest, dtype=torch.int64)
    tags = torch.full((len(sentences), length), IGNORED)
    for i, (tokens, row) in enumerate(zip(sentences, split.tags, strict=False)):
        table = padded([[hashed(p, size.buckets) for p in token_pieces(token)] for token in tokens], size.longest)
        pieces[i, : len(tokens), : table.shape[1]] = table
        tags[i, : len(tokens)] = row
    return pieces, tags


def words_and_letters(text: str) -> list[str]:
    """The words of an English text and their runs of two to four letters, in the order in which they come.

    Example:
        >>> words_and_letters("Go on")
        ['<go>', '<g', 'go', 'o>', '<go', 'go>', '<on>', '<o', 'on', 'n>', '<on', 'on>']
    """
    pieces = []
    for word in WORD.findall(text.lower()):
        marked = f"<{word}>"
        pieces += [marked, *(marked[i : i + n] for n in (2, 3, 4) for i in range(len(marked) - n + 1))]
    return list(dict.fromkeys(pieces))


def characters(text: str) -> list[str]:
    """The characters of a text, their pairs and triples, in the order in which they come.

    Example:
        >>> characters("很好很")
        ['很', '很好', '很好很', '好', '好很']
    """
    return list(dict.fromkeys(text[i : i + n] for i in range(len(text)) for n in (1, 2, 3) if i + n <= len(text)))


def bags(texts: Sequence[str], pieces_of: Callable[[str], list[str]], size: Size) -> Tensor:
    """The different pieces of each text as numbers, ``(N, pieces)``."""
    return padded([[hashed(piece, size.buckets) for piece in pieces_of(text)] for text in texts], size.longest)


# Networks


class Bag(nn.Module):
    """One score for a bag of pieces: the mean of their vectors, one hidden layer.

    The vectors are short at the start: longer ones make it learn texts by heart.

    Args:
        size: Its size.
        bias: The last bias at the start.
    """

    def __init__(self, size: Size, bias: float) -> None:
        super().__init__()
        self.pieces = nn.EmbeddingBag(size.buckets, size.vector, mode="mean", padding_idx=0)
        with torch.no_grad():
            self.pieces.weight *= 0.1
        self.hidden = nn.Linear(size.vector, size.hidden)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(size.hidden, 1)
        nn.init.constant_(self.last.bias, bias)

    def forward(self, pieces: Tensor) -> Tensor:
        """The scores ``(B,)`` of pieces ``(B, pieces)``."""
        scores: Tensor = self.last(self.dropout(torch.relu(self.hidden(self.pieces(pieces)))))
        return scores.squeeze(-1)


class Tagger(nn.Module):
    """Scores of the tags of each token: the mean of its pieces' vectors, read by a GRU in both directions.

    Args:
        size: Its size.
        bias: The last biases at the start, one for each tag.
    """

    def __init__(self, size: Size, bias: Tensor) -> None:
        super().__init__()
        self.pieces = nn.EmbeddingBag(size.buckets, size.vector, mode="mean", padding_idx=0)
        self.gru = nn.GRU(size.vector, size.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(2 * size.hidden, len(bias))
        with torch.no_grad():
            self.last.bias.copy_(bias)

    def forward(self, pieces: Tensor) -> Tensor:
        """The scores ``(B, tokens, tags)`` of pieces ``(B, tokens, pieces)``."""
        there = (pieces > 0).any(-1)
        lengths = there.sum(1)
        x = self.pieces.weight.new_zeros(*there.shape, self.pieces.embedding_dim)
        x[there] = self.dropout(self.pieces(pieces[there]))
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        scores: Tensor = self.last(self.dropout(states))
        return scores


# Metrics


def entities(tags: Iterable[str]) -> set[tuple[int, int, str]]:
    """The entities of a sentence: first place, place behind the last, type. As the script conlleval counts them.

    An entity starts at ``B-``, and also at an ``I-`` that continues no entity of its type. It ends before the next
    start or ``O``.

    Example:
        >>> sorted(entities(["I-person", "B-person", "I-person", "I-group", "O"]))
        [(0, 1, 'person'), (1, 3, 'person'), (3, 4, 'group')]
    """
    found: set[tuple[int, int, str]] = set()
    start, inside = 0, ""
    place = -1
    for place, tag in enumerate([*tags, "O"]):
        head, _, kind = tag.partition("-")
        if inside and (head != "I" or kind != inside):
            found.add((start, place, inside))
            inside = ""
        if kind and not inside:
            start, inside = place, kind
    return found


def entity_scores(predicted: Tensor, target: Tensor, tags: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all sentences; tags ``(N, tokens)``, where -100 is no place."""
    hits = guessed = true = 0
    for row, wanted in zip(predicted.tolist(), target.tolist(), strict=True):
        there = [t != IGNORED for t in wanted]
        ours = entities(tags[t] for t, counts in zip(row, there, strict=True) if counts)
        theirs = entities(tags[t] for t, counts in zip(wanted, there, strict=True) if counts)
        hits, guessed, true = hits + len(ours & theirs), guessed + len(ours), true + len(theirs)
    return {
        "entity_f1": 2 * hits / max(guessed + true, 1),
        "entity_precision": hits / max(guessed, 1),
        "entity_recall": hits / max(true, 1),
    }


def diluted(scores: Tensor, labels: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Scores and labels in which each negative stands ``times`` times, so that the positives are as rare as wanted."""
    scores = torch.cat([scores[labels], scores[~labels].repeat(times)])
    return scores, torch.arange(len(scores)) < labels.sum()


# Data


@lru_cache(maxsize=1)
def tagging_data(size: Size) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[str, ...]]:
    """The splits of WNUT17 and the tags."""
    data = wnut17()
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return {name: tagged(split, size) for name, split in splits.items()}, data.tags


@lru_cache(maxsize=1)
def rare_data(size: Size) -> dict[str, tuple[Tensor, Tensor]]:
    """rt-polarity in three splits, fixed: 70 % of each class to train, 15 % to validate and 15 % to test."""
    data = rt_polarity()
    pieces, labels = bags(data.texts, words_and_letters, size), data.labels.bool()
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for label in (False, True):
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)][: size.rows]
        ends = [int(0.7 * len(rows)), int(0.85 * len(rows))]
        for name, part in zip(parts, rows.tensor_split(ends), strict=True):
            parts[name].append(part)
    return {name: (pieces[torch.cat(rows)], labels[torch.cat(rows)]) for name, rows in parts.items()}


def thinned(labels: Tensor, seed: int) -> Tensor:
    """The rows of all negatives and of one positive for twenty negatives; the seed draws which."""
    positives = labels.nonzero()[:, 0]
    order = torch.randperm(len(positives), generator=torch.Generator().manual_seed(seed))
    kept = max(1, int((~labels).sum()) // RARITY)
    return torch.cat([(~labels).nonzero()[:, 0], positives[order[:kept]]])


@lru_cache(maxsize=1)
def chinese_data(size: Size) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """The splits of sentiment-zh, and which test texts do not stand in the training split.

    Validation texts that stand in another split are left out.
    """
    data = sentiment_zh()
    known, tested = set(data.train.texts[: size.rows]), set(data.test.texts[: size.rows])
    splits = {}
    for name, split in {"train": data.train, "validation": data.validation, "test": data.test}.items():
        texts, labels = split.texts[: size.rows], split.labels[: size.rows].bool()
        if name == "validation":
            kept = [i for i, text in enumerate(texts) if text not in known and text not in tested]
            texts, labels = [texts[i] for i in kept], labels[kept]
        splits[name] = bags(texts, characters, size), labels
    return splits, torch.tensor([text not in known for text in data.test.texts[: size.rows]])


# Runs


def run_tagging(job: Job, size: Size) -> dict[str, float]:
    """One run on WNUT17."""
    splits, tags = tagging_data(size)
    counts, weight = tag_weights(splits["train"][1], len(tags), job.settings.get("power", 0.0))
    bias = torch.zeros(len(tags)) if job.method == ZERO else F.normalize(counts * weight, p=1, dim=0).log()
    model = Tagger(size, bias)
    loss = tag_loss(job.method, job.settings, weight.to(job.device))
    fit(model, loss, splits["train"], job, size)
    pieces, wanted = splits["test" if job.final else "validation"]
    return entity_scores(predict(model, pieces).argmax(-1), wanted, tags)


def run_rare(job: Job, size: Size) -> dict[str, float]:
    """One run on the imbalanced rt-polarity."""
    splits = rare_data(size)
    pieces, labels = splits["train"]
    rows = thinned(labels, job.seed)
    model = fit_bag((pieces[rows], labels[rows]), job, size)
    scores, target = {}, {}
    for name in ("validation", "test") if job.final else ("validation",):
        pieces, labels = splits[name]
        scores[name], target[name] = diluted(predict(model, pieces), labels, RARITY)
    name = "test" if job.final else "validation"
    tuned = best_threshold(scores["validation"], target["validation"])
    return {
        "average_precision": average_precision(scores[name], target[name]),
        "f1_tuned": micro_f1(scores[name] > tuned, target[name]),
        "f1_zero": micro_f1(scores[name] > 0, target[name]),
    }


def run_chinese(job: Job, size: Size) -> dict[str, float]:
    """One run on sentiment-zh."""
    splits, unseen = chinese_data(size)
    model = fit_bag(splits["train"], job, size)
    pieces, labels = splits["test" if job.final else "validation"]
    right = ((predict(model, pieces) > 0) == labels).double()
    return {
        "accuracy": right.mean().item(),
        "accuracy_unseen": right[unseen].mean().item() if job.final else right.mean().item(),
    }


def fit_bag(data: tuple[Tensor, Tensor], job: Job, size: Size) -> Bag:
    """A trained :class:`Bag`."""
    start = 0.0
    if job.method != ZERO:
        start = log_odds(data[1].double().mean().item(), job.settings.get("weight", 1.0))
    model = Bag(size, start)
    steps = size.epochs * math.ceil(len(data[1]) / size.batch)
    fit(model, binary_loss(job.method, job.settings, steps), data, job, size)
    return model


def fit(model: nn.Module, loss: Loss, data: tuple[Tensor, Tensor], job: Job, size: Size) -> None:
    """Train a model, the same way for every method."""
    train(
        model,
        loss,
        data,
        epochs=size.epochs,
        batch_size=size.batch,
        lr=job.settings["lr"],
        seed=job.seed,
        device=job.device,
    )


RUNS: dict[str, Callable[[Job, Size], dict[str, float]]] = {
    TAGGING: run_tagging,
    RARE: run_rare,
    CHINESE: run_chinese,
}


def run(job: Job) -> dict[str, float]:
    """One run."""
    return RUNS[job.task.name](job, SIZES[job.scale][job.task.name])


def facts(name: str, size: Size) -> dict[str, Any]:
    """What a reader of the record should know of a task."""
    ours: dict[str, dict[str, Any]] = {
        TAGGING: {
            "network": "mean of the vectors of a token's pieces, GRU in both directions, linear layer",
            "splits": "the makers' own",
            "pieces": "a token's shape, itself, itself in lower case, its runs of three letters; all hashed",
        },
        RARE: {
            "network": "mean of the vectors of a text's pieces, one hidden layer",
            "splits": "70 % to train, 15 % to validate, 15 % to test, fixed",
            "rarity": "of the positives to train the seed draws one for twenty negatives; in the other splits all "
            "positives stay, and each negative counts twenty times",
            "pieces": "words and their runs of two to four letters, hashed",
        },
        CHINESE: {
            "network": "mean of the vectors of a text's pieces, one hidden layer",
            "splits": "the makers' own; validation texts that stand in another split are left out",
            "pieces": "characters, pairs and triples of characters, hashed",
        },
    }
    warm_up = {} if name == TAGGING else {"warm-up": "the first half of the steps, with cross-entropy"}
    return {**ours[name], **warm_up, **asdict(size)}


def tasks(scale: str) -> list[Task]:
    """The three tasks."""
    sets = {TAGGING: "wnut17", RARE: "rt-polarity", CHINESE: "sentiment-zh"}
    metrics = {
        TAGGING: ("entity_f1", "entity_precision", "entity_recall"),
        RARE: ("average_precision", "f1_tuned", "f1_zero"),
        CHINESE: ("accuracy", "accuracy_unseen"),
    }
    score = {TAGGING: "entity_f1", RARE: "average_precision", CHINESE: "accuracy_unseen"}
    return [
        Task(
            name,
            sets=(sets[name],),
            methods=methods,
            score=score[name],
            tuning_seeds=(101,) if name == TAGGING else (101, 102),
            metrics=metrics[name],
            facts=facts(name, SIZES[scale][name]),
        )
        for name, methods in grids(scale).items()
    ]


EXPERIMENT = Experiment(
    "focal",
    "cross-entropy from two starts, weighted cross-entropy, focal loss and truncation on three public sets of texts",
    tasks,
    run,
    metrics=METRICS,
    baseline=BASE,
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
