"""The symmetric KL of two passes over the same labels."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Case, main


def two_passes(rows: int, labels: int) -> tuple[Tensor, Tensor]:
    """Scores, and the same with a little noise, as dropout gives them."""
    s = torch.randn(rows, labels) * 2
    return s.clone().requires_grad_(), (s + torch.randn_like(s) / 2).requires_grad_()


def symmetric_kl(s: Tensor, r: Tensor) -> Tensor:
    return ((s.sigmoid() - r.sigmoid()) * (s - r)).sum(-1).mean()


CASES = [
    Case(
        "multilabel_symmetric_kl",
        two_passes,
        (("small", (256, 80)), ("middle", (4096, 80)), ("large", (4096, 1000))),
        (6, 5),
        symmetric_kl,
        reasons=dict.fromkeys(
            ("middle eager", "large eager"),
            "four sigmoids and a tanh keep the digits of p - q and 1 - p; plain are two sigmoids",
        ),
    )
]

if __name__ == "__main__":
    raise SystemExit(main("soft_labels", CASES))
