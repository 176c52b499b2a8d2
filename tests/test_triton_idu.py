"""idu's Triton kernels without a GPU: run by Triton's interpreter, and compiled ahead of time for NVIDIA and AMD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from pyflowgen.kernels import idu as kernels  # noqa: E402
from pyflowgen.kernels import tile  # noqa: E402
from test_triton import TARGETS, compiled, recorded, resources  # noqa: E402

from pyflowgen import _native  # noqa: E402

__all__ = ["recorded"]  # a fixture


@pytest.mark.parametrize("op", ["idu", "idu_backward"])
def test_launcher_schema(op: str) -> None:
    if _native._missing:
        pytest.skip("no compiled library to compare with")
    schema = getattr(torch.ops.pyflowgen, op).default._schema
    assert f"pyflowgen::{op}{_native.launcher_schema(getattr(kernels, op))}" == str(schema)


def call(dtype: torch.dtype, hidden: int, *how: bool, bias: bool, length: bool) -> None:
    """Calls both launchers on tensors of this kind, windows of two chunks."""
    new = torch.zeros(2, dtype=dtype).new_zeros
    x, weights = new(40, 2, 64), (new(2 * hidden, 64), new(2 * hidden, 64), new(2 * hidden, hidden))
    lengths = torch.ones(40, dtype=torch.int64) if length else None
    h, _, *kept = kernels.idu(x, *weights, new(4 * hidden) if bias else None, lengths, None, *how, True)
    kernels.idu_backward(h, None, x, *weights, lengths, *how, *kept, True, True)


CASES = {
    "float32": dict(dtype=torch.float32, hidden=512, how=(False, False, False), bias=False, length=False),
    "float32, after": dict(dtype=torch.float32, hidden=100, how=(True, True, True), bias=True, length=True),
    "bfloat16": dict(dtype=torch.bfloat16, hidden=512, how=(False, True, False), bias=True, length=False),
    "float64": dict(dtype=torch.float64, hidden=48, how=(False, False, False), bias=True, length=True),
}


@pytest.mark.skipif(_native._INTERPRET, reason="the interpreter has no compiler")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: f"{t.backend}-{t.arch}")
@pytest.mark.parametrize("name", CASES)
def test_ahead_of_time(name: str, target: Any, recorded: list[tile.Launch], tmp_path: Path) -> None:
    options = dict(CASES[name])
    call(options.pop("dtype"), options.pop("hidden"), *options.pop("how"), **options)
    after = recorded[0].options["AFTER"]
    assert len(recorded) == (4 if after else 8)
    # The step that others are like: the first forward, the earlier one backward.
    for launch in recorded[:1] + recorded[-1:] if after else recorded[:2] + recorded[-2:]:
        registers, memory, parked = resources(compiled(launch, target), tmp_path)
        assert memory == 0, f"{launch.kernel.__name__} spills {memory} bytes"
        # gfx942 keeps double constants in scalar registers; those it parks never reach memory.
        assert parked <= (8 if name == "float64" else 0)
        assert registers <= 168  # three programs on a multiprocessor of 65,536 registers
