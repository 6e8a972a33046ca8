"""What benchmarks/masking.py times: the ops as cases, their sizes and inputs, and what they must move."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import masking_plain as plain
import torch
from torch import Tensor

import sslfast

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels


@dataclass(frozen=True)
class Size:
    """Of the problem; MAE's in all that has a default."""

    batch: int
    dim: int
    dtype: torch.dtype
    width: int = 512
    image: int = 224
    patch: int = 16
    ratio: float = 0.75

    @property
    def length(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def keep(self) -> int:
        return int(self.length * (1 - self.ratio))

    @property
    def pixels(self) -> int:
        return 3 * self.patch**2


# The ops, as a library (`plain` or `ours`) does them with inputs x.

ours = SimpleNamespace(
    mask=lambda noise, ratio: sslfast.random_patch_mask(*noise.shape, ratio, noise=noise),
    gather=sslfast.gather_patches,
    restore=sslfast.restore_patches,
    embed=lambda images, ids, weight, bias, pos: sslfast.embed_visible_patches(
        images, ids, weight, bias, pos, patch_size=weight.shape[-1]
    ),
    loss=lambda pred, images, removed, patch, norm_pix, mean, std: sslfast.masked_patch_mse(
        pred, images, removed, patch_size=patch, norm_pix=norm_pix,
        **({"mean": MEAN, "std": STD} if images.dtype == torch.uint8 else {}),
    ),
)  # fmt: skip


def mask(lib, x: dict) -> tuple[Tensor, ...]:
    return tuple(lib.mask(x["noise"], x["ratio"]))


def mask_gather(lib, x: dict) -> tuple[Tensor, ...]:
    ids, ids_restore, removed = lib.mask(x["noise"], x["ratio"])
    return lib.gather(x["tokens"], ids, x["pos"]), ids_restore, removed


def restore(lib, x: dict) -> tuple[Tensor, ...]:
    return (lib.restore(x["latent"], x["ids_restore"], x["mask_token"], x["decoder_pos"]),)


def embed(lib, x: dict) -> tuple[Tensor, ...]:
    return (lib.embed(x["cast_images"], x["ids_keep"], x["weight"], x["bias"], x["pos"]),)


def loss(lib, x: dict, norm_pix: bool = True, images: str = "images") -> tuple[Tensor, ...]:
    return (lib.loss(x["pred"], x[images], x["removed"], x["patch"], norm_pix, x["mean"], x["std"]),)


def together(lib, x: dict) -> tuple[Tensor, ...]:
    """As in a step of MAE, less the networks between them."""
    tokens, ids_restore, removed = mask_gather(lib, x)
    return tokens, *restore(lib, {**x, "ids_restore": ids_restore}), *loss(lib, {**x, "removed": removed})


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[..., tuple[Tensor, ...]] | None
    inputs: tuple[str, ...]
    trained: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    """whose traffic it has"""


_GATHER, _RESTORE = ("tokens", "pos"), ("latent", "mask_token", "decoder_pos")
_LOSS = ("pred", "removed", "patch", "mean", "std")
_NOISE = ("noise", "ratio")
CASES = {
    case.name: case
    for case in (
        Case(
            "all together", together, (*_NOISE, *_GATHER, *_RESTORE, *_LOSS, "images"),
            ("tokens", "latent", "mask_token", "pred"), ("mask", "gather", "restore", "loss"),
        ),
        Case("mask + gather", mask_gather, (*_NOISE, *_GATHER), ("tokens",), ("mask", "gather")),
        Case("restore", restore, (*_RESTORE, "ids_restore"), ("latent", "mask_token"), ("restore",)),
        Case("loss, norm_pix", loss, (*_LOSS, "images"), ("pred",), ("loss",)),
        Case("mask", mask, _NOISE, (), ("mask",)),
        Case("embed visible", embed, ("cast_images", "ids_keep", "weight", "bias", "pos"), ("weight", "bias"),
             ("embed",)),
        Case("loss", functools.partial(loss, norm_pix=False), (*_LOSS, "images"), ("pred",), ("loss",)),
        Case("loss, norm_pix, uint8", functools.partial(loss, images="bytes"), (*_LOSS, "bytes"), ("pred",),
             ("loss of bytes",)),
        Case("mask + gather, learned", mask_gather, (*_NOISE, *_GATHER), ("tokens", "pos"),
             ("mask", "gather", "positions")),
        Case("block masks", None, (), (), ("blocks",)),
    )
}  # fmt: skip
WIDE = ("all together", "mask + gather", "embed visible", "mask + gather, learned")  # depend on Size.dim


def traffic(case: Case, size: Size) -> tuple[int, int]:
    """Bytes that a case must read and write, forward and backward, and FLOPs of its matrix products."""
    e, d, w, p = size.dtype.itemsize, size.dim, size.width, size.pixels
    whole, kept = size.batch * size.length, size.batch * size.keep
    missing, length = whole - kept, size.length
    parts = {
        "mask": 8 * whole + 8 * kept + 8 * whole + 4 * whole,  # noise drawn and read, both ids, mask
        "gather": e * d * (2 * kept + length) + e * d * (kept + whole) + 16 * kept,
        "positions": e * d * length,
        "restore": e * w * (kept + 1 + length + whole) + e * w * (whole + kept + 1) + 16 * whole,
        "embed": 2 * e * (kept * p + kept * d + d * p + d) + e * d * length + 16 * kept,
        "loss": missing * p * (e + 4) + e * whole * p + 4 * whole,
        "loss of bytes": missing * p * (e + 1) + e * whole * p + 4 * whole,
        "blocks": 4 * whole,
    }
    return sum(parts[op] for op in case.ops), 4 * kept * d * p if "embed" in case.ops else 0


def inputs_of(case: Case, size: Size, device: str) -> dict:
    rows, dtype = (size.batch, size.length), size.dtype
    noise = torch.rand(rows, device=device).argsort(1).float() / size.length  # no two alike, as in few rows
    ids_keep, ids_restore, removed = plain.mask(noise, size.ratio)
    images = (size.batch, 3, size.image, size.image)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype) * scale

    makers: dict[str, Callable] = {
        "noise": lambda: noise, "ratio": lambda: size.ratio, "ids_keep": ids_keep.contiguous,
        "ids_restore": lambda: ids_restore, "removed": lambda: removed, "patch": lambda: size.patch,
        "tokens": lambda: normal(*rows, size.dim), "pos": lambda: normal(1, size.length, size.dim),
        "latent": lambda: normal(size.batch, size.keep, size.width),
        "mask_token": lambda: normal(1, 1, size.width),
        "decoder_pos": lambda: normal(1, size.length, size.width),
        "pred": lambda: normal(*rows, size.pixels), "images": lambda: normal(*images, dtype=torch.float32),
        "cast_images": lambda: normal(*images),
        "bytes": lambda: torch.randint(256, images, device=device, dtype=torch.uint8),
        "weight": lambda: normal(size.dim, 3, size.patch, size.patch, scale=size.pixels**-0.5),
        "bias": lambda: normal(size.dim),
        "mean": lambda: torch.tensor(MEAN, device=device), "std": lambda: torch.tensor(STD, device=device),
    }  # fmt: skip
    x = {name: makers[name]() for name in case.inputs}
    for name in case.trained:
        x[name].requires_grad_()
    outputs = [out for out in case.run(plain, x) if out.requires_grad]
    x["upstream"] = [torch.randn_like(out) if out.dim() else None for out in outputs]  # of the loss: 1
    return x
