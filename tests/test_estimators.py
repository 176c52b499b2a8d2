"""Stochastic traces and log-determinants: exact where they can be, without bias where they cannot."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from pyflowgen import hutchinson_trace, hutchpp_trace, russian_roulette_logdet


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than such small tensors take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def matrix(d: int, seed: int = 0) -> Tensor:
    return torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assert_unbiased(draws: Tensor, truth: Tensor | float, bound: float) -> None:
    """The mean of independent draws within 4.5 standard errors of the truth, and those small enough to mean it."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert (error < bound).all(), f"standard error {error.max():.3g}: too few draws to tell"
    assert ((draws.mean(0) - truth).abs() < 4.5 * error).all(), f"{draws.mean(0)}, expected {truth}, error {error}"


@pytest.mark.parametrize("noise", ["rademacher", "normal"])
@pytest.mark.parametrize("estimate, options", [(hutchinson_trace, {}), (hutchpp_trace, {"products": 6})])
def test_traces_are_unbiased(estimate, options, noise):
    a, n = matrix(6), 20000
    g = torch.Generator().manual_seed(1)
    x = torch.empty(n, 6, dtype=torch.float64)  # every row an independent draw
    draws = estimate(lambda v: v @ a.mT, x, noise=noise, generator=g, **options)
    assert draws.shape == (n,)
    assert_unbiased(draws, a.trace(), 0.1)


def test_signs_have_the_variance_that_theory_gives():
    a = matrix(5)
    draws = hutchinson_trace(
        lambda v: v @ a.mT, torch.empty(100000, 5, dtype=torch.float64), generator=torch.Generator().manual_seed(0)
    )
    symmetric = (a + a.mT) / 2
    want = 2 * (symmetric.square().sum() - symmetric.diagonal().square().sum())
    torch.testing.assert_close(draws.var(), want, rtol=0.05, atol=0)


def test_more_samples_average():
    a = matrix(5)
    x = torch.empty(20000, 5, dtype=torch.float64)
    one, four = (
        hutchinson_trace(lambda v: v @ a.mT, x, samples=k, generator=torch.Generator().manual_seed(0)).var()
        for k in (1, 4)
    )
    torch.testing.assert_close(one / 4, four, rtol=0.1, atol=0)


def test_hutchpp_is_exact_on_low_rank_and_better_on_falling_spectra():
    torch.manual_seed(0)
    u = torch.linalg.qr(matrix(20)).Q
    low = u[:, :3] @ torch.diag(torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)) @ u[:, :3].mT
    x = torch.empty(10, 20, dtype=torch.float64)
    torch.testing.assert_close(hutchpp_trace(lambda v: v @ low, x, products=9), torch.full((10,), 8.0).double())
    full = matrix(4)
    torch.testing.assert_close(
        hutchpp_trace(lambda v: v @ full.mT, x[:, :4], products=12), full.trace().expand(10), rtol=1e-9, atol=1e-9
    )
    falling = u @ torch.diag(torch.arange(1, 21, dtype=torch.float64) ** -2) @ u.mT
    x = torch.empty(500, 20, dtype=torch.float64)
    spread = [
        (estimate(lambda v: v @ falling, x, **options) - falling.trace()).abs().mean()
        for estimate, options in ((hutchinson_trace, {"samples": 12}), (hutchpp_trace, {"products": 12}))
    ]
    assert spread[1] < spread[0] / 5


def test_events_of_more_dimensions_and_16_bits():
    a = matrix(6).float()
    product = lambda v: (v.flatten(-2).float() @ a.mT).reshape(v.shape).to(v.dtype)  # noqa: E731
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.empty(3, 4, 2, 3, dtype=dtype)
        for estimate in (hutchinson_trace, hutchpp_trace):
            got = estimate(product, x, event_dim=2)
            assert got.shape == (3, 4) and got.dtype == torch.float32


def test_trace_is_differentiable():
    a = matrix(4).requires_grad_()
    trace = hutchinson_trace(lambda v: v @ a.mT, torch.empty(1, 4, dtype=torch.float64), samples=3)
    (grad,) = torch.autograd.grad(trace.sum(), a)
    torch.testing.assert_close(grad.diagonal(), torch.ones(4, dtype=torch.float64))


class Contraction(nn.Module):
    """tanh(x W) U with a Jacobian of norm below `lipschitz`."""

    def __init__(self, d: int, lipschitz: float) -> None:
        super().__init__()
        self.w = nn.Parameter(matrix(d, 1) / torch.linalg.matrix_norm(matrix(d, 1), 2))
        self.u = nn.Parameter(matrix(d, 2) / torch.linalg.matrix_norm(matrix(d, 2), 2) * lipschitz)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w) @ self.u


def exact(g: nn.Module, x: Tensor) -> Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda v: v + g(v), x, create_graph=True)
    return torch.linalg.slogdet(jacobian).logabsdet


