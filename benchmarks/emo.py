"""The earth mover loss on a linear layer beside the published computation and beside cross-entropy.

512 rows, 32000 words, 512 features: the shape of a small language model's last layer. The peers hold all scores; ours
holds a chunk of rows. ``chunk_size`` 57 makes nine chunks. The default of 1024 would hold all 512 rows at once here,
which takes more than twice the memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Contender, main
from lossbook.emo import linear_emo_ce_loss, linear_emo_loss

SIZE = {"rows": 512, "words": 32_000, "features": 512, "chunk_size": 57}
TINY = {"rows": 6, "words": 11, "features": 4, "chunk_size": 4}


def unit_vectors(embedding: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(embedding, dim=-1, keepdim=True)
    return embedding / norm


def published_emo(scores: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
    """Row by row, 1 - <q E, p E>, in the steps of the paper's authors.

    A one-hot q, 1e-15 added and divided by its 1-norm; p by way of its logarithm; both times the unit vectors.
    """
    unit = unit_vectors(embedding)
    q = F.one_hot(target, len(embedding)).to(scores.dtype)
    mass: Tensor = torch.linalg.vector_norm(q + 1e-15, ord=1, dim=-1, keepdim=True)
    q = (q + 1e-15) / mass
    p = scores.log_softmax(-1).exp()
    return 1 - ((q @ unit) * (p @ unit)).sum(-1)


def trimmed_emo(scores: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
    """The same without q: the target's vector is looked up, and p is one softmax. Better than what is published."""
    unit = unit_vectors(embedding)
    return 1 - (unit[target] * (scores.softmax(-1) @ unit)).sum(-1)


class Data:
    """One layer, its inputs, and fixed word vectors."""

    def __init__(self, device: torch.device, rows: int, words: int, features: int) -> None:
        self.hidden = torch.randn(rows, features, device=device).requires_grad_()
        self.weight = (torch.randn(words, features, device=device) * 0.05).requires_grad_()
        self.embedding = torch.randn(words, features, device=device)
        self.target = torch.randint(words, (rows,), device=device)
        self.leaves = [self.hidden, self.weight]

    def scores(self) -> Tensor:
        return F.linear(self.hidden, self.weight)

    def ours(self, chunk_size: int) -> Contender:
        return Contender(
            "lossbook.emo.linear_emo_loss",
            lambda: linear_emo_loss(self.hidden, self.weight, self.target, self.embedding, chunk_size=chunk_size),
            self.leaves,
        )


def against_published(
    device: torch.device, rows: int, words: int, features: int, chunk_size: int
) -> tuple[Contender, Contender]:
    data = Data(device, rows, words, features)
    peer = Contender(
        "EMO on a linear layer, written anew from arXiv 2310.04691",
        lambda: published_emo(data.scores(), data.target, data.embedding).mean(),
        data.leaves,
    )
    return data.ours(chunk_size), peer


def against_trimmed(
    device: torch.device, rows: int, words: int, features: int, chunk_size: int
) -> tuple[Contender, Contender]:
    data = Data(device, rows, words, features)
    peer = Contender(
        "EMO on a linear layer, written anew from arXiv 2310.04691, without its one-hot matrix",
        lambda: trimmed_emo(data.scores(), data.target, data.embedding).mean(),
        data.leaves,
    )
    return data.ours(chunk_size), peer


def against_cross_entropy(
    device: torch.device, rows: int, words: int, features: int, chunk_size: int
) -> tuple[Contender, Contender]:
    data = Data(device, rows, words, features)
    peer = Contender(
        "torch.nn.functional.cross_entropy on torch.nn.functional.linear",
        lambda: F.cross_entropy(data.scores(), data.target),
        data.leaves,
    )
    return data.ours(chunk_size), peer


def composition(
    device: torch.device, rows: int, words: int, features: int, chunk_size: int
) -> tuple[Contender, Contender]:
    data = Data(device, rows, words, features)

    def published() -> Tensor:
        scores = data.scores()
        ce = F.cross_entropy(scores, data.target, reduction="none")
        emo = published_emo(scores, data.target, data.embedding)
        return ((ce + (ce / (emo + 1e-10)).detach() * emo) / 2).mean()

    ours = Contender(
        "lossbook.emo.linear_emo_ce_loss",
        lambda: linear_emo_ce_loss(data.hidden, data.weight, data.target, data.embedding, chunk_size=chunk_size),
        data.leaves,
    )
    return ours, Contender("EMO and CE on a linear layer, written anew from arXiv 2310.04691", published, data.leaves)


CASES = [
    Case("linear EMO against published EMO", against_published, SIZE, TINY, time_goal=0.7, memory_goal=0.25),
    # the values differ: one is a cross-entropy
    Case(
        "linear EMO against cross-entropy",
        against_cross_entropy,
        SIZE,
        TINY,
        time_goal=2.0,
        memory_goal=0.5,
        tolerance=None,
    ),
    Case("linear EMO against published EMO, trimmed", against_trimmed, SIZE, TINY),
    Case("linear EMO with cross-entropy against published composition", composition, SIZE, TINY),
]

if __name__ == "__main__":
    raise SystemExit(main("emo", CASES))
