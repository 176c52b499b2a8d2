"""What every data set is after loading: three tensors, and what is needed to turn them into densities and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used: one line naming the file, what is wrong with it, and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Train, validation and test examples as whole tensors of shape ``(examples, *event_shape)``.

    With ``levels`` set, the tensors hold the integers ``0 … levels-1`` as uint8; training adds uniform noise and
    divides by ``levels`` (:meth:`dequantize`), so that densities live on [0, 1]. Otherwise they are float32.
    ``image_shape`` is ``(channels, height, width)`` where an example is a picture, also when it is stored flat.

    >>> from pyflowgen.data import digits
    >>> data = digits()
    >>> data.event_shape, data.image().event_shape, len(data.train), data.levels
    ((64,), (1, 8, 8), 1197, 17)
    """

    name: str
    train: Tensor
    valid: Tensor
    test: Tensor
    levels: int | None = None
    image_shape: tuple[int, int, int] | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.shape[1:])

    def facts(self) -> dict[str, Any]:
        """What a run's ``config.json`` keeps of its data."""
        shape = None if self.image_shape is None else list(self.image_shape)
        sizes = [len(t) for t in (self.train, self.valid, self.test)]
        return {
            "name": self.name, "levels": self.levels, "event_shape": list(self.event_shape),
            "image_shape": shape, "sizes": sizes,
        }  # fmt: skip

    def flat(self) -> Dataset:
        """The same examples as vectors."""
        return self._each(lambda t: t.flatten(1))

    def image(self) -> Dataset:
        """The same examples as ``(channels, height, width)``; :class:`DataError` where they are no pictures."""
        shape = self.image_shape
        if shape is None:
            raise DataError(f"{self.name}: examples of shape {self.event_shape} are no images")
        return self._each(lambda t: t.reshape(-1, *shape))

    def to(self, device: torch.device | str) -> Dataset:
        """The same examples on another device."""
        return self._each(lambda t: t.to(device))

    def dequantize(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """``(x + u) / levels`` with ``u ~ U[0, 1)`` for data with levels; ``x`` itself for continuous data."""
        if self.levels is None:
            return x
        noise = torch.rand(x.shape, generator=generator, device=x.device)
        # x + u can round up to x + 1, and with it the highest level to exactly 1, where a logit is infinite
        return ((x + noise) / self.levels).clamp_(max=1 - 2.0**-24)

    def quantize(self, y: Tensor) -> Tensor:
        """Back from [0, 1] to levels (uint8); continuous data unchanged."""
        return y if self.levels is None else (y * self.levels).floor().clamp(0, self.levels - 1).to(torch.uint8)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Dataset:
        return replace(self, train=change(self.train), valid=change(self.valid), test=change(self.test))


def split(
    name: str,
    examples: Tensor,
    levels: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    sizes: tuple[int, int] | None = None,
) -> Dataset:
    """Shuffle with ``RandomState(0)`` and cut into train, validation and test: ``sizes`` of the first two, or 80/10/10.

    The permutation comes from NumPy's frozen legacy generator, so a split is the same on every machine and version.
    """
    count = len(examples)
    if count < 10:
        raise DataError(f"{name}: {count} examples, at least 10 are needed for train, validation and test")
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    first, second = sizes or (count - 2 * (count // 10), count // 10)
    parts = order[:first], order[first : first + second], order[first + second :]
    train, valid, test = (examples[i] for i in parts)
    return Dataset(name, train, valid, test, levels=levels, image_shape=image_shape)


def check_path(path: str | Path) -> Path:
    """The path if something is there, else :class:`DataError`."""
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    return path
