"""A small network for points: Linear-SiLU layers that see the time beside the point."""

import numpy as np

from nn.activation import SiLU
from nn.backend import array_module
from nn.embedding import embed_times
from nn.linear import Linear
from nn.module import Module


class MLP(Module):
    """Multilayer perceptron of (x, t) for worlds of a few dimensions.

    Parameters
    ----------
    in_dim, out_dim : int
    hidden : sequence of int
        Widths of the hidden layers, each followed by SiLU.
    time_dim : int
        Width of the sinusoidal time embedding that is concatenated to x.
    rng : numpy.random.Generator
    dtype : float32 or float64
    """

    def __init__(self, in_dim, out_dim, *, hidden=(128, 128, 128), time_dim=64, rng, dtype=np.float32):
        widths = (in_dim + time_dim, *hidden)
        self.layers = [layer for a, b in zip(widths, widths[1:], strict=False)
                       for layer in (Linear(a, b, rng=rng, dtype=dtype), SiLU())]
        self.layers.append(Linear(widths[-1], out_dim, rng=rng, dtype=dtype))
        self.in_dim, self.time_dim = in_dim, time_dim

    def forward(self, x, t):
        """Predict (..., out_dim) from points x (..., in_dim), the first axis being examples, at times t (int or (N,)).

        Images (N, H, W, in_dim) are taken as they are: the same network at every pixel.
        """
        if x.shape[-1] != self.in_dim:
            raise ValueError(f"MLP: the last axis of x must be {self.in_dim}, got shape {x.shape}")
        xp, N = array_module(x), x.shape[0]
        waves = embed_times(t, self.time_dim, N, xp, x.dtype).reshape((N,) + (1,) * (x.ndim - 2) + (self.time_dim,))
        h = xp.concatenate([x, xp.broadcast_to(waves, (N,) + x.shape[1:-1] + (self.time_dim,))], axis=-1)
        for layer in self.layers:
            h = layer(h)
        return self._remember(h, ())

    def backward(self, dy, *, params=True):
        self._recall(dy)
        for layer in reversed(self.layers):
            dy = layer.backward(dy, params=params)
        return array_module(dy).ascontiguousarray(dy[..., :self.in_dim])
