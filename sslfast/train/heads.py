"""DINO's head, and networks that end in it."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sslfast.train.vit import ViT


class DINOHead(nn.Module):
    """Features [N, dim] -> rows of unit length [N, bottleneck], which meet prototypes of unit length.

    Linear layers with GELU between, as in DINO (Caron et al. 2021), without BatchNorm. The last layer of the
    paper is a linear one under weight_norm; here its normalised weight is `weight()`, an ordinary product
    that torch.compile, copies and checkpoints take as any other.

    Args:
        prototypes: K. hidden, bottleneck: widths. layers: linear layers, without the prototypes.
        fixed_norm: prototypes keep the norm 1; otherwise each has one that is learned.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        fixed_norm: bool = True,
    ) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        parts: list[nn.Module] = []
        for i, (width, out) in enumerate(zip(widths, widths[1:], strict=False)):
            parts += [nn.GELU()] * (i > 0) + [nn.Linear(width, out)]
        self.mlp = nn.Sequential(*parts)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(bottleneck, prototypes, bias=False).weight
        self.norms = None if fixed_norm else nn.Parameter(torch.ones(prototypes, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)

    def weight(self) -> Tensor:
        """[K, bottleneck]"""
        rows = F.normalize(self.prototypes, dim=1)
        return rows if self.norms is None else rows * self.norms


class Network(nn.Module):
    """Encoder and heads, for two global views and any number of smaller ones.

    Args:
        encoder: images [B, C, H, W] -> features [B, dim].
        head: of an image's features; patch_head: of a masked patch's token, perhaps the same one, or None.
        dim: of a token.
    """

    def __init__(
        self, encoder: nn.Module, head: DINOHead, patch_head: DINOHead | None = None, dim: int = 0
    ) -> None:
        super().__init__()
        self.encoder, self.head, self.patch_head = encoder, head, patch_head
        self.mask_token = None if patch_head is None else nn.Parameter(torch.zeros(dim))

    def forward(self, views: Sequence[Tensor], mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(features [V, B, dim], with a patch_head also patches' tokens of the global views [2 B L, dim]).

        Global views go through the encoder together, and local ones of the same size. mask: [2 B, L], 1 where
        it sees the mask token in place of a patch.
        """
        features, patches = list[Tensor](), None
        sizes = groupby(enumerate(views), lambda view: (view[0] < 2, view[1].shape[-2:]))
        for (is_global, _), group in sizes:
            x = torch.cat([view for _, view in group])
            if is_global and isinstance(self.encoder, ViT) and self.patch_head is not None:
                hidden = None if mask is None or self.mask_token is None else (mask, self.mask_token)
                tokens = self.encoder.tokens(x, hidden=hidden)
                features.append(tokens[:, 0])
                patches = tokens[:, 1:].flatten(0, 1)
            else:
                features.append(self.encoder(x))
        return torch.cat(features).unflatten(0, (len(views), -1)), patches

    def train_prototypes(self, on: bool) -> None:
        """Whether they and their norms get gradients, of every head."""
        for head in (self.head, self.patch_head):
            for p in (head.prototypes, head.norms) if head is not None else ():
                if p is not None:
                    p.requires_grad_(on)


def network(encoder: nn.Module, sizes: tuple[int, int, int, int, int, bool], ibot_head: str) -> Network:
    """Encoder and heads of `sizes`, the arguments of DINOHead; ibot_head: "none", "shared" or "separate"."""
    if ibot_head != "none" and not isinstance(encoder, ViT):
        raise ValueError(f"ibot_weight: iBOT masks the patches of a ViT, got {type(encoder).__name__}")
    head = DINOHead(*sizes)
    if ibot_head == "none":
        return Network(encoder, head)
    return Network(encoder, head, head if ibot_head == "shared" else DINOHead(*sizes), sizes[0])
