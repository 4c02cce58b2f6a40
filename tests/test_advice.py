"""The advice as predictions: what a record says of one, and how often advice foretells a data set."""

import math

import pytest

from experiments import advice as command
from lossbook import advice
from lossbook.advice import Prediction, leave_one_out, prediction, predictions
from lossbook.data import _fetch, public
from lossbook.records import Record


def record_of(gains, overlap=0.0, kind="several"):
    """A record in which A is ahead of B by ``gains[task]``, one value a seed, and C far behind B."""
    tasks, runs = [], []
    for task, values in gains.items():
        facts = {"kind": kind, "goal": "threshold 0"} | ({"overlap": overlap} if overlap else {})
        methods = {method: {"grid": [{"lr": 1}, {"lr": 2}], "chosen": {"lr": 1}} for method in "ABC"}
        about = {"name": task, "data": {task.split()[0]: "0"}, "metrics": ["f1"], "score": "f1", "facts": facts}
        tasks.append({**about, "methods": methods, "seeds": [1, 2, 3], "tuning_seeds": [101]})
        for method, level in (("A", 0.5), ("B", 0.5), ("C", 0.1)):
            about = {"task": task, "method": method, "seconds": 1.0}
            for lr, score in ((1, level), (2, level - 0.05)):
                tuned = {"settings": {"lr": lr}, "seed": 101, "final": False, "metrics": {"f1": score}}
                runs.append({**about, **tuned})
            for seed, gain in enumerate(values, start=1):
                found = level + 0.01 * seed + (gain if method == "A" else 0)
                runs.append({**about, "settings": {"lr": 1}, "seed": seed, "final": True, "metrics": {"f1": found}})
    return Record({"baseline": "B", "metrics": {"f1": "F1"}, "tasks": tasks, "runs": runs})


@pytest.fixture
def made(monkeypatch):
    """Records and predictions of a test's own."""

    def make(gains, expects="ahead", ahead=("A",), of=("B",), **more):
        place = {"record": "made", "kind": "several", "goal": "threshold 0", "metric": "f1"}
        place |= {"ahead": list(ahead), "of": list(of)}
        monkeypatch.setattr(advice, "_record", lambda slug: record_of(gains, **more))
        each = Prediction("one", "A is ahead of B", expects, (place,))
        monkeypatch.setattr(advice, "predictions", lambda: (each,))
        monkeypatch.setattr(command, "predictions", lambda: (each,))
        return each

    return make


GAINS = {"enron": [0.02, 0.03, 0.025], "scene": [-0.02, -0.03, -0.025], "yeast": [-0.001, 0.001, 0.0005]}


def test_each_task_says_holds_fails_or_open(made):
    each = made(GAINS)
    assert [verdict.says for verdict in each.verdicts()] == ["holds", "fails", "open"]
    assert each.counts() == {"holds": 1, "fails": 1, "open": 1}
    assert not each.stands
    first = each.verdicts()[0]
    assert first.difference.mean == pytest.approx(0.025)
    assert first.data == ("enron",)


def test_level_means_surely_below_a_point(made):
    more = {"bibtex": [0.005, 0.006, 0.0055], "wide": [-0.02, 0.0, 0.02]}
    each = made({**GAINS, **more}, expects="level")
    assert [verdict.says for verdict in each.verdicts()] == ["fails", "fails", "holds", "holds", "open"]
    assert [verdict.sign for verdict in each.verdicts()] == [1, -1, 0, 1, 0]
    assert not each.stands  # two hold, two fail
    assert made(more, expects="level").stands  # one holds, one is open
    for expects in ("ahead", "not ahead", "level"):
        assert not made({"wide": more["wide"]}, expects=expects).stands  # nothing holds


def test_not_ahead_means_a_gain_surely_below_a_point(made):
    more = {"bibtex": [0.005, 0.006, 0.0055], "wide": [-0.02, 0.0, 0.02]}
    each = made({**GAINS, **more}, expects="not ahead")
    assert [verdict.says for verdict in each.verdicts()] == ["fails", "holds", "holds", "holds", "open"]
    assert each.stands


def test_validation_chooses_between_the_methods_of_a_side(made):
    each = made(GAINS, of=("C", "B"))  # B did better on validation data
    assert each.verdicts()[0].difference.mean == pytest.approx(0.025)


def test_splits_that_share_rows_have_wider_intervals(made):
    plain = made(GAINS).verdicts()[0].difference
    shared = made(GAINS, overlap=0.6).verdicts()[0].difference
    assert shared.half_width == pytest.approx(plain.half_width * math.sqrt(1 + 3 * 0.6))


def test_tasks_of_another_kind_or_goal_have_no_say(made):
    assert made(GAINS, kind="rare").verdicts() == []


def test_the_brief_names_counts_size_and_data(made):
    assert made(GAINS).brief() == "1 hold, 1 open, 1 fail; +0.0 (-2.5 to +2.5) points; enron, scene, yeast"
    two = {name: GAINS[name] for name in ("enron", "scene")}
    assert made(two).brief().endswith("; on enron and scene only")


def told(**more):
    return {**dict.fromkeys(("right", "silent", "wrong", "level", "alarm"), 0), **more}


def test_leaving_one_out(made):
    ahead = [0.02, 0.03, 0.025]
    made({"a": ahead, "b": ahead, "c": ahead, "d": GAINS["yeast"]})
    assert leave_one_out() == told(right=3, alarm=1)
    made({"a": ahead, "b": ahead, "c": GAINS["scene"]})
    # the others of a, and of b, are one ahead and one behind: level; those of c say ahead
    assert leave_one_out() == told(silent=2, wrong=1)
    made({"a": ahead, "b": ahead})  # too few
    assert leave_one_out() == told()


def test_tasks_of_one_data_set_vote_together(made):
    made({"a 1": [0.02, 0.03, 0.025], "a 2": [0.02, 0.03, 0.025], "b": GAINS["yeast"], "c": GAINS["yeast"]})
    assert leave_one_out() == told(silent=1, alarm=2)


def test_the_command_fails_where_a_statement_does_not_stand(made, capsys):
    made(GAINS)
    assert command.main() == 1
    shown = capsys.readouterr().out
    assert "one DOES NOT STAND: A is ahead of B" in shown
    assert "+ enron: +2.5" in shown
    made({"enron": GAINS["enron"]})
    assert command.main() == 0


# ---------------------------------------------------------------- the statements of the page


def test_names_are_unique_and_unknown_ones_are_named():
    names = [each.name for each in predictions()]
    assert len(set(names)) == len(names)
    assert prediction(names[0]).name == names[0]
    with pytest.raises(KeyError, match="no prediction 'nothing'"):
        prediction("nothing")


def test_labels_are_as_rare_as_the_statements_say():
    if _fetch.data_folder() is None:
        pytest.skip("the public data are not here: set LOSSBOOK_DATA to their folder")
    for name in ("weight10_rare", "weight10_often", "asl_rare", "asl_often"):
        for verdict in prediction(name).verdicts():
            (data,) = verdict.data
            loader = getattr(public, data.removeprefix("mulan-").removesuffix("-500"))
            share = loader().train.targets.double().mean().item()
            assert share < 0.07 if name.endswith("rare") else share > 0.09


@pytest.mark.parametrize("name", [each.name for each in predictions()])
def test_a_statement_stands_in_its_own_records(name):
    each = prediction(name)
    assert each.verdicts(), "no record speaks of it"
    assert each.stands, each.counts()
