"""Low-rank flows, whose log-determinant the determinant lemma gives: planar, radial and Sylvester.

Plain PyTorch: a few products of the data with vectors, which torch does as fast as a kernel could. Forward is in closed
form; the inverse of planar and Sylvester flows is a chain of scalar equations, each solved to rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen.bijection import Bijection, batch_shape, logdet_dtype

_ITERATIONS = 200  # bisection alone takes 2 + the mantissa's bits


class _LowRank(Bijection):
    """A flow on vectors whose parameters are its own, plus a linear function of the context where there is one."""

    def __init__(self, features: int, context_features: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        if features < 1 or context_features < 0:
            raise ValueError(
                f"{type(self).__name__}: features={features}, context_features={context_features}, "
                "expected at least 1 and 0"
            )
        self.features, self.context_features = features, context_features
        self._shapes = dict(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._sizes = [getattr(self, name).numel() for name in shapes]
        self.from_context = nn.Linear(context_features, sum(self._sizes), bias=False) if context_features else None

    def _parameters_for(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """(x in at least float32, the parameters in that type, with the batch's dimensions in front if conditional)."""
        name = type(self).__name__
        batch = batch_shape(x, 1, self)
        if x.shape[-1] != self.features:
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (..., {self.features})")
        dtype = logdet_dtype(x.dtype)
        own = [getattr(self, n).to(dtype) for n in self._shapes]
        if self.from_context is not None:
            if context is None or context.shape != (*batch, self.context_features):
                shape = None if context is None else tuple(context.shape)
                raise ValueError(
                    f"{name}: context has shape {shape}, expected {(*batch, self.context_features)}: a row for x's"
                )
            offsets = F.linear(context.to(dtype), self.from_context.weight.to(dtype)).split(self._sizes, -1)
            own = [p + o.reshape(*batch, *p.shape) for p, o in zip(own, offsets, strict=True)]
        return x.to(dtype), own

    def extra_repr(self) -> str:
        return f"{self.features}, context_features={self.context_features}"


def _solve(s: Tensor, p: Tensor, q: Tensor, c: Tensor, owner: object) -> Tensor:
    """v of v + p tanh(q v + c) = s, where p q > -1: increasing, so Newton's steps kept in a bracket find it.

    Solved to a few roundings of s and p, or a RuntimeError. The gradient is the implicit function's.
    """
    with torch.no_grad():
        s0, p0, q0, c0 = torch.broadcast_tensors(s, p, q, c)
        low, high = s0 - p0.abs(), s0 + p0.abs()
        size = s0.abs() + p0.abs()
        tolerance = 4 * torch.finfo(s.dtype).eps * size
        v = s0
        for i in range(_ITERATIONS):
            h = torch.tanh(q0 * v + c0)
            error = v + p0 * h - s0
            # Beside a flat piece the error is small long before v is right: the bracket must be as narrow.
            slope = 1 + p0 * q0 * (1 - h * h)
            step = v - error / slope
            low, high = torch.where(error <= 0, v, low), torch.where(error >= 0, v, high)
            done = (error.abs() <= tolerance * slope.clamp(max=1)) | (high - low <= tolerance)
            if not bool((~done & (error == error)).any()):  # NaN stays NaN
                break
            newton = (step > low) & (step < high) & (i % 3 < 2)  # now and then a half, lest one end stays for ever
            v = torch.where(done, v, torch.where(newton, step, low + (high - low) / 2))
        else:
            raise RuntimeError(
                f"{type(owner).__name__}: the inverse did not converge in {_ITERATIONS} iterations; largest error "
                f"{error.abs().max().item():.3g}, expected at most {tolerance.max().item():.3g}"
            )
    if not torch.is_grad_enabled():
        return v
    # The value stays v; the gradient is the implicit function's, finite also where the map is flat.
    error = v + p * torch.tanh(q * v + c) - s
    return v - (error - error.detach()) / slope.clamp(min=torch.finfo(s.dtype).eps)


class Planar(_LowRank):
    r"""Planar flow: the data is moved along one direction by a function of its projection on another.

    .. math:: y = x + \hat u \tanh(w^\top x + b), \qquad \log|\det| = \log(1 + h'(w^\top x + b)\,w^\top \hat u)

    with :math:`\hat u = u + (\operatorname{softplus}(w^\top u) - 1 - w^\top u)\,w/\lVert w \rVert^2`, so that
    :math:`w^\top \hat u > -1` and the map is invertible for every u and w. The inverse is one scalar equation for
    :math:`w^\top x`, solved to rounding (RuntimeError if it is not) and differentiated implicitly.

    Args:
        features: size D of x's last dimension.
        context_features: size of the context; its linear function is then added to u, w and b (amortised flows).

    Errors: ValueError for x or a context of another size.

    Reference: Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015, section 4.1 and appendix A.

    >>> import torch, pyflowgen
    >>> layer = pyflowgen.Planar(3)
    >>> x = torch.randn(5, 3)
    >>> y, logdet = layer(x)
    >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5), logdet.shape
    (True, torch.Size([5]))
    """

    u: Tensor
    w: Tensor
    b: Tensor

    def __init__(self, features: int, *, context_features: int = 0) -> None:
        super().__init__(features, context_features, {"u": (features,), "w": (features,), "b": ()})
        nn.init.uniform_(self.u, -(2**0.5), 2**0.5)
        nn.init.uniform_(self.w, -((2 / features) ** 0.5), (2 / features) ** 0.5)
        nn.init.zeros_(self.b)

    @staticmethod
    def _constrained(u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(û, w·û)"""
        inner = (w * u).sum(-1, keepdim=True)
        wu = F.softplus(inner) - 1
        return u + (wu - inner) * w / (w * w).sum(-1, keepdim=True), wu.squeeze(-1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, (u, w, b) = self._parameters_for(x, context)
        u, wu = self._constrained(u, w)
        h = torch.tanh((wide * w).sum(-1) + b)
        return (wide + u * h.unsqueeze(-1)).to(x.dtype), torch.log1p((1 - h * h) * wu)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, (u, w, b) = self._parameters_for(y, context)
        u, wu = self._constrained(u, w)
        projection = _solve((wide * w).sum(-1), wu, torch.ones_like(wu), b, self)
        h = torch.tanh(projection + b)
        return (wide - u * h.unsqueeze(-1)).to(y.dtype), -torch.log1p((1 - h * h) * wu)


class Radial(_LowRank):
    r"""Radial flow: the data is drawn to a point or pushed away from it, the more the nearer.

    .. math:: y = x + \frac{\beta}{\alpha + r}(x - x_0), \qquad r = \lVert x - x_0 \rVert, \qquad
              \log|\det| = (D-1)\log\Bigl(1 + \frac{\beta}{\alpha + r}\Bigr)
                           + \log\Bigl(1 + \frac{\alpha\beta}{(\alpha + r)^2}\Bigr)

    with :math:`\alpha = \lvert a \rvert` and :math:`\beta = \operatorname{softplus}(b) - \alpha > -\alpha`, so that the
    map is invertible for all parameters. The inverse is in closed form: r solves a quadratic equation.

    Args:
        features: size D of x's last dimension.
        context_features: size of the context; its linear function is then added to x0, a and b.

    Errors: ValueError for x or a context of another size.

    Reference: Rezende and Mohamed, *Variational Inference with Normalizing Flows*, 2015, section 4.1 and appendix A.

    >>> import torch, pyflowgen
    >>> layer = pyflowgen.Radial(3)
    >>> x = torch.randn(5, 3)
    >>> y, logdet = layer(x)
    >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5), logdet.shape
    (True, torch.Size([5]))
    """

    x0: Tensor
    a: Tensor
    b: Tensor

    def __init__(self, features: int, *, context_features: int = 0) -> None:
        super().__init__(features, context_features, {"x0": (features,), "a": (), "b": ()})
        nn.init.normal_(self.x0)
        nn.init.uniform_(self.a, 0.5, 1.5)
        nn.init.uniform_(self.b, 0.0, 1.0)

    def _logdet(self, alpha: Tensor, beta: Tensor, r: Tensor) -> Tensor:
        distance = alpha + r
        rest = torch.log1p(beta / distance) * (self.features - 1)
        return rest + torch.log1p(alpha * beta / distance**2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, (x0, a, b) = self._parameters_for(x, context)
        alpha = a.abs()
        beta = F.softplus(b) - alpha
        away = wide - x0
        r = torch.linalg.vector_norm(away, dim=-1)
        y = wide + (beta / (alpha + r)).unsqueeze(-1) * away
        return y.to(x.dtype), self._logdet(alpha, beta, r)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, (x0, a, b) = self._parameters_for(y, context)
        alpha, total = a.abs(), F.softplus(b)  # alpha + beta
        away = wide - x0
        r_y = torch.linalg.vector_norm(away, dim=-1)
        # r^2 + (total - r_y) r - alpha r_y = 0, its positive root without cancellation
        half = (total - r_y) / 2
        root = torch.sqrt(half * half + alpha * r_y)
        r = torch.where(half > 0, alpha * r_y / (half.abs() + root), root - half)
        x = x0 + away * ((alpha + r) / (total + r)).unsqueeze(-1)
        return x.to(y.dtype), -self._logdet(alpha, total - alpha, r)


class Sylvester(_LowRank):
    r"""Sylvester flow: M planar moves at once, in an orthogonal frame and triangularly coupled.

    .. math:: y = x + Q R \tanh(\tilde R Q^\top x + b), \qquad
              \log|\det| = \sum_{i=1}^M \log(1 + h'_i\,r_{ii}\,\tilde r_{ii})

    Q is D × M with orthonormal columns, :math:`R, \tilde R` upper triangular with diagonals in (-1, 1), so that the map
    is invertible for all parameters. The inverse is found in the frame, from the last coordinate to the first: M scalar
    equations, each solved to rounding (RuntimeError if not) and differentiated implicitly.

    Args:
        features: size D of x's last dimension.
        rank: M, by default D; `"householder"` takes D alone.
        frame: `"orthogonal"`: Q from a D × M parameter by the QR decomposition; `"householder"`: Q a product of
            reflections; `"triangular"`: Q the identity, or its columns in reverse order with `flip`.
        reflections: of the Householder frame, by default D.
        flip: of the triangular frame: to alternate from layer to layer.
        context_features: size of the context; its linear function is then added to all parameters, Q's included.

    Errors: ValueError for options that do not fit, and for x or a context of another size.

    Reference: van den Berg, Hasenclever, Tomczak and Welling, *Sylvester Normalizing Flows for Variational Inference*,
    2018; there the orthogonal frame comes from an iteration instead of QR.

    >>> import torch, pyflowgen
    >>> layer = pyflowgen.Sylvester(4, rank=2)
    >>> x = torch.randn(5, 4)
    >>> y, logdet = layer(x)
    >>> torch.allclose(layer.inverse(y)[0], x, atol=1e-5), logdet.shape
    (True, torch.Size([5]))
    """

    q: Tensor
    r: Tensor
    diagonals: Tensor
    b: Tensor

    def __init__(
        self,
        features: int,
        rank: int | None = None,
        *,
        frame: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
        reflections: int | None = None,
        flip: bool = False,
        context_features: int = 0,
    ) -> None:
        rank = features if rank is None else rank
        frames: dict[str, tuple[int, ...]] = {
            "orthogonal": (features, rank),
            "householder": (features if reflections is None else reflections, features),
            "triangular": (0,),
        }
        if frame not in frames:
            raise ValueError(f"Sylvester: frame is {frame!r}, expected one of {tuple(frames)}")
        if not 1 <= rank <= features or (frame == "householder" and rank != features):
            wanted = "features" if frame == "householder" else "1 to features"
            raise ValueError(f"Sylvester: rank={rank}, features={features}, expected {wanted} with frame {frame!r}")
        if (reflections is not None and (frame != "householder" or reflections < 1)) or (
            flip and frame != "triangular"
        ):
            raise ValueError(f"Sylvester: reflections={reflections}, flip={flip} do not fit frame {frame!r}")
        shapes = {"q": frames[frame], "r": (rank, rank), "diagonals": (2, rank), "b": (rank,)}
        super().__init__(features, context_features, shapes)
        self.rank, self.frame, self.flip = rank, frame, flip
        nn.init.normal_(self.q)
        nn.init.normal_(self.r, std=features**-0.5)
        nn.init.normal_(self.diagonals, std=0.5)
        nn.init.zeros_(self.b)

    def _frame(self, q: Tensor) -> Tensor | None:
        """Q, (..., D, M); None for the identity."""
        if self.frame == "orthogonal":
            return torch.linalg.qr(q).Q
        if self.frame == "householder":  # I - V T V^T, as in linear_flows.Householder
            gram = q @ q.mT
            inverse_t = gram.triu(1) + torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1) / 2)
            eye = torch.eye(self.features, dtype=q.dtype, device=q.device)
            return eye - q.mT @ torch.linalg.solve_triangular(inverse_t, q, upper=True)
        if not self.flip and self.rank == self.features:
            return None
        eye = torch.eye(self.features, dtype=self.r.dtype, device=q.device).to(q.dtype)
        return (eye.flip(1) if self.flip else eye)[:, : self.rank]

    def _unpack(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """(x, Q, R, R~, b): r holds R above the diagonal and R~ below it."""
        wide, (q, r, diagonals, b) = self._parameters_for(x, context)
        first, second = torch.tanh(diagonals).unbind(-2)
        upper = r.triu(1) + torch.diag_embed(first)
        return wide, self._frame(q), upper, r.tril(-1).mT + torch.diag_embed(second), b

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, q, r, r_tilde, b = self._unpack(x, context)
        v = wide if q is None else _times(wide, q)
        h = torch.tanh(_times(v, r_tilde.mT) + b)
        moved = _times(h, r.mT)
        y = wide + (moved if q is None else _times(moved, q.mT))
        return y.to(x.dtype), self._logdet(h, r, r_tilde)

    @staticmethod
    def _logdet(h: Tensor, r: Tensor, r_tilde: Tensor) -> Tensor:
        diagonal = r.diagonal(dim1=-2, dim2=-1) * r_tilde.diagonal(dim1=-2, dim2=-1)
        return torch.log1p((1 - h * h) * diagonal).sum(-1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, q, r, r_tilde, b = self._unpack(y, context)
        s = wide if q is None else _times(wide, q)
        v: list[Tensor] = []  # from coordinate i + 1 on
        h: list[Tensor] = []
        for i in range(self.rank - 1, -1, -1):
            rest, known = s[..., i], b[..., i]
            if v:
                rest = rest - (r[..., i, i + 1 :] * torch.stack(h, -1)).sum(-1)
                known = known + (r_tilde[..., i, i + 1 :] * torch.stack(v, -1)).sum(-1)
            v.insert(0, _solve(rest, r[..., i, i], r_tilde[..., i, i], known, self))
            h.insert(0, torch.tanh(r_tilde[..., i, i] * v[0] + known))
        hs = torch.stack(h, -1)
        moved = _times(hs, r.mT)
        x = wide - (moved if q is None else _times(moved, q.mT))
        return x.to(y.dtype), -self._logdet(hs, r, r_tilde)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, frame={self.frame!r}"


def _times(x: Tensor, m: Tensor) -> Tensor:
    """Rows of x times m: one matrix for all, or one for each row."""
    return x @ m if m.dim() == 2 else (x.unsqueeze(-2) @ m).squeeze(-2)
