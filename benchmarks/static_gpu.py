"""What the compiler says of every shipped configuration of the Triton kernels, without a GPU.

For each kernel, dtype, width and architecture: registers, stack, spills, shared memory, matrix instructions,
powers per tile and resulting occupancy, read from the machine code. Then a predicted time per case, from the
instructions of the innermost loop and published rates of the units, saved as JSON (--json-out) to be held
against a measurement.

    python benchmarks/static_gpu.py --json-out benchmarks/results/static.json
"""

import dataclasses
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import sass
import static_memory
import torch
import triton
import tyro
from sslfast.kernels import similarity_lse, similarity_lse_rows, similarity_lse_tiles, tuning
from static_memory import SHARED_SM
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
SHARED_LIMIT = {
    80: 163,
    86: 99,
    89: 99,
    90: 227,
    100: 227,
    120: 99,
}  # KiB per block (CUDA C programming guide)
THREADS_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
STACK_LIMIT = 512  # bytes; a few addresses spilled once are harmless, an accumulator in local memory is not

# Published rates: multiprocessors, clock in GHz, dense bfloat16 FLOP per clock and multiprocessor (float32
# sums).
CARDS = {
    80: ("A100 SXM", 108, 1.41, 2048),
    86: ("RTX 3090", 82, 1.695, 512),
    89: ("RTX 4090", 128, 2.52, 512),
    90: ("H100 SXM", 132, 1.83, 4096),
    100: ("B200", 148, 1.85, 8192),
    120: ("RTX 5090", 170, 2.41, 512),
}
POWERS_PER_CLOCK, ISSUES_PER_CLOCK = 16, 4  # MUFU lanes, and warp instructions, per multiprocessor

_MASKS = {"IDS": True, "SAME": False}
_SYMMETRIC = {"TWO": False, "SELF": True, **_MASKS}
_TWO_SIDED = {"TWO": True, "SELF": False, **_MASKS}
_GRAD = {"H": False, "X_BIASED": False, "Y_BIASED": False, "DBIAS": False, "X_TERM": True, "Y_TERM": True}
# Each variant as the losses call it, and with all there is.
KERNELS: dict[str, tuple[str, object, dict]] = {
    "sums: NT-Xent": (
        "sums", similarity_lse.sums, {**_SYMMETRIC, "UPPER": True, "BOTH": True, "BIASED": False},
    ),
    "sums: rows, columns, bias": (
        "sums", similarity_lse.sums, {**_TWO_SIDED, "UPPER": False, "BOTH": True, "BIASED": True},
    ),
    "attend: bias": (
        "attend", similarity_lse.attend, {**_TWO_SIDED, "ALWAYS": False, "MEAN": False, "BIASED": True},
    ),
    "expect: MoCo": (
        "expect", similarity_lse.attend, {**_TWO_SIDED, "ALWAYS": True, "MEAN": True, "BIASED": True},
    ),
    "grad: NT-Xent": ("grad", similarity_lse.grad, {**_SYMMETRIC, **_GRAD, "DSCALE": False}),
    "grad: a, rows, columns, bias": (
        "grad", similarity_lse.grad, {**_TWO_SIDED, **_GRAD, "H": True, "DSCALE": True, "Y_BIASED": True},
    ),
    "grad: b, rows, columns, bias": (
        "grad", similarity_lse.grad,
        {**_TWO_SIDED, **_GRAD, "H": True, "DSCALE": False, "X_BIASED": True, "DBIAS": True},
    ),
}  # fmt: skip
NARROW = ("sums: NT-Xent", "expect: MoCo", "grad: NT-Xent")
_TILES = {**_TWO_SIDED, "BIASED": True}
EPILOGUES: dict[str, tuple[object, dict]] = {
    "tile_sums": (similarity_lse_tiles.tile_sums, {**_TILES, "COLS": True}),
    "tile_weights": (
        similarity_lse_tiles.tile_weights,
        {**_TILES, "C_TERM": True, "DBIAS": False, "GAIN": 0},
    ),
    "tile_bce": (similarity_lse_tiles.tile_bce, _TILES),
}


