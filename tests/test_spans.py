"""Spans and relations: the layer, the labels, the loss and what is read off, each beside loops."""

import cmath
import itertools
import math

import mpmath as mp
import pytest
import torch
from torch.nn import functional as F

from benchmarks.harness import peak_bytes
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.spans import (
    GlobalPointer,
    PowerBce,
    SpanLoss,
    decode_spans,
    decode_triples,
    index_to_spans,
    power_bce,
    span_f1,
    span_loss,
    span_mask,
    spans_to_index,
    triple_f1,
)

LENGTHS = torch.tensor([5, 3])
SPANS = [[(0, 0, 1), (2, 4, 4), (0, 3, 4)], [(1, 2, 2)]]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ the layer


def pointer(**options):
    torch.manual_seed(0)
    return GlobalPointer(6, 3, head_features=8, **options).double()


def turned(x, place):
    """Feature d and d + D / 2 as a complex number, turned by place * 10000^(-2 d / D)."""
    half = len(x) // 2
    return [complex(x[d], x[d + half]) * cmath.exp(1j * place * 10_000 ** (-d / half)) for d in range(half)]


@pytest.mark.parametrize("efficient", [False, True])
def test_scores_by_loops(efficient):
    layer, x = pointer(efficient=efficient), drawn(2, 4, 6)
    scores = layer(x)
    assert scores.shape == (2, 3, 4, 4)
    ends = layer.ends(x).detach().reshape(2, 4, -1, 16)
    for b, a, i, j in itertools.product(range(2), range(3), range(4), range(4)):
        own = 0 if efficient else a
        q, k = ends[b, i, own, :8].tolist(), ends[b, j, own, 8:].tolist()
        value = sum((u * v.conjugate()).real for u, v in zip(turned(q, i), turned(k, j), strict=True)) / math.sqrt(8)
        if efficient:
            value += layer.kinds(ends[b, i, 0])[a].item() + layer.kinds(ends[b, j, 0])[3 + a].item()
        want = value if i <= j else -math.inf
        assert scores[b, a, i, j].item() == pytest.approx(want, rel=1e-6)  # cos and sin are those of float64


def test_a_score_knows_the_distance_of_its_ends_and_not_their_place():
    layer = pointer(triangular=False)
    same = drawn(1, 1, 6).expand(1, 7, 6)  # the same token everywhere
    scores = layer(same)[0]
    for distance in range(-6, 7):
        diagonal = scores.diagonal(distance, 1, 2)
        assert torch.allclose(diagonal, diagonal[:, :1].expand_as(diagonal), atol=1e-12)
    assert not torch.allclose(scores[:, 0, 1], scores[:, 0, 2])


def test_pairs_below_the_diagonal_get_no_push_and_leave_none_behind():
    layer, x = pointer(), drawn(2, 5, 6).requires_grad_()
    index = spans_to_index(SPANS, 5, 3, lengths=LENGTHS)
    mask = span_mask(LENGTHS, length=5)
    loss = span_loss(layer(x), index, mask=mask)
    full = pointer(triangular=False)
    want = span_loss(full(x), index, mask=mask)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(loss, [x, *layer.parameters()]),
        torch.autograd.grad(want, [x, *full.parameters()]),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert bool(span_loss(layer(x), index).isfinite())  # without a mask too


