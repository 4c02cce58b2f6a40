"""The pieces of the experiment on focal and truncated losses, on made data."""

import pytest
import torch
from torch.nn import functional as F

from experiments import focal
from experiments.focal import (
    BASE,
    FOCAL,
    HARD,
    IGNORED,
    SOFT,
    WEIGHTED,
    ZERO,
    Bag,
    Size,
    Tagger,
    Warmed,
    bags,
    binary_loss,
    diluted,
    entities,
    entity_scores,
    log_odds,
    padded,
    shape,
    tag_loss,
    tag_weights,
    tagged,
    thinned,
    token_pieces,
)
from experiments.harness import SCALES
from lossbook.data.public import TaggedSplit
from lossbook.focal import hard_truncated_bce
from lossbook.metrics import average_precision

TINY = Size(vector=4, hidden=5, buckets=50, epochs=1, batch=4, longest=6)
TAGS = ("O", "B-person", "I-person", "B-group", "I-group")


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ([], set()),
        (["O", "O"], set()),
        (["B-person"], {(0, 1, "person")}),
        (["B-person", "I-person", "O", "B-group"], {(0, 2, "person"), (3, 4, "group")}),
        (["B-person", "B-person", "I-person"], {(0, 1, "person"), (1, 3, "person")}),
        (["I-person", "I-person", "O"], {(0, 2, "person")}),  # I- without B- starts an entity
        (["O", "I-group", "B-group"], {(1, 2, "group"), (2, 3, "group")}),
        (["B-person", "I-group", "I-group"], {(0, 1, "person"), (1, 3, "group")}),  # another type: a new entity
        (["B-creative-work", "I-creative-work"], {(0, 2, "creative-work")}),  # a type with a hyphen
    ],
)
def test_entities_are_those_of_conlleval(tags, wanted):
    assert entities(tags) == wanted


def places(*rows):
    """Tags by name as one table, places behind the end filled."""
    width = max(map(len, rows))
    return torch.tensor([[TAGS.index(t) for t in row] + [IGNORED] * (width - len(row)) for row in rows])


def test_entity_scores_by_hand():
    # 4 true entities, 3 guessed, 1 right: the first guess has the wrong type, the second stops too early
    target = places(["B-person", "O", "B-group", "I-group"], ["B-person", "O"], ["B-group"])
    predicted = places(["B-group", "O", "B-group", "O"], ["B-person", "O"], ["O"])
    predicted[1, 2:] = TAGS.index("B-person")  # behind the end: must not count
    predicted[2, 1:] = TAGS.index("I-group")
    scores = entity_scores(predicted, target, TAGS)
    assert scores["entity_precision"] == pytest.approx(1 / 3)
    assert scores["entity_recall"] == pytest.approx(1 / 4)
    assert scores["entity_f1"] == pytest.approx(2 * (1 / 3) * (1 / 4) / (1 / 3 + 1 / 4))


def test_an_entity_ends_with_its_sentence():
    both = places(["B-person"], ["I-person"])
    assert entity_scores(both, both, TAGS)["entity_f1"] == 1
    assert entity_scores(places(["B-person"], ["O"]), both, TAGS)["entity_recall"] == 0.5


def test_nothing_found_is_zero_and_no_error():
    nothing = places(["O", "O"])
    assert set(entity_scores(nothing, nothing, TAGS).values()) == {0.0}


def test_diluted_is_the_mean_of_test_sets_with_the_wanted_share():
    # 3 positives, 3 negatives, twice each: as rare as 1 in 3, and average precision as if they really were copied
    scores = torch.tensor([3.0, 0.0, 2.0, 1.0, -1.0, 2.5])
    labels = torch.tensor([True, False, True, False, False, True])
    many, target = diluted(scores, labels, 2)
    assert sorted(zip(many.tolist(), target.tolist(), strict=True)) == sorted(
        [(3.0, True), (2.0, True), (2.5, True), *[(s, False) for s in (0.0, 1.0, -1.0)] * 2]
    )
    # with a negative raised to 2.2 the ranking is 3, 2.5, two copies of 2.2, and 2
    scores[1] = 2.2
    assert average_precision(*diluted(scores, labels, 2)) == pytest.approx((1 + 1 + 3 / 5) / 3)


