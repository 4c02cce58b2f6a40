"""The multi-label losses against slow references, and every convention of the interface."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import mpmath as mp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes, peak_ratio
from torch import Tensor, nn

from lossbook import multilabel_softmax as module
from lossbook._fast import multilabel_softmax as fast
from lossbook.multilabel_softmax import (
    MultilabelPairwiseLoss,
    MultilabelPredict,
    MultilabelSoftmaxLoss,
    SparseMultilabelSoftmaxLoss,
    SubsetSoftmaxLoss,
    multilabel_pairwise_loss,
    multilabel_predict,
    multilabel_softmax_loss,
    sparse_multilabel_softmax_loss,
    subset_softmax_loss,
)

INF, NAN = math.inf, math.nan
HALVES = (torch.float16, torch.bfloat16)

# ---------------------------------------------------------------------------------------------------------- references
# One row at a time, in Python floats or in 50 digits; labels 0 and 1 leave a side, whatever the score there.


def two_sides(s: list[float], t: list[float], s_0: float = 0.0) -> float:
    with mp.workdps(50):
        neg = mp.exp(s_0) + mp.fsum((1 - mp.mpf(y)) * mp.exp(x) for x, y in zip(s, t, strict=True) if y < 1)
        pos = mp.exp(-s_0) + mp.fsum(mp.mpf(y) * mp.exp(-mp.mpf(x)) for x, y in zip(s, t, strict=True) if y > 0)
        return float(mp.log(neg) + mp.log(pos))


def two_sides_slope(s: list[float], t: list[float], s_0: float = 0.0) -> list[float]:
    with mp.workdps(50):
        neg = [(1 - mp.mpf(y)) * mp.exp(x) if y < 1 else 0 for x, y in zip(s, t, strict=True)]
        pos = [mp.mpf(y) * mp.exp(-mp.mpf(x)) if y > 0 else 0 for x, y in zip(s, t, strict=True)]
        all_neg, all_pos = mp.exp(s_0) + mp.fsum(neg), mp.exp(-s_0) + mp.fsum(pos)
        return [float(a / all_neg - b / all_pos) for a, b in zip(neg, pos, strict=True)]


def pairwise(s: list[float], t: list[float], scale: float = 1.0, margin: float = 0.0) -> float:
    with mp.workdps(50):
        terms = [
            mp.exp(scale * (mp.mpf(a) - mp.mpf(b) + mp.mpf(margin)))
            for a, y in zip(s, t, strict=True)
            if y == 0
            for b, z in zip(s, t, strict=True)
            if z == 1
        ]
        return float(mp.log(1 + mp.fsum(terms)))


def subsets(s: list[float], t: list[float], most: int | None = None, s_0: float = 0.0) -> float:
    """Every set of k labels, or every set of at most ``most`` labels filled up with the threshold class."""
    k = int(sum(t))
    right = mp.fsum(mp.mpf(a) for a, y in zip(s, t, strict=True) if y)
    with mp.workdps(50):
        sizes = [k] if most is None else range(most + 1)
        fill = 0 if most is None else most
        total = mp.fsum(
            mp.exp(mp.fsum(map(mp.mpf, chosen)) + max(fill - size, 0) * mp.mpf(s_0))
            for size in sizes
            for chosen in itertools.combinations(s, size)
        )
        return float(mp.log(total) - right - max(fill - k, 0) * mp.mpf(s_0))


def rows(f: Callable[..., float], s: Tensor, t: Tensor, *options: float) -> Tensor:
    flat = zip(s.double().reshape(-1, s.shape[-1]).tolist(), t.double().reshape(-1, t.shape[-1]).tolist(), strict=True)
    return torch.tensor([f(a, b, *options) for a, b in flat], dtype=torch.float64).reshape(s.shape[:-1])


def published(s: Tensor, t: Tensor) -> Tensor:
    """The usual few lines: a concatenated zero and scores pushed away by 1e12."""
    y = (1 - 2 * t) * s
    zeros = torch.zeros_like(y[..., :1])
    neg, pos = torch.cat((y - t * 1e12, zeros), -1), torch.cat((y - (1 - t) * 1e12, zeros), -1)
    return torch.logsumexp(neg, -1) + torch.logsumexp(pos, -1)


def scores(*shape: int, seed: int = 0, spread: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).mul(spread).to(dtype)


def labels(*shape: int, seed: int = 0, share: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < share


def soft_labels(*shape: int, seed: int = 0) -> Tensor:
    """Some of them exactly 0 or 1."""
    t = torch.rand(shape, generator=torch.Generator().manual_seed(seed + 2), dtype=torch.float64)
    return (1.6 * t - 0.3).clamp(0, 1)


def indices(t: Tensor, width: int | None = None, ignore_index: int = -100) -> Tensor:
    """The labels of every row as indices, padded on both ends, shuffled, with repeats."""
    flat = t.reshape(t.shape[:-1].numel(), t.shape[-1])
    width = int(flat.sum(-1).max()) + 2 if width is None else width
    out = torch.full((len(flat), width), ignore_index)
    for row, index in zip(flat, out, strict=True):
        at = row.nonzero().flatten()
        if len(at):
            at = torch.cat((at, at[:1]))[: width - 1].flip(0)  # the first one twice
            index[1 : 1 + len(at)] = at
    return out.reshape(*t.shape[:-1], width)


def padded(t: Tensor) -> Tensor:
    return indices(t, width=t.shape[-1] + 2)


def value_and_grad(f: Callable[[Tensor], Tensor], s: Tensor) -> tuple[Tensor, Tensor]:
    s = s.detach().clone().requires_grad_()
    loss = f(s)
    (grad,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), grad


@pytest.fixture(params=["lean", "formula"])
def road(request, monkeypatch) -> str:
    """The eager way through the rows, or the one that torch's transforms take."""
    if request.param == "formula":
        monkeypatch.setattr(fast, "readable", lambda *tensors: False)
    return request.param


# the losses as functions of scores and hard labels, all options given
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dense": lambda s, t, **kw: multilabel_softmax_loss(s, t, **kw),
    "soft": lambda s, t, **kw: multilabel_softmax_loss(s, 0.8 * t.to(s.dtype) + 0.1, **kw),
    "sparse": lambda s, t, **kw: sparse_multilabel_softmax_loss(s, padded(t), **kw),
    "pairwise": lambda s, t, **kw: multilabel_pairwise_loss(s, t, **kw),
    "subset": lambda s, t, **kw: subset_softmax_loss(s, t, **kw),
    "subset_padded": lambda s, t, **kw: subset_softmax_loss(s, t, max_positives=max(s.shape[-1], 1), **kw),
}
MASKED = ("dense", "soft", "sparse", "pairwise", "subset", "subset_padded")
SHIFTED = ("dense", "soft", "sparse", "subset", "subset_padded")  # those with a threshold
each_loss = pytest.mark.parametrize("name", LOSSES)

# --------------------------------------------------------------------------------------------- the value, the gradient


@pytest.mark.parametrize("s_0", [0.0, 0.7, -40.0])
@pytest.mark.parametrize("kind", ["bool", "int64", "uint8", "float64", "soft"])
def test_dense_equals_loops(road, kind, s_0):
    s = scores(2, 5, 7, spread=20)
    t = soft_labels(2, 5, 7) if kind == "soft" else labels(2, 5, 7).to(getattr(torch, kind))
    loss, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t, threshold=s_0, reduction="none"), s)
    torch.testing.assert_close(loss, rows(two_sides, s, t, s_0), rtol=1e-12, atol=1e-300)
    slope = [
        two_sides_slope(a, b, s_0) for a, b in zip(s.view(-1, 7).tolist(), t.double().view(-1, 7).tolist(), strict=True)
    ]
    torch.testing.assert_close(grad, torch.tensor(slope, dtype=torch.float64).view_as(s), rtol=1e-12, atol=1e-17)


