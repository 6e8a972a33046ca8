"""Cases of `random_patch_mask` and `block_patch_mask`, and what a comparison needs to know of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.ops import block_mask, patch_mask
from sslfast.ops._check import FLOATS
from sslfast.testing._op import Inputs, Op


@dataclass(frozen=True)
class RandomMaskCase:
    """One kind of noise.

    Attributes:
        batch, length, ratio: as the op's.
        numbers: uniform; few different ones, so that most are equal; every kind of NaN, infinity and zero
            among them; normal, in every other column of a wider tensor.
    """

    name: str
    batch: int
    length: int
    ratio: float
    numbers: Literal["uniform", "ties", "special", "strided"] = "uniform"
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, 2 * self.length if self.numbers == "strided" else self.length)
        a = torch.rand(shape, dtype=torch.float64, generator=generator)
        if self.numbers == "ties":
            a = (a * 3).floor() - 1
        if self.numbers == "special":
            kinds = torch.tensor(
                [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0], dtype=a.dtype
            )
            pick = torch.randint(0, 16, shape, generator=generator)
            a = torch.where(pick < 8, kinds[pick % 8], a)
        a = a.to(dtype).to(device)
        return {"a": a[:, ::2] if self.numbers == "strided" else a, "mask_ratio": self.ratio}


@dataclass(frozen=True)
class BlockMaskCase:
    """One kind of blocks.

    Attributes:
        count: patches to mask in each image; "mixed": other ones in each, none and all among them; None: one
            block.
        fixed: all random numbers 0 ("low"), or as near to 1 as there are ("high"); "equal": those that single
            patches are chosen by are equal.
        tries: blocks drawn.
    """

    name: str
    batch: int
    grid: tuple[int, int]
    count: int | Literal["mixed"] | None
    ratio: tuple[float, float] = (0.1, 0.5)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    fixed: Literal["", "low", "high", "equal"] = ""
    tries: int = 16
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        height, width = self.grid
        length = height * width
        draws = torch.rand(self.batch, self.tries, 4, dtype=torch.float64, generator=generator)
        if self.fixed in ("low", "high"):
            draws = draws * 0 + (0.0 if self.fixed == "low" else 1 - 2**-53)
        low, high = (math.log(x) for x in self.aspect)
        draws[:, :, 1] = (0.5 * (low + draws[:, :, 1] * (high - low))).exp()
        noise = torch.rand(self.batch, length, dtype=dtype, generator=generator)
        counts = None
        if self.count is not None:
            counts = torch.randint(0, length + 1, (self.batch,), generator=generator)
            counts[:2] = torch.tensor([0, length])[: self.batch]
            counts = counts if self.count == "mixed" else counts * 0 + self.count
        tensors = {"draws": draws, "a": noise * (self.fixed != "equal"), "counts": counts}
        placed = {k: x if x is None else x.to(device) for k, x in tensors.items()}
        ratio = (self.ratio[0] * length, self.ratio[1] * length)
        return {**placed, "rule": block_mask.BlockRule(height, width, *ratio)}


_R, _B = RandomMaskCase, BlockMaskCase

RANDOM_CASES: list[RandomMaskCase] = [
    _R("one patch, kept", 3, 1, 0.0),
    _R("one patch, removed", 3, 1, 1.0),
    _R("two patches", 4, 2, 0.5),
    _R("no image", 0, 49, 0.75),
    _R("ViT-B", 7, 196, 0.75),
    _R("all kept", 3, 49, 0.0),
    _R("none kept", 3, 49, 1.0),
    _R("a power of two", 3, 64, 0.75),
    _R("one more", 3, 65, 0.9),
    _R("ties", 5, 100, 0.6, "ties"),
    _R("few ties", 5, 30, 0.6, "ties"),
    _R("special numbers", 5, 100, 0.5, "special"),
    _R("few special numbers", 9, 12, 0.5, "special"),
    _R("strided", 4, 33, 0.75, "strided"),
    _R("long rows", 2, 5000, 0.75),
    _R("long rows, ties", 2, 4100, 0.75, "ties"),
]

BLOCK_CASES: list[BlockMaskCase] = [
    _B("no image", 0, (4, 4), 3),
    _B("one patch", 3, (1, 1), "mixed"),
    _B("one row", 4, (1, 9), "mixed"),
    _B("BEiT", 6, (14, 14), 75, ratio=(16 / 196, 75 / 196)),
    _B("iBOT", 6, (14, 14), "mixed", ratio=(4 / 196, 0.5)),
    _B("not square", 6, (5, 11), "mixed"),
    _B("none", 3, (6, 6), 0),
    _B("all", 3, (6, 6), 36),
    _B("single patches only", 4, (7, 7), 20, ratio=(1.0, 1.0), aspect=(30.0, 30.0)),
    _B("single patches, equal noise", 4, (7, 7), 20, ratio=(1.0, 1.0), aspect=(30.0, 30.0), fixed="equal"),
    _B("one try", 5, (8, 8), "mixed", tries=1),
    _B("least draws", 4, (8, 8), 30, fixed="low"),
    _B("greatest draws", 4, (8, 8), 30, fixed="high"),
    _B("I-JEPA", 9, (14, 14), None, ratio=(0.15, 0.2), aspect=(0.75, 1.5)),
    _B("one block, never in range", 4, (6, 6), None, ratio=(0.3, 0.3), aspect=(1.0, 1.0)),
    _B("one block, never inside", 4, (6, 6), None, ratio=(0.9, 1.0), aspect=(20.0, 30.0)),
    _B("one block, everything", 2, (5, 5), None, ratio=(1.0, 1.0), aspect=(1.0, 1.0)),
    _B("one block, nothing", 2, (5, 5), None, ratio=(0.0, 0.0), aspect=(1.0, 1.0)),
    _B("large grid", 2, (40, 30), "mixed"),
]


def _no_terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    return 0.0, {}


def _run_random(a: Tensor, mask_ratio: float) -> tuple[Tensor, ...]:
    return tuple(patch_mask.random_patch_mask(a.shape[0], a.shape[1], mask_ratio, noise=a))


def _random_reference(a: Tensor, mask_ratio: float) -> tuple[Tensor, ...]:
    return patch_mask.reference(a, int(a.shape[1] * (1 - mask_ratio)))


def _run_block(draws: Tensor, a: Tensor, counts: Tensor | None, rule: block_mask.BlockRule) -> Tensor:
    return block_mask.blocks(draws, a, counts, rule)


def _block_reference(draws: Tensor, a: Tensor, counts: Tensor | None, rule: block_mask.BlockRule) -> Tensor:
    return block_mask.block_reference(draws, a, counts, rule)


RANDOM_OP = Op(_run_random, _random_reference, dict, _no_terms, gradients=())
BLOCK_OP = Op(_run_block, _block_reference, dict, _no_terms, gradients=())
