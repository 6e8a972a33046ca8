"""Cases of `similarity_lse`, and what a comparison needs to know of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sslfast.ops import similarity_lse
from sslfast.ops._check import FLOATS, working_dtype
from sslfast.ops.similarity_lse import reference as _similarity_lse_reference
from sslfast.testing._op import Inputs, Op


@dataclass(frozen=True)
class SimilarityLseCase:
    """One kind of input of `similarity_lse`; `inputs` makes fresh random numbers of that kind.

    Attributes:
        name: unique within the op.
        m, n, d: rows, columns (None: b is None) and features.
        scale: the scale; learned makes it a 0-d float32 (float64 for float64 inputs) tensor.
        rows: standard normal, of unit length, all equal, or one large row per side, orthogonal to all others.
        magnitude: factors on the rows of a and of b.
        bias: [n] standard normal in the inputs' dtype or in float32; "drops" has -inf in a third of the
            columns, "drops all" everywhere.
        ids: "views": two of each, m/2 apart, as in NT-Xent; "own": 0, 1, 2, ...; "classes": ten, mixed;
            "sorted": ten, in order; "apart": some on one side only; "shared": all columns of one class, half
            of the rows in it; "equal": a single class; "wide": equal in the low 32 bits or in the high 53.
        pairs, return_cols: as the op's.
        layout: strides of the inputs. dtypes: those that can hold these numbers.
    """

    name: str
    m: int
    n: int | None = None
    d: int = 16
    scale: float = 1.0
    learned: bool = False
    rows: Literal["normal", "unit", "identical", "orthogonal"] = "normal"
    magnitude: tuple[float, float] = (1.0, 1.0)
    bias: Literal["", "normal", "float32", "drops", "drops all"] = ""
    ids: Literal["", "views", "own", "classes", "sorted", "apart", "shared", "equal", "wide"] = ""
    pairs: Literal["different", "same"] = "different"
    return_cols: bool = False
    layout: Literal["contiguous", "transposed", "strided", "expanded"] = "contiguous"
    dtypes: tuple[torch.dtype, ...] = FLOATS

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Arguments of the public function, with the same numbers on any device, rounded to dtype."""
        generator = torch.Generator().manual_seed(seed)

        def place(x: Tensor) -> Tensor:
            return _with_layout(x.to(dtype), self.layout).to(device)

        inputs: dict[str, Any] = {"a": self._rows(self.m, 0, generator), "scale": self.scale}
        if self.n is not None:
            inputs["b"] = self._rows(self.n, 1, generator)
        n = self.m if self.n is None else self.n
        if self.bias:
            inputs["bias"] = self._bias(n, generator)
        inputs = {k: place(x) if isinstance(x, Tensor) else x for k, x in inputs.items()}
        if self.bias == "float32":
            inputs["bias"] = inputs["bias"].float()
        if self.learned:
            inputs["scale"] = torch.tensor(self.scale, dtype=working_dtype(inputs["a"]), device=device)
        if self.ids:
            ids = [_with_layout(x, self.layout).to(device) for x in self._ids(n, generator)]
            inputs.update(zip(("a_ids",) if self.n is None else ("a_ids", "b_ids"), ids, strict=False))
        return {**inputs, "pairs": self.pairs, "return_cols": self.return_cols}

    def _rows(self, count: int, side: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(count, self.d, dtype=torch.float64, generator=generator)
        if self.rows == "unit":
            x = torch.nn.functional.normalize(x, dim=1)
        if self.rows == "identical" and count:
            x = torch.ones_like(x) * x[:1]
        if self.rows == "orthogonal" and count:
            x = torch.nn.functional.normalize(x, dim=1)
            x[:, :2] = 0
            x[0] = 0
            x[0, side] = 6
        return x * self.magnitude[side]

    def _bias(self, n: int, generator: torch.Generator) -> Tensor:
        bias = torch.randn(n, dtype=torch.float64, generator=generator)
        if self.bias == "drops":
            bias[::3] = -torch.inf
        return bias.fill_(-torch.inf) if self.bias == "drops all" else bias

    def _ids(self, n: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        rows, cols = torch.arange(self.m), torch.arange(n)

        def random(count: int, low: int, high: int) -> Tensor:
            return torch.randint(low, high, (count,), generator=generator)

        if self.ids == "views":
            return rows % max(1, self.m // 2), cols % max(1, n // 2)
        if self.ids == "own":
            return rows, cols
        if self.ids == "sorted":
            return rows * 10 // max(1, self.m), cols * 10 // max(1, n)
        if self.ids == "apart":
            return random(self.m, 0, 10), random(n, 5, 15)
        if self.ids == "shared":
            return rows % 2, torch.zeros_like(cols)
        if self.ids == "equal":
            return torch.full_like(rows, 7), torch.full_like(cols, 7)
        a, b = random(self.m, -5, 5), random(n, -5, 5)
        return (a, b) if self.ids == "classes" else tuple(2**62 + (x // 2 << 32) + x % 2 for x in (a, b))


def _with_layout(x: Tensor, layout: str) -> Tensor:
    """The same numbers (a single row of them for "expanded") under other strides."""
    if layout == "transposed":
        return x.t().contiguous().t() if x.dim() == 2 else x
    if layout == "strided":  # every other element of a tensor with NaN (ids: 0) in between
        gaps = x.new_full([2 * size + 1 for size in x.shape], torch.nan if x.is_floating_point() else 0)
        view = gaps[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    return x[:1].expand(x.shape) if layout == "expanded" and len(x) else x


_Case, _WIDE = SimilarityLseCase, (torch.float32, torch.bfloat16, torch.float64)  # beyond float16's range

# Sizes straddle the CPU's tile (384 x 1024) and its rows per thread; every name says what would break.
CASES: list[SimilarityLseCase] = [
    _Case("self", 65),
    _Case("two sides", 65, 43, return_cols=True, learned=True),
    _Case("self, one row", 1, return_cols=True, learned=True),
    _Case("one row and column", 1, 1, return_cols=True, learned=True),
    _Case("one row", 1, 700, learned=True, return_cols=True),
    _Case("one column", 700, 1, learned=True, return_cols=True),
    _Case("below a tile", 383, learned=True, scale=0.3),
    _Case("one tile", 384, 1024, d=8, bias="normal", return_cols=True),
    _Case("above a tile", 385, learned=True, return_cols=True),
    _Case("many tiles", 800, 1100, d=128, rows="unit", scale=10.0, learned=True, return_cols=True),
    _Case("self, many tiles", 1500, d=128, rows="unit", scale=10.0, learned=True, ids="views"),
    _Case("self, running maximum", 1100, d=32, rows="unit", scale=-100.0, learned=True, ids="views"),
    _Case("self, bias, many tiles", 1100, d=24, rows="unit", scale=5.0, bias="normal", return_cols=True),
    _Case("self, bias, running maximum", 515, d=24, scale=4.0, learned=True, bias="normal", return_cols=True),
    _Case("D 0", 5, 4, d=0, learned=True, bias="normal", return_cols=True),
    _Case("D 1", 33, 20, d=1, learned=True),
    _Case("D 2", 33, 20, d=2, learned=True, return_cols=True),
    _Case("D 3, self", 33, d=3, learned=True),
    _Case("D 7", 513, 20, d=7, return_cols=True),
    _Case("D 130", 40, 600, d=130, learned=True, return_cols=True),
    _Case("D 1000, self", 50, d=1000, scale=0.01, learned=True),
    _Case("D 4096", 9, 11, d=4096, scale=0.02, learned=True, return_cols=True),
    _Case("D 4096, running maximum", 9, 11, d=4096, learned=True, return_cols=True),
    _Case("no columns", 5, 0, learned=True, bias="normal", ids="own", return_cols=True),
    _Case("no rows", 0, 5, learned=True, bias="normal", ids="own", return_cols=True),
    _Case("nothing", 0, 0, learned=True, return_cols=True),
    _Case("self, nothing", 0, learned=True, return_cols=True, bias="normal"),
    _Case("scale 0", 40, 30, scale=0.0, learned=True, bias="normal", return_cols=True),
    _Case("self, scale 0", 40, scale=0.0, learned=True),
    _Case("negative scale", 40, 30, scale=-0.7, learned=True, return_cols=True),
    _Case("bias, self", 70, bias="float32", learned=True),
    _Case("bias in float32", 70, 50, bias="float32", return_cols=True),
    _Case("bias drops columns", 70, 530, bias="drops", learned=True, return_cols=True),
    _Case("bias drops columns, running maximum", 70, 530, scale=5.0, bias="drops", return_cols=True),
    _Case("self, bias drops columns", 70, bias="drops", return_cols=True, learned=True),
    _Case("bias drops all", 20, 30, bias="drops all", return_cols=True, learned=True),
    _Case("ids of pairs", 600, 600, rows="unit", scale=14.0, ids="own", return_cols=True),
    _Case("self, ids of views", 130, rows="unit", scale=2.0, ids="views", return_cols=True),
    _Case("classes", 90, 70, ids="classes", learned=True, return_cols=True),
    _Case("classes, same", 90, 70, ids="classes", pairs="same", learned=True, return_cols=True),
    _Case("self, classes, same", 90, ids="classes", pairs="same", learned=True),
    _Case("self, classes, same, running maximum", 90, scale=6.0, ids="classes", pairs="same", learned=True),
    _Case("self, classes, bias", 90, ids="classes", bias="drops", learned=True, return_cols=True),
    _Case("sorted classes", 1030, 1100, d=8, ids="sorted", return_cols=True),
    _Case("sorted classes, same", 1030, 600, d=8, ids="sorted", pairs="same", learned=True, return_cols=True),
    _Case("self, sorted classes, same", 1030, d=8, ids="sorted", pairs="same", return_cols=True),
    _Case("rows without pairs", 90, 70, ids="shared", learned=True, return_cols=True),
    _Case("rows without pairs, running maximum", 90, 70, scale=5.0, ids="shared", return_cols=True),
    _Case("rows without pairs, same", 90, 70, ids="apart", pairs="same", bias="normal", return_cols=True),
    _Case("self, no pair at all", 30, ids="equal", learned=True, return_cols=True, bias="normal"),
    _Case("no pair at all", 30, 20, ids="equal", learned=True, return_cols=True),
    _Case("self, own ids, same", 30, ids="own", pairs="same", learned=True, return_cols=True),
    _Case("self, wide ids", 60, ids="wide", pairs="same", return_cols=True),
    _Case("wide ids", 60, 50, ids="wide", return_cols=True),
    _Case("transposed", 60, 50, layout="transposed", bias="normal", ids="classes", return_cols=True),
    _Case("strided", 60, 50, layout="strided", bias="normal", ids="classes", return_cols=True),
    _Case("self, strided", 60, layout="strided", ids="views", learned=True),
    _Case("expanded", 60, 50, layout="expanded", bias="normal", return_cols=True),
    _Case("identical rows", 520, 40, rows="identical", learned=True, return_cols=True),
    _Case("self, identical rows", 520, rows="identical", scale=20.0),
    _Case("huge norms", 60, 50, magnitude=(1e15, 1e15), scale=1e-30, dtypes=_WIDE, return_cols=True),
    _Case("self, huge norms", 60, magnitude=(1e17, 1e17), scale=1e-34, dtypes=_WIDE, learned=True),
    _Case("huge and tiny", 60, 50, magnitude=(1e20, 1e-20), dtypes=_WIDE, return_cols=True),
    _Case("tiny norms", 60, 50, magnitude=(1e-15, 1e-15), scale=1e30, dtypes=_WIDE, return_cols=True),
    _Case("squares underflow", 60, 50, magnitude=(1e-24, 1.0), scale=2e25, dtypes=_WIDE, return_cols=True),
    _Case("tiny norms, logits 0", 60, magnitude=(1e-4, 1e-4), learned=True),
    _Case("norms far above logits", 20, 3, rows="orthogonal", return_cols=True, learned=True),
]
# Temperatures from 0.001 to 100 of both signs; 0.025 is where the safe range of unit rows ends.
CASES += [
    _Case(f"temperature {t}", 70, 50, d=32, rows="unit", scale=1 / t, learned=True, return_cols=True)
    for t in (0.001, -0.01, 0.025, 0.07, -100.0)
]
CASES += [
    _Case(f"self, temperature {t}", 70, d=32, rows="unit", scale=1 / t, learned=True)
    for t in (-0.001, 0.01, 0.0249, 0.0251, -0.07, 100.0)
]


def similarity_lse_reference(
    a: Tensor, b: Tensor | None = None, *, scale: Tensor | float = 1.0, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """The reference of `similarity_lse` under the public function's arguments."""
    bias, a_ids, b_ids = (options.get(name) for name in ("bias", "a_ids", "b_ids"))
    same, cols = options.get("pairs") == "same", options.get("return_cols", False)
    return _similarity_lse_reference(a, b, scale, bias, a_ids, b_ids, same, cols)


def _equivalent(inputs: Inputs) -> dict[str, Any]:
    rows = {k: 1.1 * inputs[k].flip(1) for k in ("a", "b") if inputs.get(k) is not None}
    return {**inputs, **rows, "scale": inputs.get("scale", 1.0) / 1.1**2}


def _terms(
    inputs: Inputs, upstream: Sequence[Tensor | None]
) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    a, scale, bias = inputs["a"], inputs.get("scale", 1.0), inputs.get("bias")
    b = inputs.get("b")
    b, is_self = (a, True) if b is None else (b, False)
    logits = scale * (a @ b.T) + (0.0 if bias is None else bias)
    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if inputs.get("a_ids") is not None:
        b_ids = inputs["a_ids"] if is_self else inputs["b_ids"]
        excluded = inputs["a_ids"][:, None] == b_ids
        excluded = ~excluded if inputs.get("pairs") == "same" else excluded
    if is_self:
        excluded = excluded | torch.eye(len(a), dtype=torch.bool, device=a.device)
    finite = logits[logits.isfinite()]
    allowed = logits.masked_fill(excluded, -torch.inf)
    weights = torch.zeros_like(logits)  # |g_i| exp(S_ij - row_i) + |h_j| exp(S_ij - col_j)
    for dim, gradient in zip((1, 0), upstream, strict=False):
        if gradient is not None:
            weights += allowed.softmax(dim).nan_to_num(0.0) * gradient.abs().unsqueeze(dim)
    size = scale.abs() if isinstance(scale, Tensor) else abs(scale)

    def sums(power: int) -> dict[str, Tensor]:
        w, x, y, k = weights**power, a.abs() ** power, b.abs() ** power, size**power
        found = {"scale": (w * (x @ y.T if power == 1 else (a @ b.T) ** 2)).sum(), "bias": w.sum(0)}
        found["a"], found["b"] = k * (w @ y), k * (w.T @ x)
        found["a"] = found["a"] + found["b"] if is_self else found["a"]
        return found

    roots = {name: x.sqrt() for name, x in sums(2).items()}
    return (finite.abs().max().item() if len(finite) else 0.0), {k: (x, roots[k]) for k, x in sums(1).items()}


OP = Op(similarity_lse, similarity_lse_reference, _equivalent, _terms, tiles=True)
