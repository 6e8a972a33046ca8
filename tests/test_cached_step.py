"""cached_step: the gradients of one batch, and the states of one run over its chunks, in a chunk's memory."""

import functools
from contextlib import nullcontext

import cached_processes
import processes
import pytest
import torch
from cached_encoders import ROWS, Recorder, Temperature, Towers, batch, chunked, gradients, mlp, near
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sslfast import (
    CLIPLoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    clip_loss,
    dcl_loss,
    info_nce_loss,
    ntxent_loss,
    siglip_loss,
    supcon_loss,
)
from sslfast.cached import cached_step

MICRO_BATCHES = (1, 3, 4, ROWS, 50)
LABELS = torch.arange(ROWS) % 4
double = functools.partial(torch.tensor, dtype=torch.float64, requires_grad=True)
SCALE, BIAS = double(1.2), double(-2.0)
LOSSES = {
    "ntxent": ntxent_loss,
    "NTXentLoss": NTXentLoss(0.3),
    "info_nce": functools.partial(info_nce_loss, symmetric=True),
    "dcl": dcl_loss,
    "clip": lambda x, y: clip_loss(x, y, SCALE.exp()),
    "CLIPLoss": lambda x, y: CLIPLoss()(x, y, SCALE.exp()),
    "siglip": lambda x, y: siglip_loss(x, y, SCALE.exp(), BIAS),
    "SigLIPLoss": lambda x, y: SigLIPLoss()(x, y, SCALE.exp(), BIAS),
    "supcon": lambda x, y: supcon_loss(torch.stack((x, y), 1), LABELS),
    "SupConLoss": lambda x, y: SupConLoss()(torch.cat((x, y)), LABELS.repeat(2)),
}


def taken(*tensors: torch.Tensor) -> list[torch.Tensor | None]:
    """Gradients of tensors, which have none afterwards."""
    found = [x.grad for x in tensors]
    for x in tensors:
        x.grad = None
    return found


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_of_one_batch(name, micro_batch):
    encoder, loss, (x, y) = mlp(), LOSSES[name], batch(5, 5)
    expected = loss(encoder(x), encoder(y))
    expected.backward()
    gradient = gradients(encoder) + taken(SCALE, BIAS)
    found = cached_step(encoder, (x, y), loss, micro_batch)
    assert not found.requires_grad
    assert near([found], [expected.detach()])
    assert near(gradients(encoder) + taken(SCALE, BIAS), gradient)


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_towers_and_a_learnable_temperature(micro_batch):
    towers, loss, inputs = (mlp(), mlp(width=3)), Temperature(), batch(5, 3)
    loss(*(tower(x) for tower, x in zip(towers, inputs, strict=True))).backward()
    expected = gradients(*towers, loss)
    assert all(g is not None and g.abs().sum() > 0 for g in expected)
    for encoders in (towers, list(towers), nn.ModuleList(towers)):
        cached_step(encoders, inputs, loss, micro_batch)
        assert near(gradients(*towers, loss), expected)


def test_one_input_three_inputs_and_different_numbers_of_rows():
    encoder = mlp()
    for sizes in ((7,), (7, 2, 10)):
        inputs = [torch.randn(n, 5, dtype=torch.float64) for n in sizes]

        def loss(*z):
            return (torch.cat(z) @ z[0].T).logsumexp(1).mean()

        loss(*map(encoder, inputs)).backward()
        expected = gradients(encoder)
        cached_step(encoder, inputs, loss, 3)
        assert near(gradients(encoder), expected)


def test_parameters_of_the_encoder_in_the_loss():
    encoder, (x, y) = mlp(), batch(5, 5)

    def loss(x, y):
        return clip_loss(x, y, encoder[0].bias[0].exp()) + encoder[2].weight.square().sum()

    loss(encoder(x), encoder(y)).backward()
    expected = gradients(encoder)
    cached_step(encoder, (x, y), loss, 3)
    assert near(gradients(encoder), expected)


def test_gradients_are_added_to_those_there():
    encoder, (x, y) = mlp(), batch(5, 5)
    (encoder(x).sum() + ntxent_loss(encoder(x), encoder(y))).backward()
    expected = gradients(encoder)
    encoder(x).sum().backward()
    cached_step(encoder, (x, y), ntxent_loss, 3)
    assert near(gradients(encoder), expected)


