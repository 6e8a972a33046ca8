"""Every contrastive loss on Triton's kernels, in their interpreter, against C++ in float64."""

import pytest
from interpreter import INTERPRETED, larger_tiles
from losses import LOSSES, Inputs, made, step
from sslfast.kernels import tuning

import sslfast

pytestmark = INTERPRETED


@pytest.mark.parametrize("form", ["flash", "chunked"])
@pytest.mark.parametrize("name", LOSSES)
def test_as_in_double(name, form, monkeypatch):
    larger_tiles(monkeypatch)
    monkeypatch.setattr(tuning, "form", lambda *args: form)
    loss, leaves, constants = made(name, Inputs("cpu", 50, 24))
    with sslfast.use_backend("triton"):
        found = step(loss, leaves, constants)
    expected = step(loss, tuple(x.detach().double().requires_grad_() for x in leaves), constants)
    for x, y in zip(found, expected, strict=True):
        assert (x.double() - y).norm() <= 2e-5 * y.norm() + 1e-7
