"""nvcc compiles every .cu for each architecture of the wheel, without spills and within the stated registers."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# Registers a thread. With blocks of 256 threads and 65,536 registers, 128 leave two blocks a multiprocessor: 512
# threads with three or four 128-bit loads each, more bytes in flight than its share of the memory's bandwidth needs.
# slogdet lives in shared memory: 64 leave it four blocks.
# A recurrence has one block a multiprocessor, of which shared memory leaves no second: 255 would do.
REGISTERS = {
    "affine_coupling": 128, "gru": 160, "lstm": 160, "polynomial_spline": 128, "rational_quadratic_spline": 128,
    "slogdet": 64, "trn": 255,
}  # fmt: skip
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

nvcc = shutil.which("nvcc")


def cuobjdump() -> str | None:
    """The tool of the toolkit, or the one that Triton's package carries."""
    triton = importlib.util.find_spec("triton")
    carried = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (str(carried) if carried and carried.exists() else None)


@pytest.mark.skipif(nvcc is None, reason="nvcc not found")
@pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump not found: neither the CUDA toolkit's nor Triton's")
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda path: path.stem)
def test_no_spills_and_few_registers(kernels, tmp_path):
    def compile(architecture: str) -> tuple[str, str]:
        target = tmp_path / f"{architecture}.cubin"
        command = ["nice", str(nvcc), f"-arch={architecture}", "-std=c++20", "-O3", "-Werror", "all-warnings", "-cubin"]
        command += ["-Xptxas", "-v", "-I", str(ROOT / "csrc"), str(kernels), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        usage = subprocess.run(
            [str(cuobjdump()), "--dump-resource-usage", str(target)], capture_output=True, text=True, check=True
        )
        return done.stderr, usage.stdout

    with ThreadPoolExecutor(2) as pool:
        for architecture, (assembler, usage) in zip(ARCHITECTURES, pool.map(compile, ARCHITECTURES), strict=True):
            functions = re.findall(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", usage)
            assert functions, usage
            spilled = re.findall(r"Function properties for (\w+)\s+.*? (\d+) bytes spill stores", assembler)
            assert len(spilled) >= len(functions), assembler
            assert not [name for name, size in spilled if size != "0"], architecture
            for name, registers, stack in functions:
                assert int(registers) <= REGISTERS[kernels.stem], (architecture, name)
                assert int(stack) == 0, (architecture, name)