def test_thinned_keeps_all_negatives_and_one_positive_for_twenty():
    labels = torch.arange(100) % 2 == 0
    rows = thinned(labels, 3)
    assert sorted(rows[~labels[rows]].tolist()) == list(range(1, 100, 2))
    assert labels[rows].sum() == 2
    assert len(set(rows.tolist())) == len(rows)
    assert torch.equal(rows, thinned(labels, 3))
    drawn = {tuple(sorted(thinned(labels, seed)[-2:].tolist())) for seed in range(10)}
    assert len(drawn) > 5


def test_warmed_changes_once_and_stays():
    loss = Warmed(lambda s, t: torch.tensor(1.0), lambda s, t: torch.tensor(2.0), 3)
    zero = torch.zeros(1)
    assert [loss(zero, zero).item() for _ in range(6)] == [1, 1, 1, 2, 2, 2]


def test_hard_truncation_warms_up_for_half_of_the_steps():
    loss = binary_loss(HARD, {"margin": 0.6}, 5)
    s, t = torch.tensor([2.0, -1.0, 0.2]), torch.tensor([True, True, False])
    bce = F.binary_cross_entropy_with_logits(s, t.float())
    truncated = hard_truncated_bce(s, t, margin=0.6)
    assert not torch.isclose(bce, truncated)
    values = torch.stack([loss(s, t) for _ in range(5)])
    assert torch.allclose(values, torch.stack([bce, bce, truncated, truncated, truncated]))


def test_binary_losses_at_settings_where_all_are_cross_entropy():
    s, t = torch.tensor([2.0, -1.0, 0.2]), torch.tensor([True, True, False])
    bce = F.binary_cross_entropy_with_logits(s, t.float())
    same = [(ZERO, {}), (BASE, {}), (WEIGHTED, {"weight": 1.0}), (FOCAL, {"gamma": 0.0}), (HARD, {"margin": 1.0})]
    for method, settings in same:
        assert torch.isclose(binary_loss(method, settings, 0)(s, t), bce)
    assert torch.isclose(2 * binary_loss(FOCAL, {"gamma": 0.0, "alpha": 0.5}, 0)(s, t), bce)
    assert torch.isclose(2 * binary_loss(SOFT, {"sharpness": 0.0}, 0)(s, t), bce)
    with pytest.raises(ValueError, match="no method 'EMO'"):
        binary_loss("EMO", {}, 0)


def test_weighted_bce_weighs_the_positives():
    s, t = torch.tensor([2.0, -1.0]), torch.tensor([True, False])
    wanted = (7 * F.softplus(-s[0]) + F.softplus(s[1])) / 2
    assert torch.isclose(binary_loss(WEIGHTED, {"weight": 7.0}, 0)(s, t), wanted)


def test_tag_losses_ignore_what_is_behind_the_end():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(3, 4, 5, generator=generator), torch.randint(5, (3, 4), generator=generator)
    t[1, 2:] = IGNORED
    kept = t != IGNORED
    moved = torch.where(kept.unsqueeze(-1), s, s + torch.randn(3, 4, 5, generator=generator))
    ce = F.cross_entropy(s[kept], t[kept])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    for method, settings in ((BASE, {}), (WEIGHTED, {}), (FOCAL, {"gamma": 1.0}), (SOFT, {"sharpness": 2.0})):
        loss = tag_loss(method, settings, weight if method == WEIGHTED else torch.ones(5))
        assert torch.isclose(loss(s, t), loss(moved, t))
        assert torch.isclose(loss(s, t), ce) == (method == BASE)
    assert torch.isclose(tag_loss(FOCAL, {"gamma": 0.0}, weight)(s, t), ce)
    with pytest.raises(ValueError, match="no method 'hard"):
        tag_loss(HARD, {"margin": 0.5}, weight)


@pytest.mark.parametrize("weight", [1.0, 20.0])
def test_log_odds_is_where_weighted_bce_of_a_constant_rests(weight):
    labels = torch.arange(40) < 3
    loss = binary_loss(WEIGHTED, {"weight": weight}, 0)
    start = torch.tensor(log_odds(3 / 40, weight), requires_grad=True)
    loss(start.expand(40), labels).backward()
    assert abs(start.grad) < 1e-6
    assert (start < 0) == (weight == 1)


