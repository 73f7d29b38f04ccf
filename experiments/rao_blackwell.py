"""How much variance Rao-Blackwellization takes off the bound: python -m experiments.rao_blackwell

Compares the naive term of the bound, log p(x_s|x_t) - log q(x_s|x_t,x_0) at a drawn x_s, with the analytic one, where
x_s is integrated out (L09; ddpm/rao_blackwell.py says what the variances are), on
  gaussian   eight independent Gaussians of variances 1, 1/2, 1/4, ...; of the noise in x_t the model's mean is 5 % too
             small and its variance 5 % too large
  mixture    two Gaussians on the line; the model is the Gaussian with the exact mean and variance of x_s|x_t
  --runs     trained image models, on their test images
for single steps t -> t-1 and for the whole bound over all T steps, and writes results/rao_blackwell.csv, .md and .png.
An image model takes some five minutes on one core, most of them for the paths of all T steps. A run that is missing is
trained by, for example, python -m ddpm.train --model gddm --out runs/blackwell/gddm-0
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm import data, plots
from ddpm.commands import run_command
from ddpm.denoiser import Denoiser
from ddpm.errors import UserError
from ddpm.gddm import noise_to_data
from ddpm.likelihood import reverse_model
from ddpm.mixture import GaussianMixture
from ddpm.models import default_variance, load_denoiser
from ddpm.randomness import generator
from ddpm.rao_blackwell import compare_bound, compare_step
from ddpm.runs import RunFolder
from ddpm.schedule import NoiseSchedule
from experiments.tables import markdown_table, write_csv, write_text
from nn.backend import keep_freed_memory, limit_blas_threads

RUNS = ("runs/blackwell/gddm-0", "runs/blackwell/ddpm-0")
TIMES = 12                                              # single steps, spread geometrically over 2..T
POINTS, POINT_PATHS = 4000, 500                         # of an exact world: for single steps, and for whole bounds
IMAGES, IMAGE_PATHS = 192, 8
STEP_DRAWS, PATH_DRAWS = 2, 4                           # x_t for each example and step; paths for each example


class World(NamedTuple):
    """What is compared: a model's reverse step, and examples for single steps and for the whole bound."""

    name: str
    schedule: NoiseSchedule
    reverse: Any
    step_examples: Any
    path_examples: Any
    bin_width: float | None


def main(argv=None):
    """Measure every world, and write the tables and the picture after each."""
    p = argparse.ArgumentParser(prog="python -m experiments.rao_blackwell", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", nargs="*", default=RUNS, metavar="RUN",
                   help=f"folders of trained image models, or none (default: {' '.join(RUNS)})")
    p.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    p.add_argument("--out", default="results", help="where tables and pictures go (default: results)")
    flags = p.parse_args(argv)
    for run in flags.runs:
        if not (Path(run) / "config.json").exists():
            model = Path(run).name.partition("-")[0]
            raise UserError(f"{run} holds no trained model; train it with python -m ddpm.train "
                            f"--model {model if model in ('ddpm', 'iddpm', 'gddm') else 'gddm'} --out {run}")
    keep_freed_memory()
    limit_blas_threads(1)
    rows = []
    for make in (gaussian_world, mixture_world, *(lambda seed, run=run: image_world(run) for run in flags.runs)):
        rows += measure(make(flags.seed), flags.seed)
        write(rows, flags, Path(flags.out))


# ---- the worlds

def gaussian_world(seed):
    """Data whose exact reverse process is Gaussian, and a model that is a little wrong."""
    world = GaussianMixture([1.0], np.zeros((1, 8)), np.diag(0.5**np.arange(8))[None])
    exact = Denoiser.from_world(world, NoiseSchedule.linear(1000))

    def moments(x_t, t):
        noise = exact.predict(x_t, t)
        return noise_to_data(0.95 * noise.eps, 1.05 * noise.var_eps, x_t, t, exact.schedule)

    return exact_world("gaussian", world, Denoiser.from_moments(moments, exact.schedule), seed)


def mixture_world(seed):
    """Data whose reverse step is a mixture, and the best Gaussian model."""
    world = GaussianMixture.two_component()
    return exact_world("mixture", world, Denoiser.from_world(world, NoiseSchedule.linear(1000)), seed)


def exact_world(name, world, denoiser, seed):
    """A World of points."""
    points = world.sample(POINTS, generator(seed, name))
    return World(name, denoiser.schedule, reverse_model(denoiser, denoiser.schedule, "learned"),
                 points, points[:POINT_PATHS], None)


def image_world(folder):
    """A trained model and its test images."""
    run = RunFolder.open(folder)
    denoiser, _ = load_denoiser(run)
    dataset = data.load(run.config.data, run.config.data_dir)
    images = dataset.scale(dataset.test_images[:IMAGES])
    reverse = reverse_model(denoiser, denoiser.schedule, default_variance(run.config.model), clip=(-1, 1))
    return World(run.path.name, denoiser.schedule, reverse, images, images[:IMAGE_PATHS], dataset.bin_width)


# ---- the measurement

