"""Sign and log-determinant of batches of small matrices, and their gradient.

In this order: reference, function with its gradient, fake.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflowgen import _native

_LARGEST = 64  # of the kernels; beyond it torch's own LU, blocked and one matrix at a time, is as good


# ---------------------------------------------------------------------------------------------------- reference
def slogdet_reference(a: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`slogdet`, with the same arguments."""
    return _reference(_argument(a))


def _reference(a: Tensor) -> tuple[Tensor, Tensor]:
    if a.dtype in (torch.bfloat16, torch.float16):
        a = a.float()
    sign, logabsdet = torch.linalg.slogdet(a)
    return sign, logabsdet


# ----------------------------------------------------------------------------------------------------- function
def slogdet(a: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sign and logarithm of the absolute value of the determinant of every matrix of a batch.

    .. math:: \det a = \mathrm{sign} \cdot e^{\mathrm{logabsdet}} \qquad
              \frac{\partial\,\mathrm{logabsdet}}{\partial a} = a^{-\top}

    As :func:`torch.linalg.slogdet`, for real matrices. Kernels take matrices up to 64 × 64, larger ones go to torch.
    They eliminate with partial pivoting in float64 whatever the dtype, so float32 results err by their own rounding;
    only ``a`` is kept for the backward pass, which eliminates once more and gives :math:`a^{-\top}` at once.

    Args:
        a: ``(*batch, n, n)``, float64, float32, bfloat16 or float16, any strides.

    Returns:
        ``(sign, logabsdet)``, both of the batch's shape, in a's dtype, float32 for 16-bit matrices. A singular matrix
        has sign 0 and logabsdet ``-inf`` and no finite gradient; NaN gives sign 0 and logabsdet NaN, as torch has it.
        The sign has no gradient.

    Raises:
        ValueError: a is no batch of square matrices.
        TypeError: a is no floating-point tensor.

    References:
        Golub, Van Loan, *Matrix Computations*, 4th edition 2013, sections 3.4 and 3.2.

    Example:
        >>> import torch, pyflowgen
        >>> a = torch.tensor([[[2.0, 0.0], [0.0, -3.0]], [[0.0, 1.0], [0.0, 1.0]]])
        >>> sign, logabsdet = pyflowgen.slogdet(a)
        >>> sign + 0, logabsdet  # torch's own zero may be negative
        (tensor([-1.,  0.]), tensor([1.7918,   -inf]))
    """
    a = _argument(a)
    if not 1 <= a.shape[-1] <= _LARGEST or not _native.use_kernel("slogdet", a):
        return _reference(a)
    if torch.is_grad_enabled() and a.requires_grad:
        sign, logabsdet = _apply(a)
        return sign, logabsdet
    sign, logabsdet = torch.ops.pyflowgen.slogdet(a)
    return sign, logabsdet


def _argument(a: Tensor) -> Tensor:
    if not isinstance(a, Tensor):
        raise TypeError(f"a must be a tensor, got {type(a).__name__}")
    if not a.is_floating_point():
        raise TypeError(f"a must be a floating-point tensor, got {a.dtype}")
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a has shape {tuple(a.shape)}, expected (*batch, n, n)")
    if torch.is_autocast_enabled(a.device.type):  # a log-determinant is not for half precision
        a = a.float()
    return a


class _Slogdet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(a)
        ctx.set_materialize_grads(False)
        sign, logabsdet = torch.ops.pyflowgen.slogdet(a)
        ctx.mark_non_differentiable(sign)
        return sign, logabsdet

    @staticmethod
    def backward(ctx, _, dlogabsdet):  # type: ignore[no-untyped-def]
        (a,) = ctx.saved_tensors
        if dlogabsdet is None:
            return None
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            return torch.autograd.grad(_reference(a)[1], a, dlogabsdet, create_graph=True)[0]
        return torch.ops.pyflowgen.slogdet_backward(dlogabsdet, a)


_apply = _native.applier(_Slogdet)


# -------------------------------------------------------------------------------------------------------- fake
def _fake(a):  # type: ignore[no-untyped-def]
    dtype = torch.float32 if a.dtype in (torch.bfloat16, torch.float16) else a.dtype
    return a.new_empty(a.shape[:-2], dtype=dtype), a.new_empty(a.shape[:-2], dtype=dtype)


def _fake_backward(dlogabsdet, a):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape)


_native.register("slogdet", _fake)
_native.register("slogdet_backward", _fake_backward)
