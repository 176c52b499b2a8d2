"""rational_quadratic_spline: the peers in float64, edges, round trips, and what is special to the op."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import pyflowgen
from pyflowgen import rational_quadratic_spline, rational_quadratic_spline_reference

CONVENTIONS = ("nflows", "zuko", "torchflows")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Equal up to what the peers' inverse loses by cancellation."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def split(params: Tensor, bins: int) -> tuple[Tensor, ...]:
    return params.split((bins, bins, params.shape[-1] - 2 * bins), -1)


# ---------------------------------------------------------------------------------- peers, each in its own convention
@pytest.mark.parametrize("bins, bound", [(2, 1.0), (8, 3.0), (33, 5.0)])
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_nflows(bins: int, bound: float, inverse: bool) -> None:
    peer = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    x, params = 2 * normal(9, 7), 2 * normal(9, 7, 3 * bins - 1)
    y, logdet = peer.unconstrained_rational_quadratic_spline(
        x, *split(params, bins), inverse=inverse, tail_bound=bound, min_bin_width=2e-3, min_derivative=0.1
    )
    options = dict(bound=bound, inverse=inverse, min_bin_width=2e-3, min_derivative=0.1)
    same(rational_quadratic_spline(x, params, layout="last", **options), (y, logdet.sum(-1)))
    same(rational_quadratic_spline(x, *split(params, bins), event_dim=0, **options), (y, logdet))
    # without tails, on an interval of its own
    x = torch.rand(9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = normal(9, 7, 3 * bins + 1)
    ends = dict(left=0.0, right=1.0, bottom=-1.0, top=2.0)
    y, logdet = peer.rational_quadratic_spline(x, *split(params, bins), inverse=inverse, **ends)
    got = rational_quadratic_spline(x, params, layout="last", tails=None, bound=(0.0, 1.0, -1.0, 2.0), inverse=inverse)
    same(got, (y, logdet.sum(-1)))


@pytest.mark.parametrize("tails", [None, "linear"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 6, 4, 4)])
def test_equals_nflows_coupling(tails: str | None, shape: tuple[int, ...]) -> None:
    """Whole layers, with the division by the root of the hidden features, in nflows' own packed layouts."""
    coupling = pytest.importorskip("nflows.transforms.coupling")

    class Net(torch.nn.Module):
        hidden_features = 16

        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.net = torch.nn.Linear(n_in, n_out) if len(shape) == 2 else torch.nn.Conv2d(n_in, n_out, 1)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(x).clone()  # nflows divides it in place

    torch.manual_seed(0)
    peer = coupling.PiecewiseRationalQuadraticCouplingTransform(
        torch.arange(6) % 2, Net, num_bins=5, tails=tails, tail_bound=2.0
    ).double()
    layer = pyflowgen.SplineCoupling(
        peer.transform_net, bins=5, mask="interleaved", tails=tails, bound=2.0 if tails else (0.0, 1.0), scale=0.25,
        event_dim=len(shape) - 1,
    )  # fmt: skip
    x = normal(*shape) if tails else torch.rand(shape, dtype=torch.float64)
    same(layer(x), peer(x))
    y = layer(x)[0]
    same(layer.inverse(y), peer.inverse(y))


@pytest.mark.parametrize("inverse", [False, True])
def test_equals_normflows(inverse: bool) -> None:
    peer = pytest.importorskip("normflows.utils.splines")
    x, bins = 2 * normal(9, 4), 6
    for tails, more in (("linear", -1), ("circular", 0)):
        params = 2 * normal(9, 4, 3 * bins + more)
        y, logdet = peer.unconstrained_rational_quadratic_spline(x, *split(params, bins), inverse=inverse, tails=tails, tail_bound=3.0)  # fmt: skip
        same(rational_quadratic_spline(x, params, layout="last", tails=tails, inverse=inverse), (y, logdet.sum(-1)))
    # a bound for each dimension, tails of both kinds
    bound, tails = torch.tensor([1.0, 2.0, 3.0, math.pi], dtype=torch.float64), ("linear", "circular") * 2
    x, params = x.sign() * torch.minimum(x.abs(), bound), normal(9, 4, 3 * bins + 1)
    y, logdet = peer.unconstrained_rational_quadratic_spline(x, *split(params, bins), inverse=inverse, tails=list(tails), tail_bound=bound)  # fmt: skip
    got = rational_quadratic_spline(x, params, layout="last", tails=tails, bound=bound, inverse=inverse)
    same(got, (y, logdet.sum(-1)))
    got = rational_quadratic_spline(2 * x, params, layout="last", tails=tails, bound=bound)[0]
    outside = (2 * x).abs() > bound
    assert torch.equal(got[outside], (2 * x)[outside])


