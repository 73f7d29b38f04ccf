"""Adam and gradient clipping: a few vector operations on the flat buffers.

An update works on a `span` of the buffers, so that ranks that share a network can each take their own part.
"""

import math

from nn.backend import array_module, row_blocks

ALL = slice(None)


class Adam:
    """Adam, with decoupled weight decay (AdamW) when `weight_decay` is not 0.

    m and v average the gradient and its square; dividing by 1 - beta^k corrects for their start at zero:

        m <- b1 m + (1-b1) g      v <- b2 v + (1-b2) g^2
        theta <- theta - lr [ (m / (1-b1^k)) / (sqrt(v / (1-b2^k)) + eps) + weight_decay theta ]

    Parameters
    ----------
    module : Module
    lr : float
        May be changed between steps.
    state : pair of arrays, optional
        Buffers for m and v shaped as `module.flat_parameters` (shared memory, say), zeroed here.
    """

    def __init__(self, module, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, state=None):
        if not (lr >= 0 and all(0 <= b < 1 for b in betas) and eps > 0 and weight_decay >= 0):
            raise ValueError("Adam: need lr >= 0, betas in [0, 1), eps > 0 and weight_decay >= 0")
        xp = array_module(module.flat_parameters)
        self.module, self.lr, self.betas, self.eps, self.weight_decay = module, lr, betas, eps, weight_decay
        self.m, self.v = state or (xp.empty_like(module.flat_parameters), xp.empty_like(module.flat_parameters))
        self.m[...] = 0
        self.v[...] = 0
        self.steps = 0

    def step(self, span=ALL):
        """One update of theta[span] from the gradients there; without temporaries of the span's size."""
        self.steps += 1
        theta, g, m, v = (a[span] for a in (self.module.flat_parameters, self.module.flat_gradients, self.m, self.v))
        (b1, b2), k, xp = self.betas, self.steps, array_module(self.m)
        rate, correction = self.lr / (1 - b1**k), 1 / math.sqrt(1 - b2**k)
        for block in row_blocks(theta.size, theta.itemsize, xp):
            th, gb, mb, vb = theta[block], g[block], m[block], v[block]
            mb += (1 - b1) * (gb - mb)
            vb += (1 - b2) * (gb * gb - vb)
            scale = xp.sqrt(vb)
            scale *= correction
            scale += self.eps
            if self.weight_decay:
                th *= 1 - self.lr * self.weight_decay
            xp.divide(mb, scale, out=scale)
            scale *= rate
            th -= scale


def squared_norm(g):
    """Sum of squares of a flat vector, as an array of its library without waiting for it."""
    return array_module(g).dot(g, g)


def clip_factor(squared, max_norm):
    """What to multiply gradients of that squared norm with, so that their norm is at most `max_norm`."""
    return array_module(squared).minimum(1.0, max_norm / (squared + 1e-12)**0.5)


def clip_grad_norm(module, max_norm):
    """Scale all gradients together so that their Euclidean norm is at most `max_norm`; returns the norm before.

    The norm comes back in the gradients' own library, so that a device is not waited for.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_grad_norm: max_norm must be > 0, got {max_norm}")
    g = module.flat_gradients
    squared = squared_norm(g)
    g *= clip_factor(squared, max_norm).astype(g.dtype)
    return squared**0.5
