"""MoCo v3 (Chen et al. 2021): each view predicts its key of the other view among the keys of the batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslfast import EMATeacher, cosine_momentum, info_nce_loss
from sslfast.distributed import world
from sslfast.train import models, optim
from sslfast.train.budget import phase
from sslfast.train.config import TrainConfig
from sslfast.train.methods import Method, Now, unit_rows
from sslfast.train.vit import ViT


@dataclass(frozen=True)
class Config(TrainConfig):
    """MoCo v3 (Chen et al. 2021).

    The paper's ViT-S: --backbone vit_small --heads 12 --positions fixed --weight-decay 0.1 --warmup-epochs 40
    at a batch of 4096. Its ResNet-50: --optimizer lars --temperature 1 --weight-decay 1.5e-6
    --warmup-epochs 10.
    """

    temperature: float = 0.2
    momentum: float = 0.99
    """Of the network of the keys at first; it rises to 1 on a cosine over the epochs."""
    hidden_dim: int = 4096
    projection_dim: int = 256

    recipe = "mocov3"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")
        self.check_share("momentum")
        self.check_at_least(1, "hidden_dim", "projection_dim")


def build(cfg: Config, channels: int, size: int) -> Method:
    encoder = models.build(cfg, channels, size)
    if isinstance(encoder, ViT):
        freeze_patch_embedding(encoder)
    return MoCoV3(encoder, encoder.dim, cfg.hidden_dim, cfg.projection_dim, cfg.momentum, cfg.temperature)


def freeze_patch_embedding(vit: ViT) -> None:
    """A random projection of the patches that is not trained, which keeps the training of a ViT stable."""
    weight = vit.patch_embed.weight  # [dim, C, p, p]
    bound = math.sqrt(6 / (weight[0].numel() + weight.shape[0]))
    nn.init.uniform_(weight, -bound, bound)
    assert vit.patch_embed.bias is not None
    nn.init.zeros_(vit.patch_embed.bias)
    vit.patch_embed.requires_grad_(False)


def mlp(dims: Sequence[int], last_batchnorm: bool = True) -> nn.Sequential:
    """Linear layers without biases, BatchNorm and ReLU between them, at the end BatchNorm without weights."""
    layers: list[nn.Module] = []
    for width_in, width in zip(dims[:-2], dims[1:-1], strict=True):
        layers += [nn.Linear(width_in, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=False))
    return nn.Sequential(*layers, *[nn.BatchNorm1d(dims[-1], affine=False)] * last_batchnorm)


class MoCoV3(Method):
    """Encoder, projector and predictor, and an average of the first two for the keys.

    A ViT has a projector of three layers and BatchNorm at the predictor's end, a ResNet two and none. The
    keys' network follows before each update's first batch, that is with the weights before it.
    """

    momentum: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        dim: int,
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        momentum: float = 0.99,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        is_vit = isinstance(encoder, ViT)
        self.encoder = encoder
        self.projector = mlp((dim, *(hidden_dim,) * (2 if is_vit else 1), projection_dim))
        self.predictor = mlp((projection_dim, hidden_dim, projection_dim), last_batchnorm=is_vit)
        self._followed = (nn.Sequential(self.encoder, self.projector),)  # a tuple is not registered
        self.keys = EMATeacher(self._followed[0], momentum, buffers="keep")
        self.first_momentum, self.temperature = momentum, temperature
        self.register_buffer("momentum", torch.tensor(momentum, dtype=torch.float64))

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        groups = optim.parameter_groups(self, weight_decay, vectors=True)  # as the official code has it
        return [{**group, "lr_in_momentum": False} for group in groups]

    def schedule(self, now: Now, groups: list[dict]) -> None:
        self.momentum.fill_(cosine_momentum(now.step, now.total, self.first_momentum))

    def before_step(self) -> None:
        self.keys.update(self._followed[0], self.momentum)

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Two views of a batch, each through the networks alone, so that BatchNorm sees one at a time."""
        queries = [unit_rows(self.predictor(self.projector(self.encoder(view)))) for view in views]
        keys = [unit_rows(self.keys(view)) for view in views]
        with phase("loss"):
            losses = [
                info_nce_loss(query, key, temperature=self.temperature, normalize=False, group=world())
                for query, key in zip(queries, reversed(keys), strict=True)
            ]
        loss = 2 * self.temperature * (losses[0] + losses[1])
        return loss, {"embeddings": queries[0].detach(), "targets": keys[1]}
