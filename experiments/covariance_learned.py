"""Every reverse covariance with the true score and with a learned one: python -m experiments.covariance_learned

Nine Gaussians on a grid, upright and turned by 30 degrees (C14). A small network learns the noise (seeds 0 to 2), and
each method makes Var[eps | x_t] of it, or of the exact denoiser; heads (sn, npr, ocm) and variances (iddpm, gddm) are
trained around that mean, which stays as it is. The truth is the world's in both cases. Fifteen minutes on one core.
  error   relative root mean square error of Var[eps | x_t] per coordinate (of "full": of the matrix), against t; an
          I-DDPM's variance is one of the step t -> t-1, and tells Var[eps | x_t] up to t = 20 only (see `implied`)
  step    the same of the covariance of x_s | x_t itself, for the steps of a chain of ten: common ground for all
  nats    what the bound misses of log p in ten steps, with its standard error
Writes results/covariance_learned.csv, .md and .png. What has been measured is kept in --runs and not measured again.
"""

from functools import cache
from pathlib import Path

import numpy as np

from ddpm import plots
from ddpm.commands import CommandParser, run_command
from ddpm.covariance import ReverseCovariance, reverse_covariance, shapes
from ddpm.covariance.methods import learned_variance
from ddpm.covariance.sources import of_world
from ddpm.denoiser import Denoiser
from ddpm.heads import HEADS
from ddpm.models import find_objective
from ddpm.points import fit_head, fit_points, fit_variance
from ddpm.randomness import generator
from experiments import covariance_worlds
from experiments.covariance_worlds import SCHEDULE, TIMES, errors, kept_rows, nats, statistics_of
from experiments.tables import markdown_table, write_csv, write_text
from nn.backend import limit_blas_threads

WORLDS = {where: world for where, world in covariance_worlds.WORLDS.items() if where != "stripes"}
SEEDS = {"true": (0,), "learned": (0, 1, 2)}
POINTS, CHAIN, IDENTIFIED = 10_000, 10, 20
NETWORK = {"hidden": (128, 128, 128), "steps": 4000, "batch_size": 512}
HEAD = {"hidden": (64, 64, 64), "steps": 3000, "batch_size": 256}
# Each method with the look of its line: color, style, marker. What was trained is warm, statistics are blue.
METHODS = {"large": ("#8c8c8c", "-", "v"), "small": ("#8c8c8c", "--", "^"), "analytic": ("#0b3c6f", ":", "s"),
           "residual": ("#0b3c6f", "-", "s"), "iddpm": ("#6a4c93", "-", "P"), "sn": ("#e3b23c", ":", "o"),
           "npr": ("#e08a1e", "--", "o"), "ocm": ("#c8553d", "-", "o"), "gddm": ("#7a1f2b", "-.", "*"),
           "hutchinson": ("#7fb7be", "--", "D"), "diagonal": ("#4f9d69", "-.", "D"), "full": ("#111111", "-", "x")}


def main(argv=None):
    """Train what is missing, measure it, and write the tables and the picture."""
    p = CommandParser(prog="python -m experiments.covariance_learned", description=__doc__)
    p.add_argument("--runs", default="runs/covariance-learned",
                   help="where measurements are kept (default: %(default)s)")
    p.add_argument("--out", default="results", help="where tables and pictures go (default: results)")
    flags = p.parse_args(argv)
    limit_blas_threads(1)
    rows = []
    for where, world in WORLDS.items():
        for score, seeds in SEEDS.items():
            for seed in seeds:
                rows += measure(where, world, score, seed, Path(flags.runs))
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "covariance_learned.csv", rows)
    write_text(out / "covariance_learned.md", report(rows))
    plots.save(picture(rows), out / "covariance_learned.png")
    print(f"results in {out}: covariance_learned.csv, covariance_learned.md, covariance_learned.png")
    return 0


def measure(where, world, score, seed, runs):
    """The rows of every method with one score."""
    statistics, rows = statistics_of(where, world, seed), []

    @cache
    def denoiser():
        if score == "true":
            return Denoiser.from_world(world, SCHEDULE)
        return fit_points(world, SCHEDULE, find_objective("ddpm"), model="ddpm", seed=seed, **NETWORK)

    def rows_of(name):
        model, method = with_method(name, denoiser(), where, world, seed, statistics)
        yield from step_errors(world, model, method, seed)
        yield from nats(world, model, method, name, seed, POINTS, (CHAIN,))
        if name == "iddpm":
            known = [t for t in TIMES if t <= IDENTIFIED]
            yield from errors(world, model, ReverseCovariance(implied), name, seed, POINTS, known)
        else:
            yield from errors(world, model, method, name, seed, POINTS)

    for name in METHODS:
        found = kept_rows(runs / f"{where}-{score}-{name}-{seed}.json", lambda name=name: rows_of(name))
        rows += [{"world": where, "score": score, "method": name, "seed": seed} | row for row in found]
    return rows


def with_method(name, denoiser, where, world, seed, statistics):
    """(denoiser, ReverseCovariance) of a method around a mean, trained where it has something to learn."""
    if name in ("iddpm", "gddm"):
        return fit_variance(name, denoiser, world, SCHEDULE, seed=seed, **HEAD), reverse_covariance("learned")
    head = fit_head(name, denoiser, world, SCHEDULE, seed=seed, **HEAD) if name in HEADS else None
    return denoiser, reverse_covariance(
        name, head=head, statistics=statistics(denoiser) if name in ("analytic", "residual") else None,
        rng=generator(seed, where, name, "probes"))


