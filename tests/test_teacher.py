"""EMATeacher and its schedule: numbers, buffers, wrappers, what it notices, what it refuses."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from teachers import assert_same, moved, network, state
from torch import nn

import sslfast
from sslfast import EMATeacher, cosine_momentum


@pytest.mark.parametrize("buffers", ["copy", "ema", "keep"])
def test_parameters_follow_and_buffers_as_told(buffers):
    student = network()
    teacher = EMATeacher(student, 0.9, buffers)
    before = state(teacher.model)
    assert_same(before, state(student))
    for _ in range(3):
        moved(student)
        teacher.update(student)
        now, expected = state(student), {}
        for name, old in before.items():
            averaged = 0.9 * old + 0.1 * now[name]
            if name in dict(student.named_parameters()):
                expected[name] = averaged
            elif buffers == "ema" and old.is_floating_point():
                expected[name] = averaged
            else:
                expected[name] = old if buffers == "keep" else now[name]
        before = state(teacher.model)
        assert_same(before, expected)


def test_momentum_of_the_call_or_of_the_teacher():
    for momentum in (0.25, torch.tensor(0.25), torch.tensor(0.25, dtype=torch.float64, requires_grad=True)):
        student = nn.Linear(3, 2)
        teacher = EMATeacher(student, momentum)
        old = state(teacher.model)
        moved(student)
        teacher.update(student)
        expected = {name: 0.25 * old[name] + 0.75 * x for name, x in state(student).items()}
        assert_same(state(teacher.model), expected)
        teacher.update(student, 1.0)
        assert_same(state(teacher.model), expected)
        teacher.update(student, torch.tensor(0.0))
        assert_same(state(teacher.model), state(student))


def test_a_copy_without_gradients_in_one_flat_tensor():
    student = network()
    student(torch.randn(2, 3, 3, 3)).sum().backward()
    teacher = EMATeacher(student)
    parameters = list(teacher.parameters())
    assert all(not p.requires_grad and p.grad is None for p in parameters)
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    assert all(p.data_ptr() % 64 == 0 and p.is_contiguous() for p in parameters)
    assert student[0].weight.grad is not None
    x = torch.randn(2, 3, 3, 3, requires_grad=True)
    assert teacher(x).grad_fn is None and teacher.training


def test_tied_parameters_stay_tied():
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student[1].weight = student[0].weight
    teacher = EMATeacher(student, 0.5)
    assert teacher.model[1].weight is teacher.model[0].weight
    old = teacher.model[0].weight.clone()
    moved(student)
    teacher.update(student)
    torch.testing.assert_close(teacher.model[1].weight, 0.5 * old + 0.5 * student[0].weight.detach())


def test_dtypes_may_differ_and_layouts_are_kept():
    student = network().to(memory_format=torch.channels_last)
    student[4].to(torch.bfloat16)
    teacher = EMATeacher(student, 0.0)
    assert teacher.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert teacher.model[4].weight.dtype == torch.bfloat16
    teacher.model[4].float()  # the usual way to keep small steps of 16-bit weights
    moved(student)
    teacher.update(student)
    expected = {n: x.float() if x.dtype == torch.bfloat16 else x for n, x in state(student).items()}
    assert_same(state(teacher.model), expected)


def test_wrappers_are_taken_off():
    student = network()
    for wrapped in (
        torch.compile(student),
        nn.DataParallel(student),
        torch.compile(nn.DataParallel(student)),
    ):
        teacher = EMATeacher(wrapped, 0.0)
        assert type(teacher.model) is nn.Sequential
        moved(student)
        teacher.update(wrapped)
        assert_same(state(teacher.model), state(student))
        moved(student)
        teacher.update(student)
        assert_same(state(teacher.model), state(student))


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student = nn.parallel.DistributedDataParallel(network())
        teacher = EMATeacher(student, 0.0)
        for _ in range(2):
            student(torch.randn(2, 3, 3, 3)).sum().backward()
            moved(student)
            teacher.update(student)
            assert_same(state(teacher.model), state(student.module))
    finally:
        # Were the wrapper the last to hold the group, it would wait for the group's threads with the lock of
        # the interpreter in its hands, which they may want.
        del student, teacher
        gc.collect()
        torch.distributed.destroy_process_group()


def test_teacher_inside_of_a_module_moves_and_saves_with_it():
    student = network()
    whole = nn.ModuleDict({"student": student, "teacher": EMATeacher(student, 0.0)}).double()
    assert len({p.untyped_storage().data_ptr() for p in whole["teacher"].parameters()}) == 1
    moved(student)
    whole["teacher"].update(student)
    saved = state(whole)
    assert {"teacher.model.0.weight", "teacher.model.1.running_mean"} <= saved.keys()
    other = nn.ModuleDict({"student": network(), "teacher": EMATeacher(network())}).double()
    other.load_state_dict(saved)
    assert_same(state(other), saved)
    assert len({p.untyped_storage().data_ptr() for p in other["teacher"].parameters()}) == 1


@pytest.mark.parametrize(
    "twice", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_teacher_lives_on_its_own(twice):
    student = network()
    teacher = EMATeacher(student, 0.0)
    teacher.update(student)
    other, old = twice(teacher), state(teacher.model)
    assert_same(state(other), state(teacher))
    moved(student)
    other.update(student)
    assert_same(state(other.model), state(student))
    assert_same(state(teacher.model), old)


# What it notices


@pytest.mark.parametrize(
    "change",
    [
        lambda student, teacher: setattr(student[4], "weight", nn.Parameter(torch.randn(4, 8))),
        lambda student, teacher: student.__setitem__(4, nn.Linear(8, 4)),
        lambda student, teacher: setattr(student[4].weight, "data", torch.randn(4, 8)),
        lambda student, teacher: student.double(),
        lambda student, teacher: student.to(memory_format=torch.channels_last),
        lambda student, teacher: student[1].__setattr__("running_mean", torch.randn(8)),
        lambda student, teacher: teacher.double(),
        lambda student, teacher: teacher.model.double(),
        lambda student, teacher: teacher.model.load_state_dict(state(student), assign=True),
        lambda student, teacher: setattr(teacher, "model", copy.deepcopy(student)),
        lambda student, teacher: teacher.model.__setitem__(4, nn.Linear(8, 4)),
        lambda student, teacher: setattr(teacher.model[4], "weight", nn.Parameter(torch.zeros(4, 8))),
    ],
    ids=["parameter", "module", "data", "dtype", "layout", "buffer", "teacher", "its model", "assign", "all",
         "its module", "its parameter"],
)  # fmt: skip
def test_what_was_replaced_is_followed(change, plans):
    student = network()
    teacher = EMATeacher(student, 0.0)
    for _ in range(3):
        moved(student)
        teacher.update(student)
    assert len(plans) == 1
    change(student, teacher)
    moved(student)
    teacher.update(student)
    assert len(plans) == 2
    got = state(teacher.model)
    assert_same(got, {name: x.to(got[name].dtype) for name, x in state(student).items()})
    teacher.update(student)
    assert len(plans) == 2


def test_memory_of_the_teacher_that_moved_is_noticed():
    student = nn.Sequential(*(nn.Linear(2, 2) for _ in range(40)))
    teacher = EMATeacher(student, 0.0)
    teacher.update(student)
    teacher.model[7].weight.data = torch.zeros(2, 2)
    for _ in range(16):  # a part of the teacher is looked at in each update
        teacher.update(student)
    assert_same(state(teacher.model), state(student))
    for small in (nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))):
        teacher = EMATeacher(small, 0.0)
        teacher.update(small)
        teacher.model.double()
        moved(small)
        teacher.update(small)
        assert_same(
            state(teacher.model), {n: x.to(state(teacher.model)[n].dtype) for n, x in state(small).items()}
        )


def test_a_parameter_that_views_the_same_memory_in_another_way():
    student = nn.Linear(4, 4, bias=False)
    teacher = EMATeacher(student, 0.0)
    teacher.update(student)
    student.weight = nn.Parameter(student.weight.detach().t())
    teacher.update(student)
    torch.testing.assert_close(teacher.model.weight, student.weight.detach())
    student.weight = nn.Parameter(student.weight.detach()[:2])
    with pytest.raises(ValueError, match=r"shape \[4, 4\] of parameter 'weight', got \[2, 4\]"):
        teacher.update(student)


def test_other_references_to_a_parameter_follow_too():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.all = [self.weight]

    student = Twice()
    teacher = EMATeacher(student, 0.0)
    assert teacher.model.all[0] is teacher.model.weight
    moved(student)
    teacher.update(student)
    assert torch.equal(teacher.model.all[0], student.weight)


def test_the_student_is_not_kept_alive():
    student = nn.Linear(3, 3)
    teacher, gone = EMATeacher(student), weakref.ref(student)
    teacher.update(student)
    del student
    gc.collect()
    assert gone() is None
    teacher.update(nn.Linear(3, 3))


def test_under_another_dispatch_mode():
    from torch.utils.flop_counter import FlopCounterMode

    student = network()
    teacher = EMATeacher(student, 0.0)
    moved(student)
    with FlopCounterMode(display=False):
        teacher.update(student)
        assert_same(state(teacher.model), state(student))
        student[4].bias = None
        with pytest.raises(ValueError, match="the model has no '4.bias'"):
            teacher.update(student)


def test_autograd_sees_an_update():
    student = nn.Linear(3, 2)
    teacher = EMATeacher(student)
    teacher.update(student)
    out = teacher.model(torch.randn(4, 3, requires_grad=True))
    teacher.update(student)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_parameter_that_something_else_holds_weakly():
    student = nn.Linear(3, 3)
    teacher = EMATeacher(student, 0.0)
    held = weakref.ref(teacher.model.weight)
    teacher.double()
    moved(student)
    teacher.update(student)
    assert held() is teacher.model.weight and held().dtype == torch.float64
    assert_same(state(teacher.model), {name: x.double() for name, x in state(student).items()})
    out = teacher.model(torch.randn(4, 3, dtype=torch.float64, requires_grad=True))
    teacher.update(student)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_trains_with_compile_and_stays_the_plain_average():
    torch._dynamo.reset()
    student = nn.Linear(3, 3)
    compiled, teacher = torch.compile(student), EMATeacher(student, 0.7)
    expected = state(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(4):
        loss = (compiled(torch.randn(8, 3)) - teacher(torch.randn(8, 3))).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.update(compiled)
        expected = {name: 0.7 * expected[name] + 0.3 * x for name, x in state(student).items()}
    assert_same(state(teacher.model), expected)


# Schedules


def test_cosine_momentum_is_what_the_papers_have():
    for k, total, start in ((0, 100, 0.996), (37, 100, 0.996), (100, 100, 0.99), (2.5, 300, 0.99)):
        byol = 1 - (1 - start) * (1 + math.cos(math.pi * k / total)) / 2
        mocov3 = 1 - 0.5 * (1 + math.cos(math.pi * k / total)) * (1 - start)
        dino = 1.0 + 0.5 * (start - 1.0) * (1 + math.cos(math.pi * k / total))
        for expected in (byol, mocov3, dino):
            assert cosine_momentum(k, total, start) == pytest.approx(expected, abs=1e-15)
    assert cosine_momentum(0, 10, 0.9, 0.95) == pytest.approx(0.9)
    assert cosine_momentum(10, 10, 0.9, 0.95) == cosine_momentum(11, 10, 0.9, 0.95) == 0.95
    assert cosine_momentum(-1, 10, 0.9) == pytest.approx(0.9)


@pytest.mark.parametrize(
    "arguments, name",
    [((1, 0), "total"), ((math.nan, 1), "step"), (("1", 2), "step"), ((1, 2, 1.5), "start"),
     ((1, 2, 1, -1), "end")],
)  # fmt: skip
def test_cosine_momentum_refuses(arguments, name):
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        cosine_momentum(*arguments)


def test_exported():
    assert {"EMATeacher", "cosine_momentum", "ema_update_"} <= set(sslfast.__all__)
