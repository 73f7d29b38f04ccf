"""Every reverse covariance that needs no training, where answers are known: python -m experiments.covariance_worlds

The denoiser is exact; what differs is what is known of Cov[x_0 | x_t]. The worlds are the grid of nine Gaussians,
upright and turned by 30 degrees, and the stripes at 45 degrees. Ten minutes on one core.
  error (C14)   root mean square error of the estimated Var[eps | x_t] per coordinate (of "full": of the whole matrix,
                per row), over draws of x_t, against t
  nats  (C17)   what the bound misses of log p for 5 to 100 steps, with its standard error; the fixed variances with the
                decoder "small"
  mmd   (C17)   MMD^2 of samples by DDPM and by DDIM (eta = 0, where "small" draws no noise) to the world's own law
  passes (C13)  network passes for each image and step, beyond the one that gives the mean, as counted
Writes results/covariance_worlds.csv, .md and .png. What has been measured is kept in --runs and not measured again.
"""

import json
from functools import cache
from pathlib import Path

from ddpm import elbo, plots
from ddpm.commands import CommandParser, run_command
from ddpm.covariance import noise_statistics, reverse_covariance, shapes
from ddpm.denoiser import Denoiser
from ddpm.likelihood import reverse_model
from ddpm.metrics import squared_mmd_to_world
from ddpm.mixture import GaussianMixture
from ddpm.randomness import generator
from ddpm.samplers import ddim, ddpm
from ddpm.schedule import NoiseSchedule
from experiments.tables import markdown_table, write_csv, write_text
from nn.backend import limit_blas_threads

SCHEDULE = NoiseSchedule.linear(1000)
WORLDS = {"grid": GaussianMixture.grid(), "turned": GaussianMixture.grid(rotation_degrees=30),
          "stripes": GaussianMixture.stripes()}
TIMES, STEPS = (1, 5, 10, 20, 50, 100, 200, 300, 400, 600, 800, 1000), (5, 10, 20, 50, 100)
POINTS, STATISTICS, SAMPLES = 20_000, 2000, 10_000
SAMPLED = {"ddpm": ("large", "small", "residual", "diagonal", "full"),
           "ddim": ("small", "residual", "diagonal", "full")}
# Each method with the look of its line: color, style, marker.
METHODS = {"large": ("#8c8c8c", "-", "v"), "small": ("#8c8c8c", "--", "^"), "analytic": ("#0b3c6f", ":", "s"),
           "residual": ("#0b3c6f", "-", "s"), "hutchinson": ("#e08a1e", "--", "o"), "diagonal": ("#4f9d69", "-.", "D"),
           "full": ("#b3242b", "-", "x")}


def main(argv=None):
    """Measure every world with every method, and write the tables and the picture."""
    p = CommandParser(prog="python -m experiments.covariance_worlds", description=__doc__)
    p.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    p.add_argument("--runs", default="runs/covariance-worlds",
                   help="where measurements are kept (default: %(default)s)")
    p.add_argument("--out", default="results", help="where tables and pictures go (default: results)")
    flags = p.parse_args(argv)
    limit_blas_threads(1)
    rows = []
    for where, world in WORLDS.items():
        rows += measure(where, world, flags.seed, Path(flags.runs))
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "covariance_worlds.csv", rows)
    write_text(out / "covariance_worlds.md", report(rows, flags.seed))
    plots.save(picture(rows), out / "covariance_worlds.png")
    print(f"results in {out}: covariance_worlds.csv, covariance_worlds.md, covariance_worlds.png")
    return 0


def measure(where, world, seed, runs):
    """The rows of one world: of each method errors and nats, and of some of them samples."""
    denoiser, statistics, rows = Denoiser.from_world(world, SCHEDULE), statistics_of(where, world, seed), []

    def method(name):
        return reverse_covariance(name, statistics=statistics(denoiser) if name in ("analytic", "residual") else None,
                                  rng=generator(seed, where, name, "probes"))

    def bounds(name):
        case = world, denoiser, method(name), name, seed
        return [*errors(*case), *nats(*case)]

    for name in METHODS:
        found = kept_rows(runs / f"{where}-{name}-{seed}.json", lambda name=name: bounds(name))
        for sampler in (sampler for sampler, names in SAMPLED.items() if name in names):
            found += kept_rows(runs / f"{where}-{name}-{sampler}-{seed}.json",
                               lambda name=name, sampler=sampler: samples(world, denoiser, method(name), sampler, seed))
        rows += [{"world": where, "method": name} | row for row in found]
    return rows


def kept_rows(path, measure):
    """The rows that `measure()` gives, kept as JSON at `path` and read from there the next time."""
    if not path.exists():
        print(path.stem, flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(list(measure())))
    return json.loads(path.read_text())


def statistics_of(where, world, seed):
    """A function of a denoiser that gives its NoiseStatistics, made once."""
    return cache(lambda denoiser: noise_statistics(denoiser, SCHEDULE, world.sample(STATISTICS, generator(
        seed, where, "data")), generator(seed, where, "statistics"), batch=20_000))


def errors(world, denoiser, method, name, seed, points=POINTS, times=TIMES):
    """A row per t: the error of Var[eps | x_t], and the passes that were counted."""
    if name == "large":                                     # no covariance of x_0
        return
    for t in times:
        x_t = world.noised(t, SCHEDULE).sample(points, generator(seed, "x_t", t))
        prediction, before = denoiser.predict(x_t, t), denoiser.passes
        found = SCHEDULE.snr[t] * method.source(denoiser, prediction, x_t, t)
        passes, truth = (denoiser.passes - before) / points, SCHEDULE.snr[t] * world.posterior_x0(x_t, t, SCHEDULE)[1]
        if not shapes.is_full(found, x_t):
            truth = shapes.diagonal(truth, x_t)
        square = ((found - truth)**2).reshape(points, -1).sum(axis=1) / 2
        size = (truth**2).reshape(points, -1).sum(axis=1).mean() / 2
        yield {"t": t, "error": square.mean()**0.5, "relative": (square.mean() / size)**0.5, "passes": passes}


