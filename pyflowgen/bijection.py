"""The contract every invertible map of the library keeps, and the two ways of composing them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from pyflowgen import recompute

Memory = Literal["store", "recompute"]
Channelwise = tuple[Tensor | None, int, Tensor | None, Tensor | None]


def logdet_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type in which a log-determinant of data of type `dtype` is summed: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def batch_shape(x: Tensor, event_dim: int, owner: object) -> torch.Size:
    """Shape of `x` left of its `event_dim` event dimensions; a ValueError naming `owner` if there are too few."""
    if x.dim() < event_dim:
        raise ValueError(
            f"{type(owner).__name__}: x has shape {tuple(x.shape)}, expected at least {event_dim} dimensions"
        )
    return x.shape[: x.dim() - event_dim]


def sum_event(x: Tensor, event_dim: int) -> Tensor:
    """Sum over the trailing `event_dim` dimensions, in at least float32.

    >>> import torch
    >>> from pyflowgen.bijection import sum_event
    >>> sum_event(torch.ones(5, 2, 3), 2)
    tensor([6., 6., 6., 6., 6.])
    """
    dtype = logdet_dtype(x.dtype)
    return x.sum(tuple(range(-event_dim, 0)), dtype=dtype) if event_dim else x.to(dtype)


#: How many layers `Chain(memory="recompute")` goes back by inverses before it meets a stored input again.
CHECKPOINT_EVERY = 64


class Bijection(nn.Module):
    r"""An invertible map :math:`y = f(x)` whose Jacobian's log-determinant is known.

    `forward` goes from data to noise and returns `(y, logdet)` with
    :math:`\mathrm{logdet} = \log|\det \partial y/\partial x|`;
    `inverse` goes back and returns `(x, logdet)` with the log-determinant *of the inverse map*, i.e. the negative.
    `x` has shape `batch + event` for any number of leading batch dimensions (none included); `logdet` has shape `batch`
    and at least float32. `context` holds the conditions of a conditional map, one row per batch element.

    Reference: Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015.

    >>> import torch
    >>> from pyflowgen.bijection import Bijection
    >>> class Double(Bijection):
    ...     def forward(self, x, context=None):
    ...         return 2 * x, torch.full(x.shape[:-1], x.shape[-1] * 0.6931472)
    ...     def inverse(self, y, context=None):
    ...         return y / 2, torch.full(y.shape[:-1], -y.shape[-1] * 0.6931472)
    >>> y, logdet = Double()(torch.ones(4, 2))
    >>> y.shape, logdet
    (torch.Size([4, 2]), tensor([1.3863, 1.3863, 1.3863, 1.3863]))
    """

    #: Whether the log-determinant is zero everywhere, so that compositions need not add it.
    volume_preserving: bool = False
    #: Whether `forward` draws random numbers and `inverse` has no useful derivative (see `Dequantize`).
    stochastic: bool = False
    #: Whether a second evaluation gives the same: no random numbers are drawn and no state changes.
    repeatable: bool = True
    #: Whether going back is as exact as going forward and about as cheap; an iterative `inverse` is not.
    exact_inverse: bool = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data to noise: `(y, log|det dy/dx|)`."""
        raise NotImplementedError(f"{type(self).__name__} defines no forward")

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Noise to data: `(x, log|det dx/dy|)`."""
        raise NotImplementedError(f"{type(self).__name__} defines no inverse")

    def rebuild(
        self, y: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(x, y, logdet)` from `y` alone: `x` a new leaf, the others evaluated from it with gradients.

        What a backward pass without stored inputs asks of a layer. `inverse=True`: of its inverse. A layer that spends
        most of its time on something common to both directions can do it once.
        """
        with torch.no_grad():
            x, _ = self(y, context) if inverse else self.inverse(y, context)
        x = x.detach().requires_grad_()
        return x, *(self.inverse(x, context) if inverse else self(x, context))

    def channelwise(self, x: Tensor, inverse: bool) -> Channelwise | None:
        r"""What the map (or its inverse) does to `x`, if that is no more than to permute, scale and shift the channels.

        `(index, scaled, log_scale, shift)`: :math:`x_k` becomes :math:`x_{index_k}`, or :math:`x_k e^{s_k} + b_k` with
        `scaled = 1`, or :math:`(x_k - b_k) e^{-s_k}` with `scaled = -1`. Runs of such maps and of couplings go into one
        operator. None, as here, for anything else.
        """
        return None

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        """Event shape of `y` for an event shape of `x`; the same unless a map rearranges its input."""
        return tuple(event_shape)

    @property
    def domain(self) -> constraints.Constraint:
        """Where one element of `x` may lie."""
        return constraints.real


