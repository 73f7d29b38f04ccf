"""Errors that are one sentence: what a person can put right, said so that they know how."""

import contextlib
import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(Exception):
    """Something the person at the keyboard can put right; the message is one sentence that says how."""


@contextlib.contextmanager
def one_sentence(what, path, remedy):
    """Turn an OSError within the block into a UserError that names `what` and `path` and says what to do."""
    try:
        yield
    except OSError as error:
        what = f"{what} {path or ''}".strip()
        if error.errno in DISK_FULL:
            raise UserError(f"the disk is full: {what} could not be written (what was there before is intact); "
                            f"free some space, then {remedy}") from None
        raise UserError(f"{what} cannot be written ({error.strerror or error}); {remedy}") from None


def sentence(error):
    """What an exception says, on one line: an OSError as "cannot use FILE: reason", a full disk with what to do."""
    if isinstance(error, OSError) and error.strerror:
        place = f" {error.filename}" if error.filename else ""
        if error.errno in DISK_FULL:
            return f"no space left to write{place}; free some space and run the command again"
        return f"cannot use{place or ' a file'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --micro-batch, --batch-size or network"
    return " ".join(str(error).split()) or f"{type(error).__name__} (DDPM_DEBUG=1 shows where)"