@pytest.mark.parametrize("slope", [1e-3, 1e-2])
def test_equals_zuko(slope: float) -> None:
    transforms = pytest.importorskip("zuko.transforms")
    x, bins = 3 * normal(9, 7), 8
    params = 2 * normal(9, 7, 3 * bins - 1)
    peer = transforms.MonotonicRQSTransform(*split(params, bins), bound=5.0, slope=slope)
    options = dict(layout="last", convention="zuko", bound=5.0, min_derivative=slope, event_dim=0)
    y, ladj = peer.call_and_ladj(x)
    same(rational_quadratic_spline(x, params, **options), (y, ladj))
    torch.testing.assert_close(rational_quadratic_spline(y, params, inverse=True, **options)[0], peer.inv(y))


def test_equals_torchflows() -> None:
    peer = pytest.importorskip("torchflows.bijections.finite.autoregressive.transformers.spline.rational_quadratic")
    x, params = 20 * normal(9, 7), 2 * normal(9, 7, 23)
    params[..., 8:] *= 500  # it divides these by 1000
    spline = peer.RationalQuadratic(event_shape=(7,), boundary=50.0, n_bins=8)
    options = dict(layout="last", convention="torchflows", bound=50.0)
    same(rational_quadratic_spline(x, params, **options), spline.forward(x, params))
    same(rational_quadratic_spline(x, params, inverse=True, **options), spline.inverse(x, params))


# ------------------------------------------------------------------------------------------------------------- edges
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_logdet_is_that_of_the_jacobian(convention: str) -> None:
    x, params = 2 * normal(6), 2 * normal(3 * 14)
    options = dict(layout="channels", part=(1, 2), convention=convention, bins=5)
    for inverse in (False, True):
        call = lambda x, inverse=inverse: rational_quadratic_spline(x, params, inverse=inverse, **options)  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(lambda x, call=call: call(x)[0], x)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, call(x)[1])
    y, logdet = rational_quadratic_spline(x, params, **options)
    back, minus = rational_quadratic_spline(y, params, inverse=True, **options)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


def hard(elements: int, bins: int, dtype: torch.dtype) -> Tensor:
    """Packed parameters from mild to bins of the least size beside huge ones and derivatives from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(bins)
    spread = 10 ** (3 * torch.rand(elements, 1, generator=generator, dtype=torch.float64) - 1)
    params = spread * torch.randn(elements, 3 * bins - 1, generator=generator, dtype=torch.float64)
    params[:, 2 * bins :] = params[:, 2 * bins :].clamp(-1e3, 1e3)
    return params.to(dtype)


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("bins", [4, 8, 32])
def test_round_trip_errs_at_most_twice_what_rounding_y_costs(bins: int, path: str) -> None:
    """float32: x from y against the x that the exact inverse gives of the exact y rounded to float32."""
    function = rational_quadratic_spline if path == "kernel" else rational_quadratic_spline_reference
    n, options = 20000, dict(layout="last", event_dim=0)
    params = hard(n, bins, torch.float32)
    x = 6 * torch.rand(n, generator=torch.Generator().manual_seed(0)) - 3
    exact = params.double()
    # a third of them on knots, to float32
    w = 1e-3 + (1 - 1e-3 * bins) * torch.softmax(exact[:, :bins], -1)
    knots = (6 * w.cumsum(-1) - 3)[:, bins // 2].float()
    x[::3] = knots[::3]
    y, _ = function(x, params, **options)
    back, _ = function(y, params, inverse=True, **options)
    true_y, logdet = rational_quadratic_spline_reference(x.double(), exact, **options)
    rounded = rational_quadratic_spline_reference(true_y.float().double(), exact, inverse=True, **options)[0]
    mine, least = (back.double() - x).abs(), (rounded - x).abs()
    # x itself is rounded as well: where the spline is steep that is all there is
    least = torch.maximum(least, torch.finfo(torch.float32).eps / 2 * x.abs())
    assert torch.isfinite(y).all() and torch.isfinite(back).all()
    assert mine.max() <= 2 * least.max()
    for mask in (logdet > -99, logdet > 0, logdet < 0, logdet < -3):
        assert mine[mask].square().mean() <= 4 * least[mask].square().mean()