def test_dense_equals_the_published_form():
    s, t = scores(20, 30), labels(20, 30)
    loss, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    # the published form moves scores by 1e12 and back: only the positives' and negatives' own terms remain, exact
    wanted, wanted_grad = value_and_grad(lambda s: published(s, t.double()), s)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rows_", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("soft", [False, True])
def test_blocks_of_rows_change_nothing(monkeypatch, rows_, soft):
    s = scores(rows_, 6)
    t = soft_labels(rows_, 6) if soft else labels(rows_, 6)
    mask = labels(rows_, 6, seed=5, share=0.8)

    def loss(s: Tensor) -> Tensor:
        return multilabel_softmax_loss(s, t, mask=mask, reduction="none")

    whole = value_and_grad(loss, s)
    monkeypatch.setattr(fast, "WHOLE", 1)
    torch.testing.assert_close(value_and_grad(loss, s), whole, rtol=1e-14, atol=1e-16)
    with torch.no_grad():
        torch.testing.assert_close(loss(s), whole[0], rtol=1e-14, atol=0)


def test_sums_of_the_gradient_stay_below_one_however_many_labels():
    for n in (10, 1000, 30_000):
        s, t = scores(4, n, spread=1), labels(4, n, share=0.01)
        _, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)  # noqa: B023
        assert (grad * ~t).sum(-1).lt(1).all()
        assert (grad * t).sum(-1).gt(-1).all()
        assert (grad * ~t >= 0).all()
        assert (grad * t <= 0).all()


def test_soft_labels_equal_hard_ones_at_0_and_1(road):
    s = torch.cat((scores(6, 9), 1e4 * scores(6, 9, seed=3).sign()))
    t = labels(12, 9)
    s[::3] = torch.where(t, s, -INF)[::3]
    hard = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    soft = value_and_grad(lambda s: multilabel_softmax_loss(s, t.double(), reduction="none"), s)
    torch.testing.assert_close(soft, hard, rtol=1e-15, atol=0)


def test_a_label_near_0_or_1_keeps_its_weight(road):
    tiny = 1e-12
    s = torch.tensor([[1e4, -1e4, 30.0, -30.0]], dtype=torch.float64)
    t = torch.tensor([[1 - 2.0**-50, 2.0**-60, 1 - tiny, tiny]], dtype=torch.float64)
    loss, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    torch.testing.assert_close(loss, rows(two_sides, s, t), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad[0].tolist(), two_sides_slope(s[0].tolist(), t[0].tolist()), rtol=1e-10, atol=1e-300)


def test_soft_labels_are_met_at_half_their_logit(road):
    t = torch.tensor([[0.05, 0.3, 0.5, 0.9, 0.999]], dtype=torch.float64)
    _, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t), torch.logit(t) / 2)
    assert grad.abs().max() < 1e-15


# --------------------------------------------------------------------------------------------------------- the sparse


@pytest.mark.parametrize("count", [0, 1, 4, 11])
def test_sparse_equals_dense(road, count):
    s = scores(3, 4, 11)
    t = torch.zeros(3, 4, 11, dtype=torch.bool)
    for i, row in enumerate(t.view(-1, 11)):
        row[torch.randperm(11, generator=torch.Generator().manual_seed(i))[:count]] = True
    dense = value_and_grad(lambda s: multilabel_softmax_loss(s, t, threshold=0.3, reduction="none"), s)
    for width in (max(count, 0), count + 1, count + 7):
        index = t.view(-1, 11).int().topk(width if width <= 11 else 11).indices.view(3, 4, -1)
        index = torch.where(t.gather(-1, index), index, -100)
        index = torch.cat((index, index.flip(-1)), -1)  # every positive twice
        for dtype in (torch.int64, torch.int32, torch.int8):
            sparse = value_and_grad(
                lambda s: sparse_multilabel_softmax_loss(s, index.to(dtype), threshold=0.3, reduction="none"),  # noqa: B023
                s,
            )
            torch.testing.assert_close(sparse, dense, rtol=1e-13, atol=1e-15)


def test_sparse_takes_an_index_of_no_width(road):
    s = scores(3, 5)
    none = sparse_multilabel_softmax_loss(s, torch.empty(3, 0, dtype=torch.int64), reduction="none")
    torch.testing.assert_close(none, rows(two_sides, s, torch.zeros(3, 5)), rtol=1e-12, atol=0)


def test_sparse_takes_any_padding_value(road):
    s, t = scores(4, 6), labels(4, 6)
    wanted = multilabel_softmax_loss(s, t)
    for ignore_index in (-1, 77, 2**40):
        index = indices(t, ignore_index=ignore_index)
        torch.testing.assert_close(sparse_multilabel_softmax_loss(s, index, ignore_index=ignore_index), wanted)
    # also one that names a label: that label is then never positive
    t[:, 3] = False
    index = torch.where(indices(t) == -100, 3, indices(t))
    torch.testing.assert_close(sparse_multilabel_softmax_loss(s, index, ignore_index=3), multilabel_softmax_loss(s, t))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("none", [False, True])
@pytest.mark.parametrize("form", ["dense", "float", "sparse"])
def test_scores_far_on_their_right_side_stay_on_the_fast_road(form, none, masked, monkeypatch):
    t = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0] if none else [0, 1, 0, 0]], dtype=torch.bool)
    s = torch.where(t, 200.0, -200.0).requires_grad_()
    mask = torch.tensor([True, True, True, False]) if masked else None
    monkeypatch.setattr(module, "two_sides", lambda *_: pytest.fail("the formula was called"))
    if form == "sparse":
        loss = sparse_multilabel_softmax_loss(s, indices(t), mask=mask)
    else:
        loss = multilabel_softmax_loss(s, t.float() if form == "float" else t, mask=mask)
    loss.backward()
    assert loss == 0
    assert not s.grad.any()


# ------------------------------------------------------------------------------------------------------- dead accurate


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("s_pos", [5.0, 8.0, 16.0, 30.0, 1e4])
@pytest.mark.parametrize("form", ["dense", "float", "sparse"])
def test_positives_that_dominate_cancel_nothing(road, form, s_pos, dtype):
    s = torch.tensor([[2.0, s_pos]], dtype=dtype)
    target = {"dense": torch.tensor([[0, 1]]), "float": torch.tensor([[0.0, 1.0]]), "sparse": torch.tensor([[1, -100]])}
    call = sparse_multilabel_softmax_loss if form == "sparse" else multilabel_softmax_loss
    loss, grad = value_and_grad(lambda s: call(s, target[form]), s)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    a, b = s[0].double().tolist()
    assert loss.item() == pytest.approx(math.log1p(math.exp(a)) + math.log1p(math.exp(-b)), rel=2e-7)
    assert grad[0, 0].item() == pytest.approx(1 / (1 + math.exp(-a)), rel=1e-2 if dtype in HALVES else 1e-6)
    assert grad[0, 1].item() == pytest.approx(-1 / (1 + math.exp(b)) if b < 700 else 0, rel=1e-2, abs=1e-7)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_large_scores_are_finite(road, name, dtype):
    s = torch.tensor([[1e4, -1e4, 9e3, -9e3, 0.0]] * 4).to(dtype)
    t = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0] * 5, [1] * 5]).bool()
    loss, grad = value_and_grad(lambda s: LOSSES[name](s, t, reduction="none"), s)
    assert loss.isfinite().all()
    assert (loss >= 0).all()
    assert grad.isfinite().all()
    if name in ("dense", "sparse"):
        torch.testing.assert_close(loss.double(), rows(two_sides, s, t), rtol=1e-6, atol=1e-6)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_negative_at_minus_infinity_is_gone(road, name, dtype):
    s, t = scores(6, 7, dtype=dtype), labels(6, 7)
    t[:, 2] = False
    t[0], t[1] = False, True
    t[1, 2] = False
    s[:, 2] = -INF
    if name == "soft":  # a negative has a soft label of exactly 0

        def f(s, t):
            return multilabel_softmax_loss(s, t.to(s.dtype), reduction="none")
    else:

        def f(s, t):
            return LOSSES[name](s, t, reduction="none")

    loss, grad = value_and_grad(lambda s: f(s, t), s)
    rest = [0, 1, 3, 4, 5, 6]
    without, grad_without = value_and_grad(lambda s: f(s, t[:, rest]), s[:, rest])
    torch.testing.assert_close(loss, without, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad[:, rest], grad_without, rtol=1e-2, atol=1e-6)
    assert (grad[:, 2] == 0).all()


