"""Runs an experiment: tunes every rival alike, measures it over several seeds, keeps every run, writes the record.

An experiment is a file ``experiments/<slug>.py`` that ends in two lines::

    from experiments.harness import Experiment, Job, Task, main

    def tasks(scale: str) -> list[Task]:
        epochs = {"smoke": 1, "cpu": 10, "gpu": 30}[scale]
        grid = [{"lr": lr, "epochs": epochs} for lr in (1e-3, 3e-3)]
        return [Task("bibtex", sets=("bibtex",), methods={"BCE": grid, "multi-label softmax": grid}, score="micro_f1")]

    def run(job: Job) -> dict[str, float]:
        train, validation, test = split(...)
        ...                                # job.method, job.settings, job.seed, job.device, job.scale
        if not job.final:
            return {"micro_f1": ...}       # on validation data
        return {"micro_f1": ...}           # on test data

    EXPERIMENT = Experiment("multilabel_softmax", "what is measured, in one sentence", tasks, run,
                            metrics={"micro_f1": "micro-F1"}, baseline="BCE")

    if __name__ == "__main__":
        raise SystemExit(main(EXPERIMENT))

A task is one data set with everything fixed but the loss. Each of its methods has a grid of settings, and all grids of
a task must be equally long: that is the tuning effort. Every setting of the grid is run once per tuning seed and
judged by ``score`` on validation data; grids of one need no tuning. With ``extend`` a grid goes on where the best
value of that setting, say of ``lr``, is its smallest or greatest. The best is then run once per seed, and only
these final runs may look at test data. torch is seeded with the run's seed before ``run`` is called; draw splits and
subsets from it too, or from a fixed number, so that all methods see the same data for a seed.

Every finished run is a file of its own below ``experiments/runs``, written in one step. Killed at any moment, the same
command goes on where it was. What a run depends on is part of its name: the code that decides it (comments and
docstrings do not count), the digests of its data, its settings. So a run of other code is never taken for a new one.

Run ``python -m experiments.<slug> [--scale smoke|cpu|gpu]``. To use several processes, GPUs or machines, start the
same module with torchrun; the processes share the runs among them through its store::

    torchrun --standalone --nproc-per-node 2 -m experiments.<slug>

The record goes to ``data/results/<slug>.json``, at the scale ``gpu`` to ``<slug>_gpu.json``. One of the scale ``smoke``
stays with its runs.

A change of the code marks a record as outdated, whether it changes a number or not. ``--confirm`` finds out in a few
minutes: it repeats one final run of every method in every task, and where none moves a metric by more than 0.005, the
record stands for the present code and says how it was confirmed. Else the experiment must be run again. The choice of
the settings is not repeated: whether the present code would choose the same, only a whole run tells.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from lossbook.data.public import public_sets
from lossbook.devices import OVERRIDE, best_device
from lossbook.training import seeded
from tools.provenance import commit, deciding_code, machine, read_record, versions

ROOT = Path(__file__).resolve().parents[1]
SCALES = ("smoke", "cpu", "gpu")
TUNING_SEEDS = (101,)
SEEDS = (1, 2, 3, 4, 5)
SAME = 5e-3  # a repeated run is the same if no metric moved by more: rounding alone turns a few decisions
EXTEND, EXTENSIONS = 3, 3  # factor from one value to the next beyond the edge of a grid; at most so many more

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One data set, and what is compared on it.

    Attributes:
        name: What readers call it.
        sets: The public sets it reads, by their names in ``data/public.json``.
        methods: Each rival's grid of settings. Settings are plain JSON values.
        score: The validation metric that chooses from a grid. More is better.
        tuning_seeds: Seeds of the tuning runs; other seeds than those of the final ones.
        seeds: Seeds of the final runs.
        metrics: Those of the experiment's metrics that the task has; empty for all.
        stage: Tasks of a later stage start when those of an earlier one have finished.
        extend: The setting whose grid goes on, by a factor of 3, while the best value is at its edge; empty for none.
        facts: What a reader of the record should know: sizes of the splits, of the network, of the budget.
    """

    name: str
    sets: tuple[str, ...]
    methods: Mapping[str, Sequence[Settings]]
    score: str
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    seeds: tuple[int, ...] = SEEDS
    metrics: tuple[str, ...] = ()
    stage: int = 0
    extend: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: Its task.
        method: Its method.
        settings: The method's settings.
        seed: What every random number is drawn from.
        final: Whether it may look at test data. If not, it is a tuning run.
        scale: ``smoke`` (seconds, to see that it works), ``cpu`` or ``gpu``.
        device: Where to compute.
        kept: The folder for :meth:`keep`.
    """

    task: Task
    method: str
    settings: Settings
    seed: int
    final: bool
    scale: str
    device: torch.device = field(default=torch.device("cpu"), compare=False)
    kept: Path | None = field(default=None, compare=False)

    def about(self) -> dict[str, Any]:
        """What sets this run apart from the others of its experiment."""
        return {
            "task": self.task.name,
            "method": self.method,
            "settings": dict(self.settings),
            "seed": self.seed,
            "final": self.final,
        }

    def keep(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors that several runs start from, such as pretrained weights: made once and kept, made anew elsewhere.

        ``name`` must say everything that they depend on besides code and data. ``make`` should draw from a seed of its
        own (:func:`lossbook.training.seeded`), since it does not run in every job.
        """
        path = None if self.kept is None else self.kept / f"{name}.npz"
        if path is None or not path.exists():
            arrays = {key: tensor.detach().cpu().numpy() for key, tensor in make().items()}
            if path is None:
                return {key: torch.from_numpy(array) for key, array in arrays.items()}
            buffer = io.BytesIO()
            np.savez(buffer, **arrays)  # type: ignore[arg-type]  # no tensor is called allow_pickle
            write(path, buffer.getvalue())
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@dataclass(frozen=True)
class Experiment:
    """What a file of this folder defines.

    Attributes:
        slug: Its name, that of the chapter.
        what: One sentence: what is compared.
        tasks: The tasks at a scale.
        run: Makes one run and returns its metrics.
        metrics: The metrics of final runs, each with its name for readers.
        baseline: The method that the others are compared with.
        packages: Packages besides torch that decide the numbers.
    """

    slug: str
    what: str
    tasks: Callable[[str], list[Task]]
    run: Callable[[Job], Mapping[str, float]]
    metrics: Mapping[str, str]
    baseline: str
    packages: tuple[str, ...] = ()


