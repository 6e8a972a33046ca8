"""What the tests of cached_step run in several processes: a scenario returns what it found wrong."""

import torch
from cached_encoders import Temperature, Towers, buffers, chunked, gradients, mlp, near, spectral
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sslfast import clip_loss, ntxent_loss
from sslfast.cached import cached_step

ROWS = 7  # of a process: three chunks of at most 3


def parallel(module: nn.Module, **options) -> tuple[DistributedDataParallel, list[int]]:
    """The module in DistributedDataParallel, with small buckets, and a list of its reductions."""
    wrapped, reductions = DistributedDataParallel(module, bucket_cap_mb=1e-4, **options), []

    def hook(_, bucket):
        reductions.append(bucket.index())
        work = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, hook)
    return wrapped, reductions


def once(reductions: list[int]) -> bool:
    """Whether each bucket was reduced once; there are others after the first step than in it."""
    return sorted(reductions) == list(range(len(reductions))) != []


def own(*widths: int) -> list[torch.Tensor]:
    """Inputs of this process; those of all are the same everywhere."""
    generator = torch.Generator().manual_seed(7)
    rows = ROWS * dist.get_world_size()
    return [
        torch.randn(rows, width, generator=generator, dtype=torch.float64).chunk(dist.get_world_size())[
            dist.get_rank()
        ]
        for width in widths
    ]


def everything(*widths: int) -> list[torch.Tensor]:
    gathered = []
    for x in own(*widths):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        gathered.append(torch.cat(parts))
    return gathered


def run_all(rank: int) -> dict[str, object]:
    return {name: scenario(rank) for name, scenario in SCENARIOS.items()}


def two_views(rank: int) -> object:
    """The gradients of DistributedDataParallel's own step, each bucket reduced once a step."""
    torch.manual_seed(0)
    encoder, reductions = parallel(mlp())
    x, y = own(5, 5)
    wrong = []
    for micro_batch in (1, 3, ROWS, 50):
        ntxent_loss(encoder(x), encoder(y)).backward()
        expected = gradients(encoder)
        reductions.clear()
        cached_step(encoder, (x, y), ntxent_loss, micro_batch)
        found = gradients(encoder)
        if not near(found, expected) or not once(reductions) or len(reductions) < 2:
            wrong.append((micro_batch, found, expected, reductions))
    return wrong


def loss_across_processes(rank: int) -> object:
    """The gradients of one process with the rows of all, for towers and temperature."""
    torch.manual_seed(0)
    towers = [parallel(mlp()), parallel(mlp(width=3))]
    loss, _ = parallel(Temperature())
    loss.module.forward = lambda x, y: clip_loss(x, y, loss.module.log_scale.exp(), group=dist.group.WORLD)
    cached_step([tower for tower, _ in towers], own(5, 3), loss, 3)
    found = gradients(towers[0][0], towers[1][0], loss)
    alone = [tower.module for tower, _ in towers]
    x, y = everything(5, 3)
    clip_loss(alone[0](x), alone[1](y), loss.module.log_scale.exp()).backward()
    expected = gradients(*alone, loss)
    return [] if near(found, expected) else [found, expected]


def views_across_processes(rank: int) -> object:
    torch.manual_seed(0)
    encoder, _ = parallel(mlp())
    cached_step(encoder, own(5, 5), lambda x, y: ntxent_loss(x, y, group=dist.group.WORLD), 2)
    found = gradients(encoder)
    ntxent_loss(*map(encoder.module, everything(5, 5))).backward()
    expected = gradients(encoder)
    return [] if near(found, expected) else [found, expected]


def parallel_loss(rank: int) -> object:
    """A temperature that DistributedDataParallel averages, of rows of each process alone."""
    torch.manual_seed(0)
    (image, _), (text, _), (loss, reductions) = (
        parallel(mlp()),
        parallel(mlp(width=3)),
        parallel(Temperature()),
    )
    inputs = own(5, 3)
    loss(image(inputs[0]), text(inputs[1])).backward()
    expected = gradients(image, text, loss)
    reductions.clear()
    cached_step((image, text), inputs, loss, 3)
    found = gradients(image, text, loss)
    return [] if near(found, expected) and once(reductions) else [found, expected, reductions]


