"""Neural spline flow: couplings of monotonic rational-quadratic splines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pyflowgen.bijection import CHECKPOINT_EVERY, Chain, Memory
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import ActNorm
from pyflowgen.models.parts import Mixing, check_mixing, mixing, to_reals
from pyflowgen.nets import MLP, ResidualMLP
from pyflowgen.ops.rational_quadratic_spline import SplineCoupling


class NSF(Flow):
    r"""Neural spline flow in coupling form, :math:`y_b = \mathrm{RQS}(x_b;\, \mathrm{net}(x_a))` in each coupling.

    `couplings` couplings on halves, each after an `ActNorm`, which brings the data into the splines' interval.
    Couplings come in pairs that transform one half each; between the pairs the dimensions are mixed. Conditioners start
    at zero weights and at the biases for which a spline is the identity.

    Args:
        event_shape: number of dimensions, `D` or `(D,)`, at least 2.
        couplings: number of couplings.
        hidden: widths of the conditioners' hidden layers; an integer with `blocks`.
        blocks: residual blocks of width `hidden` in every conditioner, as in the paper; 0 for a plain perceptron.
        bins: bins of the splines.
        bound: the splines act on [-bound, bound] and leave what lies outside as it is.
        actnorm: put an `ActNorm` before each coupling.
        permutation: what stands between pairs of couplings: `"random"` (a permutation drawn from `seed`), `"reverse"`,
            `"lu"` (an `InvertibleLinear`) or `"none"`.
        alpha: map data in [0, 1] to the real line by `Logit(alpha)` first; None for data that live there.
        levels: data are integers `0..levels-1`, dequantised by `Dequantize(levels)` before anything else; None for
            continuous data.
        activation: activation of the conditioners.
        context_features: size of a context vector given to every conditioner; 0 for none.
        memory, checkpoint_every: what backward keeps of the layers, see `Chain`.
        seed: seed of the permutations.

    Reference: Durkan, Bekasov, Murray and Papamakarios, *Neural Spline Flows*, 2019.

    >>> import torch
    >>> from pyflowgen.models.nsf import NSF
    >>> model = NSF(6, couplings=4, hidden=(16,), context_features=2)
    >>> context = torch.randn(10, 2)
    >>> model.log_prob(torch.randn(10, 6), context).shape, model.sample(3, context).shape
    (torch.Size([10]), torch.Size([3, 10, 6]))
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        couplings: int = 8,
        hidden: int | Sequence[int] = (128, 128),
        blocks: int = 0,
        bins: int = 8,
        bound: float = 3.0,
        actnorm: bool = True,
        permutation: Mixing = "random",
        alpha: float | None = None,
        levels: int | None = None,
        activation: str = "relu",
        context_features: int = 0,
        memory: Memory = "store",
        checkpoint_every: int | None = CHECKPOINT_EVERY,
        seed: int = 0,
    ) -> None:
        shape = (event_shape,) if isinstance(event_shape, int) else tuple(event_shape)
        if len(shape) != 1 or shape[0] < 2:
            raise ValueError(f"NSF: event_shape is {shape}, expected (features,) of at least 2")
        widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
        if couplings < 1 or blocks < 0 or (blocks and len(widths) != 1):
            raise ValueError(
                f"NSF: couplings={couplings}, blocks={blocks}, hidden={hidden}, "
                "expected at least one coupling, and with blocks one width"
            )
        check_mixing(permutation, "NSF")
        features, per = shape[0], SplineCoupling.params_per_element(bins)
        layers = to_reals(levels, alpha, 1)
        for i in range(couplings):
            if i and i % 2 == 0:
                layers += mixing(permutation, features, seed * 1000 + i)
            n_in, n_out = features - features // 2, features // 2
            if i % 2:
                n_in, n_out = n_out, n_in
            sizes: dict[str, Any] = dict(activation=activation, context_features=context_features)
            net = (
                ResidualMLP(n_in, widths[0], n_out * per, blocks=blocks, **sizes)
                if blocks
                else MLP(n_in, widths, n_out * per, **sizes)
            )
            bias = net.final_layer.bias if isinstance(net, ResidualMLP) else net.layers[-1].bias
            layer = SplineCoupling(net, bins=bins, bound=bound, swap=bool(i % 2))
            with torch.no_grad():  # derivatives of 1: softplus(b) + 1e-3 = 1
                bias.view(n_out, per)[:, 2 * bins :] = math.log(math.expm1(1 - 1e-3))  # type: ignore[operator]
            layers += [ActNorm(features), layer] if actnorm else [layer]
        super().__init__(DiagNormal(features), Chain(*layers, memory=memory, checkpoint_every=checkpoint_every))
        self.config: dict[str, Any] = dict(
            event_shape=list(shape),
            couplings=couplings,
            hidden=hidden if isinstance(hidden, int) else list(hidden),
            blocks=blocks,
            bins=bins,
            bound=bound,
            actnorm=actnorm,
            permutation=permutation,
            alpha=alpha,
            levels=levels,
            activation=activation,
            context_features=context_features,
            memory=memory,
            checkpoint_every=checkpoint_every,
            seed=seed,
        )
