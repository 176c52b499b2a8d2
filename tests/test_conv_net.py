"""conv_net: the battery, exact sums, blocks and rounds of every kind, and the networks that take it by themselves."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check_op import Op, Sample, op_tests, run
from torch import Tensor, nn

import pyflowgen
from pyflowgen import AdditiveCoupling, AffineCoupling, ConvNet, GlowStep, conv_net, conv_net_reference
from pyflowgen.ops import conv_net as module


@pytest.fixture(autouse=True)
def _always_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the plain copy, in whose place torch's convolutions run."""
    monkeypatch.setattr(module, "_PLAIN", False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(channels: tuple[int, ...], kernels: tuple[int, int]) -> list[Tensor]:
    sides = (kernels[0], 1, kernels[1])
    shapes = [(n, m, k, k) for m, n, k in zip(channels, channels[1:], sides, strict=False)]
    return [normal(*s, seed=1) / (s[1] * s[2] * s[3]) ** 0.5 for s in shapes]


def sample(
    name: str, x: Tensor, channels: tuple[int, int, int], kernels: tuple[int, int] = (3, 3), activation: str = "relu",
    biases: bool = True,
) -> Sample:  # fmt: skip
    given = [normal(n, seed=2) for n in channels] if biases else []
    return Sample(name, (x, *weights((x.shape[-3], *channels), kernels), *given), {"activation": activation})


def samples() -> list[Sample]:
    result = [
        sample(f"{activation}-{kernels[0]}-{kernels[1]}", normal(3, 4, 5, 7), (19, 33, 6), kernels, activation)
        for activation, kernels in itertools.product(module._CODES, ((3, 3), (1, 5)))
    ]
    add = lambda name, x, *rest: result.append(sample(name, x, *rest))  # noqa: E731
    add("glow", normal(4, 6, 16, 16), (32, 32, 12))
    add("no-bias", normal(2, 3, 4, 4), (16, 16, 4), (3, 3), "tanh", False)
    add("single", normal(1, 1, 1, 1), (1, 1, 1))
    add("a-column", normal(2, 2, 9, 1), (5, 7, 3), (5, 3))
    add("narrower-than-the-window", normal(2, 2, 3, 2), (5, 7, 3), (7, 5), "sigmoid")
    add("many-outputs", normal(2, 2, 4, 5), (18, 9, 37), (3, 3), "leaky_relu")
    add("many-inputs", normal(2, 37, 4, 5), (18, 9, 2), (3, 3), "leaky_relu")
    add("wide", normal(3, 2, 4, 4), (300, 270, 3), (1, 1), "tanh")
    add("channels-last", normal(3, 5, 6, 4).contiguous(memory_format=torch.channels_last), (8, 8, 4))
    add("half-of-channels", normal(3, 8, 5, 5)[:, 4:], (8, 8, 4))
    add("half-channels-last", normal(3, 6, 6, 8).permute(0, 3, 1, 2)[:, 4:], (8, 8, 4))
    add("every-second-pixel", normal(3, 4, 6, 12)[..., ::2], (8, 8, 4))
    add("transposed", normal(3, 4, 6, 5).transpose(2, 3), (8, 8, 4))
    add("expanded", normal(1, 4, 1, 6).expand(3, 4, 5, 6), (8, 8, 4))
    add("many-batch-dimensions", normal(2, 3, 2, 4, 5), (8, 8, 4))
    add("no-batch", normal(3, 4, 5), (8, 8, 4))
    add("empty-batch", normal(0, 3, 4, 5), (8, 8, 4))
    return result


def small() -> list[Sample]:
    return [
        sample("tanh", normal(2, 2, 3, 2), (4, 3, 2), (3, 3), "tanh"),
        sample("sigmoid", normal(2, 1, 2, 2), (3, 2, 3), (1, 3), "sigmoid"),
        sample("leaky", normal(1, 2, 2, 3), (3, 3, 1), (3, 1), "leaky_relu", False),
    ]


def ordered(function: Any) -> Any:
    """With the weights first and the biases, if any, behind them."""

    def call(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, *biases: Tensor, activation: Any = "relu") -> Tensor:
        b1, b2, b3 = biases or (None, None, None)
        return function(x, w1, b1, w2, b2, w3, b3, activation)

    return call


def operator(s: Sample) -> tuple[Any, tuple[Any, ...]]:
    x, w1, w2, w3, *biases = s.tensors
    b1, b2, b3 = biases or (None, None, None)
    code = module._CODES[s.options["activation"]]
    return torch.ops.pyflowgen.conv_net.default, (x, w1, b1, w2, b2, w3, b3, code, True)


X, W1, W2, W3, B = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3, 3, 3), torch.zeros(5, 5, 1, 1), torch.zeros(2, 5, 3, 3), torch.zeros(5)  # fmt: skip
BAD = [
    ("no tensor", lambda: conv_net(3.0, W1, B, W2, B, W3, None), TypeError, "x must be a tensor, got float"),
    ("a weight", lambda: conv_net(X, W1, B, [1.0], B, W3, None), TypeError, "weight2 must be a tensor, got list"),
    ("dimensions", lambda: conv_net(X[0, 0], W1, B, W2, B, W3, None), ValueError, r"x has shape \(4, 4\), expected"),
    ("channels", lambda: conv_net(X[:, :2], W1, B, W2, B, W3, None), ValueError, r"weight1 has shape \(5, 3, 3, 3\), expected \(out, 2, k, k\)"),
    ("even window", lambda: conv_net(X, W1[..., :2, :2], B, W2, B, W3, None), ValueError, "odd k"),
    ("oblong window", lambda: conv_net(X, W1, B, W2, B, W3[..., :1], None), ValueError, r"weight3 has shape \(2, 5, 3, 1\)"),
    ("middle window", lambda: conv_net(X, W1, B, W2.expand(5, 5, 3, 3), B, W3, None), ValueError, r"expected \(out, 5, 1, 1\)"),
    ("bias", lambda: conv_net(X, W1, B[:4], W2, B, W3, None), ValueError, r"bias1 has shape \(4,\), expected \(5,\)"),
    ("dtype", lambda: conv_net(X, W1, B, W2, B.double(), W3, None), TypeError, "bias2 is torch.float64"),
    ("activation", lambda: conv_net(X, W1, B, W2, B, W3, None, "swish"), ValueError, "activation must be one of"),
    ("operator: no activation", lambda: torch.ops.pyflowgen.conv_net(X, W1, B, W2, B, W3, None, 3, False), RuntimeError, "activation 3 is none"),
    ("operator: weight", lambda: torch.ops.pyflowgen.conv_net(X, W1, B, W2[:, :4], B, W3, None, 1, False), RuntimeError, "weight2 has shape"),
    ("operator: bias", lambda: torch.ops.pyflowgen.conv_net(X, W1, B, W2, B, W3, B, 1, False), RuntimeError, "bias3 must have shape"),
    ("operator: dtype", lambda: torch.ops.pyflowgen.conv_net(X, W1, B, W2, B, W3.double(), None, 1, False), RuntimeError, "x's dtype"),
    ("operator: half", lambda: torch.ops.pyflowgen.conv_net(X.half(), W1, B, W2, B, W3, None, 1, False), RuntimeError, "float32 and float64"),
    ("operator: empty", lambda: torch.ops.pyflowgen.conv_net(X[:0], W1, B, W2, B, W3, None, 1, False), RuntimeError, "no empty tensors"),
    ("operator: dy", lambda: torch.ops.pyflowgen.conv_net_backward(X, X, W1, B, W2, B, W3, None, X, 1, True, True), RuntimeError, "dy of shape"),
    ("operator: kept", lambda: torch.ops.pyflowgen.conv_net_backward(X[:, :2], X, W1, B, W2, B, W3, None, X, 1, True, True), RuntimeError, "kept is not what"),
]  # fmt: skip

