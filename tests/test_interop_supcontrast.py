"""SupContrast's SupConLoss against its formula, row by row."""

import copy
import inspect
import pickle

import plain_interop
import pytest
import torch
from explicit import largest_tensor
from originals import assert_like_original
from torch import nn

from sslfast.interop.supcontrast import SupConLoss

LABELS = torch.tensor([3, -1, 3, 0, 3, 7])
HALVES = torch.tensor([1.5, 1.25, 1.5, -0.0, 0.0, 1.0])
WEIGHTS = torch.tensor([
    [1, 0.5, 0, 0, 0, 0.25],  # asymmetric, and its weights do not sum to 1
    [0, 1, 0, 1, 1, 0],
    [0.125, 0, 0, 0, 0, 0],  # not itself, so that its other views are no positives
    [0, 0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1, 1],
    [0, 0, 3, 0, 0, 0.5],
])  # fmt: skip
TARGETS = {
    "none": {},
    "labels": {"labels": LABELS},
    "one class": {"labels": torch.zeros(6, dtype=torch.int64)},
    "eye": {"mask": torch.eye(6)},
    "weights": {"mask": WEIGHTS},
    "bool": {"mask": WEIGHTS > 0.3},
    "integers": {"mask": (2 * WEIGHTS).long()},
    "nothing": {"mask": torch.zeros(6, 6)},
}
EACH_TARGET = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
MODES = pytest.mark.parametrize("mode", ["all", "one"])


def features(*shape, scale=1.0):
    return scale * torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def compare(x, target, temperature=0.07, mode="all", base=0.07, **options):
    assert_like_original(
        lambda features: SupConLoss(temperature, mode, base)(features, **target),
        lambda features: plain_interop.supcontrast(features, **target, temperature=temperature,
                                                   contrast_mode=mode, base_temperature=base),
        {"features": x},
        **options,
    )  # fmt: skip


def test_signatures_and_attributes():
    def made(self, temperature=0.07, contrast_mode="all", base_temperature=0.07): ...
    def called(self, features, labels=None, mask=None): ...

    for ours, its in ((SupConLoss.__init__, made), (SupConLoss.forward, called)):
        mine = inspect.signature(ours).parameters.values()
        assert [(p.name, p.default) for p in mine] == [
            (p.name, p.default) for p in inspect.signature(its).parameters.values()
        ]
    loss = SupConLoss(0.2, "one", 0.3)
    assert isinstance(loss, nn.Module)
    assert (loss.temperature, loss.contrast_mode, loss.base_temperature) == (0.2, "one", 0.3)
    assert not loss.state_dict() and not list(loss.parameters())
    loss.load_state_dict({})


@EACH_TARGET
@MODES
@pytest.mark.parametrize("views", [1, 2, 3])
def test_targets(target, mode, views):
    compare(features(6, views, 8), target, mode=mode)


@pytest.mark.parametrize(
    "temperature, base", [(0.1, 0.07), (0.5, 1.0), (1.0, 0.2), (0.01, 0.07), (-0.3, 0.1)]
)
@MODES
def test_temperatures(temperature, base, mode):
    compare(features(6, 2, 8), TARGETS["labels"], temperature, mode, base)
    compare(features(6, 2, 8), TARGETS["weights"], temperature, mode, base)


@EACH_TARGET
def test_rows_are_not_normalised(target):
    compare(features(6, 2, 5, scale=3.0) * torch.rand(6, 2, 1, dtype=torch.float64), target, 0.7)


@MODES
@pytest.mark.parametrize(
    "target", [{}, {"labels": LABELS}, {"mask": WEIGHTS}], ids=["none", "labels", "mask"]
)
def test_further_dimensions_are_flattened(mode, target):
    x = 0.4 * torch.randn(6, 2, 3, 2, 2, dtype=torch.float64)
    compare(x, target, 0.5, mode)
    flat, deep = (SupConLoss(0.5, mode)(y, **target) for y in (x.flatten(2), x))
    torch.testing.assert_close(deep, flat, rtol=1e-13, atol=0)


@MODES
@pytest.mark.parametrize(
    "labels",
    [
        LABELS.int(),
        LABELS.to(torch.int8),
        LABELS.abs().to(torch.uint8),
        LABELS.float(),
        LABELS == 3,
        HALVES,
        HALVES.double(),
        HALVES.half(),
        LABELS[:, None],
        HALVES[:, None],
        LABELS[None],
        torch.tensor([2**53, 2**53 + 1, 2**53, 5, -(2**63), 2**63 - 1]),
        torch.tensor([torch.inf, -torch.inf, torch.inf, 0, 1, 0]),
    ],
    ids=lambda x: f"{str(x.dtype)[6:]}-{list(x.shape)}",
)
def test_labels_of_any_dtype(labels, mode):
    compare(features(6, 2, 8), {"labels": labels}, mode=mode)


def test_nan_is_no_label():
    with pytest.raises(ValueError, match="labels"):
        SupConLoss()(features(6, 2, 8), torch.tensor([torch.nan, 1, torch.nan, 0, 1, 0]))


def test_more_rows_than_a_tile():
    labels = torch.randint(20, (150,))
    x = features(150, 2, 16)
    compare(x, {"labels": labels}, 0.1)
    compare(x, {"mask": (labels[:, None] == labels).float()}, 0.1)
    torch.testing.assert_close(
        SupConLoss()(x, labels), SupConLoss()(x, mask=(labels[:, None] == labels).float()), rtol=1e-12, atol=0
    )


