"""trn: the published equations written out, the authors' weights, clips in pieces, causality; kernel and reference."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor, nn

import pyflowgen
from pyflowgen import TRN
from pyflowgen.models import TRN as Detector
from pyflowgen.ops.trn import TRNWeights, _matrices, _pack, _streams

kernel = pytest.mark.skipif("library" not in pyflowgen.build_info(), reason="no compiled library")
OPTIONS = list(itertools.product(("after", "before"), ("current", "previous")))


def by_the_equations(layer: TRN, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One frame and one decoder step after the other, with torch's cells: scores, scores ahead, last future."""
    batch = len(frames)
    h = c = frames.new_zeros(batch, layer.hidden)
    future = frames.new_zeros(batch, layer.features)
    scores, ahead = [], []

    def decode(h: Tensor, c: Tensor) -> Tensor:
        g, k, u = layer.hx_trans(h), layer.cx_trans(c), frames.new_zeros(batch, layer.hidden)
        states, found = [], []
        for _ in range(layer.steps):
            g, k = layer.dec_cell(u, (g, k))
            q = layer.classifier(g)
            u = layer.fusion_linear(q)
            states.append(g)
            found.append(q)
        ahead.append(torch.stack(found, 1))
        if layer.pool == "before":
            return layer.future_linear(sum(states) / layer.steps)
        return sum(layer.future_linear(g) for g in states) / layer.steps

    for t in range(frames.shape[1]):
        if layer.start == "previous":
            future = decode(h, c)
        x = layer.feature_extractor(frames[:, t])
        h, c = layer.enc_cell(torch.cat([x, future], 1), (h, c))
        scores.append(layer.classifier(h))
        if layer.start == "current":
            future = decode(h, c)
    return torch.stack(scores, 1), torch.stack(ahead, 1), future


@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_is_the_published_recurrence(pool, start):
    torch.manual_seed(0)
    layer = TRN(5, 7, 4, steps=3, pool=pool, start=start).double()
    frames = torch.randn(2, 6, 5, dtype=torch.float64)
    out = layer(frames)
    wanted = by_the_equations(layer, frames)
    for got, want in zip((out.scores, out.ahead, out.future), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(out.scores.sin().sum() + out.ahead.cos().sum(), list(layer.parameters()))
    wanted_grads = torch.autograd.grad(wanted[0].sin().sum() + wanted[1].cos().sum(), list(layer.parameters()))
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    others = [TRN(5, 7, 4, steps=3, pool=p, start=s).double() for p, s in OPTIONS if (p, s) != (pool, start)]
    for other in others:  # each option says something
        other.load_state_dict(layer.state_dict())
        assert (other(frames).scores - out.scores).abs().max() > 1e-6


@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_gradients_of_inputs_and_state(pool, start):
    torch.manual_seed(0)
    layer = TRN(3, 4, 3, steps=2, pool=pool, start=start).double()
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 3), (2, 4), (2, 4), (2, 3))]
    call = lambda *a: tuple(pyflowgen.trn(*a, layer.weights(), steps=2, pool=pool, start=start))  # noqa: E731
    assert torch.autograd.gradcheck(call, given)


def test_authors_weights_load_by_their_names():
    """Names and shapes of the authors' checkpoint, with the prefix that data-parallel training leaves."""
    hidden, features, classes = 6, 5, 4
    shapes = {
        "feature_extractor.input_linear.0.weight": (features, features),
        "feature_extractor.input_linear.0.bias": (features,),
        "hx_trans.0.weight": (hidden, hidden),
        "hx_trans.0.bias": (hidden,),
        "cx_trans.0.weight": (hidden, hidden),
        "cx_trans.0.bias": (hidden,),
        "fusion_linear.0.weight": (hidden, classes),
        "fusion_linear.0.bias": (hidden,),
        "future_linear.0.weight": (features, hidden),
        "future_linear.0.bias": (features,),
        **{f"enc_cell.{n}": s for n, s in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ((24, 10), (24, 6), (24,), (24,)), strict=True)},
        **{f"dec_cell.{n}": s for n, s in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), ((24, 6), (24, 6), (24,), (24,)), strict=True)},
        "classifier.weight": (classes, hidden),
        "classifier.bias": (classes,),
    }  # fmt: skip
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in shapes.items()}
    layer = TRN(features, hidden, classes, steps=2)
    layer.load_state_dict(weights)
    model = Detector(features, classes, hidden=hidden, steps=2).eval()
    model.load_state_dict({f"module.{k}": v for k, v in weights.items()})
    frames = torch.randn(2, 5, features)
    assert torch.equal(model(frames), layer(frames).scores)
    again = Detector(features, classes, hidden=hidden, steps=2).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(frames), model(frames))
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**weights, "enc_cell.weight": weights["classifier.bias"]})


