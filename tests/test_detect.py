"""Training detectors, and live streams: files, growing files and pipes; bad frames; a restart goes on bit for bit."""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pyflowgen import build_info
from pyflowgen.cli import main
from pyflowgen.data import DataError
from pyflowgen.data.streams import Stream, Streams, toy_streams
from pyflowgen.detect import Detection, Latency, Reader, by_steps, detect, evaluate, stream_scores
from pyflowgen.models import GRUDetector, LSTMDetector, RealNVP
from pyflowgen.recipes import load_run
from pyflowgen.train import CHECKPOINT, TrainConfig, fit, read_config, read_metrics, read_tensors, write_tensors

ROOT = Path(__file__).parents[1]
SMALL = ["--data", "toy-streams", "--set", "hidden=8", "--no-progress"]


def run(*args, **options):
    return CliRunner().invoke(main, [str(a) for a in args], **options)


def fails(*args, words=()):
    done = run(*args)
    assert done.exit_code == 2 and "Traceback" not in done.output, (done.output, done.exception)
    line = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert str(word) in line, line


# ---- the task


def test_clips_cover_the_streams_and_no_targets_but_theirs():
    """Features that say where they are; each clip is one stretch of one stream, filled up in front where it is short."""
    rng = np.random.default_rng(0)
    lengths = [37, 8, 5, 64]
    streams = tuple(
        Stream(str(i), torch.stack([torch.full((n,), i), torch.arange(n)], 1).float(), torch.eye(3)[rng.integers(0, 3, n)])
        for i, n in enumerate(lengths)
    )  # fmt: skip
    data = Streams("x", streams, streams, streams, ("background", "a", "b"))
    model, task, seen = LSTMDetector(2, 3, window=8), Detection(), {i: set() for i in range(4)}
    model.lookahead = 3

    def loss(features, targets):
        for x, y in zip(features, targets, strict=True):
            i = int(x[0, 0])
            at = x[:, 1].long()
            filled = max(0, 8 - lengths[i])
            assert (x[:, 0] == i).all() and (at[:filled] == 0).all() and (at[filled:].diff() == 1).all()
            assert len(y) == 11 and (y[:filled] == 0).all()
            later = torch.arange(int(at[-1]) + 1, int(at[-1]) + 4).clamp(max=lengths[i] - 1)
            assert torch.equal(y[filled:], streams[i].targets[torch.cat([at[filled:], later])])
            seen[i] |= set(at.tolist())
        return torch.zeros(())

    model.loss = loss
    count = task.count(model, data)
    assert count == 5 + 1 + 1 + 8
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        task.loss(model, data, torch.randperm(count), generator)
    assert [seen[i] for i in range(4)] == [set(range(n)) for n in lengths]


