"""How good multi-label predictions are, what threshold and scale their scores need, and how sure a difference is.

Predictions and targets are boolean tensors ``(N, L)``: N rows, L labels. Where a score has nothing to count (no true
and no predicted label) it is 0. Empty input and NaN scores are a ``ValueError``, never a number that looks like one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lossbook._checks import check_flag, check_integer, check_number, describe

__all__ = [
    "PairedDifference",
    "ScoreScale",
    "average_precision",
    "best_threshold",
    "calibration_error",
    "exact_match",
    "fit_scale",
    "macro_f1",
    "micro_f1",
    "paired_difference",
]


def _check(pred: Tensor, target: Tensor, *, scores: bool = False) -> None:
    """Raise unless ``target`` is boolean and ``pred`` fits it: boolean too, or real-valued with ``scores``."""
    fits = pred.is_floating_point() if scores else pred.dtype == torch.bool
    if not fits or target.dtype != torch.bool or pred.shape != target.shape:
        raise ValueError(
            f"expected {'real-valued scores' if scores else 'boolean predictions'} and a boolean target of one shape, "
            f"got {describe(pred)} and {describe(target)}"
        )
    if target.numel() == 0:
        raise ValueError(f"expected at least one row and one label, got {describe(target)}")
    if scores and bool(pred.isnan().any()):
        raise ValueError(f"scores must not be NaN, {int(pred.isnan().sum())} of {pred.numel()} are")


def _f1_per_label(pred: Tensor, target: Tensor) -> Tensor:
    """``2 TP / (predicted + true)`` of each column, 0 where both are empty."""
    hits = (pred & target).sum(0)
    counted = pred.sum(0) + target.sum(0)
    return 2 * hits.double() / counted.clamp(min=1)


def micro_f1(pred: Tensor, target: Tensor) -> float:
    """F1 over all labels thrown together: ``2 TP / (predicted + true)``.

    Example:
        >>> micro_f1(torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])).__round__(4)
        0.6667
    """
    _check(pred, target)
    return _f1_per_label(pred.reshape(-1, 1), target.reshape(-1, 1)).item()


def macro_f1(pred: Tensor, target: Tensor) -> float:
    """The mean over labels of each label's F1, so rare labels count as much as frequent ones."""
    _check(pred, target)
    return _f1_per_label(pred, target).mean().item()


def exact_match(pred: Tensor, target: Tensor) -> float:
    """The share of rows with every label right."""
    _check(pred, target)
    return (pred == target).all(-1).double().mean().item()


@overload
def best_threshold(scores: Tensor, target: Tensor, *, per_label: Literal[False] = False) -> float: ...
@overload
def best_threshold(scores: Tensor, target: Tensor, *, per_label: Literal[True]) -> Tensor: ...
def best_threshold(scores: Tensor, target: Tensor, *, per_label: bool = False) -> float | Tensor:
    """The threshold t for which ``scores > t`` has the greatest micro-F1 on these rows: exact, by sorting.

    Tune it on validation rows. Of several best thresholds it is the greatest. The value is itself one of the scores
    (the greatest that stays out), so that comparing with it never rounds; it is ``-inf`` where every score is in.

    With ``per_label`` each label has a threshold of its own, which gives the greatest macro-F1: a tensor ``(L,)`` of
    the scores' dtype. It is ``inf`` for a label that is never true here, so that this label is never predicted. A label
    with few true rows gets a threshold that may not fit other rows; see whether it helps on rows not tuned on.

    Example:
        >>> scores, target = torch.tensor([[3.0, 9.0], [2.0, 8.0]]), torch.tensor([[True, True], [False, True]])
        >>> best_threshold(scores, target)
        2.0
        >>> best_threshold(scores, target, per_label=True)
        tensor([2., -inf])
    """
    _check(scores, target, scores=True)
    if not check_flag("per_label", per_label):
        return _thresholds(scores.reshape(1, -1), target.reshape(1, -1)).item()
    if scores.dim() != 2:
        raise ValueError(f"per_label needs scores and a target of shape (N, L), got {describe(scores)}")
    return _thresholds(scores.T, target.T).masked_fill(~target.any(0), torch.inf)


def _thresholds(scores: Tensor, target: Tensor) -> Tensor:
    """The best threshold of each row."""
    ranked, order = scores.sort(descending=True)
    hits = target.gather(1, order).cumsum(1)
    # f1[k]: the k + 1 greatest scores are in. Equal scores go in together, so a cut inside them does not count.
    size = torch.arange(1, ranked.shape[1] + 1, device=scores.device)
    f1 = 2 * hits.double() / (size + target.sum(1, keepdim=True))
    f1[:, :-1].masked_fill_(ranked[:, :-1] == ranked[:, 1:], -1)
    left_out = torch.nn.functional.pad(ranked, (0, 1), value=-torch.inf)
    # The cut before the first score has F1 0: it wins where there is nothing to find.
    best = torch.nn.functional.pad(f1, (1, 0)).argmax(1, keepdim=True)
    return left_out.gather(1, best).squeeze(1)


