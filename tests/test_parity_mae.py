"""Golden parity of MAE (He et al. 2022, and the definitions of their code): see test_parity_simclr."""

import math

import plain
import pytest
import torch
from plain import BATCH, STEPS, WARMUP, close

from sslfast.train import loop, models, optim
from sslfast.train.methods import Now
from sslfast.train.methods.mae import Config

DIM, DEPTH, HEADS = 16, 2, 2  # of the encoder
DECODER_DIM, DECODER_DEPTH, DECODER_HEADS = 12, 1, 3
GREY, COLOUR = (1, 28, 7, 4), (3, 20, 4, 5)  # channels, side, patch, patches a side
FIXED = ("positions", "class_position")  # how the names of buffers end


def split(noise, ratio):
    """Patches in the order of their noise: (kept, removed)"""
    order, keep = noise.argsort(dim=1, stable=True), int(noise.shape[1] * (1 - ratio))
    return order[:, :keep], order[:, keep:]


def pick(x, places):
    """[B, L, D] at places [B, K] -> [B, K, D]"""
    return torch.stack([row[place] for row, place in zip(x, places, strict=True)])


class Plain(plain.Plain):
    """Its batches are (images, noise of their patches)."""

    def __init__(self, state, cfg):
        super().__init__(state)
        self.trained = [name for name in state if not name.endswith(FIXED)]
        self.cfg, self.mean = cfg, {}

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.values[f"{name}.weight"] + self.values[f"{name}.bias"]

    def attention(self, x, name, heads, seen):
        """Each token looks at those where `seen` [B, 1, tokens] is 1."""
        dim, out = x.shape[-1], []
        q, k, v = self.linear(x, f"{name}.qkv").split(dim, dim=-1)
        for part in torch.arange(dim).chunk(heads):
            similar = seen * (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(len(part))).exp()
            out.append(similar / similar.sum(-1, keepdim=True) @ v[..., part])
        return self.linear(torch.cat(out, dim=-1), f"{name}.proj")

    def transformer(self, x, name, depth, heads, seen=1.0):
        for at in (f"{name}.blocks.{block}" for block in range(depth)):
            x = x + self.attention(self.layer_norm(x, f"{at}.norm1"), f"{at}.attention", heads, seen)
            inner = self.linear(self.layer_norm(x, f"{at}.norm2"), f"{at}.mlp.0")
            x = x + self.linear(inner * (1 + torch.erf(inner / math.sqrt(2))) / 2, f"{at}.mlp.2")
        return self.layer_norm(x, f"{name}.norm")

    def patches(self, images):
        """[B, C, H, W] -> [B, L, C, p, p], row by row"""
        rows = images.split(self.cfg.patch_size, dim=2)
        return torch.stack([x for row in rows for x in row.split(self.cfg.patch_size, dim=3)], dim=1)

    def embed(self, images):
        weight, bias = (self.values[f"encoder.patch_embed.{key}"] for key in ("weight", "bias"))
        return self.patches(images).flatten(2) @ weight.flatten(1).T + bias + self.values["encoder.positions"]

    def encode(self, tokens, seen=1.0):
        """[B, K, D] -> [B, 1 + K, D], the class token first"""
        front = self.values["encoder.class_token"].expand(BATCH, 1, DIM)
        return self.transformer(torch.cat((front, tokens), dim=1), "encoder", DEPTH, HEADS, seen)

    def decode(self, tokens, kept, count):
        """Tokens [B, 1 + K, D] of the class and the kept patches -> pixels [B, count, p * p * C]"""
        tokens = self.linear(tokens, "decoder.embed")
        x = self.values["decoder.mask_token"].repeat(BATCH, count, 1)
        x = x.scatter(1, kept[:, :, None].expand(-1, -1, DECODER_DIM), tokens[:, 1:])
        x = torch.cat((tokens[:, :1], x + self.values["decoder.positions"]), dim=1)
        x = self.transformer(x, "decoder", DECODER_DEPTH, DECODER_HEADS)
        return self.linear(x[:, 1:], "decoder.pixels")

    def loss(self, images, noise):
        kept, removed = split(noise, self.cfg.mask_ratio)
        predicted = self.decode(self.encode(pick(self.embed(images), kept)), kept, noise.shape[1])
        target = self.patches(images).permute(0, 1, 3, 4, 2).flatten(2)
        if self.cfg.norm_pix:
            centred = target - target.mean(-1, keepdim=True)
            variance = (centred * centred).sum(-1, keepdim=True) / (target.shape[-1] - 1)
            target = centred / (variance + 1e-6).sqrt()
        return pick((predicted - target) ** 2, removed).mean(-1).mean()


