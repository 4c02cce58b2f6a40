"""Margin softmax against slow oracles: angles and sums in float64 loops, sorted lists for the search."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import peak_bytes
from lossbook import am_softmax
from lossbook._classifier import unit
from lossbook._fast import _function
from lossbook._fast import am_softmax as _fast
from lossbook.am_softmax import (
    AdditiveAngularMargin,
    AdditiveCosineMargin,
    AmSoftmaxLoss,
    CosineClassifier,
    LinearAmSoftmaxLoss,
    LinearMarginSoftmaxLoss,
    MarginSoftmaxLoss,
    MultipliedAngle,
    RetrievalAccuracy,
    additive_angular_margin,
    additive_cosine_margin,
    am_softmax_loss,
    linear_am_softmax_loss,
    linear_margin_softmax_loss,
    margin_softmax_loss,
    multiplied_angle,
    retrieval_accuracy,
)

PSIS = [
    additive_cosine_margin(),
    additive_cosine_margin(0.0),
    additive_angular_margin(),
    additive_angular_margin(0.0),
    additive_angular_margin(math.pi / 2),
    multiplied_angle(2),
    multiplied_angle(3),
    multiplied_angle(),
]
EACH_PSI = pytest.mark.parametrize("psi", PSIS, ids=repr)
HALVES = [torch.float16, torch.bfloat16]


# --- oracles ---


def psi_of_angle(psi: nn.Module, theta: float) -> float:
    """The published definition, by the angle."""
    m = psi.m
    if isinstance(psi, AdditiveCosineMargin):
        return math.cos(theta) - m
    if isinstance(psi, AdditiveAngularMargin):
        return math.cos(theta + m) if theta + m <= math.pi else math.cos(theta) - m * math.sin(m)
    return min(math.cos(m * theta), math.cos(theta))


def loss_of_row(cosines: list[float], t: int, psi: nn.Module, scale: float) -> float:
    """``-log softmax`` at the target, by mpmath with 50 digits."""
    with mpmath.workdps(50):
        scores = [mpmath.mpf(scale) * c for c in cosines]
        scores[t] = mpmath.mpf(scale) * psi_of_angle(psi, math.acos(cosines[t]))
        return float(-mpmath.log(mpmath.exp(scores[t]) / mpmath.fsum(map(mpmath.exp, scores))))


def losses_by_loop(cosine: Tensor, target: Tensor, psi: nn.Module, scale: float, ignore: int = -100) -> Tensor:
    rows = zip(cosine.reshape(-1, cosine.shape[-1]).tolist(), target.reshape(-1).tolist(), strict=True)
    values = [0.0 if t == ignore else loss_of_row(row, t, psi, scale) for row, t in rows]
    return torch.tensor(values, dtype=torch.float64).reshape(target.shape)


def cosines_by_loop(embedding: Tensor, weight: Tensor) -> Tensor:
    def cosine(a: list[float], b: list[float]) -> float:
        norms = math.hypot(*a) * math.hypot(*b)
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms > 0 else 0.0

    return torch.tensor([[cosine(z, w) for w in weight.tolist()] for z in embedding.tolist()], dtype=torch.float64)


def hits_by_sorting(embedding: Tensor, label: Tensor, k: int) -> float:
    """Sorts all the others by cosine, strangers first among equals."""
    cosine = cosines_by_loop(embedding, embedding)
    labels = label.tolist()
    hits = []
    for q, own in enumerate(labels):
        others = [j for j in range(len(labels)) if j != q]
        if all(labels[j] != own for j in others):
            continue
        others.sort(key=lambda j: (-round(float(cosine[q, j]), 10), labels[j] == own))
        hits.append(any(labels[j] == own for j in others[:k]))
    return sum(hits) / len(hits)


def example(rows: tuple[int, ...] = (6,), classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Float64 cosines over the whole range, targets with ignored rows."""
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand((*rows, classes), generator=generator, dtype=torch.float64) * 1.96 - 0.98
    target = torch.randint(classes, rows, generator=generator)
    target.view(-1)[1] = -100
    return cosine, target


def vectors(rows: int = 6, classes: int = 7, size: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 embeddings and class vectors of many lengths, targets with an ignored row and both ends."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, size, generator=generator, dtype=torch.float64)
    weight *= torch.logspace(-2, 2, classes, dtype=torch.float64).unsqueeze(1)
    target = torch.randint(classes, (rows,), generator=generator)
    target[:3] = torch.tensor([0, -100, classes - 1])
    return embedding, weight, target


def gradients(loss: Tensor, *inputs: Tensor, retain_graph: bool = False) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs, retain_graph=retain_graph)


def close(got: Tensor, expected: Tensor | float, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        got.double(), torch.as_tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol, check_device=False
    )


# --- the margins ---


@EACH_PSI
def test_a_margin_is_its_definition_by_the_angle(psi: nn.Module) -> None:
    theta = [0, *(math.pi * (i + 0.5) / 400 for i in range(400)), math.pi]
    cosine = torch.tensor([math.cos(x) for x in theta], dtype=torch.float64)
    # read at the rounded cosine's own angle: near 0 an angle is known to 1e-8 only
    expected = torch.tensor([psi_of_angle(psi, math.acos(c)) for c in cosine.tolist()], dtype=torch.float64)
    close(psi(cosine), expected, atol=2e-12)


@EACH_PSI
def test_a_margin_asks_for_no_less_than_the_cosine(psi: nn.Module) -> None:
    cosine = torch.linspace(-1, 1, 2001, dtype=torch.float64)
    assert (psi(cosine) <= cosine + 1e-15).all()


@EACH_PSI
def test_the_slope_of_a_margin(psi: nn.Module) -> None:
    theta = torch.linspace(0.05, math.pi - 0.05, 204, dtype=torch.float64)
    cosine = theta.cos().requires_grad_()
    (slope,) = gradients(psi(cosine).sum(), cosine)
    expected = torch.ones_like(theta)
    if isinstance(psi, AdditiveAngularMargin):
        expected = torch.where(theta + psi.m > math.pi, expected, (theta + psi.m).sin() / theta.sin())
    if isinstance(psi, MultipliedAngle):
        multiple = psi.m * (psi.m * theta).sin() / theta.sin()
        expected = torch.where((psi.m * theta).cos() < theta.cos(), multiple, expected)
    close(slope, expected, rtol=1e-9)
    assert gradcheck(psi, (cosine,))
    assert gradgradcheck(psi, (cosine,))


@EACH_PSI
@pytest.mark.parametrize("bounds", [(-0.5, 0.9), (-1.0, 1.0)])
def test_the_fast_roads_margin_and_slope_are_autograds(psi: nn.Module, bounds: tuple[float, float]) -> None:
    cosine = torch.linspace(*bounds, 200, dtype=torch.float64)
    closed = _fast.value_and_slope(psi, cosine.unsqueeze(1), torch.zeros(200, dtype=torch.int64))
    turns = isinstance(psi, AdditiveAngularMargin) and -math.cos(psi.m) < bounds[0] and bounds[1] < 1
    assert (closed is not None) == (turns or isinstance(psi, AdditiveCosineMargin))
    if closed is None:
        return
    value, slope = closed(cosine)
    cosine.requires_grad_()
    close(value, psi(cosine).detach(), rtol=1e-12)
    close(torch.ones_like(value) if slope is None else slope, gradients(psi(cosine).sum(), cosine)[0], rtol=1e-12)


def test_the_multiplied_angle_pulls_the_wrong_way_between_45_and_72_degrees() -> None:
    theta = torch.deg2rad(torch.tensor([44.0, 46.0, 71.0, 73.0], dtype=torch.float64))
    cosine = theta.cos().requires_grad_()
    (slope,) = gradients(multiplied_angle(4)(cosine).sum(), cosine)
    assert (slope > 0).tolist() == [True, False, False, True]


@pytest.mark.parametrize("m", [0.0, 0.1, 0.5, 1.0, math.pi / 2])
def test_the_angular_margin_never_rises_with_the_angle(m: float) -> None:
    theta = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    psi = additive_angular_margin(m)(theta.cos())
    assert (psi.diff() <= 1e-12).all()
    step = psi.diff().min()
    expected = -math.cos(m) - m * math.sin(m) + 1  # from -1 down to the continuation
    assert float(step) == pytest.approx(expected, abs=2e-3)


