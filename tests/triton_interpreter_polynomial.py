"""The Triton launchers of polynomial_spline run by Triton's interpreter on CPU tensors, chosen by the dispatcher.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it. What is the rational quadratic's as
well, cuts of the work and arguments, is tested in triton_interpreter_spline.py.
"""

import pytest
import test_polynomial_spline as battery
import torch
from check_triton import launches as launches
from pyflowgen.kernels import polynomial_spline as kernels

from pyflowgen import polynomial_spline

SAMPLES = {s.name: s for s in battery.samples()}
NAMES = [
    *(f"{n}-{d}-{k}" for n in battery.DEGREES for d in ("forward", "inverse") for k in ("8", "2", "no-tails")),
    *(f"{n}-{d}-part" for n, d in ((1, "inverse"), (2, "forward"), (3, "inverse"))),
    "2-forward-image", "3-inverse-image", *(f"{n}-{k}" for n in battery.DEGREES for k in ("17-bins", "options")),
    "2-checkerboard", "64-bins", "elementwise", "every-second", "transposed", "expanded", "no-batch", "size-0x6",
    "size-1x1", "size-5x0",
]  # fmt: skip
FLOAT64 = ["1-inverse-8", "2-forward-8", "2-inverse-no-tails", "3-inverse-2"]
HALVES = ["1-forward-8", "2-inverse-8", "3-forward-no-tails"]
CASES = [
    *((name, torch.float32) for name in NAMES), *((name, torch.float64) for name in FLOAT64),
    *((name, dtype) for name in HALVES for dtype in (torch.bfloat16, torch.float16)),
]  # fmt: skip


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu")


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_values_and_gradients(launches, name, dtype, device, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 1 << 14)  # the interpreter's time is the number of programs
    x = SAMPLES[name].tensors[0]
    battery.test_values_and_gradients(name, dtype, device)
    assert [launch.kernel.__name__ for launch in launches] == ["forward_kernel", "backward_kernel"] * (x.numel() > 0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("degree", battery.DEGREES)
def test_many_programs(launches, degree, inverse):
    leaves = 2 * battery.normal(17, 3), battery.normal(17, 3, battery.per(degree, 8))
    found = []
    for function in (polynomial_spline, battery.polynomial_spline_reference):
        inputs = [t.clone().requires_grad_() for t in leaves]
        y, logdet = function(*inputs, degree=degree, inverse=inverse)
        weights = (battery.normal(*y.shape, seed=1) * y).sum() + (battery.normal(17) * logdet).sum()
        found.append([y, logdet, *torch.autograd.grad(weights, inputs)])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert launches[0].grid[0] > 1


test_ends = battery.test_ends_and_parameters_that_are_not_finite


@pytest.mark.parametrize("degree", battery.DEGREES)
def test_what_is_not_transformed_may_have_any_parameters(degree):
    per = battery.per(degree, 4)
    x, params = battery.normal(4, 8).float(), battery.normal(4, 8, per).float()
    x[1] += 10
    x[2, 1], x[2, 2] = torch.inf, torch.nan  # masked, and not
    params[:, 1::2], mask = torch.nan, torch.arange(8) % 2 == 0
    x.requires_grad_(), params.requires_grad_()
    y, logdet = polynomial_spline(x, params, degree=degree, mask=mask)
    dx, dparams = torch.autograd.grad(y.sum() + logdet.sum(), (x, params))
    assert torch.equal(y[:, ~mask], x[:, ~mask]) and torch.equal(y[1], x[1]) and logdet[1] == 0 and y[2, 2].isnan()
    assert dx.isfinite().all() and not dparams[:, 1::2].any() and not dparams[1].any() and logdet.isfinite().all()


@pytest.mark.parametrize("degree", battery.DEGREES)
def test_round_trip_through_narrow_bins(degree):
    params = 4 * battery.normal(64, 1, battery.per(degree, 8)).float()
    y = torch.linspace(-3, 3, 64)[:, None]
    x, logdet = polynomial_spline(y, params, degree=degree, inverse=True)
    back, minus = polynomial_spline(x, params, degree=degree)
    exact = battery.polynomial_spline_reference(y.double(), params.double(), degree=degree, inverse=True)[1]
    # x's own rounding, 2^-23 at most, comes back times the slope.
    assert ((back - y).abs() <= 4 * 2.0**-23 * (1 + (-exact[:, None]).exp())).all()
    torch.testing.assert_close(minus, -logdet, rtol=1e-3, atol=1e-3)


def test_operator(launches):
    """The fakes fit the launchers, nothing is changed or aliased."""
    call, arguments = battery.operator(SAMPLES["3-forward-part"].to(torch.float32))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(call, arguments, test_utils=utils)
    gradients = torch.ones_like(arguments[0]), torch.ones(9)
    torch.library.opcheck(
        torch.ops.pyflowgen.polynomial_spline_backward.default, (*gradients, *arguments), test_utils=utils
    )
    assert {launch.kernel.__name__ for launch in launches} == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(4, 6, dtype=torch.int64), "x is"), (1, torch.zeros(3, 6, 18), "params is"),
    (2, torch.ones(5), "bound is"), (3, torch.ones(5) > 0, "mask is"), (4, 4, "degree=4"), (5, 65, "bins=65"),
    (6, 2, "layout=2"), (8, 2, "reach beyond"), (9, 2, "tails=2"),
])  # fmt: skip
def test_operator_rejects(launches, place, value, message):
    arguments = list(battery.operator(battery.Sample("", (battery.X, battery.P), dict(degree=3)))[1])
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.pyflowgen.polynomial_spline(*arguments)
    assert not launches
