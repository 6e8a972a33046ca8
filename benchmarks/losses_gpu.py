"""Times CLIP's, SigLIP's and SupCon's losses, batch-hard triplets and linear_cross_entropy on a GPU, forward
and backward, beside eager PyTorch, torch.compile, chunks of cuBLAS products and installed peers.

A result is checked against float64 at its full size before it is timed; a wrong one is not timed. The
implementations alternate in one process, on the same inputs. The share is that of a large torch.mm's rate in
the same run, counting the M N D matrix products that exactness needs without the whole matrix (PRODUCTS)
whatever an implementation does. Peak memory is beyond the inputs and the gradients of the inputs.

    python benchmarks/losses_gpu.py --json-out benchmarks/results [--quick]
"""

import argparse
import functools
import importlib.util
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import losses_plain as plain
import torch
import triton
from gpu import PASSES, ROUNDS, peak_memory, rates
from losses_plain import Case, results, wide
from sslfast.kernels import tuning
from torch import Tensor
from torch.nn import functional as F

import sslfast

PRODUCTS = {
    "clip_loss": PASSES["clip"], "siglip_loss": 3.0, "supcon_loss": PASSES["ntxent"],
    "triplet_margin_loss": 1.0, "linear_cross_entropy": 3.0,
}  # fmt: skip
CASES = (
    Case("clip_loss", 32768, 512, dtype="bfloat16", scale=1 / 0.07),
    Case("siglip_loss", 65536, 768, dtype="bfloat16", scale=10),
    Case("linear_cross_entropy", 8192, 2304, 256_000, "bfloat16"),
    Case("supcon_loss", 16384, 128, 1000, "bfloat16"),
    Case("supcon_loss", 16384, 128, 1000),
    Case("triplet_margin_loss", 8192, 128, 1000),
)


# In one pass over chunks of rows, which plain PyTorch can do where a chunk's rows are all of the softmax or
# sigmoid that they need: logits by a product, the gradient in their place, two products.


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, labels, *x):
        loss, *gradients = compute(labels, *x)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, g):
        return None, None, *(d.mul_(g) for d in ctx.saved_tensors)


