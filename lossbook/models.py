"""The small networks that the chapters train, the same for every loss."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lossbook.data import DIGIT_SIZE


class CanvasNet(nn.Module):
    """Scores which digit stands in which cell of a canvas (see :func:`lossbook.data.digit_canvases`).

    Every cell is read by the same small convolutional network, so the canvas may have any number of cells, and the
    network has the same weights to learn for 10 labels as for 1000.

    Shapes: images ``(B, 1, 8 * rows, 8 * columns)``, scores ``(B, 10 * rows * columns)``.

    Args:
        width: Channels of the hidden layer.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=DIGIT_SIZE, stride=DIGIT_SIZE),  # one window per cell
            nn.ReLU(),
            nn.Conv2d(width, 10, kernel_size=1),  # ten scores per cell
        )

    def forward(self, images: Tensor) -> Tensor:
        """The scores of all labels, cell by cell in the order of the targets."""
        per_cell: Tensor = self.layers(images)  # (B, 10, rows, columns)
        return per_cell.permute(0, 2, 3, 1).flatten(1)


WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)*")  # what a question is cut into, after lower()


def text_features(texts: Sequence[str], *, buckets: int = 4096) -> Tensor:
    """Each text as a table of numbers: a row for each word, and in it the word itself and its runs of three letters.

    A word and its pieces are hashed to numbers from 1 to ``buckets - 1``, so there is no list of known words. A new
    word has numbers, and a word with a typing error shares most of them with the right one. Upper and lower case are
    the same. 0 fills the table where a text has fewer words or a word fewer pieces.

    Args:
        texts: Any number of texts.
        buckets: One more than the number of different numbers. Some pieces meet in one number by chance.

    Returns:
        int64, ``(N, words, pieces)``: as many words and pieces as the largest of the texts needs, at least one each.

    Raises:
        ValueError: ``buckets`` is below 2.

    Example:
        >>> text_features(["Lost my card", "lost"]).shape  # <lost>, <lo, los, ost, st>
        torch.Size([2, 3, 5])
    """
    if buckets < 2:
        raise ValueError(f"buckets must be at least 2, got {buckets}")
    table = [[_pieces(word) for word in WORD.findall(text.lower())] for text in texts]
    words = max((len(rows) for rows in table), default=0)
    pieces = max((len(row) for rows in table for row in rows), default=0)
    features = np.zeros((len(table), max(words, 1), max(pieces, 1)), dtype=np.int64)
    for i, rows in enumerate(table):
        for j, row in enumerate(rows):
            features[i, j, : len(row)] = [1 + zlib.crc32(piece.encode()) % (buckets - 1) for piece in row]
    return torch.from_numpy(features)


def _pieces(word: str) -> list[str]:
    """The word between its marks, and every three letters of that."""
    marked = f"<{word}>"
    return [marked] + [marked[i : i + 3] for i in range(len(marked) - 2) if len(marked) > 3]


class TextEncoder(nn.Module):
    """A text as a vector: the mean of its words' vectors, and beside it the mean state of a GRU that reads them.

    The mean of the words makes texts alike that share words, already before training. The GRU sees the words' order.
    A word's vector is the sum of its pieces' vectors, divided by the root of their number.

    Padding has no influence: a text has the same vector alone and in any batch, to rounding. A text without words has
    the zero vector.

    Shapes: features ``(B, words, pieces)`` of :func:`text_features`, vectors ``(B, size + hidden)``.

    Args:
        size: Length of a word's vector.
        hidden: Length of the GRU's state. 0 leaves the GRU out.
        buckets: As in :func:`text_features`.
        dropout: Share of the words that are left out of a text in training.
        gain: Factor of the GRU's states.
        features: Features of many texts, without labels. Pieces that are in few of them get long vectors at the start:
            the logarithm of how rare they are, as in TF-IDF. Without them all are of length about 1.

    Attributes:
        out_features: ``size + hidden``.
    """

    def __init__(
        self,
        size: int = 256,
        hidden: int = 32,
        *,
        buckets: int = 4096,
        dropout: float = 0.2,
        gain: float = 0.3,
        features: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.out_features = size + hidden
        self.dropout, self.gain = dropout, gain
        self.pieces = nn.EmbeddingBag(buckets, size, mode="sum", padding_idx=0)
        self.gru = nn.GRU(size, hidden, batch_first=True) if hidden else None
        with torch.no_grad():
            nn.init.normal_(self.pieces.weight, std=size**-0.5)
            if features is not None:
                self.pieces.weight *= _rarity(features, buckets).unsqueeze(1)
            self.pieces.weight[0] = 0

    def forward(self, features: Tensor) -> Tensor:
        """The vectors of the texts."""
        there = (features > 0).any(-1)  # (B, words)
        lengths = there.sum(1)
        words = features[there]  # only the words that exist, (W, pieces)
        number = (words > 0).sum(1)
        vectors: Tensor = self.pieces(words[words > 0], number.cumsum(0) - number) / number.sqrt().unsqueeze(1)
        if self.training and self.dropout:
            vectors = vectors * (torch.rand(len(vectors), 1, device=vectors.device) >= self.dropout)
        x = vectors.new_zeros(*there.shape, vectors.shape[1])
        x[there] = vectors
        total = x.sum(1)
        if self.gru is not None:
            # The GRU stops at the end of each text. It cannot read an empty one, so that gets one word of zeros.
            packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            states, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)  # 0 behind the end
            total = torch.cat([total, self.gain * states.sum(1) * (lengths > 0).unsqueeze(1)], -1)
        return total / lengths.clamp(min=1).unsqueeze(1)


def _rarity(features: Tensor, buckets: int) -> Tensor:
    """``1 + log((1 + N) / (1 + n))`` of each number, n of the N texts having it; divided by the mean over numbers."""
    has = torch.zeros(len(features), buckets, dtype=torch.bool, device=features.device)
    has.scatter_(1, features.flatten(1), True)
    rarity = 1 + torch.log((1 + len(features)) / (1 + has.sum(0)))
    return rarity / rarity.mean()


class WordModel(nn.Module):
    """Scores which word comes next: a word's vector, one GRU, and the same vectors once more to score every word.

    Input and output share their vectors, so that they are well trained even on a short text.

    Shapes: words ``(B, T)``, integers in [0, words); scores ``(B, T, words)``. The scores at place t see the words up
    to t and nothing after.

    Args:
        words: How many words there are.
        hidden: Length of the word vectors and of the GRU's state.
        dropout: Share of the GRU's inputs and outputs that training drops.
    """

    def __init__(self, words: int, hidden: int = 96, dropout: float = 0.0) -> None:
        super().__init__()
        self.vectors = nn.Embedding(words, hidden)
        self.gru = nn.GRU(hidden, hidden, batch_first=True)
        self.bias = nn.Parameter(torch.zeros(words))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.vectors.weight, std=hidden**-0.5)  # scores of size 1 at the start

    def hidden(self, words: Tensor) -> Tensor:
        """The states ``(B, T, hidden)`` that the scores are made of."""
        states: Tensor = self.dropout(self.gru(self.dropout(self.vectors(words)))[0])
        return states

    def forward(self, words: Tensor) -> Tensor:
        """The scores of the next word, after each word."""
        return F.linear(self.hidden(words), self.vectors.weight, self.bias)
