"""Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for NVIDIA and AMD."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from pyflowgen.kernels import affine_coupling as kernels  # noqa: E402
from pyflowgen.kernels import gru as gru_kernels  # noqa: E402
from pyflowgen.kernels import invertible_linear as linear_kernels  # noqa: E402
from pyflowgen.kernels import lstm as lstm_kernels  # noqa: E402
from pyflowgen.kernels import mlp_coupling as mlp_kernels  # noqa: E402
from pyflowgen.kernels import polynomial_spline as polynomial_kernels  # noqa: E402
from pyflowgen.kernels import rational_quadratic_spline as spline_kernels  # noqa: E402
from pyflowgen.kernels import slogdet as slogdet_kernels  # noqa: E402
from pyflowgen.kernels import tile  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from pyflowgen import _native  # noqa: E402

HERE = Path(__file__).parent
TARGETS = [
    GPUTarget("cuda", 80, 32),
    GPUTarget("cuda", 90, 32),
    GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
]


# -------------------------------------------------------------------------------------------------- interpreter
def interpret(*command: str, **environment: str) -> str:
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYFLOWGEN_QUIET": "1", **environment}
    done = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True, cwd=HERE)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("files", ["triton_interpreter.py", "triton_interpreter_*.py"])
def test_interpreter(files: str) -> None:
    found = [str(path) for path in sorted(HERE.glob(files))]
    out = interpret("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *found)
    assert int(re.findall(r"(\d+) passed", out)[-1]) > 100


def test_launchers_without_the_compiled_library() -> None:
    """The operators' schemas then come from the launchers, and the launchers run."""
    out = interpret("-c", WITHOUT_LIBRARY, PYFLOWGEN_LIBRARY="/nonexistent/libpyflowgen.so")
    assert out.split() == ["forward_kernel", "backward_kernel", "True"]


WITHOUT_LIBRARY = """
import torch, pyflowgen
from pyflowgen.kernels import tile
run = tile.Launch.run
tile.Launch.run = lambda self, device: (print(self.kernel.__name__), run(self, device))
x, params = torch.randn(3, 4, requires_grad=True), torch.randn(3, 8, requires_grad=True)
y, logdet = pyflowgen.affine_coupling(x, params, layout="halves", scale="tanh")
got = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
y, logdet = pyflowgen.affine_coupling_reference(x, params, layout="halves", scale="tanh")
want = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
print(all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(got, want)))
"""


MODULES = {
    "affine_coupling": kernels,
    "invertible_linear": linear_kernels, "mlp_coupling": mlp_kernels, "polynomial_spline": polynomial_kernels,
    "rational_quadratic_spline": spline_kernels, "slogdet": slogdet_kernels,
}  # fmt: skip


@pytest.mark.parametrize("op", [name for op in MODULES for name in (op, f"{op}_backward")])
def test_launcher_schema(op: str) -> None:
    if _native._missing:
        pytest.skip("no compiled library to compare with")
    schema = getattr(torch.ops.pyflowgen, op).default._schema
    launcher = getattr(MODULES[op.removesuffix("_backward")], op)
    assert f"pyflowgen::{op}{_native.launcher_schema(launcher)}" == str(schema)


# ------------------------------------------------------------------------------------------------ ahead of time
def compiled(launch: tile.Launch, target: Any) -> Any:
    """What a launch would compile on a device of `target`: same signature, specialised values and options."""
    backend, kernel = make_backend(target), launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, options, arguments, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


def resources(binary: Any, tmp_path: Path) -> tuple[int, int, int]:
    """(registers, bytes of stack and local memory, scalar registers parked in vector lanes)."""
    if "cubin" in binary.asm:
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
        return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"]), 0
    found = dict(re.findall(r"\.(\w+):\s*(\d+)\n", binary.asm["amdgcn"]))
    memory = int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"])
    return int(found["vgpr_count"]), memory, int(found["sgpr_spill_count"])


