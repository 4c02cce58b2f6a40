"""The plan of `make gpu`, on a machine without a GPU: order, slices, what is kept, and what a reader is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lossbook.data._fetch import find
from lossbook.data._registry import public_sets
from tools import gpu
from tools.chapters import ROOT, all_notebooks
from tools.mutants import SLUGS
from tools.provenance import read_record

ABOUT = {"gpu": "NVIDIA Something", "torch": "2.11.0", "found": ""}


def steps(*names, resumes=(), **options):
    return [gpu.Step(name, (), f"name = {name!r}", resumes=name in resumes, **options) for name in names]


@pytest.fixture
def state(tmp_path):
    return gpu.State(tmp_path / "results/gpu.json")


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when a step takes time."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def machine(clock, needs, log, failing=()):
    """Steps that need so many seconds; one that resumes keeps what it had."""
    had = dict.fromkeys(needs, 0.0)

    def run(step, left):
        given = min(left, needs[step.name] - (had[step.name] if step.resumes else 0))
        clock.now += given
        had[step.name] += given
        log.append(step.name)
        if step.name in failing:
            return 1
        return 0 if given >= needs[step.name] or (step.resumes and had[step.name] >= needs[step.name]) else None

    return run


def go(todo, state, seconds, run):
    return gpu.work([s for s in todo if not state.is_done(s)], state, seconds, run, lambda step: ABOUT)


def test_slices_come_to_an_end_and_lose_nothing(state, clock):
    """An experiment goes on over slices; what cannot be resumed gets a slice of its own where it needs one."""
    todo, log = steps("tests", "long", "bench", "page", resumes=("long",)), []
    run = machine(clock, {"tests": 10, "long": 150, "bench": 90, "page": 5}, log)
    slices = []
    while not all(map(state.is_done, todo)):
        assert go(todo, gpu.State(state.path), 100, run)
        state = gpu.State(state.path)
        slices.append(log[:])
        log.clear()
        assert len(slices) < 9, slices
    assert slices == [["tests", "long"], ["long", "bench"], ["bench", "page"]]


def test_what_never_fits_is_left_until_a_longer_slice(state, clock, capsys):
    todo, log = steps("huge", "small"), []
    run = machine(clock, {"huge": 500, "small": 5}, log)
    for _ in range(3):
        go(todo, state, 100, run)
    assert log == ["huge", "small"], "the second slice does not begin with it again"
    gpu.report(todo, state, 100, lambda step: "")
    told = capsys.readouterr().out
    assert "needs more than 1.7 minutes: give it a longer slice" in told
    assert "1 of 2 steps are done. The same command goes on." in told
    go(todo, state, 600, run)
    assert all(map(state.is_done, todo))


def test_a_step_that_failed_waits_until_the_others_are_through(state, clock, capsys):
    todo, log = steps("bad", "good", "later"), []
    run = machine(clock, {"bad": 60, "good": 30, "later": 30}, log, failing=("bad",))
    assert not go(todo, state, 100, run)
    assert go(todo, state, 20, run)
    assert not go(todo, state, 100, run)
    assert log == ["bad", "good", "later", "later", "later", "bad"]
    gpu.report(todo, state, 100, lambda step: "")
    assert "failed    bad" in capsys.readouterr().out


def test_a_step_is_done_until_its_code_or_what_it_made_is_gone(state):
    (step,) = steps("one", makes=("made.json",))
    state.keep(step, "done", seconds=1.0, date="2026-11-30", **ABOUT)
    assert not state.is_done(step)
    (state.path.parent / "made.json").touch()
    again = gpu.State(state.path)
    assert again.is_done(step)
    assert not again.is_done(gpu.Step("one", (), "name = 'other'", makes=("made.json",)))
    assert again.is_done(gpu.Step("one", (), "name = 'one'  # a remark", makes=("made.json",)))
    state.keep(step, "failed", status=1)
    assert state.last(step)["how"] == "failed"
    assert not state.last(gpu.Step("one", (), "name = 'other'")), "new code gets a new try"


def test_a_slice_that_is_over_stops_the_step_and_its_children(tmp_path):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
        f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    assert gpu.call(("-c", code), 2, dict(os.environ)) is None
    deadline = time.monotonic() + 10
    while running(int(child.read_text())):
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.05)
    assert gpu.call(("-c", "raise SystemExit(3)"), 60, dict(os.environ)) == 3


def running(pid):
    """Whether a process computes or waits; a dead one that nobody asked for does neither."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_plan_shows_most_first_and_leaves_nothing_out(tmp_path):
    plan = gpu.plan(tmp_path, tmp_path, 4)
    names = [step.name for step in plan]
    assert names[:2] == ["tests", gpu.GOAL]
    modules = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "harness", "advice"}
    assert {n.removeprefix("experiment ") for n in names if n.startswith("experiment ")} == modules
    assert {n.removeprefix("benchmark ") for n in names if n.startswith("benchmark ")} >= set(SLUGS)
    assert {n.removeprefix("page ") for n in names if n.startswith("page ")} == {c.slug for c in all_notebooks()}
    kinds = [name.split()[0] for name in names]
    assert kinds.index("benchmark") < kinds.index("page") < kinds.index("experiment")
    assert len({step.digest for step in plan if step.name.startswith("page")}) > 15
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if "needs a CUDA device" in path.read_text()}
    asked = {test.removeprefix("tests/") for test in (gpu.TESTS, *gpu.OTHER_TESTS)}
    assert marked - {"test_gpu.py"} <= asked, "tests that need a GPU and that nobody runs"


