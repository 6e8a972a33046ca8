"""Properties of the compiled module itself: what it links to, its threads, and the GIL."""

import subprocess
import threading
import time
from pathlib import Path

import torch

from sslfast import _C
from sslfast.ops import _blocked, similarity_lse


def test_links_to_neither_torch_nor_openmp():
    listed = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in listed.splitlines() if "(NEEDED)" in line]
    assert needed and not [name for name in needed if "torch" in name or "omp" in name or "python" in name]


def test_sources_include_no_torch_header():
    root = Path(__file__).parents[1] / "csrc"
    includes = [
        line
        for path in root.rglob("*.*")
        for line in path.read_text().splitlines()
        if line.startswith("#include")
    ]
    assert len(includes) > 10
    assert not [line for line in includes if any(w in line for w in ("torch", "ATen", "c10"))]


def test_kernels_run_on_the_pool_of_torch():
    assert _C.shares_openmp_pool()


def test_threads_follow_torch(monkeypatch):
    asked = []
    original = _C.SimilarityLseF32

    def spy(*args):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(_C, "SimilarityLseF32", spy)
    before = torch.get_num_threads()
    try:
        for count in (1, 3, 2):
            torch.set_num_threads(count)
            similarity_lse(torch.randn(8, 4))
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 3, 2]


def test_gil_is_released(monkeypatch):
    """Another thread runs Python while one tile call of a second or so is in C++."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        n = 8192
        monkeypatch.setattr(_blocked, "cpu_tile", lambda d: (n, n))
        tiles = _blocked.CpuTiles(
            torch.randn(n, 4), torch.randn(n, 4), torch.tensor(1.0), None, None, None, False
        )
        tiles.begin_forward(False)
        tile = tiles.product(0, n, 0, n)
    finally:
        torch.set_num_threads(before)
    ticks: list[float] = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    for _ in range(5):
        tiles.forward(tile, 0, n, 0, n)
    ended = time.perf_counter()
    stop.set()
    thread.join()
    inside = [t for t in ticks if began < t < ended]
    longest = max(b - a for a, b in zip([began, *inside], [*inside, ended], strict=True))
    assert longest < 0.7 * (ended - began) / 5, "no Python ran during a call"
