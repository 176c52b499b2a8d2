"""A density known in closed form, learnt: NICE on the banana (u, v + u²), u and v standard normal."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch

import pyflowgen
from pyflowgen.models import NICE

ENTROPY = math.log(2 * math.pi * math.e)  # the map (u, v) -> (u, v + u²) keeps the normal's


def banana(n: int, generator: torch.Generator) -> torch.Tensor:
    u, v = torch.randn(2, n, generator=generator)
    return torch.stack([u, v + u**2], -1)


@pytest.mark.parametrize("path", ["kernel", "reference"])
def test_banana(path):
    g = torch.Generator().manual_seed(0)
    train, test = banana(20000, g), banana(20000, g)
    torch.manual_seed(0)
    model = NICE(2, couplings=4, hidden=(64, 64), prior="normal", activation="silu")
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    steps = 600
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with pyflowgen.reference_path() if path == "reference" else contextlib.nullcontext():
        for _ in range(steps):
            x = train[torch.randint(len(train), (512,), generator=g)]
            loss = -model.log_prob(x).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            logp = model.log_prob(test)
            z, _ = model.bijection(test)
            back, _ = model.bijection.inverse(z)
            h = 0.02
            a, b = torch.arange(-6 + h / 2, 6, h), torch.arange(-4 + h / 2, 30, h)
            rows = torch.cartesian_prod(a, b).split(65536)
            mass = sum(model.log_prob(r).double().exp().sum() for r in rows).item() * h * h
    mean, error = logp.mean().item(), logp.std().item() / math.sqrt(len(test))
    assert mean >= -ENTROPY - 0.03, f"{mean:.4f} nats, the data allow {-ENTROPY:.4f}"
    # more than the data's own density would be a log-determinant that is wrong in the flow's favour
    assert mean <= -ENTROPY + 3 * error
    assert abs(mass - 1) <= 0.003, mass
    assert (back - test).abs().max() < 1e-5
