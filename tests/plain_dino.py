"""DINO's head, losses, schedules and optimizer step in plain PyTorch, with DINOv2's Sinkhorn, KoLeo and iBOT,
written from the papers and the published definitions as loops and formulas to hold training against."""

import math

import torch
from torch.nn import functional as F


def gelu(x):
    """x P(normal < x), the exact form."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def head(x, p):
    """x [N, C] -> logits [N, K] = z wᵀ, of z = mlp(x) / ‖mlp(x)‖ and w_k = prototypes_k / ‖prototypes_k‖.

    The MLP's Linear layers are p["0.weight"], p["0.bias"], p["2.weight"], ...; a GELU stands between two.
    """
    layer = 0
    while f"{layer}.weight" in p:
        if layer > 0:
            x = gelu(x)
        x = x @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
        layer += 2
    z = F.normalize(x, dim=1, eps=1e-12)
    prototypes = p["prototypes"]
    w = prototypes / (prototypes * prototypes).sum(1, keepdim=True).sqrt()
    return z @ w.T


def cross_entropy(probs, logits, temperature):
    """[B, K], [B, K] -> [B]: −Σ_k probs_k log softmax(logits / temperature)_k."""
    return -(probs * torch.log_softmax(logits / temperature, dim=1)).sum(1)


def pair_loss(student_logits, teacher_probs, student_temp):
    """Lists of [B, K] -> 1/n Σ_t Σ_{v≠t} mean_b CE(teacher_probs[t], student_logits[v]) over the n pairs."""
    total, pairs = 0, 0
    for t, probs in enumerate(teacher_probs):
        for v, logits in enumerate(student_logits):
            if v == t:
                continue
            total = total + cross_entropy(probs, logits, student_temp).mean()
            pairs += 1
    return total / pairs


def dino_loss(student_logits, teacher_logits, center, student_temp, teacher_temp):
    """Lists of [B, K], center [K] -> scalar; the teacher gives softmax((logits − center) / teacher_temp)."""
    probs = []
    for logits in teacher_logits:
        probs.append(torch.softmax((logits.detach() - center) / teacher_temp, dim=1))
    return pair_loss(student_logits, probs, student_temp)


def new_center(center, teacher_logits, momentum):
    """m c + (1 − m) mean of all teacher rows: [K], for use from the next step on."""
    rows = torch.cat(list(teacher_logits)).detach()
    return momentum * center + (1 - momentum) * rows.sum(0) / len(rows)


def sinkhorn(logits, temperature, iterations):
    """[N, K] -> [N, K], rows of sum 1: Q [K, N] = exp(logits / temperature)ᵀ is scaled in turn until each
    prototype (a row of Q) holds 1/K of the mass and each sample (a column) 1/N."""
    q = torch.exp(logits.detach() / temperature).T
    k, n = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(dim=1, keepdim=True)
        q = q / k
        q = q / q.sum(dim=0, keepdim=True)
        q = q / n
    q = q * n
    return q.T


def sinkhorn_dino_loss(student_logits, teacher_logits, student_temp, teacher_temp):
    """Lists of [B, K] -> scalar; the teacher gives three Sinkhorn iterations over all its views' rows."""
    probs = sinkhorn(torch.cat(list(teacher_logits)), teacher_temp, 3)
    return pair_loss(student_logits, probs.split([len(x) for x in teacher_logits]), student_temp)


def koleo(x, eps=1e-8):
    """[N, D] -> −mean_i log(‖u_i − u_nn(i)‖ + eps), u = x / ‖x‖, nn(i) the j ≠ i of the largest u_i·u_j."""
    x = F.normalize(x, dim=1, eps=eps)
    dots = (x @ x.T).detach().tolist()
    total = 0
    for i in range(len(x)):
        nearest = None
        for j in range(len(x)):
            if j != i and (nearest is None or dots[i][j] > dots[i][nearest]):
                nearest = j
        total = total - torch.log(torch.linalg.vector_norm(x[i] - x[nearest]) + eps)
    return total / len(x)


def ibot(student_logits, teacher_probs, image_of_row, images, student_temp):
    """Masked patches' [R, K], [R, K] and image [R] -> 1/images Σ_r CE_r / #(masked rows of r's image).

    `images` counts those with no masked patch too.
    """
    owners = [int(i) for i in image_of_row]
    losses = cross_entropy(teacher_probs.detach(), student_logits, student_temp)
    total = losses.new_zeros(())
    for loss, owner in zip(losses, owners, strict=True):
        total = total + loss / owners.count(owner)
    return total / images


# Schedules.


def cosine(start, end, step, total):
    """end + (start − end) (1 + cos(π step / total)) / 2: weight decay .04 -> .4, EMA momentum .996 -> 1."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total))


def teacher_temp(epoch, start, end, warmup_epochs):
    """linspace(start, end, warmup_epochs)[⌊epoch⌋], then `end`: constant within an epoch."""
    epoch = math.floor(epoch)
    if epoch >= warmup_epochs:
        return end
    if warmup_epochs == 1:
        return start  # linspace of one number
    return start + (end - start) * epoch / (warmup_epochs - 1)


# Updates. A gradient of None leaves its parameter, and what is remembered of it, as they are.


def clip_each(grads, max_norm):
    """Each tensor by itself: g min(1, max_norm / (‖g‖ + 1e-6)), a new list."""
    clipped = []
    for g in grads:
        if g is not None:
            coef = max_norm / ((g * g).sum().sqrt() + 1e-6)
            if coef < 1:
                g = g * coef
        clipped.append(g)
    return clipped


@torch.no_grad()
def adamw_step(params, grads, state, lr, weight_decay, betas=(0.9, 0.999), eps=1e-8):
    """In place: p −= lr wd p, then p −= lr m̂ / (√v̂ + eps). `state` begins as a list of empty dicts.

    m = β1 m + (1 − β1) g, v = β2 v + (1 − β2) g², m̂ = m / (1 − β1ᵗ), v̂ = v / (1 − β2ᵗ); wd per parameter.
    """
    for p, g, s, wd in zip(params, grads, state, weight_decay, strict=True):
        if g is None:
            continue
        t = s["t"] = s.get("t", 0) + 1
        s["m"] = betas[0] * s.get("m", torch.zeros_like(p)) + (1 - betas[0]) * g
        s["v"] = betas[1] * s.get("v", torch.zeros_like(p)) + (1 - betas[1]) * g * g
        m_hat = s["m"] / (1 - betas[0] ** t)
        v_hat = s["v"] / (1 - betas[1] ** t)
        p.copy_(p - lr * wd * p - lr * m_hat / (v_hat.sqrt() + eps))


@torch.no_grad()
def ema(targets, sources, momentum):
    """In place: target = m target + (1 − m) source."""
    for target, source in zip(targets, sources, strict=True):
        target.copy_(momentum * target + (1 - momentum) * source)
