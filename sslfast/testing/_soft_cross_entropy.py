"""Cases of soft_cross_entropy, with views and targets as dino_loss has them too."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.ops._check import FLOATS
from sslfast.testing._op import Inputs, Op

# The function of the same name hides this module in the package.
_op = importlib.import_module("sslfast.ops.soft_cross_entropy")


@dataclass(frozen=True)
class SoftCrossEntropyCase:
    """Logits [views, batch, classes] against targets [targets, batch, classes].

    Attributes:
        kind: of targets: logits with a center, without, or probabilities ("sums": times up to 3).
        size: standard deviation of logits. layout: of logits and targets.
        other: dtype of the targets, "" the logits'.
    """

    name: str
    views: int = 1
    targets: int = 1
    batch: int = 5
    classes: int = 37
    kind: Literal["centered", "logits", "probabilities", "sums", "one class"] = "probabilities"
    scale: float = 10.0
    target_scale: float = 25.0
    skip: bool = False
    size: float = 1.0
    layout: Literal["", "rows apart", "gaps", "expanded"] = ""
    other: Literal["", "float32"] = ""
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        a = normal(self.views, self.batch, self.classes) * self.size
        targets, target_scale = normal(self.targets, self.batch, self.classes), None
        if self.kind in ("centered", "logits"):
            targets, target_scale = targets * self.size, self.target_scale
        elif self.kind == "one class":
            targets = torch.nn.functional.one_hot(targets.argmax(2), self.classes)
        else:
            targets = (3 * targets).softmax(2)
            if self.kind == "sums":
                targets = targets * 3 * torch.rand(self.batch, 1, dtype=torch.float64, generator=generator)
        kind = torch.promote_types(dtype, torch.float32) if self.other else dtype
        a, targets = (with_layout(x.to(t), self.layout).to(device) for x, t in ((a, dtype), (targets, kind)))
        work = torch.promote_types(dtype, torch.float32)
        center = (normal(self.classes) * 0.3 * self.size).to(device, work)
        return {
            "a": a, "targets": targets, "center": center if self.kind == "centered" else None,
            "scale": self.scale, "target_scale": target_scale, "skip": self.skip,
        }  # fmt: skip


def with_layout(x: Tensor, kind: str) -> Tensor:
    """The same numbers with room between rows, between elements, or of one image expanded."""
    if kind == "rows apart":
        return torch.cat((x, torch.full_like(x, torch.nan)), 2)[..., : x.shape[2]]
    if kind == "gaps":
        return x.new_full((*x.shape, 2), torch.nan)[..., 0].copy_(x)
    return x[:, :1].expand(x.shape) if kind == "expanded" else x


_C = SoftCrossEntropyCase
CASES: list[SoftCrossEntropyCase] = [
    _C("no row", batch=0),
    _C("one class", classes=1),
    _C("one row", batch=1),
    _C("probabilities"),
    _C("labels", kind="one class"),
    _C("sums of probabilities", kind="sums"),
    _C("several blocks", classes=5003, kind="sums"),
    _C("several threads", batch=64, classes=3000),
    _C("DINO", 10, 2, 3, 2500, "centered", skip=True),
    _C("DINO, one teacher view", 4, 1, 3, 100, "centered", skip=True),
    _C("three teacher views", 5, 3, 4, 65, "centered", skip=True),
    _C("more teacher views than views", 2, 3, 4, 65, "logits", skip=True),
    _C("every pair", 3, 2, 4, 64, "centered"),
    _C("views of probabilities", 4, 2, 3, 50, skip=True),
    _C("logits 1000", 4, 2, 3, 100, "centered", scale=10.0, skip=True, size=40.0),
    _C("temperature 0.001", 4, 2, 3, 100, "centered", scale=1000.0, target_scale=1000.0, skip=True),
    _C("temperature 100", 4, 2, 3, 100, "centered", scale=0.01, target_scale=0.01, skip=True),
    _C("negative scale", scale=-20.0, kind="sums"),
    _C("negative temperatures", 3, 2, 4, 70, "centered", scale=-10.0, target_scale=-25.0, skip=True),
    _C("scale 0", scale=0.0),
    _C("rows apart", 4, 2, 5, 33, "centered", skip=True, layout="rows apart"),
    _C("gaps", 4, 2, 5, 33, "centered", skip=True, layout="gaps"),
    _C("expanded", 4, 2, 5, 33, "centered", skip=True, layout="expanded"),
    _C("float32 targets", kind="sums", other="float32"),
    _C("float32 teacher", 4, 2, 5, 33, "centered", skip=True, other="float32"),
]


def _run(
    a: Tensor, targets: Tensor, center: Tensor | None, scale: float, target_scale: float | None, skip: bool
) -> Tensor:
    return _op.view_cross_entropy(a, targets, scale, center=center, target_scale=target_scale, skip=skip)


def _reference(
    a: Tensor, targets: Tensor, center: Tensor | None, scale: float, target_scale: float | None, skip: bool
) -> Tensor:
    return _op.reference(a, targets, center, scale, target_scale or 0.0, target_scale is not None, skip)


def _larger_and_back(inputs: Inputs) -> dict[str, Any]:
    """The same numbers, each rounded anew."""
    return {k: x * 1.1 / 1.1 if isinstance(x, Tensor) else x for k, x in inputs.items()}


def _terms(inputs: Inputs, upstream: Sequence[Tensor | None]) -> tuple[float, dict]:
    """An element of the gradient is upstream scale (W softmax - Q), here without the sign."""
    (u,), a, scale = upstream, inputs["a"], inputs["scale"]
    assert u is not None
    logits = [scale * a, *([inputs["target_scale"] * inputs["targets"]] if inputs["target_scale"] else [])]
    largest = max((x.abs().max().item() for x in logits if x.numel()), default=0.0)
    leaf = a.detach().requires_grad_()
    loss = _reference(**{**inputs, "a": leaf})
    (gradient,) = torch.autograd.grad(loss, leaf, u)
    # scale u W softmax = gradient + scale u Q, and Q is what is left of the gradient without the softmax
    targets = inputs["targets"].detach()
    if inputs["target_scale"] is not None:
        center = 0 if inputs["center"] is None else inputs["center"]
        targets = ((targets - center) * inputs["target_scale"]).softmax(2)
    rows = [
        sum((q for t, q in enumerate(targets) if not (inputs["skip"] and t == v)), torch.zeros_like(a[0]))
        for v in range(len(a))
    ]
    size = gradient.abs() + 2 * abs(scale) * u.abs()[..., None] * torch.stack(rows).abs()
    return largest, {"a": (size, size)}


OP = Op(_run, _reference, _larger_and_back, _terms, ("a",))
