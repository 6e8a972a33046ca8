"""A minimal training loop that proves the kernels."""
