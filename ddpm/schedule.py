"""The noising process x_t = lam_t x_{t-1} + sigma_t n_t, t = 1..T, and what follows from it in closed form.

Arrays over time have length T+1 and are indexed by t itself; entry 0 is the clean state (lam = 1, sigma2 = 0), so the
code reads like the formula. Tables are float64 on the host and are cast where they meet an image (`per_example`).

    x_t | x_{t-1} = N(lam_t x_{t-1}, sigma2_t)                                                    (L01)
    x_t | x_0     = N(lam_bar_t x_0, sigma2_bar_t),  lam_bar_t    = lam_t lam_bar_{t-1}
                                                     sigma2_bar_t = lam_t^2 sigma2_bar_{t-1} + sigma2_t   (L02)

Variance preserving (VP) means sigma2_t = 1 - lam_t^2, hence sigma2_bar_t = 1 - lam_bar_t^2 (L03): data of unit
variance keep it. In any process their variance at time t is marginal_var_t = lam_bar_t^2 + sigma2_bar_t, and whatever
needs x_t in natural units (the prior of x_T, the input of a network) divides by its root. Divided by it throughout, any
process becomes a VP one: what sets it apart is the signal-to-noise ratio snr_t = lam_bar_t^2 / sigma2_bar_t alone.
"""

import numpy as np

from ddpm.posterior import posterior_coefficients
from nn.backend import per_example


