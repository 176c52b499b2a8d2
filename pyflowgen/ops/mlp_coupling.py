"""A whole coupling layer, split, conditioner, transform and merge, in one operator.

In this order: reference, function with its gradient, fake.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

import pyflowgen.ops.affine_coupling as affine
import pyflowgen.ops.linear as product
import pyflowgen.ops.rational_quadratic_spline as spline
from pyflowgen import _native, coupling, recompute
from pyflowgen.bijection import Bijection
from pyflowgen.coupling import hooked as hooked
from pyflowgen.ops.affine_coupling import Order, Scale
from pyflowgen.ops.linear import Activation

Part = tuple[int, int]

_MOST_LAYERS = 16
_GPU_WIDEST = 256  # hidden features, of the Triton kernel
_NO_SPLINE, _NO_NUMBERS = (0, 0, 0), (0.0,) * 11
_NAMES: dict[int, Activation] = {code: name for name, code in product._FUSED.items()}  # type: ignore[misc]


class Step(NamedTuple):
    """One step of the operator: permutation, scale and shift of the channels, then a coupling; what is absent left out.

    The numbers are those that the operator takes; no weights: no coupling.
    """

    weights: tuple[Tensor, ...] = ()
    biases: tuple[Tensor | None, ...] = ()
    activation: int = 0
    same: Part = (0, 1)
    part: Part = (0, 1)
    scale: int = 0
    shift_first: bool = False
    inverse: bool = False
    layout: int = 1
    mask: Tensor | None = None
    permutation: Tensor | None = None
    scaled: int = 0  # 1: u exp(log_scale) + shift; -1: (u - shift) exp(-log_scale)
    log_scale: Tensor | None = None
    shift: Tensor | None = None
    spline: tuple[int, int, int] = _NO_SPLINE  # bins, convention, tails; no bins: affine or additive
    numbers: tuple[float, ...] = _NO_NUMBERS  # clamp of the affine coupling, then those of the spline
    blocks: int = 0  # residual ones, each with its two weights, or three with a gate; none: a perceptron

    def options(self) -> tuple[int, ...]:
        return (
            len(self.weights), self.activation, *self.same, *self.part, self.scale, self.shift_first, self.inverse,
            self.layout, self.permutation is not None, self.scaled, self.shift is not None, *self.spline, self.blocks,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reference
def mlp_coupling_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    context: Tensor | None = None,
    *,
    activation: Activation = "relu",
    blocks: int = 0,
    scale: Scale | None = "exp",
    clamp: float | None = None,
    order: Order = "scale_shift",
    inverse: bool = False,
    layout: Literal["halves", "interleaved"] = "halves",
    same: Part = (0, 1),
    part: Part | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`mlp_coupling`, with the same arguments."""
    part = _check(x, weights, biases, context, activation, blocks, scale, clamp, order, layout, same, part, mask)
    h = _parameters(x, weights, biases, context, activation, blocks, same, mask)
    where: Any = {"mask": mask} if mask is not None else {"part": part}
    if scale is None:
        return affine.affine_coupling_reference(x, h, inverse=inverse, **where)
    return affine.affine_coupling_reference(
        x, h, scale=scale, clamp=clamp, order=order, inverse=inverse, layout=layout, **where
    )


def _parameters(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], context: Tensor | None,
    activation: Activation, blocks: int, same: Part, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """What the conditioner gives."""
    if mask is not None:
        h = torch.where(mask, 0, x)
    else:
        count = weights[0].shape[1] - (0 if context is None else context.shape[-1])
        h = x[..., same[0] : same[0] + (count - 1) * same[1] + 1 : same[1]]
    if context is not None:
        h = torch.cat([h, context.expand(*x.shape[:-1], -1)], -1)
    layers = list(zip(weights, biases, strict=True))
    if not blocks:
        for weight, bias in layers[:-1]:
            h = product.linear_reference(h, weight, bias, activation)
        return product.linear_reference(h, *layers[-1])
    each = (len(layers) - 2) // blocks
    h = product.linear_reference(h, *layers[0])
    for i in range(1, len(layers) - 1, each):
        inner = product.linear_reference(product._ACTIVATIONS[activation](h), *layers[i], activation)
        added = product.linear_reference(inner, *layers[i + 1])
        if each == 3 and context is not None:
            added = added * product.linear_reference(context, *layers[i + 2], "sigmoid")
        h = h + added
    return product.linear_reference(h, *layers[-1])


