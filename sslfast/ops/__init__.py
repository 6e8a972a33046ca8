"""The primitives, one file each: reference, backends, gradient, public function."""

from sslfast.ops._backend import available_backends, use_backend
from sslfast.ops.similarity_lse import similarity_lse

__all__ = ["available_backends", "similarity_lse", "use_backend"]