class NoiseSchedule:
    """A linear-Gaussian noising process with T steps (L01-L03).

    Parameters
    ----------
    lam, sigma2 : sequence of float, length T
        Contraction and variance of the steps t = 1..T; all finite, lam > 0 and sigma2 > 0 (ValueError otherwise).

    Attributes
    ----------
    T : int
    lam, sigma2 : array (T+1,)
        One step, x_t | x_{t-1}.
    lam_bar, sigma2_bar, snr : array (T+1,)
        From the data, x_t | x_0, and lam_bar^2 / sigma2_bar (infinite at t = 0).
    marginal_var : array (T+1,)
        Variance of x_t for data of mean 0 and variance 1, lam_bar^2 + sigma2_bar: exactly 1 where variance preserving.
    is_variance_preserving : bool
    beta, alpha, alpha_bar : array (T+1,)
        1 - lam^2, lam^2, lam_bar^2. AttributeError unless variance preserving.
    """

    def __init__(self, lam, sigma2):
        lam, sigma2 = _positive_sequences(lam=lam, sigma2=sigma2)
        self.T = lam.size
        self.lam = np.concatenate([[1.0], lam])
        self.sigma2 = np.concatenate([[0.0], sigma2])
        self.lam_bar = np.cumprod(self.lam)
        self.sigma2_bar = np.zeros(self.T + 1)
        for t in range(1, self.T + 1):
            self.sigma2_bar[t] = self.lam[t]**2 * self.sigma2_bar[t - 1] + self.sigma2[t]
        with np.errstate(all="ignore"):
            self.snr = self.lam_bar**2 / self.sigma2_bar
        if not ((self.snr[1:] > 0) & np.isfinite(self.snr[1:])).all():
            raise ValueError("lam_bar^2/sigma2_bar leaves the range of floats: use fewer or smaller steps")
        self.is_variance_preserving = bool(np.allclose(self.sigma2, 1 - self.lam**2, rtol=1e-9, atol=1e-12))
        self.marginal_var = np.ones(self.T + 1) if self.is_variance_preserving else self.lam_bar**2 + self.sigma2_bar
        for table in (self.lam, self.sigma2, self.lam_bar, self.sigma2_bar, self.snr, self.marginal_var):
            table.flags.writeable = False

    def __repr__(self):
        kind = "variance preserving" if self.is_variance_preserving else "general"
        return f"NoiseSchedule(T={self.T}, {kind}, snr {self.snr[1]:.3g} at t=1, {self.snr[-1]:.3g} at t={self.T})"

    # ---- constructors

    @classmethod
    def from_betas(cls, betas):
        """Variance-preserving steps, lam_t = sqrt(1 - beta_t) (L03); ValueError unless 0 < beta_t < 1."""
        betas = np.atleast_1d(np.asarray(betas, dtype=np.float64))
        if not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must lie strictly between 0 and 1")
        return cls(np.sqrt(1 - betas), betas)

    @classmethod
    def linear(cls, T=1000, beta_start=1e-4, beta_end=0.02):
        """beta_t on a line from `beta_start` to `beta_end`, both scaled by 1000/T so that x_T is as noisy for any T.

        Raises ValueError where that scaling drives a beta to 1 or more (T <= 20 with the defaults).
        """
        _check_T(T)
        betas = np.linspace(beta_start, beta_end, T) * (1000 / T)
        if betas.max() >= 1:
            raise ValueError(f"T={T} is too small for a linear schedule: its largest step variance would be "
                             f"{betas.max():.3g}, and it must stay below 1; use a larger T or schedule cosine")
        return cls.from_betas(betas)

    @classmethod
    def cosine(cls, T=1000, s=0.008, max_beta=0.999):
        """alpha_bar_t = f(t/T)/f(0) with f(u) = cos^2((u+s)/(1+s) pi/2); step variances are capped at `max_beta`."""
        _check_T(T)
        f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2)**2
        return cls.from_betas(np.minimum(1 - f[1:] / f[:-1], max_beta))

    @classmethod
    def from_marginals(cls, lam_bar, sigma2_bar):
        """The process whose x_t | x_0 is N(lam_bar_t x_0, sigma2_bar_t), given for t = 1..T (L02).

        L02 read backwards: lam_t = lam_bar_t / lam_bar_{t-1} and sigma2_t = sigma2_bar_t - lam_t^2 sigma2_bar_{t-1},
        which is positive where the signal-to-noise ratio falls; ValueError that names the first t where it isn't.
        """
        lam_bar, sigma2_bar = _positive_sequences(lam_bar=lam_bar, sigma2_bar=sigma2_bar)
        lam = lam_bar / np.concatenate([[1.0], lam_bar[:-1]])
        sigma2 = sigma2_bar - lam**2 * np.concatenate([[0.0], sigma2_bar[:-1]])
        if not (sigma2 > 0).all():
            raise ValueError("lam_bar^2/sigma2_bar must fall from each t to the next: the variance of the step to "
                             f"t={np.argmin(sigma2 > 0) + 1} would not be above 0")
        return cls(lam, sigma2)

    @classmethod
    def variance_exploding(cls, T=1000, sigma_min=0.01, sigma_max=50.0):
        """lam_t = 1, and the noise's standard deviation runs from `sigma_min` to `sigma_max` in equal ratios (VE).

        The defaults: 0.01 is near the distance of two of 256 grey levels in [-1, 1], and 50 near that of the two most
        distant images of 28x28, 2 sqrt(784); larger ones want more. ValueError unless 0 < sigma_min < sigma_max.
        """
        _check_T(T)
        if not 0 < sigma_min < sigma_max < np.inf:
            raise ValueError(f"sigma_min must be above 0 and below sigma_max, got {sigma_min} and {sigma_max}")
        return cls.from_marginals(np.ones(T), np.geomspace(sigma_max, sigma_min, T)[::-1]**2)

    @classmethod
    def sub_variance_preserving(cls, T=1000, beta_start=1e-4, beta_end=0.02, sigma_min=0.01):
        """sigma2_bar_t = (1 - lam_bar_t^2)^2, the square of a VP process's, with `linear`'s fading (sub-VP).

        The noise's standard deviation, 1 - lam_bar_t^2, starts near `sigma_min`: the first step fades that much. With 0
        it starts at beta_start: noise far below a grey level, bits for nothing. ValueError unless 0 <= sigma_min < 1.
        """
        if not 0 <= sigma_min < 1:
            raise ValueError(f"sigma_min must be at least 0 and below 1, got {sigma_min}")
        lam_bar2 = (1 - sigma_min) * cls.linear(T, beta_start, beta_end).lam_bar[1:]**2
        return cls.from_marginals(np.sqrt(lam_bar2), (1 - lam_bar2)**2)

    # ---- variance-preserving views

    @property
    def beta(self):
        self._require_variance_preserving("beta")
        return self.sigma2

    @property
    def alpha(self):
        self._require_variance_preserving("alpha")
        return self.lam**2

    @property
    def alpha_bar(self):
        self._require_variance_preserving("alpha_bar")
        return self.lam_bar**2

    def _require_variance_preserving(self, name):
        if not self.is_variance_preserving:
            raise AttributeError(f"{name} is defined for variance-preserving schedules only; "
                                 "use lam, sigma2, lam_bar, sigma2_bar, which every schedule has")

    # ---- kernels between any two times

    def between(self, s, t):
        """(lam_ts, sigma2_ts) of x_t | x_s = N(lam_ts x_s, sigma2_ts), 0 <= s <= t <= T (L02).

        The variance is lam_bar_t^2 (R_t - R_s), R = sigma2_bar/lam_bar^2 being the noise-to-signal ratio, which grows
        with every step; for a single step it is the schedule's own sigma2.
        """
        s, t = self._check_time(s, 0, "s"), self._check_time(t, 0, "t")
        if np.any(s > t):
            raise ValueError("s must not be later than t")
        noise_to_signal = self.sigma2_bar / self.lam_bar**2
        lam_ts = self.lam_bar[t] / self.lam_bar[s]
        sigma2_ts = self.lam_bar[t]**2 * (noise_to_signal[t] - noise_to_signal[s])
        sigma2_ts = np.where(s == t - 1, self.sigma2[t], sigma2_ts)
        return _scalar_or_array(lam_ts), _scalar_or_array(sigma2_ts)

    def posterior(self, s, t):
        """Posterior(a, b, var) of x_s | x_t, x_0 for 0 <= s < t <= T (L10, G02); at s = 0 it is (1, 0, 0)."""
        if np.any(np.asarray(s) >= np.asarray(t)):
            raise ValueError("s must be earlier than t")
        lam_ts, sigma2_ts = self.between(s, t)
        return posterior_coefficients(_scalar_or_array(self.lam_bar[s]), _scalar_or_array(self.sigma2_bar[s]),
                                      lam_ts, sigma2_ts)

    def add_noise(self, x0, t, eps):
        """x_t = lam_bar_t x_0 + sqrt(sigma2_bar_t) eps (L02, U01), shaped as x0.

        t is an int or an (N,) integer array on the host, one time per example.
        """
        t = self._check_time(t, 0, "t")
        return per_example(self.lam_bar[t], x0) * x0 + per_example(np.sqrt(self.sigma2_bar[t]), x0) * eps

    def timesteps(self, steps, spacing="uniform"):
        """The times at which a sampler with `steps` network evaluations stands: descending, without 0.

        "uniform" runs evenly from T to 1; "quadratic" (DDIM) from about 0.8 T to 1, denser near the data; "trailing"
        takes T, T - T/steps, ... down to T/steps. Raises ValueError for steps outside 1..T or another spacing.
        """
        if not (isinstance(steps, (int, np.integer)) and 1 <= steps <= self.T):
            raise ValueError(f"steps must be an integer from 1 to T={self.T}, got {steps!r}")
        if steps == 1:
            return np.array([self.T])
        if spacing == "uniform":
            times = np.rint(np.linspace(1, self.T, steps))
        elif spacing == "quadratic":
            times = np.floor(np.linspace(0, np.sqrt(0.8 * self.T), steps)**2) + 1
        elif spacing == "trailing":
            times = np.rint(self.T * np.arange(1, steps + 1) / steps)
        else:
            raise ValueError(f'spacing must be "uniform", "quadratic" or "trailing", not {spacing!r}')
        return _strictly_increasing(times.astype(int), self.T)[::-1].copy()

    def _check_time(self, t, lowest, name):
        """t as a host integer (array); IndexError-free, because a negative index would wrap around silently."""
        t = np.asarray(t)
        if not np.issubdtype(t.dtype, np.integer):
            raise TypeError(f"{name} must be an integer or an integer array, got dtype {t.dtype}")
        if np.any(t < lowest) or np.any(t > self.T):
            raise ValueError(f"{name} must lie in {lowest}..{self.T}")
        return t


