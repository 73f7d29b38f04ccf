"""Dropout: zero each entry with probability p, scale the rest by 1/(1-p), so that the mean stays.

The map is y = x * mask with a mask that does not depend on x; backward is dx = dy * mask.
"""

from nn.backend import array_module
from nn.module import Module


def dropout_mask(shape, p, rng, dtype, xp):
    """Entries 0 with probability p, else 1/(1-p); drawn on the host, moved to x's side."""
    return xp.asarray((rng.random(shape, dtype="float32") >= p).astype(dtype) / (1 - p)).astype(dtype)


class Dropout(Module):
    """Dropout with probability p in training mode, the identity in evaluation mode and for p = 0.

    `rng` is the generator of the masks; assign another to make a step's masks a function of its number.
    `mask` may be set to hold the mask fixed (gradient checks); None draws a new one at each forward.
    """

    def __init__(self, p, *, rng):
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must lie in [0, 1), got {p}")
        self.p, self.rng, self.mask = p, rng, None

    def forward(self, x):
        if not self.training or self.p == 0:
            return self._remember(x, ())
        mask = self.mask
        if mask is None:
            mask = dropout_mask(x.shape, self.p, self.rng, x.dtype, array_module(x))
        return self._remember(x * mask, (mask,))

    def backward(self, dy, *, params=True):
        cache = self._recall(dy)
        return dy * cache[0] if cache else dy
