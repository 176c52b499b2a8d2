"""Temporal Recurrent Network: a stream's step, and training clips of 64 frames, with 8 decoder steps a frame.

Rivals of clips are the layers one by one at every frame, as the authors' code has them ("published"), the same with the
frame compiled (a clip's 512 decoder steps would take hours; of 16 clips none is compiled), and plain PyTorch with what
does not hang on the recurrence taken out of it (the reference, "eager"); no library has this layer. A step's rivals are
torch's own layers, in float32, in bfloat16 and dynamically quantised; for steps on short weights those as short are
"eager".
"""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .harness import SETTINGS, Case, Factory, normal

STEPS, CLASSES = 8, 22
# batch, frames, features, hidden
SIZES = [
    (4, 16, 128, 64),
    (1, 64, 1024, 512),
    (16, 64, 1024, 512),
]
QUICK = {(4, 16, 128, 64)}
# features, hidden, weights of the step
STREAMS = [
    (1024, 512, None),
    (1024, 512, torch.bfloat16),
    (1024, 512, torch.int8),
    (1024, 4096, None),
    (1024, 4096, torch.bfloat16),
    (1024, 4096, torch.int8),
]


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


@functools.cache
def _drawn(features: int, hidden: int) -> Any:
    from pyflowgen import TRN

    torch.manual_seed(0)
    return TRN(features, hidden, CLASSES, steps=STEPS).eval()


def layer_of(features: int, hidden: int) -> Any:
    """A copy: drawing the weights of 4096 units takes longer than the contest."""
    return copy.deepcopy(_drawn(features, hidden))


class _Frame(nn.Module):
    """One frame by torch's own layers, which quantize_dynamic may exchange."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(dict(layer.named_children()))

    def forward(self, frame: Tensor, h: Tensor, c: Tensor, future: Tensor) -> tuple[Tensor, ...]:
        m = self.layers
        h, c = m["enc_cell"](torch.cat([m["feature_extractor"](frame), future], 1), (h, c))
        g, k, u = m["hx_trans"](h), m["cx_trans"](c), torch.zeros_like(h)
        states, scores = [], []
        for _ in range(STEPS):
            g, k = m["dec_cell"](u, (g, k))
            scores.append(m["classifier"](g))
            u = m["fusion_linear"](scores[-1])
            states.append(g)
        future = m["future_linear"](torch.stack(states, 1)).mean(1)
        return m["classifier"](h), torch.stack(scores, 1), future, h, c


class _Published(nn.Module):
    """The frames of a clip one by one."""

    def __init__(self, features: int, hidden: int, compiled: bool = False) -> None:
        super().__init__()
        self.frame = _Frame(layer_of(features, hidden))
        if compiled:
            self.frame.compile(dynamic=False)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        batch, hidden = len(frames), self.frame.layers["classifier"].in_features
        h, c = frames.new_zeros(batch, hidden), frames.new_zeros(batch, hidden)
        future, found = torch.zeros_like(frames[:, 0]), []
        for frame in frames.unbind(1):
            *scores, future, h, c = self.frame(frame, h, c, future)
            found.append(scores)
        scores, ahead = (torch.stack(of, 1) for of in zip(*found, strict=True))
        return scores, ahead


def step_case(features: int, hidden: int, storage: torch.dtype | None) -> Case:
    inputs = normal((1, features), (1, hidden), (1, hidden), (1, features))

    def reference(device: torch.device, dtype: torch.dtype) -> Any:
        import pyflowgen

        layer = layer_of(features, hidden).to(device, dtype)

        def call(frame: Tensor, h: Tensor, c: Tensor, future: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with pyflowgen.reference_path():
                out = layer(frame[:, None], (h, c, future))
            return out.scores[:, 0], out.ahead[:, 0], out.future

        return call

    def short(device: torch.device, dtype: torch.dtype) -> Any:
        frame = _Frame(layer_of(features, hidden))
        if dtype is torch.float64:
            frame.to(device, dtype)
            return lambda *given: frame(*given)[:3]
        if storage is torch.bfloat16:
            frame.to(device, storage)
            given = [t.bfloat16() for t in inputs(device, dtype)]  # beforehand: the rival is not charged for it
            return lambda *_: tuple(t.to(dtype) for t in frame(*given)[:3])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(frame, {nn.LSTMCell, nn.Linear})
        return lambda *given: quantized(*given)[:3]

    def kernel(device: torch.device, dtype: torch.dtype) -> Any:
        layer = layer_of(features, hidden).to(device, dtype).pack(storage)

        def call(frame: Tensor, h: Tensor, c: Tensor, future: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            out = layer.step(frame, (h, c, future))
            return out.scores, out.ahead, out.future

        return call

    a_frame = features**2 + 4 * hidden * (2 * features + hidden) + 2 * hidden**2
    a_frame += STEPS * (8 * hidden**2 + hidden * (features + 2 * CLASSES)) - 4 * hidden**2
    rivals = {"eager": short, "float32": reference} if storage else {"eager": reference}
    return Case(
        op="trn",
        shape=f"step {features} -> {hidden}" + {None: "", torch.bfloat16: " bf16", torch.int8: " int8"}[storage],
        dtype=torch.float32,
        inputs=inputs,
        providers={**rivals, "pyflowgen": kernel},
        flops={"forward": 2.0 * a_frame},
        modes=("forward",),
        grad=(),
        compile=() if storage or hidden > 1024 else ("eager",),
        settings=("default",),  # nothing large is allocated
        quick=features == 1024 and storage is torch.int8,
    )


def case(batch: int, frames: int, features: int, hidden: int) -> Case:
    a_frame = features**2 + 4 * hidden * (2 * features + hidden) + 2 * hidden**2
    a_frame += STEPS * (8 * hidden**2 + hidden * (features + 2 * CLASSES))
    flops = 2.0 * batch * frames * a_frame
    loops: dict[str, Factory] = {"published": lambda device, dtype: _Published(features, hidden)}
    if batch * hidden <= 1024:  # of longer clips it takes seconds a call, as the others do
        loops["published compiled"] = lambda device, dtype: _Published(features, hidden, compiled=True)
    return Case(
        op="trn",
        shape=f"{batch}x{frames}x{features} -> {hidden}",
        dtype=torch.float32,
        inputs=normal((batch, frames, features)),
        providers={
            "eager": provider(features, hidden, True),
            **loops,
            "pyflowgen": provider(features, hidden, False),
        },
        flops={"forward": flops, "forward+backward": 3 * flops},
        modes=("forward+backward",) if batch * hidden > 1024 else ("forward", "forward+backward"),
        compile=(),
        settings=("default",) if features > 128 else tuple(SETTINGS),  # what is compiled is so once a setting
        quick=(batch, frames, features, hidden) in QUICK,
    )


def cases(device: torch.device) -> list[Case]:
    return [*(step_case(*stream) for stream in STREAMS), *(case(*size) for size in SIZES)]
