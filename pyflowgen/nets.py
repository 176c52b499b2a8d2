"""Networks that serve as conditioners. Any `nn.Module` called as `net(x)` or `net(x, context)` does as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyflowgen.coupling import hooked
from pyflowgen.ops.conv_net import conv_net
from pyflowgen.ops.linear import Activation, Linear

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "leaky_relu": nn.LeakyReLU,
    "softplus": nn.Softplus,
}


def activation(name: str) -> nn.Module:
    """The activation layer called `name`; a ValueError lists the known names.

    >>> from pyflowgen.nets import activation
    >>> activation("silu")
    SiLU()
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation is {name!r}, expected one of {', '.join(sorted(_ACTIVATIONS))}")
    return _ACTIVATIONS[name]()


def _check_context(owner: nn.Module, context: Tensor | None, features: int) -> None:
    if (context is None) != (features == 0) or (context is not None and context.shape[-1:] != (features,)):
        got = "is missing" if context is None else f"has shape {tuple(context.shape)}"
        want = f"expected (..., {features})" if features else "expected none (built with context_features=0)"
        raise ValueError(f"{type(owner).__name__}: context {got}, {want}")


def _joined(owner: MLP | ResidualMLP, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`([x, context], context)` of one batch shape; a ValueError where they do not fit `owner`."""
    _check_context(owner, context, owner.context_features)
    if x.shape[-1:] != (owner.in_features,):
        raise ValueError(f"{type(owner).__name__}: x has shape {tuple(x.shape)}, expected (..., {owner.in_features})")
    if context is None:
        return x, None
    batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
    context = context.to(x.dtype).expand(*batch, -1)
    return torch.cat([x.expand(*batch, -1), context], -1), context


class MLP(nn.Module):
    r"""Multi-layer perceptron :math:`W_n\,\sigma(\cdots\sigma(W_1 [x, c] + b_1)\cdots) + b_n` on the last dimension.

    Args:
        in_features: size of `x`'s last dimension.
        hidden: widths of the hidden layers; empty for a linear map.
        out_features: size of the output.
        activation: name of the activation between layers (`"relu"`, `"tanh"`, `"silu"`, ...).
        context_features: size of the context's last dimension; 0 for none. Its leading dimensions broadcast with `x`'s.
        zero_init_last: start the last layer at zero, so that a coupling starts as the identity.

    >>> import torch
    >>> from pyflowgen.nets import MLP
    >>> net = MLP(3, [16], 4, context_features=2)
    >>> net(torch.randn(5, 3), torch.randn(5, 2))
    tensor([[0., 0., 0., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]], grad_fn=<AddmmBackward0>)
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        activation: str = "relu",
        *,
        context_features: int = 0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.context_features = in_features, out_features, context_features
        sizes = [in_features + context_features, *hidden, out_features]
        if min(sizes) < 1:
            raise ValueError(f"MLP: layer sizes are {sizes}, expected positive numbers")
        last = len(sizes) - 2
        kind = cast(Activation, activation)  # Linear names the known ones
        self.layers = nn.Sequential(
            *(Linear(sizes[i], sizes[i + 1], activation="none" if i == last else kind) for i in range(last + 1))
        )
        if zero_init_last:
            _zero(self.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out: Tensor = self.layers(_joined(self, x, context)[0])
        return out

    def perceptron(self) -> nn.Sequential | None:
        """The layers, applied to x and context joined, when that is all that `forward` does: see `mlp_coupling`."""
        return self.layers if type(self) is MLP else None


class _GatedBlock(nn.Module):
    """The pre-activation residual block of :class:`ResidualMLP`."""

    def __init__(self, features: int, activation: str, context_features: int) -> None:
        super().__init__()
        kind = cast(Activation, activation)
        self.activation = _act(activation)
        self.linear_layers = nn.ModuleList([Linear(features, features, activation=kind), Linear(features, features)])
        self.context_layer = Linear(context_features, features) if context_features else None
        for p in self.linear_layers[1].parameters():
            nn.init.uniform_(p, -1e-3, 1e-3)  # the block starts close to the identity

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.linear_layers[1](self.linear_layers[0](self.activation(x)))
        if self.context_layer is not None:
            h = h * torch.sigmoid(self.context_layer(context))
        return x + h


class ResidualMLP(nn.Module):
    r"""Residual network on the last dimension, the conditioner of neural spline flows.

    A linear layer on :math:`[x, c]`, then `blocks` times

    .. math:: h \leftarrow h + \bigl(W_2\,\sigma(W_1\,\sigma(h) + b_1) + b_2\bigr) \odot \mathrm{sigmoid}(W_c\,c + b_c)

    (without a context, without the last factor), then a linear layer.

    Args:
        in_features, hidden, out_features: sizes of the input, of the blocks, and of the output.
        blocks: number of residual blocks.
        activation: name of :math:`\sigma`.
        context_features: size of the context's last dimension; 0 for none. Its leading dimensions broadcast with `x`'s.
        zero_init_last: start the last layer at zero, so that a coupling starts close to the identity.

    Parameters have the names of nflows' `ResidualNet`, whose state dicts can be loaded.

    Reference: He et al., *Identity Mappings in Deep Residual Networks*, 2016; Durkan, Bekasov, Murray and Papamakarios,
    *Neural Spline Flows*, 2019, appendix B.

    >>> import torch
    >>> from pyflowgen.nets import ResidualMLP
    >>> net = ResidualMLP(3, 16, 4, context_features=2, zero_init_last=False)
    >>> net(torch.randn(5, 3), torch.randn(5, 2)).shape
    torch.Size([5, 4])
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        *,
        blocks: int = 2,
        activation: str = "relu",
        context_features: int = 0,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.context_features = in_features, out_features, context_features
        if min(in_features, hidden, out_features) < 1 or blocks < 0 or context_features < 0:
            raise ValueError(
                f"ResidualMLP: in_features={in_features}, hidden={hidden}, out_features={out_features}, "
                f"blocks={blocks}, context_features={context_features}, expected positive numbers"
            )
        self.initial_layer = Linear(in_features + context_features, hidden)
        self.blocks = nn.ModuleList([_GatedBlock(hidden, activation, context_features) for _ in range(blocks)])
        self.final_layer = Linear(hidden, out_features)
        if zero_init_last:
            _zero(self.final_layer)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x, context = _joined(self, x, context)
        h: Tensor = self.initial_layer(x)
        for block in self.blocks:
            h = block(h, context)
        out: Tensor = self.final_layer(h)
        return out

    def residual_blocks(self) -> Sequence[nn.Module] | None:
        """The blocks, when first layer, these and last layer are all that `forward` does: see `mlp_coupling`."""
        return self.blocks if type(self) is ResidualMLP else None  # type: ignore[return-value]


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, activation: str, wrap: bool) -> None:
        super().__init__()
        conv1, conv2 = _conv(channels, channels, 3, wrap), _conv(channels, channels, 3, wrap)
        self.body = nn.Sequential(_act(activation), conv1, _act(activation), conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class ConvResNet(nn.Module):
    r"""Small residual convolution network that keeps height and width, the conditioner of an image coupling.

    3×3 convolution, then `blocks` times
    :math:`h + \mathrm{conv}_{3\times3}\,\sigma\,\mathrm{conv}_{3\times3}\,\sigma\,h`, an activation and a 1×1
    convolution.

    Args:
        in_channels, hidden_channels, out_channels: channels of the input `(..., C, H, W)`, the blocks, the output.
        blocks: number of residual blocks.
        activation: name of the activation.
        context_features: size of a context vector `(..., F)`, mapped linearly onto the hidden channels; 0 for none.
        weight_norm: reparametrise the 3×3 convolutions by norm and direction (Salimans and Kingma, 2016).
        zero_init_last: start the last convolution at zero.

    Reference: He et al., *Identity Mappings in Deep Residual Networks*, 2016, in the use of *Real NVP*, section 4.1.

    >>> import torch
    >>> from pyflowgen.nets import ConvResNet
    >>> ConvResNet(3, 8, 6)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 6, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        *,
        blocks: int = 2,
        activation: str = "relu",
        context_features: int = 0,
        weight_norm: bool = False,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.context_features = in_channels, out_channels, context_features
        if min(in_channels, hidden_channels, out_channels) < 1 or blocks < 0:
            raise ValueError(
                f"ConvResNet: in_channels={in_channels}, hidden_channels={hidden_channels}, "
                f"out_channels={out_channels}, blocks={blocks}, expected positive numbers"
            )
        self.stem = _conv(in_channels, hidden_channels, 3, weight_norm)
        self.context = nn.Linear(context_features, hidden_channels) if context_features else None
        self.blocks = nn.Sequential(*[_ResidualBlock(hidden_channels, activation, weight_norm) for _ in range(blocks)])
        self.head = nn.Sequential(_act(activation), nn.Conv2d(hidden_channels, out_channels, 1))
        if zero_init_last:
            _zero(self.head[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_context(self, context, self.context_features)
        if x.dim() < 3 or x.shape[-3] != self.in_channels:
            raise ValueError(f"ConvResNet: x has shape {tuple(x.shape)}, expected (..., {self.in_channels}, H, W)")
        batch = x.shape[:-3]
        h = self.stem(x.reshape(-1, *x.shape[-3:]))
        if self.context is not None and context is not None:
            h = h + _per_image(self.context(context.to(h.dtype)), x)
        h = self.head(self.blocks(h))
        return h.reshape(*batch, *h.shape[-3:])


class ZeroConv2d(nn.Conv2d):
    r"""3×3 convolution that starts at zero, with a learned gain: :math:`(W * x + b)\,e^{3 g}` per output channel.

    Args:
        in_channels, out_channels: as in `torch.nn.Conv2d`; the padding keeps height and width.

    The factor 3 lets the scale move as fast as the weights under an optimizer that moves all parameters alike.

    Reference: Kingma and Dhariwal, *Glow*, 2018, section 3.3, and its published code.

    >>> import torch
    >>> from pyflowgen.nets import ZeroConv2d
    >>> ZeroConv2d(2, 3)(torch.randn(1, 2, 4, 4)).abs().max().item()
    0.0
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        _zero(self)
        self.log_gain = nn.Parameter(torch.zeros(out_channels))

    def scaled(self) -> tuple[Tensor, Tensor]:
        """The convolution's weight and bias, the gain in them."""
        gain = (3 * self.log_gain).exp()
        assert self.bias is not None
        return self.weight * gain[:, None, None, None], self.bias * gain

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, *self.scaled(), padding=1)


class ConvNet(nn.Module):
    r"""The conditioner of a Glow coupling: 3×3 convolution, ReLU, 1×1 convolution, ReLU, `ZeroConv2d`.

    Args:
        in_channels, hidden_channels, out_channels: channels of the input `(..., C, H, W)`, the two hidden layers, the
            output.
        context_features: size of a context vector `(..., F)`, mapped linearly onto the first hidden layer; 0 for none.

    Without a context it is one operator, :func:`pyflowgen.conv_net`. On the CPU its result has the channels last in
    memory.

    Reference: Kingma and Dhariwal, *Glow*, 2018, section 3.3.

    >>> import torch
    >>> from pyflowgen.nets import ConvNet
    >>> ConvNet(3, 16, 6)(torch.randn(2, 3, 4, 4)).shape
    torch.Size([2, 6, 4, 4])
    """

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, *, context_features: int = 0) -> None:
        super().__init__()
        if min(in_channels, hidden_channels, out_channels) < 1:
            raise ValueError(
                f"ConvNet: in_channels={in_channels}, hidden_channels={hidden_channels}, "
                f"out_channels={out_channels}, expected positive numbers"
            )
        self.in_channels, self.out_channels, self.context_features = in_channels, out_channels, context_features
        self.conv1 = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.conv3 = ZeroConv2d(hidden_channels, out_channels)
        self.context = nn.Linear(context_features, hidden_channels) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_context(self, context, self.context_features)
        if x.dim() < 3 or x.shape[-3] != self.in_channels:
            raise ValueError(f"ConvNet: x has shape {tuple(x.shape)}, expected (..., {self.in_channels}, H, W)")
        if context is None and not any(map(hooked, (self.conv1, self.conv2, self.conv3))) and self._plain():
            return conv_net(
                x, self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias, *self.conv3.scaled()
            )
        images = x.reshape(-1, *x.shape[-3:])
        if x.device.type == "cpu":
            images = images.contiguous(memory_format=torch.channels_last)
        h = self.conv1(images)
        if self.context is not None and context is not None:
            h = h + _per_image(self.context(context.to(h.dtype)), x)
        h = self.conv3(self.conv2(h.relu_()).relu_())
        return h.reshape(*x.shape[:-3], *h.shape[-3:])

    def _plain(self) -> bool:
        """Whether the layers are what they were made as: a parametrised one has a class of its own."""
        return type(self.conv1) is type(self.conv2) is nn.Conv2d and type(self.conv3) is ZeroConv2d


class NormalPrior(nn.Module):
    r"""Mean and log-standard deviation of a normal prior for some channels of an image, interleaved on the channels.

    Args:
        features: channels C of the latents.
        in_channels: channels of what the prior depends on, through a `ZeroConv2d`; 0 for one number per channel.
        context_features: size of a context vector `(..., F)`, mapped linearly onto all positions; 0 for none.

    It starts as the standard normal. See `MultiScale` for its use.

    Reference: Kingma and Dhariwal, *Glow*, 2018, and its published code.

    >>> import torch
    >>> from pyflowgen.nets import NormalPrior
    >>> NormalPrior(3, 5)(torch.randn(2, 5, 4, 4)).shape
    torch.Size([2, 6, 4, 4])
    """

    def __init__(self, features: int, in_channels: int = 0, *, context_features: int = 0) -> None:
        super().__init__()
        self.features, self.context_features = features, context_features
        self.conv = ZeroConv2d(in_channels, 2 * features) if in_channels else None
        self.constant = None if in_channels else nn.Parameter(torch.zeros(2 * features))
        self.context = nn.Linear(context_features, 2 * features, bias=False) if context_features else None
        if self.context is not None:
            _zero(self.context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        _check_context(self, context, self.context_features)
        shape = (*x.shape[:-3], 2 * self.features, *x.shape[-2:])
        if self.conv is not None:
            params = self.conv(x.reshape(-1, *x.shape[-3:])).reshape(shape)
        else:
            assert self.constant is not None
            params = self.constant[:, None, None].expand(shape)
        if self.context is not None and context is not None:
            params = params + _per_image(self.context(context.to(params.dtype)), x).reshape(*shape[:-2], 1, 1)
        return params


def _per_image(values: Tensor, x: Tensor) -> Tensor:
    """`(..., F)` for images `x` of any leading dimensions as `(images, F, 1, 1)`."""
    return values.expand(*x.shape[:-3], -1).reshape(-1, values.shape[-1], 1, 1)


_act = activation  # the name is a parameter in the constructors above


def _conv(n_in: int, n_out: int, size: int, weight_norm: bool) -> nn.Module:
    conv = nn.Conv2d(n_in, n_out, size, padding=size // 2)
    return nn.utils.parametrizations.weight_norm(conv) if weight_norm else conv


def _zero(layer: nn.Module) -> None:
    for p in layer.parameters():
        nn.init.zeros_(p)
