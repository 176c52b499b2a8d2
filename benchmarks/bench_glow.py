"""One step of Glow on 16x12x16x16: ActNorm, 1x1 convolution, affine coupling; a training step, and all but its net.

Every library builds the step its own way: normflows' GlowBlock, nflows' three layers, FrEIA's AllInOneBlock (whose
1x1 convolution stays fixed: less work). The conditioner is the same three convolutions for all, but for the output gain
that ours has. "by hand" is Glow's step as its re-implementations in PyTorch write it.

"without net": in the conditioner's place stands a module that gives numbers and takes gradients at no cost, in the
memory format that the library's net has, so that what is timed is all but the net, its two ReLUs included in the net.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .harness import Case, Factory, installed, normal

SHAPE = (16, 12, 16, 16)
CHANNELS = SHAPE[1]
PEERS = ("normflows", "nflows", "FrEIA")
Net = Callable[[int, int], nn.Module]


class _Fixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, params: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return params.clone()  # a tensor of its own, as a net's output is: FrEIA changes it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient, grad, None


class NoNet(nn.Module):
    """Gives what a net could give, and backward what it could give back."""

    def __init__(self, n_in: int, n_out: int, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(n_in)
        params, gradient = (torch.randn(SHAPE[0], n, *SHAPE[2:], generator=generator) for n in (n_out, n_in))
        self.params = nn.Parameter(params.contiguous(memory_format=memory_format))
        self.register_buffer("gradient", gradient.contiguous(memory_format=memory_format))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return _Fixed.apply(x, self.params, self.gradient)  # type: ignore[no-untyped-call]


class ThreeConvolutions(nn.Sequential):
    def __init__(self, n_in: int, width: int, n_out: int) -> None:
        super().__init__(
            nn.Conv2d(n_in, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True), nn.Conv2d(width, n_out, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        return super().forward(x)


class Step(nn.Module):
    """(y, logdet), or with `loss` the mean negative log-likelihood under a standard normal base."""

    def __init__(self, model: nn.Module, run: Callable[[Any, Tensor], Any], loss: bool) -> None:
        super().__init__()
        self.model, self.run, self.loss = model, run, loss
        self(torch.randn(SHAPE, generator=torch.Generator().manual_seed(2)))  # what is set from data, before timing

    def forward(self, x: Tensor) -> Any:
        y, logdet = self.run(self.model, x)
        if not self.loss:
            return y, logdet
        return (0.5 * y.square().flatten(1).sum(1) - logdet).mean() + 0.5 * y[0].numel() * math.log(2 * math.pi)


def _ours(width: int) -> nn.Module:
    from pyflowgen.layers import GlowStep
    from pyflowgen.nets import ConvNet

    n_in, n_out = CHANNELS - CHANNELS // 2, CHANNELS // 2 * 2
    net = ConvNet(n_in, width, n_out) if width else NoNet(n_in, n_out, torch.channels_last)
    if isinstance(net, ConvNet):  # the last layer starts at zero: drawn anew, so that the gate sees every gradient
        nn.init.normal_(net.conv3.weight, std=0.3 / math.sqrt(9 * width))
    return GlowStep(CHANNELS, net)


def kernels(width: int) -> Factory:
    return lambda device, dtype: Step(_ours(width), lambda model, x: model(x), loss=width > 0)


def reference(width: int) -> Factory:
    def run(model: Any, x: Tensor) -> Any:
        from pyflowgen._native import reference_path

        with reference_path():
            return model(x)

    return lambda device, dtype: Step(_ours(width), run, loss=width > 0)


class ByHand(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        p, lower, upper = torch.linalg.lu(torch.linalg.qr(torch.randn(CHANNELS, CHANNELS)).Q)
        self.log_scale, self.shift = (nn.Parameter(torch.zeros(CHANNELS, 1, 1)) for _ in range(2))
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())
        self.register_buffer("permutation", p)
        self.register_buffer("sign", upper.diagonal().sign())
        self.register_buffer("eye", torch.eye(CHANNELS))
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = (x + self.shift) * self.log_scale.exp()
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        matrix = self.permutation @ (self.lower.tril(-1) + self.eye) @ upper
        kept, moved = F.conv2d(x, matrix[:, :, None, None]).chunk(2, 1)
        shift, scale = self.net(kept).chunk(2, 1)
        scale = torch.sigmoid(scale + 2)
        logdet = (self.log_scale.sum() + self.log_diagonal.sum()) * (x.shape[2] * x.shape[3])
        return torch.cat([kept, (moved + shift) * scale], 1), logdet + scale.log().flatten(1).sum(1)


def by_hand(net: Net, loss: bool) -> nn.Module:
    return Step(ByHand(net(CHANNELS // 2, CHANNELS)), lambda model, x: model(x), loss)


def normflows(net: Net, loss: bool) -> nn.Module:
    import normflows as nf

    block = nf.flows.GlowBlock(CHANNELS, 1)
    coupling = next(m for m in block.modules() if isinstance(m, nf.flows.affine.coupling.AffineCoupling))
    coupling.param_map = net(CHANNELS // 2, CHANNELS)
    return Step(block, lambda model, x: model.inverse(x), loss)  # its inverse goes to the noise


def nflows(net: Net, loss: bool) -> nn.Module:
    from nflows import transforms

    mask = torch.ones(CHANNELS)
    mask[: CHANNELS // 2] = -1
    parts = [transforms.ActNorm(CHANNELS), transforms.OneByOneConvolution(CHANNELS, identity_init=False)]
    parts.append(transforms.AffineCouplingTransform(mask, net))
    return Step(transforms.CompositeTransform(parts), lambda model, x: model(x), loss)


def freia(net: Net, loss: bool) -> nn.Module:
    from FrEIA.modules import AllInOneBlock

    block = AllInOneBlock([SHAPE[1:]], subnet_constructor=net, permute_soft=True)

    def run(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        (y,), logdet = model([x])
        return y, logdet

    return Step(block, run, loss)


def cases(device: torch.device) -> list[Case]:
    result = []
    for width in (0, 128, 512):

        def net(n_in: int, n_out: int, width: int = width) -> nn.Module:
            return ThreeConvolutions(n_in, width, n_out) if width else NoNet(n_in, n_out)

        def peer(build: Callable[[Net, bool], nn.Module], net: Net = net, loss: bool = width > 0) -> Factory:
            return lambda device, dtype: build(net, loss)

        built = {"by hand": by_hand, "normflows": normflows, "nflows": nflows, "FrEIA": freia}
        named = {name: peer(build) for name, build in built.items() if name == "by hand" or installed(name)}
        positions = SHAPE[0] * SHAPE[2] * SHAPE[3]
        products = 2.0 * positions * (CHANNELS**2 + width * (9 * CHANNELS // 2 + width + 9 * CHANNELS))
        result.append(
            Case(
                "glow",
                f"{'x'.join(map(str, SHAPE))} {f'width {width}' if width else 'without net'}",
                torch.float32,
                normal(SHAPE),
                {"eager": reference(width), "pyflowgen": kernels(width), **named},
                modes=("forward+backward", "step") if width else ("forward", "forward+backward"),
                compile=("eager", "by hand", "pyflowgen", *PEERS),
                truth={name: name for name in named},
                flops={m: (1 if m == "forward" else 3) * products for m in ("forward", "forward+backward", "step")},
                quick=width < 512,
            )
        )
    return result