@pytest.mark.parametrize("truncation, rate", [("geometric", 0.5), ("geometric", 0.25), ("poisson", 2.0)])
@pytest.mark.parametrize("exact_terms", [1, 3])
def test_logdet_and_its_gradient_are_unbiased(truncation, rate, exact_terms):
    g, x, n = Contraction(3, 0.6), matrix(3)[0], 1500
    truth = exact(g, x.clone().requires_grad_())
    point = x.clone().requires_grad_()
    want = torch.autograd.grad(exact(g, point), [point, *g.parameters()])
    generator = torch.Generator().manual_seed(int(10 * rate) + exact_terms)
    draws, gradients = [], []
    for _ in range(n):  # a draw of N serves a batch: each is a call
        point = x.expand(4, 3).clone().requires_grad_()
        gx, logdet = russian_roulette_logdet(
            g, point, exact_terms=exact_terms, truncation=truncation, rate=rate, generator=generator
        )
        draws.append(logdet.mean().detach())
        grads = torch.autograd.grad(logdet.mean(), [point, *g.parameters()])
        gradients.append(torch.cat([grads[0].sum(0), *(p.flatten() for p in grads[1:])]))
    torch.testing.assert_close(gx, g(x).expand(4, 3))
    assert_unbiased(torch.stack(draws), truth.detach(), 0.03)
    assert_unbiased(torch.stack(gradients), torch.cat([w.flatten() for w in want]), 0.08)


def test_many_terms_and_all_signs_are_exact():
    """With all 2^d sign vectors and enough terms nothing is random: the series' limit and its exact gradient."""
    g, d = Contraction(3, 0.4), 3
    signs = torch.tensor([[1.0 if i >> k & 1 else -1.0 for k in range(d)] for i in range(2**d)], dtype=torch.float64)
    x = matrix(3)[0]

    import pyflowgen.estimators as module

    point = x.clone().requires_grad_()
    want = torch.autograd.grad(exact(g, point), [point, *g.parameters()])
    weights = torch.linspace(0.5, 2, 8, dtype=torch.float64)  # each row its own incoming gradient
    before, module._noise = module._noise, lambda *_: signs
    try:
        point = x.expand(8, 3).clone().requires_grad_()
        _, logdet = russian_roulette_logdet(g, point, exact_terms=60)
        grads = torch.autograd.grad(logdet.mean(), [point, *g.parameters()], retain_graph=True)
        weighted = torch.autograd.grad((logdet * weights).sum(), point)[0]
    finally:
        module._noise = before
    torch.testing.assert_close(logdet.mean(), exact(g, x))
    torch.testing.assert_close((grads[0].sum(0), *grads[1:]), want)
    torch.testing.assert_close(weighted, grads[0] * 8 * weights[:, None])


def test_gradient_reaches_the_value_too():
    g = Contraction(3, 0.5)
    x = matrix(3).requires_grad_()
    gx, _ = russian_roulette_logdet(g, x)
    got = torch.autograd.grad(gx.square().sum(), [x, *g.parameters()])
    torch.testing.assert_close(got, torch.autograd.grad(g(x).square().sum(), [x, *g.parameters()]))


def test_memory_does_not_grow_with_the_terms():
    """What is held between forward and backward: x, whatever the number of terms and the depth of g."""

    def held(depth: int, terms: int) -> int:
        g = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(depth)))
        for p in g.parameters():
            p.data *= 0.5
        x = torch.randn(256, 64, requires_grad=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            gx, logdet = russian_roulette_logdet(g, x, exact_terms=terms)
        (gx.sum() + logdet.sum()).backward()
        assert all(p.grad is not None for p in g.parameters())
        return sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")

    g_x_noise_and_logdet = (2 * 256 * 64 + 256) * 4
    assert held(1, 1) == held(6, 30) == g_x_noise_and_logdet


@pytest.mark.parametrize("call, kind, message", [
    (lambda x: hutchinson_trace(lambda v: v, x, samples=0), ValueError, "samples is 0"),
    (lambda x: hutchinson_trace(lambda v: v, x, noise="sobol"), ValueError, "'rademacher' or 'normal'"),
    (lambda x: hutchinson_trace(lambda v: v, x.long()), TypeError, "floating-point"),
    (lambda x: hutchpp_trace(lambda v: v, x, products=2), ValueError, "products is 2, expected at least 3"),
    (lambda x: hutchpp_trace(lambda v: v, x, event_dim=3), ValueError, "event_dim"),
    (lambda x: russian_roulette_logdet(lambda v: v, x, exact_terms=0), ValueError, "exact_terms is 0"),
    (lambda x: russian_roulette_logdet(lambda v: v, x, rate=1.5), ValueError, "rate=1.5"),
    (lambda x: russian_roulette_logdet(lambda v: v, x, truncation="uniform"), ValueError, "'uniform'"),
])  # fmt: skip
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.ones(2, 3))
