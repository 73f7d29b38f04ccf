"""What each reverse variance costs a sampling step: python -m benchmarks.covariances

For every method of the covariance table (C13): what kind of covariance it is, the network passes beyond the mean's for
each image and step, counted by the denoiser, and the time of a step with it over that of a plain one ("small"), the two
measured in turn, medians over the rounds. The networks are the default U-Net on 28x28 images, with random weights,
which the time doesn't depend on. Writes benchmarks/results-covariances.md.
"""

import statistics
import time
from pathlib import Path

import numpy as np

from ddpm.commands import CommandParser, run_command
from ddpm.config import TrainConfig
from ddpm.covariance import METHODS, NoiseStatistics, reverse_covariance, shapes
from ddpm.heads import HEADS
from ddpm.likelihood import reverse_model
from ddpm.models import build_denoiser, build_head, build_network
from ddpm.randomness import normal_like
from experiments.tables import markdown_table, write_text
from nn.backend import keep_freed_memory, limit_blas_threads

SIDE, STEP = 28, (250, 500)
EXACT, EXACT_ROUNDS = ("diagonal", "full"), 3
"""A vjp for each pixel: measured on a single image."""


def main(argv=None):
    """Measure every method beside the plain step, and write the table."""
    p = CommandParser(prog="python -m benchmarks.covariances", description=__doc__)
    p.add_argument("--images", type=int, default=16, metavar="N", help="in a batch (default: 16)")
    p.add_argument("--rounds", type=int, default=15, metavar="N", help="pairs of steps (default: 15)")
    flags = p.parse_args(argv)
    keep_freed_memory()
    limit_blas_threads(1)
    lines = []
    for model, name in cases():
        exact = name in EXACT
        kind, passes, ratio = cost(model, name, *((1, EXACT_ROUNDS) if exact else (flags.images, flags.rounds)))
        lines.append([name if name != "learned" else f"learned ({model})", kind, f"{passes:g}", f"{ratio:.3g}"])
        print("  ".join(lines[-1]), flush=True)
    text = (f"# What a reverse variance costs\n\n`python -m benchmarks.covariances --images {flags.images} --rounds "
            f"{flags.rounds}`: a step of the default U-Net on {SIDE}x{SIDE} images, on one core, over a step with the "
            "variance \"small\", which is a pass and next to nothing; measured in turn, medians. The two exact ones: "
            f"one image, {EXACT_ROUNDS} rounds.\n\n")
    write_text(Path("benchmarks/results-covariances.md"),
               text + markdown_table(["variance", "covariance", "passes more", "time of a step"], lines) + "\n")
    return 0


def cases():
    """(model, variance) pairs: every method, on the model that has it."""
    for name in METHODS:
        if name == "learned":
            yield from (("iddpm", name), ("gddm", name))
        else:
            yield name if name in HEADS else "ddpm", name


def cost(model, name, images, rounds):
    """(kind of covariance, passes beyond the mean's, time over a plain step's) of one method."""
    plain, method = prepared("ddpm", "small"), prepared(model, name)
    x_t = np.random.default_rng(0).standard_normal((images, SIDE, SIDE, 1), dtype=np.float32)
    denoiser, _ = method
    for case in (plain, method)[:1 if name in EXACT else 2]:                    # the first step allocates
        step(*case, x_t)
    ratios, before = [], denoiser.passes
    for _ in range(rounds):
        (_, base), (var, seconds) = step(*plain, x_t), step(*method, x_t)
        ratios.append(seconds / base)
    kind = "full" if shapes.is_full(var, x_t) else "isotropic" if np.ptp(var) == 0 else "diagonal"
    return kind, (denoiser.passes - before) / (rounds * images) - 1, statistics.median(ratios)


def prepared(model, name):
    """(denoiser, covariance) with random weights."""
    config = TrainConfig(model=model, backbone="ddpm" if model in HEADS else "own", prediction="eps")
    network, head = build_network(config, 1), build_head(config, 1) if model in HEADS else None
    for module in (network, head):
        if module is not None:
            module.flat_parameters[...] += 0.02
    denoiser = build_denoiser(config, network, head)
    table = np.full(denoiser.schedule.T + 1, 0.5)
    return denoiser, reverse_covariance("learned" if name in HEADS else name, statistics=NoiseStatistics(table, table),
                                        rng=np.random.default_rng(1))


def step(denoiser, covariance, x_t):
    """(variance, seconds) of one reverse step."""
    s, t = STEP
    start = time.perf_counter()
    mean, var = reverse_model(denoiser, denoiser.schedule, covariance, clip=(-1, 1))(x_t, s, t)
    mean + shapes.root_times(var, normal_like(x_t, np.random.default_rng(2)))
    return var, time.perf_counter() - start


if __name__ == "__main__":
    run_command(main)
