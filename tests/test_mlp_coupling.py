"""mlp_coupling: the battery, the layers that use it by themselves, and what is special to the op."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from check_op import Op, Sample, op_tests
from torch import Tensor, nn

import pyflowgen
from pyflowgen import mlp_coupling, mlp_coupling_reference
from pyflowgen.ops import affine_coupling as affine
from pyflowgen.ops import linear as product
from pyflowgen.ops import mlp_coupling as module


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def call(function: Any) -> Any:
    """The function with tensors one after another: x, the context if there is one, then weight, bias, weight, …"""

    def flat(x: Tensor, *rest: Tensor, contextual: bool = False, bias: bool = True, **options: Any) -> Any:
        context, parameters = (rest[0], rest[1:]) if contextual else (None, rest)
        weights = parameters[::2] if bias else parameters
        biases = parameters[1::2] if bias else [None] * len(weights)
        return function(x, list(weights), list(biases), context, **options)

    return flat


def sample(
    name: str, batch: tuple[int, ...], channels: int, conditioning: int, hidden: list[int], out: int, *, context: int = 0,
    bias: bool = True, **options: Any,
) -> Sample:  # fmt: skip
    sizes = [conditioning + context, *hidden, out]
    tensors = [normal(*batch, channels)]
    if context:
        tensors.append(normal(*batch, context, seed=1))
        options["contextual"] = True
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        tensors.append(normal(n_out, n_in, seed=i) / n_in**0.5)
        if bias:
            tensors.append(normal(n_out, seed=i) / 4)
    if not bias:
        options["bias"] = False
    return Sample(name, tuple(tensors), options)


def residual(
    name: str, batch: tuple[int, ...], channels: int, conditioning: int, hidden: int, out: int, *, blocks: int = 2,
    context: int = 0, gated: bool = True, **options: Any,
) -> Sample:  # fmt: skip
    """A sample with residual blocks, gated when there is a context."""
    gated = gated and context > 0
    each = [(hidden, hidden), (hidden, hidden), *([(context, hidden)] if gated else [])]
    tensors = [normal(*batch, channels), *([normal(*batch, context, seed=1)] if context else [])]
    for i, (n_in, n_out) in enumerate([(conditioning + context, hidden), *each * blocks, (hidden, out)]):
        tensors += [normal(n_out, n_in, seed=i) / n_in**0.5, normal(n_out, seed=i) / 4]
    return Sample(name, tuple(tensors), {**options, "blocks": blocks, **({"contextual": True} if context else {})})


def samples() -> list[Sample]:
    result = []
    for activation, inverse in itertools.product(
        ("relu", "leaky_relu", "silu", "tanh", "sigmoid", "gelu", "elu", "none"), (False, True)
    ):
        options: dict[str, Any] = dict(activation=activation, inverse=inverse, scale="tanh")
        result.append(sample(f"{activation}-{inverse}", (70,), 9, 5, [33, 17], 8, **options))
    for scale in (None, "exp", "sigmoid", "softclip"):
        out = 4 if scale is None else 8
        result.append(sample(f"scale-{scale}", (19,), 9, 5, [20], out, scale=scale))
    add = lambda *args, **options: result.append(sample(*args, **options))  # noqa: E731
    add("softplus-in-layers", (9,), 6, 3, [12], 6, activation="softplus")
    for activation in ("relu", "silu", "tanh", "gelu"):
        result.append(residual(f"residual-{activation}", (70,), 7, 3, 20, 8, activation=activation, scale="tanh"))
    result.append(residual("residual-gated", (70,), 7, 4, 33, 6, context=5, activation="silu", scale="tanh"))
    result.append(residual("residual-gated-relu", (300,), 6, 3, 16, 6, context=2, blocks=3, scale="sigmoid"))
    result.append(residual("residual-context-no-gates", (70,), 7, 4, 24, 6, context=5, gated=False, scale="sigmoid"))
    result.append(residual("residual-groups", (700,), 6, 3, 48, 3, blocks=1, scale=None, inverse=True))
    add("swap", (65,), 7, 3, [16, 16], 8, same=(4, 1), part=(0, 1))
    add("every-second", (33,), 12, 6, [16, 16], 12, same=(0, 2), part=(1, 2), layout="interleaved")
    add("mask", (33,), 7, 7, [16], 14, mask=torch.arange(7) % 3 == 0)
    add("context", (40,), 40, 20, [24], 40, context=3, activation="silu")
    add("mask-context-additive", (40,), 8, 8, [24], 8, context=5, scale=None, mask=torch.arange(8) > 4)
    add("no-bias", (40,), 8, 4, [24, 8], 8, bias=False)
    add("no-hidden", (40,), 8, 4, [], 8)
    add("two-features", (300,), 2, 1, [32, 32], 2)
    add("batch-dimensions", (3, 2, 5), 6, 3, [16], 6)
    add("no-batch", (), 6, 3, [16], 6)
    add("many-layers", (21,), 6, 3, [5, 9, 30, 2, 17], 6, activation="tanh")
    add("deep-product", (30,), 6, 3, [300, 40], 6)
    add("several-groups", (700,), 6, 3, [40], 6)
    add("wide-rows", (260,), 6, 3, [520, 260], 6)
    for batch in (0, 1, 31, 257):
        # Log-scales of one sign: of one sum that cancels, the reference's own error is a matter of luck.
        add(f"rows-{batch}", (batch,), 40, 20, [48], 40, scale="sigmoid")
    for name, x in (("every-second-column", normal(9, 12)[:, ::2]), ("transposed", normal(6, 9).t())):
        plain = sample(name, (9,), 6, 3, [8], 6)
        result.append(Sample(name, (x, *plain.tensors[1:]), plain.options))
    return result


def small() -> list[Sample]:
    result = [
        sample(f"{activation}-{inverse}", (3,), 5, 3, [4], 4, activation=activation, inverse=inverse, scale="tanh")
        for activation, inverse in itertools.product(("silu", "tanh", "sigmoid"), (False, True))
    ]
    result.append(sample("additive-context", (3,), 4, 2, [4, 3], 2, context=2, scale=None, activation="tanh"))
    result.append(sample("mask", (3,), 4, 4, [4], 8, mask=torch.arange(4) % 2 == 0, activation="silu"))
    result.append(sample("no-bias", (3,), 4, 2, [4], 4, bias=False, activation="tanh"))
    result.append(residual("residual", (3,), 4, 2, 4, 4, blocks=1, activation="gelu"))
    result.append(residual("residual-gated", (3,), 4, 2, 4, 4, blocks=2, context=2, activation="tanh"))
    return result


def operator(s: Sample) -> tuple[Any, tuple[Any, ...]]:
    o = s.options
    context, parameters = (s.tensors[1], s.tensors[2:]) if o.get("contextual") else (None, s.tensors[1:])
    bias = o.get("bias", True)
    weights = list(parameters[::2] if bias else parameters)
    biases = list(parameters[1::2]) if bias else [torch.empty(0) for _ in weights]
    scale = o.get("scale", "exp")
    conditioning = weights[0].shape[1] - (0 if context is None else context.shape[1])
    step = module.Step(
        tuple(weights), tuple(biases), product._FUSED[o.get("activation", "relu")],
        part=(0 if "mask" in o else conditioning, 1), scale=0 if scale is None else affine._SCALES.index(scale),
        numbers=(2.0, *module._NO_NUMBERS[1:]),
        inverse=o.get("inverse", False), mask=o.get("mask"), blocks=o.get("blocks", 0),
    )  # fmt: skip
    detached = [t.detach() for t in (*weights, *biases)]
    x = s.tensors[0].detach()
    operands = module._operands(x, None if context is None else context.detach(), [step], detached)
    return torch.ops.pyflowgen.mlp_coupling.default, (*operands, True)


X = torch.zeros(4, 6)
W, B = [torch.zeros(8, 3), torch.zeros(6, 8)], [torch.zeros(8), torch.zeros(6)]
BAD = [
    ("depth", lambda: mlp_coupling(X, W, B[:1]), ValueError, "one length of 1 to 16, got 2 and 1"),
    ("no layer", lambda: mlp_coupling(X, [], []), ValueError, "got 0 and 0"),
    ("weight shape", lambda: mlp_coupling(X, [W[0], torch.zeros(6, 7)], B), ValueError, r"weights\[1\] has shape \(6, 7\), expected \(out, 8\)"),
    ("bias shape", lambda: mlp_coupling(X, W, [B[1], B[1]]), ValueError, r"biases\[0\] has shape \(6,\), expected \(8,\)"),
    ("dtype", lambda: mlp_coupling(X, [W[0].double(), W[1]], B), TypeError, r"weights\[0\] is torch.float64"),
    ("odd parameters", lambda: mlp_coupling(X, [W[0], torch.zeros(5, 8)], [B[0], torch.zeros(5)]), ValueError, "gives 5 parameters"),
    ("too many parameters", lambda: mlp_coupling(X, [W[0], torch.zeros(8, 8)], [B[0], B[0]]), ValueError, r"part=\(3, 1\) with 4 channels"),
    ("same", lambda: mlp_coupling(X, W, B, same=(4, 1), part=(0, 1)), ValueError, r"same=\(4, 1\) with 3 channels"),
    ("activation", lambda: mlp_coupling(X, W, B, activation="relo"), ValueError, "activation must be one of"),
    ("layout", lambda: mlp_coupling(X, W, B, layout="pairs"), ValueError, "layout must be 'halves'"),
    ("scale", lambda: mlp_coupling(X, W, B, scale="cosh"), ValueError, "scale must be one of"),
    ("context", lambda: mlp_coupling(X, W, B, torch.zeros(3, 1)), ValueError, r"context has shape \(3, 1\)"),
    ("mask", lambda: mlp_coupling(X, W, B, mask=torch.ones(5) > 0), ValueError, r"mask must be a bool tensor of shape \(6,\)"),
    ("blocks", lambda: mlp_coupling(X, W, B, blocks=1), ValueError, "1 residual blocks take 4 weights, or 5 with gates and a context, got 2"),
    ("gates without context", lambda: mlp_coupling(X, [W[0], *[torch.zeros(8, 8)] * 3, W[1]], [None] * 5, blocks=1), ValueError, "got 5"),
    ("block shape", lambda: mlp_coupling(X, [W[0], W[1], torch.zeros(8, 6), W[1]], [None] * 4, blocks=1), ValueError, r"weights\[1\] has shape \(6, 8\), expected \(8, 8\)"),
    ("mask conditioner", lambda: mlp_coupling(X, W, B, mask=torch.ones(6) > 0), ValueError, "weights take 3 channels"),
]  # fmt: skip

OP = Op(
    "mlp_coupling",
    call(mlp_coupling),
    call(mlp_coupling_reference),
    samples,
    small,
    operator,
    lambda batch: sample("resize", (batch,), 6, 3, [16], 6),
    BAD,
)
globals().update(op_tests(OP))


def test_gradients_of_a_part_of_the_inputs() -> None:
    """Frozen parameters, data without gradient, one output unused: what is asked for is the same."""
    plain = sample("", (50,), 6, 3, [16], 6, context=2)
    full = plain.to(torch.float64, grad=True)
    y, logdet = call(mlp_coupling)(*full.tensors, **full.options)
    for used in ((0,), (1,), (0, 1)):
        loss = sum((y, logdet)[i].sum() for i in used)
        want = torch.autograd.grad(loss, full.tensors, retain_graph=True, allow_unused=True)
        for wanted in ([0], [1], [0, 1], [2, 3, 4, 5], [3], [4]):
            some = [t.detach().clone().requires_grad_(i in wanted) for i, t in enumerate(full.tensors)]
            results = call(mlp_coupling)(*some, **full.options)
            got = torch.autograd.grad(sum(results[i].sum() for i in used), [some[i] for i in wanted], allow_unused=True)
            for i, g in zip(wanted, got, strict=True):
                assert torch.allclose(g, want[i], atol=1e-12)


def test_nan_of_one_row_stays_there() -> None:
    s = sample("", (70,), 6, 3, [16, 16], 6).to(torch.float32, grad=True)
    x = s.tensors[0].detach().clone()
    x[13, 1] = float("nan")
    y, logdet = call(mlp_coupling)(x, *s.tensors[1:])
    bad = torch.isnan(y).any(-1) | torch.isnan(logdet)
    assert bad.nonzero().flatten().tolist() == [13]


@pytest.mark.parametrize("inverse", [False, True])
def test_round_trip(inverse: bool) -> None:
    s = sample("", (200,), 64, 32, [128, 128], 64, scale="tanh").to(torch.float32)
    y, logdet = call(mlp_coupling)(*s.tensors, **s.options, inverse=inverse)
    back, minus = call(mlp_coupling)(y, *s.tensors[1:], **s.options, inverse=not inverse)
    torch.testing.assert_close(back, s.tensors[0], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(minus, -logdet)


# ------------------------------------------------------------------------------------------------------ layers
def operators(function: Any) -> list[str]:
    """Names of the coupling operators that run, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [e.name.removeprefix("pyflowgen::") for e in profile.events() if e.name.startswith("pyflowgen::")]


