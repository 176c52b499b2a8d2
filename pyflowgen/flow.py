"""Base distributions and the flow: a density made of a bijection and a base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, constraints

from pyflowgen.bijection import Bijection, logdet_dtype, sum_event


def bits_per_dim(log_prob: Tensor, dims: int, levels: int = 1) -> Tensor:
    r"""Code length per dimension, :math:`(-\log p / D + \log L)/\log 2`.

    Args:
        log_prob: log-density in nats.
        dims: number of dimensions D of one event.
        levels: L for data of L levels that was scaled to the unit interval outside the density; 1 where the density is
            of the integers themselves (a flow that starts with `Dequantize`).

    >>> import torch
    >>> from pyflowgen.flow import bits_per_dim
    >>> bits_per_dim(torch.tensor(0.0), 64, 256)  # a uniform density on [0, 1)
    tensor(8.)
    """
    if dims < 1 or levels < 1:
        raise ValueError(f"bits_per_dim: dims={dims}, levels={levels}, expected both at least 1")
    return (math.log(levels) - log_prob / dims) / math.log(2)


def event_size(event_shape: int | Sequence[int]) -> torch.Size:
    """The shape of one event; an integer stands for that of a vector.

    >>> from pyflowgen.flow import event_size
    >>> event_size(3), event_size([1, 8, 8])
    (torch.Size([3]), torch.Size([1, 8, 8]))
    """
    return torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)


class LogisticDistribution(Distribution):
    r"""Logistic distribution, :math:`\log p(x) = -z - 2\,\mathrm{softplus}(-z) - \log s` with :math:`z = (x-\mu)/s`.

    >>> import torch
    >>> from pyflowgen.flow import LogisticDistribution
    >>> LogisticDistribution(torch.tensor(0.0), torch.tensor(1.0)).log_prob(torch.tensor(0.0))
    tensor(-1.3863)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> LogisticDistribution:
        new = self._get_checked_instance(LogisticDistribution, _instance)  # type: ignore[no-untyped-call]
        new.loc, new.scale = self.loc.expand(batch_shape), self.scale.expand(batch_shape)
        super(LogisticDistribution, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        return (math.pi * self.scale).square() / 3

    def entropy(self) -> Tensor:
        return self.scale.log() + 2

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        return F.logsigmoid(z) + F.logsigmoid(-z) - self.scale.log()

    def cdf(self, value: Tensor) -> Tensor:
        return torch.sigmoid((value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        return self.loc + self.scale * torch.logit(value)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=logdet_dtype(self.loc.dtype), device=self.loc.device)
        # rand includes 0, whose logit is -inf
        u = u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps / 2)
        return self.loc + self.scale * torch.logit(u).to(self.loc.dtype)


class _StandardNormal(Independent):
    """Independent(Normal(0, 1)) whose log-density takes one pass."""

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return _standard_normal_log_prob(value, self.event_shape)


def _standard_normal_log_prob(z: Tensor, event_shape: torch.Size) -> Tensor:
    # the sum is what is needed in full precision
    squares = sum_event(z.square(), len(event_shape))
    return torch.rsub(squares, -0.5 * math.prod(event_shape) * math.log(2 * math.pi), alpha=0.5)


class _DiagonalBase(nn.Module):
    """Location and log-scale per dimension: parameters if `learnable`, else buffers, under the same names."""

    loc: Tensor
    log_scale: Tensor

    def __init__(self, event_shape: int | Sequence[int], *, learnable: bool = False) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        self.learnable = learnable
        for name in ("loc", "log_scale"):
            value = torch.zeros(self.event_shape)
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, learnable={self.learnable}"


class DiagNormal(_DiagonalBase):
    """Normal distribution with independent dimensions: standard, or with learnable location and scale.

    Calling it gives a `torch.distributions.Distribution`. It takes no context: conditions act in the bijection.

    >>> import torch
    >>> from pyflowgen.flow import DiagNormal
    >>> DiagNormal(2)().log_prob(torch.zeros(2))
    tensor(-1.8379)
    """

    def forward(self, context: Tensor | None = None) -> Distribution:
        n = len(self.event_shape)
        if self.learnable:
            return Independent(Normal(self.loc, self.log_scale.exp(), validate_args=False), n, validate_args=False)
        return _StandardNormal(Normal(self.loc, torch.ones_like(self.loc), validate_args=False), n, validate_args=False)


class Logistic(_DiagonalBase):
    r"""Logistic distribution with independent dimensions, NICE's prior: standard, or learnable.

    Standard: :math:`\log p(z) = \sum_i -\mathrm{softplus}(z_i) - \mathrm{softplus}(-z_i)`, sampled by
    :math:`z = \mathrm{logit}(u)`.

    Reference: Dinh, Krueger and Bengio, *NICE*, 2014, section 3.4.

    >>> import torch
    >>> from pyflowgen.flow import Logistic
    >>> Logistic(2)().log_prob(torch.zeros(2))
    tensor(-2.7726)
    """

    def forward(self, context: Tensor | None = None) -> Distribution:
        d = LogisticDistribution(self.loc, self.log_scale.exp(), validate_args=False)
        return Independent(d, len(self.event_shape), validate_args=False)


class Flow(nn.Module):
    r"""Density of :math:`x = f^{-1}(z)` with :math:`z` from a base distribution.

    .. math:: \log p(x) = \log p_Z(f(x)) + \log|\det \partial f/\partial x|

    Args:
        base: module that gives a `torch.distributions.Distribution` of `bijection`'s latents when called with `context`
            or None, such as `DiagNormal` or `Logistic`.
        bijection: the map from data to noise.
        event_shape: shape of one datum where it differs from the base's (images with flat latents).
        context_dim: number of trailing dimensions of one context (1: a vector per datum).

    Data have shape `batch + event_shape`. A context's batch dimensions broadcast with the data's, and come after
    `sample`'s shape in samples, as in `torch.distributions`.

    Reference: Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015.

    >>> import torch
    >>> from pyflowgen.flow import DiagNormal, Flow
    >>> from pyflowgen.bijection import Chain
    >>> from pyflowgen.layers import ActNorm
    >>> flow = Flow(DiagNormal(2), Chain(ActNorm(2)))
    >>> flow.sample(5).shape, flow.log_prob(torch.zeros(3, 2)).shape
    (torch.Size([5, 2]), torch.Size([3]))
    >>> flow.distribution().sample((4,)).shape
    torch.Size([4, 2])
    """

    #: What `from_config` needs to build the same model again, JSON-able; set by the models.
    config: dict[str, Any]

    def __init__(
        self,
        base: nn.Module,
        bijection: Bijection,
        *,
        event_shape: int | Sequence[int] | None = None,
        context_dim: int = 1,
    ) -> None:
        super().__init__()
        self.base, self.bijection, self.context_dim = base, bijection, context_dim
        if event_shape is None:
            event_shape = base.event_shape if hasattr(base, "event_shape") else base().event_shape  # type: ignore[assignment]
        self.event_shape = event_size(event_shape)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Flow:
        """The model that `config`, another one's `config` attribute, describes; freshly initialised."""
        return cls(**config)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`log_prob`, under the name that wrappers of modules (DistributedDataParallel, ...) call."""
        return self.log_prob(x, context)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-density in nats, of shape `batch`; at least float32."""
        z, logdet, context = self._with_context(x, context)
        base = self.base
        if type(base) is DiagNormal and not base.learnable and not (base._forward_hooks or base._forward_pre_hooks):
            # The distribution's object alone takes as long as its log-density of a small batch.
            return _standard_normal_log_prob(z, base.event_shape) + logdet
        return base(context).log_prob(z) + logdet

    def _with_context(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Latents, log-determinant, and the context expanded to their batch."""
        n = len(self.event_shape)
        if x.dim() < n or x.shape[x.dim() - n :] != self.event_shape:
            raise ValueError(
                f"{type(self).__name__}.log_prob: x has shape {tuple(x.shape)}, "
                f"expected (..., {', '.join(map(str, self.event_shape))})"
            )
        batch = x.shape[: x.dim() - n]
        if context is not None:
            batch = _broadcast(batch, self._context_batch(context), x, context)
            if x.shape[: x.dim() - n] != batch:
                x = x.expand(*batch, *self.event_shape)
            context = self._expand_context(context, batch)
        z, logdet = self.bijection(x, context)
        return z, logdet, context

    def rsample(self, shape: int | Sequence[int] = (), context: Tensor | None = None) -> Tensor:
        """Samples of shape `shape + context batch + event_shape`, with gradients to the parameters and the context."""
        return self._draw(shape, context, differentiable=True)[0]

    def sample(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Samples of shape `shape + context batch + event_shape`, without gradients.

        `temperature` multiplies the base distribution's distance from its mean: below 1, samples are more typical and
        less varied.
        """
        if not temperature >= 0:
            raise ValueError(f"{type(self).__name__}.sample: temperature is {temperature}, expected 0 or more")
        with torch.no_grad():
            return self._draw(shape, context, differentiable=False, temperature=temperature)[0]

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latents z = f(x)."""
        return self._with_context(x, context)[0]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data of latents; what `encode` gave comes back as it was, but for rounding."""
        x: Tensor = self.bijection.inverse(z, context)[0]
        return x

    def rsample_and_log_prob(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples with gradients and their log-densities, in one pass through the inverse."""
        x, z, logdet, base = self._draw(shape, context, differentiable=True)
        return x, base.log_prob(z) - logdet

    def sample_and_log_prob(
        self, shape: int | Sequence[int] = (), context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities, in one pass through the inverse, without gradients."""
        with torch.no_grad():
            x, z, logdet, base = self._draw(shape, context, differentiable=False)
            return x, base.log_prob(z) - logdet

    def distribution(self, context: Tensor | None = None, *, validate_args: bool | None = None) -> FlowDistribution:
        """This flow under `context` as a `torch.distributions.Distribution`; batch shape from the context."""
        return FlowDistribution(self, context, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:
        """Whether `rsample` carries gradients."""
        return not self.bijection.stochastic and bool(self.base(None).has_rsample)

    def _context_batch(self, context: Tensor) -> torch.Size:
        if context.dim() < self.context_dim:
            raise ValueError(
                f"{type(self).__name__}: context has shape {tuple(context.shape)}, "
                f"expected at least {self.context_dim} dimensions"
            )
        return context.shape[: context.dim() - self.context_dim]

    def _expand_context(self, context: Tensor, batch: torch.Size) -> Tensor:
        rest = context.shape[context.dim() - self.context_dim :]
        return context if context.shape == batch + rest else context.expand(batch + rest)

    def _draw(
        self, shape: int | Sequence[int], context: Tensor | None, differentiable: bool, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor, Distribution]:
        if differentiable and self.bijection.stochastic:
            raise NotImplementedError(f"{type(self).__name__}.rsample: samples are integers (Dequantize), use sample")
        batch = torch.Size([shape] if isinstance(shape, int) else shape)
        if context is not None:
            batch = batch + self._context_batch(context)
            context = self._expand_context(context, batch)
        base: Distribution = self.base(context)
        extra = batch[: len(batch) - len(base.batch_shape)]
        z = base.rsample(extra) if differentiable else base.sample(extra)
        if temperature != 1:
            z = base.mean + temperature * (z - base.mean)
        x, logdet = self.bijection.inverse(z, context)
        return x, z, logdet, base


def _broadcast(a: torch.Size, b: torch.Size, x: Tensor, context: Tensor) -> torch.Size:
    try:
        return torch.broadcast_shapes(a, b)
    except RuntimeError:
        raise ValueError(
            f"log_prob: context has shape {tuple(context.shape)}, expected batch dimensions that broadcast with "
            f"{tuple(a)}, those of x of shape {tuple(x.shape)}"
        ) from None


class FlowDistribution(Distribution):
    """A flow under one context as a `torch.distributions.Distribution`, made by `Flow.distribution`.

    >>> import torch
    >>> from pyflowgen.flow import DiagNormal, Flow
    >>> from pyflowgen.layers import ActNorm
    >>> d = Flow(DiagNormal(2), ActNorm(2)).distribution().expand([3])
    >>> d.batch_shape, d.event_shape, d.sample((5,)).shape, d.log_prob(torch.zeros(2)).shape
    (torch.Size([3]), torch.Size([2]), torch.Size([5, 3, 2]), torch.Size([3]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(
        self,
        flow: Flow,
        context: Tensor | None = None,
        batch_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.flow, self.context = flow, context
        if batch_shape is None:
            batch_shape = () if context is None else flow._context_batch(context)
        super().__init__(torch.Size(batch_shape), flow.event_shape, validate_args=validate_args)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.flow.has_rsample

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.flow.bijection.domain, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        batch = torch.Size(batch_shape)
        context = None if self.context is None else self.flow._expand_context(self.context, batch)
        new = FlowDistribution(self.flow, context, batch, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logp = self.flow.log_prob(value, self.context)
        return logp.expand(torch.broadcast_shapes(logp.shape, self.batch_shape))

    def _shape(self, sample_shape: int | Sequence[int]) -> torch.Size:
        shape = torch.Size([sample_shape] if isinstance(sample_shape, int) else sample_shape)
        return shape if self.context is not None else shape + self.batch_shape

    def sample(self, sample_shape: int | Sequence[int] = torch.Size()) -> Tensor:
        return self.flow.sample(self._shape(sample_shape), self.context)

    def rsample(self, sample_shape: int | Sequence[int] = torch.Size()) -> Tensor:
        return self.flow.rsample(self._shape(sample_shape), self.context)

    def sample_and_log_prob(self, sample_shape: int | Sequence[int] = torch.Size()) -> tuple[Tensor, Tensor]:
        """Samples and their log-densities without a second pass, without gradients."""
        return self.flow.sample_and_log_prob(self._shape(sample_shape), self.context)

    def rsample_and_log_prob(self, sample_shape: int | Sequence[int] = torch.Size()) -> tuple[Tensor, Tensor]:
        """Samples with gradients and their log-densities without a second pass."""
        return self.flow.rsample_and_log_prob(self._shape(sample_shape), self.context)
