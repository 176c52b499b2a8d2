"""A training step of neural spline flows on vectors of 64 and of 2: couplings of 8 bins, conditioners of 2 layers of
128 with ReLU, batch 1024.

Every library builds the model its own way, with as many couplings, bins and conditioner sizes, and returns the mean
negative log-likelihood. A peer is gated against its own float64 run. normflows' couplings have, besides, a spline of
their own on the half that conditions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .bench_realnvp import HIDDEN, Loss
from .harness import Case, Factory, installed, normal

BATCH, COUPLINGS, BINS = 1024, 4, 8


def _pyflowgen(features: int) -> nn.Module:
    from pyflowgen.models.nsf import NSF

    model = NSF(
        features, couplings=COUPLINGS, hidden=(HIDDEN, HIDDEN), bins=BINS, bound=3.0, actnorm=False, permutation="none"
    )
    for layer in model.modules():  # the last layers start at zero: drawn anew, so that the gate sees every gradient
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.in_features))
    return model


def kernels(features: int) -> Factory:
    return lambda device, dtype: Loss(_pyflowgen(features), lambda model, x: -model.log_prob(x).mean())


def reference(features: int) -> Factory:
    from pyflowgen._native import reference_path

    def loss(model: Any, x: Tensor) -> Tensor:
        with reference_path():
            return -model.log_prob(x).mean()

    return lambda device, dtype: Loss(_pyflowgen(features), loss)


def nflows(features: int) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow
        from nflows.nn.nets import MLP
        from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

        class Conditioner(nn.Module):  # nflows' MLP takes shapes, its couplings pass numbers and a context
            def __init__(self, n_in: int, n_out: int) -> None:
                super().__init__()
                self.mlp = MLP([n_in], [n_out], [HIDDEN, HIDDEN])

            def forward(self, x: Tensor, context: Any = None) -> Tensor:
                return self.mlp(x)

        mask = torch.ones(features)
        mask[::2] = -1
        layers = [
            PiecewiseRationalQuadraticCouplingTransform(
                mask * (-1) ** i, Conditioner, num_bins=BINS, tails="linear", tail_bound=3.0
            )
            for i in range(COUPLINGS)
        ]
        flow = Flow(CompositeTransform(layers), StandardNormal([features]))
        return Loss(flow, lambda model, x: -model.log_prob(x).mean())

    return make


def normflows(features: int) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        import normflows as nf

        layers = [
            nf.flows.CoupledRationalQuadraticSpline(features, 2, HIDDEN, num_bins=BINS, reverse_mask=bool(i % 2))
            for i in range(COUPLINGS)
        ]
        base = nf.distributions.DiagGaussian(features, trainable=False)
        return Loss(nf.NormalizingFlow(base, layers), lambda model, x: model.forward_kld(x))

    return make


def zuko(features: int) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        from functools import partial

        from zuko.distributions import DiagNormal
        from zuko.flows import Flow, GeneralCouplingTransform, UnconditionalDistribution
        from zuko.transforms import MonotonicRQSTransform

        layers = [
            GeneralCouplingTransform(
                features,
                mask=torch.arange(features) % 2 == i % 2,
                univariate=partial(MonotonicRQSTransform, bound=3.0),
                shapes=[(BINS,), (BINS,), (BINS - 1,)],
                hidden_features=(HIDDEN, HIDDEN),
            )
            for i in range(COUPLINGS)
        ]
        base = UnconditionalDistribution(DiagNormal, torch.zeros(features), torch.ones(features), buffer=True)
        return Loss(Flow(layers, base), lambda model, x: -model().log_prob(x).mean())

    return make


def cases(device: torch.device) -> list[Case]:
    result = []
    for features in (64, 2):
        providers: dict[str, Factory] = {"eager": reference(features), "pyflowgen": kernels(features)}
        peers = {"nflows": nflows, "normflows": normflows, "zuko": zuko}
        providers |= {name: make(features) for name, make in peers.items() if installed(name)}
        half = features // 2
        product = 2 * BATCH * HIDDEN * (half + HIDDEN + half * (3 * BINS - 1)) * COUPLINGS
        result.append(
            Case(
                "nsf",
                f"{BATCH}x{features} {COUPLINGS} couplings 2x{HIDDEN} {BINS} bins",
                torch.float32,
                normal((BATCH, features)),
                providers,
                modes=("forward", "forward+backward"),
                grad=(),
                compile=("eager",),
                truth={name: name for name in peers},
                flops={"forward": product, "forward+backward": 3 * product - 2 * BATCH * HIDDEN * half},
                quick=features == 2,  # compiling the rivals of the large one takes minutes
            )
        )
    return result
