"""Cases of head_cross_entropy and of Sinkhorn's passes."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.ops import sinkhorn
from sslfast.ops._check import FLOATS
from sslfast.testing._op import Inputs, Op
from sslfast.testing._soft_cross_entropy import with_layout

_op = importlib.import_module("sslfast.ops.head_cross_entropy")


@dataclass(frozen=True)
class HeadCase:
    """Features [views, batch, dim] and [targets, batch, target_dim] against prototypes, all of unit rows
    times `size`."""

    name: str
    views: int = 4
    targets: int = 2
    batch: int = 3
    classes: int = 300
    dim: int = 16
    target_dim: int = 16
    scale: float = 10.0
    target_scale: float = 25.0
    center: bool = True
    skip: bool = True
    size: float = 1.0
    prototypes: Literal["", "float32"] = ""  # their dtype; "" that of the features
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def unit(*shape: int) -> Tensor:
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            return torch.nn.functional.normalize(x, dim=-1) * self.size

        work = torch.promote_types(dtype, torch.float32)
        kind = work if self.prototypes else dtype
        center = (unit(1, self.classes)[0] * 3).to(device, work)
        return {
            "a": unit(self.views, self.batch, self.dim).to(device, dtype),
            "prototypes": unit(self.classes, self.dim).to(dtype).to(device, kind),
            "target_features": unit(self.targets, self.batch, self.target_dim).to(device, dtype),
            "target_prototypes": unit(self.classes, self.target_dim).to(dtype).to(device, kind),
            "center": center if self.center else None,
            "scale": self.scale, "target_scale": self.target_scale, "skip": self.skip,
        }  # fmt: skip


_H = HeadCase
HEAD_CASES: list[HeadCase] = [
    _H("no image", batch=0),
    _H("one prototype", classes=1),
    _H("one image", batch=1),
    _H("DINO", 10, 2, 2, 1000),
    _H("every pair", skip=False),
    _H("one teacher view", targets=1),
    _H("more teacher views", views=2, targets=3),
    _H("one of each", 1, 1, 7, 90, skip=False),
    _H("no center", center=False),
    _H("teacher of another width", target_dim=24),
    _H("wide", dim=40, target_dim=40),
    _H("temperature 0.001", scale=1000.0, target_scale=1000.0),
    _H("temperature 100", scale=0.01, target_scale=0.01),
    _H("negative temperatures", scale=-10.0, target_scale=-25.0),
    _H("logits 1000", size=10.0),
    _H("float32 prototypes", prototypes="float32"),
    _H("several chunks", 5, 2, 12, 700, 8, 8),
    _H("many prototypes", 3, 2, 2, 9001, 8, 8),
]


def _run_head(a: Tensor, **others: Any) -> Tensor:
    return _op.head_cross_entropy(a, **others)


def _head_reference(a: Tensor, **others: Any) -> Tensor:
    return _op.reference(a, **others)


def _head_equivalent(inputs: Inputs) -> dict[str, Any]:
    """The same numbers, features in the opposite order: products add up differently."""
    flipped = ("a", "prototypes", "target_features", "target_prototypes")
    return {k: x.flip(-1) if k in flipped else x for k, x in inputs.items()}


def _head_terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    """With G = scale u (W p - Q):  da_r = sum_k G_rk w_k,  dw_k = sum_r G_rk a_r; here |G| is its two terms'
    sum."""
    (u,), a, w = upstream, inputs["a"].detach(), inputs["prototypes"].detach()
    assert u is not None
    scale, target_scale, center = inputs["scale"], inputs["target_scale"], inputs["center"]
    logits = a @ w.T * scale
    targets = inputs["target_features"] @ inputs["target_prototypes"].T
    targets = (targets if center is None else targets - center) * target_scale
    largest = max((x.abs().max().item() for x in (logits, targets) if x.numel()), default=0.0)
    q, p = targets.softmax(2), logits.softmax(2)
    rows = []
    for v, row in enumerate(p):
        others = [x for t, x in enumerate(q) if not (inputs["skip"] and t == v)]
        rows.append(row * len(others) + sum(others, torch.zeros_like(row)))
    size = torch.stack(rows) * abs(scale) * u.abs()[..., None]
    g, f = size.flatten(0, 1), a.flatten(0, 1)
    return largest, {
        "a": ((g @ w.abs()).view(a.shape), (g**2 @ w**2).sqrt().view(a.shape)),
        "prototypes": (g.T @ f.abs(), (g.T**2 @ f**2).sqrt()),
    }


HEAD_OP = Op(_run_head, _head_reference, _head_equivalent, _head_terms, ("a", "prototypes"), tiles=True)


@dataclass(frozen=True)
class SinkhornCase:
    """One pass over logits [rows, classes] of standard deviation `size`."""

    name: str
    over: Literal["classes", "rows", "none"]
    rows: int = 20
    classes: int = 37
    scale: float = 10.0
    v: bool = False
    u: bool = False
    size: float = 1.0
    layout: Literal["", "rows apart", "gaps"] = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator) * self.size

        work = torch.promote_types(dtype, torch.float32)
        logits = with_layout(normal(1, self.rows, self.classes).to(dtype), self.layout)[0].to(device)
        v, u = (
            (normal(n) * abs(self.scale)).to(device, work) if there else None
            for n, there in ((self.classes, self.v), (self.rows, self.u))
        )
        if self.over == "none":  # as an assignment has it: rows sum to 1
            u = -sinkhorn.reference(logits, v, None, self.scale, "classes")
        return {"a": logits, "v": v, "u": u, "scale": self.scale, "over": self.over}


_S = SinkhornCase
SINKHORN_CASES: list[SinkhornCase] = [
    _S("one row", "classes", rows=1),
    _S("one class", "classes", classes=1),
    _S("rows", "classes"),
    _S("rows, both factors", "classes", v=True, u=True),
    _S("long rows", "classes", 3, 9001, v=True),
    _S("rows apart", "classes", v=True, layout="rows apart"),
    _S("rows, temperature 0.001", "classes", scale=1000.0, v=True),
    _S("columns", "rows"),
    _S("columns, both factors", "rows", v=True, u=True),
    _S("columns of one row", "rows", rows=1),
    _S("one column", "rows", classes=1, u=True),
    _S("long columns", "rows", 700, 300, u=True),
    _S("columns, negative scale", "rows", scale=-10.0, u=True),
    _S("columns, temperature 0.001", "rows", 200, 50, scale=1000.0, u=True),
    _S("columns, logits 1000", "rows", size=50.0, u=True),
    _S("columns with gaps", "rows", u=True, layout="gaps"),
    _S("fill", "none", v=True),
    _S("fill long rows", "none", 3, 5000),
    _S("fill, temperature 0.001", "none", scale=1000.0, v=True),
]


def _run_pass(a: Tensor, v: Tensor | None, u: Tensor | None, scale: float, over: str) -> Tensor:
    return sinkhorn.sinkhorn_pass(a, v, u, scale, over)


def _pass_reference(a: Tensor, v: Tensor | None, u: Tensor | None, scale: float, over: str) -> Tensor:
    return sinkhorn.reference(a, v, u, scale, over)


def _pass_equivalent(inputs: Inputs) -> dict[str, Any]:
    """The same numbers, each rounded anew."""
    return {k: x * 1.1 / 1.1 if isinstance(x, Tensor) else x for k, x in inputs.items()}


def _pass_terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    a, v, u = inputs["a"], inputs["v"], inputs["u"]
    sizes = (a * inputs["scale"], v, u)
    return sum(x.abs().max().item() for x in sizes if x is not None and x.numel()), {}


SINKHORN_OP = Op(_run_pass, _pass_reference, _pass_equivalent, _pass_terms, gradients=())
