"""Glow on digits and on photographs, with kernels and with the reference, must reach what a healthy model reaches.

Digits (8x8, 17 levels): a factorised histogram scores 2.428 bits/dim on this split, a full-covariance Gaussian 2.971.
DIGITS_CALIBRATION

Photographs (16x16 RGB patches, 5 bits): trained on one, judged on the other, where the full-covariance Gaussian of the
training patches has 2.18 bits/dim; a Glow has to be .2 below it. PHOTOS_CALIBRATION

What a mistake does: without the factor H W in a log-determinant, or without the prior of what leaves at a split, the
log-determinant is not that of the Jacobian; a permutation or sign that is trained, or an initialisation in the graph, is
looked for by name. A likelihood below the lower limits is a log-determinant that is wrong in the flow's favour.
"""

import math
from dataclasses import replace

import pytest
import torch

from pyflowgen.data import digits, photos
from pyflowgen.layers import ActNorm, GlowStep
from pyflowgen.recipes import recipe
from pyflowgen.train import choose_path, evaluate, fit

DIGITS_LEVEL, DIGITS_LIMIT = 2.36, 1.6
SHORT_DIGITS_LEVEL = 2.75  # .2 below the Gaussian, after a quarter of the training, of a smaller model


def trained(data, path, options=None, **changes):
    chosen = recipe("glow")
    config = chosen.config(data, path=path, **changes)
    torch.manual_seed(config.seed)
    model = chosen.build(data, **(options or {}))
    fixed = {name: b.clone() for name, b in model.named_buffers() if name.endswith(("permutation", "sign"))}
    fit(model, data, config)
    model.eval()
    assert fixed and all(torch.equal(b, fixed[name]) for name, b in model.named_buffers() if name in fixed)
    with choose_path(path):
        return model, evaluate(model, data, data.test, draws=2)["bits_per_dim"]


def gaussian(data):
    """Bits/dim of the test set under the training set's full-covariance Gaussian."""
    generator = torch.Generator().manual_seed(0)
    train, test = (data.dequantize(t, generator).flatten(1).double() for t in (data.train, data.test))
    normal = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov())
    return (math.log(data.levels) - normal.log_prob(test).mean().item() / train.shape[1]) / math.log(2)


def check(model, data, path):
    """Each convolution's log-determinant is slogdet's, the whole map's is that of its Jacobian, sampling inverts it."""
    for step in (m for m in model.modules() if isinstance(m, GlowStep)):
        with choose_path(path):
            _, logdet = step.conv(torch.zeros(1, step.features, 3, 5))
        exact = torch.linalg.slogdet(step.conv.matrix().double()).logabsdet
        assert abs(logdet.item() / 15 - exact.item()) <= 1e-5
    x = data.dequantize(data.test[:4], torch.Generator().manual_seed(0))
    with choose_path(path):
        z, logdet = model.bijection(x)
        assert (model.decode(z) - x).abs().max() < 1e-3
        if x[0].numel() <= 64:
            jacobian = torch.autograd.functional.jacobian(lambda x: model.bijection(x)[0].sum(0), x).movedim(1, 0)
            exact = torch.linalg.slogdet(jacobian.flatten(2).double()).logabsdet
            assert (exact - logdet).abs().max() < 1e-3
        torch.manual_seed(0)
        drawn, log_prob = model.sample_and_log_prob(64)
        assert ((model.log_prob(drawn) - log_prob).abs() / x[0].numel()).median() < 1e-3
    mean, expected = drawn.mean(0), data.dequantize(data.train[:4096]).mean(0)
    assert (mean - expected).abs().mean() < 0.1


def test_initialisation_normalises_and_leaves_no_gradient():
    data = digits().image()
    torch.manual_seed(0)
    model = recipe("glow").build(data)
    seen = []

    def look(norm, args, output):
        seen.append((args[0].detach(), output[0].detach()))

    model(data.dequantize(data.train))
    norms = [m for m in model.modules() if isinstance(m, ActNorm)]
    assert all(norm.initialized for norm in norms)
    assert all(p.grad is None and p.is_leaf for p in model.parameters())
    x = data.dequantize(data.train, torch.Generator().manual_seed(0))
    for stage in model.bijection[0].stages:
        for layer in stage:
            if isinstance(layer, GlowStep):
                layer.actnorm.register_forward_hook(look)
                fresh = ActNorm(layer.features, event_dim=3)
                y, _ = fresh(x)
                assert y.mean((0, 2, 3)).abs().max() < 1e-4
                assert (y.var((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3
                # the fused pass was normalised by the same numbers, but for the noise of dequantisation
                assert (fresh.log_scale - layer.actnorm.log_scale).abs().max() < 0.1
            x, _ = layer(x)
        x = x.chunk(2, 1)[1]


def test_short_training_on_digits_beats_the_gaussian():
    data = digits().image()
    small = {"steps": 4, "channels": 32}
    model, bits = trained(data, "fused", small, epochs=12, lr=4e-3, warmup=20, ema=0.9, patience=None)
    print(f"Glow on digits, short: {bits:.4f}")
    check(model, data, "fused")
    assert DIGITS_LIMIT <= bits <= SHORT_DIGITS_LEVEL


def test_kernels_and_reference_train_alike():
    """The first steps, number by number: the same noise, the same order."""
    data = digits().image()
    few = replace(data, train=data.train[:256])
    options = {"steps": 2, "channels": 16}
    reached = [trained(few, path, options, epochs=4, warmup=0, ema=None)[1] for path in ("fused", "reference")]
    assert abs(reached[0] - reached[1]) <= 2e-3, reached


def test_short_training_on_photographs_beats_the_gaussian():
    data = photos()
    part = replace(data, train=data.train[::2], test=data.test[::4])
    model, bits = trained(part, "fused", {"steps": 2, "channels": 32}, epochs=2, lr=4e-3, warmup=20, ema=0.9)
    print(f"Glow on photos, short: {bits:.4f}, Gaussian {gaussian(data):.4f}")
    check(model, part, "fused")
    assert 0.8 <= bits <= gaussian(data) - 0.2


@pytest.mark.slow
def test_full_training_on_digits_with_kernels_and_reference():
    data, reached = digits().image(), {}
    for path in ("fused", "reference"):
        model, reached[path] = trained(data, path)
        check(model, data, path)
    print(f"Glow on digits, bits/dim: {reached}")
    assert all(DIGITS_LIMIT <= bits <= DIGITS_LEVEL for bits in reached.values()), reached
    assert reached["fused"] <= reached["reference"] + 0.03, reached


@pytest.mark.slow
@pytest.mark.parametrize("path", ["fused", "reference"])
def test_patches_of_the_other_photograph(path):
    data = photos()
    model, bits = trained(data, path)
    check(model, data, path)
    bound = gaussian(data)
    print(f"Glow on photos, {path}: {bits:.4f} bits/dim, Gaussian {bound:.4f}")
    assert 0.8 <= bits <= bound - 0.2