def average_precision(scores: Tensor, target: Tensor) -> float:
    """The area under the precision-recall curve of all labels thrown together, as a sum of steps.

    Needs no threshold: the mean over the true labels of the precision among the scores at least as great.
    """
    _check(scores, target, scores=True)
    ranked, order = scores.flatten().sort(descending=True)
    found = target.flatten()[order]
    hits = found.cumsum(0)
    # A tie is counted as far as its last member.
    last = torch.searchsorted(-ranked, -ranked, right=True) - 1
    precision = hits[last].double() / (last + 1)
    return (precision * found).sum().item() / max(int(found.sum()), 1)


def calibration_error(p: Tensor, target: Tensor, *, bins: int = 15) -> float:
    r"""The expected calibration error: how far probabilities are from the shares of what came true.

    All decisions, one per row and label, are sorted by their probability and cut into ``bins`` pieces :math:`B` of
    equal size, up to one. The error is the mean distance of a piece's mean probability from its share of true labels,
    weighted by size:

    .. math:: \sum_B \frac{|B|}{n} \, \bigl| \overline{p}_B - \overline{y}_B \bigr|
        = \frac1n \sum_B \Bigl| \sum_{i \in B} (p_i - y_i) \Bigr| .

    It is 0 at best and 1 at worst. Even exact probabilities have an error above 0, by chance, and the more so the fewer
    the decisions. Equal probabilities stay in the order of their rows. For classes, judge the class that is chosen:
    ``calibration_error(p.amax(-1), p.argmax(-1) == y)``.

    Args:
        p: Probabilities of any shape, in [0, 1].
        target: What came true, boolean, of the same shape.
        bins: The number of pieces.

    Example:
        >>> p = torch.tensor([[0.25, 0.75], [0.25, 0.75]])
        >>> calibration_error(p, torch.tensor([[False, True], [True, True]]), bins=2)
        0.25

    Source: Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning" (2015).
    """
    _check(p, target, scores=True)
    low, high = (float(bound) for bound in p.aminmax())
    if low < 0 or high > 1:
        raise ValueError(f"p must be probabilities in [0, 1], got values from {low:g} to {high:g}")
    ranked, order = p.double().flatten().sort(stable=True)
    gaps = ranked - target.flatten()[order].double()
    pieces = gaps.tensor_split(check_integer("bins", bins, low=1))
    return sum(abs(piece.sum().item()) for piece in pieces) / len(gaps)


@dataclass(frozen=True)
class ScoreScale:
    """The factor of scores that makes their sigmoid a probability, and what it gained.

    Attributes:
        factor: The factor k: ``torch.sigmoid(k * scores)`` is the probability.
        before: The :func:`calibration_error` with the factor 1, on the rows that the factor was fitted to.
        after: The same with the factor k.
    """

    factor: float
    before: float
    after: float

    def probabilities(self, scores: Tensor) -> Tensor:
        """``torch.sigmoid(factor * scores)``, of the same shape and dtype."""
        return torch.sigmoid(self.factor * scores)


def fit_scale(scores: Tensor, target: Tensor) -> ScoreScale:
    r"""The factor k > 0 for which :math:`\sigma(k s)` has the smallest log loss on these rows.

    The log loss is :math:`\sum \log(1 + e^{-k a})` over all decisions, with :math:`a = s` where the label is true and
    :math:`a = -s` where not. It is convex in k, so Newton's method, kept between bounds, finds the one minimum, in
    float64. Fit it on validation rows: on training rows the factor comes out too large. The order of the scores stays,
    and so does what ``scores > 0`` predicts. 1 / k is known as the temperature.

    Args:
        scores: Real numbers of any shape.
        target: What came true, boolean, of the same shape.

    Raises:
        ValueError: There is no best factor above 0: all scores have the sign of their labels (the greater, the better),
            or the scores fit their labels no better than with the other sign (0 would be best).

    Example:
        >>> scores = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
        >>> fit_scale(scores, torch.tensor([[True, True], [True, False]])).factor.__round__(4)  # sigmoid(k) = 3 / 4
        1.0986

    Source: Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks" (2017).
    """
    _check(scores, target, scores=True)
    if not bool(scores.isfinite().all()):
        raise ValueError(f"scores must be finite, {int((~scores.isfinite()).sum())} of {scores.numel()} are not")
    wide = scores.detach().double()
    unit = wide.abs().amax().clamp(min=torch.finfo(torch.double).tiny)
    right = torch.where(target, wide, -wide).flatten() / unit
    if right.amin() >= 0 and right.amax() > 0:
        raise ValueError(
            "all scores have the sign of their labels, so no factor is the best; take more validation rows"
        )
    if right.sum() <= 0:
        raise ValueError("the scores fit their labels no better than with the other sign, so no factor above 0 is best")
    factor = _best_factor(right) / unit.item()
    before, after = (calibration_error(torch.sigmoid(k * wide), target) for k in (1.0, factor))
    return ScoreScale(factor, before, after)


