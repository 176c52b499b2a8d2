"""The training loop on a model whose optimum is known, and what a run leaves on disk."""

import json
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from pyflowgen.data import DataError, Dataset, digits, toy
from pyflowgen.train import (
    BEST,
    CHECKPOINT,
    Diverged,
    Interrupted,
    RunError,
    TrainConfig,
    bits_per_dim,
    evaluate,
    fit,
    log_likelihood,
    read_metrics,
    read_tensors,
)


class Gaussian(nn.Module):
    """A density whose training is convex, with a dropout-like use of torch's global generator and a buffer."""

    def __init__(self, features=2, noise=0.0):
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(features))
        self.register_buffer("calls", torch.tensor(0))
        self.noise, self.after = noise, None

    def log_prob(self, x):
        if self.training:
            self.calls += 1
            x = x + self.noise * torch.randn_like(x)
        if self.after:
            self.after(int(self.calls))
        z = (x - self.mean) * (-self.log_std).exp()
        return (-0.5 * z * z - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def plane(count=1000):
    data = toy("banana", count)
    return Dataset("plane", data.train, data.valid, data.test)


def test_reaches_the_maximum_of_the_likelihood():
    data, model = plane(4000), Gaussian()
    result = fit(model, data, TrainConfig(epochs=30, lr=0.05))
    best = -(data.train.std(0, correction=0).log() + 0.5 * math.log(2 * math.pi * math.e)).sum()
    reached = log_likelihood(model, data, data.train).mean()
    assert best - 0.01 < reached <= best + 1e-6
    assert result.steps == 30 * 32 and result.epochs == 30 and result.stopped == "epochs"


def test_bits_per_dim_of_a_uniform_density_is_the_number_of_bits():
    assert bits_per_dim(0.0, Dataset("x", *[torch.zeros(1, 3, dtype=torch.uint8)] * 3, levels=256)) == 8
    assert bits_per_dim(0.0, plane()) is None


def test_evaluate_averages_draws_of_fixed_noise():
    class Slope(nn.Module):  # log p(x) = x, so one draw's mean is known in expectation: (x + ½) / 17
        def log_prob(self, x):
            return x[:, 0]

    data = digits()
    one, many = evaluate(Slope(), data, data.test, draws=1), evaluate(Slope(), data, data.test, draws=200)
    expected = float((data.test[:, 0] + 0.5).mean() / 17)
    assert one == evaluate(Slope(), data, data.test, draws=1) and one["nats"] != many["nats"]
    assert abs(many["nats"] - expected) < 4 / math.sqrt(12 * 400 * 200) / 17
    assert many["bits_per_dim"] == pytest.approx(-many["nats"] / 64 / math.log(2) + math.log2(17))


def same(a, b):
    (left, about), (right, about_too) = read_tensors(a), read_tensors(b)
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    for m in (about, about_too):
        state = json.loads(m.pop("state", "{}"))
        state.pop("seconds", None)
        m["state"] = json.dumps(state)
    assert about == about_too


def without_time(out):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(out)]


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop"])
def test_two_epochs_and_two_resumed_are_four(tmp_path, optimizer):
    settings = dict(optimizer=optimizer, schedule="constant", lr=0.01, batch=96, ema=0.9)
    straight, halves = Gaussian(noise=0.1), Gaussian(noise=0.1)
    first = fit(straight, plane(), TrainConfig(epochs=4, **settings), out=tmp_path / "a")
    fit(halves, plane(), TrainConfig(epochs=2, **settings), out=tmp_path / "b")
    torch.manual_seed(99)  # the global state of the caller has no say
    fresh = Gaussian(noise=0.1)
    second = fit(fresh, plane(), TrainConfig(epochs=4, **settings), out=tmp_path / "b", resume=True)
    same(tmp_path / "a" / CHECKPOINT, tmp_path / "b" / CHECKPOINT)
    same(tmp_path / "a" / BEST, tmp_path / "b" / BEST)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b") and len(read_metrics(tmp_path / "a")) == 4
    assert (first.steps, first.best_valid) == (second.steps, second.best_valid)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), fresh.parameters(), strict=True))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_inside_an_epoch_and_resumed_is_the_same(tmp_path, signum):
    config = TrainConfig(epochs=3, lr=0.01, batch=96)
    fit(Gaussian(), plane(), config, out=tmp_path / "a")
    model = Gaussian()
    model.after = lambda calls: os.kill(os.getpid(), signum) if calls == 17 else None
    handler = signal.getsignal(signum)
    with pytest.raises(Interrupted, match="interrupted at step 16 .*--resume") as caught:
        fit(model, plane(), config, out=tmp_path / "b")
    assert caught.value.signum == signum and signal.getsignal(signum) is handler
    fit(Gaussian(), plane(), config, out=tmp_path / "b", resume=True)
    same(tmp_path / "a" / CHECKPOINT, tmp_path / "b" / CHECKPOINT)
    assert without_time(tmp_path / "a") == without_time(tmp_path / "b")


