"""Continuous time: the noising chain as a linear stochastic differential equation, its two reverses, and a walker.

Let the T steps of a chain share the time u from 0 to 1, Delta = 1/T each. As T grows, the chain tends to the SDE

    dx = f(u) x du + g(u) dW,      f = -(1 - lam_t)/Delta,   g = sigma_t/sqrt(Delta)         (L19; misprints E03, E04)

with a Brownian motion W, and the SDE has exact chains in it. For any times u < v, with F(u, v) = int_u^v f(s) ds,

    x_v | x_u = N(lam x_u, sigma2),    lam = exp F(u, v),    sigma2 = int_u^v exp(2 F(s, v)) g(s)^2 ds           (L02)

Whatever the data, two other processes have the same law of x at every u, and can be run towards the data, du < 0:

    reverse SDE         dx = (f x - g^2 score) du + g dW      [printed with -f/2 in the place of f: E14]   (L20, U04)
    probability flow    dx = (f x - g^2 score/2) du           [no noise: one path through each point]           (L20)

where score is the gradient of the log-density of x at u. Coefficients are host floats, or arrays of one time per
example, and meet images through `per_example`; x lives in any array library. Flow and likelihood: `ddpm.flow`.
"""

from itertools import pairwise

import numpy as np
from scipy.special import exprel

from ddpm.randomness import normal_like
from ddpm.schedule import NoiseSchedule
from nn.backend import per_example

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
PANELS = np.linspace(0, 1, 17)      # Gauss-Legendre on each: 1e-12 for coefficients that grow by orders of magnitude


