"""Differentiation of a composition of bijections that keeps its ends, and rebuilds what lies between by the inverse.

What `Chain(..., memory="recompute")` runs; see there for what it promises.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyflowgen import _native

if TYPE_CHECKING:
    from pyflowgen.bijection import Bijection

Step = tuple["Bijection", bool]  # a map, and whether its inverse is taken
_Slot = tuple[dict[str, nn.Parameter | None], str, nn.Parameter]  # where a parameter lives, so that a swap is seen

# What makes a second evaluation differ from the first.
_CHANGING = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)


# `(how many, y, logdet)` of a run of steps from the first on in one operator, or None where there is none for them;
# `ops.mlp_coupling` puts itself here.
several: Callable[[Sequence[Step], Tensor, Tensor | None], tuple[int, Tensor, Tensor] | None] | None = None


# `(x, dx, dcontext, gradients with their parameters)` of such a run from its y; from its x, too, where that is known.
Back = tuple[
    list["Tensor | None"],
    Callable[
        [Tensor, "Tensor | None", "Tensor | None", Tensor, Tensor, bool],
        tuple[Tensor, Tensor, "Tensor | None", list[tuple[Tensor, Tensor]]],
    ],
]
# As `several`, of what needs no gradient but through the last: all tensors that may, and the run's backward pass.
rebuild: Callable[[Sequence[Step], Tensor, Tensor | None], tuple[int, Tensor, Tensor, Back] | None] | None = None


def apply(step: Step, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(y, logdet)` of one step."""
    layer, inverse = step
    return layer.inverse(x, context) if inverse else layer(x, context)