def test_tiny_losses_keep_their_digits(road):
    s = torch.tensor([[-20.0, 25.0, -30.0]])
    loss = multilabel_softmax_loss(s, torch.tensor([[0, 1, 0]]), reduction="none")
    torch.testing.assert_close(loss.double(), rows(two_sides, s, torch.tensor([[0, 1, 0]])), rtol=5e-6, atol=0)
    apart = multilabel_pairwise_loss(s, torch.tensor([[0, 1, 0]]), reduction="none")
    torch.testing.assert_close(apart.double(), rows(pairwise, s, torch.tensor([[0, 1, 0]])), rtol=5e-6, atol=0)
    sets = subset_softmax_loss(s, torch.tensor([[0, 1, 0]]), reduction="none")
    torch.testing.assert_close(sets.double(), rows(subsets, s, torch.tensor([[0, 1, 0]])), rtol=5e-6, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_float32_differs_from_float64_by_rounding_only(soft):
    s = scores(50, 400, spread=10).float()
    t = soft_labels(50, 400).float() if soft else labels(50, 400, share=0.1)
    single = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    exact = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s.double())
    torch.testing.assert_close(single[0].double(), exact[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(single[1].double(), exact[1], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("spread", [1e3, 1e4])
def test_gradients_of_large_float32_scores_keep_their_digits(road, spread, soft):
    """Labels a few units apart share the push: the sums must be measured from the largest score."""
    s = spread * scores(20, 8, spread=1).round() + scores(20, 8, seed=5)
    s = torch.cat((s, s + scores(20, 8, seed=6, spread=1)), -1).float()
    t = soft_labels(20, 16).float() if soft else labels(20, 16)
    _, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    exact = [two_sides_slope(a, b) for a, b in zip(s.double().tolist(), t.double().tolist(), strict=True)]
    torch.testing.assert_close(grad.double(), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- the two roads before it


@pytest.mark.parametrize(("scale", "margin"), [(1.0, 0.0), (0.25, 0.0), (30.0, 0.35), (1.0, -2.0)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_pairwise_equals_loops(scale, margin, dtype):
    s, t = scores(12, 6, spread=2), labels(12, 6)
    t[0], t[1] = False, True  # a side is empty: no pair
    loss = multilabel_pairwise_loss(s, t.to(dtype), scale=scale, margin=margin, reduction="none")
    torch.testing.assert_close(loss, rows(pairwise, s, t, scale, margin), rtol=1e-12, atol=1e-300)
    assert (loss[:2] == 0).all()


def test_pairwise_measures_differences_of_large_scores():
    s = torch.tensor([[1e4, 1e4 - 2.0, 1e4 - 3.0]])
    loss = multilabel_pairwise_loss(s, torch.tensor([[1, 0, 1]]), reduction="none")
    torch.testing.assert_close(loss.double(), rows(pairwise, s, torch.tensor([[1, 0, 1]])), rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", range(1, 9))
def test_subsets_equal_brute_force(n):
    every = torch.tensor(list(itertools.product([0, 1], repeat=n)))  # every k, 0 and n among them
    s = scores(len(every), n, seed=n)
    loss, grad = value_and_grad(lambda s: subset_softmax_loss(s, every, reduction="none"), s)
    torch.testing.assert_close(loss, rows(subsets, s, every), rtol=1e-12, atol=1e-14)
    assert grad.isfinite().all()
    alone = every.sum(-1) % n == 0  # nothing to choose
    assert (loss[alone] == 0).all()
    assert (grad[alone] == 0).all()
    # one row at a time has a degree of its own
    one = torch.stack([subset_softmax_loss(a, b) for a, b in zip(s[-9:], every[-9:], strict=True)])
    torch.testing.assert_close(one, loss[-9:], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n", range(1, 7))
@pytest.mark.parametrize("s_0", [0.0, -1.3])
def test_padded_subsets_equal_brute_force(n, s_0):
    every = torch.tensor(list(itertools.product([0, 1], repeat=n)))
    s = scores(len(every), n, seed=n)
    for K in range(1, n + 3):
        few = every.sum(-1) <= K
        loss, grad = value_and_grad(
            lambda s: subset_softmax_loss(s, every[few], max_positives=K, threshold=s_0, reduction="none"),  # noqa: B023
            s[few],
        )
        torch.testing.assert_close(loss, rows(subsets, s[few], every[few], K, s_0), rtol=1e-12, atol=1e-14)
        assert grad.isfinite().all()


def test_padded_sums_follow_their_recursion():
    """Zbar_K = Z_K + e^s0 Zbar_(K-1), read off the losses of the empty row and of a row of K positives."""
    s, s_0 = scores(1, 6), 0.4
    none = torch.zeros(1, 6)

    def log_zbar(most: int) -> Tensor:
        return subset_softmax_loss(s, none, max_positives=most, threshold=s_0) + most * s_0

    for K in range(2, 6):
        first = (torch.arange(6) < K).unsqueeze(0)
        log_z = subset_softmax_loss(s, first) + s[first].sum()
        torch.testing.assert_close(log_zbar(K), torch.logaddexp(log_z, s_0 + log_zbar(K - 1)), rtol=1e-13, atol=0)


def test_subset_gradient_is_the_chance_of_each_label_minus_the_label():
    s, t = scores(1, 6), torch.tensor([[1, 0, 0, 1, 0, 0]])
    _, grad = value_and_grad(lambda s: subset_softmax_loss(s, t), s)
    sets = list(itertools.combinations(range(6), 2))
    weight = [math.exp(sum(s[0, i].item() for i in chosen)) for chosen in sets]
    chance = [sum(w for w, c in zip(weight, sets, strict=True) if i in c) / sum(weight) for i in range(6)]
    torch.testing.assert_close(grad[0], torch.tensor(chance, dtype=torch.float64) - t[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_subsets_of_many_labels_stay_exact(dtype):
    """The recursion that subtracts powers is useless here; a sum over elementary polynomials is not."""
    s = (1e4 + scores(1, 60, spread=4)).to(dtype)
    t = (torch.arange(60) % 12 == 0).unsqueeze(0)
    loss = subset_softmax_loss(s, t).item()
    e = [mp.mpf(1)] + [mp.mpf(0)] * 5
    with mp.workdps(60):
        for x in s[0].double().tolist():
            e = [e[0]] + [e[j] + e[j - 1] * mp.exp(mp.mpf(x) - 10_000) for j in range(1, 6)]
        wanted = mp.log(e[5]) - mp.fsum(mp.mpf(x) - 10_000 for x in s[0, t[0]].double().tolist())
    assert loss == pytest.approx(float(wanted), rel=1e-12 if dtype == torch.float64 else 1e-6)


def test_subset_rows_have_their_own_number_of_positives():
    s, t = scores(7, 6), torch.tril(torch.ones(7, 6), diagonal=-1)
    assert t.sum(-1).tolist() == [0, 1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(subset_softmax_loss(s, t, reduction="none"), rows(subsets, s, t), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_predict(dtype):
    s = torch.tensor([[0.5, 0.0, -0.5], [NAN, INF, -INF]], dtype=dtype)
    assert multilabel_predict(s).tolist() == [[True, False, False], [False, True, False]]
    assert multilabel_predict(s, threshold=-1).tolist() == [[True, True, True], [False, True, False]]
    assert multilabel_predict(torch.tensor(0.1, dtype=torch.float16), threshold=0.1).item() is False  # 0.09998
    assert multilabel_predict(s).dtype == torch.bool


# -------------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("hidden", [0.0, 1e4, INF, -INF, NAN])
def test_a_masked_label_is_a_deleted_column(road, name, hidden):
    s, t = scores(2, 5, 8), labels(2, 5, 8)
    keep = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1]).bool()
    s[..., ~keep] = hidden
    t[..., 2], t[..., 6] = True, False  # a positive and a negative go
    loss, grad = value_and_grad(lambda s: LOSSES[name](s, t, mask=keep, reduction="none"), s)
    without, grad_without = value_and_grad(lambda s: LOSSES[name](s, t[..., keep], reduction="none"), s[..., keep])
    torch.testing.assert_close(loss, without, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad[..., keep], grad_without, rtol=1e-13, atol=1e-16)
    assert (grad[..., ~keep] == 0).all()


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("shape", [(), (6,), (4, 1), (3, 4, 6), (1, 4, 6)])
def test_a_mask_broadcasts(road, name, shape):
    s, t = scores(3, 4, 6), labels(3, 4, 6)
    mask = labels(*shape, seed=9, share=0.6)
    whole = mask.expand(3, 4, 6).clone()
    torch.testing.assert_close(
        value_and_grad(lambda s: LOSSES[name](s, t, mask=mask), s),
        value_and_grad(lambda s: LOSSES[name](s, t, mask=whole), s),
    )


@pytest.mark.parametrize("name", MASKED)
def test_a_row_without_labels_has_loss_0(road, name):
    s = torch.full((2, 3), NAN)
    loss, grad = value_and_grad(
        lambda s: LOSSES[name](s, labels(2, 3), mask=torch.zeros(1, dtype=torch.bool), reduction="none"), s
    )
    assert (loss == 0).all()
    assert not loss.signbit().any()
    assert (grad == 0).all()


JUNK = [(torch.float32, NAN), (torch.float32, 7.0), (torch.float64, -INF), (torch.int64, -100), (torch.uint8, 255)]


@pytest.mark.parametrize("loss", [multilabel_softmax_loss, multilabel_pairwise_loss, subset_softmax_loss])
@pytest.mark.parametrize(("dtype", "hidden"), JUNK)
def test_targets_of_masked_labels_may_be_anything(road, loss, dtype, hidden):
    s, t = scores(4, 6), labels(4, 6).to(dtype)
    mask = labels(4, 6, seed=3, share=0.7)
    wild = t.masked_fill(~mask, hidden)
    before = value_and_grad(lambda s: loss(s, t, mask=mask, reduction="none"), s)
    torch.testing.assert_close(
        value_and_grad(lambda s: loss(s, wild, mask=mask, reduction="none"), s), before, rtol=0, atol=0
    )
    torch.testing.assert_close(
        torch.vmap(lambda s, m: loss(s, wild, mask=m), in_dims=(0, None))(s.expand(2, 4, 6), mask),
        before[0].mean().expand(2),
    )
    with pytest.raises(ValueError, match=r"target must be (labels in|0 or 1)"):
        loss(s, wild, mask=torch.ones(1, dtype=torch.bool))


# -------------------------------------------------------------------------------------------------------- derivatives


@each_loss
def test_gradcheck(road, name):
    s, t = scores(3, 5, spread=1.5).requires_grad_(), labels(3, 5)
    t[0], t[1] = False, True

    def f(s: Tensor) -> Tensor:
        return LOSSES[name](s, t, reduction="none")

    assert torch.autograd.gradcheck(f, s, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, s)


@pytest.mark.parametrize("name", MASKED)
def test_gradgradcheck_with_a_mask(road, name):
    s, t = scores(2, 4, spread=1.5).requires_grad_(), labels(2, 4)
    mask = labels(2, 4, seed=4, share=0.7)
    assert torch.autograd.gradgradcheck(lambda s: LOSSES[name](s, t, mask=mask, reduction="none"), s)


def test_third_derivatives_exist(road):
    s, t = scores(4).requires_grad_(), labels(4)

    def second(s: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(multilabel_softmax_loss(s, t), s, create_graph=True)
        return g.pow(2).sum()

    assert torch.autograd.gradgradcheck(second, s)


def test_a_hook_on_the_scores_runs_once():
    s, t = scores(3, 4).requires_grad_(), labels(3, 4)
    wanted = value_and_grad(lambda s: multilabel_softmax_loss(s, t), s)[1]
    s.register_hook(lambda g: 3 * g)
    (grad,) = torch.autograd.grad(multilabel_softmax_loss(s, t), s, create_graph=True)
    torch.testing.assert_close(grad, 3 * wanted)


@each_loss
def test_hessian(name):
    s, t = scores(2, 4, spread=1.0), labels(2, 4)

    def f(s: Tensor) -> Tensor:
        return LOSSES[name](s, t, reduction="sum")

    hessian = torch.func.hessian(f)(s)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(f, s), rtol=1e-12, atol=1e-14)
    assert (torch.linalg.eigvalsh(hessian.view(8, 8)) > -1e-12).all()  # convex


@each_loss
def test_torch_func_grad_and_vmap(name):
    s, t = scores(4, 3, 5), labels(4, 3, 5)
    K = {"max_positives": 5} if name == "subset_padded" else {}
    loss = {
        "sparse": lambda s, t: sparse_multilabel_softmax_loss(s, t),
        "subset_padded": lambda s, t: subset_softmax_loss(s, t, **K),
    }.get(name, LOSSES[name])
    target = padded(t) if name == "sparse" else t
    wanted_loss, wanted = value_and_grad(lambda s: torch.stack([loss(a, b) for a, b in zip(s, target, strict=True)]), s)
    torch.testing.assert_close(torch.func.vmap(loss)(s, target), wanted_loss)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(s, target), wanted)
    torch.testing.assert_close(torch.func.grad(lambda s: loss(s, target[0]))(s[0]), wanted[0])
    # the same target for all, the same scores for all
    shared = torch.stack([loss(a, target[0]) for a in s])
    torch.testing.assert_close(torch.func.vmap(loss, (0, None))(s, target[0]), shared)
    shared = torch.stack([loss(s[0], b) for b in target])
    torch.testing.assert_close(torch.func.vmap(loss, (None, 0))(s[0], target), shared)
    _, tangent = torch.func.jvp(lambda s: loss(s, target[0]), (s[0],), (torch.ones_like(s[0]),))
    torch.testing.assert_close(tangent, wanted[0].sum())


@pytest.mark.parametrize("name", MASKED)
def test_vmap_over_masks(name):
    s, t, masks = scores(3, 5), labels(3, 5), labels(4, 3, 5, seed=3, share=0.7)
    each = torch.stack([LOSSES[name](s, t, mask=mask) for mask in masks])
    torch.testing.assert_close(torch.func.vmap(lambda mask: LOSSES[name](s, t, mask=mask))(masks), each)


def test_forward_mode():
    s, t, v = scores(3, 4), labels(3, 4), scores(3, 4, seed=8)
    _, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t), s)
    with torch.autograd.forward_ad.dual_level():
        dual = multilabel_softmax_loss(torch.autograd.forward_ad.make_dual(s, v), t)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(tangent, (grad * v).sum())


@each_loss
def test_compile(name):
    torch._dynamo.reset()
    s, t = scores(4, 6, dtype=torch.float32), labels(4, 6)
    target = padded(t) if name == "sparse" else t
    loss = {
        "sparse": lambda s, t: sparse_multilabel_softmax_loss(s, t),
        "subset": lambda s, t: subset_softmax_loss(s, t, max_positives=None),
    }.get(name, LOSSES[name])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        value_and_grad(lambda s: compiled(s, target), s), value_and_grad(lambda s: loss(s, target), s)
    )


def test_compile_to_machine_code():
    torch._dynamo.reset()
    s, t, mask = scores(4, 6, dtype=torch.float32), soft_labels(4, 6).float(), labels(6, share=0.7)
    s[:, 1] = 1e4
    compiled = torch.compile(multilabel_softmax_loss, fullgraph=True)
    torch.testing.assert_close(
        value_and_grad(lambda s: compiled(s, t, mask=mask), s),
        value_and_grad(lambda s: multilabel_softmax_loss(s, t, mask=mask), s),
    )


# -------------------------------------------------------------------------------------------------------- conventions


@each_loss
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_computed_in_float32(road, name, dtype):
    s, t = scores(5, 7, dtype=dtype), labels(5, 7)
    loss, grad = value_and_grad(lambda s: LOSSES[name](s, t, reduction="none"), s)
    wide = 0.8 * t.to(dtype) + 0.1  # the soft labels as that dtype has them
    f = (
        (lambda s: multilabel_softmax_loss(s, wide, reduction="none"))
        if name == "soft"
        else (lambda s: LOSSES[name](s, t, reduction="none"))
    )
    wanted, wanted_grad = value_and_grad(f, s.float())
    assert loss.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss, wanted, rtol=0, atol=0)
    torch.testing.assert_close(grad, wanted_grad.to(dtype), rtol=0, atol=0)


@each_loss
def test_autocast(name):
    s, t = scores(4, 6, dtype=torch.float32), labels(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_grad(lambda s: LOSSES[name](s, t, reduction="none"), s)
    torch.testing.assert_close(
        inside, value_and_grad(lambda s: LOSSES[name](s, t, reduction="none"), s), rtol=0, atol=0
    )


@each_loss
def test_reductions(road, name):
    s, t = scores(2, 3, 5), labels(2, 3, 5)
    each = LOSSES[name](s, t, reduction="none")
    assert each.shape == (2, 3)
    torch.testing.assert_close(LOSSES[name](s, t, reduction="sum"), each.sum())
    torch.testing.assert_close(LOSSES[name](s, t), each.mean())
    torch.testing.assert_close(LOSSES[name](s[0, 0], t[0, 0], reduction="none"), each[0, 0])  # no row dimension


@each_loss
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_empty(road, name, shape):
    loss, grad = value_and_grad(lambda s: LOSSES[name](s, torch.zeros(shape, dtype=torch.bool)), torch.zeros(shape))
    assert loss.item() == 0
    assert grad.shape == shape
    each = LOSSES[name](torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), reduction="none")
    assert each.shape == shape[:-1]
    assert (each == 0).all()


@each_loss
def test_non_contiguous(road, name):
    s, t = scores(7, 2, 6).permute(2, 1, 0), labels(7, 2, 6).permute(2, 1, 0)
    assert not s.is_contiguous()
    torch.testing.assert_close(
        value_and_grad(lambda s: LOSSES[name](s, t), s),
        value_and_grad(lambda s: LOSSES[name](s, t.contiguous()), s.contiguous()),
    )
    flat = (scores(5, 6).t(), labels(5, 6).t())  # its rows are strided
    torch.testing.assert_close(LOSSES[name](*flat), LOSSES[name](flat[0].contiguous(), flat[1].contiguous()))


@each_loss
def test_inputs_are_not_modified(road, name):
    s, t = scores(4, 6), labels(4, 6)
    s[0, 0], t[0, 0] = -INF, False
    mask = labels(4, 6, seed=7, share=0.9)
    kept = [x.clone() for x in (s, t, mask)]
    value_and_grad(lambda s: LOSSES[name](s, t, **({"mask": mask} if name in MASKED else {})), s)
    LOSSES[name](s, t)
    for after, before in zip((s, t, mask), kept, strict=True):
        assert torch.equal(after, before)


def test_sparse_index_is_not_modified():
    s, index = scores(4, 6), padded(labels(4, 6))
    before = index.clone()
    sparse_multilabel_softmax_loss(s, index)
    assert torch.equal(index, before)


@each_loss
def test_backward_twice(road, name):
    s, t = scores(4, 6).requires_grad_(), labels(4, 6)
    loss = LOSSES[name](s, t)
    (first,) = torch.autograd.grad(loss, s, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, s)
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


@each_loss
def test_no_value_is_looked_at_where_that_would_wait(name):
    """A meta tensor has no values: looking at one raises, as it would stall an accelerator."""
    s = torch.empty(4, 6, device="meta", requires_grad=True)
    t = torch.empty(4, 6, device="meta", dtype=torch.bool)
    if name == "sparse":
        loss = sparse_multilabel_softmax_loss(s, torch.empty(4, 3, device="meta", dtype=torch.int64))
    else:
        loss = LOSSES[name](s, t)
    loss.backward()
    assert s.grad.shape == s.shape


@each_loss
@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradient(name, off):
    s, t = scores(3, 4).requires_grad_(), labels(3, 4)
    with off():
        loss = LOSSES[name](s, t)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, LOSSES[name](s, t).detach(), rtol=0, atol=0)


@each_loss
def test_nan_is_not_hidden(road, name):
    s, t = scores(2, 4), labels(2, 4)
    s[0, 1] = NAN
    loss = LOSSES[name](s, t, reduction="none")
    assert loss.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", ["dense", "float", "sparse", "pairwise", "subset", "subset_padded"])
def test_infinitely_right_and_infinitely_wrong(road, name):
    s, t = torch.tensor([[INF, -INF], [-INF, INF]]), torch.tensor([[True, False]] * 2)
    f = LOSSES.get(name, lambda s, t, **kw: multilabel_softmax_loss(s, t.float(), **kw))
    loss, grad = value_and_grad(lambda s: f(s, t, reduction="none"), s)
    assert loss[0] == 0
    assert (grad[0] == 0).all()
    assert loss[1] > 1e28
    assert grad.isfinite().all()


@pytest.mark.parametrize("size", [1e30, INF])
@pytest.mark.parametrize("soft", [False, True])
def test_wrong_infinite_scores_are_pushed_like_wrong_large_ones(road, size, soft):
    large = torch.tensor([[1e3, 1.0, 0.0], [1e3, 1e3, 0.5], [-1e3, 1.0, 0.0], [-1e3, 1e3, 0.0]])
    t = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0.5, 0] if soft else [1, 0, 0]])
    t = t if soft else t.bool()
    exact = [two_sides_slope(a, b) for a, b in zip(large.tolist(), t.double().tolist(), strict=True)]
    s = torch.where(large.abs() == 1e3, size * large.sign(), large)
    loss, grad = value_and_grad(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    assert loss.isfinite().all()
    torch.testing.assert_close(grad, torch.tensor(exact), rtol=1e-5, atol=1e-7)
    assert torch.func.hessian(lambda s: multilabel_softmax_loss(s, t))(s).isfinite().all()


@pytest.mark.parametrize("name", ["dense", "float", "sparse", "pairwise", "subset", "subset_padded"])
@pytest.mark.parametrize("count", [0, 1])
def test_every_negative_at_minus_infinity(road, name, count):
    """Nothing is left but the positive against the threshold, or nothing at all."""
    s, t = torch.tensor([[-INF, 0.5, -INF, -INF]]), torch.tensor([[False, True, False, False]])
    if count == 0:
        s[0, 1], t[0, 1] = -INF, False
    f = LOSSES.get(name, lambda s, t, **kw: multilabel_softmax_loss(s, t.float(), **kw))
    loss, grad = value_and_grad(lambda s: f(s, t, reduction="none"), s)
    beside_threshold = count == 1 and name not in ("pairwise", "subset")
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)) if beside_threshold else 0, rel=1e-6)
    wanted = [0.0, -1 / (1 + math.exp(0.5)) if beside_threshold else 0.0, 0.0, 0.0]
    torch.testing.assert_close(grad, torch.tensor([wanted]), rtol=1e-6, atol=0)


