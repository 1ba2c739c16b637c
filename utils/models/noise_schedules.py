"""The noise schedule of training: adding noise, targets, loss weights, and the scheduler saved with the editor.

Notation: x_t = alpha_t x_0 + sigma_t eps, with alpha_t^2 = `alphas_cumprod[t]` and sigma_t^2 = 1 - alpha_t^2.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, replace

import torch
from diffusers import DDIMScheduler, DDPMScheduler, SchedulerMixin

from utils.errors import InputError

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


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


@dataclass(frozen=True)
class NoiseSchedule:
    """The noise schedule of training.

    edm_timesteps: for EDM models, what their UNet receives for each timestep, c_noise = ln(sigma) / 4, float32 (T,).
    """

    scheduler: DDPMScheduler
    edm_timesteps: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.scheduler)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise (2305.08891, section 3.1)."""
        return bool(self.scheduler.config.get("rescale_betas_zero_snr", False))

    def make_target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet predicts: eps, or v = alpha_t eps - sigma_t x_0 (2202.00512, section 2.4). (B, C, h, w)."""
        if self.prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timesteps)
        return noise

    def unet_timesteps(self, timesteps: torch.Tensor) -> torch.Tensor:
        """What the UNet receives as its timesteps (B,): the timesteps themselves, or c_noise of EDM models."""
        return timesteps if self.edm_timesteps is None else self.edm_timesteps.to(timesteps.device)[timesteps]

    def to(self, device: torch.device) -> NoiseSchedule:
        """With its tables on the device, so that no step copies them."""
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(device)
        return self if self.edm_timesteps is None else replace(self, edm_timesteps=self.edm_timesteps.to(device))


def make_noise_schedule(base_config: dict, options: ObjectiveOptions) -> NoiseSchedule:
    """The base's noise schedule, changed by the flags.

    Raises:
        InputError: zero terminal SNR with epsilon prediction. At the last timestep the input is then pure noise, and
            epsilon says nothing about the image (2305.08891, section 3.2).
    """
    if str(base_config.get("_class_name", "")).startswith("EDM"):
        return _make_edm_schedule(base_config, options)
    changes = ZERO_SNR if options.rescale_betas_zero_snr else {}
    if options.prediction_type:
        changes = changes | {"prediction_type": options.prediction_type}
    schedule = NoiseSchedule(DDPMScheduler.from_config(base_config, **changes))
    if schedule.prediction_type not in ("epsilon", "v_prediction"):
        raise InputError(
            f"the base model has prediction type {schedule.prediction_type!r}, which is not supported: "
            "set --prediction_type to epsilon or v_prediction"
        )
    if schedule.scheduler.config.rescale_betas_zero_snr and schedule.prediction_type == "epsilon":
        raise InputError("--rescale_betas_zero_snr needs v prediction: set --prediction_type v_prediction")
    return schedule


def _make_edm_schedule(base_config: dict, options: ObjectiveOptions) -> NoiseSchedule:
    """The noise schedule of CosXL: cosine, v prediction, 1000 of its continuous noise levels.

    EDM adds noise of standard deviation sigma to data of unit variance and scales the sum to unit variance
    (2206.00364, section 5), which is x_t with alpha = 1 / sqrt(1 + sigma^2). The cosine schedule is
    sigma = tan(pi u / 2) for uniform u.
    """
    if (options.prediction_type or base_config.get("prediction_type")) != "v_prediction":
        raise InputError("models with an EDM scheduler (CosXL) need v_prediction: remove --prediction_type")
    if options.rescale_betas_zero_snr or base_config.get("sigma_data", 1.0) != 1.0:
        raise InputError("models with an EDM scheduler keep their noise schedule: remove --rescale_betas_zero_snr")
    ends = [math.atan(base_config.get(name, default)) for name, default in (("sigma_min", 0.002), ("sigma_max", 120.0))]
    sigmas = torch.linspace(*ends, 1000, dtype=torch.float64).tan()
    alphas_cumprod = 1 / (1 + sigmas**2)
    betas = 1 - alphas_cumprod / torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
    scheduler = DDPMScheduler(trained_betas=betas.tolist(), prediction_type="v_prediction", clip_sample=False)
    return NoiseSchedule(scheduler, edm_timesteps=(sigmas.log() / 4).float())


def make_inference_scheduler(base_scheduler: SchedulerMixin, schedule: NoiseSchedule) -> SchedulerMixin:
    """The scheduler that is saved with the editor: the base's class with the noise schedule of training.

    A class without `rescale_betas_zero_snr` (PNDM) would sample with another schedule, so DDIM replaces it.
    """
    changes = {"prediction_type": schedule.prediction_type}
    scheduler_class = type(base_scheduler)
    if schedule.scheduler.config.rescale_betas_zero_snr:
        changes |= ZERO_SNR
        # Not by the configuration: it also holds keys of other classes, which the class ignores.
        if "rescale_betas_zero_snr" not in inspect.signature(scheduler_class.__init__).parameters:
            scheduler_class = DDIMScheduler
            changes |= {"clip_sample": False, "set_alpha_to_one": False}
    return scheduler_class.from_config(dict(base_scheduler.config), **changes)


def offset_noise(noise: torch.Tensor, channel_noise: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise (B, C, h, w) plus `strength` times one noise value per channel (B, C, 1, 1)."""
    return noise + strength * channel_noise if strength else noise


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
