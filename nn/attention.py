"""Multi-head self-attention over the pixels of an (H, W, N, C) map.

Per image and head, with L = H W pixels and d = C/heads numbers per pixel,

    Q, K, V = x W_qkv + b_qkv     S = Q K^T / sqrt(d)     P = softmax(S)     O = P V     y = O W_out + b_out

Backward, in a mirror: dO from the output projection, then

    dV = P^T dO    dP = dO V^T    dS = softmax'(dP, P)    dQ = dS K / sqrt(d)    dK = dS^T Q / sqrt(d)
"""

import numpy as np

from nn.activation import softmax_backward, softmax_forward
from nn.backend import array_module
from nn.linear import Linear
from nn.module import Module


def attention_forward(qkv, heads):
    """O (L, N, C) from qkv (L, N, 3C); the cache is (Q, K, V, P), each (N, heads, L, .)."""
    L, N, C3 = qkv.shape
    q, k, v = qkv.reshape(L, N, 3, heads, C3 // (3 * heads)).transpose(2, 1, 3, 0, 4)
    scale = q.shape[3]**-0.5
    p, _ = softmax_forward((q * scale) @ k.swapaxes(2, 3))
    o = (p @ v).transpose(2, 0, 1, 3).reshape(L, N, C3 // 3)
    return o, (q, k, v, p)


def attention_backward(do, cache):
    """dqkv (L, N, 3C) from dO (L, N, C)."""
    q, k, v, p = cache
    N, heads, L, d = q.shape
    do = do.reshape(L, N, heads, d).transpose(1, 2, 0, 3)
    ds = softmax_backward(do @ v.swapaxes(2, 3), p)
    ds *= d**-0.5
    dqkv = array_module(do).empty((L, N, 3, heads, d), do.dtype)
    dq, dk, dv = dqkv.transpose(2, 1, 3, 0, 4)
    dq[...] = ds @ k
    dk[...] = ds.swapaxes(2, 3) @ q
    dv[...] = p.swapaxes(2, 3) @ do
    return dqkv.reshape(L, N, 3 * heads * d)


class SelfAttention(Module):
    """Self-attention of all pixels of an image, with the qkv and the output projections; no norm, no skip.

    Parameters
    ----------
    channels, heads : int
        `channels` must be a multiple of `heads` (ValueError).
    rng : numpy.random.Generator
    """

    def __init__(self, channels, heads, *, rng, dtype=np.float32):
        if channels % heads:
            raise ValueError(f"SelfAttention: {channels} channels do not divide into {heads} heads")
        self.heads = heads
        self.qkv = Linear(channels, 3 * channels, rng=rng, dtype=dtype)
        self.out = Linear(channels, channels, rng=rng, dtype=dtype)

    def forward(self, x):
        H, W, N, C = x.shape
        o, cache = attention_forward(self.qkv(x.reshape(H * W, N, C)), self.heads)
        return self._remember(self.out(o).reshape(x.shape), cache)

    def backward(self, dy, *, params=True):
        H, W, N, C = dy.shape
        cache = self._recall(dy)
        do = self.out.backward(dy.reshape(H * W, N, C), params=params)
        return self.qkv.backward(attention_backward(do, cache), params=params).reshape(dy.shape)
