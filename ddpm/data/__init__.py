"""Images to learn from: `load(name)` gives a `Dataset`, whose pixels stay whole numbers until a batch is scaled.

A pixel holds one of `levels` values 0..levels-1 (256 for 8-bit images). Networks see

    x = 2 v / (levels - 1) - 1   in [-1, 1]

so that one level is a bin of width 2/(levels-1), over which the decoder's likelihood integrates (L09). Train and test
parts are those of the official files; where a set has none, they are fixed by hashes: no seed, no library version moves
an image from one side to the other.
"""

from dataclasses import dataclass, field

import numpy as np

from nn.backend import array_module

NAMES = ("mnist5k", "digits", "mnist", "fashion-mnist", "cifar10", "svhn")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory; the arrays are read-only.

    Attributes
    ----------
    name : str
    train_images, test_images : uint8 array (N, H, W, C), values 0..levels-1
    train_labels, test_labels : int64 array (N,), or None where there are no classes
    levels : int
        Number of values that a pixel can take.
    label_names : tuple of str
        What the labels 0, 1, ... stand for.
    """

    name: str
    train_images: np.ndarray = field(repr=False)
    train_labels: np.ndarray | None = field(repr=False)
    test_images: np.ndarray = field(repr=False)
    test_labels: np.ndarray | None = field(repr=False)
    levels: int = 256
    label_names: tuple[str, ...] = tuple("0123456789")

    def __post_init__(self):
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            if part is not None:
                part.flags.writeable = False

    @property
    def image_shape(self):
        """(H, W, C)."""
        return self.train_images.shape[1:]

    @property
    def bin_width(self):
        """Width of one pixel level on the [-1, 1] scale (L09)."""
        return bin_width(self.levels)

    def scale(self, images):
        """`scale` with this data set's levels."""
        return scale(images, self.levels)

    def unscale(self, x):
        """`unscale` with this data set's levels."""
        return unscale(x, self.levels)


def bin_width(levels):
    """2/(levels-1): 2/255 for 8-bit images (L09)."""
    return 2 / (levels - 1)


def scale(images, levels=256):
    """x = 2 v/(levels-1) - 1 in float32, for whole numbers v in 0..levels-1: levels 0 and levels-1 become -1 and 1."""
    return images.astype(np.float32) * np.float32(bin_width(levels)) - 1


def unscale(x, levels=256):
    """The nearest pixel levels of x, as uint8; what lies outside [-1, 1] goes to its end."""
    xp = array_module(x)
    return xp.clip(xp.rint((x + 1) / bin_width(levels)), 0, levels - 1).astype(np.uint8)


def load(name, data_dir=None):
    """The data set `name`: one of NAMES or "folder:PATH".

    Parameters
    ----------
    name : str
    data_dir : str or Path, optional
        Where official files lie, directly or in a folder named after the data set. Looked through next: $DDPM_DATA,
        pooch's cache; then the files are downloaded into that cache, checked against their published checksums.

    Raises ValueError, in one sentence, for an unknown name, and for files that are missing, cut off or not what their
    name says.
    """
    from ddpm.data import local, official
    match name:
        case "mnist5k":
            return local.load_mnist5k()
        case "digits":
            return local.load_digits()
        case "mnist" | "fashion-mnist":
            return official.load_idx(name, data_dir)
        case "cifar10":
            return official.load_cifar10(data_dir)
        case "svhn":
            return official.load_svhn(data_dir)
    if name.startswith("folder:"):
        return local.load_folder(name)
    raise ValueError(f"--data must be one of {', '.join(NAMES)} or folder:PATH, got {name!r}")
