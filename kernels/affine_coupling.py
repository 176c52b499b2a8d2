"""affine_coupling in Triton: one pass forward, one backward, over any strides; the contract of csrc/affine_coupling.h.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor, for n elements of which p are transformed, in elements moved (log-determinants and masks are small beside):
    forward    x, shift, log_scale in, y out:                        2 n + 2 p   additive 2 n + p
    backward   dy, x, shift, log_scale in, dx, dshift, dlog_scale:   2 n + 5 p   additive 2 n + p
The kernels move that: every element is loaded once and stored once, also what is only copied; shift is not read
backward where no derivative needs it (2 n + 4 p). Packed parameters with stride 2 are loaded twice from the same cache
lines. Long rows of a small batch add one number for each segment of at least 4 tiles, for the second sum.
Operations, about, for an element: exp 15, tanh 35, sigmoid and softplus 50 to 70, atan 45. In float32, at 16 bytes an
element forward, that is at most 5 operations a byte, under the 20 that an H100 does in the time it moves a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from pyflowgen.kernels import tile
from pyflowgen.kernels.elementary import atan, divide, exp, log1p_unit, log_normal, reciprocal, softplus, tanh
from pyflowgen.kernels.tile import NONE, View, at
from torch import Tensor

# The operator's `scale` and `layout` codes: csrc/formula/affine_scale.h, csrc/affine_coupling_call.h.
ADDITIVE = tl.constexpr(0)
TANH = tl.constexpr(2)
SIGMOID = tl.constexpr(3)
SIGMOID_EPS = tl.constexpr(4)
SOFTCLIP = tl.constexpr(5)
ATAN = tl.constexpr(6)
SOFTPLUS = tl.constexpr(7)
SEPARATE, HALVES, INTERLEAVED, PAIRS = range(4)  # and the last three again, with the log-scale first


@triton.jit
def scale_value(s, CLAMP: tl.constexpr, SCALE: tl.constexpr, INVERSE: tl.constexpr, GAIN: tl.constexpr):
    """What x is multiplied by (a, or 1/a for the inverse), log a and its derivative; csrc/formula/affine_coupling.h."""
    if GAIN != 1:
        s *= GAIN
    if SCALE == SIGMOID or SCALE == SIGMOID_EPS:  # noqa: SIM109
        u = s + 2.0
        e = exp(-tl.abs(u))  # in (0, 1]: neither overflows for any u
        small = tl.where(u < 0, e, 1.0)
        large = tl.where(u < 0, 1.0, e)
        if SCALE == SIGMOID:
            factor = divide(1.0 + e, small) if INVERSE else divide(small, 1.0 + e)
            log_a = tl.where(u < 0, u, 0.0) - log1p_unit(e)
            derivative = divide(large, 1.0 + e)
        else:
            sigma = divide(small, 1.0 + e)
            a = sigma + 1e-3
            factor = reciprocal(a) if INVERSE else a
            log_a = log_normal(a)
            derivative = divide(sigma * divide(large, 1.0 + e), a)
    elif SCALE == SOFTPLUS:
        a = softplus(s) + 1e-3
        factor = reciprocal(a) if INVERSE else a
        log_a = log_normal(a)
        e = exp(-tl.abs(s))
        derivative = divide(divide(tl.where(s < 0, e, 1.0), 1.0 + e), a)
    else:
        if SCALE == TANH:
            th = tanh(divide(s, CLAMP))
            log_a = CLAMP * th
            derivative = 1.0 - th * th
        elif SCALE == SOFTCLIP:
            q = 1.0 + tl.abs(divide(s, CLAMP))
            d = reciprocal(q)
            log_a = divide(s, q)
            derivative = d * d
        elif SCALE == ATAN:
            log_a = (CLAMP * 0.636) * atan(s)
            derivative = (CLAMP * 0.636) * reciprocal(1.0 + s * s)
        else:
            log_a = s
            derivative = tl.full(s.shape, 1.0, s.dtype)
        factor = exp(-log_a if INVERSE else log_a)
    if GAIN != 1:
        derivative *= GAIN
    return factor, log_a, derivative


@triton.jit
def transform(
    v, t, s, CLAMP: tl.constexpr, SCALE: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr,
    GAIN: tl.constexpr = 1.0,
):  # fmt: skip
    """y, and the forward map's log-derivative."""
    if SCALE == ADDITIVE:
        return v - t if INVERSE else v + t, tl.zeros(v.shape, v.dtype)
    else:
        factor, log_a, _ = scale_value(s, CLAMP, SCALE, INVERSE, GAIN)
        if INVERSE:
            return v * factor - t if SHIFT_FIRST else (v - t) * factor, log_a
        else:
            return (v + t) * factor if SHIFT_FIRST else v * factor + t, log_a


