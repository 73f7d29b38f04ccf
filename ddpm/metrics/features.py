"""Features to compare sets of images in: those of a small classifier of the same kind of images.

The Frechet distance of pixels sees brightness and blur before shapes. A classifier's features see what tells classes
apart. FID is this distance in the features of an Inception network; ours are those of `nn.Classifier`, trained by
`python -m experiments.classifier` and shipped beside this file, so that the distance goes by the classifier's name and
not by FID's: figures are comparable with one another, not with published ones.
"""

from pathlib import Path

import numpy as np

import nn
from ddpm.data import scale
from ddpm.metrics.frechet import frechet_distance
from nn.backend import array_module, to_host

WEIGHTS = Path(__file__).parent / "weights"
TRAINED_ON = {"mnist": "mnist", "mnist5k": "mnist", "fashion-mnist": "fashion-mnist", "cifar10": "cifar10"}


def load_classifier(data_name):
    """The shipped classifier for images of `data_name`, in evaluation mode; and its metadata, accuracy and all.

    ValueError, with the names there are, where none has been trained.
    """
    path = WEIGHTS / f"{TRAINED_ON.get(data_name)}.safetensors"
    if not path.exists():
        raise ValueError(f"no classifier has been trained on {data_name!r}, only on "
                         f"{', '.join(sorted(name for name, on in TRAINED_ON.items() if _shipped(on)))}; "
                         "train one with python -m experiments.classifier")
    arrays, metadata = nn.load(path)
    net = nn.Classifier(metadata["channels"], metadata["classes"], widths=metadata["widths"],
                        groups=metadata["groups"], rng=np.random.default_rng(0))
    net.load(arrays)
    return net.eval(), metadata


def image_features(classifier, images, chunk=250):
    """Features (N, F) of images in [-1, 1] (float) or of pixel levels 0..255 (uint8), float64 on the host."""
    parts = []
    for start in range(0, len(images), chunk):
        x = images[start:start + chunk]
        x = scale(x) if x.dtype == np.uint8 else x.astype(np.float32)
        parts.append(to_host(classifier.features(array_module(x).ascontiguousarray(x))))
    return np.concatenate(parts).astype(np.float64)


def moments(features):
    """(mean (F,), covariance (F, F)) of features (N, F); ValueError for fewer than two rows."""
    if len(features) < 2:
        raise ValueError(f"moments need at least two images, got {len(features)}")
    return features.mean(axis=0), np.cov(features, rowvar=False)


def classifier_frechet(classifier, images, others):
    """Frechet distance of two sets of images in the classifier's features, squared feature units (C18).

    It is biased upwards by the finite number of images, by about the same for equal numbers: compare like with like.
    """
    return frechet_distance(*moments(image_features(classifier, images)), *moments(image_features(classifier, others)))


def jackknifed_frechet(features, mu, cov, groups=16, minus=None, block=1):
    """Frechet distance of features (N, F) to N(mu, cov) without the bias of a small N, and its standard error (C18).

    With `minus`, the features of as many other images, it is the difference of the two distances. Where image i of both
    comes from the same noise, the error of the difference is far smaller than that of either. `block` images in a row
    stay together: the number of classes where they come in turn, since balanced samples scatter less than independent
    ones, and the parts that are left out have to be balanced too.

    The bias of a distance between estimated moments falls as 1/N. Leaving out each of `groups` interleaved parts in
    turn shows it: with d the distance of all features and d_i that without part i, groups d - (groups-1) mean d_i is
    free of it to first order, and the scatter of the d_i is the error. ValueError for fewer than 2 features, or
    a block, in a part, and for a `minus` of another shape.
    """
    if len(features) < max(2, block) * groups:
        raise ValueError(f"jackknifed_frechet needs at least {max(2, block) * groups} features for {groups} parts, "
                         f"got {len(features)}")
    if minus is not None and minus.shape != features.shape:
        raise ValueError(f"jackknifed_frechet: minus must be as many features, {features.shape}, got {minus.shape}")

    def distance(rows):
        found = frechet_distance(*moments(features[rows]), mu, cov)
        return found if minus is None else found - frechet_distance(*moments(minus[rows]), mu, cov)
    every = np.arange(len(features))
    part = every // block % groups
    whole, without = distance(every), np.array([distance(every[part != i]) for i in range(groups)])
    error = ((groups - 1) / groups * ((without - without.mean())**2).sum())**0.5
    return groups * whole - (groups - 1) * float(without.mean()), float(error)


def _shipped(name):
    return (WEIGHTS / f"{name}.safetensors").exists()
