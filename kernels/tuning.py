"""The one place for block sizes, warps and stages."""

# Blocked similarity_lse on a CPU: rows and columns of a tile of logits. 512 x 512 float32 is 1 MiB, which
# stays in the L2 caches of two cores between its matrix product and its epilogue.
CPU_TILE = 512
