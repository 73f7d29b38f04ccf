"""What experiments on trained models share: a run folder per case, measured once, and one distance of samples.

A case is trained by `ddpm.train` in a folder of its own, so that an experiment may be stopped at any moment and goes on
where it was; what has been measured of it lies in the same folder and is not measured again.
"""

import json
import sys

import numpy as np

from ddpm import train
from ddpm.metrics import frechet_distance
from ddpm.runs import RunFolder, write_atomically

COMPONENTS = 64


def trained(folder, train_flags):
    """The RunFolder of a run that has all its steps: trained with those flags of `ddpm.train`, or gone on with."""
    if not (folder / "config.json").exists():
        status = train.main(["--samples", "0", "--out", str(folder), *train_flags])
    else:
        run = RunFolder.open(folder)
        finished = bool(run.metrics()) and run.metrics()[-1]["step"] >= run.config.steps
        status = 0 if finished else train.main(["--resume", str(folder)])
    if status:
        sys.exit(status)
    return RunFolder.open(folder)


def kept(path, measure):
    """(row, arrays), a dictionary and arrays by name: what `measure()` returned once and the file `path` keeps."""
    if not path.exists():
        row, arrays = measure()
        write_atomically(path, lambda file: np.savez_compressed(file, row=json.dumps(row), **arrays))
    with np.load(path) as found:
        return json.loads(str(found["row"])), {name: found[name] for name in found.files if name != "row"}


def pixel_frechet(train_images, test_images, images):
    """Frechet distance between samples and test images in the principal components of the training images."""
    flat = train_images.reshape(len(train_images), -1)
    mean = flat.mean(axis=0)
    axes = np.linalg.svd(flat - mean, full_matrices=False)[2][:COMPONENTS].T

    def gaussian(x):
        features = (x.reshape(len(x), -1) - mean) @ axes
        return features.mean(axis=0), np.cov(features.T)

    return frechet_distance(*gaussian(images), *gaussian(test_images))