def nats(world, denoiser, method, name, seed, points=POINTS, numbers=STEPS):
    """A row per number of steps: what the bound misses, nats per point."""
    x0 = world.sample(points, generator(seed, "x_0"))
    reverse = reverse_model(denoiser, SCHEDULE, method, decoder="small" if name in ("large", "small") else "model")
    for steps in numbers:
        bound = elbo.negative_bound(x0, reverse, SCHEDULE, generator(seed, "bound", steps), SCHEDULE.timesteps(steps),
                                    bin_width=None)
        missed = bound.total + world.log_density(x0)
        yield {"steps": steps, "missed": missed.mean(), "missed_error": missed.std() / points**0.5}


def samples(world, denoiser, method, sampler, seed):
    """A row per number of steps: MMD^2 of samples to the world, and its standard error."""
    for steps in STEPS:
        rng, times = generator(seed, "samples", steps), SCHEDULE.timesteps(steps)
        x_T = rng.standard_normal((SAMPLES, 2))
        if sampler == "ddpm":
            x0 = ddpm(denoiser, SCHEDULE, x_T, timesteps=times, variance=method, rng=rng)
        else:
            x0 = ddim(denoiser, SCHEDULE, x_T, timesteps=times, covariance=method, rng=rng)
        found = squared_mmd_to_world(x0, world)
        yield {"sampler": sampler, "steps": steps, "mmd": found.value, "mmd_error": found.error}


def report(rows, seed):
    """Both tables, and how they came about."""
    parts = [f"`python -m experiments.covariance_worlds`, seed {seed}; the denoiser is exact, {POINTS:,} points, the "
             f"statistics of analytic and residual from {STATISTICS:,} points at each t, one probe of hutchinson; "
             f"{SAMPLES:,} samples."]
    for where in WORLDS:
        shown = {name: [row for row in rows if (row["world"], row["method"]) == (where, name)] for name in METHODS}
        parts.append(f"## {where}\n\nNats that the bound misses of log p (± standard error), by the number of steps, "
                     "and passes beyond the mean's.\n\n" + markdown_table(
                         ["covariance", "passes", *map(str, STEPS)],
                         [[name, f"{max((row['passes'] for row in some if 'passes' in row), default=0):g}",
                           *(f"{row['missed']:.3f} ± {row['missed_error']:.3f}" for row in some if "missed" in row)]
                          for name, some in shown.items()]))
        parts.append("MMD^2 of samples to the world (± standard error), in thousandths, by the number of steps.\n\n"
                     + markdown_table(
                         ["sampler", "covariance", *map(str, STEPS)],
                         [[sampler, "none" if (sampler, name) == ("ddim", "small") else name,
                           *(f"{1e3 * row['mmd']:.1f} ± {1e3 * row['mmd_error']:.1f}" for row in shown[name]
                             if row.get("sampler") == sampler)] for sampler in SAMPLED for name in SAMPLED[sampler]]))
        parts.append("Relative error of Var[eps | x_t], by t.\n\n" + markdown_table(
            ["covariance", *map(str, TIMES)],
            [[name, *(f"{row['relative']:.1e}" for row in some if "t" in row)]
             for name, some in shown.items() if name != "large"]))
    return "\n\n".join(parts) + "\n"


def picture(rows):
    """A column for each world: error against t, nats against steps, and MMD^2 against steps for both samplers."""
    fig, axes = plots.figure(4, len(WORLDS), figsize=(11, 11.5), sharey="row")
    for column, where in zip(axes.T, WORLDS, strict=True):
        error, bound, *distances = column
        for name, (color, line, marker) in METHODS.items():
            mine = [row for row in rows if (row["world"], row["method"]) == (where, name)]
            look = {"color": color, "ls": line, "marker": marker, "ms": 4, "lw": 1.3}
            by_time = [(row["t"], row["error"]) for row in mine if row.get("error", 0) > 1e-8]  # no line for the exact
            if by_time:
                error.loglog(*zip(*by_time, strict=True), **look)
            by_steps = [(row["steps"], row["missed"], row["missed_error"]) for row in mine if "missed" in row]
            bound.errorbar(*zip(*by_steps, strict=True), label=name, **look)
            for ax, sampler in zip(distances, SAMPLED, strict=True):
                found = [(row["steps"], row["mmd"], row["mmd_error"]) for row in mine if row.get("sampler") == sampler]
                if found:
                    ax.errorbar(*zip(*found, strict=True), **look)
        error.set(title=where, xlabel="t")
        bound.set(yscale="log")
        for ax in distances:                                        # linear where it is all noise, which has both signs
            ax.set_yscale("symlog", linthresh=5e-4)
            ax.set(ylim=(-5e-4, 0.5), yticks=[0, 1e-3, 1e-2, 1e-1])
        for ax in (bound, *distances):
            ax.set(xscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
            ax.minorticks_off()
    for ax, label in zip(axes[:, 0], ("error of Var[eps | x_t]", "nats below log p", "MMD² of DDPM's samples",
                                      "MMD² of DDIM's samples"), strict=True):
        ax.set_ylabel(label)
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    return fig


if __name__ == "__main__":
    run_command(main)
