"""Draw images from a trained model: python -m ddpm.sample RUN --num 16 --steps 50

Writes a PNG grid and the images themselves as samples.npz; for a model with a variance, also a picture of each pixel's
uncertainty on the way from noise to image.
"""

from pathlib import Path

from ddpm.commands import CommandParser, UserError, add_model_flags, open_run, run_command


def parser():
    """The command's flags."""
    p = CommandParser(prog="python -m ddpm.sample", description=__doc__, epilog="example:\n"
                      "  python -m ddpm.sample runs/gddm-mnist5k-1 --num 64 --steps 100 --out pictures")
    add_model_flags(p, "image i is a function of the seed and i")
    p.add_argument("--num", type=int, default=16, metavar="N", help="number of images (default: 16)")
    p.add_argument("--steps", type=int, metavar="K",
                   help="network passes per image, from 1 to the model's T (default: 250, or T if that is less)")
    p.add_argument("--out", metavar="DIR", help="where to write (default: RUN/samples-seed-SEED-steps-K)")
    return p


def main(argv=None):
    """Sample as the flags say; returns the exit status."""
    flags = parser().parse_args(argv)
    run = open_run(flags)
    flags.steps = min(250, run.config.T) if flags.steps is None else flags.steps
    if flags.num < 1:
        raise UserError(f"--num must be at least 1, got {flags.num}")
    if not 1 <= flags.steps <= run.config.T:
        raise UserError(f"--steps must lie in 1..{run.config.T}, the number of steps this model was trained with, "
                        f"got {flags.steps}")
    out = Path(flags.out) if flags.out else run.path / f"samples-seed-{flags.seed}-steps-{flags.steps}"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty folder; choose another with --out")
    return _sample(run, flags, out)


def _sample(run, flags, out):
    import numpy as np

    from ddpm import data
    from ddpm.commands import one_sentence
    from ddpm.models import default_variance, load_denoiser
    from ddpm.parallel import make_group
    from ddpm.report import draw_samples
    from ddpm.runs import write_atomically
    from nn.backend import keep_freed_memory
    keep_freed_memory()
    group = make_group(flags.workers or None, flags.device)
    denoiser, metadata = load_denoiser(run, flags.device)
    with one_sentence("the folder", out, remedy="choose another with --out"):
        out.mkdir(parents=True, exist_ok=True)
    images, written = draw_samples(denoiser, tuple(metadata["image_shape"]), flags.num, out, group, steps=flags.steps,
                                   variance=flags.variance or default_variance(run.config.model), seed=flags.seed)
    write_atomically(out / "samples.npz", lambda file: np.savez_compressed(
        file, images=data.unscale(images, metadata["levels"])))
    written.insert(1, "samples.npz")
    print(f"{flags.num} image{'s' * (flags.num > 1)} in {out}: {', '.join(written)}")
    print(f"next: python -m ddpm.evaluate bpd {run.path}")
    return 0


if __name__ == "__main__":
    run_command(main)
