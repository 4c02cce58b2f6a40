"""Soft labels: the loss at soft targets against a slow reference, and what makes and reads soft labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import mpmath as mp
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lossbook._fast import soft_labels as fast
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.soft_labels import (
    Mixup,
    MultilabelProbabilities,
    MultilabelSymmetricKl,
    SmoothLabels,
    beta,
    mixup,
    multilabel_probabilities,
    multilabel_symmetric_kl,
    smooth_labels,
)

INF = float("inf")
NAN = float("nan")
HALVES = (torch.float16, torch.bfloat16)

# ------------------------------------------------------------------------------------------- the loss at soft targets


def soft_loss(s: list[float], t: list[float], s_0: float) -> tuple[float, list[float]]:
    """Value and gradient of one row, term by term in high precision; a term with weight 0 does not exist."""
    with mp.workdps(40):
        neg = [(1 - mp.mpf(b)) * mp.exp(a) if b < 1 else mp.mpf(0) for a, b in zip(s, t, strict=True)]
        pos = [mp.mpf(b) * mp.exp(-mp.mpf(a)) if b > 0 else mp.mpf(0) for a, b in zip(s, t, strict=True)]
        all_neg, all_pos = mp.exp(s_0) + mp.fsum(neg), mp.exp(-s_0) + mp.fsum(pos)
        gradient = [float(n / all_neg - p / all_pos) for n, p in zip(neg, pos, strict=True)]
        return float(mp.log(all_neg) + mp.log(all_pos)), gradient


CASES = {
    "plain": ([0.3, -1.2, 2.0, 0.1], [0.2, 0.0, 1.0, 0.5]),
    "minus infinity on a negative": ([-INF, 1.0, -2.0], [0.0, 0.25, 1.0]),
    "infinity on a positive": ([INF, 1.0, -2.0], [1.0, 0.25, 0.0]),
    "masked by hand": ([-1e12, 0.5, 0.5], [0.0, 0.9, 0.1]),
    "right and far": ([1e4, -1e4, 1e4, -1e4], [1.0, 0.0, 1.0, 0.0]),
    "wrong and far": ([1e4, -1e4, 3.0], [0.0, 1.0, 0.5]),
    "soft and far": ([1e4, -1e4, 0.0], [0.5, 0.75, 0.125]),
    "nearly hard": ([20.0, -20.0, 5.0], [1 - 2.0**-20, 2.0**-20, 2.0**-10]),
    "all positive": ([1.0, -3.0, 30.0], [1.0, 1.0, 1.0]),
    "all negative": ([1.0, -3.0, 30.0], [0.0, 0.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("s_0", [0.0, -1.5, 3.0])
@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_at_soft_targets(case: str, s_0: float, dtype: torch.dtype) -> None:
    s, t = CASES[case]
    x = torch.tensor(s, dtype=dtype, requires_grad=True)
    value = multilabel_softmax_loss(x, torch.tensor(t, dtype=dtype), threshold=s_0)
    value.backward()
    expected, gradient = soft_loss(x.tolist(), torch.tensor(t, dtype=dtype).tolist(), s_0)
    eps = torch.finfo(dtype).eps
    size = 1 + max((abs(a) for a in s if abs(a) < 1e4), default=0)  # differences of the scores are rounded
    assert value.item() == pytest.approx(expected, rel=8 * size * eps, abs=8 * size * eps)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor(gradient, dtype=dtype), rtol=8 * size * eps, atol=8 * size * eps)


@pytest.mark.parametrize("s_0", [0.0, -2.0, 1.5])
def test_the_gradient_is_zero_at_half_the_logit(s_0: float) -> None:
    t = torch.tensor([[0.01, 0.3, 0.5, 0.9, 0.999], [0.2, 0.2, 0.2, 0.2, 0.2]], dtype=torch.float64)
    x = (s_0 + torch.logit(t) / 2).requires_grad_()
    (gradient,) = torch.autograd.grad(multilabel_softmax_loss(x, t, threshold=s_0), x)
    torch.testing.assert_close(gradient, torch.zeros_like(t), rtol=0, atol=1e-15)
    torch.testing.assert_close(multilabel_probabilities(x, threshold=s_0), t)


@pytest.mark.parametrize("s_0", [0.0, 1.0])
def test_training_ends_at_the_probabilities(s_0: float) -> None:
    t = torch.tensor([0.05, 0.4, 0.5, 0.8, 0.97], dtype=torch.float64)
    x = torch.tensor([3.0, -2.0, 0.0, 1.0, -1.0], dtype=torch.float64)
    loss = partial(multilabel_softmax_loss, target=t, threshold=s_0)
    for _ in range(200):  # damped Newton steps
        step = torch.linalg.solve(torch.func.hessian(loss)(x), torch.func.grad(loss)(x))
        x = x - step / step.abs().max().clamp(min=1)
    torch.testing.assert_close(multilabel_probabilities(x, threshold=s_0), t, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("s_0", [0.0, 0.5])
def test_soft_equals_hard_at_zero_and_one(dtype: torch.dtype, s_0: float) -> None:
    torch.manual_seed(0)
    s = (torch.randn(40, 12) * torch.logspace(-1, 4, 40)[:, None]).clamp(-1e4, 1e4).to(dtype)
    y = torch.rand(40, 12) < torch.linspace(0, 1, 40)[:, None]
    s[3, ~y[3]] = -INF
    s[36, y[36]] = INF
    hard, soft = s.clone().requires_grad_(), s.clone().requires_grad_()
    a = multilabel_softmax_loss(hard, y, threshold=s_0, reduction="none")
    b = multilabel_softmax_loss(soft, y.to(dtype), threshold=s_0, reduction="none")
    torch.testing.assert_close(a, b)
    a.sum().backward()
    b.sum().backward()
    assert torch.isfinite(a).all()
    assert soft.grad is not None
    assert torch.isfinite(soft.grad).all()
    torch.testing.assert_close(hard.grad, soft.grad)


@pytest.mark.parametrize("junk", [0.0, -1e12, 1e4, INF, -INF, NAN])
def test_masked_soft_labels_are_as_if_deleted(junk: float) -> None:
    torch.manual_seed(0)
    s, t = torch.randn(6, 8, dtype=torch.float64), torch.rand(6, 8, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, False, True, True, True])
    s[:, ~mask] = junk
    x, kept = s.clone().requires_grad_(), s[:, mask].clone().requires_grad_()
    a = multilabel_softmax_loss(x, t, mask=mask)
    b = multilabel_softmax_loss(kept, t[:, mask])
    torch.testing.assert_close(a, b)
    a.backward()
    b.backward()
    assert x.grad is not None
    assert (x.grad[:, ~mask] == 0).all()
    torch.testing.assert_close(x.grad[:, mask], kept.grad)


row = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(-30, 30), min_size=n, max_size=n),
        st.lists(st.floats(-30, 30), min_size=n, max_size=n),
        st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0]), min_size=n, max_size=n),
    )
)


@settings(deadline=None, max_examples=150)
@given(points=row, share=st.floats(0, 1), s_0=st.floats(-5, 5))
def test_the_loss_is_convex(points: tuple[list[float], list[float], list[float]], share: float, s_0: float) -> None:
    a, b, t = (torch.tensor(x, dtype=torch.float64) for x in points)
    loss = partial(multilabel_softmax_loss, target=t, threshold=s_0)
    chord = share * loss(a) + (1 - share) * loss(b)
    assert loss(share * a + (1 - share) * b) <= chord + 1e-12 * (1 + chord)


@settings(deadline=None, max_examples=50)
@given(points=row, s_0=st.floats(-5, 5))
def test_the_hessian_has_no_negative_eigenvalue(
    points: tuple[list[float], list[float], list[float]], s_0: float
) -> None:
    s, _, t = (torch.tensor(x, dtype=torch.float64) for x in points)
    hessian = torch.func.hessian(partial(multilabel_softmax_loss, target=t, threshold=s_0))(s)
    assert torch.linalg.eigvalsh(hessian).min() >= -1e-12


# ------------------------------------------------------------------------------------------------------ probabilities


def test_probabilities() -> None:
    s = torch.tensor([-1e4, -3.0, 0.0, 0.25, 2.0, 1e4], dtype=torch.float64)
    for s_0 in (0.0, 1.25):
        expected = [1 / (1 + mp.exp(-2 * (mp.mpf(x) - s_0))) for x in s.tolist()]
        torch.testing.assert_close(
            multilabel_probabilities(s, threshold=s_0), torch.tensor([float(p) for p in expected], dtype=torch.float64)
        )
    assert multilabel_probabilities(torch.tensor(0.0)) == 0.5
    assert multilabel_probabilities(torch.tensor([-INF, INF])).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", HALVES)
def test_probabilities_of_halves_are_float32(dtype: torch.dtype) -> None:
    s = torch.randn(5, 3).to(dtype)
    torch.testing.assert_close(multilabel_probabilities(s), torch.sigmoid(2 * s.float()))


# ---------------------------------------------------------------------------------------------------------- smoothing


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("smoothing", [0, 0.1, 0.5, 1.0])
def test_smoothing(dtype: torch.dtype, smoothing: float) -> None:
    target = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    before = target.clone()
    got = smooth_labels(target, smoothing)
    assert torch.equal(target, before)
    assert got.dtype == (dtype if dtype.is_floating_point else torch.float32)
    expected = [[t * (1 - smoothing) + smoothing / 2 for t in r] for r in target.tolist()]
    torch.testing.assert_close(got, torch.tensor(expected).to(got.dtype))
    assert 0 <= got.min() <= got.max() <= 1


def test_smoothing_of_soft_labels_and_a_single_one() -> None:
    torch.testing.assert_close(smooth_labels(torch.tensor([0.25]), 0.2), torch.tensor([0.3]))
    torch.testing.assert_close(smooth_labels(torch.tensor(True), 0.2), torch.tensor(0.9))


# -------------------------------------------------------------------------------------------------------------- mixup


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("seed", range(5))
def test_one_permutation_and_one_lambda_mix_samples_and_labels(seed: int) -> None:
    x, t = torch.randn(7, 2, 3, dtype=torch.float64), torch.eye(7, dtype=torch.float64)
    mixed_x, mixed_t, lam = mixup(x, t, alpha=1.0, generator=generator(seed))
    share = lam.double()
    # the identity as labels shows who was mixed with whom
    partner = (mixed_t - share * t) / (1 - share)
    order = partner.argmax(-1)
    torch.testing.assert_close(partner, t[order])
    assert sorted(order.tolist()) == list(range(7))
    torch.testing.assert_close(mixed_x, share * x + (1 - share) * x[order])
    assert lam.shape == ()
    assert 0 <= lam <= 1


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 5.0, 100.0])
def test_lambda_follows_the_beta_distribution(alpha: float) -> None:
    source = generator(0)
    x, t = torch.zeros(1, 1), torch.zeros(1, 1)
    draws = [mixup(x, t, alpha=alpha, generator=source)[2].item() for _ in range(2000)]
    # a float32 just below 1 is coarse, so compare the draws below 1/2, and the balance of the halves
    low = [d for d in draws if d < 0.5]
    law = scipy.stats.beta(alpha, alpha)
    assert scipy.stats.kstest(low, lambda d: 2 * law.cdf(d)).pvalue > 1e-3
    assert len(low) == pytest.approx(1000, abs=4 * math.sqrt(500))


@pytest.mark.parametrize("alpha", [5e-324, 1e-310, 1e-300, 1e-6, 1e-3, 1e6])
def test_extreme_alphas(alpha: float) -> None:
    source = generator(0)
    draws = torch.stack([beta(alpha, torch.device("cpu"), source) for _ in range(200)])
    assert ((draws >= 0) & (draws <= 1)).all()
    if alpha < 1:
        assert ((draws < 1e-3) | (draws > 1 - 1e-3)).float().mean() > 0.95
        assert 60 < (draws > 0.5).sum() < 140
    else:
        torch.testing.assert_close(draws, torch.full_like(draws, 0.5), rtol=0, atol=3e-3)


def test_alpha_zero_mixes_nothing() -> None:
    x, t = torch.randn(4, 3), torch.rand(4, 2)
    mixed_x, mixed_t, lam = mixup(x, t, alpha=0)
    assert torch.equal(mixed_x, x)
    assert torch.equal(mixed_t, t)
    assert lam == 1
    assert mixed_x.data_ptr() != x.data_ptr()
    assert mixed_t.data_ptr() != t.data_ptr()
    source = generator(3)
    state = source.get_state()
    mixup(x.fill_(INF), t, alpha=0, generator=source)
    assert torch.equal(source.get_state(), state)


def test_infinite_samples_stay_what_they_are() -> None:
    x = torch.tensor([[INF, -INF, 1.0, INF]]).repeat(4, 1)
    x[:2, 3] = 0
    for seed in range(5):
        mixed, _, lam = mixup(x, torch.eye(4), alpha=30, generator=generator(seed))
        assert 0 < lam < 1
        assert not mixed.isnan().any()
        assert torch.equal(mixed[:, :2], x[:, :2])
        torch.testing.assert_close(mixed[:, 2], x[:, 2])


def test_a_generator_decides_and_nothing_else() -> None:
    x, t = torch.randn(8, 3), torch.rand(8, 2)
    state = torch.get_rng_state()
    first, again, other = (mixup(x, t, generator=generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[2], other[2])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        without = mixup(x, t)
        torch.manual_seed(1)
        assert all(torch.equal(a, b) for a, b in zip(without, mixup(x, t), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_dtypes_of_mixtures(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3).to(dtype)
    for labels in (torch.bool, torch.int64, torch.float64, *HALVES):
        t = (torch.rand(5, 2) < 0.5).to(labels)
        before = x.clone(), t.clone()
        mixed_x, mixed_t, lam = mixup(x, t, generator=generator(0))
        assert torch.equal(x, before[0])
        assert torch.equal(t, before[1])
        assert mixed_x.dtype == dtype
        assert mixed_t.dtype == (labels if labels.is_floating_point else torch.float32)
        assert lam.dtype == torch.float32
        wide, wide_t, _ = mixup(x.double(), t.double(), generator=generator(0))
        torch.testing.assert_close(mixed_x, wide.to(dtype))
        torch.testing.assert_close(mixed_t, wide_t.to(mixed_t.dtype))


def test_mixtures_carry_gradient() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    t = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: mixup(x, t, generator=generator(2))[:2], (x, t))


def test_single_numbers_can_be_mixed() -> None:
    """A sample and its label may be numbers: a batch then has one dimension."""
    x, t, lam = mixup(torch.tensor([0.0, 10.0]), torch.tensor([False, True]), generator=generator(5))
    torch.testing.assert_close(x, 10 * t)
    assert x.shape == t.shape == (2,)
    assert 0 <= lam <= 1


def test_empty_batches() -> None:
    x, t, _ = mixup(torch.zeros(0, 3), torch.zeros(0, 2))
    assert x.shape == (0, 3)
    assert t.shape == (0, 2)


# ------------------------------------------------------------------------------------------------------- symmetric KL


def mp_symmetric_kl(s: list[float], r: list[float], k: float) -> tuple[float, list[float], list[float]]:
    """Both divergences of two Bernoullis written out, and their gradients."""

    def entry(a: mp.mpf, b: mp.mpf) -> mp.mpf:
        p, not_p, q, not_q = (1 / (1 + mp.exp(-k * x)) for x in (a, -a, b, -b))
        one = p * mp.log(p / q) + not_p * mp.log(not_p / not_q)
        other = q * mp.log(q / p) + not_q * mp.log(not_q / not_p)
        return one + other

    with mp.workdps(60):
        pairs = list(zip(map(mp.mpf, s), map(mp.mpf, r), strict=True))
        return (
            float(mp.fsum(entry(a, b) for a, b in pairs)),
            [float(mp.diff(entry, (a, b), (1, 0))) for a, b in pairs],
            [float(mp.diff(entry, (a, b), (0, 1))) for a, b in pairs],
        )


PAIRS = {
    "plain": ([0.5, -1.25, 2.0], [1.5, -1.25, -3.0]),
    "both sure": ([20.0, 30.0, -25.0], [21.0, 17.0, -40.0]),
    "far apart": ([100.0, -50.0], [-100.0, 60.0]),
    "equal": ([3.0, 0.0], [3.0, 0.0]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [0.5, 1, 2])
@pytest.mark.parametrize("case", PAIRS)
def test_symmetric_kl_is_the_sum_of_both_divergences(case: str, k: float, dtype: torch.dtype) -> None:
    s, r = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in PAIRS[case])
    value = multilabel_symmetric_kl(s, r, scale=k)
    value.backward()
    expected, by_s, by_r = mp_symmetric_kl(*PAIRS[case], k)
    eps = torch.finfo(dtype).eps
    assert value.item() == pytest.approx(expected, rel=16 * eps, abs=1e-300)
    for x, gradient in ((s, by_s), (r, by_r)):
        assert x.grad is not None
        torch.testing.assert_close(x.grad, torch.tensor(gradient, dtype=dtype), rtol=64 * eps, atol=64 * eps)


def test_symmetric_kl_agrees_with_the_formula() -> None:
    torch.manual_seed(0)
    s, r = torch.randn(2, 30, 7, dtype=torch.float64) * 3
    p, q = torch.sigmoid(2 * s), torch.sigmoid(2 * r)
    torch.testing.assert_close(
        multilabel_symmetric_kl(s, r, scale=2, reduction="none"), ((p - q) * 2 * (s - r)).sum(-1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_symmetric_kl_of_far_scores_is_finite(dtype: torch.dtype) -> None:
    s = torch.tensor([1e4, -1e4, 1e4, -INF, -INF, INF], dtype=dtype, requires_grad=True)
    r = torch.tensor([-1e4, -1e4, 1e4, -INF, -1e4, INF], dtype=dtype, requires_grad=True)
    value = multilabel_symmetric_kl(s, r)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float(2 * s[0].detach()))
    for x in (s, r):
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("junk", [0.0, INF, -INF, NAN])
@pytest.mark.parametrize("wide", [False, True])
def test_masked_labels_leave_the_divergence(junk: float, wide: bool) -> None:
    torch.manual_seed(0)
    s, r = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True, False])
    s[:, ~mask] = junk
    x, y = s.requires_grad_(), r.requires_grad_()
    value = multilabel_symmetric_kl(x, y, mask=mask.expand(4, 5) if wide else mask)
    torch.testing.assert_close(value, multilabel_symmetric_kl(s[:, mask], r[:, mask]))
    for gradient in torch.autograd.grad(value, (x, y)):
        assert (gradient[:, ~mask] == 0).all()
        assert torch.isfinite(gradient).all()


def test_reductions_of_the_divergence() -> None:
    s, r = torch.randn(2, 3, 4, 5)
    each = multilabel_symmetric_kl(s, r, reduction="none")
    assert each.shape == (3, 4)
    torch.testing.assert_close(multilabel_symmetric_kl(s, r, reduction="sum"), each.sum())
    torch.testing.assert_close(multilabel_symmetric_kl(s, r), each.mean())
    empty = torch.zeros(0, 4, requires_grad=True)
    value = multilabel_symmetric_kl(empty, empty)
    value.backward()
    assert value == 0
    assert multilabel_symmetric_kl(torch.zeros(2, 0), torch.zeros(2, 0), reduction="none").tolist() == [0, 0]


finite = st.floats(-60, 60, width=32)


@settings(deadline=None, max_examples=100)
@given(s=finite, r=finite, k=st.floats(0.1, 4))
def test_divergence_is_symmetric_and_never_negative(s: float, r: float, k: float) -> None:
    a, b = torch.tensor([s]), torch.tensor([r])
    value = multilabel_symmetric_kl(a, b, scale=k)
    assert value >= 0
    assert (value > 0) == (s != r) or value < 1e-30
    torch.testing.assert_close(value, multilabel_symmetric_kl(b, a, scale=k))


# -------------------------------------------------------------------------------------------------------- conventions

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "probabilities": lambda s: multilabel_probabilities(s, threshold=0.5),
    "symmetric_kl": lambda s: multilabel_symmetric_kl(s, s.flip(0).square(), reduction="none"),
    "smoothing": lambda s: smooth_labels(torch.sigmoid(s), 0.1),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_by_finite_differences(function: Callable[[Tensor], Tensor]) -> None:
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (s,), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, (s,))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_transforms_of_torch(function: Callable[[Tensor], Tensor]) -> None:
    s = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = torch.stack([function(x) for x in s])
    torch.testing.assert_close(torch.vmap(function)(s), expected)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(s[0]), expected[0])
    torch.testing.assert_close(function(s[0].t().contiguous().t()), expected[0])
    total = torch.func.grad(lambda x: function(x).sum())
    torch.testing.assert_close(torch.vmap(total)(s), torch.stack([total(x) for x in s]))
    assert torch.isfinite(torch.func.hessian(lambda x: function(x).sum())(s[0])).all()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_autocast(function: Callable[[Tensor], Tensor]) -> None:
    layer = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function(layer(torch.randn(3, 4)))
        value.sum().backward()
    assert layer.weight.grad is not None
    assert torch.isfinite(layer.weight.grad).all()


def test_mixup_compiles() -> None:
    x, t = torch.randn(4, 3), torch.rand(4, 2)
    compiled = torch.compile(mixup, fullgraph=True, backend="aot_eager")
    mixed_x, _, lam = compiled(x, t, alpha=0.5)
    assert mixed_x.shape == x.shape
    assert 0 <= lam <= 1


# ------------------------------------------------------------------------------------------------------------ modules


def test_modules_are_the_functions() -> None:
    s, r = torch.randn(2, 4, 3)
    t = torch.rand(4, 3)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(MultilabelProbabilities(threshold=0.5)(s), multilabel_probabilities(s, threshold=0.5))
    torch.testing.assert_close(SmoothLabels(0.2)(t), smooth_labels(t, 0.2))
    torch.testing.assert_close(
        MultilabelSymmetricKl(scale=2, reduction="sum")(s, r, mask),
        multilabel_symmetric_kl(s, r, scale=2, mask=mask, reduction="sum"),
    )
    torch.testing.assert_close(MultilabelSymmetricKl()(s, r), multilabel_symmetric_kl(s, r))
    for a, b in zip(
        Mixup(alpha=0.7, generator=generator(1))(s, t), mixup(s, t, alpha=0.7, generator=generator(1)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_the_mixup_module_rests_in_evaluation() -> None:
    s, t = torch.randn(4, 3), torch.tensor([[0, 1], [1, 0], [1, 1], [0, 0]])
    mixed_s, mixed_t, lam = Mixup(alpha=1.0).eval()(s, t)
    assert torch.equal(mixed_s, s)
    assert torch.equal(mixed_t, t.float())
    assert lam == 1
    with pytest.raises(ValueError, match="the same first dimension"):
        Mixup().eval()(s, t[:2])


def test_modules_show_their_options() -> None:
    assert repr(MultilabelProbabilities(threshold=0.5)) == "MultilabelProbabilities(threshold=0.5)"
    assert repr(SmoothLabels(0.1)) == "SmoothLabels(smoothing=0.1)"
    assert repr(Mixup(alpha=0.4)) == "Mixup(alpha=0.4)"
    assert repr(MultilabelSymmetricKl(scale=2)) == "MultilabelSymmetricKl(scale=2, dim=-1, reduction='mean')"


# ------------------------------------------------------------------------------------------------------------- errors

S = torch.zeros(2, 3)
ERRORS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: multilabel_probabilities(S.int()), TypeError, "input must be float16, .* or float64, got int32 tensor"),
    (lambda: multilabel_probabilities(S, threshold=INF), ValueError, "threshold must be a finite number, got inf"),
    (lambda: multilabel_probabilities(S, threshold="0"), TypeError, "threshold must be a number, got str '0'"),  # type: ignore[arg-type]
    (lambda: MultilabelProbabilities(threshold=NAN), ValueError, "threshold must be a finite number, got nan"),
    (lambda: smooth_labels(S + 2, 0.1), ValueError, r"target must be labels in \[0, 1\], got 2\.0"),
    (
        lambda: smooth_labels([0, 1], 0.1),
        TypeError,
        r"target must be a tensor of labels, got list; pass torch.as_tensor\(target\)",
    ),  # type: ignore[arg-type]
    (lambda: smooth_labels(S, 1.5), ValueError, "smoothing must be a finite number >= 0 and <= 1, got 1.5"),
    (lambda: smooth_labels(S, -0.1), ValueError, "smoothing must be a finite number >= 0 and <= 1, got -0.1"),
    (lambda: SmoothLabels(2), ValueError, "smoothing must be a finite number"),
    (lambda: mixup(S.int(), S), TypeError, "input must be float16, .* or float64, got int32 tensor"),
    (lambda: mixup([1.0], S), TypeError, r"input must be a tensor of samples, got list; pass"),  # type: ignore[arg-type]
    (lambda: mixup(S, torch.tensor([0, 2])), ValueError, r"target must be labels in \[0, 1\], got 2"),
    (lambda: mixup(S, S + 0j), TypeError, "target must be labels of a real dtype, got complex64"),
    (lambda: mixup(S, None), TypeError, "target must be a tensor of labels, got NoneType None"),  # type: ignore[arg-type]
    (lambda: mixup(S, S[:1]), ValueError, r"same first dimension, .*, got float32 .* \(2, 3\) and float32 .* \(1, 3\)"),
    (lambda: mixup(S[0, 0], S), ValueError, r"same first dimension, the batch, got float32 tensor of shape \(\)"),
    (lambda: mixup(S, S[0, 0]), ValueError, r"and float32 tensor of shape \(\)"),
    (lambda: mixup(S, S, alpha=-1), ValueError, "alpha must be a finite number >= 0, got -1"),
    (lambda: mixup(S, S, generator=3), TypeError, "generator must be a torch.Generator or None, got int 3"),  # type: ignore[arg-type]
    (lambda: Mixup(alpha=-1), ValueError, "alpha must be a finite number >= 0, got -1"),
    (
        lambda: multilabel_symmetric_kl(S, S[:1]),
        ValueError,
        r"other must have the shape of input, \(2, 3\), got float32",
    ),
    (lambda: multilabel_symmetric_kl(S, S.int()), TypeError, "other must be float16, .* or float64, got int32"),
    (lambda: multilabel_symmetric_kl(S[0, 0], S[0, 0]), ValueError, "input must have at least one dimension"),
    (lambda: multilabel_symmetric_kl(S, S, scale=0), ValueError, "scale must be a finite number > 0, got 0"),
    (lambda: multilabel_symmetric_kl(S, S, mask=S), TypeError, "mask must be a boolean tensor, got float32 tensor"),
    (
        lambda: multilabel_symmetric_kl(S, S, mask=S[:, :2] > 0),
        ValueError,
        "mask must be broadcastable to the shape of",
    ),
    (
        lambda: multilabel_symmetric_kl(S, S, mask=S[None] > 0),
        ValueError,
        r"\(2, 3\), got bool tensor of shape \(1, 2, 3\)",
    ),
    (lambda: multilabel_symmetric_kl(S, S, reduction="avg"), ValueError, "reduction must be one of .*, got str 'avg'"),
    (lambda: MultilabelSymmetricKl(scale=-1), ValueError, "scale must be a finite number > 0, got -1"),
    (lambda: MultilabelSymmetricKl(reduction="avg"), ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("call", "error", "message"), ERRORS)
def test_errors_name_the_argument(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------ masks, clamping, derivatives


def test_smoothing_leaves_unknown_labels_as_they_are() -> None:
    t, known = torch.tensor([[1.0, NAN, -7.0], [0.0, 1.0, 0.5]]), torch.tensor([[True, False, False], [True] * 3])
    got = smooth_labels(t, 0.2, mask=known)
    torch.testing.assert_close(got, torch.tensor([[0.9, NAN, -7.0], [0.1, 0.9, 0.5]]), equal_nan=True)
    torch.testing.assert_close(SmoothLabels(0.2)(t, known), got, equal_nan=True)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_mixed_label_is_known_where_both_are(alpha: float) -> None:
    x, t = torch.randn(6, 2), torch.rand(6, 5)
    known = torch.rand(6, 5) < 0.6
    plain = mixup(torch.eye(6), torch.eye(6), alpha=alpha, generator=generator(4))
    partner = (plain[1] - plain[2] * torch.eye(6)).argmax(-1) if alpha else torch.arange(6)
    _, mixed, lam, mask = mixup(x, t.masked_fill(~known, NAN), alpha=alpha, generator=generator(4), mask=known)
    assert torch.equal(mask, known & known[partner])
    expected = lam * t + (1 - lam) * t[partner]
    torch.testing.assert_close(mixed, expected.masked_fill(~mask, 0))
    layer = Mixup(alpha=alpha, generator=generator(4))
    assert torch.equal(layer(x, t, known)[3], mask)
    assert torch.equal(layer.eval()(x, t, known)[3], known)


def test_labels_that_rounding_left_outside_are_clamped() -> None:
    t = torch.tensor([[1 + 5e-5, -5e-5, 0.25]])
    inside = t.clamp(0, 1)
    for read in (lambda t: smooth_labels(t, 0.1), lambda t: mixup(t, t, alpha=0)[1]):
        torch.testing.assert_close(read(t), read(inside), rtol=0, atol=0)
        torch.testing.assert_close(torch.vmap(read)(t.expand(2, 1, 3))[0], read(inside), rtol=0, atol=0)
        compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(t), read(inside))
        with pytest.raises(ValueError, match=r"labels in \[0, 1\]"):
            read(t + 1e-3)


def test_rows_without_labels_are_left_out_of_the_divergence() -> None:
    s, r = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[True], [False], [True]])
    kept = [0, 2]
    torch.testing.assert_close(multilabel_symmetric_kl(s, r, mask=mask), multilabel_symmetric_kl(s[kept], r[kept]))
    assert multilabel_symmetric_kl(s, r, mask=torch.zeros(4, dtype=torch.bool)) == 0


def test_labels_of_the_divergence_may_stand_in_any_dimension() -> None:
    s, r = torch.randn(2, 2, 5, 3)
    torch.testing.assert_close(
        multilabel_symmetric_kl(s, r, dim=1, reduction="none"),
        multilabel_symmetric_kl(s.mT, r.mT, reduction="none"),
    )


def test_an_unreduced_divergence_can_be_edited_in_place() -> None:
    s, r = torch.randn(2, 3, 4, requires_grad=True).unbind()
    loss = multilabel_symmetric_kl(s, r, reduction="none")
    wanted = torch.autograd.grad(2 * loss[1], (s, r), retain_graph=True)
    edited = multilabel_symmetric_kl(s, r, reduction="none")
    edited *= 2
    edited[0] = edited[2] = 0
    for a, b in zip(torch.autograd.grad(edited.sum(), (s, r)), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("a", "b"),
    [(30.0, 10.0), (-40.0, -12.0), (25.0, -25.0), (3.0, 3.0), (20.0, 20.001), (0.5, 0.501), (1e-3, 1.1e-3), (-80, -34)],
)
def test_derivatives_of_the_divergence_keep_their_digits(a: float, b: float, dtype: torch.dtype) -> None:
    s, r = torch.tensor([a], dtype=dtype, requires_grad=True), torch.tensor([b], dtype=dtype, requires_grad=True)
    a, b = s.item(), r.item()
    with mp.workdps(80):

        def exact(x: mp.mpf, y: mp.mpf) -> mp.mpf:
            return (1 / (1 + mp.exp(-x)) - 1 / (1 + mp.exp(-y))) * (x - y)

        value = float(exact(mp.mpf(a), mp.mpf(b)))
        orders = ((1, 0), (0, 1), (2, 0), (1, 1), (0, 2))
        wanted = [float(mp.diff(exact, (mp.mpf(a), mp.mpf(b)), order)) for order in orders]
    loss = multilabel_symmetric_kl(s, r)
    by_s, by_r = torch.autograd.grad(loss, (s, r), create_graph=True)
    second = [torch.autograd.grad(x, y, retain_graph=True)[0] for x, y in ((by_s, s), (by_s, r), (by_r, r))]
    quick = torch.autograd.grad(multilabel_symmetric_kl(s, r), (s, r))
    digits = 16 * max(1.0, abs(a), abs(b)) * torch.finfo(dtype).eps
    assert loss.item() == pytest.approx(value, rel=digits, abs=1e-60)
    for got, right in zip((by_s, by_r, *second), wanted, strict=True):
        assert got.item() == pytest.approx(right, rel=digits, abs=1e-60)
    for got, right in zip(quick, wanted[:2], strict=True):
        assert got.item() == pytest.approx(right, rel=digits, abs=1e-60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(7,), (3, 5, 7), (11, 7), (0, 7)])
def test_the_divergence_some_rows_at_a_time_is_its_formula(
    shape: tuple[int, ...], k: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sure, hopeless and tiny scores, all at once and two rows at a time: value, gradients and what keeps the graph."""
    size = torch.tensor([1e-3, 0.1, 1, 5, 20, 40, 80], dtype=dtype)
    s, r = ((torch.randn(shape, dtype=dtype) * size).requires_grad_() for _ in range(2))
    weight = torch.rand(shape[:-1], dtype=dtype)

    def derivatives() -> list[Tensor]:
        loss = multilabel_symmetric_kl(s, r, scale=k, reduction="none")
        first = torch.autograd.grad((loss * weight).sum(), (s, r), retain_graph=True)
        (again,) = torch.autograd.grad((loss * weight).sum(), s)
        return [loss.detach(), *first, again]

    monkeypatch.setattr(fast, "plain", lambda *_: False)
    formula = derivatives()
    monkeypatch.undo()
    for piece in (2**16, 14):
        monkeypatch.setattr(fast, "numbers", lambda device, piece=piece: piece)
        for found, wanted in zip(derivatives(), formula, strict=True):
            torch.testing.assert_close(found, wanted, rtol=40 * torch.finfo(dtype).eps, atol=1e-35)
