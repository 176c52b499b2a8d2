"""polynomial_spline: the battery, nflows in float64, round trips, and what is special to the op."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from check_op import Op, Sample, op_tests
from torch import Tensor

import pyflowgen
from pyflowgen import cubic_spline, linear_spline, polynomial_spline, polynomial_spline_reference, quadratic_spline
from pyflowgen.ops import polynomial_spline as module

DEGREES = (1, 2, 3)
sizes = module._sizes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def per(degree: int, bins: int, tails: str | None = "linear") -> int:
    return sum(sizes(degree, bins, tails))


def samples() -> list[Sample]:
    result = []
    add = lambda name, *tensors, **options: result.append(Sample(name, tensors, options))  # noqa: E731
    for degree, inverse in itertools.product(DEGREES, (False, True)):
        name, options = f"{degree}-{'inverse' if inverse else 'forward'}", dict(degree=degree, inverse=inverse)
        add(f"{name}-8", 1.5 * normal(9, 21), normal(9, 21, per(degree, 8)), **options)
        add(f"{name}-2", normal(9, 5), normal(9, 5, per(degree, 2)), bound=2.0, **options)
        x = torch.rand(9, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(degree)) * 0.9 + 0.04
        add(f"{name}-no-tails", x, normal(9, 21, per(degree, 5, None)), tails=None, bound=(0.0, 1.0), **options)
        add(f"{name}-part", 2 * normal(9, 40), normal(9, 20 * per(degree, 4)), layout="channels", part=(1, 2), bins=4,
            **options)  # fmt: skip
        add(f"{name}-image", 2 * normal(3, 2, 4, 8), normal(3, 2 * per(degree, 8), 4, 8), layout="channels",
            event_dim=3, **options)  # fmt: skip
    for degree in DEGREES:
        add(f"{degree}-17-bins", 2 * normal(17, 3), normal(17, 3, per(degree, 17)), degree=degree)
        add(f"{degree}-options", 2 * normal(9, 7), 3 * normal(9, 7, per(degree, 8)), degree=degree, min_bin_width=0.02,
            min_bin_height=0.05, scale=0.3, bound=torch.linspace(1, 3, 7))  # fmt: skip
        checkerboard = (torch.arange(6)[:, None] + torch.arange(5)) % 2 == 1
        add(f"{degree}-checkerboard", 2 * normal(3, 2, 6, 5), normal(3, 2 * per(degree, 4), 6, 5), degree=degree,
            layout="channels", event_dim=3, mask=checkerboard)  # fmt: skip
    add("64-bins", 2 * normal(60, 5), normal(60, 5, per(3, 64)) / 2, degree=3)
    add("elementwise", 2 * normal(4, 3, 7), normal(4, 3, 7, per(3, 8)), degree=3, event_dim=0)
    add("every-second", 2 * normal(4, 66)[:, ::2], normal(4, 33, 2 * per(2, 4))[..., ::2], degree=2)
    add("transposed", normal(23, 9).t(), normal(23 * per(2, 4), 9).t(), degree=2, layout="channels")
    add("expanded", 2 * normal(7, 18), normal(18, per(3, 8)), degree=3)
    add("no-batch", 2 * normal(9), normal(9, 10), degree=3)
    add("long-rows", 2 * normal(1, 2, 48, 50), normal(1, 20, 48, 50), degree=3, layout="channels", event_dim=3)
    for batch, features in ((0, 6), (1, 1), (5, 0), (123, 1)):
        add(f"size-{batch}x{features}", 2 * normal(batch, features), normal(batch, features, per(2, 4)), degree=2)
    return result


def small() -> list[Sample]:
    result = []
    for degree, inverse, tails in itertools.product(DEGREES, (False, True), (None, "linear")):
        x = torch.rand(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
        options = dict(degree=degree, inverse=inverse, tails=tails, bound=1.0 if tails else (0.0, 1.0))
        result.append(Sample(f"{degree}-{inverse}-{tails}", (x, normal(3, 2, per(degree, 4, tails))), options))
    options = dict(degree=3, layout="channels", part=(1, 2), bins=2)
    result.append(Sample("part", (normal(2, 5), normal(2, 12)), options))
    mask = dict(degree=2, layout="channels", event_dim=3, mask=torch.eye(2) > 0)
    result.append(Sample("mask", (normal(2, 1, 2, 2), normal(2, 3, 2, 2)), mask))
    return result


DEFAULTS = dict(
    bound=3.0, tails="linear", inverse=False, min_bin_width=1e-3, min_bin_height=1e-3, scale=1.0, event_dim=1,
    layout="last", bins=None, part=None, mask=None,
)  # fmt: skip


def operator(sample: Sample) -> Any:
    options = {**DEFAULTS, **sample.options}
    return torch.ops.pyflowgen.polynomial_spline.default, module._arguments(*sample.tensors, **options)


spline = polynomial_spline
X, P = torch.zeros(4, 6), torch.zeros(4, 6, 18)
W = torch.zeros(4, 6, 8)
BAD = [
    ("shape", lambda: spline(X, P[:3], degree=3), ValueError, r"params has shape \(3, 6, 18\), expected \(4, 6, 18\)"),
    ("odd", lambda: spline(X, P[..., 1:], degree=3), ValueError, r"expected 2 K\+2 parameters an element"),
    ("even", lambda: spline(X, P, degree=2), ValueError, r"expected 2 K-1 parameters an element"),
    ("channels", lambda: spline(X, P[:, 0], degree=3, layout="channels"), ValueError, r"params has shape \(4, 18\), expected"),
    ("degree", lambda: spline(X, P, degree=4), ValueError, "degree must be 1, 2 or 3, got 4"),
    ("bins", lambda: spline(X, P, degree=3, bins=7), ValueError, "bins is 7, but params"),
    ("too few bins", lambda: spline(X, P[..., :1], degree=1), ValueError, "bins must be from 2 to 64, got 1"),
    ("dtype", lambda: spline(X, P.double(), degree=3), ValueError, "params is torch.float64"),
    ("integers", lambda: spline(X.long(), P.long(), degree=3), TypeError, "x must be a floating-point"),
    ("no tensor", lambda: spline(X, 3.0, degree=3), TypeError, "must be tensors"),
    ("layout", lambda: spline(X, P, degree=3, layout="first"), ValueError, "layout must be one of"),
    ("tails", lambda: spline(X, P, degree=3, tails="circular"), ValueError, "tails must be one of"),
    ("bound", lambda: spline(X, P, degree=3, bound=-1.0), ValueError, "bound must be positive"),
    ("bounds of x and y", lambda: spline(X, P, degree=3, bound=(0.0, 1.0, 0.0, 2.0)), ValueError, "only for tails=None"),
    ("tensor of bounds", lambda: spline(X, P, degree=3, bound=torch.ones(5)), ValueError, r"bound has shape \(5,\), expected \(6,\)"),
    ("outside", lambda: spline(X + 4, P, degree=3, tails=None), ValueError, "x has 24 elements outside"),
    ("min_bin_width", lambda: spline(X, P, degree=3, min_bin_width=0.2), ValueError, "min_bin_width is 0.2, too large for 8 bins"),
    ("scale", lambda: spline(X, P, degree=3, scale=0.0), ValueError, "scale must be positive"),
    ("event_dim", lambda: spline(X, P, degree=3, event_dim=3), ValueError, "event_dim must be between"),
    ("part", lambda: spline(X, P, degree=3, part=(4, 1)), ValueError, r"part=\(start=4, step=1\)"),
    ("part without bins", lambda: spline(X, P[:, 0], degree=3, layout="channels", part=(4, 1)), ValueError, "bins must be given"),
    ("mask shape", lambda: spline(X, P, degree=3, mask=torch.ones(5, dtype=torch.bool)), ValueError, "mask has shape"),
    ("heights", lambda: quadratic_spline(X, W, W[:3]), ValueError, r"widths \(4, 6, 8\), heights \(3, 6, 8\): expected"),
    ("no derivatives", lambda: cubic_spline(X, W, W), ValueError, "give widths, heights, derivatives and no layout"),
    ("operator's own check", lambda: torch.ops.pyflowgen.polynomial_spline(*operator(Sample("", (X, P), dict(degree=3)))[1][:5], 9, *operator(Sample("", (X, P), dict(degree=3)))[1][6:]), RuntimeError, "do not have the shape"),
]  # fmt: skip

globals().update(
    op_tests(
        Op(
            name="polynomial_spline",
            function=polynomial_spline,
            reference=polynomial_spline_reference,
            samples=samples,
            small=small,
            operator=operator,
            resize=lambda batch: Sample(
                "resize",
                (2 * normal(batch, 6), normal(batch, 3 * per(3, 4))),
                dict(degree=3, layout="channels", part=(3, 1), bins=4),
            ),
            bad=BAD,
            without_fma=2,
            draws=16,  # a few elements near the flattest parts make all the error
        )
    )
)


# --------------------------------------------------------------------------------------------------------- nflows
def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], inverse: bool = False) -> None:
    """Equal; an inverse up to the 1e-6 that nflows' search adds to the last knot, and what its cubic loses."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **(dict(rtol=1e-4, atol=1e-4) if inverse else dict(rtol=1e-9, atol=1e-12)))


