"""timm's ModelEmaV3 and torch's AveragedModel beside the installed originals."""

import copy
import inspect
import pickle

import plain_interop
import pytest
import torch
from originals import assert_signature, original
from plain_interop import Complex, Odd, Tied, train
from torch import nn
from torch.optim import swa_utils

from sslfast.interop import torch as ours

DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16


MODELS = {
    "batchnorm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
    "odd": Odd,
    "complex": Complex,
    "linear": lambda: nn.Sequential(nn.Linear(130, 17), nn.Linear(17, 3, bias=False)),
}
EACH_MODEL = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
OPTIONS = {
    "default": {},
    "decay": {"decay": 0.9},
    "0": {"decay": 0.0},
    "1": {"decay": 1.0},
    "warmup": {"use_warmup": True, "decay": 0.95, "warmup_gamma": 2.0, "warmup_power": 0.75},
    "min": {"use_warmup": True, "min_decay": 0.5},
    "later": {"decay": 0.8, "update_after_step": 3},
    "buffers": {"decay": 0.9, "exclude_buffers": True},
    "buffers, each": {"decay": 0.9, "exclude_buffers": True, "foreach": False},
    "each": {"decay": 0.9, "foreach": False},
    "device": {"decay": 0.9, "device": torch.device("cpu")},
    "device's name": {"decay": 0.9, "device": "cpu"},
    "no rounding": {"decay": 0.9, "stochastic_rounding": False, "stochastic_rounding_seed": 3},
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture
def kinds():
    """(ours, timm's)"""
    theirs = original("timm.utils").ModelEmaV3
    from sslfast.interop.timm import ModelEmaV3

    return ModelEmaV3, theirs


def tensors(module):
    """All of its state, with the buffers that are not saved."""
    return {**dict(module.named_buffers()), **module.state_dict()}


def same(mine, its, bitwise=False):
    """Equal but for two roundings; integers, and with `bitwise` all, to the bit."""
    mine, its = tensors(mine), tensors(its)
    assert list(mine) == list(its)
    for name, value in its.items():
        eps = torch.finfo(value.dtype).eps if value.is_floating_point() or value.is_complex() else 0
        eps = 0 if bitwise else eps
        torch.testing.assert_close(
            mine[name], value, rtol=2 * eps, atol=eps, msg=lambda text, name=name: f"{name}: {text}"
        )


# timm


def test_timm_class_and_signatures(kinds):
    mine, its = kinds
    assert issubclass(mine, its) and mine is not its and mine.__name__ == "ModelEmaV3"
    for name in ("__init__", "update", "set", "get_decay", "forward"):
        assert_signature(getattr(mine, name), getattr(its, name))
        assert (
            inspect.signature(getattr(mine, name)).parameters.keys()
            == inspect.signature(getattr(its, name)).parameters.keys()
        )
    made = [kind(nn.Linear(2, 2)) for kind in kinds]
    assert vars(made[1]).keys() <= vars(made[0]).keys()
    for name in inspect.signature(its.__init__).parameters:
        if name not in ("self", "model"):
            assert getattr(made[0], name) == getattr(made[1], name)
    assert list(made[0].state_dict()) == list(made[1].state_dict())


@EACH_MODEL
@EACH_OPTION
def test_timm_options(kinds, model, options):
    model = model()
    mine, its = (kind(model, **options) for kind in kinds)
    for step in (None, 0, 1, 2, 4, 5, 6, 50, None):
        train(model)
        before = copy.deepcopy(tensors(model))
        assert mine.update(model, step) is None
        its.update(model, step=step)
        same(mine, its)
        assert all(torch.equal(x, before[name]) for name, x in tensors(model).items())
    assert mine.get_decay(7) == its.get_decay(7)
    assert not any(m.training for m in mine.module.modules()) and model.training


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("own", [None, *DTYPES], ids=str)
def test_timm_dtypes(kinds, dtype, own, foreach):
    """A bfloat16 average is rounded by timm's own random numbers, to the bit."""
    model = MODELS["batchnorm"]().to(dtype)
    options = {"decay": 0.97, "dtype": own, "foreach": foreach, "stochastic_rounding_seed": 5}
    mine, its = (kind(model, **options) for kind in kinds)
    assert mine.module[0].weight.dtype == (own or dtype)
    for _ in range(3):
        train(model)
        state = torch.get_rng_state()
        mine.update(model)
        assert torch.equal(torch.get_rng_state(), state)
        its.update(model)
        if (own or dtype) == torch.bfloat16 or own is None or own == dtype:
            same(mine, its, bitwise=(own or dtype) == torch.bfloat16)
        else:
            widest = max(torch.finfo(own).eps, torch.finfo(dtype).eps)
            for name, value in its.state_dict().items():
                torch.testing.assert_close(mine.state_dict()[name], value, rtol=2 * widest, atol=widest)


@pytest.mark.parametrize("own", [None, torch.float32])
def test_timm_no_worse_without_stochastic_rounding(kinds, own):
    model = MODELS["linear"]().bfloat16()
    mine, its = (kind(model, 0.99, dtype=own, stochastic_rounding=False) for kind in kinds)
    train(model)
    truth = {
        k: plain_interop.averaged(x, model.state_dict()[k], 0.99) for k, x in mine.module.state_dict().items()
    }
    mine.update(model)
    its.update(model)
    for name, exact in truth.items():
        far = [(kind.module.state_dict()[name].double() - exact).norm() for kind in (mine, its)]
        assert far[0] <= far[1] * 1.001 + 1e-6


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("exclude", [True, False])
def test_timm_mixed_dtypes(kinds, foreach, exclude):
    model = nn.Sequential(nn.Conv2d(3, 8, 1).bfloat16(), nn.BatchNorm2d(8), nn.Linear(5, 4).double())
    mine, its = (kind(model, 0.9, foreach=foreach, exclude_buffers=exclude) for kind in kinds)
    for _ in range(3):
        train(model)
        mine.update(model)
        its.update(model)
        same(mine, its)
        same(mine.module[0], its.module[0], bitwise=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm_decay_of_0_copies(kinds, dtype):
    model = Odd().to(dtype)
    ema = kinds[0](model, decay=0.9999, update_after_step=10)
    train(model)
    ema.update(model, step=4)
    saved = model.state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in ema.module.state_dict().items())


@pytest.mark.parametrize("exclude", [False, True])
def test_timm_tied_weights_are_averaged_once(kinds, exclude):
    """timm's state_dict has them twice, and its average moves by both; as parameters they are one."""
    model = Tied()
    mine, its = (kind(model, 0.8, exclude_buffers=exclude) for kind in kinds)
    assert mine.module.head.weight is mine.module.embed.weight
    expected = mine.module.embed.weight.detach().clone()
    for _ in range(3):
        train(model)
        mine.update(model)
        its.update(model)
        expected = plain_interop.averaged(expected, model.embed.weight.detach(), 0.8)
        torch.testing.assert_close(mine.module.embed.weight.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.module.head.bias, its.module.head.bias)
        if exclude:
            same(mine, its)


@EACH_MODEL
def test_timm_set(kinds, model):
    model = model()
    mine, its = (kind(model) for kind in kinds)
    train(model)
    assert mine.set(model) is None
    its.set(model)
    same(mine, its, bitwise=True)


@EACH_MODEL
def test_timm_state_goes_both_ways(kinds, model):
    model = model()
    mine, its = (kind(model, 0.9) for kind in kinds)
    for a, b in ((mine, its), (its, mine)):
        train(model)
        a.update(model)
        b.load_state_dict(a.state_dict())
        for name, value in a.state_dict().items():
            assert torch.equal(b.state_dict()[name], value)
        train(model)
        mine.update(model)
        its.update(model)
        for name, value in its.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value)