def one_module_for_both(rank: int) -> object:
    """Two towers and the loss's scale in one module, of which each call uses a part, reached by functions."""
    torch.manual_seed(0)
    model, reductions = parallel(Towers(), find_unused_parameters=True)
    alone = model.module
    wrong = []
    for _ in range(3):
        loss = Temperature()
        loss.log_scale = alone.log_scale
        x, y = own(5, 3)
        loss(alone.image(x), alone.text(y)).backward()
        expected = gradients(model)
        for g in expected:
            dist.all_reduce(g)
            g /= dist.get_world_size()
        reductions.clear()
        cached_step((lambda x: model(image=x), lambda y: model(text=y)), (x, y), loss, 3)
        found = gradients(model)
        if not near(found, expected) or not once(reductions):
            wrong.append((found, expected, reductions))
    return wrong


def methods_of_a_container(rank: int) -> object:
    """Each of two modules within another is reduced in the last chunk that calls it."""
    torch.manual_seed(0)
    reductions = []

    def wrap(tower):
        wrapped, seen = parallel(tower)
        reductions.append(seen)
        return wrapped

    model, (x, y) = Towers(wrap), own(5, 3)
    clip_loss(model.image(x), model.text(y), 2.0).backward()
    expected = gradients(model)
    for seen in reductions:
        seen.clear()
    cached_step((model.encode_image, model.encode_text), (x, y), lambda x, y: clip_loss(x, y, 2.0), 3)
    found = gradients(model)
    same = near(found, expected) and all(map(once, reductions))
    return [] if same else [found, expected, reductions]


def static_graph(rank: int) -> object:
    torch.manual_seed(0)
    encoder, wrong = DistributedDataParallel(mlp(), static_graph=True), []
    x, y = own(5, 5)
    for _ in range(3):
        cached_step(encoder, (x, y), ntxent_loss, 3)
        found = gradients(encoder)
        ntxent_loss(encoder.module(x), encoder.module(y)).backward()
        expected = gradients(encoder)
        for g in expected:
            dist.all_reduce(g)
            g /= dist.get_world_size()
        if not near(found, expected):
            wrong.append((found, expected))
    return wrong


def accumulation(rank: int) -> object:
    """Within the caller's no_sync nothing is reduced; the next step reduces the sum."""
    torch.manual_seed(0)
    encoder, reductions = parallel(mlp())
    x, y = own(5, 5)
    with encoder.no_sync():
        ntxent_loss(encoder(x), encoder(y)).backward()
    ntxent_loss(encoder(y), encoder(x)).backward()
    expected = gradients(encoder)
    reductions.clear()
    with encoder.no_sync():
        cached_step(encoder, (x, y), ntxent_loss, 3)
    early = list(reductions)
    cached_step(encoder, (y, x), ntxent_loss, 3)
    found = gradients(encoder)
    return [] if near(found, expected) and not early and once(reductions) else [found, expected, early]


def buffers_of_the_first_process(rank: int) -> object:
    """Its buffers are broadcast once a step, before both runs, and end as after one run."""
    wrong = []
    for make in (lambda: mlp(nn.BatchNorm1d(8)), lambda: spectral(mlp())):
        torch.manual_seed(0)
        module = make()
        encoder, _ = parallel(module)
        alone = make()
        alone.load_state_dict(module.state_dict())
        torch.manual_seed(3 + rank)
        x, y = own(5, 5)
        for _ in range(2):
            with torch.no_grad():  # as training on rows of each process leaves them
                for b in module.buffers():
                    if b.is_floating_point():
                        b.add_(torch.rand_like(b))
                for b, c in zip(alone.buffers(), module.buffers(), strict=True):
                    dist.broadcast(b.copy_(c), 0)
            ntxent_loss(chunked(alone, x, 3), chunked(alone, y, 3)).backward()
            expected = gradients(alone)
            for g in expected:
                dist.all_reduce(g)
                g /= dist.get_world_size()
            cached_step(encoder, (x, y), ntxent_loss, 3)
            found = gradients(encoder)
            if not near(found, expected) or not near(buffers(module), buffers(alone)):
                wrong.append((found, expected, buffers(module), buffers(alone)))
    return wrong


