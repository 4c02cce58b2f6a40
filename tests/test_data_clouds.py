"""Two clouds of points."""

import pytest
import torch

from lossbook.data.clouds import two_clouds


def test_the_clouds_lie_where_they_should_and_overlap():
    points, target = two_clouds(2000, seed=1)
    assert points.dtype == target.dtype == torch.float64
    assert torch.equal(points[:, 2], torch.ones(4000, dtype=torch.float64))
    for value, sign in ((1.0, 1.0), (0.0, -1.0)):
        cloud = points[target == value, :2]
        assert len(cloud) == 2000
        assert torch.allclose(cloud.mean(0), sign * torch.tensor([1.0, 0.6], dtype=torch.float64), atol=0.1)
        assert torch.allclose(cloud.std(0), torch.ones(2, dtype=torch.float64), atol=0.1)
    wrong = (points[:, :2] @ torch.tensor([1.0, 0.6], dtype=torch.float64) > 0).double() != target
    assert 0.05 < wrong.double().mean() < 0.2


def test_a_seed_gives_the_same_points():
    assert torch.equal(two_clouds()[0], two_clouds(seed=0)[0])
    assert not torch.equal(two_clouds()[0], two_clouds(seed=1)[0])
    with pytest.raises(ValueError, match="n must be at least 0, got -2"):
        two_clouds(-2)
