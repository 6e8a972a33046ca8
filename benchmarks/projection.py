"""Writes PROJECTION.md: what a step of a loss would take on more devices than there are here, by arithmetic.

Bytes are those of sslfast.distributed; the time of a block is what benchmarks/distributed.py measured, on a
GPU the prediction of benchmarks/static_gpu.py as long as no file of results/ has a measurement.

    python benchmarks/projection.py
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sslfast.distributed._join import GATHER_BYTES
from sslfast.distributed._ranks import PIECE_BYTES

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Loss:
    """Of one pass: bytes per row that go round (`shard`) and that come home (`carry`), given D, e and g."""

    name: str
    dim: int
    views: int
    """Rows of an image."""
    tensors: tuple[int, int]
    """That a gather brings here, forward and backward."""
    cols: bool = False
    """Whether log-sum-exps of columns come home."""
    to_columns: bool = False
    """Whether gradients of columns do."""

    def shard(self, which: str, e: int, g: int) -> int:
        return self.dim * e + 8 + (2 * g if which == "backward" else 0)

    def carry(self, which: str, e: int, g: int) -> int:
        return g * (self.cols if which == "forward" else self.dim * self.to_columns)


NTXENT = Loss("NT-Xent", 128, 2, (2, 1))
CLIP = Loss("CLIP", 512, 1, (2, 1), True, True)


def sent(loss: Loss, which: str, size: int, images: int, e: int, g: int = 4, strategy: str = "ring") -> float:
    """Bytes that each of `size` processes sends in a pass."""
    rows, shard, carry = loss.views * images, loss.shard(which, e, g), loss.carry(which, e, g)
    if strategy == "gather" and which == "forward":  # maxima of all columns are all-reduced before their sums
        carry *= 3
    elif strategy == "gather":  # features and ids are here since the forward pass
        shard = 2 * g
    return (size - 1) * rows * (shard + carry)


@dataclass(frozen=True)
class Link:
    name: str
    gbps: float
    """Billions of bytes per second, in each direction."""
    latency: float
    """Microseconds from a process to the next one."""

    def ms(self, count: float, messages: int = 1) -> float:
        return (count / self.gbps / 1e6 + messages * self.latency / 1e3) if count else 0.0


NVLINK = Link("NVLink 4", 450, 5)
LINKS = (NVLINK, Link("NDR", 50, 5), Link("HDR", 25, 5), Link("100 Gb/s Ethernet", 12.5, 10))
ETHERNET = Link("25 Gb/s Ethernet", 3.125, 50)


@dataclass(frozen=True)
class Device:
    """block: (loss, pass, whether of own rows alone, rows) to milliseconds of rows x rows. e: bytes of a
    number."""

    block: Callable[[Loss, str, bool, int], float]
    e: int


# Time of a step.


def compute(device: Device, loss: Loss, size: int, images: int) -> float:
    """Of all blocks, forward and backward."""
    n = loss.views * images
    return sum(
        device.block(loss, which, True, n) + (size - 1) * device.block(loss, which, False, n)
        for which in PASSES
    )


def step(device: Device, loss: Loss, size: int, images: int, link: Link, strategy: str) -> float:
    """Milliseconds of the forward and the backward pass."""
    one = {"ring": ring, "gather": gather}[strategy]
    return sum(one(device, loss, which, size, images, link) for which in PASSES)


def pieces(device: Device, loss: Loss, which: str, images: int) -> int:
    """In which the rows of a process go round."""
    return math.ceil(loss.views * images * loss.shard(which, device.e, 4) / PIECE_BYTES)


def ring(device: Device, loss: Loss, which: str, size: int, images: int, link: Link) -> float:
    """Own rows while the first piece comes in; S stages, of P pieces of W - 1 others; the last goes home."""
    n, parts = loss.views * images, pieces(device, loss, which, images)
    own, block = (device.block(loss, which, itself, n) for itself in (True, False))
    shard, carry = (n / parts * of(which, device.e, 4) for of in (loss.shard, loss.carry))
    stages = (size - 1) * parts

    def at(s: int) -> float:
        wire = link.ms((shard if s + 1 < stages else 0) + (carry if s >= 1 else 0))
        return max(own if s < 0 else block / parts if s < stages else 0.0, wire)

    return sum(at(s) for s in range(-1, stages + 1))


def gather(device: Device, loss: Loss, which: str, size: int, images: int, link: Link) -> float:
    """All rows, then all blocks, then what comes home; a collective has W - 1 hops."""
    n = loss.views * images
    collectives = loss.tensors[PASSES.index(which)]
    if which == "forward":
        collectives += 3 * loss.cols  # an all-reduce, which counts twice, and a reduce-scatter
    else:
        collectives += loss.to_columns
    wire = link.ms(sent(loss, which, size, images, device.e, 4, "gather"), (size - 1) * collectives)
    own, block = (device.block(loss, which, itself, n) for itself in (True, False))
    return wire + own + (size - 1) * block


def host_ms(device: Device, loss: Loss, size: int, images: int) -> float:
    """Milliseconds for which the host is busy with handing out a ring's stages on a GPU."""
    return HOST_MS * sum((size - 1) * pieces(device, loss, which, images) + 1 for which in PASSES)


