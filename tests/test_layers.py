"""What is special to each layer."""

from __future__ import annotations

import math

import pytest
import torch

from pyflowgen.bijection import Chain
from pyflowgen.layers import ActNorm, Dequantize, GlowStep, Logit, MultiScale, Permutation, Scale, Squeeze
from pyflowgen.nets import MLP, ConvNet, ConvResNet, NormalPrior, ResidualMLP, ZeroConv2d, activation


# ------------------------------------------------------------------------------------------------------ Permutation
def test_permutation_gathers_by_index():
    y, _ = Permutation([2, 0, 1])(torch.tensor([[10.0, 11.0, 12.0]]))
    assert y.tolist() == [[12.0, 10.0, 11.0]]


def test_random_permutation_follows_its_seed_and_generator():
    a, b, c = (Permutation.random(50, seed=s).index for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    g = torch.Generator().manual_seed(1)
    assert torch.equal(Permutation.random(50, generator=g).index, a)
    torch.manual_seed(0)
    first = Permutation.random(50).index
    assert not torch.equal(first, Permutation.random(50).index)


def test_loading_a_permutation_loads_its_inverse_too():
    a, b = Permutation.random(20, seed=1), Permutation.random(20, seed=2)
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 20)
    assert torch.equal(b.inverse(a(x)[0])[0], x)


@pytest.mark.parametrize("index", [[0, 0], [1, 2], [[0, 1]], [0.0, 1.0]])
def test_no_permutation_is_refused(index):
    with pytest.raises(ValueError, match="every integer 0..n-1 once"):
        Permutation(index)


def test_permutation_names_the_dimension():
    with pytest.raises(ValueError, match=r"\(2, 4\), expected 3 entries on dimension -1"):
        Permutation.reverse(3)(torch.zeros(2, 4))


# ---------------------------------------------------------------------------------------------------------- ActNorm
@pytest.mark.parametrize("shape, event_dim", [((500, 3), 1), ((20, 3, 5, 4), 3), ((4, 5, 3, 2, 7), 3)])
def test_actnorm_starts_at_mean_0_and_variance_1(shape, event_dim):
    torch.manual_seed(0)
    channel = len(shape) - event_dim
    spread = torch.tensor([0.01, 1.0, 30.0]).reshape(-1, *(1,) * (event_dim - 1))
    x = 7 + spread * torch.randn(shape)
    norm = ActNorm(3, event_dim=event_dim)
    y, logdet = norm(x)
    dims = [d for d in range(len(shape)) if d != channel]
    torch.testing.assert_close(y.mean(dims), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.var(dims, unbiased=False), torch.ones(3), rtol=1e-3, atol=0)
    assert logdet.shape == shape[:channel]
    positions = math.prod(shape[channel + 1 :])
    torch.testing.assert_close(logdet, (positions * norm.log_scale.sum()).expand(logdet.shape))


@pytest.mark.parametrize("layer", [lambda: ActNorm(3), lambda: Scale(3)])
def test_data_init_happens_once_in_training_without_gradient(layer):
    torch.manual_seed(0)
    f = layer()
    x = (5 * torch.randn(100, 3)).requires_grad_()
    f.eval()
    assert torch.equal(f(x)[0], x) and not f.initialized
    f.train()
    f.inverse(x)
    assert not f.initialized, "noise must not set what the data are normalised by"
    f(torch.randn(0, 3))
    assert not f.initialized
    y, logdet = f(x)
    assert f.initialized
    assert f.log_scale.is_leaf and f.log_scale.grad is None and f.log_scale.requires_grad
    (y.sum() + logdet.sum()).backward()
    # with the initialisation in the graph this would not be the bare scale
    torch.testing.assert_close(x.grad, f.log_scale.exp().expand(100, 3))
    before = f.log_scale.clone()
    f(torch.randn(10, 3) * 100)
    assert torch.equal(f.log_scale, before)


@pytest.mark.parametrize("layer", [lambda **k: ActNorm(3, **k), lambda **k: Scale(3, **k)])
def test_data_init_is_remembered_by_the_state_dict(layer):
    a, b = layer(), layer()
    a(3 * torch.randn(50, 3))
    b.load_state_dict(a.state_dict())
    b(torch.randn(50, 3))
    assert torch.equal(a.log_scale, b.log_scale)
    fresh = layer()
    a.load_state_dict(fresh.state_dict())  # and back: an untouched state asks for data again
    a(2 * torch.randn(50, 3))
    assert not torch.equal(a.log_scale, torch.zeros(3))
    off = layer(init=False)
    off(2 * torch.randn(50, 3))
    assert torch.equal(off.log_scale, torch.zeros(3))


