"""Measures a loss beside the plain formula and beside its peers: time, peak memory, and how far from the limit.

A benchmark is a file ``benchmarks/<slug>.py`` with a table of cases and two lines at its end::

    def class_scores(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))

    def soft_accuracy(s: Tensor, t: Tensor) -> Tensor:
        return (1 - s.softmax(-1).gather(-1, t[:, None])).mean()

    CASES = [
        Case(
            loss="soft_accuracy_loss",      # its public name in lossbook.<slug>
            make=class_scores,              # make(*shape): the arguments of ours and of the plain formula
            shapes=(("small", (128, 100)), ("large", (256, 32000))),
            tiny=(6, 5),                    # the shape of --tiny
            plain=soft_accuracy,            # the lines that a user would write
        ),
    ]

    if __name__ == "__main__":
        raise SystemExit(main("accuracy", CASES))

A loss may return rows: their mean is taken. The arguments that require a gradient are the leaves. ``options`` go to our
loss alone. A peer is a :class:`Peer`; where its import fails it is left out, which is printed and recorded. The harness
checks first that all return one loss, within ``tolerance`` (relative), and that the plain formula has our gradient.

``GOALS`` holds the ratios to reach. A case that misses one needs a text in ``reasons``, under the name of the goal
(``"eager"``) or of a size and the goal (``"small eager"``). Without one the record is written, and the command
returns 1.

``python -m benchmarks.<slug> --help`` names the options. The record goes to ``data/results/bench_<slug>.json``, on
another device than the CPU to ``bench_<slug>_<device>.json``. The goals are for CPUs: elsewhere, and at tiny size, the
record holds the ratios and no verdict. ``--quick`` measures on one thread beside the plain formula, eager or with
``--compiled`` both, and prints one line for each shape. It writes nothing, nor does ``--only``.

How it measures. Short runs of all contenders alternate in one process after warm-up, each round in another order, so
that a busy machine slows all of them. Times are medians over the rounds, a ratio is the quotient of two times, and the
quartiles of the ratios within a round show the spread. Each shape is measured on one thread and on two, on a quiet
machine and beside two processes that compute without pause. There the times are means: the waits count. One thread on a
quiet machine is timed by its own CPU time, which stands still while another process has the core; all else by the clock
on the wall. ``ours compiled`` and ``plain compiled`` went through ``torch.compile``, for one shape and one number of
threads at a time; on two threads only the large shapes. The contender ``copy`` moves the least bytes that a loss must:
it reads every argument once and writes every gradient once. Peak memory comes from a separate, untimed run. It counts
the bytes that the allocator handed out and did not take back, from the first operation of the forward pass to the last
of the backward pass, gradients included, arguments not.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts the bytes would print its stages
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no process of the compiler runs beside the next round

import torch
from torch import Tensor

from tools.provenance import commit, machine, versions

ROOT = Path(__file__).resolve().parents[1]
METHOD = (
    "forward plus backward; medians of alternating runs in one process after warm-up; ratio = quotient of two times, "
    "with the quartiles of the ratios within a round; one thread on a quiet machine by its CPU time, else wall time; "
    "busy = means beside two processes that compute without pause; "
    "copy = reads the arguments and writes the gradients once; "
    "peak = live bytes counted by allocations in one eager run, gradients included, arguments not"
)
FEW = 30_000  # fewer scores leave little but the calls of operators
MANY = 1_000_000  # from here on a compiled formula is bounded by what it reads and writes
COMPILE_SECONDS = 60.0  # a formula that takes longer to compile is left out
# at most: ours / plain in time and peak memory; busy: the first ratio beside busy processes over the quiet one
GOALS = {
    "eager": 0.8,
    "eager, few scores": 1.0,
    "compiled": 1.1,  # both compiled
    "plain compiled": 1.2,  # ours eager, from MANY scores on
    "busy": 1.2,
    "memory": 0.6,
    "memory, few scores": 1.0,
}
# why a goal may be missed by any loss; what is special to a case stands in its own ``reasons``
REASONS = {
    "small eager": "so few scores leave operator calls; checks and exactness need more of them than the plain lines",
    "small memory": "results of a row are as large as so few scores",
    "compiled": "a formula that is exact in every derivative has more operations, and one operator joins no neighbours",
    "plain compiled": "the compiler joins passes that eager operators make one by one",
    "busy": "what the system takes from a thread is the same for both and weighs more in the shorter time",
}
# a small classifier; then 128 and 1000 classes, the pixels of pictures with 21 classes, the words of a language model
CLASSES = (
    ("small", (128, 100)),
    ("middle", (2048, 128)),
    ("middle", (512, 1000)),
    ("middle", (32_768, 21)),
    ("large", (256, 32_000)),
)

Loss = Callable[..., Tensor]
Clock = Callable[[], float]


def class_scores(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Normal scores and one class a row."""
    return (torch.randn(rows, classes) * 2).requires_grad_(), torch.randint(classes, (rows,))


