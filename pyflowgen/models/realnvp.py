"""RealNVP: affine couplings, for vectors and, over several scales, for images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pyflowgen.bijection import CHECKPOINT_EVERY, Bijection, Chain, Memory
from pyflowgen.coupling import Mask
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import ActNorm, MultiScale, Squeeze
from pyflowgen.models.parts import Mixing, check_mixing, mixing, to_reals
from pyflowgen.nets import MLP, ConvResNet
from pyflowgen.ops.affine_coupling import AffineCoupling
from pyflowgen.ops.affine_coupling import Scale as ScaleMap


class RealNVP(Flow):
    r"""Real-valued non-volume-preserving flow, :math:`y_b = x_b \odot e^{\ell(s(x_a))} + t(x_a)` in each coupling.

    *Vectors* (`event_shape` an integer or `(D,)`): `couplings` couplings on halves, each after an `ActNorm`. Couplings
    come in pairs that transform one half each; between the pairs the dimensions are permuted.

    *Images* (`(C, H, W)`): on each of `scales` scales 3 checkerboard couplings, a 2×2 squeeze, 3 channel-wise
    couplings, and half of the channels leave as latents; the last scale has 4 checkerboard couplings. An `ActNorm`
    takes the place of the paper's batch normalisation. Latents are flat, `(..., C·H·W)`.

    Args:
        event_shape: shape of one datum. H and W must be divisible by :math:`2^{scales-1}`.
        couplings: number of couplings (vectors).
        hidden: widths of the hidden layers of the conditioners (vectors).
        channels, blocks: hidden channels and residual blocks of the conditioners (images).
        scales: number of scales (images).
        scale, clamp: map of the log-scale and its bound, see `affine_coupling`; the default is tanh as in the paper.
        actnorm: put an `ActNorm` before each coupling.
        permutation: what stands between pairs of couplings: `"random"` (a permutation drawn from `seed`), `"reverse"`,
            `"lu"` (an `InvertibleLinear`) or `"none"` (vectors).
        alpha: map data in [0, 1] to the real line by `Logit(alpha)` first; None for data that live there.
        levels: data are integers `0..levels-1`, dequantised by `Dequantize(levels)` before anything else; None for
            continuous data.
        activation: activation of the conditioners.
        context_features: size of a context vector given to every conditioner; 0 for none.
        weight_norm: weight-normalise the conditioners' 3×3 convolutions (images).
        memory, checkpoint_every: what backward keeps of the layers, see `Chain`.
        seed: seed of the permutations.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017.

    >>> import torch
    >>> from pyflowgen.models.realnvp import RealNVP
    >>> model = RealNVP(6, couplings=4, hidden=(16,), alpha=0.05, levels=17)
    >>> pixels = torch.randint(0, 17, (10, 6))
    >>> model.log_prob(pixels).shape, model.sample(3).shape
    (torch.Size([10]), torch.Size([3, 6]))
    >>> images = RealNVP((1, 8, 8), channels=8, blocks=1)
    >>> images.log_prob(torch.randn(5, 1, 8, 8)).shape, images.sample(2).shape
    (torch.Size([5]), torch.Size([2, 1, 8, 8]))
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        couplings: int = 8,
        hidden: Sequence[int] = (128, 128),
        channels: int = 64,
        blocks: int = 2,
        scales: int = 2,
        scale: ScaleMap = "tanh",
        clamp: float | None = None,
        actnorm: bool = True,
        permutation: Mixing = "random",
        alpha: float | None = None,
        levels: int | None = None,
        activation: str = "relu",
        context_features: int = 0,
        weight_norm: bool = False,
        memory: Memory = "store",
        checkpoint_every: int | None = CHECKPOINT_EVERY,
        seed: int = 0,
    ) -> None:
        shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        n = len(shape)
        if n not in (1, 3) or min(shape) < 1 or (n == 1 and shape[0] < 2):
            raise ValueError(f"RealNVP: event_shape is {shape}, expected (features,) of at least 2, or (C, H, W)")
        check_mixing(permutation, "RealNVP")
        layers = to_reals(levels, alpha, n)

        def step(c: int, mask: Mask, swap: bool) -> list[Bijection]:
            """ActNorm and coupling on `c` channels; the transformed part and what is conditioned on by `mask`."""
            net: MLP | ConvResNet
            n_in, n_out = c, c  # a checkerboard keeps the shape of both parts
            if mask != "checkerboard":
                n_in, n_out = (c // 2, c - c // 2) if swap else (c - c // 2, c // 2)
            if n == 1:
                net = MLP(n_in, hidden, 2 * n_out, activation, context_features=context_features)
            else:
                net = ConvResNet(
                    n_in,
                    channels,
                    2 * n_out,
                    blocks=blocks,
                    activation=activation,
                    context_features=context_features,
                    weight_norm=weight_norm,
                )
            coupling = AffineCoupling(net, mask=mask, swap=swap, scale=scale, clamp=clamp, event_dim=n)
            return [ActNorm(c, event_dim=n), coupling] if actnorm else [coupling]

        if n == 1:
            if couplings < 1:
                raise ValueError(f"RealNVP: couplings is {couplings}, expected at least 1")
            for i in range(couplings):
                if i and i % 2 == 0:
                    layers += mixing(permutation, shape[0], seed * 1000 + i)
                layers += step(shape[0], "halves", swap=bool(i % 2))
        else:
            if scales < 1 or any(s % 2 ** (scales - 1) for s in shape[1:]):
                raise ValueError(
                    f"RealNVP: event_shape is {shape} with scales={scales}, "
                    "expected at least one scale, and H and W divisible by 2**(scales - 1)"
                )
            stages: list[Bijection] = []
            c = shape[0]
            for k in range(scales):
                stage: list[Bijection] = []
                if k == scales - 1:
                    for i in range(4):
                        stage += step(c, "checkerboard", swap=bool(i % 2))
                else:
                    for i in range(3):
                        stage += step(c, "checkerboard", swap=bool(i % 2))
                    stage.append(Squeeze())
                    for i in range(3):
                        stage += step(4 * c, "channel", swap=bool(i % 2))
                    c *= 2  # squeeze gives four times, factoring out takes half
                stages.append(Chain(*stage, memory=memory, checkpoint_every=checkpoint_every))
            layers.append(MultiScale(stages, shape))
        chain = Chain(*layers, memory=memory, checkpoint_every=checkpoint_every)
        super().__init__(DiagNormal(math.prod(shape)), chain, event_shape=shape)
        self.config: dict[str, Any] = dict(
            event_shape=list(shape),
            couplings=couplings,
            hidden=list(hidden),
            channels=channels,
            blocks=blocks,
            scales=scales,
            scale=scale,
            clamp=clamp,
            actnorm=actnorm,
            permutation=permutation,
            alpha=alpha,
            levels=levels,
            activation=activation,
            context_features=context_features,
            weight_norm=weight_norm,
            memory=memory,
            checkpoint_every=checkpoint_every,
            seed=seed,
        )
