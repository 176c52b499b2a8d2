"""linear: values, gradients, the panels kept for a weight, and the op under torch's transforms."""

from __future__ import annotations

import copy
import doctest
import gc
import io
import itertools
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pyflowgen
import pyflowgen.ops.linear as module
from pyflowgen import Linear, linear, linear_reference

ACTIVATIONS = tuple(module._ACTIVATIONS)
FUSED = tuple(module._FUSED)
SIZES = [(1, 1, 1), (3, 5, 17), (17, 123, 3), (123, 17, 33), (200, 300, 64), (60, 600, 70), (5, 64, 1), (33, 2, 40)]
EMPTY = [(0, 4, 5), (4, 0, 5), (4, 5, 0)]
kernel = pytest.mark.skipif("library" not in pyflowgen.build_info(), reason="no compiled library")


@pytest.fixture(autouse=True)
def _always_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel at every size, also where torch's own product is faster."""
    monkeypatch.setattr(module, "_torch_is_faster", lambda x, weight, activation: False)
    torch.manual_seed(0)


def inputs(batch: int, features: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (
        torch.randn(batch, features),
        torch.randn(out, features) / max(1, features) ** 0.5,
        torch.randn(out),
    )
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()


def error(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact).abs().max().item() if exact.numel() else 0.0


def run(function, args, activation, dy):  # type: ignore[no-untyped-def]
    y = function(*args, activation)
    return (y, *torch.autograd.grad(y, args, dy))


# ------------------------------------------------------------------------------------------------------- values
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients_are_as_accurate_as_the_reference(activation: str) -> None:
    for size in SIZES + EMPTY:
        errors = torch.zeros(2, 4)
        rounding = torch.zeros(4)
        for _ in range(1 if size[0] * size[2] > 600 else 10):  # the largest error of few numbers is a matter of luck
            args = inputs(*size)
            dy = torch.randn(size[0], size[2])
            exact_args = tuple(t.detach().double().requires_grad_() for t in args)
            exact = run(linear_reference, exact_args, activation, dy.double())
            for which, f in enumerate((linear, linear_reference)):
                for i, (t, e) in enumerate(zip(run(f, args, activation, dy), exact, strict=True)):
                    assert t.shape == e.shape and t.dtype == torch.float32
                    errors[which, i] = max(errors[which, i], error(t, e))
                    largest = e.abs().max().item() if e.numel() else 0.0
                    rounding[i] = max(rounding[i], torch.finfo(torch.float32).eps * largest)
        assert (errors[0] <= 2 * errors[1] + rounding).all(), (size, errors, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integers_are_exact(dtype: torch.dtype) -> None:
    """Sums of small integers are exact in any order, so that nothing may differ."""
    for batch, features, out in [*SIZES, *EMPTY, (40, 1030, 70), (113, 260, 200)]:
        args = tuple(
            torch.randint(-4, 5, s).to(dtype).requires_grad_() for s in ((batch, features), (out, features), (out,))
        )
        dy = torch.randint(-4, 5, (batch, out)).to(dtype)
        for activation in ("none", "relu"):
            for _ in range(2):  # panels made on the way, then those that were kept
                for a, b in zip(
                    run(linear, args, activation, dy), run(linear_reference, args, activation, dy), strict=True
                ):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("activation", FUSED)
def test_values_in_float64(activation: str) -> None:
    args, dy = inputs(33, 70, 19, torch.float64), torch.randn(33, 19, dtype=torch.float64)
    for a, b in zip(run(linear, args, activation, dy), run(linear_reference, args, activation, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("activation", FUSED)
def test_special_values(activation: str) -> None:
    x = torch.tensor([0.0, -0.0, 1e-6, -1e-6, 100.0, -100.0, float("inf"), -float("inf"), float("nan")])[:, None]
    one = torch.ones(1, 1)
    if activation == "gelu":  # torch's own is NaN at infinity and 0 below -6, depending on the size of the tensor
        assert linear(x[6:7], one, None, activation).item() == float("inf")
        far = linear(torch.tensor([[-8.0]]), one, None, activation).item()
        assert far == pytest.approx(-4 * math.erfc(8 / 2**0.5), rel=1e-6)
        x = x[[0, 1, 2, 3, 4, 5, 8]]
    torch.testing.assert_close(
        linear(x, one, None, activation),
        linear_reference(x, one, None, activation),
        equal_nan=True,
        rtol=1e-6,
        atol=1e-37,
    )
    grads = []
    for f in (linear, linear_reference):
        z = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(f(z, one, None, activation)[:6].sum(), z)[0][:6])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-37)


def test_outputs_are_written_everywhere() -> None:
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        for size in SIZES:
            args = inputs(*size)
            for t in run(linear, args, "silu", torch.randn(size[0], size[2])):
                assert t.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_shapes_and_layouts() -> None:
    _, weight, bias = inputs(1, 12, 7)
    base = torch.randn(6, 5, 12)
    views = [
        base,
        base[0, 0],
        base.transpose(0, 1),
        base[:, :, None].expand(6, 5, 3, 12),
        base[::2],
        base.new_zeros(0, 5, 12),
        torch.randn(6, 24)[:, ::2],
        torch.randn(6, 30)[:, 3:15],
        torch.randn(12, 9).T,
        torch.randn(1, 12).expand(4, 12),
    ]
    for x, w in itertools.product(views, (weight, torch.randn(12, 7).T, torch.randn(7, 1).expand(7, 12))):
        x = x.detach().requires_grad_()
        y = linear(x, w, bias, "tanh")
        expected = linear_reference(x, w, bias, "tanh")
        torch.testing.assert_close(y, expected)
        dy = torch.randn(expected.shape[-1]).expand(expected.shape)
        torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, x, dy))


