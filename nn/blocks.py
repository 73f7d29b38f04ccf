"""What the U-Net is made of: the time embedding, the residual block, the attention block, and a sequence of them."""

import numpy as np

from nn.activation import SiLU
from nn.attention import SelfAttention
from nn.conv import Conv2d
from nn.dropout import Dropout
from nn.embedding import embed_times
from nn.linear import Linear
from nn.module import Module
from nn.norm import GroupNorm


class TimeEmbedding(Module):
    """Sinusoids of t, then Linear-SiLU-Linear: (N,) -> (N, out_dim)."""

    def __init__(self, dim, out_dim, *, rng, dtype=np.float32):
        self.linear1 = Linear(dim, out_dim, rng=rng, dtype=dtype)
        self.silu = SiLU()
        self.linear2 = Linear(out_dim, out_dim, rng=rng, dtype=dtype)
        self.dim, self.dtype = dim, dtype

    def forward(self, t, N, xp):
        """t is an int or (N,) integers, on the host or beside the images in `xp`."""
        return self.linear2(self.silu(self.linear1(embed_times(t, self.dim, N, xp, self.dtype))))

    def backward(self, dy, *, params=True):
        return self.linear1.backward(self.silu.backward(self.linear2.backward(dy, params=params)), params=params)


class ResidualBlock(Module):
    """y = skip(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + project(embedded))))).

    conv2 starts at zero, so the block starts as its skip: the identity, or a 1x1 convolution where channels change.
    """

    def __init__(self, in_channels, out_channels, time_dim, *, groups, dropout, rng, dtype=np.float32):
        self.norm1 = GroupNorm(groups, in_channels, dtype=dtype, silu=True)
        self.conv1 = Conv2d(in_channels, out_channels, rng=rng, dtype=dtype)
        self.project = Linear(time_dim, out_channels, rng=rng, dtype=dtype)
        self.norm2 = GroupNorm(groups, out_channels, dtype=dtype, silu=True)
        self.dropout = Dropout(dropout, rng=rng)
        self.conv2 = Conv2d(out_channels, out_channels, rng=rng, dtype=dtype, zero_init=True)
        self.skip = Conv2d(in_channels, out_channels, 1, rng=rng, dtype=dtype) if in_channels != out_channels else None

    def forward(self, x, embedded):
        """x (H, W, N, C) and embedded (N, time_dim), already through its SiLU."""
        h = self.conv1(self.norm1(x), shift=self.project(embedded))
        h = self.conv2(self.dropout(self.norm2(h)))
        h += self.skip(x) if self.skip else x
        return h

    def backward(self, dy, dembedded, *, params=True):
        """dx; with `params`, adds to the gradients and to `dembedded`."""
        dh = self.norm2.backward(self.dropout.backward(self.conv2.backward(dy, params=params)), params=params)
        dx = self.norm1.backward(self.conv1.backward(dh, params=params), params=params)
        if params:
            dembedded += self.project.backward(self.conv1.dshift)
        dx += self.skip.backward(dy, params=params) if self.skip else dy
        return dx


class AttentionBlock(Module):
    """y = x + attention(norm(x))."""

    def __init__(self, channels, heads, *, groups, rng, dtype=np.float32):
        self.norm = GroupNorm(groups, channels, dtype=dtype)
        self.attention = SelfAttention(channels, heads, rng=rng, dtype=dtype)

    def forward(self, x):
        return x + self.attention(self.norm(x))

    def backward(self, dy, *, params=True):
        return dy + self.norm.backward(self.attention.backward(dy, params=params), params=params)


class Stage(Module):
    """Layers in a row; residual blocks among them also take the embedding."""

    def __init__(self, layers):
        self.layers = layers

    def forward(self, x, embedded):
        for layer in self.layers:
            x = layer(x, embedded) if isinstance(layer, ResidualBlock) else layer(x)
        return x

    def backward(self, dy, dembedded, *, params=True):
        for layer in reversed(self.layers):
            if isinstance(layer, ResidualBlock):
                dy = layer.backward(dy, dembedded, params=params)
            else:
                dy = layer.backward(dy, params=params)
        return dy
