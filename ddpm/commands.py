"""How every command talks: its parser, its progress bar, and errors as one sentence on stderr with exit status 2.

What a person can put right (a wrong value, a missing file, a full disk) ends as `error: ...`, never as a traceback.
DDPM_DEBUG=1 in the environment brings the traceback back, for finding the bug behind a sentence that makes no sense.
"""

import argparse
import os
import sys
import traceback
import warnings

from ddpm.errors import UserError, sentence


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that keeps paragraphs as written, takes no abbreviated flags, and answers in one sentence."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, f"error: {message}; '{self.prog} --help' explains the flags\n")


def add_model_flags(parser, seed_help):
    """The flags that every command about a trained model takes; see `open_run`."""
    parser.add_argument("run", metavar="RUN", help="folder of a training run")
    parser.add_argument("--variance", choices=("large", "small", "learned"),
                        help="reverse variance (default: small for ddpm, learned for the others)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help=f"{seed_help} (default: 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the arrays live (default: cpu)")
    parser.add_argument("--workers", type=int, default=0, metavar="N",
                        help="local processes that share the images (default: the cores this process may use)")


def open_run(flags):
    """The RunFolder that the flags name, after checking the flags of `add_model_flags` against it; UserError."""
    from ddpm.runs import RunFolder
    run = RunFolder.open(flags.run)
    if flags.seed < 0 or flags.workers < 0:
        raise UserError("--seed and --workers must be at least 0")
    if flags.variance == "learned" and run.config.model == "ddpm":
        raise UserError("--variance learned needs a model that has one (gddm or iddpm); use large or small")
    return run


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
