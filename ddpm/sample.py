"""Draw images from a trained model: python -m ddpm.sample RUN --num 16 --steps 50

Writes a PNG grid and the images themselves as samples.npz; for a model with a variance, also a picture of each pixel's
uncertainty on the way from noise to image. A model trained with --conditional draws images of any class, or of the one
that --label asks for, and --guidance-scale says how much more like that class than the model finds likely.
"""

import re
from functools import partial
from pathlib import Path

from ddpm.commands import SPACINGS, CommandParser, add_model_flags, open_run, open_variance, run_command
from ddpm.errors import UserError


def parser():
    """The command's flags."""
    p = CommandParser(prog="python -m ddpm.sample", description=__doc__, epilog="examples:\n"
                      "  python -m ddpm.sample runs/gddm-mnist5k-1 --num 64 --steps 100 --out pictures\n"
                      "  python -m ddpm.sample runs/ocm-mnist5k-1 --steps 10 --variance ocm\n"
                      "  python -m ddpm.sample runs/gddm-mnist5k-2 --num 40 --label all --guidance-scale 2")
    add_model_flags(p, "image i is a function of the seed and i (and of its label)")
    p.add_argument("--num", type=int, default=16, metavar="N", help="number of images (default: 16)")
    p.add_argument("--steps", type=int, metavar="K",
                   help="steps from noise to image, from 1 to the model's T, of one network pass each, or of two where "
                   "there is a guidance scale other than 0 and 1 (default: 250, or T if that is less)")
    p.add_argument("--sampler", choices=("ddpm", "ddim", "dpm-solver", "flow"), default="ddpm",
                   help="ddpm draws noise at every step; ddim none (but see --eta); dpm-solver, of second order, is "
                   "closer to ddim's limit in as many steps; flow, by Heun's rule, is too, in two passes a step "
                   "(default: ddpm)")
    p.add_argument("--eta", type=float, metavar="X", help="noise of ddim, from 0, none, to 1, as much as ddpm with the "
                   "small variance (default: 0)")
    p.add_argument("--spacing", choices=SPACINGS, default="uniform", help="of the steps in "
                   "time: even from T to 1, denser near the image, or even from T (default: uniform)")
    p.add_argument("--label", metavar="NAME", help="class to draw, by its name or its number from 0 up, or all for "
                   "each in turn, one a column (default: no label); for runs with --conditional")
    p.add_argument("--guidance-scale", type=float, metavar="S", help="noise without the label + S (noise with it - "
                   "noise without): 0 is no label, 1 the label, more is more typical and less varied (default: 1)")
    p.add_argument("--last-noise", type=float, metavar="Y", help="mean size of the noise that the last step may leave "
                   "in the image, in levels of 2/255; with few steps and a large variance it would show as grain "
                   "(default: no limit)")
    p.add_argument("--export", metavar="DIR", help="also write each image as a PNG of its own into DIR, for other "
                   "people's tools (an Inception-based FID, say)")
    p.add_argument("--out", metavar="DIR", help="where to write (default: RUN/samples-seed-SEED-steps-K, and the label "
                   "and scale that were asked for)")
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
    _check_sampler(flags)
    if flags.label is None and flags.guidance_scale is not None:
        raise UserError("--guidance-scale needs a --label to guide to")
    if flags.label is not None and not run.config.conditional:
        raise UserError(f"--label needs a model that knows labels, and {run.path} was trained without --conditional")
    out = Path(flags.out) if flags.out else run.path / _folder(flags)
    _check_empty(out, "--out")
    if flags.export:
        _check_empty(Path(flags.export), "--export")
        if Path(flags.export).resolve() == out.resolve():
            raise UserError("--export needs a folder of its own, so that it holds images alone; choose another")
    return _sample(run, flags, out)