@pytest.mark.parametrize("bins", [2, 8, 33])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("degree", DEGREES)
def test_equals_nflows(degree: int, inverse: bool, bins: int) -> None:
    peer = pytest.importorskip("nflows.transforms.splines")
    before = torch.get_default_dtype()
    mine, minima = (linear_spline, quadratic_spline, cubic_spline)[degree - 1], {}
    if degree > 1:
        minima = dict(min_bin_width=2e-3, min_bin_height=5e-3)
    name = ("linear", "quadratic", "cubic")[degree - 1]
    torch.set_default_dtype(torch.float64)  # in which nflows' linear inverse makes its knots
    try:
        for tails in ("linear", None):
            x = 2 * normal(9, 7) if tails else torch.rand(9, 7, generator=torch.Generator().manual_seed(0))
            given = [normal(9, 7, n, seed=i) for i, n in enumerate(sizes(degree, bins, tails))]
            split = [*given[:2], given[2][..., :1], given[2][..., 1:]] if degree == 3 else given
            if tails:
                want = getattr(peer, f"unconstrained_{name}_spline")(
                    x, *split, inverse=inverse, tail_bound=2.5, **minima
                )
                options = dict(bound=2.5)
            else:
                ends = dict(left=0.0, right=1.0, bottom=0.0, top=1.0)
                want = getattr(peer, f"{name}_spline")(x, *split, inverse=inverse, **ends, **minima)
                options = dict(bound=(0.0, 1.0), tails=None)
            same(mine(x, *given, inverse=inverse, event_dim=0, **options, **minima), want, inverse)
            got = mine(x, torch.cat(given, -1), inverse=inverse, **options, **minima)
            same(got, (want[0], want[1].sum(-1)), inverse)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("degree, tails", [(1, "linear"), (2, "linear"), (2, None), (3, "linear")])
