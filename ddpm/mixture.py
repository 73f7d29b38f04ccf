"""An exact world: a mixture of Gaussians stays one at every noise level, so that everything has a closed form.

With x_0 from component k = N(m_k, Q_k diag(e_k) Q_k^T), noising keeps the eigenvectors Q_k and turns the eigenvalues
into d_k(t) = lam_bar_t^2 e_k + sigma2_bar_t. In the coordinates y_k = Q_k^T (x_t - lam_bar_t m_k) all is diagonal:

    log q_t(x)    = log sum_k w_k N(y_k; 0, d_k)          r_k = softmax of the terms: which component x_t came from
    score         = sum_k r_k g_k,                        g_k = -Q_k (y_k / d_k)
    Hessian       = sum_k r_k [(g_k - score)(g_k - score)^T - Q_k diag(1/d_k) Q_k^T]
    x_s | x_t     = sum_k r_k N(lam_bar_s m_k + lam_ts Q_k h_k y_k, sigma2_ts Q_k h_k Q_k^T),  h_k = diag(d_k(s)/d_k(t))

The last line is the true reverse step, for any s < t; at s = 0 it is the posterior of the clean state. It is a mixture,
which no Gaussian p(x_s | x_t) can match: `ddpm.gaps` has what the best one misses (G12). Computed in float64.
"""

from typing import Any, NamedTuple

import numpy as np

from nn.backend import array_module


class PointwiseMixture(NamedTuple):
    """One mixture per point: weights (N, K), means (N, K, D), covariances (K, D, D) shared or (N, K, D, D)."""

    weights: Any
    means: Any
    covariances: Any

    def mean(self):
        """(N, D)."""
        return (self.weights[:, :, None] * self.means).sum(axis=1)

    def cov(self):
        """(N, D, D): within the components and between their means."""
        deviation = self.means - self.mean()[:, None, :]
        between = (self.weights[:, :, None] * deviation).swapaxes(1, 2) @ deviation
        return (self.weights[:, :, None, None] * self.covariances).sum(axis=1) + between


