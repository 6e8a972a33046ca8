"""Losses of a matrix of similarities in plain PyTorch, as most code has them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from sslfast.bench.case import wide


def plain_clip(a: Tensor, b: Tensor, scale: Tensor | float) -> Tensor:
    logits, own = wide(scale * a @ b.T), torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def plain_siglip(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * a @ b.T + bias
    signs = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
    return -F.logsigmoid(wide(signs * logits)).sum() / len(a)


def plain_supcon(features: Tensor, labels: Tensor) -> Tensor:
    """As SupContrast's losses.py, of one view."""
    z = F.normalize(features, dim=1)
    logits = wide(z @ z.T) / 0.1
    logits = logits - logits.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), device=z.device, dtype=logits.dtype)
    positives = (labels[:, None] == labels).to(logits.dtype) * others
    log_prob = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    means = (positives * log_prob).sum(1) / positives.sum(1).clamp(min=1)
    return -(0.1 / 0.07) * means.mean()


def plain_triplet(embeddings: Tensor, labels: Tensor) -> Tensor:
    x = F.normalize(wide(embeddings), dim=1)
    distances, same = torch.cdist(x, x), labels[:, None] == labels
    positives = same & ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    far = distances.masked_fill(~positives, -torch.inf).max(1).values
    close = distances.masked_fill(same, torch.inf).min(1).values
    some = positives.any(1) & ~same.all(1)
    return F.relu(far - close + 0.2)[some].mean()


def plain_moco(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """As moco/builder.py: the queue is cloned, since the next batch is written to it, and logits are put side
    by side."""
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    positive = (q * k).sum(1, keepdim=True)
    logits = wide(torch.cat([positive, q @ queue.clone().detach().T], dim=1)) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def plain_info_nce(query: Tensor, key: Tensor) -> Tensor:
    q, k = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return F.cross_entropy(wide(q @ k.T) / 0.07, torch.arange(len(q), device=q.device))


def plain_byol(prediction: Tensor, target: Tensor) -> Tensor:
    p, z = F.normalize(wide(prediction), dim=1), F.normalize(wide(target), dim=1)
    return 2 - 2 * (p * z).sum(1).mean()


def plain_dcl(z1: Tensor, z2: Tensor) -> Tensor:
    """Yeh et al. 2022: without the positive among the negatives."""
    n, z = len(z1), F.normalize(torch.cat((z1, z2)), dim=1)
    logits, index = wide(z @ z.T) / 0.1, torch.arange(2 * n, device=z.device)
    positive = logits[index, index.roll(n)]
    left_out = torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)
    return (logits.masked_fill(left_out, -torch.inf).logsumexp(1) - positive).mean()


def plain_hard_negatives(z1: Tensor, z2: Tensor) -> Tensor:
    """As HCL's main.py, beta 1 and tau_plus 0.1: exponentials of all pairs, then a boolean selection."""
    n, z = len(z1), F.normalize(torch.cat((z1, z2)), dim=1)
    negatives = ~torch.eye(n, dtype=torch.bool, device=z.device).repeat(2, 2)
    neg = (wide(z @ z.T) / 0.5).exp().masked_select(negatives).view(2 * n, -1)
    pos = (wide(z[:n] * z[n:]).sum(1) / 0.5).exp().repeat(2)
    weight = neg.log().exp()  # to the power of beta
    total = (weight * neg).sum(1) / weight.mean(1)
    count = 2 * n - 2
    total = ((total - 0.1 * count * pos) / (1 - 0.1)).clamp(min=count * math.exp(-1 / 0.5))
    return -(pos / (pos + total)).log().mean()


def plain_koleo(features: Tensor) -> Tensor:
    """As DINOv2's koleo_loss.py."""
    x = F.normalize(wide(features), dim=1)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)
    return -torch.log(F.pairwise_distance(x, x[nearest], 2, 1e-8) + 1e-8).mean()


def plain_lse(a: Tensor, b: Tensor) -> Tensor:
    return (10.0 * wide(a @ b.T)).logsumexp(1)


def plain_lse_both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    logits = 10.0 * wide(a @ b.T)
    return logits.logsumexp(1), logits.logsumexp(0)


def plain_bce(a: Tensor, b: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(a), device=a.device, dtype=a.dtype) - 1
    return -F.logsigmoid(wide(signs * (10.0 * a @ b.T - 10.0))).sum()


def plain_nnclr(nearest: Tensor, prediction: Tensor) -> Tensor:
    n, p = F.normalize(nearest, dim=1), F.normalize(prediction, dim=1)
    return F.cross_entropy(wide(n @ p.T) / 0.1, torch.arange(len(n), device=n.device))


def plain_multiview(views: Tensor) -> Tensor:
    count, n, _ = views.shape
    z = F.normalize(views.flatten(0, 1), dim=1)
    logits = wide(z @ z.T) / 0.1
    same = torch.eye(n, dtype=torch.bool, device=z.device).repeat(count, count)
    negatives = logits.masked_fill(same, -torch.inf).logsumexp(1)
    others = same & ~torch.eye(count * n, dtype=torch.bool, device=z.device)
    return F.softplus(negatives[:, None] - logits[others].view(count * n, count - 1)).mean()
