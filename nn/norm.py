"""Group normalisation on (H, W, N, C) maps, alone or with the SiLU that always follows it in the U-Net.

For one image and one group of channels, with m numbers in it,

    xhat = (x - mean) / std,    y = weight * xhat + bias

Backward. Let g = dy * weight be the gradient that reaches xhat. Moving x moves xhat directly, and through mean and
std; with d mean/dx = 1/m and d std/dx = xhat/m, the two indirect parts are projections of g on 1 and on xhat:

    dx = (g - average(g) - xhat average(g xhat)) / std
    dweight = sum(dy xhat),    dbias = sum(dy)

Rows. A pixel's (N, C) block is one row of a matrix (H W, N C), so every sum over pixels is a sum of rows, and what
remains is (N, C) numbers: y = A x + B and dx = P dy + Q x + R with A, B, P, Q, R of shape (N, C). The passes run over
blocks of rows that stay in the cache.
"""

import numpy as np

from nn.activation import silu_of_half, silu_slope_of_half
from nn.backend import array_module, row_blocks
from nn.module import Module, Parameter, zeros


def group_norm_forward(x, weight, bias, groups, eps=1e-5, *, silu=False):
    """y = weight xhat + bias, or silu of it; returns y and the cache (x, statistics).

    x (H, W, N, C); weight, bias (C,); the statistics are per image and group.
    """
    xp = array_module(x, weight)
    H, W, N, C = x.shape
    rows = x.reshape(H * W, N * C)
    blocks = row_blocks(H * W, rows[0].nbytes, xp)
    mean = _spread(_sum_rows(rows, blocks), groups, (N, C)) / (H * W * C // groups)
    # The variance takes a pass of its own over x - mean: E[x^2] - mean^2 would lose every digit of a
    # small spread around a large mean.
    squares = xp.zeros(N * C, x.dtype)
    for block in blocks:
        centred = rows[block] - mean
        squares += xp.einsum("rk,rk->k", centred, centred)
    rstd = 1 / xp.sqrt(_spread(squares, groups, (N, C)) / (H * W * C // groups) + eps)
    A = _per_channel(rstd, N) * weight
    B = (bias - _per_channel(mean, N) * A).reshape(-1)
    A = A.reshape(-1)
    if silu:
        A, B = 0.5 * A, 0.5 * B
    y = xp.empty_like(rows)
    for block in blocks:
        h = xp.multiply(rows[block], A, out=y[block])
        h += B
        if silu:
            silu_of_half(h, out=h)
    return y.reshape(x.shape), (x, weight, mean, rstd, A, B, groups, silu)


def group_norm_backward(dy, cache, *, params=True):
    """(dx, dweight, dbias); the last two are None without `params`."""
    x, weight, mean, rstd, A, B, groups, silu = cache
    xp = array_module(dy, weight)
    H, W, N, C = x.shape
    rows, dy = x.reshape(H * W, N * C), dy.reshape(H * W, N * C)
    blocks = row_blocks(H * W, rows[0].nbytes, xp)
    dx = xp.empty_like(rows)
    sum_dh, sum_dh_x = xp.zeros(N * C, x.dtype), xp.zeros(N * C, x.dtype)
    for block in blocks:
        dh = dx[block]
        if silu:
            h = rows[block] * A
            h += B
            xp.multiply(silu_slope_of_half(h), dy[block], out=dh)
        else:
            dh[...] = dy[block]
        sum_dh += dh.sum(axis=0)
        sum_dh_x += xp.einsum("rk,rk->k", dh, rows[block])
    sum_dh_xhat = (sum_dh_x - mean * sum_dh) * rstd
    m = H * W * C // groups
    average_g = _spread((_per_channel(sum_dh, N) * weight).reshape(-1), groups, (N, C)) / m
    average_g_xhat = _spread((_per_channel(sum_dh_xhat, N) * weight).reshape(-1), groups, (N, C)) / m
    P, Q = (_per_channel(rstd, N) * weight).reshape(-1), -average_g_xhat * rstd**2
    R = -average_g * rstd - mean * Q
    for block in blocks:
        dh = dx[block]
        dh *= P
        dh += rows[block] * Q
        dh += R
    if not params:
        return dx.reshape(x.shape), None, None
    return dx.reshape(x.shape), sum_dh_xhat.reshape(N, C).sum(axis=0), sum_dh.reshape(N, C).sum(axis=0)


def _sum_rows(rows, blocks):
    total = array_module(rows).zeros(rows.shape[1], rows.dtype)
    for block in blocks:
        total += rows[block].sum(axis=0)
    return total


def _spread(values, groups, shape):
    """Sum an (N*C,) vector over each image's groups of channels and give every channel its group's sum."""
    N, C = shape
    sums = values.reshape(N * groups, C // groups).sum(axis=1)
    return array_module(values).repeat(sums, C // groups)


def _per_channel(values, N):
    """An (N*C,) vector as (N, C), to meet the channels' weight and bias."""
    return values.reshape(N, -1)


class GroupNorm(Module):
    """Group normalisation with a weight and a bias per channel.

    Parameters
    ----------
    groups, channels : int
        `channels` must be a multiple of `groups` (ValueError).
    eps : float
        Added to the variance.
    silu : bool
        Apply SiLU to the result in the same passes.
    """

    def __init__(self, groups, channels, eps=1e-5, dtype=np.float32, *, silu=False):
        if groups < 1 or channels % groups:
            raise ValueError(f"GroupNorm: {channels} channels do not divide into {groups} groups")
        self.weight = Parameter(np.ones(channels, dtype))
        self.bias = Parameter(zeros(channels, dtype))
        self.groups, self.eps, self.silu = groups, eps, silu

    def forward(self, x):
        if x.ndim != 4 or x.shape[3] != self.weight.value.size:
            raise ValueError(f"GroupNorm: x must be (H, W, N, {self.weight.value.size}), got shape {x.shape}")
        return self._remember(*group_norm_forward(x, self.weight.value, self.bias.value, self.groups, self.eps,
                                                  silu=self.silu))

    def backward(self, dy, *, params=True):
        dx, dweight, dbias = group_norm_backward(dy, self._recall(dy), params=params)
        if params:
            self.weight.grad += dweight
            self.bias.grad += dbias
        return dx
