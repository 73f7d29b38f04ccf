"""DDPM, I-DDPM and GDDM on one backbone, with seeds enough for error bars: python -m experiments.three_models

For each (model, objective, seed): train (or go on with) a run in --runs, on 8x8 digits, then measure
  bits/dim      the bound on all test images, split into prior, steps and decoder, and the steps against t (G09); also
                with the model's mean and a fixed variance, "small" or "large", in place of its own
  frechet       Frechet distance of 192 samples to the test images in principal components of the pixels (G09)
and for a model with Var[x_0 | x_t], along the sampling trajectories of 32 images and against t (G10)
  variance      mean over pixels
  area          (sum v)^2 / (D sum v^2): the share of the pixels that holds the variance, 1 where it is the same in all
  edges         correlation over pixels with the edges of the image that comes out (`edge_map`)
  others        the same with the edges of another image: what the place of a pixel alone explains
  claimed, error  on noised test images: mean variance, and mean square of what E[x_0 | x_t] gets wrong
Runs of one seed see the same images, noise and times, so that models are compared by differences at equal seed.
Writes results/three_models.csv, .md and .png. What has been measured is kept in the run's folder and not measured
again; flags of ddpm.train that are given too go to the training.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from ddpm import data, plots
from ddpm.commands import run_command
from ddpm.generate import draw_images, trajectory
from ddpm.likelihood import evaluate_bits
from ddpm.models import default_variance, load_denoiser
from ddpm.parallel import make_group
from ddpm.randomness import generator
from experiments.tables import markdown_table, write_csv, write_text
from experiments.training_runs import kept, pixel_frechet, trained
from nn.backend import keep_freed_memory

CASES = (("ddpm", "simple"), ("iddpm", "hybrid"), ("gddm", "balanced"), ("gddm", "kl"))
PAIRS = ((("iddpm", "hybrid"), ("ddpm", "simple")), (("gddm", "balanced"), ("iddpm", "hybrid")),
         (("gddm", "kl"), ("iddpm", "hybrid")), (("gddm", "kl"), ("gddm", "balanced")))
TRAINING = ("--data digits --T 100 --prediction eps --channel-mults 1,2 --attention-levels 1 --steps 500 "
            "--micro-batch 32 --lr 2e-3").split()
SAMPLES, STRATA, WATCHED, SHOWN, FLOOR_DRAWS = 192, 32, 32, 25, 50
MEASURES = ("bits_per_dim", "steps", "decoder", "small", "large", "frechet")


def main(argv=None):
    """Run what is missing, then write the table and the picture."""
    p = argparse.ArgumentParser(prog="python -m experiments.three_models", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=5, help="seeds of each case (default: 5)")
    p.add_argument("--runs", default="runs/three_models", help="where the runs live (default: runs/three_models)")
    p.add_argument("--out", default="results", help="where tables and pictures go (default: results)")
    flags, train_flags = p.parse_known_args(argv)
    keep_freed_memory()
    rows, pictures = [], {}
    for seed in range(flags.seeds):
        for model, objective in CASES:
            folder = Path(flags.runs) / f"{model}-{objective}-{seed}"
            run = trained(folder, ["--model", model, "--objective", objective, "--seed", str(seed), *TRAINING,
                                   *train_flags])
            row, arrays = kept(folder / "three_models.npz", lambda run=run, seed=seed: measure(run, seed))
            case = {"model": model, "objective": objective, "seed": seed}
            rows += [case | found for found in (row, *by_stratum(arrays), *by_time(arrays))]
            pictures.setdefault((model, objective), arrays["images"])
    write([*rows, frechet_floor(run)], pictures, Path(flags.out))


# ---- one run

def measure(run, seed):
    """(row, arrays) of one trained run: its bits and its distance; and its strata, samples and trajectories."""
    denoiser, _ = load_denoiser(run)
    schedule, variance = denoiser.schedule, default_variance(run.config.model)
    dataset = data.load(run.config.data, run.config.data_dir)
    test = dataset.scale(dataset.test_images)
    bits = {name: evaluate_bits(denoiser, schedule, dataset.test_images, dataset.scale, make_group(1), variance=name,
                                bin_width=dataset.bin_width, strata=STRATA, seed=seed)
            for name in dict.fromkeys((variance, "small", "large"))}
    images = draw_images(denoiser, schedule, dataset.image_shape, SAMPLES, make_group(1), steps=schedule.T,
                         variance=variance, seed=seed, chunk=64)
    row = {"kind": "run", **bits[variance].summary(),
           **{name: float(bits[name].total.mean()) for name in ("small", "large")},
           "frechet": pixel_frechet(dataset.scale(dataset.train_images), test, images)}
    strata = bits[variance]
    arrays = {"images": images[:16], "edges_of_strata": strata.edges,
              "strata": strata.steps / np.diff(strata.edges)[:, None]}
    if run.config.model == "gddm":
        arrays |= uncertainty(denoiser, schedule, dataset.image_shape, WATCHED, seed=seed, show=SHOWN)
        arrays |= reliability(denoiser, schedule, test, arrays["t"], generator(seed, "reliability"))
    return row, arrays


def by_stratum(arrays):
    """A row per stratum of times: bits/dim of one of its steps, with the standard error over images."""
    edges = arrays["edges_of_strata"]
    for low, high, bits in zip(edges[:-1], edges[1:], arrays["strata"], strict=True):
        mean, error = mean_and_error(bits)
        yield {"kind": "step", "t": float(low + high - 1) / 2, "bits_per_step": mean, "bits_per_step_error": error}


def by_time(arrays):
    """A row per time of the trajectories: means over samples, with their standard errors."""
    for k, t in enumerate(arrays.get("t", ())):
        row = {"kind": "trajectory", "t": int(t)}
        for name in ("variance", "area", "edges", "others"):
            row[name], row[f"{name}_error"] = mean_and_error(arrays[name][k])
        yield row | {"claimed": float(arrays["claimed"][k]), "error": float(arrays["error"][k])}


# ---- uncertainty along a trajectory (G10)

def edge_map(images):
    """Length of the gradient at each pixel, in differences of neighbours, (N, H, W); mean square over channels."""
    down, across = np.gradient(np.asarray(images, dtype=np.float64), axis=(1, 2))
    return np.sqrt((down**2 + across**2).mean(axis=-1))


def correlation(maps, others):
    """Pearson correlation over the pixels of two maps (..., H, W), map by map; 0 where one of them is constant."""
    a, b = (m - m.mean(axis=(-2, -1), keepdims=True) for m in (maps, others))
    product, size = (a * b).mean(axis=(-2, -1)), np.sqrt((a * a).mean(axis=(-2, -1)) * (b * b).mean(axis=(-2, -1)))
    return np.divide(product, size, out=np.zeros_like(product), where=size > 1e-12)


def area(maps):
    """(sum v)^2 / (D sum v^2) of maps (..., H, W) >= 0: 1 for a constant one, 1/D where one pixel has it all."""
    return maps.mean(axis=(-2, -1))**2 / (maps**2).mean(axis=(-2, -1))


def uncertainty(denoiser, schedule, image_shape, num, **options):
    """Var[x_0 | x_t] along the trajectories of `num` samples, drawn in all T steps: arrays t (K,), others (K, num).

    `options` are those of `ddpm.generate.trajectory`. The edges are those of the image that comes out, and `others`
    those of the next sample.
    """
    t, _, mean, std = trajectory(denoiser, schedule, image_shape, num, steps=schedule.T, variance="learned", **options)
    maps, edges = (std.astype(np.float64)**2).mean(axis=-1), edge_map(mean[-1])
    return {"t": np.array(t), "variance": maps.mean(axis=(-2, -1)), "area": area(maps),
            "edges": correlation(maps, edges[None]), "others": correlation(maps, np.roll(edges, 1, axis=0)[None])}


def reliability(denoiser, schedule, x0, times, rng):
    """Mean variance and mean squared error of E[x_0 | x_t] on noised images, at each time: claimed and error (K,)."""
    claimed, error = [], []
    for t in times:
        eps = rng.standard_normal(x0.shape, dtype=x0.dtype)
        prediction = denoiser.predict(schedule.add_noise(x0, int(t), eps), int(t))
        claimed.append(prediction.var_x0.mean(dtype=np.float64))
        error.append(((prediction.x0 - x0)**2).mean(dtype=np.float64))
    return {"claimed": np.array(claimed), "error": np.array(error)}


# ---- over seeds (G09)

def mean_and_error(values):
    """(mean, standard error) of independent values, as floats; the error of a single one is nan."""
    values = np.asarray(values, dtype=np.float64)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return float(values.mean()), float(error)


def by_seed(rows, case, name):
    """{seed: value} of one measure of the runs of one (model, objective)."""
    return {row["seed"]: row[name] for row in rows
            if row["kind"] == "run" and (row["model"], row["objective"]) == case}


def differences(rows, case, other, name):
    """The measure of `case` minus that of `other` at each seed that both have, in the order of seeds."""
    ours, theirs = by_seed(rows, case, name), by_seed(rows, other, name)
    return np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def frechet_floor(run):
    """A row: the distance of as many training images in place of samples, and its standard deviation over draws."""
    dataset = data.load(run.config.data, run.config.data_dir)
    train, test = dataset.scale(dataset.train_images), dataset.scale(dataset.test_images)
    rng = generator(0, "floor")
    found = [pixel_frechet(train, test, train[rng.choice(len(train), SAMPLES, replace=False)])
             for _ in range(FLOOR_DRAWS)]
    return {"kind": "floor", "frechet": float(np.mean(found)), "frechet_spread": float(np.std(found, ddof=1))}


# ---- tables and picture

def read(path):
    """The rows of results/three_models.csv, as they were written."""
    with open(path, newline="") as file:
        return [{name: _number(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def _number(text):
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def write(rows, pictures, out):
    """The rows as CSV, means over seeds as Markdown, and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "three_models.csv", rows)
    write_text(out / "three_models.md", report(rows))
    plots.save(picture(rows, pictures), out / "three_models.png")
    print(f"results in {out}: three_models.csv, three_models.md, three_models.png")


