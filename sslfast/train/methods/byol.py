"""BYOL (Grill et al. 2020): a network predicts what its slow follower sees in another view."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslfast import EMATeacher, byol_loss, cosine_momentum
from sslfast.train import models, optim
from sslfast.train.budget import phase
from sslfast.train.config import TrainConfig
from sslfast.train.methods import Method, Now


@dataclass(frozen=True)
class Config(TrainConfig):
    """BYOL (Grill et al. 2020)."""

    momentum: float = 0.99
    """Of the target at first; it rises to 1 on a cosine. The paper has 0.97 for 40 epochs, 0.99 for 100 and
    300, 0.996 for 1000."""
    hidden_dim: int = 4096
    projection_dim: int = 256

    recipe = "byol"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("momentum")
        self.check_at_least(1, "hidden_dim", "projection_dim")


def build(cfg: Config, channels: int, size: int) -> Method:
    online, target = (models.build(cfg, channels, size) for _ in range(2))
    return BYOL(online, target, online.dim, cfg.hidden_dim, cfg.projection_dim, cfg.momentum)


def mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    """The paper's projector and predictor: a bias in the first layer alone, no BatchNorm at the end."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out, bias=False)
    )


class BYOL(Method):
    """Encoder, projector and predictor; the target has no predictor, and weights of its own at first.

    The target's BatchNorm runs on its own batches. It follows after each update of the online network.
    """

    momentum: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        target_encoder: nn.Module,
        dim: int,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = mlp(dim, hidden_dim, projection_dim)
        self.predictor = mlp(projection_dim, hidden_dim, projection_dim)
        self._followed = (nn.Sequential(self.encoder, self.projector),)  # a tuple is not registered
        other = nn.Sequential(target_encoder, mlp(dim, hidden_dim, projection_dim))
        self.target = EMATeacher(other, momentum, buffers="keep")
        self.first_momentum = momentum
        self.register_buffer("momentum", torch.tensor(momentum, dtype=torch.float64))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        groups = optim.parameter_groups(self, weight_decay)
        return [{**group, "lr_in_momentum": False} for group in groups]

    def schedule(self, now: Now, groups: list[dict]) -> None:
        self.momentum.fill_(cosine_momentum(now.step, now.total, self.first_momentum))

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views of a batch, each through the networks alone, so that BatchNorm sees one at a time."""
        predictions = [self.predictor(self.projector(self.encoder(view))) for view in views]
        targets = [self.target(view) for view in views]
        with phase("loss"):
            loss = byol_loss(predictions[0], targets[1]) + byol_loss(predictions[1], targets[0])
        return loss, {"embeddings": predictions[0].detach(), "targets": targets[1]}

    def after_step(self) -> None:
        self.target.update(self._followed[0], self.momentum)
