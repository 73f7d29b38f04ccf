"""Hutchinson's estimator: the diagonal of a Jacobian from a few products with random signs (C11).

Var[eps | x_t] is 1 - sqrt(sigma2_bar_t) diag J, with J_ji = d eps_j / d x_i (C08). A backward pass gives one product
J^T v at the price of a forward pass, and the diagonal takes all d of them. But with independent signs v,

    v_i (J^T v)_i = J_ii + sum_{j != i} J_ji v_i v_j,      of mean J_ii and variance sum_{j != i} J_ji^2

since v_i^2 = 1 always. (For normal v it is so on average only, which adds 2 J_ii^2 to the variance.) The mean of M
probes is unbiased for any J, symmetric or not, and exact for a diagonal one; v and -v give the same number, so that
pairs of them help nobody. Nothing is trained. The price is M backward passes, each with the forward pass that it
differentiates: 2 M in all, for every step of a chain.
"""

import numpy as np

from ddpm.randomness import normal_like
from nn.backend import array_module, per_example


def hutchinson_diagonal(vjp, x_t, t, probes, rng):
    """Unbiased estimate of the diagonal of d eps / d x_t, shaped as x_t (C11).

    Parameters
    ----------
    vjp : function (x_t, t, v) -> v times the Jacobian
        That of a denoiser, which counts the passes: `probes` of its `vjps` per example.
    probes : int >= 1
        The error falls as 1 / sqrt(probes), see `diagonal_variance`. ValueError for less than 1.
    rng : numpy Generator, CuPy Generator or SampleStreams
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    total = 0
    for _ in range(probes):
        v = signs_like(x_t, rng)
        total = total + v * vjp(x_t, t, v)
    return total / probes


def diagonal_variance(jacobian, probes):
    """Variance of `hutchinson_diagonal`, sum_{j != i} J_ji^2 / probes for each i: (N, D) from (N, D, D) (C11)."""
    off_diagonal = jacobian * (1 - array_module(jacobian).eye(jacobian.shape[-1], dtype=jacobian.dtype))
    return (off_diagonal * off_diagonal).sum(axis=1) / probes


def var_eps(diagonal, t, schedule):
    """Var[eps | x_t] = 1 - sqrt(sigma2_bar_t) diag J, shaped as `diagonal`; an estimate of it may be negative (C08)."""
    return 1 - per_example(np.sqrt(schedule.sigma2_bar[t]), diagonal) * diagonal


def signs_like(x, rng):
    """Independent signs, -1 or 1, with the shape, dtype and library of `x`."""
    noise, xp = normal_like(x, rng), array_module(x)
    return xp.copysign(xp.ones_like(noise), noise)
