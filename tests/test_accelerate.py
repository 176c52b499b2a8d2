"""Models of other libraries on the kernels: the same numbers, parameters, files and errors as before."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyflowgen
from pyflowgen import _native

nflows = pytest.importorskip("nflows.transforms")
nets = pytest.importorskip("nflows.nn.nets")
flows = pytest.importorskip("nflows.flows")
normflows = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")
blocks = pytest.importorskip("FrEIA.modules")
freia = pytest.importorskip("FrEIA.framework")
from nflows.distributions import StandardNormal  # noqa: E402

kernel = pytest.mark.skipif("library" not in pyflowgen.build_info(), reason="no compiled library")
FEATURES = 5


# -------------------------------------------------------------------------------------------------------- models
def drawn(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.double()


NFLOWS: dict[str, Callable[..., Any]] = {
    "affine": nflows.AffineCouplingTransform,
    "additive": nflows.AdditiveCouplingTransform,
    "rational quadratic": functools.partial(nflows.PiecewiseRationalQuadraticCouplingTransform, num_bins=5, tails="linear", tail_bound=2.0),
    "unconditional too": functools.partial(nflows.PiecewiseRationalQuadraticCouplingTransform, num_bins=5, tails="linear", tail_bound=2.0, apply_unconditional_transform=True),
    "linear": functools.partial(nflows.PiecewiseLinearCouplingTransform, num_bins=5, tails="linear", tail_bound=2.0),
    "quadratic": functools.partial(nflows.PiecewiseQuadraticCouplingTransform, num_bins=5, tails="linear", tail_bound=2.0),
    "cubic": functools.partial(nflows.PiecewiseCubicCouplingTransform, num_bins=5, tails="linear", tail_bound=2.0),
}  # fmt: skip


def by_nflows(kind: str, context: int | None = None, masks: str = "alternating", **net: Any) -> Any:
    layers: list[Any] = []
    for i in range(3):
        mask = (torch.arange(FEATURES) % 2 * 2 - 1) * (-1) ** i
        if masks == "uneven":
            mask = torch.tensor([1, -1, -1, 1, -1]) * (-1) ** i

        def create(n_in: int, n_out: int) -> nn.Module:
            return nets.ResidualNet(n_in, n_out, hidden_features=8, context_features=context, **net)

        if kind == "autoregressive":
            coupling = nflows.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                FEATURES, 8, context_features=context, num_bins=5, tails="linear", tail_bound=2.0
            )
        else:
            coupling = NFLOWS[kind](mask, create)
        inner = [coupling, nflows.RandomPermutation(FEATURES)]
        layers += [nflows.ActNorm(FEATURES), nflows.CompositeTransform(inner), nflows.LULinear(FEATURES)]
    return drawn(flows.Flow(nflows.CompositeTransform(layers), StandardNormal([FEATURES])))


def by_normflows(kind: str, features: int = FEATURES) -> Any:
    half, layers = features // 2, []
    for i in range(3):
        if kind == "rational quadratic":
            layers += [normflows.flows.CoupledRationalQuadraticSpline(features, 2, 8, reverse_mask=bool(i % 2))]
            layers += [normflows.flows.LULinearPermute(features)]
        elif kind == "autoregressive":
            layers += [normflows.flows.AutoregressiveRationalQuadraticSpline(features, 2, 8)]
        elif kind == "second half":
            net = normflows.nets.MLP([half, 8, 2 * (features - half)], leaky=0.01)
            layers += [normflows.flows.AffineCouplingBlock(net, split_mode="channel_inv")]
        else:
            net = normflows.nets.MLP([features - half, 8, 8, half * (1 if kind == "additive" else 2)])
            layers += [
                normflows.flows.AffineCouplingBlock(net, scale=kind != "additive", scale_map=kind),
                normflows.flows.Permute(features, mode="shuffle" if i else "swap"),
                normflows.flows.ActNorm(features),
            ]
    return drawn(normflows.NormalizingFlow(normflows.distributions.DiagGaussian(features), layers))


RQS = zuko.transforms.MonotonicRQSTransform
ZUKO: dict[str, Callable[..., Any]] = {
    "RealNVP": functools.partial(zuko.flows.RealNVP, hidden_features=(8, 8)),
    "random masks": functools.partial(zuko.flows.RealNVP, hidden_features=(8,), randmask=True, activation=nn.ELU),
    "splines": functools.partial(zuko.flows.RealNVP, hidden_features=(8, 8), univariate=RQS, shapes=((5,), (5,), (4,))),
    "bound": functools.partial(
        zuko.flows.RealNVP, hidden_features=(8, 8), univariate=functools.partial(RQS, bound=2.0, slope=1e-2), shapes=((5,), (5,), (4,))
    ),
    "NSF": functools.partial(zuko.flows.NSF, bins=5, hidden_features=(8, 8)),
}  # fmt: skip


def by_zuko(kind: str, context: int = 0) -> Any:
    return drawn(ZUKO[kind](FEATURES, context, transforms=3))


FREIA: dict[str, tuple[str, dict[str, Any]]] = {
    "GLOW": ("GLOWCouplingBlock", {}),
    "tanh": ("GLOWCouplingBlock", {"clamp_activation": "TANH", "clamp": 1.3}),
    "sigmoid": ("GLOWCouplingBlock", {"clamp_activation": "SIGMOID", "split_len": 0.3}),
    "RNVP": ("RNVPCouplingBlock", {}),
    "NICE": ("NICECouplingBlock", {}),
    "all in one": ("AllInOneBlock", {}),
    "other scaling": ("AllInOneBlock", {"global_affine_type": "EXP", "affine_clamping": 1.0}),
    "rotation": ("AllInOneBlock", {"permute_soft": True}),
    "reflections": ("AllInOneBlock", {"learned_householder_permutation": 2}),
    "permuted before": ("AllInOneBlock", {"reverse_permutation": True}),
}  # fmt: skip


def by_freia(kind: str, context: int = 0, image: bool = False) -> Any:
    def perceptron(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n_in, 8), nn.ReLU(), nn.Linear(8, n_out))

    def convolutions(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(n_in, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, n_out, 3, padding=1))

    name, options = FREIA[kind]
    model = freia.SequenceINN(*((4, 3, 3) if image else (FEATURES,)))
    for _ in range(3):
        condition = {"cond": 0, "cond_shape": (context,)} if context else {}
        net = convolutions if image else perceptron
        model.append(getattr(blocks, name), **condition, subnet_constructor=net, **options)
    for p in model.parameters():
        if p.requires_grad:  # not the permutations
            nn.init.normal_(p, std=0.3)
    return model.double()


def pair(model: Any) -> tuple[Any, Any]:
    """(the model, a copy of it that is accelerated)."""
    return model, pyflowgen.accelerate(copy.deepcopy(model))


def check(plain: Any, fast: Any, function: Callable[[Any], Any], rtol: float = 1e-9) -> None:
    """Equal values, and gradients of all parameters."""
    values = [v if isinstance(v, tuple) else (v,) for v in (function(plain), function(fast))]
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(
            b, a, rtol=rtol, atol=max(rtol, 1e-6), check_dtype=False
        )  # normflows sums in float32
    grads = [
        torch.autograd.grad(
            sum(v.square().sum() for v in value), [p for p in m.parameters() if p.requires_grad], allow_unused=True
        )
        for m, value in zip((plain, fast), values, strict=True)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(b, a, rtol=max(rtol, 1e-6), atol=max(rtol, 1e-6))


class Count:
    """How often operators whose names begin so were called inside the block."""

    def __init__(self, *names: str) -> None:
        self.names, self.found = names, 0

    def __enter__(self) -> Count:
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profile.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.profile.__exit__(*exception)
        names = tuple(f"pyflowgen::{name}" for name in self.names)
        self.found = sum(e.count for e in self.profile.key_averages() if e.key in names)


X = torch.randn(16, FEATURES, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
CONTEXT = torch.randn(16, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# --------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("masks", ["alternating", "uneven"])
@pytest.mark.parametrize("context", [None, 3])
@pytest.mark.parametrize("kind", [*NFLOWS, "autoregressive"])
def test_nflows(kind: str, context: int | None, masks: str) -> None:
    if kind == "autoregressive" and masks == "uneven":
        return  # it has none
    c = None if context is None else CONTEXT
    model = by_nflows(kind, context, masks)
    plain, fast = pair(model)
    check(plain, fast, lambda m: m.log_prob(X, context=c))  # sets the ActNorms
    check(plain, fast, lambda m: m._transform(X, c))
    if kind == "linear":  # nflows' own inverse errs in the fifth digit
        torch.testing.assert_close(fast._transform.inverse(fast._transform(X, c)[0], c)[0], X)
        return
    check(plain, fast, lambda m: m._transform.inverse(0.5 * X, c), rtol=1e-7)
    for m in (plain, fast):
        torch.manual_seed(0)
        m.drawn = m.sample(4, context=c)
    torch.testing.assert_close(fast.drawn, plain.drawn, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("features", [4, 5])
@pytest.mark.parametrize("kind", ["exp", "sigmoid", "sigmoid_inv", "additive", "second half", "rational quadratic", "autoregressive"])  # fmt: skip
def test_normflows(kind: str, features: int) -> None:
    x = X[:, :features]
    plain, fast = pair(by_normflows(kind, features))
    for function in ("forward", "log_prob", "forward_and_log_det", "inverse_and_log_det", "forward_kld", "inverse"):
        check(plain, fast, lambda m, f=function: getattr(m, f)(x), rtol=1e-5)
    for m in (plain, fast):
        torch.manual_seed(0)
        m.drawn = m.sample(7)
    for a, b in zip(plain.drawn, fast.drawn, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("kind", list(ZUKO))
def test_zuko(kind: str, context: int) -> None:
    c = CONTEXT if context else None
    plain, fast = pair(by_zuko(kind, context))
    check(plain, fast, lambda m: m(c).log_prob(X))
    check(plain, fast, lambda m: m(c).transform(X))
    check(plain, fast, lambda m: m(c).transform.inv(X))
    check(plain, fast, lambda m: m(c).transform.inv.call_and_ladj(X), rtol=1e-6)
    check(plain, fast, lambda m: m(c).transform.log_abs_det_jacobian(X, X))
    check(plain, fast, lambda m: m(c).transform(X[:1]) if c is None else m(c[:1]).transform(X[0]))
    for name in ("sample", "rsample"):
        results = []
        for m in (plain, fast):
            torch.manual_seed(0)
            results.append(getattr(m(c), name)((2,)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-7)
    if not context and kind in ("RealNVP", "splines"):
        t = (m.transform.transforms[0](None) for m in (plain, fast))
        for a, b in zip(*[(x(X), x.inv(X), x.log_abs_det_jacobian(X, X), *x.call_and_ladj(X)) for x in t], strict=True):
            torch.testing.assert_close(b, a)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("kind", list(FREIA))
def test_freia(kind: str, context: int) -> None:
    c = [CONTEXT] if context else None
    plain, fast = pair(by_freia(kind, context))
    assert pyflowgen.accelerated(fast).keys() == {"", *(f"module_list.{i}" for i in range(3))}
    for rev in (False, True):
        check(plain, fast, lambda m, rev=rev: floats(m(X, c, rev=rev)), rtol=1e-7)


def floats(result: tuple[Tensor, Any]) -> tuple[Tensor, Tensor]:
    """NICE's log-determinant is the number 0."""
    y, logdet = result
    return y, torch.as_tensor(logdet, dtype=y.dtype).expand(len(y))


