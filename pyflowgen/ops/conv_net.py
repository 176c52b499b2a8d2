"""The conditioner of an image coupling, three convolutions of which the middle one is 1x1, in one operator.

In this order: reference, function with its gradient, what couplings ask for, fake.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native, coupling
from pyflowgen.coupling import hooked, reference_gradients

ConvActivation = Literal["relu", "leaky_relu", "tanh", "sigmoid"]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,  # on what a convolution has just given
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
_CODES = {"relu": 1, "leaky_relu": 2, "tanh": 4, "sigmoid": 5}


# ---------------------------------------------------------------------------------------------------- reference
def conv_net_reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    activation: ConvActivation = "relu",
) -> Tensor:
    """Plain PyTorch definition of :func:`conv_net`, with the same arguments."""
    _check(x, weight1, bias1, weight2, bias2, weight3, bias3, activation)
    return _reference(x, weight1, bias1, weight2, bias2, weight3, bias3, activation)


def _reference(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    activation: str,
) -> Tensor:
    phi = _ACTIVATIONS[activation]
    images = x.reshape(-1, *x.shape[-3:])
    if x.device.type == "cpu" and not _native.transforms_active():  # where it is the faster format; vmap has it not
        images = images.contiguous(memory_format=torch.channels_last)
    h = phi(F.conv2d(images, weight1, bias1, padding=weight1.shape[-1] // 2))
    h = phi(F.conv2d(h, weight2, bias2))
    y = F.conv2d(h, weight3, bias3, padding=weight3.shape[-1] // 2)
    return y.reshape(*x.shape[:-3], *y.shape[-3:])


# ----------------------------------------------------------------------------------------------------- function
def conv_net(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    activation: ConvActivation = "relu",
) -> Tensor:
    r"""Three convolutions that keep height and width, the middle one 1×1: the network inside Glow's couplings.

    .. math:: y = W_3 * \phi(W_2\,\phi(W_1 * x + b_1) + b_2) + b_3

    A perceptron over pixels: the first convolution is a matrix product with every pixel's window, the last one a
    product whose columns, one for each tap and channel, are added up where they belong. Blocks of pixels go through all
    three products while they are in cache; both hidden layers are kept for the backward pass. Results are the same for
    any number of threads. :class:`pyflowgen.ConvNet` calls it by itself, and so do couplings of images whose
    conditioner is ``nn.Sequential(Conv2d, activation, Conv2d, activation, Conv2d)`` of this form.

    Args:
        x: ``(*batch, C, H, W)``; channels last in memory is read as it is, anything else copied first.
        weight1: ``(hidden1, C, k, k)``, k odd: padded by k // 2 zeros on every side.
        bias1: ``(hidden1,)`` or None.
        weight2: ``(hidden2, hidden1, 1, 1)``.
        bias2: ``(hidden2,)`` or None.
        weight3: ``(out, hidden2, k, k)``, k odd.
        bias3: ``(out,)`` or None.
        activation: φ, ``"relu"``, ``"leaky_relu"`` (slope 0.01), ``"tanh"`` or ``"sigmoid"``.

    Returns:
        y, ``(*batch, out, H, W)`` of x's dtype, on the CPU with the channels last in memory. float32 and float64 on the
        CPU run here; other dtypes and devices, autocast, empty tensors and processors without AVX2 run torch's
        convolutions.

    Raises:
        ValueError: a shape that does not fit, or an unknown activation.
        TypeError: an argument that is no tensor, or dtypes that differ (outside autocast).

    References:
        Kingma, Dhariwal, *Glow: Generative Flow with Invertible 1×1 Convolutions*, 2018, section 3.3.

    Example:
        >>> import torch, pyflowgen
        >>> first, middle, last = (torch.nn.Conv2d(*n, padding=n[2] // 2) for n in ((2, 8, 3), (8, 8, 1), (8, 4, 3)))
        >>> x = torch.randn(5, 2, 6, 6)
        >>> layers = (first.weight, first.bias, middle.weight, middle.bias, last.weight, last.bias)
        >>> y = pyflowgen.conv_net(x, *layers)
        >>> torch.allclose(y, last(middle(first(x).relu()).relu()), atol=1e-5)
        True
    """
    _check(x, weight1, bias1, weight2, bias2, weight3, bias3, activation)
    arguments = x, weight1, bias1, weight2, bias2, weight3, bias3
    if not _runs(*arguments):
        return _reference(*arguments, activation)
    images = x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:])
    given = images, *arguments[1:]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        y = cast(Tensor, _ConvNet.apply(*given, activation))  # type: ignore[no-untyped-call]
    else:
        y = torch.ops.pyflowgen.conv_net.default(*given, _CODES[activation], False)[0]
    return y if x.dim() == 4 else y.reshape(*x.shape[:-3], *y.shape[-3:])


# The plain copy of the kernels, for processors without AVX2, is no match for oneDNN.
_PLAIN = _native.build_info().get("instruction_set") == "baseline"


def _runs(x: Tensor, *layers: Tensor | None) -> bool:
    return (
        not _PLAIN
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and _native.use_kernel("conv_net", x)
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and all(t is None or t.numel() > 0 for t in layers)
    )


def _check(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    weight3: Tensor,
    bias3: Tensor | None,
    activation: str,
) -> None:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(_ACTIVATIONS)}, got {activation!r}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dim() < 3:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (*batch, channels, height, width)")
    autocast = torch.is_autocast_enabled(x.device.type)
    channels = x.shape[-3]
    for i, (weight, bias) in enumerate(((weight1, bias1), (weight2, bias2), (weight3, bias3)), 1):
        for name, tensor in ((f"weight{i}", weight), (f"bias{i}", bias)):
            if tensor is None and name[0] == "b":
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.device != x.device or (tensor.dtype != x.dtype and not autocast):
                raise TypeError(
                    f"{name} is {tensor.dtype} on {tensor.device}, expected x's {x.dtype} on {x.device}; "
                    "convert it, or use torch.autocast"
                )
        square = weight.dim() == 4 and weight.shape[2] == weight.shape[3] and weight.shape[3] % 2 == 1
        if not square or weight.shape[1] != channels or (i == 2 and weight.shape[3] != 1):
            kernel = "1, 1" if i == 2 else "k, k"
            raise ValueError(
                f"weight{i} has shape {tuple(weight.shape)}, expected (out, {channels}, {kernel})"
                f"{'' if i == 2 else ' with odd k'} for {channels} channels"
            )
        channels = weight.shape[0]
        if bias is not None and bias.shape != (channels,):
            raise ValueError(f"bias{i} has shape {tuple(bias.shape)}, expected ({channels},)")


class _ConvNet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight1, bias1, weight2, bias2, weight3, bias3, activation):  # type: ignore[no-untyped-def]
        ctx.activation = activation
        given = x, weight1, bias1, weight2, bias2, weight3, bias3
        y, kept = torch.ops.pyflowgen.conv_net.default(*given, _CODES[activation], True)
        ctx.save_for_backward(*given, kept)
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        *given, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            found = reference_gradients(lambda *args: (_reference(*args),), given, needs, (ctx.activation,), [dy])
            return *found, None
        found = torch.ops.pyflowgen.conv_net_backward.default(
            dy, *given, kept, _CODES[ctx.activation], needs[0], any(needs[1:])
        )
        return *(g if need else None for g, need in zip(found, needs, strict=False)), None


# ----------------------------------------------------------------------------------- what couplings ask for
_LAYERS: dict[type[nn.Module], ConvActivation] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
}


def _same_padded(layer: nn.Module) -> bool:
    """Whether the layer is a convolution that :func:`conv_net` knows, and no more than that."""
    conv: Any = layer
    if type(layer) is not nn.Conv2d or hooked(layer):
        return False
    side = conv.kernel_size[0]
    padded = conv.padding == "same" or conv.padding == (side // 2, side // 2)
    plain = conv.stride == conv.dilation == (1, 1) and conv.groups == 1
    zeros = conv.padding_mode == "zeros" or side == 1
    return bool(conv.kernel_size == (side, side) and side % 2 and padded and plain and zeros)


def conditioner(net: nn.Module, x: Tensor) -> Tensor | None:
    """``net(x)`` where ``net`` is `nn.Sequential` of the three convolutions and two activations; else None."""
    if type(net) is not nn.Sequential or len(net) != 5 or x.dim() != 4 or hooked(net):
        return None
    first, phi, middle, phi2, last = net
    name = _LAYERS.get(type(phi))
    if (
        name is None
        or type(phi) is not type(phi2)
        or hooked(phi)
        or hooked(phi2)
        or (name == "leaky_relu" and not phi.negative_slope == phi2.negative_slope == 0.01)
        or not all(_same_padded(layer) for layer in (first, middle, last))
        or middle.kernel_size != (1, 1)
    ):
        return None
    layers: list[Any] = [t for layer in (first, middle, last) for t in (layer.weight, layer.bias)]
    if any(t is not None and t.dtype is not x.dtype for t in layers) or not _runs(x, *layers):
        return None
    w1, b1, w2, b2, w3, b3 = layers
    return conv_net(x, w1, b1, w2, b2, w3, b3, name)


coupling.conv_conditioner = conditioner


# -------------------------------------------------------------------------------------------------------- fake
def _images(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[2], x.shape[3], channels)).permute(0, 3, 1, 2)


def _fake(x, weight1, bias1, weight2, bias2, weight3, bias3, activation, keep):  # type: ignore[no-untyped-def]
    columns = sum((w.shape[0] + 15) // 16 * 16 for w in (weight1, weight2))
    rows = x.shape[0] * x.shape[2] * x.shape[3]
    return _images(x, weight3.shape[0]), x.new_empty(rows * columns if keep else 0)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, x, weight1, bias1, weight2, bias2, weight3, bias3, kept, activation, need_dx, need_parameters
):
    gradients = [
        x.new_empty(t.shape if need_parameters and t is not None else 0)
        for t in (weight1, bias1, weight2, bias2, weight3, bias3)
    ]
    return _images(x, x.shape[1]) if need_dx else x.new_empty(0), *gradients


_native.register("conv_net", _fake)
_native.register("conv_net_backward", _fake_backward)
