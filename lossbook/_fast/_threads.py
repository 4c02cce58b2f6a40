"""Pieces of work on as many threads as torch has: each piece on one core, and the threads meet once, at the end.

torch splits every operator among its threads and waits for the slowest. With small pieces it waits often, and beside
busy processes each wait takes as long as the system lets another process run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import Any

import torch


def each(
    device: torch.device, pieces: Iterable[Any], begin: Callable[[], Any], work: Callable[[Any, Any], None]
) -> None:
    """``work(piece, room)`` for every piece; ``begin()`` makes the room that a thread works in.

    An error of a piece is raised when no thread works any more.
    """
    waiting = list(pieces)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    queue = iter(waiting)  # its next piece goes to one thread only

    def run() -> None:
        with torch.no_grad():
            room = begin()
            for piece in queue:
                work(piece, room)

    if min(threads, len(waiting)) < 2:
        return run()
    pool = _pool(threads, os.getpid())
    done = [pool.submit(run) for _ in range(min(threads, len(waiting)))]
    wait(done)  # before an error of one is raised: the others still write into the caller's tensors
    for part in done:
        part.result()


def numbers(device: torch.device) -> int:
    """How many numbers to work on at once: on a CPU a few arrays of them stay in cache."""
    return 2**17 if device.type == "cpu" else 2**24


def slices(device: torch.device, rows: int, size: int) -> list[slice]:
    """``rows`` rows in pieces of at most ``size``; where there are several, as many for each thread."""
    pieces = -(-rows // size)
    if pieces > 1 and device.type == "cpu":
        threads = torch.get_num_threads()
        size = -(-rows // (-(-pieces // threads) * threads))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose operators run on one core; a forked process needs its own."""
    pool, ready = ThreadPoolExecutor(threads, "lossbook"), Barrier(threads + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread's first question sets its number to the program's
        torch.set_num_threads(1)
        ready.wait()

    for _ in range(threads):
        pool.submit(start)
    ready.wait()
    torch.set_num_threads(threads)  # torch gives threads that come later the last number that any thread has set
    return pool
