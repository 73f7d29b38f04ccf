"""Memory that forked processes share, with no name in any file system, so that nothing is left when they die.

A shared array is an anonymous mapping: the fork leaves it at the same address, with the same pages, in every process.

Rank arrays are rows of one anonymous file that is mapped twice: `rows` shows all of them everywhere, and `own` is a
window of one row. After the fork each child turns its window to its own row, in place:

    address of `own`   ->   row 0 in rank 0,   row 1 in rank 1,   ...

A network built before the fork, whose gradients are views of `own`, thus writes to its own row in every process, and
the others read that row through `rows`: no gradient is ever copied to be summed.
"""

import ctypes
import mmap
import os
import tempfile
import weakref

import numpy as np


def shared_bytes(nbytes):
    """Zero bytes (nbytes,) that this process and its later children have in common."""
    return np.frombuffer(mmap.mmap(-1, max(1, nbytes)), np.uint8)[:nbytes]


def as_array(memory, shape, dtype):
    """The first entries of `memory` (bytes) as an array."""
    return memory[:nbytes_of(shape, dtype)].view(dtype).reshape(shape)


def nbytes_of(shape, dtype):
    """Size of an array in bytes."""
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize


def place_in(memory, flat):
    """Where in `memory` (bytes) the array `flat` lies, as a slice; None when it lies elsewhere."""
    start = flat.ctypes.data - memory.ctypes.data
    inside = 0 <= start and start + flat.nbytes <= memory.nbytes
    return slice(start, start + flat.nbytes) if inside else None


class Rows:
    """One row of bytes per rank: `rows` (size, nbytes) are all of them, `own` (nbytes,) is the window of this rank."""

    def __init__(self, size, nbytes):
        page = mmap.ALLOCATIONGRANULARITY
        row_bytes = max(1, -(-nbytes // page)) * page
        self._file = _anonymous_file(size * row_bytes)
        weakref.finalize(self, os.close, self._file)
        self.rows = np.frombuffer(mmap.mmap(self._file, size * row_bytes), np.uint8).reshape(size, row_bytes)
        self.own = np.frombuffer(mmap.mmap(self._file, row_bytes), np.uint8)

    def turn_to(self, rank):
        """Let `own`, and every array that is a view of it, show row `rank` in this process."""
        MAP_FIXED = 0x10
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        address = self.own.ctypes.data
        answer = libc.mmap(address, self.own.nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED,
                           self._file, rank * self.own.nbytes)
        if answer != address:
            raise OSError(ctypes.get_errno(), "could not map this rank's row of a rank array")

    def everyones(self, flat):
        """The entries of `flat`, a view of `own`, in each rank's row: (size, n); None when it is no such view."""
        place = place_in(self.own, flat)
        return None if place is None else self.rows[:, place].view(flat.dtype)


def _anonymous_file(nbytes):
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("rank_array")
    else:
        with tempfile.TemporaryFile() as named:          # unlinked already: it lives as long as it is open or mapped
            file = os.dup(named.fileno())
    os.ftruncate(file, nbytes)
    return file
