"""Long short-term memory: a whole sequence in one call, and one step of a stream on weights packed once.

In this order: reference, function with its gradient, layers, fakes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen.recurrence import CellLayer, SequenceLayer, register, sequence, stepwise, unroll, use_gates, use_kernel


# ---------------------------------------------------------------------------------------------------- reference
def lstm_reference(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain PyTorch definition of :func:`lstm`, with the same arguments."""

    def step(a: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return _gates_reference(a, F.linear(h, weight_hh, bias_hh), h, c)

    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    y, h, c = unroll("lstm", step, x, (h, c), weights, batch_sizes, reverse)
    return y, h, c


def _gates_reference(a: Tensor, b: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The state after a step, from x's and h's part of the gates' arguments."""
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


# ----------------------------------------------------------------------------------------------------- function
def lstm(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Long short-term memory over a sequence: one layer, one direction, all steps in one call.

    .. math::
        i_t, f_t, o_t &= \sigma(W_{i,f,o}\,x_t + b_{i,f,o} + U_{i,f,o}\,h_{t-1} + b'_{i,f,o}) \\
        g_t &= \tanh(W_g\,x_t + b_g + U_g\,h_{t-1} + b'_g) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \qquad h_t = o_t \odot \tanh(c_t)

    S. Hochreiter, J. Schmidhuber, Long short-term memory, Neural Computation 9 (1997), with the forget gate of
    F. Gers, J. Schmidhuber, F. Cummins, Learning to forget, Neural Computation 12 (2000); weights as
    :class:`torch.nn.LSTM` has them.

    x's part of all steps is one product. In the recurrence the weights' columns are shared by the threads, so that each
    keeps its part in its own cache, and the gates are applied in registers. The gradients of the weights are one
    product over all steps. A row's result does not depend on the other rows of the batch, nor on later steps.

    Args:
        x: ``(time, batch, in)``, or ``(rows, in)`` with ``batch_sizes``.
        h: hidden state before the first step, ``(batch, hidden)``.
        c: cell before the first step, ``(batch, hidden)``.
        weight_ih: W, gates i, f, g, o one below the other, ``(4 hidden, in)``.
        weight_hh: U likewise, ``(4 hidden, hidden)``.
        bias_ih: b, ``(4 hidden,)``, or None.
        bias_hh: b', ``(4 hidden,)``, or None.
        batch_sizes: sequences of several lengths, longest first: how many have a step t, ``(time,)`` of int64, as in
            :class:`torch.nn.utils.rnn.PackedSequence`, whose ``data`` x then is.
        reverse: from the last step to the first.

    Returns:
        (y, h_n, c_n): all hidden states ``(time, batch, hidden)``, or ``(rows, hidden)``, and the state after each
        sequence's last step ``(batch, hidden)``. float32 and float64 on the CPU run here, and all four dtypes on
        CUDA; other dtypes and devices, and calls under autocast, run the reference.

    Raises:
        ValueError: shapes that do not fit, or batch_sizes that grow.
        TypeError: an argument that is no tensor, or dtypes that differ.

    Example:
        >>> import torch, pyflowgen
        >>> layer = torch.nn.LSTM(3, 5)
        >>> x, zeros = torch.randn(7, 2, 3), torch.zeros(2, 5)
        >>> y, h, c = pyflowgen.lstm(x, zeros, zeros, *layer.parameters())
        >>> torch.allclose(y, layer(x)[0], atol=1e-6), h.shape, c.shape
        (True, torch.Size([2, 5]), torch.Size([2, 5]))
    """
    weights = weight_ih, weight_hh, bias_ih, bias_hh
    if not use_kernel("lstm", x):
        if not use_gates("lstm", x):
            return lstm_reference(x, h, c, *weights, batch_sizes, reverse)
        y, h, c = stepwise("lstm", x, (h, c), weights, batch_sizes, reverse)
        return y, h, c
    y, h, c = sequence("lstm", x, (h, c), weights, batch_sizes, reverse)
    return y, h, c


# ------------------------------------------------------------------------------------------------------- layers
class LSTM(SequenceLayer, nn.LSTM):
    """:class:`torch.nn.LSTM` on :func:`lstm`, with a streaming :meth:`step`.

    Constructor, parameters, ``state_dict``, inputs and outputs are those of ``torch.nn.LSTM``: layers, both
    directions, packed sequences, dropout between layers, ``batch_first``, unbatched inputs. Projections
    (``proj_size``), 16-bit dtypes on the CPU and other devices run torch's own path, and so does float32 without
    gradients for 32 sequences of one length and more, where oneDNN is at the processor's limit; on a GPU more than 32.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.LSTM(3, 5, num_layers=2)
        >>> x = torch.randn(7, 2, 3)
        >>> y, (h, c) = layer(x)
        >>> state = layer.init_state(2)
        >>> for t in range(7):  # the same, step by step
        ...     output, state = layer.step(x[t], state)
        >>> torch.allclose(output, y[-1], atol=1e-6), torch.allclose(state[1], c, atol=1e-6)
        (True, True)
    """

    _op, _states = "lstm", 2

    def _torch_is_faster(self, x: Tensor) -> bool:
        if x.is_cuda:
            return super()._torch_is_faster(x)
        if torch.is_grad_enabled() or x.dtype is not torch.float32 or x.dim() != 3:
            return False
        return x.shape[0 if self.batch_first else 1] >= _ONEDNN_BATCH


# Measured at 32 sequences of hidden size 128 to 512: oneDNN 0.8 to 1.1 of our time, more rows in its favour.
_ONEDNN_BATCH = 32
_step = getattr(getattr(torch.ops.pyflowgen, "lstm_step", None), "default", None)  # looked up once: a step is short


class LSTMCell(CellLayer, nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on the kernels of :func:`lstm`, with a streaming :meth:`step`.

    Constructor, parameters, ``state_dict``, inputs, outputs and gradients are those of ``torch.nn.LSTMCell``. A loop
    over a sequence that is known beforehand runs several times faster as one call of :class:`LSTM` or :func:`lstm`.

    Example:
        >>> import torch, pyflowgen
        >>> cell = pyflowgen.LSTMCell(3, 5).pack(torch.bfloat16)
        >>> x, state = torch.randn(2, 3), cell.init_state(2)
        >>> h, c = cell.step(x, state)
        >>> torch.allclose(h, cell(x, state)[0], atol=1e-2)
        True
    """

    _op, _states = "lstm", 2

    def step(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        p = self._parameters
        packed = self._pack.get("lstm", p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"])  # type: ignore[arg-type]
        if packed is None or _step is None or _native._reference_only:
            return self._plain(x, state)
        try:
            return _step(x, state[0], state[1], packed)  # type: ignore[index]
        except (IndexError, RuntimeError, TypeError):
            found: tuple[Tensor, Tensor] | None = self._step_failed(x, state)
            if found is None:
                raise
            return found


# --------------------------------------------------------------------------------------------------------- fake
register("lstm", 4, ("h", "c"), lstm_reference, _gates_reference)
