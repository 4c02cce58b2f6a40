"""The pieces of chapter 1's experiment: its losses, weights, starts, splits, bags of pieces, metrics."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from experiments import multilabel_softmax as experiment
from experiments.harness import SCALES, Job, check
from experiments.multilabel_softmax import (
    EXPERIMENT,
    FORMS,
    KNOBS,
    Form,
    bag,
    bce,
    grid,
    loss_of,
    measure,
    network,
    positive_weight,
    rates,
    run,
    split_rows,
    tasks,
    train_and_measure,
)
from lossbook.focal import sigmoid_focal_loss
from lossbook.models import WORD, text_features
from lossbook.training import predict, seeded

# 3 labels: true in 1, 0 and 4 of 4 rows
TARGETS = torch.tensor([[True, False, True], [False, False, True], [False, False, True], [False, False, True]])


def example(seed=0, rows=5, labels=7, size=3.0):
    generator = torch.Generator().manual_seed(seed)
    scores = size * torch.randn(rows, labels, generator=generator, dtype=torch.float64)
    return scores, torch.rand(rows, labels, generator=generator) < 0.4


def asymmetric_by_loops(scores, target, gamma_neg, clip):
    total = 0.0
    for s_row, t_row in zip(scores.tolist(), target.tolist(), strict=True):
        for s, t in zip(s_row, t_row, strict=True):
            p = 1 / (1 + math.exp(-s))
            q = max(p - clip, 0.0)
            total += -math.log(p) if t else -(q**gamma_neg) * math.log(1 - q)
    return total / len(scores)


def test_bce_is_summed_over_labels_and_averaged_over_rows():
    scores, target = example(2)
    p = torch.sigmoid(scores)
    for weight in (None, torch.tensor([1.0, 2, 3, 4, 5, 6, 7])):
        w = 1.0 if weight is None else weight
        by_hand = -torch.where(target, w * p.log(), (1 - p).log()).sum() / 5
        assert bce(scores, target, weight).item() == pytest.approx(by_hand.item(), rel=1e-9)


def test_weight_of_the_positives():
    assert positive_weight(TARGETS, 3.0).tolist() == [3, 3, 3]
    # 3 negatives to 1 positive; none positive counts as one; no negative
    assert positive_weight(TARGETS, "balanced").tolist() == [3, 4, 0]


def test_each_method_has_its_own_loss():
    scores, target = example(3)
    weighted = -torch.where(target, 10 * F.logsigmoid(scores), F.logsigmoid(-scores)).sum() / 5
    focal = sigmoid_focal_loss(scores, target, gamma=1.0, alpha=0.25, reduction="none").sum() / 5
    rows = zip(scores.tolist(), target.tolist(), strict=True)
    softmax = sum(
        math.log1p(sum(math.exp(s) for s, t in zip(*row, strict=True) if not t))
        + math.log1p(sum(math.exp(-s) for s, t in zip(*row, strict=True) if t))
        for row in rows
    )
    expected = {
        "BCE": ({}, bce(scores, target)),
        "BCE, bias at the base rate": ({"start": "each label"}, bce(scores, target)),
        "weighted BCE": ({"weight": 10.0}, weighted),
        "focal loss": ({"gamma": 1.0, "alpha": 0.25}, focal),
        "asymmetric loss": ({"gamma_neg": 2.0, "clip": 0.05}, asymmetric_by_loops(scores, target, 2.0, 0.05)),
        "multi-label softmax": ({}, softmax / 5),
    }
    assert expected.keys() == KNOBS.keys()
    for method, (settings, value) in expected.items():
        assert loss_of(method, settings, target)(scores, target).item() == pytest.approx(float(value), rel=1e-6), method


def test_validation_rows_are_the_end_of_one_shuffle():
    fit, validation = split_rows(20)
    assert len(validation) == 3
    assert sorted(fit.tolist() + validation.tolist()) == list(range(20))
    assert fit.tolist() != list(range(17))
    torch.manual_seed(5)  # whatever was drawn before
    assert [rows.tolist() for rows in split_rows(20)] == [fit.tolist(), validation.tolist()]


def test_a_bag_has_the_numbers_of_every_word_in_order():
    texts = ["Lost my card", "...", "lost"] + ["a"] * 300 + ["Card?"]  # more than are read at once
    rows = bag(texts, 64, 12)
    for text, row in zip(texts, rows.tolist(), strict=True):
        one_by_one = [text_features([word], buckets=64).flatten().tolist() for word in WORD.findall(text.lower())]
        numbers = [number for word in one_by_one for number in word if number]
        assert row == (numbers + [0] * 12)[:12]
    assert bag(texts[:1], 64, 2).tolist() == rows[:1, :2].tolist()  # the rest is cut off


def test_padding_does_not_change_the_scores_of_a_text():
    form = Form(4, 0.0, 1, 2, buckets=64)
    rows = bag(["Lost my card", "lost"], 64, 12)
    model = network(form, (rows, torch.zeros(2, 3, dtype=torch.bool)))
    assert torch.allclose(predict(model, rows)[1], predict(model, rows[1:, :5])[0])
    assert not torch.allclose(predict(model, rows)[0], predict(model, rows)[1])


def test_the_base_rate_is_the_only_difference_at_the_start():
    form, fit = Form(4, 0.0, 1, 2), (torch.zeros(4, 5), TARGETS)
    states = []
    for start in (None, "each label", "all labels"):
        with seeded(1):
            states.append(network(form, fit, start).state_dict())
    plain, started, in_common = states
    different = {name for name in plain if not plain[name].equal(started[name])}
    assert different == {"3.bias"}
    # with one more row of each kind 2, 1 and 5 of 6 are true; of all labels 5 of 12
    assert started["3.bias"].sigmoid().tolist() == pytest.approx([2 / 6, 1 / 6, 5 / 6])
    assert in_common["3.bias"].sigmoid().tolist() == pytest.approx([5 / 12] * 3)


def test_metrics_at_both_thresholds():
    truth = torch.tensor([[True, False], [True, True]])
    scores = torch.tensor([[1.0, 0.5], [-0.5, -2.0]])
    found = measure(scores, truth, -1.0)
    # above 0: one of two found is true, of three true; above -1: two of three found are true, of three true
    assert found == {
        "micro_f1": pytest.approx(2 * 1 / (2 + 3)),
        "macro_f1": pytest.approx((2 * 1 / (1 + 2) + 0) / 2),
        "exact_match": 0.0,
        "micro_f1_tuned": pytest.approx(2 * 2 / (3 + 3)),
        "macro_f1_tuned": pytest.approx((1 + 0) / 2),
        "exact_match_tuned": 0.0,
        "sigmoid_of_tuned": pytest.approx(1 / (1 + math.e)),
    }
    assert measure(scores, scores > -1, -1.0)["exact_match_tuned"] == 1.0
    assert found.keys() > EXPERIMENT.metrics.keys()


def test_learning_rates():
    assert rates(0.01, 1) == [0.01]
    assert rates(0.01, 3) == [0.0035, 0.01, 0.028]
    for n in (2, 3, 4, 6, 12):
        found = rates(0.01, n)
        assert len(found) == n
        assert found[-1] / found[0] <= 32.5
        assert all(1.3 < b / a < 2.9 for a, b in pairwise(found))


@pytest.mark.parametrize("scale", SCALES)
def test_every_method_is_tuned_alike(scale):
    check(EXPERIMENT, tasks(scale))
    lengths = {len(settings) for task in tasks(scale) for settings in task.methods.values()}
    assert len(lengths) == 1
    for method, knobs in KNOBS.items():
        if scale != "smoke":
            for knob in knobs:
                assert any(knob.items() <= settings.items() for settings in grid(method, 0.01, scale))


@pytest.fixture
def made_tables(monkeypatch):
    """Rows whose labels can be read off their features; the test rows have all labels turned round."""
    features = torch.rand(200, 6, generator=torch.Generator().manual_seed(0)).round()
    targets = features[:, :4] > 0
    splits = (features[:140], targets[:140]), (features[140:], targets[140:]), (features[140:], ~targets[140:])
    monkeypatch.setattr(experiment, "table", lambda name: splits)
    monkeypatch.setitem(FORMS["bibtex"], "smoke", Form(32, 0.0, 40, 20))


@pytest.mark.parametrize("method", KNOBS)
def test_every_method_learns_and_only_final_runs_see_the_test_rows(made_tables, method):
    task = tasks("smoke")[0]
    settings = {**task.methods[method][0], "lr": 0.01}
    tuning = run(Job(task, method, settings, 1, False, "smoke"))
    assert tuning["micro_f1_tuned"] > 0.95
    assert tuning["micro_f1"] > 0.8
    final = run(Job(task, method, settings, 1, True, "smoke"))
    assert final["micro_f1_tuned"] < 0.1


def test_a_run_depends_on_its_seed_alone(made_tables):
    task = tasks("smoke")[0]
    found = []
    for seed, drawn in ((1, 0), (1, 5), (2, 0)):
        torch.rand(drawn)
        found.append(run(Job(task, "BCE", {"lr": 0.001}, seed, False, "smoke")))
    assert found[0] == found[1] != found[2]


def test_the_same_run_in_both_tasks_is_made_once(made_tables, monkeypatch, tmp_path):
    first, _, _, at_zero, *_ = tasks("smoke")
    made = []

    def count(job):
        made.append(job.about())
        return train_and_measure(job)

    monkeypatch.setattr(experiment, "train_and_measure", count)
    found = {}
    for task in (first, at_zero):
        for method, settings, seed, final in (
            ("BCE", {"lr": 0.01}, 1, False),
            ("BCE", {"lr": 0.01}, 1, True),
            ("BCE", {"lr": 0.01}, 2, True),
            ("BCE", {"lr": 0.02}, 1, True),
            ("multi-label softmax", {"lr": 0.01}, 1, True),
        ):
            job = Job(task, method, settings, seed, final, "smoke", kept=tmp_path)
            found[task.name, len(made)] = run(job)
    assert len(made) == 5
    assert [run["task"] for run in made] == [first.name] * 5
    alone = run(Job(at_zero, "multi-label softmax", {"lr": 0.01}, 1, True, "smoke"))
    assert list(found.values())[-1] == alone
    assert alone.keys() == {"micro_f1", "macro_f1", "exact_match"}
