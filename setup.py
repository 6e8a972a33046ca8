"""Drives CMake and Ninja over csrc/ to build sslfast._C. Neither torch nor nvcc is needed at build time."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve() / "csrc"


def pybind11_option() -> str:
    """Where pybind11 is: its package or, without one (no build isolation), the headers inside torch."""
    try:
        import pybind11
    except ModuleNotFoundError:
        torch = importlib.util.find_spec("torch")
        include = Path(torch.origin).parent / "include" if torch and torch.origin else None
        if include is None or not (include / "pybind11" / "pybind11.h").exists():
            raise
        return f"-DSSLFAST_PYBIND11_INCLUDE={include}"
    return f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"


class CMakeBuild(build_ext):
    """Builds each extension in `ext_modules` with one CMake run; CMAKE_ARGS adds options of the user's."""

    def build_extension(self, ext: Extension) -> None:
        options = os.environ.get("CMAKE_ARGS", "")
        # A folder per set of options: CMake would keep, say, a sanitizer from an earlier build.
        build = Path(self.build_temp).resolve() / hashlib.sha256(options.encode()).hexdigest()[:8]
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(SOURCE), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            pybind11_option(),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
            *options.split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next((build / "out").glob("_C*")), target)


setup(ext_modules=[Extension("sslfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
