"""csrc/formula/elementary.h against mpmath: every instruction set this processor runs, scalars and packs.

The header has no Python face: a probe of it is compiled here with the flags of CMakeLists.txt and called by ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
import scipy.special  # type: ignore[import-untyped]
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "tests" / "native" / "elementary_probe"
FUNCTIONS = ("exp", "expm1", "log", "log1p", "tanh", "sigmoid", "softplus", "log_sigmoid", "atan", "normal_cdf")
MAX_ULP = 3  # the bound asked for is 4; the largest measured is 2.6, and a lost digit must show
LARGER = {"normal_cdf": 4}  # measured: 3.83
Array = NDArray[np.floating]

gxx = shutil.which("g++")
nvcc = shutil.which("nvcc")


def isa_flags() -> dict[str, list[str]]:
    """Instruction sets CMake compiles that this processor runs, with their flags; generic: other processors' code."""
    copies: dict[str, list[str]] = {"baseline": [], "generic": ["-U__SSE2__"]}
    if platform.machine() in ("x86_64", "AMD64"):
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        runs = set(" ".join(re.findall(r"^flags\s*:(.*)$", cpu, re.M)[:1]).split())
        for name, flags in re.findall(r"set\(FLAGS_(\w+) (.*?)\)", (ROOT / "CMakeLists.txt").read_text()):
            needs = {flag[2:] for flag in flags.split() if "=" not in flag}
            if needs <= runs:
                copies[name] = flags.split()
    return copies


COPIES = isa_flags()


