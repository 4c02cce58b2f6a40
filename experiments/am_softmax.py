"""Search among intents that training has not seen: losses for the same encoder, and letter counts without training.

BANKING77 and CLINC150 hold questions and what each of them wants, its intent. Some intents are unseen: an encoder is
trained on questions of the others, and then every test question of an unseen intent is searched among the stored
questions of the unseen intents. A search succeeds at h if one of the h nearest stored questions has the right intent.

Which intents are unseen is drawn from the seed. A fixed part of the others is for validation: tuning trains without
it and searches among its questions, each against all the rest. Final runs train on it, too. Validation intents are
never unseen ones. All losses get the same encoder, the same steps and the same batches of 32 groups, each of four
questions of one intent; a triplet loss needs such groups. All grids are equally long.

Rivals: softmax on a linear layer, normalised softmax, AM-softmax, ArcFace, the short form of the multiplied angle
(min-cos), a triplet loss within the batch, and two without training: the encoder before its first step, and letter
counts, weighted by their rarity (TF-IDF) and with a grid of their own. ``top1_joined`` is the search by the mean of two
cosines: the method's own and that of letter counts with fixed settings.

Then a threshold. Test questions of the seen intents are searched among the stored questions of the seen intents. They
should be accepted, and outliers should not. Outliers are CLINC150's requests out of scope, and in BANKING77 the test
questions of the unseen intents. A question's score is its greatest cosine to the store: ``auroc`` is the area under the
ROC curve. The threshold accepts 95 of 100 validation questions of the seen intents; ``oos_accepted`` and
``in_scope_accepted`` are what it accepts of the outliers and of the test questions.

Run ``python -m experiments.am_softmax --scale smoke|cpu|gpu``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import Experiment, Job, Task, main
from lossbook.am_softmax import (
    CosineClassifier,
    additive_angular_margin,
    additive_cosine_margin,
    margin_softmax_loss,
    multiplied_angle,
    retrieval_accuracy,
)
from lossbook.data.public import banking77, clinc150
from lossbook.models import WORD, TextEncoder, text_features
from lossbook.training import predict, seeded, train

GROUP = 4  # questions of one intent that enter a batch together
GROUPS = 32  # in a batch
ACCEPTED = 0.95  # of the validation questions
LETTERS = (2, 4)  # n-grams of the letter counts that are joined to a method
UNTRAINED, COUNTED = "untrained encoder", "letter counts"


@dataclass(frozen=True)
class Size:
    """How large everything is at a scale.

    Attributes:
        intents: Of each set, so many of the first ones.
        questions: Of each intent, so many of the first ones in each split.
        steps: Of Adam.
        word: Length of a word's vector.
        state: Length of the GRU's state.
        buckets: Numbers that words and pieces of words are hashed to.
        words: Of a question, so many of the first ones.
    """

    intents: int | None
    questions: int | None
    steps: int
    word: int
    state: int
    buckets: int
    words: int


SIZES = {
    "smoke": Size(10, 8, 3, 16, 8, 512, 8),
    "cpu": Size(None, None, 300, 128, 64, 4096, 32),
    "gpu": Size(None, None, 1500, 256, 256, 16384, 64),
}
UNSEEN = {"BANKING77": 20, "CLINC150": 40}
VALIDATION = {"BANKING77": 10, "CLINC150": 20}


def of_scale(counts: dict[str, int], name: str, scale: str) -> int:
    """How many of a set's intents; 3 in the smallest form."""
    return 3 if scale == "smoke" else counts[name]


# --- Data ---


@dataclass(frozen=True, eq=False)
class Corpus:
    """All questions of a set.

    Attributes:
        texts: They themselves.
        features: The same as numbers for the encoder.
        labels: Their intents; -1 is out of scope.
        split: 0 to train and to store, 1 to validate, 2 to test.
    """

    texts: list[str]
    features: Tensor
    labels: Tensor
    split: Tensor

    def rows(self, split: int | None, intents: Tensor) -> Tensor:
        """The places of the questions of these intents in a split, in all splits but the test split if None."""
        there = self.split < 2 if split is None else self.split == split
        return (there & torch.isin(self.labels, intents)).nonzero()[:, 0]


