"""Online detection: what :func:`pyflowgen.train.fit` asks of it, its scores on test streams, and live streams.

A live stream is read frame by frame from a file, a file that grows, or standard input. Its state is kept in a
safetensors file, from which a restart goes on bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pyflowgen import metrics
from pyflowgen.data import DataError
from pyflowgen.data.streams import Stream, Streams, frame_count, normalisation
from pyflowgen.models import TRN, Detector
from pyflowgen.models.detector import State
from pyflowgen.train import RunError, read_tensors, write_tensors


# ------------------------------------------------------------------------------------------------------ training
class Detection:
    """The task of a :class:`Detector`: its loss on random clips, and the per-frame mAP on whole validation streams.

    An epoch has as many clips as cover the training streams; each lies anywhere within its stretch and the next one.
    """

    def __init__(self) -> None:
        self._of: tuple[int, int] | None = None

    def check(self, model: nn.Module, data: Streams) -> None:
        if not isinstance(model, Detector):
            raise TypeError(f"fit: model is a {type(model).__name__}, expected a Detector")
        if (model.features, model.classes) != (data.features, len(data.classes)):
            raise ValueError(
                f"fit: the model has {model.features} features and {model.classes} classes, expected "
                f"{data.features} and {len(data.classes)} as in {data.name}"
            )
        if not any(bool((s.targets[:, 1:] > 0).any()) for s in data.valid):
            raise DataError(f"{data.name}: no action in the validation streams, expected some to judge by")

    def device(self, data: Streams) -> torch.device:
        return data.train[0].features.device

    def count(self, model: nn.Module, data: Streams) -> int:
        return frame_count(data.train, _detector(model).window)

    def initialise(self, model: nn.Module, data: Streams, index: Tensor, generator: torch.Generator) -> None:
        """Frames are standardised by the training streams."""
        mean, scale = normalisation(data.train)
        _detector(model).standardise(mean, scale)

    def loss(self, model: nn.Module, data: Streams, index: Tensor, generator: torch.Generator) -> Tensor:
        model = _detector(model)
        if self._of != (id(data), model.window):
            self._lay_out(data, model.window)
        window = model.window
        length, before = self.lengths[index], self.before[index]
        shift = torch.randint(window, index.shape, generator=generator, device=index.device)
        start = torch.minimum(self.starts[index] + shift, length - window)  # negative in a stream shorter than a clip
        at = start[:, None] + torch.arange(window + model.lookahead, device=index.device)
        rows = before[:, None] + torch.minimum(at.clamp(min=0), length[:, None] - 1)
        targets = self.targets[rows] * (at >= 0)[..., None]  # what fills a clip up in front is left out
        return model.loss(self.features[rows[:, :window]], targets)

    def _lay_out(self, data: Streams, window: int) -> None:
        self.features = torch.cat([s.features for s in data.train])
        self.targets = torch.cat([s.targets for s in data.train])
        starts, lengths, before, total = [], [], [], 0
        for stream in data.train:
            count = len(stream.features)
            clips = math.ceil(count / window)
            starts += [i * window for i in range(clips)]
            lengths += [count] * clips
            before += [total] * clips
            total += count
        device = self.device(data)
        self.starts, self.lengths, self.before = (torch.tensor(v, device=device) for v in (starts, lengths, before))
        self._of = id(data), window

    def score(self, model: nn.Module, data: Streams) -> float:
        model = _detector(model)
        scores = torch.cat(stream_scores(model, data.valid))
        return metrics.frame_precision(scores, torch.cat([s.targets for s in data.valid]), ignore=data.ignored).mean

    def entries(self, data: Streams, loss: float, score: float) -> dict[str, float | None]:
        return {"train_loss": loss, "valid_map": score}

    def say(self, data: Streams, score: float) -> str:
        return f"mAP {score:.4f}"

    def say_loss(self, data: Streams, loss: float) -> str:
        return f"loss {loss:.4f}"

    def test(self, model: nn.Module, data: Streams) -> str:
        found = evaluate(_detector(model), data, data.test)
        return f"mAP {found['map']:.4f} (chance {found['chance']:.4f}), mcAP {found['mcap']:.4f}"


def _detector(model: nn.Module) -> Detector:
    assert isinstance(model, Detector)
    return model


Run = Callable[[Tensor, "State | None"], tuple[Tensor, State]]


@torch.no_grad()
def stream_scores(
    model: Detector, streams: Sequence[Stream], *, batch: int = 32, frames: int = 256, run: Run | None = None
) -> list[Tensor]:
    """Probabilities ``(frames, classes)`` of each stream, run from its first frame to its last with the state carried.

    Streams share batches; the memory taken is that of ``batch`` streams over ``frames`` frames. ``run`` takes the place
    of ``model.run``.
    """
    run = run or model.run
    was_training = model.training
    model.eval()
    found: dict[int, Tensor] = {}
    order = sorted(range(len(streams)), key=lambda i: -len(streams[i].features))
    try:
        for first in range(0, len(order), batch):
            chosen = order[first : first + batch]
            parts: list[list[Tensor]] = [[] for _ in chosen]
            state: State | None = None
            for begin in range(0, len(streams[chosen[0]].features), frames):
                # a stream that has ended rides on as zeros: what follows a frame has no say in its scores
                pieces = [streams[i].features[begin : begin + frames] for i in chosen]
                clip = nn.utils.rnn.pad_sequence(pieces, batch_first=True)
                scores, state = run(clip, state)
                for part, piece, score in zip(parts, pieces, model.probabilities(scores), strict=True):
                    part.append(score[: len(piece)])
            found |= {i: torch.cat(part) for i, part in zip(chosen, parts, strict=True)}
    finally:
        model.train(was_training)
    return [found[i] for i in range(len(streams))]


def by_steps(model: Detector) -> Run:
    """:meth:`Detector.run` frame by frame, as a live stream does it: on the weights that ``model.pack`` chose."""

    def run(clip: Tensor, state: State | None) -> tuple[Tensor, State]:
        scores = []
        state = state or model.init_state(len(clip))
        for frame in clip.unbind(1):
            score, state = model.step(frame, state)
            scores.append(score)
        return torch.stack(scores, 1), state

    return run


OFFSETS = (1.0, 2.0, 3.0, 5.0, 10.0)


def evaluate(
    model: Detector, data: Streams, streams: Sequence[Stream], pack: torch.dtype | None = None
) -> dict[str, Any]:
    """Every measure of :mod:`pyflowgen.metrics` on whole streams.

    With ``pack`` they are those of a live stream on bfloat16 or int8 weights, and ``pack`` says what these cost.

    Keys: ``map``, ``mcap``, ``chance`` (mAP of scores that know nothing: the mean share of the classes' frames),
    ``per_class``, ``point_map`` by offset (seconds, frames where the rate is not known), ``time_to_detection`` (mean
    over classes, at a false-positive rate of 0.1), ``accuracy_at`` (share of an action seen), ``frames``, ``streams``;
    of a TRN ``ahead_map`` by how far ahead its decoder looks (seconds or frames), unless packed; with ``pack``
    ``map_unpacked``, ``largest_difference`` of a probability, and ``same_class``, the share of frames.
    """
    scores = stream_scores(model, streams)
    targets, flat, unpacked = torch.cat([s.targets for s in streams]), torch.cat(scores), None
    if pack is not None:
        unpacked = flat
        model.pack(pack)
        try:
            scores = stream_scores(model, streams, run=by_steps(model))
        finally:
            model.pack(None)
        flat = torch.cat(scores)
    labels, ignore = [s.labels for s in streams], data.ignored
    precision = metrics.frame_precision(flat, targets, ignore=ignore)
    kept = targets[(targets > 0).any(1)]
    rate = data.rate or 1.0
    truth = [p for i, label in enumerate(labels) for p in metrics.starts(label, i, rate=rate)]
    made = [p for i, s in enumerate(scores) for p in metrics.detected_starts(s, i, rate=rate, ignore=ignore)]
    found: dict[str, Any] = {
        "streams": len(streams),
        "frames": len(flat),
        "map": precision.mean,
        "mcap": metrics.frame_precision(flat, targets, ignore=ignore, calibrated=True).mean,
        "chance": sum(float((kept[:, c] > 0).float().mean()) for c in precision.per_class)
        / max(1, len(precision.per_class)),
        "per_class": {data.classes[c]: v for c, v in precision.per_class.items()},
        "point_map": {o: metrics.point_precision(made, truth, offset=o).mean for o in OFFSETS},
    }
    with contextlib.suppress(ValueError):  # too few instances for the measures of whole actions
        curves = [metrics.amoc([s[:, c] for s in scores], labels, c) for c in precision.per_class]
        found["time_to_detection"] = sum(c.at(0.1) for c in curves) / len(curves)
        found["accuracy_at"] = metrics.observed_accuracy(scores, labels, ignore=ignore)
    if unpacked is not None:
        found["map_unpacked"] = metrics.frame_precision(unpacked, targets, ignore=ignore).mean
        found["largest_difference"] = float((flat - unpacked).abs().max())
        found["same_class"] = float((flat.argmax(1) == unpacked.argmax(1)).float().mean())
    elif isinstance(model, TRN):
        found["ahead_map"] = _ahead(model, data, streams)
    return found


def _ahead(model: TRN, data: Streams, streams: Sequence[Stream]) -> dict[float, float]:
    """mAP of each decoder step, over the frames that it looks ahead to."""
    scores = stream_scores(model, streams, run=model.run_ahead)
    found = {}
    for i in range(model.trn.steps):
        later = i + model.offset
        parts = [(s[: len(s) - later, i], stream.targets[later:]) for s, stream in zip(scores, streams, strict=True)]
        flat, targets = (torch.cat(p) for p in zip(*parts, strict=True))
        found[later / (data.rate or 1.0)] = metrics.frame_precision(flat, targets, ignore=data.ignored).mean
    return found


def timeline(
    path: Path, streams: Sequence[Stream], scores: Sequence[Tensor], classes: Sequence[str], rate: float | None = None
) -> None:
    """A picture of streams: above, what is true, as a band of colours; below, the probability of each action.

    Raises :class:`RunError` where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RunError(f"{path}: drawing it needs the package matplotlib (pip install 'pyflowgen[bench]')") from None
    figure = Figure(figsize=(11, 0.6 + 1.7 * len(streams)), layout="constrained")
    axes = figure.subplots(len(streams), 1, squeeze=False)[:, 0]
    shown = [c for c in range(1, len(classes)) if any(bool((s.targets[:, c] > 0).any()) for s in streams)]
    for axis, stream, score in zip(axes, streams, scores, strict=True):
        times = np.arange(len(score)) / (rate or 1.0)
        for i, c in enumerate(shown):
            axis.plot(times, score[:, c].cpu(), color=f"C{i % 10}", lw=1.1, label=classes[c])
            axis.fill_between(
                times, 1.04, 1.18, where=(stream.targets[:, c] > 0).cpu().numpy(), color=f"C{i % 10}", lw=0
            )
        axis.set(ylim=(0, 1.2), yticks=(0, 0.5, 1), xlim=(0, times[-1] if len(times) else 1), ylabel=stream.name)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=len(shown), loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, title="band: truth")
    axes[-1].set_xlabel("seconds" if rate else "frames")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