@pytest.mark.parametrize("efficient", [False, True])
def test_the_number_of_parameters_is_what_the_docstring_says(efficient):
    count = sum(p.numel() for p in pointer(efficient=efficient).parameters())
    assert count == (2 * 8 * 7 + 2 * 17 * 3 if efficient else 2 * 8 * 7 * 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(dtype):
    layer, x = pointer().to(dtype), drawn(1, 4, 6).to(dtype)
    scores = layer(x)
    assert scores.dtype == dtype
    assert torch.allclose(scores[0].triu().double(), pointer()(drawn(1, 4, 6))[0].triu(), atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = span_loss(pointer().float()(x.float()), torch.tensor([[[1], [2], [-100]]]))
    assert loss.dtype == torch.float32


def test_it_compiles_in_one_piece():
    layer, x = pointer(), drawn(1, 4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))


def test_it_needs_little_more_memory_than_the_product_alone():
    layer, x = GlobalPointer(32, 10, head_features=64), torch.randn(1, 256, 32, requires_grad=True)
    project = torch.nn.Linear(32, 2 * 64 * 10)

    def plain():
        q, k = project(x).reshape(1, 256, 10, 128).chunk(2, -1)
        torch.einsum("blad,bmad->balm", q, k).sum().backward()

    peaks = [peak_bytes(plain), peak_bytes(lambda: layer(x).sum().backward())]
    assert peaks[1] <= 1.1 * peaks[0]


def test_sizes_and_features_are_checked():
    with pytest.raises(ValueError, match="head_features must be even, got 7"):
        GlobalPointer(4, 2, head_features=7)
    with pytest.raises(ValueError, match="num_types must be at least 1, got 0"):
        GlobalPointer(4, 0)
    with pytest.raises(TypeError, match="triangular must be True or False, got int 1"):
        GlobalPointer(4, 2, triangular=1)
    with pytest.raises(ValueError, match=r"input must have the shape \(B, L, 6\), got float64 tensor of shape"):
        pointer()(drawn(4, 6))
    assert "num_types=3, head_features=8" in repr(pointer())


# ----------------------------------------------------------------------------------------------------- the labels


@pytest.mark.parametrize("triangular", [False, True])
def test_the_mask_by_loops(triangular):
    mask = span_mask(LENGTHS, length=6, triangular=triangular)
    assert mask.shape == (2, 1, 6, 6)
    for b, i, j in itertools.product(range(2), range(6), range(6)):
        assert mask[b, 0, i, j].item() == (max(i, j) < LENGTHS[b] and (i <= j or not triangular))
    assert span_mask(LENGTHS).shape == (2, 1, 5, 5)
    assert span_mask(LENGTHS[:0]).shape == (0, 1, 0, 0)


def test_there_and_back():
    index = spans_to_index(SPANS, 7, 3, lengths=LENGTHS)
    assert index.shape == (2, 3, 2)
    assert index[0].tolist() == [[1, 25], [-100, -100], [32, -100]]
    back = index_to_spans(index, 7)
    assert [sorted(row) for row in back] == [sorted(row) for row in SPANS]
    assert spans_to_index([[], []], 7, 3).tolist() == [[[-100]] * 3] * 2
    backwards = spans_to_index([[(0, 3, 1)]], 4, 1, triangular=False, ignore_index=-1)
    assert index_to_spans(backwards, 4, ignore_index=-1) == [[(0, 3, 1)]]


@pytest.mark.parametrize(
    ("span", "error", "text"),
    [
        ((0, 3, 1), ValueError, r"the span \(0, 3, 1\) of sentence 1 ends before it starts"),
        ((0, 1, 3), ValueError, r"the span \(0, 1, 3\) of sentence 1 is not inside its 3 tokens"),
        ((0, -1, 1), ValueError, "is not inside its 3 tokens"),
        ((3, 0, 1), ValueError, r"has no type in \[0, 3\)"),
        ((-1, 0, 1), ValueError, r"has no type in \[0, 3\)"),
        ((0, 1), TypeError, r"a span must be \(type, start, end\), got \[0, 1\] in sentence 1"),
        ((0, 1.0, 2), TypeError, "start must be an integer, got float 1.0"),
    ],
)
def test_no_label_vanishes(span, error, text):
    with pytest.raises(error, match=text):
        spans_to_index([[], [span]], 4, 3, lengths=[4, 3] if span != (0, 3, 1) else [4, 4])


def test_other_wrong_labels():
    with pytest.raises(ValueError, match="ignore_index must be no position, below 0 or from 16 on, got 3"):
        spans_to_index([[]], 4, 1, ignore_index=3)
    with pytest.raises(ValueError, match=r"lengths must be 1 numbers in \[0, 4\], one a sentence, got \[5\]"):
        spans_to_index([[]], 4, 1, lengths=[5])
    with pytest.raises(ValueError, match=r"index must hold positions in \[0, 16\) or -100, got 16"):
        index_to_spans(torch.tensor([[[16]]]), 4)
    with pytest.raises(ValueError, match=r"index must have the shape \(B, num_types, k\)"):
        index_to_spans(torch.tensor([1]), 4)
    with pytest.raises(TypeError, match="index must be an integer tensor"):
        index_to_spans(torch.zeros(1, 1, 1), 4)
    with pytest.raises(TypeError, match="lengths must be a tensor of integers, got list"):
        span_mask([3])
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 4\], got 3 to 5"):
        span_mask(LENGTHS, length=4)


