"""The objective: noising, target, loss weighting. Pure functions of tensors.

Notation: x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 = `alphas_cumprod[t]` and sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

import inspect
import math
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
    crops_coords_top_left_h: int | None = None
    crops_coords_top_left_w: int | None = None


def make_noise_schedule(base_config: dict, options: ObjectiveOptions) -> DDPMScheduler:
    """The training noise schedule: the base's own, with what the flags change.

    Raises:
        InputError: zero terminal SNR with epsilon prediction. At the last timestep the input is then pure noise, and
            epsilon says nothing about the image (2305.08891, section 3.2).
    """
    if str(base_config.get("_class_name", "")).startswith("EDM"):
        return _make_edm_schedule(base_config, options)
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


def _make_edm_schedule(base_config: dict, options: ObjectiveOptions) -> DDPMScheduler:
    """The noise schedule of CosXL: cosine, v prediction, 1000 of its continuous noise levels.

    EDM adds noise of deviation sigma to data of unit deviation and scales the sum to unit variance (2206.00364, section
    5), which is x_t with alpha = 1 / sqrt(1 + sigma^2). The cosine schedule takes sigma = tan(pi u / 2) for uniform u.
    """
    if (options.prediction_type or base_config.get("prediction_type")) != "v_prediction":
        raise InputError("a model with an EDM scheduler (CosXL) is trained with v_prediction: drop --prediction_type")
    if options.rescale_betas_zero_snr or base_config.get("sigma_data", 1.0) != 1.0:
        raise InputError("the noise schedule of an EDM model is its own (sigma_data 1): drop --rescale_betas_zero_snr")
    ends = [math.atan(base_config.get(name, default)) for name, default in (("sigma_min", 0.002), ("sigma_max", 120.0))]
    sigmas = torch.linspace(*ends, 1000, dtype=torch.float64).tan()
    alphas_cumprod = 1 / (1 + sigmas**2)
    betas = 1 - alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    schedule = DDPMScheduler(trained_betas=betas.tolist(), prediction_type="v_prediction", clip_sample=False)
    schedule.unet_timesteps = (sigmas.log() / 4).float()  # what EDM's UNets are told: c_noise = ln(sigma) / 4
    return schedule


def unet_timesteps(schedule: DDPMScheduler, timesteps: torch.Tensor) -> torch.Tensor:
    """What the UNet is told of the noise at the schedule's timesteps (B,): their number, or EDM's c_noise."""
    table = getattr(schedule, "unet_timesteps", None)
    return timesteps if table is None else table.to(timesteps.device)[timesteps]


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