# --------------------------------------------------------------------------------------------------- live streams
class Frame(NamedTuple):
    """One frame of a live stream: its values, or what is wrong with it. ``offset`` is the byte after it."""

    number: int
    values: Tensor | None
    wrong: str
    offset: int


FORMATS = ("csv", "jsonl", "npy")


class Reader:
    """Frames of a stream as they come: lines of comma-separated numbers, JSON arrays, or a ``.npy`` array.

    Args:
        stream: a binary file, or a pipe.
        features: numbers a frame must have.
        form: one of :data:`FORMATS`; None to tell by the first bytes.
        follow: at the end of the file wait for more, until :attr:`idle` seconds passed without any.
        idle: None to wait forever.
        offset, number: where to go on in a file, and how many frames came before.

    A line of CSV that has no number at all before the first frame is a header. A bad line is a :class:`Frame` that says
    what is wrong with it; reading goes on behind it. Raises :class:`DataError` for a stream that is no such thing.

    >>> import io
    >>> [f.wrong or f.values.tolist() for f in Reader(io.BytesIO(b"1,2\\n3,x\\n4,5\\n"), 2)]
    [[1.0, 2.0], "'x' is no number", [4.0, 5.0]]
    """

    def __init__(
        self,
        stream: BinaryIO,
        features: int,
        form: str | None = None,
        *,
        follow: bool = False,
        idle: float | None = None,
        offset: int = 0,
        number: int = 0,
        name: str = "stream",
    ) -> None:
        self.stream, self.features, self.form, self.name = stream, features, form, name
        self.follow, self.idle, self.offset, self.number = follow, idle, offset, number
        self._pending = b""

    def __iter__(self) -> Iterator[Frame]:
        if self.form is None or self.form == "npy":
            start = self._exactly(6, first=True)
            if self.form is None:
                self.form = "npy" if start == b"\x93NUMPY" else "jsonl" if start.lstrip()[:1] in (b"[", b"{") else "csv"
            if self.form != "npy":
                self._pending = start
            elif start[:6] != b"\x93NUMPY" and start:
                raise DataError(f"{self.name}: starts with {start!r}, expected a .npy array")
            else:
                yield from self._array()
                return
        if self.offset:
            self.stream.seek(self.offset)
            self._pending = b""
        yield from self._lines()

    def _lines(self) -> Iterator[Frame]:
        read = self._csv if self.form == "csv" else self._json
        rest, self._pending = self._pending, b""
        before, waited = self.offset, self.number == 0
        while True:
            line = rest + self.stream.readline()
            rest = b""
            # the first bytes, read to tell the format, may hold several lines
            head, newline, tail = line.partition(b"\n")
            if tail:
                line, rest = head + newline, tail
            if not newline:
                more = self._wait() if self.follow else None
                if more is not None:
                    rest = line + more
                    continue
                if self.follow or not line.strip():  # a line half written is left for the next time
                    return
            before += len(line)
            text = line.decode("utf-8", "replace").strip()
            if not text or (waited and self.form == "csv" and _is_header(text)):
                continue
            waited = False
            values, wrong = read(text)
            yield self._frame(values, wrong, before)

    def _wait(self) -> bytes | None:
        """The bytes that come next, or None when none come."""
        end = None if self.idle is None else time.monotonic() + self.idle
        while end is None or time.monotonic() < end:
            more = self.stream.read(1)
            if more:
                return more
            if self.stream.seekable() and os.fstat(self.stream.fileno()).st_size < self.stream.tell():
                raise DataError(f"{self.name}: became shorter while it was followed")
            time.sleep(0.02)
        return None

    def _exactly(self, count: int, first: bool = False) -> bytes:
        """``count`` bytes, or fewer at the end; of the very ``first`` only as many as tell the format."""
        parts = b""
        while len(parts) < count:
            more = self.stream.read(1 if first else count - len(parts))
            if not more and self.follow:
                more = self._wait() or b""
            if not more:
                break
            parts += more
            if first and not b"\x93NUMPY".startswith(parts) and parts.strip():
                break
        return parts

    def _array(self) -> Iterator[Frame]:
        version = self._exactly(2)
        size = self._exactly(2 if version[:1] == b"\1" else 4)
        header = self._exactly(int.from_bytes(size, "little"))
        try:
            whole = io.BytesIO(b"\x93NUMPY" + version + size + header)
            np.lib.format.read_magic(whole)
            reader = (
                np.lib.format.read_array_header_1_0 if version[:1] == b"\1" else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = reader(whole)
        except ValueError as error:
            raise DataError(f"{self.name}: the header of the .npy array is damaged ({error})") from None
        if dtype.kind not in "fiub" or len(shape) < 2 or (fortran and min(shape) > 1):
            raise DataError(f"{self.name}: {dtype} of shape {shape}, expected numbers, (frames, features) in C order")
        width, begin = math.prod(shape[1:]), 8 + len(size) + len(header)
        if width != self.features:
            raise DataError(f"{self.name}: {width} features a frame, expected {self.features}")
        row = width * dtype.itemsize
        if self.offset:
            self.stream.seek(self.offset)
        before = self.offset or begin
        while self.follow or before < begin + shape[0] * row:
            raw = self._exactly(row)
            if len(raw) < row:
                return
            before += row
            yield self._frame(torch.from_numpy(np.frombuffer(raw, dtype).astype(np.float32)), "", before)

    def _frame(self, values: Tensor | None, wrong: str, offset: int) -> Frame:
        number, self.number = self.number, self.number + 1
        if values is not None and values.shape != (self.features,):
            wrong = f"{values.numel()} values, expected {self.features}"
        elif values is not None and not bool(values.isfinite().all()):
            at = int((~values.isfinite()).nonzero()[0])
            wrong = f"value {at + 1} is {float(values[at])}, expected a finite number"
        return Frame(number, None if wrong else values, wrong, offset)

    def _csv(self, text: str) -> tuple[Tensor | None, str]:
        found = []
        for cell in text.replace(";", ",").split(",") if any(c in text for c in ",;") else text.split():
            try:
                found.append(float(cell))
            except ValueError:
                return None, f"{cell.strip()[:40]!r} is no number"
        return torch.tensor(found), ""

    def _json(self, text: str) -> tuple[Tensor | None, str]:
        try:
            value = json.loads(text)
        except ValueError as error:
            return None, f"{text[:40]!r} is no JSON ({error})"
        if isinstance(value, dict):
            value = value.get("frame", value.get("features"))
        if not isinstance(value, list) or not all(isinstance(v, (int, float)) for v in value):
            return None, f"{text[:40]!r} is no array of numbers, nor an object with one called frame"
        return torch.tensor(value, dtype=torch.float32), ""


def _is_header(text: str) -> bool:
    def number(cell: str) -> bool:
        try:
            float(cell)
        except ValueError:
            return False
        return True

    return not any(number(cell) for cell in text.replace(";", ",").replace(",", " ").split())


class Latency:
    """Percentiles of any number of times in constant memory: counts in bins that are 3 % wide.

    >>> latency = Latency()
    >>> for ms in range(1, 101):
    ...     latency.add(ms / 1000)
    >>> 0.049 < latency.percentile(50) < 0.052, latency.count, latency.largest
    (True, 100, 0.1)
    """

    def __init__(self) -> None:
        self.bins, self.count, self.largest = np.zeros(1024, np.int64), 0, 0.0

    def add(self, seconds: float) -> None:
        """Count one time."""
        self.bins[min(1023, max(0, int(24 * math.log2(max(seconds, 1e-8) / 1e-8))))] += 1
        self.count, self.largest = self.count + 1, max(self.largest, seconds)

    def percentile(self, q: float) -> float:
        """The time, in seconds, that q % of them stay below; NaN without any."""
        if not self.count:
            return math.nan
        i = int(np.searchsorted(self.bins.cumsum(), math.ceil(self.count * q / 100)))
        return min(self.largest, 1e-8 * 2 ** ((i + 0.5) / 24))


class Interruption:
    """Ctrl-C and SIGTERM end a wait for input at once, and work on a frame after that frame."""

    def __init__(self) -> None:
        self.signum = 0
        self.waiting = False

    def __enter__(self) -> Interruption:
        self.before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum: int, frame: Any) -> None:
        if self.signum:  # a second one ends everything
            raise KeyboardInterrupt
        self.signum = signum
        if self.waiting:
            raise EndOfWait

    def __exit__(self, *error: Any) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