globals().update(
    op_tests(
        Op(
            name="conv_net",
            function=ordered(conv_net),
            reference=ordered(conv_net_reference),
            samples=samples,
            small=small,
            operator=operator,
            resize=lambda batch: sample("resize", normal(batch, 3, 4, 5), (8, 6, 2), (3, 3), "tanh"),
            bad=BAD,
            sum_roundings=2,
            without_fma=2,
            draws=3,
        )
    )
)


# --------------------------------------------------------------------------------------------------- exact sums
SHAPES = [
    (16, (2, 33, 20, 3), 16, (3, 3)),  # several blocks, each with its group
    (40, (1, 7, 5, 1), 31, (3, 3)),  # blocks that end within an image
    (3, (2, 130, 140, 2), 9, (5, 1)),
    (2, (17, 5, 3, 18), 40, (3, 5)),
    (1200, (2, 3, 3, 2), 4, (3, 3)),  # images smaller than a block
    (20, (9, 2, 2, 16), 96, (3, 3)),  # rounds of images
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("images, channels, side, kernels", SHAPES)
def test_integers_are_exact(
    images: int, channels: tuple[int, int, int, int], side: int, kernels: tuple[int, int], dtype: torch.dtype
) -> None:
    """Sums of small integers are exact in any order, so that nothing may differ."""
    generator = torch.Generator().manual_seed(0)
    integers = lambda *shape: torch.randint(-1, 2, shape, generator=generator).to(dtype).requires_grad_()  # noqa: E731
    c0, c1, c2, c3 = channels
    x = integers(images, c0, side, side - 1)
    layers = [
        integers(c1, c0, kernels[0], kernels[0]), integers(c1), integers(c2, c1, 1, 1), integers(c2),
        integers(c3, c2, kernels[1], kernels[1]), integers(c3),
    ]  # fmt: skip
    found = []
    for function in (conv_net, conv_net_reference):
        y = function(x, *layers)
        dy = torch.randint(-1, 2, y.shape, generator=generator.manual_seed(1)).to(dtype)
        found.append((y, *torch.autograd.grad(y, [x, *layers], dy)))
    for i, (mine, plain) in enumerate(zip(*found, strict=True)):
        assert mine.abs().max() < 2**24
        assert torch.equal(mine, plain), i


def test_only_what_is_asked_for() -> None:
    s = sample("", normal(3, 4, 5, 6), (9, 8, 2), (3, 3), "tanh").to(torch.float64, grad=True)
    x, w1, w2, w3, b1, b2, b3 = s.tensors
    given = [x, w1, b1, w2, b2, w3, b3]
    _, all_grads = run(conv_net, Sample("", tuple(given), {"activation": "tanh"}))
    for wanted in ([0], [1, 2], [0, 5], [6]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
        _, grads = run(conv_net, Sample("", tuple(leaves), {"activation": "tanh"}))
        assert len(grads) == len(wanted)
        for i, grad in zip(wanted, grads, strict=True):
            torch.testing.assert_close(grad, all_grads[i], rtol=1e-12, atol=1e-13)


def test_result_is_channels_last_and_kept_graphs_give_the_same_twice() -> None:
    s = sample("", normal(3, 4, 5, 6), (9, 8, 2)).to(torch.float32, grad=True)
    y = ordered(conv_net)(*s.tensors)
    assert y.is_contiguous(memory_format=torch.channels_last)
    first = torch.autograd.grad(y.square().sum(), s.tensors, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), s.tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e30, 1e-42])
