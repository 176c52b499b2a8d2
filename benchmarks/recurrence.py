"""What the recurrent ops are timed on: a stream's step, a clip, a loop of cells, and their gradients.

A stream's step is called from Python, batch 1, weights packed beforehand; its rivals are torch's cell in float32, as it
is and compiled, and in bfloat16, and torch's dynamic quantisation. nn.LSTM with one step packs its weights at every
call: it is no rival here.

A clip's rivals are torch's layer, which is oneDNN's without gradients, the same compiled, and a loop of torch's cell,
as it is and, for one sequence, compiled (the cell alone: a loop unrolled takes minutes). Training on a compiled layer
is left out: torch 2.13 compiles it and fails when it runs.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .harness import Case, Factory, normal

STEPS = [(128, 128), (512, 512), (1024, 1024)]
SHORT = [None, torch.bfloat16, torch.int8]
# time, batch, features, hidden
CLIPS = [(256, 1, 64, 128), (64, 32, 512, 512)]


def drawn(op: str, *size: int, cell: bool = False) -> Any:
    """A layer or cell of torch.nn, its weights drawn once for all providers."""
    torch.manual_seed(1)
    return getattr(nn, op.upper() + ("Cell" if cell else ""))(*size)


def ours(op: str, *size: int, cell: bool = False) -> Any:
    import pyflowgen

    layer = getattr(pyflowgen, op.upper() + ("Cell" if cell else ""))(*size)
    layer.load_state_dict(drawn(op, *size, cell=cell).state_dict())
    return layer


def first(result: Any) -> Tensor:
    """The hidden state, or all of them."""
    return result if isinstance(result, Tensor) else result[0]


def step_case(op: str, features: int, hidden: int, storage: torch.dtype | None) -> Case:
    """ "eager" is torch's cell with weights as short as ours: float32, bfloat16, or dynamically quantised."""
    states = [(1, hidden)] * (2 if op == "lstm" else 1)
    inputs = normal((1, features), *states)

    def torchs(device: torch.device, dtype: torch.dtype) -> Any:
        cell = drawn(op, features, hidden, cell=True).to(device, dtype)
        return lambda x, *s: first(cell(x, s if op == "lstm" else s[0]))

    def bf16(device: torch.device, dtype: torch.dtype) -> Any:
        cell = torchs(device, torch.bfloat16)
        given = [t.bfloat16() for t in inputs(device, dtype)]  # beforehand: the rival is not charged for it
        return lambda *_: cell(*given).to(dtype)

    def quantized(device: torch.device, dtype: torch.dtype) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            within = nn.ModuleList([drawn(op, features, hidden, cell=True)])  # only children are exchanged
            cell = torch.ao.quantization.quantize_dynamic(within, {nn.LSTMCell, nn.GRUCell})[0]
        return lambda x, *s: first(cell(x, s if op == "lstm" else s[0]))

    short: dict[torch.dtype | None, Factory] = {None: torchs, torch.bfloat16: bf16, torch.int8: quantized}

    def eager(device: torch.device, dtype: torch.dtype) -> Any:
        return (torchs if dtype is torch.float64 else short[storage])(device, dtype)

    def kernel(device: torch.device, dtype: torch.dtype) -> Any:
        cell = ours(op, features, hidden, cell=True).to(dtype).pack(storage)
        return lambda x, *s: first(cell.step(x, s if op == "lstm" else s[0]))

    return Case(
        op=op,
        shape=f"step {features} -> {hidden}" + {None: "", torch.bfloat16: " bf16", torch.int8: " int8"}[storage],
        dtype=torch.float32,
        inputs=inputs,
        providers={"eager": eager, **({"float32": torchs} if storage else {}), "pyflowgen": kernel},
        modes=("forward",),
        compile=("eager",) if features == 512 and storage is None else (),  # which takes longer than the contest
        settings=("default",),  # nothing large is allocated
        quick=features == 512,
    )


def clip_case(op: str, time: int, batch: int, features: int, hidden: int, training: bool) -> Case:
    """The sequence op against torch's layer and against a loop of torch's cell."""

    class Loop(nn.Module):
        def __init__(self, compiled: bool = False) -> None:
            super().__init__()
            self.cell = drawn(op, features, hidden, cell=True)
            layer = drawn(op, features, hidden)
            self.cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
            if compiled:
                self.cell.compile(dynamic=False)

        def forward(self, x: Tensor) -> Tensor:
            zero = x.new_zeros(x.shape[1], hidden)
            state, hidden_states = (zero, zero.clone()) if op == "lstm" else zero, []
            for step in x.unbind(0):
                state = self.cell(step, state)
                hidden_states.append(first(state))
            return torch.stack(hidden_states)

    class First(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return first(self.layer(x))

    def torchs(device: torch.device, dtype: torch.dtype) -> Any:
        if not training:
            torch._dynamo.config.allow_rnn = True  # which torch.compile wants to be told
        return First(drawn(op, features, hidden))

    loops: dict[str, Factory] = {"cell loop": lambda device, dtype: Loop()}
    if batch == 1:
        loops["cell loop compiled"] = lambda device, dtype: Loop(compiled=True)
    gates = 4 if op == "lstm" else 3
    flops = 2.0 * time * batch * gates * hidden * (features + hidden)
    return Case(
        op=op,
        shape=f"{time}x{batch}x{features} -> {hidden}",
        dtype=torch.float32,
        inputs=normal((time, batch, features)),
        providers={
            "eager": torchs,
            **loops,
            "pyflowgen": lambda device, dtype: First(ours(op, features, hidden)),
        },
        modes=("forward+backward",) if training else ("forward",),
        grad=None if training else (),
        compile=() if training else ("eager",),
        settings=("default",),  # what is compiled is so once a setting
        flops={"forward": flops, "forward+backward": 3 * flops},
        quick=(batch == 1),
    )


def cases(op: str) -> list[Case]:
    lstm = op == "lstm"  # of a GRU one size each: its loops are the same
    steps = [step_case(op, *size, dtype) for size in STEPS if lstm or size == (512, 512) for dtype in SHORT]
    clips = [clip_case(op, *size, training) for size in CLIPS[: 2 if lstm else 1] for training in (False, True)]
    return [*steps, *clips]