class EndOfWait(Exception):
    """Raised by a signal inside a wait for input."""


class Session(NamedTuple):
    """What :func:`detect` did."""

    frames: int  # scored
    bad: int  # skipped
    seconds: float
    latency: Latency
    signum: int  # of the signal that ended it, or 0


def fingerprint(model: Detector) -> str:
    """SHA-256 of a model's weights: a state goes with the weights that made it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_state(path: Path, model: Detector) -> tuple[State, int, int]:
    """State, number of frames read and byte offset of a stream; :class:`RunError` where other weights made it."""
    tensors, about = read_tensors(path)
    expected = model.init_state(1)
    if about.get("weights") != fingerprint(model):
        raise RunError(f"{path}: is the state of a stream under other weights; delete it to begin anew")
    if tensors.keys() != expected.keys() or any(tensors[k].shape != expected[k].shape for k in expected):
        raise RunError(f"{path}: holds {', '.join(tensors)}, expected the state of one stream of this model")
    try:
        frames, offset = int(about["frames"]), int(about["offset"])
    except (KeyError, ValueError):
        raise RunError(
            f"{path}: does not say how many frames and bytes it comes after; delete it to begin anew"
        ) from None
    return {k: v.to(expected[k]) for k, v in tensors.items()}, frames, offset


def detect(
    model: Detector,
    reader: Reader,
    show: Callable[[int, Tensor], None],
    complain: Callable[[int, str], None],
    *,
    state: State | None = None,
    state_file: Path | None = None,
    save_every: float = 5.0,
) -> Session:
    """Score a live stream: ``show(number, probabilities)`` for each frame, ``complain(number, what)`` for a bad one.

    A bad frame is skipped, the state stays as it was. With ``state_file`` the state is written every ``save_every``
    seconds and at the end, also when Ctrl-C or SIGTERM is the end. Memory does not grow with the stream.
    """
    model.eval()
    now: State = state or model.init_state(1)
    latency, scored, bad = Latency(), 0, 0
    number, offset = reader.number, reader.offset
    weights = "" if state_file is None else fingerprint(model)
    saved = began = time.perf_counter()

    def save() -> None:
        if state_file is not None:
            about = {"weights": weights, "frames": str(number), "offset": str(offset)}
            write_tensors(state_file, now, about)

    with torch.inference_mode(), Interruption() as interruption:
        frames = iter(reader)
        while not interruption.signum:
            try:
                interruption.waiting = True
                frame = next(frames, None)
                interruption.waiting = False
            except EndOfWait:
                break
            if frame is None:
                break
            came = time.perf_counter()
            if frame.values is None:
                bad += 1
                complain(frame.number, frame.wrong)
            else:
                scores, now = model.step(frame.values[None].to(model.mean.device), now)
                show(frame.number, model.probabilities(scores)[0])
                latency.add(time.perf_counter() - came)
                scored += 1
            number, offset = frame.number + 1, frame.offset
            if time.perf_counter() - saved >= save_every:
                save()
                saved = time.perf_counter()
        save()
    return Session(scored, bad, time.perf_counter() - began, latency, interruption.signum)
