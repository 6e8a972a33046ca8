"""Every contrastive loss on a GPU: as on the CPU in float64, no host synchronisation, CUDA graphs, the same
bits every time, memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

N, D, CLASSES = 300, 64, 17


def rows(*shape: int, dtype=torch.float32) -> Tensor:
    return F.normalize(torch.randn(shape, device=DEVICE), dim=-1).to(dtype).requires_grad_()


def labels_of(count: int, classes: int = CLASSES) -> Tensor:
    return torch.randint(0, classes, (count,), device=DEVICE)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE, requires_grad=True)


# name: (loss of the leaves and the constants, leaves, constants)
LOSSES = {
    "ntxent": (sslfast.ntxent_loss, lambda: (rows(N, D), rows(N, D), scalar(0.2)), lambda: ()),
    "multiview": (sslfast.multiview_ntxent_loss, lambda: (rows(4, N, D), scalar(0.2)), lambda: ()),
    "info_nce": (
        lambda q, k, t: sslfast.info_nce_loss(q, k, temperature=t, symmetric=True, label_smoothing=0.1),
        lambda: (rows(N, D), rows(N, D), scalar(0.1)),
        lambda: (),
    ),
    "clip": (sslfast.clip_loss, lambda: (rows(N, D), rows(N, D), scalar(14.0), scalar(-1.0)), lambda: ()),
    "siglip": (
        sslfast.siglip_loss, lambda: (rows(N, D), rows(N, D), scalar(10.0), scalar(-10.0)), lambda: ()
    ),
    "siglip, rows apart": (
        lambda *x: (sslfast.siglip_loss(*x, reduction="none") ** 2).sum(),
        lambda: (rows(N, D), rows(N, D), scalar(10.0), scalar(-10.0)),
        lambda: (),
    ),
    "supcon": (
        lambda x, t, y: sslfast.supcon_loss(x, y, t),
        lambda: (rows(N, D), scalar(0.1)),
        lambda: (labels_of(N),),
    ),
    "supcon, inside": (
        lambda x, t, y: sslfast.supcon_loss(x, y, t, form="inside"),
        lambda: (rows(N, D), scalar(0.1)),
        lambda: (labels_of(N),),
    ),
    "dcl": (
        lambda x, y, t: sslfast.dcl_loss(x, y, t, weight_sigma=0.5),
        lambda: (rows(N, D), rows(N, D), scalar(0.1)),
        lambda: (),
    ),
    "hard negatives": (
        sslfast.hard_negative_ntxent_loss, lambda: (rows(N, D), rows(N, D), scalar(0.5)), lambda: ()
    ),
    "nnclr": (sslfast.nnclr_loss, lambda: (rows(N, D), rows(N, D), scalar(0.1)), lambda: ()),
    **{
        f"triplet, {mining}": (
            lambda x, y, mining=mining: sslfast.triplet_margin_loss(x, y, 0.2, mining=mining),
            lambda: (rows(N, D),),
            lambda: (labels_of(N),),
        )
        for mining in ("hard", "semihard", "all")
    },
    "linear": (
        lambda h, w, b, y: sslfast.linear_cross_entropy(h, w, y, b),
        lambda: (rows(N, D), rows(1000, D), rows(1000)),
        lambda: (labels_of(N, 1000).masked_fill(torch.arange(N, device=DEVICE) % 3 == 0, -100),),
    ),
    "linear, count known": (
        lambda h, w, b, y: sslfast.linear_cross_entropy(h, w, y, b, num_labelled=200),
        lambda: (rows(N, D), rows(1000, D), rows(1000)),
        lambda: (labels_of(N, 1000).masked_fill(torch.arange(N, device=DEVICE) % 3 == 0, -100),),
    ),
}  # fmt: skip


@pytest.fixture(params=LOSSES)
def case(request):
    return made(request.param)


def made(name: str) -> tuple:
    loss, leaves, constants = LOSSES[name]
    torch.manual_seed(3)
    return loss, leaves(), constants()


def step(loss, leaves, constants) -> tuple[Tensor, ...]:
    value = loss(*leaves, *constants)
    return value.detach(), *torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_as_on_the_cpu_in_double(name):
    loss, leaves, constants = made(name)
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
    hidden, weight, labels = rows(9, D), rows(50, D), labels_of(9, 50)
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
    loss, leaves, constants = LOSSES[name]
    large = [rows(16384, D) if x.dim() else x for x in leaves()]
    labels = [labels_of(16384) for _ in constants()]
    assert peak_bytes(lambda: step(loss, large, labels)) < 2**28


def test_memory_of_a_linear_head():
    """4,096 x 64 x 131,072: float32 logits would be 2 GiB."""
    hidden, weight = rows(4096, D, dtype=torch.bfloat16), rows(131_072, D, dtype=torch.bfloat16)
    labels = labels_of(4096, 131_072)
    loss = lambda h, w: sslfast.linear_cross_entropy(h, w, labels)  # noqa: E731
    assert peak_bytes(lambda: step(loss, (hidden, weight), ())) < 2**28
