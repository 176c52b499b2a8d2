"""rational_quadratic_spline: the battery, the peers in float64, edges, round trips, and what is special to the op."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from check_op import Op, Sample, op_tests
from torch import Tensor, nn

import pyflowgen
from pyflowgen import rational_quadratic_spline, rational_quadratic_spline_reference
from pyflowgen.ops import rational_quadratic_spline as module

CONVENTIONS = ("nflows", "zuko", "torchflows", "freia")
# A convention, its tails, and how many parameters more than three for each bin.
KINDS = [
    *itertools.product(CONVENTIONS[:3], ("linear", "circular")), ("freia", "linear"), ("freia", "affine"),
]  # fmt: skip
COUNTS = {
    (convention, tails): pyflowgen.SplineCoupling.params_per_element(0, tails, convention)
    for convention, tails in KINDS
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    """Equal up to what the peers' inverse loses by cancellation."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def split(params: Tensor, bins: int) -> tuple[Tensor, ...]:
    return params.split((bins, bins, params.shape[-1] - 2 * bins), -1)


def samples() -> list[Sample]:
    result = []
    add = lambda name, *tensors, **options: result.append(Sample(name, tensors, options))  # noqa: E731
    for (convention, tails), inverse in itertools.product(KINDS, (False, True)):
        options = dict(convention=convention, tails=tails, inverse=inverse)
        name, more = f"{convention}-{tails}-{'inverse' if inverse else 'forward'}", COUNTS[convention, tails]
        add(f"{name}-8", 1.5 * normal(9, 21), normal(9, 21, 24 + more), layout="last", **options)
        if convention == "nflows":
            add(f"{name}-5", 1.5 * normal(9, 21), normal(9, 21, 15 + more), layout="last", bound=2.0, **options)
        if convention == "freia":
            options |= dict(layout="last", domain_clamp=2.5, min_derivative=0.05)
            more += 15
            bound = (-1.0, 2.0) if tails == "linear" else (-1.0, 2.0, 0.0, 1.5)
            add(f"{name}-clamp", 1.5 * normal(9, 21), normal(9, 21, more), bound=bound, **options)
            add(f"{name}-mask", 2 * normal(5, 17), normal(5, 17, more), mask=torch.arange(17) % 3 > 0, **options)
            separate = split(normal(9, 5, more), 5)
            add(f"{name}-separate", 2 * normal(9, 5), *separate, **{**options, "layout": None})
            options |= dict(layout="channels", event_dim=3, part=(1, 1), bins=5)
            add(f"{name}-image", 2 * normal(9, 3, 4, 6), normal(9, 2 * more, 4, 6), **options)
    for inverse in (False, True):
        name, x = (
            "inverse" if inverse else "forward",
            torch.rand(9, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.04,
        )
        add(f"no-tails-{name}", x, normal(9, 21, 13), layout="last", tails=None, bound=(0.0, 1.0), inverse=inverse)
        add(f"separate-{name}", 2 * normal(9, 21), *split(normal(9, 21, 23), 8), inverse=inverse)
        add(
            f"separate-tensors-{name}",
            2 * normal(9, 5),
            normal(9, 5, 8),
            normal(9, 5, 8, seed=1),
            normal(9, 5, 7),
            inverse=inverse,
        )
        add(f"mixed-tails-{name}", 2 * normal(9, 4), normal(9, 4, 19), layout="last", inverse=inverse,
            tails=("linear", "circular", "circular", "linear"), bound=torch.tensor([1.0, 2.0, 3.0, 2.5]))  # fmt: skip
        add(
            f"image-{name}",
            2 * normal(3, 2, 4, 8),
            normal(3, 46, 4, 8),
            layout="channels",
            event_dim=3,
            inverse=inverse,
        )
        add(
            f"part-{name}",
            2 * normal(9, 40),
            normal(9, 20 * 11),
            layout="channels",
            part=(1, 2),
            bins=4,
            inverse=inverse,
        )
    for bins in (2, 3, 4, 10, 16, 17, 32, 64):
        add(f"{bins}-bins", 2 * normal(17, 3), normal(17, 3, 3 * bins - 1), layout="last")
    for bins, least in ((8, 0.1), (10, 1e-3), (16, 0.03), (32, 0.0155)):
        least = dict(min_bin_width=least, min_bin_height=least / 2)
        add(
            f"{bins}-bins-inverse", 2 * normal(37, 3), normal(37, 3, 3 * bins - 1), layout="last", inverse=True, **least
        )
    add("minima-and-scale", 2 * normal(9, 7), 3 * normal(9, 7, 23), layout="last", min_bin_width=0.02, min_bin_height=0.05,
        min_derivative=0.1, scale=0.3)  # fmt: skip
    add("elementwise", 2 * normal(4, 3, 7), normal(4, 3, 7, 23), layout="last", event_dim=0)
    add("elementwise-separate", 2 * normal(4, 3, 7), *split(normal(4, 3, 7, 23), 8), event_dim=0)
    add("two-features", 2 * normal(70, 2), normal(70, 23), layout="channels", part=(1, 1), bins=8)
    add("rows-of-seven", 2 * normal(70, 14), normal(70, 7 * 23), layout="channels", part=(7, 1), bins=8)
    # Images: lanes along pixels, also where a picture is no multiple of a register or lies channels last.
    for size, kind in itertools.product((3, 5, 7), ("plain", "channels-last", "last")):
        x, params = 2 * normal(2, 4, size, size), normal(2, 8 * 3, size, size)
        if kind == "channels-last":
            x, params = (t.contiguous(memory_format=torch.channels_last) for t in (x, params))
        if kind == "last":
            add(f"image-{size}-{kind}", x, normal(2, 3, size, size, 8), layout="last", event_dim=3, part=(1, 1))
        else:
            add(f"image-{size}-{kind}", x, params, layout="channels", event_dim=3, part=(0, 1), bins=3)
    checkerboard = (torch.arange(6)[:, None] + torch.arange(5)) % 2 == 1
    add("checkerboard", 2 * normal(3, 2, 6, 5), normal(3, 22, 6, 5), layout="channels", event_dim=3, mask=checkerboard)
    add("vector-mask", 2 * normal(5, 33), normal(5, 33, 11), layout="last", mask=torch.arange(33) % 3 == 0)
    # Strides: slices, transposes, expanded parameters, a batch that is no single stride, several batch dimensions.
    add("every-second", 2 * normal(4, 66)[:, ::2], normal(4, 33, 22)[..., ::2], layout="last")
    add("transposed", normal(23, 9).t(), normal(23 * 11, 9).t(), layout="channels")
    add("batch-of-no-one-stride", 2 * normal(4, 5, 6).transpose(0, 1), normal(5, 4, 66), layout="channels")
    add("expanded-parameters", 2 * normal(7, 18), normal(18, 23).expand(7, 18, 23), layout="last")
    add("unconditional", 2 * normal(7, 18), *(t.expand(7, *t.shape) for t in split(normal(18, 23), 8)))
    add("many-batch-dimensions", 2 * normal(2, 3, 2, 2, 9), normal(2, 3, 2, 2, 9, 11), layout="last")
    add("no-batch", 2 * normal(9), normal(9, 11), layout="last")
    add("long-rows", 2 * normal(1, 2, 48, 50), normal(1, 16, 48, 50), layout="channels", event_dim=3)
    add(
        "long-rows-part",
        2 * normal(2, 3, 50, 43),
        normal(2, 16, 50, 43),
        layout="channels",
        event_dim=3,
        part=(1, 1),
        bins=3,
    )
    for batch, features in ((0, 6), (1, 1), (1, 2), (5, 0), (123, 1), (5, 123)):
        add(f"size-{batch}x{features}", 2 * normal(batch, features), normal(batch, features, 11), layout="last")
    return result


def small() -> list[Sample]:
    result = []
    for (convention, tails), inverse in itertools.product(KINDS, (False, True)):
        params = normal(3, 2, 12 + COUNTS[convention, tails])
        options = dict(layout="last", convention=convention, tails=tails, inverse=inverse)
        result.append(Sample(f"{convention}-{tails}-{inverse}", (2 * normal(3, 2), params), options))
    options = dict(layout="last", tails=None, bound=(0.0, 1.0), inverse=True)
    result.append(
        Sample(
            "no-tails",
            (torch.rand(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), normal(2, 2, 7)),
            options,
        )
    )
    result.append(Sample("separate", (normal(2, 3), *split(normal(2, 3, 8), 3)), {}))
    result.append(Sample("part", (normal(2, 5), normal(2, 10)), dict(layout="channels", part=(1, 2), bins=2)))
    options = dict(layout="last", tails=("linear", "circular"), bound=torch.tensor([1.0, 2.0]))
    result.append(Sample("mixed-tails", (normal(3, 2), normal(3, 2, 10)), options))
    mask = dict(layout="channels", event_dim=3, mask=torch.eye(2) > 0)
    result.append(Sample("mask", (normal(2, 1, 2, 2), normal(2, 5, 2, 2)), mask))
    return result


DEFAULTS = dict(
    bound=3.0, tails="linear", inverse=False, min_bin_width=None, min_bin_height=None, min_derivative=None,
    convention="nflows", scale=1.0, domain_clamp=None, event_dim=1, layout=None, bins=None, part=None, mask=None,
)  # fmt: skip


def operator(sample: Sample):
    options = {**DEFAULTS, **sample.options}
    tensors = (*sample.tensors, None, None)[:4]
    return torch.ops.pyflowgen.rational_quadratic_spline.default, module._arguments(*tensors, **options)


spline = rational_quadratic_spline
X, P, F = torch.zeros(4, 6), torch.zeros(4, 6, 23), torch.zeros(4, 6, 24)
W, D = torch.zeros(4, 6, 8), torch.zeros(4, 6, 7)
BAD = [
    ("packed shape", lambda: spline(X, P[:3], layout="last"), ValueError, r"widths has shape \(3, 6, 23\), expected \(4, 6, 23\)"),
    ("packed length", lambda: spline(X, P[..., 1:], layout="last"), ValueError, r"expected 3 K-1 parameters an element"),
    ("circular length", lambda: spline(X, P, layout="last", tails="circular"), ValueError, r"expected 3 K parameters"),
    ("channels", lambda: spline(X, P[:, 0], layout="channels"), ValueError, r"widths has shape \(4, 23\), expected"),
    ("heights", lambda: spline(X, W, W[..., 1:], D), ValueError, r"heights has shape \(4, 6, 7\), expected \(4, 6, 8\)"),
    ("derivatives", lambda: spline(X, W, W, W), ValueError, r"derivatives has shape \(4, 6, 8\), expected \(4, 6, 7\)"),
    ("no layout", lambda: spline(X, P), ValueError, "packed parameters and their layout"),
    ("layout and heights", lambda: spline(X, W, W, D, layout="last"), ValueError, "no layout"),
    ("bins", lambda: spline(X, P, layout="last", bins=7), ValueError, "bins is 7, but widths"),
    ("too few bins", lambda: spline(X, P[..., :2], layout="last"), ValueError, "bins must be from 2 to 64, got 1"),
    ("too many bins", lambda: spline(X, torch.zeros(4, 6, 194), layout="last"), ValueError, "bins must be from 2 to 64"),
    ("dtype", lambda: spline(X, P.double(), layout="last"), ValueError, "widths is torch.float64"),
    ("integers", lambda: spline(X.long(), P.long(), layout="last"), TypeError, "x must be a floating-point"),
    ("no tensor", lambda: spline(X, 3.0), TypeError, "must be tensors"),
    ("convention", lambda: spline(X, P, layout="last", convention="pyro"), ValueError, "convention must be one of"),
    ("layout", lambda: spline(X, P, layout="first"), ValueError, "layout must be one of"),
    ("tails", lambda: spline(X, P, layout="last", tails="cubic"), ValueError, "tails must be 'linear'"),
    ("bound", lambda: spline(X, P, layout="last", bound=-1.0), ValueError, "bound must be positive"),
    ("bounds of x and y", lambda: spline(X, P, layout="last", bound=(0.0, 1.0, 0.0, 2.0)), ValueError, "only for tails None"),
    ("affine tails", lambda: spline(X, P, layout="last", tails="affine"), ValueError, "no other has 'affine' ones"),
    ("circular freia", lambda: spline(X, P, layout="last", tails="circular", convention="freia"), ValueError, "'freia' has 'linear' or 'affine' tails"),
    ("scale of freia", lambda: spline(X, F, layout="last", scale=2.0, convention="freia"), ValueError, "and scale=1"),
    ("bounds of freia", lambda: spline(X, F, layout="last", bound=torch.ones(6), convention="freia"), ValueError, "numbers for a bound"),
    ("minima of freia", lambda: spline(X, F, layout="last", min_bin_width=0.1, convention="freia"), ValueError, "are for tails='affine'"),
    ("length of freia", lambda: spline(X, P, layout="last", convention="freia"), ValueError, "expected 3 K parameters"),
    ("min_bin_height of freia", lambda: spline(X, torch.zeros(4, 6, 25), layout="last", tails="affine", bound=(0.0, 8.0, 0.0, 0.8), convention="freia"), ValueError, "min_bin_height is 0.1, too large for 8 bins"),
    ("domain_clamp", lambda: spline(X, F, layout="last", domain_clamp=-1.0, convention="freia"), ValueError, "domain_clamp must be positive"),
    ("domain_clamp of nflows", lambda: spline(X, P, layout="last", domain_clamp=1.0), ValueError, "is for convention='freia'"),
    ("tensor of bounds", lambda: spline(X, P, layout="last", bound=torch.ones(5)), ValueError, r"bound has shape \(5,\), expected \(6,\)"),
    ("mixed tails", lambda: spline(X, torch.zeros(4, 6, 25), layout="last", tails=("linear",)), ValueError, "tails has 1 entries"),
    ("outside", lambda: spline(X + 4, torch.zeros(4, 6, 25), layout="last", tails=None), ValueError, "x has 24 elements outside"),
    ("min_bin_width", lambda: spline(X, P, layout="last", min_bin_width=0.2), ValueError, "min_bin_width is 0.2, too large for 8 bins"),
    ("min_derivative", lambda: spline(X, P, layout="last", min_derivative=-1.0), ValueError, "must not be negative"),
    ("scale", lambda: spline(X, P, layout="last", scale=0.0), ValueError, "scale must be positive"),
    ("event_dim", lambda: spline(X, P, layout="last", event_dim=3), ValueError, "event_dim must be between"),
    ("part", lambda: spline(X, P, layout="last", part=(4, 1)), ValueError, r"part=\(start=4, step=1\)"),
    ("part without bins", lambda: spline(X, P[:, 0], layout="channels", part=(4, 1)), ValueError, "bins must be given"),
    ("part and mask", lambda: spline(X, P[:, :2], layout="last", part=(0, 1), mask=X[0] > 0), ValueError, "exclude"),
    ("mask shape", lambda: spline(X, P, layout="last", mask=torch.ones(5, dtype=torch.bool)), ValueError, "mask has shape"),
    ("operator's own check", lambda: torch.ops.pyflowgen.rational_quadratic_spline(*operator(Sample("", (X, P), dict(layout="last")))[1][:7], 9, *operator(Sample("", (X, P), dict(layout="last")))[1][8:]), RuntimeError, "do not have the shape"),
]  # fmt: skip

globals().update(
    op_tests(
        Op(
            name="rational_quadratic_spline",
            function=rational_quadratic_spline,
            reference=rational_quadratic_spline_reference,
            samples=samples,
            small=small,
            operator=operator,
            resize=lambda batch: Sample(
                "resize", (2 * normal(batch, 6), normal(batch, 3 * 11)), dict(layout="channels", part=(3, 1), bins=4)
            ),
            bad=BAD,
            without_fma=2,
            draws=12,  # a few elements near the flattest parts make all the error
        )
    )
)


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
    x = normal(*shape) if tails else torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
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


def freia(x: Tensor, u: Tensor, bins: int, inverse: bool, tails: str, domain: tuple[float, ...], least: tuple[float, float],
          clamp: float | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and log dy/dx of FrEIA's spline by its definition, an element at a time: knots added up, then the bin."""
    log1p_exp = torch.nn.functional.softplus
    raw = lambda value: math.log(math.exp(value) - 1)  # noqa: E731
    squash = lambda s: s if clamp is None else clamp * torch.tanh(s / clamp)  # noqa: E731
    results = []
    for point, p in zip(x.flatten(), u.flatten(0, -2), strict=True):
        w, h, rest = p[:bins], p[bins : 2 * bins], p[2 * bins :]
        if tails == "linear":  # identity_tails
            whole = squash((domain[1] - domain[0]) * log1p_exp(rest[0] + raw(1.0)))
            sizes, begins, rest = (
                [whole * w.exp() / w.exp().sum(), whole * h.exp() / h.exp().sum()],
                [-whole / 2] * 2,
                rest[1:],
            )
        else:
            sizes, begins = [], []
            for v, begin, end, small, shift in (
                (w, domain[0], domain[1], least[0], rest[1]), (h, domain[2], domain[3], least[1], rest[0]),
            ):  # fmt: skip
                size = small + log1p_exp(v + raw((end - begin) / bins - small))
                factor = squash(size.sum()) / size.sum()
                sizes.append(size * factor), begins.append((begin + shift) * factor)
            rest = rest[2:]
        slope = sizes[1].sum() / sizes[0].sum()
        d = [slope, *log1p_exp(rest + raw(1.0)), slope]
        knots = [[begin + size[:k].sum() for k in range(bins + 1)] for begin, size in zip(begins, sizes, strict=True)]
        here, there = (1, 0) if inverse else (0, 1)
        sign = -1 if inverse else 1
        if not knots[here][0] < point <= knots[here][-1]:
            on = (point - begins[here]) * slope**sign + begins[there]
            results.append((on, sign * slope.log()))
            continue
        k = next(k for k in range(bins) if point <= knots[here][k + 1])
        s = sizes[1][k] / sizes[0][k]

        def curve(t: Tensor, k: int = k, s: Tensor = s, d: list[Tensor] = d) -> Tensor:
            return (s * t * t + d[k] * t * (1 - t)) / (s + (d[k] + d[k + 1] - 2 * s) * t * (1 - t))

        t = (point - knots[here][k]) / sizes[here][k]
        if inverse:  # by halving, then one step of Newton, for the gradient
            low, high, target = torch.zeros(()).double(), torch.ones(()).double(), t.detach()
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if curve(middle) < target else (low, middle)
            start = low.clone().requires_grad_()
            (rate,) = torch.autograd.grad(curve(start), start)
            t = low + (t - curve(low)) / rate.detach()
        mix = d[k + 1] * t * t + 2 * s * t * (1 - t) + d[k] * (1 - t) ** 2
        log_slope = (s**2 * mix).log() - 2 * (s + (d[k] + d[k + 1] - 2 * s) * t * (1 - t)).log()
        results.append((knots[there][k] + sizes[there][k] * (t if inverse else curve(t)), sign * log_slope))
    y, l = (torch.stack(r).view(x.shape) for r in zip(*results, strict=True))  # noqa: E741
    return y, l


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails, domain, least, clamp", [
    ("linear", (-3.0, 3.0, -3.0, 3.0), None, None), ("linear", (-1.0, 2.0, -1.0, 2.0), None, 2.5),
    ("affine", (-3.0, 3.0, -3.0, 3.0), None, None), ("affine", (-1.0, 2.0, 0.0, 4.0), (0.2, 0.05), 2.5),
])  # fmt: skip
def test_equals_the_definition_of_freia(
    tails: str, domain: tuple[float, ...], least: tuple[float, float] | None, clamp: float | None, inverse: bool
) -> None:
    bins = 4
    leaves = [4 * normal(6, 9), normal(6, 9, 3 * bins + (1 if tails == "affine" else 0))]
    minima = {} if least is None else dict(min_bin_width=least[0], min_bin_height=least[1])
    options = dict(tails=tails, bound=domain, domain_clamp=clamp, inverse=inverse, convention="freia", **minima)
    found = []
    for function in (
        lambda x, u: freia(x, u, bins, inverse, tails, domain, least or (0.1, 0.1), clamp),
        lambda x, u: rational_quadratic_spline(x, u, layout="last", event_dim=0, **options),
        lambda x, u: rational_quadratic_spline_reference(x, u, layout="last", event_dim=0, **options),
    ):
        inputs = [t.clone().requires_grad_() for t in leaves]
        y, logdet = function(*inputs)
        weights = normal(6, 9, seed=1), normal(6, 9, seed=2)
        grads = torch.autograd.grad((y * weights[0] + logdet * weights[1]).sum(), inputs)
        found.append((y, logdet, *grads))
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tails", ["linear", "affine"])
@pytest.mark.parametrize("shape", [(7, 5), (2, 5, 3, 3)])
def test_equals_freia_coupling(tails: str, shape: tuple[int, ...]) -> None:
    """FrEIA's block, two couplings, where the installed FrEIA has it."""
    layers = pytest.importorskip("FrEIA.modules")
    if not hasattr(layers, "RationalQuadraticSpline"):
        pytest.skip("this FrEIA has no splines: they came after 0.2")
    torch.manual_seed(0)
    net = nn.Linear if len(shape) == 2 else (lambda n_in, n_out: nn.Conv2d(n_in, n_out, 1))
    peer = layers.RationalQuadraticSpline(
        [shape[1:]], subnet_constructor=net, bins=6, identity_tails=tails == "linear"
    ).double()
    options = dict(bins=6, convention="freia", tails=tails, event_dim=len(shape) - 1)
    nets = (peer.subnet1, True), (peer.subnet2, False)
    ours = pyflowgen.Chain(*(pyflowgen.SplineCoupling(net, swap=swap, **options) for net, swap in nets))
    x = 2 * normal(*shape)
    for rev, call in ((False, ours), (True, ours.inverse)):
        (y,), logdet = peer((x,), rev=rev)
        torch.testing.assert_close(call(x), (y, logdet), rtol=1e-6, atol=1e-6)  # its constants are float32