def net(n_in: int, n_out: int, context: int = 0, **options: Any) -> pyflowgen.MLP:
    return pyflowgen.MLP(n_in, [13, 9], n_out, context_features=context, zero_init_last=False, **options)


def residual_net(n_in: int, n_out: int, context: int = 0, **options: Any) -> pyflowgen.ResidualMLP:
    return pyflowgen.ResidualMLP(n_in, 10, n_out, context_features=context, zero_init_last=False, **options)


def chain(context: int = 0) -> pyflowgen.Chain:
    """Every kind of layer that goes into the operator, some twice in a row."""
    mask = torch.arange(7) % 3 == 0
    layers: list[Any] = [
        pyflowgen.Permutation.random(7, seed=0),
        pyflowgen.ActNorm(7),
        pyflowgen.AffineCoupling(net(4, 6, context), scale="tanh"),
        pyflowgen.AffineCoupling(net(3, 8, context, activation="silu"), swap=True, order="shift_scale"),
        pyflowgen.ActNorm(7),
        pyflowgen.Permutation.reverse(7),
        pyflowgen.Permutation.random(7, seed=1),
        pyflowgen.AdditiveCoupling(net(7, 7, context, activation="tanh"), mask=mask),
        pyflowgen.AffineCoupling(net(4, 6, context), mask="interleaved", layout="interleaved", scale="softclip"),
        pyflowgen.SplineCoupling(net(3, 4 * 11, context), bins=4, swap=True),
        pyflowgen.AffineCoupling(residual_net(3, 8, context, activation="elu"), swap=True, scale="tanh"),
        pyflowgen.Scale(7),
        pyflowgen.ActNorm(7),
    ]
    result = pyflowgen.Chain(*layers).double()
    result(normal(100, 7), normal(100, context) if context else None)  # sets the data-dependent layers
    generator = torch.Generator().manual_seed(3)
    for p in result.parameters():
        p.data += 0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return result


