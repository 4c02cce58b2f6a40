"""The task of the experiment on spans with more steps."""

from dataclasses import asdict

from experiments import spans, spans_longer
from experiments.harness import SCALES, Job


def test_the_task_is_that_of_spans_with_more_epochs_and_lower_rates():
    for scale in SCALES:
        (task,) = spans_longer.tasks(scale)
        usual = spans.tasks(scale)[0]
        assert (task.name, task.sets, task.seeds) == (usual.name, usual.sets, usual.seeds)
        assert task.facts == {**usual.facts, "epochs": 3 * usual.facts["epochs"]}
        for method, grid in task.methods.items():
            assert [set(each) for each in grid] == [set(each) for each in usual.methods[method]]
            assert max(each["lr"] for each in grid) < max(each["lr"] for each in usual.methods[method])


def test_a_run_is_one_of_spans_with_the_larger_size(monkeypatch):
    (task,) = spans_longer.tasks("smoke")
    job = Job(task, spans_longer.MULTI, {"lr": 0.01}, 1, False, "smoke")
    given = []
    monkeypatch.setattr(spans, "run", lambda job: given.append(job) or {"f1": 0.5})
    assert spans_longer.run(job) == {"f1": 0.5}
    size = asdict(spans.SIZES[given[0].scale][given[0].task.name])
    assert size == {**asdict(spans.SIZES["smoke"][spans.RESUME]), "epochs": task.facts["epochs"]}
