"""Mixtures of digit canvases."""

import pytest
import torch

from lossbook.data import digit_canvases
from lossbook.data.mixtures import mixed_canvases


def test_images_and_targets_are_mixed_alike():
    mixed = mixed_canvases(25, pool=10, seed=3, split="test")
    images, truth = digit_canvases(10, seed=3, split="test")
    rows = {tuple(row): image for row, image in zip(truth.tolist(), images, strict=True)}
    assert len(rows) > 5
    for image, one, two, lam in zip(*mixed, strict=True):
        unique = all((truth == row).all(1).sum() == 1 for row in (one, two))
        if unique:
            expected = lam * rows[tuple(one.tolist())] + (1 - lam) * rows[tuple(two.tolist())]
            torch.testing.assert_close(image, expected)
    torch.testing.assert_close(mixed.target, mixed.lam * mixed.one + (1 - mixed.lam) * mixed.two)
    assert mixed.target.dtype == torch.float32


def test_every_canvas_comes_equally_often():
    mixed = mixed_canvases(30, pool=10, seed=0)
    _, truth = digit_canvases(10, seed=0)
    for side in (mixed.one, mixed.two):
        assert side.sum(0).equal(3 * truth.sum(0))


def test_lambda_is_given_or_drawn_and_the_pairs_stay():
    free, fixed = mixed_canvases(200, pool=50, seed=1), mixed_canvases(200, pool=50, lam=0.25, seed=1)
    assert free.one.equal(fixed.one)
    assert free.two.equal(fixed.two)
    assert set(fixed.lam.flatten().tolist()) == {0.25}
    assert 0.4 < free.lam.mean() < 0.6
    assert free.lam.min() < 0.1 < 0.9 < free.lam.max()


def test_no_mixture():
    assert mixed_canvases(0, seed=0).images.shape == (0, 1, 32, 32)


@pytest.mark.parametrize("options", [{"pool": 0}, {"lam": 1.5}, {"lam": -0.1}])
def test_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        mixed_canvases(3, seed=0, **options)