@pytest.mark.parametrize("kind", list(FREIA))
def test_images_of_freia(kind: str) -> None:
    plain, fast = pair(by_freia(kind, image=True))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    for rev in (False, True):
        check(plain, fast, lambda m, rev=rev: floats(m(x, rev=rev)), rtol=1e-7)


@kernel
@pytest.mark.parametrize("kind", ["GLOW", "NICE", "all in one"])
def test_blocks_of_freia_are_one_operator(kind: str) -> None:
    fast = pyflowgen.accelerate(by_freia(kind))
    for rev in (False, True):
        with Count("mlp_coupling") as operators:
            fast(X, rev=rev)
        assert operators.found == 1


def test_clamping_of_ones_own_is_left_alone() -> None:
    model = freia.SequenceINN(4)
    model.append(blocks.GLOWCouplingBlock, subnet_constructor=nn.Linear, clamp_activation=torch.sin)
    model.append(blocks.AllInOneBlock, subnet_constructor=nn.Linear, gin_block=True)
    with pytest.warns(UserWarning, match="no layer that is known"):
        pyflowgen.accelerate(model)
    assert list(pyflowgen.accelerated(model)) == [""]


def test_splines_of_zuko_still_tell_their_knots() -> None:
    plain, fast = pair(by_zuko("NSF"))
    params = [torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 4)]
    a, b = (m.transform.transforms[0].univariate(*params) for m in (plain, fast))
    assert type(a) is not type(b) and isinstance(b, RQS) and b.bins == 5
    torch.testing.assert_close(b.horizontal, a.horizontal)
    with pytest.raises(AttributeError, match="nothing"):
        _ = b.nothing


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type) -> None:
    plain, fast = pair(nn.ModuleDict({"layers": kind(3, 4, num_layers=2, bidirectional=True).double()}))
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    check(plain, fast, lambda m: m["layers"](x)[0])
    assert pyflowgen.accelerated(fast) == {"layers": kind.__name__} and type(fast["layers"]) is not kind
    again = pickle.loads(pickle.dumps(fast))
    torch.testing.assert_close(again["layers"](x)[0], fast["layers"](x)[0])
    assert type(pyflowgen.restore(fast)["layers"]) is kind and vars(fast["layers"]).keys() == vars(plain["layers"]).keys()  # fmt: skip


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_recurrent_cells(kind: type) -> None:
    plain, fast = pair(kind(3, 4).double())
    x = torch.randn(2, 3, dtype=torch.float64)
    check(plain, fast, lambda m: m(x))
    assert type(pyflowgen.restore(fast)) is kind and vars(fast).keys() == vars(plain).keys()