@pytest.mark.parametrize("layer", [lambda: ActNorm(2), lambda: Scale(2)])
@pytest.mark.parametrize("n", [1, 8])
def test_data_init_survives_constant_channels_and_single_rows(layer, n):
    y, logdet = layer()(torch.full((n, 2), 3.0))
    assert y.isfinite().all() and logdet.isfinite().all()
    if n == 1:
        assert torch.equal(logdet, torch.zeros(1))


def test_actnorm_refuses_other_channels():
    with pytest.raises(ValueError, match=r"\(2, 5\), expected 3 channels on dimension -1"):
        ActNorm(3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="at least 3 dimensions"):
        ActNorm(3, event_dim=3)(torch.zeros(2, 5))


def test_scale_meets_the_prior_it_is_set_for():
    torch.manual_seed(0)
    x = torch.tensor([0.01, 1.0, 100.0]) * torch.randn(1000, 3) + 5
    f = Scale(3, std=1.8)
    y, logdet = f(x)
    torch.testing.assert_close(y.std(0, unbiased=False), torch.full((3,), 1.8))
    torch.testing.assert_close(logdet, f.log_scale.sum().expand(1000))
    with pytest.raises(ValueError, match=r"end with \(3,\)"):
        f(torch.zeros(2, 4))


# ---------------------------------------------------------------------------------------------------------- Squeeze
def test_squeeze_layout():
    x = torch.arange(2 * 4 * 6.0).reshape(1, 2, 4, 6)
    y, logdet = Squeeze()(x)
    assert y.shape == (1, 8, 2, 3) and torch.equal(logdet, torch.zeros(1))
    for c in range(2):
        for i in range(2):
            for j in range(2):
                assert torch.equal(y[0, 4 * c + 2 * i + j], x[0, c, i::2, j::2])
    assert torch.equal(Squeeze().inverse(y)[0], x)
    assert Squeeze(3).output_shape((1, 6, 9)) == (9, 2, 3)
    for bad in (torch.zeros(1, 3, 4), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match="divisible by 2"):
            Squeeze()(bad)
    with pytest.raises(ValueError, match="C divisible by 4"):
        Squeeze().inverse(torch.zeros(1, 3, 4, 4))


# ------------------------------------------------------------------------------------------------------------ Logit
def test_logit_formula_and_ends():
    f = Logit(0.05)
    x = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    y, logdet = f(x)
    p = 0.05 + 0.9 * x
    torch.testing.assert_close(y, torch.log(p / (1 - p)))
    torch.testing.assert_close(logdet, torch.log(0.9 / (p * (1 - p)))[:, 0])
    far = torch.tensor([[-1e4], [1e4]])
    x, minus = f.inverse(far)
    assert x.isfinite().all() and minus.isfinite().all()
    assert f.domain.check(x).all() and not f.domain.check(torch.tensor(1.1))
    assert f(torch.tensor([[1.2]]))[0].isnan().all()
    with pytest.raises(ValueError, match="alpha is 0.5"):
        Logit(0.5)


