"""Every contrastive loss with its inputs, for tests on devices and backends."""

import torch
from torch import Tensor
from torch.nn import functional as F

import sslfast


class Inputs:
    """Random leaves and labels on a device: n rows of d features, of unit length."""

    def __init__(self, device: str, n: int, d: int) -> None:
        self.device, self.n, self.d = device, n, d

    def rows(self, count: int | None = None, *, views: int = 0) -> Tensor:
        shape = (views,) * bool(views) + (count or self.n, self.d)
        return F.normalize(torch.randn(shape, device=self.device), dim=-1).requires_grad_()

    def number(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device, requires_grad=True)

    def labels(self, classes: int = 17) -> Tensor:
        return torch.randint(0, classes, (self.n,), device=self.device)

    def some_labels(self, classes: int) -> Tensor:
        """None for every third row."""
        return self.labels(classes).masked_fill(torch.arange(self.n, device=self.device) % 3 == 0, -100)


# name: (loss of the leaves and the constants, leaves, constants), the latter two of Inputs
LOSSES = {
    "ntxent": (sslfast.ntxent_loss, lambda i: (i.rows(), i.rows(), i.number(0.2)), lambda i: ()),
    "multiview": (sslfast.multiview_ntxent_loss, lambda i: (i.rows(views=4), i.number(0.2)), lambda i: ()),
    "info_nce": (
        lambda q, k, t: sslfast.info_nce_loss(q, k, temperature=t, symmetric=True, label_smoothing=0.1),
        lambda i: (i.rows(), i.rows(), i.number(0.1)),
        lambda i: (),
    ),
    "clip": (
        sslfast.clip_loss, lambda i: (i.rows(), i.rows(), i.number(14.0), i.number(-1.0)), lambda i: ()
    ),
    "siglip": (
        sslfast.siglip_loss, lambda i: (i.rows(), i.rows(), i.number(10.0), i.number(-10.0)), lambda i: ()
    ),
    "siglip, rows apart": (
        lambda *x: (sslfast.siglip_loss(*x, reduction="none") ** 2).sum(),
        lambda i: (i.rows(), i.rows(), i.number(10.0), i.number(-10.0)),
        lambda i: (),
    ),
    "supcon": (
        lambda x, t, y: sslfast.supcon_loss(x, y, t),
        lambda i: (i.rows(), i.number(0.1)),
        lambda i: (i.labels(),),
    ),
    "supcon, inside": (
        lambda x, t, y: sslfast.supcon_loss(x, y, t, form="inside"),
        lambda i: (i.rows(), i.number(0.1)),
        lambda i: (i.labels(),),
    ),
    "dcl": (
        lambda x, y, t: sslfast.dcl_loss(x, y, t, weight_sigma=0.5),
        lambda i: (i.rows(), i.rows(), i.number(0.1)),
        lambda i: (),
    ),
    "hard negatives": (
        sslfast.hard_negative_ntxent_loss, lambda i: (i.rows(), i.rows(), i.number(0.5)), lambda i: ()
    ),
    "nnclr": (sslfast.nnclr_loss, lambda i: (i.rows(), i.rows(), i.number(0.1)), lambda i: ()),
    **{
        f"triplet, {mining}": (
            lambda x, y, mining=mining: sslfast.triplet_margin_loss(x, y, 0.2, mining=mining),
            lambda i: (i.rows(),),
            lambda i: (i.labels(),),
        )
        for mining in ("hard", "semihard", "all")
    },
    "linear": (
        lambda h, w, b, y: sslfast.linear_cross_entropy(h, w, y, b[:, 0]),
        lambda i: (i.rows(), i.rows(1000), i.rows(1000)),
        lambda i: (i.some_labels(1000),),
    ),
    "linear, count known": (
        lambda h, w, b, y: sslfast.linear_cross_entropy(
            h, w, y, b[:, 0], num_labelled=len(y) - len(y[::3])
        ),
        lambda i: (i.rows(), i.rows(1000), i.rows(1000)),
        lambda i: (i.some_labels(1000),),
    ),
}  # fmt: skip


def made(name: str, inputs: Inputs) -> tuple:
    """(loss, leaves, constants), the same numbers every time."""
    loss, leaves, constants = LOSSES[name]
    torch.manual_seed(3)
    return loss, leaves(inputs), constants(inputs)


def step(loss, leaves, constants) -> tuple[Tensor, ...]:
    value = loss(*leaves, *constants)
    return value.detach(), *torch.autograd.grad(value, leaves)
