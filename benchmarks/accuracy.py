"""Expected accuracy beside Genz's Monte Carlo estimator with 16 samples, the one that EXACT uses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.harness import Case, Contender, main
from lossbook.accuracy import exact_loss

SAMPLES = 16


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


def expected_error(device: torch.device, batch: int, classes: int, autograd: bool) -> tuple[Contender, Contender]:
    """Standard normal scores; the mean of 1 - P."""
    scores = torch.randn(batch, classes, device=device, requires_grad=True)
    target = torch.randint(classes, (batch,), device=device)
    estimate = by_autograd if autograd else Genz.apply
    kind = "through autograd" if autograd else "with a Monte Carlo integral per derivative, formula of 2205.09615 anew"
    ours = Contender("lossbook.accuracy.exact_loss", lambda: exact_loss(scores, target), [scores])
    peer = Contender(
        f"Genz's estimator, {SAMPLES} samples, {kind}", lambda: 1 - estimate(margins(scores, target)).mean(), [scores]
    )
    return ours, peer


TINY = {"batch": 64, "classes": 4}
# the peer is a Monte Carlo estimate: of the mean error of a batch it gives one or two digits
NOISE = 0.1

CASES = [
    Case(
        name="expected accuracy, 10 classes",
        setup=expected_error,
        size={"batch": 256, "classes": 10, "autograd": False},
        tiny=TINY | {"autograd": False},
        time_goal=0.1,
        memory_goal=0.02,
        tolerance=NOISE,
        reason=(
            "2560 scores are 82 thousand evaluations of log Phi and its slope, a third of the time; the rest is what "
            "torch takes for some 350 operators on small tensors. Smaller pieces need less memory and more operators."
        ),
    ),
    Case(
        name="expected accuracy, 100 classes",
        setup=expected_error,
        size={"batch": 256, "classes": 100, "autograd": False},
        tiny=TINY | {"autograd": False},
        time_goal=0.1,
        memory_goal=0.02,
        tolerance=NOISE,
    ),
    Case(
        # at 256 rows the peer's two arrays would take 33 GB
        name="expected accuracy, 1000 classes",
        setup=expected_error,
        size={"batch": 8, "classes": 1000, "autograd": False},
        tiny=TINY | {"autograd": False},
        time_goal=0.1,
        memory_goal=0.02,
        tolerance=NOISE,
    ),
    *(
        Case(
            name=f"expected accuracy, {classes} classes, the estimator through autograd",
            setup=expected_error,
            size={"batch": 256, "classes": classes, "autograd": True},
            tiny=TINY | {"autograd": True},
            tolerance=NOISE,
        )
        for classes in (10, 100, 1000)
    ),
]

if __name__ == "__main__":
    raise SystemExit(main("accuracy", CASES))
