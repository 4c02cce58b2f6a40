"""The pieces of the experiment on many data sets: its texts, its draws, its starts, its steps."""

import math

import pytest
import torch
from torch import nn

from experiments import breadth as experiment
from experiments.harness import Job
from lossbook.data import _fetch
from lossbook.soft_labels import multilabel_probabilities
from lossbook.training import seeded


@pytest.fixture
def data():
    if _fetch.data_folder() is None:
        pytest.skip("the public data are not here: set LOSSBOOK_DATA to their folder")


def job(task, method, seed=1, lr=1e-3):
    tasks = {each.name: each for each in experiment.tasks("cpu")}
    return Job(tasks[task], method, {"lr": lr}, seed, True, "cpu")


def test_pieces_of_words_and_of_characters():
    assert experiment.pieces("An ox") == {"<an>", "<an", "an>", "<ox>", "<ox", "ox>"}
    assert experiment.pieces("很好看!") == {"很", "好", "看", "很好", "好看"}


def test_a_bag_counts_no_piece_twice_and_is_cut():
    once, twice = experiment.bag(["a good film", "film good a good film"])
    assert torch.equal(once, twice)
    assert (once[: int((once > 0).sum())] > 0).all()
    assert experiment.bag(["some words here"], most=3).shape == (1, 3)


def test_a_cut_is_a_partition_drawn_from_the_seed():
    with seeded(3):
        first = experiment.cut(10, 0.5, 0.7)
    with seeded(3):
        again = experiment.cut(10, 0.5, 0.7)
    assert [len(part) for part in first] == [5, 2, 3]
    assert torch.cat(first).sort().values.tolist() == list(range(10))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_base_rate_is_what_each_method_predicts_at_the_start():
    t = torch.tensor([[1, 0], [0, 0], [1, 0]]).bool()
    share = torch.tensor([3 / 5, 1 / 5], dtype=torch.float64)  # add-one
    assert torch.sigmoid(experiment.start_of("BCE, base rate", t)) == pytest.approx(share)
    odds = experiment.start_of("BCE, weight 10, base rate", t).exp()
    assert odds == pytest.approx(10 * share / (1 - share))
    assert multilabel_probabilities(experiment.start_of("multi-label softmax, base rate", t)) == pytest.approx(share)
    assert experiment.start_of("BCE, bias 0", t) is None


def test_the_start_of_weighted_bce_is_where_it_rests():
    t = torch.tensor([[True]] + [[False]] * 6)
    s = experiment.start_of("BCE, weight 10, base rate", t.repeat(4000, 1)).float().requires_grad_()
    experiment.LABELS["BCE, weight 10"](s.expand(len(t), 1), t).backward()
    assert s.grad.item() == pytest.approx(0, abs=1e-3)


def test_every_method_has_its_loss():
    x, t = torch.randn(5, 3), torch.rand(5, 4) < 0.5
    y, s = torch.arange(5) % 4, torch.randn(5, 4)
    found = {}
    for kind, methods in experiment.METHODS.items():
        for method in methods:
            with seeded(0):
                inputs, loss = experiment.steps_of(method)(x, y if kind == "wrong" else t, 1.0)
                found[method] = loss(s, y if kind == "wrong" else t).item()
            assert math.isfinite(found[method])
            assert inputs.shape == x.shape
    plain = {name: value for name, value in found.items() if name.endswith("bias 0") and "BCE, s" not in name}
    losses = {round(plain[f"{name}, bias 0"], 6) for name in experiment.LABELS}
    assert len(losses) == len(experiment.LABELS)
    assert found["EXACT"] == found["EXACT, warmed up"] != found["cross-entropy"]


def test_a_warmed_up_loss_starts_as_cross_entropy():
    s, y = torch.randn(5, 4), torch.arange(5) % 4
    early, late = (experiment.steps_of("EXACT, warmed up")(s, y, at)[1](s, y).item() for at in (0.49, 0.5))
    assert early == torch.nn.functional.cross_entropy(s, y).item()
    assert late != early


@pytest.mark.parametrize(
    ("method", "kind", "rates"),
    [
        ("BCE, bias 0", torch.optim.Adam, [0.01, 0.01]),
        ("BCE, SGD, bias 0", torch.optim.SGD, [1.0, 1.0]),
        ("BCE, bias not trained, base rate", torch.optim.Adam, [0.01, 0.0]),
        ("BCE, rate of the bias / 10, bias 0", torch.optim.Adam, [0.01, 0.001]),
    ],
)
def test_the_optimizer_of_a_method(method, kind, rates):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = experiment.optimizer_of(model, method, 0.01)
    assert type(optimizer) is kind
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates)
    assert optimizer.param_groups[1]["params"] == [model[-1].bias]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", list(experiment.GOALS))
def test_goals_have_names_that_tasks_end_with(kind):
    names = [name for name, form in experiment.FORMS.items() if form.kind == kind]
    tasks = [task for task in experiment.tasks("cpu") if experiment.base(task.name) in names]
    assert len(tasks) == len(names) * len(experiment.GOALS[kind])
    assert {task.facts["goal"] for task in tasks} == set(experiment.GOALS[kind])


@pytest.mark.usefixtures("data")
def test_rare_texts_are_as_rare_as_the_task_says():
    for name, share in (("rt-polarity 1:20", 1 / 21), ("rt-polarity 1:100", 1 / 101)):
        with seeded(1):
            _, parts = experiment.load(job(name, "BCE, bias 0"))
        shares = [part.float().mean().item() for _, part in parts]
        assert shares == pytest.approx([share] * 3, rel=0.1)
        sizes = [len(part) for _, part in parts]
        assert sizes[2] / sizes[0] == pytest.approx(0.3 / 0.5, rel=0.01)
        everything = torch.cat([x for x, _ in parts])
        assert len(everything.unique(dim=0)) > 0.99 * len(everything)  # no text in two splits; short ones may collide


@pytest.mark.usefixtures("data")
def test_another_seed_is_another_intent():
    def positives(seed):
        with seeded(seed):
            _, (fit, _, test) = experiment.load(job("BANKING77, one intent", "BCE, bias 0", seed))
        return fit[1].sum().item(), test[1].nonzero()[0, 0].item()

    assert len({positives(seed)[1] for seed in range(1, 6)}) == 5
    assert all(positives(seed)[0] > 10 for seed in range(1, 4))


@pytest.mark.usefixtures("data")
def test_wrong_labels_are_wrong_to_train_and_right_to_test():
    right, test = experiment.classes("dry-bean")
    with seeded(1):
        _, (fit, validation, judged) = experiment.load(job("dry-bean, wrong labels", "cross-entropy"))
    assert judged is test or torch.equal(judged[1], test[1])
    known = {tuple(row.tolist()): label for row, label in zip(*right, strict=True)}
    for x, y in (fit, validation):
        wrong = sum(known[tuple(row.tolist())] != label for row, label in zip(x, y, strict=True)) / len(y)
        assert wrong == pytest.approx(experiment.WRONG, abs=0.03)


@pytest.mark.usefixtures("data")
def test_fewer_words_are_fewer_words():
    with seeded(1):
        _, ((x, _), *_) = experiment.load(job("medical", "BCE, bias 0"))
    with seeded(1):
        _, ((y, _), *_) = experiment.load(job("medical, 20% of the words", "BCE, bias 0"))
    assert y.mean() / x.mean() == pytest.approx(0.2, abs=0.01)
