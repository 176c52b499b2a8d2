"""Benchmarks: what is timed (``bench_*.py``), how (``harness.py``, ``run.py``), and the figures and report made from the rows."""
