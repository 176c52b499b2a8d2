"""Linear layer with bias and activation in one pass: the matrix product under every other layer.

In this order: reference, function with its gradient, layer, fake.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native

Activation = Literal["none", "relu", "leaky_relu", "silu", "tanh", "sigmoid", "gelu", "elu", "softplus"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
    "softplus": F.softplus,
}
# What the kernel applies to the tile in cache, and its code there; the others are torch's own pass over the product.
_FUSED = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3, "tanh": 4, "sigmoid": 5, "gelu": 6, "elu": 7}
# Those whose backward pass takes the argument, not the result.
_KEEP_ARGUMENT = ("silu", "gelu", "elu")


# ---------------------------------------------------------------------------------------------------- reference
def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    """Plain PyTorch definition of :func:`linear`, with the same arguments."""
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}")
    _check(x, weight, bias)
    return _ACTIVATIONS[activation](F.linear(x, weight, bias))


# ----------------------------------------------------------------------------------------------------- function
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Activation = "none") -> Tensor:
    r"""Affine map of the last dimension, and an activation.

    .. math:: y = \phi(x W^\top + b)

    The product runs on packed panels of W with bias and activation applied while the result is in cache. The panels
    of a weight are made once and kept for as long as the weight lives (twice its memory, above 4096 elements, from the
    second call on or from the first large batch); they are made anew when its version counter
    or its memory changes, so in-place updates, optimizers, ``load_state_dict`` and ``copy_`` need nothing special.
    Writes that hide from the version counter (``weight.data.mul_(…)``, ``weight.numpy()[…] = …``) are noticed when
    they change the weight as a whole (16 of its elements are compared at every call), but not when they change a few
    elements: follow such a write by ``weight.data = weight.data.clone()``, or make it under ``torch.no_grad()``
    on ``weight`` itself.

    Args:
        x: ``(*batch, in_features)``, any strides.
        weight: W, ``(out_features, in_features)``.
        bias: b, ``(out_features,)``, or None.
        activation: φ: ``"none"``, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"silu"``, ``"tanh"``, ``"sigmoid"``,
            ``"gelu"`` (exact) and ``"elu"`` in the same pass; ``"softplus"`` in a second one, torch's own.

    Returns:
        y, ``(*batch, out_features)``, in x's dtype. float32 and float64 on the CPU run here. Other dtypes and devices
        run :func:`torch.nn.functional.linear`, and so do calls at which that is faster: processors without AVX2, and
        training with a weight of at least 2^20 elements at 256 rows or more. Under autocast the result is that of
        torch's function.

    Raises:
        ValueError: shapes that do not fit, or an unknown activation.
        TypeError: an argument that is no tensor, or dtypes that differ (outside autocast).

    Example:
        >>> import torch, pyflowgen
        >>> x, weight, bias = torch.randn(8, 3), torch.randn(5, 3), torch.randn(5)
        >>> y = pyflowgen.linear(x, weight, bias, "silu")
        >>> torch.allclose(y, torch.nn.functional.silu(x @ weight.T + bias), atol=1e-5)
        True
    """
    if not _use_kernel(x, weight, bias) or _torch_is_faster(x, weight, activation):
        return linear_reference(x, weight, bias, activation)
    if activation not in _FUSED:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}")
        return _ACTIVATIONS[activation](linear(x, weight, bias))
    try:
        if torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        ):
            return _apply(x, weight, bias, activation)
        return torch.ops.pyflowgen.linear.default(x, weight, bias, _FUSED[activation], _packed(x, weight))
    except (AttributeError, IndexError, RuntimeError):  # the operator checks everything; this finds the words
        _check(x, weight, bias)
        raise


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name == "bias"):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected (*batch, {weight.shape[1]}) for weight {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    if not torch.is_autocast_enabled(x.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise TypeError(f"{name} is {tensor.dtype}, expected x's {x.dtype}; convert it, or use torch.autocast")


def _use_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        isinstance(x, Tensor)
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and _native.use_kernel("linear", x)
        and not torch.is_autocast_enabled("cpu")
    )


# The plain copy of the kernels, for processors without AVX2, is no match for a BLAS.
_PLAIN = _native.build_info().get("instruction_set") == "baseline"
# A panel is two vectors wide.
_VECTOR_BYTES = {"avx2": 32, "avx512": 64}.get(_native.build_info().get("instruction_set", ""), 16)
# From here on (4 MB of float32 weights) a training step's two gradient products are memory-bound on panels made on the
# way: measured 0.95-1.0 of torch's speed at 256 rows and more, 1.0-1.5 below either bound.
_LARGE_WEIGHT, _LARGE_BATCH = 1 << 20, 256
# Below so many multiplications the call is the cost: a gradient in Python costs some 10 us more than torch's in C++
# (as much as the kernels gain on 4 million), the operator with its lookup of the panels 2 us (on 32 thousand).
_SMALL_WORK, _TINY_WORK = 1 << 22, 1 << 15


def _torch_is_faster(x: Tensor, weight: Tensor, activation: str) -> bool:
    """Whether to leave the call to torch's own product."""
    if _PLAIN:
        return True
    if torch.compiler.is_compiling():  # a bound on the batch would become a guard
        return False
    size, work = weight.numel(), x.numel() * weight.shape[0]
    if not torch.is_grad_enabled():
        return work < _TINY_WORK and activation == "none"
    return work < _SMALL_WORK or (size >= _LARGE_WEIGHT and work >= _LARGE_BATCH * size)


