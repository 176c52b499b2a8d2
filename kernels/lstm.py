"""The gates of one LSTM step in Triton: forward and backward between torch's products; csrc/formula/lstm.h.

For cells, streams and steps on a GPU; sequences have csrc/cuda/lstm.cu. Floor, in elements for each unit: forward 9 in
and 6 out (without what is kept, 2 out), backward 8 in and 5 out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyflowgen.kernels import gates
from pyflowgen.kernels.elementary import sigmoid, tanh
from pyflowgen.kernels.gates import keep, wide
from torch import Tensor


@triton.jit
def forward_kernel(a, b, c, h_next, c_next, kept, count, hidden, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = unit < count
    at = unit // hidden * (4 * hidden) + unit % hidden
    i = sigmoid(wide(a, at, there) + wide(b, at, there))
    f = sigmoid(wide(a, at + hidden, there) + wide(b, at + hidden, there))
    g = tanh(wide(a, at + 2 * hidden, there) + wide(b, at + 2 * hidden, there))
    o = sigmoid(wide(a, at + 3 * hidden, there) + wide(b, at + 3 * hidden, there))
    cell = f * wide(c, unit, there) + i * g
    keep(c_next, unit, cell, there)
    keep(h_next, unit, o * tanh(cell), there)
    keep(kept, at, i, there)
    keep(kept, at + hidden, f, there)
    keep(kept, at + 2 * hidden, g, there)
    keep(kept, at + 3 * hidden, o, there)


@triton.jit
def backward_kernel(dh, dc, c, c_next, kept, da, dc_before, count, hidden, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = unit < count
    at = unit // hidden * (4 * hidden) + unit % hidden
    i, f = wide(kept, at, there), wide(kept, at + hidden, there)
    g, o = wide(kept, at + 2 * hidden, there), wide(kept, at + 3 * hidden, there)
    t, dh_here = tanh(wide(c_next, unit, there)), wide(dh, unit, there)
    d = dh_here * o * (1 - t * t) + wide(dc, unit, there)
    keep(dc_before, unit, d * f, there)
    keep(da, at, d * g * (i * (1 - i)), there)
    keep(da, at + hidden, d * wide(c, unit, there) * (f * (1 - f)), there)
    keep(da, at + 2 * hidden, d * i * (1 - g * g), there)
    keep(da, at + 3 * hidden, dh_here * t * (o * (1 - o)), there)


def lstm_gates(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From both parts (rows, 4 hidden) of the gates' arguments: h, c, and the gates for the backward pass."""
    a, b, c = a.contiguous(), b.contiguous(), c.contiguous()
    gates.check("lstm_gates", 4, c, a, b)
    h_next, c_next, kept = (gates.empty(c, len(c), n * c.shape[1]) for n in (1, 1, 4))
    gates.launch(forward_kernel, (a, b, c, h_next, c_next, kept), c)
    return h_next, c_next, kept


def lstm_gates_backward(dh: Tensor, dc: Tensor, c: Tensor, c_next: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the arguments, the same for both parts, and of the cell before."""
    dh, dc, c = dh.contiguous(), dc.contiguous(), c.contiguous()
    gates.check("lstm_gates_backward", 4, c, kept)
    da, dc_before = gates.empty(c, len(c), 4 * c.shape[1]), gates.empty(c, *c.shape)
    gates.launch(backward_kernel, (dh, dc, c, c_next, kept, da, dc_before), c)
    return da, dc_before
