"""zuko, whose modules make a transformation for each context."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowgen import recompute
from pyflowgen.ops import rational_quadratic_spline as spline
from pyflowgen.ops.affine_coupling import _LAYOUTS, _SCALES
from pyflowgen.ops.mlp_coupling import _NO_NUMBERS, Step
from pyflowgen.ops.rational_quadratic_spline import rational_quadratic_spline
from pyflowgen.peers import common


def _options(univariate: Any, name: str, known: tuple[str, ...]) -> dict[str, Any] | None:
    """Keyword arguments bound to the constructor of this name, or None for another one."""
    options: dict[str, Any] = {}
    while isinstance(univariate, functools.partial):
        if univariate.args or not set(univariate.keywords) <= set(known):
            return None
        options = {**univariate.keywords, **options}
        univariate = univariate.func
    named = getattr(univariate, "__name__", None) == name and f".{univariate.__module__}".endswith(".transforms")
    return options if named else None


class _ByKernel:
    """A transformation with one function for its kernel both ways, which gives None where its own class has to."""

    def _kernel(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        raise NotImplementedError

    def _call(self, x: Tensor) -> Tensor:
        found = self._kernel(x, False)
        return super()._call(x) if found is None else found[0]  # type: ignore[misc]

    def _inverse(self, y: Tensor) -> Tensor:
        found = self._kernel(y, True)
        return super()._inverse(y) if found is None else found[0]  # type: ignore[misc]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._kernel(x, False) or super().call_and_ladj(x)  # type: ignore[misc]


# ------------------------------------------------------------------------------------------------------- splines
@functools.cache
def _spline_class(plain: Any) -> Any:
    class MonotonicRQSTransform(_ByKernel, plain):
        """The library's spline, on the kernel; its knots are computed when somebody asks for them."""

        def __init__(self, widths: Tensor, heights: Tensor, derivatives: Tensor, bound: float = 5.0,
                     slope: float = 1e-3, **kwargs: Any) -> None:  # fmt: skip
            torch.distributions.Transform.__init__(self, **kwargs)
            self._given = widths, heights, derivatives, bound, slope

        def __getattr__(self, name: str) -> Any:
            if name not in ("horizontal", "vertical", "derivatives"):
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
            super().__init__(*self._given)
            return self.__dict__[name]

        def _kernel(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            widths, heights, derivatives, bound, slope = self._given
            if not common.takes(x) or widths.dtype is not x.dtype:
                return None
            shape = torch.broadcast_shapes(x.shape, widths.shape[:-1])
            return rational_quadratic_spline(
                x.expand(shape), widths, heights, derivatives, bound=float(bound), min_derivative=float(slope),
                convention="zuko", inverse=inverse, event_dim=0,
            )  # fmt: skip

    return MonotonicRQSTransform


class Univariate:
    """Modules that apply a one-dimensional map to every element: rational quadratic ones get the kernel."""

    @property
    def univariate(self: Any) -> Any:
        given = self.__dict__["univariate"]
        options = _options(given, "MonotonicRQSTransform", ("bound", "slope"))
        if options is None:
            return given
        while isinstance(given, functools.partial):
            given = given.func
        return functools.partial(_spline_class(given), **options)

    @univariate.setter
    def univariate(self: Any, value: Any) -> None:
        self.__dict__["univariate"] = value

    def _gains(self: Any) -> bool:
        return self.univariate is not self.__dict__["univariate"]

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        like = next(self.parameters(), torch.empty(0))
        params = [common.rows(max(sum(shape), 1), like, i).reshape(5, *shape) for i, shape in enumerate(self.shapes)]
        x = common.rows(1, like, 9)[:, 0]
        fast, plain = self.univariate(*params), self.__dict__["univariate"](*params)
        yield from zip(fast.call_and_ladj(x), plain.call_and_ladj(x), strict=True)
        yield fast.inv(x), plain.inv(x)


# ------------------------------------------------------------------------------------------------------ couplings
@functools.cache
def _coupling_class(plain: Any) -> Any:
    class CouplingTransform(_ByKernel, plain):
        """The library's coupling in one operator, where its network and map allow it."""

        def __init__(self, lazy: Any, context: Tensor | None, **kwargs: Any) -> None:
            super().__init__(functools.partial(lazy.meta, context), lazy.mask, **kwargs)
            self._lazy, self._context = lazy, context

        def _kernel(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            if not isinstance(x, Tensor):
                return None
            context = _for_rows(self._context, x)
            if (context is None) != (self._context is None):
                return None
            steps = self._lazy._one_operator(x, context, inverse)
            return None if steps is None else common.run(steps, x, context)

        def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
            found = self._kernel(x, False)
            return super().log_abs_det_jacobian(x, y) if found is None else found[1]

    return CouplingTransform


def _for_rows(context: Tensor | None, x: Tensor) -> Tensor | None:
    """The context as one for each of x's rows, or None where there are more contexts than rows."""
    if context is None:
        return None
    try:
        return context.expand(*x.shape[:-1], context.shape[-1])
    except RuntimeError:
        return None


class Coupling(Univariate):
    """``GeneralCouplingTransform``."""

    def _features(self: Any) -> tuple[list[int], list[int]]:
        """Channels that condition, and those that are transformed; read once, as long as the buffer is the same."""
        kept = self.__dict__.get("_pyflowgen")
        if common.unmarked(kept, self.mask):
            mask = self.mask.tolist()
            same, part = ([i for i, m in enumerate(mask) if m is want] for want in (True, False))
            kept = self.__dict__["_pyflowgen"] = common.marks(self.mask), same, part
        return kept[1], kept[2]

    def _fields(self: Any, inverse: bool) -> dict[str, Any] | None:
        shapes = [tuple(shape) for shape in self.shapes]
        given = self.__dict__["univariate"]
        options = _options(given, "MonotonicAffineTransform", ("slope",))
        if options is not None and shapes == [(), ()]:
            return {
                "scale": _SCALES.index("softclip"), "inverse": inverse, "layout": _LAYOUTS.index("interleaved"),
                "numbers": (-math.log(options.get("slope", 1e-3)), *_NO_NUMBERS[1:]),
            }  # fmt: skip
        options = _options(given, "MonotonicRQSTransform", ("bound", "slope"))
        if options is None or len(shapes) != 3 or any(len(shape) != 1 for shape in shapes):
            return None
        (bins,), (heights,), (derivatives,) = shapes
        if heights != bins or derivatives != bins - 1:
            return None
        tails, bounds, edge, clip = spline._check_options(
            float(options.get("bound", 5.0)), "linear", (None, None, float(options.get("slope", 1e-3))), "zuko", 1.0,
            "channels",
        )  # fmt: skip
        return {
            "inverse": inverse, "spline": (bins, spline._CONVENTIONS.index("zuko"), tails),
            "numbers": (0.0, *bounds, edge, clip, 1.0),
        }  # fmt: skip

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        same, part = self._features()
        if not common.takes(x) or x.dim() < 1 or x.shape[-1] != len(same) + len(part):
            return None
        net = self.hyper
        if type(net).__name__ != "MLP" or not f".{type(net).__module__}".endswith(".nn"):
            return None
        linear, fields = sys.modules[type(net).__module__].Linear, self._fields(inverse)
        if fields is None or any(type(m) is linear and m.weight.dim() != 2 for m in net):
            return None
        return common.coupling(common.sequential(net, linear), x, context, same, part, self.total, fields)

    def forward(self: Any, c: Tensor | None = None) -> Any:
        return _coupling_class(_theirs(self, "CouplingTransform"))(self, c)

    def _gains(self: Any) -> bool:
        return self._fields(False) is not None

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super()._compared()
        same, part = self._features()
        first = next(self.hyper.parameters())
        width = first.shape[-1] - len(same)
        c = common.rows(width, first, 7) if width else None
        x = common.rows(len(same) + len(part), first, 8)
        fast, plain = self.forward(c), self._plain.forward(self, c)
        yield from zip(fast.call_and_ladj(x), plain.call_and_ladj(x), strict=True)
        yield fast.inv(x), plain.inv(x)


def _theirs(module: Any, name: str) -> Any:
    """A class that the module's own library has imported beside it."""
    return getattr(sys.modules[module._plain.__module__], name)


# ------------------------------------------------------------------------------------------------ runs of couplings
class Composed:
    """``LazyComposedTransform``: couplings in a row in one operator."""

    def forward(self: Any, c: Tensor | None = None) -> Any:
        transforms = list(self.transforms)
        if not all(isinstance(t, Coupling) for t in transforms):
            return super().forward(c)  # type: ignore[misc]
        kept = self.__dict__.get("_pyflowgen")
        if kept is None or [t.layer for t in kept] != transforms:
            kept = self.__dict__["_pyflowgen"] = [_Twin(t) for t in transforms]
        return _composed_class(_theirs(self, "ComposedTransform"))([(t, False) for t in kept], c)

    def _gains(self: Any) -> bool:
        return all(isinstance(t, Coupling) or type(t).__name__ == "GeneralCouplingTransform" for t in self.transforms)

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())  # nothing but the order of its transformations


class _Twin(common.Twin):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, logdet = self.layer(context).call_and_ladj(x)
        return y, logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.layer(context).inv.call_and_ladj(y)
        return x, logdet


@functools.cache
def _composed_class(plain: Any) -> Any:
    class ComposedTransform(_ByKernel, plain):
        """The library's composition, of couplings only."""

        def __init__(self, steps: list[tuple[common.Twin, bool]], context: Tensor | None) -> None:
            transforms = [twin.layer(context) for twin, _ in steps]
            super().__init__(*[t.inv if inverse else t for t, (_, inverse) in zip(transforms, steps, strict=True)])
            self._steps, self._context = steps, context

        def _kernel(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
            if not common.takes(x):
                return None
            context = _for_rows(self._context, x)
            if (context is None) != (self._context is None):
                return None
            order = [(twin, not was) for twin, was in reversed(self._steps)] if inverse else self._steps
            return recompute.compose(order, x, context)

        @property
        def inv(self) -> Any:
            return type(self)([(twin, not inverse) for twin, inverse in reversed(self._steps)], self._context)

    return ComposedTransform


CLASSES: dict[tuple[str, str], type] = {
    ("lazy", "LazyComposedTransform"): Composed,
    ("flows.coupling", "GeneralCouplingTransform"): Coupling,
    ("flows.autoregressive", "MaskedAutoregressiveTransform"): Univariate,
    ("flows.gaussianization", "ElementWiseTransform"): Univariate,
}
