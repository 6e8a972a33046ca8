"""sslfast.interop.lightly's DINO loss and EMA beside the installed lightly, and what all its losses share."""

import copy
import functools

import interop_processes
import processes
import pytest
import torch
from explicit import largest_tensor
from interop_lightly import ALL, DOUBLE, OF_PAIRS, PAIRS, ours, pair, peer, peer_utils, rows
from originals import assert_like_original, evaluate, same_error
from torch import Tensor, nn

from sslfast.testing import assert_no_worse

# DINO

VIEWS = [(2, 2), (2, 3), (2, 6), (1, 3), (2, 1), (3, 2)]


def dino(module, views: tuple[int, int], calls: int = 1, detached: bool = False, forward=None, **options):
    """From leaves t{call}{view} and s{call}{view} to the sum of the calls' losses, weighted."""

    def losses(**given):
        loss, total = module.DINOLoss(**{"output_dim": 9, **options}).to(given["t00"].dtype), 0
        for i in range(calls):
            teacher = [given[f"t{i}{v}"] for v in range(views[0])]
            teacher = [x.detach() for x in teacher] if detached else teacher
            total += (i + 1) * loss(teacher, [given[f"s{i}{v}"] for v in range(views[1])], **(forward or {}))
        return total

    return losses


def dino_leaves(views: tuple[int, int], calls: int = 1, n: int = 5) -> dict[str, Tensor]:
    return rows(
        n,
        9,
        *(f"{k}{i}{v}" for k, m in zip("ts", views, strict=True) for i in range(calls) for v in range(m)),
    )


def compare_dino(views: tuple[int, int], calls: int = 1, n: int = 5, **options) -> None:
    for detached in (True, False):
        both = [dino(m, views, calls, detached, **options) for m in (ours, peer)]
        assert_like_original(*both, dino_leaves(views, calls, n))


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("n", [1, 5])
def test_dino_views_and_moving_centre(views, n):
    """The teacher without a gradient, and with the one that the original gives it."""
    compare_dino(views, 3, n, center_momentum=0.5, teacher_temp=0.2, student_temp=0.3)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher_temp": 0.07, "student_temp": 0.2},
        {"forward": {"teacher_temp": 0.3}},
        {"forward": {"teacher_temp": 0.3, "epoch": 0}},
        *(
            {"forward": {"epoch": i}, "teacher_temp": 0.3, "warmup_teacher_temp_epochs": 4}
            for i in (0, 2, 3, 4, 99)
        ),
        {"forward": {"epoch": 0}, "teacher_temp": 0.3, "warmup_teacher_temp_epochs": 0},
        {"forward": {"epoch": 0}, "warmup_teacher_temp": 0.2, "warmup_teacher_temp_epochs": 1},
        {"forward": {"epoch": 7}},
        {"center_momentum": 0.0},
        {"center_momentum": 1.0},
    ],
    ids=str,
)
def test_dino_options(options):
    compare_dino((2, 4), 2, **options)


@pytest.mark.parametrize(
    "dtype, converted",
    [(DOUBLE, True), (DOUBLE, False), (torch.float32, True), (torch.bfloat16, True)],
)
def test_dino_centre_after_each_call(dtype, converted):
    both = [loss.to(dtype if converted else torch.float32) for loss in pair("DINOLoss", 9)]
    for i in range(4):
        given = {k: x.to(dtype) for k, x in dino_leaves((2, 3)).items()}
        views = [given["t00"], given["t01"]], (given["s00"], given["s01"], given["s02"])
        eps = torch.finfo(dtype).eps
        found, expected = (loss(*views) for loss in both)
        torch.testing.assert_close(found.double(), expected.double(), rtol=8 * eps, atol=0)
        if i == 2:
            for loss in both:
                loss.update_center(torch.stack(views[0]))
        mine, its = (loss.center for loss in both)
        assert mine.shape == its.shape and mine.dtype == its.dtype
        torch.testing.assert_close(mine, its, rtol=0, atol=4 * eps * its.abs().max().item())


@pytest.mark.parametrize("forth", [True, False])
def test_dino_state_goes_both_ways(forth):
    source, target = pair("DINOLoss", 9)[:: 1 if forth else -1]
    views = [*torch.randn(2, 5, 9)], [*torch.randn(4, 5, 9)]
    for _ in range(3):
        source(*views)
    assert target.load_state_dict(copy.deepcopy(source.state_dict())) == ([], [])
    for _ in range(2):
        torch.testing.assert_close(source(*views), target(*views))
        torch.testing.assert_close(source.center, target.center)