# id of a weight -> [weak reference to it, its version, its address, its panels or None]. Not an attribute of the
# weight, which would be pickled and copied with it.
_panels: dict[int, list] = {}
# Up to so many rows panels made on the way cost no more than panels made beforehand for one use.
_ONE_CHUNK = 112
# Panels of such a weight are made on the way in less time than it takes to look them up.
_SMALL_WEIGHT = 1 << 12


def _packed(x: Tensor, weight: Tensor) -> Tensor | None:
    """The panels of ``weight``; None when they do not pay: a small batch that meets this version for the first time."""
    if torch.compiler.is_compiling() or (type(weight) is not nn.Parameter and type(weight) is not Tensor):
        return None
    if weight.numel() <= _SMALL_WEIGHT or weight.is_inference():  # inference tensors have no version
        return None
    key, version, address = id(weight), weight._version, weight.data_ptr()
    entry = _panels.get(key)
    if entry is not None and entry[0]() is weight and entry[1] == version and entry[2] == address:
        if entry[3] is None:
            entry[3] = torch.ops.pyflowgen.linear_pack.default(weight.detach())
        return entry[3]
    panels = None
    if x.numel() > _ONE_CHUNK * weight.shape[1]:
        panels = torch.ops.pyflowgen.linear_pack.default(weight.detach())
    if entry is not None and entry[0]() is weight:
        reference = entry[0]
    else:
        reference = weakref.ref(weight, lambda dead: _forget(key, dead))
    _panels[key] = [reference, version, address, panels]
    return panels


def _forget(key: int, dead: weakref.ref[Tensor]) -> None:
    entry = _panels.get(key)
    if entry is not None and entry[0] is dead:  # else the id belongs to another weight by now
        del _panels[key]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation):  # type: ignore[no-untyped-def]
        ctx.activation = activation
        args = x, weight, bias, _FUSED[activation], _packed(x, weight)
        if activation in _KEEP_ARGUMENT:
            y, saved = torch.ops.pyflowgen.linear_keep.default(*args)
        else:
            y = torch.ops.pyflowgen.linear.default(*args)
            saved = None if activation == "none" else y
        ctx.save_for_backward(x, weight, bias, saved)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        x, weight, bias, saved = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            dz = dy
            if ctx.activation != "none":
                z = F.linear(x, weight, bias)
                z = z if z.requires_grad else z.requires_grad_()
                (dz,) = torch.autograd.grad(_ACTIVATIONS[ctx.activation](z), z, dy, create_graph=True)
            rows = dz.reshape(-1, dz.shape[-1])
            dx = dz @ weight if need_dx else None
            dweight = rows.T @ x.reshape(-1, x.shape[-1]) if need_dweight else None
            dbias = rows.sum(0) if need_dbias else None
            return dx, dweight, dbias, None
        dx, dweight, dbias = torch.ops.pyflowgen.linear_backward.default(
            dy, x, weight, saved, _FUSED[ctx.activation], need_dx, need_dweight, need_dbias
        )
        return dx if need_dx else None, dweight if need_dweight else None, dbias if need_dbias else None, None


_apply = _native.applier(_Linear)


# -------------------------------------------------------------------------------------------------------- layer
class Linear(nn.Linear):
    """:class:`torch.nn.Linear` with an activation in the same pass; see :func:`linear`.

    Parameters, initialisation and ``state_dict`` are those of ``torch.nn.Linear``.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.Linear(3, 5, activation="relu")
        >>> plain = torch.nn.Linear(3, 5)
        >>> _ = plain.load_state_dict(layer.state_dict())
        >>> x = torch.randn(8, 3)
        >>> torch.allclose(layer(x), plain(x).relu(), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation: Activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.activation == "none" else f", activation={self.activation!r}")


# -------------------------------------------------------------------------------------------------------- fake
def _fake(x, weight, bias, activation, packed=None):  # type: ignore[no-untyped-def]
    _check(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_keep(x, weight, bias, activation, packed=None):  # type: ignore[no-untyped-def]
    y = _fake(x, weight, bias, activation)  # type: ignore[no-untyped-call]
    return y, torch.empty_like(y)


def _fake_backward(dy, x, weight, saved, activation, need_dx, need_dweight, need_dbias):  # type: ignore[no-untyped-def]
    return (
        x.new_empty(x.shape) if need_dx else x.new_empty(0),
        x.new_empty(weight.shape) if need_dweight else x.new_empty(0),
        x.new_empty(weight.shape[0]) if need_dbias else x.new_empty(0),
    )


def _fake_pack(weight):  # type: ignore[no-untyped-def]
    out_features, in_features = weight.shape
    width = 2 * _VECTOR_BYTES // weight.element_size()
    return weight.new_empty((out_features + width - 1) // width * in_features * width)


_native.register("linear", _fake)
_native.register("linear_pack", _fake_pack)
_native.register("linear_keep", _fake_keep)
_native.register("linear_backward", _fake_backward)