def test_the_code_of_a_page_is_that_of_its_source():
    page = next(page for page in all_notebooks() if page.slug == "focal")
    found = gpu.cells(page.notebook_path)
    assert "import lossbook.focal" in found
    assert "lossbook-constraints" not in found, "the setup cell holds the version"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_plain_sentence():
    done = run("-m", "tools.gpu")
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("make gpu: torch ")
    assert "sees no GPU on this machine" in line
    assert line.endswith("." if torch.version.cuda else "if there is one: make gpu PYTHON=/path/to/python.")


def test_without_torch_one_plain_sentence():
    code = (
        "import importlib.util, sys; from tools import gpu;"
        "importlib.util.find_spec = lambda name: None; sys.exit(gpu.main(['--list']))"
    )
    done = run("-c", code)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "has no torch; name a Python that has: make gpu PYTHON=/path/to/python" in line


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)


HERE = all(find(file) for name in ("mulan-yeast", "goemotions") for file in public_sets()[name].files)
needs_data = pytest.mark.skipif(not HERE, reason="the public data are not here; LOSSBOOK_DATA names their folder")


@needs_data
def test_a_rehearsal_goes_through_the_steps_on_the_cpu(tmp_path):
    """Real commands at their smallest size: a benchmark, an experiment that several processes share, what is told."""
    command = ("-m", "tools.gpu", "--rehearse", str(tmp_path), "--processes", "2", "--only")
    done = run(*command, "benchmark accuracy")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bench_accuracy.json").exists()
    assert "1 of 1 steps are done.\n" in done.stdout
    done = run(*command, "experiment soft_labels")
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "soft_labels_smoke.json")
    assert f"{len(record['runs'])} of {len(record['runs'])} runs" in done.stdout
    kept = json.loads((tmp_path / "gpu.json").read_text())["done"]
    assert set(kept) == {"benchmark accuracy", "experiment soft_labels"}
    assert kept["experiment soft_labels"]["torch"] == torch.__version__
    again = run(*command, "soft_labels")
    assert "---" in again.stdout, "the benchmark of that name is new"
    assert "--- experiment" not in again.stdout


@needs_data
def test_an_experiment_that_was_stopped_is_counted(tmp_path, monkeypatch):
    experiment = gpu.Step("experiment x", (), "", resumes=True, runs=("soft_labels", ""))
    assert gpu.progress(experiment, "smoke", tmp_path) == ""
    (tmp_path / "soft_labels").mkdir()
    assert gpu.progress(experiment, "smoke", tmp_path).startswith("0 of at least ")


def test_the_goal_tells_what_was_reached(tmp_path, monkeypatch):
    finals = [{"final": True, "metrics": {"accuracy": value}} for value in (0.95, 0.952)]
    monkeypatch.setattr(gpu, "runs_of", lambda *_: (finals, 5))
    (tmp_path / "accuracy").mkdir()
    step = next(step for step in gpu.plan(tmp_path, tmp_path, 1) if step.name == gpu.GOAL)
    assert gpu.progress(step, "gpu", tmp_path) == "2 of at least 5 runs, mean accuracy 95.10%"


def test_the_table_of_the_page_status(tmp_path):
    assert gpu.table(tmp_path) == "Nothing here has been run on a GPU yet; `make gpu` does it."
    state = gpu.State(tmp_path / gpu.RECORD)
    (step,) = steps("tests")
    state.keep(step, "done", seconds=12.4, date="2026-11-30", **ABOUT)
    assert gpu.table(tmp_path).splitlines()[2] == "| tests | 2026-11-30 | NVIDIA Something | 12 |  |"


@needs_data
def test_ctrl_c_keeps_what_is_done(tmp_path):
    command = [sys.executable, "-m", "tools.gpu", "--rehearse", str(tmp_path), "--only", "experiment soft_labels"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs hear no Ctrl-C
    )
    for line in process.stdout:
        if line.startswith("---"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert "missing   experiment soft_labels" in out
