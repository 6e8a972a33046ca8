"""similarity_lse where numbers are extreme, memory is dirty, arguments are wrong, and backends are forced."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sslfast
from sslfast import _C
from sslfast.ops import _blocked
from sslfast.testing import CASES, SimilarityLseCase, assert_close_to_reference, similarity_lse_reference

OP = "similarity_lse"
similarity_lse = sslfast.similarity_lse
BY_NAME = {case.name: case for case in CASES[OP]}
INF, NAN = math.inf, math.nan


# exp2 of the kernels: 2^t over the whole range.

EXP2 = [(_C.exp2_f32, np.float32, -126.5, 127.5), (_C.exp2_f64, np.float64, -1022.5, 1023.5)]


def exp2(function, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, NAN)
    function(x.ctypes.data, y.ctypes.data, x.size)
    return y


@pytest.mark.parametrize("function, dtype, lowest, highest", EXP2, ids=["float32", "float64"])
def test_exp2_is_good_to_about_one_rounding(function, dtype, lowest, highest, isa):
    spread = np.random.default_rng(0).uniform(lowest + 0.5, highest, 500_000)
    small = np.concatenate([np.geomspace(1e-12, 1, 5000), -np.geomspace(1e-12, 1, 5000)])
    ties = np.arange(np.ceil(lowest) + 1, highest - 1, 0.5)  # integers, and half-way between two
    x = np.concatenate([spread, small, ties, np.nextafter(ties, 2000), np.nextafter(ties, -2000)]).astype(
        dtype
    )
    x = x[(x >= lowest + 0.5) & (x < highest)]
    truth = np.exp2(x.astype(np.longdouble))
    assert np.max(np.abs(exp2(function, x) - truth) / truth) < np.finfo(dtype).eps
    whole = np.arange(np.ceil(lowest), highest).astype(int)
    assert np.array_equal(exp2(function, whole.astype(dtype)), np.ldexp(dtype(1), whole))  # exact


@pytest.mark.parametrize("function, dtype, lowest, highest", EXP2, ids=["float32", "float64"])
def test_exp2_beyond_the_range(function, dtype, lowest, highest, isa):
    below = np.array(
        [np.nextafter(dtype(lowest), dtype(-9999)), lowest - 1, -5000.0, -3e38, -INF], dtype=dtype
    )
    above = np.array([highest, highest + 0.1, highest + 1, 5000.0, 3e38, INF], dtype=dtype)
    subnormal = np.linspace(lowest, lowest + 0.5, 100, dtype=dtype)
    for repeat in (1, 7, 40):  # in vectors and in the remainder
        assert np.all(exp2(function, np.repeat(below, repeat)) == 0)
        assert np.all(exp2(function, np.repeat(above, repeat)) == INF)
        assert np.all(np.isnan(exp2(function, np.full(repeat, NAN, dtype))))
    error = np.abs(exp2(function, subnormal) - np.exp2(subnormal.astype(np.longdouble)))
    assert np.all(error <= 2 * np.finfo(dtype).smallest_subnormal)


def test_unknown_instruction_set_raises(monkeypatch):
    monkeypatch.setenv("SSLFAST_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="SSLFAST_CPU_ISA.*avx1024"):
        similarity_lse(torch.randn(3, 2))


# NaN and infinities: what torch.logsumexp gives on the whole matrix, in the same places.


def whole_matrix(a, b, scale, bias) -> tuple[Tensor, Tensor]:
    logits = scale * (a @ (a if b is None else b).T) + (0 if bias is None else bias)
    if b is None:
        logits.fill_diagonal_(-INF)
    return logits.logsumexp(1), logits.logsumexp(0)


def assert_same_with_specials(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["a", "b", "bias"])
@pytest.mark.parametrize("n", [None, 7, 530])
@pytest.mark.parametrize("size", [0.1, 4.0])
def test_special_value_in(place, value, n, size):
    """One in the first tile and one beyond it; without them size 0.1 would be in the safe range, 4 not."""
    m = 520
    a, b = size * torch.randn(m, 6), None if n is None else size * torch.randn(n, 6)
    bias = torch.randn(m if n is None else n) if place == "bias" else None
    target = {"a": a, "b": a if b is None else b, "bias": bias}[place]
    target.view(-1)[[3, -2]] = value
    row, col = similarity_lse(a, b, bias=bias, scale=0.5, return_cols=True)
    expected_row, expected_col = whole_matrix(a, b, 0.5, bias)
    assert_same_with_specials(row, expected_row)
    assert_same_with_specials(col, expected_col)
    assert not (row.isfinite().all() and col.isfinite().all()) or (place == "bias" and value == -INF)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("n", [None, 4])
def test_special_scale(n, value):
    a = torch.tensor([[1.0, 2.0], [-1.0, 3.0], [2.0, -5.0], [-2.0, 1.0]])
    b = None if n is None else a.flip(0) + 0.5
    row, col = similarity_lse(a, b, scale=torch.tensor(value), return_cols=True)
    expected_row, expected_col = whole_matrix(a, b, torch.tensor(value), None)
    assert_same_with_specials(row, expected_row)
    assert_same_with_specials(col, expected_col)


def test_nan_row_leaves_the_gradients_of_other_rows_finite():
    a, b = torch.randn(5, 3), torch.randn(520, 3)
    a[2] = NAN

    def gradients(op) -> tuple[Tensor, ...]:
        leaves = a.clone().requires_grad_(), b.clone().requires_grad_()
        return torch.autograd.grad(op(*leaves).sum(), leaves)

    pairs = zip(gradients(similarity_lse), gradients(lambda *x: whole_matrix(*x, 1.0, None)[0]), strict=True)
    for actual, expected in pairs:
        assert_same_with_specials(actual, expected)


@pytest.mark.parametrize("n", [None, 520])
@pytest.mark.parametrize("value", [NAN, INF])
def test_special_upstream_gradient_does_not_reach_excluded_pairs(n, value):
    a, b = torch.randn(6, 3), None if n is None else torch.randn(n, 3)
    ids = torch.arange(6) // 2, None if n is None else torch.arange(n) // 2
    g = torch.tensor([1.0, value, 1.0, 1.0, 1.0, 1.0])

    def gradients(op) -> tuple[Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (a, b)[: 1 if n is None else 2]]
        return torch.autograd.grad(op(*leaves, a_ids=ids[0], b_ids=ids[1]), leaves, g)

    for actual, expected in zip(gradients(similarity_lse), gradients(similarity_lse_reference), strict=True):
        assert_same_with_specials(actual, expected)
    assert n is None or actual[:2].isfinite().all()  # columns 0 and 1 are of row 1's class


# 16-bit inputs keep float32 logits; large logits keep their digits.


@pytest.mark.parametrize("dtype, ulp", [(torch.bfloat16, 0.5), (torch.float16, 0.0625)])
def test_logits_are_not_rounded_to_16_bits(dtype, ulp):
    """Logits 100 and 100 + 0.44 ulp, the distance of 16-bit numbers near 100: they would round to one."""
    a = torch.tensor([[10.0, 0.25]], dtype=dtype)
    b = torch.tensor([[10.0, 0.0], [10.0, 1.75 * ulp]], dtype=dtype)
    assert (a @ b.T).eq(100).all()

    def evaluate(op, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = a.to(dtype).requires_grad_()
        value = op(x, b.to(dtype))
        (gradient,) = torch.autograd.grad(value.sum(), x)
        return value.detach().double(), gradient[:, 1].double()

    true = evaluate(lambda x, y: (x @ y.T).logsumexp(1), torch.float64)
    ours = evaluate(similarity_lse, dtype)
    naive = evaluate(lambda x, y: (x @ y.T).float().logsumexp(1), dtype)
    tolerance = (
        2e-5,
        0.51 * torch.finfo(dtype).eps * true[1],
    )  # the gradient is rounded once, to the inputs' dtype
    for x, bad, y, room in zip(ours, naive, true, tolerance, strict=True):
        assert (x - y).abs() <= room
        assert (bad - y).abs() > 5 * room


@pytest.mark.parametrize("scale", [1000.0, -1000.0, 100.0])
@pytest.mark.parametrize("n", [None, 60])
def test_logits_up_to_1000(scale, n):
    """Near copies: the largest logit is 1000, the ones next to it within a few units, most are far away."""
    a = F.normalize(torch.randn(70, 16), dim=1)
    a[35:] = F.normalize(a[:35] + 0.02 * torch.randn(35, 16), dim=1)
    inputs = {"a": a, "scale": torch.tensor(scale)}
    if n is not None:
        inputs |= {"b": F.normalize(a[:n] + 0.02 * torch.randn(n, 16), dim=1), "return_cols": True}
    assert_close_to_reference(OP, inputs)
    assert (scale * a @ inputs.get("b", a).T).abs().max() > 0.99 * abs(scale)


# The two numerical ranges.


def tiles(a, b=None, scale=1.0, bias=None) -> _blocked.CpuTiles:
    return _blocked.CpuTiles(a, b, torch.tensor(scale, dtype=a.dtype), bias, None, None, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_safe_range_is_known_from_norms_scale_and_bias(dtype, isa):
    a, b = 2 * torch.eye(4, dtype=dtype), 3 * torch.eye(5, 4, dtype=dtype)
    bias = torch.tensor([0.0, -INF, -9.0, 1.0, 2.0], dtype=dtype)
    nan, inf = torch.full_like(a, NAN), torch.full_like(a, INF)
    safe = {
        "below": tiles(a, b, 39 / 6), "above": tiles(a, b, 41 / 6),
        "negative": tiles(a, b, -39 / 6), "negative, above": tiles(a, b, -41 / 6),
        "self": tiles(a, None, 39 / 4), "self, above": tiles(a, None, 41 / 4),
        "bias": tiles(a, b, 30.5 / 6, bias), "bias, above": tiles(a, b, 31.5 / 6, bias),
        "nothing": tiles(a[:0], b), "nan, above": tiles(a, b, NAN), "inf, above": tiles(a, b, INF),
        "nan row, above": tiles(nan, b), "inf row, above": tiles(b, inf),
        "inf times 0, above": tiles(inf, b, 0.0),
        "nan bias, above": tiles(a, b, 1.0, torch.full_like(bias, NAN)),
        "overflowing squares, above": tiles(a * torch.finfo(dtype).max / 4, b * 1e-30),
    }  # fmt: skip
    assert {name: t._kernels.safe for name, t in safe.items()} == {n: "above" not in n for n in safe}


@pytest.mark.parametrize("n", [None, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_upstream_gradient_leaves_the_safe_range(n, dtype, isa):
    """All logits are near -39, so g exp(-row) overflows float32, though every true gradient fits."""
    case = SimilarityLseCase("", 50, n, d=32, magnitude=(0.01, 0.01), learned=True, return_cols=True)
    inputs = case.inputs(dtype)
    for x in (inputs["a"], inputs.get("b", inputs["a"])):
        x[:, 0] = 1.0
    inputs["scale"].fill_(-38.5)
    outputs = similarity_lse_reference(**inputs)
    upstream = [1e30 * torch.randn_like(x) for x in outputs]
    upstream[0][1] = 1.0
    t = tiles(inputs["a"], inputs.get("b"), -38.5)
    assert t._kernels.safe
    t.begin_backward(upstream[0], None if n is None else upstream[1], outputs[0], outputs[1], None)
    assert not t._kernels.safe
    assert_close_to_reference(OP, inputs, upstream=upstream)


def test_rows_without_a_pair_stay_in_the_safe_range():
    t = tiles(torch.randn(3, 2), torch.randn(4, 2), 0.1, torch.full((4,), -INF))
    t.begin_backward(torch.ones(3), None, torch.full((3,), -INF), None, None)
    assert t._kernels.safe


@pytest.mark.parametrize("column_overflows", [False, True])
def test_one_overflowing_weight_of_one_side_is_enough(column_overflows):
    a, b = torch.randn(50, 32) / 100, torch.randn(40, 32) / 100
    a[:, 0] = b[:, 0] = 1.0
    inputs = {"a": a, "b": b, "scale": torch.tensor(-38.5), "return_cols": True}
    upstream = [torch.ones(50), torch.ones(40)]
    upstream[column_overflows][17] = 1e32
    assert_close_to_reference(OP, inputs, upstream=upstream)


# Memory: nothing is read before it is written, nothing of M x N elements exists.

DIRTY = [
    "many tiles",
    "self, bias, many tiles",
    "self, running maximum",
    "sorted classes, same",
    "no columns",
]
DIRTY += ["no rows", "self, one row", "scale 0", "bias drops columns, running maximum", "two sides"]


@pytest.mark.parametrize("name", DIRTY)
def test_fresh_memory_may_hold_anything(name, monkeypatch):
    filled = []

    def dirty(allocate):
        def new(*args, **kwargs):
            x = allocate(*args, **kwargs)
            filled.append(x.shape)
            return x.fill_(NAN) if x.is_floating_point() else x

        return new

    inputs = BY_NAME[name].inputs(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", dirty(torch.empty))
        patch.setattr(torch.Tensor, "new_empty", dirty(torch.Tensor.new_empty))
        assert_close_to_reference(OP, inputs)
    assert len(filled) >= 6  # tile, running sums, results, weights


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("two_sided, bias", [(True, True), (False, True), (False, False)])
def test_no_tensor_beyond_a_tile_and_the_inputs(dtype, two_sided, bias):
    n = 4096
    a, b = torch.randn(n, 4, dtype=dtype), torch.randn(n, 4, dtype=dtype) if two_sided else None
    offsets, g = torch.randn(n) if bias else None, torch.randn(n)
    args = (a, b, torch.tensor(0.1), offsets, None, None, False)
    with Sizes() as sizes:
        row, col = _blocked.forward(_blocked.CpuTiles(*args), True)
        needs = (True, two_sided, True, bias)
        gradients = _blocked.backward(_blocked.CpuTiles(*args), g, g, row, col, needs)
    assert [d is not None for d in gradients] == list(needs)
    assert sizes.largest <= 512 * 768


GROWTH = """
import torch, sslfast
peak = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def step(m, n):
    a, b = torch.randn(m, 8, requires_grad=True), torch.randn(n, 8, requires_grad=True)
    row, col = sslfast.similarity_lse(a, b, scale=0.1, return_cols=True)
    (row.sum() + col.sum() + sslfast.similarity_lse(a, scale=0.1).sum()).backward()
    return peak()
