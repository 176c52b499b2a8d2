"""The Triton launchers of idu run by Triton's interpreter on CPU tensors, chosen by the dispatcher.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton_idu.py starts it.
"""

import itertools
import os

import pytest
import torch
from pyflowgen.kernels import tile

import pyflowgen
from pyflowgen import IDU
from pyflowgen.ops import idu as op

assert os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = list(itertools.product(("before", "after"), ("sigmoid", "hard_sigmoid"), ("candidate", "state")))


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    done, run = [], tile.Launch.run
    monkeypatch.setattr(tile.Launch, "run", lambda self, device: (done.append(self.kernel.__name__), run(self, device)))
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    yield done


def kernels(window, reset, backward=True):
    """What has to be launched."""
    each = window * (1 if reset == "after" else 2)
    return ["forward_kernel"] * each + ["backward_kernel"] * (each if backward else 0)


def arguments(batch, time, embedding, hidden, bias=True):
    torch.manual_seed(batch + time + embedding + hidden)
    shapes = (2 * hidden, embedding), (2 * hidden, embedding), (2 * hidden, hidden)
    weights = [torch.randn(s, dtype=torch.float64) / s[1] ** 0.5 for s in shapes]
    x = torch.randn(batch, time, embedding, dtype=torch.float64)
    return [x, *weights, torch.randn(4 * hidden, dtype=torch.float64) if bias else None]


def run(function, tensors):
    tensors = [t if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    incoming = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).to(o.dtype).view(o.shape) for o in outputs]
    inputs = [t for t in tensors if t is not None]
    return [o.detach() for o in outputs], torch.autograd.grad(outputs, inputs, incoming, allow_unused=True)


def compare(got, want, dtype, eps=None):
    tolerance = 200 * torch.finfo(dtype).eps if eps is None else eps
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        if b is None or b.numel() == 0:
            assert a is None or a.shape == b.shape
            continue
        assert a.dtype == dtype and (a.double() - b.double()).abs().max() <= tolerance * b.abs().max().clamp(min=1)


@pytest.mark.parametrize(("reset", "gate", "update"), OPTIONS)
def test_options(launches, reset, gate, update):
    dtype = torch.float64 if gate == "hard_sigmoid" else torch.float32
    options = dict(reset=reset, gate=gate, update=update)
    tensors = [t.to(dtype) for t in arguments(3, 3, 5, 21)]
    got = run(lambda *t: pyflowgen.idu(*t, **options), tensors)
    assert launches == kernels(3, reset)
    compare(got, run(lambda *t: pyflowgen.idu_reference(*t, **options), [t.double() for t in tensors]), dtype)
    assert launches == kernels(3, reset)
    with torch.no_grad():
        assert torch.equal(pyflowgen.idu(*tensors, **options), got[0][0])  # nothing kept


@pytest.mark.parametrize("reset", ["before", "after"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 1, 1), (18, 2, 3, 4), (2, 3, 4, 70), (0, 2, 3, 4)],
    ids=["one", "two programs", "two blocks", "none"],
)
def test_sizes(launches, size, reset):
    tensors = arguments(*size, bias=False)
    lengths = None if size[0] == 0 else torch.arange(size[0]) % (size[1] + 2)
    both = [run(lambda *t, f=f: f(*t, lengths, reset=reset), tensors) for f in (pyflowgen.idu, pyflowgen.idu_reference)]
    compare(*both, torch.float64)
    assert launches == ([] if size[0] == 0 else kernels(size[1], reset))


@pytest.mark.parametrize("reset", ["before", "after"])
def test_frames(launches, reset):
    torch.manual_seed(0)
    layer = IDU(4, 9, window=4, bias=True, reset=reset).double()
    torch.nn.init.normal_(layer.bias)
    kept = torch.randn(2, 3, 18, dtype=torch.float64, requires_grad=True)

    def frames(x, kept, *weights):
        h, (cache, _) = layer.frames(x, (kept, torch.tensor([1, 4])))
        return h, cache

    for count in (1, 6):
        x = torch.randn(2, count, 4, dtype=torch.float64, requires_grad=True)
        tensors = x, kept, *layer.parameters()
        outputs = frames(*tensors)
        incoming = [o.detach().cos() for o in outputs]
        got = torch.autograd.grad(outputs, tensors, incoming)
        assert launches == kernels(4, reset)
        launches.clear()
        with pyflowgen.reference_path():
            want = frames(*tensors)
        compare((outputs, got), (want, torch.autograd.grad(want, tensors, incoming)), torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(frames(*tensors)[0], want[0])
        assert launches == kernels(4, reset, backward=False)
        launches.clear()


@pytest.mark.parametrize("after", [False, True])
def test_16_bits(launches, after, dtype=torch.float16):
    """By the operators: on the CPU the function leaves 16 bits to the reference. The interpreter's product takes the bits
    of bfloat16 for integers."""
    tensors = [t.to(dtype) for t in arguments(3, 4, 5, 9)]
    h, _, *kept = torch.ops.pyflowgen.idu(*tensors, None, None, after, False, False, True)
    dh = torch.linspace(-1, 1, h.numel()).view(h.shape).to(dtype)
    found = torch.ops.pyflowgen.idu_backward(dh, None, *tensors[:4], None, after, False, False, *kept, True, True)
    want = run(
        lambda *t: pyflowgen.idu_reference(*t, reset="after" if after else "before"), [t.double() for t in tensors]
    )
    compare(([h[:, 0]], [found[0], *found[2:]]), want, dtype, 16 * torch.finfo(dtype).eps)
    assert launches == kernels(4, "after" if after else "before")


def test_bounds_of_hard_gates(launches):
    x = torch.tensor([[[2.5], [-2.5], [2.4], [9.0], [1.0]]])
    weights = [torch.tensor(w) for w in ([[1.0], [0.3]], [[0.0], [0.0]], [[0.0], [0.5]])]
    both = [
        run(lambda *t, f=f: f(*t, gate="hard_sigmoid"), (x, *weights)) for f in (pyflowgen.idu, pyflowgen.idu_reference)
    ]
    compare(*both, torch.float32, 1e-6)


def test_operators(launches):
    utils = ("test_schema", "test_faketensor")
    tensors = [t.float() for t in arguments(2, 3, 4, 5)]
    given = *tensors, None, torch.randn(2, 2, 10), True, False, False, True
    torch.library.opcheck(torch.ops.pyflowgen.idu.default, given, test_utils=utils)
    h, products, *kept = torch.ops.pyflowgen.idu(*given)
    back = h, products, *tensors[:4], None, True, False, False, *kept, True, True
    torch.library.opcheck(torch.ops.pyflowgen.idu_backward.default, back, test_utils=utils)
    for wrong in ((tensors[0][0], *given[1:]), (*given[:3], given[3][1:], *given[4:]), (*given[:4], h, *given[5:])):
        with pytest.raises(ValueError, match="idu: "):
            torch.ops.pyflowgen.idu(*wrong)
    with pytest.raises(ValueError, match="does not fit what was kept"):
        torch.ops.pyflowgen.idu_backward(h[:1], *back[1:])


def test_rows_alone_and_hostile_values(launches):
    tensors = [t.float() for t in arguments(4, 3, 4, 5)]
    clean = pyflowgen.idu(*tensors)
    for value in (torch.nan, torch.inf, 1e38):
        tensors[0][1, 1, 2] = value
        dirty = pyflowgen.idu(*tensors)
        assert torch.equal(clean[[0, 2, 3]], dirty[[0, 2, 3]])
        torch.testing.assert_close(dirty, op.idu_reference(*tensors), equal_nan=True)