def test_equals_nflows_coupling(degree: int, tails: str | None) -> None:
    coupling = pytest.importorskip("nflows.transforms.coupling")

    class Net(torch.nn.Module):
        hidden_features = 16

        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.net = torch.nn.Linear(n_in, n_out)

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.net(x).clone()  # nflows divides it in place

    torch.manual_seed(0)
    name = ("Linear", "Quadratic", "Cubic")[degree - 1]
    peer = getattr(coupling, f"Piecewise{name}CouplingTransform")(
        torch.arange(6) % 2, Net, num_bins=5, tails=tails, tail_bound=2.0
    ).double()
    layer = pyflowgen.PolynomialSplineCoupling(
        peer.transform_net, degree=degree, bins=5, mask="interleaved", tails=tails,
        bound=2.0 if tails else (0.0, 1.0), scale=0.25 if degree > 1 else 1.0,
    )  # fmt: skip
    x = normal(5, 6) if tails else torch.rand(5, 6, dtype=torch.float64)
    y, logdet = layer(x)
    same((y, logdet), peer(x))
    back, minus = layer.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


# ------------------------------------------------------------------------------------------------------------ edges
@pytest.mark.parametrize("degree", DEGREES)
def test_logdet_is_that_of_the_jacobian(degree: int) -> None:
    x, params = 2 * normal(6), 2 * normal(3 * per(degree, 5))
    for inverse in (False, True):
        options = dict(degree=degree, layout="channels", part=(1, 2), bins=5, inverse=inverse)
        jacobian = torch.autograd.functional.jacobian(lambda x, o=options: polynomial_spline(x, params, **o)[0], x)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, polynomial_spline(x, params, **options)[1])
    # different intervals for x and y
    x, params = torch.rand(6, dtype=torch.float64), normal(6, per(degree, 5, None))
    options = dict(degree=degree, bound=(0.0, 1.0, -1.0, 3.0), tails=None)
    jacobian = torch.autograd.functional.jacobian(lambda x: polynomial_spline(x, params, **options)[0], x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, polynomial_spline(x, params, **options)[1])


