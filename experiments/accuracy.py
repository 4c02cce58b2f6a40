"""Accuracy as the objective: EXACT and soft accuracy against cross-entropy and hinge loss, on tables and pictures.

Three kinds of tasks:

- the eleven UCI tables that the package can read, as in the paper with linear models;
- Fashion-MNIST with a small convolutional network, labels as they are, and with 30 of 100 labels wrong;
- at the scale ``gpu`` a run of its own: Fashion-MNIST to 95 of 100 with a small residual network and cross-entropy.

Every loss gets the same model from the same start, the same batches, the same number of steps and a grid as long as
that of the others. Each has one knob, the scale: the loss is taken of the scores divided by it. For softmax that is a
temperature, for the hinge loss a margin, for EXACT the noise. "EXACT" lets the noise fall to a tenth during training;
its grid is three times the others', so that the noise passes the same values on a mean of logarithms. A linear model
that starts at 0 and learns with Adam makes the scale the inverse of a learning rate, so tables have no grid of learning
rates; networks have one. The scores of a network start at 0, too, and every network trains a fifth of the steps with
cross-entropy before its own loss: a bounded loss gives up what starts far on the wrong side. EXACT is tried without
that warm-up as well.

Tables: 20 of 100 rows, the same for all seeds, choose the settings and nothing else. Of the others each seed draws
three quarters to train and a quarter to test; where the makers have a test split, that is taken. Features are
standardised by the training rows. Pictures: the last 10,000 of the training split choose the settings. Wrong labels are
drawn for each seed, in these rows as in the training rows, as nobody would have clean ones; test labels are not
touched.

Run it with ``python -m experiments.accuracy --scale cpu``, on a GPU with ``torchrun --standalone --nproc-per-node 4 -m
experiments.accuracy --scale gpu``: its tables are small steps that wait for each other, so several processes share it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

from experiments.harness import Experiment, Job, Task, main
from lossbook.accuracy import exact_loss, soft_accuracy_loss
from lossbook.data.public import UCI, FashionMnist, fashion_mnist, uci
from lossbook.training import predict

NODES = 16  # of EXACT's integral
FALL = 10.0  # by what the annealed noise falls during training
WARM = 0.2  # share of the steps in which every network trains with cross-entropy before its own loss
COLD = "EXACT, no warm-up"
WRONG = 0.3  # share of wrong labels
GOAL = "Fashion-MNIST to 95 %"
HELD = 10_000  # pictures that choose the settings

# Of equally good settings the first one is taken.
SCALES = {
    "smoke": (1.0, 0.3),
    "cpu": (1.0, 0.3, 3.0, 0.1, 10.0, 0.03),
    "gpu": (1.0, 0.3, 3.0, 0.1, 10.0, 0.03, 30.0, 100.0),
}
# Each method's factor of these scales.
TABLE_METHODS = {"cross-entropy": 1.0, "hinge": 1.0, "soft accuracy": 1.0, "EXACT": 3.0}
PICTURE_METHODS = {**TABLE_METHODS, COLD: 3.0}

# audit-risk: its class is Audit_Risk > 1, and Audit_Risk is the product of the other three.
GIVES_AWAY = {"audit-risk": ("Audit_Risk", "Inherent_Risk", "CONTROL_RISK", "Detection_Risk")}

Loss = Callable[[Tensor, Tensor, float], Tensor]


def loss_of(method: str, scale: float) -> Loss:
    """The loss of scores and classes at some progress from 0 to 1 through training."""
    if method in ("EXACT", COLD):
        return lambda s, t, progress: exact_loss(s, t, sigma=scale * FALL**-progress, nodes=NODES)
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cross-entropy": F.cross_entropy,
        "hinge": F.multi_margin_loss,
        "soft accuracy": soft_accuracy_loss,
    }
    plain = losses[method]
    return lambda s, t, progress: plain(s / scale, t)


def warmed(loss: Loss, share: float) -> Loss:
    """Cross-entropy for a share of the steps, then ``loss``, whose own progress starts there."""

    def both(s: Tensor, t: Tensor, progress: float) -> Tensor:
        return F.cross_entropy(s, t) if progress < share else loss(s, t, (progress - share) / (1 - share))

    return both


def batches(rows: int, size: int, steps: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Rows for each step: from one shuffle until it has no full batch left, then from the next."""
    size = min(size, rows)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(rows, generator=generator).to(device)
        yield order[:size]
        order = order[size:]