def test_streams_of_all_lengths_are_scored_as_alone():
    torch.manual_seed(0)
    model = LSTMDetector(6, 3, hidden=8)
    streams = [Stream(str(n), torch.randn(n, 6), torch.zeros(n, 3)) for n in (5, 40, 1, 17, 40)]
    found = stream_scores(model, streams, batch=2, frames=7)
    assert model.training
    model.eval()
    for stream, got in zip(streams, found, strict=True):
        want = model.probabilities(model(stream.features[None]))[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_training_learns_what_takes_a_past():
    data = toy_streams()
    torch.manual_seed(0)
    model = LSTMDetector(6, 3, hidden=16, window=32)
    before = evaluate(model, data, data.test)
    result = fit(model, data, TrainConfig(epochs=8, batch=8, lr=1e-2), task=Detection())
    found = evaluate(model, data, data.test)
    assert before["map"] < 0.5 and found["map"] > 0.8 and result.best_valid > 0.8 and found["mcap"] > 0.8
    assert found["accuracy_at"][1.0] > 0.8 and found["time_to_detection"] < 0.7 and found["point_map"][1.0] > 0.4
    assert set(found["per_class"]) == {"rise", "fall"} and found["frames"] == 8 * 96
    assert 0.1 < found["chance"] < 0.35


def test_wrong_models_and_data_are_named():
    data = toy_streams()
    with pytest.raises(TypeError, match="RealNVP, expected a Detector"):
        fit(RealNVP((4,)), data, task=Detection())
    with pytest.raises(ValueError, match="5 features and 3 classes, expected 6 and 3 as in toy-streams"):
        fit(LSTMDetector(5, 3), data, task=Detection())
    still = tuple(Stream(s.name, s.features, torch.eye(3)[[0] * len(s.features)]) for s in data.valid)
    with pytest.raises(DataError, match="no action in the validation streams"):
        fit(LSTMDetector(6, 3), Streams("x", data.train, still, data.test, data.classes), task=Detection())


def test_interrupted_and_resumed_is_the_same(tmp_path):
    data, config = toy_streams(), dict(batch=8, schedule="constant", lr=0.01)

    def model():
        torch.manual_seed(0)
        return GRUDetector(6, 3, embedding=8, hidden=8, window=16, dropout=0.2)

    fit(model(), data, TrainConfig(epochs=4, **config), task=Detection(), out=tmp_path / "a")
    fit(model(), data, TrainConfig(epochs=2, **config), task=Detection(), out=tmp_path / "b")
    fit(model(), data, TrainConfig(epochs=4, **config), task=Detection(), out=tmp_path / "b", resume=True)
    a, b = (read_tensors(tmp_path / x / CHECKPOINT)[0] for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [line["valid_map"] for line in read_metrics(tmp_path / "a")] == [
        line["valid_map"] for line in read_metrics(tmp_path / "b")
    ]


# ---- reading frames


def read(content, features=3, **options):
    return [(f.number, f.wrong or f.values.tolist()) for f in Reader(io.BytesIO(content), features, **options)]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"1,2,3\n4,5,6\n",
        b"x,y,z\n1,2,3\n\n4,5,6",
        b"1 2 3\r\n4\t5  6\r\n",
        b"1;2;3\n4;5;6\n",
        b"[1, 2, 3]\n[4, 5, 6]\n",
        b'{"frame": [1, 2, 3], "time": 0}\n{"features": [4, 5, 6]}\n',
        b"\n\n  1,2,3\n4,5,6\n",
        npy(np.array([[1, 2, 3], [4, 5, 6]])),
        npy(np.array([[1, 2, 3], [4, 5, 6]], np.float16)),
        npy(np.array([[1, 2, 3], [4, 5, 6]], ">f4").reshape(2, 3, 1)),
    ],
)
def test_formats_are_told_apart(content):
    assert read(content) == [(0, [1, 2, 3]), (1, [4, 5, 6])]


def test_bad_frames_are_named_and_passed_over():
    assert read(b"1,2,3\n1,2\n1,two,3\nnan,1,2\n1,2,1e99\n\xff\xfe,1,2\n4,5,6\n") == [
        (0, [1, 2, 3]),
        (1, "2 values, expected 3"),
        (2, "'two' is no number"),
        (3, "value 1 is nan, expected a finite number"),
        (4, "value 3 is inf, expected a finite number"),
        (5, "'\ufffd\ufffd' is no number"),
        (6, [4, 5, 6]),
    ]
    bad = read(b'[1,2,3]\n[1,2\n{"x": 1}\n[1,2,"3"]\n[1,2,NaN]\n[4,5,6]\n')
    assert [n for n, _ in bad] == list(range(6)) and bad[-1] == (5, [4, 5, 6])
    for (_, said), word in zip(bad[1:5], ("no JSON", "no array", "no array", "value 3 is nan"), strict=True):
        assert word in said
    array = np.ones((4, 3))
    array[2, 1] = np.inf
    assert [w for _, w in read(npy(array))][2] == "value 2 is inf, expected a finite number"
    assert read(b"") == [] and read(npy(np.ones((0, 3)))) == []
    assert read(npy(np.ones((3, 3)))[:-5]) == [(0, [1, 1, 1]), (1, [1, 1, 1])], "a last row cut short is no frame"


def test_streams_that_are_none_are_refused():
    for content, options, message in (
        (npy(np.ones((3, 4))), {}, "4 features a frame, expected 3"),
        (npy(np.ones(3)), {}, r"shape \(3,\)"),
        (npy(np.asfortranarray(np.ones((3, 3)))), {}, "C order"),
        (npy(np.array([["a", "b", "c"]])), {}, "<U1"),
        (npy(np.ones((3, 3)))[:40], {}, "damaged"),
        (b"1,2,3\n", {"form": "npy"}, r"expected a \.npy array"),
    ):
        with pytest.raises(DataError, match=message):
            read(content, **options)


