"""What is benchmarked: a table entry, and what each implementation is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sslfast

Inputs = dict[str, Any]
"""Arguments by name: tensors, lists of tensors, and numbers."""


@dataclass(frozen=True)
class Work:
    """What cannot be avoided without storing a matrix: FLOPs of products, bytes read or written once."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclass(frozen=True)
class Case:
    """An op or a loss at one size after another."""

    op: str
    """Its public name."""
    shape: str
    """Of the inputs, with {} for the size if there can be others."""
    sizes: tuple[int, ...]
    """Of a run on a CPU that names none."""
    gpu_sizes: tuple[int, ...]
    inputs: Callable[[int, torch.dtype, torch.device], Inputs]
    ours: Callable[..., Any]
    """Of the inputs, by name: a tensor or several."""
    plain: Callable[..., Any] | None = None
    """The same in plain PyTorch, as most code has it; None: `ours` with every op's reference."""
    trained: tuple[str, ...] = ()
    """Inputs that get a gradient; without any there is no backward pass."""
    work: Callable[[int, int, bool], Work] = lambda size, itemsize, backward: Work()
    """Of a size, the bytes of a number, and whether the backward pass is included."""
    compiles: bool = True
    """Whether torch.compile can make something of it."""
    updated: str = ""
    """The input that is written to, whose numbers are then the result."""
    variant: str = ""
    """What tells several cases of an op apart."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    tolerance: float = 1.0
    """Times the usual error that is allowed."""

    def sizes_on(self, device: torch.device, wanted: tuple[int, ...] = ()) -> tuple[int, ...]:
        own = self.gpu_sizes if device.type == "cuda" else self.sizes
        return wanted if wanted and "{}" in self.shape else own

    @property
    def name(self) -> str:
        return f"{self.op}, {self.variant}" if self.variant else self.op

    def eager(self, **inputs: Any) -> Any:
        """Plain PyTorch; in float64 the truth."""
        if self.plain:
            return self.plain(**inputs)
        with sslfast.use_backend("reference"):
            return self.ours(**inputs)


def wide(logits: Tensor) -> Tensor:
    """float32 for 16-bit logits, as autocast has it for a softmax."""
    return logits.float() if logits.dtype.itemsize == 2 else logits


def mapped(change: Callable[[Tensor], Any], value: Any) -> Any:
    """`change` of every tensor in an input."""
    if isinstance(value, Tensor):
        return change(value)
    return [mapped(change, x) for x in value] if isinstance(value, list) else value


def copied(case: Case, inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Leaves of their own; floating ones in `dtype`."""

    def copy(x: Tensor) -> Tensor:
        return x.detach().to(dtype if dtype and x.is_floating_point() else x.dtype, copy=True)

    new = {name: mapped(copy, value) for name, value in inputs.items()}
    for name in case.trained:
        new[name].requires_grad_()
    return new


def outputs(result: Any) -> list[Tensor]:
    """As a list; for trained ones, those with a gradient are pulled."""
    return [x for x in result if x is not None] if isinstance(result, tuple | list) else [result]


def forward(case: Case, call: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    result = call(**inputs)
    return outputs(inputs[case.updated] if case.updated else result)


def upstream_of(results: list[Tensor], scale: float = 1.0) -> list[Tensor]:
    """Fixed numbers for each result that has a gradient; `scale` for a loss."""
    found = []
    for i, x in enumerate(x for x in results if x.requires_grad):
        generator = torch.Generator(x.device).manual_seed(i)
        found.append(
            torch.randn(x.shape, generator=generator, device=x.device).to(x)
            if x.dim()
            else x.new_full((), scale)
        )
    return found


def gradients(case: Case, results: list[Tensor], inputs: Inputs, upstream: list[Tensor]) -> list[Tensor]:
    pulled = [x for x in results if x.requires_grad]
    like = [u.to(x.dtype) for u, x in zip(upstream, pulled, strict=True)]
    return list(torch.autograd.grad(pulled, [inputs[name] for name in case.trained], like))
