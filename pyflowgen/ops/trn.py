"""Temporal Recurrent Network: an encoder LSTM cell fed by the future that a decoder LSTM cell imagines at every frame.

In this order: reference, function with its gradient, layer, fake.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen._native import tracing
from pyflowgen.recurrence import STORAGE, storage_of

Pool = Literal["after", "before"]
Start = Literal["current", "previous"]


class TRNWeights(NamedTuple):
    """Weights of :func:`trn`, hidden size H, F features, C classes; LSTM gates in PyTorch's order i, f, g, o."""

    enc_weight_ih: Tensor  # (4H, 2F): this frame's features, then the future's
    enc_weight_hh: Tensor  # (4H, H)
    enc_bias: Tensor  # (4H,): the sum of PyTorch's two
    dec_weight_ih: Tensor  # (4H, H)
    dec_weight_hh: Tensor  # (4H, H)
    dec_bias: Tensor  # (4H,)
    hx_weight: Tensor  # (H, H)
    hx_bias: Tensor
    cx_weight: Tensor  # (H, H)
    cx_bias: Tensor
    fusion_weight: Tensor  # (H, C)
    fusion_bias: Tensor
    future_weight: Tensor  # (F, H)
    future_bias: Tensor
    classifier_weight: Tensor  # (C, H)
    classifier_bias: Tensor


class TRNOutput(NamedTuple):
    """What :func:`trn` returns; the last three are the state for the frames that follow."""

    scores: Tensor  # (batch, frames, C)
    ahead: Tensor  # (batch, frames, steps, C)
    h: Tensor  # (batch, H)
    c: Tensor  # (batch, H)
    future: Tensor  # (batch, F)


# ---------------------------------------------------------------------------------------------------- reference
def trn_reference(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    future: Tensor,
    weights: TRNWeights,
    *,
    steps: int = 8,
    pool: Pool = "after",
    start: Start = "current",
    dropout: float = 0.0,
) -> TRNOutput:
    """Plain PyTorch definition of :func:`trn`, with the same arguments.

    What does not hang on the recurrence is one product for the clip, the future features of all decoder steps one
    product for the frame, and the first decoder step has no input to multiply.
    """
    _check(x, h, c, future, weights, steps, pool, start, dropout)
    masks = _masks(x, h.shape[1], steps, dropout)
    hs, rest = _recur(_times(x, masks.x), h, c, future, weights, steps, pool, start, masks)
    scores = F.linear(_times(hs, masks.h), weights.classifier_weight, weights.classifier_bias)
    return TRNOutput(scores, *rest)


