"""mlp_coupling in Triton: a coupling layer with its conditioner in one kernel forward, and two backward.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton.py).

A program takes a block of rows from the split through all products to the merge. A product's result goes out to a
place of the block's own and comes back in pieces, which Triton cannot take from a block in registers: some 100 KB that
stay in the second-level cache, as the weights do. For the backward pass that place is `saved`, as large as on the CPU:
every product's result before its activation, and what goes into each step but the first. Without one it is used again
by the program's next block.

Backward, the same blocks go from the merge to the split and leave each product's gradient; then one kernel forms the
gradients of all weights and biases, tiles of them for segments of the rows that are summed in order: no atomics, the
same bits on every run. Permutations, scales and shifts between couplings are torch's.

Floor, for w weights and a row of c channels: 2 w operations forward and 4 w backward, and in memory 2 c numbers
forward, 4 c backward, and `saved` three times where it is kept. The kernels do that; rows, weights and the sizes
between are padded to tiles of 16 or 32, 64 and 32.

Limits: perceptrons and residual blocks, gated by a context or not, of up to 16 products; every fused activation of
`linear`; float32 and float64. Any width fits, but the layers ask for it up to 256 hidden features: from there on one
product fills a GPU by itself. Products are in full float32 unless torch's own setting for matrix products allows tf32.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from pyflowgen.kernels import tile
from pyflowgen.kernels.affine_coupling import transform, transform_backward
from pyflowgen.kernels.elementary import exp, expm1, normal, sigmoid, tanh
from pyflowgen.kernels.rational_quadratic_spline import spline, spline_backward
from torch import Tensor

# The operator's codes: csrc/linear.h.
RELU = tl.constexpr(1)
LEAKY_RELU = tl.constexpr(2)
SILU = tl.constexpr(3)
TANH = tl.constexpr(4)
SIGMOID = tl.constexpr(5)
GELU = tl.constexpr(6)
ELU = tl.constexpr(7)
INTERLEAVED = 2
OPTIONS, NUMBERS = 17, 11  # of a step
COLS, DEPTH = 64, 32  # tile of a product: columns, and how many of what is summed at a time
WEIGHT_TILE = 32  # rows and columns of a weight's gradient


# ----------------------------------------------------------------------------------------------------- the products
@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z < 0, 0.0, z)  # NaN stays
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z < 0, z * 0.01, z)
    elif ACTIVATION == SILU:
        return z * sigmoid(z)
    elif ACTIVATION == TANH:
        return tanh(z)
    elif ACTIVATION == SIGMOID:
        return sigmoid(z)
    elif ACTIVATION == GELU:
        cdf, _ = normal(z)
        return z * cdf
    elif ACTIVATION == ELU:
        return tl.where(z > 0, z, expm1(tl.where(z > 0, 0.0, z)))
    else:
        return z


@triton.jit
def activate_backward(g, z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(z <= 0, 0.0, g)
    elif ACTIVATION == LEAKY_RELU:
        return tl.where(z > 0, g, g * 0.01)
    elif ACTIVATION == SILU:
        s = sigmoid(z)
        return g * s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == TANH:
        t = tanh(z)
        return g * (1.0 - t * t)
    elif ACTIVATION == SIGMOID:
        s = sigmoid(z)
        return g * s * (1.0 - s)
    elif ACTIVATION == GELU:
        cdf, bell = normal(z)
        return g * (z * (bell * 0.398942280401432677940) + cdf)  # 1 / sqrt(2 pi)
    elif ACTIVATION == ELU:
        return tl.where(z > 0, g, g * exp(tl.where(z > 0, 0.0, z)))
    else:
        return g


@triton.jit
def load_input(x, context, mask, row, there, k, CHANNELS: tl.constexpr, SAME: tl.constexpr, CONTEXT: tl.constexpr):
    """The conditioner's input: channels that stay (with a mask all, those that move zero), then the context."""
    START: tl.constexpr = SAME[0]
    STEP: tl.constexpr = SAME[1]
    COUNT: tl.constexpr = SAME[2]
    given = k < COUNT
    if mask is not None:
        given = given & (tl.load(mask + k, mask=given, other=1) == 0)
    value = tl.load(x + (row * CHANNELS + START + k * STEP), mask=there & given, other=0.0)
    if CONTEXT:
        behind = (k >= COUNT) & (k < COUNT + CONTEXT)
        value += tl.load(context + (row * CONTEXT + (k - COUNT)), mask=there & behind, other=0.0)
    return value


