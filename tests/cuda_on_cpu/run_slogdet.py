"""The CUDA launchers of slogdet on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own."""

from __future__ import annotations

import os

import pytest
import torch

import pyflowgen
from pyflowgen import _native

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def test_the_launchers_run():
    assert os.environ["PYFLOWGEN_LIBRARY"] == pyflowgen.build_info()["library"]
    assert _native.use_kernel("slogdet", torch.zeros(1))


def run(function, a):
    sign, logabsdet = function(a)
    weights = torch.linspace(-1, 2, max(1, logabsdet.numel()), dtype=logabsdet.dtype)[: logabsdet.numel()]
    (grad,) = torch.autograd.grad(logabsdet, a, weights.view(logabsdet.shape))
    return [t.detach().double() for t in (sign, logabsdet, grad)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (1, 2, 3, 6, 8, 16, 20, 33, 64))
def test_sizes(n, dtype):
    for batch in (1, 5, 70 if n < 20 else 3):
        generator = torch.Generator().manual_seed(n)
        noise = torch.randn(batch, n, n, generator=generator, dtype=torch.float64) / n**0.5
        a = (noise + 3 * torch.eye(n, dtype=torch.float64).roll(1, 0)).to(dtype).requires_grad_()
        got = run(pyflowgen.slogdet, a)
        want = run(torch.linalg.slogdet, a.detach().double().requires_grad_())
        for g, w, kept in zip(got, want, (dtype, torch.float32, dtype), strict=True):
            eps = torch.finfo(torch.float64 if dtype == torch.float64 else kept).eps
            assert (g - w).abs().max() <= (64 if dtype == torch.float64 else 1) * eps * w.abs().max().clamp(min=1)


def test_strides_and_empty():
    base = torch.randn(6, 4, 4, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(4)
    for a in (base.mT, base[::2], base.view(2, 3, 4, 4), base[0], base[0].expand(3, 4, 4), base[:0]):
        for g, w in zip(pyflowgen.slogdet(a), torch.linalg.slogdet(a), strict=True):
            torch.testing.assert_close(g, w)


def test_singular_and_nan():
    a = torch.stack([torch.zeros(3, 3), torch.eye(3), torch.full((3, 3), torch.nan)])
    sign, logabsdet = pyflowgen.slogdet(a)
    assert sign.tolist() == [0, 1, 0] and logabsdet[0] == -torch.inf and logabsdet[1] == 0 and logabsdet[2].isnan()