def _recur(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    future: Tensor,
    w: TRNWeights,
    steps: int,
    pool: str,
    start: str,
    masks: _Masks,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Encoder states (batch, frames, H), and scores ahead, h, c and future."""
    features = x.shape[2]
    from_x, from_future = w.enc_weight_ih[:, :features], w.enc_weight_ih[:, features:]
    given = F.linear(x, from_x, w.enc_bias).unbind(1)

    def decode(t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ahead (batch, steps, C) and the future feature (batch, F)."""
        g = torch.relu(F.linear(h, w.hx_weight, w.hx_bias))
        k = torch.relu(F.linear(c, w.cx_weight, w.cx_bias))
        hidden: list[Tensor] = []
        scores: list[Tensor] = []
        gates = F.linear(g, w.dec_weight_hh, w.dec_bias)
        for i in range(steps):
            if i:
                u = torch.relu(F.linear(scores[-1], w.fusion_weight, w.fusion_bias))
                u = _times(u, masks.u[t, i] if masks.u is not None else None)
                gates = F.linear(g, w.dec_weight_hh, w.dec_bias) + F.linear(u, w.dec_weight_ih)
            g, k = _cell(gates, k)
            hidden.append(g)
            g_kept = _times(g, masks.g[t, i] if masks.g is not None else None)
            scores.append(F.linear(g_kept, w.classifier_weight, w.classifier_bias))
        states = torch.stack(hidden, 1)
        if pool == "before":
            pooled = torch.relu(F.linear(states.mean(1), w.future_weight, w.future_bias))
        else:
            pooled = torch.relu(F.linear(states, w.future_weight, w.future_bias)).mean(1)
        return torch.stack(scores, 1), pooled

    hidden, ahead = [], []
    for t, frame in enumerate(given):
        if start == "previous":
            scores, future = decode(t, h, c)
        fed = _times(future, masks.future[t] if masks.future is not None else None)
        h, c = _cell(frame + F.linear(fed, from_future) + F.linear(h, w.enc_weight_hh), c)
        if start == "current":
            scores, future = decode(t, h, c)
        hidden.append(h)
        ahead.append(scores)
    if not hidden:
        return x.new_empty(len(x), 0, h.shape[1]), (x.new_empty(len(x), 0, steps, len(w.classifier_bias)), h, c, future)
    return torch.stack(hidden, 1), (torch.stack(ahead, 1), h, c, future)


def _cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class _Masks(NamedTuple):
    """What dropout multiplies by, or None: drawn beforehand, so that reference and kernel take the same."""

    x: Tensor | None  # (B, T, F)
    h: Tensor | None  # (B, T, H), before the classifier
    future: Tensor | None  # (T, B, F)
    u: Tensor | None  # (T, L, B, H)
    g: Tensor | None  # (T, L, B, H), before the classifier


def _masks(x: Tensor, hidden: int, steps: int, p: float) -> _Masks:
    if not p:
        return _Masks(None, None, None, None, None)
    batch, frames, features = x.shape
    shapes = (batch, frames, features), (batch, frames, hidden), (frames, batch, features)
    later = (frames, steps, batch, hidden)
    return _Masks(*(F.dropout(x.new_ones(shape), p) for shape in (*shapes, later, later)))


def _times(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


# ----------------------------------------------------------------------------------------------------- function
def trn(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    future: Tensor,
    weights: TRNWeights,
    *,
    steps: int = 8,
    pool: Pool = "after",
    start: Start = "current",
    dropout: float = 0.0,
) -> TRNOutput:
    r"""Temporal Recurrent Network over a clip: scores of every frame, and of the frames it expects to follow.

    .. math::
        h_t, c_t &= \mathrm{LSTM}_{enc}([x_t; \tilde x_{t-1}], (h_{t-1}, c_{t-1})), \quad p_t = W_c h_t + b_c \\
        g_0, k_0 &= \mathrm{relu}(W_{hx} h_t + b_{hx}),\ \mathrm{relu}(W_{cx} c_t + b_{cx}), \quad u_0 = 0 \\
        g_i, k_i &= \mathrm{LSTM}_{dec}(u_{i-1}, (g_{i-1}, k_{i-1})), \quad q_{t,i} = W_c g_i + b_c, \quad
        u_i = \mathrm{relu}(W_f q_{t,i} + b_f) \\
        \tilde x_t &= \tfrac1L \sum_{i=1}^{L} \mathrm{relu}(W_u g_i + b_u)

    These are the equations of the authors' code. ``pool="before"`` takes the mean of the decoder's states first,
    :math:`\tilde x_t = \mathrm{relu}(W_u \bar g + b_u)`, and ``start="previous"`` decodes from
    :math:`h_{t-1}, c_{t-1}` and feeds the future to the encoder of the same frame, both as in the paper. Which frames
    the decoder's steps are to name is the loss's affair, see :class:`pyflowgen.models.TRN`.

    Args:
        x: ``(batch, frames, F)``, after the input transform.
        h, c: ``(batch, H)``, encoder state before the first frame; zeros at the start of a stream.
        future: :math:`\tilde x_{-1}`, ``(batch, F)``; zeros at the start of a stream.
        weights: see :class:`TRNWeights`.
        steps: L, decoder steps a frame.
        pool: ``"after"`` or ``"before"`` the layer :math:`W_u`.
        start: decode from the ``"current"`` or the ``"previous"`` encoder state.
        dropout: probability at both cells' inputs and the classifier's; 0 outside training.

    Returns:
        :class:`TRNOutput`: scores (logits), scores ahead, and h, c and future after the last frame. Frame t's scores
        hang on frames up to t alone.

    Raises:
        ValueError: shapes that do not fit, unknown options.

    Reference: Xu et al., *Temporal Recurrent Networks for Online Action Detection*, 2019.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.TRN(features=6, hidden=8, classes=3, steps=4)
        >>> zero = torch.zeros(2, 8)
        >>> out = pyflowgen.trn(torch.randn(2, 5, 6), zero, zero, torch.zeros(2, 6), layer.weights(), steps=4)
        >>> out.scores.shape, out.ahead.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5, 4, 3]))
    """
    if not _use_kernel(x, h, c, future, weights):
        return trn_reference(x, h, c, future, weights, steps=steps, pool=pool, start=start, dropout=dropout)
    _check(x, h, c, future, weights, steps, pool, start, dropout)
    how = steps, pool == "before", start == "previous"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, h, c, future, *weights)):
        masks = _masks(x, h.shape[1], steps, dropout)
        hs, ahead, h, c, future = _TRN.apply(  # type: ignore[no-untyped-call]
            _times(x, masks.x), h, c, future, how, masks[2:], *weights
        )
        scores = F.linear(_times(hs, masks.h), weights.classifier_weight, weights.classifier_bias)
        return TRNOutput(scores, ahead, h, c, future)
    if dropout:
        return trn_reference(x, h, c, future, weights, steps=steps, pool=pool, start=start, dropout=dropout)
    given = F.linear(x.transpose(0, 1).contiguous(), weights.enc_weight_ih[:, : x.shape[2]], weights.enc_bias)
    return _run(given, h, c, future, weights, _pack(weights, x.shape[2]), how)


