"""What is measured of a model: one file per measure."""

from ddpm.metrics.bits import bits_per_dim

__all__ = ["bits_per_dim"]
