"""Detectors: clips and streams agree, the future has no say, losses are those written down, streams share a batch."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pyflowgen
from pyflowgen.models import IDN, TRN, Detector, GRUDetector, LiveStreams, LSTMDetector
from pyflowgen.models.detector import frame_loss, monotone_ranking_loss

MODELS = {
    "lstm": lambda **k: LSTMDetector(6, 4, hidden=16, layers=2, window=8, **k),
    "gru": lambda **k: GRUDetector(6, 4, embedding=16, hidden=16, window=8, **k),
    "trn": lambda **k: TRN(6, 4, hidden=16, steps=3, window=8, **k),
    "trn, paper": lambda **k: TRN(6, 4, hidden=16, steps=3, window=8, pool="before", start="previous", **k),
    "idn": lambda **k: IDN(6, 4, hidden=16, window=8, **k),
    "idn, port": lambda **k: IDN(6, 4, hidden=16, window=8, bias=True, reset="after", update="state", **k),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> Detector:
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    made.standardise(torch.randn(6), torch.rand(6) + 0.5)
    return made


def frames(count: int, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, count, 6, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_step_by_step_is_the_clip(model):
    x = frames(40)
    clip = model(x)
    state, scores = model.init_state(3), []
    for t in range(40):
        score, state = model.step(x[:, t], state)
        scores.append(score)
    torch.testing.assert_close(torch.stack(scores, 1), clip, rtol=1e-6, atol=1e-6)
    pieces, state = [], None
    for part in x.split([7, 1, 20, 12], 1):
        score, state = model.run(part, state)
        pieces.append(score)
    torch.testing.assert_close(torch.cat(pieces, 1), clip, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("grad", [False, True])
def test_the_future_has_no_say(model, grad):
    """Bit for bit: in clips of one length, in training mode of autograd or not, and in streams."""
    x, t = frames(40), 23
    changed = x.clone()
    changed[:, t:] = 50 * torch.randn(3, 40 - t, 6)
    with torch.set_grad_enabled(grad):
        a, b = model(x), model(changed)
    assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t:], b[:, t:])
    with torch.no_grad():
        one, two, s, r = [], [], None, None
        for i in range(40):
            p, s = model.step(x[:, i], s)
            q, r = model.step(changed[:, i], r)
            one.append(p)
            two.append(q)
    assert all(torch.equal(p, q) for p, q in zip(one[:t], two[:t], strict=True)) and not torch.equal(one[t], two[t])


@torch.no_grad()
def test_state_does_not_grow(model):
    def held(state):
        return {k: (v.shape, v.untyped_storage().nbytes()) for k, v in state.items()}

    state = model.init_state(1)
    x = frames(400, 1)
    for t in range(60):
        _, state = model.step(x[:, t], state)
    early = held(state)
    for t in range(60, 400):
        _, state = model.step(x[:, t], state)
    assert held(state) == early


def test_one_gradient_step_lowers_the_loss(model):
    model.train()
    x, targets = frames(8), F.one_hot(torch.randint(0, 4, (3, 8 + model.lookahead)), 4).float()
    torch.manual_seed(0)
    before = model.eval().loss(x, targets)
    before.backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing or missing == ["idu.bias"], missing
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad
    assert model.loss(x, targets) < before


def test_config_and_weights_make_the_model_again(model):
    again = type(model).from_config(model.config).eval()
    again.load_state_dict(model.state_dict())
    x = frames(12)
    assert torch.equal(again(x), model(x)) and again.config == model.config


def test_weights_without_standardisation_load(model):
    weights = {k: v for k, v in model.state_dict().items() if k not in ("mean", "scale")}
    again = type(model).from_config(model.config)
    again.load_state_dict(weights)
    assert (again.mean == 0).all() and (again.scale == 1).all()


def test_standardisation_is_part_of_the_model(model):
    x = frames(12)
    bare = type(model).from_config(model.config).eval()
    bare.load_state_dict({**model.state_dict(), "mean": torch.zeros(6), "scale": torch.ones(6)})
    torch.testing.assert_close(bare((x - model.mean) / model.scale), model(x))


@pytest.mark.parametrize("name", ["lstm", "gru", "trn", "idn"])
def test_ignored_classes(name):
    """They get no probability and have no say in the loss."""
    torch.manual_seed(0)
    model = MODELS[name](ignored=[3]).eval()
    x = frames(8)
    scores = model(x)
    p = model.probabilities(scores)
    assert (p[..., 3] == 0).all() and torch.allclose(p.sum(-1), torch.ones(3, 8))
    targets = F.one_hot(torch.randint(0, 3, (3, 8 + model.lookahead)), 4).float()
    before = model.loss(x, targets)
    head = (
        model.classifier if name in ("lstm", "gru") else model.trn.classifier if name == "trn" else model.classifier[-1]
    )
    with torch.no_grad():
        head.bias[3] += 100.0
    if name == "trn":  # scores feed the decoder, whatever the class
        model.trn.fusion_linear[0].weight.data[:, 3] = 0
        head.bias.data[3] -= 100.0
        before = model.loss(x, targets)
        head.bias.data[3] += 100.0
    torch.testing.assert_close(model.loss(x, targets), before)


@torch.no_grad()
def test_clips_without_frames_or_streams(model):
    for batch, count in ((2, 0), (0, 5)):
        scores, state = model.run(torch.zeros(batch, count, 6))
        assert scores.shape == (batch, count, 4) and all(len(v) == batch for v in state.values())


@torch.no_grad()
def test_autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        clip, state = model(frames(12)), None
        for t in range(12):
            scores, state = model.step(frames(12)[:, t], state)
    torch.testing.assert_close(clip[:, -1].float(), model(frames(12))[:, -1], rtol=0, atol=0.05)
    torch.testing.assert_close(scores.float(), clip[:, -1].float(), rtol=0, atol=0.05)


def test_wrong_arguments_are_named(model):
    with torch.no_grad(), pytest.raises(ValueError, match=r"shapes? \(.*3.*expected .*2"):
        model.step(torch.zeros(2, 6), model.init_state(3))
    with pytest.raises(ValueError, match=r"features have shape \(3, 8, 5\), expected \(batch, frames, 6\)"):
        model(torch.randn(3, 8, 5))
    with pytest.raises(ValueError, match=r"frame has shape \(6,\), expected \(batch, 6\)"):
        model.step(torch.randn(6))
    for options in (dict(features=0, classes=3), dict(features=3, classes=1), dict(features=3, classes=3, ignored=[0])):
        with pytest.raises(ValueError, match="expected"):
            type(model)(**options)


# ---- losses


def test_frame_loss_is_cross_entropy():
    torch.manual_seed(0)
    scores, labels = torch.randn(4, 7, 5), torch.randint(0, 5, (4, 7))
    targets = F.one_hot(labels, 5).float()
    torch.testing.assert_close(frame_loss(scores, targets), F.cross_entropy(scores.flatten(0, 1), labels.flatten()))
    targets[:, 2] = 0
    left = [i for i in range(7) if i != 2]
    torch.testing.assert_close(
        frame_loss(scores, targets), F.cross_entropy(scores[:, left].flatten(0, 1), labels[:, left].flatten())
    )
    assert frame_loss(scores, torch.zeros(4, 7, 5)) == 0
    both = torch.tensor([[0.0, 1.0, 1.0]])
    torch.testing.assert_close(frame_loss(torch.zeros(1, 3), both), 2 * torch.log(torch.tensor(3.0)))
    with pytest.raises(ValueError, match=r"targets have shape \(4, 6, 5\), expected \(4, 7, 5\)"):
        frame_loss(scores, targets[:, 1:])


def ranking_by_hand(scores: Tensor, targets: Tensor) -> Tensor:
    p, total, count = scores.softmax(-1), torch.tensor(0.0), 0
    for b, c in itertools.product(range(len(p)), range(1, p.shape[2])):
        best = None
        for t in range(p.shape[1]):
            if not targets[b, t, c]:
                best = None  # the instance is over
                continue
            count += 1
            if best is not None:
                total = total + F.relu(best - p[b, t, c])
            best = p[b, t, c] if best is None else torch.maximum(best, p[b, t, c])
    return total / max(1, count)


def test_ranking_loss_stays_within_each_instance():
    torch.manual_seed(0)
    for _ in range(20):
        scores = torch.randn(2, 30, 4, requires_grad=True)
        labels = torch.randint(0, 4, (2, 10)).repeat_interleave(3, 1)
        targets = F.one_hot(labels, 4).float()
        targets[0, 5] = 0
        targets[1, 9:14, 2] = 1  # an action beside another
        got, want = monotone_ranking_loss(scores, targets), ranking_by_hand(scores, targets)
        torch.testing.assert_close(got, want)
        (a,), (b,) = torch.autograd.grad(got, scores), torch.autograd.grad(want, scores)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert monotone_ranking_loss(torch.randn(1, 6, 3), F.one_hot(torch.zeros(1, 6, dtype=torch.long), 3)) == 0
    with pytest.raises(ValueError, match=r"scores of shape \(6, 3\)"):
        monotone_ranking_loss(torch.randn(6, 3), torch.zeros(6, 3))


def test_early_weighs_the_ranking_loss():
    torch.manual_seed(0)
    plain, early = (LSTMDetector(6, 4, hidden=8, early=e) for e in (0.0, 2.0))
    early.load_state_dict(plain.state_dict())
    x, targets = frames(32), F.one_hot(torch.randint(0, 4, (3, 8)).repeat_interleave(4, 1), 4).float()
    torch.testing.assert_close(
        early.loss(x, targets) - plain.loss(x, targets), 2 * monotone_ranking_loss(plain(x), targets)
    )


def test_gru_loss_is_of_the_last_frame():
    torch.manual_seed(0)
    model = MODELS["gru"]().eval()
    x, targets = frames(8), F.one_hot(torch.randint(0, 4, (3, 8)), 4).float()
    torch.testing.assert_close(model.loss(x, targets), frame_loss(model(x)[:, -1], targets[:, -1]))
    several = GRUDetector(6, 4, embedding=16, hidden=16, window=8, last=3).eval()
    several.load_state_dict(model.state_dict())
    torch.testing.assert_close(several.loss(x, targets), frame_loss(model(x)[:, -3:], targets[:, -3:]))


def test_idn_loss_by_hand():
    torch.manual_seed(0)
    model = IDN(6, 4, hidden=5, window=8, alpha=0.3).eval()
    x = frames(8)
    labels = torch.randint(0, 3, (3, 8))
    targets = F.one_hot(labels, 4).float()
    targets[1, 2] = 0
    e = model.embed(x)
    want = F.cross_entropy(model(x)[:, -1], labels[:, -1]) + frame_loss(model.early(e), targets)
    contrast, count = torch.tensor(0.0), 0
    for b, t in itertools.product(range(3), range(8)):
        if (b, t) == (1, 2):
            continue
        count += 1
        d2 = ((e[b, t] - e[b, -1]) ** 2).sum()
        contrast = contrast + (d2 if labels[b, t] == labels[b, -1] else F.relu(1 - d2))
    torch.testing.assert_close(model.loss(x, targets), want + 0.3 * contrast / count)


# ---- many streams


@torch.no_grad()
def test_streams_join_and_leave_one_batch(model):
    """Whatever company a stream has, its scores are those it has alone."""
    live, seen = LiveStreams(model), {}
    data = {name: frames(30, 1, seed=i)[0] for i, name in enumerate(("a", "b", "c"))}
    at = dict.fromkeys(data, 0)

    def go(*names):
        scores = live.step({n: data[n][at[n]] for n in names})
        for n in names:
            seen.setdefault(n, []).append(scores[n])
            at[n] += 1

    live.join("a")
    for _ in range(5):
        go("a")
    live.join("b")
    for i in range(6):
        go(*("ab", "ba", "b")[i % 3])
    away = live.leave("a")
    live.join("c")
    for _ in range(4):
        go("c", "b")
    live.join("a", away)
    for _ in range(5):
        go("c", "a", "b")
    assert live.names == ("b", "c", "a") and live.step({}) == {}
    for name, scores in seen.items():
        alone = model.probabilities(model(data[name][None, : at[name]]))[0]
        torch.testing.assert_close(torch.stack(scores), alone, rtol=1e-5, atol=1e-6)


def test_live_streams_name_what_is_wrong(model):
    live = LiveStreams(model)
    live.join("a")
    for message, call in {
        "a stream 'a' already": lambda: live.join("a"),
        "no stream 'b', join it first": lambda: live.step({"b": torch.zeros(6)}),
        "no stream 'b', expected one of a": lambda: live.leave("b"),
        r"frame of 'a' has shape \(5,\), expected \(6,\)": lambda: live.step({"a": torch.zeros(5)}),
        "expected that of one stream": lambda: live.join("c", model.init_state(2)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert live.names == ("a",)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=["bf16", "int8"])
def test_packed_weights_are_for_steps_alone(model, dtype):
    """Scores near the clip's; parameters and clips as they were; many streams as each alone."""
    x, before = frames(20), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        clip = model(x)
    assert model.pack(dtype) is model
    live = LiveStreams(model)
    for name in "abc":
        live.join(name)
    state = model.init_state(1)
    with torch.no_grad():
        for t in range(20):
            scores, state = model.step(x[:1, t], state)
            found = live.step({n: x[i, t] for i, n in enumerate("abc")})
            torch.testing.assert_close(found["a"], model.probabilities(scores)[0], rtol=0, atol=1e-6)
            assert (scores - clip[:1, t]).abs().max() < 0.02
            if "library" in pyflowgen.build_info():
                assert not torch.equal(scores, clip[:1, t])
        torch.testing.assert_close(model(x), clip, rtol=0, atol=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
