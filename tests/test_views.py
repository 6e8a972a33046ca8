"""Views that the methods train on."""

import pytest
import torch

from sslfast.train import augment


@pytest.mark.parametrize("preset", [*augment.RECIPES, "mnist"])
@pytest.mark.parametrize("channels, size", [(3, 48), (1, 28)])
def test_views_of_every_recipe(preset, channels, size):
    images = torch.rand(100, channels, size, size)
    views = augment.two_views(preset, size, channels)
    torch.manual_seed(3)
    first = views(images)
    torch.manual_seed(3)
    assert all(torch.equal(a, b) for a, b in zip(first, views(images), strict=True))
    for view in first:
        assert view.shape == images.shape and view.min() >= 0 and view.max() <= 1
    assert (first[0] != first[1]).flatten(1).any(1).float().mean() > 0.6
    (one,) = augment.one_view(preset, size, channels)(images)
    assert one.shape == images.shape and (one != images).flatten(1).any(1).float().mean() > 0.3
