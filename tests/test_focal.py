"""The truncated and focal losses against slow references in high precision, and every convention of the interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import mpmath as mp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_ratio
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lossbook._fast import focal as fast
from lossbook.focal import (
    AsymmetricLoss,
    HardTruncatedBce,
    SigmoidFocalLoss,
    SoftmaxFocalLoss,
    SoftTruncatedBce,
    SoftTruncatedCrossEntropy,
    asymmetric_loss,
    hard_truncated_bce,
    sigmoid_focal_loss,
    soft_truncated_bce,
    soft_truncated_cross_entropy,
    softmax_focal_loss,
)

GAMMAS = (0, 0.5, 1, 2, 5)
SCORES = (-1e4, -100.0, -60.0, -20.0, -3.0, 0.0, 0.75, 17.0, 30.0, 100.0, 1e4)
INF = float("inf")
NAN = float("nan")
HALVES = (torch.float16, torch.bfloat16)

# ---------------------------------------------------------------------------------------------------------- references


def mp_sigmoid(x: mp.mpf) -> mp.mpf:
    return 1 / (1 + mp.exp(-x))


def mp_softplus(x: mp.mpf) -> mp.mpf:
    return mp.log1p(mp.exp(x))


def mp_sigmoid_focal(s: mp.mpf, t: float, gamma: float, alpha: float | None = None) -> mp.mpf:
    t = mp.mpf(t)
    error = mp_sigmoid(s) * (1 - t) + mp_sigmoid(-s) * t
    bce = t * mp_softplus(-s) + (1 - t) * mp_softplus(s)
    weight = 1 if alpha is None else mp.mpf(alpha) * t + (1 - mp.mpf(alpha)) * (1 - t)
    return weight * error ** mp.mpf(gamma) * bce


def mp_soft_truncated(s: mp.mpf, y: float, k: float) -> mp.mpf:
    return mp_sigmoid(-k * s) * mp_softplus(-s) if y == 1 else mp_sigmoid(k * s) * mp_softplus(s)


def mp_hard_truncated(s: mp.mpf, y: float, m: float, at: mp.mpf) -> mp.mpf:
    """The weight is taken at ``at``, a constant."""
    p_t = mp_sigmoid(at) if y == 1 else mp_sigmoid(-at)
    step = mp.mpf(1) if p_t > m else mp.mpf("0.5") if p_t == m else mp.mpf(0)
    return (1 - step) * (mp_softplus(-s) if y == 1 else mp_softplus(s))


def mp_asymmetric(s: mp.mpf, t: float, minus: float, plus: float, c: float, at: mp.mpf | None = None) -> mp.mpf:
    """With ``at`` the weights are taken there, constants."""
    at = s if at is None else at
    positive = mp_sigmoid(-at) ** mp.mpf(plus) * mp_softplus(-s)
    q_at = mp_sigmoid(at) - mp.mpf(c)
    negative = mp.mpf(0) if q_at <= 0 else -(q_at ** mp.mpf(minus)) * mp.log(mp_sigmoid(-s) + mp.mpf(c))
    return mp.mpf(t) * positive + (1 - mp.mpf(t)) * negative


def published_asymmetric(s: Tensor, y: Tensor, gamma_neg: float, gamma_pos: float, clip: float) -> Tensor:
    """The steps of the paper's code, written anew."""
    p = torch.sigmoid(s)
    n = (1 - p + clip).clamp(max=1)
    loss = y * torch.log(p.clamp(min=1e-8)) + (1 - y) * torch.log(n.clamp(min=1e-8))
    return -loss * (1 - p * y - n * (1 - y)) ** (gamma_pos * y + gamma_neg * (1 - y))


def mp_rest(s: list[mp.mpf], t: int) -> mp.mpf:
    return mp.fsum(mp.exp(x) for i, x in enumerate(s) if i != t) / mp.fsum(map(mp.exp, s))


def mp_log_p(s: list[mp.mpf], t: int) -> mp.mpf:
    return -mp.log1p(mp.fsum(mp.exp(x - s[t]) for i, x in enumerate(s) if i != t))


def mp_softmax_focal(s: list[mp.mpf], t: int, gamma: float) -> mp.mpf:
    return -(mp_rest(s, t) ** mp.mpf(gamma)) * mp_log_p(s, t)


def mp_soft_truncated_ce(s: list[mp.mpf], t: int, k: float) -> mp.mpf:
    return -mp.exp(mp_log_p([-k * x for x in s], t)) * mp_log_p(s, t)


def torchvision_focal(x: Tensor, t: Tensor, gamma: float, alpha: float = -1.0) -> Tensor:
    """The formula of torchvision.ops.sigmoid_focal_loss, written anew."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    loss = ce * (1 - p_t) ** gamma
    return loss if alpha < 0 else (alpha * t + (1 - alpha) * (1 - t)) * loss


def backward_derivatives(loss: Callable[[Tensor], Tensor], s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value and first derivative by the backward pass, second derivative by a backward pass through it."""
    s = s.clone().requires_grad_()
    value = loss(s)
    (first,) = torch.autograd.grad(value.sum(), s, retain_graph=True)
    (followed,) = torch.autograd.grad(value.sum(), s, create_graph=True)
    torch.testing.assert_close(first, followed, rtol=512 * torch.finfo(s.dtype).eps, atol=torch.finfo(s.dtype).tiny)
    (second,) = torch.autograd.grad(followed.sum(), s)
    return value.detach(), first, second