def test_special_values(special: float) -> None:
    """One odd pixel: what it reaches is as in torch's convolutions, all else untouched."""
    s = sample("", normal(2, 3, 7, 7), (8, 8, 4)).to(torch.float32)
    s.tensors[0][1, 2, 3, 3] = special
    got, want = ordered(conv_net)(*s.tensors), ordered(conv_net_reference)(*s.tensors)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    usual = want.isfinite()
    torch.testing.assert_close(got[usual], want[usual], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------- autocast, paths
def seen(call: Any) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def test_autocast_is_torch() -> None:
    s = sample("", normal(3, 4, 5, 6), (9, 8, 2)).to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ordered(conv_net)(*s.tensors)
        assert y.dtype == torch.bfloat16 and torch.equal(y, ordered(conv_net_reference)(*s.tensors))


def test_plain_copy_leaves_it_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PLAIN", True)
    s = sample("", normal(3, 4, 5, 6), (9, 8, 2)).to(torch.float32)
    assert "pyflowgen::conv_net" not in seen(lambda: ordered(conv_net)(*s.tensors))


def three(n_in: int, n_out: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, 8, 3, padding=1), activation(), nn.Conv2d(8, 8, 1), activation(),
        nn.Conv2d(8, n_out, 3, padding="same"),
    )  # fmt: skip


