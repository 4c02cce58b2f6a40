"""The small networks that the chapters train, the same for every loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
