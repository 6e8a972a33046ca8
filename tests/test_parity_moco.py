"""Golden parity of MoCo v2, and of v1's head: see test_parity_simclr.

He et al. 2020 and Chen et al. 2020, and the definitions of their code.
"""

import plain
import pytest
import torch
from plain import BATCH, sgd, unit

from sslfast.train import loop, optim
from sslfast.train.methods.moco import Config

OUT = 12


class Plain(plain.Plain):
    """`splits` is of the encoders alone: neither head has a BatchNorm."""

    def __init__(self, state, cfg):
        super().__init__(state, untrained=("keys.",), splits=cfg.bn_splits)
        self.momentum, self.temperature, self.head = cfg.momentum, cfg.temperature, cfg.head

    def project(self, x, name):
        if self.head == "mlp":
            x, name = self.linear(x, f"{name}.0").clamp(min=0), f"{name}.2"
        return unit(self.linear(x, name))

    def key(self, view):
        """The images change places, so that other images are normalised together than of the queries."""
        order = torch.randperm(len(view))
        z = self.project(self.compact(view[order], "keys.model.0"), "keys.model.1")
        key = torch.empty_like(z)
        for place, image in enumerate(order.tolist()):
            key[image] = z[place]
        return key

    def before_update(self, k):
        """The keys' network comes nearer to the query's of the update before."""
        self.follow("keys", self.momentum)

    def loss(self, first, second):
        """Which of 1 + K keys is the query's own? The batch enters the queue afterwards, one by one."""
        query, key = self.project(self.compact(first, "encoder"), "projector"), self.key(second)
        queue, pointer = self.values["queue.keys"], self.values["queue.pointer"]
        own = (query * key).sum(1, keepdim=True)
        logits = torch.cat((own, query @ queue.T), dim=1) / self.temperature
        loss = (logits.exp().sum(1).log() - logits[:, 0]).mean()
        queue = queue.clone()
        for row in key:
            queue[pointer] = row
            pointer = (pointer + 1) % len(queue)
        self.values |= {"queue.keys": queue, "queue.pointer": pointer}
        return loss


def config(tmp_path, **changes):
    values = dict(optimizer="sgd", learning_rate=0.1, momentum=0.9, temperature=0.2, queue_size=36)
    return plain.config(Config, tmp_path, **{**values, "projection_dim": OUT, "bn_splits": 1, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(bn_splits=4),
        dict(bn_splits=4, head="linear", temperature=0.07),
        dict(bn_splits=4, accumulate=2, momentum=0.5),
        dict(queue_size=11),
    ],
    ids=["mlp", "splits", "linear", "accumulate", "short-queue"],
)
def test_training_is_the_plain_version(changes, tmp_path):
    """Queues that no number of batches fills exactly, also one that is shorter than a batch."""
    cfg = config(tmp_path, **changes)
    assert cfg.queue_size % BATCH
    model = plain.build("moco", cfg, teacher="keys")
    model.queue.pointer.fill_(7)
    plain.train_both(model, Plain(model.state_dict(), cfg), cfg, sgd, decay_all=True)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_networks(head, tmp_path):
    """The keys' network begins as the query's, the queue with directions; neither head has a BatchNorm."""
    state = loop.build("moco", config(tmp_path, head=head), channels=1, size=28).state_dict()
    last = {"weight": (OUT, 128), "bias": (OUT,)}
    mlp = {"0.weight": (128, 128), "0.bias": (128,)} | {f"2.{key}": shape for key, shape in last.items()}
    head = mlp if head == "mlp" else last
    encoder = {key: tuple(value.shape) for key, value in state.items() if key.startswith("encoder.")}
    networks = encoder | {f"projector.{key}": shape for key, shape in head.items()}
    keys = {
        key.replace("encoder", "keys.model.0").replace("projector", "keys.model.1"): key for key in networks
    }
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    queue = {"queue.keys": (36, OUT), "queue.pointer": ()}
    assert shapes == networks | {ours: networks[theirs] for ours, theirs in keys.items()} | queue
    for ours, theirs in keys.items():
        assert torch.equal(state[ours], state[theirs]) and state[ours].data_ptr() != state[theirs].data_ptr()
    torch.testing.assert_close(state["queue.keys"].norm(dim=1), torch.ones(36))
    assert abs(state["queue.keys"].mean()) < 0.1  # about as many of either sign
    assert not state["queue.pointer"]


def test_sizes_are_the_papers(tmp_path):
    cfg = Config(out=tmp_path)
    assert (cfg.projection_dim, cfg.temperature, cfg.head) == (128, 0.2, "mlp")


def test_rate_of_v1_falls_tenfold_at_120_and_160_of_200_epochs():
    for epoch in range(200):
        expected = 1.0 if epoch < 120 else 0.1 if epoch < 160 else 0.01
        assert optim.rate_at("steps", 10 * epoch, 0, 2000) == pytest.approx(expected, rel=1e-13)
        assert optim.rate_at("steps", 10 * epoch + 9, 0, 2000) == pytest.approx(expected, rel=1e-13)
