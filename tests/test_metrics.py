"""Metrics against scikit-learn's, the best threshold and factor against trying them all, intervals against SciPy's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit
from scipy.stats import ttest_rel
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


@pytest.mark.parametrize(
    "metric", [metrics.best_threshold, metrics.average_precision, metrics.calibration_error, metrics.fit_scale]
)
def test_scores_must_be_real(metric):
    boolean = torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected real-valued scores and a boolean target"):
        metric(boolean, boolean)


SCORED = ("best_threshold", "average_precision", "calibration_error", "fit_scale")


@pytest.mark.parametrize("name", ["micro_f1", "macro_f1", "exact_match", *SCORED])
def test_empty_input_is_an_error(name):
    scores, target = example(0, 3, 4)
    pred = scores if name in SCORED else scores > 0
    for part in (slice(0, 0), (slice(None), slice(0, 0))):
        with pytest.raises(ValueError, match="expected at least one row and one label"):
            getattr(metrics, name)(pred[part], target[part])


@pytest.mark.parametrize("name", SCORED)
def test_nan_scores_are_an_error(name):
    scores, target = example(0, 3, 4)
    scores[1, 2] = float("nan")
    with pytest.raises(ValueError, match="scores must not be NaN, 1 of 12 are"):
        getattr(metrics, name)(scores, target)


# ------------------------------------------------------------------------------------------------ thresholds per label


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 8),
    labels=st.integers(1, 5),
    positive=st.floats(0, 1),
    levels=st.sampled_from([None, 1, 3]),
)
def test_per_label_is_the_threshold_of_each_column(seed, rows, labels, positive, levels):
    scores, target = example(seed, rows, labels, positive, levels)
    found = metrics.best_threshold(scores, target, per_label=True)
    assert found.shape == (labels,)
    assert found.dtype == scores.dtype
    for j in range(labels):
        alone = metrics.best_threshold(scores[:, j], target[:, j])
        assert found[j].item() == (alone if target[:, j].any() else math.inf)
    one = metrics.best_threshold(scores, target)
    assert metrics.macro_f1(scores > found, target) >= metrics.macro_f1(scores > one, target) - 1e-12


def test_a_label_that_is_never_true_is_never_predicted():
    scores, target = torch.tensor([[1.0, 5.0], [0.0, 9.0]]), torch.tensor([[True, False], [False, False]])
    found = metrics.best_threshold(scores, target, per_label=True)
    assert found.tolist() == [0.0, math.inf]
    assert (torch.tensor([[2.0, 1e30]]) > found).tolist() == [[True, False]]


def test_per_label_needs_a_flag_and_labels():
    scores, target = example(0, 4, 3)
    with pytest.raises(ValueError, match=r"per_label needs scores and a target of shape \(N, L\), got float32"):
        metrics.best_threshold(scores[:, 0], target[:, 0], per_label=True)
    with pytest.raises(TypeError, match="per_label must be True or False, got int 1"):
        metrics.best_threshold(scores, target, per_label=1)


# --------------------------------------------------------------------------------------------------------- calibration


def calibration_by_loops(p, target, bins):
    pairs = sorted(zip(p.double().flatten().tolist(), target.flatten().tolist(), strict=True), key=lambda pair: pair[0])
    size, more = divmod(len(pairs), bins)
    total, start = 0.0, 0
    for k in range(bins):
        end = start + size + (k < more)
        total += abs(sum(p - t for p, t in pairs[start:end]))
        start = end
    return total / len(pairs)


@pytest.mark.parametrize("bins", [1, 4, 15, 500])
@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("case", CASES)
def test_calibration_error_is_the_sum_by_loops(case, levels, bins):
    scores, target = example(*case, levels=levels)
    p = scores.sigmoid()
    assert metrics.calibration_error(p, target, bins=bins) == pytest.approx(calibration_by_loops(p, target, bins))


def test_calibration_error_by_hand():
    target = torch.tensor([True, False, True, True])
    assert metrics.calibration_error(target.double(), target) == 0.0
    assert metrics.calibration_error((~target).double(), target) == 1.0
    # pieces 0.2, 0.4 with shares 0, 1 and 0.6, 0.8 with shares 1, 1: (|0.6 - 1| + |1.4 - 2|) / 4
    p = torch.tensor([0.6, 0.2, 0.4, 0.8], dtype=torch.double)
    assert metrics.calibration_error(p, target, bins=2) == pytest.approx(0.25)


def test_probabilities_are_in_0_and_1():
    target = torch.tensor([True, False])
    with pytest.raises(ValueError, match=r"p must be probabilities in \[0, 1\], got values from -0.5 to 1"):
        metrics.calibration_error(torch.tensor([1.0, -0.5]), target)
    with pytest.raises(ValueError, match="scores must not be NaN"):
        metrics.calibration_error(torch.tensor([1.0, math.nan]), target)
    with pytest.raises(ValueError, match="bins must be at least 1, got 0"):
        metrics.calibration_error(torch.tensor([1.0, 0.5]), target, bins=0)


# --------------------------------------------------------------------------------------------------------------- scale


def log_loss(factor, scores, target):
    signed = [s if t else -s for s, t in zip(scores.flatten().tolist(), target.flatten().tolist(), strict=True)]
    return math.fsum(max(-factor * a, 0) + math.log1p(math.exp(-abs(factor * a))) for a in signed)


@pytest.mark.parametrize("true_factor", [0.2, 1.0, 2.5])
@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
def test_no_factor_of_a_fine_grid_is_better(true_factor, unit):
    scores, _ = example(4, 60, 5)
    target = torch.rand(60, 5, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(true_factor * scores)
    fitted = metrics.fit_scale(scores.double() * unit, target)
    grid = [0.001 * k for k in range(1, 4000)]
    best = min(grid, key=lambda factor: log_loss(factor, scores, target))
    assert fitted.factor * unit == pytest.approx(best, abs=0.001)
    for away in (1 - 1e-4, 1 + 1e-4):
        by = [log_loss(factor * fitted.factor, scores.double() * unit, target) for factor in (1.0, away)]
        assert by[0] < by[1]


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 20), power=st.integers(1, 9))
def test_the_slope_of_the_log_loss_is_0_at_the_factor(seed, rows, power):
    scores, target = example(seed, rows, 2)
    scores = scores.double() * scores.double().abs() ** (
        power - 1
    )  # far apart, so that Newton's steps leave the bounds
    right = torch.where(target, scores, -scores)
    if right.amin() >= 0 or right.sum() <= 0:
        with pytest.raises(ValueError, match="no factor"):
            metrics.fit_scale(scores, target)
    else:
        factor = metrics.fit_scale(scores, target).factor
        pull = right * torch.sigmoid(-factor * right)
        assert factor > 0
        assert pull.sum().item() == pytest.approx(0, abs=1e-10 * pull.abs().sum().item())


def test_the_scale_knows_its_calibration_error_and_gives_probabilities():
    scores = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    target = torch.rand(400, 5, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(3 * scores)
    fitted = metrics.fit_scale(scores, target)
    assert fitted.factor == pytest.approx(3, abs=0.3)
    assert fitted.before == metrics.calibration_error(scores.double().sigmoid(), target)
    assert fitted.after == metrics.calibration_error(fitted.probabilities(scores.double()), target)
    assert fitted.after < 0.2 * fitted.before
    assert fitted.probabilities(scores).dtype == torch.float32
    assert torch.equal(fitted.probabilities(scores) > 0.5, scores > 0)


@pytest.mark.parametrize(
    ("scores", "target", "message"),
    [
        ([2.0, -1.0], [True, False], "all scores have the sign of their labels"),
        ([-2.0, 0.0], [False, False], "all scores have the sign of their labels"),
        ([-2.0, 1.0], [True, False], "no better than with the other sign"),
        ([3.0, 3.0], [True, False], "no better than with the other sign"),
        ([0.0, 0.0], [True, False], "no better than with the other sign"),
        ([math.inf, 0.0], [True, False], "scores must be finite, 1 of 2 are not"),
        ([math.nan, 0.0], [True, False], "scores must not be NaN"),
    ],
)
def test_no_best_factor(scores, target, message):
    with pytest.raises(ValueError, match=message):
        metrics.fit_scale(torch.tensor(scores), torch.tensor(target))


def test_one_class_has_a_factor_where_the_signs_differ():
    """log(1 + e^-2k) + log(1 + e^k) has its minimum where 2 sigmoid(-2k) = sigmoid(k)."""
    factor = metrics.fit_scale(torch.tensor([-2.0, 1.0]), torch.tensor([False, False])).factor
    assert 2 / (1 + math.exp(2 * factor)) == pytest.approx(1 / (1 + math.exp(-factor)))


# -------------------------------------------------------------------------------------------------- paired differences

A, B = [0.61, 0.66, 0.64, 0.70, 0.62], [0.60, 0.63, 0.66, 0.63, 0.61]


def test_student_is_scipys():
    for freedom in (*range(1, 40), 99, 100, 1001):
        assert metrics._student(freedom) == pytest.approx(stdtrit(freedom, 0.975), rel=1e-11)


def test_the_interval_is_that_of_the_paired_t_test():
    found = metrics.paired_difference(A, B)
    low, high = ttest_rel(A, B).confidence_interval(0.95)
    assert (found.low, found.high, found.n) == (pytest.approx(low), pytest.approx(high), 5)
    assert found.mean == pytest.approx((found.low + found.high) / 2)
    assert metrics.paired_difference(torch.tensor(A, dtype=torch.double), tuple(B)) == found


@pytest.mark.parametrize(
    ("shares", "fraction"),
    [
        ({"test_share": 0.25}, 1 / 3),
        ({"test_share": 0.25, "train_share": 0.5}, 1 / 2),
        ({"test_share": 0.1, "train_share": 0.9}, 1 / 9),
    ],
)
def test_splits_that_share_rows_widen_the_interval(shares, fraction):
    plain, corrected = metrics.paired_difference(A, B), metrics.paired_difference(A, B, **shares)
    assert corrected.mean == plain.mean
    assert (corrected.half_width / plain.half_width) ** 2 == pytest.approx((1 / 5 + fraction) / (1 / 5))


def test_differences_without_an_interval():
    one = metrics.paired_difference([0.5], [0.25])
    assert (one.mean, one.n) == (0.25, 1)
    assert math.isnan(one.half_width)
    diverged = metrics.paired_difference([0.5, math.nan], [0.25, 0.5])
    assert math.isnan(diverged.mean)
    assert math.isnan(diverged.half_width)


def test_how_a_difference_is_written():
    found = metrics.PairedDifference(0.0123, 0.004, 5)
    assert str(found) == f"{found}" == "+0.0123 ± 0.004"
    assert f"{found:+.1%}" == "+1.2% ± 0.4%"


@pytest.mark.parametrize(
    ("a", "b", "shares", "error", "message"),
    [
        ([], [], {}, ValueError, "one value a seed, at least one, got 0 and 0"),
        ([1.0], [1.0, 2.0], {}, ValueError, "one value a seed, at least one, got 1 and 2"),
        ({1: 0.5}, {1: 0.25}, {}, TypeError, "a must be a sequence of numbers, one a seed, got dict"),
        ([0.5], 0.25, {}, TypeError, "b must be a sequence of numbers, one a seed, got float 0.25"),
        (A, B, {"test_share": 0}, ValueError, "test_share must be a finite number > 0 and < 1, got 0"),
        (A, B, {"test_share": 1.0}, ValueError, "test_share must be a finite number > 0 and < 1, got 1"),
        (A, B, {"train_share": 0.5}, ValueError, "train_share needs test_share"),
        (A, B, {"test_share": 0.6, "train_share": 0.5}, ValueError, "must add up to at most 1, got 0.6 and 0.5"),
    ],
)
def test_what_is_no_pair_of_methods(a, b, shares, error, message):
    with pytest.raises(error, match=message):
        metrics.paired_difference(a, b, **shares)
