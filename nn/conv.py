"""Convolution with zero "same" padding on (H, W, N, C) maps: y[i, j] = b + sum_uv x[s i + u - p, s j + v - p] w[u, v].

Three ways to the same sum, chosen by what is cheapest:

    1x1, stride 1     one matrix product over all pixels
    3x3, stride 1     Winograd (nn/winograd.py), where both sides have channels enough to pay for its transforms
    the rest          patches: gather the k*k shifted copies of x beside each other, one matrix product with
                      w (k*k*C, K); or, when y has fewer channels than x, the product first, then scatter

Gathering patches and adding shifted pieces back are transposes of each other, so one pair of functions serves forward
and backward: y = gather(x) w has dx = scatter(dy w^T), and y = scatter(x w') has dx = gather(dy) w'^T.
"""

import numpy as np

from nn.backend import array_module
from nn.linear import linear_backward, linear_forward
from nn.module import Module, Parameter, uniform_fan_in, zeros
from nn.winograd import filter_transform, filter_transform_backward, winograd_backward, winograd_forward

WINOGRAD_MIN_CHANNELS = 8


# ---- patches: the k*k shifted copies of a map, and their transpose

def _shifts(size, k, stride):
    """For each place u in a window of k: (u, outputs that see an input there, those inputs)."""
    out = -(-size // stride)
    for u in range(k):
        offset = u - k // 2
        first = -(offset // stride) if offset < 0 else 0
        last = min(out, (size - 1 - offset) // stride + 1)
        if first < last:                                 # a small map doesn't reach into a large window's corners
            yield u, slice(first, last), slice(stride * first + offset, stride * (last - 1) + offset + 1, stride)


def gather_patches(x, k, stride=1):
    """(H, W, N, C) -> (H', W', N, k, k, C): each output pixel's window, zeros beyond the border."""
    H, W, N, C = x.shape
    patches = array_module(x).zeros((-(-H // stride), -(-W // stride), N, k, k, C), x.dtype)
    for u, rows, from_rows in _shifts(H, k, stride):
        for v, columns, from_columns in _shifts(W, k, stride):
            patches[rows, columns, :, u, v] = x[from_rows, from_columns]
    return patches


def scatter_patches(patches, H, W, stride=1):
    """The transpose of `gather_patches`: (H', W', N, k, k, C) -> (H, W, N, C), windows added up where they overlap."""
    N, k, _, C = patches.shape[2:]
    x = array_module(patches).zeros((H, W, N, C), patches.dtype)
    for u, rows, from_rows in _shifts(H, k, stride):
        for v, columns, from_columns in _shifts(W, k, stride):
            x[from_rows, from_columns] += patches[rows, columns, :, u, v]
    return x


def _mirrored(w):
    """w'[c, (u, v, k)] = w[-u, -v, c, k]: what each input channel sends to the outputs around it."""
    k, _, C, K = w.shape
    return w[::-1, ::-1].transpose(2, 0, 1, 3).reshape(C, k * k * K)


def patches_forward(x, w, stride=1):
    """Convolution through patches, without bias; returns y (H', W', N, K) and the cache (x, w, stride)."""
    (H, W, N, C), (k, _, _, K) = x.shape, w.shape
    if K < C and stride == 1:
        y = scatter_patches((x.reshape(-1, C) @ _mirrored(w)).reshape(H, W, N, k, k, K), H, W)
    else:
        patches = gather_patches(x, k, stride)
        y = (patches.reshape(-1, k * k * C) @ w.reshape(k * k * C, K)).reshape(patches.shape[:3] + (K,))
    return y, (x, w, stride)


def patches_backward(dy, cache, *, params=True):
    """(dx, dw) of `patches_forward`; dw is None without `params`."""
    x, w, stride = cache
    (H, W, _, C), (k, _, _, K) = x.shape, w.shape
    dw = None
    if K < C and stride == 1:
        dpatches = gather_patches(dy, k).reshape(-1, k * k * K)
        dx = (dpatches @ _mirrored(w).T).reshape(x.shape)
        if params:
            dw = (x.reshape(-1, C).T @ dpatches).reshape(C, k, k, K).transpose(1, 2, 0, 3)[::-1, ::-1]
    else:
        if params:
            dw = (gather_patches(x, k, stride).reshape(-1, k * k * C).T @ dy.reshape(-1, K)).reshape(w.shape)
        dpatches = (dy.reshape(-1, K) @ w.reshape(k * k * C, K).T).reshape(dy.shape[:3] + (k, k, C))
        dx = scatter_patches(dpatches, H, W, stride)
    return dx, dw


# ---- the choice

def _by_winograd(w, stride, upsample):
    k, _, C, K = w.shape
    return k == 3 and stride == 1 and (upsample or min(C, K) >= WINOGRAD_MIN_CHANNELS)


def conv_forward(x, w, b=None, *, stride=1, upsample=False, filters=None):
    """y = conv(x, w) + b with "same" padding; with `upsample`, of x doubled by nearest neighbour (3x3, stride 1).

    x (H, W, N, C); w (k, k, C, K); b (K,), or (N, K) for a bias of each image's own, or None;
    y (ceil(H/stride), ceil(W/stride), N, K). `filters` may hold the pair of transformed filters from
    `winograd_filters(w)`, so that they are not computed anew at each call.
    """
    k, _, C, K = w.shape
    if _by_winograd(w, stride, upsample):
        U, UT = winograd_filters(w) if filters is None else filters
        y, cache = winograd_forward(x, U, b, upsample=upsample)
        return y, ("winograd", (cache, UT), b)
    if k == 1 and stride == 1:
        kind, (y, cache) = "pointwise", linear_forward(x, w.reshape(C, K))
    else:
        kind, (y, cache) = "patches", patches_forward(x, w, stride)
    if b is not None:
        y += b
    return y, (kind, cache, b)


def conv_backward(dy, cache, *, params=True):
    """(dx, dw, db) of `conv_forward`; dw and db are None without `params`."""
    kind, cache, b = cache
    if kind == "winograd":
        cache, UT = cache
        dx, dU = winograd_backward(dy, cache, U_transposed=UT, params=params)
        dw = filter_transform_backward(dU) if params else None
    elif kind == "pointwise":
        dx, dw, _ = linear_backward(dy, cache, params=params)
        dw = dw.reshape((1, 1) + dw.shape) if params else None
    else:
        dx, dw = patches_backward(dy, cache, params=params)
    db = None
    if params and b is not None:
        H, W, N, K = dy.shape
        db = dy.reshape(H * W, N * K).sum(axis=0).reshape(N, K)     # rows of N*K sum several times faster than of K
        db = db if b.ndim == 2 else db.sum(axis=0)
    return dx, dw, db


def winograd_filters(w):
    """(U, U^T): the transformed filters for forward, and transposed and contiguous for backward."""
    U = filter_transform(w)
    return U, array_module(w).ascontiguousarray(U.transpose(0, 2, 1))


class Conv2d(Module):
    """2-D convolution with "same" padding k//2.

    Parameters
    ----------
    in_channels, out_channels : int
    kernel_size : int
        Odd.
    stride : int
        Output is ceil(H/stride) x ceil(W/stride).
    rng : numpy.random.Generator
        Draws the initial weight (k, k, in, out), uniform in +-1/sqrt(k*k*in).
    upsample : bool
        Convolve x doubled in size by nearest neighbour, without forming it (3x3, stride 1; see nn.Upsample).
    zero_init : bool
        Start at zero instead, so that the block around the layer starts as the identity.
    """

    def __init__(self, in_channels, out_channels, kernel_size=3, *, stride=1, rng, bias=True, dtype=np.float32,
                 upsample=False, zero_init=False):
        if kernel_size % 2 == 0:
            raise ValueError(f'Conv2d: kernel_size must be odd for "same" padding, got {kernel_size}')
        if upsample and (kernel_size, stride) != (3, 1):
            raise ValueError("Conv2d: upsample goes with kernel_size=3 and stride=1")
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        initial = uniform_fan_in(rng, shape, kernel_size**2 * in_channels, dtype)
        self.weight = Parameter(zeros(shape, dtype) if zero_init else initial)
        self.bias = Parameter(zeros(out_channels, dtype)) if bias else None
        self.stride, self.upsample = stride, upsample
        self._filters_of = self._filters = None

    def forward(self, x, shift=None):
        """y = conv(x) + bias, plus `shift` (N, out_channels) at every pixel of an image."""
        w = self.weight.value
        if x.ndim != 4 or x.shape[3] != w.shape[2]:
            raise ValueError(f"Conv2d: x must be (H, W, N, {w.shape[2]}), got shape {x.shape}")
        b = self.bias.value if self.bias else None
        b = b if shift is None else shift if b is None else b + shift
        return self._remember(*conv_forward(x, w, b, stride=self.stride, upsample=self.upsample,
                                            filters=self._current_filters()))

    def backward(self, dy, *, params=True):
        """dx; with `params`, also the gradients, and `dshift` (N, out_channels) where forward had a shift."""
        dx, dw, db = conv_backward(dy, self._recall(dy), params=params)
        if params:
            self.weight.grad += dw
            self.dshift = db
            if self.bias:
                self.bias.grad += db if db.ndim == 1 else db.sum(axis=0)
        return dx

    def _current_filters(self):
        """Transformed filters, kept as long as the weight's values stay the same.

        A step's micro-batches and a sampler's steps share one weight; comparing it with a copy costs a
        fraction of the transform and can't go stale, whoever wrote to the weight. On a device the comparison
        would wait for the result, so there the transform is simply done again.
        """
        w = self.weight.value
        if not _by_winograd(w, self.stride, self.upsample) or array_module(w) is not np:
            return None
        if self._filters_of is None or not np.array_equal(self._filters_of, w):
            self._filters_of, self._filters = w.copy(), winograd_filters(w)
        return self._filters