def adamw(reference, name, g, rate, decay):
    """With the second beta of MAE; keeps the gradient too."""
    p, k = reference.values[name], reference.updates
    m, s = reference.memory.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
    m, s = 0.9 * m + (1 - 0.9) * g, 0.95 * s + (1 - 0.95) * g * g
    reference.memory[name], reference.mean[name] = (m, s), g
    return p - rate * decay * p - rate * (m / (1 - 0.9**k)) / ((s / (1 - 0.95**k)).sqrt() + 1e-8)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.SIZES, "vit_tiny", {"dim": DIM, "depth": DEPTH, "heads": HEADS})


def build(tmp_path, case, **changes):
    """(config, our model with its initial weights)"""
    decoder = dict(decoder_dim=DECODER_DIM, decoder_depth=DECODER_DEPTH, decoder_heads=DECODER_HEADS)
    values = dict(backbone="vit_tiny", learning_rate=1e-3, patch_size=case[2]) | decoder | changes
    cfg = plain.config(Config, tmp_path, **values)
    return cfg, loop.build("mae", cfg, channels=case[0], size=case[1])


def both(tmp_path, case, **changes):
    """(config, our model, the plain one) in float64; no scale, shift or token is at its initial value"""
    cfg, model = build(tmp_path, case, **changes)
    for name, value in model.double().train().state_dict().items():
        if value.dim() == 1 or name.endswith("_token"):
            value.add_(0.5 * torch.rand_like(value))
    return cfg, model, Plain(model.state_dict(), cfg)


def draw_images(case):
    return torch.rand(BATCH, case[0], case[1], case[1], dtype=torch.float64)


@pytest.mark.parametrize("case", [GREY, COLOUR], ids=["grey", "colour"])
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("ratio", [0.75, 0.5])
def test_training_is_the_plain_version(case, norm_pix, accumulate, ratio, tmp_path, tiny):
    """The gradient of a key's bias is rounding alone: softmax takes off what it adds to a query's logits."""
    cfg, model, reference = both(tmp_path, case, norm_pix=norm_pix, accumulate=accumulate, mask_ratio=ratio)
    parameters = dict(model.named_parameters())
    assert [name for name, p in parameters.items() if p.requires_grad] == reference.trained
    update, initial = loop.Update(model, cfg, torch.device("cpu")), dict(reference.values)
    for step in range(STEPS):
        batches, random = [draw_images(case) for _ in range(accumulate)], torch.get_rng_state()
        optim.set_rate(update.optimizer, cfg.learning_rate * optim.warmup_cosine(step, WARMUP, STEPS))
        model.schedule(Now(step, STEPS, STEPS), update.optimizer.param_groups)
        model.before_step()
        losses = [update.backward((batch,))[0] for batch in batches]
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        update.step()
        drawn = torch.get_rng_state()
        torch.set_rng_state(random)
        pairs = [(batch, torch.rand(BATCH, case[3] ** 2)) for batch in batches]
        assert torch.equal(torch.get_rng_state(), drawn)
        rate = cfg.learning_rate * plain.factor(step, WARMUP, STEPS)
        expected, _ = reference.step(pairs, adamw, rate, cfg.weight_decay, cfg.clip_norm, decay_all=False)
        close(losses, expected, f"loss of step {step}")
        for name, value in gradients.items():
            close(value, reference.mean[name], f"gradient of {name} in step {step}")
        state = model.state_dict()
        assert state.keys() == reference.values.keys()
        for name, value in state.items():
            close(value, reference.values[name], f"{name} after step {step}")
    for name, value in state.items():
        moved = (value - initial[name]).abs()
        if name.endswith("qkv.bias"):
            queries, keys, values = moved.chunk(3)
            assert keys.max() < 1e-9, name
            moved = torch.minimum(queries, values)
        assert moved.max() == 0 if name.endswith(FIXED) else moved.max() > 1e-4, f"{name} moved by {moved}"


def watch(model, module, images, random):
    """(loss, output of `module`) of a training step"""
    outputs = []
    hook = model.get_submodule(module).register_forward_hook(lambda *call: outputs.append(call[-1].detach()))
    torch.set_rng_state(random)
    loss = model.training_step((images,))[0]
    hook.remove()
    return loss.item(), *outputs


