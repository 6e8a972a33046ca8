"""similarity_lse on a GPU, beyond what tests/test_backends.py checks there: both forms, CUDA graphs, streams,
devices,
sizes beyond 2^31 logits, memory, determinism."""

import pytest
import torch
from sslfast.kernels import tuning

import sslfast
from sslfast import similarity_lse
from sslfast.testing import CASES, SimilarityLseCase, assert_close_to_reference, similarity_lse_reference

OP = "similarity_lse"
BY_NAME = {case.name: case for case in CASES[OP]}
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def _id(value: object) -> str:
    return value.name if isinstance(value, SimilarityLseCase) else str(value).removeprefix("torch.")


def use_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "form", lambda *args: name)
    monkeypatch.setattr(tuning, "SMALL", 0)


@pytest.fixture(params=["flash", "chunked"])
def form(request, monkeypatch):
    use_form(request.param, monkeypatch)
    return request.param


@pytest.mark.parametrize(
    "case, dtype",
    [
        (case, dtype)
        for dtype, every in ((torch.bfloat16, 1), (torch.float32, 3), (torch.float16, 4))
        for case in CASES[OP][::every]
        if dtype in case.dtypes
    ],
    ids=_id,
)
def test_case_in_every_form(case, dtype, monkeypatch):
    """Whatever the table would choose: sums and running maximum for the narrow rows, and the chunked form."""
    for name in ["chunked"] + ["flash"] * tuning.fits(case.d, dtype.itemsize):
        use_form(name, monkeypatch)
        inputs = case.inputs(dtype, "cuda", seed=5)
        assert_close_to_reference(OP, inputs, seed=6, rounds_tiles=dtype.itemsize == 2)


def test_float32_is_float32_unless_asked_otherwise():
    inputs = SimilarityLseCase("", 700, 900, d=64, scale=0.5, return_cols=True).inputs(torch.float32, "cuda")
    exact = similarity_lse_reference(**{k: x.double() if _floating(x) else x for k, x in inputs.items()})[0]
    highest = (similarity_lse(**inputs)[0] - exact).abs().max()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        high = (similarity_lse(**inputs)[0] - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    assert highest < 2e-5 < high < 0.1


@pytest.mark.parametrize(
    "name", ["many tiles", "self, many tiles", "self, running maximum", "sorted classes, same"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=_id)
def test_bitwise_deterministic(name, dtype, form):
    inputs = BY_NAME[name].inputs(dtype, "cuda")
    first = _results(inputs)
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, _results(inputs), strict=True))


def test_no_host_read_and_cuda_graph(form):
    z = (
        torch.nn.functional.normalize(torch.randn(1024, 128, device="cuda"), dim=1)
        .bfloat16()
        .requires_grad_()
    )
    temperature = torch.tensor(0.1, device="cuda", requires_grad=True)

    def step():
        z.grad = temperature.grad = None
        loss = sslfast.ntxent_loss(z[:512], z[512:], temperature)
        loss.backward()
        return loss

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
        loss = step()
    with torch.no_grad():  # new numbers, and out of the safe range: the branch is taken on the device
        z.copy_(torch.nn.functional.normalize(torch.randn_like(z, dtype=torch.float32), dim=1))
        temperature.fill_(0.004)
    graph.replay()
    captured = [loss.clone(), z.grad.clone(), temperature.grad.clone()]
    expected = [step(), z.grad, temperature.grad]
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


def test_any_stream(form):
    inputs = BY_NAME["many tiles"].inputs(torch.bfloat16, "cuda")
    expected = _results(inputs)
    late = {k: torch.zeros_like(x) if isinstance(x, torch.Tensor) else x for k, x in inputs.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # on any other stream the kernels would see zeros
        torch.cuda._sleep(50_000_000)
        for k, x in inputs.items():
            if isinstance(x, torch.Tensor):
                late[k].copy_(x)
        found = _results(late)
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(expected, found, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_tensors_own_device(form):
    inputs = BY_NAME["many tiles"].inputs(torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert_close_to_reference(OP, inputs, rounds_tiles=True)


def test_compile(form):
    torch._dynamo.reset()

    def loss(z, scale):
        return similarity_lse(z, scale=scale, a_ids=torch.arange(len(z), device=z.device) // 2).sum()

    z = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale = torch.tensor(0.1, device="cuda", requires_grad=True)
    fast = torch.compile(loss, fullgraph=True)(z, scale)
    torch.testing.assert_close(fast, loss(z, scale))
    queries = torch.compile(lambda q, k: similarity_lse(q, k, scale=0.1).sum(), fullgraph=True)
    torch.testing.assert_close(queries(z, z.detach()), similarity_lse(z, z.detach(), scale=0.1).sum())
    for x, y in zip(
        torch.autograd.grad(fast, (z, scale)), torch.autograd.grad(loss(z, scale), (z, scale)), strict=True
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("temperature", [0.1, 0.01], ids=["safe range", "running maximum"])
def test_more_than_2_to_the_31_logits(temperature, form):
    """65,536 x 65,536, against float64 in some rows; memory stays linear."""
    m, d = 65536, 64
    z = torch.nn.functional.normalize(torch.randn(m, d, device="cuda"), dim=1).bfloat16().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row = similarity_lse(z, scale=1 / temperature)
    row.sum().backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < (40 * m * d * 4 if form == "flash" else 2**28)
    x, some = z.detach().double(), torch.tensor([0, 1, 4095, 32768, m - 2, m - 1], device="cuda")
    logits = x[some] @ x.T / temperature
    largest = logits.abs().max().item()
    logits[torch.arange(len(some)), some] = -torch.inf
    torch.testing.assert_close(row[some].double(), logits.logsumexp(1), rtol=0, atol=4e-7 * largest + 2e-6)
    g = logits.softmax(1) + (logits - row.detach().double()).exp()
    expected = g @ x / temperature
    error = (z.grad[some].double() - expected).norm() / expected.norm()
    assert error < 5e-3


def _floating(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _results(inputs: dict) -> list[torch.Tensor]:
    leaves = {k: x.clone().requires_grad_() for k, x in inputs.items() if _floating(x)}
    outputs = similarity_lse(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((x * torch.arange(len(x), device="cuda")).sum() for x in outputs).backward()
    return [*(x.detach() for x in outputs), *(x.grad for x in leaves.values())]
