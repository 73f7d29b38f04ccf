"""Maximum mean discrepancy: how far two sets of points are apart, without a density of either (C17).

With a kernel k, the squared distance of the laws P and Q is that of their mean embeddings,

    MMD^2(P, Q) = E k(x, x') + E k(y, y') - 2 E k(x, y)        x, x' from P, y, y' from Q, all independent

and 0 iff P = Q for the kernels used here, sums over bandwidths h of

    k(x, y) = sum_h exp(-|x - y|^2 / (2 h^2))                  the narrow ones see widths, the wide ones who is missing

Means over pairs of *different* points estimate it without bias; it may come out below 0, and does half of the time
where P = Q. (Counting each point's pair with itself adds (k(x, x) - E k(x, x'))/n for each set, above 0 always.)

Where Q is a mixture of Gaussians, y can be integrated out: a Gaussian kernel is sqrt(2 pi) h per dimension times the
density of normal noise of variance h^2, so that E k(x, y) is that times the density of y + noise at x. With
`squared_mmd_to_world` only the points themselves are random.

The error is the jackknife's: the estimate is made again without each point, and these scatter. All that takes is each
point's sum over its pairs. On average it is never too small (Efron and Stein, 1981); where P = Q, where only pairs of
points matter, it is too large by a factor of sqrt(2).
"""

from typing import NamedTuple

import numpy as np

from nn.backend import array_module, to_host

BANDWIDTHS = (0.1, 0.3, 1.0, 3.0)
"""From the width of a spot of the grid to the distance of its spots."""

TILE, DEVICE_TILE = 256, 8192
"""Points whose pairs are worked on at once: 512 KiB for each array of pairs, on a device 512 MiB."""


class SquaredMMD(NamedTuple):
    """MMD^2, in units of the kernel (at most 2 for each bandwidth), and its standard error."""

    value: float
    error: float


def squared_mmd(x, y, bandwidths=BANDWIDTHS):
    """Unbiased MMD^2 of two sets of points, in O(n^2) time and a fixed amount of memory; computed in float64 (C17).

    Parameters
    ----------
    x, y : arrays (n, D) and (m, D), n, m >= 3
        Of one library.
    bandwidths : sequence of numbers > 0
        Standard deviations of the Gaussians that are summed, in units of the points.

    Returns
    -------
    SquaredMMD(value, error). ValueError for other shapes or bandwidths.
    """
    x, y = _points(x, bandwidths), _points(y, bandwidths)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"both sets must have the same dimension, got shapes {x.shape} and {y.shape}")
    to_y, to_x = _pair_sums(x, y, bandwidths)
    parts = (_one_side(_own_pair_sums(x, bandwidths), to_y / len(y)),
             _one_side(_own_pair_sums(y, bandwidths), to_x / len(x)))
    return SquaredMMD(sum(own - cross for own, cross, _ in parts), sum(variance for *_, variance in parts)**0.5)


def squared_mmd_to_world(x, world, bandwidths=BANDWIDTHS):
    """Unbiased MMD^2 of points x (n, D), n >= 3, and the law of a GaussianMixture in closed form (C17).

    Returns SquaredMMD(value, error), the error being that of the points. ValueError as for `squared_mmd`.
    """
    x = _points(x, bandwidths)
    to_world = sum(_mean_kernel(x, world, h) for h in bandwidths)
    within = sum(w * float(_mean_kernel(m[None], world, h, S)[0]) for h in bandwidths
                 for w, m, S in zip(world.weights, world.means, world.covariances, strict=True))
    own, cross, variance = _one_side(_own_pair_sums(x, bandwidths), to_world)
    return SquaredMMD(own - 2 * cross + within, variance**0.5)


def _one_side(own, cross):
    """What one set adds: mean over its own pairs, mean to the other law, and the jackknife variance of both.

    own (n,) are each point's sums over the others, cross (n,) its means over the other law. Without point i,
    the sum over ordered pairs loses 2 own_i, and the sum of `cross` its i-th.
    """
    own, cross = to_host(own), to_host(cross)
    n, pairs, total = len(own), own.sum(), cross.sum()
    without = (pairs - 2 * own) / ((n - 1) * (n - 2)) - 2 * (total - cross) / (n - 1)
    return pairs / (n * (n - 1)), total / n, (n - 1) * without.var()


def _own_pair_sums(x, bandwidths):
    """sum_{j != i} k(x_i, x_j) for each i, (n,): each tile of pairs once, and its transpose with it."""
    xp = array_module(x)
    sums = xp.zeros(len(x)) - len(bandwidths)                                               # k(x_i, x_i)
    tiles = _tiles(x)
    for i, rows in enumerate(tiles):
        for columns in tiles[i:]:
            k = _kernel(x[rows], x[columns], bandwidths)
            sums[rows] += k.sum(axis=1)
            if columns is not rows:
                sums[columns] += k.sum(axis=0)
    return sums


def _pair_sums(x, y, bandwidths):
    """Sums of k(x_i, y_j) over j, (n,), and over i, (m,)."""
    xp = array_module(x, y)
    over_y, over_x = xp.zeros(len(x)), xp.zeros(len(y))
    for rows in _tiles(x):
        for columns in _tiles(y):
            k = _kernel(x[rows], y[columns], bandwidths)
            over_y[rows] += k.sum(axis=1)
            over_x[columns] += k.sum(axis=0)
    return over_y, over_x


def _kernel(x, y, bandwidths):
    """k(x_i, y_j), (n, m)."""
    xp = array_module(x, y)
    square = xp.maximum((x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2 * (x @ y.T), 0)
    return sum(xp.exp(square * (-0.5 / h**2)) for h in bandwidths)


def _mean_kernel(x, world, h, more=0.0):
    """E exp(-|x - y|^2 / (2 h^2)) at points x (n, D), for y from `world` and noise of covariance `more` on x, (n,)."""
    D = world.means.shape[1]
    spread = type(world)(world.weights, world.means, world.covariances + more + h**2 * np.eye(D))
    return (2 * np.pi * h**2)**(D / 2) * array_module(x).exp(spread.log_density(x))


def _tiles(x):
    size = TILE if array_module(x) is np else DEVICE_TILE
    return [slice(start, start + size) for start in range(0, len(x), size)]


def _points(x, bandwidths):
    if getattr(x, "ndim", None) != 2 or len(x) < 3:
        raise ValueError(f"points must be an array (n, D) with n >= 3, got shape {getattr(x, 'shape', None)}")
    if not len(bandwidths) or min(bandwidths) <= 0:
        raise ValueError(f"bandwidths must be numbers above 0, got {bandwidths}")
    return x.astype(np.float64)
