"""The CUDA launchers of affine_coupling on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

import pyflowgen
from pyflowgen import _native

affine_coupling = pyflowgen.affine_coupling
reference = pyflowgen.affine_coupling_reference
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCALES = ("exp", "tanh", "sigmoid", "sigmoid_eps", "softclip", "atan", "softplus")


def test_the_launchers_run():
    assert os.environ["PYFLOWGEN_LIBRARY"] == pyflowgen.build_info()["library"]
    assert _native.use_kernel("affine_coupling", torch.zeros(1))


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def cast(t, dtype):
    """The same view of the same storage in another dtype: strides, offset and expanded dimensions are kept."""
    whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return whole.to(dtype, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def run(function, dtype, tensors, weights, options):
    leaves = [None if t is None else cast(t, dtype).requires_grad_() for t in tensors]
    outputs = function(*leaves, **options)
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, [t for t in leaves if t is not None])
    return [t.detach().double() for t in (*outputs, *grads)]


def check(x, shift, log_scale=None, dtype=torch.float32, **options):
    """Values and gradients: at most twice the error of the reference in this dtype, or four roundings."""
    tensors = [None if t is None else cast(cast(t, dtype), torch.float64) for t in (x, shift, log_scale)]
    weights = [normal(*o.shape, dtype=torch.bfloat16, seed=5).double() for o in reference(*tensors, **options)]
    exact = run(reference, torch.float64, tensors, weights, options)
    plain = run(reference, dtype, tensors, weights, options)
    ours = run(affine_coupling, dtype, tensors, weights, options)
    for i, (e, p, o) in enumerate(zip(exact, plain, ours, strict=True)):
        assert o.shape == e.shape
        if e.numel() == 0:
            continue
        eps = torch.finfo(torch.float32 if i == 1 and dtype != torch.float64 else dtype).eps
        error, bound = (o - e).abs().max(), 2 * (p - e).abs().max() + 4 * eps * e.abs().max()
        assert error <= bound, f"output {i}: error {error:.3g}, bound {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
def test_scales(scale, dtype):
    variants = itertools.product(("scale_shift", "shift_scale"), (False, True))
    for (order, inverse), size in zip(variants, ((33, 16), (33, 5), (5, 300), (300, 8)), strict=True):
        x, shift, log_scale = (normal(*size, seed=i) for i in range(3))
        check(x, shift, log_scale, dtype, scale=scale, order=order, inverse=inverse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_additive(dtype):
    for size, inverse in itertools.product(((7, 24), (7, 3)), (False, True)):
        check(normal(*size), normal(*size, seed=1), dtype=dtype, inverse=inverse)


@pytest.mark.parametrize("layout", ("halves", "interleaved", "pairs"))
@pytest.mark.parametrize("part", (None, (0, 1), (8, 1), (1, 2), (3, 3)))
@pytest.mark.parametrize("image", (False, True))
def test_layouts_and_parts(layout, part, image):
    channels = 16
    count = channels if part is None else 8 if part[1] < 3 else 4
    inner = (3, 4) if image else ()
    params = normal(5, count, *inner, 2, seed=1) if layout == "pairs" else normal(5, 2 * count, *inner, seed=1)
    options = dict(part=part, event_dim=1 + len(inner))
    for dtype in (torch.float32, torch.bfloat16):
        check(normal(5, channels, *inner), params, dtype=dtype, layout=layout, **options)
    check(normal(5, channels, *inner), params, layout=f"{layout}_scale_first", gain=0.5, **options)


@pytest.mark.parametrize("shape", ((3, 4, 8, 8), (3, 5, 3, 7), (2, 6, 5, 4)))
def test_masks(shape):
    grid = torch.arange(shape[2])[:, None] + torch.arange(shape[3])
    x, shift, log_scale = (normal(*shape, seed=i) for i in range(3))
    for mask in (
        grid % 2 == 0,
        (torch.arange(shape[1]) % 2 == 0)[:, None, None],
        torch.zeros(shape[1:], dtype=torch.bool),
    ):
        check(x, shift, log_scale, mask=mask, event_dim=3)
        check(x, shift, log_scale, torch.float16, mask=mask, event_dim=3, inverse=True)


def test_mask_hides_bad_parameters():
    x, shift, log_scale = (normal(4, 8, seed=i) for i in range(3))
    mask = torch.arange(8) % 2 == 0
    shift[:, 1::2], log_scale[:, 1::2] = torch.nan, torch.inf
    y, logdet = affine_coupling(x, shift, log_scale, mask=mask)
    assert torch.equal(y[:, ~mask], x[:, ~mask]) and logdet.isfinite().all()


def views():
    base = normal(6, 16, 4, 4)
    yield "contiguous", base
    yield "channels last", base.contiguous(memory_format=torch.channels_last)
    yield "transposed", normal(16, 6, 4, 4).transpose(0, 1)
    yield "every other row", normal(12, 16, 4, 4)[::2]
    yield "unaligned", normal(6 * 256 + 1)[1:].view(6, 16, 4, 4)
    yield "half of the channels", normal(6, 32, 4, 4)[:, 16:]
    yield "turned", normal(6, 4, 4, 16).permute(0, 3, 2, 1)
    yield "expanded", normal(16, 1, 4).expand(6, 16, 4, 4)


@pytest.mark.parametrize("x", [pytest.param(x, id=name) for name, x in views()])
def test_strides(x):
    shift, log_scale = normal(6, 16, 4, 4, seed=1), normal(6, 16, 4, 4, seed=2)
    check(x, shift, log_scale, event_dim=3)
    check(shift, x, log_scale, event_dim=3)
    check(shift, log_scale, x, event_dim=2, inverse=True)
    check(shift, x, x, event_dim=0, scale="sigmoid")
    check(x, normal(6, 8, 4, 4), event_dim=3, part=(4, 1), layout="halves")


SIZES = {
    0: ((), (7001,)),
    1: ((1,), (1, 1), (5, 1), (1, 5), (2, 30000)),
    2: ((3, 2, 700),),
    3: ((40, 1, 1, 1), (1, 3, 64, 64), (2, 7, 51, 50)),
    4: ((2, 3, 4, 5),),
}


@pytest.mark.parametrize("event_dim,shape", [(event_dim, shape) for event_dim in SIZES for shape in SIZES[event_dim]])
def test_sizes(shape, event_dim):
    x, shift, log_scale = (normal(*shape, seed=i) for i in range(3))
    check(x, shift, log_scale, event_dim=event_dim)
    check(x, shift, log_scale, torch.float16, event_dim=event_dim, inverse=True)


@pytest.mark.parametrize("shape", ((0, 4), (4, 0), (0, 3, 2, 2)))
def test_empty(shape):
    x = normal(*shape)
    y, logdet = affine_coupling(x, x, x, event_dim=len(shape) - 1)
    assert y.shape == x.shape and torch.equal(logdet, torch.zeros(shape[0]))


def test_broadcast_parameters():
    check(normal(6, 8, 4, 4), normal(8, 1, 1, seed=1), normal(1, 1, 4, seed=2), event_dim=3)


def test_one_gradient_alone():
    tensors = [normal(6, 8, seed=i).requires_grad_() for i in range(3)]
    for which in (0, 1):
        expected = torch.autograd.grad(reference(*tensors)[which].sum(), tensors, allow_unused=True)
        got = torch.autograd.grad(affine_coupling(*tensors)[which].sum(), tensors)
        for e, g in zip(expected, got, strict=True):
            torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e)


def test_strides_beyond_31_bits():
    # Address space, not memory: only the pages that are touched exist.
    far = 2**31 + 4
    try:
        whole = torch.empty(2 * far + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space")
    for strides in ((far, 16, 1), (16, far, 1), (32, 1, far)):
        x = whole.as_strided((2, 2, 2), strides)
        values = normal(2, 2, 2, dtype=torch.float16)
        x.copy_(values)
        y, logdet = affine_coupling(x, x, x, event_dim=2)
        expected, expected_logdet = affine_coupling(values, values, values, event_dim=2)
        assert torch.equal(y, expected) and torch.equal(logdet, expected_logdet)


def test_same_result_each_time():
    x, shift, log_scale = (normal(3, 20000, seed=i) for i in range(3))
    first, second = (affine_coupling(x, shift, log_scale) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@pytest.mark.parametrize("scale", SCALES)
def test_extreme_values(scale):
    edges = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 30.0, -30.0, 100.0, -100.0, torch.inf, -torch.inf, torch.nan, 1e-40])
    x = torch.ones_like(edges)
    got, expected = (f(x, x, edges, scale=scale, event_dim=0) for f in (affine_coupling, reference))
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_operator_is_well_formed():
    x, shift, log_scale = (normal(4, 6, seed=i) for i in range(3))
    options = (0, 0, 1, 1, 0.0, 1.0, False, False, 1)
    torch.library.opcheck(torch.ops.pyflowgen.affine_coupling, (x, shift, log_scale, None, *options))
    torch.library.opcheck(torch.ops.pyflowgen.affine_coupling_backward, (x, None, x, shift, log_scale, None, *options))


def test_bad_arguments():
    x = normal(4, 6)
    with pytest.raises(RuntimeError, match="layout"):
        torch.ops.pyflowgen.affine_coupling(x, x, None, None, 9, 0, 1, 1, 0.0, 1.0, False, False, 1)
