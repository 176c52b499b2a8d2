"""What the gate kernels of lstm.py and gru.py share: a lane a unit, loads widened and stores narrowed, the launch.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py). Both products
of a step are torch's; between them and the next step one kernel moves every number once, which is the floor: it is
bound by memory, or, for a few streams, by the launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from pyflowgen.kernels import tile
from torch import Tensor

BLOCK = 256  # units a program: four warps of two each


@triton.jit
def wide(p, offset, mask):
    """As float32, or float64."""
    v = tl.load(p + offset, mask=mask, other=0.0)
    return v if v.dtype == tl.float64 else v.to(tl.float32)


@triton.jit
def keep(p, offset, v, mask):
    tl.store(p + offset, v.to(p.dtype.element_ty), mask=mask)


def check(op: str, gates: int, state: Tensor, *wide_ones: Tensor) -> None:
    rows, hidden = state.shape
    for t in wide_ones:
        if t.shape != (rows, gates * hidden) or t.dtype != state.dtype or t.device != state.device:
            raise ValueError(
                f"{op}: gates have shape {tuple(t.shape)}, expected ({rows}, {gates * hidden}), as the state"
            )


def launch(kernel: Any, arguments: tuple[Any, ...], state: Tensor) -> None:
    rows, hidden = state.shape
    if state.numel():
        grid = (triton.cdiv(rows * hidden, BLOCK),)
        options = {"BLOCK": BLOCK, "num_warps": 4}
        tile.Launch(kernel, grid, (*arguments, rows * hidden, hidden), options).run(state.device)


def empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)
