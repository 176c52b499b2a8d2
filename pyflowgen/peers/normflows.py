"""normflows. Its flows go from noise to data; as couplings they are the same maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowgen.bijection import Channelwise
from pyflowgen.ops.affine_coupling import _LAYOUTS, _SCALES, affine_coupling
from pyflowgen.ops.mlp_coupling import Part, Step, hooked
from pyflowgen.peers import common, nflows

# ``sigmoid`` divides by the sigmoid, which none of our maps does.
_SCALE_MAPS = {"exp": "exp", "sigmoid_inv": "sigmoid"}


class AffineBlock:
    """``AffineCouplingBlock`` split by channels."""

    def _coupling(self: Any) -> tuple[Any, str | None, bool] | None:
        """The coupling, its scale (None: additive), and whether it transforms the first half."""
        if [type(f).__name__ for f in self.flows] != ["Split", "AffineCoupling", "Merge"]:
            return None
        split, coupling, merge = self.flows
        if split.mode not in ("channel", "channel_inv") or merge.mode != split.mode or any(map(hooked, self.flows)):
            return None
        scale = _SCALE_MAPS.get(coupling.scale_map) if coupling.scale else None
        return None if coupling.scale and scale is None else (coupling, scale, split.mode == "channel_inv")

    def _gains(self: Any) -> bool:
        return self._coupling() is not None

    @staticmethod
    def _parts(count: int, swapped: bool) -> tuple[Part, Part]:
        """(conditioning, transformed) channels, each (first, last + 1): chunks, the first the larger."""
        first = count - count // 2
        return ((first, count), (0, first)) if swapped else ((0, first), (first, count))

    def _one_operator(self: Any, z: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        found = self._coupling()
        if found is None or context is not None or not common.takes(z) or z.dim() != 2 or z.shape[1] < 2:
            return None
        coupling, scale, swapped = found
        same, part = self._parts(z.shape[1], swapped)
        fields: dict[str, Any] = {"scale": 0, "inverse": inverse}
        if scale is not None:
            fields |= {"scale": _SCALES.index(scale), "layout": _LAYOUTS.index("interleaved")}
        return common.coupling(
            common.network(coupling.param_map, False), z, None, range(*same), range(*part), 1 if scale is None else 2,
            fields,
        )  # fmt: skip

    def _both_ways(self: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        steps = self._one_operator(z, None, inverse)
        if steps is not None:
            return common.run(steps, z, None)
        found = self._coupling()
        if found is None or not common.takes(z) or z.dim() < 2 or z.shape[1] < 2:
            return None
        coupling, scale, swapped = found
        same, part = self._parts(z.shape[1], swapped)
        params = coupling.param_map(z[:, same[0] : same[1]])
        if not common.matches(params, z):
            params = params.to(z.dtype)
        options: Any = {} if scale is None else {"scale": scale, "layout": "interleaved"}
        return affine_coupling(z, params, inverse=inverse, event_dim=z.dim() - 1, part=(part[0], 1), **options)

    def forward(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._both_ways(z, False) or super().forward(z)  # type: ignore[misc]

    def inverse(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._both_ways(z, True) or super().inverse(z)  # type: ignore[misc]

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        found = self._coupling()
        net = None if found is None else common.network(found[0].param_map, False)
        if found is None or net is None:
            return
        inputs, outputs = net[0][0].shape[1], net[0][-1].shape[0]
        z = common.rows(inputs + (outputs if found[1] is None else outputs // 2), net[0][0])
        for name in ("forward", "inverse"):
            yield from common.both(self, name, z)


def _permute(module: Any, z: Tensor, inverse: bool) -> Channelwise | None:
    count = z.shape[1]
    if module.num_channels != count:
        return None
    if module.mode == "shuffle":
        return (module.inv_perm if inverse else module.perm), 0, None, None
    if module.mode != "swap":
        return None
    return torch.arange(count, device=z.device).roll(-((count + 1) // 2 if inverse else count // 2)), 0, None, None


def _affine_const(module: Any, z: Tensor, inverse: bool) -> Channelwise | None:
    s, t = module.s, module.t
    if s.shape != (1, z.shape[1]) or t.shape != s.shape or s.dtype is not z.dtype:
        return None
    if hasattr(module, "data_dep_init_done") and not module.data_dep_init_done > 0:
        return None
    return None, -1 if inverse else 1, s[0], t[0]


_CHANNELWISE = {"Permute": _permute, "ActNorm": _affine_const, "AffineConstFlow": _affine_const}


class NormalizingFlow:
    """``NormalizingFlow``: runs of its flows in one operator."""

    def _run(self: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        if not isinstance(z, Tensor) or not common.takes(z) or z.dim() < 2 or not len(self.flows):
            return None

        def twins() -> list[common.Twin]:
            return [common.Twin(flow, _CHANNELWISE.get(type(flow).__name__)) for flow in self.flows]

        z, logdet = common.compose(self, twins, list(self.flows), z, None, inverse)
        return z, logdet.expand(len(z)) if isinstance(logdet, Tensor) else z.new_full((len(z),), logdet)

    def _or_plain(self: Any, name: str, z: Tensor, inverse: bool, result: Callable[..., Any]) -> Any:
        found = self._run(z, inverse)
        return getattr(super(), name)(z) if found is None else result(*found)

    def forward(self: Any, z: Tensor) -> Tensor:
        return self._or_plain("forward", z, False, lambda x, logdet: x)

    def forward_and_log_det(self: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._or_plain("forward_and_log_det", z, False, lambda x, logdet: (x, logdet))

    def inverse(self: Any, x: Tensor) -> Tensor:
        return self._or_plain("inverse", x, True, lambda z, logdet: z)

    def inverse_and_log_det(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._or_plain("inverse_and_log_det", x, True, lambda z, logdet: (z, logdet))

    def forward_kld(self: Any, x: Tensor) -> Tensor:
        return self._or_plain("forward_kld", x, True, lambda z, logdet: -(logdet + self.q0.log_prob(z)).mean())

    def log_prob(self: Any, x: Tensor) -> Tensor:
        return self._or_plain("log_prob", x, True, lambda z, logdet: logdet + self.q0.log_prob(z))

    def sample(self: Any, num_samples: int = 1) -> tuple[Tensor, Tensor]:
        z, log_q = self.q0(num_samples)
        found = self._run(z, False)
        if found is not None:
            return found[0], log_q - found[1]
        for flow in self.flows:
            z, logdet = flow(z)
            log_q = log_q - logdet
        return z, log_q

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())  # nothing but the order of its flows


CLASSES: dict[tuple[str, str], type] = {
    ("core", "NormalizingFlow"): NormalizingFlow,
    ("flows.affine.coupling", "AffineCouplingBlock"): AffineBlock,
    ("flows.mixing", "_LULinear"): nflows.LU,
    ("flows.neural_spline.coupling", "PiecewiseRationalQuadraticCoupling"): nflows.RationalQuadratic,
    ("flows.neural_spline.coupling", "PiecewiseRationalQuadraticCDF"): nflows.CDF,
    ("flows.neural_spline.autoregressive", "MaskedPiecewiseRationalQuadraticAutoregressive"): nflows.Autoregressive,
}
