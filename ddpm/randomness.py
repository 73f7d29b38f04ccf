"""Randomness as a function of (seed, step, sample): no random state is ever saved, no result depends on a split.

A counter-based generator (Philox 4x64) is a fixed scrambling of a 256-bit counter under a 128-bit key: any place of its
sequence is reached at once. Here the key is (seed, step) and the counter starts at

    (0, call, sample, purpose)          word 0 counts the draws within one call

so that row i of the j-th call is a function of (seed, step, samples[i], j) and of nothing else: not of the batch size,
not of the number of processes, not of what was drawn before. A run that resumes draws what it would have drawn.
"""

import hashlib
from numbers import Integral

import numpy as np

from nn.backend import array_module


class SampleStreams:
    """One random stream per sample, used like a generator whose arrays have one row per sample.

    Parameters
    ----------
    seed, step : int >= 0
        The key. A sampler that draws at every step of its chain uses one object for the whole chain.
    samples : sequence of int >= 0
        The samples' own numbers: their places in the run, not in the batch.
    purpose : str
        Streams of different purposes are independent ("noise", "sampling", ...).
    xp : module
        Array library that results are transferred to; they are drawn on the host, so that they don't depend on it.

    Attributes
    ----------
    calls : int
        Draws made so far; each call continues all streams, whatever the size of the calls before.
    """

    def __init__(self, seed, step, samples, *, purpose="", xp=np):
        self.samples, self.xp, self.calls = np.asarray(samples), xp, 0
        if self.samples.ndim != 1 or not np.issubdtype(self.samples.dtype, np.integer) or (self.samples < 0).any():
            raise ValueError("samples must be a sequence of integers >= 0, one per sample")
        if seed < 0 or step < 0:
            raise ValueError(f"seed and step must be >= 0, got {seed} and {step}")
        self._purpose = _digest(purpose, size=8) if purpose else 0
        self._philox = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
        self._generator = np.random.Generator(self._philox)
        self._state = self._philox.state

    def standard_normal(self, shape, dtype=np.float64):
        """Standard normal numbers; `shape` is (N, ...) with N the number of samples (ValueError otherwise)."""
        shape = (shape,) if isinstance(shape, Integral) else tuple(shape)
        out = np.empty(self._check_rows(shape), dtype=dtype)
        for row in self._rows(out.reshape(len(out), -1)):
            self._generator.standard_normal(out=row, dtype=out.dtype)
        return self.xp.asarray(out)

    def random(self, size=None):
        """Uniform numbers in [0, 1), float64, shape (N,): one per sample."""
        return self.xp.asarray(self._uniform(size))

    def integers(self, low, high, size=None):
        """Uniform integers low <= i < high, shape (N,): one per sample; low and high are ints or (N,) host arrays."""
        low, high = np.asarray(low), np.asarray(high)
        if (low >= high).any():
            raise ValueError("integers needs low < high")
        return self.xp.asarray(low + (self._uniform(size) * (high - low)).astype(np.int64))

    def _uniform(self, size):
        out = np.empty(len(self.samples))
        self._check_rows(out.shape if size is None else (size,) if isinstance(size, Integral) else tuple(size))
        for row in self._rows(out.reshape(-1, 1)):
            self._generator.random(out=row)
        return out

    def _check_rows(self, shape):
        if shape[:1] != self.samples.shape:
            raise ValueError(f"the first axis must be the {len(self.samples)} samples, got shape {shape}")
        return shape

    def _rows(self, out):
        """Each row of `out`, with the generator moved to the start of that sample's part of this call."""
        counter = self._state["state"]["counter"]
        for row, sample in zip(out, self.samples, strict=True):
            counter[:] = 0, self.calls, sample, self._purpose
            self._philox.state = self._state
            yield row
        self.calls += 1


def generator(seed, *path):
    """A single numpy Generator named by `seed` and a path of strings and ints, e.g. generator(0, "init", "unet").

    Different paths give independent streams, equal ones the same stream on every machine and in every process.
    """
    names = [int(part) if isinstance(part, Integral) else str(part) for part in (seed, *path)]
    return np.random.Generator(np.random.Philox(key=_digest(repr(names), size=16)))


def normal_like(x, rng):
    """Standard normal noise with the shape, dtype and library of `x`; `rng` needs standard_normal(shape, dtype)."""
    noise, xp = rng.standard_normal(x.shape, dtype=x.dtype), array_module(x)
    return noise if array_module(noise) is xp else xp.asarray(noise)


def _digest(text, size):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "little")
