"""Fine-tuning: the whole encoder and a linear classifier are trained on the labels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.train import augment, loop, optim
from sslfast.train.config import TrainConfig
from sslfast.train.data import Dataset, in_one_copy
from sslfast.train.vit import ViT

RATE, DECAY, LAYER_DECAY, SMOOTHING = (
    1e-3,
    0.05,
    0.75,
    0.1,
)  # rate per 256 images; as MAE fine-tunes (He et al. 2022)


def run(encoder: nn.Module, dataset: Dataset, cfg: TrainConfig, epochs: int, device: torch.device) -> float:
    """Trains in place with the run's batch size and first view, and returns the accuracy on the test images.

    AdamW, a tenth of the run as warm-up, cosine; in a ViT each block's rate is 0.75 of the next one's.
    """
    train, labels, test = dataset.train, dataset.train.labels, dataset.test
    assert labels is not None and test.labels is not None
    channels, size, _ = train.shape
    torch.manual_seed(cfg.seed)
    encoder.requires_grad_(True)
    features: int = encoder.dim  # type: ignore[assignment]
    classifier = nn.Linear(features, len(dataset.classes))
    nn.init.trunc_normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(encoder, classifier).to(device)
    views = augment.one_view(cfg.resolve_augment(), size, channels)
    batch_size = min(cfg.batch_size, len(train))
    steps = len(train) // batch_size
    optimizer = optim.build("adamw", groups(model), device)
    dtype = cfg.resolve_precision(device)
    on_device = labels.to(device)
    for epoch in range(epochs):
        model.train()
        rows = loop.order(len(train), batch_size, cfg.seed, epoch)[:steps]
        seed = augment.epoch_seed(cfg.seed, epoch, augment.FINETUNING)
        batches = train.batches(in_one_copy(rows, train.device), device, cfg.workers)
        for step, (ids, images) in enumerate(zip(in_one_copy(rows, device), batches, strict=True)):
            factor = optim.warmup_cosine(epoch * steps + step, 0.1 * epochs * steps, epochs * steps)
            optim.set_rate(optimizer, RATE * batch_size / 256 * factor)
            (view,) = views(images, ids, seed)
            with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
                logits = model(view)
            loss = F.cross_entropy(logits.float(), on_device[ids], label_smoothing=SMOOTHING)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return _accuracy(model.eval(), dataset, device, cfg.workers)


@torch.no_grad()
def _accuracy(model: nn.Module, dataset: Dataset, device: torch.device, workers: int) -> float:
    labels = dataset.test.labels
    assert labels is not None
    rows = torch.arange(len(labels)).split(dataset.test.batch_size)
    predicted: list[Tensor] = [
        model(batch).argmax(1).cpu() for batch in dataset.test.squares(rows, device, workers)
    ]
    return (torch.cat(predicted) == labels).float().mean().item()


def groups(model: nn.Sequential) -> list[dict]:
    """Parameter groups; in a ViT those of earlier blocks have a lower rate (`lr_scale`)."""
    encoder = model[0]
    depth = len(encoder.blocks) if isinstance(encoder, ViT) else 0
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        layer = 0
        if depth and name.startswith("0.blocks."):
            layer = 1 + int(name.split(".")[2])
        elif not depth or name.startswith(("0.norm.", "1.")):
            layer = depth + 1
        by_scale.setdefault(LAYER_DECAY ** (depth + 1 - layer), []).append(p)
    return [
        {"params": part, "weight_decay": DECAY * (dim > 1), "lr_scale": scale}
        for scale, params in by_scale.items()
        for dim in (1, 2)
        if (part := [p for p in params if min(p.ndim, 2) == dim])
    ]
