"""Tweedie's formulas: what the score of q(x_t), and its derivative, say about the clean state, or any earlier one.

x_t is x_s, shrunk by lam_ts, plus Gaussian noise of variance sigma2_ts; so q(x_t) is an average of Gaussians, and its
logarithm may be differentiated under the integral. Once (C01), and once more (C08):

    score   = E[ (lam_ts x_s - x_t) / sigma2_ts | x_t ]
    Hessian = -I / sigma2_ts + (lam_ts / sigma2_ts)^2 Cov[x_s | x_t]

Solved for the moments of x_s, with s = 0 for those of the clean state:

    E[x_s | x_t]   = (x_t + sigma2_ts score) / lam_ts
    Cov[x_s | x_t] = (sigma2_ts / lam_ts^2) (I + sigma2_ts Hessian)

This is the exact reverse step, of any length. Its limit for short steps, x_t / lam + sigma2 score with variance
sigma2, is what a reverse stochastic differential equation does (L18).

The first line of all is E[-eps | x_t] / sqrt(sigma2_bar_t). A squared error is least at the conditional mean, so that
a regression on -eps / sqrt(sigma2_bar_t), which is known, is a regression on the score, which isn't: the two losses
differ by a constant (C02). In terms of eps = E[eps | x_t] and its Jacobian J, Hessian = -J / sqrt(sigma2_bar_t).

The covariances multiply a difference of numbers near one by sigma2_bar / lam_bar^2, 2.5e4 at the end of the usual
schedule, and lose as many digits; Cov[eps | x_t] = I + sigma2_bar Hessian doesn't.
"""

import numpy as np

from ddpm.ddpm import sum_per_example
from nn.backend import array_module, per_example

# ---- first moment: images or points, shaped as x_t; t is an int or an (N,) host array of times >= 1

def mean_from_score(score, x_t, t, schedule):
    """E[x_0 | x_t] = (x_t + sigma2_bar score) / lam_bar (C01)."""
    return _mean(score, x_t, 0, t, schedule)


def score_from_mean(mean_x0, x_t, t, schedule):
    """(lam_bar E[x_0 | x_t] - x_t) / sigma2_bar: the inverse of `mean_from_score` (C01)."""
    lam, sigma2 = _kernel(0, t, schedule)
    return (per_example(lam, x_t) * mean_x0 - x_t) / per_example(sigma2, x_t)


# ---- second moment: matrices (N, D, D) over the D coordinates of a point

def covariance_from_hessian(hessian, t, schedule):
    """Cov[x_0 | x_t] = (sigma2_bar / lam_bar^2) (I + sigma2_bar Hessian of log q(x_t)), (N, D, D) (C08)."""
    return _covariance(hessian, 0, t, schedule)


def hessian_from_covariance(cov_x0, t, schedule):
    """(lam_bar / sigma2_bar)^2 Cov[x_0 | x_t] - I / sigma2_bar: the inverse of `covariance_from_hessian` (C08)."""
    lam, sigma2 = _kernel(0, t, schedule)
    return (per_example(lam**2 / sigma2, cov_x0) * cov_x0 - _identity(cov_x0)) / per_example(sigma2, cov_x0)


def covariance_from_jacobian(jacobian, t, schedule):
    """Cov[x_0 | x_t] = (sigma2_bar / lam_bar^2) (I - sqrt(sigma2_bar) J), with J_ij = d eps_i / d x_j, (N, D, D) (C08).

    Only the symmetric part of J is used: J is symmetric where eps is E[eps | x_t], and that of a network is not.
    """
    lam, sigma2 = _kernel(0, t, schedule)
    symmetric = 0.5 * (jacobian + jacobian.swapaxes(1, 2))
    cov_eps = _identity(jacobian) - per_example(np.sqrt(sigma2), jacobian) * symmetric
    return per_example(sigma2 / lam**2, jacobian) * cov_eps


def covariance_from_noise_moment(second_moment, eps, t, schedule):
    """Cov[x_0 | x_t] = (sigma2_bar / lam_bar^2) (E[eps eps^T | x_t] - eps eps^T), eps = E[eps | x_t] (N, D) (C10).

    Both factors are those of the whole way from the data, not of the step t-1 -> t (E23).
    """
    lam, sigma2 = _kernel(0, t, schedule)
    return per_example(sigma2 / lam**2, eps[:, :, None]) * (second_moment - eps[:, :, None] * eps[:, None, :])


# ---- the reverse step

def reverse_moments_from_score(score, hessian, x_t, s, t, schedule):
    """Exact mean (N, D) and covariance (N, D, D) of x_s | x_t for any s < t, from derivatives of log q(x_t) (L18, C15).

    The same as the posterior's a E[x_0 | x_t] + b x_t and var I + a^2 Cov[x_0 | x_t], with no x_0 in sight. `hessian`
    None gives None for the covariance, and then x_t may be images. s and t are ints or (N,) host arrays; ValueError
    unless s < t.
    """
    mean = _mean(score, x_t, s, t, schedule)
    return mean, None if hessian is None else _covariance(hessian, s, t, schedule)


def _mean(score, x_t, s, t, schedule):
    lam_ts, sigma2_ts = _kernel(s, t, schedule)
    return (x_t + per_example(sigma2_ts, x_t) * score) / per_example(lam_ts, x_t)


def _covariance(hessian, s, t, schedule):
    lam_ts, sigma2_ts = _kernel(s, t, schedule)
    scaled = _identity(hessian) + per_example(sigma2_ts, hessian) * hessian
    return per_example(sigma2_ts / lam_ts**2, hessian) * scaled


def _kernel(s, t, schedule):
    """(lam_ts, sigma2_ts), refusing a step without noise, which nothing can be inferred from."""
    if np.any(np.asarray(s) >= np.asarray(t)):
        raise ValueError("t must be at least 1, and later than s: without noise between them there is no score to use")
    return schedule.between(s, t)


def _identity(matrices):
    return array_module(matrices).eye(matrices.shape[-1], dtype=matrices.dtype)


# ---- learning a score (C02), and how far two laws are apart in it (C07)

def score_matching(score_hat, score):
    """|score_hat - score|^2, the explicit loss that needs the true score (C02).

    Returns values per example (N,), summed over dimensions, and the gradient of their sum with respect to score_hat.
    """
    r = score_hat - score
    return sum_per_example(r * r), 2 * r


def denoising_score_matching(score_hat, eps, t, schedule):
    """|score_hat + eps / sqrt(sigma2_bar_t)|^2, eps being the noise in x_t: the loss that needs samples only (C02).

    Returns values and gradient as `score_matching`. Averaged over eps given x_t the gradients are the same, and the
    values differ by tr Cov[eps | x_t] / sigma2_bar_t, whatever score_hat is. sigma2_bar_t has to be that of the
    example's own time: with another the loss is least at another function (E20).
    """
    _, sigma2 = _kernel(0, t, schedule)
    return score_matching(score_hat, eps * per_example(-1 / np.sqrt(sigma2), eps))


def fisher_divergence(p, q, x):
    """|score of q - score of p|^2 at each x (N,): its mean over draws of q is the Fisher divergence of q from p (C07).

    p and q are laws with a `score`, such as a world `noised` to one time t. Noised laws have full support, so that
    their divergence is 0 only where they are equal. How small it is can mislead: at low noise, laws of separate
    components that differ in the weights have nearly the same score wherever there is mass.
    """
    return score_matching(p.score(x), q.score(x))[0]
