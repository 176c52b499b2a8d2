"""The product under every layer: 8-64 rows of a wide layer, batches of a flow's MLP, its skinny first and last layers.

The rivals are torch's own forms of it: ``F.linear`` (the reference), ``torch.addmm``, and a channels-last 1x1
convolution (oneDNN), each followed by its own pass for the activation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Case, Factory, normal

WIDE = [(batch, 512, 2048) for batch in (8, 16, 32, 64)]
MLP = [(1024, 128, 128), (1024, 64, 128), (1024, 128, 64)]
SKINNY = [(64, 2, 128), (1024, 2, 128), (8192, 2, 128), (64, 128, 2), (1024, 128, 2), (8192, 128, 3)]
QUICK = {(16, 512, 2048), (1024, 128, 128), (8192, 2, 128)}


def conv1x1(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Rows as the pixels of one channels-last image: a view on both sides."""
    image = x[None, None].permute(0, 3, 1, 2)
    return F.conv2d(image, weight[:, :, None, None], bias).permute(0, 2, 3, 1)[0, 0]


def providers(activation: str) -> dict[str, Factory]:
    def finish(product: Any) -> Factory:
        act = {"none": lambda z: z, "silu": F.silu, "tanh": torch.tanh}[activation]
        return lambda device, dtype: lambda x, weight, bias: act(product(x, weight, bias))

    def kernel(device: torch.device, dtype: torch.dtype) -> Any:
        from pyflowgen import linear

        return lambda x, weight, bias: linear(x, weight, bias, activation)

    return {
        "eager": finish(F.linear),
        "addmm": finish(lambda x, weight, bias: torch.addmm(bias, x, weight.T)),
        "conv1x1": finish(conv1x1),
        "pyflowgen": kernel,
    }


def case(batch: int, features: int, out: int, activation: str, dtype: torch.dtype = torch.float32) -> Case:
    return Case(
        op="linear",
        shape=f"{batch}x{features} -> {out}" + ("" if activation == "none" else f" {activation}"),
        dtype=dtype,
        inputs=normal((batch, features), (out, features), (out,), scale=(1.0, features**-0.5, 1.0)),
        providers=providers(activation),
        flops={"forward": 2.0 * batch * features * out, "forward+backward": 6.0 * batch * features * out},
        quick=(batch, features, out) in QUICK and activation == "none",
    )


def cases(device: torch.device) -> list[Case]:
    return [
        *(case(*size, "none") for size in WIDE + MLP + SKINNY),
        *(case(*size, activation) for size in MLP[:1] + SKINNY[1:2] for activation in ("silu", "tanh")),
        case(1024, 128, 128, "none", torch.float64),
    ]
