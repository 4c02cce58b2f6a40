"""Chapter 1 on public data: six losses for tasks with several true labels, with the threshold fixed and tuned.

Compared are binary cross-entropy (BCE), BCE with a weight on the positives, BCE that starts at the base rate, focal
loss, asymmetric loss (Ridnik and others, arXiv 2009.14119) and the multi-label softmax loss. The data are bibtex (159
labels), delicious (983 labels) and GoEmotions (28 labels).

On one data set every method trains the same network from the same start, on the same batches, for the same number of
steps; every loss is summed over the labels and averaged over the rows. bibtex and delicious have no validation split:
the last 15 % of a fixed shuffle of their training rows serve as one.

A trained network is judged twice: with the threshold at score 0, which is probability 1/2 for the losses that have
probabilities, and with the one threshold for all labels that has the best micro-F1 on validation data. The settings
are those with the best validation micro-F1 at the tuned threshold. That is fair to the losses whose scores are not
meant to be cut at 0, and it is friendly to BCE. Who tunes no threshold chooses the settings at threshold 0: three more
tasks measure that. They come second and start from the runs of the first three where the settings are the same.

Run ``python -m experiments.multilabel_softmax`` (``--scale smoke`` for seconds, ``--scale gpu`` for the full form).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import SEEDS, Experiment, Job, Task, as_json, main
from lossbook.data.public import bibtex, delicious, goemotions
from lossbook.focal import asymmetric_loss, sigmoid_focal_loss
from lossbook.metrics import best_threshold, exact_match, macro_f1, micro_f1
from lossbook.models import text_features
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.training import base_rate_bias, predict, seeded, train

Loss = Callable[[Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor]

VALIDATION_SHARE = 0.15


@dataclass(frozen=True)
class Form:
    """What is fixed for a data set at a scale.

    Attributes:
        hidden: Width of the network's only hidden layer.
        dropout: Share of it that training drops.
        epochs: Passes over the training rows.
        batch_size: Rows per step.
        rows: Only so many training rows, validation rows and test rows; None for all.
        buckets: GoEmotions: numbers that words and letter trigrams are hashed to.
    """

    hidden: int
    dropout: float
    epochs: int
    batch_size: int
    rows: int | None = None
    buckets: int = 0


FORMS = {
    "bibtex": {
        "smoke": Form(8, 0.5, 1, 64, rows=64),
        "cpu": Form(256, 0.5, 12, 64),
        "gpu": Form(2048, 0.5, 30, 64),
    },
    "delicious": {
        "smoke": Form(8, 0.2, 1, 64, rows=64),
        "cpu": Form(256, 0.2, 6, 128),
        "gpu": Form(2048, 0.2, 30, 128),
    },
    "GoEmotions": {
        "smoke": Form(8, 0.2, 1, 64, rows=64, buckets=256),
        "cpu": Form(64, 0.2, 5, 256, buckets=2**13),
        "gpu": Form(512, 0.5, 10, 128, buckets=2**16),
    },
}
AT_ZERO = ", threshold 0"  # ends the names of the tasks without a tuned threshold
MOST_PIECES = 160  # of a text in GoEmotions; the rest is cut off


# ------------------------------------------------------------------------------------------------------------ data


def data_set(job: Job) -> str:
    """The data set of a job's task."""
    return job.task.name.removesuffix(AT_ZERO)


def split_rows(n: int, share: float = VALIDATION_SHARE) -> tuple[Tensor, Tensor]:
    """The numbers of n rows in a fixed shuffle, cut into those to train and the last ``share`` to validate."""
    with seeded(0):
        order = torch.randperm(n)
    at = n - round(share * n)
    return order[:at], order[at:]


def bag(texts: Sequence[str], buckets: int, most: int = MOST_PIECES) -> Tensor:
    """The hashed words and letter trigrams of each text as a row of ``most`` numbers, filled with 0 at the end."""
    rows = torch.zeros(len(texts), most, dtype=torch.int32)
    for start in range(0, len(texts), 256):  # text_features makes a large table
        numbers = text_features(texts[start : start + 256], buckets=buckets).flatten(1)
        filled_first = (numbers == 0).to(torch.uint8).argsort(dim=1, stable=True)
        numbers = numbers.gather(1, filled_first)[:, :most]
        rows[start : start + 256, : numbers.shape[1]] = numbers
    return rows


@cache
def table(name: str) -> tuple[Split, Split, Split]:
    """Training, validation and test rows of bibtex or delicious."""
    data = {"bibtex": bibtex, "delicious": delicious}[name]()
    fit, validation = split_rows(len(data.train.features))
    features, targets = data.train.features, data.train.targets
    return (
        (features[fit], targets[fit]),
        (features[validation], targets[validation]),
        (data.test.features, data.test.targets),
    )


