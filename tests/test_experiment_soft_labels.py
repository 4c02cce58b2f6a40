"""The pieces of the experiment on soft labels: its noise, its two judges of a probability, its objective."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments import soft_labels as experiment
from lossbook.metrics import calibration_error, fit_scale, micro_f1
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.training import predict, seeded, train


def drawn(seed, rows=40, labels=6, positive=0.3):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, labels, generator=generator),
        torch.rand(rows, labels, generator=generator) < positive,
    )


@pytest.mark.parametrize("loss", list(experiment.LOSSES))
def test_losses_are_sums_over_labels_and_means_over_rows(loss):
    scores, target = drawn(0)
    rows = [experiment.LOSSES[loss](scores[i : i + 1], target[i : i + 1]).item() for i in range(len(scores))]
    assert experiment.LOSSES[loss](scores, target).item() == pytest.approx(sum(rows) / len(rows), rel=1e-5)
    one = experiment.LOSSES[loss](torch.tensor([[1.5]]), torch.tensor([[True]])).item()
    assert one == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-5)


def test_noise_keeps_the_number_of_labels_of_a_row():
    target = drawn(1, rows=4000, labels=9)[1]
    noisy = experiment.replace_positives(target, 0.2, torch.Generator().manual_seed(0))
    assert noisy.dtype == torch.bool
    assert torch.equal(noisy.sum(1), target.sum(1))
    lost = (target & ~noisy).sum() / target.sum()
    # rows with few free labels lose fewer; 3 standard deviations are about 0.012
    assert abs(lost.item() - 0.2) < 0.015


def test_what_comes_in_is_drawn_evenly_from_what_the_row_has_not():
    target = torch.tensor([[True, False, False, False, True]]).repeat(9000, 1)
    noisy = experiment.replace_positives(target, 0.5, torch.Generator().manual_seed(1))
    came = (noisy & ~target).sum(0)
    assert came[[0, 4]].tolist() == [0, 0]
    assert came[1:4].sum() == (target & ~noisy).sum()
    assert ((came[1:4] - came[1:4].float().mean()).abs() < 0.05 * came[1]).all()


def test_noise_at_its_ends():
    target = drawn(2)[1]
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(experiment.replace_positives(target, 0.0, generator), target)
    full = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    noisy = experiment.replace_positives(full, 1.0, generator)
    assert noisy[0].tolist() == [True, True, True]  # nothing can come in
    assert noisy[1].tolist() == [False, True, True]  # one only
    assert noisy[2].tolist() == [False, False, False]
    apart = torch.tensor([[True, False], [False, True]])
    assert torch.equal(experiment.replace_positives(apart, 1.0, generator), ~apart)


def test_brier_by_hand():
    p = torch.tensor([[0.9, 0.2], [0.5, 0.0]])
    truth = torch.tensor([[True, False], [True, False]])
    assert experiment.brier(p, truth) == pytest.approx((0.01 + 0.04 + 0.25) / 4)


def test_measures():
    validation, test = drawn(7, rows=60), drawn(8, rows=50)
    validation = validation[0] + validation[1], validation[1]  # scores that know something have a factor
    scores, truth = test
    shares, given = validation[1].double().mean(0), drawn(9, rows=50)[1]
    found = experiment.measures(validation, test, given, shares)
    assert found.keys() == experiment.EXPERIMENT.metrics.keys()
    assert found["micro_f1"] == micro_f1(scores > 0, truth)
    cuts = [(micro_f1(validation[0] > cut, validation[1]), cut) for cut in validation[0].flatten().tolist()]
    assert found["micro_f1_tuned"] == micro_f1(scores > max(cuts)[1], truth)
    kappa = fit_scale(*validation).factor
    for name, p in (
        ("s", 1 / (1 + (-scores).exp())),
        ("2s", 1 / (1 + (-2 * scores).exp())),
        ("fitted", 1 / (1 + (-kappa * scores).exp())),
        ("shares", shares.repeat(50, 1)),
    ):
        assert found[f"brier_{name}"] == pytest.approx(((p - given.float()) ** 2).mean().item(), rel=1e-5)
        assert found[f"calibration_{name}"] == pytest.approx(calibration_error(p, given), abs=1e-6)


def test_the_net_stops_before_its_head_in_training():
    with seeded(0):
        model = experiment.Net(nn.Linear(4, 3), 3, 5, 2)
    x = torch.ones(7, 4)
    vectors = model.train()(x)
    assert torch.equal(vectors, model.encoder(x))
    model.eval()
    assert torch.equal(model(x), model.head(vectors))
    assert predict(model, x).shape == (7, 2)


@pytest.mark.parametrize("loss", ["BCE", "multi-label softmax"])
def test_objective_by_hand(loss):
    with seeded(0):
        model = experiment.Net(nn.Identity(), 4, 5, 3).eval()  # no dropout
    x, t = drawn(9, labels=4)[0], drawn(10, labels=3)[1]

    def value(end, settings):
        return experiment.objective(model, loss + end, settings, seed=1)(x, t).item()

    def plain(x, t):
        scores = model.head(x)
        if loss == "BCE":
            return F.binary_cross_entropy_with_logits(scores, t.float(), reduction="none").sum(1).mean().item()
        return multilabel_softmax_loss(scores, t).item()

    hard = plain(x, t)
    assert value("", {"decay": 0.0}) == pytest.approx(hard, rel=1e-5)
    norm = sum((w.detach() ** 2).sum().item() for w in model.head.parameters())
    assert value("", {"decay": 0.2}) == pytest.approx(hard + 0.1 * norm, rel=1e-5)
    assert value(", smoothing", {"smoothing": 0.2}) == pytest.approx(plain(x, 0.1 + 0.8 * t.float()), rel=1e-5)
    generator = torch.Generator().manual_seed(1)
    mixed_x, mixed_t, lam = experiment.mixup(x, t, alpha=1.0, generator=generator)
    assert 0.01 < lam < 0.99
    assert value(", mixup", {"alpha": 1.0}) == pytest.approx(plain(mixed_x, mixed_t), rel=1e-5)


def test_all_methods_get_the_same_batches_and_dropout():
    """What mixup draws must not change them: the inputs that the encoder sees, and torch's generator after training."""
    seen = {}
    for method, settings in (("BCE", {}), ("BCE, mixup", {"alpha": 1.0}), ("BCE, smoothing", {"smoothing": 0.1})):
        with seeded(0):
            model = experiment.Net(nn.Identity(), 4, 5, 3)
        inputs, masks = [], []
        model.encoder.register_forward_hook(lambda _, x, y, kept=inputs: kept.append(x[0].clone()))
        model.head[2].register_forward_hook(
            lambda _, x, y, kept=masks: kept.append(torch.where(x[0] != 0, y == 0, False))
        )
        data = drawn(11, labels=4)[0], drawn(12, labels=3)[1]
        step = experiment.objective(model, method, settings, seed=1)
        train(model, step, data, epochs=2, batch_size=16, seed=4, device="cpu")
        seen[method] = torch.cat(inputs)
        assert all(mask.any() for mask in masks)
    assert len(seen["BCE"]) == 80
    assert all(torch.equal(x, seen["BCE"]) for x in seen.values())


def test_long_words_are_cut():
    assert experiment.shortened(["a" * 18 + " b", "x" + "a" * 30 + " it's fine"]) == [
        "a" * 18 + " b",
        "x" + "a" * 17 + " it's fine",
    ]


@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
def test_tasks_are_fair(scale):
    made = experiment.tasks(scale)
    assert [task.name for task in made] == ["yeast", "yeast, noise", "GoEmotions", "GoEmotions, noise"]
    for task in made:
        assert list(task.methods) == [loss + end for loss in experiment.LOSSES for end in experiment.TREATMENTS]
        assert len({len(grid) for grid in task.methods.values()}) == 1
        rates = {tuple(settings["lr"] for settings in grid) for grid in task.methods.values()}
        assert len(rates) == 1
        for method, grid in task.methods.items():
            knob = experiment.TREATMENTS[method.removeprefix("BCE").removeprefix("multi-label softmax")]
            assert all(settings.keys() == {"lr", knob} for settings in grid)


def test_draw_is_fixed():
    assert torch.equal(experiment.draw(50, 20), experiment.draw(50, None)[:20])
    assert sorted(experiment.draw(50, None).tolist()) == list(range(50))
