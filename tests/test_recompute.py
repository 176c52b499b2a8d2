"""`Chain(memory="recompute")`: the gradients of the stored chain in memory that does not grow with depth."""

from __future__ import annotations

import contextlib
import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyflowgen
from pyflowgen import recompute
from pyflowgen.bijection import CHECKPOINT_EVERY, Bijection, Chain, Inverse
from pyflowgen.data import digits
from pyflowgen.flow import DiagNormal, Flow
from pyflowgen.layers import ActNorm, Dequantize, Logit, MultiScale, Permutation, Scale, Squeeze
from pyflowgen.low_rank_flows import Planar, Sylvester
from pyflowgen.models import NICE, NSF, Glow, RealNVP
from pyflowgen.nets import MLP, ConvResNet, ResidualMLP
from pyflowgen.ops.affine_coupling import AdditiveCoupling, AffineCoupling
from pyflowgen.ops.rational_quadratic_spline import SplineCoupling
from pyflowgen.residual_flow import LipschitzMLP, ResidualFlow

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


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


def randomise(module: nn.Module, spread: float = 0.3) -> nn.Module:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(spread * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p))
    return module


def coupling(features: int = 6, swap: bool = False, context_features: int = 0) -> AffineCoupling:
    half = features // 2
    net = MLP(half, [8], features, "tanh", context_features=context_features)
    return AffineCoupling(net, mask="halves", swap=swap, scale="tanh")


def splines(context_features: int = 0) -> SplineCoupling:
    outputs = 3 * SplineCoupling.params_per_element(4)
    return SplineCoupling(MLP(3, [8], outputs, "tanh", context_features=context_features), bins=4)


def vectors(context_features: int = 0) -> list[Bijection]:
    shared = coupling(context_features=context_features)
    return [
        ActNorm(6, init=False),
        shared,
        Chain(Permutation.random(6, seed=3), splines(context_features), Chain(Permutation.reverse(6))),
        AdditiveCoupling(MLP(3, [8], 3, "silu", context_features=context_features), mask="interleaved"),
        shared,  # the same layer twice: its gradients add up
        Inverse(coupling(swap=True, context_features=context_features)),
        Scale(6, init=False),
    ]


def images() -> list[Bijection]:
    def net(c: int) -> ConvResNet:
        return ConvResNet(c, 4, 2 * c, blocks=1, activation="tanh", weight_norm=True)

    return [
        ActNorm(2, event_dim=3, init=False),
        AffineCoupling(net(2), mask="checkerboard", scale="tanh", event_dim=3),
        Squeeze(),
        AffineCoupling(net(4), mask="channel", scale="tanh", event_dim=3, swap=True),
    ]


def pair(layers: list[Bijection], every: int | None = None) -> tuple[Chain, Chain]:
    """A stored chain and one that recomputes, of the same layers."""
    stored = randomise(Chain(*layers).double())
    return stored, Chain(*stored.bijections, memory="recompute", checkpoint_every=every)  # type: ignore[arg-type,return-value]


