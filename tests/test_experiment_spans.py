"""The pieces of the experiment on spans and relations, on made sentences."""

import doctest
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from experiments import spans as spans_module
from experiments import spans_clipped
from experiments.focal import IGNORED, Size
from experiments.harness import SCALES, Job, Task
from experiments.spans import (
    BASE,
    CRF,
    FIFTH,
    FOCAL,
    LOOKS,
    MEAN,
    MOST_ENDS,
    MOST_SPANS,
    MULTI,
    NEWS,
    POWER,
    RATES,
    RESUME,
    SETS,
    SOFTMAX,
    SUM,
    WEIGHTED,
    Chain,
    Form,
    Pointer,
    Reader,
    Tagger,
    above,
    base_rates,
    batch_of,
    batches,
    best_cut,
    bio,
    dense,
    even_score,
    fit,
    highest,
    look,
    pair_loss,
    sentences,
    spans_of_bio,
    start,
    tasks,
    turned,
    untagged,
)
from lossbook.data import _fetch
from lossbook.data.entities import SpanSplit
from lossbook.data.public import TaggedSplit
from lossbook.metrics import best_threshold
from lossbook.spans import power_bce, span_f1, span_loss
from lossbook.training import base_rate_bias

TINY = Size(vector=6, hidden=5, buckets=60, epochs=1, batch=2, longest=5)
FORM = Form(types=2, predicates=2)
# "Ann of Rome met Bo": Ann (0) and Bo (0), Rome (1); Ann lives in (0) Rome, Ann met (1) Bo, and Bo met Ann
SPLIT = SpanSplit(
    [["Ann", "Lee", "of", "Rome", "met", "Bo"], ["Go", "on"], ["Rome"]],
    [[(0, 0, 1), (1, 3, 3), (0, 5, 5)], [], [(1, 0, 0)]],
    [[(0, 1, 0, 3, 3), (0, 1, 1, 5, 5), (5, 5, 1, 0, 1)], [], []],
)
BATCH = batch_of(SPLIT, [0, 1, 2], FORM, TINY, chinese=False)
FLAT = batch_of(replace(SPLIT, triples=[[], [], []]), [0, 1, 2], Form(2), TINY, chinese=False)
MASK = FORM.mask(BATCH.lengths, 6)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(spans_module).failed == 0


# Sentences


def test_tags_and_spans():
    for row, tokens in zip(SPLIT.spans, SPLIT.tokens, strict=True):
        assert spans_of_bio(bio(row, len(tokens))) == row
    assert bio([(1, 0, 1), (1, 2, 2)], 3) == [3, 4, 3]  # neighbours of one type stay two
    assert spans_of_bio([2, 2, 4, 1]) == [(0, 0, 1), (1, 2, 2), (0, 3, 3)]  # I- without B- starts a span


def test_tags_of_the_public_set_become_spans():
    # O, B-corporation, I-corporation, B-creative-work, ...
    found = untagged(TaggedSplit([["a", "b", "c"]], [torch.tensor([3, 4, 1])]))
    assert found.spans == [[(1, 0, 1), (0, 2, 2)]]
    assert found.triples == [[]]


def test_cells_of_a_sentence_by_hand():
    assert FORM.matrices == 2 + 2 + 2 + 2
    cells = FORM.cells(SPLIT.spans[0], SPLIT.triples[0])
    assert cells == [
        *[(0, 0, 1), (0, 5, 5), (1, 3, 3)],  # types
        *[(2, 0, 1), (2, 5, 5)],  # subjects: Ann Lee once, though twice a subject
        *[(3, 0, 1), (3, 3, 3), (3, 5, 5)],  # objects
        *[(4, 0, 3), (5, 0, 5), (5, 5, 0)],  # heads of predicates 0 and 1
        *[(6, 1, 3), (7, 1, 5), (7, 5, 1)],  # tails
    ]
    assert Form(2).cells(SPLIT.spans[0], []) == [(0, 0, 1), (0, 5, 5), (1, 3, 3)]


