"""The next word of Python's help topics: a vocabulary, pieces of equal length, and word vectors from counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lossbook.data import python_text

END, RARE = "<end>", "<rare>"
Pieces = tuple[Tensor, Tensor]


class NextWords(NamedTuple):
    """A text cut into pieces; each part is the words ``(N, length)`` and the words that follow them, int64.

    Attributes:
        vocabulary: The word of each number.
        train: Four fifths of the paragraphs.
        validation: A tenth.
        test: A tenth.
    """

    vocabulary: tuple[str, ...]
    train: Pieces
    validation: Pieces
    test: Pieces


def help_words(size: int = 1500, *, length: int = 32) -> NextWords:
    """The prose of :func:`lossbook.data.python_text` as numbers, for a model that predicts the next word.

    Of ten paragraphs, eight are for training, one for validation, one for the test. The vocabulary holds a mark for
    the end of a paragraph (number 0), one for all rarer words (1), and the most frequent words of the training part.
    The paragraphs of a part are joined and cut into pieces of ``length`` words; what is left over at the end drops out.
    The text belongs to the Python that runs, so numbers differ a little from version to version.

    Args:
        size: Words of the vocabulary, with the two marks.
        length: Words of a piece.

    Raises:
        ValueError: ``size`` is below 3 or ``length`` below 1.

    Example:
        >>> text = help_words(100, length=8)
        >>> words, following = text.train
        >>> len(text.vocabulary), words.shape[1], bool((words[:, 1:] == following[:, :-1]).all())
        (100, 8, True)
    """
    if size < 3 or length < 1:
        raise ValueError(f"size must be at least 3 and length at least 1, got size={size}, length={length}")
    parts: dict[str, list[tuple[str, ...]]] = {"train": [], "validation": [], "test": []}
    for i, paragraph in enumerate(python_text()):
        parts["train" if i % 10 < 8 else ("validation", "test")[i % 10 - 8]].append(paragraph)
    counts = Counter(word for paragraph in parts["train"] for word in paragraph)
    vocabulary = (END, RARE, *(word for word, _ in counts.most_common(size - 2)))
    number = {word: i for i, word in enumerate(vocabulary)}

    def pieces(paragraphs: list[tuple[str, ...]]) -> Pieces:
        stream = [i for paragraph in paragraphs for i in (*(number.get(word, 1) for word in paragraph), 0)]
        n = (len(stream) - 1) // length
        words = torch.tensor(stream[: n * length + 1])
        return words[:-1].view(n, length), words[1:].view(n, length)

    return NextWords(vocabulary, *map(pieces, parts.values()))


def count_vectors(words: Tensor, size: int, *, dimensions: int = 64, reach: int = 2) -> Tensor:
    """Word vectors from counts of neighbours alone, a yardstick that no loss has seen.

    Counts how often two words stand within ``reach`` places, divides by what chance would give, takes the logarithm
    where it is above 0 (positive pointwise mutual information, PPMI), and keeps the dimensions that hold most of it.

    Args:
        words: Numbers of words, read in this order, int64, any shape.
        size: How many words there are.
        dimensions: Length of the vectors, at most ``size``.
        reach: How far apart neighbours may stand.

    Returns:
        float32, ``(size, dimensions)``. A word that does not occur has the vector 0.

    Example:
        >>> vectors = count_vectors(torch.tensor([0, 1, 2, 0, 3, 2, 0, 1, 2, 0, 3, 2]), 5, dimensions=3, reach=1)
        >>> vectors.shape, bool(F.cosine_similarity(vectors[1], vectors[3], dim=0) > 0.99)  # the same neighbours
        (torch.Size([5, 3]), True)
    """
    stream = words.flatten()
    pairs = torch.zeros(size, size)
    for gap in range(1, reach + 1):
        left, right = stream[:-gap], stream[gap:]
        one = torch.ones(len(left))
        pairs.index_put_((left, right), one, accumulate=True)
        pairs.index_put_((right, left), one, accumulate=True)
    total = pairs.sum(1, keepdim=True)
    chance = (total * total.T).clamp(min=1) / pairs.sum().clamp(min=1)
    strength, directions = torch.linalg.eigh((pairs / chance).clamp(min=1).log())
    largest = strength.abs().topk(dimensions).indices
    vectors: Tensor = directions[:, largest] * strength[largest].abs().sqrt()
    return vectors


def costs_to(vectors: Tensor, wanted: Tensor) -> Tensor:
    """The cost ``1 - cos`` from every word (columns) to each wanted word (rows), ``(N, size)``.

    Example:
        >>> costs_to(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 2]))
        tensor([[0., 1., 2.],
                [2., 1., 0.]])
    """
    unit = F.normalize(vectors, dim=-1)
    return 1 - unit[wanted] @ unit.T


def _groups(texts: Sequence[Sequence[int]], k: int) -> Iterator[tuple[int, ...]]:
    for row in texts:
        for i in range(len(row) - k + 1):
            yield tuple(row[i : i + k])


def distinct(texts: Tensor, k: int = 2) -> float:
    """Distinct-k: the share of different ones among all groups of ``k`` neighbours in the rows of ``texts``.

    Example:
        >>> distinct(torch.tensor([[1, 2, 1, 2], [1, 2, 3, 4]]))  # 12 21 12, 12 23 34: four of six
        0.6666666666666666
    """
    groups = list(_groups(texts.tolist(), k))
    return len(set(groups)) / len(groups)


__all__ = ["END", "RARE", "NextWords", "Pieces", "costs_to", "count_vectors", "distinct", "help_words"]
