"""The losses on several labels: dense beside timm's, sparse beside the form in which it was published."""

from __future__ import annotations

import importlib.util
from importlib.metadata import distribution
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Case, Loss, Peer, main, written

POSITIVES = 8


def labels(*shape: int) -> tuple[Tensor, Tensor]:
    """Some eight positives in a row, at most a tenth of the labels, at least one."""
    scores = torch.randn(shape).requires_grad_()
    target = torch.rand(shape) < min(0.1, POSITIVES / shape[-1])
    target[..., 0] = True
    return scores, target


def soft_labels(*shape: int) -> tuple[Tensor, Tensor]:
    """Labels that are smoothed: none is 0 or 1."""
    scores, target = labels(*shape)
    return scores, (target.float() + torch.rand(shape)) / 2 * 0.98 + 0.01


def indices(*shape: int) -> tuple[Tensor, Tensor]:
    """Eight different positives in a row, or as many as there are labels."""
    return torch.randn(shape).requires_grad_(), torch.rand(shape).topk(min(POSITIVES, shape[-1] // 2)).indices


def chosen(rows: int, labels: int, positives: int) -> tuple[Tensor, Tensor]:
    """So many positives in every row."""
    scores = torch.randn(rows, labels).requires_grad_()
    target = torch.zeros(rows, labels, dtype=torch.bool)
    return scores, target.scatter(-1, torch.rand(rows, labels).topk(positives).indices, True)


def with_zero(s: Tensor) -> Tensor:
    """The threshold beside the scores."""
    return F.pad(s, (0, 1))


def dense(s: Tensor, t: Tensor) -> Tensor:
    negative = with_zero(s.masked_fill(t, -inf)).logsumexp(-1)
    positive = with_zero((-s).masked_fill(~t, -inf)).logsumexp(-1)
    return (negative + positive).mean()


def soft(s: Tensor, t: Tensor) -> Tensor:
    negative = with_zero(s + torch.log1p(-t)).logsumexp(-1)
    positive = with_zero(t.log() - s).logsumexp(-1)
    return (negative + positive).mean()


def sparse(s: Tensor, index: Tensor) -> Tensor:
    negative = with_zero(s.scatter(-1, index, -inf)).logsumexp(-1)
    positive = with_zero(-s.gather(-1, index)).logsumexp(-1)
    return (negative + positive).mean()


def published_sparse(s: Tensor, index: Tensor) -> Tensor:
    """All labels first, then the positives are subtracted, clipped at 1e-7."""
    taken = s.gather(-1, index)
    a = with_zero(s).logsumexp(-1)
    rest = a + torch.log(torch.clamp(1 - torch.exp(taken.logsumexp(-1) - a), min=1e-7))
    return (rest + with_zero(-taken).logsumexp(-1)).mean()


def pairwise(s: Tensor, t: Tensor) -> Tensor:
    negative = s.masked_fill(t, -inf).logsumexp(-1)
    positive = (-s).masked_fill(~t, -inf).logsumexp(-1)
    return F.softplus(negative + positive).mean()


def subset(s: Tensor, t: Tensor) -> Tensor:
    """Label by label: log_z[k] over the subsets of k labels among those before."""
    k = t.sum(-1, keepdim=True)
    log_z = F.pad(s.new_full((*s.shape[:-1], int(k.max())), -1e30), (1, 0))
    for s_i in s.unsqueeze(-1).unbind(-2):
        log_z = torch.cat([log_z[..., :1], torch.logaddexp(log_z[..., 1:], log_z[..., :-1] + s_i)], -1)
    return (log_z.gather(-1, k).squeeze(-1) - s.masked_fill(~t, 0).sum(-1)).mean()


def timm_zlpr(s: Tensor, t: Tensor) -> tuple[Loss, tuple[Any, ...]]:
    """The loss from timm's own file, read alone: the whole package would load an image library first.

    Its labels are numbers, as timm's data loaders give them.
    """
    path = distribution("timm").locate_file("timm/loss/zlpr_loss.py")
    spec = importlib.util.spec_from_file_location("timm_zlpr_loss", str(path))
    if spec is None or spec.loader is None or not Path(str(path)).exists():
        raise ImportError("this timm has no file timm/loss/zlpr_loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ZlprLoss(), (s, t.float())


TIMM = Peer("timm.loss.ZlprLoss", timm_zlpr, "timm", goal=0.35)
POST = Peer("the sparse form of post 8888, written anew", written(published_sparse), goal=1.0)
SHAPES = (
    ("small", (256, 80)),
    ("middle", (4096, 80)),
    ("middle", (64, 9605)),
    ("large", (4096, 1000)),
    ("large", (16, 9, 128 * 128)),
)
SUBSETS = (
    ("small", (256, 20, 3)),
    ("middle", (256, 100, 8)),
    ("middle", (256, 100, 50)),
    ("large", (1024, 1000, 8)),
)


UNROLLED = "the compiler would unroll the loop over the labels: minutes"


def subset_scores(rows: int, labels: int, positives: int) -> int:
    return rows * labels


CASES = [
    Case("multilabel_softmax_loss", labels, SHAPES, (2, 3, 20), dense, peers=[TIMM]),
    Case("multilabel_softmax_loss", soft_labels, SHAPES, (2, 3, 20), soft, "soft labels"),
    Case("sparse_multilabel_softmax_loss", indices, SHAPES, (2, 3, 20), sparse, peers=[POST]),
    Case("multilabel_pairwise_loss", labels, SHAPES, (2, 3, 20), pairwise),
    Case("subset_softmax_loss", chosen, SUBSETS, (4, 20, 3), subset, scores=subset_scores, not_compiled=UNROLLED),
]

if __name__ == "__main__":
    raise SystemExit(main("multilabel_softmax", CASES))
