"""Peak memory of a loss, counted and not timed.

The counter is the benchmarks' own. Torch's profiler records one event, with its size and its time, for every block
that torch's CPU allocator hands out or takes back. That allocator serves every tensor, and also the buffers that an
operator makes inside its kernel, which a ``TorchDispatchMode`` never sees (``logsumexp`` holds one of the size of its
input). The largest running sum of the events is the most memory held beyond what was held before. It depends on no
clock, no page size and no other process, so a test can bound it. ``tests/test_memory.py`` checks it on calls whose
peak is known.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.harness import peak_bytes

__all__ = ["peak_bytes", "peak_ratio"]


def peak_ratio(loss: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor) -> float:
    """Peak extra memory of ``loss(scores)``, forward and backward, in units of the scores' own size.

    The gradient of the scores is part of it: 1.0 is what any loss needs.
    """
    leaf = scores.detach().requires_grad_()

    def forward_and_backward() -> None:
        loss(leaf).sum().backward()
        leaf.grad = None

    forward_and_backward()  # the first call may allocate what stays
    return peak_bytes(forward_and_backward) / (leaf.numel() * leaf.element_size())