def test_the_threshold_is_0_unless_given():
    s, t = scores(3, 5), labels(3, 5)
    for name in SHIFTED:
        torch.testing.assert_close(LOSSES[name](s, t), LOSSES[name](s, t, threshold=0.0), rtol=0, atol=0)
    assert subset_softmax_loss(s, t, max_positives=5) != subset_softmax_loss(s, t, max_positives=5, threshold=1.0)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("shape", [(64, 9605), (8, 100_000), (4, 9, 4096), (1, 300_000), (2, 100_000), (512, 100)])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_memory(form, shape):
    """Forward and backward hold few times the scores, their gradient among it."""
    s, t = torch.randn(shape), torch.rand(shape) < 0.001
    if form == "dense":
        assert peak_ratio(lambda s: multilabel_softmax_loss(s, t), s) <= (
            2.5 if shape[0] > 2 and s.numel() > fast.WHOLE else 3.2
        )
    else:
        index = torch.randint(0, shape[-1], (*shape[:-1], 8))
        assert peak_ratio(lambda s: sparse_multilabel_softmax_loss(s, index), s) <= 2.5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize("s_0", [0.0, 0.7])
def test_blocks_of_many_rows_are_the_formula(s_0, labels, masked):
    """So many scores are worked on in blocks: every row has its own loss and gradient there."""
    s = torch.randn(700, 100, dtype=torch.float64, requires_grad=True)
    t = torch.rand(700, 100, dtype=torch.float64)
    t = t if labels == "soft" else (t < 0.1).double()
    mask = torch.rand(700, 100) < 0.8 if masked else torch.ones(700, 100, dtype=torch.bool)
    negatives = math.exp(s_0) + (mask * (1 - t) * s.exp()).sum(-1)
    positives = math.exp(-s_0) + (mask * t * (-s).exp()).sum(-1)
    wanted = negatives.log() + positives.log()
    target = t if labels == "soft" else t.bool()
    loss = multilabel_softmax_loss(s, target, mask=mask if masked else None, threshold=s_0, reduction="none")
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    weights = torch.rand(700, dtype=torch.float64)
    ours, slow = (torch.autograd.grad((weights * x).sum(), s)[0] for x in (loss, wanted))
    torch.testing.assert_close(ours, slow, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("labels", ["hard", "soft"])
@pytest.mark.parametrize(
    "shape", [(256, 80), (64, 512), (1, 32_768), (1, 20_000), (2, 200_000), (1, 300_000), (64, 9605)]
)
def test_memory_of_dense_blocks(labels, shape):
    """The same where one block holds all the scores, and for soft labels; what rows need comes on top."""
    s, t = torch.randn(shape), torch.rand(shape)
    t = t if labels == "soft" else t < 0.1
    rows = 6 * shape[0] / s.numel()
    assert peak_ratio(lambda s: multilabel_softmax_loss(s, t), s) <= 3.1 + rows


@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_memory_without_gradient(form, leaf):
    """The dense form works on a third of the rows at a time, the sparse form on one copy of the scores."""
    s, t, index = torch.randn(64, 9605), torch.rand(64, 9605) < 0.001, torch.randint(0, 9605, (64, 8))

    @torch.set_grad_enabled(not leaf)
    def loss():
        scores = s.requires_grad_(leaf)
        return multilabel_softmax_loss(scores, t) if form == "dense" else sparse_multilabel_softmax_loss(scores, index)

    assert peak_bytes(loss) <= (1.7 if form == "dense" else 1.2) * s.numel() * s.element_size()


# ---------------------------------------------------------------------------------------------------------- properties

finite = st.floats(-50, 50, allow_nan=False, width=32)
hard = st.integers(0, 1)
soft = st.floats(0, 1, allow_nan=False)


def table(label):
    """Rows of (score, label) of equal length."""
    return st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.tuples(finite, label), min_size=n, max_size=n), min_size=1, max_size=4)
    )