def test_the_angular_margin_ends_its_first_case_at_the_border_itself() -> None:
    m = 0.5
    border = -math.cos(m)
    below = math.nextafter(border, -2.0)
    got = additive_angular_margin(m)(torch.tensor([border, below], dtype=torch.float64))
    close(got, torch.tensor([-1.0, border - m * math.sin(m)], dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("m", [1e-3, 1e-2, 0.1, 0.5, 1.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_angular_margin_never_pulls_the_wrong_way_beside_a_rounded_border(dtype: torch.dtype, m: float) -> None:
    step = torch.finfo(dtype).eps / 4
    cosine = (-math.cos(m) + step * torch.arange(-8, 9, dtype=torch.float64)).clamp(-1, 1).to(dtype).requires_grad_()
    psi = additive_angular_margin(m)(cosine)
    (slope,) = gradients(psi.sum(), cosine)
    assert (slope >= -1e-7).all()
    for c, got in zip(cosine.tolist(), slope.tolist(), strict=True):
        theta = math.acos(c)
        right = math.sin(theta + m) / math.sin(theta) if math.pi - theta - m > 1e-9 else None
        if right is not None and math.sin(theta) > 1e-2 * m:
            assert got == pytest.approx(right, rel=2e-2, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("m", [0.5, math.pi / 2])
def test_the_angular_margins_slope_at_one_is_the_chord_to_the_next_number(dtype: torch.dtype, m: float) -> None:
    step = torch.finfo(dtype).eps / 2
    cosine = torch.tensor([1.0, 1 - step, 1 - 2 * step, -1.0], dtype=dtype, requires_grad=True)
    psi = additive_angular_margin(m)(cosine)
    with mpmath.workdps(50):
        near = [mpmath.cos(mpmath.acos(1 - mpmath.mpf(i * step)) + m) for i in range(3)]
        chord = float((near[0] - near[1]) / step)
        formula = math.cos(m) + 2 * math.sin(m) / math.sqrt(2 * step)
    rounding = 1e-6 if dtype != torch.float64 else 1e-15
    assert psi.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert psi[:3].tolist() == pytest.approx([float(x) for x in near], abs=rounding)
    (slope,) = gradients(psi.sum(), cosine)
    assert float(slope[0]) == pytest.approx(chord, rel=max(1e-4, 2 * step))
    assert float(slope[0]) == pytest.approx(formula, rel=max(1e-3, 4 * step))
    assert float(slope[3]) == 1.0
    assert slope.isfinite().all()


def test_the_angular_margin_without_a_margin_is_the_cosine() -> None:
    cosine = torch.tensor([-1.0, -0.3, 0.0, 0.8, 1.0], requires_grad=True)
    psi = additive_angular_margin(0.0)(cosine)
    assert torch.equal(psi, cosine)
    assert torch.equal(gradients(psi.sum(), cosine)[0], torch.ones(5))


def test_the_second_derivative_at_one_is_finite() -> None:
    cosine = torch.tensor([1.0, -1.0], requires_grad=True)
    for psi in PSIS:
        (slope,) = torch.autograd.grad(psi(cosine).sum(), cosine, create_graph=True)
        if slope.requires_grad:
            assert gradients(slope.sum(), cosine)[0].isfinite().all()


@EACH_PSI
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_a_cosine_that_rounding_left_outside_counts_as_the_end(psi: nn.Module, end: float) -> None:
    inside = torch.tensor(end, requires_grad=True)
    outside = torch.tensor(end * (1 + 2.4e-7), requires_grad=True)
    clamped = torch.tensor(end * (1 + 2.4e-7), requires_grad=True)
    values = [psi(inside), psi(outside), psi(clamped.clamp(-1, 1))]
    assert values[1].item() == pytest.approx(values[0].item(), abs=1e-5)
    assert values[2].item() == values[0].item()
    slopes = [gradients(v, c)[0] for v, c in zip(values[:2], (inside, outside), strict=True)]
    assert all(s.isfinite() for s in slopes)
    if isinstance(psi, AdditiveAngularMargin):
        assert values[1].item() == values[0].item()
        assert slopes[1].item() == pytest.approx(slopes[0].item(), rel=1e-6)


@EACH_PSI
@pytest.mark.parametrize("dtype", HALVES)
def test_a_margin_of_a_half_is_computed_in_float32(psi: nn.Module, dtype: torch.dtype) -> None:
    cosine = torch.linspace(-0.9, 0.9, 19).to(dtype).requires_grad_()
    psi_t = psi(cosine)
    assert psi_t.dtype == torch.float32
    close(psi_t, psi(cosine.double()), rtol=1e-5, atol=1e-5)
    assert gradients(psi_t.sum(), cosine)[0].dtype == dtype


@pytest.mark.parametrize(
    ("function", "module", "argument", "default"),
    [
        (additive_cosine_margin, AdditiveCosineMargin, 0.2, 0.35),
        (additive_angular_margin, AdditiveAngularMargin, 0.2, 0.5),
        (multiplied_angle, MultipliedAngle, 3, 4),
    ],
)
def test_the_margins_as_modules(
    function: Callable[..., nn.Module], module: type[nn.Module], argument: float, default: float
) -> None:
    assert type(function()) is module
    assert function().m == module().m == default
    assert function(argument).m == argument
    assert repr(function(argument)) == f"{module.__name__}(m={argument})"


# --- the loss from cosines ---


@EACH_PSI
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0])
def test_the_loss_is_its_definition(psi: nn.Module, scale: float) -> None:
    cosine, target = example((4, 3))
    close(
        margin_softmax_loss(cosine, target, psi=psi, scale=scale, reduction="none"),
        losses_by_loop(cosine, target, psi, scale),
    )


@EACH_PSI
def test_the_gradient_is_softmax_less_target(psi: nn.Module) -> None:
    cosine, target = example((8,))
    cosine.requires_grad_()
    (got,) = gradients(margin_softmax_loss(cosine, target, psi=psi, scale=7.0, reduction="sum"), cosine)
    for row, t, grad in zip(cosine.detach(), target.tolist(), got, strict=True):
        if t == -100:
            assert torch.equal(grad, torch.zeros_like(grad))
            continue
        c = row[t].clone().requires_grad_()
        (slope,) = gradients(psi(c), c)
        scores = [7.0 * x for x in row.tolist()]
        scores[t] = 7.0 * psi_of_angle(psi, math.acos(row[t]))
        total = math.fsum(map(math.exp, scores))
        expected = [7.0 * math.exp(s) / total for s in scores]
        expected[t] = 7.0 * (math.exp(scores[t]) / total - 1) * float(slope)
        close(grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-9)


@EACH_PSI
def test_derivatives_of_first_and_second_order(psi: nn.Module) -> None:
    cosine, target = example((4,))
    cosine.requires_grad_()
    for reduction in ("mean", "none"):

        def loss(c: Tensor, reduction: str = reduction) -> Tensor:
            return margin_softmax_loss(c, target, psi=psi, scale=3.0, reduction=reduction)

        assert gradcheck(loss, (cosine,), check_batched_grad=True, check_forward_ad=True)
        assert gradgradcheck(loss, (cosine,), check_batched_grad=True)


def test_am_softmax_is_the_margin_softmax_with_a_cosine_margin() -> None:
    cosine, target = example((4, 3))
    for margin, scale in ((0.35, 30.0), (0.1, 5.0)):
        got = am_softmax_loss(cosine, target, margin=margin, scale=scale)
        expected = losses_by_loop(cosine, target, additive_cosine_margin(margin), scale)
        close(got, expected.sum() / (target != -100).sum())
    assert torch.equal(am_softmax_loss(cosine, target), am_softmax_loss(cosine, target, margin=0.35, scale=30))
    psi = additive_cosine_margin(0.35)
    assert torch.equal(
        margin_softmax_loss(cosine, target, psi=psi), margin_softmax_loss(cosine, target, psi=psi, scale=30)
    )


@given(
    cosines=st.lists(st.floats(-1, 1), min_size=2, max_size=6),
    scale=st.floats(0.5, 64),
    margin=st.floats(0, 1),
)
@settings(deadline=None, max_examples=50)
def test_without_a_margin_it_is_cross_entropy_and_a_margin_adds(
    cosines: list[float], scale: float, margin: float
) -> None:
    cosine, target = torch.tensor(cosines, dtype=torch.float64), torch.tensor(0)
    plain = F.cross_entropy(scale * cosine, target)
    close(am_softmax_loss(cosine, target, margin=0, scale=scale), plain, rtol=1e-9)
    with_margin = am_softmax_loss(cosine, target, margin=margin, scale=scale)
    assert with_margin >= 0
    assert with_margin >= plain - 1e-9


@EACH_PSI
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", [1.0, -1.0])
@pytest.mark.parametrize("other", [1.0, -1.0])
def test_saturated_cosines_at_scale_64(psi: nn.Module, dtype: torch.dtype, target: float, other: float) -> None:
    cosine = torch.tensor([[other, target, other]], dtype=dtype, requires_grad=True)
    loss = margin_softmax_loss(cosine, torch.tensor([1]), psi=psi, scale=64.0)
    expected = loss_of_row([other, target, other], 1, psi, 64.0)
    assert loss.item() >= 0
    assert math.copysign(1, loss.item()) == 1
    assert loss.item() == pytest.approx(expected, rel=3e-5 if dtype != torch.float64 else 1e-12, abs=1e-37)
    (grad,) = gradients(loss, cosine)
    assert grad.dtype == dtype
    assert grad.isfinite().all()
    assert (grad[0, [0, 2]] >= 0).all()
    assert grad[0, 1] <= 0


def test_small_losses_keep_their_digits() -> None:
    # e^-50.4: the difference of two scores near 30 would round it to 0
    cosine = torch.tensor([[1.0, -0.99, -0.98]], requires_grad=True)
    loss = am_softmax_loss(cosine, torch.tensor([0]), margin=0.3, scale=30.0)
    expected = math.log1p(sum(math.exp(30 * (c - 0.7)) for c in (-0.99, -0.98)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    (grad,) = gradients(loss, cosine)
    assert grad[0, 0].item() == pytest.approx(-30 * expected, rel=1e-5)
    assert grad[0, 1].item() == pytest.approx(30 * math.exp(30 * (-0.99 - 0.7)), rel=1e-5)


def test_losses_beyond_twenty_keep_their_digits() -> None:
    # log(1 + e^d) is d to 2e-9 only at 20, where a usual threshold sits
    cosine = torch.tensor([[-0.15, 0.9]], dtype=torch.float64)
    for margin in (0.0, 0.05, 0.3):
        d = 20 * (0.9 + 0.15 + margin)
        expected = d + math.log1p(math.exp(-d))
        assert am_softmax_loss(cosine, torch.tensor([0]), margin=margin, scale=20.0).item() == pytest.approx(
            expected, rel=1e-14
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    cosine, target = example((8,), classes=9)
    half = cosine.to(dtype).requires_grad_()
    exact = half.detach().double().requires_grad_()
    loss, expected = am_softmax_loss(half, target), am_softmax_loss(exact, target)
    assert loss.dtype == torch.float32
    close(loss, expected, rtol=1e-5)
    (grad,), (expected_grad,) = gradients(loss, half), gradients(expected, exact)
    assert grad.dtype == dtype
    # one rounding, at the end
    close(grad, expected_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_margin_of_the_users_own_sees_float32() -> None:
    seen = []

    def psi(cosine_t: Tensor) -> Tensor:
        seen.append(cosine_t.dtype)
        return cosine_t - 0.2

    cosine, target = example((8,))
    cosine = cosine.bfloat16()
    got = margin_softmax_loss(cosine, target, psi=psi)
    assert seen == [torch.float32]
    close(got, am_softmax_loss(cosine, target, margin=0.2), rtol=1e-6)


def test_the_slope_at_one_fits_a_float16_gradient() -> None:
    # as float32 the slope would be 2778, times 64 beyond float16's 65504
    cosine = torch.tensor([[1.0, 1.0]], dtype=torch.float16, requires_grad=True)
    loss = margin_softmax_loss(cosine, torch.tensor([0]), psi=additive_angular_margin(), scale=64.0)
    (grad,) = gradients(loss, cosine)
    slope = math.cos(0.5) + math.sin(0.5) * 2 / math.sqrt(2**-10)
    assert grad[0, 0].item() == pytest.approx(-64 * slope, rel=2e-3)


@pytest.mark.parametrize("ignore", [-100, 2])
def test_reductions_and_ignored_rows(ignore: int) -> None:
    cosine, target = example((3, 4))
    target[target == -100] = ignore
    rows = losses_by_loop(cosine, target, additive_cosine_margin(), 30.0, ignore)
    counted = (target != ignore).sum()
    assert 0 < counted < target.numel()

    def loss(reduction: str) -> Tensor:
        return am_softmax_loss(cosine, target, ignore_index=ignore, reduction=reduction)

    close(loss("none"), rows)
    close(loss("sum"), rows.sum())
    close(loss("mean"), rows.sum() / counted)
    assert torch.equal(am_softmax_loss(cosine, target, ignore_index=ignore), loss("mean"))


@pytest.mark.parametrize("rows", [(0,), (2, 0), (3,)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_at_all_gives_zero(rows: tuple[int, ...], reduction: str) -> None:
    target = torch.full(rows, -100)
    cosine = torch.zeros((*rows, 4), requires_grad=True)
    loss = am_softmax_loss(cosine, target, reduction=reduction)
    assert loss.item() == 0
    assert torch.equal(gradients(loss, cosine)[0], torch.zeros_like(cosine))
    embedding, weight = torch.ones((*rows, 3), requires_grad=True), torch.ones(4, 3, requires_grad=True)
    loss = linear_am_softmax_loss(embedding, weight, target, reduction=reduction, chunk_size=3)
    assert loss.item() == 0
    for grad, leaf in zip(gradients(loss, embedding, weight), (embedding, weight), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_what_an_ignored_row_holds_does_not_matter(junk: float) -> None:
    cosine, target = example((5,))
    expected = am_softmax_loss(cosine, target)
    cosine[1] = junk
    cosine.requires_grad_()
    for run in (lambda: am_softmax_loss(cosine, target), lambda: plain_form(am_softmax_loss, cosine, target)):
        loss = run()
        close(loss, expected)
        (grad,) = gradients(loss, cosine)
        assert torch.equal(grad[1], torch.zeros(5, dtype=torch.float64))
        assert grad.isfinite().all()


def plain_form(loss: Callable[..., Tensor], *arguments: Tensor, **options: Any) -> Tensor:
    """The same loss without its hand-written backward pass."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_fast, "plain", lambda *_: False)
        patch.setattr(_function, "plain", lambda *_: False)
        return loss(*arguments, **options)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32, torch.int8])
def test_a_class_left_out_is_as_if_deleted(index_dtype: torch.dtype) -> None:
    cosine, target = example((6,))
    target[target == 2] = 3
    target = target.to(index_dtype)
    left_out = cosine.clone()
    left_out[:, 2] = -math.inf
    deleted = cosine[:, [0, 1, 3, 4]].requires_grad_()
    left_out.requires_grad_()
    expected = am_softmax_loss(deleted, target - (target > 2).to(index_dtype))
    (expected_grad,) = gradients(expected, deleted)
    for run in (lambda: am_softmax_loss(left_out, target), lambda: plain_form(am_softmax_loss, left_out, target)):
        loss = run()
        close(loss, expected)
        (grad,) = gradients(loss, left_out)
        close(grad[:, [0, 1, 3, 4]], expected_grad)
        assert torch.equal(grad[:, 2], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("others", [[], [-math.inf]])
def test_a_target_without_rivals_costs_nothing(others: list[float]) -> None:
    cosine = torch.tensor([[0.3, *others]], requires_grad=True)
    for run in (am_softmax_loss, lambda *a: plain_form(am_softmax_loss, *a)):
        loss = run(cosine, torch.tensor([0]))
        assert loss.item() == 0
        assert torch.equal(gradients(loss, cosine)[0], torch.zeros_like(cosine))


def test_one_class_costs_nothing_from_embeddings_either() -> None:
    embedding, weight = torch.ones(2, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    for run in (linear_am_softmax_loss, lambda *a: plain_form(linear_am_softmax_loss, *a)):
        loss = run(embedding, weight, torch.tensor([0, 0]))
        assert loss.item() == 0
        for grad in gradients(loss, embedding, weight):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_integer_dtypes_shapes_and_layouts() -> None:
    cosine, target = example((3, 4))
    expected = am_softmax_loss(cosine, target, reduction="none")
    for dtype in (torch.int8, torch.int16, torch.int32):
        assert torch.equal(am_softmax_loss(cosine, target.to(dtype), reduction="none"), expected)
    turned = cosine.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert not turned.is_contiguous()
    loss = am_softmax_loss(turned, target.t().contiguous().t(), reduction="none")
    assert torch.equal(loss, expected)
    cosine.requires_grad_()
    close(gradients(loss.sum(), turned)[0], gradients(am_softmax_loss(cosine, target, reduction="sum"), cosine)[0])
    assert am_softmax_loss(cosine[0, 0], target[0, 0]).shape == ()
    spread = torch.tensor([[0.1], [0.2]]).expand(2, 3).requires_grad_()
    loss = am_softmax_loss(spread, torch.tensor([0, 1]), margin=0, scale=1)
    assert loss.item() == pytest.approx(math.log(3))
    close(gradients(loss, spread)[0], (1 / 3 - torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double()) / 2, atol=1e-7)


def test_inputs_stay_as_they_are() -> None:
    cosine, target = example()
    embedding, weight, index = vectors()
    given_inputs = [cosine, target, embedding, weight, index]
    before = [x.clone() for x in given_inputs]
    for x in (cosine, embedding, weight):
        x.requires_grad_()
    am_softmax_loss(cosine, target).backward()
    linear_am_softmax_loss(embedding, weight, index, chunk_size=2).backward()
    retrieval_accuracy(embedding, torch.arange(6) // 2)
    for x, y in zip(given_inputs, before, strict=True):
        assert torch.equal(x, y)


# --- the loss from embeddings and class vectors ---

CHUNKS = [None, 1, 2, 3, 6, 7, 1000]


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_linear_form_equals_the_loops(chunk_size: int | None, reduction: str) -> None:
    embedding, weight, target = vectors()
    rows = losses_by_loop(cosines_by_loop(embedding, weight), target, additive_cosine_margin(0.2), 12.0)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / 5}[reduction]
    got = linear_am_softmax_loss(
        embedding, weight, target, margin=0.2, scale=12.0, chunk_size=chunk_size, reduction=reduction
    )
    close(got, expected, rtol=1e-11)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("scale", [12.0, 64.0, 500.0])
def test_the_linear_gradients_equal_the_plain_ones(chunk_size: int | None, scale: float) -> None:
    embedding, weight, target = vectors()
    embedding.requires_grad_()
    weight.requires_grad_()
    upstream = torch.tensor([1.0, 3.0, -2.0, 0.0, 0.5, 1e3], dtype=torch.float64)
    cosine = F.normalize(embedding, dim=-1) @ F.normalize(weight, dim=-1).t()
    expected = F.cross_entropy(
        scale * (cosine - 0.35 * F.one_hot(target.clamp(min=0), 7).double()),
        target,
        reduction="none",
        ignore_index=-100,
    )
    got = linear_am_softmax_loss(embedding, weight, target, scale=scale, chunk_size=chunk_size, reduction="none")
    close(got, expected.detach(), rtol=1e-10, atol=1e-10)
    for a, b in zip(
        gradients((got * upstream).sum(), embedding, weight),
        gradients((expected * upstream).sum(), embedding, weight),
        strict=True,
    ):
        close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


@pytest.mark.parametrize("classes", [100, 2000])
def test_without_a_chunk_size_few_scores_and_many_give_the_same(classes: int) -> None:
    z, w, target = torch.randn(64, 8).requires_grad_(), torch.randn(classes, 8).requires_grad_(), torch.arange(64)
    assert _fast.few(z, w) == (classes == 100)
    for psi in (additive_angular_margin(0.5), additive_cosine_margin(0.2), lambda c: c - 0.3):
        losses = [linear_margin_softmax_loss(z, w, target, psi=psi, chunk_size=size) for size in (None, 7)]
        close(losses[0], losses[1], rtol=1e-5)
        for a, b in zip(*(gradients(loss, z, w) for loss in losses), strict=True):
            close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_the_linear_form_has_derivatives_of_first_and_second_order(chunk_size: int | None) -> None:
    embedding, weight, target = vectors(rows=3, classes=4, size=3)
    weight = F.normalize(weight)

    def loss(z: Tensor, w: Tensor) -> Tensor:
        return linear_am_softmax_loss(z, w, target, scale=3.0, chunk_size=chunk_size)

    both = (embedding.requires_grad_(), weight.requires_grad_())
    assert gradcheck(loss, both, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(loss, both, check_batched_grad=True)
    for wanted in (0, 1):
        pair = [x.detach() for x in both]
        pair[wanted].requires_grad_()
        assert gradcheck(loss, pair)
        assert gradgradcheck(loss, pair)


def test_the_defaults_of_the_linear_form() -> None:
    embedding, weight, target = vectors()
    head = CosineClassifier(4, 7).double()
    head.weight.data = weight
    expected = am_softmax_loss(head(embedding), target)
    close(linear_am_softmax_loss(embedding, weight, target), expected)
    close(linear_am_softmax_loss(embedding, weight, target, margin=0.35, scale=30.0), expected)


def test_leading_dimensions_and_layouts_of_the_linear_form() -> None:
    embedding, weight, target = vectors()
    expected = linear_am_softmax_loss(embedding, weight, target, reduction="none")
    loss = linear_am_softmax_loss(embedding.reshape(2, 3, 4), weight, target.reshape(2, 3), reduction="none")
    assert torch.equal(loss, expected.reshape(2, 3))
    one = linear_am_softmax_loss(embedding[0], weight, target[0])
    close(one, expected[0])
    turned = weight.t().contiguous().t().requires_grad_()
    weight.requires_grad_()
    leaves = [embedding.t().contiguous().t().requires_grad_(), embedding.clone().requires_grad_()]
    losses = [linear_am_softmax_loss(z, w, target, chunk_size=3) for z, w in zip(leaves, (turned, weight), strict=True)]
    close(losses[0], losses[1])
    for a, b in zip(gradients(losses[0], leaves[0], turned), gradients(losses[1], leaves[1], weight), strict=True):
        close(a, b)
    ignored = target.clone()
    ignored[ignored == -100] = 6
    got = linear_am_softmax_loss(embedding, weight, ignored, ignore_index=6, reduction="none")
    close(got.detach(), torch.where(ignored == 6, 0.0, expected))


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize("zdtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("wdtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtypes_of_the_linear_form(chunk_size: int | None, zdtype: torch.dtype, wdtype: torch.dtype) -> None:
    embedding, weight, target = vectors()
    z, w = embedding.to(zdtype).requires_grad_(), weight.to(wdtype).requires_grad_()
    exact = z.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    loss = linear_am_softmax_loss(z, w, target, chunk_size=chunk_size)
    expected = linear_am_softmax_loss(*exact, target)
    assert loss.dtype == (torch.float64 if torch.float64 in (zdtype, wdtype) else torch.float32)
    close(loss, expected, rtol=1e-5)
    for got, leaf, right in zip(gradients(loss, z, w), (z, w), gradients(expected, *exact), strict=True):
        assert got.dtype == leaf.dtype
        one_rounding = 2 * torch.finfo(leaf.dtype).eps
        close(
            got,
            right,
            rtol=max(one_rounding, 1e-4),
            atol=1e-4 * float(right.abs().max()) if leaf.dtype != torch.float16 else 1e-3,
        )


@pytest.mark.parametrize("short", [0.0, 1e-13, 1e-30])
@pytest.mark.parametrize("lean", [True, False])
def test_a_vector_without_direction_has_cosine_and_gradient_zero(short: float, lean: bool) -> None:
    embedding, weight, target = vectors()
    embedding, weight = embedding.float(), F.normalize(weight.float())
    embedding[0] = short
    weight[3] = short
    weight[6] = short  # the target of row 2
    expected = losses_by_loop(
        cosines_by_loop(torch.where(embedding == short, 0, embedding), torch.where(weight == short, 0, weight)),
        target,
        additive_cosine_margin(),
        30.0,
    )
    embedding.requires_grad_()
    weight.requires_grad_()
    run = linear_am_softmax_loss if lean else lambda *a, **o: plain_form(linear_am_softmax_loss, *a, **o)
    loss = run(embedding, weight, target, chunk_size=2, reduction="none")
    close(loss, expected, rtol=1e-5, atol=1e-5)
    for grad, rows in zip(gradients(loss.sum(), embedding, weight), ([0], [3, 6]), strict=True):
        assert grad.isfinite().all()
        assert torch.equal(grad[rows], torch.zeros_like(grad[rows]))
    head = CosineClassifier(4, 7)
    head.weight.data = weight.detach()
    cosine = head(embedding)
    assert torch.equal(cosine[0], torch.zeros(7))
    assert torch.equal(cosine[:, [3, 6]], torch.zeros(6, 2))
    grads = torch.autograd.grad(cosine.square().sum(), (embedding, head.weight), create_graph=True)
    assert all(g.isfinite().all() for g in grads)
    second = torch.autograd.grad(sum(g.sum() for g in grads), (embedding, head.weight))
    assert all(g.isfinite().all() for g in second)


def test_a_short_vector_still_has_a_direction() -> None:
    vector = torch.tensor([[1e-11, 0.0], [0.0, 2e-12], [3e9, 0.0]])
    head = CosineClassifier(2, 2)
    head.weight.data = torch.tensor([[2e-12, 0.0], [0.0, 1e9]])
    assert torch.equal(head(vector).detach(), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))


@pytest.mark.parametrize(("dtype", "fine", "long"), [(torch.float32, 1e19, 2e19), (torch.float64, 1e154, 2e154)])
def test_a_vector_too_long_for_its_squares_gives_nan_and_no_silent_zero(
    dtype: torch.dtype, fine: float, long: float
) -> None:
    head = CosineClassifier(2, 2)
    head.weight.data = torch.tensor([[1.0, 0.0], [0.0, fine]], dtype=dtype)
    target = torch.tensor([0, 1])
    z = torch.tensor([[3.0, 4.0], [0.6 * fine, 0.8 * fine]], dtype=dtype)
    close(head(z), torch.tensor([[0.6, 0.8], [0.6, 0.8]], dtype=dtype), rtol=1e-6)
    assert linear_am_softmax_loss(z, head.weight, target, chunk_size=1).isfinite()
    for bad in (long, math.inf, math.nan):
        spoiled = torch.tensor([[3.0, 4.0], [bad, 0.0]], dtype=dtype, requires_grad=True)
        cosine = head(spoiled)
        assert cosine[0].isfinite().all()
        assert cosine[1].isnan().all()
        for loss in (
            am_softmax_loss(cosine, target, reduction="none"),
            linear_am_softmax_loss(spoiled, head.weight, target, chunk_size=1, reduction="none"),
        ):
            assert loss[0].isfinite()
            assert loss[1].isnan()
            (grad,) = gradients(loss.sum(), spoiled)
            assert grad[0].isfinite().all()
            assert grad[1].isnan().any()
        weight = spoiled.detach()  # class vectors
        assert linear_am_softmax_loss(z, weight, target, chunk_size=1).isnan()
        assert plain_form(linear_am_softmax_loss, z, weight, target).isnan()


def test_an_ignored_embedding_may_hold_anything() -> None:
    embedding, weight, target = vectors()
    expected = linear_am_softmax_loss(embedding, weight, target)
    embedding[1] = math.nan
    embedding.requires_grad_()
    weight.requires_grad_()
    loss = linear_am_softmax_loss(embedding, weight, target, chunk_size=2)
    close(loss, expected)
    grads = gradients(loss, embedding, weight)
    assert all(g.isfinite().all() for g in grads)
    assert torch.equal(grads[0][1], torch.zeros(4, dtype=torch.float64))


def test_only_the_wanted_gradient_is_made() -> None:
    embedding, weight, target = vectors()
    full = embedding.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = gradients(linear_am_softmax_loss(*full, target, chunk_size=3), *full)
    loss = linear_am_softmax_loss(full[0], weight, target, chunk_size=3)
    assert torch.equal(gradients(loss, full[0])[0], expected[0])
    loss = linear_am_softmax_loss(embedding, full[1], target, chunk_size=3)
    assert torch.equal(gradients(loss, full[1])[0], expected[1])
    assert not linear_am_softmax_loss(embedding, weight, target).requires_grad


def test_the_memory_of_the_linear_form_does_not_grow_with_the_classes() -> None:
    rows, size, chunk = 64, 8, 100

    def extra(classes: int, chunk_size: int | None = chunk) -> int:
        embedding = torch.randn(rows, size, requires_grad=True)
        weight = torch.randn(classes, size, requires_grad=True)
        target = torch.randint(classes, (rows,))

        def run() -> Tensor:
            loss = linear_am_softmax_loss(embedding, weight, target, chunk_size=chunk_size)
            loss.backward()
            return loss

        return peak_bytes(run) - weight.numel() * weight.element_size()

    small, large = extra(500), extra(5000)
    assert large <= small + 4096
    assert small <= 4 * (rows * chunk + 8 * rows * size + 8 * chunk * size)
    # without a chunk size: a fraction of the 102 MB of the matrix
    assert extra(400_000, None) <= 48 * 2**20


def test_the_memory_of_the_plain_form() -> None:
    cosine = torch.empty(50, 20_000).uniform_(-0.9, 0.9).requires_grad_()
    target = torch.randint(20_000, (50,))

    def run() -> Tensor:
        loss = am_softmax_loss(cosine, target)
        loss.backward()
        return loss

    # the gradient itself is one
    assert peak_bytes(run) <= 1.1 * cosine.numel() * 4
    cosine.grad = None
    cosine = cosine.detach().half().requires_grad_()
    # cosines and exponentials in float32
    assert peak_bytes(run) <= 1.1 * cosine.numel() * (4 + 4)


# --- transforms ---


def test_compiled() -> None:
    embedding, weight, target = vectors()
    embedding.requires_grad_()
    weight.requires_grad_()
    head = CosineClassifier(4, 7).double()

    def everything(z: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        cosine = head(z)
        return (
            am_softmax_loss(cosine, target),
            margin_softmax_loss(cosine, target, psi=additive_angular_margin(0.5)),
            margin_softmax_loss(cosine, target, psi=multiplied_angle(3)),
            linear_am_softmax_loss(z, w, target, chunk_size=3),
        )

    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = compiled(embedding, weight), everything(embedding, weight)
    for a, b in zip(got, expected, strict=True):
        close(a, b)
    for a, b in zip(gradients(sum(got), embedding, weight), gradients(sum(expected), embedding, weight), strict=True):
        close(a, b)


def test_compiled_chunks_are_not_all_held() -> None:
    rows, classes, size = 64, 20_000, 4
    embedding = torch.randn(rows, size, requires_grad=True)
    weight = torch.randn(classes, size, requires_grad=True)
    target = torch.randint(classes, (rows,))
    torch._dynamo.reset()
    loss = torch.compile(
        lambda z, w: linear_am_softmax_loss(z, w, target, chunk_size=5000), fullgraph=True, backend="aot_eager"
    )

    def run() -> Tensor:
        value = loss(embedding, weight)
        torch.autograd.grad(value, (embedding, weight))
        return value

    run()
    assert peak_bytes(run) <= 0.9 * rows * classes * 4


def test_a_compiled_search() -> None:
    embedding, label = vectors()[0], torch.tensor([0, 0, 1, 1, 1, 2])
    torch._dynamo.reset()
    search = torch.compile(lambda z: retrieval_accuracy(z, label), fullgraph=True, backend="aot_eager")
    assert search(embedding) == retrieval_accuracy(embedding, label)


@EACH_PSI
def test_functional_transforms(psi: nn.Module) -> None:
    cosine, target = example((3, 4))

    def rows(c: Tensor, t: Tensor) -> Tensor:
        return margin_softmax_loss(c, t, psi=psi, scale=5.0, reduction="none")

    def mean(c: Tensor, t: Tensor) -> Tensor:
        return margin_softmax_loss(c, t, psi=psi, scale=5.0)

    close(torch.vmap(rows)(cosine, target), rows(cosine, target))
    close(torch.vmap(lambda t: rows(cosine[0], t))(target), rows(cosine[:1].expand(3, 4, 5), target))
    leaf = cosine[0].clone().requires_grad_()
    close(torch.func.grad(mean)(cosine[0], target[0]), gradients(mean(leaf, target[0]), leaf)[0])
    hessian = torch.autograd.functional.hessian(lambda c: mean(c, target[0]), cosine[0])
    close(torch.func.hessian(mean)(cosine[0], target[0]), hessian)
    direction = torch.randn(4, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(cosine[0], direction)
        tangent = forward_ad.unpack_dual(mean(dual, target[0])).tangent
    close(tangent, (gradients(mean(leaf, target[0]), leaf)[0] * direction).sum())


def test_functional_transforms_of_the_linear_form() -> None:
    embedding, weight, target = vectors(rows=4, classes=5, size=3)

    def loss(z: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return linear_am_softmax_loss(z, w, t, scale=5.0, chunk_size=2)

    leaves = embedding.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = gradients(loss(*leaves, target), *leaves)
    for a, b in zip(torch.func.grad(loss, argnums=(0, 1))(embedding, weight, target), expected, strict=True):
        close(a, b)
    each = torch.vmap(loss, in_dims=(0, None, 0))(embedding.reshape(2, 2, 3), weight, target.reshape(2, 2))
    by_hand = [loss(z, weight, t) for z, t in zip(embedding.reshape(2, 2, 3), target.reshape(2, 2), strict=True)]
    close(each, torch.stack(by_hand))
    hessian = torch.autograd.functional.hessian(lambda z: loss(z, weight, target), embedding)
    close(torch.func.hessian(loss)(embedding, weight, target), hessian)


def test_inside_a_transform_of_something_else() -> None:
    cosine, target = example()
    embedding, weight, index = vectors()
    for value in (am_softmax_loss(cosine, target), linear_am_softmax_loss(embedding, weight, index)):
        assert value > 0
    scaled = torch.func.grad(lambda a: a * am_softmax_loss(cosine, target))(torch.tensor(1.0))
    close(scaled, am_softmax_loss(cosine, target), rtol=1e-6)
    scaled = torch.func.grad(lambda a: a * linear_am_softmax_loss(embedding, weight, index))(torch.tensor(1.0))
    close(scaled, linear_am_softmax_loss(embedding, weight, index), rtol=1e-6)
    ratio = torch.vmap(lambda z: retrieval_accuracy(z, torch.tensor([0, 0, 1, 1, 1, 2]))[1])(embedding.expand(2, 6, 4))
    assert ratio.tolist() == [retrieval_accuracy(embedding, torch.tensor([0, 0, 1, 1, 1, 2]))[1].item()] * 2


def test_the_chunks_by_plain_operations() -> None:
    embedding, weight, target = vectors(rows=3, classes=5, size=3)
    index = target.clamp(min=0)
    both = (3 * F.normalize(embedding)).requires_grad_(), F.normalize(weight).requires_grad_()

    def chunked(size: int | None) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, w: am_softmax.linear_rest_and_target(z, w, index, size)

    whole = chunked(None)(*both)
    cosine = cosines_by_loop(*both)
    close(whole[:, 1], 3 * cosine.gather(1, index.unsqueeze(1)).squeeze(1))
    close(whole[:, 0], (3 * cosine).scatter(1, index.unsqueeze(1), -math.inf).logsumexp(1))
    expected = gradients(whole[:, 1].sum() + 2 * whole[:, 0].sum(), *both)
    for size in (1, 2, 4, 5):
        got = chunked(size)(*both)
        close(got, whole)
        for a, b in zip(gradients(got[:, 1].sum() + 2 * got[:, 0].sum(), *both), expected, strict=True):
            close(a, b)
    assert gradgradcheck(chunked(2), both)


def test_the_form_by_plain_operations_takes_leading_dimensions() -> None:
    cosine, target = example((3, 4))
    cosine.requires_grad_()
    got, expected = plain_form(am_softmax_loss, cosine, target), am_softmax_loss(cosine, target)
    close(got, expected)
    close(gradients(got, cosine)[0], gradients(expected, cosine)[0])


def test_a_gradient_that_is_differentiated_again_through_the_lean_form() -> None:
    embedding, weight, target = vectors()
    embedding.requires_grad_()
    weight.requires_grad_()
    seconds = []
    for run in (linear_am_softmax_loss, lambda *a, **o: plain_form(linear_am_softmax_loss, *a, **o)):
        loss = run(embedding, weight, target, scale=4.0)
        (grad,) = torch.autograd.grad(loss, embedding, create_graph=True)
        seconds.append(gradients(grad.square().sum(), embedding, weight))
    for a, b in zip(*seconds, strict=True):
        close(a, b)


@pytest.mark.parametrize("lean", [True, False])
def test_autocast_leaves_the_cosines_alone(lean: bool) -> None:
    embedding, weight, target = (x.float() if x.is_floating_point() else x for x in vectors(size=64))
    embedding.requires_grad_()
    weight.requires_grad_()
    head = CosineClassifier(64, 7)
    head.weight.data = weight.detach()
    label = torch.arange(6) // 2

    def run() -> tuple[Tensor, ...]:
        linear = linear_am_softmax_loss(embedding, weight, target, chunk_size=3)
        return linear, am_softmax_loss(head(embedding), target), *retrieval_accuracy(embedding, label).values()

    expected = run()
    expected_grads = gradients(expected[0], embedding, weight)
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        if not lean:
            patch.setattr(_fast, "plain", lambda *_: False)
            patch.setattr(_function, "plain", lambda *_: False)
        got = run()
        inside = gradients(got[0], embedding, weight, retain_graph=True) if lean else None
    grads = gradients(got[0], embedding, weight, retain_graph=True)
    if inside is not None:
        assert all(map(torch.equal, inside, grads))
    for a, b in zip((*got, *grads), (*expected, *expected_grads), strict=True):
        assert a.dtype == torch.float32
        close(a, b, rtol=1e-4, atol=1e-5)  # a bfloat16 product would be wrong by 1e-2


def test_nothing_is_read_from_a_device() -> None:
    """Tensors without values: whoever looks at one, or waits for one, fails."""
    embedding = torch.empty(6, 4, device="meta", requires_grad=True)
    head = CosineClassifier(4, 7, device="meta")
    target = torch.empty(6, dtype=torch.long, device="meta")
    for psi in PSIS:
        loss = margin_softmax_loss(head(embedding), target, psi=psi)
        loss.backward()
        assert loss.device.type == "meta"
    loss = linear_am_softmax_loss(embedding, head.weight, target, chunk_size=3)
    loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.shape == (7, 4)
    assert retrieval_accuracy(embedding, target)[1].shape == ()


# --- the classifier ---


def test_the_classifier_gives_cosines() -> None:
    embedding, weight, _ = vectors()
    head = CosineClassifier(4, 7).double()
    head.weight.data = weight
    cosine = head(embedding.reshape(2, 3, 4))
    assert cosine.shape == (2, 3, 7)
    close(cosine.reshape(6, 7), cosines_by_loop(embedding, weight))
    assert gradcheck(head, (embedding.requires_grad_(),))
    assert gradgradcheck(head, (embedding,))


def test_the_cosines_stay_in_range() -> None:
    torch.manual_seed(0)
    head = CosineClassifier(16, 500)
    embedding = torch.cat([head.weight.detach(), -head.weight.detach()])
    raw = F.linear(unit(embedding), unit(head.weight))
    assert raw.max() > 1  # rounding does leave the range
    assert raw.min() < -1
    cosine = head(embedding)
    assert cosine.max() == 1
    assert cosine.min() == -1
    assert cosine[:500].diagonal().min() > 1 - 1e-6


def test_the_class_vectors_at_the_start() -> None:
    torch.manual_seed(0)
    head = CosineClassifier(64, 2000)
    assert head.weight.shape == (2000, 64)
    assert head.weight.requires_grad
    lengths = head.weight.detach().norm(dim=1)
    assert float(lengths.mean()) == pytest.approx(1, abs=0.01)
    assert float(head.weight.detach().mean()) == pytest.approx(0, abs=0.002)
    before = head.weight.detach().clone()
    head.reset_parameters()
    assert not torch.equal(before, head.weight)
    assert repr(head) == "CosineClassifier(in_features=64, num_classes=2000)"


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
)
def test_class_vectors_stay_float32_with_every_digit(convert: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    head = CosineClassifier(8, 5)
    head(torch.ones(1, 8)).sum().backward()
    before = head.weight.detach().clone()
    kept = convert(head)
    assert kept.weight.dtype == torch.float32
    assert kept.weight.grad.dtype == torch.float32
    assert torch.equal(kept.weight, before)
    assert isinstance(kept.weight, nn.Parameter)


def test_the_classifier_moves_widens_and_copies() -> None:
    head = CosineClassifier(8, 5)
    assert head.to("meta").weight.device.type == "meta"
    assert copy.deepcopy(head).to(torch.float16).weight.device.type == "meta"
    assert head.to_empty(device="cpu").weight.shape == (5, 8)
    head.register_buffer("seen", torch.zeros(3, dtype=torch.long))
    assert head.half().seen.dtype == torch.long
    assert CosineClassifier(8, 5).to("meta", torch.bfloat16).weight.dtype == torch.float32
    assert CosineClassifier(8, 5).to("meta", torch.bfloat16).weight.device.type == "meta"
    assert CosineClassifier(8, 5).double().weight.dtype == torch.float64
    assert CosineClassifier(8, 5).double().float().weight.dtype == torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert CosineClassifier(8, 5).weight.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_step_in_half_precision_leaves_float32_class_vectors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    encoder, head = nn.Linear(6, 8).to(dtype), CosineClassifier(8, 5).to(dtype)
    optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=1e-4)
    before = head.weight.detach().clone()
    cosine = head(encoder(torch.randn(10, 6, dtype=dtype)))
    assert cosine.dtype == torch.float32
    am_softmax_loss(cosine, torch.arange(10) % 5).backward()
    grad = head.weight.grad.clone()
    optimizer.step()
    assert head.weight.dtype == torch.float32
    assert encoder.weight.dtype == dtype
    # the step itself, which the half dtype would round away
    close(head.weight - before, -1e-4 * grad, rtol=1e-2, atol=1e-7)
    assert not torch.equal(before, head.weight)


def test_class_vectors_stay_float32_under_autocast() -> None:
    torch.manual_seed(0)
    encoder, head = nn.Linear(6, 8), CosineClassifier(8, 5)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embedding = encoder(torch.randn(10, 6))
            assert embedding.dtype == torch.bfloat16
            cosine = head(embedding)
            loss = am_softmax_loss(cosine, torch.arange(10) % 5)
        assert cosine.dtype == loss.dtype == torch.float32
        close(cosine, cosines_by_loop(embedding.detach().double(), head.weight.detach().double()), atol=1e-6)
        loss.backward()
        optimizer.step()
    assert head.weight.dtype == head.weight.grad.dtype == torch.float32


# --- the search ---


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_search_equals_sorting(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(6, (23,), generator=generator)
    label[:2] = torch.tensor([100, -7])  # groups of one: stored, never asked
    embedding = torch.randn(23, 3, generator=generator).to(dtype)
    got = retrieval_accuracy(embedding, label, k=(1, 2, 5, 10, 22, 1000))
    assert list(got) == [1, 2, 5, 10, 22, 1000]
    for k, share in got.items():
        assert share.shape == ()
        assert share.dtype == torch.float32
        assert not share.requires_grad
        assert share.item() == pytest.approx(hits_by_sorting(embedding.double(), label, k)), k
    assert got[22] == got[1000] == 1


def test_the_search_in_pieces() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(900, (2500,), generator=generator)  # 2**22 // 2500 rows at a time
    embedding = torch.randn(900, 12, generator=generator)[label] + torch.randn(2500, 12, generator=generator)
    cosine = F.normalize(embedding) @ F.normalize(embedding).t()
    order = cosine.fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :10]
    own = label[order] == label.unsqueeze(1)
    asked = label.bincount()[label] > 1
    got = retrieval_accuracy(embedding, label)
    assert list(got) == [1, 5, 10]
    for k in (1, 5, 10):
        assert got[k].item() == pytest.approx(own[asked, :k].any(1).float().mean().item(), abs=1e-6)
    assert 0.05 < got[1] < got[10] < 0.98
    peak = peak_bytes(lambda: retrieval_accuracy(embedding.repeat(4, 1), label.repeat(4)))
    assert peak < 0.25 * 10_000**2 * 4


def test_a_tie_counts_against_the_query() -> None:
    equal = torch.full((40, 7), 0.3)
    label = torch.arange(40) // 2
    got = retrieval_accuracy(equal, label, k=(1, 38, 39))
    assert [v.item() for v in got.values()] == [0, 0, 1]
    zero = retrieval_accuracy(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1]), k=(2, 3))
    assert [v.item() for v in zero.values()] == [0, 1]
    # a stranger at the same angle, of another length
    embedding = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 3.0]])
    got = retrieval_accuracy(embedding, torch.tensor([0, 0, 1]), k=(1, 2))
    assert [v.item() for v in got.values()] == [0, 1]
    # and one that is farther by more than rounding
    embedding = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 3.00001]])
    assert retrieval_accuracy(embedding, torch.tensor([0, 0, 1]), k=1)[1].item() == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 2e19])
def test_a_diverged_encoder_has_no_score(bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(12).repeat(5)
    one = torch.randn(60, 8, generator=generator)
    one[7, 3] = bad
    for embedding in (one, torch.full((60, 8), bad)):
        assert all(share.isnan() for share in retrieval_accuracy(embedding, label).values())
    assert retrieval_accuracy(one[torch.arange(60) != 7], label[1:])[1].isfinite()


def test_one_k_and_no_gradient() -> None:
    embedding = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]], requires_grad=True)
    got = retrieval_accuracy(embedding, torch.tensor([5, 5, 6], dtype=torch.uint8), k=1)
    assert got == {1: torch.tensor(1.0)}
    assert not got[1].requires_grad


# --- modules ---


def test_modules_equal_functions() -> None:
    cosine, target = example((3, 4))
    embedding, weight, index = vectors()
    psi = additive_angular_margin(0.3)
    options: dict[str, Any] = {"scale": 5.0, "ignore_index": 2, "reduction": "sum"}
    target[target == -100] = 2
    index[index == -100] = 2
    assert torch.equal(
        MarginSoftmaxLoss(psi=psi, **options)(cosine, target), margin_softmax_loss(cosine, target, psi=psi, **options)
    )
    assert torch.equal(
        AmSoftmaxLoss(margin=0.2, **options)(cosine, target), am_softmax_loss(cosine, target, margin=0.2, **options)
    )
    assert torch.equal(
        LinearAmSoftmaxLoss(margin=0.2, chunk_size=2, **options)(embedding, weight, index),
        linear_am_softmax_loss(embedding, weight, index, margin=0.2, chunk_size=2, **options),
    )
    label = torch.arange(6) // 2
    assert RetrievalAccuracy(k=[1, 3])(embedding, label) == retrieval_accuracy(embedding, label, k=(1, 3))


def test_the_defaults_of_the_modules() -> None:
    cosine, target = example((3, 4))
    embedding, weight, index = vectors()
    psi = multiplied_angle()
    assert torch.equal(MarginSoftmaxLoss(psi=psi)(cosine, target), margin_softmax_loss(cosine, target, psi=psi))
    assert torch.equal(AmSoftmaxLoss()(cosine, target), am_softmax_loss(cosine, target))
    assert torch.equal(
        LinearAmSoftmaxLoss()(embedding, weight, index), linear_am_softmax_loss(embedding, weight, index)
    )
    label = torch.arange(6) // 2
    assert RetrievalAccuracy()(embedding, label) == retrieval_accuracy(embedding, label)


def own_psi(cosine: Tensor) -> Tensor:
    return cosine - 0.1


def test_modules_say_what_they_are_and_survive_a_copy() -> None:
    modules = {
        "AmSoftmaxLoss(margin=0.35, scale=30, ignore_index=-100, dim=-1, reduction='mean')": AmSoftmaxLoss(),
        "LinearAmSoftmaxLoss(margin=0.35, scale=64, chunk_size=None, ignore_index=-100, reduction='mean')": (
            LinearAmSoftmaxLoss(scale=64)
        ),
        "RetrievalAccuracy(k=(3,))": RetrievalAccuracy(k=3),
        "MultipliedAngle(m=2)": MultipliedAngle(2),
    }
    for text, module in modules.items():
        assert repr(module) == text
        assert repr(pickle.loads(pickle.dumps(module))) == text
    text = repr(MarginSoftmaxLoss(psi=multiplied_angle(3), reduction="sum"))
    assert "(psi): MultipliedAngle(m=3)" in text
    assert "scale=30, ignore_index=-100, dim=-1, reduction='sum'" in text
    assert "psi=" not in text
    assert "psi=<function own_psi" in repr(MarginSoftmaxLoss(psi=own_psi))
    assert MarginSoftmaxLoss(psi=own_psi)(*example()) == margin_softmax_loss(*example(), psi=own_psi)
    assert not list(MarginSoftmaxLoss(psi=multiplied_angle()).parameters())


def test_every_function_has_its_module() -> None:
    functions = [name for name in am_softmax.__all__ if name.islower()]
    assert len(functions) == 8
    for name in functions:
        twin = "".join(part.capitalize() for part in name.split("_"))
        assert issubclass(getattr(am_softmax, twin), nn.Module)


# --- what trainers do ---


@EACH_PSI
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 30.0, 64.0, 300.0])
def test_the_fast_road_is_the_formula(psi: nn.Module, dtype: torch.dtype, scale: float) -> None:
    cosine, target = example((40,), classes=6)
    cosine[2:6] = torch.tensor([1.0, -1, -1, -1, -1, -1]).roll(1)
    target[2:5] = torch.tensor([1, 0, 5])  # sure and hopeless rows
    cosine[7, 3], target[7] = -math.inf, 2
    for margin in (psi, own_psi):
        found = []
        for run in (margin_softmax_loss, lambda *a, **o: plain_form(margin_softmax_loss, *a, **o)):
            c = cosine.to(dtype).requires_grad_()
            loss = run(c, target, psi=margin, scale=scale, reduction="none")
            g = torch.linspace(0.5, 2, 40, dtype=dtype)
            (grad,) = torch.autograd.grad(loss, c, g, retain_graph=True)
            (again,) = torch.autograd.grad(loss, c, g, create_graph=True)
            (second,) = torch.autograd.grad(again.nan_to_num().square().sum(), c)
            found.append((loss.detach(), grad, again.detach(), second))
        rtol = scale * 8 * torch.finfo(dtype).eps
        for got, right in zip(*found, strict=True):
            close(got, right, rtol=max(rtol, 1e-12), atol=rtol * float(right.abs().nan_to_num().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_losses_and_both_derivatives_keep_their_digits(dtype: torch.dtype) -> None:
    for lead in (0.1, 0.5, 1.0, 1.6):
        cosine = torch.tensor([[0.8, 0.8 - lead]], dtype=dtype, requires_grad=True)
        loss = am_softmax_loss(cosine, torch.tensor([0]), margin=0.0, scale=64.0)
        with mpmath.workdps(40):
            a, b = (mpmath.mpf(float(x)) for x in cosine[0].detach())
            z = 64 * (b - a)
            p = 1 / (1 + mpmath.exp(-z))
            value, first, second = mpmath.log1p(mpmath.exp(z)), 64 * p, 64**2 * p * (1 - p)
        (grad,) = torch.autograd.grad(loss, cosine, create_graph=True)
        (curvature,) = torch.autograd.grad(grad[0, 1], cosine)
        rel = 64 * 8 * torch.finfo(dtype).eps
        assert loss.item() == pytest.approx(float(value), rel=rel)
        assert grad[0].tolist() == pytest.approx([-float(first), float(first)], rel=rel)
        assert curvature[0].tolist() == pytest.approx([-float(second), float(second)], rel=rel)


@EACH_PSI
def test_the_linear_form_takes_any_margin(psi: nn.Module) -> None:
    embedding, weight, target = vectors()
    expected = losses_by_loop(cosines_by_loop(embedding, weight), target, psi, 12.0)
    for chunk_size in (None, 2):
        got = linear_margin_softmax_loss(
            embedding, weight, target, psi=psi, scale=12.0, chunk_size=chunk_size, reduction="none"
        )
        close(got, expected, rtol=1e-10)
        module = LinearMarginSoftmaxLoss(psi=psi, scale=12.0, chunk_size=chunk_size, reduction="none")
        assert torch.equal(module(embedding, weight, target), got)


def test_a_scale_that_learns() -> None:
    cosine, target = example((4, 3))
    embedding, weight, index = vectors()
    weight = F.normalize(weight)
    inputs = [x.requires_grad_() for x in (cosine, embedding, weight)]
    for psi in (additive_cosine_margin(), additive_angular_margin(), own_psi):
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

        def loss(s: Tensor, c: Tensor, psi: Any = psi) -> Tensor:
            return margin_softmax_loss(c, target, psi=psi, scale=s)

        def linear(s: Tensor, z: Tensor, w: Tensor, psi: Any = psi) -> Tensor:
            return linear_margin_softmax_loss(z, w, index, psi=psi, scale=s, chunk_size=3)

        close(loss(scale, inputs[0]), loss(3.0, inputs[0]))
        close(linear(scale, *inputs[1:]), linear(3.0, *inputs[1:]))
        assert gradcheck(loss, (scale, inputs[0]))
        assert gradgradcheck(loss, (scale, inputs[0]))
        assert gradcheck(linear, (scale, *inputs[1:]))
        assert gradgradcheck(linear, (scale, *inputs[1:]))
    for module in (AmSoftmaxLoss, LinearAmSoftmaxLoss):
        (parameter,) = module(scale=nn.Parameter(torch.tensor(20.0))).parameters()
        assert parameter.item() == 20
    (parameter,) = MarginSoftmaxLoss(psi=own_psi, scale=nn.Parameter(torch.tensor([20.0]))).parameters()
    assert parameter.shape == (1,)
    with pytest.raises(ValueError, match="scale must be a finite number > 0"):
        AmSoftmaxLoss(scale=nn.Parameter(torch.tensor(-1.0)))
    large = torch.tensor(200.0, dtype=torch.float64, requires_grad=True)
    close(loss(large, cosine), loss(200.0, cosine))
    close(linear(large, *inputs[1:]), linear(200.0, *inputs[1:]))


def test_a_margin_that_learns() -> None:
    class Learned(AdditiveCosineMargin):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.more = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def forward(self, cosine: Tensor) -> Tensor:
            return super().forward(cosine) - self.more

    cosine, target = example()
    psi = Learned()
    loss = MarginSoftmaxLoss(psi=psi, scale=3.0)(cosine, target)
    close(loss, am_softmax_loss(cosine, target, margin=0.1 + 0.2, scale=3.0))
    (grad,) = gradients(loss, psi.more)
    step = 1e-6
    ends = [am_softmax_loss(cosine, target, margin=0.1 + 0.2 + sign * step, scale=3.0) for sign in (1, -1)]
    close(grad, (ends[0] - ends[1]) / (2 * step), rtol=1e-8)


def test_numbers_of_numpy_and_tensors_are_options() -> None:
    cosine, target = example()
    expected = am_softmax_loss(cosine, target, margin=0.5, scale=16.0)
    for scale, margin in (
        (np.float32(16), np.float64(0.5)),
        (torch.tensor(16), torch.tensor(0.5)),
        (np.int64(16), 0.5),
    ):
        assert torch.equal(am_softmax_loss(cosine, target, margin=margin, scale=scale), expected)
    label = torch.arange(6) // 2
    assert retrieval_accuracy(cosine, label, k=np.int64(2)) == retrieval_accuracy(cosine, label, k=2)


def test_the_classes_in_another_dimension() -> None:
    cosine, target = example((3, 4))
    turned = cosine.movedim(-1, 1)
    for dim in (1, -2):
        got = am_softmax_loss(turned, target, dim=dim, reduction="none")
        assert torch.equal(got, am_softmax_loss(cosine, target, reduction="none"))
        soft = F.one_hot(target.clamp(min=0), 5).double().movedim(-1, 1)
        close(am_softmax_loss(turned, soft, dim=dim), am_softmax_loss(cosine, target.clamp(min=0)))


@EACH_PSI
def test_a_soft_target_weights_the_loss_of_each_class(psi: nn.Module) -> None:
    cosine, _ = example((6,))
    tau = torch.rand(6, 5, dtype=torch.float64).softmax(-1)
    tau[0] = torch.tensor([0, 0.5, 0, 0.5, 0])
    each = [losses_by_loop(cosine, torch.full((6,), c), psi, 9.0) for c in range(5)]
    expected = (torch.stack(each, -1) * tau).sum(-1)
    close(margin_softmax_loss(cosine, tau, psi=psi, scale=9.0, reduction="none"), expected)
    close(margin_softmax_loss(cosine, tau, psi=psi, scale=9.0), expected.mean())
    cosine[0, 2] = -math.inf
    deleted = margin_softmax_loss(cosine[:1, [0, 1, 3, 4]], tau[:1, [0, 1, 3, 4]], psi=psi)
    c = cosine[:1].clone().requires_grad_()
    loss = margin_softmax_loss(c, tau[:1], psi=psi)
    close(loss, deleted)
    assert gradients(loss, c)[0].isfinite().all()
    with pytest.raises(ValueError, match="finite at the target"):
        margin_softmax_loss(cosine, torch.full((6, 5), 0.2, dtype=torch.float64), psi=psi)
    with pytest.raises(ValueError, match="sum to 1"):
        margin_softmax_loss(cosine, tau / 2, psi=psi)


def test_margins_and_losses_in_place() -> None:
    def psi(cosine_t: Tensor) -> Tensor:
        return cosine_t.sub_(0.35)

    embedding, weight, target = vectors()
    cosine = cosines_by_loop(embedding, weight)
    for run, plain_run, inputs in (
        (margin_softmax_loss, am_softmax_loss, (cosine,)),
        (linear_margin_softmax_loss, linear_am_softmax_loss, (embedding, weight)),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        close(run(*leaves, target, psi=psi), plain_run(*leaves, target))
        for reference in (plain_form, lambda f, *a, **o: f(*a, **o)):
            loss = reference(run, *leaves, target, psi=psi, reduction="none")
            right = plain_run(*leaves, target, reduction="none")
            expected = gradients((right * 2)[3:].sum(), *leaves)
            loss *= 2
            loss[:3] = 0
            for a, b in zip(gradients(loss.sum(), *leaves), expected, strict=True):
                close(a, b)
        loss = plain_run(*leaves, target, reduction="none")
        loss *= 2
        loss[:3] = 0
        for a, b in zip(gradients(loss.sum(), *leaves), expected, strict=True):
            close(a, b)


@pytest.mark.parametrize("scale", [20.0, torch.tensor(20.0, requires_grad=True)])
def test_compiled_for_any_number_of_rows(scale: float | Tensor) -> None:
    weight = torch.randn(50, 4, requires_grad=True)
    frames = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Any:
        frames.append(graph)
        return graph.forward

    def both(z: Tensor, w: Tensor, t: Tensor) -> Tensor:
        cosine = F.normalize(z) @ F.normalize(w).t()
        return linear_am_softmax_loss(z, w, t, scale=scale) + am_softmax_loss(cosine, t, scale=scale)

    torch._dynamo.reset()
    compiled = torch.compile(both, dynamic=True, fullgraph=True, backend=counting)
    for rows in (5, 8, 13, 21, 34, 55):
        z, t = torch.randn(rows, 4), torch.randint(50, (rows,))
        close(compiled(z, weight, t), both(z, weight, t).detach(), rtol=1e-5, atol=1e-5)
    assert len(frames) == 1


def test_exported_with_any_number_of_rows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = CosineClassifier(4, 50)

        def forward(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return am_softmax_loss(self.head(z), t), linear_am_softmax_loss(z, self.head.weight, t)

    model, rows = Model(), torch.export.Dim("rows", min=2)
    example_inputs = torch.randn(6, 4), torch.randint(50, (6,))
    exported = torch.export.export(model, example_inputs, dynamic_shapes=({0: rows}, {0: rows})).module()
    for n in (3, 11):
        z, t = torch.randn(n, 4), torch.randint(50, (n,))
        for got, right in zip(exported(z, t), model(z, t), strict=True):
            close(got, right.detach(), rtol=1e-5, atol=1e-5)


def test_traced() -> None:
    cosine, target = example()
    traced = torch.jit.trace(lambda c: am_softmax_loss(c, target), cosine, check_trace=False)
    close(traced(cosine * 0.5), am_softmax_loss(cosine * 0.5, target))


def test_class_vectors_given_memory_are_drawn() -> None:
    head = CosineClassifier(64, 500, device="meta", dtype=torch.float64).to_empty(device="cpu")
    assert head.weight.dtype == torch.float64
    assert float(head.weight.detach().norm(dim=1).mean()) == pytest.approx(1, abs=0.02)
    kept = CosineClassifier(3, 4)
    head = CosineClassifier(3, 4, device="meta")
    head.load_state_dict(kept.state_dict(), assign=True)
    assert torch.equal(head.weight, kept.weight)
    with pytest.raises(ValueError, match=r"^dtype must be"):
        CosineClassifier(3, 4, dtype=torch.bfloat16)


def test_a_hugging_face_model_without_a_head_gets_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.PretrainedConfig()
    drawn = []

    class Body(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.encoder = nn.Linear(6, 64)
            self.post_init()

    class Classifier(Body):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.head = CosineClassifier(64, 500)
            self.post_init()

    class Own(Classifier):
        def _init_weights(self, module: nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, CosineClassifier):
                drawn.append(module)
                transformers.initialization.constant_(module.weight, 0.5)

    Body(config).save_pretrained(tmp_path / "body")
    for dtype in (torch.float32, torch.bfloat16):
        rubbish = [torch.full((500, 64), math.nan) for _ in range(20)]  # memory that is given away again
        del rubbish
        model = Classifier.from_pretrained(tmp_path / "body", dtype=dtype)
        lengths = model.head.weight.detach().norm(dim=1)
        assert model.head.weight.dtype == torch.float32
        assert float(lengths.mean()) == pytest.approx(1, abs=0.02)
        assert float(lengths.std()) == pytest.approx(128**-0.5, rel=0.2)
    # what was saved is loaded, and a model's own way to draw is left alone
    model.save_pretrained(tmp_path / "whole")
    again = Classifier.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    close(again.head.weight.detach(), model.head.weight.detach(), rtol=1e-2)
    assert (Own.from_pretrained(tmp_path / "body").head.weight == 0.5).all()
    assert drawn


FSDP = """
import os, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from lossbook.am_softmax import CosineClassifier, additive_angular_margin, am_softmax_loss
from lossbook.am_softmax import linear_am_softmax_loss, margin_softmax_loss

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
z, t = torch.randn(6, 8), torch.arange(6) % 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = CosineClassifier(8, 5)

    def forward(self, z, t):
        return linear_am_softmax_loss(z, self.head.weight, t)


model = Model()
weight = model.head.weight.detach().clone().requires_grad_()
expected = linear_am_softmax_loss(z, weight, t)
expected.backward()
fully_shard(model, mesh=mesh)
try:
    linear_am_softmax_loss(z, model.head.weight, t)
    raise SystemExit("not refused")
except TypeError as error:
    for part in ("weight is a sharded", "forward", "unshard()", 'full_tensor(grad_placements=[Partial("avg")])'):
        assert part in str(error), error


def same(loss):
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(model.head.weight.grad.full_tensor(), weight.grad)
    model.zero_grad()


same(model(z, t))
same(linear_am_softmax_loss(z, model.head.weight.full_tensor(grad_placements=[Partial("avg")]), t))

bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
for own in (False, True):
    head = CosineClassifier(8, 5)
    right = head(z.bfloat16()).detach()
    wrapped = nn.Sequential(head)
    if own:
        fully_shard(head, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(wrapped, mesh=mesh, mp_policy=bf16)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cosine = wrapped(z)
    rounded = [w for w in seen if "the class vectors are rounded to torch.bfloat16" in str(w.message)]
    assert bool(rounded) == (not own), [str(w.message) for w in seen]
    assert torch.equal(cosine, right) == own
    wrapped.reshard()
    head.reshard() if own else None
    assert head.weight.dtype == torch.float32

cosine = torch.rand(6, 5) * 1.8 - 0.9
for placement in (Shard(0), Replicate()):
    c = distribute_tensor(cosine, mesh, [placement]).requires_grad_()
    y = distribute_tensor(t, mesh, [placement])
    for psi in (additive_angular_margin(), lambda x: x - 0.2):
        leaf = cosine.clone().requires_grad_()
        plain = margin_softmax_loss(leaf, t, psi=psi)
        plain.backward()
        loss = margin_softmax_loss(c, y, psi=psi)
        c.grad = None
        loss.backward()
        torch.testing.assert_close(loss.full_tensor(), plain)
        torch.testing.assert_close(c.grad.full_tensor(), leaf.grad)
dist.destroy_process_group()
print("all is right")
"""


def test_sharded_by_fsdp2(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FSDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all is right" in done.stdout


# --- errors ---

COSINE, TARGET = torch.zeros(2, 3), torch.tensor([0, 2])
VECTORS, CLASSES = torch.ones(2, 4), torch.ones(3, 4)
PSI = additive_cosine_margin()

ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: additive_cosine_margin(-0.1), ValueError, "m must be a finite number >= 0, got -0.1"),
    (lambda: additive_cosine_margin("a"), TypeError, "m must be a number, got str 'a'"),
    (lambda: additive_angular_margin(-0.1), ValueError, "m must be a finite number >= 0 and <= 1.5708, got -0.1"),
    (lambda: additive_angular_margin(1.6), ValueError, "m must be a finite number >= 0 and <= 1.5708, got 1.6"),
    (lambda: additive_angular_margin(None), TypeError, "m must be a number, got NoneType None"),
    (lambda: multiplied_angle(5), ValueError, "m must be 2, 3 or 4, got 5"),
    (lambda: multiplied_angle(1), ValueError, "m must be 2, 3 or 4, got 1"),
    (lambda: multiplied_angle(2.0), TypeError, "m must be an integer, got float 2.0"),
    (lambda: multiplied_angle(True), TypeError, "m must be an integer, got bool True"),
    (lambda: PSI(torch.tensor(1)), TypeError, r"cosine must be float16, .*, got int64 tensor of shape \(\)"),
    (lambda: PSI(0.5), TypeError, "cosine must be a tensor of scores, got float 0.5"),
    (lambda: am_softmax_loss([0.5], TARGET), TypeError, "cosine must be a tensor of scores, got list"),
    (lambda: am_softmax_loss(COSINE.long(), TARGET), TypeError, "cosine must be float16, .*, got int64 tensor"),
    (lambda: am_softmax_loss(torch.tensor(0.5), TARGET), ValueError, "cosine must have at least one dimension"),
    (
        lambda: am_softmax_loss(torch.zeros(2, 0), TARGET),
        ValueError,
        r"cosine must have at least one class, got float32 tensor of shape \(2, 0\)",
    ),
    (
        lambda: am_softmax_loss(COSINE, TARGET[:1]),
        ValueError,
        r"target must have the shape of the rows, \(2,\) .*, got int64 tensor of shape \(1,\)",
    ),
    (lambda: am_softmax_loss(COSINE, TARGET.float()), TypeError, "target must be class indices of an integer dtype"),
    (
        lambda: am_softmax_loss(COSINE, torch.tensor([0, 3])),
        ValueError,
        r"target must be class indices in \[0, 3\) or ignore_index=-100, got 3",
    ),
    (
        lambda: am_softmax_loss(torch.tensor([[0.99, 1.5, 0.1], [0.0, 0.0, 1.7]]), TARGET),
        ValueError,
        r"cosine must hold cosines, in \[-1, 1\] up to rounding \(CosineClassifier\), got 1.5",
    ),
    (lambda: am_softmax_loss(COSINE - 1.03, TARGET), ValueError, r"cosine must hold cosines, .*, got -1.03"),
    (lambda: am_softmax_loss(COSINE + 1.03, TARGET), ValueError, r"cosine must hold cosines, .*, got 1.03"),
    (lambda: am_softmax_loss(COSINE + math.inf, TARGET), ValueError, "cosine must hold cosines, .*, got inf"),
    (lambda: am_softmax_loss(COSINE - math.inf, TARGET), ValueError, "cosine must be finite at the target, got -inf"),
    (
        lambda: am_softmax_loss(torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, -math.inf]]), TARGET),
        ValueError,
        "cosine must be finite at the target, got -inf",
    ),
    (lambda: am_softmax_loss(COSINE, TARGET, margin=-1), ValueError, "margin must be a finite number >= 0, got -1"),
    (lambda: am_softmax_loss(COSINE, TARGET, scale=0), ValueError, "scale must be a finite number > 0, got 0"),
    (lambda: am_softmax_loss(COSINE, TARGET, scale=math.inf), ValueError, "scale must be a finite number > 0, got inf"),
    (
        lambda: am_softmax_loss(COSINE, TARGET, reduction="max"),
        ValueError,
        "reduction must be one of .*, got str 'max'",
    ),
    (
        lambda: margin_softmax_loss(COSINE, TARGET, psi=0.35),
        TypeError,
        "psi must be a function of the cosine, got float 0.35",
    ),
    (
        lambda: margin_softmax_loss(COSINE, TARGET, psi=lambda c: c.sum()),
        ValueError,
        r"psi must return a tensor of the shape it is given, \(2,\), got float32 tensor of shape \(\)",
    ),
    (
        lambda: margin_softmax_loss(COSINE, TARGET, psi=lambda c: 0.5),
        ValueError,
        r"psi must return a tensor of the shape it is given, \(2,\), got float 0.5",
    ),
    (
        lambda: margin_softmax_loss(COSINE, TARGET, psi=PSI, scale="big"),
        TypeError,
        "scale must be a number, got str 'big'",
    ),
    (
        lambda: linear_am_softmax_loss([1.0], CLASSES, TARGET),
        TypeError,
        r"embedding must be a tensor, got list",
    ),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES.int(), TARGET),
        TypeError,
        "weight must be float16, bfloat16, float32 or float64, got int32 tensor",
    ),
    (
        lambda: linear_am_softmax_loss(torch.tensor(1.0), CLASSES, TARGET),
        ValueError,
        r"embedding must have the length of a class vector, 4, .* tensor of shape \(\)",
    ),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES[0], TARGET),
        ValueError,
        r"weight must have 2 dimensions, got float32 tensor of shape \(4,\)",
    ),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES[:0], TARGET),
        ValueError,
        r"weight must have at least one class vector, got float32 tensor of shape \(0, 4\)",
    ),
    (
        lambda: linear_am_softmax_loss(VECTORS[:, :3], CLASSES, TARGET),
        ValueError,
        r"embedding must have the length of a class vector, 4, as its last dimension, got .* \(2, 3\)",
    ),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET[:1]),
        ValueError,
        "target must have the shape of the rows",
    ),
    (lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET + 1), ValueError, r"indices in \[0, 3\) .*, got 3"),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET, chunk_size=0),
        ValueError,
        "chunk_size must be at least 1, got 0",
    ),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET, chunk_size=2.0),
        TypeError,
        "chunk_size must be an integer, got float 2.0",
    ),
    (lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET, margin=-1), ValueError, "margin must be a finite number"),
    (
        lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET, scale=0),
        ValueError,
        "scale must be a finite number > 0",
    ),
    (lambda: linear_am_softmax_loss(VECTORS, CLASSES, TARGET, reduction=""), ValueError, "reduction must be one of"),
    (lambda: CosineClassifier(0, 3), ValueError, "in_features must be at least 1, got 0"),
    (lambda: CosineClassifier(3, 0), ValueError, "num_classes must be at least 1, got 0"),
    (lambda: CosineClassifier(3.0, 3), TypeError, "in_features must be an integer, got float 3.0"),
    (lambda: CosineClassifier(3, True), TypeError, "num_classes must be an integer, got bool True"),
    (
        lambda: CosineClassifier(4, 3)(torch.ones(2, 3)),
        ValueError,
        r"embedding must have in_features=4 as its last dimension, got float32 tensor of shape \(2, 3\)",
    ),
    (lambda: CosineClassifier(4, 3)(TARGET), TypeError, "embedding must be float16, .*, got int64 tensor"),
    (lambda: CosineClassifier(4, 3)(torch.tensor(1.0)), ValueError, "embedding must have in_features=4"),
    (
        lambda: retrieval_accuracy(VECTORS[0], TARGET),
        ValueError,
        r"embedding must have 2 dimensions, got float32 tensor of shape \(4,\)",
    ),
    (lambda: retrieval_accuracy("a", TARGET), TypeError, "embedding must be a tensor, got str 'a'"),
    (lambda: retrieval_accuracy(VECTORS, [0, 0]), TypeError, "label must be a tensor of an integer dtype, got list"),
    (lambda: retrieval_accuracy(VECTORS, TARGET.float()), TypeError, "label must be .* integer dtype, got float32"),
    (lambda: retrieval_accuracy(VECTORS, TARGET.bool()), TypeError, "label must be .* integer dtype, got bool"),
    (lambda: retrieval_accuracy(VECTORS, TARGET + 0j), TypeError, "label must be .* integer dtype, got complex64"),
    (
        lambda: retrieval_accuracy(VECTORS, TARGET[:1]),
        ValueError,
        r"label must have one number per embedding, shape \(2,\), got int64 tensor of shape \(1,\)",
    ),
    (lambda: retrieval_accuracy(VECTORS, TARGET), ValueError, "label must hold a group of at least two"),
    (lambda: retrieval_accuracy(VECTORS[:0], TARGET[:0]), ValueError, "label must hold a group of at least two"),
    (lambda: retrieval_accuracy(VECTORS, TARGET, k=0), ValueError, "k must be at least 1, got 0"),
    (lambda: retrieval_accuracy(VECTORS, TARGET, k=(1, 2.0)), TypeError, "k must be an integer, got float 2.0"),
    (lambda: retrieval_accuracy(VECTORS, TARGET, k=()), ValueError, "k must hold at least one number, got none"),
    (lambda: retrieval_accuracy(VECTORS, TARGET, k=1.5), TypeError, "k must be an integer, got float 1.5"),
    (lambda: AmSoftmaxLoss(margin=-1), ValueError, "margin must be a finite number >= 0, got -1"),
    (lambda: AmSoftmaxLoss(scale=0), ValueError, "scale must be a finite number > 0, got 0"),
    (lambda: AmSoftmaxLoss(reduction="max"), ValueError, "reduction must be one of"),
    (lambda: LinearAmSoftmaxLoss(margin=-1), ValueError, "margin must be a finite number >= 0, got -1"),
    (lambda: LinearAmSoftmaxLoss(scale=0), ValueError, "scale must be a finite number > 0, got 0"),
    (lambda: LinearAmSoftmaxLoss(chunk_size=0), ValueError, "chunk_size must be at least 1, got 0"),
    (lambda: LinearAmSoftmaxLoss(reduction="max"), ValueError, "reduction must be one of"),
    (lambda: MarginSoftmaxLoss(psi=0.35), TypeError, "psi must be a function of the cosine, got float 0.35"),
    (lambda: MarginSoftmaxLoss(psi=PSI, scale=0), ValueError, "scale must be a finite number > 0, got 0"),
    (lambda: MarginSoftmaxLoss(psi=PSI, reduction="max"), ValueError, "reduction must be one of"),
    (lambda: RetrievalAccuracy(k=0), ValueError, "k must be at least 1, got 0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS, ids=[f"{i}: {e[2][:40]}" for i, e in enumerate(ERRORS)])
def test_errors_name_the_argument_and_what_was_expected(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=f"^{message}" if not message.startswith("indices") else message):
        call()


def test_rounding_is_no_error() -> None:
    two_steps = torch.full((2, 3), 1 + 2 * torch.finfo(torch.bfloat16).eps, dtype=torch.bfloat16)
    for sign in (1, -1):
        assert am_softmax_loss(sign * two_steps, TARGET).isfinite()
        assert margin_softmax_loss(sign * two_steps, TARGET, psi=additive_angular_margin()).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit_of_a_cosine_is_the_same_in_every_dtype(dtype: torch.dtype, sign: int) -> None:
    within = torch.full((2, 3), sign * 1.0156, dtype=dtype)
    beyond = torch.full((2, 3), sign * 1.0234375, dtype=dtype)  # 3 steps of bfloat16
    assert am_softmax_loss(within, TARGET).isfinite()
    with pytest.raises(ValueError, match=r"^cosine must hold cosines.*got -?1.0234"):
        am_softmax_loss(beyond, TARGET)


def test_values_are_not_checked_where_they_cannot_be_read() -> None:
    huge = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]])
    loss = torch.vmap(lambda c: am_softmax_loss(c, TARGET, reduction="none"))(huge.expand(2, 2, 3))
    close(loss[0], torch.tensor([0.0, math.log1p(math.exp(30 * 0.35))]), rtol=1e-3, atol=1e-6)
    assert torch.func.grad(lambda c: am_softmax_loss(c, TARGET))(huge).isfinite().all()


@pytest.mark.parametrize("psi", [additive_angular_margin(0.5), multiplied_angle(4)])
def test_margins_at_their_ends_work_in_inference_mode_and_under_a_counter(psi) -> None:
    z, w, t = torch.eye(2, 4), torch.eye(3, 4), torch.tensor([0, 1])  # cosines of 1
    wanted = linear_margin_softmax_loss(z, w, t, psi=psi)
    with torch.inference_mode():
        assert linear_margin_softmax_loss(z, w, t, psi=psi) == wanted
        assert margin_softmax_loss(z @ w.t(), t, psi=psi).isfinite()
    with FlopCounterMode(display=False):
        linear_margin_softmax_loss(z.requires_grad_(), w, t, psi=psi).backward()


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("length", [1e3, 1e15, 1e18])
def test_long_vectors_have_their_gradient(length, chunk_size) -> None:
    z = torch.tensor([[0.6, 0.8]]).mul(length).requires_grad_()
    w = torch.tensor([[length, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = linear_am_softmax_loss(z, w, torch.tensor([0]), chunk_size=chunk_size)
    unit_z, unit_w = torch.tensor([[0.6, 0.8]]).requires_grad_(), torch.eye(2).requires_grad_()
    wanted = torch.autograd.grad(linear_am_softmax_loss(unit_z, unit_w, torch.tensor([0])), (unit_z, unit_w))
    found = torch.autograd.grad(loss, (z, w))
    torch.testing.assert_close(found[0] * length, wanted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1] * torch.tensor([[length], [1.0]]), wanted[1], rtol=1e-5, atol=1e-5)
