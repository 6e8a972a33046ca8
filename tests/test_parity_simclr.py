"""Golden parity: training SimCLR must be what its definitions say, number for number.

The plain version below was written from the papers and the published code, without a look at ours, and shares
nothing with it: the network is a function of a dict of tensors, the optimizers are formulas. In float64 both
sides differ by rounding alone, so that a wrong epsilon, an unbiased variance in the wrong place or a weight
decay on one bias shows, where a comparison of learning curves would hide it.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from sslfast.train import loop, optim
from sslfast.train.methods.simclr import Config as SimCLRConfig

BATCH, STEPS, WARMUP = 16, 5, 2
FROZEN = "projector.7.bias"  # the last normalisation has no bias: a constant 0


# The plain version


class Plain:
    """SimCLR on the compact network: `values` holds parameters and running statistics by our names."""

    def __init__(self, state, temperature):
        self.values = {name: value.clone() for name, value in state.items()}
        self.trained = [n for n in state if n.endswith((".weight", ".bias")) and n != FROZEN]
        self.temperature = temperature
        self.memory, self.updates = {}, 0  # the optimizer's

    def norm(self, x, name):
        """Normalises with the variance over n, and remembers the one over n - 1."""
        v = self.values
        over = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        n = x.numel() // x.shape[1]
        mean = x.sum(over) / n
        centred = x - mean.view(shape)
        var = (centred * centred).sum(over) / n
        v[f"{name}.running_mean"] = 0.9 * v[f"{name}.running_mean"] + 0.1 * mean.detach()
        v[f"{name}.running_var"] = 0.9 * v[f"{name}.running_var"] + 0.1 * var.detach() * n / (n - 1)
        v[f"{name}.num_batches_tracked"] = v[f"{name}.num_batches_tracked"] + 1
        x = centred / torch.sqrt(var + 1e-5).view(shape)
        return x * v[f"{name}.weight"].view(shape) + v[f"{name}.bias"].view(shape)

    def conv(self, x, name, stride):
        weight = self.values[f"{name}.0.weight"]
        return self.norm(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), f"{name}.1")

    def embed(self, x):
        """Images [N, 1, 28, 28] -> projections [N, 128]; all of N normalised together."""
        x = self.conv(x, "encoder.stem.0", 2).clamp(min=0)
        for stage, stride in enumerate((1, 2, 2)):
            name = f"encoder.stages.{stage}"
            inner = self.conv(x, f"{name}.layers.0", stride).clamp(min=0)
            inner = self.conv(inner, f"{name}.layers.1", 1)
            x = (inner + (x if stride == 1 else self.conv(x, f"{name}.shortcut", stride))).clamp(min=0)
        z = x.mean((2, 3))
        for layer in (0, 3, 6):
            z = self.norm(z @ self.values[f"projector.{layer}.weight"].T, f"projector.{layer + 1}")
            z = z if layer == 6 else z.clamp(min=0)
        return z

    def loss(self, first, second):
        """Each of the 2N rows has to find its other view among the 2N - 1 other rows."""
        z = self.embed(torch.cat((first, second)))
        z = z / (z * z).sum(1, keepdim=True).sqrt()
        similar = z @ z.T / self.temperature
        rows, total = len(z), 0.0
        for i in range(rows):
            others = [k for k in range(rows) if k != i]
            total = total + similar[i, others].exp().sum().log() - similar[i, (i + rows // 2) % rows]
        return total / rows

    def gradients(self, first, second):
        """(loss, gradient by name)"""
        leaves = [self.values[name].requires_grad_() for name in self.trained]
        loss = self.loss(first, second)
        gradients = torch.autograd.grad(loss, leaves)
        for name in self.trained:
            self.values[name] = self.values[name].detach()
        return loss.detach(), dict(zip(self.trained, gradients, strict=True))

    def step(self, batches, optimizer, rate, weight_decay, clip_norm):
        """(loss of each batch, norm of their mean gradient), and the update."""
        losses, mean = [], dict.fromkeys(self.trained, 0.0)
        for first, second in batches:
            loss, gradients = self.gradients(first, second)
            losses.append(loss)
            mean = {name: mean[name] + gradients[name] / len(batches) for name in self.trained}
        norm = math.sqrt(sum((g * g).sum().item() for g in mean.values()))
        factor = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        self.updates += 1
        for name in self.trained:
            decay = weight_decay if self.values[name].dim() > 1 else 0.0
            self.values[name] = optimizer(self, name, factor * mean[name], rate, decay)
        return losses, norm


def adamw(plain, name, g, rate, decay):
    p, k = plain.values[name], plain.updates
    m, s = plain.memory.get(name, (torch.zeros_like(p), torch.zeros_like(p)))
    m, s = 0.9 * m + (1 - 0.9) * g, 0.999 * s + (1 - 0.999) * g * g
    plain.memory[name] = m, s
    return p - rate * decay * p - rate * (m / (1 - 0.9**k)) / ((s / (1 - 0.999**k)).sqrt() + 1e-8)


def sgd(plain, name, g, rate, decay):
    p = plain.values[name]
    plain.memory[name] = 0.9 * plain.memory.get(name, torch.zeros_like(p)) + g + decay * p
    return p - rate * plain.memory[name]


def trusted(p, g, decay):
    """LARS: the gradient with its decay, at a thousandth of the weight's norm; vectors are left alone."""
    u = g + decay * p
    p_norm, u_norm = (p * p).sum().sqrt().item(), (u * u).sum().sqrt().item()
    return u * (1e-3 * p_norm / u_norm) if p.dim() > 1 and p_norm > 0 and u_norm > 0 else u


