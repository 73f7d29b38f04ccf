"""A small convolutional classifier, and the loss it is trained with: softmax and cross-entropy in one pair.

    level i:   conv, GroupNorm-SiLU, then a convolution of stride 2 (on every level but the last)
    top:       GroupNorm-SiLU, mean over the pixels -> features (N, F), Linear -> logits (N, classes)

The features are what a picture is about with the places averaged out, and so what two sets of pictures may be compared
in (`ddpm.metrics.frechet_distance`).
"""

import numpy as np

from nn.backend import array_module
from nn.conv import Conv2d
from nn.linear import Linear
from nn.module import Module
from nn.norm import GroupNorm
from nn.resample import Downsample


def softmax_cross_entropy(logits, labels):
    """-log softmax(logits)[label] per example (N,), nats; and the gradient of their sum, softmax - one-hot, (N, K).

    `labels` are (N,) integers in 0..K-1 beside the logits.
    """
    xp, rows = array_module(logits), array_module(logits).arange(len(logits))
    shifted = logits - logits.max(axis=1, keepdims=True)
    e = xp.exp(shifted)
    total = e.sum(axis=1)
    gradient = e / total[:, None]
    gradient[rows, labels] -= 1
    return xp.log(total) - shifted[rows, labels], gradient


class Classifier(Module):
    """Convolutional classifier of images (N, H, W, C).

    Parameters
    ----------
    in_channels, num_classes : int
    widths : sequence of int
        Channels of the levels, each at half the resolution of the one before; the last is the number of features.
    groups : int
        Groups of the normalisations; must divide every width.
    rng : numpy.random.Generator
    dtype : float32 or float64
    """

    def __init__(self, in_channels, num_classes, *, widths=(32, 64, 64), groups=8, rng, dtype=np.float32):
        self.layers = []
        for i, (c_in, c_out) in enumerate(zip((in_channels, *widths), widths, strict=False)):
            self.layers += [Conv2d(c_in, c_out, rng=rng, dtype=dtype), GroupNorm(groups, c_out, dtype=dtype, silu=True)]
            self.layers += [Downsample(c_out, rng=rng, dtype=dtype)] if i < len(widths) - 1 else []
        self.layers += [Conv2d(widths[-1], widths[-1], rng=rng, dtype=dtype),
                        GroupNorm(groups, widths[-1], dtype=dtype, silu=True)]
        self.head = Linear(widths[-1], num_classes, rng=rng, dtype=dtype)
        self.in_channels = in_channels

    def forward(self, x):
        """Logits (N, num_classes) of images (N, H, W, in_channels)."""
        return self._remember(self.head(self.features(x)), self._map_shape)

    def features(self, x):
        """(N, widths[-1]): what the logits are linear in."""
        if x.ndim != 4 or x.shape[3] != self.in_channels:
            raise ValueError(f"Classifier: x must be (N, H, W, {self.in_channels}), got shape {x.shape}")
        h = array_module(x).ascontiguousarray(x.transpose(1, 2, 0, 3))          # pixels first, as all layers take it
        for layer in self.layers:
            h = layer(h)
        self._map_shape = h.shape
        return h.mean(axis=(0, 1))

    def backward(self, dy, *, params=True):
        """dx (N, H, W, in_channels) for dy shaped as the logits."""
        H, W, N, F = self._recall(dy)
        dh = self.head.backward(dy, params=params) / (H * W)
        dh = array_module(dh).broadcast_to(dh, (H, W, N, F))
        for layer in reversed(self.layers):
            dh = layer.backward(dh, params=params)
        return array_module(dh).ascontiguousarray(dh.transpose(2, 0, 1, 3))
