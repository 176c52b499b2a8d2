"""Information Discrimination Unit: a recurrence over a window in which the current chunk gates every step.

In this order: reference, function with its gradient, layer, fake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen._native import tracing
from pyflowgen.recurrence import STORAGE, Packed, storage_of

Reset = Literal["before", "after"]
Gate = Literal["sigmoid", "hard_sigmoid"]
Update = Literal["candidate", "state"]


def _hard_sigmoid(a: Tensor) -> Tensor:
    return (0.2 * a + 0.5).clamp(0, 1)  # Keras' slope; torch's is 1/6


# Of each option the kernel knows whether it is the second.
_RESETS, _UPDATES = ("before", "after"), ("candidate", "state")
_GATES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": _hard_sigmoid}


# ---------------------------------------------------------------------------------------------------- reference
def idu_reference(
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    bias: Tensor | None = None,
    length: Tensor | None = None,
    *,
    reset: Reset = "before",
    gate: Gate = "sigmoid",
    update: Update = "candidate",
) -> Tensor:
    """Plain PyTorch definition of :func:`idu`, with the same arguments; the current chunk's terms are computed once."""
    _check(x, weight_x, weight_0, weight_h, bias, length, reset, gate, update)
    return _windows(x, weight_x, weight_0, weight_h, bias, length, None, reset, gate, update)[0][:, 0]


def _windows(
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    cached: Tensor | None,
    reset: str,
    gate: str,
    update: str,
) -> tuple[Tensor, Tensor]:
    """h of every window, (batch, windows, H), and the products of ``weight_x``, (batch, chunks, 2H).

    Without ``cached`` x is one window; else every chunk of x ends one, which ``cached``, products of the chunks before,
    begins.
    """
    given = F.linear(x, weight_x)
    if cached is None:
        h = _recur(given, F.linear(x[:, -1], weight_0), weight_h, bias, length, reset, gate, update)
        return h[:, None], given
    given = torch.cat([cached, given], 1)
    window = cached.shape[1] + 1
    each = given.unfold(1, window, 1).movedim(3, 2).flatten(0, 1)
    current = F.linear(x, weight_0).flatten(0, 1)
    return _recur(each, current, weight_h, bias, length, reset, gate, update).view(len(x), -1, weight_h.shape[1]), given


def _recur(
    given: Tensor,
    current: Tensor,
    weight_h: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    reset: str,
    gate: str,
    update: str,
) -> Tensor:
    """The recurrence on projections: ``given`` (batch, time, 2H) for z and the candidate, ``current`` (batch, 2H)."""
    squash, hidden = _GATES[gate], weight_h.shape[1]
    zero = given.new_zeros(hidden)
    b_r, b_z, b_x, b_h = (zero,) * 4 if bias is None else bias.chunk(4)
    r_0, z_0 = (current + torch.cat([b_r, b_z])).chunk(2, 1)
    z = squash(given[..., :hidden] + z_0[:, None])  # no h in it: all steps at once
    candidate = given[..., hidden:] + b_x
    w_r, w_h = weight_h[:hidden], weight_h[hidden:]
    steps = given.shape[1]
    there = None if length is None else torch.arange(steps, device=given.device) >= steps - length[:, None]
    h = given.new_zeros(len(given), hidden)
    for t in range(steps):
        if reset == "before":
            r = squash(F.linear(h, w_r) + r_0)
            new = torch.tanh(candidate[:, t] + F.linear(r * h, w_h, b_h))
        else:
            both = F.linear(h, weight_h)
            r = squash(both[:, :hidden] + r_0)
            new = torch.tanh(candidate[:, t] + r * (both[:, hidden:] + b_h))
        share = z[:, t] if update == "candidate" else 1 - z[:, t]
        after = h + share * (new - h)
        h = after if there is None else torch.where(there[:, t, None], after, h)
    return h


