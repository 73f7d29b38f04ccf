"""Nats to bits per dimension."""

import numpy as np
import pytest

from ddpm.gaussian import discretized_log_likelihood
from ddpm.metrics import bits_per_dim


def test_a_uniform_guess_over_256_levels_costs_eight_bits():
    nats = 784 * np.log(256)
    assert bits_per_dim(nats, 784) == pytest.approx(8, rel=1e-14)
    assert bits_per_dim(nats, 784) != pytest.approx(nats / 784)         # control: nats are not bits
    np.testing.assert_allclose(bits_per_dim(np.array([nats, 0.0]), 784), [8, 0])


def test_a_wide_gaussian_on_8_bit_data_costs_its_entropy_in_bits():
    """log2(sqrt(2 pi e) std / bin) for data of that Gaussian, away from the ends."""
    levels, std, width = 2 * np.arange(256) / 255 - 1, 0.2, 2 / 255
    log_mass = discretized_log_likelihood(levels, 0.0, std**2)
    cost = -(np.exp(log_mass) * log_mass).sum()
    assert bits_per_dim(cost, 1) == pytest.approx(np.log2(np.sqrt(2 * np.pi * np.e) * std / width), abs=1e-3)


@pytest.mark.parametrize("dims", [0, -1])
def test_bad_dims(dims):
    with pytest.raises(ValueError, match="dims"):
        bits_per_dim(1.0, dims)