# --------------------------------------------------------------------------------------------------- what runs
@kernel
@pytest.mark.parametrize("masks", ["alternating", "uneven"])
def test_a_run_of_couplings_is_one_operator(masks: str) -> None:
    layers: list[Any] = []
    for i in range(4):
        mask = torch.tensor([1, -1, 1, -1, 1] if masks == "alternating" else [1, -1, -1, 1, -1]) * (-1) ** i
        layers += [
            nflows.AffineCouplingTransform(mask, lambda a, b: nets.ResidualNet(a, b, hidden_features=8)),
            nflows.ReversePermutation(FEATURES),
        ]
    fast = pyflowgen.accelerate(nflows.CompositeTransform(layers))
    for direction in (fast.forward, fast.inverse):
        with Count("mlp_coupling") as operators:
            direction(torch.randn(3, FEATURES))
        assert operators.found == 1


@kernel
@pytest.mark.parametrize(
    "model, operators",
    [
        (lambda: by_nflows("affine"), ["mlp_coupling"]),
        (lambda: by_nflows("unconditional too"), ["rational_quadratic_spline"]),
        (lambda: by_nflows("cubic"), ["polynomial_spline"]),
        (lambda: by_nflows("autoregressive"), ["rational_quadratic_spline"]),
        (lambda: by_nflows("affine"), ["invertible_linear"]),
        (lambda: by_normflows("rational quadratic"), ["invertible_linear"]),
        (lambda: by_normflows("exp"), ["mlp_coupling"]),
        (lambda: by_normflows("rational quadratic"), ["rational_quadratic_spline"]),
    ],
)
def test_kernels_run(model: Callable[[], Any], operators: list[str]) -> None:
    fast = pyflowgen.accelerate(model())
    with Count(*operators) as count:
        fast.log_prob(X)
    assert count.found
    with Count(*operators) as count:
        pyflowgen.restore(fast).log_prob(X)
    assert not count.found


