"""Diffusion models derived by hand: schedules, bounds, losses, samplers and the commands that use them.

    derivations   schedule posterior gaussian parameterization elbo ddpm iddpm gddm
    exact worlds  mixture gaps
    methods       denoiser models likelihood samplers generate training
    commands      train sample evaluate report
"""

from ddpm.denoiser import Denoiser, Prediction
from ddpm.schedule import NoiseSchedule

__all__ = ["Denoiser", "NoiseSchedule", "Prediction"]
