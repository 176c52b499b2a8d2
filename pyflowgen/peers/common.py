"""What the classes for all libraries share: reading their networks, running their layers in one operator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native, recompute
from pyflowgen.bijection import Channelwise
from pyflowgen.ops import mlp_coupling as whole
from pyflowgen.ops.linear import _FUSED
from pyflowgen.ops.mlp_coupling import Network, Part, Step, Steps

_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu", torch.relu: "relu", F.leaky_relu: "leaky_relu", F.silu: "silu", F.gelu: "gelu", F.elu: "elu",
    F.tanh: "tanh", torch.tanh: "tanh", F.sigmoid: "sigmoid", torch.sigmoid: "sigmoid",
}  # fmt: skip


def takes(x: Any) -> bool:
    """Whether the kernels take the place of plain arithmetic for x and leave its dtype."""
    return (
        isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64) and _native.use_kernel("affine_coupling", x)
    )


def matches(params: Tensor, x: Tensor) -> bool:
    """Whether a conditioner's output is of x's dtype, or autocast sees to that."""
    return params.dtype is x.dtype or torch.is_autocast_enabled(x.device.type)


def marks(*tensors: Tensor) -> list[tuple[Tensor, int | None]]:
    """What tells later, to `unmarked`, whether tensors have been exchanged or written to."""
    return [(t, None if t.is_inference() else t._version) for t in tensors]


def unmarked(kept: Any, *tensors: Tensor) -> bool:
    """Whether what was made of the tensors, with their marks first, has to be made anew; loading a state writes."""
    return kept is None or any(
        was is not t or mark != now for (was, mark), (t, now) in zip(kept[0], marks(*tensors), strict=True)
    )


def span(features: Sequence[int]) -> Part | None:
    """``(start, step)`` of evenly spaced channels."""
    step = features[1] - features[0] if len(features) > 1 else 1
    return (
        (features[0], step)
        if step > 0 and list(features) == [features[0] + i * step for i in range(len(features))]
        else None
    )


def channels(x: Tensor, part: Part, count: int) -> Tensor:
    """Those channels, on dimension 1."""
    return x[:, part[0] : part[0] + (count - 1) * part[1] + 1 : part[1]]


def activation(function: Any) -> str | None:
    """The activation that a function or module is."""
    if isinstance(function, nn.LeakyReLU) and function.negative_slope == 0 and not whole.hooked(function):
        return "relu"
    if isinstance(function, nn.Module):
        return whole.named(function)
    try:
        return _FUNCTIONS.get(function)
    except TypeError:
        return None


def sequential(net: nn.Module, linear: type = nn.Linear) -> Network | None:
    """A perceptron of linear layers and activations in a row."""
    if whole.hooked(net):
        return None
    modules = [nn.ReLU() if activation(m) == "relu" else m for m in net._modules.values() if m is not None]
    return whole.perceptron(modules, linear)


def residual(net: Any, context: bool) -> Network | None:
    """nflows' ``ResidualNet``, which normflows has too; without batch normalisation, in training without dropout."""
    if whole.hooked(net) or getattr(net, "preprocessing", None) is not None or not len(net.blocks):
        return None
    layers, name = [net.initial_layer], activation(net.blocks[0].activation)
    if name not in _FUSED:
        return None
    for block in net.blocks:
        if (
            type(block).__name__ != "ResidualBlock"
            or whole.hooked(block)
            or block.use_batch_norm
            or (block.dropout.training and block.dropout.p > 0)
            or activation(block.activation) != name
            or hasattr(block, "context_layer") != context
        ):
            return None
        layers += [*block.linear_layers, *([block.context_layer] if context else [])]
    layers.append(net.final_layer)
    if len(layers) > whole._MOST_LAYERS or any(type(m) is not nn.Linear or whole.hooked(m) for m in layers):
        return None
    return [m.weight for m in layers], [m.bias for m in layers], name, len(net.blocks)


def network(net: Any, context: bool) -> Network | None:
    """A conditioner of nflows or normflows as the operator takes it, or None."""
    where, name = f".{type(net).__module__}", type(net).__name__
    if name == "ResidualNet" and where.endswith((".nn.nets.resnet", ".nets.resnet")):
        return residual(net, context)
    if (
        name == "MLP"
        and where.endswith(".nets.mlp")
        and type(getattr(net, "net", None)) is nn.Sequential
        and not context
    ):
        return None if whole.hooked(net) else sequential(net.net)  # normflows'
    return None


def coupling(
    found: Network | None, x: Tensor, context: Tensor | None, same: Sequence[int], part: Sequence[int], per: int,
    fields: dict[str, Any],
) -> list[Step] | None:  # fmt: skip
    """A coupling from those channels onto those as steps of the operator, or None where it does not run there."""
    if found is None or x.dim() < 1 or not whole.runs(x, found[2]):
        return None
    if context is not None and context.dim() != x.dim():
        return None
    if not whole.fits(found, x, context, len(same), per * len(part)):
        return None
    weights, biases, name, blocks = found
    step = Step(tuple(weights), tuple(biases), _FUSED[name], blocks=blocks, **fields)
    spans = span(same), span(part)
    if spans[0] is not None and spans[1] is not None:
        return [step._replace(same=spans[0], part=spans[1])]
    order = torch.tensor([*same, *part], device=x.device)
    step = step._replace(permutation=order, same=(0, 1), part=(len(same), 1))
    return [step, Step(permutation=order.argsort())]


def run(steps: Sequence[Step], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The operator on those steps."""
    return whole.run(x, context, steps)


class Twin(Steps):
    """A layer of another library in a run of layers."""

    layer: Any
    _channelwise: Any

    def __init__(
        self, module: nn.Module, channelwise: Callable[[Any, Tensor, bool], Channelwise | None] | None = None
    ) -> None:
        super().__init__()
        # Not a submodule: the layer stays where it is.
        self.__dict__["layer"], self.__dict__["_channelwise"] = module, channelwise

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, logdet = self.layer(x) if context is None else self.layer(x, context)
        return y, logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.layer.inverse(y) if context is None else self.layer.inverse(y, context)
        return x, logdet

    def channelwise(self, x: Tensor, inverse: bool) -> Channelwise | None:
        if self._channelwise is None or x.dim() != 2 or whole.hooked(self.layer):
            return None
        return self._channelwise(self.layer, x, inverse)

    def steps(self, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        found = getattr(self.layer, "_one_operator", None)
        return None if found is None or whole.hooked(self.layer) else found(x, context, inverse)


def compose(owner: Any, twins: Callable[[], list[Twin]], layers: Sequence[nn.Module], x: Tensor, context: Tensor | None,
            inverse: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """All layers of `owner`, runs of them in one operator; their twins are kept beside its own attributes."""
    kept = owner.__dict__.get("_pyflowgen")
    if kept is None or [t.layer for t in kept] != list(layers):
        kept = owner.__dict__["_pyflowgen"] = twins()
    order = reversed(kept) if inverse else kept
    return recompute.compose([(twin, inverse) for twin in order], x, context)


def rows(features: int, like: Tensor, seed: int = 0) -> Tensor:
    """A few rows from a generator of their own: nobody's random numbers change."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, features, generator=generator).to(like.device, like.dtype)


def both(module: Any, method: str, *arguments: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of what an accelerated module's method gives and its own class's; some change what they are given."""
    fast, plain = (
        function(*[a.clone() if isinstance(a, Tensor) else a for a in arguments])
        for function in (getattr(module, method), functools.partial(getattr(module._plain, method), module))
    )
    yield from zip(fast, plain, strict=True)
