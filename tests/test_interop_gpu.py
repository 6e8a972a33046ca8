"""Drop-ins on a GPU against themselves on the CPU in float64, and without reads by the host."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.interop import lightly, moco, open_clip, solo_learn, supcontrast
from sslfast.ops import guided_lse, pair_products

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
N, D = 300, 48
Call = Callable[[Tensor, Tensor], Tensor]


def unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def bank(device: str) -> Call:
    loss = lightly.NTXentLoss(0.1, (64, D)).to(device)
    loss.memory_bank.bank.copy_(unit(torch.arange(64.0 * D).view(64, D).sin()))
    return loss


def dino(device: str) -> Call:
    loss = lightly.DINOLoss(D).to(device)
    return lambda a, b: loss([a.detach(), b.detach()], [a, b, a + b])


def supcon(mode: str) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        loss, labels = supcontrast.SupConLoss(contrast_mode=mode), (torch.arange(N) % 17).to(device)
        return lambda a, b: loss(unit(torch.stack((a, b), 1)), labels)

    return make


def masked(device: str) -> Call:
    loss, mask = supcontrast.SupConLoss(), torch.ones(N, N).triu(-3).tril(5).to(device)
    return lambda a, b: loss(unit(torch.stack((a, b), 1)), mask=mask)


def simclr(device: str) -> Call:
    indexes = (torch.arange(N) % 17).repeat(2).to(device)
    return lambda a, b: solo_learn.simclr_loss_func(torch.cat((a, b)), indexes)


def queue(device: str) -> Call:
    keys = unit(torch.arange(64.0 * D).view(64, D).cos()).T.to(device)
    return lambda a, b: moco.contrastive_loss(unit(a), unit(b), keys.to(a.dtype))


def guide(device: str) -> Call:
    ids = torch.arange(N, device=device)

    def call(a: Tensor, b: Tensor) -> Tensor:
        u, v = (unit(x.detach().roll(1, 1)) for x in (a, b))
        limit = (u * v).sum(1) + 0.05
        return guided_lse(a, b, u, v, limit, scale=0.3, a_ids=ids, b_ids=ids).exp().add(1).log().sum()

    return call


def listed(device: str) -> Call:
    index = torch.arange(4 * N, device=device)
    return lambda a, b: pair_products(a, b, index * 7 % N, index * 11 % N).square().sum()


CASES: dict[str, Callable[[str], Call]] = {
    "lightly NTXent": lambda device: lightly.NTXentLoss(0.1),
    "lightly NTXent, bank": bank,
    "lightly DCLW": lambda device: lightly.DCLWLoss(),
    "lightly DINO": dino,
    "open_clip": lambda device: lambda a, b: open_clip.ClipLoss()(unit(a), unit(b), 14.0),
    "open_clip SigLip": lambda device: lambda a, b: open_clip.SigLipLoss()(unit(a), unit(b), 10.0, -10.0),
    "supcontrast": supcon("all"),
    "supcontrast, one": supcon("one"),
    "supcontrast, mask": masked,
    "solo simclr": simclr,
    "moco": queue,
    "guided_lse": guide,
    "pair_products": listed,
}


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu_in_double_and_no_host_read(name):
    torch.manual_seed(0)
    a, b = torch.randn(2, N, D, dtype=torch.float64)
    exact = [a.requires_grad_(), (a.detach() + b).requires_grad_()]
    truth = CASES[name]("cpu")(*exact)
    slopes = torch.autograd.grad(truth, exact, allow_unused=True)
    leaves = [x.detach().float().cuda().requires_grad_() for x in exact]
    call = CASES[name]("cuda")
    value = call(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    torch.testing.assert_close(value.double().cpu(), truth.detach(), rtol=1e-5, atol=1e-5)
    for x, y in zip(found, slopes, strict=True):
        assert (x is None) == (y is None)
        assert x is None or (x.double().cpu() - y).norm() <= 1e-4 * y.norm()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(call(*leaves), leaves, allow_unused=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
