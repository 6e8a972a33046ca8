"""dino_head_loss: equal to dino_loss on materialised logits, in little memory; its cases on the CPU's
backends are in test_backends.py."""

import importlib

import pytest
import torch
from interpreter import INTERPRETED, grid_order, guarded, inside_nan, interpreted
from sslfast.kernels import tuning
from torch import Tensor
from torch.nn import functional as F

import sslfast
from sslfast import dino_head_loss, dino_loss, update_center_
from sslfast.testing import CASES, assert_close_to_reference

ONE = torch.randn(1, 4, 6)
op = importlib.import_module("sslfast.ops.head_cross_entropy")


def drawn(views=5, teachers=2, batch=4, classes=500, dim=16, dtype=torch.float64):
    """Student's features and prototypes, which require gradients, teacher's, and a centre."""
    student = F.normalize(torch.randn(views, batch, dim).double(), dim=2).to(dtype).requires_grad_()
    prototypes = F.normalize(torch.randn(classes, dim).double(), dim=1).to(dtype).requires_grad_()
    teacher = F.normalize(torch.randn(teachers, batch, dim).double(), dim=2).to(dtype)
    others = F.normalize(torch.randn(classes, dim).double(), dim=1).to(dtype)
    return (
        student,
        prototypes,
        teacher,
        others,
        torch.randn(classes).to(torch.promote_types(dtype, torch.float32)),
    )


NOTHING = {"cpu": 0}
SIZES = {"chunks": (128, 0), "one chunk": (1 << 19, 0), "kept chunks": (128, 1 << 20)}


@pytest.fixture(params=SIZES.values(), ids=SIZES)
def chunks(request, monkeypatch):
    monkeypatch.setattr(tuning, "PROTOTYPES", {"cpu": request.param[0]})
    monkeypatch.setattr(tuning, "KEPT", {"cpu": request.param[1]})


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_is_dino_loss_of_the_logits(backend, chunks):
    student, w, teacher, y, center = drawn()
    expected = dino_loss(student @ w.T, teacher @ y.T, center, 0.1, 0.07)
    with sslfast.use_backend(backend):
        found = dino_head_loss(student, w, [*teacher], y, center[None], 0.1, 0.07)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, (student, w)) for x in (found, expected)]
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_every_dtype_is_closer_to_the_truth_than_logits_are(dtype, chunks):
    inputs = drawn(dtype=dtype)
    student, w, teacher, y, center = inputs
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    truth = dino_loss(exact[0] @ exact[1].T, exact[2] @ exact[3].T, exact[4])
    ours = dino_head_loss(*inputs)
    theirs = dino_loss(student @ w.T, teacher @ y.T, center)
    assert ours.dtype == torch.float32
    assert abs(ours - truth) <= 2 * abs(theirs - truth) + 1e-5
    true = torch.autograd.grad(truth, exact[:2])
    for got, other, x in zip(
        *(torch.autograd.grad(z, (student, w)) for z in (ours, theirs)), true, strict=True
    ):
        assert got.dtype == dtype
        error, allowed = ((z.double() - x).norm() / x.norm() for z in (got, other))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_gradcheck(chunks):
    student, w, teacher, y, center = drawn(3, 2, 2, 260, 3)
    assert torch.autograd.gradcheck(
        lambda s, w: dino_head_loss(s, w, teacher, y, center, 0.7, 0.5), (student, w), fast_mode=True
    )


def test_many_prototypes_without_their_logits():
    student, w, teacher, y, center = drawn(4, 2, 4, 1_048_576, 8, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        made = []

        def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
            made.append(x.shape[0] * y.shape[1])
            return torch.mm(x, y, out=out)

        patch.setattr(op, "_product", product)
        loss = dino_head_loss(student, w, teacher, y, center)
        gradients = torch.autograd.grad(loss, (student, w))
    assert max(made) <= tuning.PROTOTYPES["cpu"] < 16 * 1_048_576 // 4
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (student, w, teacher, y, center)]
    truth = dino_loss(exact[0] @ exact[1].T, exact[2] @ exact[3].T, exact[4])
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)
    for got, true in zip(gradients, torch.autograd.grad(truth, exact[:2]), strict=True):
        assert (got.double() - true).norm() <= 1e-4 * true.norm()


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.001, 0.001), (100.0, 100.0)])
@pytest.mark.parametrize("kept", [0, 1 << 23])
def test_float16_with_many_prototypes_stays_finite(temperatures, kept, monkeypatch):
    monkeypatch.setattr(tuning, "KEPT", {"cpu": kept})
    student, w, teacher, y, _ = drawn(3, 2, 2, 65_536, 16, torch.float16)
    loss = dino_head_loss(student, w, teacher, y, torch.zeros(65_536), *temperatures)
    for gradient in (loss, *torch.autograd.grad(loss * max(16, 1e4 * temperatures[0]), (student, w))):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.05, 0.04), (0.001, 0.001), (100.0, 100.0)])
