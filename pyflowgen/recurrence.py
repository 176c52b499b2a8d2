"""What the recurrent layers share: checks, unrolling in time, gradients, packed weights, and torch's interface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from pyflowgen import _native

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]

Tensors = tuple[Tensor, ...]

# op -> (gates, its states' names, its reference); `register` fills it.
_CELLS: dict[str, tuple[int, tuple[str, ...], Callable[..., Tensors]]] = {}
# op -> its step from x's and h's part of the gates' arguments and the state, in plain PyTorch.
_STEPS: dict[str, Callable[..., Tensors]] = {}
# The `storage` argument of the packing operators.
STORAGE = {None: 0, torch.bfloat16: 1, torch.int8: 2}


def check(
    op: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    batch_sizes: Tensor | None,
    one: bool = False,
) -> None:
    """Raise one readable error for arguments of a sequence, or of ``one`` step, that do not fit."""
    gates, names, _ = _CELLS[op]
    states = dict(zip(names, state, strict=True))
    named = {"x": x, **states, **dict(zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), weights, strict=True))}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name.startswith("bias")):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    if weight_hh.dim() != 2 or weight_hh.shape[0] != gates * weight_hh.shape[1]:
        raise ValueError(f"weight_hh has shape {tuple(weight_hh.shape)}, expected ({gates} * hidden, hidden)")
    rows, hidden = weight_hh.shape
    if weight_ih.dim() != 2 or weight_ih.shape[0] != rows:
        raise ValueError(f"weight_ih has shape {tuple(weight_ih.shape)}, expected ({rows}, in) beside weight_hh")
    for name, bias in (("bias_ih", bias_ih), ("bias_hh", bias_hh)):
        if bias is not None and bias.shape != weight_hh.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(bias.shape)}, expected ({rows},)")
    batch = state[0].shape[0] if state[0].dim() else 0
    for name, tensor in states.items():
        if tensor.dim() != 2 or tensor.shape[0] != batch or tensor.shape[1] != hidden:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (batch, {hidden})")
    features = weight_ih.shape[1]
    if one:
        if x.dim() != 2 or x.shape[0] != batch or x.shape[1] != features:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected ({batch}, {features})")
    elif batch_sizes is None:
        if x.dim() != 3 or x.shape[1] != batch or x.shape[2] != features:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (time, {batch}, {features})")
    elif batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64:
        raise ValueError(
            f"batch_sizes is {batch_sizes.dtype} of shape {tuple(batch_sizes.shape)}, expected int64 of (time,)"
        )
    elif x.dim() != 2 or x.shape[1] != features:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (rows, {features}) with batch_sizes")
    if torch.is_autocast_enabled(x.device.type):
        return
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, expected x's {x.dtype}")


def _sizes(x: Tensor, batch: int, batch_sizes: Tensor | None) -> list[int]:
    """How many sequences have step t."""
    if batch_sizes is None:
        return [batch] * x.shape[0]
    sizes: list[int] = batch_sizes.tolist()
    if any(n > m or n < 0 for n, m in zip(sizes, [batch, *sizes], strict=False)) or sum(sizes) != x.shape[0]:
        raise ValueError(
            f"batch_sizes is {sizes[:8]}, expected at most {batch}, no growth, and a sum of {x.shape[0]}, x's rows"
        )
    return sizes


def unroll(
    op: str,
    step: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    batch_sizes: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """``state = step(x_t W^T + b, *state)`` over time: all hidden states, and the last state."""
    check(op, x, state, weights, batch_sizes)
    batch = state[0].shape[0]
    sizes = _sizes(x, batch, batch_sizes)
    x = F.linear(x, weights[0], weights[2])
    pieces = x.unbind(0) if batch_sizes is None else x.split(sizes)
    hidden = [x] * len(sizes)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        n = sizes[t]
        new = step(pieces[t], *(s[:n] for s in state))
        hidden[t] = new[0]
        state = new if n == batch else tuple(torch.cat([a, s[n:]]) for a, s in zip(new, state, strict=True))
    if not hidden:
        return (x.new_empty((*x.shape[:-1], state[0].shape[1])), *state)
    return (torch.stack(hidden) if batch_sizes is None else torch.cat(hidden), *state)


def use_kernel(op: str, x: Tensor) -> bool:
    return (
        isinstance(x, Tensor)
        and _native.use_kernel(op, x)
        and (x.dtype is torch.float32 or x.dtype is torch.float64 or not packs(op, x))
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


def use_gates(op: str, x: Tensor) -> bool:
    """Whether a step's gates are one kernel, as Triton has it for GPUs, between torch's products."""
    return (
        isinstance(x, Tensor) and _native.use_kernel(f"{op}_gates", x) and not torch.is_autocast_enabled(x.device.type)
    )


def one_step(op: str, x: Tensor, state: Tensors, weights: Weights) -> Tensors:
    """The state after one step for x (batch, in), by the kernel of the gates."""
    check(op, x, state, weights, None, one=True)
    return _gates(op, F.linear(x, weights[0], weights[2]), state, weights)


def stepwise(
    op: str, x: Tensor, state: Tensors, weights: Weights, batch_sizes: Tensor | None, reverse: bool
) -> Tensors:
    """The sequence step by step, where a GPU has the kernel of the gates alone."""
    return unroll(op, lambda a, *s: _gates(op, a, s, weights), x, state, weights, batch_sizes, reverse)


def _gates(op: str, a: Tensor, state: Tensors, weights: Weights) -> Tensors:
    return _Gates.apply(op, a, F.linear(state[0], weights[1], weights[3]), *state)  # type: ignore[no-untyped-call]


class _Gates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, a, b, *state):  # type: ignore[no-untyped-def]
        used = state[1:] if len(state) > 1 else state  # of an LSTM's state the cell alone is more than a factor
        *new, kept = getattr(torch.ops.pyflowgen, f"{op}_gates").default(a, b, *used)
        ctx.save_for_backward(a, b, *state, *new, kept)
        ctx.op, ctx.states = op, len(state)
        return tuple(new)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        n = ctx.states
        a, b, *rest, kept = ctx.saved_tensors
        state, new = rest[:n], rest[n:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (a, b, *state)]
            found = torch.autograd.grad(
                _STEPS[ctx.op](*inputs), inputs, grads, create_graph=True, allow_unused=True, materialize_grads=True
            )
            return None, *found
        backward = getattr(torch.ops.pyflowgen, f"{ctx.op}_gates_backward").default
        if n > 1:
            da, dc = backward(*grads, state[1], new[1], kept)
            return None, da, da, None, dc
        return None, *backward(*grads, b, *state, kept)


def packs(op: str, x: Tensor) -> bool:
    """Whether x's device has the kernels on packed weights: the CPU, whose others know no 16-bit dtypes."""
    return _native.has_kernel_for(f"{op}_pack", x)


