"""gru on a stream, a clip, and a training step: see ``benchmarks/recurrence.py``."""

from __future__ import annotations

import torch

from .harness import Case
from .recurrence import cases as recurrence_cases


def cases(device: torch.device) -> list[Case]:
    return recurrence_cases("gru")
