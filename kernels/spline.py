"""What the splines' kernels share: an axis of knots by softmax, the search, the loops over elements and rows, the
operators' arguments. A spline brings its element: `ELEMENT` of the kernels, with the parameters where they lie.

A block is elements × the next power of two of the bins, so that 12 bins cost as much arithmetic as 16.

Sums of a softmax are sums of integers, 2^30 (2^62 in float64) shared out over the bins: exact in any order, so that
the bin that is found does not hang on how a device forms its prefix sums, and no knot errs by more than two roundings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from pyflowgen.kernels import tile
from pyflowgen.kernels.elementary import divide, exp
from pyflowgen.kernels.tile import NONE, View, at
from torch import Tensor

# The operators' codes: csrc/formula/spline_convention.h, csrc/rational_quadratic_spline_call.h.
LINEAR = tl.constexpr(1)
MIXED = tl.constexpr(3)
SEPARATE, LAST, CHANNELS = range(3)
LARGEST = 64
# Elements × bins of a block: 8 values of either axis a thread in float32, 2 in float64.
BLOCK = 1024

# Places in NUMBERS, the constants of a launch.
LEFT, RIGHT, BOTTOM, TOP, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, EDGE, INVERSE_CLIP, SCALE = (
    tl.constexpr(i) for i in range(10)
)


# ------------------------------------------------------------------------------------------------- knots and the bin
@triton.jit
def unit(e):
    """How many integers stand for 1."""
    one: tl.constexpr = (2.0**62 if e.dtype == tl.float64 else 2.0**30) / e.shape[1]
    return one


@triton.jit
def exponentials(logit, BINS: tl.constexpr):
    """Of a softmax, the largest 1, and 0 beyond the bins."""
    there = tl.arange(0, logit.shape[1])[None, :] < BINS
    largest = tl.max(tl.where(there, logit, float("-inf")), 1)
    return tl.where(there, exp(logit - largest[:, None]), 0.0)


@triton.jit
def shares(e, range, LEAST: tl.constexpr, BINS: tl.constexpr):
    """Of one axis: integers in proportion to e, at most 1; their sum; half of what an integer is of the interval."""
    dtype: tl.constexpr = e.dtype
    integer: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    counts = (e * unit(e) + 0.5).to(integer)
    total = tl.sum(counts, 1)
    # NaN is no integer: it comes in by the exponentials' own sum.
    half = divide(range * (0.5 - 0.5 * LEAST * BINS), total.to(dtype)) + tl.sum(e, 1) * 0.0
    return counts, total, half


@triton.jit
def knot(k, twice, half, low, high, LEAST: tl.constexpr, BINS: tl.constexpr):
    """Place of knot k; twice: two times the integers before it, less their sum. The same bits wherever it is formed."""
    from_middle = (k.to(half.dtype) - 0.5 * BINS) * LEAST
    return tl.fma(twice.to(half.dtype), half, tl.fma(from_middle, high - low, 0.5 * (low + high)))


@triton.jit
def search(v, counts, total, half, low, high, LEAST: tl.constexpr, BINS: tl.constexpr):
    """The bin that v lies in; NaN in the first."""
    j = tl.arange(0, counts.shape[1])[None, :]
    sums = tl.cumsum(counts, 1)
    twice = sums - total[:, None] + sums
    right = knot(j + 1, twice, half[:, None], low[:, None], high[:, None], LEAST, BINS)
    return tl.sum(tl.where((v[:, None] >= right) & (j < BINS - 1), 1, 0), 1)


@triton.jit
def ends(number, counts, total, half, low, high, LEAST: tl.constexpr, BINS: tl.constexpr):
    """Of bin `number`: the integers before it, its own, and where it begins and ends."""
    j = tl.arange(0, counts.shape[1])[None, :]
    before = tl.sum(tl.where(j < number[:, None], counts, 0), 1)
    own = tl.sum(tl.where(j == number[:, None], counts, 0), 1)
    twice = before - total + before
    begin = knot(number, twice, half, low, high, LEAST, BINS)
    end = knot(number + 1, twice + own + own, half, low, high, LEAST, BINS)
    return before, own, tl.where(number == 0, low, begin), tl.where(number == BINS - 1, high, end)


@triton.jit
def locate(
    v, counts_x, total_x, half_x, x_low, x_high, counts_y, total_y, half_y, y_low, y_high, LEAST_X: tl.constexpr,
    LEAST_Y: tl.constexpr, BINS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The bin that v lies in, and what `ends` says of it on either axis."""
    if INVERSE:
        number = search(v, counts_y, total_y, half_y, y_low, y_high, LEAST_Y, BINS)
    else:
        number = search(v, counts_x, total_x, half_x, x_low, x_high, LEAST_X, BINS)
    along_x = ends(number, counts_x, total_x, half_x, x_low, x_high, LEAST_X, BINS)
    along_y = ends(number, counts_y, total_y, half_y, y_low, y_high, LEAST_Y, BINS)
    return number, along_x, along_y