CHANGES = {
    "assigned": lambda ema, model: (
        ema.load_state_dict({k: x.clone() + 1 for k, x in ema.state_dict().items()}, assign=True), model),
    "model in float64": lambda ema, model: (None, model.double()),
    "both in float64": lambda ema, model: (ema.double(), model.double()),
    "another model": lambda ema, model: (None, copy.deepcopy(model)),
    "new parameter": lambda ema, model: (setattr(model, "weight", nn.Parameter(torch.randn(4, 6))), model),
    "new memory": lambda ema, model: (setattr(model.weight, "data", torch.randn(4, 6)), model),
    "new buffer": lambda ema, model: (setattr(ema.module, "running", torch.randn(4)), model),
    "new decay": lambda ema, model: (setattr(ema, "decay", 0.3), model),
    "no buffers": lambda ema, model: (setattr(ema, "exclude_buffers", True), model),
}  # fmt: skip


class Plain(nn.Linear):
    def __init__(self):
        super().__init__(6, 4)
        self.register_buffer("running", torch.randn(4))
        self.register_buffer("steps", torch.tensor(0))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_timm_changes_between_updates(kinds, change):
    torch.manual_seed(1)
    results = []
    for kind in kinds:
        torch.manual_seed(1)
        model = Plain()
        ema = kind(model, 0.9)
        for _ in range(2):
            train(model)
            ema.update(model)
        _, model = change(ema, model)
        for _ in range(2):
            train(model)
            ema.update(model)
        results.append(ema)
    for name, value in results[1].state_dict().items():
        torch.testing.assert_close(results[0].state_dict()[name], value)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_timm_copies(kinds, twin, dtype):
    """They go on on their own; timm's generator cannot be pickled, and then neither can ours."""
    model = MODELS["linear"]().to(dtype)
    mine, its = (kind(model, 0.9) for kind in kinds)
    train(model)
    mine.update(model)
    its.update(model)
    try:
        expected = twin(its)
    except Exception as error:
        with pytest.raises(type(error)):
            twin(mine)
        return
    other, before = twin(mine), copy.deepcopy(mine.state_dict())
    train(model)
    other.update(model)
    expected.update(model)
    same(other, expected, bitwise=dtype == torch.bfloat16)
    assert all(torch.equal(x, before[name]) for name, x in mine.state_dict().items())


