"""Timing core: cases, gate, measurement of one provider in one process, and the keyed rows.

How to write a ``benchmarks/bench_<op>.py``
-------------------------------------------
Define ``cases(device: torch.device) -> list[Case]``; nothing about timing belongs there. ::

    from .harness import Case, normal          # `normal(*shape)`: inputs drawn once, seeded

    def cases(device):
        def eager(device, dtype):        # a factory: called once, before the timing, in the worker process
            return linear_reference      # what is timed: takes the case's inputs, returns a Tensor or a tuple
        return [Case(op="linear", shape="1024x128 -> 128", dtype=torch.float32,
                     inputs=normal((1024, 128), (128, 128), (128,)),
                     providers={"eager": eager, "pyflowgen": lambda device, dtype: linear},
                     modes=("forward", "forward+backward"),
                     flops={"forward": 2 * 1024 * 128 * 128, "forward+backward": 6 * 1024 * 128 * 128},
                     quick=True)]

* ``providers["eager"]`` is the reference. Every provider of a case computes the same function of the same inputs (a
  peer with its own convention gets a case of its own, in which the reference follows that convention). Leave a peer
  out when it is not installed.
* A factory may return an ``nn.Module``: its parameters then get gradients too, and mode "step" becomes possible.
* ``torch.compile`` of each provider named in ``compile`` is added by the harness ("compiled", "nflows compiled",
  ...). A provider that compiles something itself, as the body of a loop that would not compile whole, has a name that
  ends in " compiled".
* Gate: outputs (and gradients, where a mode has a backward) of each provider are compared with the float64 run of the
  provider that ``truth`` names (default "eager"); pyflowgen's error may be twice that provider's own error in the
  tested dtype, plus 4 eps; a rival gets 1e-5 more. A provider that fails is not timed; its row says "wrong".

How a row is measured
---------------------
Each (setting, group of providers) has a worker process; ``run.py`` visits all providers in turn, many
rounds, so noise hits all of them alike. A visit runs two untimed calls (caches warm: rows are cache-warm figures; one
where it takes 5 ms, and where it takes half a second only at the first visit), then samples of as many calls as fill
half a millisecond. Rows give the median, p20 and p80 of the samples of all
rounds.

Modes: "forward" under ``no_grad``; "forward+backward" with ``torch.autograd.grad`` to all differentiable inputs and
parameters; "backward" times the second half only, each call after an untimed forward of its own; "inverse" and
"sample" are timed as "forward" (a case of their own); "step" is ``zero_grad``, forward, ``backward()`` of a scalar,
``Adam.step()``.

Peak memory is what torch's allocator hands out: the trace of allocations and releases of one call (torch.profiler's
memory events, exact to the byte and independent of malloc's settings), its highest running sum, plus the inputs,
parameters and output gradients that live through the call. On CUDA it is ``max_memory_allocated``. ``least_mib`` is
what inputs, outputs and gradients alone take.

Floor: a kernel has to read its inputs and write its outputs once; ``floor_ms`` is the time torch's copy takes to move
as many bytes on this machine (measured once a run, over sizes, so that a set that fits a cache is compared with the
speed of that cache), or the time of its flops at the best GEMM rate torch reaches here, whichever is longer. Inner
temporaries are not in it."""

from __future__ import annotations

import copy
import csv
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Factory = Callable[[torch.device, torch.dtype], Callable[..., Any]]
Inputs = Callable[[torch.device, torch.dtype], tuple[Tensor, ...]]

KEY = ("op", "provider", "mode", "dtype", "shape", "threads", "setting", "machine")
FIELDS = (
    *KEY,
    "status",
    "median_ms",
    "p20_ms",
    "p80_ms",
    "peak_mib",
    "least_mib",
    "floor_ms",
    "torch",
    "commit",
    "date",
)
MODES = ("forward", "backward", "forward+backward", "inverse", "sample", "step")
BACKWARD = ("backward", "forward+backward", "step")
# Environments of the worker processes. no-mmap: page faults of temporaries alone cost eager code 1.1-2.1x, and a
# kernel's win must not be an allocator's. avx2: a processor without AVX-512, for torch, its libraries and the kernels.
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "no-mmap": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"},
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
    },
}


