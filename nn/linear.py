"""Linear layer: y = x W + b over the last axis.

With the sum written out, y_nk = sum_c x_nc W_ck + b_k, each derivative is read off:
dx_nc = sum_k dy_nk W_ck, dW_ck = sum_n x_nc dy_nk, db_k = sum_n dy_nk.
"""

import numpy as np

from nn.module import Module, Parameter, uniform_fan_in, zeros


def linear_forward(x, w, b=None):
    """y (..., K) = x (..., C) @ w (C, K) + b (K,)."""
    y = x.reshape(-1, w.shape[0]) @ w
    if b is not None:
        y += b
    return y.reshape(x.shape[:-1] + w.shape[1:]), (x, w)


def linear_backward(dy, cache, *, params=True):
    """(dx, dw, db); dw and db are None without `params`."""
    x, w = cache
    dy = dy.reshape(-1, w.shape[1])
    dx = (dy @ w.T).reshape(x.shape)
    if not params:
        return dx, None, None
    return dx, x.reshape(-1, w.shape[0]).T @ dy, dy.sum(axis=0)


class Linear(Module):
    """y = x W + b on the last axis.

    Parameters
    ----------
    in_features, out_features : int
    rng : numpy.random.Generator
        Draws the initial weight, uniform in +-1/sqrt(in_features); the bias starts at zero.
    bias : bool
    dtype : float32 or float64
    """

    def __init__(self, in_features, out_features, *, rng, bias=True, dtype=np.float32):
        self.weight = Parameter(uniform_fan_in(rng, (in_features, out_features), in_features, dtype))
        self.bias = Parameter(zeros(out_features, dtype)) if bias else None

    def forward(self, x):
        if x.shape[-1] != self.weight.value.shape[0]:
            raise ValueError(f"Linear: the last axis of x is {x.shape[-1]}, "
                             f"but the layer takes {self.weight.value.shape[0]} features")
        return self._remember(*linear_forward(x, self.weight.value, self.bias.value if self.bias else None))

    def backward(self, dy, *, params=True):
        dx, dw, db = linear_backward(dy, self._recall(dy), params=params)
        if params:
            self.weight.grad += dw
            if self.bias:
                self.bias.grad += db
        return dx
