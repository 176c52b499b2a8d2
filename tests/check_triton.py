"""What the tests share that run Triton's launchers in its interpreter: every launch written down, every access checked.

Such tests need a process of their own with TRITON_INTERPRET=1: tests/test_triton.py starts it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from pyflowgen.kernels import tile
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1"


def tensors_of(arguments: Any) -> Iterator[Tensor]:
    for a in arguments:
        if isinstance(a, Tensor):
            yield a
        elif isinstance(a, tuple):
            yield from tensors_of(a)


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tile.Launch]]:
    """The launches of a test; every lane that is not masked off must stay within a tensor of its launch."""
    done: list[tile.Launch] = []
    storages: list[tuple[int, int]] = []
    run = tile.Launch.run

    def recorded(self: tile.Launch, device: torch.device) -> None:
        tensors = tensors_of(self.arguments)
        storages[:] = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
        done.append(self)
        run(self, device)

    def check(pointers: Any, mask: Any) -> None:
        p = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        inside = np.zeros(p.shape, bool)
        for start, size in storages:
            inside |= (p >= start) & (p < start + size)
        assert inside.all(), "access outside of the launch's tensors"

    real = interpreter._interpreter

    def load(pointers: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return real.load(pointers, mask, *rest)

    def store(pointers: Any, value: Any, mask: Any) -> Any:
        check(pointers, mask)
        return real.store(pointers, value, mask)

    parts = {name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(**(parts | {"load": load, "store": store})))
    monkeypatch.setattr(tile.Launch, "run", recorded)
    torch.use_deterministic_algorithms(True)  # also fills what torch.empty returns with NaN
    with np.errstate(all="ignore"):
        yield done