@dataclass(frozen=True)
class Case:
    """One function at one shape and dtype, and every provider of it (see the module's docstring)."""

    op: str
    shape: str  # the row's label: sizes first, then what is special ("8192x64 exp halves")
    dtype: torch.dtype
    inputs: Inputs
    providers: Mapping[str, Factory]
    modes: tuple[str, ...] = ("forward", "forward+backward")
    grad: tuple[int, ...] | None = None  # which inputs get gradients; None: all that are floating point
    compile: tuple[str, ...] = ("eager",)  # providers also timed under torch.compile
    truth: Mapping[str, str] = field(default_factory=dict)  # provider -> the one whose float64 run it must agree with
    bytes: Mapping[str, float] = field(
        default_factory=dict
    )  # mode -> least traffic; default: inputs, outputs, gradients once
    flops: Mapping[str, float] = field(default_factory=dict)  # mode -> operations of the matrix products
    slack: float = 0.0  # relative error that our method itself costs (values rebuilt by an inverse), beyond the gate's
    settings: tuple[str, ...] = tuple(SETTINGS)  # those of the run's that this case is timed under
    quick: bool = False  # in the --quick set

    def __post_init__(self) -> None:
        if "eager" not in self.providers:
            raise ValueError(f"case {self.op} {self.shape}: needs the provider 'eager', got {sorted(self.providers)}")
        if unknown := set(self.modes) - set(MODES):
            raise ValueError(f"case {self.op} {self.shape}: unknown modes {sorted(unknown)}, expected some of {MODES}")

    def timed_modes(self, quick: bool = False) -> list[str]:
        """The quick set leaves out the backward alone where forward+backward is timed anyway."""
        return [m for m in self.modes if not (quick and m == "backward" and "forward+backward" in self.modes)]

    def contestants(self, quick: bool = False) -> list[str]:
        """Names of the rows: every provider, then the compiled ones (in the quick set the compiled reference only)."""
        named = [name for name in self.compile if name in self.providers and (name == "eager" or not quick)]
        given = [name for name in self.providers if not (quick and split_compiled(name)[1])]
        return [*given, *("compiled" if name == "eager" else f"{name} compiled" for name in named)]


def split_compiled(name: str) -> tuple[str, bool]:
    """``"nflows compiled"`` -> ``("nflows", True)``; the compiled reference is just ``"compiled"``."""
    if name == "compiled":
        return "eager", True
    return (name.removesuffix(" compiled"), True) if name.endswith(" compiled") else (name, False)


def normal(*shapes: Sequence[int], scale: float | Sequence[float] = 1.0) -> Inputs:
    """Inputs drawn once from a normal distribution, the same for every provider and process."""
    scales = [scale] * len(shapes) if isinstance(scale, (int, float)) else list(scale)

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(*shape, generator=generator) * s for shape, s in zip(shapes, scales, strict=True))
        return tuple(t.to(device, dtype) for t in drawn)

    return make


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# ---------------------------------------------------------------- one provider in this process


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if isinstance(t, Tensor))