def test_timm_forward_and_gradients(kinds):
    model = MODELS["batchnorm"]()
    mine, its = (kind(model, 0.9) for kind in kinds)
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    for ema in (mine, its):
        ema.update(model)
    torch.testing.assert_close(mine(x), its(x))
    assert [p.requires_grad for p in mine.parameters()] == [p.requires_grad for p in its.parameters()]
    assert all(p.is_leaf and p.grad is None for p in mine.parameters())


def test_timm_model_of_another_shape(kinds):
    for kind in kinds:
        with pytest.raises((RuntimeError, ValueError)):
            kind(nn.Linear(3, 4)).update(nn.Linear(4, 5))


# torch


def test_torch_signature():
    assert_signature(ours.get_ema_multi_avg_fn, swa_utils.get_ema_multi_avg_fn)


@EACH_MODEL
@pytest.mark.parametrize("use_buffers", [True, False])
@pytest.mark.parametrize("options", [{}, {"decay": 0.9}, {"decay": 0.0}, {"decay": 1}], ids=str)
def test_torch_averaged_model(model, use_buffers, options):
    model = model()
    mine, its = (
        swa_utils.AveragedModel(
            model, multi_avg_fn=m.get_ema_multi_avg_fn(**options), use_buffers=use_buffers
        )
        for m in (ours, swa_utils)
    )
    for _ in range(5):
        train(model)
        mine.update_parameters(model)
        its.update_parameters(model)
        same(mine, its)
        same(mine.module, its.module)
    its.load_state_dict(mine.state_dict())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_buffers", [True, False])
def test_torch_dtypes(dtype, use_buffers):
    model = MODELS["batchnorm"]().to(dtype)
    mine, its = (
        swa_utils.AveragedModel(model, multi_avg_fn=m.get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
        for m in (ours, swa_utils)
    )
    for _ in range(4):
        train(model)
        mine.update_parameters(model)
        its.update_parameters(model)
        same(mine, its)


@pytest.mark.parametrize(
    "dtype",
    [*DTYPES, torch.complex64, torch.complex128, torch.int64, torch.int32, torch.uint8, torch.bool],
    ids=str,
)
def test_torch_lists(dtype):
    """As AveragedModel calls it: with lists of one dtype, and a count that is not used."""
    sizes = (4, 3), (7,), (), (0, 2)
    a, b = ([(9 * torch.randn(s, dtype=torch.complex64)).to(dtype) if dtype.is_complex
             else (9 * torch.randn(s)).abs().to(dtype) for s in sizes] for _ in range(2))  # fmt: skip
    mine, its = [x.clone() for x in a], [x.clone() for x in a]
    for count in (1, torch.tensor(2)):
        assert ours.get_ema_multi_avg_fn(0.7)(mine, b, count) is None
        swa_utils.get_ema_multi_avg_fn(0.7)(its, b, count)
        for x, y in zip(mine, its, strict=True):
            eps = torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0
            torch.testing.assert_close(x, y, rtol=2 * eps, atol=eps)


def test_torch_leaves_that_need_a_gradient():
    a, b = (nn.Parameter(torch.randn(4, 3)) for _ in range(2))
    expected = plain_interop.averaged(a.detach(), b.detach(), 0.6)
    ours.get_ema_multi_avg_fn(0.6)([a], [b], 1)
    torch.testing.assert_close(a.detach().double(), expected, rtol=1e-6, atol=1e-7)
    assert a.is_leaf and a.requires_grad and a.grad is None


def test_torch_tied_weights():
    model = Tied()
    mine, its = (
        swa_utils.AveragedModel(model, multi_avg_fn=m.get_ema_multi_avg_fn(0.8)) for m in (ours, swa_utils)
    )
    for _ in range(3):
        train(model)
        mine.update_parameters(model)
        its.update_parameters(model)
        same(mine, its)


def test_torch_one_function_for_several_models():
    (function, theirs), pairs = (m.get_ema_multi_avg_fn(0.8) for m in (ours, swa_utils)), []
    for model in (MODELS["linear"](), MODELS["linear"](), MODELS["batchnorm"]()):
        emas = (swa_utils.AveragedModel(model, multi_avg_fn=f) for f in (function, theirs))
        pairs.append((model, *emas))
    for _ in range(3):
        for model, mine, its in pairs:
            train(model)
            mine.update_parameters(model)
            its.update_parameters(model)
            same(mine, its)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("inf")])
def test_torch_bad_decay(decay):
    for m in (swa_utils, ours):
        with pytest.raises(ValueError, match="decay"):
            m.get_ema_multi_avg_fn(decay)
