"""The CUDA launchers of lstm and gru on CPU tensors; run_lstm.py and run_gru.py take these tests."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyflowgen
from pyflowgen import _native

GATES, STATES = {"lstm": 4, "gru": 3}, {"lstm": 2, "gru": 1}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# time, batch, in, hidden: one block; several with the last not full; rows beyond a tile; no row at all; weights that the
# device of cuda_runtime.h has no shared memory for (both ways, from hidden 33 on in float64).
SHAPES = ((1, 1, 3, 5), (5, 3, 4, 11), (2, 9, 3, 6), (3, 0, 4, 5), (0, 2, 4, 5), (2, 2, 3, 44))


def arguments(op, time, batch, features, hidden, dtype, bias=True):
    generator = torch.Generator().manual_seed(time + batch + features + hidden)
    rows = GATES[op] * hidden
    shapes = [(time, batch, features), *[(batch, hidden)] * STATES[op], (rows, features), (rows, hidden)]
    shapes += [(rows,), (rows,)] if bias else []
    scale = [1.0] * (1 + STATES[op]) + [0.5] * 4
    return [
        (torch.randn(s, generator=generator, dtype=torch.float64) * f).to(dtype).requires_grad_()
        for s, f in zip(shapes, scale, strict=False)
    ]


def run(function, tensors, **options):
    outputs = function(*tensors, **options)
    weights = [torch.linspace(-1, 2, o.numel(), dtype=torch.float64).view(o.shape).to(o) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]
    return [t.detach().double() for t in (*outputs, *grads)]


def compare(op, tensors, **options):
    """Errors against float64 are no more than a few of the dtype's own, which plain PyTorch's are too."""
    function, reference = getattr(pyflowgen, op), getattr(pyflowgen, f"{op}_reference")
    dtype = tensors[0].dtype
    got = run(function, tensors, **options)
    plain = run(reference, tensors, **options)
    truth = run(reference, [t.detach().double().requires_grad_() for t in tensors], **options)
    for i, (g, p, w) in enumerate(zip(got, plain, truth, strict=True)):
        size = w.abs().max().clamp(min=1) if w.numel() else 1
        error, allowed = ((t - w).abs().max() if w.numel() else 0 for t in (g, p))
        few = 64 if dtype == torch.float64 else 4
        assert error <= 2 * allowed + few * torch.finfo(dtype).eps * size, (i, float(error), float(allowed))


def runs(op):
    def test_the_launchers_run():
        assert os.environ["PYFLOWGEN_LIBRARY"] == pyflowgen.build_info()["library"]
        assert _native.use_kernel(op, torch.zeros(1)) and not _native.use_kernel(f"{op}_pack", torch.zeros(1))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_values_and_gradients(shape, dtype):
        compare(op, arguments(op, *shape, dtype))

    @pytest.mark.parametrize("reverse", (False, True))
    def test_lengths(reverse):
        tensors = arguments(op, 1, 6, 3, 7, torch.float64)
        tensors[0] = torch.randn(
            11, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        compare(op, tensors, batch_sizes=torch.tensor([5, 3, 2, 1]), reverse=reverse)

    def test_no_bias_reverse_and_strides():
        tensors = arguments(op, 4, 3, 4, 6, torch.float32, bias=False)
        compare(op, tensors, reverse=True)
        tensors = [t.detach() for t in tensors]
        tensors[0] = tensors[0].transpose(0, 1).contiguous().transpose(0, 1)
        tensors[1] = tensors[1].T.contiguous().T
        tensors[-1] = torch.cat([tensors[-1]] * 2, 1)[:, ::2]
        function, reference = getattr(pyflowgen, op), getattr(pyflowgen, f"{op}_reference")
        for g, w in zip(function(*tensors), reference(*tensors), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-6)

    def test_a_row_hangs_on_itself_alone():
        """Bit for bit: no other row, no later step, no other split, nor where weights lie."""
        function = getattr(pyflowgen, op)
        tensors = [t.detach() for t in arguments(op, 4, 7, 3, 13, torch.float32)]
        whole = function(*tensors)[0]
        n = STATES[op]
        some = [tensors[0][:2, 2:4], *(s[2:4] for s in tensors[1 : 1 + n]), *tensors[1 + n :]]
        assert torch.equal(function(*some)[0], whole[:2, 2:4])

    def test_layers():
        """torch's interface: layers, directions, packed sequences, a cell, a stream."""
        theirs = getattr(nn, op.upper())(3, 5, num_layers=2, bidirectional=True)
        ours = getattr(pyflowgen, op.upper())(3, 5, num_layers=2, bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(4, 3, 3)
        packed = pack_padded_sequence(x, torch.tensor([4, 3, 1]))
        with torch.no_grad():
            for given in (x, packed):
                got, want = ours(given)[0], theirs(given)[0]
                got, want = (getattr(t, "data", t) for t in (got, want))
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        cell, plain = (getattr(module, f"{op.upper()}Cell")(3, 5) for module in (pyflowgen, nn))
        cell.load_state_dict(plain.state_dict())
        state = cell.init_state(3)
        want = plain(x[0], state)
        for got in (cell(x[0], state), cell.step(x[0], state)):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        stream = getattr(pyflowgen, op.upper())(3, 5, num_layers=2)
        state = stream.init_state(3)
        for frame in x:
            y, state = stream.step(frame, state)
        torch.testing.assert_close(y, stream(x)[0][-1], rtol=1e-5, atol=1e-6)

    return {name: f for name, f in locals().items() if name.startswith("test_")}
