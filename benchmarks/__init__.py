"""Benchmarks: what is timed (``bench_*.py``), how (``harness.py``, ``run.py``), figures and report from the rows."""