def height(step: int, steps: int) -> float:
    """The learning rate of a step as a share of the highest: up for a fifth of the steps, then down, in straight lines.

    Example:
        >>> [round(height(step, 10), 3) for step in range(10)]
        [0.5, 1.0, 0.889, 0.778, 0.667, 0.556, 0.444, 0.333, 0.222, 0.111]
    """
    top = max(steps // 5, 1)
    return (step + 1) / top if step < top else (steps - step) / (steps - top + 1)


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Loss,
    data: tuple[Tensor, Tensor],
    *,
    lr: float,
    steps: int,
    batch: int,
    seed: int,
    view: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    half: bool = False,
) -> float:
    """Train in place, the learning rate up to ``lr`` and down to 0 again; returns the seconds that it took.

    Args:
        model: On the device of the data.
        optimizer: Of its parameters.
        loss: Gets scores in float32, classes and the progress.
        data: Inputs and classes.
        lr: The highest learning rate.
        steps: Batches to take.
        batch: Rows of a batch.
        seed: Decides the batches and the views.
        view: Changes the inputs of a batch.
        half: Compute the network in bfloat16.
    """
    started = time.perf_counter()
    x, t = data
    generator = torch.Generator().manual_seed(seed)
    value = torch.zeros(())
    model.train()
    for step, rows in enumerate(batches(len(x), batch, steps, generator, x.device)):
        for group in optimizer.param_groups:
            group["lr"] = lr * height(step, steps)
        inputs = x[rows] if view is None else view(x[rows], generator)
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            scores = model(inputs)
        value = loss(scores.float(), t[rows], step / max(steps - 1, 1))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    value.item()  # waits until the device has finished
    return time.perf_counter() - started


def start_at_zero(model: nn.Module) -> None:
    """Let all scores be 0 at the start: set the last linear layer to 0."""
    last = [part for part in model.modules() if isinstance(part, nn.Linear)][-1]
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


def accuracy(scores: Tensor, t: Tensor) -> float:
    """The share of rows whose highest score is that of their class."""
    return (scores.argmax(-1) == t.to(scores.device)).double().mean().item()


# Tables


@functools.cache
def table(name: str) -> tuple[Tensor, Tensor, int | None]:
    """Features, classes, and how many rows come before the makers' test split. Parsed once a process."""
    found = uci(name)
    kept = [i for i, feature in enumerate(found.feature_names) if feature not in GIVES_AWAY.get(name, ())]
    return found.features[:, kept], found.labels, found.train_rows


