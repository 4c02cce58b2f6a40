"""What only a GPU can show, a slice of time after the other: ``python -m tools.gpu``, which is ``make gpu``.

The steps, those that show most first: the losses' tests on CUDA, Fashion-MNIST to 95 %, the benchmarks, every page
with cells, the experiments in full. What is done stands in ``data/results/gpu.json``, and on the page "Status" of the
book; the benchmarks, the pages' times and the experiments write their own records beside it. A step is done until its
code changes. The same command goes on where the last one stopped: an experiment after its last finished run, all else
from its beginning. A step that failed waits until the others are through.

Nothing is installed and nothing is fetched: the Python that runs this must have torch with CUDA and what the tests,
pages and experiments import, and the public data must be there (``LOSSBOOK_DATA``). ``--list`` only tells what is
missing. ``--rehearse`` goes through the steps on the CPU at their smallest size, into a folder of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from tools.chapters import EVIDENCE, EXERCISES, ROOT, SETUP_TAG, digest, module_files, plain_python, read
from tools.mutants import SLUGS
from tools.provenance import bare, commit, machine, versions

RECORD = Path("data/results/gpu.json")
RUNS = Path("experiments/runs")
TESTS = "tests/test_cuda.py"
OTHER_TESTS = ("tests/test_emo.py", "tests/test_threads.py", "tests/test_benchmarks.py")  # some of them need CUDA, too
GOAL = "Fashion-MNIST to 95 %"
# The most that the CPU's scale leaves out comes first: text and vocabulary, training rows, the size of the networks.
FIRST = ("emo", "soft_labels", "focal", "multilabel_softmax", "am_softmax", "spans", "accuracy")
PACKAGES = ("lossbook", "benchmarks", "experiments")
NAMED = "make gpu PYTHON=/path/to/python"
GRACE = 40  # seconds: torchrun gives its processes 30 to end


@dataclass(frozen=True)
class Step:
    """A command of Python, and the code that decides what comes out.

    Attributes:
        name: What readers call it.
        command: The arguments of Python.
        code: Python whose imports are what the step depends on.
        makes: The files that it leaves, relative to the folder of the results.
        resumes: Whether it goes on where it was stopped.
        runs: The experiment, and its task or "", whose runs it makes.
    """

    name: str
    command: tuple[str, ...]
    code: str
    makes: tuple[str, ...] = ()
    resumes: bool = False
    runs: tuple[str, str] | None = None

    @cached_property
    def digest(self) -> str:
        """Of everything that decides what the step shows."""
        files = module_files(self.code, ROOT, PACKAGES)
        return digest("\n\x00".join([bare(self.code), *(bare(read(ROOT / name)) for name in files)]))


def cells(notebook: Path) -> str:
    """The code of a page, from its notebook, which can be read where jupytext is missing."""
    document = json.loads(read(notebook))
    own = [c for c in document["cells"] if c["cell_type"] == "code" and SETUP_TAG not in c["metadata"].get("tags", [])]
    return plain_python("\n".join("".join(cell["source"]) for cell in own))


def modules(folder: str, pattern: str) -> list[str]:
    """The modules of a folder whose text holds a pattern, by name."""
    found = [path for path in sorted((ROOT / folder).glob("*.py")) if re.search(pattern, read(path), re.MULTILINE)]
    return [path.stem for path in found]


def plan(results: Path, runs: Path, processes: int, *, rehearse: bool = False) -> list[Step]:
    """All steps, those that show most first. A rehearsal leaves out the pages, which have no smaller size."""
    scale, device = ("smoke", "cpu") if rehearse else ("gpu", "cuda")
    folders = ("--scale", scale, "--runs", str(runs), "--out", str(results))
    several = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    small = ("--tiny", "--seconds", "0") if rehearse else ()

    def bench(slug: str) -> Step:
        command = ("-m", f"benchmarks.{slug}", "--device", device, "--out", str(results), *small)
        made = f"bench_{slug}.json" if rehearse else f"bench_{slug}_{device}.json"
        return Step(f"benchmark {slug}", command, f"import benchmarks.{slug}, lossbook.{slug}", (made,))

    def page(slug: str) -> Step:
        command = ("-m", "tools.execute", slug, "--time")
        return Step(f"page {slug}", command, cells(ROOT / "chapters" / f"{slug}.ipynb"))

    def experiment(slug: str) -> Step:
        command = (*(several if processes > 1 else ()), "-m", f"experiments.{slug}", *folders)
        made = (f"{slug}_{scale}.json",)
        return Step(f"experiment {slug}", command, f"import experiments.{slug}", made, resumes=True, runs=(slug, ""))

    benches = modules("benchmarks", r'^    raise SystemExit\(main\("')  # those that the harness runs
    experiments = sorted(modules("experiments", r"^EXPERIMENT ="), key=lambda s: (*FIRST, s).index(s))
    slugs = [path.stem for path in (ROOT / "chapters").glob("*.ipynb")]
    goal = ("-m", "experiments.accuracy", *folders, "--task", GOAL)
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    losses = "\n".join(f"import lossbook.{slug}" for slug in SLUGS)
    return [
        Step("tests", (*pytest, "--noconftest", TESTS), f"{read(ROOT / TESTS)}\n{losses}"),  # needs no hypothesis
        Step(GOAL, goal, "import experiments.accuracy", resumes=True, runs=("accuracy", GOAL)),
        Step("other tests", (*pytest, "-k", "cuda", *OTHER_TESTS), losses),
        *map(bench, benches),
        *map(page, [] if rehearse else sorted(slugs, key=lambda s: (s.endswith(EXERCISES), s.endswith(EVIDENCE), s))),
        *map(experiment, experiments),
    ]


# ------------------------------------------------------------------------------------------------------- what is done


def runs_of(slug: str, task_name: str, scale: str, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The finished runs of an experiment or of one of its tasks, and how many there will be; a grid may still grow."""
    from experiments import harness
    from tools.provenance import deciding_code

    experiment: harness.Experiment = importlib.import_module(f"experiments.{slug}").EXPERIMENT
    kept = harness.Runs(folder / slug, deciding_code(slug), scale)
    found: list[dict[str, Any] | None] = []
    for task in experiment.tasks(scale):
        for method, grid in task.methods.items() if task_name in ("", task.name) else ():
            tuned = [
                kept.get(harness.Job(task, method, settings, seed, False, scale))
                for settings in (grid if len(grid) > 1 else ())
                for seed in task.tuning_seeds
            ]
            done = [run for run in tuned if run]
            chosen = harness.best(task, grid, done) if len(done) == len(tuned) else None
            found += tuned
            for seed in task.seeds:
                job = harness.Job(task, method, chosen or {}, seed, True, scale)
                found.append(None if chosen is None else kept.get(job))
    return [run for run in found if run], len(found)