def _check_T(T):
    if not (isinstance(T, (int, np.integer)) and T >= 1):
        raise ValueError(f"T must be an integer >= 1, got {T!r}")


def _positive_sequences(**named):
    """The two named sequences as float64 arrays of one length; ValueError, with the name, unless all finite and > 0."""
    first, second = named
    arrays = [np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in named.values()]
    if arrays[0].ndim != 1 or arrays[0].shape != arrays[1].shape or arrays[0].size == 0:
        raise ValueError(f"{first} and {second} must be two sequences of one length T >= 1, "
                         f"got shapes {arrays[0].shape} and {arrays[1].shape}")
    for name, array in zip(named, arrays, strict=True):
        if not (np.isfinite(array) & (array > 0)).all():
            raise ValueError(f"{name} must be finite and > 0 at every step")
    return arrays


def _scalar_or_array(v):
    return float(v) if np.ndim(v) == 0 else v


def _strictly_increasing(times, T):
    """Push equal neighbours apart, first upwards, then down from T: dense spacings of almost T steps round to ties."""
    for i in range(1, len(times)):
        times[i] = max(times[i], times[i - 1] + 1)
    times[-1] = min(times[-1], T)
    for i in range(len(times) - 2, -1, -1):
        times[i] = min(times[i], times[i + 1] - 1)
    return times
