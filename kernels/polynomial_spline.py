"""polynomial_spline in Triton: one pass forward, one backward, over any strides; the contract of
csrc/polynomial_spline.h.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor, P parameters and n transformed elements of b bytes and r copied ones: forward reads x and the parameters and
writes y, ((P + 2) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((2 P + 3) n + 2 r) b
bytes. The kernels move just that, but that a quadratic spline's densities are read by both bins of a knot, from the
cache. About 40 operations a bin for each softmax, 100 for the densities; 150 an element, and 25 for each Newton step of
the cubic's inverse, of which a block takes as many as its slowest element. A block is 1024 elements × bins of degree 1,
256 of degree 2 and 512 of degree 3.

Formulas: csrc/formula/polynomial_spline.h. Bins' sizes come from the exponentials, knots from the integers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyflowgen.kernels.elementary import (
    at_least,
    at_most,
    divide,
    exp,
    expm1,
    log,
    reciprocal,
    sigmoid,
    softplus,
    square_root,
)
from pyflowgen.kernels.spline import (
    BLOCK,
    MIN_HEIGHT,
    MIN_WIDTH,
    SCALE,
    Call,
    exponentials,
    interval,
    locate,
    of_bins,
    shares,
    unit,
    within,
)  # fmt: skip
from torch import Tensor

LEAST_DENSITY = tl.constexpr(1e-3)  # of a quadratic spline's knot, before all are normalised


# --------------------------------------------------------------------------------------------------------- one bin
@triton.jit
def value(t, a, b):
    phi = 1.0 - t
    return t * (a * phi * phi + t * ((3.0 - b) * phi + t))


@triton.jit
def derivative(t, a, b):
    phi = 1.0 - t
    return a * phi * phi + t * (2.0 * ((3.0 - a) - b) * phi + b * t)


@triton.jit
def root(v, a, b, DEGREE: tl.constexpr):
    """t of value(t, a, b) = v, for v at most about 1/2."""
    if DEGREE == 1:
        return v
    elif DEGREE == 2:
        return divide(2.0 * v, a + square_root(b * b * v + a * a * (1.0 - v)))
    else:
        # The parabola with the cubic's first terms, where it bends upwards; then Newton's method in a bracket.
        bend = at_least(((3.0 - a) - a) - b, 0.0)
        t = divide(2.0 * v, a + square_root(4.0 * bend * v + a * a))
        t = at_most(tl.where(t > 0, t, v), 1.0)  # 0 / 0
        low = tl.zeros(v.shape, v.dtype)
        high = low + 1.0
        rounding: tl.constexpr = 2.3e-16 if v.dtype == tl.float64 else 1.2e-7
        step = 0
        while step < 64:
            over = value(t, a, b) - v
            high = tl.where(over > 0, t, high)
            low = tl.where(over > 0, low, t)
            new = t - divide(over, derivative(t, a, b))
            new = tl.where((new >= low) & (new <= high), new, (low + high) * 0.5)
            new = tl.where(over == 0, t, new)
            # NaN is done as well
            wrong = (tl.abs(over) > rounding * v) & (tl.abs(new - t) > rounding * t)
            t = tl.where(v == v, new, v)
            step = tl.where(tl.max(wrong.to(tl.int32), 0) > 0, step + 1, 64)
        return t


@triton.jit
def place(v, x0, x1, y0, y1, a, b, DEGREE: tl.constexpr, INVERSE: tl.constexpr):
    """t from the bin's nearer end, whether that is the first, and the ends' derivatives seen from there."""
    low, high = (y0, y1) if INVERSE else (x0, x1)
    near = v - low <= high - v
    # two knots of a linear spline may be one
    size = at_least(high - low, 2.2250738585072014e-308 if v.dtype == tl.float64 else 1.1754943508222875e-38)
    t = divide(tl.where(near, v - low, high - v), size)
    first = tl.where(near, a, b)
    second = tl.where(near, b, a)
    if INVERSE:
        t = root(t, first, second, DEGREE)
    return near, t, first, second


@triton.jit
def polynomial(v, x0, x1, y0, y1, slope, a, b, DEGREE: tl.constexpr, INVERSE: tl.constexpr):
    """y and log dy/dx; for the inverse x from y, and the forward map's logarithm at x."""
    near, t, first, second = place(v, x0, x1, y0, y1, a, b, DEGREE, INVERSE)
    if DEGREE == 1:
        log_slope = log(slope)
        rise = t
    else:
        log_slope = log(slope * derivative(t, first, second))
        rise = value(t, first, second)
    if INVERSE:
        return tl.where(near, (x1 - x0) * t + x0, x1 - (x1 - x0) * t), log_slope
    else:
        return tl.where(near, (y1 - y0) * rise + y0, y1 - (y1 - y0) * rise), log_slope


