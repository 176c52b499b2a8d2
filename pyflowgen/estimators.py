"""Stochastic traces and log-determinants of maps known by their products with vectors alone.

Plain PyTorch: the products, which are the caller's networks, take all the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyflowgen.bijection import batch_shape, logdet_dtype, sum_event

Noise = Literal["rademacher", "normal"]
Truncation = Literal["geometric", "poisson"]


def _noise(like: Tensor, noise: str, generator: torch.Generator | None) -> Tensor:
    if noise == "rademacher":
        return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
    if noise == "normal":
        return torch.empty_like(like).normal_(generator=generator)
    raise ValueError(f"noise must be 'rademacher' or 'normal', got {noise!r}")


def _check(name: str, like: Tensor, event_dim: int, count: int, least: int, what: str) -> None:
    if not like.is_floating_point():
        raise TypeError(f"{name}: x must be a floating-point tensor, got {like.dtype}")
    if not 1 <= event_dim <= like.dim():
        raise ValueError(f"{name}: event_dim must be between 1 and x's {like.dim()} dimensions, got {event_dim}")
    if count < least:
        raise ValueError(f"{name}: {what} is {count}, expected at least {least}")


def hutchinson_trace(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    samples: int = 1,
    noise: Noise = "rademacher",
    event_dim: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Hutchinson's unbiased estimate of the trace of a matrix for each batch element.

    .. math:: \operatorname{tr} A = \mathbb{E}\,v^\top A v, \qquad \mathbb{E}\,v v^\top = I

    Args:
        product: gives A v for v of x's shape, each batch element with its own A.
        x: `(*batch, *event)`, for its shape, dtype and device.
        samples: how many v are averaged; the variance is :math:`2 \lVert A \rVert_F^2 / samples` for normal v and A
            symmetric, less the diagonal's part for signs.
        noise: `"rademacher"`, signs, or `"normal"`.
        event_dim: number of trailing dimensions that A acts on.

    Returns: `(*batch,)`, in at least float32; differentiable where `product` is.

    Errors: ValueError for options out of range, TypeError for integers.

    Reference: Hutchinson, *A stochastic estimator of the trace of the influence matrix*, 1989.

    >>> import torch, pyflowgen
    >>> a = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    >>> pyflowgen.hutchinson_trace(lambda v: v @ a.mT, torch.empty(2, 3))
    tensor([6., 6.])
    """
    _check("hutchinson_trace", x, event_dim, samples, 1, "samples")
    total = torch.zeros((), dtype=logdet_dtype(x.dtype), device=x.device)
    for _ in range(samples):
        v = _noise(x, noise, generator)
        total = total + sum_event(v * product(v), event_dim)
    return total / samples