@triton.jit
def transform_backward(
    g, dl, v, t, s, CLAMP: tl.constexpr, SCALE: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr,
    GAIN: tl.constexpr = 1.0,
):  # fmt: skip
    """Gradients of v, t and s from those of y and the log-determinant; t counts where the scale multiplies it."""
    if SCALE == ADDITIVE:
        return g, -g if INVERSE else g, tl.zeros(g.shape, g.dtype)
    else:
        if INVERSE != SHIFT_FIRST:  # what the scale multiplies or divides
            v = v - t if INVERSE else v + t
        factor, _, derivative = scale_value(s, CLAMP, SCALE, INVERSE, GAIN)
        dv = g * factor
        ds = (dv * v + dl) * derivative
        if INVERSE:
            return dv, -g if SHIFT_FIRST else -dv, -ds
        else:
            return dv, dv if SHIFT_FIRST else g, ds


@triton.jit
def block(sizes, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows, and the columns [col, end)."""
    row = tl.program_id(0)
    col = tl.program_id(1)
    if WIDE:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
    col *= sizes[7]
    return row * ROWS + tl.arange(0, ROWS)[:, None], col, tl.minimum(col + sizes[7], sizes[6])


@triton.jit
def position(e, sizes, CHANNEL_FASTEST: tl.constexpr):
    """Element e of an event: its channel and inner index, the parameters' channel, and whether it is transformed."""
    if CHANNEL_FASTEST:
        i = e // sizes[1]
        c = e - i * sizes[1]
    else:
        c = e // sizes[2]
        i = e - c * sizes[2]
    k = (c - sizes[3]) // sizes[4]
    return c, i, k, (c >= sizes[3]) & (k * sizes[4] == c - sizes[3]) & (k < sizes[5])


# sizes: batch, channels, inner, start, step, count, elements of an event, columns of a segment.
# strides: (batch, channel, inner) of every tensor in the order of the arguments. A tensor that is not there is None.
@triton.jit
def forward_kernel(
    x, shift, log_scale, mask, y, logdet, sizes, strides,
    CLAMP: tl.constexpr, SCALE: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, GAIN: tl.constexpr,
    CHANNEL_FASTEST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = logdet.dtype.element_ty
    row, col, end = block(sizes, WIDE, ROWS)
    total = tl.zeros([ROWS, COLS], dtype)
    # Hoisting the polynomials' constants out of the loop would take registers until some spill.
    for first in tl.range(col, end, COLS, disable_licm=True):
        e = first + tl.arange(0, COLS)[None, :]
        inside = (row < sizes[0]) & (e < end)
        c, i, k, active = position(e, sizes, CHANNEL_FASTEST)
        if mask is not None:
            active = active & (tl.load(at(mask, strides[3], 0, c, i), mask=e < end, other=0) != 0)
        used = inside & active
        stored = tl.load(at(x, strides[0], row, c, i), mask=inside, other=0.0)
        v = stored.to(dtype)
        t = tl.load(at(shift, strides[1], row, k, i), mask=used, other=0.0).to(dtype)
        s = v
        if SCALE != ADDITIVE:
            s = tl.load(at(log_scale, strides[2], row, k, i), mask=used, other=0.0).to(dtype)
        result, log_a = transform(v, t, s, CLAMP, SCALE, SHIFT_FIRST, INVERSE, GAIN)
        total += tl.where(used, log_a, 0.0)
        tl.store(at(y, strides[4], row, c, i), tl.where(active, result.to(stored.dtype), stored), mask=inside)
    sum = tl.sum(total, 1)[:, None]
    segment = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(logdet + segment, -sum if INVERSE else sum, mask=row < sizes[0])


@triton.jit
def backward_kernel(
    dy, x, shift, log_scale, mask, dx, dshift, dlog_scale, dlogdet, sizes, strides,
    CLAMP: tl.constexpr, SCALE: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, GAIN: tl.constexpr,
    CHANNEL_FASTEST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = dx.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if storage == tl.float64 else tl.float32
    row, col, end = block(sizes, WIDE, ROWS)
    dl = tl.zeros([ROWS, 1], dtype)
    if dlogdet is not None:
        dl = tl.load(dlogdet + row * strides[8][0], mask=row < sizes[0], other=0.0)
    for first in tl.range(col, end, COLS, disable_licm=True):
        e = first + tl.arange(0, COLS)[None, :]
        inside = (row < sizes[0]) & (e < end)
        c, i, k, part = position(e, sizes, CHANNEL_FASTEST)
        active = part
        if mask is not None:
            active = active & (tl.load(at(mask, strides[4], 0, c, i), mask=e < end, other=0) != 0)
        used = inside & active
        g = tl.zeros([ROWS, COLS], storage)
        if dy is not None:
            g = tl.load(at(dy, strides[0], row, c, i), mask=inside, other=0.0)
        v = g.to(dtype)
        s = v
        t = v
        if SCALE != ADDITIVE:
            v = tl.load(at(x, strides[1], row, c, i), mask=used, other=0.0).to(dtype)
            s = tl.load(at(log_scale, strides[3], row, k, i), mask=used, other=0.0).to(dtype)
            if INVERSE != SHIFT_FIRST:
                t = tl.load(at(shift, strides[2], row, k, i), mask=used, other=0.0).to(dtype)
        dv, dt, ds = transform_backward(g.to(dtype), dl, v, t, s, CLAMP, SCALE, SHIFT_FIRST, INVERSE, GAIN)
        tl.store(at(dx, strides[5], row, c, i), tl.where(active, dv.to(storage), g), mask=inside)
        # Under a mask the gradient is zero; outside the part there is none.
        given = inside & part
        tl.store(at(dshift, strides[6], row, k, i), tl.where(active, dt, 0.0).to(storage), mask=given)
        if dlog_scale is not None:
            tl.store(at(dlog_scale, strides[7], row, k, i), tl.where(active, ds, 0.0).to(storage), mask=given)


def _fail(message: str) -> None:
    raise ValueError(f"affine_coupling: {message}")


class _Call:
    """The operator's arguments, checked, and every tensor as (batch, channels, inner)."""

    def __init__(
        self, x: Tensor, params: Tensor, log_scale: Tensor | None, mask: Tensor | None, layout: int, start: int,
        step: int, scale: int, clamp: float, gain: float, shift_first: bool, inverse: bool, event_dim: int,
    ) -> None:  # fmt: skip
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            _fail(f"x is {x.dtype}, expected float64, float32, bfloat16 or float16")
        if not 0 <= event_dim <= x.dim():
            _fail(f"event_dim is {event_dim}, expected 0 to x's {x.dim()} dimensions")
        if not (0 <= layout <= 2 * PAIRS and 0 <= scale <= SOFTPLUS.value and start >= 0 and step >= 1):
            _fail(f"layout={layout}, scale={scale}, start={start}, step={step} are out of range")
        scale_first = layout > PAIRS
        layout -= PAIRS * scale_first
        if (layout == SEPARATE) != (log_scale is not None or scale == 0):
            _fail("log_scale comes with separate parameters and a scale, and only then")
        dims = self.dims = x.dim()
        dim = self.batch_dims = dims - event_dim
        packed = layout in (HALVES, INTERLEAVED)
        if packed and event_dim == 0:
            _fail("layout on the channels needs event_dim of 1 or more")
        channels = x.shape[dim] if event_dim else 1
        if params.dim() != dims + (layout == PAIRS) or (packed and params.shape[dim] % 2):
            _fail(f"shift has shape {tuple(params.shape)}, which does not fit x's {tuple(x.shape)}")
        count = (params.shape[dim] // (2 if packed else 1)) if event_dim else 1
        if event_dim and count and start + (count - 1) * step >= channels:
            _fail(f"start={start}, step={step} with {count} channels reach beyond x's {channels}")
        shape = list(x.shape)
        if event_dim:
            shape[dim] = count
        self._same("log_scale", log_scale, x, shape)
        if packed:
            shape[dim] *= 2
        self._same("shift", params, x, shape + [2] * (layout == PAIRS))
        event = list(x.shape[dim:])
        if mask is not None and not (
            list(mask.shape) == event and mask.dtype == torch.bool and mask.device == x.device and count == channels
        ):
            _fail(f"mask must be bool of x's event shape {tuple(event)}, on its device, with all parameters")

        self.x, self.layout, self.scale_first, self.count = x, layout, scale_first, count
        self.empty = x.numel() == 0 or params.numel() == 0
        self.accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        batch = inner = 1
        for size in x.shape[:dim]:
            batch *= size
        for size in x.shape[dim + 1 :]:
            inner *= size
        self.sizes = batch, channels, inner, start, step, count
        self.options = {"CLAMP": clamp, "SCALE": scale, "SHIFT_FIRST": shift_first, "INVERSE": inverse, "GAIN": gain}
        if not self.empty:
            self.inputs = self.view(x), *self.unpack(params, log_scale), self.view_mask(mask, event_dim)

    @staticmethod
    def _same(name: str, t: Tensor | None, x: Tensor, shape: list[int]) -> None:
        if t is not None and not (t.dtype == x.dtype and t.device == x.device and list(t.shape) == shape):
            _fail(
                f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {x.dtype} {tuple(shape)} on {x.device}"
            )

    def tiles(self) -> tile.Tiles:
        batch, channels, inner = self.sizes[:3]
        return tile.tiles(batch, channels * inner, tile.TILE // (4 if self.accumulator == torch.float64 else 1))

    def view(self, t: Tensor | None) -> View:
        return NONE if t is None else tile.strided(t, self.batch_dims, self.dims)

    @staticmethod
    def view_mask(mask: Tensor | None, event_dim: int) -> View:
        return NONE if mask is None else tile.strided(mask.view(torch.uint8), 0, event_dim)

    def unpack(self, params: Tensor, log_scale: Tensor | None) -> tuple[View, View]:
        """Shift and log-scale, a packed tensor in place."""
        if self.layout == SEPARATE:
            return self.view(params), self.view(log_scale)
        params, (b, c, i) = tile.strided(params, self.batch_dims, self.dims)
        if self.layout == PAIRS:
            one, two = params.unbind(-1)
        else:
            second = self.count if self.layout == HALVES else 1
            c *= 1 if self.layout == HALVES else 2
            one, two = params, params.narrow(self.batch_dims, second, params.shape[self.batch_dims] - second)
        shift, s = (two, one) if self.scale_first else (one, two)
        return (shift, (b, c, i)), (s, (b, c, i))

    def launch(
        self, kernel: Any, t: tile.Tiles, views: Sequence[View], per_channel: Sequence[int], *extra: View
    ) -> None:
        """Run `kernel` on `views`, in its argument order; per_channel: those with `count` channels."""
        batch, channels, inner, start, step, count = self.sizes
        strides = [s for _, s in views]
        channels_of = [count if n in per_channel else channels for n in range(len(views))]
        # Channels and inner as one dimension wherever every tensor allows it: no division in the kernel.
        if inner > 1 and step == 1 and all(
            v is None or n == 1 or c == i * inner for (v, (_, c, i)), n in zip(views, channels_of, strict=True)
        ):  # fmt: skip
            channels, start, count, inner = channels * inner, start * inner, count * inner, 1
            strides = [(b, i, 0) for b, _, i in strides]
        x_strides = strides[0 if views[0][0] is not None else 1]
        options = self.options | {
            "CHANNEL_FASTEST": inner > 1 and x_strides[1] < x_strides[2],
            "WIDE": tile.wide((batch, channels, inner), strides),
            "ROWS": t.rows, "COLS": t.cols, "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip
        sizes = (batch, channels, inner, start, step, count, channels * inner, t.segment)
        tensors = [v for v, _ in (*views, *extra)]
        strides += [s for _, s in extra]
        tile.Launch(kernel, (t.row_blocks, t.segments), (*tensors, sizes, tuple(strides)), options).run(self.x.device)


def affine_coupling(
    x: Tensor, params: Tensor, log_scale: Tensor | None, mask: Tensor | None, layout: int, start: int, step: int,
    scale: int, clamp: float, gain: float, shift_first: bool, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    call = _Call(x, params, log_scale, mask, layout, start, step, scale, clamp, gain, shift_first, inverse, event_dim)
    y, written = tile.output(x, call.batch_dims, call.dims)
    logdet = x.new_empty(x.shape[: call.batch_dims], dtype=call.accumulator)
    if call.empty:
        return y.copy_(x), logdet.zero_()
    t = call.tiles()
    partial = logdet.view(-1, 1) if t.segments == 1 else logdet.new_empty(call.sizes[0], t.segments)
    call.launch(forward_kernel, t, (*call.inputs, call.view(written)), (1, 2), (partial, (0, 0, 0)))
    if t.segments > 1:
        torch.sum(partial, 1, out=logdet.view(-1))
    return y if written is y else y.copy_(written), logdet


def affine_coupling_backward(
    dy: Tensor | None, dlogdet: Tensor | None, x: Tensor, params: Tensor, log_scale: Tensor | None,
    mask: Tensor | None, layout: int, start: int, step: int, scale: int, clamp: float, gain: float, shift_first: bool,
    inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(x, params, log_scale, mask, layout, start, step, scale, clamp, gain, shift_first, inverse, event_dim)
    tile.check_gradients("affine_coupling", dy, dlogdet, x, call.batch_dims)
    outputs = [tile.output(t, call.batch_dims, call.dims) for t in (x, params, log_scale) if t is not None]
    if call.empty:
        for result, _ in outputs:
            result.zero_()
        if dy is not None:
            outputs[0][0].copy_(dy)
    else:
        dx, dparams, *dlog_scale = (written for _, written in outputs)
        gradients = call.view(dx), *call.unpack(dparams, *(dlog_scale or (None,)))
        call.launch(
            backward_kernel, call.tiles(), (call.view(dy), *call.inputs, *gradients), (2, 3, 6, 7),
            tile.strided(dlogdet, call.batch_dims, call.batch_dims) if dlogdet is not None else NONE,
        )  # fmt: skip
        for result, written in outputs:
            if written is not result:
                result.copy_(written)
    results = [result for result, _ in outputs]
    return results[0], results[1], results[2] if log_scale is not None else x.new_empty(0)
