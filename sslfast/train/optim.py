"""Parameter groups, LARS, and the learning-rate schedule."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Weights with decay; biases and normalisation weights (1-d) without, and without LARS's trust ratio."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay, "trust": True},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "trust": False},
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as SimCLR's official code has it.

    The learning rate is inside the momentum buffer: v = momentum v + lr trust (g + weight_decay p), p -= v,
    with trust = eta |p| / |g + weight_decay p|, 1 where either norm is 0 or the group says trust=False.

    Args:
        params: parameters or groups, which may set `weight_decay` and `trust`.
        lr: learning rate, commonly 0.3 * batch size / 256.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "eta": eta,
            "trust": True,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["trust"]:
                    ratio = group["eta"] * p.norm() / update.norm()
                    update *= torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                v = state["momentum_buffer"]
                v.mul_(group["momentum"]).add_(update, alpha=group["lr"])
                p.sub_(v)
        return loss


def build(name: str, module: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    groups = parameter_groups(module, weight_decay)
    if name == "lars":
        return LARS(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate)


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the learning rate: linear from 0 over `warmup` steps, then a half cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total - warmup)))
