"""affine_coupling: the battery, the peers in float64, edges, and what is special to the op."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from check_op import Op, Sample, op_tests
from torch import Tensor

import pyflowgen
from pyflowgen import affine_coupling, affine_coupling_reference
from pyflowgen.ops import affine_coupling as module

SCALES = ("exp", "tanh", "sigmoid", "sigmoid_eps", "softclip", "atan", "softplus")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def samples() -> list[Sample]:
    result = []
    for scale, order, inverse in itertools.product(SCALES, ("scale_shift", "shift_scale"), (False, True)):
        options = dict(scale=scale, order=order, inverse=inverse)
        name = f"{scale}-{order}-{'inverse' if inverse else 'forward'}"
        result.append(Sample(f"{name}-halves", (normal(9, 21), normal(9, 42)), dict(options, layout="halves")))
        result.append(Sample(f"{name}-pairs", (normal(9, 35), normal(9, 35, 2)), dict(options, layout="pairs")))
    add = lambda name, *tensors, **options: result.append(Sample(name, tensors, options))  # noqa: E731
    for inverse in (False, True):
        add(f"additive-{inverse}", normal(7, 5), normal(7, 5), inverse=inverse)
        add(f"additive-part-{inverse}", normal(7, 19), normal(7, 9), inverse=inverse, part=(1, 2))
        add(f"additive-mask-{inverse}", normal(7, 5), normal(7, 5), inverse=inverse, mask=normal(5) > 0)
    add("separate", normal(6, 40), normal(6, 40), normal(6, 40, seed=1))
    add("interleaved-vector", normal(17, 37), normal(17, 74), layout="interleaved")
    add("elementwise", normal(4, 3, 7), normal(4, 3, 7), normal(4, 3, 7, seed=1), event_dim=0)
    add("elementwise-pairs", normal(4, 3, 7), normal(4, 3, 7, 2), layout="pairs", event_dim=0)
    add("two-features", normal(70, 2), normal(70, 2), layout="halves", part=(1, 1))
    add("three-features-interleaved", normal(70, 3), normal(70, 4), layout="interleaved", part=(0, 2))
    for start, step, layout in itertools.product((0, 1, 4), (1, 2), ("halves", "interleaved")):
        if start < 2 or step == 1:
            name = f"part({start}, {step})-{layout}"
            add(f"vector-{name}", normal(5, 37), normal(5, 36), layout=layout, part=(start, step))
            add(f"image-{name}", normal(2, 8, 5, 7), normal(2, 8, 5, 7), layout=layout, part=(start, step), event_dim=3)
    for layout, inverse in itertools.product(("halves", "interleaved", "pairs"), (False, True)):
        options = dict(
            layout=f"{layout}_scale_first", inverse=inverse, order="shift_scale" if inverse else "scale_shift"
        )
        name = f"scale-first-{layout}-{'inverse' if inverse else 'forward'}"
        more = (2,) if layout == "pairs" else ()
        for scale, gain in (("exp", 0.5), ("tanh", 2.0), ("sigmoid_eps", -0.3)):
            params = normal(9, 37, *more) if more else normal(9, 74)
            add(f"{name}-{scale}-{gain}", normal(9, 37), params, **options, scale=scale, gain=gain)
        params = normal(3, 4, 4, 4, *more) if more else normal(3, 8, 4, 4)
        add(f"{name}-part", normal(3, 8, 4, 4), params, **options, part=(1, 2), event_dim=3)
        add(
            f"{name}-two-features",
            normal(70, 2),
            normal(70, 1, *more) if more else normal(70, 2),
            **options,
            part=(1, 1),
        )
    add("gain-separate", normal(6, 40), normal(6, 40), normal(6, 40, seed=1), gain=0.7, scale="softclip")
    for layout in ("halves", "interleaved"):
        image, params = normal(3, 6, 4, 4), normal(3, 12, 4, 4)
        add(f"image-{layout}", image, params, layout=layout, event_dim=3)
        add(
            f"channels-last-{layout}",
            *(t.contiguous(memory_format=torch.channels_last) for t in (image, params)),
            layout=layout,
            event_dim=3,
        )
        add(
            f"mixed-formats-{layout}",
            image,
            params.contiguous(memory_format=torch.channels_last),
            layout=layout,
            event_dim=3,
        )
    checkerboard = (torch.arange(6)[:, None] + torch.arange(5)) % 2 == 1
    add("checkerboard", normal(3, 2, 6, 5), normal(3, 4, 6, 5), layout="halves", event_dim=3, mask=checkerboard)
    add(
        "channel-mask",
        normal(3, 4, 6, 5),
        normal(3, 8, 6, 5),
        layout="interleaved",
        event_dim=3,
        mask=(torch.arange(4) % 2 == 0)[:, None, None],
    )
    add("vector-mask", normal(3, 33), normal(3, 66), layout="halves", mask=torch.arange(33) % 3 == 0)
    # Strides: slices, transposes, expanded parameters, a batch that is no single stride, several batch dimensions.
    add("half-of-channels", normal(3, 8, 4, 4)[:, 4:], normal(3, 8, 4, 4), layout="halves", event_dim=3)
    add("every-second", normal(4, 66)[:, ::2], normal(4, 66), layout="halves")
    add("every-third", normal(4, 66)[:, ::3], normal(4, 66)[:, ::3], normal(4, 66, seed=2)[:, 1::3])
    add("transposed", normal(21, 9).t(), normal(42, 9).t(), layout="halves")
    add(
        "two-dimensional-event-transposed",
        normal(4, 5, 6).transpose(1, 2),
        normal(4, 6, 5),
        normal(4, 6, 5, seed=1),
        event_dim=2,
    )
    add("batch-of-no-one-stride", normal(4, 5, 6).transpose(0, 1), normal(5, 4, 12), layout="halves")
    add("expanded-parameters", normal(7, 18), normal(18).expand(7, 18), normal(18, seed=1).expand(7, 18))
    add("many-batch-dimensions", normal(2, 3, 2, 2, 9), normal(2, 3, 2, 2, 18), layout="halves")
    add("no-batch", normal(9), normal(18), layout="halves")
    # Positive log-scales: of one sum that cancels, the reference's own error is a matter of luck.
    add("long-rows", normal(1, 2, 256, 150), normal(1, 4, 256, 150).abs(), layout="halves", event_dim=3)
    add("long-rows-part", normal(2, 4, 256, 140), normal(2, 4, 256, 140), layout="halves", event_dim=3, part=(1, 2))
    add("long-interleaved-vector", normal(2, 140001), normal(2, 140000).abs(), layout="interleaved", part=(1, 2))
    for inverse in (False, True):  # the gradient of the inverse alone needs the shift
        strided = normal(40, 37), normal(40, 74)[:, ::2], normal(40, 37, seed=1)
        add(f"strided-shift-{'inverse' if inverse else 'forward'}", *strided, inverse=inverse)
    add("many-images", normal(40, 2, 3, 7), normal(40, 4, 3, 7), layout="interleaved", event_dim=3)
    for batch, features in ((0, 6), (1, 1), (1, 2), (5, 0), (123, 1), (5, 123), (70, 37)):
        add(f"size-{batch}x{features}", normal(batch, features), normal(batch, 2 * features), layout="halves")
    return result


def small() -> list[Sample]:
    result = [
        Sample(
            f"{scale}-{order}-{inverse}",
            (normal(3, 5), normal(3, 5), normal(3, 5, seed=1)),
            dict(scale=scale, order=order, inverse=inverse),
        )
        for scale, order, inverse in itertools.product(SCALES, ("scale_shift", "shift_scale"), (False, True))
    ]
    result.append(Sample("additive", (normal(3, 5), normal(3, 5)), {}))
    result.append(Sample("additive-part", (normal(3, 5), normal(3, 2)), dict(part=(3, 1), inverse=True)))
    result.append(Sample("part", (normal(3, 5), normal(3, 4)), dict(layout="halves", part=(1, 2))))
    result.append(
        Sample(
            "mask", (normal(2, 2, 3, 3), normal(2, 4, 3, 3)), dict(layout="halves", event_dim=3, mask=torch.eye(3) > 0)
        )
    )
    return result


def operator(sample: Sample):
    names = ("scale", "clamp", "gain", "order", "inverse", "event_dim", "layout", "part", "mask")
    defaults = ("exp", None, 1.0, "scale_shift", False, 1, None, None, None)
    options = [sample.options.get(n, d) for n, d in zip(names, defaults, strict=True)]
    tensors = (*sample.tensors, None, None)[:3]
    return torch.ops.pyflowgen.affine_coupling.default, module._arguments(*tensors, *options)


X, P = torch.zeros(4, 6), torch.zeros(4, 12)
BAD = [
    ("shape", lambda: affine_coupling(X, torch.zeros(4, 5)), ValueError, r"shift has shape \(4, 5\), expected \(4, 6\)"),
    ("log-scale shape", lambda: affine_coupling(X, X, torch.zeros(3, 6)), ValueError, r"log_scale has shape \(3, 6\)"),
    ("packed shape", lambda: affine_coupling(X, X, layout="halves"), ValueError, r"shift has shape \(4, 6\), expected \(4, 12\)"),
    ("dtype", lambda: affine_coupling(X, P.double(), layout="halves"), ValueError, "shift is torch.float64"),
    ("integers", lambda: affine_coupling(X.long(), P.long(), layout="halves"), TypeError, "x must be a floating-point"),
    ("no tensor", lambda: affine_coupling(X, 3.0), TypeError, "must be tensors"),
    ("scale", lambda: affine_coupling(X, X, X, scale="cosh"), ValueError, "scale must be one of"),
    ("order", lambda: affine_coupling(X, X, X, order="both"), ValueError, "order must be one of"),
    ("layout", lambda: affine_coupling(X, P, layout="thirds"), ValueError, "layout must be one of"),
    ("layout and log_scale", lambda: affine_coupling(X, P, X, layout="halves"), ValueError, "log_scale must be None"),
    ("clamp of exp", lambda: affine_coupling(X, X, X, clamp=2.0), ValueError, "takes no clamp"),
    ("gain", lambda: affine_coupling(X, P, gain=math.nan, layout="halves"), ValueError, "gain must be a finite number"),
    ("negative clamp", lambda: affine_coupling(X, X, X, scale="tanh", clamp=-1.0), ValueError, "clamp must be positive"),
    ("event_dim", lambda: affine_coupling(X, X, event_dim=3), ValueError, "event_dim must be between"),
    ("part", lambda: affine_coupling(X, X, layout="halves", part=(4, 1)), ValueError, r"part=\(start=4, step=1\)"),
    ("part and mask", lambda: affine_coupling(X, X[:, :2], layout="halves", part=(0, 1), mask=X[0] > 0), ValueError, "exclude"),
    ("mask dtype", lambda: affine_coupling(X, P, layout="halves", mask=X), ValueError, "mask must be a bool"),
    ("mask shape", lambda: affine_coupling(X, P, layout="halves", mask=torch.ones(5, dtype=torch.bool)), ValueError, "mask has shape"),
    ("operator's own check", lambda: torch.ops.pyflowgen.affine_coupling(X, P, None, None, 1, 3, 1, 1, 0.0, 1.0, False, False, 1), RuntimeError, "beyond x's channels"),
]  # fmt: skip

globals().update(
    op_tests(
        Op(
            name="affine_coupling",
            function=affine_coupling,
            reference=affine_coupling_reference,
            samples=samples,
            small=small,
            operator=operator,
            resize=lambda batch: Sample(
                "resize", (normal(batch, 6), normal(batch, 6)), dict(layout="halves", part=(3, 1), scale="tanh")
            ),
            bad=BAD,
        )
    )
)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_edges(scale: str, dtype: torch.dtype) -> None:
    """Signed zeros, infinities, NaN, denormals and huge values come out as from the reference in float64."""
    edges = torch.tensor(
        [
            0.0,
            -0.0,
            math.inf,
            -math.inf,
            math.nan,
            1e-40,
            -1e-40,
            1e-6,
            -1e-6,
            1.0,
            -30.0,
            30.0,
            88.0,
            -88.0,
            1e4,
            -1e4,
            1e30,
        ],
        dtype=dtype,
    )
    x, s = (t.flatten() for t in torch.meshgrid(edges, edges, indexing="ij"))
    t = torch.zeros_like(x)
    y, l = affine_coupling(x, t, s, scale=scale, event_dim=0)  # noqa: E741
    want_y, want_l = (
        r.to(dtype) for r in affine_coupling_reference(x.double(), t.double(), s.double(), scale=scale, event_dim=0)
    )
    if scale == "softclip":  # inf / inf is NaN in the definition too; the limit is not asked for
        keep = torch.isfinite(s)
        y, l, want_y, want_l = y[keep], l[keep], want_y[keep], want_l[keep]  # noqa: E741
    # log(a + 1e-3) near a = 1 is as good as the rounding of its argument.
    atol = torch.finfo(dtype).eps if scale in ("sigmoid_eps", "softplus") else 0
    torch.testing.assert_close(l, want_l, equal_nan=True, rtol=4e-6 if dtype == torch.float32 else 1e-13, atol=atol)
    torch.testing.assert_close(
        y, want_y, equal_nan=True, rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=torch.finfo(dtype).tiny
    )


def test_small_log_scales_keep_relative_accuracy() -> None:
    """A log-scale of 1e-6 must not vanish: tanh and atan near 0 are held in relative error."""
    s = torch.tensor([1e-6, -1e-6, 1e-20, -3e-38])
    for scale in ("tanh", "atan", "softclip"):
        _, l = affine_coupling(torch.ones(4), torch.zeros(4), s, scale=scale, event_dim=0)  # noqa: E741
        _, want = affine_coupling_reference(
            torch.ones(4).double(), torch.zeros(4).double(), s.double(), scale=scale, event_dim=0
        )
        torch.testing.assert_close(l.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("order", ["scale_shift", "shift_scale"])
def test_logdet_is_that_of_the_jacobian(scale: str, order: str) -> None:
    x, params = normal(6), normal(6)
    options = dict(layout="halves", part=(3, 1), scale=scale, order=order)
    for inverse in (False, True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x, inverse=inverse: affine_coupling(x, params, inverse=inverse, **options)[0], x
        )
        _, logdet = affine_coupling(x, params, inverse=inverse, **options)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet)
    y, logdet = affine_coupling(x, params, **options)
    back, minus = affine_coupling(y, params, inverse=True, **options)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


def test_clamped_scales_stay_finite() -> None:
    x, huge = torch.ones(3, 4), torch.full((3, 4), 1e30)
    for scale, sign in itertools.product(("tanh", "softclip", "atan"), (1, -1)):
        y, logdet = affine_coupling(x, x, sign * huge, scale=scale)
        assert torch.isfinite(y).all() and torch.isfinite(logdet).all(), scale


def test_masked_out_parameters_are_ignored() -> None:
    """An inf under False neither reaches the value nor the gradient as NaN."""
    x, mask = torch.ones(2, 4), torch.tensor([True, False, True, False])
    params = torch.where(mask.repeat(2), 0.5, torch.inf).expand(2, 8).clone().requires_grad_()
    for call in (affine_coupling, affine_coupling_reference):
        y, logdet = call(x, params, layout="halves", mask=mask)
        assert torch.isfinite(y).all() and torch.isfinite(logdet).all()
        (grad,) = torch.autograd.grad(y.sum() + logdet.sum(), params)
        assert torch.isfinite(grad).all() and not grad[:, ~mask.repeat(2)].any()


def test_autocast_mixes_dtypes_and_sums_in_float32(device: torch.device) -> None:
    x, params = torch.randn(4, 6, device=device), torch.randn(4, 12, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y, logdet = affine_coupling(x, params, layout="halves")
    assert y.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(y, affine_coupling_reference(x, params.float(), layout="halves")[0])


def test_only_one_output_used() -> None:
    """A loss that reads y alone, or the log-determinant alone."""
    for index in (0, 1):
        grads = []
        for call in (affine_coupling, affine_coupling_reference):
            x, params = normal(4, 6).requires_grad_(), normal(4, 12).requires_grad_()
            grads.append(
                torch.autograd.grad(
                    call(x, params, layout="halves", scale="tanh")[index].sum(), (x, params), allow_unused=True
                )
            )
        for got, want in zip(*grads, strict=True):
            torch.testing.assert_close(
                got if got is not None else torch.zeros(()), want if want is not None else torch.zeros_like(got)
            )


def test_a_tensor_left_over_from_a_transform() -> None:
    """torch.func's wrappers outlive it where somebody keeps them; torch's own functions see through them."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x.sum()

    x, params = normal(4, 2), normal(4, 4).requires_grad_()
    torch.func.grad(keep)(x)
    got = affine_coupling(kept[0], params, layout="halves")
    want = affine_coupling(x, params, layout="halves")
    _assert_all(got, want)
    for a, b in zip(torch.autograd.grad(got[0].sum(), params), torch.autograd.grad(want[0].sum(), params), strict=True):
        torch.testing.assert_close(a, b)


