"""Fixtures that any test may ask for."""

import numpy as np
import pytest

from tests import fake_device


@pytest.fixture
def fake():
    """The strict fake device's array library, with an empty record of transfers (see tests/fake_device.py)."""
    fake_device.xp.transfers.clear()
    return fake_device.xp


@pytest.fixture
def rng():
    """A generator with a fixed seed."""
    return np.random.default_rng(0)
