"""ActNorm and 1x1 convolution in LU form, at the shapes of Glow's three scales on 32x32 pictures, and larger.

normflows' two layers and the hand-written rivals compute the same map from the same numbers; they differ in how W comes
to be and in what forms the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Case, Factory, installed

SHAPES = ((16, 12, 16, 16), (16, 24, 8, 8), (16, 48, 4, 4), (64, 12, 32, 32), (64, 48, 16, 16))


def parts(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, permutation, sign) of a random rotation."""
    from pyflowgen import InvertibleLinear

    layer = InvertibleLinear(channels, generator=torch.Generator().manual_seed(0))
    assert layer.permutation is not None and layer.sign is not None
    return layer.weight.detach(), layer.permutation, layer.sign


def function(name: str, channels: int, inverse: bool) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        import pyflowgen

        chosen = getattr(pyflowgen, name)
        _, permutation, sign = parts(channels)
        options = {"permutation": permutation.to(device), "sign": sign.to(device, dtype)}

        def run(x: Tensor, weight: Tensor, log_scale: Tensor, shift: Tensor) -> Any:
            return chosen(x, weight, log_scale, shift, inverse=inverse, event_dim=3, **options)

        return run

    return make


def by_hand(channels: int, product: Callable[[Tensor, Tensor], Tensor]) -> Factory:
    """Glow's step as its re-implementations write it, log-determinant included."""

    def make(device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        _, order, sign = (t.to(device) for t in parts(channels))
        eye, permutation, sign = torch.eye(channels).to(device, dtype), F.one_hot(order).to(dtype), sign.to(dtype)

        def run(x: Tensor, weight: Tensor, log_scale: Tensor, shift: Tensor) -> Any:
            x = x * log_scale.exp()[:, None, None] + shift[:, None, None]
            upper = weight.triu(1) + torch.diag(sign * weight.diagonal().exp())
            y = product(x, permutation @ (weight.tril(-1) + eye) @ upper)
            logdet = (log_scale.sum() + weight.diagonal().sum()) * (x.shape[2] * x.shape[3])
            return y, logdet.expand(len(x))

        return run

    return make


def conv2d(x: Tensor, matrix: Tensor) -> Tensor:
    return F.conv2d(x, matrix[:, :, None, None])


def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    return (matrix @ x.flatten(2)).reshape(x.shape)


def normflows(channels: int, inverse: bool) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
        import normflows as nf

        scaling, mixing = nf.flows.affine.coupling.AffineConstFlow((channels, 1, 1)), nf.flows.mixing
        conv = mixing.Invertible1x1Conv(channels, use_lu=True).to(device, dtype)
        _, order, sign = (t.to(device) for t in parts(channels))
        conv.P, conv.sign_S = F.one_hot(order).to(dtype), sign.to(dtype)
        for module in (scaling, conv):
            module._parameters.clear()  # they are the case's inputs

        def run(x: Tensor, weight: Tensor, log_scale: Tensor, shift: Tensor) -> Any:
            # Both directions are named the other way round, its ActNorm's formula is not.
            scaling.s, scaling.t = log_scale[None, :, None, None], shift[None, :, None, None]
            conv.L, conv.U, conv.log_S = weight, weight, weight.diagonal()
            if inverse:
                x, first = conv(x)
                x, second = scaling.inverse(x)
            else:
                x, first = scaling(x)
                x, second = conv.inverse(x)
            return x, (first + second).expand(len(x))

        return run

    return make


def cases(device: torch.device) -> list[Case]:
    result = []
    for shape in SHAPES:
        channels, pixels = shape[1], shape[0] * shape[2] * shape[3]

        def inputs(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...] = shape) -> tuple[Tensor, ...]:
            generator = torch.Generator().manual_seed(0)
            x, *vectors = (torch.randn(s, generator=generator) for s in (shape, shape[1], shape[1]))
            return tuple(t.to(device, dtype) for t in (x, parts(shape[1])[0], 0.1 * vectors[0], vectors[1]))

        for inverse in (False, True):
            providers: dict[str, Factory] = {
                "eager": function("invertible_linear_reference", channels, inverse),
                "pyflowgen": function("invertible_linear", channels, inverse),
            }
            if not inverse:
                providers |= {"conv2d": by_hand(channels, conv2d), "matmul": by_hand(channels, matmul)}
            if installed("normflows"):
                providers["normflows"] = normflows(channels, inverse)
            products = 2.0 * pixels * channels**2
            result.append(
                Case(
                    "invertible_linear",
                    f"{'x'.join(map(str, shape))}{' inverse' if inverse else ''}",
                    torch.float32,
                    inputs,
                    providers,
                    modes=("inverse",) if inverse else ("forward", "forward+backward"),
                    compile=("eager", "matmul"),
                    flops={"forward": products, "inverse": products, "forward+backward": 3 * products},
                    quick=shape == SHAPES[0],
                )
            )
    return result
