"""Whether an installed package works, with nothing but torch and numpy: python smoke.py FOLDER."""

import importlib
import sys
from pathlib import Path

import torch

import sslfast
from sslfast.losses.contrastive import ntxent_reference


def main(folder: str) -> None:
    assert Path(sslfast.__file__).is_relative_to(folder), sslfast.__file__
    loaded = {"triton", "matplotlib", "sklearn", "tyro"} & set(sys.modules)
    assert not loaded, f"import sslfast loads {loaded}"
    for name in ("lightly", "open_clip", "supcontrast", "solo_learn", "moco", "torch"):
        importlib.import_module(f"sslfast.interop.{name}")
    z = [torch.randn(60, 24, requires_grad=True) for _ in range(2)]
    ours, plain = sslfast.ntxent_loss(*z, 0.1), ntxent_reference(*z, 0.1)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(torch.autograd.grad(ours, z), torch.autograd.grad(plain, z), strict=True):
        torch.testing.assert_close(a, b)
    teacher = sslfast.EMATeacher(torch.nn.Linear(3, 2))
    teacher.update(torch.nn.Linear(3, 2))
    mask = sslfast.random_patch_mask(2, 16, 0.75)
    assert mask.mask.sum() == 24
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    assert [view.shape for view in sslfast.augment_views(images, "simclr", size=8)] == [(2, 3, 8, 8)] * 2
    print(sslfast.__version__, sslfast.available_backends())


if __name__ == "__main__":
    main(sys.argv[1])
