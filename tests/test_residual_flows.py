"""Linear, low-rank and residual flows against their peers in float64, and what the contract of bijections leaves out.

Log-determinants, round trips and dtypes are in test_bijection.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import pyflowgen
from pyflowgen import Householder, LipschitzMLP, MatrixExponential, Planar, Radial, ResidualFlow, Sylvester
from pyflowgen.residual_flow import SpectralLinear


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost more than such small tensors take; layers draw their parameters from torch's generator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


# Peers.
@pytest.mark.parametrize("reflections", [1, 3, 5])
def test_householder_equals_nflows(reflections):
    peer = pytest.importorskip("nflows.transforms.orthogonal").HouseholderSequence(5, reflections).double()
    layer, x = Householder(5, reflections).double(), normal(4, 5)
    peer.q_vectors.data = layer.vectors.data
    torch.testing.assert_close(layer(x), peer.forward(x))
    torch.testing.assert_close(layer.inverse(x), peer.inverse(x))
    q = layer.matrix()
    torch.testing.assert_close(x @ q.mT, layer(x)[0])
    torch.testing.assert_close(q @ q.mT, torch.eye(5, dtype=torch.float64))


def test_rotation_equals_zuko():
    transforms = pytest.importorskip("zuko.transforms")
    layer, x = MatrixExponential(4, skew=True).double(), normal(3, 4)
    with torch.no_grad():
        layer.weight.mul_(5)
    peer = transforms.RotationTransform(layer.weight)
    y, ladj = peer.call_and_ladj(x)
    torch.testing.assert_close(layer(x), (y, ladj))
    torch.testing.assert_close(layer.inverse(y)[0], x)


def test_planar_equals_normflows():
    peer = pytest.importorskip("normflows.flows").Planar((3,)).double()
    layer, x = Planar(3).double(), normal(6, 3)
    with torch.no_grad():
        for name in ("u", "w"):
            getattr(layer, name).copy_(getattr(peer, name)[0])
        peer.b.fill_(0.3), layer.b.fill_(0.3)
    torch.testing.assert_close(layer(x), peer.forward(x))


def test_planar_equals_torchflows():
    """Its sigmoid is a tanh of half the argument, and it shifts by half of u besides."""
    peer = pytest.importorskip("torchflows.bijections.finite.residual.planar").Planar((3,)).double()
    layer, x = Planar(3).double(), normal(6, 3)
    with torch.no_grad():
        w, u = peer.w / 2, peer.u / 2
        if (wu := (w * u).sum()) < -0.9:
            peer.u.neg_()
            u, wu = -u, -wu
        inner = torch.log(torch.expm1(wu + 1))  # the constraint taken back
        layer.w.copy_(w), layer.b.copy_(peer.b / 2), layer.u.copy_(u - (wu - inner) * w / (w * w).sum())
        want, logdet = peer.inverse(x)
    got, got_logdet = layer(x)
    torch.testing.assert_close((got + u, got_logdet), (want, logdet))


def test_radial_equals_normflows():
    peer = pytest.importorskip("normflows.flows").Radial((3,)).double()
    layer, x = Radial(3).double(), normal(6, 3)
    with torch.no_grad():
        layer.x0.copy_(peer.z_0[0]), layer.a.copy_(peer.alpha[0]), layer.b.copy_(peer.beta[0])
    torch.testing.assert_close(layer(x), peer.forward(x))


def test_sylvester_equals_torchflows():
    peer = pytest.importorskip("torchflows.bijections.finite.residual.sylvester").IdentitySylvester((6,)).double()
    layer, x = Sylvester(6, 3, frame="triangular").double(), normal(5, 6)
    with torch.no_grad():
        r, r_tilde = (m.compute_matrix() for m in (peer.r, peer.r_tilde))
        if max(r.diagonal().abs().max(), r_tilde.diagonal().abs().max()) >= 1.9:
            pytest.skip("a diagonal that ours bounds")
        layer.r.copy_(r.triu(1) / 2 + r_tilde.triu(1).mT / 2)
        layer.diagonals.copy_(torch.atanh(torch.stack([r.diagonal(), r_tilde.diagonal()]) / 2))
        layer.b.copy_(peer.b / 2)
        want, logdet = peer.inverse(x)
        shift = torch.cat([r.sum(1) / 2, torch.zeros(3, dtype=torch.float64)])
    got, got_logdet = layer(x)
    torch.testing.assert_close((got + shift, got_logdet), (want, logdet))


def test_residual_flow_equals_normflows():
    residual = pytest.importorskip("normflows.flows.residual")
    g = LipschitzMLP(2, [8]).double()
    layer, x = ResidualFlow(g).double().eval(), normal(6, 2)
    y, minus = residual.iResBlock(g, brute_force=True)(x.clone().requires_grad_(), torch.zeros(6, 1).double())
    torch.testing.assert_close(layer(x), (y, -minus.squeeze(1)))


# What is special.
def test_determinant_lemma_of_planar_is_slogdet():
    layer, x = Planar(4).double(), normal(8, 4)
    u, wu = layer._constrained(layer.u, layer.w)
    assert wu > -1
    h = torch.tanh(x @ layer.w + layer.b)
    jacobian = torch.eye(4).double() + (1 - h * h)[:, None, None] * u[:, None] * layer.w
    torch.testing.assert_close(layer(x)[1], pyflowgen.slogdet(jacobian)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_near_the_edge_of_invertibility(dtype):
    """w·û near -1, where the map is nearly flat: still solved, to what the flatness leaves."""
    layer = Planar(2).to(dtype)
    with torch.no_grad():
        layer.w.copy_(torch.tensor([3.0, -1.0]))
        layer.u.copy_(-4 * layer.w)
    x = torch.cat([normal(200, 2), torch.zeros(1, 2, dtype=torch.float64), 1e3 * normal(20, 2)]).to(dtype)
    y, _ = layer(x)
    again, _ = layer(layer.inverse(y)[0])
    torch.testing.assert_close(again, y, rtol=16 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)
    nan = layer.inverse(torch.full((1, 2), torch.nan, dtype=dtype))[0]
    assert nan.isnan().all()


def conditional() -> list:
    return [
        Planar(3, context_features=2),
        Radial(3, context_features=2),
        *(Sylvester(3, frame=frame, context_features=2) for frame in ("orthogonal", "householder", "triangular")),
        Sylvester(3, 2, context_features=2),
        ResidualFlow(LipschitzMLP(3, [8], context_features=2)).eval(),
    ]


@pytest.mark.parametrize("layer", conditional(), ids=lambda layer: f"{type(layer).__name__}-{layer.extra_repr()}")
def test_conditional(layer):
    """A row's parameters are those of its context: row by row as with a batch of one; both ways, gradients too."""
    layer = layer.double()
    x, context = normal(4, 3).requires_grad_(), normal(4, 2).requires_grad_()
    y, logdet = layer(x, context)
    for i in range(4):
        torch.testing.assert_close(layer(x[i : i + 1], context[i : i + 1]), (y[i : i + 1], logdet[i : i + 1]))
    back, minus = layer.inverse(y, context)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    assert not torch.allclose(y, layer(x, context + 1)[0])
    small = (x[:2].detach().requires_grad_(), context[:2].detach().requires_grad_())
    assert torch.autograd.gradcheck(layer, small)
    assert torch.autograd.gradcheck(layer.inverse, small)
    for wrong in (None, context[:, :1]):
        with pytest.raises(ValueError, match="context has shape"):
            layer(x, wrong)


