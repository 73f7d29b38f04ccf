"""What is measured of a model: one file per measure."""

from ddpm.metrics.bits import bits_per_dim
from ddpm.metrics.frechet import frechet_distance
from ddpm.metrics.mmd import SquaredMMD, squared_mmd, squared_mmd_to_world

__all__ = ["SquaredMMD", "bits_per_dim", "frechet_distance", "squared_mmd", "squared_mmd_to_world"]
