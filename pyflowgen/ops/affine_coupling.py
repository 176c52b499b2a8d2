"""Affine and additive coupling: the elementwise map of NICE, RealNVP and Glow with its log-determinant.

In this order: reference, function with its gradient, layers, fake.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyflowgen import _native
from pyflowgen.coupling import Coupling, Mask, check_tensors, expand_mask, reference_gradients

Scale = Literal["exp", "tanh", "sigmoid", "sigmoid_eps", "softclip", "atan", "softplus"]
Order = Literal["scale_shift", "shift_scale"]
Layout = Literal["halves", "interleaved", "pairs", "halves_scale_first", "interleaved_scale_first", "pairs_scale_first"]

# The place in the tuple is the code that the operators take; 0 is the additive coupling and separate tensors.
_SCALES = ("additive", "exp", "tanh", "sigmoid", "sigmoid_eps", "softclip", "atan", "softplus")
_LAYOUTS = (
    None, "halves", "interleaved", "pairs", "halves_scale_first", "interleaved_scale_first", "pairs_scale_first",
)  # fmt: skip
_DEFAULT_CLAMP = {"tanh": 2.0, "atan": 2.0, "softclip": -math.log(1e-3)}
_ORDERS = ("scale_shift", "shift_scale")


# ---------------------------------------------------------------------------------------------------- reference
def _bounded_log_scale(s: Tensor, scale: str, clamp: float, gain: float) -> tuple[Tensor, Tensor]:
    """(a, l): the scale a = exp(l) and its logarithm l for the unconstrained ``s``."""
    if gain != 1:
        s = s * gain
    if scale == "sigmoid":
        return torch.sigmoid(s + 2), F.logsigmoid(s + 2)
    if scale == "sigmoid_eps":
        a = torch.sigmoid(s + 2) + 1e-3
        return a, torch.log(a)
    if scale == "softplus":
        a = -F.logsigmoid(-s) + 1e-3  # F.softplus turns linear at 20, an error of 2e-9
        return a, torch.log(a)
    if scale == "tanh":
        s = clamp * torch.tanh(s / clamp)
    elif scale == "softclip":
        s = s / (1 + torch.abs(s / clamp))
    elif scale == "atan":
        s = clamp * 0.636 * torch.atan(s)
    return torch.exp(s), s


def _unpack(params: Tensor, log_scale: Tensor | None, layout: int, event_dim: int) -> tuple[Tensor, Tensor | None]:
    """(shift, log_scale) as views of a conditioner's packed output."""
    if layout == 0:
        return params, log_scale
    kind = (layout - 1) % 3
    if kind == 0:
        first, second = params.chunk(2, dim=-event_dim)
    elif kind == 1:
        before = (slice(None),) * (params.dim() - event_dim)
        first, second = params[(*before, slice(0, None, 2))], params[(*before, slice(1, None, 2))]
    else:
        first, second = params.unbind(-1)
    return (first, second) if layout <= 3 else (second, first)


def _reference(
    x: Tensor,
    params: Tensor,
    log_scale: Tensor | None,
    mask: Tensor | None,
    layout: int,
    start: int,
    step: int,
    scale: int,
    clamp: float,
    gain: float,
    shift_first: bool,
    inverse: bool,
    event_dim: int,
) -> tuple[Tensor, Tensor]:
    """The definition, in the operator's own arguments."""
    dtype = x.dtype
    if dtype in (torch.bfloat16, torch.float16):  # values and log-determinants in float32
        x, params = x.float(), params.float()
        log_scale = None if log_scale is None else log_scale.float()
    shift, s = _unpack(params, log_scale, layout, event_dim)
    dim = x.dim() - event_dim
    whole = event_dim == 0 or shift.shape[dim] == x.shape[dim]
    end = 0 if whole else start + (shift.shape[dim] - 1) * step + 1
    part = x if whole else x[(slice(None),) * dim + (slice(start, end, step),)]
    if mask is not None:  # zero parameters first: an inf there must not reach the gradient as NaN
        shift = torch.where(mask, shift, 0)
        s = None if s is None else torch.where(mask, s, 0)
    if s is None:
        y, logdet = (part - shift if inverse else part + shift), torch.zeros_like(part)
    else:
        a, logdet = _bounded_log_scale(s, _SCALES[scale], clamp, gain)
        if inverse:
            y = part / a - shift if shift_first else (part - shift) / a
            logdet = -logdet
        else:
            y = (part + shift) * a if shift_first else part * a + shift
    if mask is not None:
        y, logdet = torch.where(mask, y, part), torch.where(mask, logdet, 0)
    if not whole:
        y = torch.slice_scatter(x, y, dim, start, end, step)
    if event_dim:
        logdet = logdet.flatten(dim).sum(-1)
    return y.to(dtype), logdet