@pytest.mark.parametrize("path", ["kernel", "reference"])
@pytest.mark.parametrize("bins", [4, 8, 32])
@pytest.mark.parametrize("degree", DEGREES)
def test_round_trip_errs_at_most_twice_what_rounding_y_costs(degree: int, bins: int, path: str) -> None:
    """float32: x from y against the x that the exact inverse gives of the exact y rounded to float32."""
    function = polynomial_spline if path == "kernel" else polynomial_spline_reference
    n, options = 20000, dict(degree=degree, event_dim=0)
    generator = torch.Generator().manual_seed(bins)
    spread = 10 ** (3 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 1)
    params = spread.clamp(max=10 if degree == 1 else 100) * normal(n, per(degree, bins))
    if degree == 3:
        params[:, -2:] = params[:, -2:].clamp(-8, 8)
    params = params.float()
    x = 6 * torch.rand(n, generator=generator) - 3
    y, _ = function(x, params, **options)
    back, _ = function(y, params, inverse=True, **options)
    true_y, logdet = polynomial_spline_reference(x.double(), params.double(), **options)
    rounded = polynomial_spline_reference(true_y.float().double(), params.double(), inverse=True, **options)[0]
    mine, least = (back.double() - x).abs(), (rounded - x).abs()
    # x itself is rounded as well: where the spline is steep that is all there is
    least = torch.maximum(least, torch.finfo(torch.float32).eps / 2 * x.abs())
    assert torch.isfinite(y).all() and torch.isfinite(back).all()
    assert mine.max() <= 2 * least.max()
    for mask in (logdet > -99, logdet > 0, logdet < 0, logdet < -3):
        if mask.any():
            assert mine[mask].square().mean() <= 4 * least[mask].square().mean()


@pytest.mark.parametrize("degree", DEGREES)
def test_ends_and_parameters_that_are_not_finite(degree: int) -> None:
    params = normal(4, per(degree, 8)).float()
    x = torch.tensor([-3.0, 3.0, -3.5, math.nan])
    y, logdet = polynomial_spline(x, params, degree=degree, event_dim=0)
    torch.testing.assert_close(y[:3], x[:3], rtol=0, atol=0)
    assert logdet[:3].isfinite().all() and logdet[2] == 0 and y[3].isnan()
    params[0, 1] = math.nan
    params[1, 1] = 1e30 if degree > 1 else 50.0  # log 0 would be all of a linear spline
    x = torch.tensor([0.5, 0.5, 0.5, -0.5])
    got = polynomial_spline(x, params, degree=degree, event_dim=0)
    want = polynomial_spline_reference(x.double(), params.double(), degree=degree, event_dim=0)
    assert want[0][0].isnan()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4, equal_nan=True)
