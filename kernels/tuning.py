"""The one place for block sizes, warps and stages."""

import functools
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

# Blocked similarity_lse on a CPU: rows and columns of a tile of logits. Either is 1.5 MiB in float32, which
# about fits the L2 caches of two cores between its matrix product and its epilogue; flat tiles waste less of
# a symmetric problem on the diagonal, but on an AMD CPU MKL's product of 128 features ran at 105 GFLOP/s with
# fewer than 512 rows and at 170 with more. With more features the products outweigh the epilogue, and like
# larger tiles better.
CPU_TILE, CPU_TILE_AMD, CPU_TILE_WIDE = (384, 1024), (512, 768), (1024, 1024)

PADDING = 128  # rows of the flash form are padded to a multiple of this; every tile's side divides it
SMALL = 1024 * 1024  # up to so many logits the running maximum alone serves: fewer launches

# Elements that a program of `ema_update_` moves at a time, with 4 warps: two 16-byte loads per thread and
# side in float32, few enough registers for all warps of a multiprocessor. And its longest segment.
EMA_BLOCK, EMA_SEGMENT = 1024, 16384

# Patches that one program sorts for a mask; a longer row is sorted by PyTorch.
MASK_SORT = 4096
# Elements that a program of the patch kernels moves at a time, with 4 warps, and the widest piece of a row
# among them: four 16-byte accesses per thread in float32. And the most pixels of a patch that are loaded at
# once.
PATCH_TILE, PATCH_BLOCK = 2048, 256
PATCH_PIXELS = 4096
# Ids that a program looks for at a time, and among how many: a larger square takes many registers.
PLACES = 32
# Numbers of targets that a program of soft_cross_entropy keeps in registers, with 8 warps: 16 per thread.
# With 32, Triton 3.7 spilled on sm_90.
TARGET_TILE = 4096
# Logits of a chunk of prototypes, of all views and targets together: a part of a CPU's L3 cache or a GPU's L2
# cache.
PROTOTYPES = {"cpu": 1 << 21, "cuda": 1 << 23}
# Logits of prototypes that the backward pass finds again instead of making them anew: 32 MiB in float32.
KEPT = {"cpu": 1 << 23, "cuda": 0}
# Sinkhorn: classes of a row at a time, a tile of rows and classes for sums over rows, and into how many parts
# the rows are split at most.
SINKHORN_BLOCK, SINKHORN_TILE, SINKHORN_PARTS = 2048, (16, 128), 32
# Views of images. A tile of `resample`: rows, and columns, one per thread of its only warp, so that no thread
# repeats another's work. Rows and columns of the image at a time, which share each other's weights, where
# rows are resized first (one column: each thread has its own) and where columns are (with 4 rows Triton 3.8
# spilled on sm_100). The registers of the usual order, of which ptxas would take more than it needs.
# Pixels of a program, with 4 warps, of the colours (two 16-byte loads per thread and channel) and of kernels
# that read neighbours. And the most numbers of a buffer between two kernels.
VIEW_TILE, VIEW_AT_A_TIME, VIEW_REGISTERS = (8, 32), {False: (4, 1), True: (2, 2)}, 128
VIEW_COLOURS, VIEW_NEIGHBOURS, VIEW_BUFFER = 1024, 512, 1 << 26

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # those the tables below were compiled for
VARIANTS = ("sums", "attend", "expect", "grad")  # expect: `attend` with MEAN


class Tile(NamedTuple):
    """Rows of x and of y in a tile of logits, warps per program, depth of the pipeline of loads, and whether
    `grad` multiplies the next tile while it computes the powers of this one."""

    x: int
    y: int
    warps: int
    stages: int
    ahead: bool = False


# Flash form, by (bytes of the dtype, widest rows): no configuration of 16-bit rows spills a register on any
# of the architectures, and all fit the 99 KiB of shared memory of the consumer cards among them
# (benchmarks/static_gpu.py). float32 on tensor cores needs three times the operands in registers, hence small
# tiles and narrow rows.
FLASH: dict[tuple[int, int], dict[str, Tile]] = {
    (2, 128): dict.fromkeys(VARIANTS, Tile(128, 64, 8, 3)),
    (2, 256): {
        "sums": Tile(128, 64, 8, 2),
        "attend": Tile(128, 64, 8, 2),
        "expect": Tile(64, 64, 8, 2),
        "grad": Tile(64, 64, 8, 2),
    },
    (4, 64): {
        "sums": Tile(64, 32, 8, 2),
        "attend": Tile(64, 32, 4, 2),
        "expect": Tile(64, 16, 4, 2),
        "grad": Tile(64, 16, 4, 2),
    },
}
# Where an architecture wants another tile: (architecture, variant, bytes, widest rows or one width).
EXCEPTIONS: dict[tuple[int, str, int, int], Tile] = {
    (80, "grad", 2, 16): Tile(64, 64, 8, 3),
    (90, "sums", 2, 128): Tile(128, 64, 4, 3),  # two programs share a multiprocessor and overlap its units
    (90, "expect", 2, 128): Tile(64, 64, 4, 3),  # three do
    (90, "grad", 2, 128): Tile(128, 64, 8, 3, ahead=True),
    (90, "grad", 2, 256): Tile(64, 64, 8, 2, ahead=True),
    (120, "attend", 2, 128): Tile(64, 64, 8, 2),
    (90, "expect", 4, 64): Tile(64, 32, 4, 2),
    (90, "grad", 4, 64): Tile(64, 32, 4, 2),
}

# Where the chunked form serves though the flash form could: (architecture, "self" or "pair", bytes, width) to
# "chunked". None until a measurement says so.
FORMS: dict[tuple[int, str, int, int], str] = {}

