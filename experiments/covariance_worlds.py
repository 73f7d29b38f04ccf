"""Every reverse covariance that needs no training, where answers are known: python -m experiments.covariance_worlds

The denoiser is exact; what differs is what is known of Cov[x_0 | x_t]. The worlds are the grid of nine Gaussians,
upright and turned by 30 degrees, and the stripes at 45 degrees. Five minutes on one core.
  error (C14)   root mean square error of the estimated Var[eps | x_t] per coordinate (of "full": of the whole matrix,
                per row), over draws of x_t, against t
  nats  (C17)   what the bound misses of log p for 5 to 100 steps, with its standard error; the fixed variances with the
                decoder "small"
  passes (C13)  network passes for each image and step, beyond the one that gives the mean, as counted
Writes results/covariance_worlds.csv, .md and .png.
"""

from pathlib import Path

from ddpm import elbo, plots
from ddpm.commands import CommandParser, run_command
from ddpm.covariance import noise_statistics, reverse_covariance, shapes
from ddpm.denoiser import Denoiser
from ddpm.likelihood import reverse_model
from ddpm.mixture import GaussianMixture
from ddpm.randomness import generator
from ddpm.schedule import NoiseSchedule
from experiments.tables import markdown_table, write_csv, write_text
from nn.backend import limit_blas_threads

SCHEDULE = NoiseSchedule.linear(1000)
WORLDS = {"grid": GaussianMixture.grid(), "turned": GaussianMixture.grid(rotation_degrees=30),
          "stripes": GaussianMixture.stripes()}
TIMES, STEPS = (1, 5, 10, 20, 50, 100, 200, 300, 400, 600, 800, 1000), (5, 10, 20, 50, 100)
POINTS, STATISTICS = 20_000, 2000
# Each method with the look of its line: color, style, marker.
METHODS = {"large": ("#8c8c8c", "-", "v"), "small": ("#8c8c8c", "--", "^"), "analytic": ("#0b3c6f", ":", "s"),
           "residual": ("#0b3c6f", "-", "s"), "hutchinson": ("#e08a1e", "--", "o"), "diagonal": ("#4f9d69", "-.", "D"),
           "full": ("#b3242b", "-", "x")}


def main(argv=None):
    """Measure every world with every method, and write the tables and the picture."""
    p = CommandParser(prog="python -m experiments.covariance_worlds", description=__doc__)
    p.add_argument("--seed", type=int, default=0, help="of all draws (default: 0)")
    p.add_argument("--out", default="results", help="where tables and pictures go (default: results)")
    flags = p.parse_args(argv)
    limit_blas_threads(1)
    rows = []
    for where, world in WORLDS.items():
        denoiser = Denoiser.from_world(world, SCHEDULE)
        points = world.sample(STATISTICS, generator(flags.seed, where, "data"))
        statistics = noise_statistics(denoiser, SCHEDULE, points, generator(flags.seed, where, "statistics"),
                                      batch=20_000)
        for name in METHODS:
            print(f"{where}: {name}", flush=True)
            method = reverse_covariance(name, statistics=statistics, rng=generator(flags.seed, where, name, "probes"))
            case = world, denoiser, method, name, flags.seed
            rows += [{"world": where, "method": name} | row for row in (*errors(*case), *nats(*case))]
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "covariance_worlds.csv", rows)
    write_text(out / "covariance_worlds.md", report(rows, flags.seed))
    plots.save(picture(rows), out / "covariance_worlds.png")
    print(f"results in {out}: covariance_worlds.csv, covariance_worlds.md, covariance_worlds.png")
    return 0