def test_peak_memory_is_inputs_outputs_and_gradients() -> None:
    """Forward and backward allocate y, logdet and the gradients, and no temporaries: at most 5 % more."""
    x, params = torch.randn(4096, 64, requires_grad=True), torch.randn(4096, 128, requires_grad=True)
    dy, dlogdet = torch.randn(4096, 64), torch.randn(4096)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        y, logdet = affine_coupling(x, params, layout="halves")
        grads = torch.autograd.grad([y, logdet], [x, params], [dy, dlogdet])
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    needed = sum(t.numel() * 4 for t in (y, logdet, *grads))
    assert needed <= peak <= 1.05 * needed, (peak, needed)


class Constant(torch.nn.Module):
    """A conditioner whose output is given."""

    def __init__(self, params: Tensor) -> None:
        super().__init__()
        self.params = params

    def forward(self, *_: Tensor) -> Tensor:
        return self.params


# Peers, each in its own convention and direction, float64.
def test_equals_nflows() -> None:
    coupling = pytest.importorskip("nflows.transforms.coupling")
    x, params = normal(5, 8), normal(5, 8)
    peer = coupling.AffineCouplingTransform(torch.arange(8) % 2, lambda i, o: lambda z, context=None: params)
    for inverse in (False, True):
        want = (peer.inverse if inverse else peer.forward)(x)
        got = affine_coupling(x, params, layout="halves", part=(1, 2), scale="sigmoid_eps", inverse=inverse)
        _assert_all(got, want, shift_last=True)
    additive = coupling.AdditiveCouplingTransform(
        torch.arange(8) % 2, lambda i, o: lambda z, context=None: params[:, :4]
    )
    _assert_all(affine_coupling(x, params[:, :4], part=(1, 2)), additive.forward(x))