def _spline_reference(x: Tensor, context: Tensor | None, s: Step) -> tuple[Tensor, Tensor]:
    h = _parameters(x, s.weights, s.biases, context, _NAMES[s.activation], s.blocks, s.same, s.mask)
    bins, convention, tails = s.spline
    start, step = s.part if s.mask is None else (0, 1)
    left, right, bottom, top, width, height, slope, edge, clip, scale = s.numbers[1:]
    return spline._reference(
        x, h, None, None, None, None, s.mask, bins, 2, start, step, convention, tails, left, right, bottom, top, width,
        height, slope, edge, clip, scale, s.inverse, 1,
    )  # fmt: skip


def _reference(x: Tensor, context: Tensor | None, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """The definition of the operator."""
    total = torch.zeros((), dtype=x.dtype).expand(x.shape[:-1])
    for s in steps:
        if s.permutation is not None:
            x = x.index_select(-1, s.permutation)
        if s.log_scale is not None:
            shift = 0 if s.shift is None else s.shift
            x = x * s.log_scale.exp() + shift if s.scaled > 0 else (x - shift) * (-s.log_scale).exp()
            total = total + s.scaled * s.log_scale.sum()
        if s.weights and s.spline[0]:
            x, logdet = _spline_reference(x, context, s)
            total = total + logdet
        elif s.weights:
            name = affine._SCALES[s.scale]
            x, logdet = mlp_coupling_reference(
                x, s.weights, s.biases, context, mask=s.mask,
                activation=_NAMES[s.activation], blocks=s.blocks,
                scale=name if s.scale else None,  # type: ignore[arg-type]
                clamp=s.numbers[0] if name in affine._DEFAULT_CLAMP else None,
                order="shift_scale" if s.shift_first else "scale_shift", inverse=s.inverse,
                layout="interleaved" if s.layout == 2 else "halves", same=s.same, part=s.part,
            )  # fmt: skip
            total = total + logdet
    return x, total


# ----------------------------------------------------------------------------------------------------- function
def mlp_coupling(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    context: Tensor | None = None,
    *,
    activation: Activation = "relu",
    blocks: int = 0,
    scale: Scale | None = "exp",
    clamp: float | None = None,
    order: Order = "scale_shift",
    inverse: bool = False,
    layout: Literal["halves", "interleaved"] = "halves",
    same: Part = (0, 1),
    part: Part | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Affine or additive coupling whose parameters come from a multi-layer perceptron, as one operator.

    .. math:: h_0 = [x_a, c] \qquad h_{i+1} = \phi(W_i h_i + b_i) \qquad (t, s) = W_n h_n + b_n \\
              y_a = x_a \qquad y_b = x_b\,e^{\ell(s)} + t \qquad \log|\det| = \sum \ell(s)

    Rows go through in blocks that stay in cache from the split to the merge, forward and backward; the backward pass
    keeps every hidden layer and the parameters, as the layers one by one would. :class:`pyflowgen.AffineCoupling` and
    :class:`pyflowgen.AdditiveCoupling` call it by themselves when their conditioner is a plain perceptron or a
    :class:`pyflowgen.nets.ResidualMLP`.

    Args:
        x: ``(*batch, channels)``.
        weights: :math:`W_i`, each ``(out, in)`` as in ``torch.nn.Linear``; at most 16. With residual blocks those of
            the first layer, of each block (:math:`W_1, W_2`, and with gates :math:`W_c`), and of the last.
        biases: :math:`b_i`, each ``(out,)`` or None.
        context: c, ``(*batch, features)`` or broadcastable to it, joined to the first layer's input.
        activation: :math:`\phi`, as in :func:`linear`, after every layer but the last.
        blocks: residual blocks :math:`h + W_2 \phi(W_1 \phi(h) + b_1) + b_2` in the place of the hidden layers; with
            three weights each, what is added is multiplied by :math:`\mathrm{sigmoid}(W_c c + b_c)`. As
            :class:`pyflowgen.nets.ResidualMLP`.
        scale, clamp, order, inverse: as in :func:`affine_coupling`; ``scale=None`` is the additive coupling.
        layout: how the last layer's output is read, ``"halves"`` or ``"interleaved"``.
        same: ``(start, step)`` of the channels that condition; how many, the first weight says.
        part: ``(start, step)`` of those that are transformed; by default those after the conditioning ones.
        mask: bool ``(channels,)`` instead of both: True is transformed; the conditioner is given all channels, zero
            where they are transformed, and gives parameters for all.

    Returns:
        ``(y, logdet)`` as :func:`affine_coupling`. float32 and float64 run here; anything else, autocast and
        the activations that :func:`linear` does not fuse are evaluated layer by layer, and on a GPU hidden layers
        wider than 256, too.

    Raises:
        ValueError: a shape or option that does not fit, named with what was expected.
        TypeError: dtypes that differ.

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density estimation using Real NVP*, 2016.

    Example:
        >>> import torch, pyflowgen
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> x = torch.randn(8, 4)
        >>> y, logdet = pyflowgen.mlp_coupling(x, [net[0].weight, net[2].weight], [net[0].bias, net[2].bias])
        >>> plain = pyflowgen.affine_coupling(x, net(x[:, :2]), layout="halves", part=(2, 1))
        >>> torch.allclose(y, plain[0], atol=1e-6), torch.allclose(logdet, plain[1], atol=1e-6)
        (True, True)
    """
    if not runs(x, activation):
        return mlp_coupling_reference(
            x, weights, biases, context, activation=activation, blocks=blocks, scale=scale, clamp=clamp, order=order,
            inverse=inverse, layout=layout, same=same, part=part, mask=mask,
        )  # fmt: skip
    part = _check(x, weights, biases, context, activation, blocks, scale, clamp, order, layout, same, part, mask)
    step = Step(
        tuple(weights), tuple(biases), product._FUSED[activation], same, part,
        0 if scale is None else affine._SCALES.index(scale), order == "shift_scale", bool(inverse),
        affine._LAYOUTS.index(layout), mask,
        numbers=(0.0 if scale is None else affine._check_options(scale, clamp, order, layout), *_NO_NUMBERS[1:]),
        blocks=blocks,
    )  # fmt: skip
    if not _on_gpu(x, step):
        return _reference(x, context, [step])
    return run(x, context, [step])


def runs(x: Tensor, activation: str) -> bool:
    """Whether the operator takes this x and activation."""
    return (
        isinstance(x, Tensor)
        and (x.dtype is torch.float32 or x.dtype is torch.float64)
        and activation in product._FUSED
        and _native.use_kernel("mlp_coupling", x)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _on_gpu(x: Tensor, step: Step) -> bool:
    """Whether x's device takes the step: the CPU all, a GPU those of kernels/mlp_coupling.py that gain by it.

    From some width on one product fills a GPU by itself, and the library's own tiles are larger.
    """
    if not _native.by_triton("mlp_coupling", x):
        return True
    return all(w.shape[0] <= _GPU_WIDEST for w in step.weights[:-1])


def run(x: Tensor, context: Tensor | None, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """The operator, with its gradient where one is asked for; arguments known to fit."""
    if context is not None and context.shape[:-1] != x.shape[:-1]:
        context = context.expand(*x.shape[:-1], -1)
    parameters = _parameters_of(steps)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (context is not None and context.requires_grad)
        or any(p is not None and p.requires_grad for p in parameters)
    ):
        y, logdet = _apply(x, context, steps, *parameters)
        return y, logdet
    y, logdet, _ = torch.ops.pyflowgen.mlp_coupling.default(*_operands(x, context, steps, parameters), False)
    return y, logdet


def _parameters_of(steps: Sequence[Step]) -> list[Tensor | None]:
    return [
        *(w for s in steps for w in s.weights), *(b for s in steps for b in s.biases),
        *(s.log_scale for s in steps if s.log_scale is not None), *(s.shift for s in steps if s.shift is not None),
    ]  # fmt: skip


def _operands(x: Tensor, context: Tensor | None, steps: Sequence[Step], parameters: Sequence[Tensor | None]) -> Any:
    """The operator's arguments but the last, for `parameters` in the place of the steps' own."""
    n = sum(len(s.weights) for s in steps)
    m = 2 * n + sum(s.log_scale is not None for s in steps)
    nothing = x.new_empty(0)
    return (
        x, context, parameters[:n], [nothing if b is None else b for b in parameters[n : 2 * n]],
        [nothing if s.mask is None else s.mask for s in steps],
        [s.permutation for s in steps if s.permutation is not None],
        parameters[2 * n : m], parameters[m:], [o for s in steps for o in s.options()],
        [number for s in steps for number in s.numbers],
    )  # fmt: skip


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    context: Tensor | None,
    activation: str,
    blocks: int,
    scale: str | None,
    clamp: float | None,
    order: str,
    layout: str,
    same: Part,
    part: Part | None,
    mask: Tensor | None,
) -> Part:
    """Check everything; returns the transformed part."""
    if activation not in product._ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(product._ACTIVATIONS)}, got {activation!r}")
    if layout not in ("halves", "interleaved"):
        raise ValueError(f"layout must be 'halves' or 'interleaved', got {layout!r}")
    affine._check_options(scale or "exp", clamp, order, layout)
    if not isinstance(x, Tensor) or x.dim() < 1:
        raise ValueError(f"x must be a tensor of shape (*batch, channels), got {getattr(x, 'shape', type(x).__name__)}")
    if not 1 <= len(weights) <= _MOST_LAYERS or len(biases) != len(weights):
        raise ValueError(
            f"weights and biases must have one length of 1 to {_MOST_LAYERS}, got {len(weights)} and {len(biases)}"
        )
    given = {f"weights[{i}]": w for i, w in enumerate(weights)}
    given |= {f"biases[{i}]": b for i, b in enumerate(biases) if b is not None}
    given |= {} if context is None else {"context": context}
    for name, tensor in given.items():
        if tensor.device != x.device or (tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise TypeError(f"{name} is {tensor.dtype} on {tensor.device}, expected x's {x.dtype} on {x.device}")
    wide = 0
    if context is not None:
        try:
            context.expand(*x.shape[:-1], -1)
        except RuntimeError:
            raise ValueError(
                f"context has shape {tuple(context.shape)}, expected {(*x.shape[:-1], 'features')} or broadcastable"
            ) from None
        wide = context.shape[-1]
    gated = blocks > 0 and len(weights) == 2 + 3 * blocks
    if blocks < 0 or (blocks and not gated and len(weights) != 2 + 2 * blocks) or (gated and context is None):
        raise ValueError(
            f"{blocks} residual blocks take {2 + 2 * blocks} weights, or {2 + 3 * blocks} with gates and a context, "
            f"got {len(weights)}"
        )
    before = weights[0].shape[-1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        before = wide if gated and i and i % 3 == 0 else before
        out: int | str = weights[0].shape[0] if blocks and 0 < i < len(weights) - 1 else "out"
        if weight.dim() != 2 or weight.shape[1] != before or out not in ("out", weight.shape[0]):
            raise ValueError(f"weights[{i}] has shape {tuple(weight.shape)}, expected ({out}, {before})")
        before = weight.shape[0]
        if bias is not None and bias.shape != (before,):
            raise ValueError(f"biases[{i}] has shape {tuple(bias.shape)}, expected ({before},)")
    conditioning, channels = weights[0].shape[1] - wide, x.shape[-1]
    if scale is not None and before % 2:
        raise ValueError(f"weights[{len(weights) - 1}] gives {before} parameters, expected an even number")
    count = before if scale is None else before // 2
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != (channels,):
            raise ValueError(f"mask must be a bool tensor of shape ({channels},)")
        if conditioning != channels or count != channels:
            raise ValueError(
                f"weights take {conditioning} channels and give parameters for {count}, expected {channels} each: with "
                f"a mask the conditioner is from and for all of x, shape {tuple(x.shape)}"
            )
        return 0, 1
    if part is None:
        part = same[0] + conditioning * same[1], 1
    for name, (start, step), size in (("same", same, conditioning), ("part", part, count)):
        if start < 0 or step < 1 or size < 1 or start + (size - 1) * step >= channels:
            raise ValueError(
                f"{name}=({start}, {step}) with {size} channels by the weights does not fit the {channels} channels "
                f"of x, shape {tuple(x.shape)}"
            )
    return part


class _MlpCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, context, steps, *parameters):  # type: ignore[no-untyped-def]
        y, logdet, saved = torch.ops.pyflowgen.mlp_coupling.default(*_operands(x, context, steps, parameters), True)
        ctx.save_for_backward(x, context, saved, *parameters)
        # Without their parameters, which are saved where a change in place is noticed.
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        return y, logdet

    @staticmethod
    def backward(ctx, dy, dlogdet):  # type: ignore[no-untyped-def]
        x, context, saved, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            dx, dcontext, *dparameters = _differentiable(  # type: ignore[no-untyped-call]
                x, context, ctx.steps, parameters, needs, dy, dlogdet
            )
            return dx, dcontext, None, *dparameters
        operands = _operands(x, context, ctx.steps, parameters)
        dx, dcontext, gradients = torch.ops.pyflowgen.mlp_coupling_backward.default(
            dy, dlogdet, *operands[:8], saved, *operands[8:], needs[0] or needs[1], any(needs[3:])
        )
        return (
            dx if needs[0] else None, dcontext if needs[1] else None, None,
            *(g if need else None for g, need in zip(gradients, needs[3:], strict=True)),
        )  # fmt: skip


_apply = _native.applier(_MlpCoupling)


def _with_parameters(steps: Sequence[Step], parameters: Sequence[Tensor | None]) -> list[Step]:
    """The steps with other tensors for their parameters, in the order of `run`."""
    weights = iter(parameters)
    result = [s._replace(weights=tuple(next(weights) for _ in s.weights)) for s in steps]  # type: ignore[misc]
    result = [s._replace(biases=tuple(next(weights) for _ in s.biases)) for s in result]
    result = [s if s.log_scale is None else s._replace(log_scale=next(weights)) for s in result]
    return [s if s.shift is None else s._replace(shift=next(weights)) for s in result]


def _differentiable(x, context, steps, parameters, needs, dy, dlogdet):  # type: ignore[no-untyped-def]
    """Gradients through the reference, which can be differentiated again."""
    outputs = _reference(x, context, _with_parameters(steps, parameters))
    inputs = [x, context, *parameters]
    wanted = [needs[0], needs[1], *needs[3:]]
    pairs = [(o, g) for o, g in zip(outputs, (dy, dlogdet), strict=True) if g is not None and o.requires_grad]
    grads = iter(
        torch.autograd.grad(
            [o for o, _ in pairs], [t for t, need in zip(inputs, wanted, strict=True) if need],
            [g for _, g in pairs], create_graph=True, allow_unused=True,
        )
    )  # fmt: skip
    return [next(grads) if need else None for need in wanted]


# -------------------------------------------------------------------------------------------------------- layers
# Above so many weights the sums of their gradients, one set for every 256 rows, outgrow the caches.
_LARGEST = 1 << 20
# More steps than this a flow does not have; each keeps its part of every thread's sums.
_MOST_STEPS = 64
_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.GELU: "gelu",
    nn.ELU: "elu",
}


def named(module: nn.Module) -> str | None:
    """The activation that this module is."""
    plain = (
        module.negative_slope == 0.01 if isinstance(module, nn.LeakyReLU)
        else module.approximate == "none" if isinstance(module, nn.GELU)
        else module.alpha == 1 if isinstance(module, nn.ELU)
        else True
    )  # fmt: skip
    return _ACTIVATIONS.get(type(module)) if plain and not hooked(module) else None


# (weights, biases, activation, residual blocks) of a network
Network = tuple[list[Tensor], list[Tensor | None], str, int]


def _residual(net: nn.Module, blocks: Sequence[Any]) -> Network | None:
    """`_layers` of a residual network with these blocks."""
    layers, expected, name = [net.initial_layer], ["none"], blocks[0].linear_layers[0].activation
    for block in blocks:
        if hooked(block) or named(block.activation) != name:
            return None
        layers += [*block.linear_layers, *([] if block.context_layer is None else [block.context_layer])]
        expected += [name, *["none"] * (len(layers) - len(expected) - 1)]
    layers.append(net.final_layer)
    expected.append("none")
    for layer, activation in zip(layers, expected, strict=True):
        if type(layer) is not product.Linear or layer.activation != activation or hooked(layer):
            return None
    if hooked(net) or len(layers) > _MOST_LAYERS:
        return None
    linear: Any = layers
    return [layer.weight for layer in linear], [layer.bias for layer in linear], name, len(blocks)


def _layers(conditioner: nn.Module, context: bool) -> Network | None:
    """(weights, biases, activation, residual blocks) of a plain perceptron, of ours or an `nn.Sequential`; else None.

    A layer with hooks, a parametrisation or a class of its own is more than its weight, and runs by itself.
    """
    # Looked up on the class and in _parameters: a module's own attributes that are not there, or are parameters, are
    # found ten times slower, and at small batches this search is a good part of a layer's time.
    kind = type(conditioner)
    if hasattr(kind, "residual_blocks") and (found := conditioner.residual_blocks()):  # type: ignore[operator]
        return _residual(conditioner, found)
    net: Any = conditioner if not context else None
    if hasattr(kind, "perceptron"):
        net = conditioner.perceptron()  # type: ignore[operator]
    if type(net) is not nn.Sequential or hooked(conditioner) or hooked(net):
        return None
    return perceptron(net._modules.values())


def perceptron(modules: Iterable[Any], linear: type = nn.Linear) -> Network | None:
    """What linear layers and activations in this order are, or None; `linear` has the parameters of `nn.Linear`."""
    weights: list[Tensor] = []
    biases: list[Tensor | None] = []
    after: list[str] = []  # the activation after each
    for module in modules:
        kind = type(module)
        if kind is product.Linear or kind is linear:
            if hooked(module):
                return None
            weights.append(module._parameters["weight"])
            biases.append(module._parameters["bias"])
            after.append(module.activation if kind is product.Linear else "none")
        elif (name := named(module)) is not None and after and after[-1] == "none":
            after[-1] = name
        else:
            return None
    if not 1 <= len(weights) <= _MOST_LAYERS or after[-1] != "none" or len(set(after[:-1])) > 1:
        return None
    return weights, biases, after[0], 0


def _step(layer: Bijection, x: Tensor, context: Tensor | None, inverse: bool) -> Step | None:
    """A coupling layer as a step, when its conditioner is a plain perceptron and all fits; else None."""
    kind = _NO_SPLINE
    numbers: tuple[float, ...] = _NO_NUMBERS
    if isinstance(layer, affine.AffineCoupling) and type(layer) is affine.AffineCoupling:
        name, shift_first, layout = layer.scale, layer.order == "shift_scale", layer.layout
        if layout not in ("halves", "interleaved") or layer.gain != 1:
            return None
        scale, code = affine._SCALES.index(name), affine._LAYOUTS.index(layout)
        clamp = affine._DEFAULT_CLAMP.get(name, 0.0) if layer.clamp is None else float(layer.clamp)
        per, numbers = 2, (clamp, *numbers[1:])
    elif isinstance(layer, affine.AdditiveCoupling) and type(layer) is affine.AdditiveCoupling:
        scale, shift_first, code, per = 0, False, 1, 1
    elif isinstance(layer, spline.SplineCoupling) and type(layer) is spline.SplineCoupling:
        simple = layer.tails in ("linear", "circular") and not isinstance(layer.bound, Tensor)
        if not simple or layer.layout != "channels" or layer.convention == "freia":
            return None
        minima = layer.min_bin_width, layer.min_bin_height, layer.min_derivative
        tails, bounds, edge, clip = spline._check_options(
            layer.bound, layer.tails, minima, layer.convention, layer.scale, layer.layout
        )
        kind = layer.bins, spline._CONVENTIONS.index(layer.convention), tails
        numbers = 0.0, *bounds, edge, clip, float(layer.scale)
        scale, shift_first, code, per = 0, False, 1, 3 * layer.bins + spline._DERIVATIVES[tails]
    else:
        return None
    if layer.event_dim != 1:
        return None
    found = _layers(layer.conditioner, context is not None)
    if found is None:
        return None
    channels, mask = x.shape[-1], None
    if layer.mask == "tensor":
        mask, conditioning, transformed = layer.transformed, channels, channels
        same, part = (0, 1), (0, 1)
        if mask.shape != (channels,):
            return None
    elif layer.mask == "interleaved":
        odd, even = channels // 2, channels - channels // 2
        same, part = ((1, 2), (0, 2)) if layer.swap else ((0, 2), (1, 2))
        conditioning, transformed = (odd, even) if layer.swap else (even, odd)
    else:
        first, second = channels - channels // 2, channels // 2
        same, part = ((first, 1), (0, 1)) if layer.swap else ((0, 1), (first, 1))
        conditioning, transformed = (second, first) if layer.swap else (first, second)
    if not fits(found, x, context, conditioning, per * transformed):
        return None  # layer by layer, which finds the words for what does not fit
    weights, biases, activation, blocks = found
    return Step(
        tuple(weights), tuple(biases), product._FUSED[activation], same, part, scale, shift_first, inverse, code, mask,
        spline=kind, numbers=numbers, blocks=blocks,
    )  # fmt: skip


def fits(network: Network, x: Tensor, context: Tensor | None, conditioning: int, parameters: int) -> bool:
    """Whether the operator runs this network, from so many channels of x to so many parameters."""
    weights, _, activation, blocks = network
    last = weights[-1]
    return (
        activation in product._FUSED
        and sum(w.numel() for w in weights) <= _LARGEST
        and weights[0].shape[1] == conditioning + (0 if context is None else context.shape[-1])
        and (not blocks or len(weights) == 2 + (2 if context is None else 3) * blocks)
        and last.shape[0] == parameters
        and last.dtype is x.dtype
        and last.device == x.device
        and (context is None or (context.dtype is x.dtype and context.dim() == x.dim()))
    )


def _steps(layer: Bijection, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
    """A layer that holds a coupling as steps, the last of which may permute the channels only; None: not in one."""
    if isinstance(layer, Steps):
        found = layer.steps(x, context, inverse)
    else:
        step = _step(layer, x, context, inverse)
        found = None if step is None else [step]
    return None if found is None or not all(_on_gpu(x, step) for step in found) else found


class Steps(Bijection):
    """A map that says itself what it is for the operator."""

    def steps(self, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        """The map, or its inverse, as steps with one coupling; None where it is more than that."""
        raise NotImplementedError


def _one(layer: Bijection, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """A coupling layer in one operator, or None."""
    if product._PLAIN or not runs(x, "relu") or x.dim() == 0:
        return None
    found = _steps(layer, x, context, inverse)
    return None if found is None else run(x, context, found)


def _collect(layers: Sequence[recompute.Step], x: Tensor, context: Tensor | None) -> tuple[int, list[Step]] | None:
    """How many layers from the first on go into one operator, and their steps; or None."""
    if product._PLAIN or not runs(x, "relu") or x.dim() == 0 or torch.compiler.is_compiling():
        return None
    steps: list[Step] = []
    taken = couplings = 0
    for layer, inverse in layers:
        if hooked(layer) or len(steps) > _MOST_STEPS:
            break
        channelwise = layer.channelwise(x, inverse)
        if channelwise is not None:
            index, scaled, log_scale, shift = channelwise
            new: Sequence[Step] = [Step(permutation=index, scaled=scaled, log_scale=log_scale, shift=shift)]
        else:
            found = _steps(layer, x, context, inverse)
            if found is None:
                break
            new = found
            couplings += 1
        for step in new:
            _append(steps, step)
        taken += 1
    return (taken, steps) if couplings else None


def _many(layers: Sequence[recompute.Step], x: Tensor, context: Tensor | None) -> tuple[int, Tensor, Tensor] | None:
    """(how many, y, logdet) of the longest run of layers from the first on that go into one operator, or None."""
    found = _collect(layers, x, context)
    return None if found is None else (found[0], *run(x, context, found[1]))


def _back(
    layers: Sequence[recompute.Step], x: Tensor, context: Tensor | None
) -> tuple[int, Tensor, Tensor, recompute.Back] | None:
    """Likewise with nothing kept, and their backward pass from y: see `recompute.rebuild`."""
    found = _collect(layers, x, context) if _native.has_kernel_for("mlp_coupling_rebuild", x) else None
    if found is None:
        return None
    count, steps = found
    parameters = _parameters_of(steps)

    def back(
        y: Tensor, x: Tensor | None, context: Tensor | None, dy: Tensor, dlogdet: Tensor, need_input: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
        wide = context if context is None else context.expand(*y.shape[:-1], -1)
        wanted = any(p is not None and p.requires_grad for p in parameters)
        before, dx, dcontext, gradients = torch.ops.pyflowgen.mlp_coupling_rebuild.default(
            dy, dlogdet, y, x, *_operands(y, wide, steps, parameters)[1:], need_input, wanted
        )
        pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if p is not None and p.requires_grad]
        found = dcontext.sum_to_size(context.shape) if context is not None and need_input else None
        return before, dx, found, pairs

    return count, *run(x, context, steps), (parameters, back)


def _append(steps: list[Step], step: Step) -> None:
    """Put a step behind the others, into the last one where that does nothing after what the new one begins with."""
    before = steps[-1] if steps and not steps[-1].weights else None
    if (
        before is None
        or (step.permutation is not None and (before.scaled or before.permutation is not None))
        or (step.scaled and before.scaled)
    ):
        steps.append(step)
        return
    if step.permutation is None:
        step = step._replace(permutation=before.permutation)
    if not step.scaled:
        step = step._replace(scaled=before.scaled, log_scale=before.log_scale, shift=before.shift)
    steps[-1] = step


coupling.whole_layer = _one
recompute.several = _many
recompute.rebuild = _back


# -------------------------------------------------------------------------------------------------------- fake
def _fake(x, context, weights, biases, masks, indices, log_scales, shifts, options, numbers, keep):  # type: ignore[no-untyped-def]
    rows = math.prod(x.shape[:-1])
    columns, first, per = x.shape[-1] * (len(masks) - 1), 0, len(options) // len(masks)
    for count, blocks in zip(options[::per], options[per - 1 :: per], strict=True):
        gated = blocks > 0 and count == 2 + 3 * blocks
        columns += sum((2 if gated and i and i % 3 == 0 else 1) * weights[first + i].shape[0] for i in range(count))
        first += count
    saved = rows * columns if keep else 0
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1]), x.new_empty(saved)


def _fake_backward(  # type: ignore[no-untyped-def]
    dy, dlogdet, x, context, weights, biases, masks, indices, log_scales, shifts, saved, options, numbers, need_input,
    need_parameters,
):  # fmt: skip
    gradients = [t.new_empty(t.shape if need_parameters else 0) for t in (*weights, *biases, *log_scales, *shifts)]
    dcontext = x.new_empty(context.shape if context is not None and need_input else 0)
    return x.new_empty(x.shape), dcontext, gradients


def _fake_rebuild(  # type: ignore[no-untyped-def]
    dy, dlogdet, y, x, context, weights, biases, masks, indices, log_scales, shifts, options, numbers, need_input,
    need_parameters,
):  # fmt: skip
    return y.new_empty(y.shape), *_fake_backward(  # type: ignore[no-untyped-call]
        dy, dlogdet, y, context, weights, biases, masks, indices, log_scales, shifts, None, options, numbers,
        need_input, need_parameters,
    )  # fmt: skip


_native.register("mlp_coupling", _fake)
_native.register("mlp_coupling_backward", _fake_backward)
_native.register("mlp_coupling_rebuild", _fake_rebuild)
