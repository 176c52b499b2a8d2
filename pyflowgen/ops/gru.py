"""Gated recurrent units: a whole sequence in one call, and one step of a stream on weights packed once.

In this order: reference, function with its gradient, layers, fakes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen.recurrence import CellLayer, SequenceLayer, register, sequence, stepwise, unroll, use_gates, use_kernel


# ---------------------------------------------------------------------------------------------------- reference
def gru_reference(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`gru`, with the same arguments."""

    def step(a: Tensor, h: Tensor) -> tuple[Tensor]:
        return _gates_reference(a, F.linear(h, weight_hh, bias_hh), h)

    weights = (weight_ih, weight_hh, bias_ih, bias_hh)
    y, h = unroll("gru", step, x, (h,), weights, batch_sizes, reverse)
    return y, h


def _gates_reference(a: Tensor, b: Tensor, h: Tensor) -> tuple[Tensor]:
    """The state after a step, from x's and h's part of the gates' arguments."""
    (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
    n = torch.tanh(a_n + torch.sigmoid(a_r + b_r) * b_n)
    return (n + torch.sigmoid(a_z + b_z) * (h - n),)


# ----------------------------------------------------------------------------------------------------- function
def gru(
    x: Tensor,
    h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Gated recurrent units over a sequence: one layer, one direction, all steps in one call.

    .. math::
        r_t, z_t &= \sigma(W_{r,z}\,x_t + b_{r,z} + U_{r,z}\,h_{t-1} + b'_{r,z}) \\
        n_t &= \tanh(W_n\,x_t + b_n + r_t \odot (U_n\,h_{t-1} + b'_n)) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    K. Cho et al., Learning phrase representations using RNN encoder-decoder, EMNLP 2014, with the reset gate after the
    product; weights as :class:`torch.nn.GRU` has them.

    x's part of all steps is one product. In the recurrence the weights' columns are shared by the threads, so that each
    keeps its part in its own cache, and the gates are applied in registers. The gradients of the weights are one
    product over all steps. A row's result does not depend on the other rows of the batch, nor on later steps.

    Args:
        x: ``(time, batch, in)``, or ``(rows, in)`` with ``batch_sizes``.
        h: hidden state before the first step, ``(batch, hidden)``.
        weight_ih: W, gates r, z, n one below the other, ``(3 hidden, in)``.
        weight_hh: U likewise, ``(3 hidden, hidden)``.
        bias_ih: b, ``(3 hidden,)``, or None.
        bias_hh: b', ``(3 hidden,)``, or None.
        batch_sizes: sequences of several lengths, longest first: how many have a step t, ``(time,)`` of int64, as in
            :class:`torch.nn.utils.rnn.PackedSequence`, whose ``data`` x then is.
        reverse: from the last step to the first.

    Returns:
        (y, h_n): all hidden states ``(time, batch, hidden)``, or ``(rows, hidden)``, and the state after each
        sequence's last step ``(batch, hidden)``. float32 and float64 on the CPU run here, and all four dtypes on
        CUDA; other dtypes and devices, and calls under autocast, run the reference.

    Raises:
        ValueError: shapes that do not fit, or batch_sizes that grow.
        TypeError: an argument that is no tensor, or dtypes that differ.

    Example:
        >>> import torch, pyflowgen
        >>> layer = torch.nn.GRU(3, 5)
        >>> x, zeros = torch.randn(7, 2, 3), torch.zeros(2, 5)
        >>> y, h = pyflowgen.gru(x, zeros, *layer.parameters())
        >>> torch.allclose(y, layer(x)[0], atol=1e-6), h.shape
        (True, torch.Size([2, 5]))
    """
    weights = weight_ih, weight_hh, bias_ih, bias_hh
    if not use_kernel("gru", x):
        if not use_gates("gru", x):
            return gru_reference(x, h, *weights, batch_sizes, reverse)
        y, h = stepwise("gru", x, (h,), weights, batch_sizes, reverse)
        return y, h
    y, h = sequence("gru", x, (h,), weights, batch_sizes, reverse)
    return y, h


# ------------------------------------------------------------------------------------------------------- layers
class GRU(SequenceLayer, nn.GRU):
    """:class:`torch.nn.GRU` on :func:`gru`, with a streaming :meth:`step`.

    Constructor, parameters, ``state_dict``, inputs and outputs are those of ``torch.nn.GRU``: layers, both
    directions, packed sequences, dropout between layers, ``batch_first``, unbatched inputs. 16-bit dtypes on
    the CPU, other devices, and more than 32 sequences of one length on a GPU run torch's own path.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.GRU(3, 5, num_layers=2)
        >>> x = torch.randn(7, 2, 3)
        >>> y, h = layer(x)
        >>> state = layer.init_state(2)
        >>> for t in range(7):  # the same, step by step
        ...     output, state = layer.step(x[t], state)
        >>> torch.allclose(output, y[-1], atol=1e-6), torch.allclose(state, h, atol=1e-6)
        (True, True)
    """

    _op, _states = "gru", 1


_step = getattr(getattr(torch.ops.pyflowgen, "gru_step", None), "default", None)  # looked up once: a step is short


class GRUCell(CellLayer, nn.GRUCell):
    """:class:`torch.nn.GRUCell` on the kernels of :func:`gru`, with a streaming :meth:`step`.

    Constructor, parameters, ``state_dict``, inputs, outputs and gradients are those of ``torch.nn.GRUCell``. A loop
    over a sequence that is known beforehand runs several times faster as one call of :class:`GRU` or :func:`gru`.

    Example:
        >>> import torch, pyflowgen
        >>> cell = pyflowgen.GRUCell(3, 5).pack(torch.bfloat16)
        >>> x, state = torch.randn(2, 3), cell.init_state(2)
        >>> h = cell.step(x, state)
        >>> torch.allclose(h, cell(x, state), atol=1e-2)
        True
    """

    _op, _states = "gru", 1

    def step(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        p = self._parameters
        packed = self._pack.get("gru", p["weight_ih"], p["weight_hh"], p["bias_ih"], p["bias_hh"])  # type: ignore[arg-type]
        if packed is None or _step is None or _native._reference_only:
            return self._plain(x, state)
        try:
            return _step(x, state, packed)
        except (IndexError, RuntimeError, TypeError):
            found: Tensor | None = self._step_failed(x, state)
            if found is None:
                raise
            return found


# --------------------------------------------------------------------------------------------------------- fake
register("gru", 3, ("h",), gru_reference, _gates_reference)
