"""The margin softmax beside pytorch-metric-learning's CosFace, gradients of embeddings and class vectors included."""

from __future__ import annotations

import torch

from benchmarks.harness import Case, Contender, main
from lossbook.am_softmax import linear_am_softmax_loss

MARGIN, SCALE = 0.35, 30.0


def linear_am_softmax(device: torch.device, rows: int, size: int, classes: int) -> tuple[Contender, Contender]:
    """The same embeddings, class vectors and targets for both; the peer keeps its class vectors as ``(D, C)``."""
    from pytorch_metric_learning.losses import CosFaceLoss

    embedding = torch.randn(rows, size, device=device, requires_grad=True)
    weight = torch.randn(classes, size, device=device, requires_grad=True)
    target = torch.randint(classes, (rows,), device=device)
    published = CosFaceLoss(num_classes=classes, embedding_size=size, margin=MARGIN, scale=SCALE).to(device)
    published.W.data = weight.detach().t().contiguous()
    ours = Contender(
        "lossbook.am_softmax.linear_am_softmax_loss",
        lambda: linear_am_softmax_loss(embedding, weight, target, margin=MARGIN, scale=SCALE),
        [embedding, weight],
    )
    peer = Contender(
        "pytorch_metric_learning.losses.CosFaceLoss",
        lambda: published(embedding, target),
        [embedding, published.W],
    )
    return ours, peer


CASES = [
    Case(
        name="linear AM-softmax",
        setup=linear_am_softmax,
        size={"rows": 100, "size": 128, "classes": 90_000},
        tiny={"rows": 4, "size": 8, "classes": 50},
        time_goal=0.6,
        memory_goal=0.4,
        packages=("pytorch-metric-learning",),
    ),
]

if __name__ == "__main__":
    raise SystemExit(main("am_softmax", CASES))
