"""How few steps will do, for every reverse variance, on images: python -m experiments.few_steps --data mnist

Trains what is missing (a ddpm, an iddpm and a gddm of the same size, and the heads sn, npr and ocm on the ddpm), then
measures each method's chain of 5 to 1000 steps:
  bits (C18)      the bound of the chain with that many steps, bits/dim of test images; ddim draws no noise and has none
  frechet (C18)   Frechet distance of samples to the training images, in the features of the shipped classifier
  least (C19)     the least number of steps whose distance is within 5 % of the same method's with a thousand
A method's images with different steps, and all methods' images, come from the same noise, so that their differences
(here, from those of residual) are known better than they are. Writes results/few_steps.csv, .md and .png.

Stop it whenever you like. What has been drawn stays in --runs, a table row for a row of images, and a larger --images
draws only those that are missing; the table is brought up to date after every row.
"""

from pathlib import Path

import numpy as np

from ddpm.commands import CommandParser, run_command
from ddpm.errors import UserError
from ddpm.likelihood import evaluate_bits
from ddpm.metrics.features import jackknifed_frechet
from ddpm.parallel import make_group
from ddpm.runs import write_atomically
from experiments.image_methods import METHODS, Bench, add_flags, methods_plot, update_table
from experiments.tables import markdown_table
from nn.backend import keep_freed_memory

STEPS = (5, 10, 15, 20, 25, 30, 45, 50, 90, 100, 200, 1000)
STRATA, CLOSE, YARDSTICK = 16, 0.05, "residual"


def main(argv=None):
    """Train, draw, measure, write: whatever has not been done."""
    p = CommandParser(prog="python -m experiments.few_steps", description=__doc__)
    add_flags(p, images=128)
    p.add_argument("--bits-images", type=int, default=128, metavar="N", help="test images whose bits are measured "
                   "(default: 128)")
    p.add_argument("--steps", default=",".join(map(str, STEPS)), metavar="K,K", help="numbers of steps to measure now "
                   "(default: all twelve)")
    p.add_argument("--methods", default=",".join(METHODS), metavar="NAME,NAME", help="methods to measure now (default: "
                   "all; a step of hutchinson takes three passes)")
    flags = p.parse_args(argv)
    wanted, names = flags.steps.split(","), flags.methods.split(",")
    if not set(wanted) <= set(map(str, STEPS)) or not set(names) <= set(METHODS):
        raise UserError(f"--steps takes some of {', '.join(map(str, STEPS))} and --methods some of "
                        f"{', '.join(METHODS)}, with commas and no blanks between them")
    keep_freed_memory()
    bench = Bench(flags)
    for steps in map(int, wanted):
        for name in names:
            update_table(Path(flags.out) / "few_steps", [measured(bench, name, steps)],
                         key=("data", "seed", "method", "steps"), report=report, picture=picture)
    return 0


def measured(bench, name, steps):
    """Everything that is measured of a method with so many steps."""
    features = bench.features(name, steps)
    frechet, error = jackknifed_frechet(features, *bench.real)
    minus, minus_error = jackknifed_frechet(features, *bench.real, minus=bench.features(YARDSTICK, steps))
    row = {"data": bench.flags.data, "seed": bench.flags.seed, "method": name, "steps": steps,
           "images": len(features), "frechet": frechet, "frechet_error": error, "minus": minus,
           "minus_error": minus_error}
    if METHODS[name].variance:
        row |= bits(bench, name, steps)
    print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                    for key, value in row.items()), flush=True)
    return row


def bits(bench, name, steps):
    """Bits/dim of the chain, with its standard error, and its parts."""
    path = bench.runs / "bits" / f"{bench.flags.data}-{bench.flags.seed}-{name}-{steps}-{bench.flags.bits_images}.npy"
    if not path.exists():
        denoiser, variance, decoder = bench.prepare(name)
        found = evaluate_bits(denoiser, denoiser.schedule, bench.dataset.test_images[:bench.flags.bits_images],
                              bench.dataset.scale, make_group(), variance=variance, strata=STRATA,
                              bin_width=bench.dataset.bin_width, seed=bench.flags.seed, decoder=decoder,
                              timesteps=denoiser.schedule.timesteps(steps))
        path.parent.mkdir(parents=True, exist_ok=True)
        per_image = np.stack([found.prior, found.steps.sum(axis=0), found.decoder])
        write_atomically(path, lambda file: np.save(file, per_image))
    prior, between, decoder = np.load(path)
    total = prior + between + decoder
    return {"bits_per_dim": total.mean(), "bits_error": total.std(ddof=1) / len(total)**0.5,
            "bits_steps": between.mean(), "bits_decoder": decoder.mean(), "bits_images": len(total)}