def _storage_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct elements, so that an expanded or twice listed tensor counts once."""
    seen: dict[int, int] = {}
    for t in tensors:
        if t is not None:
            used = t.element_size() * min(t.numel(), t.untyped_storage().nbytes() // t.element_size())
            seen[t.data_ptr()] = max(used, seen.get(t.data_ptr(), 0))
    return sum(seen.values())


def _double(t: Tensor) -> Tensor:
    return t.detach().double() if t.is_floating_point() else t.detach()


class Contest:
    """A case made concrete in this process: inputs, the providers prepared so far, and their calls."""

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        if "torch._dynamo" in sys.modules:  # (its import costs seconds: not for cases that compile nothing)
            # Every case compiles afresh: with many shapes in one process the recompile limit would quietly mean eager.
            torch._dynamo.reset()
        self.inputs = case.inputs(device, case.dtype)
        self.fns: dict[str, Callable[..., Any]] = {}
        self.errors: dict[tuple[str, str], list[float]] = {}
        self.truths: dict[str, tuple[list[Tensor], list[Tensor | None]]] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.long: set[tuple[str, str]] = set()

    def _make(self, provider: str) -> Callable[..., Any]:
        torch.manual_seed(0)
        fn = self.case.providers[provider](self.device, self.case.dtype)
        return fn.to(self.device, self.case.dtype) if isinstance(fn, nn.Module) else fn

    def _leaves(self, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs as leaves, and everything a gradient is asked for (those inputs, then the parameters)."""
        wanted = range(len(inputs)) if self.case.grad is None else self.case.grad
        args = [t.detach().requires_grad_(i in wanted and t.is_floating_point()) for i, t in enumerate(inputs)]
        params = [p for p in fn.parameters() if p.requires_grad] if isinstance(fn, nn.Module) else []
        return args, [t for t in args if t.requires_grad] + params

    def _cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        drawn = (torch.randn(t.shape, generator=generator) if t.dim() else torch.ones(()) for t in outputs)
        return [d.to(t.device, t.dtype) for d, t in zip(drawn, outputs, strict=True)]

    def _values(self, fn: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor | None]]:
        args, wanted = self._leaves(fn, inputs)
        if not any(mode in BACKWARD for mode in self.case.modes):
            with torch.no_grad():
                return [t.detach() for t in _outputs(fn(*args))], []
        outputs = _outputs(fn(*args))
        differentiable = [t for t in outputs if t.requires_grad]
        grads = torch.autograd.grad(differentiable, wanted, self._cotangents(differentiable), allow_unused=True)
        return [t.detach() for t in outputs], list(grads)

    def _errors(self, provider: str, fn: Callable[..., Any]) -> list[float]:
        """Largest error of each output and gradient against the float64 truth, over that tensor's largest entry."""
        name = self.case.truth.get(split_compiled(provider)[0], "eager")
        if name not in self.truths:
            exact = self._make(name)
            exact = (
                copy.deepcopy(exact).double()
                if isinstance(exact, nn.Module)
                else self.case.providers[name](self.device, torch.float64)
            )
            self.truths[name] = self._values(exact, [_double(t) for t in self.inputs])
        outs, grads = self._values(fn, self.inputs)
        true_outs, true_grads = self.truths[name]
        if len(outs) != len(true_outs):
            raise ValueError(f"{provider} returns {len(outs)} tensors, the reference {len(true_outs)}")
        if len(grads) != len(
            true_grads
        ):  # another parametrisation of the same function: the inputs' gradients still compare
            shared = len([t for t in self._leaves(fn, self.inputs)[0] if t.requires_grad])
            grads, true_grads = grads[:shared], true_grads[:shared]
        errors = []
        for got, true in zip([*outs, *grads], [*true_outs, *true_grads], strict=True):
            if (got is None or true is None) or not true.is_floating_point():
                continue
            if got.shape != true.shape:
                raise ValueError(f"{provider} returns shape {tuple(got.shape)}, the reference {tuple(true.shape)}")
            if got.numel():
                error = ((got.double() - true).abs().max() / true.abs().max().clamp_min(1e-30)).item()
                errors.append(error if math.isfinite(error) else math.inf)
        return errors

    def prepare(self, name: str) -> str:
        """Build a provider, compile it if asked, and hold it against the truth. Returns "ok" or why it is not timed."""
        provider, compiled = (name, False) if name in self.case.providers else split_compiled(name)
        fn = self._make(provider)
        if compiled:
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            fn = torch.compile(fn, dynamic=False)
        baseline = self.case.truth.get(provider, "eager")
        if (baseline, baseline) not in self.errors:
            self.errors[baseline, baseline] = self._errors(baseline, self._make(baseline))
        # A rival that adds up in another order is still a rival: only we are held to the reference's own error.
        # In float64 the truth rounds as well, and eager, being the truth, seems not to err.
        roundings = 16 if self.case.dtype == torch.float64 else 4
        tiny = roundings * torch.finfo(self.case.dtype).eps + (self.case.slack if provider == "pyflowgen" else 1e-5)
        allowed = [2 * e + tiny for e in self.errors[baseline, baseline]]
        errors = self._errors(name, fn)
        for i, (error, bound) in enumerate(zip(errors, allowed[: len(errors)], strict=True)):
            if not error <= bound:
                return f"wrong: tensor {i} is off by {error:.1e}, allowed {bound:.1e}"
        self.fns[name] = fn
        return "ok"

    def call(self, name: str, mode: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        """``(before, timed)`` to run as ``timed(before())``; ``before`` is untimed and only "backward" needs it."""
        fn = self.fns[name]
        args, wanted = self._leaves(fn, self.inputs)
        if mode in ("forward", "inverse", "sample"):

            def forward(_: Any) -> Any:
                with torch.no_grad():
                    return fn(*args)

            return _nothing, forward
        if mode == "step":
            if (
                name not in self.optimizers
            ):  # a tiny rate: the work is the same, the weights stay where the gate saw them
                self.optimizers[name] = torch.optim.Adam(fn.parameters(), lr=1e-8)  # type: ignore[attr-defined]
            optimizer = self.optimizers[name]

            def step(_: Any) -> None:
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(_outputs(fn(*args))[:1])
                optimizer.step()

            return _nothing, step

        def outputs() -> list[Tensor]:
            return [t for t in _outputs(fn(*args)) if t.requires_grad]

        cotangents = self._cotangents(outputs())

        def backward(outs: list[Tensor]) -> Any:
            return torch.autograd.grad(outs, wanted, cotangents, allow_unused=True)

        if mode == "backward":
            return outputs, backward

        def both(_: Any) -> Any:
            outs = outputs()
            return outs, torch.autograd.grad(outs, wanted, cotangents, allow_unused=True)

        return _nothing, both

    def sizes(self, name: str, mode: str) -> tuple[int, int]:
        """Bytes a call must move, and bytes that must live in it: inputs, outputs, with a backward their gradients."""
        fn = self.fns[name]
        args, wanted = self._leaves(fn, self.inputs)
        with torch.no_grad():
            outs = _outputs(fn(*args))
        read = _storage_bytes([*args, *(fn.parameters() if isinstance(fn, nn.Module) else ())])
        written, grads = _storage_bytes(outs), sum(t.numel() * t.element_size() for t in wanted)
        if mode not in BACKWARD:
            return read + written, read + written
        backward = read + written + grads  # the inputs again, the outputs' gradients, and the gradients written
        alive = read + 2 * written + grads
        return (backward if mode == "backward" else backward + read + written), alive

    def peak(self, name: str, mode: str) -> float:
        """Peak memory of one call in bytes (see the module's docstring)."""
        before, timed = self.call(name, mode)
        timed(before())
        fn = self.fns[name]
        alive = _storage_bytes([*self.inputs, *(fn.parameters() if isinstance(fn, nn.Module) else ())])
        if mode in BACKWARD:
            alive += _storage_bytes(_outputs(fn(*self.inputs)))  # the outputs' gradients, held by the caller
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            timed(before())
            torch.cuda.synchronize()
            return alive + torch.cuda.max_memory_allocated() - start
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            result = timed(before())
        events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
        del result
        running = highest = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            running += event.nbytes()
            highest = max(highest, running)
        return alive + highest

    def visit(self, name: str, mode: str, seconds: float, calls: int | None = None) -> tuple[list[float], int]:
        """Samples in ms of one call, taken for about ``seconds``; the first visit finds the ``calls`` of a sample."""
        before, timed = self.call(name, mode)
        single = before is not _nothing
        cuda = self.device.type == "cuda"
        event: Callable[[], Any] = functools.partial(torch.cuda.Event, enable_timing=True)
        for _ in range(0 if (name, mode) in self.long else 2):
            start = time.perf_counter()
            timed(before())
            took = time.perf_counter() - start
            if took > 0.5:  # as long as that, a call fills the caches by itself: untimed at the first visit alone
                self.long.add((name, mode))
            if took > 5e-3:  # and as long as that, one call does for the next
                break
        if cuda:
            torch.cuda.synchronize()

        def sample(n: int) -> float:
            if single or not cuda:
                total = 0
                for _ in range(n if single else 1):
                    held = before()
                    start = time.perf_counter_ns()
                    if single:
                        timed(held)
                    else:
                        for _ in range(n):
                            timed(None)
                    total += time.perf_counter_ns() - start
                return total / n / 1e6
            begin, end = event(), event()
            begin.record()
            for _ in range(n):
                timed(None)
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / n

        def sample_cuda_single(n: int) -> float:
            # Events around the backward alone, after its forward is done: its kernels and the gaps between launches.
            pairs = []
            for _ in range(n):
                held = before()
                torch.cuda.synchronize()
                pair = event(), event()
                pair[0].record()
                timed(held)
                pair[1].record()
                pairs.append(pair)
            torch.cuda.synchronize()
            return sum(a.elapsed_time(b) for a, b in pairs) / n

        take = sample_cuda_single if cuda and single else sample
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            if calls is None:
                calls = max(1, min(10000, math.ceil(0.5 / max(take(1), 1e-4))))
            samples: list[float] = []
            stop = time.perf_counter() + seconds
            while not samples or time.perf_counter() < stop:
                samples.append(take(calls))
        finally:
            if was_enabled:
                gc.enable()
        return samples, calls


def _nothing() -> None:
    return None


# ---------------------------------------------------------------- the machine


def machine(device: torch.device) -> str:
    """CPU model, number of cores this process may use, and the GPU where it is the device."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    cpu = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts:  # cloud machines often hide the model's name, not its family
        cpu += f" (family {facts['cpu family']} model {facts.get('model', '?')})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{cpu}, {cores} cores{gpu}"


def _best_time(run: Callable[[], Any], device: torch.device, seconds: float = 0.02) -> float:
    """Fast quantile (p20) of the seconds of one call: a rate to be compared against should not carry the noise."""
    for _ in range(3):
        run()
    samples: list[float] = []
    stop = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < stop:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return sorted(samples)[len(samples) // 5]


def rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict[str, Any]:
    """``copy``: (bytes moved, seconds) of torch's copy over sizes; ``gemm``: flop/s of torch's best form, by dtype."""
    copies, threads = [], torch.get_num_threads()
    for power in range(11, 29):
        source = torch.zeros(2 ** (power - 1), dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        times = []
        for count in {1, threads}:  # waking the second thread costs more than it brings for small sizes
            torch.set_num_threads(count)
            times.append(_best_time(lambda target=target, source=source: target.copy_(source), device, 0.01))  # type: ignore[misc]
        copies.append((2**power, min(times)))
    torch.set_num_threads(threads)
    gemm = {}
    for dtype in dtypes:
        n = 1024 if device.type == "cpu" else 8192
        a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
        forms: list[Callable[[], Any]] = [lambda a=a, b=b: a @ b]  # type: ignore[misc]
        if (
            dtype == torch.float32 and device.type == "cpu"
        ):  # oneDNN's 1x1 convolution: the fastest form of a product torch has here
            image = torch.randn(1, n, n // 32, 32).to(memory_format=torch.channels_last)
            weight = torch.randn(n, n, 1, 1).to(memory_format=torch.channels_last)
            forms.append(lambda image=image, weight=weight: torch.nn.functional.conv2d(image, weight))  # type: ignore[misc]
        with torch.no_grad():
            gemm[str(dtype).removeprefix("torch.")] = 2 * n**3 / min(_best_time(form, device, 0.15) for form in forms)
    return {"copy": copies, "gemm": gemm}


def floor_ms(measured: Mapping[str, Any], moved: float, flops: float, dtype: str) -> float:
    """The longer of: copying as many bytes (between measured sizes interpolated), and the flops at the GEMM rate."""
    points = [(math.log(size), math.log(seconds)) for size, seconds in measured["copy"]]
    at = max(math.log(max(moved, 1)), points[0][0])
    (x0, y0), (x1, y1) = next(((p, q) for p, q in itertools.pairwise(points) if at <= q[0]), points[-2:])
    copying = math.exp(y0 + (y1 - y0) * (at - x0) / (x1 - x0))
    return 1e3 * max(copying, flops / measured["gemm"][dtype] if flops else 0.0)


# ---------------------------------------------------------------- rows


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def merge_rows(old: Iterable[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Old rows with the new in place of theirs.

    All providers of one contest come from one run, so a rerun also drops rows of that contest which it did not measure
    again: a ratio across two runs would be no ratio.
    """

    def contest(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[k]) for k in KEY if k != "provider")

    replaced = {contest(row) for row in new}
    kept = [row for row in old if contest(row) not in replaced]
    rows = [{k: str(row.get(k, "")) for k in FIELDS} for row in [*kept, *new]]
    return sorted(
        rows,
        key=lambda r: tuple(
            r[k] for k in ("machine", "op", "shape", "dtype", "mode", "threads", "setting", "provider")
        ),
    )


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Written beside and renamed, so that an interrupted run leaves the old rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


