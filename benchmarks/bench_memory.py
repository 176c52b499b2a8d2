"""Training memory against depth: RealNVP on vectors of 64 with 8 and with 64 couplings, conditioners of 2 SiLU layers
of 128, batch 1024; loss and its gradients. (At the kink of a ReLU one rounding turns a unit's gradient on or off, and
the gate would judge that.)

"pyflowgen" rebuilds the layers' inputs in backward (`memory="recompute"`), "stored" is the same model keeping all of
them, "checkpoint" the same under `torch.utils.checkpoint`, one segment a coupling. What matters is a row's peak less
what inputs, parameters and their gradients take (`least_mib`): the activations. With the inverse they stay as they are
from depth 8 to 64; the price is in the times.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .bench_realnvp import realnvp
from .flows import HIDDEN, Applied
from .harness import Case, Factory, normal

BATCH, FEATURES, DEPTHS = 1024, 64, (8, 64)


class Checkpointed(nn.Module):
    """The layers of a chain, each under torch's checkpoint."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for layer in self.layers:
            x, logdet = checkpoint(layer, x, use_reentrant=False)
            total = total + logdet
        return x, total


def providers(couplings: int) -> dict[str, Factory]:
    from pyflowgen._native import reference_path
    from pyflowgen.models import RealNVP

    def loss(model: RealNVP, x: Tensor) -> Tensor:
        return -model.log_prob(x).mean()

    def plain(model: RealNVP, x: Tensor) -> Tensor:
        with reference_path():
            return loss(model, x)

    def segments(device: torch.device, dtype: torch.dtype) -> nn.Module:
        model = realnvp(FEATURES, couplings, activation="silu")
        model.bijection = Checkpointed(model.bijection.bijections)
        return Applied(model, loss)

    return {
        "eager": lambda device, dtype: Applied(realnvp(FEATURES, couplings, activation="silu"), plain),
        "pyflowgen": lambda device, dtype: Applied(
            realnvp(FEATURES, couplings, activation="silu", memory="recompute"), loss
        ),
        "stored": lambda device, dtype: Applied(realnvp(FEATURES, couplings, activation="silu"), loss),
        "checkpoint": segments,
    }


def cases(device: torch.device) -> list[Case]:
    found = []
    for couplings in DEPTHS:
        product = 2 * BATCH * HIDDEN * (FEATURES // 2 + HIDDEN + FEATURES) * couplings
        found.append(
            Case(
                "memory",
                f"{BATCH}x{FEATURES} {couplings} couplings 2x{HIDDEN}",
                torch.float32,
                normal((BATCH, FEATURES)),
                providers(couplings),
                modes=("forward+backward",),
                grad=(),
                compile=(),
                slack=1e-5,
                flops={"forward+backward": 3 * product},
                quick=True,
            )
        )
    return found
