"""Labelled streams: the watch recordings, and a folder of videos whose every fault is one line naming the file."""

from __future__ import annotations

import json
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pyflowgen.data import DataError, load_streams, streams
from pyflowgen.data.mnist import cache_dir
from pyflowgen.data.streams import Stream, normalisation, stream_folder, toy_streams


def fails(what, *words):
    """``what()`` raises DataError of one line with all the words in it."""
    with pytest.raises(DataError) as caught:
        what()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.fixture(scope="module")
def watch():
    try:
        return load_streams("watch")
    except DataError as error:
        pytest.skip(f"THE WATCH RECORDINGS ARE MISSING: {error}")


def test_watch_streams_are_as_described(watch):
    assert (watch.features, watch.classes, watch.rate) == (12, ("background", "ABD", "FEL", "IR", "ER"), 5.0)
    assert [len(p) for p in (watch.train, watch.valid, watch.test)] == [80, 20, 40]
    for stream in (*watch.train, *watch.valid, *watch.test):
        assert stream.features.shape == (512, 12) and stream.targets.shape == (512, 5)
        assert stream.features.isfinite().all() and (stream.targets.sum(1) == 1).all()
        assert (stream.features[:, 6:] >= 0).all(), "standard deviations"
    shares = torch.cat([s.targets for s in watch.train]).mean(0)
    assert 0.45 < shares[0] < 0.55 and (shares[1:] - 0.125).abs().max() < 0.04
    again = load_streams("watch")
    assert all(torch.equal(a.features, b.features) for a, b in zip(watch.test, again.test, strict=True))
    assert not torch.equal(streams.watch(seed=1).test[0].features, watch.test[0].features)


def test_watch_people_are_kept_apart(watch):
    def frames(part):
        return {row.tobytes() for s in part for row in s.features.numpy()}

    assert not frames(watch.train) & frames(watch.test) and frames(watch.train) & frames(watch.valid)


def test_watch_frames_are_those_of_the_recordings(watch):
    raw = np.load(cache_dir() / "watch" / "watch_dataset.npy", allow_pickle=True).item()
    first = raw["X"][0]
    _, label, frames = streams._recordings()[0]
    assert np.allclose(frames[3, :6], first[30:40].mean(0), atol=1e-6)
    assert np.allclose(frames[3, 6:], first[30:40].std(0), atol=1e-6)
    assert label == (0, 1, 2, 3, 4, 0, 0)[raw["y"][0]] and len(frames) == len(first) // 10


@pytest.mark.parametrize(("returncode", "stderr", "words"), [(1, "ERROR: no route\nERROR: gave up", ["gave up"]), (0, "", ["not as expected"])])  # fmt: skip
def test_watch_that_cannot_be_fetched_is_one_line(monkeypatch, tmp_path, returncode, stderr, words):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []

    def pip(command, **options):
        asked.append(command)
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(streams.subprocess, "run", pip)
    path = tmp_path / "pyflowgen" / "watch" / "watch_dataset.npy"
    fails(lambda: load_streams("watch"), "watch", path, *words)
    assert asked[0][:4] == [sys.executable, "-m", "pip", "download"] and asked[0][-1] == "seglearn==1.2.5"
    assert list(path.parent.iterdir()) == []


def test_watch_is_held_against_its_sum_before_it_is_opened(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "pyflowgen" / "watch" / "watch_dataset.npy"

    def pip(command, **options):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/x.whl", "w") as wheel:
            wheel.writestr(streams.MEMBER, b"other bytes")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(streams.subprocess, "run", pip)
    monkeypatch.setattr(streams.np, "load", lambda *a, **k: pytest.fail("an unknown pickle was opened"))
    fails(lambda: load_streams("watch"), path, "SHA-256", streams.SHA256)


# ---- what a stream is


def test_labels_of_a_frame():
    rows = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]])
    assert Stream("x", torch.zeros(5, 2), rows.float()).labels.tolist() == [0, 1, 2, 1, -1]


def test_normalisation():
    features = torch.randn(500, 3) * torch.tensor([1.0, 50.0, 0.0]) + torch.tensor([0.0, 1e4, 2.0])
    parts = [Stream("x", f, torch.zeros(len(f), 2)) for f in features.split([100, 399, 1])]
    mean, scale = normalisation(parts)
    torch.testing.assert_close(mean, features.double().mean(0).float())
    torch.testing.assert_close(scale[:2], features.double().std(0).float()[:2])
    assert scale[2] == 1


def test_toy_streams_need_the_past():
    data = toy_streams()
    assert all(torch.equal(a.features, b.features) for a, b in zip(data.train, toy_streams().train, strict=True))
    x = torch.cat([s.features for s in data.train])
    labels = torch.cat([s.labels for s in data.train])
    means = [x[labels == c].mean(0) for c in (1, 2)]
    assert (means[0] - means[1]).abs().max() < 0.3, "frames of both actions look alike"


# ---- a folder of videos

VIDEOS = [f"video_{i:02}" for i in range(12)]


def write(folder, *, classes=22, kinds=("camera", "motion"), info=None, videos=VIDEOS):
    rng = np.random.default_rng(0)
    for kind in ("target", *kinds):
        (folder / kind).mkdir(parents=True)
    for video in videos:
        frames = int(rng.integers(20, 40))
        labels = rng.integers(0, classes, frames)
        np.save(folder / "target" / f"{video}.npy", np.eye(classes)[labels])
        for i, kind in enumerate(kinds):
            np.save(folder / kind / f"{video}.npy", rng.normal(size=(frames, 3 + i)).astype(np.float32))
    if info is not None:
        (folder / "data_info.json").write_text(json.dumps(info))
    return folder