def test_dino_attributes_set_later():
    both, views = pair("DINOLoss", 9), ([*torch.randn(2, 5, 9)], [*torch.randn(4, 5, 9)])
    for loss in both:
        loss.student_temp, loss.teacher_temp, loss.center_momentum = 0.5, 0.25, 0.0
        loss.teacher_temp_schedule = torch.tensor([1.0, 0.5])
        loss.warmup_teacher_temp_epochs = 2
    for epoch in (None, 0, 1, 2):
        torch.testing.assert_close(*(loss(*views, epoch=epoch) for loss in both))
    torch.testing.assert_close(*(loss.center for loss in both))


def test_dino_without_two_views_raises_and_keeps_its_centre():
    both, view = pair("DINOLoss", 9), [torch.randn(5, 9)]
    same_error(*(functools.partial(loss, view, view) for loss in both))
    same_error(*(functools.partial(loss, [x.requires_grad_() for x in view], view) for loss in both))
    for views in (([], view), ([], [])):
        with pytest.raises(ValueError, match="teacher_out"):  # lightly: torch.stack's RuntimeError
            both[0](*views)
    assert all((loss.center == 0).all() for loss in both)


# EMA


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1, bias=False),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@pytest.mark.parametrize("m", [0, 0.5, 0.999, 1])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_update_momentum(m, dtype):
    student = network().to(dtype).to(memory_format=torch.channels_last)
    mine = network().to(dtype)
    mine[3].weight.requires_grad_(False)
    its, exact, buffers = (
        copy.deepcopy(mine),
        copy.deepcopy(mine).double(),
        [x.clone() for x in mine.buffers()],
    )
    places = [x.data_ptr() for x in mine.parameters()]
    for _ in range(4):
        student(torch.randn(2, 3, 4, 4, dtype=dtype))  # moves its running statistics
        for x in student.parameters():
            x.data += torch.randn_like(x)
        assert ours.update_momentum(student, mine, m) is None
        peer_utils.update_momentum(model=student, model_ema=its, m=m)
        peer_utils.update_momentum(copy.deepcopy(student).double(), exact, m)
        for x, y, truth in zip(mine.parameters(), its.parameters(), exact.parameters(), strict=True):
            floor = 4 * torch.finfo(dtype).eps * truth.abs().max().item()
            assert_no_worse("EMA", x.detach(), truth.detach(), y.detach(), floor)
    assert places == [x.data_ptr() for x in mine.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(mine.buffers(), buffers, strict=True))


# 16 bits

HALVES = {
    "NTXentLoss": {"temperature": 0.2},
    "bank": {"temperature": 0.2, "memory_bank_size": (50, 12)},
    "DCLLoss": {"temperature": 0.2},
    "DCLWLoss": {"temperature": 0.2},
    "DINOLoss": {"output_dim": 9},
}
EACH_HALF = pytest.mark.parametrize("name", HALVES)


def of_views(name: str, context=None):
    """[ours, the original], from leaves; and leaves."""
    both = pair("NTXentLoss" if name == "bank" else name, **HALVES[name])

    def call(loss):
        def inner(**given):
            views = list(given.values())
            used = loss if context else copy.deepcopy(loss).to(views[0].dtype)
            given = [[x.detach() for x in views[:2]], views[2:]] if name == "DINOLoss" else views
            with context or torch.autocast("cpu", enabled=False):
                return used(*given)

        return inner

    return [call(x) for x in both], rows(40, 9, "t0", "t1", "s0", "s1", "s2") if name == "DINOLoss" else rows(
        40, 12
    )


@EACH_HALF
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(name, dtype):
    """Float32 losses; they and the gradients are close to the truth, no worse than the original's."""
    (mine, its), leaves = of_views(name)
    leaves = {k: x.to(dtype) for k, x in leaves.items()}
    truth, slopes = evaluate(of_views(name)[0][1], {k: x.double() for k, x in leaves.items()})
    yard, yard_slopes = evaluate(its, leaves)
    value, found = evaluate(mine, leaves)
    assert value.dtype == torch.float32
    eps = torch.finfo(dtype).eps
    assert_no_worse("value", value, truth, yard, eps)
    assert abs(value - truth) <= 2 * eps * truth.abs()
    for key, slope in slopes.items():
        assert found[key].dtype == dtype
        assert_no_worse(key, found[key], slope, yard_slopes[key], eps * slope.abs().max().item())
        assert (found[key] - slope).norm() <= 8 * eps * slope.norm(), key


