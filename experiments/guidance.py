"""Guidance in ten steps, with every reverse variance: python -m experiments.guidance --data mnist

Classes in turn are asked for at several guidance scales (C20), from the networks of `experiments.few_steps`, which are
trained here if they aren't there. For each scale and method:
  frechet     Frechet distance of samples to the training images, all classes together, in the classifier's features
  accuracy    share of the samples that the shipped classifier takes for what was asked for
All methods and scales start from the same noise. Writes results/guidance.csv, .md and .png, and goes on where it was
when it is started again.
"""

from pathlib import Path

import numpy as np

from ddpm.commands import CommandParser, run_command
from ddpm.errors import UserError
from ddpm.metrics.features import jackknifed_frechet
from experiments.image_methods import METHODS, Bench, add_flags, methods_plot, update_table
from experiments.tables import markdown_table
from nn.backend import keep_freed_memory

SCALES, STEPS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0), 10


def main(argv=None):
    """Train, draw, measure, write: whatever has not been done."""
    p = CommandParser(prog="python -m experiments.guidance", description=__doc__)
    add_flags(p, images=100)
    flags = p.parse_args(argv)
    if flags.images % 10 or flags.images < 40:
        raise UserError(f"--images must be a multiple of the ten classes, from 40 up, got {flags.images}")
    keep_freed_memory()
    bench = Bench(flags)
    for scale in SCALES:
        for name in METHODS:
            update_table(Path(flags.out) / "guidance", [measured(bench, name, scale)],
                         key=("data", "seed", "method", "scale"), report=report, picture=picture)
    return 0


def measured(bench, name, scale):
    """Distance and accuracy of a method's samples at one scale."""
    classes = len(bench.dataset.label_names)
    labels = np.arange(bench.flags.images) % classes
    features = bench.features(name, STEPS, labels, scale)
    frechet, error = jackknifed_frechet(features, *bench.real, groups=len(features) // classes, block=classes)
    hits = bench.classes(features) == labels
    row = {"data": bench.flags.data, "seed": bench.flags.seed, "method": name, "steps": STEPS, "scale": scale,
           "images": len(features), "frechet": frechet, "frechet_error": error, "accuracy": float(hits.mean()),
           "accuracy_error": float(hits.std() / len(hits)**0.5)}
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def report(rows):
    """A table of each measure for each data set."""
    parts = [f"`python -m experiments.guidance --data DATA`: classes in turn, asked for in {STEPS} steps (C20). Scale "
             "0 is no label, 1 the label alone. The models are those of [few_steps.md](few_steps.md); distances are "
             "jackknifed."]
    for name in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == name]
        cells = {(row["method"], row["scale"]): row for row in mine}
        parts.append(f"## {name}\n\n{max(row['images'] for row in mine)} samples of each.")
        for value, title in (("frechet", "Frechet distance"), ("accuracy", "accuracy")):
            parts.append(markdown_table([title, *map(str, SCALES)], [
                [method, *(f"{row[value]:.2f} ± {row[value + '_error']:.2f}" if (row := cells.get((method, scale)))
                           else "" for scale in SCALES)] for method in METHODS]))
    return "\n\n".join(parts) + "\n"


def picture(rows):
    """Distance above, accuracy below, against the scale; a column for each data set."""
    return methods_plot(rows, "scale", (("frechet", "frechet_error", "Frechet distance (classifier)", "linear"),
                                        ("accuracy", "accuracy_error", "taken for what was asked", "linear")),
                        xlabel="guidance scale")


if __name__ == "__main__":
    run_command(main)
