"""Measures a loss beside the plain formula and beside its peers: time, peak memory, and how far from the limit.

A benchmark is a file ``benchmarks/<slug>.py`` with a table of cases and two lines at its end::

    def class_scores(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, classes, requires_grad=True), torch.randint(classes, (rows,))

    def plain_soft_accuracy(s: Tensor, t: Tensor) -> Tensor:
        return (1 - s.softmax(-1).gather(-1, t[:, None])).mean()

    CASES = [
        Case(
            loss="soft_accuracy_loss",      # its public name in lossbook.<slug>
            make=class_scores,              # make(*shape): the arguments of ours and of the plain formula
            shapes=(("small", (128, 100)), ("large", (256, 32000))),
            tiny=(6, 5),                    # the shape of --tiny
            plain=plain_soft_accuracy,      # the lines that a user would write
        ),
    ]

    if __name__ == "__main__":
        raise SystemExit(main("accuracy", CASES))

A loss may return rows: their mean is taken. The arguments that require a gradient are the leaves. A peer is a
:class:`Peer`; where its import fails it is left out, which is printed and recorded. ``options`` go to our loss alone.
The harness checks first that all return the same loss, within ``tolerance`` (relative, 1e-3), and that the plain
formula has our gradient. ``tolerance=None`` switches both off.

``GOALS`` holds the ratios to reach. A case that misses one needs a text in ``reasons``, under the name of the goal
(``"eager"``) or of a size and the goal (``"small eager"``). Without one the record is written, and the command
returns 1.

Run ``python -m benchmarks.<slug> [--tiny] [--quick] [--only NAME] [--out DIR] [--device cuda] [--seconds S]``. The
record goes to ``data/results/bench_<slug>.json``, on another device than the CPU to ``bench_<slug>_<device>.json``. The
goals are for CPUs: elsewhere, and at tiny size, the record holds the ratios and no verdict. ``--quick`` measures eager
on one thread beside the plain formula, 3 s a case, and prints one line for each shape; it writes nothing.

How it measures. Short runs of all contenders alternate in one process after warm-up, each round in another order, so
that a busy machine slows all of them. Times are medians over the rounds, a ratio is the quotient of two medians, and
the quartiles of the ratios within a round show the spread. One thread is timed by its own CPU time, which does not run
while another process has the core. The contender ``copy`` moves the least bytes that a loss must: it reads every
argument once and writes every gradient once. Peak memory comes from a separate, untimed run. It counts the bytes that
the allocator handed out and did not take back, from the first operation of the forward pass to the last of the backward
pass, gradients included, arguments not.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts the bytes would print its stages

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
FEW = 30_000  # fewer scores leave little but the calls of operators
MANY = 1_000_000  # from here on a compiled formula is bounded by what it reads and writes
# ours / theirs, at most
GOALS = {
    "eager": 0.8,  # ours / plain, both eager
    "eager, few scores": 1.0,
    "memory": 0.6,  # peak bytes, ours / plain
    "memory, few scores": 1.0,
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


def class_scores(rows: int, classes: int) -> tuple[Tensor, Tensor]:
    """Normal scores and one class a row."""
    return (torch.randn(rows, classes) * 2).requires_grad_(), torch.randint(classes, (rows,))


@dataclass(frozen=True)
class Peer:
    """Another implementation. ``build`` turns the case's arguments into a function and the arguments of its own."""

    name: str
    build: Callable[..., tuple[Loss, tuple[Any, ...]]]
    package: str | None = None
    goal: float | None = None  # ours / peer, eager, at most
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
    tolerance: float | None = 1e-3
    reasons: Mapping[str, str] = field(default_factory=dict)

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
        loss = loss.mean() if loss.dim() else loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class Copy(Contender):
    """Moves the bytes that no loss can do without: reads the arguments, writes the gradients."""

    def __init__(self, args: Sequence[Any]) -> None:
        super().__init__("copy", lambda: torch.zeros(()), ())
        tensors = [a for a in args if isinstance(a, Tensor)]
        moved = sum(t.nbytes * (2 if t.requires_grad else 1) for t in tensors)
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=tensors[0].device)
        object.__setattr__(self, "moved", moved)
        object.__setattr__(self, "blocks", (source, torch.zeros_like(source)))

    moved: int
    blocks: tuple[Tensor, Tensor]

    def run(self) -> Tensor:
        return self.blocks[1].copy_(self.blocks[0])


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


def seconds_of(contender: Contender, device: torch.device, clock: Callable[[], float]) -> float:
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