def sequence(
    op: str,
    x: Tensor,
    state: tuple[Tensor, ...],
    weights: Weights,
    batch_sizes: Tensor | None,
    reverse: bool,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """All hidden states and the last state, by the kernel."""
    try:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *state, *weights)):
            return _Sequence.apply(op, batch_sizes, reverse, packed, x, *state, *weights)  # type: ignore[no-untyped-call]
        return getattr(torch.ops.pyflowgen, op).default(x, *state, *weights, batch_sizes, reverse, packed)
    except (AttributeError, IndexError, RuntimeError):  # the operator checks everything; this finds the words
        check(op, x, state, weights, batch_sizes)
        _sizes(x, state[0].shape[0], batch_sizes)
        raise


class _Sequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, batch_sizes, reverse, packed, *tensors):  # type: ignore[no-untyped-def]
        keep = getattr(torch.ops.pyflowgen, f"{op}_keep").default
        *outputs, gates, extra = keep(*tensors, batch_sizes, reverse, packed)
        ctx.save_for_backward(batch_sizes, outputs[0], gates, extra, *tensors)
        ctx.op, ctx.reverse = op, reverse
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        batch_sizes, y, gates, extra, *tensors = ctx.saved_tensors
        need = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            inputs = [t for t, n in zip(tensors, need, strict=True) if n]
            outputs = _CELLS[ctx.op][2](*tensors, batch_sizes, ctx.reverse)
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
            ends, starts = [o for o, _ in pairs], [g for _, g in pairs]
            some = torch.autograd.grad(ends, inputs, starts, create_graph=True, allow_unused=True) if pairs else ()
            found = iter(some or [None] * len(inputs))
            return None, None, None, None, *(next(found) if n else None for n in need)
        backward = getattr(torch.ops.pyflowgen, f"{ctx.op}_backward").default
        all_grads = backward(
            *grads, *tensors[:-2], batch_sizes, ctx.reverse, y, gates, extra, need[0], any(need[-4:])
        )  # fmt: skip
        return None, None, None, None, *(g if n else None for g, n in zip(all_grads, need, strict=True))


