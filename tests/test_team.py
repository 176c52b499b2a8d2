"""Threads that meet after every step: no deadlock, however few of them come."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ not found")
def test_team(tmp_path: Path) -> None:
    sources = [str(ROOT / "tests/native/team_probe.cpp"), str(ROOT / "csrc/cpu/team.cpp")]
    command = ["g++", "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-I", str(ROOT / "csrc"), *sources]
    subprocess.run([*command, "-o", str(tmp_path / "probe")], check=True)
    for _ in range(3):
        done = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
