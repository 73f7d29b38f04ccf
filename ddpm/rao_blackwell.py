"""What integrating x_s out is worth: the variance of the bound with and without Rao-Blackwellization (L09).

A step of the bound is an average over x_0, x_t and x_s. Drawing all three gives the naive term; integrating x_s out in
closed form gives the analytic one:

    naive      log p(x_s | x_t) - log q(x_s | x_t, x_0)
    analytic   its mean given x_t and x_0,   -KL( q(x_s | x_t, x_0) || p(x_s | x_t) )

The law of total variance, used twice, says where the variance of the naive term comes from:

    Var naive  =  Var E[naive | x_0]                between    examples differ, however well each of them is measured
                + E Var[analytic | x_0]             analytic   which x_t was drawn: what Rao-Blackwellization leaves
                + E Var[naive | x_t, x_0]           removed    which x_s was drawn: what it takes away

The last one is known, since q and p are Gaussians. With d the difference of their means, per dimension,

    Var_q[log p - log q] = d^2 v_q/v_p^2 + (v_q/v_p - 1)^2/2,      which is 2 KL(q || p) where v_p = v_q

Two ratios follow. `factor` = (analytic + removed)/analytic is about a given x_0: so many times more draws the naive
term needs to say equally well what this example costs. `overall` has `between` added above and below: a batch in which
each example is new and seen once.

The whole bound is a sum of such terms, and there are three ways to estimate it:

    independent   a fresh x_t for each term        given x_0 variances add: naive - analytic is the sum of the removed
    uniform       K times one of the K terms       the same, and both have the variance of the choice of t (L07)
    path          all terms on one chain x_{1:T}   neighbours share an x_t, so that terms have covariances

On a path, Rao-Blackwellizing each term can raise the variance of the sum. If p is the exact reverse process, every path
gives log p(x_0): the naive sum doesn't vary at all, because what a draw of x_s costs one term the later terms pay back.
Integrate each x_s out, and the sum varies.
"""

from typing import Any, NamedTuple

import numpy as np

from ddpm import elbo, gaussian
from ddpm.ddpm import sum_per_example
from ddpm.randomness import normal_like
from nn.backend import array_module, to_host


class Estimate(NamedTuple):
    """A number and its standard error over examples (jackknife)."""

    value: float
    error: float


class Comparison(NamedTuple):
    """Naive against analytic: mean in nats, variances in nats^2, each an Estimate.

    mean : the term, or the bound, itself; both estimators have this mean
    between : Var E[. | x_0]
    naive, analytic : E Var[. | x_0], the variances that an example sees
    factor : naive / analytic
    overall : (between + naive) / (between + analytic)
    """

    mean: Estimate
    between: Estimate
    naive: Estimate
    analytic: Estimate
    factor: Estimate
    overall: Estimate


class BoundComparison(NamedTuple):
    """The whole bound, estimated in three ways; a Comparison each."""

    path: Comparison
    independent: Comparison
    uniform: Comparison


class Terms(NamedTuple):
    """The terms of the bound along one path, arrays (K+1, N), float64: the prior's, then a row for each of K timesteps.

    sampled and analytic are in nats, with the sign of the bound; removed is Var[sampled | x_t, x_0], nats^2. Row k is
    the pair (timesteps[k], timesteps[k-1]), and the last is the decoder, where nothing is drawn and nothing removed.
    """

    sampled: Any
    analytic: Any
    removed: Any


# ---- one term

def log_ratio_variance(mean_q, var_q, mean_p, var_p):
    """Var_q[log p - log q] of two Gaussians, elementwise, nats^2: what Rao-Blackwellization removes of a term (L09).

    The mean of the same quantity is -`gaussian.kl`. Variances are > 0: with var_q = 0 nothing is drawn.
    """
    ratio = var_q / var_p
    return (mean_q - mean_p)**2 / var_p * ratio + 0.5 * (ratio - 1)**2


def compare_step(x0, reverse, s, t, schedule, rng, *, draws=4):
    """The naive and the analytic term of the pair (s, t), over `draws` independent x_t for each example (L09).

    Parameters
    ----------
    x0 : array (N, ...), N >= 3
    reverse : function (x_t, s, t) -> (mean, var)
        As in `ddpm.elbo`; called `draws` times.
    s, t : int, 1 <= s < t
        ValueError at s = 0: the decoder knows x_s, and has nothing to integrate out.
    draws : int >= 2

    Returns
    -------
    Comparison, on the host. x_s isn't drawn at all: the removed variance is added in closed form.
    """
    _check(x0, draws)
    posterior, terms = schedule.posterior(s, t), []
    for _ in range(draws):
        x_t = schedule.add_noise(x0, t, normal_like(x0, rng))
        mean, var = reverse(x_t, s, t)
        analytic = -elbo.step_kl(x0, x_t, mean, var, s, t, schedule)
        removed = log_ratio_variance(posterior.mean(x0, x_t), posterior.var, mean, var)
        terms.append([to_host(_sum(v)) for v in (analytic, removed)])
    analytic, removed = np.moveaxis(terms, 1, 0)                                            # (draws, N) each
    noise = analytic.var(axis=0, ddof=1)
    return _compare(analytic.mean(axis=0), noise / draws, naive=noise + removed.mean(axis=0), analytic=noise)


# ---- the whole bound

