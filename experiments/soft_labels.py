"""Label smoothing and mixup, with BCE and with the multi-label softmax, on public data.

Six methods: each loss with hard labels, with label smoothing and with mixup. Four tasks: yeast (genes, 14 functions)
and GoEmotions (comments, 28 emotions), each as it is and with noise: every positive label of the training and
validation rows is replaced with chance 0.2 by a label that the row did not have.

In a task all methods have the same network, steps and batches, and equally many settings: three learning rates, and
three or four amounts of smoothing, of mixup's alpha or, for hard labels, of weight decay. Validation rows choose among
them by the micro-F1 at the best threshold, and give that threshold and the factor kappa of the fitted reading. yeast
has few rows to validate, so there each setting is tried with three seeds.

On test rows: F1 scores at the threshold 0 and at the chosen one, and three readings of the probability, sigmoid(s),
sigmoid(2s) and sigmoid(kappa s). A reading is judged by its Brier score and its calibration error, both over all label
decisions. Whoever gives every row the share that each label has in training has no calibration error to speak of, so
both are given for that too. With noise, the F1 scores are those of the true test labels, and the readings are judged
by test labels with the same noise, since that is what they learnt to tell.

Mixup mixes what the head of the network gets: the features of a gene, the vector of a text.

Run ``python -m experiments.soft_labels [--scale smoke|cpu|gpu]``; see :mod:`experiments.harness`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from experiments.harness import Experiment, Job, Settings, Task, main
from lossbook.data.public import MultilabelTextSplit, goemotions, yeast
from lossbook.metrics import best_threshold, calibration_error, exact_match, fit_scale, macro_f1, micro_f1
from lossbook.models import TextEncoder, text_features
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.soft_labels import mixup, multilabel_probabilities, smooth_labels
from lossbook.training import predict, train

Split = tuple[Tensor, Tensor]
NOISE = 0.2
VALIDATION_ROWS = 300  # of the 1,500 training rows of yeast
ROWS = {"smoke": 300, "cpu": 10_000, "gpu": None}  # training rows of GoEmotions
EPOCHS = {"yeast": {"smoke": 1, "cpu": 25, "gpu": 25}, "GoEmotions": {"smoke": 1, "cpu": 6, "gpu": 4}}
BATCH = {"yeast": 32, "GoEmotions": 128}
HIDDEN = {"smoke": 16, "cpu": 128, "gpu": 512}
TEXT = {"smoke": (16, 0), "cpu": (64, 0), "gpu": (256, 64)}  # size and GRU states of the text encoder
RATES = {"yeast": (1e-4, 3e-4, 1e-3), "GoEmotions": (1e-3, 4e-3, 1.6e-2)}
KNOBS: dict[str, dict[str, tuple[float, ...]]] = {  # decay is that of the head's weights
    "yeast": {"decay": (0.0, 1e-2, 3e-2, 1e-1), "smoothing": (0.01, 0.03, 0.1, 0.3), "alpha": (0.2, 1.0, 4.0, 16.0)},
    "GoEmotions": {"decay": (0.0, 1e-5, 1e-4), "smoothing": (0.03, 0.1, 0.3), "alpha": (0.2, 1.0, 4.0)},
}
TUNING_SEEDS = {"yeast": (101, 102, 103), "GoEmotions": (101,)}


def bce(scores: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy: the sum over labels, the mean over rows."""
    return F.binary_cross_entropy_with_logits(scores, target.to(scores.dtype), reduction="sum") / len(scores)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"BCE": bce, "multi-label softmax": multilabel_softmax_loss}
TREATMENTS = {"": "decay", ", smoothing": "smoothing", ", mixup": "alpha"}  # the end of a method's name -> its knob


class Net(nn.Module):
    """An encoder and a head. In training it stops after the encoder, so that the loss can mix what the head gets."""

    def __init__(self, encoder: nn.Module, size: int, hidden: int, labels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.last = nn.Linear(hidden, labels)
        self.head = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Dropout(0.2), self.last)

    def forward(self, inputs: Tensor) -> Tensor:
        """Vectors in training, scores in evaluation."""
        vectors: Tensor = self.encoder(inputs)
        return vectors if self.training else self.head(vectors)


