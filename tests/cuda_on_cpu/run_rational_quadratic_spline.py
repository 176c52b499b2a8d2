"""The op's battery through the CUDA launchers, on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own.

What the battery lacks: rows cut into segments are added up in the same order each time, offsets beyond 31 bits.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import test_rational_quadratic_spline as battery

import pyflowgen
from pyflowgen import _native

for name in ("values_and_gradients", "opcheck", "round_trip_errs_at_most_twice_what_rounding_y_costs"):
    globals()[f"test_{name}"] = getattr(battery, f"test_{name}")
spline = pyflowgen.rational_quadratic_spline


def test_the_launchers_run():
    assert os.environ["PYFLOWGEN_LIBRARY"] == pyflowgen.build_info()["library"]
    assert _native.use_kernel("rational_quadratic_spline", torch.zeros(1))


def test_same_result_each_time():
    x, params = battery.normal(2, 3000).float(), battery.normal(2, 3000, 11).float()
    first, second = (spline(x, params, layout="last") for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_what_is_not_transformed_may_have_any_parameters():
    x, params = battery.normal(4, 8).float(), battery.normal(4, 8, 11).float()
    x[1] += 10
    params[:, 1::2], mask = torch.nan, torch.arange(8) % 2 == 0
    x.requires_grad_(), params.requires_grad_()
    y, logdet = spline(x, params, layout="last", mask=mask)
    dx, dparams = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
    assert torch.equal(y[:, ~mask], x[:, ~mask]) and torch.equal(y[1], x[1]) and logdet[1] == 0
    assert dx.isfinite().all() and not dparams[:, 1::2].any() and not dparams[1].any()


def test_strides_beyond_31_bits():
    # Address space, not memory: only the pages that are touched exist.
    far = 2**31 + 4
    try:
        whole = torch.empty(2 * far + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space")
    values = battery.normal(2, 2, 2, 5).half()
    for strides in ((far, 32, 8, 1), (32, far, 8, 1), (32, 16, far, 1), (32, 16, 8, far // 4)):
        params = whole.as_strided((2, 2, 2, 5), strides)
        params.copy_(values)
        x = params[..., 0]
        got, expected = (spline(x, p, layout="last", event_dim=2) for p in (params, values))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
