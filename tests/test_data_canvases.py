"""The three sets of canvases of chapter 1."""

import pytest
import torch

from lossbook.data import digit_canvases
from lossbook.data.canvases import canvas_sets


@pytest.mark.parametrize("cells", [1, 3])
def test_the_sets_have_their_sizes_and_few_true_labels(cells):
    sets = canvas_sets(cells)
    assert [len(images) for images, _ in sets] == [2000, 500, 1000]
    for images, labels in sets:
        assert images.shape[1:] == (1, 8 * cells, 8 * cells)
        assert labels.shape[1:] == (10 * cells**2,)
        assert labels.dtype == torch.bool
        assert int(labels.sum(1).max()) == min(3, cells**2)


def test_the_sets_are_the_same_every_time_and_differ_from_one_another():
    first, second = canvas_sets(2), canvas_sets(2)
    for a, b in zip(first, second, strict=True):
        assert a.images.equal(b.images)
        assert a.labels.equal(b.labels)
    assert not first.train.labels[:500].equal(first.validation.labels)


def test_each_set_draws_from_its_own_digits():
    images, labels = digit_canvases(1000, grid=(2, 2), seed=2, split="test")
    test = canvas_sets(2).test
    assert test.images.equal(images)
    assert test.labels.equal(labels)
