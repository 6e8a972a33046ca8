"""Checks of arguments: every message names the argument, what was expected and what came."""

import math
import os
from numbers import Real

import torch
from torch import Tensor

TINIEST_TEMPERATURE = 1e-30  # below it the inverse, or a logit, would overflow a float32
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def traced() -> bool:
    """Whether tensors may be without numbers: under torch.compile and modes such as FakeTensorMode."""
    return torch.compiler.is_compiling() or bool(torch._C._len_torch_dispatch_stack())


def may_read(x: Tensor) -> bool:
    """Whether a check may look at x's numbers: on a GPU that would have to wait, unless SSLFAST_CHECK=1."""
    if traced():
        return False
    return x.device.type == "cpu" or os.environ.get("SSLFAST_CHECK") == "1"


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums, logits and losses: float64 for float64 input, otherwise float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_tensor(
    name: str,
    x: Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    like: Tensor | None = None,
) -> None:
    """Raises unless x is a tensor of one of `dtypes`, of `shape` (None: any size), on like's device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}{' (nested)' * x.is_nested}")
    got = x.shape
    fits = len(got) == len(shape)
    for want, size in zip(shape, got):  # noqa: B905 (lengths are compared above)
        fits = fits and (want is None or want == size)
    if not fits:
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(got)}")
    if x.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {x.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_count(name: str, value: int, counts: tuple[int, ...]) -> None:
    """An integer, one of a few."""
    if not isinstance(value, int) or isinstance(value, bool) or value not in counts:
        raise ValueError(f"{name}: expected {' or '.join(map(str, counts))}, got {value!r}")


def check_integer(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


def check_ids(name: str, ids: Tensor, shape: tuple[int | None, ...], count: int, like: Tensor) -> None:
    """int64 in [0, count); a GPU's numbers are looked at under SSLFAST_CHECK=1 only."""
    check_tensor(name, ids, (torch.int64,), shape, like)
    if may_read(ids) and ids.numel():
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= count:
            raise ValueError(f"{name}: expected indices in [0, {count}), got {low if low < 0 else high}")


def autocast(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both as torch.mm would cast them under autocast; float64 stays."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, y
    dtype = torch.get_autocast_dtype(x.device.type)
    both = [z.is_floating_point() and z.dtype != torch.float64 for z in (x, y) if isinstance(z, Tensor)]
    if not all(both):
        return x, y
    return x.to(dtype), y.to(dtype) if isinstance(y, Tensor) else y


def scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A number or 0-d tensor as a 0-d tensor of the working dtype on the device of `like`, gradient kept."""
    work = working_dtype(like)
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a number or a 0-d floating-point tensor, "
                f"got {value.dtype} {list(value.shape)}"
            )
        return value.to(like.device, work)
    if abs(number(name, value, SCALAR)) > torch.finfo(work).max:
        raise ValueError(f"{name}: expected a number that {work} can hold, got {value}")
    return torch.full((), value, dtype=work, device=like.device)


SCALAR = "a number or a 0-d tensor"


def number(name: str, value: float, expected: str = "a number") -> float:
    """A finite number, and not a bool."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced by torch.compile
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return value


def check_temperature(name: str, temperature: Tensor | float) -> None:
    """A number, or a 0-d tensor on the CPU, may not be 0 or non-finite."""
    if not isinstance(temperature, Tensor):
        if abs(number(name, temperature, SCALAR)) < TINIEST_TEMPERATURE:
            raise ValueError(f"{name}: expected a number other than 0, got {temperature}")
        return
    if temperature.dim() != 0 or not temperature.is_floating_point():
        raise ValueError(
            f"{name}: expected a number or a 0-d floating-point tensor, "
            f"got {temperature.dtype} {list(temperature.shape)}"
        )
    if may_read(temperature):
        check_temperature(name, float(temperature.detach()))


def inverse_temperature(name: str, temperature: Tensor | float, like: Tensor) -> Tensor | float:
    """1 / temperature, of a tensor in the working dtype and on the device of `like`, gradient kept."""
    check_temperature(name, temperature)
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature
    return temperature.to(like.device, working_dtype(like)).reciprocal()