def register(
    op: str, gates: int, states: tuple[str, ...], reference: Callable[..., Tensors], step: Callable[..., Tensors]
) -> None:
    """Give the operators of ``op`` their fakes, and the gradients their references."""
    _CELLS[op], _STEPS[op] = (gates, states, reference), step
    n = len(states)

    def fake(x, *rest, packed=None):  # type: ignore[no-untyped-def]
        check(op, x, rest[:n], rest[n : n + 4], rest[n + 4])
        return x.new_empty((*x.shape[:-1], rest[0].shape[1])), *(x.new_empty(s.shape) for s in rest[:n])

    def fake_keep(x, h, *rest, packed=None):  # type: ignore[no-untyped-def]
        rows, hidden = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1], h.shape[1]
        kept = x.new_empty((rows, gates * hidden)), x.new_empty((rows, hidden))
        return *fake(x, h, *rest), *kept  # type: ignore[no-untyped-call]

    def fake_backward(*args):  # type: ignore[no-untyped-def]
        x, *state, w, u = args[n + 1 : 2 * n + 4]
        need_dx, need_dweight = args[-2:]
        weights = (w.shape, u.shape, w.shape[:1], w.shape[:1]) if need_dweight else ((0,),) * 4
        shapes = x.shape if need_dx else (0,), *(s.shape for s in state), *weights
        return tuple(x.new_empty(shape) for shape in shapes)

    def fake_step(x, *rest):  # type: ignore[no-untyped-def]
        new = tuple(x.new_empty(s.shape) for s in rest[:-1])
        return new if n > 1 else new[0]

    def fake_gates(a, b, state):  # type: ignore[no-untyped-def]
        return *(torch.empty_like(state) for _ in range(n)), torch.empty_like(a)

    def fake_gates_backward(*args):  # type: ignore[no-untyped-def]
        *_, kept = args
        given = torch.empty_like(kept), torch.empty_like(args[0])
        return given if n > 1 else (torch.empty_like(kept), *given)

    fakes: dict[str, Callable[..., Any]]
    fakes = {"": fake, "_keep": fake_keep, "_backward": fake_backward, "_step": fake_step}
    for suffix, function in (fakes | {"_gates": fake_gates, "_gates_backward": fake_gates_backward}).items():
        _native.register(op + suffix, function)
    _native.find_kernels(f"{op}_pack")


