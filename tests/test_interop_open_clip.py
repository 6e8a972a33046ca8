"""sslfast.interop.open_clip beside the installed open_clip: values, gradients, labels, several processes."""

import copy
import functools
import inspect
import pickle

import interop_processes
import numpy as np
import processes
import pytest
import torch
from explicit import largest_tensor, unit
from originals import FLOOR, assert_like_original, assert_signature, evaluate, original, same_error
from torch import Tensor

from sslfast.interop import open_clip as ours
from sslfast.testing import assert_no_worse

peer = original("open_clip.loss")
NAMES = ("ClipLoss", "SigLipLoss")
BOTH = pytest.mark.parametrize("name", NAMES)
IMPLEMENTATIONS = ("bidir", "shift", "reduce", "gather", None)


def pair(name: str, *args, **options) -> list:
    """[ours, the original]"""
    return [getattr(module, name)(*args, **options) for module in (ours, peer)]


def features(n: int, d: int, alike: float = 0.0) -> dict[str, Tensor]:
    """Rows of unit length in float64; the texts more or less like their images."""
    image, text = torch.randn(2, n, d, dtype=torch.float64)
    return {"image_features": unit(image), "text_features": unit(text + alike * image)}


def leaf(value: float, *shape: int) -> Tensor:
    return torch.full(shape, value, dtype=torch.float64)


def compare(losses: list, leaves: dict[str, Tensor], largest: float = 0, **fixed) -> None:
    """`fixed` tensors follow the features' dtype and get no gradient. A probability has the rounding error of
    its logit, of which `largest` is the largest."""

    def call(loss):
        def inner(**given):
            dtype = given["image_features"].dtype
            rest = {k: x.to(dtype) if isinstance(x, Tensor) else x for k, x in fixed.items()}
            return loss(**given, **rest)

        return inner

    assert_like_original(*map(call, losses), leaves, max(FLOOR, 2 * largest))


@BOTH
def test_signatures(name):
    mine, its = getattr(ours, name), getattr(peer, name)
    for method in ("__init__", "forward", "get_logits", "get_ground_truth"):
        assert_signature(getattr(mine, method), getattr(its, method))


@BOTH
@pytest.mark.parametrize("options", [{}, {"cache_labels": True, "rank": 2, "world_size": 3}])
def test_attributes(name, options):
    mine, its = pair(name, **options)
    for key, value in vars(its).items():
        if not key.startswith("_"):
            assert getattr(mine, key) == value, key
    assert mine.state_dict() == its.state_dict() == {}
    assert [*mine.buffers(), *mine.parameters()] == []


@pytest.mark.parametrize("dist_impl", [*IMPLEMENTATIONS, ""])
def test_dist_impl_is_kept(dist_impl):
    mine, its = pair("SigLipLoss", dist_impl=dist_impl)
    assert mine.dist_impl == its.dist_impl
    compare([mine, its], features(6, 4), logit_scale=3.0, logit_bias=-1.0)


@BOTH
def test_arguments_by_position(name):
    given = [*(x.requires_grad_() for x in features(6, 4).values()), leaf(5.0), leaf(-2.0)]
    for given_first in ((), (True,), (False, 0)):
        mine, its = pair(name, *given_first)
        torch.testing.assert_close(mine(*given), its(*given))
        torch.testing.assert_close(mine(*given, True), its(*given, True))


@BOTH
@pytest.mark.parametrize("n, d", [(1, 5), (33, 7), (257, 5), (64, 200)])
@pytest.mark.parametrize("scale, bias", [(1.0, 0.0), (14.3, -10.0), (100.0, 2.5), (-3.0, -1.0), (0.0, 1.0)])
def test_values_and_gradients(name, n, d, scale, bias):
    leaves = features(n, d, 0.5 if abs(scale) < 20 else 0) | {"logit_scale": leaf(scale)}
    if name == "SigLipLoss":
        compare(pair(name), leaves | {"logit_bias": leaf(bias)}, abs(scale))
    else:
        compare(pair(name), leaves, abs(scale))
        compare(pair(name), leaves, abs(scale), logit_bias=leaf(bias))


