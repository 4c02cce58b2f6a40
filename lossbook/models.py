"""The small networks that the chapters train, the same for every loss."""

from __future__ import annotations

from torch import Tensor, nn

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
