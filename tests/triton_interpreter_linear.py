"""The Triton launchers of invertible_linear run by Triton's interpreter on CPU tensors, chosen by the dispatcher.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

import pytest
import test_invertible_linear as battery
import torch
from check_triton import launches as launches
from pyflowgen.kernels import invertible_linear as kernels
from pyflowgen.kernels import tile

import pyflowgen
from pyflowgen.ops import invertible_linear as module

SAMPLES = {s.name: s for s in battery.samples()}
KINDS = [f"{factor}-{way}" for factor in ("lu", "dense") for way in ("forward", "inverse")]
NAMES = [
    *(f"{kind}-{case}" for kind in KINDS for case in ("2x7x5x3", "no-actnorm", "scale-alone", "channels-last")),
    *(f"{n}-channels" for n in (1, 17, 64)), "half-of-channels", "every-second-pixel", "transposed",
    "batch-of-no-one-stride", "expanded", "many-batch-dimensions", "no-batch", "empty-batch",
]  # fmt: skip
OTHERS = [(f"{kind}-9x5", dtype) for kind in KINDS for dtype in (torch.float64, torch.bfloat16)]


@pytest.fixture(scope="session")
def device():
    return torch.device("cpu")


def own(launches):
    return [launch.kernel.__name__ for launch in launches if launch.kernel.fn.__module__ == kernels.__name__]


@pytest.mark.parametrize("name, dtype", [*((n, torch.float32) for n in NAMES), *OTHERS], ids=str)
def test_values_and_gradients(launches, name, dtype, device):
    battery.test_values_and_gradients(name, dtype, device)
    pair = ["inverse_kernel", "inverse_backward_kernel"] if "inverse" in name else ["forward_kernel", "backward_kernel"]
    assert own(launches) == (pair if SAMPLES[name].tensors[0].numel() else [])


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_programs_that_take_several_blocks(launches, inverse, wide, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    if wide:
        monkeypatch.setattr(tile, "wide", lambda *_: True)
    sample = battery.sample("", battery.normal(2, 4, 13, 9), 3, "lu", inverse).to(torch.float64)
    found = []
    for function in (pyflowgen.invertible_linear, pyflowgen.invertible_linear, pyflowgen.invertible_linear_reference):
        leaves = [t.clone().requires_grad_() for t in sample.tensors]
        y, logdet = battery.in_dtype(function)(*leaves, **sample.options)
        total = (y.square() * torch.arange(9)).sum() + (logdet * torch.tensor([1.0, 3.0])).sum()
        found.append([y, logdet, *torch.autograd.grad(total, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))
    torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-10)
    backward = [launch for launch in launches if "backward" in launch.kernel.__name__]
    assert {launch.grid for launch in backward} == {(3,)} and backward[0].options["WIDE"] == wide


def test_the_first_channels_once_more(launches):
    """Their gradient is added to y's; they lie channels last."""
    sample = battery.sample("", battery.normal(2, 5, 3, 4), 3).to(torch.float32)
    found = []
    for path in (module.invertible_linear_head, module._reference):
        for which in ((0, 2), (2,), (1,)):
            x, *rest = (t.clone().requires_grad_() for t in sample.tensors)
            options = sample.options
            sign = options["sign"].to(x.dtype)
            outputs = path(x, *rest, options["permutation"], sign, 2, False, 3)
            weights = [torch.linspace(-1, 1, o.numel()).view(o.shape) for o in outputs]
            total = sum((outputs[i] * weights[i]).sum() for i in which)
            found.append([*outputs, *torch.autograd.grad(total, (x, *rest), allow_unused=True, materialize_grads=True)])
    for got, want in zip(found[:3], found[3:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got[2].movedim(1, -1).is_contiguous() and torch.equal(got[2], got[0][:, :2])
    assert len(own(launches)) == 5  # a log-determinant's gradient takes no pass over the image


def test_operator(launches):
    """The fakes fit the launchers, nothing is changed or aliased."""
    call, arguments = battery.operator(SAMPLES["lu-forward-2x7x5x3"].to(torch.float32))
    arguments = (*arguments[:6], 3, *arguments[7:])
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(call, arguments, test_utils=utils)
    x = arguments[0]
    gradients = torch.ones_like(x), torch.ones(2), torch.ones(2, 3, 5, 3)
    torch.library.opcheck(
        torch.ops.pyflowgen.invertible_linear_backward.default, (*gradients, *arguments[:6], *arguments[7:]),
        test_utils=utils,
    )  # fmt: skip
    assert set(own(launches)) == {"forward_kernel", "backward_kernel"}


@pytest.mark.parametrize("place, value, message", [
    (0, torch.zeros(4, 6, dtype=torch.int64), "x is"), (0, torch.zeros(4, 65), "65 channels"),
    (1, torch.zeros(6, 5), "weight is"), (2, torch.zeros(5), "log_scale is"), (4, torch.arange(6), "come together"),
    (6, 7, "head is 7"), (8, 0, "event_dim"),
])  # fmt: skip
def test_operator_rejects(launches, place, value, message):
    arguments = [torch.zeros(4, 6), torch.eye(6), None, None, None, None, 0, False, 1]
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.pyflowgen.invertible_linear(*arguments)
    assert not launches
