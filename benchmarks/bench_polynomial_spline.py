"""Linear, quadratic and cubic splines as nflows has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .harness import Case, Factory, installed, normal

Op = Callable[..., Any]
BOUND, BINS = 3.0, 8
NAMES = ("linear", "quadratic", "cubic")
PARAMETERS = (BINS, 2 * BINS - 1, 2 * BINS + 2)


def providers(degree: int, inverse: bool) -> dict[str, Factory]:
    options: dict[str, Any] = dict(degree=degree, bound=BOUND, inverse=inverse)

    def eager(device: torch.device, dtype: torch.dtype) -> Op:
        from pyflowgen import polynomial_spline_reference

        return lambda x, params: polynomial_spline_reference(x, params, **options)

    def kernel(device: torch.device, dtype: torch.dtype) -> Op:
        from pyflowgen import polynomial_spline

        return lambda x, params: polynomial_spline(x, params, **options)

    def nflows(device: torch.device, dtype: torch.dtype) -> Op:
        from nflows.transforms import splines

        spline = getattr(splines, f"unconstrained_{NAMES[degree - 1]}_spline")
        sizes = ((BINS,), (BINS, BINS - 1), (BINS, BINS, 1, 1))[degree - 1]

        def call(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
            y, logdet = spline(x, *params.split(sizes, -1), inverse=inverse, tail_bound=BOUND)
            return y, logdet.sum(-1)

        return call

    found = {"eager": eager, "pyflowgen": kernel}
    return found | {"nflows": nflows} if installed("nflows") else found


# ---------------------------------------------------------------- cases


def cases(device: torch.device) -> list[Case]:
    x = (8192, 32)
    found = []
    for degree, inverse in ((1, False), (2, False), (3, False), (3, True)):
        inputs = normal(x, (*x, PARAMETERS[degree - 1]))
        name = f"8192x32 {BINS} bins {NAMES[degree - 1]}{' inverse' if inverse else ''}"
        modes = ("inverse",) if inverse else ("forward", "forward+backward")
        found.append(
            Case("polynomial_spline", name, torch.float32, inputs, providers(degree, inverse), modes,
                 compile=() if inverse else ("eager",), quick=degree == 3)
        )  # fmt: skip
    return found