def loss(n):
    z1, z2 = torch.randn(2, n, 128).unbind()
    sslfast.ntxent_loss(z1.requires_grad_(), z2.requires_grad_(), 0.1).backward()
    return peak()
small = step(2048, 2048)
whole = step(16384, 8192)
small_loss = loss(512)
print((whole - small) // 1024, (loss(4096) - small_loss) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read in the units of Linux")
def test_peak_memory_of_a_process(tmp_path):
    """16384 x 8192 logits would be 512 MB; inputs, gradients and a tile are 4 MB. One of NT-Xent: 256."""
    command = [sys.executable, "-c", GROWTH]  # elsewhere, since -c puts the current folder on sys.path
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert max(map(int, done.stdout.split())) < 64


# Bad arguments: the message starts with the argument's name.

GOOD = {"a": torch.randn(4, 3), "b": torch.randn(5, 3)}
A_IDS, B_IDS = torch.arange(4), torch.arange(5)
BAD = [
    ("a", TypeError, {"a": [[1.0]]}),
    ("a", TypeError, {"a": torch.ones(4, 3, dtype=torch.int64)}),
    ("a", TypeError, {"a": torch.ones(4, 3, dtype=torch.complex64)}),
    ("a", ValueError, {"a": torch.ones(3)}),
    ("a", ValueError, {"a": torch.ones(1, 4, 3)}),
    ("b", TypeError, {"b": 3.0}),
    ("b", TypeError, {"b": torch.ones(5, 3, dtype=torch.float64)}),
    ("b", TypeError, {"a": torch.ones(4, 3, dtype=torch.bfloat16)}),
    ("b", ValueError, {"b": torch.ones(5, 4)}),
    ("b", ValueError, {"b": torch.ones(5)}),
    ("b", ValueError, {"b": torch.ones(5, 3, device="meta")}),
    ("scale", TypeError, {"scale": "1"}),
    ("scale", TypeError, {"scale": None}),
    ("scale", TypeError, {"scale": True}),
    ("scale", TypeError, {"scale": 1j}),
    ("scale", ValueError, {"scale": NAN}),
    ("scale", ValueError, {"scale": INF}),
    ("scale", ValueError, {"scale": -INF}),
    ("scale", ValueError, {"scale": 1e39}),
    ("scale", ValueError, {"scale": 10**400}),
    ("scale", ValueError, {"scale": torch.ones(1)}),
    ("scale", ValueError, {"scale": torch.tensor(2)}),
    ("scale", ValueError, {"scale": torch.tensor(True)}),
    ("bias", TypeError, {"bias": 1.0}),
    ("bias", TypeError, {"bias": torch.ones(5, dtype=torch.int64)}),
    ("bias", ValueError, {"bias": torch.ones(4)}),
    ("bias", ValueError, {"bias": torch.ones(1, 5)}),
    ("bias", ValueError, {"bias": torch.ones(())}),
    ("bias", ValueError, {"bias": torch.ones(5, device="meta")}),
    ("a_ids", TypeError, {"a_ids": [0, 1, 2, 3], "b_ids": B_IDS}),
    ("a_ids", TypeError, {"a_ids": A_IDS.int(), "b_ids": B_IDS}),
    ("a_ids", ValueError, {"a_ids": B_IDS, "b_ids": B_IDS}),
    ("a_ids", ValueError, {"a_ids": A_IDS[None], "b_ids": B_IDS}),
    ("a_ids", ValueError, {"a_ids": A_IDS.to("meta"), "b_ids": B_IDS}),
    ("a_ids", ValueError, {"b_ids": B_IDS}),
    ("b_ids", TypeError, {"a_ids": A_IDS, "b_ids": B_IDS.float()}),
    ("b_ids", ValueError, {"a_ids": A_IDS, "b_ids": A_IDS}),
    ("b_ids", ValueError, {"a_ids": A_IDS}),
    ("b_ids", ValueError, {"b": None, "a_ids": A_IDS, "b_ids": A_IDS}),
    ("b_ids", ValueError, {"b": None, "b_ids": A_IDS}),
    ("pairs", ValueError, {"pairs": "equal", "a_ids": A_IDS, "b_ids": B_IDS}),
    ("pairs", ValueError, {"pairs": None}),
    ("pairs", ValueError, {"pairs": "same"}),
    ("pairs", ValueError, {"pairs": "same", "b": None}),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name, error, bad", BAD, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(BAD)])
def test_bad_argument_is_named(name, error, bad, backend):
    with sslfast.use_backend(backend), pytest.raises(error, match=f"^{name}: .*expect.*, got "):
        similarity_lse(**{**GOOD, **bad})


@pytest.mark.parametrize("scale", [2, np.float32(2), np.float64(2), torch.tensor(2.0, dtype=torch.bfloat16)])
def test_every_kind_of_number_is_a_scale(scale):
    torch.testing.assert_close(similarity_lse(**GOOD, scale=scale), similarity_lse(**GOOD, scale=2.0))


def test_allocations_ignore_the_default_device():
    expected = similarity_lse(**GOOD)
    with torch.device("meta"):
        actual = similarity_lse(**GOOD)
    assert torch.equal(actual, expected)
