"""Checkpoints: everything comes back, nothing is executed, and no crash or full disk leaves half a file."""

import json
import math
import os
import pickle
import random
import resource
import signal
import stat

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sslfast.train import checkpoint

CPU = torch.device("cpu")


def nested():
    return {
        "tensors": [torch.randn(3, 4), torch.zeros(0, 2), torch.tensor(3), torch.randn(2).bfloat16()],
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "view": torch.arange(10)[2:8:2],
        "shared": [torch.ones(5)] * 2,
        "flag": torch.tensor([True, False]),
        0: {"betas": (0.9, 0.999), 1: None, "text": "ä", "big": 2**80, "tiny": 5e-324, "inf": math.inf},
        "nothing": [],
        "lookalike": ["tensor", "0"],
    }


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        assert actual == expected


def test_nested_states_come_back_exactly(tmp_path):
    state = nested()
    checkpoint.save(tmp_path / "a", state)
    assert_same(checkpoint.load(tmp_path / "a"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_file_is_as_readable_as_any_other(tmp_path):
    checkpoint.save(tmp_path / "a", nested())
    (tmp_path / "b").touch()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_other_values_are_refused(tmp_path):
    with pytest.raises(TypeError, match="state: expected"):
        checkpoint.save(tmp_path / "a", {"x": object()})
    assert not list(tmp_path.iterdir())


def test_random_states_come_back(tmp_path):
    checkpoint.save(tmp_path / "a", checkpoint.random_state(CPU))
    drawn = torch.rand(3), np.random.rand(3), [random.random() for _ in range(3)]
    checkpoint.set_random_state(checkpoint.load(tmp_path / "a"), CPU)
    assert torch.equal(torch.rand(3), drawn[0]) and (np.random.rand(3) == drawn[1]).all()
    assert [random.random() for _ in range(3)] == drawn[2]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, nested())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match="resume: .*a.safetensors is not a whole checkpoint"):
        checkpoint.load(path)


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = tmp_path / "a.safetensors"
    checkpoint.save(path, nested())
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="resume: .*a.safetensors is damaged"):
        checkpoint.load(path)


def test_foreign_files_are_refused_by_name(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "weights")
    save_file({"x": torch.ones(2)}, tmp_path / "later", {"format": "sslfast checkpoint 2"})
    for name in ("weights", "later"):
        with pytest.raises(ValueError, match=f"resume: .*{name} is not an 'sslfast checkpoint 1'"):
            checkpoint.load(tmp_path / name)
    (tmp_path / "text").write_text(json.dumps({"a": 1}))
    for name in ("text", "missing"):
        with pytest.raises(ValueError, match=f"resume: .*{name} is not a whole checkpoint"):
            checkpoint.load(tmp_path / name)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    (tmp_path / "trap").write_bytes(pickle.dumps(Trap()))
    torch.save({"model": Trap()}, tmp_path / "torch")
    for name in ("trap", "torch"):
        with pytest.raises(ValueError, match="is not a whole checkpoint"):
            checkpoint.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def full_disk():
    """Files of this process may not grow above 100 kB, which fails the same calls as a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, full_disk):
    path = tmp_path / "a"
    checkpoint.save(path, {"x": torch.ones(10)})
    with pytest.raises(OSError, match="could not write .*a: "):
        checkpoint.save(path, {"x": torch.ones(1_000_000)})
    assert checkpoint.load(path)["x"].sum() == 10
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_gone_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="could not write"):
        checkpoint.save(tmp_path / "gone" / "a", {"x": torch.ones(2)})
