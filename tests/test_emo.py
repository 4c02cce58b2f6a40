"""The earth mover losses against float64 loops and a linear program, and every convention of the interface."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import numpy as np
import pytest
import scipy.optimize
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed.tensor import Shard

from lossbook import _checks, emo
from lossbook._fast import _function
from lossbook._fast import emo as fast
from lossbook.emo import (
    EmoCeLoss,
    EmoLoss,
    LinearEmoCeLoss,
    LinearEmoLoss,
    costs,
    emo_ce_loss,
    emo_loss,
    linear_emo_ce_loss,
    linear_emo_loss,
)

INF = float("inf")
NAN = float("nan")
F64 = torch.float64
HALVES = (torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "sum", "none")
PLAIN = [pytest.param(emo_loss, id="emo"), pytest.param(emo_ce_loss, id="emo_ce")]
PAIRS = [
    pytest.param(emo_loss, linear_emo_loss, id="emo"),
    pytest.param(emo_ce_loss, linear_emo_ce_loss, id="emo_ce"),
]
LINEAR = [pytest.param(linear_emo_loss, id="emo"), pytest.param(linear_emo_ce_loss, id="emo_ce")]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors spend their time waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The few scores of a test would be held at once, whatever the size of a chunk."""
    monkeypatch.setattr(fast, "SMALL", 0)


# ---------------------------------------------------------------------------------------------------------- references


def loop_cost(e: list[list[float]], i: int, j: int) -> float:
    """1 - cos(e_i, e_j); a zero vector has cosine 0 with every other and 1 with itself."""
    if i == j:
        return 0.0
    norms = math.hypot(*e[i]) * math.hypot(*e[j])
    return 1.0 - (sum(a * b for a, b in zip(e[i], e[j], strict=True)) / norms if norms else 0.0)


def loop_row(s: list[float], target: int | list[float], e: list[list[float]]) -> dict[str, Any]:
    """EMO, cross-entropy and their gradients for one row."""
    n = len(s)
    top = max(s)
    z = sum(math.exp(x - top) for x in s)
    p = [math.exp(x - top) / z for x in s]
    tau = target if isinstance(target, list) else [float(i == target) for i in range(n)]
    c = [sum(tau[j] * loop_cost(e, i, j) for j in range(n)) for i in range(n)]
    loss = sum(p[i] * c[i] for i in range(n))
    ce = -sum(tau[i] * (s[i] - top - math.log(z)) for i in range(n) if tau[i])
    emo_gradient = [p[i] * (c[i] - loss) for i in range(n)]
    ce_gradient = [p[i] - tau[i] for i in range(n)]
    return {
        "emo": loss,
        "emo_gradient": emo_gradient,
        "ce": ce,
        "ce_gradient": ce_gradient,
        "emo_ce": ce,
        "emo_ce_gradient": [(a + ce / loss * b) / 2 for a, b in zip(ce_gradient, emo_gradient, strict=True)],
    }


def loop(s: Tensor, target: Tensor, e: Tensor, key: str) -> Tensor:
    rows = [loop_row(a, b, e.tolist())[key] for a, b in zip(s.tolist(), target.tolist(), strict=True)]
    return torch.tensor(rows, dtype=F64)


def transport(p: Tensor, tau: Tensor, e: Tensor) -> float:
    """The earth mover distance itself: the linear program over all plans with these marginals."""
    n = len(p)
    cost = [loop_cost(e.tolist(), i, j) for i in range(n) for j in range(n)]
    sides = np.zeros((2 * n, n * n))
    for i in range(n):
        sides[i, i * n : (i + 1) * n] = 1
        sides[n + i, i::n] = 1
    found = scipy.optimize.linprog(cost, A_eq=sides, b_eq=np.concatenate([p.numpy(), tau.numpy()]))
    assert found.status == 0
    return float(found.fun)


# ---------------------------------------------------------------------------------------------------------------- data


