"""The denoising loop of an edit: noise from each image's own generator, a scheduler of its own, the guided UNet."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from utils.editing.guidance import Coefficients, combine
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
) -> torch.Tensor:
    """The denoised latents (B, 4, h, w).

    embeds: for each branch that occurs in `coefficients` B rows; coefficients: the weights of the branches for each of
    the scheduler's timesteps (`guidance`); image_latents (B, 4, h, w); image_size (height, width) in pixels,
    which SDXL is told. `eta` goes to the schedulers that know it; None leaves them their own default (TCD: 0.3).
    The noise is drawn in the precision of the embeddings, as the pipelines do.
    """
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in known else {}
    if "eta" in known and eta is not None:
        extra["eta"] = eta
    noise_dtype = next(iter(embeds.values())).hidden.dtype
    latents = _draw_noise(generators, image_latents.shape[1:], noise_dtype, image_latents.device)
    latents = latents.to(image_latents.dtype) * scheduler.init_noise_sigma  # (B, 4, h, w)
    conditions = {}  # of each set of branches
    for timestep, weights in zip(scheduler.timesteps, coefficients, strict=True):
        branches = tuple(weights)
        if branches not in conditions:
            conditions[branches] = _make_conditions(branches, embeds, image_latents, image_size)
        images, hidden, added = conditions[branches]
        # Only the noisy half is scaled to the scheduler's taste: the image latents are always as the VAE gave them.
        noisy = scheduler.scale_model_input(latents, timestep).repeat(len(branches), 1, 1, 1)
        model_input = torch.cat([noisy.to(images.dtype), images], dim=1)  # (K*B, 8, h, w)
        predictions = unet(
            model_input, timestep, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        # Autocast predicts in half precision; the latents are carried in the UNet's own.
        prediction = combine(predictions, weights).to(latents.dtype)  # (B, 4, h, w)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        if after_step:
            after_step()
    return latents


def _make_conditions(
    branches: tuple[str, ...], embeds: dict[str, PromptEmbeds], image_latents: torch.Tensor, image_size: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
    """What the UNet is told beside the noisy latents, K*B rows: images (K*B, 4, h, w), prompts, SDXL's additions."""
    null_image = torch.zeros_like(image_latents)
    images = torch.cat([null_image if branch == "uncond" else image_latents for branch in branches])
    texts = concatenate([embeds[branch] for branch in branches]).to(images.dtype)
    # Unlike diffusers: in float32, as in training, and not in the model's precision, where bfloat16 rounds the sizes.
    time_ids = torch.tensor([[*image_size, 0, 0, *image_size]], dtype=torch.float32, device=images.device)
    # original size, crop, target size
    return images, texts.hidden, added_conditions(texts.pooled, time_ids.repeat(len(images), 1))


def fresh_scheduler(scheduler: Any, num_inference_steps: int, device: torch.device) -> Any:
    """A copy set to the number of steps: the pipeline's own may be in use for training, and many keep state."""
    fresh = type(scheduler).from_config(scheduler.config)
    try:
        fresh.set_timesteps(num_inference_steps, device=device)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        name = type(fresh).__name__
        raise InputError(f"{num_inference_steps} steps cannot be done by this model's {name}: {error}") from error
    return fresh


def make_generators(
    seeds: list[int] | None, generators: list[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """One generator for each of `count` images; fresh ones where neither is given. Raises ValueError on a mismatch."""
    if seeds is not None and generators is not None:
        raise ValueError("give seeds or generators, not both")
    given = seeds if seeds is not None else generators
    if given is not None and len(given) != count:
        raise ValueError(f"{count} images need {count} seeds or generators, got {len(given)}")
    if seeds is not None:
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if generators is not None:
        return generators
    fresh = [torch.Generator() for _ in range(count)]
    for generator in fresh:
        generator.seed()  # from the operating system; a new generator always starts at the same number
    return fresh


def _draw_noise(
    generators: list[torch.Generator], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """One draw of `shape` from each generator, on the generator's device -> (B, *shape) on `device`."""
    draws = [torch.randn((1, *shape), generator=g, device=g.device, dtype=dtype) for g in generators]
    return torch.cat(draws).to(device)