def every_fifth(labels: Tensor) -> Tensor:
    """Whether a row is the fifth, tenth, ... of its label."""
    return (place_in_class(labels) + 1) % 5 == 0


def place_in_class(labels: Tensor) -> Tensor:
    """How many earlier rows have the same label."""
    order = labels.argsort(stable=True)
    _, counts = torch.unique(labels, return_counts=True)
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels)) - first
    return place


@cache
def questions(name: str, scale: str) -> tuple[list[str], Tensor, Tensor]:
    """Texts, labels and splits of a set. BANKING77 has no validation split: a fifth of its training split is taken."""
    if name == "BANKING77":
        bank = banking77()
        texts = bank.train.texts + bank.test.texts
        label = torch.cat([bank.train.labels, bank.test.labels])
        validates = every_fifth(bank.train.labels).long()
        split = torch.cat([validates, torch.full_like(bank.test.labels, 2)])
    else:
        clinc = clinc150()
        parts = (clinc.train, clinc.validation, clinc.test)
        texts = [text for part in parts for text in part.texts] + clinc.oos_test
        label = torch.cat([*(part.labels for part in parts), torch.full((len(clinc.oos_test),), -1)])
        lengths = torch.tensor([len(part.texts) for part in parts] + [len(clinc.oos_test)])
        split = torch.tensor([0, 1, 2, 2]).repeat_interleave(lengths)

    size = SIZES[scale]
    kept = label < (size.intents or len(label))
    if size.questions is not None:
        kept &= place_in_class(3 * label + split) < size.questions
    return [text for text, keep in zip(texts, kept.tolist(), strict=True) if keep], label[kept], split[kept]


@cache
def corpus(name: str, scale: str) -> Corpus:
    """A set at a scale."""
    texts, labels, split = questions(name, scale)
    size = SIZES[scale]
    shorter = [" ".join(words(text)[: size.words]) for text in texts]
    return Corpus(list(texts), text_features(shorter, buckets=size.buckets), labels, split)


def words(text: str) -> list[str]:
    """What the encoder sees of a text."""
    return WORD.findall(text.lower())


@dataclass(frozen=True, eq=False)
class Intents:
    """Which intents are which: ``seen`` and ``unseen`` in the final run, ``validation`` is a part of the seen ones."""

    seen: Tensor
    unseen: Tensor
    validation: Tensor


def divide(n: int, unseen: int, validation: int, seed: int) -> Intents:
    """Draw the intents. Those for validation are the same for all seeds, so that they are never unseen."""
    fixed = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    rest = fixed[validation:]
    hidden = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:unseen]]
    seen = torch.arange(n)
    return Intents(seen[~torch.isin(seen, hidden)], hidden.sort().values, fixed[:validation].sort().values)


def groups_of(labels: Tensor, size: int, number: int, generator: torch.Generator) -> Tensor:
    """Groups of rows with the same label, ``(number, size)``.

    They come from passes over the rows, each in a new order: in a pass no row occurs twice, and less than ``size`` rows
    of a label are left out.
    """
    passes: list[Tensor] = []
    while sum(map(len, passes)) < number:
        order = torch.randperm(len(labels), generator=generator)
        order = order[labels[order].argsort(stable=True)]
        left = labels[order]
        whole = torch.bincount(left) // size * size
        groups = order[place_in_class(left) < whole[left]].view(-1, size)
        passes.append(groups[torch.randperm(len(groups), generator=generator)])
    return torch.cat(passes)[:number]


# --- Training ---


class Reader(nn.Module):
    """An encoder and a last layer that take the places of questions, of any shape, and not the questions."""

    features: Tensor

    def __init__(self, features: Tensor, encoder: TextEncoder, last: nn.Module) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        self.encoder, self.last = encoder, last

    def forward(self, places: Tensor) -> Tensor:
        features = self.features[places.flatten()]
        longest = int((features > 0).any(-1).sum(1).max())
        scores: Tensor = self.last(self.encoder(features[:, : max(longest, 1)]))
        return scores


