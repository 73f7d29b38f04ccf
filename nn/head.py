"""A second output for a trained U-Net: GroupNorm-SiLU-conv on the features that its own output is made of.

    U-Net:   ... -> features (H, W, N, C) -> norm, SiLU, conv -> output
                             |
    head:                    +------------> norm, SiLU, conv -> another output

Nothing goes back into the U-Net: only the head learns. What it adds to a pass is one convolution at full resolution,
out of some thirty.
"""

import numpy as np

from nn.backend import array_module
from nn.conv import Conv2d
from nn.module import Module
from nn.norm import GroupNorm


class Head(Module):
    """Output of `out_channels` numbers for each pixel, from a U-Net's `features`; it starts at zero.

    Parameters
    ----------
    channels : int
        Of the features: the U-Net's at its first level.
    out_channels, groups : int
    rng : numpy.random.Generator
    dtype : float32 or float64
    """

    def __init__(self, channels, out_channels, *, groups=8, rng, dtype=np.float32):
        self.norm = GroupNorm(groups, channels, dtype=dtype, silu=True)
        self.output = Conv2d(channels, out_channels, rng=rng, dtype=dtype, zero_init=True)

    def forward(self, features):
        """Images (N, H, W, out_channels) from features (H, W, N, C), as all layers take them."""
        h = self.output(self.norm(features))
        return self._remember(array_module(h).ascontiguousarray(h.transpose(2, 0, 1, 3)), ())

    def backward(self, dy, *, params=True):
        """The gradient of the features (H, W, N, C), for dy (N, H, W, out_channels)."""
        self._recall(dy)
        dh = array_module(dy).ascontiguousarray(dy.transpose(1, 2, 0, 3))
        return self.norm.backward(self.output.backward(dh, params=params), params=params)