class Several(nn.Module):
    """An encoder of several tensors and other things."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x, mask, scale=None, *, nested=None, mode="no"):
        assert mode == "yes" and scale == 0.5
        first, (second, name) = nested["pair"]
        assert name == "name" and len(first) == len(second) == len(x)
        return self.body(x * mask * scale + first + second)


def test_inputs_of_several_tensors():
    encoder = Several()
    (x, mask, first, second), (y,) = batch(5, 5, 5, 5), batch(4)
    nested = {"pair": [first, (second, "name")]}
    named = {"x": x, "mask": mask, "scale": 0.5, "nested": nested, "mode": "yes"}
    ntxent_loss(encoder(**named), y).backward()
    expected = gradients(encoder)
    cached_step((encoder, nn.Identity()), (named, y), ntxent_loss, 3)
    assert near(gradients(encoder), expected)
    for inputs in ((x, mask, 0.5, nested), [x, mask, 0.5, nested]):

        def placed(x, mask, scale, nested):
            return encoder(x, mask, scale, nested=nested, mode="yes")

        cached_step((placed, nn.Identity()), (inputs, y), ntxent_loss, 3)
        assert near(gradients(encoder), expected)


@pytest.mark.parametrize("used", ["leaf", "graph", "both views", "one of two"])
def test_inputs_that_require_grad(used):
    encoder, stem, (x, y) = mlp(), nn.Linear(5, 5).double(), batch(5, 5)
    x.requires_grad_()

    def step(run):
        start = stem(x) if used == "graph" else x
        inputs = (start, start) if used == "both views" else (start, y)
        run(inputs)
        return taken(x) + gradients(encoder, stem)

    def loss(x, y):
        return ntxent_loss(x.detach() if used == "one of two" else x, y + x.detach().mean(1, keepdim=True))

    expected = step(lambda inputs: loss(*map(encoder, inputs)).backward())
    assert near(step(lambda inputs: cached_step(encoder, inputs, loss, 3)), expected)


def test_chunks_of_even_size():
    """No chunk of one row, of which BatchNorm has no variance, where there is one more than fits."""
    encoder = Recorder(mlp(nn.BatchNorm1d(8)))
    cached_step(encoder, batch(5, 5, rows=9), ntxent_loss, 8)
    assert [rows for _, rows, _, _ in encoder.runs] == [5, 4] * 4


@given(st.integers(1, 60), st.integers(1, 70))
def test_sizes_of_chunks(rows, micro_batch):
    encoder = Recorder(nn.Linear(1, 1))
    x = torch.arange(float(rows))[:, None]
    seen = []
    cached_step(encoder, [x], lambda z: seen.append(z.detach().clone()) or z.sum(), micro_batch)
    sizes = [n for graph, n, _, _ in encoder.runs if graph]
    assert sum(sizes) == rows and max(sizes) <= micro_batch and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-rows // micro_batch)
    torch.testing.assert_close(seen[0], encoder.inside(x).detach())


def test_frozen_encoder_runs_once():
    """LiT: the image tower's parameters are fixed."""
    image, text, inputs = Recorder(mlp().requires_grad_(False)), Recorder(mlp(width=3)), batch(5, 3)
    loss, wants = Temperature(), []
    loss(image.inside(inputs[0]), text.inside(inputs[1])).backward()
    expected = gradients(text, loss)
    cached_step((image, text), inputs, loss, 4)
    assert near(gradients(text, loss), expected)
    assert [len(image.runs), len(text.runs)] == [3, 6]
    cached_step((image, text), inputs, lambda x, y: (wants.append(x.requires_grad), loss(x, y))[1], 4)
    assert wants == [False]
    image.runs.clear()
    cached_step((image.forward, text), inputs, loss, 4)
    assert len(image.runs) == 3
    x, y = inputs
    cached_step((image, text), (x.requires_grad_(), y), loss, 4)
    assert len(image.runs) == 9 and x.grad is not None


def test_only_the_loss_has_parameters():
    encoder, loss, inputs = Recorder(mlp().requires_grad_(False)), Temperature(), batch(5, 5)
    loss(*map(encoder.inside, inputs)).backward()
    expected = gradients(loss)
    cached_step(encoder, inputs, loss, 3)
    assert near(gradients(loss), expected) and len(encoder.runs) == 8


def test_encoder_without_a_graph_of_its_own():
    """A function whose second run has no gradient to give."""
    student, teacher, inputs = mlp(), mlp(), batch(5, 5)

    @torch.no_grad()
    def target(x):
        return teacher(x)

    ntxent_loss(student(inputs[0]), target(inputs[1])).backward()
    expected = gradients(student)
    cached_step((student, target), inputs, ntxent_loss, 3)
    assert near(gradients(student, teacher), expected + [None] * 4)


def test_input_that_the_loss_gives_no_gradient():
    first, second = Recorder(mlp()), Recorder(mlp())
    cached_step((first, second), batch(5, 5), lambda x, y: y.sum(), 4)
    assert [len(first.runs), len(second.runs)] == [3, 6]
    assert gradients(first) == [None] * 4


