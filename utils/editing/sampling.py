"""The denoising loop of an edit."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from utils.editing.guidance import Coefficients, combine, rescale
from utils.errors import InputError
from utils.models.conditioning import PromptEmbeds, added_conditions, concatenate


def denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    embeds: dict[str, PromptEmbeds],
    image_latents: torch.Tensor,
    image_size: tuple[int, int],
    coefficients: list[Coefficients],
    generators: list[torch.Generator],
    eta: float | None = 0.0,
    after_step: Callable[[], None] | None = None,
    guidance_rescale: float = 0.0,
) -> torch.Tensor:
    """The denoised latents (B, 4, h, w).

    embeds: branch -> B rows, for every branch in `coefficients`; image_latents (B, 4, h, w); image_size (height, width)
    in pixels, a condition of SDXL; coefficients: of the branches for each timestep of the scheduler (`guidance`);
    generators: one per image, on the CPU; eta: for schedulers that have it, None for their own default (TCD: 0.3).
    guidance_rescale: strength of `guidance.rescale` in the steps that evaluate the text branch and another one.
    The noise is drawn in the precision of the embeddings, as the pipelines do.
    """
    has_noise = "generator" in inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {"generator": generators} if has_noise else {}
    if takes_eta(scheduler) and eta is not None:
        extra["eta"] = eta
    noise_dtype = next(iter(embeds.values())).hidden.dtype
    shape = (1, *image_latents.shape[1:])
    noise = torch.cat([torch.randn(shape, generator=generator, dtype=noise_dtype) for generator in generators])
    latents = noise.to(image_latents.device).to(image_latents.dtype) * scheduler.init_noise_sigma  # (B, 4, h, w)
    conditions = {}  # set of branches -> the UNet's other inputs
    for timestep, weights in zip(scheduler.timesteps, coefficients, strict=True):
        branches = tuple(weights)
        if branches not in conditions:
            conditions[branches] = _make_conditions(branches, embeds, image_latents, image_size)
        images, hidden, added = conditions[branches]
        # The scheduler scales the noisy latents alone: the image latents stay as the VAE encoded them.
        noisy = scheduler.scale_model_input(latents, timestep).repeat(len(branches), 1, 1, 1)
        model_input = torch.cat([noisy.to(images.dtype), images], dim=1)  # (K*B, 8, h, w)
        predictions = unet(
            model_input, timestep, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        prediction = combine(predictions, weights)  # (B, 4, h, w)
        if guidance_rescale and branches[0] == "text" and len(branches) > 1:
            prediction = rescale(prediction, predictions[: len(prediction)], guidance_rescale)
        prediction = prediction.to(latents.dtype)  # under autocast it has half precision, the latents that of the UNet
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        if after_step:
            after_step()
    return latents


def _make_conditions(
    branches: tuple[str, ...], embeds: dict[str, PromptEmbeds], image_latents: torch.Tensor, image_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
    """The UNet's other inputs for K branches: image latents (K*B, 4, h, w), prompts, and SDXL's added conditions."""
    null_image = torch.zeros_like(image_latents)
    images = torch.cat([null_image if branch == "uncond" else image_latents for branch in branches])
    texts = concatenate([embeds[branch] for branch in branches]).to(images.dtype)
    # Original size, crop, target size. Unlike diffusers: in float32, as in training, because bfloat16 rounds the sizes.
    time_ids = torch.tensor([[*image_size, 0, 0, *image_size]], dtype=torch.float32, device=images.device)
    return images, texts.hidden, added_conditions(texts.pooled, time_ids.repeat(len(images), 1))


def takes_eta(scheduler: Any) -> bool:
    """Whether a scheduler adds the noise that eta sets (DDIM, TCD)."""
    return "eta" in inspect.signature(scheduler.step).parameters


def fresh_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device) -> Any:
    """A copy set to a number of steps, because schedulers have state and training may use the same one."""
    fresh = type(scheduler).from_config(scheduler.config)
    try:
        fresh.set_timesteps(num_inference_steps, device=device)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        name = type(fresh).__name__
        raise InputError(f"{num_inference_steps} steps are not possible with the scheduler {name}: {error}") from error
    return fresh
