"""The `sslfast` command and what importing the library brings in."""

import re
import subprocess
import sys

import pytest
import torch

import sslfast
from sslfast.cli import main


def test_import_is_light(tmp_path):
    code = (
        "import sys, sslfast; "
        "heavy = {'triton', 'matplotlib', 'sklearn', 'rich', 'tyro', 'PIL', 'mlxtend', "
        "'sslfast.train'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]  # elsewhere, since -c puts the current folder on sys.path
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[]"


def test_kernels_is_a_package_of_sslfast():
    import sslfast.kernels.tuning as tuning

    assert sslfast.kernels.__name__ == "sslfast.kernels" and min(tuning.CPU_TILE) > 0


def test_doctor_names_versions_devices_and_backends(capsys):
    main(["doctor"])
    printed = capsys.readouterr().out
    assert f"sslfast {sslfast.__version__}" in printed and f"torch {torch.__version__}" in printed
    assert re.search(r"CPU kernels: \w+ of baseline", printed)
    assert "similarity_lse on cpu:\n  float32: cpu" in printed
    assert re.search(r"triton: not used, \w+", printed)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "simclr", "--out", "x", "--data", "cifar"], "data: expected"),
        (["train", "simclr", "--out", "x", "--epochs", "0"], "epochs: expected"),
        (["train", "simclr", "--out", "x", "--device", "warp"], "device: expected"),
        (["eval", "no/such/run"], "run: expected"),
    ],
)
def test_errors_name_the_argument_with_status_2(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["train", "simclr", "--help"], ["eval", "--help"]]
)
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0 and "usage: sslfast" in capsys.readouterr().out


def test_isa_can_be_forced_and_a_wrong_one_is_refused(monkeypatch):
    from sslfast import _C

    for isa in _C.cpu_isas():
        monkeypatch.setenv("SSLFAST_CPU_ISA", isa)
        assert _C.cpu_isa() == isa
    monkeypatch.setenv("SSLFAST_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match="SSLFAST_CPU_ISA: expected one of"):
        _C.cpu_isa()
    with pytest.raises(ValueError, match="SSLFAST_CPU_ISA"):
        sslfast.similarity_lse(torch.randn(4, 3))
