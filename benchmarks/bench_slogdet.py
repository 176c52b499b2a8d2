"""Log-determinants of batches of small matrices, against torch's own (one LAPACK call a matrix) in its forms."""

from __future__ import annotations

import torch
from torch import Tensor

from .harness import Case, Factory, Inputs

SIZES = [(8192, 2), (8192, 4), (8192, 8), (2048, 16), (512, 32), (128, 64)]


def matrices(batch: int, n: int) -> Inputs:
    """Far enough from singular that float32 shows roundings, not condition numbers."""

    def make(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        noise = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        return ((3 * torch.eye(n, dtype=torch.float64) + noise / n**0.5).to(device, dtype),)

    return make


def torch_own(device: torch.device, dtype: torch.dtype) -> object:
    from pyflowgen.ops.slogdet import slogdet_reference

    return lambda a: slogdet_reference(a)[1]


def kernel(device: torch.device, dtype: torch.dtype) -> object:
    from pyflowgen.ops.slogdet import slogdet

    return lambda a: slogdet(a)[1]


PROVIDERS: dict[str, Factory] = {"eager": torch_own, "pyflowgen": kernel}  # type: ignore[dict-item]


def cases(device: torch.device) -> list[Case]:
    def case(batch: int, n: int, dtype: torch.dtype = torch.float32) -> Case:
        label, quick = f"{batch}x{n}x{n}", (batch, n) in ((8192, 8), (512, 32)) and dtype == torch.float32
        return Case("slogdet", label, dtype, matrices(batch, n), PROVIDERS, quick=quick)

    return [*(case(*size) for size in SIZES), case(8192, 8, torch.float64)]
