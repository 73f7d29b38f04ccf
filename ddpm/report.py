"""What a run's folder shows of its model: pictures of what it draws, and of how many bits it needs.

`ddpm.train` ends with both, `ddpm.sample` and `ddpm.evaluate` make them anew with other numbers.
"""

from functools import partial
from pathlib import Path

import numpy as np

from ddpm import plots
from ddpm.commands import progress_bar
from ddpm.data import unscale
from ddpm.errors import one_sentence
from ddpm.generate import draw_images, trajectory
from ddpm.likelihood import evaluate_bits
from ddpm.runs import write_atomically
from nn.backend import array_module


def draw_samples(denoiser, image_shape, num, folder, group, *, steps, columns=None, **options):
    """Draw `num` images and leave samples.png, and for a gddm uncertainty.png, in `folder`: (images, names written).

    `columns` is that of the grid of samples; the other options are those of `draw_images`.
    """
    options["steps"] = steps
    with progress_bar(num * steps, "sampling", "step") as bar:
        images = draw_images(denoiser, denoiser.schedule, image_shape, num, group, progress=bar.update, **options)
    plots.save(plots.sample_grid(images, columns), folder / "samples.png")
    if not denoiser.knows_var_x0:
        return images, ["samples.png"]
    seen = trajectory(denoiser, denoiser.schedule, image_shape, min(2, num),
                      xp=array_module(denoiser.network.flat_parameters), **options)
    plots.save(plots.uncertainty_along(*seen), folder / "uncertainty.png")
    return images, ["samples.png", "uncertainty.png"]


def export_images(images, folder):
    """Each image in [-1, 1], (N, H, W, C), as an 8-bit PNG of its own, 00000.png and so on, in `folder`; UserError."""
    from PIL import Image
    folder = Path(folder)
    with one_sentence("the folder", folder, remedy="choose another with --export"):
        folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(unscale(images, 256)):
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        write_atomically(folder / f"{i:05d}.png", partial(picture.save, format="PNG"))


def one_of_each(label_names, num):
    """Options of `draw_samples` for `num` images of all classes in turn, each in a column; none without label names."""
    classes = len(label_names or ())
    return {"labels": np.arange(num) % classes, "columns": classes} if classes else {}


def measure_bits(denoiser, dataset, num, folder, group, **options):
    """Bits/dim of the first `num` test images (`ddpm.likelihood.Bits`); leaves bits.png in `folder`.

    Options are those of `evaluate_bits`.
    """
    images = dataset.test_images[:num]
    with progress_bar(len(images), "bits/dim", "image") as bar:
        bits = evaluate_bits(denoiser, denoiser.schedule, images, dataset.scale, group, progress=bar.update,
                             bin_width=dataset.bin_width, **options)
    plots.save(plots.bits_curve(bits), folder / "bits.png")
    return bits