@triton.jit
def polynomial_backward(dy, dlogdet, v, x0, x1, y0, y1, w, h, a, b, DEGREE: tl.constexpr, INVERSE: tl.constexpr):
    """Gradients of what goes in, of shifts and sizes of the bin along x and along y, and of a and b."""
    near, t, first, second = place(v, x0, x1, y0, y1, a, b, DEGREE, INVERSE)
    theta = tl.where(near, t, 1.0 - t)
    phi = tl.where(near, 1.0 - t, t)
    difference = phi - theta
    rise = value(t, first, second)
    eta = tl.where(near, rise, 1.0 - rise)
    d = derivative(t, first, second)
    inverse_d = reciprocal(d)
    dl_theta = 2.0 * dlogdet * (((3.0 - a) - b) * difference + (b * theta - a * phi)) * inverse_d
    # The inverse is x(y) of f(x(y)) = y: its gradients are those of f for another dy, and -dlogdet.
    if INVERSE:
        dl = -dlogdet
        d_theta = -dy * w
        d_eta = (dl_theta + d_theta) * inverse_d
    else:
        dl = dlogdet
        d_eta = dy * h
        d_theta = d_eta * d + dl_theta
    if DEGREE == 1:
        da = tl.zeros(v.shape, v.dtype)
        db = da
    else:
        product = theta * phi
        da = phi * (d_eta * product + dl * inverse_d * (difference - theta))
        db = theta * (dl * inverse_d * (-phi - difference) - d_eta * product)
    along_x = divide(d_theta, w)
    if INVERSE:
        shift_y = divide(d_eta, h)
        dv = -shift_y
    else:
        shift_y = dy
        dv = along_x
    return dv, -along_x, divide(-theta * d_theta - dl, w), shift_y, divide(d_eta * eta + dl, h), da, db


@triton.jit
def limited(w0, s0, w1, s1):
    """Steffen's derivative at the knot between bins of sizes w and slopes s, and its derivatives by w0, s0, w1, s1."""
    share = reciprocal(w0 + w1)
    mean = (w1 * s0 + w0 * s1) * share
    first = s0 < s1
    least = tl.where(first, s0, s1)
    between = mean < 2.0 * least
    half = tl.where(s0 == s1, 1.0, 2.0)
    by_s0 = tl.where(between, w1 * share, tl.where(s0 <= s1, half, 0.0))
    by_s1 = tl.where(between, w0 * share, tl.where(first, 0.0, half))
    by_w0 = tl.where(between, (s1 - mean) * share, 0.0)
    by_w1 = tl.where(between, (s0 - mean) * share, 0.0)
    return tl.where(between, mean, 2.0 * least), by_w0, by_s0, by_w1, by_s1


# ------------------------------------------------------------------------------------------------------- parameters
@triton.jit
def columns(params, at, step, first, there):
    """An element's parameters first + j, of those there are; else 0."""
    j = tl.arange(0, there.shape[1])[None, :]
    dtype: tl.constexpr = tl.float64 if params.dtype.element_ty == tl.float64 else tl.float32
    return tl.load(params + (at[:, None] + (first + j) * step), mask=there, other=0.0).to(dtype)