def test_encoder_that_writes_into_its_input():
    encoder, (x, y) = mlp(), batch(5, 5)

    def shift(x):
        return encoder(x.mul_(2))

    copies = [x.clone(), y.clone()]
    ntxent_loss(*map(shift, copies)).backward()
    expected = gradients(encoder)
    cached_step(shift, (x, y), ntxent_loss, 3)
    assert near(gradients(encoder), expected) and near([x, y], copies)


def test_methods_of_one_model():
    model, (x, y) = Towers(), batch(5, 3)
    clip_loss(model.image(x), model.text(y), model.log_scale.exp()).backward()
    expected = gradients(model)
    encoders = model.encode_image, model.encode_text
    cached_step(encoders, (x, y), lambda x, y: clip_loss(x, y, model.log_scale.exp()), 3)
    assert near(gradients(model), expected)


@pytest.mark.parametrize("within", [False, True])
def test_autocast(within):
    """Weights that the first runs cast, without a graph, are not those of the second."""
    encoder, (x, y) = mlp(nn.Dropout(0.2)).float(), [z.float() for z in batch(5, 5)]
    random = torch.get_rng_state()
    loss, seen = Temperature().float(), []

    def forward(x):
        with torch.autocast("cpu", torch.bfloat16) if within else nullcontext():
            z = encoder(x)
        seen.append(z.dtype)
        return z

    with torch.autocast("cpu", torch.bfloat16, enabled=not within, cache_enabled=False):
        value = loss(chunked(forward, x, 3), chunked(forward, y, 3))
    value.backward()
    expected = gradients(encoder, loss)
    torch.set_rng_state(random)
    with torch.autocast("cpu", torch.bfloat16, enabled=not within):
        found = cached_step(forward, (x, y), loss, 3)
        assert torch.is_autocast_enabled("cpu") != within
    assert set(seen) == {torch.bfloat16} and found == value.detach()
    assert near(gradients(encoder, loss), expected, 1e-6)


def test_backward_is_not_cast():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dz):
            casts.append(torch.is_autocast_enabled("cpu"))
            return dz

    casts, encoder = [], mlp().float()
    with torch.autocast("cpu", torch.bfloat16):
        cached_step(
            lambda x: Product.apply(encoder(x)),
            [z.float() for z in batch(5, 5)],
            lambda x, y: ntxent_loss(Product.apply(x), y),
            4,
        )
    assert casts == [False] * 7


def test_scaler():
    encoder, loss, inputs = mlp(), Temperature(), batch(5, 5)
    value = loss(*map(encoder, inputs))
    value.backward()
    expected = gradients(encoder, loss)
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        found = cached_step(encoder, inputs, loss, 3, scaler=scaler)
        scale = 256 if enabled else 1
        assert near([found], [value.detach()])
        assert near(gradients(encoder, loss), [scale * g for g in expected])
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    cached_step(encoder, inputs, loss, 3, scaler=scaler)
    scaler.unscale_(torch.optim.SGD([*encoder.parameters(), *loss.parameters()]))
    assert near(gradients(encoder, loss), expected)


class Held:
    """Bytes that graphs hold beside a module's parameters: now, and at most."""

    def __init__(self, module: nn.Module) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.now = self.most = 0

    def peak(self, step) -> int:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: Saved(self, x), lambda saved: saved.x):
            step()
        assert self.now == 0
        return self.most


class Saved:
    def __init__(self, held: Held, x: torch.Tensor) -> None:
        counts = x.untyped_storage().data_ptr() not in held.weights
        self.held, self.x, self.size = held, x.detach(), counts * x.numel() * x.element_size()
        held.now += self.size
        held.most = max(held.most, held.now)

    def __del__(self) -> None:
        self.held.now -= self.size


@pytest.mark.parametrize("micro_batch", [8, 32])
def test_memory_is_that_of_a_chunk(micro_batch):
    encoder = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(32, 32), nn.Tanh())])
    x, y = torch.randn(2, 256, 32)

    def loss(x, y):  # its graph, the same either way, is small beside those of the encoders
        return (x[:, 0] * y[:, 0]).sum()

    plain = Held(encoder).peak(lambda: loss(encoder(x), encoder(y)).backward())
    cached = Held(encoder).peak(lambda: cached_step(encoder, (x, y), loss, micro_batch))
    assert cached <= 1.1 * plain * micro_batch / (2 * 256)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    return processes.run(cached_processes.run_all, 2, tmp_path_factory.mktemp("run") / "gloo")


@pytest.mark.parametrize("name", cached_processes.SCENARIOS)
def test_distributed_data_parallel(scenarios, name):
    first, second = (found[name] for found in scenarios)
    if name != "uneven":
        assert first == second == []
        return
    cause = (
        "inputs[1]: expected as many chunks on all processes of a DistributedDataParallel module, got from"
    )
    assert first == second == [f"{cause} 1 to 2", f"{cause} 0 to 2"]