@pytest.mark.parametrize("case", [GREY, COLOUR], ids=["grey", "colour"])
def test_removed_patches_are_not_seen(case, tmp_path, tiny):
    """Their pixels change the loss and nothing of the prediction; those of a kept patch change that."""
    cfg, model, _ = both(tmp_path, case)
    images, random = draw_images(case), torch.get_rng_state()
    kept, removed = split(torch.rand(BATCH, case[3] ** 2), cfg.mask_ratio)
    loss, predicted = watch(model, "decoder.pixels", images, random)
    for places, seen in ((kept[:, :1], True), (removed, False)):
        change = torch.zeros(BATCH, case[3] ** 2).scatter(1, places, 1.0).view(BATCH, 1, case[3], case[3])
        change = change.repeat_interleave(case[2], dim=2).repeat_interleave(case[2], dim=3)
        other_loss, other = watch(model, "decoder.pixels", images + change * draw_images(case), random)
        same = (other == predicted).flatten(1).all(1)
        assert other_loss != loss and (not same.any() if seen else same.all())


@pytest.mark.parametrize("ratio", [0.75, 0.5, 0.65])
def test_encoder_is_that_of_all_patches_without_attention_to_the_removed(ratio, tmp_path, tiny):
    _, model, reference = both(tmp_path, COLOUR, mask_ratio=ratio)
    images, random = draw_images(COLOUR), torch.get_rng_state()
    kept, removed = split(torch.rand(BATCH, COLOUR[3] ** 2), ratio)
    _, encoded = watch(model, "encoder.norm", images, random)
    seen = torch.ones(BATCH, 1 + COLOUR[3] ** 2, dtype=torch.float64).scatter(1, removed + 1, 0.0)
    expected = reference.encode(reference.embed(images), seen[:, None])
    close(encoded[:, :1], expected[:, :1], "class token")
    close(encoded[:, 1:], pick(expected[:, 1:], kept), "kept patches")


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


@pytest.mark.parametrize("case", [GREY, COLOUR], ids=["grey", "colour"])
def test_networks_and_positions(case, tmp_path, tiny):
    """A fixed position is the sines, then the cosines, of the column, and then of the row."""
    state = build(tmp_path, case)[1].state_dict()
    (channels, _, size, grid), dim = case, DECODER_DIM
    shapes = {f"encoder.class_{key}": (1, 1, DIM) for key in ("token", "position")}
    shapes |= affine("encoder.patch_embed", DIM, channels, size, size) | affine("decoder.embed", dim, DIM)
    shapes |= affine("decoder.pixels", size * size * channels, dim) | {"decoder.mask_token": (1, 1, dim)}
    for name, width, depth in (("encoder", DIM, DEPTH), ("decoder", dim, DECODER_DEPTH)):
        shapes |= {f"{name}.positions": (1, grid**2, width)} | affine(f"{name}.norm", width)
        for at in (f"{name}.blocks.{block}" for block in range(depth)):
            shapes |= affine(f"{at}.norm1", width) | affine(f"{at}.norm2", width)
            shapes |= affine(f"{at}.attention.qkv", 3 * width, width)
            shapes |= affine(f"{at}.attention.proj", width, width)
            shapes |= affine(f"{at}.mlp.0", 4 * width, width) | affine(f"{at}.mlp.2", width, 4 * width)
    assert {name: tuple(value.shape) for name, value in state.items()} == shapes
    assert not state["encoder.class_position"].any()
    for name, dim in (("encoder.positions", DIM), ("decoder.positions", DECODER_DIM)):
        rates = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
        for patch, position in enumerate(state[name][0].tolist()):
            places = (patch % grid, patch // grid)
            expected = [f(place * r) for place in places for f in (math.sin, math.cos) for r in rates]
            assert position == pytest.approx(expected, abs=1e-6), f"{name} of {patch}"


def test_initial_weights(tmp_path, monkeypatch):
    """Matrices uniform up to Xavier's bound, that of the patches as one; its bias is free; tokens normal."""
    monkeypatch.setitem(models.SIZES, "vit_tiny", {"dim": 512, "depth": 1, "heads": 2})
    for name, value in build(tmp_path, COLOUR, decoder_dim=384)[1].state_dict().items():
        if name.endswith("_token"):
            assert 0.018 < value.std() < 0.022 and 0.04 < value.abs().max() < 0.1, name
        elif value.dim() > 1 and not name.endswith(FIXED):
            rows = value.flatten(1)
            bound = math.sqrt(6 / sum(rows.shape))
            assert 0.999 * bound < rows.abs().max() <= bound, name
            assert rows.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        elif "norm" in name and name.endswith(".weight"):
            assert (value == 1).all(), name
        elif value.dim() == 1 and name != "encoder.patch_embed.bias":
            assert not value.any(), name
