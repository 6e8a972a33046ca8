"""What the compiler says of the Triton kernels that only move memory; static_gpu.py shows it too."""

import dataclasses
import re
import tempfile
from pathlib import Path

import sass
import triton
import triton.language as tl
from sslfast.kernels import (
    augment_views,
    ema,
    masked_patch_mse,
    patch_mask,
    patches,
    sinkhorn,
    soft_cross_entropy,
    tuning,
)
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sslfast.ops.augment_views import AFFINE, BICUBIC, BLUR, GRAY_OUT, JITTER, SOLARIZE

WARPS_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # CUDA C programming guide, as the next two
BLOCKS_SM = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
QUICK = (80, 90, 100)  # architectures of a quick run: one for each kind of matrix instruction
SHARED_SM = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # KiB per multiprocessor
DIM, PATCH = 768, 16  # ViT-B, whose patches of 16 x 16 x 3 pixels are as long as its tokens


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as it is launched, compiled for each of `pairs`, (dtype, source). A type may be "rows", the
    dtype, or "source". aligned: integers that are divisible by 16 in a launch with rows of DIM. wide: whether
    it moves whole rows, hence 16 bytes per access. quick: architectures of a quick run. most_registers: that
    ptxas may use."""

    function: triton.JITFunction
    types: dict[str, str | tuple[str, ...]]
    flags: dict[str, object]
    warps: int = 4
    aligned: tuple[str, ...] = ()
    wide: bool = False
    pairs: tuple[tuple[str, str], ...] = (("fp32", "fp32"), ("bf16", "bf16"))
    quick: tuple[int, ...] = QUICK
    most_registers: int | None = None


def _masks() -> dict[str, Kernel]:
    noise = {"ids_ptr": "i64", "restore_ptr": "i64"}
    draws = {"draws_ptr": "fp64", "counts_ptr": "i64", "least_bits": "i64", "most_bits": "i64"}
    plain = (("fp32", "fp32"),)
    found = {}
    for block in (4096, 1024, 256, 64):
        quick = {256: QUICK, 1024: ()}.get(block, (90,))  # a sort takes long to compile
        found[f"random_mask {block}"] = Kernel(
            patch_mask.random_mask, noise, {"IS_ORDER": False, "BLOCK": block}, patch_mask._warps(block),
            pairs=plain, quick=quick,
        )  # fmt: skip
    found["random_mask, sorted before"] = Kernel(
        patch_mask.random_mask, {**noise, "given_ptr": "i64"}, {"IS_ORDER": True, "BLOCK": 1024},
        patch_mask._warps(1024), pairs=plain, quick=(90,),
    )  # fmt: skip
    for name, many, quick in (("block_mask: many", True, QUICK), ("block_mask: one", False, (90,))):
        found[name] = Kernel(
            patch_mask.block_mask, draws, {"MANY": many, "BLOCK": 256}, patch_mask._warps(256), pairs=plain,
            quick=quick,
        )  # fmt: skip
    return found


def _rows() -> dict[str, Kernel]:
    height, width = patches._tile(DIM)
    tile = {"ROWS": height, "BLOCK": width}
    work = {"WORK": tl.float32, **tile}
    strides, ids = ("batch_stride", "row_stride", "dim"), {"ids_ptr": "i64"}
    take = {**ids, "source_ptr": "source", "fill_ptr": "rows", "pos_ptr": "rows", "out_ptr": "rows"}
    put = {"dout_ptr": "rows", "dsource_ptr": "rows", "table_ptr": "i32"}
    found = {}
    for name, fill, own in (("gather", False, False), ("restore", True, False), ("embed", False, True)):
        flags = {"FILL": fill, "POS": True, "OWN": own, **work}
        quick = (90,) if own else QUICK
        found[f"take_rows: {name}"] = Kernel(
            patches.take_rows, take, flags, 4, strides, wide=True, quick=quick
        )
    return found | {
        "put_rows": Kernel(patches.put_rows, put, work, 8, strides, wide=True),
        "sum_rows": Kernel(patches.sum_rows, put, {**work, "ROWS": height // 2}, 4, strides),
        "sum_fill": Kernel(patches.sum_fill, {**ids, "dout_ptr": "rows"}, {"TILES": 16, **work}, 4, strides),
        "places": Kernel(
            patches.places, {**ids, "table_ptr": "i32"}, {"QUERIES": tuning.PLACES, "BLOCK": tuning.PLACES},
            pairs=(("fp32", "fp32"),),
        ),
        "cut_rows": Kernel(
            patches.cut_rows, {**ids, "images_ptr": "source", "cols_ptr": "rows"},
            {"x_stride": 1, "PATCH": PATCH, **tile}, 4, ("batch_stride", "channel_stride", "y_stride", "dim"),
            pairs=(("fp32", "fp32"), ("bf16", "fp32"), ("bf16", "bf16")),
        ),
    }  # fmt: skip


def _errors() -> dict[str, Kernel]:
    """With norm_pix, leaving the gradient, as MAE calls it."""
    block = min(tuning.PATCH_PIXELS, triton.next_power_of_2(DIM))
    sizes = {"x_stride": 1, "PATCH": PATCH, "CHANNELS": 3, "WORK": tl.float32, "BLOCK": block}
    flags = {"NORM": True, "ABSOLUTE": False, "GRADIENT": True, "UPSTREAM": False, **sizes}
    types = {"images_ptr": "source", "pred_ptr": "rows", "dpred_ptr": "rows"}
    strides = ("pred_batch_stride", "pred_row_stride", "batch_stride", "channel_stride", "y_stride")
    found = {
        f"patch_error: {source}": Kernel(
            masked_patch_mse.patch_error, types, {"AFFINE": source == "u8", **flags},
            max(1, min(8, block // 256)), strides, pairs=(("fp32", source), ("bf16", source)),
        )
        for source in ("fp32", "u8")
    }  # fmt: skip
    scale = {"WORK": tl.float32, "BLOCK": tuning.PATCH_TILE}
    found["scale"] = Kernel(masked_patch_mse.scale, {"x_ptr": "rows"}, scale, 4, ("count",), quick=(90,))
    return found


def _views() -> dict[str, Kernel]:
    """DINO's: ten views of 65,536 prototypes against two of the teacher; and Sinkhorn's passes over those."""
    count, block, warps = soft_cross_entropy._block(2, 65_536)
    floats = dict.fromkeys(("scale", "rate", "sign", "target_rate", "target_sign"), "fp32")
    types = {"logits_ptr": "rows", "dlogits_ptr": "rows", "target_ptr": "source", **floats}
    sides = [f"{side}{of}_stride" for side in ("", "target_", "out_") for of in ("view", "batch")]
    strides, flags = (*sides, "classes"), {"CENTER": True, "SOFTMAX": True, "T": count}
    tiles = {**flags, "BLOCK": block}
    merged = {"SOFTMAX": True, "SKIP": True, "T": count, "J": 65_536 // block}
    ours = {**tiles, "SKIP": True}
    plain = (("fp32", "fp32"),)
    k, s = soft_cross_entropy, sinkhorn
    factors, lengths, passed = (
        {"V": True, "U": True},
        ("stride", "classes"),
        {"logits_ptr": "source", "rate": "fp32"},
    )
    rows, columns = tuning.SINKHORN_TILE
    wide = {**factors, "BLOCK": tuning.SINKHORN_BLOCK}
    sources = (("fp32", "fp32"), ("fp32", "bf16"))
    return {
        "views: forward": Kernel(k.forward, types, tiles, warps, strides),
        "views: merge": Kernel(k.merge, types, merged, 1, pairs=plain),
        "views: backward": Kernel(k.backward, types, ours, warps, strides, wide=True),
        "sinkhorn: classes": Kernel(s.over_classes, passed, wide, 4, lengths, pairs=sources),
        "sinkhorn: rows": Kernel(
            s.over_rows, passed, {**factors, "ROWS": rows, "BLOCK": columns}, 4, lengths, pairs=sources
        ),
        "sinkhorn: fill": Kernel(s.fill, passed, wide, 4, lengths, wide=True, pairs=sources),
    }


def _augmented() -> dict[str, Kernel]:
    """Views of 224 x 224 from packed images: SimCLR's, DINO's, MAE's, and all steps after an affine map."""
    k, jitter = augment_views, JITTER | GRAY_OUT | BLUR
    types = {"out_ptr": "rows", "norm": ("fp32",) * 6, "data_ptr": "u8"}
    types |= {"offsets_ptr": "i64", "sizes_ptr": "i64"}
    sides, pairs = ("height", "width"), (("fp32", "u8"), ("bf16", "u8"))

    def tile(columns_first: bool) -> dict[str, object]:
        numbers = (*tuning.VIEW_TILE, *tuning.VIEW_AT_A_TIME[columns_first])
        sizes = dict(zip(("ROWS", "COLUMNS", "TAPS", "AHEAD"), numbers, strict=True))
        return {"channel_stride": 1, "COLOURED": True, "COLUMNS_FIRST": columns_first, **sizes}

    colours = {"COLOURS": True, "STEPS": jitter | SOLARIZE, "BLOCK": tuning.VIEW_COLOURS}
    near = {"COLOURS": True, "STEPS": SOLARIZE, "BLOCK": tuning.VIEW_NEIGHBOURS}
    found = {
        f"resample: {name}": Kernel(
            k.resample, types, {**tile(turned), "COLOURS": wanted, "STEPS": steps}, 1, sides, pairs=pairs,
            quick=quick, most_registers=None if turned else tuning.VIEW_REGISTERS,
        )
        for name, steps, wanted, turned, quick in (
            ("SimCLR", jitter, True, False, (90,)), ("DINO", jitter | BICUBIC | SOLARIZE, True, False, QUICK),
            ("columns first", jitter | BICUBIC | SOLARIZE, True, True, QUICK),
            ("MAE", BICUBIC, True, False, (90,)), ("grey", jitter, False, False, (90,)),
        )
    }  # fmt: skip
    return found | {
        "warp": Kernel(k.warp, types, {**near, "STEPS": jitter | SOLARIZE | AFFINE}, quick=(90,)),
        "colour": Kernel(k.colour, types, colours, 4, sides, wide=True),
        **{
            f"blur: {name}": Kernel(k.blur, types, {**near, "ACROSS": across, "FAR": far}, quick=quick)
            for name, across, far, quick in (
                ("rows", True, False, QUICK), ("columns", False, False, QUICK), ("far", True, True, (90,)),
            )
        },
    }  # fmt: skip


