"""What processes of one loss do together: agree, fail alike, and spare memory and bytes."""

import copy
import pickle
import re
from functools import partial

import distributed_cases as cases
import distributed_workers as workers
import processes
import pytest
import torch
from torch import nn

import sslfast


def test_a_mistake_of_one_process_is_the_same_clear_error_on_all(tmp_path) -> None:
    found = processes.run(workers.mistakes, 2, tmp_path / "mistakes")
    for name, (_, kind, pattern) in workers.MISTAKES.items():
        assert found[0][name] == found[1][name], name
        got, message = found[0][name]
        assert got is kind and re.search(pattern, message), (name, got, message)
    assert found[0]["none"].isfinite() and found[0]["none"] == found[1]["none"]


SIZES = [4, 1, 2]


@pytest.fixture(scope="module")
def three_processes(tmp_path_factory) -> list[dict]:
    return processes.run(partial(workers.three, sizes=SIZES), 3, tmp_path_factory.mktemp("three") / "store")


@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_data_parallel_gradients_are_those_of_one_process(strategy: str, three_processes: list[dict]) -> None:
    for k, loss in enumerate((sslfast.clip_loss, sslfast.siglip_loss)):
        model = workers.Contrast(loss).double()
        value = model(workers.batch(sum(SIZES)))
        value.backward()
        for found in three_processes:
            got, gradients = found[strategy][k]
            torch.testing.assert_close(got, value.detach(), rtol=1e-12, atol=1e-12)
            for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
                torch.testing.assert_close(g, p.grad, rtol=1e-10, atol=1e-12, msg=f"{loss.__name__} {name}")


def test_keys_of_all_processes_enter_every_queue(three_processes: list[dict]) -> None:
    torch.manual_seed(7)
    queue = sslfast.KeyQueue(10, 5)
    for k in range(3):
        queue.enqueue(workers.batch(sum(SIZES)) + k)
        for found in three_processes:
            torch.testing.assert_close(found["queues"][k], queue.keys, rtol=0, atol=0)


def test_centres_are_of_the_rows_of_all_processes(three_processes: list[dict]) -> None:
    expected = workers.centres(0, [sum(SIZES)])
    for found in three_processes:
        torch.testing.assert_close(found["centres"], expected, rtol=1e-12, atol=1e-12)


def test_plain_pytorch_serves_a_group_too(three_processes: list[dict]) -> None:
    _assert_served([found["reference"] for found in three_processes], torch.float64, 1e-10)


