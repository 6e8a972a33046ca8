"""Cases of `ema_update_`, and what a comparison needs to know of it.

Its inputs here are single tensors, t0, s0, t1, s1, ..., and its outputs are the targets afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.ops import ema_update_
from sslfast.ops._check import FLOATS
from sslfast.ops.ema import reference
from sslfast.testing._op import Inputs, Op


@dataclass(frozen=True)
class EmaCase:
    """One kind of lists; `inputs` makes fresh random numbers of that kind.

    Attributes:
        name: unique within the op.
        shapes: of the targets, all of the dtype that `inputs` is given.
        sources: dtypes of the sources, in turns; None: that of the targets.
        momentum: a number, or "tensor": a 0-d float64 tensor.
        layout: of both sides; "channels last" and "transposed" are dense, "offset" begins one element behind
            where vectors may be loaded from, matrices with "gaps" leave every other element out; "mixed": the
            source alone is transposed.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    sources: tuple[torch.dtype | None, ...] = (None,)
    momentum: float | Literal["tensor"] = 0.99
    layout: Literal["contiguous", "channels last", "transposed", "offset", "gaps", "mixed"] = "contiguous"
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Arguments of `run`, with the same numbers on any device, rounded to their dtypes."""
        generator = torch.Generator().manual_seed(seed)
        inputs: dict[str, Any] = {}
        for i, shape in enumerate(self.shapes):
            kinds = {"t": dtype, "s": self.sources[i % len(self.sources)] or dtype}
            for side, kind in kinds.items():
                x = torch.randn(shape, dtype=torch.float64, generator=generator).to(kind)
                layout = "contiguous" if self.layout == "mixed" and side == "t" else self.layout
                inputs[f"{side}{i}"] = _with_layout(x, layout).to(device)
        momentum = self.momentum
        if momentum == "tensor":
            return {**inputs, "momentum": torch.tensor(0.9, dtype=torch.float64, device=device)}
        return {**inputs, "momentum": momentum}


def _with_layout(x: Tensor, layout: str) -> Tensor:
    if layout == "channels last" and x.dim() == 4:
        return x.to(memory_format=torch.channels_last)
    if layout in ("transposed", "mixed") and x.dim() == 2:
        return x.t().contiguous().t()
    if layout == "offset":
        return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)
    if layout == "gaps" and x.dim() == 2:
        return x.new_full((*x.shape, 2), torch.nan)[..., 0].copy_(x)
    return x


_Case, _SMALL = EmaCase, ((3,), (1,), (0,), (4, 5), (), (2, 3, 5, 7))

CASES: list[EmaCase] = [
    _Case("one number", ((),)),
    _Case("small", _SMALL),
    _Case("empty ones", ((0,), (3, 0), (1,))),
    _Case("several segments", ((3, 16384), (16385,), (16383,), (7,))),
    _Case("several threads", ((50_001,), (2, 40_000), (1,))),
    _Case("many tiny", ((3,),) * 700),
    *(_Case(f"from {str(s)[6:]}", _SMALL + ((3000,),), sources=(s,)) for s in FLOATS),
    _Case("from all dtypes", _SMALL + ((3000,),), sources=FLOATS),
    *(_Case(f"momentum {m}", ((5000,), (3,)), momentum=m) for m in (0.0, 0.3, 0.5, 0.9999, 1.0)),
    _Case("momentum tensor", ((5000,), (3,)), momentum="tensor"),
    _Case("momentum tensor, from bfloat16", ((5000,), (3,)), sources=(torch.bfloat16,), momentum="tensor"),
    _Case("channels last", ((4, 8, 3, 3), (2, 3, 5, 7)), layout="channels last"),
    _Case("transposed", ((33, 65), (7,)), layout="transposed"),
    _Case("not aligned", ((33, 65), (20_000,)), layout="offset"),
    _Case("gaps", ((33, 65), (7,)), layout="gaps"),
    _Case("other strides on either side", ((33, 65), (7,)), layout="mixed"),
]


def _lists(inputs: Inputs) -> tuple[list[Tensor], list[Tensor], Any]:
    """Copies of the targets, in their strides."""
    count = sum(name.startswith("t") for name in inputs)
    targets = [inputs[f"t{i}"] for i in range(count)]
    copies = [t.new_empty_strided(t.shape, t.stride()).copy_(t) for t in targets]
    for i, (t, copied) in enumerate(zip(targets, copies, strict=True)):
        if t.data_ptr() % 16:  # as unaligned as it was
            copies[i] = t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(copied)
    return copies, [inputs[f"s{i}"] for i in range(count)], inputs["momentum"]


def _updated(update: Callable) -> Callable:
    def run(**inputs: Any) -> tuple[Tensor, ...]:
        targets, sources, momentum = _lists(inputs)
        update(targets, sources, momentum)
        return tuple(targets)

    return run


def _equivalent(inputs: Inputs) -> dict[str, Any]:
    """The sides exchanged, with 1 - momentum; the target's dtype is both sides' here."""
    swapped = {("s" if k[0] == "t" else "t") + k[1:]: x for k, x in inputs.items() if k != "momentum"}
    swapped = {k: x.to(inputs[k].dtype) for k, x in swapped.items()}
    return {**swapped, "momentum": 1 - inputs["momentum"]}


def _terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    values = [x.abs().max().item() for k, x in inputs.items() if k != "momentum" and x.numel()]
    return max(values, default=0.0), {}


OP = Op(_updated(ema_update_), _updated(reference), _equivalent, _terms, gradients=())
