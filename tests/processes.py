"""What tests run in several processes, which have to find it in a module by name."""

import datetime
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist


def run(worker: Callable, count: int, folder: Path) -> list:
    """[worker(rank) for each rank], each in a process of one Gloo group."""
    folder.mkdir(exist_ok=True)
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_run, (worker, count, str(folder / "store"), results), nprocs=count)
    return [results[rank] for rank in range(count)]


def _run(rank: int, worker: Callable, count: int, store: str, results: dict) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # each has random numbers of its own
    timeout = datetime.timedelta(seconds=60)  # a process that waits in vain fails, and the test with it
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout
    )
    try:
        results[rank] = worker(rank)
    finally:
        dist.destroy_process_group()


def shuffled_keys(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(what the encoder saw, what came back) of images 4 rank, ..., 4 rank + 3; the encoder doubles."""
    from sslfast.train.batchnorm import shuffled

    seen = []
    encoded = shuffled(lambda x: seen.append(x) or x[:, None] * 2, torch.arange(4.0) + 4 * rank)
    return seen[0], encoded


def moco_step(rank: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(keys of this process, its queue, how many layers are split) after one step of MoCo."""
    from pathlib import Path

    from sslfast.train import loop
    from sslfast.train.batchnorm import SplitBatchNorm2d
    from sslfast.train.methods.moco import Config

    model = loop.build("moco", Config(Path("unused"), queue_size=20, projection_dim=4), 1, 12)
    model.before_step()
    _, metrics = model.training_step(tuple(torch.rand(2, 4, 1, 12, 12)))
    split = sum(isinstance(m, SplitBatchNorm2d) for m in model.modules())
    return metrics["targets"], model.queue.keys, split


def mocov3_loss(rank: int) -> torch.Tensor:
    """InfoNCE of this process's rows of queries and keys that all processes can make."""
    from sslfast import info_nce_loss

    torch.manual_seed(5)
    query, key = (torch.randn(2, 4, 6)[:, rank : rank + 1].flatten(0, 1) for _ in range(2))
    return info_nce_loss(query, key, temperature=0.2, group="world")


def balanced(rank: int, logits: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sinkhorn's assignments and centre of this process's rows."""
    from sslfast import sinkhorn_center, sinkhorn_knopp

    rows = logits.split(sizes)[rank]
    return sinkhorn_knopp(rows, 0.2), sinkhorn_center(rows, 0.2)
