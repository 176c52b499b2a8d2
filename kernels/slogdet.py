"""slogdet in Triton: elimination with partial pivoting on a block of matrices held in registers.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor: forward reads every element once, backward reads and writes each once; the kernels move that. They compute in
float64, about n³ operations forward and 3 n³ backward: rows cannot be addressed by a number that is not known before,
so the pivot's row and column are picked by masked sums over the whole block, and rows stay where they are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from pyflowgen.kernels import tile
from pyflowgen.kernels.elementary import log
from torch import Tensor

LARGEST = 64  # csrc/slogdet.h


@triton.jit
def load_matrices(a, batch, N: tl.constexpr, SIZE: tl.constexpr, MATRICES: tl.constexpr):
    """(offset of each element, whether there is one, its value); the unit matrix beyond n and beyond the batch."""
    matrix = tl.program_id(0).to(tl.int64) * MATRICES + tl.arange(0, MATRICES)
    row = tl.arange(0, SIZE)[None, :, None]
    column = tl.arange(0, SIZE)[None, None, :]
    inside = (matrix < batch)[:, None, None] & (row < N) & (column < N)
    offset = matrix[:, None, None] * (N * N) + row * N + column
    m = tl.load(a + offset, mask=inside, other=0.0).to(tl.float64)
    return matrix, inside, tl.where(inside, m, tl.where(row == column, 1.0, 0.0))


@triton.jit
def find_pivot(m, free, k, SIZE: tl.constexpr):
    """(column k, which row of it is the largest of those still free, the first of equals; as one-hot)."""
    row = tl.arange(0, SIZE)[None, :]
    column = tl.arange(0, SIZE)[None, None, :]
    values = tl.sum(tl.where(column == k, m, 0.0), 2)
    # NaN counts as 0: it is taken last, and its row has made NaN of all others by then.
    size = tl.where(values == values, tl.abs(values), 0.0)
    best = tl.argmax(tl.where(free, size, -1.0), 1, tie_break_left=True)
    return values, row == best[:, None]


@triton.jit
def forward_kernel(a, sign, logabsdet, batch, N: tl.constexpr, SIZE: tl.constexpr, MATRICES: tl.constexpr):
    matrix, inside, m = load_matrices(a, batch, N, SIZE, MATRICES)
    row = tl.arange(0, SIZE)[None, :]
    free = tl.broadcast_to(row >= 0, (MATRICES, SIZE))
    s = tl.full([MATRICES], 1.0, tl.float64)
    total = tl.full([MATRICES], 0.0, tl.float64)
    for k in range(N):
        values, chosen = find_pivot(m, free, k, SIZE)
        pivot = tl.sum(tl.where(chosen, values, 0.0), 1)
        pivot_row = tl.sum(tl.where(chosen[:, :, None], m, 0.0), 1)
        # Moving the row up to place k passes the free rows before it.
        before = tl.sum(tl.where(free & (row < tl.sum(tl.where(chosen, row, 0), 1)[:, None]), 1, 0), 1)
        s *= tl.where(before % 2 == 1, -1.0, 1.0) * tl.where(pivot > 0, 1.0, tl.where(pivot < 0, -1.0, 0.0))
        total += log(tl.abs(pivot))
        free = free & (chosen == 0)
        # Below a zero pivot are zeros.
        factor = tl.where(free & (pivot != 0)[:, None], values / tl.where(pivot == 0, 1.0, pivot)[:, None], 0.0)
        m = tl.where(free[:, :, None], m - factor[:, :, None] * pivot_row[:, None, :], m)
    there = matrix < batch
    tl.store(sign + matrix, s.to(sign.dtype.element_ty), mask=there)
    tl.store(logabsdet + matrix, total.to(logabsdet.dtype.element_ty), mask=there)


@triton.jit
def backward_kernel(
    dlogabsdet, stride, a, da, batch, N: tl.constexpr, SIZE: tl.constexpr, MATRICES: tl.constexpr
):  # fmt: skip
    matrix, inside, m = load_matrices(a, batch, N, SIZE, MATRICES)
    row = tl.arange(0, SIZE)[None, :]
    free = tl.broadcast_to(row >= 0, (MATRICES, SIZE))
    step_of_row = tl.zeros([MATRICES, SIZE], tl.int32)  # at which step a row was the pivot's
    row_of_step = tl.zeros([MATRICES, SIZE], tl.int32)
    for k in range(N):
        values, chosen = find_pivot(m, free, k, SIZE)
        free = free & (chosen == 0)
        column = tl.arange(0, SIZE)[None, None, :]
        d = 1.0 / tl.sum(tl.where(chosen, values, 0.0), 1)
        scaled = tl.sum(tl.where(chosen[:, :, None], m, 0.0), 1) * d[:, None]
        scaled = tl.where(row == k, d[:, None], scaled)
        factor = tl.where(chosen, 0.0, values)
        rest = tl.where(column == k, 0.0, m) - factor[:, :, None] * scaled[:, None, :]
        m = tl.where(chosen[:, :, None], scaled[:, None, :], rest)
        step_of_row = tl.where(chosen, k, step_of_row)
        place = tl.sum(tl.where(chosen, row, 0), 1)
        row_of_step = tl.where(row == k, place[:, None].to(tl.int32), row_of_step)
    # m[r, c] is the inverse's element (step of r, row of step c), and da is the inverse transposed.
    there = matrix < batch
    scale = tl.load(dlogabsdet + matrix * stride, mask=there, other=0.0).to(tl.float64)
    offset = matrix[:, None, None] * (N * N) + row_of_step[:, None, :] * N + step_of_row[:, :, None]
    m *= scale[:, None, None]
    if da.dtype.element_ty != tl.float64:  # to 16 bits by way of float32: not all back ends convert at once
        m = m.to(tl.float32)
    tl.store(da + offset, m.to(da.dtype.element_ty), mask=inside)


def _check(a: Tensor) -> tuple[Tensor, int, int]:
    """(a dense, batch, n)"""
    if a.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"slogdet: a is {a.dtype}, expected float64, float32, bfloat16 or float16")
    if a.dim() < 2 or a.shape[-1] != a.shape[-2] or not 1 <= a.shape[-1] <= LARGEST:
        raise ValueError(f"slogdet: a has shape {tuple(a.shape)}, expected (*batch, n, n), n from 1 to {LARGEST}")
    batch = 1
    for size in a.shape[:-2]:
        batch *= size
    return a.contiguous(), batch, a.shape[-1]


def _launch(kernel: Any, arguments: tuple[Any, ...], batch: int, n: int, device: torch.device) -> None:
    size = triton.next_power_of_2(n)
    # 16 doubles a thread; of the smallest matrices fewer, of which a thread would hold several whole ones.
    matrices = max(1, min(2048 // (size * size), 128, triton.next_power_of_2(batch)))
    options = {"N": n, "SIZE": size, "MATRICES": matrices, "num_warps": 8 if size == LARGEST else 4}
    tile.Launch(kernel, (triton.cdiv(batch, matrices),), (*arguments, batch), options).run(device)


def slogdet(a: Tensor) -> tuple[Tensor, Tensor]:
    a, batch, n = _check(a)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    sign, logabsdet = (a.new_empty(a.shape[:-2], dtype=dtype) for _ in range(2))
    if batch:
        _launch(forward_kernel, (a, sign, logabsdet), batch, n, a.device)
    return sign, logabsdet


def slogdet_backward(dlogabsdet: Tensor, a: Tensor) -> Tensor:
    a, batch, n = _check(a)
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    if dlogabsdet.shape != a.shape[:-2] or dlogabsdet.dtype != dtype or dlogabsdet.device != a.device:
        raise ValueError("slogdet: dlogabsdet must have the batch's shape and the result's dtype")
    da = a.new_empty(a.shape)
    if batch:
        stride = tile.joint_stride(dlogabsdet, 0, dlogabsdet.dim())
        if stride is None:
            dlogabsdet, stride = dlogabsdet.contiguous(), 1
        _launch(backward_kernel, (dlogabsdet, stride, a, da), batch, n, a.device)
    return da