def _best_factor(right: Tensor) -> float:
    """The k > 0 with the smallest sum of log(1 + exp(-k right)), by Newton's method, halving where it leaves bounds."""

    def slope(k: float) -> float:
        return -(right * torch.sigmoid(-k * right)).sum().item()

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    k = high
    for _ in range(100):
        falling = slope(k)
        low, high = (k, high) if falling < 0 else (low, k)
        bend = (right.square() * torch.sigmoid(k * right) * torch.sigmoid(-k * right)).sum().item()
        step = falling / bend if bend > 0 else math.inf
        if abs(step) <= 1e-8 * k:
            return k - step  # what it leaves is about its square
        k = k - step if low < k - step < high else (low + high) / 2
    return k


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference and its 95 % interval, ``mean - half_width`` to ``mean + half_width``.

    Attributes:
        mean: The mean of a - b.
        half_width: Half the interval's width. NaN for a single pair.
        n: How many pairs.
    """

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean + self.half_width

    def __format__(self, spec: str) -> str:
        spec = spec or "+.3g"
        return f"{self.mean:{spec}} ± {self.half_width:{spec.lstrip('+')}}"

    def __str__(self) -> str:
        return format(self)


def paired_difference(
    a: Iterable[float], b: Iterable[float], *, test_share: float | None = None, train_share: float | None = None
) -> PairedDifference:
    r"""How much better one method is than another over the same seeds: the mean of a - b and its 95 % interval.

    The interval is Student's, with the sample standard deviation D of the n differences and the 97.5 % quantile t for
    n - 1 degrees of freedom:

    .. math:: \overline{a - b} \pm t \, D \, \sqrt{\frac1n + \frac{\text{test rows}}{\text{training rows}}} ,

    where the second fraction is 0 unless ``test_share`` is given. Give it if each seed drew its own test rows from the
    same data: such splits share rows, so the differences are not independent, and without the fraction the interval is
    too narrow.

    Args:
        a: One value a seed.
        b: The values of the other method, in the same order of seeds.
        test_share: The share of the rows that a split tests on, if the splits are drawn from the same rows.
        train_share: The share that it trains on, ``1 - test_share`` if None.

    Returns:
        The difference. Where a value is not finite, mean and half width are NaN.

    Raises:
        ValueError: There is no value, or the numbers of values differ, or a share is no share.
        TypeError: ``a`` or ``b`` holds no numbers, or is a mapping, which has no order of seeds.

    Example:
        >>> print(paired_difference([0.61, 0.66, 0.64], [0.60, 0.63, 0.62]))
        +0.02 ± 0.0248
        >>> print(paired_difference([0.61, 0.66, 0.64], [0.60, 0.63, 0.62], test_share=0.25))
        +0.02 ± 0.0351

    Source: Nadeau and Bengio, "Inference for the generalization error" (2003).
    """
    first, second = _values("a", a), _values("b", b)
    n = len(first)
    if n != len(second) or not n:
        raise ValueError(f"a and b must have one value a seed, at least one, got {n} and {len(second)}")
    shared = _shared(test_share, train_share)
    differences = [x - y for x, y in zip(first, second, strict=True)]
    if n == 1 or not all(map(math.isfinite, differences)):
        return PairedDifference(differences[0] if n == 1 else math.nan, math.nan, n)
    half_width = _student(n - 1) * statistics.stdev(differences) * math.sqrt(1 / n + shared)
    return PairedDifference(statistics.fmean(differences), half_width, n)


def _values(name: str, values: Any) -> list[float]:
    """One value a seed as floats."""
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of numbers, one a seed, got {describe(values)}")
    return [float(value) for value in values]


def _shared(test: float | None, train: float | None) -> float:
    """Test rows per training row, 0 where the splits share none."""
    if test is None:
        if train is not None:
            raise ValueError("train_share needs test_share")
        return 0.0
    tested = check_number("test_share", test, low=0, high=1, open_low=True, open_high=True)
    if train is None:
        return tested / (1 - tested)
    trained = check_number("train_share", train, low=0, high=1, open_low=True)
    if tested + trained > 1 + 1e-9:
        raise ValueError(f"test_share and train_share must add up to at most 1, got {tested:g} and {trained:g}")
    return tested / trained


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution: t = sqrt(freedom) tan(angle), by halving the angle's interval.

    Source: the share of the distribution within -t and t is 26.7.3 and 26.7.4 of Abramowitz and Stegun.
    """
    odd = freedom % 2

    def within(angle: float) -> float:
        term, total = math.cos(angle) if odd else 1.0, 0.0
        for power in range(odd, freedom - 1, 2):
            total += term
            term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
        inner = math.sin(angle) * total
        return 2 / math.pi * (angle + inner) if odd else inner

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return math.sqrt(freedom) * math.tan(low)
