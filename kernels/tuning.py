"""The one place for block sizes, warps and stages."""

# Blocked similarity_lse on a CPU: rows and columns of a tile of logits. 384 x 1024 float32 is 1.5 MiB, which
# about fits the L2 caches of two cores between its matrix product and its epilogue; flat tiles waste less of
# a symmetric problem on the diagonal.
CPU_TILE = (384, 1024)