def words(rows: int = 13, classes: int = 7, features: int = 5, depth: int = 3, dtype: torch.dtype = F64, seed: int = 0):
    """hidden, weight, bias, embedding (one zero row), index target (one at the zero row), soft target."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias, embedding = (
        torch.randn(shape, generator=g, dtype=F64).to(dtype)
        for shape in ((rows, features), (classes, features), (classes,), (classes, depth))
    )
    embedding[3] = 0
    index = torch.randint(classes, (rows,), generator=g)
    index[0] = 3
    soft = torch.randn(rows, classes, generator=g, dtype=F64).mul(2).softmax(-1)
    soft[1] = F.one_hot(index[1], classes)
    return hidden, weight, bias, embedding, index, soft.to(dtype)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def gradients(loss: Tensor, xs: list[Tensor], upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    return list(torch.autograd.grad(loss, xs, upstream, **options))


def close(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize(("loss", "key"), [(emo_loss, "emo"), (emo_ce_loss, "emo_ce")], ids=["emo", "emo_ce"])
def test_value_and_gradient_equal_loops(loss: Callable[..., Tensor], key: str, soft: bool) -> None:
    hidden, weight, _, embedding, index, tau = words()
    s = (hidden @ weight.T).requires_grad_()
    target = tau if soft else index
    value = loss(s, target, embedding, reduction="none")
    close(value.detach(), loop(s, target, embedding, key))
    close(gradients(value.sum(), [s])[0], loop(s, target, embedding, f"{key}_gradient"))


@pytest.mark.parametrize("shape", [(), (12,), (3, 4), (2, 3, 2)])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_rows_may_have_any_shape(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], shape: tuple[int, ...]
) -> None:
    hidden, weight, _, embedding, index, tau = words(12)
    n = math.prod(shape)
    h, t, soft = hidden[:n].reshape(*shape, -1), index[:n].reshape(shape), tau[:n].reshape(*shape, -1)
    s = h @ weight.T
    for target, flat in ((t, index[:n]), (soft, tau[:n])):
        wanted = plain(s.reshape(n, -1), flat, embedding, reduction="none").reshape(shape)
        close(plain(s, target, embedding, reduction="none"), wanted)
        close(linear(h, weight, target, embedding, reduction="none", chunk_size=5), wanted)
        close(linear(h, weight, target, embedding), wanted.mean())


@pytest.mark.parametrize("classes", range(2, 7))
def test_soft_targets_bound_the_transport_program_from_above(classes: int) -> None:
    _, _, _, embedding, _, _ = words(classes=7, seed=classes)
    embedding = embedding[-classes:]
    g = torch.Generator().manual_seed(classes)
    gaps = []
    for _ in range(10):
        s = torch.randn(classes, generator=g, dtype=F64) * 2
        tau = (torch.randn(classes, generator=g, dtype=F64) * 2).softmax(-1)
        gaps.append(emo_loss(s, tau, embedding).item() - transport(s.softmax(-1), tau, embedding))
        t = int(torch.randint(classes, (), generator=g))
        one = F.one_hot(torch.tensor(t), classes).double()
        distance = transport(s.softmax(-1), one, embedding)
        assert emo_loss(s, torch.tensor(t), embedding).item() == pytest.approx(distance, abs=1e-9)
        assert emo_loss(s, one, embedding).item() == pytest.approx(distance, abs=1e-9)
    assert min(gaps) > -1e-9
    assert max(gaps) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 1e-3, 700.0])
def test_one_hot_embeddings_give_one_minus_p(scale: float) -> None:
    hidden, weight, bias, _, index, _ = words()
    s = F.linear(hidden, weight, bias)
    wanted = 1 - s.softmax(-1).gather(-1, index[:, None]).squeeze(-1)
    eye = torch.eye(7, dtype=F64) * scale
    close(emo_loss(s, index, eye, reduction="none"), wanted)
    close(linear_emo_loss(hidden, weight, index, eye, bias=bias, chunk_size=4, reduction="none"), wanted)


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_all_zero_embeddings_give_one_minus_the_overlap(soft: bool) -> None:
    hidden, weight, _, embedding, index, tau = words()
    s = hidden @ weight.T
    p = s.softmax(-1)
    wanted = 1 - (p * (tau if soft else F.one_hot(index, 7))).sum(-1)
    target = tau if soft else index
    zeros = torch.zeros_like(embedding)
    close(emo_loss(s, target, zeros, reduction="none"), wanted)
    close(linear_emo_loss(hidden, weight, target, zeros), wanted.mean())


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 3.0, 1e20, 1e30])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_the_length_of_a_word_vector_does_not_matter(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], factor: float
) -> None:
    hidden, weight, _, embedding, index, _ = words(dtype=torch.float32)
    other = embedding.clone()
    other[::2] *= factor
    s = (hidden @ weight.T).requires_grad_()
    a, b = plain(s, index, embedding), plain(s, index, other)
    close(a, b, 1e-6)
    close(gradients(a, [s]), gradients(b, [s]), 1e-6)
    close(linear(hidden, weight, index, other), a, 1e-6)


def test_a_row_below_the_smallest_normal_number_counts_as_zero() -> None:
    hidden, weight, _, embedding, index, _ = words(dtype=torch.float32)
    s = hidden @ weight.T
    tiny, small = torch.finfo(torch.float32).tiny, embedding.clone()
    for size, zero in ((tiny * 0.5, True), (tiny * 2, False)):
        small[5] = torch.tensor([size, 0, 0])
        other = small.clone()
        other[5] = torch.tensor([0.0 if zero else 1.0, 0, 0])
        close(emo_loss(s, index, small), emo_loss(s, index, other), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_never_negative_when_vectors_are_parallel(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    direction = torch.randn(64, generator=g, dtype=dtype)
    embedding = direction * torch.rand(50, 1, generator=g, dtype=dtype).add(0.1)
    s = torch.randn(200, 50, generator=g, dtype=dtype)
    index = torch.randint(50, (200,), generator=g)
    for target in (index, s.softmax(-1)):
        loss = emo_loss(s, target, embedding, reduction="none")
        assert (loss >= 0).all()
        assert (loss < 1e-5).all()
        assert linear_emo_loss(s, torch.eye(50, dtype=dtype), target, embedding) >= 0


def test_a_confident_row_keeps_its_digits() -> None:
    s = torch.tensor([[40.0, 0.0, -1.0]])
    embedding = torch.tensor([[0.3, 0.7], [0.6, -0.8], [1.0, 0.2]])
    wanted = loop(s.double(), torch.tensor([0]), embedding.double(), "emo").float()
    torch.testing.assert_close(emo_loss(s, torch.tensor([0]), embedding), wanted[0], rtol=1e-5, atol=0)
    got = linear_emo_loss(s, torch.eye(3), torch.tensor([0]), embedding)
    torch.testing.assert_close(got, wanted[0], rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_bounds_shift_and_the_sum_of_the_gradient(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 6))
    number = st.floats(-1e4, 1e4, width=32)
    s = torch.tensor([data.draw(st.lists(number, min_size=n, max_size=n))], dtype=F64, requires_grad=True)
    vector = st.lists(st.floats(-4, 4, width=16), min_size=2, max_size=2)
    e = torch.tensor(data.draw(st.lists(vector, min_size=n, max_size=n)), dtype=F64)
    t = torch.tensor([data.draw(st.integers(0, n - 1))])
    value = emo_loss(s, t, e)
    assert 0 <= value.item() <= 2 + 1e-12
    (gradient,) = gradients(value, [s])
    assert abs(gradient.sum().item()) < 1e-12
    assert gradient[0, t].item() <= 0  # the wanted word costs nothing, so its score never falls
    close(emo_loss(s.detach() + 7, t, e), value.detach(), 1e-9)
    close(emo_loss(s.detach(), F.one_hot(t, n).double(), e), value.detach(), 1e-12)


# ----------------------------------------------------------------------------------------------------- the composition


def test_composition_is_cross_entropy_in_value() -> None:
    hidden, weight, _, embedding, index, tau = words()
    s = hidden @ weight.T
    for target in (index, tau):
        close(emo_ce_loss(s, target, embedding), F.cross_entropy(s, target))
        close(linear_emo_ce_loss(hidden, weight, target, embedding), F.cross_entropy(s, target))


@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_composition_differentiates_a_constant_ratio_twice(soft: bool) -> None:
    hidden, weight, _, embedding, index, tau = words(5)
    target = tau if soft else index
    s = hidden @ weight.T

    def surrogate(x: Tensor) -> Tensor:
        ce = F.cross_entropy(x, target, reduction="none")
        distance = emo_loss(x, target, embedding, reduction="none")
        at_s = F.cross_entropy(s, target, reduction="none") / emo_loss(s, target, embedding, reduction="none")
        return ((ce + at_s * distance) / 2).mean()

    for f in (
        lambda x: emo_ce_loss(x, target, embedding),
        lambda x: linear_emo_ce_loss(x, torch.eye(7, dtype=F64), target, embedding, chunk_size=2),
    ):
        close(torch.autograd.functional.hessian(f, s), torch.autograd.functional.hessian(surrogate, s), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    "case",
    [
        # every vector the same: EMO is 0 whatever the scores
        ([[1.0, 2.0, 3.0]], [0], [[1.0, 0.0]] * 3),
        # p_t rounds to 1: cross-entropy and EMO are 0
        ([[1e4, 0.0, -5.0]], [0], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        # the words with probability share one direction, the rest are worth less than 1e-30 of cross-entropy
        ([[50.0, 50.0, -40.0]], [0], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
        # ... and less than float32 can say
        ([[50.0, 50.0, -INF]], [1], [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]),
    ],
    ids=["equal", "certain", "tiny", "nothing"],
)
def test_composition_where_emo_vanishes(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    s, t, e = torch.tensor(case[0], dtype=dtype), torch.tensor(case[1]), torch.tensor(case[2], dtype=dtype)
    for target in (t, F.one_hot(t, 3).to(dtype)):
        (x, y, z), eye = leaves(s, s.nan_to_num(neginf=-200), s), torch.eye(3, dtype=dtype)
        value = emo_ce_loss(x, target, e)
        wanted = F.cross_entropy(s, t)
        close(value.detach(), wanted, 1e-6)
        half = gradients(F.cross_entropy(z, t), [z])[0] / 2
        close(gradients(value, [x])[0], half, 1e-6)
        for reduction in ("mean", "none"):
            linear = linear_emo_ce_loss(y, eye, target, e, reduction=reduction).sum()
            close(linear.detach(), wanted, 1e-6)
            close(gradients(linear, [y])[0], half, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("classes", "features"), [(3, 3), (8, 2), (500, 64), (40, 2000)])
def test_parallel_vectors_add_no_gradient_of_rounding(classes: int, features: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(features)
    direction = torch.randn(features, generator=g, dtype=dtype)
    e = direction * torch.rand(classes, 1, generator=g, dtype=dtype).add(0.1)
    s = torch.randn(20, classes, generator=g, dtype=dtype)
    t = torch.randint(classes, (20,), generator=g)
    eye = torch.eye(classes, dtype=dtype)
    for target in (t, eye[t], torch.randn(20, classes, generator=g, dtype=dtype).softmax(-1)):
        assert emo_loss(s, target, e) == 0
        x, y, z = leaves(s, s, s)
        half = gradients(F.cross_entropy(z, target), [z])[0] / 2
        close(gradients(emo_ce_loss(x, target, e), [x])[0], half, 1e-6)
        close(gradients(linear_emo_ce_loss(y, eye, target, e), [y])[0], half, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_small_cost_above_rounding_is_kept(dtype: torch.dtype) -> None:
    # the cost of an angle x is x^2 / 2
    angle = (40 * torch.finfo(dtype).eps) ** 0.5
    e = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=dtype)
    s = torch.zeros(1, 2, dtype=dtype)
    for target in (torch.tensor([0]), torch.tensor([[1.0, 0.0]], dtype=dtype)):
        assert emo_loss(s, target, e).item() == pytest.approx(angle**2 / 4, rel=0.2)


def test_a_large_ratio_is_kept() -> None:
    # EMO is 1e-20 of cross-entropy: the rare far word still gets its full pull
    s = torch.tensor([[0.0, 0.0, -46.0]], dtype=F64, requires_grad=True)
    e = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    t = torch.tensor([0])
    wanted = loop(s, t, e, "emo_ce_gradient")
    assert wanted[0, 2] > 0.3
    close(gradients(emo_ce_loss(s, t, e), [s])[0], wanted)
    close(gradients(linear_emo_ce_loss(s, torch.eye(3, dtype=F64), t, e), [s])[0], wanted)


def exact_row(s: list[float], t: int, e: list[list[float]]) -> tuple[list[Any], list[list[Any]]]:
    """EMO and the composition in 60 digits, and their gradients."""
    with mpmath.workdps(60):
        x, v = [mpmath.mpf(a) for a in s], [[mpmath.mpf(b) for b in row] for row in e]
        norm = [mpmath.sqrt(sum(b * b for b in row)) for row in v]
        c = [
            1 - sum(a * b for a, b in zip(v[i], v[t], strict=True)) / (norm[i] * norm[t] or 1)
            if i != t
            else mpmath.mpf(0)
            for i in range(len(s))
        ]
        z = sum(mpmath.exp(a) for a in x)
        p = [mpmath.exp(a) / z for a in x]
        emo, ce = sum(a * b for a, b in zip(p, c, strict=True)), -mpmath.log(p[t])
        slope = [a * (b - emo) for a, b in zip(p, c, strict=True)]
        both = [(a - (i == t) + ce / emo * b) / 2 for i, (a, b) in enumerate(zip(p, slope, strict=True))]
        return [emo, ce], [slope, both]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("road", ["fast", "formula", "one-hot", "linear"])
@pytest.mark.parametrize("lead", [-80.0, -17.0, 0.5, 5.0, 14.0, 17.0, 40.0, 80.0])
def test_sure_and_hopeless_rows_keep_their_digits(lead: float, road: str, dtype: torch.dtype) -> None:
    s = torch.tensor([[0.5, lead, -1.0, 0.25]], dtype=dtype, requires_grad=True)
    e = torch.tensor([[0.25, 0.75], [0.5, -0.75], [1.0, 0.25], [0.0, 0.0]], dtype=dtype)
    t = torch.tensor([1])
    values, slopes = exact_row(s[0].tolist(), 1, e.tolist())
    for i, (plain, linear) in enumerate([(emo_loss, linear_emo_loss), (emo_ce_loss, linear_emo_ce_loss)]):
        if road == "linear":
            value = linear(s, torch.eye(4, dtype=dtype), t, e)
        else:
            value = plain(s, F.one_hot(t, 4).to(dtype) if road == "one-hot" else t, e)
        (gradient,) = gradients(value, [s], create_graph=road == "formula")
        tolerance = (12 + abs(lead)) * torch.finfo(dtype).eps  # e^s magnifies the rounding of s by |s|
        assert value.item() == pytest.approx(float(values[i]), rel=tolerance, abs=0)
        for got, wanted in zip(gradient[0].tolist(), slopes[i], strict=True):
            # c_i - L and p_i + ratio (c_i - L) cancel: relative to the largest term
            size = float(max(abs(x) for x in slopes[i])) if lead < 0 else abs(float(wanted))
            assert got == pytest.approx(float(wanted), rel=tolerance, abs=tolerance * size)


def test_cross_entropy_of_a_lead_of_17() -> None:
    value = emo_ce_loss(torch.tensor([[0.0, 17.0]]), torch.tensor([1]), torch.eye(2))
    assert value.item() == pytest.approx(4.1399376e-08, rel=1e-6)


@pytest.mark.parametrize("shape", [(7, 30), (90, 5), (3, 70_000), (700, 300)], ids=["few", "table", "wide", "blocks"])
@pytest.mark.parametrize("formula", [emo.emo_rows, emo.emo_ce_rows])
def test_the_fast_road_equals_the_formula(formula: Callable[..., Tensor], shape: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    rows, classes = shape
    s = torch.randn(shape, generator=g, dtype=F64) * torch.logspace(-2, 3, rows, dtype=F64)[:, None]
    s[0, :2] = torch.tensor([-INF, 1e4])
    t = torch.randint(classes, (rows,), generator=g)
    s[1, t[1]] = 90
    counted, e = torch.arange(rows) != 2, torch.randn(classes, 3, generator=g, dtype=F64)
    e[1] = 0
    upstream = torch.randn(rows, generator=g, dtype=F64)
    for dtype, tolerance in ((F64, 1e-13), (torch.float32, 2e-5)):
        tolerance *= 5 if rows > 100 else 1  # one score in 200 000 where 1 + ratio (c_i - L) nearly cancels
        x, y = leaves(s.to(dtype), s.to(dtype))
        arguments = (t, counted, e.to(dtype))
        a = fast.emo_fast(formula, x, *arguments, with_ce=formula is emo.emo_ce_rows)
        b = formula(y, *arguments)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-30)
        ga, gb = gradients(a, [x], upstream.to(dtype), retain_graph=True)[0], gradients(b, [y], upstream.to(dtype))[0]
        torch.testing.assert_close(ga, gb, rtol=tolerance, atol=tolerance * 1e-2)
        if rows < 50:
            (ga,) = gradients(a, [x], upstream.to(dtype), create_graph=True)
            (gb,) = gradients(formula(y, *arguments), [y], upstream.to(dtype), create_graph=True)
            close(gradients(ga.square().sum(), [x]), gradients(gb.square().sum(), [y]), tolerance)


@pytest.mark.parametrize("loss", PLAIN)
def test_the_classes_may_lie_in_any_dimension(loss: Callable[..., Tensor]) -> None:
    hidden, weight, _, embedding, index, tau = words(12)
    s = (hidden @ weight.T).reshape(3, 4, 7)
    for target in (index.reshape(3, 4), tau.reshape(3, 4, 7)):
        soft = target.is_floating_point()
        for reduction in REDUCTIONS:
            wanted = loss(s, target, embedding, reduction=reduction)
            close(loss(s.mT, target.mT if soft else target, embedding, dim=1, reduction=reduction), wanted)


@pytest.mark.parametrize(("plain", "linear"), PAIRS)
@pytest.mark.parametrize("small", [0, 2**20], ids=["chunks", "at_once"])
def test_unreduced_losses_can_be_edited(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "SMALL", small)
    hidden, weight, _, embedding, index, tau = words(6)
    factor = torch.arange(6.0, dtype=F64)
    keep = factor * (factor != 3)
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda w, t: plain(hidden @ w.T, t, embedding, reduction="none"),
        lambda w, t: linear(hidden, w, t, embedding, chunk_size=4, reduction="none"),
    ]
    for target in (index, tau):
        for f in forms:
            (x, y) = leaves(weight, weight)
            rows = f(x, target)
            rows *= factor
            rows[3] = 0
            close(gradients(rows.sum(), [x]), gradients((f(y, target) * keep).sum(), [y]))


def test_soft_targets_one_rounding_outside_are_clamped() -> None:
    rounded = torch.tensor([[1.00005, -0.00005, 0.0], [0.5, 0.5, 0.0]])
    assert torch.equal(emo_loss(S, rounded, E), emo_loss(S, rounded.clamp(0, 1), E))


# ----------------------------------------------------------------------------------------------------- the linear form


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("small", [0, 2**20], ids=["chunks", "at_once"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_scale_and_softcap(
    plain: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    small: int,
    softcap: float | None,
    soft: bool,
    reduction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "SMALL", small)
    *layer, embedding, index, tau = words()
    target, (xs, ys) = tau if soft else index, (leaves(*layer), leaves(*layer))
    s = F.linear(*ys) * 0.3
    wanted = plain(s if softcap is None else softcap * torch.tanh(s / softcap), target, embedding, reduction=reduction)
    options: dict[str, Any] = {"logit_scale": 0.3, "logit_softcap": softcap, "chunk_size": 4, "reduction": reduction}
    value = linear(xs[0], xs[1], target, embedding, bias=xs[2], **options)
    close(value, wanted)
    upstream = torch.linspace(-1, 2, wanted.numel(), dtype=F64).reshape(wanted.shape)
    close(gradients(value, xs, upstream), gradients(wanted, ys, upstream))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
def test_a_float32_weight_takes_half_precision_states(soft: bool, dtype: torch.dtype) -> None:
    hidden, weight, bias, embedding, index, tau = words(dtype=torch.float32)
    h, w, b = leaves(hidden.to(dtype), weight, bias)
    target = tau if soft else index
    value = linear_emo_loss(h, w, target, embedding, bias=b, chunk_size=4)
    xs = leaves(h, w, b)
    wanted = emo_loss(F.linear(*(x.to(dtype) for x in xs)), target, embedding)
    close(value, wanted, 1e-5)
    for x, got, true in zip(xs, gradients(value, [h, w, b]), gradients(wanted, xs), strict=True):
        assert got.dtype == x.dtype
        close(got, true, 4 * torch.finfo(dtype).eps * float(true.abs().max()))


@pytest.mark.parametrize("accumulate", ["float32", "weight"])
def test_where_the_gradient_adds_up(accumulate: str) -> None:
    # 1000 chunks of one row: in bfloat16 the sum stops growing when a row is less than 1/256 of it
    hidden, weight = (
        torch.ones(1000, 1, dtype=torch.bfloat16),
        torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True),
    )
    loss = linear_emo_loss(
        hidden, weight, torch.zeros(1000, dtype=torch.long), torch.eye(2), chunk_size=1, accumulate=accumulate
    )
    loss.backward()
    assert weight.grad is not None
    assert (weight.grad[1] == 0.25) == (accumulate == "float32")
    assert 0.05 < float(weight.grad[1]) <= 0.25


@pytest.mark.parametrize(
    ("chunk_size", "small"), [*((n, 0) for n in (1, 3, 5, 12, 13, 14, 1024)), (1, 7 * 4), (1, 7 * 13)]
)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_linear_equals_plain(
    plain: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    reduction: str,
    soft: bool,
    with_bias: bool,
    chunk_size: int,
    small: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "SMALL", small)
    hidden, weight, bias, embedding, index, tau = words()
    monkeypatch.setattr(fast, "TILE", 3)
    index[[2, 7, 8]] = -100
    target = tau if soft else index
    xs = leaves(hidden, weight, bias)[: 2 + with_bias]
    wanted = plain(F.linear(*xs), target, embedding, reduction=reduction)
    g = torch.Generator().manual_seed(1)
    upstream = torch.randn(wanted.shape, generator=g, dtype=F64)
    wanted_gradients = gradients(wanted, xs, upstream)
    value = linear(
        xs[0],
        xs[1],
        target,
        embedding,
        bias=xs[2] if with_bias else None,
        chunk_size=chunk_size,
        reduction=reduction,
    )
    close(value, wanted, 1e-13)
    close(gradients(value, xs, upstream), wanted_gradients, 1e-13)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), ()])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_only_the_wanted_gradients(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], reduction: str, which: tuple[int, ...]
) -> None:
    *layer, embedding, index, _ = words()[:6]
    xs = [x.clone().requires_grad_(i in which) for i, x in enumerate(layer)]
    value = linear(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4, reduction=reduction)
    wanted = plain(F.linear(*xs), index, embedding, reduction=reduction)
    close(value, wanted)
    assert value.requires_grad == bool(which)
    if which:
        chosen = [xs[i] for i in which]
        close(gradients(value.sum(), chosen), gradients(wanted.sum(), chosen))


@pytest.mark.parametrize("linear", LINEAR)
def test_passes_through_a_kept_graph_agree(linear: Callable[..., Tensor]) -> None:
    hidden, weight, bias, embedding, index, _ = words()
    xs = leaves(hidden, weight, bias)
    value = linear(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4)
    first = gradients(value, xs, retain_graph=True)
    kept = [x.clone() for x in first]
    doubled = gradients(value, xs, torch.tensor(2.0, dtype=F64), retain_graph=True)
    followed = gradients(value, xs, create_graph=True)
    last = gradients(value, xs)
    for a, b, c, d, e in zip(first, kept, doubled, followed, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(2 * a, c)
        close(d.detach(), a)
        assert torch.equal(a, e)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(value, xs)


@pytest.mark.parametrize("linear", LINEAR)
def test_many_upstream_gradients_at_once(linear: Callable[..., Tensor]) -> None:
    hidden, weight, bias, embedding, index, _ = words()
    xs = leaves(hidden, weight, bias)
    value = linear(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4)
    one = gradients(value, xs, retain_graph=True)
    many = gradients(value, xs, torch.tensor([1.0, -2.0, 0.0], dtype=F64), is_grads_batched=True)
    for a, b in zip(one, many, strict=True):
        close(b, torch.stack([a, -2 * a, 0 * a]))


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, bias, embedding, index, _ = words()
    xs = leaves(hidden, weight, bias)
    value = linear_emo_loss(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4)
    with torch.no_grad():
        assert torch.equal(linear_emo_loss(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4), value)
    with torch.inference_mode():
        assert torch.equal(linear_emo_loss(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4), value)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_the_embedding_stays_frozen(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], reduction: str
) -> None:
    hidden, weight, _, embedding, index, tau = words()
    e, x, w = leaves(embedding, hidden, weight)
    for target in (index, tau):
        plain(x @ w.T, target, e, reduction=reduction).sum().backward()
        linear(x, w, target, e, reduction=reduction).sum().backward()
        assert e.grad is None
    # the output weights themselves as embedding: their gradient is that of the scores alone
    tied, free = leaves(weight, weight)
    a = linear(hidden, tied, index, tied, reduction=reduction).sum()
    b = plain(hidden @ free.T, index, weight, reduction=reduction).sum()
    close(gradients(a, [tied]), gradients(b, [free]))


# --------------------------------------------------------------------------------------------- ignored rows and empties


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("small", [0, 2**20], ids=["chunks", "at_once"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_ignored_rows_are_left_out(
    plain: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    small: int,
    ignore_index: int,
    reduction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fast, "SMALL", small)
    hidden, weight, bias, embedding, index, _ = words()
    index[[1, 5, 6]] = ignore_index
    counted = index != ignore_index
    assert 0 < counted.sum() < len(counted)
    hidden[~counted] = NAN  # padding may hold anything
    xs, ys, zs = leaves(hidden, weight, bias), leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
    wanted = plain(F.linear(xs[0][counted], xs[1], xs[2]), index[counted], embedding, reduction=reduction)
    value = linear(ys[0], ys[1], index, embedding, bias=ys[2], chunk_size=2, **options)
    s = F.linear(zs[0], zs[1], zs[2]).detach().requires_grad_()
    direct = plain(s, index, embedding, **options)
    if reduction == "none":
        for x in (value, direct):
            assert (x[~counted] == 0).all()
            close(x[counted], wanted)
    else:
        close(value, wanted)
        close(direct, wanted)
    close(gradients(value.sum(), ys), [g.nan_to_num() for g in gradients(wanted.sum(), xs)])
    assert (gradients(direct.sum(), [s])[0][~counted] == 0).all()


@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_one_row_that_counts_is_the_mean(plain: Callable[..., Tensor], linear: Callable[..., Tensor]) -> None:
    hidden, weight, _, embedding, index, _ = words()
    index[1:] = -100
    wanted = plain(F.linear(hidden[:1], weight), index[:1], embedding)
    close(linear(hidden, weight, index, embedding), wanted)
    close(plain(F.linear(hidden, weight), index, embedding), wanted)


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_no_row_at_all_gives_zero(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], reduction: str, soft: bool, rows: int
) -> None:
    if soft and rows:
        pytest.skip("soft targets know no ignored rows")
    _, weight, bias, embedding, _, _ = words()
    x, w, b = leaves(torch.full((2, rows, 5), NAN, dtype=F64), weight, bias)
    target = torch.zeros(2, 0, 7, dtype=F64) if soft else torch.full((2, rows), -100)
    s = torch.full((2, rows, 7), INF, dtype=F64, requires_grad=True)
    for value, xs in (
        (linear(x, w, target, embedding, bias=b, reduction=reduction), [x, w, b]),
        (plain(s, target, embedding, reduction=reduction), [s]),
    ):
        assert value.shape == ((2, rows) if reduction == "none" else ())
        assert (value == 0).all()
        assert all((g == 0).all() for g in gradients(value.sum(), xs))


# -------------------------------------------------------------------------------------------------- extremes and dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("loss", PLAIN)
def test_large_and_infinite_scores_stay_finite(loss: Callable[..., Tensor], soft: bool, dtype: torch.dtype) -> None:
    s = torch.tensor(
        [[1e4, -1e4, 0, 5], [-1e4, 1e4, 0, 5], [3, -INF, -INF, 2], [0, 1e4, -INF, -1e4], [-INF, -INF, -INF, -1e4]],
        dtype=dtype,
        requires_grad=True,
    )
    index = torch.tensor([0, 0, 3, 1, 3])
    embedding = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.0, 0.0], [3.0, -1.0]], dtype=dtype)
    target = F.one_hot(index, 4).to(dtype) if soft else index
    value = loss(s, target, embedding, reduction="none")
    assert value.dtype == (F64 if dtype == F64 else torch.float32)
    assert torch.isfinite(value).all()
    (gradient,) = gradients(value.sum(), [s])
    assert gradient.dtype == dtype
    assert torch.isfinite(gradient).all()
    assert (gradient[s.detach() == -INF] == 0).all()
    for row, target_row in enumerate(target):
        keep = s[row] > -INF
        t = target_row[keep] if soft else keep[: int(target_row)].sum()
        close(value[row], loss(s[row][keep], t, embedding[keep]), 1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_minus_infinity_in_the_bias_forbids_a_class(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], reduction: str
) -> None:
    hidden, weight, bias, embedding, index, _ = words()
    index[index == 4] = 5
    bias[4] = -INF
    xs, keep = leaves(hidden, weight, bias), torch.arange(7) != 4
    moved = index - (index > 4).long()
    value = linear(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=5, reduction=reduction)
    wanted = plain(F.linear(xs[0], xs[1][keep], xs[2][keep]), moved, embedding[keep], reduction=reduction)
    close(value, wanted)
    close(gradients(value.sum(), xs), gradients(wanted.sum(), xs))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("loss", PLAIN)
def test_half_precision_scores_are_computed_in_float32(
    loss: Callable[..., Tensor], soft: bool, dtype: torch.dtype
) -> None:
    hidden, weight, _, embedding, index, tau = words(dtype=dtype)
    target = tau if soft else index
    x = (hidden.float() @ weight.float().T).to(dtype).requires_grad_()
    y = x.detach().float().requires_grad_()
    value = loss(x, target, embedding)
    wanted = loss(y, tau.float() if soft else index, embedding.float())
    assert value.dtype == torch.float32
    close(value, wanted, 1e-6)
    (got,) = gradients(value, [x])
    assert got.dtype == dtype
    assert torch.equal(got, gradients(wanted, [y])[0].to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_linear_equals_plain_in_half_precision(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], soft: bool, reduction: str, dtype: torch.dtype
) -> None:
    hidden, weight, bias, embedding, index, tau = words(dtype=dtype)
    index[2] = -100
    target = tau if soft else index
    xs, ys = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    value = linear(xs[0], xs[1], target, embedding, bias=xs[2], chunk_size=4, reduction=reduction)
    wanted = plain(F.linear(*ys), target, embedding, reduction=reduction)
    assert value.dtype == torch.float32
    close(value, wanted, 1e-5)
    value.sum().backward()
    wanted.sum().backward()
    eps = torch.finfo(dtype).eps
    for x, y in zip(xs, ys, strict=True):
        assert x.grad is not None
        assert x.grad.dtype == dtype
        close(x.grad, y.grad, 4 * eps * float(y.grad.abs().max()))  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gradients_add_up_in_float32(dtype: torch.dtype) -> None:
    # as many chunks as rows: a sum kept in the layer's own dtype would stop growing
    hidden, weight, _, embedding, _, _ = words(1000, dtype=dtype)
    hidden, index = hidden.abs(), torch.full((1000,), 2)
    (w, v) = leaves(weight, weight.double())
    linear_emo_loss(hidden, w, index, embedding, chunk_size=1).backward()
    emo_loss(hidden.double() @ v.T, index, embedding.double()).backward()
    torch.testing.assert_close(w.grad.double(), v.grad, rtol=8 * torch.finfo(dtype).eps, atol=1e-3)  # type: ignore[union-attr]
    assert v.grad.abs().max() > 0.05  # type: ignore[union-attr]


def test_float16_sums_do_not_overflow() -> None:
    # 2000 rows of hidden states at 200 and p = 1/2 sum to 1e5 before the mean divides them
    hidden = torch.full((2000, 1), 200.0, dtype=torch.float16)
    weight = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    linear_emo_loss(hidden, weight, torch.zeros(2000, dtype=torch.long), torch.eye(2), chunk_size=2000).backward()
    close(weight.grad, torch.tensor([[-50.0], [50.0]], dtype=torch.float16), 1e-3)


def test_float16_gradients_do_not_vanish_before_the_scale() -> None:
    # as under a gradient scaler: the mean over 4000 rows times p = 1e-4 is below float16, times 2^16 it is not
    hidden = torch.full((4000, 1), 0.01, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[9.0], [0.0]], dtype=torch.float16, requires_grad=True)
    bias = torch.tensor([9.0, 0.0], dtype=torch.float16, requires_grad=True)
    loss = linear_emo_loss(hidden, weight, torch.zeros(4000, dtype=torch.long), torch.eye(2), bias=bias)
    (loss * 2**16).backward()
    p = torch.tensor([9.09375, 0.0]).softmax(-1)[1].item()
    wanted = 9 * p * (1 - p) / 4000 * 2**16
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.float(), torch.full((4000, 1), -wanted), rtol=1e-2, atol=0)


@pytest.mark.parametrize("embedding_dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_embeddings_of_another_dtype_pass_in_tiles(
    plain: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    soft: bool,
    embedding_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, _, embedding, index, tau = words(dtype=torch.float32)
    target = tau if soft else index
    other = embedding.to(embedding_dtype)
    s = hidden @ weight.T
    wanted = plain(s, target, other.float())
    for room in (1, 9, 21, 4096):
        monkeypatch.setattr(fast, "ROOM", room)
        close(plain(s, target, other), wanted, 1e-6)
        close(linear(hidden, weight, target, other, chunk_size=5), wanted, 1e-6)
        assert plain(s, target, other).dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_autocast_lowers_the_layer_and_not_the_loss(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], reduction: str, dtype: torch.dtype
) -> None:
    hidden, weight, bias, embedding, index, _ = words(dtype=torch.float32)
    xs, ys = leaves(hidden, weight, bias), leaves(hidden, weight, bias)
    with torch.autocast("cpu", dtype=dtype):
        value = linear(xs[0].to(dtype), xs[1], index, embedding, bias=xs[2], chunk_size=4, reduction=reduction)
        layer = F.linear(*ys)
        wanted = plain(layer, index, embedding, reduction=reduction)
        outside_float32 = plain(layer.float(), index, embedding, reduction=reduction)
    assert layer.dtype == dtype
    assert value.dtype == wanted.dtype == torch.float32
    close(value, wanted, 1e-5)
    assert torch.equal(wanted, outside_float32)
    assert torch.equal(wanted, plain(layer, index, embedding, reduction=reduction))
    value.sum().backward()
    wanted.sum().backward()
    for x, y in zip(xs, ys, strict=True):
        assert x.grad.dtype == torch.float32  # type: ignore[union-attr]
        close(x.grad, y.grad, 8 * torch.finfo(dtype).eps * float(y.grad.abs().max()))  # type: ignore[union-attr, arg-type]


def test_autocast_leaves_float64_alone() -> None:
    hidden, weight, _, embedding, index, _ = words()
    wanted = linear_emo_loss(hidden, weight, index, embedding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_emo_loss(hidden, weight, index, embedding), wanted)
        assert torch.equal(linear_emo_loss(hidden, weight, index, embedding, reduction="none").mean(), wanted)


# ------------------------------------------------------------------------------------------- derivatives and transforms


def as_functions(soft: bool, reduction: str) -> list[tuple[Callable[..., Tensor], list[Tensor]]]:
    hidden, weight, bias, embedding, index, tau = words(3, 4, 2, 2)
    index[2] = -100
    target = tau if soft else index
    return [
        (lambda s: emo_loss(s, target, embedding, reduction=reduction), leaves(F.linear(hidden, weight, bias))),
        (
            lambda h, w, b: linear_emo_loss(h, w, target, embedding, bias=b, chunk_size=2, reduction=reduction),
            leaves(hidden, weight, bias),
        ),
        (
            lambda h, w: linear_emo_loss(h, w, target, embedding, chunk_size=2, reduction=reduction),
            leaves(hidden, weight),
        ),
    ]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize("form", range(3), ids=["plain", "linear", "linear_no_bias"])
def test_gradcheck_to_the_second_order(form: int, soft: bool, reduction: str) -> None:
    f, xs = as_functions(soft, reduction)[form]
    assert torch.autograd.gradcheck(f, xs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, xs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_functional_transforms(plain: Callable[..., Tensor], linear: Callable[..., Tensor], reduction: str) -> None:
    hidden, weight, bias, embedding, index, _ = words(6)
    index[2] = -100

    def a(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear(h, w, index, embedding, bias=b, chunk_size=4, reduction=reduction).sum()

    def b(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return plain(F.linear(h, w, b), index, embedding, reduction=reduction).sum()

    layer = (hidden, weight, bias)
    xs = leaves(*layer)
    everything = (0, 1, 2)
    got = torch.func.grad(a, everything)(*layer)
    close(list(got), gradients(b(*xs), xs))
    close(torch.func.grad(b, everything)(*layer), got)
    close(torch.func.hessian(a, everything)(*layer), torch.func.hessian(b, everything)(*layer))
    tangents = tuple(torch.ones_like(x) for x in layer)
    close(torch.func.jvp(a, layer, tangents), torch.func.jvp(b, layer, tangents))
    for only in everything:
        close(torch.func.jacfwd(a, only)(*layer), torch.func.jacrev(b, only)(*layer))


@pytest.mark.filterwarnings("error::UserWarning")  # as a missing batching rule gives
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_vmap(plain: Callable[..., Tensor], linear: Callable[..., Tensor], soft: bool) -> None:
    hidden, weight, bias, embedding, index, tau = words(6)
    index[2] = -100
    target = tau if soft else index
    s = F.linear(hidden, weight, bias)
    wanted = plain(s, target, embedding, reduction="none")
    close(torch.vmap(lambda x, t: plain(x, t, embedding))(s, target), wanted)
    close(torch.vmap(lambda h, t: linear(h, weight, t, embedding, bias=bias))(hidden, target), wanted)
    # one model for each sample
    models = [x.expand(6, *x.shape) * torch.arange(1, 7).reshape(-1, *[1] * x.dim()) for x in (weight, bias, embedding)]

    def alone(h: Tensor, t: Tensor, w: Tensor, b: Tensor, e: Tensor) -> Tensor:
        return linear(h[None], w, t[None], e, bias=b)

    got = torch.vmap(torch.func.grad(alone, (0, 2, 3)))(hidden, target, *models)
    for i in range(6):
        xs = leaves(hidden[i], models[0][i], models[1][i])
        loss = plain(F.linear(*xs), target[i], models[2][i])
        close([g[i] for g in got], gradients(loss, xs))


@pytest.mark.parametrize(
    ("plain", "linear", "soft", "reduction"),
    [
        pytest.param(emo_loss, linear_emo_loss, False, "mean", id="emo-index-mean"),
        pytest.param(emo_ce_loss, linear_emo_ce_loss, False, "none", id="emo_ce-index-none"),
        pytest.param(emo_ce_loss, linear_emo_ce_loss, True, "mean", id="emo_ce-soft-mean"),
    ],
)
def test_compiles_to_one_graph(
    plain: Callable[..., Tensor], linear: Callable[..., Tensor], soft: bool, reduction: str
) -> None:
    torch._dynamo.reset()
    fast = torch.compile(
        lambda h, w, t, e, b: linear(h, w, t, e, bias=b, chunk_size=4, reduction=reduction).sum(),
        fullgraph=True,
        backend="aot_eager",
    )
    other = torch.compile(
        lambda s, t, e: plain(s, t, e, reduction=reduction).sum(), fullgraph=True, backend="aot_eager"
    )
    for rows in (13, 6):
        hidden, weight, bias, embedding, index, tau = words(rows)
        index[1] = -100
        target = tau if soft else index
        xs = leaves(hidden, weight, bias)
        wanted = plain(F.linear(*xs), target, embedding, reduction=reduction).sum()
        wanted_gradients = gradients(wanted, xs)
        for value in (fast(xs[0], xs[1], target, embedding, xs[2]), other(F.linear(*xs), target, embedding)):
            close(value, wanted)
            close(gradients(value, xs), wanted_gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_number_of_rows_takes_one_graph(reduction: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options: dict[str, Any] = {"chunk_size": 4, "reduction": reduction, "logit_softcap": 2.0}
    compiled = torch.compile(
        lambda h, w, t, e: linear_emo_ce_loss(h, w, t, e, **options), dynamic=True, fullgraph=True, backend=counter
    )
    for rows in range(8, 20):  # torch takes equal sizes of the first call for one and the same
        hidden, weight, _, embedding, index, _ = words(rows)
        xs, ys = leaves(hidden, weight), leaves(hidden, weight)
        a, b = compiled(*xs, index, embedding), linear_emo_ce_loss(*ys, index, embedding, **options)
        close(a, b)
        upstream = torch.linspace(1, 2, b.numel(), dtype=F64).reshape(b.shape)
        close(gradients(a, xs, upstream), gradients(b, ys, upstream))
    assert counter.frame_count <= 2


class Head(torch.nn.Module):
    """A linear layer with its loss, to be exported."""

    def __init__(self, weight: Tensor, embedding: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)
        self.register_buffer("embedding", embedding)

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return linear_emo_loss(hidden, self.weight, target, self.embedding, chunk_size=4)


def test_exports_with_any_number_of_rows() -> None:
    hidden, weight, _, embedding, index, _ = words(6)
    head, rows = Head(weight, embedding), torch.export.Dim("rows")
    exported = torch.export.export(head, (hidden, index), dynamic_shapes={"hidden": {0: rows}, "target": {0: rows}})
    hidden, _, _, _, index, _ = words(31)
    close(exported.module()(hidden, index), head(hidden, index))


def test_the_operator_keeps_torchs_rules() -> None:
    hidden, weight, bias, embedding, index, _ = words(6)
    xs, counted = leaves(hidden, weight, bias), torch.ones(6, dtype=torch.bool)
    for rows in (False, True):
        arguments = (*xs, index, counted, embedding, None, [not rows] * 3, rows, True, 0.5, 3.0, 4, True, F64)
        torch.library.opcheck(torch.ops.lossbook.linear_emo.default, arguments)


@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_compiled_transforms_and_traces(plain: Callable[..., Tensor], linear: Callable[..., Tensor]) -> None:
    hidden, weight, _, embedding, index, _ = words(6)
    torch._dynamo.reset()

    def f(h: Tensor) -> Tensor:
        return plain(h @ weight.T, index, embedding) + linear(h, weight, index, embedding)

    compiled = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")
    close(compiled(hidden), torch.func.grad(f)(hidden))
    close(torch.jit.trace(f, (hidden,))(2 * hidden), f(2 * hidden))


@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_strides_do_not_matter_and_inputs_stay(plain: Callable[..., Tensor], linear: Callable[..., Tensor]) -> None:
    hidden, weight, bias, embedding, index, tau = words(12)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], -1)[..., 0].transpose(0, -1).contiguous().transpose(0, -1)

    for target in (index, tau):
        given = [strided(x) for x in (hidden, weight, bias, embedding, target)]
        before = [x.clone() for x in given]
        h, w, b, e, t = given
        for x in (h, w, b):
            x.requires_grad_()
        s = F.linear(hidden, weight, bias)
        for reduction in ("mean", "none"):
            wanted = plain(s, target, embedding, reduction=reduction)
            value = linear(h, w, t, e, bias=b, chunk_size=5, reduction=reduction)
            close(value, wanted)
            value.sum().backward()
            close(plain(strided(s), t, e, reduction=reduction), wanted)
        for x, y in zip(given, before, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("linear", LINEAR)
def test_the_default_chunk_holds_1024_rows(linear: Callable[..., Tensor]) -> None:
    assert inspect.signature(linear).parameters["chunk_size"].default == 1024


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_indices_of_any_integer_dtype(dtype: torch.dtype) -> None:
    hidden, weight, _, embedding, index, _ = words()
    wanted = emo_loss(hidden @ weight.T, index, embedding)
    close(emo_loss(hidden @ weight.T, index.to(dtype), embedding), wanted)
    close(linear_emo_loss(hidden, weight, index.to(dtype), embedding), wanted)


# ------------------------------------------------------------------------------------------------ memory and the device

CLASSES, FEATURES = 3000, 16


def peak(loss: Callable[..., Tensor], rows: int, **options: Any) -> int:
    """Bytes beyond inputs and gradients of hidden and weight (and bias, with ``bias=True``)."""
    biased = options.pop("bias", False)
    soft = options.pop("soft", False)
    hidden, weight, bias, embedding, index, tau = words(rows, CLASSES, FEATURES, 8, options.pop("dtype", torch.float32))
    xs = leaves(hidden, weight, bias)[: 2 + biased]
    extra = {"bias": xs[2]} if biased else {}

    def run() -> None:
        loss(xs[0], xs[1], tau if soft else index, embedding, **extra, **options).sum().backward()

    run()
    for x in xs:
        x.grad = None
    return peak_bytes(run) - sum(x.numel() * x.element_size() for x in xs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("linear", LINEAR)
def test_memory_does_not_grow_with_the_rows(linear: Callable[..., Tensor], reduction: str) -> None:
    few, many = (peak(linear, rows, chunk_size=16, reduction=reduction, bias=True) for rows in (64, 512))
    # a few numbers for each row (target, loss); one row of scores would be 12000 bytes
    assert many - few < 100 * (512 - 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("accumulate", ["float32", "weight"])
@pytest.mark.parametrize("features", [8, 256])
@pytest.mark.parametrize("linear", LINEAR)
def test_the_peak_is_the_formula_of_the_docstring(
    linear: Callable[..., Tensor], features: int, accumulate: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, piece, chunk = 2**12, 4, 64
    for name, size in (("BLOCK", room), ("ROOM", room), ("PIECE", piece)):
        monkeypatch.setattr(fast, name, size)
    hidden, weight, _, embedding, index, _ = words(256, CLASSES, features, 8, dtype)
    h, w = leaves(hidden, weight)

    def run() -> None:
        linear(h, w, index, embedding, chunk_size=chunk, accumulate=accumulate).backward()
        h.grad = w.grad = None

    run()
    b = w.element_size()
    g = 4 if accumulate == "float32" else b
    layer = CLASSES * features
    r = 12 * max(piece * CLASSES, room)
    formula = max(g * layer + b * chunk * CLASSES + r, (g + (b if g != b else 0)) * layer)
    used = peak_bytes(run) - h.numel() * b
    few = 50 * 256 + 16 * CLASSES + 4 * chunk * features  # numbers of a row, norms of the words, a chunk's states
    assert formula - r < used < formula + few


@pytest.mark.parametrize("linear", LINEAR)
def test_a_frozen_layer_gets_no_gradient_buffer(linear: Callable[..., Tensor]) -> None:
    hidden, weight, _, embedding, index, _ = words(4, CLASSES, 4 * FEATURES, 8, torch.float32)
    (leaf,) = leaves(hidden)
    used = peak_bytes(lambda: linear(leaf, weight.detach(), index, embedding, chunk_size=1).sum().backward())
    assert used < weight.numel() * 4 / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_copy_of_the_word_vectors(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "ROOM", 2**12)
    hidden, weight, _, _, index, _ = words(4, CLASSES, 2, dtype=torch.float32)
    embedding = torch.randn(CLASSES, 256).to(dtype)
    used = peak_bytes(lambda: linear_emo_loss(hidden, weight, index, embedding))
    assert used < embedding.numel() * 4 / 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("soft", [False, True], ids=["index", "soft"])
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_nothing_waits_for_the_device(
    plain: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    soft: bool,
    reduction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # fake tensors have no values: looking at one raises
    for module in (_checks, _function, fast):
        monkeypatch.setattr(module, "readable", lambda *tensors: False)
        if module is not _checks:  # the fast road, as on an accelerator
            monkeypatch.setattr(module, "plain", lambda *tensors: True)
    with FakeTensorMode():
        h, w, b = (torch.empty(shape, requires_grad=True) for shape in ((6, 3), (5, 3), (5,)))
        e = torch.empty(5, 2)
        target = torch.empty(6, 5) if soft else torch.empty(6, dtype=torch.long)
        linear(h, w, target, e, bias=b, chunk_size=2, reduction=reduction).sum().backward()
        loss = plain(F.linear(h, w, b), target, e, reduction=reduction).sum()
        loss.backward()
        with pytest.raises(DataDependentOutputException):
            loss.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("linear", LINEAR)
def test_cuda_equals_cpu(linear: Callable[..., Tensor], reduction: str, dtype: torch.dtype) -> None:
    results = []
    for device in ("cpu", "cuda"):
        hidden, weight, bias, embedding, index, _ = (x.to(device) for x in words(dtype=dtype))
        xs = leaves(hidden, weight, bias)
        value = linear(xs[0], xs[1], index, embedding, bias=xs[2], chunk_size=4, reduction=reduction)
        value.sum().backward()
        results.append([value.detach().cpu(), *(x.grad.cpu() for x in xs)])  # type: ignore[union-attr]
    for got, wanted in zip(*results, strict=True):
        tolerance = 8 * torch.finfo(dtype).eps * max(float(wanted.abs().max()), 1)
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------------------------- modules and errors


@pytest.mark.parametrize(("plain", "module"), [(emo_loss, EmoLoss), (emo_ce_loss, EmoCeLoss)])
def test_plain_modules(plain: Callable[..., Tensor], module: Any) -> None:
    hidden, weight, _, embedding, index, _ = words()
    s = hidden @ weight.T
    assert torch.equal(module()(s, index, embedding), plain(s, index, embedding))
    for reduction in REDUCTIONS:
        wanted = plain(s, index, embedding, ignore_index=2, reduction=reduction)
        assert torch.equal(module(ignore_index=2, reduction=reduction)(s, index, embedding), wanted)
    assert repr(module(reduction="sum")) == f"{module.__name__}(ignore_index=-100, dim=-1, reduction='sum')"
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got str 'max'"):
        module(reduction="max")


@pytest.mark.parametrize(
    ("linear", "module"), [(linear_emo_loss, LinearEmoLoss), (linear_emo_ce_loss, LinearEmoCeLoss)]
)
def test_linear_modules(linear: Callable[..., Tensor], module: Any) -> None:
    hidden, weight, bias, embedding, index, _ = words()
    assert torch.equal(module()(hidden, weight, index, embedding), linear(hidden, weight, index, embedding))
    for reduction in REDUCTIONS:
        options: dict[str, Any] = {"chunk_size": 4, "ignore_index": 2, "reduction": reduction}
        wanted = linear(hidden, weight, index, embedding, bias=bias, **options)
        assert torch.equal(module(**options)(hidden, weight, index, embedding, bias=bias), wanted)
    shown = (
        "logit_scale=1, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean'"
    )
    assert repr(module()) == f"{module.__name__}({shown})"
    with pytest.raises(ValueError, match="reduction must be one of 'mean', 'sum', 'none', got str 'max'"):
        module(reduction="max")
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        module(chunk_size=0)


S, T, E, TAU = torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(3, 4), torch.full((2, 3), 1 / 3)
H, W, B = torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [[0.0]]}, TypeError, r"input must be a tensor of scores, got list; pass torch.as_tensor"),
        ({"input": S.long()}, TypeError, r"input must be float16, .* float64, got int64 tensor of shape \(2, 3\)"),
        ({"input": torch.tensor(1.0)}, ValueError, r"input must have at least one dimension, .* of shape \(\)"),
        ({"target": [0, 1]}, TypeError, r"target must be a tensor of class indices, got list; pass torch.as_tensor"),
        ({"target": T.bool()}, TypeError, "target must be class indices of an integer dtype, got bool tensor"),
        ({"target": T[:1]}, ValueError, r"target must have the shape of the rows, \(2,\) .*, got int64 tensor"),
        ({"target": torch.tensor([0, 3])}, ValueError, r"target must be class indices in \[0, 3\) .*-100, got 3"),
        ({"target": torch.tensor([-1, 0])}, ValueError, r"class indices in \[0, 3\) or ignore_index=-100, got -1"),
        ({"target": TAU[:1]}, ValueError, r"target must have the shape of input, \(2, 3\), got float32"),
        ({"target": TAU - torch.eye(2, 3)}, ValueError, r"target must be labels in \[0, 1\], got"),
        ({"target": TAU * NAN}, ValueError, r"target must be labels in \[0, 1\], got"),
        ({"target": TAU * 1.011}, ValueError, r"each row of a soft target must sum to 1 within 0.01, got 1.011"),
        ({"target": TAU * torch.tensor([[1.0], [1.02]])}, ValueError, r"must sum to 1 within 0.01, got 1.02"),
        ({"target": TAU * 0.989}, ValueError, r"each row of a soft target must sum to 1 within 0.01, got 0.989"),
        ({"embedding": None}, TypeError, "embedding must be a tensor of word vectors, got NoneType None"),
        ({"embedding": E.long()}, TypeError, "embedding must be float16, .* float64, got int64"),
        ({"embedding": E[:2]}, ValueError, r"embedding must have the shape \(3, D\), got .* of shape \(2, 4\)"),
        ({"embedding": E[0]}, ValueError, r"embedding must have the shape \(3, D\), got .* of shape \(4,\)"),
        ({"embedding": E[:, :0]}, ValueError, r"embedding must have the shape \(3, D\), got .* of shape \(3, 0\)"),
        ({"reduction": "max"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got str 'max'"),
        ({"hidden": None}, TypeError, "hidden must be a tensor, got NoneType None"),
        ({"hidden": H.long()}, TypeError, "hidden must be float16, .* float64, got int64 tensor"),
        ({"hidden": torch.tensor(1.0)}, ValueError, r"hidden must have at least one dimension, .* of shape \(\)"),
        ({"weight": W.int()}, TypeError, "weight must be float16, .* float64, got int32 tensor"),
        ({"weight": W[0]}, ValueError, r"weight must have the shape \(C, 5\), got float32 tensor of shape \(5,\)"),
        ({"weight": W[:, :4]}, ValueError, r"weight must have the shape \(C, 5\), got .* of shape \(3, 4\)"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float 0.0"),
        ({"bias": B[:2]}, ValueError, r"bias must have the shape \(3,\), got float32 tensor of shape \(2,\)"),
        ({"weight": W.half()}, TypeError, "hidden and weight must have the same dtype, .* got hidden float32 tensor"),
        ({"bias": B.double()}, TypeError, "hidden and weight and bias must have the same dtype, .* bias float64"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": 2.0}, TypeError, "chunk_size must be an integer, got float 2.0"),
        ({"target": TAU.clone().requires_grad_()}, ValueError, r"must not require a gradient, pass target.detach\(\)"),
        ({"accumulate": "bfloat16"}, ValueError, "accumulate must be 'float32' or 'weight', got str 'bfloat16'"),
        ({"logit_softcap": 0}, ValueError, "logit_softcap must be a finite number > 0, got 0.0"),
        ({"logit_scale": torch.tensor(1.0, requires_grad=True)}, ValueError, "logit_scale must not require a gradient"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an integer, got bool True"),
    ],
)
@pytest.mark.parametrize(("plain", "linear"), PAIRS)
def test_errors_name_the_argument(
    plain: Callable[..., Tensor],
    linear: Callable[..., Tensor],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    if not change.keys() & {"hidden", "weight", "bias", "chunk_size", "accumulate", "logit_softcap", "logit_scale"}:
        with pytest.raises(error, match=message):
            plain(**{"input": S, "target": T, "embedding": E} | change)
    if "input" not in change:
        with pytest.raises(error, match=message):
            linear(**{"hidden": H, "weight": W, "target": T, "embedding": E} | change)


def test_a_shard_is_refused_with_the_ways_that_are_right() -> None:
    weight = W.clone()
    weight.placements = (Shard(0),)  # type: ignore[attr-defined]  # as FSDP2 leaves it outside forward
    for linear in (linear_emo_loss, linear_emo_ce_loss):
        with pytest.raises(TypeError, match=r"weight is a sharded DTensor: .* forward .* unshard\(\) .* full_tensor\("):
            linear(H, weight, T, E)


def test_no_class_is_named_as_the_fault() -> None:
    for loss, xs in ((emo_loss, (S[:, :0],)), (linear_emo_loss, (H, W[:0]))):
        with pytest.raises(ValueError, match="at least one class"):
            loss(*xs, T, E[:0])


def test_scores_of_eight_bits_are_refused() -> None:
    with pytest.raises(TypeError, match=r"input must be float16, .* float64, got float8_e4m3fn tensor"):
        emo_loss(S.to(torch.float8_e4m3fn), T, E)


def test_sums_of_soft_targets_may_round() -> None:
    for factor in (0.991, 1.009):
        assert emo_loss(S, TAU * factor, E).item() == pytest.approx(0, abs=1e-6)


def test_autocast_does_not_mix_float64_in() -> None:
    mixed = {"hidden": H.double(), "weight": W, "target": T, "embedding": E}
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="must have the same dtype"):
        linear_emo_loss(**mixed)


def test_values_are_not_checked_where_looking_would_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "readable", lambda *tensors: False)
    assert torch.isfinite(emo_loss(S, TAU * 2, E))


def test_what_counts_as_rounding_grows_with_the_features_and_not_with_the_words() -> None:
    angle = torch.full((4096,), 2e-3)
    angle[0] = 0
    c = costs(torch.tensor([0]), torch.stack((angle.cos(), angle.sin()), 1))  # 2e-6 is no rounding of two terms
    assert c[0, 0] == 0
    assert (c[0, 1:] > 1e-6).all()


@pytest.mark.parametrize("loss", [linear_emo_loss, linear_emo_ce_loss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 goes by chunks
def test_nan_that_arrives_at_an_ignored_row_reaches_no_weight(loss, dtype) -> None:
    h, w = (torch.randn(n, 4, dtype=dtype).requires_grad_() for n in (3, 6))
    b = torch.zeros(6, dtype=dtype).requires_grad_()
    rows = loss(h, w, torch.tensor([0, -100, 5]), torch.randn(6, 3), bias=b, reduction="none")
    n = torch.tensor([1.0, 0.0, 1.0])
    torch.where(n > 0, rows / n, 0).sum().backward()
    assert all(x.grad.isfinite().all() for x in (h, w, b))


def test_what_counts_as_rounding_ends_at_four_roundings_a_feature() -> None:
    below, above = 10 * 2.0**-24, 12 * 2.0**-24  # costs beside 4 eps sqrt(2) = 11.3 * 2^-24
    e = torch.tensor([[1.0, 0.0], [1 - below, math.sqrt(2 * below)], [1 - above, math.sqrt(2 * above)]])
    assert costs(torch.tensor([0]), e)[0].tolist() == [0, 0, above]
    s = torch.tensor([[-200.0, 0.0, -200.0], [-200.0, -200.0, 0.0]])
    assert emo_loss(s, torch.tensor([0, 0]), e, reduction="none").tolist() == [0, above]


def test_cross_entropy_keeps_its_digits_where_the_probability_of_the_target_loses_them() -> None:
    lead = torch.arange(60.0, 130.0)  # e^-103 is the last number of float32, with one bit
    s = torch.stack((torch.zeros_like(lead), -lead), -1)
    value = emo_ce_loss(s, torch.ones(len(lead), dtype=torch.long), torch.eye(2), reduction="none")
    torch.testing.assert_close(value, lead, rtol=2e-7, atol=0)
