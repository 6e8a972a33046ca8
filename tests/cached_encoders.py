"""Encoders, inputs and references for the tests of cached_step."""

from collections.abc import Callable

import torch
from torch import nn

from sslfast import clip_loss

ROWS = 11  # which no micro-batch but 1 and 11 divides


def mlp(inside: nn.Module | None = None, width: int = 5) -> nn.Sequential:
    middle = [] if inside is None else [inside]
    return nn.Sequential(nn.Linear(width, 8), *middle, nn.Tanh(), nn.Linear(8, 4)).double()


def batch(*widths: int, rows: int = ROWS) -> list[torch.Tensor]:
    return [torch.randn(rows, width, dtype=torch.float64) for width in widths]


class Recorder(nn.Module):
    """An encoder that keeps what each of its runs saw."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.runs = inside, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(2)
        self.runs.append((torch.is_grad_enabled(), len(x), noise, buffers(self)))
        return self.inside(x)


def gradients(*modules: nn.Module) -> list[torch.Tensor | None]:
    """Of all parameters, which have none afterwards."""
    found = [p.grad for m in modules for p in m.parameters()]
    for module in modules:
        module.zero_grad()
    return found


def buffers(module: nn.Module) -> list[torch.Tensor]:
    return [b.clone() for b in module.buffers()]


def cuts(rows: int, micro_batch: int) -> list[slice]:
    count = -(-rows // micro_batch)
    ends = [-(-rows * k // count) for k in range(count + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def chunked(encoder: Callable, x: torch.Tensor, micro_batch: int) -> torch.Tensor:
    """The encoder's output, from one run over the chunks with the graphs of all."""
    return torch.cat([encoder(x[rows]) for rows in cuts(len(x), micro_batch)])


def near(found: list, expected: list, tolerance: float = 1e-12) -> bool:
    """Whether both have the same tensors, and None in the same places."""
    return len(found) == len(expected) and all(
        (x is None) == (y is None) and (x is None or torch.allclose(x, y, tolerance, tolerance))
        for x, y in zip(found, expected, strict=True)
    )


class Temperature(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return clip_loss(x, y, self.log_scale.exp())


class Towers(nn.Module):
    """Of two inputs, in one module that holds the scale too."""

    def __init__(self, wrap: Callable = lambda tower: tower) -> None:
        super().__init__()
        self.image, self.text = wrap(mlp()), wrap(mlp(width=3))
        self.log_scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, image: torch.Tensor | None = None, text: torch.Tensor | None = None) -> torch.Tensor:
        return self.image(image) if text is None else self.text(text)

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return self.image(image)

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        return self.text(text)


def spectral(module: nn.Sequential) -> nn.Sequential:
    """A forward pass in training mode moves a buffer and depends on it."""
    nn.utils.parametrizations.spectral_norm(module[0])
    return module