class Chain(Bijection):
    r"""Composition :math:`f_n \circ \dots \circ f_1`, whose log-determinants add up.

    `Chain(f1, ..., fn)` applies `f1` first; `inverse` runs through them backwards. Indexing gives a bijection, slicing
    a `Chain` that shares its parameters.

    Args:
        bijections: the maps, in the order in which `forward` applies them.
        memory: `"store"` keeps what backward needs of every layer. `"recompute"` keeps the input and the output, and
            backward rebuilds each layer's input from its output by the inverse, so that the memory of activations does
            not grow with depth. Gradients then carry the rounding errors of the way back, which checkpoints bound.
        checkpoint_every: with `"recompute"`, keep every k-th layer's input too, and go on from there; 1 keeps all
            inputs but nothing from inside the layers; None keeps none.

    `"recompute"` evaluates each layer twice, so the layers' forward hooks run twice, and their backward hooks in the
    second evaluation. Nested chains are taken apart; their own hooks do not run. What cannot be evaluated twice is
    stored: layers that draw random numbers (`Dequantize`, dropout), batch normalisation in training, parameters with
    gradient hooks, integer data. So
    are 16-bit inputs of layers, which hold too few digits for the way back, and those of layers without an
    `exact_inverse`. Under `torch.no_grad`, `torch.compile` and `torch.func` nothing changes, and `create_graph=True`
    evaluates all once more and stores it. A layer may use its own parameters and the context, no other tensor that
    needs a gradient; parameters must not change between forward and backward. Both raise a RuntimeError in backward.

    Reference: Gomez, Ren, Urtasun and Grosse, *The Reversible Residual Network*, 2017.

    >>> import torch
    >>> from pyflowgen.bijection import Chain
    >>> from pyflowgen.layers import Permutation, Scale
    >>> chain = Chain(Permutation([1, 0]), Scale(2, init=False))
    >>> y, logdet = chain(torch.tensor([[1.0, 2.0]]))
    >>> y.tolist(), logdet.tolist(), len(chain)
    ([[2.0, 1.0]], [0.0], 2)
    >>> chain.inverse(y)[0].tolist()
    [[1.0, 2.0]]
    """

    def __init__(
        self, *bijections: Bijection, memory: Memory = "store", checkpoint_every: int | None = CHECKPOINT_EVERY
    ) -> None:
        super().__init__()
        if not bijections:
            raise ValueError("Chain: bijections is empty, expected at least one")
        for i, b in enumerate(bijections):
            if not (isinstance(b, nn.Module) and callable(getattr(b, "inverse", None))):
                raise TypeError(f"Chain: bijections[{i}] is {type(b).__name__}, expected a Bijection")
        if memory not in ("store", "recompute"):
            raise ValueError(f"Chain: memory is {memory!r}, expected 'store' or 'recompute'")
        if checkpoint_every is not None and checkpoint_every < 1:
            raise ValueError(f"Chain: checkpoint_every is {checkpoint_every}, expected at least 1, or None")
        self.bijections = nn.ModuleList(bijections)
        self.memory, self.checkpoint_every = memory, checkpoint_every

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(y, context, True)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.memory == "recompute" and recompute.possible():
            return recompute.recompute(self._steps(inverse, apart=True), x, context, self.checkpoint_every)
        return recompute.compose(self._steps(inverse), x, context)

    def _steps(self, inverse: bool, apart: bool = False) -> list[recompute.Step]:
        """The layers in the order of their turns; `apart`: those of nested chains in their place."""
        steps: list[recompute.Step] = []
        for b in reversed(self.bijections) if inverse else self.bijections:
            if apart and isinstance(b, Chain):
                steps += b._steps(inverse, apart)
            else:
                steps.append((b, inverse))  # type: ignore[arg-type]
        return steps

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        for b in self:
            event_shape = b.output_shape(event_shape)
        return tuple(event_shape)

    @property
    def domain(self) -> constraints.Constraint:
        return self[0].domain

    @property
    def volume_preserving(self) -> bool:  # type: ignore[override]
        return all(b.volume_preserving for b in self)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return any(b.stochastic for b in self)

    @property
    def exact_inverse(self) -> bool:  # type: ignore[override]
        return all(b.exact_inverse for b in self)

    def __len__(self) -> int:
        return len(self.bijections)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.bijections)  # type: ignore[arg-type]

    def __getitem__(self, index: int | slice) -> Bijection:
        if isinstance(index, slice):
            return Chain(*self.bijections[index], memory=self.memory, checkpoint_every=self.checkpoint_every)
        return self.bijections[index]  # type: ignore[return-value]


class Inverse(Bijection):
    """The same map the other way round: `forward` and `inverse` change places, parameters are shared.

    >>> import torch
    >>> from pyflowgen.bijection import Inverse
    >>> from pyflowgen.layers import Logit
    >>> sigmoid = Inverse(Logit(alpha=0.0))
    >>> sigmoid(torch.zeros(1, 1))[0]
    tensor([[0.5000]])
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.bijection(y, context)
        return x, logdet

    def rebuild(
        self, y: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self.bijection.rebuild(y, context, inverse=not inverse)

    @property
    def exact_inverse(self) -> bool:  # type: ignore[override]
        return self.bijection.exact_inverse

    @property
    def volume_preserving(self) -> bool:  # type: ignore[override]
        return self.bijection.volume_preserving

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return self.bijection.stochastic
