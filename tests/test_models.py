"""NICE, RealNVP, NSF and Glow as whole models: exact densities, inverses, configuration."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn

import pyflowgen
from pyflowgen.bijection import Chain
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import ActNorm, Scale
from pyflowgen.models import NICE, NSF, Glow, RealNVP
from pyflowgen.ops.affine_coupling import AffineCoupling

MODELS = {
    "nice": lambda: NICE(6, hidden=(8, 8), activation="tanh"),
    "nice_odd": lambda: NICE(5, hidden=(8,), prior="normal", couplings=3),
    "nice_volume": lambda: NICE(4, hidden=(8,), scale=False),
    "realnvp": lambda: RealNVP(6, couplings=4, hidden=(8, 8), activation="silu"),
    "realnvp_odd": lambda: RealNVP((5,), couplings=5, hidden=(8,), permutation="reverse", scale="sigmoid"),
    "realnvp_logit": lambda: RealNVP(6, couplings=2, hidden=(8,), alpha=0.05, actnorm=False, permutation="none"),
    "nsf": lambda: NSF(6, couplings=4, hidden=(8,), bins=4, activation="silu", permutation="lu"),
    "nsf_residual": lambda: NSF((5,), couplings=3, hidden=8, blocks=1, bins=3, alpha=0.05, permutation="reverse"),
    "realnvp_image": lambda: RealNVP((1, 4, 4), channels=4, blocks=1, activation="tanh"),
    "realnvp_image_logit": lambda: RealNVP((2, 4, 4), channels=4, blocks=1, scales=2, alpha=0.05, weight_norm=True),
    "glow": lambda: Glow((1, 4, 4), scales=2, steps=2, channels=4, seed=0),
    "glow_additive_dense": lambda: Glow((2, 4, 2), scales=1, steps=2, channels=4, coupling="additive", factor="dense"),
    "realnvp_image_one_scale": lambda: RealNVP((3, 3, 2), channels=4, blocks=0, scales=1, scale="atan", clamp=1.0),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest):
    with pyflowgen.reference_path() if request.param == "reference" else contextlib.nullcontext():
        yield request.param


def make(name: str, dtype: torch.dtype = torch.float64) -> Flow:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model(data(model, 64, dtype=dtype))  # sets ActNorm and Scale
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.15 * torch.randn_like(p))
    return model


def data(model: Flow, *batch: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(*batch, *model.event_shape, generator=g, dtype=torch.float64).mul(0.98).add(0.01).to(dtype)


@pytest.mark.parametrize("name", MODELS)
def test_log_prob_is_base_plus_the_jacobians_determinant(name, path):
    model = make(name)
    x = data(model, 2)
    f = model.bijection
    z, logdet = f(x)
    size = z.shape[-1]
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: f(v)[0], x[i]).reshape(size, size)
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=0, atol=1e-9)
    torch.testing.assert_close(model.log_prob(x), model.base().log_prob(z) + logdet)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_inverse_undoes_forward(name, dtype, tol, path):
    model = make(name, dtype)
    x = data(model, 16, dtype=dtype)
    z, logdet = model.bijection(x)
    assert z.shape == (16, model.event_shape.numel())
    back, minus = model.bijection.inverse(z)
    torch.testing.assert_close(back, x, rtol=0, atol=tol)
    torch.testing.assert_close(minus, -logdet, rtol=tol, atol=tol)
    s, logp = model.sample_and_log_prob((2, 3))
    assert s.shape == (2, 3, *model.event_shape) and s.dtype == dtype
    torch.testing.assert_close(logp, model.log_prob(s).detach(), rtol=10 * tol, atol=10 * tol)


@pytest.mark.parametrize("name", MODELS)
def test_config_builds_the_same_model_and_holds_its_weights(name):
    model = make(name)
    config = json.loads(json.dumps(model.config))
    other = type(model).from_config(config).double()
    assert other.config == model.config
    other.load_state_dict(model.state_dict())
    x = data(model, 3)
    assert torch.equal(other.log_prob(x), model.log_prob(x))
    other(data(model, 64) * 0.5)  # the loaded ActNorm must not start over
    assert torch.equal(other.log_prob(x), model.log_prob(x))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_learns(name):
    model = make(name)
    model.log_prob(data(model, 8)).mean().backward()
    for n, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n


@pytest.mark.parametrize("name", MODELS)
def test_every_output_depends_on_every_input_where_it_should(name):
    """Couplings that all keep the same part would leave some dimensions untouched."""
    model = make(name)
    f = model.bijection
    size = model.event_shape.numel()
    x = data(model, 1)[0]
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v)[0], x).reshape(size, size)
    moved = (jacobian.abs() > 1e-12).sum(1)
    assert (moved > 1).all(), "an output that only copies its input"
    inverse = torch.autograd.functional.jacobian(lambda v: f.inverse(v)[0], f(x)[0].detach()).reshape(size, size)
    torch.testing.assert_close(inverse @ jacobian, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["nice", "realnvp", "nsf", "realnvp_image_logit"])
def test_bfloat16_and_leading_dimensions(name):
    model = make(name, torch.float32)
    x = data(model, 2, 3, dtype=torch.float32)
    logp = model.log_prob(x)
    torch.testing.assert_close(logp.flatten(), model.log_prob(x.flatten(0, 1)), rtol=1e-4, atol=1e-4)
    half = model.bfloat16().log_prob(x.bfloat16())
    assert half.dtype == torch.float32 and half.shape == (2, 3)
    torch.testing.assert_close(half, logp, rtol=0.1, atol=0.1 * model.event_shape.numel())


@pytest.mark.parametrize(
    ("build", "half"),
    [
        (lambda: NICE(2, hidden=(16,), prior="normal", activation="tanh", context_features=1), 30),
        (lambda: NICE(2, hidden=(16,), activation="tanh", context_features=1), 30),
        (lambda: RealNVP(2, couplings=4, hidden=(16,), activation="tanh", context_features=1), 30),
        (
            lambda: NSF(2, couplings=2, hidden=(16,), activation="tanh", context_features=1),
            9,
        ),  # narrow bins: a finer grid
        (lambda: NSF(2, couplings=2, hidden=8, blocks=1, activation="silu", context_features=1), 9),
    ],
)
def test_density_in_two_dimensions_integrates_to_one_for_each_context(build, half, path):
    torch.manual_seed(0)
    model = build().double()
    context = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    model(torch.randn(256, 2).double(), context[:1])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        axis = torch.linspace(-half, half, 601, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        logp = model.log_prob(grid[:, None], context)
    mass = logp.exp().sum(0) * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(mass, torch.ones(2).double(), rtol=0, atol=2e-3)
    assert (logp[:, 0] - logp[:, 1]).abs().max() > 0.1, "the context changes nothing"


def test_nice_of_64_dimensions_against_the_brute_force_jacobian(path):
    """Eight images' worth of pixels through a trained-looking NICE, float32 as in use, to 1e-4."""
    torch.manual_seed(0)
    model = NICE(64, hidden=(300, 300, 300))
    x = torch.rand(8, 64)
    model(torch.rand(256, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    logdet = model.bijection(x)[1]
    assert logdet.abs().min() > 1
    for i in range(8):
        jacobian = torch.autograd.functional.jacobian(lambda v: model.bijection(v)[0], x[i])
        expected = torch.linalg.slogdet(jacobian.double()).logabsdet
        torch.testing.assert_close(logdet[i].double(), expected, rtol=1e-4, atol=1e-4)


def test_realnvp_of_digits_against_the_brute_force_jacobian(path):
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().data[:256], dtype=torch.float32)
    model = RealNVP(64, alpha=0.05)
    x = (pixels + torch.rand(256, 64)) / 17
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    logdet = model.bijection(x[:16])[1]
    for i in range(16):
        jacobian = torch.autograd.functional.jacobian(lambda v: model.bijection(v)[0], x[i])
        expected = torch.linalg.slogdet(jacobian.double()).logabsdet
        torch.testing.assert_close(logdet[i].double(), expected, rtol=0, atol=1e-3)


def test_scale_layer_starts_nice_at_its_priors_spread():
    torch.manual_seed(0)
    x = torch.tensor([0.01, 1.0, 3.0, 100.0]) * torch.randn(2000, 4)
    model = NICE(4, hidden=(8,))
    model(x)
    z, _ = model.bijection(x)
    torch.testing.assert_close(z.std(0), torch.full((4,), 1.8138), rtol=1e-3, atol=0)
    assert isinstance(model.bijection[-1], Scale) and len(model.bijection) == 5
    torch.testing.assert_close(model.bijection(x)[1], model.bijection[-1].log_scale.sum().expand(2000))


@pytest.mark.parametrize("blocks", [0, 2])
def test_nsf_starts_as_the_identity_of_normalised_data(blocks):
    torch.manual_seed(0)
    x = 2 + 3 * torch.randn(500, 6)
    plain = NSF(6, couplings=4, hidden=16 if blocks else (16, 16), blocks=blocks, actnorm=False, permutation="none")
    y, logdet = plain.bijection(x)
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logdet, torch.zeros(500), rtol=0, atol=1e-4)
    z, _ = NSF(6, couplings=4, hidden=(16,)).bijection(x)
    assert z.mean().abs() < 1e-3 and (z.std() - 1).abs() < 2e-3


