"""What a run's folder shows of its model: pictures of what it draws, and of how many bits it needs.

`ddpm.train` ends with both, `ddpm.sample` and `ddpm.evaluate` make them anew with other numbers.
"""

import numpy as np

from ddpm import plots
from ddpm.commands import progress_bar
from ddpm.generate import draw_images, trajectory
from ddpm.likelihood import evaluate_bits
from nn.backend import array_module


def draw_samples(denoiser, image_shape, num, folder, group, *, steps, columns=None, **options):
    """Draw `num` images and leave samples.png, and for a gddm uncertainty.png, in `folder`: (images, names written).

    `columns` is that of the grid of samples; the other options are those of `draw_images`.
    """
    options["steps"] = steps
    with progress_bar(num * steps, "sampling", "step") as bar:
        images = draw_images(denoiser, denoiser.schedule, image_shape, num, group, progress=bar.update, **options)
    plots.save(plots.sample_grid(images, columns), folder / "samples.png")
    if denoiser.model != "gddm":
        return images, ["samples.png"]
    seen = trajectory(denoiser, denoiser.schedule, image_shape, min(2, num),
                      xp=array_module(denoiser.network.flat_parameters), **options)
    plots.save(plots.uncertainty_along(*seen), folder / "uncertainty.png")
    return images, ["samples.png", "uncertainty.png"]


def one_of_each(label_names, num):
    """Options of `draw_samples` for `num` images of all classes in turn, each in a column; none without label names."""
    classes = len(label_names or ())
    return {"labels": np.arange(num) % classes, "columns": classes} if classes else {}


def measure_bits(denoiser, dataset, num, folder, group, *, variance, strata, seed=0):
    """Bits/dim of the first `num` test images (`ddpm.likelihood.Bits`); leaves bits.png in `folder`."""
    images = dataset.test_images[:num]
    with progress_bar(len(images), "bits/dim", "image") as bar:
        bits = evaluate_bits(denoiser, denoiser.schedule, images, dataset.scale, group, progress=bar.update,
                             variance=variance, bin_width=dataset.bin_width, strata=strata, seed=seed)
    plots.save(plots.bits_curve(bits), folder / "bits.png")
    return bits
