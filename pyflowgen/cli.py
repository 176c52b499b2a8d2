"""The command line: train, sample, evaluate, detect, info, bench, gallery.

A fault of the user's is one line on standard error, exit code 2.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import click
import numpy as np
import torch
from torch import Tensor

from pyflowgen import __version__
from pyflowgen import detect as live
from pyflowgen.data import NAMES, STREAMS, DataError
from pyflowgen.data.pictures import save_grid
from pyflowgen.flow import Flow
from pyflowgen.models import Detector
from pyflowgen.recipes import RECIPES, Run, load_run, new_model, recipe
from pyflowgen.train import (
    CHECKPOINT,
    OPTIMIZERS,
    PATHS,
    SCHEDULES,
    Diverged,
    Interrupted,
    RunError,
    TrainConfig,
    choose_path,
    fit,
    read_config,
)
from pyflowgen.train import evaluate as evaluate_model


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"pyflowgen: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


_STORAGE = {"bf16": torch.bfloat16, "int8": torch.int8}
_BENCH = {"bench": "pyflowgen.benchmarks.run", "gallery": "pyflowgen.benchmarks.gallery"}


class _Commands(click.Group):
    """Turns the library's errors into one line and an exit code; anything else is a bug and keeps its traceback."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *_BENCH]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _BENCH:
            return super().get_command(ctx, cmd_name)
        try:  # only here: the contests need plots and peers that the library does not
            module = importlib.import_module(_BENCH[cmd_name])
        except ImportError as error:
            needs = f"{cmd_name} needs {error.name}: pip install 'pyflowgen[bench]'"

            def refuse() -> None:
                raise RunError(needs)

            anything = {"ignore_unknown_options": True, "allow_extra_args": True}
            return click.Command(cmd_name, callback=refuse, help=needs, context_settings=anything)
        command: click.Command = getattr(module, cmd_name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as stop:
            _end(str(stop), 128 + stop.signum)
        except KeyboardInterrupt:
            _end("interrupted", 130)
        except Diverged as error:
            _end(str(error), 1)
        except (DataError, RunError) as error:
            _end(str(error), 2)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _end(f"{where}{error.strerror or error}", 2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="pyflowgen")
def main() -> None:
    """Train, sample and evaluate flows, and find actions in live streams, on compiled kernels."""


def _device(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise click.BadParameter(f"{value!r} cannot be used ({str(error).splitlines()[0]})") from None
    return value


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--threads", type=click.IntRange(min=1), help="Threads of torch's pool.  [default: torch's own]"),
        click.option("--device", default="cpu", callback=_device, help="cpu, cuda, cuda:1, …"),
        click.option("--path", type=click.Choice(PATHS), help="Kernels or plain PyTorch.  [default: fused]"),
    ):
        command = option(command)
    return command


def _pairs(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, Any]:
    found = {}
    for pair in value:
        key, equals, text = pair.partition("=")
        if not (key.isidentifier() and equals):
            raise click.BadParameter(f"{pair!r}, expected NAME=VALUE")
        try:
            found[key] = json.loads(text)
        except ValueError:
            found[key] = text
    return found


