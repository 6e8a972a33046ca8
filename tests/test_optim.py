"""LARS in both published forms, parameter groups, schedules, and optimizer states that are loaded again."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sslfast.train import optim


@pytest.mark.parametrize("lr_in_momentum", [True, False])
@pytest.mark.parametrize("tensor_rate", [True, False])
def test_lars_follows_the_formula(lr_in_momentum, tensor_rate):
    torch.manual_seed(1)
    weights = [torch.randn(5, 3).double().requires_grad_(), torch.randn(2, 4, 3).double().requires_grad_()]
    bias = torch.randn(5).double().requires_grad_()
    unused = torch.ones(3, requires_grad=True)
    groups = [
        {"params": [*weights, unused], "weight_decay": 0.01, "trust": True},
        {"params": [bias], "weight_decay": 0.0, "trust": False},
    ]
    lars = optim.LARS(groups, lr=0.5, eta=0.02, lr_in_momentum=lr_in_momentum)
    expected = [p.detach().clone() for p in (*weights, bias)]
    momenta = [torch.zeros_like(p) for p in expected]
    for rate in (0.5, 0.2, 0.9):  # the forms differ when the rate changes
        for group in lars.param_groups:
            group["lr"] = torch.tensor(rate, dtype=torch.float64) if tensor_rate else rate
        for i, p in enumerate((*weights, bias)):
            p.grad = torch.randn_like(p)
            u = p.grad + (0.01 if i < 2 else 0) * expected[i]
            trust = 0.02 * expected[i].norm() / u.norm() if i < 2 else 1.0
            if lr_in_momentum:
                momenta[i] = 0.9 * momenta[i] + rate * trust * u
                expected[i] = expected[i] - momenta[i]
            else:
                momenta[i] = 0.9 * momenta[i] + trust * u
                expected[i] = expected[i] - rate * momenta[i]
        lars.step()
        for p, value in zip((*weights, bias), expected, strict=True):
            torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)
    assert (unused == 1).all() and unused not in lars.state


@pytest.mark.parametrize("p, grad, moved", [(0.0, 1.0, -0.1), (2.0, 0.0, 0.0)])
def test_lars_trust_ratio_is_1_where_a_norm_is_0(p, grad, moved):
    weight = torch.full((2, 2), p, requires_grad=True)
    weight.grad = torch.full((2, 2), grad)
    optim.LARS([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), p + moved))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "eta"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_lars_refuses_bad_options(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        optim.LARS([torch.ones(2, requires_grad=True)], **{"lr": 0.1, name: value})


def test_lars_evaluates_a_closure():
    weight = torch.ones(2, 2, requires_grad=True)
    lars = optim.LARS([weight], lr=0.1, trust=False)

    def closure():
        lars.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert lars.step(closure) == 4 and (weight < 1).all()


def test_parameter_groups_spare_biases_and_norms():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module[1].bias.requires_grad_(False)
    decayed, spared = optim.parameter_groups(module, 0.1)
    assert [p.shape for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.1
    assert len(spared["params"]) == 2 and spared["weight_decay"] == 0 and not spared["trust"]
    assert len(optim.parameter_groups(torch.nn.Linear(2, 2, bias=False), 0.1)) == 1


def test_warmup_cosine():
    factors = [optim.warmup_cosine(step, 10, 110) for step in range(110)]
    assert factors[0] == 0 and factors[1] == pytest.approx(0.1) and factors[10] == 1
    assert factors[60] == pytest.approx(0.5)
    assert factors[109] == pytest.approx(0.5 * (1 - math.cos(math.pi / 100)))
    assert all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert all(a > b for a, b in zip(factors[10:-1], factors[11:], strict=True))


def two_layers() -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    return module.to(memory_format=torch.channels_last)


def steps(module, optimizer, inputs) -> None:
    for x in inputs:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("name", optim.NAMES)
def test_a_loaded_state_goes_on_bitwise(name):
    """Its tensors come back contiguous, while channels-last weights want them in another order."""
    torch.manual_seed(3)
    inputs = torch.randn(6, 2, 3, 8, 8)
    whole, first, second = two_layers(), two_layers(), two_layers()
    build = [
        optim.build(name, optim.parameter_groups(m, 0.1), torch.device("cpu")) for m in (whole, first, second)
    ]
    for optimizer in build:
        optim.set_rate(optimizer, 0.05)
    steps(whole, build[0], inputs)
    steps(first, build[1], inputs[:3])
    state = build[1].state_dict()
    for values in state["state"].values():
        values.update({k: v.contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)})
    second.load_state_dict(first.state_dict())
    optim.load_state(build[2], state)
    steps(second, build[2], inputs[3:])
    for ours, theirs in zip(second.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert all(group["lr"].ndim == 0 and float(group["lr"]) == 0.05 for group in build[2].param_groups)


def test_a_group_may_scale_the_rate():
    weights = [torch.ones(2, requires_grad=True) for _ in range(2)]
    optimizer = optim.build("sgd", [{"params": [weights[0]]}, {"params": [weights[1]], "lr_scale": 0.5}],
                            torch.device("cpu"))  # fmt: skip
    optim.set_rate(optimizer, 0.2)
    for w in weights:
        w.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(weights[0].detach(), torch.full((2,), 0.8))
    torch.testing.assert_close(weights[1].detach(), torch.full((2,), 0.9))


def test_unknown_optimizers_are_refused():
    with pytest.raises(ValueError, match="optimizer: expected one of adamw, sgd, lars"):
        optim.build("adam", [{"params": [torch.ones(2, requires_grad=True)]}], torch.device("cpu"))


@pytest.mark.parametrize("lr_in_momentum", [True, False])
def test_lars_reads_nothing_from_the_device(lr_in_momentum):
    """A fake tensor has no numbers: reading one raises."""
    with FakeTensorMode():
        weight, bias = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
        groups = [{"params": [weight], "trust": True}, {"params": [bias], "trust": False}]
        lars = optim.LARS(groups, lr=torch.ones(()), lr_in_momentum=lr_in_momentum)
        for _ in range(2):
            weight.grad, bias.grad = torch.ones(3, 2), torch.ones(3)
            lars.step()
