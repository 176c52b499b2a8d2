"""Builds the compiled part with CMake and Ninja; everything else is in pyproject.toml.

PYFLOWGEN_BUILD=auto|cpu|cuda|none   auto adds CUDA when nvcc is found; none makes the pure-Python package
MAX_JOBS, TORCH_CUDA_ARCH_LIST       as for torch's own extensions
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODE = os.environ.get("PYFLOWGEN_BUILD", "auto")


def cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX") as CMake wants it ("80-real;90")."""
    result = []
    for name in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX").replace(" ", ";").split(";"):
        if name:
            number = name.removesuffix("+PTX").replace(".", "")
            result.append(number if name.endswith("+PTX") else f"{number}-real")
    return ";".join(result)


class CMakeBuild(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.in_source = bool(self.inplace)  # run() clears inplace; editable installs set it as well

    def copy_extensions_to_source(self) -> None:
        """Nothing: in place, CMake installs next to the sources."""

    @staticmethod
    def tools(build: Path) -> list[str]:
        """Configure anew when the cached cmake or ninja is gone: an isolated build takes them along when it ends."""
        cache = build / "CMakeCache.txt"
        lines = cache.read_text().splitlines() if cache.exists() else []
        known = [x.partition("=")[2] for x in lines if x.startswith(("CMAKE_COMMAND:", "CMAKE_MAKE_PROGRAM:"))]
        return [] if all(Path(tool).exists() for tool in known) else ["--fresh"]

    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            sys.exit(
                f"pyflowgen: no C++ compiler ({compiler}) found. Install g++ >= 11, or the pure-Python package, "
                "which runs plain PyTorch: PYFLOWGEN_BUILD=none pip install ."
            )
        nvcc = shutil.which("nvcc")
        cuda = MODE == "cuda" or (MODE == "auto" and nvcc is not None)
        kinds = "CPU and CUDA" if cuda else "CPU"
        print(f"pyflowgen: building {kinds} kernels (PYFLOWGEN_BUILD={MODE}, nvcc: {nvcc})")
        # In place (editable installs too): next to the sources. Else: in the wheel under construction.
        target = ROOT / "pyflowgen" if self.in_source else Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        arguments = [
            "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            *self.tools(build),
            f"-DCMAKE_CXX_COMPILER={compiler}",
            f"-DPYFLOWGEN_TORCH={Path(torch.__file__).parent}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DPYFLOWGEN_WITH_CUDA={'ON' if cuda else 'OFF'}",
        ]  # fmt: skip
        if cuda:
            arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={cuda_architectures()}")
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run(["cmake", *arguments], check=True)
        subprocess.run(["cmake", "--build", str(build), *(["-j", jobs] if jobs else [])], check=True)
        subprocess.run(["cmake", "--install", str(build), "--prefix", str(target)], check=True)


setup(
    ext_modules=[] if MODE == "none" else [Extension("pyflowgen._C", [])],
    cmdclass={"build_ext": CMakeBuild},
)