def test_following_waits_for_lines_to_be_whole(tmp_path):
    path, pieces = tmp_path / "s.csv", [b"1,2", b",3\n4,5,6\n7", b",8,9", b"\n10,11"]
    path.write_bytes(b"")

    def write():
        for piece in pieces:
            time.sleep(0.15)
            with open(path, "ab") as file:
                file.write(piece)

    writer = threading.Thread(target=write)
    writer.start()
    with open(path, "rb") as file:
        frames = list(Reader(file, 3, "csv", follow=True, idle=0.6))
    writer.join()
    assert [f.values.tolist() for f in frames] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]], "and half a line is none"
    with open(path, "ab") as file:
        file.write(b",12\n")
    with open(path, "rb") as file:
        (rest,) = Reader(file, 3, offset=frames[-1].offset, number=3)
    assert (rest.number, rest.values.tolist()) == (3, [10, 11, 12])


def test_a_followed_file_that_shrinks_is_an_error(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes(b"1,2,3\n4,5,6\n")
    with open(path, "rb") as file:
        frames = iter(Reader(file, 3, follow=True, idle=5))
        next(frames), next(frames)
        path.write_bytes(b"1,2,3\n")
        with pytest.raises(DataError, match="became shorter"):
            next(frames)


def test_latency_percentiles():
    latency, rng = Latency(), np.random.default_rng(0)
    times = rng.lognormal(-8, 1, 20_000)
    for t in times:
        latency.add(t)
    for q in (1, 50, 90, 99):
        assert latency.percentile(q) == pytest.approx(np.percentile(times, q), rel=0.03)
    assert latency.largest == times.max() and np.isnan(Latency().percentile(50))


# ---- live


@pytest.mark.parametrize("leak", [False, True])
def test_an_hour_takes_no_more_memory_than_half_of_it(leak, monkeypatch):
    """18,000 frames, an hour at 5 a second. What a frame leaves behind is in every sixth of them; what the interpreter
    and the allocator take for themselves, now and then, is not: the sixth that grows least tells."""
    model, sizes, frames = LSTMDetector(3, 3, hidden=4), [], 18_000
    if leak:
        held, step = [], model.step
        monkeypatch.setattr(model, "step", lambda x, state: held.append(step(x, state)) or held[-1])

    class Endless(io.RawIOBase):
        left = frames

        def readable(self):
            return True

        def readinto(self, buffer):
            if not self.left:
                return 0
            self.left -= 1
            buffer[:6] = b"1,2,3\n"
            return 6

    def show(number, scores):
        if (number + 1) % (frames // 6) == 0:
            gc.collect()
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            sizes.append((len(gc.get_objects()), resident))

    session = detect(model, Reader(io.BufferedReader(Endless()), 3), show, pytest.fail)
    assert session.frames == frames and session.bad == 0
    objects, resident = (min(b - a for a, b in itertools.pairwise(column)) for column in zip(*sizes, strict=True))
    if leak:  # one state a frame; their memory may come from what the process had before
        assert objects > 3000, sizes
    else:
        assert objects < 300 and resident < 2**18, sizes


@pytest.fixture(scope="module", params=["lstm", "gru", "trn", "idn"])
def trained(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("detect") / request.param
    done = run("train", request.param, *SMALL, "--out", out, "--epochs", 1)
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"{request.param} on toy-streams: 1 epochs" in done.stdout and "test mAP 0." in done.stdout
    return out


def csv_of(stream, path, header=True):
    lines = [",".join(map(repr, row)) for row in stream.features.double().tolist()]
    path.write_text("\n".join(["a,b,c,d,e,f"] * header + lines) + "\n")
    return path


def scores_of(text):
    header, *rows = (line.split(",") for line in text.strip().splitlines())
    assert header == ["frame", "class", "background", "rise", "fall"]
    return {int(r[0]): [float(v) for v in r[2:]] for r in rows}


def test_train_leaves_a_run_with_a_timeline(trained):
    config = read_config(trained)
    assert config["data"]["classes"] == ["background", "rise", "fall"] and config["data"]["sizes"] == [24, 8, 8]
    assert read_metrics(trained)[0].keys() >= {"train_loss", "valid_map"}
    assert (trained / "timeline.png").read_bytes()[:4] == b"\x89PNG"


def test_detect_scores_a_file_as_the_clip(trained, tmp_path):
    stream = toy_streams().test[0]
    done = run("detect", trained, csv_of(stream, tmp_path / "s.csv"))
    assert done.exit_code == 0, (done.output, done.exception)
    model = load_run(trained).model
    with torch.no_grad():
        want = model.probabilities(model(stream.features[None]))[0]
    got = scores_of(done.stdout)
    assert list(got) == list(range(96))
    torch.testing.assert_close(torch.tensor(list(got.values())), want, rtol=1e-5, atol=1e-6)
    assert (
        "96 frames in" in done.stderr
        and "0 bad" in done.stderr
        and "ms (p50)" in done.stderr
        and "(p99)" in done.stderr
    )
    np.save(tmp_path / "s.npy", stream.features.numpy())
    again = run("detect", trained, tmp_path / "s.npy", "--json")
    lines = [json.loads(line) for line in again.stdout.strip().splitlines()]
    assert [list(line["scores"].values()) for line in lines] == list(got.values())
    assert lines[0].keys() == {"frame", "class", "scores"}


def test_detect_goes_on_bit_for_bit(trained, tmp_path):
    stream = toy_streams().test[0]
    whole = csv_of(stream, tmp_path / "s.csv")
    want = scores_of(run("detect", trained, whole).stdout)
    lines = whole.read_text().splitlines(keepends=True)
    part, state = tmp_path / "part.csv", tmp_path / "state.safetensors"
    got = {}
    for end in (11, 12, 60, 97):
        part.write_text("".join(lines[:end]))  # the file grows between the sessions
        done = run("detect", trained, part, "--state", state)
        assert done.exit_code == 0, done.output
        new = scores_of(done.stdout)
        assert not got.keys() & new.keys()
        got |= new
    assert got == want, "the same bits"
    # through a pipe there is no going back in the file: what comes is what follows
    state.unlink()
    first = run("detect", trained, "-", "--state", state, input="".join(lines[:50]))
    second = run("detect", trained, "-", "--state", state, input="".join(lines[50:]))
    assert scores_of(first.stdout) | scores_of(second.stdout) == want
    fails("detect", trained, tmp_path / "nowhere.csv", words=["nowhere.csv"])


def test_detect_on_short_weights(trained, tmp_path):
    path = csv_of(toy_streams().test[0], tmp_path / "s.csv")
    want = scores_of(run("detect", trained, path).stdout)
    for storage in ("bf16", "int8"):
        got = scores_of(run("detect", trained, path, "--pack", storage).stdout)
        apart = max(abs(a - b) for t in want for a, b in zip(want[t], got[t], strict=True))
        assert got.keys() == want.keys() and apart < 0.02 and (got != want or "library" not in build_info())


def test_evaluate_says_what_short_weights_cost(trained):
    want = json.loads(run("evaluate", trained, "--json").stdout)
    for storage in ("bf16", "int8"):
        found = json.loads(run("evaluate", trained, "--json", "--pack", storage).stdout)
        assert found["pack"] == storage and found["map_unpacked"] == want["map"]
        assert found["map"] == pytest.approx(want["map"], abs=0.02) and found["same_class"] > 0.95
        assert (0 < found["largest_difference"] < 0.02) or "library" not in build_info()
    said = run("evaluate", trained, "--pack", "int8").stdout
    assert f"mAP {found['map']:.4f}, {want['map']:.4f} on the trained ones" in said.split("int8 weights:")[1]


@torch.no_grad()
def test_scores_by_steps_are_those_of_the_clip(trained):
    model, streams = load_run(trained).model, toy_streams().test[:3]
    pairs = zip(stream_scores(model, streams, run=by_steps(model)), stream_scores(model, streams), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


def test_bad_frames_leave_the_state_alone(trained, tmp_path):
    stream = toy_streams().test[0]
    path = csv_of(stream, tmp_path / "s.csv", header=False)
    want = list(scores_of(run("detect", trained, path).stdout).values())
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([*lines[:10], "1,2,3", *lines[10:20], "1,2,nan,4,5,6", "a,1,2,3,4,5", *lines[20:]]) + "\n"
    )
    done = run("detect", trained, path)
    assert done.exit_code == 0 and list(scores_of(done.stdout).values()) == want
    said = done.stderr.splitlines()
    assert [line for line in said if "skipped" in line] == [
        f"pyflowgen: {path}: frame 10: 3 values, expected 6; skipped",
        f"pyflowgen: {path}: frame 21: value 3 is nan, expected a finite number; skipped",
        f"pyflowgen: {path}: frame 22: 'a' is no number; skipped",
    ]
    assert "96 frames in" in said[-1] and "3 bad" in said[-1]


def test_a_state_of_other_weights_is_refused(trained, tmp_path):
    path, state = csv_of(toy_streams().test[0], tmp_path / "s.csv"), tmp_path / "state.safetensors"
    assert run("detect", trained, path, "--state", state).exit_code == 0
    other = tmp_path / "other"
    assert run("train", "lstm", *SMALL, "--out", other, "--epochs", 1, "--seed", 5).exit_code == 0
    fails("detect", other, path, "--state", state, words=[state, "other weights"])
    tensors, about = read_tensors(state)
    for lost in ("frames", "offset"):
        write_tensors(state, tensors, {k: v for k, v in about.items() if k != lost})
        fails("detect", trained, path, "--state", state, words=[state, "how many frames"])
    write_tensors(state, dict(list(tensors.items())[1:]), about)
    fails("detect", trained, path, "--state", state, words=[state, "state of one stream"])
    state.write_bytes(b"junk")
    fails("detect", trained, path, "--state", state, words=[state, "cannot be read"])


def test_evaluate_and_its_timeline(trained, tmp_path):
    done = run("evaluate", trained, "--timeline", tmp_path / "a" / "t.png")
    assert done.exit_code == 0 and "mAP" in done.stdout and "right when seen" in done.stdout, done.output
    found = json.loads(run("evaluate", trained, "--json", "--split", "valid").stdout)
    assert found["map"] == pytest.approx(max(m["valid_map"] for m in read_metrics(trained)), abs=1e-6)
    assert found["streams"] == 8 and (tmp_path / "a" / "t.png").stat().st_size > 5000
    fails("sample", trained, "--out", tmp_path / "s.npy", words=["no samples"])
    fails("evaluate", trained, "--data", "digits", words=["digits", "toy-streams"])


def test_wrong_commands_are_one_line(tmp_path):
    fails("train", "lstm", "--data", "digits", "--out", tmp_path / "x", words=["digits", "watch"])
    fails("train", "nice", "--data", "toy-streams", "--out", tmp_path / "x", words=["toy-streams"])
    fails("train", "trn", "--data", "toy-streams", "--shape", "flat", "--out", tmp_path / "x", words=["flat", "native"])
    fails("train", "gru", *SMALL, "--set", "last=99", "--out", tmp_path / "x", words=["GRUDetector", "last=99"])
    assert not (tmp_path / "x").exists()
    assert run("train", "realnvp", "--data", "moons", "--epochs", 1, "--set", "hidden=[8]", "--no-progress", "--out", tmp_path / "flow").exit_code == 0  # fmt: skip
    fails("detect", tmp_path / "flow", "-", words=["realnvp", "finds no actions"])
    fails("evaluate", tmp_path / "flow", "--timeline", tmp_path / "t.png", words=["no timeline"])
    fails("evaluate", tmp_path / "flow", "--pack", "int8", words=["no step on short weights"])


def test_help_where_the_contests_need_what_is_missing(monkeypatch):
    monkeypatch.setattr("pyflowgen.cli._BENCH", {"bench": "no_such_module"})
    done = run("--help")
    assert done.exit_code == 0 and "bench needs no_such_module" in done.stdout
    fails("bench", "lstm", "--quick", words=["bench needs no_such_module", "pip install"])


def test_resume_through_the_command_line(tmp_path):
    assert run("train", "lstm", *SMALL, "--schedule", "constant", "--out", tmp_path / "a", "--epochs", 3).exit_code == 0
    assert run("train", "lstm", *SMALL, "--schedule", "constant", "--out", tmp_path / "b", "--epochs", 1).exit_code == 0
    done = run("train", "lstm", "--out", tmp_path / "b", "--epochs", 3, "--resume", "--no-progress")
    assert done.exit_code == 0, (done.output, done.exception)
    a, b = (read_tensors(tmp_path / x / CHECKPOINT)[0] for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_wait_and_saves(tmp_path, signum):
    trained = tmp_path / "run"
    assert run("train", "lstm", *SMALL, "--out", trained, "--epochs", 1).exit_code == 0
    stream = toy_streams().test[0]
    path, state = csv_of(stream, tmp_path / "s.csv"), tmp_path / "state.safetensors"
    want = scores_of(run("detect", trained, path).stdout)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:41]))
    command = [sys.executable, "-m", "pyflowgen", "detect", str(trained), str(path), "--follow", "--state", str(state), "--save-every", "1000"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip
    seen = [process.stdout.readline() for _ in range(41)]
    with open(path, "a") as file:  # scores come while the file grows
        file.write("".join(lines[41:51]))
    seen += [process.stdout.readline() for _ in range(10)]
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and out == "" and "Traceback" not in err, err
    assert "50 frames in" in err and "ms (p99)" in err
    got = scores_of("".join(seen))
    path.write_text("".join(lines))
    got |= scores_of(run("detect", trained, path, "--state", state).stdout)
    assert got == want