def write(path: Path, content: bytes) -> None:
    """Write a file in one step, so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # machines that share the folder share no process number
    part.write_bytes(content)
    part.replace(path)


def as_json(value: Any) -> str:
    """A text for a value, the same on every machine."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def data_digests(task: Task) -> dict[str, str]:
    """The SHA-256 of each public set of a task."""
    return {name: public_sets()[name].sha256 for name in task.sets}


class Runs:
    """The finished runs of one experiment, each a file."""

    def __init__(self, folder: Path, code: Mapping[str, str], scale: str) -> None:
        self.folder, self.code, self.scale = folder, dict(code), scale

    def path(self, job: Job) -> Path:
        """Where a run is kept: its name says everything that it depends on."""
        depends = {"run": job.about(), "data": data_digests(job.task), "code": self.code, "scale": self.scale}
        return self.folder / f"{hashlib.sha256(as_json(depends).encode()).hexdigest()[:24]}.json"

    def get(self, job: Job) -> dict[str, Any] | None:
        """The finished run, or None."""
        path = self.path(job)
        if not path.exists():
            return None
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return loaded

    def put(self, job: Job, run: Mapping[str, Any]) -> None:
        """Keep a finished run."""
        write(self.path(job), (as_json(run) + "\n").encode())

    def kept(self, task: Task) -> Path:
        """The folder for tensors that runs of this code and data share."""
        depends = as_json({"data": data_digests(task), "code": self.code, "scale": self.scale})
        return self.folder / f"kept-{hashlib.sha256(depends.encode()).hexdigest()[:12]}"


