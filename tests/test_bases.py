"""Mixture and resampled bases against closed forms, and as parts of a flow."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from pyflowgen.bases import GaussianMixture, Resampled
from pyflowgen.bijection import Chain
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import ActNorm, Permutation


@pytest.fixture(autouse=True)
def seeded():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def grid(half: float, steps: int) -> tuple[torch.Tensor, float]:
    """Midpoints of a square's cells, and a cell's area."""
    h = 2 * half / steps
    axis = torch.arange(steps, dtype=torch.float64) * h - half + h / 2
    return torch.cartesian_prod(axis, axis), h * h


def mixture(**options) -> GaussianMixture:
    base = GaussianMixture(2, 3, spread=2.0, **options).double()
    with torch.no_grad():
        base.log_scale.normal_(-0.3, 0.3)
        base.logits.normal_()
    return base


def by_hand(base: GaussianMixture, z: torch.Tensor, c: int | None = None) -> torch.Tensor:
    loc, scale, logits = (t if c is None else t[c] for t in (base.loc, base.log_scale.exp(), base.logits))
    parts = [
        w * Independent(Normal(m, s), 1).log_prob(z).exp()
        for w, m, s in zip(logits.softmax(0), loc, scale, strict=True)
    ]
    return sum(parts).log()


# ---------------------------------------------------------------------------------------------------------- mixture
@pytest.mark.parametrize("learnable", [True, False])
def test_mixture_has_its_density(learnable):
    base = mixture(learnable=learnable)
    z = 3 * torch.randn(7, 2).double()
    torch.testing.assert_close(base().log_prob(z), by_hand(base, z))
    points, area = grid(12, 400)
    torch.testing.assert_close(
        base().log_prob(points).exp().sum() * area, torch.tensor(1.0).double(), rtol=0, atol=1e-6
    )
    assert len(list(base.parameters())) == 3 * learnable and set(base.state_dict()) == {"loc", "log_scale", "logits"}
    if learnable:
        names = dict(base.named_parameters())
        assert torch.autograd.gradcheck(
            lambda z, *p: torch.func.functional_call(base, dict(zip(names, p, strict=True))).log_prob(z),
            (z.requires_grad_(), *names.values()),
        )


def test_mixture_samples_have_its_moments_and_weights():
    base = mixture()
    drawn = base().sample((200_000,))
    weights = base.logits.softmax(0)
    mean = (weights[:, None] * base.loc).sum(0)
    second = (weights[:, None] * (base.loc.square() + (2 * base.log_scale).exp())).sum(0)
    torch.testing.assert_close(drawn.mean(0), mean.detach(), rtol=0, atol=0.03)
    torch.testing.assert_close(drawn.square().mean(0), second.detach(), rtol=0.02, atol=0.02)
    with pytest.raises(NotImplementedError):
        base().rsample()
    # far apart, a sample's component can be told
    with torch.no_grad():
        base.loc.copy_(torch.tensor([[-50.0, 0], [0, 0], [50, 0]]))
    found = torch.bincount((base().sample((50_000,))[:, 0] / 50).round().long() + 1, minlength=3) / 50_000
    torch.testing.assert_close(found.double(), weights.detach(), rtol=0, atol=0.01)


def test_mixture_of_a_class():
    base = mixture(classes=4)
    z = torch.randn(6, 2).double()
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    want = torch.stack([by_hand(base, z[i], int(c)) for i, c in enumerate(labels)])
    torch.testing.assert_close(base(labels).log_prob(z), want)
    torch.testing.assert_close(base(nn.functional.one_hot(labels, 4).double()).log_prob(z), want)
    uniform = torch.stack([by_hand(base, z, c).exp() for c in range(4)]).mean(0).log()
    torch.testing.assert_close(base().log_prob(z), uniform)
    odds = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    some = sum(p * by_hand(base, z, c).exp() for c, p in enumerate(odds)).log()
    torch.testing.assert_close(base(odds.expand(6, 4)).log_prob(z), some)
    drawn = base(labels).sample((20_000,))
    assert drawn.shape == (20_000, 6, 2) and drawn.dtype == torch.float64
    for i, c in enumerate(labels):
        mean = (base.logits[c].softmax(0)[:, None] * base.loc[c]).sum(0)
        torch.testing.assert_close(drawn[:, i].mean(0), mean.detach(), rtol=0, atol=0.08)
    loss = base(nn.functional.one_hot(labels, 4).double()).log_prob(z).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(base.parameters())))
    with pytest.raises(ValueError, match=r"context has shape \(6, 3\), expected class probabilities \(\.\.\., 4\)"):
        base(torch.zeros(6, 3))
    with pytest.raises(ValueError, match="components=0"):
        GaussianMixture(2, 0)


def test_mixture_of_events_of_any_shape_and_type():
    base = GaussianMixture((2, 3), 4, classes=2)
    z = torch.randn(5, 2, 3)
    full = base().log_prob(z)
    assert full.shape == (5,) and base(torch.tensor([0, 1, 1, 0, 1])).sample().shape == (5, 2, 3)
    half = copy.deepcopy(base).bfloat16()
    assert half().sample((5,)).dtype == torch.bfloat16 and half().log_prob(z.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(half().log_prob(z.bfloat16()), full, rtol=0.02, atol=0.1)
    torch.testing.assert_close(base.double()().log_prob(z.double()).float(), full)
    assert base.to("meta")().log_prob(z.double().to("meta")).device.type == "meta"


def test_mixture_under_a_flow_finds_the_classes():
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    labels = torch.randint(0, 3, (3000,))
    x = centres[labels] + 0.5 * torch.randn(3000, 2)
    model = Flow(GaussianMixture(2, 1, classes=3), Chain(Permutation.reverse(2)), context_dim=0)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(150):
        loss = -model.log_prob(x, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.base.loc.detach()[:, 0].flip(-1), centres, rtol=0, atol=0.1)
    assert abs(loss.item() - math.log(2 * math.pi * math.e * 0.25)) < 0.05  # the entropy given the class
    assert (model.sample(500, torch.tensor([0, 1, 2])).mean(0) - centres).abs().max() < 0.15


# -------------------------------------------------------------------------------------------------------- resampled
class Logit(nn.Module):
    """Keeps draws with probability `inside` where z_0 > 0, with `outside` elsewhere."""

    def __init__(self, inside: float, outside: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.logit(torch.tensor([outside, inside]).double()))

    def forward(self, z):
        return torch.where(z[..., 0] > 0, self.logits[1], self.logits[0])


@pytest.mark.parametrize("truncation", [2, 5, 100, None])
def test_resampled_density_in_closed_form(truncation):
    base = Resampled(2, Logit(0.6, 0.1), truncation=truncation).double().eval()
    assert abs(base.estimate(1 << 20).item() - 0.35) < 2e-3
    base.normalizer.fill_(0.35)
    alpha = 0.0 if truncation is None else 0.65 ** (truncation - 1)
    z = torch.randn(50, 2).double()
    a = torch.where(z[:, 0] > 0, 0.6, 0.1)
    want = Independent(Normal(torch.zeros(2).double(), 1), 1).log_prob(z) + ((1 - alpha) * a / 0.35 + alpha).log()
    torch.testing.assert_close(base().log_prob(z), want)
    kept = (base().sample((200_000,))[:, 0] > 0).double().mean()
    assert abs(kept - ((1 - alpha) * 0.3 / 0.35 + alpha / 2)) < 4e-3


def test_resampled_integrates_to_one_and_samples_match_its_density():
    base = Resampled(2, hidden=(16,), truncation=8).double()
    for p in base.acceptance.parameters():
        nn.init.normal_(p, std=1.5)
    base.eval()
    base.estimate(1 << 20)
    points, area = grid(7, 400)
    with torch.no_grad():
        mass = base().log_prob(points).exp() * area
    assert abs(mass.sum() - 1) < 4e-3  # Z is known to 1/sqrt(draws)
    assert (mass / (DiagNormal(2)().log_prob(points).exp() * area)).quantile(0.9) > 1.2, (
        "as good as the proposal: no test"
    )
    drawn = base().sample((200_000,))
    cells = lambda z: ((z + 7) / 14 * 20).floor().long().clamp(0, 19)  # noqa: E731
    index = lambda c: c[:, 0] * 20 + c[:, 1]  # noqa: E731
    expected = torch.zeros(400).double().index_add(0, index(cells(points)), mass)
    found = torch.bincount(index(cells(drawn)), minlength=400) / len(drawn)
    busy = expected > 1e-4
    chi2 = (len(drawn) * (found - expected).square() / expected)[busy].sum()
    assert chi2 < 1.3 * busy.sum(), (chi2, busy.sum())
    assert busy.sum() > 60


def test_resampled_normalizer_is_a_moving_average_with_a_gradient():
    base = Resampled(2, Logit(0.7, 0.7), draws=64, decay=0.1).double()
    z = torch.randn(9, 2).double()
    loss = base().log_prob(z).sum()  # a constant acceptance changes nothing, whatever it is
    torch.testing.assert_close(loss, DiagNormal(2).double()().log_prob(z).sum())
    (gradient,) = torch.autograd.grad(loss, list(base.acceptance.parameters()))
    assert abs(gradient.sum()) < 1e-8 < gradient.abs().max()  # inside and outside pull against each other
    torch.testing.assert_close(base.normalizer, torch.tensor(0.7).double())
    with torch.no_grad():
        base.acceptance.logits.fill_(-1.0)
    for _ in range(3):
        base().log_prob(z)
    a = torch.sigmoid(torch.tensor(-1.0)).double()
    torch.testing.assert_close(base.normalizer, a + (0.7 - a) * 0.9**3, rtol=1e-6, atol=0)
    base.eval()
    before = base.normalizer.clone()
    assert torch.equal(base().log_prob(z), base().log_prob(z)) and torch.equal(base.normalizer, before)
    fresh = Resampled(2, Logit(0.6, 0.1)).double().eval()
    fresh.load_state_dict(base.state_dict())
    assert torch.equal(fresh.normalizer, before)
    # never trained: the first density asks for an estimate
    fresh = Resampled(2, Logit(0.6, 0.1)).double().eval()
    assert fresh().log_prob(z).isfinite().all() and abs(fresh.normalizer - 0.35) < 0.01


@pytest.mark.parametrize("truncation", [4, None])
def test_resampled_gradient_is_that_of_the_exact_normalizer(truncation):
    base = Resampled(2, Logit(0.6, 0.1), truncation=truncation, draws=200_000, decay=1.0).double()
    z = torch.randn(40, 2).double()
    (got,) = torch.autograd.grad(base().log_prob(z).mean(), list(base.parameters()))
    logits = base.acceptance.logits.detach().requires_grad_()
    a = torch.sigmoid(logits)
    norm = a.mean()
    alpha = 0 if truncation is None else (1 - norm) ** (truncation - 1)
    (want,) = torch.autograd.grad(
        ((1 - alpha) * torch.where(z[:, 0] > 0, a[1], a[0]) / norm + alpha).log().mean(), logits
    )
    torch.testing.assert_close(got, want, rtol=0.03, atol=3e-3)


def test_resampled_of_any_type_shape_and_proposal():
    base = Resampled((1, 4, 4), hidden=(8,), truncation=3)
    z = torch.randn(5, 1, 4, 4)
    torch.testing.assert_close(base().log_prob(z), DiagNormal((1, 4, 4))().log_prob(z))  # as it starts
    assert base().sample((2, 3)).shape == (2, 3, 1, 4, 4) and base().sample().shape == (1, 4, 4)
    half = copy.deepcopy(base).bfloat16()
    assert half.normalizer.dtype == torch.float32
    assert half().log_prob(z.bfloat16()).dtype == torch.float32 and half().sample((2,)).dtype == torch.bfloat16
    assert base.double().normalizer.dtype == torch.float64 and base().log_prob(z.double()).dtype == torch.float64
    wide = Resampled(2, Logit(0.9, 0.2), proposal=DiagNormal(2, learnable=True), truncation=None).double()
    with torch.no_grad():
        wide.proposal.loc.fill_(5.0)
    wide.eval()
    assert wide.estimate(1 << 14) > 0.89 and wide().sample((1000,)).mean() > 4.8
    for wrong in (dict(truncation=1), dict(draws=0), dict(decay=0.0)):
        with pytest.raises(ValueError, match="expected at least 2 or None"):
            Resampled(2, **wrong)
    with pytest.raises(ValueError, match=r"acceptance gave shape \(1024, 2\)"):
        Resampled(2, nn.Linear(2, 2))().log_prob(torch.randn(5, 2))


def test_resampled_under_a_flow_learns_two_modes():
    """An affine map cannot part one mode in two; the base can."""
    x = 0.4 * torch.randn(4000, 2) + torch.tensor([2.0, 0.0]) * (2.0 * torch.randint(0, 2, (4000, 1)) - 1)
    losses = {}
    for name, base in (("normal", DiagNormal(2)), ("resampled", Resampled(2, hidden=(32, 32)))):
        model = Flow(base, Chain(ActNorm(2)))
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(250):
            loss = -model.log_prob(x[torch.randint(0, 4000, (512,))]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        if name == "resampled":
            base.estimate(1 << 17)
        with torch.no_grad():
            losses[name] = -model.log_prob(x).mean().item()
    entropy = math.log(2 * math.pi * math.e * 0.16) + math.log(2)
    assert losses["resampled"] < losses["normal"] - 0.4
    assert entropy - 0.05 < losses["resampled"] < entropy + 0.25, (losses, entropy)
    drawn = model.sample(5000)
    assert (drawn[:, 0].abs() < 0.6).double().mean() < 0.06 and abs((drawn[:, 0] > 0).double().mean() - 0.5) < 0.05
