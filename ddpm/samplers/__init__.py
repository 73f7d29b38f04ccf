"""Samplers: from a denoiser and noise x_T to images x_0. All share the loop in `ancestral`, and differ in one step."""

from ddpm.samplers.ancestral import Step, ddpm

__all__ = ["Step", "ddpm"]