# Times of blocks.


def measured(found: dict) -> Device:
    """From the measured block that is nearest in size, in proportion to its logits."""
    times: dict[tuple, dict[int, float]] = {}
    for r in found["results"]:
        times.setdefault((r["form"], r["pass"], r["dim"]), {})[r["n"]] = r["ms"]

    def block(loss: Loss, which: str, itself: bool, rows: int) -> float:
        of = times[loss.name + ", own" * (itself and loss.name == "NT-Xent"), which, loss.dim]
        n = min(of, key=lambda n: abs(math.log(n / rows)))
        return of[n] * (rows / n) ** 2

    return Device(block, 2 if found["dtype"] == "bfloat16" else 4)


WIDTH = {128: 128, 512: 256}  # D of the prediction that stands for a D
PRODUCTS = {  # of 2 rows columns D operations: NT-Xent's own block is symmetric
    ("NT-Xent", "forward", True): 0.5, ("NT-Xent", "forward", False): 1, ("NT-Xent", "backward", True): 2,
    ("NT-Xent", "backward", False): 2, ("CLIP", "forward", True): 1, ("CLIP", "forward", False): 1,
    ("CLIP", "backward", True): 3, ("CLIP", "backward", False): 3,
}  # fmt: skip


def predicted(static: dict, arch: int = 90) -> Device:
    """From the predictions for NT-Xent of 32,768 pairs, which are 2.5 products."""
    of = {p["case"]: p["ms"] for p in static["predictions"] if p["arch"] == arch and p["dtype"] == "bf16"}

    def block(loss: Loss, which: str, itself: bool, rows: int) -> float:
        width = WIDTH[loss.dim]
        product = of[f"NT-Xent 32768 pairs, D={width}"] / 2.5 * loss.dim / width
        return PRODUCTS[loss.name, which, itself] * product * (rows / 65536) ** 2

    return Device(block, 2)


# The page.


def sources(results: Path = RESULTS) -> list[str]:
    """Files in `results`: of the GPU's blocks or their predictions, and if there is one of the CPU's."""
    found: dict[str, list[str]] = {"cuda": [], "cpu": []}
    for path in sorted(results.glob("*/distributed.json")):
        blocks = json.loads(path.read_text()).get("blocks")
        if blocks and not blocks["quick"]:
            found[blocks["type"]].append(str(path.relative_to(results)))
    gpus = sorted(found["cuda"], key=lambda file: "h100" not in file)
    return [*(gpus or ["static.json"])[:1], *found["cpu"][:1]]