def objective(model: Net, method: str, settings: Settings, seed: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What a step makes small: takes vectors of the encoder and targets."""
    loss = LOSSES[method.partition(", ")[0]]
    generator = torch.Generator().manual_seed(seed)  # of its own: mixup must not change batches and dropout

    def step(vectors: Tensor, target: Tensor) -> Tensor:
        if "alpha" in settings:
            vectors, target, _ = mixup(vectors, target, alpha=settings["alpha"], generator=generator)
        if "smoothing" in settings:
            target = smooth_labels(target, settings["smoothing"])
        value = loss(model.head(vectors), target)
        if settings.get("decay"):
            value = value + settings["decay"] / 2 * sum(w.square().sum() for w in model.head.parameters())
        return value

    return step


def replace_positives(target: Tensor, share: float, generator: Generator) -> Tensor:
    """Each positive, with chance ``share``, gives way to a label that the row has not. So rows keep their number.

    A row that has all its labels keeps them. The label that comes in is drawn evenly, without repeats.
    """
    lost = target & (torch.rand(target.shape, generator=generator) < share)
    # a random order of the labels that the row has not: as many of them come in as are lost
    order = torch.rand(target.shape, generator=generator).masked_fill(target, 2.0).argsort(1).argsort(1)
    free = (~target).sum(1, keepdim=True)
    lost &= lost.cumsum(1) <= free  # there may be too few to come in
    return (target & ~lost) | (order < lost.sum(1, keepdim=True))


def brier(p: Tensor, truth: Tensor) -> float:
    """Mean square of probability minus label, over all label decisions."""
    return (p.double() - truth.double()).square().mean().item()


def factor_of(scores: Tensor, truth: Tensor) -> float:
    """The factor kappa of the fitted reading, 0 where the scores say nothing, as after a few steps."""
    try:
        return fit_scale(scores, truth).factor
    except ValueError:
        return 0.0


def measures(validation: Split, test: Split, given: Tensor, shares: Tensor) -> dict[str, float]:
    """All metrics.

    Args:
        validation: Scores and labels of validation rows.
        test: The same of test rows.
        given: Labels of test rows with the noise that the labels to train have.
        shares: The share of each label in training.
    """
    scores, truth = test
    pred = scores > 0
    kappa = factor_of(*validation)
    readings = {
        "s": torch.sigmoid(scores),
        "2s": multilabel_probabilities(scores),
        "fitted": torch.sigmoid(kappa * scores.double()),
        "shares": shares.expand(truth.shape),
    }
    return {
        "micro_f1": micro_f1(pred, truth),
        "macro_f1": macro_f1(pred, truth),
        "exact_match": exact_match(pred, truth),
        "micro_f1_tuned": micro_f1(scores > best_threshold(*validation), truth),
        **{f"calibration_{name}": calibration_error(p, given) for name, p in readings.items()},
        **{f"brier_{name}": brier(p, given) for name, p in readings.items()},
        "kappa": kappa,
    }


def draw(rows: int, number: int | None) -> Tensor:
    """``number`` rows, the same in every run; all if None."""
    return torch.randperm(rows, generator=torch.Generator().manual_seed(0))[:number]


def shortened(texts: list[str]) -> list[str]:
    """Texts whose words end after 18 letters: one long row of letters would make the table of all texts large."""
    return [re.sub(r"([A-Za-z0-9]{18})[A-Za-z0-9]+", r"\1", text) for text in texts]


@lru_cache(1)
def yeast_splits(scale: str) -> tuple[Split, Split, Split]:
    """Standardised features and labels to train, to validate and to test."""
    table = yeast()
    rows = draw(len(table.train.targets), None)
    chosen = rows[VALIDATION_ROWS:], rows[:VALIDATION_ROWS]
    if scale == "smoke":
        chosen = chosen[0][:200], chosen[1][:100]
    x = table.train.features[chosen[0]]
    mean, std = x.mean(0), x.std(0)
    parts = [(table.train.features[i], table.train.targets[i]) for i in chosen]
    first, second, third = (((x - mean) / std, t) for x, t in (*parts, (table.test.features, table.test.targets)))
    return first, second, third


@lru_cache(1)
def goemotions_splits(scale: str) -> tuple[Split, Split, Split]:
    """Features and labels of texts to train, to validate and to test."""
    loaded = goemotions()

    def split(part: MultilabelTextSplit, number: int | None) -> Split:
        rows = draw(len(part.texts), number)
        return text_features(shortened([part.texts[i] for i in rows.tolist()])), part.targets[rows]

    few = 200 if scale == "smoke" else None
    return split(loaded.train, ROWS[scale]), split(loaded.validation, few), split(loaded.test, few)


def run(job: Job) -> dict[str, float]:
    """One training and what it gives."""
    data, _, noise = job.task.name.partition(", ")
    training, validation, test = (yeast_splits if data == "yeast" else goemotions_splits)(job.scale)
    given = test[1]
    if noise:
        generator = torch.Generator().manual_seed(job.seed)
        training, validation = ((x, replace_positives(t, NOISE, generator)) for x, t in (training, validation))
        given = replace_positives(given, NOISE, generator)
    labels = training[1].shape[1]
    hidden = HIDDEN[job.scale]
    if data == "yeast":
        model = Net(nn.Identity(), training[0].shape[1], hidden, labels)
    else:
        size, states = TEXT[job.scale]
        encoder = TextEncoder(size, states, features=training[0])
        model = Net(encoder, encoder.out_features, hidden, labels)
    if job.method.startswith("BCE"):  # starts at the base rate, as chapter 1 recommends; the other at 0
        nn.init.constant_(model.last.bias, torch.logit(training[1].float().mean()).item())
    else:
        nn.init.zeros_(model.last.bias)
    train(
        model,
        objective(model, job.method, job.settings, job.seed),
        training,
        epochs=EPOCHS[data][job.scale],
        batch_size=BATCH[data],
        lr=job.settings["lr"],
        seed=job.seed,
        device=job.device,
    )
    held_out = predict(model, validation[0]), validation[1]
    if not job.final:
        threshold = best_threshold(*held_out)
        return {"micro_f1_tuned": micro_f1(held_out[0] > threshold, held_out[1])}
    return measures(held_out, (predict(model, test[0]), test[1]), given, training[1].double().mean(0))


def tasks(scale: str) -> list[Task]:
    """Both data sets, as they are and with noise."""
    made = []
    facts = {
        "yeast": {
            "labels": 14,
            "rows": f"{200 if scale == 'smoke' else 1500 - VALIDATION_ROWS} to train, "
            f"{100 if scale == 'smoke' else VALIDATION_ROWS} to validate, cut off from the makers' training split by "
            "one fixed draw, 917 to test",
            "network": f"103 features, standardised; one hidden layer of {HIDDEN[scale]}, dropout 0.2",
        },
        "GoEmotions": {
            "labels": 28,
            "rows": f"{ROWS[scale] or 43410} of 43410 to train, by one fixed draw, 5426 to validate, 5427 to test"
            if scale != "smoke"
            else "300 to train, 200 to validate, 200 to test",
            "network": f"TextEncoder of size {TEXT[scale][0]} and {TEXT[scale][1]} GRU states, words cut off after 18 "
            f"letters; one hidden layer of {HIDDEN[scale]}, dropout 0.2",
        },
    }
    for data, rates in RATES.items():
        grids = {
            end: [{"lr": lr, knob: value} for lr in rates for value in KNOBS[data][knob]]
            for end, knob in TREATMENTS.items()
        }
        methods = {
            loss + end: grid[-2:] if scale == "smoke" else grid for loss in LOSSES for end, grid in grids.items()
        }
        for noise in ("", ", noise"):
            made.append(
                Task(
                    data + noise,
                    sets=("mulan-yeast",) if data == "yeast" else ("goemotions",),
                    methods=methods,
                    score="micro_f1_tuned",
                    tuning_seeds=(101,) if scale == "smoke" else TUNING_SEEDS[data],
                    seeds=(1,) if scale == "smoke" else (1, 2, 3, 4, 5),
                    facts={
                        **facts[data],
                        "steps": f"{EPOCHS[data][scale]} epochs in batches of {BATCH[data]}, Adam",
                        "label noise": f"{NOISE:.0%} of the positive labels" if noise else "none",
                    },
                )
            )
    return made


EXPERIMENT = Experiment(
    "soft_labels",
    "BCE and the multi-label softmax, each with hard labels, label smoothing and mixup, on clean and on noisy labels",
    tasks,
    run,
    metrics={
        "micro_f1": "micro-F1",
        "macro_f1": "macro-F1",
        "exact_match": "exact match",
        "micro_f1_tuned": "micro-F1, tuned threshold",
        "calibration_s": "calibration error of sigmoid(s)",
        "calibration_2s": "calibration error of sigmoid(2s)",
        "calibration_fitted": "calibration error of the fitted reading",
        "calibration_shares": "calibration error of the labels' shares",
        "brier_s": "Brier score of sigmoid(s)",
        "brier_2s": "Brier score of sigmoid(2s)",
        "brier_fitted": "Brier score of the fitted reading",
        "brier_shares": "Brier score of the labels' shares",
        "kappa": "fitted factor kappa",
    },
    baseline="BCE",
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
