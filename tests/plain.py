"""Plain PyTorch to hold training against: networks as functions of a dict of tensors, optimizers as formulas.

Written from the papers and the published code, without a look at ours, and sharing nothing with it but the
names of the tensors; only `train_both`, at the end, runs both. A method's test adds its loss.
"""

import math

import torch
from torch.nn import functional as F

from sslfast.train import loop, optim
from sslfast.train.methods import Now

BATCH, STEPS, WARMUP = 16, 5, 2
PARAMETERS = (".weight", ".bias", ".class_token")  # how their names end; the rest are buffers


class Plain:
    """`values` holds parameters, statistics and all else of a method by our names.

    Names that begin with one of `untrained` have no gradient. BatchNorm cuts its batch into `splits` parts.
    """

    def __init__(self, state, untrained=(), splits=1):
        self.values = {name: value.clone() for name, value in state.items()}
        self.trained = [n for n in state if n.endswith(PARAMETERS) and not n.startswith(untrained)]
        self.splits = splits
        self.memory, self.updates = {}, 0  # the optimizer's

    def loss(self, first, second):
        raise NotImplementedError

    def before_update(self, k):
        """`k` updates were made before this one."""

    def after_update(self, k):
        """The same k, after the weights have changed."""

    def norm(self, x, name):
        """Normalises each part with the variance over n, and remembers the one over n - 1."""
        v, parts = self.values, x.chunk(self.splits)
        assert len(parts) == self.splits and len(x) % self.splits == 0
        over = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        means, variances, normal = [], [], []
        for part in parts:
            n = part.numel() // part.shape[1]
            mean = part.sum(over) / n
            centred = part - mean.view(shape)
            var = (centred * centred).sum(over) / n
            means.append(0.9 * v[f"{name}.running_mean"] + 0.1 * mean.detach())
            variances.append(0.9 * v[f"{name}.running_var"] + 0.1 * var.detach() * n / (n - 1))
            normal.append(centred / torch.sqrt(var + 1e-5).view(shape))
        v[f"{name}.running_mean"] = sum(means) / self.splits
        v[f"{name}.running_var"] = sum(variances) / self.splits
        v[f"{name}.num_batches_tracked"] = v[f"{name}.num_batches_tracked"] + 1
        x = torch.cat(normal)
        if f"{name}.weight" not in v:
            return x
        return x * v[f"{name}.weight"].view(shape) + v[f"{name}.bias"].view(shape)

    def linear(self, x, name):
        x = x @ self.values[f"{name}.weight"].T
        return x + self.values[f"{name}.bias"] if f"{name}.bias" in self.values else x

    def conv(self, x, name, stride):
        weight = self.values[f"{name}.0.weight"]
        return self.norm(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2), f"{name}.1")

    def compact(self, x, name):
        """Images [N, 1, 28, 28] -> features [N, 128]."""
        x = self.conv(x, f"{name}.stem.0", 2).clamp(min=0)
        for stage, stride in enumerate((1, 2, 2)):
            at = f"{name}.stages.{stage}"
            inner = self.conv(x, f"{at}.layers.0", stride).clamp(min=0)
            inner = self.conv(inner, f"{at}.layers.1", 1)
            x = (inner + (x if stride == 1 else self.conv(x, f"{at}.shortcut", stride))).clamp(min=0)
        return x.mean((2, 3))

    def follow(self, teacher, momentum):
        """The teacher's parameters, not its statistics, come nearer to the student's."""
        for name, value in self.values.items():
            if name.startswith(f"{teacher}.model.") and name.endswith(PARAMETERS):
                part, rest = name.removeprefix(f"{teacher}.model.").split(".", 1)
                student = self.values[f"{('encoder', 'projector')[int(part)]}.{rest}"]
                assert not torch.equal(value, student), name
                self.values[name] = value + (1 - momentum) * (student - value)

    def gradients(self, first, second):
        """(loss, gradient by name)"""
        leaves = [self.values[name].requires_grad_() for name in self.trained]
        loss = self.loss(first, second)
        gradients = torch.autograd.grad(loss, leaves)
        for name in self.trained:
            self.values[name] = self.values[name].detach()
        return loss.detach(), dict(zip(self.trained, gradients, strict=True))

    def step(self, batches, rule, rate, weight_decay, clip_norm, decay_all):
        """(loss of each batch, norm of their mean gradient), and the update."""
        k = self.updates
        self.before_update(k)
        losses, mean = [], dict.fromkeys(self.trained, 0.0)
        for first, second in batches:
            loss, gradients = self.gradients(first, second)
            losses.append(loss)
            mean = {name: mean[name] + gradients[name] / len(batches) for name in self.trained}
        norm = math.sqrt(sum((g * g).sum().item() for g in mean.values()))
        factor = min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0
        self.updates += 1
        for name in self.trained:
            decay = weight_decay if decay_all or self.values[name].dim() > 1 else 0.0
            self.values[name] = rule(self, name, factor * mean[name], rate, decay)
        self.after_update(k)
        return losses, norm


