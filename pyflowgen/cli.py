"""The command line: train, sample, evaluate, info, bench, gallery.

A fault of the user's is one line on standard error, exit code 2.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click
import numpy as np
import torch

from pyflowgen import __version__
from pyflowgen.data import NAMES, DataError
from pyflowgen.data.pictures import save_grid
from pyflowgen.recipes import RECIPES, Run, load_as, load_run, recipe
from pyflowgen.train import (
    CHECKPOINT,
    OPTIMIZERS,
    PATHS,
    SCHEDULES,
    Diverged,
    Interrupted,
    RunError,
    TrainConfig,
    bits_per_dim,
    choose_path,
    fit,
    read_config,
)
from pyflowgen.train import evaluate as evaluate_model


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"pyflowgen: {' '.join(message.split())}", err=True)
    raise click.exceptions.Exit(code)


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
            raise RunError(f"{cmd_name} needs {error.name}: pip install 'pyflowgen[bench]'") from None
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
    """Train, sample and evaluate flows on compiled kernels."""


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
    help=f"One of {', '.join(NAMES)}, or a path: folder of images or IDX files, .npy, .npz, .csv, "
    ".parquet.  [default: digits]",
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
        examples = load_as(about["source"], about["form"])
        network = (
            load_run(out, "last").model
            if (out / CHECKPOINT).exists()
            else chosen.model.from_config(describe["model_config"])
        )
        if (
            list(examples.event_shape) != about["event_shape"]
            or [len(examples.train), len(examples.valid), len(examples.test)] != about["sizes"]
        ):
            raise RunError(f"{about['source']}: has changed since {out} was begun, which cannot be resumed on it")
    else:
        if (out / CHECKPOINT).exists():
            raise RunError(f"{out}: holds a run already; pass --resume to continue it, or choose another --out")
        form, source = form or chosen.form, data or "digits"
        examples = load_as(source, form)
        config = chosen.config(examples, **settings)
        torch.manual_seed(config.seed)
        network = chosen.build(examples, **options)
        describe = {"model": model, "model_config": network.config, "data": {"source": _source(source), "form": form}}
    network, examples = network.to(device), examples.to(device)
    result = fit(network, examples, config, out=out, resume=resume, progress=progress, describe=describe)

    def say(nats: float) -> str:
        bits = bits_per_dim(nats, examples)
        return f"{nats:.3f} nats" + ("" if bits is None else f" = {bits:.4f} bits/dim")

    with choose_path(config.path):
        nats = evaluate_model(network, examples, examples.test)["nats"]
    click.echo(
        f"{model} on {examples.name}: {result.epochs} epochs ({result.steps} steps) in {result.seconds:.1f} s, "
        f"stopped by {result.stopped}; best validation {say(result.best_valid)} (epoch {result.best_epoch}); "
        f"test {say(nats)}"
    )


def _source(data: str) -> str:
    return data if data in NAMES else str(Path(data).expanduser().resolve())


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
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@_weights
@_common
def evaluate(
    run: Path,
    data: str | None,
    split: str,
    draws: int,
    seed: int,
    as_json: bool,
    weights: str,
    path: str | None,
    device: str,
    threads: int | None,
) -> None:
    """Log-likelihood of data under the model in folder RUN: nats, and bits/dim where the data has levels."""
    if threads:
        torch.set_num_threads(threads)
    loaded = load_run(run, weights, device)
    examples = loaded.data(data).to(device)
    began = time.perf_counter()
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
