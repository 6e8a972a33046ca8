"""byol_loss, moco_loss and KeyQueue against formulas written out row by row in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sslfast
from sslfast import BYOLLoss, KeyQueue, MoCoLoss, byol_loss, moco_loss


def f64(*shape, grad=True):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def unit(x):
    return x / x.square().sum(1, keepdim=True).sqrt()


def explicit_byol(p, z):
    """|p' - z'|^2 per row."""
    return torch.stack([(a / a.norm() - b / b.norm()).square().sum() for a, b in zip(p, z, strict=True)])


def explicit_moco(q, k, queue, temperature=0.2, normalize=True):
    if normalize:
        q, k, queue = unit(q), unit(k), unit(queue)
    terms = []
    for i in range(len(q)):
        logits = torch.stack([q[i] @ k[i], *(q[i] @ x for x in queue)]) / temperature
        terms.append(-logits.log_softmax(0)[0])
    return torch.stack(terms)


# BYOL


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_byol_is_its_formula(reduction):
    p, z = f64(9, 5), f64(9, 5)
    terms = explicit_byol(p, z.detach())
    expected = {"mean": terms.mean(), "sum": terms.sum(), "none": terms}[reduction]
    loss = byol_loss(p, z, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(BYOLLoss(reduction=reduction)(p, z), loss)
    upstream = torch.randn_like(expected)
    (ours,) = torch.autograd.grad(loss, p, upstream)
    (theirs,) = torch.autograd.grad(expected, p, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert not byol_loss(p.detach(), z).requires_grad


def test_byol_range_and_both_directions():
    z = torch.randn(6, 4)
    torch.testing.assert_close(byol_loss(3 * z, z), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(byol_loss(-z, z), torch.tensor(4.0))
    assert 0 <= byol_loss(z, torch.randn(6, 4)) <= 4


# MoCo


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 9),
    k=st.integers(1, 20),
    d=st.integers(1, 9),
    temperature=st.sampled_from([0.07, 0.2, 1.0, -0.3]),
    normalize=st.booleans(),
)
def test_moco_is_its_formula(n, k, d, temperature, normalize):
    q, key, queue = f64(n, d), f64(n, d), f64(k, d)
    expected = explicit_moco(q, key.detach(), queue.detach(), temperature, normalize)
    loss = moco_loss(q, key, queue, temperature, normalize=normalize, reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    upstream = torch.randn_like(expected)
    ours = torch.autograd.grad(loss, (q, key, queue), upstream, allow_unused=True)
    (theirs,) = torch.autograd.grad(expected, q, upstream)
    torch.testing.assert_close(ours[0], theirs, rtol=1e-8, atol=1e-10)
    assert ours[1] is None and ours[2] is None


def test_moco_is_info_nce_where_the_queue_is_all_there_is():
    """As the official code has it: cross-entropy of [positive, queue] against class 0."""
    q, k, queue = torch.randn(64, 16), torch.randn(64, 16), torch.randn(256, 16)
    a, b, c = (F.normalize(x, dim=1) for x in (q, k, queue))
    logits = torch.cat(((a * b).sum(1, keepdim=True), a @ c.T), 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(64, dtype=torch.int64))
    for loss in (
        moco_loss(q, k, queue, 0.07),
        MoCoLoss(0.07)(q, k, queue),
        moco_loss(a, b, c, 0.07, normalize=False),
        moco_loss(q, k, queue.double(), 0.07),
    ):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    half = moco_loss(*(x.to(torch.bfloat16) for x in (q, k, queue)), 0.07)
    torch.testing.assert_close(half, expected, rtol=2e-2, atol=0)
    assert torch.equal(moco_loss(q, k, queue[:0]), torch.tensor(0.0))


def test_temperature_is_learned():
    q, k, queue = f64(7, 5), f64(7, 5, grad=False), f64(11, 5, grad=False)
    temperature = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    loss = MoCoLoss(temperature)(q, k, queue)
    (ours,) = torch.autograd.grad(loss, temperature)
    other = temperature.detach().clone().requires_grad_()
    (theirs,) = torch.autograd.grad(explicit_moco(q, k, queue, other).mean(), other)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("learned", [False, True])
def test_keys_may_be_enqueued_between_loss_and_backward(learned):
    """As MoCo's own code does, without a copy of the queue."""
    q, k, queue = f64(8, 5), f64(8, 5, grad=False), KeyQueue(20, 5).double()
    queue.enqueue(f64(20, 5))  # of unit length in float64
    temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=learned)
    needed = [q, temperature] if learned else [q]
    expected = torch.autograd.grad(explicit_moco(q, k, queue.keys.clone(), temperature).mean(), needed)
    temperature = temperature if learned else 0.2
    loss = moco_loss(unit(q), unit(k), queue.keys, temperature, normalize=False)
    queue.enqueue(k)
    for ours, theirs in zip(torch.autograd.grad(loss, needed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [1.7, 0.0, -2.0])
@pytest.mark.parametrize("learned", [False, True])
def test_lse_against_constant_columns(scale, learned):
    """The gradient that the forward pass leaves, with a bias that drops columns and a row without a pair."""
    a, b = f64(9, 4), f64(13, 4, grad=False)
    bias = torch.randn(13, dtype=torch.float64)
    bias[::4] = -torch.inf
    ids = torch.arange(13) % 3, torch.zeros(9, dtype=torch.int64)
    factor = torch.tensor(scale, dtype=torch.float64, requires_grad=learned)
    needed = [a, factor] if learned else [a]
    results = []
    for backend in ("cpu", "reference"):
        with sslfast.use_backend(backend):
            row = sslfast.similarity_lse(a, b, scale=factor, bias=bias, a_ids=ids[1], b_ids=ids[0])
            results.append((row, *torch.autograd.grad(row.sin().sum(), needed)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_gradcheck():
    torch.autograd.gradcheck(byol_loss, (f64(4, 3), f64(4, 3, grad=False)))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    arguments = f64(4, 3), f64(4, 3, grad=False), f64(6, 3, grad=False), temperature
    torch.autograd.gradcheck(lambda q, k, queue, t: moco_loss(q, k, queue, t), arguments)


def test_compile_and_autocast():
    torch._dynamo.reset()
    q, k, queue = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4), torch.randn(16, 4)

    def both(q, k, queue):
        return byol_loss(q, k) + moco_loss(q, k, queue)

    expected = both(q, k, queue)
    compiled = torch.compile(both, fullgraph=True)(q, k, queue)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (compiled, expected)))
    with torch.autocast("cpu", torch.bfloat16):
        half = both(q, k, queue)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: byol_loss(torch.zeros(3), torch.zeros(3)), ValueError, "prediction: expected shape"),
        (lambda: byol_loss(torch.zeros(3, 2), torch.zeros(3, 1)), ValueError, "target: expected shape"),
        (lambda: byol_loss(torch.zeros(3, 2), torch.zeros(3, 2), reduction="max"), ValueError, "reduction: "),
        (lambda: BYOLLoss(reduction="max"), ValueError, "reduction: "),
        (lambda: moco_loss(torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(5, 2)), ValueError, "key: "),
        (lambda: moco_loss(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2, 5)), ValueError, "queue: "),
        (lambda: moco_loss(torch.zeros(3, 2), torch.zeros(3, 2), [1, 2]), TypeError, "queue: "),
        (lambda: MoCoLoss(0.0), ValueError, "temperature: "),
        (lambda: KeyQueue(0, 3), ValueError, "size: expected a whole number"),
        (lambda: KeyQueue(3, 2.5), ValueError, "dim: expected a whole number"),
        (lambda: KeyQueue(3, 2).enqueue(torch.zeros(4, 3)), ValueError, "keys: expected shape"),
        (lambda: KeyQueue(3, 2).enqueue(torch.zeros(4, 2, dtype=torch.int64)), TypeError, "keys: expected"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The queue


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 13), batches=st.lists(st.integers(0, 30), max_size=8), normalize=st.booleans())
def test_the_queue_holds_the_last_keys(size, batches, normalize):
    """Whatever the batches: no key is dropped at the wrap-around, and the pointer is at the oldest."""
    queue = KeyQueue(size, 3, normalize=normalize)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(size))
    rows, pointer = [x.clone() for x in queue.keys], 0
    for batch in batches:
        keys = torch.randn(batch, 3)
        queue.enqueue(keys)
        for key in F.normalize(keys, dim=1) if normalize else keys:  # one by one, as in a ring buffer
            rows[pointer] = key
            pointer = (pointer + 1) % size
    torch.testing.assert_close(queue.keys, torch.stack(rows))
    assert queue.pointer.item() == pointer and queue.pointer.dim() == 0


def test_a_queue_is_saved_and_takes_other_dtypes():
    queue, other = KeyQueue(5, 3), KeyQueue(5, 3)
    queue.enqueue(torch.randn(7, 3, dtype=torch.float64, requires_grad=True))
    assert not queue.keys.requires_grad and queue.state_dict().keys() == {"keys", "pointer"}
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(torch.ones(2, 3, dtype=torch.bfloat16))
    assert torch.equal(queue.keys, other.keys) and torch.equal(queue.pointer, other.pointer)
    assert not KeyQueue(5, 3, normalize=False).normalize and "size=5, dim=3" in repr(queue)