@triton.jit
def softmax_axis(
    params, at, step, FIRST: tl.constexpr, used, range, LEAST: tl.constexpr, NUMBERS: tl.constexpr, BINS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """Exponentials, the integers of an axis, and what an exponential is of the interval."""
    there = used[:, None] & (tl.arange(0, SIZE)[None, :] < BINS)
    e = exponentials(columns(params, at, step, FIRST, there) * NUMBERS[SCALE], BINS)
    counts, total, half = shares(e, range, LEAST, BINS)
    return e, counts, total, half, 2.0 * half * unit(e)


@triton.jit
def equal_axis(like, range, BINS: tl.constexpr, SIZE: tl.constexpr):
    """Bins of one size: an integer each."""
    integer: tl.constexpr = tl.int64 if like.dtype == tl.float64 else tl.int32
    j = tl.arange(0, SIZE)[None, :]
    counts = tl.where((j < BINS) & (like[:, None] == like[:, None]), 1, 0).to(integer)
    return counts, tl.sum(counts, 1), range * (0.5 / BINS)


@triton.jit
def sizes(e, factor, range, LEAST: tl.constexpr, BINS: tl.constexpr):
    there = tl.arange(0, e.shape[1])[None, :] < BINS
    return tl.where(there, e * factor[:, None] + (LEAST * range)[:, None], 0.0)


@triton.jit
def pick(of, number):
    """Every element's value of bin `number`; 0 where there is none."""
    j = tl.arange(0, of.shape[1])[None, :]
    return tl.sum(tl.where(j == number[:, None], of, 0.0), 1)


@triton.jit
def through_softmax(e, d, factor, NUMBERS: tl.constexpr):
    """Gradients of an axis' parameters from those of its sizes."""
    mean = divide(tl.sum(e * d, 1), tl.sum(e, 1))
    return e * (d - mean[:, None]) * (factor * NUMBERS[SCALE])[:, None]


@triton.jit
def knot_softplus(params, at, step, used, FIRST: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
                  NUMBERS: tl.constexpr, TAILS: tl.constexpr):  # fmt: skip
    """Softplus of the densities' parameters of knots FIRST + j, and which of these knots of bins have one."""
    j = tl.arange(0, SIZE)[None, :]
    given = j < BINS
    if TAILS != 0:
        given = given & (FIRST + j > 0) & (FIRST + j < BINS)
    first: tl.constexpr = BINS + FIRST - (1 if TAILS != 0 else 0)
    return softplus(columns(params, at, step, first, used[:, None] & given) * NUMBERS[SCALE]), given


@triton.jit
def densities(
    params, at, step, used, widths, low, high, NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
    TAILS: tl.constexpr,
):  # fmt: skip
    """A quadratic spline's densities at the begin and at the end of each bin before all are normalised, their area over
    the width, and 1 less what the outer ones share; those come of the others where there are tails."""
    j = tl.arange(0, SIZE)[None, :]
    of_begin, given_begin = knot_softplus(params, at, step, used, 0, BINS, SIZE, NUMBERS, TAILS)
    of_end, given_end = knot_softplus(params, at, step, used, 1, BINS, SIZE, NUMBERS, TAILS)
    begin = tl.where(given_begin, of_begin + LEAST_DENSITY, 0.0)
    end = tl.where(given_end, of_end + LEAST_DENSITY, 0.0)
    share = reciprocal(high - low)
    fractions = widths * share[:, None]
    outer_share = 1.0 - 0.25 * tl.sum(tl.where((j == 0) | (j == BINS - 1), fractions, 0.0), 1)
    if TAILS != 0:
        halved = tl.where((j == 0) | (j == BINS - 1), 0.25, 0.5)
        outer = divide(tl.sum((begin + end) * fractions * halved, 1), outer_share)[:, None]
        begin = tl.where(j == 0, outer, begin)
        end = tl.where(j == BINS - 1, outer, end)
    area = tl.sum((begin + end) * fractions, 1) * 0.5
    return begin, end, area, outer_share


@triton.jit
def density_axis(begin, end, area, widths, x_low, x_high, y_low, y_high, NUMBERS: tl.constexpr, BINS: tl.constexpr):
    """Heights, their integers, and what brings densities to those of a map from the interval to itself."""
    q = divide(1.0 - NUMBERS[MIN_HEIGHT] + tl.zeros(area.shape, area.dtype), area)
    mean = (begin + end) * 0.5
    fractions = widths * reciprocal(x_high - x_low)[:, None] * (mean * q[:, None] + NUMBERS[MIN_HEIGHT])
    counts, total, half = shares(fractions, y_high - y_low, 0.0, BINS)
    return fractions * (y_high - y_low)[:, None], counts, total, half, q


@triton.jit
def outer_derivative(params, at, step, used, WHICH: tl.constexpr, BINS: tl.constexpr, dtype: tl.constexpr):
    return sigmoid(tl.load(params + (at + (2 * BINS + WHICH) * step), mask=used, other=0.0).to(dtype))


@triton.jit
def neighbours(number, widths, heights, w, h, BINS: tl.constexpr):
    """Sizes and slopes of the bins beside bin `number`; at the ends those of itself."""
    first = number == 0
    last = number == BINS - 1
    w0 = tl.where(first, w, pick(widths, number - 1))
    w1 = tl.where(last, w, pick(widths, number + 1))
    s0 = divide(tl.where(first, h, pick(heights, number - 1)), w0)
    s1 = divide(tl.where(last, h, pick(heights, number + 1)), w1)
    return w0, s0, w1, s1


# ----------------------------------------------------------------------------------------------- a block of elements
# KIND is the degree. One tensor holds the parameters, which begin at w + places[0].
@triton.jit
def spline(
    v, used, w, h, d, places, steps, bound, circular, NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
    KIND: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """y and the log-derivative of the forward map."""
    x_low, x_high, y_low, y_high = interval(bound, NUMBERS)
    low, high = (y_low, y_high) if INVERSE else (x_low, x_high)
    inside, x = within(v, low, high)
    found = known(
        x, used, w, places[0], steps[0], x_low, x_high, y_low, y_high, NUMBERS, BINS, SIZE, KIND, TAILS, INVERSE
    )
    _, x0, x1, y0, y1, width, height, a, b, _, _ = found
    y, log_slope = polynomial(x, x0, x1, y0, y1, divide(height, width), a, b, KIND, INVERSE)
    if TAILS == 0:
        return tl.where(inside, y, float("nan")), tl.where(inside, log_slope, float("nan"))
    else:
        return tl.where(inside, y, v), tl.where(inside, log_slope, 0.0)


@triton.jit
def known(
    x, used, params, at, step, x_low, x_high, y_low, y_high, NUMBERS: tl.constexpr, BINS: tl.constexpr,
    SIZE: tl.constexpr, DEGREE: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """The bin that x is in: its number, ends, sizes, a and b; what the gradients need of the axes, and besides."""
    least_x: tl.constexpr = 0.0 if DEGREE == 1 else NUMBERS[MIN_WIDTH]
    least_y: tl.constexpr = NUMBERS[MIN_HEIGHT] if DEGREE == 3 else 0.0
    range_x = x_high - x_low
    range_y = y_high - y_low
    if DEGREE == 1:
        counts_x, total_x, half_x = equal_axis(x, range_x, BINS, SIZE)
        e_y, counts_y, total_y, half_y, factor_y = softmax_axis(
            params, at, step, 0, used, range_y, 0.0, NUMBERS, BINS, SIZE
        )
        axes = (e_y, factor_y, e_y, factor_y)
    else:
        e_x, counts_x, total_x, half_x, factor_x = softmax_axis(
            params, at, step, 0, used, range_x, least_x, NUMBERS, BINS, SIZE
        )
        widths = sizes(e_x, factor_x, range_x, least_x, BINS)
        if DEGREE == 2:
            begin, end, area, outer_share = densities(
                params, at, step, used, widths, x_low, x_high, NUMBERS, BINS, SIZE, TAILS
            )
            heights, counts_y, total_y, half_y, q = density_axis(
                begin, end, area, widths, x_low, x_high, y_low, y_high, NUMBERS, BINS
            )
            axes = (e_x, factor_x, begin, end)
        else:
            e_y, counts_y, total_y, half_y, factor_y = softmax_axis(
                params, at, step, BINS, used, range_y, least_y, NUMBERS, BINS, SIZE
            )
            heights = sizes(e_y, factor_y, range_y, least_y, BINS)
            axes = (e_x, factor_x, e_y, factor_y)
    number, (_, _, x0, x1), (_, _, y0, y1) = locate(
        x, counts_x, total_x, half_x, x_low, x_high, counts_y, total_y, half_y, y_low, y_high, least_x, least_y, BINS,
        INVERSE,
    )  # fmt: skip
    one = tl.full(x.shape, 1.0, x.dtype)
    if DEGREE == 1:
        height = pick(sizes(e_y, factor_y, range_y, 0.0, BINS), number)
        return number, x0, x1, y0, y1, range_x * (1.0 / BINS), height, one, one, axes, 0
    else:
        w = pick(widths, number)
        h = pick(heights, number)
        if DEGREE == 2:
            d0 = pick(begin, number) * q + NUMBERS[MIN_HEIGHT]
            d1 = pick(end, number) * q + NUMBERS[MIN_HEIGHT]
            share = divide(2.0 * one, d0 + d1)
            return number, x0, x1, y0, y1, w, h, d0 * share, d1 * share, axes, (area, outer_share, q, d0, d1)
        else:
            slope = divide(h, w)
            w0, s0, w1, s1 = neighbours(number, widths, heights, w, h, BINS)
            end0 = outer_derivative(params, at, step, used, 0, BINS, x.dtype)
            end1 = outer_derivative(params, at, step, used, 1, BINS, x.dtype)
            a, _, _, _, _ = limited(w0, s0, w, slope)
            b, _, _, _, _ = limited(w, slope, w1, s1)
            a = tl.where(number == 0, 3.0 * end0, divide(a, slope))
            b = tl.where(number == BINS - 1, 3.0 * end1, divide(b, slope))
            return number, x0, x1, y0, y1, w, h, a, b, axes, (w0, s0, w1, s1, end0, end1)


@triton.jit
def beside(number, before, after, SIZE: tl.constexpr):
    """What the bins beside bin `number` have."""
    j = tl.arange(0, SIZE)[None, :]
    n = number[:, None]
    return tl.where(j == n - 1, before[:, None], tl.where(j == n + 1, after[:, None], 0.0))


@triton.jit
def put(d, at, step, FIRST: tl.constexpr, gradient, real, there):
    """Gradients of parameters FIRST + j, 0 where the spline has not the element."""
    j = tl.arange(0, gradient.shape[1])[None, :]
    value = tl.where(real[:, None], gradient, 0.0).to(d.dtype.element_ty)
    tl.store(d + (at[:, None] + (FIRST + j) * step), value, mask=there)


@triton.jit
def spline_backward(
    dy, dlogdet, v, used, on, w, h, d, places, steps, dw, dh, dd, dplaces, dsteps, bound, circular,
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of all `used` elements' parameters, zero where not `on`; returns that of v."""
    x_low, x_high, y_low, y_high = interval(bound, NUMBERS)
    low, high = (y_low, y_high) if INVERSE else (x_low, x_high)
    inside, x = within(v, low, high)
    number, x0, x1, y0, y1, width, height, a, b, axes, rest = known(
        x, used, w, places[0], steps[0], x_low, x_high, y_low, y_high, NUMBERS, BINS, SIZE, KIND, TAILS, INVERSE
    )
    dv, shift_x, of_width, shift_y, of_height, da, db = polynomial_backward(
        dy, dlogdet, x, x0, x1, y0, y1, width, height, a, b, KIND, INVERSE
    )
    real = on & inside
    there = used[:, None] & (tl.arange(0, SIZE)[None, :] < BINS)
    if KIND == 1:
        given = of_bins(number, shift_y, of_height, SIZE)
        put(dw, dplaces[0], dsteps[0], 0, through_softmax(axes[2], given, axes[3], NUMBERS), real, there)
    elif KIND == 2:
        quadratic_backward(
            number, x0 - x_low, y0 - y_low, width, height, shift_x, of_width, shift_y, of_height, da - db, axes, rest,
            x_high - x_low, y_high - y_low, used, real, there, w, places[0], steps[0], dw, dplaces[0], dsteps[0],
            NUMBERS, BINS, SIZE, TAILS,
        )  # fmt: skip
    else:
        w0, s0, w1, s1, end0, end1 = rest
        slope = divide(height, width)
        first = number == 0
        last = number == BINS - 1
        # a = d0 / slope, and the slopes h / w
        of_end0 = tl.where(first, da * 3.0 * end0 * (1.0 - end0), 0.0)
        of_end1 = tl.where(last, db * 3.0 * end1 * (1.0 - end1), 0.0)
        d0 = tl.where(first, 0.0, divide(da, slope))
        d1 = tl.where(last, 0.0, divide(db, slope))
        _, at0_w0, at0_s0, at0_w1, at0_s1 = limited(w0, s0, width, slope)
        _, at1_w0, at1_s0, at1_w1, at1_s1 = limited(width, slope, w1, s1)
        d_slope = tl.where(first, 0.0, d0 * (at0_s1 - a)) + tl.where(last, 0.0, d1 * (at1_s0 - b))
        before_h = divide(d0 * at0_s0, w0)
        after_h = divide(d1 * at1_s1, w1)
        before_w = d0 * at0_w0 - before_h * s0
        after_w = d1 * at1_w1 - after_h * s1
        of_width += d0 * at0_w1 + d1 * at1_w0 - divide(d_slope * slope, width)
        of_height += divide(d_slope, width)
        given = of_bins(number, shift_x, of_width, SIZE) + beside(number, before_w, after_w, SIZE)
        put(dw, dplaces[0], dsteps[0], 0, through_softmax(axes[0], given, axes[1], NUMBERS), real, there)
        given = of_bins(number, shift_y, of_height, SIZE) + beside(number, before_h, after_h, SIZE)
        put(dw, dplaces[0], dsteps[0], BINS, through_softmax(axes[2], given, axes[3], NUMBERS), real, there)
        place = dw + (dplaces[0] + 2 * BINS * dsteps[0])
        tl.store(place, tl.where(real, of_end0, 0.0).to(dw.dtype.element_ty), mask=used)
        tl.store(place + dsteps[0], tl.where(real, of_end1, 0.0).to(dw.dtype.element_ty), mask=used)
    outside = 0.0 if TAILS == 0 else dy
    return tl.where(inside, dv, outside)


@triton.jit
def quadratic_backward(
    number, along_x, along_y, width, height, shift_x, of_width, shift_y, of_height, ends, axes, rest, range_x, range_y,
    used, real, there, params, at, step, dparams, dat, dstep, NUMBERS: tl.constexpr, BINS: tl.constexpr,
    SIZE: tl.constexpr, TAILS: tl.constexpr,
):  # fmt: skip
    """A bin's height is rho size (mean q + least), where q is shared by all and each mean is of its knots' densities:
    the gradient of bin j's area size mean is c(j), that of its size c(j) mean + what comes of least and of x's knots,
    that of a density the half of what its two bins' c(j) size make. With tails the outer densities are made of the
    areas of the others, those of the outer bins halved, and add to c what they are given."""
    e, factor, begin, end = axes
    area, outer_share, q, d0, d1 = rest
    least: tl.constexpr = NUMBERS[MIN_HEIGHT]
    j = tl.arange(0, SIZE)[None, :]
    share = reciprocal(range_x)
    rho = range_y * share
    # a = 2 d0 / (d0 + d1), b = 2 - a; as densities before they are normalised
    ends = divide(2.0 * ends, (d0 + d1) * (d0 + d1))
    to_begin = ends * d1 * q
    to_end = -ends * d0 * q
    of_q = (along_y - least * rho * along_x) * shift_y + (height - least * rho * width) * of_height
    of_q = divide(of_q + ends * d1 * (d0 - least) - ends * d0 * (d1 - least), q)
    d_area = -divide(of_q * q, area) * share
    by_width = tl.zeros(number.shape, q.dtype)
    given = of_bins(number, rho * shift_y, rho * of_height, SIZE)
    c = given * q[:, None] + d_area[:, None]
    widths = sizes(e, factor, range_x, NUMBERS[MIN_WIDTH], BINS)
    # What the last knot gets, and with tails both outer ones together.
    last = pick(c * widths, tl.full(number.shape, BINS - 1, tl.int32)) * 0.5 + tl.where(number == BINS - 1, to_end, 0.0)
    if TAILS != 0:
        first = pick(c * widths, tl.zeros(number.shape, tl.int32)) * 0.5 + tl.where(number == 0, to_begin, 0.0)
        by_width = divide(first + last, outer_share) * share
    outer = (j == 0) | (j == BINS - 1)
    c += by_width[:, None] * tl.where(outer, 0.5, 1.0)
    of_sizes = c * (begin + end) * 0.5 + given * least + of_bins(number, shift_x, of_width, SIZE)

    # A knot's other bin is the one before: its exponential is formed anew, as no lane has its neighbour's.
    earlier = used[:, None] & (j > 0) & (j < BINS)
    logit = columns(params, at, step, 0, there) * NUMBERS[SCALE]
    largest = tl.max(tl.where(j < BINS, logit, float("-inf")), 1)[:, None]
    logit = columns(params, at, step, -1, earlier) * NUMBERS[SCALE]
    e_before = tl.where(earlier, exp(logit - largest), 0.0)
    w_before = tl.where(j > 0, sizes(e_before, factor, range_x, NUMBERS[MIN_WIDTH], BINS), 0.0)
    n = number[:, None]
    given = tl.where(j - 1 < n, (rho * shift_y)[:, None], tl.where(j - 1 == n, (rho * of_height)[:, None], 0.0))
    c_before = given * q[:, None] + d_area[:, None] + by_width[:, None] * tl.where(j == 1, 0.5, 1.0)
    of_knots = (c_before * w_before + c * widths) * 0.5
    of_knots += tl.where(j == n, to_begin[:, None], tl.where(j - 1 == n, to_end[:, None], 0.0))
    softpluses, given_knots = knot_softplus(params, at, step, used, 0, BINS, SIZE, NUMBERS, TAILS)
    gradient = of_knots * -expm1(-softpluses) * NUMBERS[SCALE]
    first_column: tl.constexpr = BINS - (1 if TAILS != 0 else 0)
    put(dparams, dat, dstep, first_column, gradient, real, used[:, None] & given_knots)
    put(dparams, dat, dstep, 0, through_softmax(e, of_sizes, factor, NUMBERS), real, there)
    if TAILS == 0:
        u = tl.load(params + (at + 2 * BINS * step), mask=used, other=0.0).to(q.dtype)
        gradient = last * sigmoid(u * NUMBERS[SCALE]) * NUMBERS[SCALE]
        gradient = tl.where(real, gradient, 0.0).to(dparams.dtype.element_ty)
        tl.store(dparams + (dat + 2 * BINS * dstep), gradient, mask=used)


# -------------------------------------------------------------------------------------------------------- launchers
def _call(
    x: Tensor, params: Tensor, bound: Tensor | None, mask: Tensor | None, degree: int, bins: int, layout: int,
    start: int, step: int, tails: int, left: float, right: float, bottom: float, top: float, min_bin_width: float,
    min_bin_height: float, scale: float, inverse: bool, event_dim: int,
) -> Call:  # fmt: skip
    if not (1 <= degree <= 3 and 0 <= tails <= 1 and 0 <= layout <= 1):
        raise ValueError(f"polynomial_spline: {degree=}, {tails=}, {layout=} are out of range")
    each = bins if degree == 1 else 2 * bins + (2 if degree == 3 else -1 if tails else 1)
    numbers = left, right, bottom, top, min_bin_width, min_bin_height, 0.0, 0.0, 0.0, scale
    # Of the shared layouts the first is the separate one, which there is none of here.
    # An element of higher degree has so many numbers of its own that few bins a thread are left room.
    return Call(
        "polynomial_spline", x, {"params": (params, each)}, each, bound, None, mask, bins, layout + 1, start, step,
        degree, tails, numbers, inverse, event_dim, BLOCK // (1, 4, 2)[degree - 1],
    )  # fmt: skip


def polynomial_spline(
    x: Tensor, params: Tensor, bound: Tensor | None, mask: Tensor | None, degree: int, bins: int, layout: int,
    start: int, step: int, tails: int, left: float, right: float, bottom: float, top: float, min_bin_width: float,
    min_bin_height: float, scale: float, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _call(
        x, params, bound, mask, degree, bins, layout, start, step, tails, left, right, bottom, top, min_bin_width,
        min_bin_height, scale, inverse, event_dim,
    ).forward(spline)  # fmt: skip


def polynomial_spline_backward(
    dy: Tensor | None, dlogdet: Tensor | None, x: Tensor, params: Tensor, bound: Tensor | None, mask: Tensor | None,
    degree: int, bins: int, layout: int, start: int, step: int, tails: int, left: float, right: float, bottom: float,
    top: float, min_bin_width: float, min_bin_height: float, scale: float, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, dparams = _call(
        x, params, bound, mask, degree, bins, layout, start, step, tails, left, right, bottom, top, min_bin_width,
        min_bin_height, scale, inverse, event_dim,
    ).backward(spline_backward, dy, dlogdet)  # fmt: skip
    return dx, dparams
