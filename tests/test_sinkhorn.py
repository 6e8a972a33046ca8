"""Sinkhorn-Knopp, its centre, and KoLeo, against the textbook; passes over logits in Triton's interpreter."""

import functools

import plain_dino
import processes
import pytest
import torch
from interpreter import grid_order, guarded, inside_nan, interpreted
from sslfast.kernels import tuning
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import KoLeoLoss, dino_head_loss, dino_loss, koleo_loss, sinkhorn_center, sinkhorn_knopp
from sslfast.losses import koleo
from sslfast.testing import CASES, assert_close_to_reference


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("rows, classes, iterations", [(40, 25, 3), (7, 100, 1), (1, 9, 3), (300, 300, 5)])
def test_is_the_textbooks(rows, classes, iterations, backend):
    logits = torch.randn(rows, classes, dtype=torch.float64)
    with sslfast.use_backend(backend):
        found = sinkhorn_knopp(logits, 0.3, iterations)
    torch.testing.assert_close(found, plain_dino.sinkhorn(logits, 0.3, iterations), rtol=1e-10, atol=1e-14)


def test_one_prototype_of_any_stride_takes_all():
    assert torch.equal(sinkhorn_knopp(torch.randn(3, 5).t()[:, :1], 0.1), torch.ones(5, 1))


def test_rows_sum_to_one_and_prototypes_share_them():
    logits = torch.randn(500, 20) + 3 * torch.randn(20)  # some prototypes are liked by all
    found = sinkhorn_knopp(logits, 0.5, 50)
    torch.testing.assert_close(found.sum(1), torch.ones(500))
    torch.testing.assert_close(found.sum(0), torch.full((20,), 25.0), rtol=0.02, atol=0)
    assert (logits / 0.5).softmax(1).sum(0).max() > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.001, 0.04, 100.0, -0.1])
def test_no_temperature_overflows(dtype, temperature):
    logits = torch.randn(30, 50).to(dtype)
    found = sinkhorn_knopp(logits, temperature)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found.sum(1), torch.ones(30), rtol=1e-3, atol=0)
    exact = sinkhorn_knopp(logits.double(), temperature)
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=1e-3)


def test_a_softmax_with_the_center_is_the_assignment():
    logits = torch.randn(2, 30, 50, dtype=torch.float64)
    rows = logits.flatten(0, 1)
    center = sinkhorn_center(rows, 0.07)
    torch.testing.assert_close(((rows - center) / 0.07).softmax(1), sinkhorn_knopp(rows, 0.07))
    student = torch.randn(4, 30, 50, dtype=torch.float64)
    expected = plain_dino.sinkhorn_dino_loss([*student], [*logits], 0.1, 0.07)
    torch.testing.assert_close(dino_loss(student, logits, center, 0.1, 0.07), expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_the_center_of_features_is_that_of_their_logits(backend):
    features, w = (F.normalize(torch.randn(*s).double(), dim=-1) for s in ((2, 30, 8), (50, 8)))
    rows = features.flatten(0, 1)
    with sslfast.use_backend(backend):
        center = sinkhorn_center(rows, 0.07, prototypes=w)
    torch.testing.assert_close(center, sinkhorn_center(rows @ w.T, 0.07))
    student = torch.randn(4, 30, 8).double()
    expected = dino_loss(student @ w.T, features @ w.T, center, 0.1, 0.07)
    torch.testing.assert_close(dino_head_loss(student, w, features, w, center, 0.1, 0.07), expected)


@pytest.mark.parametrize("sizes", [[20, 20], [5, 30, 10], [0, 12]])
def test_across_processes(tmp_path, sizes):
    logits = torch.randn(sum(sizes), 25, dtype=torch.float64)
    worker = functools.partial(processes.balanced, logits=logits, sizes=sizes)
    found = processes.run(worker, len(sizes), tmp_path / "run")
    torch.testing.assert_close(torch.cat([x for x, _ in found]), sinkhorn_knopp(logits, 0.2))
    for _, center in found:
        torch.testing.assert_close(center, sinkhorn_center(logits, 0.2))


@pytest.mark.parametrize(
    "name, args",
    [
        ("teacher_logits", (torch.randn(5), 0.1)),
        ("teacher_logits", (torch.randn(5, 0), 0.1)),
        ("teacher_logits", ([1.0], 0.1)),
        ("temperature", (torch.randn(5, 4), 0.0)),
        ("temperature", (torch.randn(5, 4), float("nan"))),
        ("iterations", (torch.randn(5, 4), 0.1, 0)),
        ("iterations", (torch.randn(5, 4), 0.1, 1.5)),
    ],
)
def test_bad_arguments_are_named(name, args):
    for function in (sinkhorn_knopp, sinkhorn_center):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            function(*args)
    with pytest.raises(ValueError, match="^prototypes: "):
        sinkhorn_center(torch.randn(5, 4), 0.1, prototypes=torch.randn(9, 3))


def test_triton_refuses_what_it_has_no_kernel_for(monkeypatch):
    with sslfast.use_backend("triton"), pytest.raises(RuntimeError, match="sinkhorn_pass: backend 'triton'"):
        sinkhorn_knopp(torch.randn(3, 4, dtype=torch.float64), 0.1)


# KoLeo


@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_koleo_is_the_loops(monkeypatch, chunk):
    monkeypatch.setattr(koleo, "CHUNK", chunk)
    x = torch.randn(23, 6, dtype=torch.float64).requires_grad_()
    found, expected = koleo_loss(x), plain_dino.koleo(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(y, x)[0] for y in (found, expected)))
    assert torch.equal(KoLeoLoss()(x), found)


def test_koleo_gradcheck():
    x = torch.randn(6, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(functools.partial(koleo_loss, eps=0.1), x)


def test_koleo_stays_in_float32_and_survives_equal_rows():
    x = torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(koleo_loss(x), koleo_loss(x))
        torch.testing.assert_close(koleo_loss(x).double(), koleo_loss(x.double()), rtol=1e-5, atol=0)
    x = torch.cat([x, x]).bfloat16().requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32 and x.grad.isfinite().all()


def test_koleo_errors():
    for x, eps, name in ((torch.randn(1, 3), 1e-8, "features"), (torch.randn(4, 3), 0.0, "eps")):
        with pytest.raises(ValueError, match=f"^{name}: "):
            koleo_loss(x, eps)


RUNS = [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 3)]
CHOSEN = [(case, dtype) for dtype, every in RUNS for case in CASES["sinkhorn_pass"][::every]]


@pytest.mark.parametrize("case, dtype", CHOSEN, ids=lambda x: getattr(x, "name", str(x)))
@interpreted
def test_triton_case(case, dtype, monkeypatch):
    """Programs out of order, buffers of NaN with guards around them, inputs among NaN, several blocks."""
    monkeypatch.setattr(tuning, "SINKHORN_BLOCK", 1024)
    inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype).items()}
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        assert_close_to_reference("sinkhorn_pass", inputs)
