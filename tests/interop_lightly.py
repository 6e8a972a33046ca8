"""What the tests of sslfast.interop.lightly share."""

import pytest
import torch
from originals import original
from torch import Tensor

from sslfast.interop import lightly as ours

peer = original("lightly.loss")
peer_dcl = original("lightly.loss.dcl_loss")
peer_utils = original("lightly.models.utils")

PAIRS = ("NTXentLoss", "DCLLoss", "DCLWLoss")
ALL = (*PAIRS, "DINOLoss")
OF_PAIRS = pytest.mark.parametrize("name", PAIRS)
DOUBLE = torch.float64


def pair(name: str, *args, **options) -> list:
    """[ours, the original]; with one memory bank, where they have one."""
    torch.manual_seed(1)
    both = [getattr(module, name)(*args, **options) for module in (ours, peer)]
    if name == "NTXentLoss":
        both[0].memory_bank.bank.copy_(both[1].memory_bank.bank)
    return both


def rows(n: int, d: int, *names: str) -> dict[str, Tensor]:
    return {name: torch.randn(n, d, dtype=DOUBLE) for name in names or ("out0", "out1")}
