"""Patches of scikit-learn's two colour photographs. Needs no download."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from pyflowgen.data.dataset import Dataset

SIZE, BITS = 16, 5


def photos() -> Dataset:
    """Patches of 3×16×16 pixels with 5 bits: one photograph to train and validate, the other to test.

    Training patches lie 4 pixels apart in the left four fifths of the temple. Each is turned, mirrored, its colours are
    permuted and its levels inverted, or not, by a fixed draw: the flower's colours are others than the temple's.
    Validation patches are those of the rest, side by side, none of whose pixels is in a training patch; test patches
    are those of the flower, side by side.

    >>> from pyflowgen.data import photos
    >>> data = photos()
    >>> data.event_shape, data.levels, len(data.train), len(data.valid), len(data.test)
    ((3, 16, 16), 32, 12875, 208, 1040)
    """
    from sklearn.datasets import load_sample_images

    temple, flower = (
        torch.from_numpy(image.copy()).permute(2, 0, 1) >> (8 - BITS) for image in load_sample_images().images
    )
    border = temple.shape[2] * 4 // 5 // SIZE * SIZE
    train, valid = _varied(_patches(temple[:, :, :border], 4)), _patches(temple[:, :, border:], SIZE)
    return Dataset("photos", train, valid, _patches(flower, SIZE), levels=2**BITS, image_shape=(3, SIZE, SIZE))


def _patches(image: torch.Tensor, step: int) -> torch.Tensor:
    cut = image.unfold(1, SIZE, step).unfold(2, SIZE, step)  # (3, rows, columns, 16, 16)
    return cut.permute(1, 2, 0, 3, 4).reshape(-1, 3, SIZE, SIZE).contiguous()


def _varied(patches: torch.Tensor) -> torch.Tensor:
    draw = torch.from_numpy(np.random.RandomState(0).permutation(len(patches)))  # the same with every version
    orders = torch.tensor(list(itertools.permutations(range(3))))[draw % 6]
    patches = patches.gather(1, orders[:, :, None, None].expand_as(patches))
    for bit, change in enumerate(
        (lambda p: p.flip(2), lambda p: p.flip(3), lambda p: p.transpose(2, 3), lambda p: 2**BITS - 1 - p)
    ):
        chosen = (draw // 6 >> bit) % 2 == 1
        patches[chosen] = change(patches[chosen])
    return patches
