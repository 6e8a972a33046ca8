"""WebDataset's tar shards."""

import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import config, weights

from sslfast.train import data, loop, sources

CPU = torch.device("cpu")


def encoded(seed: int, kind: str = "png") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "jpeg" if kind == "jpg" else kind)
    return file.getvalue()


def write(path, samples, mode="w"):
    """samples: (name, bytes) in order"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int, kind: str = "png", label: int | None = None, key: str = "a/{:04}"):
    name = key.format(i)
    classes = [] if label is None else [(f"{name}.cls", str(label).encode())]
    return [*classes, (f"{name}.{kind}", encoded(i, kind)), (f"{name}.json", b"{}")]


def shard(path, rows, **options):
    """Of images `rows` and classes row % 3."""
    return write(path, [file for i in rows for file in sample(i, label=i % 3, **options)])


def expected(i: int, size: int, kind: str = "png") -> torch.Tensor:
    class One:
        def __len__(self):
            return 1

        def open(self, index):
            return Image.open(io.BytesIO(encoded(i, kind)))

    return data.Decoded(One(), size).decode(0)


@pytest.mark.parametrize("workers", [None, 0, 2])
@pytest.mark.parametrize("pattern", ["folder", "braces"])
def test_shards_with_classes(tmp_path, workers, pattern):
    """In memory, or (with a number of workers) read where they lie; every fifth of a class is for testing."""
    for number in range(12):
        shard(tmp_path / f"shard-{number:03}.tar", range(5 * number, 5 * number + 5))
    name = tmp_path if pattern == "folder" else tmp_path / "shard-{000..011}.tar"
    dataset = sources.load(f"webdataset:{name}", 16, 1 << 30 if workers is None else 0)
    kept, held = data.hold_out([i % 3 for i in range(60)])
    for images, rows in ((dataset.train, kept), (dataset.test, held)):
        assert images.labels.tolist() == [i % 3 for i in rows] and len(images) == len(rows)
        assert images.shape == (3, 16, 16)
        order = torch.randperm(len(rows))
        batches = images.batches(order.split(7), CPU, workers or 0)
        found = [data.image_of(batch, i) for batch in batches for i in range(len(batch))]
        assert all(torch.equal(x, expected(rows[i], 16)) for x, i in zip(found, order.tolist(), strict=True))
    assert dataset.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    "train, test", [("train-", "val-"), ("pets-train", "pets-validation"), ("Train_", "x.TEST")]
)
def test_a_split_of_their_own(tmp_path, train, test):
    for part, rows in ((f"{train}0", range(8)), (f"{train}1", range(8, 16)), (f"{test}0", range(16, 20))):
        shard(tmp_path / f"{part}.tar", rows)
    shard(tmp_path / "retrieval-constrain.tar", range(3))  # of neither
    dataset = sources.load(f"webdataset:{tmp_path}", 16)
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert torch.equal(dataset.test.image(3), expected(19, 16))
    assert dataset.test.labels.tolist() == [1, 2, 0, 1]


def test_without_classes_and_with_strange_names(tmp_path):
    """A sample ends at its first dot, has one image, and may have anything else; names of any bytes."""
    files = [
        ("a/b.c/0001.seg.txt", b"text"), ("a/b.c/0001.jpg", encoded(1, "jpg")), ("x.png", encoded(2)),
        ("x.jpg", encoded(3, "jpg")), ("\udce9.PNG", encoded(4)), ("long/" * 40 + "y.left.png", encoded(5)),
        ("README", b"no dot"), ("z.cls", b"3"),
    ]  # fmt: skip
    path = write(tmp_path / "one.tar", files)
    dataset = sources.load(f"webdataset:{path}", 16)
    assert dataset.train.labels is None and dataset.classes == () and len(dataset.train) == 4
    assert dataset.train.shape == dataset.test.shape == (3, 16, 16)
    for found, (i, kind) in enumerate([(1, "jpg"), (2, "png"), (4, "png"), (5, "png")]):
        assert torch.equal(dataset.train.image(found), expected(i, 16, kind))


def test_broken_images_and_shards_are_named_and_survived(tmp_path, capsys):
    shard(tmp_path / "0.tar", range(6))
    write(tmp_path / "1.tar", [*sample(6), ("bad.png", b"no image"), *sample(7)])
    whole = shard(tmp_path / "2.tar", range(8, 14)).read_bytes()
    with tarfile.open(tmp_path / "2.tar") as tar:
        last = [member for member in tar if member.name.endswith("11.png")][0]
    (tmp_path / "2.tar").write_bytes(whole[: last.offset_data + last.size // 2])
    (tmp_path / "3.tar").write_bytes(b"text" * 1000)
    shard(tmp_path / "4.tar", range(14, 20))
    for memory in (1 << 30, 0):
        dataset = sources.load(f"webdataset:{tmp_path}", 16, memory)
        if not memory:
            assert len(dataset.train) + len(dataset.test) == 19
            for images in (dataset.train, dataset.test):
                list(images.batches([torch.arange(len(images))], CPU))
        else:
            assert len(dataset.train) + len(dataset.test) == 17
        printed = capsys.readouterr().out
        assert f"{tmp_path}/1.tar:bad.png: UnidentifiedImageError" in printed
        assert f"{tmp_path}/2.tar:a/0011.png: the shard ends within it" in printed
        assert f"{tmp_path}/2.tar is not a whole uncompressed tar file, 4 images of it are used" in printed
        assert f"{tmp_path}/3.tar is not a whole uncompressed tar file, 0 images of it are used" in printed
        assert printed.count("skipped") == 2


@pytest.mark.parametrize("how", ["garbage", "bit", "zeros", "cut inside", "cut at", "two in one"])
def test_a_broken_header_is_no_end(tmp_path, capsys, how):
    """tarfile ends there without a word."""
    path = shard(tmp_path / "a.tar", range(10))
    with tarfile.open(path) as tar:
        at = [member.offset for member in tar if member.name == "a/0005.cls"][0]
    content = bytearray(path.read_bytes())
    if how in ("garbage", "zeros"):
        content[at : at + 512] = (b"x" if how == "garbage" else b"\0") * 512
    elif how == "bit":
        content[at + 3] ^= 4
    elif how.startswith("cut"):
        del content[at + 100 * (how == "cut inside") :]
    else:
        content[at:] = bytes(1024) + content[at:]
    path.write_bytes(content)
    dataset = sources.load(f"webdataset:{path}", 16)
    printed = capsys.readouterr().out
    assert len(dataset.train) + len(dataset.test) == 5
    assert f"{path} is not a whole uncompressed tar file, 5 images of it are used: " in printed


def test_what_is_left_out_is_told(tmp_path, capsys):
    path = write(tmp_path / "a.tar", [f for i in range(6) for f in sample(i, label=i if i != 2 else None)])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("b/1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a/0001.png"
        tar.addfile(link)
        hidden = tarfile.TarInfo("a/._0001.png")
        tar.addfile(hidden)
    dataset = sources.load(f"webdataset:{path}", 16)
    assert dataset.train.labels is None and len(dataset.train) + len(dataset.test) == 6
    printed = capsys.readouterr().out
    assert "1 links in the shards are left out" in printed
    assert "1 of 6 images have no .cls: no labels are used" in printed


def test_what_is_refused(tmp_path):
    compressed = write(tmp_path / "c" / "a.tar.gz", sample(0) + sample(1) + sample(2), "w:gz")
    no_class = write(tmp_path / "b" / "a.tar", [*sample(0), *sample(1), ("a/0001.cls", b"cat")])
    few = write(tmp_path / "f" / "a.tar", sample(0))
    for name, message in (
        (tmp_path / "nothing", "expected a tar file, a folder of them"),
        (tmp_path / "x-{0..3}.tar", "expected a tar file, a folder of them"),
        (tmp_path / "f" / "{5..1}.tar", "expected a tar file, a folder of them"),
        (compressed, "a.tar.gz is not an uncompressed tar file"),
        (no_class, r"expected the number of a class in a/0001.cls of .*, got b'cat'"),
        (few, "expected at least two readable training images"),
        ("", "expected mnist5k"),
    ):
        with pytest.raises(ValueError, match=f"^data: .*{message}"):
            sources.load(f"webdataset:{name}", 16)


def test_a_reader_keeps_no_file_open(tmp_path):
    for number in range(20):
        shard(tmp_path / f"{number:02}.tar", range(3 * number, 3 * number + 3))
    dataset = sources.load(f"webdataset:{tmp_path}", 16, 0)
    before = len(os.listdir("/proc/self/fd"))
    list(dataset.train.batches(torch.randperm(len(dataset.train)).split(8), CPU))
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("memory", [1.0, 0.0])
def test_a_run_on_shards(tmp_path, memory):
    """From the first view to the evaluation."""
    for number in range(8):
        shard(tmp_path / "data" / f"{number}.tar", range(6 * number, 6 * number + 6))
    images = f"webdataset:{tmp_path / 'data'}"
    cfg = config(
        tmp_path / "run", images, image_size=16, cache_gib=memory, workers=0, epochs=1, augment="auto"
    )
    loop.train("simclr", cfg)
    assert weights(cfg) and "linear probe" in (cfg.out / "evaluation.json").read_text()