def test_clip_in_pieces_is_the_clip():
    torch.manual_seed(0)
    layer = TRN(5, 7, 4, steps=3).double()
    frames = torch.randn(3, 9, 5, dtype=torch.float64)
    whole, state, parts = layer(frames), None, []
    for piece in frames.split([1, 4, 0, 1, 3], 1):
        out = layer(piece, state)
        state = out[2:]
        parts.append(out)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat([p[i] for p in parts], 1), whole[i], rtol=1e-12, atol=1e-12)
    for got, want in zip(state, whole[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_future_frames_have_no_say(pool, start):
    torch.manual_seed(0)
    layer = TRN(5, 7, 4, steps=3, pool=pool, start=start)
    frames = torch.randn(2, 8, 5)
    changed = frames.clone()
    changed[:, 5:] = 100 * torch.randn(2, 3, 5)
    before, after = layer(frames), layer(changed)
    assert torch.equal(before.scores[:, :5], after.scores[:, :5]) and torch.equal(
        before.ahead[:, :5], after.ahead[:, :5]
    )
    assert not torch.equal(before.scores[:, 5:], after.scores[:, 5:])


def test_future_feature_is_fed_back():
    torch.manual_seed(0)
    layer = TRN(5, 7, 4, steps=3)
    frames = torch.randn(2, 8, 5)
    scores = layer(frames).scores
    with torch.no_grad():
        layer.future_linear[0].weight.zero_()
        layer.future_linear[0].bias.fill_(-1.0)
    ablated = layer(frames).scores
    assert torch.equal(scores[:, 0], ablated[:, 0]), "the first frame has no future before it"
    assert (scores[:, 1:] - ablated[:, 1:]).abs().amax((0, 2)).min() > 1e-6


def test_dropout_only_in_training():
    torch.manual_seed(0)
    layer = TRN(5, 32, 4, steps=3, dropout=0.5)
    frames = torch.randn(2, 8, 5)
    assert not torch.equal(layer(frames).scores, layer(frames).scores)
    layer.eval()
    assert torch.equal(layer(frames).scores, layer(frames).scores)


def test_loss_names_the_frames_ahead():
    """A decoder forced to known scores has the loss of the targets that offset and step point to."""
    for offset in (0, 1):
        model = Detector(2, 3, hidden=4, steps=2, window=5, offset=offset)
        assert model.lookahead == 1 + offset
        labels = torch.randint(0, 3, (1, 5 + model.lookahead), generator=torch.Generator().manual_seed(offset))
        targets = nn.functional.one_hot(labels, 3).float()
        ahead = torch.randn(1, 5, 2, 3)
        model._all = lambda features, state, ahead=ahead: (torch.zeros(1, 5, 3), ahead)
        wanted = torch.log(torch.tensor(3.0))
        for t in range(5):
            for i in range(2):
                wanted = wanted - ahead[0, t, i].log_softmax(0)[labels[0, t + i + offset]] / 10
        torch.testing.assert_close(model.loss(torch.zeros(1, 5, 2), targets), wanted)


def test_wrong_arguments_are_named():
    layer = TRN(5, 7, 4, steps=3)
    x, h, f, w = torch.randn(2, 6, 5), torch.zeros(2, 7), torch.zeros(2, 5), layer.weights()
    for message, call in {
        r"frames have shape \(2, 6, 4\), expected \(batch, frames, 5\)": lambda: layer(x[..., :4]),
        r"x has shape \(6, 5\)": lambda: pyflowgen.trn(x[0], h, h, f, w),
        r"c has shape \(1, 7\), expected \(2, 7\)": lambda: pyflowgen.trn(x, h, h[:1], f, w),
        r"future has shape \(2, 4\), expected \(2, 5\)": lambda: pyflowgen.trn(x, h, h, f[:, :4], w),
        r"cx_bias has shape \(6,\), expected \(7,\)": lambda: pyflowgen.trn(x, h, h, f, w._replace(cx_bias=w.cx_bias[:6])),
        "steps is 0": lambda: pyflowgen.trn(x, h, h, f, w, steps=0),
        "pool is 'mean'": lambda: pyflowgen.trn(x, h, h, f, w, pool="mean"),
        "start is 'next'": lambda: pyflowgen.trn(x, h, h, f, w, start="next"),
        "dropout is 1.0": lambda: pyflowgen.trn(x, h, h, f, w, dropout=1.0),
        "TRN: features=0": lambda: TRN(0, 7, 4),
        "offset is 2": lambda: Detector(5, 4, offset=2),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


# ---- kernel and reference

SIZES = [(2, 6, 5, 7, 4, 3), (1, 9, 33, 40, 5, 4), (3, 1, 8, 16, 22, 1), (17, 3, 20, 64, 3, 2), (1, 2, 1, 1, 1, 1)]


def arguments(batch, frames, features, hidden, classes, steps, dtype=torch.float64, grad=True):
    torch.manual_seed(0)
    layer = TRN(features, hidden, classes, steps=steps)
    given = [torch.randn(s) for s in ((batch, frames, features), (batch, hidden), (batch, hidden), (batch, features))]
    return [t.detach().to(dtype).requires_grad_(grad) for t in (*given, *layer.weights())]


def call(function, args, **options):
    return tuple(function(*args[:4], TRNWeights(*args[4:]), **options))


def run(function, args, **options):
    torch.manual_seed(1)
    results = call(function, args, **options)
    return results, torch.autograd.grad(sum(r.double().sin().sum() for r in results), args, allow_unused=True)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("pool", "start"), OPTIONS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, pool, start, dropout):
    """In float64 the reference's to its last digits; in float32 about as far from float64 as it is."""
    options = dict(steps=size[5], pool=pool, start=start, dropout=dropout)
    exact = run(pyflowgen.trn_reference, arguments(*size), **options)
    double = run(pyflowgen.trn, arguments(*size), **options)
    single = run(pyflowgen.trn, arguments(*size, dtype=torch.float32), **options)
    plain = run(pyflowgen.trn_reference, arguments(*size, dtype=torch.float32), **options)
    for group in range(2):
        for e, d, s, p in zip(exact[group], double[group], single[group], plain[group], strict=True):
            if e is None:  # no path leads there
                assert p is None and all(t is None or not t.any() for t in (d, s))
                continue
            torch.testing.assert_close(d, e, rtol=1e-11, atol=1e-12)
            assert s.dtype == torch.float32
            if dropout == 0:  # masks of another dtype are others
                scale = 1.2e-7 * e.abs().max() + 1e-12
                # the reference's products fuse multiply and add whatever copy of the kernels runs
                assert (s - e).abs().max() <= 3 * (p - e).abs().max() + 4 * scale


@kernel
def test_without_gradient_the_bits_are_the_same():
    for pool, start in OPTIONS:
        args = arguments(3, 5, 6, 20, 4, 3, dtype=torch.float32)
        with_gradient = call(pyflowgen.trn, args, steps=3, pool=pool, start=start)
        with torch.no_grad():
            for a, b in zip(with_gradient, call(pyflowgen.trn, args, steps=3, pool=pool, start=start), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_double_backward(pool, start):
    args = arguments(2, 2, 3, 3, 3, 2)
    assert torch.autograd.gradcheck(lambda *a: call(pyflowgen.trn, a, steps=2, pool=pool, start=start), args)
    first = args[:4]
    assert torch.autograd.gradgradcheck(
        lambda *a: call(pyflowgen.trn, [*a, *args[4:]], steps=2, pool=pool, start=start), first
    )


@pytest.mark.parametrize("frames", [0, 1])
def test_no_frames_and_one(frames):
    args = arguments(2, frames, 5, 7, 4, 3)
    got, got_grads = run(pyflowgen.trn, args, steps=3)
    want, want_grads = run(pyflowgen.trn_reference, args, steps=3)
    for a, b in zip((*got, *got_grads), (*want, *want_grads), strict=True):
        if a is not None and b is not None:
            torch.testing.assert_close(a, b)
        else:
            assert a is None or not a.any()
    with torch.no_grad():
        for a, b in zip(call(pyflowgen.trn, args, steps=3), want, strict=True):
            torch.testing.assert_close(a, b)


def test_strides_and_expanded_states():
    args = arguments(4, 5, 6, 8, 3, 2)
    odd = [t.detach().clone() for t in args]
    odd[0] = odd[0].transpose(0, 1).contiguous().transpose(0, 1)
    odd[1] = odd[1][:1].expand(4, 8)
    odd[4] = odd[4].T.contiguous().T
    odd = [t.requires_grad_() for t in odd]
    got, want = run(pyflowgen.trn, odd, steps=2), run(pyflowgen.trn_reference, odd, steps=2)
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@kernel
def test_usual_path_is_the_kernel():
    def seen(what):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            what()
        return {e.key for e in profile.key_averages() if e.key.startswith("pyflowgen::trn")}

    args = arguments(2, 3, 5, 7, 4, 3, dtype=torch.float32)
    assert seen(lambda: run(pyflowgen.trn, args, steps=3)) == {"pyflowgen::trn_keep", "pyflowgen::trn_backward"}
    layer = TRN(5, 7, 4, steps=3)
    with torch.no_grad():
        assert seen(lambda: layer(args[0])) == {"pyflowgen::trn"}
        assert seen(lambda: layer(args[0][:, :1])) == {"pyflowgen::trn_pack", "pyflowgen::trn_step"}
    assert seen(lambda: layer.step(args[0][:, 0], layer.init_state(2))) == {"pyflowgen::trn_step"}
    with pyflowgen.reference_path():
        assert seen(lambda: run(pyflowgen.trn, args, steps=3)) == set()
    half = [t.detach().to(torch.bfloat16) for t in args]
    assert seen(lambda: call(pyflowgen.trn, half, steps=3)) == set(), "16 bits are the reference's"


def fused_step(layer):
    """An optimizer step that no version counter counts."""
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=True)
    with torch.enable_grad():
        layer(torch.randn(2, 3, 5)).scores.square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@kernel
def test_stream_packs_once_and_anew_when_weights_change():
    torch.manual_seed(0)
    layer, frames = TRN(5, 7, 4, steps=3), torch.randn(2, 3, 5)
    with torch.no_grad():
        first = layer(frames).scores
        made = _streams[layer]
        assert torch.equal(layer(frames).scores, first) and _streams[layer] is made
        for change in (
            lambda: layer.dec_cell.weight_hh.mul_(1.5),
            lambda: layer.load_state_dict(TRN(5, 7, 4, steps=3).state_dict()),
            lambda: fused_step(layer),
            lambda: layer.hx_trans[0].weight.data.add_(0.5),
            lambda: setattr(layer.classifier, "weight", nn.Parameter(torch.randn(4, 7))),
            lambda: layer.double(),
        ):
            change()
            x = frames.to(layer.classifier.weight.dtype)
            with pyflowgen.reference_path():
                want = layer(x).scores
            torch.testing.assert_close(layer(x).scores, want)
    twin = copy.deepcopy(layer)
    assert twin not in _streams and len(pickle.dumps(layer)) < 3 * sum(8 * p.numel() for p in layer.parameters())


@kernel
def test_threads_give_the_same_bits():
    args, threads, found = arguments(16, 3, 64, 96, 5, 3, dtype=torch.float32), torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results, _ = run(pyflowgen.trn, args, steps=3)
            found.append(results)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@kernel
def test_opcheck():
    args = arguments(2, 3, 5, 7, 4, 3, dtype=torch.float32, grad=False)
    weights = TRNWeights(*args[4:])
    given = torch.randn(3, 2, 28)
    masks = [torch.rand(3, 2, 5), torch.rand(3, 3, 2, 7), torch.rand(3, 3, 2, 7)]
    for before, previous in itertools.product((False, True), repeat=2):
        how = (3, before, previous)
        operands = (given, *args[1:4], *_pack(weights, 5), *how)
        torch.library.opcheck(torch.ops.pyflowgen.trn.default, operands)
        torch.library.opcheck(torch.ops.pyflowgen.trn_keep.default, (*operands, *masks))
        hs, cs, ahead, *kept = torch.ops.pyflowgen.trn_keep.default(*operands, *masks)
        futures, _, *rest = kept
        turned = [torch.ops.pyflowgen.linear_pack.default(m.t().contiguous()) for m in _matrices(weights, 5)]
        gradients = torch.randn_like(hs[1:]), *(torch.randn_like(t) for t in (cs[0], futures[0], ahead))
        torch.library.opcheck(
            torch.ops.pyflowgen.trn_backward.default,
            (*gradients, cs, futures, *rest, *turned, before, previous, *masks),
        )


@kernel
def test_operators_refuse_what_does_not_fit():
    args = arguments(2, 3, 5, 7, 4, 3, dtype=torch.float32, grad=False)
    packs = list(_pack(TRNWeights(*args[4:]), 5))
    given = torch.randn(3, 2, 28)
    for what, message in (
        (lambda: torch.ops.pyflowgen.trn(given[..., 1:], *args[1:4], *packs, 3, False, False), "do not fit"),
        (lambda: torch.ops.pyflowgen.trn(given, *args[1:4], packs[1], *packs[1:], 3, False, False), "enc must be"),
        (lambda: torch.ops.pyflowgen.trn(given.double(), *args[1:4], *packs, 3, False, False), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            what()


def test_compile_and_export():
    torch.compiler.reset()
    layer = TRN(5, 8, 4, steps=2)
    compiled = torch.compile(lambda x: layer(x), fullgraph=True, dynamic=True)
    for batch in (3, 6):
        x = torch.randn(batch, 4, 5)
        got, want = compiled(x), layer(x)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        got, want = (torch.autograd.grad(o.scores.sum() + o.ahead.sum(), list(layer.parameters())) for o in (got, want))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        program = torch.export.export(layer.eval(), (x,))
        torch.testing.assert_close(program.module()(x).scores, layer(x).scores)


def test_func_transforms_see_the_reference():
    args = arguments(2, 3, 4, 5, 3, 2, grad=False)
    call_x = lambda f: lambda x: call(f, [x, *args[1:]], steps=2)[0]  # noqa: E731
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got, want = (transform(call_x(f))(args[0]) for f in (pyflowgen.trn, pyflowgen.trn_reference))
        torch.testing.assert_close(got, want)


def test_autocast_runs():
    layer, x = TRN(5, 8, 4, steps=2), torch.randn(2, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        scores = layer(x).scores
    assert (scores.float() - layer(x).scores).abs().max() < 0.05


@kernel
def test_hostile_values_stay_where_they_are():
    """NaN, infinities and huge frames: the rows and frames that have none are as they would be alone."""
    for value in (float("nan"), float("inf"), -float("inf"), 1e38, 1e-42):
        args = arguments(3, 6, 5, 16, 4, 2, dtype=torch.float32, grad=False)
        clean = call(pyflowgen.trn, args, steps=2)
        args[0] = args[0].clone()
        args[0][1, 3, 2] = value
        dirty = call(pyflowgen.trn, args, steps=2)
        for a, b in zip(clean[:2], dirty[:2], strict=True):
            assert torch.equal(a[[0, 2]], b[[0, 2]]) and torch.equal(a[1, :3], b[1, :3])
        want = call(pyflowgen.trn_reference, args, steps=2)
        torch.testing.assert_close(dirty[0], want[0], equal_nan=True)


# ---- a stream's step

# features, hidden, classes, steps: blocks of one lane, all but one, one more than whole, several for each thread
STREAMS = [(5, 7, 4, 3), (1, 1, 1, 1), (33, 70, 5, 2), (20, 129, 70, 3), (64, 256, 22, 8)]
STORAGE = [None, torch.bfloat16, torch.int8]
storages = pytest.mark.parametrize("dtype", STORAGE, ids=["same", "bf16", "int8"])


def eight_bits(t: Tensor) -> Tensor:
    """Rows as 8-bit integers times a scale."""
    largest = t.float().abs().amax(1, keepdim=True)
    return (t.float() * torch.div(torch.tensor(127.0), largest)).round().nan_to_num().double() * largest / 127


def product(dtype, weight: Tensor, x: Tensor) -> Tensor:
    """x weight^T in float64, each as the step has it."""
    if dtype is torch.int8:
        return eight_bits(x) @ eight_bits(weight).T
    return x.double() @ (weight if dtype is None else weight.bfloat16()).double().T


def rounded_step(layer: TRN, frame: Tensor, state: tuple[Tensor, ...], dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """A frame by the equations, with the weights and inputs that a step on ``dtype`` has, states as floats."""
    w = layer.weights()
    h, c, future = (s.double() for s in state)

    def cell(parts, bias, c):
        i, f, g, o = (sum(product(dtype, weight, x.float()) for weight, x in parts) + bias).chunk(4, 1)
        c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).float().double()
        return (o.sigmoid() * c.tanh()).float().double(), c

    def fc(weight, bias, x, dtype=dtype):
        return (product(dtype, weight, x.float()) + bias).relu().float().double()

    def decode(h, c):
        g, k = fc(w.hx_weight, w.hx_bias, h), fc(w.cx_weight, w.cx_bias, c)
        u, states, found = torch.zeros_like(g), [], []
        for _ in range(layer.steps):
            g, k = cell([(w.dec_weight_ih, u), (w.dec_weight_hh, g)], w.dec_bias, k)
            found.append(product(None, w.classifier_weight, g) + w.classifier_bias)
            u = fc(w.fusion_weight, w.fusion_bias, found[-1], None)
            states.append(g)
        if layer.pool == "before":
            ahead = fc(w.future_weight, w.future_bias, sum(states) / layer.steps)
        else:
            ahead = sum(fc(w.future_weight, w.future_bias, g) for g in states) / layer.steps
        return torch.stack(found, 1), ahead

    if layer.start == "previous":
        ahead, future = decode(h, c)
    transform = layer.feature_extractor.input_linear[0]
    x, n = fc(transform.weight, transform.bias, frame), layer.features
    h, c = cell([(w.enc_weight_ih[:, :n], x), (w.enc_weight_ih[:, n:], future), (w.enc_weight_hh, h)], w.enc_bias, c)
    if layer.start == "current":
        ahead, future = decode(h, c)
    return product(None, w.classifier_weight, h) + w.classifier_bias, ahead, h, c, future


def random_state(layer: TRN, batch: int) -> tuple[Tensor, ...]:
    like = layer.init_state(batch)
    return torch.randn_like(like[0]).tanh(), torch.randn_like(like[1]), torch.rand_like(like[2])


@kernel
@torch.no_grad()
@storages
@pytest.mark.parametrize(("pool", "start"), OPTIONS)
@pytest.mark.parametrize("size", STREAMS, ids=str)
def test_step_is_that_of_the_rounded_weights(size, pool, start, dtype):
    """And of nothing else; a stream gets the bits it would get alone."""
    torch.manual_seed(0)
    features, hidden, classes, steps = size
    layer = TRN(features, hidden, classes, steps=steps, pool=pool, start=start).pack(dtype)
    for batch in (1, 9):
        frame, state = torch.randn(batch, features), random_state(layer, batch)
        out = layer.step(frame, state)
        for got, want in zip(out, rounded_step(layer, frame, state, dtype), strict=True):
            # an 8-bit rounding that falls the other way shows as a step of the scale
            # beside bf16 weights inputs have 17 bits
            bound = {None: 3e-6, torch.bfloat16: 2e-5, torch.int8: 5e-3 / hidden**0.5 + 1e-4}[dtype]
            difference = (got - want).abs()
            assert difference.max() < bound * (1 + want.abs().max()), dtype
            assert difference.mean() < {None: 3e-6, torch.bfloat16: 5e-6, torch.int8: 2e-4}[dtype], dtype
        alone = layer.step(frame[-1:], [s[-1:] for s in state])
        assert all(torch.equal(a[0], b[-1]) for a, b in zip(alone, out, strict=True))


@kernel
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("pool", "start"), OPTIONS)
def test_steps_are_the_clip(pool, start, dtype):
    torch.manual_seed(0)
    layer = TRN(20, 37, 5, steps=3, pool=pool, start=start).to(dtype)
    frames = torch.randn(7, 30, 20, dtype=dtype)
    whole, state = layer(frames), layer.init_state(7)
    for t in range(30):
        scores, ahead, *state = layer.step(frames[:, t], state)
        torch.testing.assert_close(scores, whole.scores[:, t], rtol=0, atol=20 * torch.finfo(dtype).eps)
        torch.testing.assert_close(ahead, whole.ahead[:, t], rtol=0, atol=20 * torch.finfo(dtype).eps)
    for got, want in zip(state, whole[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=50 * torch.finfo(dtype).eps)


@kernel
@torch.no_grad()
def test_short_weights_stay_near():
    """64 frames of a stream against float32: how far scores are, and that the class is nearly always the same."""
    torch.manual_seed(0)
    layer, frames = TRN(128, 64, 22), torch.randn(4, 64, 128)
    whole = layer(frames)
    for dtype, bound, same in ((torch.bfloat16, 2e-3, 0.97), (torch.int8, 1e-2, 0.9)):
        layer.pack(dtype)
        state, scores = layer.init_state(4), []
        for t in range(64):
            out = layer.step(frames[:, t], state)
            state = out[2:]
            scores.append(out.scores)
        found = torch.stack(scores, 1)
        assert 1e-5 < (found - whole.scores).abs().max() < bound
        assert (found.argmax(2) == whole.scores.argmax(2)).float().mean() > same
        assert torch.equal(layer(frames).scores, whole.scores), "clips know nothing of it"


@kernel
@torch.no_grad()
@storages
def test_step_packs_once_and_anew_when_weights_change(dtype):
    torch.manual_seed(0)
    layer = TRN(5, 7, 4, steps=3).pack(dtype)
    frame, state, names = torch.randn(2, 5), random_state(layer, 2), set(layer.state_dict())

    def agrees() -> None:
        got = layer.step(frame, state)
        want = rounded_step(layer, frame, state, dtype)
        assert (got.scores - want[0]).abs().max() < 2e-3

    agrees()
    made = _streams[layer]
    packed = made.steps[dtype]
    layer.step(frame, state)
    assert _streams[layer] is made and made.steps[dtype] is packed and set(made.steps) == {dtype}
    for change in (
        *(lambda p=p: p.copy_(torch.randn_like(p)) for p in layer.parameters()),
        lambda: layer.load_state_dict(TRN(5, 7, 4, steps=3).state_dict()),
        lambda: (layer.train(), fused_step(layer), layer.eval()),
        lambda: setattr(layer.hx_trans[0].weight, "data", torch.randn(7, 7)),
        lambda: setattr(layer.classifier, "weight", nn.Parameter(torch.randn(4, 7))),
        lambda: setattr(layer, "dec_cell", nn.LSTMCell(7, 7)),
        lambda: setattr(layer.future_linear, "0", nn.Linear(7, 5)),
    ):
        before = layer.step(frame, state)
        change()
        agrees()
        assert any(not torch.equal(a, b) for a, b in zip(before, layer.step(frame, state), strict=True)), change
    assert set(layer.state_dict()) == names
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert twin not in _streams
    for a, b in zip(twin.step(frame, state), layer.step(frame, state), strict=True):
        assert torch.equal(a, b), "a copy has the dtype, and packs for itself"
    with torch.inference_mode():
        layer = TRN(5, 7, 4, steps=3).pack(dtype)
        agrees()
        layer.dec_cell.weight_hh.mul_(3)
        agrees()


@kernel
@torch.no_grad()
@storages
def test_step_sees_what_is_not_a_number(dtype):
    layer = TRN(5, 20, 4, steps=2).pack(dtype)
    for value in (float("nan"), float("inf")):
        for place in range(4):
            frame, *state = given = torch.zeros(3, 5), *layer.init_state(3)
            given[place][1, 3] = value
            out = layer.step(frame, state)
            assert all(t[[0, 2]].isfinite().all() for t in out)
            if value != value:
                assert out.c[1].isnan().any() and out.scores[1].isnan().any()
    if dtype is torch.int8:
        layer.hx_trans[0].weight[0, 0] = float("nan")
        with pytest.raises(ValueError, match="not finite"):
            layer.step(torch.zeros(1, 5), layer.init_state(1))


@kernel
def test_step_in_threads_of_all_kinds():
    """More threads than cores and several callers at once: the same bits, and an end."""
    torch.manual_seed(0)
    layer, threads = TRN(64, 160, 22, steps=3), torch.get_num_threads()
    frame, state = torch.randn(2, 64), random_state(layer, 2)
    twins = [copy.deepcopy(layer).pack(dtype) for dtype in STORAGE]
    want = [twin.step(frame, state) for twin in twins]

    def agree() -> bool:
        return all(
            torch.equal(a, b)
            for twin, outs in zip(twins, want, strict=True)
            for a, b in zip(twin.step(frame, state), outs, strict=True)
        )

    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert agree()
            results: list[bool] = []
            callers = [threading.Thread(target=lambda r=results: r.append(agree())) for _ in range(3)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(60)
            assert results == [True] * 3
    finally:
        torch.set_num_threads(threads)


@kernel
def test_step_opcheck_and_refusals():
    layer = TRN(5, 7, 4, steps=3)
    frame, state = torch.randn(2, 5), layer.init_state(2)
    for storage in range(3):
        transform = layer.feature_extractor.input_linear[0]
        weights = [t.detach() for t in (transform.weight, transform.bias, *layer.weights())]
        packed = torch.ops.pyflowgen.trn_pack(weights, storage)
        how = (4, 3, False, True)
        torch.library.opcheck(torch.ops.pyflowgen.trn_step.default, (frame, *state, packed, *how))
    step, h, c, future = torch.ops.pyflowgen.trn_step, *state
    for call, message in (
        (lambda: step(torch.zeros(2, 6), *state, packed, *how), "do not fit"),
        (lambda: step(torch.zeros(3, 5), *state, packed, *how), "do not fit"),
        (lambda: step(torch.zeros(5), *state, packed, *how), "do not fit"),
        (lambda: step(frame, h, c[:, 1:], future, packed, *how), "do not fit"),
        (lambda: step(frame.double(), *state, packed, *how), "one dtype"),
        (lambda: step(frame, h, c, future, packed, 5, 3, False, False), "packed weights do not"),
        (lambda: step(*(t.double() for t in (frame, *state)), packed, *how), "packed from"),
        (lambda: torch.ops.pyflowgen.trn_pack(weights[1:], 0), "expected 18"),
        (lambda: torch.ops.pyflowgen.trn_pack([*weights[:2], weights[2][1:], *weights[3:]], 0), "weight 2 has shape"),
        (lambda: torch.ops.pyflowgen.trn_pack([t.double() for t in weights], 1), "storage float32"),
    ):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
    with pytest.raises(ValueError, match="dtype is torch.float16"):
        layer.pack(torch.float16)
    with pytest.raises(ValueError, match="dtype is torch.int8 for torch.float64 weights"):
        copy.deepcopy(layer).double().pack(torch.int8)
    assert [t.shape for t in layer.step(frame[:0], layer.init_state(0))] == [(0, 4), (0, 3, 4), (0, 7), (0, 7), (0, 5)]


@pytest.mark.parametrize("reference", [False, True])
def test_words_of_a_wrong_step(reference):
    layer = TRN(5, 7, 4, steps=3)
    frame, state = torch.zeros(2, 5), layer.init_state(2)
    with contextlib.ExitStack() as stack:
        if reference:
            stack.enter_context(pyflowgen.reference_path())
        for args, message in (
            ((torch.zeros(2, 6), state), r"frame has shape \(2, 6\), expected \(batch, 5\)"),
            ((frame, layer.init_state(3)), r"h has shape \(3, 7\), expected \(2, 7\)"),
            ((frame, state[:2]), "state has 2 tensors"),
        ):
            with pytest.raises(ValueError, match=message):
                layer.step(*args)
        with pytest.raises(TypeError, match=r"frames is torch.float64, expected the weights' torch.float32"):
            layer.step(frame.double(), state)
        with pytest.raises(TypeError, match=r"frames is torch.float64"):
            layer(frame[:, None].double())
        with pytest.raises(ValueError, match=r"future has shape \(2, 4\)"):
            layer(frame[:, None], (*state[:2], state[2][:, 1:]))
        for a, b in zip(layer.step(frame), layer.step(frame, state), strict=True):
            assert torch.equal(a, b)


def test_step_without_kernel():
    layer = TRN(5, 7, 4, steps=3, dropout=0.5).pack(torch.int8)
    frame, state = torch.randn(2, 5), random_state(layer, 2)
    with pyflowgen.reference_path():
        out = layer.step(frame, state)
        with pytest.raises(ValueError, match=r"frame has shape \(2, 6\)"):
            layer.step(torch.zeros(2, 6), state)
        want = layer.eval()(frame[:, None], state)
    assert not out.scores.requires_grad
    torch.testing.assert_close(out.scores, want.scores[:, 0].detach())
    for a, b in zip(out[2:], want[2:], strict=True):
        torch.testing.assert_close(a, b.detach())
    half = copy.deepcopy(layer).bfloat16().step(frame.bfloat16(), [s.bfloat16() for s in state])
    torch.testing.assert_close(half.scores.float(), out.scores, rtol=0, atol=0.05)


@kernel
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability):
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is one of them already")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "values or published or threads or step"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
