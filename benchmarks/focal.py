"""Focal and truncated losses. The plain sigmoid focal loss is torchvision's, at the size of a dense detector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import CLASSES, Case, Peer, class_scores, main, written

LABELS = (("small", (64, 80)), ("middle", (4096, 80)), ("large", (100_000, 80)))
DETECTOR = (*LABELS[:2], ("large", (400_000, 80)))
GAMMA, ALPHA, MARGIN, CLIP = 2.0, 0.25, 0.5, 0.05


def anchors(rows: int, labels: int) -> tuple[Tensor, Tensor]:
    """A detector's scores, around -3, and 1 positive in a hundred."""
    return (torch.randn(rows, labels) * 2 - 3).requires_grad_(), (torch.rand(rows, labels) < 0.01).float()


def sigmoid_focal(s: Tensor, t: Tensor) -> Tensor:
    p = s.sigmoid()
    ce = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    alpha_t = ALPHA * t + (1 - ALPHA) * (1 - t)
    return (alpha_t * (1 - p_t) ** GAMMA * ce).mean()


def sigmoid_focal_power(s: Tensor, t: Tensor) -> Tensor:
    """The same with a gamma that is no whole number, and no alpha."""
    p = s.sigmoid()
    ce = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    return ((1 - p * t - (1 - p) * (1 - t)) ** 1.5 * ce).mean()


def asymmetric(s: Tensor, t: Tensor) -> Tensor:
    p = s.sigmoid()
    q = (p - CLIP).clamp(min=0)
    loss = t * (1 - p) * F.logsigmoid(s) + (1 - t) * q**4 * torch.log1p(-q)
    return -loss.mean()


def published_asymmetric(s: Tensor, t: Tensor) -> Tensor:
    """The steps of the paper's authors."""
    p = torch.sigmoid(s)
    q = (1 - p + CLIP).clamp(max=1)
    loss = t * torch.log(p.clamp(min=1e-8)) + (1 - t) * torch.log(q.clamp(min=1e-8))
    pt = p * t + q * (1 - t)
    weight = torch.pow(1 - pt, 1 * t + 4 * (1 - t))
    return -(loss * weight).mean()


def hard_truncated(s: Tensor, t: Tensor) -> Tensor:
    p = s.detach().sigmoid()
    kept = torch.where(t > 0.5, p < MARGIN, p > 1 - MARGIN)
    return (F.binary_cross_entropy_with_logits(s, t, reduction="none") * kept).mean()


def soft_truncated(s: Tensor, t: Tensor) -> Tensor:
    return -(t * torch.sigmoid(-s) * F.logsigmoid(s) + (1 - t) * torch.sigmoid(s) * F.logsigmoid(-s)).mean()


def softmax_focal(s: Tensor, t: Tensor) -> Tensor:
    log_p = F.log_softmax(s, -1).gather(-1, t[:, None])
    return -((1 - log_p.exp()) ** GAMMA * log_p).mean()


def soft_truncated_ce(s: Tensor, t: Tensor) -> Tensor:
    target = t[:, None]
    return -((-s).softmax(-1).gather(-1, target) * s.log_softmax(-1).gather(-1, target)).mean()


TWO = {"middle eager": "with so few scores two threads meet as long as they work; one thread reaches the goal"}
FEW_PASSES = {
    "middle eager": "the plain lines have few passes: a constant weight needs no gradient",
    "large eager": "the plain lines have few passes: a constant weight needs no gradient",
}
SUMMED_APART = {
    "middle eager": "exact for sure rows: the other classes are summed apart from the target, a pass more",
    "large eager": "so large, two threads wait for the same memory; one thread reaches the goal",
    "F.cross_entropy": "torch has cross-entropy as one kernel; the weight and the exact rest are passes of their own",
}

CASES = [
    Case("sigmoid_focal_loss", anchors, DETECTOR, (6, 8), sigmoid_focal, options={"alpha": ALPHA}, reasons=TWO),
    Case(
        "sigmoid_focal_loss",
        anchors,
        LABELS,
        (6, 8),
        sigmoid_focal_power,
        "gamma 1.5",
        options={"gamma": 1.5},
        reasons=TWO,
    ),
    Case(
        "asymmetric_loss",
        anchors,
        LABELS,
        (6, 8),
        asymmetric,
        peers=[Peer("the steps of arXiv 2009.14119, written anew", written(published_asymmetric))],
        reasons=TWO,
    ),
    Case("hard_truncated_bce", anchors, LABELS, (6, 8), hard_truncated, reasons=FEW_PASSES),
    Case("soft_truncated_bce", anchors, LABELS, (6, 8), soft_truncated, reasons=TWO),
    Case(
        "softmax_focal_loss",
        class_scores,
        CLASSES,
        (6, 5),
        softmax_focal,
        peers=[Peer("F.cross_entropy", written(F.cross_entropy), goal=1.5, same=False)],
        reasons=SUMMED_APART,
    ),
    Case("soft_truncated_cross_entropy", class_scores, CLASSES, (6, 5), soft_truncated_ce, reasons=SUMMED_APART),
]

if __name__ == "__main__":
    raise SystemExit(main("focal", CASES))