_SIDES = {"A_COPY": True, "B_COPY": True, "IDS": True, "G": True, "H": True, "BIASED": True}
_MERGE = {"TWO": True, "SUMS": True, "BIASED": True}
ROWS: dict[str, tuple[object, dict, int]] = {
    "pack": (similarity_lse_rows.pack, {**_SIDES, "D": 64}, 8),
    "weights": (similarity_lse_rows.weights, {"TWO": True, "H": True, "ROWS": 128}, 4),
    "merge": (similarity_lse_rows.merge, {**_MERGE, "MEAN": False, "ROWS": 128, "D": 128}, 4),
    "merge: MoCo": (similarity_lse_rows.merge, {**_MERGE, "MEAN": True, "ROWS": 16, "D": 128}, 4),
    "tile_merge": (similarity_lse_tiles.tile_merge, {"ROWS": 128}, 4),
    "tile_lse": (similarity_lse_tiles.tile_lse, {"ROWS": 128}, 4),
    "upstream_unit": (similarity_lse_tiles.upstream_unit, {"H": True, "GAIN": 0}, 4),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One kernel to compile: `flags` are its constants beyond the tile."""

    name: str
    arch: int
    dtype: str
    width: int
    tile: tuning.Tile


@dataclasses.dataclass(frozen=True)
class Report:
    """Of one compiled kernel. spills: instructions that move registers to or from local memory. The counts of
    `loop` are those of one pass through the innermost loop with matrix instructions (or all, without one),
    less what only a masked
    tile executes."""

    job: Job
    registers: int
    stack: int
    spills: int
    shared: int
    matrix: int
    blocks_per_sm: int
    loop: dict[str, int]

    @property
    def powers_per_tile(self) -> int:
        return self.loop["powers"] * 32 * self.job.tile.warps


def jobs(archs: tuple[int, ...], dtypes: tuple[str, ...], quick: bool) -> list[Job]:
    found = []
    for arch, variant, itemsize, width, tile in tuning.shipped():
        for dtype in dtypes:
            twin = quick and dtype != "bf16" and (arch != 90 or dtype == "fp16" and width > 128)
            if arch in archs and DTYPES[dtype] == itemsize and not twin:
                found += [
                    Job(name, arch, dtype, width, tile) for name, (v, *_) in KERNELS.items() if v == variant
                ]
    for arch in archs:
        found += [
            Job(name, arch, "bf16", 0, tuning.Tile(0, 0, warps, 3)) for name, (*_, warps) in ROWS.items()
        ]
        for name, (variant, *_) in KERNELS.items():  # narrow rows share the tile of 128
            narrow = (64,) if quick else (16, 32, 64)
            if "bf16" in dtypes and (not quick or name in NARROW):
                tiles = [(width, tuning.default_tile(variant, width, 2, arch)) for width in narrow]
                found += [Job(name, arch, "bf16", width, tile) for width, tile in tiles]
    return found + [
        Job(name, arch, dtype, 0, tuning.EPILOGUE)
        for name in EPILOGUES
        for arch in archs
        for dtype in dtypes
        if not (quick and dtype == "fp16")
    ]


def compiled(job: Job):
    """The kernel as Triton compiles it for a call with aligned rows."""
    if job.name in ROWS:
        function, flags, _ = ROWS[job.name]
    elif job.name in EPILOGUES:
        function, flags = EPILOGUES[job.name]
        flags = {**flags, "R": job.tile.x, "C": job.tile.y}
    else:
        _, function, flags = KERNELS[job.name]
        flags = {**flags, "X": job.tile.x, "Y": job.tile.y, "D": job.width}
        flags["PRECISION"] = "tf32x3" if job.dtype == "fp32" else "tf32"
        if "GAIN" in function.arg_names:
            flags["GAIN"] = 14 if job.dtype == "fp16" else 0
        if "AHEAD" in function.arg_names:
            flags["AHEAD"] = job.tile.ahead
    signature, aligned = {}, {}
    rows = {"x_ptr", "y_ptr", "dx_ptr", "a_ptr", "b_ptr", "a_packed_ptr", "b_packed_ptr"} | (
        {"out_ptr"} if job.name in EPILOGUES else set()
    )
    for i, name in enumerate(function.arg_names):
        if name in flags:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        kind = "i64" if "ids" in name or "ranges" in name else job.dtype if name in rows else "fp32"
        signature[name] = f"*{kind}" if pointer else "i32"
        if pointer or name.endswith(("padded", "span", "tile_stride")) or name == "dim":
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs=flags, attrs=aligned)
    options = {"num_warps": job.tile.warps, "num_stages": job.tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)


def report(job: Job) -> Report:
    try:
        kernel = compiled(job)
    except Exception as error:
        raise RuntimeError(f"{job}: does not compile: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = sass.run("cuobjdump", "-res-usage", str(cubin))
        code = sass.run("nvdisasm", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    threads = 32 * job.tile.warps
    instructions, labels = sass.parse(code)
    granted = -(-registers // 8) * 8 * threads
    shared = kernel.metadata.shared
    blocks = min(
        65536 // granted, SHARED_SM[job.arch] * 1024 // (shared + 1024), THREADS_SM[job.arch] // threads,
    )  # fmt: skip
    return Report(
        job, registers, stack, sum(sass.is_any(x, "LDL", "STL") for x in instructions), shared,
        sum(map(sass.multiplies, instructions)), blocks, sass.loop(instructions, labels),
    )  # fmt: skip


def problems(r: Report) -> list[str]:
    """What a shipped configuration may not have."""
    what = f"{r.job.name} sm_{r.job.arch} {r.job.dtype} D={r.job.width} {r.job.tile}"
    flash16 = r.job.dtype != "fp32" and 0 < r.job.width <= 128
    found = []
    if flash16 and (r.spills or r.stack):
        found.append(f"{what}: {r.spills} spills, {r.stack} bytes of stack")
    if r.stack > STACK_LIMIT:
        found.append(f"{what}: {r.stack} bytes of stack, more than {STACK_LIMIT}")
    if r.shared > SHARED_LIMIT[r.job.arch] * 1024:
        found.append(f"{what}: {r.shared} bytes of shared memory, more than {SHARED_LIMIT[r.job.arch]} KiB")
    if r.job.width and r.job.dtype != "fp32" and not r.matrix:
        found.append(f"{what}: no matrix instruction")
    if r.job.arch == 90 and flash16 and r.loop["waits"] >= max(4, r.loop["matrix"]):
        found.append(f"{what}: the matrix units wait after every instruction")
    if not r.blocks_per_sm:
        found.append(f"{what}: does not fit a multiprocessor")
    return found


def tile_clocks(r: Report, products: int) -> float:
    """Clocks per tile and multiprocessor: the busiest unit, or where too few programs share one to overlap
    its units,
    their sum over the programs."""
    tile, per_clock = r.job.tile, CARDS[r.job.arch][3]
    matrix = products * 2 * tile.x * tile.y * r.job.width / per_clock
    others = max(
        r.powers_per_tile / POWERS_PER_CLOCK, r.loop["instructions"] * tile.warps / ISSUES_PER_CLOCK
    )  # fmt: skip
    ahead = matrix / products if tile.ahead else 0.0
    alone = max(ahead, others) + matrix - ahead
    return max(matrix, others, alone / r.blocks_per_sm)


# name, [(kernel, rows of x, rows of y, share of the matrix computed, products per tile)], D, passes of the
# floor
CASES = [
    (
        "NT-Xent 32768 pairs, D=128",
        [("sums: NT-Xent", 0.5, 1), ("grad: NT-Xent", 1.0, 2)],
        65536,
        65536,
        128,
        2.5,
    ),
    (
        "NT-Xent 32768 pairs, D=256",
        [("sums: NT-Xent", 0.5, 1), ("grad: NT-Xent", 1.0, 2)],
        65536,
        65536,
        256,
        2.5,
    ),
    (
        "NT-Xent 4096 pairs, D=128",
        [("sums: NT-Xent", 0.5, 1), ("grad: NT-Xent", 1.0, 2)],
        8192,
        8192,
        128,
        2.5,
    ),
    ("MoCo 4096 x 65536, D=128", [("expect: MoCo", 1.0, 2)], 4096, 65536, 128, 2.0),
]


def predict(reports: list[Report], dtype: str = "bf16") -> list[dict]:
    rows = []
    for arch in sorted({r.job.arch for r in reports}):
        card, sms, ghz, per_clock = CARDS[arch]
        for name, kernels, m, n, d, passes in CASES:
            clocks = 0.0
            for kernel, share, products in kernels:
                match = [
                    r
                    for r in reports
                    if (r.job.name, r.job.arch, r.job.dtype, r.job.width) == (kernel, arch, dtype, d)
                ]
                if not match:
                    break
                tiles = share * m * n / (match[0].job.tile.x * match[0].job.tile.y)
                clocks += tiles * tile_clocks(match[0], products) / sms
            else:
                floor = passes * 2 * m * n * d / (sms * ghz * 1e9 * per_clock)
                ms = clocks / (ghz * 1e9) * 1e3
                found = {"case": name, "arch": arch, "card": card, "dtype": dtype}
                rows.append({**found, "ms": ms, "floor_ms": floor * 1e3, "times_floor": ms / (floor * 1e3)})
    return rows


def show(reports: list[Report], rows: list[dict]) -> None:
    print(f"triton {triton.__version__}")
    layout = "{:30}{:>7}{:>6}{:>5}{:>14}{:>6}{:>6}{:>7}{:>8}{:>7}{:>7}{:>6}{:>10}"
    print(layout.format(
        "kernel", "arch", "dtype", "D", "tile", "regs", "stack", "spills", "shared", "matrix", "powers",
        "instr", "blocks/SM",
    ))  # fmt: skip
    for r in reports:
        j = r.job
        tile = f"{j.tile.x}x{j.tile.y} {j.tile.warps}w {j.tile.stages}s"
        print(layout.format(
            j.name, f"sm_{j.arch}", j.dtype, j.width, tile, r.registers, r.stack, r.spills, r.shared,
            r.loop["matrix"], r.powers_per_tile, r.loop["instructions"], r.blocks_per_sm,
        ))  # fmt: skip
    print("\npredicted, forward + backward, from published rates: not a measurement")
    for row in rows:
        print(
            f"{row['case']:28} {row['card']:9} {row['ms']:9.2f} ms, {row['times_floor']:.2f} times the floor"
        )


def main(
    json_out: Path | None = None,
    archs: tuple[int, ...] = (80, 86, 90, 100, 120),
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32"),
    quick: bool = False,
) -> None:
    """
    Args:
        json_out: where to write reports and predictions.
        archs: compute capabilities times ten.
        dtypes: of the rows.
        quick: leave out sm_86 and sm_120; fp32 and fp16 but on sm_90; fp16 above D=128 and in epilogues,
            where its code is bf16's but for a conversion; most of the narrow rows that share the tile of 128;
            and for some of the kernels that only move memory all architectures but sm_90.
    """
    archs = tuple(arch for arch in archs if not quick or arch in static_memory.QUICK)
    # Forked workers would inherit torch's threads; Triton's compiler holds the interpreter lock.
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        reports = list(pool.map(report, jobs(archs, dtypes, quick), chunksize=4))
        moving = list(pool.map(static_memory.report, static_memory.jobs(archs, quick)))
    rows = predict(reports)
    show(reports, rows)
    static_memory.show(moving)
    if json_out:
        results = {
            "triton": triton.__version__, "torch": torch.__version__, "cards": CARDS, "predictions": rows,
            "kernels": [{**dataclasses.asdict(r), "powers_per_tile": r.powers_per_tile} for r in reports],
            "memory_kernels": [dataclasses.asdict(r) for r in moving],
        }  # fmt: skip
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(results, indent=1) + "\n")
    wrong = [problem for r in reports for problem in problems(r)]
    wrong += [problem for r in moving for problem in static_memory.problems(r)]
    if wrong:
        sys.exit("\n".join(["", "not fit to ship:", *wrong]))


if __name__ == "__main__":
    tyro.cli(main)
