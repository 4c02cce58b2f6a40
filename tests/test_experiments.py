"""The harness of the experiments, each experiment at its smallest scale, and the records that are stored."""

import importlib
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments import harness
from experiments.harness import Experiment, Job, Task, best, main
from lossbook.data import _fetch, load_record
from lossbook.data.public import public_sets
from lossbook.records import unpacked
from tools.chapters import ROOT
from tools.provenance import changed_code, deciding_code, read_record

NO_EXPERIMENT = ("__init__", "advice", "harness")
SLUGS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem not in NO_EXPERIMENT)
EXPERIMENTS = pytest.mark.parametrize("slug", SLUGS)
TASK = Task("flowers", ("uci-iris",), {"a": [{"x": 1}, {"x": 2}], "b": [{"x": 5}, {"x": 4}]}, "score", seeds=(1, 2))


def experiment_of(run, tasks=(TASK,), metrics=("score",)):
    """An experiment whose deciding code is that of chapter 5's, since a digest needs a file."""
    return Experiment("accuracy", "what", lambda scale: list(tasks), run, {name: name for name in metrics}, "a")


def arguments(folder, *more):
    return ["--out", str(folder / "out"), "--runs", str(folder / "runs"), *more]


def record_of(folder, name="accuracy"):
    return read_record(folder / "out" / f"{name}.json")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    monkeypatch.delenv("WORLD_SIZE", raising=False)


# ---------------------------------------------------------------- records of older code


def test_a_record_of_older_code_is_confirmed_by_a_part_of_its_runs(tmp_path, capsys):
    made: list[Job] = []
    shift = [0.0]

    def run(job):
        made.append(job)
        return {"score": job.settings["x"] + job.seed / 10 + shift[0], "seconds": len(made)}

    experiment = experiment_of(run, metrics=("score", "seconds"))
    assert main(experiment, arguments(tmp_path)) == 0
    path = tmp_path / "out" / "accuracy.json"
    before = record_of(tmp_path)
    old = {**before, "code": dict.fromkeys(before["code"], "0" * 16)}
    path.write_text(harness.text_of(old), encoding="utf-8")
    assert changed_code(record_of(tmp_path)) == sorted(old["code"])

    made.clear()
    shift[0] = 1e-5
    assert main(experiment, arguments(tmp_path, "--confirm")) == 0
    assert [(job.method, job.settings["x"], job.seed, job.final) for job in made] == [
        ("a", 2, 1, True),
        ("b", 5, 1, True),
    ]
    after = record_of(tmp_path)
    assert changed_code(after) == []
    assert after["confirmed"]["runs"] == 2
    assert 1e-6 < after["confirmed"]["apart"] < 1e-5
    assert {**after, "confirmed": None, "code": None} == {**before, "confirmed": None, "code": None}

    shift[0] = 0.1
    path.write_text(harness.text_of(old), encoding="utf-8")
    assert main(experiment, arguments(tmp_path, "--confirm")) == 1
    assert "score was 2.1, is 2.2; run the experiment again" in capsys.readouterr().err
    assert record_of(tmp_path) == old


def test_a_record_of_other_data_is_not_confirmed(tmp_path, capsys):
    experiment = experiment_of(lambda job: {"score": 1.0})
    main(experiment, arguments(tmp_path))
    other = experiment_of(lambda job: {"score": 1.0}, [replace(TASK, sets=("uci-wine",))])
    assert main(other, arguments(tmp_path, "--confirm")) == 1
    assert "the task flowers has other data now" in capsys.readouterr().err


# ---------------------------------------------------------------- the file of a record


