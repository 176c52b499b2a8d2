"""Models by name: how each is built for a data set, the settings it trains well with, and how a run is read back.

A new model adds one line to :data:`RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyflowgen.data import Dataset, Streams, load, load_streams
from pyflowgen.detect import Detection
from pyflowgen.models import IDN, NICE, NSF, TRN, Glow, GRUDetector, LSTMDetector, RealNVP
from pyflowgen.train import BEST, CHECKPOINT, Likelihood, RunError, Task, TrainConfig, read_config, read_tensors


@dataclass(frozen=True)
class Recipe:
    """``options(data)`` are the model's constructor arguments for a data set; ``form`` is the shape its examples take
    when nothing else is asked: "flat", or "native" (images stay images). ``train`` overrides :class:`TrainConfig`,
    ``by_data`` overrides both on data sets of that name. ``task`` is what is trained for, ``default`` the data when
    none is asked for.
    """

    model: type[nn.Module]
    options: Callable[[Any], dict[str, Any]]
    form: str = "native"
    train: Mapping[str, Any] = field(default_factory=dict)
    by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    task: Callable[[], Task] = Likelihood
    default: str = "digits"

    def load(self, source: str | Path, form: str) -> Any:
        """The data this model trains on; a density's examples "flat", as "image", or "native" as in the source."""
        if self.task is Detection:
            if form != "native":
                raise RunError(f"shape {form}: streams have none but their own, native")
            return load_streams(source)
        return load_as(source, form)

    def config(self, data: Any, **changes: Any) -> TrainConfig:
        """The training settings for ``data``, with every change that is not None."""
        chosen = {k: v for k, v in changes.items() if v is not None}
        return TrainConfig.of({**self.train, **self.by_data.get(data.name, {}), **chosen})

    def build(self, data: Any, **options: Any) -> nn.Module:
        """The model for ``data``; a wrong option is a :class:`RunError`."""
        try:
            return self.model(**{**self.options(data), **options})
        except (TypeError, ValueError) as error:
            raise RunError(f"{self.model.__name__}: {str(error).removeprefix(self.model.__name__ + ': ')}") from None


def _nice(data: Dataset) -> dict[str, Any]:
    # plain ReLU units die at the rates that the large scales of border pixels ask for: on MNIST the likelihood then
    # stays near 1550 nats, where leaky ones pass 1750 in as many steps
    return {"features": data.event_shape[0], "hidden": (300,) * 3, "activation": "leaky_relu"}


def _on_reals(data: Dataset) -> dict[str, Any]:
    # pixels lie in [0, 1]; a logit takes them to the real line
    return {"event_shape": data.event_shape, "alpha": 0.05 if data.levels is not None else None}


def _detector(**of_watch: Any) -> Callable[[Streams], dict[str, Any]]:
    """Sizes from the data, published ones from the model; recordings of a few channels ask for small networks."""

    def options(data: Streams) -> dict[str, Any]:
        small = of_watch if data.features <= 64 else {}
        return {"features": data.features, "classes": len(data.classes), "ignored": list(data.ignored), **small}

    return options


def _glow(data: Dataset) -> dict[str, Any]:
    shape = data.event_shape
    if len(shape) != 3:
        raise RunError(f"Glow: examples of {data.name} have shape {shape}, expected images (channels, height, width)")
    side, scales = min(shape[1:]), 3
    while scales > 1 and (side < 2 ** (2 * scales - 1) or any(s % 2**scales for s in shape[1:])):
        scales -= 1
    return {"event_shape": shape, "scales": scales, "steps": 8 if side < 16 else 4, "channels": 64}


