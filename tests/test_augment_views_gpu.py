"""Augmented views on a GPU, beyond what tests/test_backends.py checks there: real sizes beside the CPU's
kernels, no wait for the device, CUDA graphs, memory."""

import pytest
import torch

import sslfast

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICE = "cuda"


def photographs(batch, height=224, width=224):
    """uint8, smooth with some detail"""
    coarse = torch.rand(batch, 3, 9, 9)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 240 + torch.rand(batch, 3, height, width) * 15).to(torch.uint8)


@pytest.mark.parametrize("preset", ["simclr", "mocov3", "byol", "dino", "mae"])
def test_real_sizes_agree_with_the_cpu(preset):
    images = photographs(8)
    expected, params = sslfast.augment_views(images, preset, return_params=True)
    found = sslfast.augment_views(images.to(DEVICE), preset, params=params.to(DEVICE))
    again = sslfast.augment_views(images.to(DEVICE), preset, params=params.to(DEVICE))
    for x, y, z in zip(expected, found, again, strict=True):
        torch.testing.assert_close(y.cpu(), x, atol=3e-5, rtol=0)
        assert torch.equal(y, z)


def test_large_packed_images_agree_with_the_cpu():
    images = sslfast.pack_images(
        [photographs(1, *size)[0] for size in ((3000, 4000), (375, 500), (1, 1), (9, 700))]
    )
    expected, params = sslfast.augment_views(images, "byol", return_params=True)
    found = sslfast.augment_views(images.to(DEVICE), "byol", params=params.to(DEVICE))
    for x, y in zip(expected, found, strict=True):
        torch.testing.assert_close(y.cpu(), x, atol=3e-5, rtol=0)


def test_the_same_numbers_are_drawn_as_on_the_cpu():
    from sslfast.ops.view_params import draw

    specs, sizes = sslfast.view_specs("dino"), torch.randint(1, 500, (64, 2))
    arguments = sizes, torch.tensor([1234567]), torch.arange(64)
    here, there = draw(specs, *arguments).table, draw(specs, *(x.to(DEVICE) for x in arguments)).table.cpu()
    torch.testing.assert_close(there, here, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_nothing_waits_for_the_device(packed):
    images = photographs(4, 64, 64)
    given = sslfast.pack_images(list(images)).to(DEVICE) if packed else images.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    sslfast.augment_views(given, "byol", size=32, generator=generator)  # compiles, and copies constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        views, params = sslfast.augment_views(given, "byol", size=32, generator=generator, return_params=True)
        again = sslfast.augment_views(given, "byol", size=32, params=params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(views, again, strict=True))


def test_views_in_a_cuda_graph_are_others_at_each_replay():
    images = photographs(4, 64, 64).to(DEVICE)
    sslfast.augment_views(images, "simclr", size=32)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views, params = sslfast.augment_views(images, "simclr", size=32, return_params=True)
    graph.replay()
    first = [x.clone() for x in views]
    expected = sslfast.augment_views(images, "simclr", size=32, params=params)
    assert all(torch.equal(x, y) for x, y in zip(first, expected, strict=True))
    graph.replay()
    assert not torch.equal(first[0], views[0])


def test_memory_beyond_the_views_is_a_few_of_them():
    images = photographs(64).to(DEVICE)
    sslfast.augment_views(images, "dino")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    views = sslfast.augment_views(images, "dino")
    largest = max(x.nbytes for x in views)
    peak = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in views)
    assert peak <= 2.5 * largest + (8 << 20)