def path_terms(x0, reverse, schedule, rng, timesteps=None, *, bin_width=2 / 255, prior_var=None):
    """All terms of the bound along one forward chain, drawn and integrated: Terms (L06, L09).

    The sum of `sampled` is `elbo.sampled_bound`, and every row of `analytic` has the law of the same row of
    -`elbo.negative_bound`. Arguments and errors as there.
    """
    times = [int(t) for t in (range(schedule.T, 0, -1) if timesteps is None else timesteps)]
    if not times:
        raise ValueError("timesteps must hold at least one time")
    terms = Terms(*(array_module(x0).zeros((len(times) + 1, len(x0)), dtype=np.float64) for _ in Terms._fields))

    def fill(row, x, mean_q, var_q, mean_p, var_p):
        terms.sampled[row] = _sum(gaussian.log_normal(x, mean_p, var_p) - gaussian.log_normal(x, mean_q, var_q))
        terms.analytic[row] = -_sum(gaussian.kl(mean_q, var_q, mean_p, var_p))
        terms.removed[row] = _sum(log_ratio_variance(mean_q, var_q, mean_p, var_p))

    x_s, s = x0, 0
    for row, t in zip(range(len(times), 0, -1), reversed(times), strict=True):
        posterior, (lam_ts, sigma2_ts) = schedule.posterior(s, t), schedule.between(s, t)
        x_t = lam_ts * x_s + sigma2_ts**0.5 * normal_like(x0, rng)
        mean, var = reverse(x_t, s, t)
        if s > 0:
            fill(row, x_s, posterior.mean(x0, x_t), posterior.var, mean, var)
        else:
            terms.sampled[row] = terms.analytic[row] = -_sum(elbo.decoder_nats(x0, mean, var, bin_width))
        x_s, s = x_t, t
    prior_var = schedule.marginal_var[s] if prior_var is None else prior_var
    fill(0, x_s, schedule.lam_bar[s] * x0, float(schedule.sigma2_bar[s]), 0.0, float(prior_var))
    return terms


def compare_bound(x0, reverse, schedule, rng, timesteps=None, *, draws=4, bin_width=2 / 255, prior_var=None):
    """The whole bound by naive and by analytic terms, over `draws` paths for each example: BoundComparison (L07, L09).

    One set of paths serves all three ways of estimating: a term on a path has the same law as one with an x_t of its
    own. What is removed is added in closed form but on the path, where its covariances count and the terms are drawn.
    `uniform` takes one of the K pairs at random, times K, and the prior in closed form. Arguments as in
    `elbo.negative_bound` and `compare_step`.
    """
    _check(x0, draws)
    paths = [path_terms(x0, reverse, schedule, rng, timesteps, bin_width=bin_width, prior_var=prior_var)
             for _ in range(draws)]
    sampled, analytic, removed = (np.stack([to_host(v) for v in field]) for field in zip(*paths, strict=True))

    bounds = [terms.sum(axis=1) for terms in (sampled, analytic)]                           # (draws, N)
    naive_path, of_path = noises = [bound.var(axis=0, ddof=1) for bound in bounds]
    steadier = int(of_path.mean() < naive_path.mean())          # both have the same mean: the surer one gives it
    mean, mean_noise = bounds[steadier].mean(axis=0), noises[steadier] / draws
    removed = removed.mean(axis=0)                                                          # (K+1, N)

    of_terms = analytic.var(axis=0, ddof=1).sum(axis=0)
    pairs, K = analytic[:, 1:], analytic.shape[1] - 1
    average = pairs.mean(axis=1)                                                            # over t, (draws, N)
    # E y^2 - (E y)^2 over t and x_t: the square of the averages' mean exceeds that of its expectation by its variance
    of_time = K**2 * (((pairs - average.mean(axis=0))**2).mean(axis=(0, 1)) + average.var(axis=0, ddof=1) / draws)

    def compare(naive, analytic):
        return _compare(mean, mean_noise, naive, analytic)

    return BoundComparison(path=compare(naive_path, of_path),
                           independent=compare(of_terms + removed.sum(axis=0), of_terms),
                           uniform=compare(of_time + K * removed[1:].sum(axis=0), of_time))


# ---- from examples to a Comparison

def _compare(mean, mean_noise, naive, analytic):
    """From what each example measured, (N,) host arrays: its mean, that mean's variance, and its two variances."""
    n, centre = len(mean), mean.mean()
    columns = np.stack([mean - centre, (mean - centre)**2, mean_noise, naive, analytic])    # (5, N)

    def statistics(sums, n):
        mean, square, noise, naive, analytic = sums / n
        between = n / (n - 1) * (square - mean**2) - noise
        with np.errstate(divide="ignore", invalid="ignore"):
            factor, overall = naive / analytic, (between + naive) / (between + analytic)
            return np.stack([centre + mean, between, naive, analytic, factor, overall])

    total = columns.sum(axis=1)
    without_one = statistics(total[:, None] - columns, n - 1)                               # (6, N): the jackknife
    with np.errstate(invalid="ignore"):
        error = np.sqrt((n - 1) * without_one.var(axis=1))
    return Comparison(*(Estimate(float(v), float(e)) for v, e in zip(statistics(total, n), error, strict=True)))


def _check(x0, draws):
    if len(x0) < 3:
        raise ValueError(f"x0 must hold at least 3 examples: standard errors come from leaving one out, got {len(x0)}")
    if draws < 2:
        raise ValueError(f"draws must be at least 2: a variance given x_0 needs two noises of it, got {draws}")


def _sum(values):
    """Sum over all axes but the first, in float64."""
    return sum_per_example(values.astype(np.float64))
