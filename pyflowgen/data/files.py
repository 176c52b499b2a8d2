"""A user's own data: a folder of images, NumPy arrays, CSV and Parquet tables."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyflowgen.data.dataset import DataError, Dataset, check_path, split

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


def image_folder(path: str | Path) -> Dataset:
    """Every image below a folder as ``(channels, height, width)`` with 256 levels: 1 channel if all are grey, else 3.

    All must have the same size; :class:`DataError` names the first file that does not, or that cannot be read.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(f"{path}: reading images needs the package pillow (pip install pillow)") from None
    folder = check_path(path)
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in IMAGES and f.is_file())
    if not files:
        raise DataError(f"{folder}: no images in it (looked for {', '.join(sorted(IMAGES))})")
    pictures: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file) as image:
                grey = image.mode in ("1", "L", "LA")
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"{file}: mode {image.mode} (more than 8 bits), expected 8-bit grey or RGB")
                picture = np.asarray(image.convert("L" if grey else "RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
            raise DataError(f"{file}: cannot be read as an image ({reason})") from None
        if pictures and picture.shape[:2] != pictures[0].shape[:2]:
            (h, w), (h0, w0) = picture.shape[:2], pictures[0].shape[:2]
            raise DataError(f"{file}: {w}×{h} pixels, expected {w0}×{h0} as in {files[0].name}")
        pictures.append(picture)
    if any(p.ndim == 3 for p in pictures):
        pictures = [p if p.ndim == 3 else p[..., None].repeat(3, 2) for p in pictures]
    return _pictures(folder.name, folder, np.stack(pictures))


def array_file(path: str | Path) -> Dataset:
    """``.npy`` or ``.npz``: the first dimension counts examples, uint8 means 256 levels, anything else is continuous.

    uint8 arrays of shape ``(n, h, w)``, ``(n, h, w, c)`` or ``(n, c, h, w)``, c = 1 or 3, are images. An ``.npz`` has
    one array, or arrays named ``train``, ``valid`` and ``test``.
    """
    path = check_path(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = dict(loaded) if isinstance(loaded, np.lib.npyio.NpzFile) else {"": loaded}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        reason = "pickled objects" if "allow_pickle" in str(error) else str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read as NumPy data ({reason}), expected an array of numbers") from None
    parts = ("train", "valid", "test")
    if set(arrays) >= set(parts):
        sets = [_array(path, arrays[key], f"{key} has ") for key in parts]
        if len({(s.event_shape, s.levels) for s in sets}) > 1:
            shapes = ", ".join(f"{key} {arrays[key].dtype} {arrays[key].shape[1:]}" for key in parts)
            raise DataError(f"{path}: train, valid and test differ in shape or type ({shapes})")
        train, valid, test = (torch.cat([s.train, s.valid, s.test]) for s in sets)
        return Dataset(path.stem, train, valid, test, levels=sets[0].levels, image_shape=sets[0].image_shape)
    if len(arrays) != 1:
        raise DataError(f"{path}: arrays {', '.join(sorted(arrays)) or 'none'}, expected one, or train, valid and test")
    return _array(path, *arrays.values())


def table_file(path: str | Path) -> Dataset:
    """CSV (with or without a header line) or Parquet: one example a row, only numbers, none missing. Needs pandas."""
    path = check_path(path)
    try:
        import pandas
    except ImportError:
        raise DataError(f"{path}: reading tables needs the package pandas (pip install 'pyflowgen[table]')") from None
    try:
        if path.suffix.lower() == ".csv":
            frame = pandas.read_csv(path)
            if all(_is_number(name) for name in frame.columns):
                frame = pandas.read_csv(path, header=None)
        else:
            frame = pandas.read_parquet(path)
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs the package pyarrow (pip install 'pyflowgen[table]')") from None
    except (ValueError, OSError) as error:  # pandas' and pyarrow's parsing errors are both ValueErrors
        raise DataError(f"{path}: cannot be read as a table ({str(error).splitlines()[0]})") from None
    if frame.empty:
        raise DataError(
            f"{path}: a table of {len(frame)} rows and {len(frame.columns)} columns, expected at least 10 rows"
        )
    for name, column in frame.items():
        if not pandas.api.types.is_numeric_dtype(column):
            row, value = next(((i, v) for i, v in enumerate(column) if not _is_number(v)), (0, None))
            raise DataError(f"{path}: column {name!r} is not numeric (row {row + 1}: {value!r}), expected numbers only")
    return _array(path, frame.to_numpy(dtype=np.float64, na_value=np.nan), names=list(frame.columns))


def _is_number(name: Any) -> bool:
    try:
        float(name)
    except (TypeError, ValueError):
        return False
    return True


def _pictures(name: str, path: Path, array: np.ndarray) -> Dataset:
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] not in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1] not in (1, 3):
        raise DataError(f"{path}: images with {array.shape[1]} channels, expected 1 or 3")
    shape = (int(array.shape[1]), int(array.shape[2]), int(array.shape[3]))
    return split(name, torch.from_numpy(np.ascontiguousarray(array)), levels=256, image_shape=shape)


def _array(path: Path, array: np.ndarray, prefix: str = "", names: list[Any] | None = None) -> Dataset:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: {prefix}dtype {array.dtype}, expected numbers")
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{path}: {prefix}shape {array.shape}, expected (examples, features…)")
    if array.dtype == np.uint8:
        if array.ndim in (3, 4):
            return _pictures(path.stem, path, array)
        return split(path.stem, torch.from_numpy(array), levels=256)
    bad = np.argwhere(~np.isfinite(array.reshape(len(array), -1)))
    if len(bad):
        row, column = bad[0]
        rows = len(np.unique(bad[:, 0]))
        where = f"column {names[column]!r}" if names else f"feature {column}"
        raise DataError(
            f"{path}: {prefix}NaN or infinite values in {rows} of {len(array)} rows (first: row {row + 1}, {where}),"
            " expected finite numbers"
        )
    with np.errstate(over="ignore"):
        examples = torch.from_numpy(array.astype(np.float32))
    if not examples.isfinite().all():
        raise DataError(f"{path}: {prefix}values beyond ±3.4e38, expected numbers that fit float32")
    return split(path.stem, examples)
