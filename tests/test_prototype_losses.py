"""Losses between distributions over prototypes, against the formulas as their authors write them down."""

import pytest
import torch

import sslfast
from sslfast import DINOLoss, IBOTLoss, dino_loss, ibot_loss, update_center_

ONE = torch.randn(1, 4, 50)


def plain_dino(student, teacher, center, student_temp, teacher_temp):
    """Pair by pair."""
    total, terms = 0.0, 0
    for t, x in enumerate(teacher):
        q = ((x - center) / teacher_temp).softmax(1).detach()
        for v, s in enumerate(student):
            if v != t:
                total = total - (q * (s / student_temp).log_softmax(1)).sum(1).mean()
                terms += 1
    return total / terms


def drawn(views=5, teachers=2, batch=4, classes=50, dtype=torch.float64):
    student = torch.randn(views, batch, classes, dtype=dtype).requires_grad_()
    return student, torch.randn(teachers, batch, classes, dtype=dtype), torch.randn(classes, dtype=dtype) / 3


@pytest.mark.parametrize("views, teachers", [(2, 2), (10, 2), (3, 1), (1, 2), (4, 3)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_dino_is_the_mean_over_pairs_of_different_views(views, teachers, backend):
    student, teacher, center = drawn(views, teachers)
    expected = plain_dino(student, teacher, center, 0.1, 0.07)
    with sslfast.use_backend(backend):
        found = dino_loss(student, teacher, center, 0.1, 0.07)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, student)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dino_in_every_dtype_takes_sequences_and_gives_float32(dtype):
    student, teacher, center = drawn(dtype=dtype)
    found = dino_loss([*student], (*teacher,), center.float()[None])
    exact = student.detach().double().requires_grad_()
    expected = plain_dino(exact, teacher.double(), center.double(), 0.1, 0.04)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    (got,), (true,) = torch.autograd.grad(found, student), torch.autograd.grad(expected, exact)
    assert got.dtype == dtype and (got.double() - true).norm() <= 2 * torch.finfo(dtype).eps * true.norm()


def test_float16_with_many_prototypes_and_extreme_temperatures_stays_finite():
    student = (torch.randn(3, 2, 65_536) * 100).half().requires_grad_()
    teacher = (torch.randn(2, 2, 65_536) * 100).half()
    for temperatures in ((0.1, 0.04), (0.001, 0.001), (100.0, 100.0)):
        loss = dino_loss(student, teacher, torch.zeros(65_536), *temperatures)
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite() and gradient.isfinite().all() and loss > 0


def test_the_center_follows_the_teacher_after_the_loss_has_used_it():
    student, teacher, _ = drawn(dtype=torch.float32)
    module, center = DINOLoss(50, teacher_temp=0.07, center_momentum=0.75), torch.zeros(50)
    for _ in range(3):
        loss = module(student, teacher)
        torch.testing.assert_close(loss, plain_dino(student, teacher, center, 0.1, 0.07))
        loss.backward()  # after the update, as in the official loop
        center = 0.75 * center + 0.25 * teacher.mean((0, 1))
        torch.testing.assert_close(module.center, center)
    module.eval()(student, teacher)
    torch.testing.assert_close(module.center, center)
    torch.testing.assert_close(
        module(student, teacher, 0.05), plain_dino(student, teacher, center, 0.1, 0.05)
    )
    assert list(module.state_dict()) == ["center"]


def test_update_center_takes_any_leading_dimensions_and_16_bits():
    logits = (torch.randn(3, 100, 7) + 5).bfloat16()
    center = torch.randn(1, 7)
    expected = 0.9 * center + 0.1 * logits.double().mean((0, 1))
    assert update_center_(center, logits) is center
    torch.testing.assert_close(center, expected.float(), rtol=1e-5, atol=1e-5)
    before = center.clone()
    assert torch.equal(update_center_(center, logits[:0]), before)  # no row, no mean
    for wrong in (torch.randn(6), torch.randn(7, 1), None):
        with pytest.raises((TypeError, ValueError), match="^center: "):
            update_center_(wrong, logits)
    with pytest.raises(ValueError, match="^momentum: "):
        update_center_(center, logits, 1.5)


def test_the_gradient_may_take_the_place_of_the_logits():
    leaf, teacher, center = drawn(dtype=torch.float32)
    expected = torch.autograd.grad(dino_loss(leaf * 2, teacher, center), leaf)[0]
    logits = leaf * 2
    dino_loss(logits, teacher, center, inplace_backward=True).backward()
    assert torch.equal(leaf.grad, expected) and not torch.equal(logits, leaf * 2)


def test_ibot_weights_rows_and_divides_by_images():
    student = torch.randn(9, 20, dtype=torch.float64).requires_grad_()
    probs, weights = torch.rand(9, 20).double().softmax(1), torch.rand(9).double()
    rows = -(probs * (student / 0.2).log_softmax(1)).sum(1)
    expected = (rows * weights).sum() / 6
    found = ibot_loss(student, probs, weights, 6, 0.2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (found, expected)))
    torch.testing.assert_close(IBOTLoss(0.2)(student, probs, weights, 6), expected)


@pytest.mark.parametrize(
    "name, change, error",
    [
        ("student_logits", {"student_logits": torch.randn(1, 4, 50), "teacher_logits": ONE}, ValueError),
        ("student_logits", {"student_logits": []}, ValueError),
        ("student_logits", {"student_logits": ONE[:, :0], "teacher_logits": ONE[:, :0]}, ValueError),
        ("student_logits", {"student_logits": torch.randn(4, 50)}, ValueError),
        ("teacher_logits", {"teacher_logits": torch.randn(2, 4, 51)}, ValueError),
        ("teacher_logits", {"teacher_logits": torch.randn(2, 5, 50)}, ValueError),
        ("center", {"center": torch.randn(49)}, ValueError),
        ("center", {"center": torch.randn(5, 10)}, ValueError),
        ("student_temp", {"student_temp": 0.0}, ValueError),
        ("teacher_temp", {"teacher_temp": float("nan")}, ValueError),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, change, error):
    given = {
        "student_logits": torch.randn(5, 4, 50),
        "teacher_logits": torch.randn(2, 4, 50),
        "center": torch.zeros(50),
    }
    with pytest.raises(error, match=f"^{name}: "):
        dino_loss(**{**given, **change})