class LinearSDE:
    """dx = f(u) x du + g(u) dW on 0 <= u <= 1, from the data at u = 0: linear, and alike in all coordinates (L19).

    Parameters
    ----------
    f, g2 : functions of an array of times (TypeError otherwise)
        Drift coefficient and squared diffusion, per unit of u. ValueError at a use where they aren't finite, or g2 < 0.
    breaks : sequence of float in (0, 1)
        Times at which f or g2 jump; in between they are smooth.
    kernel : function (u, v) -> (log lam, sigma2), optional
        Closed form of `between`, for arrays u <= v without a break between them; quadrature unless given.
    """

    def __init__(self, f, g2, *, breaks=(), kernel=None):
        self._f, self._g2, self._kernel = _checked(f, "f"), _checked(g2, "g2"), kernel or self._quadrature
        self._edges = np.unique([*(PANELS if kernel is None else (0.0, 1.0)), *_check_time(breaks, "breaks")])

    # ---- constructors

    @classmethod
    def variance_preserving(cls, beta_min=0.1, beta_max=20.0):
        """f = -beta/2, g^2 = beta with beta on a line, what `NoiseSchedule.linear(T)` tends to (L03, L19).

        sigma2 = 1 - lam^2 between any two times. ValueError unless beta_min >= 0 and beta_max > 0.
        """
        beta, B = _linear_beta(beta_min, beta_max)
        return cls(lambda u: -beta(u) / 2, beta, kernel=lambda u, v: (-B(u, v) / 2, -np.expm1(-B(u, v))))

    @classmethod
    def sub_variance_preserving(cls, beta_min=0.1, beta_max=20.0):
        """The same with less noise, g^2 = beta (1 - exp(-2 int_0^u beta)): sigma2_bar is the square of VP's."""
        beta, B = _linear_beta(beta_min, beta_max)
        return cls(lambda u: -beta(u) / 2, lambda u: -beta(u) * np.expm1(-2 * B(0, u)),
                   kernel=lambda u, v: (-B(u, v) / 2, np.expm1(-B(u, v)) * np.expm1(-B(0, u) - B(0, v))))

    @classmethod
    def variance_exploding(cls, sigma_min=0.01, sigma_max=50.0):
        """f = 0 and noise that grows geometrically: sigma2_bar = sigma_min^2 ((sigma_max/sigma_min)^(2u) - 1).

        ValueError unless 0 < sigma_min < sigma_max.
        """
        if not 0 < sigma_min < sigma_max < np.inf:
            raise ValueError(f"it takes 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
        rate = 2 * np.log(sigma_max / sigma_min)
        return cls(np.zeros_like, lambda u: rate * sigma_min**2 * np.exp(rate * u), kernel=lambda u, v: (
            np.zeros_like(u), sigma_min**2 * np.exp(rate * u) * np.expm1(rate * (v - u))))

    @classmethod
    def from_schedule(cls, schedule):
        """The SDE with constant f and g on each of a chain's steps whose law at u = t/T is exactly that of x_t (L19).

        On a step, lam = exp(f Delta) and sigma2 = g^2 (lam^2 - 1)/(2 f), which is g^2 Delta where f = 0. At a joint,
        f and g are those of the step that follows.
        """
        T, joints = schedule.T, _grid(schedule.T)
        f = T * np.log(schedule.lam[1:])
        g2 = T * schedule.sigma2[1:] / exprel(2 * f / T)                            # exprel(z) = (e^z - 1)/z

        def step(u):
            return np.searchsorted(joints[1:-1], u, side="right")

        def kernel(u, v):
            k = step((u + v) / 2)
            return f[k] * (v - u), g2[k] * (v - u) * exprel(2 * f[k] * (v - u))
        return cls(lambda u: f[step(u)], lambda u: g2[step(u)], breaks=joints, kernel=kernel)

    # ---- coefficients and kernels: floats, or arrays shaped as the times

    def f(self, u):
        """Drift coefficient at u (L19)."""
        return _scalar_or_array(self._f(_check_time(u, "u")))

    def g2(self, u):
        """Squared diffusion at u (L19)."""
        return _scalar_or_array(self._g2(_check_time(u, "u")))

    def g(self, u):
        """Diffusion at u, >= 0 (L19)."""
        return self.g2(u)**0.5

    def moments(self, u):
        """(lam_bar, sigma2_bar) of x_u | x_0 = N(lam_bar x_0, sigma2_bar) (L02)."""
        return self.between(0.0, u)

    def between(self, u, v):
        """(lam, sigma2) of x_v | x_u = N(lam x_u, sigma2); ValueError unless 0 <= u <= v <= 1 (L02)."""
        u, v = np.broadcast_arrays(_check_time(u, "u"), _check_time(v, "v"))
        if (u > v).any():
            raise ValueError("u must not be later than v")
        first, last = np.searchsorted(self._edges, u.min(), side="right"), np.searchsorted(self._edges, v.max())
        edges = self._edges[max(0, first - 1):max(first, last) + 1].reshape(-1, *(1,) * u.ndim)
        log_lam, sigma2 = self._kernel(np.clip(edges[:-1], u, v), np.clip(edges[1:], u, v))
        later = np.cumsum(log_lam[::-1], axis=0)[::-1] - log_lam                    # contracts a panel's noise up to v
        return _scalar_or_array(np.exp(log_lam.sum(axis=0))), _scalar_or_array((np.exp(2 * later) * sigma2).sum(axis=0))

    def _quadrature(self, u, v):
        """(log lam, sigma2) for arrays u <= v: F(s, v) inside, the noise that is left of s at v outside."""
        def integral(function, u, v):
            half = ((v - u) / 2)[..., None]
            return (half * function(u[..., None] + half * (1 + NODES))) @ WEIGHTS

        def noise(s):
            return np.exp(2 * integral(self._f, s, np.broadcast_to(v[..., None], s.shape))) * self._g2(s)
        return integral(self._f, u, v), integral(noise, u, v)

    # ---- chains: `times` are increasing floats in [0, 1], or an int T for T equal steps

    def schedule(self, times):
        """The NoiseSchedule with the exact kernels between `times`; `schedule([0, u])` is one jump to u (L19).

        ValueError where g is 0 throughout a step.
        """
        times = _grid(times)
        lam, sigma2 = self.between(times[:-1], times[1:])
        if not (sigma2 > 0).all():
            raise ValueError("g2 must be positive somewhere within each step: a chain's steps have noise")
        return NoiseSchedule(lam, sigma2)

    def euler_schedule(self, times):
        """The NoiseSchedule that Euler-Maruyama makes of the SDE: lam = 1 + f h, sigma2 = g^2 h (L19).

        The inverse of `first_order` for T equal steps. ValueError where 1 + f h <= 0, or g = 0 at a step's start.
        """
        times = _grid(times)
        u, h = times[:-1], np.diff(times)
        lam, sigma2 = 1 + self.f(u) * h, self.g2(u) * h
        if not ((lam > 0) & (sigma2 > 0)).all():
            raise ValueError("each step must have 1 + f h > 0, and g > 0 at its start: take shorter steps, or schedule")
        return NoiseSchedule(lam, sigma2)

    def noised(self, world, u):
        """The law of x_u for a world with `noised(t, schedule)`, e.g. a GaussianMixture; the world itself at u = 0."""
        return world if u == 0 else world.noised(1, self.schedule([0.0, u]))

    # ---- drifts, shaped as x; u is a float, or an (N,) host array

    def forward_drift(self, x, u):
        """f x: with the diffusion g, the data's way into noise (L19)."""
        return per_example(self.f(u), x) * x

    def reverse_drift(self, x, u, score):
        """f x - g^2 score: with the diffusion g and du < 0, the way back (L20, U04; E14). `score` is shaped as x."""
        return self.forward_drift(x, u) - per_example(self.g2(u), x) * score

    def flow_velocity(self, x, u, score):
        """f x - g^2 score/2: either way, without noise (L20). `score` is shaped as x."""
        return self.forward_drift(x, u) - per_example(self.g2(u) / 2, x) * score


def first_order(schedule):
    """(f, g) read off a chain's steps, -(1 - lam)/Delta and sigma/sqrt(Delta): the SDE's to O(Delta) (L19; E03, E04).

    Two (T+1,) arrays indexed by t as the schedule's own; entry 0 is 0. `LinearSDE.from_schedule` is exact.
    """
    delta = 1 / schedule.T
    return -(1 - schedule.lam) / delta, np.sqrt(schedule.sigma2 / delta)


def euler_maruyama(x, drift, diffusion, times, rng, *, callback=None):
    """Walk x <- x + drift (v - u) + diffusion sqrt|v - u| n from times[0] to times[-1], either way in time (L19, L20).

    `drift(x, u)` is shaped as x (N, ...); `diffusion(u)` is a float, or `diffusion` is None for no noise (Euler's
    method). `times` in [0, 1] all rise or all fall, ValueError otherwise. `callback(x, u)` sees the start and each
    step. Returns x at times[-1], in the library and dtype of x; the law's error is of first order in the steps.
    """
    times = _check_time(times, "times")
    if times.ndim != 1 or times.size < 2 or not ((np.diff(times) > 0).all() or (np.diff(times) < 0).all()):
        raise ValueError("times must be at least two floats, all rising or all falling")
    callback = callback or (lambda x, u: None)
    callback(x, float(times[0]))
    for u, v in pairwise(times.tolist()):
        mean = x + (v - u) * drift(x, u)
        x = mean if diffusion is None else mean + float(diffusion(u)) * abs(v - u)**0.5 * normal_like(x, rng)
        callback(x, v)
    return x


def _grid(times):
    """T + 1 equal times for an int T, else the times, checked."""
    if isinstance(times, (int, np.integer)) and times >= 1:
        return np.arange(times + 1) / times
    times = _check_time(times, "times")
    if times.ndim != 1 or times.size < 2 or not (np.diff(times) > 0).all():
        raise ValueError("times must be a number of steps >= 1, or at least two increasing floats")
    return times


def _check_time(u, name):
    u = np.asarray(u, np.float64)
    if not ((u >= 0) & (u <= 1)).all():
        raise ValueError(f"{name} must lie in [0, 1]: time is t/T here")
    return u


def _checked(function, name):
    """The function with float64 values, shaped as its argument, finite and for g2 not negative."""
    if not callable(function):
        raise TypeError(f"{name} must be a function of the time u")

    def values(u):
        values = np.broadcast_to(np.asarray(function(u), np.float64), u.shape)
        if not np.isfinite(values).all() or (name == "g2" and (values < 0).any()):
            raise ValueError(f"{name}(u) must be finite{' and >= 0' * (name == 'g2')} everywhere in [0, 1]")
        return values
    return values


def _linear_beta(beta_min, beta_max):
    """beta(u) on a line, and its integral from u to v without a difference of large numbers."""
    if not (0 <= beta_min < np.inf and 0 < beta_max < np.inf):
        raise ValueError(f"it takes beta_min >= 0 and beta_max > 0, not {beta_min} and {beta_max}")
    slope = beta_max - beta_min
    return lambda u: beta_min + slope * u, lambda u, v: (v - u) * (beta_min + slope * (u + v) / 2)


def _scalar_or_array(v):
    return float(v) if np.ndim(v) == 0 else v
