"""The rational-quadratic spline in each convention in use: a peer is timed on its own map, and we beside it.

"mask-free" is the shortest plain rewrite without boolean masks; under torch.compile it is the strongest rival there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Case, Factory, Inputs, installed, normal

Op = Callable[..., Any]
BOUND = 3.0


def ours(**options: Any) -> dict[str, Factory]:
    """Reference and kernel with the same options."""

    def eager(device: torch.device, dtype: torch.dtype) -> Op:
        from pyflowgen import rational_quadratic_spline_reference

        return lambda x, params: rational_quadratic_spline_reference(x, params, layout="last", bound=BOUND, **options)

    def kernel(device: torch.device, dtype: torch.dtype) -> Op:
        from pyflowgen import rational_quadratic_spline

        return lambda x, params: rational_quadratic_spline(x, params, layout="last", bound=BOUND, **options)

    return {"eager": eager, "pyflowgen": kernel}


def split(params: Tensor) -> tuple[Tensor, ...]:
    bins = (params.shape[-1] + 1) // 3
    return params.split((bins, bins, bins - 1), -1)


def mask_free(inverse: bool) -> dict[str, Factory]:
    def call(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        w, h, d = split(params)
        bins = w.shape[-1]

        def knots(u: Tensor) -> Tensor:
            sizes = 1e-3 + (1 - 1e-3 * bins) * torch.softmax(u, -1)
            return F.pad(2 * BOUND * sizes[..., :-1].cumsum(-1) - BOUND, (1, 0), value=-BOUND)

        knots_x, knots_y = (F.pad(knots(u), (0, 1), value=BOUND) for u in (w, h))
        d = 1e-3 + F.softplus(F.pad(d, (1, 1), value=math.log(math.expm1(1 - 1e-3))))
        inside = (x >= -BOUND) & (x <= BOUND)
        v = x.clamp(-BOUND, BOUND).unsqueeze(-1)
        k = (v >= (knots_y if inverse else knots_x)[..., 1:-1]).sum(-1, keepdim=True)
        x0, y0, d0 = (t.gather(-1, k).squeeze(-1) for t in (knots_x, knots_y, d))
        x1, y1, d1 = (t.gather(-1, k + 1).squeeze(-1) for t in (knots_x, knots_y, d))
        v, width, height = v.squeeze(-1), x1 - x0, y1 - y0
        s = height / width
        more = d0 + d1 - 2 * s
        if inverse:
            rise = v - y0
            a, b, c = height * (s - d0) + rise * more, height * d0 - rise * more, -s * rise
            theta = 2 * c / (-b - torch.sqrt((b * b - 4 * a * c).clamp(min=0)))
        else:
            theta = (v - x0) / width
        product = theta * (1 - theta)
        m = s + more * product
        slope = s * s * (d1 * theta * theta + 2 * s * product + d0 * (1 - theta) * (1 - theta)) / (m * m)
        y = x0 + theta * width if inverse else y0 + height * (s * theta * theta + d0 * product) / m
        logdet = torch.where(inside, -slope.log() if inverse else slope.log(), 0)
        return torch.where(inside, y, x), logdet.sum(-1)

    return {"mask-free": lambda device, dtype: call}


def of_nflows(inverse: bool, library: str) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        if library == "nflows":
            from nflows.transforms.splines import unconstrained_rational_quadratic_spline as spline
        else:
            from normflows.utils.splines import unconstrained_rational_quadratic_spline as spline

        def call(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            y, logdet = spline(x, *split(params), inverse=inverse, tails="linear", tail_bound=BOUND)
            return y, logdet.sum(-1)

        return call

    return {library: make} if installed(library) else {}


def of_zuko() -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from zuko.transforms import DependentTransform, MonotonicRQSTransform

        return lambda x, params: DependentTransform(
            MonotonicRQSTransform(*split(params), bound=BOUND), 1
        ).call_and_ladj(x)

    return {"zuko": make} if installed("zuko") else {}


# ---------------------------------------------------------------- cases


def off_knots(drawn: Inputs, eager: Factory) -> Inputs:
    """x moved where a knot is within a few roundings: the gradient jumps there, and rounding decides on the side."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, params = drawn(device, dtype)
        exact, wide = eager(device, torch.float64), params.double()

        def slope(at: Tensor) -> Tensor:
            at = at.double().requires_grad_()
            return torch.autograd.grad(exact(at, wide)[1].sum(), at)[0]

        before, after = slope(x - 1e-6), slope(x + 1e-6)
        jumps = (after - before).abs() > 1e-2 * (1 + before.abs())
        return torch.where(jumps, x + 1e-4, x), params

    return make


def cases(device: torch.device) -> list[Case]:
    def case(
        label: str,
        x: tuple[int, ...],
        bins: int,
        providers: dict[str, Factory],
        modes: tuple[str, ...] = ("forward", "forward+backward"),
        dtype: torch.dtype = torch.float32,
        quick: bool = False,
        compile: tuple[str, ...] = ("mask-free",),
    ) -> Case:
        size = "x".join(map(str, x))
        inputs = off_knots(normal(x, (*x, 3 * bins - 1)), providers["eager"])
        name = f"{size} {bins} bins {label}"
        return Case("rational_quadratic_spline", name, dtype, inputs, providers, modes, compile=compile, quick=quick)

    n, d = 8192, 32
    peers = of_nflows(False, "nflows") | of_nflows(False, "normflows")
    inverse_peers = of_nflows(True, "nflows") | of_nflows(True, "normflows")
    forward, zuko = ours() | mask_free(False), ours(convention="zuko") | of_zuko()
    inverse = ours(inverse=True) | mask_free(True) | inverse_peers
    found = [
        case("softmax", (n, d), 8, forward | peers, quick=True),
        case("softmax inverse", (n, d), 8, inverse, ("inverse",), quick=True),
        case("softmax inverse", (n, d), 8, ours(inverse=True) | mask_free(True), ("forward+backward",)),
        case("softclip", (n, d), 8, zuko, quick=True, compile=()),
        case("softmax", (n, d), 16, forward),
        case("softmax", (64, 2), 8, forward | peers),
    ]
    return found