def split(data) -> tuple[Tensor, Tensor]:
    both = torch.tensor(data, dtype=torch.float64)
    return both[..., 0], both[..., 1]


@pytest.mark.parametrize("name", ["dense", "sparse", "pairwise", "subset", "subset_padded", "float"])
@given(data=table(hard), shift=finite, other=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_properties(name, data, shift, other):
    s, t = split(data)
    t = t.bool()
    f = LOSSES.get(name, lambda s, t, **kw: multilabel_softmax_loss(s, t.double(), **kw))
    loss = f(s, t, reduction="none")
    assert (loss >= 0).all()
    # shifting the scores and the threshold together changes nothing
    moved = {"threshold": shift} if name in SHIFTED or name == "float" else {}
    torch.testing.assert_close(f(s + shift, t, reduction="none", **moved), loss, rtol=1e-9, atol=1e-9)
    # neither does the order of the labels
    order = torch.randperm(s.shape[-1], generator=torch.Generator().manual_seed(other))
    torch.testing.assert_close(f(s[:, order], t[:, order], reduction="none"), loss, rtol=1e-9, atol=1e-12)
    # convex along every line
    r = scores(*s.shape, seed=other, spread=30)
    middle = f((s + r) / 2, t, reduction="none")
    assert (middle <= (loss + f(r, t, reduction="none")) / 2 + 1e-9).all()
    # a higher positive and a lower negative never cost more
    better = f(s + torch.where(t, 1.0, -1.0), t, reduction="none")
    assert (better <= loss + 1e-9).all()


@given(data=table(soft), shift=finite, other=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_properties_of_soft_labels(data, shift, other):
    s, t = split(data)
    loss = multilabel_softmax_loss(s, t, reduction="none")
    torch.testing.assert_close(loss, rows(two_sides, s, t), rtol=1e-11, atol=1e-300)
    moved = multilabel_softmax_loss(s + shift, t, threshold=shift, reduction="none")
    torch.testing.assert_close(moved, loss, rtol=1e-9, atol=1e-9)
    flipped = multilabel_softmax_loss(-s, 1 - t, reduction="none")  # the two sides are mirror images
    torch.testing.assert_close(flipped, multilabel_softmax_loss(s, 1 - (1 - t), reduction="none"), rtol=1e-9, atol=0)
    r = scores(*s.shape, seed=other, spread=30)
    ends = (loss + multilabel_softmax_loss(r, t, reduction="none")) / 2
    assert (multilabel_softmax_loss((s + r) / 2, t, reduction="none") <= ends + 1e-9).all()


# -------------------------------------------------------------------------------------------------------------- errors

S = torch.zeros(2, 3)
Y = torch.zeros(2, 3, dtype=torch.bool)
I = torch.zeros(2, 1, dtype=torch.int64)  # noqa: E741

dense, sparse, pairs = multilabel_softmax_loss, sparse_multilabel_softmax_loss, multilabel_pairwise_loss
sets, predict = subset_softmax_loss, multilabel_predict

TYPE_ERRORS = [
    (dense, ([0.0], Y), {}, r"input must be a tensor of scores, got list; pass torch.as_tensor\(input\)"),
    (dense, (S.long(), Y), {}, r"input must be float16, .* got int64 tensor of shape \(2, 3\)"),
    (dense, (S, [0]), {}, r"target must be a tensor of labels, got list"),
    (dense, (S, S + 0j), {}, r"target must be labels of a real dtype, got complex64"),
    (dense, (S, Y), {"mask": S}, r"mask must be a boolean tensor, got float32 tensor"),
    (dense, (S, Y), {"mask": True}, r"mask must be a boolean tensor, got bool True"),
    (dense, (S, Y), {"threshold": "0"}, r"threshold must be a number, got str '0'"),
    (sparse, (S.long(), I), {}, r"input must be float16"),
    (sparse, (S, [0]), {}, r"index must be a tensor of class indices, got list"),
    (sparse, (S, I.float()), {}, r"index must be class indices of an integer dtype, got float32"),
    (sparse, (S, Y), {}, r"index must be class indices of an integer dtype, got bool"),
    (sparse, (S, I), {"ignore_index": -1.0}, r"ignore_index must be an integer, got float -1\.0"),
    (sparse, (S, I), {"ignore_index": True}, r"ignore_index must be an integer, got bool True"),
    (sparse, (S, I), {"mask": S}, r"mask must be a boolean tensor"),
    (sparse, (S, I), {"threshold": None}, r"threshold must be a number, got NoneType None"),
    (pairs, (S.long(), Y), {}, r"input must be float16"),
    (pairs, (S, 0), {}, r"target must be a tensor of labels, got int 0"),
    (pairs, (S, Y), {"scale": True}, r"scale must be a number, got bool True"),
    (pairs, (S, Y), {"margin": "x"}, r"margin must be a number, got str 'x'"),
    (pairs, (S, Y), {"mask": S}, r"mask must be a boolean tensor"),
    (sets, (S.long(), Y), {}, r"input must be float16"),
    (sets, (S, 0), {}, r"target must be a tensor of labels, got int 0"),
    (sets, (S, Y), {"max_positives": 1.0}, r"max_positives must be an integer, got float 1\.0"),
    (sets, (S, Y), {"max_positives": True}, r"max_positives must be an integer, got bool True"),
    (sets, (S, Y), {"threshold": None}, r"threshold must be a number, got NoneType None"),
    (predict, (S.long(),), {}, r"input must be float16"),
    (predict, (S,), {"threshold": "x"}, r"threshold must be a number, got str 'x'"),
]
VALUE_ERRORS = [
    (dense, (S.sum(), Y), {}, r"input must have at least one dimension"),
    (dense, (S, Y[0]), {}, r"target must have the shape of input, \(2, 3\), got bool tensor of shape \(3,\)"),
    (dense, (S, S + 1.5), {}, r"target must be labels in \[0, 1\], got 1\.5"),
    (dense, (S, S - 0.5), {}, r"target must be labels in \[0, 1\], got -0\.5"),
    (dense, (S, S * NAN), {}, r"target must be labels in \[0, 1\], got nan"),
    (dense, (S, Y.long() + 2), {}, r"target must be labels in \[0, 1\], got 2"),
    (dense, (S, S.clone().requires_grad_()), {}, r"target must not require a gradient, pass target\.detach\(\)"),
    (dense, (S, Y), {"mask": Y[:, :2]}, r"mask must be broadcastable to .* input, \(2, 3\), got bool .* \(2, 2\)"),
    (dense, (S, Y), {"mask": Y[None]}, r"mask must be broadcastable .* got bool tensor of shape \(1, 2, 3\)"),
    (dense, (S, Y), {"threshold": INF}, r"threshold must be a finite number, got inf"),
    (dense, (S, Y), {"reduction": "avg"}, r"reduction must be one of 'mean', 'sum', 'none', got str 'avg'"),
    (sparse, (S.sum(), I), {}, r"input must have at least one dimension"),
    (
        sparse,
        (S, I[0]),
        {},
        r"index must have the shape \(2, k\), the rows of input \(labels last, or pass dim\), got int64 .* \(1,\)",
    ),
    (sparse, (S, I[:1]), {}, r"index must have the shape \(2, k\), the rows of input .* got int64 .* \(1, 1\)"),
    (sparse, (S[0], I), {}, r"index must have the shape \(k\), the rows of input"),
    (sparse, (S, I + 3), {}, r"index must be class indices in \[0, 3\) or ignore_index=-100, got 3"),
    (sparse, (S, I - 1), {}, r"index must be class indices in \[0, 3\) or ignore_index=-100, got -1"),
    (sparse, (S, I), {"mask": Y[:, :2]}, r"mask must be broadcastable"),
    (sparse, (S, I), {"threshold": NAN}, r"threshold must be a finite number, got nan"),
    (sparse, (S, I), {"reduction": None}, r"reduction must be one of 'mean', 'sum', 'none', got None"),
    (pairs, (S, S + 0.5), {}, r"target must be 0 or 1, got 0\.5"),
    (pairs, (S, S + torch.tensor([0.0, 0.5, 0.3])), {"mask": torch.tensor([True, False, True])}, r"0 or 1, got 0\.3"),
    (pairs, (S, Y[0]), {}, r"target must have the shape of input"),
    (pairs, (S, Y), {"scale": 0}, r"scale must be a finite number > 0, got 0"),
    (pairs, (S, Y), {"margin": NAN}, r"margin must be a finite number, got nan"),
    (pairs, (S, Y), {"mask": Y[:, :2]}, r"mask must be broadcastable"),
    (pairs, (S, Y), {"reduction": "x"}, r"reduction must be one of"),
    (sets, (S, S + 0.5), {}, r"target must be 0 or 1, got 0\.5"),
    (sets, (S, Y[0]), {}, r"target must have the shape of input"),
    (sets, (S, ~Y), {"max_positives": 2}, r"target must have at most max_positives=2 positives in a row, got 3"),
    (sets, (S, Y), {"max_positives": 0}, r"max_positives must be at least 1, got 0"),
    (sets, (S, Y), {"threshold": INF}, r"threshold must be a finite number, got inf"),
    (sets, (S, Y), {"reduction": "x"}, r"reduction must be one of"),
    (predict, (S,), {"threshold": INF}, r"threshold must be a finite number, got inf"),
]
ERRORS = [(*e[:3], TypeError, e[3]) for e in TYPE_ERRORS] + [(*e[:3], ValueError, e[3]) for e in VALUE_ERRORS]


@pytest.mark.parametrize(("call", "arguments", "options", "error", "message"), ERRORS)
def test_errors(call, arguments, options, error, message):
    with pytest.raises(error, match=message):
        call(*arguments, **options)


# ------------------------------------------------------------------------------------------------------------- modules

TWINS = [
    (MultilabelSoftmaxLoss, dense, Y, {"threshold": 0.5, "reduction": "sum"}),
    (SparseMultilabelSoftmaxLoss, sparse, I, {"threshold": 0.5, "ignore_index": 7, "reduction": "none"}),
    (MultilabelPairwiseLoss, pairs, Y, {"scale": 2.0, "margin": 0.5, "reduction": "sum"}),
    (SubsetSoftmaxLoss, sets, Y, {"max_positives": 2, "threshold": 0.5, "reduction": "sum"}),
]


@pytest.mark.parametrize(("twin", "function", "target", "options"), TWINS)
def test_twins(twin, function, target, options):
    s = scores(2, 3, dtype=torch.float32)
    target = target.clone()
    target[0, 0] = True
    layer = twin(**options)
    assert isinstance(layer, nn.Module)
    assert not layer.state_dict()
    torch.testing.assert_close(layer(s, target), function(s, target, **options), rtol=0, atol=0)
    torch.testing.assert_close(twin()(s, target), function(s, target), rtol=0, atol=0)
    assert twin()(s, target) != layer(s, target).sum()  # the options matter
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(layer(s, target, mask), function(s, target, mask=mask, **options), rtol=0, atol=0)
    for option, value in options.items():
        assert re.search(f"{option}='?{value:{'' if isinstance(value, str) else 'g'}}", repr(layer))
        with pytest.raises((TypeError, ValueError), match=option):
            twin(**{option: [value]})


def test_predict_twin():
    s = scores(2, 3)
    assert torch.equal(MultilabelPredict()(s), s > 0)
    assert torch.equal(MultilabelPredict(threshold=0.5)(s), s > 0.5)
    assert repr(MultilabelPredict(threshold=0.5)) == "MultilabelPredict(threshold=0.5)"
    with pytest.raises(TypeError, match="threshold must be a number"):
        MultilabelPredict(threshold=None)


def test_everything_public_has_a_docstring_and_a_twin():
    functions = [n for n in module.__all__ if n[0].islower()]
    assert {"".join(part.capitalize() for part in n.split("_")) for n in functions} == set(module.__all__) - set(
        functions
    )
    for name in module.__all__:
        assert getattr(module, name).__doc__


# ---------------------------------------------------------------------------------------------- what trainers do


@each_loss
def test_an_unreduced_loss_can_be_edited_in_place(road, name):
    s, t = scores(4, 6), labels(4, 6)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)

    def edited(s: Tensor) -> Tensor:
        loss = LOSSES[name](s, t, reduction="none")
        loss *= weights
        loss[0] = 0
        return loss

    loss, grad = value_and_grad(edited, s)
    wanted, slope = value_and_grad(lambda s: LOSSES[name](s, t, reduction="none"), s)
    weights[0] = 0
    torch.testing.assert_close(loss, weights * wanted)
    torch.testing.assert_close(grad, weights.unsqueeze(-1) * slope)


@pytest.mark.parametrize("name", MASKED)
def test_rows_without_labels_are_left_out_of_the_mean(road, name):
    s, t = scores(4, 6), labels(4, 6)
    mask = labels(4, 6, seed=3, share=0.7)
    mask[1], mask[2], mask[3] = False, False, True
    rest = [0, 3]
    loss, grad = value_and_grad(lambda s: LOSSES[name](s, t, mask=mask), s)
    wanted, slope = value_and_grad(lambda s: LOSSES[name](s, t[rest], mask=mask[rest]), s[rest])
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad[rest], slope)
    assert (grad[1:3] == 0).all()
    nothing = LOSSES[name](s, t, mask=torch.zeros(6, dtype=torch.bool))
    assert nothing == 0