def report(rows):
    """Three tables: the models, their differences, and uncertainty against t."""
    floor, = (row for row in rows if row["kind"] == "floor")
    seeds = len(by_seed(rows, CASES[0], "bits_per_dim"))
    models = [[*case, *(shown(*mean_and_error(list(by_seed(rows, case, name).values()))) for name in MEASURES)]
              for case in CASES]
    compared = []
    for case, other in PAIRS:
        found = {name: differences(rows, case, other, name) for name in MEASURES}
        below = (found["bits_per_dim"] < 0).sum()
        compared.append([f"{' '.join(case)} - {' '.join(other)}", *(shown(*mean_and_error(d)) for d in found.values()),
                         f"{below} of {len(found['bits_per_dim'])}"])
    watched = [case for case in CASES if over_seeds(rows, case, "variance")]
    along = []
    for case in watched:
        columns = {name: over_seeds(rows, case, name) for name in ("variance", "area", "edges", "others")}
        claims = {name: over_seeds(rows, case, name) for name in ("claimed", "error")}
        along += [[case[1], f"{t:g}", *(shown(*columns[name][t]) for name in columns),
                   *(f"{claims[name][t][0]:.3g}" for name in claims)] for t in list(columns["variance"])[::3]]
    header = [name.replace("_", " ") for name in MEASURES]
    return f"""`python -m experiments.three_models`; ± is the standard error over {seeds} seeds

{markdown_table(["model", "objective", *header], models)}

small, large: bits/dim of the model's mean with that fixed variance. frechet of {SAMPLES} training images instead of
samples: {floor["frechet"]:.3f} (standard deviation {floor["frechet_spread"]:.3f}).

Differences at equal seed, and in how many seeds the first has fewer bits/dim.

{markdown_table(["first - second", *header, "fewer"], compared)}

Var[x0|xt] along the trajectories of {WATCHED} samples of each seed, and on noised test images (claimed, error).

{markdown_table(["gddm", "t", "variance", "area", "edges", "others", "claimed", "error"], along)}
"""


