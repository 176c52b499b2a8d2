"""RealNVP on vectors of 64 and of 2: training and sampling with 8 couplings, conditioners of 2 ReLU layers of 128.

Every library builds the model its own way (own masks, own scale map), with as many couplings and the same conditioner
sizes. A peer is gated against its own float64 run. torchflows' model has elementwise affine layers and ActNorms
besides, which its RealNVP cannot do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .flows import HIDDEN, Build, Built, by_nflows, by_reference, draw, flow_cases, nll, ours
from .harness import Case, installed

COUPLINGS = 8


def net(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_out)
    )


def realnvp(features: int, couplings: int = COUPLINGS, **options: Any) -> Any:
    from pyflowgen.models.realnvp import RealNVP

    return draw(
        RealNVP(
            features, couplings=couplings, hidden=(HIDDEN, HIDDEN), scale="exp", actnorm=False, permutation="none",
            **options,
        )
    )  # fmt: skip


class MaskFree(nn.Module):
    """The same flow by hand: halves are swapped by name, never masked, and joined once at the end."""

    def __init__(self, conditioners: Sequence[nn.Module]) -> None:
        super().__init__()
        self.conditioners = nn.ModuleList(conditioners)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x.chunk(2, -1)
        logdet: Any = 0.0
        for conditioner in self.conditioners:
            shift, s = conditioner(kept).chunk(2, -1)
            kept, moved = moved * s.exp() + shift, kept
            logdet = logdet + s.sum(-1)
        return torch.cat([kept, moved], -1), logdet

    def inverse(self, z: Tensor) -> Tensor:
        kept, moved = z.chunk(2, -1)
        for conditioner in reversed(self.conditioners):
            shift, s = conditioner(moved).chunk(2, -1)
            kept, moved = moved, (kept - shift) * (-s).exp()
        return torch.cat([kept, moved], -1)


def mask_free(features: int) -> Built:
    from pyflowgen.ops.affine_coupling import AffineCoupling

    conditioners = [layer.conditioner for layer in realnvp(features).modules() if isinstance(layer, AffineCoupling)]
    return Built(MaskFree(conditioners), lambda model, x: nll(*model(x)), lambda model, z: model.inverse(z))


def nflows(features: int) -> Built:
    from nflows.transforms import AffineCouplingTransform

    return by_nflows(features, COUPLINGS, AffineCouplingTransform)


def through(model: Any, z: Tensor) -> Tensor:
    """normflows' way from latents to data."""
    for flow in model.flows:
        z, _ = flow(z)
    return z


def normflows(features: int) -> Built:
    import normflows as nf

    layers: list[nn.Module] = []
    for _ in range(COUPLINGS):
        layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([features // 2, HIDDEN, HIDDEN, features]))]
        layers += [nf.flows.Permute(features, mode="swap")]
    base = nf.distributions.DiagGaussian(features, trainable=False)
    return Built(nf.NormalizingFlow(base, layers), lambda model, x: model.forward_kld(x), through)


def zuko(features: int) -> Built:
    from zuko.flows import RealNVP

    model = RealNVP(features, transforms=COUPLINGS, hidden_features=(HIDDEN, HIDDEN))
    return Built(model, lambda model, x: -model().log_prob(x).mean(), lambda model, z: model().transform.inv(z))


def freia(features: int) -> Built:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock

    model = SequenceINN(features)
    for _ in range(COUPLINGS // 2):  # a block couples both ways
        model.append(GLOWCouplingBlock, subnet_constructor=net)
    return Built(model, lambda model, x: nll(*model(x)), lambda model, z: model(z, rev=True)[0])


def torchflows(features: int) -> Built:
    from torchflows.bijections.finite.autoregressive.architectures import RealNVP
    from torchflows.flows import Flow

    sizes = {"n_hidden": HIDDEN, "n_layers": 3, "nonlinearity": nn.ReLU}
    model = Flow(RealNVP((features,), n_layers=COUPLINGS, conditioner_kwargs=sizes))
    return Built(model, lambda model, x: -model.log_prob(x).mean(), lambda model, z: model.bijection.inverse(z)[0])


def products(batch: int, features: int) -> int:
    return 2 * batch * HIDDEN * (features // 2 + HIDDEN + features) * COUPLINGS


def cases(device: torch.device) -> list[Case]:
    kernels = ours(realnvp)
    peers: dict[str, Build] = {
        "nflows": nflows,
        "normflows": normflows,
        "zuko": zuko,
        "FrEIA": freia,
        "torchflows": torchflows,
    }
    builds: dict[str, Build] = {"eager": by_reference(kernels), "pyflowgen": kernels, "mask-free": mask_free}
    builds |= {name: build for name, build in peers.items() if installed(name)}
    return flow_cases(
        "realnvp",
        f"{COUPLINGS} couplings 2x{HIDDEN}",
        builds,
        sizes=((1024, 64), (1024, 2), (64, 2)),
        products=products,
        first=lambda batch, features: 2 * batch * HIDDEN * (features // 2),
        compiled=("eager", "mask-free", "pyflowgen", *peers),
        quick=((1024, 64),),
    )
