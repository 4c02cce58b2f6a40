"""How good multi-label predictions are: F1 scores, exact match, the best threshold, average precision.

Predictions and targets are boolean tensors ``(N, L)``: N rows, L labels. Where a score has nothing to count (no true
and no predicted label) it is 0. Empty input and NaN scores are a ``ValueError``, never a number that looks like one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lossbook._checks import describe

__all__ = ["average_precision", "best_threshold", "exact_match", "macro_f1", "micro_f1"]


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


def best_threshold(scores: Tensor, target: Tensor) -> float:
    """The threshold t for which ``scores > t`` has the greatest micro-F1 on these rows: exact, by sorting.

    Tune it on validation rows. Of several best thresholds it is the greatest. The value is itself one of the scores
    (the greatest that stays out), so that comparing with it never rounds; it is ``-inf`` where every score is in.

    Example:
        >>> best_threshold(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[True, False, False]]))
        2.0
    """
    _check(scores, target, scores=True)
    ranked, order = scores.flatten().sort(descending=True)
    hits = target.flatten()[order].cumsum(0)
    # f1[k]: the k + 1 greatest scores are in. Equal scores go in together, so a cut inside them does not count.
    f1 = 2 * hits.double() / (torch.arange(1, len(ranked) + 1, device=scores.device) + target.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1
    left_out = torch.cat([ranked, ranked.new_tensor([-torch.inf])])
    # The cut before the first score has F1 0: it wins where there is nothing to find.
    best = int(torch.cat([f1.new_zeros(1), f1]).argmax())
    return left_out[best].item()


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