@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_run_of_layers_is_one_operator(context: int, inverse: bool) -> None:
    flow = chain(context)
    inputs = [normal(300, 7).requires_grad_(), *([normal(300, context, seed=5).requires_grad_()] if context else [])]

    def evaluate() -> list[Tensor]:
        y, logdet = (flow.inverse if inverse else flow)(*inputs)
        loss = (y * torch.arange(7)).sum() + (logdet * torch.linspace(-1, 2, 300)).sum()
        return [y, logdet, *torch.autograd.grad(loss, [*inputs, *flow.parameters()])]

    assert operators(evaluate) == ["mlp_coupling", "mlp_coupling_backward"]
    with pyflowgen.reference_path():
        want = evaluate()
    for got, expected in zip(evaluate(), want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-9)
    with torch.no_grad():
        assert operators(lambda: flow(*inputs)) == ["mlp_coupling"]
        torch.testing.assert_close((flow.inverse if inverse else flow)(*inputs)[0], want[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "options",
    [
        dict(bins=8),
        dict(bins=5, convention="zuko", bound=5.0),
        dict(bins=3, tails="circular", swap=True),
        dict(bins=10, mask="interleaved", min_bin_width=1e-2, scale=0.3),
        dict(bins=4, mask=torch.arange(6) % 2 == 0, convention="torchflows", bound=10.0),
    ],
    ids=["nflows", "zuko", "circular", "interleaved", "mask"],
)
def test_splines(options: dict[str, Any], dtype: torch.dtype) -> None:
    whole = isinstance(options.get("mask"), Tensor)
    per = pyflowgen.SplineCoupling.params_per_element(options["bins"], options.get("tails", "linear"))
    torch.manual_seed(0)
    layer = pyflowgen.SplineCoupling(net(6 if whole else 3, (6 if whole else 3) * per), **options).to(dtype)
    x = (2 * normal(300, 6)).to(dtype).requires_grad_()

    def evaluate(inverse: bool, layer: pyflowgen.SplineCoupling, x: Tensor) -> list[Tensor]:
        y, logdet = layer.inverse(x) if inverse else layer(x)
        loss = (y * torch.arange(6)).sum() + (logdet * torch.linspace(-1, 2, 300)).sum()
        return [y, logdet, *torch.autograd.grad(loss, [x, *layer.parameters()])]

    exact, exact_x = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    for inverse in (False, True):
        assert operators(lambda i=inverse: evaluate(i, layer, x)) == ["mlp_coupling", "mlp_coupling_backward"]
        with pyflowgen.reference_path():
            truth, plain = evaluate(inverse, exact, exact_x), evaluate(inverse, layer, x)
        for got, its, want in zip(evaluate(inverse, layer, x), plain, truth, strict=True):
            # In the mean: of single elements in steep bins the error is luck. In float64 the reference is the truth.
            error, its_error = ((v.double() - want).abs().mean() / want.abs().mean() for v in (got, its))
            assert error <= (3 * its_error + 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-10)


def test_a_run_of_layers_on_data_without_gradient() -> None:
    flow, x = chain(), normal(100, 7)

    def evaluate(layers: pyflowgen.Chain) -> tuple[Tensor, ...]:
        y, logdet = layers(x)
        return torch.autograd.grad((y * torch.arange(7)).sum() + logdet.sum(), list(layers.parameters()))

    for layers in (flow, flow[1:]):  # the second begins with a scale and a coupling in one step
        got = evaluate(layers)
        with pyflowgen.reference_path():
            want = evaluate(layers)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-9)


