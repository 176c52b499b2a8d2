"""What couplings share, whatever their map: the split by a mask, argument checks, gradients through a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pyflowgen.bijection import Bijection

Mask = Literal["halves", "channel", "interleaved", "checkerboard"]

_MASKS = ("halves", "channel", "interleaved", "checkerboard")

# A coupling and its conditioner in one operator, or None where there is none for them; `ops.mlp_coupling`, which stands
# on the ops of the single couplings, puts itself here.
whole_layer: Callable[[Any, Tensor, Tensor | None, bool], tuple[Tensor, Tensor] | None] | None = None


# A conditioner of images in one operator, or None where it is none that there is one for; `ops.conv_net` is put here.
conv_conditioner: Callable[[nn.Module, Tensor], Tensor | None] | None = None


def hooked(module: nn.Module) -> bool:
    """Whether a call of the module is more than its `forward`."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def conditioned(conditioner: nn.Module, same: Tensor, context: Tensor | None) -> Tensor:
    """What the conditioner gives for the part that stays."""
    if context is not None:
        with_context: Tensor = conditioner(same, context)
        return with_context
    found = conv_conditioner(conditioner, same) if conv_conditioner is not None and same.dim() == 4 else None
    return conditioner(same) if found is None else found


def check_tensors(x: Tensor, **others: Tensor | None) -> None:
    """A floating-point x, and the others of its dtype on its device."""
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected x's {x.dtype} on {x.device}; "
                "convert it, or use torch.autocast"
            )


def expand_mask(mask: Tensor | None, x: Tensor, dim: int, part: tuple[int, int] | None) -> Tensor | None:
    """The mask in x's event shape, which begins at dimension `dim`."""
    if mask is None:
        return None
    if part is not None:
        raise ValueError("mask and part exclude each other")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.device != x.device:
        raise ValueError(f"mask must be a bool tensor on {x.device}")
    try:
        return mask.expand(x.shape[dim:])
    except RuntimeError:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, expected x's event shape {tuple(x.shape[dim:])}"
        ) from None


def reference_gradients(
    reference: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    rest: Sequence[Any],
    incoming: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients of `reference(*tensors, *rest)` that can be differentiated again (``create_graph=True``)."""
    inputs = [t for t, need in zip(tensors, needs, strict=False) if need and t is not None]
    outputs = reference(*tensors, *rest)
    pairs = [(o, g) for o, g in zip(outputs, incoming, strict=True) if g is not None and o.requires_grad]
    grads = iter(
        torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True)
        if pairs
        else [None] * len(inputs)
    )
    return [next(grads) if need and t is not None else None for t, need in zip(tensors, needs, strict=False)]


class Coupling(Bijection):
    """Split by a mask, condition on one part, transform the other; one pass over x whatever the mask."""

    def __init__(
        self, conditioner: nn.Module, *, mask: Mask | Tensor = "halves", swap: bool = False, event_dim: int = 1
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not callable(conditioner):
            raise TypeError(f"{name}: conditioner is {type(conditioner).__name__}, expected a module")
        if event_dim < 1:
            raise ValueError(f"{name}: event_dim is {event_dim}, expected at least 1")
        if isinstance(mask, Tensor):
            if mask.dtype != torch.bool or mask.dim() > event_dim:
                raise ValueError(
                    f"{name}: mask is {mask.dtype} of shape {tuple(mask.shape)}, "
                    f"expected bool of at most event_dim={event_dim} dimensions"
                )
        elif mask not in _MASKS:
            raise ValueError(f"{name}: mask is {mask!r}, expected one of {_MASKS} or a bool tensor")
        elif mask == "checkerboard" and event_dim < 2:
            raise ValueError(f"{name}: mask 'checkerboard' needs images, event_dim at least 2, got {event_dim}")
        self.conditioner, self.swap, self.event_dim = conditioner, swap, event_dim
        self.mask = "tensor" if isinstance(mask, Tensor) else mask
        self.transformed: Tensor
        transformed = mask.logical_xor(torch.tensor(swap)) if isinstance(mask, Tensor) else torch.empty(0)
        self.register_buffer("transformed", transformed, persistent=isinstance(mask, Tensor))

    def _parameters_and_part(
        self, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, tuple[int, int] | None, Tensor | None]:
        """(conditioner's output, part, mask): what it is given is the part that stays as it is."""
        dim = x.dim() - self.event_dim
        if dim < 0:
            raise ValueError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected {self.event_dim} event dims"
            )
        channels = x.shape[dim]
        part, mask = None, None
        if self.mask in ("checkerboard", "tensor"):
            mask = self._checkerboard(x) if self.mask == "checkerboard" else self.transformed
            same = torch.where(mask, 0, x)
        else:
            if channels < 2:
                raise ValueError(
                    f"{type(self).__name__}: x has shape {tuple(x.shape)}, "
                    f"expected at least 2 channels for mask {self.mask!r}"
                )
            if self.mask == "interleaved":
                part = (0, 2) if self.swap else (1, 2)
                same = x[(slice(None),) * dim + (slice(1 - part[0], None, 2),)]
            else:  # the first half has the odd channel
                first = channels - channels // 2
                part = (0, 1) if self.swap else (first, 1)
                same = x.narrow(dim, first, channels - first) if self.swap else x.narrow(dim, 0, first)
        return conditioned(self.conditioner, same, context), part, mask

    def _transform(
        self, x: Tensor, params: Tensor, part: tuple[int, int] | None, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        if self.event_dim == 1 and whole_layer is not None:
            result = whole_layer(self, x, context, inverse)
            if result is not None:
                return result
        return self._transform(x, *self._parameters_and_part(x, context), inverse)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(y, context, inverse=True)

    def rebuild(
        self, y: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.event_dim == 1 and whole_layer is not None:  # twice in one operator costs less than once in parts
            with torch.no_grad():
                result = whole_layer(self, y, context, not inverse)
            if result is not None:
                x = result[0].requires_grad_()
                return x, *self.forward(x, context, inverse=inverse)
        x = y.detach().requires_grad_()  # the conditioner sees the part that x and y share: once is enough
        params, part, mask = self._parameters_and_part(x, context)
        with torch.no_grad():
            x.data = self._transform(y, params, part, mask, not inverse)[0]
        return x, *self._transform(x, params, part, mask, inverse)

    def _checkerboard(self, x: Tensor) -> Tensor:
        """True where row + column is odd (even when swapped), of the last two dimensions."""
        h, w = x.shape[-2:]
        if self.transformed.shape != (h, w) or self.transformed.device != x.device:
            rows, columns = torch.arange(h, device=x.device), torch.arange(w, device=x.device)
            self.transformed = (rows[:, None] + columns) % 2 == (0 if self.swap else 1)
        return self.transformed

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, swap={self.swap}, event_dim={self.event_dim}"