class Alone:
    """The work of one process."""

    rank, size = 0, 1

    def agree(self, name: str, done: dict[int, Any]) -> dict[int, Any]:
        """The runs that are finished already, by the number of their job: the same for all processes."""
        return done

    def take(self, name: str, numbers: list[int]) -> Iterator[int]:
        """The jobs that this process is to do, one after the other."""
        yield from numbers

    def tell(self, name: str, number: int, run: Mapping[str, Any]) -> None:
        """Let the other processes know a finished run."""

    def hear(self, name: str, number: int) -> dict[str, Any]:
        """A run that another process makes; waits for it."""
        raise AssertionError("there is no other process")

    def leave(self) -> None:
        """Nothing more to do."""


class Together(Alone):
    """The work of several processes that torchrun started. Its store hands out the jobs and carries the results."""

    def __init__(self) -> None:
        self.store, self.rank, self.size = next(rendezvous("env://"))
        self.store.set_timeout(datetime.timedelta(days=7))  # waiting for a long run of another process is no fault

    def agree(self, name: str, done: dict[int, Any]) -> dict[int, Any]:
        # Machines may have kept different runs: those of the first process count.
        if self.rank == 0:
            self.store.set(f"{name}/done", as_json(list(done.items())))
        return dict(json.loads(self.store.get(f"{name}/done")))

    def take(self, name: str, numbers: list[int]) -> Iterator[int]:
        while (place := self.store.add(f"{name}/next", 1) - 1) < len(numbers):
            yield numbers[place]

    def tell(self, name: str, number: int, run: Mapping[str, Any]) -> None:
        self.store.set(f"{name}/{number}", as_json(run))

    def hear(self, name: str, number: int) -> dict[str, Any]:
        heard: dict[str, Any] = json.loads(self.store.get(f"{name}/{number}"))
        return heard

    def leave(self) -> None:
        # The store may live in the first process: that one goes last.
        self.store.add("left", 1)
        while self.rank == 0 and self.store.add("left", 0) < self.size:
            time.sleep(0.05)


def make_run(experiment: Experiment, job: Job) -> dict[str, Any]:
    """Make one run and describe it."""
    # before the work, so that nothing is lost if it fails
    environment = {"machine": machine(job.device), "versions": versions(experiment.packages)}
    started = time.perf_counter()
    with seeded(job.seed):
        metrics = {name: float(value) for name, value in experiment.run(job).items()}
    wanted = set(job.task.metrics or experiment.metrics) if job.final else {job.task.score}
    if missing := wanted - metrics.keys():
        raise KeyError(f"{describe(job)} does not return {', '.join(sorted(missing))}")
    return {
        **job.about(),
        "metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()},
        "seconds": round(time.perf_counter() - started, 2),
        **environment,
    }


def describe(job: Job) -> str:
    """One line for the one who waits."""
    settings = ", ".join(f"{key} {value}" for key, value in job.settings.items())
    return f"{job.task.name}, {job.method} ({settings}), {'seed' if job.final else 'tuning seed'} {job.seed}"


def finish(experiment: Experiment, name: str, jobs: list[Job], runs: Runs, crew: Alone) -> list[dict[str, Any]]:
    """The runs of all jobs. Those that are not kept yet are made by whichever process has time."""
    done = crew.agree(name, {i: run for i, job in enumerate(jobs) if (run := runs.get(job)) is not None})
    missing = [i for i in range(len(jobs)) if i not in done]
    with tqdm(total=len(jobs), initial=len(done), desc=f"{experiment.slug}, {name}", unit="run", disable=None) as bar:
        for i in crew.take(name, missing):
            run = runs.get(jobs[i]) or make_run(experiment, jobs[i])
            runs.put(jobs[i], run)
            crew.tell(name, i, run)
            done[i] = run
            found = ", ".join(f"{key} {value:.4g}" for key, value in run["metrics"].items() if value is not None)
            bar.write(f"{describe(jobs[i])}: {found} [{run['seconds']:.1f} s]", file=sys.stderr)
            bar.update()
        for i in missing:
            if i not in done:
                done[i] = crew.hear(name, i)
                runs.put(jobs[i], done[i])
                bar.update()
    return [done[i] for i in range(len(jobs))]