def page(files: Sequence[str], results: Path = RESULTS) -> str:
    read = [json.loads((results / file).read_text()) for file in files]
    if files[0] == "static.json":
        gpu, name, status = predicted(read[0]), "H100", PREDICTED
    else:
        blocks = read[0]["blocks"]
        gpu, name = measured(blocks), blocks["device"]
        status = MEASURED.format(name=name, dtype=blocks["dtype"], torch=blocks["torch"])
    named = ", ".join(f"`results/{file}`" for file in files)
    lines = [HEAD.format(files=named, status=status, host=HOST_MS, piece=PIECE_BYTES >> 20)]
    sizes = [(size, TOTAL // size) for size in SIZES] + [(size, EACH) for size in SIZES]
    for loss in (NTXENT, CLIP):
        lines += [f"\n## {loss.name}, D = {loss.dim}, bfloat16, {name}: projected\n", *head(LINKS, True)]
        for size, images in dict.fromkeys(sizes):
            lines.append(
                row(*cells(gpu, loss, size, images, LINKS), digits(host_ms(gpu, loss, size, images)))
            )
    if len(files) > 1:
        blocks = read[1]["blocks"]
        lines += [CPU.format(device=blocks["device"], threads=blocks["threads"]), *head((ETHERNET,), False)]
        for loss in (NTXENT, CLIP):
            for size in CPU_SIZES:
                label, *rest = cells(measured(blocks), loss, size, EACH, (ETHERNET,))
                lines.append(row(f"{loss.name} {label}", *rest))
    return "\n".join(lines) + "\n"


def head(links: Sequence[Link], host: bool) -> Iterator[str]:
    units = ["MB sent", "MiB gathered", "ms of blocks", *(f"ms, {link.name}" for link in links)]
    units += ["ms of a ring's host"] * host
    yield row("W x n", *(f"projected {unit}" for unit in units))
    yield row(*["---:"] * (1 + len(units)))


def cells(device: Device, loss: Loss, size: int, images: int, links: Sequence[Link]) -> Iterator[str]:
    around = [
        sum(sent(loss, which, size, images, device.e, 4, x) for which in PASSES) for x in ("ring", "gather")
    ]
    features = size * loss.views * images * loss.dim * device.e
    gathers = features / loss.views <= GATHER_BYTES  # "auto" looks at one view
    yield f"{size} x {images}"
    yield " / ".join(digits(x / 1e6) for x in around)
    yield from map(digits, (features / 2**20, compute(device, loss, size, images)))
    for link in links:
        both = [digits(step(device, loss, size, images, link, x)) for x in ("ring", "gather")]
        both[gathers] = f"**{both[gathers]}**"
        yield " / ".join(both) if link is not NVLINK or size <= 8 else ""


def row(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


TOTAL, EACH = 65536, 1024  # images of all together, and of each
SIZES, CPU_SIZES = (8, 64, 256, 1024), (2, 4, 16, 64)

HOST_MS = 0.2  # of a stage on a GPU, assumed

PREDICTED = """**Not measured on a GPU yet: kernel times below are predictions from `results/static.json`**,
which `static_gpu.py` makes of the kernels' machine code and an H100's published rates. They are those of
NT-Xent of 32,768 pairs, per matrix product: D = 128 as it is, D = 512 at the rate of D = 256, although
kernels of another form serve it."""
MEASURED = "Kernel times were measured on one {name} ({dtype}, torch {torch}). No step of several GPUs was."

HEAD = """# Losses on many devices: a projection

Written by `python benchmarks/projection.py` from {files}.

{status}

**Every number in the tables is a projection by the arithmetic below; none is a measured step.** A step is the
loss, forward and backward.

## Arithmetic

W processes have n images each, in R rows (2n in NT-Xent, n in CLIP) of D numbers of e bytes: 2 on a GPU, 4 on
a CPU. A link carries v bytes per second with latency L. By the formulas of `sslfast.distributed` each sends

    NT-Xent  (W - 1) R (2 D e + 24)              ring        (W - 1) R (D e + 16)           gather
    CLIP     (W - 1) R (2 D e + 4 D + 28)        ring        (W - 1) R (D e + 4 D + 28)     gather

A ring's pass has S = P (W - 1) stages, for P pieces of a process's rows, of up to {piece} MiB. With b bytes
of a piece, and c of what goes home with it, it computes its own block while the first piece comes in, then
each piece while the next one does; what was made of the last goes home at the end:

    max(own, L + b/v)  +  sum of max(block/P, L + (b if s < S-1, c if s > 0)/v) over s = 0 .. S-1  +  L + c/v

(no L where nothing is sent). A gather's pass waits for its collectives, then computes:

    (W - 1) L (collectives)  +  bytes/v  +  own  +  (W - 1) block

## Assumptions

- A process has its link's full speed both ways at once, and its kernels do not slow down meanwhile.
- Beyond NVLink a GPU has a network card of its own, and the slowest hop counts. Collectives are rings over
  the same links; NCCL may be faster, with trees or all cards of a node.
- L is 5 us on NVLink and InfiniBand, 10 us on 100 Gb/s Ethernet, 50 us on 25 Gb/s Ethernet (assumed).
- A GPU never waits for its host. In the last column the host is busy for {host} ms a stage (assumed): a ring
  takes at least as long. A gather has three to seven such stages, whatever W.
- A block takes time in proportion to its logits. Scalars, the encoder and its gradients are left out.
- Published speeds, per GPU and direction: NVLink 4 450 GB/s, up to 8 GPUs; InfiniBand NDR 400 Gb/s = 50 GB/s,
  HDR 200 Gb/s = 25 GB/s; Ethernet 12.5 and 3.125 GB/s.

Tables: ring / gather; bold is what strategy="auto" takes. A process sends so many MB in a step, and a gather
brings it so many MiB of features."""

CPU = """
## CPUs, float32, each process on a machine of its own: projected

Kernel times are measured (`{device}`, {threads} threads).
"""


if __name__ == "__main__":
    (HERE / "PROJECTION.md").write_text(page(sources()))
