"""The Triton launchers run by Triton's interpreter on CPU tensors, chosen by the dispatcher: values and gradients
against the float64 reference, every access checked against the storage it may touch.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from check_triton import launches as launches
from pyflowgen.kernels import tile
from torch import Tensor

import pyflowgen

SCALES = ["exp", "tanh", "sigmoid", "sigmoid_eps", "softclip", "atan", "softplus"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
rng = np.random.default_rng(0)


def randn(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.5) -> Tensor:
    return torch.tensor(rng.standard_normal(shape) * scale, dtype=dtype)


def evaluate(function, tensors, weights, options, keep=(True, True)):
    """[y, logdet, gradient of every tensor] of sum(y w0) + sum(logdet w1)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves, **options)
    pairs = [(o, w.to(o.dtype)) for o, w, k in zip(outputs, weights, keep, strict=True) if k]
    pairs = [(o, w) for o, w in pairs if o.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)
    gradients = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, gradients, strict=True)]
    return [*(o.detach() for o in outputs), *gradients]


def compare(got, reference, truth, dtype):
    """Error at most twice the reference's, and some roundings of numbers of the result's size."""
    for name, a, b, c in zip(("y", "logdet", "dx", "dparams", "dlog_scale"), got, reference, truth, strict=False):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        if a.numel() == 0 or got[0].numel() == 0:
            continue
        eps = torch.finfo(a.dtype).eps
        roundings = 32 if dtype == torch.float64 else 1  # float64 has no better reference than itself
        if name == "logdet":  # a sum of n numbers by halves rounds log2 n times
            roundings += math.log2(max(1, got[0].numel() / a.numel()))
        allowed = 2 * (b.double() - c).abs().max() + eps * (2 * c.abs() + roundings * c.abs().max().clamp(min=1))
        error = (a.double() - c).abs()
        assert (error <= allowed).all(), f"{name}: {(error / (c.abs() + 1e-300)).max():.2e} relative error"


def check(launches, *tensors, keep=(True, True), kernels=("forward_kernel", "backward_kernel"), **options):
    x = tensors[0]
    w0, w1 = randn(*x.shape).to(x.dtype), randn(*x.shape[: x.dim() - options.get("event_dim", 1)])
    if x.dtype != torch.float64:
        w1 = w1.float()
    before = len(launches)
    got = evaluate(pyflowgen.affine_coupling, tensors, (w0, w1), options, keep)
    names = [launch.kernel.__name__ for launch in launches[before:]]
    assert names == ([] if x.numel() == 0 else list(kernels))
    reference = evaluate(pyflowgen.affine_coupling_reference, tensors, (w0, w1), options, keep)
    assert len(launches) == before + len(names)
    exact = [t.double() for t in tensors]
    truth = evaluate(pyflowgen.affine_coupling_reference, exact, (w0.double(), w1.double()), options, keep)
    compare(got, reference, truth, x.dtype)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_scales(launches, scale, dtype):
    for inverse, order in itertools.product((False, True), ("scale_shift", "shift_scale")):
        x, params = randn(6, 5, dtype=dtype), randn(6, 10, dtype=dtype)
        check(launches, x, params, layout="halves", scale=scale, inverse=inverse, order=order)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_additive(launches, dtype):
    for inverse in (False, True):
        x, shift = randn(6, 5, dtype=dtype), randn(6, 3, dtype=dtype)
        # Without a scale autograd needs no kernel to go back, but the operator has one.
        check(launches, x, randn(6, 5, dtype=dtype), inverse=inverse, kernels=["forward_kernel"])
        options = (None, None, 0, 0, 2, 0, 0.0, 1.0, False, inverse, 1)
        dy = randn(6, 5, dtype=dtype)
        dx, dshift, _ = torch.ops.pyflowgen.affine_coupling_backward(dy, None, x, shift, *options)
        assert torch.equal(dx, dy) and torch.equal(dshift, -dy[:, ::2] if inverse else dy[:, ::2])
        y, logdet = torch.ops.pyflowgen.affine_coupling(x, shift, *options)
        assert torch.equal(y[:, 1::2], x[:, 1::2]) and (logdet == 0).all()


SHAPES = [((7, 5), 1), ((2, 3, 4), 1), ((3, 4, 3, 5), 3), ((3, 4), 0), ((5,), 1), ((2, 1, 6), 2), ((4, 1), 1), ((), 0)]


