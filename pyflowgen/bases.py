"""Base distributions with a shape of their own: mixtures, and a proposal that is resampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, MixtureSameFamily, Normal, constraints

from pyflowgen.bijection import logdet_dtype
from pyflowgen.flow import DiagNormal, event_size
from pyflowgen.nets import MLP


class _Mixture(MixtureSameFamily):
    """Computed in at least float32, sampled in the parameters' type."""

    dtype: torch.dtype

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        drawn: Tensor = super().sample(torch.Size(sample_shape))  # type: ignore[no-untyped-call]
        return drawn.to(self.dtype)


class GaussianMixture(nn.Module):
    r"""Mixture of normal distributions with diagonal covariance.

    .. math:: p(z) = \sum_k w_k\, \mathcal{N}\bigl(z;\, \mu_k,\, \mathrm{diag}(\sigma_k^2)\bigr)

    With `classes`, every class has a mixture of its own, and the context says which: integer labels of shape `batch`
    (a flow with `context_dim=0`), or class probabilities `(*batch, classes)`, of which one-hot vectors are the usual
    ones, for the mixture over classes. Without a context all classes are equally probable.

    Args:
        event_shape: shape of one latent, an integer for vectors.
        components: number of normal distributions K, for each class.
        classes: number of classes; 0 for none.
        spread: the means start as independent normal numbers of this deviation, from torch's generator; the deviations
            start at 1 and the weights equal.
        learnable: means `loc`, `log_scale` and `logits` are parameters; otherwise buffers, to be set.

    Samples carry no gradient (`rsample` is refused): the choice of a component has none.

    Reference: Izmailov, Kirichenko, Finzi and Wilson, *Semi-Supervised Learning with Normalizing Flows*, 2020.

    >>> import torch
    >>> from pyflowgen.bases import GaussianMixture
    >>> base = GaussianMixture(2, 3, classes=10)
    >>> labels = torch.tensor([3, 1, 4])
    >>> base(labels).sample((5,)).shape, base(labels).log_prob(torch.zeros(3, 2)).shape
    (torch.Size([5, 3, 2]), torch.Size([3]))
    """

    loc: Tensor
    log_scale: Tensor
    logits: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: int,
        *,
        classes: int = 0,
        spread: float = 1.0,
        learnable: bool = True,
    ) -> None:
        super().__init__()
        if components < 1 or classes < 0:
            raise ValueError(
                f"GaussianMixture: components={components}, classes={classes}, expected at least 1 and at least 0"
            )
        self.event_shape, self.components, self.classes = event_size(event_shape), components, classes
        table = (classes, components) if classes else (components,)
        for name, value in (
            ("loc", spread * torch.randn(*table, *self.event_shape)),
            ("log_scale", torch.zeros(*table, *self.event_shape)),
            ("logits", torch.zeros(table)),
        ):
            if learnable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, context: Tensor | None = None) -> Distribution:
        compute = logdet_dtype(self.loc.dtype)
        loc, log_scale, logits = (t.to(compute) for t in (self.loc, self.log_scale, self.logits))
        logits = logits.log_softmax(-1)
        n = len(self.event_shape)
        if self.classes:
            if context is None:
                context = loc.new_full((self.classes,), 1 / self.classes)
            if context.is_floating_point():
                if context.shape[-1:] != (self.classes,):
                    raise ValueError(
                        f"GaussianMixture: context has shape {tuple(context.shape)}, "
                        f"expected class probabilities (..., {self.classes}) or integer labels"
                    )
                logits = (context.to(compute).log().unsqueeze(-1) + logits).flatten(-2)
                loc, log_scale = loc.flatten(0, 1), log_scale.flatten(0, 1)
                shape = (*context.shape[:-1], *loc.shape)
                loc, log_scale = loc.expand(shape), log_scale.expand(shape)
            else:
                loc, log_scale, logits = loc[context], log_scale[context], logits[context]
        parts = Independent(Normal(loc, log_scale.exp(), validate_args=False), n, validate_args=False)
        mixture = _Mixture(Categorical(logits=logits, validate_args=False), parts, validate_args=False)
        mixture.dtype = self.loc.dtype
        return mixture

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, components={self.components}, classes={self.classes}"