def over_seeds(rows, case, name):
    """{t: (mean, standard error over seeds)} of a measure along time, of one (model, objective)."""
    values = {}
    for row in rows:
        if "t" in row and name in row and (row["model"], row["objective"]) == case:
            values.setdefault(row["t"], []).append(row[name])
    return {t: mean_and_error(values[t]) for t in sorted(values, reverse=True)}


def ratios(rows, case, other):
    """{t: (mean, standard error over seeds)} of what a step costs `case`, over what it costs `other` at equal seed."""
    costs = {(row["model"], row["objective"], row["seed"], row["t"]): row["bits_per_step"] for row in rows
             if row["kind"] == "step"}
    quotients = {}
    for (model, objective, seed, t), cost in costs.items():
        if (model, objective) == case and (*other, seed, t) in costs:
            quotients.setdefault(t, []).append(cost / costs[(*other, seed, t)])
    return {t: mean_and_error(values) for t, values in quotients.items()}


def shown(value, error):
    """value ± standard error with two digits of it; the value alone where the error isn't known."""
    if not error > 0:
        return f"{value:.3f}"
    decimals = max(0, 1 - int(np.floor(np.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


LOOKS = {("ddpm", "simple"): ("0.55", "-", "o"), ("iddpm", "hybrid"): ("#e08a1e", "--", "s"),
         ("gddm", "balanced"): ("#0b3c6f", "-", "D"), ("gddm", "kl"): ("#4f9d69", "-.", "^")}


def picture(rows, pictures):
    """Bits, differences, distances and samples of the models; then everything that is a function of t."""
    fig, axes = plots.figure(4, 2, figsize=(9, 12))
    draw_bits(axes[0, 0], rows)
    draw_differences(axes[0, 1], rows)
    draw_frechet(axes[1, 0], rows)
    draw_samples(axes[1, 1], pictures)
    for case in CASES:
        if case != ("iddpm", "hybrid"):
            band(axes[2, 0], ratios(rows, case, ("iddpm", "hybrid")), LOOKS[case], " ".join(case))
    axes[2, 0].axhline(1, color="0.5", linewidth=1, zorder=0)
    axes[2, 0].set(xscale="log", yscale="log", xlabel="t", ylabel="bits/dim, over those of iddpm",
                   title="what a step costs", yticks=(1, 2, 5, 10), yticklabels=("1", "2", "5", "10"))
    axes[2, 0].minorticks_off()
    for ax, name, title, label in ((axes[2, 1], "variance", "uncertainty along trajectories", "mean Var[x0|xt]"),
                                   (axes[3, 0], "edges", "where it lies", "correlation with edges"),
                                   (axes[3, 1], "area", "on how many pixels", "share of the pixels")):
        for case in CASES:
            found = over_seeds(rows, case, name)
            if found:
                band(ax, found, LOOKS[case], " ".join(case))
        ax.set(xlabel="t", title=title, ylabel=label)
    axes[2, 1].set_yscale("log")
    case = ("gddm", "balanced")
    band(axes[3, 0], over_seeds(rows, case, "others"), (LOOKS[case][0], ":", ""), "balanced, another image's edges")
    t, error = zip(*((t, value) for t, (value, _) in over_seeds(rows, case, "error").items()), strict=True)
    axes[2, 1].plot(t, error, "x", color="black", markersize=4, label="balanced, squared error on test images")
    for ax in axes[2:].flat:
        ax.legend(frameon=False, fontsize=8)
    return fig


def draw_bits(ax, rows):
    """The seeds' bits/dim, those of one seed joined; and those of each model's mean with a fixed variance."""
    values = np.array([list(by_seed(rows, case, "bits_per_dim").values()) for case in CASES])
    ax.plot(values, color="0.8", linestyle="-", linewidth=1, zorder=0)
    for name, marker in (("large", "v"), ("small", "^")):
        means = [mean_and_error(list(by_seed(rows, case, name).values())) for case in CASES]
        ax.errorbar(range(len(CASES)), *zip(*means, strict=True), fmt=marker, color="0.55", mfc="white", capsize=2,
                    label=f"its mean, variance {name}")
    for i, case in enumerate(CASES):
        ax.errorbar(i, *mean_and_error(values[i]), fmt=LOOKS[case][2], color=LOOKS[case][0], capsize=3)
    ax.set(xticks=range(len(CASES)), xticklabels=["\n".join(case) for case in CASES], ylabel="bits/dim",
           xlim=(-0.5, len(CASES) - 0.5), title="test images")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.2 * (high - low))                          # room for the legend
    ax.legend(frameon=False, fontsize=8)


def draw_differences(ax, rows):
    """The two gddm minus iddpm at equal seed: a point for each seed, and the mean with its standard error."""
    parts, other = ("bits_per_dim", "steps", "decoder"), ("iddpm", "hybrid")
    for i, case in enumerate((("gddm", "balanced"), ("gddm", "kl"))):
        color, _, marker = LOOKS[case]
        for j, name in enumerate(parts):
            found, x = differences(rows, case, other, name), j + 0.3 * (i - 0.5)
            ax.plot(np.full(len(found), x - 0.07), found, ".", color="0.6", markersize=4)
            ax.errorbar(x + 0.05, *mean_and_error(found), fmt=marker, color=color, capsize=3,
                        label=" ".join(case) if j == 0 else None)
    ax.axhline(0, color="0.5", linestyle="-", linewidth=1, zorder=0)
    ax.set(xticks=range(len(parts)), xticklabels=("total", "steps", "decoder"), ylabel="bits/dim",
           title="minus iddpm, at equal seed")
    ax.legend(frameon=False, fontsize=8)


def draw_frechet(ax, rows):
    """The seeds' distances to the test images, beside that of training images."""
    floor, = (row for row in rows if row["kind"] == "floor")
    mean, spread = floor["frechet"], floor["frechet_spread"]
    ax.axhspan(mean - spread, mean + spread, color="0.9", zorder=0, label="training images")
    for i, case in enumerate(CASES):
        found = np.array(list(by_seed(rows, case, "frechet").values()))
        ax.plot(np.full(len(found), i - 0.1), found, ".", color="0.6", markersize=4)
        ax.errorbar(i + 0.05, *mean_and_error(found), fmt=LOOKS[case][2], color=LOOKS[case][0], capsize=3)
    ax.set(xticks=range(len(CASES)), xticklabels=["\n".join(case) for case in CASES], ylabel="Frechet distance",
           ylim=(0, None), title="samples, to the test images")
    ax.legend(frameon=False, fontsize=8)


def draw_samples(ax, pictures):
    """A strip of samples of each case."""
    page = np.concatenate([np.pad(plots.tile(images[:10], columns=10, gap=1), ((0, 3), (0, 0), (0, 0)),
                                  constant_values=1) for images in pictures.values()])
    height = len(page) / len(pictures)
    ax.imshow(page, interpolation="nearest")
    ax.set(xticks=[], yticks=[height * (i + 0.5) - 2 for i in range(len(pictures))],
           yticklabels=[" ".join(case) for case in pictures], title="samples")
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)


def band(ax, found, look, label):
    """A line against t with two standard errors around it."""
    color, line, marker = look
    t, values = list(found), np.array(list(found.values()))
    ax.plot(t, values[:, 0], color=color, linestyle=line, marker=marker, markersize=3, label=label)
    ax.fill_between(t, values[:, 0] - 2 * values[:, 1], values[:, 0] + 2 * values[:, 1], color=color, alpha=0.2, lw=0)


if __name__ == "__main__":
    run_command(main)
