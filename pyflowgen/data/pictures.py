"""Samples as one PNG: a grid of images, or a map of the density of points in the plane."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyflowgen.data.dataset import DataError


def save_grid(
    samples: Tensor, path: str | Path, *, levels: int | None, image_shape: tuple[int, int, int] | None
) -> None:
    """Write ``samples`` (first dimension: examples) as a picture.

    Images, stored as levels ``0 … levels-1`` or, without levels, as numbers in [0, 1], become a grid, nearly square;
    points in the plane become a two-dimensional histogram. Anything else, and an ending that is no image's, is a
    :class:`DataError`.
    """
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"{path}: drawing needs the package pillow (pip install pillow)") from None
    if image_shape is not None:
        pixels = _tiles(samples.reshape(-1, *image_shape).float() / (levels - 1 if levels else 1))
    elif samples.ndim == 2 and samples.shape[1] == 2 and levels is None:
        pixels = _histogram(samples.float())
    else:
        raise DataError(
            f"{path}: a grid needs images or points in the plane, not examples of shape {tuple(samples.shape[1:])}"
        )
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise DataError(f"{path}: ending {Path(path).suffix or 'none'}, expected an image's, such as .png")
    array: Any = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(path)


def _tiles(images: Tensor) -> Tensor:
    count, channels, height, width = images.shape
    scale = max(1, 48 // max(height, width))  # small digits would be specks
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width, gap = height * scale, width * scale, max(1, scale // 2)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 0.5)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image.permute(1, 2, 0)
    return sheet


def _histogram(points: Tensor, size: int = 256) -> Tensor:
    points = points[points.isfinite().all(1)]
    if not len(points):
        raise DataError("no finite sample to draw")
    # a few far samples must not shrink the rest to a dot
    low, high = points.quantile(0.001, 0), points.quantile(0.999, 0)
    middle, half = (low + high) / 2, (high - low).max().clamp_min(1e-6) * 0.55
    place = ((points - middle + half) / (2 * half) * size).long()
    place = place[((place >= 0) & (place < size)).all(1)]
    counts = torch.bincount((size - 1 - place[:, 1]) * size + place[:, 0], minlength=size * size)
    return (counts / counts.max().clamp_min(1)).sqrt().view(size, size, 1)
