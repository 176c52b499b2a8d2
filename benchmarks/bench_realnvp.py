"""A training step of RealNVP on vectors of 64: 8 couplings, conditioners of 2 ReLU layers of 128, batch 1024.

Every library builds the model its own way (own masks, own scale map), with as many couplings and the same conditioner
sizes, and returns the mean negative log-likelihood. A peer is gated against its own float64 run. torchflows' model has
elementwise affine layers and ActNorms besides, which its RealNVP cannot do without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .harness import Case, Factory, installed, normal

BATCH, FEATURES, COUPLINGS, HIDDEN = 1024, 64, 8, 128
PEERS = ("nflows", "normflows", "zuko", "FrEIA", "torchflows")


def nll(z: Tensor, logdet: Tensor) -> Tensor:
    """Mean negative log-likelihood under a standard normal base."""
    return (0.5 * z.square().sum(-1) - logdet).mean() + 0.5 * z.shape[-1] * math.log(2 * math.pi)


class Loss(nn.Module):
    """A model and the loss to train it with; what is called is in a Callable, for the libraries differ in it."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.model, x)


def net(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(n_in, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, n_out)
    )


def realnvp(couplings: int = COUPLINGS, **options: Any) -> Any:
    from pyflowgen.models.realnvp import RealNVP

    model = RealNVP(
        FEATURES, couplings=couplings, hidden=(HIDDEN, HIDDEN), scale="exp", actnorm=False, permutation="none",
        **options,
    )  # fmt: skip
    for layer in model.modules():  # the last layers start at zero: drawn anew, so that the gate sees every gradient
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.in_features))
    return model


def kernels(device: torch.device, dtype: torch.dtype) -> nn.Module:
    return Loss(realnvp(), lambda model, x: -model.log_prob(x).mean())


def reference(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from pyflowgen._native import reference_path

    def loss(model: Any, x: Tensor) -> Tensor:
        with reference_path():
            return -model.log_prob(x).mean()

    return Loss(realnvp(), loss)


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


def mask_free(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from pyflowgen.ops.affine_coupling import AffineCoupling

    conditioners = [layer.conditioner for layer in realnvp().modules() if isinstance(layer, AffineCoupling)]
    return Loss(MaskFree(conditioners), lambda model, x: nll(*model(x)))


def nflows(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets import MLP
    from nflows.transforms import AffineCouplingTransform, CompositeTransform

    class Conditioner(nn.Module):  # nflows' MLP takes shapes, its couplings pass numbers and a context
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.mlp = MLP([n_in], [n_out], [HIDDEN, HIDDEN])

        def forward(self, x: Tensor, context: Any = None) -> Tensor:
            return self.mlp(x)

    mask = torch.ones(FEATURES)
    mask[::2] = -1
    layers = [AffineCouplingTransform(mask * (-1) ** i, Conditioner) for i in range(COUPLINGS)]
    return Loss(
        Flow(CompositeTransform(layers), StandardNormal([FEATURES])), lambda model, x: -model.log_prob(x).mean()
    )


def normflows(device: torch.device, dtype: torch.dtype) -> nn.Module:
    import normflows as nf

    layers: list[nn.Module] = []
    for _ in range(COUPLINGS):
        layers += [nf.flows.AffineCouplingBlock(nf.nets.MLP([FEATURES // 2, HIDDEN, HIDDEN, FEATURES]))]
        layers += [nf.flows.Permute(FEATURES, mode="swap")]
    base = nf.distributions.DiagGaussian(FEATURES, trainable=False)
    return Loss(nf.NormalizingFlow(base, layers), lambda model, x: model.forward_kld(x))


def zuko(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from zuko.flows import RealNVP

    model = RealNVP(FEATURES, transforms=COUPLINGS, hidden_features=(HIDDEN, HIDDEN))
    return Loss(model, lambda model, x: -model().log_prob(x).mean())


def freia(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock

    model = SequenceINN(FEATURES)
    for _ in range(COUPLINGS // 2):  # a block couples both ways
        model.append(GLOWCouplingBlock, subnet_constructor=net)
    return Loss(model, lambda model, x: nll(*model(x)))


def torchflows(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from torchflows.bijections.finite.autoregressive.architectures import RealNVP
    from torchflows.flows import Flow

    sizes = {"n_hidden": HIDDEN, "n_layers": 3, "nonlinearity": nn.ReLU}
    model = Flow(RealNVP((FEATURES,), n_layers=COUPLINGS, conditioner_kwargs=sizes))
    return Loss(model, lambda model, x: -model.log_prob(x).mean())


def cases(device: torch.device) -> list[Case]:
    peers: dict[str, Factory] = {
        "nflows": nflows,
        "normflows": normflows,
        "zuko": zuko,
        "FrEIA": freia,
        "torchflows": torchflows,
    }
    providers: dict[str, Factory] = {"eager": reference, "pyflowgen": kernels, "mask-free": mask_free}
    providers |= {name: make for name, make in peers.items() if installed(name)}
    product = 2 * BATCH * HIDDEN * (FEATURES // 2 + HIDDEN + FEATURES) * COUPLINGS
    both = 3 * product - 2 * BATCH * HIDDEN * (FEATURES // 2)  # the data need no gradient
    return [
        Case(
            "realnvp",
            f"{BATCH}x{FEATURES} {COUPLINGS} couplings 2x{HIDDEN}",
            torch.float32,
            normal((BATCH, FEATURES)),
            providers,
            modes=("forward+backward", "step"),
            grad=(),
            compile=("eager", "mask-free", "pyflowgen", *PEERS),
            truth={name: name for name in PEERS},
            flops={"forward+backward": both, "step": both},
            quick=True,
        )
    ]