# ------------------------------------------------------------------------------------------------------------- edges
@pytest.mark.parametrize("convention, tails", [(c, "linear") for c in CONVENTIONS] + [("freia", "affine")])
def test_logdet_is_that_of_the_jacobian(convention: str, tails: str) -> None:
    x, params = 2 * normal(6), 2 * normal(3 * (15 + COUNTS[convention, tails]))
    options = dict(layout="channels", part=(1, 2), convention=convention, tails=tails, bins=5)
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
@pytest.mark.parametrize("share", [0.0, 0.4])  # of the interval, by the bins' least sizes
@pytest.mark.parametrize("bins", [4, 5, 8, 10, 16, 32])
def test_round_trip_errs_at_most_twice_what_rounding_y_costs(bins: int, share: float, path: str) -> None:
    """float32: x from y against the x that the exact inverse gives of the exact y rounded to float32."""
    function = rational_quadratic_spline if path == "kernel" else rational_quadratic_spline_reference
    least = share / bins or 1e-3
    n, options = 20000, dict(layout="last", event_dim=0, min_bin_width=least, min_bin_height=least)
    params = hard(n, bins, torch.float32)
    x = 6 * torch.rand(n, generator=torch.Generator().manual_seed(0)) - 3
    exact = params.double()
    # a third of them on knots, to float32
    w = least + (1 - least * bins) * torch.softmax(exact[:, :bins], -1)
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


