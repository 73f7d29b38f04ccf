"""The exact spread of x_0 | x_t from D backward passes: all of it, or its diagonal (C08).

A vjp with the cotangent e_j is a row of J, J_ji = d eps_j / d x_i. With all D rows there is the whole matrix

    Cov[x_0 | x_t] = (sigma2_bar / lam_bar^2) (I - sqrt(sigma2_bar) (J + J^T)/2)

and keeping of each row only J_jj, its diagonal at the same price, without room for a matrix. For points and small
images; `hutchinson` estimates the diagonal from a few passes, and `ocm` from none.
"""

import math

import numpy as np

from nn.backend import array_module

FULL_LIMIT = 4096
"""Coordinates up to which a matrix is made for each example: 128 MiB each at the limit."""


def rows(vjp, x_t, t):
    """The rows of d eps/d x_t one after another, (N, D) each, for j = 0 .. D-1; `vjp` is that of a denoiser."""
    xp, D = array_module(x_t), math.prod(x_t.shape[1:])
    for j in range(D):
        one_hot = xp.zeros((len(x_t), D), dtype=x_t.dtype)
        one_hot[:, j] = 1
        yield vjp(x_t, t, one_hot.reshape(x_t.shape)).reshape(len(x_t), D)


def jacobian(vjp, x_t, t, limit=FULL_LIMIT):
    """J_ji = d eps_j / d x_i as (N, D, D), float64, in D vjps. ValueError for more than `limit` coordinates."""
    D = math.prod(x_t.shape[1:])
    if D > limit:
        raise ValueError(f"a full covariance of D = {D} coordinates takes {D} vjps, {2 * D} network passes, and a "
                         f"{D} x {D} matrix for every image and step; the limit is D = {limit}: use \"diagonal\", or "
                         "\"hutchinson\" or a head, which cost less")
    return array_module(x_t).stack([row.astype(np.float64) for row in rows(vjp, x_t, t)], axis=1)


def jacobian_diagonal(vjp, x_t, t):
    """d eps_j / d x_j, exact, shaped as x_t, in D vjps."""
    columns = [row[:, j] for j, row in enumerate(rows(vjp, x_t, t))]
    return array_module(x_t).stack(columns, axis=1).reshape(x_t.shape)
