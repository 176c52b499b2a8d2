"""Invertible linear map of the channels: Glow's 1x1 convolution with the scale and shift before it.

In this order: reference, function with its gradient, layers, fake.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen.bijection import Bijection, batch_shape

Factor = Literal["lu", "dense"]

# csrc/invertible_linear.h: beyond, torch's own product and solves run.
_MOST_CHANNELS = 64


# ---------------------------------------------------------------------------------------------------- reference
def _triangles(weight: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """L and U of the packed form."""
    lower = weight.tril(-1) + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    return lower, weight.triu(1) + torch.diag(sign * weight.diagonal().exp())


def _matrix(weight: Tensor, permutation: Tensor | None, sign: Tensor | None) -> Tensor:
    """W."""
    if permutation is None or sign is None:
        return weight
    lower, upper = _triangles(weight, sign)
    return (lower @ upper)[permutation]


def _reference(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    sign: Tensor | None,
    head: int,
    inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, in the operator's own arguments."""
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):
        x, weight = x.float(), weight.float()
        log_scale, shift, sign = (None if t is None else t.float() for t in (log_scale, shift, sign))
    dim, channels = x.dim() - event_dim, x.shape[x.dim() - event_dim]
    per_channel = (channels,) + (1,) * (event_dim - 1)
    if permutation is None:  # a product of many factors: in float64
        logabs = torch.linalg.slogdet(weight.double()).logabsdet.to(weight.dtype)
    else:
        logabs = weight.diagonal().sum()
    if log_scale is not None:
        logabs = logabs + log_scale.sum()
    logdet = (logabs * math.prod(x.shape[dim + 1 :])).expand(x.shape[:dim])
    if inverse:
        v = x.movedim(dim, 0).reshape(channels, -1)
        if permutation is None or sign is None:
            z = torch.linalg.solve(weight, v)
        else:
            lower, upper = _triangles(weight, sign)
            z = torch.linalg.solve_triangular(lower, v[permutation.argsort()], upper=False, unitriangular=True)
            z = torch.linalg.solve_triangular(upper, z, upper=True)
        y = z.reshape(channels, *x.shape[:dim], *x.shape[dim + 1 :]).movedim(0, dim)
        y = y if shift is None else y - shift.reshape(per_channel)
        y = y if log_scale is None else y * (-log_scale).exp().reshape(per_channel)
        logdet = -logdet
    else:
        z = x if log_scale is None else x * log_scale.exp().reshape(per_channel)
        z = z if shift is None else z + shift.reshape(per_channel)
        matrix = _matrix(weight, permutation, sign)
        y = F.linear(z, matrix) if event_dim == 1 else (matrix @ z.flatten(dim + 1)).reshape(x.shape)
    y = y.to(dtype)
    return y, logdet, y.narrow(dim, 0, head)