def test_the_file_has_a_line_a_method_and_every_run(tmp_path):
    """Several environments, a run that diverged, a grid of one, letters beyond ASCII: all come back."""
    values = iter(range(1000))

    def run(job):
        return {"score": math.nan if job.seed == 2 and job.method == "a" else next(values) / 7, "more": 1.0}

    alone = replace(TASK, name="blümchen", methods={"−log P": [{"x": [1, "two"]}]})
    experiment = experiment_of(run, [replace(TASK, tuning_seeds=(101, 102)), alone], metrics=("score", "more"))
    assert main(experiment, arguments(tmp_path)) == 0
    record = record_of(tmp_path)
    for number, run in enumerate(record["runs"]):
        run["environment"] = number % 2
    path = tmp_path / "record.json"
    path.write_text(harness.text_of({**record, "runs": record["runs"][::-1]}), encoding="utf-8")
    assert read_record(path) == record
    assert read_record(path)["runs"] == record["runs"]
    assert len(record["runs"]) == 2 * 2 * 2 + 2 * 2 + 2
    assert {run["metrics"]["score"] is None for run in record["runs"]} == {True, False}
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line.split(":")[0].strip() for line in lines if '"final"' in line] == ['"a"', '"b"', '"−log P"']
    assert unpacked(record) is record


# ---------------------------------------------------------------- tuning and measuring


def test_validation_chooses_and_only_final_runs_are_measured(tmp_path):
    seen: list[Job] = []

    def run(job):
        seen.append(job)
        return {"score": job.settings["x"] + (100 if job.final else 0)}

    assert main(experiment_of(run), arguments(tmp_path)) == 0
    tuning = [(job.method, job.settings["x"], job.seed) for job in seen if not job.final]
    final = [(job.method, job.settings["x"], job.seed) for job in seen if job.final]
    assert tuning == [("a", 1, 101), ("a", 2, 101), ("b", 5, 101), ("b", 4, 101)]
    assert final == [("a", 2, 1), ("a", 2, 2), ("b", 5, 1), ("b", 5, 2)]

    record = record_of(tmp_path)
    assert record["tasks"][0]["methods"]["b"] == {"grid": [{"x": 5}, {"x": 4}], "chosen": {"x": 5}}
    assert record["tasks"][0]["data"] == {"uci-iris": public_sets()["uci-iris"].sha256}
    assert len(record["runs"]) == 8
    assert {run["metrics"]["score"] for run in record["runs"] if run["final"]} == {102, 105}
    assert record["environments"][0]["machine"]["device"] == "cpu"
    assert record["environments"][0]["versions"]["torch"] == torch.__version__
    assert record["code"] == deciding_code("accuracy")
    assert record["seconds"] == pytest.approx(sum(run["seconds"] for run in record["runs"]), abs=0.1)


def test_a_grid_of_one_is_not_tuned(tmp_path):
    seen = []
    task = replace(TASK, methods={"a": [{"x": 1}]})
    main(experiment_of(lambda job: seen.append(job) or {"score": 0}, [task]), arguments(tmp_path))
    assert [job.final for job in seen] == [True, True]


def test_the_mean_over_tuning_seeds_decides_and_the_first_of_equals_wins():
    task = replace(TASK, tuning_seeds=(8, 9))
    grid = [{"x": 1}, {"x": 2}, {"x": 3}]

    def runs(*scores):
        pairs = zip(grid, scores, strict=True)
        return [{"settings": s, "metrics": {"score": v}} for s, values in pairs for v in values]

    assert best(task, grid, runs((0, 4), (3, 3), (1, 1))) == {"x": 2}
    assert best(task, grid, runs((2, 2), (1, 3), (0, 0))) == {"x": 1}


def test_a_grid_goes_on_while_the_best_value_is_at_its_edge(tmp_path):
    best_at = {"a": 0.02, "b": 0.3, "c": 1e9}  # inside the grid, one step beyond it, too far away

    def run(job):
        return {"score": -abs(math.log(job.settings["lr"] / best_at[job.method]))}

    grid = [{"lr": 0.01}, {"lr": 0.03}, {"lr": 0.1}]
    task = replace(TASK, methods=dict.fromkeys(best_at, grid), extend="lr")
    main(experiment_of(run, [task]), arguments(tmp_path))
    record = record_of(tmp_path)
    methods = record["tasks"][0]["methods"]
    rates = {method: [settings["lr"] for settings in methods[method]["grid"]] for method in methods}
    assert rates == {"a": [0.01, 0.03, 0.1], "b": [0.01, 0.03, 0.1, 0.3, 0.9], "c": [0.01, 0.03, 0.1, 0.3, 0.9, 2.7]}
    assert {method: methods[method]["chosen"]["lr"] for method in methods} == {"a": 0.03, "b": 0.3, "c": 2.7}
    assert sum(not run["final"] for run in record["runs"]) == 3 + 5 + 6


