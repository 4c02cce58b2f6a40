"""The multi-label softmax loss: dense beside timm's, sparse beside the form in which it was published."""

from __future__ import annotations

import importlib.util
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness import Case, Contender, main
from lossbook.multilabel_softmax import multilabel_softmax_loss, sparse_multilabel_softmax_loss


def timm_zlpr() -> nn.Module:
    """The loss from timm's own file, read alone: the whole package would load an image library first."""
    path = distribution("timm").locate_file("timm/loss/zlpr_loss.py")
    spec = importlib.util.spec_from_file_location("timm_zlpr_loss", str(path))
    if spec is None or spec.loader is None or not Path(str(path)).exists():
        raise ImportError("this timm has no file timm/loss/zlpr_loss.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss: nn.Module = module.ZlprLoss()
    return loss


def published_sparse(s: Tensor, index: Tensor) -> Tensor:
    """The sparse post's form, written anew: all labels first, then the positives are subtracted, clipped at 1e-7."""
    zero = torch.zeros_like(s[..., :1])
    taken = s.gather(-1, index)
    pos = torch.cat([-taken, zero], -1).logsumexp(-1)
    a = torch.cat([s, zero], -1).logsumexp(-1)
    b = taken.logsumexp(-1)
    return (a + torch.log(torch.clamp(1 - torch.exp(b - a), min=1e-7)) + pos).mean()


def dense(device: torch.device, shape: tuple[int, ...]) -> tuple[Contender, Contender]:
    """Eight positives in a row on average, at most a tenth of the labels."""
    scores = torch.randn(shape, device=device, requires_grad=True)
    target = torch.rand(shape, device=device) < min(0.1, 8 / shape[-1])
    numbers = target.float()  # the labels as data loaders of timm give them
    published = timm_zlpr()
    ours = Contender(
        "lossbook.multilabel_softmax.multilabel_softmax_loss", lambda: multilabel_softmax_loss(scores, target), [scores]
    )
    peer = Contender("timm.loss.ZlprLoss", lambda: published(scores, numbers), [scores])
    return ours, peer


def sparse(device: torch.device, shape: tuple[int, ...], positives: int) -> tuple[Contender, Contender]:
    """Different positives in each row."""
    scores = torch.randn(shape, device=device, requires_grad=True)
    index = torch.rand(shape, device=device).topk(positives, -1).indices
    ours = Contender(
        "lossbook.multilabel_softmax.sparse_multilabel_softmax_loss",
        lambda: sparse_multilabel_softmax_loss(scores, index),
        [scores],
    )
    peer = Contender("the sparse form of post 8888, written anew", lambda: published_sparse(scores, index), [scores])
    return ours, peer


SMALL = "at 20,000 scores most of the time goes into calling some twenty operators, not into the scores"

CASES = [
    Case(
        name=f"dense {shape}",
        setup=dense,
        size={"shape": shape},
        tiny={"shape": (2, 3, 20)},
        time_goal=0.35,
        memory_goal=0.6,
        reason=SMALL if shape == (256, 80) else None,
        packages=("timm",),
    )
    for shape in ((256, 80), (64, 9605), (8, 100_000), (16, 9, 128 * 128))
] + [
    Case(
        name="sparse (16, 9, 16384), 8 positives",
        setup=sparse,
        size={"shape": (16, 9, 128 * 128), "positives": 8},
        tiny={"shape": (2, 3, 20), "positives": 2},
        time_goal=1.0,
        memory_goal=1.0,
    )
]

if __name__ == "__main__":
    raise SystemExit(main("multilabel_softmax", CASES))
