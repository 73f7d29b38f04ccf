"""What is measured of a model: one file per measure."""

from ddpm.metrics.bits import bits_per_dim
from ddpm.metrics.frechet import frechet_distance

__all__ = ["bits_per_dim", "frechet_distance"]