def texts(form: Form) -> dict[str, Tensor]:
    """GoEmotions as numbers."""
    data = goemotions()
    tensors = {}
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        tensors[name] = bag(split.texts[: form.rows], form.buckets)
        tensors[f"{name} targets"] = split.targets[: form.rows]
    return tensors


def load(job: Job, form: Form) -> list[Split]:
    """The three splits of a job's data set."""
    if form.buckets:
        kept = job.keep(f"goemotions-{form.buckets}-{form.rows}", lambda: texts(form))
        return [(kept[name], kept[f"{name} targets"]) for name in ("train", "validation", "test")]
    return [(x[: form.rows], y[: form.rows]) for x, y in table(data_set(job))]


# ------------------------------------------------------------------------------------------------ network and losses


def network(form: Form, fit: Split, start: str | None = None) -> nn.Module:
    """One hidden layer; over texts it starts from the mean of the vectors of their pieces.

    ``start`` sets the last bias to the base rate of the training rows ``fit``: of ``each label``, or of ``all labels``.
    """
    inputs, targets = fit
    first: nn.Module
    if form.buckets:
        first = nn.EmbeddingBag(form.buckets, form.hidden, mode="mean", padding_idx=0)
    else:
        first = nn.Linear(inputs.shape[1], form.hidden)
    last = nn.Linear(form.hidden, targets.shape[1])
    if start is not None:
        with torch.no_grad():
            each = base_rate_bias(targets)
            last.bias.copy_(each if start == "each label" else base_rate_bias(targets.reshape(-1, 1), smoothing=0.0))
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(form.dropout), last)


def positive_weight(targets: Tensor, weight: float | str) -> Tensor:
    """The weight of each label's positives: one number, or ``balanced``: negatives per positive of that label."""
    true = targets.sum(0).double()
    if weight == "balanced":
        return ((len(targets) - true) / true.clamp(min=1)).float()
    return torch.full_like(true, float(weight)).float()


