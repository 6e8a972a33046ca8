"""Registers an op with torch's dispatcher: define, implementation and fake in one call."""

# A call through the dispatcher to a Python kernel costs about 30 us each way, which a small loss feels. Only
# tracing and dispatch modes (torch.compile, fake tensors, subclasses) need it, so a plain eager call goes
# straight to the kernel.

from collections.abc import Callable, Sequence

import torch

_PLAIN = (torch.Tensor, torch.nn.Parameter)
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
        plain = type(args[0]) in _PLAIN and not torch.compiler.is_compiling()
        return (implementation if plain and not torch._C._len_torch_dispatch_stack() else op)(*args)

    return call
