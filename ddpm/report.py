"""What a run's folder shows of its model: pictures of what it draws, and of how many bits it needs.

`ddpm.train` ends with both, `ddpm.sample` and `ddpm.evaluate` make them anew with other numbers.
"""

from ddpm import plots
from ddpm.commands import progress_bar
from ddpm.generate import draw_images, trajectory
from ddpm.likelihood import evaluate_bits
from nn.backend import array_module


def draw_samples(denoiser, image_shape, num, folder, group, *, steps, variance, seed):
    """Draw `num` images and leave samples.png, and for a gddm uncertainty.png, in `folder`: (images, names written)."""
    options = {"steps": steps, "variance": variance, "seed": seed}
    with progress_bar(num * steps, "sampling", "pass") as bar:
        images = draw_images(denoiser, denoiser.schedule, image_shape, num, group, progress=bar.update, **options)
    plots.save(plots.sample_grid(images), folder / "samples.png")
    if denoiser.model != "gddm":
        return images, ["samples.png"]
    seen = trajectory(denoiser, denoiser.schedule, image_shape, min(2, num),
                      xp=array_module(denoiser.network.flat_parameters), **options)
    plots.save(plots.uncertainty_along(*seen), folder / "uncertainty.png")
    return images, ["samples.png", "uncertainty.png"]


def measure_bits(denoiser, dataset, num, folder, group, *, variance, strata, seed=0):
    """Bits/dim of the first `num` test images (`ddpm.likelihood.Bits`); leaves bits.png in `folder`."""
    images = dataset.test_images[:num]
    with progress_bar(len(images), "bits/dim", "image") as bar:
        bits = evaluate_bits(denoiser, denoiser.schedule, images, dataset.scale, group, progress=bar.update,
                             variance=variance, bin_width=dataset.bin_width, strata=strata, seed=seed)
    plots.save(plots.bits_curve(bits), folder / "bits.png")
    return bits