def unit(z):
    return z / (z * z).sum(1, keepdim=True).sqrt()


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


def config(kind, tmp_path, **changes):
    values = dict(
        backbone="compact",
        batch_size=BATCH,
        epochs=1,
        warmup_epochs=WARMUP / STEPS,
        weight_decay=0.05,  # large, so that one in the wrong place shows
        precision="float32",  # no autocast: float64 stays float64
        device="cpu",
        seed=8,  # no gradient but 0 is near AdamW's epsilon, where rounding would be amplified
    )
    return kind(out=tmp_path / "run", **{**values, **changes})


def build(method, cfg, teacher="", keep=()):
    """Our model, in float64: no scale, shift or running statistic at its first 0 or 1, but for those of
    `keep`, and no weight of the teacher like the student's."""
    model = loop.build(method, cfg, channels=1, size=28).double().train()
    for name, value in model.state_dict().items():
        if (value.dim() == 1 or name.endswith(".class_token")) and name not in keep:
            value.add_(0.5 * torch.rand_like(value))
        elif teacher and name.startswith(f"{teacher}.") and name.endswith(PARAMETERS):
            value.add_(0.3 * value.std() * torch.randn_like(value))
    return model


def two_views():
    return [torch.rand(BATCH, 1, 28, 28, dtype=torch.float64) for _ in range(2)]


def close(actual, expected, name, within=1e-10):
    torch.testing.assert_close(actual, expected, rtol=within, atol=within, msg=lambda t: f"{name}: {t}")


def train_both(model, plain, cfg, rule, idle=(), decay_all=False):
    """Updates as the loop makes them, and all state compared after each; but for `idle`, all has to move.

    What is idle and trained has a gradient of rounding alone, which AdamW divides by one as small.
    """
    assert [name for name, p in model.named_parameters() if p.requires_grad] == plain.trained
    update, initial = loop.Update(model, cfg, torch.device("cpu")), dict(plain.values)
    for step in range(STEPS):
        batches = [two_views() for _ in range(cfg.accumulate)]
        random = torch.get_rng_state()  # both draw the same permutations, if any
        optim.set_rate(update.optimizer, cfg.learning_rate * optim.warmup_cosine(step, WARMUP, STEPS))
        model.schedule(Now(step, STEPS, STEPS), update.optimizer.param_groups)
        model.before_step()
        losses = [update.backward(views)[0] for views in batches]
        metrics, drawn = update.step(), torch.get_rng_state()
        rate = cfg.learning_rate * factor(step, WARMUP, STEPS)
        torch.set_rng_state(random)
        expected, norm = plain.step(batches, rule, rate, cfg.weight_decay, cfg.clip_norm, decay_all)
        assert torch.equal(torch.get_rng_state(), drawn)
        close(losses, expected, f"loss of step {step}")
        if cfg.clip_norm:
            assert norm > 1.5 * cfg.clip_norm  # it does clip
            close(metrics["grad_norm"].item(), norm, f"gradient's norm of step {step}")
        state = model.state_dict()
        assert state.keys() == plain.values.keys()
        for key, value in state.items():
            within = 1e-8 if key in idle and key in plain.trained else 1e-10
            close(value, plain.values[key], f"{key} after step {step}", within)
    for key, value in state.items():
        moved = (value - initial[key]).abs().max()
        assert moved < 1e-5 if key in idle else moved > 1e-4, f"{key} moved by {moved}"
