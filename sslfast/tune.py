"""`sslfast tune`: measures the Triton kernels' block sizes on this GPU and keeps the fastest."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sslfast import similarity_lse, use_backend
from sslfast.kernels import tuning


def tune(
    dims: tuple[int, ...] = (64, 128, 256),
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    rows: int = 16384,
) -> None:
    """Measure the GPU kernels' block sizes on this machine and keep the fastest (SSLFAST_CACHE names the
    folder).

    Args:
        dims: numbers of features to measure; each serves all up to the next power of two.
        dtypes: of the rows; bfloat16 stands for float16 too.
        rows: batch to measure with.
    """
    if not torch.cuda.is_available():
        raise ValueError("tune: expected a GPU that PyTorch can use, got none")
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}: {rows} rows, forward or forward + backward, ms")
    for name in dtypes:
        for d in dims:
            for key, value in measure(d, getattr(torch, name), rows, device):
                tuning.keep(device, {key: value})
    print(f"kept in {tuning.cache_path(device)}")


def measure(d: int, dtype: torch.dtype, rows: int, device: torch.device) -> Iterator[tuple[str, object]]:
    """(key, choice) for rows of d features: tiles of the flash form where it serves, then the form, then the
    chunked
    form's tile."""
    z = torch.nn.functional.normalize(torch.randn(rows, d, device=device), dim=1).to(dtype).requires_grad_()
    width, size = tuning.padded_dim(d), dtype.itemsize
    what = f"{str(dtype).removeprefix('torch.')} D={d}"

    def train() -> list[Tensor]:
        row = similarity_lse(z, scale=10.0)
        return [row.detach(), *torch.autograd.grad(row.sum(), z)]

    def train_pair() -> list[Tensor]:
        row, col = similarity_lse(z, z.detach().requires_grad_(), scale=10.0, return_cols=True)
        return [row.detach(), *torch.autograd.grad(row.sum() + col.sum(), z)]

    def forward(scale: float) -> list[Tensor]:
        with torch.no_grad():
            return [similarity_lse(z, scale=scale)]

    def queries() -> list[Tensor]:
        return [similarity_lse(z[: rows // 4], z.detach(), scale=10.0).detach()]

    calls: dict[str, Callable[[], list[Tensor]]] = {
        "sums": lambda: forward(10.0), "attend": lambda: forward(1000.0), "expect": queries, "grad": train,
    }  # fmt: skip
    best: dict[str, object] = {}
    if tuning.fits(d, size):
        for variant, call in calls.items():
            key = tuning.key(variant, width, size)
            default = tuning.default_tile(variant, width, size, tuning.architecture(device))
            tiles = [default, *(tile for tile in tuning.CANDIDATES if tile != default)]
            best[key] = list(_fastest(f"{what} {variant}", key, tiles, call, best))
            yield key, best[key]
        for variant, call in (("form self", train), ("form pair", train_pair)):
            key = tuning.key(variant, width, size)
            best[key] = _fastest(f"{what} {variant}", key, ["flash", "chunked"], call, best)
            yield key, best[key]
    else:
        yield "chunk", list(_fastest(f"{what} chunk", "chunk", list(tuning.CHUNKS), train, best))


def _fastest(what: str, key: str, choices: list, call: Callable[[], list[Tensor]], others: dict):
    """The choice under which `call` is fastest; the first is the one to agree with."""
    import triton

    times, expected = {}, None
    for choice in choices:
        tuning.trial = {**others, key: choice}
        try:
            with use_backend("triton"):
                result = call()
                expected = result if expected is None else expected
                agrees = all(_close(x, y) for x, y in zip(result, expected, strict=True))
                if agrees:
                    times[choice] = triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median")
        except (triton.errors.TritonError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
            # A candidate may not fit or not compile; a broken device is no candidate's property.
            if choice == choices[0] or "CUDA error" in str(error):
                raise
        finally:
            tuning.trial = {}
    best = min(times, key=times.__getitem__)
    print(f"  {what}: {_say(choices[0])} {times[choices[0]]:.3f}, best {_say(best)} {times[best]:.3f}")
    return best


def _close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).float().norm() <= 1e-2 * y.float().norm())


def _say(choice) -> str:
    return choice if isinstance(choice, str) else "x".join(map(str, choice))