def compose(steps: Sequence[Step], x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(y, logdet)` of all steps, one after the other."""
    total: Tensor | None = None
    at = 0
    while at < len(steps):
        run = several(steps[at:], x, context) if several is not None else None
        if run is not None:
            count, x, logdet = run
        else:
            count = 1
            x, logdet = apply(steps[at], x, context)
        # zeros need no addition, but one may have to give the batch's shape
        if not all(step[0].volume_preserving for step in steps[at : at + count]):
            total = logdet if total is None else total + logdet
        at += count
    return x, logdet if total is None else total


def possible() -> bool:
    """Whether gradients are wanted from the autograd engine; compilers and `torch.func` follow the plain layers."""
    return torch.is_grad_enabled() and not (torch.compiler.is_compiling() or _native.transforms_active())


def recompute(steps: Sequence[Step], x: Tensor, context: Tensor | None, every: int | None) -> tuple[Tensor, Tensor]:
    """As `compose`, with steps of a second evaluation like the first taken together in one node of the graph."""
    total: Tensor | None = None
    group: list[Step] = []
    slots: list[list[_Slot]] = []
    for i, step in enumerate(steps):
        found = _parameters(step[0]) if x.is_floating_point() else None
        if found is not None:
            group.append(step)
            slots.append(found)
        if group and (found is None or i == len(steps) - 1):
            parameters = dict.fromkeys(p for own in slots for _, _, p in own)
            x, logdet = _Recompute.apply((group, slots, every), x, context, *parameters)  # type: ignore[no-untyped-call]
            if not all(layer.volume_preserving for layer, _ in group):
                total = logdet if total is None else total + logdet
            group, slots = [], []
        if found is None:
            x, logdet = apply(step, x, context)
            if not step[0].volume_preserving:
                total = logdet if total is None else total + logdet
    return x, logdet if total is None else total


def _parameters(layer: Bijection) -> list[_Slot] | None:
    """The parameters that need a gradient; None where evaluation has to happen once, or sees to its memory itself."""
    if layer.stochastic:
        return None
    slots: list[_Slot] = []
    for module in layer.modules():
        if getattr(module, "memory", None) == "recompute":  # a chain inside, of a multi-scale architecture, say
            return None
        if not getattr(module, "repeatable", True):
            return None
        if module.training and isinstance(module, _CHANGING) and getattr(module, "p", 1.0) > 0:
            return None
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                # torch.func.functional_call: another tensor stands in for it; a gradient hook must run once
                if not isinstance(p, nn.Parameter) or p._backward_hooks:
                    return None
                slots.append((module._parameters, name, p))
    return slots


def _run(
    slots: Sequence[list[_Slot]], steps: Sequence[Step], i: int, end: int, x: Tensor, context: Tensor | None
) -> tuple[int, Tensor, Tensor, Any]:
    """Steps i to at most `end`: how many go into one operator, its `(y, logdet)`, and its backward pass."""
    found = rebuild(steps[i:end], x, context) if rebuild is not None else None
    if found is not None:
        count, y, logdet, (parameters, back) = found
        # No tensor of a gradient that is lost, and none behind another, such as the weight of a parametrisation.
        if {p for p in parameters if p is not None and p.requires_grad} == {
            p for own in slots[i : i + count] for _, _, p in own
        }:
            return count, y, logdet, back
    return 1, *apply(steps[i], x, context), None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Any, x: Tensor, context: Tensor | None, *parameters: nn.Parameter) -> Any:
        steps, slots, every = plan
        ctx.steps, ctx.slots = steps, slots
        ctx.place = {p: i for i, p in enumerate(parameters)}
        device = x.device.type
        ctx.autocast = device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        ctx.on_reference = _native.reference_only()
        start, kept, total = x, {}, None
        ctx.runs = []  # (first step, how many, their backward pass in one operator or None)

        def keeps(i: int) -> bool:
            # 16-bit values hold too few digits to go back and forth
            return bool(every and i % every == 0) or x.element_size() < 4 or not steps[i][0].exact_inverse

        i = 0
        while i < len(steps):
            if i and keeps(i):
                kept[i] = x
            end = next((k for k in range(i + 1, len(steps)) if keeps(k)), len(steps))
            count, x, logdet, back = _run(slots, steps, i, end, x, context)
            if not all(layer.volume_preserving for layer, _ in steps[i : i + count]):
                total = logdet if total is None else total + logdet
            ctx.runs.append((i, count, back))
            i += count
        ctx.kept = tuple(kept)
        # after the steps: ActNorm sets its parameters in the first forward pass
        ctx.versions = [p._version for p in parameters]
        ctx.save_for_backward(start, context, x, *kept.values())
        return x, logdet if total is None else total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> Any:
        start, context, y, *values = ctx.saved_tensors
        kept = dict(zip(ctx.kept, values, strict=True))
        _, needs_x, needs_context, *_ = ctx.needs_input_grad
        for p, version in zip(ctx.place, ctx.versions, strict=True):
            if p._version != version:
                raise RuntimeError(
                    f"Chain: a parameter of shape {tuple(p.shape)} was changed in place between forward and backward, "
                    "which rebuilds the layers' inputs from their parameters; expected backward before the update"
                )
        for own in ctx.slots:
            if any(where.get(name) is not p for where, name, p in own):
                raise RuntimeError(
                    "Chain: a parameter was replaced between forward and backward, which evaluates the layers again; "
                    "expected the same parameters, or memory='store'"
                )
        if torch.is_grad_enabled():  # create_graph=True: the gradient's own graph needs all that is between
            inputs = [t for t, need in ((start, needs_x), (context, needs_context)) if need] + list(ctx.place)
            with _as_before(ctx):
                outputs = compose(ctx.steps, start, context)
            pairs = [(o, g) for o, g in zip(outputs, (dy, dtotal), strict=True) if o.requires_grad]
            again = iter(
                torch.autograd.grad(
                    [o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=True, allow_unused=True
                )
            )
            return None, *(next(again) if need else None for need in (needs_x, needs_context)), *again

        leaf = context.detach().requires_grad_() if needs_context else context
        dcontext: Tensor | None = None
        grads: list[Tensor | None] = [None] * len(ctx.place)
        for i, count, back in reversed(ctx.runs):
            step, own = ctx.steps[i], [p for slots in ctx.slots[i : i + count] for _, _, p in slots]
            wants = [i > 0 or needs_x, needs_context]
            if i == 0 and not (any(wants) or own):
                break
            if back is not None:
                known = start if i == 0 else kept.get(i)
                before, dx, dc, found_here = back(y, known, context, dy, dtotal.sum_to_size(y.shape[:-1]), any(wants))
                y, dy = before if known is None else known, dx
                dcontext = _plus(dcontext, dc) if needs_context else None
                for p, g in found_here:
                    grads[ctx.place[p]] = _plus(grads[ctx.place[p]], g)
                continue
            with _as_before(ctx), torch.enable_grad():
                if i == 0 or i in kept:
                    x = (kept[i] if i else start).detach().requires_grad_(wants[0])
                    out, logdet = apply(step, x, leaf)
                else:
                    x, out, logdet = step[0].rebuild(y, leaf, inverse=step[1])
            if step[0] not in _known:
                _refuse_foreign(step[0], (out, logdet), {x, leaf, *own})
                _known.add(step[0])
            pairs = [(out, dy), (logdet, dtotal)]
            pairs = [(o, g.sum_to_size(o.shape).to(o.dtype)) for o, g in pairs if o.requires_grad]
            inputs = [t for t, want in zip((x, leaf), wants, strict=True) if t is not None and want] + own
            found: Iterator[Tensor | None] = iter(
                torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
                if pairs
                else [None] * len(inputs)
            )
            if wants[0]:
                dx = next(found)
                dy = torch.zeros_like(x) if dx is None else dx
            if wants[1]:
                dcontext = _plus(dcontext, next(found))
            for p, g in zip(own, found, strict=True):
                grads[ctx.place[p]] = _plus(grads[ctx.place[p]], g)
            del out, logdet, pairs, inputs
            y = x.detach()
        return None, dy if needs_x else None, dcontext, *grads


#: Layers that were seen to use nothing but their input, their parameters and the context.
_known: weakref.WeakSet[Bijection] = weakref.WeakSet()


def _refuse_foreign(layer: Bijection, outputs: Sequence[Tensor], own: set[Tensor | None]) -> None:
    """RuntimeError where outputs hang on a tensor whose gradient would be lost."""
    todo = [o.grad_fn for o in outputs if o.grad_fn is not None]
    seen = set(todo)
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and variable not in own:
            raise RuntimeError(
                f"Chain: {type(layer).__name__} uses a tensor of shape {tuple(variable.shape)} that needs a gradient "
                "and is no parameter of it; make it one, pass it as context, or use memory='store'"
            )
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                todo.append(after)


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


@contextlib.contextmanager
def _as_before(ctx: Any) -> Iterator[None]:
    """Autocast and the choice of path as they were in the forward pass."""
    device, enabled, dtype = ctx.autocast
    path = _native.reference_path() if ctx.on_reference else contextlib.nullcontext()
    with torch.autocast(device, dtype, enabled=enabled, cache_enabled=False), path:
        yield
