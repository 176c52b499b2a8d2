"""Residual flows: x + g(x) for a contraction g, with its Lipschitz-constrained network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen.bijection import Bijection, batch_shape, logdet_dtype
from pyflowgen.estimators import Noise, Truncation, russian_roulette_logdet
from pyflowgen.nets import activation as make_activation
from pyflowgen.ops.slogdet import slogdet


class LipSwish(nn.Module):
    r"""Swish scaled to a Lipschitz constant of at most 1: :math:`x\,\sigma(\operatorname{softplus}(\beta)\,x) / 1.1`.

    Reference: Chen, Behrmann, Duvenaud and Jacobsen, *Residual Flows for Invertible Generative Modeling*, 2019.

    >>> import torch
    >>> from pyflowgen.residual_flow import LipSwish
    >>> LipSwish()(torch.zeros(2)).tolist()
    [0.0, 0.0]
    """

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * F.softplus(self.beta)) / 1.1


class SpectralLinear(nn.Linear):
    r"""Linear layer whose spectral norm is at most `lipschitz`: :math:`W / \max(1, \sigma / \mathrm{lipschitz})`.

    :math:`\sigma = u^\top W v` with singular vectors from power iteration, which only :meth:`update` advances: calls
    between two updates see the same weight.

    Reference: Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, 2018; Gouk et al.,
    *Regularisation of neural networks by enforcing Lipschitz continuity*, 2018.

    >>> import torch
    >>> from pyflowgen.residual_flow import SpectralLinear
    >>> layer = SpectralLinear(8, 8, lipschitz=0.5)
    >>> _ = layer.weight.data.mul_(100)
    >>> layer.update()
    >>> bool(torch.linalg.matrix_norm(layer.constrained_weight(), 2) < 0.501)
    True
    """

    u: Tensor
    v: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, lipschitz: float = 0.97) -> None:
        super().__init__(in_features, out_features, bias)
        if not lipschitz > 0:
            raise ValueError(f"SpectralLinear: lipschitz is {lipschitz}, expected a positive number")
        self.lipschitz = lipschitz
        self.register_buffer("u", F.normalize(torch.randn(out_features), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(in_features), dim=0))
        self.update()

    @torch.no_grad()
    def update(self, tolerance: float = 1e-3, iterations: int = 200) -> None:
        """Power iteration from where it stood, until the norm changes by less than `tolerance` of itself."""
        w = self.weight.to(logdet_dtype(self.weight.dtype))
        u, v, before = self.u.to(w.dtype), self.v.to(w.dtype), 0.0
        for _ in range(iterations):
            v = F.normalize(w.mT @ u, dim=0)
            wv = w @ v
            u = F.normalize(wv, dim=0)
            sigma = torch.linalg.vector_norm(wv).item()
            if abs(sigma - before) <= tolerance * sigma:
                break
            before = sigma
        self.u.copy_(u)
        self.v.copy_(v)

    def constrained_weight(self) -> Tensor:
        """The weight that is applied."""
        sigma = self.u @ (self.weight @ self.v)
        return self.weight / (sigma / self.lipschitz).clamp(min=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.constrained_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lipschitz={self.lipschitz:g}"


class LipschitzMLP(nn.Module):
    r"""MLP of Lipschitz constant below 1 in x: spectrally normalised layers, activations of constant at most 1.

    Args:
        features: size of x's last dimension, and of the result's.
        hidden: widths of the hidden layers.
        activation: `"lipswish"`, whose second derivative does not vanish, or `"elu"`, `"tanh"`.
        lipschitz: bound of each layer, below 1; the network's is at most this to the number of layers.
        context_features: size of the context, which is added, by a free linear layer, before the first activation.

    Errors: ValueError for options out of range, and for a context of another size.

    Reference: Behrmann et al., *Invertible Residual Networks*, 2019.

    >>> import torch, pyflowgen
    >>> net = pyflowgen.LipschitzMLP(3, [16, 16])
    >>> a, b = torch.randn(2, 5, 3)
    >>> bool(((net(a) - net(b)).norm(dim=-1) <= (a - b).norm(dim=-1)).all())
    True
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "lipswish",
        *,
        lipschitz: float = 0.97,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ("lipswish", "elu", "tanh"):
            raise ValueError(f"LipschitzMLP: activation is {activation!r}, expected 'lipswish', 'elu' or 'tanh'")
        if not hidden or not 0 < lipschitz < 1:
            raise ValueError(
                f"LipschitzMLP: hidden={hidden}, lipschitz={lipschitz}, expected widths and a bound below 1"
            )
        sizes = [features, *hidden, features]
        self.layers = nn.ModuleList(
            SpectralLinear(n_in, n_out, lipschitz=lipschitz) for n_in, n_out in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.activations = nn.ModuleList(
            LipSwish() if activation == "lipswish" else nn.ELU() if activation == "elu" else make_activation(activation)
            for _ in hidden
        )
        self.context_features = context_features
        self.from_context = nn.Linear(context_features, hidden[0], bias=False) if context_features else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i == 0 and self.from_context is not None:
                if context is None or context.shape[-1] != self.context_features:
                    shape = None if context is None else tuple(context.shape)
                    raise ValueError(
                        f"LipschitzMLP: context has shape {shape}, expected (..., {self.context_features})"
                    )
                x = x + self.from_context(context)
            if i < len(self.activations):
                x = self.activations[i](x)
        return x


class ResidualFlow(Bijection):
    r"""Residual block :math:`y = x + g(x)`, invertible because g is a contraction.

    .. math:: \log\det(I + J_g) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J_g^k

    In training the log-determinant is the unbiased estimate of :func:`russian_roulette_logdet`, whose memory does not
    grow with the depth of g. In evaluation it is exact up to events of `exact_features` elements, from the Jacobian
    and :func:`slogdet`; above, the same estimate with `evaluation_terms` terms always computed. The inverse is the
    fixed point of :math:`x = y - g(x)`, differentiated implicitly. In training every call first advances the power
    iterations of the :class:`SpectralLinear` layers in g; leaving training lets them converge.

    Args:
        g: the residual branch, a module of Lipschitz constant below 1 such as :class:`LipschitzMLP`, called with x, and
            with the context when there is one; without randomness of its own.
        event_dim: number of trailing dimensions of one event.
        exact_terms, truncation, rate, samples, noise: of the estimate, as in :func:`russian_roulette_logdet`.
        exact_features: the largest event whose log-determinant is exact in evaluation.
        evaluation_terms: terms always computed in evaluation of larger events.
        tolerance: of the inverse: largest change of an iteration relative to 1 + the largest element; by default 8
            roundings of the dtype.
        iterations: after how many the inverse gives up.

    Errors: RuntimeError when the inverse does not converge, which says that g is no contraction. ValueError for options
    out of range.

    Reference: Behrmann et al., *Invertible Residual Networks*, 2019. Chen et al., *Residual Flows for Invertible
    Generative Modeling*, 2019.

    >>> import torch, pyflowgen
    >>> layer = pyflowgen.ResidualFlow(pyflowgen.LipschitzMLP(3, [16])).eval()
    >>> x = torch.randn(5, 3)
    >>> y, logdet = layer(x)
    >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-4), logdet.shape
    (True, torch.Size([5]))
    """

    def __init__(
        self,
        g: nn.Module,
        *,
        event_dim: int = 1,
        exact_terms: int = 2,
        truncation: Truncation = "geometric",
        rate: float = 0.5,
        samples: int = 1,
        noise: Noise = "rademacher",
        exact_features: int = 64,
        evaluation_terms: int = 20,
        tolerance: float | None = None,
        iterations: int = 1000,
    ) -> None:
        super().__init__()
        if not isinstance(g, nn.Module):
            raise TypeError(f"ResidualFlow: g is {type(g).__name__}, expected a module")
        for name, value in (
            ("event_dim", event_dim),
            ("evaluation_terms", evaluation_terms),
            ("iterations", iterations),
        ):
            if value < 1:
                raise ValueError(f"ResidualFlow: {name} is {value}, expected at least 1")
        self.g, self.event_dim = g, event_dim
        self.exact_terms, self.truncation, self.rate, self.samples = exact_terms, truncation, rate, samples
        self.noise, self.exact_features, self.evaluation_terms = noise, exact_features, evaluation_terms
        self.tolerance, self.iterations = tolerance, iterations

    def _update(self, **options: float) -> None:
        for module in self.g.modules():
            if isinstance(module, SpectralLinear):
                module.update(**options)  # type: ignore[arg-type]

    def train(self, mode: bool = True) -> ResidualFlow:
        if self.training and not mode:
            self._update(tolerance=1e-6, iterations=1000)
        super().train(mode)
        return self

    def _branch(self, context: Tensor | None) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
        """g as a function of x alone, and the tensors it depends on."""
        params: list[Tensor] = [p for p in self.g.parameters() if p.requires_grad]
        if context is None:
            return self.g, params
        return lambda x: self.g(x, context), [*params, *([context] if context.requires_grad else [])]

    def _value(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """g(x) and the log-determinant of x + g(x)."""
        g, params = self._branch(context)
        batch = batch_shape(x, self.event_dim, self)
        size = math.prod(x.shape[len(batch) :])
        if self.training or size > self.exact_features:
            terms = self.exact_terms if self.training else self.evaluation_terms
            return russian_roulette_logdet(
                g, x, params=params, exact_terms=terms, truncation=self.truncation, rate=self.rate,
                samples=self.samples, noise=self.noise, event_dim=self.event_dim,
            )  # fmt: skip
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            inner = x if keep and x.requires_grad else x.detach().requires_grad_()
            gx = g(inner)
            flat = gx.reshape(*batch, size)
            rows = [
                torch.autograd.grad(row.sum(), inner, create_graph=keep, retain_graph=True)[0]
                for row in flat.unbind(-1)
            ]
            jacobian = torch.stack([row.reshape(*batch, size) for row in rows], -2).to(logdet_dtype(x.dtype))
            logdet = slogdet(jacobian + torch.eye(size, dtype=jacobian.dtype, device=x.device))[1]
        return (gx, logdet) if keep else (gx.detach(), logdet.detach())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            self._update()
        gx, logdet = self._value(x, context)
        return x + gx, logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch_shape(y, self.event_dim, self)
        g, params = self._branch(context)
        tolerance = 8 * torch.finfo(y.dtype).eps if self.tolerance is None else self.tolerance
        x = _FixedPoint.apply(g, tolerance, self.iterations, y, *params)  # type: ignore[no-untyped-call]
        return x, -self._value(x, context)[1]

    def extra_repr(self) -> str:
        return f"event_dim={self.event_dim}, exact_terms={self.exact_terms}, truncation={self.truncation!r}"


def _iterate(step: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, iterations: int) -> Tensor:
    x = start
    change = size = 0.0
    for _ in range(iterations):
        after = step(x)
        if not x.numel():
            return after
        change, size = (after - x).abs().max().item(), after.abs().max().item()
        x = after
        if not change > tolerance * (1 + size):  # NaN stays NaN
            return x
    raise RuntimeError(
        f"ResidualFlow: the inverse did not converge in {iterations} iterations: the last changed x by {change:.3g}, "
        f"expected at most {tolerance * (1 + size):.3g}; is g's Lipschitz constant below 1?"
    )


class _FixedPoint(torch.autograd.Function):
    """x of x + g(x) = y; the gradient solves u + u J = dx by the same iteration."""

    @staticmethod
    def forward(ctx: Any, g: Any, tolerance: float, iterations: int, y: Tensor, *params: Tensor) -> Tensor:
        x = _iterate(lambda x: y - g(x), y, tolerance, iterations)
        ctx.g, ctx.tolerance, ctx.iterations = g, tolerance, iterations
        ctx.save_for_backward(x, *params)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor) -> Any:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            gx = ctx.g(inner)

        def step(u: Tensor) -> Tensor:
            return dx - torch.autograd.grad(gx, inner, u, retain_graph=True)[0]

        u = _iterate(step, dx, ctx.tolerance, ctx.iterations)
        needs = ctx.needs_input_grad[4:]
        wanted = [p for p, need in zip(params, needs, strict=True) if need]
        grads = iter(torch.autograd.grad(gx, wanted, -u, allow_unused=True) if wanted else [])
        return None, None, None, u if ctx.needs_input_grad[3] else None, *(next(grads) if n else None for n in needs)