def bce(input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, summed over the labels, averaged over the rows."""
    total = F.binary_cross_entropy_with_logits(input, target.to(input.dtype), reduction="sum", pos_weight=weight)
    return total / len(input)


def loss_of(method: str, settings: Mapping[str, Any], targets: Tensor) -> Loss:
    """The loss of a method; ``targets`` are those of the training rows, on the device."""
    if method == "weighted BCE":
        weight = positive_weight(targets, settings["weight"])
        return lambda s, t: bce(s, t, weight)
    if method == "focal loss":
        options = {"gamma": settings["gamma"], "alpha": settings["alpha"]}
        return lambda s, t: sigmoid_focal_loss(s, t, **options, reduction="sum") / len(s)
    if method == "asymmetric loss":
        shape = {"gamma_neg": settings["gamma_neg"], "gamma_pos": 0.0, "clip": settings["clip"]}
        return lambda s, t: asymmetric_loss(s, t, **shape, reduction="sum") / len(s)
    return multilabel_softmax_loss if method == "multi-label softmax" else bce


def measure(scores: Tensor, truth: Tensor, threshold: float) -> dict[str, float]:
    """The three metrics at threshold 0 and at the given one, and sigma of that, its place among probabilities."""
    found = {"sigmoid_of_tuned": torch.sigmoid(torch.tensor(threshold)).item()}
    for suffix, cut in (("", 0.0), ("_tuned", threshold)):
        for metric in (micro_f1, macro_f1, exact_match):
            found[metric.__name__ + suffix] = metric(scores > cut, truth)
    return found


def train_and_measure(job: Job) -> dict[str, float]:
    """Train once and measure, on test data in a final run."""
    form = FORMS[data_set(job)][job.scale]
    fit, validation, test = load(job, form)
    model = network(form, fit, job.settings.get("start"))
    train(
        model,
        loss_of(job.method, job.settings, fit[1].to(job.device)),
        fit,
        epochs=form.epochs,
        batch_size=form.batch_size,
        lr=job.settings["lr"],
        seed=job.seed,
        device=job.device,
    )
    scores = predict(model, validation[0])
    threshold = best_threshold(scores, validation[1])
    if not job.final:
        return measure(scores, validation[1], threshold)
    return measure(predict(model, test[0]), test[1], threshold)


def run(job: Job) -> dict[str, float]:
    """One run, or what was kept of the same one in the other task on the data set."""
    about = {**job.about(), "task": data_set(job), "device": job.device.type}
    name = hashlib.sha256(as_json(about).encode()).hexdigest()[:24]

    def make() -> dict[str, Tensor]:
        with seeded(job.seed):
            found = train_and_measure(job)
        return {metric: torch.tensor(value, dtype=torch.float64) for metric, value in found.items()}

    found = {metric: value.item() for metric, value in job.keep(name, make).items()}
    return {metric: found[metric] for metric in job.task.metrics or found}


# ------------------------------------------------------------------------------------------------------------- tasks

KNOBS: dict[str, list[dict[str, Any]]] = {
    "BCE": [{}],
    "weighted BCE": [{"weight": 3.0}, {"weight": 10.0}, {"weight": "balanced"}],
    "BCE, bias at the base rate": [{"start": "all labels"}, {"start": "each label"}],
    "focal loss": [{"gamma": 2.0, "alpha": 0.25}, {"gamma": 2.0, "alpha": None}, {"gamma": 2.0, "alpha": 0.75}],
    "asymmetric loss": [
        {"gamma_neg": 4.0, "clip": 0.05},
        {"gamma_neg": 4.0, "clip": 0.0},
        {"gamma_neg": 2.0, "clip": 0.05},
    ],
    "multi-label softmax": [{}],
}
SETTINGS = {"smoke": 6, "cpu": 6, "gpu": 12}  # tried for every method: values of its knob times learning rates
SETS = {"bibtex": "mulan-bibtex", "delicious": "mulan-delicious", "GoEmotions": "goemotions"}
CENTERS = {"bibtex": 0.002, "delicious": 0.005, "GoEmotions": 0.02}  # of the learning rates


def rates(center: float, n: int) -> list[float]:
    """n learning rates around ``center``, in equal factors: at most 2.8 from one to the next and 32 over all."""
    step = min(1.5, 5 / max(n - 1, 1))
    return [float(f"{center * 2 ** (step * (i - (n - 1) / 2)):.2g}") for i in range(n)]


def grid(method: str, center: float, scale: str) -> list[dict[str, Any]]:
    """The settings of a method: as many for every method, so one with fewer knobs tries more learning rates."""
    knobs = KNOBS[method]
    settings = [{"lr": lr, **knob} for knob in knobs for lr in rates(center, SETTINGS[scale] // len(knobs))]
    return settings[:2] if scale == "smoke" else settings


def facts(name: str, form: Form, at_zero: bool) -> dict[str, Any]:
    """What a reader of the record should know."""
    known: dict[str, dict[str, Any]] = {
        "bibtex": {
            "labels": 159,
            "inputs": "1,836 features, each 0 or 1: whether a word occurs",
            "rows": "4,148 to train, 732 to validate (the last 15 % of a fixed shuffle of the training rows), 2,515 to "
            "test, of which 9 also stand, with the same labels, among the rows to train and validate",
        },
        "delicious": {
            "labels": 983,
            "inputs": "500 features, each 0 or 1: whether a word occurs",
            "rows": "10,982 to train, 1,938 to validate (the last 15 % of a fixed shuffle of the training rows), 3,185 "
            "to test, of which 63 also stand, with the same labels, among the rows to train and validate",
        },
        "GoEmotions": {
            "labels": 28,
            "inputs": f"the words of a text and their letter trigrams, hashed to {form.buckets - 1:,} numbers, the "
            f"first {MOST_PIECES} of a text",
            "rows": "43,410 texts to train, 5,426 to validate, 5,427 to test, of which 37 also stand among the texts "
            "to train",
        },
    }
    first = "the mean of a vector for each piece" if form.buckets else "a linear layer"
    return {
        **known[name],
        "network": f"{first}, {form.hidden} hidden units, ReLU, dropout {form.dropout:g}, a linear layer",
        "training": f"Adam, {form.epochs} epochs, {form.batch_size} rows a step, no early stopping",
        "cut off at this scale": f"all but {form.rows} rows of each split" if form.rows else "no rows",
        "tuning": "by micro-F1 on validation data at " + ("threshold 0" if at_zero else "the threshold best there"),
    }


def tasks(scale: str) -> list[Task]:
    """The three data sets, first with the settings chosen at the tuned threshold, then with those chosen at 0."""
    return [
        Task(
            name + (AT_ZERO if at_zero else ""),
            sets=(SETS[name],),
            methods={method: grid(method, CENTERS[name], scale) for method in KNOBS},
            score="micro_f1" if at_zero else "micro_f1_tuned",
            seeds=SEEDS[:2] if scale == "smoke" else SEEDS,
            metrics=("micro_f1", "macro_f1", "exact_match") if at_zero else (),
            stage=1 if at_zero else 0,
            facts=facts(name, forms[scale], at_zero),
        )
        for at_zero in (False, True)
        for name, forms in FORMS.items()
    ]


EXPERIMENT = Experiment(
    "multilabel_softmax",
    "six losses for tasks with several true labels, with the threshold at score 0 and with a tuned one",
    tasks,
    run,
    metrics={
        "micro_f1": "micro-F1",
        "macro_f1": "macro-F1",
        "exact_match": "exact match",
        "micro_f1_tuned": "micro-F1, tuned threshold",
        "macro_f1_tuned": "macro-F1, tuned threshold",
        "exact_match_tuned": "exact match, tuned threshold",
    },
    baseline="BCE",
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