class Packed:
    """Weights of one layer and direction as its kernels read them, made anew when a weight has changed.

    Noticed are other tensors, other memory, and the version counter, which in-place writes and optimizers raise. Copies
    of a module and its files on disk hold no packed weights.
    """

    __slots__ = ("dtype", "_packed", "_seen", "_versions")

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._packed: Tensor | None = None
        self._seen: Weights = (torch.empty(0), torch.empty(0), None, None)
        self._versions: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type[Packed], tuple[torch.dtype | None]]:
        return type(self), (self.dtype,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return type(self)(self.dtype)

    def get(self, op: str, w: Tensor, v: Tensor, b: Tensor | None, d: Tensor | None) -> Tensor | None:
        """The packed weights, or None where no kernel takes them."""
        try:
            versions: tuple[int, ...] = (w._version, v._version, w.data_ptr(), v.data_ptr())
            if b is not None:
                versions += (b._version, b.data_ptr())
            if d is not None:
                versions += (d._version, d.data_ptr())
        except RuntimeError:  # inference tensors have no version
            versions = ()
        seen = self._seen
        if versions == self._versions and seen[0] is w and seen[1] is v and seen[2] is b and seen[3] is d and versions:
            return self._packed
        if not (use_kernel(op, w) and packs(op, w)):
            return None
        if self.dtype is torch.int8 and not (w.isfinite().all() and v.isfinite().all()):
            raise ValueError(f"{op}: a weight is not finite, which int8 cannot hold")
        with torch.no_grad():
            packed = self._make(op, w, v, b, d)
        self._packed, self._seen, self._versions = packed, (w, v, b, d), versions
        return packed

    def _make(self, op: str, w: Tensor, v: Tensor, b: Tensor | None, d: Tensor | None) -> Tensor:
        make = getattr(torch.ops.pyflowgen, f"{op}_pack")
        return make(w, v, b, d, STORAGE[self.dtype])


def storage_of(dtype: torch.dtype | None, weight: Tensor) -> torch.dtype | None:
    """The dtype as :class:`Packed` takes it."""
    if dtype is weight.dtype:
        return None
    if dtype not in STORAGE or (dtype is not None and weight.dtype is not torch.float32):
        raise ValueError(
            f"dtype is {dtype} for {weight.dtype} weights, expected None, or torch.bfloat16 or torch.int8 for float32"
        )
    return dtype


# Of that many rows the kernel for GPUs, which uses no tensor cores, is bound by arithmetic: cuDNN's turn. Not measured.
_CUDNN_BATCH = 32


class SequenceLayer(nn.RNNBase):
    """Layers and directions, packed sequences, batch first: torch's interface around one layer and one direction."""

    _op: str
    _states: int
    _packs: list[Packed]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        """What the layer has beyond torch's."""
        self._packs = [Packed() for _ in range(self.num_layers * (2 if self.bidirectional else 1))]

    def _weights(self, index: int) -> Weights:
        """Those of layer and direction ``index``."""
        if self.bias:
            return tuple(self._flat_weights[4 * index : 4 * index + 4])  # type: ignore[return-value]
        return (*self._flat_weights[2 * index : 2 * index + 2], None, None)  # type: ignore[return-value]

    def _torch_is_faster(self, x: Tensor) -> bool:
        """Whether to leave sequences of one length to torch's own kernel."""
        return x.is_cuda and x.dim() == 3 and x.shape[0 if self.batch_first else 1] > _CUDNN_BATCH

    def forward(self, input, hx=None):  # type: ignore[no-untyped-def]
        data = input.data if isinstance(input, PackedSequence) else input
        if (
            self.proj_size
            or not use_kernel(self._op, data)
            or (data is input and not torch.compiler.is_compiling() and self._torch_is_faster(input))
        ):
            return super().forward(input, hx)
        self._update_flat_weights()
        sizes = sorted_indices = unsorted_indices = None
        batched = True
        if isinstance(input, PackedSequence):
            x, sizes, sorted_indices, unsorted_indices = input
            batch = int(sizes[0])
        else:
            if input.dim() not in (2, 3):
                raise ValueError(f"{type(self).__name__}: input has {input.dim()} dimensions, expected 2 or 3")
            batched = input.dim() == 3
            x = input if batched else input.unsqueeze(0 if self.batch_first else 1)
            if self.batch_first:
                x = x.transpose(0, 1)
            batch = x.shape[1]
        directions = 2 if self.bidirectional else 1
        if hx is None:
            state = [x.new_zeros(self.num_layers * directions, batch, self.hidden_size)] * self._states
        else:
            state = list(hx) if self._states > 1 else [hx]
            if not batched:
                for s in state:
                    if s.dim() != 2:
                        raise RuntimeError(f"For unbatched 2-D input, hx should be 2-D but got {s.dim()}-D tensor")
                state = [s.unsqueeze(1) for s in state]
            if sorted_indices is not None:
                state = [s.index_select(1, sorted_indices) for s in state]
        given = x.transpose(0, 1) if self.batch_first and sizes is None else x
        self.check_forward_args(given, self._hidden(state), sizes)
        if x.shape[0] == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        last: list[list[Tensor]] = [[] for _ in state]
        for layer in range(self.num_layers):
            outputs = []
            for direction in range(directions):
                i = layer * directions + direction
                weights = self._weights(i)
                packed = None  # in training weights change from call to call: only what is needed is packed, on the way
                if not torch.is_grad_enabled() and not torch.compiler.is_compiling() and self._packs[i].dtype is None:
                    packed = self._packs[i].get(self._op, *weights)
                y, *new = sequence(self._op, x, tuple(s[i] for s in state), weights, sizes, direction == 1, packed)
                outputs.append(y)
                for states, s in zip(last, new, strict=True):
                    states.append(s)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = F.dropout(x, self.dropout)
        state = [s[0].unsqueeze(0) if len(s) == 1 else torch.stack(s) for s in last]
        if sizes is not None:
            output = PackedSequence(x, sizes, sorted_indices, unsorted_indices)
            if unsorted_indices is not None:
                state = [s.index_select(1, unsorted_indices) for s in state]
            return output, self._hidden(state)
        if self.batch_first:
            x = x.transpose(0, 1)
        if not batched:
            x, state = x.squeeze(0 if self.batch_first else 1), [s.squeeze(1) for s in state]
        return x, self._hidden(state)

    def _hidden(self, state: list[Tensor]) -> Any:
        return tuple(state) if self._states > 1 else state[0]

    def pack(self, dtype: torch.dtype | None = None) -> Any:
        """Hold the weights that :meth:`step` reads in ``dtype``: None (their own), bfloat16 or int8. Returns self."""
        dtype = storage_of(dtype, self._weights(0)[0])
        self._packs = [Packed(dtype) for _ in self._packs]
        return self

    def init_state(self, batch: int) -> Any:
        """Zeros, as the state of ``batch`` streams before their first step."""
        weight = self._weights(0)[0]
        shape = self.num_layers * (2 if self.bidirectional else 1), batch, self.hidden_size
        return self._hidden([weight.new_zeros(shape) for _ in range(self._states)])

    def step(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The next step of streams ``x`` (batch, input_size): the output (batch, hidden_size) and the new state.

        Without a state, the first one. Equals the next step of :meth:`forward` up to rounding, without dropout and
        without gradients, on weights that are packed once (see :meth:`pack`).
        """
        if self.bidirectional or self.proj_size:
            raise ValueError(f"{type(self).__name__}.step: needs one direction and no projection")
        if state is None:
            state = self.init_state(len(x) if x.dim() else 0)
        parts = state if self._states > 1 else (state,)
        self._check_step(x, parts)
        new = []
        for layer, packed in enumerate(self._packs):
            weights = self._weights(layer)
            panels = packed.get(self._op, *weights)
            before = tuple(s[layer] for s in parts)
            if use_gates(self._op, x):
                with torch.no_grad():
                    after = one_step(self._op, x, before, weights)
            elif panels is None or _native._reference_only:
                with torch.no_grad():
                    after = _CELLS[self._op][2](x[None], *before, *weights)[1:]
            else:
                try:
                    after = getattr(torch.ops.pyflowgen, f"{self._op}_step").default(x, *before, panels)
                except RuntimeError:  # the operator checks everything; this finds the words
                    check(self._op, x, before, weights, None, one=True)
                    raise
                after = after if self._states > 1 else (after,)
            x = after[0]
            new.append(after)
        return x, self._hidden([s[0].unsqueeze(0) if len(s) == 1 else torch.stack(s) for s in zip(*new, strict=True)])

    def _check_step(self, x: Tensor, parts: Any) -> None:
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (batch, {self.input_size})")
        shape = self.num_layers, len(x), self.hidden_size
        if len(parts) != self._states or any(s.shape != shape for s in parts):
            given = " and ".join(str(tuple(s.shape)) for s in parts)
            raise ValueError(
                f"{type(self).__name__}.step: state has shape {given}, expected {self._states} of {shape}, "
                f"as init_state gives it, for x of shape {tuple(x.shape)}"
            )


class CellLayer(nn.RNNCellBase):
    """torch's interface of one step, and the streaming one."""

    _op: str
    _states: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepare()

    def _prepare(self) -> None:
        """What the cell has beyond torch's."""
        self._pack = Packed()

    def forward(self, input, hx=None):  # type: ignore[no-untyped-def]
        batched, gates = input.dim() == 2, use_gates(self._op, input)
        if not (gates or use_kernel(self._op, input)) or not (batched or input.dim() == 1):
            return super().forward(input, hx)
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            state = [x.new_zeros(x.shape[0], self.hidden_size)] * self._states
            if torch.compiler.is_compiling():  # which takes no tensor twice
                state = [s.clone() for s in state]
        else:
            state = list(hx) if self._states > 1 else [hx]
            if any(s.dim() not in (1, 2) for s in state):
                return super().forward(input, hx)  # which raises
            if not batched:
                state = [s.unsqueeze(0) for s in state]
        p = self._parameters
        weights: Weights = (p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"])  # type: ignore[assignment]
        packed = None
        if not (gates or torch.compiler.is_compiling()) and self._pack.dtype is None:
            packed = self._pack.get(self._op, *weights)
        try:
            if gates:
                new = one_step(self._op, x, tuple(state), weights)
            elif packed is None or (
                torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *state, *weights))
            ):
                new = sequence(self._op, x.unsqueeze(0), tuple(state), weights, None, False, packed)[1:]
            else:
                found = getattr(torch.ops.pyflowgen, f"{self._op}_step").default(x, *state, packed)
                new = found if self._states > 1 else (found,)
        except (ValueError, RuntimeError):
            if x.shape[1] != self.input_size or any(s.shape != (len(x), self.hidden_size) for s in state):
                return super().forward(input, hx)  # which raises, in torch's words
            raise
        new = new if batched else tuple(s.squeeze(0) for s in new)
        return new if self._states > 1 else new[0]

    def _plain(self, x: Tensor, state: Any) -> Any:
        """A step where no kernel on packed weights runs."""
        with torch.no_grad():
            return self(x, state)

    def _step_failed(self, x: Tensor, state: Any) -> Any:
        """What went wrong in a step, in words; without a state nothing did."""
        if state is None and isinstance(x, Tensor) and x.dim() == 2:
            return self.step(x, self.init_state(len(x)))
        parts = tuple(state) if self._states > 1 and isinstance(state, (tuple, list)) else (state,)
        if len(parts) != self._states:
            raise ValueError(f"{type(self).__name__}.step: state has {len(parts)} tensors, expected {self._states}")
        p = self._parameters
        check(self._op, x, parts, (p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"]), None, one=True)  # type: ignore[arg-type]

    def pack(self, dtype: torch.dtype | None = None) -> Any:
        """Hold the weights that :meth:`step` reads in ``dtype``: None (their own), bfloat16 or int8. Returns self.

        The state and all sums stay float32. Beside bfloat16 x and the hidden state are multiplied with 17 bits of
        mantissa at least. int8 has a scale for each row of the weights, and turns them into 8 bits with a scale for
        each step.
        """
        self._pack = Packed(storage_of(dtype, self.weight_hh))
        return self

    def init_state(self, batch: int) -> Any:
        """Zeros, as the state of ``batch`` streams before their first step."""
        state = [self.weight_hh.new_zeros(batch, self.hidden_size) for _ in range(self._states)]
        return tuple(state) if self._states > 1 else state[0]

    def step(self, x: Tensor, state: Any = None) -> Any:
        """:meth:`forward` without gradients, for x (batch, input_size), on weights packed once (see :meth:`pack`)."""
        raise NotImplementedError
