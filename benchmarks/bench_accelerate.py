"""Other libraries' models as they are and after `pyflowgen.accelerate`: a training step's forward and backward.

"eager" is the library's own model, "compiled" that under torch.compile. Vectors of 64, batch 1024, networks 128 wide;
the autoregressive flows keep their own masked networks, of which only the splines behind them get faster.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import bench_nsf, bench_realnvp
from .flows import Applied, Build, Built, draw, nll
from .harness import Case, Factory, installed, normal

BATCH, FEATURES, HIDDEN = 1024, 64, 128


def residual(coupling: Callable[..., Any], couplings: int) -> Built:
    """nflows' couplings on its residual networks of one block, a random permutation after each."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import CompositeTransform, ReversePermutation

    mask = torch.arange(FEATURES) % 2 * 2 - 1
    layers: list[Any] = []
    for _ in range(couplings):
        layers += [coupling(mask, functools.partial(ResidualNet, hidden_features=HIDDEN, num_blocks=1))]
        layers += [ReversePermutation(FEATURES)]
    flow = Flow(CompositeTransform(layers), StandardNormal([FEATURES]))
    return Built(flow, lambda model, x: -model.log_prob(x).mean(), lambda model, z: model._transform.inverse(z)[0])


def nflows_realnvp(features: int) -> Built:
    from nflows.transforms import AffineCouplingTransform

    return residual(AffineCouplingTransform, 8)


def nflows_nsf(features: int) -> Built:
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Spline

    return residual(functools.partial(Spline, num_bins=8, tails="linear", tail_bound=3.0), 4)


def nflows_autoregressive(features: int) -> Built:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import CompositeTransform
    from nflows.transforms import MaskedPiecewiseRationalQuadraticAutoregressiveTransform as Spline

    layers = [Spline(FEATURES, HIDDEN, num_bins=8, tails="linear", tail_bound=3.0, num_blocks=1) for _ in range(4)]
    flow = Flow(CompositeTransform(layers), StandardNormal([FEATURES]))
    return Built(flow, lambda model, x: -model.log_prob(x).mean(), lambda model, z: model._transform.inverse(z)[0])


def freia(features: int) -> Built:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import AllInOneBlock

    model = SequenceINN(features)
    for _ in range(8):
        model.append(AllInOneBlock, subnet_constructor=bench_realnvp.net)
    return Built(model, lambda model, x: nll(*model(x)), lambda model, z: model(z, rev=True)[0])


MODELS: dict[str, tuple[str, Build]] = {
    "nflows RealNVP": ("nflows", nflows_realnvp),
    "nflows NSF": ("nflows", nflows_nsf),
    "nflows autoregressive NSF": ("nflows", nflows_autoregressive),
    "normflows RealNVP": ("normflows", bench_realnvp.normflows),
    "normflows NSF": ("normflows", bench_nsf.normflows),
    "zuko RealNVP": ("zuko", bench_realnvp.zuko),
    "zuko NSF by coupling": ("zuko", bench_nsf.zuko),
    "FrEIA all-in-one blocks": ("FrEIA", freia),
}


def made(build: Build, fast: bool) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        import pyflowgen

        built = build(FEATURES)
        model = draw(built.model)
        return Applied(pyflowgen.accelerate(model) if fast else model, built.loss)

    return make


def cases(device: torch.device) -> list[Case]:
    return [
        Case(
            op="accelerate",
            shape=f"{BATCH}x{FEATURES} {name}",
            dtype=torch.float32,
            inputs=normal((BATCH, FEATURES)),
            providers={"eager": made(build, False), "pyflowgen": made(build, True)},
            modes=("forward+backward",),
            grad=(),
            compile=("eager",) if library == "nflows" else (),  # the others' take minutes, or crash
            quick=name in ("nflows RealNVP", "zuko NSF by coupling"),
        )
        for name, (library, build) in MODELS.items()
        if installed(library)
    ]
