"""A covariance is a number, a diagonal or a matrix: what a reverse step needs of it, written once for the three.

    isotropic   float, or (N, 1, ..., 1)       one variance for all coordinates
    diagonal    shaped as x                    one for each coordinate
    full        (N, D, D)                      D being the number of coordinates of one example, in C order

Given x_0 a step is N(a x_0 + b x_t, var I); averaged over x_0 | x_t with covariance C it has covariance
var I + a^2 C, whatever the shape of C (`ReverseCovariance`). To draw from it, normal noise is multiplied by its root,
of a matrix the symmetric one. To measure it by the bound one needs, for q = N(m, v I) and p = N(mean, W) with
eigenvalues w_i and the offset's coordinates d_i along the eigenvectors,

    KL(q || p)   = 1/2 sum_i [v/w_i - 1 - log(v/w_i) + d_i^2/w_i]
    -E_q log p   = 1/2 sum_i [log(2 pi w_i) + (v + d_i^2)/w_i]

in nats per example, which of an isotropic or diagonal W are those of `ddpm.gaussian`, summed. Matrices are worked with
in float64.
"""

import math

import numpy as np

from nn.backend import array_module, per_example


def is_full(cov, x):
    """Whether `cov` is a matrix (N, D, D) for each example of x (N, ...)."""
    D = math.prod(x.shape[1:])
    return getattr(cov, "ndim", 0) == 3 and cov.shape != x.shape and cov.shape[1:] == (D, D)


def step_covariance(posterior, cov_x0, x_t):
    """var I + a^2 Cov[x_0 | x_t], the covariance of x_s | x_t, in the shape of `cov_x0` (G01, G03)."""
    if not is_full(cov_x0, x_t):
        return per_example(posterior.var, x_t) + per_example(posterior.a**2, x_t) * cov_x0
    eye = array_module(cov_x0).eye(cov_x0.shape[-1], dtype=cov_x0.dtype)
    return per_example(posterior.var, cov_x0) * eye + per_example(posterior.a**2, cov_x0) * cov_x0


def diagonal(cov, x):
    """The variances of the coordinates: shaped as x for a matrix, else `cov` itself."""
    return cov.diagonal(axis1=1, axis2=2).reshape(x.shape) if is_full(cov, x) else cov


def isotropic(cov, x):
    """The mean variance of the coordinates, tr/D: (N, 1, ..., 1), or the number itself."""
    if not hasattr(cov, "ndim"):
        return cov
    return diagonal(cov, x).mean(axis=tuple(range(1, x.ndim)), keepdims=True)


def clip(cov, low, high, x):
    """`cov` with its variances within [low, high], None for no end: of a matrix, the variances along any direction."""
    if not hasattr(cov, "ndim"):
        return float(np.clip(cov, low, high))
    xp = array_module(cov)
    if not is_full(cov, x):
        return xp.clip(cov, low, high)
    values, vectors = xp.linalg.eigh(cov)
    return (vectors * xp.clip(values, low, high)[:, None, :]) @ vectors.swapaxes(1, 2)


def root_times(cov, noise):
    """cov^(1/2) noise, shaped as `noise`: a draw of N(0, cov) where the noise is standard normal.

    Of a matrix the symmetric root is taken; its eigenvalues below 0, which only rounding makes, count as 0.
    """
    if not is_full(cov, noise):
        return cov**0.5 * noise
    xp = array_module(cov, noise)
    values, vectors = xp.linalg.eigh(cov)
    along = vectors.swapaxes(1, 2) @ noise.reshape(len(noise), -1, 1).astype(cov.dtype)
    drawn = vectors @ (xp.sqrt(xp.maximum(values, 0))[:, :, None] * along)
    return drawn.reshape(noise.shape).astype(noise.dtype)


# ---- nats, for a full covariance of p; (N,) float64

def kl(mean_q, var_q, mean_p, cov_p):
    """KL( N(mean_q, var_q I) || N(mean_p, cov_p) ) per example, (N,); var_q > 0 is a float or (N,), cov_p (N, D, D).

    nan where cov_p isn't positive definite.
    """
    xp, values, along = _principal(mean_q - mean_p, cov_p)
    ratio = per_example(var_q, values) / values
    return 0.5 * (ratio - 1 - xp.log(ratio) + along * along / values).sum(axis=1)


def cross_entropy(mean_q, var_q, mean_p, cov_p):
    """-E_q log p per example, (N,), of the same two; with var_q = 0 it is -log N(mean_q; mean_p, cov_p)."""
    xp, values, along = _principal(mean_q - mean_p, cov_p)
    return 0.5 * (xp.log(2 * math.pi * values) + (per_example(var_q, values) + along * along) / values).sum(axis=1)


def _principal(offset, cov):
    """The library, the variances of `cov` along its axes (N, D), and the offset's coordinates along them (N, D)."""
    xp = array_module(offset, cov)
    values, vectors = xp.linalg.eigh(cov.astype(np.float64))
    flat = offset.reshape(len(offset), 1, -1).astype(np.float64)
    return xp, values, (flat @ vectors)[:, 0]
