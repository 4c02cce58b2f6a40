"""The networks of the canvases and of the words."""

import pytest
import torch

from lossbook.models import CanvasNet, WordModel
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


def test_scores_see_the_words_up_to_here_and_none_after():
    with seeded(0):
        model = WordModel(11, 6)
    words = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    before = model(words)
    assert before.shape == (2, 7, 11)
    changed = words.clone()
    changed[0, 3] = (words[0, 3] + 1) % 11
    moved = ((model(changed) - before).abs() > 1e-7).any(-1)
    assert not moved[0, :3].any()
    assert moved[0, 3:].all()
    assert not moved[1].any()


def test_scores_are_states_times_the_input_vectors_plus_bias():
    with seeded(0):
        model = WordModel(11, 6)
        torch.nn.init.normal_(model.bias)
    words = torch.tensor([[1, 2, 3]])
    by_hand = model.hidden(words) @ model.vectors.weight.T + model.bias
    assert torch.allclose(model(words), by_hand, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == 11 * 6 + 11 + 2 * (3 * 6 * 6 + 3 * 6)


def test_dropout_acts_in_training_only():
    with seeded(0):
        model = WordModel(11, 64, dropout=0.5)
    words = torch.tensor([[1, 2, 3]])
    with seeded(1):
        assert (model.hidden(words) == 0).any()  # of the outputs
        assert not torch.allclose(model(words), model(words))
    model.eval()
    assert torch.equal(model(words), model(words))


def test_scores_start_at_size_one():
    with seeded(0):
        scores = WordModel(1500, 64)(torch.randint(1500, (4, 20)))
    assert 0.05 < scores.std().item() < 2
