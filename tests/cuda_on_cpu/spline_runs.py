"""What the splines' runs on the CUDA launchers share; see run_rational_quadratic_spline.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pyflowgen
from pyflowgen import _native

Spline = Callable[..., tuple[Tensor, Tensor]]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def tests(op: str, spline: Spline, per: int) -> dict[str, Any]:
    """Tests of ``spline(x, params, layout="last", …)``, ``per`` parameters an element."""

    def test_the_launchers_run() -> None:
        assert os.environ["PYFLOWGEN_LIBRARY"] == pyflowgen.build_info()["library"]
        assert _native.use_kernel(op, torch.zeros(1))

    def test_same_result_each_time() -> None:
        x, params = normal(2, 3000), normal(2, 3000, per)
        first, second = (spline(x, params, layout="last") for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])

    def test_what_is_not_transformed_may_have_any_parameters() -> None:
        x, params = normal(4, 8), normal(4, 8, per)
        x[1] += 10
        params[:, 1::2], mask = torch.nan, torch.arange(8) % 2 == 0
        x.requires_grad_(), params.requires_grad_()
        y, logdet = spline(x, params, layout="last", mask=mask)
        dx, dparams = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
        assert torch.equal(y[:, ~mask], x[:, ~mask]) and torch.equal(y[1], x[1]) and logdet[1] == 0
        assert dx.isfinite().all() and not dparams[:, 1::2].any() and not dparams[1].any()

    def test_strides_beyond_31_bits() -> None:
        # Address space, not memory: only the pages that are touched exist.
        far = 2**31 + 4
        try:
            whole = torch.empty(2 * far + 128, dtype=torch.float16)
        except RuntimeError:
            pytest.skip("no address space")
        values = normal(2, 2, 2, per).half()
        for strides in ((far, 64, 16, 1), (64, far, 16, 1), (64, 32, far, 1), (64, 32, 16, 2 * far // per)):
            params = whole.as_strided((2, 2, 2, per), strides)
            params.copy_(values)
            x = params[..., 0]
            got, expected = (spline(x, p, layout="last", event_dim=2) for p in (params, values))
            assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

    return {name: f for name, f in locals().items() if name.startswith("test_")}