def best(task: Task, grid: Sequence[Settings], tuned: Sequence[Mapping[str, Any]]) -> Settings:
    """The settings of the grid with the best mean score; of several the first. A run without a score loses."""
    if len(grid) == 1:
        return grid[0]

    def score(settings: Settings) -> float:
        found = [run["metrics"][task.score] for run in tuned if run["settings"] == dict(settings)]
        return -math.inf if None in found else sum(found) / len(found)

    return max(grid, key=score)


def wider(task: Task, grid: Sequence[Settings], settings: Settings) -> list[Settings]:
    """The setting beyond the edge of the grid, if the best one is at the edge and the grid may still grow."""
    key = task.extend
    if not key or len(grid) == 1 or len(grid) >= len(next(iter(task.methods.values()))) + EXTENSIONS:
        return []
    values, value = [other[key] for other in grid], settings[key]
    at_edge = {min(values): value / EXTEND, max(values): value * EXTEND}
    return [{**settings, key: float(f"{at_edge[value]:.2g}")}] if value in at_edge else []


def tune(
    experiment: Experiment, tasks: list[Task], scale: str, runs: Runs, crew: Alone
) -> tuple[dict[tuple[str, str], list[Settings]], list[dict[str, Any]]]:
    """The grid of each task and method, with what extended it, and all tuning runs."""
    grids = {(task.name, method): list(grid) for task in tasks for method, grid in task.methods.items()}
    wanted = {key: grid for key, grid in grids.items() if len(grid) > 1}
    tuned: list[dict[str, Any]] = []
    by_name = {task.name: task for task in tasks}
    name = f"tuning {tasks[0].stage + 1}" if tasks[0].stage else "tuning"
    for again in range(1 + EXTENSIONS):
        jobs = [
            Job(by_name[task], method, settings, seed, False, scale, best_device(), runs.kept(by_name[task]))
            for (task, method), grid in wanted.items()
            for settings in grid
            for seed in by_name[task].tuning_seeds
        ]
        tuned += finish(experiment, f"{name}, wider {again}" if again else name, jobs, runs, crew) if jobs else []
        wanted = {}
        for (task, method), grid in grids.items():
            if more := wider(by_name[task], grid, best(by_name[task], grid, own(tuned, task, method))):
                wanted[task, method] = more
                grid += more
    return grids, tuned


def own(runs: Sequence[Mapping[str, Any]], task: str, method: str) -> list[Mapping[str, Any]]:
    """The runs of a task's method."""
    return [run for run in runs if (run["task"], run["method"]) == (task, method)]


def carry_out(experiment: Experiment, tasks: list[Task], scale: str, runs: Runs, crew: Alone) -> dict[str, Any]:
    """Tune and measure all tasks; the part of the record that holds the results."""
    device = best_device()
    made: list[dict[str, Any]] = []
    chosen: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    grids: dict[tuple[str, str], list[Settings]] = {}
    for stage in sorted({task.stage for task in tasks}):
        present = [task for task in tasks if task.stage == stage]
        found, tuned = tune(experiment, present, scale, runs, crew)
        grids |= found
        jobs = []
        for task in present:
            for method in task.methods:
                grid = grids[task.name, method]
                chosen[task.name][method] = dict(best(task, grid, own(tuned, task.name, method)))
                jobs += [
                    Job(task, method, chosen[task.name][method], seed, True, scale, device, runs.kept(task))
                    for seed in task.seeds
                ]
        made += tuned + finish(experiment, f"measuring {stage + 1}" if stage else "measuring", jobs, runs, crew)
    return {
        "tasks": [
            {
                "name": task.name,
                "data": data_digests(task),
                "metrics": list(task.metrics or experiment.metrics),
                "score": task.score,
                "tuning_seeds": list(task.tuning_seeds),
                "seeds": list(task.seeds),
                "facts": dict(task.facts),
                "methods": {
                    method: {
                        "grid": [dict(settings) for settings in grids[task.name, method]],
                        "chosen": chosen[task.name][method],
                    }
                    for method in task.methods
                },
            }
            for task in tasks
        ],
        "runs": made,
    }


