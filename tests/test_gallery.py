"""The gallery's panels are what they say, and the command draws them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from pyflowgen.bijection import Chain
from pyflowgen.data import toy
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import ActNorm

pytest.importorskip("matplotlib")
# Installed, the folder is pyflowgen.benchmarks; from a plain checkout it is benchmarks.
try:
    gallery = importlib.import_module("pyflowgen.benchmarks.gallery")
except ImportError:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    gallery = importlib.import_module("benchmarks.gallery")


def known(shift: Tensor, log_scale: Tensor) -> Flow:
    """A normal distribution of mean -shift/scale and deviation 1/scale."""
    layer = ActNorm(2, init=False)
    with torch.no_grad():
        layer.shift.copy_(shift)
        layer.log_scale.copy_(log_scale)
    return Flow(DiagNormal(2), Chain(layer))


def test_panels_of_a_known_flow():
    flow = known(torch.tensor([0.5, -0.2]), torch.tensor([0.7, 0.3]))
    scale = flow.bijection[0].log_scale.detach().exp()
    mean = -flow.bijection[0].shift.detach() / scale
    p = gallery.panels(flow, "rings", -1.0, pixels=100, points=3000, lines=7)
    data = toy("rings", 30_000).train
    assert (
        (p.half > 4)
        and (p.centre.abs() < 0.3).all()
        and ((data - p.centre).abs() < p.half).all(1).float().mean() > 0.99
    )
    cell = (2 * p.half / 100) ** 2
    assert abs(p.density.sum() * cell - 1) < 0.01
    row, column = divmod(int(p.density.argmax()), 100)  # rows from the bottom
    peak = p.centre + p.half * ((torch.tensor([column, row]) + 0.5) / 50 - 1)
    assert (peak - mean).abs().max() <= p.half / 50
    assert (p.samples.mean(0) - mean).abs().max() < 0.05 and torch.equal(p.data, toy("rings", 30_000).train[:3000])
    assert p.lines.shape == (14, 400, 2)
    z, _ = flow.bijection(p.lines)
    assert z.abs().max() < 3 + 1e-4
    assert (z[:7, :, 0].std(1) < 1e-5).all() and (z[7:, :, 1].std(1) < 1e-5).all() and (z[:7, :, 1].std(1) > 1).all()


def test_command_draws_a_picture(tmp_path):
    done = CliRunner().invoke(
        gallery.gallery, ["--out", str(tmp_path / "a" / "g.png"), "--seconds", "0.3", "--data", "moons"]
    )
    assert done.exit_code == 0, (done.output, done.exception)
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["RealNVP on moons", "NSF on moons", "gallery"]
    with Image.open(tmp_path / "a" / "g.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    assert width > 5 * height > 500
    seventh = width / 7  # every panel has something on it, the densities most
    spread = [pixels[:, int(i * seventh) + 12 : int((i + 1) * seventh) - 12].std() for i in range(7)]
    assert min(spread) > 8 and max(spread) < 128, spread
    bad = CliRunner().invoke(gallery.gallery, ["--out", str(tmp_path / "g.png"), "--seconds", "0"])
    assert bad.exit_code == 2 and "--seconds" in bad.output and not (tmp_path / "g.png").exists()
