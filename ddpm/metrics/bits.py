"""Nats become bits per dimension, here and nowhere else.

Likelihoods, divergences and bounds are sums of natural logarithms, in nats per example. What a table shows is the
length of the code that the bound promises, in bits, shared out over the dimensions:

    bits/dim = nats / (D log 2)

For 8-bit data scored with `gaussian.discretized_log_likelihood` this is comparable with published figures, and a
uniform guess over 256 levels costs exactly 8.
"""

import math


def bits_per_dim(nats, dims):
    """Negative log likelihood in bits per dimension.

    Parameters
    ----------
    nats : float or array
        Negative log likelihood (or negative bound) per example, nats; negate a log likelihood first.
    dims : int
        Dimensions of one example, H*W*C for an image. ValueError below 1.

    Returns
    -------
    bits/dim, as `nats`.
    """
    if dims < 1:
        raise ValueError(f"dims must be the number of dimensions of one example, at least 1, got {dims!r}")
    return nats / (dims * math.log(2))
