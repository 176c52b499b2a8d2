"""Compile the CUDA kernels for the CPU: ``python tests/cuda_on_cpu/build.py OUT`` writes ``libpyflowgen.so``.

``PYFLOWGEN_LIBRARY=OUT/libpyflowgen.so`` then makes the package run the CUDA launchers on CPU tensors, chosen by the
dispatcher: the adapters are compiled with the dispatch key CPU in the place of CUDA.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=gnu++20", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DPYFLOWGEN_ISA=device"]
FLAGS += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-clobbered"]
# A GPU's fma rounds once; without the instruction the formulas' own would round twice.
CPU = Path("/proc/cpuinfo")
if CPU.exists() and {"avx2", "fma"} <= set(CPU.read_text().split()):
    FLAGS += ["-mavx2", "-mfma"]
SANITIZE = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def _compile(source: Path, out: Path, flags: list[str]) -> Path:
    result = out / f"{source.parent.name}_{source.name}.o"
    if result.exists():
        return result
    command = [
        "nice",
        CXX,
        *FLAGS,
        *flags,
        "-I",
        str(HERE),
        "-I",
        str(source.parents[1]),
        "-I",
        str(CSRC),
        "-x",
        "c++",
        "-c",
        str(source),
    ]
    done = subprocess.run([*command, "-o", str(result)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return result


def _build(sources: dict[Path, list[str]], out: Path, target: str, link: list[str], shared: Path | None = None) -> Path:
    shared = shared or out
    for folder in (out, shared):
        folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        objects = list(
            pool.map(
                lambda item: _compile(item[0], shared if item[0].parent == HERE else out, item[1]), sources.items()
            )
        )
    command = [CXX, *map(str, objects), *link, "-o", str(out / target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return out / target


def library(out: Path) -> Path:
    """The op library with every stem of csrc/cuda on dispatch key CPU."""
    import torch

    root = Path(torch.__file__).parent
    tensors = ["-O1", "-isystem", str(root / "include"), "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources: dict[Path, list[str]] = {HERE / "cuda_on_cpu.cpp": ["-O2"]}
    for kernel in sorted((CSRC / "cuda").glob("*.cu")):
        sources[kernel] = ["-O1"]
        sources[CSRC / "cuda" / f"{kernel.stem}.cpp"] = [*tensors, "-DPYFLOWGEN_CUDA_KEY=CPU"]
        sources[CSRC / f"{kernel.stem}.cpp"] = tensors
    link = [
        "-shared",
        "-Wl,--no-undefined",
        f"-L{root / 'lib'}",
        f"-Wl,-rpath,{root / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-ldl",
    ]
    return _build(sources, out, "libpyflowgen.so", link)


def program(
    out: Path, sources: list[Path], sanitizer: str | None, defines: list[str], shared: Path | None = None
) -> Path:
    """A program of its own from kernels and a main function, without torch or Python.

    What this folder's sources give is kept in ``shared``, for programs of the same sanitizer and defines.
    """
    flags = ["-O1", *SANITIZE[sanitizer], *defines]
    # The scheduler is told of ThreadSanitizer and not instrumented by it.
    runtime = ["-O1", *([] if sanitizer is None else [f"-DCUDA_ON_CPU_{'ASAN' if sanitizer == 'address' else 'TSAN'}"])]
    every = {HERE / "cuda_on_cpu.cpp": runtime, **{source: flags for source in sources}}
    return _build(every, out, "program", [*SANITIZE[sanitizer], "-pthread"], shared)


if __name__ == "__main__":
    print(library(Path(sys.argv[1]).resolve()))
