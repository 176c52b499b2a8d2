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
import triton.language as tl  # noqa: F401  the interpreter looks for it beside a kernel
from torch import Tensor

Strides = tuple[int, int, int]
# A tensor as (batch, channels, inner), or none.
View = tuple[Tensor | None, Strides]
NONE: View = (None, (0, 0, 0))

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


def tiles(batch: int, elements: int, size: int) -> Tiles:
    """`size` elements: many short rows several a program; long ones a loop; few long ones several programs a row."""
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


def output(like: Tensor, batch_dims: int, dims: int) -> tuple[Tensor, Tensor]:
    """What is returned, of `like`'s strides, and what the kernel writes: the same unless it has no such view."""
    result = torch.empty_like(like)
    viewable = view3(result, batch_dims, dims) is not None
    return result, result if viewable else torch.empty_like(like, memory_format=torch.contiguous_format)


def check_gradients(op: str, dy: Tensor | None, dlogdet: Tensor | None, x: Tensor, batch_dims: int) -> None:
    """ValueError unless the outputs' gradients are of y's and the log-determinant's shape, dtype and device."""
    accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t, shape, dtype in (
        ("dy", dy, x.shape, x.dtype), ("dlogdet", dlogdet, x.shape[:batch_dims], accumulator)
    ):  # fmt: skip
        if t is not None and not (t.shape == shape and t.dtype == dtype and t.device == x.device):
            raise ValueError(
                f"{op}: {name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {dtype} {tuple(shape)}"
                f" on {x.device}"
            )


@triton.jit
def at(pointer, strides, row, c, i):
    return pointer + (row * strides[0] + c * strides[1] + i * strides[2])


def wide(sizes: Strides, strides: Sequence[Strides]) -> bool:
    """Whether offsets need 64 bits. Idle lanes reach beyond the sizes: hence 2^30."""
    return any(sum(n * max(abs(s), 1) for n, s in zip(sizes, tensor, strict=True)) >= 2**30 for tensor in strides)
