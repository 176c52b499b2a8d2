"""trn: the published equations written out, the authors' weights, clips in pieces, causality."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import pyflowgen
from pyflowgen import TRN
from pyflowgen.models import TRN as Detector

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
