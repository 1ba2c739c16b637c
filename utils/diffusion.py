"""The objective: noising, target, loss weighting. Pure functions of tensors.

Notation: x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 = `alphas_cumprod[t]` and sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin

from utils.errors import InputError


@dataclass(frozen=True)
class ObjectiveOptions:
    """The fields are flags."""

    conditioning_dropout_prob: float = 0.05
    prediction_type: str | None = None
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    rescale_betas_zero_snr: bool = False


def make_noise_schedule(base_config: dict, options: ObjectiveOptions) -> DDPMScheduler:
    """The training noise schedule: the base's own, with what the flags change.

    Raises:
        InputError: zero terminal SNR with epsilon prediction. At the last timestep the input is then pure noise, and
            epsilon says nothing about the image (2305.08891, section 3.2).
    """
    changes = {}
    if options.prediction_type:
        changes["prediction_type"] = options.prediction_type
    if options.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    schedule = DDPMScheduler.from_config(base_config, **changes)
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"the base predicts {schedule.config.prediction_type!r}, and this script trains 'epsilon' and "
            "'v_prediction': give one of them as --prediction_type"
        )
    if schedule.config.rescale_betas_zero_snr and schedule.config.prediction_type == "epsilon":
        raise InputError(
            "zero terminal SNR cannot be trained with epsilon prediction: give --prediction_type v_prediction, "
            "or drop --rescale_betas_zero_snr"
        )
    return schedule


def make_published_scheduler(base_scheduler: SchedulerMixin, schedule: DDPMScheduler) -> SchedulerMixin:
    """The scheduler that is saved with the editor: the base's own class, brought to the schedule trained with.

    A class that cannot rescale its betas (PNDM) would sample another schedule than was trained, so DDIM takes
    its place.
    """
    changes = {"prediction_type": schedule.config.prediction_type}
    scheduler_class = type(base_scheduler)
    if schedule.config.rescale_betas_zero_snr:
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        # Not by the configuration: it keeps keys of other classes, which its own class does not heed.
        if "rescale_betas_zero_snr" not in inspect.signature(scheduler_class.__init__).parameters:
            scheduler_class = DDIMScheduler
            changes |= {"clip_sample": False, "set_alpha_to_one": False}
    return scheduler_class.from_config(dict(base_scheduler.config), **changes)


def offset_noise(noise: torch.Tensor, channel_noise: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise (B, C, h, w) plus `strength` times a noise per channel (B, C, 1, 1)."""
    return noise + strength * channel_noise if strength else noise


def make_target(
    schedule: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the UNet is to predict: eps, or v = alpha_t eps - sigma_t x_0 (2202.00512, section 2.4). (B, C, h, w)."""
    if schedule.config.prediction_type == "v_prediction":
        return schedule.get_velocity(latents, noise, timesteps)
    return noise


def min_snr_weights(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Loss weights min(SNR, gamma) / SNR for eps and min(SNR, gamma) / (SNR + 1) for v (2303.09556, section 3.4). (B,)

    The second stays finite where the SNR is zero.
    """
    alpha_squared = alphas_cumprod[timesteps].double()
    snr = alpha_squared / (1 - alpha_squared)
    clamped = snr.clamp(max=gamma)
    return (clamped / (snr + 1 if prediction_type == "v_prediction" else snr)).float()


def per_sample_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample in float32: (B, C, h, w) -> (B,)."""
    return (prediction.float() - target.float()).square().mean(dim=tuple(range(1, target.ndim)))