@pytest.mark.parametrize("shape", [(5, 8), (5, 8, 3, 3)])
@pytest.mark.parametrize("scale_map, scale", [("exp", "exp"), ("sigmoid_inv", "sigmoid"), ("sigmoid", "sigmoid")])
def test_equals_normflows(shape: tuple[int, ...], scale_map: str, scale: str) -> None:
    affine = pytest.importorskip("normflows.flows.affine.coupling")
    z1, z2, params = normal(*shape), normal(*shape, seed=1), normal(shape[0], 2 * shape[1], *shape[2:])
    layer = affine.AffineCoupling(Constant(params), scale_map=scale_map)
    options = dict(layout="interleaved", event_dim=len(shape) - 1, scale=scale)
    (_, y), logdet = layer.forward([z1, z2])
    if scale_map == "sigmoid":  # divides by the sigmoid on the way to the data: the inverse of shift-then-scale
        shift, s = params[:, 0::2], params[:, 1::2]
        got_y, got_logdet = affine_coupling(
            z2, -shift, s, order="shift_scale", inverse=True, scale=scale, event_dim=len(shape) - 1
        )
        torch.testing.assert_close(got_y, z2 / torch.sigmoid(s + 2) + shift)
        torch.testing.assert_close((got_y, got_logdet), (y, logdet))
    else:
        _assert_all(affine_coupling(z2, params, **options), (y, logdet))


