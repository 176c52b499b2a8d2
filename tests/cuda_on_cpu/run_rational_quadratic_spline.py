"""The op's battery through the CUDA launchers, on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own.

What the battery lacks: rows cut into segments are added up in the same order each time, offsets beyond 31 bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spline_runs
import test_rational_quadratic_spline as battery

import pyflowgen

for name in ("values_and_gradients", "opcheck", "round_trip_errs_at_most_twice_what_rounding_y_costs"):
    globals()[f"test_{name}"] = getattr(battery, f"test_{name}")
globals().update(spline_runs.tests("rational_quadratic_spline", pyflowgen.rational_quadratic_spline, 5))
