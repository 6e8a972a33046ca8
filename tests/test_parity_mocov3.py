"""Golden parity of MoCo v3, on a ResNet and on a ViT: see test_parity_simclr.

Chen et al. 2021, and the definitions of their code.
"""

import math

import plain
import pytest
import torch
from plain import BATCH, STEPS, adamw, lars_outside, unit

from sslfast.train import loop, models
from sslfast.train.methods.mocov3 import Config

HIDDEN, OUT = 24, 12
DIM, DEPTH, HEADS, PATCH, GRID = 16, 2, 2, 7, 4  # of the ViT
FIXED = [f"encoder.{key}" for key in ("patch_embed.weight", "patch_embed.bias")]
FIXED += [f"{name}.{key}" for name in ("encoder", "keys.model.0") for key in ("positions", "class_position")]
BEFORE_NORM = "encoder.norm.bias"  # of a ViT: the projector's first BatchNorm takes it off again: no gradient


class Plain(plain.Plain):
    def __init__(self, state, cfg):
        super().__init__(state, untrained=("keys.", "encoder.patch_embed."))
        self.first_momentum, self.temperature = cfg.momentum, cfg.temperature
        self.is_vit = cfg.backbone == "vit_tiny"

    def layer_norm(self, x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * self.values[f"{name}.weight"] + self.values[f"{name}.bias"]

    def attention(self, x, name):
        out, size = [], DIM // HEADS
        q, k, v = self.linear(x, f"{name}.qkv").split(DIM, dim=-1)
        for head in range(HEADS):
            part = slice(head * size, (head + 1) * size)
            similar = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)).exp()
            out.append(similar / similar.sum(-1, keepdim=True) @ v[..., part])
        return self.linear(torch.cat(out, dim=-1), f"{name}.proj")

    def vit(self, images, name):
        """The class token behind the last normalisation. It has no position, or that of 0."""
        patches = images.view(BATCH, GRID, PATCH, GRID, PATCH).transpose(2, 3)
        patches = patches.reshape(BATCH, GRID**2, PATCH**2)
        weight, bias = (self.values[f"{name}.patch_embed.{key}"] for key in ("weight", "bias"))
        x = patches @ weight.view(DIM, PATCH**2).T + bias + self.values[f"{name}.positions"]
        x = torch.cat((self.values[f"{name}.class_token"].expand(BATCH, 1, DIM), x), dim=1)
        for block in range(DEPTH):
            at = f"{name}.blocks.{block}"
            x = x + self.attention(self.layer_norm(x, f"{at}.norm1"), f"{at}.attention")
            inner = self.linear(self.layer_norm(x, f"{at}.norm2"), f"{at}.mlp.0")
            inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
            x = x + self.linear(inner, f"{at}.mlp.2")
        return self.layer_norm(x, f"{name}.norm")[:, 0]

    def mlp(self, z, name, layers, last_norm):
        for layer in range(0, 3 * layers, 3):
            z = z @ self.values[f"{name}.{layer}.weight"].T
            if layer < 3 * (layers - 1):
                z = self.norm(z, f"{name}.{layer + 1}").clamp(min=0)
            elif last_norm:
                z = self.norm(z, f"{name}.{layer + 1}")
        return z

    def embed(self, view, encoder, projector):
        z = self.vit(view, encoder) if self.is_vit else self.compact(view, encoder)
        return self.mlp(z, projector, layers=3 if self.is_vit else 2, last_norm=True)

    def query(self, view):
        z = self.embed(view, "encoder", "projector")
        return unit(self.mlp(z, "predictor", layers=2, last_norm=self.is_vit))

    def key(self, view):
        return unit(self.embed(view, "keys.model.0", "keys.model.1"))

    def contrast(self, query, key):
        """2 tau times the cross entropy of finding one's own key among those of the batch."""
        similar, total = query @ key.T / self.temperature, 0.0
        for i in range(len(query)):
            total = total + similar[i].exp().sum().log() - similar[i, i]
        return 2 * self.temperature * total / len(query)

    def loss(self, first, second):
        q1, q2, k1, k2 = self.query(first), self.query(second), self.key(first), self.key(second)
        return self.contrast(q1, k2) + self.contrast(q2, k1)

    def before_update(self, k):
        """The keys' network comes nearer to the query's of the update before; k of STEPS is e of E epochs."""
        momentum = 1 - (1 + math.cos(math.pi * k / STEPS)) * (1 - self.first_momentum) / 2
        self.values["momentum"] = torch.tensor(momentum, dtype=torch.float64)
        self.follow("keys", momentum)


def config(tmp_path, **changes):
    values = dict(hidden_dim=HIDDEN, projection_dim=OUT, momentum=0.9, patch_size=PATCH, positions="fixed")
    return plain.config(Config, tmp_path, **{**values, **changes})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.SIZES, "vit_tiny", {"dim": DIM, "depth": DEPTH, "heads": HEADS})