# ----------------------------------------------------------------------------------------------------- function
def idu(
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    bias: Tensor | None = None,
    length: Tensor | None = None,
    *,
    reset: Reset = "before",
    gate: Gate = "sigmoid",
    update: Update = "candidate",
) -> Tensor:
    r"""Information Discrimination Unit over a window of embedded chunks; :math:`x_0` is the **last**, the current one.

    .. math::
        r_t &= \sigma(W_{hr} h_{t-1} + W_{0r} x_0 + b_r), \qquad z_t = \sigma(W_{xz} x_t + W_{0z} x_0 + b_z) \\
        \tilde h_t &= \tanh(W_{xh} x_t + b_x + W_{hh} (r_t \odot h_{t-1}) + b_h), \qquad
        h_t = (1 - z_t) \odot h_{t-1} + z_t \odot \tilde h_t

    from :math:`h = 0`. The authors' code has no biases and a hard sigmoid, :math:`\mathrm{clip}(0.2a + 0.5, 0, 1)`.
    Its public re-implementations reset after the product, :math:`r_t \odot (W_{hh} h_{t-1} + b_h)`, and let z keep
    the old state, :math:`h_t = (1 - z_t) \odot \tilde h_t + z_t \odot h_{t-1}`: ``reset="after"``, ``update="state"``.

    Args:
        x: ``(batch, time, E)`` embedded chunks in order of time.
        weight_x: rows of :math:`W_{xz}` and :math:`W_{xh}`, ``(2H, E)``.
        weight_0: rows of :math:`W_{0r}` and :math:`W_{0z}`, ``(2H, E)``.
        weight_h: rows of :math:`W_{hr}` and :math:`W_{hh}`, ``(2H, H)``.
        bias: :math:`b_r, b_z, b_x, b_h`, ``(4H,)``, or None.
        length: ``(batch,)`` integers: how many chunks of a window there are, its last ones; None for all.
        reset: ``"before"`` or ``"after"`` the product with :math:`W_{hh}`.
        gate: ``"sigmoid"`` or ``"hard_sigmoid"``.
        update: what z lets in: the ``"candidate"``, or the old ``"state"``.

    Returns:
        h after the current chunk, ``(batch, H)``.

    Raises:
        ValueError: shapes that do not fit, unknown options.
        TypeError: an argument that is no tensor, dtypes that differ (outside autocast), lengths that are no integers.

    float32 and float64 run the kernel on the CPU, 16 bits plain PyTorch there; a GPU has a Triton kernel for all four.
    Under autocast it is plain PyTorch everywhere.

    Reference: Eun et al., *Learning to Discriminate Information for Online Action Detection*, 2020.

    Example:
        >>> import torch, pyflowgen
        >>> x, w_x, w_0, w_h = torch.randn(5, 16, 3), torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 4)
        >>> pyflowgen.idu(x, w_x, w_0, w_h).shape
        torch.Size([5, 4])
    """
    args = x, weight_x, weight_0, weight_h, bias, length
    if not _use_kernel(*args[:5]):
        return idu_reference(*args, reset=reset, gate=gate, update=update)
    try:
        return _run(*args, None, reset, gate, update)[0][:, 0]
    except (AttributeError, IndexError, RuntimeError):  # the operator checks everything; this finds the words
        _check(*args, reset, gate, update)
        raise


