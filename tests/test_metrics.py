"""Metrics against scikit-learn's, and the best threshold against trying them all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as peer

from lossbook import metrics


def example(seed, rows, labels, positive=0.3, levels=None):
    """Scores and a target; with ``levels`` the scores are few numbers, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, labels, generator=generator)
    if levels:
        scores = (scores * levels).round() / levels
    return scores, torch.rand(rows, labels, generator=generator) < positive


CASES = [(0, 20, 5, 0.3), (1, 7, 30, 0.1), (2, 50, 1, 0.5), (3, 4, 6, 0.0), (4, 4, 6, 1.0)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("threshold", [0.0, 9.0, -9.0])
def test_f1_and_exact_match_are_scikit_learns(case, threshold):
    scores, target = example(*case)
    pred = scores > threshold
    for ours, average in ((metrics.micro_f1, "micro"), (metrics.macro_f1, "macro")):
        theirs = peer.f1_score(target.numpy(), pred.numpy(), average=average, zero_division=0)
        # scikit-learn takes a single column for classes 0 and 1
        if case[2] == 1:
            theirs = peer.f1_score(target[:, 0].numpy(), pred[:, 0].numpy(), zero_division=0)
        assert ours(pred, target) == pytest.approx(theirs, abs=1e-12)
    assert metrics.exact_match(pred, target) == pytest.approx((pred == target).all(1).float().mean().item())


def test_exact_match_by_hand():
    target = torch.tensor([[True, False], [True, True], [False, False], [False, True]])
    pred = torch.tensor([[True, False], [True, False], [False, False], [True, False]])
    assert metrics.exact_match(pred, target) == 0.5


@pytest.mark.parametrize("levels", [None, 2, 1])
@pytest.mark.parametrize("case", CASES[:3])
def test_average_precision_is_scikit_learns(case, levels):
    scores, target = example(*case, levels=levels)
    theirs = peer.average_precision_score(target.numpy().ravel(), scores.numpy().ravel())
    assert metrics.average_precision(scores, target) == pytest.approx(theirs, abs=1e-12)


def test_average_precision_with_nothing_to_find():
    assert metrics.average_precision(*example(0, 3, 4, positive=0.0)) == 0.0


def f1_by_loops(scores, target, threshold):
    hits = predicted = true = 0
    for s, t in zip(scores.flatten().tolist(), target.flatten().tolist(), strict=True):
        hits += s > threshold and t
        predicted += s > threshold
        true += t
    return 2 * hits / (predicted + true) if predicted + true else 0.0


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 6),
    labels=st.integers(1, 6),
    positive=st.floats(0, 1),
    levels=st.sampled_from([None, 1, 3]),
)
def test_no_threshold_is_better(seed, rows, labels, positive, levels):
    scores, target = example(seed, rows, labels, positive, levels)
    best = metrics.best_threshold(scores, target)
    cuts = [float("-inf"), *scores.flatten().tolist()]
    by_cut = {cut: f1_by_loops(scores, target, cut) for cut in cuts}
    greatest = max(cut for cut, value in by_cut.items() if value >= max(by_cut.values()) - 1e-12)
    assert best == greatest
    assert metrics.micro_f1(scores > best, target) == pytest.approx(max(by_cut.values()), abs=1e-12)


def test_threshold_may_let_everything_in():
    scores, target = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, True]])
    assert metrics.best_threshold(scores, target) == float("-inf")


@pytest.mark.parametrize("metric", [metrics.micro_f1, metrics.macro_f1, metrics.exact_match])
@pytest.mark.parametrize(
    ("pred", "target"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)),
        (torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3, 2, dtype=torch.bool)),
    ],
)
def test_predictions_must_be_boolean_and_fit(metric, pred, target):
    with pytest.raises(ValueError, match=r"expected boolean predictions and a boolean target of one shape, got .*\("):
        metric(pred, target)


@pytest.mark.parametrize("metric", [metrics.best_threshold, metrics.average_precision])
def test_scores_must_be_real(metric):
    boolean = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected real-valued scores and a boolean target"):
        metric(boolean, boolean)


@pytest.mark.parametrize("name", ["micro_f1", "macro_f1", "exact_match", "best_threshold", "average_precision"])
def test_empty_input_is_an_error(name):
    scores, target = example(0, 3, 4)
    pred = scores if name in ("best_threshold", "average_precision") else scores > 0
    for part in (slice(0, 0), (slice(None), slice(0, 0))):
        with pytest.raises(ValueError, match="expected at least one row and one label"):
            getattr(metrics, name)(pred[part], target[part])


@pytest.mark.parametrize("name", ["best_threshold", "average_precision"])
def test_nan_scores_are_an_error(name):
    scores, target = example(0, 3, 4)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="scores must not be NaN, 1 of 12 are"):
        getattr(metrics, name)(scores, target)
