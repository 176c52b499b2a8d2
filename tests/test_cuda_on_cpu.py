"""The CUDA kernels on the CPU: right values through the dispatcher, clean under the sanitizers, planted bugs found.

The kernels are the .cu files themselves, compiled by g++ with tests/cuda_on_cpu/cuda_runtime.h.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tests" / "cuda_on_cpu"
sys.path.insert(0, str(HERE))
import build  # noqa: E402

OPS = ("affine_coupling", "gru", "lstm", "polynomial_spline", "rational_quadratic_spline", "slogdet", "trn")
FLOAT_ONLY = ["-DPYFLOWGEN_FLOAT_ONLY"]

pytestmark = pytest.mark.skipif(
    shutil.which(build.CXX) is None or platform.system() != "Linux", reason="needs g++ and ucontext on Linux"
)


def execute(program: Path, *arguments: str) -> tuple[int, str]:
    environment = {**os.environ, "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "history_size=7"}
    # Neither sanitizer can place its shadow where the addresses are too random.
    command = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    probe = subprocess.run([*command, "true"], capture_output=True) if command else None
    if probe is None or probe.returncode:
        command = []
    done = subprocess.run(
        [*command, str(program), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda_on_cpu")


def test_features(folder):
    """Shuffles, votes, barriers, atomics, shared memory; the divider and the 16-bit conversions the kernels use."""
    code, output = execute(build.program(folder / "features", [HERE / "features.cu"], None, []))
    assert code == 0, output


@pytest.mark.parametrize("op", OPS)
def test_launchers(folder, op):
    library = build.library(folder / "library")
    environment = {**os.environ, "PYFLOWGEN_LIBRARY": str(library), "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / f"run_{op}.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def sources(op: str) -> list[Path]:
    return [HERE / f"{op}_driver.cpp", build.CSRC / "cuda" / f"{op}.cu"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sanitizer", ("address", "thread"))
def test_sanitizers_find_nothing(folder, sanitizer, op):
    # Vectors of 16 bytes are of another width for each dtype; the recurrences' kernels load one element at a time.
    defines = [] if sanitizer == "address" and op not in ("gru", "lstm", "trn") else FLOAT_ONLY
    program = build.program(folder / sanitizer / op, sources(op), sanitizer, defines, folder / sanitizer)
    code, output = execute(program)
    assert code == 0 and "ERROR: " not in output and "WARNING: ThreadSanitizer" not in output, output[-5000:]


# Name: (op, file, what stands there, the bug in its place, the build that is to find it, what is to be reported).
PLANTED = {
    "removed barrier": ("affine_coupling", "launch.cuh", "    __syncthreads();\n", "", "thread", "ThreadSanitizer: data race"),
    "removed barrier, seen in the values": ("affine_coupling", "launch.cuh", "    __syncthreads();\n", "", None, "logdet is"),
    "overrun of a tensor": (
        "affine_coupling", "affine_coupling.cu", "row < cut.batch ? (last < cut.units ? last : cut.units) : 0",
        "last < cut.units ? last : cut.units",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "overrun of shared memory": (
        "affine_coupling", "launch.cuh", "double sums[threads / warp];", "double sums[threads / warp - 1];",
        "address", "global-buffer-overflow|out of bounds",
    ),
    "unaligned 128-bit access": (
        "affine_coupling", "affine_coupling.cu", "uintptr_t(v.p) % (sizeof(T) * size_t(width)) == 0", "true",
        "address", "misaligned address",
    ),
    "race between blocks": (
        "affine_coupling", "affine_coupling.cu", "t.partial[here.row * gridDim.y + blockIdx.y] = total", "t.partial[here.row] = total",
        "thread", "ThreadSanitizer: data race",
    ),
    "a barrier some threads miss": (
        "affine_coupling", "launch.cuh", "    __syncthreads();\n",
        "    if (threadIdx.x % 64 != 1) __syncthreads(); else for (;;) __syncwarp();\n",
        None, "that other threads never reach",
    ),
    "rows exchanged while others still look for the pivot": (
        "slogdet", "slogdet.cu", "  __syncwarp();\n  if (row != k) {\n", "  if (row != k) {\n",
        "thread", "ThreadSanitizer: data race",
    ),
    "a matrix beyond the batch": (
        "slogdet", "slogdet.cu", "matrix < cut.batch", "matrix >= 0",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "the sign of an exchange forgotten": (
        "slogdet", "slogdet.cu", "row == k ? pivot : -pivot", "pivot", None, "sign is",
    ),
    "sums read before all are there": (
        "rational_quadratic_spline", "spline.cuh",
        "  sums[own] = total;\n  __syncthreads();\n", "  sums[own] = total;\n",
        "thread", "ThreadSanitizer: data race",
    ),
    "an element beyond the batch": (
        "rational_quadratic_spline", "spline.cuh",
        "row + cut.rows < cut.batch ? row + cut.rows : cut.batch", "row + cut.rows",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "more elements than shared memory has places for": (
        "rational_quadratic_spline", "spline.cuh",
        "size_t(cut.each) * size_t(cut.pitch)", "size_t(cut.each) * size_t(cut.pitch - 1)",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "parameters read before all are staged": (
        "polynomial_spline", "spline.cuh",
        "    if (j >= columns) j -= columns, ++element;\n  }\n  __syncthreads();\n",
        "    if (j >= columns) j -= columns, ++element;\n  }\n",
        "thread", "ThreadSanitizer: data race|ThreadSanitizer: SEGV",
    ),
    "a density beyond the last": (
        "polynomial_spline", "polynomial_spline.cu", "j < last || !d.first ? d.own[j + 1 - d.first] : C(0)",
        "d.own[(j + 1 - d.first) * 1000]",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "the outer densities' gradient forgotten": (
        "polynomial_spline", "polynomial_spline.cu", "(first + final) / d.outer_share * d.share", "C(0)", None, "dparams is",
    ),
    "a neighbour's size forgotten": (
        "polynomial_spline", "polynomial_spline.cu", "before_h = d0 * at0.s0 / k.w0", "before_h = 0", None, "dparams is",
    ),
    "removed barrier of the grid": (
        "lstm", "recurrence.cuh", "    if (i + 1 < o.steps.steps) barrier.meet();\n", "    __syncthreads();\n",
        "thread", "ThreadSanitizer: data race",
    ),
    "blocks that meet without a fence": (
        "lstm", "grid.cuh", "      __threadfence();\n      atomicAdd", "      atomicAdd",
        "thread", "ThreadSanitizer: data race",
    ),
    "blocks that do not wait, seen in the values": (
        "lstm", "grid.cuh", "while (int(PYFLOWGEN_POLL(arrived) - target) < 0)", "if (int(PYFLOWGEN_POLL(arrived) - target) < 0)",
        None, "y[",
    ),
    "blocks that wait for more than there are": (
        "lstm", "grid.cuh", "target += gridDim.x;", "target += gridDim.x + 1;",
        None, "that other threads never reach",
    ),
    "units beyond the last": (
        "lstm", "grid.cuh", "rest < each ? (rest > 0 ? rest : 0) : each", "each",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "a row beyond the step's": (
        "lstm", "grid.cuh", "x(row + r < rows ? row + r : rows - 1)", "x(row + r)",
        "address", "AddressSanitizer: heap-buffer-overflow",
    ),
    "scores read before all are there": (
        "trn", "trn.cu", "sum + start(first + row, n); });\n  __syncthreads();\n", "sum + start(first + row, n); });\n",
        "thread", "ThreadSanitizer: data race",
    ),
    "a decoder step that does not wait for the last": (
        "trn", "trn.cu", "      if (i + 1 < L) barrier.meet();\n", "",
        "thread", "ThreadSanitizer: data race",
    ),
    "the gradient of the cell lost between steps": (
        "lstm", "lstm.cu", "dc = u.before;", "dc = 0;",
        None, "dgates[",
    ),
    "the factor of h's part forgotten": (
        "gru", "gru.cu", "d_last = u.db_n", "d_last = u.dn",
        None, "dgates[",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_found(folder, name):
    op, file, right, wrong, sanitizer, report = PLANTED[name]
    driver, original = sources(op)
    here = folder / "planted" / re.sub(r"\W+", "_", name)
    shutil.copytree(build.CSRC / "cuda", here / "cuda")
    changed = here / "cuda" / file
    text = changed.read_text()
    assert text.count(right) == 1
    changed.write_text(text.replace(right, wrong))
    kernels = here / "cuda" / original.name
    # float alone: the driver in its short form calls no other.
    lines = kernels.read_text().splitlines(keepends=True)
    kernels.write_text(
        "".join(line for line in lines if not line.startswith("PYFLOWGEN_INSTANTIATE") or "(float" in line)
    )
    program = build.program(here, [driver, kernels], sanitizer, FLOAT_ONLY, folder / f"shared_{sanitizer}")
    code, output = execute(program, *(["short"] if "unaligned" not in name else []))
    assert code != 0 and any(part in output for part in report.split("|")), output[-5000:]
