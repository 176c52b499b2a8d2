"""The Triton launchers of rational_quadratic_spline run by Triton's interpreter on CPU tensors, chosen by the dispatcher.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

import pytest
import test_rational_quadratic_spline as battery
import torch
from check_triton import launches as launches
from pyflowgen.kernels import tile

import pyflowgen

spline = pyflowgen.rational_quadratic_spline
SAMPLES = {s.name: s for s in battery.samples()}
# One or two of each kind of shape, layout, tails, convention and direction; the battery's others differ in size alone.
NAMES = [
    *(f"nflows-{t}-{d}-8" for t in ("linear", "circular") for d in ("forward", "inverse")),
    *(f"{c}-linear-forward-8" for c in ("zuko", "torchflows", "freia")), "zuko-circular-inverse-8",
    "freia-affine-inverse-8", "freia-linear-inverse-clamp", "freia-affine-forward-clamp", "freia-affine-forward-mask",
    "freia-linear-inverse-separate", "freia-affine-inverse-image",
    "torchflows-circular-inverse-8",
    *(f"{name}-{d}" for name in ("no-tails", "separate", "mixed-tails", "image", "part") for d in ("forward", "inverse")),
    "2-bins", "3-bins", "17-bins", "64-bins", "minima-and-scale", "elementwise-separate", "two-features",
    "image-5-plain", "image-3-channels-last", "image-3-last", "checkerboard", "vector-mask", "every-second",
    "transposed", "batch-of-no-one-stride", "expanded-parameters", "no-batch", "size-0x6", "size-1x1", "size-5x0",
]  # fmt: skip


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu")


FLOAT64 = [
    "freia-affine-inverse-clamp", "freia-linear-forward-image", "torchflows-circular-inverse-8", "mixed-tails-inverse",
    "2-bins",
]  # fmt: skip
HALVES = ["zuko-circular-inverse-8"]
CASES = [
    *((name, torch.float32) for name in NAMES), *((name, torch.float64) for name in FLOAT64),
    *((name, dtype) for name in HALVES for dtype in (torch.bfloat16, torch.float16)),
]  # fmt: skip


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_values_and_gradients(launches, name, dtype, device):
    x = SAMPLES[name].tensors[0]
    battery.test_values_and_gradients(name, dtype, device)
    assert [launch.kernel.__name__ for launch in launches] == ["forward_kernel", "backward_kernel"] * (x.numel() > 0)


def gradients(function, x, params, w0, w1, **options):
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    y, logdet = function(x, params, **options)
    return [y, logdet, *torch.autograd.grad((y * w0).sum() + (logdet * w1).sum(), (x, params))]


def test_a_sums_own_gradient_and_one_output_alone(launches):
    """dlogdet without strides, and gradients that are not there."""
    leaves = [battery.normal(5, 6).float(), battery.normal(5, 6, 11).float()]
    for which in (0, 1):
        found = []
        for function in (spline, pyflowgen.rational_quadratic_spline_reference):
            inputs = [t.clone().requires_grad_() for t in leaves]
            found.append(torch.autograd.grad(function(*inputs, layout="last", part=None)[which].sum(), inputs))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert len(launches) == 4


def test_long_rows_take_several_programs_and_a_second_sum(launches, monkeypatch):
    x, params = 2 * battery.normal(1, 3, 9, 15).float(), battery.normal(1, 118, 9, 15).float()
    w0, w1 = battery.normal(*x.shape, seed=1).float(), battery.normal(1).float()
    options = dict(layout="channels", event_dim=3, part=(0, 1), bins=20)
    want = gradients(
        pyflowgen.rational_quadratic_spline_reference, *(t.double() for t in (x, params, w0, w1)), **options
    )
    want = [t.float() for t in want]
    for wide in (False, True):
        if wide:
            monkeypatch.setattr(tile, "wide", lambda *_: True)
        got = gradients(spline, x, params, w0, w1, **options)
        assert launches[-1].grid == (1, 2) and launches[-1].options["WIDE"] == wide
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_many_short_rows_share_a_program(launches):
    x, params = 2 * battery.normal(70, 2), battery.normal(70, 2, 8)
    w0, w1 = battery.normal(*x.shape, seed=1), battery.normal(70)
    want = gradients(pyflowgen.rational_quadratic_spline_reference, x, params, w0, w1, layout="last")
    torch.testing.assert_close(gradients(spline, x, params, w0, w1, layout="last"), want, rtol=1e-9, atol=1e-9)
    assert 1 < launches[0].grid[0] < 20


def test_what_is_not_transformed_may_have_any_parameters():
    x, params = battery.normal(4, 8).float(), battery.normal(4, 8, 11).float()
    x[1] += 10
    x[2, 1], x[2, 2] = torch.inf, torch.nan  # masked, and not
    params[:, 1::2], mask = torch.nan, torch.arange(8) % 2 == 0
    y, logdet, dx, dparams = gradients(spline, x, params, 1, 1, layout="last", mask=mask)
    assert torch.equal(y[:, ~mask], x[:, ~mask]) and torch.equal(y[1], x[1]) and logdet[1] == 0 and y[2, 2].isnan()
    assert dx.isfinite().all() and not dparams[:, 1::2].any() and not dparams[1].any() and logdet.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_bad_parameters_are_seen(inverse):
    x, params = torch.zeros(3, 1), torch.zeros(3, 1, 11)
    params[0, 0, 1] = params[1, 0, 5] = torch.nan
    y, logdet = spline(x, params, layout="last", inverse=inverse)
    assert y[:2].isnan().all() and logdet[:2].isnan().all() and y[2].isfinite()
    outside, _ = spline(x + 0.5, torch.zeros(3, 1, 13), layout="last", tails=None, bound=(0.0, 1.0))
    assert outside.isfinite().all()
    call = torch.ops.pyflowgen.rational_quadratic_spline  # the layer itself does not let them through
    arguments = list(battery.module._arguments(
        x + 0.5, torch.zeros(3, 1, 13), None, None, (0.0, 1.0), None, inverse, None, None, None, "nflows", 1.0, None, 1,
        "last", None, None, None,
    ))  # fmt: skip
    y, logdet = call(x + 2, *arguments[1:])
    assert y.isnan().all() and logdet.isnan().all()


def test_knots_are_those_of_the_interval():
    """Values at the ends and at the knots, and a round trip through narrow bins."""
    params = 4 * battery.normal(64, 1, 23).float()
    ends = torch.tensor([-3.0, 3.0]).repeat(32)[:, None]
    for inverse in (False, True):
        assert torch.equal(spline(ends, params, layout="last", inverse=inverse)[0], ends)
    y = torch.linspace(-3, 3, 64)[:, None]
    x, logdet = spline(y, params, layout="last", inverse=True)
    back, minus = spline(x, params, layout="last")
    exact = pyflowgen.rational_quadratic_spline_reference(y.double(), params.double(), layout="last", inverse=True)[1]
    # x's own rounding, 2^-23 at most, comes back times the slope.
    assert ((back - y).abs() <= 4 * 2.0**-23 * (1 + (-exact[:, None]).exp())).all()
    torch.testing.assert_close(minus, -logdet, rtol=1e-3, atol=1e-3)


def test_operator(launches):
    """The fakes fit the launchers, nothing is changed or aliased."""
    call, arguments = battery.operator(SAMPLES["mixed-tails-forward"].to(torch.float32))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(call, arguments, test_utils=utils)
    gradients = torch.ones_like(arguments[0]), torch.ones(9)
    torch.library.opcheck(
        torch.ops.pyflowgen.rational_quadratic_spline_backward.default, (*gradients, *arguments), test_utils=utils
    )
    assert {launch.kernel.__name__ for launch in launches} == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(4, 6, dtype=torch.int64), "x is"), (1, torch.zeros(3, 6, 23), "widths is"),
    (1, torch.zeros(4, 6, 22), "widths is"), (2, torch.zeros(4, 6, 8), "heights and derivatives"),
    (4, torch.ones(5), "bound is"), (5, torch.ones(6) > 0, "mixed tails"), (6, torch.ones(5) > 0, "mask is"),
    (7, 65, "bins=65"), (8, 3, "layout=3"), (10, 2, "reach beyond"), (-1, 3, "event_dim"),
])  # fmt: skip
def test_operator_rejects(launches, place, value, message):
    arguments = list(battery.operator(battery.Sample("", (battery.X, battery.P), dict(layout="last")))[1])
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.pyflowgen.rational_quadratic_spline(*arguments)
    with pytest.raises(ValueError, match="dy is"):
        torch.ops.pyflowgen.rational_quadratic_spline_backward(
            torch.zeros(4, 5),
            None,
            *battery.operator(battery.Sample("", (battery.X, battery.P), dict(layout="last")))[1],
        )
    assert not launches