def extended(name: str, image: Tensor, text: Tensor, scale: float, bias: float) -> tuple[list, list]:
    """The loss and its gradients by both features, in extended precision; and the sizes of what they sum."""
    x, y = (v.numpy().astype(np.longdouble) for v in (image, text))
    z, own = scale * (x @ y.T), np.eye(len(x), dtype=bool)
    if name == "SigLipLoss":
        z = np.where(own, 1, -1) * (z + bias)
        slope, terms = np.where(own, -1, 1) / (1 + np.exp(z)), np.log1p(np.exp(-z))
    else:
        rest, terms, slope = np.where(own, 0, 1), [], 0
        for side in (z, z.T):  # a positive's own gradient, p - 1, from the other probabilities
            gap = np.exp(side - side.diagonal()[:, None])
            others = (rest * gap).sum(1, keepdims=True)
            p = np.where(own, -others, gap) / (1 + others)
            slope = slope + (p if side is z else p.T) / 2
            terms.append(np.log1p(others) / 2)
        terms = terms[0] + terms[1]
    found = [terms.sum(), scale * (slope @ y), scale * (slope.T @ x)]
    sizes = [terms.sum(), scale * (abs(slope) @ abs(y)).max(), scale * (abs(slope).T @ abs(x)).max()]
    return [v / len(x) for v in found], [v / len(x) for v in sizes]


