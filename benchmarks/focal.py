"""Sigmoid focal loss beside the formula that torchvision publishes, at the size of a dense detector."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Contender, main
from lossbook.focal import sigmoid_focal_loss


def published(s: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss with reduction="mean", written anew from its formula."""
    p = torch.sigmoid(s)
    ce = F.binary_cross_entropy_with_logits(s, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    loss = ce * (1 - p_t) ** gamma
    alpha_t = alpha * t + (1 - alpha) * (1 - t)
    return (alpha_t * loss).mean()


def sigmoid_focal(device: torch.device, shape: tuple[int, ...], gamma: float) -> tuple[Contender, Contender]:
    """Anchors of a detector: 1 positive in a hundred, scores around -3."""
    scores = (torch.randn(shape, device=device) * 2 - 3).requires_grad_()
    target = (torch.rand(shape, device=device) < 0.01).float()
    ours = Contender(
        "lossbook.focal.sigmoid_focal_loss",
        lambda: sigmoid_focal_loss(scores, target, alpha=0.25, gamma=gamma),
        [scores],
    )
    peer = Contender(
        "torchvision's sigmoid_focal_loss, formula written anew",
        lambda: published(scores, target, alpha=0.25, gamma=gamma),
        [scores],
    )
    return ours, peer


CASES = [
    Case(
        name="sigmoid focal, gamma 2",
        setup=sigmoid_focal,
        size={"shape": (4, 100_000, 80), "gamma": 2.0},
        tiny={"shape": (2, 10, 8), "gamma": 2.0},
        time_goal=0.5,
        memory_goal=0.5,
    ),
    Case(
        name="sigmoid focal, gamma 1.5",
        setup=sigmoid_focal,
        size={"shape": (4, 100_000, 80), "gamma": 1.5},
        tiny={"shape": (2, 10, 8), "gamma": 1.5},
    ),
]

if __name__ == "__main__":
    raise SystemExit(main("focal", CASES))
