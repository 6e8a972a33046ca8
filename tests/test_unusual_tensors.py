"""Tensors that are not what they seem: lazily negated or zero, freed, not dense, of another precision."""

import math
import threading

import pytest
import torch

import sslfast
from sslfast import info_nce_loss, ntxent_loss, similarity_lse
from sslfast.ops import _backend

A, B = torch.randn(6, 3), torch.randn(5, 3)
NEGATED = torch._neg_view  # the storage holds -x, as in the imaginary part of a conjugate


def test_lazily_negated_tensors():
    bias = torch.randn(5)
    expected = similarity_lse(-A, -B, bias=-bias, scale=-2.0)
    scale = torch.tensor(1 + 2j).conj().imag
    assert scale.is_neg() and scale == -2
    torch.testing.assert_close(
        similarity_lse(NEGATED(A), NEGATED(B), bias=NEGATED(bias), scale=scale), expected
    )
    torch.testing.assert_close(ntxent_loss(NEGATED(A), A.flip(0)), ntxent_loss(-A, A.flip(0)))
    z = A.clone().requires_grad_()
    (upstream,) = torch.autograd.grad(similarity_lse(z), z, NEGATED(torch.ones(6)))
    (expected,) = torch.autograd.grad(similarity_lse(z), z, -torch.ones(6))
    torch.testing.assert_close(upstream, expected)


def test_lazy_zeros():
    zeros = torch._efficientzerotensor(6, 3)
    torch.testing.assert_close(similarity_lse(zeros), torch.full((6,), math.log(5)))
    torch.testing.assert_close(ntxent_loss(zeros, A), ntxent_loss(torch.zeros(6, 3), A))
    z = A.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(similarity_lse(z), z, torch._efficientzerotensor(6))
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["a", "a_ids"])
def test_freed_storage_is_an_error(name):
    arguments = {"a": A.clone(), "a_ids": torch.arange(6)}
    arguments[name].untyped_storage().resize_(0)
    with pytest.raises((ValueError, RuntimeError), match="storage"):
        similarity_lse(**arguments)
    with pytest.raises(ValueError, match="freed"):
        _backend.pointer(
            name, arguments[name], arguments[name].dtype, arguments[name].shape, torch.device("cpu")
        )


@pytest.mark.parametrize("kind", ["sparse", "csr", "mkldnn", "nested", "meta"])
def test_other_layouts_and_meta_tensors_are_refused_by_name(kind):
    make = {
        "sparse": lambda x: x.to_sparse(),
        "csr": lambda x: x.to_sparse_csr(),
        "mkldnn": lambda x: x.to_mkldnn(),
        "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
        "meta": lambda x: x.to("meta"),
    }[kind]
    for call in (lambda x: similarity_lse(x), lambda x: similarity_lse(A, x)):
        with pytest.raises((TypeError, ValueError), match="^[ab]: expected"):
            call(make(A))
    with pytest.raises((TypeError, ValueError), match="^z1: expected"):
        ntxent_loss(make(A), A)
    with pytest.raises((TypeError, ValueError), match="^key: expected"):
        info_nce_loss(A, make(A))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("loss", [ntxent_loss, info_nce_loss])
def test_a_temperature_of_low_precision_is_inverted_in_the_working_dtype(loss, dtype):
    work = torch.float32 if dtype != torch.float32 else torch.float64
    x, y = torch.randn(2, 40, 8, dtype=work)
    temperature = torch.tensor(0.07, dtype=dtype, requires_grad=True)
    expected = loss(x, y, temperature=temperature.item())
    actual = loss(x, y, temperature=temperature)
    torch.testing.assert_close(actual, expected, rtol=1e-6 if work == torch.float32 else 1e-14, atol=0)
    actual.backward()
    assert temperature.grad.dtype == dtype and temperature.grad.isfinite()
    assert loss(x, y, temperature=torch.tensor(1e-5, dtype=torch.float16)).isfinite()


@pytest.mark.parametrize("size", [1e-22, 1e-25, 1e-30])
def test_tiny_upstream_gradients_keep_their_digits(size, isa):
    rows = torch.nn.functional.normalize(torch.ones(600, 8) + 0.01 * torch.randn(600, 8), dim=1)

    def gradient(dtype, upstream):
        leaf = rows.to(dtype).requires_grad_()
        (d,) = torch.autograd.grad(
            similarity_lse(leaf, scale=38.5), leaf, torch.full((600,), upstream, dtype=dtype)
        )
        return d.double()

    expected = gradient(torch.float64, size)
    assert (gradient(torch.float32, size) - expected).norm() < 1e-5 * expected.norm()


def test_a_row_without_pairs_stays_empty_when_the_scale_is_nan(isa):
    nan = torch.tensor(math.nan)
    assert similarity_lse(torch.randn(1, 4), scale=nan).item() == -math.inf
    a_ids, b_ids = torch.tensor([1, 1, 2]), torch.tensor([1, 1])
    row, col = similarity_lse(A[:3], B[:2], scale=nan, a_ids=a_ids, b_ids=b_ids, return_cols=True)
    assert (row[:2] == -math.inf).all() and row[2].isnan() and col.isnan().all()


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_weights_are_not_negative(value):
    weights = torch.ones(6)
    weights[3] = value
    with pytest.raises(ValueError, match="weights: expected"):
        info_nce_loss(A, A, weights=weights)


def test_blocks_of_two_threads_may_end_in_any_order():
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with sslfast.use_backend("reference"):
            entered.set()
            leave.wait(10)
        left.set()

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with sslfast.use_backend("cpu"):
        leave.set()
        assert left.wait(10) and _backend.forced() == "cpu"
    thread.join()
    assert _backend.forced() is None
