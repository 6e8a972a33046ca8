"""sslfast.interop.lightly's contrastive losses beside the installed ones: values, gradients, memory bank."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from interop_lightly import ALL, DOUBLE, OF_PAIRS, ours, pair, peer, peer_dcl, peer_utils, rows
from interop_processes import squared_distance
from originals import assert_like_original, assert_signature, evaluate
from torch import Tensor, nn

# Interface


@pytest.mark.parametrize("name", ALL)
def test_signatures(name):
    mine, its = getattr(ours, name), getattr(peer, name)
    assert_signature(mine, its)
    assert_signature(mine.forward, its.forward)


def test_signatures_of_functions_and_parts():
    assert_signature(ours.negative_mises_fisher_weights, peer_dcl.negative_mises_fisher_weights)
    assert_signature(ours.update_momentum, peer_utils.update_momentum)
    assert_signature(ours.DINOLoss.update_center, peer.DINOLoss.update_center)
    mine, its = (loss.memory_bank for loss in pair("NTXentLoss"))
    assert type(mine).__name__ == type(its).__name__
    assert_signature(type(mine), type(its))
    assert_signature(mine.forward, its.forward)


def public(module: nn.Module) -> dict:
    names = set(dir(module)) - set(dir(nn.Module()))
    return {name: getattr(module, name) for name in sorted(names) if not name.startswith("_")}


def assert_same_attributes(mine: nn.Module, its: nn.Module) -> None:
    found = public(mine)
    for name, value in public(its).items():
        assert name in found, name
        x = found[name]
        if isinstance(value, nn.Module):
            assert type(x).__name__ == type(value).__name__, name
            assert_same_attributes(x, value)
        elif isinstance(value, Tensor):
            assert x.shape == value.shape and x.dtype == value.dtype, name
        elif isinstance(value, functools.partial):
            assert x.keywords == value.keywords and x.func.__name__ == value.func.__name__, name
        elif callable(value):
            assert_signature(x, value)
        else:
            assert x == value and type(x) is type(value), name
    assert mine.state_dict().keys() == its.state_dict().keys()
    assert [k for k, _ in mine.named_buffers()] == [k for k, _ in its.named_buffers()]
    assert list(mine.parameters()) == list(its.parameters()) == []


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in ALL),
        ("NTXentLoss", {"temperature": -0.5, "memory_bank_size": [6, 3], "gather_distributed": True}),
        ("NTXentLoss", {"memory_bank_size": (0, 3)}),
        ("NTXentLoss", {"memory_bank_size": (0,)}),
        ("NTXentLoss", {"memory_bank_size": torch.Size((6, 3))}),
        ("DCLLoss", {"temperature": 0.3, "weight_fn": squared_distance, "gather_distributed": True}),
        ("DCLWLoss", {"temperature": 0.3, "sigma": 2.0}),
        ("DINOLoss", {"output_dim": 8, "warmup_teacher_temp_epochs": 3, "center_mode": "mean"}),
    ],
)
def test_attributes_and_buffers(name, options):
    assert_same_attributes(*pair(name, **options))


def test_one_seed_draws_one_bank():
    banks = []
    for module in (ours, peer):
        torch.manual_seed(4)
        banks.append(module.NTXentLoss(memory_bank_size=(50, 6)).memory_bank)
        banks.append(torch.rand(1))  # and as many numbers
    assert torch.equal(banks[0].bank, banks[2].bank) and torch.equal(banks[1], banks[3])
    torch.testing.assert_close(banks[0].bank.norm(dim=1), torch.ones(50))
    assert banks[0].bank_ptr.tolist() == [0]


@pytest.mark.parametrize("name", ALL)
def test_copies(name):
    """A copied or pickled loss goes on as the first one would, and apart from it."""
    options = {"memory_bank_size": (7, 4)} if name == "NTXentLoss" else {}
    options = {"weight_fn": squared_distance} if name == "DCLLoss" else options
    loss = getattr(ours, name)(**options) if name != "DINOLoss" else ours.DINOLoss(4)
    views = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
    given = (views, views) if name == "DINOLoss" else views
    loss(*given)
    copies = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    for other in copies:
        for x, y in zip(other.buffers(), loss.buffers(), strict=True):
            assert torch.equal(x, y) and (x.data_ptr() != y.data_ptr() or x.numel() == 0)
    values = [x(*given) for x in (loss, *copies)]
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])
    for other in copies:
        assert all(torch.equal(x, y) for x, y in zip(other.buffers(), loss.buffers(), strict=True))


# Values and gradients of NT-Xent, DCL and DCLW


@OF_PAIRS
@pytest.mark.parametrize(
    "n, d, temperature",
    [
        *((n, d, t) for n, d in ((1, 8), (2, 3), (33, 7), (200, 64)) for t in (0.5, 5, -0.5)),
        *((n, d, 0.05) for n, d in ((1, 8), (33, 7), (200, 64))),
    ],
)
def test_values_and_gradients(name, n, d, temperature):
    assert_like_original(*pair(name, temperature), rows(n, d))


@OF_PAIRS
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_views_alike(name, temperature):
    leaves = rows(33, 7)
    leaves["out1"] = leaves["out0"] + 0.3 * leaves["out1"]
    assert_like_original(*pair(name, temperature), leaves)


@OF_PAIRS
@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_one_feature(name, n, dtype):
    """Its sign is all that is left of it, and what remains of its gradient is rounding."""
    leaves = {k: (x + x.sign()).to(dtype) for k, x in rows(n, 1).items()}
    (value, found), (expected, _) = (evaluate(loss, leaves) for loss in pair(name))
    torch.testing.assert_close(value, expected)
    for slope in found.values():
        assert slope.isfinite().all() and slope.abs().max() <= 100 * torch.finfo(dtype).eps


def scaled(loss, sizes: Tensor):
    """Rows multiplied by sizes, other ones in the other view."""

    def call(out0, out1):
        return loss(out0 * sizes.to(out0.dtype)[:, None], out1 * sizes.flip(0).to(out0.dtype)[:, None])

    return call


@OF_PAIRS
@pytest.mark.parametrize(
    "sizes",
    [torch.logspace(-15, 15, 12), torch.logspace(-13, -11, 12), torch.arange(12) % 4, torch.full((12,), 1e3)],
    ids=["all", "around eps", "zero rows", "large"],
)
def test_rows_of_any_norm(name, sizes):
    """Rows shorter than 1e-12 stay shorter than 1; a zero row has no direction."""
    mine, its = pair(name, 0.5)
    assert_like_original(scaled(mine, sizes.double()), scaled(its, sizes.double()), rows(12, 6))


@OF_PAIRS
def test_gradient_of_a_zero_row(name):
    leaves = rows(6, 4)
    leaves["out0"][2], leaves["out1"][4] = 0, 0
    assert_like_original(*pair(name, 0.5), leaves)
    assert_like_original(*pair(name, 0.5), {k: 0 * x for k, x in leaves.items()})


@OF_PAIRS
def test_upstream_strides_and_one_tensor_for_both(name):
    mine, its = pair(name, 0.3)

    def call(loss):
        return lambda x, y: -1.7 * loss(x.T, y[:, ::2]) + loss(x.T, x.T)

    assert_like_original(call(mine), call(its), {"x": rows(6, 20, "x")["x"], "y": rows(20, 12, "y")["y"]})


@OF_PAIRS
def test_without_gradients(name):
    given = rows(12, 4)
    mine, its = pair(name)
    assert not mine(**given).requires_grad
    torch.testing.assert_close(mine(**given), its(**given))
    for wanted in given:
        slopes = []
        for loss in (mine, its):
            x = given[wanted].clone().requires_grad_()
            slopes.append(torch.autograd.grad(loss(**{**given, wanted: x}), x)[0])
        torch.testing.assert_close(*slopes)


@OF_PAIRS
def test_gathering_without_a_group(name):
    assert_like_original(*pair(name, gather_distributed=True), rows(9, 4))


@OF_PAIRS
def test_temperature_set_later(name):
    both = pair(name)
    for loss in both:
        loss.temperature = 0.25
    assert_like_original(*both, rows(9, 4))


# NT-Xent's memory bank

BATCHES = [
    (8, (3, 3, 3, 3)),  # the third has a row too many
    (8, (4, 4, 4)),
    (8, (8, 8)),
    (8, (11, 2, 3)),
    (8, (3, 13, 2)),
    (1, (1, 1)),
    (40, (33, 7, 5)),
    (300, (200, 64, 50)),
]
EACH_BATCHES = pytest.mark.parametrize("size, batches", BATCHES)


@EACH_BATCHES
@pytest.mark.parametrize("temperature", [0.3, -0.5])
def test_bank_values_and_gradients_of_several_calls(size, batches, temperature):
    """One backward after all forwards, each with a weight of its own."""
    bank = pair("NTXentLoss", memory_bank_size=(size, 6))[1].memory_bank.bank.double()
    leaves = {f"{k}_{i}": x for i, n in enumerate(batches) for k, x in rows(n, 6).items()}

    def call(module):
        def losses(**given):
            loss = module.NTXentLoss(temperature, [size, 6]).to(given["out0_0"].dtype)
            loss.memory_bank.bank.copy_(bank)
            return sum((i + 1) * loss(given[f"out0_{i}"], given[f"out1_{i}"]) for i in range(len(batches)))

        return losses

    assert_like_original(call(ours), call(peer), leaves)


@EACH_BATCHES
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_bank_after_each_call(size, batches, dtype):
    mine, its = (loss.to(dtype) for loss in pair("NTXentLoss", memory_bank_size=(size, 6)))
    kept = mine.memory_bank.bank
    for n in batches:
        given = {k: x.to(dtype).requires_grad_() for k, x in rows(n, 6).items()}
        torch.testing.assert_close(mine(**given), its(**given))
        assert torch.equal(mine.memory_bank.bank_ptr, its.memory_bank.bank_ptr)
        off = (mine.memory_bank.bank - its.memory_bank.bank).abs().max()
        assert off <= 2 * torch.finfo(dtype).eps
        assert not mine.memory_bank.bank.requires_grad
    assert mine.memory_bank.bank is kept


@pytest.mark.parametrize(
    "first, second, no_grad, moves",
    [
        (True, True, False, True),
        (True, False, False, True),
        (False, True, False, False),
        (False, False, False, False),
        (True, True, True, False),
    ],
)
def test_the_bank_takes_rows_where_out0_requires_a_gradient(first, second, no_grad, moves):
    both = pair("NTXentLoss", memory_bank_size=(8, 6))
    out0, out1 = torch.randn(3, 6, requires_grad=first), torch.randn(3, 6, requires_grad=second)
    before = both[0].memory_bank.bank.clone()
    with torch.set_grad_enabled(not no_grad):
        torch.testing.assert_close(*(loss(out0, out1) for loss in both))
    for loss in both:
        bank = loss.memory_bank
        assert torch.equal(bank.bank, before) != moves
        assert bank.bank_ptr.tolist() == [3 * moves]
        torch.testing.assert_close(bank.bank, both[1].memory_bank.bank)


def test_bank_in_evaluation_mode():
    """Nothing depends on it."""
    both = [loss.eval() for loss in pair("NTXentLoss", memory_bank_size=(8, 6))]
    given = {k: x.float().requires_grad_() for k, x in rows(3, 6).items()}
    torch.testing.assert_close(*(loss(**given) for loss in both))
    torch.testing.assert_close(*(loss.memory_bank.bank for loss in both))
    assert both[0].memory_bank.bank_ptr.tolist() == [3]


def test_bank_by_itself():
    x = torch.randn(3, 6, requires_grad=True)
    for update in (False, True):
        mine, its = (loss.memory_bank for loss in pair("NTXentLoss", memory_bank_size=(4, 6)))
        for _ in range(2):
            found, expected = (bank(x, update=update) for bank in (mine, its))
            assert found[0] is x and torch.equal(found[1], expected[1])
            assert torch.equal(mine.bank, its.bank) and torch.equal(mine.bank_ptr, its.bank_ptr)
    assert pair("NTXentLoss")[0].memory_bank(x, update=True) == (x, None)


# Weights of DCL


def test_weight_function_sees_normalised_rows_in_both_orders():
    given, seen = rows(9, 4), ([], [])
    for loss, calls in zip(pair("DCLLoss"), seen, strict=True):
        loss.weight_fn = lambda out0, out1, calls=calls: (
            calls.append((out0, out1)) or squared_distance(out0, out1)
        )
        loss(**given)
    first, second = seen[0]
    unit0, unit1 = (nn.functional.normalize(x) for x in given.values())
    for found, expected in ((first, (unit0, unit1)), (second, (unit1, unit0)), *zip(*seen, strict=True)):
        torch.testing.assert_close(found, expected)


WEIGHTS = {
    "squared distance": squared_distance,
    "asymmetric": lambda out0, out1: out0[:, 0].exp(),
    "constant": lambda out0, out1: torch.linspace(0, 2, len(out0), dtype=out0.dtype),
    "zero": lambda out0, out1: torch.zeros_like(out0[:, 0]),
}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("n", [1, 2, 33])
def test_weight_function_with_and_without_a_gradient(weights, n):
    assert_like_original(*pair("DCLLoss", 0.2, WEIGHTS[weights]), rows(n, 5))


def test_weights_that_learn():
    """A module is registered, and gets gradients from both orders."""

    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.7, dtype=DOUBLE))

        def forward(self, out0, out1):
            return self.factor * out0[:, 0].square() + squared_distance(out0, out1)

    given, slopes = rows(9, 4), []
    for module in (ours, peer):
        loss = module.DCLLoss(weight_fn=Learned())
        assert [*loss.state_dict()] == ["weight_fn.factor"]
        slopes.append(torch.autograd.grad(loss(**given), list(loss.parameters())))
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 3.0, -1.0])
@pytest.mark.parametrize("n", [2, 33])
def test_sigma(sigma, n):
    assert_like_original(*pair("DCLWLoss", 0.2, sigma), rows(n, 5))


@pytest.mark.parametrize("n, d", [(1, 4), (2, 1), (33, 7)])
@pytest.mark.parametrize("options", [{}, {"sigma": 0.1}, {"sigma": 4.0}])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_mises_fisher_weights(n, d, options, dtype):
    given = {k: x.to(dtype).requires_grad_() for k, x in rows(n, d).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ours.negative_mises_fisher_weights(**given, **options)
    with pytest.warns(UserWarning):
        expected = peer_dcl.negative_mises_fisher_weights(**given, **options)
    eps = 200 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps * n)
    assert not found.requires_grad
