"""The contract of bijections, held for every one of them and for their compositions."""

from __future__ import annotations

import contextlib
import copy
import doctest
import importlib
import math

import pytest
import torch
from torch import nn

import pyflowgen
from pyflowgen.bijection import Bijection, Chain, Inverse, sum_event
from pyflowgen.layers import ActNorm, Dequantize, GlowStep, Logit, MultiScale, Permutation, Scale, Squeeze
from pyflowgen.linear_flows import Householder, MatrixExponential
from pyflowgen.low_rank_flows import Planar, Radial, Sylvester
from pyflowgen.nets import MLP, ConvNet, ConvResNet, NormalPrior
from pyflowgen.ops.affine_coupling import AdditiveCoupling, AffineCoupling
from pyflowgen.ops.invertible_linear import Invertible1x1Conv, InvertibleLinear
from pyflowgen.residual_flow import LipschitzMLP, ResidualFlow


def randomise(module: nn.Module, spread: float = 0.4) -> nn.Module:
    """Parameters away from their starting values, where many mistakes cannot be seen."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(spread * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p))
    return module


def vector_chain(context_features: int = 0) -> Chain:
    def net(n_in: int, n_out: int) -> MLP:
        return MLP(n_in, [8], n_out, "tanh", context_features=context_features)

    return Chain(
        ActNorm(6, init=False),
        AffineCoupling(net(3, 6), mask="halves", scale="tanh"),
        Permutation.random(6, seed=3),
        AdditiveCoupling(net(3, 3), mask="interleaved"),
        AffineCoupling(net(3, 6), mask="halves", swap=True, scale="sigmoid"),
        Scale(6, init=False),
    )


def image_chain() -> Chain:
    return Chain(
        ActNorm(2, event_dim=3, init=False),
        AffineCoupling(
            ConvResNet(2, 4, 4, blocks=1, activation="tanh"), mask="checkerboard", scale="tanh", event_dim=3
        ),
        Squeeze(),
        Permutation.reverse(8, dim=-3),
        AffineCoupling(ConvResNet(4, 4, 8, blocks=1, activation="tanh"), mask="channel", scale="tanh", event_dim=3),
    )


def multi_scale() -> MultiScale:
    first = Chain(ActNorm(1, event_dim=3, init=False), Squeeze(), Scale((4, 2, 2), init=False))
    return MultiScale([first, ActNorm(2, event_dim=3, init=False)], (1, 4, 4))


def glow_step(features: int, additive: bool, factor: str) -> GlowStep:
    net = ConvNet(features - features // 2, 4, features // 2 * (1 if additive else 2))
    step = GlowStep(features, net, additive=additive, factor=factor)  # type: ignore[arg-type]
    step.actnorm = ActNorm(features, event_dim=3, init=False)
    return step


def multi_scale_with_priors() -> MultiScale:
    return MultiScale([Squeeze(), Squeeze()], (1, 4, 4), [NormalPrior(2, 2), NormalPrior(8)])


BIJECTIONS = {
    "permutation": (lambda: Permutation.random(5, seed=0), (5,)),
    "permutation_channels": (lambda: Permutation.random(3, seed=0, dim=-3), (3, 2, 2)),
    "actnorm": (lambda: ActNorm(4, init=False), (4,)),
    "actnorm_image": (lambda: ActNorm(2, event_dim=3, init=False), (2, 3, 2)),
    "actnorm_sequence": (lambda: ActNorm(2, event_dim=2, init=False), (2, 5)),
    "invertible_linear": (lambda: InvertibleLinear(4), (4,)),
    "invertible_linear_dense": (lambda: InvertibleLinear(3, event_dim=2, factor="dense"), (3, 2)),
    "invertible_1x1_conv": (lambda: Invertible1x1Conv(4), (4, 3, 2)),
    "scale": (lambda: Scale((2, 3), init=False), (2, 3)),
    "squeeze": (Squeeze, (2, 4, 2)),
    "logit": (lambda: Logit(0.05), (4,)),
    "logit_image": (lambda: Logit(0.01, event_dim=3), (1, 2, 3)),
    "inverse": (lambda: Inverse(Chain(ActNorm(3, init=False), Permutation.reverse(3))), (3,)),
    "chain": (vector_chain, (6,)),
    "chain_image": (image_chain, (2, 2, 2)),
    "multi_scale": (multi_scale, (1, 4, 4)),
    "householder": (lambda: Householder(5, 3), (5,)),
    "matrix_exponential": (lambda: MatrixExponential(4), (4,)),
    "matrix_exponential_image": (lambda: MatrixExponential(3, event_dim=3), (3, 2, 4)),
    "rotation": (lambda: MatrixExponential(4, skew=True), (4,)),
    "planar": (lambda: Planar(4), (4,)),
    "radial": (lambda: Radial(4), (4,)),
    "sylvester": (lambda: Sylvester(5, 3), (5,)),
    "sylvester_householder": (lambda: Sylvester(4, frame="householder"), (4,)),
    "sylvester_triangular": (lambda: Sylvester(4, frame="triangular", flip=True), (4,)),
    "residual_flow": (lambda: ResidualFlow(LipschitzMLP(4, [8], lipschitz=0.6)).eval(), (4,)),
    "multi_scale_with_priors": (multi_scale_with_priors, (1, 4, 4)),
    "glow_step": (lambda: glow_step(4, False, "lu"), (4, 2, 3)),
    "glow_step_odd": (lambda: glow_step(5, False, "dense"), (5, 2, 2)),
    "glow_step_additive": (lambda: glow_step(3, True, "lu"), (3, 2, 2)),
}


def make(name: str, dtype: torch.dtype = torch.float64) -> tuple[Bijection, tuple[int, ...]]:
    build, event = BIJECTIONS[name]
    return randomise(build().to(dtype)), event  # type: ignore[return-value]


def data(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Inside (0, 1), so that every bijection is defined on it."""
    return (
        torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).mul(0.96).add(0.02).to(dtype)
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than such small tensors take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest):
    with pyflowgen.reference_path() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("name", BIJECTIONS)
