"""Data sets by name, and a user's own files.

>>> from pyflowgen.data import load
>>> load("digits").train.shape
torch.Size([1197, 64])
"""

from __future__ import annotations

from pathlib import Path

from pyflowgen.data.dataset import DataError as DataError
from pyflowgen.data.dataset import Dataset as Dataset
from pyflowgen.data.digits import digits as digits
from pyflowgen.data.files import array_file as array_file
from pyflowgen.data.files import image_folder as image_folder
from pyflowgen.data.files import table_file as table_file
from pyflowgen.data.mnist import idx_folder as idx_folder
from pyflowgen.data.mnist import mnist as mnist
from pyflowgen.data.photos import photos as photos
from pyflowgen.data.streams import Stream as Stream
from pyflowgen.data.streams import Streams as Streams
from pyflowgen.data.streams import is_stream_folder, stream_folder, toy_streams, watch
from pyflowgen.data.toys import TOYS as TOYS
from pyflowgen.data.toys import toy as toy

NAMES = ("digits", "mnist", "photos", *TOYS)
STREAMS = ("watch", "toy-streams")


def load(source: str | Path) -> Dataset:
    """A data set by name (``digits``, ``mnist``, ``photos``, the toys) or from a path: a folder of images or IDX files,
    ``.npy``, ``.npz``, ``.csv``, ``.parquet``. Every fault is a :class:`DataError` of one line.
    """
    if source == "digits":
        return digits()
    if source == "mnist":
        return mnist()
    if source == "photos":
        return photos()
    if str(source) in TOYS:
        return toy(str(source))
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"{source}: no such file or folder, and none of the names {', '.join(NAMES)}")
    if path.is_dir():
        return idx_folder(path) if any(path.glob("*-idx3-ubyte*")) else image_folder(path)
    readers = {".npy": array_file, ".npz": array_file, ".csv": table_file, ".parquet": table_file}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: ending {path.suffix or 'none'}, expected a folder or one of {', '.join(readers)}")
    return readers[path.suffix.lower()](path)


def load_streams(source: str | Path) -> Streams:
    """Labelled streams by name (``watch``, ``toy-streams``) or a folder of videos, see
    :func:`pyflowgen.data.streams.stream_folder`. Every fault is a :class:`DataError` of one line.
    """
    if source == "watch":
        return watch()
    if source == "toy-streams":
        return toy_streams()
    path = Path(source).expanduser()
    if not path.is_dir() or not is_stream_folder(path):
        what = "a folder without one called target or labels" if path.is_dir() else "no folder"
        raise DataError(f"{source}: {what}, expected a folder of videos, or one of the names {', '.join(STREAMS)}")
    return stream_folder(path)
