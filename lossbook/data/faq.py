"""The everyday questions, split for a search among groups of which training has seen no question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lossbook.data import questions
from lossbook.models import text_features


@dataclass(frozen=True)
class Faq:
    """Questions, their groups, and which groups are unseen when.

    Three **folds** of 34 groups take turns as unseen ones. The 24 groups that are in no fold are for choices, such as
    that of a scale or a threshold.

    Attributes:
        text: The questions.
        group: The group of each, int64 ``(N,)``.
        names: The name of each group.
        features: What an encoder reads, ``text_features(text)``.
        validation: 24 groups, int64.
        folds: Three times 34 groups.
    """

    text: list[str]
    group: Tensor
    names: list[str]
    features: Tensor
    validation: Tensor
    folds: tuple[Tensor, ...]

    def rows(self, groups: Tensor) -> Tensor:
        """The places of the questions of these groups."""
        return torch.isin(self.group, groups).nonzero()[:, 0]

    def texts(self, groups: Tensor) -> list[str]:
        """The questions of these groups."""
        return [self.text[i] for i in self.rows(groups).tolist()]

    def labels(self, groups: Tensor) -> Tensor:
        """The group of each of these questions as a class index: 0, 1, ... in the order of the groups' numbers."""
        return torch.searchsorted(groups.sort().values, self.group[self.rows(groups)])

    def seen(self, fold: int) -> Tensor:
        """The groups to train on while those of this fold are unseen: the other folds and the validation groups."""
        others = [groups for i, groups in enumerate(self.folds) if i != fold]
        return torch.cat([self.validation, *others])


def faq() -> Faq:
    """The 126 groups of :func:`lossbook.data.questions` in three folds of 34 and 24 validation groups.

    Example:
        >>> q = faq()
        >>> len(q.validation), [len(fold) for fold in q.folds]
        (24, [34, 34, 34])
        >>> len(q.seen(0)), len(q.rows(q.folds[0])), q.labels(q.folds[0]).max().item()
        (92, 409, 33)
    """
    all_of_them = questions()
    order = torch.randperm(len(all_of_them.names), generator=torch.Generator().manual_seed(0))
    return Faq(
        all_of_them.text,
        all_of_them.group,
        all_of_them.names,
        text_features(all_of_them.text),
        order[:24],
        order[24:].chunk(3),
    )


def stored_halves(group: Tensor, n: int = 10) -> Iterator[Tensor]:
    """Ways to store half of the groups: the questions of the other half have no answer.

    Args:
        group: The group of each question.
        n: How many ways, each drawn at random from its own number as seed.

    Yields:
        Which questions are stored, boolean, of the shape of ``group``.

    Example:
        >>> [half.tolist() for half in stored_halves(torch.tensor([4, 4, 7, 9, 9, 9, 7, 1]), n=1)]
        [[True, True, False, False, False, False, False, True]]
    """
    names = torch.unique(group)
    for seed in range(n):
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
        yield torch.isin(group, names[order[: len(names) // 2]])