def _sigmoid_weights(logits: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """As if nothing were positive: sums of the losses, of the weights times the logits, and of the weights,
    which replace the logits."""
    raw = wide(logits)
    s = raw * scale + bias
    g = s.sigmoid()
    sums = F.softplus(s).sum(), (g * raw).sum(), g.sum()
    logits.copy_(g)
    return sums


def _softmax_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses; probabilities replace the logits."""
    s = wide(logits)
    lse = s.logsumexp(1, keepdim=True)
    loss = (lse - s.gather(1, labels[:, None])).sum()
    logits.copy_((s - lse).exp())
    return loss


def _siglip_pass(labels, a, b, scale, bias, weigh=_sigmoid_weights, step=4096):
    n, sums = len(a), torch.zeros(3, device=a.device)
    da, db = torch.empty_like(a), torch.zeros_like(b)
    for i in range(0, n, step):
        rows = slice(i, i + step)
        g = a[rows] @ b.T
        own = wide(g.diagonal(i)).clone()
        sums += torch.stack(weigh(g, scale, bias))
        sums -= torch.stack(((own * scale + bias).sum(), own.sum(), torch.ones_like(own).sum()))
        g.diagonal(i).sub_(1)
        torch.mm(g, b, out=da[rows])
        db.addmm_(g.T, a[rows])
    loss, dscale, dbias = (total.clone() for total in sums / n)
    factor = scale / n
    return loss, da.mul_(factor), db.mul_(factor), dscale, dbias


def _linear_pass(labels, hidden, weight, weigh=_softmax_weights, step=1024):
    """Every row has a label."""
    n, loss = len(hidden), torch.zeros((), device=hidden.device)
    dh, dw = torch.empty_like(hidden), torch.zeros_like(weight)
    for i in range(0, n, step):
        rows = slice(i, i + step)
        g, own = hidden[rows] @ weight.T, labels[rows]
        loss += weigh(g, own)
        g.scatter_add_(1, own[:, None], torch.full_like(own, -1, dtype=g.dtype)[:, None])
        g.mul_(1 / n)
        torch.mm(g, weight, out=dh[rows])
        dw.addmm_(g.T, hidden[rows])
    return loss / n, dh, dw


ONE_PASS: dict[str, tuple[Callable, Callable]] = {
    "siglip_loss": (_siglip_pass, _sigmoid_weights),
    "linear_cross_entropy": (_linear_pass, _softmax_weights),
}


def chunked(op: str, compiled: Callable[[Callable], Callable] | None = None) -> Callable[..., Tensor]:
    """compiled: what compiles all but the matrix products."""
    compute, weigh = ONE_PASS[op]
    weigh = compiled(weigh) if compiled else weigh
    return functools.partial(_OnePass.apply, functools.partial(compute, weigh=weigh))


# Peers.


def siglip_kernel(labels: None, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    from siglip_kernel import fused_siglip_loss

    return fused_siglip_loss(a, b, scale.log(), bias)  # of 16-bit rows: chunks of cuBLAS products


def cce_exact(labels: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    try:
        return linear_cross_entropy(hidden, weight, labels, impl="cce_exact")
    except NotImplementedError:  # releases that have no such name
        return linear_cross_entropy(hidden, weight, labels, filter_eps=None)


def implementations(case: Case) -> dict[str, Callable[..., Tensor]]:
    found = {"sslfast": plain.OURS[case.op], **plain.EAGER[case.op]}
    compiled = functools.partial(torch.compile, dynamic=False)
    if case.op == "clip_loss":  # open_clip's has two products
        found |= {"eager": plain.clip_in_two_products, "eager, one product": plain.clip}
    if case.op in ("clip_loss", "supcon_loss"):
        found["compile"] = compiled(found["eager"])
    if case.op in ONE_PASS:
        found |= {"chunked torch": chunked(case.op), "chunked, compiled": chunked(case.op, compiled)}
    peers = {"siglip_loss": siglip_kernel, "linear_cross_entropy": cce_exact}
    name = {"siglip_loss": "siglip_kernel", "linear_cross_entropy": "cut_cross_entropy"}.get(case.op)
    if name and importlib.util.find_spec(name):
        found[name] = peers[case.op]
    return found


# Right results, time and memory.


def checked(case: Case, labels: Tensor | None, x: dict[str, Tensor]) -> list[dict]:
    """Of every implementation its errors, or why it is not to be timed, and what to call."""
    true, rows = plain.truth(case, labels, x), []
    for name, call in implementations(case).items():
        row = {"title": case.title, **asdict(case), "name": name}
        rows.append(row)
        try:
            row.update(plain.errors_of(results(call, labels, x), true))
        except Exception as error:  # too large, or a peer that does not run here
            if name == "sslfast":
                raise
            short = isinstance(error, torch.OutOfMemoryError)
            row["why_not_timed"] = "out of memory" if short else f"{type(error).__name__}: {str(error)[:200]}"
        if "why_not_timed" in row:  # the error and what its frames hold are gone by now
            torch.cuda.empty_cache()
            continue
        if plain.is_right(case, row):
            row["call"] = functools.partial(results, call, labels, x)
        elif name == "sslfast":
            raise AssertionError(f"{name} is wrong: {row}")
        else:
            row["why_not_timed"] = "wrong result"
    return rows


def run_case(case: Case, device: str, ceilings: dict[str, float] | None) -> list[dict]:
    """Results of every implementation; without ceilings checked and not timed."""
    torch._dynamo.reset()
    labels, x = plain.inputs_of(case, device)
    rows = checked(case, labels, x)
    calls = {row["name"]: row.pop("call") for row in rows if "call" in row}
    if ceilings is None:
        return rows
    torch.cuda.empty_cache()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median"))
    columns = case.classes if case.op == "linear_cross_entropy" else case.rows
    flops = PRODUCTS[case.op] * 2 * case.rows * columns * case.dim
    ours, gradients = statistics.median(samples["sslfast"]), sum(t.nbytes for t in x.values()) / 2**20
    for row in rows:
        if row["name"] in calls:
            ms, peak = statistics.median(samples[row["name"]]), peak_memory(calls[row["name"]]) / 2**20
            row.update(ms=ms, samples=samples[row["name"]], speedup=ms / ours, gradients_mib=gradients,
                       mib=peak - gradients, flops=flops,
                       share_of_product=flops / ms / 1e9 / ceilings[f"{case.dtype}_tflops"])  # fmt: skip
    return rows


def show(rows: list[dict]) -> None:
    """One line per implementation."""
    for r in rows:
        start = f"{r['title']:36}{r['rows']:>6} x{r['dim']:>5} {r['dtype']:9}{r['name']:19}"
        errors = f"errors {r['loss_error']:.1e}, {r['gradient_error']:.1e}" if "loss_error" in r else ""
        if "ms" in r:
            print(
                f"{start}{r['ms']:>10.3f} ms {r['speedup']:>6.2f} x sslfast {r['share_of_product']:>5.0%} of "
                f"the product's rate {r['mib']:>8.0f} MiB, {errors}", flush=True,
            )  # fmt: skip
        else:
            print(start, r.get("why_not_timed", "checked"), errors, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json-out", type=Path, help="a file, or a folder for <device>/losses_gpu.json")
    parser.add_argument("--only", default="", help="cases whose name begins so")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--quick", action="store_true", help="small sizes, checked, on a CPU if need be")
    options = parser.parse_args()
    torch.manual_seed(0)
    began, cases = time.monotonic(), [case for case in CASES if case.title.startswith(options.only)]
    if options.quick:
        device, tuning.SMALL = "cuda" if torch.cuda.is_available() else "cpu", 0
        for case in cases:
            show(run_case(plain.small(case, 300), device, None))
        return
    device, ceilings = torch.cuda.get_device_name(), rates()
    print(f"{device}: {', '.join(f'{name} {rate:.0f}' for name, rate in ceilings.items())}")
    whole: dict = {
        "device": device, "torch": torch.__version__, "triton": triton.__version__,
        "sslfast": sslfast.__version__, "python": platform.python_version(), "ceilings": ceilings,
        "products": PRODUCTS, "results": [],
    }  # fmt: skip
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = plain.json_path(options.json_out, folder, "losses_gpu.json")
    for case in cases:
        if time.monotonic() - began > options.seconds:
            print(f"{case.title}, {case.dtype}: left out for lack of time")
            continue
        rows = run_case(case, "cuda", ceilings)
        show(rows)
        whole["results"] += rows
        plain.keep(path, whole)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
