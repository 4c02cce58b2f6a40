"""The memory counter itself, on calls whose peak is known."""

from __future__ import annotations

import pytest
import torch
from memory import peak_bytes, peak_ratio

SIZE = 1_000_000  # bytes of the tensor below
SMALL = 2000  # bytes that events of scalars and rows may add


@pytest.fixture
def x() -> torch.Tensor:
    return torch.ones(500, 500)


def chain(x: torch.Tensor) -> torch.Tensor:
    a = x + 1
    b = a + 1
    c = b + 1  # a, b and c live here: the peak
    del a, b
    return c + 1


@pytest.mark.parametrize(
    ("call", "sizes"),
    [
        (lambda x: x.add_(1), 0),  # in place: nothing new
        (lambda x: x + 1, 1),  # what is returned counts
        (lambda x: (x + 1).sum(), 1),  # and what is freed again
        (lambda x: torch.cat((x, x)), 2),
        (chain, 3),
        (lambda x: torch.logsumexp(x, -1), 1),  # a buffer inside the kernel
    ],
    ids=["in_place", "returned", "freed", "cat", "chain", "inside_the_kernel"],
)
def test_known_peaks(x, call, sizes):
    bytes_held = peak_bytes(lambda: call(x))
    assert sizes * SIZE <= bytes_held <= sizes * SIZE + 2 * SMALL + 500 * 8


def test_what_was_held_before_does_not_count(x):
    kept = [x.clone() for _ in range(5)]

    def drop_then_make() -> torch.Tensor:
        kept.clear()
        return x + 1

    assert peak_bytes(drop_then_make) <= SIZE + SMALL


@pytest.mark.parametrize(
    ("loss", "ratio"),
    [
        (lambda s: s.mean(), 1),  # the gradient alone
        (lambda s: (s * s).sum(), 2),  # the squares, then the gradient and its parts
        (lambda s: s.exp().exp().sum(), 3),  # two saved results, then the gradient beside them
    ],
    ids=["mean", "square", "two_saved"],
)
def test_known_ratios(x, loss, ratio):
    assert peak_ratio(loss, x) == pytest.approx(ratio, abs=0.02)


def test_the_scores_and_their_gradient_are_left_alone(x):
    leaf = x.clone().requires_grad_()
    peak_ratio(lambda s: s.sum(), leaf)
    assert leaf.grad is None
    assert torch.equal(leaf, x)
