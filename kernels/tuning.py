"""The one place for block sizes, warps and stages."""

from typing import NamedTuple

import torch

# Blocked similarity_lse on a CPU: rows and columns of a tile of logits. 384 x 1024 float32 is 1.5 MiB, which
# about fits the L2 caches of two cores between its matrix product and its epilogue; flat tiles waste less of
# a symmetric problem on the diagonal.
CPU_TILE = (384, 1024)

PADDING = 128  # rows of the flash form are padded to a multiple of this; every tile's side divides it
SMALL = 1024 * 1024  # up to so many logits the running maximum alone serves: fewer launches


class Tile(NamedTuple):
    """Rows of x and of y in a tile of logits, warps per program, depth of the pipeline of loads."""

    x: int
    y: int
    warps: int
    stages: int


def padded_dim(d: int) -> int:
    """Features as the flash kernels see them: a power of two, 16 at least."""
    return max(16, 1 << max(0, d - 1).bit_length())


def fits(d: int, itemsize: int) -> bool:
    """Whether the flash form takes rows of d features."""
    return padded_dim(d) * itemsize <= 512


def form(d: int, dtype: torch.dtype, device: torch.device) -> str:
    return "flash" if fits(d, dtype.itemsize) else "chunked"


def tile(variant: str, width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    return Tile(128, 64, 8, 2)


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 follows torch's matmul precision, 16-bit types have one way."""
    fp32 = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = fp32 == "tf32" if fp32 is not None else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype != torch.float32 or tf32 else "tf32x3"


# Chunked form: rows and columns of a tile of logits, and of a block of the epilogues.
CHUNK = (2048, 4096)
EPILOGUE = Tile(64, 128, 4, 1)
