"""Scenes for the detector: where digits stand, what is noise, and that splits share nothing."""

import numpy as np
import pytest
import torch

from lossbook.data import SPLITS, _source_digits
from lossbook.data.scenes import SIDE, SPOTS, digit_scenes


def test_shapes_and_two_digits_in_every_scene():
    images, truth = digit_scenes(20, seed=3)
    assert images.shape == (20, 1, SIDE, SIDE)
    assert images.dtype == torch.float32
    assert truth.shape == (20, SPOTS**2)
    assert truth.dtype == torch.bool
    assert (truth.sum(1) == 2).all()
    assert images.min() >= 0
    assert images.max() <= 1
    assert digit_scenes(0, seed=0)[1].shape == (0, SPOTS**2)


def test_a_seed_gives_the_same_scenes_and_another_does_not():
    first, again, other = (digit_scenes(4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("split", SPLITS)
def test_a_digit_of_the_split_stands_where_the_label_says(split):
    images, truth = digit_scenes(3, split=split, seed=5)
    digits = torch.from_numpy(_source_digits()[0][SPLITS[split]]).flatten(1)

    def far(window):
        """How far a window is from the nearest digit of the split."""
        return (digits - window.flatten()).square().mean(1).min().item()

    for image, true in zip(images[:, 0], truth, strict=True):
        windows = {spot: image[spot // SPOTS :, spot % SPOTS :][:8, :8] for spot in range(SPOTS**2)}
        nearest = sorted(windows, key=lambda spot: far(windows[spot]))
        assert true[nearest[:2]].all()
        assert far(windows[nearest[0]]) < 0.05  # the noise has variance 0.04, less where it is cut at 0 and 1


def test_outside_the_six_things_there_is_noise_only():
    images, _ = digit_scenes(50, seed=7)
    assert images[:, 0, -2:].mean() < 0.2  # a wreck or digit reaches the last rows seldom
    assert 0.05 < images.mean() < 0.25
    assert np.isclose(images[:, 0, -1, -1].mean(), 0.2 / np.sqrt(2 * np.pi), atol=0.05)


def test_what_is_refused():
    with pytest.raises(ValueError, match="n must be at least 0, got -1"):
        digit_scenes(-1, seed=0)
    with pytest.raises(ValueError, match="split must be one of 'train', 'validation', 'test', got 'all'"):
        digit_scenes(1, split="all", seed=0)
