"""Cases of `similarity_bce`, whose rows and ids are those of `similarity_lse`'s cases."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sslfast.ops._check import FLOATS, working_dtype
from sslfast.ops.similarity_bce import reference, similarity_bce
from sslfast.testing._op import Inputs, Op
from sslfast.testing._similarity_lse import SimilarityLseCase, _equivalent


@dataclass(frozen=True)
class SimilarityBceCase:
    """One kind of input of `similarity_bce`: m rows, n columns, d features, scale and bias as 0-d tensors;
    total as the op's, the rest as in SimilarityLseCase."""

    name: str
    m: int
    n: int
    d: int = 16
    scale: float = 1.0
    bias: float = -1.0
    rows: Any = "normal"
    ids: Any = "own"
    magnitude: tuple[float, float] = (1.0, 1.0)
    layout: Any = "contiguous"
    total: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        case = SimilarityLseCase(
            self.name, self.m, self.n, self.d, self.scale, True, self.rows, self.magnitude, ids=self.ids,
            layout=self.layout,
        )  # fmt: skip
        inputs = case.inputs(dtype, device, seed)
        inputs["bias"] = torch.tensor(self.bias, dtype=working_dtype(inputs["a"]), device=device)
        inputs["total"] = self.total
        return {k: x for k, x in inputs.items() if k not in ("pairs", "return_cols")}


_Case, _WIDE = SimilarityBceCase, (torch.float32, torch.bfloat16, torch.float64)  # beyond float16's range

CASES: list[SimilarityBceCase] = [
    _Case("small", 65, 65),
    _Case("total", 65, 65, total=True),
    _Case("as SigLIP begins", 700, 700, d=32, rows="unit", scale=10.0, bias=-10.0, total=True),
    _Case("as SigLIP begins, rows apart", 400, 400, d=32, rows="unit", scale=10.0, bias=-10.0),
    _Case("as SigLIP ends", 300, 300, d=32, rows="unit", scale=117.0, bias=-13.0, total=True),
    _Case("more rows than columns", 430, 70, ids="classes", total=True),
    _Case("more columns than rows", 70, 1100, ids="classes"),
    _Case("many tiles", 800, 1100, d=128, rows="unit", scale=10.0, total=True),
    _Case("wide rows", 60, 50, d=300, rows="unit", scale=10.0, total=True),
    _Case("one pair", 1, 1, total=True),
    _Case("one row", 1, 700, total=True),
    _Case("one column", 700, 1),
    _Case("no columns", 5, 0, total=True),
    _Case("no rows", 0, 5, total=True),
    _Case("nothing", 0, 0),
    _Case("D 0", 5, 4, d=0, total=True),
    _Case("D 1", 33, 20, d=1),
    _Case("scale 0", 40, 30, scale=0.0, total=True),
    _Case("negative scale", 40, 30, scale=-0.7, total=True),
    _Case("logits of hundreds", 40, 30, scale=50.0, total=True),
    _Case("logits far below 0", 40, 40, scale=0.1, bias=-60.0, total=True),
    _Case("logits far above 0", 40, 40, scale=0.1, bias=60.0),
    _Case("classes", 90, 70, ids="classes", total=True),
    _Case("sorted classes", 1030, 1100, d=8, ids="sorted"),
    _Case("all equal", 30, 20, ids="equal", total=True),
    _Case("none equal", 30, 20, ids="apart"),
    _Case("wide ids", 60, 50, ids="wide", total=True),
    _Case("transposed", 60, 50, layout="transposed", ids="classes", total=True),
    _Case("strided", 60, 50, layout="strided", ids="classes"),
    _Case("expanded", 60, 50, layout="expanded", total=True),
    _Case("huge norms", 60, 50, magnitude=(1e15, 1e15), scale=1e-30, dtypes=_WIDE, total=True),
    _Case("tiny norms", 60, 50, magnitude=(1e-15, 1e-15), scale=1e30, dtypes=_WIDE),
]


def similarity_bce_reference(
    a: Tensor, b: Tensor, *, scale: Any, bias: Any, a_ids: Tensor, b_ids: Tensor, total: bool
) -> Tensor:
    """The reference of `similarity_bce` under the public function's arguments."""
    row = reference(a, b, scale, bias, a_ids, b_ids)
    return row.sum() if total else row


def _terms(
    inputs: Inputs, upstream: Sequence[Tensor | None]
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    a, b, scale = inputs["a"], inputs["b"], inputs["scale"]
    logits = scale * (a @ b.T) + inputs["bias"]
    sign = torch.where(inputs["a_ids"][:, None] == inputs["b_ids"], 1.0, -1.0).double()
    weights = torch.sigmoid(-sign * logits)
    if upstream[0] is not None:
        weights = weights * upstream[0].abs().expand(len(a))[:, None]

    def sums(power: int) -> dict[str, Tensor]:
        w, x, y, k = weights**power, a.abs() ** power, b.abs() ** power, scale.abs() ** power
        products = x @ y.T if power == 1 else (a @ b.T) ** 2
        return {"a": k * (w @ y), "b": k * (w.T @ x), "scale": (w * products).sum(), "bias": w.sum()}

    roots = {name: x.sqrt() for name, x in sums(2).items()}
    largest = logits.abs().max().item() if logits.numel() else 0.0
    return largest, {k: (x, roots[k]) for k, x in sums(1).items()}


OP = Op(similarity_bce, similarity_bce_reference, _equivalent, _terms, tiles=True)