@contextmanager
def threads(number: int) -> Iterator[None]:
    """So many CPU threads for torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounds(
    contenders: Mapping[str, Contender], device: torch.device, number: int, seconds: float, least: int = 5
) -> dict[str, list[float]]:
    """Alternating runs on ``number`` threads: the seconds of each contender in each round."""
    # a thread's own clock stands still while another process has the core
    clock = time.thread_time if number == 1 and device.type == "cpu" else time.perf_counter
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        with threads(number):
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


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """The quotient of two medians, and the quartiles of the quotients within a round."""
    low, _, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4, method="inclusive")
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {"ratio": round(ratio, 4), "quartiles": [round(low, 4), round(high, 4)]}


def contenders_of(
    case: Case, function: Loss, shape: tuple[int, ...], device: torch.device
) -> tuple[dict[str, Contender], list[str]]:
    """Ours, the plain formula, the peers and the copy, on the same data; and why a peer is missing."""
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
    return found | {"copy": Copy(args)}, missing


def check_agreement(case: Case, contenders: Mapping[str, Contender]) -> None:
    """All give one finite loss, and ours and the plain formula one gradient."""
    results = {}
    for name, contender in contenders.items():
        if name == "copy":
            continue
        value = float(contender.run())
        results[name] = value, [leaf.grad for leaf in contender.leaves]
        contender.clear()
        if not math.isfinite(value):
            raise ValueError(f"{case.name}: the losses must be finite, {contender.name} gives {value!r}")
    if case.tolerance is None:
        return
    value, slopes = results["ours"]
    tolerances = {peer.name: peer.tolerance or case.tolerance if peer.same else math.inf for peer in case.peers}
    for name in results:
        if not math.isclose(value, results[name][0], rel_tol=tolerances.get(name, case.tolerance), abs_tol=1e-12):
            raise ValueError(f"{case.name}: ours gives {value!r}, {contenders[name].name} gives {results[name][0]!r}")
    for ours, plain in zip(slopes, results["plain"][1], strict=True):
        assert ours is not None
        assert plain is not None
        apart = float((ours - plain).double().norm() / plain.double().norm())
        if not apart <= 10 * case.tolerance:
            raise ValueError(f"{case.name}: the gradients of ours and of the plain formula are {apart:.2g} apart")


def quick(case: Case, function: Loss, device: torch.device) -> None:
    """Print one line for each shape: eager, one thread, beside the plain formula."""
    for size, shape in case.shapes:
        contenders, _ = contenders_of(case, function, shape, device)
        goals = {peer.name: peer.goal for peer in case.peers if peer.goal is not None and not peer.same}
        contenders = {k: v for k, v in contenders.items() if k in {"ours", "plain", "copy", *goals}}
        with threads(1):
            try:
                check_agreement(case, contenders)
            except ValueError as error:
                print(f"{size} {shape}: {error}", file=sys.stderr, flush=True)
            peak = peak_of(contenders["ours"], device), peak_of(contenders["plain"], device)
        times = rounds(contenders, device, 1, 3.0 / len(case.shapes), least=3)
        few = ", few scores" if case.scores(*shape) < FEW else ""
        goals["plain"] = GOALS["eager" + few]
        words = [f"{case.name:48} {size:6} {shape!s:18}"]
        for name, goal in sorted(goals.items(), key=lambda pair: pair[0] != "plain"):
            part = compared(times["ours"], times[name])
            verdict = "ok    " if part["ratio"] <= goal else "MISSED"
            words.append(f"time / {name} {part['ratio']:6.3f} [{part['quartiles'][0]:.2f}, {part['quartiles'][1]:.2f}]")
            words.append(f"(goal {goal:g}) {verdict}")
        memory = peak[0] / peak[1]
        words.append(f"memory {memory:5.3f} {'ok    ' if memory <= GOALS['memory' + few] else 'MISSED'}")
        medians = {name: statistics.median(t) * 1e3 for name, t in times.items()}
        words.append(f"{medians['ours']:.4g} ms, plain {medians['plain']:.4g} ms, copy {medians['copy']:.4g} ms,")
        words.append(f"{len(times['ours'])} rounds")
        print(" ".join(words), flush=True)


def main(slug: str, cases: Sequence[Case], argv: Sequence[str] | None = None) -> int:
    """Measure every case, write the record, print one line a case. 1 if a goal was missed without a reason."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{slug}")
    parser.add_argument("--quick", action="store_true", help="eager, one thread, plain formula; nothing is written")
    parser.add_argument("--only", default="", metavar="NAME", help="the cases whose name contains this")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    options = parser.parse_args(argv)

    module = importlib.import_module(f"lossbook.{slug}")
    for case in cases:
        function = getattr(module, case.loss, None)
        if function is None:
            print(f"SKIPPED {case.name}: lossbook.{slug} has no {case.loss}", file=sys.stderr, flush=True)
        elif options.only in case.name:
            quick(case, function, options.device)
    return 0
