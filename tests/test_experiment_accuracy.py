"""The pieces of chapter 5's experiment, on made data."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import accuracy
from experiments.harness import Job, Task
from lossbook.accuracy import exact_loss, soft_accuracy_loss
from lossbook.data.public import FashionMnist, ImageSplit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- losses


def test_the_noise_of_exact_falls_to_a_tenth_and_the_others_divide_their_scores():
    s, t = torch.randn(6, 4, generator=generator()), torch.tensor([0, 1, 2, 3, 0, 1])
    for method in ("EXACT", accuracy.COLD):
        loss = accuracy.loss_of(method, 3.0)
        for progress, sigma in ((0.0, 3.0), (0.5, 3.0 / math.sqrt(10)), (1.0, 0.3)):
            torch.testing.assert_close(loss(s, t, progress), exact_loss(s, t, sigma=sigma, nodes=16))
    plain = {"cross-entropy": F.cross_entropy, "hinge": F.multi_margin_loss, "soft accuracy": soft_accuracy_loss}
    for method, loss in plain.items():
        torch.testing.assert_close(accuracy.loss_of(method, 0.3)(s, t, 0.7), loss(s / 0.3, t))
    # a scale of 2 is a margin of 2 for twice the hinge loss
    torch.testing.assert_close(2 * accuracy.loss_of("hinge", 2.0)(s, t, 0.0), F.multi_margin_loss(s, t, margin=2.0))


def test_the_warm_up_is_cross_entropy_and_the_loss_starts_after_it():
    seen = []

    def loss(s, t, progress):
        seen.append(progress)
        return s.sum()

    s, t = torch.randn(3, 4, generator=generator()), torch.tensor([0, 1, 2])
    both = accuracy.warmed(loss, 0.2)
    for progress in (0.0, 0.19):
        assert both(s, t, progress) == F.cross_entropy(s, t)
    assert not seen
    for progress in (0.2, 0.6, 1.0):
        assert both(s, t, progress) == s.sum()
    assert seen == pytest.approx([0.0, 0.5, 1.0])


# ---------------------------------------------------------------- training


def test_batches_take_each_row_of_a_shuffle_once():
    found = list(accuracy.batches(10, 4, 5, generator(), torch.device("cpu")))
    assert [len(rows) for rows in found] == [4] * 5
    for first, second in ((0, 1), (2, 3)):  # two batches of one shuffle; its last two rows are left
        assert len(set(torch.cat([found[first], found[second]]).tolist())) == 8
    assert not torch.equal(found[0], found[2])
    again = list(accuracy.batches(10, 4, 5, generator(), torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert [rows.sort().values.tolist() for rows in accuracy.batches(3, 8, 2, generator(), torch.device("cpu"))] == [
        [0, 1, 2]
    ] * 2


@pytest.mark.parametrize("steps", [1, 2, 5, 7, 100])
def test_the_learning_rate_goes_up_once_and_down_once(steps):
    path = [accuracy.height(step, steps) for step in range(steps)]
    top = path.index(max(path))
    assert max(path) == 1
    assert path == sorted(path[: top + 1]) + sorted(path[top + 1 :], reverse=True)
    assert top == max(steps // 5, 1) - 1
    assert all(0 < value <= 1 for value in path)
    if steps > 5:
        falls = [a - b for a, b in zip(path[top:], path[top + 1 :], strict=False)]
        assert falls == pytest.approx([path[-1]] * len(falls))  # one more step would be 0


def test_fit_is_adam_with_that_learning_rate():
    x, t = torch.randn(12, 3, generator=generator()), torch.arange(12) % 2

    def model():
        layer = nn.Linear(3, 2)
        accuracy.start_at_zero(layer)
        return layer

    ours, theirs, seen = model(), model(), []

    def loss(s, t, progress):
        seen.append(progress)
        return F.cross_entropy(s, t)

    seconds = accuracy.fit(ours, torch.optim.Adam(ours.parameters()), loss, (x, t), lr=0.1, steps=6, batch=5, seed=3)
    optimizer = torch.optim.Adam(theirs.parameters())
    for step, rows in enumerate(accuracy.batches(12, 5, 6, generator(3), torch.device("cpu"))):
        optimizer.param_groups[0]["lr"] = 0.1 * accuracy.height(step, 6)
        optimizer.zero_grad()
        F.cross_entropy(theirs(x[rows]), t[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    assert ours.weight.abs().min() > 0
    assert seen == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert seconds > 0


def test_networks_start_with_scores_of_zero():
    x = torch.randn(4, 1, 28, 28, generator=generator())
    for network in (accuracy.plain_network(2), accuracy.residual_network(2)):
        assert network(x).shape == (4, 10)
        assert network(x).abs().max() > 0
        accuracy.start_at_zero(network)
        assert network(x).abs().max() == 0
        network(x)[:, 0].sum().backward()
        assert [p for p in network.modules() if isinstance(p, nn.Linear)][-1].weight.grad.abs().max() > 0


def test_accuracy_by_hand():
    assert accuracy.accuracy(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 1])) == 2 / 3


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize(("rows", "train_rows"), [(150, None), (103, None), (100, 60)])
def test_no_test_row_judges_a_setting(rows, train_rows):
    splits = {seed: accuracy.split_rows(rows, train_rows, seed) for seed in range(8)}
    own = rows if train_rows is None else train_rows
    for train, validation, test in splits.values():
        assert sorted(torch.cat([train, validation]).tolist() + test.tolist()) == (
            list(range(rows)) if train_rows is None else sorted(torch.cat([train, validation, test]).tolist())
        )
        assert len(validation) == own // 5
        assert len(train) == (own - own // 5) * 3 // 4
        assert torch.equal(validation, splits[0][1])
        assert not set(train.tolist()) & set(test.tolist())
    assert {int(v) for _, _, test in splits.values() for v in test}.isdisjoint(splits[0][1].tolist())
    assert splits[1][0].sort().values.tolist() != splits[2][0].sort().values.tolist()
    if train_rows is None:
        assert len(splits[1][2]) == rows - len(splits[1][0]) - len(splits[1][1])
    else:
        assert splits[1][2].tolist() == list(range(train_rows, rows))
        assert max(splits[1][0].max(), splits[1][1].max()) < train_rows


def test_features_are_scaled_by_the_training_rows():
    nan = math.nan
    train = torch.tensor([[1.0, 5.0, 0.0], [3.0, 5.0, nan], [5.0, 5.0, 2.0], [7.0, 5.0, 4.0]]).double()
    other = torch.tensor([[9.0, 7.0, nan]]).double()
    ours, its = accuracy.standardised(train, other)
    assert ours.dtype == its.dtype == torch.float32
    assert ours[:, 0].mean().item() == pytest.approx(0, abs=1e-6)
    assert ours[:, 0].std().item() == pytest.approx(1)
    assert ours[:, 1].tolist() == [0, 0, 0, 0]
    assert its[0, 1] == 2  # only shifted
    assert ours[1, 2] == its[0, 2]  # NaN is the median of 0, 2, 4
    assert its[0, 2].item() == pytest.approx((2 - 2) / 1.633, abs=1e-6)
    assert its[0, 0].item() == pytest.approx((9 - 4) / train[:, 0].std().item())


def table_job(monkeypatch, method, *, final, wide=False):
    """Two classes on a line. With ``wide`` the test rows, and only they, have the classes turned round."""
    features = torch.linspace(-1, 1, 60, dtype=torch.float64).repeat(2).unsqueeze(1)
    classes = (features[:, 0] > 0).long()
    if wide:
        classes[60:] = 1 - classes[60:]
    monkeypatch.setattr(accuracy, "table", lambda name: (features, classes, 60))
    task = Task("made", (), {}, "accuracy", facts={"table": "made", "classes": 2})
    return Job(task, method, {"scale": 1.0, "lr": 0.1, "steps": 40, "batch": 16}, 1, final, "cpu")


@pytest.mark.parametrize("method", accuracy.TABLE_METHODS)
def test_a_linear_model_learns_a_table(monkeypatch, method):
    assert accuracy.run(table_job(monkeypatch, method, final=False))["accuracy"] > 0.85
    assert accuracy.run(table_job(monkeypatch, method, final=True))["accuracy"] > 0.85


def test_only_a_final_run_sees_test_rows(monkeypatch):
    assert accuracy.run(table_job(monkeypatch, "cross-entropy", final=False, wide=True))["accuracy"] > 0.85
    assert accuracy.run(table_job(monkeypatch, "cross-entropy", final=True, wide=True))["accuracy"] < 0.15


# ---------------------------------------------------------------- pictures


def test_wrong_labels_are_other_classes_and_all_alike():
    t = torch.arange(10).repeat(3000)
    changed = accuracy.with_wrong(t, 0.3, 10, generator(1))
    wrong = changed != t
    assert wrong.double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert set(changed.tolist()) == set(range(10))
    steps = torch.bincount((changed[wrong] - t[wrong]) % 10, minlength=10)
    assert steps[0] == 0
    assert steps[1:].min() > 0.85 * wrong.sum() / 9
    assert torch.equal(accuracy.with_wrong(t, 0.0, 10, generator(1)), t)
    assert (accuracy.with_wrong(t, 1.0, 10, generator(1)) != t).all()


def view_by_loops(picture, down, right, mirror, pad):
    """One picture, pixel by pixel; outside it, mirrored at its edge."""
    height, width = picture.shape

    def at(i, size):
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    out = torch.empty_like(picture)
    for row in range(height):
        for column in range(width):
            source = width - 1 - column if mirror else column
            out[row, column] = picture[at(row + down - pad, height), at(source + right - pad, width)]
    return out


def test_a_view_is_shifted_mirrored_and_has_a_hole():
    x = torch.rand(40, 1, 12, 12, generator=generator()) + 1
    seen = accuracy.random_view(x, generator(5), pad=2, hole=4)
    assert seen.shape == x.shape
    choices = set()
    for before, after in zip(x[:, 0], seen[:, 0], strict=True):
        empty = (after == 0).nonzero()
        assert len(empty) == 16
        assert (empty.amax(0) - empty.amin(0)).tolist() == [3, 3]
        fits = [
            (down, right, mirror)
            for down in range(5)
            for right in range(5)
            for mirror in (False, True)
            if torch.equal(view_by_loops(before, down, right, mirror, 2)[after > 0], after[after > 0])
        ]
        assert len(fits) == 1
        choices.update(fits)
    for part, values in enumerate((range(5), range(5), (False, True))):
        assert {choice[part] for choice in choices} == set(values)
    assert torch.equal(seen, accuracy.random_view(x, generator(5), pad=2, hole=4))


@pytest.fixture
def made_pictures(monkeypatch):
    """A bright bar at the height that its class says."""

    def split(n):
        labels = torch.arange(n) % 10
        images = torch.randint(0, 60, (n, 28, 28), generator=generator(n), dtype=torch.uint8)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[2 * label + 2 : 2 * label + 5] = 255
        return ImageSplit(images, labels)

    made = FashionMnist(split(400), split(80), tuple("abcdefghij"))
    monkeypatch.setattr(accuracy, "pictures", lambda: made)
    return made


def picture_job(method, *, final, wrong=0.0):
    facts = {"training rows": 256, "validation rows": 100, "share of wrong labels": wrong, "width": 4}
    task = Task("made", (), {}, "accuracy", facts=facts)
    settings = {"scale": accuracy.PICTURE_METHODS[method], "lr": 0.01, "steps": 60, "batch": 64}
    return Job(task, method, settings, 1, final, "cpu")


@pytest.mark.parametrize("method", accuracy.PICTURE_METHODS)
def test_a_network_learns_pictures(made_pictures, method):
    assert accuracy.run(picture_job(method, final=True))["accuracy"] > 0.6


def test_pictures_are_judged_by_wrong_labels_until_the_final_run(made_pictures):
    tuning = accuracy.run(picture_job("cross-entropy", final=False, wrong=0.3))["accuracy"]
    final = accuracy.run(picture_job("cross-entropy", final=True, wrong=0.3))["accuracy"]
    assert tuning < 0.8 < final
    assert accuracy.run(picture_job("cross-entropy", final=False))["accuracy"] > 0.9


def test_the_goal_runs_on_a_cpu_and_learns(made_pictures):
    task = accuracy.goal_task("smoke")
    (settings,) = task.methods["cross-entropy"]
    settings = {**settings, "pictures": 400, "epochs": 4, "width": 8, "batch": 40, "lr": 0.1}
    found = accuracy.run(Job(task, "cross-entropy", settings, 1, True, "smoke"))
    # a mirrored bar is the same bar, but the views move it to that of a neighbour
    assert found["accuracy"] > 0.3
    assert found["seconds"] > 0


def test_tasks_say_how_many_steps_they_take(monkeypatch):
    made = torch.zeros(30_000, 3, dtype=torch.float64), torch.arange(30_000) % 4, None
    monkeypatch.setattr(accuracy, "table", lambda name: made)
    by_name = {task.name: task for task in accuracy.tasks("cpu")}
    facts = by_name["adult"].facts
    assert (facts["training rows"], facts["validation rows"], facts["test rows"]) == (18_000, 6_000, 6_000)
    assert facts["steps"] == 20 * (18_000 // 256)
    assert facts["classes"] == 4
    assert len(by_name) == 13
    assert accuracy.GOAL in {task.name for task in accuracy.tasks("gpu")}
    for task in by_name.values():
        scales = {method: {s["scale"] for s in grid} for method, grid in task.methods.items()}
        assert {round(3 * value, 4) for value in scales["cross-entropy"]} == scales["EXACT"]
        assert {s["steps"] for grid in task.methods.values() for s in grid} == {task.facts["steps"]}
