"""Options of a training run, as they appear on the command line and in RUN/config.json."""

import dataclasses
import json
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from sslfast.train.checkpoint import write_text
from sslfast.train.processes import on_machine


@dataclass(frozen=True)
class TrainConfig:
    """What every method shares."""

    out: Path
    """Folder of the run: config, metrics, checkpoint, weights, evaluation, TensorBoard and pictures."""
    data: str = "mnist5k"
    """mnist5k (5,000 MNIST digits), photos (crops of scikit-image's photographs), folder:PATH (class
    sub-folders optional), webdataset:PATH (tar shards, a folder of them or a name with {000..146}), npz:PATH,
    torchvision:NAME or huggingface:NAME."""
    epochs: int = 20
    batch_size: int = 256
    """Images of one loss, of all processes together."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one update; each is a loss with its own negatives."""
    seed: int = 0
    backbone: str = "compact"
    """compact (a small ResNet for CPUs), resnet18, resnet50, vit_nano (for CPUs), vit_tiny, vit_small,
    vit_base, vit_large, vit_huge, torchvision:MODEL or timm:MODEL."""
    stem: Literal["auto", "small", "imagenet"] = "auto"
    """Of resnet18 and resnet50; auto: small up to 64 pixels."""
    patch_size: int = 0
    """Of a ViT; divides the side of the images. 0: the largest of 16, 8, 4, 2, 1 that leaves seven a side."""
    heads: int = 0
    """Of a ViT; 0: those of its name. MoCo v3 has 12 in vit_small."""
    positions: Literal["learned", "fixed"] = "learned"
    """Of a ViT; fixed: sine and cosine."""
    image_size: int = 64
    """Side in pixels of views and of the images that are evaluated; mnist5k and npz keep theirs. Files are
    kept whole, but with less than 16/7 of it on the shorter side."""
    augment: Literal["auto", "simclr", "byol", "mocov1", "mocov2", "mocov3", "dino", "mae", "mnist"] = "auto"
    """The recipe of a paper, or mnist; auto: mnist for mnist5k, otherwise the method's own."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """sgd and lars with momentum 0.9."""
    learning_rate: float | None = None
    """Peak, after the warm-up. None: 2e-3 for adamw, and per 256 images of an update 0.03 for sgd and 0.3 for
    lars."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """Of the learning rate; steps: a tenth of it from 60% of the run on, a hundredth from 80%."""
    weight_decay: float = 1e-4
    """Not applied to biases and normalisation weights, but for moco and mocov3 without lars, as published."""
    warmup_epochs: float = 2.0
    clip_norm: float = 0.0
    """Greatest norm of the gradient of all parameters together; 0: not clipped."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of autocast; auto: bfloat16 on a GPU and on a CPU with AMX, where it is faster; otherwise float32."""
    compile: bool = False
    """Compile the method's forward pass with torch.compile."""
    device: str = "auto"
    """auto: a GPU if there is one, otherwise the CPU. Each process of torchrun takes one of its own."""
    cache_gib: float = 4.0
    """A data set of files whose pixels take no more than this is decoded once; otherwise in every epoch."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes that decode images in every epoch, for each one that trains."""
    knn_every: int = 0
    """Epochs between two measurements of kNN accuracy; 0: only after training."""
    checkpoint_minutes: float = 10.0
    """A checkpoint is written after every epoch, and within one when the last is older than this."""
    sync_batchnorm: bool = True
    """BatchNorm over the batch of all processes that torchrun starts."""
    timeout_minutes: float = 10.0
    """How long a process waits for another before it gives up."""
    wandb: str = ""
    """Project of Weights & Biases that gets the metrics too, if its package is installed."""
    resume: bool = False
    """Go on with the run in the same folder; options that are not given are the run's."""
    overwrite: bool = False
    """Replace an earlier run in the same folder."""

    recipe: ClassVar[str] = "simclr"  # the method's own augmentation

    def __post_init__(self) -> None:
        self._check_types()
        self.check_at_least(0, "workers", "knn_every", "seed", "heads", "patch_size")
        self.check_at_least(1, "epochs", "accumulate")
        self.check_at_least(2, "batch_size")
        self.check_at_least(8, "image_size")
        if self.seed >= 1 << 32:
            raise ValueError(f"seed: expected less than 2^32, got {self.seed}")
        for name in (
            "learning_rate", "weight_decay", "warmup_epochs", "clip_norm", "checkpoint_minutes", "cache_gib",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number that is not negative, got {value}")
        self.check_positive("timeout_minutes")
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected --resume or --overwrite, got both")

    def check_positive(self, *names: str) -> None:
        for name in names:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    def check_at_least(self, low: int, *names: str) -> None:
        for name in names:
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")

    def check_share(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number in [0, 1], got {getattr(self, name)}")

    def _check_types(self) -> None:
        """A config comes from the command line, from a file, or from Python, which checks nothing."""
        hints = typing.get_type_hints(type(self))
        for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(self)):
            value, options = getattr(self, name), typing.get_args(hint)
            if typing.get_origin(hint) is Literal:
                fits, expected = value in options, "one of " + ", ".join(options)
            else:
                kinds = options or (hint,)
                numbers = (int,) if float in kinds and not isinstance(value, bool) else ()
                fits = isinstance(value, (*kinds, *numbers)) and (
                    bool in kinds or not isinstance(value, bool)
                )
                expected = " or ".join(kind.__name__ for kind in kinds)
            if not fits:
                raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def resolve_device(self) -> torch.device:
        try:
            auto = "cuda" if torch.cuda.is_available() else "cpu"
            device = torch.device(auto if self.device == "auto" else self.device)
            torch.empty(1, device=device).cpu()  # the meta device has nothing to copy
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"device: expected one that this machine has, got {self.device!r}") from error
        here, gpus = on_machine()[1], torch.cuda.device_count()
        if device.type == "cuda" and here > 1 and (here > gpus or device.index is not None):
            raise ValueError(
                f"device: expected cpu, or cuda with a GPU for each of {here} processes, got {device} and "
                f"{gpus} of them"
            )
        return device

    def memory(self) -> int:
        """Bytes of cache_gib."""
        return round(self.cache_gib * (1 << 30))

    def resolve_precision(self, device: torch.device) -> torch.dtype:
        if self.precision == "auto":
            fast = device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_amx_tile_supported())
            return torch.bfloat16 if fast else torch.float32
        return getattr(torch, self.precision)

    def resolve_learning_rate(self, images: int) -> float:
        """The peak for updates of so many images."""
        if self.learning_rate is not None:
            return self.learning_rate
        return {"adamw": 2e-3, "sgd": 0.03 * images / 256, "lars": 0.3 * images / 256}[self.optimizer]

    def resolve_augment(self) -> str:
        if self.augment == "auto":
            return "mnist" if self.data == "mnist5k" else self.recipe
        return self.augment


