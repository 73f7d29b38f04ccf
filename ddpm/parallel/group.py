"""What ranks that train one model together need from each other, and the trivial group of one rank.

`size` ranks run the same program. Rank r computes the gradient g_r of its share of the batch; the step needs
their sum, and each rank steps the optimiser on its own shard of the flat parameter buffer only (its moments are
needed nowhere else):

    g = sum_r g_r                reduce_scatter(gradients)    rank r learns g[shard] only
    |g|^2                        allreduce(partial_norm2)     a few numbers: norms, losses, a wish to stop
    p[shard] -= step(g[shard])   Adam on n / size entries
    p                            all_gather(parameters)       everyone sees everyone's shard

reduce_scatter followed by all_gather is an all-reduce with the optimiser in the middle. Sums run in rank order, so
a fixed number of ranks gives the same bits on each run; another number regroups the sum and agrees to rounding.

Every rank must call the same collectives in the same order and return from the program at the same point. A rank
that wants everybody to stop (Ctrl-C, a time limit) therefore doesn't leave by itself: it adds 1 to a flag that
each step sums with `allreduce`, and all ranks leave after the same step.
"""

import numpy as np

from nn.backend import limit_blas_threads


class WorkerDied(RuntimeError):
    """A rank has ended before its time; the message is one sentence, a traceback may follow as a note.

    Shared arrays may then be half updated: don't save them, the checkpoint that is already on disk is the good one.

    Attributes
    ----------
    number : int
        The rank that ended.
    reason : str
        "raised ValueError: ...", "was killed by SIGKILL ...", and the like.
    """

    def __init__(self, number, reason):
        super().__init__(f"worker {number} {reason}")
        self.number, self.reason = number, reason


class Group:
    """`size` ranks that run one program; this one is `rank`. The interface of `Alone`, `LocalProcesses` and others."""

    rank = 0
    size = 1

    def run(self, function):
        """Call `function(group)` on every rank, BLAS at one thread each; rank 0's result is returned to the caller."""
        with limit_blas_threads(1):
            return function(self)

    def shard(self, n):
        """This rank's part of a flat buffer of n entries: the shards of all ranks cover it once, in rank order."""
        return self.shard_of(self.rank, n)

    def shard_of(self, rank, n):
        """The part of a flat buffer of n entries that belongs to `rank`."""
        return slice(n * rank // self.size, n * (rank + 1) // self.size)

    def shared_array(self, shape, dtype=np.float32):
        """Zeros that all ranks see as the same memory (or copies kept equal by `all_gather`); call before `run`."""
        raise NotImplementedError

    def rank_array(self, shape, dtype=np.float32):
        """Zeros that each rank writes for itself and `reduce_scatter` can sum; call before `run`."""
        raise NotImplementedError

    def barrier(self):
        """Return when every rank has called this."""
        raise NotImplementedError

    def allreduce(self, array):
        """Replace a host `array` by its sum over ranks, on every rank, and return it (for small arrays)."""
        raise NotImplementedError

    def broadcast(self, array, root=0):
        """Replace a host `array` by rank `root`'s on every rank, and return it (for small arrays)."""
        raise NotImplementedError

    def reduce_scatter(self, flat):
        """Sum `flat`, a (n,) rank array, over ranks into flat[shard]; the rest of `flat` is unspecified afterwards."""
        raise NotImplementedError

    def all_gather(self, flat):
        """Make flat[shard] of every rank visible on all ranks; `flat` is a (n,) shared or rank array."""
        raise NotImplementedError


class Alone(Group):
    """The group of one rank: sums over one term, nothing to wait for. `xp` is the library of its arrays."""

    def __init__(self, xp=np):
        self.xp = xp

    def shared_array(self, shape, dtype=np.float32):
        """Zeros."""
        return self.xp.zeros(shape, dtype)

    rank_array = shared_array

    def barrier(self):
        """Nobody to wait for."""

    def allreduce(self, array):
        """The sum over one rank is the array itself."""
        return array

    def broadcast(self, array, root=0):
        """Everybody has it."""
        return array

    def reduce_scatter(self, flat):
        """The shard is the whole buffer and the sum is in place."""

    def all_gather(self, flat):
        """Nothing to fetch."""
