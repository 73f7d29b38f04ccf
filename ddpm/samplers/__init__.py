"""Samplers: from a denoiser and noise x_T to images x_0. All share the loop in `ancestral`, and differ in one step."""

from ddpm.samplers.ancestral import Step, ddpm, grey_level_variance
from ddpm.samplers.ddim import ddim
from ddpm.samplers.dpm_solver import dpm_solver_pp
from ddpm.samplers.probability_flow import probability_flow
from ddpm.samplers.renoise import renoise

__all__ = ["Step", "ddim", "ddpm", "dpm_solver_pp", "grey_level_variance", "probability_flow", "renoise"]
