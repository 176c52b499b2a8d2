"""tune_malloc: what it tells glibc, and that a process then keeps its memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

import pyflowgen

FAULTS = """
import resource, sys, torch, pyflowgen
tuned = pyflowgen.tune_malloc() if sys.argv[1] == "tuned" else None
x = torch.randn(1 << 24)
for i in range(20):  # temporaries of 64 MiB
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = (x + 1) * 2
    del y
print(tuned, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_temporaries_then_cost_no_page_faults():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    faults = {}
    for name in ("default", "tuned"):
        command = [sys.executable, "-c", FAULTS, name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        said, count = done.stdout.split()
        assert said == ("True" if name == "tuned" else "None")
        faults[name] = int(count)
    assert faults["tuned"] * 10 < faults["default"], faults


def test_false_where_there_is_no_mallopt(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert pyflowgen.tune_malloc() is False


@pytest.mark.parametrize("settings", [{"trim_threshold": -1}, {"top_pad": 1 << 31}])
def test_wrong_sizes_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        pyflowgen.tune_malloc(**settings)
