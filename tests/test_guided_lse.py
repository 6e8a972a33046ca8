"""guided_lse and pair_products against formulas written out, in parts, at their edges and compiled."""

import importlib

import pytest
import torch
from explicit import Sizes, assert_names
from torch import Tensor

from sslfast.ops import guided_lse, pair_products

guided = importlib.import_module("sslfast.ops.guided_lse")
listed = importlib.import_module("sslfast.ops.pair_products")
M, N, D, E = 13, 17, 5, 7


def explicit(a, b, u, v, limit, scale, a_ids=None, b_ids=None) -> Tensor:
    rows = []
    for i in range(len(a)):
        kept = [
            scale * a[i] @ b[j]
            for j in range(len(b))
            if u[i] @ v[j] <= limit[i] and (a_ids is None or a_ids[i] != b_ids[j])
        ]
        rows.append(torch.stack(kept).logsumexp(0) if kept else a.new_tensor(-torch.inf))
    return torch.stack(rows)


def inputs(dtype=torch.float64) -> list[Tensor]:
    shapes = (M, D), (N, D), (M, E), (N, E), (M,)
    a, b, u, v, limit = (torch.randn(shape, dtype=dtype) for shape in shapes)
    limit[3] = -torch.inf  # a row without any pair
    return [a.requires_grad_(), b.requires_grad_(), u, v, limit]


IDS = torch.arange(M) % 4, torch.arange(N) % 4


@pytest.mark.parametrize("ids", [(None, None), IDS], ids=["", "ids"])
@pytest.mark.parametrize("scale", [0.7, -20.0])
@pytest.mark.parametrize("chunk", [1, 3 * N + 1, 1 << 20])
def test_guided_lse(monkeypatch, ids, scale, chunk):
    monkeypatch.setattr(guided, "CHUNK", chunk)
    x = inputs()
    found = guided_lse(*x, scale=scale, a_ids=ids[0], b_ids=ids[1])
    true = explicit(*x, scale, *ids)
    torch.testing.assert_close(found, true)
    assert found[3] == -torch.inf
    g = torch.randn(M, dtype=torch.float64)
    rows = torch.arange(M) != 3
    for y, z in zip(
        torch.autograd.grad(found, x[:2], g), torch.autograd.grad(true[rows], x[:2], g[rows]), strict=True
    ):
        torch.testing.assert_close(y, z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_guided_lse_in_other_dtypes(dtype):
    x = [y.detach().to(dtype).requires_grad_(y.requires_grad) for y in inputs()]
    found = guided_lse(*x, scale=3.0)
    true = explicit(*(y.detach().double() for y in x), 3.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.detach().double(), true, rtol=1e-5, atol=1e-5)
    assert all(d.dtype == dtype for d in torch.autograd.grad(found.sum(), x[:2]))


def test_guided_lse_of_nothing():
    a, b, u, v, limit = inputs()
    assert guided_lse(a[:0], b, u[:0], v, limit[:0]).shape == (0,)
    assert (guided_lse(a, b[:0], u, v[:0], limit) == -torch.inf).all()


def test_guided_lse_names_arguments():
    a, b, u, v, limit = (x.detach() for x in inputs())
    for name, call in {
        "b": lambda: guided_lse(a, b[:, 1:], u, v, limit),
        "guide_a": lambda: guided_lse(a, b, u[1:], v, limit),
        "guide_b": lambda: guided_lse(a, b, u, v[:, 1:], limit),
        "limit": lambda: guided_lse(a, b, u, v, limit[1:]),
        "scale": lambda: guided_lse(a, b, u, v, limit, scale="1"),
        "b_ids": lambda: guided_lse(a, b, u, v, limit, a_ids=IDS[0]),
        "a_ids": lambda: guided_lse(a, b, u, v, limit, a_ids=IDS[0][1:], b_ids=IDS[1]),
    }.items():
        assert_names(call, TypeError if name == "scale" else ValueError, name)


def pairs(count: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, M, (count,)), torch.randint(0, N, (count,))


@pytest.mark.parametrize("part", [1, 7, 1 << 14])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_pair_products(monkeypatch, part, count):
    monkeypatch.setattr(listed, "PART", part)
    x, y = inputs()[:2]
    rows, columns = pairs(count)
    found, true = pair_products(x, y, rows, columns), (x[rows] * y[columns]).sum(1)
    torch.testing.assert_close(found, true)
    g = torch.randn(count, dtype=torch.float64)
    for d, e in zip(torch.autograd.grad(found, (x, y), g), torch.autograd.grad(true, (x, y), g), strict=True):
        torch.testing.assert_close(d, e)


def test_pair_products_of_rows_among_themselves():
    x = inputs()[0]
    rows, columns = (i % M for i in pairs(40))
    found, true = pair_products(x, x, rows, columns).sum(), (x[rows] * x[columns]).sum()
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(true, x))


def test_pair_products_names_arguments():
    x, y = (z.detach() for z in inputs()[:2])
    rows, columns = pairs(6)
    for name, call in {
        "y": lambda: pair_products(x, y[:, 1:], rows, columns),
        "rows": lambda: pair_products(x, y, rows + M, columns),
        "columns": lambda: pair_products(x, y, rows, columns[1:]),
    }.items():
        assert_names(call, ValueError, name)
    assert_names(lambda: pair_products(x, y, rows, columns - N), ValueError, "columns")


def test_compile_fullgraph():
    @torch.compile(fullgraph=True)
    def call(a, b, u, v, limit, rows, columns):
        return guided_lse(a, b, u, v, limit)[rows] + pair_products(a, b, rows, columns)

    x, (rows, columns) = inputs(), pairs(20)
    rows = rows[rows != 3]
    found = call(*x, rows, columns[: len(rows)])
    true = explicit(*x, 1.0)[rows] + (x[0][rows] * x[1][columns[: len(rows)]]).sum(1)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), x[:2]), torch.autograd.grad(true.sum(), x[:2])
    )


def test_no_matrix():
    """2,000 x 2,000 products would be 4 million numbers, and 200,000 pairs of 32 features 6.4 million."""
    a, limit = torch.randn(2000, 32), torch.zeros(2000)
    pair = torch.randint(0, 2000, (2, 200_000))
    with Sizes() as sizes:
        given = a, a, a, a, limit, 1.0, None, None
        row = guided._forward(*given)
        guided._backward(limit, row, *given)
        listed._backward(listed._forward(a, a, *pair), a, a, *pair)
    assert 500_000 < sizes.largest <= 1 << 20
