"""One file per method: what it trains, and its loss on the views of a batch."""

from torch import Tensor, nn


class Method(nn.Module):
    """What the loop needs of a method."""

    encoder: nn.Module
    """The network that is evaluated: images [B, C, H, W] -> features [B, dim]."""

    def training_step(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """views [2B, C, H, W], the first views of all images first -> (loss, metrics to log)."""
        raise NotImplementedError(f"{type(self).__name__} needs a training_step")