@kernel
@pytest.mark.parametrize("kind", list(ZUKO))
def test_kernels_run_for_zuko(kind: str) -> None:
    fast = pyflowgen.accelerate(by_zuko(kind))
    with Count("mlp_coupling", "rational_quadratic_spline") as count:
        fast().log_prob(X)
    assert count.found == (3 if kind == "NSF" else 1)


# ------------------------------------------------------------------------------------------ what stays as it is
@pytest.mark.parametrize("model", [lambda: by_nflows("affine"), lambda: by_normflows("exp"), lambda: by_zuko("RealNVP")])  # fmt: skip
def test_the_model_stays_the_same(model: Callable[[], Any]) -> None:
    plain = model()
    kinds = [type(m) for m in plain.modules()]
    names, text = list(plain.state_dict()), repr(plain)
    parameters, random = list(plain.parameters()), torch.get_rng_state()
    fast = pyflowgen.accelerate(plain)
    assert fast is plain and torch.equal(random, torch.get_rng_state())
    assert list(fast.state_dict()) == names and repr(fast) == text
    assert all(a is b for a, b in zip(parameters, fast.parameters(), strict=True))
    assert all(isinstance(m, kind) for m, kind in zip(fast.modules(), kinds, strict=True))
    swapped = pyflowgen.accelerated(fast)
    assert swapped and pyflowgen.accelerated(pyflowgen.accelerate(fast)) == swapped  # twice is once

    def density(m: Any) -> Tensor:
        return (m() if isinstance(m, zuko.lazy.Flow) else m).log_prob(X)

    want = density(fast)
    torch.testing.assert_close(density(copy.deepcopy(fast)), want)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(density(loaded), want)
    assert pyflowgen.accelerated(loaded) == swapped
    other = model()
    other.load_state_dict(fast.state_dict())
    torch.testing.assert_close(density(other), want)
    pyflowgen.restore(fast)
    assert [type(m) for m in fast.modules()] == kinds and not pyflowgen.accelerated(fast)
    assert all("_pyflowgen" not in vars(m) for m in fast.modules())
    torch.testing.assert_close(density(fast), want)