def identity(method: str, config: TrainConfig) -> dict:
    """The options that decide a run's weights: with others it is another run, and cannot be gone on with."""
    options = dataclasses.asdict(config)
    for name in (
        "out",
        "data",
        "device",
        "workers",
        "cache_gib",
        "knn_every",
        "checkpoint_minutes",
        "timeout_minutes",
        "wandb",
        "resume",
        "overwrite",
    ):
        del options[name]  # data may have moved: the images themselves are compared
    return {"method": method, **options, "augment": config.resolve_augment()}


def save(method: str, config: TrainConfig, path: Path) -> None:
    write_text(path, json.dumps({"method": method, **values(config)}, indent=2) + "\n")


def values(config: TrainConfig) -> dict:
    """The options of a run, without those of a call, as JSON can have them."""
    found = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()}
    del found["resume"], found["overwrite"]
    return found


def load(run: Path) -> tuple[str, TrainConfig]:
    """The method and config of a run folder; the folder may have moved since."""
    from sslfast.train import methods

    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"run: expected the folder of a run, with a config.json, got {run}")
    try:
        options = json.loads(path.read_text())
        method = options.pop("method")
        return method, methods.module(method).Config(**{**options, "out": run})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"run: {path} is not the config of a run that this version knows: {error}"
        ) from error
