"""idu: the equations written out, the GRU it becomes without the current chunk, windows and streams."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import pyflowgen
from pyflowgen import IDU

OPTIONS = list(itertools.product(("before", "after"), ("sigmoid", "hard_sigmoid"), ("candidate", "state")))


def by_the_equations(x: Tensor, w_x: Tensor, w_0: Tensor, w_h: Tensor, bias: Tensor, reset, gate, update) -> Tensor:
    w_xz, w_xh = w_x.chunk(2)
    w_0r, w_0z = w_0.chunk(2)
    w_hr, w_hh = w_h.chunk(2)
    b_r, b_z, b_x, b_h = bias.chunk(4)
    squash = torch.sigmoid if gate == "sigmoid" else lambda a: torch.clip(0.2 * a + 0.5, 0, 1)
    h = x.new_zeros(len(x), w_hh.shape[0])
    current = x[:, -1]
    for t in range(x.shape[1]):
        r = squash(h @ w_hr.T + current @ w_0r.T + b_r)
        z = squash(x[:, t] @ w_xz.T + current @ w_0z.T + b_z)
        inner = (r * h) @ w_hh.T + b_h if reset == "before" else r * (h @ w_hh.T + b_h)
        new = torch.tanh(x[:, t] @ w_xh.T + b_x + inner)
        h = (1 - z) * h + z * new if update == "candidate" else (1 - z) * new + z * h
    return h


def inputs(grad=False):
    torch.manual_seed(0)
    shapes = (3, 6, 4), (10, 4), (10, 4), (10, 5), (20,)
    return [torch.randn(s, dtype=torch.float64, requires_grad=grad) for s in shapes]


@pytest.mark.parametrize(("reset", "gate", "update"), OPTIONS)
def test_is_the_published_recurrence(reset, gate, update):
    options = dict(reset=reset, gate=gate, update=update)
    args = inputs(grad=True)
    got, want = pyflowgen.idu(*args, **options), by_the_equations(*args, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), args), torch.autograd.grad(want.sin().sum(), args), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: pyflowgen.idu(*a, **options), args)
    for other in OPTIONS:  # each option says something
        if other != (reset, gate, update):
            assert (
                pyflowgen.idu(*args, **dict(zip(("reset", "gate", "update"), other, strict=True))) - got
            ).abs().max() > 1e-6


def test_without_the_current_chunk_it_is_a_gru_with_half_its_gates():
    """Reset from h alone, update from x alone: torch's GRU with the other blocks zero."""
    x, w_x, w_0, w_h, bias = inputs()
    gru = torch.nn.GRU(4, 5, batch_first=True).double()
    zero, (b_r, b_z, b_x, b_h) = torch.zeros(5, 4, dtype=torch.float64), bias.chunk(4)
    with torch.no_grad():
        gru.weight_ih_l0.copy_(torch.cat([zero, w_x[:5], w_x[5:]]))
        gru.weight_hh_l0.copy_(torch.cat([w_h[:5], torch.zeros(5, 5, dtype=torch.float64), w_h[5:]]))
        gru.bias_ih_l0.copy_(torch.cat([b_r, b_z, b_x]))
        gru.bias_hh_l0.copy_(torch.cat([torch.zeros(10, dtype=torch.float64), b_h]))
        want = gru(x)[0][:, -1]
    got = pyflowgen.idu(x, w_x, torch.zeros_like(w_0), w_h, bias, reset="after", update="state")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert (pyflowgen.idu(x, w_x, w_0, w_h, bias, reset="after", update="state") - want).abs().max() > 1e-3


@pytest.mark.parametrize("reset", ["before", "after"])
def test_current_chunk_acts_through_each_gate(reset):
    """The last chunk as current chunk alone, cut off from its own step: a gradient through r and one through z."""
    x, w_x, w_0, w_h, bias = inputs()
    for gate, rows in (("reset", slice(0, 5)), ("update", slice(5, 10))):
        current = x[:, -1].clone().requires_grad_()
        only = torch.zeros_like(w_0)
        only[rows] = w_0[rows]
        h = pyflowgen.ops.idu._recur(x @ w_x.T, current @ only.T, w_h, bias, None, reset, "sigmoid", "candidate")
        (grad,) = torch.autograd.grad(h.sum(), current)
        assert (grad.abs().amax(1) > 1e-6).all(), gate


def test_absent_chunks_are_no_chunks():
    args = inputs()
    lengths = torch.tensor([1, 4, 6])
    got = pyflowgen.idu(*args, lengths)
    for i, n in enumerate(lengths.tolist()):
        want = pyflowgen.idu(args[0][i : i + 1, 6 - n :], *args[1:])
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_frames_and_stream_are_the_windows(bias):
    torch.manual_seed(0)
    layer = IDU(4, 5, window=6, bias=bias).double()
    if bias:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 15, 4, dtype=torch.float64)
    whole, _ = layer.frames(x)
    for t in range(15):
        torch.testing.assert_close(whole[:, t], layer(x[:, max(0, t - 5) : t + 1]), rtol=1e-12, atol=1e-12)
    cache, parts = None, []
    for piece in x.split([1, 1, 5, 0, 7, 1], 1):
        h, cache = layer.frames(piece, cache)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert cache[0].shape == (2, 5, 10) and cache[1].tolist() == [6, 6]
    changed = x.clone()
    changed[:, 9:] = 100.0
    after, _ = layer.frames(changed)
    assert torch.equal(after[:, :9], whole[:, :9]) and not torch.equal(after[:, 9:], whole[:, 9:])


def test_wrong_arguments_are_named():
    x, w_x, w_0, w_h, bias = inputs()
    for message, call in {
        r"x has shape \(6, 4\)": lambda: pyflowgen.idu(x[0], w_x, w_0, w_h),
        r"x has shape \(3, 0, 4\)": lambda: pyflowgen.idu(x[:, :0], w_x, w_0, w_h),
        r"weight_0 has shape \(9, 4\), expected \(10, 4\)": lambda: pyflowgen.idu(x, w_x, w_0[1:], w_h),
        r"weight_h has shape \(9, 5\), expected \(10, 5\)": lambda: pyflowgen.idu(x, w_x, w_0, w_h[1:]),
        r"bias has shape \(15,\), expected \(20,\)": lambda: pyflowgen.idu(x, w_x, w_0, w_h, bias[5:]),
        r"length has shape \(2,\), expected \(3,\)": lambda: pyflowgen.idu(x, w_x, w_0, w_h, bias, torch.ones(2)),
        "reset is 'never'": lambda: pyflowgen.idu(x, w_x, w_0, w_h, reset="never"),
        "gate is 'step'": lambda: pyflowgen.idu(x, w_x, w_0, w_h, gate="step"),
        "update is 'x'": lambda: pyflowgen.idu(x, w_x, w_0, w_h, update="x"),
        "window=0": lambda: IDU(4, 5, window=0),
        r"IDU: x has shape \(3, 6, 4\), expected \(batch, frames, 3\)": lambda: IDU(3, 5).frames(x),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