def implied(denoiser, prediction, x_t, t):
    """Cov[x_0 | x_t] = (W - var) / a^2 that the variance W of the step t -> t-1 stands for.

    W / var = 1 + k Var[eps | x_t] with k = c^2 / var (G05), 0.09 at t = 20 and 0.02 at t = 100: an error of a few per
    cent in W is one of 100 per cent here, and beyond t = 20 W says little of it.
    """
    posterior = SCHEDULE.posterior(t - 1, t)
    return (learned_variance(prediction, x_t, t - 1, t, SCHEDULE) - posterior.var) / posterior.a**2


def step_errors(world, denoiser, method, seed):
    """A row for each step of a chain, t -> s: the relative error of the covariance of x_s | x_t."""
    exact, times = ReverseCovariance(of_world), [int(t) for t in SCHEDULE.timesteps(CHAIN)]
    knows = Denoiser.from_world(world, SCHEDULE)
    for t, s in zip(times, times[1:], strict=False):
        x_t = world.noised(t, SCHEDULE).sample(POINTS, generator(seed, "x_t", t))
        found = method(denoiser, denoiser.predict(x_t, t), x_t, s, t, SCHEDULE)
        truth = exact(knows, None, x_t, s, t, SCHEDULE)
        if not shapes.is_full(found, x_t):
            truth = shapes.diagonal(truth, x_t)
        yield {"s": s, "step_from": t, "step_error": float((((found - truth)**2).mean() / (truth**2).mean())**0.5)}


def report(rows):
    """All tables, and how they came about."""
    seeds = len(SEEDS["learned"])
    parts = ["`python -m experiments.covariance_learned`; linear schedule, T = 1000, "
             f"{POINTS:,} points; with the learned score means over {seeds} seeds, ± the standard error over seeds; "
             "with the true one a single seed, ± the standard error over points. Estimates are as they come; in a step "
             "those below 0 count as 0. One probe of hutchinson."]
    chain = [int(t) for t in SCHEDULE.timesteps(CHAIN)][:-1]
    for where in WORLDS:
        mine = [row for row in rows if row["world"] == where]
        parts.append(f"## {where}\n\nNats that the bound misses of log p in ten steps.\n\n" + markdown_table(
            ["covariance", *(f"{score} score" for score in SEEDS)],
            [[name, *(nats_cell(mine, score, name) for score in SEEDS)] for name in METHODS]))
        for score in SEEDS:
            for title, key, time, times in (
                    ("Var[eps | x_t], by t", "relative", "t", TIMES),
                    ("the covariance of x_s | x_t in a chain of ten steps, by t", "step_error", "step_from", chain)):
                lines = [[name, *(cell(mine, score, name, key, time, t) for t in times)] for name in METHODS]
                parts.append(f"Relative error of {title}, with the {score} score.\n\n" + markdown_table(
                    ["covariance", *map(str, times)], [line for line in lines if any(line[1:])]))
    return "\n\n".join(parts) + "\n"


def values(rows, score, name, key, **where):
    """The numbers of that key over seeds."""
    return np.array([row[key] for row in rows if key in row and (row["score"], row["method"]) == (score, name)
                     and all(row[k] == v for k, v in where.items())])


def nats_cell(rows, score, name):
    """Mean and standard error: over seeds, or over points where there is one seed."""
    missed, points = values(rows, score, name, "missed"), values(rows, score, name, "missed_error")
    error = points[0] if len(missed) == 1 else missed.std(ddof=1) / len(missed)**0.5
    digits = 3 if missed.mean() < 10 else 1
    return f"{missed.mean():.{digits}f} ± {error:.{digits}f}"


def cell(rows, score, name, key, time, t):
    """Mean over seeds of an error at time t."""
    found = values(rows, score, name, key, **{time: t})
    if not len(found):
        return ""
    return "exact" if found.mean() < 1e-6 else f"{found.mean():.2g}"


def picture(rows):
    """Relative error of Var[eps | x_t] against t: a row for each score, a column for each world; bands over seeds."""
    fig, axes = plots.figure(len(SEEDS), len(WORLDS), figsize=(11, 8.4), sharex=True, sharey=True)
    for line, score in zip(axes, SEEDS, strict=True):
        for ax, where in zip(line, WORLDS, strict=True):
            mine = [row for row in rows if row["world"] == where]
            for name, (color, style, marker) in METHODS.items():
                found = {t: values(mine, score, name, "relative", t=t) for t in TIMES}      # the exact gets no line
                found = {t: some for t, some in found.items() if len(some) and some.max() > 1e-6}
                look = {"color": color, "ls": style, "marker": marker, "ms": 4.5, "lw": 1.3}
                ax.loglog(list(found), [some.mean() for some in found.values()], label=name, **look)
                if found:
                    ax.fill_between(list(found), [some.min() for some in found.values()],
                                    [some.max() for some in found.values()], color=color, alpha=0.15, lw=0)
            ax.set(title=f"{where}, {score} score", ylim=(3e-3, 1e3))
            ax.tick_params(labelbottom=True)
    for ax in axes[-1]:
        ax.set_xlabel("t")
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error of Var[eps | x_t]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    shown = [(h, name) for h, name in zip(handles, labels, strict=True) if name != "large"]
    fig.legend(*zip(*shown, strict=True), loc="outside lower center", ncols=6)
    return fig


if __name__ == "__main__":
    run_command(main)
