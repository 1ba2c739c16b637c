"""The loss of a batch: a pure function of the UNet's weights and the batch, which carries its own randomness."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL

from utils.models.conditioning import PromptEncoder, added_conditions, drop_images, drop_prompts, dropout_masks
from utils.models.latents import encode_moments, mode_of_original_latents, refuse_infinite, sample_edited_latents
from utils.models.noise_schedules import NoiseSchedule, ObjectiveOptions, min_snr_weights, offset_noise, per_sample_loss


@dataclass
class Objective:
    """The InstructPix2Pix objective (paper, equation 2) with conditioning dropout, of Stable Diffusion and of SDXL.

    condition_scale: factor of the image latents; 1 except for CosXL editors.
    """

    vae: AutoencoderKL
    encode_prompts: PromptEncoder
    schedule: NoiseSchedule
    options: ObjectiveOptions
    condition_scale: float = 1.0
    _is_vae_checked: bool = False

    def __call__(self, unet: torch.nn.Module, batch: dict) -> torch.Tensor:
        """Weighted loss of each sample, float32 (B,).

        batch (`data`): original_pixels and edited_pixels uint8 (B, 3, H, W), or the cached moments of both
        (B, 3C, h, w); prompts; timesteps (B,); noise and posterior_noise (B, C, h, w); offset_noise (B, C, 1, 1);
        dropout (B,) in [0, 1); original_sizes, crop_top_lefts and target_sizes (B, 2), for SDXL.
        """
        device = self.vae.device
        tensors = {name: value.to(device, non_blocking=True) for name, value in batch.items() if torch.is_tensor(value)}
        original_latents, edited_moments = self._encode(tensors)
        edited_latents = sample_edited_latents(edited_moments, tensors["posterior_noise"], self.vae.config)
        is_prompt_null, is_image_null = dropout_masks(tensors["dropout"], self.options.conditioning_dropout_prob)
        original_latents = drop_images(original_latents, is_image_null)
        embeds = self.encode_prompts(batch["prompts"])
        embeds = drop_prompts(embeds, self.encode_prompts.null_embeds, is_prompt_null)

        timesteps = tensors["timesteps"]
        noise = offset_noise(tensors["noise"], tensors["offset_noise"], self.options.noise_offset)
        noisy_latents = self.schedule.scheduler.add_noise(edited_latents, noise, timesteps)
        unet_input = torch.cat([noisy_latents, original_latents], dim=1)  # (B, 8, h, w)
        prediction = unet(
            unet_input,
            self.schedule.unet_timesteps(timesteps),
            encoder_hidden_states=embeds.hidden,
            added_cond_kwargs=added_conditions(embeds.pooled, self._time_ids(tensors)),
            return_dict=False,
        )[0]
        loss = per_sample_loss(prediction, self.schedule.make_target(edited_latents, noise, timesteps))
        return loss * self._weights(timesteps) if self.options.snr_gamma else loss

    @torch.no_grad()
    def encode(self, batch: dict) -> dict:
        """The batch with the moments of its images instead of their pixels, for several calls with the same images."""
        if "moments" in batch:
            return batch
        names = ("original_pixels", "edited_pixels")
        pixels = torch.cat([batch[name].to(self.vae.device, non_blocking=True) for name in names])
        original, edited = encode_moments(self.vae, pixels).chunk(2)
        moments = torch.cat([original.chunk(2, dim=1)[0], edited], dim=1)  # (B, 3C, h, w), as in the latent cache
        return {name: value for name, value in batch.items() if name not in names} | {"moments": moments}

    def _encode(self, tensors: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """(image latents (B, C, h, w), moments of the edited images (B, 2C, h, w)), encoded in one call."""
        if "moments" in tensors:
            channels = tensors["noise"].shape[1]
            mean, edited_moments = tensors["moments"].split((channels, 2 * channels), dim=1)
            return mean * self.condition_scale, edited_moments
        moments = encode_moments(self.vae, torch.cat([tensors["original_pixels"], tensors["edited_pixels"]]))
        if not self._is_vae_checked:  # once: it costs a host sync
            refuse_infinite(moments, self.vae)
            self._is_vae_checked = True
        original_moments, edited_moments = moments.chunk(2)
        return mode_of_original_latents(original_moments, self.condition_scale), edited_moments

    def _time_ids(self, tensors: dict) -> torch.Tensor:
        """SDXL's time ids, float32 (B, 6): each row's own sizes and crop, or the crop given by the flags."""
        crops = tensors["crop_top_lefts"].clone()
        for axis, given in enumerate((self.options.crops_coords_top_left_h, self.options.crops_coords_top_left_w)):
            if given is not None:
                crops[:, axis] = given
        return torch.cat([tensors["original_sizes"], crops, tensors["target_sizes"]], dim=1).float()

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        alphas_cumprod = self.schedule.scheduler.alphas_cumprod.to(timesteps.device)
        return min_snr_weights(alphas_cumprod, timesteps, self.options.snr_gamma, self.schedule.prediction_type)
