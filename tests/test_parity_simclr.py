"""Golden parity: training SimCLR must be what its definitions say, number for number.

The plain version was written from the papers and the published code, without a look at ours, and shares
nothing with it. In float64 both sides differ by rounding alone, so that a wrong epsilon, an unbiased variance
in the wrong place or a weight decay on one bias shows, where a comparison of learning curves would hide it.
"""

import plain
import pytest
import torch
from plain import adamw, close, lars_inside, lars_outside, sgd, two_views

from sslfast.train import loop, optim
from sslfast.train.methods.simclr import Config

FROZEN = "projector.7.bias"  # the last normalisation has no bias: a constant 0


class Plain(plain.Plain):
    def __init__(self, state, temperature):
        super().__init__(state, untrained=(FROZEN,))
        self.temperature = temperature

    def embed(self, x):
        """Images [N, 1, 28, 28] -> projections [N, 128]; all of N normalised together."""
        z = self.compact(x, "encoder")
        for layer in (0, 3, 6):
            z = self.norm(z @ self.values[f"projector.{layer}.weight"].T, f"projector.{layer + 1}")
            z = z if layer == 6 else z.clamp(min=0)
        return z

    def loss(self, first, second):
        """Each of the 2N rows has to find its other view among the 2N - 1 other rows."""
        z = plain.unit(self.embed(torch.cat((first, second))))
        similar = z @ z.T / self.temperature
        rows, total = len(z), 0.0
        for i in range(rows):
            others = [k for k in range(rows) if k != i]
            total = total + similar[i, others].exp().sum().log() - similar[i, (i + rows // 2) % rows]
        return total / rows


def build(tmp_path, **changes):
    """(config, our model, the plain one), alike"""
    cfg = plain.config(Config, tmp_path, **{"temperature": 0.2, **changes})
    model = plain.build("simclr", cfg, keep=(FROZEN,))
    assert not model.state_dict()[FROZEN].any()
    return cfg, model, Plain(model.state_dict(), cfg.temperature)


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
    cfg, model, reference = build(tmp_path, optimizer=name, **changes)
    if rule is lars_outside:
        groups = model.parameter_groups
        model.parameter_groups = lambda decay: [{**g, "lr_in_momentum": False} for g in groups(decay)]
    plain.train_both(model, reference, cfg, rule, idle=(FROZEN,))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_loss_and_gradients_at_other_temperatures(temperature, tmp_path):
    """A low temperature makes the largest logits; the optimizers' parity is at one temperature only."""
    (cfg, model, reference), views = build(tmp_path, temperature=temperature), two_views()
    loss, _ = loop.Update(model, cfg, torch.device("cpu")).backward(views)
    expected, gradients = reference.gradients(*views)
    close(loss, expected, "loss")
    for key, p in model.named_parameters():
        if key != FROZEN:
            close(p.grad, gradients[key], key)


@pytest.mark.parametrize("warmup, total", [(0, 7), (2, 5), (10, 110), (2.5, 20), (8, 5)])
def test_schedule_is_the_formula(warmup, total):
    """Also without a warm-up, with a fractional one, and with one longer than the run."""
    for k in range(total):
        expected = plain.factor(k, warmup, total)
        assert optim.warmup_cosine(k, warmup, total) == pytest.approx(expected, rel=1e-13)
