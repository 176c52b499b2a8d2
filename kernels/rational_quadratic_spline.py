"""rational_quadratic_spline in Triton: one pass forward, one backward, over any strides; the contract of
csrc/rational_quadratic_spline.h.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

Floor, K bins, n transformed elements of b bytes and r copied ones: forward reads x and 3 K - 1 parameters and writes y,
((3 K + 1) n + 2 r) b bytes; backward reads those and dy and writes their gradients, ((6 K + 1) n + 2 r) b bytes. The
kernels read 2 K + 2 parameters, the two derivatives where they are wanted, and write all. About 60 operations a bin
(two exponentials) and 300 an element.
"""

from __future__ import annotations

import triton
import triton.language as tl
from pyflowgen.kernels.elementary import at_least, divide, exp, log, log1p_unit, reciprocal, square_root
from pyflowgen.kernels.spline import (
    EDGE,
    INVERSE_CLIP,
    LINEAR,
    MIN_DERIVATIVE,
    MIN_HEIGHT,
    MIN_WIDTH,
    MIXED,
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
CIRCULAR = tl.constexpr(2)


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
    counts_x, total_x, half_x = shares(exponentials(a, BINS), x_high - x_low, NUMBERS[MIN_WIDTH], BINS)
    counts_y, total_y, half_y = shares(exponentials(b, BINS), y_high - y_low, NUMBERS[MIN_HEIGHT], BINS)
    number, (_, _, x0, x1), (_, _, y0, y1) = locate(
        x, counts_x, total_x, half_x, x_low, x_high, counts_y, total_y, half_y, y_low, y_high, NUMBERS[MIN_WIDTH],
        NUMBERS[MIN_HEIGHT], BINS, INVERSE,
    )  # fmt: skip
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
    share = reciprocal(total.to(dtype))
    mean = (shift * counts_before.to(dtype) + size * counts_own.to(dtype)) * share
    factor = share * range * (unit(e) * (1 - LEAST * BINS) * NUMBERS[SCALE])
    return e * (of_bins(number, shift, size, e.shape[1]) - mean[:, None]) * factor[:, None]


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
    e_x = exponentials(a, BINS)
    e_y = exponentials(b, BINS)
    counts_x, total_x, half_x = shares(e_x, x_high - x_low, NUMBERS[MIN_WIDTH], BINS)
    counts_y, total_y, half_y = shares(e_y, y_high - y_low, NUMBERS[MIN_HEIGHT], BINS)
    number, (before_x, own_x, x0, x1), (before_y, own_y, y0, y1) = locate(
        x, counts_x, total_x, half_x, x_low, x_high, counts_y, total_y, half_y, y_low, y_high, NUMBERS[MIN_WIDTH],
        NUMBERS[MIN_HEIGHT], BINS, INVERSE,
    )  # fmt: skip
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


# -------------------------------------------------------------------------------------------------------- launchers
def _call(
    x: Tensor, widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, bound: Tensor | None,
    circular: Tensor | None, mask: Tensor | None, bins: int, layout: int, start: int, step: int, convention: int,
    tails: int, numbers: tuple[float, ...], inverse: bool, event_dim: int,
) -> Call:  # fmt: skip
    if not (0 <= convention <= 2 and 0 <= tails <= 3):
        raise ValueError(f"rational_quadratic_spline: {convention=}, {tails=} are out of range")
    if not (heights is None) == (derivatives is None) == (layout != SEPARATE):
        raise ValueError(
            "rational_quadratic_spline: heights and derivatives come with separate parameters, and only then"
        )
    each = 3 * bins + (1, -1, 0, 1)[tails]
    given = {
        "widths": (widths, bins if layout == SEPARATE else each), "heights": (heights, bins),
        "derivatives": (derivatives, each - 2 * bins),
    }  # fmt: skip
    return Call(
        "rational_quadratic_spline", x, given, each, bound, circular, mask, bins, layout, start, step, convention,
        tails, numbers, inverse, event_dim,
    )  # fmt: skip


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
