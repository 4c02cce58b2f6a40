r"""EMO and EMO + CE against cross-entropy: language models on WikiText-2 that are trained on from the same start.

What is compared. For each seed a word model (:class:`lossbook.models.WordModel`, a GRU) is trained with cross-entropy
on the first part of the training text. From these weights it is trained on, over the next part of the text, which it
has not seen: with cross-entropy, with EMO (:func:`lossbook.emo.linear_emo_loss`), and with EMO + CE
(:func:`lossbook.emo.linear_emo_ce_loss`). Same start, same batches, same number of steps. The costs of EMO use a frozen
copy of the start's word vectors.

The tasks share their models:

* the start, before it is trained on, and the text itself, for comparison;
* the three continuations, each with the best of six settings: six learning rates for cross-entropy and for EMO; three
  learning rates and two weights of EMO in EMO + CE, the published one and half of it;
* the same models with one sharpness: the scores of each are divided by the temperature at which its mean entropy on
  validation text is that of the start at temperature 0.9. What a loss gains there is more than a temperature gives;
* the three continuations at one learning rate that was fixed beforehand, with the published weight.

EMO is no proper scoring rule, so perplexity would be a judge on the side of cross-entropy. Every rival is judged by its
accuracy on validation text, which no temperature changes, at the places where the next word is a word and not the mark
``<unk>`` for rare ones; the answer is the best word, not the mark. Whoever says the mark less often gains nothing by
that. The learning rate of the start is fixed, as the three continuations share it.

What is measured, on test text:

* perplexity and accuracy, where the mark counts like a word, and the accuracy among words, as above;
* cost: the EMO value, by the frozen vectors that EMO was given, and by vectors from neighbour counts that no loss saw;
* samples: each prompt of 32 words from the test text is continued by 64 sampled words. The share of different words
  and of different pairs and triples among all of them; the share of groups of four words that were there before in the
  same sample; and a score of the kind of MAUVE (Pillutla et al. 2021, arXiv 2102.01454) that needs no large model:
  the windows' counts of words and hashed pairs, weighted by TF-IDF and reduced by a truncated SVD fitted on training
  text, are sorted into clusters by k-means over sampled and true continuations together; the two histograms P and Q
  are compared by the area under the curve of exp(-5 KL(Q|R)) and exp(-5 KL(P|R)) over mixtures R of both. Finite
  samples do not reach 1. So the text itself is measured in the same way: the true continuations of the prompts
  against those of other prompts, which lie in between.

Run ``python -m experiments.emo [--scale smoke|cpu|gpu]``. The CPU scale cuts the vocabulary and the texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix  # type: ignore[import-untyped]
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.harness import Experiment, Job, Task, main
from lossbook.data.public import wikitext2
from lossbook.emo import emo_loss, linear_emo_ce_loss, linear_emo_loss
from lossbook.models import WordModel
from lossbook.training import seeded, train

START, TEXT = "the start", "the text itself"
CHOSEN, LEVEL, ONE_RATE = "rate chosen", "rate chosen, one sharpness", "one rate"
CE, EMO, BOTH = "cross-entropy", "EMO", "EMO + CE"
PROMPT, CONTINUATION = 32, 64  # words
COOLED = 0.9  # the start at this temperature sets the one sharpness
PAIRS = 8192  # buckets of hashed pairs of words


@dataclass(frozen=True)
class Plan:
    """The sizes of one scale. ``words`` are words of text, ``windows`` pieces of ``length`` words."""

    vocabulary: int
    hidden: int
    dropout: float
    length: int
    batch: int
    start_words: int
    start_epochs: int
    start_lr: float
    more_words: int
    validation_words: int
    test_words: int
    prompts: int
    clusters: int
    dimensions: int
    counted: int
    fitted_windows: int


PLANS = {
    "smoke": Plan(300, 16, 0.1, 32, 16, 8_000, 1, 5e-3, 2_000, 2_000, 2_000, 40, 8, 8, 8, 60),
    "cpu": Plan(4_000, 96, 0.1, 64, 8, 700_000, 1, 5e-3, 130_000, 50_000, 40_000, 800, 64, 32, 64, 6_000),
    "gpu": Plan(33_278, 650, 0.4, 64, 32, 1_566_000, 8, 2e-3, 520_000, 217_000, 245_000, 1_276, 96, 32, 128, 24_000),
}


# The text -----------------------------------------------------------------------------------------------------------


def cut(text: Tensor, counts: Tensor, size: int, rare: int) -> Tensor:
    """The text with the ``size`` most frequent words, numbered by how frequent they are; the others become ``rare``."""
    kept = counts.argsort(descending=True, stable=True)[:size]
    number = torch.full_like(counts, -1)
    number[kept] = torch.arange(len(kept))
    return torch.where(number < 0, number[rare], number)[text]


def windows(text: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Pieces of ``length`` words, and for each word the next one: two tensors ``(N, length)``."""
    n = (len(text) - 1) // length
    return text[: n * length].view(n, length), text[1 : n * length + 1].view(n, length)