def progress(step: Step, scale: str, folder: Path) -> str:
    """How far an experiment has come; for the goal also what was reached."""
    if step.runs is None or not (folder / step.runs[0]).exists():
        return ""
    try:
        runs, total = runs_of(*step.runs, scale, folder)
    except Exception as error:  # data or a package are missing: the step itself tells
        return f"{type(error).__name__}: {error}"
    reached = [run["metrics"].get("accuracy") for run in runs if step.runs[1] and run["final"]]
    mean = f", mean accuracy {sum(map(float, reached)) / len(reached):.2%}" if reached and None not in reached else ""
    return f"{len(runs)} of {'' if len(runs) == total else 'at least '}{total} runs{mean}"


class State:
    """What was done and what was tried, in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(read(path)) if path.exists() else {}
        self.done: dict[str, dict[str, Any]] = kept.get("done", {})
        self.tried: dict[str, dict[str, Any]] = kept.get("tried", {})

    def is_done(self, step: Step) -> bool:
        """Whether the step was done with the present code and what it made is there."""
        there = all((self.path.parent / name).exists() for name in step.makes)
        return there and self.done.get(step.name, {}).get("code") == step.digest

    def last(self, step: Step) -> dict[str, Any]:
        """What became of the last try with the present code, if it did not end well."""
        found = self.tried.get(step.name, {})
        return found if found.get("code") == step.digest else {}

    def keep(self, step: Step, kind: str, **facts: Any) -> None:
        """Note how the step ended: ``done``, ``failed`` or ``cut``."""
        self.tried.pop(step.name, None)
        table = self.done if kind == "done" else self.tried
        table[step.name] = {"code": step.digest, **({} if kind == "done" else {"how": kind}), **facts}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"done": self.done, "tried": self.tried}, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


# ---------------------------------------------------------------------------------------------------------- the slice


def call(command: Sequence[str], seconds: float, environment: dict[str, str]) -> int | None:
    """Run Python with these arguments; its exit status, or None if it was stopped after ``seconds``."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:  # also after Ctrl-C, which a session of its own does not hear
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, sent)
                process.wait(GRACE)


