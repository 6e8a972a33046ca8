"""The primitives, one file each: reference, backends, gradient, public function."""

from sslfast.ops._backend import available_backends, use_backend
from sslfast.ops.ema import ema_update_
from sslfast.ops.similarity_lse import similarity_lse

__all__ = ["available_backends", "ema_update_", "similarity_lse", "use_backend"]
