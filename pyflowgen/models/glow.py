"""Glow: invertible 1x1 convolutions between the couplings of a multi-scale flow for images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pyflowgen.bijection import CHECKPOINT_EVERY, Bijection, Chain, Memory
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import Dequantize, GlowStep, MultiScale, Squeeze
from pyflowgen.nets import ConvNet, NormalPrior
from pyflowgen.ops.invertible_linear import Factor


class _Labelled(Bijection):
    """A conditional bijection under integer labels: its context is their one-hot code."""

    def __init__(self, bijection: Bijection, classes: int) -> None:
        super().__init__()
        self.bijection, self.classes = bijection, classes

    def _code(self, x: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None or labels.is_floating_point():
            got = "are missing" if labels is None else f"are {labels.dtype}"
            raise ValueError(f"Glow: labels {got}, expected integers below {self.classes} as context")
        return F.one_hot(labels.long(), self.classes).to(x.dtype if x.is_floating_point() else None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, logdet = self.bijection(x, self._code(x, context))
        return y, logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(y, self._code(y, context))

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.bijection.stochastic


class Glow(Flow):
    r"""Generative flow with invertible 1×1 convolutions for images `(C, H, W)`.

    On each of `scales` scales a 2×2 squeeze, `steps` steps of `ActNorm`, 1×1 convolution and coupling (`GlowStep`), and
    half of the channels leave as latents. Their prior is normal, with mean and deviation given by a convolution of the
    half that goes on; the last scale's prior has a mean and a deviation for each channel. Both priors are inside the
    bijection, so latents are flat and standard normal, `(..., C·H·W)`.

    Args:
        event_shape: `(C, H, W)`, H and W divisible by :math:`2^{scales}`.
        scales: number of scales L.
        steps: steps K on each scale.
        channels: width of the couplings' networks (`ConvNet`).
        coupling: `"affine"`, or `"additive"` as in NICE.
        factor: parametrisation of the 1×1 convolutions, `"lu"` or `"dense"`.
        levels: data are integers `0..levels-1`, dequantised by `Dequantize(levels)` first; None for continuous data.
        context_features: size of a context vector given to every coupling and prior; 0 for none.
        classes: condition on integer labels below this number instead; they are the context, without a dimension of
            their own.
        memory, checkpoint_every: what backward keeps of the steps, see `Chain`.
        seed: of the initial rotations; None draws them from torch's generator.

    Defaults are the paper's for CIFAR-10. Use `sample(..., temperature=0.7)` for sharper samples.

    Reference: Kingma and Dhariwal, *Glow: Generative Flow with Invertible 1×1 Convolutions*, 2018.

    >>> import torch
    >>> from pyflowgen.models.glow import Glow
    >>> model = Glow((3, 8, 8), scales=2, steps=2, channels=16, classes=10)
    >>> x, labels = torch.rand(5, 3, 8, 8), torch.arange(5)
    >>> model.log_prob(x, labels).shape, model.sample(2, labels, temperature=0.7).shape
    (torch.Size([5]), torch.Size([2, 5, 3, 8, 8]))
    >>> torch.allclose(model.decode(model.encode(x, labels), labels), x, atol=1e-4)
    True
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        scales: int = 3,
        steps: int = 32,
        channels: int = 512,
        coupling: Literal["affine", "additive"] = "affine",
        factor: Factor = "lu",
        levels: int | None = None,
        context_features: int = 0,
        classes: int = 0,
        memory: Memory = "store",
        checkpoint_every: int | None = CHECKPOINT_EVERY,
        seed: int | None = None,
    ) -> None:
        shape = tuple(event_shape)
        if len(shape) != 3 or min(shape) < 1 or scales < 1 or any(s % 2**scales for s in shape[1:]):
            raise ValueError(
                f"Glow: event_shape is {shape} with scales={scales}, "
                "expected (C, H, W) with H and W divisible by 2**scales, and at least one scale"
            )
        if steps < 1:
            raise ValueError(f"Glow: steps is {steps}, expected at least 1")
        if coupling not in ("affine", "additive"):
            raise ValueError(f"Glow: coupling is {coupling!r}, expected 'affine' or 'additive'")
        if context_features and classes:
            raise ValueError(f"Glow: context_features={context_features} and classes={classes}, expected one of them")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        given = dict(context_features=context_features or classes)
        stages: list[Bijection] = []
        priors = []
        c = shape[0]
        for k in range(scales):
            c *= 4
            stage: list[Bijection] = [Squeeze()]
            for _ in range(steps):
                out = c // 2 * (2 if coupling == "affine" else 1)
                net = ConvNet(c - c // 2, channels, out, **given)
                additive = coupling == "additive"
                stage.append(GlowStep(c, net, additive=additive, factor=factor, generator=generator))
            stages.append(Chain(*stage, memory=memory, checkpoint_every=checkpoint_every))
            last = k == scales - 1
            c //= 1 if last else 2
            priors.append(NormalPrior(c, 0 if last else c, **given))
        layers: list[Bijection] = [] if levels is None else [Dequantize(levels, event_dim=3)]
        chain: Bijection = Chain(*layers, MultiScale(stages, shape, priors))
        super().__init__(
            DiagNormal(math.prod(shape)),
            _Labelled(chain, classes) if classes else chain,
            event_shape=shape,
            context_dim=0 if classes else 1,
        )
        self.config: dict[str, Any] = dict(
            event_shape=list(shape),
            scales=scales,
            steps=steps,
            channels=channels,
            coupling=coupling,
            factor=factor,
            levels=levels,
            context_features=context_features,
            classes=classes,
            memory=memory,
            checkpoint_every=checkpoint_every,
            seed=seed,
        )