@triton.jit
def load_layer(
    x, context, mask, saved, saved_rows, row, place, there, k, L: tl.constexpr, N: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """What goes into product L, columns k."""
    if L == 0:
        return load_input(x, context, mask, row, there, k, C.channels, C.same, C.context)
    elif C.gates[L]:
        return tl.load(context + (row * N + k), mask=there & (k < N), other=0.0)
    else:
        z = tl.load(saved + (saved_rows * C.source[L] + place * N + k), mask=there & (k < N), other=0.0)
        if C.blocks == 0 or C.layers > L + 1:
            z = activate(z, C.activation)
        return z


# x (rows, channels), context (rows, features), saved and y dense. A weight is (out, in). `C`: see Constants.
@triton.jit
def forward_kernel(
    x, context, mask, weights, biases, saved, saved_rows, y, logdet, rows,
    C: tl.constexpr, KEEP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    if WIDE:
        saved_rows = tl.full([], saved_rows, tl.int64)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, place = rows_of(block, KEEP, WIDE, ROWS)
        there = (row < rows)[:, None]
        for layer in tl.static_range(C.layers):
            product(
                x, context, mask, weights[layer], biases[layer], saved, saved_rows, row[:, None], place[:, None], there,
                layer, C, ROWS, COLS, DEPTH,
            )  # fmt: skip
            tl.debug_barrier()  # what others of the block have written is read next
        parameters = saved + saved_rows * C.before[C.layers - 1]
        lane = tl.arange(0, ROWS * EACH)
        row, place = lanes_of(block, lane // EACH, KEEP, WIDE, ROWS)
        there = row < rows
        total = tl.zeros([ROWS * EACH], x.dtype.element_ty)
        for first in tl.range(0, C.part[2], EACH):
            k = first + lane % EACH
            c, inside, on = transformed(k, mask, there, C)
            v = tl.load(x + (row * C.channels + c), mask=inside, other=0.0)
            if C.bins:
                at = place * C.parameters + k * C.each
                bound = tl.full([ROWS * EACH], 1.0, v.dtype)
                result, log_slope = spline(
                    v, on, parameters, parameters + C.bins, parameters + 2 * C.bins, (at, at, at), (1, 1, 1), bound,
                    k < 0, C.numbers, C.bins, C.size, C.convention, C.tails, C.inverse,
                )  # fmt: skip
            else:
                t, s = affine_parameters(parameters, place, k, on, v, C)
                result, log_slope = transform(v, t, s, C.clamp, C.scale, C.shift_first, C.inverse)
            total += tl.where(on, log_slope, 0.0)
            tl.store(y + (row * C.channels + c), tl.where(on, result, v), mask=inside)
        copy_rest(x, y, row, lane % EACH, there, C, EACH)
        sum = tl.sum(tl.reshape(total, (ROWS, EACH)), 1)
        row, _ = rows_of(block, KEEP, WIDE, ROWS)
        before = tl.load(logdet + row, mask=row < rows, other=0.0)
        tl.store(logdet + row, before - sum if C.inverse else before + sum, mask=row < rows)
        tl.debug_barrier()  # the next block writes where this one has read


@triton.jit
def rows_of(block, KEEP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    return lanes_of(block, tl.arange(0, ROWS), KEEP, WIDE, ROWS)


@triton.jit
def lanes_of(block, lane, KEEP: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Each lane's row, and where in `saved` that row is."""
    if WIDE:
        lane = lane.to(tl.int64)
    row = block * ROWS + lane
    if KEEP:
        return row, row
    else:
        return row, tl.program_id(0) * ROWS + lane


@triton.jit
def product(
    x, context, mask, weight, bias, saved, saved_rows, row, place, there, L: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Product L of a block of rows, to its place in `saved`."""
    IN: tl.constexpr = C.inputs[L]
    OUT: tl.constexpr = C.outputs[L]
    dtype: tl.constexpr = x.dtype.element_ty
    for first in tl.range(0, OUT, COLS):
        n = first + tl.arange(0, COLS)[None, :]
        total = tl.zeros([ROWS, COLS], dtype)
        for start in tl.range(0, IN, DEPTH):
            k = start + tl.arange(0, DEPTH)
            a = load_layer(x, context, mask, saved, saved_rows, row, place, there, k[None, :], L, IN, C)
            w = tl.load(weight + (n * IN + k[:, None]), mask=(n < OUT) & (k < IN)[:, None], other=0.0)
            total = tl.dot(a, w, total, input_precision=C.precision, out_dtype=dtype)
        if bias is not None:
            total += tl.load(bias + n, mask=n < OUT, other=0.0)
        inside = there & (n < OUT)
        at = place * OUT + n
        if C.gates[L]:  # its factor's argument, then what the block gives
            added = tl.load(saved + (saved_rows * C.before[L - 1] + at), mask=inside, other=0.0)
            h = tl.load(saved + (saved_rows * C.residual[L] + at), mask=inside, other=0.0)
            tl.store(saved + (saved_rows * (C.before[L] + OUT) + at), h + added * sigmoid(total), mask=inside)
        elif C.residual[L] >= 0:  # a residual block's second product
            total += tl.load(saved + (saved_rows * C.residual[L] + at), mask=inside, other=0.0)
        tl.store(saved + (saved_rows * C.before[L] + at), total, mask=inside)


# -------------------------------------------------------------------------------------------------------- the transform
@triton.jit
def transformed(k, mask, there, C: tl.constexpr):
    """x's channel for that of the parameters, whether there is one, and whether it is transformed."""
    c = C.part[0] + k * C.part[1]
    inside = there & (k < C.part[2])
    on = inside
    if mask is not None:
        on = inside & (tl.load(mask + c, mask=inside, other=0) != 0)
    return c, inside, on


@triton.jit
def copy_rest(source, to, row, lane, there, C: tl.constexpr, EACH: tl.constexpr):
    """The channels that no parameters are for; zeros where there is no source."""
    if C.part[2] < C.channels:
        for first in tl.range(0, C.channels, EACH):
            c = first + lane
            k = (c - C.part[0]) // C.part[1]
            part = (c >= C.part[0]) & (k * C.part[1] == c - C.part[0]) & (k < C.part[2])
            rest = there & (c < C.channels) & (part == 0)
            value = tl.zeros(c.shape, to.dtype.element_ty)
            if source is not None:
                value = tl.load(source + (row * C.channels + c), mask=rest, other=0.0)
            tl.store(to + (row * C.channels + c), value, mask=rest)


@triton.jit
def affine_parameters(parameters, place, k, on, v, C: tl.constexpr):
    at = place * C.parameters + k * C.each
    t = tl.load(parameters + at, mask=on, other=0.0)
    s = v
    if C.scale != 0:
        s = tl.load(parameters + (at + C.second), mask=on, other=0.0)
    return t, s


# Gradients of x, of the context (added to what is there) and of every product's result, `gradients`, laid out as saved.
@triton.jit
def backward_kernel(
    dy, dlogdet, dlogdet_stride, x, context, mask, weights, saved, gradients, saved_rows, dx, dcontext, rows,
    C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    EACH: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x.dtype.element_ty
    block = tl.program_id(0)
    if WIDE:
        saved_rows = tl.full([], saved_rows, tl.int64)
    parameters = saved + saved_rows * C.before[C.layers - 1]
    dparameters = gradients + saved_rows * C.before[C.layers - 1]
    lane = tl.arange(0, ROWS * EACH)
    row, _ = lanes_of(block, lane // EACH, True, WIDE, ROWS)
    there = row < rows
    dl = tl.zeros([ROWS * EACH], dtype)
    if dlogdet is not None:
        dl = tl.load(dlogdet + row * dlogdet_stride, mask=there, other=0.0)
    for first in tl.range(0, C.part[2], EACH):
        k = first + lane % EACH
        c, inside, on = transformed(k, mask, there, C)
        g = tl.zeros([ROWS * EACH], dtype)
        if dy is not None:
            g = tl.load(dy + (row * C.channels + c), mask=inside, other=0.0)
        v = tl.load(x + (row * C.channels + c), mask=inside, other=0.0)
        if C.bins:
            at = row * C.parameters + k * C.each
            bound = tl.full([ROWS * EACH], 1.0, dtype)
            dv = spline_backward(
                g, dl, v, inside, on, parameters, parameters + C.bins, parameters + 2 * C.bins, (at, at, at), (1, 1, 1),
                dparameters, dparameters + C.bins, dparameters + 2 * C.bins, (at, at, at), (1, 1, 1), bound, k < 0,
                C.numbers, C.bins, C.size, C.convention, C.tails, C.inverse,
            )  # fmt: skip
        else:
            t, s = affine_parameters(parameters, row, k, on, v, C)
            dv, dt, ds = transform_backward(g, dl, v, t, s, C.clamp, C.scale, C.shift_first, C.inverse)
            at = row * C.parameters + k * C.each
            tl.store(dparameters + at, tl.where(on, dt, 0.0), mask=inside)
            if C.scale != 0:
                tl.store(dparameters + (at + C.second), tl.where(on, ds, 0.0), mask=inside)
        tl.store(dx + (row * C.channels + c), tl.where(on, dv, g), mask=inside)
    copy_rest(dy, dx, row, lane % EACH, there, C, EACH)
    tl.debug_barrier()
    row, _ = rows_of(block, True, WIDE, ROWS)
    there = (row < rows)[:, None]
    for i in tl.static_range(C.layers):
        product_backward(
            weights[C.layers - 1 - i], saved, gradients, saved_rows, dx, dcontext, mask, row[:, None], there,
            C.layers - 1 - i, C, ROWS, COLS, DEPTH,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def product_backward(
    weight, saved, gradients, saved_rows, dx, dcontext, mask, row, there, L: tl.constexpr, C: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From the gradient of product L's result to that of the one before, or of the conditioner's input."""
    IN: tl.constexpr = C.inputs[L]
    OUT: tl.constexpr = C.outputs[L]
    dtype: tl.constexpr = dx.dtype.element_ty
    if C.gates[L]:  # from the gradient of what the block gives to those of the factor's argument and what it multiplies
        for first in tl.range(0, OUT, COLS):
            n = first + tl.arange(0, COLS)[None, :]
            inside = there & (n < OUT)
            at = row * OUT + n
            g = tl.load(gradients + (saved_rows * (C.before[L] + OUT) + at), mask=inside, other=0.0)
            s = sigmoid(tl.load(saved + (saved_rows * C.before[L] + at), mask=inside, other=0.0))
            added = tl.load(saved + (saved_rows * C.before[L - 1] + at), mask=inside, other=0.0)
            tl.store(gradients + (saved_rows * C.before[L - 1] + at), g * s, mask=inside)
            tl.store(gradients + (saved_rows * C.before[L] + at), g * added * s * (1.0 - s), mask=inside)
        tl.debug_barrier()
    for first in tl.range(0, IN, COLS):
        n = first + tl.arange(0, COLS)[None, :]
        total = tl.zeros([ROWS, COLS], dtype)
        for start in tl.range(0, OUT, DEPTH):
            k = start + tl.arange(0, DEPTH)
            at = saved_rows * C.before[L] + row * OUT + k[None, :]
            g = tl.load(gradients + at, mask=there & (k < OUT)[None, :], other=0.0)
            w = tl.load(weight + (k[:, None] * IN + n), mask=(k < OUT)[:, None] & (n < IN), other=0.0)
            total = tl.dot(g, w, total, input_precision=C.precision, out_dtype=dtype)
        inside = there & (n < IN)
        if C.gates[L]:
            at = row * IN + n
            tl.store(dcontext + at, tl.load(dcontext + at, mask=inside, other=0.0) + total, mask=inside)
        elif L > 0:
            at = saved_rows * C.source[L] + row * IN + n
            if C.blocks == 0 or C.layers > L + 1:
                total = activate_backward(total, tl.load(saved + at, mask=inside, other=0.0), C.activation)
            if C.behind[L] >= 0:  # a residual block's input goes on behind it
                total += tl.load(gradients + (saved_rows * C.behind[L] + row * IN + n), mask=inside, other=0.0)
            tl.store(gradients + at, total, mask=inside)
        else:
            same = inside & (n < C.same[2])
            if mask is not None:
                same = same & (tl.load(mask + n, mask=n < C.same[2], other=1) == 0)
            at = row * C.channels + C.same[0] + n * C.same[1]
            tl.store(dx + at, tl.load(dx + at, mask=same, other=0.0) + total, mask=same)
            if C.context:
                behind = inside & (n >= C.same[2])
                at = row * C.context + (n - C.same[2])
                tl.store(dcontext + at, tl.load(dcontext + at, mask=behind, other=0.0) + total, mask=behind)


# Gradients of all weights, then of all biases, for each segment of the rows by itself: sums[segment, C.sums].
@triton.jit
def weight_kernel(
    x, context, mask, saved, gradients, saved_rows, sums, rows, segment,
    C: tl.constexpr, WIDE: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0)
    part = tl.program_id(1)
    if WIDE:
        part = part.to(tl.int64)
        saved_rows = tl.full([], saved_rows, tl.int64)
    dtype: tl.constexpr = x.dtype.element_ty
    for layer in tl.static_range(C.layers):
        if (number >= C.tiles[layer]) & (number < C.tiles[layer + 1]):
            IN: tl.constexpr = C.inputs[layer]
            OUT: tl.constexpr = C.outputs[layer]
            ACROSS: tl.constexpr = (IN + TILE - 1) // TILE
            index = number - C.tiles[layer]
            n = (index // ACROSS) * TILE + tl.arange(0, TILE)[:, None]
            k = (index % ACROSS) * TILE + tl.arange(0, TILE)[None, :]
            total = tl.zeros([TILE, TILE], dtype)
            of_bias = tl.zeros([TILE], dtype)
            end = tl.minimum((part + 1) * segment, rows)
            for first in tl.range(part * segment, end, DEPTH):
                row = first + tl.arange(0, DEPTH)
                at = saved_rows * C.before[layer] + row[None, :] * OUT + n
                g = tl.load(gradients + at, mask=(row < end)[None, :] & (n < OUT), other=0.0)
                there = (row < end)[:, None]
                a = load_layer(x, context, mask, saved, saved_rows, row[:, None], row[:, None], there, k, layer, IN, C)
                total = tl.dot(g, a, total, input_precision=C.precision, out_dtype=dtype)
                of_bias += tl.sum(g, 1)
            own = sums + part * C.sums
            tl.store(own + (C.weight_places[layer] + n * IN + k), total, mask=(n < OUT) & (k < IN))
            if index % ACROSS == 0:
                out = (index // ACROSS) * TILE + tl.arange(0, TILE)
                tl.store(own + (C.bias_places[layer] + out), of_bias, mask=out < OUT)


# -------------------------------------------------------------------------------------------------------- launchers
class Constants(NamedTuple):
    """What a kernel is compiled for: one coupling layer."""

    layers: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    before: tuple[int, ...]  # columns of `saved` before each product's
    gates: tuple[bool, ...]  # whether a product is of the context and gates a residual block
    source: tuple[int, ...]  # columns before what goes into a product, if it is in `saved`
    residual: tuple[int, ...]  # columns before what is added to a product's result, or -1
    behind: tuple[int, ...]  # columns before what its residual block gives, of a block's first product, or -1
    activation: int
    blocks: int
    channels: int
    context: int
    same: tuple[int, int, int]
    part: tuple[int, int, int]
    scale: int
    clamp: float
    shift_first: bool
    inverse: bool
    parameters: int  # of a row
    each: int  # from one channel's parameters to the next's
    second: int  # from shift to log-scale
    bins: int
    size: int
    convention: int
    tails: int
    numbers: tuple[float, ...]
    precision: str
    tiles: tuple[int, ...]  # of the weights' gradients, before each product's
    weight_places: tuple[int, ...]
    bias_places: tuple[int, ...]
    sums: int


def precision(device: torch.device) -> str:
    """What torch's own float32 products have there."""
    tf32 = torch.version.hip is None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def _fail(message: str) -> None:
    raise ValueError(f"mlp_coupling: {message}")


class _Step:
    """One step: its tensors, and what its kernels are compiled for."""

    def __init__(self, call: _Call, options: list[int], numbers: list[float]) -> None:
        (layers, activation, same_start, same_step, start, step, scale, shift_first, inverse, layout, permuted, scaled,
         shifted, bins, convention, tails, blocks) = options  # fmt: skip
        self.weights = [w.contiguous() for w in itertools.islice(call.weights, layers)]
        self.biases = [b.contiguous() if b.numel() else None for b in itertools.islice(call.biases, layers)]
        mask = next(call.masks)
        self.mask = mask.view(torch.uint8) if mask.numel() else None
        self.index = next(call.indices) if permuted else None
        self.log_scale = next(call.log_scales) if scaled else None
        self.shift = next(call.shifts) if shifted else None
        self.scaled, self.columns = scaled, 0
        if not layers:
            return
        gated = blocks > 0 and layers == 2 + 3 * blocks
        if (blocks and not gated and layers != 2 + 2 * blocks) or (gated and call.context is None):
            _fail(f"{blocks} residual blocks have {layers} weights, with a context or without")
        if not 0 <= activation <= 7:
            _fail(f"activation {activation} is not for this kernel")
        inputs, outputs = [w.shape[1] for w in self.weights], [w.shape[0] for w in self.weights]
        gates = [gated and 0 < i < layers - 1 and i % 3 == 0 for i in range(layers)]
        channels, context = call.x.shape[-1], 0 if call.context is None else call.context.shape[-1]
        same = inputs[0] - context
        each = 3 * bins + (1, -1, 0, 1)[tails] if bins else 2 if scale and layout == INTERLEAVED else 1
        count = outputs[-1] // (each if bins else 2 if scale else 1)
        if self.mask is not None:
            same_start, same_step, start, step = 0, 1, 0, 1
        for first, by, size in ((same_start, same_step, same), (start, step, count)):
            if first < 0 or by < 1 or size < 1 or first + (size - 1) * by >= channels:
                _fail(f"start={first}, step={by} with {size} channels by the weights reach beyond x's {channels}")
        for i, w in enumerate(self.weights):
            given = context if gates[i] else outputs[i - 1] if i else inputs[0]
            if inputs[i] != given or w.dtype != call.x.dtype or w.device != call.x.device:
                _fail(f"weight {i} is {w.dtype} of shape {tuple(w.shape)} on {w.device}, which does not fit")
        clamp, *constants, edge, clip, factor = numbers
        # A gate's product keeps what its block gives as well.
        widths = [2 * out if gate else out for out, gate in zip(outputs, gates, strict=True)]
        self.columns, before = sum(widths), (0, *itertools.accumulate(widths[:-1]))
        given_at = [start + (out if gate else 0) for start, out, gate in zip(before, outputs, gates, strict=True)]
        each_block = 3 if gated else 2
        source = (0, *given_at[:-1])
        first = [0 < i < layers - 1 and blocks > 0 and i % each_block == 1 for i in range(layers)]
        residual, behind = [-1] * layers, [-1] * layers
        for i in range(layers):
            if first[i]:
                last = i + each_block - 1
                residual[last], behind[i] = source[i], given_at[last]
        tiles = [
            triton.cdiv(o, WEIGHT_TILE) * triton.cdiv(i, WEIGHT_TILE) for i, o in zip(inputs, outputs, strict=True)
        ]
        sizes = [i * o for i, o in zip(inputs, outputs, strict=True)]
        places = [0, *itertools.accumulate((*sizes, *outputs))]
        self.constants = Constants(
            layers, tuple(inputs), tuple(outputs), before, tuple(gates), source, tuple(residual), tuple(behind),
            activation, blocks, channels, context, (same_start, same_step, same), (start, step, count), scale, clamp,
            bool(shift_first), bool(inverse), outputs[-1], each, 1 if layout == INTERLEAVED else count, bins,
            triton.next_power_of_2(max(bins, 2)), convention, tails,
            (*constants, edge, 1 / clip if clip > 0 else 0.0, factor), precision(call.x.device),
            (0, *itertools.accumulate(tiles)), tuple(places[:layers]), tuple(places[layers:-1]), places[-1],
        )  # fmt: skip

    def options(self, rows: int) -> dict[str, Any]:
        # Few rows: more programs. A spline's elements × bins are 1024.
        size = 16 if rows < 8192 or (self.constants.bins and self.constants.size > 32) else 32
        each = min(triton.next_power_of_2(self.constants.channels), 1024 // size)
        if self.constants.bins:
            each = min(each, max(1, 1024 // size // self.constants.size))
        wide = rows * max(self.columns, self.constants.channels, self.constants.context) >= 2**30
        return {"C": self.constants, "WIDE": wide, "ROWS": size, "COLS": COLS, "DEPTH": DEPTH, "EACH": each,
                "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}  # fmt: skip

    def before_coupling(self, x: Tensor, logdet: Tensor | None) -> Tensor:
        """x permuted, scaled and shifted; adds to logdet."""
        x = x if self.index is None else x.index_select(-1, self.index)
        if self.log_scale is not None:
            if self.scaled > 0:
                x = x * self.log_scale.exp()
                x = x if self.shift is None else x + self.shift
            else:
                x = (x if self.shift is None else x - self.shift) * (-self.log_scale).exp()
            if logdet is not None:
                logdet += self.scaled * self.log_scale.sum()
        return x

    def before_coupling_backward(
        self, du: Tensor, dlogdet: Tensor | None, u: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of x, log_scale and shift, from that of u."""
        dlog_scale = dshift = None
        if self.log_scale is not None:
            total = 0 if dlogdet is None else dlogdet.sum()
            dx = du * (self.scaled * self.log_scale).exp()
            if self.scaled > 0:
                scaled = u if self.shift is None else u - self.shift
                dlog_scale, dshift = (du * scaled).sum(0) + total, du.sum(0)
            else:
                dlog_scale, dshift = -(du * u).sum(0) - total, -dx.sum(0)
            du = dx
        if self.index is not None:
            du = du.index_select(-1, self.index.argsort())
        return du, dlog_scale, dshift if self.shift is not None else None


class _Call:
    """The operator's arguments, step by step; x and context as (rows, …)."""

    def __init__(
        self, x: Tensor, context: Tensor | None, weights: list[Tensor], biases: list[Tensor], masks: list[Tensor],
        indices: list[Tensor], log_scales: list[Tensor], shifts: list[Tensor], options: list[int], numbers: list[float],
    ) -> None:  # fmt: skip
        if x.dim() < 1 or x.dtype not in (torch.float32, torch.float64):
            _fail(f"x is {x.dtype} of shape {tuple(x.shape)}, expected float32 or float64 (*batch, channels)")
        if len(options) != OPTIONS * len(masks) or len(numbers) != NUMBERS * len(masks):
            _fail(f"{len(masks)} steps have {len(options)} options and {len(numbers)} numbers")
        if context is not None and context.shape[:-1] != x.shape[:-1]:
            _fail(f"context has shape {tuple(context.shape)}, which does not fit x's {tuple(x.shape)}")
        self.rows = math.prod(x.shape[:-1])
        self.x = x.reshape(self.rows, x.shape[-1]).contiguous()
        self.context = None if context is None else context.reshape(self.rows, context.shape[-1]).contiguous()
        self.weights, self.biases, self.masks = iter(weights), iter(biases), iter(masks)
        self.indices, self.log_scales, self.shifts = iter(indices), iter(log_scales), iter(shifts)
        self.steps = [
            _Step(self, options[OPTIONS * i : OPTIONS * (i + 1)], numbers[NUMBERS * i : NUMBERS * (i + 1)])
            for i in range(len(masks))
        ]
        # What each step keeps comes after what goes into the steps, (rows, channels) each but the first's.
        self.states = self.rows * self.x.shape[1] * (len(self.steps) - 1)
        ends = itertools.accumulate((self.rows * s.columns for s in self.steps), initial=self.states)
        self.places = list(ends)


def mlp_coupling(
    x: Tensor, context: Tensor | None, weights: list[Tensor], biases: list[Tensor], masks: list[Tensor],
    indices: list[Tensor], log_scales: list[Tensor], shifts: list[Tensor], options: list[int], numbers: list[float],
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    call = _Call(x, context, weights, biases, masks, indices, log_scales, shifts, options, numbers)
    rows, channels = call.x.shape
    logdet = call.x.new_zeros(rows)
    saved = call.x.new_empty(call.places[-1] if keep else 0)
    states = saved[: call.states].view(-1, rows, channels) if keep and rows else None
    state = call.x
    for i, step in enumerate(call.steps):
        if i and states is not None:
            states[i - 1].copy_(state)
        state = step.before_coupling(state, logdet)
        if not step.columns or not rows:
            continue
        run = step.options(rows)
        blocks = triton.cdiv(rows, run["ROWS"])
        programs = blocks if keep else min(blocks, tile.PROGRAMS)
        place_rows = rows if keep else programs * run["ROWS"]
        place = saved[call.places[i] :] if keep else call.x.new_empty(place_rows * step.columns)
        y = torch.empty_like(state)
        arguments = (state, call.context, step.mask, tuple(step.weights), tuple(step.biases), place, place_rows, y,
                     logdet, rows)  # fmt: skip
        tile.Launch(forward_kernel, (programs,), arguments, run | {"KEEP": keep}).run(x.device)
        state = y
    if state is call.x:
        state = state.clone()
    return state.view(x.shape), logdet.view(x.shape[:-1]), saved


def mlp_coupling_backward(
    dy: Tensor | None, dlogdet: Tensor | None, x: Tensor, context: Tensor | None, weights: list[Tensor],
    biases: list[Tensor], masks: list[Tensor], indices: list[Tensor], log_scales: list[Tensor], shifts: list[Tensor],
    saved: Tensor, options: list[int], numbers: list[float], need_input: bool, need_parameters: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    call = _Call(x, context, weights, biases, masks, indices, log_scales, shifts, options, numbers)
    if saved.numel() != call.places[-1] or saved.dtype != x.dtype:
        _fail("saved is not what the forward pass kept for these arguments")
    tile.check_gradients("mlp_coupling", dy, dlogdet, x, x.dim() - 1)
    rows, channels = call.x.shape
    dcontext = torch.zeros_like(call.context) if call.context is not None else x.new_empty(0)
    of_weights: list[Tensor] = []
    of_biases: list[Tensor] = []
    of_scales: list[Tensor] = []
    of_shifts: list[Tensor] = []
    dstate = None if dy is None else dy.reshape(rows, channels).contiguous()
    dl = None if dlogdet is None else dlogdet.reshape(rows)
    states = saved[: call.states].view(-1, rows, channels) if rows else saved
    for i in range(len(call.steps) - 1, -1, -1):
        step = call.steps[i]
        u = step.before_coupling(states[i - 1] if i and rows else call.x, None)
        if step.columns:
            if rows:
                du, gradients = torch.empty_like(u), x.new_empty(rows * step.columns)
                run, kept = step.options(rows), saved[call.places[i] :]
                arguments = (
                    dstate, dl, 0 if dl is None else dl.stride(0), u, call.context, step.mask, tuple(step.weights),
                    kept, gradients, rows, du, None if call.context is None else dcontext, rows,
                )  # fmt: skip
                tile.Launch(backward_kernel, (triton.cdiv(rows, run["ROWS"]),), arguments, run).run(x.device)
                dstate = du
            if need_parameters:
                found = _weight_gradients(call, step, u, kept, gradients) if rows else [
                    *map(torch.zeros_like, step.weights), *(x.new_zeros(w.shape[0]) for w in step.weights)
                ]  # fmt: skip
                of_weights = found[: len(step.weights)] + of_weights
                zeros = [x.new_empty(0) if b is None else g for b, g in zip(step.biases, found[len(step.weights) :],
                                                                            strict=True)]  # fmt: skip
                of_biases = zeros + of_biases
        if dstate is None:
            dstate = torch.zeros_like(u)
        dstate, dscale, dshift = step.before_coupling_backward(dstate, dl, u)
        of_scales = ([] if dscale is None else [dscale]) + of_scales
        of_shifts = ([] if dshift is None else [dshift]) + of_shifts
    assert dstate is not None
    if not need_parameters:
        parameters = [x.new_empty(0) for _ in (*weights, *biases, *log_scales, *shifts)]
    else:
        parameters = [*of_weights, *of_biases, *of_scales, *of_shifts]
    dcontext = dcontext.view(context.shape) if context is not None and need_input else x.new_empty(0)
    dx = dstate.view(x.shape)
    return dx.clone() if dy is not None and dx.data_ptr() == dy.data_ptr() else dx, dcontext, parameters


def _weight_gradients(call: _Call, step: _Step, u: Tensor, kept: Tensor, gradients: Tensor) -> list[Tensor]:
    c, rows = step.constants, call.rows
    # Some 256 programs; a segment has at least 128 rows.
    segments = max(1, min(256 // c.tiles[-1], triton.cdiv(rows, 128)))
    segment = triton.cdiv(triton.cdiv(rows, segments), DEPTH) * DEPTH
    segments = triton.cdiv(rows, segment)
    sums = u.new_empty(segments, c.sums)
    options = {"C": c, "WIDE": step.options(rows)["WIDE"], "TILE": WEIGHT_TILE, "DEPTH": DEPTH, "num_warps": 4,
               "num_stages": 2, "enable_fp_fusion": True}  # fmt: skip
    arguments = (u, call.context, step.mask, kept, gradients, rows, sums, rows, segment)
    tile.Launch(weight_kernel, (c.tiles[-1], segments), arguments, options).run(u.device)
    flat = sums.sum(0)
    results = [torch.empty_like(w) for w in step.weights] + [u.new_empty(o) for o in c.outputs]
    torch._foreach_copy_([r.view(-1) for r in results], list(flat.split([r.numel() for r in results])))
    return results
