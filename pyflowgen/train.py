"""One training loop for every model: it survives Ctrl-C and kill, and resumes bit for bit.

A run is a folder::

    config.json              what was asked for: model, data, :class:`TrainConfig`
    checkpoint.safetensors   model, optimiser and random-number state; where the loop stands is in its metadata
    best.safetensors         the weights with the best validation score
    metrics.jsonl            one line an epoch: step, seconds, and what the task measures, e.g. log-likelihoods

What is optimised and how it is judged is a :class:`Task`; :class:`Likelihood` unless said otherwise.
Every file is written beside its place and renamed, so a reader finds the old state or the new one, never half of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from pyflowgen.data import DataError, Dataset

CONFIG, CHECKPOINT, BEST, METRICS = "config.json", "checkpoint.safetensors", "best.safetensors", "metrics.jsonl"


class RunError(ValueError):
    """A run folder or a training setting that cannot be used, in one line."""


class Diverged(RuntimeError):
    """The loss or its gradient became NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a termination signal, raised after the state was saved."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum


@dataclass(frozen=True)
class TrainConfig:
    """Settings of :func:`fit`; ``None`` switches one off.

    ``path`` is "fused" (kernels) or "reference" (plain PyTorch). The cosine schedule falls with the share of the epochs
    done, or of the time limit where that is used up sooner; the latter alone is no longer the same from run to run.
    """

    epochs: int = 100
    time_limit: float | None = None  # seconds of training, all resumes together
    batch: int = 128
    optimizer: str = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0  # steps of linear rise to lr
    clip: float | None = 10.0  # largest norm of the whole gradient
    patience: int | None = None  # epochs without a better validation score
    ema: float | None = None  # decay of the averaged weights that are then validated and kept
    seed: int = 0
    path: str = "fused"
    init_examples: int = 4096  # examples of the first, data-dependent initialisation
    valid_every: int = 1  # epochs
    checkpoint_every: float = 30.0  # seconds

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "init_examples", "valid_every"):
            _expect(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("lr", "time_limit", "clip", "patience"):
            value = getattr(self, name)
            _expect(value is None or 0 < value < math.inf, name, value, "a finite number above 0")
        for name in ("weight_decay", "warmup", "checkpoint_every"):
            _expect(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or a finite number above it")
        _expect(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "a decay between 0 and 1")
        for name, choices in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("path", PATHS)):
            _expect(getattr(self, name) in choices, name, getattr(self, name), f"one of {', '.join(choices)}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TrainConfig:
        """From a mapping, e.g. the ``train`` part of a run's config; an unknown name is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise RunError(f"unknown training setting {', '.join(sorted(unknown))}")
        return cls(**values)


def _expect(right: bool, name: str, value: Any, expected: str) -> None:
    if not right:
        raise RunError(f"{name} is {value}, expected {expected}")


OPTIMIZERS = ("adam", "adamw", "rmsprop")
SCHEDULES = ("constant", "cosine")
PATHS = ("fused", "reference")


@dataclass
class _State:
    """Where the loop stands: everything but tensors, kept in the checkpoint's metadata."""

    step: int = 0
    epoch: int = 0  # epochs completed
    position: int = 0  # examples of the current epoch already used
    seconds: float = 0.0
    loss_sum: float = 0.0  # over the current epoch's examples so far
    valid: float | None = None
    best_valid: float | None = None
    best_epoch: int = 0
    stopped: str | None = None


class Task(Protocol):
    """What :func:`fit` asks of a kind of training: the examples, their loss, and a score, of which more is better.

    ``data`` is whatever the task was made for; it has ``facts()``, which go into the run's ``config.json``.
    """

    def check(self, model: nn.Module, data: Any) -> None:
        """Raise for a model or data that cannot be trained."""

    def device(self, data: Any) -> torch.device:
        """Where the examples are."""

    def count(self, model: nn.Module, data: Any) -> int:
        """Examples an epoch has."""

    def initialise(self, model: nn.Module, data: Any, index: Tensor, generator: torch.Generator) -> None:
        """Before the first step, without gradient: the examples of ``index`` for layers initialised from data."""

    def loss(self, model: nn.Module, data: Any, index: Tensor, generator: torch.Generator) -> Tensor:
        """Mean loss of the examples ``index``; all randomness but that of layers comes from ``generator``."""

    def score(self, model: nn.Module, data: Any) -> float:
        """The model's score on the validation data."""

    def entries(self, data: Any, loss: float, score: float) -> dict[str, float | None]:
        """What a line of ``metrics.jsonl`` says of an epoch's mean training loss and its score."""

    def say(self, data: Any, score: float) -> str:
        """A score with its unit."""

    def say_loss(self, data: Any, loss: float) -> str:
        """A training loss with its unit."""

    def test(self, model: nn.Module, data: Any) -> str:
        """What the model reaches on the test data, in words."""


@dataclass(frozen=True)
class Result:
    """What :func:`fit` did. ``best_valid`` is the task's score, mean nats an example for a likelihood; ``stopped`` is
    "epochs", "time" or "patience"."""

    steps: int
    epochs: int
    seconds: float
    best_valid: float
    best_epoch: int
    stopped: str


def bits_per_dim(nats: float, data: Dataset) -> float | None:
    """``(−nats/D + ln levels) / ln 2`` for data with levels dequantised to [0, 1], else None.

    >>> from pyflowgen.data import digits
    >>> round(bits_per_dim(0.0, digits()), 4)  # the uniform density: log2 of 17 levels
    4.0875
    """
    if data.levels is None:
        return None
    return (-nats / math.prod(data.event_shape) + math.log(data.levels)) / math.log(2)


@torch.no_grad()
def log_likelihood(
    model: nn.Module, data: Dataset, examples: Tensor, *, draws: int = 1, seed: int = 1, batch: int = 2048
) -> Tensor:
    """Log-likelihood in nats of each example, averaged over ``draws`` of dequantisation noise from a fixed seed.

    For data with levels the mean over noise is a lower bound on the log-probability of the levels (Theis et al. 2016).
    """
    generator = torch.Generator(examples.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        chunks = [examples[i : i + batch] for i in range(0, len(examples), batch)]
        total = torch.zeros(len(examples), dtype=torch.float64, device=examples.device)
        for _ in range(draws if data.levels is not None else 1):
            parts = [cast(Any, model).log_prob(data.dequantize(x, generator)) for x in chunks]
            total += torch.cat(parts).double()
        return total / (draws if data.levels is not None else 1)
    finally:
        model.train(was_training)


class Likelihood:
    """Maximise the mean ``model.log_prob(x)``; the score is the mean in nats."""

    def check(self, model: nn.Module, data: Dataset) -> None:
        if not callable(getattr(model, "log_prob", None)):
            raise TypeError(
                f"fit: model is a {type(model).__name__} without log_prob, expected a module with log_prob(x)"
            )
        for part in ("train", "valid"):
            examples = getattr(data, part)
            if not len(examples) or (examples.is_floating_point() and not bool(examples.isfinite().all())):
                what = "NaN or infinite values in it" if len(examples) else "no examples"
                raise DataError(f"{data.name}: {part} of shape {tuple(examples.shape)} has {what}")

    def device(self, data: Dataset) -> torch.device:
        return data.train.device

    def count(self, model: nn.Module, data: Dataset) -> int:
        return len(data.train)

    def initialise(self, model: nn.Module, data: Dataset, index: Tensor, generator: torch.Generator) -> None:
        self.loss(model, data, index, generator)

    def loss(self, model: nn.Module, data: Dataset, index: Tensor, generator: torch.Generator) -> Tensor:
        return -cast(Any, model).log_prob(data.dequantize(data.train[index], generator)).mean()

    def score(self, model: nn.Module, data: Dataset) -> float:
        return float(log_likelihood(model, data, data.valid).mean())

    def entries(self, data: Dataset, loss: float, score: float) -> dict[str, float | None]:
        line: dict[str, float | None] = {"train_nats": -loss, "valid_nats": score}
        if data.levels is not None:
            line |= {"train_bits_per_dim": bits_per_dim(-loss, data), "valid_bits_per_dim": bits_per_dim(score, data)}
        return line

    def say(self, data: Dataset, score: float) -> str:
        bits = bits_per_dim(score, data)
        return f"{score:.3f} nats" if bits is None else f"{bits:.3f} bits/dim"

    def say_loss(self, data: Dataset, loss: float) -> str:
        return self.say(data, -loss)

    def test(self, model: nn.Module, data: Dataset) -> str:
        found = evaluate(model, data, data.test)
        bits = found["bits_per_dim"]
        return f"{found['nats']:.3f} nats" + ("" if bits is None else f" = {bits:.4f} bits/dim")


def evaluate(model: nn.Module, data: Dataset, examples: Tensor, *, draws: int = 8, seed: int = 1) -> dict[str, Any]:
    """Mean log-likelihood in nats, its standard error over examples, and bits/dim where the data has levels."""
    values = log_likelihood(model, data, examples, draws=draws, seed=seed)
    nats = float(values.mean())
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return {
        "examples": len(values),
        "draws": draws if data.levels is not None else 1,
        "nats": nats,
        "nats_standard_error": error,
        "bits_per_dim": bits_per_dim(nats, data),
    }


def choose_path(path: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which ``"fused"`` takes the kernels and ``"reference"`` plain PyTorch."""
    if path == "fused":
        return contextlib.nullcontext()
    from pyflowgen._native import reference_path

    return cast("contextlib.AbstractContextManager[Any]", reference_path())


def fit(
    model: nn.Module,
    data: Any,
    config: TrainConfig | None = None,
    *,
    task: Task | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    describe: Mapping[str, Any] | None = None,
) -> Result:
    """Maximise the mean ``model.log_prob(x)`` over ``data.train`` and leave in it the weights best on ``data.valid``.

    Args:
        model: any module with ``log_prob(x) -> (batch,)``, on the data's device. One call without gradient on
            ``config.init_examples`` examples precedes the first step, for layers initialised from data.
        data: a :class:`Dataset`; batches are drawn by index, new dequantisation noise at every step.
        config: see :class:`TrainConfig`.
        task: another loss and score than :class:`Likelihood`, with the model and data that it asks for.
        out: the run's folder; without one nothing is written. A folder that holds a run needs ``resume=True``, which
            continues bit for bit where the last checkpoint stands (the global random state is left as it was).
        progress: a bar on standard error with live bits/dim (nats for continuous data), or what the task measures.
        describe: further entries of the run's ``config.json``.

    Raises:
        DataError: no examples, or NaN among them.
        RunError: ``out`` cannot be used.
        Diverged: the loss or gradient is no longer finite; the last good checkpoint stays.
        Interrupted: Ctrl-C or SIGTERM, after the step under way and a checkpoint.

    >>> from pyflowgen.data import toy
    >>> class Normal(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.mean = torch.nn.Parameter(torch.zeros(2))
    ...     def log_prob(self, x):
    ...         return torch.distributions.Normal(self.mean, 1.0).log_prob(x).sum(1)
    >>> result = fit(Normal(), toy("moons", 1000), TrainConfig(epochs=2))
    >>> result.steps, result.stopped
    (16, 'epochs')
    """
    config, task = config or TrainConfig(), task or Likelihood()
    task.check(model, data)
    devices = {p.device for p in model.parameters() if p.requires_grad}
    if devices != {task.device(data)}:
        found = ", ".join(map(str, devices)) or "none"
        raise ValueError(f"fit: trainable parameters are on {found}, expected them on the data's {task.device(data)}")
    where = None if out is None else Path(out)
    return _Loop(model, data, config, task, where, resume, dict(describe or {})).run(progress)


class _Loop:
    """The tensors and counters of one :func:`fit`; its methods are the loop's parts."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        config: TrainConfig,
        task: Task,
        out: Path | None,
        resume: bool,
        describe: dict[str, Any],
    ) -> None:
        self.model, self.data, self.config, self.task, self.out = model, data, config, task, out
        self.device, self.examples = task.device(data), task.count(model, data)
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(config, self.parameters)
        self.order_rng = torch.Generator().manual_seed(config.seed)
        self.noise_rng = torch.Generator(self.device).manual_seed(config.seed + 1)
        self.order = torch.empty(0, dtype=torch.long)
        self.state = _State()
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.best: dict[str, Tensor] = {}
        self.best_written = True
        self.resume = resume
        self.signum: int | None = None
        if out is not None:
            self._claim(out, resume, describe)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.examples // self.config.batch)

    def run(self, progress: bool) -> Result:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), choose_path(self.config.path), self._signals():
            if self.out is not None and self.resume and (self.out / CHECKPOINT).exists():
                self._restore()
                self.state.stopped = None
            else:
                torch.manual_seed(self.config.seed)
                self._initialise()
            self.began = self.saved = time.perf_counter()
            self.before = self.state.seconds
            if self.out is not None and self.state.step == 0:
                self._save()
            total = self.config.epochs * self.steps_per_epoch
            # a bar that no terminal redraws would fill a log file
            interval = 0.1 if sys.stderr.isatty() else 10.0
            with tqdm(
                total=total,
                initial=self.state.step,
                disable=not progress,
                mininterval=interval,
                unit="step",
                smoothing=0.1,
            ) as bar:
                self._epochs(bar)
            if self.out is not None:
                self._save()
        if self.best:
            self.model.load_state_dict(self.best)
        s = self.state
        assert s.best_valid is not None and s.stopped is not None
        return Result(s.step, s.epoch, s.seconds, s.best_valid, s.best_epoch, s.stopped)

    def _epochs(self, bar: Any) -> None:
        state, config = self.state, self.config
        self.model.train()
        while True:
            state.stopped = self._stop()
            if state.stopped:
                if state.best_valid is None or (state.stopped == "time" and state.position):
                    self._validate(bar)
                return
            if state.position == 0:
                self.order = torch.randperm(self.examples, generator=self.order_rng)
            index = self.order[state.position : state.position + config.batch].to(self.device)
            self._step(index, bar)
            state.position += len(index)
            if state.position >= len(self.order):
                state.epoch += 1
                if state.epoch % config.valid_every == 0 or state.epoch >= config.epochs:
                    self._validate(bar)
                state.position, state.loss_sum = 0, 0.0
            state.seconds = self.before + time.perf_counter() - self.began
            if self.signum is not None:
                self._interrupt()
            if self.out is not None and time.perf_counter() - self.saved >= config.checkpoint_every:
                self._save()

    def _stop(self) -> str | None:
        state, config = self.state, self.config
        if state.epoch >= config.epochs:
            return "epochs"
        if config.time_limit is not None and state.seconds >= config.time_limit:
            return "time"
        if config.patience is not None and state.position == 0 and state.epoch - state.best_epoch >= config.patience:
            return "patience"
        return None

    def _step(self, index: Tensor, bar: Any) -> None:
        state, config = self.state, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.task.loss(self.model, self.data, index, self.noise_rng)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf)
        value, size = float(loss.detach()), float(norm)
        if not (math.isfinite(value) and math.isfinite(size)):
            raise Diverged(self._diverged("loss" if not math.isfinite(value) else "gradient"))
        self.optimizer.step()
        if config.ema:
            # a new average is short of examples: let it forget faster at first
            decay = min(config.ema, (1 + state.step) / (10 + state.step))
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        state.step += 1
        state.loss_sum += value * len(index)
        if not bar.disable:
            task, data = self.task, self.data
            shown = {"train": task.say_loss(data, state.loss_sum / (state.position + len(index)))}
            if state.valid is not None and state.best_valid is not None:
                shown |= {"valid": task.say(data, state.valid), "best": task.say(data, state.best_valid)}
            bar.set_postfix(shown, refresh=False)
        bar.update(1)

    def _lr(self) -> float:
        step, config = self.state.step, self.config
        if step < config.warmup:
            return config.lr * (step + 1) / config.warmup
        if config.schedule == "constant":
            return config.lr
        done = step / (config.epochs * self.steps_per_epoch)
        if config.time_limit is not None:
            done = max(done, self.state.seconds / config.time_limit)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _diverged(self, what: str) -> str:
        state = self.state
        kept = f"; the last good checkpoint is {self.out / CHECKPOINT}" if self.out else ""
        return (
            f"the {what} is NaN or infinite at step {state.step + 1} (epoch {state.epoch + 1}, lr {self._lr():.2g});"
            f" a lower lr or clip may help{kept}"
        )

    @torch.no_grad()
    def _initialise(self) -> None:
        self.model.train()
        chosen = torch.randperm(self.examples, generator=self.order_rng)[: self.config.init_examples]
        self.task.initialise(self.model, self.data, chosen.to(self.device), self.noise_rng)
        if self.config.ema:
            self.average = [p.detach().clone() for p in self.parameters]

    def _validate(self, bar: Any) -> None:
        state = self.state
        with self._averaged():
            state.valid = self.task.score(self.model, self.data)
            if not math.isfinite(state.valid):
                raise Diverged(self._diverged("validation score"))
            if state.best_valid is None or state.valid > state.best_valid:
                state.best_valid, state.best_epoch = state.valid, state.epoch
                self.best, self.best_written = _tensors(self.model), False
        state.seconds = self.before + time.perf_counter() - self.began
        if self.out is not None:
            train = state.loss_sum / max(1, min(state.position, self.examples))
            line: dict[str, Any] = {
                "step": state.step,
                "epoch": state.epoch,
                "seconds": round(state.seconds, 4),
                "lr": self._lr(),
            }
            line |= self.task.entries(self.data, train, state.valid)
            with open(self.out / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the model for as long as the context lasts."""
        if not self.average:
            yield
            return
        live = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, live)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM only note themselves: half a step must not be saved. A second one ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(signum: int, frame: Any) -> None:
            if self.signum is not None:
                raise KeyboardInterrupt
            self.signum = signum

        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _interrupt(self) -> None:
        signum, place = self.signum, ""
        if self.out is not None:
            self._save()
            place = f", saved in {self.out}; --resume continues"
        raise Interrupted(f"interrupted at step {self.state.step} (epoch {self.state.epoch + 1}){place}", signum or 2)

    # ---- files

    def _claim(self, out: Path, resume: bool, describe: dict[str, Any]) -> None:
        held = (out / CHECKPOINT).exists() or (out / CONFIG).exists()
        if held and not resume:
            raise RunError(f"{out}: holds a run already; resume it, or choose another folder")
        try:
            out.mkdir(parents=True, exist_ok=True)
            facts = self.data.facts()
            if resume and (out / CONFIG).exists():
                describe = {**read_config(out), **describe}
            write_json(
                out / CONFIG, {**describe, "data": {**describe.get("data", {}), **facts}, "train": asdict(self.config)}
            )
        except OSError as error:
            raise RunError(f"{out}: cannot be written ({error.strerror or error})") from None

    def _save(self) -> None:
        assert self.out is not None
        if not self.best_written:
            write_tensors(self.out / BEST, self.best, {"valid": repr(self.state.best_valid)})
            self.best_written = True
        tensors = {f"model.{k}": v for k, v in _tensors(self.model).items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": torch.as_tensor(v) for k, v in entry.items() if v is not None}
        tensors |= {f"average.{i}": t for i, t in enumerate(self.average)}
        tensors |= {
            "rng.order": self.order_rng.get_state(),
            "rng.noise": self.noise_rng.get_state(),
            "order": self.order,
        }
        tensors["rng.torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        write_tensors(self.out / CHECKPOINT, tensors, {"state": json.dumps(asdict(self.state))})
        self.saved = time.perf_counter()

    def _restore(self) -> None:
        assert self.out is not None
        path = self.out / CHECKPOINT
        tensors, metadata = read_tensors(path)
        try:
            self.state = _State(**json.loads(metadata["state"]))
            self.model.load_state_dict(_under("model.", tensors))
            slots: dict[int, dict[str, Tensor]] = {}
            for key, value in _under("optimizer.", tensors).items():
                index, name = key.split(".", 1)
                slots.setdefault(int(index), {})[name] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
            self.average = [tensors[f"average.{i}"].to(self.device) for i in range(len(self.average))]
            self.order = tensors["order"]
            self.order_rng.set_state(tensors["rng.order"])
            self.noise_rng.set_state(tensors["rng.noise"])
            torch.set_rng_state(tensors["rng.torch"])
            if self.device.type == "cuda" and "rng.cuda" in tensors:
                torch.cuda.set_rng_state(tensors["rng.cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0].strip()
            raise RunError(f"{path}: is no checkpoint of this model and optimiser ({reason})") from None
        if (self.out / BEST).exists():
            self.best = read_tensors(self.out / BEST)[0]
        if (self.out / METRICS).exists():  # what came after the checkpoint will be done again
            lines = read_metrics(self.out)
            text = "".join(json.dumps(m) + "\n" for m in lines if m["step"] <= self.state.step)
            _replace(self.out / METRICS, text.encode())


def _optimizer(config: TrainConfig, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(
            parameters, lr=config.lr, alpha=0.95, momentum=0.9, weight_decay=config.weight_decay, foreach=True
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().clone().contiguous() for k, v in model.state_dict().items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside ``path`` and rename it there."""
    _replace(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors beside ``path``, flush to disk, and rename there."""
    # as bytes: save_file makes files that only their owner can read
    _replace(path, save({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; :class:`RunError` where it is none."""
    try:
        with safe_open(path, "pt") as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: cannot be read ({error}), expected safetensors") from None


def read_config(out: Path) -> dict[str, Any]:
    """A run's ``config.json``; :class:`RunError` where the folder holds no run."""
    path = out / CONFIG
    if not path.is_file():
        raise RunError(f"{out}: no {CONFIG}, expected the folder of a run")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}), expected JSON") from None
    if not isinstance(config, dict):
        raise RunError(f"{path}: holds a {type(config).__name__}, expected an object")
    return config


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a last line cut short by a kill is left out."""
    lines = (Path(out) / METRICS).read_text(encoding="utf-8").split("\n")
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def with_changes(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with every change that is not None."""
    return replace(config, **{k: v for k, v in changes.items() if v is not None})
