"""Drives CMake and Ninja over csrc/ to build sslfast._C. Neither torch nor nvcc is needed at build time."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).parent.resolve() / "csrc"


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
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
            *options.split(),
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next((build / "out").glob("_C*")), target)


setup(ext_modules=[Extension("sslfast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