@each_loss
@pytest.mark.parametrize("masked", [False, True])
def test_labels_may_stand_in_any_dimension(road, name, masked):
    s, t, mask = scores(2, 6, 3, 4), labels(2, 6, 3, 4), labels(2, 6, 3, 1, seed=4, share=0.8)
    mask = mask if masked else torch.ones_like(mask)
    last = [x.movedim(1, -1) for x in (s, t, mask)]
    target = padded(last[1])
    for dim in (1, -3):
        if name == "sparse":
            loss = sparse_multilabel_softmax_loss(s, target.movedim(-1, 1), mask=mask, dim=dim, reduction="none")
        elif name == "subset_padded":
            loss = subset_softmax_loss(s, t, max_positives=6, mask=mask, dim=dim, reduction="none")
        else:
            loss = LOSSES[name](s, t, mask=mask, dim=dim, reduction="none")
        torch.testing.assert_close(loss, LOSSES[name](last[0], last[1], mask=last[2], reduction="none"))


def test_labels_that_rounding_left_outside_are_clamped_everywhere():
    s, t = scores(3, 4), torch.tensor([[1 + 1e-5, -1e-5, 0.5, 1.0]], dtype=torch.float64).expand(3, 4)
    wanted = multilabel_softmax_loss(s, t.clamp(0, 1), reduction="none")
    each = torch.func.vmap(lambda s, t: multilabel_softmax_loss(s, t))(s, t)
    compiled = torch.compile(multilabel_softmax_loss, fullgraph=True, backend="aot_eager")
    for loss in (multilabel_softmax_loss(s, t, reduction="none"), each, compiled(s, t, reduction="none")):
        torch.testing.assert_close(loss, wanted, rtol=1e-14, atol=0)
    with pytest.raises(ValueError, match=r"labels in \[0, 1\], got 1\.001"):
        multilabel_softmax_loss(s, t + 1e-3)


