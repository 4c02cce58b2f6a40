"""Labels whose chances are known because they are made here: in rows, as lists of outcomes, by a careless person."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LinearWorld", "careless", "independent", "linear_world", "one_of", "together", "with_one_of"]

INPUTS = 8  # numbers in a row of the linear world


class LinearWorld(NamedTuple):
    """Rows whose labels have known chances (see :func:`linear_world`)."""

    inputs: Tensor
    """What a model sees, float64 ``(rows, 8)``."""
    chances: Tensor
    """The chance that each label is true, float64 ``(rows, labels)``."""
    labels: Tensor
    """One draw of the labels, boolean, of the same shape."""


def linear_world(rows: int, labels: int, *, seed: int) -> LinearWorld:
    """Rows of eight normal numbers. The log-odds of each label are a linear function of them, the labels independent.

    The functions are the same for every seed and have no constant, so that over all rows half of the labels are true.

    Args:
        rows: How many rows.
        labels: How many labels each has.
        seed: Same seed, same rows.

    Example:
        >>> world = linear_world(5, 3, seed=0)
        >>> world.inputs.shape, world.labels.shape, bool(((world.chances > 0) & (world.chances < 1)).all())
        (torch.Size([5, 8]), torch.Size([5, 3]), True)
    """
    fixed = torch.Generator().manual_seed(7)
    weights = torch.randn(INPUTS, labels, generator=fixed, dtype=torch.float64) / 2**0.5
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, INPUTS, generator=generator, dtype=torch.float64)
    chances = torch.sigmoid(inputs @ weights)
    draws = torch.rand(rows, labels, generator=generator, dtype=torch.float64)
    return LinearWorld(inputs, chances, draws < chances)


def _outcomes(rows: Sequence[Sequence[int]], chances: Sequence[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows, dtype=torch.bool), torch.tensor(chances, dtype=torch.float64)


def independent(chances: Sequence[float]) -> tuple[Tensor, Tensor]:
    """All outcomes of independent labels: boolean ``(2 ** n, n)``, and the chance of each outcome, ``(2 ** n,)``.

    Args:
        chances: The chance of each of the ``n`` labels.

    Example:
        >>> rows, chance = independent([0.5, 0.25])
        >>> rows[3].tolist(), chance[3].item()
        ([True, True], 0.125)
    """
    eta = torch.tensor(chances, dtype=torch.float64)
    rows = torch.tensor(list(product([False, True], repeat=len(eta))))
    return rows, torch.where(rows, eta, 1 - eta).prod(-1)


def together(k: int, chance: float) -> tuple[Tensor, Tensor]:
    """The two outcomes of ``k`` labels that are all true, with this chance, or all false; as :func:`independent`.

    Example:
        >>> together(2, 0.75)[0].tolist()
        [[True, True], [False, False]]
    """
    return _outcomes([[1] * k, [0] * k], [chance, 1 - chance])


def one_of(n: int) -> tuple[Tensor, Tensor]:
    """The outcomes of ``n`` labels of which exactly one is true, each equally likely; as :func:`independent`.

    Example:
        >>> one_of(2)[0].tolist()
        [[True, False], [False, True]]
    """
    return torch.eye(n, dtype=torch.bool), torch.full((n,), 1 / n, dtype=torch.float64)


def with_one_of(n: int, chance: float) -> tuple[Tensor, Tensor]:
    """A label that is true with this chance, always with one of ``n`` others, as "animal" with one species.

    The label comes first. The outcomes are as in :func:`independent`: ``n`` where it is true, one where all are false.

    Example:
        >>> with_one_of(2, 0.5)[0].tolist()
        [[True, True, False], [True, False, True], [False, False, False]]
    """
    one = torch.eye(n, dtype=torch.bool)
    rows = torch.cat([torch.ones(n, 1, dtype=torch.bool), one], 1)
    none = torch.zeros(1, n + 1, dtype=torch.bool)
    return torch.cat([rows, none]), torch.tensor([chance / n] * n + [1 - chance], dtype=torch.float64)


def careless(target: Tensor, *, lost: float = 0.2, invented: float = 0.01, seed: int) -> Tensor:
    """Labels as a careless person gives them: some true ones are lost, and some false ones become true.

    Args:
        target: True labels, boolean, of any shape.
        lost: The chance that a true label becomes false.
        invented: The chance that a false label becomes true.
        seed: Same seed, same mistakes.

    Example:
        >>> target = torch.tensor([[True, False], [False, True]])
        >>> careless(target, lost=1.0, invented=1.0, seed=0).equal(~target)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(target.shape, generator=generator)
    return torch.where(target, draws >= lost, draws < invented)
