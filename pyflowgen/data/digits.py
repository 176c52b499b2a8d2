"""scikit-learn's handwritten digits: 1797 pictures of 8×8 pixels with 17 levels. Needs no download."""

from __future__ import annotations

import torch

from pyflowgen.data.dataset import Dataset, split


def digits() -> Dataset:
    """Digits as vectors of 64 levels 0…16: 1197 to train, 200 to validate, 400 to test; ``.image()`` makes them 1×8×8.

    >>> from pyflowgen.data import digits
    >>> tuple(digits().test.shape), int(digits().train.max())
    ((400, 64), 16)
    """
    from sklearn.datasets import load_digits

    pixels = torch.from_numpy(load_digits().data).to(torch.uint8)
    return split("digits", pixels, levels=17, image_shape=(1, 8, 8), sizes=(1197, 200))