def test_a_grid_goes_on_below_its_smallest_value(tmp_path):
    task = replace(TASK, methods={"a": [{"lr": 0.3}, {"lr": 0.9}]}, extend="lr")
    main(experiment_of(lambda job: {"score": -abs(job.settings["lr"] - 0.1)}, [task]), arguments(tmp_path))
    grid = record_of(tmp_path)["tasks"][0]["methods"]["a"]["grid"]
    assert [settings["lr"] for settings in grid] == [0.3, 0.9, 0.1, 0.033]


def test_a_diverged_run_is_kept_and_never_chosen(tmp_path):
    def run(job):
        return {"score": math.nan if job.settings["x"] == 5 or job.final else -7.0}

    main(experiment_of(run), arguments(tmp_path))
    record = record_of(tmp_path)
    assert record["tasks"][0]["methods"]["b"]["chosen"] == {"x": 4}
    assert [r["metrics"]["score"] for r in record["runs"] if not r["final"]] == [-7, -7, None, -7]
    assert {r["metrics"]["score"] for r in record["runs"] if r["final"]} == {None}


def test_every_random_number_comes_from_the_seed(tmp_path):
    def run(job):
        return {"score": torch.rand(()).item()}

    main(experiment_of(run), arguments(tmp_path / "one"))
    torch.rand(5)
    main(experiment_of(run), arguments(tmp_path / "two"))
    one, two = ([r["metrics"] for r in record_of(tmp_path / name)["runs"]] for name in ("one", "two"))
    assert one == two
    assert len({m["score"] for m in one}) == 3  # one tuning seed, two final seeds


def test_a_later_stage_waits_for_the_earlier_one(tmp_path):
    seen = []
    later, first = replace(TASK, name="later", stage=1), replace(TASK, name="first")
    main(experiment_of(lambda job: seen.append(job) or {"score": 1}, [later, first]), arguments(tmp_path))
    names = [job.task.name for job in seen]
    assert names == ["first"] * 8 + ["later"] * 8


def test_a_missing_metric_is_named(tmp_path):
    with pytest.raises(KeyError, match=r"flowers, a .*does not return other"):
        main(experiment_of(lambda job: {"score": 1.0}, metrics=("score", "other")), arguments(tmp_path))


def test_a_task_may_have_a_part_of_the_metrics(tmp_path):
    tasks = [replace(TASK, metrics=("score",)), replace(TASK, name="other", metrics=("other",), score="other")]
    experiment = experiment_of(lambda job: {job.task.score: 1.0}, tasks, metrics=("score", "other"))
    assert main(experiment, arguments(tmp_path)) == 0
    assert [task["metrics"] for task in record_of(tmp_path)["tasks"]] == [["score"], ["other"]]
    complete(record_of(tmp_path))


# ---------------------------------------------------------------- going on where it was


def test_a_finished_run_is_never_made_again(tmp_path):
    made = []

    def run(job):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(job)
        return {"score": job.settings["x"]}

    with pytest.raises(KeyboardInterrupt):
        main(experiment_of(run), arguments(tmp_path))
    assert not (tmp_path / "out").exists()  # no record of half an experiment
    before = list(made)
    main(experiment_of(lambda job: made.append(job) or {"score": job.settings["x"]}), arguments(tmp_path))
    assert len(made) == 8
    assert made[:5] == before
    main(experiment_of(lambda job: pytest.fail("nothing is left to do")), arguments(tmp_path))
    assert len(record_of(tmp_path)["runs"]) == 8


SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    from experiments.harness import Experiment, Task, main

    def tasks(scale):
        grid = [{"x": 1}, {"x": 2}]
        return [Task("flowers", ("uci-iris",), {"a": grid, "b": grid}, "score", seeds=(1, 2, 3))]

    def run(job):
        import torch
        log = Path(sys.argv[1])
        with open(log, "a") as file:
            print(os.getpid(), job.about(), file=file)
        if os.environ.get("KILL_AT") == str(len(log.read_text().splitlines())):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return {"score": job.settings["x"] + torch.rand(()).item()}

    experiment = Experiment("accuracy", "what", tasks, run, {"score": "score"}, "a")
    if __name__ == "__main__":
        raise SystemExit(main(experiment, sys.argv[2:]))
"""


def script(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "script.py"
    path.write_text(textwrap.dedent(SCRIPT), encoding="utf-8")
    return [str(path), str(folder / "log"), *arguments(folder)]


def start(*command, **more):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOSSBOOK_DEVICE": "cpu", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


def test_a_killed_process_loses_no_finished_run(tmp_path):
    killed = start(*script(tmp_path), KILL_AT="6")
    assert killed.returncode == -signal.SIGKILL
    log = tmp_path / "log"
    assert len(log.read_text().splitlines()) == 6
    again = start(*script(tmp_path))
    assert again.returncode == 0, again.stderr
    lines = [line.partition(" ")[2] for line in log.read_text().splitlines()]
    assert len(lines) == 11
    assert lines[5] == lines[6]  # only the run that was killed is made again
    assert len(set(lines)) == 10 == len(record_of(tmp_path)["runs"])


def test_processes_of_torchrun_share_the_runs(tmp_path):
    together, one = tmp_path / "together", tmp_path / "alone"
    done = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script(together))
    assert done.returncode == 0, done.stderr
    lines = (together / "log").read_text().splitlines()
    assert len(lines) == 10 == len({line.partition(" ")[2] for line in lines})  # each run once
    assert len({line.partition(" ")[0] for line in lines}) == 2  # by two processes
    assert start(*script(one)).returncode == 0

    def results(folder):
        record = record_of(folder)
        assert len(record["environments"]) == 1
        return record["tasks"], [{k: v for k, v in run.items() if k != "seconds"} for run in record["runs"]]

    assert results(together) == results(one)


@pytest.mark.parametrize(
    ("named", "local", "size", "cuda", "taken"),
    [
        ("", "5", 8, True, "cuda:1"),
        ("", None, 8, True, "cuda:2"),  # a launcher that tells the rank only
        ("cuda:3", "5", 8, True, "cuda:3"),
        ("", "0", 1, True, ""),
        ("", "5", 8, False, ""),
    ],
)
def test_each_process_takes_a_gpu_of_its_own(monkeypatch, named, local, size, cuda, taken):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOSSBOOK_DEVICE", named)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    crew = harness.Alone()
    crew.rank, crew.size = 6, size
    harness.share_gpus(crew)
    assert os.environ["LOSSBOOK_DEVICE"] == taken


def test_machines_that_kept_different_runs_agree_on_what_is_missing(tmp_path):
    """Two processes with folders of their own: the first has four runs already, the second has others of the code."""
    assert start(*script(tmp_path / "first"), KILL_AT="5").returncode == -signal.SIGKILL
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank, name in enumerate(("first", "second")):
        environment = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= {**os.environ, "PYTHONPATH": str(ROOT), "LOSSBOOK_DEVICE": "cpu", **environment}
        command = [sys.executable, *script(tmp_path / name)]
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT))
    assert [process.wait(120) for process in processes] == [0, 0]
    lines = [(tmp_path / name / "log").read_text().splitlines() for name in ("first", "second")]
    made = [line.partition(" ")[2] for line in lines[0][5:] + lines[1]]
    assert len(made) == 6 == len(set(made))  # ten runs less the four that the first had
    assert len(record_of(tmp_path / "first")["runs"]) == 10
    assert not (tmp_path / "second" / "out").exists()
    kept = list((tmp_path / "second" / "runs" / "accuracy").glob("*.json"))
    assert len(kept) >= 6


def test_experiments_need_nothing_that_only_builds_the_book():
    """A machine with GPUs may have torch, numpy and scikit-learn, a copy of the checkout, and nothing more."""
    absent = ["jupytext", "nbformat", "yaml", "pooch", "matplotlib", "IPython", "pybtex"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        "import importlib, experiments.harness as h\n"
        "from tools.provenance import commit, deciding_code, versions\n"
        f"for slug in {SLUGS}: importlib.import_module(f'experiments.{{slug}}'); deciding_code(slug)\n"
        "print(versions(), commit('experiments'))"
    )
    done = start("-c", code)
    assert done.returncode == 0, done.stderr
    assert "'lossbook': '0." in done.stdout


def test_a_run_of_other_code_data_or_settings_is_another_run(tmp_path):
    runs = harness.Runs(tmp_path, {"a.py": "1"}, "cpu")
    job = Job(TASK, "a", {"x": 1}, 1, True, "cpu")
    others = [
        harness.Runs(tmp_path, {"a.py": "2"}, "cpu").path(job),
        harness.Runs(tmp_path, {"a.py": "1"}, "gpu").path(job),
        runs.path(replace(job, task=replace(TASK, sets=("uci-wine",)))),
        runs.path(replace(job, settings={"x": 2})),
        runs.path(replace(job, method="b")),
        runs.path(replace(job, seed=2)),
        runs.path(replace(job, final=False)),
    ]
    assert len({runs.path(job), *others}) == 8
    assert runs.path(replace(job, device=torch.device("meta"))) == runs.path(job)


def test_a_run_that_was_not_written_to_its_end_does_not_count(tmp_path, monkeypatch):
    runs = harness.Runs(tmp_path, {}, "cpu")
    job = Job(TASK, "a", {"x": 1}, 1, True, "cpu")

    def full(self, content):
        self.touch()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space left"):
            runs.put(job, {"score": 1})
    assert runs.get(job) is None
    runs.put(job, {"score": 1})
    assert runs.get(job) == {"score": 1}


def test_tensors_are_kept_once_and_without_pickle(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"weight": torch.arange(3.0), "bias": torch.tensor(2)}

    job = Job(TASK, "a", {}, 1, True, "cpu", kept=tmp_path / "kept")
    first, second = job.keep("start", make), job.keep("start", make)
    assert len(made) == 1
    assert first["weight"].tolist() == second["weight"].tolist() == [0, 1, 2]
    assert second["bias"].item() == 2
    assert replace(job, kept=None).keep("start", make)["bias"].item() == 2
    assert len(made) == 2
    assert [path.suffix for path in (tmp_path / "kept").iterdir()] == [".npz"]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (replace(TASK, methods={"a": []}), "equally long and hold a setting, got {'a': 0}"),
        (replace(TASK, methods={"a": [{"x": 1}], "b": [{"x": 1}, {"x": 2}]}), "equally long"),
        (replace(TASK, seeds=(1, 101)), "the seed 101 is used to tune and to measure"),
        (replace(TASK, sets=("no-such-set",)), "no public set no-such-set"),
        (replace(TASK, methods={"a": [{"x": 1}, {"x": 1}]}), "same settings twice"),
        (replace(TASK, metrics=("score", "speed")), "no metric speed"),
    ],
)
def test_a_task_that_cannot_be_fair_is_refused(tmp_path, task, message):
    with pytest.raises(ValueError, match=message):
        main(experiment_of(lambda job: {"score": 1}, [task]), arguments(tmp_path))


def test_two_tasks_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same name"):
        main(experiment_of(lambda job: {"score": 1}, [TASK, TASK]), arguments(tmp_path))


def test_a_smoke_record_stays_away_from_the_pages(tmp_path):
    experiment = experiment_of(lambda job: {"score": 1})
    assert main(experiment, ["--runs", str(tmp_path), "--scale", "smoke"]) == 0
    assert (tmp_path / "accuracy_smoke.json").exists()
    assert not (ROOT / "data" / "results" / "accuracy_smoke.json").exists()


def test_one_task_alone_writes_no_record(tmp_path, capsys):
    tasks = [TASK, replace(TASK, name="other")]
    seen = []
    experiment = experiment_of(lambda job: seen.append(job.task.name) or {"score": 1}, tasks)
    assert main(experiment, arguments(tmp_path, "--task", "other")) == 0
    assert set(seen) == {"other"}
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(experiment, arguments(tmp_path, "--task", "nothing"))
    assert "no task nothing; there are flowers, other" in capsys.readouterr().err


# ---------------------------------------------------------------- the experiments


def module_of(slug):
    return importlib.import_module(f"experiments.{slug}")


@pytest.fixture
def data():
    if _fetch.data_folder() is None:
        pytest.skip("the public data are not here: set LOSSBOOK_DATA to their folder")


@EXPERIMENTS
@pytest.mark.parametrize("scale", harness.SCALES)
@pytest.mark.usefixtures("data")
def test_rivals_are_tuned_alike(slug, scale):
    tasks = module_of(slug).EXPERIMENT.tasks(scale)
    harness.check(module_of(slug).EXPERIMENT, tasks)
    assert scale == "smoke" or all(len(task.seeds) >= 5 for task in tasks)


@EXPERIMENTS
@pytest.mark.usefixtures("data")
def test_an_experiment_runs_at_its_smallest_scale(slug, tmp_path):
    experiment = module_of(slug).EXPERIMENT
    assert main(experiment, arguments(tmp_path, "--scale", "smoke")) == 0
    record = record_of(tmp_path, f"{slug}_smoke")
    complete(record)
    values = [value for run in record["runs"] for value in run["metrics"].values()]
    assert None not in values
    # the same run once more gives the same numbers
    task = experiment.tasks("smoke")[-1]
    run = next(run for run in record["runs"] if run["final"] and run["task"] == task.name)
    kept = next(iter((tmp_path / "runs" / slug).glob("kept-*")), None)
    job = Job(task, run["method"], run["settings"], run["seed"], True, "smoke", kept=kept)
    again = harness.make_run(experiment, job)["metrics"]
    timeless = {name: value for name, value in again.items() if "second" not in name}
    # the record has six digits
    assert timeless == pytest.approx({name: run["metrics"][name] for name in timeless}, rel=1e-5)


def complete(record):
    """Every method of every task was measured with every seed, with settings that validation data chose."""
    for task in record["tasks"]:
        for method, tuned in task["methods"].items():
            runs = [run for run in record["runs"] if run["task"] == task["name"] and run["method"] == method]
            final = [run for run in runs if run["final"]]
            assert [run["seed"] for run in final] == task["seeds"]
            assert all(run["settings"] == tuned["chosen"] for run in final)
            assert all(run["metrics"].keys() >= set(task["metrics"]) for run in final)
            tuning = [run for run in runs if not run["final"]]
            if len(tuned["grid"]) > 1:
                assert len(tuning) == len(tuned["grid"]) * len(task["tuning_seeds"])
                judged = Task("", (), {}, task["score"])
                assert best(judged, tuned["grid"], tuning) == tuned["chosen"]


# ---------------------------------------------------------------- the stored records


@EXPERIMENTS
def test_a_stored_record_is_whole(slug):
    stored = load_record(slug)
    assert stored, f"there is no record of {slug}: make experiments"
    assert "runs" not in stored, "a line for each run: write it with text_of"
    record = unpacked(stored)
    complete(record)
    assert record["scale"] == "cpu"
    assert all(len(task["seeds"]) >= 5 for task in record["tasks"])
    for task in record["tasks"]:
        assert task["data"] == {name: public_sets()[name].sha256 for name in task["data"]}
    assert record["changed"] is False, "made with changes that were not committed"


@pytest.mark.usefixtures("book_sources")
def test_every_chapter_has_an_experiment():
    from tools.chapters import all_chapters

    of_a_page = {"breadth", "spans_longer", "spans_clipped"}  # the page that leads to a loss, and evidence of a chapter
    assert {chapter.slug for chapter in all_chapters()} == set(SLUGS) - of_a_page
