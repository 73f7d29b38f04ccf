"""Halving and doubling a map's resolution, each with a convolution."""

import numpy as np

from nn.conv import Conv2d


class Downsample(Conv2d):
    """3x3 convolution with stride 2: (H, W, N, C) -> (ceil(H/2), ceil(W/2), N, C)."""

    def __init__(self, channels, *, rng, dtype=np.float32):
        super().__init__(channels, channels, 3, stride=2, rng=rng, dtype=dtype)


class Upsample(Conv2d):
    """Nearest-neighbour doubling, then a 3x3 convolution: (H, W, N, C) -> (2H, 2W, N, C).

    The doubled map is never formed: duplication is folded into Winograd's input transform (nn/winograd.py).
    """

    def __init__(self, channels, *, rng, dtype=np.float32):
        super().__init__(channels, channels, 3, rng=rng, dtype=dtype, upsample=True)
