"""Every model and objective on the same backbone, data and number of steps: python -m experiments.objectives

For each (model, objective, seed): train (or go on with) a run in --runs, then measure
  bits/dim          the bound on test images, with its standard error, split into decoder and steps
  frechet           Frechet distance of samples to the test images in the space of 64 principal components
  mixture errors    E[x_0|x_t] and Var[x_0|x_t], learned by a small network on the two-component mixture of G08,
                    against the closed form: root mean square over x_t in units of the posterior's standard
                    deviation (mean) and of its root mean square (variance), averaged over t = 50, 150, ..., 950
and write results/objectives.csv, .md and .png. What has been measured is kept in the run's folder and not
measured again; flags of ddpm.train that are given too go to the training.
"""

import argparse
from pathlib import Path

import numpy as np

from ddpm import data, plots
from ddpm.commands import run_command
from ddpm.generate import draw_images
from ddpm.likelihood import evaluate_bits
from ddpm.mixture import GaussianMixture
from ddpm.models import default_variance, find_objective, load_denoiser
from ddpm.parallel import make_group
from ddpm.points import fit_points, recovery
from ddpm.randomness import generator
from ddpm.schedule import NoiseSchedule
from experiments.tables import markdown_table, write_csv, write_text
from experiments.training_runs import kept, pixel_frechet, trained
from nn.backend import keep_freed_memory

MAIN = (("ddpm", "simple"), ("iddpm", "hybrid"), ("gddm", "balanced"))
OTHERS = (("gddm", "balanced-v"), ("gddm", "kl"), ("gddm", "simple+kl"), ("gddm", "pairs"))
SAMPLES, SAMPLE_STEPS, BITS_IMAGES, STRATA = 192, 100, 500, 32


def main(argv=None):
    """Run what is missing, then write the table and the picture."""
    p = argparse.ArgumentParser(prog="python -m experiments.objectives", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=2, help="seeds of the main cases; the others get one (default: 2)")
    p.add_argument("--runs", default="runs/objectives", help="where the runs live (default: runs/objectives)")
    p.add_argument("--out", default="results", help="where tables and pictures go (default: results)")
    flags, train_flags = p.parse_known_args(argv)
    keep_freed_memory()
    rows, pictures = [], {}
    for seed in range(flags.seeds):
        for model, objective in MAIN + OTHERS * (seed == 0):
            folder = Path(flags.runs) / f"{model}-{objective}-{seed}"
            row, images = measured(folder, model, objective, seed, train_flags)
            rows.append(row)
            pictures.setdefault((model, objective), images)
            write(rows, pictures, Path(flags.out))


def measured(folder, model, objective, seed, train_flags):
    """(row of the table, samples) of one run, trained and measured where that has not been done."""
    prediction = "v" if objective.endswith("-v") else "eps"
    run = trained(folder, ["--model", model, "--objective", objective, "--seed", str(seed), "--prediction", prediction,
                           *train_flags])
    row, arrays = kept(folder / "objectives.npz", lambda: measure(run, objective, seed))
    return row, arrays["images"]


def measure(run, objective, seed):
    """The row of one trained run, and its first samples."""
    denoiser, _ = load_denoiser(run)
    config, schedule, variance = run.config, denoiser.schedule, default_variance(run.config.model)
    dataset = data.load(config.data, config.data_dir)
    bits = evaluate_bits(denoiser, schedule, dataset.test_images[:BITS_IMAGES], dataset.scale, make_group(),
                         variance=variance, bin_width=dataset.bin_width, strata=STRATA).summary()
    images = draw_images(denoiser, schedule, dataset.image_shape, SAMPLES, make_group(),
                         steps=min(SAMPLE_STEPS, config.T), variance=variance, seed=seed)
    row = {"model": config.model, "objective": objective, "seed": seed, "train_steps": config.steps, **bits,
           "frechet": pixel_frechet(dataset.scale(dataset.train_images), dataset.scale(dataset.test_images), images)}
    if config.model == "gddm":
        row |= mixture_errors(objective, seed)
    return row, {"images": images[:16]}


def mixture_errors(objective, seed):
    """Errors of the learned posterior mean and variance on the two-component mixture, means over t (G08)."""
    schedule, world = NoiseSchedule.linear(1000), GaussianMixture.two_component()
    denoiser = fit_points(world, schedule, find_objective("gddm", objective), batch_size=256, seed=seed)
    pairs = [(0, t) for t in range(50, 1000, 100)]
    found = recovery(denoiser, world, pairs, generator(seed, "recovery"))
    return {"mixture_mean_error": float(np.mean([r.mean for r in found])),
            "mixture_variance_error": float(np.mean([r.var for r in found]))}


def write(rows, pictures, out):
    """The table as CSV and Markdown (means over seeds, with their spread), and a row of samples per case."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "objectives.csv", rows)
    shown = ("bits_per_dim", "decoder", "steps", "frechet", "mixture_mean_error", "mixture_variance_error")
    lines = []
    for model, objective in pictures:
        mine = [row for row in rows if (row["model"], row["objective"]) == (model, objective)]
        cells = []
        for name in shown:
            values = np.array([row[name] for row in mine if name in row])
            spread = f" ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}" if len(values) else "")
        lines.append([model, objective, *cells, str(len(mine))])
    header = ["model", "objective", *(name.replace("_", " ") for name in shown), "seeds"]
    write_text(out / "objectives.md", markdown_table(header, lines) + "\n")
    fig, axes = plots.figure(len(pictures), 1, figsize=(9, 0.75 * len(pictures)), squeeze=False)
    for ax, ((model, objective), images) in zip(axes[:, 0], pictures.items(), strict=True):
        ax.imshow(plots.tile(images, columns=16))
        ax.set_ylabel(f"{model}\n{objective}", rotation=0, ha="right", va="center", fontsize=8)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
    plots.save(fig, out / "objectives.png")


if __name__ == "__main__":
    run_command(main)