@dataclass(frozen=True)
class Peer:
    """Another implementation. ``build`` turns the case's arguments into a function and the arguments of its own."""

    name: str
    build: Callable[..., tuple[Loss, tuple[Any, ...]]]
    package: str | None = None  # its version enters the record
    goal: float | None = None  # ours / peer, eager, at most, from FEW scores on
    memory_goal: float | None = None
    same: bool = True  # False where the two losses differ by nature
    tolerance: float | None = None  # instead of the case's


def written(formula: Loss) -> Callable[..., tuple[Loss, tuple[Any, ...]]]:
    """``build`` of a peer that takes our arguments."""
    return lambda *args: (formula, args)


@dataclass(frozen=True)
class Case:
    """One loss at some shapes. See the module's docstring."""

    loss: str
    make: Callable[..., tuple[Any, ...]]
    shapes: Sequence[tuple[str, tuple[int, ...]]]
    tiny: tuple[int, ...]
    plain: Loss
    variant: str = ""  # tells two cases of one loss apart
    options: Mapping[str, Any] = field(default_factory=dict)
    peers: Sequence[Peer] = ()
    scores: Callable[..., int] = lambda *shape: math.prod(shape)  # how many the loss sees at a shape
    tolerance: float = 1e-3
    reasons: Mapping[str, str] = field(default_factory=dict)
    full: tuple[int, ...] | None = None  # the last shape of --full
    not_compiled: str = ""  # why not
    bytes_goal: float | None = None  # memory alone is measured: peak bytes per element of the second argument, at most

    @property
    def name(self) -> str:
        return f"{self.loss}, {self.variant}" if self.variant else self.loss


@dataclass(frozen=True)
class Contender:
    """One of those that are compared: ``loss(*args)``, whose mean is differentiated by the args that ask for it."""

    name: str
    loss: Loss
    args: tuple[Any, ...]

    @property
    def leaves(self) -> list[Tensor]:
        return [a for a in self.args if isinstance(a, Tensor) and a.requires_grad]

    def clear(self) -> None:
        """Drop the gradients of the last run."""
        for leaf in self.leaves:
            leaf.grad = None

    def run(self) -> Tensor:
        """Forward and backward; the gradients stay on the leaves."""
        loss = self.loss(*self.args)
        if self.leaves:
            loss = loss.mean() if loss.dim() else loss
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def moved_bytes(args: Sequence[Any]) -> int:
    """What no loss can do without: every argument read, every gradient written."""
    return sum(a.nbytes * (2 if a.requires_grad else 1) for a in args if isinstance(a, Tensor))


def copy(number: int, device: torch.device) -> Contender:
    """Moves ``number`` bytes: half of them are read, half are written."""
    source = torch.zeros(number // 2, dtype=torch.uint8, device=device)
    return Contender("copy", torch.zeros_like(source).copy_, (source,))


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that ``run()`` holds at once beyond those held before it.

    On the CPU every allocation is counted, also those inside an operator; on CUDA the caching allocator's own count is
    read. What ``run`` returns is held to the end.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # torch.autograd's profiler, not torch.profiler's: that one imports the whole compiler first
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        held = run()
    del held
    assert profile.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):  # a stable sort: equal times keep their order
        live += change
        peak = max(peak, live)
    return peak


def peak_of(contender: Contender, device: torch.device) -> int:
    """Peak memory of one forward and backward."""
    contender.clear()
    peak = peak_bytes(contender.run, device)
    contender.clear()
    return peak


