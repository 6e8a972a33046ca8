"""solo-learn's losses against their formulas, the installed files of 1.0.2, and across processes."""

import copy
import functools
import importlib.util
import inspect
import os
import pickle
from pathlib import Path

import interop_solo_processes
import numpy as np
import plain_interop
import processes
import pytest
import torch
from originals import assert_like_original, assert_signature
from torch import nn

from sslfast.interop import solo_learn as ours

IDS = torch.tensor([4, 4, 1, 0, 1, 4, 0, 1])
PROTOTYPES = 7


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def upstream(name):
    """solo-learn's losses/{name}.py, without the package, which needs more than the file does."""
    spec = importlib.util.find_spec("solo")
    if spec is None:
        if os.environ.get("SSLFAST_PEERS") == "all":
            raise ImportError("solo-learn is not installed")
        pytest.skip("solo-learn is not installed")
    path = Path(spec.submodule_search_locations[0]) / "losses" / f"{name}.py"
    file = importlib.util.spec_from_file_location(f"solo_losses_{name}", path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


LOSSES = {
    "simclr": (
        lambda z: ours.simclr_loss_func(z, IDS, 0.2),
        lambda z: plain_interop.simclr(z, IDS, 0.2),
        lambda: {"z": f64(8, 5)},
    ),
    "simclr's default": (
        lambda z: ours.simclr_loss_func(z, torch.arange(4).repeat(2)),
        lambda z: plain_interop.simclr(z, torch.arange(4).repeat(2)),
        lambda: {"z": f64(8, 5)},
    ),
    "moco": (
        lambda query, key: ours.mocov2plus_loss_func(query, key, QUEUE.to(query), 0.3),
        lambda query, key: plain_interop.queue_loss(query, key, QUEUE.to(query), 0.3),
        lambda: {"query": 0.5 * f64(8, 5), "key": 0.5 * f64(8, 5)},
    ),
    "moco's default": (
        lambda query, key: ours.moco_loss_func(query, key, QUEUE.to(query)),
        lambda query, key: plain_interop.queue_loss(query, key, QUEUE.to(query), 0.1),
        lambda: {"query": 0.2 * f64(8, 5), "key": 0.2 * f64(8, 5)},
    ),
    "mocov3": (
        lambda query, key: ours.mocov3_loss_func(query, key, 0.5),
        lambda query, key: plain_interop.mocov3(query, key, 0.5),
        lambda: {"query": f64(8, 5), "key": f64(8, 5)},
    ),
    "mocov3's default": (
        ours.mocov3_loss_func,
        plain_interop.mocov3,
        lambda: {"query": f64(8, 5), "key": f64(8, 5)},
    ),
    "nnclr": (
        lambda nn, p: ours.nnclr_loss_func(nn, p, 0.3),
        lambda nn, p: plain_interop.nnclr(nn, p, 0.3),
        lambda: {"nn": f64(8, 5), "p": f64(8, 5)},
    ),
    "nnclr's default": (
        ours.nnclr_loss_func,
        lambda nn, p: plain_interop.nnclr(nn, p),
        lambda: {"nn": f64(8, 5), "p": f64(8, 5)},
    ),
    "byol": (ours.byol_loss_func, plain_interop.byol, lambda: {"p": f64(8, 5), "z": f64(8, 5)}),
    "byol, not simplified": (
        lambda p, z: ours.byol_loss_func(p, z, simplified=False),
        plain_interop.byol,
        lambda: {"p": f64(8, 5), "z": f64(8, 5)},
    ),
}
QUEUE = f64(5, 12)
EACH = pytest.mark.parametrize("loss, formula, draw", LOSSES.values(), ids=LOSSES)


@EACH
def test_formulas(loss, formula, draw):
    assert_like_original(loss, formula, draw())


@EACH
def test_extreme_rows_stay_finite(loss, formula, draw):
    leaves = [30 * x.float() for x in draw().values()]
    for x in leaves:
        x[1], x[2], x[3] = x[0], 1e-8, 0
        x.requires_grad_()
    value = loss(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    assert value.isfinite() and all(d.isfinite().all() for d in gradients if d is not None)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(loss, formula, draw, dtype):
    leaves = [x.to(dtype) for x in draw().values()]
    truth = formula(*(x.double() for x in leaves))
    value = loss(*(x.requires_grad_() for x in leaves))
    torch.testing.assert_close(value.double(), truth, rtol=2e-2, atol=2e-2)
    assert torch.autograd.grad(value, leaves[0])[0].dtype == dtype


SIGNATURES = {
    "simclr_loss_func": lambda z, indexes, temperature=0.1: ...,
    "mocov2plus_loss_func": lambda query, key, queue, temperature=0.1: ...,
    "moco_loss_func": lambda query, key, queue, temperature=0.1: ...,
    "mocov3_loss_func": lambda query, key, temperature=0.2: ...,
    "nnclr_loss_func": lambda nn, p, temperature=0.1: ...,
    "byol_loss_func": lambda p, z, simplified=True: ...,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    assert_signature(getattr(ours, name), SIGNATURES[name])


def test_moco_by_its_older_name():
    assert ours.moco_loss_func is ours.mocov2plus_loss_func


@pytest.mark.parametrize("file, name", [("moco", "moco_loss_func"), ("nnclr", "nnclr_loss_func"),
                                        ("byol", "byol_loss_func"), ("dino", "DINOLoss")])  # fmt: skip
def test_signatures_are_the_installed_ones(file, name):
    its, mine = getattr(upstream(file), name), getattr(ours, name)
    for a, b in (
        [(mine.forward, its.forward), (mine.__init__, its.__init__)] if file == "dino" else [(mine, its)]
    ):
        assert inspect.signature(a).parameters.keys() == inspect.signature(b).parameters.keys()
        assert_signature(a, b)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_installed_simclr(temperature):
    """An older signature, and with two views the same loss."""
    its, ids = upstream("simclr").simclr_loss_func, torch.arange(6).repeat(2)
    assert_like_original(
        lambda z: ours.simclr_loss_func(z, ids, temperature),
        lambda z: its(*z.chunk(2), temperature),
        {"z": f64(12, 5)},
    )


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_installed_moco(temperature):
    queue = plain_interop.unit(f64(12, 5)).T
    assert_like_original(
        lambda query, key: ours.moco_loss_func(query, key, queue.to(query), temperature),
        lambda query, key: upstream("moco").moco_loss_func(query, key, queue.to(query), temperature),
        {"query": plain_interop.unit(f64(8, 5)), "key": plain_interop.unit(f64(8, 5))},
    )


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
def test_installed_nnclr(options):
    assert_like_original(
        lambda nn, p: ours.nnclr_loss_func(nn, p, **options),
        lambda nn, p: upstream("nnclr").nnclr_loss_func(nn, p, **options),
        {"nn": f64(8, 5), "p": f64(8, 5)},
    )


@pytest.mark.parametrize("simplified", [True, False])
def test_installed_byol(simplified):
    assert_like_original(
        lambda p, z: ours.byol_loss_func(p, z, simplified),
        lambda p, z: upstream("byol").byol_loss_func(p, z, simplified),
        {"p": f64(8, 5), "z": f64(8, 5)},
    )


@pytest.mark.parametrize(
    "ids", [IDS, IDS.int(), IDS.float() / 3, IDS - 2**62, IDS == 4], ids=lambda x: str(x.dtype)
)
def test_simclr_indexes(ids):
    z = f64(8, 5)
    torch.testing.assert_close(
        ours.simclr_loss_func(z, ids), plain_interop.simclr(z, ids), rtol=1e-10, atol=1e-12
    )


def test_simclr_rows_without_a_positive_are_0():
    z = f64(5, 4).requires_grad_()
    loss = ours.simclr_loss_func(z, torch.tensor([1, 1, 5, 6, 1]), 0.3)
    torch.testing.assert_close(loss, plain_interop.simclr(z, torch.tensor([1, 1, 5, 6, 1]), 0.3))
    alone = ours.simclr_loss_func(z, torch.arange(5))
    assert alone == 0 and torch.autograd.grad(alone, z)[0].eq(0).all()


def test_simclr_without_negatives_is_0():
    z = f64(5, 4).requires_grad_()
    loss = ours.simclr_loss_func(z, torch.ones(5, dtype=torch.int64))
    assert loss.abs() < 1e-12 and torch.autograd.grad(loss, z)[0].abs().max() < 1e-12


@pytest.mark.parametrize("name", ["mocov3", "byol", "byol, not simplified"])
def test_what_gets_no_gradient(name):
    loss, _, draw = LOSSES[name]
    student, teacher = (x.requires_grad_() for x in draw().values())
    a, b = torch.autograd.grad(loss(student, teacher), (student, teacher), allow_unused=True)
    assert a.abs().max() > 0 and (b is None or b.eq(0).all())


def test_queue_is_not_changed_and_may_change_before_backward():
    query, key, queue = (f64(8, 5).requires_grad_(), f64(8, 5).requires_grad_(), QUEUE.clone())
    expected = torch.autograd.grad(plain_interop.queue_loss(query, key, QUEUE, 0.2), (query, key))
    loss = ours.mocov2plus_loss_func(query, key, queue, 0.2)
    assert torch.equal(queue, QUEUE)
    queue[:, :8] = key.detach().T
    for a, b in zip(torch.autograd.grad(loss, (query, key)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# DINO


def made(kind=ours.DINOLoss, views=2, **options):
    return kind(PROTOTYPES, 0.04, 0.07, 3, 6, num_large_crops=views, **options).double()


def test_dino_attributes():
    loss = ours.DINOLoss(PROTOTYPES, 0.04, 0.07, 3, 6)
    assert isinstance(loss, nn.Module) and loss.epoch == 0
    assert (loss.student_temp, loss.center_momentum, loss.num_large_crops) == (0.1, 0.9, 2)
    assert isinstance(loss.teacher_temp_schedule, np.ndarray)
    np.testing.assert_allclose(loss.teacher_temp_schedule, [0.04, 0.055, 0.07, 0.07, 0.07, 0.07], rtol=1e-15)
    assert list(loss.state_dict()) == ["center"] and loss.center.shape == (1, PROTOTYPES)
    assert loss.center.eq(0).all() and loss.center.dtype == torch.float32 and not list(loss.parameters())
    other = ours.DINOLoss(PROTOTYPES, 0.04, 0.07, 0, 6, 0.2, 5, 0.8)
    assert (other.student_temp, other.center_momentum, other.num_large_crops) == (0.2, 0.8, 5)
    np.testing.assert_array_equal(other.teacher_temp_schedule, [0.07] * 6)
    names = (
        "num_prototypes warmup_teacher_temp teacher_temp warmup_teacher_temp_epochs num_epochs student_temp"
    )
    given = [*names.split(), "num_large_crops", "center_momentum"]
    assert list(inspect.signature(ours.DINOLoss).parameters) == given
    assert list(inspect.signature(loss.forward).parameters) == ["student_output", "teacher_output"]


@pytest.mark.parametrize("views", [1, 2, 3, 6])
def test_dino_over_epochs(views):
    """Loss, gradient and centre; the teacher gets no gradient."""
    loss, center = (
        made(views=views, student_temp=0.2, center_momentum=0.7),
        torch.zeros(1, PROTOTYPES).double(),
    )
    for epoch in (0, 0, 1, 2, 5):
        loss.epoch = epoch
        student, teacher = f64(4 * views, PROTOTYPES).requires_grad_(), f64(8, PROTOTYPES).requires_grad_()
        temperature = [0.04, 0.055, 0.07, 0.07, 0.07, 0.07][epoch]
        expected = plain_interop.dino(student, teacher, center, temperature, 0.2, views)
        center = plain_interop.moved_center(center, teacher.detach(), 0.7)
        value = loss(student, teacher)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(loss.center, center, rtol=1e-12, atol=1e-14)
        a, b = torch.autograd.grad(value, (student, teacher), allow_unused=True)
        (its,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(a, its, rtol=1e-10, atol=1e-12)
        assert b is None or b.eq(0).all()
        assert not loss.center.requires_grad


@pytest.mark.parametrize("views", [2, 4])
def test_installed_dino(views):
    its = made(upstream("dino").DINOLoss, views)
    mine = made(views=views)
    np.testing.assert_array_equal(mine.teacher_temp_schedule, its.teacher_temp_schedule)
    its.center.normal_()
    mine.load_state_dict(its.state_dict())

    def called(loss):
        return lambda student, teacher: copy.deepcopy(loss).to(student.dtype)(student, teacher)

    leaves = {"student": f64(3 * views, PROTOTYPES), "teacher": f64(6, PROTOTYPES)}
    assert_like_original(called(mine), called(its), leaves)
    for loss in (mine, its):
        loss(**{f"{k}_output": x for k, x in leaves.items()})
    torch.testing.assert_close(mine.center, its.center, rtol=1e-12, atol=1e-14)
    its.load_state_dict(mine.state_dict())
    assert vars(its).keys() <= vars(mine).keys()


def test_dino_of_an_epoch_behind_the_last():
    loss = made()
    loss.epoch = 6
    with pytest.raises(IndexError):
        loss(f64(8, PROTOTYPES), f64(8, PROTOTYPES))


def test_dino_between_loss_and_backward():
    """Another call moves the centre; the first one's gradient is still that of its own centre."""
    loss, student, teacher = made(), f64(8, PROTOTYPES).requires_grad_(), f64(8, PROTOTYPES)
    expected = plain_interop.dino(student, teacher, torch.zeros(1, PROTOTYPES).double(), 0.04)
    value = loss(student, teacher)
    loss(student, 3 * teacher)
    for a, b in zip(torch.autograd.grad(value, student), torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dino_16_bits(dtype):
    """The centre stays in float32."""
    loss, student, teacher = made().float(), f64(8, PROTOTYPES).to(dtype), f64(8, PROTOTYPES).to(dtype)
    zero = torch.zeros(1, PROTOTYPES)
    expected = plain_interop.dino(student.float(), teacher.float(), zero, 0.04)
    torch.testing.assert_close(loss(student, teacher).float(), expected, rtol=2e-2, atol=0)
    assert loss.center.dtype == torch.float32
    center = plain_interop.moved_center(zero, teacher.float())
    torch.testing.assert_close(loss.center, center, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_dino_copies(twin):
    loss = made()
    loss(f64(8, PROTOTYPES), f64(8, PROTOTYPES))
    loss.epoch, x = 2, (f64(8, PROTOTYPES), f64(8, PROTOTYPES))
    assert torch.equal(twin(loss)(*x), loss(*x))


# Several processes


@pytest.fixture(scope="module", params=[2])
def found(request, tmp_path_factory):
    worker = functools.partial(interop_solo_processes.solo_learn, count=request.param)
    return processes.run(worker, request.param, tmp_path_factory.mktemp("run") / "gloo")


GATHERED = {
    "simclr": (("z",), lambda x, rows: plain_interop.simclr(x["z"], x["indexes"], 0.2, rows)),
    "simclr, labels": (
        ("z",),
        lambda x, rows: plain_interop.simclr(x["z"], interop_solo_processes.labels(x), 0.2, rows),
    ),
    "mocov3": (
        ("query", "key"),
        lambda x, rows: plain_interop.mocov3(x["query"][rows.start : rows.stop], x["key"], 0.3, rows.start),
    ),
    "nnclr": (
        ("nn", "p"),
        lambda x, rows: plain_interop.nnclr(x["nn"][rows.start : rows.stop], x["p"], 0.2, rows.start),
    ),
}


@pytest.mark.parametrize("name", GATHERED)
def test_across_processes(found, name):
    """Each has the loss of its rows, and of its own rows the gradient of the sum of all losses."""
    leaves, formula = GATHERED[name]
    size, count = interop_solo_processes.ROWS, len(found)
    x = interop_solo_processes.batch(count)
    for leaf in leaves:
        x[leaf].requires_grad_()
    losses = [formula(x, range(r * size, (r + 1) * size)) for r in range(count)]
    gradients = torch.autograd.grad(sum(losses), [x[k] for k in leaves], allow_unused=True)
    for r, loss in enumerate(losses):
        value, *mine = found[r][name]
        torch.testing.assert_close(value, loss.detach(), rtol=1e-10, atol=1e-12)
        for a, b in zip(mine, gradients, strict=True):
            if b is None:
                assert a is None or a.eq(0).all()
            else:
                torch.testing.assert_close(a, b[r * size : (r + 1) * size], rtol=1e-10, atol=1e-12)


def test_dino_across_processes(found):
    """The loss is each one's own, the centre that of all."""
    x, zero = (
        interop_solo_processes.batch(len(found)),
        torch.zeros(1, interop_solo_processes.PROTOTYPES).double(),
    )
    center = plain_interop.moved_center(zero, x["teacher"].flatten(0, 1))
    for r, results in enumerate(found):
        student = x["student"][r].requires_grad_()
        expected = plain_interop.dino(student, x["teacher"][r], zero, 0.04)
        torch.testing.assert_close(results["dino"][0], expected.detach(), rtol=1e-10, atol=0)
        (gradient,) = torch.autograd.grad(expected, student)
        torch.testing.assert_close(results["dino"][1], gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(results["center"][0], center, rtol=1e-12, atol=1e-14)
