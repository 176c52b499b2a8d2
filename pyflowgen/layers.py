"""Flow layers without a conditioner: rearrangements, normalisation, and the maps between pixels and the real line."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from pyflowgen.bijection import Bijection, Channelwise, batch_shape, logdet_dtype, sum_event
from pyflowgen.coupling import conditioned
from pyflowgen.ops.affine_coupling import affine_coupling
from pyflowgen.ops.invertible_linear import Factor, Invertible1x1Conv, invertible_linear, invertible_linear_head


def _zero_logdet(x: Tensor, event_dim: int, owner: object) -> Tensor:
    dtype = logdet_dtype(x.dtype) if x.is_floating_point() else torch.get_default_dtype()
    return torch.zeros((), dtype=dtype, device=x.device).expand(batch_shape(x, event_dim, owner))


class Permutation(Bijection):
    r"""Fixed reordering of one dimension, :math:`y_i = x_{\pi(i)}`; log-determinant 0.

    Args:
        index: the permutation :math:`\pi` of `0, ..., n-1`, as integers. `Permutation.random(n, seed=...)` and
            `Permutation.reverse(n)` make the usual ones.
        dim: the dimension permuted, counted from the end; -1 for vectors, -3 for the channels of images.
        event_dim: number of trailing dimensions of one event, by default `-dim`.

    The index is a buffer: it travels with the state dict, so a random permutation is restored with the weights.

    >>> import torch
    >>> from pyflowgen.layers import Permutation
    >>> Permutation.reverse(3)(torch.tensor([[1.0, 2.0, 3.0]]))
    (tensor([[3., 2., 1.]]), tensor([0.]))
    """

    volume_preserving = True
    index: Tensor
    inverse_index: Tensor

    def __init__(self, index: Tensor | Sequence[int], dim: int = -1, event_dim: int | None = None) -> None:
        super().__init__()
        index = torch.as_tensor(index).detach().clone()
        if (
            index.dim() != 1
            or index.dtype not in (torch.int64, torch.int32)
            or not torch.equal(index.sort().values, torch.arange(len(index), dtype=index.dtype, device=index.device))
        ):
            raise ValueError(
                f"Permutation: index has shape {tuple(index.shape)} and type {index.dtype}, "
                "expected every integer 0..n-1 once"
            )
        self.dim, self.event_dim = dim, -dim if event_dim is None else event_dim
        if not 0 < -dim <= self.event_dim:
            raise ValueError(f"Permutation: dim is {dim}, expected -event_dim..-1 with event_dim {self.event_dim}")
        index = index.long()
        self.register_buffer("index", index)
        self.register_buffer("inverse_index", index.argsort())

    @classmethod
    def random(
        cls,
        features: int,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        dim: int = -1,
        event_dim: int | None = None,
    ) -> Permutation:
        """A uniformly drawn permutation, from `generator`, or a fresh one of `seed`, or torch's global one."""
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
        return cls(torch.randperm(features, generator=generator), dim, event_dim)

    @classmethod
    def reverse(cls, features: int, *, dim: int = -1, event_dim: int | None = None) -> Permutation:
        """The order turned round."""
        return cls(torch.arange(features - 1, -1, -1), dim, event_dim)

    def _apply_index(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        logdet = _zero_logdet(x, self.event_dim, self)
        if x.shape[self.dim] != len(index):
            raise ValueError(
                f"Permutation: x has shape {tuple(x.shape)}, expected {len(index)} entries on dimension {self.dim}"
            )
        return x.index_select(self.dim, index), logdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_index(x, self.index)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_index(y, self.inverse_index)

    def channelwise(self, x: Tensor, inverse: bool) -> Channelwise | None:
        if self.dim != -1 or self.event_dim != 1 or x.shape[-1] != len(self.index):
            return None
        return self.inverse_index if inverse else self.index, 0, None, None

    def extra_repr(self) -> str:
        return f"{len(self.index)}, dim={self.dim}"


class _DataInit(Bijection):
    """A bijection whose parameters are set from the first batch it sees in training.

    The buffer `initialized` goes into the state dict. Its copy in Python spares a device synchronisation per call and
    keeps the branch out of compiled graphs.
    """

    initialized: Tensor
    log_scale: Tensor

    def __init__(self, init: bool) -> None:
        super().__init__()
        self.register_buffer("initialized", torch.tensor(not init))
        self._pending = init

    def _load_from_state_dict(self, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        super()._load_from_state_dict(*args, **kwargs)
        self._pending = not bool(self.initialized)

    def _set_from(self, x: Tensor) -> None:
        raise NotImplementedError

    def _maybe_init(self, x: Tensor) -> None:
        if self._pending and self.training and x.numel():
            with torch.no_grad():
                self._set_from(x.detach())
                self.initialized.fill_(True)
            self._pending = False

    def _channelwise(self, x: Tensor, inverse: bool, shift: Tensor | None) -> Channelwise | None:
        waits = self._pending and self.training and not inverse  # for a first batch to be set from
        if waits or self.log_scale.shape != x.shape[-1:] or self.log_scale.dtype is not x.dtype:
            return None
        return None, -1 if inverse else 1, self.log_scale, shift


def _moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased standard deviation over `dims`, over all processes of a distributed run, in at least float32."""
    x = x.to(logdet_dtype(x.dtype))
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()

    def mean(v: Tensor) -> Tensor:
        total = v.sum(dims) if dims else v.clone()
        count = torch.tensor(float(v.numel() // max(total.numel(), 1)), dtype=total.dtype, device=total.device)
        if shared:  # otherwise every process would start from other parameters
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(count)
        return total / count

    centre = mean(x)
    shape = [1 if d - x.dim() in dims else n for d, n in enumerate(x.shape)]
    if x.numel() == centre.numel():  # one observation has no spread
        return centre, torch.ones_like(centre)
    return centre, mean((x - centre.reshape(shape)).square()).sqrt()


class ActNorm(_DataInit):
    r"""Scale and shift per channel, set from the first batch so that its output has mean 0 and variance 1.

    .. math:: y = x \, e^{s} + b, \qquad \log|\det| = P \sum_c s_c

    with :math:`P` the number of positions that share a channel (1 for vectors, :math:`H W` for images).

    Args:
        features: number of channels.
        event_dim: number of trailing dimensions of an event, the channel being the first of them: 1 for `(..., C)`,
            3 for `(..., C, H, W)`.
        init: set the parameters from the first batch in training mode; otherwise the map starts as the identity.
        eps: smallest standard deviation divided by, so a constant channel stays finite.

    The initialisation runs without gradient, once, and is remembered in the state dict's `initialized`.

    Reference: Kingma and Dhariwal, *Glow*, 2018, section 3.1 (there written :math:`(x + b')e^{s}`).

    >>> import torch
    >>> from pyflowgen.layers import ActNorm
    >>> norm = ActNorm(2)
    >>> y, logdet = norm(5 + 3 * torch.randn(1000, 2))
    >>> bool(y.mean().abs() < 1e-5), bool((y.std(0) - 1).abs().max() < 1e-2), logdet.shape
    (True, True, torch.Size([1000]))
    """

    def __init__(self, features: int, *, event_dim: int = 1, init: bool = True, eps: float = 1e-6) -> None:
        super().__init__(init)
        if features < 1 or event_dim < 1:
            raise ValueError(f"ActNorm: features={features}, event_dim={event_dim}, expected both at least 1")
        self.features, self.event_dim, self.eps = features, event_dim, eps
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def _set_from(self, x: Tensor) -> None:
        channel = -self.event_dim
        mean, std = _moments(x, tuple(d for d in range(-x.dim(), 0) if d != channel))
        std = std.clamp_min(self.eps)
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)

    def _params(self, x: Tensor, learn: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch = batch_shape(x, self.event_dim, self)
        if x.shape[-self.event_dim] != self.features:
            raise ValueError(
                f"ActNorm: x has shape {tuple(x.shape)}, "
                f"expected {self.features} channels on dimension {-self.event_dim}"
            )
        if learn:
            self._maybe_init(x)
        inner = x.shape[x.dim() - self.event_dim + 1 :]
        logdet = self.log_scale.sum(dtype=logdet_dtype(self.log_scale.dtype)) * math.prod(inner)
        shape = (self.features,) + (1,) * len(inner)
        return self.log_scale.reshape(shape), self.shift.reshape(shape), logdet.expand(batch)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, logdet = self._params(x, learn=True)
        return torch.addcmul(shift, x, log_scale.exp()), logdet

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift, logdet = self._params(y, learn=False)  # noise says nothing about the data
        return (y - shift) * (-log_scale).exp(), -logdet

    def channelwise(self, x: Tensor, inverse: bool) -> Channelwise | None:
        return self._channelwise(x, inverse, self.shift) if self.event_dim == 1 else None

    def extra_repr(self) -> str:
        return f"{self.features}, event_dim={self.event_dim}"


class Scale(_DataInit):
    r"""Diagonal scaling of the whole event, NICE's last layer ("homothety").

    .. math:: y = x \odot e^{s}, \qquad \log|\det| = \sum_i s_i

    Args:
        event_shape: shape of one event (an integer for vectors); there is one :math:`s_i` per entry.
        std: standard deviation the output gets on the first batch; the logistic prior's is :math:`\pi/\sqrt3 = 1.81`.
        init: set :math:`s_i = \log(\mathrm{std}/\mathrm{std}_i(x))` from the first batch in training mode, else 0.
            Without it, hundreds of updates go into the scale of pixels that hardly vary.
        eps: smallest standard deviation divided by.

    Reference: Dinh, Krueger and Bengio, *NICE*, 2014, section 3.3.

    >>> import torch
    >>> from pyflowgen.layers import Scale
    >>> y, logdet = Scale(2)(torch.tensor([[0.0, 0.0], [2.0, 4.0]]))
    >>> y.tolist(), logdet.detach()
    ([[0.0, 0.0], [2.0, 2.0]], tensor([-0.6931, -0.6931]))
    """

    def __init__(
        self, event_shape: int | Sequence[int], *, std: float = 1.0, init: bool = True, eps: float = 1e-6
    ) -> None:
        super().__init__(init)
        self.event_shape = _shape(event_shape)
        if not std > 0:
            raise ValueError(f"Scale: std is {std}, expected a positive number")
        self.std, self.eps = std, eps
        self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    def _set_from(self, x: Tensor) -> None:
        _, std = _moments(x, tuple(range(-x.dim(), -len(self.event_shape))))
        self.log_scale.copy_(math.log(self.std) - std.clamp_min(self.eps).log())

    def _batch(self, x: Tensor) -> torch.Size:
        batch = batch_shape(x, len(self.event_shape), self)
        if x.shape[len(batch) :] != self.event_shape:
            raise ValueError(f"Scale: x has shape {tuple(x.shape)}, expected it to end with {tuple(self.event_shape)}")
        return batch

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch = self._batch(x)
        self._maybe_init(x)
        logdet = self.log_scale.sum(dtype=logdet_dtype(self.log_scale.dtype))
        return x * self.log_scale.exp(), logdet.expand(batch)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch = self._batch(y)
        logdet = -self.log_scale.sum(dtype=logdet_dtype(self.log_scale.dtype))
        return y * (-self.log_scale).exp(), logdet.expand(batch)

    def channelwise(self, x: Tensor, inverse: bool) -> Channelwise | None:
        return self._channelwise(x, inverse, None)

    def extra_repr(self) -> str:
        return f"{tuple(self.event_shape)}, std={self.std:g}"


class Squeeze(Bijection):
    """Space to depth: `(..., C, H, W)` becomes `(..., C·f², H/f, W/f)`; log-determinant 0.

    Output channel `c·f² + i·f + j` holds the pixels at rows `i` and columns `j` modulo `factor` of input channel `c`.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.6.

    >>> import torch
    >>> from pyflowgen.layers import Squeeze
    >>> y, logdet = Squeeze()(torch.arange(4.0).reshape(1, 1, 2, 2))
    >>> y.flatten().tolist(), y.shape, logdet
    ([0.0, 1.0, 2.0, 3.0], torch.Size([1, 4, 1, 1]), tensor([0.]))
    """

    volume_preserving = True

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        if factor < 1:
            raise ValueError(f"Squeeze: factor is {factor}, expected at least 1")
        self.factor = factor

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        c, h, w = self._check(event_shape)
        return c * self.factor**2, h // self.factor, w // self.factor

    def _check(self, shape: Sequence[int]) -> tuple[int, int, int]:
        if len(shape) < 3 or shape[-2] % self.factor or shape[-1] % self.factor:
            raise ValueError(
                f"Squeeze: x has shape {tuple(shape)}, expected (..., C, H, W) with H and W divisible by {self.factor}"
            )
        c, h, w = shape[-3:]
        return c, h, w

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _, h, w = self._check(x.shape)
        f = self.factor  # F.pixel_unshuffle gives empty batches a wrong shape
        blocks = x.unflatten(-1, (w // f, f)).unflatten(-3, (h // f, f))  # (..., C, h, f, w, f)
        return blocks.movedim((-3, -1), (-4, -3)).flatten(-5, -3), _zero_logdet(x, 3, self)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if y.dim() < 3 or y.shape[-3] % self.factor**2:
            raise ValueError(
                f"Squeeze: y has shape {tuple(y.shape)}, expected (..., C, H, W) with C divisible by {self.factor**2}"
            )
        f = self.factor
        blocks = y.unflatten(-3, (y.shape[-3] // f**2, f, f))  # (..., C, f, f, h, w)
        return blocks.movedim((-4, -3), (-3, -1)).flatten(-4, -3).flatten(-2, -1), _zero_logdet(y, 3, self)

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Logit(Bijection):
    r"""From the unit interval to the real line.

    .. math:: y = \log\frac{p}{1-p},\quad p = \alpha + (1-2\alpha)x, \qquad
              \log|\det| = \sum_i \log(1-2\alpha) - \log p_i - \log(1-p_i)

    :math:`\alpha > 0` keeps both ends of [0, 1] finite. The text of the paper has :math:`\alpha + (1-\alpha)x`, which
    is infinite at 1; its published code, and most that followed, use the symmetric form taken here.
    `inverse` covers the whole real line and can exceed [0, 1] by :math:`\alpha/(1-2\alpha)`; outside that range
    `forward` gives NaN.

    Args:
        alpha: margin, in [0, 0.5).
        event_dim: number of trailing dimensions summed into the log-determinant.

    Reference: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 4.1.

    >>> import torch
    >>> from pyflowgen.layers import Logit
    >>> y, logdet = Logit()(torch.tensor([[0.0, 0.5, 1.0]]))
    >>> y
    tensor([[-2.9444,  0.0000,  2.9444]])
    """

    def __init__(self, alpha: float = 0.05, *, event_dim: int = 1) -> None:
        super().__init__()
        if not 0 <= alpha < 0.5:
            raise ValueError(f"Logit: alpha is {alpha}, expected 0 <= alpha < 0.5")
        self.alpha, self.event_dim = alpha, event_dim

    @property
    def domain(self) -> constraints.Constraint:
        margin = self.alpha / (1 - 2 * self.alpha) + 1e-6  # what far latents are rounded to lies inside
        return constraints.interval(-margin, 1 + margin)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch_shape(x, self.event_dim, self)
        width = 1 - 2 * self.alpha
        log_p = torch.log(self.alpha + width * x)
        log_q = torch.log(self.alpha + width * (1 - x))  # from 1 - x: no digits lost near 1
        return log_p - log_q, sum_event(math.log(width) - log_p - log_q, self.event_dim)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch_shape(y, self.event_dim, self)
        width = 1 - 2 * self.alpha
        logdet = F.logsigmoid(y) + F.logsigmoid(-y) - math.log(width)
        return (torch.sigmoid(y) - self.alpha) / width, sum_event(logdet, self.event_dim)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, event_dim={self.event_dim}"


class Dequantize(Bijection):
    r"""Uniform dequantisation of integers `0 .. levels-1` to the unit interval.

    .. math:: y = (x + u)/L,\quad u \sim U(0, 1), \qquad \log|\det| = -D\log L; \qquad x = \lfloor L y \rfloor

    As the first layer of a flow it makes `log_prob` of integer data an unbiased estimate of
    :math:`\int \log p(x+u)\,du`, a lower bound of :math:`\log P(x)`. It is stochastic: each call draws new noise from
    torch's generator, in evaluation too. `inverse` is exact on what `forward` gave and has no gradient. `u` keeps a few
    roundings' distance from 0 and 1, so that no value can slip to its neighbour.

    Args:
        levels: number of integer levels L.
        event_dim: number of trailing dimensions of one event.

    Data of a floating type holds its integers as such; of an integer type, they become torch's default type.

    Reference: Theis, van den Oord and Bethge, *A note on the evaluation of generative models*, 2016, section 3.1.

    >>> import torch
    >>> from pyflowgen.layers import Dequantize
    >>> layer = Dequantize(256)
    >>> y, logdet = layer(torch.tensor([[0, 255]]))
    >>> bool((0 < y).all() and (y < 1).all()), layer.inverse(y)[0], logdet
    (True, tensor([[  0., 255.]]), tensor([-11.0904]))
    """

    stochastic = True

    def __init__(self, levels: int = 256, *, event_dim: int = 1) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"Dequantize: levels is {levels}, expected at least 1")
        self.levels, self.event_dim = int(levels), event_dim

    @property
    def domain(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def _logdet(self, x: Tensor) -> Tensor:
        batch = batch_shape(x, self.event_dim, self)
        size = math.prod(x.shape[len(batch) :])
        return torch.tensor(-size * math.log(self.levels), dtype=logdet_dtype(x.dtype), device=x.device).expand(batch)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x.to(logdet_dtype(x.dtype) if x.is_floating_point() else torch.get_default_dtype())
        edge = 2 * self.levels * torch.finfo(x.dtype).eps
        return (x + torch.rand_like(x).clamp_(edge, 1 - edge)) / self.levels, self._logdet(x)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y * self.levels).floor().clamp(0, self.levels - 1), -self._logdet(y)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, event_dim={self.event_dim}"


class GlowStep(Bijection):
    r"""One step of Glow: `ActNorm`, an invertible 1×1 convolution, and a coupling of the channels' halves.

    .. math:: v_p = W\,(e^{s} \odot x_p + b), \qquad y_1 = v_1, \qquad
              y_2 = (v_2 + t(v_1)) \odot \sigma(h(v_1) + 2)

    Args:
        features: number of channels C of images `(..., C, H, W)`, at least 2.
        conditioner: module giving t and h interleaved on the channels, 2·⌊C/2⌋ of them, from the first ⌈C/2⌉ channels,
            and from the context when there is one; the ⌊C/2⌋ channels of t alone for an additive coupling.
        additive: couple by :math:`y_2 = v_2 + t(v_1)`.
        factor: parametrisation of W, `"lu"` or `"dense"`, see `InvertibleLinear`.
        generator: of W's initial rotation.

    Normalisation and convolution are one pass, forward and backward; the coupling is another. Its layers `actnorm`,
    `conv` and `conditioner` hold the parameters.

    Reference: Kingma and Dhariwal, *Glow: Generative Flow with Invertible 1×1 Convolutions*, 2018, section 3.

    >>> import torch
    >>> from pyflowgen.layers import GlowStep
    >>> step = GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1))
    >>> x = torch.randn(8, 4, 6, 6)
    >>> y, logdet = step(x)
    >>> torch.allclose(step.inverse(y)[0], x, atol=1e-5), logdet.shape
    (True, torch.Size([8]))
    """

    def __init__(
        self,
        features: int,
        conditioner: nn.Module,
        *,
        additive: bool = False,
        factor: Factor = "lu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if features < 2:
            raise ValueError(f"GlowStep: features is {features}, expected at least 2 channels to couple")
        self.features, self.additive, self.kept = features, additive, features - features // 2
        self.actnorm = ActNorm(features, event_dim=3)
        self.conv = Invertible1x1Conv(features, factor=factor, generator=generator)
        self.conditioner = conditioner

    def _couple(self, v: Tensor, same: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        params = conditioned(self.conditioner, same, context)
        if v.is_contiguous():  # two formats in one pass take longer than a copy
            params = params.contiguous()
        part = (self.kept, 1)
        if self.additive:
            return affine_coupling(v, params, event_dim=3, part=part, inverse=inverse)
        return affine_coupling(
            v, params, scale="sigmoid", order="shift_scale", event_dim=3, layout="interleaved", part=part,
            inverse=inverse,
        )  # fmt: skip

    def _check(self, x: Tensor) -> None:
        batch_shape(x, 3, self)
        if x.shape[-3] != self.features:
            raise ValueError(f"GlowStep: x has shape {tuple(x.shape)}, expected (..., {self.features}, H, W)")

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x)
        norm, conv = self.actnorm, self.conv
        norm._maybe_init(x)
        v, logdet, same = invertible_linear_head(
            x, conv.weight, norm.log_scale, norm.shift, conv.permutation, conv.sign, self.kept, False, 3
        )
        y, coupled = self._couple(v, same, context, inverse=False)
        return y, logdet if self.additive else logdet + coupled

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(y)
        norm, conv = self.actnorm, self.conv
        v, coupled = self._couple(y, y.narrow(-3, 0, self.kept), context, inverse=True)
        x, logdet = invertible_linear(
            v, conv.weight, norm.log_scale, norm.shift, permutation=conv.permutation, sign=conv.sign, inverse=True,
            event_dim=3,
        )  # fmt: skip
        return x, logdet if self.additive else logdet + coupled

    def extra_repr(self) -> str:
        return f"{self.features}, additive={self.additive}"


class MultiScale(Bijection):
    r"""Multi-scale architecture: after each stage but the last, half of the channels leave as latents.

    .. math:: (z^{(1)}, h^{(1)}) = f_1(x),\; (z^{(2)}, h^{(2)}) = f_2(h^{(1)}),\; \dots,\; z = [z^{(1)}, \dots, z^{(L)}]

    Args:
        stages: the bijections :math:`f_k` on `(..., C, H, W)`; all but the last must give an even number of channels.
        event_shape: `(C, H, W)` of the data.
        priors: a module for each stage, or none. Called with the half that goes on, :math:`h^{(k)}` (the last with its
            own stage's output, of which it may use the shape alone), and the context, it gives the mean and
            log-standard deviation of the half that leaves, interleaved on the channels. What leaves is then
            :math:`(z^{(k)} - \mu)\,e^{-\log\sigma}`: the latents of a normal prior learned for each scale are standard
            normal.

    `forward` gives flat latents `(..., C·H·W)`, those factored out first in front; `inverse` takes them.

    References: Dinh, Sohl-Dickstein and Bengio, *Density estimation using Real NVP*, 2017, section 3.6; Kingma and
    Dhariwal, *Glow*, 2018, for the priors.

    >>> import torch
    >>> from pyflowgen.layers import MultiScale, Squeeze
    >>> scales = MultiScale([Squeeze(), Squeeze()], (1, 4, 4))
    >>> x = torch.randn(3, 1, 4, 4)
    >>> z, logdet = scales(x)
    >>> z.shape, logdet.shape, torch.equal(scales.inverse(z)[0], x)
    (torch.Size([3, 16]), torch.Size([3]), True)
    """

    def __init__(
        self, stages: Sequence[Bijection], event_shape: Sequence[int], priors: Sequence[nn.Module] = ()
    ) -> None:
        super().__init__()
        if not stages:
            raise ValueError("MultiScale: stages is empty, expected at least one")
        if len(priors) not in (0, len(stages)):
            raise ValueError(f"MultiScale: {len(priors)} priors, expected none or one for each of {len(stages)} stages")
        self.stages, self.priors = nn.ModuleList(stages), nn.ModuleList(priors)
        self.event_shape = _shape(event_shape)
        shape: tuple[int, ...] = self.event_shape
        if len(shape) != 3:
            raise ValueError(f"MultiScale: event_shape is {shape}, expected (C, H, W)")
        self._latents: list[tuple[int, ...]] = []  # shape of what each stage gives to z
        for i, stage in enumerate(stages):
            shape = stage.output_shape(shape)
            if i < len(stages) - 1:
                if shape[0] % 2:
                    raise ValueError(f"MultiScale: stage {i} gives shape {shape}, expected an even number of channels")
                shape = (shape[0] // 2, *shape[1:])
            self._latents.append(shape)
        self._sizes = [math.prod(s) for s in self._latents]

    def output_shape(self, event_shape: Sequence[int]) -> tuple[int, ...]:
        return (math.prod(self.event_shape),)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch = batch_shape(x, 3, self)
        if x.shape[len(batch) :] != self.event_shape:
            raise ValueError(
                f"MultiScale: x has shape {tuple(x.shape)}, expected it to end with {tuple(self.event_shape)}"
            )
        latents: list[Tensor] = []
        total: Tensor | None = None
        for i, stage in enumerate(self.stages):
            x, logdet = stage(x, context)
            total = logdet if total is None else total + logdet
            z, x = x.chunk(2, -3) if i < len(self.stages) - 1 else (x, x)
            z, logdet = self._standardise(i, z, x, context, inverse=False)
            total = total if logdet is None else total + logdet
            latents.append(z.flatten(-3))
        assert total is not None
        return torch.cat(latents, -1), total

    def _standardise(
        self, i: int, z: Tensor, x: Tensor, context: Tensor | None, inverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Latents of stage `i` under its prior to standard normal ones, or back; the log-determinant, None for 0."""
        if not self.priors:
            return z, None
        params = self.priors[i](x) if context is None else self.priors[i](x, context)
        return affine_coupling(z, params, layout="interleaved", event_dim=3, inverse=not inverse)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        batch = batch_shape(y, 1, self)
        if y.shape[-1] != sum(self._sizes):
            raise ValueError(f"MultiScale: y has shape {tuple(y.shape)}, expected {sum(self._sizes)} latents")
        latents = [z.unflatten(-1, s) for z, s in zip(y.split(self._sizes, -1), self._latents, strict=True)]
        x = latents[-1]
        total: Tensor | None = None
        for i in range(len(self.stages) - 1, -1, -1):
            z, first = self._standardise(i, latents[i], x, context, inverse=True)
            x = torch.cat([z, x], -3) if i < len(self.stages) - 1 else z
            x, logdet = self.stages[i].inverse(x, context)  # type: ignore[operator]
            for part in (first, logdet):
                if part is not None:
                    total = part if total is None else total + part
        assert total is not None
        return x, total.expand(batch)


def _shape(event_shape: int | Sequence[int]) -> torch.Size:
    shape = torch.Size([event_shape] if isinstance(event_shape, int) else event_shape)
    if not shape or any(n < 1 for n in shape):
        raise ValueError(f"event_shape is {tuple(shape)}, expected one or more positive sizes")
    return shape