SCORES, WIDE, FLOATS = torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 1)
NESTED = r"must hold a list for each sentence, \[\[\("


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: decode_triples([1], SCORES, WIDE, WIDE), TypeError, "subjects must be a tensor of scores, got list"),
        (lambda: decode_triples(SCORES, SCORES, [1], WIDE), TypeError, "heads must be a tensor of scores, got list"),
        (lambda: decode_triples(FLOATS[0, 0, 0], SCORES, WIDE, WIDE), ValueError, "subjects must have the shape"),
        (lambda: decode_triples(SCORES, SCORES, FLOATS[0, 0], WIDE), ValueError, "heads must have the shape"),
        (lambda: decode_spans([1]), TypeError, "input must be a tensor of scores, got list"),
        (lambda: decode_spans(SCORES.long()), TypeError, "input must be float16, .* got int64"),
        *(
            (lambda f=f, wrong=wrong: f(wrong, [[]]), TypeError, f"predicted {NESTED}")
            for f in (span_f1, triple_f1)
            for wrong in (None, 3, [1], [(0, 1, 2)], FLOATS[0], {1})
        ),
        (lambda: span_f1([[]], [[(0, 1)]]), TypeError, r"true must hold \(type, start, end\), got \[0, 1\]"),
        (lambda: span_f1("a", "a"), TypeError, r"predicted must hold \(type, start, end\), got \['a'\]"),
        (lambda: triple_f1([[(0, 1, 2)]], [[]]), TypeError, r"predicted must hold \(subject start, .* got \[0, 1, 2\]"),
        (lambda: span_f1([[(0, [1], 2)]], [[]]), TypeError, "each number of predicted must be an integer, got list"),
        *((lambda w=w: spans_to_index(w, 3, 1), TypeError, f"spans {NESTED}") for w in (None, 3, [1], [(0, 1, 2)])),
        (lambda: spans_to_index([[]], 3, 1, lengths=3), TypeError, "lengths must be integers, one a sentence, got int"),
        (lambda: spans_to_index([[]], 3, 1, lengths=[2.7]), TypeError, "each of lengths must be an integer, got float"),
        (lambda: spans_to_index([[]], 3, 1, lengths=FLOATS), TypeError, "lengths must be an integer tensor"),
        (lambda: spans_to_index([[]], 3, 1, lengths=LENGTHS[None]), ValueError, r"lengths must have the shape \(B,\)"),
        (lambda: spans_to_index([[]], 3, 1, triangular="no"), TypeError, "triangular must be True or False"),
        (lambda: index_to_spans([[[1]]], 3), TypeError, "index must be a tensor of integers, got list"),
        (lambda: index_to_spans(FLOATS.cfloat(), 3), TypeError, "index must be an integer tensor, got complex64"),
        (lambda: index_to_spans(FLOATS.long().to_sparse(), 3), TypeError, "index must be a dense tensor"),
        (lambda: span_mask(FLOATS[0, 0].cfloat()), TypeError, "lengths must be an integer tensor, got complex64"),
        (lambda: span_loss(SCORES, FLOATS.cfloat(), mask=SCORES == 0), TypeError, "index must be class indices"),
        (lambda: span_loss(SCORES, FLOATS.long().to_sparse(), mask=SCORES == 0), TypeError, "index must be a dense"),
    ],
)
def test_what_is_no_list_or_tensor_is_told_in_a_sentence(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_any_integer_counts():
    spans = torch.tensor([[[0, 1, 2]]])
    assert span_f1(spans, [[(0, 1, 2)]]) == span_f1(spans.numpy(), iter([[(0, 1, 2)]])) == 1
    assert span_mask(LENGTHS.to(torch.uint16)).shape == (2, 1, 5, 5)
    index = torch.tensor([[[1]]], dtype=torch.uint16)
    assert span_loss(SCORES, index, mask=SCORES == 0) == span_loss(SCORES, index)


# ------------------------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_dense_one_on_the_pairs_inside():
    scores = drawn(2, 3, 5, 5).requires_grad_()
    mask = span_mask(LENGTHS, length=5)
    index = spans_to_index(SPANS, 5, 3, lengths=LENGTHS)
    loss = span_loss(scores, index, mask=mask, threshold=0.5, reduction="none")
    target = torch.zeros(2, 3, 5, 5)
    for b, row in enumerate(SPANS):
        for kind, i, j in row:
            target[b, kind, i, j] = 1
    inside = mask.expand_as(target)
    want = [
        multilabel_softmax_loss(scores[b, a][inside[b, a]], target[b, a][inside[b, a]], threshold=0.5).item()
        for b in range(2)
        for a in range(3)
    ]
    assert loss.flatten().tolist() == pytest.approx(want, rel=1e-12)
    assert span_loss(scores, index, mask=mask, threshold=0.5).item() == pytest.approx(sum(want) / 6)
    assert SpanLoss(threshold=0.5, reduction="sum")(scores, index, mask).item() == pytest.approx(sum(want))
    (slope,) = torch.autograd.grad(loss.sum(), scores)
    assert not bool(slope[~inside].any())


def test_a_span_outside_the_mask_is_an_error():
    index = spans_to_index([[(0, 0, 1)], [(1, 2, 4)]], 5, 3)
    with pytest.raises(ValueError, match=r"the span \(1, 2, 4\) of sentence 1 lies outside the mask"):
        span_loss(drawn(2, 3, 5, 5), index, mask=span_mask(LENGTHS, length=5))
    with pytest.raises(ValueError, match=r"input must have the shape \(B, types, L, L\)"):
        span_loss(drawn(2, 5, 5), index)
    with pytest.raises(ValueError, match="index must have the shape"):
        span_loss(drawn(2, 2, 5, 5), index, mask=span_mask(LENGTHS, length=5))


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("shape", [(2, 1, 0, 0), (0, 1, 3, 3), (2, 0, 3, 3)])
def test_nothing_to_score_is_a_loss_of_zero(shape, k):
    scores = torch.zeros(shape, requires_grad=True)
    index = torch.full((*shape[:2], k), -100)
    for mask in (None, torch.ones(shape, dtype=torch.bool)):
        loss = span_loss(scores, index, mask=mask)
        assert loss.item() == 0
        loss.backward()
        assert span_loss(scores, index, mask=mask, reduction="none").shape == shape[:2]
    if shape[-1] == 0 and k:
        with pytest.raises(ValueError, match=r"index must be class indices in \[0, 0\)"):
            span_loss(scores, index * 0, mask=mask)


# -------------------------------------------------------------------------------------------------- what is read off


def test_spans_by_loops_and_without_overlaps():
    scores, mask = drawn(2, 3, 5, 5, seed=3), span_mask(LENGTHS, length=5)
    found = decode_spans(scores, mask=mask, threshold=0.2)
    for b in range(2):
        want = [
            (a, i, j)
            for i, j, a in itertools.product(range(5), range(5), range(3))
            if mask[b, 0, i, j] and scores[b, a, i, j] > 0.2
        ]
        assert found[b] == want
    apart = decode_spans(scores, mask=mask, threshold=0.2, overlaps=False)
    for b in range(2):
        assert set(apart[b]) <= set(found[b])
        tokens = [t for _, i, j in apart[b] for t in range(i, j + 1)]
        assert len(tokens) == len(set(tokens))
        best = max(found[b], key=lambda s: scores[(b, *s)])
        assert best in apart[b]
        for a, i, j in found[b]:  # what is left out meets one that is at least as high
            meets = [s for s in apart[b] if s[1] <= j and i <= s[2] and scores[(b, *s)] >= scores[b, a, i, j]]
            assert meets


def test_a_pair_that_ends_before_it_starts_holds_no_token():
    scores = torch.full((1, 1, 3, 3), -1.0)
    scores[0, 0, 2, 0], scores[0, 0, 0, 1], scores[0, 0, 1, 2] = 5.0, 2.0, 1.0
    assert decode_spans(scores, overlaps=False) == [[(0, 0, 1)]]
    assert decode_spans(scores) == [[(0, 0, 1), (0, 1, 2), (0, 2, 0)]]


def test_triples_by_loops():
    s, o = (drawn(2, 1, 4, 4, seed=seed) for seed in (1, 2))
    h, t = (drawn(2, 2, 4, 4, seed=seed) + 0.5 for seed in (3, 4))
    mask = span_mask(torch.tensor([4, 3]), length=4)
    found = decode_triples(s, o, h, t, mask=mask, threshold=0.1)
    for b in range(2):
        want = [
            (i, j, p, k, m)
            for i, j, p, k, m in itertools.product(range(4), range(4), range(2), range(4), range(4))
            if mask[b, 0, i, j]
            and mask[b, 0, k, m]
            and min(s[b, 0, i, j], o[b, 0, k, m], h[b, p, i, k], t[b, p, j, m]) > 0.1
        ]
        assert found[b] == want
        assert want
    with pytest.raises(ValueError, match=r"tails must have the shape \(2, 2, 4, 4\), got float64 tensor of shape"):
        decode_triples(s, o, h, t[:, :1])
    assert decode_triples(s - 99, o, h, t) == [[], []]


def test_f1():
    true = [[(0, 0, 1), (1, 2, 2)], []]
    assert span_f1(true, true) == 1.0
    assert span_f1([[(0, 0, 1), (0, 0, 1)], [(0, 0, 1)]], true) == pytest.approx(2 * 1 / (2 + 2))
    assert span_f1([[], []], [[], []]) == 0.0
    assert triple_f1([[(0, 0, 1, 2, 2)]], [[(0, 0, 0, 2, 2)]]) == 0.0
    with pytest.raises(ValueError, match="one list a sentence, got 1 and 2"):
        span_f1([[]], true)
    with pytest.raises(ValueError, match="got 0 and 0"):
        triple_f1([], [])


# ---------------------------------------------------------------------------------------- the power of a probability


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1.0, 2.0, 4.0, 7.5, 1000.0])
def test_power_bce_is_exact_in_both_tails(n, dtype):
    """Value and slope beside 60 digits; 8 units in the last place, times n where the score is multiplied by it."""
    s = torch.tensor([-80.0, -30.0, -9.0, -1.0, -0.125, 0.0, 0.5, 2.0, 5.0, 9.0, 17.0, 40.0, 80.0, 95.0], dtype=dtype)
    eps = torch.finfo(dtype).eps
    for label in (0, 1):
        leaf = s.clone().requires_grad_()
        loss = power_bce(leaf, torch.full_like(s, label), n, reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
        for x, value, push in zip(s.tolist(), loss.tolist(), slope.tolist(), strict=True):
            with mp.workdps(400):

                def right(x, label=label):
                    p = 1 / (1 + mp.exp(-x))
                    return -n * mp.log(p) if label else -mp.log(1 - p**n)

                want, turn = right(mp.mpf(x)), mp.diff(right, mp.mpf(x), h=mp.mpf(10) ** -100)
                tiny = mp.mpf(torch.finfo(dtype).tiny)
                bend = abs(turn * x)  # what the last digit of the score moves
                assert abs(value - want) <= 8 * eps * (abs(want) + bend) + tiny, (x, label)
                assert abs(push - turn) <= 16 * eps * (1 + n * mp.log1p(mp.exp(-x))) * abs(turn) + tiny, (x, label)


def test_power_bce_at_one_is_bce_and_takes_soft_labels_and_masks():
    s, t = drawn(4, 5), torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(power_bce(s, t, 1), F.binary_cross_entropy_with_logits(s, t))
    parts = (
        power_bce(s, torch.ones_like(t), 3, reduction="none"),
        power_bce(s, torch.zeros_like(t), 3, reduction="none"),
    )
    assert torch.allclose(power_bce(s, t, 3, reduction="none"), t * parts[0] + (1 - t) * parts[1])
    mask = t > 0.3
    spoiled = s.masked_fill(~mask, math.nan).requires_grad_()
    loss = power_bce(spoiled, t, 3, mask=mask)
    assert loss.item() == pytest.approx(power_bce(s[mask], t[mask], 3).item())
    (slope,) = torch.autograd.grad(loss, spoiled)
    assert not bool(slope[~mask].any())
    assert power_bce(s, t, 3, mask=torch.zeros(4, 5, dtype=torch.bool)).item() == 0
    assert PowerBce(3, reduction="sum")(s, t, mask).item() == pytest.approx(loss.item() * int(mask.sum()))


@pytest.mark.parametrize("size", [1e4, math.inf])
def test_power_bce_far_out_is_finite(size):
    s = torch.tensor([-size, size], requires_grad=True)
    for label in (0.0, 1.0, 0.5):
        loss = power_bce(s, torch.full((2,), label), 4, reduction="none")
        (slope,) = torch.autograd.grad(loss.sum(), s)
        assert loss.isfinite().all()
        assert slope.isfinite().all()


def test_derivatives_of_power_bce():
    s = (3 * drawn(6)).requires_grad_()
    t = torch.tensor([0, 1, 0, 1, 0, 0])
    assert torch.autograd.gradcheck(lambda s: power_bce(s, t, 4), s)
    assert torch.autograd.gradgradcheck(lambda s: power_bce(s, t, 4), s)
    compiled = torch.compile(lambda s: power_bce(s, t, 4), fullgraph=True, backend="eager")
    assert torch.equal(compiled(s), power_bce(s, t, 4))
    each = torch.vmap(lambda s: power_bce(s, t, 4))(torch.stack([s, s]))
    assert torch.allclose(each, power_bce(s, t, 4))


def test_wrong_powers():
    for wrong, error in ((0.5, ValueError), (math.inf, ValueError), ("2", TypeError)):
        with pytest.raises(error, match="n must be a"):
            power_bce(torch.zeros(1), torch.zeros(1), wrong)