def test_predictions_of_masked_labels_are_false():
    s, mask = torch.tensor([[1.0, NAN, 2.0], [-1.0, 3.0, INF]]), torch.tensor([True, True, False])
    assert multilabel_predict(s, mask=mask).tolist() == [[True, False, False], [False, True, False]]


def exact_second(s: list[float], t: list[float]) -> list[list[float]]:
    """The second derivative of the dense loss in 60 digits, by P_i (delta_ij - P_j) on both sides."""
    with mp.workdps(60):
        total = [[mp.mpf(0)] * len(s) for _ in s]
        for weights in (
            [(1 - y) * mp.exp(x) for x, y in zip(s, t, strict=True)],
            [y * mp.exp(-x) for x, y in zip(s, t, strict=True)],
        ):
            sums = 1 + mp.fsum(weights)
            p = [w / sums for w in weights]
            for i, j in itertools.product(range(len(s)), repeat=2):
                total[i][j] += p[i] * ((1 - p[i]) if i == j else -p[j])
        return [[float(x) for x in row] for row in total]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "s",
    [
        [40.0, -35.0, 12.0, 3.0],  # wrong, and one label leads by far
        [-30.0, 45.0, -12.0, -25.0],  # sure
        [0.1, -0.2, 0.3, 0.0],
        [60.0, -60.0, 59.0, -61.0],
    ],
)
def test_second_derivatives_keep_their_digits(s, dtype):
    """Also those of sure and of hopeless rows, which are tiny."""
    x, t = torch.tensor(s, dtype=dtype), torch.tensor([0, 1, 0, 0], dtype=torch.bool)
    wanted = torch.tensor(exact_second(s, t.double().tolist()), dtype=torch.float64)
    scale = wanted.diagonal().sqrt()
    for hessian in (torch.func.hessian, lambda f: lambda x: torch.autograd.functional.hessian(f, x)):
        got = hessian(lambda x: multilabel_softmax_loss(x, t))(x).double()
        error = (got - wanted).abs() / (scale.unsqueeze(0) * scale.unsqueeze(1) + torch.finfo(dtype).tiny)
        assert error.max() <= 4 * max(map(abs, s)) * torch.finfo(dtype).eps