# ------------------------------------------------------------------------------------------------------- Dequantize
@pytest.mark.parametrize("levels", [2, 17, 255, 256, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_dequantize_is_undone_exactly(levels, dtype, monkeypatch):
    f = Dequantize(levels)
    x = torch.arange(levels).to(dtype)[:, None]
    size = torch.get_default_dtype() if dtype == torch.int64 else dtype
    last = 1 - torch.finfo(size).eps / 2
    for noise in (None, 0.0, last):  # the ends of what torch.rand gives are drawn too rarely to wait for
        if noise is not None:
            monkeypatch.setattr(torch, "rand_like", lambda t, v=noise: torch.full_like(t, v))
        y, logdet = f(x)
        assert y.dtype == size and (y > 0).all() and (y < 1).all()
        back, minus = f.inverse(y)
        assert torch.equal(back.to(dtype), x)
        torch.testing.assert_close(logdet, torch.full((levels,), -math.log(levels), dtype=size))
        torch.testing.assert_close(minus, -logdet)


def test_dequantize_noise_is_uniform_and_fresh():
    torch.manual_seed(0)
    f = Dequantize(4, event_dim=3)
    x = torch.ones(10, 3, 20, 20, dtype=torch.uint8)
    y, logdet = f(x)
    u = 4 * y - 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.005 and u.min() > 0 and u.max() < 1
    assert not torch.equal(y, f.eval()(x)[0])
    torch.testing.assert_close(logdet, torch.full((10,), -1200 * math.log(4)))
    assert f.stochastic and Chain(f).stochastic


# ------------------------------------------------------------------------------------------------------- MultiScale
def test_multi_scale_factors_out_the_first_half_of_the_channels():
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    f = MultiScale([Squeeze(), Squeeze()], (2, 4, 4))
    z, _ = f(x)
    once = Squeeze()(x)[0]
    assert torch.equal(z[0, :16], once[0, :4].flatten())
    assert torch.equal(z[0, 16:], Squeeze()(once[:, 4:])[0].flatten())
    with pytest.raises(ValueError, match=r"even number of channels"):
        MultiScale([ActNorm(3, event_dim=3), Squeeze()], (3, 4, 4))
    with pytest.raises(ValueError, match=r"end with \(2, 4, 4\)"):
        f(torch.zeros(1, 2, 4, 6))
    with pytest.raises(ValueError, match="expected 32 latents"):
        f.inverse(torch.zeros(1, 31))
    with pytest.raises(ValueError, match=r"expected \(C, H, W\)"):
        MultiScale([Squeeze()], (4,))


def test_priors_standardise_what_leaves():
    """log p of the latents under the scales' normal priors is what a standard normal gives of them."""
    torch.manual_seed(0)
    scales = MultiScale([Squeeze(), Squeeze()], (1, 4, 4), [NormalPrior(2, 2), NormalPrior(8)])
    with torch.no_grad():
        for p in scales.parameters():
            p.normal_(std=0.3)
    x = torch.randn(6, 1, 4, 4)
    z, logdet = scales(x)
    leaves, goes_on = Squeeze()(x)[0].chunk(2, 1)
    last = Squeeze()(goes_on)[0]
    normal = torch.distributions.Normal
    expected = torch.zeros(6)
    for value, params in ((leaves, scales.priors[0](goes_on)), (last, scales.priors[1](last))):
        expected += normal(params[:, 0::2], params[:, 1::2].exp()).log_prob(value).flatten(1).sum(1)
    torch.testing.assert_close(normal(0.0, 1.0).log_prob(z).sum(1) + logdet, expected)
    with pytest.raises(ValueError, match="1 priors, expected none or one for each of 2"):
        MultiScale([Squeeze(), Squeeze()], (1, 4, 4), [NormalPrior(2)])


# --------------------------------------------------------------------------------------------------------- GlowStep
@pytest.mark.parametrize("additive", [False, True])
def test_glow_step_is_its_three_layers(additive):
    torch.manual_seed(0)
    step = GlowStep(5, ConvNet(3, 8, 2 if additive else 4), additive=additive)
    with torch.no_grad():
        for p in step.conditioner.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x = 3 + 2 * torch.randn(6, 5, 4, 4)
    y, logdet = step(x)
    v, first = step.actnorm(x)
    torch.testing.assert_close(v.mean((0, 2, 3)), torch.zeros(5), atol=1e-4, rtol=0)
    torch.testing.assert_close(v.var((0, 2, 3), unbiased=False), torch.ones(5), atol=1e-3, rtol=0)
    v, second = step.conv(v)
    params = step.conditioner(v[:, :3])
    shift, scale = (params, None) if additive else (params[:, 0::2], torch.sigmoid(params[:, 1::2] + 2))
    moved = v[:, 3:] + shift if additive else (v[:, 3:] + shift) * scale
    torch.testing.assert_close(y, torch.cat([v[:, :3], moved], 1))
    third = 0 if additive else scale.log().flatten(1).sum(1)
    torch.testing.assert_close(logdet, first + second + third)
    for bad, message in (
        (torch.zeros(2, 4, 2, 2), r"\(2, 4, 2, 2\), expected \(\.\.\., 5, H, W\)"),
        (torch.zeros(5, 5), "at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            step(bad)
    with pytest.raises(ValueError, match="at least 2 channels"):
        GlowStep(1, torch.nn.Identity())


# ------------------------------------------------------------------------------------------------------------- nets
def test_zero_conv_gain_and_conv_net():
    torch.manual_seed(0)
    conv, plain = ZeroConv2d(3, 4), torch.nn.Conv2d(3, 4, 3, padding=1)
    assert conv(torch.randn(2, 3, 5, 5)).count_nonzero() == 0
    with torch.no_grad():
        conv.weight.copy_(plain.weight), conv.bias.copy_(plain.bias), conv.log_gain.normal_()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(conv(x), plain(x) * (3 * conv.log_gain).exp()[:, None, None])
    net = ConvNet(3, 8, 4, context_features=2)
    torch.nn.init.normal_(net.conv3.weight)
    x, context = torch.randn(2, 3, 3, 5, 4), torch.randn(2, 3, 2)
    out = net(x, context)
    h = torch.relu(net.conv1(x[1, 2][None]) + net.context(context[1, 2])[:, None, None])
    torch.testing.assert_close(out[1, 2], net.conv3(torch.relu(net.conv2(h)))[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 3, H, W\)"):
        net(x[:, :, :2], context)
    with pytest.raises(ValueError, match="hidden_channels=0"):
        ConvNet(1, 0, 1)


def test_normal_prior_starts_standard_and_takes_context():
    torch.manual_seed(0)
    for prior in (NormalPrior(2, 3, context_features=4), NormalPrior(2, context_features=4)):
        x, context = torch.randn(5, 3, 3, 2, 2), torch.randn(5, 3, 4)
        assert torch.equal(prior(x, context), torch.zeros(5, 3, 4, 2, 2))
        torch.nn.init.normal_(prior.context.weight)
        expected = prior.context(context)[..., None, None].expand(5, 3, 4, 2, 2)
        torch.testing.assert_close(prior(x, context), expected)


def test_mlp_starts_at_zero_and_broadcasts_its_context():
    net = MLP(3, [8, 8], 4, "silu", context_features=2)
    out = net(torch.randn(5, 1, 3), torch.randn(7, 2))
    assert torch.equal(out, torch.zeros(5, 7, 4))
    net = MLP(3, [], 4, zero_init_last=False)
    assert len(net.layers) == 1 and net(torch.randn(2, 3)).abs().sum() > 0
    with pytest.raises(ValueError, match=r"\(2, 4\), expected \(\.\.\., 3\)"):
        net(torch.randn(2, 4))
    with pytest.raises(ValueError, match="context_features=0"):
        net(torch.randn(2, 3), torch.randn(2, 1))
    with pytest.raises(ValueError, match="'swish', expected one of elu"):
        activation("swish")


@pytest.mark.parametrize("weight_norm", [False, True])
def test_conv_resnet_takes_any_leading_dimensions(weight_norm):
    torch.manual_seed(0)
    net = ConvResNet(2, 8, 3, context_features=4, weight_norm=weight_norm, zero_init_last=False)
    x, context = torch.randn(2, 3, 2, 5, 4), torch.randn(2, 3, 4)
    out = net(x, context)
    assert out.shape == (2, 3, 3, 5, 4)
    torch.testing.assert_close(out[1, 2], net(x[1, 2], context[1, 2]), rtol=1e-4, atol=1e-5)
    assert (out - net(x, context + 1)).abs().max() > 1e-3
    assert any("original" in n for n, _ in net.named_parameters()) == weight_norm
    assert torch.equal(ConvResNet(2, 4, 2)(torch.randn(1, 2, 3, 3)), torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match=r"expected \(\.\.\., 2, H, W\)"):
        net(torch.randn(1, 3, 4, 4), context[0, :1])


@pytest.mark.parametrize("context_features", [0, 3])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_residual_mlp_is_nflows(context_features, name):
    resnet = pytest.importorskip("nflows.nn.nets.resnet")
    torch.manual_seed(0)
    act = {"relu": torch.relu, "silu": torch.nn.functional.silu}[name]
    theirs = resnet.ResidualNet(5, 7, 16, context_features or None, num_blocks=3, activation=act).double()
    ours = ResidualMLP(5, 16, 7, blocks=3, activation=name, context_features=context_features).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.5)  # blocks start near the identity: a wrong one would not be seen
    ours.load_state_dict(theirs.state_dict())
    inputs = [t.requires_grad_() for t in (torch.randn(9, 5).double(), torch.randn(9, 3).double())]
    inputs = inputs if context_features else inputs[:1]
    got, want = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(got, want)
    weights = torch.randn_like(got)
    names = dict(ours.named_parameters())
    leaves = [[*inputs, *(net.get_parameter(n) for n in names)] for net in (ours, theirs)]
    grads = [torch.autograd.grad((o * weights).sum(), v) for o, v in zip((got, want), leaves, strict=True)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_residual_mlp_shapes_and_refusals():
    torch.manual_seed(0)
    net = ResidualMLP(3, 8, 4, context_features=2)
    assert torch.equal(net(torch.randn(5, 1, 3), torch.randn(7, 2)), torch.zeros(5, 7, 4))
    net = ResidualMLP(3, 8, 4, context_features=2, zero_init_last=False)
    x, context = torch.randn(2, 6, 3), torch.randn(6, 2)
    out = net(x, context)
    torch.testing.assert_close(out[1, 2], net(x[1, 2], context[2]), rtol=1e-4, atol=1e-5)
    assert (out - net(x, context + 1)).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"ResidualMLP: x has shape \(2, 4\), expected \(\.\.\., 3\)"):
        net(torch.randn(2, 4), torch.randn(2, 2))
    with pytest.raises(ValueError, match="context is missing"):
        net(x)
    with pytest.raises(ValueError, match="blocks=-1"):
        ResidualMLP(3, 8, 4, blocks=-1)
