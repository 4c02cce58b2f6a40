"""Expected accuracy against closed forms, brute force and high precision, and every convention of the interface."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import mpmath as mp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes, peak_ratio
from scipy import special, stats
from torch import Tensor
from torch.autograd import forward_ad

from lossbook._fast import accuracy as fast
from lossbook.accuracy import (
    ExactLoss,
    ExpectedAccuracy,
    LogExpectedAccuracy,
    SoftAccuracyLoss,
    exact_loss,
    expected_accuracy,
    log_expected_accuracy,
    soft_accuracy_loss,
)

INF, NAN = float("inf"), float("nan")
HALVES = (torch.float16, torch.bfloat16)
SIGMAS = (0.01, 0.3, 1.0, 7.0, 100.0)
LOSSES = [
    pytest.param(exact_loss, id="exact"),
    pytest.param(partial(exact_loss, log=True, sigma=0.7), id="log"),
    pytest.param(soft_accuracy_loss, id="soft"),
]
# what a rule with 32 nodes may leave in float64, and what rounding adds in float32
NEAR = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 2e-6, "atol": 1e-6}}


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with mp.workdps(30):
        yield


def rows(n: int, classes: int, *, spread: float = 1.5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Random scores that require a gradient, and targets."""
    s = (torch.randn(n, classes, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    return s, torch.randint(classes, (n,))


# ---------------------------------------------------------------------------------------------------------- references


def fine_log_p(s: np.ndarray, t: int, sigma: float) -> float:
    """log P by a fine uniform grid over all that counts of the integrand."""
    d = (s[t] - np.delete(s, t)) / sigma

    def log_integrand(z: np.ndarray) -> np.ndarray:
        products = np.concatenate([special.log_ndtr(part[:, None] + d).sum(-1) for part in np.array_split(z, 40)])
        return products - z * z / 2 - math.log(2 * math.pi) / 2

    z = np.linspace(-45, max(45, -1.1 * d.min()), 1201)
    g = log_integrand(z)
    inside = np.flatnonzero(g > g.max() - 60)
    z = np.linspace(z[max(inside[0] - 1, 0)], z[min(inside[-1] + 1, len(z) - 1)], 4001)
    return float(special.logsumexp(log_integrand(z)) + math.log(z[1] - z[0]))


@functools.cache
def mp_log_p(margins: tuple[float, ...]) -> mp.mpf:
    """log P for these margins in units of sigma."""
    counts = Counter(margins)

    def integrand(z: mp.mpf) -> mp.mpf:
        return mp.npdf(z) * mp.fprod(mp.ncdf(z + d) ** n for d, n in counts.items())

    return mp.log(mp.quad(integrand, [mp.mpf(k) / 2 for k in range(2 * int(9 - min(margins)))]))


def three_classes(d_1: Tensor, d_2: Tensor) -> tuple[Tensor, Tensor]:
    """dP/dd_1 and dP/dd_2 for two rivals: the density of one meeting the target, times the other losing given that."""

    def slope(a: Tensor, b: Tensor) -> Tensor:
        density = torch.exp(-a * a / 4) / math.sqrt(4 * math.pi)
        return density * torch.special.ndtr((b - a / 2) / math.sqrt(1.5))

    return slope(d_1, d_2), slope(d_2, d_1)


# ------------------------------------------------------------------------------------------------- the value of P


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_two_classes_are_the_normal_distribution(sigma: float, dtype: torch.dtype) -> None:
    margins = torch.linspace(-60, 60, 241, dtype=torch.float64)
    s = torch.stack([margins * sigma, torch.zeros_like(margins)], -1).to(dtype)
    exact = torch.special.log_ndtr((s[:, 0] - s[:, 1]).double() / (sigma * math.sqrt(2)))
    t = torch.zeros(len(s), dtype=torch.long)
    torch.testing.assert_close(log_expected_accuracy(s, t, sigma=sigma).double(), exact, **NEAR[dtype])
    torch.testing.assert_close(expected_accuracy(s, t, sigma=sigma).double(), exact.exp(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_three_classes_are_a_bivariate_orthant(sigma: float) -> None:
    s, t = rows(12, 3, spread=2)
    cov = np.array([[2.0, 1.0], [1.0, 2.0]])
    for row, target, p in zip(s.tolist(), t.tolist(), expected_accuracy(s, t, sigma=sigma).tolist(), strict=True):
        d = [(row[target] - x) / sigma for i, x in enumerate(row) if i != target]
        assert p == pytest.approx(stats.multivariate_normal.cdf(d, cov=cov, abseps=1e-10), abs=1e-7)


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 3000])
@pytest.mark.parametrize("sigma", SIGMAS)
def test_the_targets_share_one(classes: int, sigma: float) -> None:
    s = torch.randn(classes, dtype=torch.float64) * 2
    t = torch.arange(classes)
    some = t if classes <= 100 else s.argsort(descending=True)[:64]
    p = expected_accuracy(s.expand(len(some), classes), some, sigma=sigma)
    if len(some) == classes:
        torch.testing.assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-8)
    assert p.sum() <= 1 + 1e-8
    assert (p >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("classes", [2, 3, 17, 1000, 100_000])
def test_equal_scores_share_equally(classes: int, dtype: torch.dtype) -> None:
    s = torch.full((1, classes), 3.0, dtype=dtype)
    got = log_expected_accuracy(s, torch.tensor([classes // 2]), sigma=0.2)
    torch.testing.assert_close(got.item(), -math.log(classes), **NEAR[dtype])


@pytest.mark.parametrize("sigma", [0.4, 3.0])
def test_a_million_draws_agree(sigma: float) -> None:
    s = torch.randn(6, dtype=torch.float64)
    n = 1_000_000
    share = torch.bincount((s.float() + sigma * torch.randn(n, 6)).argmax(-1), minlength=6).double() / n
    p = expected_accuracy(s.expand(6, 6), torch.arange(6), sigma=sigma)
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize(("loc", "own"), [(0.0, 0.0), (3.0, 3.0), (0.0, 3.0), (3.0, 0.0)])
def test_a_thousand_classes(loc: float, own: float, sigma: float) -> None:
    s = torch.randn(6, 1000, dtype=torch.float64) + loc
    s[:, 0] += own - loc
    t = torch.zeros(6, dtype=torch.long)
    wanted = [fine_log_p(row.numpy(), 0, sigma) for row in s]
    got = log_expected_accuracy(s, t, sigma=sigma)
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=2e-8)
    single = log_expected_accuracy(s.float(), t, sigma=sigma)
    np.testing.assert_allclose(single.double().numpy(), wanted, rtol=2e-6, atol=2e-6)


# margins in units of sigma where one width does not fit all: near and far rivals at once, walls, groups
UNEVEN = [
    [-1.0] + [3.0] * 998,
    [-3.0] + [3.0] * 998,
    [4.0] * 300,
    [3.0] * 999,
    [-20.0, -20.0] + [2.0] * 500,
    [-20.0, -19.0, -5.0, 0.0, 8.0],
    [50.0] * 9 + [-50.0],
    list(np.random.default_rng(0).normal(4, 0.5, 300)),
    list(np.random.default_rng(1).normal(0, 30, 99)),
    list(np.random.default_rng(2).normal(0, 100, 999)),
    list(np.random.default_rng(3).standard_cauchy(300) * 3),
]


@pytest.mark.parametrize("margins", UNEVEN, ids=range(len(UNEVEN)))
def test_uneven_margins(margins: list[float]) -> None:
    s = np.array([0.0, *(-d for d in margins)])
    wanted = fine_log_p(s, 0, 1.0)
    for nodes, bound in ((16, 1e-4), (32, 1e-7), (64, 1e-9)):
        got = log_expected_accuracy(torch.from_numpy(s), torch.tensor(0), nodes=nodes).item()
        assert got == pytest.approx(wanted, abs=bound, rel=1e-12)


TAILS = [
    (-33.0,),
    (-24.0,) * 3,
    (-17.0, -16.0, -21.0, 4.0),
    (-25.0, 9.0, -11.0),
    (-3.0,) * 60,
    (-25.5,) * 9,
    (-34.0, -8.0),
]


@pytest.mark.parametrize("margins", TAILS, ids=range(len(TAILS)))
def test_the_far_tail(margins: tuple[float, ...]) -> None:
    wanted = float(mp_log_p(margins))
    for dtype, rel in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        s = torch.tensor([0.0, *(-d for d in margins)], dtype=dtype)
        assert log_expected_accuracy(s, torch.tensor(0)).item() == pytest.approx(wanted, rel=rel)


def test_the_tails_above_reach_three_hundred() -> None:
    assert min(mp_log_p(margins) for margins in TAILS) < -280


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("margin", [-1e3, -1e4, -1e6, -1e9])
@pytest.mark.parametrize("rivals", [1, 4])
def test_a_hopeless_target_keeps_a_finite_logarithm_and_slope(rivals: int, margin: float, dtype: torch.dtype) -> None:
    """Where Phi is its tail the integrand is a Gaussian: log P = -rivals d^2 / (2 rivals + 2) to leading order."""
    s = torch.tensor([margin] + [0.0] * rivals, dtype=dtype, requires_grad=True)
    log_p = log_expected_accuracy(s, torch.tensor(0))
    assert log_p.item() == pytest.approx(-rivals * margin**2 / (2 * rivals + 2), rel=1e-4)
    (g,) = torch.autograd.grad(log_p, s)
    rel = 1e-3 if dtype == torch.float32 else 1e-5
    assert g[0].item() == pytest.approx(-rivals * margin / (rivals + 1), rel=rel)
    torch.testing.assert_close(g[1:], -(g[0] / rivals).expand(rivals), rtol=rel, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_left_to_lose(dtype: torch.dtype) -> None:
    s = torch.tensor([[300.0, 0.0, -1.0], [40.0, -INF, -INF], [1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    t = torch.zeros(3, dtype=torch.long)
    log_p = log_expected_accuracy(s, t)
    assert (log_p <= 0).all()
    assert (log_p > -3e-7).all()
    (g,) = torch.autograd.grad(log_p.sum(), s)
    assert g.count_nonzero() == 0


@pytest.mark.parametrize("road", ["eager", "func"])
def test_an_infinite_loss_is_infinite_and_has_a_finite_slope(road: str) -> None:
    s = torch.tensor([[-INF, 0.0, 1.0], [0.0, INF, 1.0], [0.0, 1.0, 2.0]])
    t = torch.zeros(3, dtype=torch.long)

    def total(s: Tensor) -> Tensor:
        return exact_loss(s, t, reduction="sum")

    if road == "eager":
        log_p, p = log_expected_accuracy(s, t), expected_accuracy(s, t)
        leaf = s.clone().requires_grad_()
        (g,) = torch.autograd.grad(total(leaf), leaf)
    else:
        log_p, p = torch.vmap(log_expected_accuracy)(s, t), torch.vmap(expected_accuracy)(s, t)
        g = torch.func.grad(total)(s)
    assert log_p[:2].tolist() == [-INF, -INF]
    assert p[:2].tolist() == [0, 0]
    assert p[2] > 0
    assert g.isfinite().all()
    assert g[:2].count_nonzero() == 0


LOST = [[0.0, INF, 1.0], [-INF, 0.0, 1.0], [0.0, 1e16, 1.0], [0.0, 1e15, 1.0]]
SPOILED = [[NAN, 0.0, 1.0], [0.0, NAN, 1.0], [INF, INF, 0.0], [-INF, 1.0, -INF]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lost_rows_have_no_slope_on_either_road(dtype: torch.dtype) -> None:
    """The loss is infinite and constant there: every finite change of the scores leaves it so."""
    t = torch.zeros(5, dtype=torch.long)
    s = torch.tensor([*LOST, [0.0, 9e14, 1.0]], dtype=dtype, requires_grad=True)

    def total(s: Tensor) -> Tensor:
        return exact_loss(s, t, log=True, reduction="none")[:4].sum() + log_expected_accuracy(s, t)[4]

    assert exact_loss(s, t, log=True, reduction="none")[:4].tolist() == [INF] * 4
    (g,) = torch.autograd.grad(total(s), s, create_graph=True)
    wanted = torch.tensor([4.5e14, -4.5e14, 0.0], dtype=dtype)  # log P is -d^2 / 4 far out: not lost yet
    torch.testing.assert_close(g[4].detach(), wanted, rtol=1e-4, atol=1e-3)
    assert g[:4].count_nonzero() == 0
    (h,) = torch.autograd.grad((g[:4] * torch.tensor([1.0, -2.0, 3.0])).sum(), s)
    assert h.count_nonzero() == 0
    f = torch.func.grad(total)(s.detach())
    torch.testing.assert_close(f, g.detach(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("loss", "row"),
    [(f, row) for f in (exact_loss, partial(exact_loss, log=True, sigma=0.7)) for row in SPOILED]
    + [(soft_accuracy_loss, row) for row in SPOILED[:2]],  # to soft accuracy equal infinities are equal scores
)
def test_a_row_without_meaning_is_nan_with_its_whole_gradient(loss: Callable[..., Tensor], row: list[float]) -> None:
    s, t = torch.tensor([row, [0.5, 1.0, 0.0]], dtype=torch.float64), torch.tensor([0, 1])
    leaf = s.clone().requires_grad_()
    each = loss(leaf, t, reduction="none")
    assert each.isnan().tolist() == [True, False]
    (g,) = torch.autograd.grad(each.sum(), leaf)
    f = torch.func.grad(lambda s: loss(s, t, reduction="sum"))(s)
    clean = torch.func.grad(lambda s: loss(s, t[1]))(s[1])
    for gradient in (g, f):
        assert gradient[0, s[0].isnan()].isnan().all()
        assert gradient[0, 0].isnan()
        torch.testing.assert_close(gradient[1], clean)


def test_one_class_is_always_right() -> None:
    s = torch.tensor([[3.0], [-INF], [NAN]], requires_grad=True)
    t = torch.zeros(3, dtype=torch.long)
    for f, wanted in ((expected_accuracy, 1), (log_expected_accuracy, 0)):
        p = f(s, t)
        assert p.tolist() == [wanted] * 3
        assert torch.autograd.grad(p.sum(), s)[0].tolist() == [[0]] * 3
    for loss in (exact_loss, partial(exact_loss, log=True), soft_accuracy_loss):
        value = loss(s, t)
        assert str(value.item()) == "0.0"
        assert torch.autograd.grad(value, s)[0].tolist() == [[0]] * 3


# ------------------------------------------------------------------------------------------------------- derivatives


def eager_derivatives(f: Callable[[Tensor], Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    s = s.clone().requires_grad_()
    (plain,) = torch.autograd.grad(f(s), s)
    (first,) = torch.autograd.grad(f(s), s, create_graph=True)
    torch.testing.assert_close(first.detach(), plain, rtol=1e-9, atol=1e-11)  # the sweep and the formula
    second = torch.stack([torch.autograd.grad(x, s, retain_graph=True)[0] for x in first])
    return first.detach(), second


def func_derivatives(f: Callable[[Tensor], Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.grad(f)(s), torch.func.hessian(f)(s)


ROADS = [eager_derivatives, func_derivatives]


@pytest.mark.parametrize("derivatives", ROADS)
@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("s", [(0.3, -0.2, 1.1), (2.0, -1.0, -3.0), (-3.0, 2.0, 1.0), (0.0, 0.0, 0.0)])
def test_three_classes_to_the_second_derivative(
    s: tuple[float, ...], sigma: float, derivatives: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    scores = torch.tensor(s, dtype=torch.float64)
    first, second = derivatives(lambda x: expected_accuracy(x, torch.tensor(0), sigma=sigma), scores)

    def margins(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x[0] - x[1]) / sigma, (x[0] - x[2]) / sigma

    def slope(x: Tensor) -> Tensor:
        a, b = three_classes(*margins(x))
        return torch.stack([a + b, -a, -b]) / sigma

    torch.testing.assert_close(first, slope(scores), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(second, torch.func.jacfwd(slope)(scores), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("derivatives", ROADS)
@pytest.mark.parametrize("margins", [[-12.0, -10.0, 0.0, 3.0], [0.5, 0.5, -0.5], [-20.0] * 3 + [2.0] * 3])
def test_the_logarithm_to_the_second_derivative(
    margins: list[float], derivatives: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    """By central differences of the fine rule, whose own error is far below their step."""
    s = torch.tensor([0.0, *(-d for d in margins)], dtype=torch.float64)
    first, second = derivatives(lambda x: log_expected_accuracy(x, torch.tensor(0), sigma=1.0), s)
    step = 2e-3

    def at(*moves: tuple[int, int]) -> float:
        x = s.clone()
        for i, k in moves:
            x[i] += k * step
        return fine_log_p(x.numpy(), 0, 1.0)

    for i in range(len(s)):
        slope = (8 * (at((i, 1)) - at((i, -1))) - at((i, 2)) + at((i, -2))) / (12 * step)
        assert first[i].item() == pytest.approx(slope, rel=1e-7, abs=1e-7)
    for i, j in ((0, 0), (0, 1), (1, 1), (1, 2), (2, 3)):
        corners = at((i, 1), (j, 1)) - at((i, 1), (j, -1)) - at((i, -1), (j, 1)) + at((i, -1), (j, -1))
        assert second[i, j].item() == pytest.approx(corners / (4 * step**2), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("road", ["eager", "func"])
def test_gradients_by_finite_differences(sigma: float, road: str) -> None:
    s, t = rows(4, 5)
    s = (s.detach() * sigma).requires_grad_()  # differences in units of sigma

    def f(s: Tensor) -> Tensor:
        log_p = partial(log_expected_accuracy, sigma=sigma)
        p = partial(expected_accuracy, sigma=sigma)
        if road == "func":
            return torch.vmap(log_p)(s, t) + torch.vmap(p)(s, t)
        return log_p(s, t) + p(s, t)

    assert torch.autograd.gradcheck(f, s, eps=1e-6 * sigma)
    assert torch.autograd.gradgradcheck(f, s, eps=1e-6 * sigma)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_by_finite_differences(loss: Callable[..., Tensor]) -> None:
    s, t = rows(4, 5)
    t[1] = -100
    for reduction in ("none", "mean"):
        f = partial(loss, target=t, reduction=reduction)
        assert torch.autograd.gradcheck(f, s, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(f, s, check_batched_grad=True)


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_both_roads_agree(classes: int) -> None:
    s, t = rows(9, classes, spread=4)
    value = log_expected_accuracy(s, t)
    (g,) = torch.autograd.grad(value.sum(), s)
    torch.testing.assert_close(torch.vmap(log_expected_accuracy)(s.detach(), t), value.detach(), rtol=1e-9, atol=1e-9)
    f = torch.func.grad(lambda s: log_expected_accuracy(s, t).sum())(s.detach())
    torch.testing.assert_close(f, g, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("lead", [-3.0, 0.0, 1.0, 6.0, 12.0])
@pytest.mark.parametrize("road", ["eager", "func"])
def test_the_third_derivative_is_right_and_a_fourth_one_is_no_number(road: str, lead: float) -> None:
    """Two classes: P' is the normal density of the difference, and its derivatives are that times a polynomial."""
    pair, t = torch.tensor([0.3, 0.0], dtype=torch.float64), torch.tensor(0)

    def error(d: Tensor) -> Tensor:
        return exact_loss(pair + torch.stack([d - 0.3, d * 0]), t)

    d = torch.tensor(lead, dtype=torch.float64, requires_grad=True)
    if road == "eager":
        derivatives = [error(d)]
        for _ in range(4):
            derivatives += torch.autograd.grad(derivatives[-1], d, create_graph=True)
    else:
        derivatives, f = [], error
        for _ in range(4):
            f = torch.func.grad(f)
            derivatives.append(f(d.detach()))
        derivatives.insert(0, error(d))
    density = float(mp.npdf(lead, 0, mp.sqrt(2)))
    wanted = [-density, density * lead / 2, -density * (lead**2 / 4 - 0.5)]
    assert [x.item() for x in derivatives[1:4]] == pytest.approx(wanted, rel=1e-8, abs=1e-10)
    assert not derivatives[4].isfinite()


LEADS = [0.0, 0.5, 2.0, 4.5, 6.5, 8.0, 10.0, 13.0, 15.0, 20.0, 30.0, 38.0]
# what may be left of 1 - P, of its slope and of its curvature, and where a dtype's numbers end
SURE = {torch.float64: (1e-9, 1e-300), torch.float32: (2e-6, 1e-36)}


@pytest.mark.parametrize("dtype", SURE)
@pytest.mark.parametrize("road", ["eager", "func"])
@pytest.mark.parametrize("log", [False, True])
def test_sure_rows_of_two_classes_keep_their_digits(log: bool, road: str, dtype: torch.dtype) -> None:
    """Value, slope and products with the second derivatives (by the double backward trick) against closed forms."""
    rel, least = SURE[dtype]
    s = torch.tensor([[lead, 0.0] for lead in LEADS], dtype=dtype)
    t, v = torch.zeros(len(LEADS), dtype=torch.long), torch.tensor([[0.75, -0.5]], dtype=dtype).expand_as(s)

    def total(s: Tensor) -> Tensor:
        return exact_loss(s, t, log=log, reduction="sum")

    each = exact_loss(s, t, log=log, reduction="none")
    if road == "eager":
        slope = torch.autograd.functional.jacobian(total, s)
        product = torch.autograd.functional.hvp(total, s, v)[1]
    else:
        slope = torch.func.grad(total)(s)
        product = torch.func.jvp(torch.func.grad(total), (s,), (v,))[1]
    for lead, value, row, bent in zip(LEADS, each.tolist(), slope.tolist(), product.tolist(), strict=True):
        d = mp.mpf(lead)
        error, density = mp.erfc(d / 2) / 2, mp.npdf(d, 0, mp.sqrt(2))
        first, second = -density, density * d / 2
        if log:
            error, first, second = (
                -mp.log1p(-error),
                first / (1 - error),
                second / (1 - error) + (first / (1 - error)) ** 2,
            )
        near = {"rel": rel * (1 + lead**2 / 40), "abs": least}
        assert value == pytest.approx(float(error), **near)
        assert row == pytest.approx([float(first), -float(first)], **near)
        near["abs"] += rel * float(density)  # at a lead of 0 it is 0
        assert bent == pytest.approx([float(second * 1.25), -float(second * 1.25)], **near)


@functools.cache
def mp_error(margins: tuple[float, ...]) -> tuple[mp.mpf, dict[float, mp.mpf]]:
    """1 - P, and its slope by a margin of each size."""
    counts = Counter(margins)
    panels = [mp.mpf(k) for k in range(-int(min(margins) / 2) - 10, 10)]

    def all_but(z: mp.mpf, left_out: float) -> mp.mpf:
        return mp.fprod(mp.ncdf(z + d) ** (n - (d == left_out)) for d, n in counts.items())

    def rest(z: mp.mpf) -> mp.mpf:
        """1 - prod Phi(z + d_i) without cancellation."""
        return -mp.expm1(mp.fsum(n * mp.log1p(-mp.erfc((z + d) / mp.sqrt(2)) / 2) for d, n in counts.items()))

    scale = mp.exp(mp.mpf(min(margins)) ** 2 / 4)  # mp.quad stops at an absolute error

    def integral(f: Callable[[mp.mpf], mp.mpf]) -> mp.mpf:
        return mp.quad(lambda z: mp.npdf(z) * f(z) * scale, panels) / scale

    slopes = {d: -integral(lambda z, d=d: mp.npdf(z + d) * all_but(z, d)) for d in counts}
    return integral(rest), slopes


MANY = [
    (6.0, 6.0),
    (1.0, 2.5),
    (9.0, 12.0),
    (38.0, 38.0),
    (3.0, 4.0, 5.0, 6.0, 7.0, 7.0, 8.0, 8.0, 9.0),
    (6.5,) * 9,
    (15.0,) * 8 + (17.0,),
    (5.0,) * 999,
    (8.0,) * 999,
    (4.0,) + (9.0,) * 998,
    (20.0,) * 500 + (22.0,) * 499,
]


@pytest.mark.parametrize("dtype", SURE)
@pytest.mark.parametrize("margins", MANY, ids=range(len(MANY)))
def test_sure_rows_of_many_classes_keep_their_digits(margins: tuple[float, ...], dtype: torch.dtype) -> None:
    """1 - P and its slope by every class; ten classes to the last digits, a thousand to 1e-6."""
    error, slopes = mp_error(margins)
    s = torch.tensor([0.0, *(-d for d in margins)], dtype=dtype, requires_grad=True)
    t = torch.tensor(0)
    few = 1e-11 if dtype == torch.float64 else 2e-6
    near = {"rel": few * (1 + min(margins) ** 2 / 40) if len(margins) < 100 else 2e-6, "abs": SURE[dtype][1]}
    loss = exact_loss(s, t)
    assert loss.item() == pytest.approx(float(error), **near)
    assert exact_loss(s, t, log=True).item() == pytest.approx(float(-mp.log1p(-error)), **near)
    (g,) = torch.autograd.grad(loss, s)
    wanted = [-float(slopes[d]) for d in margins]
    biggest = max(wanted)
    for got, want in zip(g[1:].tolist(), wanted, strict=True):
        assert got == pytest.approx(want, rel=near["rel"] * 10, abs=near["rel"] * biggest * 1e-2 + near["abs"])
    assert g[0].item() == pytest.approx(-sum(wanted), **near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_float32_slopes(dtype: torch.dtype) -> None:
    s, t = rows(64, 100, spread=3)
    (wanted,) = torch.autograd.grad(log_expected_accuracy(s, t, nodes=64).sum(), s)
    leaf = s.detach().to(dtype).requires_grad_()
    (got,) = torch.autograd.grad(log_expected_accuracy(leaf, t).sum(), leaf)
    assert got.dtype == dtype
    rtol = 1e-4 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=rtol * 1e-2)


# ------------------------------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 2e-15), (torch.float32, 1e-6)])
def test_log_ndtr_and_hazard_to_rounding(dtype: torch.dtype, rtol: float) -> None:
    x = torch.cat([torch.linspace(-40, 12, 105), -torch.logspace(1.7, 9, 12), torch.tensor([0.0, 1e-3, -1e-3, 200])])
    x = x.to(dtype)
    with mp.workdps(60):
        log_phi = [mp.log(mp.ncdf(v)) if v > -1e4 else None for v in map(mp.mpf, x.tolist())]
        hazard = [mp.npdf(v) / mp.ncdf(v) if v > -1e4 else None for v in map(mp.mpf, x.tolist())]
        excess = [v + h if h is not None else None for v, h in zip(map(mp.mpf, x.tolist()), hazard, strict=True)]
    got_log, got_hazard = fast._log_ndtr(x, fast._tail(x))
    got_excess = fast._excess(x, got_hazard)
    tiny = torch.finfo(dtype).tiny
    near_cancelled = 1e-3 if dtype == torch.float32 else 1e-11  # x + h loses x^2 units of rounding, up to |x| = 50
    for i, v in enumerate(x.tolist()):
        if log_phi[i] is None:  # phi / Phi ~ |x| + 1 / |x| in high precision, and the density is below all numbers
            assert got_hazard[i].item() == pytest.approx(-v, rel=rtol + v**-2)
            assert got_log[i].item() == pytest.approx(-v * v / 2, rel=1e-5)
            assert got_excess[i].item() == pytest.approx(-1 / v, rel=1e-6)
        else:
            right = rtol * (1 + max(v, 0) ** 2)  # the rounding of the exponent of the density
            assert got_log[i].item() == pytest.approx(float(log_phi[i]), rel=right, abs=tiny)
            assert got_hazard[i].item() == pytest.approx(float(hazard[i]), rel=right, abs=tiny)
            assert got_excess[i].item() == pytest.approx(float(excess[i]), rel=near_cancelled)


@pytest.mark.parametrize("classes", [2, 10, 1000, 50_000])
@pytest.mark.parametrize("loc", [-8.0, 0.0, 3.0, 9.0, 20.0])
def test_the_nodes_span_the_integrand(classes: int, loc: float) -> None:
    """At both ends the integrand is below what the rule resolves, and its largest value lies well inside."""
    d = torch.randn(classes - 1, 3, dtype=torch.float64) * 0.7 + loc
    z, log_w, sure = fast.place(d, 32)
    assert (z.diff() > 0).all()
    step = (z[:, 2:] - z[:, :-2]) / 2
    log_e = torch.special.log_ndtr(d.unsqueeze(-1) + z).sum(0)
    shown = torch.where(sure.unsqueeze(-1), torch.log(-torch.expm1(log_e)), log_e)
    density = (shown + log_w)[:, 1:-1] - step.log()
    top = density.amax(-1)
    assert (density[:, 0] < top - 15).all()
    assert (density[:, -1] < top - 15).all()
    assert ((density.argmax(-1) >= 4) & (density.argmax(-1) < 26)).all()


@pytest.mark.parametrize("piece", [1, 200, 2000])
def test_pieces_do_not_show(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    s, t = rows(13, 7)
    f = partial(exact_loss, log=True)
    wanted = f(s, t)
    (g,) = torch.autograd.grad(wanted, s, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), s)
    monkeypatch.setattr(fast, "_PIECE", {"cpu": (piece, piece)})
    got = f(s, t)
    (g_pieces,) = torch.autograd.grad(got, s, create_graph=True)
    (h_pieces,) = torch.autograd.grad(g_pieces.square().sum(), s)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=0)
    torch.testing.assert_close(g_pieces, g, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(h_pieces, h, rtol=1e-7, atol=1e-12)


def test_memory_does_not_grow_with_the_rows() -> None:
    s, t = rows(2048, 400, dtype=torch.float32)
    s, t = s.detach().repeat(4, 1).requires_grad_(), t.repeat(4)
    few, many = (peak_bytes(lambda n=n: expected_accuracy(s.detach()[:n], t[:n])) for n in (2048, 8192))
    assert many <= few + 128 * 8192  # a dozen numbers a row: its target, whether it counts, its probability
    assert many <= 0.4 * s.nbytes
    assert peak_ratio(lambda s: exact_loss(s, t), s) <= 2.5  # the slope is kept, the gradient returned


def test_no_value_is_looked_at_on_an_accelerator() -> None:
    """A meta tensor has no values: any look at one raises."""
    s = torch.empty(4, 5, device="meta", requires_grad=True)
    t = torch.empty(4, dtype=torch.long, device="meta")
    for loss in (exact_loss, partial(exact_loss, log=True), soft_accuracy_loss):
        (g,) = torch.autograd.grad(loss(s, t), s, create_graph=True)
        g.sum().backward()
        assert g.shape == (4, 5)


def test_inference_mode_leaves_nothing_behind() -> None:
    s, t = rows(3, 4)
    with torch.inference_mode():
        wanted = exact_loss(s, t).item()
    value = exact_loss(s, t)
    value.backward()
    assert value.item() == wanted


def test_the_same_twice() -> None:
    s, t = rows(50, 40, dtype=torch.float32)
    assert torch.equal(expected_accuracy(s, t), expected_accuracy(s, t))


# -------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [-15.0, -10.0, -5.0, -1.0, 0.0, 1.0, 5.0])
def test_the_slope_of_the_error_keeps_its_digits(lead: float, dtype: torch.dtype) -> None:
    """For two classes the slope is the normal density of the difference, however small."""
    s = torch.tensor([lead, 0.0], dtype=dtype, requires_grad=True)
    exact_loss(s, torch.tensor(0), nodes=64).backward()
    assert s.grad is not None
    slope = -float(mp.npdf(lead, 0, mp.sqrt(2)))
    assert s.grad.tolist() == pytest.approx([slope, -slope], rel=1e-5 if dtype == torch.float32 else 1e-9)


def test_exact_loss_is_the_error_or_the_logarithm() -> None:
    s, t = rows(20, 6)
    p = expected_accuracy(s, t, sigma=0.8)
    torch.testing.assert_close(exact_loss(s, t, sigma=0.8), (1 - p).mean())
    torch.testing.assert_close(exact_loss(s, t, sigma=0.8, log=True), -p.log().mean())


def test_soft_accuracy_is_one_minus_softmax() -> None:
    s, t = rows(20, 6)
    p = torch.softmax(s, -1).gather(-1, t.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(soft_accuracy_loss(s, t, reduction="none"), 1 - p, rtol=1e-12, atol=1e-15)
    g, wanted = (torch.autograd.grad(x.sum(), s)[0] for x in (soft_accuracy_loss(s, t, reduction="none"), 1 - p))
    torch.testing.assert_close(g, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("margin", [20.0, 200.0, 700.0])
def test_soft_accuracy_keeps_the_digits_of_a_small_error(margin: float) -> None:
    s = torch.tensor([margin, 0.0, 1.0], dtype=torch.float64)
    wanted = (1 + mp.e) / (mp.exp(margin) + 1 + mp.e)
    assert soft_accuracy_loss(s, torch.tensor(0)).item() == pytest.approx(float(wanted), rel=1e-13, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("behind", [-80.0, -20.0, -1.0, 0.0, 3.0, 17.0, 40.0, 80.0])
def test_the_slope_of_soft_accuracy_keeps_its_digits(behind: float, dtype: torch.dtype) -> None:
    """For two classes the push is p (1 - p), on the right side and far out on the wrong one."""
    s = torch.tensor([-behind, 0.0], dtype=dtype, requires_grad=True)
    soft_accuracy_loss(s, torch.tensor(0)).backward()
    assert s.grad is not None
    p, error = 1 / (1 + mp.exp(behind)), 1 / (1 + mp.exp(-behind))
    assert s.grad.tolist() == pytest.approx([-float(p * error), float(p * error)], rel=1e-5, abs=0)
    (h,) = torch.autograd.grad(
        torch.autograd.grad(soft_accuracy_loss(s, torch.tensor(0)), s, create_graph=True)[0][0], s
    )
    assert h[0].item() == pytest.approx(-float(p * error * (error - p)), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (torch.float32, 1e30), (torch.float64, 1e18)])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_a_common_offset_costs_soft_accuracy_nothing(dtype: torch.dtype, offset: float, classes: int) -> None:
    s = torch.full((classes,), offset, dtype=dtype, requires_grad=True)
    loss = soft_accuracy_loss(s, torch.tensor(1))
    assert loss.item() == pytest.approx(1 - 1 / classes, rel=1e-6)
    (g,) = torch.autograd.grad(loss, s)
    assert abs(g.sum().item()) < 1e-7
    assert g[1].item() == pytest.approx(-(classes - 1) / classes**2, rel=1e-6)


def test_soft_accuracy_with_infinite_scores() -> None:
    """A rival at -inf is a rival less; the target is lost at -inf and under a rival at inf, and sure at inf."""
    s = torch.tensor([[0.0, 0.0, -INF], [-INF, 0.0, 1.0], [0.0, INF, 1.0], [INF, 0.0, 1.0], [0.0, -INF, -INF]])
    s.requires_grad_()
    loss = soft_accuracy_loss(s, torch.zeros(5, dtype=torch.long), reduction="none")
    assert loss.tolist() == [0.5, 1, 1, 0, 0]
    (g,) = torch.autograd.grad(loss.sum(), s)
    assert g[0].tolist() == [-0.25, 0.25, 0]
    assert g[1:].count_nonzero() == 0


def test_soft_accuracy_is_gumbel_noise() -> None:
    s, n = torch.randn(5), 1_000_000
    share = torch.bincount((s - torch.empty(n, 5).exponential_().log()).argmax(-1), minlength=5).double() / n
    p = 1 - soft_accuracy_loss(s.double().expand(5, 5), torch.arange(5), reduction="none")
    assert ((share - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions(loss: Callable[..., Tensor]) -> None:
    s, t = rows(6, 4)
    each = loss(s, t, reduction="none")
    assert each.shape == (6,)
    torch.testing.assert_close(loss(s, t, reduction="sum"), each.sum())
    torch.testing.assert_close(loss(s, t, reduction="mean"), each.mean())
    torch.testing.assert_close(loss(s, t), each.mean())
    torch.testing.assert_close(loss(s.reshape(2, 3, 4), t.reshape(2, 3), reduction="none"), each.reshape(2, 3))
    torch.testing.assert_close(torch.stack([loss(x, y) for x, y in zip(s, t, strict=True)]), each, rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 1)])
@pytest.mark.parametrize("loss", LOSSES)
def test_empty_batches_give_zero(loss: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    s = torch.empty(shape, requires_grad=True)
    t = torch.empty(shape[:-1], dtype=torch.long)
    value = loss(s, t)
    assert value.item() == 0
    value.backward()
    assert s.grad is not None
    assert s.grad.shape == shape
    assert loss(s, t, reduction="none").shape == shape[:-1]
    assert expected_accuracy(s, t).shape == shape[:-1]


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("road", ["eager", "func"])
@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_rows_do_not_count(loss: Callable[..., Tensor], road: str, junk: float) -> None:
    s, t = rows(5, 4)
    kept = [0, 2, 4]
    wanted = loss(s[kept], t[kept])
    (wanted_g,) = torch.autograd.grad(wanted, s)
    dirty = s.detach().clone()
    dirty[[1, 3]] = junk
    labels = t.clone()
    labels[[1, 3]] = -7
    f = partial(loss, target=labels, ignore_index=-7)
    if road == "eager":
        leaf = dirty.requires_grad_()
        got = f(leaf)
        (g,) = torch.autograd.grad(got, leaf)
    else:
        g, got = torch.func.grad_and_value(f)(dirty)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(g, wanted_g)
    assert g[[1, 3]].count_nonzero() == 0
    each = f(dirty, reduction="none")
    assert each[[1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_row_ignored_is_zero(loss: Callable[..., Tensor]) -> None:
    s = torch.full((3, 4), NAN, requires_grad=True)
    value = loss(s, torch.full((3,), -100))
    assert value.item() == 0
    (g,) = torch.autograd.grad(value, s)
    assert g.count_nonzero() == 0


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("loss", [*LOSSES, pytest.param(lambda s, t: expected_accuracy(s, t).sum(), id="p")])
def test_half_precision_is_computed_in_float32(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s, t = rows(6, 5, dtype=dtype)
    value = loss(s, t)
    wide = s.detach().float().requires_grad_()
    wanted = loss(wide, t)
    assert value.dtype == torch.float32
    assert torch.equal(value, wanted)
    (g,), (wide_g,) = torch.autograd.grad(value, s), torch.autograd.grad(wanted, wide)
    assert g.dtype == dtype
    assert torch.equal(g, wide_g.to(dtype))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_large_scores_stay_finite(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    s = torch.tensor(
        [
            [1e4, -1e4, 0, 3],
            [-1e4, 1e4, 1e4, 1e4],
            [0, 1e4, -INF, -INF],
            [0, -INF, -INF, -INF],
            [5, 4.9, 4.8, -INF],
        ],
        dtype=dtype,
        requires_grad=True,
    )
    value = loss(s, torch.zeros(5, dtype=torch.long), reduction="none")
    assert value.isfinite().all()
    assert (value >= 0).all()
    (g,) = torch.autograd.grad(value.sum(), s, create_graph=True)
    assert g.isfinite().all()
    assert g[s == -INF].count_nonzero() == 0
    (h,) = torch.autograd.grad(g.sum(), s)
    assert h.isfinite().all()


# ---------------------------------------------------------------------------------------------- under torch's machinery


@pytest.mark.parametrize("f", [expected_accuracy, log_expected_accuracy, partial(exact_loss, reduction="none")])
def test_vmap(f: Callable[..., Tensor]) -> None:
    s, t = rows(6, 5)
    got = torch.vmap(f)(s.detach(), t)
    torch.testing.assert_close(got, f(s, t).detach(), rtol=1e-9, atol=1e-12)
    nested = torch.vmap(torch.vmap(f))(s.detach().reshape(2, 3, 5), t.reshape(2, 3))
    torch.testing.assert_close(nested.flatten(), got, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode(loss: Callable[..., Tensor]) -> None:
    s, t = rows(4, 5)
    v = torch.randn_like(s)
    (g,) = torch.autograd.grad(loss(s, t), s)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(s.detach(), v), t)).tangent
    torch.testing.assert_close(tangent, (g * v).sum(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_compile_without_a_break(loss: Callable[..., Tensor]) -> None:
    s, t = rows(5, 4)
    t[2] = -100
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(s, t), loss(s, t)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    (g,), (wanted_g,) = torch.autograd.grad(got, s), torch.autograd.grad(wanted, s)
    torch.testing.assert_close(g, wanted_g, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_autocast(loss: Callable[..., Tensor]) -> None:
    s, t = rows(6, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(s, t)
        (g,) = torch.autograd.grad(value, s)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(s, t))
    assert torch.equal(g, torch.autograd.grad(loss(s, t), s)[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_strides_do_not_matter(loss: Callable[..., Tensor]) -> None:
    s, t = rows(6, 5)
    wide = s.detach().repeat_interleave(2, -1)
    for view in (wide[:, ::2], s.detach().T.contiguous().T):
        view.requires_grad_()
        value = loss(view, t.repeat_interleave(2)[::2])
        torch.testing.assert_close(value, loss(s, t))
        (g,), (wanted) = torch.autograd.grad(value, view), torch.autograd.grad(loss(s, t), s)[0]
        torch.testing.assert_close(g, wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_arguments_are_left_alone(loss: Callable[..., Tensor]) -> None:
    s, t = rows(6, 5)
    t[0] = -100
    before = s.detach().clone(), t.clone()
    value = loss(s, t)
    (g,) = torch.autograd.grad(value, s, create_graph=True)
    again = torch.autograd.grad(value, s, retain_graph=True)[0].mul_(0)
    g.sum().backward()
    assert again.count_nonzero() == 0
    assert torch.equal(s, before[0])
    assert torch.equal(t, before[1])
    torch.testing.assert_close(torch.autograd.grad(loss(s, t), s)[0], g.detach())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32])
def test_indices_of_any_dtype(dtype: torch.dtype) -> None:
    s, t = rows(6, 5)
    for f in (expected_accuracy, exact_loss, soft_accuracy_loss):
        assert torch.equal(f(s, t.to(dtype)), f(s, t))


# ------------------------------------------------------------------------------------------------------ modules, errors


@pytest.mark.parametrize(
    ("module", "function", "shown"),
    [
        (
            ExpectedAccuracy(sigma=0.5, nodes=24),
            partial(expected_accuracy, sigma=0.5, nodes=24),
            "ExpectedAccuracy(sigma=0.5, nodes=24, dim=-1)",
        ),
        (LogExpectedAccuracy(), log_expected_accuracy, "LogExpectedAccuracy(sigma=1, nodes=32, dim=-1)"),
        (
            ExactLoss(sigma=2, log=True, nodes=16, ignore_index=1, reduction="sum"),
            partial(exact_loss, sigma=2, log=True, nodes=16, ignore_index=1, reduction="sum"),
            "ExactLoss(sigma=2, log=True, nodes=16, ignore_index=1, dim=-1, reduction='sum')",
        ),
        (
            SoftAccuracyLoss(ignore_index=1, reduction="none"),
            partial(soft_accuracy_loss, ignore_index=1, reduction="none"),
            "SoftAccuracyLoss(ignore_index=1, dim=-1, reduction='none')",
        ),
    ],
)
def test_modules_are_the_functions(module: torch.nn.Module, function: Callable[..., Tensor], shown: str) -> None:
    s, t = rows(8, 4)
    assert torch.equal(module(s, t), function(s, t))
    assert repr(module) == shown


ALL = [expected_accuracy, log_expected_accuracy, exact_loss, soft_accuracy_loss]


@pytest.mark.parametrize("f", ALL)
@pytest.mark.parametrize(
    ("s", "t", "error", "message"),
    [
        ([0.0, 1.0], torch.tensor(0), TypeError, "input must be a tensor of scores, got list"),
        (torch.ones(2, 3).long(), torch.zeros(2).long(), TypeError, "input must be float16, .* got int64"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, "input must have at least one dimension"),
        (torch.ones(2, 0), torch.zeros(2).long(), ValueError, r"at least one class, got .* shape \(2, 0\)"),
        (torch.ones(2, 3), [0, 1], TypeError, "target must be a tensor of class indices, got list"),
        (torch.ones(2, 3), torch.zeros(2), TypeError, "target must be class indices of an integer dtype, got float32"),
        (
            torch.ones(2, 3),
            torch.zeros(3).long(),
            ValueError,
            r"target must have the shape of the rows, \(2,\) .*, got",
        ),
        (torch.ones(2, 3), torch.tensor([0, 3]), ValueError, r"target must be class indices in \[0, 3\).*, got 3"),
        (torch.ones(2, 3), torch.tensor([0, -1]), ValueError, r"target must be class indices in \[0, 3\).*, got -1"),
    ],
)
def test_errors_name_the_argument(
    f: Callable[..., Tensor], s: Tensor, t: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        f(s, t)


def test_a_probability_ignores_no_row() -> None:
    for f in (expected_accuracy, log_expected_accuracy):
        with pytest.raises(ValueError, match=r"class indices in \[0, 3\), got -100"):
            f(torch.ones(2, 3), torch.tensor([0, -100]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sigma": 0.0}, ValueError, "sigma must be a finite number > 0, got 0.0"),
        ({"sigma": -1}, ValueError, "sigma must be a finite number > 0, got -1"),
        ({"sigma": INF}, ValueError, "sigma must be a finite number > 0, got inf"),
        ({"sigma": "1"}, TypeError, "sigma must be a number, got str '1'"),
        ({"nodes": 7}, ValueError, "nodes must be at least 8, got 7"),
        ({"nodes": 32.0}, TypeError, "nodes must be an integer, got float 32.0"),
        ({"nodes": True}, TypeError, "nodes must be an integer, got bool True"),
    ],
)
def test_options_of_the_integral(options: dict[str, object], error: type[Exception], message: str) -> None:
    s, t = torch.ones(2, 3), torch.zeros(2).long()
    for f in (expected_accuracy, log_expected_accuracy, exact_loss):
        with pytest.raises(error, match=message):
            f(s, t, **options)
    for module in (ExpectedAccuracy, LogExpectedAccuracy, ExactLoss):
        with pytest.raises(error, match=message):
            module(**options)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-38), (torch.float32, 1e-39), (torch.float64, 1e-310)])
def test_a_sigma_that_is_no_normal_number_is_refused(dtype: torch.dtype, bound: float) -> None:
    s, t = torch.zeros(2, dtype=dtype, requires_grad=True), torch.tensor(0)
    for f in (expected_accuracy, log_expected_accuracy, exact_loss):
        with pytest.raises(ValueError, match=r"sigma must be at least .* the smallest normal number of torch\.float"):
            f(s, t, sigma=bound)
    least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny
    s = s.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    (g,) = torch.autograd.grad(exact_loss(s, t, sigma=least), s)  # two equal scores: the slope of Phi(d / sqrt 2)
    assert (g * least).tolist() == pytest.approx([-1 / math.sqrt(4 * math.pi), 1 / math.sqrt(4 * math.pi)], rel=1e-5)


@pytest.mark.parametrize("log", [1, None, "yes", torch.ones(2).bool()])
def test_log_is_a_bool(log: object) -> None:
    with pytest.raises(TypeError, match="log must be True or False, got"):
        exact_loss(torch.ones(2, 3), torch.zeros(2).long(), log=log)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="log must be True or False, got"):
        ExactLoss(log=log)  # type: ignore[arg-type]


@pytest.mark.parametrize("ignored", [1.0, True, None, "x", torch.ones(2).long()])
def test_ignore_index_is_an_int(ignored: object) -> None:
    for f in (exact_loss, soft_accuracy_loss):
        with pytest.raises(TypeError, match="ignore_index must be an integer, got"):
            f(torch.ones(2, 3), torch.zeros(2).long(), ignore_index=ignored)
    for module in (ExactLoss, SoftAccuracyLoss):
        with pytest.raises(TypeError, match="ignore_index must be an integer, got"):
            module(ignore_index=ignored)


def test_numbers_of_other_libraries_are_options() -> None:
    s, t = rows(4, 3)
    wanted = exact_loss(s, t, sigma=0.5, nodes=24, log=True, ignore_index=1)
    got = exact_loss(s, t, sigma=np.float32(0.5), nodes=np.int64(24), log=np.bool_(True), ignore_index=np.int32(1))
    assert torch.equal(got, wanted)
    got = exact_loss(s, t, sigma=torch.tensor(0.5), nodes=torch.tensor(24), log=torch.tensor(True), ignore_index=1)
    assert torch.equal(got, wanted)
    assert torch.equal(ExactLoss(sigma=np.float64(0.5), nodes=np.int8(24), log=True, ignore_index=1)(s, t), wanted)


@pytest.mark.parametrize("f", [expected_accuracy, log_expected_accuracy, *(case.values[0] for case in LOSSES)])
def test_classes_in_any_dimension(f: Callable[..., Tensor]) -> None:
    s, t = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True), torch.randint(5, (2, 3, 4))
    got, wanted = f(s, t, dim=1), f(s.movedim(1, -1), t)
    assert torch.equal(got, wanted)
    v = torch.randn_like(wanted)
    assert torch.equal(torch.autograd.grad(got, s, v)[0], torch.autograd.grad(wanted, s, v)[0])
    with pytest.raises(ValueError, match="dim must name a dimension"):
        f(s, t, dim=4)


@pytest.mark.parametrize("f", [expected_accuracy, log_expected_accuracy, *(case.values[0] for case in LOSSES)])
def test_an_unreduced_result_may_be_edited(f: Callable[..., Tensor]) -> None:
    s, t = rows(5, 4)
    f = f if f in (expected_accuracy, log_expected_accuracy) else partial(f, reduction="none")
    w = torch.rand(5, dtype=torch.float64)
    edited = f(s, t)
    edited *= w
    edited[2] = 0
    (got,) = torch.autograd.grad(edited.sum(), s)
    w[2] = 0
    (wanted,) = torch.autograd.grad((f(s, t) * w).sum(), s)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_trace_is_the_loss(loss: Callable[..., Tensor]) -> None:
    s, t = rows(6, 4)
    traced = torch.jit.trace(lambda s, t: loss(s, t), (s.detach(), t), check_trace=False)
    other, labels = rows(6, 4)
    torch.testing.assert_close(traced(other.detach(), labels), loss(other, labels).detach(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_soft_targets_of_soft_accuracy(scale: float, dtype: torch.dtype) -> None:
    """The mean of the hard losses with the target's weights, in value and two derivatives."""
    s, t = rows(12, 5, spread=scale, dtype=dtype)
    tau = torch.rand(12, 5, dtype=dtype)
    tau = tau / tau.sum(-1, keepdim=True)
    tau[:4] = torch.eye(5, dtype=dtype)[t[:4]]
    tau[4] = torch.eye(5, dtype=dtype)[s[4].argmax()]
    wide = s.detach().double().requires_grad_()
    every = torch.arange(5).expand(12, 5)
    hard = soft_accuracy_loss(wide.unsqueeze(1).expand(12, 5, 5), every, reduction="none")
    each, wanted = soft_accuracy_loss(s, tau, reduction="none"), (tau.double() * hard).sum(-1)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(each.double(), wanted, rtol=rtol, atol=0)
    torch.testing.assert_close(soft_accuracy_loss(s, tau), each.mean())
    w = torch.rand(12, dtype=dtype)
    (plain,) = torch.autograd.grad((each * w).sum(), s, retain_graph=True)
    (g,) = torch.autograd.grad((each * w).sum(), s, create_graph=True)
    (wanted_g,) = torch.autograd.grad((wanted * w.double()).sum(), wide, create_graph=True)
    near = {"rtol": 10 * rtol, "atol": rtol * 1e-3}
    torch.testing.assert_close(plain.double(), wanted_g.detach(), **near)
    torch.testing.assert_close(g.detach().double(), wanted_g.detach(), **near)
    v = torch.randn(12, 5, dtype=dtype)
    (h,), (wanted_h,) = torch.autograd.grad((g * v).sum(), s), torch.autograd.grad((wanted_g * v.double()).sum(), wide)
    torch.testing.assert_close(h.double(), wanted_h, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_accuracy_by_both_roads_on_extreme_scores(dtype: torch.dtype) -> None:
    s, t = rows(60, 7, spread=30, dtype=dtype)
    t[5] = -100
    w = torch.randn(60, dtype=dtype)
    for target in (t, torch.eye(7, dtype=dtype)[t.clamp(min=0)]):

        def total(s: Tensor, target: Tensor = target) -> Tensor:
            return (soft_accuracy_loss(s, target, reduction="none") * w).sum()

        g, value = torch.func.grad_and_value(total)(s.detach())
        rtol = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(total(s).detach(), value, rtol=rtol, atol=0)
        torch.testing.assert_close(torch.autograd.grad(total(s), s)[0], g, rtol=rtol, atol=1e-30)


def test_soft_targets_that_are_none_are_refused() -> None:
    s = torch.zeros(2, 3)
    for tau, message in (
        (torch.tensor([[0.5, 0.5, 0.5], [1, 0, 0]]), "must sum to 1"),
        (torch.tensor([[1.5, -0.5, 0], [1, 0, 0]]), r"labels in \[0, 1\]"),
        (torch.full((2, 3), 1 / 3, requires_grad=True), "must not require a gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            soft_accuracy_loss(s, tau)


def test_reduction_is_checked() -> None:
    for f in (exact_loss, soft_accuracy_loss):
        with pytest.raises(ValueError, match="reduction must be one of"):
            f(torch.ones(2, 3), torch.zeros(2).long(), reduction="avg")
    for module in (ExactLoss, SoftAccuracyLoss):
        with pytest.raises(ValueError, match="reduction must be one of"):
            module(reduction="avg")


# ----------------------------------------------------------------------------------------------------------- properties

scores = st.lists(st.floats(-30, 30), min_size=2, max_size=8)
scale = st.floats(0.05, 20)


@settings(deadline=None, max_examples=60)
@given(s=scores, sigma=scale)
def test_probabilities_sum_to_one_and_follow_the_scores(s: list[float], sigma: float) -> None:
    x, n = torch.tensor(s, dtype=torch.float64), len(s)
    p = expected_accuracy(x.expand(n, n), torch.arange(n), sigma=sigma)
    torch.testing.assert_close(p.sum().item(), 1.0, rtol=0, atol=1e-7)
    assert ((p >= 0) & (p <= 1)).all()
    order = x.argsort()
    assert (p[order].diff() >= -1e-8).all()


@settings(deadline=None, max_examples=60)
@given(s=scores, sigma=scale, shift=st.floats(-20, 20))
def test_only_differences_in_units_of_sigma_count(s: list[float], sigma: float, shift: float) -> None:
    x, t = torch.tensor(s, dtype=torch.float64), torch.tensor(0)
    wanted = log_expected_accuracy(x, t, sigma=sigma)
    for y, width in ((x + shift, sigma), (x * 4, sigma * 4), (torch.cat([x[:1], x[1:].flip(0)]), sigma)):
        torch.testing.assert_close(log_expected_accuracy(y, t, sigma=width), wanted, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(s=scores, sigma=scale, more=st.floats(0.01, 5))
def test_a_better_score_and_a_rival_less_help(s: list[float], sigma: float, more: float) -> None:
    x, t = torch.tensor(s, dtype=torch.float64), torch.tensor(0)
    before = log_expected_accuracy(x, t, sigma=sigma)
    better = x.clone()
    better[0] += more
    assert log_expected_accuracy(better, t, sigma=sigma) >= before - 1e-7
    fewer = x.clone()
    fewer[-1] = -INF
    after = log_expected_accuracy(fewer, t, sigma=sigma)
    assert after >= before - 1e-7
    torch.testing.assert_close(after, log_expected_accuracy(x[:-1], t, sigma=sigma), rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=60)
@given(s=scores, sigma=scale, t=st.integers(0, 1))
def test_losses_are_never_negative(s: list[float], sigma: float, t: int) -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(s, dtype=dtype)
        for log in (False, True):
            assert exact_loss(x, torch.tensor(t), sigma=sigma, log=log) >= 0
        assert soft_accuracy_loss(x, torch.tensor(t)) >= 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_row_is_that_row(loss: Callable[..., Tensor]) -> None:
    s = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    alone = loss(s, torch.tensor(1))
    assert alone > 0.1
    torch.testing.assert_close(loss(s.unsqueeze(0), torch.tensor([1])), alone)
