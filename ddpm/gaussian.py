"""Gaussians, elementwise and in nats: densities, divergences, the likelihood of a grey level, and their gradients.

    log N(x; m, v)  = -1/2 (log 2 pi v + (x - m)^2/v)
    entropy(v)      =  1/2 (log 2 pi v + 1)
    KL(q || p)      =  1/2 (log v_p/v_q + (v_q + (m_q - m_p)^2)/v_p - 1)
    cross entropy   =  -E_q log p = -log N(m_q; m_p, v_p) + v_q/(2 v_p)                                           (L11)

so that KL = cross entropy - entropy. A pixel is one of finitely many levels, w apart in [-1, 1]; its likelihood is the
mass of its bin, and the outermost bins reach to infinity, so that the levels share exactly one:

    log P(x) = log(Phi(z+) - Phi(z-)),   z+- = (x +- w/2 - m)/sqrt(v)

A bin far in the tail has a mass below the smallest float, but its logarithm is an ordinary number. Mirror the bin to
where the mean lies above it, lo < hi with lo + hi <= 0; then Phi(lo) < Phi(hi) are both small numbers with good
logarithms, and with d = log Phi(hi) - log Phi(lo)

    log P = log Phi(hi) + log(1 - e^-d)

has neither overflow nor cancellation. Arrays and scalars broadcast; a float32 array stays float32.
"""

import math

import numpy as np

from nn.backend import array_module, special_module

FAR = 1e30
"""The far edge of an open bin, in pixel units: beyond any mean, while its square is still a float64."""


# ---- the normal density

def log_normal(x, mean, var):
    """log N(x; mean, var), elementwise, nats. ValueError for a scalar var <= 0."""
    xp, (x, mean, var) = _operands(x, mean, var)
    _require_positive(var, "var")
    return -0.5 * (_log(2 * math.pi * var, xp) + (x - mean)**2 / var)


def log_normal_gradients(x, mean, var):
    """(d_mean, d_var) of `log_normal`, elementwise. ValueError for a scalar var <= 0."""
    _, (x, mean, var) = _operands(x, mean, var)
    _require_positive(var, "var")
    d_mean = (x - mean) / var
    return d_mean, 0.5 * (d_mean**2 - 1 / var)


def entropy(var):
    """-E log N of a Gaussian of variance `var`, elementwise, nats: negative below var = 1/(2 pi e)."""
    xp, (var,) = _operands(var)
    _require_positive(var, "var")
    return 0.5 * (_log(2 * math.pi * var, xp) + 1)


# ---- two Gaussians

def kl(mean_q, var_q, mean_p, var_p):
    """KL(q || p), elementwise, nats: 0 where q = p, infinite where var_q = 0 (E10).

    ValueError for a scalar var_p <= 0.
    """
    xp, (mean_q, var_q, mean_p, var_p) = _operands(mean_q, var_q, mean_p, var_p)
    _require_positive(var_p, "var_p")
    ratio = var_q / var_p                               # one logarithm near 0 instead of a difference of large ones
    return 0.5 * (ratio - 1 - _log(ratio, xp) + (mean_q - mean_p)**2 / var_p)


def kl_gradients(mean_q, var_q, mean_p, var_p):
    """(d_mean_p, d_var_p) of `kl`, elementwise; finite at var_q = 0 too. ValueError for a scalar var_p <= 0."""
    _, (mean_q, var_q, mean_p, var_p) = _operands(mean_q, var_q, mean_p, var_p)
    _require_positive(var_p, "var_p")
    d_mean_p = (mean_p - mean_q) / var_p
    return d_mean_p, 0.5 * ((1 - var_q / var_p) / var_p - d_mean_p**2)


def cross_entropy(mean_q, var_q, mean_p, var_p):
    """-E_q log p, elementwise, nats (L11 is its negative): finite at var_q = 0, where it is -log p(mean_q).

    ValueError for a scalar var_p <= 0.
    """
    _, (mean_q, var_q, mean_p, var_p) = _operands(mean_q, var_q, mean_p, var_p)
    return -log_normal(mean_q, mean_p, var_p) + 0.5 * (var_q / var_p)


# ---- the likelihood of a level

