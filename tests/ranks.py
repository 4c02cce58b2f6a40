"""Processes of a gloo group that wait for cases, so that a file of tests starts them once."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

PRELOAD = ["torch", "torch.distributed.tensor", "lossbook.distributed"]


def wait_for_cases(rank: int, size: int, folder: Path, pipe: Connection) -> None:
    """What a rank does: calls what it is sent with its rank, and answers with the result or the traceback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=size)
    pipe.send("ready")
    with (folder / f"{rank}.txt").open("w") as stack:
        while (work := pipe.recv()) is not None:
            case, words, seconds = work
            faulthandler.dump_traceback_later(seconds, file=stack)
            try:
                answer = (True, case(rank, *words))
            except Exception:
                answer = (False, traceback.format_exc())
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)
    dist.destroy_process_group()


class Ranks:
    """So many ranks. A call runs a case on each and returns their results; ranks that wait too long are killed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks"))
        self.pipes, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=wait_for_cases, args=(rank, self.size, self.folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        if not all(pipe.poll(120) and pipe.recv() == "ready" for pipe in self.pipes):
            self.kill()
            pytest.fail(f"{self.size} ranks did not meet")

    def __call__(self, case: Callable[..., Any], *words: Any, seconds: float = 40) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((case, words, seconds / 2))  # well before the end: on a busy machine a rank begins late
        answers: list[Any] = []
        end = time.monotonic() + seconds
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(max(0, end - time.monotonic())):
                self.restart()
                pytest.fail(f"rank {rank} of {self.size} waits in {case.__name__}:\n{self.stacks}")
            done, answer = pipe.recv()
            answers.append(answer)
            if not done:
                self.restart()
                pytest.fail(f"rank {rank} of {self.size} in {case.__name__}:\n{answer}")
        return answers

    def restart(self) -> None:
        """Kill what hangs; the next case meets new ranks."""
        self.kill()
        self.stacks = "\n".join(path.read_text() for path in sorted(self.folder.glob("*.txt")))
        shutil.rmtree(self.folder, ignore_errors=True)
        self.start()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    """Ranks that end with the block."""
    group = Ranks(size)
    try:
        yield group
    finally:
        group.close()
