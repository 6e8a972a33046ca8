"""What test_interop_solo_learn and test_interop_moco run in several processes."""

import torch
from torch import Tensor

ROWS, DIM, PROTOTYPES, SLOTS = 4, 6, 5, 24


def batch(count: int) -> dict[str, Tensor]:
    """What all processes together have, the same in each of them."""
    g = torch.Generator().manual_seed(3)
    n = ROWS * count
    names = "z", "query", "key", "nn", "p"
    made = {name: torch.randn(n, DIM, dtype=torch.float64, generator=g) for name in names}
    for name in ("student", "teacher"):
        made[name] = torch.randn(count, ROWS, PROTOTYPES, dtype=torch.float64, generator=g)
    made["keys"] = torch.randn(n, DIM, generator=g)
    made["indexes"] = torch.tensor([0, 1, 2, 0]).repeat(count)[:n]
    made["indexes"][-1] = 9  # alone
    return made


def labels(x: dict[str, Tensor]) -> Tensor:
    """Of floating dtype, and not the same in all processes."""
    return torch.where(torch.arange(len(x["z"])) < ROWS, x["indexes"] + 0.5, 2.5)


def share(rank: int, count: int) -> dict[str, Tensor]:
    """This process's rows, as leaves."""
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    mine = {k: x[rank] if x.dim() == 3 else x[rows] for k, x in batch(count).items()}
    return {k: x.clone().requires_grad_() if x.dtype == torch.float64 else x for k, x in mine.items()}


def solo_learn(rank: int, count: int) -> dict[str, list[Tensor | None]]:
    """Each loss of this process, and its gradients as backward leaves them in this process."""
    from sslfast.interop import solo_learn as ours

    x, found = share(rank, count), {}
    mine = labels(batch(count))[rank * ROWS : (rank + 1) * ROWS]
    centred = ours.DINOLoss(PROTOTYPES, 0.04, 0.07, 1, 3).double()
    calls = {
        "simclr": (lambda: ours.simclr_loss_func(x["z"], x["indexes"], 0.2), ("z",)),
        "simclr, labels": (lambda: ours.simclr_loss_func(x["z"], mine, 0.2), ("z",)),
        "mocov3": (lambda: ours.mocov3_loss_func(x["query"], x["key"], 0.3), ("query", "key")),
        "nnclr": (lambda: ours.nnclr_loss_func(x["nn"], x["p"], 0.2), ("nn", "p")),
        "dino": (lambda: centred(x["student"], x["teacher"]), ("student", "teacher")),
    }
    for name, (call, leaves) in calls.items():
        for k in leaves:
            x[k].grad = None
        loss = call()
        loss.backward()
        found[name] = [loss.detach(), *(x[k].grad for k in leaves)]
    found["center"] = [centred.center.clone()]
    return found


def moco(rank: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(queue before, queue, pointer) after this process's keys went in."""
    from sslfast.interop.moco import MoCoQueue

    torch.manual_seed(8)
    module = MoCoQueue(DIM, SLOTS)
    before, keys = module.queue.clone(), share(rank, count)["keys"]
    module.enqueue(keys)
    module._dequeue_and_enqueue(2 * keys)
    after, pointer = module.queue.clone(), module.queue_ptr.clone()
    try:
        module.enqueue(torch.cat([keys, keys[:1]]))  # together 10, and 24 is no multiple of it
    except AssertionError:
        return before, after, pointer
    raise RuntimeError("enqueue took a batch that does not divide the queue")
