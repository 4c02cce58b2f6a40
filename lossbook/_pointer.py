"""The layer that scores every pair of tokens of a sentence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lossbook._checks import check_flag, check_floating, check_integer, describe

BASE = 10_000.0  # of the angles of rotary positions, as in the RoFormer paper


def rotate(x: Tensor, factor: float = 1.0) -> Tensor:
    """Rotary positions: the pairs of features of the token at place i, turned by angles that grow with i.

    The inner product of two turned vectors depends on their places through the difference alone.

    Args:
        x: Features ``(..., L, D)``, D even; feature d is paired with d + D / 2.
        factor: Multiplies the result.
    """
    half = x.shape[-1] // 2
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    places = torch.arange(x.shape[-2], device=x.device, dtype=wide)
    rates = torch.exp(torch.arange(half, device=x.device, dtype=wide) * (-math.log(BASE) / half))
    angles = torch.outer(places, rates)
    cos, sin = ((factor * f(angles)).to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class GlobalPointer(nn.Module):
    r"""A score for every type and every pair of tokens: is the span from token i to token j of that type?

    .. math:: s_{a, i, j} = \frac{1}{\sqrt D} \, (R_i\, q_{a, i}) \cdot (R_j\, k_{a, j})

    :math:`q_{a, i}` and :math:`k_{a, j}` are linear in the features of the tokens, and :math:`R_i` is the rotation of
    rotary positions, so a score knows how far its ends are apart. The efficient form asks first whether it is a span at
    all, with one q and one k for all types, and adds a term of both ends for the type:

    .. math::

        s_{a, i, j} = \frac{1}{\sqrt D} \, (R_i\, q_i) \cdot (R_j\, k_j)
            + u_a \cdot [q_i; k_i] + v_a \cdot [q_j; k_j]

    Args:
        in_features: H, the size of a token's features.
        num_types: How many types there are: of entities, or predicates.
        head_features: D, the size of q and k, an even number.
        triangular: Scores of spans that end before they start are minus infinity, which no loss pushes. False for pairs
            in any order, such as the heads of subject and object.
        efficient: The efficient form, with ``2 D (H + 1) + 2 (2 D + 1) num_types`` parameters in place of
            ``2 D (H + 1) num_types``.

    Shape:
        Features ``(B, L, H)`` become scores ``(B, num_types, L, L)``: first the start, then the end.

    Raises:
        TypeError: A size is no integer, or the features are no real-valued tensor.
        ValueError: A size is below 1, ``head_features`` is odd, or the features have another shape.

    Example:
        >>> pointer = GlobalPointer(16, 3)
        >>> scores = pointer(torch.randn(2, 5, 16))
        >>> scores.shape
        torch.Size([2, 3, 5, 5])
        >>> scores[0, 0, 3, 1].item()  # it would end before it starts
        -inf

    Equation :eq:`spans-score` of the chapter, the efficient form :eq:`spans-efficient`. Source: Su Jianlin, scientific
    spaces 8373 (2021), and 8877 (2022) for the efficient form; the paper is Global Pointer, arXiv 2208.03054. Rotary
    positions: :eq:`spans-rotary`, RoFormer, arXiv 2104.09864.
    """

    def __init__(
        self,
        in_features: int,
        num_types: int,
        *,
        head_features: int = 64,
        triangular: bool = True,
        efficient: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, low=1)
        self.num_types = check_integer("num_types", num_types, low=1)
        self.head_features = check_integer("head_features", head_features, low=2)
        if self.head_features % 2:
            raise ValueError(f"head_features must be even, got {self.head_features}")
        self.triangular = check_flag("triangular", triangular)
        self.efficient = check_flag("efficient", efficient)
        heads = 1 if self.efficient else self.num_types
        self.ends = nn.Linear(self.in_features, 2 * self.head_features * heads)
        if self.efficient:
            self.kinds = nn.Linear(2 * self.head_features, 2 * self.num_types)

    def forward(self, input: Tensor) -> Tensor:
        """Scores ``(B, num_types, L, L)`` of features ``(B, L, H)``."""
        check_floating(input, "input", what=" of features")
        if input.dim() != 3 or input.shape[-1] != self.in_features:
            raise ValueError(f"input must have the shape (B, L, {self.in_features}), got {describe(input)}")
        q, k, both = self._ends(input)
        batch, heads, length = q.shape[:3]
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        if self.triangular:  # added where the product is written, in the same pass
            order = q.new_full((length, length), -math.inf).tril(-1)
            scores: Tensor = torch.baddbmm(order.expand(len(q), -1, -1), q, k.mT)
        else:
            scores = q @ k.mT
        scores = scores.view(batch, heads, length, length)
        if both is None:
            return scores
        start, end = both.mT.chunk(2, 1)  # (B, types, L) each
        return scores + start.unsqueeze(-1) + end.unsqueeze(-2)

    def _ends(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Turned q and k ``(B, types, L, D)``, and in the efficient form the terms of both ends ``(B, L, 2 types)``.

        What the layer gave is let go when this returns, before the scores are made.
        """
        ends = self.ends(input).unflatten(-1, (-1, 2 * self.head_features)).transpose(1, 2)
        q, k = ends.chunk(2, -1)
        both = self.kinds(ends.squeeze(1)) if self.efficient else None
        return rotate(q, self.head_features**-0.5), rotate(k), both

    def extra_repr(self) -> str:
        names = ("in_features", "num_types", "head_features", "triangular", "efficient")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
