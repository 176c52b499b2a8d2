"""rational_quadratic_spline in Triton: one pass forward, one backward, over any strides; the contract of
csrc/rational_quadratic_spline.h.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor, K bins, n transformed elements of b bytes and r copied ones: forward reads x and 3 K - 1 parameters and writes y,
((3 K + 1) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((6 K + 1) n + 2 r) b bytes. The
kernels read 2 K + 2 parameters, the two derivatives where they are wanted, and write all. A block is elements × the
next power of two of K, so that 12 bins cost as much arithmetic as 16: about 60 operations a bin (two exponentials) and
300 an element.

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
from pyflowgen.kernels.elementary import at_least, divide, exp, log, log1p_unit, reciprocal, square_root
from pyflowgen.kernels.tile import NONE, View, at
from torch import Tensor

# The operator's codes: csrc/formula/spline_convention.h, csrc/rational_quadratic_spline_call.h.
ZUKO = tl.constexpr(1)
TORCHFLOWS = tl.constexpr(2)
LINEAR = tl.constexpr(1)
CIRCULAR = tl.constexpr(2)
MIXED = tl.constexpr(3)
SEPARATE, LAST, CHANNELS = range(3)
LARGEST = 64
# Elements × bins of a block: 8 values of either axis a thread in float32, 2 in float64.
BLOCK = 1024

# Places in NUMBERS, the constants of a launch.
LEFT, RIGHT, BOTTOM, TOP, MIN_WIDTH, MIN_HEIGHT, MIN_DERIVATIVE, EDGE, INVERSE_CLIP, SCALE = (
    tl.constexpr(i) for i in range(10)
)


# ------------------------------------------------------------------------------------------------------ parameters
@triton.jit
def softclip(u, INVERSE_BOUND: tl.constexpr):
    """u / (1 + |u / bound|) and its derivative."""
    q = reciprocal(1.0 + tl.abs(u) * INVERSE_BOUND)
    return u * q, q * q


@triton.jit
def knot_derivative(u, NUMBERS: tl.constexpr, CONVENTION: tl.constexpr):
    """A knot's derivative from its parameter, and its derivative with respect to that."""
    if CONVENTION == ZUKO:
        v, derivative = softclip(u, NUMBERS[INVERSE_CLIP])
        d = exp(v)
        return d, d * derivative
    else:
        if CONVENTION == TORCHFLOWS:
            u = u * 1e-3 + NUMBERS[EDGE]
        e = exp(-tl.abs(u))
        slope = divide(tl.where(u < 0, e, 1.0), 1.0 + e)
        if CONVENTION == TORCHFLOWS:
            slope *= 1e-3
        return at_least(u, 0.0) + log1p_unit(e) + NUMBERS[MIN_DERIVATIVE], slope


@triton.jit
def derivative_at(k, circular, BINS: tl.constexpr, TAILS: tl.constexpr):
    """Which parameter is the derivative of knot k, or -1 where the tail is."""
    if TAILS == LINEAR:
        return tl.where(k == BINS, -1, k - 1)
    elif TAILS == CIRCULAR:
        return tl.where(k == BINS, 0, k)
    elif TAILS == MIXED:
        return tl.where((k > 0) & (k < BINS), k, tl.where(circular, 0, -1))
    else:
        return k


