"""Diffusion models derived by hand: schedules, bounds, losses, samplers and the commands that use them.

    derivations   schedule posterior gaussian parameterization elbo rao_blackwell tweedie covariance ddpm iddpm gddm
                  heads
    exact worlds  mixture gaps empirical sde flow
    methods       denoiser network_denoiser models variance guidance likelihood samplers generate points metrics
                  training head_training
    commands      train sample evaluate report
"""

from ddpm.denoiser import Denoiser, Prediction
from ddpm.schedule import NoiseSchedule

__all__ = ["Denoiser", "NoiseSchedule", "Prediction"]
