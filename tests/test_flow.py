"""Base distributions, the flow, and its torch.distributions view."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import (
    Independent,
    LogNormal,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.transforms import AffineTransform, SigmoidTransform

from pyflowgen.bijection import Bijection, Chain, Inverse
from pyflowgen.flow import DiagNormal, Flow, FlowDistribution, Logistic, LogisticDistribution, bits_per_dim
from pyflowgen.layers import ActNorm, Dequantize, Logit, Permutation, Scale
from pyflowgen.nets import MLP
from pyflowgen.ops.affine_coupling import AffineCoupling


def affine_flow(shift=(1.0, -2.0), log_scale=(0.5, -0.3)) -> Flow:
    """x -> x e^s + b onto a standard normal, so x is normal with mean -b e^-s and deviation e^-s."""
    layer = ActNorm(2, init=False).double()
    with torch.no_grad():
        layer.shift.copy_(torch.tensor(shift))
        layer.log_scale.copy_(torch.tensor(log_scale))
    return Flow(DiagNormal(2).double(), layer)


def coupling_flow(context_features: int = 0) -> Flow:
    def net() -> MLP:
        return MLP(1, [16], 2, "tanh", context_features=context_features, zero_init_last=False)

    layers = [AffineCoupling(net(), mask="halves", swap=bool(i), scale="tanh") for i in range(2)]
    return Flow(DiagNormal(2), Chain(*layers, Permutation.reverse(2))).double()


class Conditional(Bijection):
    """x - c, whose density under a context c is known."""

    def forward(self, x, context=None):
        return x - context, torch.zeros(x.shape[:-1], dtype=x.dtype)

    def inverse(self, y, context=None):
        return y + context, torch.zeros(y.shape[:-1], dtype=y.dtype)


# ------------------------------------------------------------------------------------------------------------- base
@pytest.mark.parametrize("learnable", [False, True])
def test_diag_normal_is_torchs(learnable):
    base = DiagNormal((2, 3), learnable=learnable)
    if learnable:
        with torch.no_grad():
            base.loc.fill_(0.5)
            base.log_scale.fill_(-1)
    z = torch.randn(4, 2, 3)
    expected = Independent(Normal(base.loc, base.log_scale.exp()), 2)
    torch.testing.assert_close(base().log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(base().entropy(), expected.entropy())
    assert base().sample((5,)).shape == (5, 2, 3)
    assert len(list(base.parameters())) == 2 * learnable and set(base.state_dict()) == {"loc", "log_scale"}
    other = Independent(Normal(torch.ones(2, 3), torch.full((2, 3), 2.0)), 2)
    torch.testing.assert_close(kl_divergence(base(), other), kl_divergence(expected, other))
    assert base.bfloat16()().log_prob(z.bfloat16()).dtype == (torch.bfloat16 if learnable else torch.float32)


def test_logistic_is_torchs_transformed_uniform():
    loc, scale = torch.tensor([0.3, -1.0]).double(), torch.tensor([2.0, 0.5]).double()
    ours = LogisticDistribution(loc, scale)
    uniform = torch.distributions.Uniform(torch.zeros(2).double(), torch.ones(2).double())
    theirs = TransformedDistribution(uniform, [SigmoidTransform().inv, AffineTransform(loc, scale)])
    x = 3 * torch.randn(100, 2).double()
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.cdf(x), theirs.cdf(x))
    torch.testing.assert_close(ours.icdf(ours.cdf(x)), x)
    torch.testing.assert_close(LogisticDistribution(loc, scale).expand([5, 2]).log_prob(x[:5]), ours.log_prob(x[:5]))
    torch.manual_seed(0)
    s = ours.rsample((100000,))
    torch.testing.assert_close(s.mean(0), ours.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(s.var(0), ours.variance, rtol=0.03, atol=0)
    torch.testing.assert_close(-ours.log_prob(s).mean(0), ours.entropy(), rtol=0, atol=0.02)
    with pytest.raises(ValueError):
        LogisticDistribution(loc, -scale, validate_args=True)


@pytest.mark.parametrize("z", [0.0, 90.0, -90.0, 1e4])
def test_logistic_prior_is_stable_far_out(z):
    z = torch.tensor([[z]], requires_grad=True)
    logp = Logistic(1)().log_prob(z)
    assert logp.item() == pytest.approx(-abs(z.item()) - 2 * math.log1p(math.exp(-abs(z.item()))))
    logp.sum().backward()
    assert z.grad.item() == pytest.approx(-math.tanh(z.item() / 2), abs=1e-6)


def test_logistic_samples_are_finite_at_the_ends_of_the_generator(monkeypatch):
    for u in (0.0, 1 - 2**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, u=u, **k: torch.full(shape, u, **k))
        assert Logistic(3)().sample((2,)).isfinite().all()


# ------------------------------------------------------------------------------------------------------------- flow
def test_log_prob_by_hand():
    flow = affine_flow()
    x = torch.randn(4, 3, 2).double()
    s, b = torch.tensor([0.5, -0.3]).double(), torch.tensor([1.0, -2.0]).double()
    by_hand = Normal(-b * (-s).exp(), (-s).exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(flow.log_prob(x), by_hand, rtol=1e-6, atol=1e-6)
    assert torch.equal(flow(x), flow.log_prob(x))
    torch.manual_seed(0)
    sample = flow.sample(200000)
    torch.testing.assert_close(sample.mean(0), -b * (-s).exp(), rtol=0, atol=0.02)
    torch.testing.assert_close(sample.std(0), (-s).exp(), rtol=0.01, atol=0)


@pytest.mark.parametrize("shape, expected", [((), ()), (5, (5,)), ((5,), (5,)), ((2, 3), (2, 3)), (0, (0,))])
def test_sample_shapes_and_their_log_prob(shape, expected):
    flow = coupling_flow()
    x = flow.sample(shape)
    assert x.shape == (*expected, 2) and not x.requires_grad
    x, logp = flow.sample_and_log_prob(shape)
    assert logp.shape == expected and not logp.requires_grad
    torch.testing.assert_close(logp, flow.log_prob(x).detach())
    x, logp = flow.rsample_and_log_prob(shape)
    torch.testing.assert_close(logp, flow.log_prob(x))
    assert x.requires_grad and logp.requires_grad and flow.rsample(shape).requires_grad


def test_context_shapes():
    flow = Flow(DiagNormal(2).double(), Conditional())
    context = torch.randn(4, 2).double()
    assert flow.sample((3,), context).shape == (3, 4, 2)
    assert flow.sample((), context[0]).shape == (2,)
    x = torch.randn(5, 4, 2).double()
    expected = Normal(context, 1.0).log_prob(x).sum(-1)
    torch.testing.assert_close(flow.log_prob(x, context), expected)
    # one datum under four contexts, and four data under one context
    torch.testing.assert_close(flow.log_prob(x[0, 0], context), Normal(context, 1.0).log_prob(x[0, 0]).sum(-1))
    torch.testing.assert_close(flow.log_prob(x[0], context[0]), Normal(context[0], 1.0).log_prob(x[0]).sum(-1))
    x, logp = flow.sample_and_log_prob((3,), context)
    torch.testing.assert_close(logp, flow.log_prob(x, context))
    with pytest.raises(ValueError, match=r"context has shape \(3, 2\)"):
        flow.log_prob(x, context[:3])
    with pytest.raises(ValueError, match="at least 1 dimensions"):
        flow.sample((), context[0, 0])


def test_context_changes_a_coupling_flow_and_gets_gradients():
    torch.manual_seed(0)
    flow = coupling_flow(context_features=3)
    context = torch.randn(6, 3).double().requires_grad_()
    x, logp = flow.rsample_and_log_prob((10,), context)
    torch.testing.assert_close(flow.log_prob(x, context), logp)
    assert (flow.log_prob(x, context) - flow.log_prob(x, context.flip(0))).abs().max() > 1e-3
    (grad,) = torch.autograd.grad(x.sum(), context)
    assert grad.abs().min() > 0


def test_flow_refuses_other_events_and_integer_rsample():
    flow = affine_flow()
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\), expected \(\.\.\., 2\)"):
        flow.log_prob(torch.zeros(4, 3).double())
    pixels = Flow(DiagNormal(2), Chain(Dequantize(4), Logit()))
    assert not pixels.has_rsample and not pixels.distribution().has_rsample
    with pytest.raises(NotImplementedError, match="integers"):
        pixels.rsample(3)


def test_a_flow_on_the_sigmoid_is_torchs():
    flow = Flow(Logistic(1).double(), Logit(0.0))
    x = torch.rand(20, 1).double()
    torch.testing.assert_close(flow.log_prob(x), torch.zeros(20).double(), rtol=0, atol=1e-12)


def test_integer_data_have_a_normalised_mass():
    """Averaged over the noise, exp log_prob of a dequantised flow bounds a distribution on the levels from below."""
    torch.manual_seed(0)
    flow = Flow(Logistic(1), Chain(Dequantize(5), Logit(0.0), Scale(1, init=False)))
    with torch.no_grad():
        flow.bijection[2].log_scale.fill_(0.3)
    x = torch.arange(5)[:, None]
    mass = torch.stack([flow.log_prob(x).exp().detach() for _ in range(3000)]).mean(0)
    assert mass.sum().item() == pytest.approx(1, abs=0.03)
    counts = torch.bincount(flow.sample(100000).long().flatten(), minlength=5) / 100000
    torch.testing.assert_close(counts, mass, rtol=0.1, atol=0.01)


def test_bits_per_dim():
    assert bits_per_dim(torch.tensor(1980.5), 784, 256).item() == pytest.approx(4.36, abs=0.01)  # NICE on MNIST
    assert bits_per_dim(torch.tensor(-64 * math.log(17)), 64).item() == pytest.approx(math.log2(17))
    with pytest.raises(ValueError, match="dims=0"):
        bits_per_dim(torch.tensor(0.0), 0)


def test_state_dict_deepcopy_and_dtype():
    flow = coupling_flow()
    other = coupling_flow()
    x = torch.randn(3, 2).double()
    assert not torch.allclose(flow.log_prob(x), other.log_prob(x))
    other.load_state_dict(flow.state_dict())
    assert torch.equal(flow.log_prob(x), other.log_prob(x))
    assert torch.equal(copy.deepcopy(flow).float().log_prob(x.float()), flow.float().log_prob(x.float()))
    assert flow.sample(2).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------- distribution
def test_distribution_shapes_and_expand():
    flow = Flow(DiagNormal(2).double(), Conditional())
    d = flow.distribution(torch.randn(4, 2).double())
    assert isinstance(d, torch.distributions.Distribution) and isinstance(d, FlowDistribution)
    assert d.batch_shape == (4,) and d.event_shape == (2,) and d.has_rsample
    x = d.sample((3,))
    assert x.shape == (3, 4, 2) and d.log_prob(x).shape == (3, 4) and d.sample().shape == (4, 2)
    wide = d.expand([5, 4])
    assert wide.batch_shape == (5, 4) and wide.sample((3,)).shape == (3, 5, 4, 2)
    torch.testing.assert_close(wide.log_prob(x[0]), d.log_prob(x[0]).expand(5, 4))
    bare = affine_flow().distribution().expand([3])
    assert bare.sample((5,)).shape == (5, 3, 2) and bare.log_prob(torch.zeros(2).double()).shape == (3,)
    x, logp = d.rsample_and_log_prob((7,))
    torch.testing.assert_close(logp, d.log_prob(x))
    x, logp = bare.sample_and_log_prob((7,))
    torch.testing.assert_close(logp, bare.log_prob(x))


def test_distribution_inside_torchs_own():
    flow = Flow(DiagNormal(2).double(), Conditional())
    context = torch.randn(4, 3, 2).double()
    d = flow.distribution(context)
    joint = Independent(d, 1)
    x = joint.sample((6,))
    assert joint.batch_shape == (4,) and joint.event_shape == (3, 2) and x.shape == (6, 4, 3, 2)
    torch.testing.assert_close(joint.log_prob(x), Normal(context, 1.0).log_prob(x).sum((-2, -1)))
    assert joint.expand([5, 4]).rsample().shape == (5, 4, 3, 2)
    mixture = MixtureSameFamily(torch.distributions.Categorical(torch.ones(4, 3).double()), d)
    expected = (Normal(context, 1.0).log_prob(x[0, :, :1]).sum(-1)).logsumexp(-1) - math.log(3)
    torch.testing.assert_close(mixture.log_prob(x[0, :, 0]), expected)
    assert mixture.sample((5,)).shape == (5, 4, 2)


def test_distribution_monte_carlo_kl_is_the_closed_form():
    torch.manual_seed(0)
    flow = affine_flow()
    q = flow.distribution()
    s, b = torch.tensor([0.5, -0.3]).double(), torch.tensor([1.0, -2.0]).double()
    p = Independent(Normal(torch.zeros(2).double(), torch.ones(2).double()), 1)
    x = q.rsample((100000,))
    estimate = (q.log_prob(x) - p.log_prob(x)).mean()
    exact = kl_divergence(Independent(Normal(-b * (-s).exp(), (-s).exp()), 1), p)
    torch.testing.assert_close(estimate, exact, rtol=0.01, atol=0)
    (grad,) = torch.autograd.grad(estimate, flow.bijection.shift)
    torch.testing.assert_close(grad, b * (-2 * s).exp(), rtol=0.02, atol=0.01)


def test_distribution_validation_and_support():
    flow = affine_flow()
    d = flow.distribution(validate_args=True)
    with pytest.raises(ValueError, match="support"):
        d.log_prob(torch.tensor([math.nan, 0.0]).double())
    with pytest.raises(ValueError):
        d.log_prob(torch.zeros(3).double())
    assert flow.distribution(validate_args=False).log_prob(torch.tensor([math.nan, 0.0]).double()).isnan()
    assert d.expand([2])._validate_args
    unit = Flow(DiagNormal(2), Logit(0.05)).distribution(validate_args=True)
    assert unit.log_prob(unit.sample((100,))).isfinite().all()
    with pytest.raises(ValueError, match="support"):
        unit.log_prob(torch.tensor([0.5, 1.2]))
    pixels = Flow(DiagNormal(2), Chain(Dequantize(4), Logit())).distribution(validate_args=True)
    assert pixels.support.check(pixels.sample((100,))).all()
    with pytest.raises(ValueError, match="support"):
        pixels.log_prob(torch.tensor([0.5, 1.0]))


def test_any_module_serves_as_base():
    class Positive(nn.Module):
        event_shape = torch.Size([2])

        def forward(self, context=None):
            return Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1)

    flow = Flow(Positive(), Inverse(Scale(2, init=False)))
    x = flow.sample(5)
    torch.testing.assert_close(flow.log_prob(x), LogNormal(0.0, 1.0).log_prob(x).sum(-1))