@pytest.mark.parametrize(
    "layer", [Planar(3), Radial(3), Sylvester(3), Sylvester(3, 2)], ids=lambda layer: layer.extra_repr()
)
def test_gradients_of_the_parameters_through_the_inverse(layer):
    layer = layer.double()
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in layer.named_parameters()), strict=True)
    y = normal(2, 3)

    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, v: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer.inverse(v)

    def call(*params: Tensor):
        return torch.func.functional_call(Inverse(), {f"layer.{n}": p for n, p in zip(names, params, strict=True)}, y)

    assert torch.autograd.gradcheck(call, values)


# Residual flows.
def test_spectral_norm_is_held_and_the_network_contracts():
    for activation in ("lipswish", "elu", "tanh"):
        net = LipschitzMLP(4, [32, 32], activation, lipschitz=0.9).double()
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(10)
        flow = ResidualFlow(net)
        flow.eval()  # lets the power iterations converge
        for layer in net.layers:
            assert torch.linalg.matrix_norm(layer.constrained_weight(), 2) <= 0.9 * (1 + 1e-3)
        jacobians = torch.vmap(torch.func.jacrev(net))(normal(200, 4) * 3)
        assert torch.linalg.matrix_norm(jacobians, 2).max() < 0.9**3 * 1.01
    free = SpectralLinear(3, 3)
    with torch.no_grad():
        free.weight.mul_(0.01)
    free.update()
    torch.testing.assert_close(free.constrained_weight(), free.weight)  # what is small already stays


