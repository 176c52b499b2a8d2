"""The command line, in process where that is enough, and as a process of its own where signals are concerned."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pyflowgen.cli import main
from pyflowgen.recipes import load_run
from pyflowgen.train import CHECKPOINT, read_config, read_metrics, read_tensors

ROOT = Path(__file__).parents[1]
SMALL = ["--epochs", "2", "--set", "hidden=[16]", "--set", "couplings=2"]


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def fails(*args, words=(), code=2):
    """The command ends with ``code``, and says why in one line without a traceback."""
    done = run(*args)
    assert done.exit_code == code, (done.output, done.exception)
    assert isinstance(done.exception, SystemExit)
    line = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.output
    for word in words:
        assert str(word) in line, line
    if not line.startswith("Error:"):  # click prints its usage above its own errors
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return line


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    done = run("train", "realnvp", "--data", "digits", "--out", out, *SMALL)
    assert done.exit_code == 0, done.output
    return out


def test_train_says_what_it_reached_and_leaves_a_run(digits_run):
    assert sorted(p.name for p in digits_run.iterdir()) == [
        "best.safetensors",
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
    ]
    config = read_config(digits_run)
    assert config["model"] == "realnvp" and config["model_config"]["couplings"] == 2
    assert config["data"]["levels"] == 17 and config["data"]["sizes"] == [1197, 200, 400]
    assert [m["epoch"] for m in read_metrics(digits_run)] == [1, 2]


def test_evaluate(digits_run):
    done = run("evaluate", digits_run, "--json")
    found = json.loads(done.stdout)
    assert found["examples"] == 400 and found["split"] == "test" and found["draws"] == 8
    assert found["bits_per_dim"] == pytest.approx((-found["nats"] / 64 + np.log(17)) / np.log(2))
    assert f"{found['bits_per_dim']:.4f} bits/dim" in run("evaluate", digits_run).stdout
    valid = json.loads(run("evaluate", digits_run, "--split", "valid", "--draws", "1", "--json").stdout)
    assert valid["nats"] == pytest.approx(max(m["valid_nats"] for m in read_metrics(digits_run)), abs=1e-9)
    reference = json.loads(run("evaluate", digits_run, "--path", "reference", "--json").stdout)
    assert reference["path"] == "reference" and reference["nats"] == pytest.approx(found["nats"], rel=1e-4)


def test_sample_grid_and_array(digits_run, tmp_path):
    done = run(
        "sample", digits_run, "-n", 10, "--grid", tmp_path / "a" / "g.png", "--out", tmp_path / "s.npy", "--seed", 3
    )
    assert done.exit_code == 0, done.output
    drawn = np.load(tmp_path / "s.npy")
    assert drawn.shape == (10, 64) and drawn.dtype == np.uint8 and drawn.max() <= 16 and len(np.unique(drawn)) > 5
    with Image.open(tmp_path / "a" / "g.png") as image:
        pixels = np.asarray(image)
    scale, gap = 6, 3  # 4 columns, 3 rows
    assert pixels.shape == (3 * (48 + gap) + gap, 4 * (48 + gap) + gap)
    top, left = gap + 1 * (48 + gap), gap + 2 * (48 + gap)  # sample 6
    tile = pixels[top : top + 48 : scale, left : left + 48 : scale]
    assert np.array_equal(tile, np.round(drawn[6].reshape(8, 8) * 255.0 / 16))
    assert run("sample", digits_run, "-n", 10, "--out", tmp_path / "t.npy", "--seed", 3).exit_code == 0
    assert np.array_equal(np.load(tmp_path / "t.npy"), drawn)


def test_toy_points_are_drawn_as_a_map(tmp_path):
    assert run("train", "nice", "--data", "banana", "--out", tmp_path / "r", *SMALL, "--batch", 1000).exit_code == 0
    assert run("sample", tmp_path / "r", "-n", 2000, "--grid", tmp_path / "g.png").exit_code == 0
    with Image.open(tmp_path / "g.png") as image:
        assert np.asarray(image).shape == (256, 256) and np.asarray(image).max() == 255
    assert (
        "bits_per_dim" not in run("evaluate", tmp_path / "r").stdout
        and "nats" in run("evaluate", tmp_path / "r").stdout
    )


def test_own_images_train_as_images_or_vectors(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    small = ["--epochs", 1, "--set", "channels=8", "--set", "blocks=1", "--data", tmp_path / "pictures"]
    done = run("train", "realnvp", *small, "--out", tmp_path / "r")
    assert done.exit_code == 0, (done.output, done.exception)
    assert load_run(tmp_path / "r").model.config["event_shape"] == [3, 8, 8]
    done = run("sample", tmp_path / "r", "-n", 4, "--grid", tmp_path / "g.png")
    assert done.exit_code == 0, (done.output, done.exception)
    with Image.open(tmp_path / "g.png") as image:
        assert image.mode == "RGB"
    assert run("train", "realnvp", *small, "--out", tmp_path / "v", "--shape", "flat").exit_code == 0
    assert load_run(tmp_path / "v").model.config["event_shape"] == [192]


def test_resume_is_bit_for_bit(tmp_path):
    small = ["--set", "hidden=[16]", "--set", "couplings=2", "--schedule", "constant", "--no-progress"]
    assert run("train", "realnvp", "--out", tmp_path / "a", "--epochs", 4, *small).exit_code == 0
    assert run("train", "realnvp", "--out", tmp_path / "b", "--epochs", 2, *small).exit_code == 0
    done = run("train", "realnvp", "--out", tmp_path / "b", "--epochs", 4, "--resume")
    assert done.exit_code == 0, (done.output, done.exception)
    a, b = (read_tensors(tmp_path / x / CHECKPOINT)[0] for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_info():
    done = run("info", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["torch"] == torch.__version__
    assert torch.__version__ in run("info").stdout


def test_user_errors_are_one_line(digits_run, tmp_path):
    out = tmp_path / "x"
    fails("train", "glow2", "--out", out, words=["'glow2'", "realnvp"])
    fails("train", "nice", "--data", "nowhere", "--out", out, words=["nowhere", "digits"])
    fails("train", "nice", "--out", out, "--lr", "-1", words=["lr is -1.0"])
    fails("train", "nice", "--out", out, "--epochs", "many", words=["many"])
    fails("train", "nice", "--out", out, "--set", "hidden", words=["NAME=VALUE"])
    fails("train", "nice", "--out", out, "--set", "wings=2", words=["NICE", "wings"])
    fails("train", "realnvp", "--out", out, "--set", "couplings=0", words=["couplings"])
    fails("train", "nice", "--out", out, "--device", "cuda:99", words=["cuda:99"])
    fails("train", "realnvp", "--data", "banana", "--shape", "image", "--out", out, words=["banana", "no images"])
    fails("train", "realnvp", "--out", digits_run, words=[digits_run, "--resume"])
    fails("train", "nice", "--out", digits_run, "--resume", words=["realnvp", "nice"])
    fails("train", "realnvp", "--out", digits_run, "--resume", "--lr", "0.5", words=["lr", "0.5"])
    fails("train", "realnvp", "--out", digits_run, "--resume", "--data", "mnist", words=["data", "digits", "mnist"])
    fails("train", "nice", "--out", out, "--resume", words=[out, "config.json"])
    assert not out.exists()
    fails("sample", digits_run, words=["--grid", "--out"])
    fails("sample", digits_run, "--out", tmp_path / "s.txt", words=[".npy"])
    fails("sample", digits_run, "--grid", tmp_path / "g.what", words=["g.what", ".png"])
    fails("sample", tmp_path / "nowhere", "--grid", tmp_path / "g.png", words=["nowhere", "config.json"])
    fails("evaluate", digits_run, "--data", "banana", words=["banana", "(2,)", "(64,)"])
    (tmp_path / "file").write_text("")
    fails("train", "nice", "--out", tmp_path / "file" / "run", *SMALL, words=["file"])
    bad = tmp_path / "bad.csv"
    bad.write_text("a,b\n" + "1,2\n" * 20 + "1,\n")
    fails("train", "nice", "--data", bad, "--out", out, words=["bad.csv", "1 of 21 rows", "'b'"])
    fails(
        "train",
        "nice",
        "--out",
        out,
        *SMALL,
        "--no-progress",
        "--lr",
        "1e30",
        "--clip",
        "1e30",
        code=1,
        words=["NaN or infinite", "lower lr"],
    )


def test_damaged_runs_are_one_line(digits_run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "best.safetensors"):
        (copy / name).write_bytes((digits_run / name).read_bytes())
    fails("evaluate", copy, "--weights", "last", words=[CHECKPOINT])
    (copy / "best.safetensors").write_bytes((digits_run / "best.safetensors").read_bytes()[:1000])
    fails("evaluate", copy, words=["best.safetensors", "cannot be read"])
    config = read_config(digits_run)
    (copy / "best.safetensors").write_bytes((digits_run / "best.safetensors").read_bytes())
    config["model_config"]["couplings"] = 4
    (copy / "config.json").write_text(json.dumps(config))
    fails("evaluate", copy, words=["best.safetensors", "does not fit"])
    (copy / "config.json").write_text("{")
    fails("evaluate", copy, words=["config.json", "expected JSON"])
    (copy / "config.json").write_text('{"model": "realnvp"}')
    fails("evaluate", copy, words=["config.json", "does not describe a run"])


# ---- signals


def start(out, *args):
    command = [
        sys.executable,
        "-m",
        "pyflowgen",
        "train",
        "realnvp",
        "--out",
        str(out),
        "--set",
        "hidden=[16]",
        "--set",
        "couplings=2",
        "--epochs",
        "100000",
        *args,
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )


def wait_for_steps(process, out, epochs):
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, process.communicate()
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count("\n") >= epochs:
            return
        time.sleep(0.02)
    raise AssertionError("no progress within 180 s")


def test_ctrl_c_saves_and_ends_with_130(tmp_path):
    process = start(tmp_path / "run")
    wait_for_steps(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("pyflowgen: interrupted at step")
    state = json.loads(read_tensors(tmp_path / "run" / CHECKPOINT)[1]["state"])
    assert state["step"] >= 3 * 10
    done = run(
        "train", "realnvp", "--out", tmp_path / "run", "--resume", "--epochs", state["epoch"] + 1, "--no-progress"
    )
    assert done.exit_code == 0, (done.output, done.exception)


def test_kill_during_checkpoints_loses_nothing(tmp_path):
    """Written at every step, a checkpoint is under way at most moments; whichever a kill hits, a whole one is there."""
    out = tmp_path / "run"
    step = 0
    for attempt in range(2):
        process = start(out, "--checkpoint-every", "0", "--no-progress", *(["--resume"] if attempt else []))
        wait_for_steps(
            process, out, 2 * (attempt + 1) + len(read_metrics(out) if out.exists() else []) if attempt else 2
        )
        time.sleep(0.013 * attempt)
        process.kill()
        process.communicate(timeout=120)
        tensors, about = read_tensors(out / CHECKPOINT)
        reached = json.loads(about["state"])["step"]
        assert reached > step and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())
        assert read_metrics(out)[-1]["step"] - reached <= 1  # a line goes ahead of its checkpoint by that step at most
        assert load_run(out).model.sample(2).shape == (2, 64)
        step = reached
    done = run("train", "realnvp", "--out", out, "--resume", "--epochs", step // 10 + 1, "--no-progress")
    assert done.exit_code == 0, (done.output, done.exception)
    steps = [m["step"] for m in read_metrics(out)]
    assert steps == sorted(set(steps))
