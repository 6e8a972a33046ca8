"""Choices of the Triton kernels' block sizes, `sslfast tune`, and the benchmark of the GPU losses, in the
interpreter."""

import pytest
import torch
from interpreter import INTERPRETED
from sslfast.kernels import tuning

import sslfast

pytestmark = INTERPRETED


@pytest.fixture(autouse=True)
def on_triton():
    with sslfast.use_backend("triton"):
        yield


# Choices of block sizes.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A card whose measurements are kept in tmp_path."""
    monkeypatch.setenv("SSLFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test (1)")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    tuning._read.cache_clear()
    yield torch.device("cuda", 0)
    tuning._read.cache_clear()


def test_every_tile_divides_the_padding_and_serves_every_width():
    tiles = [tile for *_, tile in tuning.shipped()] + list(tuning.CANDIDATES)
    assert all(tuning.PADDING % tile.x == tuning.PADDING % tile.y == 0 and tile.y >= 16 for tile in tiles)
    for size in (2, 4):
        for d in range(0, 300):
            if tuning.fits(d, size):
                for arch in (75, 80, 87, 90, 103, 121, 200):
                    assert tuning.default_tile("grad", tuning.padded_dim(d), size, arch) in tiles
    assert tuning.fits(256, 2) and not tuning.fits(257, 2) and tuning.fits(64, 4) and not tuning.fits(65, 4)


def test_measured_choices_are_kept_and_used(cache):
    assert tuning.tile("grad", 128, torch.bfloat16, cache) == tuning.default_tile("grad", 128, 2, 90)
    tuning.keep(cache, {tuning.key("grad", 128, 2): [64, 64, 4, 2, True]})
    path = tuning.keep(cache, {tuning.key("form self", 64, 2): "chunked", "chunk": [1024, 2048]})
    assert path.name == "tuning-nvidia-test-1.json"
    assert tuning.tile("grad", 128, torch.float16, cache) == tuning.Tile(64, 64, 4, 2, True)
    assert tuning.tile("grad", 64, torch.float16, cache) == tuning.default_tile("grad", 128, 2, 90)
    assert (
        tuning.form("self", 64, torch.bfloat16, cache) == "chunked"
        and tuning.form("pair", 64, torch.bfloat16, cache) == "flash"
        and tuning.form("self", 128, torch.bfloat16, cache) == "flash"
    )
    assert tuning.chunk(cache) == (1024, 2048)
    path.write_text(path.read_text().replace(f'"triton": "{tuning._triton_version()}"', '"triton": "0.0"'))
    tuning._read.cache_clear()
    assert tuning.chunk(cache) == tuning.CHUNK  # another compiler's choices


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"choices": {}}', '{"triton": "T", "choices": {"grad/128/2": [1]}}',
        '{"triton": "T", "choices": {"grad/128/2": [96, 64, 4, 2, false]}}', '{"triton": "T", "choices": 3}',
        '{"triton": "T", "choices": {"grad/128/2": [8, 8, 4, 2, false]}}',
        '{"triton": "T", "choices": {"form self/128/2": "fast"}}',
        '{"triton": "T", "choices": {"chunk": [100, 228]}}',
    ],
)  # fmt: skip
def test_a_broken_file_of_choices_warns_and_is_ignored(cache, text):
    path = tuning.cache_path(cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace('"T"', f'"{tuning._triton_version()}"'))
    with pytest.warns(UserWarning, match="not a file of sslfast tune"):
        assert tuning.tile("grad", 128, torch.bfloat16, cache) == tuning.default_tile("grad", 128, 2, 90)
    assert tuning.chunk(cache) == tuning.CHUNK


def test_tune_measures_every_variant_and_leaves_nothing_behind(monkeypatch):
    """On the interpreter, with a clock that likes one tile and a tile that is wrong."""
    import triton

    from sslfast import tune

    liked, wrong = tuning.Tile(64, 64, 4, 2), tuning.Tile(32, 32, 4, 2)
    monkeypatch.setattr(tuning, "CANDIDATES", (liked, wrong))
    monkeypatch.setattr(tuning, "SMALL", 0)

    def clock(call, **options):
        chosen = list(tuning.trial.values())[-1]
        return {tuple(liked): 1.0, "chunked": 1.0, tuple(wrong): 0.5}.get(chosen, 2.0)

    monkeypatch.setattr(triton.testing, "do_bench", clock)
    close = tune._close
    monkeypatch.setattr(tune, "_close", lambda x, y: close(x, y) and list(tuning.trial.values())[-1] != wrong)
    found = dict(tune.measure(16, torch.float32, 256, torch.device("cpu")))
    assert found == {
        **{f"{v}/16/4": [64, 64, 4, 2, False] for v in tuning.VARIANTS},
        "form self/16/4": "chunked",
        "form pair/16/4": "chunked",
    }
    assert tuning.trial == {}


def test_tune_without_a_gpu_says_so(monkeypatch):
    from sslfast import tune

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="tune: expected a GPU"):
        tune.tune()