# What `sslfast tune` tries beside the table's choice.
CANDIDATES = (
    Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4),
    Tile(128, 64, 4, 3), Tile(64, 128, 4, 2), Tile(64, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3),
    Tile(64, 64, 8, 2), Tile(64, 32, 4, 3), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2),
    Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 3, True), Tile(128, 128, 8, 2, True),
    Tile(64, 64, 4, 3, True), Tile(64, 64, 8, 2, True), Tile(64, 128, 4, 2, True),
)  # fmt: skip

# Chunked form: rows and columns of a tile of logits, of which the L2 cache is to hold the float32 and the
# 16-bit copy; and rows and columns of a block of its epilogues.
CHUNK = (2048, 4096)
CHUNKS = (CHUNK, (1024, 4096), (2048, 2048), (2048, 8192), (4096, 4096))  # tried by `sslfast tune`
EPILOGUE = Tile(32, 128, 4, 1)


def cpu_tile(d: int) -> tuple[int, int]:
    """The CPU's tile for rows of d features."""
    if d > 256:
        return CPU_TILE_WIDE
    return CPU_TILE_AMD if _is_amd() else CPU_TILE


@functools.cache
def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def padded_dim(d: int) -> int:
    """Features as the flash kernels see them: a power of two, 16 at least."""
    return max(16, 1 << max(0, d - 1).bit_length())


def fits(d: int, itemsize: int) -> bool:
    """Whether the flash form takes rows of d features."""
    return any(size == itemsize and padded_dim(d) <= widest for size, widest in FLASH)


def form(variant: str, d: int, dtype: torch.dtype, device: torch.device) -> str:
    """ "flash" or "chunked", for variant "self" or "pair": the user's own measurement, or the table's."""
    if not fits(d, dtype.itemsize):
        return "chunked"
    width, size = padded_dim(d), dtype.itemsize
    default = FORMS.get((architecture(device), variant, size, width), "flash")
    return str(chosen(device).get(key(f"form {variant}", width, size), default))


def tile(variant: str, width: int, dtype: torch.dtype, device: torch.device) -> Tile:
    """The flash form's tile: the user's own measurement, or the table's."""
    mine = chosen(device).get(key(variant, width, dtype.itemsize))
    return Tile(*mine) if mine else default_tile(variant, width, dtype.itemsize, architecture(device))


def default_tile(variant: str, width: int, itemsize: int, arch: int) -> Tile:
    widest = min(w for size, w in FLASH if size == itemsize and width <= w)
    known = max((a for a in ARCHITECTURES if a <= arch), default=ARCHITECTURES[0])
    for rows in (width, widest):
        if (known, variant, itemsize, rows) in EXCEPTIONS:
            return EXCEPTIONS[known, variant, itemsize, rows]
    return FLASH[itemsize, widest][variant]


def shipped() -> Iterator[tuple[int, str, int, int, Tile]]:
    """(architecture, variant, bytes, widest rows, tile) of every configuration of the flash form."""
    for arch in ARCHITECTURES:
        for (itemsize, widest), variants in FLASH.items():
            for variant in variants:
                yield arch, variant, itemsize, widest, default_tile(variant, widest, itemsize, arch)
    for (arch, variant, itemsize, width), tile in EXCEPTIONS.items():
        if (itemsize, width) not in FLASH:
            yield arch, variant, itemsize, width, tile


def chunk(device: torch.device) -> tuple[int, int]:
    """The chunked form's tile."""
    rows, cols = chosen(device).get("chunk", CHUNK)
    return rows, cols


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 follows torch's matmul precision, 16-bit types have one way."""
    fp32 = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = fp32 == "tf32" if fp32 is not None else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if dtype != torch.float32 or tf32 else "tf32x3"


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# What `sslfast tune` has measured on this card.


def cache_path(device: torch.device) -> Path:
    root = os.environ.get("SSLFAST_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "sslfast"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return Path(root).expanduser() / f"tuning-{name}.json"


trial: dict = {}  # choices that `sslfast tune` is trying


def chosen(device: torch.device) -> dict:
    """Measured choices by key; empty without any."""
    return trial or _read(device) if device.type == "cuda" else trial


@functools.lru_cache
def _read(device: torch.device) -> dict:
    path = cache_path(device)
    try:
        whole = json.loads(path.read_text())
        found = whole["choices"]
        if whole["triton"] != _triton_version():  # its compiler may fit other tiles
            return {}
        for key, value in found.items():
            name = key.split("/")[0]
            if name in ("form self", "form pair"):
                good = value in ("flash", "chunked")
            elif name in VARIANTS:
                good = _is_tile(value)
            else:
                good = name == "chunk" and len(value) == 2 and all(x > 0 and x % PADDING == 0 for x in value)
            if not good:
                raise ValueError(f"{key}: {value}")
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a file of sslfast tune ({error}); the built-in choices serve", stacklevel=2
        )
        return {}


def _triton_version() -> str:
    import triton

    return triton.__version__


def _is_tile(value: list) -> bool:
    x, y, warps, stages, ahead = value
    sizes = all(type(size) is int and size > 0 for size in value[:4])
    fit = min(x, y) >= 16 and PADDING % x == PADDING % y == warps & (warps - 1) == 0
    return sizes and fit and type(ahead) is bool


def keep(device: torch.device, choices: dict) -> Path:
    """Writes measured choices, beside those of other shapes, and makes them take effect."""
    path = cache_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "device": torch.cuda.get_device_name(device),
        "triton": _triton_version(),
        "choices": {**_read(device), **choices},
    }
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(whole, indent=1) + "\n")
    part.replace(path)
    _read.cache_clear()
    return path


def key(name: str, width: int, itemsize: int) -> str:
    """Under which a choice is kept."""
    return f"{name}/{width}/{itemsize}"
