"""The Triton launchers of the gates of lstm and gru run by Triton's interpreter on CPU tensors.

Needs a process of its own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

import os

import pytest
import torch
from pyflowgen.kernels import tile

import pyflowgen
from pyflowgen import recurrence

assert os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPS = {"lstm": (4, 2), "gru": (3, 1)}  # gates, states


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    done, run = [], tile.Launch.run
    monkeypatch.setattr(tile.Launch, "run", lambda self, device: (done.append(self.kernel.__name__), run(self, device)))
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    yield done


def arguments(op, batch, features, hidden, dtype):
    generator = torch.Generator().manual_seed(batch + hidden)
    gates, states = OPS[op]
    rows = gates * hidden
    shapes = (batch, features), *[(batch, hidden)] * states, (rows, features), (rows, hidden), (rows,), (rows,)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def run(function, op, tensors):
    states = OPS[op][1]
    x, state, weights = tensors[0], tuple(tensors[1 : 1 + states]), tuple(tensors[1 + states :])
    new = function(x, state, weights)
    loss = sum((s * torch.linspace(-1, 2, s.numel(), dtype=torch.float64).view(s.shape).to(s)).sum() for s in new)
    return [t.detach().double() for t in (*new, *torch.autograd.grad(loss, tensors))]


def reference(op):
    function = getattr(pyflowgen, f"{op}_reference")
    return lambda x, state, weights: function(x[None], *state, *weights)[1:]


# One block and several, the last not full; one unit; features without a stream.
@pytest.mark.parametrize("batch,hidden", ((1, 1), (3, 5), (7, 90), (0, 4)))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_step(op, dtype, batch, hidden, launches):
    tensors = arguments(op, batch, 3, hidden, dtype)
    got = run(lambda *a: recurrence.one_step(op, *a), op, tensors)
    assert launches == (["forward_kernel", "backward_kernel"] if batch else [])
    plain = run(reference(op), op, tensors)
    truth = run(reference(op), op, [t.detach().double().requires_grad_() for t in tensors])
    for g, p, w in zip(got, plain, truth, strict=True):
        error, allowed, size = ((t.abs().max() if t.numel() else 0) for t in (g - w, p - w, w))
        few = 64 if dtype == torch.float64 else 8
        assert error <= 2 * allowed + few * torch.finfo(dtype).eps * max(1, size)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_gradients(op):
    gates, states = OPS[op]
    torch.manual_seed(0)
    shapes = (1, gates * 2), (1, gates * 2), *[(1, 2)] * states
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    torch.autograd.gradcheck(lambda *t: recurrence._Gates.apply(op, *t), tensors)
    torch.autograd.gradgradcheck(lambda *t: recurrence._Gates.apply(op, *t), tensors)


@pytest.mark.parametrize("op", OPS)
def test_sequences_step_by_step(op):
    states = OPS[op][1]
    _, *state, w, u, b, d = (t.detach() for t in arguments(op, 4, 3, 5, torch.float32))
    sizes = torch.tensor([3, 2, 2])
    for x, batch_sizes in ((torch.randn(3, 4, 3), None), (torch.randn(7, 3), sizes)):
        for reverse in (False, True):
            got = recurrence.stepwise(op, x, tuple(state), (w, u, b, d), batch_sizes, reverse)
            want = getattr(pyflowgen, f"{op}_reference")(x, *state, w, u, b, d, batch_sizes, reverse)
            assert len(got) == 1 + states
            for g, r in zip(got, want, strict=True):
                torch.testing.assert_close(g, r, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", OPS)
def test_cells_take_them(op, launches):
    name = op.upper() + "Cell"
    cell, plain = getattr(pyflowgen, name)(3, 5), getattr(torch.nn, name)(3, 5)
    cell.load_state_dict(plain.state_dict())
    for x in (torch.randn(2, 3), torch.randn(3)):
        got, want = cell(x), plain(x)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert launches == ["forward_kernel"] * 2


@pytest.mark.parametrize("op", OPS)
def test_wrong_shapes(op):
    gates, _ = OPS[op]
    good = [torch.zeros(2, gates * 3), torch.zeros(2, gates * 3), torch.zeros(2, 3)]
    call = getattr(torch.ops.pyflowgen, f"{op}_gates").default
    with pytest.raises(ValueError, match=rf"expected \(2, {gates * 3}\)"):
        call(good[0], good[1][:1], good[2])
