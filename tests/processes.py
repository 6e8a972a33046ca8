"""What tests run in several processes, which have to find it in a module by name."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist


def run(worker: Callable, count: int, folder: Path) -> list:
    """[worker(rank) for each rank], each in a process of one Gloo group."""
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_run, (worker, count, str(folder / "store"), results), nprocs=count)
    return [results[rank] for rank in range(count)]


def _run(rank: int, worker: Callable, count: int, store: str, results: dict) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # each has random numbers of its own
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
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