def discretized_log_likelihood(x, mean, var, bin_width=2 / 255):
    """log of the mass that N(mean, var) gives to the bin of level x, elementwise, nats.

    Parameters
    ----------
    x : array
        Levels in [-1, 1], `bin_width` apart (pixel scale).
    mean, var : array or float
        Computed with in float64, whatever they come in: a bin is narrow beside the numbers that bound it.
    bin_width : float
        2/255 for 8 bits. The bins of -1 and 1 are open, so the masses of all levels sum to one.

    Returns
    -------
    array in the dtype of the arguments: finite for a mean any number of standard deviations away.
    ValueError for a scalar var <= 0 or a bin_width outside (0, 2].
    """
    xp, dtype, lo, hi, _, _ = _mirrored_bin(x, mean, var, bin_width)
    log_ndtr = special_module(hi).log_ndtr
    log_hi = log_ndtr(hi)
    return (log_hi + xp.log(-xp.expm1(log_ndtr(lo) - log_hi))).astype(dtype)


def discretized_log_likelihood_gradients(x, mean, var, bin_width=2 / 255):
    """(d_mean, d_var) of `discretized_log_likelihood`, elementwise; multiply d_var by var for the log-variance's.

    With phi the normal density, d_mean = -(phi(z+) - phi(z-))/(P sqrt(v)), d_var = -(z+ phi(z+) - z- phi(z-))/(2 P v).
    Everything is taken relative to phi(hi), and phi(hi)/Phi(hi) = sqrt(2/pi)/erfcx(-hi/sqrt 2) holds in any tail.
    """
    xp, dtype, lo, hi, std, mirror = _mirrored_bin(x, mean, var, bin_width)
    special = special_module(hi)
    share = -xp.expm1(special.log_ndtr(lo) - special.log_ndtr(hi))                      # P/Phi(hi)
    phi_hi = math.sqrt(2 / math.pi) / special.erfcx(hi * -math.sqrt(0.5)) / share       # phi(hi)/P
    log_ratio = 0.5 * (hi - lo) * (hi + lo)                                             # log phi(lo)/phi(hi) <= 0
    drop = -xp.expm1(log_ratio)                                                         # 1 - phi(lo)/phi(hi)
    d_mean = -mirror * phi_hi * drop / std
    d_var = -0.5 * phi_hi * (hi * drop + (hi - lo) * xp.exp(log_ratio)) / std**2
    return d_mean.astype(dtype), d_var.astype(dtype)


def _mirrored_bin(x, mean, var, bin_width):
    """The bin of x in standard deviations from the mean, mirrored so that lo + hi <= 0; float64.

    Returns xp, the dtype of the results, lo, hi, the standard deviation, and mirror = -1 where mirrored, else 1.
    """
    if not 0 < bin_width <= 2:
        raise ValueError(f"bin_width must lie in (0, 2], the width of the pixel scale, got {bin_width!r}")
    xp, (x, mean, var) = _operands(x, mean, var)
    _require_positive(var, "var")
    dtype = xp.result_type(x, mean, var)
    x, mean, std = (xp.asarray(v, dtype=np.float64) for v in (x, mean, var))
    std = xp.sqrt(std)
    lower, upper = x - bin_width / 2, x + bin_width / 2
    lower = (xp.where(lower < -1, -FAR, lower) - mean) / std
    upper = (xp.where(upper > 1, FAR, upper) - mean) / std
    mirror = xp.where(lower + upper > 0, -1.0, 1.0)
    lower, upper = mirror * lower, mirror * upper
    return xp, dtype, xp.minimum(lower, upper), xp.maximum(lower, upper), std, mirror


# ---- scalars among arrays

def _operands(*values):
    """The array library, and the values with host scalars as Python floats, which leave a float32 array float32."""
    values = [float(v) if isinstance(v, (int, float, np.generic)) else v for v in values]
    return array_module(*values), values


def _log(v, xp):
    return float(np.log(v)) if isinstance(v, float) else xp.log(v)


def _require_positive(var, name):
    if isinstance(var, float) and not var > 0:
        raise ValueError(f"{name} must be > 0, got {var}; a step to s = 0 has none: use a decoder likelihood")
