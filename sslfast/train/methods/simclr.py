"""SimCLR (Chen et al. 2020): two views of each image attract, all other views in the batch repel."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslfast.distributed import world
from sslfast.losses import NTXentLoss
from sslfast.train import models
from sslfast.train.budget import phase
from sslfast.train.config import TrainConfig
from sslfast.train.methods import Method


@dataclass(frozen=True)
class Config(TrainConfig):
    """SimCLR (Chen et al. 2020)."""

    temperature: float = 0.5
    """As the official code has it for CIFAR-10; it has 0.1 for ImageNet."""
    projection_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")
        self.check_at_least(1, "projection_dim")


def build(cfg: Config, channels: int, size: int) -> Method:
    encoder = models.build(cfg, channels, size)
    return SimCLR(encoder, encoder.dim, cfg.projection_dim, cfg.temperature)


class SimCLR(Method):
    """Encoder, projector and NT-Xent.

    The projector is the official code's (version 2): three linear layers without biases, each with BatchNorm;
    hidden ones as wide as the encoder's output; the last BatchNorm has a scale but no shift.
    """

    def __init__(
        self, encoder: nn.Module, dim: int, projection_dim: int = 128, temperature: float = 0.2
    ) -> None:
        super().__init__()
        self.encoder = encoder
        last = nn.BatchNorm1d(projection_dim)
        last.bias.requires_grad_(False)  # stays 0
        self.projector = nn.Sequential(
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(),
            nn.Linear(dim, projection_dim, bias=False), last,
        )  # fmt: skip
        self.loss = NTXentLoss(temperature, group=world())

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views of a batch; BatchNorm sees both at once."""
        z1, z2 = self.projector(self.encoder(torch.cat(tuple(views)))).chunk(2)
        with phase("loss"):
            return self.loss(z1, z2), {"embeddings": z1.detach()}
