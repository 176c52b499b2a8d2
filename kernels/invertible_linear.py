"""invertible_linear in Triton: ActNorm and 1×1 convolution in one pass over the image, either way, and one backward.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor, C channels: forward reads and writes every element once, 2 C operations each; backward reads x and dy and writes
dx, 4 C operations. The kernels move that. A block is the next power of two of C, at least 16, by pixels. Forward sums
outer products of the matrix's columns and the image's channels, read one after another. The inverse runs the two
triangular systems on a block in registers: a row that is solved for is picked by a masked sum, so that a pixel takes
some 4 C² operations; nothing is inverted. The gradient of the matrix is a product over a program's pixels, and the
programs' sums are added in order: no atomics. What is left, algebra of one matrix in float64, is torch's: a dozen small
launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from pyflowgen.kernels import slogdet as determinant
from pyflowgen.kernels import tile
from torch import Tensor

LARGEST = 64  # csrc/invertible_linear.h
PROGRAMS = 256  # of a backward pass, each with its sums


@triton.jit
def pixels(start, inner, strides, WIDE: tl.constexpr, PIXELS: tl.constexpr):
    """Pixels of a block, and where each is before the channel's offset; strides: (batch, channel, inner)."""
    p = start + tl.arange(0, PIXELS)
    if WIDE:
        p = p.to(tl.int64)
    return p, (p // inner) * strides[0] + (p % inner) * strides[2]


# y = matrix x + bias; a part: the first `head` channels of y once more, in a place of their own. count: pixels.
@triton.jit
def forward_kernel(
    x, matrix, bias, y, part, count, inner, head, x_strides, y_strides, part_strides,
    C: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = matrix.dtype.element_ty
    start = tl.program_id(0) * PIXELS
    p, at_x = pixels(start, inner, x_strides, WIDE, PIXELS)
    row = tl.arange(0, SIZE)
    total = tl.zeros([SIZE, PIXELS], dtype)
    total += tl.load(bias + row, mask=row < C, other=0.0)[:, None]
    for k in tl.range(0, C):
        v = tl.load(x + (at_x + k * x_strides[1]), mask=p < count, other=0.0).to(dtype)
        m = tl.load(matrix + (row * C + k), mask=row < C, other=0.0)
        total += m[:, None] * v[None, :]
    store(y, part, total, p, count, inner, head, y_strides, part_strides, C, WIDE, start)


@triton.jit
def store(y, part, values, p, count, inner, head, y_strides, part_strides, C: tl.constexpr, WIDE: tl.constexpr, start):
    row = tl.arange(0, values.shape[0])[:, None]
    inside = (row < C) & (p < count)[None, :]
    _, at = pixels(start, inner, y_strides, WIDE, values.shape[1])
    tl.store(y + (at[None, :] + row * y_strides[1]), values.to(y.dtype.element_ty), mask=inside)
    if part is not None:
        _, at = pixels(start, inner, part_strides, WIDE, values.shape[1])
        tl.store(part + (at[None, :] + row * part_strides[1]), values.to(part.dtype.element_ty),
                 mask=inside & (row < head))  # fmt: skip


@triton.jit
def load_gradient(dy, dpart, p, channel, inside, inner, head, dy_strides, dpart_strides, WIDE: tl.constexpr, start,
                  PIXELS: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """dy, and dpart on the first channels; `channel` a column."""
    total = tl.zeros([channel.shape[0], PIXELS], dtype)
    if dy is not None:
        _, at = pixels(start, inner, dy_strides, WIDE, PIXELS)
        total += tl.load(dy + (at[None, :] + channel * dy_strides[1]), mask=inside, other=0.0).to(dtype)
    if dpart is not None:
        _, at = pixels(start, inner, dpart_strides, WIDE, PIXELS)
        there = inside & (channel < head)
        total += tl.load(dpart + (at[None, :] + channel * dpart_strides[1]), mask=there, other=0.0).to(dtype)
    return total


# dx = matrix^T dy; sums: of dy x^T (C × C), then of dy, for each program by itself.
@triton.jit
def backward_kernel(
    dy, dpart, x, matrix, dx, sums, count, inner, head, dy_strides, dpart_strides, x_strides, dx_strides,
    C: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = matrix.dtype.element_ty
    row = tl.arange(0, SIZE)
    outer = tl.zeros([SIZE, SIZE], dtype)
    of_dy = tl.zeros([SIZE], dtype)
    for block in tl.range(tl.program_id(0), tl.cdiv(count, PIXELS), tl.num_programs(0)):
        start = block * PIXELS
        p, at_x = pixels(start, inner, x_strides, WIDE, PIXELS)
        inside = (row < C)[:, None] & (p < count)[None, :]
        total = tl.zeros([SIZE, PIXELS], dtype)
        for k in tl.range(0, C):
            channel = tl.full([1, 1], 0, tl.int32) + k
            g = load_gradient(dy, dpart, p, channel, (p < count)[None, :], inner, head, dy_strides, dpart_strides, WIDE,
                              start, PIXELS, dtype)  # fmt: skip
            total += tl.load(matrix + (k * C + row), mask=row < C, other=0.0)[:, None] * g
        store(dx, None, total, p, count, inner, head, dx_strides, dx_strides, C, WIDE, start)
        g = load_gradient(dy, dpart, p, row[:, None], inside, inner, head, dy_strides, dpart_strides, WIDE, start,
                          PIXELS, dtype)  # fmt: skip
        across = (row < C)[None, :] & (p < count)[:, None]
        v = tl.load(x + (at_x[:, None] + row[None, :] * x_strides[1]), mask=across, other=0.0).to(dtype)
        outer = tl.dot(g, v, outer, input_precision="ieee", out_dtype=dtype)
        of_dy += tl.sum(g, 1)
    own = sums + tl.program_id(0) * (C * C + C)
    column = tl.arange(0, SIZE)[None, :]
    tl.store(own + (row[:, None] * C + column), outer, mask=(row < C)[:, None] & (column < C))
    tl.store(own + (C * C + row), of_dy, mask=row < C)


@triton.jit
def solve(z, factors, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """L U z' = z in the place of z, or U^T L^T z' = z: `factors` has L below the diagonal, U on and above it."""
    row = tl.arange(0, z.shape[0])
    down: tl.constexpr = 1 if TRANSPOSED else C  # from one row to the next of what is taken as lower and upper
    across: tl.constexpr = C if TRANSPOSED else 1
    for k in tl.range(0, C):
        v = tl.sum(tl.where(row[:, None] == k, z, 0.0), 0)
        if TRANSPOSED:
            v = v / tl.load(factors + (k * C + k))
            z = tl.where(row[:, None] == k, v[None, :], z)
        m = tl.load(factors + (row * down + k * across), mask=(row > k) & (row < C), other=0.0)
        z -= m[:, None] * v[None, :]
    for i in tl.range(0, C):
        k = C - 1 - i
        v = tl.sum(tl.where(row[:, None] == k, z, 0.0), 0)
        if TRANSPOSED == 0:
            v = v / tl.load(factors + (k * C + k))
            z = tl.where(row[:, None] == k, v[None, :], z)
        m = tl.load(factors + (row * down + k * across), mask=row < k, other=0.0)
        z -= m[:, None] * v[None, :]
    return z


# order: which of x's channels row r of L U is. y = ((L U)^-1 x[order] - shift) scale, scale = e^-s.
@triton.jit
def inverse_kernel(
    x, factors, order, scale, shift, y, part, count, inner, head, x_strides, y_strides, part_strides,
    C: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = factors.dtype.element_ty
    start = tl.program_id(0) * PIXELS
    p, at_x = pixels(start, inner, x_strides, WIDE, PIXELS)
    row = tl.arange(0, SIZE)
    source = tl.load(order + row, mask=row < C, other=0).to(at_x.dtype)
    inside = (row < C)[:, None] & (p < count)[None, :]
    z = tl.load(x + (at_x[None, :] + source[:, None] * x_strides[1]), mask=inside, other=0.0).to(dtype)
    z = solve(z, factors, C, False)
    t = tl.load(shift + row, mask=row < C, other=0.0)[:, None]
    s = tl.load(scale + row, mask=row < C, other=0.0)[:, None]
    store(y, part, (z - t) * s, p, count, inner, head, y_strides, part_strides, C, WIDE, start)


# x is what the inverse returned. dx[order] = z = (L U)^-T (scale dy); sums: of z x^T, then of z, of dy x and of dy.
@triton.jit
def inverse_backward_kernel(
    dy, dpart, x, factors, order, scale, dx, sums, count, inner, head, dy_strides, dpart_strides, x_strides, dx_strides,
    C: tl.constexpr, SIZE: tl.constexpr, PIXELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = factors.dtype.element_ty
    row = tl.arange(0, SIZE)
    outer = tl.zeros([SIZE, SIZE], dtype)
    of_z = tl.zeros([SIZE], dtype)
    of_products = tl.zeros([SIZE], dtype)
    of_dy = tl.zeros([SIZE], dtype)
    s = tl.load(scale + row, mask=row < C, other=0.0)[:, None]
    for block in tl.range(tl.program_id(0), tl.cdiv(count, PIXELS), tl.num_programs(0)):
        start = block * PIXELS
        p, at_x = pixels(start, inner, x_strides, WIDE, PIXELS)
        inside = (row < C)[:, None] & (p < count)[None, :]
        g = load_gradient(dy, dpart, p, row[:, None], inside, inner, head, dy_strides, dpart_strides, WIDE, start,
                          PIXELS, dtype)  # fmt: skip
        v = tl.load(x + (at_x[None, :] + row[:, None] * x_strides[1]), mask=inside, other=0.0).to(dtype)
        of_products += tl.sum(g * v, 1)
        of_dy += tl.sum(g, 1)
        z = solve(g * s, factors, C, True)
        _, at = pixels(start, inner, dx_strides, WIDE, PIXELS)
        to = tl.load(order + row, mask=row < C, other=0).to(at.dtype)
        tl.store(dx + (at[None, :] + to[:, None] * dx_strides[1]), z.to(dx.dtype.element_ty), mask=inside)
        outer = tl.dot(z, tl.trans(v), outer, input_precision="ieee", out_dtype=dtype)
        of_z += tl.sum(z, 1)
    own = sums + tl.program_id(0) * (C * C + 3 * C)
    column = tl.arange(0, SIZE)[None, :]
    tl.store(own + (row[:, None] * C + column), outer, mask=(row < C)[:, None] & (column < C))
    tl.store(own + (C * C + row), of_z, mask=row < C)
    tl.store(own + (C * C + C + row), of_products, mask=row < C)
    tl.store(own + (C * C + 2 * C + row), of_dy, mask=row < C)


# -------------------------------------------------------------------------------------------------------- launchers
def _fail(message: str) -> None:
    raise ValueError(f"invertible_linear: {message}")


class _Call:
    """The operator's arguments, checked; the matrix's factors in float64."""

    def __init__(
        self, x: Tensor, weight: Tensor, log_scale: Tensor | None, shift: Tensor | None, permutation: Tensor | None,
        sign: Tensor | None, head: int, inverse: bool, event_dim: int,
    ) -> None:  # fmt: skip
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            _fail(f"x is {x.dtype}, expected float64, float32, bfloat16 or float16")
        if not 1 <= event_dim <= x.dim():
            _fail(f"event_dim is {event_dim}, expected 1 to x's {x.dim()} dimensions")
        self.x, self.dim, self.inverse = x, x.dim() - event_dim, inverse
        c = self.channels = x.shape[self.dim]
        if not 1 <= c <= LARGEST:
            _fail(f"x has {c} channels, expected 1 to {LARGEST}")
        if not 0 <= head <= c:
            _fail(f"head is {head}, expected 0 to x's {c} channels")
        if (permutation is None) != (sign is None):
            _fail("permutation and sign come together")
        for name, t, shape, dtype in (
            ("weight", weight, (c, c), x.dtype), ("log_scale", log_scale, (c,), x.dtype),
            ("shift", shift, (c,), x.dtype), ("sign", sign, (c,), x.dtype),
            ("permutation", permutation, (c,), torch.int64),
        ):  # fmt: skip
            if t is not None and not (t.shape == shape and t.dtype == dtype and t.device == x.device):
                _fail(f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {dtype} {shape} on {x.device}")
        self.batch = self.inner = 1
        for size in x.shape[: self.dim]:
            self.batch *= size
        for size in x.shape[self.dim + 1 :]:
            self.inner *= size
        self.accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        w = weight.double()
        self.packed, self.weight = permutation is not None, w
        self.scale = None if log_scale is None else log_scale.double().exp()
        self.shift = None if shift is None else shift.double()
        if permutation is not None and sign is not None:
            self.order = permutation.argsort()
            self.lower = w.tril(-1).fill_diagonal_(1.0)
            diagonal = sign.double() * w.diagonal().exp()
            self.upper = w.triu(1).diagonal_scatter(diagonal)
            self.matrix = (self.lower @ self.upper)[permutation]
            self.log_abs = w.diagonal().sum()
        else:
            self.matrix = w
            self.log_abs = determinant.slogdet(w)[1]
            if inverse:
                factors, pivots, _ = torch.linalg.lu_factor_ex(w)
                rows, self.lower, self.upper = torch.lu_unpack(factors, pivots)
                self.order = rows.argmax(0)
        if log_scale is not None:
            self.log_abs = self.log_abs + log_scale.double().sum()

    def logdet(self) -> Tensor:
        value = self.log_abs * (-self.inner if self.inverse else self.inner)
        return value.to(self.accumulator).expand(self.x.shape[: self.dim]).contiguous()

    def narrow(self, t: Tensor) -> Tensor:
        return t.to(self.accumulator).contiguous()

    def factors(self) -> Tensor:
        return self.narrow(self.lower.tril(-1) + self.upper)

    def of_channels(self, t: Tensor | None, fill: float) -> Tensor:
        return self.x.new_full((self.channels,), fill, dtype=self.accumulator) if t is None else self.narrow(t)

    def view(self, t: Tensor | None) -> tile.View:
        return tile.NONE if t is None else tile.strided(t, self.dim, self.x.dim())

    def launch(self, kernel: Any, tensors: list[tile.View | Tensor], head: int, programs: int | None = None) -> None:
        """tensors: in the kernel's order, those of pixels with their strides."""
        size, each = self.block()
        count = self.batch * self.inner
        strides = [t[1] for t in tensors if isinstance(t, tuple)]
        options = {
            "C": self.channels, "SIZE": size, "PIXELS": each, "num_warps": 4, "enable_fp_fusion": True,
            "WIDE": tile.wide((self.batch, self.channels, self.inner), strides),
        }  # fmt: skip
        blocks = triton.cdiv(count, each)
        plain = [t[0] if isinstance(t, tuple) else t for t in tensors]
        grid = (blocks if programs is None else programs,)
        tile.Launch(kernel, grid, (*plain, count, self.inner, head, *strides), options).run(self.x.device)

    def block(self) -> tuple[int, int]:
        """Channels and pixels; a matrix product takes no less than 16."""
        size = max(16, triton.next_power_of_2(self.channels))
        return size, max(16, 1024 // size)

    def programs(self) -> int:
        return min(triton.cdiv(self.batch * self.inner, self.block()[1]), PROGRAMS)


def invertible_linear(
    x: Tensor, weight: Tensor, log_scale: Tensor | None, shift: Tensor | None, permutation: Tensor | None,
    sign: Tensor | None, head: int, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim)
    y, written = tile.output(x, call.dim, x.dim())
    rest = [*x.shape[: call.dim], *x.shape[call.dim + 1 :]]
    part = x.new_empty([*rest, head]).movedim(-1, call.dim) if head else x.new_empty(0)
    if x.numel():
        views = [call.view(written), call.view(part if head else None)]
        if inverse:
            scale = call.of_channels(None if call.scale is None else 1 / call.scale, 1.0)
            shifted = call.of_channels(call.shift, 0.0)
            call.launch(inverse_kernel, [call.view(x), call.factors(), call.order, scale, shifted, *views], head)
        else:
            matrix = call.matrix if call.scale is None else call.matrix * call.scale
            bias = call.of_channels(None if call.shift is None else call.matrix @ call.shift, 0.0)
            call.launch(forward_kernel, [call.view(x), call.narrow(matrix), bias, *views], head)
    return y if written is y else y.copy_(written), call.logdet(), part


def invertible_linear_backward(
    dy: Tensor | None, dlogdet: Tensor | None, dpart: Tensor | None, x: Tensor, weight: Tensor,
    log_scale: Tensor | None, shift: Tensor | None, permutation: Tensor | None, sign: Tensor | None, inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    head = 0 if dpart is None else dpart.shape[x.dim() - event_dim]
    call = _Call(x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim)
    tile.check_gradients("invertible_linear", dy, dlogdet, x, call.dim)
    dx, written = tile.output(x, call.dim, x.dim())
    c, columns = call.channels, 3 if inverse else 1
    sums = x.new_zeros(c * c + columns * c, dtype=torch.float64)
    if x.numel() and (dy is not None or dpart is not None):
        partial = x.new_empty(call.programs(), len(sums), dtype=call.accumulator)
        ends = [call.view(written), partial]
        starts = [call.view(dy), call.view(dpart), call.view(x)]
        if inverse:
            scale = call.of_channels(None if call.scale is None else 1 / call.scale, 1.0)
            given = [*starts, call.factors(), call.order, scale, *ends]
            call.launch(inverse_backward_kernel, given, head, len(partial))
        else:
            matrix = call.matrix if call.scale is None else call.matrix * call.scale
            call.launch(backward_kernel, [*starts, call.narrow(matrix), *ends], head, len(partial))
        sums = partial.sum(0, dtype=torch.float64)
    else:
        written.zero_()
    dx = dx if written is dx else dx.copy_(written)
    dweight, dlog_scale, dshift = _parameters(call, sums, dlogdet)
    empty = x.new_empty(0)
    return (
        dx, dweight.to(x.dtype), empty if log_scale is None else dlog_scale.to(x.dtype),
        x.new_empty(0) if shift is None else dshift.to(x.dtype),
    )  # fmt: skip


def _parameters(call: _Call, sums: Tensor, dlogdet: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight, log_scale and shift from the sums over all pixels, in float64: csrc/formula."""
    c, w = call.channels, call.matrix
    scale = torch.ones_like(w[0]) if call.scale is None else call.scale
    dlog = w.new_zeros(()) if dlogdet is None else dlogdet.sum(dtype=torch.float64) * call.inner
    outer, first = sums[: c * c].view(c, c), sums[c * c : c * c + c]
    if call.inverse:  # of x = W^-1 …: dW is minus what dy = W^-T … makes of it, here in L U's order
        dlog = -dlog
        products, of_dy = sums[c * c + c :].view(2, c)
        dlog_scale, dshift = dlog - products, -of_dy / scale
        outer, first = -outer, -first
    else:
        dlog_scale, dshift = (w * scale * outer).sum(0) + dlog, w.mT @ first
    dw = outer * scale
    if call.shift is not None:
        dw = dw + torch.outer(first, call.shift)
    if call.packed:
        dw = dw if call.inverse else dw[call.order]
        of_upper = call.lower.mT @ dw
        diagonal = of_upper.diagonal() * call.upper.diagonal() + dlog
        return ((dw @ call.upper.mT).tril(-1) + of_upper.triu(1)).diagonal_scatter(diagonal), dlog_scale, dshift
    if call.inverse:
        dw = dw[call.order.argsort()]
    return dw + determinant.slogdet_backward(dlog, w), dlog_scale, dshift