def uneven(rank: int) -> object:
    """Both processes raise alike, before any has called the encoder, and can go on."""
    torch.manual_seed(0)
    encoder, _ = parallel(mlp(nn.BatchNorm1d(8)))
    x, y = own(5, 5)
    messages = []
    for rows in (4 - rank, 4 * rank):
        try:
            cached_step(encoder, (x, y[:rows]), lambda x, y: x.sum() + y.sum(), 3)
        except ValueError as error:
            messages.append(str(error))
    cached_step(encoder, (x, y), ntxent_loss, 3)
    return messages


def without_a_gradient(rank: int) -> object:
    """An input that the loss does not use, or that the encoder encodes without a graph."""
    torch.manual_seed(0)
    encoder, reductions = parallel(mlp())
    x, y = own(5, 5)
    encoder(x).square().sum().backward()
    expected, wrong = gradients(encoder), []

    def target(rows):
        with torch.no_grad():
            return encoder(rows)

    def first(x, y):
        return x.square().sum()

    def second(x, y):
        return y.square().sum()

    for encoders, inputs, loss in (
        (encoder, (x, y), first),
        (encoder, (y, x), second),
        ((target, encoder), (y, x), second),
    ):
        reductions.clear()
        cached_step(encoders, inputs, loss, 3)
        found = gradients(encoder)
        if not near(found, expected) or not once(reductions):
            wrong.append((found, expected, reductions))
    try:
        cached_step((encoder, target), (x, y), first, 3)
    except ValueError as error:
        wrong += [] if "encoders[1]" in str(error) else [str(error)]
    else:
        wrong.append("no error")
    return wrong


def failure(rank: int) -> object:
    """An exception in any of the eight runs leaves all as it was: the step can be repeated."""
    torch.manual_seed(0)
    encoder, _ = parallel(mlp(nn.BatchNorm1d(8)))
    x, y = own(5, 5)
    inputs, wrong, before, random = (x[:3], y), [], buffers(encoder), torch.get_rng_state()
    cached_step(encoder, inputs, clip_sum, 3)
    expected, after = gradients(encoder), buffers(encoder)
    for fails_at in range(1, 10):
        for b, saved in zip(encoder.buffers(), before, strict=True):
            b.copy_(saved)
        torch.set_rng_state(random)
        calls = []

        def flaky(z, calls=calls, fails_at=fails_at):
            calls.append(1)
            if len(calls) == fails_at:
                raise KeyError("flaky")
            return encoder(z + torch.rand(()) * 0)

        try:
            cached_step(flaky, inputs, clip_sum, 3)
        except KeyError:
            same = near(buffers(encoder), before, 0) and torch.equal(random, torch.get_rng_state())
            if fails_at > 8 or not same or not encoder.require_backward_grad_sync:
                wrong.append(fails_at)
            encoder.zero_grad()
            cached_step(encoder, inputs, clip_sum, 3)
        if not near(gradients(encoder), expected) or not near(buffers(encoder), after):
            wrong.append(fails_at)
    return wrong


def clip_sum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of inputs with different numbers of rows."""
    return (x @ y.T).logsumexp(1).sum()


SCENARIOS = {
    f.__name__: f
    for f in (
        two_views, loss_across_processes, views_across_processes, parallel_loss, one_module_for_both,
        methods_of_a_container, static_graph, accumulation, buffers_of_the_first_process, uneven,
        without_a_gradient, failure,
    )
}  # fmt: skip
