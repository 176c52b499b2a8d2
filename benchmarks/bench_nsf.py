"""Neural spline flows on vectors of 64 and of 2: training and sampling with 4 couplings of 8 bins, conditioners of 2
ReLU layers of 128.

Every library builds the model its own way, with as many couplings, bins and conditioner sizes. A peer is gated against
its own float64 run. normflows' couplings have, besides, a spline of their own on the half that conditions.
"""

from __future__ import annotations

import torch
from torch import nn

from .bench_realnvp import through
from .flows import HIDDEN, Build, Built, by_nflows, by_reference, draw, flow_cases, ours
from .harness import Case, installed

COUPLINGS, BINS = 4, 8


def nsf(features: int) -> nn.Module:
    from pyflowgen.models.nsf import NSF

    return draw(
        NSF(
            features, couplings=COUPLINGS, hidden=(HIDDEN, HIDDEN), bins=BINS, bound=3.0, actnorm=False,
            permutation="none",
        )
    )  # fmt: skip


def nflows(features: int) -> Built:
    from functools import partial

    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    coupling = partial(PiecewiseRationalQuadraticCouplingTransform, num_bins=BINS, tails="linear", tail_bound=3.0)
    return by_nflows(features, COUPLINGS, coupling)


def normflows(features: int) -> Built:
    import normflows as nf

    layers = [
        nf.flows.CoupledRationalQuadraticSpline(features, 2, HIDDEN, num_bins=BINS, reverse_mask=bool(i % 2))
        for i in range(COUPLINGS)
    ]
    base = nf.distributions.DiagGaussian(features, trainable=False)
    return Built(nf.NormalizingFlow(base, layers), lambda model, x: model.forward_kld(x), through)


def zuko(features: int) -> Built:
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
    return Built(
        Flow(layers, base), lambda model, x: -model().log_prob(x).mean(), lambda model, z: model().transform.inv(z)
    )


def products(batch: int, features: int) -> int:
    half = features // 2
    return 2 * batch * HIDDEN * (half + HIDDEN + half * (3 * BINS - 1)) * COUPLINGS


def cases(device: torch.device) -> list[Case]:
    kernels = ours(nsf)
    builds: dict[str, Build] = {"eager": by_reference(kernels), "pyflowgen": kernels}
    peers: dict[str, Build] = {"nflows": nflows, "normflows": normflows, "zuko": zuko}
    builds |= {name: build for name, build in peers.items() if installed(name)}
    return flow_cases(
        "nsf",
        f"{COUPLINGS} couplings 2x{HIDDEN} {BINS} bins",
        builds,
        sizes=((1024, 64), (1024, 2), (64, 2)),
        products=products,
        first=lambda batch, features: 2 * batch * HIDDEN * (features // 2),
        compiled=("eager",),
        quick=((1024, 2),),  # compiling the rivals of the large one takes minutes
        modes=("forward", "forward+backward"),
    )