def test_the_fast_roads_are_the_formulas():
    """Random and extreme scores, masks, thresholds: value and gradient by both roads."""
    for seed in range(6):
        s = scores(7, 12, seed=seed, spread=(1, 5, 20, 40, 200, 1000)[seed])
        s[1, 3], s[2, 4] = -1e12, 1e12
        t, mask = labels(7, 12, seed=seed), labels(7, 12, seed=seed + 50, share=0.8)
        for name, loss in LOSSES.items():
            for options in ({}, {"mask": mask}):
                if name in SHIFTED:
                    options = {**options, "threshold": 0.3}
                quick = value_and_grad(lambda s: loss(s, t, reduction="none", **options), s)  # noqa: B023
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(fast, "readable", lambda *_: False)
                    slow = value_and_grad(lambda s: loss(s, t, reduction="none", **options), s)  # noqa: B023
                torch.testing.assert_close(quick, slow, rtol=1e-11, atol=1e-290)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """One rank of gloo in this process."""
    from torch.distributed.device_mesh import init_device_mesh

    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("place", ["replicate", "shard"])
@pytest.mark.parametrize("name", ["dense", "float", "sparse", "pairwise"])
def test_scores_may_be_distributed(mesh, name, place):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement = [Replicate() if place == "replicate" else Shard(0)]
    s, t = scores(4, 6), labels(4, 6)
    target = {"float": t.double(), "sparse": padded(t)}.get(name, t)
    call = {"sparse": sparse_multilabel_softmax_loss, "pairwise": multilabel_pairwise_loss}.get(
        name, multilabel_softmax_loss
    )
    wanted, slope = value_and_grad(lambda s: call(s, target), s)
    far = distribute_tensor(s, mesh, placement).requires_grad_()
    loss = call(far, distribute_tensor(target, mesh, placement))
    (grad,) = torch.autograd.grad(loss, far)
    torch.testing.assert_close(loss.full_tensor().detach(), wanted)
    torch.testing.assert_close(grad.full_tensor(), slope)


@pytest.mark.parametrize("mask", [None, torch.tensor([True, True, False, True, True, True])])
def test_repeated_indices_without_padding_count_once(mask: Tensor | None) -> None:
    s = (torch.randn(4, 6) * 3).requires_grad_()
    index = torch.tensor([[0, 0, 3], [5, 2, 5], [1, 1, 1], [4, 0, 2]])
    t = torch.zeros(4, 6).scatter(-1, index, 1)
    found = sparse_multilabel_softmax_loss(s, index, mask=mask)
    wanted = multilabel_softmax_loss(s, t, mask=mask)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, s)[0] for x in (found, wanted)))
