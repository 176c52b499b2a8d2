"""nflows and its forks; normflows' splines are of the same making."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowgen.bijection import Channelwise
from pyflowgen.ops import rational_quadratic_spline as spline
from pyflowgen.ops.affine_coupling import _LAYOUTS, _SCALES, affine_coupling
from pyflowgen.ops.invertible_linear import invertible_linear
from pyflowgen.ops.mlp_coupling import Step
from pyflowgen.ops.polynomial_spline import polynomial_spline
from pyflowgen.ops.rational_quadratic_spline import rational_quadratic_spline
from pyflowgen.peers import common


class Coupling:
    """``CouplingTransform``: split, conditioner, map and merge; in one operator where the conditioner allows it."""

    def _features(self: Any) -> tuple[list[int], list[int]]:
        """Channels that condition, and those that are transformed; read once, as long as the buffers are the same."""
        key = self.identity_features, self.transform_features
        kept = self.__dict__.get("_pyflowgen")
        if common.unmarked(kept, *key):
            kept = self.__dict__["_pyflowgen"] = common.marks(*key), key[0].tolist(), key[1].tolist()
        return kept[1], kept[2]

    def _map(self: Any, x: Tensor, params: Tensor, inverse: bool, part: Any = None) -> tuple[Tensor, Tensor] | None:
        """The map of the transformed channels, or of `part` of all of x's; None: not one of ours."""
        raise NotImplementedError

    def _fields(self: Any, inverse: bool) -> dict[str, Any] | None:
        """The map as the operator of whole couplings takes it."""
        raise NotImplementedError

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        if (
            not common.takes(x)
            or x.dim() != 2
            or x.shape[1] != self.features
            or self.unconditional_transform is not None
        ):
            return None
        found, fields = common.network(self.transform_net, context is not None), self._fields(inverse)
        if found is None or fields is None:
            return None
        same, part = self._features()
        return common.coupling(found, x, context, same, part, self._transform_dim_multiplier(), fields)

    def _both_ways(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor] | None:
        steps = self._one_operator(x, context, inverse)
        if steps is not None:
            return common.run(steps, x, context)
        if not common.takes(x) or x.dim() not in (2, 4) or x.shape[1] != self.features:
            return None
        same, part = (common.span(features) for features in self._features())
        if same is None or part is None or self.unconditional_transform is not None or not self._gains():
            return None
        params = self.transform_net(common.channels(x, same, self.num_identity_features), context)
        if not common.matches(params, x):
            params = params.to(x.dtype)
        return self._map(x, params, inverse, part)

    def forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._both_ways(inputs, context, False) or super().forward(inputs, context)  # type: ignore[misc]

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._both_ways(inputs, context, True) or super().inverse(inputs, context)  # type: ignore[misc]

    def _gains(self: Any) -> bool:
        """Whether there is a kernel for its map."""
        raise NotImplementedError

    def _transformed(self: Any, inputs: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Where the base class has split already."""
        if not common.takes(inputs) or params.dtype is not inputs.dtype or inputs.dim() not in (2, 4):
            return None
        return self._map(inputs, params, inverse)

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        like, count = next(self.parameters(), torch.empty(0)), self.num_transform_features
        x, params = common.rows(count, like), common.rows(count * self._transform_dim_multiplier(), like, 1)
        for name in ("_coupling_transform_forward", "_coupling_transform_inverse"):
            yield from common.both(self, name, x, params)
        size = getattr(self.transform_net, "context_features", None)
        context = None if size is None else common.rows(size, like, 2)
        if common.network(self.transform_net, context is not None) is not None:
            x = common.rows(self.features, like, 3)
            yield from common.both(self, "forward", x, context)


class Affine(Coupling):
    """``AffineCouplingTransform``, with its scale or one of the two that later versions name."""

    def _gains(self: Any) -> bool:
        return self._scale() is not None

    def _scale(self: Any) -> str | None:
        given = getattr(self, "scale_activation", None)
        return "sigmoid_eps" if given is None or given is getattr(self._plain, "DEFAULT_SCALE_ACTIVATION", 0) else None

    def _map(self: Any, x: Tensor, params: Tensor, inverse: bool, part: Any = None) -> tuple[Tensor, Tensor] | None:
        scale = self._scale()
        if scale is None:
            return None
        return affine_coupling(
            x, params, layout="halves", scale=scale, inverse=inverse, event_dim=x.dim() - 1, part=part
        )

    def _fields(self: Any, inverse: bool) -> dict[str, Any] | None:
        scale = self._scale()
        if scale is None:
            return None
        return {"scale": _SCALES.index(scale), "inverse": inverse, "layout": _LAYOUTS.index("halves")}

    def _coupling_transform_forward(self: Any, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return self._transformed(inputs, transform_params, False) or super()._coupling_transform_forward(  # type: ignore[misc]
            inputs, transform_params
        )

    def _coupling_transform_inverse(self: Any, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        return self._transformed(inputs, transform_params, True) or super()._coupling_transform_inverse(  # type: ignore[misc]
            inputs, transform_params
        )


class Additive(Affine):
    """``AdditiveCouplingTransform``."""

    def _gains(self: Any) -> bool:
        return True

    def _map(self: Any, x: Tensor, params: Tensor, inverse: bool, part: Any = None) -> tuple[Tensor, Tensor] | None:
        return affine_coupling(x, params, inverse=inverse, event_dim=x.dim() - 1, part=part)

    def _fields(self: Any, inverse: bool) -> dict[str, Any] | None:
        return {"scale": 0, "inverse": inverse}


class Piecewise(Coupling):
    """The couplings by splines with tails; without, the library's own error for what lies outside is kept."""

    def _coupling_transform(
        self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        return self._transformed(inputs, transform_params, inverse) or super()._coupling_transform(  # type: ignore[misc]
            inputs, transform_params, inverse
        )


def _scale(net: Any, *names: str) -> float:
    """Widths and heights are divided by the root of the network's width, where an attribute called so tells it."""
    width = next((getattr(net, name) for name in names if hasattr(net, name)), 1)
    return 1 / math.sqrt(width)


def _knots(module: Any) -> dict[str, Any] | None:
    """Tails, bound and least sizes of a rational quadratic spline; None: no tails, or a list of them, one a feature.

    With a list normflows gives 0 outside of the interval, where ours has the identity.
    """
    tails, bound = module.tails, module.tail_bound
    if not isinstance(tails, str) or tails not in ("linear", "circular"):
        return None
    return {
        "tails": tails, "bound": bound if isinstance(bound, Tensor) else float(bound),
        "min_bin_width": module.min_bin_width, "min_bin_height": module.min_bin_height,
        "min_derivative": module.min_derivative,
    }  # fmt: skip


_WIDTHS = ("hidden_features", "hidden_channels")


class RationalQuadratic(Piecewise):
    """``PiecewiseRationalQuadraticCouplingTransform``, normflows' ``PiecewiseRationalQuadraticCoupling``."""

    def _gains(self: Any) -> bool:
        return _knots(self) is not None

    def _map(self: Any, x: Tensor, params: Tensor, inverse: bool, part: Any = None) -> tuple[Tensor, Tensor] | None:
        knots = _knots(self)
        if knots is None:
            return None
        if isinstance(knots["bound"], Tensor):
            knots["bound"] = knots["bound"].reshape(-1, *[1] * (x.dim() - 2))
        return rational_quadratic_spline(
            x, params, inverse=inverse, layout="channels", bins=self.num_bins, event_dim=x.dim() - 1, part=part,
            scale=_scale(self.transform_net, *_WIDTHS), **knots,
        )  # fmt: skip

    def _fields(self: Any, inverse: bool) -> dict[str, Any] | None:
        knots = _knots(self)
        if knots is None or isinstance(knots["bound"], Tensor):
            return None
        minima = knots["min_bin_width"], knots["min_bin_height"], knots["min_derivative"]
        scale = _scale(self.transform_net, *_WIDTHS)
        tails, bounds, edge, clip = spline._check_options(
            knots["bound"], knots["tails"], minima, "nflows", scale, "channels"
        )
        return {
            "inverse": inverse, "spline": (self.num_bins, spline._CONVENTIONS.index("nflows"), tails),
            "numbers": (0.0, *bounds, edge, clip, scale),
        }  # fmt: skip


class Polynomial(Piecewise):
    """``PiecewiseLinear-``, ``-Quadratic-`` and ``-CubicCouplingTransform``."""

    _degree = 1

    def _gains(self: Any) -> bool:
        return bool(self.tails == "linear")

    def _map(self: Any, x: Tensor, params: Tensor, inverse: bool, part: Any = None) -> tuple[Tensor, Tensor] | None:
        if self.tails != "linear":
            return None
        sizes = {} if self._degree == 1 else {
            "scale": _scale(self.transform_net, "hidden_features"),
            "min_bin_width": self.min_bin_width, "min_bin_height": self.min_bin_height,
        }  # fmt: skip
        return polynomial_spline(
            x, params, degree=self._degree, bound=float(self.tail_bound), inverse=inverse, layout="channels",
            bins=self.num_bins, event_dim=x.dim() - 1, part=part, **sizes,
        )  # fmt: skip

    def _fields(self: Any, inverse: bool) -> dict[str, Any] | None:
        return None


class Quadratic(Polynomial):
    _degree = 2


class Cubic(Polynomial):
    _degree = 3


class Autoregressive:
    """The rational quadratic autoregressive transform: the map's kernel behind the masked network."""

    def _gains(self: Any) -> bool:
        return _knots(self) is not None

    def _elementwise(
        self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        knots = _knots(self)
        if knots is None or not common.takes(inputs) or autoregressive_params.dtype is not inputs.dtype:
            return super()._elementwise(inputs, autoregressive_params, inverse)  # type: ignore[misc]
        return rational_quadratic_spline(
            inputs, autoregressive_params, inverse=inverse, layout="channels", bins=self.num_bins,
            scale=_scale(self.autoregressive_net, "hidden_features"), **knots,
        )  # fmt: skip

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        like, per = next(self.parameters()), self._output_dim_multiplier()
        net = self.autoregressive_net
        features = getattr(net, "features", None) or net.final_layer.weight.shape[0] // per
        x, params = common.rows(features, like), common.rows(features * per, like, 1)
        for inverse in (False, True):
            yield from common.both(self, "_elementwise", x, params, inverse)


class CDF:
    """``PiecewiseRationalQuadraticCDF``: one spline for each feature, whatever the batch."""

    def _gains(self: Any) -> bool:
        return _knots(self) is not None

    def _spline(self: Any, inputs: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        knots, widths = _knots(self), self.unnormalized_widths
        if knots is None or not common.takes(inputs) or widths.dtype is not inputs.dtype:
            return super()._spline(inputs, inverse)  # type: ignore[misc]
        return rational_quadratic_spline(
            inputs, widths, self.unnormalized_heights, self.unnormalized_derivatives, inverse=inverse,
            event_dim=inputs.dim() - 1, **knots,
        )  # fmt: skip

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        shape = self.unnormalized_widths.shape[:-1]
        x = common.rows(math.prod(shape), self.unnormalized_widths).reshape(-1, *shape)
        for inverse in (False, True):
            yield from common.both(self, "_spline", x, inverse)


class LU:
    """``LULinear``: both triangles gathered at once, their product with x one operator."""

    def _packed(self: Any) -> Tensor:
        """L and U as LAPACK packs them, the diagonal in logarithms."""
        diagonal = self.upper_diag.log()
        kept = self.__dict__.get("_pyflowgen")
        if kept is None or kept[2].device != diagonal.device or kept[2].dtype is not diagonal.dtype:
            n = self.features
            places = torch.empty(n, n, dtype=torch.int64)
            entries = n * (n - 1) // 2
            for (rows, columns), first, count in (
                (self.lower_indices, 0, entries), (self.upper_indices, entries, entries),
                (self.diag_indices, 2 * entries, n),
            ):  # fmt: skip
                places[rows, columns] = torch.arange(first, first + count)
            options: Any = {"device": diagonal.device}
            kept = (places.flatten().to(**options), torch.arange(n, **options), torch.ones(n, **options).to(diagonal))
            self.__dict__["_pyflowgen"] = kept
        entries = torch.cat([self.lower_entries, self.upper_entries, diagonal])
        return entries.index_select(0, kept[0]).view(self.features, self.features)

    def _product(self: Any, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        if not common.takes(x) or x.dim() != 2 or x.shape[1] != self.features or self.bias.dtype is not x.dtype:
            return None
        weight = self._packed()
        _, permutation, sign = self.__dict__["_pyflowgen"]
        y, logdet = invertible_linear(
            x - self.bias if inverse else x, weight, permutation=permutation, sign=sign, inverse=inverse
        )
        return (y if inverse else y + self.bias), logdet

    def forward_no_cache(self: Any, inputs: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return self._product(inputs, False) or super().forward_no_cache(inputs, **rest)  # type: ignore[misc]

    def inverse_no_cache(self: Any, inputs: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        return self._product(inputs, True) or super().inverse_no_cache(inputs, **rest)  # type: ignore[misc]

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        x = common.rows(self.features, self.bias)
        if not common.takes(x):
            return  # nor does anything else change
        for name in ("forward_no_cache", "inverse_no_cache"):
            yield from common.both(self, name, x)


def _permutation(module: Any, x: Tensor, inverse: bool) -> Channelwise | None:
    if module._dim != 1 or len(module._permutation) != x.shape[1]:
        return None
    return (module._inverse_permutation if inverse else module._permutation), 0, None, None


def _actnorm(module: Any, x: Tensor, inverse: bool) -> Channelwise | None:
    if module.log_scale.dtype is not x.dtype or len(module.log_scale) != x.shape[1]:
        return None
    if module.training and not inverse and not module.initialized:
        return None
    return None, -1 if inverse else 1, module.log_scale, module.shift


_CHANNELWISE = {
    "Permutation": _permutation, "RandomPermutation": _permutation, "ReversePermutation": _permutation,
    "ActNorm": _actnorm,
}  # fmt: skip


class Composite:
    """``CompositeTransform``: runs of its transforms in one operator."""

    def _layers(self: Any) -> list[Any]:
        """Those of composites inside in their place."""
        found: list[Any] = []
        for transform in self._transforms:
            found += transform._layers() if isinstance(transform, Composite) else [transform]
        return found

    def _both_ways(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor] | None:
        if not common.takes(x) or x.dim() < 2 or (context is not None and not isinstance(context, Tensor)):
            return None
        layers = self._layers()
        if not layers:
            return None
        return common.compose(
            self, lambda: [common.Twin(m, _CHANNELWISE.get(_named(m))) for m in layers], layers, x, context, inverse
        )

    def forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._both_ways(inputs, context, False) or super().forward(inputs, context)  # type: ignore[misc]

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._both_ways(inputs, context, True) or super().inverse(inputs, context)  # type: ignore[misc]

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())  # nothing but the order of its transforms


def _named(module: Any) -> str:
    """A class of nflows by its name; others have none here."""
    return type(module).__name__ if ".transforms." in type(module).__module__ else ""


CLASSES: dict[tuple[str, str], type] = {
    ("transforms.base", "CompositeTransform"): Composite,
    ("transforms.coupling", "AffineCouplingTransform"): Affine,
    ("transforms.coupling", "AdditiveCouplingTransform"): Additive,
    ("transforms.coupling", "PiecewiseRationalQuadraticCouplingTransform"): RationalQuadratic,
    ("transforms.coupling", "PiecewiseLinearCouplingTransform"): Polynomial,
    ("transforms.coupling", "PiecewiseQuadraticCouplingTransform"): Quadratic,
    ("transforms.coupling", "PiecewiseCubicCouplingTransform"): Cubic,
    ("transforms.autoregressive", "MaskedPiecewiseRationalQuadraticAutoregressiveTransform"): Autoregressive,
    ("transforms.lu", "LULinear"): LU,
    ("transforms.nonlinearities", "PiecewiseRationalQuadraticCDF"): CDF,
}