def triplet_loss(embedding: Tensor, target: Tensor, *, margin: float, mining: str) -> Tensor:
    """How much a stranger's cosine exceeds a fellow's less the margin, where it does.

    The mean over all triplets of the batch that are not in order yet (``mining`` ``"all"``), or over the questions,
    each with its farthest fellow and its nearest stranger (``"hard"``).
    """
    z = F.normalize(embedding, dim=-1)
    cosine = z @ z.T
    same = target.unsqueeze(1) == target
    if mining == "hard":
        stranger = cosine.masked_fill(same, -2).amax(1)
        return F.relu(stranger - cosine.masked_fill(~same, 2).amin(1) + margin).mean()
    anchor, fellow = (same & ~torch.eye(len(z), dtype=torch.bool, device=z.device)).nonzero(as_tuple=True)
    excess = F.relu(cosine[anchor] - cosine[anchor, fellow].unsqueeze(1) + margin)
    excess = excess.masked_fill(same[anchor], 0)
    return excess.sum() / (excess > 0).sum().clamp(min=1)


def loss_of(method: str, settings: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of scores, or embeddings, and targets."""
    if method == "triplet":
        return partial(triplet_loss, margin=settings["margin"], mining=settings["mining"])
    scale = settings["scale"]
    if method == "softmax":
        return lambda scores, target: F.cross_entropy(scale * scores, target)
    margin = settings.get("margin")
    psi: Callable[[Tensor], Tensor]
    if method == "normalised softmax":
        psi = additive_cosine_margin(0.0)
    elif method == "AM-softmax":
        psi = additive_cosine_margin(margin)
    elif method == "ArcFace":
        psi = additive_angular_margin(margin)
    else:
        psi = multiplied_angle(margin)
    return partial(margin_softmax_loss, psi=psi, scale=scale)


def fit(job: Job, data: Corpus, intents: Tensor) -> Reader:
    """An encoder that the method has trained on these intents."""
    size = SIZES[job.scale]
    rows = data.rows(0, intents)
    labels = torch.searchsorted(intents, data.labels[rows])
    known = data.features[(data.split == 0) & (data.labels >= 0)]  # the stored ones too, without their intents
    with seeded(job.seed):
        how = {"gain": job.settings["gain"]} if job.method == UNTRAINED else {}
        rare = known if job.settings.get("rarity", True) else None
        encoder = TextEncoder(size.word, size.state, buckets=size.buckets, features=rare, **how)
        last: nn.Module = nn.Identity()
        if job.method == "softmax":
            last = nn.Linear(encoder.out_features, len(intents))
        elif job.method not in ("triplet", UNTRAINED):
            last = CosineClassifier(encoder.out_features, len(intents))
    model = Reader(data.features, encoder, last).to(job.device)
    if job.method == UNTRAINED:
        return model
    groups = groups_of(labels, GROUP, size.steps * GROUPS, torch.Generator().manual_seed(job.seed))
    loss = loss_of(job.method, job.settings)
    train(
        model,
        lambda scores, target: loss(scores, target.flatten()),
        (rows[groups], labels[groups]),
        epochs=1,
        batch_size=GROUPS,
        lr=job.settings["lr"],
        seed=job.seed,
        device=job.device,
    )
    model.last = nn.Identity()
    return model


# --- Search ---

Similarity = Callable[[Tensor, Tensor], Tensor]  # of the places of queries and stored questions: a matrix of cosines


def by_vectors(vectors: Tensor) -> Similarity:
    """Cosines of vectors, one for each place."""
    z = F.normalize(vectors, dim=-1)
    return lambda queries, stored: z[queries] @ z[stored].T


@cache
def by_letters(name: str, scale: str, shortest: int, longest: int) -> Similarity:
    """Cosines of letter counts. How rare a run of letters is comes from the training split, without its intents."""
    data = corpus(name, scale)
    counter = TfidfVectorizer(analyzer="char_wb", ngram_range=(shortest, longest), sublinear_tf=True, dtype=np.float32)
    counter.fit([data.texts[i] for i in ((data.split == 0) & (data.labels >= 0)).nonzero()[:, 0].tolist()])
    counts = counter.transform(data.texts)
    return lambda queries, stored: torch.from_numpy((counts[queries.numpy()] @ counts[stored.numpy()].T).toarray())


def found(cosine: Tensor, intent: Tensor, stored: Tensor, ks: Iterable[int] = (1, 5, 10)) -> list[float]:
    """The shares of queries with one of their intent among the k nearest stored ones.

    As in :func:`lossbook.am_softmax.retrieval_accuracy`, a stranger that ties counts as nearer, and NaN finds nothing.

    Args:
        cosine: ``(queries, stored)``.
        intent: Of the queries.
        stored: Of the stored ones.
        ks: How many of the nearest.
    """
    own = intent.unsqueeze(1) == stored
    best = cosine.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    # a NaN compares with nothing: without the negation it would never be nearer
    nearer = (~(cosine < best - 8 * torch.finfo(cosine.dtype).eps) & ~own).sum(1)
    there = own.any(1)
    return [(there & (nearer < k)).double().mean().item() for k in ks]


def greatest(similarity: Similarity, queries: Tensor, stored: Tensor) -> Tensor:
    """The cosine of each query with the nearest stored question."""
    return torch.cat([similarity(some, stored).amax(1) for some in queries.split(512)])  # type: ignore[no-untyped-call]


def rejection(validation: Tensor, inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well scores tell inside from outside, and what passes the threshold that most validation scores pass."""
    threshold = validation.sort().values[int((1 - ACCEPTED) * len(validation))]
    scores, target = torch.cat([inside, outside]), torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))])
    return {
        "auroc": float(roc_auc_score(target.numpy(), scores.numpy())),
        "oos_accepted": (outside >= threshold).double().mean().item(),
        "in_scope_accepted": (inside >= threshold).double().mean().item(),
    }


