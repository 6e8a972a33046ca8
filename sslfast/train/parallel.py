"""Gradients of several processes: torch's DistributedDataParallel around a method's training_step."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sslfast.distributed import NonFiniteError
from sslfast.train.processes import everywhere, processes

Step = Callable[[Sequence[Tensor]], tuple[Tensor, dict[str, Tensor]]]


class Parallel:
    """A method's training_step, whose gradients are averaged over the processes.

    Parameters and buffers are the first process's at the start. Later each process changes buffers alike, but
    for statistics of a BatchNorm that sees its own batch alone.

    Args:
        model: its parameters that need a gradient now may do without later, and none may then begin to.
        step: model.training_step, perhaps compiled.
    """

    def __init__(self, model: nn.Module, step: Step) -> None:
        # of an image of one channel: two names of one layout
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.module = DistributedDataParallel(_Step(model, step))
        self.module.broadcast_buffers = False
        if processes() > 2 and not self.trained[0].is_cuda:
            self.module.register_comm_hook(None, _one_by_one)

    @contextmanager
    def averaging(self, now: bool) -> Iterator[Step]:
        """The step, within which gradients are averaged, or if not now added up for a later time.

        DistributedDataParallel waits for the gradient of every parameter, so that one that is frozen for now
        gets one, which is dropped.
        """
        frozen = [p for p in self.trained if not p.requires_grad]
        for p in frozen:
            p.requires_grad_(True)
        with nullcontext() if now else self.module.no_sync():
            yield self.module
        for p in frozen:
            p.requires_grad_(False).grad = None


def _one_by_one(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Averages each gradient alone, so that a resumed run is bitwise the same on CPUs.

    Gloo adds three numbers or more in an order that depends on their place in the tensor, and torch lays
    gradients out anew after the first update of a process.
    """
    for gradient in bucket.buffer().split([g.numel() for g in bucket.gradients()]):
        dist.all_reduce(gradient.div_(processes()))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


class _Step(nn.Module):
    """training_step as a forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module, step: Step) -> None:
        super().__init__()
        self.model, self.step = model, step

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            return self.step(views)
        except NonFiniteError as error:  # on all processes
            advice = "try a lower --learning-rate, or --precision float32"
            raise everywhere(FloatingPointError(f"the loss is not finite ({error}); {advice}")) from error