def work(
    steps: Sequence[Step],
    state: State,
    seconds: float,
    run: Callable[[Step, float], int | None],
    about: Callable[[Step], dict[str, Any]],
) -> bool:
    """Make steps until the time is over; say whether none failed.

    One that cannot be resumed starts only where it has more time than it was given before. A slice that begins with it
    has the most that there is, so that it is given up at last, until a longer slice comes.
    """
    end, well = time.monotonic() + seconds, True
    for step in sorted(steps, key=lambda step: state.last(step).get("how") == "failed"):
        left = end - time.monotonic()
        if left < 1:
            break
        if not step.resumes and left <= 1.02 * state.last(step).get("seconds", 0.0):
            continue
        print(f"--- {step.name}", flush=True)
        begun = time.monotonic()
        status = run(step, left)
        took = round(time.monotonic() - begun, 1)
        if status == 0:
            state.keep(step, "done", seconds=took, date=date.today().isoformat(), **about(step))
        elif status is None:
            state.keep(step, "cut", seconds=round(left, 1))
        else:
            well = False
            state.keep(step, "failed", status=status)
            print(f"{step.name} failed with status {status}; its reason stands above", file=sys.stderr, flush=True)
    return well


def report(steps: Sequence[Step], state: State, seconds: float, told: Callable[[Step], str]) -> None:
    """Print what is done and what is missing."""
    for step in steps:
        last, more = state.last(step), told(step)
        if state.is_done(step):
            word, more = "done", more or f"{state.done[step.name]['seconds']:.0f} s"
        elif last.get("how") == "failed":
            word = "failed"
        else:
            word = "missing"
            if last and not step.resumes and last["seconds"] >= 0.9 * seconds:
                more = f"needs more than {last['seconds'] / 60:.1f} minutes: give it a longer slice"
        print(f"{word:8}  {step.name:30}  {more}".rstrip())
    missing = sum(not state.is_done(step) for step in steps)
    print(f"{len(steps) - missing} of {len(steps)} steps are done." + " The same command goes on." * bool(missing))


def table(root: Path = ROOT) -> str:
    """The record as Markdown, for the page "Status"."""
    path = root / RECORD
    done = json.loads(read(path))["done"] if path.exists() else {}
    if not done:
        return "Nothing here has been run on a GPU yet; `make gpu` does it."
    lines = ["| step | date | GPU | seconds | found |", "|---|---|---|---|---|"]
    for name, facts in done.items():
        row = (name, facts["date"], facts["gpu"], f"{facts['seconds']:.0f}", facts["found"])
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def without_torch() -> str | None:
    """What to do where this Python has no torch, in one sentence, or None."""
    if importlib.util.find_spec("torch"):
        return None
    return f"{sys.executable} has no torch; name a Python that has: {NAMED}."


def without_gpu() -> str | None:
    """Why nothing can be done here, in one sentence, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    other = "" if torch.version.cuda else f"; it is built without CUDA, so name another Python if there is one: {NAMED}"
    return f"torch {torch.__version__} sees no GPU on this machine{other}."


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit status is 1 if there is no GPU or a step failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=8, help="length of the slice (default: 8)")
    parser.add_argument("--processes", type=int, help="of an experiment, together (default: 4 for each GPU)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the steps whose name holds the text")
    parser.add_argument("--list", action="store_true", help="tell what is done and missing, and stop")
    parser.add_argument("--rehearse", type=Path, metavar="FOLDER", help="on the CPU, at the smallest size, into FOLDER")
    options = parser.parse_args(arguments)
    rehearse = options.rehearse is not None
    if reason := without_torch() or (None if rehearse or options.list else without_gpu()):
        print(f"make gpu: {reason}", file=sys.stderr)
        return 1
    import torch

    results, runs = ROOT / RECORD.parent, ROOT / RUNS
    if rehearse:
        results = runs = options.rehearse.resolve()
    cores, processes = os.cpu_count() or 1, options.processes or 4 * max(torch.cuda.device_count(), 1)
    steps = [s for s in plan(results, runs, processes, rehearse=rehearse) if options.only in s.name]
    state, scale = State(results / RECORD.name), "smoke" if rehearse else "gpu"
    environment = {"OMP_NUM_THREADS": str(max(cores // processes, 1)), **os.environ}
    if rehearse:
        environment["LOSSBOOK_DEVICE"] = "cpu"
    device = torch.device("cpu" if rehearse else "cuda")
    well = True

    def told(step: Step) -> str:
        return progress(step, scale, runs)

    def about(step: Step) -> dict[str, Any]:
        return {**where(device), "found": told(step)}

    if not options.list:
        missing = [step for step in steps if not state.is_done(step)]
        with suppress(KeyboardInterrupt):  # what is done is kept
            well = work(missing, state, 60 * options.minutes, lambda s, t: call(s.command, t, environment), about)
    report(steps, state, 60 * options.minutes, told)
    return 0 if well else 1


def where(device: Any) -> dict[str, Any]:
    """Where and with what a step was made."""
    return {**machine(device), "torch": versions()["torch"], **commit(*PACKAGES, "tests", "chapters")}


if __name__ == "__main__":
    raise SystemExit(main())
