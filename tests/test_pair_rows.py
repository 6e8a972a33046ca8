"""pair_rows on the CPU against its reference."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast.ops.pair_rows import pair_rows, reference
from sslfast.testing import assert_no_worse, assert_same_direction

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def evaluate(function, x, y, normalize, dtype, dz, dpositive) -> list[Tensor]:
    """z, positive, dx, dy."""
    leaves = x.detach().requires_grad_(), y.detach().requires_grad_()
    z, positive = function(*leaves, normalize, dtype)
    gradients = torch.autograd.grad((z, positive), leaves, (dz.to(z.dtype), dpositive.to(positive.dtype)))
    return [z.detach(), positive.detach(), *gradients]


def sizes(
    truth: list[Tensor], x: Tensor, y: Tensor, normalize: bool, dz: Tensor, dpositive: Tensor
) -> list[Tensor]:
    """Sums of the absolute terms of z, positive, dx and dy: what their roundings are relative to."""
    z = truth[0].abs()
    left, right = z.chunk(2)
    g = dz.abs() + dpositive.abs().repeat(2)[:, None] * torch.cat((right, left))
    if normalize:
        norm = torch.cat((x, y)).norm(dim=1, keepdim=True).clamp_min(1e-12)
        g = (g + z * (g * z).sum(1, keepdim=True)) / norm
    return [z, (left * right).sum(1), *g.chunk(2)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n, d", [(1, 1), (3, 7), (5, 16), (64, 130), (300, 128), (7, 1000), (0, 4)])
def test_values_and_gradients(n, d, dtype, normalize, isa):
    """Transposed and strided inputs, expanded upstream gradients, rows that are zero, tiny and large."""
    work = torch.float64 if dtype == torch.float64 else torch.float32
    x, y = torch.randn(d, n).to(dtype).t(), torch.randn(n, 2 * d).to(dtype)[:, ::2]
    if n > 4:
        y[2], x[3] = y[2] * 1e-3, x[3] * 1e3
        x[1] = 0 if dtype != torch.float16 else x[1]  # its gradient is 1e12 times the upstream one
    dz, dpositive = torch.randn(d).to(dtype).expand(2 * n, d), torch.tensor(0.7).expand(n)
    truth = evaluate(reference, x.double(), y.double(), normalize, torch.float64, dz, dpositive)
    # for float64 the yardstick is the truth with its sums in another order
    yardstick = evaluate(reference, x.flip(1), y.flip(1), normalize, dtype, dz.flip(1), dpositive)
    yardstick = [t.flip(1) if t.dim() == 2 else t for t in yardstick]
    ours = evaluate(pair_rows, x, y, normalize, dtype, dz, dpositive)
    assert [t.dtype for t in ours] == [dtype, work, dtype, dtype]
    terms = sizes(truth, x.double(), y.double(), normalize, dz, dpositive)
    eps = torch.finfo(work).eps
    for k, name in enumerate(("z", "positive", "dx", "dy")):
        actual, true, yard, size = ours[k], truth[k], yardstick[k], terms[k]
        assert_no_worse(name, actual, true, yard, 4 * eps * (size.max().item() if n else 0.0))
        for i in range(min(8, n) if true.dim() == 2 else 0):  # a large row must not hide a small one
            floor = 16 * eps * size[i].norm().item()
            assert_same_direction(f"row {i} of {name}", actual[i], true[i], yard[i], floor)


def test_norms_beyond_the_range_of_squares(isa):
    """Sums of squares are float64, so nothing over- or underflows; below 1e-12 rows are divided by 1e-12."""
    x = torch.tensor([[3e30, 4e30], [3e-11, 4e-11], [3e-13, 4e-13], [0.0, 0.0]])
    z, positive = pair_rows(x, x.flip(1), True, torch.float32)
    expected = torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(z, torch.cat((expected, expected.flip(1))))
    torch.testing.assert_close(positive, torch.tensor([0.96, 0.96, 0.24, 0.0]))
    x.requires_grad_()
    (dx,) = torch.autograd.grad(pair_rows(x, x.flip(1).detach(), True, torch.float32)[0][:4].sum(), x)
    # (1 - z <1, z>) / |x|, and 1 / 1e-12 where 1e-12 stands in for the norm
    torch.testing.assert_close(dx[1], torch.tensor([1 - 0.6 * 1.4, 1 - 0.8 * 1.4]) / 5e-11)
    torch.testing.assert_close(dx[2:], torch.full((2, 2), 1e12))


@pytest.mark.parametrize("normalize", [True, False])
def test_one_output_unused(normalize):
    x, y = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    for output in (0, 1):
        actual = torch.autograd.grad(pair_rows(x, y, normalize, x.dtype)[output].square().sum(), (x, y))
        expected = torch.autograd.grad(reference(x, y, normalize, x.dtype)[output].square().sum(), (x, y))
        torch.testing.assert_close(actual, expected)


def test_nan_and_infinity_stay_in_their_pair():
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    x[1, 0], y[3, 2] = torch.nan, torch.inf
    for actual, expected in zip(pair_rows(x, y, True, x.dtype), reference(x, y, True, x.dtype), strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True)


def test_another_dtype_than_that_of_the_inputs():
    x, y = torch.randn(6, 5), torch.randn(6, 5)
    z, positive = pair_rows(x, y, True, torch.bfloat16)
    assert torch.equal(z, F.normalize(torch.cat((x, y)), dim=1).bfloat16())
    torch.testing.assert_close(positive, (z[:6].float() * z[6:].float()).sum(1))


@pytest.mark.parametrize("threads", [2, 3])
def test_same_bits_with_any_number_of_threads(threads, set_threads):
    arguments = torch.randn(700, 64), torch.randn(700, 64), True, torch.float32
    upstream = torch.randn(1400, 64), torch.randn(700)
    set_threads(1)
    expected = evaluate(pair_rows, *arguments, *upstream)
    set_threads(threads)
    for actual, one in zip(evaluate(pair_rows, *arguments, *upstream), expected, strict=True):
        assert torch.equal(actual, one)


@pytest.mark.parametrize("normalize", [True, False])
def test_fresh_memory_may_hold_anything(normalize, monkeypatch):
    x, y, dz, dpositive = torch.randn(9, 5), torch.randn(9, 5), torch.randn(18, 5), torch.randn(9)
    expected = evaluate(pair_rows, x, y, normalize, torch.float32, dz, dpositive)
    new_empty = torch.Tensor.new_empty
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: new_empty(*args, **kw).fill_(torch.nan))
        assert torch.randn(3).new_empty(2).isnan().all()
        actual = evaluate(pair_rows, x, y, normalize, torch.float32, dz, dpositive)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_backends():
    """C++ where it serves; PyTorch under use_backend("reference"), which is differentiable twice."""
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    z, positive = pair_rows(x, y, True, torch.float64)
    assert "PairRows" in type(z.grad_fn).__name__
    (dx,) = torch.autograd.grad(positive.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        dx.sum().backward()
    with sslfast.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x, y: pair_rows(x, y, True, torch.float64), (x, y))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(normalize):
    leaves = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda x, y: pair_rows(x, y, normalize, torch.float64), leaves)


@pytest.mark.parametrize("normalize", [True, False])
def test_opcheck(normalize):
    x, y = torch.randn(6, 4), torch.randn(4, 6).t()
    torch.library.opcheck(torch.ops.sslfast.pair_rows_fwd, (x, y, normalize))
    z, positive, norm = torch.ops.sslfast.pair_rows_fwd(x, y, normalize)
    upstream = torch.randn(4).expand(12, 4), torch.randn_like(positive)
    torch.library.opcheck(torch.ops.sslfast.pair_rows_bwd, (*upstream, z, norm))