# ---------------------------------------------------------------- bench files, worker process

HERE = Path(__file__).resolve().parent


def bench_files() -> dict[str, Path]:
    """Ops that have a bench file here, by name."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(HERE.glob("bench_*.py"))}


def load_cases(path: Path, device: torch.device) -> list[Case]:
    """The cases of one bench file; it is imported as a sibling of this module, wherever it lies."""
    name = f"{__package__}.{path.stem}"
    module = sys.modules.get(name)
    if module is None or Path(str(module.__file__)) != path:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return list(module.cases(device))


def commit() -> str:
    """Short hash of the checkout the package runs from ("+" when it has local changes), else the installed version."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "--short=10", "HEAD") if git("ls-files", "--", str(HERE / "harness.py")) else ""
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!*results.csv") if head else ""
    except OSError:
        head = changed = ""
    if head:
        return head + ("+" if changed else "")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("pyflowgen")
    except PackageNotFoundError:
        return "unknown"


def worker(device_name: str, threads: int, *files: str) -> None:
    """Answers requests, one JSON object a line on stdin, until stdin ends. Whatever else is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(device_name)
    torch.set_num_threads(threads)
    contest: Contest | None = None
    cases = {file: load_cases(Path(file), device) for file in files}
    spec = importlib.util.find_spec("pyflowgen")
    replies.write(json.dumps({"ok": spec.origin if spec is not None else None}) + "\n")
    replies.flush()
    for line in sys.stdin:
        do, *arguments = json.loads(line)
        try:
            if do == "rates":
                answer: Any = rates(device, [getattr(torch, name) for name in arguments[0]])
            elif do == "open":
                contest = None
                gc.collect()
                contest = Contest(cases[arguments[0]][arguments[1]], device)
                answer = "ok"
            elif contest is None:
                raise RuntimeError(f"{do}: no case is open")
            else:
                answer = getattr(contest, do)(*arguments)
            reply = {"ok": answer}
        except Exception as error:  # a provider's failure is a result, reported in its row
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    # Run by path, so that this harness can time another tree's pyflowgen: made a package again under a name of its own,
    # and this folder taken off the path, where its modules' names would shadow others.
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]
    package = importlib.util.spec_from_file_location(
        "pyflowgen_benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert package is not None and package.loader is not None
    sys.modules["pyflowgen_benchmarks"] = importlib.util.module_from_spec(package)
    importlib.import_module("pyflowgen_benchmarks.harness").worker(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
