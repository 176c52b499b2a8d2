"""What the contests of whole flows share: a flow is trained by its loss and sampled by its inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .harness import Case, Factory, normal

HIDDEN = 128


class Built(NamedTuple):
    """A library's model; its mean negative log-likelihood of data, and the data that latents come from."""

    model: Any
    loss: Callable[[Any, Tensor], Tensor]
    sample: Callable[[Any, Tensor], Tensor]


Build = Callable[[int], Built]


class Applied(nn.Module):
    """A model and what is done with it; the function is in a Callable, for the libraries differ in it."""

    def __init__(self, model: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.model, x)


def nll(z: Tensor, logdet: Tensor) -> Tensor:
    """Mean negative log-likelihood under a standard normal base."""
    return (0.5 * z.square().sum(-1) - logdet).mean() + 0.5 * z.shape[-1] * math.log(2 * math.pi)


def draw(model: nn.Module) -> nn.Module:
    """The last layers start at zero: weights drawn anew, so that the gate sees every gradient."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.in_features))
    return model


def by_reference(build: Build) -> Build:
    """The same model on the reference path."""
    from pyflowgen._native import reference_path

    def plain(function: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
        def run(model: Any, x: Tensor) -> Tensor:
            with reference_path():
                return function(model, x)

        return run

    def built(features: int) -> Built:
        model, loss, sample = build(features)
        return Built(model, plain(loss), plain(sample))

    return built


def ours(build: Callable[[int], nn.Module]) -> Build:
    return lambda features: Built(
        build(features), lambda model, x: -model.log_prob(x).mean(), lambda model, z: model.bijection.inverse(z)[0]
    )


def by_nflows(features: int, couplings: int, coupling: Callable[..., Any]) -> Built:
    """nflows' couplings of this kind, on alternating masks."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.nn.nets import MLP
    from nflows.transforms import CompositeTransform

    class Conditioner(nn.Module):  # nflows' MLP takes shapes, its couplings pass numbers and a context
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__()
            self.mlp = MLP([n_in], [n_out], [HIDDEN, HIDDEN])

        def forward(self, x: Tensor, context: Any = None) -> Tensor:
            return self.mlp(x)

    mask = torch.ones(features)
    mask[::2] = -1
    layers = [coupling(mask * (-1) ** i, Conditioner) for i in range(couplings)]
    flow = Flow(CompositeTransform(layers), StandardNormal([features]))
    return Built(flow, lambda model, x: -model.log_prob(x).mean(), lambda model, z: model._transform.inverse(z)[0])


def trained(build: Build, features: int) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        built = build(features)
        return Applied(built.model, built.loss)

    return make


def sampled(build: Build, features: int) -> Factory:
    def make(device: torch.device, dtype: torch.dtype) -> nn.Module:
        built = build(features)
        return Applied(built.model, built.sample)

    return make


def flow_cases(
    op: str, label: str, builds: Mapping[str, Build], *, sizes: Iterable[tuple[int, int]],
    products: Callable[[int, int], int], first: Callable[[int, int], int], compiled: tuple[str, ...],
    quick: Iterable[tuple[int, int]], modes: tuple[str, ...] = ("forward", "forward+backward", "step"),
) -> list[Case]:  # fmt: skip
    """Cases of (batch, features): training, then sampling at the first size.

    `products`: flops of all products forward; `first`: those of one layer that gets the data, which need no gradient.
    """
    sizes, quick = list(sizes), list(quick)
    truth = {name: name for name in builds if name not in ("eager", "pyflowgen", "mask-free")}
    result = []
    for batch, features in sizes:
        forward = products(batch, features)
        both = 3 * forward - first(batch, features)
        common: dict[str, Any] = dict(op=op, dtype=torch.float32, inputs=normal((batch, features)), truth=truth)
        result.append(
            Case(
                shape=f"{batch}x{features} {label}",
                providers={name: trained(build, features) for name, build in builds.items()},
                modes=modes,
                grad=(),
                compile=compiled,
                quick=(batch, features) in quick,
                flops={"forward": forward, "forward+backward": both, "step": both},
                **common,
            )  # fmt: skip
        )
        if (batch, features) == sizes[0]:
            result.append(
                Case(
                    shape=f"{batch}x{features} {label} inverse",
                    providers={name: sampled(build, features) for name, build in builds.items()},
                    modes=("sample",),
                    compile=("eager",),
                    flops={"sample": forward},
                    **common,
                )  # fmt: skip
            )
    return result
