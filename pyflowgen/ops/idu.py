"""Information Discrimination Unit: a recurrence over a window in which the current chunk gates every step.

In this order: reference, function, layer. The reference is the function: there is no kernel yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Reset = Literal["before", "after"]
Gate = Literal["sigmoid", "hard_sigmoid"]
Update = Literal["candidate", "state"]


def _hard_sigmoid(a: Tensor) -> Tensor:
    return (0.2 * a + 0.5).clamp(0, 1)  # Keras' slope; torch's is 1/6


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
    given, current = F.linear(x, weight_x), F.linear(x[:, -1], weight_0)
    return _recur(given, current, weight_h, bias, length, reset, gate, update)


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

    Reference: Eun et al., *Learning to Discriminate Information for Online Action Detection*, 2020.

    Example:
        >>> import torch, pyflowgen
        >>> x, w_x, w_0, w_h = torch.randn(5, 16, 3), torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 4)
        >>> pyflowgen.idu(x, w_x, w_0, w_h).shape
        torch.Size([5, 4])
    """
    return idu_reference(x, weight_x, weight_0, weight_h, bias, length, reset=reset, gate=gate, update=update)


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
    if x.dim() != 3 or x.shape[1] < 1:
        raise ValueError(f"idu: x has shape {tuple(x.shape)}, expected (batch, time, embedding) with a chunk at least")
    hidden = weight_h.shape[-1]
    expected: dict[str, tuple[int, ...]] = {"weight_x": (2 * hidden, x.shape[2]), "weight_0": (2 * hidden, x.shape[2])}
    expected |= {"weight_h": (2 * hidden, hidden), "bias": (4 * hidden,), "length": (len(x),)}
    for name, value in zip(expected, (weight_x, weight_0, weight_h, bias, length), strict=True):
        if value is not None and value.shape != expected[name]:
            raise ValueError(f"idu: {name} has shape {tuple(value.shape)}, expected {expected[name]}")
    for name, chosen, known in (
        ("reset", reset, ("before", "after")),
        ("gate", gate, tuple(_GATES)),
        ("update", update, ("candidate", "state")),
    ):
        if chosen not in known:
            raise ValueError(f"idu: {name} is {chosen!r}, expected one of {', '.join(known)}")


# -------------------------------------------------------------------------------------------------------- layer
class IDU(nn.Module):
    """:func:`idu` with its weights: over one window, at every frame of a clip, and frame by frame.

    Every new chunk is the current one for the whole window, so a stream runs its window again at each frame; what each
    chunk adds by itself, :math:`W_{xz} x_t` and :math:`W_{xh} x_t`, is kept from frame to frame.

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

    def forward(self, x: Tensor, length: Tensor | None = None) -> Tensor:
        """h of the last chunk of each window, ``(batch, H)``."""
        options = dict(reset=self.reset, gate=self.gate, update=self.update)
        return idu(x, self.weight_x, self.weight_0, self.weight_h, self.bias, length, **options)  # type: ignore[arg-type]

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
        kept, seen = self.init_cache(len(x)) if cache is None else cache
        batch, count = x.shape[:2]
        if not count:
            return x.new_zeros(batch, 0, self.hidden), (kept, seen)
        given = torch.cat([kept, F.linear(x, self.weight_x)], 1)
        current = F.linear(x, self.weight_0)
        windows = given.unfold(1, self.window, 1).movedim(3, 2).reshape(batch * count, self.window, -1)
        length = (seen[:, None] + torch.arange(1, count + 1, device=x.device)).clamp(max=self.window)
        options = self.reset, self.gate, self.update
        h = _recur(windows, current.flatten(0, 1), self.weight_h, self.bias, length.flatten(), *options)
        after = given[:, count:], (seen + count).clamp(max=self.window)
        return h.reshape(batch, count, self.hidden), after

    def extra_repr(self) -> str:
        return (
            f"{self.embedding}, {self.hidden}, window={self.window}, bias={self.bias is not None}, "
            f"reset={self.reset!r}, gate={self.gate!r}, update={self.update!r}"
        )
