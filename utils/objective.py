"""The loss of a batch: a pure function of the UNet's weights and the batch, which carries its own randomness."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler

from utils.conditioning import PromptEncoder, drop_images, drop_prompts, dropout_masks
from utils.diffusion import ObjectiveOptions, make_target, min_snr_weights, offset_noise, per_sample_loss
from utils.latents import encode_moments, mode_of_original_latents, sample_edited_latents


@dataclass
class Objective:
    """The InstructPix2Pix objective (paper, equation 2) with conditioning dropout."""

    vae: AutoencoderKL
    encode_prompts: PromptEncoder
    schedule: DDPMScheduler
    options: ObjectiveOptions

    def __call__(self, unet: torch.nn.Module, batch: dict) -> torch.Tensor:
        """Weighted loss of each sample, float32 (B,).

        batch (utils/data.py): original_pixels and edited_pixels uint8 (B, 3, H, W), or the cached moments of both
        (B, 3C, h, w); prompts; timesteps (B,); noise and posterior_noise (B, C, h, w); offset_noise (B, C, 1, 1);
        dropout (B,) in [0, 1).
        """
        device = self.vae.device
        carried = {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}
        original_latents, edited_moments = self._encode(carried)
        edited_latents = sample_edited_latents(
            edited_moments, carried["posterior_noise"], self.vae.config.scaling_factor
        )
        is_prompt_null, is_image_null = dropout_masks(carried["dropout"], self.options.conditioning_dropout_prob)
        original_latents = drop_images(original_latents, is_image_null)
        prompt_embeds = drop_prompts(
            self.encode_prompts(batch["prompts"]), self.encode_prompts.null_embeds, is_prompt_null
        )  # (B, 77, D)

        timesteps = carried["timesteps"]
        noise = offset_noise(carried["noise"], carried["offset_noise"], self.options.noise_offset)
        noisy_latents = self.schedule.add_noise(edited_latents, noise, timesteps)
        unet_input = torch.cat([noisy_latents, original_latents], dim=1)  # (B, 8, h, w)
        prediction = unet(unet_input, timesteps, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
        loss = per_sample_loss(prediction, make_target(self.schedule, edited_latents, noise, timesteps))
        return loss * self._weights(timesteps) if self.options.snr_gamma else loss

    def _encode(self, carried: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(image condition (B, C, h, w), moments of the edited images (B, 2C, h, w)); one call encodes both images."""
        if "moments" in carried:
            channels = carried["noise"].shape[1]
            return carried["moments"].split((channels, 2 * channels), dim=1)
        moments = encode_moments(self.vae, torch.cat([carried["original_pixels"], carried["edited_pixels"]]))
        original_moments, edited_moments = moments.chunk(2)
        return mode_of_original_latents(original_moments), edited_moments

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        alphas_cumprod = self.schedule.alphas_cumprod.to(timesteps.device)
        return min_snr_weights(alphas_cumprod, timesteps, self.options.snr_gamma, self.schedule.config.prediction_type)
