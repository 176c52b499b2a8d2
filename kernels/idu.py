"""Information Discrimination Unit in Triton: a product with the gates as its epilogue for each half of a step.

Not yet run on a GPU: held by Triton's interpreter and by compiling ahead of time (tests/test_triton_idu.py).

What does not hang on the recurrence is torch's own product, before and after; every weight's gradient is one product
over all steps. Floor of a step: 4 H² multiply-adds a window, W_hr and W_hh read once from L2 (2 MiB in float32 at
H = 512), and two launches, one with the reset after the product; the kernels read the weights once for 16 windows, and
launches are the limit for few windows. One launch for all steps would need programs that wait for one another, and
stores of one half that are seen in the next, which Triton's barrier does not promise on all back ends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from pyflowgen.kernels import tile
from pyflowgen.kernels.elementary import sigmoid, tanh
from torch import Tensor

ROWS = 16  # windows of a program: the least that a matrix unit takes


@triton.jit
def gate(x, HARD: tl.constexpr):
    """What is kept of a gate: itself, or the argument of its clamp."""
    if HARD:
        return x * 0.2 + 0.5
    else:
        return sigmoid(x)


@triton.jit
def gate_value(kept, HARD: tl.constexpr):
    if HARD:
        return tl.where(kept < 0, 0.0, tl.where(kept > 1, 1.0, kept))
    else:
        return kept


@triton.jit
def gate_slope(kept, HARD: tl.constexpr):
    if HARD:
        return ((kept >= 0) & (kept <= 1)).to(kept.dtype) * 0.2
    else:
        return kept * (1 - kept)


@triton.jit
def product(a, weight, row, rows, column, H, BY_ROWS: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """a[row, :] times the rows of weight that `column` names, or, unless BY_ROWS, its columns."""
    acc = tl.zeros([row.shape[0], column.shape[0]], ACC)
    for begin in range(0, H, K):
        k = begin + tl.arange(0, K)
        left = tl.load(a + row[:, None] * H + k[None, :], mask=(row < rows)[:, None] & (k < H)[None, :], other=0.0)
        at = column[None, :] * H + k[:, None] if BY_ROWS else k[:, None] * H + column[None, :]
        right = tl.load(weight + at, mask=(k < H)[:, None] & (column < H)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def load(p, mask, ACC: tl.constexpr):
    return tl.load(p, mask=mask, other=0.0).to(ACC)


@triton.jit
def store(p, value, mask):
    tl.store(p, value.to(p.dtype.element_ty), mask=mask)


@triton.jit
def block(rows, H, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(rows, units, which of the block there are) of this program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLS + tl.arange(0, COLS)
    return row, column, (row < rows)[:, None] & (column < H)[None, :]


@triton.jit(do_not_specialize=["need"])
def forward_kernel(
    given, current, bias, length, weight, h, after, inner, gates, need, rows, windows, chunks, H,
    RESET: tl.constexpr, AFTER: tl.constexpr, HARD: tl.constexpr, KEEPS: tl.constexpr, BIAS: tl.constexpr,
    LENGTH: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """RESET: r and what W_hh is multiplied by. Else the state after the step, which starts where `given` does; AFTER it
    does both. A window has this step's chunk if it has `need` chunks."""
    row, column, inside = block(rows, H, ROWS, COLS)
    at = row[:, None] * H + column[None, :]
    kept = gates + row[:, None] * (3 * H) + column[None, :]
    now = current + row[:, None] * (2 * H) + column[None, :]
    before = load(h + at, inside, ACC)
    if RESET or AFTER:
        r = product(h, weight, row, rows, column, H, True, K, ACC) + load(now, inside, ACC)
        r = gate(r, HARD)
        if KEEP:
            store(kept, r, inside)
        r = gate_value(r, HARD)
        if RESET:
            store(inner + at, r * before, inside)
    if not RESET:
        p = product(h if AFTER else inner, weight + H * H, row, rows, column, H, True, K, ACC)
        if BIAS:
            p += load(bias + 3 * H + column, column < H, ACC)[None, :]
        if AFTER:
            if KEEP:
                store(inner + at, p, inside)
            p *= r
        chunk = given + (row // windows * chunks + row % windows)[:, None] * (2 * H) + column[None, :]
        z = gate(load(chunk, inside, ACC) + load(now + H, inside, ACC), HARD)
        n = load(chunk + H, inside, ACC) + p
        if BIAS:
            n += load(bias + 2 * H + column, column < H, ACC)[None, :]
        n = tanh(n)
        share = gate_value(z, HARD)
        if KEEPS:
            share = 1 - share
        state = before + share * (n - before)
        if LENGTH:
            there = tl.load(length + row, mask=row < rows, other=0) >= need
            state = tl.where(there[:, None], state, 0.0)
        store(after + at, state, inside)
        if KEEP:
            store(kept + H, z, inside)
            store(kept + 2 * H, n, inside)


@triton.jit(do_not_specialize=["need"])
def backward_kernel(
    dh, length, weight, gates, h, inner, dr, dz, dn, dinner, dr_next, dinner_next, need, rows, H,
    RESET: tl.constexpr, LAST: tl.constexpr, AFTER: tl.constexpr, HARD: tl.constexpr, KEEPS: tl.constexpr,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """RESET: dr, from dinner of all units. Else dz, dn and dinner, from dh and, unless this is the LAST step, the part
    of it that the next step's dr makes; AFTER gives dr as well, and the next step's dinner has a part too."""
    row, column, inside = block(rows, H, ROWS, COLS)
    at = row[:, None] * H + column[None, :]
    kept = gates + row[:, None] * (3 * H) + column[None, :]
    here = inside
    if LENGTH:
        here = here & (tl.load(length + row, mask=row < rows, other=0) >= need)[:, None]
    g = load(dh + at, inside, ACC)
    if RESET:
        d = product(dinner, weight + H * H, row, rows, column, H, False, K, ACC)
        r = load(kept, here, ACC)
        store(dr + at, tl.where(here, d * load(h + at, here, ACC) * gate_slope(r, HARD), 0.0), inside)
        store(dh + at, g + d * gate_value(r, HARD), inside)
    else:
        if not LAST:
            g += product(dr_next, weight, row, rows, column, H, False, K, ACC)
            if AFTER:
                g += product(dinner_next, weight + H * H, row, rows, column, H, False, K, ACC)
        z = load(kept + H, here, ACC)
        n = load(kept + 2 * H, here, ACC)
        share = gate_value(z, HARD)
        d_z = g * (n - load(h + at, here, ACC)) * gate_slope(z, HARD)
        if KEEPS:
            share = 1 - share
            d_z = -d_z
        d_n = tl.where(here, g * share * (1 - n * n), 0.0)
        store(dh + at, g * (1 - share), inside)
        store(dz + at, tl.where(here, d_z, 0.0), inside)
        store(dn + at, d_n, inside)
        if AFTER:
            r = load(kept, here, ACC)
            store(dr + at, d_n * load(inner + at, here, ACC) * gate_slope(r, HARD), inside)
            store(dinner + at, d_n * gate_value(r, HARD), inside)


def _check(x: Tensor, weight_x: Tensor, weight_0: Tensor, weight_h: Tensor) -> None:
    hidden = weight_h.shape[-1]
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"idu: x is {x.dtype}, expected float64, float32, bfloat16 or float16")
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"idu: x has shape {tuple(x.shape)}, expected (batch, time, embedding) with a chunk at least")
    shapes = (2 * hidden, x.shape[2]), (2 * hidden, x.shape[2]), (2 * hidden, hidden)
    for name, t, shape in zip(
        ("weight_x", "weight_0", "weight_h"), (weight_x, weight_0, weight_h), shapes, strict=True
    ):
        if t.shape != shape or t.dtype != x.dtype or t.device != x.device:
            raise ValueError(
                f"idu: {name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {x.dtype} {shape} on {x.device}"
            )


