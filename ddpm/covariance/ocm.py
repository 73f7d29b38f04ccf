"""OCM: a head that learns the diagonal once, so that sampling needs no probes (C12).

Each of Hutchinson's probes is an unbiased sample of the diagonal (C11), and a regression finds the mean of its target:

    y = -sqrt(sigma2_bar_t) v * (J^T v),      E[y | x_t] = sigma2_bar_t diag Hessian,      Var[eps | x_t] = 1 + h

where h is the head and v are random signs. There are two ways to use M probes at one x_t:

    on their average    |h - mean_m y_m|^2 / d            on each alone    mean_m |h - y_m|^2 / d

The average of M squares is the square of the average and their scatter, which doesn't depend on h: as functions of h
the two are equal but for an offset. In expectation both are |h - E y|^2 / d and a constant, tr Cov[y] / (M d) for the
first and tr Cov[y] / d for the second. So both have the gradient of the loss on the exact diagonal, without bias, and
its minimiser; only their values are offset (E30), and neither reaches 0. More probes mean less noise in the gradient.

A head inherits the error of the denoiser's Jacobian, not that of its values: compare `residual`.
"""

import numpy as np

from ddpm.covariance.hutchinson import signs_like
from ddpm.ddpm import dimensions
from nn.backend import array_module, per_example


def target(v, v_times_jacobian, t, schedule):
    """y = -sqrt(sigma2_bar_t) v * (J^T v), one probe's sample of sigma2_bar_t diag Hessian; shaped as v (C12)."""
    return -per_example(np.sqrt(schedule.sigma2_bar[t]), v) * v * v_times_jacobian


def draw_targets(vjp, x_t, t, probes, rng, schedule):
    """Targets of `probes` random probes at each x_t, (probes, N, ...) (C12); vjp and rng as in `hutchinson_diagonal`.

    The denoiser has to be in the state that it predicts in, without dropout. ValueError for less than 1 probe.
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    signs = (signs_like(x_t, rng) for _ in range(probes))
    return array_module(x_t).stack([target(v, vjp(x_t, t, v), t, schedule) for v in signs])


def loss_on_average(head, targets):
    """|h - mean_m y_m|^2 / d per example (N,), for targets (M, N, ...); and the gradient of the sum wrt h (C12)."""
    r = head - targets.mean(axis=0)
    return (r * r).mean(axis=tuple(range(1, r.ndim))), 2 / dimensions(head) * r


def loss_on_each(head, targets):
    """mean_m |h - y_m|^2 / d per example (N,): larger by the scatter of the targets; the gradient is the same (C12)."""
    r = head - targets
    return (r * r).mean(axis=(0, *range(2, r.ndim))), 2 / dimensions(head) * r.mean(axis=0)


def var_eps(head):
    """Var[eps | x_t] = 1 + h, elementwise: the whole of the noise where the head is 0 (C12)."""
    return 1 + head