def test_realnvp_starts_normalised_after_logit_and_integers_go_through():
    torch.manual_seed(0)
    model = RealNVP(8, couplings=2, hidden=(8,), alpha=0.05, levels=17)
    x = torch.randint(0, 17, (500, 8))
    z, _ = model.bijection(x)
    assert z.mean().abs() < 0.01 and (z.std() - 1).abs() < 0.02
    s = model.sample(20)
    assert torch.equal(s, s.round()) and s.min() >= 0 and s.max() <= 16
    assert sum(isinstance(b, ActNorm) for b in model.bijection) == 2


def test_multi_scale_structure_is_the_papers():
    model = RealNVP((3, 8, 8), channels=4, blocks=0, scales=3)
    (scales,) = model.bijection
    couplings = [[b.conditioner for b in stage if isinstance(b, AffineCoupling)] for stage in scales.stages]
    # a checkerboard's conditioner sees every channel, a channel-wise coupling's half of them
    assert [[(net.in_channels, net.out_channels) for net in nets] for nets in couplings] == [
        [(3, 6)] * 3 + [(6, 12)] * 3,
        [(6, 12)] * 3 + [(12, 24)] * 3,
        [(12, 24)] * 4,
    ]
    assert [s.output_shape(e) for s, e in zip(scales.stages, [(3, 8, 8), (6, 4, 4), (12, 2, 2)], strict=True)] == [
        (12, 4, 4),
        (24, 2, 2),
        (12, 2, 2),
    ]


