"""GDDM: a learned diagonal Gaussian for the clean image, p(x_0 | x_t) = N(mu_0, Sigma_0), trained by the bound alone.

The network gives the Gaussian of the noise, N(mu_eps, S) with S diagonal; the two are the same statement (G04):

    mu_0 = (x_t - sqrt(sigma2_bar_t) mu_eps) / lam_bar_t,        Sigma_0 = (sigma2_bar_t / lam_bar_t^2) S.

Averaging the posterior of the noising chain over that Gaussian gives the reverse step N(mu, V) (G01-G03, G05):

    mu = a mu_0 + b x_t,        V = var + a^2 Sigma_0 = var + c^2 S,        c = a sqrt(sigma2_bar_t) / lam_bar_t.

A point estimate, Sigma_0 = 0, loses the second part of V. The KL of one step is closed; with k = c^2 / var and
r = eps - mu_eps it is, per pixel and in nats (G06),

    L = 1/2 [log(V/var) + (var + c^2 r^2)/V - 1] = 1/2 [log(1 + k S) + k (r^2 - S) / (1 + k S)]
    dL/dmu_eps = -k r / (1 + k S)                      S -> 0 gives the weighted squared error, k r^2 / 2 (G07)
    dL/dS      = 1/2 (k / (1 + k S))^2 (S - r^2)       whose mean vanishes at S = E[r^2 | x_t]

The second form of L is the one computed: nothing cancels, overflows or divides by a small variance in float32.
At s = 0, k is infinite and the term is the decoder's -log N(x_0; mu_0, Sigma_0) (E10).
"""

import numpy as np

from ddpm.ddpm import (
    chain_loss,
    decoder_nats,
    dimensions,
    noise_channels,
    output_gradient,
    step_weight,
    sum_per_example,
    variance_channels,
)
from ddpm.parameterization import eps_from_x0, x0_from_eps
from nn.backend import array_module, per_example

LOG_VARIANCE_BOUNDS = (-24.0, 5.0)
"""Asymptotes of log Var[eps | x_t]. It falls to about log snr_t where x_t is all noise: -20 at T for cosine steps."""


# ---- the Gaussian of x_0 and the Gaussian of the noise (G04)

def noise_to_data(mean_eps, var_eps, x_t, t, schedule):
    """Gaussian of x_0 from that of the noise: (mean_x0, var_x0), shaped as x_t (G04)."""
    lam, noise = schedule.lam_bar[t], np.sqrt(schedule.sigma2_bar[t])
    return x0_from_eps(mean_eps, x_t, t, schedule), per_example((noise / lam)**2, x_t) * var_eps


def data_to_noise(mean_x0, var_x0, x_t, t, schedule):
    """Gaussian of the noise from that of x_0: (mean_eps, var_eps), shaped as x_t; t >= 1 (G04)."""
    lam, noise = schedule.lam_bar[t], np.sqrt(schedule.sigma2_bar[t])
    return eps_from_x0(mean_x0, x_t, t, schedule), per_example((lam / noise)**2, x_t) * var_x0


# ---- the reverse step (G01, G03, G05)

def reverse_moments(mean_x0, var_x0, x_t, s, t, schedule):
    """Mean a mean_x0 + b x_t and variance var + a^2 var_x0 of x_s | x_t, for any s < t, shaped as x_t (G03).

    Exact for the first two moments whatever the law of x_0 | x_t is (G01); at s = 0 it returns (mean_x0, var_x0).
    """
    posterior = schedule.posterior(s, t)
    return posterior.mean(mean_x0, x_t), per_example(posterior.var, x_t) + per_example(posterior.a**2, x_t) * var_x0


def noise_coefficient(s, t, schedule):
    """c = a sqrt(sigma2_bar_t) / lam_bar_t = sigma2_ts / (lam_ts sqrt(sigma2_bar_t)): x_s gains c^2 Var[eps] (G05).

    A variance-preserving step s = t-1 has c = beta_t / sqrt(alpha_t (1 - alpha_bar_t)). Float, or (N,) array.
    """
    lam_ts, sigma2_ts = schedule.between(s, t)
    c = sigma2_ts / (lam_ts * schedule.sigma2_bar[t]**0.5)
    return float(c) if np.ndim(c) == 0 else c


