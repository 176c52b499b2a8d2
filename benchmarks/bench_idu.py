"""Information Discrimination Unit behind its embedding: a window of 16 chunks, and a frame of a stream.

Rivals: the cell as published, which embeds the step's and the current chunk anew at every step and multiplies them one
by one, run eagerly; and plain PyTorch with all that taken out of the loop (the reference), eager and compiled. No
library has this layer. In a stream the published cell runs its whole window again at each frame; the reference and the
kernel keep what each chunk adds by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .harness import SETTINGS, Case, Factory, normal

WINDOW = 16
# batch, features, hidden
SIZES = [(1, 3072, 512), (16, 3072, 512), (16, 128, 64)]
STORAGE = {"": None, " bf16": torch.bfloat16, " int8": torch.int8}
# What weights of 16 and 8 bits may be off by, of the largest entry.
SLACK = {"": 0.0, " bf16": 1e-2, " int8": 5e-2}
QUICK = {(16, 128, 64)}


class _Unit(nn.Module):
    """Embedding and unit; `reference` runs plain PyTorch."""

    def __init__(self, features: int, hidden: int, reference: bool) -> None:
        from pyflowgen import IDU, Linear

        super().__init__()
        self.embed = Linear(features, hidden, activation="relu")
        self.idu = IDU(hidden, hidden, WINDOW)
        self.reference = reference

    def forward(self, x: Tensor) -> Tensor:
        import pyflowgen

        if self.reference:
            with pyflowgen.reference_path():
                return self.window(x)
        return self.window(x)

    def window(self, x: Tensor) -> Tensor:
        h: Tensor = self.idu(self.embed(x))
        return h


class _Published(_Unit):
    def window(self, x: Tensor) -> Tensor:
        w_xz, w_xh, w_0r, w_0z, w_hr, w_hh = (
            rows for w in (self.idu.weight_x, self.idu.weight_0, self.idu.weight_h) for rows in w.chunk(2)
        )
        h, current = x.new_zeros(len(x), w_hh.shape[0]), x[:, -1]
        linear = nn.functional.linear
        for chunk in x.unbind(1):
            e, e_0 = self.embed(chunk), self.embed(current)
            r = torch.sigmoid(linear(h, w_hr) + linear(e_0, w_0r))
            z = torch.sigmoid(linear(e, w_xz) + linear(e_0, w_0z))
            h = (1 - z) * h + z * torch.tanh(linear(e, w_xh) + linear(r * h, w_hh))
        return h


class _Stream(_Unit):
    """The window's last frame, the others having come before."""

    cache: tuple[Tensor, Tensor] | None = None

    def window(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = self.idu.frames(self.embed(x[:, :-1]))[1]
        h: Tensor = self.idu.step(self.embed(x[:, -1]), self.cache)[0]
        return h


def provider(
    kind: type[_Unit], features: int, hidden: int, reference: bool = True, storage: torch.dtype | None = None
) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        unit = kind(features, hidden, reference).to(device, dtype)
        unit.idu.pack(storage)
        return unit

    return make


def case(batch: int, features: int, hidden: int, stream: bool = False, short: str = "") -> Case:
    once = 2 * hidden**2 + WINDOW * 2 * hidden**2  # products of the current chunk, and the recurrence
    flops = 2.0 * batch * ((1 if stream else WINDOW) * (features * hidden + 2 * hidden**2) + once)
    unit = _Stream if stream else _Unit
    return Case(
        op="idu",
        shape=f"{batch}x{1 if stream else WINDOW}x{features} -> {hidden}" + (" stream" if stream else "") + short,
        dtype=torch.float32,
        inputs=normal((batch, WINDOW, features)),
        providers={
            "eager": provider(unit, features, hidden),
            "published": provider(_Published, features, hidden),
            "pyflowgen": provider(unit, features, hidden, False, STORAGE[short]),
        },
        flops={"forward": flops, "forward+backward": 3 * flops},
        modes=("forward",) if stream else ("forward", "forward+backward"),
        grad=(),
        compile=() if stream or (batch, features, hidden) in QUICK else ("eager",),
        slack=SLACK[short],
        settings=("default",) if features > 128 else tuple(SETTINGS),  # what is compiled is so once a setting
        quick=stream or (batch, features, hidden) in QUICK,
    )


def cases(device: torch.device) -> list[Case]:
    return [*(case(*size) for size in SIZES), *(case(1, 3072, 512, stream=True, short=short) for short in STORAGE)]
