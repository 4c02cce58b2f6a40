"""The cosine classifier whose class vectors lie on several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import empty as empty_shards
from torch.nn import functional as F

from lossbook._checks import check_floating, describe
from lossbook._classifier import CosineClassifier, unit
from lossbook._collectives import Group, check_whole, group_of, local, shared
from lossbook._torch import full_precision

BLOCK = 4096  # class vectors that are drawn together


class ShardedCosineClassifier(CosineClassifier):
    r""":class:`~lossbook.am_softmax.CosineClassifier` with its class vectors on several ranks.

    ``weight`` is a DTensor ``(num_classes, in_features)`` with ``Shard(0)``: rank r holds rows
    :math:`r \lceil C / n \rceil` to :math:`(r + 1) \lceil C / n \rceil`. So an optimiser keeps the state of the shard
    alone, and ``torch.distributed.checkpoint`` saves weight and state, and loads them on another number of ranks. The
    class vectors drawn at the start do not depend on the number of ranks.

    Called with the same embeddings ``(..., in_features)`` on every rank (plain, or a replicated DTensor), it returns
    their cosines, a DTensor ``(..., num_classes)`` sharded along the classes. For training pass ``weight`` to
    :func:`sharded_am_softmax_loss`, which holds no cosines.

    Args:
        in_features: length of an embedding.
        num_classes: number of class vectors on all ranks together.
        group: the ranks that share them; without it the default group. Every one of them makes the module.
        device: where the class vectors are made: ``"cpu"``, which is the default, or ``"cuda"`` for the present GPU.
        dtype: float32, which is the default, or float64.

    Raises:
        TypeError: a size that is not an integer; an embedding that is not a real-valued tensor.
        ValueError: a size below 1; another dtype; an embedding of another length.
        RuntimeError: there is no process group.

    Example:
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> head = ShardedCosineClassifier(2, 3)
        >>> head(torch.tensor([[3.0, 4.0]])).shape, head.weight.placements
        (torch.Size([1, 3]), (Shard(dim=0),))
        >>> dist.destroy_process_group()

    Equation :eq:`am-cosine` of the chapter. Source: as the unsharded layer; sharded by class in Partial FC, arXiv
    2203.15565.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        group: Group | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, device="meta", dtype=dtype)
        kind = torch.device("cpu" if device is None else device).type
        self.mesh = DeviceMesh.from_group(group_of("group", None, 0, group), kind)
        shape, dtype = tuple(self.weight.shape), self.weight.dtype
        weight = empty_shards(shape, dtype=dtype, device_mesh=self.mesh, placements=[Shard(0)])
        self.weight = nn.Parameter(weight)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the class vectors anew: directions uniform, lengths about 1. Every rank calls."""
        self._undrawn = self.weight.is_meta
        if self._undrawn:
            return
        group = self.mesh.get_group()
        seed = [int(torch.randint(2**62, (), device="cpu"))]
        dist.broadcast_object_list(seed, group=group, group_src=0)
        mine = local(self.weight)
        size = -(-self.num_classes // dist.get_world_size(group))
        first = min(size * dist.get_rank(group), self.num_classes)
        for block in range(first // BLOCK, -(-(first + len(mine)) // BLOCK)):
            draws = torch.Generator("cpu").manual_seed(seed[0] + block)
            drawn = torch.randn(BLOCK, self.in_features, generator=draws, device="cpu") * self.in_features**-0.5
            low, high = max(first, block * BLOCK), min(first + len(mine), (block + 1) * BLOCK)
            mine[low - first : high - first] = drawn[low - block * BLOCK : high - block * BLOCK]

    def forward(self, embedding: Tensor) -> Tensor:
        """Cosines ``(..., num_classes)``, sharded, of ``embedding`` ``(..., in_features)``."""
        check_whole(self.mesh.get_group(), embedding=embedding)
        embedding = check_floating(local(embedding), "embedding")
        if embedding.dim() < 1 or embedding.shape[-1] != self.in_features:
            wanted = f"in_features={self.in_features} as its last dimension"
            raise ValueError(f"embedding must have {wanted}, got {describe(embedding)}")
        w = local(self.weight)
        with full_precision(embedding.device):
            z = shared(unit(embedding, w), self.mesh.get_group())
            cosine = F.linear(z, unit(w, z)).clamp(-1, 1)
        shape = torch.Size((*cosine.shape[:-1], self.num_classes))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(cosine, self.mesh, [Shard(cosine.dim() - 1)], shape=shape, stride=stride)
