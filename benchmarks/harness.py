"""Measures a loss beside a peer: forward plus backward, time and peak memory, written down as ratios.

A benchmark is a file ``benchmarks/<slug>.py`` with a list ``CASES`` and two lines at its end::

    from benchmarks.harness import Case, Contender, main

    def sigmoid_focal(device: torch.device, shape: tuple[int, ...]) -> tuple[Contender, Contender]:
        scores = torch.randn(shape, device=device, requires_grad=True)
        target = (torch.rand(shape, device=device) < 0.01).float()
        ours = Contender("lossbook.focal.sigmoid_focal_loss", lambda: sigmoid_focal_loss(scores, target), [scores])
        peer = Contender("torchvision's formula, written anew", lambda: published(scores, target), [scores])
        return ours, peer

    CASES = [
        Case(
            name="sigmoid focal",
            setup=sigmoid_focal,
            size={"shape": (4, 100_000, 80)},   # passed to setup by keyword
            tiny={"shape": (2, 10, 8)},         # the same for --tiny
            time_goal=0.5,                      # ours / peer, at most; leave out where there is no goal
            memory_goal=0.5,
        ),
    ]

    if __name__ == "__main__":
        raise SystemExit(main("focal", CASES))

``setup`` makes the data and returns ``(ours, peer)``. The harness seeds torch before it calls ``setup`` and frees
everything before the next case. A contender has a name, a function without arguments that returns a scalar loss, and
the leaves whose gradients count. Both contenders may share leaves.

``setup`` imports a peer's package itself. Where that import fails, the case is skipped: the skip is printed and
recorded. Name the package in ``packages=("timm",)`` and its version enters the record. A peer that is not a package
is the published formula written anew, and its name says so.

The harness checks first that both contenders return the same loss, within ``tolerance`` (relative, 1e-3).
``tolerance=None`` switches the check off where the two values differ by nature; say why beside it.

A case that misses its goal needs ``reason="..."``: what limits it. The record then carries the reason. Without one the
command still writes the record, and returns 1.

Run ``python -m benchmarks.<slug> [--tiny] [--out DIR] [--device cuda] [--threads N] [--seconds S]``. The record goes to
``data/results/bench_<slug>.json``, on another device than the CPU to ``bench_<slug>_<device>.json``. The goals are for
two CPU cores: elsewhere, and at tiny size, the record holds the ratios and no verdict.

How it measures. Runs of the two contenders alternate in one process after warm-up, and the one that begins alternates
too, so that a busy machine slows both. Times are medians over all rounds; the ratio is the quotient of the medians; the
quartiles of the ratios within a round show the spread. Peak memory comes from a separate, untimed run. It counts the
bytes that the allocator handed out and did not take back, from the first operation of the forward pass to the last of
the backward pass, gradients included, inputs and parameters not.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler that counts the bytes would print its stages

import torch
from torch import Tensor

from tools.provenance import commit, machine, versions

ROOT = Path(__file__).resolve().parents[1]
METHOD = (
    "forward plus backward, eager; medians of alternating runs in one process after warm-up; ratio = quotient of the "
    "medians, ours / peer, with the quartiles of the ratios within a round; peak = live bytes counted by allocations "
    "in one run, gradients included, inputs and parameters not"
)


@dataclass(frozen=True)
class Contender:
    """One of the two that are compared: ``loss()`` returns a scalar, ``leaves`` receive the gradients."""

    name: str
    loss: Callable[[], Tensor]
    leaves: Sequence[Tensor]

    def clear(self) -> None:
        """Drop the gradients of the last run."""
        for leaf in self.leaves:
            leaf.grad = None

    def run(self) -> Tensor:
        """Forward and backward; the gradients stay on the leaves."""
        loss = self.loss()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


@dataclass(frozen=True)
class Case:
    """One row of the table: what to build, at which size, and the ratios to reach. See the module's docstring."""

    name: str
    setup: Callable[..., tuple[Contender, Contender]]
    size: Mapping[str, Any]
    tiny: Mapping[str, Any]
    time_goal: float | None = None
    memory_goal: float | None = None
    tolerance: float | None = 1e-3
    reason: str | None = None
    packages: Sequence[str] = ()


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


def seconds_of(contender: Contender, device: torch.device) -> float:
    """How long one forward and backward takes; the gradients are dropped outside the clock."""
    contender.clear()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    contender.run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    contender.clear()
    return elapsed


def peak_of(contender: Contender, device: torch.device) -> int:
    """Peak memory of one forward and backward."""
    contender.clear()
    peak = peak_bytes(contender.run, device)
    contender.clear()
    return peak


def value_of(contender: Contender) -> float:
    """The loss itself: the first warm-up."""
    value = float(contender.run())
    contender.clear()
    return value