def run(job: Job) -> dict[str, float]:
    """Train and search: among validation intents in a tuning run, else among unseen ones."""
    name = job.task.name
    data = corpus(name, job.scale)
    n = int(data.labels.max()) + 1
    intents = divide(n, of_scale(UNSEEN, name, job.scale), of_scale(VALIDATION, name, job.scale), job.seed)
    learnt = intents.seen if job.final else intents.seen[~torch.isin(intents.seen, intents.validation)]
    if job.method == COUNTED:
        similarity = by_letters(name, job.scale, job.settings["shortest"], job.settings["longest"])
    else:
        model = fit(job, data, learnt)
    if not job.final:
        rows = data.rows(None, intents.validation)
        if job.method != COUNTED:
            share = retrieval_accuracy(predict(model, rows), data.labels[rows], k=1)[1]
            return {"top1": share.item()}
        cosine = similarity(rows, rows).fill_diagonal_(-2)
        return {"top1": found(cosine, data.labels[rows], data.labels[rows], (1,))[0]}

    if job.method != COUNTED:
        vectors = predict(model, torch.arange(len(data.labels)))
        if not vectors.isfinite().all():
            return dict.fromkeys(METRICS, float("nan"))
        similarity = by_vectors(vectors)
    queries, stored = data.rows(2, intents.unseen), data.rows(0, intents.unseen)
    cosine, labels = similarity(queries, stored), (data.labels[queries], data.labels[stored])
    counted = by_letters(name, job.scale, *LETTERS)(queries, stored)
    top1, top5, top10 = found(cosine, *labels)
    store = data.rows(0, intents.seen)
    outside = data.rows(2, torch.tensor([-1])) if name == "CLINC150" else queries
    validation, inside, outliers = (
        greatest(similarity, rows, store) for rows in (data.rows(1, intents.seen), data.rows(2, intents.seen), outside)
    )
    return {
        "top1": top1,
        "top5": top5,
        "top10": top10,
        "top1_joined": found((cosine + counted) / 2, *labels, (1,))[0],
        **rejection(validation, inside, outliers),
    }


# --- Grids ---


