"""Every contrastive loss on a GPU: as on the CPU in float64, no host synchronisation, CUDA graphs, the same
bits every time, memory."""

import pytest
import torch
from losses import LOSSES, Inputs, made, step
from torch.nn import functional as F

import sslfast

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(params=LOSSES)
def case(request):
    return made(request.param, Inputs(DEVICE, 300, 64))


@pytest.mark.parametrize("name", LOSSES)
def test_as_on_the_cpu_in_double(name):
    loss, leaves, constants = made(name, Inputs(DEVICE, 300, 64))
    near = 1e-2 if "triplet" in name else 1e-4  # a triplet at the hinge may count or not
    found = step(loss, leaves, constants)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in leaves)
    expected = step(loss, exact, tuple(x.cpu() for x in constants))
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32 and x.is_cuda
        assert (x.double().cpu() - y).norm() <= near * y.norm() + 1e-7


def test_bfloat16_is_near(case):
    loss, leaves, constants = case
    low = tuple(x.detach().bfloat16().requires_grad_() if x.dim() else x for x in leaves)
    found = step(loss, low, constants)
    exact = tuple(x.detach().double().cpu().requires_grad_() for x in low)
    expected = step(loss, exact, tuple(x.cpu() for x in constants))
    assert found[0].dtype == torch.float32
    for x, y in zip(found, expected, strict=True):
        assert (x.double().cpu() - y).norm() <= 2e-2 * y.norm() + 1e-6


def test_no_host_synchronisation(case):
    step(*case)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_same_bits_every_time(case):
    first, again = step(*case), step(*case)
    assert all(map(torch.equal, first, again))


def test_cuda_graph(case):
    """Captured once, replayed on other numbers in the same place."""
    loss, leaves, constants = case
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(*case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*case)
    with torch.no_grad():
        for x in leaves:
            if x.dim():
                x.copy_(F.normalize(torch.randn_like(x), dim=-1))
    graph.replay()
    for x, y in zip(captured, step(loss, leaves, constants), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_wrong_number_of_labels_is_nan():
    inputs = Inputs(DEVICE, 9, 16)
    hidden, weight, labels = inputs.rows(), inputs.rows(50), inputs.labels(50)
    assert sslfast.linear_cross_entropy(hidden, weight, labels, num_labelled=5).isnan()
    assert sslfast.linear_cross_entropy(hidden, weight, labels, num_labelled=9).isfinite()


def peak_bytes(function) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("name", ["clip", "siglip", "supcon", "triplet, hard"])
def test_memory_is_linear(name):
    """16,384 rows: a matrix of their similarities would be 1 GiB in float32."""
    case = made(name, Inputs(DEVICE, 16384, 64))
    assert peak_bytes(lambda: step(*case)) < 2**28


def test_memory_of_a_linear_head():
    """4,096 x 64 x 131,072: float32 logits would be 2 GiB."""
    inputs = Inputs(DEVICE, 4096, 64)
    leaves = [x.detach().bfloat16().requires_grad_() for x in (inputs.rows(), inputs.rows(131_072))]
    case = sslfast.linear_cross_entropy, leaves, (inputs.labels(131_072),)
    assert peak_bytes(lambda: step(*case)) < 2**28