def test_networks_take_it_by_themselves() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 6, 7)
    net = ConvNet(3, 8, 4)
    nn.init.normal_(net.conv3.weight)
    nn.init.normal_(net.conv3.log_gain, std=0.1)
    slope = three(3, 2)
    slope[1] = slope[3] = nn.LeakyReLU()
    layers = [
        GlowStep(5, net), GlowStep(5, three(3, 4)), AffineCoupling(three(3, 4, nn.Tanh), event_dim=3),
        AdditiveCoupling(slope, event_dim=3), AffineCoupling(three(5, 10, nn.Sigmoid), mask="checkerboard", event_dim=3),
    ]  # fmt: skip
    for layer in layers:
        layer(x)
        assert {"pyflowgen::conv_net"} <= seen(lambda layer=layer: layer(x))
        parameters = list(layer.parameters())
        y, logdet = layer(x)
        mine = torch.autograd.grad(y.square().sum() + logdet.sum(), parameters)
        assert {"pyflowgen::conv_net"} <= seen(lambda layer=layer, y=y: layer.inverse(y))
        torch.testing.assert_close(layer.inverse(y)[0], x, rtol=1e-3, atol=1e-3)
        with pyflowgen.reference_path():
            y, logdet = layer(x)
            plain = torch.autograd.grad(y.square().sum() + logdet.sum(), parameters)
        for a, b in zip(mine, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_any_other_network_runs_by_itself() -> None:
    x = torch.randn(2, 4, 6, 6)
    plain = three(2, 4)

    def changed(layers: dict[int, nn.Module]) -> nn.Sequential:
        return nn.Sequential(*(layers.get(i, layer) for i, layer in enumerate(copy.deepcopy(plain))))

    conv = functools.partial(nn.Conv2d, 2, 8)
    nets = {
        "plain": plain,
        "more layers": changed({4: nn.Sequential(plain[4], nn.Tanh())}),
        "mixed": changed({1: nn.Tanh()}),
        "slope": changed({1: nn.LeakyReLU(0.2), 3: nn.LeakyReLU(0.2)}),
        "gelu": changed({1: nn.GELU(), 3: nn.GELU()}),
        "wide middle": changed({2: nn.Conv2d(8, 8, 3, padding=1)}),
        "circular": changed({0: conv(3, padding=1, padding_mode="circular")}),
        "dilated": changed({0: conv(3, padding=2, dilation=2)}),
        "groups": changed({0: conv(3, padding=1, groups=2)}),
        "oblong": changed({0: conv((3, 1), padding=(1, 0))}),
        "even": changed({0: conv(2, padding="same")}),
        "less padded and more": changed({0: conv(3), 4: nn.Conv2d(8, 4, 3, padding=2)}),
        "normed": changed({0: nn.utils.parametrizations.weight_norm(conv(3, padding=1))}),
        "other dtype": changed({}).bfloat16(),
        **{f"hook {i}": changed({}) for i in range(6)},
    }
    calls: list[int] = []
    for i in range(6):
        net = nets[f"hook {i}"]
        (net[i] if i < 5 else net).register_forward_hook(lambda *_: calls.append(1))
    for name, net in nets.items():
        given = x.bfloat16() if name == "other dtype" else x
        layer = AffineCoupling(net, event_dim=3)
        y = layer(given)[0]
        assert ("pyflowgen::conv_net" in seen(lambda layer=layer, given=given: layer(given))) == (name == "plain"), name
        part = net(given[:, :2])
        assert torch.allclose(y[:, 2:], given[:, 2:] * part[:, 2:].exp() + part[:, :2], rtol=1e-2, atol=1e-2), name


def test_conv_net_with_changed_layers_runs_by_itself() -> None:
    net, x = ConvNet(2, 8, 4), torch.randn(2, 2, 5, 5)
    assert "pyflowgen::conv_net" in seen(lambda: net(x))
    calls = []
    handle = net.conv2.register_forward_hook(lambda *_: calls.append(1))
    net(x)
    assert calls == [1]
    handle.remove()
    nn.utils.parametrizations.weight_norm(net.conv2)
    assert "pyflowgen::conv_net" not in seen(lambda: net(x))


def test_equal_to_its_layers() -> None:
    net, x = ConvNet(2, 8, 4).double(), normal(2, 3, 2, 5, 5)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    h = net.conv2(net.conv1(x.flatten(0, 1)).relu()).relu()
    want = F.conv2d(h, net.conv3.weight, net.conv3.bias, padding=1) * (3 * net.conv3.log_gain).exp()[:, None, None]
    torch.testing.assert_close(net(x), want.reshape(2, 3, 4, 5, 5), rtol=1e-12, atol=1e-12)
