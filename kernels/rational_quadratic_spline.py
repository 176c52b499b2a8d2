"""rational_quadratic_spline in Triton: one pass forward, one backward, over any strides; the contract of
csrc/rational_quadratic_spline.h.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor, K bins, n transformed elements of b bytes and r copied ones: forward reads x and 3 K - 1 parameters and writes y,
((3 K + 1) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((6 K + 1) n + 2 r) b bytes. The
kernels read 2 K + 2 parameters, the two derivatives where they are wanted, and write all. About 60 operations a bin
(two exponentials) and 300 an element.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from pyflowgen.kernels.elementary import at_least, divide, exp, log, log1p_unit, reciprocal, square_root, tanh
from pyflowgen.kernels.spline import (
    BOTTOM,
    EDGE,
    INVERSE_CLIP,
    LEFT,
    LINEAR,
    MIN_DERIVATIVE,
    MIN_HEIGHT,
    MIN_WIDTH,
    MIXED,
    RIGHT,
    SCALE,
    SEPARATE,
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

# The operator's codes: csrc/formula/spline_convention.h.
ZUKO = tl.constexpr(1)
TORCHFLOWS = tl.constexpr(2)
FREIA = tl.constexpr(3)
CIRCULAR = tl.constexpr(2)
AFFINE = tl.constexpr(4)
# More places in NUMBERS.
SHIFT_WIDTH, SHIFT_HEIGHT = tl.constexpr(10), tl.constexpr(11)


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
        elif CONVENTION == FREIA:
            u += NUMBERS[EDGE]
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
    elif TAILS >= AFFINE:  # after what says where the interval is
        return tl.where((k > 0) & (k < BINS), k + (1 if TAILS == AFFINE else 0), -1)
    else:
        return k


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


# ------------------------------------------------------------------------------- freia: an interval of one's own
@triton.jit
def softplus_and_slope(u):
    e = exp(-tl.abs(u))
    return at_least(u, 0.0) + log1p_unit(e), divide(tl.where(u < 0, e, 1.0), 1.0 + e)


@triton.jit
def clamp_size(size, NUMBERS: tl.constexpr):
    """What the clamp makes of a size, and the derivative of that."""
    if NUMBERS[INVERSE_CLIP] > 0:
        t = tanh(size * NUMBERS[INVERSE_CLIP])
        return t * (1 / NUMBERS[INVERSE_CLIP]), 1.0 - t * t
    else:
        return size, size * 0.0 + 1.0


@triton.jit
def own_axis(u, begin, SHIFT: tl.constexpr, LEAST: tl.constexpr, NUMBERS: tl.constexpr, BINS: tl.constexpr):
    """Of bins of sizes softplus(u + SHIFT) + LEAST: what stands for exponentials, the sizes' derivatives, the
    interval's begin and size, by what the clamp multiplies all, and its derivative with respect to the sizes' sum."""
    there = tl.arange(0, u.shape[1])[None, :] < BINS
    size, slope = softplus_and_slope(u + SHIFT)
    size = tl.where(there, size + LEAST, 0.0)
    total = tl.sum(size, 1)
    clamped, derivative = clamp_size(total, NUMBERS)
    resize = divide(clamped, total)
    growth = divide(derivative - resize, total)
    return divide(size, tl.max(size, 1)[:, None]), slope, begin * resize, clamped, resize, growth


@triton.jit
def own_gradient(begin, size, resize, growth, offset, length, shift, of_bin, whole):
    """Gradients of the sizes before the bin, of its own, of those beyond, and of the begin: own_gradient of
    csrc/formula/rational_quadratic_spline.h."""
    of_resize = divide(shift * (offset + begin) + (of_bin * length + whole * size), resize)
    every = of_resize * growth + whole * resize
    return shift * resize + every, of_bin * resize + every, every, shift * resize


@triton.jit
def intervals(
    a, b, used, d, at_d, step_d, bound, NUMBERS: tl.constexpr, BINS: tl.constexpr, CONVENTION: tl.constexpr,
    TAILS: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """(exponentials; where the interval begins and ends; own_axis' last two), along x and along y; the sizes'
    derivatives; the tails' slope. Of resized ones the derivative of the interval's size is in the last two's place."""
    if TAILS == AFFINE:
        bottom = tl.load(d + at_d, mask=used, other=0.0).to(dtype) + NUMBERS[BOTTOM]
        left = tl.load(d + (at_d + step_d), mask=used, other=0.0).to(dtype) + NUMBERS[LEFT]
        e_x, da, begin_x, size_x, resize_x, growth_x = own_axis(
            a, left, NUMBERS[SHIFT_WIDTH], NUMBERS[MIN_WIDTH], NUMBERS, BINS
        )
        e_y, db, begin_y, size_y, resize_y, growth_y = own_axis(
            b, bottom, NUMBERS[SHIFT_HEIGHT], NUMBERS[MIN_HEIGHT], NUMBERS, BINS
        )
        slope = divide(size_y, size_x)
        along_x = e_x, begin_x, begin_x + size_x, resize_x, growth_x
        return along_x, (e_y, begin_y, begin_y + size_y, resize_y, growth_y), da, db, slope
    elif CONVENTION == FREIA:
        u = tl.load(d + at_d, mask=used, other=0.0).to(dtype)
        share, derivative = softplus_and_slope(u + 0.54132485461291806)  # log(e - 1)
        default: tl.constexpr = NUMBERS[RIGHT] - NUMBERS[LEFT]
        size, growth = clamp_size(share * default, NUMBERS)
        growth *= derivative * default
        half = 0.5 * size
        along_x = exponentials(a, BINS), -half, half, growth, growth
        return along_x, (exponentials(b, BINS), -half, half, growth, growth), a, b, half * 0.0 + 1.0
    else:
        x_low, x_high, y_low, y_high = interval(bound, NUMBERS)
        along_x = exponentials(a, BINS), x_low, x_high, x_low, x_low
        return along_x, (exponentials(b, BINS), y_low, y_high, y_low, y_low), a, b, x_low


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
def load_derivative(
    d, at_d, step, index, used, outer, NUMBERS: tl.constexpr, CONVENTION: tl.constexpr, TAILS: tl.constexpr
):
    u = tl.load(d + (at_d + index * step), mask=used & (index >= 0), other=0.0).to(outer.dtype)
    value, slope = knot_derivative(tl.where(index < 0, NUMBERS[EDGE], u), NUMBERS, CONVENTION)
    return (tl.where(index < 0, outer, value), slope) if TAILS >= AFFINE else (value, slope)


@triton.jit
def spline(
    v, used, w, h, d, places, steps, bound, circular, NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr,
    CONVENTION: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """y and the log-derivative of the forward map; an element's parameters begin at w, h, d + places, `steps` apart."""
    LEAST_X: tl.constexpr = 0.0 if TAILS >= AFFINE else NUMBERS[MIN_WIDTH]
    LEAST_Y: tl.constexpr = 0.0 if TAILS >= AFFINE else NUMBERS[MIN_HEIGHT]
    a, b, _, _ = logits(w, h, places[0], places[1], steps, used, NUMBERS, BINS, SIZE, CONVENTION, v.dtype)
    (e_x, x_low, x_high, _, _), (e_y, y_low, y_high, _, _), _, _, slope = intervals(
        a, b, used, d, places[2], steps[2], bound, NUMBERS, BINS, CONVENTION, TAILS, v.dtype
    )
    low, high = (y_low, y_high) if INVERSE else (x_low, x_high)
    inside, x = within(v, low, high)
    counts_x, total_x, half_x = shares(e_x, x_high - x_low, LEAST_X, BINS)
    counts_y, total_y, half_y = shares(e_y, y_high - y_low, LEAST_Y, BINS)
    number, (_, _, x0, x1), (_, _, y0, y1) = locate(
        x, counts_x, total_x, half_x, x_low, x_high, counts_y, total_y, half_y, y_low, y_high, LEAST_X, LEAST_Y, BINS,
        INVERSE,
    )  # fmt: skip
    first = derivative_at(number, circular, BINS, TAILS)
    second = derivative_at(number + 1, circular, BINS, TAILS)
    d0, _ = load_derivative(d, places[2], steps[2], first, used, slope, NUMBERS, CONVENTION, TAILS)
    d1, _ = load_derivative(d, places[2], steps[2], second, used, slope, NUMBERS, CONVENTION, TAILS)
    y, log_slope = rational_quadratic(x, x0, x1, y0, y1, d0, d1, INVERSE)
    if TAILS == 0:
        return tl.where(inside, y, float("nan")), tl.where(inside, log_slope, float("nan"))
    elif TAILS == AFFINE:
        x_end, y_end = tl.where(v > high, x_high, x_low), tl.where(v > high, y_high, y_low)
        line = x_end + divide(v - y_end, slope) if INVERSE else y_end + (v - x_end) * slope
        return tl.where(inside, y, line), tl.where(inside, log_slope, log(slope))
    else:
        return tl.where(inside, y, v), tl.where(inside, log_slope, 0.0)


@triton.jit
def softmax_backward(e, counts_before, counts_own, total, number, shift, size, range, LEAST: tl.constexpr,
                     BINS: tl.constexpr, NUMBERS: tl.constexpr):  # fmt: skip
    """Gradients of an axis' logits from those of every bin before bin `number`, `shift`, and of its own, `size`; and
    the bins' mean gradient."""
    dtype: tl.constexpr = e.dtype
    share = reciprocal(total.to(dtype))
    mean = (shift * counts_before.to(dtype) + size * counts_own.to(dtype)) * share
    factor = share * range * (unit(e) * (1 - LEAST * BINS) * NUMBERS[SCALE])
    return e * (of_bins(number, shift, size, e.shape[1]) - mean[:, None]) * factor[:, None], mean


@triton.jit
def spline_backward(
    dy, dlogdet, v, used, on, w, h, d, places, steps, dw, dh, dd, dplaces, dsteps, bound, circular,
    NUMBERS: tl.constexpr, BINS: tl.constexpr, SIZE: tl.constexpr, CONVENTION: tl.constexpr, TAILS: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of all `used` elements' parameters, zero where not `on`; returns that of v."""
    storage: tl.constexpr = dw.dtype.element_ty
    LEAST_X: tl.constexpr = 0.0 if TAILS >= AFFINE else NUMBERS[MIN_WIDTH]
    LEAST_Y: tl.constexpr = 0.0 if TAILS >= AFFINE else NUMBERS[MIN_HEIGHT]
    a, b, da, db = logits(w, h, places[0], places[1], steps, used, NUMBERS, BINS, SIZE, CONVENTION, v.dtype)
    along_x, along_y, size_a, size_b, slope = intervals(
        a, b, used, d, places[2], steps[2], bound, NUMBERS, BINS, CONVENTION, TAILS, v.dtype
    )
    e_x, x_low, x_high, resize_x, growth_x = along_x
    e_y, y_low, y_high, resize_y, growth_y = along_y
    low, high = (y_low, y_high) if INVERSE else (x_low, x_high)
    inside, x = within(v, low, high)
    counts_x, total_x, half_x = shares(e_x, x_high - x_low, LEAST_X, BINS)
    counts_y, total_y, half_y = shares(e_y, y_high - y_low, LEAST_Y, BINS)
    number, (before_x, own_x, x0, x1), (before_y, own_y, y0, y1) = locate(
        x, counts_x, total_x, half_x, x_low, x_high, counts_y, total_y, half_y, y_low, y_high, LEAST_X, LEAST_Y, BINS,
        INVERSE,
    )  # fmt: skip
    first = derivative_at(number, circular, BINS, TAILS)
    second = derivative_at(number + 1, circular, BINS, TAILS)
    d0, slope0 = load_derivative(d, places[2], steps[2], first, used, slope, NUMBERS, CONVENTION, TAILS)
    d1, slope1 = load_derivative(d, places[2], steps[2], second, used, slope, NUMBERS, CONVENTION, TAILS)
    dv, shift_x, width, shift_y, height, dd0, dd1 = rational_quadratic_backward(
        dy, dlogdet, x, x0, x1, y0, y1, d0, d1, INVERSE
    )
    real = on & inside
    outside = 0.0 if TAILS == 0 else dy
    j = tl.arange(0, SIZE)[None, :]
    if TAILS == AFFINE:
        above = v > high
        beyond = tl.where(on, v - tl.where(above, high, low), 0.0)
        if INVERSE:
            outside = divide(dy, slope)
            tail_x, tail_y = dy, -outside
            tail_slope = -divide(outside * beyond + dlogdet, slope)
        else:
            outside = dy * slope
            tail_x, tail_y = -outside, dy
            tail_slope = dy * beyond + divide(dlogdet, slope)
        of_outer = tl.where(number == 0, dd0, 0.0) + tl.where(number == BINS - 1, dd1, 0.0)
        size_x, size_y = x_high - x_low, y_high - y_low
        of_slope = divide(tl.where(inside, of_outer, tail_slope), size_x)
        shift_x, shift_y = tl.where(inside, shift_x, tail_x), tl.where(inside, shift_y, tail_y)
        width, height = tl.where(inside, width, 0.0), tl.where(inside, height, 0.0)
        offset_x = tl.where(inside, x0 - x_low, tl.where(above, size_x, 0.0))
        offset_y = tl.where(inside, y0 - y_low, tl.where(above, size_y, 0.0))
        number = tl.where(inside, number, tl.where(above, BINS, -1))
        before, at, after, of_left = own_gradient(
            x_low, size_x, resize_x, growth_x, offset_x, x1 - x0, shift_x, width, -of_slope * slope
        )
        gradient_x = size_a * tl.where(j > number[:, None], after[:, None], of_bins(number, before, at, SIZE))
        before, at, after, of_bottom = own_gradient(
            y_low, size_y, resize_y, growth_y, offset_y, y1 - y0, shift_y, height, of_slope
        )
        gradient_y = size_b * tl.where(j > number[:, None], after[:, None], of_bins(number, before, at, SIZE))
        kept = on
    else:
        gradient_x, mean_x = softmax_backward(
            e_x, before_x, own_x, total_x, number, shift_x, width, x_high - x_low, LEAST_X, BINS, NUMBERS
        )
        gradient_y, mean_y = softmax_backward(
            e_y, before_y, own_y, total_y, number, shift_y, height, y_high - y_low, LEAST_Y, BINS, NUMBERS
        )
        kept = real
    if CONVENTION == ZUKO:
        gradient_x *= da
        gradient_y *= db
    elif CONVENTION == TORCHFLOWS:
        gradient_x += gradient_y
        gradient_y *= 1e-3
    there = used[:, None] & (j < BINS)
    gradient_x, gradient_y = tl.where(kept[:, None], gradient_x, 0.0), tl.where(kept[:, None], gradient_y, 0.0)
    tl.store(dw + (dplaces[0][:, None] + j * dsteps[0]), gradient_x.to(storage), mask=there)
    tl.store(dh + (dplaces[1][:, None] + j * dsteps[1]), gradient_y.to(storage), mask=there)
    count: tl.constexpr = BINS - 1 if TAILS == LINEAR else BINS if TAILS == CIRCULAR or TAILS > AFFINE else BINS + 1
    # Of the knots 0 to K - 1, and of knot K, where it has a parameter of its own, by itself.
    of_knots = tl.where(j == first[:, None], (dd0 * slope0)[:, None], 0.0)
    of_knots += tl.where(j == second[:, None], (dd1 * slope1)[:, None], 0.0)
    of_knots = tl.where(real[:, None], of_knots, 0.0)
    if TAILS == AFFINE:
        ends = tl.where(j == 0, of_bottom[:, None], tl.where(j == 1, of_left[:, None], 0.0))
        of_knots += tl.where(on[:, None], ends, 0.0)
    elif CONVENTION == FREIA:
        of_size = (mean_x + mean_y - 0.5 * (shift_x + shift_y)) * growth_x
        of_knots += tl.where(real[:, None] & (j == 0), of_size[:, None], 0.0)
    there = used[:, None] & (j < (BINS if count > BINS else count))
    tl.store(dd + (dplaces[2][:, None] + j * dsteps[2]), of_knots.to(storage), mask=there)
    if count > BINS:
        last = tl.where(second == BINS, dd1 * slope1, 0.0) + tl.where(first == BINS, dd0 * slope0, 0.0)
        last = tl.where(real, last, 0.0)
        tl.store(dd + (dplaces[2] + BINS * dsteps[2]), last.to(storage), mask=used)
    return tl.where(inside, dv, outside)


# -------------------------------------------------------------------------------------------------------- launchers
def _call(
    x: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, bound: Tensor | None,
    circular: Tensor | None, mask: Tensor | None, bins: int, layout: int, start: int, step: int, convention: int,
    tails: int, numbers: tuple[float, ...], inverse: bool, event_dim: int,
) -> Call:  # fmt: skip
    if not (0 <= convention <= 3 and 0 <= tails <= 5 and (convention == 3) == (tails > 3)):
        raise ValueError(f"rational_quadratic_spline: {convention=}, {tails=} are out of range")
    if not (heights is None) == (derivatives is None) == (layout != SEPARATE):
        raise ValueError(
            "rational_quadratic_spline: heights and derivatives come with separate parameters, and only then"
        )
    each = 3 * bins + (1, -1, 0, 1, 1, 0)[tails]
    given = {
        "widths": (widths, bins if layout == SEPARATE else each), "heights": (heights, bins),
        "derivatives": (derivatives, each - 2 * bins),
    }  # fmt: skip
    call = Call(
        "rational_quadratic_spline", x, given, each, bound, circular, mask, bins, layout, start, step, convention,
        tails, numbers, inverse, event_dim,
    )  # fmt: skip
    if tails == AFFINE.value:  # what softplus gives a bin's default size, less the least, for
        left, right, bottom, top, *least = numbers
        default = (right - left) / bins - least[0], (top - bottom) / bins - least[1]
        call.options["NUMBERS"] += tuple(v + math.log(-math.expm1(-v)) for v in default)
    return call


def rational_quadratic_spline(
    x: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, bound: Tensor | None,
    circular: Tensor | None, mask: Tensor | None, bins: int, layout: int, start: int, step: int, convention: int,
    tails: int, left: float, right: float, bottom: float, top: float, min_bin_width: float, min_bin_height: float,
    min_derivative: float, edge: float, clip: float, scale: float, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _call(
        x, widths, heights, derivatives, bound, circular, mask, bins, layout, start, step, convention, tails,
        (left, right, bottom, top, min_bin_width, min_bin_height, min_derivative, edge, clip, scale), inverse,
        event_dim,
    ).forward(spline)  # fmt: skip


def rational_quadratic_spline_backward(
    dy: Tensor | None, dlogdet: Tensor | None, x: Tensor, widths: Tensor, heights: Tensor | None,
    derivatives: Tensor | None, bound: Tensor | None, circular: Tensor | None, mask: Tensor | None, bins: int,
    layout: int, start: int, step: int, convention: int, tails: int, left: float, right: float, bottom: float,
    top: float, min_bin_width: float, min_bin_height: float, min_derivative: float, edge: float, clip: float,
    scale: float, inverse: bool, event_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    call = _call(
        x, widths, heights, derivatives, bound, circular, mask, bins, layout, start, step, convention, tails,
        (left, right, bottom, top, min_bin_width, min_bin_height, min_derivative, edge, clip, scale), inverse,
        event_dim,
    )  # fmt: skip
    dx, dwidths, *others = call.backward(spline_backward, dy, dlogdet)
    return dx, dwidths, *(others or (x.new_empty(0), x.new_empty(0)))
