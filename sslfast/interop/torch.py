"""A drop-in for torch.optim.swa_utils.get_ema_multi_avg_fn.

from sslfast.interop.torch import get_ema_multi_avg_fn
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import swa_utils

from sslfast.ops import ema_update_

PACKAGE = "torch"
NEEDS = "torch>=2.8"

_original = swa_utils.get_ema_multi_avg_fn


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[[Any, Any, Any], None]:
    """The exponential moving average as AveragedModel's multi_avg_fn, in one pass over the memory.

    Complex and integer tensors are served by torch's own. `sslfast.EMATeacher` also spares AveragedModel's
    loop over the parameters.

    Args:
        decay: in [0, 1].

    Raises:
        ValueError: another decay.
    """
    other = _original(decay)

    @torch.no_grad()
    def ema_update(ema_param_list: list[Tensor], current_param_list: list[Tensor], num_averaged: Any) -> None:
        if all(x.is_floating_point() for x in ema_param_list):
            ema_update_(ema_param_list, current_param_list, decay)
        else:
            other(ema_param_list, current_param_list, num_averaged)

    return ema_update


SWAPS = {"torch.optim.swa_utils.get_ema_multi_avg_fn": get_ema_multi_avg_fn}
