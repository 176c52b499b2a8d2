"""The gates of one GRU step in Triton: forward and backward between torch's products; csrc/formula/gru.h.

For cells, streams and steps on a GPU; sequences have csrc/cuda/gru.cu. Floor, in elements for each unit: forward 7 in
and 4 out (without what is kept, 1 out), backward 6 in and 7 out.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyflowgen.kernels import gates
from pyflowgen.kernels.elementary import sigmoid, tanh
from pyflowgen.kernels.gates import keep, wide
from torch import Tensor


@triton.jit
def forward_kernel(a, b, h, h_next, kept, count, hidden, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = unit < count
    at = unit // hidden * (3 * hidden) + unit % hidden
    r = sigmoid(wide(a, at, there) + wide(b, at, there))
    z = sigmoid(wide(a, at + hidden, there) + wide(b, at + hidden, there))
    n = tanh(wide(a, at + 2 * hidden, there) + r * wide(b, at + 2 * hidden, there))
    keep(h_next, unit, n + z * (wide(h, unit, there) - n), there)
    keep(kept, at, r, there)
    keep(kept, at + hidden, z, there)
    keep(kept, at + 2 * hidden, n, there)


@triton.jit
def backward_kernel(dh, b, h, kept, da, db, dh_before, count, hidden, BLOCK: tl.constexpr):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = unit < count
    at = unit // hidden * (3 * hidden) + unit % hidden
    r, z = wide(kept, at, there), wide(kept, at + hidden, there)
    n, d = wide(kept, at + 2 * hidden, there), wide(dh, unit, there)
    dn = d * (1 - z) * (1 - n * n)
    dr = dn * wide(b, at + 2 * hidden, there) * (r * (1 - r))
    dz = d * (wide(h, unit, there) - n) * (z * (1 - z))
    keep(dh_before, unit, d * z, there)
    keep(da, at, dr, there)
    keep(db, at, dr, there)
    keep(da, at + hidden, dz, there)
    keep(db, at + hidden, dz, there)
    keep(da, at + 2 * hidden, dn, there)
    keep(db, at + 2 * hidden, dn * r, there)


def gru_gates(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """From x's and h's part (rows, 3 hidden) of the gates' arguments: h, and the gates for the backward pass."""
    a, b, h = a.contiguous(), b.contiguous(), h.contiguous()
    gates.check("gru_gates", 3, h, a, b)
    h_next, kept = gates.empty(h, *h.shape), gates.empty(h, len(h), 3 * h.shape[1])
    gates.launch(forward_kernel, (a, b, h, h_next, kept), h)
    return h_next, kept


def gru_gates_backward(dh: Tensor, b: Tensor, h: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of both parts, and of the hidden state before as far as it goes past the product."""
    dh, b, h = dh.contiguous(), b.contiguous(), h.contiguous()
    gates.check("gru_gates_backward", 3, h, b, kept)
    da, db, dh_before = (gates.empty(h, *t.shape) for t in (kept, kept, h))
    gates.launch(backward_kernel, (dh, b, h, kept, da, db, dh_before), h)
    return da, db, dh_before