@pytest.mark.interpreted
def test_triton_serves_a_group(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    worker = partial(workers.by_backend, sizes=[5, 2], backend="triton", dtype=torch.float32)
    _assert_served(processes.run(worker, 2, tmp_path / "triton"), torch.float32, 4e-6)


def _assert_served(found: list[dict], dtype: torch.dtype, limit: float) -> None:
    sizes = SIZES if len(found) == 3 else [5, 2]
    for name in workers.SERVED:
        rows, whole = cases.inputs(name, sizes, dtype)
        loss, to_rows, to_whole = cases.evaluate(name, rows, whole)
        for of_rank in found:
            torch.testing.assert_close(of_rank[name][0], loss, rtol=limit, atol=limit)
        for key, expected in to_rows.items():
            got = torch.cat([of_rank[name][1][key] for of_rank in found]) / len(found)
            torch.testing.assert_close(got, expected, rtol=limit, atol=limit, msg=f"{name} {key}")
        for key, expected in to_whole.items():
            got = sum(of_rank[name][2][key] for of_rank in found) / len(found)
            torch.testing.assert_close(got, expected, rtol=limit, atol=limit, msg=f"{name} {key}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_low_precision(strategy: str, dtype: torch.dtype, three_processes: list[dict]) -> None:
    """No further from float64 than twice one process's bfloat16, as everywhere."""
    x, exact = (workers.wide_rows(SIZES, dtype).to(kind).requires_grad_() for kind in (dtype, torch.float64))
    loss, truth = workers.low_precision_loss(x), workers.low_precision_loss(exact)
    found = [of_rank["low"][f"{strategy} {dtype}"] for of_rank in three_processes]
    gradient = torch.cat([g for _, g in found]).double() / 3
    assert x.grad is not None and exact.grad is not None and found[0][1].dtype == dtype
    for value, _ in found:
        assert (value - truth).abs() <= 2 * (loss - truth).abs() + 1e-5
    floor = 2**-9 * exact.grad.abs().max()
    assert (gradient - exact.grad).abs().max() <= 2 * (x.grad - exact.grad).abs().max() + floor
    assert torch.cosine_similarity(gradient.flatten(), exact.grad.flatten(), 0) > 0.9999


def test_compiled(three_processes: list[dict]) -> None:
    """With a group torch.compile leaves the exchange to eager mode."""
    x = workers.wide_rows(SIZES, torch.float32).requires_grad_()
    loss = sslfast.ntxent_loss(*(2 * x).unbind(1))
    loss.backward()
    for found in three_processes:
        torch.testing.assert_close(found["compiled"][0], loss.detach())
    torch.testing.assert_close(torch.cat([found["compiled"][1] for found in three_processes]) / 3, x.grad)


def test_gathered_rows_have_the_gradients_of_all_processes(three_processes: list[dict]) -> None:
    x = workers.batch(sum(SIZES)).requires_grad_()
    x.sum(0).square().sum().backward()
    torch.testing.assert_close(torch.cat([found["own"] for found in three_processes]), x.grad)
    assert torch.equal(sslfast.distributed.gather(x), x)  # alone
    with pytest.raises(TypeError, match="x: expected a tensor"):
        sslfast.distributed.gather(3)


def test_a_ring_needs_as_much_memory_with_four_processes_as_with_two(tmp_path, monkeypatch) -> None:
    """And sends what the formula of sslfast.distributed says. A gather needs more with each process."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # memory that is given back is given back at once
    rows, dim = 64, 1 << 15  # 16 MiB in two views
    strategies = ("ring", "gather")
    peaks: dict[str, dict[int, int]] = {name: {} for name in strategies}
    for size in (2, 4):
        worker = partial(workers.costs, rows=rows, dim=dim, strategies=strategies)
        found = processes.run(worker, size, tmp_path / str(size))
        for name in strategies:
            peaks[name][size] = max(costs[name][0] for costs in found)
        around, scalar = (size - 1) * 2 * rows, 4 * 2 * (size - 1) // size
        forward = around * (4 * dim + 8) + scalar
        backward = around * (4 * dim + 8 + 4 + 4)
        assert {costs["ring"][1:] for costs in found} == {(forward, forward + backward)}
    print({name: {size: f"{x >> 20} MiB" for size, x in of.items()} for name, of in peaks.items()})
    assert peaks["ring"][4] < 1.15 * peaks["ring"][2]
    assert peaks["gather"][4] > 1.4 * peaks["gather"][2]  # so it can be seen


def test_a_group_is_checked_where_there_is_none() -> None:
    z = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"group: .*'world' or None, got int"):
        sslfast.ntxent_loss(z, z, group=3)
    with pytest.raises(ValueError, match="strategy: expected one of auto, gather, ring, got 'star'"):
        sslfast.ntxent_loss(z, z, strategy="star")
    with pytest.raises(ValueError, match="scaling: expected one of ddp, sum, got 'mean'"):
        sslfast.clip_loss(z, z, 1.0, scaling="mean")
    assert torch.equal(sslfast.ntxent_loss(z, z, group="world"), sslfast.ntxent_loss(z, z))


@pytest.mark.parametrize(
    "module",
    [
        sslfast.NTXentLoss, sslfast.InfoNCELoss, sslfast.CLIPLoss, sslfast.SigLIPLoss, sslfast.SupConLoss,
        sslfast.DCLLoss, sslfast.HardNegativeNTXentLoss, sslfast.MoCoLoss, sslfast.KoLeoLoss,
    ],
)  # fmt: skip
def test_modules_take_a_group(module: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="strategy: "):
        module(strategy="star")
    with pytest.raises(ValueError, match="scaling: "):
        module(scaling="")
    with pytest.raises(TypeError, match="group: "):
        module(group=1)
    made = module(group="world", strategy="ring")
    assert copy.deepcopy(made).across == pickle.loads(pickle.dumps(made)).across == made.across
    assert made.across == {
        "group": "world", "strategy": "ring", "scaling": "ddp"
    }  # fmt: skip
