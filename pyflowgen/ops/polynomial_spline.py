"""Monotonic splines of degree 1, 2 and 3: elementwise maps with their log-determinants.

In this order: reference, functions with their gradient, layer, fake.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen.bijection import logdet_dtype
from pyflowgen.coupling import Coupling, Mask, check_tensors, expand_mask, reference_gradients

Layout = Literal["last", "channels"]
Degree = Literal[1, 2, 3]

# The place in the tuple is the code that the operators take.
_LAYOUTS = ("last", "channels")
_TAILS = (None, "linear")
_MAX_BINS = 64
_LEAST_DENSITY = 1e-3  # of a quadratic spline's knot, before all are normalised


def _sizes(degree: int, bins: int, tails: str | None) -> tuple[int, ...]:
    """How many parameters an element has: heights; widths and densities; widths, heights and the outer derivatives."""
    return ((bins,), (bins, bins + (-1 if tails else 1)), (bins, bins, 2))[degree - 1]


# ---------------------------------------------------------------------------------------------------- reference
def _bin_sizes(u: Tensor, minimum: float) -> Tensor:
    return minimum + (1 - minimum * u.shape[-1]) * torch.softmax(u, -1)


def _bins(
    params: Tensor, degree: int, bins: int, tails: int, min_width: float, min_height: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(widths, heights, derivatives of the knots) of a map from [0, 1] to itself."""
    if degree == 1:
        heights = torch.softmax(scale * params, -1)
        return torch.full_like(heights, 1 / bins), heights, params.new_ones(()).expand(*params.shape[:-1], bins + 1)
    widths = _bin_sizes(scale * params[..., :bins], min_width)
    if degree == 2:
        # -logsigmoid(-u) is softplus; F.softplus turns linear at 20, an error of 2e-9
        d = _LEAST_DENSITY - F.logsigmoid(-scale * params[..., bins:])
        if tails:  # so that the outer densities come to about 1
            first, last = widths[..., 0] / 2, widths[..., -1] / 2
            inner = ((d[..., :-1] + d[..., 1:]) / 2 * widths[..., 1:-1]).sum(-1)
            outer = (first * d[..., 0] / 2 + last * d[..., -1] / 2 + inner) / (1 - first / 2 - last / 2)
            d = torch.cat([outer.unsqueeze(-1), d, outer.unsqueeze(-1)], -1)
        area = ((d[..., :-1] + d[..., 1:]) / 2 * widths).sum(-1, keepdim=True)
        d = min_height + (1 - min_height) * (d / area)
        return widths, (d[..., :-1] + d[..., 1:]) / 2 * widths, d
    heights = _bin_sizes(scale * params[..., bins : 2 * bins], min_height)
    slopes = heights / widths
    (w0, w1), (s0, s1) = ((t[..., :-1], t[..., 1:]) for t in (widths, slopes))
    limited = 2 * torch.minimum(torch.minimum(s0, s1), (w1 * s0 + w0 * s1) / (2 * (w0 + w1)))
    ends = 3 * torch.sigmoid(params[..., 2 * bins :]) * torch.stack([slopes[..., 0], slopes[..., -1]], -1)
    return widths, heights, torch.cat([ends[..., :1], limited, ends[..., 1:]], -1)