def judged(ratio: float, goal: float | None) -> dict[str, Any]:
    """A ratio beside its goal, where there is one."""
    return {"ratio": round(ratio, 4), "goal": goal, "reached": None if goal is None else ratio <= goal}


def measure(case: Case, device: torch.device, *, tiny: bool, seconds: float) -> dict[str, Any]:
    """The record of one case."""
    size = case.tiny if tiny else case.size
    torch.manual_seed(0)
    ours, peer = case.setup(device, **size)
    values = value_of(ours), value_of(peer)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{case.name}: the losses must be finite, got {values[0]!r} and {values[1]!r}")
    if case.tolerance is not None and not math.isclose(*values, rel_tol=case.tolerance, abs_tol=1e-12):
        raise ValueError(f"{case.name}: {ours.name} gives {values[0]!r}, {peer.name} gives {values[1]!r}")
    peaks = peak_of(ours, device), peak_of(peer, device)

    for contender in (ours, peer):
        seconds_of(contender, device)
    least, most = (3, 3) if tiny else (9, 201)
    times: tuple[list[float], list[float]] = ([], [])
    begin = time.perf_counter()
    while len(times[0]) < least or (len(times[0]) < most and time.perf_counter() - begin < seconds):
        order = (0, 1) if len(times[0]) % 2 == 0 else (1, 0)
        for which in order:
            times[which].append(seconds_of((ours, peer)[which], device))
    medians = statistics.median(times[0]), statistics.median(times[1])
    quartiles = statistics.quantiles([a / b for a, b in zip(*times, strict=True)], n=4, method="inclusive")

    goals = (None, None) if tiny or device.type != "cpu" else (case.time_goal, case.memory_goal)
    record: dict[str, Any] = {
        "name": case.name,
        "size": {key: list(value) if isinstance(value, tuple) else value for key, value in size.items()},
        "ours": {"name": ours.name, "seconds": medians[0], "peak_bytes": peaks[0], "loss": values[0]},
        "peer": {"name": peer.name, "seconds": medians[1], "peak_bytes": peaks[1], "loss": values[1]},
        "rounds": len(times[0]),
        "time": judged(medians[0] / medians[1], goals[0])
        | {"quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)]},
        "memory": judged(peaks[0] / peaks[1], goals[1]),
    }
    if False in (record["time"]["reached"], record["memory"]["reached"]):
        record["reason"] = case.reason
    return record


def say(record: Mapping[str, Any]) -> str:
    """One case as one line."""
    words = [f"{record['name']} {json.dumps(record['size'])}:"]
    for kind in ("time", "memory"):
        part = record[kind]
        verdict = {None: "", True: ", reached", False: ", MISSED"}[part["reached"]]
        goal = "" if part["goal"] is None else f" (goal {part['goal']:g}{verdict})"
        words.append(f"{kind} {part['ratio']:.3f}{goal},")
    ours, peer = record["ours"], record["peer"]
    words.append(f"{ours['seconds'] * 1e3:.4g} ms and {ours['peak_bytes'] / 2**20:.4g} MiB against")
    words.append(f"{peer['seconds'] * 1e3:.4g} ms and {peer['peak_bytes'] / 2**20:.4g} MiB")
    return " ".join(words)


def main(slug: str, cases: Sequence[Case], argv: Sequence[str] | None = None) -> int:
    """Measure every case, write the record, print one line a case. 1 if a goal was missed without a reason."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{slug}")
    parser.add_argument("--tiny", action="store_true", help="every case at a tiny size: a check, not a measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results", help="folder of the record")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds of one case (20)")
    options = parser.parse_args(argv)

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    done: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    packages: list[str] = []
    try:
        for case in cases:
            try:
                done.append(measure(case, options.device, tiny=options.tiny, seconds=options.seconds))
            except ImportError as error:
                skipped.append({"name": case.name, "reason": str(error)})
                print(f"SKIPPED {case.name}: {error}", file=sys.stderr, flush=True)
                continue
            packages += [p for p in case.packages if p not in packages]
            print(say(done[-1]), flush=True)
        where = machine(options.device)
    finally:
        torch.set_num_threads(threads)

    record = {
        "slug": slug,
        "tiny": options.tiny,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        **commit("lossbook", "benchmarks"),
        "machine": where,
        "versions": versions(packages),
        "method": METHOD,
        "cases": done,
        "skipped": skipped,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    suffix = "" if options.device.type == "cpu" else f"_{options.device.type}"
    path = options.out / f"bench_{slug}{suffix}.json"
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unexplained = [case["name"] for case in done if case.get("reason", "") is None]
    for name in unexplained:
        print(f"{name}: missed its goal, and the case gives no reason", file=sys.stderr)
    return 1 if unexplained else 0