class GaussianMixture:
    """Mixture of K Gaussians with full covariances in D dimensions.

    Parameters
    ----------
    weights : array (K,), > 0, summing to 1
    means : array (K, D)
    covariances : array (K, D, D), symmetric and positive semi-definite; ValueError otherwise

    Points x are (N, D) arrays of any library; results are float64 in the same library. A singular covariance (a point
    mass, say) is a legal x_0, but has no density: log_density, score and hessian raise ValueError there.
    """

    def __init__(self, weights, means, covariances):
        self.weights, self.means, self.covariances = (np.asarray(v, np.float64) for v in (weights, means, covariances))
        if self.means.ndim != 2 or self.weights.shape != self.means.shape[:1]:
            raise ValueError(f"weights must be (K,) and means (K, D), got {self.weights.shape} and {self.means.shape}")
        if self.covariances.shape != (*self.means.shape, self.means.shape[1]):
            raise ValueError(f"covariances must be (K, D, D) = {(*self.means.shape, self.means.shape[1])}, "
                             f"got {self.covariances.shape}")
        if (self.weights <= 0).any() or abs(self.weights.sum() - 1) > 1e-9:
            raise ValueError("weights must be > 0 and sum to 1")
        self._eigenvalues, self._eigenvectors = np.linalg.eigh(self.covariances)            # (K, D), (K, D, D)
        scale = max(1e-300, np.abs(self._eigenvalues).max())
        if not np.allclose(self.covariances, self.covariances.swapaxes(1, 2), rtol=0, atol=1e-9 * scale):
            raise ValueError("covariances must be symmetric")
        if self._eigenvalues.min() < -1e-9 * scale:
            raise ValueError("covariances must be positive semi-definite")
        self._eigenvalues = np.maximum(self._eigenvalues, 0)

    # ---- ready-made worlds

    @classmethod
    def two_component(cls):
        """Two Gaussians on the line, 0.4 N(-1.2, 0.04) + 0.6 N(0.8, 0.04): mean 0 and variance 1 in all (G08, G12)."""
        return cls([0.4, 0.6], [[-1.2], [0.8]], np.full((2, 1, 1), 0.04))

    @classmethod
    def grid(cls, std=0.1, rotation_degrees=0):
        """Nine equal Gaussians of standard deviation `std` on {-3, 0, 3}^2, turned by `rotation_degrees` (C14).

        Unturned, the two coordinates are independent and every posterior covariance is diagonal; turned, they are not.
        """
        means = np.array([[i, j] for i in (-3.0, 0.0, 3.0) for j in (-3.0, 0.0, 3.0)])
        return cls(np.full(9, 1 / 9), means, np.tile(std**2 * np.eye(2), (9, 1, 1))).rotated(rotation_degrees)

    @classmethod
    def stripes(cls, std=0.1, rotation_degrees=45):
        """Three long, thin Gaussians side by side, 1.3 long and `std` across, turned by `rotation_degrees` (C17).

        Unturned, a diagonal covariance says all there is to say of a reverse step; at 45 degrees the coordinates of
        x_s are correlated at every t, and a full covariance is needed. Each then has variance 0.97.
        """
        means = np.array([[0, -0.6], [0, 0], [0, 0.6]])
        return cls(np.full(3, 1 / 3), means, np.tile(np.diag([1.3**2, std**2]), (3, 1, 1))).rotated(rotation_degrees)

    @classmethod
    def correlated(cls, rho=0.9, dim=2):
        """One Gaussian of unit variances in which any two coordinates have correlation `rho` (L21).

        ValueError unless -1/(dim - 1) < rho < 1: beyond that no such Gaussian exists.
        """
        if not (dim >= 2 and -1 / (dim - 1) < rho < 1):
            raise ValueError(f"rho must lie strictly between -1/(dim - 1) and 1, and dim be >= 2, got {rho} and {dim}")
        return cls([1.0], np.zeros((1, dim)), ((1 - rho) * np.eye(dim) + rho)[None])

    def rotated(self, degrees):
        """The same world in the plane, turned counter-clockwise about the origin; ValueError unless D = 2."""
        if self.means.shape[1] != 2:
            raise ValueError(f"only a world in two dimensions can be rotated, not one in {self.means.shape[1]}")
        cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        R = np.array([[cos, -sin], [sin, cos]])
        return GaussianMixture(self.weights, self.means @ R.T, R @ self.covariances @ R.T)

    # ---- moments and samples

    def mean(self):
        """(D,)."""
        return self.weights @ self.means

    def cov(self):
        """(D, D)."""
        deviation = self.means - self.mean()
        return np.tensordot(self.weights, self.covariances, 1) + (self.weights[:, None] * deviation).T @ deviation

    def sample(self, n, rng):
        """n points (n, D) on the host; `rng` is a numpy Generator."""
        k = np.searchsorted(self.weights.cumsum(), rng.random(n)).clip(max=len(self.weights) - 1)
        y = np.sqrt(self._eigenvalues)[k] * rng.standard_normal((n, self.means.shape[1]))
        return self.means[k] + (self._eigenvectors[k] @ y[:, :, None])[:, :, 0]

    def noised(self, t, schedule):
        """The law of x_t, a GaussianMixture again; t is an int (L02)."""
        lam, noise = schedule.lam_bar[t], schedule.sigma2_bar[t]
        return GaussianMixture(self.weights, lam * self.means,
                               lam**2 * self.covariances + noise * np.eye(self.means.shape[1]))

    # ---- the density and its derivatives

    def log_density(self, x):
        """log of the density, (N,), nats."""
        xp, terms, _, _ = self._components(x)
        top = terms.max(axis=1)
        return top + xp.log(xp.exp(terms - top[:, None]).sum(axis=1))

    def score(self, x):
        """Gradient of the log-density, (N, D) (L17)."""
        return self._score_parts(x)[3]

    def hessian(self, x):
        """Hessian of the log-density, (N, D, D) (C08)."""
        xp, r, g, score, Q, d = self._score_parts(x)
        precisions = (Q / d[0, :, None, :]) @ Q.swapaxes(1, 2)                              # (K, D, D)
        deviation = g - score[:, None, :]
        return (r[:, :, None] * deviation).swapaxes(1, 2) @ deviation - xp.tensordot(r, precisions, 1)

    def _score_parts(self, x):
        xp, terms, y, d = self._components(x)
        r, Q = _softmax(terms, xp), xp.asarray(self._eigenvectors)
        g = -_rotate(Q, y / d)                                                              # (N, K, D)
        return xp, r, g, (r[:, :, None] * g).sum(axis=1), Q, d

    # ---- the reverse step

    def reverse(self, x_t, s, t, schedule):
        """The exact law of x_s | x_t for 0 <= s < t, as a PointwiseMixture (G01, L15).

        s and t are ints, or (N,) integer arrays on the host, and then the covariances are (N, K, D, D).
        """
        lam_ts, sigma2_ts = schedule.between(s, t)
        xp, terms, y, d_t = self._components(x_t, schedule.lam_bar[t], schedule.sigma2_bar[t])

        def column(v):
            return xp.asarray(np.reshape(v, (-1, 1, 1)))                            # () or (N,), beside (N, K, D)

        Q, m, e = (xp.asarray(v) for v in (self._eigenvectors, self.means, self._eigenvalues))
        ratio = (column(schedule.lam_bar[s]**2) * e + column(schedule.sigma2_bar[s])) / d_t  # d(s)/d(t), (N or 1, K, D)
        means = column(schedule.lam_bar[s]) * m + _rotate(Q, column(lam_ts) * ratio * y)
        covariances = (Q * (column(sigma2_ts) * ratio)[:, :, None, :]) @ Q.swapaxes(1, 2)
        shared = np.ndim(s) == np.ndim(t) == 0
        return PointwiseMixture(_softmax(terms, xp), means, covariances[0] if shared else covariances)

    def posterior_mixture(self, x_t, t, schedule):
        """The exact law of x_0 | x_t, as a PointwiseMixture; t is an int or an (N,) integer array on the host."""
        return self.reverse(x_t, np.zeros_like(t) if np.ndim(t) else 0, t, schedule)

    def posterior_x0(self, x_t, t, schedule):
        """E[x_0 | x_t] (N, D) and Cov[x_0 | x_t] (N, D, D); t is an int or an (N,) host array (C01, C08)."""
        posterior = self.posterior_mixture(x_t, t, schedule)
        return posterior.mean(), posterior.cov()

    def _components(self, x, lam=1.0, noise=0.0):
        """(xp, log w_k N(x; lam m_k, lam^2 S_k + noise I) (N, K), y (N, K, D), d (N or 1, K, D)).

        lam and noise are numbers, or (N,) arrays on the host.
        """
        xp = array_module(x)
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"points must be an array (N, {self.means.shape[1]}), got shape {x.shape}")
        lam, noise = np.reshape(lam, (-1, 1, 1)), np.reshape(noise, (-1, 1, 1))
        d = lam**2 * self._eigenvalues + noise
        if (d <= 0).any():
            raise ValueError("a component with a singular covariance has no density; add noise first (noised)")
        log_norm = np.log(self.weights) - 0.5 * np.log(2 * np.pi * d).sum(axis=-1)
        d = xp.asarray(d)
        y = _rotate(xp.asarray(self._eigenvectors.swapaxes(1, 2)),
                    x.astype(np.float64)[:, None, :] - xp.asarray(lam * self.means))
        return xp, xp.asarray(log_norm) - 0.5 * (y * y / d).sum(axis=-1), y, d


def _rotate(Q, y):
    """Q_k y_k for (K, D, D) and (N or 1, K, D)."""
    return (Q @ y[..., None])[..., 0]


def _softmax(terms, xp):
    e = xp.exp(terms - terms.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
