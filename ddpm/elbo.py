"""The evidence lower bound of a generative chain, term by term, in nats.

A model is a prior p(x_T) = N(0, prior_var) and reverse steps p(x_s | x_t) (L05). For any q,

    log p(x_0) >= E_q[ log p(x_{0:T}) - log q(x_{1:T} | x_0) ]                                                    (L06)

with the forward chain as q. Turn each q(x_t | x_s) round with Bayes' rule, sort by pairs of neighbouring times, and the
bound is -(prior + steps + decoder):

    prior    KL( q(x_T | x_0) || p(x_T) )                                  how far T is from infinity (L04)
    steps    E KL( q(x_s | x_t, x_0) || p(x_s | x_t) )  for s >= 1         T - 1 terms, all between Gaussians
    decoder  -E log p(x_0 | x_t)                        at s = 0           q is a point there, its KL infinite (E10)

and, since a sum over t is T times an average over t, one uniform t per example estimates it, times T (L07, E06).

A step can be estimated by drawing x_s and taking log p - log q there, or by integrating x_s out, given x_t and x_0
(Rao-Blackwell, L09). The second has the same mean, and by the law of total variance never a larger variance. What is
left is a squared error of the mean (L12):

    E_{x_s} log p(x_s | x_t) = log N(a x_0 + b x_t; mean, var) - post_var/(2 var)                                 (L11)
                             = -(a x_0 + b x_t - mean)^2/(2 var) + const          [minus: the printed plus is E01]

Here a model is a function `reverse(x_t, s, t) -> (mean, var)`, mean shaped as x_t, var a float or broadcastable to it,
or a full covariance (N, D, D) (see `ddpm.covariance.shapes`). Elementwise functions keep the dtype; sums over an
example are float64, and so is what a full covariance gives: (N,), for it isn't a sum over coordinates.
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm import gaussian
from ddpm.covariance import shapes
from ddpm.randomness import normal_like
from nn.backend import array_module, per_example


class Bound(NamedTuple):
    """The negative bound in nats per example, before anything is summed: arrays (N,), (K-1, N) and (N,), float64.

    Row k of `steps` belongs to the pair (timesteps[k+1], timesteps[k]).
    """

    prior: Any
    steps: Any
    decoder: Any

    @property
    def total(self):
        """Negative bound, (N,) nats: never less than -log p(x_0) in expectation."""
        return self.prior + self.steps.sum(axis=0) + self.decoder


# ---- the terms, nats: elementwise, or (N,) where var is a full covariance

def prior_kl(x0, schedule, t=None, prior_var=None):
    """KL( q(x_t | x_0) || N(0, prior_var) ) at the last time, t = T unless given, shaped as x0 (L04, L06).

    `prior_var` is `schedule.marginal_var[t]` unless given: the variance of x_t for data of unit variance, 1 where VP.
    """
    t = schedule.T if t is None else t
    lam_bar, sigma2_bar = per_example(schedule.lam_bar[t], x0), per_example(schedule.sigma2_bar[t], x0)
    return gaussian.kl(lam_bar * x0, sigma2_bar, 0.0, _prior_var(prior_var, x0, t, schedule))


def step_kl(x0, x_t, mean, var, s, t, schedule):
    """KL( q(x_s | x_t, x_0) || N(mean, var) ) for 1 <= s < t, shaped as x_t: minus a step of the bound (L09, L12).

    ValueError at s = 0, where it is infinite (E10): see `decoder_nats`.
    """
    if np.any(np.asarray(s) == 0):
        raise ValueError("s must be at least 1: at s = 0 the KL is infinite, and the term of the bound is decoder_nats")
    posterior = schedule.posterior(s, t)
    if shapes.is_full(var, x_t):
        return shapes.kl(posterior.mean(x0, x_t), posterior.var, mean, var)
    return gaussian.kl(posterior.mean(x0, x_t), per_example(posterior.var, x_t), mean, var)


def expected_log_reverse(x0, x_t, mean, var, s, t, schedule):
    """E log N(x_s; mean, var) over x_s | x_t, x_0, shaped as x_t: the part of a step that knows the model (L11-L13).

    For any 0 <= s < t; at s = 0 it is the decoder of a density, log N(x_0; mean, var).
    """
    posterior = schedule.posterior(s, t)
    if shapes.is_full(var, x_t):
        return -shapes.cross_entropy(posterior.mean(x0, x_t), posterior.var, mean, var)
    return -gaussian.cross_entropy(posterior.mean(x0, x_t), per_example(posterior.var, x_t), mean, var)


def decoder_nats(x0, mean, var, bin_width=2 / 255):
    """-log p(x_0 | x_t), shaped as x0: of the bin of x_0, or with bin_width=None of the density N(mean, var) at x_0.

    The mass of a bin under a full covariance has no closed form: bins are given the product of their coordinates' own
    masses, by the diagonal alone, which is a law of the levels like another.
    """
    if bin_width is None:
        return -_log_normal(x0, mean, var)
    return -gaussian.discretized_log_likelihood(x0, mean, shapes.diagonal(var, x0), bin_width)


# ---- the same by drawing x_s: what Rao-Blackwellization improves on (L09)

def sample_posterior(x0, x_t, s, t, schedule, rng):
    """A draw of x_s | x_t, x_0, shaped as x_t (L10)."""
    posterior = schedule.posterior(s, t)
    return posterior.mean(x0, x_t) + per_example(np.sqrt(posterior.var), x_t) * normal_like(x_t, rng)


def sampled_step(x0, x_t, mean, var, s, t, schedule, rng):
    """log p(x_s | x_t) - log q(x_s | x_t, x_0) at one drawn x_s, s >= 1, shaped as x_t; its mean is -step_kl (L09)."""
    posterior = schedule.posterior(s, t)
    x_s = sample_posterior(x0, x_t, s, t, schedule, rng)
    log_q = gaussian.log_normal(x_s, posterior.mean(x0, x_t), per_example(posterior.var, x_t))
    return _log_normal(x_s, mean, var) - (_sum(log_q) if shapes.is_full(var, x_t) else log_q)


def sampled_log_reverse(x0, x_t, mean, var, s, t, schedule, rng):
    """log N(x_s; mean, var) at one drawn x_s, shaped as x_t; its mean is expected_log_reverse (L09)."""
    return _log_normal(sample_posterior(x0, x_t, s, t, schedule, rng), mean, var)


# ---- the bound

def negative_bound(x0, reverse, schedule, rng, timesteps=None, *, bin_width=2 / 255, prior_var=None):
    """The negative bound on log p(x_0), each term with a fresh x_t, steps Rao-Blackwellized (L06, L09, C15).

    Parameters
    ----------
    x0 : array (N, ...)
    reverse : function (x_t, s, t) -> (mean, var)
        The model; s and t are ints, and s = 0 asks for the decoder.
    rng : generator with `standard_normal(shape, dtype)`
    timesteps : descending integers in 1..T
        The chain that generates (see `NoiseSchedule.timesteps`); all of T..1 unless given. Fewer steps are another
        model, with a worse bound.
    bin_width : float or None
        See `decoder_nats`; with None the bound is on a density.
    prior_var : float or None
        p = N(0, prior_var) at the first of the timesteps; see `prior_kl` for None.

    Returns
    -------
    Bound(prior, steps, decoder), nats per example. ValueError for timesteps that don't descend within 1..T.
    """
    times = descending(timesteps, schedule)
    steps = array_module(x0).empty((len(times) - 1, len(x0)), dtype=np.float64)
    for k, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        steps[k] = _pair_nats(x0, s, t, reverse, schedule, rng, bin_width)
    return Bound(prior=_sum(prior_kl(x0, schedule, times[0], prior_var)), steps=steps,
                 decoder=_pair_nats(x0, 0, times[-1], reverse, schedule, rng, bin_width))


def uniform_time_bound(x0, t, reverse, schedule, rng, *, bin_width=2 / 255, prior_var=None):
    """The negative bound from one pair (t-1, t) per example: prior + T times that pair's term, (N,) nats (L07, E06).

    With t, an (N,) host array, drawn uniformly from 1..T, its expectation is that of `negative_bound(...).total`.
    `reverse` gets arrays of times here, all > 1 or all 1. Arguments as there; ValueError for t outside 1..T.
    """
    t = np.asarray(t)
    if t.shape != (len(x0),) or (t < 1).any() or (t > schedule.T).any():
        raise ValueError(f"t must hold one integer in 1..{schedule.T} for each of the {len(x0)} examples, got {t!r}")
    xp, nats = array_module(x0), _sum(prior_kl(x0, schedule, prior_var=prior_var))
    for rows in np.flatnonzero(t > 1), np.flatnonzero(t == 1):
        if rows.size:
            where, t_rows = xp.asarray(rows), t[rows]
            pair = _pair_nats(x0[where], t_rows - 1, t_rows, reverse, schedule, rng, bin_width)
            nats[where] += schedule.T * pair
    return nats


def sampled_bound(x0, reverse, schedule, rng, timesteps=None, *, prior_var=None):
    """log p(x_{0:T}) - log q(x_{1:T} | x_0) along one forward chain, (N,) nats: the bound before any cleverness (L06).

    Its mean is -negative_bound(..., bin_width=None).total. For the exact reverse process it is log p(x_0) on any path.
    """
    times = descending(timesteps, schedule)
    value, x_s, s = 0.0, x0, 0
    for t in reversed(times):
        lam_ts, sigma2_ts = schedule.between(s, t)
        x_t = lam_ts * x_s + sigma2_ts**0.5 * normal_like(x0, rng)
        log_q = gaussian.log_normal(x_t, lam_ts * x_s, sigma2_ts)
        mean, var = reverse(x_t, s, t)
        log_p = _log_normal(x_s, mean, var)
        value = value + (_sum(log_p) - _sum(log_q) if shapes.is_full(var, x_t) else _sum(log_p - log_q))
        x_s, s = x_t, t
    return value + _sum(gaussian.log_normal(x_s, 0.0, _prior_var(prior_var, x_s, s, schedule)))


def _prior_var(prior_var, x_t, t, schedule):
    return per_example(schedule.marginal_var[t], x_t) if prior_var is None else prior_var


def _log_normal(x, mean, var):
    """log N(x; mean, var): elementwise, or (N,) for a full covariance."""
    if shapes.is_full(var, x):
        return -shapes.cross_entropy(x, 0.0, mean, var)
    return gaussian.log_normal(x, mean, var)


def _pair_nats(x0, s, t, reverse, schedule, rng, bin_width):
    """The term of the pair (s, t) at a fresh x_t, (N,) nats: a KL, or the decoder at s = 0."""
    x_t = schedule.add_noise(x0, t, normal_like(x0, rng))
    mean, var = reverse(x_t, s, t)
    if np.all(np.asarray(s) == 0):
        return _sum(decoder_nats(x0, mean, var, bin_width))
    return _sum(step_kl(x0, x_t, mean, var, s, t, schedule))


def _sum(values):
    """Sum over all axes but the first, in float64."""
    return values.reshape(len(values), -1).sum(axis=1, dtype=np.float64)


def descending(timesteps, schedule):
    """The timesteps as a list of ints, T..1 for None; ValueError unless they descend within T..1."""
    times = [int(t) for t in (range(schedule.T, 0, -1) if timesteps is None else timesteps)]
    descending = all(s < t for t, s in zip(times, times[1:], strict=False))
    if not times or times[0] > schedule.T or times[-1] < 1 or not descending:
        raise ValueError(f"timesteps must descend within {schedule.T}..1, got {times}")
    return times