@main.command()
@click.argument("model", type=click.Choice(list(RECIPES)))
@click.option(
    "--data",
    help=f"For flows {', '.join(NAMES)}, or a path: folder of images or IDX files, .npy, .npz, .csv, .parquet; "
    f"for detectors {', '.join(STREAMS)}, or a folder of videos' features and labels.  [default: digits, watch]",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the run.")
@click.option("--resume", is_flag=True, help="Continue the run in --out; only the budget and the path may change.")
@click.option(
    "--shape",
    "form",
    type=click.Choice(["native", "flat", "image"]),
    help="Shape of the examples: as the source has them, vectors, or images.  [default: the model's]",
)
@click.option(
    "--set", "options", multiple=True, callback=_pairs, metavar="NAME=VALUE", help="Argument of the model; repeatable."
)
@click.option("--epochs", type=int, help="Passes over the training data.")
@click.option("--time-limit", type=float, help="Seconds of training.")
@click.option("--batch", type=int, help="Examples a step.")
@click.option("--lr", type=float, help="Learning rate.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS))
@click.option("--schedule", type=click.Choice(SCHEDULES), help="Of the learning rate.")
@click.option("--warmup", type=int, help="Steps in which the learning rate rises.")
@click.option("--weight-decay", type=float)
@click.option("--clip", type=float, help="Largest norm of the gradient.")
@click.option("--patience", type=int, help="Stop after so many epochs without a better validation likelihood.")
@click.option("--ema", type=float, help="Decay of averaged weights.")
@click.option("--seed", type=int)
@click.option("--checkpoint-every", type=float, help="Seconds between checkpoints.")
@click.option("--progress/--no-progress", default=True, help="A bar with live bits/dim or nats on standard error.")
@_common
def train(
    model: str,
    data: str | None,
    out: Path,
    resume: bool,
    form: str | None,
    options: dict[str, Any],
    progress: bool,
    device: str,
    threads: int | None,
    **settings: Any,
) -> None:
    """Train MODEL; what is not given comes from the model's recipe for the data.

    Ctrl-C saves and ends with code 130; --resume continues bit for bit.
    """
    if threads:
        torch.set_num_threads(threads)
    chosen = recipe(model)
    if resume:
        describe, config = _resumed(out, model, data, form, options, settings)
        about = describe["data"]
        examples = chosen.load(about["source"], about["form"])
        network = (
            load_run(out, "last").model if (out / CHECKPOINT).exists() else new_model(chosen, describe["model_config"])
        )
        if any(about.get(k) != v for k, v in examples.facts().items()):
            raise RunError(f"{about['source']}: has changed since {out} was begun, which cannot be resumed on it")
    else:
        if (out / CHECKPOINT).exists():
            raise RunError(f"{out}: holds a run already; pass --resume to continue it, or choose another --out")
        form, source = form or chosen.form, data or chosen.default
        examples = chosen.load(source, form)
        config = chosen.config(examples, **settings)
        torch.manual_seed(config.seed)
        network = chosen.build(examples, **options)
        describe = {"model": model, "model_config": network.config, "data": {"source": _source(source), "form": form}}
    network, examples, task = network.to(device), examples.to(device), chosen.task()
    result = fit(network, examples, config, task=task, out=out, resume=resume, progress=progress, describe=describe)
    with choose_path(config.path):
        tested = task.test(network, examples)
        if isinstance(network, Detector):
            with contextlib.suppress(RunError):  # a picture is worth no failed run
                _timeline(out / "timeline.png", network, examples, examples.test)
    click.echo(
        f"{model} on {examples.name}: {result.epochs} epochs ({result.steps} steps) in {result.seconds:.1f} s, "
        f"stopped by {result.stopped}; best validation {task.say(examples, result.best_valid)} "
        f"(epoch {result.best_epoch}); test {tested}"
    )


def _timeline(path: Path, model: Detector, data: Any, streams: Any) -> None:
    few = streams[:4]
    live.timeline(path, few, live.stream_scores(model, few), data.classes, data.rate)


def _source(data: str) -> str:
    return data if data in (*NAMES, *STREAMS) else str(Path(data).expanduser().resolve())


def _resumed(
    out: Path, model: str, data: str | None, form: str | None, options: dict[str, Any], settings: dict[str, Any]
) -> tuple[dict[str, Any], TrainConfig]:
    describe = read_config(out)
    free = ("epochs", "time_limit", "patience", "path", "checkpoint_every")
    try:
        if describe["model"] != model:
            raise RunError(f"{out}: holds a {describe['model']}, not a {model}")
        before = TrainConfig.of(describe["train"])
        asked = {
            "data": (data and _source(data), describe["data"]["source"]),
            "shape": (form, describe["data"]["form"]),
        }
    except (KeyError, TypeError) as error:
        raise RunError(f"{out}: config.json does not describe a run ({type(error).__name__}: {error})") from None
    asked |= {k: (v, getattr(before, k)) for k, v in settings.items() if k not in free}
    asked |= {f"set {k}": (v, describe["model_config"].get(k)) for k, v in options.items()}
    for name, (new, old) in asked.items():
        if new is not None and new != old:
            raise RunError(f"{out}: was begun with {name.replace('_', '-')} {old}, --resume cannot change it to {new}")
    changes = {k: settings[k] for k in free if settings.get(k) is not None}
    return describe, TrainConfig.of({**describe["train"], **changes})


def _path_of(run: Run, path: str | None) -> str:
    return path or str(run.config.get("train", {}).get("path", "fused"))


_run_argument = click.argument("run", type=click.Path(path_type=Path))
_weights = click.option(
    "--weights", type=click.Choice(["best", "last"]), default="best", help="Which of the run's weights."
)


@main.command()
@_run_argument
@click.option("-n", "--count", type=click.IntRange(min=1), default=64, help="Samples.")
@click.option("--grid", type=click.Path(path_type=Path), help="PNG of the samples.")
@click.option("--out", type=click.Path(path_type=Path), help=".npy of the samples: levels (uint8) or float32.")
@click.option("--seed", type=int, default=0)
@click.option("--temperature", type=click.FloatRange(min=0), default=1.0, help="Of the latents; below 1: more typical.")
@_weights
@_common
def sample(
    run: Path,
    count: int,
    grid: Path | None,
    out: Path | None,
    seed: int,
    temperature: float,
    weights: str,
    path: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Draw samples from the model in folder RUN."""
    if grid is None and out is None:
        raise click.UsageError("nothing to write: give --grid FILE.png, --out FILE.npy, or both")
    if out is not None and out.suffix != ".npy":
        raise click.BadParameter(f"{out}: expected an ending .npy", param_hint="--out")
    if threads:
        torch.set_num_threads(threads)
    loaded = load_run(run, weights, device)
    if not isinstance(loaded.model, Flow):
        raise RunError(f"{run}: holds a {loaded.config['model']}, which has no samples; expected a flow")
    torch.manual_seed(seed)
    with choose_path(_path_of(loaded, path)):
        drawn = torch.cat([loaded.model.sample(n, temperature=temperature).cpu() for n in _chunks(count, 1024)])
    if loaded.levels is not None:
        drawn = (drawn * loaded.levels).floor().nan_to_num(0).clamp(0, loaded.levels - 1).to(torch.uint8)
    shape = loaded.config["data"].get("image_shape")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, drawn.numpy())
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)
        save_grid(drawn, grid, levels=loaded.levels, image_shape=tuple(shape) if shape else None)
    click.echo(f"{count} samples: {', '.join(str(p) for p in (grid, out) if p)}")


def _chunks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


@main.command()
@_run_argument
@click.option("--data", help="Another source of the same shape.  [default: the run's]")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test")
@click.option("--draws", type=click.IntRange(min=1), default=8, help="Draws of dequantisation noise.")
@click.option("--seed", type=int, default=1, help="Of the noise.")
@click.option("--timeline", type=click.Path(path_type=Path), help="PNG of truth and scores of a few streams.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@click.option("--pack", type=click.Choice(list(_STORAGE)), help="As a live stream on shorter weights, and their cost.")
@_weights
@_common
def evaluate(
    run: Path,
    data: str | None,
    split: str,
    draws: int,
    seed: int,
    timeline: Path | None,
    as_json: bool,
    pack: str | None,
    weights: str,
    path: str | None,
    device: str,
    threads: int | None,
) -> None:
    """What the model in folder RUN reaches on data: of a flow the log-likelihood in nats, and bits/dim where the data
    has levels; of a detector the per-frame mAP and every other measure of online and early detection."""
    if threads:
        torch.set_num_threads(threads)
    loaded = load_run(run, weights, device)
    examples = loaded.data(data).to(device)
    began = time.perf_counter()
    if isinstance(loaded.model, Detector):
        streams = getattr(examples, split)
        with choose_path(_path_of(loaded, path)):
            found = live.evaluate(loaded.model, examples, streams, None if pack is None else _STORAGE[pack])
            if timeline is not None:
                _timeline(timeline, loaded.model, examples, streams)
        found = {"model": loaded.config["model"], "data": examples.name, "split": split, **found}
        found |= {"path": _path_of(loaded, path), "seconds": round(time.perf_counter() - began, 3), "pack": pack}
        click.echo(json.dumps(found) if as_json else _say_detection(found))
        return
    if timeline is not None or pack is not None:
        what = "timeline" if timeline is not None else "step on short weights"
        raise RunError(f"{run}: holds a {loaded.config['model']}, which has no {what}; expected a detector")
    with choose_path(_path_of(loaded, path)):
        found = evaluate_model(loaded.model, examples, getattr(examples, split), draws=draws, seed=seed)
    found = {"model": loaded.config["model"], "data": examples.name, "split": split, **found}
    found |= {"path": _path_of(loaded, path), "seconds": round(time.perf_counter() - began, 3)}
    if as_json:
        click.echo(json.dumps(found))
        return
    error = found["nats_standard_error"]
    bits = "" if found["bits_per_dim"] is None else f", {found['bits_per_dim']:.4f} bits/dim"
    spread = "" if error is None else f" ± {error:.3f}"
    click.echo(
        f"{found['model']} on {found['data']} ({split}, {found['examples']} examples): "
        f"{found['nats']:.3f}{spread} nats{bits}"
    )


def _say_detection(found: dict[str, Any]) -> str:
    def row(name: str, values: Any) -> str:
        return f"\n  {name:18}" + "  ".join(f"{k} {v:.3f}" for k, v in values.items())

    text = f"{found['model']} on {found['data']} ({found['split']}, {found['streams']} streams, "
    text += (
        f"{found['frames']} frames): mAP {found['map']:.4f} (chance {found['chance']:.4f}), mcAP {found['mcap']:.4f}"
    )
    text += row("per class", found["per_class"])
    text += row("starts within", {f"{k:g}": v for k, v in found["point_map"].items()})
    if "ahead_map" in found:
        text += row("seconds ahead", {f"{k:g}": v for k, v in found["ahead_map"].items()})
    if "accuracy_at" in found:
        text += row("right when seen", {f"{k:.0%}": v for k, v in found["accuracy_at"].items()})
        text += f"\n  time to detection {found['time_to_detection']:.3f} of an action, at 10 % false alarms"
    if found["pack"]:
        text += f"\n  {found['pack']} weights:".ljust(21)
        text += f"mAP {found['map']:.4f}, {found['map_unpacked']:.4f} on the trained ones; a probability differs by "
        text += f"{found['largest_difference']:.4f} at most, {found['same_class']:.2%} of the frames keep their class"
    return text


@main.command()
@_run_argument
@click.argument("stream", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--format", "form", type=click.Choice(live.FORMATS), help="Of the frames.  [default: by the first bytes]")
@click.option("--follow", is_flag=True, help="At the end of the file wait for more.")
@click.option("--idle", type=float, help="With --follow: end after so many seconds without a frame.  [default: never]")
@click.option("--state", type=click.Path(path_type=Path), help="Keep the state in this file, and go on from it.")
@click.option("--save-every", type=float, default=5.0, help="Seconds between writes of --state.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of CSV on standard output.")
@click.option("--pack", type=click.Choice(list(_STORAGE)), help="Run on shorter weights.  [default: as trained]")
@_weights
@_common
def detect(
    run: Path,
    stream: Path,
    form: str | None,
    follow: bool,
    idle: float | None,
    state: Path | None,
    save_every: float,
    as_json: bool,
    pack: str | None,
    weights: str,
    path: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Score STREAM frame by frame with the detector in folder RUN: a file, or - for standard input.

    A frame is a line of CSV, a JSON array on a line, or a row of a .npy array. Each gives a line with its number, the
    most probable class and all probabilities. A bad frame is named on standard error and skipped. With --state a
    restart goes on where the last one ended, bit for bit; in a file behind the frames it has seen. Latencies are told
    at the end.
    """
    if threads:
        torch.set_num_threads(threads)
    loaded = load_run(run, weights, device)
    if not isinstance(loaded.model, Detector):
        raise RunError(f"{run}: holds a {loaded.config['model']}, which finds no actions; expected a detector")
    model, names = loaded.model, loaded.config["data"]["classes"]
    if pack:
        model.pack(_STORAGE[pack])
    piped = str(stream) == "-"
    before, number, offset = (None, 0, 0)
    if state is not None and state.exists():
        before, number, offset = live.load_state(state, model)
    out = csv.writer(sys.stdout, lineterminator="\n")
    if not as_json:
        out.writerow(["frame", "class", *names])

    def show(number: int, probabilities: Tensor) -> None:
        values = probabilities.tolist()
        best = names[int(probabilities.argmax())]
        if as_json:
            line = {"frame": number, "class": best, "scores": dict(zip(names, values, strict=True))}
            sys.stdout.write(json.dumps(line) + "\n")
        else:
            out.writerow([number, best, *values])
        sys.stdout.flush()

    def complain(number: int, wrong: str) -> None:
        click.echo(f"pyflowgen: {'standard input' if piped else stream}: frame {number}: {wrong}; skipped", err=True)

    with contextlib.ExitStack() as stack:
        source: BinaryIO = sys.stdin.buffer if piped else stack.enter_context(open(stream, "rb"))
        stack.enter_context(choose_path(_path_of(loaded, path)))
        reader = live.Reader(
            source, model.features, form, follow=follow and not piped, idle=idle,
            offset=0 if piped else offset, number=number, name="standard input" if piped else str(stream),
        )  # fmt: skip
        done = live.detect(model, reader, show, complain, state=before, state_file=state, save_every=save_every)
    click.echo(
        f"pyflowgen: {done.frames} frames in {done.seconds:.1f} s, {done.bad} bad; a frame took "
        + ", ".join(f"{1e3 * done.latency.percentile(q):.3g} ms (p{q})" for q in (50, 90, 99))
        + f", {1e3 * done.latency.largest:.3g} ms at most",
        err=True,
    )
    if done.signum:
        raise click.exceptions.Exit(128 + done.signum)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def info(as_json: bool) -> None:
    """What this installation was built from and can run."""
    from pyflowgen import build_info

    facts = build_info()
    if as_json:
        click.echo(json.dumps(facts, default=str))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else "none" if value is None else value
        click.echo(f"{key.replace('_', ' '):{width}}  {shown}")
