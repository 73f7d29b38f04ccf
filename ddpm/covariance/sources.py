"""Sources of Cov[x_0 | x_t]: functions (denoiser, prediction, x_t, t) -> a number, a diagonal or a matrix.

Whatever a source estimates, and from what, a reverse step needs only its answer (`ReverseCovariance`). `prediction` is
the denoiser's at (x_t, t), before any clipping, so that nothing is computed twice; t is an int or an (N,) host array.
The functions here make sources from what each needs. Most speak of Var[eps | x_t], and

    Cov[x_0 | x_t] = (sigma2_bar_t / lam_bar_t^2) Cov[eps | x_t]                                               (C08)

Sources don't clip: an estimate may be negative.
"""

import numpy as np

from ddpm import tweedie
from ddpm.covariance import hutchinson, ocm, residual, squared_noise
from ddpm.covariance.jacobian import FULL_LIMIT, jacobian, jacobian_diagonal
from nn.backend import array_module, per_example


def from_noise(var_eps, t, schedule):
    """Var[x_0 | x_t] = (sigma2_bar_t / lam_bar_t^2) Var[eps | x_t], shaped as var_eps (C08)."""
    return per_example(schedule.sigma2_bar[t] / schedule.lam_bar[t]**2, var_eps) * var_eps


def var_x0(var_eps, t, schedule, largest=None):
    """Var[x_0 | x_t] = (sigma2_bar_t / lam_bar_t^2) Var[eps | x_t], clipped to [0, largest]; shaped as var_eps (C08).

    An estimate may be negative, a variance not. Data in [low, high] have variances up to ((high - low) / 2)^2, 1 for
    images in [-1, 1]; None sets no upper end. Var[eps | x_t] itself has no such bound: between two modes it exceeds 1.
    """
    return array_module(var_eps).clip(from_noise(var_eps, t, schedule), 0, largest)


# ---- without passes beyond the mean's

def zero(denoiser, prediction, x_t, t):
    """0: x_0 taken for known."""
    return 0.0


def own(denoiser, prediction, x_t, t):
    """The model's own Var[x_0 | x_t], a GDDM's (G03). ValueError where the prediction has none."""
    if prediction.var_x0 is None:
        raise ValueError('variance "learned" needs a model with a variance (gddm or iddpm); use "large" or "small"')
    return prediction.var_x0


def table(values):
    """One number for each t: `values`, (T+1,) on the host, are E tr Cov[x_0 | x_t] / D (C09)."""
    def source(denoiser, prediction, x_t, t):
        return per_example(values[t], x_t)
    return source


def score_form(statistics):
    """One number for each t, (sigma2_bar / lam_bar^2) (1 - E|eps_hat|^2 / D), never more than the factor (C06)."""
    return _noise_table(1 - statistics.square)


def residual_form(statistics):
    """One number for each t, (sigma2_bar / lam_bar^2) E|eps - eps_hat|^2 / D: right for an inexact mean too (C09)."""
    return _noise_table(statistics.residual)


def _noise_table(var_eps):
    var_eps = np.array(var_eps)                                 # as it is now, whatever becomes of the statistics

    def source(denoiser, prediction, x_t, t):
        return from_noise(per_example(var_eps[t], x_t), t, denoiser.schedule)
    return source


# ---- with a head that was trained for it: `head(x_t, t)`, shaped as x_t

def squared_noise_head(head):
    """From h = E[eps^2 | x_t] (SN, C10)."""
    def source(denoiser, prediction, x_t, t):
        return from_noise(squared_noise.var_eps(head(x_t, t), prediction.eps), t, denoiser.schedule)
    return source


def residual_head(head):
    """From h = E[(eps - eps_hat)^2 | x_t] (NPR, C10)."""
    def source(denoiser, prediction, x_t, t):
        return from_noise(residual.var_eps(head(x_t, t)), t, denoiser.schedule)
    return source


def ocm_head(head):
    """From h = sigma2_bar diag Hessian of log q(x_t) (OCM, C12)."""
    def source(denoiser, prediction, x_t, t):
        return from_noise(ocm.var_eps(head(x_t, t)), t, denoiser.schedule)
    return source


# ---- from the derivative of the mean

def probes(number, rng):
    """Hutchinson's estimate of the diagonal from `number` random probes, a vjp each (C11)."""
    def source(denoiser, prediction, x_t, t):
        diagonal = hutchinson.hutchinson_diagonal(denoiser.vjp, x_t, t, number, rng)
        return from_noise(hutchinson.var_eps(diagonal, t, denoiser.schedule), t, denoiser.schedule)
    return source


def exact_diagonal(denoiser, prediction, x_t, t):
    """The diagonal in D vjps (C08)."""
    diagonal = jacobian_diagonal(denoiser.vjp, x_t, t)
    return from_noise(hutchinson.var_eps(diagonal, t, denoiser.schedule), t, denoiser.schedule)


def exact_full(limit=FULL_LIMIT):
    """The matrix (N, D, D), symmetric, in D vjps (C08). ValueError for more than `limit` coordinates."""
    def source(denoiser, prediction, x_t, t):
        return tweedie.covariance_from_jacobian(jacobian(denoiser.vjp, x_t, t, limit), t, denoiser.schedule)
    return source


def of_world(denoiser, prediction, x_t, t):
    """The matrix as an exact world knows it, for `Denoiser.from_world` (C08)."""
    return denoiser.covariance_x0(x_t, t)
