"""What every kernel shares: tensors as (batch, channels, inner) strides, sizes of tiles and grids, and the launch.

A tile is ROWS × COLS: rows are the batch, columns the elements of an event. Sizes depend on shapes alone, never on the
device, so that sums are formed in the same order everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

Strides = tuple[int, int, int]

TILE = (
    1024  # elements of a tile: 4 warps with 8 each, two 16-byte accesses in float32; in float64 a quarter, one access
)
PROGRAMS = 1024  # enough to fill a GPU several times over


class Launch(NamedTuple):
    """One kernel launch: what runs on a device, or is compiled ahead of time."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def run(self, device: torch.device) -> None:
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[self.grid](*self.arguments, **self.options)


class Tiles(NamedTuple):
    """ROWS × COLS tiles, `segment` columns a program, in a grid of row blocks × `segments`."""

    rows: int
    cols: int
    segment: int
    segments: int
    row_blocks: int


def tiles(batch: int, elements: int, double: bool) -> Tiles:
    """Many short rows: several a program. Long rows: a loop; few of them: several programs a row."""
    size = TILE // 4 if double else TILE
    cols = min(triton.next_power_of_2(elements), size)
    while (
        cols > size // 4 and triton.cdiv(elements, cols) * cols * 8 > elements * 9
    ):  # over an eighth of the lanes idle
        cols //= 2
    rows = size // cols
    row_blocks, blocks = triton.cdiv(batch, rows), triton.cdiv(elements, cols)
    # A segment is worth a second reduction from some tiles on.
    segments = max(1, min(blocks // 4, PROGRAMS // row_blocks))
    segment = triton.cdiv(blocks, segments) * cols
    return Tiles(rows, cols, segment, triton.cdiv(elements, segment), row_blocks)


def joint_stride(t: Tensor, first: int, last: int) -> int | None:
    """Stride of dimensions [first, last) seen as one, or None when they cannot be."""
    stride = expected = 0
    seen = False
    for d in range(last - 1, first - 1, -1):
        if t.shape[d] == 1:
            continue
        if not seen:
            stride, seen = t.stride(d), True
        elif t.stride(d) != expected:
            return None
        expected = t.stride(d) * t.shape[d]
    return stride


def view3(t: Tensor, batch_dims: int, dims: int) -> Strides | None:
    """Strides of (batch, channels, inner): dimensions [0, batch_dims), the next, those up to `dims`."""
    batch = joint_stride(t, 0, batch_dims)
    if dims == batch_dims:
        return None if batch is None else (batch, 0, 0)
    inner = joint_stride(t, batch_dims + 1, dims)
    return None if batch is None or inner is None else (batch, t.stride(batch_dims), inner)


def strided(t: Tensor, batch_dims: int, dims: int) -> tuple[Tensor, Strides]:
    """A tensor a kernel reads: itself, or a contiguous copy when it has no (batch, channels, inner) view."""
    strides = view3(t, batch_dims, dims)
    if strides is None:
        t = t.contiguous()
        strides = view3(t, batch_dims, dims)
        assert strides is not None
    return t, strides


def wide(sizes: Strides, strides: Sequence[Strides]) -> bool:
    """Whether offsets need 64 bits. Idle lanes reach beyond the sizes: hence 2^30."""
    return any(sum(n * max(abs(s), 1) for n, s in zip(sizes, tensor, strict=True)) >= 2**30 for tensor in strides)