@triton.jit
def of_bins(number, before, at, SIZE: tl.constexpr):
    """For every bin what those before bin `number` have, what it has itself, and 0 beyond."""
    j = tl.arange(0, SIZE)[None, :]
    n = number[:, None]
    return tl.where(j < n, before[:, None], tl.where(j == n, at[:, None], 0.0))


@triton.jit
def interval(bound, NUMBERS: tl.constexpr):
    """(left, right, bottom, top) of every element; bound: its own, 1 where there is none."""
    return bound * NUMBERS[LEFT], bound * NUMBERS[RIGHT], bound * NUMBERS[BOTTOM], bound * NUMBERS[TOP]


@triton.jit
def within(v, low, high):
    """Whether the spline has v, and v where it has, else the interval's begin."""
    inside = (v >= low) & (v <= high)
    return inside, tl.where(inside, v, low)


# --------------------------------------------------------------------------------------------------------- kernels
@triton.jit
def part_position(e, sizes, CHANNEL_FASTEST: tl.constexpr):
    """The e-th transformed element of an event: the parameters' channel, x's, and the inner index."""
    if CHANNEL_FASTEST:
        i = e // sizes[5]
        k = e - i * sizes[5]
    else:
        k = e // sizes[2]
        i = e - k * sizes[2]
    return k, sizes[3] + k * sizes[4], i


@triton.jit
def copy_rest(source, to, row, lane, sizes, strides, to_strides, CHANNEL_FASTEST: tl.constexpr, COLS: tl.constexpr):
    """This program's share of what is not transformed; zeros where there is no source."""
    elements = sizes[1] * sizes[2]
    segment = tl.cdiv(elements, tl.num_programs(1))
    begin = tl.program_id(1) * segment
    end = tl.minimum(begin + segment, elements)
    for first in range(begin, end, COLS):
        e = first + lane
        if CHANNEL_FASTEST:
            i = e // sizes[1]
            c = e - i * sizes[1]
        else:
            c = e // sizes[2]
            i = e - c * sizes[2]
        k = (c - sizes[3]) // sizes[4]
        part = (c >= sizes[3]) & (k * sizes[4] == c - sizes[3]) & (k < sizes[5])
        rest = (row < sizes[0]) & (e < end) & (part == 0)
        value = tl.zeros(e.shape, to.dtype.element_ty)
        if source is not None:
            value = tl.load(at(source, strides, row, c, i), mask=rest, other=0.0)
        tl.store(at(to, to_strides, row, c, i), value, mask=rest)