def check(experiment: Experiment, tasks: Sequence[Task]) -> None:
    """Raise where an experiment is not fair or its names do not fit."""
    if len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"{experiment.slug}: two tasks have the same name")
    for task in tasks:
        lengths = {method: len(grid) for method, grid in task.methods.items()}
        if 0 in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(f"{task.name}: all grids must be equally long and hold a setting, got {lengths}")
        if both := set(task.seeds) & set(task.tuning_seeds):
            raise ValueError(f"{task.name}: the seed {min(both)} is used to tune and to measure")
        if unknown := set(task.sets) - public_sets().keys():
            raise ValueError(f"{task.name}: no public set {', '.join(sorted(unknown))}")
        if unknown := set(task.metrics) - experiment.metrics.keys():
            raise ValueError(f"{task.name}: the experiment has no metric {', '.join(sorted(unknown))}")
        for method, grid in task.methods.items():
            if len({as_json(dict(settings)) for settings in grid}) < len(grid):
                raise ValueError(f"{task.name}: the grid of {method} has the same settings twice")


def confirm(experiment: Experiment, tasks: Sequence[Task], scale: str, path: Path, runs: Runs) -> int:
    """Repeat a run of every method in every task; if all are the same, the record is one of the present code."""
    record = read_record(path)
    by_name = {task.name: task for task in tasks}
    for about in record["tasks"]:
        if about["name"] not in by_name or about["data"] != data_digests(by_name[about["name"]]):
            print(f"{path}: the task {about['name']} has other data now; run the experiment again", file=sys.stderr)
            return 1
    first = {(run["task"], run["method"]): run for run in reversed(record["runs"]) if run["final"]}
    apart = 0.0
    for (name, method), run in tqdm(sorted(first.items()), desc=f"{experiment.slug}, confirming", unit="run"):
        task = by_name[name]
        job = Job(task, method, run["settings"], run["seed"], True, scale, best_device(), runs.kept(task))
        found = make_run(experiment, job)["metrics"]
        for metric in (experiment.metrics.keys() & run["metrics"].keys()) - {"seconds"}:  # what readers are shown
            then = run["metrics"][metric]
            moved = difference(found.get(metric), then)
            if moved > SAME:
                text = f"{describe(job)}: {metric} was {then}, is {found.get(metric)}; run the experiment again"
                print(text, file=sys.stderr)
                return 1
            apart = max(apart, moved)
    record["code"] = deciding_code(experiment.slug)
    record["confirmed"] = {
        "runs": len(first),
        "apart": float(f"{apart:.1g}"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **commit("experiments", "lossbook"),
    }
    write(path, text_of(record).encode())
    print(f"{len(first)} runs were repeated, and no metric moved by more than {apart:.1g}: {path} is confirmed")
    return 0


def difference(now: float | None, then: float | None) -> float:
    """How far a metric moved; one above 1 as a share of itself."""
    if now is None or then is None:
        return 0.0 if now is then else math.inf
    return abs(now - then) / max(abs(then), 1.0)


def share_gpus(crew: Alone) -> None:
    """Give each process of a machine a GPU of its own, as far as there are enough, unless the user named one."""
    if crew.size > 1 and torch.cuda.is_available() and not os.environ.get(OVERRIDE, "").strip():
        local = int(os.environ.get("LOCAL_RANK", crew.rank))
        os.environ[OVERRIDE] = f"cuda:{local % torch.cuda.device_count()}"


def main(experiment: Experiment, argv: Sequence[str] | None = None) -> int:
    """Make what is missing and write the record."""
    parser = argparse.ArgumentParser(prog=f"python -m experiments.{experiment.slug}", description=experiment.what)
    parser.add_argument("--scale", choices=SCALES, default="cpu", help="smoke: seconds; cpu (default); gpu: in full")
    parser.add_argument("--task", action="append", help="only this task, as often as needed; writes no record")
    parser.add_argument("--out", type=Path, help="folder of the record (data/results; smoke: that of the runs)")
    parser.add_argument("--confirm", action="store_true", help="repeat a part of the record's runs with this code")
    parser.add_argument("--runs", type=Path, default=ROOT / "experiments" / "runs", help="folder of the finished runs")
    options = parser.parse_args(argv)

    crew = Together() if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Alone()
    share_gpus(crew)
    tasks = experiment.tasks(options.scale)
    if unknown := set(options.task or ()) - {task.name for task in tasks}:
        parser.error(f"no task {', '.join(sorted(unknown))}; there are {', '.join(task.name for task in tasks)}")
    tasks = [task for task in tasks if not options.task or task.name in options.task]
    check(experiment, tasks)

    code = deciding_code(experiment.slug)
    suffix = "" if options.scale == "cpu" else f"_{options.scale}"
    usual = options.runs if options.scale == "smoke" else ROOT / "data" / "results"  # no page shows a smoke record
    path = (options.out or usual) / f"{experiment.slug}{suffix}.json"
    if options.confirm:
        folder = Runs(options.runs / experiment.slug, code, options.scale)
        return confirm(experiment, tasks, options.scale, path, folder)
    results = carry_out(
        experiment, tasks, options.scale, Runs(options.runs / experiment.slug, code, options.scale), crew
    )
    if crew.rank == 0 and not options.task:
        environments: list[dict[str, Any]] = []  # most runs share one
        for run in results["runs"]:
            environment = {"machine": run.pop("machine"), "versions": run.pop("versions")}
            if environment not in environments:
                environments.append(environment)
            run["environment"] = environments.index(environment)
            if not run["final"]:  # what chose the settings
                judged = {task["name"]: task["score"] for task in results["tasks"]}[run["task"]]
                run["metrics"] = {judged: run["metrics"][judged]}
            run["metrics"] = {name: brief(value) for name, value in run["metrics"].items()}
        record = {
            "slug": experiment.slug,
            "what": experiment.what,
            "scale": options.scale,
            "metrics": dict(experiment.metrics),
            "baseline": experiment.baseline,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            **commit("experiments", "lossbook"),
            "code": code,
            "seconds": round(sum(run["seconds"] for run in results["runs"]), 1),
            "environments": environments,
            **results,
        }
        write(path, text_of(record).encode())
        print(f"The record is in {path}")
    crew.leave()
    return 0


def brief(value: float | None) -> float | None:
    """Six digits: no reader needs more, and the record stays small."""
    return None if value is None else float(f"{value:.6g}")


def packed(task: Mapping[str, Any], method: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the record says of a task's method, with its runs as columns; ``lossbook.records.unpacked`` is the inverse.

    ``runs`` are named by :func:`place_of`.
    """
    about = dict(task["methods"][method])
    tried = about["grid"] if len(about["grid"]) > 1 else []
    plans = {
        "tuning": [(settings, seed) for settings in tried for seed in task["tuning_seeds"]],
        "final": [(about["chosen"], seed) for seed in task["seeds"]],
    }
    for part, plan in plans.items():
        own = [runs[place_of(task["name"], method, settings, seed, part == "final")] for settings, seed in plan]
        if own:
            metrics = {name: [run["metrics"][name] for run in own] for name in own[0]["metrics"]}
            about[part] = {"seconds": [run["seconds"] for run in own], "metrics": metrics}
        if any(run["environment"] for run in own):
            about[part]["environment"] = [run["environment"] for run in own]
    return about


def place_of(task: str, method: str, settings: Settings, seed: int, final: bool) -> str:
    """What sets a run of a record apart from the others."""
    return as_json([task, method, dict(settings), seed, final])


def text_of(record: Mapping[str, Any]) -> str:
    """The record as JSON, one line for each method of a task."""
    keys = ("task", "method", "settings", "seed", "final")
    runs = {place_of(*(run[key] for key in keys)): run for run in record["runs"]}
    tasks = []
    for task in record["tasks"]:
        about = json.dumps({key: value for key, value in task.items() if key != "methods"}, ensure_ascii=False)
        methods = [f"   {as_json(method)}: {as_json(packed(task, method, runs))}" for method in task["methods"]]
        tasks.append(f'  {about[:-1]}, "methods": {{\n' + ",\n".join(methods) + "\n  }}")
    rest = {key: value for key, value in record.items() if key not in ("tasks", "runs")}
    head = json.dumps({**rest, "tasks": []}, indent=1, ensure_ascii=False)
    return head.removesuffix("[]\n}") + "[\n" + ",\n".join(tasks) + "\n ]\n}\n"
