"""MoCo's loss and queue against cross-entropy over [key, queue] and a list of columns."""

import copy
import functools
import pickle

import interop_solo_processes
import plain_interop
import processes
import pytest
import torch
from originals import assert_like_original, assert_signature
from torch import nn
from torch.nn import functional as F

from sslfast.interop.moco import MoCoQueue, contrastive_loss

DIM, K = 6, 24


def rows(n, dim=DIM, dtype=torch.float64):
    return F.normalize(torch.randn(n, dim, dtype=dtype), dim=1)


def columns(k=K, dim=DIM, dtype=torch.float64):
    return rows(k, dim, dtype).T.contiguous()


def test_signatures():
    assert_signature(contrastive_loss, lambda query, key, queue, temperature=0.07: ...)
    assert_signature(MoCoQueue, lambda dim=128, K=65536: ...)
    assert_signature(MoCoQueue(4, 8).enqueue, lambda keys: ...)
    assert_signature(MoCoQueue(4, 8)._dequeue_and_enqueue, lambda keys: ...)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.2}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize("n, k, dim", [(8, 24, 6), (1, 24, 6), (8, 1, 6), (5, 12, 1), (70, 300, 16)])
def test_loss(options, n, k, dim):
    queue = columns(k, dim)
    assert_like_original(
        lambda query, key: contrastive_loss(query, key, queue.to(query), **options),
        lambda query, key: plain_interop.queue_loss(
            query, key.detach(), queue.to(query), options.get("temperature", 0.07)
        ),
        {"query": rows(n, dim), "key": rows(n, dim)},
    )


def test_rows_are_taken_as_they_are():
    query, key, queue = (0.5 * torch.randn(n, DIM, dtype=torch.float64) for n in (8, 8, K))
    torch.testing.assert_close(
        contrastive_loss(query, key, queue.T, 0.5),
        plain_interop.queue_loss(query, key, queue.T, 0.5),
        rtol=1e-12,
        atol=0,
    )


def test_only_the_query_gets_a_gradient():
    query, key, queue = rows(8).requires_grad_(), rows(8).requires_grad_(), columns().requires_grad_()
    loss = contrastive_loss(query, key, queue)
    a, b, c = torch.autograd.grad(loss, (query, key, queue), allow_unused=True)
    assert a.abs().max() > 0 and (b is None or b.eq(0).all()) and (c is None or c.eq(0).all())
    assert not contrastive_loss(query.detach(), key.detach(), queue.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    query, key, queue = rows(8).to(dtype).requires_grad_(), rows(8).to(dtype), columns().to(dtype)
    value = contrastive_loss(query, key, queue, 0.2)
    exact = query.detach().double().requires_grad_()
    truth = plain_interop.queue_loss(exact, key.double(), queue.double(), 0.2)
    torch.testing.assert_close(value.double(), truth, rtol=2e-2, atol=0)
    (ours,), (its,) = torch.autograd.grad(value, query), torch.autograd.grad(truth, exact)
    assert ours.dtype == dtype and (ours.double() - its).norm() <= 4e-2 * its.norm()


def test_large_logits_stay_finite():
    query = (40 * rows(8)).float().requires_grad_()
    loss = contrastive_loss(query, query.detach().roll(1, 0), (40 * columns()).float(), 0.01)
    assert loss.isfinite() and torch.autograd.grad(loss, query)[0].isfinite().all()


def test_official_cross_entropy():
    query, key, queue = rows(70), rows(70), columns(140)
    logits = torch.cat(((query * key).sum(1, keepdim=True), query @ queue), 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(70, dtype=torch.int64))
    torch.testing.assert_close(contrastive_loss(query, key, queue), expected, rtol=1e-12, atol=0)


# The queue


def test_state_is_that_of_mocos_checkpoints():
    module = MoCoQueue()
    assert isinstance(module, nn.Module) and not list(module.parameters())
    assert list(module.state_dict()) == ["queue", "queue_ptr"] == [n for n, _ in module.named_buffers()]
    assert module.queue.shape == (128, 65536) and module.queue.dtype == torch.float32
    assert module.queue_ptr.shape == (1,) and module.queue_ptr.dtype == torch.int64
    assert module.queue_ptr.item() == 0
    length = module.queue.norm(dim=0)
    torch.testing.assert_close(length, torch.ones_like(length))
    torch.manual_seed(1)
    first = MoCoQueue(4, 8)
    assert not torch.equal(first.queue, MoCoQueue(4, 8).queue)
    torch.manual_seed(1)
    assert torch.equal(first.queue, MoCoQueue(4, 8).queue)
    assert MoCoQueue(dim=4, K=8).queue.shape == (4, 8)


def test_checkpoint_of_moco():
    saved = {"queue": columns(dtype=torch.float32), "queue_ptr": torch.tensor([16])}
    module, keys = MoCoQueue(DIM, K), rows(8, dtype=torch.float32)
    assert str(module.load_state_dict(saved)) == "<All keys matched successfully>"
    module.enqueue(keys)
    assert torch.equal(module.queue[:, 16:], keys.T) and torch.equal(
        module.queue[:, :16], saved["queue"][:, :16]
    )
    assert module.queue_ptr.tolist() == [0]
    other = MoCoQueue(DIM, K)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.queue, module.queue)
    with pytest.raises(RuntimeError):
        MoCoQueue(DIM, 2 * K).load_state_dict(saved)


