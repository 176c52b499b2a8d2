"""idu: the equations written out, the GRU it becomes without the current chunk, windows and streams, the kernel."""

from __future__ import annotations

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from check_op import Op, Sample, op_tests
from torch import Tensor

import pyflowgen
from pyflowgen import IDU

kernel = pytest.mark.skipif("library" not in pyflowgen.build_info(), reason="no compiled library")

OPTIONS = list(itertools.product(("before", "after"), ("sigmoid", "hard_sigmoid"), ("candidate", "state")))


def by_the_equations(x: Tensor, w_x: Tensor, w_0: Tensor, w_h: Tensor, bias: Tensor, reset, gate, update) -> Tensor:
    w_xz, w_xh = w_x.chunk(2)
    w_0r, w_0z = w_0.chunk(2)
    w_hr, w_hh = w_h.chunk(2)
    b_r, b_z, b_x, b_h = bias.chunk(4)
    squash = torch.sigmoid if gate == "sigmoid" else lambda a: torch.clip(0.2 * a + 0.5, 0, 1)
    h = x.new_zeros(len(x), w_hh.shape[0])
    current = x[:, -1]
    for t in range(x.shape[1]):
        r = squash(h @ w_hr.T + current @ w_0r.T + b_r)
        z = squash(x[:, t] @ w_xz.T + current @ w_0z.T + b_z)
        inner = (r * h) @ w_hh.T + b_h if reset == "before" else r * (h @ w_hh.T + b_h)
        new = torch.tanh(x[:, t] @ w_xh.T + b_x + inner)
        h = (1 - z) * h + z * new if update == "candidate" else (1 - z) * new + z * h
    return h


def inputs(grad=False):
    torch.manual_seed(0)
    shapes = (3, 6, 4), (10, 4), (10, 4), (10, 5), (20,)
    return [torch.randn(s, dtype=torch.float64, requires_grad=grad) for s in shapes]


@pytest.mark.parametrize(("reset", "gate", "update"), OPTIONS)
def test_is_the_published_recurrence(reset, gate, update):
    options = dict(reset=reset, gate=gate, update=update)
    args = inputs(grad=True)
    got, want = pyflowgen.idu(*args, **options), by_the_equations(*args, **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), args), torch.autograd.grad(want.sin().sum(), args), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *a: pyflowgen.idu(*a, **options), args)
    for other in OPTIONS:  # each option says something
        if other != (reset, gate, update):
            assert (
                pyflowgen.idu(*args, **dict(zip(("reset", "gate", "update"), other, strict=True))) - got
            ).abs().max() > 1e-6


def test_without_the_current_chunk_it_is_a_gru_with_half_its_gates():
    """Reset from h alone, update from x alone: torch's GRU with the other blocks zero."""
    x, w_x, w_0, w_h, bias = inputs()
    gru = torch.nn.GRU(4, 5, batch_first=True).double()
    zero, (b_r, b_z, b_x, b_h) = torch.zeros(5, 4, dtype=torch.float64), bias.chunk(4)
    with torch.no_grad():
        gru.weight_ih_l0.copy_(torch.cat([zero, w_x[:5], w_x[5:]]))
        gru.weight_hh_l0.copy_(torch.cat([w_h[:5], torch.zeros(5, 5, dtype=torch.float64), w_h[5:]]))
        gru.bias_ih_l0.copy_(torch.cat([b_r, b_z, b_x]))
        gru.bias_hh_l0.copy_(torch.cat([torch.zeros(10, dtype=torch.float64), b_h]))
        want = gru(x)[0][:, -1]
    got = pyflowgen.idu(x, w_x, torch.zeros_like(w_0), w_h, bias, reset="after", update="state")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert (pyflowgen.idu(x, w_x, w_0, w_h, bias, reset="after", update="state") - want).abs().max() > 1e-3


@pytest.mark.parametrize("reset", ["before", "after"])
def test_current_chunk_acts_through_each_gate(reset):
    """The last chunk as current chunk alone, cut off from its own step: a gradient through r and one through z."""
    x, w_x, w_0, w_h, bias = inputs()
    for gate, rows in (("reset", slice(0, 5)), ("update", slice(5, 10))):
        current = x[:, -1].clone().requires_grad_()
        only = torch.zeros_like(w_0)
        only[rows] = w_0[rows]
        h = pyflowgen.ops.idu._recur(x @ w_x.T, current @ only.T, w_h, bias, None, reset, "sigmoid", "candidate")
        (grad,) = torch.autograd.grad(h.sum(), current)
        assert (grad.abs().amax(1) > 1e-6).all(), gate


