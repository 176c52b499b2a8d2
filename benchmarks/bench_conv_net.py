"""The conditioner of Glow's couplings at the shapes of its three scales on 32x32 pictures, and its full width.

The rivals are torch's convolutions, channels first and last (the reference).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Case, Factory, normal

# images, channels in, side, width
SHAPES = ((16, 6, 16, 128), (16, 12, 8, 128), (16, 24, 4, 128), (16, 6, 16, 512), (64, 6, 16, 64))
QUICK = (16, 6, 16, 128)


def channels_first(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor) -> Tensor:
    h = F.conv2d(x.contiguous(), w1, b1, padding=1).relu_()
    return F.conv2d(F.conv2d(h, w2, b2).relu_(), w3, b3, padding=1)


def function(name: str) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> Any:
        import pyflowgen

        return getattr(pyflowgen, name)

    return make


def case(images: int, channels: int, side: int, width: int) -> Case:
    out = 2 * channels
    shapes = ((width, channels, 3, 3), (width,), (width, width, 1, 1), (width,), (out, width, 3, 3), (out,))
    scale = (1.0, (9 * channels) ** -0.5, 0.1, width**-0.5, 0.1, (9 * width) ** -0.5, 0.1)
    products = 2.0 * images * side**2 * width * (27 * channels + width)
    return Case(
        op="conv_net",
        shape=f"{images}x{channels}x{side}x{side} width {width}",
        dtype=torch.float32,
        inputs=normal((images, channels, side, side), *shapes, scale=scale),
        providers={
            "eager": function("conv_net_reference"),
            "channels first": lambda device, dtype: channels_first,
            "pyflowgen": function("conv_net"),
        },
        flops={"forward": products, "forward+backward": 3 * products},
        quick=(images, channels, side, width) == QUICK,
    )


def cases(device: torch.device) -> list[Case]:
    return [case(*shape) for shape in SHAPES]