def test_only_the_gradients_asked_for() -> None:
    for needs in itertools.product((False, True), repeat=3):
        if any(needs):
            args = [t.detach().requires_grad_(need) for t, need in zip(inputs(9, 4, 6), needs, strict=True)]
            linear(*args, "silu").sum().backward()
            assert [t.grad is not None for t in args] == list(needs)


def test_same_bits_for_every_number_of_threads_and_rows() -> None:
    args, dy = inputs(700, 300, 200), torch.randn(700, 200)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(linear, args, "silu", dy))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    if "library" in pyflowgen.build_info():
        with torch.no_grad():
            assert torch.equal(linear(args[0][13:20], *args[1:], "silu"), results[0][0][13:20])


# ------------------------------------------------------------------------------------------------------ the panels
@kernel
def test_changed_weights_are_seen() -> None:
    layer, x = Linear(70, 80), torch.randn(20, 70)

    def check() -> None:
        for _ in range(3):
            with torch.no_grad():
                torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))

    check()
    assert module._panels[id(layer.weight)][3] is not None, "the panels were not kept, so that this test shows nothing"
    for optimizer in (torch.optim.SGD(layer.parameters(), lr=0.1), torch.optim.AdamW(layer.parameters(), fused=True)):
        layer(x).square().mean().backward()
        optimizer.step()
        check()
    layer.load_state_dict(Linear(70, 80).state_dict())
    check()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(80, 70))
        check()
        layer.weight[3, 4] += 1
        check()
        nn.init.zeros_(layer.weight)
        check()
    layer.weight.data = torch.randn(80, 70)
    check()
    layer.weight.data.mul_(2)
    check()
    layer.weight.data.lerp_(torch.randn(80, 70), 0.1)
    check()
    layer.weight = nn.Parameter(torch.randn(80, 70))
    check()
    layer.double().float()
    check()
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    check()
    layer, old = twin, layer
    check()
    del old
    with torch.inference_mode():
        layer = Linear(70, 80)
    check()


@kernel
def test_panels_die_with_their_weight() -> None:
    gc.collect()
    before = len(module._panels)
    for _ in range(5):
        weight = torch.randn(80, 80)
        for _ in range(2):
            linear(torch.randn(4, 80), weight)
        assert len(module._panels) == before + 1
        del weight
    assert len(module._panels) == before


def test_layer_is_a_drop_in() -> None:
    layer, plain = Linear(6, 3, activation="gelu"), nn.Linear(6, 3)
    layer(torch.randn(2, 6))
    assert list(layer.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6)
    torch.testing.assert_close(layer(x), F.gelu(plain(x)))
    file = io.BytesIO()
    torch.save(layer, file)
    assert len(file.getvalue()) < 4000
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(x), layer(x))
    assert repr(layer) == "Linear(in_features=6, out_features=3, bias=True, activation='gelu')"
    assert Linear(6, 3, bias=False)(x).shape == (4, 3)