RECIPES: dict[str, Recipe] = {
    "nice": Recipe(
        NICE,
        _nice,
        "flat",
        train={"epochs": 50, "batch": 200, "patience": 20},
        by_data={"mnist": {"epochs": 12, "time_limit": 200.0, "batch": 100, "lr": 2e-3, "ema": 0.998}},
    ),
    # 1197 digits are few: averaging the weights and stopping early keep them from being learned by heart
    "realnvp": Recipe(
        RealNVP,
        _on_reals,
        train={"epochs": 50, "ema": 0.99, "patience": 15},
        by_data={"digits": {"epochs": 40, "lr": 3e-3}},
    ),
    "nsf": Recipe(
        NSF,
        _on_reals,
        "flat",
        train={"epochs": 50, "ema": 0.99, "patience": 15},
        by_data={"digits": {"epochs": 40, "lr": 3e-3}},
    ),
    "lstm": Recipe(
        LSTMDetector,
        _detector(window=64),
        train={"epochs": 30, "batch": 64, "lr": 3e-3},
        by_data={"watch": {"epochs": 60, "lr": 6e-3}},
        task=Detection,
        default="watch",
    ),
    "gru": Recipe(
        GRUDetector,
        # with so few streams a loss on one frame of 64 wastes most of what they teach: test mAP 0.76, with 16 0.82
        _detector(embedding=64, hidden=64, window=64, last=16),
        train={"epochs": 30, "batch": 16, "lr": 1e-4, "optimizer": "adamw", "weight_decay": 0.05},
        by_data={"watch": {"epochs": 60, "batch": 64, "lr": 3e-3}},
        task=Detection,
        default="watch",
    ),
    "trn": Recipe(
        TRN,
        _detector(hidden=64, steps=4, window=32),
        train={"epochs": 21, "batch": 32, "lr": 5e-4, "weight_decay": 5e-4},
        by_data={"watch": {"epochs": 60, "batch": 128, "lr": 6e-3, "weight_decay": 0.0}},
        task=Detection,
        default="watch",
    ),
    "idn": Recipe(
        IDN,
        _detector(hidden=64),
        train={"epochs": 20, "batch": 64, "lr": 1e-3},
        by_data={"watch": {"lr": 3e-3}},
        task=Detection,
        default="watch",
    ),
    "glow": Recipe(
        Glow,
        _glow,
        "image",
        train={"epochs": 50, "batch": 64, "lr": 2e-3, "warmup": 50, "ema": 0.99, "patience": 15, "init_examples": 512},
        by_data={"photos": {"epochs": 5}},
    ),
}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; :class:`RunError` with the known names otherwise."""
    if name not in RECIPES:
        raise RunError(f"model {name!r} is unknown, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def load_as(source: str | Path, form: str) -> Dataset:
    """A data set with its examples "flat", as "image", or "native" as the source has them."""
    data = load(source)
    return data.flat() if form == "flat" else data.image() if form == "image" else data


@dataclass(frozen=True)
class Run:
    """A run folder read back: the model with its trained weights, and what ``config.json`` says."""

    model: Any
    config: dict[str, Any]

    @property
    def levels(self) -> int | None:
        """Levels of the data it was trained on."""
        return self.config["data"].get("levels")

    def data(self, source: str | None = None) -> Any:
        """The run's data, or another source's, which must have the same event shape and levels, or features and
        classes."""
        about = self.config["data"]
        data = recipe(self.config["model"]).load(source or about["source"], about["form"])
        found = data.facts()
        if isinstance(data, Streams):
            if found["features"] != about["features"] or found["classes"] != about["classes"]:
                raise RunError(
                    f"{source or about['source']}: {found['features']} features and classes "
                    f"{', '.join(found['classes'])}, expected {about['features']} and {', '.join(about['classes'])}"
                )
        elif found["event_shape"] != about["event_shape"] or found["levels"] != about["levels"]:
            raise RunError(
                f"{source or about['source']}: examples of shape {data.event_shape} with levels {data.levels},"
                f" expected shape {tuple(about['event_shape'])} with levels {about['levels']} as in training"
            )
        return data


def new_model(chosen: Recipe, config: Mapping[str, Any]) -> nn.Module:
    """The recipe's model with the constructor arguments of a run, and new weights."""
    model: nn.Module = chosen.model.from_config(config)  # type: ignore[attr-defined]
    return model


def load_run(out: str | Path, weights: str = "best", device: str = "cpu") -> Run:
    """Read a run folder, with its ``"best"`` weights on validation data or its ``"last"`` ones.

    Raises :class:`RunError` where a file is missing, damaged, or does not fit the model.
    """
    out = Path(out)
    config = read_config(out)
    try:
        chosen = recipe(config["model"])
        model = new_model(chosen, config["model_config"])
        facts = ("features", "classes") if chosen.task is Detection else ("event_shape", "levels")
        for name in ("source", "form", *facts):
            config["data"][name]
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{out}: config.json does not describe a run ({type(error).__name__}: {error})") from None
    path = out / (BEST if weights == "best" else CHECKPOINT)
    if not path.exists():
        raise RunError(f"{path}: not there, the run has not got that far")
    tensors, _ = read_tensors(path)
    if weights != "best":
        tensors = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{path}: does not fit the model ({' '.join(str(error).split())[:200]})") from None
    return Run(model.to(torch.device(device)).eval(), config)