def functional_derivatives(loss: Callable[[Tensor], Tensor], s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch.func, which takes another road through the code."""
    first = torch.func.grad(lambda x: loss(x).sum())
    second = torch.func.grad(lambda x: first(x).sum())
    return loss(s), first(s), second(s)


def mp_derivatives(f: Callable[[mp.mpf], mp.mpf], s: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    return f(mp.mpf(s)), mp.diff(f, s), mp.diff(f, s, 2)


def assert_near(got: Tensor, wanted: list[mp.mpf], rtol: float, atol: float) -> None:
    assert torch.isfinite(got).all()
    expected = torch.tensor([float(w) for w in wanted], dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=atol)


@pytest.fixture(autouse=True)
def _many_digits() -> Iterator[None]:
    with mp.workdps(30):
        yield


# Each case: our loss of (s, t), the reference of (s, t) as a function of an mpf, the labels.
HARD = (0.0, 1.0)
SOFT = (0.0, 2.0**-20, 0.125, 0.5, 0.75, 1.0)  # exact in float32, as are the scores
BINARY = (
    [
        pytest.param(
            partial(sigmoid_focal_loss, gamma=g, alpha=a),
            partial(mp_sigmoid_focal, gamma=g, alpha=a),
            SOFT,
            id=f"focal-{g}-{a}",
        )
        for g, a in [*((g, None) for g in GAMMAS), (2, 0.25), (0.5, 1.0)]
    ]
    + [
        pytest.param(partial(soft_truncated_bce, sharpness=k), partial(mp_soft_truncated, k=k), HARD, id=f"soft-{k}")
        for k in (0, 0.5, 1, 3, 20)
    ]
    + [
        pytest.param(partial(hard_truncated_bce, margin=m), partial(mp_hard_truncated, m=m), HARD, id=f"hard-{m}")
        for m in (0.0, 0.25, 0.5, 0.6)
    ]
    + [
        pytest.param(
            partial(asymmetric_loss, gamma_neg=a, gamma_pos=b, clip=c),
            partial(mp_asymmetric, minus=a, plus=b, c=c),
            SOFT,
            id=f"asymmetric-{a}-{b}-{c}",
        )
        for a, b, c in [(4, 1, 0.05), (0.5, 0.5, 0.25), (2, 0, 0.0), (1.5, 3, 0.75), (0, 0, 0.05)]
    ]
)


@cache
def binary_reference(reference: Callable[..., mp.mpf], s: float, t: float) -> tuple[mp.mpf, mp.mpf, mp.mpf]:
    mp.mp.dps = 80  # e^-100 beside 1; the fixture sets it back
    if reference.func is mp_hard_truncated:  # type: ignore[attr-defined]
        return mp_derivatives(lambda x: reference(x, t, at=mp.mpf(s)), s)
    return mp_derivatives(lambda x: reference(x, t), s)


# ------------------------------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("loss", "reference", "labels"), BINARY)
def test_binary_losses_to_the_second_derivative(
    loss: Callable[..., Tensor], reference: Callable[..., mp.mpf], labels: tuple[float, ...], dtype: torch.dtype
) -> None:
    pairs = [(s, t) for s in SCORES for t in labels]
    s, t = (torch.tensor(x, dtype=dtype) for x in zip(*pairs, strict=True))
    triples = [binary_reference(reference, a.item(), b.item()) for a, b in zip(s, t, strict=True)]
    wanted = [list(x) for x in zip(*triples, strict=True)]
    eps = torch.finfo(dtype).eps
    k = reference.keywords.get("k", 1)  # type: ignore[attr-defined]
    nothing = 1e-140 if dtype == torch.float64 else 1e-25
    for derivatives in (backward_derivatives, functional_derivatives):
        value, first, second = derivatives(lambda x: loss(x, t, reduction="none"), s)
        assert (value >= 0).all()
        assert_near(value, wanted[0], 32 * eps, nothing)
        assert_near(first, wanted[1], 32 * eps, 32 * eps)
        assert_near(second, wanted[2], 32 * eps, 64 * eps * (1 + k * k))
        if derivatives is backward_derivatives:  # the gradient that training uses keeps its digits however small it is
            hard = (t == 0) | (t == 1)
            assert_near(first[hard], [w for w, h in zip(wanted[1], hard, strict=True) if h], 32 * eps, nothing)


def test_weight_at_the_margin_is_one_half() -> None:
    s = torch.tensor([0.0, 1e-6, -1e-6, 0.0, 1e-6, -1e-6], dtype=torch.float64)
    y = torch.tensor([1, 1, 1, 0, 0, 0])
    weight = hard_truncated_bce(s, y, reduction="none") / math.log(2)
    torch.testing.assert_close(weight.float(), torch.tensor([0.5, 0.0, 1.0, 0.5, 1.0, 0.0]), rtol=1e-5, atol=0)


def test_margins_of_zero_and_one_keep_nothing_and_all() -> None:
    s, y = torch.tensor([-1e4, -1.0, 0.0, 30.0, 1e4]), torch.ones(5)
    assert (hard_truncated_bce(s, y, margin=0.0, reduction="none") == 0).all()
    torch.testing.assert_close(
        hard_truncated_bce(s, y, margin=1.0, reduction="none"), F.softplus(-s, threshold=200.0), rtol=1e-6, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clip", [0.05, 2.0**-7, 0.5])
def test_just_above_the_clip_no_digit_is_lost(clip: float, dtype: torch.dtype) -> None:
    with mp.workdps(40):
        level = mp.log(mp.mpf(clip) / (1 - mp.mpf(clip)))
        steps = [2.0**-k for k in range(0, 22 if dtype == torch.float32 else 46, 3)]
        s = torch.tensor([float(level) + x for x in steps], dtype=dtype)
        t = torch.zeros_like(s)
        triples = [mp_derivatives(lambda x: mp_asymmetric(x, 0, 4, 1, clip), x) for x in s.tolist()]
        # the score of the clip is known to a rounding of float64
        rtol = 64 * torch.finfo(dtype).eps + 8 * 2.0**-52 / min(steps)
        for derivatives in (backward_derivatives, functional_derivatives):
            got = derivatives(lambda x: asymmetric_loss(x, t, clip=clip, reduction="none"), s)
            for ours, wanted in zip(got, zip(*triples, strict=True), strict=True):
                assert_near(ours, list(wanted), rtol, 1e-30 if dtype == torch.float32 else 0)
        below = torch.tensor([float(level) - 1e-3, -20.0, -1e4], dtype=dtype)
        for got in row_gradients(lambda x: asymmetric_loss(x, torch.zeros_like(x), clip=clip, gamma_neg=0.0), below):
            assert (got == 0).all()
        assert asymmetric_loss(below, torch.zeros_like(below), clip=clip, gamma_neg=0.0) == 0


def test_asymmetric_loss_is_the_published_one() -> None:
    torch.manual_seed(0)
    s, y = torch.randn(50, 7, dtype=torch.float64) * 2, torch.randint(2, (50, 7)).double()
    s.requires_grad_()
    for options in [(4.0, 1.0, 0.05), (2.0, 0.0, 0.2), (3.0, 2.0, 0.0)]:
        ours = asymmetric_loss(
            s, y, **dict(zip(("gamma_neg", "gamma_pos", "clip"), options, strict=True)), reduction="none"
        )
        theirs = published_asymmetric(s, y, *options)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
        (a,), (b,) = torch.autograd.grad(ours.sum(), s), torch.autograd.grad(theirs.sum(), s)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clip", [0.05, 0.0])
def test_a_detached_weight_lets_no_gradient_through(clip: float, dtype: torch.dtype) -> None:
    pairs = [(s, t) for s in (-60.0, -20.0, -2.5, 0.0, 0.75, 17.0, 60.0) for t in (0.0, 0.25, 1.0)]
    s, t = (torch.tensor(x, dtype=dtype) for x in zip(*pairs, strict=True))
    wanted = [mp.diff(lambda x, a=a, b=b: mp_asymmetric(x, b, 4, 1, clip, at=mp.mpf(a)), a) for a, b in pairs]
    for got in row_gradients(lambda x: asymmetric_loss(x, t, clip=clip, detach_weight=True, reduction="none"), s):
        assert_near(got, wanted, 64 * torch.finfo(dtype).eps, 1e-25)
    assert torch.equal(
        asymmetric_loss(s, t, clip=clip, detach_weight=True), asymmetric_loss(s, t, clip=clip, detach_weight=False)
    )


ROWS = (
    (0.25, -1.25, 2.0, 0.125),
    (1e4, -1e4, 3.0, 0.0),
    (100.0, 0.0, 0.0, -100.0),
    (-60.0, 17.0, 2.0, 0.0),
    (0.0, 0.0, 0.0, 0.0),
)
SOFTMAX = [
    pytest.param(partial(softmax_focal_loss, gamma=g), partial(mp_softmax_focal, gamma=g), id=f"focal-{g}")
    for g in GAMMAS
] + [
    pytest.param(partial(soft_truncated_cross_entropy, sharpness=k), partial(mp_soft_truncated_ce, k=k), id=f"soft-{k}")
    for k in (0, 0.5, 1, 3)
]


@cache
def softmax_reference(
    reference: Callable[..., mp.mpf], row: tuple[float, ...], t: int
) -> tuple[mp.mpf, list[mp.mpf], list[mp.mpf]]:
    """Value, gradient and Hessian, the latter row by row in one list."""

    def exact(*x: mp.mpf) -> mp.mpf:
        return reference(list(x), t)

    def derivative(*orders: int) -> mp.mpf:
        return mp.diff(exact, row, orders)

    units = [tuple(int(i == j) for j in range(len(row))) for i in range(len(row))]
    gradient = [derivative(*e) for e in units]
    hessian = [derivative(*(a + b for a, b in zip(e, f, strict=True))) for e in units for f in units]
    return exact(*map(mp.mpf, row)), gradient, hessian


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("loss", "reference"), SOFTMAX)
def test_softmax_losses_to_the_second_derivative(
    loss: Callable[..., Tensor], reference: Callable[..., mp.mpf], dtype: torch.dtype
) -> None:
    for row in ROWS:
        # the differences of scores this large are rounded
        eps = torch.finfo(dtype).eps * (1 + max((abs(x) for x in row if abs(x) < 1e3), default=0))
        for t in range(4):
            s, index = torch.tensor(row, dtype=dtype), torch.tensor(t)
            ours = partial(loss, target=index)
            value, gradient, hessian = softmax_reference(reference, row, t)
            x = s.clone().requires_grad_()
            got = ours(x)
            got.backward()
            assert got >= 0
            assert x.grad is not None
            assert_near(got.detach()[None], [value], 64 * eps, 1e-25)
            for first in (x.grad, torch.func.grad(ours)(s)):
                assert_near(first, gradient, 64 * eps, 64 * eps)
            for second in (torch.autograd.functional.hessian(ours, s), torch.func.hessian(ours)(s)):
                assert_near(second.flatten(), hessian, 64 * eps, 512 * eps)


def row_gradients(loss: Callable[[Tensor], Tensor], s: Tensor) -> list[Tensor]:
    """The gradient on each road through the code: backward, backward with a graph, torch.func."""
    x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
    (lean,) = torch.autograd.grad(loss(x).sum(), x)
    (followed,) = torch.autograd.grad(loss(y).sum(), y, create_graph=True)
    return [lean, followed.detach(), torch.func.grad(lambda x: loss(x).sum())(s)]


@pytest.mark.parametrize("offset", [2.0**20, -(2.0**20)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("loss", "reference"), SOFTMAX)
def test_softmax_forms_keep_their_digits_at_a_large_offset(
    loss: Callable[..., Tensor], reference: Callable[..., mp.mpf], dtype: torch.dtype, offset: float
) -> None:
    s, eps = torch.tensor(ROWS[0], dtype=dtype), torch.finfo(dtype).eps
    moved = s + offset
    assert torch.equal(moved - offset, s)
    for t in range(4):
        value, gradient, _ = softmax_reference(reference, ROWS[0], t)
        ours = partial(loss, target=torch.tensor(t))
        assert_near(ours(moved)[None], [value], 64 * eps, 0)
        for got in row_gradients(ours, moved):
            assert_near(got, gradient, 64 * eps, 64 * eps)
            assert abs(got.sum()) <= 8 * eps


@pytest.mark.parametrize("level", [0.0, 1e4, -1e4, 1e7, 1e8, -1e9, 1e16, 1e30, -1e30, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("loss", "reference"), SOFTMAX)
def test_equal_scores_share_alike_at_every_level(
    loss: Callable[..., Tensor], reference: Callable[..., mp.mpf], dtype: torch.dtype, level: float
) -> None:
    value, gradient, _ = softmax_reference(reference, (0.0, 0.0, 0.0), 1)
    s, eps = torch.full((3,), level, dtype=dtype), torch.finfo(dtype).eps
    ours = partial(loss, target=torch.tensor(1))
    assert_near(ours(s)[None], [value], 8 * eps, 0)
    roads = row_gradients(ours, s)
    for got in roads if math.isfinite(level) else roads[:2]:
        assert_near(got, gradient, 16 * eps, 0)


FAR_APART = pytest.mark.parametrize(
    "row",
    [
        (1e7, 1e7, 0.0, 0.0),
        (-1e9, 0.25, -1e9, 2.0),
        (-1e9, -1e9, -1e9, -1e9 + 512),
        (1e10, -40.0, 1e10, 0.5),
        (3.0, -1e4, 1e4, 1e4),
    ],
)


@FAR_APART
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gamma", [0, 0.5, 2])
def test_rivals_far_above_share_the_gradient(gamma: float, dtype: torch.dtype, row: tuple[float, ...]) -> None:
    s, eps = torch.tensor(row, dtype=dtype), torch.finfo(dtype).eps
    with mp.workdps(60):
        scores = [mp.mpf(x) for x in s.tolist()]
        for t in range(4):
            others = [mp.exp(x - scores[t]) for i, x in enumerate(scores) if i != t]
            z = mp.log(mp.fsum(others))
            error = mp_sigmoid(z)
            push = error**gamma * (error + gamma * (1 - error) * mp_softplus(z))
            gradient = [push * mp.exp(x - scores[t]) / mp.fsum(others) for x in scores]
            gradient[t] = -push
            ours = partial(softmax_focal_loss, target=torch.tensor(t), gamma=gamma)
            assert_near(ours(s)[None], [error**gamma * mp_softplus(z)], 64 * eps, 1e-30)
            for got in row_gradients(ours, s):
                assert_near(got, gradient, 64 * eps, 1e-30)


@FAR_APART
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_far_classes_in_the_soft_form(dtype: torch.dtype, row: tuple[float, ...]) -> None:
    k, s, eps = 0.5, torch.tensor(row, dtype=dtype), torch.finfo(dtype).eps
    with mp.workdps(60):
        scores = [mp.mpf(x) for x in s.tolist()]
        for t in range(4):
            others = [mp.exp(x - scores[t]) if i != t else mp.mpf(0) for i, x in enumerate(scores)]
            turned = [mp.exp(k * (scores[t] - x)) if i != t else mp.mpf(0) for i, x in enumerate(scores)]
            z, r = mp.log(mp.fsum(others)), 1 / (1 + mp.fsum(turned))
            push, peak = r * mp_sigmoid(z), r * (1 - r) * k * mp_softplus(z)
            gradient = [
                push * a / mp.fsum(others) + peak * b / mp.fsum(turned) for a, b in zip(others, turned, strict=True)
            ]
            gradient[t] = -push - peak
            ours = partial(soft_truncated_cross_entropy, target=torch.tensor(t), sharpness=k)
            assert_near(ours(s)[None], [r * mp_softplus(z)], 64 * eps, 1e-30)
            for got in row_gradients(ours, s):
                assert_near(got, gradient, 64 * eps, 1e-25)


@pytest.mark.parametrize("k", [1e-35, 1e-28, 1e-20])
def test_a_tiny_sharpness_is_none(k: float) -> None:
    s, t = example(soft_truncated_cross_entropy)
    torch.testing.assert_close(
        soft_truncated_cross_entropy(s, t, sharpness=k), soft_truncated_cross_entropy(s, t, sharpness=0)
    )


def test_a_huge_sharpness_on_equal_scores() -> None:
    for level in (0.0, -1e30, 5.0):
        value = soft_truncated_cross_entropy(torch.full((3,), level), torch.tensor(0), sharpness=1e30)
        torch.testing.assert_close(value.item(), math.log(3) / 3)


def test_focal_and_soft_truncation_meet_at_one() -> None:
    s = torch.linspace(-30, 30, 201, dtype=torch.float64)
    for y in (torch.zeros(201), torch.ones(201)):
        torch.testing.assert_close(
            sigmoid_focal_loss(s, y, gamma=1, reduction="none"),
            soft_truncated_bce(s, y, sharpness=1, reduction="none"),
            rtol=1e-13,
            atol=0,
        )


def test_soft_truncation_approaches_the_hard_one() -> None:
    s = torch.tensor([-30.0, -1.0, -0.1, 0.0, 0.1, 1.0, 30.0])
    gap = []
    for k in (10, 100, 1e4, 1e38, 1e300):
        y = torch.tensor([0, 1, 0, 1, 1, 0, 1])
        x = s.clone().requires_grad_()
        soft, hard = soft_truncated_bce(x, y, sharpness=k, reduction="none"), hard_truncated_bce(x, y, reduction="none")
        gap.append((soft - hard).abs().max().item())
        (slope,) = torch.autograd.grad(soft.sum(), x)
        assert torch.isfinite(slope).all()
    assert gap[0] > gap[1] > gap[2]
    assert gap[2:] == [0, 0, 0]


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_torchvisions_formula_at_gamma_two(alpha: float | None) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(50, 7, dtype=torch.float64) * 3, torch.rand(50, 7, dtype=torch.float64)
    t[:25] = t[:25].round()
    s.requires_grad_()
    ours = sigmoid_focal_loss(s, t, alpha=alpha, reduction="none")
    theirs = torchvision_focal(s, t, 2.0, -1.0 if alpha is None else alpha)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    (a,), (b,) = torch.autograd.grad(ours.sum(), s), torch.autograd.grad(theirs.sum(), s)
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def test_where_the_published_formula_is_not_a_number() -> None:
    s, t = torch.tensor([100.0], requires_grad=True), torch.ones(1)
    (theirs,) = torch.autograd.grad(torchvision_focal(s, t, 0.5).sum(), s)
    assert torch.isnan(theirs).all()
    (ours,) = torch.autograd.grad(sigmoid_focal_loss(s, t, gamma=0.5), s)
    assert (ours == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gamma_zero_is_cross_entropy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(20, 5, dtype=dtype), torch.rand(20, 5, dtype=dtype)
    torch.testing.assert_close(sigmoid_focal_loss(s, t, gamma=0), F.binary_cross_entropy_with_logits(s, t))
    index, w = torch.randint(5, (20,)), torch.rand(5, dtype=dtype)
    torch.testing.assert_close(
        softmax_focal_loss(s, index, gamma=0, weight=w, reduction="sum"),
        F.cross_entropy(s, index, weight=w, reduction="sum"),
    )


def test_two_classes_are_one_difference() -> None:
    torch.manual_seed(0)
    s, index = torch.randn(30, 2, dtype=torch.float64) * 5, torch.randint(2, (30,))
    difference = s[:, 1] - s[:, 0]
    torch.testing.assert_close(
        softmax_focal_loss(s, index, gamma=1.5), sigmoid_focal_loss(difference, index, gamma=1.5)
    )
    torch.testing.assert_close(
        soft_truncated_cross_entropy(s, index, sharpness=2), soft_truncated_bce(difference, index, sharpness=2)
    )


def test_one_class_is_always_right() -> None:
    for loss in (softmax_focal_loss, soft_truncated_cross_entropy):
        s = torch.tensor([[3.0], [-1e4], [-1e9], [-1e30], [1e30], [-1e38], [INF], [-INF]])
        ours = partial(loss, target=torch.zeros(8, dtype=torch.long), reduction="none")
        assert (ours(s) == 0).all()
        for grad in row_gradients(ours, s):
            assert (grad == 0).all()


def test_class_weights_multiply_and_the_mean_counts_rows() -> None:
    torch.manual_seed(0)
    s, index, w = torch.randn(6, 3), torch.tensor([0, 1, 2, -100, 1, 0]), torch.tensor([1.0, 2.0, 4.0])
    each = softmax_focal_loss(s, index, reduction="none")
    weighted = softmax_focal_loss(s, index, weight=w, reduction="none")
    torch.testing.assert_close(weighted, each * torch.tensor([1.0, 2.0, 4.0, 1.0, 2.0, 1.0]))
    torch.testing.assert_close(softmax_focal_loss(s, index, weight=w), weighted.sum() / 5)


# ---------------------------------------------------------------------------------------------------------- conventions

BINARY_LOSSES = (hard_truncated_bce, soft_truncated_bce, sigmoid_focal_loss, asymmetric_loss)
ROW_LOSSES = (softmax_focal_loss, soft_truncated_cross_entropy)
ALL = (*BINARY_LOSSES, *ROW_LOSSES)


def example(loss: Callable[..., Tensor], shape: tuple[int, ...] = (6, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if loss in ROW_LOSSES:
        return s, torch.randint(shape[-1], shape[:-1], generator=generator)
    t = torch.rand(shape, generator=generator, dtype=torch.float64)
    return s, t if loss in (sigmoid_focal_loss, asymmetric_loss) else t.round()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [sigmoid_focal_loss, softmax_focal_loss])
def test_the_largest_exponent_gives_numbers(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s, t = example(loss)
    s, t = torch.cat([s, 10 * s, 1e4 * s]).to(dtype), torch.cat([t, t, t])
    for grad in row_gradients(lambda x: loss(x, t, gamma=1000), s):
        assert torch.isfinite(grad).all()
    assert torch.isfinite(loss(s, t, gamma=1000))
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0 and <= 1000, got 2e\\+38"):
        loss(s, t, gamma=2e38)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -0.5])
def test_class_weights_are_finite_and_not_negative(bad: float) -> None:
    w = torch.tensor([1.0, 0.0, bad, 2.0, 1.0], requires_grad=True)
    s, t = example(softmax_focal_loss)
    for made in (lambda: softmax_focal_loss(s, t, weight=w), lambda: SoftmaxFocalLoss(weight=w.detach())):
        with pytest.raises(ValueError, match=f"weight must hold finite numbers >= 0, got {bad:g}"):
            made()
    softmax_focal_loss(s, t, weight=w.detach().nan_to_num(0, 0, 0).clamp(min=0))


@pytest.mark.parametrize("loss", ALL)
def test_reductions(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (2, 3, 4))
    each = loss(s, t, reduction="none")
    assert each.shape == (s.shape[:-1] if loss in ROW_LOSSES else s.shape)
    torch.testing.assert_close(loss(s, t, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(s, t), each.mean())
    weights = torch.rand_like(each)
    x = s.clone().requires_grad_()
    (a,) = torch.autograd.grad((loss(x, t, reduction="none") * weights).sum(), x)
    b = torch.func.grad(lambda x: (loss(x, t, reduction="none") * weights).sum())(s)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", BINARY_LOSSES)
@pytest.mark.parametrize("piece", [1, 7])
def test_pieces_do_not_show(loss: Callable[..., Tensor], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = example(loss, (11, 5))
    s.requires_grad_()
    options = [{}, {"alpha": torch.linspace(0, 1, 5)}] if loss is sigmoid_focal_loss else [{}]
    for reduction in ("mean", "none"):
        for more in options:
            value = loss(s, t, reduction=reduction, **more)
            (grad,) = torch.autograd.grad(value.sum(), s)
            with monkeypatch.context() as patch:
                patch.setattr(fast, "numbers", lambda device, piece=piece: piece)
                again = loss(s, t, reduction=reduction, **more)
                (grad_again,) = torch.autograd.grad(again.sum(), s)
            torch.testing.assert_close(again, value)
            torch.testing.assert_close(grad_again, grad)


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("piece", [1, 22])
def test_pieces_of_soft_targets_do_not_show(
    loss: Callable[..., Tensor], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    s, _ = example(loss, (3, 11, 5))
    soft = torch.randn_like(s).softmax(-1)
    s = s.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    value = loss(s, soft, reduction="none")
    (grad,) = torch.autograd.grad(value.square().sum(), s)
    monkeypatch.setattr(fast, "numbers", lambda device, piece=piece: piece)
    again = loss(s, soft, reduction="none")
    (grad_again,) = torch.autograd.grad(again.square().sum(), s)
    torch.testing.assert_close(again, value, rtol=1e-14, atol=0)
    torch.testing.assert_close(grad_again, grad)


@pytest.mark.parametrize("loss", ALL)
def test_empty_batches_give_zero(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (0, 4))
    s.requires_grad_()
    for reduction in ("mean", "sum"):
        value = loss(s, t, reduction=reduction)
        (grad,) = torch.autograd.grad(value, s)
        assert value == 0
        assert grad.shape == (0, 4)
    assert loss(s, t, reduction="none").numel() == 0


@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_a_single_number(loss: Callable[..., Tensor]) -> None:
    value = loss(torch.tensor(-1.0), torch.tensor(1.0))
    assert value.shape == ()
    torch.testing.assert_close(value, loss(torch.tensor([-1.0]), torch.tensor([1.0])))


@pytest.mark.parametrize("loss", ROW_LOSSES)
@pytest.mark.parametrize("junk", [0.0, INF, -INF, NAN])
def test_ignored_rows_do_not_count(loss: Callable[..., Tensor], junk: float) -> None:
    s, t = example(loss)
    keep = torch.tensor([True, False, True, True, False, True])
    t = t.masked_fill(~keep, -7)
    s[~keep] = junk
    for transform in (False, True):
        for reduction in ("mean", "sum"):
            x = s.clone().requires_grad_()
            ours = partial(loss, ignore_index=-7, reduction=reduction)
            if transform:
                grad, value = torch.func.grad_and_value(ours)(s, t)
                second = torch.func.grad(lambda x, ours=ours: torch.func.grad(ours)(x, t).square().sum())(s)
            else:
                value = ours(x, t)
                (grad,) = torch.autograd.grad(value, x, create_graph=True)
                (second,) = torch.autograd.grad(grad.square().sum(), x)
            torch.testing.assert_close(value.detach(), loss(s[keep], t[keep], reduction=reduction))
            assert (grad[~keep] == 0).all()
            assert (second[~keep] == 0).all()
            assert torch.isfinite(second).all()
    assert (loss(s, t, ignore_index=-7, reduction="none")[~keep] == 0).all()


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_every_row_ignored_is_zero(loss: Callable[..., Tensor]) -> None:
    s = torch.randn(3, 4, requires_grad=True)
    value = loss(s, torch.full((3,), -100))
    value.backward()
    assert value == 0
    assert s.grad is not None
    assert (s.grad == 0).all()


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s, t = example(loss)
    s = s.to(dtype)
    s[0, 0], s[0, 1], s[1, 2] = 1e4, -1e4, 1e4
    x, wide = s.clone().requires_grad_(), s.float().requires_grad_()
    value, expected = (
        loss(x, t.to(dtype) if t.is_floating_point() else t),
        loss(wide, t.to(dtype).float() if t.is_floating_point() else t),
    )
    value.backward()
    expected.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert x.grad is not None
    assert wide.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, wide.grad.to(dtype))
    with torch.enable_grad():
        (followed,) = torch.autograd.grad(loss(x, t), x, create_graph=True)
    assert followed.dtype == dtype


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_infinite_scores_on_negatives(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s = torch.tensor([[-INF, 1.0, 2.0], [0.5, -INF, -INF]], dtype=dtype)
    t = torch.tensor([1, 0]) if loss in ROW_LOSSES else torch.tensor([[0, 1, 0], [1, 0, 0]])
    finite = s.clamp(min=-3e4)
    x = s.clone().requires_grad_()
    value = loss(x, t, reduction="none")
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value.detach(), loss(finite, t, reduction="none"))
    assert torch.isfinite(grad).all()
    assert (grad[torch.isinf(s)] == 0).all()
    again = torch.func.grad(lambda x: loss(x, t, reduction="sum"))(s)
    torch.testing.assert_close(again, grad)


@pytest.mark.parametrize("loss", BINARY_LOSSES[:3])
def test_infinite_scores_on_the_wrong_side_give_a_huge_finite_loss(loss: Callable[..., Tensor]) -> None:
    x = torch.tensor([-INF, INF], requires_grad=True)
    value = loss(x, torch.tensor([1, 0]), reduction="none")
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(value, torch.full((2,), 1e30))
    torch.testing.assert_close(grad, torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_large_scores_stay_finite(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=dtype)
    targets = (
        [torch.tensor([a, b]) for a in range(3) for b in range(3)]
        if loss in ROW_LOSSES
        else [torch.zeros(2, 3), torch.ones(2, 3)]
    )
    for t in targets:
        grad, value = torch.func.grad_and_value(lambda x, t=t: loss(x, t))(s)
        x = s.clone().requires_grad_()
        (lean,) = torch.autograd.grad(loss(x, t), x)
        assert torch.isfinite(value)
        assert value >= 0
        assert torch.isfinite(grad).all()
        torch.testing.assert_close(lean, grad)


@pytest.mark.parametrize("loss", ALL)
def test_gradients_by_finite_differences(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (3, 4))
    s.requires_grad_()
    for reduction in ("none", "mean"):
        ours = partial(loss, target=t, reduction=reduction)
        assert torch.autograd.gradcheck(ours, (s,), check_batched_grad=True)
        assert torch.autograd.gradgradcheck(ours, (s,), check_batched_grad=True)


@pytest.mark.parametrize("loss", ALL)
def test_targets_that_require_a_gradient_are_refused(loss: Callable[..., Tensor]) -> None:
    s = torch.randn(3, 4, requires_grad=True)
    soft = torch.full((3, 4), 0.25, requires_grad=True)
    with pytest.raises(ValueError, match=r"target must not require a gradient, pass target\.detach\(\)"):
        loss(s, soft)


def test_class_weights_may_carry_gradient() -> None:
    s, t = example(softmax_focal_loss)
    w = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: softmax_focal_loss(s, t, weight=w), (w,))
    soft = torch.randn_like(s).softmax(-1)
    assert torch.autograd.gradcheck(lambda w: softmax_focal_loss(s.requires_grad_(), soft, weight=w), (w,))


@pytest.mark.parametrize("loss", ALL)
def test_forward_mode(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    direction = torch.randn_like(s)
    expected = (torch.func.grad(lambda x: loss(x, t))(s) * direction).sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, direction)
        tangent = torch.autograd.forward_ad.unpack_dual(loss(dual, t)).tangent
    torch.testing.assert_close(tangent, expected)
    torch.testing.assert_close(torch.func.jvp(lambda x: loss(x, t), (s,), (direction,))[1], expected)


@pytest.mark.parametrize("loss", ALL)
def test_vmap(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (6, 5))
    rows = torch.stack([loss(a, b) for a, b in zip(s, t, strict=True)])
    torch.testing.assert_close(torch.vmap(loss)(s, t), rows)
    gradients = torch.vmap(torch.func.grad(loss))(s, t)
    expected = torch.stack([torch.func.grad(loss)(a, b) for a, b in zip(s, t, strict=True)])
    torch.testing.assert_close(gradients, expected)
    # over the targets alone
    many = torch.vmap(loss, in_dims=(None, 0))(s[0], t)
    torch.testing.assert_close(many, torch.stack([loss(s[0], b) for b in t]))


@pytest.mark.parametrize("loss", ALL)
def test_constant_scores_inside_a_transform(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    w = torch.tensor(2.0, dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(lambda w: w.square() * loss(s, t))(w), 4 * loss(s, t))


@pytest.mark.parametrize("loss", ALL)
def test_compile_without_a_break(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
    a, b = compiled(x, t), loss(y, t)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("loss", ALL)
def test_autocast(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    s, layer = s.float(), torch.nn.Linear(5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = layer(s)
        value = loss(scores, t)
    assert scores.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(scores.detach(), t))
    value.backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


@pytest.mark.parametrize("loss", ALL)
def test_strides_do_not_matter(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (4, 6))
    wide = torch.stack([s, torch.full_like(s, NAN)], -1)[..., 0]
    turned = s.t().contiguous().t()
    target = torch.stack([t, t], -1)[..., 0]
    expected = torch.func.grad(lambda x: loss(x, t))(s)
    for other in (wide, turned):
        assert not other.is_contiguous()
        x = other.detach().requires_grad_()
        value = loss(x, target)
        (grad,) = torch.autograd.grad(value, x)
        torch.testing.assert_close(value, loss(s, t))
        torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("loss", ALL)
def test_arguments_are_left_alone(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    before = s.clone(), t.clone()
    x = s.requires_grad_()
    value = loss(x, t)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x)
    assert torch.equal(first, again)
    assert torch.equal(s, before[0])
    assert torch.equal(t, before[1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_labels_of_any_dtype(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(loss(s, torch.tensor([1, 1, 0], dtype=dtype)), loss(s, torch.tensor([1.0, 1.0, 0.0])))
    assert loss(s, torch.tensor([1, 1, 0], dtype=dtype)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_indices_of_any_dtype(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s, t = example(loss)
    torch.testing.assert_close(loss(s, t.to(dtype), ignore_index=100), loss(s, t))


@pytest.mark.parametrize("loss", ALL)
def test_peak_memory_at_most_three_times_the_scores(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (500, 1000))
    t = t.float() if t.is_floating_point() else t
    assert peak_ratio(lambda x: loss(x, t), s.float()) <= 3


@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_the_mean_of_many_elements_needs_little_more_than_its_gradient(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (5000, 1000))
    t = t.float()
    assert peak_ratio(lambda x: loss(x, t), s.float()) <= 1.7


# --------------------------------------------------------------------------------- masks, alpha per label, soft targets


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 3.0])
@pytest.mark.parametrize("loss", BINARY_LOSSES)
def test_masked_elements_are_as_if_deleted(loss: Callable[..., Tensor], junk: float) -> None:
    s, t = example(loss)
    mask = torch.rand(s.shape) < 0.6
    s, t = s.masked_fill(~mask, junk), t.masked_fill(~mask, 7.0 if math.isfinite(junk) else NAN)
    for reduction in ("mean", "sum"):
        wanted = loss(s[mask], t[mask], reduction=reduction)
        kept = s[mask].requires_grad_()
        (push,) = torch.autograd.grad(loss(kept, t[mask], reduction=reduction), kept)
        x = s.clone().requires_grad_()
        value = loss(x, t, mask=mask, reduction=reduction)
        (first,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, allow_unused=True)
        torch.testing.assert_close(value, wanted)
        for grad in (first.detach(), torch.func.grad(lambda x, r=reduction: loss(x, t, mask=mask, reduction=r))(s)):
            torch.testing.assert_close(grad[mask], push)
            assert (grad[~mask] == 0).all()
        assert torch.isfinite(second).all()
    assert (loss(s, t, mask=mask, reduction="none")[~mask] == 0).all()
    assert loss(s, t, mask=torch.tensor(False)) == 0
    column = torch.tensor([True, True, False, True, False])
    s, t = example(loss)
    torch.testing.assert_close(loss(s, t, mask=column), loss(s[:, column], t[:, column]))


def test_alpha_may_be_one_value_per_label() -> None:
    s, t = example(sigmoid_focal_loss)
    alpha = torch.tensor([0.0, 1e-7, 0.25, 0.5, 1.0], dtype=torch.float64)
    for labels in (t, t.round()):
        columns = [
            sigmoid_focal_loss(s[:, i], labels[:, i], alpha=a, reduction="none") for i, a in enumerate(alpha.tolist())
        ]
        each = sigmoid_focal_loss(s, labels, alpha=alpha, reduction="none")
        torch.testing.assert_close(each, torch.stack(columns, -1), rtol=1e-12, atol=0)
        grads = row_gradients(lambda x, y=labels: sigmoid_focal_loss(x, y, alpha=alpha), s)
        torch.testing.assert_close(grads[0], grads[2])
        assert (grads[0][labels[:, 0] == 1][:, 0] == 0).all()
    torch.testing.assert_close(sigmoid_focal_loss(s, t, alpha=torch.tensor(0.25)), sigmoid_focal_loss(s, t, alpha=0.25))
    module = SigmoidFocalLoss(alpha=alpha)
    assert dict(module.named_buffers()).keys() == {"alpha"}
    torch.testing.assert_close(module(s, t), sigmoid_focal_loss(s, t, alpha=alpha))
    with pytest.raises(ValueError, match=r"alpha must have one value per class, shape \(5,\), got .* \(4,\)"):
        sigmoid_focal_loss(s, t, alpha=alpha[:4])
    with pytest.raises(ValueError, match="alpha must not require a gradient"):
        sigmoid_focal_loss(s, t, alpha=alpha.clone().requires_grad_())


SOFT_ROWS = [pytest.param(partial(softmax_focal_loss, gamma=g), id=f"focal-{g}") for g in (0.0, 0.5, 2.0)] + [
    pytest.param(partial(soft_truncated_cross_entropy, sharpness=k), id=f"soft-{k}") for k in (0.0, 0.5, 1.0, 3.0)
]


@pytest.mark.parametrize("loss", SOFT_ROWS)
def test_a_soft_target_weighs_the_losses_of_the_classes(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    for scale in (1.0, 20.0, 60.0):
        s = torch.randn(7, 5, dtype=torch.float64) * scale
        soft = torch.randn(7, 5, dtype=torch.float64).softmax(-1)
        soft[0] = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0])

        def by_class(x: Tensor, soft: Tensor = soft) -> Tensor:
            return sum(soft[:, c] * loss(x, torch.full((7,), c), reduction="none") for c in range(5))

        torch.testing.assert_close(loss(s, soft, reduction="none"), by_class(s), rtol=1e-12, atol=0)
        torch.testing.assert_close(loss(s, soft), by_class(s).mean(), rtol=1e-12, atol=0)
        wanted = torch.func.grad(lambda x: by_class(x).sum())(s)
        for grad in row_gradients(lambda x, soft=soft: loss(x, soft, reduction="none"), s):
            torch.testing.assert_close(grad, wanted, rtol=1e-11, atol=1e-13)
        ours = torch.func.hessian(lambda x, soft=soft: loss(x, soft, reduction="sum"))(s)
        torch.testing.assert_close(ours, torch.func.hessian(lambda x: by_class(x).sum())(s), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_classes_in_another_dimension(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss, (3, 2, 4, 5))
    picture = s.movedim(-1, 1).contiguous()
    x = picture.clone().requires_grad_()
    value = loss(x, t, dim=1, reduction="none")
    torch.testing.assert_close(value, loss(s, t, reduction="none"))
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(grad.movedim(1, -1), torch.func.grad(lambda x: loss(x, t, reduction="sum"))(s))
    soft = torch.randn_like(s).softmax(-1)
    torch.testing.assert_close(loss(picture, soft.movedim(-1, 1), dim=1), loss(s, soft))
    with pytest.raises(ValueError, match=r"dim must name a dimension of input, in \[-4, 4\), got 4"):
        loss(picture, t, dim=4)


@pytest.mark.parametrize("loss", ALL)
def test_unreduced_losses_can_be_edited_in_place(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    w = torch.rand(loss(s, t, reduction="none").shape, dtype=s.dtype)
    x = s.clone().requires_grad_()
    each = loss(x, t, reduction="none")
    each *= w
    each[w < 0.5] = 0
    (grad,) = torch.autograd.grad(each.sum(), x)
    w = w.masked_fill(w < 0.5, 0)
    torch.testing.assert_close(grad, torch.func.grad(lambda x: (loss(x, t, reduction="none") * w).sum())(s))


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, asymmetric_loss])
def test_labels_that_rounding_left_outside_are_clamped(loss: Callable[..., Tensor]) -> None:
    s = torch.tensor([1.0, -2.0, 30.0, -40.0])
    t = torch.tensor([1.0, 0.0, 1.0, 0.0])
    rounded = torch.tensor([1.00009, -0.00009, 1.0000001, -1e-7])
    torch.testing.assert_close(loss(s, rounded), loss(s, t))
    torch.testing.assert_close(torch.vmap(loss)(s, rounded), torch.vmap(loss)(s, t))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s, rounded), loss(s, t))
    with pytest.raises(ValueError, match=r"target must be labels in \[0, 1\]"):
        loss(s, t + 2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_derivatives_at_sure_scores(dtype: torch.dtype) -> None:
    s = torch.tensor([12.0, 17.0, 30.0, 60.0, 80.0], dtype=dtype)
    curve = torch.func.vmap(torch.func.hessian(lambda x: sigmoid_focal_loss(x, torch.ones_like(x), gamma=0)))
    rows = torch.stack([s, torch.zeros_like(s)], -1)
    of_rows = torch.func.vmap(torch.func.hessian(lambda x: softmax_focal_loss(x, torch.tensor(0), gamma=0)))
    wanted = [mp_sigmoid(mp.mpf(x)) * mp_sigmoid(-mp.mpf(x)) for x in s.tolist()]
    assert_near(curve(s), wanted, 8 * torch.finfo(dtype).eps, 0)
    assert_near(of_rows(rows)[:, 0, 0], wanted, 8 * torch.finfo(dtype).eps, 0)


def test_a_root_of_a_tiny_error() -> None:
    value = sigmoid_focal_loss(torch.tensor(50.0), torch.tensor(1.0), gamma=0.5)
    assert_near(value[None], [mp_sigmoid_focal(mp.mpf(50), 1, 0.5)], 4e-7, 0)


@pytest.mark.parametrize("loss", ALL)
def test_a_trace_computes_the_loss(loss: Callable[..., Tensor]) -> None:
    s, t = example(loss)
    traced = torch.jit.trace(lambda s: loss(s, t), (s,))
    torch.testing.assert_close(traced(2 * s), loss(2 * s, t))


def test_options_may_be_scalars_of_numpy_and_torch() -> None:
    s, t = example(sigmoid_focal_loss)
    torch.testing.assert_close(
        sigmoid_focal_loss(s, t, gamma=np.float32(1.5), alpha=torch.tensor(0.25)),
        sigmoid_focal_loss(s, t, gamma=1.5, alpha=0.25),
    )


# -------------------------------------------------------------------------------------------------------------- modules

MODULES = [
    (HardTruncatedBce, hard_truncated_bce, {"margin": 0.6, "reduction": "sum"}, "margin=0.6, reduction='sum'"),
    (SoftTruncatedBce, soft_truncated_bce, {"sharpness": 3.0, "reduction": "sum"}, "sharpness=3, reduction='sum'"),
    (
        SigmoidFocalLoss,
        sigmoid_focal_loss,
        {"gamma": 0.5, "alpha": 0.25, "reduction": "none"},
        "gamma=0.5, alpha=0.25, reduction='none'",
    ),
    (
        AsymmetricLoss,
        asymmetric_loss,
        {"gamma_neg": 2.0, "gamma_pos": 0.5, "clip": 0.1, "detach_weight": True, "reduction": "sum"},
        "gamma_neg=2, gamma_pos=0.5, clip=0.1, detach_weight=True, reduction='sum'",
    ),
    (
        SoftmaxFocalLoss,
        softmax_focal_loss,
        {"gamma": 1.0, "weight": torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), "ignore_index": 2, "reduction": "sum"},
        "gamma=1, weight=float32 tensor of shape (5,), ignore_index=2, dim=-1, reduction='sum'",
    ),
    (
        SoftTruncatedCrossEntropy,
        soft_truncated_cross_entropy,
        {"sharpness": 0.5, "ignore_index": 1, "reduction": "none"},
        "sharpness=0.5, ignore_index=1, dim=-1, reduction='none'",
    ),
]


@pytest.mark.parametrize(("module", "loss", "options", "shown"), MODULES)
def test_modules_are_the_functions(
    module: type[torch.nn.Module], loss: Callable[..., Tensor], options: dict[str, object], shown: str
) -> None:
    s, t = example(loss)
    torch.testing.assert_close(module(**options)(s, t), loss(s, t, **options))
    torch.testing.assert_close(module()(s, t), loss(s, t))
    assert repr(module(**options)) == f"{module.__name__}({shown})"
    with pytest.raises(ValueError, match="reduction must be one of"):
        module(reduction="avg")


@pytest.mark.parametrize(
    ("module", "lowest"),
    [(SigmoidFocalLoss, {"gamma": 0.0}), (SoftmaxFocalLoss, {"gamma": 0.0}), (SigmoidFocalLoss, {"alpha": 0.0})],
)
def test_modules_take_the_lowest_value_of_an_option(module: type[torch.nn.Module], lowest: dict[str, float]) -> None:
    loss = sigmoid_focal_loss if module is SigmoidFocalLoss else softmax_focal_loss
    s, t = example(loss)
    torch.testing.assert_close(module(**lowest)(s, t), loss(s, t, **lowest))


@pytest.mark.parametrize("loss", [softmax_focal_loss, soft_truncated_cross_entropy])
def test_one_class_costs_nothing_also_beside_an_ignored_row(loss: Callable[..., Tensor]) -> None:
    """The index that stands in for an ignored row must exist, even if there is one class only."""
    s = torch.randn(3, 1, requires_grad=True)
    value = loss(s, torch.tensor([0, -100, 0]), reduction="none")
    value.sum().backward()
    assert value.tolist() == [0, 0, 0]
    assert s.grad is not None
    assert s.grad.tolist() == [[0], [0], [0]]


def test_class_weights_are_a_buffer() -> None:
    module = SoftmaxFocalLoss(weight=torch.ones(3))
    assert dict(module.named_buffers()).keys() == {"weight"}
    assert not list(module.parameters())
    assert module.double().weight is not None
    assert module.weight.dtype == torch.float64
    assert "weight=None" in repr(SoftmaxFocalLoss())


# --------------------------------------------------------------------------------------------------------------- errors

S, Y, T = torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
REAL = "input must be float16, bfloat16, float32 or float64"
ERRORS = [
    *((loss, (S.int(), Y), {}, TypeError, f"{REAL}, got int32 tensor of shape \\(2, 3\\)") for loss in BINARY_LOSSES),
    *((loss, (None, T), {}, TypeError, "input must be a tensor of scores, got NoneType None") for loss in ALL),
    *((loss, (S.long(), T), {}, TypeError, f"{REAL}, got int64 tensor") for loss in ROW_LOSSES),
    *(
        (loss, (S, Y[0]), {}, ValueError, r"target must have the shape of input, \(2, 3\), got float32 .* \(3,\)")
        for loss in BINARY_LOSSES
    ),
    *(
        (loss, (S, [0]), {}, TypeError, r"target must be a tensor of labels, got list; pass torch.as_tensor")
        for loss in BINARY_LOSSES
    ),
    *(
        (loss, (S, Y + 0j), {}, TypeError, "target must be labels of a real dtype, got complex64")
        for loss in BINARY_LOSSES
    ),
    *((loss, (S, Y + 1.5), {}, ValueError, r"target must be .*, got 1\.5") for loss in BINARY_LOSSES),
    *((loss, (S, Y - 1), {}, ValueError, r"target must be .*, got -1\.0") for loss in BINARY_LOSSES),
    *((loss, (S, Y.int() + 2), {}, ValueError, r"target must be .*, got 2") for loss in BINARY_LOSSES),
    *((loss, (S, Y * NAN), {}, ValueError, r"target must be .*, got nan") for loss in BINARY_LOSSES),
    *((loss, (S, Y + 0.5), {}, ValueError, r"target must be 0 or 1, got 0\.5") for loss in BINARY_LOSSES[:2]),
    *(
        (loss, (S, Y if loss in BINARY_LOSSES else T), {"reduction": "avg"}, ValueError, "got str 'avg'")
        for loss in ALL
    ),
    *((loss, (S[0, 0], T[0]), {}, ValueError, "input must have at least one dimension") for loss in ROW_LOSSES),
    *((loss, (S[:, :0], T), {}, ValueError, r"at least one class, got float32 .* \(2, 0\)") for loss in ROW_LOSSES),
    *(
        (loss, (S, T + 3), {}, ValueError, r"class indices in \[0, 3\) or ignore_index=-100, got 3")
        for loss in ROW_LOSSES
    ),
    *(
        (loss, (S, T - 1), {}, ValueError, r"class indices in \[0, 3\) or ignore_index=-100, got -1")
        for loss in ROW_LOSSES
    ),
    *((loss, (S, T[:1]), {}, ValueError, r"shape of the rows, \(2,\) .*, got int64 .* \(1,\)") for loss in ROW_LOSSES),
    *(
        (loss, (S, Y[:, 0]), {}, ValueError, r"target must have the shape of input, \(2, 3\), got float32")
        for loss in ROW_LOSSES
    ),
    (hard_truncated_bce, (S, Y), {"margin": 1.1}, ValueError, "margin must be a finite number >= 0 and <= 1, got 1.1"),
    (hard_truncated_bce, (S, Y), {"margin": -0.1}, ValueError, "margin must be a finite number"),
    (hard_truncated_bce, (S, Y), {"margin": "x"}, TypeError, "margin must be a number, got str 'x'"),
    (soft_truncated_bce, (S, Y), {"sharpness": -1}, ValueError, "sharpness must be a finite number >= 0, got -1"),
    (soft_truncated_bce, (S, Y), {"sharpness": INF}, ValueError, "sharpness must be a finite number >= 0, got inf"),
    (sigmoid_focal_loss, (S, Y), {"gamma": -1}, ValueError, "gamma must be a finite number >= 0 and <= 1000, got -1"),
    (sigmoid_focal_loss, (S, Y), {"gamma": None}, TypeError, "gamma must be a number, got NoneType None"),
    (sigmoid_focal_loss, (S, Y), {"alpha": 2}, ValueError, "alpha must be a finite number >= 0 and <= 1, got 2"),
    (sigmoid_focal_loss, (S, Y), {"alpha": -1}, ValueError, "alpha must be a finite number >= 0 and <= 1, got -1"),
    (
        softmax_focal_loss,
        (S, T),
        {"gamma": -0.5},
        ValueError,
        "gamma must be a finite number >= 0 and <= 1000, got -0.5",
    ),
    (
        softmax_focal_loss,
        (S, T),
        {"weight": torch.ones(2)},
        ValueError,
        r"weight must have one value per class, shape \(3,\), got float32 tensor of shape \(2,\)",
    ),
    (softmax_focal_loss, (S, T), {"weight": torch.ones(3, 1)}, ValueError, r"shape \(3,\), got float32 .* \(3, 1\)"),
    (softmax_focal_loss, (S, T), {"weight": T}, TypeError, "weight must be a floating tensor .*, got int64 tensor"),
    (softmax_focal_loss, (S, T), {"weight": [1, 2, 3]}, TypeError, "got list$"),
    (soft_truncated_cross_entropy, (S, T), {"sharpness": -2}, ValueError, "sharpness must be a finite number >= 0"),
]


@pytest.mark.parametrize(("loss", "arguments", "options", "error", "message"), ERRORS)
def test_errors_name_the_argument(
    loss: Callable[..., Tensor],
    arguments: tuple[object, ...],
    options: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        loss(*arguments, **options)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (HardTruncatedBce, {"margin": 2}, "margin must be a finite number"),
        (HardTruncatedBce, {"margin": -0.5}, "margin must be a finite number"),
        (SoftTruncatedBce, {"sharpness": -1}, "sharpness must be a finite number"),
        (SigmoidFocalLoss, {"gamma": -1}, "gamma must be a finite number"),
        (SigmoidFocalLoss, {"alpha": 1.5}, "alpha must be a finite number"),
        (SigmoidFocalLoss, {"alpha": torch.tensor([0.5, 1.5])}, r"alpha must hold numbers in \[0, 1\], got 1\.5"),
        (AsymmetricLoss, {"gamma_neg": -1}, "gamma_neg must be a finite number"),
        (AsymmetricLoss, {"gamma_pos": -1}, "gamma_pos must be a finite number"),
        (AsymmetricLoss, {"clip": 1}, "clip must be a finite number >= 0 and < 1, got 1"),
        (SoftmaxFocalLoss, {"gamma": -1}, "gamma must be a finite number"),
        (SoftmaxFocalLoss, {"weight": torch.ones(2, 2)}, r"weight must have one value per class, shape \(C,\)"),
        (SoftTruncatedCrossEntropy, {"sharpness": -1}, "sharpness must be a finite number"),
    ],
)
def test_modules_check_when_they_are_made(
    module: type[torch.nn.Module], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        module(**options)


# ----------------------------------------------------------------------------------------------------------- properties

score = st.floats(-50, 50, width=32)
label = st.floats(0, 1, width=32)
power = st.floats(0, 6)


@settings(deadline=None, max_examples=60)
@given(s=score, t=label, gamma=power)
def test_focal_is_symmetric_and_at_most_cross_entropy(s: float, t: float, gamma: float) -> None:
    x = torch.tensor([s], dtype=torch.float64)
    y = torch.tensor([t], dtype=torch.float64)
    value = sigmoid_focal_loss(x, y, gamma=gamma)
    assert 0 <= value <= sigmoid_focal_loss(x, y, gamma=0) * (1 + 1e-12)
    torch.testing.assert_close(value, sigmoid_focal_loss(-x, 1 - y, gamma=gamma), rtol=1e-9, atol=1e-30)


@settings(deadline=None, max_examples=60)
@given(s=st.lists(score, min_size=2, max_size=6), shift=st.floats(-20, 20), gamma=power, k=power)
def test_softmax_forms_ignore_a_common_shift(s: list[float], shift: float, gamma: float, k: float) -> None:
    x, t = torch.tensor(s, dtype=torch.float64), torch.tensor(len(s) - 1)
    for loss in (partial(softmax_focal_loss, gamma=gamma), partial(soft_truncated_cross_entropy, sharpness=k)):
        torch.testing.assert_close(loss(x + shift, t), loss(x, t), rtol=1e-9, atol=1e-12)
        assert loss(x, t) >= 0


@settings(deadline=None, max_examples=60)
@given(s=score, m=st.floats(0, 1), y=st.integers(0, 1))
def test_hard_truncation_is_cross_entropy_or_nothing(s: float, m: float, y: int) -> None:
    x, t = torch.tensor([s], dtype=torch.float64), torch.tensor([y])
    p_t = torch.sigmoid(x if y else -x).item()
    if math.isclose(p_t, m, rel_tol=1e-9):
        return
    ce = sigmoid_focal_loss(x, t, gamma=0)
    torch.testing.assert_close(hard_truncated_bce(x, t, margin=m), ce if p_t < m else torch.zeros_like(ce))


def test_the_values_of_class_weights_are_looked_at_only_where_there_are_any() -> None:
    with FakeTensorMode():
        s, weight = torch.randn(2, 3), torch.full((3,), -1.0)
        loss = softmax_focal_loss(s, torch.zeros(2, dtype=torch.long), weight=weight, reduction="none")
    assert loss.shape == (2,)


def test_the_first_bad_class_weight_is_named() -> None:
    weight = torch.tensor([1.0, -2.0, -3.0])
    with pytest.raises(ValueError, match=r"weight must hold finite numbers >= 0, got -2$"):
        softmax_focal_loss(torch.zeros(1, 3), torch.tensor([0]), weight=weight)