def test_python_threads() -> None:
    layer, failures = Linear(64, 96), []
    xs = [torch.randn(50, 64) for _ in range(4)]

    def work(x: Tensor) -> None:
        for _ in range(50):
            with torch.no_grad():
                if not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-5):
                    failures.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in xs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_after_fork() -> None:
    # One thread: GNU OpenMP itself cannot start a team in a forked child of a process that had one.
    code = """
import os, torch, pyflowgen
torch.set_num_threads(1)
layer, x = pyflowgen.Linear(64, 96), torch.randn(50, 64)
with torch.no_grad():
    layer(x), layer(x)
    child = os.fork()
    if child == 0:
        same = torch.equal(layer(x), layer(x))
        layer.weight.mul_(2)
        fits = torch.allclose(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias), atol=1e-5)
        os._exit(0 if same and fits else 1)
    assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@kernel
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    tests = "values_and_gradients or integers or float64 or special or same_bits or changed"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------------------------- torch's transforms
@pytest.mark.parametrize("activation", ["none", "silu", "tanh", "sigmoid", "gelu", "elu", "softplus"])
def test_gradcheck(activation: str) -> None:
    args = inputs(3, 5, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: linear(*a, activation), args, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *a: linear(*a, activation), args)
    assert torch.autograd.gradgradcheck(lambda x: linear(x, args[1].detach(), None, activation), args[:1])


@kernel
@pytest.mark.parametrize("activation", FUSED)
def test_opcheck(activation: str) -> None:
    code = module._FUSED[activation]
    for size in ((4, 3, 5), (0, 3, 5), (4, 3, 0)):
        x, weight, bias = (t.detach() for t in inputs(*size))
        y, z = torch.ops.pyflowgen.linear_keep(x, weight, bias, code)
        for args in ((x, weight, bias, code), (x[None], weight, None, code)):
            torch.library.opcheck(torch.ops.pyflowgen.linear.default, args)
            torch.library.opcheck(torch.ops.pyflowgen.linear_keep.default, args)
        saved = None if activation == "none" else z if activation in module._KEEP_ARGUMENT else y
        for needs in ((True, True, True), (False, True, False)):
            args = (torch.randn_like(y), x, weight, saved, code, *needs)
            torch.library.opcheck(torch.ops.pyflowgen.linear_backward.default, args)


def test_compile_and_export() -> None:
    torch._dynamo.reset()
    layer = nn.Sequential(Linear(5, 16, activation="silu"), Linear(16, 3, activation="gelu"))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for batch in (7, 12):
        x = torch.randn(batch, 5, requires_grad=True)
        y, expected = compiled(x), layer(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), [x, *layer.parameters()]),
            torch.autograd.grad(expected.sum(), [x, *layer.parameters()]),
        )
    x = torch.randn(7, 5)
    batch_size = torch.export.Dim("batch")
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch_size},)).module()
    torch.testing.assert_close(exported(torch.randn(9, 5).fill_(0.3)), layer(torch.full((9, 5), 0.3)))


def test_torch_func_is_the_reference() -> None:
    x, weight, bias = (t.detach() for t in inputs(6, 4, 5))
    batched = torch.func.vmap(lambda row: linear(row, weight, bias, "silu"))(x)
    torch.testing.assert_close(batched, linear_reference(x, weight, bias, "silu"))
    tangent = torch.randn_like(x)
    forward = [
        torch.func.jvp(lambda x, f=f: f(x, weight, bias, "silu"), (x,), (tangent,)) for f in (linear, linear_reference)
    ]
    torch.testing.assert_close(*forward)
    hessians = [
        torch.func.hessian(lambda x, f=f: f(x, weight, bias, "tanh").sum())(x[0]) for f in (linear, linear_reference)
    ]
    torch.testing.assert_close(*hessians)


def test_autocast_is_torchs() -> None:
    x, weight, bias = inputs(4, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = linear(x, weight, bias, "relu"), F.relu(F.linear(x, weight, bias))
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_torchs(dtype: torch.dtype) -> None:
    args = inputs(4, 6, 5, dtype)
    assert torch.equal(linear(*args, "silu"), F.silu(F.linear(*args)))


def test_bad_input() -> None:
    x, weight, bias = (t.detach() for t in inputs(4, 6, 5))
    for args, words in [
        ((x[:, :5], weight, bias), r"x has shape \(4, 5\), expected \(\*batch, 6\)"),
        ((x, weight[0], bias), r"weight must have shape \(out_features, in_features\), got \(6,\)"),
        ((x, weight, bias[:4]), r"bias has shape \(4,\), expected \(5,\)"),
        ((x, weight, bias, "swish"), "activation must be one of .*'silu'.*, got 'swish'"),
    ]:
        with pytest.raises(ValueError, match=words):
            linear(*args)
        with pytest.raises(ValueError, match=words):
            linear(args[0].requires_grad_(), *args[1:])
        args[0].requires_grad_(False)
    with pytest.raises(TypeError, match="weight is torch.float64, expected x's torch.float32"):
        linear(x, weight.double(), bias)
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        linear(x, [[1.0]], bias)
    with pytest.raises(ValueError, match="activation must be one of"):
        Linear(2, 3, activation="swish")


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module, "_PLAIN", False)
    large, small = torch.empty(1024, 1024), torch.empty(64, 64)
    assert module._torch_is_faster(torch.empty(256, 1024), large, "none")
    assert not module._torch_is_faster(torch.empty(255, 1024), large, "none")
    assert not module._torch_is_faster(torch.empty(4096, 64), small, "none")
    assert module._torch_is_faster(torch.empty(4, 64), small, "none")
    with torch.no_grad():
        assert not module._torch_is_faster(torch.empty(256, 1024), large, "none")
    monkeypatch.setattr(module, "_PLAIN", True)
    assert module._torch_is_faster(torch.empty(1, 64), small, "none")


def test_where_torch_is_faster_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_torch_is_faster", lambda x, weight, activation: True)
    args = inputs(30, 20, 10)
    assert torch.equal(linear(*args, "silu"), linear_reference(*args, "silu"))


def test_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
