"""SiLU, silu(x) = x sigmoid(x), and softmax.

With h = x/2 and t = tanh(h) + 1 = 2 sigmoid(x), the sigmoid needs no exponential that could overflow, and NumPy's
vectorised tanh is several times faster than its exp-and-divide:

    silu(x)  = h t
    silu'(x) = sigmoid + x sigmoid (1 - sigmoid) = t (1/2 + h (1 - t/2))
"""

from nn.backend import array_module, row_blocks
from nn.module import Module


def silu_of_half(h, out=None):
    """silu(2 h): one block's chain of passes, for callers that have halved already."""
    xp = array_module(h)
    t = xp.tanh(h)
    t += 1
    return xp.multiply(h, t, out=out)


def silu_slope_of_half(h):
    """silu'(2 h), elementwise."""
    t = array_module(h).tanh(h)
    t += 1
    slope = 1 - 0.5 * t
    slope *= h
    slope += 0.5
    slope *= t
    return slope


def silu_forward(x):
    """silu(x), any shape; the cache is x itself."""
    y = array_module(x).empty_like(x)
    for rows in _blocks(x):
        silu_of_half(0.5 * x[rows], out=y[rows])
    return y, x


def silu_backward(dy, x):
    """dx = dy silu'(x); the sigmoid is computed anew, which costs less than having kept it."""
    dx = array_module(dy).empty_like(x)
    for rows in _blocks(x):
        dx[rows] = silu_slope_of_half(0.5 * x[rows])
        dx[rows] *= dy[rows]
    return dx


def softmax_forward(x):
    """softmax over the last axis, shifted by the maximum; the cache is the result."""
    y = x - x.max(axis=-1, keepdims=True)
    array_module(x).exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y, y


def softmax_backward(dy, y):
    """dx_i = y_i (dy_i - sum_j dy_j y_j): from dy_i/dx_j = y_i (delta_ij - y_j)."""
    dx = dy - (dy * y).sum(axis=-1, keepdims=True)
    dx *= y
    return dx


def _blocks(x):
    return row_blocks(x.shape[0], x.nbytes // max(1, x.shape[0]), array_module(x)) if x.ndim else [...]


class SiLU(Module):
    """x sigmoid(x), elementwise."""

    def forward(self, x):
        return self._remember(*silu_forward(x))

    def backward(self, dy, *, params=True):
        return silu_backward(dy, self._recall(dy))
