"""What the ranks of a process group exchange: a few words about their arguments, maxima, and sums with their gradients.

Rows are small: nothing that is exchanged grows with the number of classes. A quantity that is the same on every rank
has the same gradient on every rank; a shard has the gradient of its own classes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from lossbook._checks import describe
from lossbook._common import ABSENT, LossModule
from lossbook._torch import readable

T = TypeVar("T")
Group = dist.ProcessGroup
# One message: the classes of the shard, the largest class index, a hash of all indices, a scale, two numbers of what a
# margin may learn, and text in UTF-8.
_NUMBERS, _BYTES = 6, 1000
# How many classes the shards hold together is known only when all have said it.
ANY_CLASS = 2**62
_ERRORS = {"type": TypeError, "value": ValueError, "other": RuntimeError}


# ----------------------------------------------------------------------------------------------- sums over the ranks


class _Sum(Function):
    """Each rank has its own term: every term has the gradient of the sum, which is the same on every rank."""

    @staticmethod
    def forward(ctx: Any, term: Tensor, group: Group) -> Tensor:
        ctx.group = group
        total = term.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return shared(grads[0], ctx.group), None


class _Shared(Function):
    """The same on every rank, used by each for its own part: the gradient is the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, same: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return same.view_as(same)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total: Tensor = _Sum.apply(grads[0], ctx.group)  # type: ignore[no-untyped-call]
        return total, None


def shared(same: Tensor, group: Group) -> Tensor:
    """``same``, an argument of every rank, whose gradient adds up what the ranks make of it."""
    found: Tensor = _Shared.apply(same, group)  # type: ignore[no-untyped-call]
    return found


@dataclass(frozen=True)
class Shards:
    """The classes of all ranks: those of this one begin at ``first``."""

    group: Group
    first: int | Tensor

    def sums(self, *terms: Tensor) -> tuple[Tensor, ...]:
        """The sum over the ranks of each of these tensors of one shape, in one all-reduce."""
        total: Tensor = _Sum.apply(torch.stack(terms), self.group)  # type: ignore[no-untyped-call]
        return total.unbind(0)

    def tops(self, *scores: Tensor) -> tuple[Tensor, ...]:
        """The largest score of each row over all shards, without gradient, in one all-reduce."""
        top = torch.stack([s.detach().amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], ABSENT) for s in scores])
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=self.group)
        return top.unbind(0)

    def place(self, t: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        """Which class of this shard each index is, 0 where it is none, and whether it is one."""
        place = t - self.first
        here = (place >= 0) & (place < classes)
        return place.masked_fill(~here, 0), here


class GroupModule(LossModule):
    """A loss with its group, which copies of the module share, as those that average weights."""

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupModule:
        memo[id(self.group)] = self.group
        memo[id(self)] = copied = self.__new__(type(self))
        copied.__dict__ = deepcopy(self.__dict__, memo)
        return copied


# ---------------------------------------------------------------------------------------------- what a rank was given


def group_of(name: str, tensor: Any, dim: int, group: Group | None) -> Group:
    """The group over which the classes lie: that of a DTensor, else ``group``, else the default one."""
    if not isinstance(tensor, DTensor):
        if not dist.is_initialized():
            raise RuntimeError("there is no process group: call torch.distributed.init_process_group() first")
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, Group):
            raise TypeError(f"group must be a ProcessGroup that holds this rank, got {describe(group)}")
        return group
    split = [i for i, p in enumerate(tensor.placements) if not p.is_replicate()]
    if len(split) != 1 or not tensor.placements[split[0]].is_shard(dim % tensor.dim()):
        wanted = f"must be sharded along its classes, Shard({dim % tensor.dim()}), and along nothing else"
        raise ValueError(f"{name} {wanted}, got a DTensor with placements {tuple(tensor.placements)}")
    found: Group = tensor.device_mesh.get_group(split[0])
    return found


def check_whole(group: Group, **tensors: Any) -> None:
    """Raise where a DTensor that these ranks must hold alike is cut between them, or a part of a sum."""
    ranks = dist.get_process_group_ranks(group)
    for name, x in tensors.items():
        for i, p in enumerate(getattr(x, "placements", ())):
            between = dist.get_process_group_ranks(x.device_mesh.get_group(i)) == ranks
            if p.is_partial() or (p.is_shard() and between):
                wanted = "must be the same on every rank, Replicate()"
                raise ValueError(f"{name} {wanted}, got a DTensor with placements {tuple(x.placements)}")