def test_a_run_of_layers_twice_differentiable() -> None:
    flow, x = chain(), normal(3, 7).requires_grad_()
    assert torch.autograd.gradcheck(flow, x)
    assert torch.autograd.gradgradcheck(flow, x)
    parameters = [p for p in flow.parameters() if p.dim() == 1][:5]
    assert torch.autograd.gradcheck(lambda *p: flow(x), parameters)


def test_a_run_gives_the_same_on_one_core_and_two() -> None:
    flow, results, threads = chain().float(), [], torch.get_num_threads()
    x = normal(900, 7).float().requires_grad_()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y, logdet = flow(x)
            results.append([y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), [x, *flow.parameters()])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_more_than_a_perceptron_runs_by_itself() -> None:
    x = normal(100, 6).float()
    seen: list[Any] = []

    def layer(conditioner: nn.Module) -> pyflowgen.AffineCoupling:
        return pyflowgen.AffineCoupling(conditioner)

    plain = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
    assert operators(lambda: layer(plain)(x))[:1] == ["mlp_coupling"]
    hooked = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
    hooked[2].register_forward_hook(lambda *_: seen.append(1))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 6))
    pruned = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
    torch.nn.utils.prune.l1_unstructured(pruned[0], "weight", 0.5)  # its weight is no parameter any more
    dropped = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 6))
    mixed = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    slope = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 6))
    ended = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh())

    class Own(pyflowgen.MLP):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return super().forward(x, context) + 1

    approximate = nn.Sequential(nn.Linear(3, 8), nn.GELU("tanh"), nn.Linear(8, 6))
    watched_block, other_activation, other_layer = (residual_net(3, 6) for _ in range(3))
    watched_block.blocks[1].register_forward_hook(lambda *_: seen.append(3))
    other_activation.blocks[0].activation = nn.Tanh()
    other_layer.final_layer = nn.utils.parametrizations.weight_norm(nn.Linear(10, 6))
    for conditioner in (
        hooked, normed, pruned, dropped, mixed, slope, ended, approximate, Own(3, [8], 6), watched_block, other_activation,
        other_layer,
    ):  # fmt: skip
        assert "mlp_coupling" not in operators(lambda c=conditioner: layer(c)(x))
        dropped.eval()
        y, logdet = layer(conditioner)(x)
        want = pyflowgen.affine_coupling(x, conditioner(x[:, :3]), layout="halves", part=(3, 1))
        torch.testing.assert_close((y, logdet), want)
    assert seen
    watched = layer(plain)
    watched.register_forward_hook(lambda *_: seen.append(2))
    pyflowgen.Chain(watched, layer(plain))(x)
    assert seen[-1] == 2


def test_changed_parameters_are_seen() -> None:
    """Nothing of a weight is kept between calls, and a change between forward and backward is an error."""
    layer, x = pyflowgen.AffineCoupling(net(3, 6)), normal(50, 6).float()
    before = layer(x)[0]
    with torch.no_grad():
        layer.conditioner.layers[0].weight.data[0, 0] += 10
    assert not torch.equal(before, layer(x)[0])
    y, _ = layer(x)
    with torch.no_grad():
        layer.conditioner.layers[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_first_batch_sets_actnorm() -> None:
    flow = pyflowgen.Chain(pyflowgen.ActNorm(4), pyflowgen.AffineCoupling(net(2, 4)))
    x = 3 + 2 * normal(500, 4).float()
    assert operators(lambda: flow(x))[:1] == ["mlp_coupling"]  # the coupling alone
    assert flow[0].initialized
    z = (flow[0](x)[0]).detach()
    assert z.mean(0).abs().max() < 1e-5 and (z.std(0) - 1).abs().max() < 1e-2
