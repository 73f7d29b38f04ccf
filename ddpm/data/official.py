"""The official files of MNIST, Fashion-MNIST, CIFAR-10 and SVHN: where they are found, and what is in them.

Looked through in turn: `--data-dir`, $DDPM_DATA, pooch's cache; in each, a folder named after the data set, then the
place itself. What is missing is downloaded into the cache, against the checksums that its publishers give. Files that
somebody put there are judged by their content instead: re-compressed copies are as good.
"""

import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

from ddpm.data import Dataset
from ddpm.data.formats import bins_in_tar, read_bytes, read_cifar_bin, read_idx, read_svhn


class Remote(NamedTuple):
    """An official file: its name, the address of the folder it is in, and its MD5 checksum."""

    file: str
    address: str
    md5: str


MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CIFAR = "https://www.cs.toronto.edu/~kriz/"
SVHN = "http://ufldl.stanford.edu/housenumbers/"

FILES = {
    "mnist": (Remote("train-images-idx3-ubyte.gz", MNIST, "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
              Remote("train-labels-idx1-ubyte.gz", MNIST, "d53e105ee54ea40749a09fcbcd1e9432"),
              Remote("t10k-images-idx3-ubyte.gz", MNIST, "9fb629c4189551a2d022fa330f9573f3"),
              Remote("t10k-labels-idx1-ubyte.gz", MNIST, "ec29112dd5afa0611ce80d1b7f02629c")),
    "fashion-mnist": (Remote("train-images-idx3-ubyte.gz", FASHION, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
                      Remote("train-labels-idx1-ubyte.gz", FASHION, "25c81989df183df01b3e8a0aad5dffbe"),
                      Remote("t10k-images-idx3-ubyte.gz", FASHION, "bef4ecab320f06d8554ea6380940ec79"),
                      Remote("t10k-labels-idx1-ubyte.gz", FASHION, "bb300cfdad3c16e7a12a480ee83cd310")),
    "cifar10": (Remote("cifar-10-binary.tar.gz", CIFAR, "c32a1d4ab5d03f1284b67883e8d87530"),),
    "svhn": (Remote("train_32x32.mat", SVHN, "e26dedcc434d2e4c54c9b2d4a06d8373"),
             Remote("test_32x32.mat", SVHN, "eb5a983be6a315427106f1b164d9cef3")),
}

CIFAR_BINS = tuple(f"data_batch_{i}.bin" for i in range(1, 6)) + ("test_batch.bin",)

FASHION_NAMES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                 "ankle boot")
CIFAR_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

FIRST_LABELS = {"mnist": (5, 0, 4, 1, 9, 2, 1, 3, 1, 4), "fashion-mnist": (9, 0, 0, 3, 0, 2, 7, 2, 5, 5)}
"""How the training labels begin: the two sets have files of the same names and sizes, and must not be confused."""


# ---- data sets

def load_idx(name, data_dir):
    """MNIST or Fashion-MNIST: 60,000 + 10,000 gray images, 28 x 28."""
    paths = fetch(name, data_dir)
    images, labels = [read_idx(path, axes=3) for path in paths[::2]], [read_idx(path, axes=1) for path in paths[1::2]]
    for image, label, path in zip(images, labels, paths[1::2], strict=True):
        if len(image) != len(label):
            raise ValueError(f"{path} holds {len(label)} labels for {len(image)} images; the two files must belong "
                             "together")
    for other in FIRST_LABELS.keys() - {name}:
        if tuple(labels[0][:10].tolist()) == FIRST_LABELS[other]:
            raise ValueError(f"{paths[1]} belongs to {other}, not to {name}; put each into a folder named after it")
    if images[0].shape[1:] != images[1].shape[1:]:
        raise ValueError(f"{paths[0]} and {paths[2]} hold images of different sizes, {images[0].shape[1:]} and "
                         f"{images[1].shape[1:]}; the two files must belong together")
    (train, test), (train_labels, test_labels) = images, (label.astype(np.int64) for label in labels)
    names = {"label_names": FASHION_NAMES} if name == "fashion-mnist" else {}
    return Dataset(name, train[..., None], train_labels, test[..., None], test_labels, **names)


def load_cifar10(data_dir):
    """CIFAR-10, binary version: 50,000 + 10,000 RGB images, 32 x 32; the extracted .bin files or the archive."""
    folder = _folder_with_bins(data_dir)
    if folder:
        contents = {file: read_bytes(folder / file) for file in CIFAR_BINS}
    else:
        folder, = fetch("cifar10", data_dir)
        contents = bins_in_tar(folder, CIFAR_BINS)
    parts = [read_cifar_bin(contents[file], folder / file) for file in CIFAR_BINS]
    train, train_labels = (np.concatenate(arrays) for arrays in zip(*parts[:5], strict=True))
    return Dataset("cifar10", train, train_labels, *parts[5], label_names=CIFAR_NAMES)


def load_svhn(data_dir):
    """SVHN, cropped digits: 73,257 + 26,032 RGB images, 32 x 32."""
    train, test = (read_svhn(path) for path in fetch("svhn", data_dir))
    return Dataset("svhn", *train, *test)


# ---- files

def fetch(name, data_dir=None):
    """Paths of the official files of `name`, in the order of FILES; downloads what is not found.

    ValueError, naming the files wanted and where to put them, if that fails.
    """
    places = _places(name, data_dir)
    found = {remote: _find(remote.file, places) for remote in FILES[name]}
    missing = [remote for remote, path in found.items() if path is None]
    for remote in missing:
        try:
            found[remote] = _download(name, remote)
        except Exception as error:                            # pooch, requests, urllib3: each has its own family
            wanted = ", ".join(r.file for r in missing) + (" or its .bin files" if name == "cifar10" else "")
            raise ValueError(f"the data set {name} needs {wanted}, found neither in "
                             f"{', '.join(map(str, places[1::2]))} nor on the network ({_reason(error, remote)}); put "
                             "what is missing into a folder and name it with --data-dir or $DDPM_DATA") from None
    return list(found.values())


def _places(name, data_dir):
    """Folders to look into, best first."""
    import pooch
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise ValueError(f"--data-dir {data_dir} is not a folder; name one that holds the files of {name}")
    roots = [Path(root).expanduser() for root in (data_dir, os.environ.get("DDPM_DATA")) if root]
    return [place for root in (*roots, Path(pooch.os_cache("diffusion-by-hand"))) for place in (root / name, root)]


def _find(file, places):
    """The file, or its decompressed twin, in the first place that has one; None if nowhere."""
    names = (file, file.removesuffix(".gz"))
    return next((place / n for place in places for n in names if (place / n).is_file()), None)


def _folder_with_bins(data_dir):
    folders = [f for place in _places("cifar10", data_dir) for f in (place, place / "cifar-10-batches-bin")]
    return next((f for f in folders if all((f / file).is_file() for file in CIFAR_BINS)), None)


def _download(name, remote):
    """The file from its publisher, in pooch's cache; an exception if it does not arrive or its checksum is another."""
    import pooch
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=10)
    return Path(pooch.retrieve(remote.address + remote.file, f"md5:{remote.md5}", fname=remote.file,
                               path=Path(pooch.os_cache("diffusion-by-hand")) / name, downloader=downloader))


def _reason(error, remote):
    if isinstance(error, ValueError) and "hash" in str(error):
        return f"{remote.file} arrived with another checksum than its publishers give"
    return getattr(error, "strerror", None) or f"{type(error).__name__} at {urlsplit(remote.address).netloc}"