@triton.jit
def shares(logit, range, LEAST: tl.constexpr, BINS: tl.constexpr):
    """Of one axis: its exponentials, integers in proportion, their sum, and half of what one is of the interval."""
    dtype: tl.constexpr = logit.dtype
    integer: tl.constexpr = tl.int64 if dtype == tl.float64 else tl.int32
    one: tl.constexpr = (2.0**62 if dtype == tl.float64 else 2.0**30) / logit.shape[1]
    there = tl.arange(0, logit.shape[1])[None, :] < BINS
    largest = tl.max(tl.where(there, logit, float("-inf")), 1)
    e = tl.where(there, exp(logit - largest[:, None]), 0.0)
    counts = (e * one + 0.5).to(integer)
    total = tl.sum(counts, 1)
    # NaN is no integer: it comes in by the exponentials' own sum.
    half = divide(range * (0.5 - 0.5 * LEAST * BINS), total.to(dtype)) + tl.sum(e, 1) * 0.0
    return e, counts, total, half


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
def logits(
    w, h, at_w, at_h, steps, used, NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
    CONVENTION: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Both axes' logits, and for zuko their derivatives."""
    j = tl.arange(0, SIZE)[None, :]
    there = used[:, None] & (j < BINS)
    a = tl.load(w + (at_w[:, None] + j * steps[0]), mask=there, other=0.0).to(dtype) * NUMBERS[SCALE]
    b = tl.load(h + (at_h[:, None] + j * steps[1]), mask=there, other=0.0).to(dtype) * NUMBERS[SCALE]
    da, db = a, b
    if CONVENTION == ZUKO:
        a, da = softclip(a, 2 * NUMBERS[INVERSE_CLIP])
        b, db = softclip(b, 2 * NUMBERS[INVERSE_CLIP])
    elif CONVENTION == TORCHFLOWS:
        b = b * 1e-3 + a
    return a, b, da, db


# --------------------------------------------------------------------------------------------------------- one bin
@triton.jit
def place(v, x0, x1, y0, y1, a, b, INVERSE: tl.constexpr):
    """theta and 1 - theta, by terms that do not cancel; csrc/formula/rational_quadratic_spline.h."""
    if INVERSE:
        eta = divide(v - y0, y1 - y0)
        zeta = divide(y1 - v, y1 - y0)
        p = a * zeta - b * eta
        r = square_root(p * p + 4.0 * eta * zeta) + tl.abs(p)
        other = 2.0 * tl.where(p < 0, zeta, eta)
        scale = reciprocal(other + r)
        return tl.where(p < 0, r, other) * scale, tl.where(p < 0, other, r) * scale
    else:
        return divide(v - x0, x1 - x0), divide(x1 - v, x1 - x0)


@triton.jit
def rational_quadratic(v, x0, x1, y0, y1, d0, d1, INVERSE: tl.constexpr):
    """y and log dy/dx; for the inverse x from y, and the forward map's logarithm at x."""
    w = x1 - x0
    h = y1 - y0
    ratio = divide(w, h)
    a = d0 * ratio
    b = d1 * ratio
    theta, phi = place(v, x0, x1, y0, y1, a, b, INVERSE)
    low = theta * (a * phi + theta)
    high = phi * (b * theta + phi)
    inverse_m = reciprocal(low + high)
    g = b * theta * theta + (a * phi * phi + 2.0 * theta * phi)
    log_slope = log(g * inverse_m * divide(inverse_m, ratio))
    if INVERSE:
        return tl.where(theta < phi, w * theta + x0, x1 - w * phi), log_slope
    else:
        eta = low * inverse_m
        zeta = high * inverse_m
        return tl.where(eta < zeta, h * eta + y0, y1 - h * zeta), log_slope


@triton.jit
def rational_quadratic_backward(dy, dlogdet, v, x0, x1, y0, y1, d0, d1, INVERSE: tl.constexpr):
    """Gradients of what goes in, of shifts and sizes of the bin along x and along y, and of its two derivatives."""
    w = x1 - x0
    h = y1 - y0
    ratio = divide(w, h)
    a = d0 * ratio
    b = d1 * ratio
    theta, phi = place(v, x0, x1, y0, y1, a, b, INVERSE)
    low = theta * (a * phi + theta)
    high = phi * (b * theta + phi)
    m = low + high
    inverse_m = reciprocal(m)
    g = b * theta * theta + (a * phi * phi + 2.0 * theta * phi)
    inverse_g = reciprocal(g)
    eta = low * inverse_m
    zeta = high * inverse_m
    product_m = theta * phi * inverse_m
    difference = phi - theta
    dl_theta = 2.0 * dlogdet * ((b * theta + difference - a * phi) * inverse_g - difference * (a + b - 2.0) * inverse_m)
    # The inverse is x(y) of f(x(y)) = y: its gradients are those of f for another dy, and -dlogdet.
    if INVERSE:
        dl = -dlogdet
        d_theta = -dy * w
        d_eta = (dl_theta + d_theta) * (m * inverse_g) * m
    else:
        dl = dlogdet
        d_eta = dy * h
        d_theta = d_eta * (g * inverse_m * inverse_m) + dl_theta
    da = d_eta * product_m * zeta + dl * (phi * phi * inverse_g - 2.0 * product_m)
    db = dl * (theta * theta * inverse_g - 2.0 * product_m) - d_eta * product_m * eta
    sizes = da * a + (db * b - dl)
    along_x = divide(d_theta, w)
    if INVERSE:
        shift_y = divide(d_eta, h)
        dv = -shift_y
    else:
        shift_y = dy
        dv = along_x
    width = divide(sizes - theta * d_theta, w)
    height = divide(d_eta * eta - sizes, h)
    return dv, -along_x, width, shift_y, height, da * ratio, db * ratio


# -------------------------------------------------------------------------------------------------- a block of elements
@triton.jit
def interval(bound, NUMBERS: tl.constexpr):
    """(left, right, bottom, top) of every element; bound: its own, 1 where there is none."""
    return bound * NUMBERS[LEFT], bound * NUMBERS[RIGHT], bound * NUMBERS[BOTTOM], bound * NUMBERS[TOP]


@triton.jit
def within(v, low, high):
    """Whether the spline has v, and v where it has, else the interval's begin."""
    inside = (v >= low) & (v <= high)
    return inside, tl.where(inside, v, low)


@triton.jit
def load_derivative(d, at_d, step, index, used, NUMBERS: tl.constexpr, CONVENTION: tl.constexpr, dtype: tl.constexpr):
    u = tl.load(d + (at_d + index * step), mask=used & (index >= 0), other=0.0).to(dtype)
    return knot_derivative(tl.where(index < 0, NUMBERS[EDGE], u), NUMBERS, CONVENTION)


@triton.jit
def spline(
    v, used, w, h, d, places, steps, bound, circular, NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
    CONVENTION: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """y and the log-derivative of the forward map; an element's parameters begin at w, h, d + places, `steps` apart."""
    x_low, x_high, y_low, y_high = interval(bound, NUMBERS)
    low, high = (y_low, y_high) if INVERSE else (x_low, x_high)
    inside, x = within(v, low, high)
    a, b, _, _ = logits(w, h, places[0], places[1], steps, used, NUMBERS, BINS, SIZE, CONVENTION, v.dtype)
    _, counts_x, total_x, half_x = shares(a, x_high - x_low, NUMBERS[MIN_WIDTH], BINS)
    _, counts_y, total_y, half_y = shares(b, y_high - y_low, NUMBERS[MIN_HEIGHT], BINS)
    if INVERSE:
        number = search(x, counts_y, total_y, half_y, y_low, y_high, NUMBERS[MIN_HEIGHT], BINS)
    else:
        number = search(x, counts_x, total_x, half_x, x_low, x_high, NUMBERS[MIN_WIDTH], BINS)
    _, _, x0, x1 = ends(number, counts_x, total_x, half_x, x_low, x_high, NUMBERS[MIN_WIDTH], BINS)
    _, _, y0, y1 = ends(number, counts_y, total_y, half_y, y_low, y_high, NUMBERS[MIN_HEIGHT], BINS)
    first = derivative_at(number, circular, BINS, TAILS)
    second = derivative_at(number + 1, circular, BINS, TAILS)
    d0, _ = load_derivative(d, places[2], steps[2], first, used, NUMBERS, CONVENTION, v.dtype)
    d1, _ = load_derivative(d, places[2], steps[2], second, used, NUMBERS, CONVENTION, v.dtype)
    y, log_slope = rational_quadratic(x, x0, x1, y0, y1, d0, d1, INVERSE)
    if TAILS == 0:
        return tl.where(inside, y, float("nan")), tl.where(inside, log_slope, float("nan"))
    else:
        return tl.where(inside, y, v), tl.where(inside, log_slope, 0.0)


@triton.jit
def softmax_backward(e, counts_before, counts_own, total, number, shift, size, range, LEAST: tl.constexpr,
                     BINS: tl.constexpr, NUMBERS: tl.constexpr):  # fmt: skip
    """Gradients of an axis' logits from those of every bin before bin `number`, `shift`, and of its own, `size`."""
    dtype: tl.constexpr = e.dtype
    one: tl.constexpr = (2.0**62 if dtype == tl.float64 else 2.0**30) / e.shape[1]
    share = reciprocal(total.to(dtype))
    mean = (shift * counts_before.to(dtype) + size * counts_own.to(dtype)) * share
    factor = share * range * (one * (1 - LEAST * BINS) * NUMBERS[SCALE])
    j = tl.arange(0, e.shape[1])[None, :]
    n = number[:, None]
    given = tl.where(j < n, shift[:, None], tl.where(j == n, size[:, None], 0.0))
    return e * (given - mean[:, None]) * factor[:, None]


@triton.jit
def spline_backward(
    dy, dlogdet, v, used, on, w, h, d, places, steps, dw, dh, dd, dplaces, dsteps, bound, circular,
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, CONVENTION: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of all `used` elements' parameters, zero where not `on`; returns that of v."""
    storage: tl.constexpr = dw.dtype.element_ty
    x_low, x_high, y_low, y_high = interval(bound, NUMBERS)
    low, high = (y_low, y_high) if INVERSE else (x_low, x_high)
    inside, x = within(v, low, high)
    a, b, da, db = logits(w, h, places[0], places[1], steps, used, NUMBERS, BINS, SIZE, CONVENTION, v.dtype)
    e_x, counts_x, total_x, half_x = shares(a, x_high - x_low, NUMBERS[MIN_WIDTH], BINS)
    e_y, counts_y, total_y, half_y = shares(b, y_high - y_low, NUMBERS[MIN_HEIGHT], BINS)
    if INVERSE:
        number = search(x, counts_y, total_y, half_y, y_low, y_high, NUMBERS[MIN_HEIGHT], BINS)
    else:
        number = search(x, counts_x, total_x, half_x, x_low, x_high, NUMBERS[MIN_WIDTH], BINS)
    before_x, own_x, x0, x1 = ends(number, counts_x, total_x, half_x, x_low, x_high, NUMBERS[MIN_WIDTH], BINS)
    before_y, own_y, y0, y1 = ends(number, counts_y, total_y, half_y, y_low, y_high, NUMBERS[MIN_HEIGHT], BINS)
    first = derivative_at(number, circular, BINS, TAILS)
    second = derivative_at(number + 1, circular, BINS, TAILS)
    d0, slope0 = load_derivative(d, places[2], steps[2], first, used, NUMBERS, CONVENTION, v.dtype)
    d1, slope1 = load_derivative(d, places[2], steps[2], second, used, NUMBERS, CONVENTION, v.dtype)
    dv, shift_x, width, shift_y, height, dd0, dd1 = rational_quadratic_backward(
        dy, dlogdet, x, x0, x1, y0, y1, d0, d1, INVERSE
    )
    gradient_x = softmax_backward(
        e_x, before_x, own_x, total_x, number, shift_x, width, x_high - x_low, NUMBERS[MIN_WIDTH], BINS, NUMBERS
    )
    gradient_y = softmax_backward(
        e_y, before_y, own_y, total_y, number, shift_y, height, y_high - y_low, NUMBERS[MIN_HEIGHT], BINS, NUMBERS
    )
    if CONVENTION == ZUKO:
        gradient_x *= da
        gradient_y *= db
    elif CONVENTION == TORCHFLOWS:
        gradient_x += gradient_y
        gradient_y *= 1e-3
    j = tl.arange(0, SIZE)[None, :]
    there = used[:, None] & (j < BINS)
    real = (on & inside)[:, None]
    tl.store(dw + (dplaces[0][:, None] + j * dsteps[0]), tl.where(real, gradient_x, 0.0).to(storage), mask=there)
    tl.store(dh + (dplaces[1][:, None] + j * dsteps[1]), tl.where(real, gradient_y, 0.0).to(storage), mask=there)
    count: tl.constexpr = BINS - 1 if TAILS == LINEAR else BINS if TAILS == CIRCULAR else BINS + 1
    # Of the knots 0 to K - 1, and of knot K, where it has a parameter of its own, by itself.
    of_knots = tl.where(j == first[:, None], (dd0 * slope0)[:, None], 0.0)
    of_knots += tl.where(j == second[:, None], (dd1 * slope1)[:, None], 0.0)
    there = used[:, None] & (j < (BINS if count > BINS else count))
    tl.store(dd + (dplaces[2][:, None] + j * dsteps[2]), tl.where(real, of_knots, 0.0).to(storage), mask=there)
    if count > BINS:
        last = tl.where(on & inside & (second == BINS), dd1 * slope1, 0.0)
        tl.store(dd + (dplaces[2] + BINS * dsteps[2]), last.to(storage), mask=used)
    outside = 0.0 if TAILS == 0 else dy
    return tl.where(inside, dv, outside)


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
@triton.jit
def forward_kernel(
    x, widths, heights, derivatives, bound, circular, mask, y, logdet, sizes, strides, steps,
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, CONVENTION: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, CHANNEL_FASTEST: tl.constexpr, WIDE: tl.constexpr, COPIES: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
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
        result, log_slope = spline(
            stored.to(dtype), on, widths, heights, derivatives, places(strides, 1, row, k, i, PACKED), steps, one,
            round, NUMBERS, BINS, SIZE, CONVENTION, TAILS, INVERSE,
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
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, CONVENTION: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr, CHANNEL_FASTEST: tl.constexpr, WIDE: tl.constexpr, COPIES: tl.constexpr,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
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
        dv = spline_backward(
            g.to(dtype), dl, v, used, on, widths, heights, derivatives, places(strides, 1, row, k, i, PACKED), steps,
            dwidths, dheights, dderivatives, places(strides, 9, row, k, i, PACKED), dsteps, one, round, NUMBERS, BINS,
            SIZE, CONVENTION, TAILS, INVERSE,
        )  # fmt: skip
        tl.store(at(dx, strides[8], row, c, i), tl.where(on, dv.to(storage), g), mask=used)
    if COPIES:
        copy_rest(dy, dx, row, lane, sizes, strides[7], strides[8], CHANNEL_FASTEST, COLS)


# -------------------------------------------------------------------------------------------------------- launchers
def _fail(message: str) -> None:
    raise ValueError(f"rational_quadratic_spline: {message}")


class _Call:
    """The operator's arguments, checked, and every tensor as (batch, channels, inner)."""

    def __init__(
        self, x: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, bound: Tensor | None,
        circular: Tensor | None, mask: Tensor | None, bins: int, layout: int, start: int, step: int, convention: int,
        tails: int, numbers: tuple[float, ...], inverse: bool, event_dim: int,
    ) -> None:  # fmt: skip
        if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            _fail(f"x is {x.dtype}, expected float64, float32, bfloat16 or float16")
        if not 0 <= event_dim <= x.dim():
            _fail(f"event_dim is {event_dim}, expected 0 to x's {x.dim()} dimensions")
        if not (
            0 <= layout <= CHANNELS and 0 <= convention <= 2 and 0 <= tails <= 3 and start >= 0 and step >= 1
            and 2 <= bins <= LARGEST
        ):  # fmt: skip
            _fail(f"{layout=}, {convention=}, {tails=}, {start=}, {step=}, {bins=} are out of range")
        if not (heights is None) == (derivatives is None) == (layout != SEPARATE):
            _fail("heights and derivatives come with separate parameters, and only then")
        dims, dim = x.dim(), x.dim() - event_dim
        self.x, self.dims, self.batch_dims, self.layout, self.bins = x, dims, dim, layout, bins
        self.each = each = 3 * bins + (1, -1, 0, 1)[tails]
        last = layout != CHANNELS
        if (event_dim == 0 and not last) or widths.dim() != dims + last:
            _fail(f"widths has shape {tuple(widths.shape)}, which does not fit x's {tuple(x.shape)}")
        count = (widths.shape[dim] if event_dim else 1) // (1 if last else each)
        channels = x.shape[dim] if event_dim else 1
        if event_dim and count and start + (count - 1) * step >= channels:
            _fail(f"start={start}, step={step} with {count} channels reach beyond x's {channels}")
        for name, t, size in (
            ("widths", widths, bins if layout == SEPARATE else each), ("heights", heights, bins),
            ("derivatives", derivatives, each - 2 * bins),
        ):  # fmt: skip
            shape = [*x.shape, size] if last else list(x.shape)
            if event_dim:
                shape[dim] = count if last else count * each
            if t is not None and not (t.dtype == x.dtype and t.device == x.device and list(t.shape) == shape):
                _fail(f"{name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {x.dtype} {tuple(shape)}")
        self.accumulator = torch.float64 if x.dtype == torch.float64 else torch.float32
        event = list(x.shape[dim:])
        part = [count, *event[1:]] if event_dim else []
        for name, t, shape, dtype in (
            ("bound", bound, part, self.accumulator), ("circular", circular, part, torch.bool),
            ("mask", mask, event, torch.bool),
        ):  # fmt: skip
            if t is not None and not (list(t.shape) == shape and t.dtype == dtype and t.device == x.device):
                _fail(f"{name} is {t.dtype} of shape {tuple(t.shape)}, expected {dtype} of shape {tuple(shape)}")
        if (mask is not None and count != channels) or (circular is None) == (tails == MIXED.value):
            _fail("a mask needs parameters for every channel, and mixed tails circular")

        self.empty = x.numel() == 0 or widths.numel() == 0
        batch = inner = 1
        for size in x.shape[:dim]:
            batch *= size
        for size in x.shape[dim + 1 :]:
            inner *= size
        self.sizes = batch, channels, inner, start, step, count
        *ends, edge, clip, scale = numbers
        self.options = {
            "NUMBERS": (*ends, edge, 1 / clip if clip > 0 else 0.0, scale), "BINS": bins,
            "SIZE": triton.next_power_of_2(bins), "CONVENTION": convention, "TAILS": tails, "INVERSE": inverse,
            "COPIES": count < channels, "PACKED": layout != SEPARATE,
        }  # fmt: skip
        if not self.empty:
            parameters, self.steps = self.unpack(widths, heights, derivatives)
            in_event = [
                NONE if t is None else tile.strided(t if t.dtype != torch.bool else t.view(torch.uint8), 0, event_dim)
                for t in (bound, circular, mask)
            ]
            self.inputs = (self.view(x), *parameters, *in_event)

    def view(self, t: Tensor | None) -> View:
        return NONE if t is None else tile.strided(t, self.batch_dims, self.dims)

    def unpack(
        self, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None
    ) -> tuple[list[View], tuple[int, ...]]:
        """Widths, heights and derivatives, packed ones in place, and the distance between an element's own."""
        if heights is not None and derivatives is not None:
            given = [self.view(t) for t in (widths, heights, derivatives)]
            return given, tuple(t.stride(-1) for t, _ in given if t is not None)
        packed, (b, c, i) = tile.strided(widths, self.batch_dims, self.dims)
        dim = self.dims if self.layout == LAST else self.batch_dims
        step = packed.stride(dim)
        if self.layout == CHANNELS:
            c *= self.each
        parts = [packed.narrow(dim, n * self.bins, packed.shape[dim] - n * self.bins) for n in range(3)]
        return [(t, (b, c, i)) for t in parts], (step,) * 3

    def launch(
        self, kernel: Any, segments: tile.Tiles, views: Sequence[View], *rest: Any, steps: Sequence[tuple[int, ...]]
    ) -> None:
        batch, channels, inner, start, step, count = self.sizes
        strides = tuple(s for _, s in views)
        widths = self.inputs[1][1]
        # An element's last parameter is that much further.
        reach = [(1, 1, max(s) * self.each) for s in steps]
        options = self.options | {
            "CHANNEL_FASTEST": inner > 1 and widths[1] < widths[2],
            "WIDE": tile.wide((batch, channels, inner), (*strides, *reach)),
            "ROWS": segments.rows, "COLS": segments.cols, "num_warps": 4, "enable_fp_fusion": True,
        }  # fmt: skip
        sizes = (*self.sizes, count * inner, segments.segment)
        tensors = [t for t, _ in views]
        grid = (segments.row_blocks, segments.segments)
        tile.Launch(kernel, grid, (*tensors, sizes, strides, *steps), options).run(self.x.device)

    def tiles(self) -> tile.Tiles:
        batch, _, inner, _, _, count = self.sizes
        size = BLOCK // self.options["SIZE"] // (4 if self.accumulator == torch.float64 else 1)
        return tile.tiles(batch, count * inner, size)


def rational_quadratic_spline(
    x: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, bound: Tensor | None,
    circular: Tensor | None, mask: Tensor | None, bins: int, layout: int, start: int, step: int, convention: int,
    tails: int, left: float, right: float, bottom: float, top: float, min_bin_width: float, min_bin_height: float,
    min_derivative: float, edge: float, clip: float, scale: float, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    numbers = left, right, bottom, top, min_bin_width, min_bin_height, min_derivative, edge, clip, scale
    call = _Call(
        x, widths, heights, derivatives, bound, circular, mask, bins, layout, start, step, convention, tails, numbers,
        inverse, event_dim,
    )  # fmt: skip
    y, written = tile.output(x, call.batch_dims, call.dims)
    logdet = x.new_empty(x.shape[: call.batch_dims], dtype=call.accumulator)
    if call.empty:
        return y.copy_(x), logdet.zero_()
    t = call.tiles()
    partial = logdet.view(-1, 1) if t.segments == 1 else logdet.new_empty(call.sizes[0], t.segments)
    call.launch(forward_kernel, t, (*call.inputs, call.view(written), (partial, (0, 0, 0))), steps=[call.steps])
    if t.segments > 1:
        torch.sum(partial, 1, out=logdet.view(-1))
    return y if written is y else y.copy_(written), logdet


def rational_quadratic_spline_backward(
    dy: Tensor | None, dlogdet: Tensor | None, x: Tensor, widths: Tensor, heights: Tensor | None,
    derivatives: Tensor | None, bound: Tensor | None, circular: Tensor | None, mask: Tensor | None, bins: int,
    layout: int, start: int, step: int, convention: int, tails: int, left: float, right: float, bottom: float,
    top: float, min_bin_width: float, min_bin_height: float, min_derivative: float, edge: float, clip: float,
    scale: float, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    numbers = left, right, bottom, top, min_bin_width, min_bin_height, min_derivative, edge, clip, scale
    call = _Call(
        x, widths, heights, derivatives, bound, circular, mask, bins, layout, start, step, convention, tails, numbers,
        inverse, event_dim,
    )  # fmt: skip
    tile.check_gradients("rational_quadratic_spline", dy, dlogdet, x, call.batch_dims)
    outputs = [tile.output(t, call.batch_dims, call.dims) for t in (x, widths, heights, derivatives) if t is not None]
    if call.empty:
        for result, _ in outputs:
            result.zero_()
        if dy is not None:
            outputs[0][0].copy_(dy)
    else:
        dx, *gradients = (written for _, written in outputs)
        parameters, steps = call.unpack(*(gradients if heights is not None else (gradients[0], None, None)))
        dl = NONE if dlogdet is None else tile.strided(dlogdet, call.batch_dims, call.batch_dims)
        views = (*call.inputs, call.view(dy), call.view(dx), *parameters, dl)
        call.launch(backward_kernel, call.tiles(), views, steps=[call.steps, steps])
        for result, written in outputs:
            if written is not result:
                result.copy_(written)
    results = [result for result, _ in outputs]
    return results[0], results[1], *(results[2:] if heights is not None else (x.new_empty(0), x.new_empty(0)))