def test_equals_zuko() -> None:
    transforms = pytest.importorskip("zuko.transforms")
    x, phi = normal(5, 8), normal(5, 8, 2)
    peer = transforms.MonotonicAffineTransform(*phi.unbind(-1))
    y, ladj = peer.call_and_ladj(x)
    _assert_all(affine_coupling(x, phi, layout="pairs", scale="softclip"), (y, ladj.sum(-1)))
    _assert_all(affine_coupling(x, phi, layout="pairs", scale="softclip", event_dim=0), (y, ladj))
    torch.testing.assert_close(affine_coupling(x, phi, layout="pairs", scale="softclip", inverse=True)[0], peer.inv(x))


@pytest.mark.parametrize("activation, scale", [("ATAN", "atan"), ("TANH", "tanh")])
def test_equals_freia(activation: str, scale: str) -> None:
    layers = pytest.importorskip("FrEIA.modules")
    x, params = normal(5, 8), normal(5, 8)
    peer = layers.GLOWCouplingBlock(
        [(8,)], subnet_constructor=lambda i, o: torch.nn.Linear(i, o), clamp=1.5, clamp_activation=activation
    ).double()
    s, t = params.chunk(2, 1)
    peer.subnet1 = peer.subnet2 = Constant(params)
    y, logdet = peer._coupling1(x[:, :4], x[:, 4:])
    options = dict(scale=scale, clamp=1.5, gain=1.0 if scale == "atan" else 1.5)
    for got in (
        affine_coupling(x[:, :4], t, s, **options),
        affine_coupling(x[:, :4], params, layout="halves_scale_first", **options),
    ):
        _assert_all(got, (y, logdet if logdet.dim() == 1 else logdet.sum(1)))


