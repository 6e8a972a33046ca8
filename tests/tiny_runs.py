"""Runs of 8 updates, and what is compared of them."""

import torch
from safetensors.torch import load_file

from sslfast.train.methods.simclr import Config as SimCLRConfig


def config(out, images, **changes) -> SimCLRConfig:
    """2 epochs of 4 updates."""
    values = dict(
        out=out, data=images, epochs=2, batch_size=8, warmup_epochs=0.5, device="cpu", augment="mnist"
    )
    return SimCLRConfig(**{**values, **changes})


def weights(cfg) -> dict[str, torch.Tensor]:
    return load_file(cfg.out / "weights.safetensors")


def assert_same_weights(one, other) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def timeless(cfg) -> list[str]:
    """metrics.csv without its last ten columns, which are times."""
    return [line.rsplit(",", 10)[0] for line in (cfg.out / "metrics.csv").read_text().splitlines()]
