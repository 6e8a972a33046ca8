"""A drop-in for timm's ModelEmaV3; timm has to be installed: it is a subclass.

from sslfast.interop.timm import ModelEmaV3  # instead of: from timm.utils import ModelEmaV3
"""

import torch
from torch import Tensor, nn

from sslfast.ops import ema_update_

try:
    from timm.utils import model_ema
except ImportError as error:
    raise ImportError("sslfast.interop.timm: pip install timm") from error

PACKAGE = "timm"
NEEDS = "timm>=1.0"

# The original's methods, also while `patch` has put others in their place.
_apply, _apply_no_buffers = model_ema.ModelEmaV3.apply_update_, model_ema.ModelEmaV3.apply_update_no_buffers_


class ModelEmaV3(model_ema.ModelEmaV3):
    """timm.utils.ModelEmaV3, whose update is one pass over the memory.

    bfloat16 averages with stochastic rounding, and averages on another device than the model's, are updated
    by timm's own code. A tensor that the state has under two names (tied weights) is averaged once; timm does
    so twice. `sslfast.EMATeacher` is faster: it keeps the average in one flat tensor.
    """

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        ours, theirs = _tensors(self.module), _tensors(model)
        if not self._update(ours, theirs, decay):
            _apply(self, model, decay)

    def apply_update_no_buffers_(self, model: nn.Module, decay: float) -> None:
        if not self._update(list(self.module.parameters()), list(model.parameters()), decay):
            return _apply_no_buffers(self, model, decay)
        for ema, new in zip(self.module.buffers(), model.buffers(), strict=True):
            ema.copy_(new)

    def _update(self, ours: list[Tensor], theirs: list[Tensor], decay: float) -> bool:
        """Averages floating tensors and copies the others, if this is a case for `ema_update_`."""
        rounds = getattr(self, "stochastic_rounding", False)
        if any(
            type(x) not in (Tensor, nn.Parameter)
            or x.device != y.device
            or x.is_complex()
            or (rounds and x.dtype == torch.bfloat16)
            for x, y in zip(ours, theirs, strict=True)
        ):
            return False
        pairs = {
            (x.data_ptr() or id(x), x.shape, x.stride()): (x, y) for x, y in zip(ours, theirs, strict=True)
        }
        floating = [(x, y) for x, y in pairs.values() if x.is_floating_point() and x.numel()]
        for x, y in pairs.values():
            if not x.is_floating_point():
                x.copy_(y)
        if floating:
            ema_update_([x for x, _ in floating], [y for _, y in floating], decay)
        return True


def _tensors(model: nn.Module) -> list[Tensor]:
    """What the state consists of: the same objects each time, which `ema_update_` knows again."""
    kept: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return [kept.get(name, x) for name, x in model.state_dict().items()]


SWAPS = {"timm.utils.model_ema.ModelEmaV3": ModelEmaV3}