def affine_coupling_reference(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None = None,
    *,
    scale: Scale = "exp",
    clamp: float | None = None,
    gain: float = 1.0,
    order: Order = "scale_shift",
    inverse: bool = False,
    event_dim: int = 1,
    layout: Layout | None = None,
    part: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch definition of :func:`affine_coupling`, with the same arguments."""
    args = _arguments(x, shift, log_scale, scale, clamp, gain, order, inverse, event_dim, layout, part, mask)
    return _reference(*args)


# ----------------------------------------------------------------------------------------------------- function
def affine_coupling(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None = None,
    *,
    scale: Scale = "exp",
    clamp: float | None = None,
    gain: float = 1.0,
    order: Order = "scale_shift",
    inverse: bool = False,
    event_dim: int = 1,
    layout: Layout | None = None,
    part: tuple[int, int] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Scale and shift every element, and return the log-determinant of the map.

    .. math:: y = x\,e^{\ell(s)} + t \qquad \log|\det| = \sum_{event} \ell(s)

    with :math:`t` = ``shift`` and :math:`s` = ``log_scale``; ``log_scale=None`` is NICE's additive coupling
    :math:`y = x + t`. One pass over memory forward and one backward; nothing is kept but the inputs.

    Args:
        x: ``(*batch, *event)``, float64, float32, bfloat16 or float16, any strides.
        shift: t, of x's shape or broadcastable to it; or the packed parameters when ``layout`` is given.
        log_scale: s before the map ``scale``; as ``shift``. None with ``layout=None``: additive coupling.
        scale: the map from s to the log-scale ℓ:

            ================  =========================================  ===========================
            ``"exp"``         s                                          RealNVP
            ``"tanh"``        clamp·tanh(s/clamp)                        FrEIA's AllInOneBlock
            ``"sigmoid"``     log σ(s+2)                                 Glow, normflows
            ``"sigmoid_eps"`` log(σ(s+2) + 1e-3)                         nflows' coupling
            ``"softclip"``    s/(1+abs(s)/clamp)                         zuko, clamp = -log 1e-3
            ``"atan"``        clamp·0.636·atan(s)                        FrEIA's coupling blocks
            ``"softplus"``    log(softplus(s) + 1e-3)                    nflows' autoregressive flow
            ================  =========================================  ===========================
        clamp: bound of ``tanh``, ``atan`` (default 2) and ``softclip`` (default -log 1e-3); others take none.
        gain: what s is multiplied by before the map. FrEIA's ``tanh`` of an unscaled s has its clamp here, torchflows
            ½: its s is the logarithm of a squared scale.
        order: ``"scale_shift"`` as above, or Glow's ``"shift_scale"``, :math:`y = (x + t)\,e^{\ell}`.
        inverse: apply the inverse map and return its log-determinant, :math:`-\sum\ell`.
        event_dim: how many trailing dimensions the log-determinant sums: 1 for vectors, 3 for ``(C, H, W)`` images,
            0 for the elementwise log-derivative.
        layout: read a conditioner's packed output in place, without a copy, forward and backward. On the channel
            dimension ``-event_dim``, twice as large as the transformed part: ``"halves"`` ``[shift | log_scale]``
            (nflows) or ``"interleaved"`` ``shift, log_scale, shift, …`` (normflows, Glow). ``"pairs"``: one more
            last dimension of 2, ``(shift, log_scale)`` (zuko). With ``"_scale_first"`` behind the name the two change
            places: ``"halves_scale_first"`` is ``[log_scale | shift]`` (FrEIA), ``"pairs_scale_first"`` torchflows'.
        part: ``(start, step)``: transform channels ``start, start + step, …`` only, as many as the parameters have,
            and copy the others; a coupling layer's split, transform and merge in one pass.
        mask: bool, broadcastable to the event shape: True is transformed, False copied (checkerboards). Parameters
            under False are ignored and get zero gradient.

    Returns:
        ``(y, logdet)``: y of x's shape and dtype, logdet of the batch's shape, in float32 for 16-bit inputs.

    Raises:
        ValueError: a shape, dtype, device or option that does not fit, named with what was expected.
        TypeError: an argument that is no floating-point tensor.

    References:
        Dinh, Krueger, Bengio, *NICE*, 2014. Dinh, Sohl-Dickstein, Bengio, *Density estimation using Real NVP*, 2016.
        Kingma, Dhariwal, *Glow*, 2018.

    Example:
        >>> import torch, pyflowgen
        >>> x, params = torch.randn(8, 3), torch.randn(8, 6)
        >>> y, logdet = pyflowgen.affine_coupling(x, params, layout="halves")
        >>> back, minus = pyflowgen.affine_coupling(y, params, layout="halves", inverse=True)
        >>> torch.allclose(back, x, atol=1e-5), torch.allclose(minus, -logdet)
        (True, True)
    """
    options = _packed_options(x, shift, log_scale, scale, clamp, gain, order, inverse, event_dim, layout, part, mask)
    if options is not None:
        try:
            return _run(x, shift, None, None, options)
        except RuntimeError:  # the operator does not know its caller's words: say in them what does not fit
            _arguments(x, shift, log_scale, scale, clamp, gain, order, inverse, event_dim, layout, part, mask)
            raise
    args = _arguments(x, shift, log_scale, scale, clamp, gain, order, inverse, event_dim, layout, part, mask)
    if not _native.use_kernel("affine_coupling", args[0]):
        return _reference(*args)
    return _run(*args[:4], args[4:])


_Options = tuple[int, int, int, int, float, float, bool, bool, int]


def _run(
    x: Tensor, params: Tensor, log_scale: Tensor | None, mask: Tensor | None, options: _Options
) -> tuple[Tensor, Tensor]:
    """The operator, with its gradient where one is asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad or params.requires_grad or (log_scale is not None and log_scale.requires_grad)
    ):
        y, logdet = _apply(x, params, log_scale, mask, options)
    else:
        y, logdet = torch.ops.pyflowgen.affine_coupling(x, params, log_scale, mask, *options)
    return y, logdet


def _check_options(scale: str, clamp: float | None, order: str, layout: str | None, gain: float = 1.0) -> float:
    """Check the options that are no tensors; returns the clamp to use."""
    if not -math.inf < gain < math.inf:
        raise ValueError(f"gain must be a finite number, got {gain}")
    if order not in _ORDERS:
        raise ValueError(f"order must be one of {_ORDERS}, got {order!r}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {_LAYOUTS}, got {layout!r}")
    if scale not in _SCALES[1:]:
        raise ValueError(f"scale must be one of {_SCALES[1:]}, got {scale!r}")
    default = _DEFAULT_CLAMP.get(scale)
    if clamp is None:
        return default or 0.0
    if default is None:
        raise ValueError(f"scale={scale!r} takes no clamp")
    if not clamp > 0:
        raise ValueError(f"clamp must be positive, got {clamp}")
    return float(clamp)


_ON_CHANNELS, _PAIRS = (1, 2, 4, 5), (3, 6)  # of _LAYOUTS


@functools.lru_cache(maxsize=1024)
def _codes(
    scale: str, clamp: float | None, gain: float, order: str, layout: str | None
) -> tuple[int, int, float, float, bool]:
    """The options that are no tensors, checked, as the operator takes them."""
    clamp = _check_options(scale, clamp, order, layout, gain)
    return _LAYOUTS.index(layout), _SCALES.index(scale), clamp, gain, order == "shift_scale"


def _packed_options(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None,
    scale: str,
    clamp: float | None,
    gain: float,
    order: str,
    inverse: bool,
    event_dim: int,
    layout: str | None,
    part: tuple[int, int] | None,
    mask: Tensor | None,
) -> _Options | None:
    """The operator's options where its own checks are enough, as for most calls of a layer; else None.

    For a small batch the questions that `_arguments` asks of the tensors take as long as the kernel.
    """
    if layout is None or mask is not None or log_scale is not None or event_dim < 1 or torch.compiler.is_compiling():
        return None
    if not (isinstance(x, Tensor) and isinstance(shift, Tensor) and _native.use_kernel("affine_coupling", x)):
        return None
    code = _codes(scale, clamp, float(gain), order, layout)
    pairs = code[0] in _PAIRS
    last = event_dim + pairs
    if event_dim > x.dim() or last > shift.dim() or _native.autocast_active():
        return None
    count, (start, step) = shift.size(-last), part or (0, 1)
    if not pairs:
        count //= 2
    if count == 0 or (part is None and count != x.size(-event_dim)):  # the operator may be asked for less than all
        return None
    return code[0], start, step, *code[1:], bool(inverse), event_dim


def _arguments(
    x: Tensor,
    shift: Tensor,
    log_scale: Tensor | None,
    scale: str,
    clamp: float | None,
    gain: float,
    order: str,
    inverse: bool,
    event_dim: int,
    layout: str | None,
    part: tuple[int, int] | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int, int, int, float, float, bool, bool, int]:
    """Check everything once and return the operator's arguments; nothing is changed before all is known to fit."""
    if not (isinstance(x, Tensor) and isinstance(shift, Tensor)):
        raise TypeError(f"x and shift must be tensors, got {type(x).__name__} and {type(shift).__name__}")
    if not 0 <= event_dim <= x.dim():
        raise ValueError(f"event_dim must be between 0 and x's {x.dim()} dimensions, got {event_dim}")
    clamp = _check_options(scale, clamp, order, layout, gain)
    if layout is not None and log_scale is not None:
        raise ValueError(f"layout={layout!r} reads log_scale from shift: log_scale must be None")

    if torch.is_autocast_enabled(x.device.type):  # a log-determinant is not for half precision
        x, shift = x.float(), shift.float()
        log_scale = None if log_scale is None else log_scale.float()
    check_tensors(x=x, shift=shift, log_scale=log_scale)

    code = _LAYOUTS.index(layout)
    dim = x.dim() - event_dim
    if event_dim == 0 and (code in _ON_CHANNELS or part is not None):
        raise ValueError("event_dim=0 has no channel dimension: layout must be None or of pairs, and part None")
    target = list(x.shape)
    start, step = (0, 1) if part is None else part
    if part is not None:
        # How many channels are transformed is the parameters' word.
        count = shift.shape[dim] if shift.dim() > dim else 0
        if log_scale is not None and log_scale.dim() > dim:
            count = max(count, log_scale.shape[dim])
        if code in _ON_CHANNELS:
            count //= 2
        if start < 0 or step < 1 or count < 1 or start + (count - 1) * step >= x.shape[dim]:
            raise ValueError(
                f"part=(start={start}, step={step}) with {count} channels of parameters does not fit "
                f"the {x.shape[dim]} channels of x, shape {tuple(x.shape)}"
            )
        target[dim] = count
    if code == 0:
        for name, tensor in (("shift", shift), ("log_scale", log_scale)):
            if tensor is not None and tensor.shape != x.shape:
                try:
                    tensor = tensor.expand(target)
                except RuntimeError:
                    raise ValueError(
                        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(target)} or broadcastable to it"
                    ) from None
                if name == "shift":
                    shift = tensor
                else:
                    log_scale = tensor
    else:
        if code in _PAIRS:
            target.append(2)
        else:
            target[dim] *= 2
        if list(shift.shape) != target:
            raise ValueError(
                f"shift has shape {tuple(shift.shape)}, expected {tuple(target)}: "
                f"the packed parameters of x, shape {tuple(x.shape)}, in layout {layout!r}"
            )
    mask = expand_mask(mask, x, dim, part)
    code_scale = 0 if code == 0 and log_scale is None else _SCALES.index(scale)
    return (
        x, shift, log_scale, mask, code, start, step, code_scale, clamp, float(gain), order == "shift_scale",
        bool(inverse), event_dim,
    )  # fmt: skip


