"""The op's battery through the CUDA launchers, on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import spline_runs
import test_polynomial_spline as battery

for name in (
    "values_and_gradients", "opcheck", "round_trip_errs_at_most_twice_what_rounding_y_costs",
    "ends_and_parameters_that_are_not_finite",
):  # fmt: skip
    globals()[f"test_{name}"] = getattr(battery, f"test_{name}")
for degree in battery.DEGREES:
    spline = functools.partial(battery.polynomial_spline, degree=degree)
    found = spline_runs.tests("polynomial_spline", spline, battery.per(degree, 5))
    globals().update({f"{test}_of_degree_{degree}": f for test, f in found.items()})
