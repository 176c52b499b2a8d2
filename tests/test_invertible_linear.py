"""invertible_linear: the battery, the peers in float64, the layers, edges, and what is special to the op."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from check_op import Op, Sample, assert_close, op_tests, run
from torch import Tensor

import pyflowgen
from pyflowgen import Invertible1x1Conv, InvertibleLinear, invertible_linear, invertible_linear_reference
from pyflowgen.ops import invertible_linear as module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


@functools.cache
def parameters(channels: int, factor: str) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    """(weight, log_scale, shift) and the options of a map that is far from a rotation, yet well-conditioned."""
    generator, small = torch.Generator().manual_seed(channels), 0.1 * normal(channels, channels) / channels**0.5
    # Log-determinants well above 0: of a sum that cancels, the reference's own error is a matter of luck.
    if factor == "dense":
        weight, options = (
            3 * InvertibleLinear(channels, factor="dense", generator=generator).double().weight.detach(),
            {},
        )
    else:
        weight, sign = torch.eye(channels, dtype=torch.float64), normal(channels, seed=3).sign()
        options = dict(permutation=torch.randperm(channels, generator=generator), sign=sign)
        small = 3 * small
    weight = weight + small
    return (weight, 0.3 * normal(channels, seed=1).abs(), normal(channels, seed=2)), options


def sample(name: str, x: Tensor, event_dim: int, factor: str = "lu", inverse: bool = False, given: int = 3) -> Sample:
    tensors, options = parameters(x.shape[x.dim() - event_dim], factor)
    return Sample(name, (x, *tensors[:given]), dict(options, inverse=inverse, event_dim=event_dim))


def samples() -> list[Sample]:
    result = []
    add = lambda name, x, event_dim, *rest: result.append(sample(name, x, event_dim, *rest))  # noqa: E731
    for factor, inverse in itertools.product(("lu", "dense"), (False, True)):
        name = f"{factor}-{'inverse' if inverse else 'forward'}"
        for shape in ((9, 5), (3, 12, 16, 16), (2, 7, 5, 3), (4, 3, 6)):
            add(f"{name}-{'x'.join(map(str, shape))}", normal(*shape), len(shape) - 1, factor, inverse)
        add(f"{name}-no-actnorm", normal(5, 6, 8, 8), 3, factor, inverse, 1)
        add(f"{name}-scale-alone", normal(5, 6, 4, 4), 3, factor, inverse, 2)
        # Whole packs in place, an image of several chunks, and one that ends within a pack.
        add(f"{name}-chunks", normal(2, 8, 64, 40), 3, factor, inverse)
        add(f"{name}-odd-chunks", normal(1, 9, 41, 43), 3, factor, inverse)
        add(
            f"{name}-channels-last",
            normal(3, 6, 7, 5).contiguous(memory_format=torch.channels_last),
            3,
            factor,
            inverse,
        )
    for channels in (1, 2, 17, 33, 48, 64):
        add(f"{channels}-channels", normal(3, channels, 4, 4), 3)
    add("65-channels", normal(3, 65, 2, 2), 3)
    add("half-of-channels", normal(3, 8, 12, 12)[:, 4:], 3)
    add("every-second-pixel", normal(3, 4, 12, 24)[..., ::2], 3)
    add("transposed", normal(21, 9).t(), 1)
    add("batch-of-no-one-stride", normal(4, 5, 6).transpose(0, 1), 1)
    add("expanded", normal(1, 4, 1, 8).expand(3, 4, 5, 8), 3)
    add("many-batch-dimensions", normal(2, 3, 2, 4, 3, 3), 3)
    add("no-batch", normal(4, 3, 3), 3)
    add("empty-batch", normal(0, 4, 3, 3), 3)
    add("no-pixels", normal(2, 4, 0, 3), 3)
    return result


def small() -> list[Sample]:
    return [
        sample(f"{factor}-{inverse}-{event_dim}-{given}", normal(*shape), event_dim, factor, inverse, given)
        for factor, inverse in itertools.product(("lu", "dense"), (False, True))
        for event_dim, shape, given in ((3, (2, 3, 2, 2), 3), (1, (3, 4), 1), (2, (2, 3, 3), 2))
    ]


def operator(sample: Sample):
    names = ("permutation", "sign", "head", "inverse", "event_dim")
    defaults = (None, None, 0, False, 1)
    options = [sample.options.get(n, d) for n, d in zip(names, defaults, strict=True)]
    tensors = (*sample.tensors, None, None)[:4]
    if options[1] is not None:
        options[1] = options[1].to(sample.tensors[0].dtype)
    return torch.ops.pyflowgen.invertible_linear.default, module._arguments(*tensors, *options)


def in_dtype(function):
    """The sign in x's dtype, as a layer's buffers have it: the battery converts what it differentiates alone."""

    def call(x, *rest, sign=None, **options):
        return function(x, *rest, sign=None if sign is None else sign.to(x.dtype), **options)

    return call


X, W, S = torch.zeros(4, 6), torch.eye(6), torch.ones(6)
BAD = [
    ("no tensor", lambda: invertible_linear(X, 3.0), TypeError, "x and weight must be tensors"),
    ("integers", lambda: invertible_linear(X.long(), W.long()), TypeError, "x must be a floating-point"),
    ("weight shape", lambda: invertible_linear(X, W[:5]), ValueError, r"weight has shape \(5, 6\), expected \(6, 6\)"),
    ("channels", lambda: invertible_linear(X[:, :3], W), ValueError, r"expected \(3, 3\) for the 3 channels of x"),
    ("no channels", lambda: invertible_linear(X[:, :0], W[:0, :0]), ValueError, "at least 1 channel"),
    ("dtype", lambda: invertible_linear(X, W.double()), ValueError, "weight is torch.float64"),
    ("log-scale shape", lambda: invertible_linear(X, W, S[:3]), ValueError, r"log_scale has shape \(3,\)"),
    ("shift dtype", lambda: invertible_linear(X, W, S, S.half()), ValueError, "shift is torch.float16"),
    ("event_dim", lambda: invertible_linear(X, W, event_dim=0), ValueError, "event_dim must be between 1"),
    ("sign alone", lambda: invertible_linear(X, W, sign=S), ValueError, "come together"),
    ("permutation", lambda: invertible_linear(X, W, sign=S, permutation=S), ValueError, "permutation is torch.float32"),
    ("operator's own check", lambda: torch.ops.pyflowgen.invertible_linear(X, W[:5], None, None, None, None, 0, False, 1), RuntimeError, "weight must have"),
    ("head of the inverse", lambda: torch.ops.pyflowgen.invertible_linear(X, W, None, None, None, None, 2, True, 1), RuntimeError, "head is not between"),
    ("too many channels", lambda: torch.ops.pyflowgen.invertible_linear(torch.zeros(2, 65), torch.eye(65), None, None, None, None, 0, False, 1), RuntimeError, "1 to 64 channels"),
    ("row that is not there", lambda: invertible_linear(X, W, sign=S, permutation=torch.arange(6) + 1), RuntimeError, "entry beyond"),
]  # fmt: skip

globals().update(
    op_tests(
        Op(
            name="invertible_linear",
            function=in_dtype(invertible_linear),
            reference=in_dtype(invertible_linear_reference),
            samples=samples,
            small=small,
            operator=operator,
            resize=lambda batch: sample("resize", normal(batch, 4, 3, 5), 3),
            bad=BAD,
            sum_roundings=6,
        )
    )
)


# ------------------------------------------------------------------------------------------------------ the map
@pytest.mark.parametrize("factor", ["lu", "dense"])
@pytest.mark.parametrize("event_dim, shape", [(1, (2, 5)), (3, (2, 3, 2, 3)), (2, (2, 4, 3))])
def test_logdet_is_that_of_the_jacobian(factor: str, event_dim: int, shape: tuple[int, ...]) -> None:
    s = sample("", normal(*shape), event_dim, factor)
    x, *rest = s.tensors
    y, logdet = invertible_linear(x, *rest, **s.options)
    size = x[0].numel()
    for i in range(2):
        f = lambda v, rest=rest, s=s: invertible_linear(v.view(1, *shape[1:]), *rest, **s.options)[0].flatten()  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(f, x[i].flatten()).reshape(size, size)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, logdet[i])
    back, minus = invertible_linear(y, *rest, **(s.options | {"inverse": True}))
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


@pytest.mark.parametrize("factor", ["lu", "dense"])
def test_inverse_of_an_ill_conditioned_map_is_as_good_as_lapacks(factor: str) -> None:
    """An explicit inverse in float32 would lose what the triangular solves keep."""
    torch.manual_seed(0)
    channels = 24
    (weight, *_), options = parameters(channels, factor)
    if factor == "lu":
        weight = weight - torch.diag(torch.linspace(0, 8, channels, dtype=torch.float64))
        matrix = module._matrix(weight, options["permutation"], options["sign"])
    else:
        u, _, v = torch.linalg.svd(weight)
        weight = matrix = u @ torch.diag(torch.logspace(0, -4, channels, dtype=torch.float64)) @ v
    z = normal(5, channels, 6, 6)
    y = torch.einsum("ij,bjhw->bihw", matrix, z).float()
    exact = torch.linalg.solve(matrix, y.double().flatten(2)).reshape(z.shape)
    options = {k: v if k == "permutation" else v.float() for k, v in options.items()}
    plain, _ = invertible_linear_reference(y, weight.float(), inverse=True, event_dim=3, **options)
    ours, _ = invertible_linear(y, weight.float(), inverse=True, event_dim=3, **options)
    assert_close(ours, exact, plain, exact, factor)


def test_a_dense_map_is_pivoted() -> None:
    """Without pivoting the zero on the diagonal would give NaN, the tiny one noise."""
    weight = torch.tensor([[0.0, 2.0, 0.0], [1e-9, 1.0, 1.0], [3.0, 0.0, 1.0]])
    x = torch.randn(4, 3, 5, 5)
    y, logdet = invertible_linear(x, weight, event_dim=3)
    torch.testing.assert_close(y, F.conv2d(x, weight[:, :, None, None]))
    torch.testing.assert_close(invertible_linear(y, weight, inverse=True, event_dim=3)[0], x)
    torch.testing.assert_close(logdet, (25 * torch.linalg.slogdet(weight.double()).logabsdet).float().expand(4))


def test_a_singular_map_says_so() -> None:
    y, logdet = invertible_linear(torch.ones(2, 3), torch.ones(3, 3))
    assert torch.equal(y, torch.full((2, 3), 3.0)) and (logdet == -torch.inf).all()


def test_one_log_determinant_alone_gives_gradients() -> None:
    for factor in ("lu", "dense"):
        s = sample("", normal(3, 4, 5, 5), 3, factor).to(torch.float64, grad=True)
        results = []
        for function in (invertible_linear, invertible_linear_reference):
            _, logdet = function(*s.tensors, **s.options)
            results.append(torch.autograd.grad((logdet * torch.arange(3)).sum(), s.tensors[1:3]))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, head", [((3, 6, 8, 16), 3), ((2, 5, 3, 5), 2), ((7, 6), 3), ((2, 48, 4, 4), 24)])
def test_head_is_the_first_channels_and_its_gradient_joins_theirs(
    shape: tuple[int, ...], head: int, dtype: torch.dtype
) -> None:
    event_dim = len(shape) - 1
    s = sample("", normal(*shape), event_dim).to(dtype, grad=True)
    options = s.options
    args = (*s.tensors, options["permutation"], options["sign"].to(dtype), head, False, event_dim)
    y, logdet, part = module.invertible_linear_head(*args)
    assert torch.equal(part, y[:, :head]) and part.shape[1] == head
    if event_dim == 3:
        assert part.is_contiguous(memory_format=torch.channels_last)
    weights = normal(*shape, seed=3).to(dtype), normal(*part.shape, seed=4).to(dtype)
    got = torch.autograd.grad([y, part], s.tensors, weights)
    total = weights[0].clone()
    total[:, :head] += weights[1]
    y, _ = invertible_linear(*s.tensors, **(options | {"sign": args[5]}))
    want = torch.autograd.grad(y, s.tensors, total)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(
            g, w, rtol=4 * torch.finfo(dtype).eps, atol=16 * torch.finfo(dtype).eps * float(w.abs().max())
        )
    overload = torch.ops.pyflowgen.invertible_linear.default
    torch.library.opcheck(overload, tuple(t.detach() if isinstance(t, Tensor) else t for t in args))


@pytest.mark.parametrize("inverse", [False, True])
def test_backward_operator_is_well_formed(inverse: bool) -> None:
    s = sample("", normal(3, 4, 2, 2).float(), 3).to(torch.float32)
    (x, weight, log_scale, shift), options = s.tensors, s.options
    args = (weight, log_scale, shift, options["permutation"], options["sign"].float(), inverse, 3)
    for dy, dlogdet in ((x, None), (None, x[:, 0, 0, 0].clone()), (x, x[:, 0, 0, 0].clone())):
        torch.library.opcheck(torch.ops.pyflowgen.invertible_linear_backward.default, (dy, dlogdet, None, x, *args))


def test_extreme_values() -> None:
    """Zeros, infinities, NaN and denormals come out as from the reference in float64, at the pixels they are at."""
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, 1e30, -1e30, 1.0])
    x = torch.randn(1, 2, 1, len(edges))
    x[0, 0, 0] = edges
    weight = torch.tensor([[1.0, 0.5], [-0.25, 2.0]])
    for inverse in (False, True):
        got, logdet = invertible_linear(x, weight, inverse=inverse, event_dim=3)
        want, _ = invertible_linear_reference(x.double(), weight.double(), inverse=inverse, event_dim=3)
        torch.testing.assert_close(got, want.float(), equal_nan=True, rtol=1e-6, atol=1e-6)
        assert logdet.isfinite().all()


# ----------------------------------------------------------------------------------------------------- the peers
def test_normflows_invertible_1x1_conv() -> None:
    nf = pytest.importorskip("normflows")
    torch.manual_seed(0)
    for use_lu in (True, False):
        peer = nf.flows.mixing.Invertible1x1Conv(6, use_lu).double()
        with torch.no_grad():
            for p in peer.parameters():
                p.add_(0.1 * torch.randn_like(p))
        options = {}
        if use_lu:
            weight = peer.L.tril(-1) + peer.U.triu(1) + torch.diag(peer.log_S)
            options = dict(permutation=peer.P.argmax(1), sign=peer.sign_S)
        else:
            weight = peer.W
        x = normal(3, 6, 5, 4)
        y, logdet = invertible_linear(x, weight, event_dim=3, **options)
        want, want_logdet = peer.inverse(x)  # its inverse goes to the noise
        torch.testing.assert_close(y, want)
        torch.testing.assert_close(logdet, want_logdet.expand(3))
        back, minus = invertible_linear(x, weight, inverse=True, event_dim=3, **options)
        want, want_logdet = peer(x)
        torch.testing.assert_close(back, want)
        torch.testing.assert_close(minus, want_logdet.expand(3))
        got = torch.autograd.grad((y * x).sum() + logdet.sum(), list(peer.parameters()))
        y, logdet = peer.inverse(x)
        want_grads = torch.autograd.grad((y * x).sum() + logdet.sum() * 3, list(peer.parameters()))
        for g, w in zip(got, want_grads, strict=True):
            torch.testing.assert_close(g, w)


def test_nflows_lu_linear_and_one_by_one_convolution() -> None:
    transforms = pytest.importorskip("nflows.transforms")
    torch.manual_seed(0)
    for image in (False, True):
        peer = (transforms.OneByOneConvolution if image else transforms.LULinear)(6, identity_init=False).double()
        with torch.no_grad():
            peer.bias.normal_()
        # Its diagonal is softplus + eps; its bias comes after the matrix, and a permutation of channels before it.
        lower, upper = peer._create_lower_upper()
        weight = lower.tril(-1) + upper.triu(1) + torch.diag(peer.upper_diag.log())
        options = dict(permutation=torch.arange(6), sign=torch.ones(6, dtype=torch.float64))
        x = normal(3, 6, 5, 4) if image else normal(7, 6)
        moved = x[:, peer.permutation._permutation] if image else x
        bias = peer.bias.reshape(-1, 1, 1) if image else peer.bias
        y, logdet = invertible_linear(moved, weight, event_dim=3 if image else 1, **options)
        want, want_logdet = peer(x)
        torch.testing.assert_close(y + bias, want)
        torch.testing.assert_close(logdet, want_logdet)
        back, minus = invertible_linear(want - bias, weight, inverse=True, event_dim=3 if image else 1, **options)
        torch.testing.assert_close(back, moved)
        torch.testing.assert_close(minus, -want_logdet)


# ---------------------------------------------------------------------------------------------------- the layers
@pytest.mark.parametrize("factor", ["lu", "dense"])
def test_layer_starts_as_a_random_rotation_and_inverts(factor: str) -> None:
    a, b, c = (InvertibleLinear(8, factor=factor, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(a.matrix(), b.matrix()) and not torch.allclose(a.matrix(), c.matrix())
    torch.testing.assert_close(a.matrix() @ a.matrix().T, torch.eye(8), atol=1e-5, rtol=0)
    x = torch.randn(5, 8)
    y, logdet = a(x)
    torch.testing.assert_close(y, x @ a.matrix().T)
    torch.testing.assert_close(logdet, torch.zeros(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(a.inverse(y)[0], x, atol=1e-5, rtol=1e-5)


def test_lu_learns_neither_permutation_nor_sign() -> None:
    layer = Invertible1x1Conv(5)
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert set(layer.state_dict()) == {"weight", "permutation", "sign"}
    before = layer.permutation.clone(), layer.sign.clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x = torch.randn(6, 5, 4, 4)
    for _ in range(5):
        y, logdet = layer(x)
        optimizer.zero_grad()
        (y.square().sum() / 2 - logdet.sum()).div(6 * 16).backward()
        optimizer.step()
    assert torch.equal(before[0], layer.permutation) and torch.equal(before[1], layer.sign)
    torch.testing.assert_close(
        layer(x)[1][0] / 16, torch.linalg.slogdet(layer.matrix()).logabsdet, atol=1e-5, rtol=1e-5
    )


def test_layers_refuse_other_events() -> None:
    for call, message in (
        (lambda: InvertibleLinear(0), "features=0"),
        (lambda: InvertibleLinear(3, factor="qr"), "'lu' or 'dense'"),
        (lambda: InvertibleLinear(3)(torch.zeros(2, 4)), r"weight has shape \(3, 3\), expected \(4, 4\)"),
        (lambda: Invertible1x1Conv(3)(torch.zeros(3, 4)), "at least 3 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_dtype_follows_the_module() -> None:
    layer = Invertible1x1Conv(4).bfloat16()
    y, logdet = layer(torch.randn(2, 4, 3, 3).bfloat16())
    assert y.dtype == torch.bfloat16 and logdet.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = Invertible1x1Conv(4)(torch.randn(2, 4, 3, 3).bfloat16())
    assert y.dtype == torch.float32


def test_inputs_are_not_changed_and_reference_path_agrees() -> None:
    s = sample("", normal(3, 12, 16, 16).float(), 3).to(torch.float32, grad=True)
    got, grads = run(in_dtype(invertible_linear), s)
    with pyflowgen.reference_path():
        want, want_grads = run(in_dtype(invertible_linear), s)
    for a, b in zip([*got, *grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