def lars_inside(plain, name, g, rate, decay):
    """SimCLR's: the momentum remembers the rates of earlier updates."""
    p = plain.values[name]
    plain.memory[name] = 0.9 * plain.memory.get(name, torch.zeros_like(p)) + rate * trusted(p, g, decay)
    return p - plain.memory[name]


def lars_outside(plain, name, g, rate, decay):
    """BYOL's and MoCo v3's: today's rate scales the whole momentum."""
    p = plain.values[name]
    plain.memory[name] = 0.9 * plain.memory.get(name, torch.zeros_like(p)) + trusted(p, g, decay)
    return p - rate * plain.memory[name]


def factor(k, warmup, total):
    if k < warmup:
        return k / warmup
    return 0.5 * (1 + math.cos(math.pi * (k - warmup) / (total - warmup)))


# Ours against it


def config(tmp_path, **changes):
    values = dict(
        backbone="compact",
        batch_size=BATCH,
        epochs=STEPS,  # of one update each
        warmup_epochs=float(WARMUP),
        weight_decay=0.05,  # large, so that one in the wrong place shows
        temperature=0.2,
        precision="float32",  # no autocast: float64 stays float64
        device="cpu",
        seed=8,  # no gradient but 0 is near AdamW's epsilon, where rounding would be amplified
    )
    return SimCLRConfig(out=tmp_path / "run", **{**values, **changes})


def build(cfg):
    """(our model, the plain one), alike; no scale, shift or running statistic is at its first 0 or 1."""
    model = loop.build("simclr", cfg, channels=1, size=28).double().train()
    for name, value in model.state_dict().items():
        if value.dim() == 1 and name != FROZEN:
            value.add_(0.5 * torch.rand_like(value))
    plain = Plain(model.state_dict(), cfg.temperature)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == plain.trained
    return model, plain


def two_views():
    return [torch.rand(BATCH, 1, 28, 28, dtype=torch.float64) for _ in range(2)]


def close(actual, expected, name):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(
    "name, rule, changes",
    [
        ("adamw", adamw, dict(learning_rate=0.003)),
        ("sgd", sgd, dict(learning_rate=0.1)),
        ("lars", lars_inside, dict(learning_rate=3.1)),
        ("lars", lars_outside, dict(learning_rate=3.1)),
        ("sgd", sgd, dict(learning_rate=0.1, accumulate=2)),
        ("sgd", sgd, dict(learning_rate=0.1, clip_norm=5.0)),
        ("lars", lars_inside, dict(learning_rate=3.1, accumulate=2, clip_norm=5.0)),
    ],
    ids=["adamw", "sgd", "lars-inside", "lars-outside", "accumulate", "clip", "accumulate-clip"],
)
def test_training_is_the_plain_version(name, rule, changes, tmp_path):
    cfg = config(tmp_path, optimizer=name, **changes)
    model, plain = build(cfg)
    if rule is lars_outside:
        groups = model.parameter_groups
        model.parameter_groups = lambda decay: [{**g, "lr_in_momentum": False} for g in groups(decay)]
    update, initial = loop.Update(model, cfg, torch.device("cpu")), dict(plain.values)
    for step in range(STEPS):
        batches = [two_views() for _ in range(cfg.accumulate)]
        optim.set_rate(update.optimizer, cfg.learning_rate * optim.warmup_cosine(step, WARMUP, STEPS))
        losses = [update.backward(views)[0] for views in batches]
        metrics = update.step()
        rate = cfg.learning_rate * factor(step, WARMUP, STEPS)
        expected, norm = plain.step(batches, rule, rate, cfg.weight_decay, cfg.clip_norm)
        close(losses, expected, f"loss of step {step}")
        if cfg.clip_norm:
            assert norm > 1.5 * cfg.clip_norm  # it does clip
            close(metrics["grad_norm"].item(), norm, f"gradient's norm of step {step}")
    state = model.state_dict()
    assert state.keys() == plain.values.keys() and not state[FROZEN].any()
    for key, value in state.items():
        close(value, plain.values[key], key)
        if key != FROZEN:
            assert (value - initial[key]).abs().max() > 1e-3, f"{key} hardly moved"


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_and_gradients_at_other_temperatures(temperature, tmp_path):
    """A low temperature makes the largest logits; the optimizers' parity is at one temperature only."""
    cfg = config(tmp_path, temperature=temperature)
    (model, plain), views = build(cfg), two_views()
    loss, _ = loop.Update(model, cfg, torch.device("cpu")).backward(views)
    expected, gradients = plain.gradients(*views)
    close(loss, expected, "loss")
    for key, p in model.named_parameters():
        if key != FROZEN:
            close(p.grad, gradients[key], key)


@pytest.mark.parametrize("warmup, total", [(0, 7), (2, 5), (10, 110), (2.5, 20), (8, 5)])
def test_schedule_is_the_formula(warmup, total):
    """Also without a warm-up, with a fractional one, and with one longer than the run."""
    for k in range(total):
        assert optim.warmup_cosine(k, warmup, total) == pytest.approx(factor(k, warmup, total), rel=1e-13)
