"""ema_update_ beyond the cases of tests/test_backends.py: exact ends, PyTorch's own, tables, errors."""

import copy
import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sslfast
from sslfast import ema_update_
from sslfast.ops import _backend, ema

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
PAIRS = list(itertools.product(DTYPES, DTYPES))


def lists(shapes, dtype=torch.float32, source=None):
    return [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).to(source or dtype) for s in shapes]


# Numbers


@pytest.mark.parametrize("target, source", PAIRS, ids=str)
def test_both_ends_are_exact(target, source, isa):
    """Momentum 0 is a conversion, rounded as PyTorch rounds; momentum 1 changes no bit. All of 16 bits."""
    if source.itemsize == 2:
        s = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)
    else:
        bits = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32)
        s = bits.view(torch.float32).to(source)  # every exponent, infinities and NaN among them
        ties = torch.arange(-(2**15), 2**15, dtype=torch.int32) * 2**16
        s = torch.cat((s, *((ties + k * 2**8).view(torch.float32).to(source) for k in range(0, 256, 16))))
    t = torch.randn(s.shape).to(target)
    ema_update_(updated := [t.clone()], [s], 0.0)
    work = torch.float64 if torch.float64 in (target, source) else torch.float32
    expected = torch.lerp(t.to(work), s.to(work), 1.0)  # s, and NaN for an infinity
    assert torch.equal(expected[s.isfinite()], s.to(work)[s.isfinite()])
    expected = (expected.float() if target.itemsize == 2 else expected).to(target)
    assert torch.equal(updated[0].isnan(), expected.isnan())
    assert torch.equal(updated[0].nan_to_num(1.5), expected.nan_to_num(1.5))
    ema_update_(updated := [t.clone()], [s.nan_to_num(0.0, 0.0, 0.0)], 1.0)
    assert torch.equal(updated[0], t)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=4).map(tuple), min_size=1, max_size=12),
    kinds=st.sampled_from(PAIRS),
    momentum=st.floats(0, 1),
)
def test_random_shapes_against_torch(shapes, kinds, momentum):
    (target, source), work = kinds, torch.float64 if torch.float64 in kinds else torch.float32
    targets, sources = lists(shapes, target, source)
    pairs = zip(targets, sources, strict=True)
    expected = [torch.lerp(t.to(work), s.to(work), 1 - momentum).to(target) for t, s in pairs]
    ema_update_(targets, sources, momentum)
    for ours, theirs in zip(targets, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(target).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [((64,),) * 3000, ((3_000_017,),)], ids=["thousands of tiny", "one huge"])
def test_against_swa_utils_and_foreach(shapes, dtype):
    from torch.optim.swa_utils import get_ema_multi_avg_fn

    targets, sources = lists(shapes, dtype)
    averaged, lerped = [t.clone() for t in targets], [t.clone() for t in targets]
    for _ in range(3):
        ema_update_(targets, sources, 0.99)
        get_ema_multi_avg_fn(0.99)(averaged, sources, 0)
        torch._foreach_lerp_(lerped, sources, 0.01)
    for theirs in (averaged, lerped):
        error = max(
            (a.double() - b.double()).abs().max().item() for a, b in zip(targets, theirs, strict=True)
        )
        assert error <= 8 * torch.finfo(dtype).eps


def test_small_steps_are_not_lost_in_float32_targets_of_16_bit_sources():
    target, source = [torch.ones(1000)], [torch.full((1000,), 1.0078125, dtype=torch.bfloat16)]
    for _ in range(100):
        ema_update_(target, source, 0.999)
    torch.testing.assert_close(
        target[0], torch.full((1000,), 1 + 0.0078125 * (1 - 0.999**100)), rtol=1e-6, atol=0
    )


def test_a_float64_momentum_tensor_keeps_its_digits():
    t, s = torch.zeros(10, dtype=torch.float64), torch.ones(10, dtype=torch.float64)
    ema_update_([t], [s], torch.tensor(1 - 1e-12, dtype=torch.float64))
    torch.testing.assert_close(t, torch.full((10,), 1e-12, dtype=torch.float64), rtol=1e-4, atol=0)


def test_threads_change_no_bit(set_threads):
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        torch.manual_seed(1)
        targets, sources = lists(((100_003,), (5,), (40_000,)))
        ema_update_(targets, sources, 0.97)
        results.append(targets)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


# In place