def _use_kernel(x: Tensor, *weights: Tensor | None) -> bool:
    return (
        isinstance(x, Tensor)
        and (x.dtype is torch.float32 or x.dtype is torch.float64 or x.device.type != "cpu")
        and _native.use_kernel("idu", x)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _run(
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    cached: Tensor | None,
    reset: str,
    gate: str,
    update: str,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`_windows` by the kernel."""
    if length is not None and length.dtype is not torch.int64:
        _check(x, weight_x, weight_0, weight_h, bias, length, reset, gate, update)
        length = length.long()
    elif reset not in _RESETS or gate not in _GATES or update not in _UPDATES:
        _check(x, weight_x, weight_0, weight_h, bias, length, reset, gate, update)
    how = reset == "after", gate == "hard_sigmoid", update == "state"
    tensors = x, weight_x, weight_0, weight_h, bias, length, cached
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _apply(how, *tensors)
    h, given, *_ = torch.ops.pyflowgen.idu.default(*tensors, *how, False, packed)
    return h, given


class _IDU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, how, *tensors):  # type: ignore[no-untyped-def]
        h, given, *kept = torch.ops.pyflowgen.idu.default(*tensors, *how, True)
        ctx.save_for_backward(*tensors, *kept)
        ctx.how = how
        ctx.set_materialize_grads(False)
        return h, given

    @staticmethod
    def backward(ctx, dh, dgiven):  # type: ignore[no-untyped-def]
        *tensors, gates, states, inner = ctx.saved_tensors
        x, weight_x, weight_0, weight_h, bias, length, cached = tensors
        need = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            after, hard, keeps = ctx.how
            reset, gate, update = _RESETS[after], tuple(_GATES)[hard], _UPDATES[keeps]
            results = _windows(x, weight_x, weight_0, weight_h, bias, length, cached, reset, gate, update)
            inputs = [t for t, n in zip(tensors, need, strict=True) if n]
            pairs = [(o, g) for o, g in zip(results, (dh, dgiven), strict=True) if g is not None]
            outputs, grads = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(outputs, inputs, grads, create_graph=True, allow_unused=True))
            return None, *(next(found) if n else None for n in need)
        if dh is None:
            dh = x.new_zeros(len(x), 1 if cached is None else x.shape[1], weight_h.shape[1])
        dx, dcached, dweight_x, dweight_0, dweight_h, dbias = torch.ops.pyflowgen.idu_backward.default(
            dh, dgiven, x, weight_x, weight_0, weight_h, length, *ctx.how, gates, states, inner, need[0], any(need[1:5])
        )
        grads = dx, dweight_x, dweight_0, dweight_h, dbias, None, dcached
        return None, *(g if n else None for g, n in zip(grads, need, strict=True))


_apply = _native.applier(_IDU)


def _check(
    x: Tensor,
    weight_x: Tensor,
    weight_0: Tensor,
    weight_h: Tensor,
    bias: Tensor | None,
    length: Tensor | None,
    reset: str,
    gate: str,
    update: str,
) -> None:
    for name, given in (("x", x), ("weight_x", weight_x), ("weight_0", weight_0), ("weight_h", weight_h)):
        if not isinstance(given, Tensor):
            raise TypeError(f"idu: {name} must be a tensor, got {type(given).__name__}")
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"idu: x has shape {tuple(x.shape)}, expected (batch, time, embedding) with a chunk at least")
    hidden = weight_h.shape[-1] if weight_h.dim() else 0
    expected: dict[str, tuple[int, ...]] = {"weight_x": (2 * hidden, x.shape[2]), "weight_0": (2 * hidden, x.shape[2])}
    expected |= {"weight_h": (2 * hidden, hidden), "bias": (4 * hidden,), "length": (len(x),)}
    for name, value in zip(expected, (weight_x, weight_0, weight_h, bias, length), strict=True):
        if value is not None and value.shape != expected[name]:
            raise ValueError(f"idu: {name} has shape {tuple(value.shape)}, expected {expected[name]}")
        if value is None or name == "length" or torch.is_autocast_enabled(x.device.type):
            continue
        if value.dtype != x.dtype:
            raise TypeError(f"idu: {name} is {value.dtype}, expected x's {x.dtype}")
    if length is not None and (length.is_floating_point() or length.is_complex()):
        raise TypeError(f"idu: length is {length.dtype}, expected integers")
    for name, chosen, known in (("reset", reset, _RESETS), ("gate", gate, tuple(_GATES)), ("update", update, _UPDATES)):
        if chosen not in known:
            raise ValueError(f"idu: {name} is {chosen!r}, expected one of {', '.join(known)}")


# -------------------------------------------------------------------------------------------------------- layer
class _Panels(Packed):
    """weight_x, weight_0 and weight_h, packed."""

    def _make(self, op: str, w: Tensor, v: Tensor, b: Tensor | None, d: Tensor | None) -> Tensor:
        assert b is not None
        return torch.ops.pyflowgen.idu_pack.default(w, v, b)


class _Short(Packed):
    """The same, and the gates' biases, as short as a stream's step reads them."""

    def _make(self, op: str, w: Tensor, v: Tensor, b: Tensor | None, d: Tensor | None) -> Tensor:
        assert b is not None
        if self.dtype is torch.int8 and not b.isfinite().all():
            raise ValueError(f"{op}: a weight is not finite, which int8 cannot hold")
        return torch.ops.pyflowgen.idu_step_pack.default(w, v, b, d, STORAGE[self.dtype])


class IDU(nn.Module):
    """:func:`idu` with its weights: over one window, at every frame of a clip, and frame by frame.

    Every new chunk is the current one for the whole window, so a stream runs its window again at each frame; what each
    chunk adds by itself, :math:`W_{xz} x_t` and :math:`W_{xh} x_t`, is kept from frame to frame. Without gradients the
    weights are packed once, and anew when their version counter or memory changes.

    Args:
        embedding: E.
        hidden: H.
        window: chunks in a window, of which the last is the current one.
        bias, reset, gate, update: see :func:`idu`; the defaults are the paper's.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.IDU(3, 4, window=5)
        >>> x = torch.randn(2, 9, 3)
        >>> all_frames, _ = layer.frames(x)
        >>> torch.allclose(all_frames[:, -1], layer(x[:, -5:]), atol=1e-6)
        True
        >>> cache = layer.pack(torch.bfloat16).init_cache(2)
        >>> for t in range(9):  # a stream, on weights half as long
        ...     h, cache = layer.step(x[:, t], cache)
        >>> torch.allclose(all_frames[:, -1], h, atol=1e-2)
        True
    """

    def __init__(
        self,
        embedding: int,
        hidden: int,
        window: int = 16,
        *,
        bias: bool = False,
        reset: Reset = "before",
        gate: Gate = "sigmoid",
        update: Update = "candidate",
    ) -> None:
        super().__init__()
        if min(embedding, hidden, window) < 1:
            raise ValueError(f"IDU: embedding={embedding}, hidden={hidden}, window={window}, expected at least 1")
        self.embedding, self.hidden, self.window = embedding, hidden, window
        self.reset: Reset = reset
        self.gate: Gate = gate
        self.update: Update = update
        self.weight_x = nn.Parameter(torch.empty(2 * hidden, embedding))
        self.weight_0 = nn.Parameter(torch.empty(2 * hidden, embedding))
        self.weight_h = nn.Parameter(torch.empty(2 * hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(4 * hidden)) if bias else None
        for weight in (self.weight_x, self.weight_0, self.weight_h):
            for rows in weight.detach().chunk(2):
                nn.init.orthogonal_(rows)
        self._packed, self._short = _Panels(), _Short()

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """h of the last chunk of each window, ``(batch, H)``."""
        weights = self.weight_x, self.weight_0, self.weight_h, self.bias
        if not _use_kernel(x):
            return idu(x, *weights, length, reset=self.reset, gate=self.gate, update=self.update)
        try:
            return _run(x, *weights, length, None, self.reset, self.gate, self.update, self._panels(x))[0][:, 0]
        except (IndexError, RuntimeError):
            _check(x, *weights, length, self.reset, self.gate, self.update)
            raise

    def _panels(self, x: Tensor) -> Tensor | None:
        """The packed weights, where they are the same from call to call."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
            return None
        p = self._parameters
        return self._packed.get("idu", p["weight_x"], p["weight_0"], p["weight_h"], None)  # type: ignore[arg-type]

    def init_cache(self, batch: int) -> tuple[Tensor, Tensor]:
        """Before the first frame: projections of the last ``window - 1`` chunks, and how many there are."""
        kept = self.weight_x.new_zeros(batch, self.window - 1, 2 * self.hidden)
        return kept, torch.zeros(batch, dtype=torch.long, device=kept.device)

    def frames(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h of every frame with its own window, ``(batch, frames, H)``, and the cache for the frames that follow.

        A window that begins before its stream does has only the chunks that there are.
        """
        if x.dim() != 3 or x.shape[2] != self.embedding:
            raise ValueError(f"IDU: x has shape {tuple(x.shape)}, expected (batch, frames, {self.embedding})")
        kept, seen = self._cache(len(x), cache)
        batch, count = x.shape[:2]
        if not count:
            return x.new_zeros(batch, 0, self.hidden), (kept, seen)
        if count == 1:
            length = seen = (seen + 1).clamp_(max=self.window)
        else:
            many = (seen[:, None] + torch.arange(1, count + 1, device=x.device)).clamp_(max=self.window)
            length, seen = many.flatten(), many[:, -1]
        p = self._parameters
        arguments = x, p["weight_x"], p["weight_0"], p["weight_h"], self.bias, length, kept
        options = self.reset, self.gate, self.update
        if _use_kernel(x):
            h, given = _run(*arguments, *options, self._panels(x))  # type: ignore[arg-type]
        else:
            h, given = _windows(*arguments, *options)  # type: ignore[arg-type]
        return h, (given[:, count:], seen)

    def pack(self, dtype: torch.dtype | None = None) -> IDU:
        """Hold the weights that :meth:`step` reads in ``dtype``: None (their own), bfloat16 or int8. Returns self.

        The state, all sums and what is kept of the chunks stay float32. int8 has a scale for each row of each weight,
        and turns what is multiplied into 8 bits with a scale for each step.
        """
        self._short = _Short(storage_of(dtype, self.weight_h))
        return self

    def step(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """h of the next chunk ``(batch, E)`` of streams, ``(batch, H)``, and the cache for the one after.

        :meth:`frames` of it alone, without gradients, on weights packed once (see :meth:`pack`).
        """
        if x.dim() != 2 or x.shape[1] != self.embedding:
            raise ValueError(f"IDU: x has shape {tuple(x.shape)}, expected (batch, {self.embedding})")
        p = self._parameters
        short = None
        if self._short.dtype is not None and _use_kernel(x) and not tracing():
            short = self._short.get("idu", p["weight_x"], p["weight_0"], p["weight_h"], self.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            if short is None:
                h, cache = self.frames(x[:, None], cache)
                return h[:, 0], cache
            kept, seen = self._cache(len(x), cache)
            length = (seen + 1).clamp_(max=self.window)
            how = self.reset == "after", self.gate == "hard_sigmoid", self.update == "state"
            h, given = torch.ops.pyflowgen.idu_step.default(x, kept, length, short, self.bias, *how)
            return h, (given[:, 1:], length)

    def _cache(self, batch: int, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        kept, seen = self.init_cache(batch) if cache is None else cache
        shape = batch, self.window - 1, 2 * self.hidden
        if kept.shape != shape or seen.shape != shape[:1]:
            raise ValueError(
                f"IDU: cache has shapes {tuple(kept.shape)} and {tuple(seen.shape)}, expected {shape} and ({batch},) "
                "as init_cache gives it"
            )
        return kept, seen

    def extra_repr(self) -> str:
        return (
            f"{self.embedding}, {self.hidden}, window={self.window}, bias={self.bias is not None}, "
            f"reset={self.reset!r}, gate={self.gate!r}, update={self.update!r}"
        )


# -------------------------------------------------------------------------------------------------------- fake
def _fake(x, weight_x, weight_0, weight_h, bias, length, cached, after, hard, keeps, keep, packed=None):  # type: ignore[no-untyped-def]
    _check(x, weight_x, weight_0, weight_h, bias, None, "before", "sigmoid", "candidate")
    (batch, fresh, _), hidden = x.shape, weight_h.shape[1]
    earlier = 0 if cached is None else cached.shape[1]
    windows, window = (1, fresh) if cached is None else (fresh, earlier + 1)
    h, given = x.new_empty(batch, windows, hidden), x.new_empty(batch, earlier + fresh, 2 * hidden)
    if not keep:
        return h, given, x.new_empty(0), x.new_empty(0), x.new_empty(0)
    rows = batch * windows
    shapes = (window, rows, 3 * hidden), (window + 1, rows, hidden), (window, rows, hidden)
    return h, given, *(x.new_empty(shape) for shape in shapes)


def _fake_backward(dh, dgiven, x, w_x, w_0, w_h, length, after, hard, keeps, gates, states, inner, *need):  # type: ignore[no-untyped-def]
    hidden, cached = w_h.shape[1], dh.shape[1] + gates.shape[0] - 1 - x.shape[1]
    weights = (w_x.shape, w_0.shape, w_h.shape, (4 * hidden,)) if need[1] else ((0,),) * 4
    shapes = x.shape if need[0] else (0,), (len(x), cached, 2 * hidden), *weights
    return tuple(x.new_empty(shape) for shape in shapes)


def _fake_step(x, cached, length, packed, bias, after, hard, keeps):  # type: ignore[no-untyped-def]
    batch, earlier, width = cached.shape
    return x.new_empty(batch, width // 2), x.new_empty(batch, earlier + 1, width)


_native.register("idu", _fake)
_native.register("idu_step", _fake_step)
_native.register("idu_backward", _fake_backward)
_native.find_kernels("idu_pack")
