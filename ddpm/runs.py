"""A run folder: everything that one training run leaves behind, in a state to go on from after any SIGKILL.

    config.json                        the TrainConfig
    metrics.jsonl                      one JSON object a line: step, loss, seconds, images_per_second, ...
    checkpoint.safetensors             the newest; checkpoint.previous.safetensors is the one before
    samples.png, statistics, ...       what the commands add: pictures, and what `ddpm.variance` measures once

Each file but metrics.jsonl is replaced in one step (`write_atomically`); metrics.jsonl only grows, and a line that a
kill cut off is dropped by `truncate_log` on resuming. One process at a time may write: it holds `.lock`, which the
kernel releases however the process ends.
"""

import contextlib
import itertools
import json
import math
import os
import re
import warnings
import weakref
from pathlib import Path

from ddpm.config import TrainConfig, flag
from ddpm.errors import UserError, one_sentence, sentence
from nn import checkpoint
from nn.checkpoint import TEMPORARY

CONFIG, METRICS, LOCK = "config.json", "metrics.jsonl", ".lock"
CHECKPOINT, PREVIOUS = "checkpoint.safetensors", "checkpoint.previous.safetensors"


class RunFolder:
    """The folder `path` of a run of the TrainConfig `config`; from `create` or `open`, and `with` frees the lock."""

    def __init__(self, path, config):
        self.path, self.config = Path(path), config
        self._lock, self._newest_is_damaged = None, False

    # ---- make, open, lock

    @classmethod
    def create(cls, path, config):
        """A new run, locked, with its config.json; `path` None means runs/<model>-<data>-<next free number>.

        UserError if the folder holds anything already or cannot be written.
        """
        with one_sentence("the run folder", path, remedy="choose another folder with --out"):
            path = _next_free(config) if path is None else Path(path)
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, config)
            run.lock()
            try:
                run._refuse_if_used()
                write_atomically(run.path / CONFIG, lambda file: file.write(config.to_json().encode()))
            except BaseException:
                run.close()
                raise
        return run

    @classmethod
    def open(cls, path, *, exclusive=False):
        """The run in the folder `path`; `exclusive` locks it, which continuing it needs and looking at it does not.

        UserError if there is no run, if its config.json cannot be read, or if another process holds it.
        """
        path = Path(path)
        try:
            config = TrainConfig.from_json((path / CONFIG).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path} holds no run (there is no {path / CONFIG}); name a folder that training "
                            "made") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path / CONFIG} is no configuration of this project: {sentence(error)}") from None
        run = cls(path, config)
        if exclusive:
            run.lock()
        return run

    def lock(self):
        """Become the one process that writes here, or raise UserError; removes temporary files that a kill left."""
        import fcntl
        with one_sentence("the run folder", self.path, remedy="choose another folder with --out"):
            lock = open(self.path / LOCK, "ab")                                     # kept open while locked
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.close()
                raise UserError(f"another process is training in {self.path}; wait for it or choose another folder "
                                "with --out") from None
        self._lock = lock
        _held.add(lock)
        for leftover in self.path.glob(f".*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)

    def close(self):
        """Free the lock."""
        if self._lock:
            _held.discard(self._lock)
            self._lock.close()
            self._lock = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _refuse_if_used(self):
        names = sorted({p.name for p in self.path.iterdir()} - {LOCK})
        if CONFIG in names:
            raise UserError(f"{self.path} already holds a run; continue it with --resume {self.path} or choose another "
                            "folder with --out")
        if names:
            raise UserError(f"{self.path} is not empty (it holds {names[0]}); choose another folder with --out")

    # ---- checkpoints

    def save_checkpoint(self, arrays, metadata):
        """Write the newest checkpoint and keep the one before; at every moment a complete one is in place.

        `metadata` is a JSON-able dict; the configuration is stored beside it. Call `log` for a step before saving it:
        then no kill can leave a checkpoint whose steps are not all in metrics.jsonl.
        """
        newest, previous, link = self.path / CHECKPOINT, self.path / PREVIOUS, self.path / f".{PREVIOUS}{TEMPORARY}"
        incoming = self.path / f".next{TEMPORARY}"
        with one_sentence("the checkpoint", newest, remedy=f"continue with --resume {self.path}"):
            checkpoint.save(incoming, arrays, {"config": self.config.to_dict(), "metadata": metadata})
            if newest.exists() and not self._newest_is_damaged:
                try:                                          # two names for one file, then one rename: no gap
                    link.unlink(missing_ok=True)
                    os.link(newest, link)
                    os.replace(link, previous)
                except OSError:                               # no hard links here: for a moment only `previous` exists
                    os.replace(newest, previous)
            os.replace(incoming, newest)
            self._newest_is_damaged = False
            checkpoint.sync_folder(self.path)

    def load_checkpoint(self):
        """(arrays, metadata) of the newest complete checkpoint.

        Where the newest is cut off or missing, the previous one is used, with a warning. UserError if there is none, or
        if it belongs to another configuration.
        """
        try:
            arrays, stored = checkpoint.load(self.path / CHECKPOINT)
        except (ValueError, FileNotFoundError) as error:
            arrays, stored = self._load_previous(error)
        self._check_origin(stored)
        return arrays, stored["metadata"]

    def _load_previous(self, problem):
        try:
            found = checkpoint.load(self.path / PREVIOUS)
        except (ValueError, FileNotFoundError) as error:
            also = "" if isinstance(error, FileNotFoundError) else f"; {error}"
            raise UserError(f"{self.path} has no checkpoint to go on from: {problem}{also}") from None
        warnings.warn(f"going on from {self.path / PREVIOUS}, because {problem}", stacklevel=3)
        self._newest_is_damaged = True                        # the next save must not make it the previous one
        return found

    def _check_origin(self, stored):
        try:
            origin = TrainConfig.from_dict(stored["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the checkpoint in {self.path} was not written by a run of this version ({error}); "
                            "train again") from None
        for name in self.config.differences(origin):
            raise UserError(f"the checkpoint in {self.path} belongs to another configuration: {flag(name)} is "
                            f"{getattr(origin, name)} there and {getattr(self.config, name)} in {CONFIG}; put the "
                            "run's own checkpoint back or train again")

    # ---- metrics.jsonl

    def log(self, **values):
        """Append one line to metrics.jsonl: step=, loss=, seconds=, images_per_second= and whatever else is measured.

        Numbers that JSON lacks (nan, inf) are stored as null. When the disk is full, UserError, and no half line stays.
        """
        line = (json.dumps({name: _plain(v) for name, v in values.items()}) + "\n").encode()
        path = self.path / METRICS
        with one_sentence("the line of metrics", path, remedy=f"continue with --resume {self.path}"):
            with open(path, "ab", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                try:
                    while line:
                        line = line[file.write(line):]
                except OSError:
                    file.truncate(size)
                    raise

    def metrics(self):
        """The lines of metrics.jsonl as dictionaries, null as nan; a last line that a kill cut off is left out."""
        return read_metrics(self.path / METRICS)

    def truncate_log(self, step):
        """Drop what metrics.jsonl says about steps after `step`, and a cut-off last line: resuming writes them anew."""
        path = self.path / METRICS
        if path.exists():
            kept = [line for line, values in _lines(path) if values.get("step", 0) <= step]
            write_atomically(path, lambda file: file.write(b"".join(kept)))


def read_metrics(path):
    """The lines of a metrics.jsonl as dictionaries, null as nan ([] without a file); ValueError if it is damaged."""
    path = Path(path)
    rows = [values for _, values in _lines(path)] if path.exists() else []
    return [{name: math.nan if v is None else v for name, v in row.items()} for row in rows]


def write_atomically(path, write):
    """`nn.checkpoint.write_atomically` (whole or not at all) with UserError for a full disk or an unwritable place."""
    with one_sentence("", path, remedy="write it somewhere else"):
        checkpoint.write_atomically(path, write)


_held = weakref.WeakSet()
"""Lock files of this process; a forked worker closes its copies, or an orphan would keep the run locked."""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [lock.close() for lock in _held])


def _next_free(config):
    """runs/<model>-<data>-<n>, created, with n one above the largest there is."""
    data = re.sub(r"[^A-Za-z0-9]+", "-", config.data.rstrip("/")).strip("-")
    stem, folder = f"{config.model}-{data}", Path("runs")
    folder.mkdir(exist_ok=True)
    numbers = [int(p.name[len(stem) + 1:]) for p in folder.glob(f"{stem}-*") if p.name[len(stem) + 1:].isdecimal()]
    for n in itertools.count(max(numbers, default=0) + 1):
        with contextlib.suppress(FileExistsError):            # another process was faster
            (folder / f"{stem}-{n}").mkdir()
            return folder / f"{stem}-{n}"


def _plain(value):
    value = value.item() if hasattr(value, "item") else value                       # NumPy scalars
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path):
    """(bytes, dictionary) of each line; the last may be cut off, any other that is no JSON object is an error."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        values = None
        with contextlib.suppress(ValueError):
            values = json.loads(line)
        if isinstance(values, dict) and line.endswith(b"\n"):
            yield line, values
        elif number < len(lines):
            raise ValueError(f"line {number} of {path} is no JSON object; remove it")
