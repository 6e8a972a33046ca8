"""What a program has replaced in a loss is respected, by the drop-ins and under patch()."""

import importlib

import pytest
import torch
from originals import assert_like_original, original
from torch import nn
from torch.nn import functional as F

from sslfast import interop
from sslfast.interop import lightly, open_clip


def rows(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(9, 5, dtype=torch.float64) for name in names}


@pytest.mark.parametrize("bank", [0, (12, 5)], ids=["", "bank"])
@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"reduction": "sum"}], ids=str)
def test_another_criterion(bank, options):
    peer = original("lightly.loss")
    kept = F.normalize(torch.randn(12, 5, dtype=torch.float64), dim=1)

    def loss(module):
        def call(out0, out1):
            loss = module.NTXentLoss(0.3, bank)
            loss.cross_entropy = nn.CrossEntropyLoss(**options)
            if bank:
                loss.memory_bank.bank = kept.to(out0.dtype, copy=True)
            return loss(out0, out1) + loss(out1, out0)

        return call

    assert_like_original(loss(lightly), loss(peer), rows("out0", "out1"), floor=256)


def scaled(base: type) -> type:
    """With logits of its own."""

    class Mine(base):
        def get_logits(self, *arguments, **options):
            logits = super().get_logits(*arguments, **options)
            return tuple(2 * x for x in logits) if isinstance(logits, tuple) else 2 * logits

    return Mine


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
@pytest.mark.parametrize("way", ["drop-in", "patched before", "patched after"])
def test_logits_of_ones_own(name, way):
    peer = original("open_clip.loss")
    leaves = rows("image_features", "text_features") | {"logit_scale": torch.tensor(3.0, dtype=torch.float64)}
    bias = -1.0 if name == "SigLipLoss" else None
    theirs = scaled(getattr(peer, name))()
    late = scaled(getattr(open_clip if way == "drop-in" else peer, name))
    x, y, scale = leaves.values()
    expected = theirs(x, y, scale, bias)
    assert not torch.isclose(expected, getattr(peer, name)()(x, y, scale, bias))
    if way != "drop-in":
        interop.patch("open_clip")
    try:
        ours = theirs if way == "patched before" else late()
        torch.testing.assert_close(ours(x, y, scale, bias), expected)
    finally:
        interop.unpatch("open_clip")


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_a_formula_of_ones_own_in_a_memory(name):
    losses = original("pytorch_metric_learning.losses")
    ours = importlib.import_module("sslfast.interop.pytorch_metric_learning")

    def steps(module):
        class Mine(getattr(module, name)):
            def _compute_loss(self, *arguments):
                found = super()._compute_loss(*arguments)
                found["loss"]["losses"] = found["loss"]["losses"] ** 2
                return found

        Mine.__name__ = name  # CrossBatchMemory looks at it

        def call(x0, x1):
            memory = module.CrossBatchMemory(Mine(), 5, 20)
            labels = torch.arange(9) % 3
            return memory(x0, labels) + memory(x1, labels)

        return call

    assert_like_original(steps(ours), steps(losses), rows("x0", "x1"))


def test_a_patch_that_fails_leaves_nothing(monkeypatch):
    original("lightly")
    before = {name: dict(vars(getattr(original("lightly.loss"), name))) for name in ("NTXentLoss", "DCLLoss")}
    seen = []

    def fails(owner, values):
        if seen:
            raise RuntimeError("no more")
        seen.append(owner)
        return set_(owner, values)

    set_ = interop._set
    monkeypatch.setattr(interop, "_set", fails)
    with pytest.raises(RuntimeError, match="no more"):
        interop.patch("lightly")
    assert seen and not interop.patched()
    assert all(dict(vars(getattr(original("lightly.loss"), k))) == x for k, x in before.items())


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_processes_that_are_not_there(name):
    loss = getattr(open_clip, name)(rank=1, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        loss(torch.randn(4, 3), torch.randn(4, 3), 2.0, -1.0)