def compile_probe(isa: str, folder: Path) -> ctypes.CDLL:
    command = [
        str(gxx),
        "-std=gnu++20",
        "-O3",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-psabi",
        "-fPIC",
        "-fvisibility=hidden",
    ]
    command += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", f"-DPYFLOWGEN_ISA={isa}", *COPIES[isa]]
    command += ["-I", str(ROOT / "csrc"), "-c", f"{PROBE}.cpp", "-o", str(folder / f"{isa}.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = folder / f"{isa}.so"
    subprocess.run([str(gxx), "-shared", str(library.with_suffix(".o")), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ctypes.CDLL]:
    if gxx is None:
        pytest.skip("g++ not found")
    folder = tmp_path_factory.mktemp("elementary")
    return {isa: compile_probe(isa, folder) for isa in COPIES}


def call(library: ctypes.CDLL, function: str, kind: str, x: Array) -> Array:
    """The probe over x, whose length is padded to whole packs."""
    padded = np.concatenate([x, np.ones(-len(x) % 16, x.dtype)])
    y = np.full_like(padded, 7)
    pointers = (ctypes.c_void_p(padded.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int64(len(padded)))
    getattr(library, f"{function}_{x.dtype}_{kind}")(*pointers)
    return y[: len(x)]


def bits(x: Array) -> NDArray[np.unsignedinteger]:
    return x.view(f"u{x.dtype.itemsize}")


@functools.cache
def inputs(dtype: str) -> Array:
    """All exponents with several mantissas, random bit patterns, the ranges where results vary, and their borders."""
    kind = np.dtype(dtype)
    rng = np.random.default_rng(0)
    single = kind == np.float32
    mantissa, word = (23, np.uint32) if single else (52, np.uint64)
    exponents = np.arange(2 ** (8 * kind.itemsize - 1 - mantissa) - 1, dtype=word) << word(mantissa)
    corners = np.array([0, 1, 2**mantissa - 1, 2 ** (mantissa - 1)], dtype=word)
    mantissas = np.concatenate([corners, rng.integers(0, 2**mantissa, 60 if single else 1, dtype=word)])
    grid = (exponents[:, None] + mantissas).ravel().view(kind)
    count = 100_000 if single else 2_000
    noise = rng.integers(0, 2 ** (8 * kind.itemsize), 2 * count, dtype=word).view(kind)
    widest = 110 if single else 760
    spread = [rng.uniform(-limit, limit, count) for limit in (widest, 30, 3, 1, 1e-3)]
    spread += [1 + rng.uniform(-limit, limit, count) for limit in (0.6, 1e-3, 1e-7)]
    spread += [-1 + rng.uniform(0, 1e-2, count)]
    # Where the code turns: reductions (k + 1/2) ln 2, thresholds, and the ends of the results' range.
    turns = np.concatenate([(np.arange(-40, 40) + 0.5) * np.log(2), [0.41421356, 0.5, 0.75, 1, 1.5, 2, 20, 40, 1e-20]])
    ends = np.array([87.33654, 88.02969, 88.72284, 89, 103.27893, 103.97208, 104, 708.39642, 709.08957, 709.78271])
    ends = np.concatenate([turns, ends, [710, 744.44007, 745.13322, 746]]).astype(kind)
    steps = np.arange(-12, 13).astype(f"i{kind.itemsize}")
    near = (np.abs(ends).view(f"i{kind.itemsize}")[:, None] + steps).ravel().view(kind)
    x = np.concatenate([grid, -grid, noise, near, -near, *(part.astype(kind) for part in spread)])
    return x[np.isfinite(x)]


def exact(function: str, x: float) -> mpmath.mpf:
    v = mpmath.mpf(x)
    near = mpmath.mpf(min(max(x, -800.0), 800.0))  # beyond, exp has long left the range of a double
    if function == "exp":
        return mpmath.exp(near)
    if function == "expm1":
        return mpmath.expm1(near)
    if function == "tanh":
        return mpmath.tanh(near)
    if function == "sigmoid":
        return 1 / (1 + mpmath.exp(-near))
    if function == "softplus":
        return v if x > 800 else mpmath.log1p(mpmath.exp(near))
    if function == "log_sigmoid":
        return v if x < -800 else -mpmath.log1p(mpmath.exp(-near))
    if function == "normal_cdf":
        return mpmath.ncdf(near)
    return getattr(mpmath, function)(v)


# float32 is held against float64, whose own error is 2^-29 of a float's ulp in these forms without cancellation.
DOUBLE: dict[str, Callable[[Array], Array]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": lambda x: np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x))),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "log_sigmoid": lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))),
    "atan": np.arctan,
    "normal_cdf": scipy.special.ndtr,
}


@functools.cache
def truth(function: str, dtype: str) -> tuple[Array, NDArray[np.int64], Array, Array]:
    """x, the exponent of an ulp of f(x) (the denormals' at least), and f(x) in these ulps as a whole and a rest."""
    x = inputs(dtype)
    x = x[x > 0] if function == "log" else x[x > -1] if function == "log1p" else x
    digits, lowest, highest = (24, -149, 104) if dtype == "float32" else (53, -1074, 971)
    if dtype == "float32":
        with np.errstate(over="ignore", under="ignore"):
            y = DOUBLE[function](x.astype(np.float64))
        y = np.clip(y, -(2.0**128), 2.0**128)
        ulp = np.clip(np.frexp(y)[1] - digits, lowest, highest).astype(np.int64)
        return x, ulp, np.ldexp(y, -ulp), np.zeros_like(y)
    ulp = np.empty(len(x), np.int64)
    whole, rest = np.empty(len(x)), np.empty(len(x))
    limit = mpmath.mpf(2) ** 1024
    with mpmath.workprec(120):
        for i, v in enumerate(x.tolist()):
            y = exact(function, v)
            y = max(min(y, limit), -limit)
            ulp[i] = min(max(mpmath.frexp(y)[1] - digits, lowest), highest)
            scaled = mpmath.ldexp(y, int(-ulp[i]))
            whole[i] = float(mpmath.nint(scaled))
            rest[i] = float(scaled - whole[i])
    return x, ulp, whole, rest


def ulp_error(y: Array, ulp: NDArray[np.int64], whole: Array, rest: Array) -> Array:
    """Error in ulps; an infinity counts as the first power of two beyond the range, as rounding does."""
    top = 128 if y.dtype == np.float32 else 1024
    scaled = np.ldexp(y.astype(np.float64), -ulp)
    scaled = np.where(np.isinf(y), np.copysign(np.ldexp(1.0, np.minimum(top - ulp, 1023)), y), scaled)
    return np.abs((scaled - whole) - rest)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", COPIES)
def test_error_in_ulps(libraries: dict[str, ctypes.CDLL], isa: str, dtype: str, function: str) -> None:
    x, ulp, whole, rest = truth(function, dtype)
    pack = call(libraries[isa], function, "pack", x)
    error = ulp_error(pack, ulp, whole, rest)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    assert error[worst] <= LARGER.get(function, MAX_ULP), (
        f"{function}({x[worst]!r}) = {pack[worst]!r} is {error[worst]:.2f} ulp off"
    )
    scalar = call(libraries[isa], function, "scalar", x)
    np.testing.assert_array_equal(bits(scalar), bits(pack), err_msg="pack and scalar differ")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_copies_with_fma_agree(libraries: dict[str, ctypes.CDLL], dtype: str, function: str) -> None:
    if not {"avx2", "avx512"} <= set(libraries):
        pytest.skip("this processor runs at most one instruction set with FMA")
    x = truth(function, dtype)[0]
    avx2, avx512 = (call(libraries[isa], function, "pack", x) for isa in ("avx2", "avx512"))
    np.testing.assert_array_equal(bits(avx2), bits(avx512))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("isa", COPIES)
@pytest.mark.parametrize("kind", ["scalar", "pack"])
def test_special_values(libraries: dict[str, ctypes.CDLL], kind: str, isa: str, dtype: str) -> None:
    info = np.finfo(dtype)
    inf, nan, huge, tiny, small = np.inf, np.nan, float(info.max), float(info.smallest_subnormal), float(info.tiny)
    odd = [(v, v) for v in (0.0, -0.0, tiny, -tiny, small, -small, small / 2, 3 * tiny)]  # f(x) = x
    cases: dict[str, list[tuple[float, float]]] = {
        "exp": [(0.0, 1), (-0.0, 1), (tiny, 1), (inf, inf), (huge, inf), (-inf, 0.0), (-huge, 0.0), (-1e4, 0.0)],
        "expm1": [*odd, (inf, inf), (huge, inf), (-inf, -1), (-huge, -1), (-1e4, -1)],
        "log": [(0.0, -inf), (-0.0, -inf), (1, 0.0), (inf, inf), (-tiny, nan), (-1, nan), (-huge, nan), (-inf, nan)],
        "log1p": [*odd, (-1, -inf), (inf, inf), (-2, nan), (-1 - float(info.eps), nan), (-huge, nan), (-inf, nan)],
        "tanh": [*odd, (inf, 1), (-inf, -1), (huge, 1), (-huge, -1)],
        "sigmoid": [(0.0, 0.5), (-0.0, 0.5), (inf, 1), (huge, 1), (-inf, 0.0), (-huge, 0.0)],
        "softplus": [(inf, inf), (huge, huge), (1000, 1000), (-inf, 0.0), (-huge, 0.0), (-1000, 0.0)],
        "log_sigmoid": [(-inf, -inf), (-huge, -huge), (-1000, -1000), (inf, -0.0), (huge, -0.0), (1000, -0.0)],
        "normal_cdf": [(0.0, 0.5), (-0.0, 0.5), (inf, 1), (huge, 1), (40, 1), (-inf, 0.0), (-huge, 0.0), (-40, 0.0)],
        "atan": [*odd, (inf, np.pi / 2), (-inf, -np.pi / 2), (huge, np.pi / 2), (-huge, -np.pi / 2)],
    }
    signalling = (bits(np.array([inf], dtype)) + np.array(1, f"u{info.bits // 8}")).view(dtype)
    for function in FUNCTIONS:
        x, expected = (np.array(column, dtype) for column in zip(*cases[function], strict=True))
        y = call(libraries[isa], function, kind, x)
        np.testing.assert_array_equal(np.isnan(y), np.isnan(expected), err_msg=function)
        kept = ~np.isnan(expected)
        np.testing.assert_array_equal(bits(y[kept]), bits(expected[kept]), err_msg=function)
        # NaN of either sign and kind stays, and disturbs no other lane.
        lanes = np.full(64, 0.3, dtype)
        calm = call(libraries[isa], function, kind, lanes)
        for lane, bad in enumerate([*np.array([nan, -nan], dtype), signalling[0]] * 8):
            mixed = lanes.copy()
            mixed[lane] = bad
            y = call(libraries[isa], function, kind, mixed)
            assert np.isnan(y[lane]), f"{function} lost a NaN"
            np.testing.assert_array_equal(np.delete(y, lane), np.delete(calm, lane), err_msg=function)


@pytest.mark.parametrize("isa", COPIES)
def test_object_shares_no_symbol(libraries: dict[str, ctypes.CDLL], isa: str) -> None:
    """Two copies linked together must not share an inline function, and none calls libm."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm not found")
    compiled = Path(libraries[isa]._name).with_suffix(".o")
    symbols = subprocess.run([nm, str(compiled)], capture_output=True, text=True, check=True).stdout
    rows = [line.split()[-2:] for line in symbols.splitlines()]
    assert any(name == "exp_float32_pack" for _, name in rows)
    weak = [name for kind, name in rows if kind in "WVuwv" and f"9pyflowgen{len(isa)}{isa}" not in name]
    assert not weak, f"weak symbols outside the copy's namespace: {weak}"
    undefined = [name for kind, name in rows if kind == "U" and not name.startswith(("__stack_chk", "_GLOBAL_OFFSET"))]
    assert not undefined, f"calls out of the copy: {undefined}"


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
def test_compiles_for_cuda(standard: str, tmp_path: Path) -> None:
    if nvcc is None:
        pytest.skip("nvcc not found")
    command = [nvcc, "-arch=sm_90", f"-std={standard}", "-Werror", "all-warnings", "-Xptxas", "-v"]
    command += ["-I", str(ROOT / "csrc"), "-c", f"{PROBE}.cu", "-o", str(tmp_path / "probe.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 bytes spill stores, 0 bytes spill loads") == 2, done.stderr