def product(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations, the last name changing fastest."""
    settings: list[dict[str, Any]] = [{}]
    for name, choices in values.items():
        settings = [{**old, name: choice} for old in settings for choice in choices]
    return settings


def grids(scale: str) -> dict[str, list[dict[str, Any]]]:
    """Equally many settings for each rival: two in the smallest form, else nine, in full size twelve.

    The vectors of the encoder are short: softmax needs a large factor of its scores, and a margin's scale is not one.
    """
    full = scale == "gpu"
    rates = {"lr": (0.0003, 0.001, 0.003)}

    def margins(scales: Sequence[float], low: float, usual: float) -> list[dict[str, Any]]:
        settings = product(**rates, scale=scales, margin=(usual, low))
        return [s for s in settings if full or s["margin"] == usual or s["scale"] == scales[-1]]

    lengths = [(1, 3), (1, 4), (2, 3), (2, 4), (2, 5), (3, 3), (3, 4), (3, 5), (4, 5)]
    lengths += [(1, 2), (2, 6), (3, 6)] if full else []
    gains = (0.0, 0.1, 0.3, 1.0, 3.0)
    rivals = {
        "softmax": product(lr=(0.001, 0.003, 0.01), scale=(1.0, 30.0, 100.0, 300.0) if full else (1.0, 100.0, 300.0)),
        "normalised softmax": product(**rates, scale=(5.0, 10.0, 20.0, 30.0) if full else (10.0, 20.0, 30.0)),
        "AM-softmax": margins((10.0, 30.0), 0.2, 0.35),
        "ArcFace": margins((10.0, 30.0), 0.2, 0.5),
        "min-cos": margins((30.0, 10.0), 2, 4),
        "triplet": product(**rates, margin=(0.1, 0.2), mining=("all", "hard")),
        UNTRAINED: product(rarity=(True, False), gain=(*gains, 10.0) if full else gains),
        COUNTED: [{"shortest": shortest, "longest": longest} for shortest, longest in lengths],
    }
    if not full:
        rivals["triplet"] = [s for s in rivals["triplet"] if (s["margin"], s["mining"]) != (0.2, "hard")]
        rivals[UNTRAINED] = rivals[UNTRAINED][:9]
    return {method: grid[::7] if scale == "smoke" else grid for method, grid in rivals.items()}


METRICS = {
    "top1": "at 1",
    "top5": "at 5",
    "top10": "at 10",
    "top1_joined": "at 1, joined with letter counts",
    "auroc": "area under ROC",
    "oos_accepted": "outliers accepted",
    "in_scope_accepted": "in scope accepted",
}


def tasks(scale: str) -> list[Task]:
    """BANKING77 and CLINC150."""
    size = SIZES[scale]
    made = []
    for name, set_name in (("BANKING77", "banking77"), ("CLINC150", "clinc150")):
        unseen, validation = of_scale(UNSEEN, name, scale), of_scale(VALIDATION, name, scale)
        texts, labels, split = questions(name, scale)
        inside = [int(((split == part) & (labels >= 0)).sum()) for part in range(3)]
        known = {tuple(words(text)) for text, part in zip(texts, split.tolist(), strict=True) if part == 0}
        met = sum(tuple(words(t)) in known for t, p in zip(texts, split.tolist(), strict=True) if p == 2)
        longer = sum(len(words(text)) > size.words for text in texts)
        own = name == "CLINC150"
        facts = {
            "intents": f"{int(labels.max()) + 1}, of them {unseen} unseen; {validation} of the others for validation",
            "questions": f"{inside[0]} to train and to store, {inside[1]} to validate, {inside[2]} to test",
            "validation": "the makers' split" if own else "every fifth training question of an intent",
            "outliers": f"{int((labels < 0).sum())} out of scope" if own else "test questions of unseen intents",
            "test questions with the words of a training question": met,
            "questions cut off": f"{longer}, after {size.words} words",
            "steps": size.steps,
            "batch": f"{GROUPS} groups of {GROUP} questions of an intent",
            "encoder": f"words of {size.word} numbers, GRU of {size.state}, {size.buckets} buckets",
        }
        made.append(Task(name, (set_name,), grids(scale), "top1", facts=facts))
    return made


EXPERIMENT = Experiment(
    "am_softmax",
    "Search among unseen intents, and refusal of outliers: losses for one encoder, and letter counts without training",
    tasks,
    run,
    METRICS,
    baseline="softmax",
    packages=("scikit-learn",),
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