# ---- the KL of one step (G06, G07)

def step_kl(eps, mean_eps, var_eps, s, t, schedule):
    """KL( x_s | x_t, x_0  ||  N(mu, V) ) for 0 < s < t, elementwise, nats (G06).

    `var_eps` >= 0 is S, shaped as eps; with S = 0 the value is k r^2 / 2 (G07). ValueError at s = 0 (E10).
    """
    xp, k = array_module(eps), per_example(step_weight(s, t, schedule), eps)
    r, kS = eps - mean_eps, k * var_eps
    return 0.5 * (xp.log1p(kS) + k * (r * r - var_eps) / (1 + kS))


def step_kl_gradients(eps, mean_eps, var_eps, s, t, schedule):
    """(d/d mean_eps, d/d var_eps) of `step_kl`, elementwise."""
    k = per_example(step_weight(s, t, schedule), eps)
    r, gain = eps - mean_eps, k / (1 + k * var_eps)
    return -gain * r, 0.5 * gain * gain * (var_eps - r * r)


# ---- the variance head

def log_variance(raw):
    """Log-variance of the noise from the raw head output, and its slope: (u, du/draw).

    u = raw / sqrt(1 + (raw/m)^2), m the bound on raw's side: u = raw and slope 1 at 0, where a zero-initialised network
    starts (S = 1: every term of the loss is finite and of its natural size), and bounded by `LOG_VARIANCE_BOUNDS`. The
    slope falls as |raw|^-3 and never is 0, as it would be behind a hard clip: a head that has gone out comes back.
    """
    xp = array_module(raw)
    low, high = LOG_VARIANCE_BOUNDS
    z = xp.maximum(raw / low, raw / high)                         # |raw| / |m|
    root = 1 / xp.sqrt(1 + z * z)
    return raw * root, root**3


# ---- the loss

def kl_loss(output, x0, eps, x_t, t, schedule, *, bin_width, s=None, stop_mean_gradient=False):
    """T times the term t -> s of the bound, nats per dimension; and its gradient (G06).

    Parameters
    ----------
    output : array (N, ..., 2C)
        mu_eps and the raw variance head (see `log_variance`).
    x0, eps, x_t : array (N, ..., C)
    t : int or integer array (N,), on the host
    bin_width : float or None
        Width of the data's bins at s = 0; None takes the density there (data that are not quantised).
    s : None or integer array (N,), on the host
        Earlier times, 0 <= s < t; t-1 where not given. Rows with s = 0 are the decoder -log N(x_0; mu_0, Sigma_0).
    stop_mean_gradient : bool
        Leave the gradient of mu_eps zero, so that another loss trains the mean and this one the variance.

    Returns
    -------
    values (N,) and the gradient of their sum, shaped as output. ValueError for an output without a variance head.
    """
    scale = schedule.T / dimensions(eps)

    def heads(output, like):
        u, slope = log_variance(variance_channels(output, like))
        var_eps = array_module(u).exp(u)
        return noise_channels(output, like), var_eps, var_eps * slope

    def assemble(output, nats, d_mean, d_raw):
        d_mean = None if stop_mean_gradient else scale * d_mean
        return scale * sum_per_example(nats), output_gradient(output, d_mean, scale * d_raw)

    def step(output, eps, s, t):
        mean_eps, var_eps, dvar_draw = heads(output, eps)
        nats = step_kl(eps, mean_eps, var_eps, s, t, schedule)
        d_mean, d_var = step_kl_gradients(eps, mean_eps, var_eps, s, t, schedule)
        return assemble(output, nats, d_mean, d_var * dvar_draw)

    def decoder(output, x0, x_t, s, t):
        mean_eps, var_eps, dvar_draw = heads(output, x0)
        factor = per_example(schedule.sigma2_bar[t] / schedule.lam_bar[t]**2, x_t)
        nats, d_mean, d_var = decoder_nats(x0, mean_eps, factor * var_eps, x_t, t, schedule, bin_width)
        return assemble(output, nats, d_mean, d_var * factor * dvar_draw)

    return chain_loss(step, decoder, output, x0, eps, x_t, np.asarray(t) - 1 if s is None else s, t)
