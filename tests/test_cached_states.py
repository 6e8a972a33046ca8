"""cached_step: random numbers and buffers of its two runs, and where they end."""

import functools

import pytest
import torch
from cached_encoders import ROWS, Recorder, batch, buffers, chunked, gradients, mlp, near, spectral
from torch import nn

from sslfast import ntxent_loss
from sslfast.cached import cached_step


class DropPath(nn.Module):
    def forward(self, x):
        return x * (torch.rand(len(x), 1) < 0.7) if self.training else x


class Rebinding(nn.Module):
    """Its buffer becomes another tensor with each run, and is there only after the first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        old = torch.zeros((), dtype=x.dtype) if self.mean is None else self.mean
        self.mean = 0.5 * old + 0.5 * x.detach().mean()
        return x - self.mean


ENCODERS = {
    "dropout": lambda: mlp(nn.Dropout(0.4)),
    "drop path": lambda: mlp(DropPath()),
    "batchnorm": lambda: mlp(nn.BatchNorm1d(8)),
    "batchnorm, cumulative": lambda: mlp(nn.BatchNorm1d(8, momentum=None)),
    "spectral norm": lambda: spectral(mlp()),
    "rebinding": lambda: mlp(Rebinding()),
    "all": lambda: spectral(mlp(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.3), Rebinding()))),
}


def noisy_loss(x, y):
    """Draws a random number too, after those of the encoders."""
    return ntxent_loss(x, y) * (1 + torch.rand((), dtype=torch.float64))


@pytest.mark.parametrize("micro_batch", [3, 4, ROWS])
@pytest.mark.parametrize("name", ENCODERS)
def test_states_of_one_run_over_the_chunks(name, micro_batch):
    """Gradients are those of its random numbers and statistics, and both end where it leaves them."""
    encoder, (x, y) = ENCODERS[name](), batch(5, 5)
    start, random = {k: b.clone() for k, b in encoder.state_dict().items()}, torch.get_rng_state()
    value = noisy_loss(chunked(encoder, x, micro_batch), chunked(encoder, y, micro_batch))
    value.backward()
    expected = [value.detach(), *gradients(encoder), *buffers(encoder), torch.rand(3)]

    for module in encoder.modules():
        if isinstance(module, Rebinding):
            module.mean = None
    encoder.load_state_dict(start)
    torch.set_rng_state(random)
    value = cached_step(encoder, (x, y), noisy_loss, micro_batch)
    assert near([value, *gradients(encoder), *buffers(encoder), torch.rand(3)], expected)


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in ("rebinding", "all")])
def test_encoder_in_evaluation_mode(name):
    encoder, (x, y) = ENCODERS[name](), batch(5, 5)
    encoder(x)
    encoder.eval()
    before = buffers(encoder)
    ntxent_loss(encoder(x), encoder(y)).backward()
    expected = gradients(encoder)
    cached_step(encoder, (x, y), ntxent_loss, 3)
    assert near(gradients(encoder), expected)
    assert near(buffers(encoder), before, 0)


def test_second_runs_see_what_the_first_saw():
    encoder = Recorder(mlp(nn.BatchNorm1d(8)))
    cached_step(encoder, batch(5, 5), ntxent_loss, 4)
    first, second = encoder.runs[:6], encoder.runs[6:]
    assert [len(first), len(second)] == [6, 6]
    for (graph, rows, noise, seen), (graph_2, rows_2, noise_2, seen_2) in zip(first, second, strict=True):
        assert (graph, graph_2, rows) == (False, True, rows_2)
        assert torch.equal(noise_2, noise) and near(seen_2, seen)
    assert len({float(noise[0]) for _, _, noise, _ in first}) == 6


@pytest.mark.parametrize("skipped", [0, 1])
def test_buffers_of_an_input_that_runs_once(skipped):
    """What the skipped second runs of an input would have done to shared buffers is done all the same."""
    encoder, inputs = spectral(mlp(nn.BatchNorm1d(8))), batch(5, 5)
    start = {k: b.clone() for k, b in encoder.state_dict().items()}

    def loss(*z):
        return ntxent_loss(*(x.detach() if k == skipped else x for k, x in enumerate(z)))

    loss(*(chunked(encoder, x, 3) for x in inputs)).backward()
    expected = gradients(encoder) + buffers(encoder)
    encoder.load_state_dict(start)
    recorder = Recorder(encoder)
    cached_step(recorder, inputs, loss, 3)
    assert len(recorder.runs) == 12 and near(gradients(encoder) + buffers(encoder), expected)


NORM = nn.BatchNorm1d(5).double()


class Holder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def encode(self, x):
        return self.model(x)

    def __call__(self, x):
        return self.model(x)


CALLABLES = {
    "module": lambda model: model,
    "method": lambda model: model.forward,
    "partial": lambda model: functools.partial(model),
    "partial method": lambda model: functools.partial(model.forward),
    "partial function": lambda model: functools.partial(lambda net, x: net(x), model),
    "lambda": lambda model: lambda x: model(x),
    "lambda of a method": lambda model: (lambda encode: lambda x: encode.model(x))(Holder(model)),
    "default": lambda model: lambda x, net=model: net(x),
    "method of an object": lambda model: Holder(model).encode,
    "object": lambda model: Holder(model),
    "global": lambda model: lambda x: NORM(x),
}


@pytest.mark.parametrize("kind", CALLABLES)
def test_modules_of_callables_are_found(kind):
    model = NORM if kind == "global" else nn.BatchNorm1d(5).double()
    model.reset_running_stats()
    cached_step(CALLABLES[kind](model), batch(5, 5), ntxent_loss, 4)
    assert int(model.num_batches_tracked) == 6


def test_exceptions_leave_states_as_they_were():
    encoder, (x, y) = spectral(mlp(nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)))), batch(5, 5)
    before, random = buffers(encoder), torch.get_rng_state()
    for fails_at in range(1, 14):
        calls = []

        def run(z, calls=calls, fails_at=fails_at):
            calls.append(1)
            if len(calls) == fails_at:
                raise KeyError("failed")
            return z

        with pytest.raises(KeyError):
            cached_step(lambda x: run(encoder(x)), (x, y), lambda x, y: run(noisy_loss(x, y)), 4)  # noqa: B023
        assert near(buffers(encoder), before, 0) and torch.equal(torch.get_rng_state(), random)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(KeyError):
        encoder.float()
        cached_step(lambda x: [encoder(x.float()), {}["none"]], (x, y), noisy_loss, 4)
    encoder.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(KeyError):
            cached_step(lambda x: [encoder(x.float()), {}["none"]], (x, y), noisy_loss, 4)
        value = encoder(x.float()).sum()
    value.backward()
    assert all(g is not None for g in gradients(encoder))


def test_graph_that_saved_a_buffer_survives():
    """Buffers are put back without a graph of the caller noticing, to which they are what they were."""
    encoder, (x, y) = mlp(nn.BatchNorm1d(8)).eval(), batch(5, 5)
    value = encoder(x).sum()
    cached_step(encoder, (x, y), ntxent_loss, 3)
    value.backward()


def test_buffers_that_nothing_can_write():
    encoder = mlp()
    encoder.register_buffer("expanded", torch.zeros(1).expand(4))
    with torch.inference_mode():
        encoder.register_buffer("inference", torch.zeros(4))
    cached_step(encoder, batch(5, 5), ntxent_loss, 3)


def test_compiled_encoder():
    """Its dropout draws the same in both runs."""
    encoder, (x, y) = mlp(nn.Dropout(0.5)).float(), [z.float() for z in batch(5, 5)]
    compiled, random = torch.compile(encoder, backend="aot_eager"), torch.get_rng_state()
    ntxent_loss(chunked(encoder, x, 3), chunked(encoder, y, 3)).backward()
    expected = gradients(encoder)
    torch.set_rng_state(random)
    cached_step(compiled, (x, y), ntxent_loss, 3)
    assert near(gradients(encoder), expected, 1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # of the inputs
def test_random_numbers_of_a_gpu(device):
    """Those of the parameters' device and of the CPU, under autocast and with a scaler."""
    inside = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.4), DropPath())
    encoder = mlp(inside).float().cuda()
    inside[2].forward = lambda x: x * (torch.rand(len(x), 1) < 0.7).cuda()
    x, y = (z.float().to(device) for z in batch(5, 5))
    start = {k: b.clone() for k, b in encoder.state_dict().items()}
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    scaler = torch.amp.GradScaler("cuda", init_scale=64.0)

    def run(x):
        return encoder(x.cuda())

    with torch.autocast("cuda", torch.float16, cache_enabled=False):
        value = ntxent_loss(chunked(run, x, 4), chunked(run, y, 4))
    (64 * value).backward()
    expected = [
        value.detach(),
        *gradients(encoder),
        *buffers(encoder),
        torch.rand(3),
        torch.rand(3, device="cuda"),
    ]
    encoder.load_state_dict(start)
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1])
    with torch.autocast("cuda", torch.float16):
        value = cached_step(run, (x, y), ntxent_loss, 4, scaler=scaler)
    found = [value, *gradients(encoder), *buffers(encoder), torch.rand(3), torch.rand(3, device="cuda")]
    assert near(found, expected, 1e-2)
