"""Pixels => posterior moments => latents.

Noise is added to the edited image: a sample of its posterior, scaled. The original image is the image condition: the
mode of its posterior, unscaled, as in the InstructPix2Pix pipelines (paper, section 3.2).
"""

from functools import cache

import torch
from diffusers import AutoencoderKL

from utils.errors import InputError

LATENT_CHANNELS = 4
MAX_ENCODED_PIXELS = 4 << 20  # of the images that the VAE encodes at a time, which needs 2.7 GB for each million
EDITOR_CHANNELS = 8  # inputs of an editor's UNet: the noisy latents and the latents of the original image


@torch.no_grad()
def encode_moments(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (B, 3, H, W) => mean and log variance of the posterior, float32 (B, 2C, h, w)."""
    num_images = max(1, MAX_ENCODED_PIXELS // (pixels.shape[-2] * pixels.shape[-1]))
    return torch.cat([_encode_slice(vae, images) for images in pixels.split(num_images)])


def _encode_slice(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    scaled = pixels.to(vae.device, torch.float32).div_(127.5).sub_(1.0)
    with torch.autocast(vae.device.type, enabled=False):  # the VAE has a dtype of its own
        return vae.encode(scaled.to(vae.dtype)).latent_dist.parameters.float()


def refuse_infinite(moments: torch.Tensor, vae: AutoencoderKL) -> None:
    """Raises `InputError` where the VAE overflows, as SDXL's own VAE does in fp16."""
    if not moments.isfinite().all():
        raise InputError(
            f"--vae_precision: the VAE overflows in {str(vae.dtype).removeprefix('torch.')} (its latents are not "
            "finite): use --vae_precision fp32, or for SDXL a VAE made for fp16, "
            "--pretrained_vae_model_name_or_path madebyollin/sdxl-vae-fp16-fix. "
            "If it also fails in fp32, its weights are damaged"
        )


def sample_edited_latents(moments: torch.Tensor, posterior_noise: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """Moments (B, 2C, h, w) and noise (B, C, h, w) => scaled latents of the edited image (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
    return scale_latents(mean + deviation * posterior_noise, vae_config)


def mode_of_original_latents(moments: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Moments (B, 2C, h, w) => image condition (B, C, h, w). scale: 1, except for CosXL editors."""
    return moments.chunk(2, dim=1)[0] * scale


def scale_latents(latents: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """Latents of the VAE => latents of the diffusion process, of about unit variance (B, C, h, w)."""
    statistics = _channel_statistics(latents, vae_config)
    if statistics is None:
        return latents * vae_config["scaling_factor"]
    mean, deviation = statistics
    return (latents - mean) * vae_config["scaling_factor"] / deviation


def unscale_latents(latents: torch.Tensor, vae_config: dict) -> torch.Tensor:
    """The inverse of `scale_latents`."""
    statistics = _channel_statistics(latents, vae_config)
    if statistics is None:
        return latents / vae_config["scaling_factor"]
    mean, deviation = statistics
    return latents * deviation / vae_config["scaling_factor"] + mean


def _channel_statistics(latents: torch.Tensor, vae_config: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Mean and standard deviation per channel, (1, C, 1, 1) each, of the VAEs that have them (Playground v2.5)."""
    values = [vae_config.get(name) for name in ("latents_mean", "latents_std")]
    if None in values:
        return None
    return tuple(_channels(tuple(value), latents.dtype, latents.device) for value in values)


@cache
def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One value per channel, kept on the device: a copy from the host in every step would wait for the GPU."""
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)