def local(tensor: Any) -> Any:
    """The part of a DTensor that this rank holds; anything else as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Given:
    """What a rank read. ``words`` must be the same on every rank, and so ``index``, class indices, -1 for ignored."""

    words: str
    classes: int
    index: Tensor | None = None
    scale: Tensor | float = 0.0
    margin: Any = None

    def numbers(self) -> list[int]:
        """Classes, the largest index, a hash of the indices; the bits of a scale that learns, and of two numbers of
        what a margin may learn: its parameters in one direction, and their length.

        0 where they cannot be looked at without waiting.
        """
        highest = content = 0
        scale = along = length = 0.0
        if self.index is not None and readable(self.index) and self.index.numel() > 0:
            highest, content = int(self.index.max()), zlib.crc32(self.index.numpy().tobytes())
        if isinstance(self.scale, Tensor) and readable(self.scale):
            scale = self.scale.item()
        learns = [*self.margin.parameters()] if isinstance(self.margin, nn.Module) else []
        if learns and readable(*learns):
            values = torch.cat([p.detach().reshape(-1).double() for p in learns])
            steps = torch.arange(1, len(values) + 1, dtype=torch.float64, device="cpu")
            along, length = float(values @ (1 + (steps * 0.618034) % 1)), float(values.norm())
        return [self.classes, highest, content, *struct.unpack("3q", struct.pack("3d", scale, along, length))]


def words(function: str, tensors: Mapping[str, tuple[Tensor, int | None]], **options: Any) -> str:
    """A call in words; of each tensor the dimension that holds the classes may differ between the ranks."""
    parts = []
    for name, (tensor, dim) in tensors.items():
        sizes = [str(n) for n in tensor.shape]
        if dim is not None:
            sizes[dim] = "C"
        grad = ", requires_grad" if dim is None and tensor.requires_grad and torch.is_grad_enabled() else ""
        parts.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} ({', '.join(sizes)}){grad}")
    parts += [f"{name}={_option(value)}" for name, value in options.items()]
    return f"{function}: {'; '.join(parts)}"


def _option(value: Any) -> str:
    if isinstance(value, Tensor):
        return describe(value) + ", requires_grad" * value.requires_grad
    if callable(value) and not isinstance(value, nn.Module):
        return getattr(value, "__name__", type(value).__name__)
    return repr(value)


def agree(group: Group, read: Callable[[], tuple[T, Given]]) -> tuple[T, Shards]:
    """What ``read()`` returns first, and the shards, once all ranks have told one another what they were given.

    One all-gather of a kilobyte. Where a rank's ``read()`` raises, where their words differ, or where a class index
    lies outside all shards, every rank raises the same error. Messages travel and are read on the CPU. In a group
    without a backend for it (NCCL alone) they stay on the device, unread, since reading would wait for it.
    """
    failure: Exception | None = None
    try:
        found, given = read()
        message = _pack(given.numbers(), f"given {given.words}")
    except Exception as error:
        failure = error
        kind = next((k for k, e in _ERRORS.items() if isinstance(error, e)), "other")
        message = _pack([0] * _NUMBERS, f"{kind} {error}".replace(str(ANY_CLASS), "C"))
    backends = str(dist.get_backend_config(group))  # such as "cpu:gloo,cuda:nccl"
    heard = "cpu:" in backends
    if failure is not None and not heard:
        raise failure
    message = message if heard else message.to(backends.partition(":")[0])
    messages = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(messages, message, group=group)
    rank = dist.get_rank(group)
    if not heard:
        return found, Shards(group, torch.stack(messages)[:rank, 0].sum())
    numbers, texts = zip(*map(_unpack, messages), strict=True)
    _compare(numbers, texts, failure)
    return found, Shards(group, sum(n[0] for n in numbers[:rank]))


def _pack(numbers: list[int], text: str) -> Tensor:
    letters = bytearray(text.encode()[:_BYTES].ljust(_BYTES, b"\0"))
    return torch.cat((torch.tensor(numbers, device="cpu"), torch.frombuffer(letters, dtype=torch.int64)))


def _unpack(message: Tensor) -> tuple[list[int], str]:
    letters = bytes(message[_NUMBERS:].view(torch.uint8).tolist())
    return message[:_NUMBERS].tolist(), letters.rstrip(b"\0").decode(errors="replace")


def _compare(numbers: tuple[list[int], ...], texts: tuple[str, ...], failure: Exception | None) -> None:
    """Raise what every rank raises."""
    split = [text.partition(" ")[::2] for text in texts]
    for rank, (kind, text) in enumerate(split):
        if kind != "given":
            raise _ERRORS[kind](f"rank {rank}: {text}") from failure
    (_, first), *others = split
    for rank, (_, text) in enumerate(others, 1):
        if text != first:
            one, other = first.split("; "), text.split("; ")
            here = "; ".join(part for part in one if part not in other)
            there = "; ".join(part for part in other if part not in one)
            got = f"rank 0: {here or 'nothing more'}; rank {rank}: {there or 'nothing more'}"
            raise ValueError(f"all ranks must be given the same but for their classes; {got}")
    learned = [struct.unpack("3d", struct.pack("3q", *n[3:])) for n in numbers]
    there, there_along, there_length = learned[0]
    for rank, (here, along, length) in enumerate(learned):
        content = numbers[rank][2]
        if content != numbers[0][2]:
            raise ValueError(
                f"target must be the same on every rank, got other class indices on rank {rank} than on rank 0"
            )
        # processors may round otherwise
        if abs(here - there) > 1e-3 * there:
            raise ValueError(f"scale must be the same on every rank, got {there:g} on rank 0, {here:g} on rank {rank}")
        if abs(along - there_along) > 1e-3 * max(length, there_length):
            raise ValueError(f"psi must be the same on every rank, got other parameters on rank {rank} than on rank 0")
    classes, highest = sum(n[0] for n in numbers), numbers[0][1]
    if classes == 0:
        raise ValueError("the shards must have at least one class together, got none")
    if highest >= classes:
        raise ValueError(f"target must be class indices in [0, {classes}), the classes of all shards, got {highest}")
