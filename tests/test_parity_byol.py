"""Golden parity of BYOL: see test_parity_simclr. Grill et al. 2020, and the definitions of their code."""

import math

import plain
import pytest
import torch
from plain import STEPS, adamw, lars_outside, unit

from sslfast.train import loop
from sslfast.train.methods.byol import Config

HIDDEN, OUT = 24, 12
BEFORE_NORM = ("projector.0.bias", "predictor.0.bias")  # BatchNorm takes them off again: no gradient


class Plain(plain.Plain):
    def __init__(self, state, momentum):
        super().__init__(state, untrained=("target.",))
        self.first_momentum = momentum

    def mlp(self, x, name):
        x = x @ self.values[f"{name}.0.weight"].T + self.values[f"{name}.0.bias"]
        return self.norm(x, f"{name}.1").clamp(min=0) @ self.values[f"{name}.3.weight"].T

    def predict(self, view):
        return self.mlp(self.mlp(self.compact(view, "encoder"), "projector"), "predictor")

    def target(self, view):
        return self.mlp(self.compact(view, "target.model.0"), "target.model.1")

    def loss(self, first, second):
        """The squared distance of unit vectors, in both directions; every view is normalised by itself."""
        p1, p2 = unit(self.predict(first)), unit(self.predict(second))
        z1, z2 = unit(self.target(first)), unit(self.target(second))
        return (((p1 - z2) ** 2).sum(1) + ((p2 - z1) ** 2).sum(1)).mean()

    def after_update(self, k):
        """k is the index of this update: the first has the first momentum."""
        momentum = 1 - (1 - self.first_momentum) * (1 + math.cos(math.pi * k / STEPS)) / 2
        self.values["momentum"] = torch.tensor(momentum, dtype=torch.float64)
        self.follow("target", momentum)


def config(tmp_path, **changes):
    values = dict(hidden_dim=HIDDEN, projection_dim=OUT, momentum=0.9)
    return plain.config(Config, tmp_path, **{**values, **changes})


@pytest.mark.parametrize(
    "name, rule, changes",
    [
        ("lars", lars_outside, dict(learning_rate=3.1)),
        ("adamw", adamw, dict(learning_rate=1e-4)),
        ("lars", lars_outside, dict(learning_rate=3.1, accumulate=2, momentum=0.5)),
    ],
    ids=["lars", "adamw", "accumulate"],
)
def test_training_is_the_plain_version(name, rule, changes, tmp_path):
    cfg = config(tmp_path, optimizer=name, **changes)
    model = plain.build("byol", cfg, teacher="target")
    plain.train_both(model, Plain(model.state_dict(), cfg.momentum), cfg, rule, idle=BEFORE_NORM)


def test_networks(tmp_path):
    """A bias in the first layer alone, no BatchNorm at the end; the target begins elsewhere, unpredicting."""
    state = loop.build("byol", config(tmp_path), channels=1, size=28).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}

    def mlp(name, width):
        norm = ("weight", "bias", "running_mean", "running_var")
        return {
            f"{name}.0.weight": (HIDDEN, width),
            f"{name}.0.bias": (HIDDEN,),
            **{f"{name}.1.{key}": (HIDDEN,) for key in norm},
            f"{name}.1.num_batches_tracked": (),
            f"{name}.3.weight": (OUT, HIDDEN),
        }

    heads = mlp("projector", 128) | mlp("predictor", OUT) | mlp("target.model.1", 128)
    encoder = {key: shape for key, shape in shapes.items() if key.startswith("encoder.")}
    target = {key.replace("encoder.", "target.model.0.", 1): shape for key, shape in encoder.items()}
    assert shapes == encoder | target | heads | {"momentum": ()}
    for ours, theirs in (("encoder", "target.model.0"), ("projector", "target.model.1")):
        for key in (key for key in state if key.startswith(f"{ours}.") and state[key].dim() > 1):
            assert (state[key] - state[key.replace(ours, theirs, 1)]).abs().max() > 1e-3, key


def test_sizes_are_the_papers(tmp_path):
    cfg = Config(out=tmp_path)
    assert (cfg.hidden_dim, cfg.projection_dim) == (4096, 256)
