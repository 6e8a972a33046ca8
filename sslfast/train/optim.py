"""Parameter groups, LARS, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

NAMES = ("adamw", "sgd", "lars")


def parameter_groups(module: nn.Module, weight_decay: float, vectors: bool = False) -> list[dict]:
    """Weights with decay; biases and normalisation weights (1-d) without LARS's trust ratio, and with decay
    if `vectors` says so and the optimizer is not LARS."""
    trained, decay = [p for p in module.parameters() if p.requires_grad], weight_decay if vectors else 0.0
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "trust": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": decay, "trust": False},
    ]
    return [group for group in groups if group["params"]]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) in both published forms.

        u = g + weight_decay p,  trust = eta |p| / |u|, 1 where either norm is 0 or the group says trust=False
        lr_in_momentum=True  (SimCLR):         v = momentum v + lr trust u,  p -= v
        lr_in_momentum=False (MoCo v3, BYOL):  v = momentum v + trust u,     p -= lr v

    The two differ as soon as lr changes. Parameters of a group are updated together by torch's foreach
    kernels (but for the product with each parameter's trust ratio), and nothing is read by the host.

    Args:
        params: parameters or groups; a group may set every option below.
        lr: learning rate, a float or 0-d tensor; commonly 0.3 * batch size / 256.
        eta: trust coefficient.
        trust: whether to scale by the trust ratio; biases and normalisation weights go without.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        trust: bool = True,
        lr_in_momentum: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay), ("eta", eta)):
            if not isinstance(value, Tensor) and not 0 <= value < float("inf"):
                raise ValueError(f"{name}: expected a number that is not negative, got {value}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "trust": trust,
            "lr_in_momentum": lr_in_momentum,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            if pairs:
                params, grads = zip(*pairs, strict=True)
                self._update(group, params, grads)
        return loss

    def _update(self, group: dict, params: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> None:
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        updates = torch._foreach_add(grads, params, alpha=group["weight_decay"])
        if group["trust"]:
            lengths = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
            ratios = group["eta"] * lengths[0] / lengths[1]
            ratios = torch.where((lengths[0] > 0) & (lengths[1] > 0), ratios, 1.0)
            torch._foreach_mul_(updates, ratios.unbind())
        lr = group["lr"]
        torch._foreach_mul_(momenta, group["momentum"])
        if group["lr_in_momentum"]:
            torch._foreach_mul_(updates, lr)
            torch._foreach_add_(momenta, updates)
            torch._foreach_sub_(params, momenta)
        else:
            torch._foreach_add_(momenta, updates)
            torch._foreach_sub_(params, torch._foreach_mul(momenta, lr))


def build(name: str, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer called `name`; its rate is a 0-d tensor on the device, to be set by set_rate."""
    dtype = torch.float32 if device.type == "cuda" else torch.float64  # fused kernels on a GPU take float32
    for group in groups:
        group["lr"] = torch.zeros((), device=device, dtype=dtype)
    if name == "lars":
        for group in groups:
            group["weight_decay"] *= group.get("trust", True)
        return LARS(groups, lr=0.0)
    if name == "sgd":
        sgd = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
        for p in (p for group in sgd.param_groups for p in group["params"]):
            # 0 gives the same first step; without it, one that overflows in float16 would leave fresh memory
            # here
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True, capturable=device.type == "cuda")
    raise ValueError(f"optimizer: expected one of {', '.join(NAMES)}, got {name!r}")


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads a state_dict, with each tensor laid out like its parameter, as fused kernels expect it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # set before every step
    for p, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                values[name] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Fills each group's 0-d tensor, which a captured step reads; a group may set `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"].fill_(rate * group.get("lr_scale", 1.0))


def rate_at(schedule: str, step: int, warmup: float, total: int) -> float:
    """Factor of the learning rate: "cosine", or "steps": a tenth from 60% of the run on, a hundredth from
    80%. Both begin with a linear warm-up."""
    if schedule == "cosine" or step < warmup:
        return warmup_cosine(step, warmup, total)
    return 0.1 ** ((5 * step >= 3 * total) + (5 * step >= 4 * total))


def cosine(start: float, end: float, step: int, total: int) -> float:
    """From start to end on a half cosine."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total))


def clip_each(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales each parameter's gradient alone down to a norm of at most max_norm, as DINO does, without a read
    by the host; returns the norm of all of them together before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    torch._foreach_mul_(gradients, (max_norm / (norms + 1e-6)).clamp(max=1).unbind())
    return norms.norm()


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the learning rate: linear from 0 over `warmup` steps, then a half cosine to 0 at `total`."""
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))
