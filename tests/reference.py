"""Slow, obvious references for the layers: the formulas as loops, backward through explicit Jacobians.

Nothing here shares a line with nn/. Every function takes and returns NumPy arrays in the layers' layout,
(H, W, N, C), and is itself checked by central differences in the tests that use it.
"""

import math

import numpy as np


def error(actual, expected):
    """Largest absolute difference, relative to the largest expected value."""
    assert actual.shape == expected.shape, f"shapes {actual.shape} and {expected.shape}"
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-300)


def central_difference(f, x, dy, step=1e-6):
    """The gradient of sum(dy f(x)) with respect to every entry of x: two calls of f each."""
    dx = np.empty_like(x)
    for i in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[i] += sign * step
            ends.append((dy * f(moved)).sum())
        dx[i] = (ends[0] - ends[1]) / (2 * step)
    return dx


# ---- convolution: loops over output pixels and taps

def _taps(H, W, k, stride):
    """(i, j, u, v, row, column): output pixel, tap, and the input pixel they read, where there is one."""
    for i in range(math.ceil(H / stride)):
        for j in range(math.ceil(W / stride)):
            for u in range(k):
                for v in range(k):
                    row, column = stride * i + u - k // 2, stride * j + v - k // 2
                    if 0 <= row < H and 0 <= column < W:
                        yield i, j, u, v, row, column


def conv(x, w, b=None, stride=1):
    """y[i, j] = b + sum_uv x[s i + u - k//2, s j + v - k//2] w[u, v]; b (K,) or (N, K)."""
    (H, W, N, _), (k, _, _, K) = x.shape, w.shape
    y = np.zeros((math.ceil(H / stride), math.ceil(W / stride), N, K), x.dtype)
    for i, j, u, v, row, column in _taps(H, W, k, stride):
        y[i, j] += x[row, column] @ w[u, v]
    return y if b is None else y + b


def conv_backward(dy, x, w, stride=1):
    """(dx, dw, db), db (N, K) per image: each product of `conv` hands dy to both of its factors."""
    (H, W, _, _), k = x.shape, w.shape[0]
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for i, j, u, v, row, column in _taps(H, W, k, stride):
        dx[row, column] += dy[i, j] @ w[u, v].T
        dw[u, v] += x[row, column].T @ dy[i, j]
    return dx, dw, dy.sum(axis=(0, 1))


def upsample(x):
    """Every pixel four times: (H, W, N, C) -> (2H, 2W, N, C)."""
    H, W, N, C = x.shape
    y = np.empty((2 * H, 2 * W, N, C), x.dtype)
    for i in range(2 * H):
        for j in range(2 * W):
            y[i, j] = x[i // 2, j // 2]
    return y


def upsample_backward(dy):
    """Every pixel collects the gradients of its four copies."""
    H, W, N, C = dy.shape
    dx = np.zeros((H // 2, W // 2, N, C), dy.dtype)
    for i in range(H):
        for j in range(W):
            dx[i // 2, j // 2] += dy[i, j]
    return dx


# ---- group normalisation: one image and one group at a time

def group_norm(x, weight, bias, groups, eps=1e-5):
    """y = weight (x - mean) / sqrt(variance + eps) + bias."""
    return _normalised(x, groups, eps)[0] * weight + bias


def group_norm_backward(dy, x, weight, groups, eps=1e-5):
    """(dx, dweight, dbias) with the Jacobian of each normalised vector written out as a matrix."""
    xhat, jacobians = _normalised(x, groups, eps)
    dx, g, size = np.empty_like(x), dy * weight, x.shape[3] // groups
    for (n, group), jacobian in jacobians.items():
        channels = slice(group * size, (group + 1) * size)
        dx[:, :, n, channels] = (jacobian.T @ g[:, :, n, channels].ravel()).reshape(dx[:, :, n, channels].shape)
    return dx, (dy * xhat).sum(axis=(0, 1, 2)), dy.sum(axis=(0, 1, 2))


def _normalised(x, groups, eps):
    xhat, jacobians, size = np.empty_like(x), {}, x.shape[3] // groups
    for n in range(x.shape[2]):
        for group in range(groups):
            channels = slice(group * size, (group + 1) * size)
            v = x[:, :, n, channels].ravel()
            m, centred = v.size, v - v.mean()
            std = math.sqrt((centred**2).mean() + eps)
            xhat[:, :, n, channels] = (centred / std).reshape(x[:, :, n, channels].shape)
            # d xhat_i / d x_j = (delta_ij - 1/m) / std - centred_i (centred_j / m) / std^3
            jacobians[n, group] = (np.eye(m) - 1 / m) / std - np.outer(centred, centred) / (m * std**3)
    return xhat, jacobians


# ---- elementwise, attention

def silu(x):
    """x / (1 + exp(-x)), one number at a time."""
    return np.array([v / (1 + math.exp(-v)) for v in x.ravel()], x.dtype).reshape(x.shape)


def silu_backward(dy, x):
    """dy (s + x s (1 - s)) with the sigmoid s."""
    s = np.array([1 / (1 + math.exp(-v)) for v in x.ravel()], x.dtype).reshape(x.shape)
    return dy * (s + x * s * (1 - s))


def attention(qkv, heads):
    """O (L, N, C) from qkv (L, N, 3C): every pixel's average of the values, weighted by exp(q k / sqrt(d))."""
    L, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    o = np.zeros((L, N, C), qkv.dtype)
    for n, q, k, v in _heads(C, N, heads):
        for i in range(L):
            p = _attention_weights(qkv[i, n, q], qkv[:, n, k])
            for j in range(L):
                o[i, n, q] += p[j] * qkv[j, n, v]
    return o


def attention_backward(do, qkv, heads):
    """dqkv: for each query, back through the average, the softmax's Jacobian diag(p) - p p^T, and the scores."""
    L, N, C = do.shape
    dqkv = np.zeros_like(qkv)
    for n, q, k, v in _heads(C, N, heads):
        scale = 1 / math.sqrt(q.stop - q.start)
        for i in range(L):
            p = _attention_weights(qkv[i, n, q], qkv[:, n, k])
            dp = np.array([do[i, n, q] @ qkv[j, n, v] for j in range(L)])
            ds = (np.diag(p) - np.outer(p, p)) @ dp
            for j in range(L):
                dqkv[j, n, v] += p[j] * do[i, n, q]
                dqkv[i, n, q] += ds[j] * scale * qkv[j, n, k]
                dqkv[j, n, k] += ds[j] * scale * qkv[i, n, q]
    return dqkv


def _heads(C, N, heads):
    """Each image, and where a head's queries (and outputs), keys and values lie."""
    d = C // heads
    for n in range(N):
        for h in range(heads):
            yield n, *(slice(part * C + h * d, part * C + (h + 1) * d) for part in range(3))


def _attention_weights(query, keys):
    scores = [query @ key / math.sqrt(query.size) for key in keys]
    weights = np.array([math.exp(score - max(scores)) for score in scores])
    return weights / weights.sum()