class _AffineCoupling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, log_scale, mask, options):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, params, log_scale, mask)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return torch.ops.pyflowgen.affine_coupling(x, params, log_scale, mask, *options)

    @staticmethod
    def backward(ctx, dy, dlogdet):  # type: ignore[no-untyped-def]
        x, params, log_scale, mask = ctx.saved_tensors
        _, start, step, scale, _, _, _, inverse, event_dim = ctx.options
        if scale == 0 and mask is None:  # y = x ± shift: the gradient is dy itself, and its own derivative
            if dy is None:
                return None, None, None, None, None
            dim = dy.dim() - event_dim
            dshift = -dy if inverse else dy
            if params.shape != dy.shape:
                end = start + (params.shape[dim] - 1) * step + 1
                dshift = dshift[(slice(None),) * dim + (slice(start, end, step),)]
            return dy, dshift, None, None, None
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself must be differentiable
            dx, dparams, dlog_scale = reference_gradients(
                _reference, (x, params, log_scale), ctx.needs_input_grad, (mask, *ctx.options), (dy, dlogdet)
            )
        else:
            dx, dparams, dlog_scale = torch.ops.pyflowgen.affine_coupling_backward(
                dy, dlogdet, x, params, log_scale, mask, *ctx.options
            )
        return dx, dparams, dlog_scale if log_scale is not None else None, None, None