def test_float16_weights_as_a_gpu_has_them_neither_overflow_nor_vanish(temperatures, monkeypatch):
    """A GPU rounds the weights of its products to float16, a CPU computes in float32."""
    student, w, teacher, y, center = drawn(3, 2, 4, 4096, 16, torch.float16)
    teacher = student.detach()[[1, 0]] * 0.9  # sure of the right prototypes, as late in training
    run = lambda: torch.autograd.grad(  # noqa: E731
        dino_head_loss(student, w, teacher.half(), w.detach(), center * 0, *temperatures), (student, w)
    )
    expected = run()
    monkeypatch.setattr(tuning, "KEPT", NOTHING)
    monkeypatch.setattr(op._Walk, "_factor", lambda self, x: x.to(self.dtype))
    exact = lambda x, y, out=None: torch.mm(x.float(), y.float(), out=out)  # noqa: E731
    monkeypatch.setattr(op, "_product", exact)
    for got, true in zip(run(), expected, strict=True):
        assert got.isfinite().all()
        assert (got.double() - true.double()).norm() <= 0.01 * true.double().norm() + 1e-6


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=INTERPRETED)])
@pytest.mark.parametrize("some", [slice(0, 128), slice(128, 384), slice(0, 499)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kept", [0, 1 << 20])
def test_prototypes_that_are_masked_out_take_no_part(backend, some, sign, kept, monkeypatch):
    """Whole chunks of them, the first, some within and all but the last number."""
    monkeypatch.setattr(tuning, "KEPT", {"cpu": kept})
    monkeypatch.setattr(tuning, "PROTOTYPES", {"cpu": 128})
    student, w, teacher, y, center = drawn(dtype=torch.float32)
    center[some] = sign * torch.inf
    options = {"student_temp": 0.1, "teacher_temp": sign * 0.07}
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in (student, w, teacher, y, center)]
    true = dino_loss(exact[0] @ exact[1].T, exact[2] @ exact[3].T, exact[4], **options)
    with sslfast.use_backend(backend):
        found = dino_head_loss(student, w, teacher, y, center, **options)
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=0)
    pairs = zip(torch.autograd.grad(found, (student, w)), torch.autograd.grad(true, exact[:2]), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("size", [128, 1 << 19])
def test_few_logits_are_made_once_and_kept_for_every_backward_pass(size, monkeypatch):
    monkeypatch.setattr(tuning, "PROTOTYPES", {"cpu": size})
    made, mm = [], torch.mm

    def product(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
        made.append(tuple(x.shape))
        return mm(x, y, out=out)

    monkeypatch.setattr(op, "_product", product)
    student, w, teacher, y, center = drawn(dtype=torch.float32)
    rows, chunks = 20 + 8, [500] if size > 128 else [128, 128, 128, 116]
    logits = [(20, 16), (8, 16)]
    for limit in (rows * 500, rows * 500 - 1):
        monkeypatch.setattr(tuning, "KEPT", {"cpu": limit})
        loss = dino_head_loss(student, w, teacher, y, center)
        assert made == logits * len(chunks)
        made.clear()
        first = torch.autograd.grad(loss, (student, w), retain_graph=True)
        again = logits * (limit < rows * 500)
        assert made == [x for count in chunks for x in (*again, (count, 20), (20, count))]
        second = torch.autograd.grad(loss, (student, w))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        made.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES["head_cross_entropy"], ids=lambda case: case.name)
def test_cases_in_chunks(case, dtype, chunks):
    with sslfast.use_backend("cpu"):
        assert_close_to_reference("head_cross_entropy", case.inputs(dtype))


def test_hundreds_of_chunks_add_no_rounding(monkeypatch):
    monkeypatch.setattr(tuning, "PROTOTYPES", {"cpu": 128})
    *factors, center = (x.detach() for x in drawn(classes=65_536, dtype=torch.float32))
    with torch.no_grad():
        true = op.reference(*(x.double() for x in factors), center.double(), 0.5, 0.5, True)
        logits = op.reference(*factors, center, 0.5, 0.5, True)
        found = op.head_cross_entropy(*factors, 0.5, 0.5, center=center, skip=True)
    error, yardstick = ((x.double() - true).abs().max() for x in (found, logits))
    assert error <= 2 * yardstick + 4 * torch.finfo(torch.float32).eps


def test_only_the_student_has_gradients():
    inputs = [x.requires_grad_() for x in drawn()]
    dino_head_loss(*inputs).backward()
    assert [x.grad is not None for x in inputs] == [True, True, False, False, False]
    features = inputs[0].detach()
    assert not dino_head_loss(features, *(x.detach() for x in inputs[1:])).requires_grad


def test_autocast_rounds_like_a_product_and_keeps_the_prototypes_gradient(chunks):
    student, w, teacher, y, center = drawn(dtype=torch.float32)
    rounded = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in (student, w, teacher, y)]
    expected = torch.autograd.grad(dino_head_loss(*rounded, center), rounded[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = dino_head_loss(student, w, teacher, y, center)
    assert torch.equal(loss, dino_head_loss(*rounded, center))
    got = torch.autograd.grad(loss, (student, w))
    for x, true in zip(got, expected, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.bfloat16(), true, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, chunks):
    torch.compiler.reset()
    fast = torch.compile(dino_head_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = drawn(dtype=torch.float32)
    found, expected = fast(*inputs), dino_head_loss(*inputs)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(x, inputs[:2]) for x in (found, expected)]
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
    torch.compiler.reset()


def test_bits_are_the_same_from_run_to_run(chunks):
    inputs = drawn(classes=3000, dtype=torch.float32)
    runs = []
    for _ in range(2):
        loss = dino_head_loss(*inputs)
        runs.append((loss, *torch.autograd.grad(loss, inputs[:2])))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_the_center_follows_mean_features():
    _, _, teacher, y, center = drawn(dtype=torch.float32)
    by_logits, by_features = center.clone(), center.clone()
    update_center_(by_logits, teacher @ y.T, 0.7)
    assert update_center_(by_features, teacher, 0.7, prototypes=y) is by_features
    torch.testing.assert_close(by_features, by_logits)
    with pytest.raises(ValueError, match="^prototypes: "):
        update_center_(center, teacher, prototypes=y[:, 1:])
    with pytest.raises(ValueError, match="^center: "):
        update_center_(center, teacher, prototypes=y[1:])


@pytest.mark.parametrize(
    "name, change, error",
    [
        ("student_features", {"student_features": ONE, "teacher_features": ONE}, ValueError),
        ("student_features", {"student_features": torch.randn(4, 6)}, ValueError),
        ("student_prototypes", {"student_prototypes": torch.randn(9, 5)}, ValueError),
        ("student_prototypes", {"student_prototypes": torch.randn(0, 6)}, ValueError),
        ("teacher_prototypes", {"teacher_prototypes": torch.randn(8, 6)}, ValueError),
        ("teacher_features", {"teacher_features": torch.randn(2, 3, 6)}, ValueError),
        ("teacher_features", {"teacher_features": torch.randn(2, 4, 6).double()}, TypeError),
        ("center", {"center": torch.zeros(8)}, ValueError),
        ("student_temp", {"student_temp": 0.0}, ValueError),
        ("teacher_temp", {"teacher_temp": float("nan")}, ValueError),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, change, error):
    given = {
        "student_features": torch.randn(3, 4, 6),
        "student_prototypes": torch.randn(9, 6),
        "teacher_features": torch.randn(2, 4, 6),
        "teacher_prototypes": torch.randn(9, 6),
        "center": torch.zeros(9),
    }
    with pytest.raises(error, match=f"^{name}: "):
        dino_head_loss(**{**given, **change})


RUNS = [(torch.float32, 1), (torch.bfloat16, 3), (torch.float16, 4)]
FEW = [case for case in CASES["head_cross_entropy"][1:] if case.classes < 2000]
CHOSEN = [(case, dtype) for dtype, every in RUNS for case in FEW[::every]]


@pytest.mark.parametrize("case, dtype", CHOSEN, ids=lambda x: getattr(x, "name", str(x)))
@interpreted
def test_triton_case(case, dtype, monkeypatch):
    """Programs out of order, buffers of NaN with guards around them, inputs among NaN, several chunks."""
    monkeypatch.setattr(tuning, "TARGET_TILE", 512)
    monkeypatch.setattr(tuning, "PROTOTYPES", {"cpu": 4096})
    monkeypatch.setattr(tuning, "KEPT", NOTHING)
    inputs = {k: inside_nan(x) if isinstance(x, Tensor) else x for k, x in case.inputs(dtype).items()}
    with sslfast.use_backend("triton"), grid_order(True), guarded():
        assert_close_to_reference("head_cross_entropy", inputs)
