"""Expected accuracy beside Genz's Monte Carlo estimator with 16 samples, the one that EXACT uses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.harness import CLASSES, Case, Peer, class_scores, main, written

SAMPLES = 16
NODE, WEIGHT = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(32))


def margins(s: Tensor, t: Tensor) -> Tensor:
    """s_t - s_i for i != t, the hardest rival first, shape (rows, C - 1)."""
    rivals = torch.ones_like(s, dtype=torch.bool).scatter_(1, t.unsqueeze(1), False)
    return (s.gather(1, t.unsqueeze(1)) - s)[rivals].view(s.shape[0], -1).sort(-1).values


def cholesky(i: int) -> tuple[float, float]:
    """Column i of the Cholesky factor of I + 11^T, the covariance of the differences: its diagonal, and all below."""
    return math.sqrt((i + 2) / (i + 1)), 1 / math.sqrt((i + 1) * (i + 2))


def conditional(bound: Tensor) -> Tensor:
    """Phi of a bound: the share of the line that the coordinate may take."""
    return torch.erf(bound / math.sqrt(2)).add_(1).div_(2)


def draw(share: Tensor, uniform: Tensor) -> Tensor:
    """The coordinate, drawn below its bound."""
    return torch.erfinv((2 * uniform) * share - 1).mul(math.sqrt(2)).clamp(-5, 5)


class Genz(Function):
    """P(N(0, I + 11^T) < d) as arXiv 2205.09615 has it: one estimate for the value, one for each derivative.

    In the estimate for the derivative by d_i, coordinate i stands at its bound and counts with its density. All C
    estimates go through the coordinates together, and every coordinate's bounds and factors are kept to the end.
    """

    @staticmethod
    def forward(ctx: Any, d: Tensor) -> Tensor:
        rows, n = d.shape
        uniform = torch.rand(n, SAMPLES, rows, 1, dtype=d.dtype, device=d.device)
        bound = d.new_empty(n, SAMPLES, rows, n + 1)
        factor = torch.empty_like(bound)
        carried = d.new_zeros(SAMPLES, rows, n + 1)
        for i in range(n):
            diagonal, below = cholesky(i)
            torch.div(d[:, i, None] - carried, diagonal, out=bound[i])
            factor[i] = conditional(bound[i])
            y = draw(factor[i], uniform[i])
            y[..., i] = bound[i, ..., i]
            carried.add_(y, alpha=below)
        for i in range(n):
            density = torch.exp(-bound[i, ..., i].square() / 2) / math.sqrt(2 * math.pi)
            factor[i, ..., i] = density / cholesky(i)[0]
        estimates = factor.prod(0).mean(0)
        ctx.save_for_backward(estimates[:, :n])
        return estimates[:, n]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0]
        return g.unsqueeze(1) * slope


def by_autograd(d: Tensor) -> Tensor:
    """The estimator of the value alone, left to autograd: leaner than the published form, and noisier in its slope."""
    rows, n = d.shape
    carried = d.new_zeros(SAMPLES, rows)
    p = d.new_ones(SAMPLES, rows)
    for i in range(n):
        diagonal, below = cholesky(i)
        share = torch.special.ndtr((d[:, i] - carried) / diagonal)
        p = p * share
        carried = carried + below * draw(share, torch.rand(SAMPLES, rows, dtype=d.dtype, device=d.device))
    return p.mean(0)


def genz(s: Tensor, t: Tensor) -> Tensor:
    p: Tensor = Genz.apply(margins(s, t))  # type: ignore[no-untyped-call]
    return (1 - p).mean()


def genz_by_autograd(s: Tensor, t: Tensor) -> Tensor:
    return (1 - by_autograd(margins(s, t))).mean()


def leading(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Normal scores; the right class leads most of the others."""
    t = torch.randint(classes, (rows,))
    s = torch.randn(rows, classes)
    return s.scatter_add(1, t[:, None], torch.full((rows, 1), 3.0)).requires_grad_(), t


def log_accuracy(s: Tensor, t: Tensor) -> Tensor:
    """log of the integral over z of phi(z) prod_(i != t) Phi(z + s_t - s_i), by Gauss and Hermite."""
    z, weight = NODE.to(s), WEIGHT.to(s)
    lead = (s.gather(1, t[:, None]) - s).scatter(1, t[:, None], math.inf)
    log_all_below: Tensor = torch.special.log_ndtr(z[:, None, None] + lead).sum(-1)
    return (log_all_below + (weight / weight.sum()).log()[:, None]).logsumexp(0)


def accuracy(s: Tensor, t: Tensor) -> Tensor:
    return log_accuracy(s, t).exp().mean()


def expected_error(s: Tensor, t: Tensor) -> Tensor:
    return 1 - accuracy(s, t)


def minus_log_accuracy(s: Tensor, t: Tensor) -> Tensor:
    return -log_accuracy(s, t).mean()


def soft_accuracy(s: Tensor, t: Tensor) -> Tensor:
    return (1 - s.softmax(-1).gather(-1, t[:, None])).mean()


SHAPES = (("small", (256, 10)), ("middle", (256, 100)), ("large", (64, 10_000)))
# a Monte Carlo estimate: of the mean error of a batch it gives one or two digits
KIND = "written anew from arXiv 2205.09615"
GENZ = Peer(f"Genz's estimator, {SAMPLES} samples, {KIND}", written(genz), goal=0.1, memory_goal=0.02, tolerance=0.1)
AUTOGRAD = Peer(f"Genz's estimator through autograd, {KIND}", written(genz_by_autograd), tolerance=0.1)

ALONE = {"small eager": "so few rows stay on one thread, which waits for no other: slower where all is quiet"}
EXACT: dict[str, Any] = {"tolerance": 5e-3, "reasons": ALONE}

CASES = [
    Case("expected_accuracy", leading, SHAPES, (64, 4), accuracy, **EXACT),
    Case("log_expected_accuracy", leading, SHAPES, (64, 4), lambda s, t: log_accuracy(s, t).mean(), **EXACT),
    # at 10 000 classes the estimators' arrays would not fit
    Case("exact_loss", leading, SHAPES[:2], (64, 4), expected_error, peers=[GENZ, AUTOGRAD], reasons=ALONE),
    Case("exact_loss", leading, SHAPES[2:], (64, 4), expected_error, "many classes", **EXACT),
    Case("exact_loss", leading, SHAPES, (64, 4), minus_log_accuracy, "log", options={"log": True}, **EXACT),
    Case(
        "soft_accuracy_loss",
        class_scores,
        CLASSES,
        (6, 5),
        soft_accuracy,
        reasons={
            "middle eager": "plain, 1 - p has no right digit where a row is sure; summing the others is one pass more",
            "large eager": "so large, two threads wait for the same memory; one thread reaches the goal",
        },
    ),
]

if __name__ == "__main__":
    raise SystemExit(main("accuracy", CASES))