def data(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def gradients(f, chain: Chain, *inputs: Tensor) -> list[Tensor]:
    """Outputs, then gradients of a loss of both with respect to inputs and parameters."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y, logdet = f(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(y.dtype)
    loss = (y * weights).sum() + (logdet * torch.linspace(1, 2, logdet.numel(), dtype=logdet.dtype)).sum()
    parameters = [p for p in chain.parameters() if p.requires_grad]
    return [y.detach(), logdet.detach(), *torch.autograd.grad(loss, [*leaves, *parameters])]


def same(a: list[Tensor], b: list[Tensor], tol: float = 1e-9) -> None:
    assert len(a) == len(b)
    for s, t in zip(a, b, strict=True):
        torch.testing.assert_close(s, t, rtol=tol, atol=tol)


def runs_of(y: Tensor) -> list[int]:
    """How many layers each operator of a chain's backward pass goes through."""
    return [count for _, count, back in y.grad_fn.runs if back is not None]  # type: ignore[union-attr]


class Conditioners:
    masked = staticmethod(lambda: AffineCoupling(MLP(6, [8], 12, "tanh"), mask=torch.arange(6) % 3 == 0, scale="tanh"))
    residual = staticmethod(lambda: AffineCoupling(ResidualMLP(3, 8, 6, blocks=2, activation="silu"), swap=True))
    gated = staticmethod(lambda: AffineCoupling(ResidualMLP(3, 8, 6, blocks=2, context_features=2)))
    spline = staticmethod(lambda: splines())
    additive = staticmethod(lambda: AdditiveCoupling(MLP(3, [8, 8], 3, "silu"), mask="interleaved"))
    order = staticmethod(lambda: AffineCoupling(MLP(3, [8], 6, "gelu"), scale="sigmoid", order="shift_scale"))


@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", [k for k in vars(Conditioners) if k[0] != "_"])
def test_couplings_in_one_operator_go_back_together(name, inverse, every):
    context = name == "gated"
    make = getattr(Conditioners, name)
    layers = [
        *(make(), ActNorm(6, init=False), Permutation.random(6, seed=4), make(), Inverse(make())),
        *(Scale(6, init=False), make(), Permutation.random(6, seed=5)),
    ]
    stored, chain = pair(layers, every)
    inputs = [0.7 * data(333, 6), *([data(333, 2)] if context else [])]
    functions = (stored.inverse, chain.inverse) if inverse else (stored, chain)
    results = [gradients(f, c, *inputs) for f, c in zip(functions, (stored, chain), strict=True)]
    same(*results, tol=1e-8)
    y, _ = functions[1](*inputs)
    assert sorted(runs_of(y)) == [3, 4], "all but the Inverse, which is an operator of its own"
    torch.set_num_threads(2)
    for a, b in zip(results[1], gradients(functions[1], chain, *inputs), strict=True):
        assert torch.equal(a, b), "the number of threads changes bits"
    strided = torch.stack([inputs[0], data(333, 6)], -1)[..., 0]
    same(results[1], gradients(functions[1], chain, strided, *inputs[1:]), tol=0)
    same(
        gradients(functions[1], chain, *(t[:5] for t in inputs)),
        gradients(functions[0], stored, *(t[:5] for t in inputs)), tol=1e-8,
    )  # fmt: skip
    for p in chain.parameters():
        p.requires_grad_(False)
    same(*(gradients(f, chain, *inputs) for f in functions), tol=1e-8)


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("case", ["vectors", "context", "images"])
def test_gradients_are_those_of_the_stored_chain(case, inverse, every, path):
    stored, chain = pair(images() if case == "images" else vectors(2 * (case == "context")), every)
    event = ((8, 2, 2) if inverse else (2, 4, 4)) if case == "images" else (6,)
    inputs = [data(5, *event)] + ([data(5, 2)] if case == "context" else [])
    functions = (stored.inverse, chain.inverse) if inverse else (stored, chain)
    a, b = (gradients(f, c, *inputs) for f, c in zip(functions, (stored, chain), strict=True))
    assert all(g.abs().max() > 0 for g in a)
    same(a, b)


def test_the_result_is_one_node_and_parts_may_be_frozen():
    stored, chain = pair(vectors())
    y, logdet = chain(data(5, 6))
    assert "Recompute" in y.grad_fn.name() and y.grad_fn is logdet.grad_fn
    stored[0].requires_grad_(False)
    stored[1].conditioner.layers[0].weight.requires_grad_(False)
    same(gradients(stored, stored, data(5, 6)), gradients(chain, chain, data(5, 6)))
    for p in stored.parameters():
        p.requires_grad_(False)
    assert not chain(data(5, 6))[0].requires_grad
    x = data(5, 6).requires_grad_()
    (got,) = torch.autograd.grad(chain(x)[0].sum(), x)
    (want,) = torch.autograd.grad(stored(x)[0].sum(), x)
    torch.testing.assert_close(got, want)


def test_only_one_output_used_and_a_second_backward():
    stored, chain = pair(vectors())
    x = data(5, 6)
    for i in (0, 1):
        got = torch.autograd.grad(chain(x)[i].sum(), list(chain.parameters()), allow_unused=True)
        want = torch.autograd.grad(stored(x)[i].sum(), list(stored.parameters()), allow_unused=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(
                torch.zeros(()) if a is None else a.norm(),
                torch.zeros(()) if b is None else b.norm(),
                check_dtype=False,
            )
    loss = chain(x)[1].sum()
    first = torch.autograd.grad(loss, list(chain.parameters()), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(loss, list(chain.parameters()), allow_unused=True)
    assert all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_kept_under_no_grad():
    stored, chain = pair(vectors())
    with torch.no_grad():
        got, want = chain(data(5, 6)), stored(data(5, 6))
    assert got[0].grad_fn is None and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_chain_without_parameters_and_of_identities():
    class Same(Bijection):
        def forward(self, x, context=None):
            return x, x.new_zeros(x.shape[:-1])

        inverse = forward

    for layers in (
        [Permutation.reverse(4), Permutation.random(4, seed=1)],
        [Same()],
        [Same(), Same(), Permutation.reverse(4)],
    ):
        x = data(3, 4).requires_grad_()
        y, logdet = Chain(*layers, memory="recompute")(x)
        want = Chain(*layers)(x)[0]
        assert torch.equal(y, want) and torch.equal(logdet, torch.zeros(3, dtype=torch.float64))
        weights = data(4)
        got = torch.autograd.grad((y * weights).sum(), x)[0]
        torch.testing.assert_close(got, torch.autograd.grad((want * weights).sum(), x)[0])


@pytest.mark.parametrize("every", [None, 2])
def test_data_dependent_initialisation(every):
    layers = [ActNorm(6), coupling(), ActNorm(6), coupling(swap=True), Scale(6)]
    a = randomise(Chain(*layers).double())
    b = copy.deepcopy(a)
    b.memory, b.checkpoint_every = "recompute", every
    x = 3 + 5 * data(40, 6)
    same(gradients(a, a, x), gradients(b, b, x))
    assert b[2].initialized and not torch.equal(b[2].shift, layers[2].shift.new_zeros(6))
    same([p.detach() for p in a.parameters()], [p.detach() for p in b.parameters()])
    x = data(7, 6)  # and it stays set
    same(gradients(a, a, x), gradients(b, b, x))


def test_random_layers_are_evaluated_once():
    stored, chain = pair([Dequantize(8), Logit(0.05), coupling(), ActNorm(6, init=False), coupling(swap=True)])
    x = torch.randint(0, 8, (9, 6)).double()
    results = []
    for c in (stored, chain):
        torch.manual_seed(0)
        y, logdet = c(x)
        results.append(
            [y.detach(), logdet.detach(), *torch.autograd.grad(y.square().sum() - logdet.sum(), list(c.parameters()))]
        )
    same(*results)

    drop = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 6))
    norm = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16), nn.Linear(16, 6))
    for net in (drop, norm):
        stored, chain = pair([coupling(), AffineCoupling(net, scale="tanh"), coupling(swap=True)])
        a, b = copy.deepcopy(stored), copy.deepcopy(chain)
        torch.manual_seed(1)
        want = gradients(a, a, data(9, 6))
        torch.manual_seed(1)
        same(want, gradients(b, b, data(9, 6)))
        same([t.double() for t in a.buffers()], [t.double() for t in b.buffers()])  # running statistics moved once
        a.eval(), b.eval()
        same(gradients(a, a, data(9, 6)), gradients(b, b, data(9, 6)))


