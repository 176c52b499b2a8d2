"""Monotonic rational-quadratic spline: the elementwise map of neural spline flows with its log-determinant.

In this order: reference, function with its gradient, layer, fake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen.bijection import logdet_dtype
from pyflowgen.coupling import Coupling, Mask, check_tensors, expand_mask, reference_gradients

Tails = Literal["linear", "circular", "affine"]
Convention = Literal["nflows", "zuko", "torchflows", "freia"]
Layout = Literal["last", "channels"]

# The place in the tuple is the code that the operators take.
_CONVENTIONS = ("nflows", "zuko", "torchflows", "freia")
_LAYOUTS = (None, "last", "channels")
# "resized" is what freia calls linear tails: of an interval whose size is a parameter.
_TAILS = (None, "linear", "circular", "mixed", "affine", "resized")
_AFFINE, _RESIZED = 4, 5
# How many derivatives more than bins: one for every knot; for all but the outer two; for all but the last, which is the
# first; for every knot again. Of freia for all but the outer two, after the interval's two ends or its size.
_DERIVATIVES = (1, -1, 0, 1, 1, 0)
# Of each convention: min_bin_width and min_bin_height, min_derivative.
_MINIMA = {"nflows": (1e-3, 1e-3), "zuko": (0.0, 1e-3), "torchflows": (1e-3, 1e-5), "freia": (0.1, 0.0)}
_MAX_BINS = 64


# ---------------------------------------------------------------------------------------------------- reference
def _unpack(
    widths: Tensor, heights: Tensor | None, derivatives: Tensor | None, bins: int, per: int, layout: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(widths, heights, derivatives) with the bins on the last dimension; views of packed parameters."""
    if heights is not None and derivatives is not None:
        return widths, heights, derivatives
    if layout == 2:
        widths = widths.unflatten(dim, (-1, per)).movedim(dim + 1, -1)
    w, h, d = widths.split((bins, bins, per - 2 * bins), -1)
    return w, h, d


def _knots(u: Tensor, low: Tensor, high: Tensor, minimum: float) -> Tensor:
    sizes = minimum + (1 - minimum * u.shape[-1]) * torch.softmax(u, -1)
    return torch.cat([low, low + (high - low) * sizes.cumsum(-1)[..., :-1], high], -1)


def _softplus(u: Tensor) -> Tensor:
    return -F.logsigmoid(-u)  # F.softplus turns linear at 20, an error of 2e-9