def test_conditional_images():
    torch.manual_seed(0)
    model = RealNVP((1, 4, 4), channels=4, blocks=1, context_features=3)
    context = torch.randn(5, 3)
    model(torch.randn(64, 5, 1, 4, 4), context)
    x, logp = model.sample_and_log_prob((2,), context)
    assert x.shape == (2, 5, 1, 4, 4)
    torch.testing.assert_close(logp, model.log_prob(x, context).detach(), rtol=1e-4, atol=1e-3)
    assert model.distribution(context).batch_shape == (5,)


@pytest.mark.parametrize("coupling, factor", [("affine", "lu"), ("additive", "dense")])
def test_glow_under_classes_and_context(coupling, factor, path):
    torch.manual_seed(0)
    options = dict(scales=2, steps=2, channels=4, coupling=coupling, factor=factor, seed=0)
    for model, context in (
        (Glow((1, 4, 4), classes=3, **options), torch.arange(3)),
        (Glow((1, 4, 4), context_features=2, **options), torch.randn(3, 2).double()),
    ):
        model = model.double()
        model(torch.randn(64, 3, 1, 4, 4).double(), context)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.15 * torch.randn_like(p))
        x, logp = model.sample_and_log_prob((2,), context)
        assert x.shape == (2, 3, 1, 4, 4)
        torch.testing.assert_close(logp, model.log_prob(x, context).detach())
        torch.testing.assert_close(model.decode(model.encode(x, context), context.expand(2, *context.shape)), x)
        assert (model.log_prob(x[:, :1], context) - logp).abs()[:, 1:].min() > 1e-3, "the context changes nothing"
        # Each prior sees it too: the coupling networks' part switched off, what is left depends on it.
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "conditioner.context" in name:
                    p.zero_()
        assert (model.encode(x[:, :1], context)[:, 0] - model.encode(x[:, :1], context)[:, 1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="labels are missing, expected integers below 3"):
        Glow((1, 4, 4), classes=3, **options).log_prob(torch.zeros(1, 1, 4, 4))


def test_glow_structure_is_the_papers():
    model = Glow((3, 8, 8), scales=3, steps=2, channels=4)
    (scales,) = model.bijection
    assert [[type(b).__name__ for b in stage] for stage in scales.stages] == [["Squeeze", "GlowStep", "GlowStep"]] * 3
    assert [stage[1].features for stage in scales.stages] == [12, 24, 48]
    assert [(prior.features, prior.conv is not None) for prior in scales.priors] == [(6, True), (12, True), (48, False)]
    first, second = scales.stages[0][1], scales.stages[0][2]
    assert not torch.allclose(first.conv.matrix(), second.conv.matrix()), "every step has its own rotation"
    a, b = (Glow((1, 4, 4), scales=1, steps=1, channels=4, seed=s).state_dict()["bijection.bijections.0.stages.0.bijections.1.conv.weight"] for s in (1, 1))  # fmt: skip
    assert torch.equal(a, b)


def test_glow_starts_normalised_and_its_priors_standard():
    torch.manual_seed(0)
    model = Glow((2, 8, 8), scales=2, steps=3, channels=8)
    x = 5 + 3 * torch.randn(200, 2, 8, 8)
    model(x)
    for step in (b for b in model.modules() if isinstance(b, ActNorm)):
        assert step.initialized
    z = model.encode(x)
    # with couplings at zero a step is y2 = v2 sigmoid(2): what leaves has variance 1 or a little less, and mean 0
    assert z.mean().abs() < 0.01 and 0.3 < z.std() < 1.1
    y, _ = model.bijection[0].stages[0][0](x)
    step = model.bijection[0].stages[0][1]
    normed, _ = step.actnorm(y)
    torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(8), atol=1e-4, rtol=0)
    torch.testing.assert_close(normed.var((0, 2, 3), unbiased=False), torch.ones(8), atol=1e-3, rtol=0)


