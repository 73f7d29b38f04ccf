"""What a family of models must miss, however well it is trained: the price of its shape, in closed form.

A reverse step x_s | x_t of a real world is a mixture with correlated coordinates. Three simplifications are customary,
and each has a price that no training can lower:

    Gaussian      KL(q || N(its mean, its variance)) = H(Gaussian) - H(q)                                        (G12)
    diagonal      KL(N(m, S) || N(m, diag S)) = 1/2 (sum_i log S_ii - log det S)                                 (C17)
    blind         predicting a coordinate of x_0 from that coordinate of x_t alone, where p factorises but its mean
                  function needs the whole state (L21)
"""

import numpy as np

from nn.backend import array_module


def gaussian_gap(world, s, t, schedule, nodes=400):
    """What the best Gaussian for x_s | x_t misses: E KL(x_s | x_t || N(its mean, its variance)), nats (G12).

    The divergence from the Gaussian of the same moments is the difference of the entropies. s = 0 gives the gap of
    p(x_0 | x_t). Worlds on the line only (ValueError): both integrals are trapezoids of `nodes` points per component,
    whose error falls exponentially in their number.
    """
    if world.means.shape[1] != 1 or (world.covariances <= 0).any():
        raise ValueError("gaussian_gap integrates numerically, and needs a world with D = 1 and positive variances")
    z = np.linspace(-9, 9, nodes)
    p = np.exp(-0.5 * z * z)
    p /= p.sum()                                                                            # E f(z) = sum p f(z)
    marginal = world.noised(t, schedule)
    x_t = marginal.means + np.sqrt(marginal.covariances[:, :, 0]) * z                       # (K, nodes)
    reverse = world.reverse(x_t.reshape(-1, 1), s, t, schedule)
    entropy = np.zeros(x_t.size)
    variances = reverse.covariances[:, 0, 0]
    for k, var in enumerate(variances):                                                     # E_k[-log sum_j w_j N_j]
        x_s = reverse.means[:, k] + np.sqrt(var) * z                                        # (K nodes, nodes)
        density = sum(reverse.weights[:, j, None] * np.exp(-0.5 * (x_s - reverse.means[:, j])**2 / v)
                      / np.sqrt(2 * np.pi * v) for j, v in enumerate(variances))
        with np.errstate(divide="ignore"):
            log_density = np.where(reverse.weights[:, k, None] > 0, np.log(density), 0.0)
        entropy -= reverse.weights[:, k] * (log_density @ p)
    gap = 0.5 * np.log(2 * np.pi * np.e * reverse.cov()[:, 0, 0]) - entropy
    return float((world.weights[:, None] * gap.reshape(x_t.shape) * p).sum())


def diagonal_gap(covariance):
    """What the best diagonal Gaussian misses of N(m, S): KL(N(m, S) || N(m, diag S)), nats, shaped (...) (C17).

    `covariance` is (..., D, D), positive definite. Zero iff it is diagonal; for two coordinates of correlation rho it
    is -log(1 - rho^2)/2.
    """
    xp = array_module(covariance)
    variances = xp.diagonal(covariance, axis1=-2, axis2=-1)
    return 0.5 * (xp.log(variances).sum(axis=-1) - xp.linalg.slogdet(covariance)[1])


def own_coordinate_excess(covariance, t, schedule):
    """How much worse x_0,i is predicted from x_t,i alone than from all of x_t, for Gaussian data: (D,) variances (L21).

    With S the data's `covariance` (D, D), l = lam_bar_t and v = sigma2_bar_t, the two mean squared errors are

        alone   S_ii - l^2 S_ii^2 / (l^2 S_ii + v)                  all   [S - l^2 S (l^2 S + v I)^-1 S]_ii

    and the excess is their difference: never negative, and zero for all i iff S is diagonal (or t = 0). A reverse
    step inherits it with the factor a^2. t is an int in 0..T.
    """
    S = np.asarray(covariance, np.float64)
    l2, v = schedule.lam_bar[t]**2, schedule.sigma2_bar[t]
    variances = np.diagonal(S)
    gain = np.linalg.solve(l2 * S + v * np.eye(len(S)), S)                                  # (l^2 S + v I)^-1 S
    return l2 * (np.einsum("ij,ji->i", S, gain) - variances**2 / (l2 * variances + v))
