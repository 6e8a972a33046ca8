"""EMATeacher refuses what would collapse or could not follow, and names it."""

import math

import pytest
import torch
from teachers import network
from torch import nn

from sslfast import EMATeacher

# What it refuses


def test_memory_shared_with_the_student_is_refused():
    student = network()
    teacher = EMATeacher(student)
    shared = "memory of its own, got parameter '0.weight' in the teacher's memory"
    with pytest.raises(ValueError, match=f"model: expected {shared}"):
        teacher.update(teacher.model)
    teacher.update(student)
    teacher.model = student
    with pytest.raises(ValueError, match=shared):
        teacher.update(student)
    teacher = EMATeacher(student)
    teacher.model.load_state_dict(student.state_dict(), assign=True)
    with pytest.raises(ValueError, match=shared):
        teacher.update(student)
    teacher = EMATeacher(student)
    teacher.update(student)
    teacher.model[1] = student[1]
    with pytest.raises(ValueError, match="got parameter '1.weight' in the teacher's memory"):
        teacher.update(student)
    teacher = EMATeacher(student)
    teacher.model[1].running_mean = student[1].running_mean
    with pytest.raises(ValueError, match="got buffer '1.running_mean' in the teacher's memory"):
        teacher.update(student)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: setattr(m, "5", nn.Linear(2, 2)), "the teacher has no '5.weight'"),
        (lambda m: setattr(m[4], "adapter", nn.Linear(2, 2)), "the teacher has no '4.adapter.weight'"),
        (lambda m: m.register_parameter("more", nn.Parameter(torch.zeros(2))), "the teacher has no 'more'"),
        (lambda m: setattr(m[0], "bias", nn.Parameter(torch.zeros(8))), "the teacher has no '0.bias'"),
        (lambda m: m.__delitem__(4), "the model has no '4.weight'"),
        (lambda m: setattr(m[4], "bias", None), "the model has no '4.bias'"),
        (lambda m: setattr(m[4], "weight", nn.Parameter(torch.zeros(5, 8))), r"\[4, 8\] of .*'4.weight'"),
        (lambda m: m.register_buffer("table", torch.zeros(2)), r"shape \[5\] of buffer 'table', got \[2\]"),
        (lambda m: m[0].to("meta"), "sources '0.weight': .*meta device"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_another_structure_is_named(change, message, first):
    student = network()
    teacher = EMATeacher(student)
    if not first:
        teacher.update(student)
    change(student)
    with pytest.raises(ValueError, match=message):
        teacher.update(student)


def test_invalid_arguments_are_named():
    student = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got int"):
        EMATeacher(5)
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module, got OrderedDict"):
        EMATeacher(student).update(student.state_dict())
    with pytest.raises(ValueError, match="buffers: expected one of copy, ema, keep, got 'none'"):
        EMATeacher(student, buffers="none")
    for momentum in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"momentum: expected a (finite )?number"):
            EMATeacher(student, momentum)
        with pytest.raises(ValueError, match=r"momentum: expected a (finite )?number"):
            EMATeacher(student).update(student, momentum)
    with pytest.raises(ValueError, match="got none yet for 'weight'"):
        EMATeacher(nn.LazyLinear(3))
    with pytest.raises(TypeError, match="got torch.complex64 for 'weight'"):
        EMATeacher(nn.Linear(2, 2, dtype=torch.complex64))
    weight_normed = torch.nn.utils.weight_norm(nn.Linear(2, 2))
    weight_normed(torch.randn(1, 2))
    with pytest.raises(ValueError, match="model: expected one that copy.deepcopy copies"):
        EMATeacher(weight_normed)
