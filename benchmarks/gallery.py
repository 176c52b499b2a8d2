"""The gallery: densities in the plane as RealNVP and NSF learn them, in one picture.

A row for each data set; for each model its density, samples, and the plane's latent grid as the flow warps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

from pyflowgen.data import toy
from pyflowgen.flow import Flow
from pyflowgen.models import NSF, RealNVP
from pyflowgen.train import TrainConfig, evaluate, fit

DATA = ("moons", "rings", "checkerboard", "spirals")
MODELS: Mapping[str, Callable[[], Flow]] = {
    "RealNVP": lambda: RealNVP(2, couplings=12, hidden=(64, 64), activation="silu"),
    "NSF": lambda: NSF(2, couplings=6, hidden=(64, 64), activation="silu"),
}


@dataclass(frozen=True)
class Panels:
    """What is drawn of one model on one data set, all on the square of half width `half` about `centre`."""

    centre: Tensor
    half: float
    data: Tensor  # (points, 2)
    density: Tensor  # (pixels, pixels), rows from the bottom
    samples: Tensor  # (points, 2)
    lines: Tensor  # (lines, points, 2): first those of constant first latent, then those of constant second
    nats: float  # test log-likelihood


def learn(model: str, data: str, seconds: float, seed: int = 0) -> tuple[Flow, float]:
    """A model trained on a toy for so many seconds, and its test log-likelihood in nats."""
    examples = toy(data, 50_000, seed=seed)
    torch.manual_seed(seed)
    flow = MODELS[model]()
    fit(flow, examples, TrainConfig(epochs=10_000, time_limit=seconds, batch=512, lr=5e-3, ema=0.99, seed=seed))
    flow.eval()
    nats = evaluate(flow, examples, examples.test)["nats"]
    assert nats is not None
    return flow, nats


@torch.no_grad()
def panels(flow: Flow, data: str, nats: float, *, pixels: int = 200, points: int = 6000, lines: int = 25) -> Panels:
    examples = toy(data, 10 * points).train
    low, high = examples.quantile(0.001, 0), examples.quantile(0.999, 0)
    centre, half = (low + high) / 2, float((high - low).max()) * 0.58
    axis = (torch.arange(pixels) + 0.5) / pixels * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    density = flow.log_prob(centre + half * torch.stack([x, y], -1)).exp()
    level, along = torch.linspace(-3, 3, lines), torch.linspace(-3, 3, 400)
    one, other = torch.meshgrid(level, along, indexing="ij")
    grid = torch.cat([torch.stack([one, other], -1), torch.stack([other, one], -1)])
    warped, _ = flow.bijection.inverse(grid)
    torch.manual_seed(0)
    return Panels(centre, half, examples[:points], density, flow.sample(points), warped, nats)


def draw(found: Mapping[str, Mapping[str, Panels]], path: Path) -> None:
    """One picture of all: `found[data][model]`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    models = list(next(iter(found.values())))
    figure = Figure(figsize=(1.65 * (1 + 3 * len(models)), 1.78 * len(found)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(found), 1 + 3 * len(models), squeeze=False)
    for k, (row, (data, by_model)) in enumerate(zip(axes, found.items(), strict=True)):
        for axis in row:
            first = next(iter(by_model.values()))
            left, bottom = (first.centre - first.half).tolist()
            right, top = (first.centre + first.half).tolist()
            axis.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")
            for side in axis.spines.values():
                side.set(color="#bbb", linewidth=0.5)
        row[0].scatter(*first.data.T.numpy(), s=0.4, color="#444", linewidths=0)
        row[0].set_ylabel(data)
        for i, (name, p) in enumerate(by_model.items()):
            density, samples, grid = row[1 + 3 * i : 4 + 3 * i]
            # a few high peaks must not darken the rest
            density.imshow(
                p.density.numpy(), origin="lower", extent=(left, right, bottom, top), cmap="magma",
                vmax=float(p.density.flatten().quantile(0.995)),
            )  # fmt: skip
            samples.scatter(*p.samples.T.numpy(), s=0.4, color="#c2410c", linewidths=0)
            half = len(p.lines) // 2
            for part, colour in ((p.lines[:half], "#1d4ed8"), (p.lines[half:], "#0f766e")):
                grid.add_collection(LineCollection(list(part.numpy()), colors=colour, linewidths=0.35))
            density.set_xlabel(f"{p.nats:.3f} nats", fontsize=7)
            if k == 0:
                for axis, what in ((density, "density"), (samples, "samples"), (grid, "latent grid")):
                    axis.set_title(f"{name}: {what}", fontsize=9)
    axes[0][0].set_title("data", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


@click.command("gallery")
@click.option("--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The picture (PNG).")
@click.option("--data", "names", multiple=True, type=click.Choice(DATA), help="Data sets; repeatable.  [default: all]")
@click.option("--seconds", default=4.0, show_default=True, help="Training time of each model on each data set.")
@click.option("--seed", default=0, show_default=True)
def gallery(out: Path, names: tuple[str, ...], seconds: float, seed: int) -> None:
    """Draw densities in the plane as RealNVP and NSF learn them: density, samples, warped grid."""
    if not (0 < seconds < math.inf):
        raise click.BadParameter(f"{seconds}, expected a time above 0", param_hint="--seconds")
    found: dict[str, dict[str, Panels]] = {}
    for data in names or DATA:
        found[data] = {}
        for model in MODELS:
            flow, nats = learn(model, data, seconds, seed)
            found[data][model] = panels(flow, data, nats)
            click.echo(f"{model} on {data}: {nats:.3f} nats")
    draw(found, out)
    click.echo(f"gallery: {out}")
