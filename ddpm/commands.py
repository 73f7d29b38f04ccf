"""How every command talks: its parser, its progress bar, and errors as one sentence on stderr with exit status 2.

What a person can put right (a wrong value, a missing file, a full disk) ends as `error: ...`, never as a traceback.
DDPM_DEBUG=1 in the environment brings the traceback back, for finding the bug behind a sentence that makes no sense.
"""

import argparse
import os
import sys
import traceback
import warnings
from functools import partial

from ddpm.errors import UserError, sentence


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that keeps paragraphs as written, takes no abbreviated flags, and answers in one sentence."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; '{self.prog} --help' explains the flags\n")


VARIANCES = ("large", "small", "learned", "analytic", "residual", "sn", "npr", "ocm", "hutchinson", "diagonal", "full")
"""The names of `ddpm.covariance.METHODS`; said here too, so that a parser needs nothing of what they are made of."""


SPACINGS = ("uniform", "quadratic", "trailing")


def add_model_flags(parser, seed_help):
    """The flags that every command about a trained model takes; see `open_run`."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument("--variance", choices=VARIANCES, metavar="NAME", help="reverse variance: large, small, learned "
                        "(by the model, each pixel); analytic or residual (a number for each t, measured on the "
                        "training images once and kept in RUN); sn, npr or ocm (learned by the head of that run); "
                        "hutchinson, diagonal or full (from the network's derivative, slow) (default: small for ddpm, "
                        "learned for the others)")
    parser.add_argument("--probes", type=int, metavar="M", help="with --variance hutchinson: random probes a step, two "
                        "passes each (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"{seed_help} (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the arrays live (default: cpu)")
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="local processes that share the images (default: the cores this process may use)")


def open_run(flags):
    """The RunFolder that the flags name, after checking the flags of `add_model_flags` against it; UserError."""
    from ddpm.runs import RunFolder
    from ddpm.variance import check_variance
    run = RunFolder.open(flags.run)
    if flags.seed < 0 or flags.workers < 0:
        raise UserError("--seed and --workers must be at least 0")
    if flags.probes is not None and (flags.variance != "hutchinson" or flags.probes < 1):
        raise UserError(f"--probes is a number from 1 up that belongs to --variance hutchinson, got {flags.probes}")
    check_variance(flags.variance, run.config, getattr(flags, "sampler", "ddpm"))
    return run


def open_variance(flags, run, denoiser, dataset):
    """The reverse variance that the flags ask for, prepared; `dataset()` is called if its images are needed."""
    from ddpm.parallel import make_group
    from ddpm.variance import prepare_variance
    return prepare_variance(flags.variance, run, denoiser, dataset,
                            group=partial(make_group, flags.workers or None, flags.device), probes=flags.probes or 1,
                            bar=partial(progress_bar, run.config.T, "statistics", "time"))


def progress_bar(total, description, unit, shown=True):
    """A tqdm bar over `total` units; with shown=False it counts in silence."""
    from tqdm import tqdm
    return tqdm(total=total, disable=not shown, desc=description, unit=unit, smoothing=0.1, dynamic_ncols=True)


def run_command(main):
    """Run `main()` as a command: leaves by SystemExit, with status 0 (or what main returns), or 2 after a sentence.

    Caught are UserError, ValueError, OSError, MemoryError and plain RuntimeError (no GPU); other exceptions are bugs
    and keep their traceback. Ctrl-C exits 130.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = main()
            sys.stdout.flush()
    except BrokenPipeError:                                         # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except (UserError, ValueError, OSError, MemoryError, RuntimeError) as error:
        if type(error) in (NotImplementedError, RecursionError):
            raise
        if os.environ.get("DDPM_DEBUG"):
            traceback.print_exc()
        print(f"error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status or 0)


def _show_warning(message, category, filename, lineno, file=None, line=None):
    if issubclass(category, UserWarning):
        text = f"warning: {message}\n"
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
    (file or sys.stderr).write(text)
