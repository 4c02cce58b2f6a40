"""The network of the canvases."""

import pytest
import torch

from lossbook.models import CanvasNet
from lossbook.training import seeded


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
def test_scores_stand_in_the_order_of_the_targets(grid):
    """The score of (cell, digit) depends on that cell alone: change one cell, and its ten scores change."""
    rows, columns = grid
    with seeded(0):
        net = CanvasNet(8)
        images = torch.rand(2, 1, 8 * rows, 8 * columns)
    before = net(images)
    assert before.shape == (2, rows * columns * 10)
    for cell in range(rows * columns):
        r, c = divmod(cell, columns)
        changed = images.clone()
        changed[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] = 1 - changed[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        moved = ((net(changed) - before).abs() > 1e-6).any(0).view(rows * columns, 10)
        assert moved[cell].all()
        assert moved.any(1).sum() == 1


def test_ten_scores_of_a_cell_are_those_of_its_digit_alone():
    with seeded(0):
        net = CanvasNet(8)
        cell = torch.rand(1, 1, 8, 8)
    assert torch.allclose(net(cell.repeat(1, 1, 2, 2)).view(4, 10), net(cell).expand(4, 10), atol=1e-6)
    # The order of the ten is that of the last layer's channels.
    with torch.no_grad():
        net.layers[-1].weight.zero_()
        net.layers[-1].bias.copy_(torch.arange(10.0))
    assert net(cell).tolist() == [list(range(10))]


def test_as_many_weights_for_any_canvas():
    assert sum(p.numel() for p in CanvasNet(64).parameters()) == (64 * 64 + 64) + (64 * 10 + 10)
