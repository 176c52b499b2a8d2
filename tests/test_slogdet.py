"""slogdet: the battery, torch's own in every edge, and what is special to the op."""

from __future__ import annotations

import math

import pytest
import torch
from check_op import Op, Sample, op_tests
from torch import Tensor

import pyflowgen
from pyflowgen import slogdet, slogdet_reference

# Sizes around the ends of packs of every instruction set, of unrolled code and of blocks of pivots.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 20, 24, 25, 31, 32, 33, 47, 64)


def matrices(*shape: int, seed: int = 0) -> Tensor:
    """Well-conditioned matrices (the battery compares roundings, not condition numbers) that need pivots."""
    *batch, n, _ = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    noise = torch.randn(*shape, dtype=torch.float64, generator=generator)
    order = torch.argsort(torch.rand(*batch, n, generator=generator, dtype=torch.float64), -1)
    return torch.eye(n, dtype=torch.float64)[order] * 3 + noise / math.sqrt(n)


def samples() -> list[Sample]:
    result = [Sample(f"n{n}", (matrices(11, n, n),)) for n in SIZES]
    add = lambda name, a: result.append(Sample(name, (a,)))  # noqa: E731
    add("no-batch", matrices(5, 5))
    add("one", matrices(1, 8, 8))
    add("two-batch-dims", matrices(3, 7, 6, 6))
    add("many", matrices(530, 4, 4))
    add("transposed", matrices(9, 6, 6).mT)
    add("batch-last", matrices(6, 7, 7).permute(1, 2, 0).contiguous().permute(2, 0, 1))
    add("every-other", matrices(12, 5, 5)[::2])
    add("inner-of-larger", matrices(4, 9, 9)[:, 1:7, 2:8])
    add("expanded", matrices(5, 5).expand(4, 5, 5))
    add("empty", matrices(0, 4, 4))
    add("zero-size", matrices(3, 0, 0))
    add("beyond-the-kernels", matrices(2, 65, 65))
    add("scaled", matrices(6, 8, 8) * torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None, None])
    return result


def small() -> list[Sample]:
    return [Sample(f"n{n}", (matrices(2, n, n),)) for n in (1, 2, 3, 5)] + [Sample("strided", (matrices(3, 4, 4).mT,))]


BAD = [
    ("no tensor", lambda: slogdet([[1.0]]), TypeError, "a must be a tensor, got list"),
    ("integers", lambda: slogdet(torch.ones(2, 2, dtype=torch.int64)), TypeError, "floating-point tensor, got torch.int64"),
    ("complex", lambda: slogdet(torch.ones(2, 2, dtype=torch.complex64)), TypeError, "floating-point tensor, got torch.complex64"),
    ("not square", lambda: slogdet(torch.ones(4, 2, 3)), ValueError, r"a has shape \(4, 2, 3\), expected \(\*batch, n, n\)"),
    ("a vector", lambda: slogdet(torch.ones(3)), ValueError, r"a has shape \(3,\)"),
    ("the operator's own check", lambda: torch.ops.pyflowgen.slogdet(torch.ones(65, 65)), RuntimeError, "takes n from 1 to 64, got 65"),
    ("the gradient's shape", lambda: torch.ops.pyflowgen.slogdet_backward(torch.ones(3), torch.ones(2, 4, 4)), RuntimeError, "dlogabsdet must have"),
]  # fmt: skip

