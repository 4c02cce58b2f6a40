"""The page "Which loss should I use?" tried on many data sets: each rival with two starts and a wide grid of rates.

Five kinds of task, each with everything fixed but the loss, the start of the last bias and the learning rate:

- ``several``: several labels a row (enron, medical, scene, tmc2007-500, yeast, bibtex). Judged with a tuned threshold,
  with the threshold 0, and by the log loss; settings are chosen for each goal apart.
- ``open``: medical and bibtex again, where each row keeps only a share of its words. The fewer words, the more the
  input leaves the labels open. Does label smoothing help then?
- ``rare``: one intent of CLINC150 and of BANKING77 against the rest, and rt-polarity and sentiment-zh with 20 or 100
  negative texts for each positive one. Judged by average precision, and by F1 at the threshold 0.
- ``start``: a rare class once more, with other optimizers. Why does the start at the base rate help or hurt?
- ``wrong``: one class a row, 30 % of the labels to train and to validate are wrong.
- ``soft``: a student that sees only the probabilities of a teacher.

"Bias 0" starts with a last bias of 0, "base rate" where the predicted probability is the share of true labels. The
learning rates are six, a factor of 3 apart; where the best lies at an edge, the grid goes on beyond it. The rows to
validate, the positives that are kept, the intent and the wrong labels are drawn from the run's seed.

    python -m experiments.advice --scale smoke
    torchrun --standalone --nproc-per-node 2 -m experiments.advice
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import SEEDS, Experiment, Job, Settings, Task, as_json, main
from lossbook.accuracy import exact_loss, soft_accuracy_loss
from lossbook.data import public
from lossbook.focal import asymmetric_loss, sigmoid_focal_loss, soft_truncated_bce
from lossbook.metrics import average_precision, best_threshold, calibration_error, fit_scale, micro_f1
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.soft_labels import mixup, smooth_labels
from lossbook.training import predict, seeded

Loss = Callable[[Tensor, Tensor], Tensor]
Split = tuple[Tensor, Tensor]

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WRONG = 0.3  # share of wrong labels
MOST = 15_000  # rows of a task with wrong labels, to train and validate
EPS = 1e-6  # probabilities of the log loss stay so far from 0 and 1


@dataclass(frozen=True)
class Form:
    """A data set and what is fixed on it.

    Attributes:
        kind: The kind of task.
        sets: Its public sets.
        epochs, batch: Passes over the rows to train, rows a step.
        hidden, dropout: The network's only hidden layer.
        rare: Negatives for each positive text; 0 where an intent is told from the rest.
        words: Share of the words that each row keeps.
    """

    kind: str
    sets: tuple[str, ...]
    epochs: int
    batch: int
    hidden: int = 64
    dropout: float = 0.2
    rare: int = 0
    words: float = 1.0


TABLES = {
    "enron": ("mulan-enron", 25, 32),
    "medical": ("mulan-medical", 40, 16),
    "scene": ("mulan-scene", 25, 32),
    "tmc2007-500": ("mulan-tmc2007-500", 5, 128),
    "yeast": ("mulan-yeast", 20, 32),
    "bibtex": ("mulan-bibtex", 12, 64),
}
TEXTS = {"CLINC150": ("clinc150", 6, 128), "BANKING77": ("banking77", 10, 128)}
FORMS = {
    **{name: Form("several", (source,), *size) for name, (source, *size) in TABLES.items()},
    **{
        f"{name}, {words:.0%} of the words": Form("open", (TABLES[name][0],), *TABLES[name][1:], words=words)
        for name in ("medical", "bibtex")
        for words in (0.5, 0.2)
    },
    **{
        f"{name}, one intent": Form("rare", (source,), epochs, batch, 32)
        for name, (source, epochs, batch) in TEXTS.items()
    },
    **{
        f"{name} 1:{rare}": Form("rare", (name,), epochs, 64, hidden=32, rare=rare)
        for name, epochs in (("rt-polarity", 10), ("sentiment-zh", 6))
        for rare in (20, 100)
    },
    **{
        f"{name} 1:20, the start": Form("start", (name,), epochs, 64, hidden=32, rare=20)
        for name, epochs in (("rt-polarity", 10), ("sentiment-zh", 6))
    },
    **{f"{name}, wrong labels": Form("wrong", (source,), *size) for name, (source, *size) in TEXTS.items()},
    "Fashion-MNIST, wrong labels": Form("wrong", ("fashion-mnist",), 10, 128),
    "dry-bean, wrong labels": Form("wrong", ("uci-dry-bean",), 10, 128),
    **{
        f"{name}, a teacher": Form("soft", (TABLES[name][0],), *TABLES[name][1:])
        for name in ("enron", "scene", "yeast", "tmc2007-500")
    },
}
SCORES = {
    "tuned threshold": "f1_tuned",
    "threshold 0": "f1_zero",
    "log loss": "likelihood",
    "ranking": "precision",
    "accuracy": "accuracy",
}
GOALS = {
    "several": ("tuned threshold", "threshold 0", "log loss"),
    "open": ("tuned threshold",),
    "rare": ("ranking", "threshold 0"),
    "start": ("ranking",),
    "wrong": ("accuracy",),
    "soft": ("log loss", "tuned threshold"),
}
METRICS = {
    "f1_tuned": "micro-F1, tuned threshold",
    "f1_zero": "micro-F1, threshold 0",
    "precision": "average precision",
    "likelihood": "log-likelihood a label",
    "calibration": "calibration error",
    "calibration_scaled": "calibration error after the factor",
    "factor": "factor of the scores",
    "accuracy": "accuracy",
}
# ------------------------------------------------------------------------------------------------------------ data


def pieces(text: str) -> set[str]:
    """The words of a text and their runs of three letters; of Chinese characters each, and each pair."""
    found: set[str] = set()
    for word in re.findall(r"\w+", text.lower()):
        if word.isascii():
            marked = f"<{word}>"
            found |= {marked, *(marked[i : i + 3] for i in range(len(marked) - 2))}
        else:
            found |= {*word, *(word[i : i + 2] for i in range(len(word) - 1))}
    return found


def bag(texts: Sequence[str], buckets: int = 2**13, most: int = 200) -> Tensor:
    """The hashed pieces of each text, (N, most), 0 where there are no more."""
    rows = torch.zeros(len(texts), most, dtype=torch.int32)
    for row, text in zip(rows, texts, strict=True):
        numbers = sorted({1 + zlib.crc32(piece.encode()) % (buckets - 1) for piece in pieces(text)})[:most]
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return rows


def cut(rows: int, *ends: float) -> tuple[Tensor, ...]:
    """The numbers of the rows in an order drawn from the present seed, cut where these shares of them end."""
    return torch.randperm(rows).tensor_split([round(rows * end) for end in ends])


@cache
def table(name: str) -> list[Split]:
    """Training and test rows of a Mulan set: features, standardised where they are not 0 and 1, and labels."""
    data = getattr(public, name.removesuffix("-500"))()
    parts = [(part.features.float(), part.targets) for part in (data.train, data.test)]
    x = parts[0][0]
    if bool(((x == 0) | (x == 1)).all()):
        return parts
    return [((part - x.mean(0)) / x.std(0).clamp(min=1e-6), t) for part, t in parts]


@cache
def classes(name: str) -> list[Split]:
    """Training and test rows of a set with one class a row."""
    if name == "Fashion-MNIST":
        pictures = public.fashion_mnist()
        return [(part.images.flatten(1).float() / 255, part.labels) for part in (pictures.train, pictures.test)]
    if name == "dry-bean":
        beans = public.uci(name)
        with seeded(0):
            fit, test = cut(len(beans.labels), 0.7)
        x = beans.features.float()
        x = (x - x[fit].mean(0)) / x[fit].std(0)
        return [(x[rows], beans.labels[rows]) for rows in (fit, test)]
    data = public.clinc150() if name == "CLINC150" else public.banking77()
    return [(bag(part.texts), part.labels) for part in (data.train, data.test)]


@cache
def polarity(name: str) -> Split:
    """Different texts of a set with two classes, and whether each is positive; a text with both labels is left out."""
    both = public.rt_polarity() if name == "rt-polarity" else public.sentiment_zh()
    seen: dict[str, set[int]] = {}
    for part in (both,) if isinstance(both, public.TextSet) else (both.train, both.validation, both.test):
        for text, label in zip(part.texts, part.labels.tolist(), strict=True):
            seen.setdefault(text.strip(), set()).add(label)
    kept = {text: found.pop() for text, found in seen.items() if len(found) == 1}
    return bag(list(kept)), torch.tensor(list(kept.values())) == 1


def several(name: str, words: float) -> list[Split]:
    """The labels of a Mulan set; a fifth of the rows to train validate. Each row keeps a share of its words."""
    (x, t), test = table(name)
    parts = [*((x[rows], t[rows]) for rows in cut(len(x), 0.8)), test]
    return [(x * (torch.rand(x.shape) < words), t) for x, t in parts] if words < 1 else parts


def intent(name: str) -> list[Split]:
    """One intent against the rest."""
    (x, y), (other, z) = classes(name)
    one = torch.randint(int(y.max()) + 1, ())
    return [*((x[rows], (y[rows] == one).unsqueeze(1)) for rows in cut(len(x), 0.7)), (other, (z == one).unsqueeze(1))]


def rare(name: str, negatives: int) -> list[Split]:
    """Texts with so many negatives for each positive: half to train, a fifth to validate, the rest to test."""
    x, t = polarity(name)
    no, yes = ((t == sign).nonzero().flatten() for sign in (False, True))
    yes = yes[torch.randperm(len(yes))[: len(no) // negatives]]
    parts = zip(cut(len(no), 0.5, 0.7), cut(len(yes), 0.5, 0.7), strict=True)
    rows = [torch.cat((no[few], yes[fewer])) for few, fewer in parts]
    return [(x[part], t[part].unsqueeze(1)) for part in rows]


def wrong(name: str) -> list[Split]:
    """One class a row; 30 % of the labels to train and to validate are another class."""
    (x, y), test = classes(name)
    most, n = cut(len(x), min(1.0, MOST / len(x)))[0], int(y.max()) + 1
    x, y = x[most], y[most]
    y = torch.where(torch.rand(len(y)) < WRONG, (y + torch.randint(1, n, y.shape)) % n, y)
    return [*((x[rows], y[rows]) for rows in cut(len(x), 0.8)), test]


def load(job: Job) -> tuple[Form, list[Split]]:
    """The splits to train, to validate and to test of a run, drawn from its seed."""
    name = base(job.task.name)
    form, source = FORMS[name], re.split(r",| 1:", name)[0]
    if form.kind == "wrong":
        splits = wrong(source)
    elif form.kind in ("rare", "start"):
        splits = rare(source, form.rare) if form.rare else intent(source)
    else:
        splits = several(source, form.words)
    return form, [(x[-200:], t[-200:]) for x, t in splits] if job.scale == "smoke" else splits


# ------------------------------------------------------------------------------------------------ network and losses


def network(form: Form, fit: Split, bias: Tensor | None) -> nn.Module:
    """One hidden layer; over texts it starts from the mean of the vectors of their pieces."""
    x, t = fit
    first: nn.Module = nn.Linear(x.shape[1], form.hidden)
    if not x.is_floating_point():
        first = nn.EmbeddingBag(2**13, form.hidden, mode="mean", padding_idx=0)
    last = nn.Linear(form.hidden, t.shape[1] if t.dim() == 2 else int(t.max()) + 1)
    if bias is not None:
        with torch.no_grad():
            last.bias.copy_(bias)
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(form.dropout), last)


def per_row(loss: Loss) -> Loss:
    """A loss of labels, summed over the labels and averaged over the rows."""
    return lambda s, t: loss(s, t.to(s.dtype)).sum() / len(s)


def weighted(w: float) -> Loss:
    """BCE whose positives count w times."""
    return lambda s, t: F.binary_cross_entropy_with_logits(s, t, reduction="none", pos_weight=s.new_tensor(w))


bce = per_row(weighted(1.0))
LABELS: dict[str, Loss] = {
    "BCE": bce,
    "BCE, weight 3": per_row(weighted(3.0)),
    "BCE, weight 10": per_row(weighted(10.0)),
    "focal loss": per_row(partial(sigmoid_focal_loss, gamma=2.0, reduction="none")),
    "focal loss, alpha 0.75": per_row(partial(sigmoid_focal_loss, gamma=2.0, alpha=0.75, reduction="none")),
    "asymmetric loss": per_row(partial(asymmetric_loss, reduction="none")),
    "soft truncation": per_row(partial(soft_truncated_bce, reduction="none")),
    "multi-label softmax": multilabel_softmax_loss,
}
SMOOTHED = {f"{method}, smoothing {e:g}": (method, e) for method in ("BCE", "multi-label softmax") for e in (0.03, 0.1)}
MIXED = {f"{method}, mixup": method for method in ("BCE", "multi-label softmax")}
CLASSES: dict[str, Loss] = {
    "cross-entropy": F.cross_entropy,
    "cross-entropy, temperature 4": lambda s, t: F.cross_entropy(s / 4, t),
    "cross-entropy, temperature 1/4": lambda s, t: F.cross_entropy(4 * s, t),
    "cross-entropy, smoothing 0.1": partial(F.cross_entropy, label_smoothing=0.1),
    "soft accuracy, warmed up": soft_accuracy_loss,
    "EXACT": exact_loss,
    "EXACT, warmed up": exact_loss,
}
STARTS = (", bias 0", ", base rate")
SEVERAL = [name + start for name in (*LABELS, *SMOOTHED, *MIXED) if name != "soft truncation" for start in STARTS]
RARE = [
    name + start
    for name in ("BCE", "BCE, weight 10", "focal loss", "focal loss, alpha 0.75", "soft truncation")
    for start in STARTS
]
METHODS = {
    "several": SEVERAL,
    "open": [name for name in SEVERAL if "mixup" not in name and name.startswith(("BCE, s", "multi", "BCE, b"))],
    "rare": RARE,
    "start": [
        f"BCE{how}{start}"
        for how in ("", ", warm-up", ", SGD", ", bias not trained", ", rate of the bias / 10")
        for start in STARTS
        if how != ", bias not trained" or start == ", base rate"
    ],
    "wrong": list(CLASSES),
    "soft": [name + start for name in ("BCE", "multi-label softmax") for start in STARTS],
}  # fmt: skip


def base(task: str) -> str:
    """The data set of a task: its name without the goal."""
    return next((task.removesuffix(f", {goal}") for goal in SCORES if task.endswith(f", {goal}")), task)


def start_of(method: str, t: Tensor) -> Tensor | None:
    """The last bias at which the method predicts the share of true labels; add-one, so that it stays finite."""
    if not method.endswith(", base rate"):
        return None
    bias = torch.logit((t.double().sum(0) + 1) / (len(t) + 2))
    if method.startswith("multi-label softmax"):
        return bias / 2  # its probability is sigmoid(2s)
    weight = re.search(r"weight (\d+)", method)
    return bias + torch.tensor(float(weight[1])).log() if weight else bias


def steps_of(method: str) -> Callable[[Tensor, Tensor, float], tuple[Tensor, Loss]]:
    """What one step computes: inputs, labels and progress from 0 to 1 to the inputs it takes and the loss."""
    name = method.removesuffix(STARTS[0]).removesuffix(STARTS[1])
    if name in MIXED:
        loss = LABELS[MIXED[name]]

        def mixed(x: Tensor, t: Tensor, progress: float) -> tuple[Tensor, Loss]:
            both, soft, _ = mixup(x, t.to(x.dtype))
            return both, lambda s, _: loss(s, soft)

        return mixed
    if name in SMOOTHED:
        loss, e = LABELS[SMOOTHED[name][0]], SMOOTHED[name][1]
        return lambda x, t, progress: (x, lambda s, t: loss(s, smooth_labels(t.float(), e)))
    if name in CLASSES:
        late = "warmed up" in name
        return lambda x, t, progress: (x, F.cross_entropy if late and progress < 0.5 else CLASSES[name])
    loss = LABELS.get(name, bce)
    return lambda x, t, progress: (x, loss)


def optimizer_of(model: nn.Module, method: str, lr: float) -> torch.optim.Optimizer:
    """Adam, unless the method names another one or another rate of the last bias."""
    last = model[-1].bias  # type: ignore[index]
    rest = [parameter for parameter in model.parameters() if parameter is not last]
    factor = 0.0 if "bias not trained" in method else 0.1 if "bias / 10" in method else 1.0
    lr *= 100 if "SGD" in method else 1
    groups = [{"params": rest, "lr": lr}, {"params": [last], "lr": lr * factor}]
    return torch.optim.SGD(groups, momentum=0.9) if "SGD" in method else torch.optim.Adam(groups)


def fit_network(job: Job, form: Form, fit: Split) -> nn.Module:
    """Train once."""
    x, t = (part.to(job.device) for part in fit)
    model = network(form, fit, start_of(job.method, fit[1]) if fit[1].dim() == 2 else None).to(job.device)
    step = steps_of(job.method)
    optimizer = optimizer_of(model, job.method, job.settings["lr"])
    epochs = 1 if job.scale == "smoke" else form.epochs
    total = epochs * -(-len(x) // form.batch)
    warm = total // 5 if "warm-up" in job.method else 0
    rates = [group["lr"] for group in optimizer.param_groups]
    done = 0
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).to(job.device).split(form.batch):  # type: ignore[no-untyped-call]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * min(1.0, (done + 1) / max(warm, 1))
            inputs, loss = step(x[rows], t[rows], done / total)
            optimizer.zero_grad()
            loss(model(inputs), t[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
    return model


# ------------------------------------------------------------------------------------------------------- measures


def factor_of(scores: Tensor, truth: Tensor) -> float:
    """The factor that makes the scores probabilities; 1 where these rows do not say which is best."""
    try:
        return fit_scale(scores, truth).factor
    except ValueError:
        return 1.0


def labels_measured(method: str, validation: Split, judged: Split) -> dict[str, float]:
    """Threshold and factor come from the validation rows; scores and labels of both."""
    (held, known), (s, truth) = validation, judged
    k = 2.0 if method.startswith("multi-label softmax") else 1.0
    factor = factor_of(k * held, known)
    p = torch.sigmoid(k * s.double()).clamp(EPS, 1 - EPS)
    return {
        "f1_tuned": micro_f1(s > best_threshold(held, known), truth),
        "f1_zero": micro_f1(s > 0, truth),
        "precision": average_precision(s, truth),
        "likelihood": -F.binary_cross_entropy(p, truth.double()).item(),
        "calibration": calibration_error(p, truth),
        "calibration_scaled": calibration_error(torch.sigmoid(factor * k * s.double()), truth),
        "factor": factor,
    }


def train_and_measure(job: Job) -> dict[str, float]:
    """One run, judged by validation rows, in a final run by test rows."""
    form, (fit, validation, test) = load(job)
    if form.kind == "soft":
        fit = taught(job, form, fit)
    model = fit_network(job, form, fit)
    judged = test if job.final else validation
    scores = predict(model, judged[0])
    if not scores.isfinite().all():
        return dict.fromkeys(METRICS, math.nan)
    if form.kind == "wrong":
        return {"accuracy": (scores.argmax(-1) == judged[1]).double().mean().item()}
    return labels_measured(job.method, (predict(model, validation[0]), validation[1]), (scores, judged[1]))


def taught(job: Job, form: Form, fit: Split) -> Split:
    """Half of the rows to train, with the probabilities of a teacher that was trained on the other half."""
    (x, t), half = fit, len(fit[0]) // 2
    teacher = Job(job.task, "BCE, base rate", {"lr": 3e-3}, job.seed, False, job.scale, job.device)

    def make() -> dict[str, Tensor]:
        with seeded(job.seed):
            model = fit_network(teacher, form, (x[half:], t[half:]))
        return {"p": torch.sigmoid(predict(model, x[:half]))}

    return x[:half], job.keep(f"teacher-{base(job.task.name)}-{job.seed}-{job.device.type}", make)["p"]


def run(job: Job) -> dict[str, float]:
    """One run, or what was kept of the same one made for another goal."""
    about = {**job.about(), "task": base(job.task.name), "device": job.device.type}

    def make() -> dict[str, Tensor]:
        with seeded(job.seed):
            found = train_and_measure(job)
        return {metric: torch.tensor(value, dtype=torch.float64) for metric, value in found.items()}

    kept = job.keep(hashlib.sha256(as_json(about).encode()).hexdigest()[:24], make)
    return {metric: value.item() for metric, value in kept.items()}


def grid(scale: str) -> list[Settings]:
    """Six learning rates."""
    return [{"lr": lr} for lr in (RATES[2:4] if scale == "smoke" else RATES)]


def facts(form: Form, goal: str) -> dict[str, object]:
    """What the verdicts and a reader of the record should know."""
    drawn = {"overlap": 0.3 / 0.5} if form.rare else {}  # test rows over training rows, where both are drawn anew
    sizes = {"epochs": form.epochs, "rows a step": form.batch, "hidden units": form.hidden}
    return {"kind": form.kind, "goal": goal, **drawn, **sizes}


def tasks(scale: str) -> list[Task]:
    """All tasks, one for each data set and goal. Those of a second goal start from the kept runs of the first."""
    first = {form.kind: name for name, form in reversed(FORMS.items())}.values()
    return [
        Task(
            name + ("" if goal == GOALS[form.kind][0] else f", {goal}"),
            sets=form.sets,
            methods={method: grid(scale) for method in METHODS[form.kind]},
            score=SCORES[goal],
            tuning_seeds=(101, 102) if form.kind in ("rare", "start") else (101,),
            seeds=SEEDS[:2] if scale == "smoke" else SEEDS,
            metrics=("accuracy",) if form.kind == "wrong" else tuple(METRICS)[:-1],
            stage=stage,
            extend="" if scale == "smoke" else "lr",
            facts=facts(form, goal),
        )
        for name, form in FORMS.items()
        if scale != "smoke" or name in first
        for stage, goal in enumerate(GOALS[form.kind])
    ]


EXPERIMENT = Experiment(
    "breadth",
    "the advice of the page Which loss should I use, on data sets of several kinds",
    tasks,
    run,
    metrics=METRICS,
    baseline="BCE, base rate",
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
