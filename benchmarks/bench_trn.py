"""Temporal Recurrent Network: a stream's step, and training clips of 64 frames, with 8 decoder steps a frame.

The rival is plain PyTorch with what does not hang on the recurrence taken out of it (the reference), which is already
less work than the authors' code; no library has this layer. Compiled it is for a step alone: 64 frames unrolled take
minutes to compile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .harness import Case, Factory, normal

STEPS, CLASSES = 8, 22
# batch, frames, features, hidden
SIZES = [
    (1, 1, 1024, 512),
    (1, 1, 128, 64),
    (1, 64, 1024, 512),
    (16, 64, 1024, 512),
    (1, 64, 128, 64),
    (16, 64, 128, 64),
]
QUICK = {(1, 1, 1024, 512), (16, 64, 128, 64)}


class _Both(nn.Module):
    def __init__(self, layer: nn.Module, reference: bool) -> None:
        super().__init__()
        self.layer, self.reference = layer, reference

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        import pyflowgen

        if self.reference:
            with pyflowgen.reference_path():
                out = self.layer(frames)
        else:
            out = self.layer(frames)
        return out.scores, out.ahead


def provider(features: int, hidden: int, reference: bool) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> Any:
        from pyflowgen import TRN

        torch.manual_seed(0)
        return _Both(TRN(features, hidden, CLASSES, steps=STEPS), reference).to(device, dtype)

    return make


def case(batch: int, frames: int, features: int, hidden: int) -> Case:
    a_frame = features**2 + 4 * hidden * (2 * features + hidden) + 2 * hidden**2
    a_frame += STEPS * (8 * hidden**2 + hidden * (features + 2 * CLASSES))
    flops = 2.0 * batch * frames * a_frame
    step = frames == 1
    return Case(
        op="trn",
        shape=f"{batch}x{frames}x{features} -> {hidden}" + (" step" if step else ""),
        dtype=torch.float32,
        inputs=normal((batch, frames, features)),
        providers={
            "eager": provider(features, hidden, True),
            "pyflowgen": provider(features, hidden, False),
        },
        flops={"forward": flops, "forward+backward": 3 * flops},
        modes=("forward",) if step else ("forward", "forward+backward"),
        grad=() if step else None,
        compile=("eager",) if step else (),
        quick=(batch, frames, features, hidden) in QUICK,
    )


def cases(device: torch.device) -> list[Case]:
    return [case(*size) for size in SIZES]