def test_equals_torchflows() -> None:
    affine = pytest.importorskip("torchflows.bijections.finite.autoregressive.transformers.linear.affine")
    x, h = normal(5, 8), normal(5, 8, 2)
    y, logdet = affine.Affine(event_shape=(8,), min_scale=1e-10).forward(x, h)
    got = affine_coupling(x, h, layout="pairs_scale_first", gain=0.5)
    torch.testing.assert_close(got[0], y, rtol=1e-8, atol=1e-8)  # its minimum scale of 1e-10 is not ours
    torch.testing.assert_close(got[1], logdet, rtol=1e-8, atol=1e-8)


def test_equals_glow() -> None:
    """(z + shift) σ(h + 2) with shift and h alternating on the channels, log-det Σ log σ(h + 2)."""
    z, h = normal(2, 3, 4, 4), normal(2, 6, 4, 4)
    shift, scale = h[:, 0::2], torch.sigmoid(h[:, 1::2] + 2)
    got = affine_coupling(z, h, layout="interleaved", order="shift_scale", scale="sigmoid", event_dim=3)
    _assert_all(got, ((z + shift) * scale, scale.log().sum((1, 2, 3))))


def _assert_all(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], shift_last: bool = False) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# Layers.
def net(n_in: int, n_out: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(n_in, 8), torch.nn.Tanh(), torch.nn.Linear(8, n_out)).double()