def test_updates_in_place_and_tells_autograd():
    t = torch.randn(3)
    x = torch.randn(3, requires_grad=True)
    at, product = t.data_ptr(), x * t
    assert ema_update_([t], [torch.randn(3)], 0.5) is None
    assert t.data_ptr() == at
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_parameters_and_iterators_and_inference_mode():
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    expected = [0.5 * p.detach() + 0.5 * q.detach() for p, q in pairs]
    ema_update_(model.parameters(), other.parameters(), 0.5)
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e)
        assert p.requires_grad and p.grad_fn is None
    with torch.inference_mode():
        t = torch.zeros(3)
        ema_update_([t], [torch.ones(3)], 0.75)
        assert torch.equal(t, torch.full((3,), 0.25))


def test_nothing_to_do():
    ema_update_([], [], 0.5)
    ema_update_([torch.empty(0)], [torch.empty(0)], 0.5)


# What is kept from call to call


def test_the_table_is_made_once_and_again_when_memory_changes(plans):
    targets, sources = lists(((5,), (7,), (3, 2)))
    for _ in range(3):
        ema_update_(targets, sources, 0.5)
    assert len(plans) == 1
    sources[1].data = torch.full((7,), 5.0)
    ema_update_(targets, sources, 0.0)
    assert len(plans) == 2 and torch.equal(targets[1], torch.full((7,), 5.0))
    targets[0] = torch.zeros(5)
    ema_update_(targets, sources, 0.0)
    assert len(plans) == 3 and torch.equal(targets[0], sources[0])
    sources[2] = torch.ones(4)
    with pytest.raises(ValueError, match=r"sources\[2\]: expected shape \[3, 2\], got \[4\]"):
        ema_update_(targets, sources, 0.0)
    sources[2] = torch.ones(3, 2)
    sources[1].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"sources\[1\]: a kernel needs a tensor with memory"):
        ema_update_(targets, sources, 0.0)


def test_a_tensor_that_changed_in_place_is_looked_at_again(plans):
    """The same object, at the same address."""
    for change in (
        lambda x: x.resize_(10),
        lambda x: x.transpose_(0, 1),
        lambda x: setattr(x, "data", x.data[:3]),
        lambda x: setattr(x, "data", x.data.view(torch.int32)[:, :5].view(torch.float32)),
        lambda x: (x.untyped_storage().resize_(0), x.resize_(25)),
    ):
        pairs = [torch.randn(10, 10) for _ in range(2)]
        ema_update_(pairs[:1], pairs[1:], 0.5)
        made = len(plans)
        for x in pairs:
            change(x)
            x.copy_(torch.randn(x.shape))
        expected = [x.clone() for x in pairs]
        ema.reference(expected[:1], expected[1:], 0.25)
        ema_update_(pairs[:1], pairs[1:], 0.25)
        torch.testing.assert_close(pairs[0], expected[0])
        assert len(plans) == made + 1
    one, other = torch.randn(4, 5), torch.randn(4, 5)
    ema_update_([one], [other], 0.5)
    other.transpose_(0, 1)
    with pytest.raises(ValueError, match=r"sources\[0\]: expected shape \[4, 5\], got \[5, 4\]"):
        ema_update_([one], [other], 0.5)


def test_without_dlpack_s_exchange_functions_it_is_the_same(plans, monkeypatch):
    """torch before 2.10."""
    monkeypatch.setattr(_backend, "_EXCHANGE", None)
    targets, sources = lists(((5,), (7,)))
    for _ in range(3):
        ema_update_(targets, sources, 0.5)
    targets[0].resize_(2), sources[0].resize_(2)
    ema_update_(targets, sources, 0.5)
    assert len(plans) == 2


def test_tensors_with_gaps_are_checked_once_too(plans):
    targets, sources = [torch.zeros(6, 2)[:, 0], torch.zeros(3)], [torch.ones(6), torch.ones(3)]
    for _ in range(3):
        ema_update_(targets, sources, 0.5)
    assert len(plans) == 1 and all((t == 0.875).all() for t in targets)


def test_nothing_is_kept_of_tensors_that_are_gone():
    before = set(ema._kept)
    targets, sources = lists(((5,), (7,)))
    ema_update_(targets, sources, 0.5)
    assert len(set(ema._kept) - before) == 1
    del targets[1]
    gc.collect()
    assert set(ema._kept) <= before


# Refused


