"""What a masked autoencoder reconstructs, as a picture and as a number."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sslfast.ops import patchify, unpatchify
from sslfast.train import report
from sslfast.train.data import ImageSet
from sslfast.train.run import RECONSTRUCTION
from sslfast.train.vit import ViT


class Reconstructs(Protocol):
    encoder: ViT
    norm_pix: bool

    def reconstruct(
        self, images: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@torch.no_grad()
def show(
    model: Reconstructs, images: ImageSet, out: Path, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Draws reconstruction.png, and measures the squared error of the masked patches of up to 2,000 images
    beside that of the mean of each image's visible pixels.

    Predictions of normalised pixels are put back to the true mean and variance of their patch, so that they
    stand beside that mean too.
    """
    guesses = ["reconstruction", "visible mean", *(["mean of each patch"] if model.norm_pix else [])]
    generator = torch.Generator(device).manual_seed(0)
    patch, sums, shown = model.encoder.patch_size, torch.zeros(1 + len(guesses), device=device), None
    for pixels in images.squares(torch.arange(min(len(images), 2000)).split(250), device):
        pred, mask, _ = model.reconstruct(pixels, generator)
        target, pred = patchify(pixels, patch), pred.float()
        means = target.mean(2, keepdim=True)
        if model.norm_pix:
            pred = pred * (target.var(2, keepdim=True) + 1e-6).sqrt() + means
        visible = 1 - mask
        mean = (means[:, :, 0] * visible).sum(1) / visible.sum(1).clamp(min=1)
        guessed = (pred, mean[:, None, None], means)[: len(guesses)]
        errors = [((guess - target) ** 2).mean(2) for guess in guessed]
        sums += torch.stack([*((error * mask).sum() for error in errors), mask.sum()])
        shown = shown or (target[:10], mask[:10], pred[:10])
    if shown is None or not sums[-1]:
        return {}
    target, mask, pred = shown
    hidden = mask.bool()[:, :, None]
    rows = [torch.where(hidden, other, target) for other in (torch.full_like(target, 0.5), pred)]
    pictures = [unpatchify(x, patch, images.shape) for x in (*rows, target)]
    report.pictures(("masked", "reconstructed", "original"), pictures, out / RECONSTRUCTION)
    errors_of = dict(zip(guesses, (sums[:-1] / sums[-1]).tolist(), strict=True))
    return {"squared error of masked patches": {guess: [error] for guess, error in errors_of.items()}}
