"""What several models are put together from."""

from __future__ import annotations

from typing import Literal

import torch

from pyflowgen.bijection import Bijection
from pyflowgen.layers import Dequantize, Logit, Permutation
from pyflowgen.ops.invertible_linear import InvertibleLinear

Mixing = Literal["random", "reverse", "lu", "none"]
_MIXINGS = ("random", "reverse", "lu", "none")


def to_reals(levels: int | None, alpha: float | None, event_dim: int) -> list[Bijection]:
    """From the data to the real line: `Dequantize(levels)` integers, `Logit(alpha)` [0, 1]; None leaves one out."""
    layers: list[Bijection] = []
    if levels is not None:
        layers.append(Dequantize(levels, event_dim=event_dim))
    if alpha is not None:
        layers.append(Logit(alpha, event_dim=event_dim))
    return layers


def check_mixing(kind: str, owner: str) -> None:
    """A ValueError naming `owner` where `kind` is no kind of mixing."""
    if kind not in _MIXINGS:
        raise ValueError(f"{owner}: permutation is {kind!r}, expected one of {_MIXINGS}")


def mixing(kind: Mixing, features: int, seed: int) -> list[Bijection]:
    """What stands between two pairs of couplings on vectors, drawn from `seed`."""
    if kind == "random":
        return [Permutation.random(features, seed=seed)]
    if kind == "lu":
        return [InvertibleLinear(features, generator=torch.Generator().manual_seed(seed))]
    return [Permutation.reverse(features)] if kind == "reverse" else []
