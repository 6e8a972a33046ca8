"""What the compiler says of the Triton kernels that only move memory; static_gpu.py shows it too."""

import dataclasses
import re
import tempfile
from pathlib import Path

import sass
import triton
import triton.language as tl
from sslfast.kernels import ema, tuning
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
WARPS = 4
WARPS_SM = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # CUDA C programming guide


@dataclasses.dataclass(frozen=True)
class Job:
    """ema_update_ for one pair of dtypes."""

    arch: int
    target: str
    source: str


@dataclasses.dataclass(frozen=True)
class Report:
    """wide: loads and stores of 16 bytes per thread. warps: of a multiprocessor, which holds `most`."""

    job: Job
    registers: int
    stack: int
    spills: int
    wide_loads: int
    wide_stores: int
    warps: int
    most: int


def jobs(archs: tuple[int, ...]) -> list[Job]:
    pairs = (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp16", "fp16"), ("fp64", "fp64"))
    return [Job(arch, *pair) for arch in archs for pair in pairs]


def report(job: Job) -> Report:
    flags = {
        "TARGET": DTYPES[job.target],
        "SOURCE": DTYPES[job.source],
        "WORK": tl.float64 if "fp64" in (job.target, job.source) else tl.float32,
        "ON_DEVICE": True,
        "BLOCK": tuning.EMA_BLOCK,
    }
    kinds = {"table_ptr": "*i64", "momentum_ptr": "*fp64", "momentum_bits": "i64"}
    signature = {name: kinds.get(name, "constexpr") for name in ema.ema_update.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    source = ASTSource(ema.ema_update, signature, constexprs=flags, attrs=aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options={"num_warps": WARPS})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+)", sass.run("cuobjdump", "-res-usage", str(cubin)))
        instructions, _ = sass.parse(sass.run("nvdisasm", str(cubin)))
    assert usage
    registers, stack = map(int, usage.groups())
    granted = -(-registers // 8) * 8 * 32 * WARPS
    return Report(
        job, registers, stack, sum(sass.is_any(x, "LDL", "STL") for x in instructions),
        sum(sass.is_any(x, "LDG") and ".128" in x for x in instructions),
        sum(sass.is_any(x, "STG") and ".128" in x for x in instructions),
        min(WARPS_SM[job.arch], 65536 // granted * WARPS), WARPS_SM[job.arch],
    )  # fmt: skip


def problems(r: Report) -> list[str]:
    what = f"ema_update_ sm_{r.job.arch} {r.job.target} from {r.job.source}"
    found = []
    if r.spills:
        found.append(f"{what}: {r.spills} spills")
    if not (r.wide_loads and r.wide_stores):
        found.append(f"{what}: no loads or stores of 16 bytes")
    if 2 * r.warps < r.most:
        found.append(f"{what}: {r.warps} warps of {r.most} on a multiprocessor")
    return found


def show(reports: list[Report]) -> None:
    for r in reports:
        print(
            f"ema_update_ {r.job.target} from {r.job.source:5} sm_{r.job.arch:<4} {r.registers:3} registers, "
            f"{r.stack} bytes of stack, {r.spills} spills, {r.wide_loads} loads, {r.wide_stores} stores of "
            f"16 bytes, {r.warps} of {r.most} warps"
        )