globals().update(
    op_tests(
        Op(
            name="slogdet",
            function=slogdet,
            reference=slogdet_reference,
            samples=samples,
            small=small,
            operator=lambda sample: (torch.ops.pyflowgen.slogdet.default, sample.tensors),
            resize=lambda batch: Sample("resize", (matrices(batch, 6, 6),)),
            bad=BAD,
        )
    )
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [2, 5, 8, 13, 30])
def test_singular_and_not_finite(n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Zero pivots, NaN and inf anywhere, among regular matrices, which they leave alone."""
    regular = matrices(12, n, n).to(dtype).to(device)
    a = regular.clone()
    a[0] = 0
    a[1, :, n // 2] = 0
    a[2, n - 1] = a[2, 0]
    a[3, 0, 0] = torch.nan
    a[4, n - 1, n - 1] = torch.nan
    a[5, 0, n - 1] = torch.nan
    a[6, n - 1, 0] = torch.nan
    a[7] = torch.diag(torch.arange(n, dtype=dtype) + 1)
    a[7, 0, 0] = -torch.inf
    for m in (a, a.clone().requires_grad_()):
        sign, logabsdet = slogdet(m)
        want_sign, want = torch.linalg.slogdet(a)
        keep = [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11]  # equal rows end in a zero or a rounding's pivot
        torch.testing.assert_close(sign[keep], want_sign[keep])
        torch.testing.assert_close(logabsdet[keep], want[keep], equal_nan=True)
        assert logabsdet[2] < n * math.log(3) - 25  # but for that row they are near 3 times a permutation
    (grad,) = torch.autograd.grad(logabsdet.sum(), m)
    assert not grad[:2].isfinite().flatten(1).all(1).any(), "no finite gradient at a singular matrix"
    assert grad[3:7].isnan().flatten(1).any(1).all()
    others = regular[8:].clone().requires_grad_()
    assert torch.equal(grad[8:], torch.autograd.grad(slogdet(others)[1].sum(), others)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_range_of_exponents(dtype: torch.dtype, device: torch.device) -> None:
    """Determinants beyond the range of the numbers, denormal entries too: the logarithm stays right."""
    for n, size in ((2, 1e-40), (8, 1e-38), (8, 1e30), (40, 1e-30), (64, 3e37), (20, 1e-44)):
        a = (torch.eye(n, dtype=torch.float64) * size).to(dtype).to(device)
        a = a[torch.randperm(n, generator=torch.Generator().manual_seed(n))]
        want = n * math.log(a.max().item())
        torch.testing.assert_close(slogdet(a)[1].item(), want, rtol=1e-6, atol=0)
    if dtype == torch.float64:
        for size in (5e-324, 1e-310, 1e308):
            a = torch.eye(9, dtype=dtype, device=device) * size
            torch.testing.assert_close(slogdet(a)[1].item(), 9 * math.log(size), rtol=1e-15, atol=0)


@pytest.mark.parametrize("n", [4, 8, 16, 32, 64])
def test_float32_errs_by_its_rounding_alone(n: int, device: torch.device) -> None:
    """Elimination is in float64: also for ill-conditioned matrices, where a float32 elimination loses most digits."""
    generator = torch.Generator().manual_seed(n)
    u, v = (torch.linalg.qr(torch.randn(20, n, n, dtype=torch.float64, generator=generator))[0] for _ in "uv")
    a = (u * torch.logspace(0, -5, n, dtype=torch.float64) @ v).float().to(device).requires_grad_()
    exact = a.detach().double().requires_grad_()
    sign, logabsdet = slogdet(a)
    want_sign, want = torch.linalg.slogdet(exact)
    assert torch.equal(sign.double(), want_sign)
    torch.testing.assert_close(logabsdet.double(), want, rtol=1.2e-7, atol=0)
    got, truth = (torch.autograd.grad(v.sum(), m)[0].double() for v, m in ((logabsdet, a), (want, exact)))
    assert ((got - truth).abs().amax((1, 2)) <= 1.2e-7 * truth.abs().amax((1, 2))).all()


def test_company_changes_nothing(device: torch.device) -> None:
    """A matrix's result is the same alone as in a batch: bit for bit, whatever pack or thread it lands in."""
    for n in (3, 8, 20, 40):
        a = matrices(37, n, n).float().to(device)
        whole = torch.stack(slogdet(a))
        single = torch.stack([torch.stack(slogdet(m)) for m in a], 1)
        assert torch.equal(whole, single)


def test_autocast_stays_in_float32(device: torch.device) -> None:
    a = matrices(3, 4, 4).bfloat16().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        sign, logabsdet = slogdet(a)
    assert sign.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(logabsdet, slogdet(a.float())[1])


def test_only_the_matrix_is_kept() -> None:
    """Between forward and backward nothing of the matrices' size is held but themselves."""
    a = torch.randn(512, 16, 16, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _, logabsdet = slogdet(a)
        (grad,) = torch.autograd.grad(logabsdet, a, torch.ones(512))
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert grad.nbytes <= peak <= 1.05 * grad.nbytes


def test_gradient_of_the_sign_alone_is_none(device: torch.device) -> None:
    a = matrices(3, 4, 4).to(device).requires_grad_()
    sign, logabsdet = slogdet(a)
    assert not sign.requires_grad and logabsdet.requires_grad
    assert pyflowgen.slogdet(a.detach())[1].requires_grad is False
