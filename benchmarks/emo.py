"""The earth mover loss beside the published computation and, on a linear layer, beside cross-entropy.

32000 words, 512 features: the last layer of a small language model. The plain formula and the peers hold all scores;
ours holds a chunk of rows. In bfloat16, with 4096 features, peak memory alone is measured.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import CLASSES, Case, Peer, class_scores, main, written

SIZE = 64  # of a word vector


def words(rows: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, one word a row, and fixed word vectors."""
    return *class_scores(rows, classes), torch.randn(classes, SIZE)


def layer(rows: int, classes: int, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weights, one word a row, and fixed word vectors."""
    hidden, weight = torch.randn(rows, features), torch.randn(classes, features) * 0.05
    target = torch.randint(classes, (rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), target, torch.randn(classes, features)


def half_layer(rows: int, classes: int, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in bfloat16; the word vectors are the output weights, as where the two are tied."""
    hidden, weight = torch.randn(rows, features).bfloat16(), torch.randn(classes, features).bfloat16() * 0.05
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(classes, (rows,)), weight.detach()


def emo(scores: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
    """1 - <e_t, sum_i p_i e_i> of each row, on unit vectors."""
    unit = F.normalize(embedding, dim=-1)
    return 1 - (unit[target] * (scores.softmax(-1) @ unit)).sum(-1)


def published_emo(scores: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
    """Row by row, 1 - <q E, p E>, in the steps of the paper's authors.

    A one-hot q, 1e-15 added and divided by its 1-norm; p by way of its logarithm; both times the unit vectors.
    """
    norm: Tensor = torch.linalg.vector_norm(embedding, dim=-1, keepdim=True)
    unit = embedding / norm
    q = F.one_hot(target, len(embedding)).to(scores.dtype)
    mass: Tensor = torch.linalg.vector_norm(q + 1e-15, ord=1, dim=-1, keepdim=True)
    q = (q + 1e-15) / mass
    p = scores.log_softmax(-1).exp()
    return 1 - ((q @ unit) * (p @ unit)).sum(-1)


Rows = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean(rows: Rows) -> Rows:
    return lambda scores, target, embedding: rows(scores, target, embedding).mean()


def with_ce(rows: Rows) -> Rows:
    """(CE + sg(CE / EMO) EMO) / 2, as published."""

    def loss(scores: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        ce = F.cross_entropy(scores, target, reduction="none")
        distance = rows(scores, target, embedding)
        return ((ce + (ce / (distance + 1e-10)).detach() * distance) / 2).mean()

    return loss


def linear(loss: Rows) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same on a linear layer."""
    return lambda hidden, weight, target, embedding: loss(F.linear(hidden, weight), target, embedding)


def linear_scores(rows: int, classes: int, features: int) -> int:
    return rows * classes


NEW = "written anew from arXiv 2310.04691"
PUBLISHED = Peer(f"EMO {NEW}", written(mean(published_emo)))
COMPOSED = Peer(f"EMO and CE {NEW}", written(with_ce(published_emo)))
LINEAR_PUBLISHED = Peer(f"EMO on a linear layer, {NEW}", written(linear(mean(published_emo))), goal=0.7)
LINEAR_COMPOSED = Peer(f"EMO and CE on a linear layer, {NEW}", written(linear(with_ce(published_emo))))
CROSS_ENTROPY = Peer(
    "F.cross_entropy on F.linear",
    written(linear(lambda scores, target, _: F.cross_entropy(scores, target))),
    goal=2.0,
    same=False,
)
ALONE = Peer("the linear layer alone", written(lambda hidden, weight, *_: F.linear(hidden, weight)), same=False)
LINEAR = (("small", (64, 100, 64)), ("middle", (256, 4000, 256)), ("large", (256, 32_000, 512)))
WORDS = 128_000  # of a large language model; the peak per weight is the same at 32 000

PRODUCT = "most of the time is the product with the word vectors, which both make"
EXACT = {
    "middle eager": "costs of rounding size and the target's own are set to 0: passes more",
    "large eager": PRODUCT,
}
CHUNKS = {
    "middle eager": "most of the time is the product with the weights, which both make, ours in chunks",
    "large eager": "most of the time is the product with the weights, which both make, ours in chunks",
    CROSS_ENTROPY.name: "the costs are a second product, with the word vectors",
    LINEAR_PUBLISHED.name: "most of the time is the product with the weights, which both make, ours in chunks",
    "middle memory": "the gradient of the weights, which both hold, is as large as the scores that are not held",
}

CASES = [
    Case("emo_loss", words, CLASSES, (6, 11), mean(emo), peers=[PUBLISHED], reasons=EXACT),
    Case("emo_ce_loss", words, CLASSES, (6, 11), with_ce(emo), peers=[COMPOSED], reasons=EXACT),
    Case(
        "linear_emo_loss",
        layer,
        LINEAR,
        (6, 11, 4),
        linear(mean(emo)),
        options={"chunk_size": 32},  # eight chunks; the default of 1024 would hold all rows at once
        peers=[LINEAR_PUBLISHED, CROSS_ENTROPY, ALONE],
        scores=linear_scores,
        reasons=CHUNKS,
    ),
    Case(
        "linear_emo_ce_loss",
        layer,
        LINEAR,
        (6, 11, 4),
        linear(with_ce(emo)),
        options={"chunk_size": 32},
        peers=[LINEAR_COMPOSED, ALONE],
        scores=linear_scores,
        reasons=CHUNKS,
    ),
    *(
        Case(
            "linear_emo_loss",
            half_layer,
            (("large", (256, 32_000, 4096)),),
            (6, 11, 4),
            linear(mean(emo)),
            f"bfloat16, sums in {sums}",
            options={"chunk_size": 64, "accumulate": sums},
            scores=linear_scores,
            full=(256, WORDS, 4096),
            bytes_goal=goal,
        )
        for sums, goal in (("float32", 6.3), ("weight", 2.5))
    ),
]

if __name__ == "__main__":
    raise SystemExit(main("emo", CASES))