KERNELS = {
    **_masks(),
    **_rows(),
    **_errors(),
    **_views(),
    **_augmented(),
    "ema_update": Kernel(
        ema.ema_update, {"table_ptr": "i64", "momentum_ptr": "fp64", "momentum_bits": "i64"},
        {"ON_DEVICE": True, "BLOCK": tuning.EMA_BLOCK}, wide=True, quick=tuple(WARPS_SM),
        pairs=(("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp64", "fp64")),
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One of KERNELS for one architecture: dtype is that of what it writes, source of what it reads."""

    name: str
    arch: int
    dtype: str
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """loads, stores: of global memory, and how many of them are wide: 16 bytes per thread. warps: of a
    multiprocessor, which holds `most`."""

    job: Job
    registers: int
    stack: int
    spills: int
    shared: int
    loads: int
    wide_loads: int
    stores: int
    wide_stores: int
    warps: int
    most: int


def jobs(archs: tuple[int, ...], quick: bool = False) -> list[Job]:
    return [
        Job(name, arch, *pair)
        for name, kernel in KERNELS.items()
        for arch in archs
        for pair in kernel.pairs
        if not quick or arch in kernel.quick
    ]


def _type(name: str, kernel: Kernel, job: Job) -> str:
    """Pointers are to float32 and numbers are int32 unless the table says otherwise."""
    kind = kernel.types.get(name, "fp32" if name.endswith("_ptr") else "i32")
    kind = {"rows": job.dtype, "source": job.source}.get(kind, kind)
    return f"*{kind}" if name.endswith("_ptr") else kind


def compiled(job: Job):
    """The kernel as Triton compiles it for a call with aligned rows."""
    kernel = KERNELS[job.name]
    names, flags = kernel.function.arg_names, dict(kernel.flags)
    if job.name == "ema_update":
        dtypes = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
        work = tl.float64 if "fp64" in (job.dtype, job.source) else tl.float32
        flags |= {"TARGET": dtypes[job.dtype], "SOURCE": dtypes[job.source], "WORK": work}
    signature = {name: "constexpr" if name in flags else _type(name, kernel, job) for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name not in flags and (name.endswith("_ptr") or name in kernel.aligned)
    }
    source = ASTSource(kernel.function, signature, constexprs=flags, attrs=aligned)
    options = {"num_warps": kernel.warps, "maxnreg": kernel.most_registers}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def report(job: Job) -> Report:
    try:
        kernel, launched = compiled(job), KERNELS[job.name].warps
    except Exception as error:
        raise RuntimeError(f"{job}: does not compile: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", sass.run("cuobjdump", "-res-usage", str(cubin)))
        instructions, _ = sass.parse(sass.run("nvdisasm", str(cubin)))
    assert usage
    registers, stack = map(int, usage.groups())
    shared = kernel.metadata.shared
    granted = -(-registers // 8) * 8 * 32 * launched
    most = WARPS_SM[job.arch]
    blocks = min(
        BLOCKS_SM[job.arch], most // launched, 65536 // granted, SHARED_SM[job.arch] * 1024 // (shared + 1024)
    )
    loads, stores = ([x for x in instructions if sass.is_any(x, name)] for name in ("LDG", "STG"))
    return Report(
        job, registers, stack, sum(sass.is_any(x, "LDL", "STL") for x in instructions), shared,
        len(loads), sum(".128" in x for x in loads), len(stores), sum(".128" in x for x in stores),
        blocks * launched, most,
    )  # fmt: skip


def problems(r: Report) -> list[str]:
    what = f"{r.job.name} sm_{r.job.arch} {r.job.dtype} from {r.job.source}"
    found = []
    if r.spills:
        found.append(f"{what}: {r.spills} spills")
    if KERNELS[r.job.name].wide and not (r.wide_loads and r.wide_stores):
        found.append(f"{what}: no loads or stores of 16 bytes")
    if r.job.name == "ema_update" and 2 * r.warps < r.most:
        found.append(f"{what}: {r.warps} warps of {r.most} on a multiprocessor")
    return found


def show(reports: list[Report]) -> None:
    print("\nkernels that move memory; of 16 bytes per thread: how many of the loads and stores")
    layout = "{:28}{:>7}{:>6}{:>7}{:>6}{:>6}{:>7}{:>8}{:>8}{:>8}{:>10}"
    names = "kernel arch dtype source regs stack spills shared loads stores warps/SM"
    print(layout.format(*names.split()))
    for r in reports:
        print(layout.format(
            r.job.name, f"sm_{r.job.arch}", r.job.dtype, r.job.source, r.registers, r.stack, r.spills,
            r.shared, f"{r.wide_loads}/{r.loads}", f"{r.wide_stores}/{r.stores}", f"{r.warps}/{r.most}",
        ))  # fmt: skip