def measure(world, seed):
    """Rows of the table: a dozen single steps, then the whole bound in three ways."""
    rows = []
    for t in np.unique(np.rint(np.geomspace(2, world.schedule.T, TIMES)).astype(int)):
        print(f"{world.name}: step {t} -> {t - 1}", flush=True)
        found = compare_step(world.step_examples, world.reverse, int(t) - 1, int(t), world.schedule,
                             generator(seed, world.name, "step", int(t)), draws=STEP_DRAWS)
        rows.append(row(world, "step", found, t=int(t), examples=len(world.step_examples), draws=STEP_DRAWS))
    print(f"{world.name}: all {world.schedule.T} steps, {PATH_DRAWS} paths", flush=True)
    found = compare_bound(world.path_examples, world.reverse, world.schedule, generator(seed, world.name, "paths"),
                          draws=PATH_DRAWS, bin_width=world.bin_width)
    for estimator, comparison in found._asdict().items():
        rows.append(row(world, estimator, comparison, examples=len(world.path_examples), draws=PATH_DRAWS))
    return rows


def row(world, estimator, comparison, **counts):
    """One Comparison as a row of numbers."""
    numbers = {}
    for name, estimate in comparison._asdict().items():
        numbers |= {name: estimate.value, f"{name}_error": estimate.error}
    return {"world": world.name, "estimator": estimator, **counts, **numbers}


# ---- tables and picture

def write(rows, flags, out):
    """The rows as CSV, the factors as Markdown and as a picture."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "rao_blackwell.csv", rows)
    write_text(out / "rao_blackwell.md", report(rows, flags))
    plots.save(picture(rows), out / "rao_blackwell.png")


def report(rows, flags):
    """Both tables, and how they came about."""
    worlds, steps = names(rows, "world"), [r for r in rows if r["estimator"] == "step"]

    def single(quantity):
        cells = {(r["t"], r["world"]): shown(r, quantity) for r in steps}
        return markdown_table(["t", *worlds], [[str(t), *(cells.get((t, world), "") for world in worlds)]
                                               for t in sorted(names(steps, "t"))])

    columns = ("mean", "naive", "analytic", "factor", "overall")
    whole = markdown_table(["world", "estimator", *columns],
                           [[r["world"], r["estimator"], *(shown(r, name) for name in columns)]
                            for r in rows if r["estimator"] != "step"])
    sizes = markdown_table(["examples x draws", *worlds], [
        [what, *(f"{r['examples']} x {r['draws']}" for r in rows if r["estimator"] == kind and r.get("t") in (None, 2))]
        for what, kind in (("a single step", "step"), ("the whole bound", "path"))])
    command = " ".join(["python -m experiments.rao_blackwell",
                        *(["--runs", *flags.runs] if tuple(flags.runs) != RUNS else []),
                        *(["--seed", str(flags.seed)] if flags.seed else [])])
    return f"""`{command}`, seed {flags.seed}

A single step t -> t-1: variance of the naive term over that of the analytic one, for a given x_0 (factor).

{single("factor")}

The same with the variance between examples added to both, as in a batch that sees each example once (overall).

{single("overall")}

The whole bound of T steps per example (mean in nats, variances for a given x_0 in nats^2), from one path, from an
independent x_t for each term, and from one uniform t.

{whole}

± is the standard error, by leaving out one example at a time.

{sizes}
"""


def names(rows, column):
    """The values of a column, each once."""
    return list(dict.fromkeys(r[column] for r in rows))


def shown(row, name):
    """value ± standard error, this with two digits."""
    value, error = row[name], row[name + "_error"]
    if not 1e-3 <= abs(value) < 1e5 or not error > 0:
        return f"{value:.1e} ± {error:.0e}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def picture(rows):
    """The factor against t, and that of the whole bound."""
    fig, (left, right) = plots.figure(1, 2, figsize=(9, 3.6), width_ratios=(1.6, 1), sharey=True)
    worlds, estimators = names(rows, "world"), ("path", "independent", "uniform")
    for i, world in enumerate(worlds):
        look = {"marker": "osD^v"[i % 5], "markersize": 4, "capsize": 2, "label": world,
                "color": ("black", "0.6", "#0b3c6f", "#e08a1e")[i % 4], "linestyle": ("-", "--", "-.", ":")[i % 4]}
        mine = {name: [r for r in rows if (r["world"], r["estimator"]) == (world, name)]
                for name in ("step", *estimators)}
        left.errorbar([r["t"] for r in mine["step"]], *both(mine["step"]), **look)
        right.errorbar(np.arange(3) + 0.12 * (i - (len(worlds) - 1) / 2), *both(sum((mine[e] for e in estimators), [])),
                       **look | {"linestyle": "none"})
    left.set(xscale="log", yscale="log", xlabel="t", ylabel="naive / analytic variance", title="a single step")
    left.legend(frameon=False)
    right.set(xticks=range(3), xticklabels=estimators, xlim=(-0.5, 2.5), title="the whole bound")
    for ax in (left, right):
        ax.axhline(1, color="0.8", linewidth=1, zorder=0)
    return fig


def both(rows):
    """Factors and their standard errors."""
    return [r["factor"] for r in rows], [r["factor_error"] for r in rows]


if __name__ == "__main__":
    run_command(main)
