"""The battery every op passes: `op_tests(op)` gives the test functions, a test file takes them into its namespace.

An error is judged against the float64 reference and may be at most twice the error that the reference itself makes in
the tested dtype, and one rounding of the result: no tolerance is picked by hand.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import pyflowgen
from pyflowgen import _native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Sample:
    """Arguments of one call: float64 tensors, of which all that are floating point get gradients, and options."""

    name: str
    tensors: tuple[Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu", grad: bool = False) -> Sample:
        """Same values rounded to `dtype`, same strides; leaves that require gradients when asked."""
        tensors = []
        for t in self.tensors:
            base = t.detach().to(device)
            if t.is_floating_point():
                base = (
                    torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=device).copy_(base)
                    if _dense(t)
                    else _same_view(t, dtype, device)
                )
                base.requires_grad_(grad)
            tensors.append(base)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Sample(self.name, tuple(tensors), options)

    def nearby(self, draw: int, dtype: torch.dtype) -> Sample:
        """The sample itself (draw 0), or one some roundings of `dtype` away."""
        generator = torch.Generator().manual_seed(draw)

        def moved(t: Tensor) -> Tensor:
            base = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
            noise = torch.randn(base.shape, generator=generator, dtype=t.dtype)
            return (base * (1 + 2 * torch.finfo(dtype).eps * noise)).as_strided(t.shape, t.stride(), t.storage_offset())

        return replace(self, tensors=tuple(moved(t) if draw and t.is_floating_point() else t for t in self.tensors))


def _dense(t: Tensor) -> bool:
    return torch.empty_like(t).stride() == t.stride()


def _same_view(t: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A view with t's strides into memory of its own (slices, transposes, expanded tensors)."""
    storage = torch.empty(t.untyped_storage().nbytes() // t.element_size(), dtype=dtype, device=device)
    view = storage.as_strided(t.shape, t.stride(), t.storage_offset())
    torch.as_strided(storage, (storage.numel(),), (1,)).copy_(torch.as_strided(t, (storage.numel(),), (1,), 0))
    return view.detach()


@dataclass
class Op:
    """One op: its function and reference (same signature), samples, and the operator behind the function."""

    name: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[], list[Sample]]
    small: Callable[[], list[Sample]]  # for gradcheck
    operator: Callable[[Sample], tuple[Any, tuple[Any, ...]]]  # the torch.ops overload and its arguments
    resize: Callable[[int], Sample]  # the same call for several batch sizes, for dynamic shapes
    bad: list[tuple[str, Callable[[], Any], type[Exception], str]] = field(default_factory=list)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    # Roundings a gradient may err by besides, in float32 and float64: more than 1 where it is a sum over all of x that
    # the reference forms in another order, which of the two cancels better being luck.
    sum_roundings: int = 1
    # How much more the copy without a fused multiply-add may err: long chains round there twice as often.
    without_fma: int = 1
    draws: int = 1  # how many inputs, some roundings apart, the reference's own error is the largest of


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN: an element that a kernel forgets is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def run(function: Callable[..., Any], sample: Sample, grads: bool = True) -> tuple[list[Tensor], list[Tensor | None]]:
    """(outputs, gradients) of one call; the incoming gradients depend on shapes alone."""
    with poisoned():
        result = outputs(function(*sample.tensors, **sample.options))
        if not grads:
            return [r.detach() for r in result], []
        generator = torch.Generator().manual_seed(7)
        incoming = [
            torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype).to(r.device) for r in result
        ]
        inputs = [t for t in sample.tensors if t.requires_grad]
        pairs = [(r, g) for r, g in zip(result, incoming, strict=True) if r.requires_grad]
        got = torch.autograd.grad([r for r, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [r.detach() for r in result], list(got)


def assert_close(
    got: Tensor | None,
    truth: Tensor | None,
    plain: list[Tensor | None],
    exact: list[Tensor | None],
    what: str,
    slack: int = 1,
    factor: int = 1,
) -> None:
    """Error of `got` against `truth` at most twice the largest of `plain`, the reference's results, against `exact`, and
    `slack` roundings.

    Both errors in units of their dtype's rounding: for 64 bits the reference is judged in 32.
    """
    if truth is None:
        assert got is None or not got.count_nonzero(), f"{what}: expected no gradient"
        return
    assert got is not None, f"{what}: missing"
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert torch.equal(torch.isnan(got), torch.isnan(truth)), f"{what}: NaN where there is none, or none where there is"

    def errors(result: Tensor, truth: Tensor) -> tuple[float, float]:
        """(largest error over largest value, median relative error), in units of the result's rounding."""
        truth = truth.double()
        keep = torch.isfinite(truth) & (truth != 0)
        if not keep.any():
            return 0.0, 0.0
        off, size = (result.double() - truth).abs()[keep], truth.abs()[keep]
        rounding = torch.finfo(result.dtype).eps
        # Cancellation makes the relative error of single elements arbitrary, not that of their bulk.
        return (off.max() / size.max()).item() / rounding, (off / size).median().item() / rounding

    # Where the truth is in the tested dtype, it errs once more itself.
    times, roundings = (3, 2 * slack) if got.dtype == truth.dtype == torch.float64 else (2, slack)
    times *= factor
    plain_errors = [errors(p, e) for p, e in zip(plain, exact, strict=True) if p is not None and e is not None]
    assert plain_errors, f"{what}: missing"
    theirs = (max(e[i] for e in plain_errors) for i in (0, 1))
    for kind, mine, its in zip(("largest", "median relative"), errors(got, truth), theirs, strict=True):
        assert mine <= times * its + roundings, (
            f"{what}: {kind} error {mine:.3g}, the reference's {its:.3g} (in roundings)"
        )


def op_tests(op: Op) -> dict[str, Callable[..., None]]:
    """The battery for one op, as a dictionary of test functions."""
    names = [s.name for s in op.samples()]
    by_name = dict(zip(names, range(len(names)), strict=True))

    @pytest.mark.parametrize("dtype", op.dtypes, ids=lambda d: str(d)[6:])
    @pytest.mark.parametrize("name", names)
    def test_values_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
        sample = op.samples()[by_name[name]]
        mine = sample.to(dtype, device, grad=True)
        before = [t.detach().clone() for t in mine.tensors]
        got, got_grads = run(op.function, mine)
        assert all(torch.equal(b, t.detach()) for b, t in zip(before, mine.tensors, strict=True)), (
            "an input was changed"
        )
        # The float64 reference is the truth, so its own error in float64 is taken to be its error in float32, scaled.
        judged = torch.float32 if dtype == torch.float64 else dtype
        plain, exact = [], []
        for draw in range(op.draws):
            near = sample.nearby(draw, judged).to(judged, device, grad=True)
            plain.append(run(op.reference, near))
            exact.append(run(op.reference, near.to(torch.float64, device, grad=True)))
        truth, truth_grads = run(op.reference, mine.to(torch.float64, device, grad=True))
        for i in range(len(truth)):
            assert got[i].dtype == (torch.float64 if dtype == torch.float64 else plain[0][0][i].dtype)
            results = [p[0][i] for p in plain], [e[0][i] for e in exact]
            assert_close(got[i], truth[i], *results, f"{op.name} {name} output {i}")
        for i in range(len(truth_grads)):
            factor = op.without_fma if pyflowgen.build_info().get("instruction_set") == "baseline" else 1
            slack = op.sum_roundings if dtype in (torch.float32, torch.float64) else 1
            results = [p[1][i] for p in plain], [e[1][i] for e in exact]
            assert_close(got_grads[i], truth_grads[i], *results, f"{op.name} {name} gradient {i}", slack, factor)

    @pytest.mark.parametrize("name", [s.name for s in op.small()])
    def test_gradcheck(name: str, device: torch.device) -> None:
        sample = next(s for s in op.small() if s.name == name).to(torch.float64, device, grad=True)
        function = lambda *tensors: op.function(*tensors, **sample.options)  # noqa: E731
        assert torch.autograd.gradcheck(function, sample.tensors)
        assert torch.autograd.gradgradcheck(function, sample.tensors)

    @pytest.mark.parametrize("name", [s.name for s in op.small()])
    def test_opcheck(name: str, device: torch.device) -> None:
        overload, args = op.operator(next(s for s in op.small() if s.name == name).to(torch.float32, device))
        torch.library.opcheck(overload, args)

    def test_compile_dynamic(device: torch.device) -> None:
        torch.compiler.reset()
        options = op.resize(4).options
        compiled = torch.compile(lambda *tensors: op.function(*tensors, **options), fullgraph=True, dynamic=True)
        for batch in (5, 11):
            sample = op.resize(batch).to(torch.float32, device, grad=True)
            got, got_grads = run(lambda *tensors, **_: compiled(*tensors), sample)
            eager, eager_grads = run(op.function, op.resize(batch).to(torch.float32, device, grad=True))
            for a, b in zip([*got, *got_grads], [*eager, *eager_grads], strict=True):
                torch.testing.assert_close(a, b)

    def test_export(device: torch.device) -> None:
        sample = op.resize(4).to(torch.float32, device)

        class Module(torch.nn.Module):
            def forward(self, *tensors: Tensor) -> Any:
                return op.function(*tensors, **sample.options)

        program = torch.export.export(Module(), sample.tensors)
        got, want = outputs(program.module()(*sample.tensors)), outputs(op.function(*sample.tensors, **sample.options))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert any("pyflowgen" in str(node.target) for node in program.graph.nodes), (
            "the kernel is not in the exported graph"
        )

    def test_kernel_runs(device: torch.device) -> None:
        """The usual path is the kernel, not the reference."""
        assert _native.has_kernel(op.name, device.type.upper())
        sample = op.resize(4).to(torch.float32, device, grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            run(op.function, sample)
        seen = {event.key for event in profile.key_averages()}
        forward = {f"pyflowgen::{op.name}", f"pyflowgen::{op.name}_keep"}  # the latter keeps what the backward needs
        assert seen & forward and f"pyflowgen::{op.name}_backward" in seen
        with (
            pyflowgen.reference_path(),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        ):
            run(op.function, sample)
        assert not any(event.key.startswith("pyflowgen::") for event in profile.key_averages())

    def test_threads(device: torch.device) -> None:
        """One thread and two give the same bits."""
        if device.type != "cpu":
            pytest.skip("threads are the CPU's")
        threads = torch.get_num_threads()
        try:
            for sample in op.samples():
                results = []
                for n in (1, 2):
                    torch.set_num_threads(n)
                    got, grads = run(op.function, sample.to(torch.float32, grad=True))
                    results.append([*got, *(g for g in grads if g is not None)])
                assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), sample.name
        finally:
            torch.set_num_threads(threads)

    def test_func_transforms(device: torch.device) -> None:
        """torch.func sees the reference: vmap, jacobians and forward mode agree with it."""
        sample = op.resize(3).to(torch.float64, device)
        first, rest = sample.tensors[0], sample.tensors[1:]
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            got = transform(lambda x: outputs(op.function(x, *rest, **sample.options))[0])(first)
            want = transform(lambda x: outputs(op.reference(x, *rest, **sample.options))[0])(first)
            torch.testing.assert_close(got, want)
        tangent = torch.ones_like(first)
        got = torch.func.jvp(lambda x: outputs(op.function(x, *rest, **sample.options))[0], (first,), (tangent,))
        want = torch.func.jvp(lambda x: outputs(op.reference(x, *rest, **sample.options))[0], (first,), (tangent,))
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("what", [b[0] for b in op.bad])
    def test_bad_input(what: str) -> None:
        _, call, kind, message = next(b for b in op.bad if b[0] == what)
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value), "one line"

    @pytest.mark.parametrize("capability", ["default", "avx2"])
    def test_lesser_instruction_sets(capability: str, device: torch.device) -> None:
        """The copies that this machine would not choose, in a process of their own."""
        if device.type != "cpu" or os.environ.get("ATEN_CPU_CAPABILITY"):
            pytest.skip("the copies are the CPU's, and this is one of them already")
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        script = "import pyflowgen; print(pyflowgen.build_info()['instruction_set'])"
        chosen = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()
        assert chosen == ("baseline" if capability == "default" else "avx2")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"{os.path.dirname(__file__)}/test_{op.name}.py", "-k", "values or threads"],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]

    return {name: value for name, value in locals().items() if name.startswith("test_")}
