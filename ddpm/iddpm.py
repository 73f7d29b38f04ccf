"""I-DDPM: a learned variance between the two fixed ones, on a logarithmic scale, and the loss that trains it.

The second head gives v, one per pixel, not squashed, and with w = (v + 1) / 2 (C05)

    log W = w log sigma2_ts + (1 - w) log var,        v = -1: "small",   v = 1: "large",   v = 0: geometric mean.

Both ends are recomputed for the times (s, t) of the step, so that a sampler may skip. Since sigma2_ts / var =
sigma2_bar_t / sigma2_bar_s, the single-step KL is, with h = w log(sigma2_bar_t / sigma2_bar_s) and r = eps - eps_hat,

    L = 1/2 [h + e^-h (1 + k r^2) - 1],        dL/dh = 1/2 [1 - e^-h (1 + k r^2)],        dL/deps_hat = -k r e^-h.

The hybrid loss is mean r^2 + 0.001 T L with T L in bits per dimension and eps_hat held fixed inside L: the mean is
trained by the squared error alone, and v by L alone.
"""

import numpy as np

from ddpm.ddpm import (
    chain_loss,
    decoder_nats,
    dimensions,
    fixed_variance,
    noise_channels,
    output_gradient,
    simple_loss,
    step_weight,
    sum_per_example,
    variance_channels,
)
from nn.backend import array_module, per_example, to_host


def reverse_log_variance(v, s, t, schedule):
    """log W of x_s | x_t for the head output v, w = (v+1)/2: w log sigma2_ts + (1-w) log var; shaped as v (C05).

    At s = 0, where var = 0, the lower end is the posterior variance of the step 2 -> 1 (as `fixed_variance`).
    """
    high, low = (np.log(fixed_variance(kind, s, t, schedule)) for kind in ("large", "small"))
    return per_example(low, v) + per_example(0.5 * (high - low), v) * (v + 1)


def vlb_loss(output, x0, eps, x_t, t, schedule, *, bin_width, stop_mean_gradient=False):
    """T times the single-step term t -> t-1 with the learned variance, nats per dimension; and its gradient (C05).

    At t = 1 the term is the decoder's -log p(x_0 | x_1), of bins of width `bin_width` (None: the density).
    `stop_mean_gradient` leaves the gradient of the noise channels zero. ValueError for an output without second head.
    """
    scale = schedule.T / dimensions(eps)

    def assemble(output, nats, d_mean, d_v):
        d_mean = None if stop_mean_gradient else scale * d_mean
        return scale * sum_per_example(nats), output_gradient(output, d_mean, scale * d_v)

    def step(output, eps, s, t):
        xp = array_module(eps)
        half_range = per_example(0.5 * np.log(schedule.sigma2_bar[t] / schedule.sigma2_bar[s]), eps)
        h = half_range * (variance_channels(output, eps) + 1)
        k, r = per_example(step_weight(s, t, schedule), eps), eps - noise_channels(output, eps)
        decay, weight = xp.expm1(-h), k * xp.exp(-h)
        nats = 0.5 * (h + decay + weight * r * r)
        return assemble(output, nats, -weight * r, -0.5 * half_range * (decay + weight * r * r))

    def decoder(output, x0, x_t, s, t):
        v = variance_channels(output, x0)
        var = array_module(v).exp(reverse_log_variance(v, s, t, schedule))
        half_range = 0.5 * np.log(fixed_variance("large", s, t, schedule) / fixed_variance("small", s, t, schedule))
        nats, d_mean, d_var = decoder_nats(x0, noise_channels(output, x0), var, x_t, t, schedule, bin_width)
        return assemble(output, nats, d_mean, d_var * var * per_example(half_range, x0))

    return chain_loss(step, decoder, output, x0, eps, x_t, np.asarray(t) - 1, t)


def hybrid_loss(output, x0, eps, x_t, t, schedule, *, bin_width, weight=0.001):
    """simple_loss + weight * (T times the single-step term in bits per dimension); and its gradient (C05).

    The mean is held fixed in the second part, so that the gradient of the noise channels is exactly that of
    `simple_loss`, and the gradient of v comes from the second part alone.
    """
    simple, d_simple = simple_loss(output, x0, eps, x_t, t, schedule)
    vlb, d_vlb = vlb_loss(output, x0, eps, x_t, t, schedule, bin_width=bin_width, stop_mean_gradient=True)
    weight_nats = weight / np.log(2).item()
    return simple + weight_nats * vlb, d_simple + weight_nats * d_vlb


class ImportanceSampledTimes:
    """Times drawn where the loss is large, with weights that keep the mean over t unbiased (C05).

    p_t is proportional to sqrt(mean of the last 10 squared losses at t), mixed with `uniform` of the uniform law; until
    every t has 10 losses, p is uniform. For training on the bound itself, whose terms differ by orders of magnitude.

    Attributes
    ----------
    history : array (T+1, 10)
        The last losses of each t (row 0 is not used), overwritten in turn.
    count : integer array (T+1,)
        How many losses each t has had. The two are all there is to save and restore.
    """

    def __init__(self, T, *, keep=10, uniform=0.001):
        self.T, self.uniform = T, uniform
        self.history = np.zeros((T + 1, keep))
        self.count = np.zeros(T + 1, dtype=np.int64)

    def probabilities(self):
        """p_t as an array (T+1,) indexed by t, p_0 = 0."""
        p = np.full(self.T + 1, 1 / self.T)
        if (self.count[1:] >= self.history.shape[1]).all() and self.history.any():
            p = np.sqrt((self.history**2).mean(axis=1))
            p = (1 - self.uniform) * p / p[1:].sum() + self.uniform / self.T
        p[0] = 0.0
        return p

    def sample(self, n, rng):
        """(t, weight), both (n,) on the host: times from p and 1/(T p_t). `rng` needs `.random(n)`."""
        p = self.probabilities()
        cumulative = p.cumsum()
        t = np.searchsorted(cumulative, rng.random(n) * cumulative[-1], side="right").clip(1, self.T)
        return t, 1 / (self.T * p[t])

    def update(self, t, losses):
        """Remember unweighted `losses` (N,) (of any array library; copied to the host) of the times `t` (N,)."""
        for time, loss in zip(np.asarray(t), to_host(losses), strict=True):
            self.history[time, self.count[time] % self.history.shape[1]] = loss
            self.count[time] += 1
