"""A student with all kinds of parameters and buffers, and what is compared of it."""

import torch
from torch import nn


def network() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4)
    )
    net[4].bias.requires_grad_(False)
    net.register_buffer("table", torch.arange(5))
    return net


def moved(model: nn.Module) -> nn.Module:
    """Other numbers everywhere."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        for x in model.buffers():
            x.add_(3)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in model.state_dict().items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(actual[name], x, msg=lambda text, name=name: f"{name}: {text}")
