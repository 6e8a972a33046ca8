"""Which backend serves a call, and the one choke point where a tensor becomes an address."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from sslfast import _C

BACKENDS = ("cpu", "triton", "cuda", "reference")

# What each op prefers where nothing is forced; the first backend that can serve the call does.
PREFERENCE: dict[str, dict[str, tuple[str, ...]]] = {
    "similarity_lse": {"cpu": ("cpu",), "cuda": ("triton",)},
    "similarity_bce": {"cpu": ("cpu",), "cuda": ("triton",)},
    "ema_update_": {"cpu": ("cpu",), "cuda": ("triton", "cuda")},
    "random_patch_mask": {"cpu": ("cpu",), "cuda": ("triton", "cuda")},
    "block_patch_mask": {"cpu": ("cpu",), "cuda": ("triton", "cuda")},
    "gather_patches": {"cpu": ("cpu",), "cuda": ("triton",)},
    "restore_patches": {"cpu": ("cpu",), "cuda": ("triton",)},
    "embed_visible_patches": {"cpu": ("cpu",), "cuda": ("triton",)},
    "masked_patch_mse": {"cpu": ("cpu",), "cuda": ("triton",)},
    "soft_cross_entropy": {"cpu": ("cpu",), "cuda": ("triton",)},
    "head_cross_entropy": {"cpu": ("cpu",), "cuda": ("triton",)},
    "sinkhorn_pass": {"cpu": ("cpu",), "cuda": ("triton",)},
    "augment_views": {"cpu": ("cpu",), "cuda": ("triton",)},
}
# `Float` in csrc/floats.h
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_blocks: list["use_backend"] = []  # those entered and not left, of all threads
_forced: str | None = None  # the name of the last of them


@dataclass(frozen=True)
class Backend:
    """One backend of one op: its entry points, and why it cannot serve a device and dtype, if so."""

    forward: Callable
    backward: Callable | None
    refuses: Callable[[torch.device, torch.dtype], str | None]


_registered: dict[str, dict[str, Backend]] = {}


def register(op: str, name: str, backend: Backend) -> None:
    _registered.setdefault(op, {})[name] = backend


def implementation(op: str, name: str) -> Backend:
    return _registered[op][name]


class use_backend:
    """Forces one backend for every op called inside a `with` block, in the whole process (all threads).

    A call that the backend cannot serve raises RuntimeError. The backward pass of a call uses the backend of
    its forward pass, wherever and whenever it runs.

    Args:
        name: "cpu" (C++), "triton", "cuda" (C++) or "reference" (plain PyTorch).

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"use_backend: name: expected one of {', '.join(BACKENDS)}, got {name!r}")
        self.name = name

    def __enter__(self) -> "use_backend":
        global _forced
        _blocks.append(self)
        _forced = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _blocks.remove(self)  # blocks of several threads need not end in the order in which they began
        _forced = _blocks[-1].name if _blocks else None


def forced() -> str | None:
    """The backend that an enclosing `use_backend` forces, if any."""
    return _forced


def why_not(op: str, name: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why `name` cannot serve `op` for this device and dtype; None where it can."""
    if name == "reference":
        return None
    if name not in _registered.get(op, {}):
        return "this op has no such backend"
    return _registered[op][name].refuses(torch.device(device), dtype)


def resolve(op: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that serves `op` for tensors of this device and dtype now."""
    device = torch.device(device)
    if _forced is not None:
        reason = why_not(op, _forced, device, dtype)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {_forced!r} cannot serve {dtype} on {device}: {reason}")
        return _forced
    for name in PREFERENCE[op].get(device.type, ()):
        if why_not(op, name, device, dtype) is None:
            return name
    return "reference"


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can serve at least one op on this machine, best first."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    dtypes = (torch.float32, torch.bfloat16)

    def serves(name: str) -> bool:
        return any(why_not(op, name, d, t) is None for op in _registered for d in devices for t in dtypes)

    return tuple(name for name in BACKENDS if serves(name))


def triton_refuses(device: torch.device) -> str | None:
    """Why Triton's kernels cannot serve tensors of this device; None where they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if not hasattr(triton, "knobs"):
        return f"it needs Triton 3.6 or newer, got {triton.__version__}"
    from sslfast.kernels import similarity_lse_rows as kernels

    if device.type == "cpu":
        interpreted = not isinstance(kernels.pack, triton.JITFunction)
        return None if interpreted else "it serves CUDA tensors (and, under TRITON_INTERPRET=1, CPU tensors)"
    if device.type != "cuda":
        return f"it has no kernel for {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_properties(device).major < 8:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def cuda_refuses(device: torch.device, function: str) -> str | None:
    """Why the compiled module's CUDA `function` cannot serve tensors of this device; None where it can."""
    if not hasattr(_C, function):
        return "it was built without nvcc"
    if device.type != "cuda" or not torch.version.cuda:
        return "it serves CUDA tensors"
    if torch.cuda.is_available() and torch.cuda.get_device_properties(device).major < 8:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


def cpu_refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """The same of C++ kernels that take every dtype of CODES."""
    if device.type != "cpu":
        return "it serves CPU tensors"
    return None if dtype in CODES else f"it has no kernel for {dtype}"


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one: a kernel is launched there, on its current stream."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def pointer(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> int:
    """The address of a tensor's data, 0 for None, once everything a kernel relies on has been checked."""
    if tensor is None:
        return 0
    if (
        tensor.device != device
        or tensor.dtype != dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or tensor.is_neg()
    ):
        raise ValueError(
            f"{name}: a kernel needs a contiguous {dtype} tensor of shape {tuple(shape)} on {device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
        )
    return address(name, tensor)


def strided(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> tuple[int, tuple[int, ...]]:
    """The address and strides of a tensor that need not be contiguous, checked like `pointer`."""
    if tensor.device != device or tensor.dtype != dtype or tensor.shape != shape or tensor.is_neg():
        raise ValueError(
            f"{name}: a kernel needs a {dtype} tensor of shape {tuple(shape)} on {device}, "
            f"got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )
    return address(name, tensor), tensor.stride()


def address(name: str, tensor: Tensor) -> int:
    """The address alone, of a tensor that the caller has checked; 0 for an empty one."""
    at = tensor.data_ptr()
    if not at and tensor.numel():
        raise ValueError(f"{name}: a kernel needs a tensor with memory, got one whose storage was freed")
    return at


_EXCHANGE = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch 2.10 and newer


def describe(tensors: list) -> Any:
    """Which objects tensors are, their addresses, devices, dtypes, shapes and strides, for `unchanged`.

    None may stand among them. The result is None where a tensor has no memory to speak of.
    """
    if _EXCHANGE is not None:
        return _C.describe(tensors, _EXCHANGE)
    try:
        return [
            x if x is None else (id(x), x.data_ptr(), x.device, x.dtype, x.shape, x.stride()) for x in tensors
        ]
    except (RuntimeError, NotImplementedError):
        return None


def unchanged(tensors: list, described: Any) -> bool:
    """Whether tensors are as they were described, so that what was checked then need not be again."""
    if described is None:
        return False
    return (
        _C.matches(tensors, _EXCHANGE, described) if _EXCHANGE is not None else describe(tensors) == described
    )
