"""Labels whose chances are known."""

import pytest
import torch

from lossbook.data.chances import careless, independent, linear_world, one_of, together, with_one_of


def test_the_chances_of_the_linear_world_are_what_happens():
    world = linear_world(40_000, 3, seed=1)
    share = world.labels[world.chances > 0.9].double().mean()
    expected = world.chances[world.chances > 0.9].mean()
    assert abs(share - expected) < 0.01
    assert abs(world.chances.mean() - 0.5) < 0.02


def test_the_linear_world_has_linear_log_odds_the_same_for_every_seed():
    a, b = linear_world(100, 4, seed=1), linear_world(100, 4, seed=2)
    assert not a.inputs.equal(b.inputs)
    weights = [torch.linalg.lstsq(w.inputs, torch.logit(w.chances)).solution for w in (a, b)]
    torch.testing.assert_close(*weights, rtol=1e-8, atol=1e-8)
    assert linear_world(100, 4, seed=1).labels.equal(a.labels)


OUTCOMES = {
    "independent": (independent([0.8, 0.1, 0.5]), [0.8, 0.1, 0.5]),
    "together": (together(3, 0.7), [0.7] * 3),
    "one of": (one_of(4), [0.25] * 4),
    "with one of": (with_one_of(4, 0.6), [0.6] + [0.15] * 4),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_outcomes_are_different_add_up_to_one_and_have_the_chances_asked_for(name):
    (rows, chance), eta = OUTCOMES[name]
    assert rows.dtype == torch.bool
    assert len(rows) == len(chance) == len({tuple(row) for row in rows.tolist()})
    assert chance.sum().item() == pytest.approx(1)
    torch.testing.assert_close(chance @ rows.double(), torch.tensor(eta, dtype=torch.float64))


def test_outcomes_of_labels_that_depend_on_each_other():
    assert all(len(set(row)) == 1 for row in together(5, 0.3)[0].tolist())
    assert one_of(6)[0].sum(1).tolist() == [1] * 6
    rows = with_one_of(6, 0.3)[0]
    assert rows[:, 1:].sum(1).equal(rows[:, 0].long())


def test_a_careless_person_loses_and_invents_at_the_rates_asked_for():
    target = torch.zeros(400, 500, dtype=torch.bool)
    target[:, :100] = True
    given = careless(target, seed=3)
    assert given[target].double().mean().item() == pytest.approx(0.8, abs=0.01)
    assert given[~target].double().mean().item() == pytest.approx(0.01, abs=0.002)
    assert careless(target, seed=3).equal(given)
    assert not careless(target, seed=4).equal(given)
    assert careless(target, lost=0, invented=0, seed=3).equal(target)