def test_the_mask_admits_objects_before_their_subjects():
    assert MASK.shape == (3, 8, 6, 6)
    for i, n in enumerate(map(len, SPLIT.tokens)):
        assert MASK[i].sum((1, 2)).tolist() == [n * (n + 1) // 2] * 4 + [n * n] * 4
    assert not bool((dense(BATCH.index, MASK.float()).bool() & ~MASK).any())


def test_a_batch_holds_its_sentences():
    assert BATCH.lengths.tolist() == [6, 2, 1]
    assert BATCH.tags.tolist()[0] == [1, 2, 0, 3, 0, 1]
    assert BATCH.tags.tolist()[2] == [3] + [IGNORED] * 5
    assert BATCH.pieces.shape == (3, 6, TINY.longest)
    assert bool((BATCH.pieces[1, :2, 0] > 0).all())
    assert not BATCH.pieces[1, 2:].any()
    assert torch.equal(BATCH.pieces[0, 3], BATCH.pieces[2, 0])  # the same word
    target = dense(BATCH.index, torch.zeros(3, 8, 6, 6))
    assert [tuple(cell) for cell in target[0].nonzero().tolist()] == FORM.cells(SPLIT.spans[0], SPLIT.triples[0])
    assert target.sum().item() == 14 + 1


def test_batches_hold_each_sentence_once_by_length(monkeypatch):
    tokens = [["x"] * (1 + i % 7) + [str(i)] for i in range(40)]
    split = SpanSplit(tokens, [[(0, 0, len(row) - 1)] for row in tokens], [[] for _ in tokens])
    monkeypatch.setattr(
        spans_module, "sentences", lambda name: (dict.fromkeys(("train", "validation", "test"), split), Form(1))
    )
    make = batches.__wrapped__

    def lengths(task, part, seed, size=TINY):
        return [batch.lengths.tolist() for batch in make(task, part, replace(size, batch=6), seed)]

    def count(*what):
        return sum(map(len, lengths(*what)))

    every = lengths(RESUME, "train", 1)
    assert [*itertools.chain(*every)] == sorted(len(row) for row in tokens)
    assert [len(row) for row in every] == [6] * 6 + [4]
    assert count(FIFTH, "train", 1) == 8
    assert len({str(lengths(FIFTH, "train", seed)) for seed in range(5)}) > 1
    assert lengths(FIFTH, "train", 1) == lengths(FIFTH, "train", 1)
    assert count(FIFTH, "test", 1) == 40  # only the sentences to train are fewer
    assert count(RESUME, "train", 1, replace(TINY, rows=10)) == 10


def test_no_sentence_has_more_than_is_read_off():
    if _fetch.data_folder() is None:
        pytest.skip("the public data are not here: set LOSSBOOK_DATA to their folder")
    for name in set(SETS.values()):
        for split in sentences(name)[0].values():
            assert max(map(len, split.spans)) <= MOST_SPANS
            for of in (slice(0, 2), slice(3, 5)):
                assert max(len({triple[of] for triple in row}) for row in split.triples) <= MOST_ENDS


# Networks


def test_turned_reverses_each_sentence_alone():
    x = torch.arange(12.0).view(2, 3, 2)
    lengths = torch.tensor([3, 2])
    assert turned(x, lengths)[:, :, 0].tolist() == [[4, 2, 0], [8, 6, 10]]
    assert torch.equal(turned(turned(x, lengths), lengths), x)


def test_the_reader_does_not_see_the_padding():
    torch.manual_seed(0)
    reader = Reader(TINY).eval()
    together, alone = reader(BATCH.pieces, BATCH.lengths), reader(BATCH.pieces[1:2, :2], BATCH.lengths[1:2])
    assert together.shape == (3, 6, 10)
    assert torch.allclose(together[1, :2], alone[0], atol=1e-6)
    changed = BATCH.pieces.clone()
    changed[0, 5] = torch.arange(1, 6)
    again = reader(changed, BATCH.lengths)
    assert torch.equal(again[0, 0, :5], together[0, 0, :5])  # read forth, the first token knows no other
    assert not torch.allclose(again[0, 0, 5:], together[0, 0, 5:])


class Given(Pointer):
    """A pointer whose scores are given."""

    def forward(self, batch):
        return self.given


def pointer_with(form, batch, scores):
    model = Given(TINY, form, torch.zeros(form.matrices), pair_loss(SUM, {}))
    model.given = scores
    return look(model, [batch], torch.device("cpu"))


def test_what_is_found_in_the_true_cells_is_the_truth():
    spans, triples = pointer_with(FORM, BATCH, 2 * dense(BATCH.index, MASK.float()) - 1)
    assert [sorted(row) for row in spans] == [sorted(row) for row in SPLIT.spans]
    # Ann and Bo met each other, and Bo's and Ann's matrices admit nothing else
    assert [sorted(row) for row in triples] == [sorted(row) for row in SPLIT.triples]


def test_the_score_of_a_triple_is_the_least_of_four():
    for matrix, cell in ((2, (0, 1)), (3, (3, 3)), (4, (0, 3)), (6, (1, 3))):
        scores = 2 * dense(BATCH.index, MASK.float()) - 1
        scores[0, matrix][cell] = 0.25
        triples = pointer_with(FORM, BATCH, scores)[1]
        assert triples[0][0, 1, 0, 3, 3] == 0.25
        scores[0, matrix][cell] = -0.25
        assert (0, 1, 0, 3, 3) not in pointer_with(FORM, BATCH, scores)[1][0]


def test_nothing_is_found_behind_the_end():
    spans, triples = pointer_with(FORM, BATCH, torch.ones(3, 8, 6, 6))
    assert len(spans[1]) == 2 * 3
    assert all(end < 2 and start <= end for _, start, end in spans[1])
    assert len(triples[1]) == 2 * 3 * 3


def test_highest_keeps_the_highest_of_a_sentence():
    scores = randn(2, 3, 4, 4)
    kept = highest(scores, 5)
    for one, own in zip(scores, kept, strict=True):
        wanted = sorted(one.flatten().tolist())[-5:]
        assert sorted(own[own > -math.inf].tolist()) == wanted
    assert torch.equal(highest(scores, 1000), scores)


@pytest.mark.parametrize("form", [FORM, Form(2)])
def test_scores_start_at_their_bias(form):
    bias = torch.arange(float(form.matrices))
    torch.manual_seed(0)
    batch = BATCH if form is FORM else FLAT
    model = Pointer(TINY, form, bias, pair_loss(SUM, {})).eval()
    other = Pointer(TINY, form, bias * 0, pair_loss(SUM, {})).eval()
    other.load_state_dict({**model.state_dict(), "bias": other.bias.detach()})
    mask = form.mask(batch.lengths, 6)
    scores, plain = model(batch), other(batch)
    assert scores.shape == (3, form.matrices, 6, 6)
    apart = (scores - plain).masked_fill(~mask, 0) - bias.view(-1, 1, 1) * mask
    assert apart.abs().max() < 1e-5
    model.loss(batch).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# Chains


def test_a_chain_by_listing_all():
    torch.manual_seed(0)
    tags, chain = 3, Chain(3)
    for p in chain.parameters():
        torch.nn.init.normal_(p)
    scores, lengths = randn(3, 4, tags), torch.tensor([4, 1, 3])
    wanted = torch.tensor([[0, 2, 1, 1], [2, IGNORED, IGNORED, IGNORED], [1, 1, 0, IGNORED]])
    losses, best = [], []
    for row, n, own in zip(scores, lengths.tolist(), wanted.tolist(), strict=True):
        values = {}
        for path in itertools.product(range(tags), repeat=n):
            value = chain.first[path[0]] + chain.last[path[-1]] + sum(row[i, y] for i, y in enumerate(path))
            value = value + sum(chain.moves[a, b] for a, b in itertools.pairwise(path))
            values[path] = value.item()
        total = math.log(sum(map(math.exp, values.values())))
        losses.append(total - values[tuple(own[:n])])
        best.append(max(values, key=values.get))
    assert chain.loss(scores, wanted, lengths).item() == pytest.approx(sum(losses) / 3, rel=1e-5)
    with torch.no_grad():
        found = chain.best(scores, lengths)
    assert [tuple(row[:n]) for row, n in zip(found.tolist(), lengths.tolist(), strict=True)] == best


@pytest.mark.parametrize("chained", [False, True])
def test_a_tagger_learns_a_batch(chained):
    torch.manual_seed(0)
    model = Tagger(TINY, Form(2), chained)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    model.eval()
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(FLAT).backward()
        optimizer.step()
    found, none = look(model, [FLAT], torch.device("cpu"))
    assert above(found, 0.0) == SPLIT.spans
    assert none == [{}, {}, {}]


def test_a_chain_is_a_softmax_where_tags_do_not_touch():
    model = Tagger(TINY, Form(2), chained=False).eval()
    scores = model(FLAT)
    chain = Chain(5).loss(scores, FLAT.tags, FLAT.lengths) * 3
    assert torch.isclose(chain, model.loss(FLAT) * FLAT.lengths.sum())


# Losses


def test_losses_of_pairs_at_settings_where_all_are_bce():
    scores, target = randn(3, 8, 6, 6), dense(BATCH.index, MASK.float())
    bce = F.binary_cross_entropy_with_logits(scores, target, reduction="none")[MASK].sum() / 3

    def value(method, **settings):
        return pair_loss(method, settings)(scores, BATCH.index, MASK)

    same = [value(SUM), value(BASE), value(WEIGHTED, weight=1.0), value(MEAN) * MASK.sum() / 3]
    same += [value(FOCAL, gamma=0.0, alpha=0.5) * 2, value(POWER, n=1.0)]
    for loss in same:
        assert torch.isclose(loss, bce)
    assert torch.isclose(value(MULTI), span_loss(scores, BATCH.index, mask=MASK))
    positives = F.softplus(-scores)[target.bool()].sum() / 3
    assert torch.isclose(value(WEIGHTED, weight=10.0), bce + 9 * positives)
    shifted = scores + even_score(11.0)
    powers = power_bce(shifted, target, 11.0, mask=MASK, reduction="sum") / 3
    assert torch.isclose(value(POWER, n=11.0), powers)
    with pytest.raises(ValueError, match="no method 'CRF"):
        pair_loss(CRF, {})


@pytest.mark.parametrize("method", [MULTI, MEAN, SUM, WEIGHTED, FOCAL, POWER])
def test_losses_do_not_see_what_is_outside_the_mask(method):
    loss = pair_loss(method, spans_module.KNOBS[method])
    scores = randn(3, 8, 6, 6)
    moved = torch.where(MASK, scores, randn(3, 8, 6, 6, seed=1))
    assert torch.equal(loss(scores, BATCH.index, MASK), loss(moved, BATCH.index, MASK))


def test_base_rates_are_those_of_the_package():
    target = dense(BATCH.index, MASK.float())
    found = base_rates([BATCH, BATCH], FORM)
    for kind in range(FORM.matrices):
        labels = target[:, kind][MASK[:, kind]].repeat(2).unsqueeze(-1)
        assert torch.isclose(found[kind], base_rate_bias(labels)[0], atol=1e-6)


@pytest.mark.parametrize("method", [BASE, WEIGHTED])
def test_the_start_is_where_a_constant_rests(method):
    settings = spans_module.KNOBS[method]
    many = [BATCH] * 1000  # so that the smoothing of the rates does not show
    bias = start(method, settings, many, FORM).requires_grad_()
    scores = bias.view(-1, 1, 1).expand(3, -1, 6, 6)
    pair_loss(method, settings)(scores, BATCH.index, MASK).backward()
    assert bias.grad.abs().max() < 1e-2
    assert start(SUM, {}, many, FORM).abs().max() == 0 == start(MULTI, {}, many, FORM).abs().max()


def test_power_bce_starts_at_its_power_of_one_half_and_counts_from_even_odds():
    bias = start(POWER, {"n": 11.0}, [BATCH], FORM)
    index = torch.full_like(BATCH.index, IGNORED)
    loss = pair_loss(POWER, {"n": 11.0})
    at_start = loss(bias.view(-1, 1, 1).expand(3, -1, 6, 6), index, MASK)
    assert torch.isclose(at_start, -math.log1p(-(2.0**-11)) * MASK.sum() / 3, rtol=1e-4)
    even = loss(torch.zeros(3, 8, 6, 6), index, MASK)
    assert torch.isclose(even, math.log(2) * MASK.sum() / 3)


# Measures


def test_the_best_cut_is_the_best_of_all():
    items = [(0, i, i) for i in range(30)]
    right = randn(30, seed=2) > 0.3
    scores = (randn(30) + 2 * right).round(decimals=1)
    found, true = [], []
    for rows in (slice(0, 10), slice(10, 30)):
        found.append(dict(zip(items[rows], scores[rows].tolist(), strict=True)))
        true.append([item for item, r in zip(items[rows], right[rows].tolist(), strict=True) if r])
    cut = best_cut(found, true)
    assert span_f1(above(found, cut), true) == max(span_f1(above(found, t / 100), true) for t in range(-500, 500))
    assert above(found, cut) == above(found, best_threshold(scores, right))
    missed = [true[0], [*true[1], *((1, i, i) for i in range(40))]]
    lower = best_cut(found, missed)
    assert span_f1(above(found, lower), missed) == max(span_f1(above(found, t / 100), missed) for t in range(-500, 500))
    few, more = [{"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0}], ["a", "d"]
    assert best_cut(few, [more]) == 3.5
    assert best_cut(few, [[*more, "e", "f", "g", "h"]]) == 0.5  # with much to miss, more is worth a try
    assert best_cut([{}, {}], true) == 0
    assert best_cut([{}], [[]]) == 0


def test_validation_is_looked_at_as_often_as_is_said():
    for epochs, steps in ((1, 3), (9, 27)):
        torch.manual_seed(0)
        model = Pointer(TINY, Form(2), torch.zeros(2), pair_loss(SUM, {}))
        job = Job(Task(RESUME, (), {}, "f1"), SUM, {"lr": 0.01}, 1, True, "cpu")
        seen = []
        found, seconds = fit(model, [FLAT] * 3, job, epochs, seen.append)
        assert found == steps
        assert seconds > 0
        assert seen == list(LOOKS)


def test_a_pointer_learns_a_batch_with_every_loss():
    for method in (MULTI, MEAN, SUM, BASE, FOCAL, POWER):
        torch.manual_seed(0)
        settings = {"lr": 0.05, **spans_module.KNOBS[method]}
        bias = start(method, settings, [BATCH], FORM)
        model = Pointer(replace(TINY, vector=16, hidden=16), FORM, bias, pair_loss(method, settings))
        job = Job(Task(NEWS, (), {}, "f1"), method, settings, 1, True, "cpu")
        fit(model, [BATCH], job, 120, lambda name: None)
        spans, triples = look(model, [BATCH], torch.device("cpu"))
        assert [sorted(row) for row in spans] == [sorted(row) for row in SPLIT.spans], method
        assert [sorted(row) for row in triples] == [sorted(row) for row in SPLIT.triples], method


@pytest.mark.parametrize("scale", SCALES)
def test_all_rivals_have_the_same_rates(scale):
    for task in tasks(scale):
        assert (CRF in task.methods) == (SOFTMAX in task.methods) == (task.name != NEWS)
        assert ("entity_f1" in task.metrics) == (task.name == NEWS)
        for grid in task.methods.values():
            assert tuple(settings["lr"] for settings in grid) == RATES[scale]


def test_clipping_scales_long_gradients_down_and_leaves_short_ones():
    short, long = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    for parameter, length in ((short, 0.3), (long, 50.0)):
        parameter.grad = torch.full((4,), length / 2)  # so long is a vector of four of these
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        spans_clipped.clip(optimizer, (), {})
        assert parameter.grad.norm().item() == pytest.approx(min(length, 1.0), rel=1e-4)


def test_clipped_runs_clip_each_step_and_no_other(monkeypatch):
    lengths = []

    def runs(job):
        parameter = torch.nn.Parameter(torch.zeros(4))
        parameter.grad = torch.ones(4)
        torch.optim.SGD([parameter], lr=1.0).step()
        lengths.append(parameter.detach().norm().item())
        return {"f1": 1.0}

    monkeypatch.setattr(spans_module, "run", runs)
    assert spans_clipped.run(None) == {"f1": 1.0}
    runs(None)
    assert lengths == pytest.approx([1, 2], rel=1e-4)