def _launch(kernel: Any, arguments: tuple[Any, ...], x: Tensor, rows: int, hidden: int, **flags: bool) -> None:
    double = x.dtype == torch.float64
    columns = max(16, min(64 if x.dtype.itemsize == 2 else 32, triton.next_power_of_2(hidden)))
    sizes = {
        "ROWS": ROWS,
        "COLS": columns,
        "K": 16 if x.dtype == torch.float32 else min(columns, 32),
        "ACC": tl.float64 if double else tl.float32,
    }
    grid = triton.cdiv(rows, ROWS), triton.cdiv(hidden, columns)
    tile.Launch(kernel, grid, arguments, {**flags, **sizes, "num_warps": 4}).run(x.device)


def idu(
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    cached: Tensor | None,
    reset_after: bool,
    hard: bool,
    keeps_state: bool,
    keep: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight_x, weight_0, weight_h)
    batch, fresh, hidden = len(x), x.shape[1], weight_h.shape[1]
    for name, t, shape in (
        ("bias", bias, (4 * hidden,)),
        ("length", length, (batch if cached is None else batch * fresh,)),
        ("cached", cached, (batch, 0 if cached is None else cached.shape[1], 2 * hidden)),
    ):
        if t is not None and (t.shape != shape or t.device != x.device or (t is not length and t.dtype != x.dtype)):
            raise ValueError(f"idu: {name} is {t.dtype} {tuple(t.shape)} on {t.device}, expected {shape} on {x.device}")
    given = F.linear(x, weight_x)
    given = given if cached is None else torch.cat([cached, given], 1)
    window, windows = (fresh, 1) if cached is None else (cached.shape[1] + 1, fresh)
    rows = batch * windows
    current = F.linear(
        x[:, fresh - windows :].reshape(rows, x.shape[2]), weight_0, None if bias is None else bias[: 2 * hidden]
    )
    states = x.new_empty(window + 1 if keep else 2, rows, hidden)
    states[0] = 0
    inner = x.new_empty(window if keep else 1, rows, hidden)
    gates = x.new_empty(window if keep else 0, rows, 3 * hidden)
    flags = {"AFTER": reset_after, "HARD": hard, "KEEPS": keeps_state, "KEEP": keep}
    flags |= {"BIAS": bias is not None, "LENGTH": length is not None}
    weight = weight_h.contiguous()
    fixed = current, x if bias is None else bias.contiguous(), x if length is None else length.contiguous(), weight
    for t in range(window if rows else 0):
        own, after = (t, t + 1) if keep else (0, (t + 1) % 2)
        step = states[t if keep else t % 2], states[after], inner[own], gates[own] if keep else gates
        sizes = window - t, rows, windows, given.shape[1], hidden
        for reset in (False,) if reset_after else (True, False):
            _launch(forward_kernel, (given[:, t:], *fixed, *step, *sizes), x, rows, hidden, RESET=reset, **flags)
    h = states[window if keep else window % 2].view(batch, windows, hidden).clone()
    if not keep:
        gates, states, inner = (x.new_empty(0) for _ in range(3))
    return h, given, gates, states, inner


