"""The probability flow: a way from data to noise without noise, and the exact likelihood that comes with it.

The flow dx/du = v(x, u) = f x - g^2 score/2 carries the law of x_u along (L20), one path through each point. Along a
path a density changes only by being stretched,

    d/du log p_u(x(u)) = -div v(x(u), u),      div v = D f - g^2/2 tr(Hessian of log p_u)

so that the density of x_0 is that of the point x_1 where its path ends, times all the stretching on the way:

    log p(x_0) = log p_1(x_1) + int_0^1 div v(x(u), u) du

No bound, and no samples: only the error of the solver, of the score and of p_1. The trace is exact where the Hessian is
at hand. Where only products with it are, as for a network with a backward pass, Hutchinson's estimate replaces it:

    tr A = E[z^T A z]   for any z with E[z z^T] = I

One z, fixed along the whole path, estimates the whole integral, and the spread over several z is its standard error.
Its variance is 2 sum_{i != j} A_ij^2 for signs (Rademacher); for normal numbers the diagonal counts as well.

The solver is SciPy's DOP853 (order 8, step by tolerance), whose state is a NumPy array: arrays of a device are moved by
the caller, with to_host and to_device.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import solve_ivp

from ddpm import gaussian
from ddpm.covariance.hutchinson import signs_like
from ddpm.randomness import normal_like
from nn.backend import array_module


def solve_flow(x, score, sde, u0, u1, *, rtol=1e-8, atol=1e-10, times=None):
    """Carry points from time u0 to u1 along the probability flow, either way (L20).

    Parameters
    ----------
    x : NumPy array (N, ...), at u0
        On the host: TypeError for a device's array.
    score : function (x, u) -> array shaped as x
        Called with float64 host arrays and a float u. ValueError where it isn't finite (as at u = 0 for point masses).
    sde : LinearSDE
    rtol, atol : float
        Tolerances of the solver, on the root mean square over all points: step by step, not for each point.
    times : sequence of float from u0 towards u1, or None
        Where to look on the way; ValueError where they leave it, or turn back.

    Returns
    -------
    x at u1, shaped as x, float64; with `times`, (len(times), *x.shape). RuntimeError where the solver gives up.
    """
    x = _host(x)
    if times is not None:
        way = np.array([u0, *times, u1]) * (1 if u0 <= u1 else -1)
        if len(times) == 0 or (np.diff(way) < 0).any():
            raise ValueError(f"times must run from u0={u0} towards u1={u1}")

    def velocity(u, y):
        y = y.reshape(x.shape)
        return sde.flow_velocity(y, u, _finite(score(y, u), "score", u)).ravel()
    solution = _solve(velocity, x.ravel(), u0, u1, rtol, atol, times)
    return solution.y[:, -1].reshape(x.shape) if times is None else solution.y.T.reshape(-1, *x.shape)


class FlowLikelihood(NamedTuple):
    """What `flow_log_likelihood` found, (N,) each: log p(x) in nats, and its standard error over the probes.

    The error is 0 where the trace is exact, and nan for a single probe, which can't tell. x1 is where the paths end,
    shaped as x; evaluations counts the calls of the score.
    """

    log_density: Any
    standard_error: Any
    x1: Any
    evaluations: int


def flow_log_likelihood(x0, score, sde, *, divergence, u0=0.0, u1=1.0, log_prior=None, prior_var=None,
                        rtol=1e-8, atol=1e-10):
    """log-density at time u0 of the model that starts at p(x_1) and follows the flow of `score`, nats (L20).

    Parameters
    ----------
    x0, score, sde, rtol, atol : as for `solve_flow`
    divergence : function (x, u) -> (N,) or (M, N)
        Trace of the score's Jacobian, from `exact_trace`, or M estimates of it, from `hutchinson_trace`.
    u0, u1 : float
        u0 > 0 for data without a density, and gives the density of x at that time.
    log_prior : function x1 -> (N,) nats, or None for N(0, prior_var)
        The law of x at u1. `prior_var` is its variance for data of unit variance unless given, 1 where VP.

    Returns
    -------
    FlowLikelihood. TypeError, ValueError and RuntimeError as for `solve_flow`.
    """
    x0, calls = _host(x0), 0
    N, probes = len(x0), np.shape(divergence(_host(x0), u0))[:-1]                   # () where it is exact, or (M,)

    def stretching(u, y):
        nonlocal calls
        calls += 1
        x = y[:x0.size].reshape(x0.shape)
        velocity = sde.flow_velocity(x, u, _finite(score(x, u), "score", u))
        div = sde.f(u) * (x0.size // N) - sde.g2(u) / 2 * _finite(divergence(x, u), "divergence", u)
        return np.concatenate([velocity.ravel(), div.ravel()])
    start = np.concatenate([x0.ravel(), np.zeros(N * int(np.prod(probes)))])
    end = _solve(stretching, start, u0, u1, rtol, atol).y[:, -1]
    x1, integral = end[:x0.size].reshape(x0.shape), end[x0.size:].reshape(-1, N)
    if log_prior is None:
        lam_bar, sigma2_bar = sde.moments(u1)
        prior_var = lam_bar**2 + sigma2_bar if prior_var is None else prior_var
        log_end = gaussian.log_normal(x1, 0.0, prior_var).reshape(N, -1).sum(axis=1)
    else:
        log_end = log_prior(x1)
    M = len(integral)
    standard_error = integral.std(axis=0, ddof=1) / M**0.5 if M > 1 else np.full(N, np.nan if probes else 0.0)
    return FlowLikelihood(log_end + integral.mean(axis=0), standard_error, x1, calls)


# ---- the trace of the score's Jacobian

def exact_trace(hessian):
    """The divergence of the score from the Hessian of the log-density, a function (x, u) -> (N, D, D) (L20)."""
    def divergence(x, u):
        return array_module(x).trace(hessian(x, u), axis1=1, axis2=2)
    return divergence


def hutchinson_trace(vjp, x, rng, *, probes=1, kind="rademacher"):
    """Unbiased estimates z^T A z of the score's divergence, A its Jacobian, for `probes` fixed z shaped as x (L20).

    `vjp(x, u, z)` is z^T A, shaped as x; `kind` is "rademacher" (signs) or "gaussian". The function that comes back,
    (x, u) -> (probes, N), is for this one batch x, and takes `probes` vjps. ValueError for another kind, or no probe.
    """
    if kind not in ("rademacher", "gaussian"):
        raise ValueError(f'kind must be "rademacher" or "gaussian", not {kind!r}')
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    xp, draw = array_module(x), signs_like if kind == "rademacher" else normal_like
    z = [draw(x, rng) for _ in range(probes)]

    def divergence(x, u):
        return xp.stack([(probe * vjp(x, u, probe)).reshape(len(x), -1).sum(axis=1) for probe in z])
    return divergence


# ---- the solver

def _solve(velocity, start, u0, u1, rtol, atol, times=None):
    low, high = sorted((float(u0), float(u1)))
    if not 0 <= low <= high <= 1:
        raise ValueError(f"u0 and u1 must lie in [0, 1], got {u0} and {u1}")
    solution = solve_ivp(lambda u, y: velocity(min(max(float(u), low), high), y), (u0, u1), start, method="DOP853",
                         t_eval=times, rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"the flow could not be solved from {u0} to {u1}: {solution.message}")
    return solution


def _host(x):
    if not isinstance(x, np.ndarray):
        raise TypeError("the flow's solver works on NumPy arrays: move x with to_host, and the result with to_device")
    if x.ndim < 2:
        raise ValueError(f"x must be an array (N, ...), one row per point, got shape {x.shape}")
    return x.astype(np.float64)


def _finite(values, name, u):
    """The values, or ValueError: a solver that meets a nan halves its step for ever."""
    if not np.isfinite(values).all():
        raise ValueError(f"the {name} isn't finite at u = {u}: start a little later, where the density is smooth")
    return values