def invertible_linear_reference(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    sign: Tensor | None = None,
    inverse: bool = False,
    event_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`invertible_linear`, with the same arguments."""
    return _reference(*_arguments(x, weight, log_scale, shift, permutation, sign, 0, inverse, event_dim))[:2]


# ----------------------------------------------------------------------------------------------------- function
def invertible_linear(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    sign: Tensor | None = None,
    inverse: bool = False,
    event_dim: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Invertible linear map of the channels at every position, with its log-determinant.

    .. math:: y_p = W\,(e^{s} \odot x_p + t) \qquad \log|\det| = P\,\Bigl(\log|\det W| + \sum_c s_c\Bigr)

    with :math:`P` positions (1 for vectors, :math:`H W` for images), :math:`s` = ``log_scale`` and :math:`t` =
    ``shift``. With s and t it is Glow's ActNorm and 1×1 convolution in one pass, forward and backward; the parameters'
    gradients are summed in that pass. The inverse goes by triangular solves; no inverse matrix is formed.

    W is ``weight`` itself, or, with ``permutation`` and ``sign``, an LU factorisation in ``weight`` as LAPACK packs it:
    the strict lower triangle is that of L, which has a unit diagonal, the strict upper triangle that of U, and the
    diagonal holds :math:`\log|u_{ii}|`. Then row i of W is row ``permutation[i]`` of :math:`L U`,
    :math:`u_{ii} = \mathrm{sign}_i\,e^{w_{ii}}` and :math:`\log|\det W| = \sum_i w_{ii}`.

    Args:
        x: ``(*batch, C)``, or with event_dim 3 ``(*batch, C, H, W)``; float64, float32, bfloat16 or float16.
        weight: ``(C, C)``.
        log_scale: s, ``(C,)``, or None for 0.
        shift: t, ``(C,)``, or None for 0.
        permutation: integers 0…C-1, each once, or None for a dense W.
        sign: ±1, ``(C,)``, with ``permutation``.
        inverse: apply the inverse map and return its log-determinant.
        event_dim: number of trailing dimensions of an event, the channel being the first of them.

    The kernels take up to 64 channels; beyond, torch's products and solves run, which are as fast there. Matrices are
    factorised and multiplied in float64 whatever the dtype. A singular W has log-determinant -inf.

    Returns:
        ``(y, logdet)``: y of x's shape and dtype, logdet of the batch's shape, in float32 for 16-bit inputs.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, named with what was expected.
        TypeError: an argument that is no floating-point tensor.

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1×1 Convolutions*, 2018, section 3.2.

    Example:
        >>> import torch, pyflowgen
        >>> x, weight = torch.randn(8, 3, 4, 4), torch.linalg.qr(torch.randn(3, 3)).Q
        >>> y, logdet = pyflowgen.invertible_linear(x, weight, event_dim=3)
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, weight[:, :, None, None]), atol=1e-5)
        True
        >>> back, minus = pyflowgen.invertible_linear(y, weight, event_dim=3, inverse=True)
        >>> torch.allclose(back, x, atol=1e-5), torch.allclose(logdet, torch.zeros(8), atol=1e-4)
        (True, True)
    """
    return invertible_linear_head(x, weight, log_scale, shift, permutation, sign, 0, inverse, event_dim)[:2]


def invertible_linear_head(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    sign: Tensor | None,
    head: int,
    inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`invertible_linear`, and its result's first ``head`` channels once more.

    From the kernel they are a tensor of their own, channels last where x is an image: what a convolution reads fastest.
    Their gradient is added to y's on the way back, not by a pass of its own.
    """
    args = _arguments(x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim)
    x, weight, log_scale, shift = args[:4]
    if len(weight) > _MOST_CHANNELS or not _native.use_kernel("invertible_linear", x):
        return _reference(*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:4]):
        y, logdet, part = _apply(*args)
    else:
        y, logdet, part = torch.ops.pyflowgen.invertible_linear(*args)
    return y, logdet, part


def _arguments(
    x: Tensor,
    weight: Tensor,
    log_scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    sign: Tensor | None,
    head: int,
    inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, int, bool, int]:
    """Check everything once and return the operator's arguments; nothing is changed before all is known to fit."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        raise TypeError(f"x and weight must be tensors, got {type(x).__name__} and {type(weight).__name__}")
    if not 1 <= event_dim <= x.dim():
        raise ValueError(f"event_dim must be between 1 and x's {x.dim()} dimensions, got {event_dim}")
    if torch.is_autocast_enabled(x.device.type):  # a log-determinant is not for half precision
        x, weight = x.float(), weight.float()
        log_scale, shift, sign = (None if t is None else t.float() for t in (log_scale, shift, sign))
    channels = x.shape[x.dim() - event_dim]
    if channels < 1:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected at least 1 channel on dimension {-event_dim}")
    if (permutation is None) != (sign is None):
        raise ValueError("permutation and sign come together, for a packed LU factorisation, or not at all")
    for name, tensor, shape in (
        ("x", x, x.shape),
        ("weight", weight, (channels, channels)),
        ("log_scale", log_scale, (channels,)),
        ("shift", shift, (channels,)),
        ("sign", sign, (channels,)),
    ):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, expected x's {x.dtype} on {x.device}; "
                "convert it, or use torch.autocast"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"for the {channels} channels of x, shape {tuple(x.shape)}"
            )
    if permutation is not None and (
        permutation.dtype != torch.int64 or permutation.shape != (channels,) or permutation.device != x.device
    ):
        raise ValueError(
            f"permutation is {permutation.dtype} of shape {tuple(permutation.shape)} on {permutation.device}, "
            f"expected torch.int64 of shape ({channels},) on {x.device}"
        )
    return x, weight, log_scale, shift, permutation, sign, head, bool(inverse), event_dim


class _InvertibleLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim):  # type: ignore[no-untyped-def]
        ctx.options = head, inverse, event_dim
        ctx.set_materialize_grads(False)
        args = x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim
        y, logdet, part = torch.ops.pyflowgen.invertible_linear(*args)
        ctx.save_for_backward(x, y if inverse else None, weight, log_scale, shift, permutation, sign)
        return y, logdet, part

    @staticmethod
    def backward(ctx, dy, dlogdet, dpart):  # type: ignore[no-untyped-def]
        x, y, weight, log_scale, shift, permutation, sign = ctx.saved_tensors
        head, inverse, event_dim = ctx.options
        dpart = dpart if head else None
        needed = ctx.needs_input_grad[:4]
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            inputs = [t for t, need in zip((x, weight, log_scale, shift), needed, strict=True) if need]
            outputs = _reference(x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim)
            pairs = [
                (o, g) for o, g in zip(outputs, (dy, dlogdet, dpart), strict=True) if g is not None and o.requires_grad
            ]
            grads = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True
                )
                if pairs
                else [None] * len(inputs)
            )
            return *(next(grads) if need else None for need in needed), None, None, None, None, None
        found = torch.ops.pyflowgen.invertible_linear_backward(
            dy, dlogdet, dpart, y if inverse else x, weight, log_scale, shift, permutation, sign, inverse, event_dim
        )
        return *(g if need else None for g, need in zip(found, needed, strict=True)), None, None, None, None, None


_apply = _native.applier(_InvertibleLinear)


