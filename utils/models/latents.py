"""pixels => posterior moments => latents.

The edited image is what is noised: a sample of its posterior, scaled. The original image is a condition: the mode of
its posterior, unscaled, as the InstructPix2Pix pipelines take it at inference (paper, section 3.2).
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from utils.errors import InputError


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) => the posterior's mean and log variance, float32 (B, 2C, h, w)."""
    scaled = pixels.to(vae.device, torch.float32).div_(127.5).sub_(1.0)
    with torch.autocast(vae.device.type, enabled=False):  # the VAE's precision is chosen for itself
        return vae.encode(scaled.to(vae.dtype)).latent_dist.parameters.float()


def refuse_infinite(moments: torch.Tensor, vae: AutoencoderKL) -> None:
    """Raises `InputError` where the VAE's numbers run over, as SDXL's own do in fp16."""
    if not moments.isfinite().all():
        raise InputError(
            f"the VAE gives latents that are no finite numbers in {str(vae.dtype).removeprefix('torch.')}: give "
            "--vae_precision fp32, or for SDXL a VAE made for 16 bits, "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix (or look whether its weights are whole)"
        )


def sample_edited_latents(moments: torch.Tensor, posterior_noise: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """moments (B, 2C, h, w) and noise (B, C, h, w) => latents to be noised (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return scale_latents(mean + deviation * posterior_noise, vae_config)


def mode_of_original_latents(moments: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """moments (B, 2C, h, w) => image condition (B, C, h, w), unscaled but for CosXL editors."""
    return moments.chunk(2, dim=1)[0] * scale


def scale_latents(latents: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """The VAE's latents => those that are noised, of about unit variance (B, C, h, w)."""
    shift = _mean_and_deviation(latents, vae_config)
    if shift is None:
        return latents * vae_config["scaling_factor"]
    mean, deviation = shift
    return (latents - mean) * vae_config["scaling_factor"] / deviation


def unscale_latents(latents: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """The inverse: denoised latents => those that the VAE decodes (B, C, h, w)."""
    shift = _mean_and_deviation(latents, vae_config)
    if shift is None:
        return latents / vae_config["scaling_factor"]
    mean, deviation = shift
    return latents * deviation / vae_config["scaling_factor"] + mean


def _mean_and_deviation(latents: torch.Tensor, vae_config: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Some autoencoders (Playground v2.5) carry the mean and deviation of each channel, as (1, C, 1, 1) here."""
    values = [vae_config.get(name) for name in ("latents_mean", "latents_std")]
    if None in values:
        return None
    return tuple(torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in values)
