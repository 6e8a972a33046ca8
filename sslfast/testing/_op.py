"""What a comparison with an op's reference needs to know of the op."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Op:
    """What `assert_close_to_reference` needs to know of an op.

    Attributes:
        run, reference: functions of the same keyword arguments.
        equivalent: inputs of the same results, up to rounding, that round differently.
        terms: (inputs, upstream gradients) in float64 to (max |logit|, for each floating input the sum of the
            absolute values of its gradient's terms, and the root of the sum of their squares).
        gradients: names of the inputs that have one; None: every floating tensor.
        tiles: whether a backend may round tiles of gradient weights, see TILE_FLOOR.
    """

    run: Callable[..., Any]
    reference: Callable[..., Any]
    equivalent: Callable[[Inputs], dict[str, Any]]
    terms: Callable[[Inputs, Sequence[Tensor | None]], tuple[float, dict[str, tuple[Tensor, Tensor]]]]
    gradients: tuple[str, ...] | None = None
    tiles: bool = False