# ------------------------------------------------------------------------------------------------------- layers
class InvertibleLinear(Bijection):
    r"""Linear map of the channels by a learned invertible matrix, :math:`y = W x`.

    .. math:: \log|\det| = P \log|\det W|, \qquad W = P_0 L\,(U + \mathrm{diag}(\pm e^{\,\ell}))

    Args:
        features: number of channels C.
        event_dim: number of trailing dimensions of an event, the channel being the first of them: 1 for `(..., C)`, 3
            for `(..., C, H, W)`, where it is a 1×1 convolution (:class:`Invertible1x1Conv`).
        factor: what is learned: `"lu"`, the triangular factors of a decomposition whose permutation :math:`P_0` and
            signs stay fixed, so that W cannot become singular; or `"dense"`, W itself.
        generator: of the random rotation that W starts as.

    ``weight`` is W, or with `"lu"` both factors packed as in :func:`invertible_linear`; ``matrix()`` gives W.

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1×1 Convolutions*, 2018, section 3.2.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.InvertibleLinear(4)
        >>> x = torch.randn(5, 4)
        >>> y, logdet = layer(x)
        >>> torch.allclose(y, x @ layer.matrix().T, atol=1e-5), torch.allclose(layer.inverse(y)[0], x, atol=1e-5)
        (True, True)
    """

    permutation: Tensor | None
    sign: Tensor | None

    def __init__(
        self,
        features: int,
        *,
        event_dim: int = 1,
        factor: Factor = "lu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if features < 1 or event_dim < 1:
            raise ValueError(f"{name}: features={features}, event_dim={event_dim}, expected both at least 1")
        if factor not in ("lu", "dense"):
            raise ValueError(f"{name}: factor is {factor!r}, expected 'lu' or 'dense'")
        self.features, self.event_dim, self.factor = features, event_dim, factor
        q, r = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64))
        rotation = q * r.diagonal().sign()  # uniform over all rotations (Mezzadri, 2007)
        weight, permutation, sign = rotation, None, None
        if factor == "lu":
            p, lower, upper = torch.linalg.lu(rotation)
            diagonal = upper.diagonal()
            permutation, sign = p.argmax(1), diagonal.sign().to(torch.get_default_dtype())
            weight = lower.tril(-1) + upper.triu(1) + torch.diag(diagonal.abs().log())
        self.weight = nn.Parameter(weight.to(torch.get_default_dtype()))
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", sign)

    def matrix(self) -> Tensor:
        """W, differentiable."""
        return _matrix(self.weight, self.permutation, self.sign)

    def forward(self, x: Tensor, context: Tensor | None = None, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
        batch_shape(x, self.event_dim, self)
        return invertible_linear(
            x, self.weight, permutation=self.permutation, sign=self.sign, inverse=inverse, event_dim=self.event_dim
        )

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.forward(y, context, inverse=True)

    def extra_repr(self) -> str:
        return f"{self.features}, event_dim={self.event_dim}, factor={self.factor!r}"


class Invertible1x1Conv(InvertibleLinear):
    r"""Invertible 1×1 convolution of images `(..., C, H, W)`: :class:`InvertibleLinear` with ``event_dim=3``.

    .. math:: y_{hw} = W x_{hw}, \qquad \log|\det| = H W \log|\det W|

    Args:
        features, factor, generator: as in :class:`InvertibleLinear`.

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1×1 Convolutions*, 2018, section 3.2.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.Invertible1x1Conv(4, factor="dense")
        >>> y, logdet = layer(torch.randn(5, 4, 8, 8))
        >>> y.shape, torch.allclose(logdet, torch.zeros(5), atol=1e-3)  # a rotation keeps volume
        (torch.Size([5, 4, 8, 8]), True)
    """

    def __init__(self, features: int, *, factor: Factor = "lu", generator: torch.Generator | None = None) -> None:
        super().__init__(features, event_dim=3, factor=factor, generator=generator)


# -------------------------------------------------------------------------------------------------------- fake
def _channels_last(x: Tensor, head: int, dim: int) -> Tensor:
    rest = [*x.shape[:dim], *x.shape[dim + 1 :]]
    return x.new_empty([*rest, head]).movedim(-1, dim) if head else x.new_empty(0)


def _fake(x, weight, log_scale, shift, permutation, sign, head, inverse, event_dim):  # type: ignore[no-untyped-def]
    dtype, dim = torch.promote_types(x.dtype, torch.float32), x.dim() - event_dim
    return torch.empty_like(x), x.new_empty(x.shape[:dim], dtype=dtype), _channels_last(x, head, dim)


def _fake_backward(dy, dlogdet, dpart, x, weight, log_scale, shift, permutation, sign, inverse, event_dim):  # type: ignore[no-untyped-def]
    optional = (x.new_empty(0) if t is None else x.new_empty(t.shape) for t in (log_scale, shift))
    return torch.empty_like(x), x.new_empty(weight.shape), *optional


_native.register("invertible_linear", _fake)
_native.register("invertible_linear_backward", _fake_backward)
