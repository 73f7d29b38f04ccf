"""The exact denoiser of a finite data set: what a network is trained towards, and had better not reach.

Let x_0 be one of x_1 ... x_n, each as likely as the others. Bayes' rule says which of them a noisy state came from, and
all the rest is an average with these weights, at any noise level and for a step of any length s < t:

    w_i             = softmax_i(-|x_t - lam_bar_t x_i|^2 / (2 sigma2_bar_t))                                      (L14)
    x_s | x_t       = sum_i w_i N(a x_i + b x_t, var)         with a, b and var of schedule.posterior(s, t)       (L15)
    E[x_s | x_t]    = a m + b x_t,                 m = E[x_0 | x_t] = sum_i w_i x_i                               (L16)
    score of q(x_t) = sum_i w_i (lam_bar_t x_i - x_t) / sigma2_bar_t = (lam_bar_t m - x_t) / sigma2_bar_t         (L17)

A chain of such steps ends on the data themselves: whoever denoises perfectly only remembers. Put the last line into the
one above it: the mean is (x_t + sigma2_ts score)/lam_ts, exactly; the form x_t/lam_ts + sigma2_ts score for small
steps misses sigma2_ts (1/lam_ts - 1) score, of second order in the step (L18, E32).

How it is computed. The data pass by in blocks; of the weights only their sum and their products with the data are kept,
relative to the largest exponent met so far, and are rescaled when a larger one comes. About the data's mean c,

    |x_t - lam_bar x_i|^2 = |u|^2 - 2 lam_bar u.y_i + lam_bar^2 |y_i|^2,       u = x_t - lam_bar c,   y_i = x_i - c,

a matrix product. The term |u|^2 is common to all i and stays out of the exponents, where it would cost their digits.
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm.denoiser import Denoiser, Prediction
from ddpm.randomness import normal_like
from nn.backend import array_module, per_example


class _State(NamedTuple):
    """x_t as the sums see it, in float64: u (N, D), and lam_bar and sigma2_bar as floats or (N, 1)."""

    u: Any
    lam: Any
    noise: Any


class EmpiricalDenoiser(Denoiser):
    """The exact denoiser of n equally likely data points, for any linear-Gaussian noising (L14-L18).

    Parameters
    ----------
    data : array (n, ...) of floats, in any library
        Images on the scale that is noised, as `Dataset.scale` makes them; kept as they are, not copied. TypeError for
        whole numbers, ValueError where there are none.
    schedule : NoiseSchedule
    block : int >= 1
        Data points that are looked at together. Working memory is about 24 (N + D) block bytes for N states of D
        numbers, whatever n is.

    States x_t are (N, ...) arrays beside the data, on the same device (TypeError otherwise), at times t >= 1, an int or
    (N,) integers on the host. Sums are float64; results shaped as x_t have its dtype, others are float64. `evaluations`
    counts the states that were compared with the data, whichever method asked.
    """

    def __init__(self, data, schedule, *, block=1024):
        super().__init__(schedule)
        if getattr(getattr(data, "dtype", None), "kind", None) != "f":
            raise TypeError("data must be an array of floats on the scale that is noised, as Dataset.scale makes "
                            f"them, not {getattr(data, 'dtype', type(data).__name__)}")
        if data.ndim < 2 or data.size == 0:
            raise ValueError(f"data must be an array (n, ...) of n >= 1 points, got shape {data.shape}")
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.data, self.block = data, block
        self._points = data.reshape(len(data), -1)
        self._center = self._points.mean(axis=0, dtype=np.float64)
        self._norms = array_module(data).concatenate([(y * y).sum(axis=1) for _, y in self._blocks()])

    # ---- which of the data x_t came from

    def weights(self, x_t, t):
        """w_i(x_t), (N, n): non-negative, each row sums to 1 (L14). For few data: nothing else here is this large."""
        xp, state = array_module(x_t), self._enter(x_t, t)
        exponents = xp.concatenate([e for _, e in self._exponents(state)], axis=1)
        w = xp.exp(exponents - exponents.max(axis=1, keepdims=True))
        return w / w.sum(axis=1, keepdims=True)

    def log_density(self, x_t, t):
        """log q(x_t) = log 1/n sum_i N(x_t; lam_bar x_i, sigma2_bar), (N,), nats."""
        state = self._enter(x_t, t)
        top, total, _ = self._average(state, powers=())
        n, D = self._points.shape
        common = (state.u**2).sum(axis=1, keepdims=True) / (2 * state.noise)
        log_norm = 0.5 * D * np.log(2 * np.pi * self.schedule.sigma2_bar[t]) + np.log(n)
        return (top + array_module(x_t).log(total) - common - per_example(log_norm, state.u))[:, 0]

    # ---- the denoiser

    def predict(self, x_t, t):
        """Mean and variance of x_0 | x_t, coordinate by coordinate, and of the noise: a full Prediction.

        The variance is E[y^2] - E[y]^2 about the data's mean: never < 0, and right to about 1e-16 of the data's own.
        """
        xp, state = array_module(x_t), self._enter(x_t, t)
        _, _, (mean, square) = self._average(state, powers=(1, 2))
        var = xp.maximum(square - mean * mean, 0)
        eps, var_eps = -state.noise**0.5 * self._score(state, mean), state.lam**2 / state.noise * var
        return Prediction(*(self._like(x_t, v) for v in (eps, self._center + mean, var, var_eps)))

    def vjp(self, x_t, t, v):
        """v times d eps/d x_t, which is symmetric: (v - snr Cov[x_0 | x_t] v) / sqrt(sigma2_bar) (C08).

        A second pass, with the mean known, gives Cov v = sum_i w_i (y_i - mean) ((y_i - mean).v): no D x D matrix.
        """
        if v.shape != x_t.shape:
            raise ValueError(f"v must be shaped as x_t, {x_t.shape}, got {v.shape}")
        xp, state = array_module(x_t, v), self._state(x_t, t)
        self.vjps += len(x_t)
        top, total, (mean,) = self._average(state, powers=(1,))
        v = v.reshape(len(v), -1).astype(np.float64)
        along, cov_v, rest = (mean * v).sum(axis=1, keepdims=True), 0.0, 0.0
        for y, exponents in self._exponents(state):
            c = xp.exp(exponents - top) / total * (v @ y.T - along)                         # w_i (y_i - mean).v
            cov_v, rest = cov_v + c @ y, rest + c.sum(axis=1, keepdims=True)
        cov_v = cov_v - rest * mean
        return self._like(x_t, (v - state.lam**2 / state.noise * cov_v) / state.noise**0.5)

    def score(self, x_t, t):
        """Gradient of log q(x_t), shaped as x_t (L17)."""
        state = self._enter(x_t, t)
        return self._like(x_t, self._score(state, self._mean(state)))

    # ---- the reverse step, 0 <= s < t

    def sample_reverse(self, x_t, s, t, rng):
        """A draw of x_s | x_t: a data point by its weight, then the posterior given that point (L15).

        `rng` is a numpy Generator, a CuPy Generator or SampleStreams. At s = 0 the draw is a data point.
        """
        posterior, state = self.schedule.posterior(s, t), self._enter(x_t, t)
        mean = posterior.mean(self.data[self._draw(state, rng)].astype(x_t.dtype), x_t)
        if not np.any(posterior.var):
            return mean
        return mean + per_example(np.sqrt(posterior.var), x_t) * normal_like(x_t, rng)

    def reverse_mean(self, x_t, s, t):
        """E[x_s | x_t] = a E[x_0 | x_t] + b x_t, exact for any step (L16)."""
        posterior, state = self.schedule.posterior(s, t), self._enter(x_t, t)
        flat = x_t.reshape(len(x_t), -1).astype(np.float64)
        return self._like(x_t, posterior.mean(self._center + self._mean(state), flat))

    def small_step_mean(self, x_t, s, t):
        """x_t/lam_ts + sigma2_ts score(x_t): the mean of x_s | x_t to first order in the step (L18, E32)."""
        lam_ts, sigma2_ts = self.schedule.between(s, t)
        state = self._enter(x_t, t)
        flat = x_t.reshape(len(x_t), -1).astype(np.float64)
        step = per_example(sigma2_ts, flat) * self._score(state, self._mean(state))
        return self._like(x_t, flat / per_example(lam_ts, flat) + step)

    # ---- passes over the data

    def _enter(self, x_t, t):
        self.evaluations += len(x_t)
        return self._state(x_t, t)

    def _state(self, x_t, t):
        array_module(x_t, self.data)                                                # both on one side, or TypeError
        if x_t.shape[1:] != self.data.shape[1:] or x_t.dtype.kind != "f":
            raise ValueError(f"x_t must be floats of shape (N, {', '.join(map(str, self.data.shape[1:]))}), like the "
                             f"data, got {x_t.dtype} of shape {x_t.shape}")
        if np.any(np.asarray(t) < 1) or np.any(np.asarray(t) > self.schedule.T):
            raise ValueError(f"t must lie in 1..{self.schedule.T}: at t = 0 there is no noise to remove")
        if np.shape(t) not in ((), (len(x_t),)):
            raise ValueError(f"t must be an int or ({len(x_t)},) integers, one per state, got shape {np.shape(t)}")
        flat = x_t.reshape(len(x_t), -1).astype(np.float64)
        lam, noise = per_example(self.schedule.lam_bar[t], flat), per_example(self.schedule.sigma2_bar[t], flat)
        return _State(flat - lam * self._center, lam, noise)

    def _blocks(self):
        """The data about their mean, block by block: (slice, (B, D) float64)."""
        for start in range(0, len(self._points), self.block):
            part = slice(start, start + self.block)
            yield part, self._points[part].astype(np.float64) - self._center

    def _exponents(self, state):
        """Block by block: the data about their mean (B, D), and log w_i up to a constant of each state, (N, B)."""
        u, half_snr = state.lam / state.noise * state.u, state.lam**2 / (2 * state.noise)
        for part, y in self._blocks():
            yield y, u @ y.T - half_snr * self._norms[part]

    def _average(self, state, powers):
        """The largest exponent and sum_i exp(exponent_i - largest), (N, 1), and E[y^k | x_t], (N, D), for k in powers.

        One pass over the data.
        """
        xp, top, total, sums = array_module(state.u), -np.inf, 0.0, [0.0] * len(powers)
        for y, exponents in self._exponents(state):
            higher = xp.maximum(top, exponents.max(axis=1, keepdims=True))
            shrink, w = xp.exp(top - higher), xp.exp(exponents - higher)
            total = shrink * total + w.sum(axis=1, keepdims=True)
            sums = [shrink * known + w @ y**k for known, k in zip(sums, powers, strict=True)]
            top = higher
        return top, total, [known / total for known in sums]

    def _mean(self, state):
        """E[y | x_t], (N, D): E[x_0 | x_t] about the data's mean."""
        return self._average(state, powers=(1,))[2][0]

    def _draw(self, state, rng):
        """One index into the data per state, by its weight: where the running sum of the weights passes a uniform."""
        xp, (top, total, _) = array_module(state.u), self._average(state, powers=())
        uniform = rng.random(len(state.u))
        goal = (uniform if array_module(uniform) is xp else xp.asarray(uniform))[:, None] * total
        below, index = 0.0, 0
        for _, exponents in self._exponents(state):
            sums = below + xp.cumsum(xp.exp(exponents - top), axis=1)
            below, index = sums[:, -1:], index + (sums <= goal).sum(axis=1)
        return xp.minimum(index, len(self._points) - 1)                             # all sums may round to below 1

    @staticmethod
    def _score(state, mean):
        return (state.lam * mean - state.u) / state.noise

    @staticmethod
    def _like(x_t, v):
        return v.astype(x_t.dtype, copy=False).reshape(x_t.shape)
