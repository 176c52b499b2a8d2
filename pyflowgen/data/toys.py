"""Densities in two dimensions, drawn with a fixed seed."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from pyflowgen.data.dataset import Dataset


def _normal(n: int, g: Generator) -> Tensor:
    return torch.randn(n, 2, generator=g)


def _uniform(n: int, g: Generator) -> Tensor:
    return torch.rand(n, generator=g)


def _which(n: int, kinds: int, g: Generator) -> Tensor:
    return torch.randint(kinds, (n,), generator=g)


def _banana(n: int, g: Generator) -> Tensor:
    u, v = _normal(n, g).unbind(1)
    return torch.stack([u, v + u * u], 1)


def _moons(n: int, g: Generator) -> Tensor:
    angle, lower = math.pi * _uniform(n, g), _which(n, 2, g).float()
    x = (1 - 2 * lower) * angle.cos() + lower
    y = (1 - 2 * lower) * angle.sin() + 0.5 * lower
    return torch.stack([x, y], 1) + 0.1 * _normal(n, g)


def _rings(n: int, g: Generator) -> Tensor:
    radius, angle = 1.0 + _which(n, 4, g), 2 * math.pi * _uniform(n, g)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * _normal(n, g)


def _checkerboard(n: int, g: Generator) -> Tensor:
    column, pair = _which(n, 4, g), _which(n, 2, g)
    row = 2 * pair + column % 2
    return torch.stack([column + _uniform(n, g), row + _uniform(n, g)], 1) - 2


def _spirals(n: int, g: Generator) -> Tensor:
    angle, side = 3 * math.pi * _uniform(n, g).sqrt(), 2.0 * _which(n, 2, g) - 1
    return (side * angle / 3)[:, None] * torch.stack([-angle.cos(), angle.sin()], 1) + 0.1 * _normal(n, g)


TOYS: dict[str, Callable[[int, Generator], Tensor]] = {
    "banana": _banana,
    "moons": _moons,
    "rings": _rings,
    "checkerboard": _checkerboard,
    "spirals": _spirals,
}


def toy(name: str, count: int = 20_000, seed: int = 0) -> Dataset:
    """``count`` training points of ``banana``, ``moons``, ``rings``, ``checkerboard`` or ``spirals``; besides,
    a tenth as many for validation and half as many for test.

    ``banana`` is ``(u, v + u²)`` for standard normal u, v: its entropy is ``ln(2πe)`` = 2.838 nats, and minus that
    is the highest mean log-likelihood any model can reach on it.

    >>> from pyflowgen.data import toy
    >>> tuple(toy("banana", 1000).train.shape), toy("moons").event_shape
    ((1000, 2), (2,))
    """
    if name not in TOYS:
        raise ValueError(f"toy: name {name!r}, expected one of {', '.join(TOYS)}")
    if count < 10:
        raise ValueError(f"toy: count {count}, expected at least 10")
    generator = torch.Generator().manual_seed(seed)
    train, valid, test = (TOYS[name](n, generator) for n in (count, count // 10, count // 2))
    return Dataset(name, train, valid, test)