def test_logdet_is_that_of_the_jacobian(name, path):
    f, event = make(name)
    x = data(3, *event)
    y, logdet = f(x)
    _, back = f.inverse(y)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v)[0], x[i])
        size = math.prod(event)
        expected = torch.linalg.slogdet(jacobian.reshape(size, size)).logabsdet
        torch.testing.assert_close(logdet[i], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(back[i], -expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("name", BIJECTIONS)
def test_round_trip(name, dtype, tol, path):
    f, event = make(name, dtype)
    x = data(7, *event, dtype=dtype)
    y, logdet = f(x)
    back, minus = f.inverse(y)
    assert y.dtype == back.dtype == logdet.dtype == minus.dtype == dtype
    assert y.shape == (7, *f.output_shape(event)) and back.shape == x.shape
    torch.testing.assert_close(back, x, rtol=tol, atol=tol)
    torch.testing.assert_close(minus, -logdet, rtol=10 * tol, atol=10 * tol)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_any_leading_dimensions(name):
    f, event = make(name)
    x = data(6, *event)
    y, logdet = f(x)
    out = f.output_shape(event)
    for batch in [(), (2, 3), (1, 6), (6, 1, 1), (0,)]:
        n = math.prod(batch)
        yb, lb = f(x[:n].reshape(*batch, *event))
        assert yb.shape == (*batch, *out) and lb.shape == batch
        torch.testing.assert_close(yb.reshape(n, *out), y[:n])
        torch.testing.assert_close(lb.reshape(n), logdet[:n])
        xb, mb = f.inverse(yb)
        assert xb.shape == (*batch, *event) and mb.shape == batch


@pytest.mark.parametrize("name", BIJECTIONS)
def test_bfloat16_keeps_its_type_and_sums_in_float32(name):
    f, event = make(name, torch.float32)
    x = data(4, *event, dtype=torch.bfloat16)
    y32, logdet32 = f(x.float())
    y, logdet = f.bfloat16()(x)
    assert y.dtype == torch.bfloat16 and logdet.dtype == torch.float32
    torch.testing.assert_close(y.float(), y32, rtol=0.1, atol=0.2)
    torch.testing.assert_close(logdet, logdet32, rtol=0.1, atol=0.3)


@pytest.mark.parametrize("name", BIJECTIONS)
def test_state_dict_and_deepcopy_give_the_same_map(name):
    f, event = make(name)
    build, _ = BIJECTIONS[name]
    g = build().double()
    g.load_state_dict(f.state_dict())
    x = data(3, *event)
    for other in (g, copy.deepcopy(f)):
        torch.testing.assert_close(other(x), f(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name",
    ["chain", "chain_image", "multi_scale", "logit", "householder", "planar", "radial", "sylvester", "residual_flow"],
)
def test_gradients_of_both_outputs(name):
    f, event = make(name)
    x = data(2, *event).requires_grad_()
    y = f(x)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(f, (x,), fast_mode=True)
    assert torch.autograd.gradcheck(f.inverse, (y,), fast_mode=True)


def test_chain_goes_forward_in_order_and_back():
    double, shift = Scale(1, init=False), ActNorm(1, init=False)
    with torch.no_grad():
        double.log_scale.fill_(math.log(2))
        shift.shift.fill_(1)
    chain = Chain(double, shift)
    assert chain(torch.tensor([[3.0]]))[0].item() == pytest.approx(7)
    assert chain.inverse(torch.tensor([[7.0]]))[0].item() == pytest.approx(3)
    assert len(chain) == 2 and chain[0] is double and list(chain) == [double, shift]
    part = chain[1:]
    assert isinstance(part, Chain) and part[0] is shift
    assert [n for n, _ in chain.named_parameters()][0] == "bijections.0.log_scale"


def test_chain_of_volume_preserving_maps_gives_a_zero_per_row():
    chain = Chain(Permutation.reverse(3), Permutation.random(3, seed=1))
    assert chain.volume_preserving
    y, logdet = chain(torch.randn(4, 3))
    assert torch.equal(logdet, torch.zeros(4))
    assert torch.equal(chain.inverse(y)[1], torch.zeros(4))


def test_context_reaches_the_conditioners():
    f = randomise(vector_chain(context_features=2).double())
    x, context = data(5, 6), data(5, 2)
    y, logdet = f(x, context)
    back, minus = f.inverse(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    other, _ = f(x, context + 1)
    assert (y - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"context.*expected \(\.\.\., 2\)"):
        f(x)
    with pytest.raises(ValueError, match="context"):
        f(x, data(5, 3))


def test_sum_event_counts_dimensions_and_keeps_float64():
    x = torch.arange(24.0, dtype=torch.float64).reshape(2, 3, 4)
    assert torch.equal(sum_event(x, 0), x)
    assert torch.equal(sum_event(x, 2), x.sum((1, 2)))
    assert sum_event(x.half(), 1).dtype == torch.float32


def test_wrong_use_is_refused_in_words():
    with pytest.raises(ValueError, match="empty"):
        Chain()
    with pytest.raises(TypeError, match=r"bijections\[1\] is Linear"):
        Chain(Squeeze(), nn.Linear(2, 2))  # type: ignore[arg-type]
    for method in (Bijection().forward, Bijection().inverse):
        with pytest.raises(NotImplementedError):
            method(torch.zeros(1))


@pytest.mark.parametrize(
    "module", ["bijection", "layers", "nets", "flow", "models.nice", "models.realnvp", "models.glow"]
)
def test_docstring_examples(module):
    result = doctest.testmod(importlib.import_module(f"pyflowgen.{module}"))
    assert result.attempted > 0 and result.failed == 0


def test_every_layer_is_under_test():
    import pyflowgen.layers as layers

    known = {
        n
        for n, c in vars(layers).items()
        if isinstance(c, type) and issubclass(c, Bijection) and n[0] != "_" and c.__module__ == layers.__name__
    }
    assert known == {
        c.__name__ for c in (ActNorm, Dequantize, GlowStep, Logit, MultiScale, Permutation, Scale, Squeeze)
    }