def _use_kernel(*tensors: Any) -> bool:
    x, *states, weights = tensors
    return (
        x.dtype in (torch.float32, torch.float64)
        and _native.use_kernel("trn", x)
        and all(t.dtype is x.dtype and t.device == x.device for t in (*states, *weights))
        and not torch.is_autocast_enabled(x.device.type)
    )


def _packs(x: Tensor) -> bool:
    """Whether kernels of x's device take packed matrices, as on the CPU; those of a GPU take them as they are."""
    return _native.has_kernel_for("trn_step", x)


def _panels(matrix: Tensor) -> Tensor:
    return torch.ops.pyflowgen.linear_pack.default(matrix) if _packs(matrix) else matrix.contiguous()


# The seven matrices as the kernel takes them, between them the biases; see csrc/trn.cpp.
Packs = tuple[Tensor, ...]


class _Stream:
    """What a layer packed last, for streams, and whether it still holds: versions and addresses of its parameters.

    Writes may hide from the version counter, torch's fused optimizers among them: clips compare 16 elements of each
    parameter as well.
    """

    def __init__(self, layer: TRN) -> None:
        # Where the layer holds each of its modules and parameters: faster to look through than `parameters()`.
        self.held: list[tuple[dict[str, Any], str, Any]]
        self.held = [(m._modules, k, v) for m in layer.modules() for k, v in m._modules.items()]
        self.held += [(m._parameters, k, p) for m in layer.modules() for k, p in m._parameters.items()]
        self.parameters = list(layer.parameters())
        self.key = [] if any(p.is_inference() for p in self.parameters) else self._key()  # [] is no key: always anew
        flat = [p.detach().reshape(-1) for p in self.parameters]
        self._probes = [p[:: -(-len(p) // 16)] for p in flat]  # views into the parameters
        self._values = torch.cat(self._probes)
        self.weights = layer.weights()
        self.clip: tuple[Packs, tuple[Tensor, ...]] | None = None  # panels, and those of what frames go through first
        self.steps: dict[torch.dtype | None, Tensor] = {}

    def _key(self) -> list[int]:
        return [p._version for p in self.parameters] + [p.data_ptr() for p in self.parameters]

    def holds(self, thorough: bool) -> bool:
        if not self.key:  # inference tensors have no version
            return False
        for where, name, what in self.held:
            if where.get(name) is not what:
                return False
        return self._key() == self.key and not (thorough and not torch.equal(torch.cat(self._probes), self._values))


# Not an attribute, which would be pickled and copied with the layer.
_streams: weakref.WeakKeyDictionary[nn.Module, _Stream] = weakref.WeakKeyDictionary()
# Looked up once: a step is short.
_step = getattr(getattr(torch.ops.pyflowgen, "trn_step", None), "default", None)
# Streams that share a frame's step; with more, the products of clips are as fast.
_STEP_ROWS = 8


def _matrices(w: TRNWeights, features: int) -> tuple[Tensor, ...]:
    enc = torch.cat([w.enc_weight_ih[:, features:], w.enc_weight_hh], 1)
    dec = torch.cat([w.dec_weight_ih, w.dec_weight_hh], 1)
    return enc, dec, w.hx_weight, w.cx_weight, w.fusion_weight, w.future_weight, w.classifier_weight


def _pack(w: TRNWeights, features: int) -> Packs:
    enc, *others = (_panels(m) for m in _matrices(w, features))
    biases = w.dec_bias, w.hx_bias, w.cx_bias, w.fusion_bias, w.future_bias, w.classifier_bias
    return enc, *(t for pair in zip(others, biases, strict=True) for t in pair)


def _run(
    given: Tensor, h: Tensor, c: Tensor, future: Tensor, w: TRNWeights, packs: Packs, how: tuple[int, bool, bool]
) -> TRNOutput:
    hs, ahead, c, future = torch.ops.pyflowgen.trn.default(given, h, c, future, *packs, *how)
    scores = F.linear(hs.transpose(0, 1), w.classifier_weight, w.classifier_bias)
    return TRNOutput(scores, ahead.movedim(2, 0), hs[-1] if len(hs) else h, c, future)


class _TRN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, c, future, how, masks, *weights):  # type: ignore[no-untyped-def]
        w, features = TRNWeights(*weights), x.shape[2]
        given = F.linear(x.transpose(0, 1).contiguous(), w.enc_weight_ih[:, :features], w.enc_bias)
        packs = _pack(w, features)
        hs, cs, ahead, *kept = torch.ops.pyflowgen.trn_keep.default(given, h, c, future, *packs, *how, *masks)
        ctx.how, ctx.masks = how, masks
        ctx.save_for_backward(x, h, c, future, hs, cs, ahead, *kept, *weights)
        last = kept[0][-1] if len(given) else future
        return hs[1:].transpose(0, 1), ahead.movedim(2, 0), hs[-1].clone(), cs[-1].clone(), last.clone()

    @staticmethod
    def backward(ctx, dhs, dahead, dh_last, dc_last, dfuture_last):  # type: ignore[no-untyped-def]
        x, h, c, future, hs, cs, ahead, futures, enc_in, enc_gates, dec_in, dec_gates, gs, ks, rows, *weights = (
            ctx.saved_tensors
        )
        w, features = TRNWeights(*weights), x.shape[2]
        steps, before, previous = ctx.how
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            inputs = [t if t.requires_grad else t.detach().requires_grad_() for t in (x, h, c, future, *weights)]
            pool, start = "before" if before else "after", "previous" if previous else "current"
            masks = _Masks(None, None, *ctx.masks)
            x, h, c, future, *rest = inputs
            hidden, out = _recur(x, h, c, future, TRNWeights(*rest), steps, pool, start, masks)
            given = [dhs, dahead, dh_last, dc_last, dfuture_last]
            grads = torch.autograd.grad((hidden, *out), inputs, given, create_graph=True, allow_unused=True)
            return *grads[:4], None, None, *grads[4:]
        dhs = dhs.transpose(0, 1)
        if len(dhs):
            dhs = torch.cat([dhs[:-1], (dhs[-1] + dh_last)[None]])
        turned = [_panels(m.t().contiguous()) for m in _matrices(w, features)]
        kept = cs, futures, enc_gates, dec_in, dec_gates, gs, ks, rows
        dgiven, ddec, dq, du, drows, dhx, dcx, dh, dc, dfuture = torch.ops.pyflowgen.trn_backward.default(
            dhs, dc_last, dfuture_last, dahead.movedim(0, 2), *kept, *turned, before, previous, *ctx.masks
        )
        if not len(dhs):
            dh = dh + dh_last
        # What each weight met at every frame and step, in one product.
        hidden = h.shape[1]
        from_h, from_c = (hs[:-1], cs[:-1]) if previous else (hs[1:], cs[1:])
        denc = _outer(dgiven, enc_in)
        ddec_both = _outer(ddec, dec_in)
        pooled = rows if before else gs[:, 1:]
        dweights = TRNWeights(
            torch.cat([_outer(dgiven, x.transpose(0, 1)), denc[:, :features]], 1),
            denc[:, features:],
            dgiven.sum((0, 1)),
            ddec_both[:, :hidden],
            ddec_both[:, hidden:],
            ddec.sum((0, 1, 2)),
            _outer(dhx, from_h),
            dhx.sum((0, 1)),
            _outer(dcx, from_c),
            dcx.sum((0, 1)),
            _outer(du, ahead),
            du.sum((0, 1, 2)),
            _outer(drows, pooled),
            drows.sum((0, 1, 2)),
            _outer(dq, _times(gs[:, 1:], ctx.masks[2])),
            dq.sum((0, 1, 2)),
        )
        dx = (dgiven @ w.enc_weight_ih[:, :features]).transpose(0, 1)
        return dx, dh, dc, dfuture, None, None, *dweights


def _outer(dz: Tensor, x: Tensor) -> Tensor:
    """Gradient of a matrix from those of its results and its inputs, rows flattened."""
    return dz.reshape(-1, dz.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def _check(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    future: Tensor,
    weights: TRNWeights,
    steps: int,
    pool: str,
    start: str,
    dropout: float,
) -> None:
    if x.dim() != 3:
        raise ValueError(f"trn: x has shape {tuple(x.shape)}, expected (batch, frames, features)")
    batch, features, hidden, classes = len(x), x.shape[2], h.shape[-1], weights.classifier_weight.shape[0]
    cells = (4 * hidden, 2 * features), (4 * hidden, hidden), (4 * hidden,), *((4 * hidden, hidden),) * 2, (4 * hidden,)
    layers = (hidden, hidden), (hidden, hidden), (hidden, classes), (features, hidden), (classes, hidden)
    shapes = *cells, *(shape for layer in layers for shape in (layer, layer[:1]))
    given = {"h": h, "c": c, "future": future, **weights._asdict()}
    expected = (batch, hidden), (batch, hidden), (batch, features), *shapes
    for (name, value), shape in zip(given.items(), expected, strict=True):
        if value.shape != shape:
            raise ValueError(f"trn: {name} has shape {tuple(value.shape)}, expected {shape}")
    if steps < 1:
        raise ValueError(f"trn: steps is {steps}, expected at least 1")
    if pool not in ("after", "before"):
        raise ValueError(f"trn: pool is {pool!r}, expected 'after' or 'before'")
    if start not in ("current", "previous"):
        raise ValueError(f"trn: start is {start!r}, expected 'current' or 'previous'")
    if not 0 <= dropout < 1:
        raise ValueError(f"trn: dropout is {dropout}, expected a probability below 1")


# -------------------------------------------------------------------------------------------------------- layer
def _fc_relu(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU())


class TRN(nn.Module):
    """:func:`trn` with its weights, and the input transform :math:`x_t = \\mathrm{relu}(W_{in} v_t + b_{in})`.

    Parameters have the names of the authors' code, so that its weights load.

    Args:
        features: F, numbers in a frame.
        hidden: H.
        classes: C.
        steps, pool, start, dropout: see :func:`trn`.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.TRN(6, 8, 3, steps=4).eval()
        >>> frames = torch.randn(2, 5, 6)
        >>> whole = layer(frames)
        >>> first = layer(frames[:, :3])
        >>> rest = layer(frames[:, 3:], first[2:])
        >>> torch.allclose(whole.scores, torch.cat([first.scores, rest.scores], 1), atol=1e-6)
        True
        >>> state = layer.pack(torch.bfloat16).init_state(2)
        >>> for t in range(5):  # a stream, on weights half as long
        ...     out = layer.step(frames[:, t], state)
        ...     state = out[2:]
        >>> torch.allclose(whole.scores[:, -1], out.scores, atol=1e-2)
        True
    """

    def __init__(
        self,
        features: int,
        hidden: int,
        classes: int,
        *,
        steps: int = 8,
        pool: Pool = "after",
        start: Start = "current",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(features, hidden, classes, steps) < 1:
            raise ValueError(
                f"TRN: features={features}, hidden={hidden}, classes={classes}, steps={steps}, expected at least 1"
            )
        self.features, self.hidden, self.classes, self.steps = features, hidden, classes, steps
        self.pool: Pool = pool
        self.start: Start = start
        self.dropout = dropout
        self._storage: torch.dtype | None = None
        layers: OrderedDict[str, nn.Module] = OrderedDict(input_linear=_fc_relu(features, features))
        self.feature_extractor = nn.Sequential(layers)
        self.hx_trans, self.cx_trans = _fc_relu(hidden, hidden), _fc_relu(hidden, hidden)
        self.fusion_linear, self.future_linear = _fc_relu(classes, hidden), _fc_relu(hidden, features)
        self.enc_cell, self.dec_cell = nn.LSTMCell(2 * features, hidden), nn.LSTMCell(hidden, hidden)
        self.classifier = nn.Linear(hidden, classes)

    def weights(self) -> TRNWeights:
        """The parameters as :func:`trn` takes them."""
        pairs = (self.hx_trans[0], self.cx_trans[0], self.fusion_linear[0], self.future_linear[0], self.classifier)
        cells = (self.enc_cell, self.dec_cell)
        return TRNWeights(
            *(t for cell in cells for t in (cell.weight_ih, cell.weight_hh, cell.bias_ih + cell.bias_hh)),
            *(t for layer in pairs for t in (layer.weight, layer.bias)),
        )

    def forward(self, frames: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None) -> TRNOutput:
        if frames.dim() != 3 or frames.shape[2] != self.features:
            raise ValueError(f"TRN: frames have shape {tuple(frames.shape)}, expected (batch, frames, {self.features})")
        if state is None:
            sizes = self.hidden, self.hidden, self.features
            h, c, future = (frames.new_zeros(len(frames), size) for size in sizes)
            state = h, c, future
        self._check_state(state, len(frames), frames)
        h, c, future = state
        p = self.dropout if self.training else 0.0
        compiling = torch.compiler.is_compiling()
        plain = not (p or torch.is_grad_enabled() or compiling)
        if plain and _use_kernel(frames, h, c, future, (self.classifier.bias,)) and _packs(frames):
            return self._stream(frames, h, c, future)
        x = self.feature_extractor(frames)
        return trn(x, h, c, future, self.weights(), steps=self.steps, pool=self.pool, start=self.start, dropout=p)

    def _stream(self, frames: Tensor, h: Tensor, c: Tensor, future: Tensor) -> TRNOutput:
        """The kernel on weights that are packed anew only when a parameter has changed."""
        made = self._packed(thorough=True)
        w = made.weights
        _check(frames, h, c, future, w, self.steps, self.pool, self.start, 0.0)
        if frames.shape[1] == 1 and len(frames) <= _STEP_ROWS:
            scores, ahead, *state = self._one(made, None, frames[:, 0], h, c, future)
            return TRNOutput(scores[:, None], ahead[:, None], *state)
        linear, pack = torch.ops.pyflowgen.linear.default, torch.ops.pyflowgen.linear_pack.default
        transform = self._transform()
        if made.clip is None:
            from_x = w.enc_weight_ih[:, : self.features].contiguous()
            both = transform.weight, pack(transform.weight), from_x, pack(from_x)
            made.clip = _pack(w, self.features), both
        packs, (w_in, panels_in, w_x, panels_x) = made.clip
        x = linear(frames.transpose(0, 1), w_in, transform.bias, 1, panels_in)  # 1: relu
        given = linear(x, w_x, w.enc_bias, 0, panels_x)
        return _run(given, h, c, future, w, packs, (self.steps, self.pool == "before", self.start == "previous"))

    def _transform(self) -> nn.Linear:
        transform = self.get_submodule("feature_extractor.input_linear.0")
        assert isinstance(transform, nn.Linear)
        return transform

    def _packed(self, thorough: bool) -> _Stream:
        made = _streams.get(self)
        if made is None or not made.holds(thorough):
            with torch.no_grad():
                made = _streams[self] = _Stream(self)
        return made

    def _one(
        self, made: _Stream, storage: torch.dtype | None, frame: Tensor, h: Tensor, c: Tensor, future: Tensor
    ) -> TRNOutput:
        """The kernel of one frame, on weights in ``storage``."""
        packed = made.steps.get(storage)
        if packed is None:
            transform = self._transform()
            weights = [transform.weight, transform.bias, *made.weights]
            if storage is torch.int8 and not all(bool(t.isfinite().all()) for t in weights):
                raise ValueError("TRN: a weight is not finite, which int8 cannot hold")
            with torch.no_grad():
                packed = made.steps[storage] = torch.ops.pyflowgen.trn_pack.default(weights, STORAGE[storage])
        assert _step is not None
        how = self.classes, self.steps, self.pool == "before", self.start == "previous"
        return TRNOutput._make(_step(frame, h, c, future, packed, *how))

    def pack(self, dtype: torch.dtype | None = None) -> TRN:
        """Hold the weights that :meth:`step` reads in ``dtype``: None (their own), bfloat16 or int8. Returns self.

        The state, all sums, and the two small matrices that turn states into scores and back stay float32. int8 has a
        scale for each row of each weight, and turns what is multiplied into 8 bits with a scale for each step.
        """
        self._storage = storage_of(dtype, self.classifier.weight)
        return self

    def init_state(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Zeros, as (h, c, future) of ``batch`` streams before their first frame."""
        h, c, future = (self.classifier.weight.new_zeros(batch, n) for n in (self.hidden, self.hidden, self.features))
        return h, c, future

    def step(self, frame: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None) -> TRNOutput:
        """The next frame ``(batch, features)`` of streams: :meth:`forward` of it alone, the time dimension left out.
        Without a state, the first one.

        Without dropout and without gradients, on weights packed once (see :meth:`pack`). They are packed anew when a
        parameter is another tensor, lies elsewhere or counts another version, and after :meth:`train` and ``eval``:
        torch's fused optimizers write without counting.
        """
        if state is None:
            state = self.init_state(len(frame) if frame.dim() else 0)
        made = _streams.get(self)
        if tracing() or _native.reference_only():
            made = None
        elif made is None or not made.holds(thorough=False):
            usable = _use_kernel(frame, *state, (self.classifier.weight,)) and _packs(frame)
            made = self._packed(thorough=False) if usable else None
        if made is not None:
            try:
                return self._one(made, self._storage, frame, *state)
            except (RuntimeError, TypeError):  # the operator checks everything; this finds the words
                self._check_step(frame, state)
                raise
        self._check_step(frame, state)
        with torch.no_grad():
            x = self.feature_extractor(frame)[:, None]
            scores, ahead, *after = trn(x, *state, self.weights(), steps=self.steps, pool=self.pool, start=self.start)
        return TRNOutput(scores[:, 0], ahead[:, 0], *after)

    def _check_step(self, frame: Tensor, state: tuple[Tensor, ...]) -> None:
        if frame.dim() != 2 or frame.shape[1] != self.features:
            raise ValueError(f"TRN: frame has shape {tuple(frame.shape)}, expected (batch, {self.features})")
        self._check_state(state, len(frame), frame)

    def _check_state(self, state: tuple[Tensor, ...], batch: int, x: Tensor) -> None:
        if len(state) != 3:
            raise ValueError(f"TRN: state has {len(state)} tensors, expected h, c and future")
        for name, value, size in zip(
            ("h", "c", "future"), state, (self.hidden, self.hidden, self.features), strict=True
        ):
            if value.shape != (batch, size):
                raise ValueError(f"TRN: {name} has shape {tuple(value.shape)}, expected ({batch}, {size})")
        weight = self.classifier.weight
        if torch.is_autocast_enabled(weight.device.type):
            return
        for name, value in zip(("frames", "h", "c", "future"), (x, *state), strict=True):
            if value.dtype != weight.dtype:
                raise TypeError(f"TRN: {name} is {value.dtype}, expected the weights' {weight.dtype}")

    def train(self, mode: bool = True) -> TRN:
        _streams.pop(self, None)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, pool={self.pool!r}, start={self.start!r}, dropout={self.dropout}"


# -------------------------------------------------------------------------------------------------------- fake
def _fake_trn(given, h, c, future, *matrices):  # type: ignore[no-untyped-def]
    classes, steps = matrices[12].shape[0], matrices[13]
    frames, batch, hidden = given.shape[0], h.shape[0], h.shape[1]
    ahead = h.new_empty(frames, steps, batch, classes)
    return h.new_empty(frames, batch, hidden), ahead, torch.empty_like(h), torch.empty_like(future)


def _fake_keep(given, h, c, future, *matrices):  # type: ignore[no-untyped-def]
    steps, before = matrices[13:15]
    frames, (batch, hidden), features = given.shape[0], h.shape, future.shape[1]
    _, ahead, *_ = _fake_trn(given, h, c, future, *matrices)  # type: ignore[no-untyped-call]
    rows = (frames, 1, batch, hidden) if before else (frames, steps, batch, features)
    states, kept = (frames + 1, batch, hidden), (frames, steps + 1, batch, hidden)
    shapes: list[tuple[int, ...]]
    shapes = [(frames, batch, features), (frames, batch, features + hidden), (frames, batch, 4 * hidden)]
    shapes += [(frames, steps, batch, 2 * hidden), (frames, steps, batch, 4 * hidden), kept, kept, rows]
    return h.new_empty(states), h.new_empty(states), ahead, *(h.new_empty(shape) for shape in shapes)


def _fake_backward(dhs, dc, dfuture, dscores, cs, futures, enc_gates, dec_in, dec_gates, gs, ks, rows, *matrices):  # type: ignore[no-untyped-def]
    (frames, steps, batch, _), features = dscores.shape, futures.shape[2]
    before = matrices[7]
    states = [cs.new_empty(frames, batch, cs.shape[2]) for _ in range(2)]
    du = cs.new_empty(frames, steps, batch, cs.shape[2])
    drows = cs.new_empty(frames, 1 if before else steps, batch, features)
    like = torch.empty_like
    return (
        like(enc_gates),
        like(dec_gates),
        cs.new_empty(dscores.shape),
        du,
        drows,
        *states,
        like(dc),
        like(dc),
        like(dfuture),
    )


def _fake_step(frame, h, c, future, packed, classes, steps, before, previous):  # type: ignore[no-untyped-def]
    scores, ahead = frame.new_empty(len(frame), classes), frame.new_empty(len(frame), steps, classes)
    return scores, ahead, torch.empty_like(h), torch.empty_like(c), torch.empty_like(future)


_native.register("trn", _fake_trn)
_native.register("trn_keep", _fake_keep)
_native.register("trn_backward", _fake_backward)
_native.register("trn_step", _fake_step)
