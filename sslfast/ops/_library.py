"""Registers an op with torch's dispatcher: define, implementation and fake in one call."""

# A call through the dispatcher to a Python kernel costs tens of microseconds each way, which a small loss
# feels. Only tracing and dispatch modes (torch.compile, fake tensors, subclasses) need it, so a plain eager
# call goes straight to the kernel.

import functools
from collections.abc import Callable, Sequence

import torch

_ONCE = (
    "this backend of sslfast differentiates once; for higher derivatives call the function inside "
    "`with sslfast.use_backend('reference'):`"
)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_VALUES = (bool, str, tuple, type(None))
_LIBRARY = torch.library.Library("sslfast", "DEF")


def define(
    schema: str, implementation: Callable, fake: Callable, devices: Sequence[str] = ("CPU", "CUDA")
) -> Callable:
    """Defines `sslfast::<name>` from `schema`, served by `implementation` on the devices named.

    Returns a function with the arguments of the schema, the first of which is a tensor.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    for device in devices:
        _LIBRARY.impl(name, implementation, device)
    # Gradients are an autograd.Function around the op: below it, autograd has nothing to add.
    _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"sslfast::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.sslfast, name).default

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return op(*args)
        for x in args:  # a tensor that is no more than its numbers: no subclass, no lazy negation or zero
            kind = type(x)
            if kind in _PLAIN:
                if x.is_neg() or x._is_zerotensor():
                    return op(*args)
            elif kind not in _VALUES and isinstance(x, torch.Tensor):
                return op(*args)
        return implementation(*args)

    return call


class _Once(torch.autograd.Function):
    """Gradients as they are, and an error for who differentiates them by what they were computed from."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_ONCE)


def once_differentiable(backward: Callable) -> Callable:
    """Decorates a `backward` whose results have no derivative, so that asking for one raises.

    torch's decorator of this name only looks at the incoming gradients, so the second derivative through the
    saved inputs (a gradient penalty) would be taken for zero. What `backward` saves has to hold the inputs.
    """

    @functools.wraps(backward)
    def guarded(ctx, *gradients):
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        tensors = [x for x in outputs if x is not None]
        causes = [x for x in (*ctx.saved_tensors, *gradients) if x is not None and x.requires_grad]
        causes = causes or [torch.zeros((), requires_grad=True)]
        marked = iter(_Once.apply(len(tensors), *tensors, *causes))
        return tuple(None if x is None else next(marked) for x in outputs)

    return guarded