@pytest.mark.parametrize("layout", [None, "halves", "interleaved", "pairs"])
@pytest.mark.parametrize("shape, event_dim", SHAPES)
def test_layouts_parts_masks(launches, shape, event_dim, layout):
    if event_dim == 0 and layout in ("halves", "interleaved"):
        pytest.skip("event_dim=0 has no channels")
    dim = len(shape) - event_dim
    channels = shape[dim] if event_dim else 1
    cases: list[dict] = [{}]
    if event_dim:
        mask = torch.from_numpy(rng.random(shape[dim:]) < 0.5)
        cases += [{"mask": mask}, {"mask": mask.flatten()[:1].expand(shape[dim:])}]
        cases += [
            {"part": (s, step)} for s, step in [(0, 1), (1, 1), (0, 2), (1, 2), (channels - 1, 1)] if s < channels
        ]
    directions = itertools.cycle([(False, "scale_shift"), (True, "shift_scale")])
    for case, (inverse, order) in zip(cases * (1 + len(cases) % 2), directions, strict=False):
        part = list(shape)
        if "part" in case:
            start, step = case["part"]
            part[dim] = max(1, (channels - start + step - 1) // step - (step == 1 and channels > 3))
        packed = list(part)
        if layout in ("halves", "interleaved"):
            packed[dim] *= 2
        elif layout == "pairs":
            packed.append(2)
        options = dict(case, layout=layout, event_dim=event_dim, inverse=inverse, order=order, scale="tanh")
        tensors = [randn(*packed, dtype=torch.float32)] if layout else [randn(*part, dtype=torch.float32) for _ in "ts"]
        check(launches, randn(*shape, dtype=torch.float32), *tensors, **options)
        if layout and (not case or case.get("part") == (1, 1)):
            options |= dict(layout=f"{layout}_scale_first", gain=0.5)
            check(launches, randn(*shape, dtype=torch.float32), *tensors, **options)


def strided(kind: str, *shape: int) -> Tensor:
    t = randn(*shape, dtype=torch.float32)
    if kind == "reversed":
        return randn(*shape[::-1], dtype=torch.float32).permute(*range(len(shape))[::-1])
    if kind == "every other":
        return randn(*(2 * n for n in shape), dtype=torch.float32)[(slice(1, None, 2),) * len(shape)]
    if kind == "expanded":
        return randn(*shape[:-1], 1, dtype=torch.float32).expand(shape)
    if kind == "channels last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    return t


@pytest.mark.parametrize("shape, event_dim", [((3, 4, 3, 5), 3), ((3, 4, 3, 5), 1), ((3, 4, 5), 2), ((3, 4), 0)])
@pytest.mark.parametrize("kind", ["reversed", "every other", "expanded", "channels last"])
def test_strides(launches, kind, shape, event_dim):
    for other in (kind, "contiguous"):
        tensors = [strided(k, *shape) for k in (kind, other, other)]
        got = check(launches, *tensors, event_dim=event_dim)
        assert got[0].stride() == torch.empty_like(tensors[0]).stride()
    packed = list(shape)
    if event_dim:
        packed[len(shape) - event_dim] *= 2
        check(
            launches, strided("contiguous", *shape), strided(kind, *packed), layout="interleaved", event_dim=event_dim
        )


def test_long_rows_take_several_programs_and_a_second_sum(launches):
    check(launches, randn(2, 9001, dtype=torch.float32), randn(2, 18002, dtype=torch.float32), layout="halves")
    assert launches[0].grid == (2, 2)


def test_loop_over_a_row(launches):
    check(launches, randn(3, 2500, dtype=torch.float32), randn(3, 5000, dtype=torch.float32), layout="halves")
    assert launches[0].grid[1] == 1 and launches[0].options["COLS"] < 2500


def test_many_short_rows_share_a_program(launches):
    check(launches, randn(1100, 3, dtype=torch.float32), randn(1100, 3, 2, dtype=torch.float32), layout="pairs")
    assert 1 < launches[0].grid[0] < 10


def test_64_bit_offsets(launches, monkeypatch):
    monkeypatch.setattr(tile, "wide", lambda *_: True)
    test_long_rows_take_several_programs_and_a_second_sum(launches)
    check(launches, randn(3, 4, 3, 5), randn(3, 8, 3, 5), layout="halves", event_dim=3)


def test_wide_counts_offsets():
    assert not tile.wide((1024, 8, 8), [(64, 8, 1)])
    assert tile.wide((1 << 20, 64, 64), [(4096, 64, 1)])
    assert tile.wide((2, 4, 4), [(16, 4, 1), (1 << 40, 4, 1)])


@pytest.mark.parametrize("keep", [(True, False), (False, True)])
def test_absent_output_gradient(launches, keep):
    check(
        launches,
        randn(5, 6, dtype=torch.float32),
        randn(5, 6, dtype=torch.float32),
        layout="halves",
        part=(3, 1),
        keep=keep,
    )


def test_empty(launches):
    for shape in ((0, 4), (4, 0)):
        check(launches, torch.empty(shape), torch.empty(shape), torch.empty(shape))


EDGES = [0.0, -0.0, 1e-45, -1e-38, 1e-20, 3e-8, -1e-3, 0.5, -1.0, 2.0, -2.0, 20.0, -19.0, 87.0, -88.0, 104.0, -105.0,
         1e5, -1e5, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", SCALES)
def test_edges(launches, scale, dtype):
    """Zeros, denormals, the ends of the range, inf, NaN: relative error element by element."""
    edges = torch.tensor(EDGES, dtype=dtype)
    s, x = (t.flatten() for t in torch.meshgrid(edges, edges, indexing="ij"))
    inputs = (x, torch.zeros_like(x), s)
    exact = [v.double() for v in inputs]
    w = (torch.ones_like(x), torch.ones_like(x))
    eps, tiny, largest = (getattr(torch.finfo(dtype), name) for name in ("eps", "smallest_normal", "max"))
    for inverse in (False, True):
        options = dict(scale=scale, inverse=inverse, event_dim=0)
        got = evaluate(pyflowgen.affine_coupling, inputs, w, options)
        reference = evaluate(pyflowgen.affine_coupling_reference, inputs, w, options)
        truth = evaluate(pyflowgen.affine_coupling_reference, exact, [v.double() for v in w], options)
        for name, a, b, c in zip(("y", "logdet", "dx", "dshift", "dlog_scale"), got, reference, truth, strict=True):
            a, b = a.double(), b.double()
            # dlog_scale = (dx x + 1) l'(s): the terms are the scale, and may not overflow.
            size = c.abs() if name != "dlog_scale" else (truth[2] * exact[0]).abs() + 1
            fair = b.isfinite() & c.isfinite() & (size < largest)
            if name == "dlog_scale":
                fair &= truth[0].isfinite() & (truth[0].abs() < largest)

            def error(v, size=size, fair=fair, c=c):
                return ((v - c).abs() / (size + tiny))[fair].max()

            assert error(a) <= 2 * error(b) + 4 * eps, f"{name}: {error(a)}, the reference {error(b)}"
            if name in ("y", "logdet"):  # between under- and overflow either answer will do
                kinds = [torch.where(v.isfinite(), 0.0, v) for v in (a, b, c.to(dtype).double())]
                same = [torch.isclose(kinds[0], k, equal_nan=True) for k in kinds[1:]]
                assert (same[0] | same[1]).all(), name


def test_masked_inf_stays_away(launches):
    x, params = randn(2, 4), randn(2, 8)
    params[:, 1::4] = float("inf")
    mask = torch.tensor([True, False, True, True])
    got = evaluate(pyflowgen.affine_coupling, (x, params), (randn(2, 4), randn(2)), {"mask": mask, "layout": "halves"})
    assert all(t.isfinite().all() for t in got) and torch.equal(got[0][:, 1], x[:, 1]) and (got[3][:, 1::4] == 0).all()


def test_same_every_time(launches):
    x, params = randn(2, 9001, dtype=torch.float32), randn(2, 18002, dtype=torch.float32)
    first, second = (pyflowgen.affine_coupling(x, params, layout="halves") for _ in range(2))
    assert torch.equal(first[1], second[1]) and torch.equal(first[0], second[0]) and len(launches) == 2


def test_operator(launches):
    """The fakes fit the launchers, nothing is changed or aliased; compiled code runs them."""
    x, params = randn(3, 4, 2, dtype=torch.float32).transpose(1, 2), randn(3, 2, 8, dtype=torch.float32)
    arguments = (x, params, None, None, 1, 0, 1, 2, 2.0, 1.0, False, False, 1)
    gradients = (torch.ones_like(x), torch.ones(3, 2))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pyflowgen.affine_coupling.default, arguments, test_utils=utils)
    backward = torch.ops.pyflowgen.affine_coupling_backward.default
    torch.library.opcheck(backward, (*gradients, *arguments), test_utils=utils)
    assert {launch.kernel.__name__ for launch in launches} == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize("change, message", [
    ({"params": torch.zeros(3, 7)}, "shift"), ({"params": torch.zeros(2, 8)}, "shift"), ({"step": 2}, "reach beyond"),
    ({"params": torch.zeros(3, 8, dtype=torch.float64)}, "shift"), ({"mask": torch.ones(4)}, "mask"),
    ({"layout": 7}, "layout"), ({"layout": 0}, "log_scale"), ({"event_dim": 3}, "event_dim"),
    ({"x": torch.zeros(3, 4, dtype=torch.int64)}, "x is"),
])  # fmt: skip
def test_operator_rejects(launches, change, message):
    arguments = dict(
        x=torch.zeros(3, 4), params=torch.zeros(3, 8), log_scale=None, mask=None, layout=1, start=0, step=1, scale=1,
        clamp=0.0, gain=1.0, shift_first=False, inverse=False, event_dim=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        torch.ops.pyflowgen.affine_coupling(**(arguments | change))
    assert not launches