def idu_backward(
    dh: Tensor,
    dgiven: Tensor | None,
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    length: Tensor | None,
    reset_after: bool,
    hard: bool,
    keeps_state: bool,
    gates: Tensor,
    states: Tensor,
    inner: Tensor,
    need_dx: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(x, weight_x, weight_0, weight_h)
    batch, fresh, hidden = len(x), x.shape[1], weight_h.shape[1]
    windows, window, rows = dh.shape[1], gates.shape[0], gates.shape[1]
    if dh.shape != (batch, windows, hidden) or rows != batch * windows or states.shape != (window + 1, rows, hidden):
        raise ValueError(f"idu_backward: dh {tuple(dh.shape)} does not fit what was kept, {tuple(states.shape)}")
    cached = windows + window - 1 - fresh
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    dr, dz, dn = (x.new_empty(window, rows, hidden) for _ in range(3))
    dinner = torch.empty_like(dn) if reset_after else dn
    on_the_way = dh.to(wide, copy=True, memory_format=torch.contiguous_format)
    flags = {"AFTER": reset_after, "HARD": hard, "KEEPS": keeps_state, "LENGTH": length is not None}
    fixed = on_the_way, x if length is None else length.contiguous(), weight_h.contiguous()
    gates, states, inner = gates.contiguous(), states.contiguous(), inner.contiguous()
    for t in reversed(range(window if rows else 0)):
        later = min(t + 1, window - 1)
        step = gates[t], states[t], inner[t], dr[t], dz[t], dn[t], dinner[t], dr[later], dinner[later]
        for reset in (False,) if reset_after else (False, True):
            flags |= {"RESET": reset, "LAST": t == later}
            _launch(backward_kernel, (*fixed, *step, window - t, rows, hidden), x, rows, hidden, **flags)
    # A chunk's products serve every window that has it; a window's current chunk all of its steps.
    dall = x.new_zeros(batch, cached + fresh, 2 * hidden, dtype=wide)
    if dgiven is not None:
        dall += dgiven
    each = torch.cat([dz, dn], 2).view(window, batch, windows, 2 * hidden)
    for t in range(window):
        dall[:, t : t + windows] += each[t]
    dall = dall.to(x.dtype)
    dcached, dfresh = dall[:, :cached].contiguous(), dall[:, cached:]
    dcurrent = torch.cat([dr.sum(0), dz.sum(0)], 1)
    none = [x.new_empty(0) for _ in range(5)]
    dx, dweight_x, dweight_0, dweight_h, dbias = none
    current = x[:, fresh - windows :].reshape(rows, x.shape[2])
    if need_dx:
        dx = dfresh @ weight_x
        dx[:, fresh - windows :] += (dcurrent @ weight_0).view(batch, windows, x.shape[2])
    if need_dweight:

        def outer(d: Tensor, by: Tensor) -> Tensor:
            return d.reshape(-1, d.shape[-1]).T @ by.reshape(-1, by.shape[-1])

        before = states[:-1]
        dweight_x, dweight_0 = outer(dfresh, x), outer(dcurrent, current)
        dweight_h = torch.cat([outer(dr, before), outer(dinner, before if reset_after else inner)])
        dbias = torch.cat([dcurrent.sum(0), dn.sum((0, 1)), dinner.sum((0, 1))])
    return dx, dcached, dweight_x, dweight_0, dweight_h, dbias
