"""What only a GPU can show of the losses: the CPU's numbers, in half precision and compiled, and no wait for the GPU.

`make gpu` runs these first. They need pytest and torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lossbook import emo_ce_loss, linear_emo_ce_loss
from tests.losses import ALL, LOSSES, Call, ids

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = "cuda"
SAME = [call for call in ALL if call.name != "mixup"]  # which draws random numbers, on each device its own
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def moved(call: Call, device: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The tensors of a call elsewhere; the scores in another dtype."""
    found: list[Any] = []
    for i, x in enumerate(call.tensors):
        if isinstance(x, Tensor):
            x = x.detach().to(device, dtype if i in call.scores else x.dtype)
            x.requires_grad_(i in call.scores)
        found.append(x)
    return found


def both_ways(call: Call, tensors: list[Any], function: Any = None) -> list[Tensor]:
    """Value and gradients."""
    value = (function or call)(*tensors)
    if isinstance(value, dict):  # accuracies
        value = torch.tensor(list(value.values()), device=tensors[0].device)
    if not call.scores:
        return [value] if isinstance(value, Tensor) else list(value)
    value.sum().backward()
    return [value.detach(), *(tensors[i].grad for i in call.scores)]


def same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.device.type == DEVICE
        assert a.dtype == b.dtype
        scale = float(b.double().abs().max()) if b.is_floating_point() else 0.0
        torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("call", SAME, ids=ids)
def test_values_and_gradients_are_those_of_the_cpu(call: Call, dtype: torch.dtype) -> None:
    wanted = both_ways(call, moved(call, "cpu", dtype))
    same(both_ways(call, moved(call, DEVICE, dtype)), wanted, 8 * EPS[dtype])


@pytest.mark.parametrize("call", LOSSES, ids=ids)
def test_compiled_they_are_the_same(call: Call) -> None:
    wanted = both_ways(call, moved(call, "cpu"))
    compiled = torch.compile(lambda *tensors: call(*tensors))
    same(both_ways(call, moved(call, DEVICE), compiled), wanted, 8 * EPS[torch.float32])


@pytest.mark.parametrize("call", LOSSES, ids=ids)
def test_nothing_waits_for_the_gpu(call: Call) -> None:
    both_ways(call, moved(call, DEVICE))  # what the first call sets up may wait
    tensors = moved(call, DEVICE)
    with no_waiting():
        both_ways(call, tensors)


def test_a_chunked_loss_needs_less_memory() -> None:
    """The scores of 4,096 rows and 8,192 words are 128 MiB; in chunks of 256 rows they are never there at once."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, vectors = (torch.randn(n, 32, generator=g).to(DEVICE) for n in (4096, 8192, 8192))
    target = torch.randint(8192, (4096,), generator=g).to(DEVICE)

    def peak(loss: Any) -> int:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(*leaves).backward()
        return torch.cuda.max_memory_allocated() - before

    chunked = peak(lambda h, w: linear_emo_ce_loss(h, w, target, vectors, chunk_size=256))
    whole = peak(lambda h, w: emo_ce_loss(h @ w.T, target, vectors))
    assert chunked < 0.3 * whole