def _check_empty(folder, flag):
    """UserError unless nothing is lost by writing there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not an empty folder; choose another with {flag}")


def _check_sampler(flags):
    """UserError for flags that the sampler has no use for."""
    if flags.eta is not None and flags.sampler != "ddim":
        raise UserError(f"--eta belongs to --sampler ddim, not to {flags.sampler}; leave it out")
    if flags.eta is not None and not 0 <= flags.eta <= 1:
        raise UserError(f"--eta must lie between 0 and 1, got {flags.eta:g}")
    if flags.last_noise is not None and flags.sampler in ("dpm-solver", "flow"):
        raise UserError(f"--sampler {flags.sampler} draws no noise and has no --last-noise; leave it out")
    if flags.last_noise is not None and not flags.last_noise >= 0:
        raise UserError(f"--last-noise must be at least 0, got {flags.last_noise:g}")


def _folder(flags):
    """The name of a folder for what the flags ask for."""
    label = "" if flags.label is None else "-label-" + re.sub(r"\W+", "-", flags.label)
    scale = "" if flags.guidance_scale is None else f"-scale-{flags.guidance_scale:g}"
    sampler = "" if flags.sampler == "ddpm" else f"-{flags.sampler}"
    variance = "" if flags.variance is None else f"-{flags.variance}"
    return f"samples-seed-{flags.seed}-steps-{flags.steps}{sampler}{variance}{label}{scale}"


def _sample(run, flags, out):
    import numpy as np

    from ddpm import data
    from ddpm.errors import one_sentence
    from ddpm.guidance import check_scale
    from ddpm.models import load_denoiser
    from ddpm.parallel import make_group
    from ddpm.report import draw_samples, export_images
    from ddpm.runs import write_atomically
    from ddpm.samplers import grey_level_variance
    from nn.backend import keep_freed_memory
    keep_freed_memory()
    scale = 1.0 if flags.guidance_scale is None else flags.guidance_scale
    check_scale(scale, "--guidance-scale")
    group = make_group(flags.workers or None, flags.device)
    denoiser, metadata = load_denoiser(run, flags.device)
    asked = _asked(flags, metadata)
    with one_sentence("the folder", out, remedy="choose another with --out"):
        out.mkdir(parents=True, exist_ok=True)
    variance = None
    if flags.sampler == "ddpm" or flags.variance:
        variance = open_variance(flags, run, denoiser, partial(data.load, run.config.data, run.config.data_dir))
    last = None if flags.last_noise is None else grey_level_variance(flags.last_noise)
    images, written = draw_samples(denoiser, tuple(metadata["image_shape"]), flags.num, out, group, steps=flags.steps,
                                   variance=variance, seed=flags.seed, sampler=flags.sampler, eta=flags.eta or 0.0,
                                   spacing=flags.spacing, guidance_scale=scale, last_variance=last, **asked)
    labels = {"labels": asked["labels"]} if asked else {}
    write_atomically(out / "samples.npz", lambda file: np.savez_compressed(
        file, images=data.unscale(images, metadata["levels"]), **labels))
    written.insert(1, "samples.npz")
    if flags.export:
        export_images(images, flags.export)
        print(f"{flags.num} PNG file{'s' * (flags.num > 1)} in {flags.export}")
    print(f"{flags.num} image{'s' * (flags.num > 1)} in {out}: {', '.join(written)}")
    if "columns" in asked:
        print(f"columns of samples.png: {', '.join(metadata['label_names'])}")
    print(f"next: python -m ddpm.evaluate bpd {run.path}")
    return 0


def _asked(flags, metadata):
    """Which labels --label means, as options of `draw_samples`; UserError that lists the names for another."""
    import numpy as np

    from ddpm.report import one_of_each
    if flags.label is None:
        return {}
    names = metadata["label_names"]
    if flags.label == "all":
        return one_of_each(names, flags.num)
    if flags.label in names:
        return {"labels": np.full(flags.num, names.index(flags.label))}
    numbered = not any(name.isdecimal() for name in names)              # else a number might mean either
    if numbered and flags.label.isdecimal() and int(flags.label) < len(names):
        return {"labels": np.full(flags.num, int(flags.label))}
    by_number = f", or 0 to {len(names) - 1}" if numbered else ""
    raise UserError(f"--label must be one of {', '.join(names)}{by_number}, or all, got {flags.label}")


if __name__ == "__main__":
    run_command(main)
