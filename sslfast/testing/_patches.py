"""Cases of gather_patches, restore_patches, embed_visible_patches and masked_patch_mse."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast import ops
from sslfast.ops import patches
from sslfast.ops._check import FLOATS
from sslfast.testing._op import Inputs, Op

# The functions of the same names hide these modules in the package.
_embed, _mse = (
    importlib.import_module(f"sslfast.ops.{x}") for x in ("embed_visible_patches", "masked_patch_mse")
)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _ids(kind: str, batch: int, length: int, count: int, generator: torch.Generator) -> Tensor:
    """[batch, count] of `length`: without repetition, with, or all the same."""
    if kind == "once":
        return torch.rand(batch, length, generator=generator).argsort(1)[:, :count].contiguous()
    ids = torch.randint(0, max(1, length), (batch, count), generator=generator)
    return ids * 0 + length // 2 if kind == "same" else ids


def _layout(x: Tensor, kind: str) -> Tensor:
    """The same numbers: behind a class token, with gaps between all elements, or of one row expanded."""
    if kind == "behind":
        return torch.cat((x.new_full((len(x), 1, *x.shape[2:]), torch.nan), x), 1)[:, 1:]
    if kind == "gaps":
        return x.new_full((*x.shape, 2), torch.nan)[..., 0].copy_(x)
    return x[:1].expand(x.shape) if kind == "expanded" and len(x) else x


@dataclass(frozen=True)
class PatchesCase:
    """One kind of tokens [batch, rows, dim] and ids [batch, count].

    Attributes:
        pos: dtype of pos_embed, "same" as the tokens'; "": without. three: with a leading dimension of 1.
        ids: as `_ids` makes them. layout: of the tokens.
    """

    name: str
    batch: int
    rows: int
    count: int
    dim: int
    pos: Literal["", "same", "float32"] = "same"
    three: bool = False
    ids: Literal["once", "repeated", "same"] = "once"
    layout: Literal["", "behind", "gaps", "expanded"] = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def _tokens(self, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator) -> Tensor:
        return _layout(_normal(generator, self.batch, self.rows, self.dim).to(dtype), self.layout).to(device)

    def _pos(self, length: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        if not self.pos:
            return {}
        kind = torch.promote_types(dtype, torch.float32) if self.pos == "float32" else dtype
        pos = _normal(generator, length, self.dim).to(kind)
        return {"pos_embed": pos[None] if self.three else pos}


@dataclass(frozen=True)
class GatherCase(PatchesCase):
    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        a = self._tokens(dtype, device, generator)
        ids = _ids(self.ids, self.batch, self.rows, self.count, generator).to(device)
        return {
            "a": a,
            "ids": ids,
            **{k: x.to(device) for k, x in self._pos(self.rows, dtype, generator).items()},
        }


@dataclass(frozen=True)
class RestoreCase(PatchesCase):
    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        a = self._tokens(dtype, device, generator)
        ids = _ids(self.ids, self.batch, self.count, self.count, generator).to(device)
        token = _normal(generator, *((1, 1) if self.three else ()), self.dim).to(dtype)
        others = {"mask_token": token, **self._pos(self.count, dtype, generator)}
        return {"a": a, "ids": ids, **{k: x.to(device) for k, x in others.items()}}


@dataclass(frozen=True)
class ImageCase:
    """One kind of images [batch, channels, height, width].

    Attributes:
        kind: of images: the inputs' dtype, another one or uint8; "last": channels last; "gaps" between
            columns.
        kept: patches of each image that are kept.
    """

    name: str
    batch: int
    channels: int
    height: int
    width: int
    patch: int
    kept: int = 3
    dim: int = 8
    kind: Literal["", "last", "gaps", "float32", "uint8"] = ""
    pos: Literal["", "same", "float32"] = "same"
    bias: bool = True
    ids: Literal["once", "repeated"] = "once"
    norm_pix: bool = False
    statistics: bool = False
    absolute: bool = False
    mask: Literal["random", "none", "all", "weights"] = "random"
    layout: Literal["", "behind", "gaps", "expanded"] = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS

    @property
    def patches(self) -> int:
        return (self.height // self.patch) * (self.width // self.patch)

    def _images(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        shape = (self.batch, self.channels, self.height, self.width)
        images = torch.rand(shape, dtype=torch.float64, generator=generator)
        if self.kind == "uint8":
            return (images * 256).to(torch.uint8)
        images = images.float() if self.kind == "float32" else images.to(dtype)
        if self.kind == "last":
            return images.to(memory_format=torch.channels_last)
        return (
            images.new_full((*shape, 2), torch.nan)[..., 0].copy_(images) if self.kind == "gaps" else images
        )


@dataclass(frozen=True)
class EmbedCase(ImageCase):
    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        images = self._images(dtype, generator)
        weight = _normal(generator, self.dim, self.channels, self.patch, self.patch)
        inputs = {
            "images": images,
            "ids": _ids(self.ids, self.batch, self.patches, self.kept, generator),
            "a": (weight / (self.channels * self.patch**2) ** 0.5).to(dtype),
        }
        if self.bias:
            inputs["bias"] = _normal(generator, self.dim).to(dtype)
        if self.pos:
            kind = torch.promote_types(dtype, torch.float32) if self.pos == "float32" else dtype
            inputs["pos_embed"] = _normal(generator, self.patches, self.dim).to(kind)
        return {**{k: x.to(device) for k, x in inputs.items()}, "patch_size": self.patch}


@dataclass(frozen=True)
class MseCase(ImageCase):
    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        images = self._images(dtype, generator)
        a = _normal(generator, self.batch, self.patches, self.patch**2 * self.channels).to(dtype)
        mask = torch.rand(self.batch, self.patches, generator=generator)
        if self.mask != "weights":
            mask = (mask < {"random": 0.75, "none": -1.0, "all": 2.0}[self.mask]).float()
        inputs = {"a": _layout(a, self.layout), "images": images, "mask": mask}
        statistics: dict[str, list[float] | None] = {"mean": None, "std": None}
        if self.statistics:
            statistics = {
                "mean": [0.4, 0.5, 0.6, 0.7][: self.channels],
                "std": [0.2, 0.3, 0.25, 0.4][: self.channels],
            }
        options = {
            "patch_size": self.patch,
            "norm_pix": self.norm_pix,
            "absolute": self.absolute,
            **statistics,
        }
        return {**{k: x.to(device) for k, x in inputs.items()}, **options}


_G, _R, _E, _M = GatherCase, RestoreCase, EmbedCase, MseCase

GATHER_CASES: list[GatherCase] = [
    _G("no image", 0, 5, 3, 4),
    _G("none kept", 3, 5, 0, 4),
    _G("one of one", 2, 1, 1, 1),
    _G("all kept", 2, 9, 9, 12),
    _G("without positions", 3, 9, 4, 12, ""),
    _G("positions of three dimensions", 3, 9, 4, 12, three=True),
    _G("float32 positions", 3, 9, 4, 12, "float32"),
    _G("wide", 2, 20, 5, 770),
    _G("several threads", 40, 20, 5, 130),
    _G("repeated", 9, 7, 12, 10, ids="repeated"),
    _G("all the same", 5, 7, 12, 10, "float32", ids="same"),
    _G("behind a class token", 3, 9, 4, 12, layout="behind"),
    _G("gaps", 3, 9, 4, 12, layout="gaps"),
    _G("expanded", 3, 9, 4, 12, layout="expanded"),
]

RESTORE_CASES: list[RestoreCase] = [
    _R("no image", 0, 3, 5, 4),
    _R("none kept", 3, 0, 5, 4),
    _R("all kept", 3, 5, 5, 4),
    _R("one of one", 2, 1, 1, 1),
    _R("without positions", 3, 4, 9, 12, ""),
    _R("all of three dimensions", 3, 4, 9, 12, three=True),
    _R("float32 positions", 3, 4, 9, 12, "float32"),
    _R("wide", 2, 5, 20, 770),
    _R("several threads", 40, 5, 20, 130),
    _R("many mask tokens", 150, 1, 20, 9),
    _R("repeated", 9, 7, 12, 10, ids="repeated"),
    _R("all the same token", 5, 9, 12, 10, "float32", ids="same"),
    _R("all the mask token", 5, 2, 12, 10, ids="same"),
    _R("behind a class token", 3, 4, 9, 12, layout="behind"),
    _R("gaps", 3, 4, 9, 12, layout="gaps"),
]

EMBED_CASES: list[EmbedCase] = [
    _E("no image", 0, 3, 8, 8, 4),
    _E("none kept", 2, 3, 8, 8, 4, kept=0),
    _E("one pixel", 2, 1, 1, 1, 1, kept=1),
    _E("colours", 3, 3, 8, 12, 4),
    _E("grey", 3, 1, 12, 8, 4, dim=20),
    _E("four channels", 3, 4, 6, 9, 3),
    _E("one patch", 3, 3, 8, 8, 8, kept=1),
    _E("no bias", 3, 3, 8, 12, 4, bias=False),
    _E("no positions", 3, 3, 8, 12, 4, pos=""),
    _E("float32 positions", 3, 3, 8, 12, 4, pos="float32"),
    _E("several threads", 30, 3, 16, 16, 4, kept=12, dim=40),
    _E("repeated", 4, 3, 8, 12, 4, kept=9, ids="repeated"),
    _E("channels last", 3, 3, 8, 12, 4, kind="last"),
    _E("gaps", 3, 3, 8, 12, 4, kind="gaps"),
]

MSE_CASES: list[MseCase] = [
    _M("no image", 0, 3, 8, 8, 4),
    _M("nothing masked", 2, 3, 8, 8, 4, mask="none"),
    _M("everything masked", 2, 3, 8, 8, 4, mask="all"),
    _M("one pixel", 3, 1, 2, 2, 1),
    _M("colours", 3, 3, 8, 12, 4),
    _M("normalised pixels", 3, 3, 8, 12, 4, norm_pix=True),
    _M("normalised pixels, mean and std", 3, 3, 8, 12, 4, norm_pix=True, statistics=True),
    _M("grey", 3, 1, 12, 8, 4, norm_pix=True),
    _M("four channels", 3, 4, 6, 9, 3, statistics=True),
    _M("weights", 3, 3, 8, 12, 4, mask="weights", norm_pix=True),
    _M("several threads", 20, 3, 32, 32, 8, norm_pix=True),
    _M("uint8", 3, 3, 8, 12, 4, kind="uint8", statistics=True, norm_pix=True),
    _M("uint8 grey", 3, 1, 8, 12, 4, kind="uint8", statistics=True),
    _M("float32 images", 3, 3, 8, 12, 4, kind="float32", norm_pix=True),
    _M("channels last", 3, 3, 8, 12, 4, kind="last", norm_pix=True),
    _M("gaps", 3, 3, 8, 12, 4, kind="gaps"),
    _M("predictions behind a class token", 3, 3, 8, 12, 4, layout="behind"),
    _M("predictions with gaps", 3, 3, 8, 12, 4, layout="gaps", norm_pix=True),
    _M("expanded predictions", 3, 3, 8, 12, 4, layout="expanded"),
    _M("absolute", 3, 3, 8, 12, 4, absolute=True),
    _M("absolute, weights, normalised pixels", 3, 3, 8, 12, 4, absolute=True, mask="weights", norm_pix=True),
    _M("large patches", 1, 3, 40, 80, 40, norm_pix=True),
]


def _gathered(function: Callable) -> Callable:
    def run(a: Tensor, ids: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        return function(a, ids, pos_embed)

    return run


def _restored(function: Callable) -> Callable:
    def run(a: Tensor, ids: Tensor, mask_token: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        return function(a, ids, mask_token, pos_embed)

    return run


def _flat_token(function: Callable) -> Callable:
    def run(tokens: Tensor, ids: Tensor, mask_token: Tensor, pos: Tensor | None) -> Tensor:
        return function(tokens, ids, mask_token.flatten(), pos)

    return run


def _embedded(function: Callable) -> Callable:
    def run(images: Tensor, ids: Tensor, a: Tensor, patch_size: int, **others: Tensor) -> Tensor:
        return function(images, ids, a, others.get("bias"), others.get("pos_embed"), patch_size=patch_size)

    return run


def _error(a: Tensor, images: Tensor, mask: Tensor, absolute: bool, **options: Any) -> Tensor:
    return (ops.masked_patch_l1 if absolute else ops.masked_patch_mse)(a, images, mask, **options)


def _error_reference(
    a: Tensor,
    images: Tensor,
    mask: Tensor,
    absolute: bool,
    patch_size: int,
    norm_pix: bool,
    **statistics: Any,
) -> Tensor:
    scale, shift = _mse.statistics(images, statistics["mean"], statistics["std"])
    return _mse.reference(a, images, mask, patch_size, norm_pix, scale, shift, absolute)


def _largest(inputs: Inputs) -> float:
    floating = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    return max((x.abs().max().item() for x in floating), default=0.0)


def _terms(run: Callable) -> Callable:
    """A gradient's terms are each an upstream number times at most one other, all without their signs
    here."""

    def terms(
        inputs: Inputs, upstream: Sequence[Tensor | None]
    ) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
        leaves = {
            k: x.detach().abs().requires_grad_()
            for k, x in inputs.items()
            if isinstance(x, Tensor) and x.is_floating_point() and k != "images"
        }
        images = {"images": inputs["images"].abs()} if "images" in inputs else {}
        outputs, (u,) = run(**{**inputs, **leaves, **images}), upstream
        assert u is not None
        gradients = torch.autograd.grad(outputs, list(leaves.values()), u.abs())
        return _largest(inputs), {k: (g, g) for k, g in zip(leaves, gradients, strict=True)}

    return terms


def _error_terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    """An element of the gradient is 2 gain (pred - t), or gain; targets here are below 4."""
    a, mask, (u,) = inputs["a"], inputs["mask"], upstream
    assert u is not None
    gain = u.abs() * mask.double()[..., None] / mask.double().sum().clamp(min=1e-30) / a.shape[2]
    size = gain * (torch.ones_like(a) if inputs["absolute"] else 2 * a.abs() + 8)
    return _largest(inputs), {"a": (size, size)}


def _larger_and_back(inputs: Inputs) -> dict[str, Any]:
    """The same numbers, each rounded anew."""
    floating = [k for k, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]
    return {**inputs, **{k: inputs[k] * 1.1 / 1.1 for k in floating if k != "mask"}}


_gather, _restore = _gathered(patches.gather_reference), _restored(_flat_token(patches.restore_reference))
_embedding = _embedded(_embed.reference)

GATHER_OP = Op(_gathered(ops.gather_patches), _gather, dict, _terms(_gather))
RESTORE_OP = Op(_restored(ops.restore_patches), _restore, dict, _terms(_restore))
EMBED_OP = Op(
    _embedded(ops.embed_visible_patches),
    _embedding,
    _larger_and_back,
    _terms(_embedding),
    ("a", "bias", "pos_embed"),
)
# The gradient that the forward pass leaves is rounded to its dtype before an upstream gradient multiplies it.
MSE_OP = Op(_error, _error_reference, _larger_and_back, _error_terms, ("a",), tiles=True)
