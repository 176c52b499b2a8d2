"""The affine coupling in each convention in use: a peer is timed on its own map and layout, and we beside it.

Op rows call the peer's coupling arithmetic with the conditioner's output given. Layer rows ("layer") call whole
coupling layers, split and merge included, whose conditioner hands out that output, so that no network is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .harness import Case, Factory, installed, normal

Op = Callable[..., Any]


def given(fn: Op) -> Factory:
    """A provider that needs nothing built."""
    return lambda device, dtype: fn


def ours(**options: Any) -> dict[str, Factory]:
    """Reference and kernel with the same options."""

    def eager(device: torch.device, dtype: torch.dtype) -> Op:
        from pyflowgen.ops.affine_coupling import affine_coupling_reference

        return lambda x, params: affine_coupling_reference(x, params, **options)

    def kernel(device: torch.device, dtype: torch.dtype) -> Op:
        from pyflowgen.ops.affine_coupling import affine_coupling

        return lambda x, params: affine_coupling(x, params, **options)

    return {"eager": eager, "pyflowgen": kernel}


class Handed(nn.Module):
    """A conditioner that gives what it was handed."""

    params: Tensor

    def forward(self, *_: Any) -> Tensor:
        return self.params


# ---------------------------------------------------------------- the formula by hand, each the shortest without masks


def exp_halves(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, s = params.chunk(2, 1)
    return x * s.exp() + shift, s.flatten(1).sum(-1)


def exp_halves_inverse(y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, s = params.chunk(2, 1)
    return (y - shift) * (-s).exp(), -s.flatten(1).sum(-1)


def tanh_halves(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, s = params.chunk(2, 1)
    s = 2 * torch.tanh(s / 2)
    return x * s.exp() + shift, s.sum(-1)


def sigmoid_halves(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, s = params.chunk(2, 1)
    return x * torch.sigmoid(s + 2) + shift, F.logsigmoid(s + 2).sum(-1)


def exp_interleaved(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    shift, s = params[:, 0::2], params[:, 1::2]
    return x * s.exp() + shift, s.sum(-1)


def layer_halves(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    kept, moved = x.chunk(2, 1)
    y, logdet = exp_halves(moved, params)
    return torch.cat([kept, y], 1), logdet


# ---------------------------------------------------------------- peers


def nflows_op(features: int) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        layer: Any = _nflows_layer(features)[0]
        return layer._coupling_transform_forward

    return {"nflows": make} if installed("nflows") else {}


def _nflows_layer(features: int) -> tuple[nn.Module, Handed]:
    from nflows.transforms.coupling import AffineCouplingTransform

    mask = torch.cat([torch.zeros(features), torch.ones(features)])
    handed = Handed()
    return AffineCouplingTransform(mask, lambda n_in, n_out: handed), handed


def nflows_layer(features: int) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        layer, handed = _nflows_layer(features)
        layer.to(device)

        def call(x: Tensor, params: Tensor) -> Any:
            handed.params = params
            return layer(x)

        return call

    return {"nflows": make} if installed("nflows") else {}


def normflows_op(scale_map: str) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from normflows.flows import AffineCoupling

        handed = Handed()
        layer = AffineCoupling(handed, scale_map=scale_map)

        def call(x: Tensor, params: Tensor) -> Any:
            handed.params = params
            (_, y), logdet = layer([x, x])  # the first half is only the conditioner's input
            return y, logdet

        return call

    return {"normflows": make} if installed("normflows") else {}


def normflows_layer() -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from normflows.flows import AffineCouplingBlock

        handed = Handed()
        layer = AffineCouplingBlock(handed)

        def call(x: Tensor, params: Tensor) -> Any:
            handed.params = params
            return layer(x)

        return call

    return {"normflows": make} if installed("normflows") else {}


def zuko_op() -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from zuko.transforms import DependentTransform, MonotonicAffineTransform

        def call(x: Tensor, params: Tensor) -> Any:
            return DependentTransform(MonotonicAffineTransform(*params.unbind(-1)), 1).call_and_ladj(x)

        return call

    return {"zuko": make} if installed("zuko") else {}


def zuko_layer(features: int) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from zuko.flows.coupling import GeneralCouplingTransform

        handed = Handed()
        layer = GeneralCouplingTransform(2 * features, mask=torch.arange(2 * features) < features)
        layer.hyper = handed
        layer.to(device)

        def call(x: Tensor, params: Tensor) -> Any:
            handed.params = params.flatten(1)
            return layer().call_and_ladj(x)

        return call

    return {"zuko": make} if installed("zuko") else {}


def freia_op(features: int) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from FrEIA.modules import GLOWCouplingBlock

        handed = Handed()
        block = GLOWCouplingBlock([(2 * features,)], subnet_constructor=lambda n_in, n_out: handed)

        def call(x: Tensor, params: Tensor) -> Any:
            handed.params = params
            return block._coupling1(x, x)

        return call

    return {"FrEIA": make} if installed("FrEIA") else {}


def torchflows_op(features: int) -> dict[str, Factory]:
    def make(device: torch.device, dtype: torch.dtype) -> Op:
        from torchflows.bijections.finite.autoregressive.transformers.linear.affine import Affine

        return Affine(event_shape=(features,)).forward

    return {"torchflows": make} if installed("torchflows") else {}


# ---------------------------------------------------------------- cases


def cases(device: torch.device) -> list[Case]:
    def case(
        label: str,
        x: tuple[int, ...],
        params: tuple[int, ...],
        providers: Mapping[str, Factory],
        modes: tuple[str, ...] = ("forward", "backward", "forward+backward"),
        dtype: torch.dtype = torch.float32,
        quick: bool = False,
        compile: tuple[str, ...] = ("eager", "nflows", "normflows", "zuko", "FrEIA", "torchflows"),
    ) -> Case:
        size = "x".join(map(str, x))
        # exp of a unit normal log-scale would reach e^4: half of it is what trained couplings give
        inputs = normal(x, params, scale=(1.0, 0.5))
        return Case("affine_coupling", f"{size} {label}", dtype, inputs, providers, modes, compile=compile, quick=quick)

    n, d = 8192, 64
    vector, whole, halves, pairs = (n, d), (n, 2 * d), (n, 2 * d), (n, d, 2)
    image, image_halves = (32, 48, 32, 32), (32, 96, 32, 32)
    both = ("forward", "forward+backward")

    def by_hand(fn: Op) -> dict[str, Factory]:
        return {"mask-free": given(fn)}

    scale_first = ours(layout="halves_scale_first", scale="atan", clamp=2.0)
    half_scale = ours(layout="pairs_scale_first", gain=0.5)
    eps = {"layout": "halves", "scale": "sigmoid_eps"}
    moved = {"part": (d, 1)}  # in a layer the second half is transformed, the first copied
    exp = ours(layout="halves") | by_hand(exp_halves)
    tanh = ours(layout="halves", scale="tanh", clamp=2.0) | by_hand(tanh_halves)
    sigmoid = ours(layout="halves", scale="sigmoid") | by_hand(sigmoid_halves)
    interleaved = ours(layout="interleaved") | by_hand(exp_interleaved) | normflows_op("exp")
    glow = ours(layout="interleaved", scale="sigmoid") | normflows_op("sigmoid_inv")
    inverse = ours(layout="halves", inverse=True) | by_hand(exp_halves_inverse)
    exp_image = ours(layout="halves", event_dim=3) | by_hand(exp_halves)
    layer = ours(layout="halves", **moved) | by_hand(layer_halves)
    found = [
        case("exp halves", vector, halves, exp, quick=True),
        case("tanh halves", vector, halves, tanh, quick=True),
        case("sigmoid halves", vector, halves, sigmoid),
        case("sigmoid_eps halves", vector, halves, ours(**eps) | nflows_op(d)),
        case("exp interleaved", vector, halves, interleaved, quick=True),
        case("sigmoid interleaved", vector, halves, glow),
        case("softclip pairs", vector, pairs, ours(layout="pairs", scale="softclip") | zuko_op(), quick=True),
        case("atan scale-first halves", vector, halves, scale_first | freia_op(d)),
        case("exp half-scale pairs", vector, pairs, half_scale | torchflows_op(d)),
        case("exp halves", (64, 2), (64, 4), exp, quick=True),
        case("exp halves", image, image_halves, exp_image, quick=True),
        case("sigmoid_eps halves", image, image_halves, ours(**eps, event_dim=3) | nflows_op(48)),
        case("exp halves inverse", vector, halves, inverse, ("inverse",)),
        case("layer exp halves", whole, halves, layer, both),
        case("layer sigmoid_eps halves", whole, halves, ours(**eps, **moved) | nflows_layer(d), both, quick=True),
        case("layer exp interleaved", whole, halves, ours(layout="interleaved", **moved) | normflows_layer(), both),
        case(
            "layer softclip pairs", whole, pairs, ours(layout="pairs", scale="softclip", **moved) | zuko_layer(d), both
        ),
    ]
    found += [case("exp halves", vector, halves, exp, both, dtype) for dtype in (torch.float64, torch.bfloat16)]
    return found
