"""The Triton launchers of mlp_coupling run by Triton's interpreter on CPU tensors, chosen by the dispatcher.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

import dataclasses

import pytest
import test_mlp_coupling as battery
import torch
from check_op import op_tests
from check_triton import launches as launches
from pyflowgen.kernels import mlp_coupling as kernels
from pyflowgen.kernels import tile

import pyflowgen
from pyflowgen import _native
from pyflowgen.models import NSF

KERNELS = ["forward_kernel", "backward_kernel", "weight_kernel"]
NAMES = [
    "relu-False", "leaky_relu-True", "silu-False", "tanh-True", "sigmoid-False", "gelu-False", "elu-True", "scale-None", "scale-exp",
    "residual-relu", "residual-gated", "residual-gated-relu", "residual-context-no-gates", "swap", "every-second", "mask", "mask-context-additive", "context",
    "no-bias", "no-hidden", "batch-dimensions", "no-batch", "rows-0",
]  # fmt: skip
# The largest error of so few rows differs by a factor of three between draws of either.
values_and_gradients = op_tests(dataclasses.replace(battery.OP, draws=8))["test_values_and_gradients"]
DOUBLE = ["silu-False", "gelu-False", "residual-gated"]


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu")


def names(launches):
    return [launch.kernel.__name__ for launch in launches]


@pytest.mark.parametrize(
    "name, dtype", [*((n, torch.float32) for n in NAMES), *((n, torch.float64) for n in DOUBLE)], ids=str
)
def test_values_and_gradients(launches, name, dtype, device):
    values_and_gradients(name, dtype, device)
    assert names(launches) == ([] if name == "rows-0" else KERNELS)


def test_what_a_gpu_leaves_to_the_layers(launches):
    sample = next(s for s in battery.samples() if s.name == "wide-rows").to(torch.float32)
    got, want = (f(*sample.tensors, **sample.options) for f in (battery.OP.function, battery.OP.reference))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not launches


def gradients(flow, x, context=None):
    x = x.clone().requires_grad_()
    y, logdet = flow(x) if context is None else flow(x, context)
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape), torch.linspace(0.5, 2, len(x))
    leaves = [x, *(p for p in flow.parameters() if p.requires_grad)]
    total = (y * weights[0]).sum() + (logdet * weights[1]).sum()
    return [y.detach(), logdet.detach(), *torch.autograd.grad(total, leaves, allow_unused=True)]


def stirred(flow, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in flow.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return flow


def compare(flow, x, tolerance=2e-4):
    got = gradients(flow, x)
    with _native.reference_path():
        want = gradients(flow, x)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def chain():
    torch.manual_seed(0)

    def net():
        return torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.Tanh(), torch.nn.Linear(9, 6))

    log_scale, shift = torch.randn(6) / 4, torch.randn(6)
    scale = pyflowgen.ActNorm(6, event_dim=1)
    scale.load_state_dict({**scale.state_dict(), "log_scale": log_scale, "shift": shift}, strict=False)
    scale(torch.randn(8, 6))
    layers = [
        pyflowgen.Permutation(torch.tensor([2, 0, 1, 5, 3, 4])), scale, pyflowgen.AffineCoupling(net(), scale="tanh"),
        pyflowgen.Permutation(torch.tensor([5, 4, 3, 2, 1, 0])), pyflowgen.AffineCoupling(net(), swap=True),
        pyflowgen.Inverse(scale), pyflowgen.Scale(6),
    ]  # fmt: skip
    return stirred(pyflowgen.Chain(*layers))


def test_runs_of_layers(launches):
    flow, x = chain(), torch.randn(11, 6)
    compare(flow, x)
    assert names(launches) == ["forward_kernel"] * 2 + ["backward_kernel", "weight_kernel"] * 2
    compare(pyflowgen.Inverse(flow), x)
    y, logdet = flow(x)
    back, minus = flow.inverse(y.detach())
    torch.testing.assert_close((back, minus), (x, -logdet), rtol=1e-4, atol=1e-4)


def test_spline_couplings_with_residual_networks(launches):
    torch.manual_seed(0)
    flow = stirred(NSF((5,), hidden=12, couplings=2, bins=3), 1)
    compare(flow.bijection, 2 * torch.randn(9, 5), 2e-3)
    assert names(launches).count("backward_kernel") == 2


def test_blocks_follow_each_other_without_a_place_to_keep(launches, monkeypatch):
    monkeypatch.setattr(tile, "PROGRAMS", 2)
    sample = next(s for s in battery.samples() if s.name == "relu-False").to(torch.float32)
    want = battery.OP.reference(*sample.tensors, **sample.options)
    with torch.no_grad():
        got = battery.OP.function(*sample.tensors, **sample.options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert [launch.grid for launch in launches] == [(2,)] and len(sample.tensors[0]) == 70
    assert launches[0].arguments[5].isfinite().all()  # each program in a place of its own


@pytest.mark.parametrize("wide", [False, True])
def test_weights_sum_segments_in_order(launches, wide, monkeypatch):
    sample = battery.sample("", (130,), 4, 2, [5], 4)
    tensors = [t.float().requires_grad_() for t in sample.tensors]
    if wide:
        real = kernels._Step.options
        monkeypatch.setattr(kernels._Step, "options", lambda self, rows: real(self, rows) | {"WIDE": True})
    found = []
    for function in (battery.OP.function, battery.OP.function, battery.OP.reference):
        y, logdet = function(*tensors)
        found.append(torch.autograd.grad(y.square().sum() + logdet.sum(), tensors))
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)
    weights = [launch for launch in launches if launch.kernel.__name__ == "weight_kernel"]
    assert weights[0].grid == (2, 2) and all(launch.options["WIDE"] == wide for launch in launches)


def test_only_the_gradients_that_are_asked_for(launches):
    sample = next(s for s in battery.samples() if s.name == "context").to(torch.float32)
    x, context, *parameters = sample.tensors
    options = {k: v for k, v in sample.options.items() if k != "contextual"}
    context.requires_grad_()
    y, logdet = pyflowgen.mlp_coupling(x, parameters[::2], parameters[1::2], context, **options)
    (got,) = torch.autograd.grad(logdet.sum(), context)
    y, logdet = pyflowgen.mlp_coupling_reference(x, parameters[::2], parameters[1::2], context, **options)
    torch.testing.assert_close(got, torch.autograd.grad(logdet.sum(), context)[0], rtol=1e-4, atol=1e-4)
    assert names(launches) == KERNELS[:2]


def test_precision_follows_torch(launches):
    sample = battery.sample("", (3,), 4, 2, [5], 4).to(torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, precision in (("ieee", "ieee"), ("tf32", "tf32")):
            torch.backends.cuda.matmul.fp32_precision = setting
            with torch.no_grad():
                battery.OP.function(*sample.tensors)
            assert launches[-1].options["C"].precision == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_operator(launches):
    """The fakes fit the launchers, nothing is changed or aliased."""
    call, arguments = battery.operator(battery.sample("", (3,), 6, 3, [4], 6).to(torch.float32))
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(call, arguments, test_utils=utils)
    saved = call(*arguments)[2]
    gradients = torch.ones(3, 6), torch.ones(3)
    torch.library.opcheck(
        torch.ops.pyflowgen.mlp_coupling_backward.default,
        (*gradients, *arguments[:8], saved, *arguments[8:10], True, True), test_utils=utils,
    )  # fmt: skip
    assert set(names(launches)) == set(KERNELS)


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(3, 6, dtype=torch.int64), "x is"), (0, torch.zeros(3, 5), "reach beyond"),
    (1, torch.zeros(2, 1), "context has shape"), (8, [2] * 16, "options"),
    (2, [torch.zeros(4, 3), torch.zeros(6, 5)], "weight 1"),
])  # fmt: skip
def test_operator_rejects(launches, place, value, message):
    arguments = list(battery.operator(battery.sample("", (3,), 6, 3, [4], 6).to(torch.float32))[1])
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.pyflowgen.mlp_coupling(*arguments)
    assert not launches
