"""Two classes of points that overlap, for pictures of how a line between them is learned."""

from __future__ import annotations

import torch
from torch import Tensor


def two_clouds(n: int = 40, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two round clouds of points that overlap, with a 1 as third coordinate for the bias of a line.

    The first cloud lies round (1.0, 0.6) and has the target 1, the second round (-1.0, -0.6) and has the target 0; both
    have standard deviation 1 in each direction.

    Args:
        n: Points of each cloud.
        seed: Same seed, same points.

    Returns:
        Points, float64 ``(2 n, 3)``, and targets 0 and 1, float64 ``(2 n,)``.

    Raises:
        ValueError: ``n`` is negative.

    Example:
        >>> points, target = two_clouds(2)
        >>> points.shape, target.tolist()
        (torch.Size([4, 3]), [1.0, 1.0, 0.0, 0.0])
    """
    if n < 0:
        raise ValueError(f"n must be at least 0, got {n}")
    generator = torch.Generator().manual_seed(seed)
    centre = torch.tensor([1.0, 0.6])
    first = torch.arange(2 * n) < n
    points = torch.randn(2 * n, 2, generator=generator) + torch.where(first[:, None], centre, -centre)
    return torch.cat([points, torch.ones(2 * n, 1)], 1).double(), first.double()
