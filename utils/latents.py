"""pixels => posterior moments => latents.

The edited image is what is noised: a sample of its posterior, scaled. The original image is a condition: the mode of
its posterior, unscaled, as the InstructPix2Pix pipelines take it at inference (paper, section 3.2).
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) => the posterior's mean and log variance, float32 (B, 2C, h, w)."""
    scaled = pixels.to(vae.device, torch.float32).div_(127.5).sub_(1.0)
    return vae.encode(scaled.to(vae.dtype)).latent_dist.parameters.float()


def sample_edited_latents(moments: torch.Tensor, posterior_noise: torch.Tensor, scaling_factor: float) -> torch.Tensor:
    """moments (B, 2C, h, w) and noise (B, C, h, w) => latents to be noised (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return (mean + deviation * posterior_noise) * scaling_factor


def mode_of_original_latents(moments: torch.Tensor) -> torch.Tensor:
    """moments (B, 2C, h, w) => image condition (B, C, h, w), unscaled."""
    return moments.chunk(2, dim=1)[0]