def test_parameters_may_change_afterwards() -> None:
    plain, fast = pair(by_nflows("affine"))
    check(plain, fast, lambda m: m.log_prob(X))
    for m in (plain, fast):
        for p in m.parameters():
            p.data = p.data * 1.5  # as optimizers and `to` may
        coupling = m._transform._transforms[1]._transforms[0]
        coupling.transform_net.final_layer = copy.deepcopy(coupling.transform_net.final_layer).requires_grad_(False)
        m._transform._transforms.append(nflows.ReversePermutation(FEATURES))
    check(plain, fast, lambda m: m.log_prob(X))


@pytest.mark.parametrize("make", [lambda: by_nflows("affine", None, "uneven"), lambda: by_zuko("random masks")])
def test_masks_may_come_from_a_file(make: Callable[[], Any]) -> None:
    def density(m: Any) -> Tensor:
        return (m() if isinstance(m, zuko.lazy.Flow) else m).log_prob(X)

    torch.manual_seed(0)
    fast, other = pyflowgen.accelerate(make().eval()), make().eval()
    density(fast)
    buffers = {k: v for k, v in other.state_dict().items() if k.endswith(("_features", "mask"))}
    for name, flipped in buffers.items():  # the same numbers of channels, elsewhere
        flipped.copy_(FEATURES - 1 - flipped if name.endswith("_features") else flipped.flip(0))
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(density(fast), density(other))


def test_the_dtype_may_change_afterwards() -> None:
    plain, fast = pair(by_nflows("affine").eval())
    for dtype in (torch.float64, torch.float32, torch.float64):
        a, b = (m.to(dtype).log_prob(X.to(dtype)) for m in (plain, fast))
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)


def test_data_dependent_initialisation_happens() -> None:
    model = by_nflows("affine")
    fast = pyflowgen.accelerate(model)
    assert not any(m.initialized for m in model.modules() if isinstance(m, nflows.ActNorm))
    fast.log_prob(X)
    assert all(m.initialized for m in model.modules() if isinstance(m, nflows.ActNorm))


@pytest.mark.parametrize("where", ["coupling", "net", "linear", "permutation", "composite"])
def test_hooks_run(where: str) -> None:
    plain, fast = pair(by_nflows("affine").eval())
    for m in (plain, fast):
        composite = m._transform._transforms[1]
        coupling, permutation = composite._transforms
        module = {
            "coupling": coupling, "net": coupling.transform_net, "linear": coupling.transform_net.final_layer,
            "permutation": permutation, "composite": composite,
        }[where]  # fmt: skip
        m.seen = []
        module.register_forward_hook(lambda module, args, output, m=m: m.seen.append(1))
    check(plain, fast, lambda m: m.log_prob(X))
    if where != "composite":  # those inside another are taken apart
        assert len(fast.seen) == len(plain.seen) == 1


def test_dropout_in_training_draws_as_before() -> None:
    plain, fast = pair(by_nflows("affine", dropout_probability=0.5))
    results = []
    for m in (plain, fast):
        torch.manual_seed(0)
        results.append(m.log_prob(X))
    torch.testing.assert_close(*results)
    plain.eval(), fast.eval()
    with Count("mlp_coupling") as count:
        check(plain, fast, lambda m: m.log_prob(X))
    assert count.found or "library" not in pyflowgen.build_info()


