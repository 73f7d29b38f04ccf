"""A-DDPM: one variance for each t, in closed form, from a mean over the data of what the denoiser says (C06, C09).

Let p(x_0 | x_t) = N(mean, tau^2 I) with the exact mean and one number tau^2 for all x_t. The average over x_t of
KL(q(x_0 | x_t) || p) is d/2 log tau^2 + E tr Cov[x_0 | x_t] / (2 tau^2) and a constant, least at

    tau^2 = E tr Cov[x_0 | x_t] / d                                                                             (C09)

and for x_s, s > 0, at var + a^2 tau^2. Taking the trace of Tweedie's second formula (C08), or of the covariance of the
noise (C10), where E|eps|^2 = d:

    tau^2 = (sigma2_bar - sigma2_bar^2 E|score|^2 / d) / lam_bar^2                                              (C06)
          = sigma2_bar / lam_bar^2 (1 - E|eps_hat|^2 / d)                     eps_hat = E[eps | x_t]
          = sigma2_bar / lam_bar^2 E|eps - eps_hat|^2 / d

Three ways to write one number, but two ways to estimate it, and which is better depends on t. The residual's error is
in proportion to tau^2 itself. At high noise eps_hat is nearly eps, and the first two are 1 minus a mean that scatters
around 1: over n draws their error is sqrt(2/(n d)) sigma2_bar / lam_bar^2, however small tau^2 is beside that, and at
the end of the usual schedule thousands of times the residual's. At low noise eps_hat is nearly 0 and they scatter less
than the residual does, whose error is small beside tau^2 there all the same. And for a denoiser that isn't exact the
residual is E[Var[eps | x_t] + bias^2], the right variance around a wrong mean, where the others subtract.

Functions give values per example, in float64, unclipped: their mean over draws is tau^2, their scatter its error.
`noise_statistics` takes the two means over a data set, once for a model, and `ddpm.covariance.sources` reads them.
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm.randomness import normal_like
from nn.backend import array_module, per_example, to_host


def var_x0_from_score(score, t, schedule):
    """(sigma2_bar - sigma2_bar^2 |score|^2 / d) / lam_bar^2 per example, (N,); its mean is tau^2 (C06).

    The score is that of q(x_t), shaped as x_t; t is an int or an (N,) host array of times >= 1.
    """
    mean_square = _mean_square(score)
    noise = per_example(schedule.sigma2_bar[t], mean_square)
    return (noise - noise**2 * mean_square) / per_example(schedule.lam_bar[t]**2, mean_square)


def var_x0_from_eps(eps_hat, t, schedule):
    """sigma2_bar / lam_bar^2 (1 - |eps_hat|^2 / d) per example, (N,): the same, from the predicted noise (C06)."""
    mean_square = _mean_square(eps_hat)
    return _noise_to_signal(t, schedule, mean_square) * (1 - mean_square)


def var_x0_from_residual(eps, eps_hat, t, schedule):
    """sigma2_bar / lam_bar^2 |eps - eps_hat|^2 / d per example, (N,): its mean is tau^2 (C09).

    eps is the noise in x_t, and eps_hat what the denoiser predicts. The mean is that of Cov[x_0 | x_t] plus the squared
    error of the predicted x_0: the best variance for a denoiser that isn't exact.
    """
    mean_square = _mean_square(eps - eps_hat)
    return _noise_to_signal(t, schedule, mean_square) * mean_square


def upper_bound(t, schedule, data_range=None):
    """The largest tau^2 there is: sigma2_bar / lam_bar^2, and ((high - low) / 2)^2 for data in [low, high].

    The smallest is 0. So the best isotropic variance of x_s | x_t, var + a^2 tau^2, lies between the posterior's var
    and sigma2_ts / lam_ts^2. Float, or (N,) host array for an array of times.
    ValueError for a `data_range` that isn't (low, high) with low < high.
    """
    bound = schedule.sigma2_bar[t] / schedule.lam_bar[t]**2
    if data_range is not None:
        low, high = data_range
        if not low < high:
            raise ValueError(f"data_range must be (low, high) with low < high, got {data_range}")
        bound = np.minimum(bound, ((high - low) / 2)**2)
    return float(bound) if np.ndim(bound) == 0 else bound


def _mean_square(x):
    """|x|^2 / d per example, in float64."""
    x = x.astype(np.float64)
    return (x * x).mean(axis=tuple(range(1, x.ndim)))


def _noise_to_signal(t, schedule, like):
    return per_example(schedule.sigma2_bar[t] / schedule.lam_bar[t]**2, like)


# ---- the statistics of a model on its data

class NoiseStatistics(NamedTuple):
    """What a table over t is made of: host arrays (T+1,), indexed by t; entry 0 is 0 (C06, C09).

    square is E|eps_hat|^2 / d, at most 1 for an exact denoiser, and residual is E|eps - eps_hat|^2 / d, both over data
    and noise; their sum is 1 where it is exact.
    """

    square: Any
    residual: Any


def noise_statistics(denoiser, schedule, images, rng, *, per_time=None, times=None, scale=None, batch=256,
                     progress=None):
    """Means over data and fresh noise at every t = 1..T, in T per_time network passes (C06, C09).

    Parameters
    ----------
    images : array (n, ...)
        Data, on the scale that is noised, or before `scale`, a function that brings them there.
    rng : numpy Generator or CuPy Generator
    per_time : int from 1 to n, or None for all
        Images at each t: every n/per_time-th, starting one further for each t, so that all of them have their turn.
    times : integers in 1..T, or None for all
        Where the means are wanted: a part of the work. Elsewhere they are 0.
    batch : int
        Images in one pass, of several times where per_time is small.
    progress : function of a number of images, or None

    Returns
    -------
    NoiseStatistics. With d pixels, a residual of relative error about sqrt(2 / (per_time d)), where pixels err
    independently. ValueError for another per_time.
    """
    n = len(images)
    per_time = n if per_time is None else per_time
    if not 1 <= per_time <= n:
        raise ValueError(f"per_time must be an integer from 1 to the number of images, {n}, got {per_time}")
    wanted = np.arange(1, schedule.T + 1) if times is None else np.asarray(times)
    every = np.repeat(wanted, per_time)
    rows = (every - 1 + np.tile(np.arange(per_time) * n // per_time, len(wanted))) % n
    sums = np.zeros((2, schedule.T + 1))
    for start in range(0, len(every), batch):
        t = every[start:start + batch]
        chosen = images[array_module(images).asarray(rows[start:start + batch])]
        x0 = chosen if scale is None else scale(chosen)
        eps = normal_like(x0, rng)
        eps_hat = denoiser.predict(schedule.add_noise(x0, t, eps), t).eps
        for total, values in zip(sums, (eps_hat, eps - eps_hat), strict=True):
            total += np.bincount(t, to_host(_mean_square(values)), schedule.T + 1)
        if progress:
            progress(len(t))
    return NoiseStatistics(*(sums / per_time))