_apply = _native.applier(_AffineCoupling)


# ------------------------------------------------------------------------------------------------------ layers
class AffineCoupling(Coupling):
    r"""Affine coupling layer: one part of x is scaled and shifted by functions of the other, which stays.

    .. math:: y_a = x_a \qquad y_b = x_b\,e^{\ell(s(x_a))} + t(x_a) \qquad \log|\det| = \sum \ell(s(x_a))

    Args:
        conditioner: module giving ``(t, s)`` packed on the channel dimension; called with the part that stays, and
            with the context when there is one. With a checkerboard or a tensor for a mask it is given all of x with
            zeros in the transformed places, and gives parameters for all.
        mask: which channels are transformed. ``"halves"`` (``"channel"`` is the same for images): the last half;
            ``"interleaved"``: 1, 3, 5, …; ``"checkerboard"``: pixels of odd row + column; or a bool tensor,
            broadcastable to the event shape, True where transformed.
        swap: transform the other part instead.
        scale, clamp, gain, order: as in :func:`affine_coupling`.
        event_dim: 1 for vectors, 3 for images ``(C, H, W)``.
        layout: how the conditioner packs its output, as in :func:`affine_coupling`.

    References:
        Dinh, Sohl-Dickstein, Bengio, *Density estimation using Real NVP*, 2016.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.AffineCoupling(torch.nn.Linear(2, 4), scale="tanh")
        >>> x = torch.randn(5, 4)
        >>> y, logdet = layer(x)
        >>> torch.equal(y[:, :2], x[:, :2]), torch.allclose(layer.inverse(y)[0], x, atol=1e-5), logdet.shape
        (True, True, torch.Size([5]))
    """

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: Mask | Tensor = "halves",
        swap: bool = False,
        scale: Scale = "exp",
        clamp: float | None = None,
        gain: float = 1.0,
        order: Order = "scale_shift",
        event_dim: int = 1,
        layout: Layout = "halves",
    ) -> None:
        super().__init__(conditioner, mask=mask, swap=swap, event_dim=event_dim)
        _check_options(scale, clamp, order, layout, gain)
        self.scale: Scale = scale
        self.clamp, self.gain, self.order, self.layout = clamp, gain, order, layout

    def _transform(
        self, x: Tensor, params: Tensor, part: tuple[int, int] | None, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return affine_coupling(
            x, params, scale=self.scale, clamp=self.clamp, gain=self.gain, order=self.order, inverse=inverse,
            event_dim=self.event_dim, layout=self.layout, part=part, mask=mask,
        )  # fmt: skip

    def extra_repr(self) -> str:
        gain = "" if self.gain == 1 else f", gain={self.gain}"
        return f"{super().extra_repr()}, scale={self.scale!r}, clamp={self.clamp}{gain}, order={self.order!r}"


class AdditiveCoupling(Coupling):
    r"""Additive coupling layer of NICE, :math:`y_a = x_a,\; y_b = x_b + t(x_a)`: volume is kept, ``logdet`` is 0.

    Args:
        conditioner: module giving t; called as in :class:`AffineCoupling`.
        mask, swap, event_dim: as in :class:`AffineCoupling`.

    References:
        Dinh, Krueger, Bengio, *NICE: Non-linear Independent Components Estimation*, 2014.

    Example:
        >>> import torch, pyflowgen
        >>> layer = pyflowgen.AdditiveCoupling(torch.nn.Linear(2, 2), mask="interleaved")
        >>> y, logdet = layer(torch.randn(5, 4))
        >>> logdet.tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    volume_preserving = True

    def _transform(
        self, x: Tensor, params: Tensor, part: tuple[int, int] | None, mask: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return affine_coupling(x, params, inverse=inverse, event_dim=self.event_dim, part=part, mask=mask)


# -------------------------------------------------------------------------------------------------------- fake
def _fake(x, params, log_scale, mask, layout, start, step, scale, clamp, gain, shift_first, inverse, event_dim):  # type: ignore[no-untyped-def]
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return torch.empty_like(x), x.new_empty(x.shape[: x.dim() - event_dim], dtype=dtype)


def _fake_backward(dy, dlogdet, x, params, log_scale, mask, *options):  # type: ignore[no-untyped-def]
    empty = x.new_empty(0)
    return torch.empty_like(x), torch.empty_like(params), empty if log_scale is None else torch.empty_like(log_scale)


_native.register("affine_coupling", _fake)
_native.register("affine_coupling_backward", _fake_backward)