class Texts(NamedTuple):
    """The parts of the text, and the number of the mark for rare words."""

    start: Tensor
    more: Tensor
    validation: Tensor
    test: Tensor
    rare: int


@cache
def texts(plan: Plan) -> Texts:
    """WikiText-2 with the vocabulary cut; its training text is cut into ``start`` and ``more``."""
    public = wikitext2()
    counts = torch.bincount(public.train, minlength=len(public.vocabulary))
    rare = public.vocabulary.index("<unk>")
    learned, validation, test, mark = (
        cut(text, counts, plan.vocabulary, rare)
        for text in (public.train, public.validation, public.test, torch.tensor([rare]))
    )
    more = learned[plan.start_words :][: plan.more_words]
    return Texts(learned[: plan.start_words], more, validation, test, int(mark))


def prompts(text: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, their true continuations, and the true continuations of the prompts in between.

    Args:
        text: Words.
        number: How many prompts at most. They are spread evenly over the text.
    """
    size = PROMPT + CONTINUATION
    pieces = text[: len(text) // size * size].view(-1, size)
    pairs = len(pieces) // 2
    number = min(number, pairs)
    first = torch.arange(number) * pairs // number * 2
    return pieces[first, :PROMPT], pieces[first, PROMPT:], pieces[first + 1, PROMPT:]


# Samples ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample(model: WordModel, prompt: Tensor, length: int, temperature: float, seed: int) -> Tensor:
    """``length`` words drawn one by one after each prompt, ``(N, length)``."""
    model.eval()
    drawn = []
    with seeded(seed):
        output, state = model.gru(model.vectors(prompt))
        for _ in range(length):
            scores = F.linear(output[:, -1], model.vectors.weight, model.bias)
            word = torch.multinomial((scores / temperature).softmax(-1), 1)
            drawn.append(word)
            output, state = model.gru(model.vectors(word), state)
    return torch.cat(drawn, dim=1)


def groups(row: list[int], k: int) -> list[tuple[int, ...]]:
    """All groups of k neighbours."""
    return [tuple(row[i : i + k]) for i in range(len(row) - k + 1)]


def distinct(samples: Tensor, k: int) -> float:
    """The share of different ones among all the groups of k neighbours in all samples."""
    found = [group for row in samples.tolist() for group in groups(row, k)]
    return len(set(found)) / len(found)


def repeats(samples: Tensor, k: int = 4) -> float:
    """The share of groups of k neighbours that stood before in the same sample; the mean over samples."""
    shares = [1 - len(set(found)) / len(found) for found in (groups(row, k) for row in samples.tolist())]
    return sum(shares) / len(shares)


# Samples against text -----------------------------------------------------------------------------------------------


def divergence_area(p: NDArray[np.float64], q: NDArray[np.float64], scaling: float = 5.0, mixtures: int = 100) -> float:
    """MAUVE of two histograms: the area under the divergence curve.

    The curve goes through ``exp(-scaling KL(q|r))`` and ``exp(-scaling KL(p|r))`` for mixtures ``r`` of both, and ends
    at (0, 1) and (1, 0). The area is 1 if both are the same, and near 0 if no bin is filled in both.
    """

    def divergence(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        there = a > 0
        return float((a[there] * np.log(a[there] / b[there])).sum())

    p, q = p / p.sum(), q / q.sum()
    points = [(0.0, 1.0), (1.0, 0.0)]
    for weight in (np.arange(mixtures) + 0.5) / mixtures:
        mixture = weight * p + (1 - weight) * q
        points.append((math.exp(-scaling * divergence(q, mixture)), math.exp(-scaling * divergence(p, mixture))))
    # along the curve x never falls and y never rises
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def bags(rows: Tensor, vocabulary: int, pairs: int = PAIRS) -> csr_matrix:
    """How often each word and each hashed pair of neighbours stands in each row."""
    words = rows.numpy()
    hashed = vocabulary + (words[:, :-1] * 1_000_003 + words[:, 1:]) % pairs
    columns = np.concatenate([words, hashed], axis=1)
    places = np.repeat(np.arange(len(columns)), columns.shape[1])
    filled = (np.ones(columns.size), (places, columns.ravel()))
    return csr_matrix(filled, shape=(len(columns), vocabulary + pairs))  # adds up what stands there twice


@cache
def features(plan: Plan) -> Callable[[Tensor], NDArray[np.float64]]:
    """Windows of words as points on a sphere: TF-IDF and a truncated SVD, both fitted on training text."""
    rows, _ = windows(texts(plan).start, CONTINUATION)
    counted = bags(rows[: plan.fitted_windows], plan.vocabulary)
    weighted = TfidfTransformer(sublinear_tf=True).fit(counted)
    reduced = TruncatedSVD(plan.dimensions, random_state=0).fit(weighted.transform(counted))

    def points(rows: Tensor) -> NDArray[np.float64]:
        found: NDArray[np.float64] = normalize(reduced.transform(weighted.transform(bags(rows, plan.vocabulary))))
        return found

    return points


def likeness(p: NDArray[np.float64], q: NDArray[np.float64], clusters: int, seed: int) -> float:
    """The MAUVE of two sets of points, by the histograms over k-means clusters of both together."""
    found = KMeans(clusters, n_init=2, random_state=seed).fit(np.concatenate([p, q])).labels_
    sampled, true = (np.bincount(part, minlength=clusters).astype(float) for part in np.split(found, [len(p)]))
    return divergence_area(sampled, true)


# Costs --------------------------------------------------------------------------------------------------------------


def neighbour_vectors(text: Tensor, size: int, dimensions: int) -> Tensor:
    """Word vectors from counts of neighbours at most two places away: positive log ratio to chance, then an SVD."""
    words = text.numpy()
    both = [(words[:-gap], words[gap:]) for gap in (1, 2)]
    left = np.concatenate([part for a, b in both for part in (a, b)])
    right = np.concatenate([part for a, b in both for part in (b, a)])
    counts = csr_matrix((np.ones(len(left)), (left, right)), shape=(size, size)).tocoo()
    total = np.bincount(left, minlength=size).astype(float)
    ratio = np.log(counts.data * len(left) / (total[counts.row] * total[counts.col])).clip(min=0)
    reduced = TruncatedSVD(dimensions, random_state=0)
    found = reduced.fit_transform(csr_matrix((ratio, (counts.row, counts.col)), shape=(size, size)))
    return torch.from_numpy((found / np.sqrt(reduced.singular_values_)).astype(np.float32))


@cache
def count_vectors(plan: Plan) -> Tensor:
    """The vectors from counts, of the training text."""
    return neighbour_vectors(texts(plan).start, plan.vocabulary, plan.counted)


# Models -------------------------------------------------------------------------------------------------------------


class States(nn.Module):
    """A word model that stops before its scores, for the losses that compute those themselves."""

    def __init__(self, model: WordModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor) -> Tensor:
        """The states of the model."""
        return self.model.hidden(words)


def loss_on_states(method: str, weight: float, model: WordModel, frozen: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A method's loss as a function of states and wanted words.

    EMO + CE is ``(1 - weight) CE + weight rho EMO``; at a weight of 1/2 that is the published composition.
    """

    def cross_entropy(states: Tensor, target: Tensor) -> Tensor:
        scores = F.linear(states, model.vectors.weight, model.bias)
        return F.cross_entropy(scores.flatten(0, -2), target.flatten())

    def emo(states: Tensor, target: Tensor) -> Tensor:
        return linear_emo_loss(states, model.vectors.weight, target, frozen, bias=model.bias)

    def both(states: Tensor, target: Tensor) -> Tensor:
        half = linear_emo_ce_loss(states, model.vectors.weight, target, frozen, bias=model.bias)
        if weight == 0.5:
            return half
        return 2 * weight * half + (1 - 2 * weight) * cross_entropy(states, target)

    return {CE: cross_entropy, EMO: emo, BOTH: both}[method]


def fresh(plan: Plan, seed: int) -> WordModel:
    """A model that knows nothing."""
    with seeded(seed):
        return WordModel(plan.vocabulary, plan.hidden, plan.dropout)


def with_weights(plan: Plan, weights: Mapping[str, Tensor], device: torch.device) -> WordModel:
    """A model with these weights."""
    model = fresh(plan, 0)
    model.load_state_dict(dict(weights))
    return model.to(device)


def start_weights(job: Job, plan: Plan) -> dict[str, Tensor]:
    """The weights that all continuations of a seed start from."""

    def make() -> dict[str, Tensor]:
        model = fresh(plan, job.seed)
        fit(model, CE, 0.5, job, texts(plan).start, plan.start_epochs, plan.start_lr, job.seed)
        return model.state_dict()

    return job.keep(f"start-{job.seed}", make)


def trained_on(job: Job, plan: Plan) -> dict[str, Tensor]:
    """The weights after one pass over the text that follows."""
    lr, weight = job.settings["lr"], job.settings.get("weight", 0.5)

    def make() -> dict[str, Tensor]:
        model = with_weights(plan, start_weights(job, plan), job.device)
        fit(model, job.method, weight, job, texts(plan).more, 1, lr, job.seed + 1000)
        return model.state_dict()

    return job.keep(f"{job.method.replace(' + ', '-')}-{lr}-{weight}-{job.seed}", make)


def fit(
    model: WordModel, method: str, weight: float, job: Job, text: Tensor, epochs: int, lr: float, seed: int
) -> None:
    """Train ``model`` in place. EMO's costs use the vectors that it has now."""
    plan = PLANS[job.scale]
    model.to(job.device)
    loss = loss_on_states(method, weight, model, model.vectors.weight.detach().clone())
    options: dict[str, Any] = {"batch_size": plan.batch, "device": job.device, "desc": method}
    train(States(model), loss, windows(text, plan.length), epochs=epochs, lr=lr, seed=seed, **options)


# Measures -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: WordModel,
    text: Tensor,
    plan: Plan,
    rare: int,
    temperature: float = 1.0,
    yardsticks: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Perplexity, accuracy, mean entropy, and the mean cost by each yardstick, over a text in pieces.

    ``accuracy_words`` leaves out the mark for rare words, as a wanted word and as an answer.
    """
    model.eval()
    yardsticks = yardsticks or {}
    names = ("nll", "accuracy", "accuracy_words", "entropy", *yardsticks)
    total: dict[str, float] = dict.fromkeys(names, 0.0)
    rows = windows(text, plan.length)
    for places in torch.arange(len(rows[0])).split(16):  # type: ignore[no-untyped-call]
        words, target = (part[places].to(model.bias.device) for part in rows)
        target = target.flatten()
        scores = model(words).flatten(0, 1) / temperature
        log_p = scores.log_softmax(-1)
        total["nll"] += F.nll_loss(log_p, target, reduction="sum").item()
        total["accuracy"] += (scores.argmax(-1) == target).sum().item()
        total["entropy"] -= (log_p.exp() * log_p).sum().item()
        for name, vectors in yardsticks.items():
            total[name] += emo_loss(scores, target, vectors, reduction="sum").item()
        scores[:, rare] = -torch.inf
        total["accuracy_words"] += (scores.argmax(-1) == target).sum().item()  # where the mark is wanted, none is right
    number = rows[1].numel()
    found = {name: value / number for name, value in total.items()}
    found["accuracy_words"] *= number / int((rows[1] != rare).sum())
    perplexity = math.exp(min(found.pop("nll"), 700.0))  # of a model that diverged: the largest number, no error
    return {"perplexity": perplexity, **found}


def temperature_for(model: WordModel, text: Tensor, plan: Plan, rare: int, entropy: float) -> float:
    """The temperature at which the model has this mean entropy on a text, by bisection between 1/8 and 8."""
    low, high = -3.0, 3.0  # powers of 2; the entropy grows with the temperature
    for _ in range(14):
        middle = (low + high) / 2
        if evaluate(model, text, plan, rare, 2**middle)["entropy"] < entropy:
            low = middle
        else:
            high = middle
    return float(2 ** ((low + high) / 2))


def measure_samples(rows: Tensor, true: Tensor, plan: Plan, seed: int) -> dict[str, float]:
    """How varied the rows are, and how much they are like the true ones."""
    found = {f"distinct_{k}": distinct(rows, k) for k in (1, 2, 3)}
    points = features(plan)
    return {**found, "repeats": repeats(rows), "mauve": likeness(points(rows), points(true), plan.clusters, seed)}


def measure(job: Job, plan: Plan, model: WordModel, start: WordModel) -> dict[str, float]:
    """All metrics on test text, at temperature 1 or at the one sharpness."""
    parts = texts(plan)
    temperature = 1.0
    if job.task.name == LEVEL:
        short = parts.validation[: plan.validation_words // 8]
        wanted = evaluate(start, short, plan, parts.rare, COOLED)["entropy"]
        temperature = temperature_for(model, short, plan, parts.rare, wanted)
    yardsticks = {"cost": start.vectors.weight, "cost_counted": count_vectors(plan).to(job.device)}
    found = evaluate(model, parts.test[: plan.test_words], plan, parts.rare, temperature, yardsticks)
    before, true, _ = prompts(parts.test, plan.prompts)
    drawn = sample(model, before.to(job.device), CONTINUATION, temperature, job.seed).cpu()
    return {**found, **measure_samples(drawn, true, plan, job.seed), "temperature": temperature}


def run(job: Job) -> dict[str, float]:
    """One model: its metrics on validation text, or all metrics on test text."""
    plan = PLANS[job.scale]
    parts = texts(plan)
    if job.task.name == TEXT:
        _, true, others = prompts(parts.test, plan.prompts)
        return measure_samples(others, true, plan, job.seed)
    start = with_weights(plan, start_weights(job, plan), job.device)
    model = start if job.task.name == START else with_weights(plan, trained_on(job, plan), job.device)
    if job.final:
        return measure(job, plan, model, start)
    return evaluate(model, parts.validation[: plan.validation_words], plan, parts.rare)


def tasks(scale: str) -> list[Task]:
    """The start and the text, the models trained on, these at one sharpness, and models of one rate."""
    plan = PLANS[scale]
    rates = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3) if scale != "smoke" else (1e-3, 3e-3)
    fewer = rates[-3:] if scale != "smoke" else (1e-3,)
    grids = {
        CE: [{"lr": lr} for lr in rates],
        EMO: [{"lr": lr} for lr in rates],
        BOTH: [{"lr": lr, "weight": weight} for lr in fewer for weight in (0.5, 0.25)],
    }
    fixed = {"lr": 3e-4}
    alike = {CE: [fixed], EMO: [fixed], BOTH: [{**fixed, "weight": 0.5}]}
    facts = {
        **asdict(plan),
        "text": "WikiText-2, word by word; the most frequent words of its training text, others are <unk>",
        "network": f"a GRU with {plan.hidden} units, word vectors shared by input and output",
        "steps of the start": -(-(plan.start_words - 1) // plan.length // plan.batch) * plan.start_epochs,
        "steps after it": -(-(plan.more_words - 1) // plan.length // plan.batch),
        "samples": f"{PROMPT} words of test text, continued by {CONTINUATION} words",
    }
    common: dict[str, Any] = {"sets": ("wikitext-2",), "score": "accuracy_words", "facts": facts}
    if scale == "smoke":
        common["seeds"] = (1, 2)
    sampled = ("distinct_1", "distinct_2", "distinct_3", "repeats", "mauve")
    return [
        Task(START, methods={CE: [{"lr": plan.start_lr}]}, stage=0, **common),
        Task(TEXT, methods={"other true continuations": [{}]}, stage=0, metrics=sampled, **common),
        Task(CHOSEN, methods=grids, stage=1, **common),
        Task(ONE_RATE, methods=alike, stage=2, **common),
        Task(LEVEL, methods=grids, stage=3, **common),
    ]


EXPERIMENT = Experiment(
    "emo",
    "Cross-entropy, EMO and EMO + CE, each trained on from the same word model of WikiText-2.",
    tasks,
    run,
    metrics={
        "perplexity": "perplexity",
        "accuracy": "accuracy",
        "accuracy_words": "accuracy among words",
        "entropy": "entropy",
        "cost": "cost, own vectors",
        "cost_counted": "cost, vectors from counts",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
        "distinct_3": "distinct-3",
        "repeats": "repeated groups of 4",
        "mauve": "likeness to the text",
        "temperature": "temperature",
    },
    baseline=CE,
    packages=("numpy", "scipy", "scikit-learn"),
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