@pytest.mark.parametrize(
    ("token", "wanted"),
    [("iPhone7", "xXx0"), ("#NYC", "#X"), ("@x_y", "@x_x"), ("2017", "0"), ("...", "."), ("很好", "x"), ("", "")],
)
def test_shape(token, wanted):
    assert shape(token) == wanted


def test_capitals_change_the_shape_and_the_word_and_nothing_else():
    lower, upper = token_pieces("paris"), token_pieces("Paris")
    assert set(upper) - set(lower) == {"s:Xx", "w:Paris"}
    assert "par" in lower
    assert token_pieces("http://t.co/a1") == token_pieces("https://b.c") == ["s:link"]


def test_padded_cuts_and_fills():
    assert padded([[1, 2, 3], [4], []], 2).tolist() == [[1, 2], [4, 0], [0, 0]]
    assert padded([[], []], 2).tolist() == [[0], [0]]


def test_bags_hold_each_piece_once():
    rows = bags(["aab", "b"], lambda text: focal.characters(text), Size(4, 4, 10**6, 1, 1, 99))
    assert rows.shape == (2, 5)  # a, aa, aab, ab, b
    assert rows[1].tolist() == [rows[0, 4].item(), 0, 0, 0, 0]
    assert bool((rows[0] > 0).all())


def test_sentences_as_tables():
    split = TaggedSplit([["Go", "Paris"], ["go"]], [torch.tensor([0, 1]), torch.tensor([0])])
    pieces, tags = tagged(split, TINY)
    assert pieces.shape == (2, 2, 6)
    assert tags.tolist() == [[0, 1], [0, IGNORED]]
    assert not pieces[1, 1].any()
    assert pieces[0, 0, 2] == pieces[1, 0, 2]  # both are go in lower case
    assert pieces[0, 0, 1] != pieces[1, 0, 1]


def test_the_tagger_does_not_see_the_padding():
    torch.manual_seed(0)
    model = Tagger(TINY, torch.zeros(5)).eval()
    pieces = torch.randint(1, 50, (2, 4, 6))
    pieces[1, 2:] = 0
    together, alone = model(pieces), model(pieces[1:, :2])
    assert together.shape == (2, 4, 5)
    assert torch.allclose(together[1, :2], alone[0], atol=1e-6)
    changed = pieces.clone()
    changed[0, 3] = torch.arange(1, 7)
    assert not torch.allclose(model(changed)[0, 0], together[0, 0])  # it reads backwards too


def test_networks_start_at_their_bias():
    bias = torch.tensor([3.0, -1.0, 0.0, 0.0, 0.5])
    assert torch.equal(Tagger(TINY, bias).last.bias, bias)
    model = Bag(TINY, -3.0)
    empty = torch.zeros(2, 3, dtype=torch.int64)
    assert torch.equal(model.last.bias, torch.tensor([-3.0]))
    assert model(empty).shape == (2,)
    assert not torch.equal(model(empty + 1), model.eval()(empty))


@pytest.mark.parametrize("scale", SCALES)
def test_grids_are_equally_long_and_hold_what_is_recommended(scale):
    tasks = {task.name: task for task in focal.tasks(scale)}
    for task in tasks.values():
        assert len({len(grid) for grid in task.methods.values()}) == 1
        assert BASE in task.methods
        assert any(settings["gamma"] == 2.0 for settings in task.methods[FOCAL])
        rates = {method: {settings["lr"] for settings in grid} for method, grid in task.methods.items()}
        assert all(found <= rates[BASE] for found in rates.values())
    if scale != "smoke":
        recommended = tasks[focal.RARE].methods
        assert any(settings.get("alpha") == 0.25 for settings in recommended[FOCAL])
        assert {settings["margin"] for settings in recommended[HARD]} >= {0.5, 0.6}


def test_tag_weights_by_hand():
    target = torch.tensor([[0, 0, 0, 1], [0, 0, 0, IGNORED], [0, IGNORED, IGNORED, IGNORED]])
    for power, wanted in ((0.0, [1.0, 1.0, 1.0]), (1.0, [1.0, 4.0, 8.0]), (0.5, [1.0, 2.0, 8.0**0.5])):
        counts, weight = tag_weights(target, 3, power)
        assert counts.tolist() == [8, 2, 1]
        assert weight.tolist() == pytest.approx(wanted)