class Resampled(nn.Module):
    r"""Resampled base: draws of a proposal :math:`\pi`, each kept with a learned probability :math:`a(z)`.

    At most `truncation` = T draws are made for one sample, and the last is kept in any case:

    .. math:: p(z) = \pi(z) \Bigl[(1 - \alpha)\frac{a(z)}{Z} + \alpha\Bigr],\qquad
              Z = \int \pi(z)\, a(z)\, dz,\quad \alpha = (1 - Z)^{T-1}

    So the base can have holes and several modes, and the bijection need not tear the plane. Z is estimated: in training
    every `log_prob` draws `draws` proposals, takes their mean acceptance into a moving average (the buffer
    `normalizer`, kept in the state dict), and lets the gradient through the fresh estimate. In evaluation the average
    is used as it stands; `estimate` makes it as exact as is wanted.

    Args:
        event_shape: shape of one latent, an integer for vectors.
        acceptance: module from latents `(*batch, *event_shape)` to the logit of a, `(*batch,)` or `(*batch, 1)`;
            None for an `MLP` with `hidden` and tanh units.
        hidden: widths of the hidden layers of that network.
        truncation: T, at least 2; None for no limit, where :math:`\alpha = 0`.
        proposal: base distribution of event shape `event_shape`, called without a context; None for `DiagNormal`. One
            with parameters must have an `rsample`, or their part in Z's gradient is missing.
        draws: proposals for one estimate of Z.
        decay: weight of the newest estimate in the moving average.

    Reference: Stimper, Schölkopf and Hernández-Lobato, *Resampling Base Distributions of Normalizing Flows*, 2022;
    Bauer and Mnih, *Resampled Priors for Variational Autoencoders*, 2019.

    >>> import torch
    >>> from pyflowgen.bases import Resampled
    >>> base = Resampled(2, hidden=(32, 32))
    >>> base().sample((5,)).shape, base().log_prob(torch.zeros(3, 2)).shape
    (torch.Size([5, 2]), torch.Size([3]))
    """

    normalizer: Tensor

    def __init__(
        self,
        event_shape: int | Sequence[int],
        acceptance: nn.Module | None = None,
        *,
        hidden: Sequence[int] = (128, 128),
        truncation: int | None = 100,
        proposal: nn.Module | None = None,
        draws: int = 1024,
        decay: float = 0.05,
    ) -> None:
        super().__init__()
        self.event_shape = event_size(event_shape)
        if (truncation is not None and truncation < 2) or draws < 1 or not 0 < decay <= 1:
            raise ValueError(
                f"Resampled: truncation={truncation}, draws={draws}, decay={decay}, "
                "expected at least 2 or None, at least 1, and a weight in (0, 1]"
            )
        if acceptance is None:
            n = len(self.event_shape)
            # zero at the start: every draw is kept with probability 1/2, and the density is the proposal's
            acceptance = nn.Sequential(nn.Flatten(-n), MLP(math.prod(self.event_shape), hidden, 1, "tanh"))
        self.acceptance, self.proposal = acceptance, DiagNormal(event_shape) if proposal is None else proposal
        self.truncation, self.draws, self.decay = truncation, draws, decay
        self.register_buffer("normalizer", torch.tensor(math.nan))  # no estimate yet

    def _apply(self, fn: Any, recurse: bool = True) -> Resampled:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.normalizer = self.normalizer.to(logdet_dtype(self.normalizer.dtype))  # 16 bits do not hold an average
        return self

    def log_accept(self, z: Tensor) -> Tensor:
        """Logarithm of a(z), of shape `batch`, in at least float32."""
        logit: Tensor = self.acceptance(z)
        batch = z.shape[: z.dim() - len(self.event_shape)]
        if logit.shape == (*batch, 1):
            logit = logit.squeeze(-1)
        elif logit.shape != batch:
            raise ValueError(
                f"Resampled: acceptance gave shape {tuple(logit.shape)} for latents of shape {tuple(z.shape)}, "
                f"expected {tuple(batch)} or {(*batch, 1)}"
            )
        return F.logsigmoid(logit.to(logdet_dtype(logit.dtype)))

    @torch.no_grad()
    def estimate(self, draws: int = 1 << 20, chunk: int = 1 << 14) -> Tensor:
        """Set the normaliser Z to the mean acceptance of `draws` proposals, and return it."""
        total = torch.zeros((), dtype=torch.float64, device=self.normalizer.device)
        for start in range(0, draws, chunk):
            total += self.log_accept(self.proposal().sample((min(chunk, draws - start),))).exp().sum()
        self.normalizer.copy_(total / draws)
        return self.normalizer.clone()

    def log_normalizer(self) -> Tensor:
        """Logarithm of Z; in training a new estimate enters the moving average, and carries the gradient."""
        if not self.training:
            if self.normalizer.isnan():
                self.estimate(1 << 16)
            return self.normalizer.log()
        proposal = self.proposal()
        drawn = proposal.rsample((self.draws,)) if proposal.has_rsample else proposal.sample((self.draws,))
        fresh = self.log_accept(drawn).exp().mean()
        with torch.no_grad():
            before = torch.where(self.normalizer.isnan(), fresh, self.normalizer)
            self.normalizer.copy_(before + self.decay * (fresh - before))
        return (self.normalizer.to(fresh.dtype) + (fresh - fresh.detach())).log()

    def forward(self, context: Tensor | None = None) -> Distribution:
        return _ResampledDistribution(self, self.proposal())

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, truncation={self.truncation}"


class _ResampledDistribution(Distribution):
    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, base: Resampled, proposal: Distribution) -> None:
        self.base, self.proposal = base, proposal
        super().__init__(torch.Size(), base.event_shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return self.proposal.support or constraints.independent(constraints.real, len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        log_z = self.base.log_normalizer()
        factor = self.base.log_accept(value) - log_z
        if self.base.truncation is not None:
            z = log_z.exp().clamp_max(1 - torch.finfo(log_z.dtype).eps)  # a Z of 1 leaves no draw to be forced
            log_alpha = (self.base.truncation - 1) * torch.log1p(-z)
            factor = torch.logaddexp(factor + torch.log(-torch.expm1(log_alpha)), log_alpha)
        log_prob: Tensor = self.proposal.log_prob(value)
        return log_prob + factor

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        shape = torch.Size(sample_shape)
        drawn = self.proposal.sample((math.prod(shape),))
        open_ = torch.arange(len(drawn), device=drawn.device)  # samples whose last draw was not kept
        tries = 1
        while len(open_) and tries != self.base.truncation:
            log_accept = self.base.log_accept(drawn[open_])
            open_ = open_[torch.rand_like(log_accept).log() >= log_accept]
            drawn[open_] = self.proposal.sample((len(open_),))
            tries += 1
        return drawn.reshape(shape + self.event_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Distribution:
        raise NotImplementedError("a resampled base has no batch shape; draw a sample of that shape")
