"""FrEIA, whose blocks take and give tuples and say ``rev`` for the inverse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowgen.ops.affine_coupling import _LAYOUTS, _SCALES, affine_coupling
from pyflowgen.ops.mlp_coupling import _NO_NUMBERS, Network, Step
from pyflowgen.peers import common

Result = tuple[tuple[Tensor], Tensor]


def _context(c: Any) -> Tensor | None:
    """The conditions side by side."""
    return torch.cat(list(c), 1) if len(c) else None


def _network(net: Any) -> Network | None:
    """A subnetwork that is a perceptron in an ``nn.Sequential``."""
    return common.sequential(net) if type(net) is torch.nn.Sequential else None


def _scale_first(network: Network | None, factors: tuple[float, float]) -> Network | None:
    """A network that gives ``[s | t]`` as one that gives ``[t | s]``, t and s multiplied by the factors."""
    if network is None:
        return None
    weights, biases, name, blocks = network
    half = weights[-1].shape[0] // 2

    def turned(p: Tensor) -> Tensor:
        s, t = p[:half], p[half:]
        return torch.cat([t if factors[0] == 1 else t * factors[0], s if factors[1] == 1 else s * factors[1]])

    last = biases[-1]
    return [*weights[:-1], turned(weights[-1])], [*biases[:-1], None if last is None else turned(last)], name, blocks


class _Block:
    """A block of vectors or images: in one operator, or its own class's way with the map's kernel."""

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        raise NotImplementedError

    def forward(self: Any, x: Any, c: Any = (), rev: bool = False, jac: bool = True) -> Result:
        if isinstance(x, (tuple, list)) and common.takes(x[0]) and x[0].dim() == 2:
            context = _context(c)
            steps = self._one_operator(x[0], context, bool(rev))
            if steps is not None:
                y, logdet = common.run(steps, x[0], context)
                return (y,), logdet
        return super().forward(x, c=c, rev=rev, jac=jac)  # type: ignore[misc]

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        like = next(self.parameters())
        if len(self.dims_in[0]) != 1 or not common.takes(like):
            return  # images: the subnetworks are not ours to call
        c = [common.rows(dims[0], like, 1) for dims in self.dims_c]
        x = common.rows(self.dims_in[0][0], like)
        if self._one_operator(x, _context(c), False) is None:
            return
        for rev in (False, True):
            fast, plain = self.forward((x,), c, rev), self._plain.forward(self, (x,), c, rev)
            yield fast[0][0], plain[0][0]
            yield fast[1], torch.as_tensor(plain[1]).expand(fast[1].shape)


class _Coupling(_Block):
    """The blocks of two couplings, each half of the other."""

    def _steps(
        self: Any, x: Tensor, context: Tensor | None, inverse: bool, nets: Any, per: int, fields: dict[str, Any]
    ) -> list[Step] | None:
        """`nets`: of the first half, which the second conditions, and the other way round."""
        first, second = range(self.split_len1), range(self.split_len1, self.channels)
        if not len(first) or not len(second):
            return None
        couplings = [(nets[0], second, first), (nets[1], first, second)]
        steps: list[Step] = []
        for net, same, part in reversed(couplings) if inverse else couplings:
            new = common.coupling(net, x, context, same, part, per, {**fields, "inverse": inverse})
            if new is None:
                return None
            steps += new
        return steps

    def _clamping(self: Any) -> tuple[str, float, float] | None:
        """(scale, its clamp, factor of s) of the function that bounds the log-scale; known by what it gives."""
        key, clamp = self.f_clamp, float(self.clamp)
        kept = self.__dict__.get("_pyflowgen")
        if kept is None or kept[0] is not key:
            u = torch.tensor([-3.0, -0.4, 0.7, 2.0], dtype=torch.float64)
            known = {"atan": 0.636 * u.atan(), "tanh": u.tanh(), "sigmoid": (u / 2).tanh()}
            with torch.no_grad():
                given = key(u.clone())
            name = next((n for n, v in known.items() if torch.allclose(given, v, rtol=1e-9, atol=1e-9)), None)
            kept = self.__dict__["_pyflowgen"] = key, name
        if kept[1] is None or clamp <= 0:
            return None
        if kept[1] == "atan":
            return "atan", clamp, 1.0
        return "tanh", clamp, clamp if kept[1] == "tanh" else clamp / 2

    def _map(self: Any, x: Tensor, rev: bool, params: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """By ``[s | t]``, or by t and s."""
        found = self._clamping()
        if found is None:
            return None
        scale, clamp, factor = found
        if not common.matches(params, x):
            params, s = params.to(x.dtype), None if s is None else s.to(x.dtype)
        return affine_coupling(
            x, params, s, scale=scale, clamp=clamp, gain=factor, inverse=bool(rev), event_dim=x.dim() - 1,
            layout="halves_scale_first" if s is None else None,
        )  # fmt: skip

    def _gains(self: Any) -> bool:
        return self._clamping() is not None


class GLOW(_Coupling):
    """``GLOWCouplingBlock``: a subnetwork gives ``[s | t]``."""

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        found = self._clamping()
        if found is None:
            return None
        scale, clamp, factor = found
        fields = {
            "scale": _SCALES.index(scale), "layout": _LAYOUTS.index("halves"), "numbers": (clamp, *_NO_NUMBERS[1:]),
        }  # fmt: skip
        nets = [_scale_first(_network(net), (1.0, factor)) for net in (self.subnet2, self.subnet1)]
        return self._steps(x, context, inverse, nets, 2, fields)

    def _half(self: Any, x: Tensor, net: Any, u: Tensor, rev: bool) -> tuple[Tensor, Tensor] | None:
        if not common.takes(x) or self._clamping() is None:  # before the network draws random numbers
            return None
        return self._map(x, rev, net(u))

    def _coupling1(self: Any, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        found = self._half(x1, self.subnet2, u2, rev)
        return found or super()._coupling1(x1, u2, rev)  # type: ignore[misc]

    def _coupling2(self: Any, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        found = self._half(x2, self.subnet1, u1, rev)
        return found or super()._coupling2(x2, u1, rev)  # type: ignore[misc]


class NICE(_Coupling):
    """``NICECouplingBlock``."""

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        return self._steps(x, context, inverse, [_network(self.F), _network(self.G)], 1, {"scale": 0})

    def _gains(self: Any) -> bool:
        return True


class RNVP(_Coupling):
    """``RNVPCouplingBlock``: two subnetworks for each half, each by itself."""

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        return None

    def _coupling1(self: Any, x1: Tensor, u2: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        found = (
            self._map(x1, rev, s=self.subnet_s2(u2), params=self.subnet_t2(u2))
            if common.takes(x1) and self._clamping()
            else None
        )
        return found or super()._coupling1(x1, u2, rev)  # type: ignore[misc]

    def _coupling2(self: Any, x2: Tensor, u1: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        found = (
            self._map(x2, rev, s=self.subnet_s1(u1), params=self.subnet_t1(u1))
            if common.takes(x2) and self._clamping()
            else None
        )
        return found or super()._coupling2(x2, u1, rev)  # type: ignore[misc]


class AllInOne(_Block):
    """``AllInOneBlock`` with a permutation of the channels (not a rotation, reflections, or volume preserving)."""

    def _gains(self: Any) -> bool:
        return not self.GIN and self.clamp > 0

    def _simple(self: Any) -> Tensor | None:
        """The permutation that ``w_perm`` is, where the block is no more than coupling, scaling and permutation."""
        weight = self.w_perm
        if weight is None or self.GIN or self.householder or self.reverse_pre_permute:
            return None
        kept = self.__dict__.get("_pyflowgen")
        if common.unmarked(kept, weight):
            matrix = weight.detach().reshape(self.in_channels, self.in_channels)
            index = matrix.argmax(1)
            hard = torch.equal(matrix, torch.nn.functional.one_hot(index, self.in_channels).to(matrix))
            hard = hard and torch.equal(index.sort()[0], torch.arange(len(index), device=index.device))
            kept = self.__dict__["_pyflowgen"] = common.marks(weight), index if hard else None
        return kept[1]

    def _one_operator(self: Any, x: Tensor, context: Tensor | None, inverse: bool) -> Sequence[Step] | None:
        index = self._simple()
        if index is None or x.shape[1] != self.in_channels or self.splits[1] < 1 or not self.clamp > 0:
            return None
        clamp = float(self.clamp)
        fields = {
            "scale": _SCALES.index("tanh"), "layout": _LAYOUTS.index("halves"), "inverse": inverse,
            "numbers": (clamp, *_NO_NUMBERS[1:]),
        }  # fmt: skip
        first = self.splits[0]
        net = _scale_first(_network(self.subnet), (0.1, 0.1 * clamp))
        coupling = common.coupling(net, x, context, range(first), range(first, self.in_channels), 2, fields)
        if coupling is None or self.global_scale.dtype is not x.dtype:
            return None
        log_scale, shift = self.global_scale_activation(self.global_scale).log().flatten(), self.global_offset.flatten()
        if inverse:
            return [Step(permutation=index.argsort(), scaled=-1, log_scale=log_scale, shift=shift), *coupling]
        return [*coupling, Step(scaled=1, log_scale=log_scale, shift=shift), Step(permutation=index)]

    def _affine(self: Any, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        if self.GIN or not common.takes(x) or not common.matches(a, x) or not self.clamp > 0:
            return super()._affine(x, a, rev=rev)  # type: ignore[misc]
        clamp = float(self.clamp)
        return affine_coupling(
            x, 0.1 * a, scale="tanh", clamp=clamp, gain=clamp, inverse=bool(rev), event_dim=x.dim() - 1,
            layout="halves_scale_first",
        )  # fmt: skip

    def _permute(self: Any, x: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
        index = self._simple()
        if index is None:
            return super()._permute(x, rev=rev)  # type: ignore[misc]
        scale = self.global_scale_activation(self.global_scale)
        if rev:
            return (x.index_select(1, index.argsort()) - self.global_offset) / scale, scale.log().sum()
        return (x * scale + self.global_offset).index_select(1, index), scale.log().sum()


class _Twin(common.Twin):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._call(x, context, False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._call(y, context, True)

    def _call(self, x: Tensor, context: Tensor | None, rev: bool) -> tuple[Tensor, Tensor]:
        y, logdet = self.layer((x,), **({} if context is None else {"c": [context]}), rev=rev, jac=True)
        return y[0], torch.as_tensor(logdet, dtype=x.dtype, device=x.device)


class SequenceINN:
    """``SequenceINN``: runs of its blocks in one operator."""

    def forward(self: Any, x_or_z: Any, c: Any = None, rev: bool = False, jac: bool = True) -> Any:
        x = x_or_z if isinstance(x_or_z, Tensor) else x_or_z[0]
        conditions, blocks = set(self.conditions), list(self.module_list)
        if not common.takes(x) or x.dim() != 2 or len(conditions) != 1 or len(blocks) < 2:
            return super().forward(x_or_z, c, rev, jac)  # type: ignore[misc]
        (which,) = conditions
        context = None if which is None else c[which]
        y, logdet = common.compose(self, lambda: [_Twin(m) for m in blocks], blocks, x, context, bool(rev))
        return ((y,) if self.force_tuple_output else y), logdet

    def _compared(self: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(())  # nothing but the order of its blocks


CLASSES: dict[tuple[str, str], type] = {
    ("framework.sequence_inn", "SequenceINN"): SequenceINN,
    ("modules.coupling_layers", "GLOWCouplingBlock"): GLOW,
    ("modules.coupling_layers", "NICECouplingBlock"): NICE,
    ("modules.coupling_layers", "RNVPCouplingBlock"): RNVP,
    ("modules.all_in_one_block", "AllInOneBlock"): AllInOne,
}
