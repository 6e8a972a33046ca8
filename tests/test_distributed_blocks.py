"""Blocks of columns, one after another: log-sum-exps add up, and with the whole ones gradients do too."""

import pytest
import torch
from torch.nn import functional as F

from sslfast.distributed._sharded import _lse_block, _lse_block_backward
from sslfast.ops import _backend
from sslfast.ops.similarity_lse import reference

DEVICES = [
    "cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
]  # fmt: skip
SIZES = (70, 200, 33)


def _near(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> None:
    limit = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    assert x.isfinite().all() and (x.double() - y).norm() <= limit * y.norm() + limit * 1e-3


@pytest.mark.parametrize("scale", [5.0, 100.0, -30.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alike", [False, True], ids=["pair", "self"])
@pytest.mark.parametrize("device", DEVICES)
def test_blocks_add_up(device: str, alike: bool, dtype: torch.dtype, scale: float) -> None:
    """Rows of the second of three processes; their own block, and those of the others."""
    torch.manual_seed(0)
    b = F.normalize(torch.randn(sum(SIZES), 64, device=device), dim=1).to(dtype)
    own = slice(SIZES[0], SIZES[0] + SIZES[1])
    a = b[own] if alike else F.normalize(torch.randn(90, 64, device=device), dim=1).to(dtype)
    ids = torch.randint(0, 50, (sum(SIZES),), device=device)
    a_ids = ids[own] if alike else ids[: len(a)]
    backend = _backend.resolve("similarity_lse", device, dtype)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    s = torch.tensor(scale, dtype=work, device=device)

    exact = [x.double().clone().requires_grad_() for x in (a, b, s)]
    row, col = reference(exact[0], exact[1], exact[2], None, a_ids, ids, False, True)
    whole_row, whole_col = (x.detach().to(work) for x in (row, col))
    g, h = torch.randn_like(whole_row), torch.randn_like(whole_col)
    h = h if not alike else torch.zeros_like(h)
    da, db, ds = torch.autograd.grad((row, col), exact, (g.double(), h.double()))

    got, cols = torch.full_like(whole_row, -torch.inf), []
    sums, dbs = [torch.zeros_like(da), torch.zeros_like(ds)], []
    for x, x_ids, top, slope in zip(*(y.split(SIZES) for y in (b, ids, whole_col, h)), strict=True):
        part, column = _lse_block(backend, a, x, s, a_ids, x_ids, False, True)
        got = torch.logaddexp(got, part)
        cols.append(column)
        found = _lse_block_backward(
            backend, g, slope, a, x, s, a_ids, x_ids, whole_row, top, False, (True, True, True, False)
        )
        sums = [total + d for total, d in zip(sums, (found[0], found[2]), strict=True)]
        dbs.append(found[1])
    _near(got, row.detach(), dtype)
    _near(torch.cat(cols), col.detach(), dtype)
    for x, y in ((sums[0], da), (sums[1], ds), (torch.cat(dbs), db)):
        _near(x, y, dtype)