@pytest.mark.parametrize("name", ["enqueue", "_dequeue_and_enqueue"])
@pytest.mark.parametrize("sizes", [[8] * 7, [K, K], [1, 2, 3, 6], [12, 4, 8, 2]], ids=str)
def test_enqueue(name, sizes):
    """Columns ptr, ..., ptr + B, in place; batches whose sizes divide K never wrap here."""
    module = MoCoQueue(DIM, K)
    plain, at = plain_interop.Queue(module.queue), module.queue.data_ptr()
    for size in sizes:
        keys = rows(size, dtype=torch.float32)
        assert getattr(module, name)(keys) is None
        plain.enqueue(keys)
        assert torch.equal(module.queue, plain.queue)
        assert module.queue_ptr.tolist() == [plain.pointer] and module.queue_ptr.dtype == torch.int64
    assert module.queue.data_ptr() == at and module.queue.shape == (DIM, K)


@pytest.mark.parametrize("size", [5, 7, 9, 16, 48])
def test_enqueue_of_a_batch_that_does_not_divide_the_queue(size):
    module = MoCoQueue(DIM, K)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(AssertionError):
        module.enqueue(rows(size, dtype=torch.float32))
    assert torch.equal(module.queue, before["queue"]) and module.queue_ptr.item() == 0


def test_keys_are_stored_without_a_graph_and_in_the_queues_dtype():
    module, keys = MoCoQueue(DIM, K), rows(8, dtype=torch.float32)
    module.enqueue(2 * keys.requires_grad_())
    assert not module.queue.requires_grad and module.queue.grad_fn is None
    assert torch.equal(module.queue[:, :8], 2 * keys.detach().T)
    module.enqueue(keys.detach().to(torch.bfloat16))
    assert torch.equal(module.queue[:, 8:16], keys.detach().to(torch.bfloat16).float().T)
    doubled = module.double()
    doubled.enqueue(rows(8))
    assert doubled.queue.dtype == torch.float64


def test_keys_are_copied():
    module, keys = MoCoQueue(DIM, 8), rows(8, dtype=torch.float32)
    module.enqueue(keys)
    before = module.queue.clone()
    keys.zero_()
    assert torch.equal(module.queue, before)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(twin):
    module = MoCoQueue(DIM, K)
    module.enqueue(rows(8, dtype=torch.float32))
    other = twin(module)
    assert torch.equal(other.queue, module.queue) and other.queue_ptr.item() == 8
    other.enqueue(rows(8, dtype=torch.float32))
    assert module.queue_ptr.item() == 8 and not torch.equal(other.queue, module.queue)


def test_loss_then_enqueue_then_backward():
    """As the training script does it; MoCo itself copies the queue for this."""
    module = MoCoQueue(DIM, K).double()
    plain, weight = plain_interop.Queue(module.queue), rows(DIM).requires_grad_()
    for _ in range(5):
        x, key = rows(8), rows(8)
        query = F.normalize(x @ weight, dim=1)
        expected = plain_interop.queue_loss(query, key, plain.queue, 0.07)
        first = contrastive_loss(query, key, module.queue)
        module.enqueue(key)
        plain.enqueue(key)
        second = contrastive_loss(query, key.roll(1, 0), module.queue)  # as in a symmetric loss
        module.enqueue(-key)
        torch.testing.assert_close(first, expected, rtol=1e-12, atol=0)
        expected = expected + plain_interop.queue_loss(query, key.roll(1, 0), plain.queue, 0.07)
        plain.enqueue(-key)
        (ours,) = torch.autograd.grad(first + second, weight, retain_graph=True)
        (its,) = torch.autograd.grad(expected, weight)
        torch.testing.assert_close(ours, its, rtol=1e-10, atol=1e-12)
        assert torch.equal(module.queue, plain.queue)
        with torch.no_grad():
            weight -= 0.1 * ours


def test_a_queue_that_is_part_of_a_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory = MoCoQueue(DIM, K)

    names = list(Model().state_dict())
    assert names == ["memory.queue", "memory.queue_ptr"]


def test_enqueue_gathers_the_keys_of_all_processes(tmp_path):
    count, size = 2, interop_solo_processes.ROWS
    worker = functools.partial(interop_solo_processes.moco, count=count)
    keys = interop_solo_processes.batch(count)["keys"]
    for before, queue, pointer in processes.run(worker, count, tmp_path / "gloo"):
        plain = plain_interop.Queue(before)
        plain.enqueue(keys)
        plain.enqueue(2 * keys)
        assert torch.equal(queue, plain.queue) and pointer.tolist() == [plain.pointer] == [4 * size]