@EACH_HALF
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name, dtype):
    """With the buffers in float32."""
    leaves = {k: x.to(dtype) for k, x in of_views(name)[1].items()}
    truth, slopes = evaluate(of_views(name)[0][1], {k: x.double() for k, x in leaves.items()})
    value, found = evaluate(of_views(name, torch.autocast("cpu", torch.bfloat16))[0][0], leaves)
    assert value.dtype == torch.float32 and abs(value - truth) <= 0.02 * truth.abs()
    for key, slope in slopes.items():
        assert found[key].dtype == dtype and (found[key] - slope).norm() <= 0.05 * slope.norm(), key


# Errors


@pytest.mark.parametrize(
    "name, options",
    [
        *(
            ("NTXentLoss", {"memory_bank_size": x})
            for x in (-1, (-1, 4), (4, -1), 8, (8, 4, 2), (8,), [], True, 8.0, None)
        ),
        *(("NTXentLoss", {"temperature": x}) for x in (0, 0.0, 9e-9, -9e-9, None, "0.5")),
        ("DINOLoss", {"center_mode": "median"}),
        ("DINOLoss", {"center_mode": ""}),
        ("DINOLoss", {"output_dim": -1}),
        *((name, {"unknown": 1}) for name in ALL),
    ],
    ids=str,
)
def test_errors(name, options):
    same_error(*(functools.partial(getattr(m, name), **options) for m in (ours, peer)))


@pytest.mark.parametrize("name", PAIRS)
def test_gathering_needs_torch_distributed(name, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    same_error(*(functools.partial(getattr(m, name), gather_distributed=True) for m in (ours, peer)))


@OF_PAIRS
@pytest.mark.parametrize(
    "shapes, wrong",
    [
        (((4, 3), (4, 5)), "out1"),
        (((4, 3), (5, 3)), "out1"),
        (((4,), (4,)), "out0"),
        (((4, 3, 2),) * 2, "out0"),
    ],
)
def test_wrong_shapes_are_named(name, shapes, wrong):
    for options in ({}, {"memory_bank_size": (6, 3)}) if name == "NTXentLoss" else ({},):
        with pytest.raises((ValueError, TypeError), match=f"^{wrong}: expected .*, got "):
            getattr(ours, name)(**options)(*(torch.randn(x) for x in shapes))


def test_rows_unlike_those_of_the_bank_are_named():
    with pytest.raises((ValueError, TypeError), match="^out0: expected .*, got "):
        ours.NTXentLoss(memory_bank_size=(6, 3))(*torch.randn(2, 4, 5))


@pytest.mark.parametrize(
    "teacher, student, wrong",
    [
        ([(5, 9), (4, 9)], [(5, 9)] * 2, "teacher_out"),
        ([(5, 9)] * 2, [(5, 9), (5, 8)], "student_out"),
        ([(5, 8)] * 2, [(5, 8)] * 2, "teacher_out"),
        ([(6, 9)] * 2, [(5, 9)] * 2, "(teacher_out|student_out)"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_wrong_views_are_named(teacher, student, wrong, grad):
    views = [torch.randn(x, requires_grad=grad) for x in teacher], [torch.randn(x) for x in student]
    with pytest.raises((ValueError, TypeError), match=f"^{wrong}.*: expected .*, got "):
        ours.DINOLoss(9)(*views)


# Memory, processes


@pytest.mark.parametrize(
    "name, options", [*((name, {}) for name in PAIRS), ("NTXentLoss", {"memory_bank_size": (800, 4)})]
)
def test_no_matrix_of_similarities(name, options):
    leaves = [torch.randn(600, 4, requires_grad=True) for _ in range(2)]
    mine, its = pair(name, **options)
    assert largest_tensor(mine, leaves) <= 600 * 600 // 4
    assert largest_tensor(its, leaves) >= 600 * 599


def test_groups_of_three_and_two_processes(tmp_path):
    """NT-Xent, DCL and DCLW with and without gathering, the gathered memory bank, and DINO's centre."""
    worker = functools.partial(
        interop_processes.in_groups, check=interop_processes.lightly_losses, splits=[[2, 1]], folder=tmp_path
    )
    differences = sum(processes.run(worker, 3, tmp_path / "run"), [])
    assert not differences, "\n".join(differences)
