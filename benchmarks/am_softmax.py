"""The margin softmax; in the linear form beside pytorch-metric-learning's CosFace and ArcFace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import CLASSES, Case, Loss, Peer, main, written
from lossbook.am_softmax import additive_angular_margin

MARGIN, ANGLE, SCALE = 0.35, 0.5, 30.0


def cosines(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Cosines as vectors of 64 numbers give them, and one class a row."""
    return (torch.randn(rows, classes) / 8).clamp(-1, 1).requires_grad_(), torch.randint(classes, (rows,))


def vectors(rows: int, classes: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, class vectors, and one class a row."""
    embedding, weight = torch.randn(rows, size), torch.randn(classes, size)
    return embedding.requires_grad_(), weight.requires_grad_(), torch.randint(classes, (rows,))


def am_softmax(c: Tensor, t: Tensor) -> Tensor:
    target = t[:, None]
    return F.cross_entropy(SCALE * c.scatter(-1, target, c.gather(-1, target) - MARGIN), t)


def arcface(c: Tensor, t: Tensor) -> Tensor:
    target = t[:, None]
    psi = (c.gather(-1, target).clamp(-1 + 1e-6, 1 - 1e-6).acos() + ANGLE).cos()
    return F.cross_entropy(SCALE * c.scatter(-1, target, psi), t)


def cosine(embedding: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.normalize(embedding, dim=-1), F.normalize(weight, dim=-1))


def linear_am_softmax(embedding: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    return am_softmax(cosine(embedding, weight), t)


def linear_arcface(embedding: Tensor, weight: Tensor, t: Tensor) -> Tensor:
    return arcface(cosine(embedding, weight), t)


def cosface_of(embedding: Tensor, weight: Tensor, t: Tensor) -> tuple[Loss, tuple[Any, ...]]:
    """The same data; the peer keeps its class vectors as ``(D, C)``."""
    from pytorch_metric_learning.losses import CosFaceLoss

    loss = CosFaceLoss(num_classes=len(weight), embedding_size=weight.shape[1], margin=MARGIN, scale=SCALE)
    loss.W.data = weight.detach().t().contiguous()
    return lambda embedding, t, _: loss(embedding, t), (embedding, t, loss.W)


LINEAR = (("small", (64, 100, 64)), ("middle", (256, 4000, 128)), ("large", (100, 90_000, 128)))
COSFACE = Peer(
    "pytorch_metric_learning.losses.CosFaceLoss", cosface_of, "pytorch-metric-learning", goal=0.6, memory_goal=0.4
)


ALONE = Peer("the cosines alone", written(lambda embedding, weight, _: cosine(embedding, weight)), same=False)


def linear_scores(rows: int, classes: int, size: int) -> int:
    return rows * classes


SUMMED_APART = {"middle eager": "exact for sure rows: the other classes are summed apart from the target, a pass more"}
NOT_HELD = "what is not held is computed again in the backward pass, a third product in place of memory"
AGAIN = {
    "middle eager": NOT_HELD,
    COSFACE.name: NOT_HELD,
    f"memory of {COSFACE.name}": "4000 class vectors are hardly larger than the scores that are not held",
}

CASES = [
    Case("am_softmax_loss", cosines, CLASSES, (6, 5), am_softmax, reasons=SUMMED_APART),
    Case(
        "margin_softmax_loss",
        cosines,
        CLASSES,
        (6, 5),
        arcface,
        options={"psi": additive_angular_margin(ANGLE)},
        reasons=SUMMED_APART,
    ),
    Case(
        "linear_am_softmax_loss",
        vectors,
        LINEAR,
        (6, 50, 4),
        linear_am_softmax,
        peers=[COSFACE, ALONE],
        scores=linear_scores,
        reasons=AGAIN,
    ),
    Case(
        "linear_margin_softmax_loss",
        vectors,
        LINEAR,
        (6, 50, 4),
        linear_arcface,
        options={"psi": additive_angular_margin(ANGLE)},
        peers=[ALONE],
        scores=linear_scores,
        reasons=AGAIN,
    ),
]

if __name__ == "__main__":
    raise SystemExit(main("am_softmax", CASES))