def test_absent_chunks_are_no_chunks():
    args = inputs()
    lengths = torch.tensor([1, 4, 6])
    got = pyflowgen.idu(*args, lengths)
    for i, n in enumerate(lengths.tolist()):
        want = pyflowgen.idu(args[0][i : i + 1, 6 - n :], *args[1:])
        torch.testing.assert_close(got[i : i + 1], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_frames_and_stream_are_the_windows(bias):
    torch.manual_seed(0)
    layer = IDU(4, 5, window=6, bias=bias).double()
    if bias:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 15, 4, dtype=torch.float64)
    whole, _ = layer.frames(x)
    for t in range(15):
        torch.testing.assert_close(whole[:, t], layer(x[:, max(0, t - 5) : t + 1]), rtol=1e-12, atol=1e-12)
    cache, parts = None, []
    for piece in x.split([1, 1, 5, 0, 7, 1], 1):
        h, cache = layer.frames(piece, cache)
        parts.append(h)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)
    assert cache[0].shape == (2, 5, 10) and cache[1].tolist() == [6, 6]
    changed = x.clone()
    changed[:, 9:] = 100.0
    after, _ = layer.frames(changed)
    assert torch.equal(after[:, :9], whole[:, :9]) and not torch.equal(after[:, 9:], whole[:, 9:])


