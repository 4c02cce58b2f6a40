"""What classes on several ranks cost, and what sampled ones lose: ``python -m benchmarks.distributed``.

Each point of the first part is a group of gloo ranks on this machine, one thread each, that share the class vectors.
Measured is a forward and backward pass of ``sharded_am_softmax_loss`` (at some points of ``sharded_linear_emo_loss``):
the wall time and the CPU time of a rank (medians over rounds behind a barrier), the peak of memory beyond the
arguments, gradients included, and the bytes of the tensors that a rank gave to collectives. Where there are more ranks
than cores the wall time grows by the waits, the CPU time does not.

The second part trains the model of ``examples/sharded_am_softmax.py`` on one rank with a share of the classes in each
step, and asks for the search accuracy on new sentences.

The record goes to ``data/results/bench_distributed.json``; ``--tiny`` checks that it runs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from benchmarks.harness import ROOT, peak_bytes
from lossbook.distributed import sharded_am_softmax_loss, sharded_linear_emo_loss
from tools.provenance import commit, machine, versions

METHOD = " ".join((__doc__ or "").split("\n\n")[1].split())
Point = tuple[int, int, int, int, float | None]  # rows, width, classes, ranks, share of the classes
POINTS: list[Point] = [
    (64, 64, classes, ranks, None) for classes in (10_000, 100_000, 1_000_000) for ranks in (1, 2, 4)
]
POINTS += [(256, 64, 100_000, 2, None), (64, 256, 100_000, 2, None), (64, 64, 1_000_000, 2, 0.1)]
# an output layer over a vocabulary
LINEAR_EMO: list[Point] = [(512, 128, 64_000, ranks, None) for ranks in (1, 2, 4)]
CHUNK, VECTOR = 128, 64  # rows of scores that are held, length of a word vector
SHARES, SEEDS = (1.0, 0.3, 0.1, 0.04), (0, 1, 2, 3, 4)
GROUPS, STEPS, BATCH = 1000, 800, 32
TINY: list[Point] = [(4, 3, 50, 1, None), (4, 3, 50, 2, 0.5)]


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the tensors that this rank gives to collectives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.rstrip("_")
            own = args[1] if name == "allgather" else args[0]
            self.bytes[name] = self.bytes.get(name, 0) + sum(x.nbytes for x in own if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def join(rank: int, ranks: int, folder: str) -> None:
    """Become one of the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)


def cost(rank: int, folder: str, points: list[Point], linear_emo: bool, seconds: float) -> None:
    """One of the ranks of some points; the first writes what it found."""
    join(rank, points[0][3], folder)
    bar = tqdm(points, disable=rank > 0, desc=f"{points[0][3]} ranks")
    found = [cost_of(rank, point, linear_emo, seconds) for point in bar]
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def cost_of(rank: int, point: Point, linear_emo: bool, seconds: float) -> dict[str, Any]:
    """What a point costs this rank."""
    rows, width, classes, ranks, share = point
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(rows, width, generator=g).requires_grad_(), torch.randint(classes, (rows,), generator=g)
    weight = torch.randn((rank + 1) * classes // ranks - rank * classes // ranks, width).requires_grad_()
    vectors = torch.randn(len(weight), VECTOR) if linear_emo else None

    def run() -> None:
        z.grad = weight.grad = None
        if vectors is None:
            loss = sharded_am_softmax_loss(z, weight, t, sample=share)
        else:
            loss = sharded_linear_emo_loss(z, weight, t, vectors, chunk_size=CHUNK)
        loss.backward()  # type: ignore[no-untyped-call]

    run()
    with Sent() as sent:
        run()
    z.grad = weight.grad = None
    peak = peak_bytes(run)
    begin = time.perf_counter()
    run()
    once = torch.tensor(time.perf_counter() - begin)
    dist.all_reduce(once, op=dist.ReduceOp.MAX)  # every rank makes the same number of rounds
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(max(3, min(50, int(seconds / float(once))))):
        dist.barrier()
        begin, used = time.perf_counter(), time.process_time()
        run()
        wall.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - used)
    return {
        **dict(zip(("rows", "width", "classes", "ranks", "share"), point, strict=True)),
        "rounds": len(wall),
        "seconds": statistics.median(wall),
        "cpu_seconds": statistics.median(cpu),
        "peak_bytes": peak,
        "weight_bytes": weight.nbytes,
        "sent_bytes": sent.bytes,
    }


def sampling(
    rank: int, folder: str, groups: int, steps: int, shares: tuple[float, ...], seeds: tuple[int, ...]
) -> None:
    """The search accuracy after training with a share of the classes in each step."""
    from examples.sharded_am_softmax import model_of, optimizer_of, search_accuracy, sentences, step

    join(rank, 1, folder)
    found = []
    for share, seed in tqdm([(share, seed) for share in shares for seed in seeds], desc="share of the classes"):
        x, y = sentences(groups, 10, seed=2 * seed)
        model = model_of(groups, 32, "cpu")
        optimizer = optimizer_of(model)
        draws = torch.Generator().manual_seed(seed)
        begin = time.process_time()
        for _ in range(steps):
            rows = torch.randint(len(x), (BATCH,), generator=draws)
            sample = None if share == 1 else share
            step(model, optimizer, x[rows], y[rows], sample=sample, generator=draws)  # type: ignore[no-untyped-call]
        used = time.process_time() - begin
        accuracy = search_accuracy(model, sentences(groups, 4, seed=2 * seed + 1))
        found.append({"share": share, "seed": seed, "accuracy": accuracy / 100, "cpu_seconds": used})
    Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def found_by(worker: Any, ranks: int, *words: Any) -> Any:
    """What the first of so many processes wrote."""
    with tempfile.TemporaryDirectory() as folder:
        start_processes(worker, (folder, *words), nprocs=ranks, start_method="spawn")  # type: ignore[no-untyped-call]
        return json.loads(Path(folder, "found.json").read_text(encoding="utf-8"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed")
    parser.add_argument("--tiny", action="store_true", help="a check, not a measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results", help="folder of the record")
    parser.add_argument("--seconds", type=float, default=2.0, help="for the rounds of a point (2)")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    study: tuple[Any, ...] = (8, 5, (1.0, 0.5), (0, 1)) if options.tiny else (GROUPS, STEPS, SHARES, SEEDS)
    seconds = 0.0 if options.tiny else options.seconds

    def costs(points: list[Point], linear_emo: bool) -> list[Any]:
        found = []
        for ranks in sorted({point[3] for point in points}):
            found += found_by(cost, ranks, [point for point in points if point[3] == ranks], linear_emo, seconds)
        return found

    record = {
        "slug": "distributed",
        "tiny": options.tiny,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **commit("lossbook", "benchmarks", "examples"),
        "machine": machine(torch.device("cpu")) | {"cores": os.cpu_count(), "threads": 1},
        "versions": versions(),
        "method": METHOD,
        "costs": costs(TINY if options.tiny else POINTS, False),
        "linear_emo": {
            **{"chunk_size": CHUNK, "vector": VECTOR},
            "costs": costs(TINY[:1] if options.tiny else LINEAR_EMO, True),
        },
        "sampling": {
            **dict(zip(("groups", "steps"), study, strict=False)),
            "batch": BATCH,
            "runs": found_by(sampling, 1, *study),
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bench_distributed.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
