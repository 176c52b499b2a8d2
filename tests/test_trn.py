"""trn: the published equations written out, the authors' weights, clips in pieces, causality; kernel and reference."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys

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


@kernel
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability):
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("this is one of them already")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "values or published or threads"],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