@pytest.mark.parametrize(
    "targets, sources, error, message",
    [
        (torch.zeros(3), [torch.zeros(3)], TypeError, "targets: expected a list of tensors, got Tensor"),
        ([torch.zeros(3)], 5, TypeError, "sources: expected a list of tensors, got int"),
        ([torch.zeros(3)], [], ValueError, "sources: expected 1 tensors, as many as targets, got 0"),
        ([torch.zeros(3)], [None], TypeError, r"sources\[0\]: expected a tensor, got NoneType"),
        ([torch.zeros(3)], [torch.zeros(3, dtype=torch.int64)], TypeError, r"sources\[0\]: .*int64"),
        ([torch.zeros(3, dtype=torch.complex64)], [torch.zeros(3)], TypeError, r"targets\[0\]: .*complex64"),
        ([torch.zeros(3)], [torch.zeros(1)], ValueError, r"sources\[0\]: expected shape \[3\], got \[1\]"),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], ValueError, r"sources\[0\]: .*meta device"),
        ([torch.zeros(3).to_sparse()], [torch.zeros(3)], TypeError, r"targets\[0\]: .*torch.sparse_coo"),
        ([torch.zeros(1).expand(3)], [torch.zeros(3)], ValueError, r"targets\[0\]: .*expanded"),
    ],
)  # fmt: skip
def test_what_cannot_be_averaged_is_named(targets, sources, error, message):
    with pytest.raises(error, match=message):
        ema_update_(targets, sources, 0.5)


@pytest.mark.parametrize(
    "momentum", [-0.1, 1.1, float("nan"), float("inf"), torch.tensor(1.5), torch.tensor(-1.0)]
)
def test_momentum_outside_of_its_range(momentum):
    with pytest.raises(ValueError, match="momentum: expected"):
        ema_update_([torch.zeros(3)], [torch.zeros(3)], momentum)


@pytest.mark.parametrize("momentum", ["0.5", None, True, torch.tensor([0.5]), torch.tensor(1)])
def test_momentum_of_another_type(momentum):
    with pytest.raises((TypeError, ValueError), match="momentum: expected a number or a 0-d"):
        ema_update_([torch.zeros(3)], [torch.zeros(3)], momentum)


def test_shared_memory_is_refused():
    x, y = torch.zeros(10), torch.zeros(10)
    for targets, sources, message in (
        ([x], [x], r"sources\[0\]: expected memory of its own, got the target's"),
        (
            [x[:6], y[:6]],
            [y[4:], torch.zeros(6)],
            r"sources\[0\]: expected memory of its own, got some of targets\[1\]",
        ),
        ([x[:6], x[4:]], [y[:6], y[4:]], r"targets\[1\]: expected memory of its own"),
        ([x, x], [y, y], r"targets\[1\]: expected memory of its own"),
        ([x[:6]], [x[4:]], r"sources\[0\]: expected memory of its own, got some of targets\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ema_update_(targets, sources, 0.5)
    ema_update_([x[:5], x[5:]], [y[:5], y[:5]], 0.5)  # neighbours, and one source for two targets


def test_an_expanded_source_is_read_as_it_is():
    t = torch.zeros(4, 3)
    ema_update_([t], [torch.arange(3.0).expand(4, 3)], 0.5)
    assert torch.equal(t, torch.arange(3.0).expand(4, 3) / 2)
    ema_update_([t], [torch.ones(3, dtype=torch.complex64).conj().imag.expand(4, 3)], 0.5)  # lazily negated
    assert torch.equal(t, torch.arange(3.0).expand(4, 3) / 4)


def test_a_forced_backend_serves_or_raises():
    targets, sources = lists(((5,),))
    with (
        sslfast.use_backend("cuda"),
        pytest.raises(RuntimeError, match="ema_update_: backend 'cuda' cannot serve"),
    ):
        ema_update_(targets, sources, 0.5)
    expected = 0.5 * targets[0] + 0.5 * sources[0]
    with sslfast.use_backend("reference"):
        ema_update_(targets, sources, 0.5)
    torch.testing.assert_close(targets[0], expected)


# Compilers


def test_compile_and_opcheck():
    torch._dynamo.reset()

    def step(t, s, momentum):
        ema_update_([t, t.new_zeros(0)], [s, s.new_zeros(0)], momentum)
        return t * 2

    t, s = torch.randn(5), torch.randn(5)
    for momentum in (0.75, torch.tensor(0.25)):
        expected = copy.deepcopy(t)
        ema_update_([expected], [s], momentum)
        doubled = torch.compile(step, fullgraph=True)(t, s, momentum)
        torch.testing.assert_close(t, expected)
        torch.testing.assert_close(doubled, 2 * expected)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):  # tensors: a schedule does not compile anew
        for momentum in torch.linspace(0.9, 1, 5, dtype=torch.float64):
            expected = copy.deepcopy(t)
            ema_update_([expected], [s], momentum)
            compiled(t, s, momentum)
            torch.testing.assert_close(t, expected)
    op = torch.ops.sslfast.ema_update_.default
    torch.library.opcheck(
        op, ([torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], 0.5, None)
    )
