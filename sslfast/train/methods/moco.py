"""MoCo v1 and v2 (He et al. 2020; Chen et al. 2020): a query finds its key among a queue of older keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from sslfast import EMATeacher, KeyQueue, moco_loss
from sslfast.distributed import world
from sslfast.train import models, optim
from sslfast.train.batchnorm import shuffled, split_batchnorm
from sslfast.train.budget import phase
from sslfast.train.config import TrainConfig
from sslfast.train.methods import Method, unit_rows
from sslfast.train.processes import processes


@dataclass(frozen=True)
class Config(TrainConfig):
    """MoCo v2 (Chen et al. 2020); v1: --head linear --temperature 0.07 --schedule steps --augment mocov1."""

    head: Literal["mlp", "linear"] = "mlp"
    temperature: float = 0.2
    momentum: float = 0.99
    """Of the network of the keys. The paper has 0.999, for 200 epochs of ImageNet."""
    queue_size: int = 4096
    """Keys that a query is compared with; fewer than there are images. The paper has 65536 for ImageNet."""
    projection_dim: int = 128
    sync_batchnorm: bool = False
    """BatchNorm over the batch of all processes, in place of which keys are shuffled among them."""
    bn_splits: int = 8
    """Parts of a batch that are normalised apart, as on so many GPUs; on several processes each is one."""

    recipe = "mocov2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_positive("temperature")
        self.check_share("momentum")
        self.check_at_least(1, "queue_size", "projection_dim", "bn_splits")


def build(cfg: Config, channels: int, size: int) -> Method:
    encoder = models.build(cfg, channels, size)
    head = nn.Linear(encoder.dim, cfg.projection_dim)
    mlp = nn.Sequential(nn.Linear(encoder.dim, encoder.dim), nn.ReLU(), head)
    projector = mlp if cfg.head == "mlp" else head
    if cfg.bn_splits > 1 and processes() == 1:
        split_batchnorm(encoder, cfg.bn_splits)
    queue = KeyQueue(cfg.queue_size, cfg.projection_dim)
    return MoCo(encoder, projector, queue, cfg.momentum, cfg.temperature)


class MoCo(Method):
    """Encoder and projector of the queries, their average for the keys, and the queue.

    The keys' network follows before each update's first batch, that is with the weights before it; its
    BatchNorm runs on its own batches, which are shuffled. Keys enter the queue after the loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        queue: KeyQueue,
        momentum: float = 0.999,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        self.encoder, self.projector, self.queue, self.temperature = encoder, projector, queue, temperature
        self._followed = (nn.Sequential(encoder, projector),)  # a tuple is not registered
        self.keys = EMATeacher(self._followed[0], momentum, buffers="keep")

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        return optim.parameter_groups(self, weight_decay, vectors=True)  # as the official code has it

    def before_step(self) -> None:
        self.keys.update(self._followed[0])

    def training_step(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        query = unit_rows(self.projector(self.encoder(views[0])))
        key = unit_rows(shuffled(self.keys, views[1]))
        with phase("loss"):
            loss = moco_loss(query, key, self.queue.keys, self.temperature, normalize=False, group=world())
            self.queue.enqueue(key, group=world())
        return loss, {"embeddings": query.detach(), "targets": key}