def test_chains_inside_another_layer_see_to_themselves():
    torch.manual_seed(0)
    options = dict(channels=4, blocks=1, activation="tanh", alpha=0.05, checkpoint_every=None)
    a, b = (RealNVP((1, 4, 4), memory=memory, **options).double() for memory in ("store", "recompute"))
    b.load_state_dict(a.state_dict())
    x = torch.rand(6, 1, 4, 4, dtype=torch.float64)
    a(x), b(x)
    randomise(a), randomise(b)
    results = []
    for model in (a, b):
        logp = model.log_prob(x)
        results.append([logp.detach(), *torch.autograd.grad(logp.sum(), list(model.parameters()))])
    same(*results)
    assert sum("Recompute" in name for name in nodes(b.log_prob(x))) == 2, "one for each scale"
    multi = MultiScale([Chain(Squeeze(), memory="recompute"), ActNorm(2, event_dim=3, init=False)], (1, 4, 4))
    assert Chain(multi, memory="recompute")(torch.randn(2, 1, 4, 4))[0].shape == (2, 16)


def nodes(t: Tensor) -> list[str]:
    todo, seen = [t.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [after for after, _ in node.next_functions]
    return [node.name() for node in seen]


MODELS = {
    "nice": lambda **o: NICE(6, hidden=(8,), **o),
    "realnvp": lambda **o: RealNVP(6, couplings=4, hidden=(8,), levels=5, alpha=0.1, **o),
    "nsf": lambda **o: NSF(6, couplings=4, hidden=8, blocks=1, bins=4, permutation="lu", activation="silu", **o),
    "glow": lambda **o: Glow((1, 4, 4), scales=1, steps=3, channels=4, seed=0, **o),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_take_it_and_their_configuration_keeps_it(name):
    torch.manual_seed(0)
    a, b = (MODELS[name](memory=memory, checkpoint_every=2).double() for memory in ("store", "recompute"))
    b.load_state_dict(a.state_dict())
    again = type(b).from_config(b.config)
    for model, memory in ((a, "store"), (again, "recompute")):
        inner = [m for m in model.modules() if isinstance(m, Chain)][-1]
        assert (inner.memory, inner.checkpoint_every) == (memory, 2)
    x = torch.randint(0, 5, (20, *a.event_shape)).double()
    results = []
    for model in (a, b):
        torch.manual_seed(0)
        model(x)
        randomise(model, 0.2)
        logp = model.log_prob(x)
        results.append(list(torch.autograd.grad(logp.sum(), list(model.parameters()))))
        if model.has_rsample:
            drawn = model.rsample(4)
            results[-1] += torch.autograd.grad(drawn.square().sum(), list(model.bijection.parameters()))
    same(*results, tol=1e-7)


def test_double_backward_evaluates_again():
    stored, chain = pair([coupling(), ActNorm(6, init=False), splines(), coupling(swap=True)])
    x = (0.5 * data(3, 6)).requires_grad_()
    assert torch.autograd.gradcheck(chain, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(chain, (x,), fast_mode=True)
    results = []
    for c in (stored, chain):  # a penalty on the gradient, as in score matching
        (score,) = torch.autograd.grad(c(x)[1].sum(), x, create_graph=True)
        results.append(list(torch.autograd.grad(score.square().sum(), list(c.parameters()))))
    same(*results)


def test_transforms_and_compilers_see_the_plain_layers():
    stored, chain = pair([coupling(), Permutation.reverse(6), coupling(swap=True)])
    x = data(6)
    torch.testing.assert_close(
        torch.func.jacrev(lambda v: chain(v)[0])(x), torch.func.jacrev(lambda v: stored(v)[0])(x)
    )
    tangent = torch.func.jvp(lambda v: chain(v)[1], (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda v: stored(v)[1], (x,), (torch.ones_like(x),)))
    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True)
    same(gradients(compiled, chain, data(5, 6)), gradients(stored, stored, data(5, 6)))
    state = {k: 2 * v for k, v in chain.state_dict().items() if v.is_floating_point()}
    replaced = {k: v.clone().requires_grad_() for k, v in state.items()}
    results = []
    for c in (stored, chain):
        y, logdet = torch.func.functional_call(c, replaced, (data(5, 6),))
        results.append(list(torch.autograd.grad(y.sum() + logdet.sum(), list(replaced.values()))))
    same(*results)


def test_autocast_and_path_are_those_of_the_forward_pass():
    stored, chain = pair([coupling(), ActNorm(6, init=False), coupling(swap=True)])
    stored.float()
    results = []
    for c in (stored, chain):
        x = data(50, 6, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y, logdet = c(x)
        loss = y.square().sum() - logdet.sum()
        results.append(list(torch.autograd.grad(loss, list(c.parameters()))))
    same(*results, tol=1e-4)
    seen = []
    hook = chain[0].register_forward_hook(
        lambda *_: seen.append((torch.is_autocast_enabled("cpu"), pyflowgen._native.reference_only()))
    )
    with pyflowgen.reference_path(), torch.autocast("cpu", torch.bfloat16):
        loss = chain(x)[0].sum()
    loss.backward()
    assert seen == [(True, True)] * 2  # once each way
    hook.remove()


def test_sixteen_bits_go_no_way_back():
    stored, chain = pair([coupling(), ActNorm(6, init=False), splines(), coupling(swap=True)])
    stored.bfloat16()
    x = data(20, 6, dtype=torch.bfloat16)
    same(gradients(stored, stored, x), gradients(chain, chain, x), tol=0)


def test_hooks_run_in_both_evaluations():
    _, chain = pair([coupling(), coupling(swap=True)], every=1)
    calls: list[str] = []
    chain[1].register_forward_hook(lambda *_: calls.append("forward"))
    chain[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    chain(data(3, 6).requires_grad_())[0].sum().backward()
    assert calls == ["forward", "forward", "backward"]
    chain[0].conditioner.layers[0].weight.register_hook(lambda g: calls.append("weight"))
    chain(data(3, 6).requires_grad_())[0].sum().backward()
    assert calls.count("weight") == 1


def test_layers_without_an_exact_inverse_keep_their_input():
    class Twist(Bijection):  # x + tanh(x)/2 has no inverse in closed form
        exact_inverse = False

        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, context=None):
            slope = 1 + self.a * (1 - x.tanh().square())
            return x + self.a * x.tanh(), slope.log().sum(-1)

        def inverse(self, y, context=None):
            raise NotImplementedError

    stored, chain = pair([coupling(), Twist(), coupling(swap=True), Twist()])
    assert not chain.exact_inverse and coupling().exact_inverse and not Inverse(Twist()).exact_inverse
    same(gradients(stored, stored, data(5, 6)), gradients(chain, chain, data(5, 6)))


def test_flows_with_iterative_inverses_and_random_estimates():
    g = LipschitzMLP(6, [8], lipschitz=0.9)
    layers = [coupling(), Planar(6), ResidualFlow(g), Sylvester(6, 2), coupling(swap=True)]
    a = Chain(*layers).double()
    b = copy.deepcopy(a)
    b.memory = "recompute"
    results = []
    for chain in (a, b):
        torch.manual_seed(0)
        results.append(gradients(chain, chain, data(5, 6)))
    same(*results)
    same([t for t in a.buffers() if t.is_floating_point()], [t for t in b.buffers() if t.is_floating_point()])


def test_what_would_give_wrong_gradients_is_refused():
    _, chain = pair([coupling(), coupling(swap=True)])
    loss = chain(data(3, 6))[0].sum()
    with torch.no_grad():
        next(chain.parameters()).add_(1)
    with pytest.raises(RuntimeError, match=r"parameter of shape \(8, 3\) was changed in place"):
        loss.backward()
    loss = chain(data(3, 6))[0].sum()
    chain[0].conditioner.layers[0].weight = nn.Parameter(data(8, 3))
    with pytest.raises(RuntimeError, match="replaced between forward and backward"):
        loss.backward()

    outside = nn.Parameter(data(6))

    class Net(nn.Module):
        def forward(self, x):
            return outside.expand(*x.shape[:-1], 6) * 2

    chain = Chain(coupling().double(), AffineCoupling(Net()), memory="recompute")
    with pytest.raises(RuntimeError, match=r"AffineCoupling uses a tensor of shape \(6,\) .* no parameter"):
        chain(data(3, 6))[0].sum().backward()
    with pytest.raises(ValueError, match="memory is 'less', expected 'store' or 'recompute'"):
        Chain(Squeeze(), memory="less")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        Chain(Squeeze(), memory="recompute", checkpoint_every=0)


def test_slices_and_training_keep_it():
    _, chain = pair(vectors(), every=5)
    assert chain[1:].memory == "recompute" and chain[:2].checkpoint_every == 5
    model = Flow(DiagNormal(6), Chain(ActNorm(6), coupling(), coupling(swap=True), memory="recompute"))
    x = 2 + data(500, 6, dtype=torch.float32) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = -model.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("way", ["runs", "layers"])
def test_drift_at_depth_100_in_float32(way, monkeypatch):
    """The way back loses a rounding a layer, always in the same direction where layers are close to the identity;
    checkpoints bound what is lost, here and with conditioners of large weights."""

    def gradient(chain: Chain, x: Tensor) -> Tensor:
        y, logdet = chain(x)
        loss = (y.square().sum(-1) / 2 - logdet).mean()
        return torch.cat([g.double().flatten() for g in torch.autograd.grad(loss, list(chain.parameters()))])

    if way == "layers":
        monkeypatch.setattr(recompute, "rebuild", None)
    examples = digits()
    x = examples.dequantize(examples.train[:256], torch.Generator().manual_seed(0))
    for large in (False, True):
        torch.manual_seed(0)
        model = RealNVP(64, couplings=100, hidden=(16, 16), alpha=0.05, activation="silu")
        if large:
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.5 / layer.in_features**0.5)
        model(x)
        chain = model.bijection
        assert len(chain) > 200
        truth = gradient(copy.deepcopy(chain).double(), x.double())
        # A stored chain is one operator, which rounds differently from layer by layer: there, all inputs kept.
        every: dict[str, Any] = {"memory": "recompute", "checkpoint_every": 1} if way == "layers" else {}
        stored = gradient(Chain(*chain, **every), x)
        rounding = (stored - truth).norm() / truth.norm()
        drift = {}
        for k in (CHECKPOINT_EVERY, None):
            other = Chain(*chain, memory="recompute", checkpoint_every=k)
            drift[k] = (gradient(other, x) - stored).norm() / truth.norm()
        print(f"rounding {rounding:.1e}, drift", {k: f"{v:.1e}" for k, v in drift.items()})
        assert drift[CHECKPOINT_EVERY] <= rounding, "the way back costs more than float32 itself"
        if way == "layers":
            assert drift[None] > 1.5 * drift[CHECKPOINT_EVERY], "the case does not need its checkpoints"
        else:
            assert drift[None] <= rounding / 4, "activations and inverse are not of one evaluation"


def test_memory_does_not_grow_with_depth():
    """Peak of the activations, from the allocator's trace; the bar is that of a user: depth 64 at most 1.3 times depth 8."""
    from benchmarks import bench_memory, harness

    device = torch.device("cpu")
    peaks: dict[str, list[float]] = {"pyflowgen": [], "stored": []}
    for case in bench_memory.cases(device):
        contest = harness.Contest(case, device)
        for name, found in peaks.items():
            contest.fns[name] = contest._make(name)
            found.append(contest.peak(name, "forward+backward") - contest.sizes(name, "forward+backward")[1])
    assert bench_memory.DEPTHS == (8, 64)
    assert peaks["pyflowgen"][1] <= 1.3 * peaks["pyflowgen"][0], peaks
    assert peaks["stored"][1] >= 6 * peaks["stored"][0], "the measure does not see activations"
