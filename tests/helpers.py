"""What several test files share: random schedules, and how a Monte-Carlo claim is judged."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from ddpm.mixture import GaussianMixture
from ddpm.schedule import NoiseSchedule

property_test = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def schedules(draw, variance_preserving=None):
    """Random schedules of 2..40 steps, variance preserving or not."""
    T, seed = draw(st.integers(2, 40)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    if draw(st.booleans()) if variance_preserving is None else variance_preserving:
        return NoiseSchedule.from_betas(rng.uniform(1e-4, 0.5, T))
    return NoiseSchedule(rng.uniform(0.7, 1.2, T), rng.uniform(1e-4, 0.5, T))


@st.composite
def mixtures(draw):
    """Random mixtures of 1..4 Gaussians in 1..3 dimensions, with full covariances."""
    k, dim, seed = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    weights, roots = rng.uniform(0.1, 1.0, k), rng.standard_normal((k, dim, dim + 1)) * rng.uniform(0.2, 1.0)
    return GaussianMixture(weights / weights.sum(), rng.standard_normal((k, dim)), roots @ roots.swapaxes(1, 2))


def general_schedule(T=20):
    """One fixed schedule that is not variance preserving."""
    rng = np.random.default_rng(5)
    return NoiseSchedule(rng.uniform(0.8, 1.1, T), rng.uniform(0.01, 0.3, T))


def zscore(samples, claim=0.0):
    """How many standard errors the mean of `samples` is from `claim`: within 4 where it is true."""
    return (samples.mean() - claim) / (samples.std(ddof=1) / np.sqrt(samples.size))
