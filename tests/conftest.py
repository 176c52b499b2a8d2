"""Devices for the whole suite: `pytest --device cuda` runs the battery on a GPU."""

from __future__ import annotations

import os

import pytest

# Cores are shared with other processes on small machines: waiting threads should sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="where the op battery runs")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this machine has no usable GPU")
    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))
