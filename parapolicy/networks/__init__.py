"""Noise-prediction networks of Diffusion Policy, with the published module layout."""

from parapolicy.networks.unet1d import ConditionalUnet1D

__all__ = ["ConditionalUnet1D"]