def split_rows(rows: int, train_rows: int | None, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to train, to validate and to test.

    A fifth of the rows, or of those that the makers train with, validates: the same for all seeds, so that no seed
    tests on a row that has judged a setting. Each seed draws three quarters of the others to train; the rest tests,
    unless the makers have a test split.
    """
    own = rows if train_rows is None else train_rows
    order = torch.randperm(own, generator=torch.Generator().manual_seed(0))
    validation, others = order[: own // 5], order[own // 5 :]
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))]
    cut = len(others) * 3 // 4
    return others[:cut], validation, others[cut:] if train_rows is None else torch.arange(own, rows)


def standardised(train: Tensor, *parts: Tensor) -> tuple[Tensor, ...]:
    """All parts, the training rows first, in units of the training rows' spread and around their mean, in float32.

    NaN becomes the training rows' median. A feature that is constant there is only shifted.
    """
    median = train.nanmedian(0).values
    parts = tuple(torch.where(part.isnan(), median, part) for part in (train, *parts))
    mean, spread = parts[0].mean(0), parts[0].std(0)
    return tuple(((part - mean) / torch.where(spread > 0, spread, 1)).float() for part in parts)


def run_table(job: Job) -> dict[str, float]:
    """A linear model on a table."""
    features, classes, train_rows = table(job.task.facts["table"])
    rows = split_rows(len(features), train_rows, job.seed)
    train, validation, test = (part.to(job.device) for part in standardised(*(features[part] for part in rows)))
    model = nn.Linear(train.shape[1], job.task.facts["classes"])
    start_at_zero(model)
    model.to(job.device)
    seconds = fit(
        model,
        Adam(model.parameters()),
        loss_of(job.method, job.settings["scale"]),
        (train, classes[rows[0]].to(job.device)),
        lr=job.settings["lr"],
        steps=job.settings["steps"],
        batch=job.settings["batch"],
        seed=job.seed,
    )
    judged, its_rows = (test, rows[2]) if job.final else (validation, rows[1])
    return {"accuracy": accuracy(predict(model, judged), classes[its_rows]), "seconds": seconds}


# Pictures


class Residual(nn.Module):
    """Adds what its layers make of the input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """The input and what the layers make of it."""
        change: Tensor = self.layers(x)
        return x + change


class Times(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """The product."""
        return x * self.factor


def layer(before: int, after: int) -> nn.Sequential:
    """Convolution, normalisation, ReLU; the size of the picture stays."""
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def residual_network(width: int, classes: int = 10) -> nn.Sequential:
    """A small residual network for pictures of one channel."""
    return nn.Sequential(
        layer(1, width),
        layer(width, 2 * width),
        nn.MaxPool2d(2),
        Residual(layer(2 * width, 2 * width), layer(2 * width, 2 * width)),
        layer(2 * width, 4 * width),
        nn.MaxPool2d(2),
        layer(4 * width, 8 * width),
        nn.MaxPool2d(2),
        Residual(layer(8 * width, 8 * width), layer(8 * width, 8 * width)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, classes, bias=False),
        Times(0.125),
    )


def plain_network(width: int, classes: int = 10) -> nn.Sequential:
    """Two convolutions, each halving the picture of 28 x 28 pixels, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, classes),
    )


@functools.cache
def pictures() -> FashionMnist:
    """Read once a process."""
    return fashion_mnist()


def pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 pictures as float32 ``(n, 1, height, width)`` around 0."""
    return (images.to(device).float() / 255 - 0.286).div(0.353).unsqueeze(1)  # mean and spread of the training pixels


def with_wrong(t: Tensor, share: float, classes: int, generator: torch.Generator) -> Tensor:
    """Classes of which about a share is replaced by another class, each other one as likely."""
    wrong = torch.rand(len(t), generator=generator) < share
    other = torch.randint(1, classes, (len(t),), generator=generator)
    return torch.where(wrong, (t + other) % classes, t)


def random_view(x: Tensor, generator: torch.Generator, pad: int = 2, hole: int = 8) -> Tensor:
    """Each picture shifted by up to ``pad`` pixels, mirrored half of the time, a square of it set to 0."""
    n, _, height, width = x.shape
    down, right = (torch.rand(2, n, generator=generator) * (2 * pad + 1)).long().to(x.device)
    mirror = (torch.rand(n, generator=generator) < 0.5).to(x.device)
    top, left = torch.rand(2, n, generator=generator).to(x.device)
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    across = torch.where(mirror.unsqueeze(1), columns.flip(0), columns) + right.unsqueeze(1)
    padded = F.pad(x, (pad,) * 4, mode="reflect")
    each = torch.arange(n, device=x.device).view(-1, 1, 1)
    x = padded[each, 0, (rows + down.unsqueeze(1)).unsqueeze(2), across.unsqueeze(1)].unsqueeze(1)
    above, beside = (top * (height - hole + 1)).long().unsqueeze(1), (left * (width - hole + 1)).long().unsqueeze(1)
    inside = ((rows >= above) & (rows < above + hole)).unsqueeze(2) & (
        (columns >= beside) & (columns < beside + hole)
    ).unsqueeze(1)
    return x.masked_fill(inside.unsqueeze(1), 0)


def run_pictures(job: Job) -> dict[str, float]:
    """A network on Fashion-MNIST; wrong labels as the task says."""
    data, facts, settings = pictures(), job.task.facts, job.settings
    generator = torch.Generator().manual_seed(job.seed)
    chosen = torch.randperm(len(data.train.images) - facts["validation rows"], generator=generator)
    chosen = chosen[: facts["training rows"]]
    labels = with_wrong(data.train.labels, facts["share of wrong labels"], len(data.classes), generator)
    loss = loss_of(job.method, settings["scale"])
    model = (residual_network if job.scale == "gpu" else plain_network)(facts["width"])
    start_at_zero(model)
    model.to(job.device)
    seconds = fit(
        model,
        Adam(model.parameters()),
        loss if job.method == COLD else warmed(loss, WARM),
        (pixels(data.train.images[chosen], job.device), labels[chosen].to(job.device)),
        lr=settings["lr"],
        steps=settings["steps"],
        batch=settings["batch"],
        seed=job.seed,
    )
    if job.final:
        images, judged = data.test.images, data.test.labels
    else:
        images, judged = (part[-facts["validation rows"] :] for part in (data.train.images, labels))
    return {"accuracy": accuracy(predict(model, pixels(images, job.device)), judged), "seconds": seconds}


def run_goal(job: Job) -> dict[str, float]:
    """Fashion-MNIST as well as a small network can: views, bfloat16 on a GPU, a mirrored picture when it decides."""
    data, settings = pictures(), job.settings
    cuda = job.device.type == "cuda"
    x = pixels(data.train.images[: settings["pictures"]], job.device)
    t = data.train.labels[: settings["pictures"]].to(job.device)
    model = residual_network(settings["width"]).to(job.device)
    if cuda:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    seconds = fit(
        model,
        SGD(model.parameters(), lr=settings["lr"], momentum=0.9, nesterov=True, weight_decay=settings["weight_decay"]),
        lambda s, t, progress: F.cross_entropy(s, t),
        (x, t),
        lr=settings["lr"],
        steps=settings["epochs"] * (len(x) // settings["batch"]),
        batch=settings["batch"],
        seed=job.seed,
        view=random_view,
        half=cuda,
    )
    x = pixels(data.test.images, job.device)
    scores = predict(model, x) + predict(model, x.flip(-1))
    return {"accuracy": accuracy(scores, data.test.labels), "seconds": seconds}


# The experiment


def all_with_all(scale: str, methods: Mapping[str, float], lrs: Sequence[float], **fixed: int) -> dict[str, Any]:
    """Each method's settings: all scales, times the method's factor, with all learning rates."""
    scales = SCALES[scale] if len(lrs) == 1 else SCALES[scale][:4]
    return {
        method: [{"scale": round(value * factor, 4), "lr": lr, **fixed} for lr in lrs for value in scales]
        for method, factor in methods.items()
    }


def table_task(name: str, scale: str) -> Task:
    """One UCI table."""
    features, classes, train_rows = table(name)
    train, validation, test = split_rows(len(features), train_rows, 0)
    batch = 256
    shortest, epochs = {"smoke": (5, 0), "cpu": (300, 20), "gpu": (600, 40)}[scale]
    steps = max(shortest, epochs * (len(train) // batch))
    return Task(
        name,
        sets=(f"uci-{name}",),
        methods=all_with_all(scale, TABLE_METHODS, (0.03,), steps=steps, batch=batch),
        score="accuracy",
        seeds=(1,) if scale == "smoke" else tuple(range(1, 11)),
        facts={
            "table": name,
            "model": "linear, from 0",
            "features": features.shape[1],
            "left out, since they give the class away": list(GIVES_AWAY.get(name, ())),
            "classes": int(classes.max()) + 1,
            "training rows": len(train),
            "validation rows": len(validation),
            "test rows": len(test),
            "test rows are the makers'": train_rows is not None,
            "steps": steps,
            "rows of a batch": min(batch, len(train)),
        },
    )


def picture_task(name: str, scale: str, wrong: float) -> Task:
    """Fashion-MNIST with a share of wrong labels."""
    rows, width, batch, epochs = {
        "smoke": (64, 2, 64, 2),
        "cpu": (6000, 16, 128, 10),
        "gpu": (50_000, 16, 512, 12),
    }[scale]
    steps = epochs * (rows // batch)
    return Task(
        name,
        sets=("fashion-mnist",),
        methods=all_with_all(
            scale, PICTURE_METHODS, (0.003,) if scale == "smoke" else (0.003, 0.01), steps=steps, batch=batch
        ),
        score="accuracy",
        seeds=(1,) if scale == "smoke" else (1, 2, 3, 4, 5),
        facts={
            "model": "residual network" if scale == "gpu" else "two convolutions and a linear layer",
            "width": width,
            "share of wrong labels": wrong,
            "training rows": rows,
            "training rows there are": 50_000,
            "validation rows": HELD // 100 if scale == "smoke" else HELD,
            "test rows": 10_000,
            "epochs": epochs,
            "steps": steps,
            "share of the steps that warm up with cross-entropy": WARM,
        },
    )


def goal_task(scale: str) -> Task:
    """Fashion-MNIST to 95 of 100."""
    gpu = scale == "gpu"
    settings = {
        "lr": 0.2,
        "weight_decay": 5e-4,
        "epochs": 40 if gpu else 1,
        "batch": 512 if gpu else 16,
        "width": 64 if gpu else 2,
        "pictures": 60_000 if gpu else 48,
    }
    return Task(
        GOAL,
        sets=("fashion-mnist",),
        methods={"cross-entropy": [settings]},
        score="accuracy",
        seeds=(1, 2, 3, 4, 5) if gpu else (1,),
        facts={
            "model": "residual network",
            "training rows": settings["pictures"],
            "test rows": 10_000,
            "stops": "after a fixed number of epochs; no row is held back, and no test row decides anything",
            "views": "shifted by up to 2 pixels, mirrored, a square of 8 pixels set to 0",
            "decides": "by the scores of the picture and of its mirror image together",
        },
    )


def tasks(scale: str) -> list[Task]:
    """The tasks at a scale. Smoke: three tables, one of each kind, and few pictures."""
    names = ("car", "audit-risk", "wine") if scale == "smoke" else UCI
    found = [table_task(name, scale) for name in names]
    found.append(picture_task("Fashion-MNIST", scale, 0.0))
    found.append(picture_task("Fashion-MNIST, wrong labels", scale, WRONG))
    return found if scale == "cpu" else [*found, goal_task(scale)]


def run(job: Job) -> dict[str, float]:
    """One run of any task."""
    if job.task.name == GOAL:
        return run_goal(job)
    return run_table(job) if "table" in job.task.facts else run_pictures(job)


EXPERIMENT = Experiment(
    "accuracy",
    "linear models on UCI tables and small networks on Fashion-MNIST, with labels as they are and with wrong ones, "
    "trained with cross-entropy, hinge loss, soft accuracy and EXACT; at the scale gpu also a run to 95 of 100",
    tasks,
    run,
    metrics={"accuracy": "accuracy", "seconds": "seconds to train"},
    baseline="cross-entropy",
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
