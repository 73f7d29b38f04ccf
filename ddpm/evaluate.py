"""Measure a trained model: python -m ddpm.evaluate bpd RUN

bpd: bits per dimension of test images, an upper bound on -log2 p(x_0), split into prior, steps and decoder, with the
standard error over images; the curve over t is written to RUN/bits.png. With --steps K it is the bound of the chain
that samples in K steps, another model with another price.
"""

import json
import math

from ddpm.commands import SPACINGS, CommandParser, add_model_flags, open_run, open_variance, run_command
from ddpm.errors import UserError


def parser():
    """The command's flags."""
    p = CommandParser(prog="python -m ddpm.evaluate", description=__doc__, epilog="examples:\n"
                      "  python -m ddpm.evaluate bpd runs/gddm-mnist5k-1 --images 500 --strata 64 --json\n"
                      "  python -m ddpm.evaluate bpd runs/ocm-mnist5k-1 --steps 10")
    p.add_argument("what", choices=("bpd",), help="what to measure")
    add_model_flags(p, "of times and noise")
    p.add_argument("--json", action="store_true", help="one JSON object on stdout, for scripts")
    p.add_argument("--images", type=int, default=500, metavar="N", help="test images (default: 500)")
    p.add_argument("--strata", type=int, default=64, metavar="K", help="times drawn per image for the sum over t; "
                   "as many as the model's T give the whole sum (default: 64)")
    p.add_argument("--steps", type=int, metavar="K", help="measure the chain over K of the times (default: all)")
    p.add_argument("--spacing", choices=SPACINGS, default="uniform", help="with --steps, as for sampling (default: "
                   "uniform)")
    p.add_argument("--decoder", choices=("model", "small"), help="variance of the last step, to the image: the model's "
                   "own, or the fixed small one's, in which models of different variances are often compared (default: "
                   "model for gddm and iddpm with their own variance, else small)")
    p.add_argument("--data-dir", metavar="DIR", help="folder with the data's official files")
    return p


def main(argv=None):
    """Evaluate as the flags say; returns the exit status."""
    flags = parser().parse_args(argv)
    run = open_run(flags)
    if flags.images < 2 or flags.strata < 1:
        raise UserError("--images must be at least 2 (a standard error needs two) and --strata at least 1")
    if flags.steps is not None and not 1 <= flags.steps <= run.config.T:
        raise UserError(f"--steps must lie in 1..{run.config.T}, the number of steps this model was trained with, "
                        f"got {flags.steps}")
    return _bits(run, flags)


def _bits(run, flags):
    from ddpm import data
    from ddpm.models import default_variance, load_denoiser
    from ddpm.parallel import make_group
    from ddpm.report import measure_bits
    from ddpm.variance import default_decoder
    from nn.backend import keep_freed_memory
    keep_freed_memory()
    group = make_group(flags.workers or None, flags.device)
    denoiser, metadata = load_denoiser(run, flags.device)
    dataset = data.load(run.config.data, flags.data_dir or run.config.data_dir)
    name = flags.variance or default_variance(run.config.model)
    variance = open_variance(flags, run, denoiser, lambda: dataset)
    timesteps = None if flags.steps is None else denoiser.schedule.timesteps(flags.steps, flags.spacing)
    decoder = flags.decoder or default_decoder(run.config, name)
    bits = measure_bits(denoiser, dataset, flags.images, run.path, group, variance=variance, strata=flags.strata,
                        seed=flags.seed, timesteps=timesteps, decoder=decoder)
    parts = bits.summary()
    if flags.json:
        print(json.dumps({name: part if math.isfinite(part) else None for name, part in parts.items()}))
        return 0
    print(f"{run.config.model} after {metadata['step']} steps, {len(bits.total)} test images of {run.config.data}, "
          f"variance {name}" + (f", {flags.steps} steps" if flags.steps else ""))
    over = "t = 2..T" if timesteps is None else f"{len(timesteps) - 1} of them"
    for part, meaning in (("prior", "q(x_T|x_0) against the prior"), ("steps", f"sum over {over}"),
                          ("decoder", f"x_0 given x_{bits.times[1]}")):
        print(f"  {part:<8} {parts[part]:8.4f}   {meaning}")
    print(f"  {'total':<8} {parts['bits_per_dim']:8.4f} ± {parts['standard_error']:.4f} bits/dim")
    print(f"curve over t: {run.path / 'bits.png'}")
    print(f"next: python -m ddpm.sample {run.path} --num 16")
    return 0


if __name__ == "__main__":
    run_command(main)
