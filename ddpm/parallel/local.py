"""A group of forked processes on one machine: collectives that are a meeting and a few passes over shared memory.

    reduce_scatter    meet; sum the rows of everyone's gradients over one's own shard, block by block; meet
    all_gather        meet (parameters are one memory: what the others have written is there)
    allreduce         put the numbers in one's mailbox; meet; sum everyone's mailboxes

`ddpm.parallel.processes` has the meeting, and what happens when somebody doesn't come.
"""

import numpy as np

from ddpm.parallel.group import Group
from ddpm.parallel.memory import Rows, as_array, nbytes_of, place_in, shared_bytes
from ddpm.parallel.processes import Family
from nn.backend import row_blocks

MAIL_BYTES = 64 * 1024


class LocalProcesses(Group):
    """`size` processes with shared memory: allocate arrays first, then `run(function)` forks size - 1 children.

    `run` raises WorkerDied when a child raises or dies; a surviving child gets the same exception from its next
    collective. Whatever happens, no child outlives `run`, and none returns into the caller's code: `finally` clauses,
    exit handlers and test runners belong to rank 0. Children ignore Ctrl-C: rank 0 decides.

    `allreduce` and `broadcast` take any NumPy array; `reduce_scatter` and `all_gather` take (contiguous views of)
    this group's own arrays and raise ValueError for others. Outside `run`, collectives raise RuntimeError.
    """

    def __init__(self, size):
        self.rank, self.size = 0, size
        self._family = Family(size)
        self._shared, self._rows = [], []
        self._mail, self._turn = shared_bytes(2 * size * MAIL_BYTES).reshape(2, size, MAIL_BYTES), 0

    def run(self, function):
        """Fork, call `function(group)` on every rank with BLAS at one thread, and return rank 0's result.

        Raises WorkerDied (see the class), and whatever `function` raises on rank 0, after the children have ended.
        """
        def run_as(rank):
            self.rank = rank
            for rows in self._rows:
                rows.turn_to(rank)
            return function(self)

        return super().run(lambda group: self._family.run(run_as))

    def shared_array(self, shape, dtype=np.float32):
        """Zeros in one memory that all ranks read and write."""
        self._check_idle("shared_array")
        self._shared.append(shared_bytes(nbytes_of(shape, dtype)))
        return as_array(self._shared[-1], shape, dtype)

    def rank_array(self, shape, dtype=np.float32):
        """Zeros, with each rank's own row behind the same array (what is written before `run` is rank 0's)."""
        self._check_idle("rank_array")
        self._rows.append(Rows(self.size, nbytes_of(shape, dtype)))
        return as_array(self._rows[-1].own, shape, dtype)

    def _check_idle(self, name):
        if self._family.running:
            raise RuntimeError(f"{name} must be called before run: it is the fork that shares memory")

    def barrier(self):
        """Return when every rank has called this; raise WorkerDied as soon as one of them no longer can."""
        self._family.meet()

    def allreduce(self, array):
        """Replace `array` by its sum over ranks, on every rank, and return it."""
        return self._through_mail(array, _sum_rows)

    def broadcast(self, array, root=0):
        """Replace `array` by rank `root`'s, on every rank, and return it."""
        return self._through_mail(array, lambda mail, piece: np.copyto(piece, mail[root]))

    def _through_mail(self, array, combine):
        """Piece by piece: put `array` in this rank's mailbox, meet, and let combine(all mailboxes, piece) fill it."""
        if not isinstance(array, np.ndarray):
            raise TypeError(f"array must be a NumPy array, which changes in place, not {type(array).__name__}")
        flat = array.flatten()
        step = MAIL_BYTES // flat.itemsize
        for start in range(0, flat.size, step):
            piece = flat[start:start + step]
            # Two sets of mailboxes take turns: this set has been read by all who came to the meeting in between.
            self._turn = 1 - self._turn
            mail = self._mail[self._turn, :, :piece.nbytes].view(flat.dtype)
            mail[self.rank] = piece
            self.barrier()
            combine(mail, piece)
        array[...] = flat.reshape(array.shape)
        return array

    def reduce_scatter(self, flat):
        """Sum the rank array `flat` (n,) over ranks into flat[shard]; other ranks' shards of it stay as they were."""
        everyones, shard = self._everyones(flat), self.shard(flat.size)
        if everyones is None:
            raise ValueError("reduce_scatter: flat must be (a view of) a rank_array of this group")
        terms, total = everyones[:, shard], flat[shard]
        self.barrier()                                  # all have written
        for block in row_blocks(total.size, total.itemsize, np):
            _sum_rows(terms[:, block], total[block])
        self.barrier()                                  # all have read: the next gradients may be written

    def all_gather(self, flat):
        """Show every rank's flat[shard] to all; only in a rank array is there something to copy."""
        everyones = self._everyones(flat)
        if everyones is None and all(place_in(memory, flat) is None for memory in self._shared):
            raise ValueError("all_gather: flat must be (a view of) a shared_array or a rank_array of this group")
        self.barrier()
        if everyones is not None:
            for rank in range(self.size):
                theirs = self.shard_of(rank, flat.size)
                if rank != self.rank:
                    flat[theirs] = everyones[rank, theirs]
            self.barrier()

    def _everyones(self, flat):
        """`flat` as each rank has it, (size, n), when it is a rank array; otherwise None."""
        if flat.ndim != 1 or not flat.flags.c_contiguous:
            raise ValueError(f"flat must be a contiguous (n,) array, not one of shape {flat.shape}")
        found = (rows.everyones(flat) for rows in self._rows)
        return next((rows for rows in found if rows is not None), None)


def _sum_rows(terms, total):
    """total = terms[0] + terms[1] + ..., in this order; `total` may be one of the terms."""
    partial = terms[0].copy()
    for term in terms[1:]:
        partial += term
    total[...] = partial
