"""The CUDA launchers of lstm on CPU tensors; run by tests/test_cuda_on_cpu.py in a process of its own."""

from recurrence_runs import runs

globals().update(runs("lstm"))