def test_wrong_arguments_are_named():
    x, w_x, w_0, w_h, bias = inputs()
    for message, call in {
        r"x has shape \(6, 4\)": lambda: pyflowgen.idu(x[0], w_x, w_0, w_h),
        r"x has shape \(3, 0, 4\)": lambda: pyflowgen.idu(x[:, :0], w_x, w_0, w_h),
        r"weight_0 has shape \(9, 4\), expected \(10, 4\)": lambda: pyflowgen.idu(x, w_x, w_0[1:], w_h),
        r"weight_h has shape \(9, 5\), expected \(10, 5\)": lambda: pyflowgen.idu(x, w_x, w_0, w_h[1:]),
        r"bias has shape \(15,\), expected \(20,\)": lambda: pyflowgen.idu(x, w_x, w_0, w_h, bias[5:]),
        r"length has shape \(2,\), expected \(3,\)": lambda: pyflowgen.idu(x, w_x, w_0, w_h, bias, torch.ones(2)),
        "reset is 'never'": lambda: pyflowgen.idu(x, w_x, w_0, w_h, reset="never"),
        "gate is 'step'": lambda: pyflowgen.idu(x, w_x, w_0, w_h, gate="step"),
        "update is 'x'": lambda: pyflowgen.idu(x, w_x, w_0, w_h, update="x"),
        r"weight_h has shape \(\), expected \(0, 0\)": lambda: pyflowgen.idu(
            x, w_x[:0], w_0[:0], torch.tensor(0.0).double()
        ),
        "window=0": lambda: IDU(4, 5, window=0),
        r"IDU: x has shape \(3, 6, 4\), expected \(batch, frames, 3\)": lambda: IDU(3, 5).frames(x),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---- the battery


def arguments(batch, time, embedding, hidden, bias=True):
    """As large as orthogonal rows; a bias so large that its part is seen."""
    torch.manual_seed(batch + time + embedding + hidden)
    shapes = (2 * hidden, embedding), (2 * hidden, embedding), (2 * hidden, hidden)
    weights = [torch.randn(s, dtype=torch.float64) / s[1] ** 0.5 for s in shapes]
    x = torch.randn(batch, time, embedding, dtype=torch.float64)
    return (x, *weights, torch.randn(4 * hidden, dtype=torch.float64)) if bias else (x, *weights)


PUBLISHED = {"gate": "hard_sigmoid"}
PORTS = {"reset": "after", "update": "state"}


def samples():
    strided = list(arguments(3, 4, 5, 7))
    strided[0] = torch.randn(4, 3, 10, dtype=torch.float64).transpose(0, 1)[:, :, ::2]
    strided[2] = torch.randn(5, 14, dtype=torch.float64).T
    strided[3] = torch.randn(14, 1, dtype=torch.float64).expand(14, 7)
    return [
        Sample("one chunk", arguments(1, 1, 3, 5)),
        Sample("one chunk, after", arguments(2, 1, 3, 5), PORTS),
        Sample("one window", arguments(1, 9, 24, 97, bias=False)),
        Sample("one window, after", arguments(1, 6, 24, 97), PORTS),
        Sample("some rows", arguments(5, 4, 40, 33), PUBLISHED),
        Sample("shared rows", arguments(40, 5, 16, 64), {**PORTS, "gate": "hard_sigmoid"}),
        Sample("shared columns", arguments(3, 4, 8, 200), {"update": "state"}),
        Sample("shared columns, one window", arguments(1, 4, 8, 260), {"reset": "after"}),
        Sample("strided", tuple(strided)),
        Sample("lengths", arguments(4, 5, 6, 8), {"length": torch.tensor([5, 0, 2, 9])}),
        Sample("lengths, after", arguments(3, 5, 6, 8), {"length": torch.tensor([1, 2, 1]), **PORTS}),
        Sample("no rows", arguments(0, 3, 4, 5)),
    ]


def operands(sample, keep=False):
    tensors = *sample.tensors, *[None] * (5 - len(sample.tensors))
    o = sample.options
    how = o.get("reset") == "after", o.get("gate") == "hard_sigmoid", o.get("update") == "state"
    return *tensors, o.get("length"), None, *how, keep


def changed(place, tensor, **options):
    given = [t.float() for t in arguments(2, 3, 4, 5)]
    return lambda: pyflowgen.idu(*(tensor if i == place else t for i, t in enumerate(given)), **options)


BATTERY = Op(
    name="idu",
    function=pyflowgen.idu,
    reference=pyflowgen.idu_reference,
    samples=samples,
    small=lambda: [
        Sample("before", arguments(2, 3, 2, 3), {"length": torch.tensor([3, 2])}),
        Sample("after, no bias", arguments(2, 2, 3, 2, bias=False), {**PORTS, "gate": "hard_sigmoid"}),
    ],
    operator=lambda s: (torch.ops.pyflowgen.idu.default, operands(s)),
    resize=lambda batch: Sample("resized", arguments(batch, 3, 4, 5)),
    bad=[
        ("x not a tensor", changed(0, 3), TypeError, "x must be a tensor, got int"),
        ("x dimensions", changed(0, torch.zeros(3, 4)), ValueError, r"x has shape \(3, 4\), expected \(batch, time"),
        ("no chunk", changed(0, torch.zeros(2, 0, 4)), ValueError, r"x has shape \(2, 0, 4\).* a chunk at least"),
        ("features", changed(0, torch.zeros(2, 3, 5)), ValueError, r"weight_x has shape \(10, 4\), expected \(10, 5\)"),
        ("weight_x", changed(1, torch.zeros(10, 3)), ValueError, r"weight_x has shape \(10, 3\), expected \(10, 4\)"),
        ("weight_h", changed(3, torch.zeros(5, 5)), ValueError, r"weight_h has shape \(5, 5\), expected \(10, 5\)"),
        ("weight none", changed(3, None), TypeError, "weight_h must be a tensor, got NoneType"),
        ("bias", changed(4, torch.zeros(5)), ValueError, r"bias has shape \(5,\), expected \(20,\)"),
        ("dtype", changed(1, torch.zeros(10, 4).double()), TypeError, "weight_x is torch.float64, expected x's torch.float32"),
        ("lengths", changed(9, None, length=torch.tensor([1])), ValueError, r"length has shape \(1,\), expected \(2,\)"),
        ("real lengths", changed(9, None, length=torch.ones(2)), TypeError, "length is torch.float32, expected integers"),
        ("option", changed(9, None, gate="tanh"), ValueError, "gate is 'tanh', expected one of sigmoid, hard_sigmoid"),
    ],
    dtypes=(torch.float64, torch.float32),
    draws=8,  # few elements, whose sums the reference forms in another order: the errors of both are equal on average
    without_fma=2,
)  # fmt: skip
globals().update({name: kernel(test) for name, test in op_tests(BATTERY).items()})


# ---- what is special to the kernel


def gradients(function, tensors):
    outputs = function(*tensors)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
    inputs = [t for t in tensors if t is not None and t.requires_grad]
    return outputs, torch.autograd.grad(sum(o.sin().sum() for o in outputs), inputs)


@kernel
@pytest.mark.parametrize("count", [1, 4, 9])
@pytest.mark.parametrize(("reset", "gate", "update"), OPTIONS)
def test_frames_and_their_gradient_are_the_references(reset, gate, update, count):
    """Windows that overlap share the gradient of their chunks; the cache has one too, given and taken."""
    torch.manual_seed(0)
    layer = IDU(6, 37, window=5, bias=True, reset=reset, gate=gate, update=update).double()
    torch.nn.init.normal_(layer.bias)
    kept = torch.randn(3, 4, 74, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, count, 6, dtype=torch.float64, requires_grad=True)
    seen = torch.tensor([0, 3, 5])

    def frames(x, kept, *weights):
        h, (cache, after) = layer.frames(x, (kept, seen))
        assert after.tolist() == [min(5, n + count) for n in (0, 3, 5)]
        return h, cache

    tensors = x, kept, *layer.parameters()
    got = gradients(frames, tensors)
    with torch.no_grad():
        for a, b in zip(frames(*tensors), got[0], strict=True):  # on packed weights
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pyflowgen.reference_path():
        want = gradients(frames, tensors)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    (last,) = torch.autograd.grad(layer.frames(x, (kept, seen))[1][0].sum(), layer.weight_x)  # the cache alone
    assert last.any()


def test_double_backward_of_frames():
    torch.manual_seed(0)
    layer = IDU(2, 3, window=3).double()
    kept, x = torch.randn(1, 2, 6, dtype=torch.float64), torch.randn(1, 2, 2, dtype=torch.float64)

    def frames(x, kept):
        h, (cache, _) = layer.frames(x, (kept, torch.tensor([1])))
        return h, cache

    assert torch.autograd.gradgradcheck(frames, (x.requires_grad_(), kept.requires_grad_()))


@kernel
def test_hard_gates_have_the_references_slope_where_they_meet_their_bounds():
    x = torch.tensor([[[2.5], [-2.5], [2.4], [9.0], [1.0]]]).expand(1, 5, 1).requires_grad_()
    weights = [torch.tensor(w).requires_grad_() for w in ([[1.0], [0.3]], [[0.0], [0.0]], [[0.0], [0.5]])]
    for options in ({}, PORTS):
        got, want = (
            gradients(lambda *t, f=f, o=options: f(*t, gate="hard_sigmoid", **o), (x, *weights))
            for f in (pyflowgen.idu, pyflowgen.idu_reference)
        )
        assert want[1][0][0, :2].any()
        for a, b in zip(got[1], want[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@kernel
def test_a_window_alone_has_the_same_bits():
    """Other windows, of the batch or of the clip, and later frames leave no trace."""
    for batch, hidden in ((30, 40), (3, 200), (17, 16)):
        x, *weights = (t.float() for t in arguments(batch, 6, 12, hidden))
        for options in ({}, PORTS):
            whole = pyflowgen.idu(x, *weights, **options)
            assert torch.equal(pyflowgen.idu(x[1:2], *weights, **options), whole[1:2])
    layer, x = IDU(12, 200, window=4), torch.randn(2, 20, 12)
    with torch.no_grad():
        clip, later = layer.frames(x)[0], x.clone()
        later[:, 11:] = torch.nan
        got = layer.frames(later)[0]
        assert torch.equal(got[:, :11], clip[:, :11]) and got[:, 11:].isnan().all()
        for t in (4, 11, 19):
            torch.testing.assert_close(layer(x[:, t - 3 : t + 1]), clip[:, t], rtol=0, atol=3e-6)


@kernel
@pytest.mark.parametrize("hidden", [16, 200])
def test_hostile_values_stay_where_they_are(hidden):
    for value in (float("nan"), float("inf"), -float("inf"), 1e38, 1e-42, -0.0):
        args = [t.float() for t in arguments(3, 5, 6, hidden)]
        clean = pyflowgen.idu(*args)
        args[0][1, 2, 3] = value
        dirty, want = pyflowgen.idu(*args), pyflowgen.idu_reference(*args)
        assert torch.equal(clean[[0, 2]], dirty[[0, 2]])
        torch.testing.assert_close(dirty, want, equal_nan=True, rtol=1e-5, atol=2e-6)
        args[0] = args[0].requires_grad_()
        got, want = (gradients(f, args)[1][0] for f in (pyflowgen.idu, pyflowgen.idu_reference))
        torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-5)


@kernel
def test_usual_path_is_the_kernel():
    def seen(what):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            what()
        return {e.key for e in profile.key_averages() if e.key.startswith("pyflowgen::")}

    layer, x = IDU(5, 7, window=4), torch.randn(2, 4, 5)
    both = {"pyflowgen::idu", "pyflowgen::idu_backward"}
    assert seen(lambda: layer(x).sum().backward()) == both
    assert seen(lambda: layer.frames(x)[0].sum().backward()) == both
    with torch.no_grad():
        assert seen(lambda: layer.frames(x)) == {"pyflowgen::idu", "pyflowgen::idu_pack"}
        assert seen(lambda: (layer(x), layer.frames(x[:, :1]))) == {"pyflowgen::idu"}, "packed once"
        assert seen(lambda: layer.bfloat16()(x.bfloat16())) == set(), "16 bits are the reference's"
    with pyflowgen.reference_path():
        assert seen(lambda: layer.float()(x).sum().backward()) == set()


def fused_step(layer):
    """An optimizer step that no version counter counts."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    with torch.enable_grad():
        layer(torch.randn(2, 4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@kernel
def test_weights_are_packed_anew_when_they_change():
    torch.manual_seed(0)
    layer, x = IDU(5, 7, window=4, bias=True), torch.randn(2, 4, 5)
    with torch.no_grad():
        layer(x)
        for change in (
            lambda: layer.weight_h.mul_(1.5),
            lambda: layer.load_state_dict(IDU(5, 7, window=4, bias=True).state_dict()),
            lambda: fused_step(layer),
            lambda: layer.weight_0.data.add_(0.5),
            lambda: layer.bias.add_(0.5),
            lambda: setattr(layer, "weight_x", torch.nn.Parameter(torch.randn(14, 5))),
            lambda: layer.double(),
        ):
            change()
            given = x.to(layer.weight_x.dtype)
            with pyflowgen.reference_path():
                want = layer(given)
            torch.testing.assert_close(layer(given), want)
            torch.testing.assert_close(layer.frames(given)[0][:, -1], want)
    size = len(pickle.dumps(layer))
    twin = copy.deepcopy(layer)
    assert twin._packed._packed is None and size < 3 * sum(8 * p.numel() for p in layer.parameters())
    assert torch.equal(pickle.loads(pickle.dumps(layer))(given), twin(given))


@kernel
def test_operators_of_training_and_streams():
    """What the battery leaves out: keeping, a cache, the gradient."""
    for options in ({}, PORTS):
        sample = Sample("", tuple(t.float() for t in arguments(2, 3, 4, 5)), options)
        *tensors, length, _, after, hard, keeps, _ = operands(sample)
        cached = torch.randn(2, 4, 10)
        for cache in (None, cached):
            given = *tensors, None, cache, after, hard, keeps, True
            torch.library.opcheck(torch.ops.pyflowgen.idu.default, given)
            h, products, *kept = torch.ops.pyflowgen.idu(*given)
            for dgiven in (None, torch.randn_like(products)):
                back = torch.randn_like(h), dgiven, *tensors[:4], None, after, hard, keeps, *kept, True, True
                torch.library.opcheck(torch.ops.pyflowgen.idu_backward.default, back)
        packed = torch.ops.pyflowgen.idu_pack(*tensors[1:4])
        torch.library.opcheck(
            torch.ops.pyflowgen.idu.default, (*tensors, None, cached, after, hard, keeps, False, packed)
        )
        for wrong, message in (
            ((*tensors, None, cached[..., 1:], after, hard, keeps, False), "cached must have shape"),
            ((*tensors, torch.ones(3, dtype=torch.long), None, after, hard, keeps, False), r"of shape \(2,\)"),
            ((tensors[0].double(), *tensors[1:], None, None, after, hard, keeps, False), "dtype"),
        ):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.pyflowgen.idu(*wrong)
        with pytest.raises(RuntimeError, match="kept is not that"):
            torch.ops.pyflowgen.idu_backward(*back[:-3], kept[2][1:], True, True)


@pytest.mark.parametrize("reference", [False, True])
def test_a_cache_of_another_window_is_refused(reference):
    layer, x = IDU(4, 8, window=3), torch.zeros(2, 1, 4)
    with contextlib.ExitStack() as stack:
        if reference:
            stack.enter_context(pyflowgen.reference_path())
        for cache in (IDU(4, 8, window=4).init_cache(2), layer.init_cache(3)):
            with pytest.raises(ValueError, match=r"cache has shapes .* expected \(2, 2, 16\)"):
                layer.frames(x, cache)


@kernel
def test_frames_compile_and_export():
    torch.compiler.reset()
    layer = IDU(4, 8, window=3)
    compiled = torch.compile(lambda x: layer.frames(x)[0], fullgraph=True, dynamic=True)
    for count in (4, 7):
        x = torch.randn(2, count, 4)
        got, want = compiled(x), layer.frames(x)[0]
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(o.sum(), layer.weight_h)[0] for o in (got, want)))
    with torch.no_grad():
        program = torch.export.export(layer, (x[:, :3],))
        torch.testing.assert_close(program.module()(x[:, :3]), layer(x[:, :3]))


def test_autocast_runs():
    layer, x = IDU(5, 8, window=4), torch.randn(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        h = layer(x)
    assert (h.float() - layer(x)).abs().max() < 0.05


# ---- a stream on short weights


def shortened(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights as they are stored, widened again."""
    if dtype is torch.bfloat16:
        return weight.bfloat16().double()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().double() * scale.double()


def short_steps(layer: IDU, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The window's last h, every product on stored weights and, for int8, on inputs of 8 bits; in float64."""

    def linear(a: Tensor, weight: Tensor) -> Tensor:
        if dtype is torch.int8:
            scale = a.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
            a = (a / scale).round() * scale
        return a @ shortened(weight.detach(), dtype).T

    squash = torch.sigmoid if layer.gate == "sigmoid" else lambda a: (0.2 * a + 0.5).clamp(0, 1)
    hidden = layer.hidden
    bias = torch.zeros(4 * hidden) if layer.bias is None else layer.bias.detach()
    b_r, b_z, b_x, b_h = bias.double().chunk(4)
    x = x.double()
    r_0, z_0 = linear(x[:, -1], layer.weight_0).chunk(2, 1)
    w_r, w_h = layer.weight_h.chunk(2)
    h = x.new_zeros(len(x), hidden)
    for chunk in x.unbind(1):
        from_z, from_n = linear(chunk, layer.weight_x).chunk(2, 1)
        r, z = squash(linear(h, w_r) + r_0 + b_r), squash(from_z + z_0 + b_z)
        inner = linear(r * h, w_h) + b_h if layer.reset == "before" else r * (linear(h, w_h) + b_h)
        n = torch.tanh(from_n + b_x + inner)
        h = h + (z if layer.update == "candidate" else 1 - z) * (n - h)
    return h


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
@pytest.mark.parametrize("how", list(itertools.product(("before", "after"), ("sigmoid", "hard_sigmoid"), ("candidate", "state"))))  # fmt: skip
def test_short_steps(dtype, how):
    """The step is that of the rounded weights (int8: of rounded inputs too), over a window that fills and slides."""
    reset, gate, update = how
    for batch, embedding, hidden, window, bias in ((1, 70, 97, 5, True), (3, 6, 130, 4, False), (9, 33, 20, 1, True)):
        torch.manual_seed(0)
        layer = IDU(embedding, hidden, window, bias=bias, reset=reset, gate=gate, update=update)
        if bias:
            torch.nn.init.normal_(layer.bias, std=0.3)
        layer.pack(dtype)
        x, cache = torch.randn(batch, 9, embedding), None
        for t in range(9):
            h, cache = layer.step(x[:, t], cache)
            want = short_steps(layer, x[:, max(0, t + 1 - window) : t + 1], dtype)
            # an input of 8 bits may round the other way in float64
            bound = 2e-5 if dtype is torch.bfloat16 else 2e-2  # beside bf16 weights inputs have 17 bits
            assert (h - want).abs().max() < bound and (h - want).abs().mean() < bound / 10, (batch, t)


@kernel
def test_short_steps_are_near():
    torch.manual_seed(0)
    layer, x = IDU(64, 96, window=8), torch.randn(2, 40, 64).relu()
    with torch.no_grad():
        want = layer.frames(x)[0]
    for dtype, bound in ((None, 1e-6), (torch.bfloat16, 1e-2), (torch.int8, 3e-2)):
        layer.pack(dtype)
        cache, found = None, []
        for t in range(40):
            h, cache = layer.step(x[:, t], cache)
            found.append(h)
        apart = (torch.stack(found, 1) - want).abs().max()
        assert apart < bound and (dtype is None or apart > 1e-4), (dtype, apart)


@kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_short_steps_are_the_same_bits(dtype):
    """Whatever the other rows, the threads, and the strides of the cache; and packed anew when a weight changes."""
    torch.manual_seed(0)
    layer, x = IDU(40, 300, window=4, bias=True).pack(dtype), torch.randn(7, 6, 40)
    threads = torch.get_num_threads()

    def run(x):
        cache, found = None, []
        for t in range(6):
            h, cache = layer.step(x[:, t], cache)
            found.append(h)
        return torch.stack(found, 1)

    try:
        torch.set_num_threads(2)
        want = run(x)
        for n in (1, 3):
            torch.set_num_threads(n)
            assert torch.equal(run(x), want)
        for row in range(7):
            assert torch.equal(run(x[row : row + 1]), want[row : row + 1])
    finally:
        torch.set_num_threads(threads)
    kept, seen = layer.init_cache(7)
    apart = torch.zeros(7, 300 * 2, 3).transpose(1, 2)
    assert torch.equal(layer.step(x[:, 0], (apart, seen))[0], layer.step(x[:, 0], (kept, seen))[0])
    for parameter in layer.parameters():
        before = run(x)
        with torch.no_grad():
            parameter.mul_(2).add_(0.1)
        assert not torch.equal(run(x), before)
    assert layer.step(x[:0, 0])[0].shape == (0, 300)
    assert copy.deepcopy(layer).step(x[:, 0])[0].equal(layer.step(x[:, 0])[0])


@kernel
def test_short_steps_refuse():
    layer, x = IDU(8, 8, window=3), torch.zeros(2, 8)
    for storage in (1, 2):
        weights = [p.detach() for p in layer.parameters()]
        packed = torch.ops.pyflowgen.idu_step_pack(*weights, None, storage)
        arguments = [x, *layer.init_cache(2), packed, None, True, False, False]
        torch.library.opcheck(torch.ops.pyflowgen.idu_step.default, tuple(arguments))
        for at, wrong, message in (
            (0, x[:1], "do not fit"),
            (0, x[:, :4], "packed weights do not"),
            (0, x.double(), "float32"),
            (2, torch.zeros(3, dtype=torch.long), "do not fit"),
            (2, torch.zeros(2), "int64"),
            (4, torch.zeros(8), "bias must have shape"),
            (3, packed.float(), "made by"),
        ):
            with pytest.raises(RuntimeError, match=message):
                torch.ops.pyflowgen.idu_step(*arguments[:at], wrong, *arguments[at + 1 :])
        with pytest.raises(RuntimeError, match="float32 weights"):
            torch.ops.pyflowgen.idu_step_pack(*(w.double() for w in weights), None, storage)
    for wrong in (x[0], x[:, :4]):
        with pytest.raises(ValueError, match=r"expected \(batch, 8\)"):
            layer.step(wrong)
    with pytest.raises(ValueError, match="cache has shapes"):
        layer.pack(torch.int8).step(x, layer.init_cache(3))
    with pytest.raises(ValueError, match="dtype is torch.float16"):
        layer.pack(torch.float16)
    with torch.no_grad():
        layer.weight_h[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        layer.step(x)