@MODES
def test_anchors_without_positives_are_0_and_stay_in_the_mean(mode):
    x = features(6, 1, 8).requires_grad_()
    loss = SupConLoss(contrast_mode=mode)
    for value in (loss(x), loss(x, torch.arange(6)), loss(x, mask=torch.zeros(6, 6))):
        assert value == 0 and torch.autograd.grad(value, x)[0].eq(0).all()
    mask = torch.zeros(6, 6)
    mask[2, 3], mask[4, 5] = 1, 1e-7
    one = -(x[2, 0] @ x[[0, 1, 3, 4, 5], 0].T / 0.07).log_softmax(0)[2]
    torch.testing.assert_close(loss(x, mask=mask), one / 6, rtol=1e-5, atol=1e-6)


@MODES
def test_one_image_or_one_row(mode):
    """Of two views each is all that the other has: the truth is 0, of logits of 14."""
    compare(features(1, 2, 8), {}, mode=mode, floor=1e5)
    compare(features(1, 3, 8), {"labels": LABELS[:1]}, mode=mode)
    compare(features(1, 3, 8), {"mask": torch.ones(1, 1)}, mode=mode)


@MODES
@pytest.mark.parametrize("weight", [2**-6, 2**-10, 2**-14])
def test_faint_positives_beside_the_row_itself(mode, weight):
    """The mask's diagonal, which is no positive of one view, may be far larger than the rest."""
    mask = torch.eye(6) + weight * (torch.rand(6, 6) * (1 - torch.eye(6)))
    compare(features(6, 1, 8), {"mask": mask}, mode=mode)


@pytest.mark.parametrize("shape", [(6,), (6, 8)])
def test_too_few_dimensions(shape):
    with pytest.raises(ValueError, match="features"):
        SupConLoss()(torch.randn(shape))


@pytest.mark.parametrize(
    "arguments",
    [
        {"labels": LABELS, "mask": torch.eye(6)},
        {"labels": LABELS[:5]},
        {"labels": LABELS.repeat(2)},
        {"labels": torch.zeros(6, 2)},
    ],
    ids=["both", "fewer", "more", "two columns"],
)
def test_labels_and_masks_that_do_not_fit(arguments):
    with pytest.raises(ValueError):
        SupConLoss()(features(6, 2, 8), **arguments)


def test_unknown_mode_is_found_when_called():
    loss = SupConLoss(contrast_mode="any")
    for target in TARGETS.values():
        with pytest.raises(ValueError, match="any"):
            loss(features(6, 2, 8), **target)


def test_attributes_may_change_after_the_fact():
    x, loss = features(6, 2, 8), SupConLoss()
    loss.temperature, loss.contrast_mode, loss.base_temperature = 0.4, "one", 0.2
    torch.testing.assert_close(
        loss(x, LABELS), plain_interop.supcontrast(x, LABELS, None, 0.4, "one", 0.2), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(twin):
    x, loss = features(6, 2, 8), SupConLoss(0.3, "one", 0.1)
    assert torch.equal(twin(loss)(x, LABELS), loss(x, LABELS)) and type(twin(loss)) is SupConLoss


@EACH_TARGET
@MODES
def test_strides_do_not_matter(target, mode):
    x = features(2, 8, 6).permute(2, 0, 1)
    assert not x.is_contiguous()
    compare(x, target, mode=mode)
    loss = SupConLoss(contrast_mode=mode)
    torch.testing.assert_close(loss(x, **target), loss(x.contiguous(), **target), rtol=1e-13, atol=1e-13)
    turned = {k: v.repeat_interleave(2, 0)[::2] if k == "mask" else v for k, v in target.items()}
    torch.testing.assert_close(loss(x, **turned), loss(x, **target), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("name", ["none", "labels", "weights"])
def test_16_bits(dtype, rtol, name):
    x = features(6, 2, 8).to(dtype).requires_grad_()
    value = SupConLoss(0.2)(x, **TARGETS[name])
    exact = x.detach().double().requires_grad_()
    truth = plain_interop.supcontrast(exact, **TARGETS[name], temperature=0.2)
    torch.testing.assert_close(value.double(), truth, rtol=rtol, atol=0)
    (ours,), (its,) = torch.autograd.grad(value, x), torch.autograd.grad(truth, exact)
    assert ours.dtype == dtype and (ours.double() - its).norm() <= 2 * rtol * its.norm()


@EACH_TARGET
@MODES
def test_extreme_logits_stay_finite(target, mode):
    """Copies of one row, and logits whose exponentials overflow."""
    x = torch.randn(6, 2, 8)
    x[1], x[2] = x[0], 0
    x *= 30
    x.requires_grad_()
    value = SupConLoss(0.01, mode)(x, **target)
    assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


@MODES
@pytest.mark.parametrize("labels", [None, torch.arange(256) % 9])
def test_no_matrix_of_similarities(mode, labels):
    x = torch.randn(256, 2, 8, requires_grad=True)
    assert largest_tensor(lambda x: SupConLoss(contrast_mode=mode)(x, labels), [x]) <= 4 * x.numel()


def test_without_gradients():
    x = features(6, 2, 8)
    with torch.no_grad():
        assert not SupConLoss()(x.requires_grad_(), LABELS).requires_grad
    assert not SupConLoss()(x.detach(), LABELS).requires_grad
    fixed = LABELS.float()
    SupConLoss()(x, fixed).backward()
    assert fixed.grad is None and x.grad is not None
