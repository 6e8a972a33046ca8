"""DINO's losses and Sinkhorn-Knopp on a GPU, beyond what tests/test_backends.py checks there: cases in small
pieces, real sizes, memory, CUDA graphs, streams, determinism."""

import importlib

import plain_dino
import pytest
import torch
from sslfast.kernels import tuning
from torch.nn import functional as F

import sslfast
from sslfast.testing import CASES, assert_close_to_reference

OPS = ("soft_cross_entropy", "head_cross_entropy", "sinkhorn_pass")
DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
op = importlib.import_module("sslfast.ops.soft_cross_entropy")


@pytest.fixture
def small_pieces(monkeypatch):
    """Rows in several stretches, prototypes in several chunks."""
    monkeypatch.setattr(tuning, "TARGET_TILE", 512)
    monkeypatch.setattr(tuning, "PROTOTYPES", {DEVICE: 4096})
    monkeypatch.setattr(tuning, "SINKHORN_BLOCK", 256)
    monkeypatch.setattr(tuning, "SINKHORN_PARTS", 4)


@pytest.mark.parametrize(
    "name, case, dtype",
    [
        (name, case, dtype)
        for name in OPS
        for case in CASES[name]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")),
)
def test_case_in_small_pieces(name, case, dtype, small_pieces):
    with sslfast.use_backend("triton"):
        inputs = case.inputs(dtype, DEVICE, seed=5)
        assert_close_to_reference(name, inputs, seed=6, rounds_tiles=dtype.itemsize == 2)


# Real sizes


def logits_of(*shape, dtype=torch.bfloat16):
    """As cosines with prototypes are spread."""
    return (torch.randn(shape, device=DEVICE) / 4).to(dtype)


def features_of(*shape, dtype=torch.bfloat16):
    return F.normalize(torch.randn(shape, device=DEVICE), dim=-1).to(dtype)


def peak_bytes(function):
    """(what it returns, the most that was allocated meanwhile)"""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = function()
    torch.cuda.synchronize()
    return out, torch.cuda.max_memory_allocated() - before


def assert_near(found, true, error):
    assert (found.double() - true).norm() <= error * true.norm()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dino_loss(dtype, in_place):
    """64 images of 10 crops, 65,536 prototypes: as in float64, and in no more memory than the gradient's."""
    student, teacher = logits_of(10, 64, 65_536, dtype=dtype), logits_of(2, 64, 65_536, dtype=dtype)
    center = torch.randn(65_536, device=DEVICE) / 16
    exact = student.double().requires_grad_()
    truth = plain_dino.dino_loss([*exact], [*teacher.double()], center.double(), 0.1, 0.04)
    (true,) = torch.autograd.grad(truth, exact)
    leaf = student.requires_grad_()

    def run():
        loss = sslfast.dino_loss(leaf.view_as(leaf), teacher, center, inplace_backward=in_place)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    (loss, gradient), peak = peak_bytes(run)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert_near(loss, truth, 1e-5)
    assert_near(gradient, true, 1e-5 if dtype == torch.float32 else 4e-3)
    assert peak < 2**23 + (0 if in_place else student.nbytes)
    assert (gradient.data_ptr() == leaf.data_ptr()) == in_place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dino_head_loss(dtype):
    """The same of 256 features, in less memory than float32 logits would take, 0.2 GB."""
    student, teacher = features_of(10, 64, 256, dtype=dtype), features_of(2, 64, 256, dtype=dtype)
    w, y = (features_of(65_536, 256, dtype=dtype).float() for _ in range(2))
    center = torch.randn(65_536, device=DEVICE) / 16
    exact = [x.double().requires_grad_() for x in (student, w)]
    logits, targets = exact[0] @ exact[1].T, teacher.double() @ y.double().T
    truth = plain_dino.dino_loss([*logits], [*targets], center.double(), 0.1, 0.04)
    true = torch.autograd.grad(truth, exact)
    leaves = student.requires_grad_(), w.requires_grad_()

    def run():
        loss = sslfast.dino_head_loss(*leaves, teacher, y, center)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    (loss, *gradients), peak = peak_bytes(run)
    assert_near(loss, truth, 1e-5)
    for gradient, expected, leaf in zip(gradients, true, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_near(gradient, expected, 1e-4 if dtype == torch.float32 else 1e-2)
    assert peak < w.nbytes + 12 * 64 * 65_536 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinkhorn(dtype):
    logits = logits_of(1000, 65_536, dtype=dtype)
    found, peak = peak_bytes(lambda: sslfast.sinkhorn_knopp(logits, 0.07))
    assert_near(found, plain_dino.sinkhorn(logits.double(), 0.07, 3), 2e-5)
    assert peak < found.nbytes + 2**26  # parts of the sums over rows


def test_more_than_2_to_the_31_logits():
    """The last images, whose logits lie beyond, give what they give alone."""
    views, batch, classes = 2, 16_500, 65_536
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("too little memory")
    logits = torch.empty(views, batch, classes, dtype=torch.bfloat16, device=DEVICE).normal_()
    targets, last = logits_of(1, 1, classes).expand(1, batch, classes), logits[:, -3:].detach().clone()
    losses = op.view_cross_entropy(logits.requires_grad_(), targets, 10.0, target_scale=25.0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    alone = op.view_cross_entropy(last.requires_grad_(), targets[:, -3:], 10.0, target_scale=25.0)
    (expected,) = torch.autograd.grad(alone.sum(), last)
    torch.testing.assert_close(losses[:, -3:], alone)
    torch.testing.assert_close(gradient[:, -3:], expected)
    rows = logits.detach().flatten(0, 1)
    assignments = sslfast.sinkhorn_knopp(rows[:, : classes // 2], 1.0, 1)
    torch.testing.assert_close(assignments[-3:].sum(1), torch.ones(3, device=DEVICE), rtol=1e-4, atol=0)


# Graphs, streams, bits


def example(name):
    """(numbers, a step on them: what it leaves and all gradients)"""
    center, module = torch.randn(5000, device=DEVICE) / 16, sslfast.DINOLoss(5000).to(DEVICE)
    if name == "sinkhorn_knopp":
        logits = logits_of(300, 5000)
        return [logits], lambda: [sslfast.sinkhorn_knopp(logits, 0.07)]
    if name == "dino_head_loss":
        shapes = (5, 8, 64), (5000, 64), (2, 8, 64), (5000, 64)
        numbers = [*(features_of(*shape) for shape in shapes), center]
        leaves = [x.requires_grad_() for x in numbers[:2]]
    else:
        numbers = [logits_of(5, 8, 5000), logits_of(2, 8, 5000), center]
        leaves = [numbers[0].requires_grad_()]

    def step():
        moved = []
        if name == "DINOLoss":
            module.center.copy_(center)
            loss = module(*numbers[:2])
            moved = [module.center.clone()]
        elif name == "dino_loss, in place":
            loss = sslfast.dino_loss(numbers[0] * 1, *numbers[1:], inplace_backward=True)
        else:
            loss = getattr(sslfast, name)(*numbers)
        return [loss.detach(), *moved, *torch.autograd.grad(loss, leaves)]

    return numbers, step


STEPS = ["dino_loss", "dino_loss, in place", "DINOLoss", "dino_head_loss", "sinkhorn_knopp"]


@pytest.mark.parametrize("name", STEPS)
def test_no_host_read_and_cuda_graph(name):
    numbers, step = example(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for size in (3.0, 0.5):
        with torch.no_grad():
            for x in numbers:
                x.copy_(x.flip(-1) * size)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, step(), strict=True))


@pytest.mark.parametrize("name", STEPS)
def test_any_stream(name):
    numbers, step = example(name)
    expected, kept = step(), [x.detach().clone() for x in numbers]
    with torch.no_grad():
        for x in numbers:
            x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # on any other stream the kernels would see zeros
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            for x, old in zip(numbers, kept, strict=True):
                x.copy_(old)
        found = step()
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("pieces", ["as they are", "small"])
@pytest.mark.parametrize("name", STEPS)
def test_bitwise_deterministic(name, pieces, request):
    if pieces == "small":
        request.getfixturevalue("small_pieces")
    _, step = example(name)
    first = step()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, step(), strict=True))
