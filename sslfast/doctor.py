"""`sslfast doctor`: versions, devices, CPU features, which backend serves each op, why not the others."""

import importlib.metadata
import os
import platform
import sys

import torch

import sslfast
import sslfast._C as _C
from sslfast.kernels import tuning
from sslfast.ops import _backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report() -> str:
    return "\n".join([*_versions(), "", *_cpu(), *_gpus(), "", *_ops()])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _versions() -> list[str]:
    where = os.path.dirname(sslfast.__file__)
    return [
        f"sslfast {sslfast.__version__} in {where}",
        f"python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}, "
        f"numpy {_version('numpy')}, {sys.platform} {platform.machine()}",
    ]


def _cpu() -> list[str]:
    forced = os.environ.get("SSLFAST_CPU_ISA")
    pool = (
        "PyTorch's own pool"
        if _C.shares_openmp_pool()
        else "threads started per call (no OpenMP runtime found)"
    )
    return [
        f"CPU kernels: {_C.cpu_isa()}"
        + (" (SSLFAST_CPU_ISA)" if forced else "")
        + f" of {', '.join(_C.cpu_isas())}",
        f"CPU threads: {torch.get_num_threads()} on {pool}",
        f"CPU bfloat16 tiles (AMX): {'yes' if torch.cpu._is_amx_tile_supported() else 'no'}",
    ]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPU: none that PyTorch can use"]
    lines = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        lines.append(f"GPU {index}: {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
        path = tuning.cache_path(torch.device("cuda", index))
        lines.append(
            f"  block sizes: {f'measured, {path}' if path.exists() else 'built in (sslfast tune measures)'}"
        )
    return lines


def _ops() -> list[str]:
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = []
    for op in _backend.PREFERENCE:
        for device in devices:
            lines.append(f"{op} on {device}:")
            for dtype in DTYPES:
                lines.append(f"  {str(dtype).removeprefix('torch.')}: {_backend.resolve(op, device, dtype)}")
            for name in _backend.BACKENDS:
                reasons = {_backend.why_not(op, name, device, dtype) for dtype in DTYPES}
                lines += [f"  {name}: not used, {reason}" for reason in sorted(filter(None, reasons))]
    return lines