def errors(world, denoiser, method, name, seed):
    """A row per t: the error of Var[eps | x_t], and the passes that were counted."""
    if name == "large":                                     # no covariance of x_0
        return
    for t in TIMES:
        x_t = world.noised(t, SCHEDULE).sample(POINTS, generator(seed, "x_t", t))
        prediction, before = denoiser.predict(x_t, t), denoiser.passes
        found = SCHEDULE.snr[t] * method.source(denoiser, prediction, x_t, t)
        passes, truth = (denoiser.passes - before) / POINTS, SCHEDULE.snr[t] * world.posterior_x0(x_t, t, SCHEDULE)[1]
        if not shapes.is_full(found, x_t):
            truth = shapes.diagonal(truth, x_t)
        square = ((found - truth)**2).reshape(POINTS, -1).sum(axis=1) / 2
        size = (truth**2).reshape(POINTS, -1).sum(axis=1).mean() / 2
        yield {"t": t, "error": square.mean()**0.5, "relative": (square.mean() / size)**0.5, "passes": passes}


def nats(world, denoiser, method, name, seed):
    """A row per number of steps: what the bound misses, nats per point."""
    x0 = world.sample(POINTS, generator(seed, "x_0"))
    reverse = reverse_model(denoiser, SCHEDULE, method, decoder="small" if name in ("large", "small") else "model")
    for steps in STEPS:
        bound = elbo.negative_bound(x0, reverse, SCHEDULE, generator(seed, "bound", steps), SCHEDULE.timesteps(steps),
                                    bin_width=None)
        missed = bound.total + world.log_density(x0)
        yield {"steps": steps, "missed": missed.mean(), "missed_error": missed.std() / POINTS**0.5}


def report(rows, seed):
    """Both tables, and how they came about."""
    parts = [f"`python -m experiments.covariance_worlds`, seed {seed}; the denoiser is exact, {POINTS:,} points, the "
             f"statistics of analytic and residual from {STATISTICS:,} points at each t, one probe of hutchinson."]
    for where in WORLDS:
        mine = [row for row in rows if row["world"] == where]
        shown = {name: [row for row in mine if row["method"] == name] for name in METHODS}
        parts.append(f"## {where}\n\nNats that the bound misses of log p (± standard error), by the number of steps, "
                     "and passes beyond the mean's.\n\n" + markdown_table(
                         ["covariance", "passes", *map(str, STEPS)],
                         [[name, f"{max((row['passes'] for row in some if 'passes' in row), default=0):g}",
                           *(f"{row['missed']:.3f} ± {row['missed_error']:.3f}" for row in some if "steps" in row)]
                          for name, some in shown.items()]))
        parts.append("Relative error of Var[eps | x_t], by t.\n\n" + markdown_table(
            ["covariance", *map(str, TIMES)],
            [[name, *(f"{row['relative']:.1e}" for row in some if "t" in row)]
             for name, some in shown.items() if name != "large"]))
    return "\n\n".join(parts) + "\n"


def picture(rows):
    """Error against t above, nats against steps below, a column for each world; what is exact has no error to show."""
    fig, axes = plots.figure(2, len(WORLDS), figsize=(11, 6.4), sharey="row")
    for (top, bottom), where in zip(axes.T, WORLDS, strict=True):
        for name, (color, line, marker) in METHODS.items():
            mine = [row for row in rows if (row["world"], row["method"]) == (where, name)]
            look = {"color": color, "ls": line, "marker": marker, "ms": 4, "lw": 1.3}
            by_time = [(row["t"], row["error"]) for row in mine if row.get("error", 0) > 1e-8]
            if by_time:
                top.loglog(*zip(*by_time, strict=True), **look)
            by_steps = [(row["steps"], row["missed"], row["missed_error"]) for row in mine if "steps" in row]
            bottom.errorbar(*zip(*by_steps, strict=True), label=name, **look)
        top.set(title=where, xlabel="t")
        bottom.set(xscale="log", yscale="log", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
        bottom.minorticks_off()
    axes[0, 0].set_ylabel("error of Var[eps | x_t]")
    axes[1, 0].set_ylabel("nats below log p")
    fig.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS))
    return fig


if __name__ == "__main__":
    run_command(main)