def hutchpp_trace(
    product: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    products: int = 6,
    noise: Noise = "rademacher",
    event_dim: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Hutch++: the trace on a random subspace exactly, the rest by Hutchinson's estimate.

    .. math:: \operatorname{tr} A \approx \operatorname{tr} Q^\top A Q
              + \frac1k \sum_{i=1}^k g_i^\top (I - Q Q^\top) A (I - Q Q^\top) g_i, \qquad Q = \operatorname{qr}(A S)

    with S and g of k = products / 3 random columns each. Unbiased; for positive semidefinite A the error falls as
    1 / products where Hutchinson's falls as its root. Exact from three products for each dimension of the event on.

    Args:
        product, x, noise, event_dim: as in :func:`hutchinson_trace`; `product` must be linear.
        products: how often `product` is called, in threes.

    Returns: `(*batch,)`, in at least float32.

    Errors: ValueError for options out of range, TypeError for integers.

    Reference: Meyer, Musco, Musco and Woodruff, *Hutch++: Optimal Stochastic Trace Estimation*, 2021.

    >>> import torch, pyflowgen
    >>> a = torch.ones(4, 4)  # of rank one: exact
    >>> trace = pyflowgen.hutchpp_trace(lambda v: v @ a.mT, torch.empty(2, 4))
    >>> torch.allclose(trace, torch.tensor([4.0, 4.0]), atol=1e-4)
    True
    """
    _check("hutchpp_trace", x, event_dim, products, 3, "products")
    batch = batch_shape(x, event_dim, "x")
    event = x.shape[len(batch) :]
    size = math.prod(event)
    columns = min(products // 3, size)
    dtype = logdet_dtype(x.dtype)

    def times(m: Tensor) -> Tensor:
        """A m for the columns of m, (*batch, size, k)."""
        of = [product(v.reshape(x.shape).to(x.dtype)).reshape(*batch, size) for v in m.unbind(-1)]
        return torch.stack(of, -1).to(dtype)

    def draw() -> Tensor:
        return torch.stack([_noise(x, noise, generator).reshape(*batch, size) for _ in range(columns)], -1).to(dtype)

    q = torch.linalg.qr(times(draw())).Q
    trace = (q * times(q)).sum((-2, -1))
    if columns < size:
        g = draw()
        g = g - q @ (q.mT @ g)
        trace = trace + (g * times(g)).sum((-2, -1)) / columns
    return trace


def _weights(exact_terms: int, truncation: str, rate: float, generator: torch.Generator | None) -> list[float]:
    """1 / P(term k is computed) for the terms of one draw: `exact_terms` ones, then N more."""
    if truncation == "geometric":
        u = torch.rand((), dtype=torch.float64, generator=generator).item()
        count = 1 + int(math.log1p(-u) / math.log1p(-rate)) if rate < 1 else 1
        tail = [(1 - rate) ** -k for k in range(count)]
    else:
        count = int(torch.poisson(torch.tensor(rate, dtype=torch.float64), generator=generator).item())
        at_least = torch.special.gammainc(
            torch.arange(1, count + 1, dtype=torch.float64), torch.tensor(rate, dtype=torch.float64)
        )
        tail = (1 / at_least).tolist()
    return [1.0] * exact_terms + tail


def russian_roulette_logdet(
    g: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    params: Sequence[Tensor] | None = None,
    exact_terms: int = 2,
    truncation: Truncation = "geometric",
    rate: float = 0.5,
    samples: int = 1,
    noise: Noise = "rademacher",
    event_dim: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    r"""g(x), and an unbiased estimate of the log-determinant of x + g(x) for a contraction g, with Jacobian J.

    .. math:: \log\det(I + J) = \mathbb{E}\Bigl[\sum_{k=1}^{m+N} \frac{(-1)^{k+1}}{k}\,
              \frac{v^\top J^k v}{P(m + N \ge k)}\Bigr], \qquad
              \frac{\partial}{\partial\theta} \log\det(I + J) = \mathbb{E}\Bigl[\sum_{k=0}^{m+N-1}
              \frac{(-1)^k}{P(m + N > k)}\, v^\top J^k \frac{\partial J}{\partial\theta} v\Bigr]

    Russian roulette: the power series is cut at random and its terms weighted by the odds of reaching them, which
    leaves no bias. The gradient is the paper's Neumann series, and nothing is kept for it but x and the noise: the
    backward pass evaluates g once more, so memory grows neither with g's depth nor with the number of terms.

    Args:
        g: the residual branch, of Lipschitz constant below 1, acting on each batch element by itself and giving the
            same for the same x (it is evaluated again in the backward pass). A module or a function.
        x: `(*batch, *event)`.
        params: the tensors g depends on that get gradients; by default a module's parameters.
        exact_terms: m, the terms always computed; the more, the smaller the variance.
        truncation, rate: the law of N: `"geometric"`, 1, 2, ... with chance `rate` of stopping after each, or
            `"poisson"` of that mean. A geometric tail needs :math:`(1 - rate) > \mathrm{Lip}(g)^2` for finite variance.
        samples: independent draws of v and N, averaged. All batch elements share N.
        noise, event_dim, generator: as in :func:`hutchinson_trace`.

    Returns:
        `(g(x), logdet)`: logdet `(*batch,)` in at least float32. First derivatives only.

    Errors: ValueError for options out of range, TypeError for integers.

    Reference: Chen, Behrmann, Duvenaud and Jacobsen, *Residual Flows for Invertible Generative Modeling*, 2019.

    >>> import torch, pyflowgen
    >>> x = torch.randn(4, 3)
    >>> gx, logdet = pyflowgen.russian_roulette_logdet(lambda x: 0 * x, x)
    >>> logdet
    tensor([0., 0., 0., 0.])
    """
    _check("russian_roulette_logdet", x, event_dim, samples, 1, "samples")
    if exact_terms < 1:
        raise ValueError(f"russian_roulette_logdet: exact_terms is {exact_terms}, expected at least 1")
    if truncation not in ("geometric", "poisson") or not rate > 0 or (truncation == "geometric" and rate > 1):
        raise ValueError(
            f"russian_roulette_logdet: truncation={truncation!r}, rate={rate}, "
            "expected 'geometric' with a rate in (0, 1] or 'poisson' with a positive one"
        )
    if params is None:
        params = tuple(g.parameters()) if isinstance(g, torch.nn.Module) else ()
    tensors = [p for p in params if p.requires_grad]
    draws = [(_noise(x, noise, generator), _weights(exact_terms, truncation, rate, generator)) for _ in range(samples)]
    gx, logdet = _RussianRoulette.apply(g, draws, event_dim, x, *tensors)  # type: ignore[no-untyped-call]
    return gx, logdet


class _RussianRoulette(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Any, draws: Any, event_dim: int, x: Tensor, *params: Tensor) -> Any:
        ctx.g, ctx.draws, ctx.event_dim = g, draws, event_dim
        ctx.save_for_backward(x, *params)
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            gx = g(inner)
            total = torch.zeros((), dtype=logdet_dtype(x.dtype), device=x.device)
            for v, weights in draws:
                u = v
                for k, weight in enumerate(weights, 1):
                    u = _vjp(gx, inner, u)
                    total = total + (-1) ** (k + 1) * weight / k * sum_event(u * v, event_dim)
        logdet = (total / len(draws)).expand(batch_shape(x, event_dim, g)).clone()
        return gx.detach(), logdet.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dgx: Tensor | None, dlogdet: Tensor | None) -> Any:
        x, *params = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            gx = ctx.g(inner)
            losses: list[Tensor] = [] if dgx is None else [(gx * dgx).sum()]
            if dlogdet is not None and gx.requires_grad:
                for v, weights in ctx.draws:
                    series, u = weights[0] * v, v
                    for k, weight in enumerate(weights[1:], 1):
                        u = _vjp(gx, inner, u)
                        series = series + (-1) ** k * weight * u
                    (row,) = torch.autograd.grad(gx, inner, series, create_graph=True, allow_unused=True)
                    if row is not None and row.requires_grad:
                        losses.append((sum_event(row * v, ctx.event_dim) * dlogdet).sum() / len(ctx.draws))
            wanted = [t for t, need in zip((inner, *params), ctx.needs_input_grad[3:], strict=True) if need]
            losses = [loss for loss in losses if loss.requires_grad]
            grads = iter(torch.autograd.grad(losses, wanted, allow_unused=True) if losses else [None] * len(wanted))
        return None, None, None, *(next(grads) if need else None for need in ctx.needs_input_grad[3:])


def _vjp(gx: Tensor, x: Tensor, u: Tensor) -> Tensor:
    """u^T J, which is 0 where g does not depend on x."""
    if not gx.requires_grad:
        return torch.zeros_like(u)
    (row,) = torch.autograd.grad(gx, x, u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if row is None else row