@pytest.mark.parametrize("net", [{"use_batch_norm": True}, {"activation": torch.sin}, {"activation": nn.functional.gelu}, {"num_blocks": 0}])  # fmt: skip
def test_other_networks(net: dict[str, Any]) -> None:
    plain, fast = pair(by_nflows("affine", **net))
    for m in (plain, fast):
        m.log_prob(X)
        m.eval()
    check(plain, fast, lambda m: m.log_prob(X))


@pytest.mark.parametrize("kind", ["affine", "rational quadratic"])
def test_images(kind: str) -> None:
    def create(n_in: int, n_out: int) -> nn.Module:
        return nets.ConvResidualNet(n_in, n_out, hidden_channels=4, num_blocks=1)

    plain, fast = pair(NFLOWS[kind](torch.tensor([1, -1, 1, -1]), create).double())
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    check(plain, fast, lambda m: m(x))
    check(plain, fast, lambda m: m.inverse(x), rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model = by_nflows("affine").eval().to(dtype)
    plain, fast = pair(model)
    x, tolerance = X.to(dtype), 1e-4 if dtype is torch.float32 else 0.0
    layer = "_transforms.1"
    a, b = (m._transform.get_submodule(layer)(x) for m in (plain, fast))
    for u, v in zip(a, b, strict=True):
        assert u.dtype is v.dtype
        torch.testing.assert_close(v, u, rtol=tolerance, atol=tolerance)


def test_double_backward_and_reference() -> None:
    plain, fast = pair(by_nflows("rational quadratic").eval())
    curvature = []
    for m in (plain, fast):
        x = X.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(m.log_prob(x).sum(), x, create_graph=True)
        curvature.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    torch.testing.assert_close(curvature[1], curvature[0], rtol=1e-6, atol=1e-6)
    with pyflowgen.reference_path():
        check(plain, fast, lambda m: m.log_prob(X))


def test_errors_are_the_librarys() -> None:
    _, fast = pair(NFLOWS["affine"](torch.tensor([1, -1]), lambda a, b: nets.ResidualNet(a, b, hidden_features=4)))
    with pytest.raises(ValueError, match="Expected features = 2, got 3"):
        fast(torch.randn(4, 3))
    with pytest.raises(ValueError, match="2D or a 4D"):
        fast(torch.randn(2))
    inside = nflows.PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([1, -1]), lambda a, b: nets.ResidualNet(a, b, hidden_features=4)
    )
    with pytest.warns(UserWarning, match="no layer that is known"):
        pyflowgen.accelerate(inside)
    with pytest.raises(nflows.InputOutsideDomain):
        inside(torch.full((2, 2), 3.0))


def test_forks_are_known_and_other_arithmetic_is_left_alone() -> None:
    plain = nflows.AffineCouplingTransform
    fork = type("AffineCouplingTransform", (plain,), {"__module__": "fork.nflows.transforms.coupling"})

    def shrunk(self: Any, inputs: Tensor, transform_params: Tensor) -> tuple[Tensor, Tensor]:
        y, logdet = plain._coupling_transform_forward(self, inputs, transform_params)
        return 0.5 * y, logdet

    changed = type("AffineCouplingTransform", (plain,), {"__module__": fork.__module__, "_coupling_transform_forward": shrunk})  # fmt: skip
    subclass = type("Mine", (plain,), {})

    def layer(kind: Any) -> Any:
        return kind(torch.tensor([1, -1, 1]), lambda a, b: nets.ResidualNet(a, b, hidden_features=4))

    assert pyflowgen.accelerated(pyflowgen.accelerate(layer(fork)))
    with pytest.warns(UserWarning, match="computes something else"):
        left = pyflowgen.accelerate(layer(changed))
    assert type(left) is changed
    with pytest.warns(UserWarning, match="no layer that is known"):
        assert type(pyflowgen.accelerate(layer(subclass))) is subclass


def test_what_is_not_a_module() -> None:
    with pytest.raises(TypeError, match="expected a torch.nn.Module"):
        pyflowgen.accelerate("model")  # type: ignore[type-var]
    with pytest.warns(UserWarning, match="nothing was changed"):
        pyflowgen.accelerate(nn.Linear(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pyflowgen.accelerate(nn.LSTM(2, 3))


def test_without_kernels_the_library_itself_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = pair(by_nflows("affine"))
    monkeypatch.setattr(_native, "_kernels", set())
    with Count("mlp_coupling", "affine_coupling", "invertible_linear") as count:
        assert torch.equal(fast.log_prob(X), plain.log_prob(X))
    assert not count.found