def test_thumos_layout(tmp_path):
    names = ["Background", *(f"Action{i}" for i in range(1, 21)), "Ambiguous"]
    about = {"class_index": names, "train_session_set": VIDEOS[:8], "test_session_set": VIDEOS[8:]}
    folder = write(tmp_path / "THUMOS", info={"HDD": {"class_index": []}, "THUMOS": about})
    data = load_streams(folder)
    assert data.features == 7 and data.classes == tuple(names) and data.ignored == (21,) and data.rate is None
    assert [s.name for s in data.test] == VIDEOS[8:] and [s.name for s in (*data.train, *data.valid)] == VIDEOS[:8]
    raw = np.load(folder / "target" / f"{VIDEOS[8]}.npy")
    ambiguous = raw[:, 21] == 1
    assert ambiguous.any() and (data.test[0].targets[ambiguous] == 0).all()
    assert np.array_equal(data.test[0].targets.numpy()[~ambiguous], raw[~ambiguous])
    assert (data.test[0].labels[ambiguous] == -1).all()
    joined = np.concatenate([np.load(folder / k / f"{VIDEOS[8]}.npy") for k in ("camera", "motion")], 1)
    assert np.array_equal(data.test[0].features.numpy(), joined)


def test_without_a_description(tmp_path):
    data = stream_folder(write(tmp_path / "a"))
    assert data.classes[0] == "background" and len(data.classes) == 22 and data.ignored == (21,)
    assert [len(p) for p in (data.train, data.valid, data.test)] == [9, 1, 2]
    assert stream_folder(write(tmp_path / "b", classes=5)).ignored == ()


def test_class_numbers_and_one_frame_less(tmp_path):
    folder = write(tmp_path / "x", classes=4, kinds=("features",))
    (folder / "target").rename(folder / "labels")
    path = folder / "labels" / f"{VIDEOS[0]}.npy"
    labels = np.load(path).argmax(1)
    labels[2:5] = -1
    np.save(path, labels[:-1])
    data = stream_folder(folder)
    first = data.train[0]
    assert len(first.features) == len(first.targets) == len(labels) - 1
    assert np.array_equal(first.labels.numpy(), labels[:-1])


def test_folder_faults(tmp_path):
    folder = write(tmp_path / "x")
    target, camera = folder / "target", folder / "camera"

    def broken(file, content, *words):
        before = file.read_bytes()
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            np.save(file, content)
        fails(lambda: stream_folder(folder), file.name if file.suffix == ".json" else file, *words)
        file.write_bytes(before)

    frames = len(np.load(camera / "video_03.npy"))
    good = np.load(camera / "video_03.npy")
    nan = good.copy()
    nan[7, 1] = np.nan
    broken(camera / "video_03.npy", nan, "NaN", "1 frames", "frame 7")
    broken(camera / "video_03.npy", good[:, :2], "2 features", "expected 3")
    broken(camera / "video_03.npy", good[:, 0], f"({frames},)", "(frames, features…)")
    broken(camera / "video_03.npy", b"junk", "cannot be read")
    broken(camera / "video_03.npy", np.array([{}]), "cannot be read")
    broken(target / "video_03.npy", np.full((frames, 22), 2), "frame 0", "0 and 1")
    broken(target / "video_03.npy", np.zeros((frames, 5)), "5 classes", "expected 22")
    broken(target / "video_03.npy", np.full(frames, 0.5), "class numbers")
    broken(target / "video_03.npy", np.full(frames, -2), "class -2")
    np.save(camera / "video_03.npy", good[:-2])
    fails(lambda: stream_folder(folder), "video_03", f"{frames - 2} in camera", f"{frames} in target")
    (camera / "video_03.npy").unlink()
    fails(lambda: stream_folder(folder), camera / "video_03.npy", "no such file")
    np.save(camera / "video_03.npy", good)
    info = folder / "data_info.json"
    info.write_text("{}")
    broken(info, b"{", "expected JSON")
    broken(info, b"[1]", "expected an object")
    broken(info, b'{"a": {}, "b": {}}', "a, b", "expected x")
    broken(info, b'{"class_index": ["background", "a"]}', "class_index", "22 names")
    broken(info, b'{"train_session_set": "all", "fps": 4}', "train_session_set", "list of names")
    info.write_text('{"train_session_set": ["nobody", "video_02"], "test_session_set": ["video_01"]}')
    fails(lambda: stream_folder(folder), target / "nobody.npy", "no such file")
    info.write_text('{"train_session_set": ["video_02"], "test_session_set": ["video_01"]}')
    fails(lambda: stream_folder(folder), "no video is left to train on")
    fails(lambda: load_streams(tmp_path / "nowhere"), "nowhere", "no folder", "watch")
    fails(lambda: load_streams(tmp_path), tmp_path, "target or labels")
    (tmp_path / "y" / "target").mkdir(parents=True)
    fails(lambda: load_streams(tmp_path / "y"), "no folder of features")
    (tmp_path / "y" / "labels").mkdir()
    fails(lambda: load_streams(tmp_path / "y"), "2 folders of labels")