def test_temperature_shrinks_samples_towards_the_mean():
    torch.manual_seed(0)
    model = Glow((1, 4, 4), scales=1, steps=1, channels=4)
    model(torch.randn(100, 1, 4, 4))
    mean = model.sample(2, temperature=0.0)
    assert torch.equal(mean[0], mean[1])
    cold, warm = (model.sample(500, temperature=t) for t in (0.5, 1.0))
    torch.testing.assert_close((cold - mean[0]).std() / (warm - mean[0]).std(), torch.tensor(0.5), atol=0.03, rtol=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        model.sample(1, temperature=-1)


def test_any_module_is_a_conditioner():
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4))
    flow = Flow(DiagNormal(4), Chain(AffineCoupling(net, mask="halves")))
    x, logp = flow.sample_and_log_prob(6)
    torch.testing.assert_close(flow.log_prob(x).detach(), logp)


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: NICE(1), "features=1"),
        (lambda: NICE(4, prior="cauchy"), "'logistic' or 'normal'"),  # type: ignore[arg-type]
        (lambda: RealNVP(1), "at least 2"),
        (lambda: RealNVP((4, 4)), r"expected \(features,\)"),
        (lambda: RealNVP((1, 6, 6), scales=3), r"2\*\*\(scales - 1\)"),
        (lambda: RealNVP(4, permutation="qr"), "expected one of .'random'"),  # type: ignore[arg-type]
        (lambda: RealNVP(4, couplings=0), "couplings is 0"),
        (lambda: RealNVP(4, activation="swish"), "'swish'"),
        (lambda: NSF((1, 4, 4)), r"expected \(features,\)"),
        (lambda: NSF(4, hidden=(8, 8), blocks=2), "with blocks one width"),
        (lambda: NSF(4, permutation="qr"), "NSF: permutation is 'qr'"),  # type: ignore[arg-type]
        (lambda: Glow((1, 6, 4), scales=2), r"divisible by 2\*\*scales"),
        (lambda: Glow((1, 4, 4), scales=1, steps=0), "steps is 0"),
        (lambda: Glow((1, 4, 4), scales=1, steps=1, channels=0), "hidden_channels=0"),
        (lambda: Glow((1, 4, 4), scales=1, coupling="spline"), "'affine' or 'additive'"),  # type: ignore[arg-type]
        (lambda: Glow((1, 4, 4), scales=1, factor="qr"), "'lu' or 'dense'"),  # type: ignore[arg-type]
        (lambda: Glow((1, 4, 4), scales=1, classes=2, context_features=2), "expected one of them"),
    ],
)
def test_wrong_configurations_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_models_refuse_other_shapes():
    with pytest.raises(ValueError, match=r"x has shape \(2, 5\), expected \(\.\.\., 4\)"):
        NICE(4, hidden=(8,)).log_prob(torch.zeros(2, 5))