RESNET, VIT = dict(backbone="compact"), dict(backbone="vit_tiny")
LARS, ADAMW = dict(optimizer="lars", learning_rate=3.1), dict(optimizer="adamw", learning_rate=1e-4)


@pytest.mark.parametrize(
    "rule, changes",
    [
        (lars_outside, RESNET | LARS | dict(temperature=1.0)),
        (lars_outside, RESNET | LARS | dict(accumulate=2, momentum=0.5)),
        (adamw, RESNET | ADAMW),
        (lars_outside, VIT | LARS),
        (adamw, VIT | ADAMW),
        (adamw, VIT | ADAMW | dict(accumulate=2, momentum=0.5)),
    ],
    ids=["resnet-lars", "resnet-accumulate", "resnet-adamw", "vit-lars", "vit-adamw", "vit-accumulate"],
)
def test_training_is_the_plain_version(rule, changes, tmp_path, tiny):
    """AdamW decays every parameter, LARS those of more than one dimension."""
    cfg = config(tmp_path, **changes)
    model = plain.build("mocov3", cfg, teacher="keys")
    for name, value in model.state_dict().items():
        if ".blocks." in name and value.dim() > 1:
            value.mul_(10)  # as large as those of a trained one: each image has a class token of its own
    reference, idle = Plain(model.state_dict(), cfg), ()
    if reference.is_vit:
        idle = (*FIXED, BEFORE_NORM)
    plain.train_both(model, reference, cfg, rule, idle, decay_all=rule is adamw)


def head(name, widths, last_norm):
    """Shapes of layers without a bias; BatchNorm between them, and one without weights at the end."""
    shapes, last = {}, len(widths) - 2
    statistics, affine = ("running_mean", "running_var"), ("weight", "bias")
    for i in range(last + 1):
        shapes[f"{name}.{3 * i}.weight"] = (widths[i + 1], widths[i])
        if i < last or last_norm:
            tensors = statistics + (affine if i < last else ())
            shapes |= {f"{name}.{3 * i + 1}.{key}": (widths[i + 1],) for key in tensors}
            shapes[f"{name}.{3 * i + 1}.num_batches_tracked"] = ()
    return shapes


@pytest.mark.parametrize("backbone", ["compact", "vit_tiny"])
def test_networks(backbone, tmp_path, tiny):
    """A ViT's heads have a layer and a BatchNorm more. The keys' network begins as that of the queries."""
    state = loop.build("mocov3", config(tmp_path, backbone=backbone), channels=1, size=28).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    projector = (DIM, HIDDEN, HIDDEN, OUT) if backbone == "vit_tiny" else (128, HIDDEN, OUT)
    predictor = head("predictor", (OUT, HIDDEN, OUT), last_norm=backbone == "vit_tiny")
    encoder = {key: shape for key, shape in shapes.items() if key.startswith("encoder.")}
    keys = {key.replace("encoder.", "keys.model.0.", 1): shape for key, shape in encoder.items()}
    keys |= head("keys.model.1", projector, last_norm=True)
    rest = encoder | head("projector", projector, last_norm=True) | predictor | {"momentum": ()}
    assert shapes == rest | keys
    for key in keys:
        theirs = key.replace("keys.model.0", "encoder", 1).replace("keys.model.1", "projector", 1)
        assert torch.equal(state[key], state[theirs]) and state[key].data_ptr() != state[theirs].data_ptr()


def test_patches_are_embedded_at_random_and_at_fixed_positions(tmp_path, tiny):
    """Sines, then cosines, of the column; the same of the row; none of the class token."""
    state = loop.build("mocov3", config(tmp_path, **VIT), channels=1, size=28).state_dict()
    weight, quarter = state["encoder.patch_embed.weight"], DIM // 4
    assert weight.unique().numel() == DIM * PATCH**2 and not state["encoder.patch_embed.bias"].any()
    assert not state["encoder.class_position"].any()
    for row in range(GRID):
        for column in range(GRID):
            angles = [(place, 10000 ** -(i / quarter)) for place in (column, row) for i in range(quarter)]
            sines, cosines = ([f(place * rate) for place, rate in angles] for f in (math.sin, math.cos))
            expected = sines[:quarter] + cosines[:quarter] + sines[quarter:] + cosines[quarter:]
            plain.close(
                state["encoder.positions"][0, row * GRID + column].double(),
                torch.tensor(expected, dtype=torch.float64),
                f"position {row}, {column}",
                1e-6,
            )


def test_sizes_are_the_papers(tmp_path):
    cfg = Config(out=tmp_path)
    assert (cfg.hidden_dim, cfg.projection_dim) == (4096, 256)