@pytest.mark.parametrize("bins", [5, 8, 16])
@pytest.mark.parametrize("convention", ["nflows", "torchflows"])
def test_parameters_that_are_not_finite_or_huge(convention: str, bins: int) -> None:
    """NaN where the reference gives NaN, in no other element, and a softmax right for logits far apart."""
    bad = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e5, -3e5, 200.0]).repeat_interleave(2)
    params = normal(16, 3 * bins - 1).float()
    params[::2, 1], params[1::2, bins + 1] = bad[::2], bad[1::2]
    x = torch.linspace(-2.9, 2.9, 16)
    for inverse in (False, True):
        options = dict(layout="last", convention=convention, event_dim=0, inverse=inverse)
        found = []
        kernel, reference = rational_quadratic_spline, rational_quadratic_spline_reference
        for function, dtype in ((kernel, torch.float32), (reference, torch.float64)):
            inputs = x.to(dtype).requires_grad_(), params.to(dtype).requires_grad_()
            values = function(*inputs, **options)
            found.append((*values, *torch.autograd.grad((values[0] + values[1]).sum(), inputs)))
        assert found[1][0].isnan().sum() >= 4
        for a, b in zip(*(f[:2] for f in found), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3, equal_nan=True)
        for a, b in zip(*(f[2:] for f in found), strict=True):
            sound = b.view(16, -1).isfinite().all(1)
            scale = b[sound].abs().max()
            torch.testing.assert_close(a[sound] / scale, (b[sound] / scale).float(), rtol=1e-3, atol=1e-4)


def test_gradients_past_the_cache_are_those_of_small_batches() -> None:
    """Above 16 MB they are written another way, the last group's too."""
    x, params = 2 * normal(5800, 33).float(), normal(5800, 33, 23).float()

    def gradients(x: Tensor, params: Tensor) -> list[Tensor]:
        x, params = x.requires_grad_(), params.requires_grad_()
        y, logdet = rational_quadratic_spline(x, params, layout="last")
        return list(torch.autograd.grad(y.sin().sum() + logdet.sum(), (x, params)))

    parts = [gradients(a.clone(), b.clone()) for a, b in zip(x.split(1000), params.split(1000), strict=True)]
    for whole, *pieces in zip(gradients(x, params), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))