def seconds_of(contender: Contender, device: torch.device, clock: Clock) -> float:
    """How long one forward and backward takes; the gradients are dropped outside the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    contender.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = clock() - start
    contender.clear()
    return elapsed


def rounds(
    contenders: Mapping[str, Contender], device: torch.device, clock: Clock, seconds: float, least: int
) -> dict[str, list[float]]:
    """Alternating runs: the seconds of each contender in each round."""
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for name in names:
            seconds_of(contenders[name], device, clock)
        begin, done = time.perf_counter(), 0
        while done < least or (done < 2000 and time.perf_counter() - begin < seconds):
            for name in names[done % len(names) :] + names[: done % len(names)]:
                times[name].append(seconds_of(contenders[name], device, clock))
            done += 1
    finally:
        gc.enable()
    return times


def compared(
    ours: Sequence[float], theirs: Sequence[float], middle: Callable[[Sequence[float]], float] = statistics.median
) -> dict[str, Any]:
    """The quotient of two medians, and the quartiles of the quotients within a round."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive")
    ratio = middle(ours) / middle(theirs)
    return {"ratio": round(ratio, 4), "quartiles": [round(low, 4), round(high, 4)]}


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many CPU threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def busy(number: int = 2) -> Iterator[None]:
    """So many processes that compute without pause; they end with this one."""
    code = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(10**6))"
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(number)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError after so many seconds."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not compiled in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def contenders_of(
    case: Case, function: Loss, shape: tuple[int, ...], device: torch.device
) -> tuple[dict[str, Contender], list[str]]:
    """Ours, the plain formula, the peers and the copy, on the same data; and which peers are missing."""
    torch.manual_seed(0)
    with device:
        args = case.make(*shape)
    ours = function if not case.options else lambda *a: function(*a, **case.options)
    found = {
        "ours": Contender(f"{function.__module__}.{function.__name__}", ours, args),
        "plain": Contender("the plain formula", case.plain, args),
    }
    missing = []
    for peer in case.peers:
        try:
            found[peer.name] = Contender(peer.name, *peer.build(*args))
        except ImportError as error:
            missing.append(f"{peer.name}: {error}")
    return found | {"copy": copy(moved_bytes(args), device)}, missing


def values_of(case: Case, contenders: Mapping[str, Contender]) -> dict[str, float]:
    """The losses. All must be finite and one number, and ours and the plain formula must have one gradient."""
    values, slopes = {}, {}
    for name, contender in contenders.items():
        if name == "copy":
            continue
        values[name] = float(contender.run())
        slopes[name] = [leaf.grad for leaf in contender.leaves]
        contender.clear()
        if not math.isfinite(values[name]):
            raise ValueError(f"{case.name}: the losses must be finite, {name} gives {values[name]!r}")
    tolerances = {peer.name: (peer.tolerance or case.tolerance) if peer.same else math.inf for peer in case.peers}
    for name, value in values.items():
        if not math.isclose(values["ours"], value, rel_tol=tolerances.get(name, case.tolerance), abs_tol=1e-12):
            raise ValueError(f"{case.name}: ours gives {values['ours']!r}, {name} gives {value!r}")
    for ours, plain in zip(slopes["ours"], slopes["plain"], strict=True):
        assert ours is not None
        assert plain is not None
        apart = float((ours - plain).double().norm() / plain.double().norm())
        if not apart <= 10 * case.tolerance:
            raise ValueError(f"{case.name}: the gradients of ours and of the plain formula are {apart:.2g} apart")
    return values


def compiled(contenders: Mapping[str, Contender]) -> dict[str, Contender]:
    """Ours and the plain formula through ``torch.compile``, compiled for the present shape and threads.

    Raises:
        RuntimeError: One of them does not compile in ``COMPILE_SECONDS``; the text says which.
    """
    torch.compiler.reset()
    found = {}
    for name in ("plain", "ours"):
        loss: Loss = torch.compile(contenders[name].loss, fullgraph=True, dynamic=False)
        found[f"{name} compiled"] = contender = Contender(f"{name} compiled", loss, contenders[name].args)
        try:
            with at_most(COMPILE_SECONDS):
                value = float(contender.run())
        except Exception as error:  # whatever the compiler's stages raise
            lines = str(error).strip().splitlines() or [""]
            raise RuntimeError(f"{name} does not compile: {type(error).__name__}: {lines[0][:200]}") from error
        contender.clear()
        expected = float(contenders[name].run())
        contenders[name].clear()
        if not math.isclose(value, expected, rel_tol=1e-3, abs_tol=1e-12):
            raise ValueError(f"{contenders[name].name}: compiled it gives {value!r}, eager {expected!r}")
    return found