@triton.jit
def lanes(sizes, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Every lane's row and column, and this program's columns [col, end) of the transformed elements."""
    row = tl.program_id(0)
    col = tl.program_id(1)
    if WIDE:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
    col *= sizes[7]
    lane = tl.arange(0, ROWS * COLS)
    return row * ROWS + lane // COLS, lane % COLS, col, tl.minimum(col + sizes[7], sizes[6])


@triton.jit
def places(strides, FIRST: tl.constexpr, row, k, i, PACKED: tl.constexpr):
    """Where each element's widths, heights and derivatives begin: one number for all three in a packed tensor."""
    w = at(0, strides[FIRST], row, k, i)
    if PACKED:
        return w, w, w
    else:
        return w, at(0, strides[FIRST + 1], row, k, i), at(0, strides[FIRST + 2], row, k, i)


@triton.jit
def per_element(bound, circular, strides, k, i, used, dtype: tl.constexpr):
    """Each element's bound and whether its tails are circular, where those differ."""
    one = tl.full(k.shape, 1.0, dtype)
    if bound is not None:
        one = tl.load(at(bound, strides[4], 0, k, i), mask=used, other=1.0).to(dtype)
    round = k < 0
    if circular is not None:
        round = tl.load(at(circular, strides[5], 0, k, i), mask=used, other=0) != 0
    return one, round


# sizes: batch, channels, inner, start, step, count, transformed elements of an event, columns of a segment.
# strides: (batch, channel, inner) of every tensor in the order of the arguments. A tensor that is not there is None.
# steps: from one parameter of an element to the next, of widths, heights and derivatives.
# KIND: the convention of a rational quadratic, the degree of a polynomial. ELEMENT: the op's function of an element.
@triton.jit
def forward_kernel(
    x, widths, heights, derivatives, bound, circular, mask, y, logdet, sizes, strides, steps,
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, CHANNEL_FASTEST: tl.constexpr, WIDE: tl.constexpr, COPIES: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = logdet.dtype.element_ty
    row, lane, col, end = lanes(sizes, WIDE, ROWS, COLS)
    total = tl.zeros([ROWS * COLS], dtype)
    for first in tl.range(col, end, COLS, disable_licm=True):
        e = first + lane
        used = (row < sizes[0]) & (e < end)
        k, c, i = part_position(e, sizes, CHANNEL_FASTEST)
        on = used
        if mask is not None:
            on = used & (tl.load(at(mask, strides[6], 0, c, i), mask=used, other=0) != 0)
        stored = tl.load(at(x, strides[0], row, c, i), mask=used, other=0.0)
        one, round = per_element(bound, circular, strides, k, i, used, dtype)
        result, log_slope = ELEMENT(
            stored.to(dtype), on, widths, heights, derivatives, places(strides, 1, row, k, i, PACKED), steps, one,
            round, NUMBERS, BINS, SIZE, KIND, TAILS, INVERSE,
        )  # fmt: skip
        total += tl.where(on, log_slope, 0.0)
        tl.store(at(y, strides[7], row, c, i), tl.where(on, result.to(stored.dtype), stored), mask=used)
    if COPIES:
        copy_rest(x, y, row, lane, sizes, strides[0], strides[7], CHANNEL_FASTEST, COLS)
    sum = tl.sum(tl.reshape(total, (ROWS, COLS)), 1)
    row = row_of_sum(WIDE, ROWS)
    segment = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(logdet + segment, -sum if INVERSE else sum, mask=row < sizes[0])


@triton.jit
def row_of_sum(WIDE: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    return row * ROWS + tl.arange(0, ROWS)


# strides: of dy, x, widths, heights, bound's and circular's at 4 and 5, derivatives, mask, dx and the gradients.
@triton.jit
def backward_kernel(
    x, widths, heights, derivatives, bound, circular, mask, dy, dx, dwidths, dheights, dderivatives, dlogdet,
    sizes, strides, steps, dsteps,
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, CHANNEL_FASTEST: tl.constexpr, WIDE: tl.constexpr, COPIES: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ELEMENT: tl.constexpr,
):  # fmt: skip
    storage: tl.constexpr = dx.dtype.element_ty
    dtype: tl.constexpr = tl.float64 if storage == tl.float64 else tl.float32
    row, lane, col, end = lanes(sizes, WIDE, ROWS, COLS)
    dl = tl.zeros([ROWS * COLS], dtype)
    if dlogdet is not None:
        dl = tl.load(dlogdet + row * strides[12][0], mask=row < sizes[0], other=0.0)
    for first in tl.range(col, end, COLS, disable_licm=True):
        e = first + lane
        used = (row < sizes[0]) & (e < end)
        k, c, i = part_position(e, sizes, CHANNEL_FASTEST)
        on = used
        if mask is not None:
            on = used & (tl.load(at(mask, strides[6], 0, c, i), mask=used, other=0) != 0)
        v = tl.load(at(x, strides[0], row, c, i), mask=used, other=0.0).to(dtype)
        g = tl.zeros([ROWS * COLS], storage)
        if dy is not None:
            g = tl.load(at(dy, strides[7], row, c, i), mask=used, other=0.0)
        one, round = per_element(bound, circular, strides, k, i, used, dtype)
        dv = ELEMENT(
            g.to(dtype), dl, v, used, on, widths, heights, derivatives, places(strides, 1, row, k, i, PACKED), steps,
            dwidths, dheights, dderivatives, places(strides, 9, row, k, i, PACKED), dsteps, one, round, NUMBERS, BINS,
            SIZE, KIND, TAILS, INVERSE,
        )  # fmt: skip
        tl.store(at(dx, strides[8], row, c, i), tl.where(on, dv.to(storage), g), mask=used)
    if COPIES:
        copy_rest(dy, dx, row, lane, sizes, strides[7], strides[8], CHANNEL_FASTEST, COLS)


# -------------------------------------------------------------------------------------------------------- launchers
class Call:
    """An operator's arguments, checked, and every tensor as (batch, channels, inner).

    `given`: the parameters by name, each with how many an element has. `each`: all that an element has.
    """

    def __init__(
        self, op: str, x: Tensor, given: dict[str, tuple[Tensor | None, int]], each: int, bound: Tensor | None,
        circular: Tensor | None, mask: Tensor | None, bins: int, layout: int, start: int, step: int, kind: int,
        tails: int, numbers: tuple[float, ...], inverse: bool, event_dim: int, block: int = BLOCK,
    ) -> None:  # fmt: skip
        self.op, self.block = op, block
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            self.fail(f"x is {x.dtype}, expected float64, float32, bfloat16 or float16")
        if not 0 <= event_dim <= x.dim():
            self.fail(f"event_dim is {event_dim}, expected 0 to x's {x.dim()} dimensions")
        if not (
            0 <= layout <= CHANNELS and 0 <= tails <= 5 and start >= 0 and step >= 1 and 2 <= bins <= LARGEST
        ):  # fmt: skip
            self.fail(f"{layout=}, {tails=}, {start=}, {step=}, {bins=} are out of range")
        dims, dim = x.dim(), x.dim() - event_dim
        self.x, self.dims, self.batch_dims, self.layout, self.bins = x, dims, dim, layout, bins
        self.each = each
        last = layout != CHANNELS
        name, (first, _) = next(iter(given.items()))
        assert first is not None
        if (event_dim == 0 and not last) or first.dim() != dims + last:
            self.fail(f"{name} has shape {tuple(first.shape)}, which does not fit x's {tuple(x.shape)}")
        count = (first.shape[dim] if event_dim else 1) // (1 if last else each)
        channels = x.shape[dim] if event_dim else 1
        if event_dim and count and start + (count - 1) * step >= channels:
            self.fail(f"start={start}, step={step} with {count} channels reach beyond x's {channels}")
        for name, (t, size) in given.items():
            shape = [*x.shape, size] if last else list(x.shape)
            if event_dim:
                shape[dim] = count if last else count * each
            if t is not None and not (t.dtype == x.dtype and t.device == x.device and list(t.shape) == shape):
                self.fail(f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {x.dtype} {tuple(shape)}")
        self.accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        event = list(x.shape[dim:])
        part = [count, *event[1:]] if event_dim else []
        for name, t, shape, dtype in (
            ("bound", bound, part, self.accumulator), ("circular", circular, part, torch.bool),
            ("mask", mask, event, torch.bool),
        ):  # fmt: skip
            if t is not None and not (list(t.shape) == shape and t.dtype == dtype and t.device == x.device):
                self.fail(f"{name} is {t.dtype} of shape {tuple(t.shape)}, expected {dtype} of shape {tuple(shape)}")
        if (mask is not None and count != channels) or (circular is None) == (tails == MIXED.value):
            self.fail("a mask needs parameters for every channel, and mixed tails circular")

        self.empty = x.numel() == 0 or first.numel() == 0
        batch = inner = 1
        for size in x.shape[:dim]:
            batch *= size
        for size in x.shape[dim + 1 :]:
            inner *= size
        self.sizes = batch, channels, inner, start, step, count
        *ends, edge, clip, scale = numbers
        self.options = {
            "NUMBERS": (*ends, edge, 1 / clip if clip > 0 else 0.0, scale), "BINS": bins,
            "SIZE": triton.next_power_of_2(bins), "KIND": kind, "TAILS": tails, "INVERSE": inverse,
            "COPIES": count < channels, "PACKED": layout != SEPARATE,
        }  # fmt: skip
        self.given = [t for t, _ in given.values() if t is not None]
        if not self.empty:
            parameters, self.steps = self.unpack(self.given)
            in_event = [
                NONE if t is None else tile.strided(t if t.dtype != torch.bool else t.view(torch.uint8), 0, event_dim)
                for t in (bound, circular, mask)
            ]
            self.inputs = (self.view(x), *parameters, *in_event)

    def fail(self, message: str) -> None:
        raise ValueError(f"{self.op}: {message}")

    def view(self, t: Tensor | None) -> View:
        return NONE if t is None else tile.strided(t, self.batch_dims, self.dims)

    def unpack(self, given: Sequence[Tensor]) -> tuple[list[View], tuple[int, ...]]:
        """Widths, heights and derivatives, packed ones in place, and the distance between an element's own.

        A polynomial's are one run, from the first of the three.
        """
        if self.layout == SEPARATE:
            views = [self.view(t) for t in given]
            return views, tuple(t.stride(-1) for t, _ in views if t is not None)
        packed, (b, c, i) = tile.strided(given[0], self.batch_dims, self.dims)
        dim = self.dims if self.layout == LAST else self.batch_dims
        step = packed.stride(dim)
        if self.layout == CHANNELS:
            c *= self.each
        firsts = [min(n * self.bins, self.each - 1) for n in range(3)]
        parts = [packed.narrow(dim, n, packed.shape[dim] - n) for n in firsts]
        return [(t, (b, c, i)) for t in parts], (step,) * 3

    def launch(
        self, kernel: Any, element: Any, segments: tile.Tiles, views: Sequence[View], steps: Sequence[tuple[int, ...]]
    ) -> None:
        batch, channels, inner, start, step, count = self.sizes
        strides = tuple(s for _, s in views)
        widths = self.inputs[1][1]
        # An element's last parameter is that much further.
        reach = [(1, 1, max(s) * self.each) for s in steps]
        options = self.options | {
            "CHANNEL_FASTEST": inner > 1 and widths[1] < widths[2],
            "WIDE": tile.wide((batch, channels, inner), (*strides, *reach)),
            "ROWS": segments.rows, "COLS": segments.cols, "ELEMENT": element, "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip
        sizes = (*self.sizes, count * inner, segments.segment)
        tensors = [t for t, _ in views]
        grid = (segments.row_blocks, segments.segments)
        tile.Launch(kernel, grid, (*tensors, sizes, strides, *steps), options).run(self.x.device)

    def tiles(self) -> tile.Tiles:
        batch, _, inner, _, _, count = self.sizes
        size = max(1, self.block // self.options["SIZE"] // (4 if self.accumulator == torch.float64 else 1))
        return tile.tiles(batch, count * inner, size)

    def forward(self, element: Any) -> tuple[Tensor, Tensor]:
        """y and the log-determinant."""
        y, written = tile.output(self.x, self.batch_dims, self.dims)
        logdet = self.x.new_empty(self.x.shape[: self.batch_dims], dtype=self.accumulator)
        if self.empty:
            return y.copy_(self.x), logdet.zero_()
        t = self.tiles()
        partial = logdet.view(-1, 1) if t.segments == 1 else logdet.new_empty(self.sizes[0], t.segments)
        views = (*self.inputs, self.view(written), (partial, (0, 0, 0)))
        self.launch(forward_kernel, element, t, views, [self.steps])
        if t.segments > 1:
            torch.sum(partial, 1, out=logdet.view(-1))
        return y if written is y else y.copy_(written), logdet

    def backward(self, element: Any, dy: Tensor | None, dlogdet: Tensor | None) -> list[Tensor]:
        """Gradients of x and of what holds the parameters."""
        tile.check_gradients(self.op, dy, dlogdet, self.x, self.batch_dims)
        outputs = [tile.output(t, self.batch_dims, self.dims) for t in (self.x, *self.given)]
        if self.empty:
            for result, _ in outputs:
                result.zero_()
            if dy is not None:
                outputs[0][0].copy_(dy)
        else:
            dx, *gradients = (written for _, written in outputs)
            parameters, steps = self.unpack(gradients)
            dl = NONE if dlogdet is None else tile.strided(dlogdet, self.batch_dims, self.batch_dims)
            views = (*self.inputs, self.view(dy), self.view(dx), *parameters, dl)
            self.launch(backward_kernel, element, self.tiles(), views, [self.steps, steps])
            for result, written in outputs:
                if written is not result:
                    result.copy_(written)
        return [result for result, _ in outputs]