def test_lost_tail_is_done_again(tmp_path):
    """After a kill the metrics may be ahead of the checkpoint, with half a line at the end."""
    config = TrainConfig(epochs=2, lr=0.01, schedule="constant")
    fit(Gaussian(), plane(), config, out=tmp_path)
    before = without_time(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**before[-1], "step": 10**6}) + '\n{"step": 10')
    fit(Gaussian(), plane(), TrainConfig(epochs=3, lr=0.01, schedule="constant"), out=tmp_path, resume=True)
    after = without_time(tmp_path)
    assert after[:2] == before and [line["epoch"] for line in after] == [1, 2, 3]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    config = TrainConfig(epochs=1, schedule="constant")
    fit(Gaussian(), plane(), config, out=tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(fd, calls=[]):  # noqa: B006
        calls.append(fd)
        if len(calls) > 1:  # the first is config.json
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        fit(Gaussian(), plane(), TrainConfig(epochs=2, schedule="constant"), out=tmp_path, resume=True)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_divergence_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Breaks(Gaussian):
        def log_prob(self, x):
            value = super().log_prob(x)
            return value * math.nan if self.calls > 12 else value

    with pytest.raises(Diverged, match=r"loss is NaN or infinite at step 12 \(epoch 2, .*checkpoint"):
        fit(Breaks(), plane(), TrainConfig(epochs=5, checkpoint_every=0), out=tmp_path)
    tensors, about = read_tensors(tmp_path / CHECKPOINT)
    assert json.loads(about["state"])["step"] == 11
    assert all(t.isfinite().all() for k, t in tensors.items() if k.startswith("model."))


def test_nan_gradient_with_finite_loss_is_divergence():
    class Root(Gaussian):
        def log_prob(self, x):
            return super().log_prob(x) + (self.mean * 0).abs().sqrt().sum()  # value 0, derivative 0·inf

    with pytest.raises(Diverged, match="gradient"):
        fit(Root(), plane(), TrainConfig(epochs=1))


def test_early_stop_keeps_the_best_weights():
    data = plane()
    model = Gaussian()
    result = fit(model, data, TrainConfig(epochs=500, lr=0.3, patience=5, schedule="constant", batch=16))
    assert result.stopped == "patience" and result.epochs == result.best_epoch + 5 < 500
    assert float(log_likelihood(model, data, data.valid).mean()) == result.best_valid


def test_time_limit():
    result = fit(Gaussian(), plane(), TrainConfig(epochs=10**6, time_limit=0.3))
    assert result.stopped == "time" and 0.3 <= result.seconds < 5 and math.isfinite(result.best_valid)


def test_average_of_weights_is_what_is_kept(tmp_path):
    model, seen = Gaussian(), []
    model.after = lambda calls: seen.append(model.mean.detach().clone()) if model.training else None
    fit(model, plane(), TrainConfig(epochs=1, lr=0.1, batch=8, ema=0.9), out=tmp_path)
    tensors, _ = read_tensors(tmp_path / CHECKPOINT)
    average = seen[1]  # seen[0] is the initialisation, seen[1] the first step's start
    for step, mean in enumerate([*seen[2:], tensors["model.mean"]]):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * mean
    assert torch.allclose(tensors["average.0"], average, atol=1e-6)
    assert torch.equal(model.mean, tensors["average.0"]) and not torch.equal(model.mean, tensors["model.mean"])


def test_outer_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(Gaussian(noise=0.1), plane(), TrainConfig(epochs=1))
    assert torch.equal(torch.rand(3), expected)


def test_works_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(fit(Gaussian(), plane(), TrainConfig(epochs=1))))
    thread.start()
    thread.join()
    assert results[0].epochs == 1


def test_bar_shows_live_likelihood(capsys):
    fit(Gaussian(), plane(), TrainConfig(epochs=2), progress=True)
    shown = capsys.readouterr().err
    assert "16/16" in shown and "nats" in shown and "valid=" in shown


def test_wrong_arguments_are_named():
    data = plane()
    with pytest.raises(TypeError, match="model is a Linear without log_prob"):
        fit(nn.Linear(2, 2), data)
    with pytest.raises(ValueError, match="parameters are on meta, expected them on the data's cpu"):
        fit(Gaussian().to("meta"), data)
    with pytest.raises(ValueError, match="parameters are on none"):
        fit(Gaussian().requires_grad_(False), data)
    with pytest.raises(DataError, match=r"broken: valid of shape \(100, 2\) has NaN"):
        fit(Gaussian(), Dataset("broken", data.train, data.valid * float("nan"), data.test))
    with pytest.raises(DataError, match=r"empty: train of shape \(0, 2\) has no examples"):
        fit(Gaussian(), Dataset("empty", data.train[:0], data.valid, data.test))


def test_run_folder_faults(tmp_path):
    config = TrainConfig(epochs=1)
    fit(Gaussian(), plane(), config, out=tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already"):
        fit(Gaussian(), plane(), config, out=tmp_path / "run")
    with pytest.raises(RunError, match="no checkpoint of this model"):
        fit(Gaussian(3), plane(), config, out=tmp_path / "run", resume=True)
    (tmp_path / "run" / CHECKPOINT).write_bytes(b"junk")
    with pytest.raises(RunError, match=r"checkpoint.safetensors: cannot be read .*expected safetensors"):
        fit(Gaussian(), plane(), config, out=tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="file"):
        fit(Gaussian(), plane(), config, out=tmp_path / "file")


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("lr", 0.0),
        ("lr", math.nan),
        ("batch", 0),
        ("epochs", 0),
        ("ema", 1.0),
        ("optimizer", "sgd"),
        ("path", "fast"),
        ("clip", -1.0),
        ("patience", 0),
        ("schedule", "step"),
        ("weight_decay", -1.0),
        ("time_limit", 0.0),
    ],
)
def test_wrong_settings_are_named(setting, value):
    with pytest.raises(RunError, match=f"^{setting} is "):
        TrainConfig(**{setting: value})
    with pytest.raises(RunError, match="unknown training setting speed"):
        TrainConfig.of({"speed": 1})