def pairs_of(names: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Ours over each other contender, and both compiled."""
    pairs = [("ours", name) for name in names if name not in ("ours", "ours compiled")]
    return pairs + [("ours compiled", "plain compiled")] * ("ours compiled" in names)


def modes_of(
    contenders: Mapping[str, Contender], device: torch.device, *, tiny: bool, compile_on: int, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Time on one thread and two, quiet and busy; and what does not compile. Tiny: quiet alone.

    Up to ``compile_on`` threads also compiled.
    """
    modes, failed = [], []
    cpu = device.type == "cpu"
    for number in (1, 2) if cpu else (1,):
        with threads(number):
            runners = dict(contenders)
            if number <= compile_on:
                try:
                    runners |= compiled(contenders)
                except RuntimeError as error:
                    failed.append(str(error))
            for loaded in (False, True) if cpu and not tiny else (False,):
                # beside busy processes the peers rest
                chosen = {k: v for k, v in runners.items() if not loaded or k.split()[0] in ("ours", "plain")}
                clock, middle = time.perf_counter, statistics.fmean if loaded else statistics.median
                if number == 1 and cpu and not loaded:
                    clock = time.thread_time
                with busy() if loaded else nullcontext():
                    times = rounds(chosen, device, clock, seconds * (1 + loaded), 3 if tiny else 5)
                ratios = {f"{a} / {b}": compared(times[a], times[b], middle) for a, b in pairs_of(times)}
                modes.append(
                    {
                        "threads": number,
                        "busy": loaded,
                        "clock": "cpu" if clock is time.thread_time else "wall",
                        "rounds": len(times["ours"]),
                        "seconds": {name: middle(t) for name, t in times.items()},
                        "ratios": ratios,
                    }
                )
    if compile_on:
        torch.compiler.reset()  # holds the contenders, and so the data
    return modes, failed


def judged(
    goal: str, ratio: float | None, limit: float, size: str, reasons: Mapping[str, str], **where: Any
) -> dict[str, Any]:
    """A ratio beside its goal, and the reason where it is missed; no ratio misses every goal."""
    verdict: dict[str, Any] = {
        "goal": goal,
        **where,
        "ratio": None if ratio is None else round(ratio, 4),
        "limit": limit,
    }
    verdict["reached"] = ratio is not None and ratio <= limit
    if not verdict["reached"]:
        known = {**REASONS, **reasons}
        verdict["reason"] = known.get(f"{size} {goal}", known.get(goal))
    return verdict


def goals_of(case: Case, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every goal that the row of a record has, judged."""
    size, peaks, found = row["size"], row["peak_bytes"], []

    def judge(goal: str, ratio: float | None, limit: float, **where: Any) -> None:
        found.append(judged(goal, ratio, limit, size, case.reasons, **where))

    if case.bytes_goal is not None:
        judge("bytes", row["bytes_per_weight"], case.bytes_goal)
        return found
    few = ", few scores" if row["scores"] < FEW else ""
    judge("memory", peaks["ours"] / peaks["plain"], GOALS["memory" + few])
    quiet = {mode["threads"]: mode["ratios"] for mode in row["modes"] if not mode["busy"]}
    for number, ratios in quiet.items():
        judge("eager", ratios["ours / plain"]["ratio"], GOALS["eager" + few], threads=number)
        if "ours / plain compiled" in ratios:
            judge("compiled", ratios["ours compiled / plain compiled"]["ratio"], GOALS["compiled"], threads=number)
            if row["scores"] >= MANY:
                ratio = ratios["ours / plain compiled"]["ratio"]
                judge("plain compiled", ratio, GOALS["plain compiled"], threads=number)
    if any(text.startswith("ours ") for text in row["not_compiled"]):
        judge("compiled", None, GOALS["compiled"])
    for mode in row["modes"]:
        if mode["busy"]:
            worse = mode["ratios"]["ours / plain"]["ratio"] / quiet[mode["threads"]]["ours / plain"]["ratio"]
            judge("busy", worse, GOALS["busy"], threads=mode["threads"])
    for peer in case.peers if not few else ():
        if peer.goal is not None and peer.name in peaks:
            judge(peer.name, quiet[1][f"ours / {peer.name}"]["ratio"], peer.goal, threads=1)
        if peer.memory_goal is not None and peer.name in peaks:
            judge(f"memory of {peer.name}", peaks["ours"] / peaks[peer.name], peer.memory_goal)
    return found


def measure(
    case: Case,
    function: Loss,
    size: str,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    tiny: bool = False,
    seconds: float = 0.0,
) -> tuple[dict[str, Any], list[str]]:
    """The row of one case at one shape; and which peers are missing."""
    contenders, missing = contenders_of(case, function, shape, device)
    args = contenders["ours"].args
    row: dict[str, Any] = {
        "loss": case.loss,
        "variant": case.variant,
        "size": size,
        "shape": list(shape),
        "scores": case.scores(*shape),
        "bytes_moved": moved_bytes(args),
        "contenders": {name: c.name for name, c in contenders.items() if name != "copy"},
    }
    if case.bytes_goal is not None:
        contenders = {"ours": contenders["ours"]}
        row["values"] = {"ours": float(contenders["ours"].run())}
    else:
        row["values"] = values_of(case, contenders)
    row["peak_bytes"] = {name: peak_of(c, device) for name, c in contenders.items() if name != "copy"}
    row["modes"], row["not_compiled"] = [], []
    if case.bytes_goal is not None:
        row["bytes_per_weight"] = round(row["peak_bytes"]["ours"] / args[1].numel(), 3)
    else:
        on = 0 if tiny or case.not_compiled else 2 if size == "large" else 1
        row["modes"], row["not_compiled"] = modes_of(contenders, device, tiny=tiny, compile_on=on, seconds=seconds)
        row["not_compiled"] += [case.not_compiled] * bool(case.not_compiled)
    row["goals"] = [] if tiny or device.type != "cpu" else goals_of(case, row)
    return row, missing


def copy_speed(device: torch.device) -> dict[str, float]:
    """Bytes read and written a second by a large copy, on one thread and on two."""
    speeds = {}
    for number in (1, 2) if device.type == "cpu" else (1,):
        with threads(number):
            block = {"copy": copy(2**28, device)}
            speeds[str(number)] = 2**28 / statistics.median(rounds(block, device, time.perf_counter, 0.5, 5)["copy"])
    return speeds


def missed_goal(goal: Mapping[str, Any]) -> str:
    where = f", threads {goal['threads']}" if "threads" in goal else ""
    return f"{goal['goal']}{where}: {goal['ratio'] or math.inf:.3g} > {goal['limit']:g}"


def say(row: Mapping[str, Any]) -> str:
    """One row as one line."""
    words = [f"{row['loss']}{', ' * bool(row['variant'])}{row['variant']}", row["size"], str(tuple(row["shape"])) + ":"]
    for mode in row["modes"]:
        where = f"{mode['threads']} thread{'s' * (mode['threads'] > 1)}{', busy' * mode['busy']}"
        parts = [f"{name.removeprefix('ours / ')} {r['ratio']:.3g}" for name, r in mode["ratios"].items()]
        words.append(f"[{where}: {', '.join(parts)}]")
    if "bytes_per_weight" in row:
        words.append(f"{row['bytes_per_weight']:g} bytes per weight")
    elif "plain" in row["peak_bytes"]:
        words.append(f"memory {row['peak_bytes']['ours'] / row['peak_bytes']['plain']:.3g}")
    words += [f"({text})" for text in row["not_compiled"]]
    missed = "; ".join(missed_goal(goal) for goal in row["goals"] if not goal["reached"])
    words.append(f"MISSED {missed}" if missed else "reached" if row["goals"] else "")
    return " ".join(words).rstrip()


def quick(
    case: Case, function: Loss, size: str, shape: tuple[int, ...], device: torch.device, seconds: float, compile: bool
) -> str:
    """One row as one line: on one thread beside the plain formula, eager or also compiled."""
    contenders, _ = contenders_of(case, function, shape, device)
    if case.bytes_goal is not None:
        return say(measure(case, function, size, shape, device)[0])
    few = ", few scores" if case.scores(*shape) < FEW else ""
    goals = {"ours / plain": GOALS["eager" + few]}
    goals |= {f"ours / {p.name}": p.goal for p in case.peers if p.goal is not None and not p.same and not few}
    contenders = {k: v for k, v in contenders.items() if k in ("ours", "copy") or f"ours / {k}" in goals}
    words = [f"{case.name:36} {size:6} {shape!s:18}"]
    with threads(1):
        values_of(case, contenders)
        memory = peak_of(contenders["ours"], device) / peak_of(contenders["plain"], device)
        if compile and not case.not_compiled:
            try:
                contenders |= compiled(contenders)
            except RuntimeError as error:
                words.append(f"({error})")
            else:
                goals["ours compiled / plain compiled"] = GOALS["compiled"]
                if case.scores(*shape) >= MANY:
                    goals["ours / plain compiled"] = GOALS["plain compiled"]
        times = rounds(contenders, device, time.thread_time, seconds, 3)
    for name, goal in goals.items():
        ours, theirs = name.split(" / ")
        part = compared(times[ours], times[theirs])
        spread = f"[{part['quartiles'][0]:.2f}, {part['quartiles'][1]:.2f}]"
        words.append(f"{name} {part['ratio']:6.3f} {spread} {said(part['ratio'], goal)}")
    words.append(f"memory {memory:5.3f} {said(memory, GOALS['memory' + few])}")
    words.append(", ".join(f"{name} {statistics.median(t) * 1e3:.4g} ms" for name, t in times.items()))
    return " ".join(words) + f", {len(times['ours'])} rounds"


def said(ratio: float, goal: float) -> str:
    return f"(goal {goal:g}) {'ok    ' if ratio <= goal else 'MISSED'}"


def main(slug: str, cases: Sequence[Case], argv: Sequence[str] | None = None, module: Any = None) -> int:
    """Measure every case, write the record, print one line a row. 1 if a goal was missed without a reason."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{slug}")
    parser.add_argument("--tiny", action="store_true", help="every case at a tiny size: a check, not a measurement")
    parser.add_argument("--quick", action="store_true", help="eager, one thread, plain formula; nothing is written")
    parser.add_argument("--compiled", action="store_true", help="with --quick: also under torch.compile")
    parser.add_argument("--only", default="", metavar="NAME", help="the cases whose name has this; nothing is written")
    parser.add_argument("--full", action="store_true", help="also the shapes that need some 20 GB")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results", help="folder of the record")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--seconds", type=float, help="time for the rounds of one shape and mode (0.6; --quick: 1.5)")
    options = parser.parse_args(argv)
    seconds = (1.5 if options.quick else 0.6) if options.seconds is None else options.seconds

    module = module or importlib.import_module(f"lossbook.{slug}")
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    plan = [
        (case, size, shape)
        for case in cases
        if options.only in case.name
        for size, shape in (
            [("tiny", case.tiny)]
            if options.tiny
            else [*case.shapes, *([("full", case.full)] if options.full and case.full else [])]
        )
    ]
    for number, (case, size, shape) in enumerate(plan, 1):
        function, begin = getattr(module, case.loss, None), time.perf_counter()
        try:
            if function is None:
                raise ImportError(f"{module.__name__} has no {case.loss}")
            if options.quick:
                print(quick(case, function, size, shape, options.device, seconds, options.compiled), flush=True)
                continue
            row, missing = measure(case, function, size, shape, options.device, tiny=options.tiny, seconds=seconds)
        except ImportError as error:
            missing = [f"{case.name}: {error}"]
        except ValueError as error:
            if not options.quick:
                raise
            missing = [f"{size} {shape} {error}"]
        else:
            rows.append(row)
            print(f"{number}/{len(plan)} {say(row)} ({time.perf_counter() - begin:.0f} s)", flush=True)
        for text in missing:
            if text not in skipped:
                skipped.append(text)
                print(f"SKIPPED {text}", file=sys.stderr, flush=True)
    if options.quick or options.only:
        return 0

    measured = {name for row in rows for name in row["contenders"]}
    packages = {peer.package for case in cases for peer in case.peers if peer.package and peer.name in measured}
    where = machine(options.device)
    where.pop("threads", None)  # each mode says its own
    record = {
        "slug": slug,
        "tiny": options.tiny,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **commit("lossbook", "benchmarks"),
        "machine": where | {"cores": os.cpu_count(), "copied_bytes_per_second": copy_speed(options.device)},
        "versions": versions(sorted(packages)),
        "method": METHOD,
        "cases": rows,
        "skipped": skipped,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = "" if options.device.type == "cpu" else f"_{options.device.type}"
    path = options.out / f"bench_{slug}{suffix}.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    unexplained = [(row, goal) for row in rows for goal in row["goals"] if goal.get("reason", "") is None]
    for row, goal in unexplained:
        print(f"{row['loss']} {row['size']} {row['shape']}: no reason for {missed_goal(goal)}", file=sys.stderr)
    return 1 if unexplained else 0