@pytest.mark.parametrize("mask, swap", itertools.product(["halves", "interleaved", "tensor"], [False, True]))
def test_layer(mask: str, swap: bool) -> None:
    torch.manual_seed(0)
    x = normal(4, 7)
    if mask == "tensor":
        given, layer_net, additive_net = torch.arange(7) % 3 == 0, net(7, 14), net(7, 7)
    else:
        given = mask
        n_same = 3 if swap else 4
        layer_net, additive_net = net(n_same, 2 * (7 - n_same)), net(n_same, 7 - n_same)
    for layer in (
        pyflowgen.AffineCoupling(layer_net, mask=given, swap=swap, scale="tanh"),
        pyflowgen.AdditiveCoupling(additive_net, mask=given, swap=swap),
    ):
        y, logdet = layer(x)
        back, minus = layer.inverse(y)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(minus, -logdet)
        jacobian = torch.stack(
            [torch.autograd.functional.jacobian(lambda z, layer=layer: layer(z[None])[0][0], row) for row in x]
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet)
        changed = (y != x).all(0)
        expected = {
            "halves": torch.arange(7) < 4 if swap else torch.arange(7) >= 4,
            "interleaved": torch.arange(7) % 2 == (0 if swap else 1),
            "tensor": (torch.arange(7) % 3 == 0) != swap,
        }[mask]
        assert torch.equal(changed, expected)
        with pyflowgen.reference_path():
            torch.testing.assert_close(layer(x), (y, logdet))


