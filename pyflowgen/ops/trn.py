"""Temporal Recurrent Network: an encoder LSTM cell fed by the future that a decoder LSTM cell imagines at every frame.

In this order: reference, function, layer. The reference is the function: there is no kernel yet.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    w, features = weights, x.shape[-1]
    from_x, from_future = w.enc_weight_ih[:, :features], w.enc_weight_ih[:, features:]
    given = F.linear(_drop(x, dropout), from_x, w.enc_bias).unbind(1)

    def decode(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ahead (batch, steps, C) and the future feature (batch, F)."""
        g = torch.relu(F.linear(h, w.hx_weight, w.hx_bias))
        k = torch.relu(F.linear(c, w.cx_weight, w.cx_bias))
        hidden: list[Tensor] = []
        scores: list[Tensor] = []
        gates = F.linear(g, w.dec_weight_hh, w.dec_bias)
        for i in range(steps):
            if i:
                u = torch.relu(F.linear(scores[-1], w.fusion_weight, w.fusion_bias))
                gates = F.linear(g, w.dec_weight_hh, w.dec_bias) + F.linear(_drop(u, dropout), w.dec_weight_ih)
            g, k = _cell(gates, k)
            hidden.append(g)
            scores.append(F.linear(_drop(g, dropout), w.classifier_weight, w.classifier_bias))
        states = torch.stack(hidden, 1)
        if pool == "before":
            pooled = torch.relu(F.linear(states.mean(1), w.future_weight, w.future_bias))
        else:
            pooled = torch.relu(F.linear(states, w.future_weight, w.future_bias)).mean(1)
        return torch.stack(scores, 1), pooled

    hidden, ahead = [], []
    for frame in given:
        if start == "previous":
            scores, future = decode(h, c)
        gates = frame + F.linear(_drop(future, dropout), from_future) + F.linear(h, w.enc_weight_hh)
        h, c = _cell(gates, c)
        if start == "current":
            scores, future = decode(h, c)
        hidden.append(h)
        ahead.append(scores)
    classes = w.classifier_weight.shape[0]
    if not hidden:
        return TRNOutput(x.new_empty(len(x), 0, classes), x.new_empty(len(x), 0, steps, classes), h, c, future)
    scores = F.linear(_drop(torch.stack(hidden, 1), dropout), w.classifier_weight, w.classifier_bias)
    return TRNOutput(scores, torch.stack(ahead, 1), h, c, future)


def _cell(gates: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = gates.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _drop(x: Tensor, p: float) -> Tensor:
    return F.dropout(x, p) if p else x


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
    return trn_reference(x, h, c, future, weights, steps=steps, pool=pool, start=start, dropout=dropout)


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
            zero = frames.new_zeros(len(frames), self.hidden)
            state = zero, zero, frames.new_zeros(len(frames), self.features)
        h, c, future = state
        p = self.dropout if self.training else 0.0
        x = self.feature_extractor(frames)
        return trn(x, h, c, future, self.weights(), steps=self.steps, pool=self.pool, start=self.start, dropout=p)

    def extra_repr(self) -> str:
        return f"steps={self.steps}, pool={self.pool!r}, start={self.start!r}, dropout={self.dropout}"