@BOTH
@pytest.mark.parametrize("n, d", [(2, 1), (33, 7), (64, 200)])
@pytest.mark.parametrize("scale, bias", [(3.0, 0.0), (14.0, -10.0), (100.0, -50.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_certain_pairs_have_more_digits(name, n, d, scale, bias, dtype):
    """Where a cross-entropy subtracts numbers that are almost equal."""
    leaves = {k: x.to(dtype) for k, x in features(n, d, 3.0).items()}
    truth, sizes = extended(name, *leaves.values(), scale, bias)
    found = []
    for loss in pair(name):
        value, slopes = evaluate(functools.partial(loss, logit_scale=scale, logit_bias=bias), leaves)
        found.append(
            [np.abs(x.numpy() - y).max() for x, y in zip((value, *slopes.values()), truth, strict=True)]
        )
    for mine, its, size in zip(*found, sizes, strict=True):
        assert mine <= 2 * its + (8 + 2 * scale) * torch.finfo(dtype).eps * size


NUMBERS = {"0-d": lambda x: leaf(x), "[1]": lambda x: leaf(x, 1), "float": float, "int": int}


@BOTH
@pytest.mark.parametrize("scale", NUMBERS)
@pytest.mark.parametrize("bias", [*NUMBERS, "None"])
def test_every_form_of_scale_and_bias(name, scale, bias):
    numbers = {
        "logit_scale": NUMBERS[scale](9.0),
        "logit_bias": None if bias == "None" else NUMBERS[bias](-4.0),
    }
    graded = {k: x for k, x in numbers.items() if isinstance(x, Tensor)}
    if name == "ClipLoss":
        graded.pop("logit_bias", None)
    fixed = {k: x for k, x in numbers.items() if k not in graded}
    compare(pair(name), features(20, 6) | graded, **fixed)


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_bias_of_clip_has_no_gradient(shape, dtype):
    leaves = features(20, 6) | {"logit_scale": leaf(9.0, *shape), "logit_bias": leaf(-4.0, *shape)}
    leaves = {k: x.to(dtype).requires_grad_() for k, x in leaves.items()}
    (slope,) = torch.autograd.grad(ours.ClipLoss()(**leaves), leaves["logit_bias"])  # but it has one
    assert slope.shape == shape and slope.dtype == dtype
    assert slope.abs().max() <= 4 * torch.finfo(dtype).eps


@BOTH
def test_upstream_gradient_and_one_tensor_for_both(name):
    mine, its = pair(name)

    def call(loss):
        return lambda x, s: -1.7 * loss(x, x, s, s * -0.3)

    assert_like_original(call(mine), call(its), {"x": features(20, 6)["image_features"], "s": leaf(7.0)})


@BOTH
@pytest.mark.parametrize("sizes", [(1e-4, 1e-4), (50.0, 0.1), (10.0, 10.0)])
def test_rows_are_not_normalised(name, sizes):
    leaves = {k: x * size for (k, x), size in zip(features(30, 8).items(), sizes, strict=True)}
    compare(pair(name), leaves | {"logit_scale": leaf(4.0)}, 4 * sizes[0] * sizes[1], logit_bias=-2.0)


@BOTH
def test_zero_rows_strides_and_no_gradient(name):
    wide = torch.randn(30, 20, dtype=torch.float64)
    wide[:, 3] = 0
    leaves = {"image_features": wide.T, "text_features": torch.randn(20, 60, dtype=torch.float64)[:, ::2]}
    compare(pair(name), leaves | {"logit_scale": leaf(2.0)}, logit_bias=None)
    mine, its = pair(name)
    given = {**leaves, "logit_scale": 2.0, "logit_bias": -1.0}
    assert not mine(**given).requires_grad
    torch.testing.assert_close(mine(**given), its(**given))
    for wanted in leaves:
        slopes = []
        for loss in (mine, its):
            x = leaves[wanted].clone().requires_grad_()
            slopes.append(torch.autograd.grad(loss(**{**given, wanted: x}), x)[0])
        torch.testing.assert_close(*slopes)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_dict(name, dtype):
    given = {k: x.to(dtype) for k, x in features(12, 4).items()}
    mine, its = (f(**given, logit_scale=3.0, logit_bias=-1.0, output_dict=True) for f in pair(name))
    assert mine.keys() == its.keys() == {"contrastive_loss"}
    torch.testing.assert_close(mine["contrastive_loss"], its["contrastive_loss"])
    plain = getattr(ours, name)()(**given, logit_scale=3.0, logit_bias=-1.0)
    assert torch.equal(plain, mine["contrastive_loss"]) and plain.shape == () and plain.dtype == dtype


@BOTH
@pytest.mark.parametrize("bias", [None, -3.0, leaf(-3.0), leaf(-3.0, 1)], ids=str)
@pytest.mark.parametrize("scale", [leaf(5.0), leaf(5.0, 1), 5.0], ids=str)
def test_logits(name, bias, scale):
    weights = torch.randn(12, 12, dtype=torch.float64)
    graded = {k: x for k, x in {"logit_scale": scale, "logit_bias": bias}.items() if isinstance(x, Tensor)}
    fixed = {k: x for k, x in {"logit_scale": scale, "logit_bias": bias}.items() if k not in graded}

    def call(loss):
        def inner(**given):
            found = loss.get_logits(**given, **fixed)
            sides = (found,) if name == "SigLipLoss" else found
            assert isinstance(found, Tensor if name == "SigLipLoss" else tuple)
            return sum((i + 1) * (weights.to(x.dtype) * x).sum() for i, x in enumerate(sides))

        return inner

    assert_like_original(*map(call, pair(name)), features(12, 4) | graded)
    for mine, its in zip(
        *(f.get_logits(**features_of_one, logit_scale=2.0) for f in pair(name)), strict=True
    ):
        torch.testing.assert_close(mine, its)


features_of_one = {
    "image_features": torch.linspace(0, 1, 12).view(4, 3),
    "text_features": torch.ones(4, 3),
}


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("place", [{}, {"rank": 1, "world_size": 3}])
def test_labels_of_clip(cache, local, place):
    mine, its = pair("ClipLoss", cache_labels=cache, local_loss=local, **place)
    device, kept = torch.device("cpu"), []
    for count in (4, 4, 7, 0, 7, 4):
        found, expected = (f.get_ground_truth(device, count) for f in (mine, its))
        assert torch.equal(found, expected) and found.dtype == expected.dtype
        assert mine.prev_num_logits == its.prev_num_logits
        assert mine.labels.keys() == its.labels.keys()
        kept.append(found)
    assert (kept[0] is kept[1]) == cache


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [(), (True,), (False,)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_labels_of_siglip(dtype, options, count):
    found, expected = (
        f.get_ground_truth(torch.device("cpu"), dtype, count, *options) for f in pair("SigLipLoss")
    )
    assert torch.equal(found, expected) and found.dtype == expected.dtype


@BOTH
def test_cached_labels_do_not_outlive_their_batch(name):
    losses = pair(name, cache_labels=True)
    for n in (5, 5, 9, 5):
        compare(losses, features(n, 4) | {"logit_scale": leaf(3.0)}, logit_bias=-1.0)


@BOTH
def test_copies(name):
    mine, given = getattr(ours, name)(cache_labels=True), {**features_of_one, "logit_scale": 2.0}
    expected = mine(**given, logit_bias=-1.0)
    if name == "ClipLoss":
        mine.get_ground_truth(torch.device("cpu"), 4)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other(**given, logit_bias=-1.0), expected) and other.cache_labels


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", ["same", torch.float32])
def test_16_bit(name, dtype, scale_dtype):
    """The loss is float32; it and the gradients are close to the truth, no worse than the original's."""
    mine, its = pair(name)
    leaves = {k: x.to(dtype) for k, x in features(60, 24, 1.0).items()}
    numbers = {"logit_scale": leaf(10.0), "logit_bias": leaf(-5.0)}
    numbers = {k: x.to(dtype if scale_dtype == "same" else scale_dtype) for k, x in numbers.items()}
    if name == "ClipLoss":
        del numbers["logit_bias"]
    leaves |= numbers
    truth, slopes = evaluate(its, {k: x.double() for k, x in leaves.items()})
    yard, yard_slopes = evaluate(its, leaves)
    value, found = evaluate(mine, leaves)
    assert value.dtype == torch.float32
    assert_no_worse("value", value, truth, yard, 1e-4)
    eps = torch.finfo(dtype).eps
    assert abs(value - truth) <= eps * truth
    for key, slope in slopes.items():
        assert found[key].dtype == leaves[key].dtype, key
        assert_no_worse(key, found[key], slope, yard_slopes[key], eps * slope.abs().max().item())
        assert (found[key] - slope).norm() <= 4 * eps * slope.norm(), key


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(name, dtype):
    def call(**given):
        with torch.autocast("cpu", torch.bfloat16):
            return getattr(ours, name)()(**given)

    leaves = {k: x.to(dtype) for k, x in features(60, 24, 1.0).items()} | {"logit_scale": torch.tensor(10.0)}
    leaves |= {"logit_bias": torch.tensor(-5.0)} if name == "SigLipLoss" else {}
    truth, slopes = evaluate(getattr(peer, name)(), {k: x.double() for k, x in leaves.items()})
    value, found = evaluate(call, leaves)
    assert value.dtype == torch.float32 and abs(value - truth) <= 0.02 * truth
    for key, slope in slopes.items():
        assert found[key].dtype == leaves[key].dtype, key
        assert (found[key] - slope).norm() <= 0.05 * slope.norm(), key


def test_errors():
    same_error(*(functools.partial(m.SigLipLoss, dist_impl="ring") for m in (ours, peer)))
    same_error(*(functools.partial(m.SigLipLoss, 1, 2, 3, 4) for m in (ours, peer)))
    for name in NAMES:
        same_error(*(functools.partial(f, **features_of_one) for f in pair(name)))  # no scale


def test_horovod_is_refused_only_where_it_would_be_used():
    given = {**features_of_one, "logit_scale": 2.0}
    alone = ours.ClipLoss(use_horovod=True)
    torch.testing.assert_close(alone(**given), peer.ClipLoss()(**given))
    with pytest.raises(NotImplementedError, match="use_horovod"):
        ours.ClipLoss(world_size=2, use_horovod=True)(**given)


@BOTH
@pytest.mark.parametrize(
    "shapes, wrong",
    [
        (((4, 3), (4, 5)), "text_features"),
        (((4, 3), (5, 3)), "text_features"),
        (((4,), (4, 3)), "image_features"),
        (((4, 3), (1, 4, 3)), "text_features"),
    ],
)
def test_wrong_shapes_are_named(name, shapes, wrong):
    loss = getattr(ours, name)()
    with pytest.raises((ValueError, TypeError), match=f"^{wrong}: expected .*, got "):
        loss(*(torch.randn(shape) for shape in shapes), 2.0, -1.0)


@BOTH
@pytest.mark.parametrize("which", ["logit_scale", "logit_bias"])
@pytest.mark.parametrize("value", ["2", torch.ones(2), torch.ones(1, 3)], ids=["text", "two", "row"])
def test_wrong_numbers_are_named(name, which, value):
    given = {"logit_scale": 2.0, "logit_bias": -1.0, which: value}
    with pytest.raises((ValueError, TypeError), match=f"^{which}: expected .*, got "):
        getattr(ours, name)()(**features_of_one, **given)


@BOTH
def test_no_matrix_of_logits(name):
    leaves = [x.float().requires_grad_() for x in features(700, 4).values()]
    leaves += [torch.tensor(x, requires_grad=True) for x in (5.0, -2.0)]
    mine, its = pair(name)
    assert largest_tensor(mine, leaves) <= 700 * 700 // 4
    assert largest_tensor(its, leaves) >= 700 * 700


def test_chunk_size_changes_nothing():
    if "chunk_size" not in inspect.signature(ours.SigLipLoss).parameters:
        pytest.skip("no chunk_size")
    for size in (1, 7, 100):
        losses = [ours.SigLipLoss(chunk_size=size), peer.SigLipLoss()]
        compare(losses, features(20, 6) | {"logit_scale": leaf(3.0), "logit_bias": leaf(-1.0)})


def test_groups_of_three_and_two_processes(tmp_path):
    """Every option with and without gradients of other processes, and every dist_impl."""
    worker = functools.partial(
        interop_processes.in_groups,
        check=interop_processes.open_clip_losses,
        splits=[[2, 1]],
        folder=tmp_path,
    )
    differences = sum(processes.run(worker, 3, tmp_path / "run"), [])
    assert not differences, "\n".join(differences)