def case(
    shape: tuple[int, ...], dtype: torch.dtype, layout: int, scale: int, *, event_dim: int = 1,
    part: tuple[int, int] = (0, 1), inverse: bool = False, shift_first: bool = False, mask: bool = False,
    last: bool = False, dy: bool = True, dlogdet: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """Calls both launchers on tensors of this kind."""

    def call() -> None:
        x, dim = torch.empty(shape, dtype=dtype), len(shape) - event_dim
        if last:
            x = x.to(memory_format=torch.channels_last)
        count = list(shape)
        if part != (0, 1):
            count[dim] //= 2
        if layout in (1, 2):
            count[dim] *= 2
        params = x.new_empty([*count, 2] if layout == 3 else count)
        log_scale = params.clone() if layout == 0 and scale else None
        masked = torch.ones(shape[dim:], dtype=torch.bool) if mask else None
        options = (x, params, log_scale, masked, layout, *part, scale, 2.0, 1.0, shift_first, inverse, event_dim)
        y, logdet = kernels.affine_coupling(*options)
        kernels.affine_coupling_backward(y if dy else None, logdet if dlogdet else None, *options)

    return call


def slogdet_case(batch: int, n: int, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        a = torch.empty(batch, n, n, dtype=dtype)
        slogdet_kernels.slogdet_backward(slogdet_kernels.slogdet(a)[1], a)

    return call


def spline_case(
    shape: tuple[int, ...], bins: int, dtype: torch.dtype, layout: int, convention: int, tails: int, *,
    inverse: bool = False, event_dim: int = 1, part: tuple[int, int] = (0, 1), mask: bool = False,
) -> Callable[[], None]:  # fmt: skip
    def call() -> None:
        x, dim, each = torch.empty(shape, dtype=dtype), len(shape) - event_dim, 3 * bins + (1, -1, 0, 1)[tails]
        count = list(shape)
        count[dim] = count[dim] // 2 if part != (0, 1) else count[dim]
        circular = torch.ones(count[dim:], dtype=torch.bool) if tails == 3 else None
        if layout == 2:
            count[dim] *= each
        params = [x.new_empty(count if layout == 2 else [*count, each]), None, None]
        if layout == 0:
            params = [x.new_empty(*count, n) for n in (bins, bins, each - 2 * bins)]
        masked = torch.ones(shape[dim:], dtype=torch.bool) if mask else None
        numbers = (-3.0, 3.0, -3.0, 3.0, 1e-3, 1e-3, 1e-3, 0.54, 6.9 if convention == 1 else 0.0, 1.0)
        options = (
            x, *params, None, circular, masked, bins, layout, *part, convention, tails, *numbers, inverse, event_dim
        )  # fmt: skip
        spline_kernels.rational_quadratic_spline_backward(*spline_kernels.rational_quadratic_spline(*options), *options)

    return call


def polynomial_case(
    shape: tuple[int, ...], bins: int, dtype: torch.dtype, degree: int, tails: int, *, inverse: bool = False,
    event_dim: int = 1, part: tuple[int, int] = (0, 1), mask: bool = False, last: bool = False,
) -> Callable[[], None]:  # fmt: skip
    def call() -> None:
        x, dim = torch.empty(shape, dtype=dtype), len(shape) - event_dim
        each = bins if degree == 1 else 2 * bins + (2 if degree == 3 else -1 if tails else 1)
        count = list(shape)
        count[dim] = (count[dim] // 2 if part != (0, 1) else count[dim]) * (1 if last else each)
        params = x.new_empty([*count, each] if last else count)
        masked = torch.ones(shape[dim:], dtype=torch.bool) if mask else None
        numbers = (-3.0, 3.0, -3.0, 3.0, *([0.0, 0.0] if degree == 1 else [1e-3, 1e-3]), 1.0)
        options = (
            x, params, None, masked, degree, bins, 0 if last else 1, *part, tails, *numbers, inverse, event_dim,
        )  # fmt: skip
        polynomial_kernels.polynomial_spline_backward(*polynomial_kernels.polynomial_spline(*options), *options)

    return call


def mlp_case(
    rows: int, channels: int, hidden: list[int], *, activation: int = 1, blocks: int = 0, bins: int = 0,
    context: int = 0, gated: bool = False, mask: bool = False, inverse: bool = False,
) -> Callable[[], None]:  # fmt: skip
    def call() -> None:
        same = channels if mask else channels // 2
        count = channels if mask else channels - same
        sizes = [same + context, *hidden, count * (3 * bins - 1 if bins else 2)]
        x = torch.empty(rows, channels)
        weights = [x.new_empty(b, a) for a, b in itertools.pairwise(sizes)]
        if gated:
            for i in range(blocks):
                weights.insert(3 + 3 * i, x.new_empty(hidden[0], context))
        biases = [x.new_empty(len(w) if i else 0) for i, w in enumerate(weights)]
        tensors = (
            x, x.new_empty(rows, context) if context else None, weights, biases,
            [torch.ones(channels, dtype=torch.bool) if mask else x.new_empty(0)], [], [], [],
        )  # fmt: skip
        options = [
            len(weights), activation, 0, 1, 0 if mask else same, 1, 0 if bins else 2, 0, inverse, 1, 0, 0, 0, bins, 0, 1,
            blocks,
        ]  # fmt: skip
        numbers = [2.0, -3.0, 3.0, -3.0, 3.0, 1e-3, 1e-3, 1e-3, 0.54, 0.0, 1.0]
        y, logdet, saved = mlp_kernels.mlp_coupling(*tensors, options, numbers, True)
        mlp_kernels.mlp_coupling_backward(y, logdet, *tensors, saved, options, numbers, True, True)

    return call


def gates_case(op: str, dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        state = torch.empty(64, 128, dtype=dtype)
        if op == "lstm":
            a = torch.empty(64, 512, dtype=dtype)
            lstm_kernels.lstm_gates_backward(*[state] * 4, lstm_kernels.lstm_gates(a, a, state)[2])
        else:
            a = torch.empty(64, 384, dtype=dtype)
            gru_kernels.gru_gates_backward(state, a, state, gru_kernels.gru_gates(a, a, state)[1])

    return call


CASES = {
    "lstm gates": gates_case("lstm", torch.float32),
    "gru gates": gates_case("gru", torch.float64),
    "slogdet, 2": slogdet_case(8192, 2, torch.float32),
    "slogdet, 8": slogdet_case(8192, 8, torch.bfloat16),
    "slogdet, 24": slogdet_case(512, 24, torch.float64),
    "slogdet, 64": slogdet_case(128, 64, torch.float32),
    "additive": case((8192, 64), torch.float32, 0, 0),
    "exp, image halves": case((8, 12, 16, 16), torch.float32, 1, 1, event_dim=3, part=(6, 1)),
    "tanh, long rows": case((2, 9000), torch.float32, 0, 2, inverse=True),
    "sigmoid, pairs": case((1024, 6), torch.float16, 3, 3, inverse=True, shift_first=True),
    "sigmoid_eps, elementwise": case((64, 64), torch.float32, 0, 4, event_dim=0, dlogdet=False),
    "softclip, masked channels last": case((8, 6, 8, 8), torch.bfloat16, 1, 5, event_dim=3, mask=True, last=True),
    "atan, interleaved": case((8192, 64), torch.float64, 2, 6, part=(0, 2), inverse=True, shift_first=True),
    "softplus, halves": case((1024, 64), torch.float64, 1, 7, shift_first=True, dy=False),
}


# A block of elements by bins is held twice over: two programs on a multiprocessor, and in float64 the same.
SPLINES = [
    *((spline_case((8192, 64), 8, torch.float32, 2, 0, 1, part=(32, 1)), target) for target in TARGETS[::2]),
    (spline_case((8, 6, 8, 8), 5, torch.bfloat16, 2, 1, 2, inverse=True, event_dim=3, mask=True), TARGETS[3]),
    (spline_case((8192, 6), 17, torch.float64, 0, 2, 3, inverse=True), TARGETS[1]),
    (polynomial_case((8192, 64), 8, torch.float32, 3, 1, part=(32, 1)), TARGETS[0]),
    (polynomial_case((8192, 6), 8, torch.float32, 3, 1, inverse=True, last=True), TARGETS[3]),
    (polynomial_case((8, 6, 8, 8), 5, torch.bfloat16, 2, 1, event_dim=3, mask=True), TARGETS[3]),
    (polynomial_case((8192, 6), 17, torch.float64, 2, 0, inverse=True), TARGETS[1]),
    (polynomial_case((8192, 64), 8, torch.float32, 2, 1, last=True), TARGETS[2]),
    (polynomial_case((8192, 64), 33, torch.float16, 1, 1, inverse=True), TARGETS[2]),
]


def linear_case(
    shape: tuple[int, ...], dtype: torch.dtype, *, head: int = 0, inverse: bool = False, event_dim: int = 3
) -> Callable[[], None]:
    def call() -> None:
        x, channels = torch.empty(shape, dtype=dtype), shape[len(shape) - event_dim]
        parameters = [torch.eye(channels, dtype=dtype), *(x.new_zeros(channels) for _ in "ts")]
        parameters += [torch.arange(channels), x.new_ones(channels)]
        y, logdet, part = linear_kernels.invertible_linear(x, *parameters, head, inverse, event_dim)
        linear_kernels.invertible_linear_backward(y, logdet, part if head else None, x, *parameters, inverse, event_dim)

    return call


LINEAR = [
    (linear_case((16, 12, 16, 16), torch.float32, head=6), TARGETS[2]),
    (linear_case((16, 12, 16, 16), torch.float32, inverse=True), TARGETS[1]),
    (linear_case((16, 64, 8, 8), torch.bfloat16), TARGETS[0]),
    (linear_case((16, 64, 8, 8), torch.bfloat16, inverse=True), TARGETS[3]),
    (linear_case((4096, 33), torch.float64, inverse=True, event_dim=1), TARGETS[1]),
]
COUPLINGS = [
    (mlp_case(1024, 64, [64, 64, 64], blocks=1), TARGETS[2]),
    (mlp_case(16384, 7, [33], activation=3, context=5, mask=True, inverse=True), TARGETS[3]),
    (mlp_case(1024, 64, [64], bins=8), TARGETS[1]),
    (mlp_case(1024, 64, [64, 64, 64], activation=6, blocks=1, context=5, gated=True), TARGETS[0]),
    (mlp_case(1024, 64, [64, 64, 64], activation=6, blocks=1, context=5, gated=True), TARGETS[3]),
]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tile.Launch]]:
    """Launches are written down, not run."""
    launches: list[tile.Launch] = []
    monkeypatch.setattr(tile.Launch, "run", lambda self, device: launches.append(self))
    yield launches


@pytest.mark.skipif(_native._INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.backend}-{t.arch}")
@pytest.mark.parametrize("name", CASES)
def test_ahead_of_time(name: str, target: Any, recorded: list[tile.Launch], tmp_path: Path) -> None:
    CASES[name]()
    assert [launch.kernel.__name__ for launch in recorded] == ["forward_kernel", "backward_kernel"]
    double = recorded[0].arguments[0].dtype == torch.float64
    for launch in recorded:
        registers, memory, parked = resources(compiled(launch, target), tmp_path)
        assert memory == 0, f"{launch.kernel.__name__} spills {memory} bytes"
        # gfx942 keeps the many double constants of atan in scalar registers; those it parks never reach memory.
        assert parked <= (8 if double else 0)
        assert registers <= 168  # three programs on a multiprocessor of 65,536 registers


@pytest.mark.skipif(_native._INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("case", range(len(SPLINES)))
def test_splines_ahead_of_time(case: int, recorded: list[tile.Launch], tmp_path: Path) -> None:
    call, target = SPLINES[case]
    call()
    assert [launch.kernel.__name__ for launch in recorded] == ["forward_kernel", "backward_kernel"]
    for launch in recorded:
        registers, memory, parked = resources(compiled(launch, target), tmp_path)
        assert memory == 0 and parked <= 32 and registers <= 255


@pytest.mark.skipif(_native._INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("case", range(len(COUPLINGS)))
def test_couplings_ahead_of_time(case: int, recorded: list[tile.Launch], tmp_path: Path) -> None:
    call, target = COUPLINGS[case]
    call()
    assert [x.kernel.__name__ for x in recorded] == ["forward_kernel", "backward_kernel", "weight_kernel"]
    for launch in recorded:
        binary = compiled(launch, target)
        registers, memory, parked = resources(binary, tmp_path)
        assert memory == 0 and parked <= 32 and registers <= 255
        assert binary.metadata.shared <= 32 << 10  # several programs on a multiprocessor


@pytest.mark.skipif(_native._INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("case", range(len(LINEAR)))
def test_linear_maps_ahead_of_time(case: int, recorded: list[tile.Launch], tmp_path: Path) -> None:
    call, target = LINEAR[case]
    call()
    assert len(recorded) == 2
    for launch in recorded:
        registers, memory, parked = resources(compiled(launch, target), tmp_path)
        assert memory == 0 and parked == 0 and registers <= 255


@pytest.mark.skipif(_native._INTERPRET, reason="the interpreter has no compiler")
def test_ahead_of_time_with_64_bit_offsets(
    recorded: list[tile.Launch], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tile, "wide", lambda *_: True)
    CASES["tanh, long rows"]()
    for launch in recorded:
        binary = compiled(launch, TARGETS[1])
        assert resources(binary, tmp_path)[1] == 0
        assert "arith.extsi" in binary.asm["ttir"]