def test_training_estimate_agrees_with_evaluation():
    flow = ResidualFlow(LipschitzMLP(3, [16], lipschitz=0.8), exact_terms=4, rate=0.3).double()
    x = normal(1, 3).expand(64, 3)
    flow.eval()
    y, truth = flow(x)
    flow.train()
    draws = torch.stack([flow(x)[1].mean().detach() for _ in range(400)])
    torch.testing.assert_close(flow(x)[0], y)
    assert (draws.mean() - truth[0]).abs() < 4.5 * draws.std() / 20 < 0.01


def test_large_events_are_estimated_in_evaluation():
    net = LipschitzMLP(5, [16], lipschitz=0.7)
    small, large = ResidualFlow(net).eval(), ResidualFlow(net, exact_features=4, samples=400).eval()
    x = torch.randn(6, 5)
    torch.testing.assert_close(large(x)[1], small(x)[1], rtol=0, atol=0.05)


def test_images():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    with torch.no_grad():
        conv.weight.mul_(0.3)
    flow = ResidualFlow(nn.Sequential(conv, nn.Tanh()), event_dim=3).double().eval()
    x = normal(3, 2, 3, 3)
    y, logdet = flow(x)
    back, minus = flow.inverse(y)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0]).reshape(18, 18)
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian).logabsdet)
    flow.train()
    loss = -flow(x)[1].sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())


def test_inverse_that_cannot_converge_says_so():
    class Expansion(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    with pytest.raises(RuntimeError, match="did not converge in 50 iterations.*Lipschitz constant below 1"):
        ResidualFlow(Expansion(), iterations=50).eval().inverse(torch.ones(2, 2))


def test_training_finds_the_density():
    """Maximum likelihood through the estimate: from the data's entropy away, two nats nearer, never beyond it."""
    flow = nn.ModuleList(ResidualFlow(LipschitzMLP(2, [32, 32])) for _ in range(4))
    scale = torch.tensor([[2.0, 1.2], [0.0, 0.5]])
    entropy = 1 + math.log(2 * math.pi) + scale.det().log().item()
    optimiser = torch.optim.Adam(flow.parameters(), 1e-2)

    def loss(x: Tensor) -> Tensor:
        total = torch.zeros(len(x))
        for layer in flow:
            x, logdet = layer(x)
            total = total + logdet
        return (x.square().sum(1) / 2 + math.log(2 * math.pi) - total).mean()

    first = loss(torch.randn(2000, 2) @ scale).item()
    for _ in range(150):
        optimiser.zero_grad()
        loss(torch.randn(128, 2) @ scale).backward()
        optimiser.step()
    flow.eval()
    last = loss(torch.randn(4000, 2) @ scale).item()
    assert entropy - 0.06 < last < min(first - 0.5, entropy + 0.25), (first, last, entropy)


@pytest.mark.parametrize("call, kind, message", [
    (lambda: Householder(0), ValueError, "features=0"),
    (lambda: Householder(3)(torch.ones(2, 4)), ValueError, r"x has shape \(2, 4\), expected 3 on dimension -1"),
    (lambda: MatrixExponential(3, event_dim=3)(torch.ones(2, 2, 2)), ValueError, "expected 3 on dimension -3"),
    (lambda: Planar(3)(torch.ones(2, 4)), ValueError, r"expected \(\.\.\., 3\)"),
    (lambda: Sylvester(3, 4), ValueError, "rank=4"),
    (lambda: Sylvester(3, 2, frame="householder"), ValueError, "rank=2, features=3, expected features"),
    (lambda: Sylvester(3, frame="square"), ValueError, "'square'"),
    (lambda: Sylvester(3, flip=True), ValueError, "flip=True"),
    (lambda: LipschitzMLP(3, [4], "relu"), ValueError, "'relu'"),
    (lambda: LipschitzMLP(3, [4], lipschitz=1.0), ValueError, "lipschitz=1.0"),
    (lambda: ResidualFlow(torch.tanh), TypeError, "g is builtin_function_or_method"),
    (lambda: ResidualFlow(nn.Identity(), iterations=0), ValueError, "iterations is 0"),
])  # fmt: skip
def test_bad_input(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