@pytest.mark.parametrize("swap", [False, True])
def test_checkerboard_layer(swap: bool) -> None:
    torch.manual_seed(0)
    layer = pyflowgen.AffineCoupling(
        torch.nn.Conv2d(2, 4, 3, padding=1).double(), mask="checkerboard", swap=swap, event_dim=3
    )
    for size in (4, 5):  # the mask follows the size
        x = normal(3, 2, size, size)
        y, logdet = layer(x)
        odd = (torch.arange(size)[:, None] + torch.arange(size)) % 2 == 1
        assert torch.equal((y != x).all(0).all(0), odd != swap)
        torch.testing.assert_close(layer.inverse(y)[0], x)
        flat = lambda z, size=size: layer(z.view(1, 2, size, size))[0].flatten()  # noqa: E731
        torch.testing.assert_close(
            torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, x[0].flatten())).logabsdet, logdet[0]
        )


def test_layer_takes_context_and_names_what_is_wrong() -> None:
    class Conditioner(torch.nn.Module):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return (x + context).repeat(1, 2)

    layer = pyflowgen.AffineCoupling(Conditioner())
    x, context = torch.randn(3, 4), torch.randn(3, 2)
    y, _ = layer(x, context)
    torch.testing.assert_close(layer.inverse(y, context)[0], x)
    for call, message in (
        (lambda: pyflowgen.AffineCoupling(3), "conditioner is int"),
        (lambda: pyflowgen.AffineCoupling(Conditioner(), mask="thirds"), "mask is 'thirds'"),
        (lambda: pyflowgen.AffineCoupling(Conditioner(), mask="checkerboard"), "needs images"),
        (lambda: pyflowgen.AffineCoupling(Conditioner(), scale="cosh"), "scale must be one of"),
        (lambda: pyflowgen.AffineCoupling(torch.nn.Linear(2, 3))(x), "shift has shape"),
        (lambda: layer(torch.randn(3, 1), context), "at least 2 channels"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