def _value(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The cubic from 0 to 1 on [0, 1] whose derivatives there are a and b, at most 3: a sum of positive terms."""
    phi = 1 - t
    return t * (a * phi * phi + (3 - b) * t * phi + t * t)


def _derivative(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    phi = 1 - t
    return a * phi * phi + 2 * (3 - a - b) * t * phi + b * t * t


def _solve(value: Tensor, a: Tensor, b: Tensor, degree: int) -> Tensor:
    """t of _value(t, a, b) = value."""
    if degree == 1:
        return value
    if degree == 2:  # a + b = 2; the root's argument is a sum of positive terms
        return 2 * value / (a + torch.sqrt(a * a * (1 - value) + b * b * value))
    with torch.no_grad():  # Newton's method kept in a bracket
        low, high = torch.zeros_like(value), torch.ones_like(value)
        t = value.detach()
        for _ in range(40):
            above = _value(t, a, b) - value
            low, high = torch.where(above <= 0, t, low), torch.where(above > 0, t, high)
            new = t - above / _derivative(t, a, b)
            t = torch.where((new >= low) & (new <= high), new, (low + high) / 2)
    t = t.detach()
    for _ in range(2):  # a step more for each order of derivatives
        t = t - (_value(t, a, b) - value) / _derivative(t, a, b)
    return t


def _reference(
    x: Tensor,
    params: Tensor,
    bound: Tensor | None,
    mask: Tensor | None,
    degree: int,
    bins: int,
    layout: int,
    start: int,
    step: int,
    tails: int,
    left: float,
    right: float,
    bottom: float,
    top: float,
    min_bin_width: float,
    min_bin_height: float,
    scale: float,
    inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor]:
    """The definition, in the operator's own arguments."""
    dtype, compute = x.dtype, logdet_dtype(x.dtype)
    x, params = x.to(compute), params.to(compute)
    dim = x.dim() - event_dim
    if layout == 1:
        params = params.unflatten(dim, (-1, sum(_sizes(degree, bins, _TAILS[tails])))).movedim(dim + 1, -1)
    whole = event_dim == 0 or params.shape[dim] == x.shape[dim]
    end = 0 if whole else start + (params.shape[dim] - 1) * step + 1
    part = x if whole else x[(slice(None),) * dim + (slice(start, end, step),)]
    if mask is not None:  # zero parameters first: an inf there must not reach the gradient as NaN
        params = torch.where(mask.unsqueeze(-1), params, 0)
    widths, heights, d = _bins(params, degree, bins, tails, min_bin_width, min_bin_height, scale)

    def knots(sizes: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
        """Knots and bin sizes from low to high, times the bound where there is one."""
        one = torch.ones_like(part) if bound is None else bound.expand(part.shape)
        first, last = (low * one).unsqueeze(-1), (high * one).unsqueeze(-1)
        return torch.cat([first, first + (last - first) * sizes.cumsum(-1)[..., :-1], last], -1), (last - first) * sizes

    (knots_x, widths), (knots_y, heights) = knots(widths, left, right), knots(heights, bottom, top)
    searched = knots_y if inverse else knots_x
    v = part.unsqueeze(-1)
    inside = (v >= searched[..., :1]) & (v <= searched[..., -1:])
    v = torch.where(inside, v, searched[..., :1])  # before the maths: no NaN gradient from outside
    k = (v >= searched[..., 1:-1]).sum(-1, keepdim=True)
    x0, x1, y0, y1 = (t.gather(-1, i) for t in (knots_x, knots_y) for i in (k, k + 1))
    slope, d0, d1 = (heights / widths).gather(-1, k), d.gather(-1, k), d.gather(-1, k + 1)
    # Positions fit to the knots; slopes come from the sizes, which do not lose in a narrow bin what the knots do.
    width, height = x1 - x0, y1 - y0
    if degree == 3:  # derivatives in units of the bin's slope
        unit = (knots_y[..., -1:] - knots_y[..., :1]) / (knots_x[..., -1:] - knots_x[..., :1]) / slope
        a, b = d0 * unit, d1 * unit
    else:
        a, b = 2 * d0 / (d0 + d1), 2 * d1 / (d0 + d1)
    # From the nearer end of the bin: what is small there is exact.
    low, high, size = (y0, y1, height) if inverse else (x0, x1, width)
    near = v - low <= high - v
    tiny = torch.finfo(compute).tiny  # two knots of a linear spline may be one
    t = torch.where(near, v - low, high - v) / size.clamp_min(tiny)
    a, b = torch.where(near, a, b), torch.where(near, b, a)
    if inverse:
        t = _solve(t, a, b, degree)
    logdet = torch.log(slope * _derivative(t, a, b))
    if inverse:
        y, logdet = torch.where(near, x0 + width * t, x1 - width * t), -logdet
    else:
        rise = height * _value(t, a, b)
        y = torch.where(near, y0 + rise, y1 - rise)
    if tails:
        y, logdet = torch.where(inside, y, part.unsqueeze(-1)), torch.where(inside, logdet, 0)
    else:
        y, logdet = torch.where(inside, y, math.nan), torch.where(inside, logdet, math.nan)
    y, logdet = y.squeeze(-1), logdet.squeeze(-1)
    if mask is not None:
        y, logdet = torch.where(mask, y, part), torch.where(mask, logdet, 0)
    if not whole:
        y = torch.slice_scatter(x, y, dim, start, end, step)
    if event_dim:
        logdet = logdet.flatten(dim).sum(-1)
    return y.to(dtype), logdet


def polynomial_spline_reference(
    x: Tensor,
    params: Tensor,
    *,
    degree: Degree,
    bound: float | tuple[float, ...] | Tensor = 3.0,
    tails: Literal["linear"] | None = "linear",
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    scale: float = 1.0,
    event_dim: int = 1,
    layout: Layout = "last",
    bins: int | None = None,
    part: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`polynomial_spline`, with the same arguments."""
    return _reference(
        *_arguments(
            x, params, degree, bound, tails, inverse, min_bin_width, min_bin_height, scale, event_dim, layout, bins,
            part, mask,
        )
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- functions
def polynomial_spline(
    x: Tensor,
    params: Tensor,
    *,
    degree: Degree,
    bound: float | tuple[float, ...] | Tensor = 3.0,
    tails: Literal["linear"] | None = "linear",
    inverse: bool = False,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    scale: float = 1.0,
    event_dim: int = 1,
    layout: Layout = "last",
    bins: int | None = None,
    part: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Monotonic spline of K bins and degree 1, 2 or 3 through every element, and the log-determinant of the map.

    In the bin :math:`[x_k, x_{k+1}] \to [y_k, y_{k+1}]` of slope :math:`s`, with derivatives :math:`d_k, d_{k+1}` at
    its knots, :math:`\theta = (x - x_k) / (x_{k+1} - x_k)` and :math:`\varphi = 1 - \theta`,

    .. math:: y = y_k + (y_{k+1} - y_k)\,\theta\,\bigl(\tfrac{d_k}{s}\varphi^2
        + (3 - \tfrac{d_{k+1}}{s})\,\theta\varphi + \theta^2\bigr)
        \qquad \log|\det| = \sum_{event} \log\frac{\partial y}{\partial x}

    ======  ===================================  ================================================================
    degree  an element's parameters              bins, as in nflows
    ======  ===================================  ================================================================
    1       K heights                            equal widths, softmax(heights); :math:`d = s`
    2       K widths, then K - 1 densities       softmax(widths); the derivative is linear between knots, there
            (K + 1 without tails)                softplus(density) + 1e-3 in units that make the spline end at
                                                 its corner; the outer ones of a spline with tails come of the
                                                 others and the outer widths, near 1
    3       K widths, K heights, 2 derivatives   softmax of widths and heights; inner knots have the limited
                                                 derivative of Steffen, the outer ones 3 sigmoid(d) s
    ======  ===================================  ================================================================

    Everything is one pass over memory, and so is the backward; nothing is kept but the inputs. Forward and inverse are
    sums of positive terms taken from the nearer end of the bin; the inverse of the cubic is Newton's method in a
    bracket, to rounding. Gradients outside the spline are those of the tails.

    Args:
        x: ``(*batch, *event)``, float64, float32, bfloat16 or float16, any strides.
        params: ``(*x.shape, P)`` or, with layout ``"channels"``, P for each of x's channels in turn on the channel
            dimension ``-event_dim``; P as in the table, K from 2 to 64.
        degree: 1, 2 or 3. :func:`linear_spline`, :func:`quadratic_spline` and :func:`cubic_spline` take the parameters
            by name.
        bound: B: the spline maps [-B, B] to itself. A tensor broadcastable to the event shape gives one for each
            feature; ``(left, right)`` another interval, ``(left, right, bottom, top)`` different ones for x and y (only
            without tails).
        tails: outside of the interval ``"linear"`` is the identity; None takes no x outside.
        inverse: apply the inverse map and return its log-determinant.
        min_bin_width, min_bin_height: least bin sizes as fractions of the interval; for degree 2 the second is the
            least density, for degree 1 there is none.
        scale: factor on widths and heights: nflows' couplings divide by the root of their hidden features.
        event_dim: how many trailing dimensions of x the log-determinant sums; 0 for the elementwise log-derivative.
        layout: ``"last"`` or ``"channels"``.
        bins: K, needed for layout ``"channels"`` with ``part``, else read from the shape.
        part: ``(start, step)``: transform channels ``start, start + step, …`` only, as many as the parameters have,
            and copy the others.
        mask: bool, broadcastable to the event shape: True is transformed, False copied. Parameters under False are
            ignored and get zero gradient.

    Returns:
        ``(y, logdet)``: y of x's shape and dtype, logdet of the batch's shape, in float32 for 16-bit inputs.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, or, without tails, an x outside of the interval
            (NaN where a compiled graph cannot raise).
        TypeError: an argument that is no floating-point tensor.

    References:
        Müller et al., *Neural Importance Sampling*, 2019 (degrees 1 and 2). Durkan et al., *Cubic-Spline Flows*, 2019.
        Steffen, *A simple method for monotonic interpolation in one dimension*, 1990.

    Example:
        >>> import torch, pyflowgen
        >>> x, params = torch.randn(5, 3), torch.randn(5, 3, 18)  # 8 bins
        >>> y, logdet = pyflowgen.polynomial_spline(x, params, degree=3)
        >>> back, minus = pyflowgen.polynomial_spline(y, params, degree=3, inverse=True)
        >>> torch.allclose(back, x, atol=1e-3), torch.allclose(minus, -logdet, atol=1e-3)
        (True, True)
    """
    args = _arguments(
        x, params, degree, bound, tails, inverse, min_bin_width, min_bin_height, scale, event_dim, layout, bins, part,
        mask,
    )  # fmt: skip
    if not _native.use_kernel("polynomial_spline", args[0]):
        return _reference(*args)
    if torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad):
        y, logdet = _apply(*args[:2], args[2:])
        return y, logdet
    y, logdet = torch.ops.pyflowgen.polynomial_spline(*args)
    return y, logdet


def _together(
    x: Tensor, degree: Degree, given: Sequence[tuple[str, Tensor | None]], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """One of the functions below: parameters by themselves are put side by side, packed ones left as they are."""
    names = [name for name, t in given if t is not None]
    if len(names) == 1:
        return polynomial_spline(x, given[0][1], degree=degree, **options)  # type: ignore[arg-type]
    if len(names) < len(given) or options.get("layout", "last") != "last":
        raise ValueError(
            f"give {', '.join(name for name, _ in given)} and no layout, or packed parameters and their layout"
        )
    tensors = [t for _, t in given if t is not None]
    check_tensors(x=x, **{name: t for name, t in given})
    target = list(x.shape)
    channel = tensors[0].dim() - 1 - options.get("event_dim", 1)
    if options.get("part") is not None and channel >= 0:
        target[x.dim() - options.get("event_dim", 1)] = tensors[0].shape[channel]
    try:
        packed = torch.cat([t.expand(*target, t.shape[-1]) for t in tensors], -1)
    except RuntimeError:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for (name, _), t in zip(given, tensors, strict=True))
        raise ValueError(f"{shapes}: expected shapes (*{tuple(target)}, …) or broadcastable to them") from None
    return polynomial_spline(x, packed, degree=degree, **options)


def linear_spline(x: Tensor, heights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Piecewise linear monotonic spline with K bins of equal width: :func:`polynomial_spline` of degree 1.

    Args:
        x: as there.
        heights: ``(*x.shape, K)``, or as ``layout`` says.
        options: as there, but for ``degree``.

    References:
        Müller et al., *Neural Importance Sampling*, 2019.

    Example:
        >>> import torch, pyflowgen
        >>> x, heights = torch.randn(5, 3), torch.randn(5, 3, 8)
        >>> y, logdet = pyflowgen.linear_spline(x, heights)
        >>> torch.allclose(pyflowgen.linear_spline(y, heights, inverse=True)[0], x, atol=1e-4)
        True
    """
    return polynomial_spline(x, heights, degree=1, **options)


def quadratic_spline(x: Tensor, widths: Tensor, heights: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Piecewise quadratic monotonic spline with K bins: :func:`polynomial_spline` of degree 2.

    Args:
        x: as there.
        widths: ``(*x.shape, K)`` or broadcastable to it; or the packed parameters, when heights are not given.
        heights: the densities at the knots, ``(*x.shape, K - 1)``, ``(…, K + 1)`` without tails.
        options: as there, but for ``degree``.

    References:
        Müller et al., *Neural Importance Sampling*, 2019.

    Example:
        >>> import torch, pyflowgen
        >>> x, widths, heights = torch.randn(5, 3), torch.randn(5, 3, 8), torch.randn(5, 3, 7)
        >>> y, logdet = pyflowgen.quadratic_spline(x, widths, heights)
        >>> torch.allclose(pyflowgen.quadratic_spline(y, widths, heights, inverse=True)[0], x, atol=1e-4)
        True
    """
    return _together(x, 2, (("widths", widths), ("heights", heights)), options)


def cubic_spline(
    x: Tensor, widths: Tensor, heights: Tensor | None = None, derivatives: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Piecewise cubic monotonic spline with K bins: :func:`polynomial_spline` of degree 3.

    Args:
        x: as there.
        widths: ``(*x.shape, K)`` or broadcastable to it; or the packed parameters, when the others are not given.
        heights: as widths.
        derivatives: ``(*x.shape, 2)``: those of the first and the last knot.
        options: as there, but for ``degree``.

    References:
        Durkan, Bekasov, Murray, Papamakarios, *Cubic-Spline Flows*, 2019.

    Example:
        >>> import torch, pyflowgen
        >>> x, widths, heights = torch.randn(5, 3), torch.randn(5, 3, 8), torch.randn(5, 3, 8)
        >>> y, logdet = pyflowgen.cubic_spline(x, widths, heights, torch.zeros(2))
        >>> torch.allclose(pyflowgen.cubic_spline(y, widths, heights, torch.zeros(2), inverse=True)[0], x, atol=1e-4)
        True
    """
    return _together(x, 3, (("widths", widths), ("heights", heights), ("derivatives", derivatives)), options)


def _check_options(
    degree: int,
    bound: float | tuple[float, ...] | Tensor,
    tails: str | None,
    minima: tuple[float, float],
    scale: float,
    layout: str,
) -> tuple[float, float, float, float]:
    """Check what is no tensor; returns (left, right, bottom, top), of a tensor of bounds -1 and 1."""
    if degree not in (1, 2, 3):
        raise ValueError(f"degree must be 1, 2 or 3, got {degree}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}")
    if tails not in _TAILS:
        raise ValueError(f"tails must be one of {_TAILS}, got {tails!r}")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if min(minima) < 0 or (degree == 2 and minima[1] >= 1):
        raise ValueError(f"min_bin_width and min_bin_height must not be negative nor too large, got {minima}")
    ends: tuple[float, ...]
    if isinstance(bound, Tensor):
        ends = (-1.0, 1.0)
    else:
        ends = tuple(float(e) for e in bound) if isinstance(bound, tuple) else (-float(bound), float(bound))
    ends = ends * 2 if len(ends) == 2 else ends
    if len(ends) != 4 or not (ends[0] < ends[1] and ends[2] < ends[3]):
        raise ValueError(f"bound must be positive, (left, right) or (left, right, bottom, top), got {bound}")
    if tails is not None and ends[:2] != ends[2:]:
        raise ValueError(f"bound={bound}: different intervals for x and y are only for tails=None")
    return ends[0], ends[1], ends[2], ends[3]


def _arguments(
    x: Tensor,
    params: Tensor,
    degree: int,
    bound: float | tuple[float, ...] | Tensor,
    tails: str | None,
    inverse: bool,
    min_bin_width: float,
    min_bin_height: float,
    scale: float,
    event_dim: int,
    layout: str,
    bins: int | None,
    part: tuple[int, int] | None,
    mask: Tensor | None,
) -> tuple[Any, ...]:
    """Check everything once and return the operator's arguments; nothing is changed before all is known to fit."""
    if not (isinstance(x, Tensor) and isinstance(params, Tensor)):
        raise TypeError(f"x and params must be tensors, got {type(x).__name__} and {type(params).__name__}")
    if not 0 <= event_dim <= x.dim():
        raise ValueError(f"event_dim must be between 0 and x's {x.dim()} dimensions, got {event_dim}")
    interval = _check_options(degree, bound, tails, (min_bin_width, min_bin_height), scale, layout)
    if torch.is_autocast_enabled(x.device.type):  # a log-determinant is not for half precision
        x, params = x.float(), params.float()
    check_tensors(x=x, params=params)
    code, dim, shape = _LAYOUTS.index(layout), x.dim() - event_dim, tuple(params.shape)
    if event_dim == 0 and (code == 1 or part is not None):
        raise ValueError("event_dim=0 has no channel dimension: layout must be 'last', and part None")
    channel = params.dim() - event_dim - (code == 0)
    has_channel = event_dim > 0 and channel >= 0
    count = shape[channel] if has_channel else 1
    if code == 1:
        if bins is None and part is not None:
            raise ValueError("bins must be given: layout='channels' with part does not tell it")
        per = (
            sum(_sizes(degree, bins, tails))
            if bins is not None
            else count // max(x.shape[dim], 1)
            if has_channel
            else 0
        )
        count = count // per if per > 0 else 0
    else:
        per = shape[-1] if shape else 0
    more = sum(_sizes(degree, 0, tails))
    each = min(degree, 2)
    if (per - more) % each:
        raise ValueError(
            f"params has shape {shape}, expected {each} K{more:+} parameters an element in layout {layout!r} for "
            f"degree={degree} and tails={tails!r} of x, shape {tuple(x.shape)}".replace("K+0", "K")
        )
    found = (per - more) // each
    if bins is not None and bins != found:
        raise ValueError(f"bins is {bins}, but params, shape {shape}, has {found}")
    bins = found
    if not 2 <= bins <= _MAX_BINS:
        raise ValueError(f"bins must be from 2 to {_MAX_BINS}, got {bins} from params of shape {shape}")
    checked = {1: (), 2: (("min_bin_width", min_bin_width),)}.get(
        degree, (("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height))
    )
    for name, least in checked:
        if least * bins > 1:
            raise ValueError(f"{name} is {least}, too large for {bins} bins: expected at most 1/{bins}")
    target = list(x.shape)
    start, step = (0, 1) if part is None else part
    if part is not None:
        if not has_channel or start < 0 or step < 1 or count < 1 or start + (count - 1) * step >= x.shape[dim]:
            raise ValueError(
                f"part=(start={start}, step={step}) with {count} channels of parameters does not fit "
                f"the {x.shape[dim]} channels of x, shape {tuple(x.shape)}"
            )
        target[dim] = count
    expected = list(target)
    if code == 0:
        expected.append(per)
        try:
            params = params.expand(expected)
        except RuntimeError:
            params = params.new_empty(0)
    else:
        expected[dim] *= per
    if list(params.shape) != expected:
        raise ValueError(
            f"params has shape {shape}, expected {tuple(expected)}: the parameters of {bins} bins of x, "
            f"shape {tuple(x.shape)}, in layout {layout!r}"
        )
    mask = expand_mask(mask, x, dim, part)
    event, bounds = target[dim:], None
    if isinstance(bound, Tensor):
        if not bound.is_floating_point() or bound.requires_grad or bound.device != x.device:
            raise ValueError(f"bound must be a floating-point tensor on {x.device} that requires no gradient")
        try:
            bounds = bound.to(logdet_dtype(x.dtype)).expand(event)
        except RuntimeError:
            raise ValueError(
                f"bound has shape {tuple(bound.shape)}, expected {tuple(event)} or broadcastable to it"
            ) from None
    if tails is None and not _native.tracing():
        moved = x if part is None else x[(slice(None),) * dim + (slice(start, start + (count - 1) * step + 1, step),)]
        low, high = (-bounds, bounds) if bounds is not None else interval[2:] if inverse else interval[:2]
        outside = (moved < low) | (moved > high)
        outside = outside if mask is None else outside & mask
        if outside.any():
            raise ValueError(
                f"x has {int(outside.sum())} elements outside of the interval from {low} to {high}: "
                "tails=None takes none (expected tails='linear'?)"
            )
    return (
        x, params, bounds, mask, degree, bins, code, start, step, _TAILS.index(tails), *interval,
        float(min_bin_width) if degree > 1 else 0.0, float(min_bin_height) if degree > 1 else 0.0, float(scale),
        bool(inverse), event_dim,
    )  # fmt: skip


class _PolynomialSpline(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, params, *options[:2])
        ctx.options = options[2:]
        ctx.set_materialize_grads(False)
        return torch.ops.pyflowgen.polynomial_spline(x, params, *options)

    @staticmethod
    def backward(ctx, dy, dlogdet):  # type: ignore[no-untyped-def]
        tensors, rest = ctx.saved_tensors[:2], (*ctx.saved_tensors[2:], *ctx.options)
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            return *reference_gradients(_reference, tensors, ctx.needs_input_grad, rest, (dy, dlogdet)), None
        return *torch.ops.pyflowgen.polynomial_spline_backward(dy, dlogdet, *tensors, *rest), None


_apply = _native.applier(_PolynomialSpline)


# ------------------------------------------------------------------------------------------------------- layer
class PolynomialSplineCoupling(Coupling):
    r"""Coupling layer whose second part goes through linear, quadratic or cubic splines, which the first part gives.

    Args:
        conditioner: module giving ``PolynomialSplineCoupling.params_per_element(bins, degree, tails)`` parameters for
            every element to be transformed, packed as ``layout`` says; see :class:`SplineCoupling`.
        degree: 1, 2 or 3.
        bins: K.
        mask, swap: as in :class:`AffineCoupling`.
        bound, tails, min_bin_width, min_bin_height, scale: as in :func:`polynomial_spline`.
        event_dim: 1 for vectors, 3 for images ``(C, H, W)``.
        layout: ``"channels"``, all on the channel dimension as a plain network gives it, or ``"last"``.

    References:
        Müller et al., *Neural Importance Sampling*, 2019. Durkan et al., *Cubic-Spline Flows*, 2019.

    Example:
        >>> import torch, pyflowgen
        >>> outputs = 2 * pyflowgen.PolynomialSplineCoupling.params_per_element(bins=8, degree=3)
        >>> layer = pyflowgen.PolynomialSplineCoupling(torch.nn.Linear(2, outputs), degree=3, bins=8)
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
        degree: Degree = 3,
        bins: int = 8,
        mask: Mask | Tensor = "halves",
        swap: bool = False,
        bound: float | tuple[float, ...] | Tensor = 3.0,
        tails: Literal["linear"] | None = "linear",
        min_bin_width: float = 1e-3,
        min_bin_height: float = 1e-3,
        scale: float = 1.0,
        event_dim: int = 1,
        layout: Layout = "channels",
    ) -> None:
        super().__init__(conditioner, mask=mask, swap=swap, event_dim=event_dim)
        _check_options(degree, bound, tails, (min_bin_width, min_bin_height), scale, layout)
        self.degree, self.bins, self.tails, self.scale, self.layout = degree, bins, tails, scale, layout
        self.min_bin_width, self.min_bin_height = min_bin_width, min_bin_height
        if isinstance(bound, Tensor):
            self.register_buffer("bound", bound)
        else:
            self.bound = bound

    @staticmethod
    def params_per_element(bins: int, degree: Degree, tails: Literal["linear"] | None = "linear") -> int:
        """How many parameters the conditioner gives for every transformed element."""
        return sum(_sizes(degree, bins, tails))

    def _transform(
        self, x: Tensor, params: Tensor, part: tuple[int, int] | None, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return polynomial_spline(
            x, params, degree=self.degree, bound=self.bound, tails=self.tails, inverse=inverse,
            min_bin_width=self.min_bin_width, min_bin_height=self.min_bin_height, scale=self.scale,
            event_dim=self.event_dim, layout=self.layout, bins=self.bins, part=part, mask=mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, degree={self.degree}, bins={self.bins}, bound={self.bound}, tails={self.tails!r}"
        )


# -------------------------------------------------------------------------------------------------------- fake
def _fake(x, *args):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), x.new_empty(x.shape[: x.dim() - args[-1]], dtype=logdet_dtype(x.dtype))


def _fake_backward(dy, dlogdet, x, params, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(params)


_native.register("polynomial_spline", _fake)
_native.register("polynomial_spline_backward", _fake_backward)
