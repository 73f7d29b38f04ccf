"""Embeddings: the time as sines and cosines, a label as a row of a trained table."""

import math

import numpy as np

from nn.backend import array_module
from nn.module import Module, Parameter


def timestep_embedding(t, dim, max_period=10000):
    """Sinusoidal embedding (N, dim) of N times: cosines, then sines, of t at dim/2 frequencies.

    Frequencies fall geometrically from 1 to 1/max_period, so that neighbouring times differ in the first
    entries and distant ones in the last. An odd dim ends in a zero. Float64 for integer t.
    """
    xp = array_module(t)
    half = dim // 2
    t = xp.asarray(t, dtype=xp.float64).reshape(-1, 1)
    angles = t * xp.exp(-math.log(max_period) / max(half, 1) * xp.arange(half, dtype=xp.float64))
    return xp.concatenate([xp.cos(angles), xp.sin(angles), xp.zeros((t.shape[0], dim % 2))], axis=1)


def embed_times(t, dim, N, xp, dtype):
    """`timestep_embedding` for a batch: (N, dim) in the batch's library and dtype, from an int or (N,) integers."""
    if array_module(t) is not xp or not hasattr(t, "shape"):
        t = xp.asarray(t)
    if t.shape not in ((), (1,), (N,)):
        raise ValueError(f"t must be an int or {N} integers, one per example, got shape {t.shape}")
    return xp.broadcast_to(timestep_embedding(t, dim).astype(dtype), (N, dim))


def embedding_forward(index, table):
    """Rows `index` (N,) of `table` (R, D)."""
    return table[index], (index, table.shape)


def embedding_backward(dy, cache):
    """dtable: each row collects the gradients of the examples that read it."""
    index, shape = cache
    xp = array_module(dy)
    chosen = index[None, :] % shape[0] == xp.arange(shape[0])[:, None]
    return chosen.astype(dy.dtype) @ dy


class Embedding(Module):
    """A table of trained rows.

    Parameters
    ----------
    rows, dim : int
    rng : numpy.random.Generator
        Draws the initial table, standard normal: from the first step the rows are told apart.
    """

    def __init__(self, rows, dim, *, rng, dtype=np.float32):
        self.table = Parameter(rng.standard_normal((rows, dim)).astype(dtype))

    def forward(self, index):
        return self._remember(*embedding_forward(index, self.table.value))

    def backward(self, dy, *, params=True):
        """There is nothing below a label: returns None."""
        cache = self._recall(dy)
        if params:
            self.table.grad += embedding_backward(dy, cache)
