"""Models by name: how each is built for a data set, the settings it trains well with, and how a run is read back.

A new model adds one line to :data:`RECIPES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pyflowgen.data import Dataset, load
from pyflowgen.flow import Flow
from pyflowgen.models import NICE, NSF, Glow, RealNVP
from pyflowgen.train import BEST, CHECKPOINT, RunError, TrainConfig, read_config, read_tensors


@dataclass(frozen=True)
class Recipe:
    """``options(data)`` are the model's constructor arguments for a data set; ``form`` is the shape its examples take
    when nothing else is asked: "flat", or "native" (images stay images). ``train`` overrides :class:`TrainConfig`,
    ``by_data`` overrides both on data sets of that name.
    """

    model: type[Flow]
    options: Callable[[Dataset], dict[str, Any]]
    form: str = "native"
    train: Mapping[str, Any] = field(default_factory=dict)
    by_data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def config(self, data: Dataset, **changes: Any) -> TrainConfig:
        """The training settings for ``data``, with every change that is not None."""
        chosen = {k: v for k, v in changes.items() if v is not None}
        return TrainConfig.of({**self.train, **self.by_data.get(data.name, {}), **chosen})

    def build(self, data: Dataset, **options: Any) -> Flow:
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


def _glow(data: Dataset) -> dict[str, Any]:
    shape = data.event_shape
    if len(shape) != 3:
        raise RunError(f"Glow: examples of {data.name} have shape {shape}, expected images (channels, height, width)")
    scales = 0
    while scales < 3 and all(s % 2 ** (scales + 1) == 0 and s >= 4 * 2**scales for s in shape[1:]):
        scales += 1
    return {"event_shape": shape, "scales": max(scales, 1), "steps": 8, "channels": 64}


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
    "glow": Recipe(
        Glow,
        _glow,
        "image",
        train={"epochs": 50, "batch": 64, "lr": 2e-3, "warmup": 50, "ema": 0.99, "patience": 15, "init_examples": 512},
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

    model: Flow
    config: dict[str, Any]

    @property
    def levels(self) -> int | None:
        """Levels of the data it was trained on."""
        return self.config["data"]["levels"]

    def data(self, source: str | None = None) -> Dataset:
        """The run's data, or another source's, which must have the same event shape and levels."""
        about = self.config["data"]
        data = load_as(source or about["source"], about["form"])
        if list(data.event_shape) != about["event_shape"] or data.levels != about["levels"]:
            raise RunError(
                f"{source or about['source']}: examples of shape {data.event_shape} with levels {data.levels},"
                f" expected shape {tuple(about['event_shape'])} with levels {about['levels']} as in training"
            )
        return data


def load_run(out: str | Path, weights: str = "best", device: str = "cpu") -> Run:
    """Read a run folder, with its ``"best"`` weights on validation data or its ``"last"`` ones.

    Raises :class:`RunError` where a file is missing, damaged, or does not fit the model.
    """
    out = Path(out)
    config = read_config(out)
    try:
        model = recipe(config["model"]).model.from_config(config["model_config"])
        config["data"]["source"], config["data"]["form"], config["data"]["event_shape"], config["data"]["levels"]
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