# ---- tables and pictures

def least_steps(rows, target, target_error, sigmas=0.0):
    """The least of `rows`' steps whose distance lies within CLOSE of the target, `sigmas` standard errors off; or None.

    With sigmas = 1 a distance must be closer by one standard error of the difference, with -1 it may be farther by one.
    """
    for row in sorted(rows, key=lambda row: row["steps"]):
        error = ((1 + CLOSE)**2 * target_error**2 + row["frechet_error"]**2)**0.5 if row["steps"] < STEPS[-1] else 0.0
        if row["frechet"] + sigmas * error <= (1 + CLOSE) * target:
            return row["steps"]
    return None


def report(rows):
    """Both tables for each data set, and the least number of steps."""
    parts = ["`python -m experiments.few_steps --data DATA`: every reverse variance in few steps (C18, C19). "
             "One network of each kind, base 16, 3,000 training steps of 32 images; sn, npr and ocm are heads on the "
             "ddpm. Distances and their standard errors are jackknifed over the samples, which takes out the part that "
             "is due to their number."]
    for name in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == name]
        images, tests = sorted({row["images"] for row in mine}), max(row.get("bits_images", 0) for row in mine)
        parts.append(f"## {name}\n\n{' or '.join(map(str, images))} samples of each, {tests} test images.\n\n"
                     + table(mine, "frechet", "frechet_error", "Frechet distance", 2) + "\n\n"
                     + table([row for row in mine if row["method"] != YARDSTICK], "minus", "minus_error",
                             f"minus that of {YARDSTICK}, from the same noise", 2) + "\n\n"
                     + table(mine, "bits_per_dim", "bits_error", "bits/dim", 2) + "\n\n" + least_table(mine))
    return "\n\n".join(parts) + "\n"


def table(rows, value, error, title, digits):
    """Means ± standard errors by method and number of steps."""
    cells = {(row["method"], row["steps"]): f"{row[value]:.{digits}f} ± {row[error]:.{digits}f}"
             for row in rows if value in row}
    shown = [name for name in METHODS if any(method == name for method, _ in cells)]
    return markdown_table([title, *map(str, STEPS)],
                          [[name, *(cells.get((name, steps), "") for steps in STEPS)] for name in shown])


def least_table(rows):
    """C19: the least number of steps within 5 % of the thousand-step distance, the method's own and the best."""
    by_method = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    ends = {name: row for name, some in by_method.items() for row in some if row["steps"] == STEPS[-1]}
    if not ends:
        return "(no thousand-step distance yet)"
    best = min(ends.values(), key=lambda row: row["frechet"])

    def cell(some, end):
        found = [least_steps(some, end["frechet"], end["frechet_error"], sigmas) for sigmas in (0, -1, 1)]
        number, low, high = ("never" if steps is None else str(steps) for steps in found)
        return number if low == high else f"{number} ({low} to {high})"

    return markdown_table(
        ["least steps", "within 5 % of its own thousand", f"within 5 % of the best thousand ({best['method']})",
         "published, CIFAR-10, FID about 6"],
        [[name, cell(by_method[name], end), cell(by_method[name], best), str(METHODS[name].published or "")]
         for name, end in ends.items()])


def picture(rows):
    """Distance above, bits/dim below, against the number of steps; a column for each data set."""
    return methods_plot(rows, "steps", (("frechet", "frechet_error", "Frechet distance (classifier)", "log"),
                                        ("bits_per_dim", "bits_error", "bits/dim", "log")),
                        xlabel="steps", xscale="log", xticks=(5, 10, 20, 50, 100, 200, 1000))


if __name__ == "__main__":
    run_command(main)
