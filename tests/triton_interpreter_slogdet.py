"""The Triton launchers of slogdet run by Triton's interpreter on CPU tensors, chosen by the dispatcher.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

import pytest
import torch
from check_triton import launches as launches

import pyflowgen

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def run(function, a):
    sign, logabsdet = function(a)
    weights = torch.linspace(-1, 2, logabsdet.numel(), dtype=logabsdet.dtype).view(logabsdet.shape)
    (grad,) = torch.autograd.grad(logabsdet, a, weights)
    return [t.detach().double() for t in (sign, logabsdet, grad)]


def matrices(batch, n):
    generator = torch.Generator().manual_seed(n)
    noise = torch.randn(batch, n, n, generator=generator, dtype=torch.float64) / n**0.5
    return noise + 3 * torch.eye(n, dtype=torch.float64).roll(1, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 9, 20, 64])
def test_sizes(launches, n, dtype):
    a = matrices(5 if n < 20 else 2, n).to(dtype).requires_grad_()
    got = run(pyflowgen.slogdet, a)
    assert [x.kernel.__name__ for x in launches] == ["forward_kernel", "backward_kernel"]
    want = run(torch.linalg.slogdet, a.detach().double().requires_grad_())
    for g, w, kept in zip(got, want, (dtype, torch.float32, dtype), strict=True):
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else kept).eps
        # The interpreter cuts bfloat16 off where a device rounds it.
        times = 64 if dtype == torch.float64 else 2
        assert (g - w).abs().max() <= times * eps * w.abs().max().clamp(min=1)


def test_several_programs_strides_and_empty(launches):
    a = matrices(70, 8).float()
    got, want = (run(f, a.clone().requires_grad_()) for f in (pyflowgen.slogdet, torch.linalg.slogdet))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for m in (a.mT, a[::2], a.view(2, 35, 8, 8), a[0], a[0].expand(3, 8, 8)):
        torch.testing.assert_close(tuple(pyflowgen.slogdet(m)), tuple(torch.linalg.slogdet(m)))
    assert pyflowgen.slogdet(a[:0])[1].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edges(dtype):
    eye = torch.eye(3, dtype=dtype)
    a = torch.stack([0 * eye, eye, eye * torch.nan, eye * -torch.inf, eye * 1e-40, eye * 1e38, eye[[1, 0, 2]]])
    sign, logabsdet = pyflowgen.slogdet(a)
    assert sign[[0, 1, 4, 5, 6]].tolist() == [0, 1, 1, 1, -1]
    assert logabsdet[0] == -torch.inf and logabsdet[2].isnan() and logabsdet[[1, 6]].tolist() == [0, 0]
    torch.testing.assert_close(logabsdet[4:6].double(), 3 * a[4:6, 0, 0].double().log(), rtol=2e-7, atol=0)


def test_operator(launches):
    a = matrices(3, 4).float()
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pyflowgen.slogdet.default, (a,), test_utils=utils)
    torch.library.opcheck(torch.ops.pyflowgen.slogdet_backward.default, (torch.ones(3), a), test_utils=utils)
    assert {x.kernel.__name__ for x in launches} == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize(
    "arguments", [(torch.zeros(3, 4),), (torch.zeros(65, 65),), (torch.zeros(2, 2, dtype=torch.int64),)]
)
def test_operator_rejects(launches, arguments):
    with pytest.raises(ValueError, match="slogdet: a "):
        torch.ops.pyflowgen.slogdet(*arguments)
    with pytest.raises(ValueError, match="dlogabsdet"):
        torch.ops.pyflowgen.slogdet_backward(torch.zeros(3), torch.zeros(2, 4, 4))
    assert not launches