def _own_knots(
    u: Tensor, begin: Tensor, interval: float, least: float, clamped: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(knots, the interval's size) of bins that are not shares of an interval, but make it up."""
    default = interval / u.shape[-1] - least
    u = least + _softplus(u + default + math.log(-math.expm1(-default)))
    total = u.sum(-1, keepdim=True)
    size = clamped(total)
    begin = begin * (size / total)
    return torch.cat([begin, begin + size * (u / total).cumsum(-1)[..., :-1], begin + size], -1), size


def _freia(
    w: Tensor, h: Tensor, d: Tensor, tails: int, ends: tuple[float, ...], least: tuple[float, float, float],
    edge: float, clamp: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(knots along x, along y, derivatives) where the parameters say how large the interval is."""
    left, right, bottom, top = ends

    def clamped(size: Tensor) -> Tensor:
        return clamp * torch.tanh(size / clamp) if clamp else size

    if tails == _RESIZED:
        size = clamped((right - left) * _softplus(d[..., :1] + math.log(math.expm1(1))))
        knots_x, knots_y = (_knots(u, -0.5 * size, 0.5 * size, 0) for u in (w, h))
        slope, d = torch.ones_like(size), d[..., 1:]
    else:
        knots_x, width = _own_knots(w, left + d[..., 1:2], right - left, least[0], clamped)
        knots_y, height = _own_knots(h, bottom + d[..., :1], top - bottom, least[1], clamped)
        slope, d = height / width, d[..., 2:]
    return knots_x, knots_y, torch.cat([slope, least[2] + _softplus(d + edge), slope], -1)


def _reference(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    bound: Tensor | None,
    circular: Tensor | None,
    mask: Tensor | None,
    bins: int,
    layout: int,
    start: int,
    step: int,
    convention: int,
    tails: int,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_bin_width: float,
    min_bin_height: float,
    min_derivative: float,
    edge: float,
    clip: float,
    scale: float,
    inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor]:
    """The definition, in the operator's own arguments."""
    dtype, compute = x.dtype, logdet_dtype(x.dtype)
    x = x.to(compute)
    dim = x.dim() - event_dim
    per = 3 * bins + _DERIVATIVES[tails]
    w, h, d = (t.to(compute) for t in _unpack(widths, heights, derivatives, bins, per, layout, dim))
    whole = event_dim == 0 or w.shape[dim] == x.shape[dim]
    end = 0 if whole else start + (w.shape[dim] - 1) * step + 1
    part = x if whole else x[(slice(None),) * dim + (slice(start, end, step),)]
    if mask is not None:  # zero parameters first: an inf there must not reach the gradient as NaN
        w, h, d = (torch.where(mask.unsqueeze(-1), t, 0) for t in (w, h, d))

    def ends(low: float, high: float) -> tuple[Tensor, Tensor]:
        if bound is not None:
            return (-bound).expand(part.shape).unsqueeze(-1), bound.expand(part.shape).unsqueeze(-1)
        shape = (*part.shape, 1)
        return part.new_full(shape, low), part.new_full(shape, high)

    w, h = scale * w, scale * h
    if convention == 1:
        w, h, d = w / (1 + torch.abs(2 * w / clip)), h / (1 + torch.abs(2 * h / clip)), d / (1 + torch.abs(d / clip))
    elif convention == 2:
        h = w + h / 1000
    if tails == 1:
        d = F.pad(d, (1, 1), value=edge)
    elif tails == 2:
        d = torch.cat([d, d[..., :1]], -1)
    elif circular is not None:
        outer = torch.where(circular, d[..., 0], edge).unsqueeze(-1)
        d = torch.cat([outer, d[..., 1:-1], outer], -1)
    v = part.unsqueeze(-1)
    if convention == 3:
        if mask is not None:  # its tails depend on the parameters
            v = torch.where(mask.unsqueeze(-1), v, 0)
        least = min_bin_width, min_bin_height, min_derivative
        knots_x, knots_y, d = _freia(w, h, d, tails, (left, right, bottom, top), least, edge, clip)
    else:
        d = torch.exp(d) if convention == 1 else min_derivative + _softplus(edge + d / 1000 if convention == 2 else d)
        (low_x, high_x), (low_y, high_y) = ends(left, right), ends(bottom, top)
        knots_x, knots_y = _knots(w, low_x, high_x, min_bin_width), _knots(h, low_y, high_y, min_bin_height)
    searched, others = (knots_y, knots_x) if inverse else (knots_x, knots_y)
    outside, outside_logdet = v, torch.zeros_like(v)
    if tails == _AFFINE:
        beyond, slope = v > searched[..., -1:], d[..., :1]
        to, of = (torch.where(beyond, k[..., -1:], k[..., :1]) for k in (others, searched))
        outside = to + (v - of) * (1 / slope if inverse else slope)
        outside_logdet = -slope.log() if inverse else slope.log()
    inside = (v >= searched[..., :1]) & (v <= searched[..., -1:])
    v = torch.where(inside, v, searched[..., :1])  # before the maths: no NaN gradient from outside
    k = (v >= searched[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1 = knots_x.gather(-1, k), knots_x.gather(-1, k + 1)
    y0, y1 = knots_y.gather(-1, k), knots_y.gather(-1, k + 1)
    width, height = x1 - x0, y1 - y0
    ratio = width / height
    a, b = ratio * d.gather(-1, k), ratio * d.gather(-1, k + 1)  # derivatives in units of the bin's slope

    # Every sum below is of positive terms, but for p: nothing cancels, and the discriminant is never negative.
    if inverse:
        eta, zeta = (v - y0) / height, (y1 - v) / height
        p = a * zeta - b * eta
        positive = p >= 0
        root = torch.sqrt(p * p + 4 * eta * zeta) + torch.where(positive, p, -p)
        theta = torch.where(positive, 2 * eta / (2 * eta + root), root / (root + 2 * zeta))
        phi = torch.where(positive, root / (2 * eta + root), 2 * zeta / (root + 2 * zeta))
    else:
        theta, phi = (v - x0) / width, (x1 - v) / width
    m = theta * theta + phi * phi + (a + b) * theta * phi
    logdet = torch.log((b * theta * theta + 2 * theta * phi + a * phi * phi) / ratio) - 2 * torch.log(m)
    if inverse:
        y, logdet = torch.where(theta < phi, x0 + width * theta, x1 - width * phi), -logdet
    else:
        n_low, n_high = theta * (theta + a * phi), phi * (phi + b * theta)
        y = torch.where(n_low < n_high, y0 + height * (n_low / m), y1 - height * (n_high / m))
    if tails == 0:
        y, logdet = torch.where(inside, y, math.nan), torch.where(inside, logdet, math.nan)
    else:
        y, logdet = torch.where(inside, y, outside), torch.where(inside, logdet, outside_logdet)
    y, logdet = y.squeeze(-1), logdet.squeeze(-1)
    if mask is not None:
        y, logdet = torch.where(mask, y, part), torch.where(mask, logdet, 0)
    if not whole:
        y = torch.slice_scatter(x, y, dim, start, end, step)
    if event_dim:
        logdet = logdet.flatten(dim).sum(-1)
    return y.to(dtype), logdet


def rational_quadratic_spline_reference(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    bound: float | tuple[float, ...] | Tensor = 3.0,
    tails: Tails | Sequence[Tails] | None = "linear",
    inverse: bool = False,
    min_bin_width: float | None = None,
    min_bin_height: float | None = None,
    min_derivative: float | None = None,
    convention: Convention = "nflows",
    scale: float = 1.0,
    domain_clamp: float | None = None,
    event_dim: int = 1,
    layout: Layout | None = None,
    bins: int | None = None,
    part: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`rational_quadratic_spline`, with the same arguments."""
    return _reference(
        *_arguments(
            x, widths, heights, derivatives, bound, tails, inverse, min_bin_width, min_bin_height, min_derivative,
            convention, scale, domain_clamp, event_dim, layout, bins, part, mask,
        )
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- function
def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None = None,
    derivatives: Tensor | None = None,
    *,
    bound: float | tuple[float, ...] | Tensor = 3.0,
    tails: Tails | Sequence[Tails] | None = "linear",
    inverse: bool = False,
    min_bin_width: float | None = None,
    min_bin_height: float | None = None,
    min_derivative: float | None = None,
    convention: Convention = "nflows",
    scale: float = 1.0,
    domain_clamp: float | None = None,
    event_dim: int = 1,
    layout: Layout | None = None,
    bins: int | None = None,
    part: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Monotonic spline of K bins through every element, and the log-determinant of the map.

    In the bin :math:`[x_k, x_{k+1}] \to [y_k, y_{k+1}]` of slope :math:`s`, with derivatives
    :math:`d_k, d_{k+1}` at its knots and :math:`\theta = (x - x_k) / (x_{k+1} - x_k)`,

    .. math:: y = y_k + (y_{k+1} - y_k)
        \frac{s\theta^2 + d_k\theta(1-\theta)}{s + (d_k + d_{k+1} - 2s)\,\theta(1-\theta)}
        \qquad \log|\det| = \sum_{event} \log\frac{\partial y}{\partial x}

    Parameters come unconstrained, as a conditioner gives them: softmax, softplus, cumulative sums and the search for
    the bin are one pass over memory, and so is the backward; nothing is kept but the inputs. Forward and inverse are
    sums of positive terms: no cancellation, no negative discriminant. Gradients outside the spline are those of the
    tails, never NaN.

    Args:
        x: ``(*batch, *event)``, float64, float32, bfloat16 or float16, any strides.
        widths: ``(*x.shape, K)`` or broadcastable to it, K from 2 to 64; or the packed parameters when ``layout`` is
            given: widths, heights and derivatives of an element in this order.
        heights: as widths.
        derivatives: ``(*x.shape, K - 1)`` for linear tails (inner knots), ``(…, K)`` for circular ones (the last knot
            has the first's), ``(…, K + 1)`` without tails. Of ``"freia"`` the inner knots' after what says where the
            interval lies: its size (linear tails), or bottom and left (affine ones).
        bound: B: the spline maps [-B, B] to itself. A tensor broadcastable to the event shape gives one for each
            feature; ``(left, right)`` another interval, ``(left, right, bottom, top)`` different ones for x and y (only
            without tails or with affine ones). Of ``"freia"`` the interval that parameters of zero give.
        tails: outside of the interval ``"linear"`` is the identity, to which the outer derivatives of 1 fit;
            ``"circular"`` has equal derivatives at both ends, for angles; None takes no x outside. A sequence of
            ``"linear"`` and ``"circular"``, one for each channel, reads K + 1 derivatives and ignores what it
            does not need. ``"affine"``, of ``"freia"`` alone, goes on in a line of slope height / width, which the
            outer derivatives are.
        inverse: apply the inverse map and return its log-determinant.
        min_bin_width, min_bin_height: least bin sizes as fractions of the interval; default 1e-3 (zuko: 0). Of
            ``"freia"`` sizes as they are, before the clamp: 0.1 with affine tails, none with linear ones.
        min_derivative: least derivative at a knot; default 1e-3 (torchflows: 1e-5, freia: 0). With ``"zuko"`` its
            ``slope``.
        convention: how parameters become bins.

            ================  =======================================  =========================================
            ``"nflows"``      softmax(w), softmax(h), softplus(d)      nflows, normflows
            ``"zuko"``        softmax and exp of w, h, d soft-clipped  zuko, where u/(1+abs(u/c)) has c = -log slope
                                                                       for d and half that for w and h
            ``"torchflows"``  softmax(w), softmax(w + h/1000),         torchflows
                              softplus(c + d/1000)
            ``"freia"``       min + softplus(c + w), likewise of   FrEIA's ``RationalQuadraticSpline``, where the
                              h, from ``left + l`` and ``bottom    interval's size and place are the network's too;
                              + b`` on; softplus(c + d). With      linear tails are its ``identity_tails``, with
                              linear tails softmax(w) and          ``bound`` its ``default_domain``; packed it gives
                              softmax(h) of an interval around 0,  w, h, then b and l or t, then d
                              (right - left) softplus(c + t)
                              wide
            ================  =======================================  =========================================
        scale: factor on widths and heights before the softmax: nflows' couplings divide by the root of their hidden
            features.
        domain_clamp: of ``"freia"``: the interval's sizes s become ``domain_clamp * tanh(s / domain_clamp)``.
        event_dim: how many trailing dimensions of x the log-determinant sums: 1 for vectors, 3 for ``(C, H, W)``
            images, 0 for the elementwise log-derivative.
        layout: read a conditioner's packed output of P = 3K - 1 (3K, 3K + 1) parameters an element in place, forward
            and backward. ``"last"``: ``(*x.shape, P)`` (zuko, torchflows). ``"channels"``: P for each of x's channels
            in turn on the channel dimension ``-event_dim``, ``(*batch, D P)`` or ``(*batch, C P, H, W)`` (nflows,
            normflows).
        bins: K, needed for layout ``"channels"`` with ``part``, else read from the shape.
        part: ``(start, step)``: transform channels ``start, start + step, …`` only, as many as the parameters have,
            and copy the others; a coupling layer's split, transform and merge in one pass.
        mask: bool, broadcastable to the event shape: True is transformed, False copied. Parameters under False are
            ignored and get zero gradient.

    Returns:
        ``(y, logdet)``: y of x's shape and dtype, logdet of the batch's shape, in float32 for 16-bit inputs.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or, without tails, an x outside of the interval
            (NaN where a compiled graph cannot raise).
        TypeError: an argument that is no floating-point tensor.

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019. Rezende et al., *Normalizing Flows on Tori
        and Spheres*, 2020 (circular).

    Example:
        >>> import torch, pyflowgen
        >>> x, params = torch.randn(5, 3), torch.randn(5, 3, 23)  # 8 bins
        >>> y, logdet = pyflowgen.rational_quadratic_spline(x, params, layout="last")
        >>> back, minus = pyflowgen.rational_quadratic_spline(y, params, layout="last", inverse=True)
        >>> torch.allclose(back, x, atol=1e-3), torch.allclose(minus, -logdet, atol=1e-3)
        (True, True)
    """
    args = _arguments(
        x, widths, heights, derivatives, bound, tails, inverse, min_bin_width, min_bin_height, min_derivative,
        convention, scale, domain_clamp, event_dim, layout, bins, part, mask,
    )  # fmt: skip
    tensors = args[:4]
    if not _native.use_kernel("rational_quadratic_spline", args[0]):
        return _reference(*args)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y, logdet = _apply(*tensors, args[4:])
        return y, logdet
    y, logdet = torch.ops.pyflowgen.rational_quadratic_spline(*args)
    return y, logdet


def _interval(bound: float | tuple[float, ...] | Tensor) -> tuple[float, float, float, float]:
    """(left, right, bottom, top); of a tensor -1 and 1."""
    ends: tuple[float, ...]
    if isinstance(bound, Tensor):
        ends = (-1.0, 1.0)
    elif isinstance(bound, tuple):
        ends = tuple(float(e) for e in bound)
    else:
        ends = (-float(bound), float(bound))
    if len(ends) == 2:
        ends = ends * 2
    if len(ends) != 4 or not (ends[0] < ends[1] and ends[2] < ends[3]):
        raise ValueError(f"bound must be positive, (left, right) or (left, right, bottom, top), got {bound}")
    return ends[0], ends[1], ends[2], ends[3]


def _tails_code(tails: str | Sequence[str] | None, convention: str) -> int:
    if tails is not None and not isinstance(tails, str):
        return 3
    return _RESIZED if (tails, convention) == ("linear", "freia") else _TAILS.index(tails)


def _check_options(
    bound: float | tuple[float, ...] | Tensor,
    tails: str | Sequence[str] | None,
    minima: tuple[float | None, float | None, float | None],
    convention: str,
    scale: float,
    layout: str | None,
    domain_clamp: float | None = None,
) -> tuple[int, tuple[float, ...], float, float]:
    """Check what is no tensor; returns (tails' code, interval and minima, edge, clip)."""
    if convention not in _CONVENTIONS:
        raise ValueError(f"convention must be one of {_CONVENTIONS}, got {convention!r}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}")
    freia, mixed = convention == "freia", tails is not None and not isinstance(tails, str)
    if freia != (tails == "affine") and not (freia and tails == "linear"):
        raise ValueError(
            f"tails is {tails!r} and convention {convention!r}: 'freia' has 'linear' or 'affine' tails, "
            "and no other has 'affine' ones"
        )
    if any(t not in _TAILS[1:3] for t in (tails if mixed and tails else (tails,) if tails and not freia else ())):
        raise ValueError(f"tails must be 'linear', 'circular', None or a sequence of the first two, got {tails!r}")
    left, right, bottom, top = _interval(bound)
    if tails not in (None, "affine") and (left, right) != (bottom, top):
        raise ValueError(f"bound={bound}: different intervals for x and y are only for tails None and 'affine'")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if domain_clamp is not None and not (freia and domain_clamp > 0):
        raise ValueError(f"domain_clamp must be positive and is for convention='freia', got {domain_clamp}")
    if freia and (isinstance(bound, Tensor) or scale != 1):
        raise ValueError("convention='freia' has numbers for a bound and scale=1")
    least, slope = _MINIMA[convention]
    if freia and tails == "linear":
        if minima[0] or minima[1]:
            raise ValueError("min_bin_width and min_bin_height of convention='freia' are for tails='affine'")
        least = 0.0
    width, height, derivative = (
        d if m is None else float(m) for m, d in zip(minima, (least, least, slope), strict=True)
    )
    if min(width, height, derivative) < 0 or derivative >= 1:
        raise ValueError(
            "min_bin_width, min_bin_height and min_derivative must not be negative and the last be below 1, "
            f"got {width}, {height}, {derivative}"
        )
    clip = float(domain_clamp or 0)
    if convention == "zuko":
        if derivative == 0:
            raise ValueError("convention='zuko' needs a positive min_derivative")
        clip, edge, derivative = -math.log(derivative), 0.0, 0.0
    else:
        edge = math.log(math.expm1(1 - derivative))
    return _tails_code(tails, convention), (left, right, bottom, top, width, height, derivative), edge, clip


def _arguments(
    x: Tensor,
    widths: Tensor,
    heights: Tensor | None,
    derivatives: Tensor | None,
    bound: float | tuple[float, ...] | Tensor,
    tails: str | Sequence[str] | None,
    inverse: bool,
    min_bin_width: float | None,
    min_bin_height: float | None,
    min_derivative: float | None,
    convention: str,
    scale: float,
    domain_clamp: float | None,
    event_dim: int,
    layout: str | None,
    bins: int | None,
    part: tuple[int, int] | None,
    mask: Tensor | None,
) -> tuple[Any, ...]:
    """Check everything once and return the operator's arguments; nothing is changed before all is known to fit."""
    if not (isinstance(x, Tensor) and isinstance(widths, Tensor)):
        raise TypeError(f"x and widths must be tensors, got {type(x).__name__} and {type(widths).__name__}")
    if not 0 <= event_dim <= x.dim():
        raise ValueError(f"event_dim must be between 0 and x's {x.dim()} dimensions, got {event_dim}")
    minima = min_bin_width, min_bin_height, min_derivative
    code_tails, floats, edge, clip = _check_options(bound, tails, minima, convention, scale, layout, domain_clamp)
    if (heights is None) != (derivatives is None) or (heights is None) != (layout is not None):
        raise ValueError("give widths, heights and derivatives and no layout, or packed parameters and their layout")
    if torch.is_autocast_enabled(x.device.type):  # a log-determinant is not for half precision
        x, widths = x.float(), widths.float()
        heights = None if heights is None else heights.float()
        derivatives = None if derivatives is None else derivatives.float()
    check_tensors(x=x, widths=widths, heights=heights, derivatives=derivatives)

    code, dim, more = _LAYOUTS.index(layout), x.dim() - event_dim, _DERIVATIVES[code_tails]
    if event_dim == 0 and (code == 2 or part is not None):
        raise ValueError("event_dim=0 has no channel dimension: layout must be None or 'last', and part None")
    # K, and how many channels are transformed: the parameters' word.
    shape, channel = tuple(widths.shape), widths.dim() - event_dim - (code != 2)
    has_channel = event_dim > 0 and channel >= 0
    count = shape[channel] if has_channel else 1
    if code == 2:
        if bins is None and part is not None:
            raise ValueError("bins must be given: layout='channels' with part does not tell it")
        per = 3 * bins + more if bins is not None else (count // max(x.shape[dim], 1) if has_channel else 0)
        count = count // per if per > 0 else 0
    else:
        per = shape[-1] if shape else 0
    found = per if code == 0 else (per - more) // 3
    if code and (per - more) % 3:
        raise ValueError(
            f"widths has shape {shape}, expected 3 K{more:+} parameters an element: "
            f"packed in layout {layout!r} for tails={tails!r} of x, shape {tuple(x.shape)}".replace("K+0", "K")
        )
    if bins is not None and bins != found:
        raise ValueError(f"bins is {bins}, but widths, shape {shape}, has {found}")
    bins = found
    if not 2 <= bins <= _MAX_BINS:
        raise ValueError(f"bins must be from 2 to {_MAX_BINS}, got {bins} from widths of shape {shape}")
    for i, name in enumerate(("min_bin_width", "min_bin_height")):
        least, most = floats[4 + i], (floats[2 * i + 1] - floats[2 * i]) / bins if code_tails == _AFFINE else 1 / bins
        if least > most or (code_tails == _AFFINE and least == most):
            raise ValueError(f"{name} is {least}, too large for {bins} bins: expected at most {most}")

    target = list(x.shape)
    start, step = (0, 1) if part is None else part
    if part is not None:
        if not has_channel or start < 0 or step < 1 or count < 1 or start + (count - 1) * step >= x.shape[dim]:
            raise ValueError(
                f"part=(start={start}, step={step}) with {count} channels of parameters does not fit "
                f"the {x.shape[dim]} channels of x, shape {tuple(x.shape)}"
            )
        target[dim] = count
    if code == 0:
        expanded = []
        given = (("widths", widths, bins), ("heights", heights, bins), ("derivatives", derivatives, bins + more))
        for name, tensor, size in given:
            assert tensor is not None
            try:
                expanded.append(tensor.expand(*target, size))
            except RuntimeError:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {(*target, size)} or broadcastable to it"
                ) from None
        widths, heights, derivatives = expanded
    else:
        expected = list(target)
        if code == 1:
            expected.append(3 * bins + more)
        else:
            expected[dim] *= 3 * bins + more
        if list(shape) != expected:
            raise ValueError(
                f"widths has shape {shape}, expected {tuple(expected)}: the packed parameters of {bins} bins of x, "
                f"shape {tuple(x.shape)}, in layout {layout!r}"
            )
    mask = expand_mask(mask, x, dim, part)

    event, circular, bounds = target[dim:], None, None
    if isinstance(bound, Tensor):
        if not bound.is_floating_point() or bound.requires_grad or bound.device != x.device:
            raise ValueError(f"bound must be a floating-point tensor on {x.device} that requires no gradient")
        try:
            bounds = bound.to(logdet_dtype(x.dtype)).expand(event)
        except RuntimeError:
            raise ValueError(
                f"bound has shape {tuple(bound.shape)}, expected {tuple(event)} or broadcastable to it"
            ) from None
    if code_tails == 3:
        assert tails is not None
        if not event or len(tails) != event[0]:
            raise ValueError(f"tails has {len(tails)} entries, expected one for each of the {event[:1]} channels")
        circular = torch.tensor([t == "circular" for t in tails], device=x.device)
        circular = circular.view(-1, *(1,) * (event_dim - 1)).expand(event)
    if code_tails == 0 and not _native.tracing():
        moved = x if part is None else x[(slice(None),) * dim + (slice(start, start + (count - 1) * step + 1, step),)]
        low, high = (-bounds, bounds) if bounds is not None else (floats[2], floats[3]) if inverse else floats[:2]
        outside = (moved < low) | (moved > high)
        outside = outside if mask is None else outside & mask
        if outside.any():
            raise ValueError(
                f"x has {int(outside.sum())} elements outside of the interval from {low} to {high}: "
                "tails=None takes none (expected tails='linear'?)"
            )
    return (
        x, widths, heights, derivatives, bounds, circular, mask, bins, code, start, step,
        _CONVENTIONS.index(convention), code_tails, *floats, edge, clip, float(scale), bool(inverse), event_dim,
    )  # fmt: skip


class _RationalQuadraticSpline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, widths, heights, derivatives, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, widths, heights, derivatives, *options[:3])
        ctx.options = options[3:]
        ctx.set_materialize_grads(False)
        return torch.ops.pyflowgen.rational_quadratic_spline(x, widths, heights, derivatives, *options)

    @staticmethod
    def backward(ctx, dy, dlogdet):  # type: ignore[no-untyped-def]
        tensors, rest = ctx.saved_tensors[:4], (*ctx.saved_tensors[4:], *ctx.options)
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            return *reference_gradients(_reference, tensors, ctx.needs_input_grad, rest, (dy, dlogdet)), None
        grads = torch.ops.pyflowgen.rational_quadratic_spline_backward(dy, dlogdet, *tensors, *rest)
        return *(None if t is None else g for t, g in zip(tensors, grads, strict=True)), None


_apply = _native.applier(_RationalQuadraticSpline)


# ------------------------------------------------------------------------------------------------------ layers
class SplineCoupling(Coupling):
    r"""Spline coupling layer of neural spline flows: one part of x goes through splines whose bins the other gives.

    .. math:: y_a = x_a \qquad y_b = \mathrm{RQS}(x_b;\; \mathrm{conditioner}(x_a))
        \qquad \log|\det| = \sum \log\frac{\partial y_b}{\partial x_b}

    Args:
        conditioner: module giving ``SplineCoupling.params_per_element(bins, tails, convention)`` parameters for every
            element to be transformed, packed as ``layout`` says; called with the part that stays, and with the context
            when there is one. With a checkerboard or a tensor for a mask it is given all of x with zeros in the
            transformed places, and gives parameters for all.
        bins: K.
        mask, swap: as in :class:`AffineCoupling`.
        bound, tails, min_bin_width, min_bin_height, min_derivative, convention, scale, domain_clamp: as in
            :func:`rational_quadratic_spline`; a tensor of bounds and a sequence of tails are for the channels that are
            transformed.
        event_dim: 1 for vectors, 3 for images ``(C, H, W)``.
        layout: ``"channels"``, all on the channel dimension as a plain network gives it, or ``"last"``.

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Neural Spline Flows*, 2019.

    Example:
        >>> import torch, pyflowgen
        >>> outputs = 2 * pyflowgen.SplineCoupling.params_per_element(bins=8)
        >>> layer = pyflowgen.SplineCoupling(torch.nn.Linear(2, outputs), bins=8)
        >>> x = torch.randn(5, 4)
        >>> y, logdet = layer(x)
        >>> torch.equal(y[:, :2], x[:, :2]), torch.allclose(layer.inverse(y)[0], x, atol=1e-4), logdet.shape
        (True, True, torch.Size([5]))
    """

    bound: Any

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        bins: int = 8,
        mask: Mask | Tensor = "halves",
        swap: bool = False,
        bound: float | tuple[float, ...] | Tensor = 3.0,
        tails: Tails | Sequence[Tails] | None = "linear",
        min_bin_width: float | None = None,
        min_bin_height: float | None = None,
        min_derivative: float | None = None,
        convention: Convention = "nflows",
        scale: float = 1.0,
        domain_clamp: float | None = None,
        event_dim: int = 1,
        layout: Layout = "channels",
    ) -> None:
        super().__init__(conditioner, mask=mask, swap=swap, event_dim=event_dim)
        if layout is None:
            raise ValueError(f"{type(self).__name__}: layout is None, expected one of {_LAYOUTS[1:]}")
        minima = min_bin_width, min_bin_height, min_derivative
        _check_options(bound, tails, minima, convention, scale, layout, domain_clamp)
        self.bins, self.tails, self.convention, self.scale, self.layout = bins, tails, convention, scale, layout
        self.domain_clamp = domain_clamp
        self.min_bin_width, self.min_bin_height, self.min_derivative = min_bin_width, min_bin_height, min_derivative
        if isinstance(bound, Tensor):
            self.register_buffer("bound", bound)
        else:
            self.bound = bound

    @staticmethod
    def params_per_element(
        bins: int, tails: Tails | Sequence[Tails] | None = "linear", convention: Convention = "nflows"
    ) -> int:
        """How many parameters the conditioner gives for every transformed element."""
        return 3 * bins + _DERIVATIVES[_tails_code(tails, convention)]

    def _transform(
        self, x: Tensor, params: Tensor, part: tuple[int, int] | None, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(
            x, params, bound=self.bound, tails=self.tails, inverse=inverse, min_bin_width=self.min_bin_width,
            min_bin_height=self.min_bin_height, min_derivative=self.min_derivative, convention=self.convention,
            scale=self.scale, domain_clamp=self.domain_clamp, event_dim=self.event_dim, layout=self.layout,
            bins=self.bins, part=part, mask=mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, bins={self.bins}, bound={self.bound}, tails={self.tails!r}, "
            f"convention={self.convention!r}"
        )


# -------------------------------------------------------------------------------------------------------- fake
def _fake(x, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(x.shape[: x.dim() - args[-1]], dtype=logdet_dtype(x.dtype))


def _fake_backward(dy, dlogdet, x, widths, heights, derivatives, *rest):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(x),
        torch.empty_like(widths),
        *(x.new_empty(0) if t is None else torch.empty_like(t) for t in (heights, derivatives)),
    )


_native.register("rational_quadratic_spline", _fake)
_native.register("rational_quadratic_spline_backward", _fake_backward)
