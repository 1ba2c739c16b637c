"""Image pairs from pairs of captions: two images of one noise, denoised side by side with shared self-attention.

Unlike diffusers' pipelines: many pairs in a batch, each with a seed, a guidance scale and a number of shared steps of
its own; the latents and the schedulers' arithmetic are in float32 whatever the UNet runs in, so that the noise is the
same in every precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from data_preparation.pairs.photograph_start import PhotographStart
from data_preparation.pairs.prompt_to_prompt import Sharing, sharing_self_attention
from utils.editing.encodings import device_of, vae_in_its_precision
from utils.editing.sampling import fresh_scheduler
from utils.models.conditioning import PromptEmbeds, added_conditions, concatenate
from utils.models.latents import unscale_latents

DECODE_BATCH = 8  # images that the VAE decodes at once: its activations are far larger than the UNet's


@dataclass(frozen=True)
class PairDraw:
    """What is drawn for a pair. guidance: up to 1 is none; share_steps: the first steps in which it shares."""

    seed: int
    share_steps: int
    guidance: float = 0.0


class Sampled(NamedTuple):
    """latents (2P, 4, h, w) float32, of each pair first and second image; unet_rows: rows that the UNet evaluated."""

    latents: torch.Tensor
    unet_rows: int


class Conditions(NamedTuple):
    """What the UNet is told beside the latents: prompts, SDXL's additions, the guidance of a distilled UNet."""

    hidden: torch.Tensor  # (K*2P, 77, D)
    added: dict[str, torch.Tensor] | None
    guidance: torch.Tensor | None  # (K*2P, E)


@torch.no_grad()
def sample_pairs(
    pipeline: Any,
    scheduler: Any,
    num_inference_steps: int,
    texts: PromptEmbeds,
    null: PromptEmbeds,
    draws: list[PairDraw],
    size: tuple[int, int],
    start: PhotographStart | None = None,
    after_step: Callable[[torch.Tensor], None] | None = None,
) -> Sampled:
    """Denoise P pairs.

    texts: embeddings of 2P captions, of each pair first and second; null: 1 row; size: (height, width) in pixels.
    Both images of a pair have generators with the pair's seed, so that initial noise and the noise of every step
    (ancestral, LCM, TCD, SDE) are the same. The generators are the CPU's, which draw the same for every device.
    `start` begins with photographs in place of noise. `after_step` sees the latents (2P, 4, h, w) after each step.
    Raises InputError for steps that the scheduler cannot do.
    """
    device = device_of(pipeline)
    scheduler = fresh_scheduler(scheduler, num_inference_steps, device)
    generators = [torch.Generator().manual_seed(draw.seed) for draw in draws for _ in range(2)]
    known = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in known else {}
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.vae.config.latent_channels, size[0] // factor, size[1] // factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    latents = start.begin(scheduler, noise) if start else noise * scheduler.init_noise_sigma
    timesteps = start.timesteps(scheduler) if start else scheduler.timesteps
    scales = torch.tensor([draw.guidance for draw in draws for _ in range(2)], device=device)  # (2P,)
    conditions, num_branches = _make_conditions(pipeline, texts, null, scales, size)
    unet_rows = 0
    with sharing_self_attention(pipeline.unet) as sharing:
        for step, timestep in enumerate(timesteps):
            _share(sharing, draws, step, num_branches, device)
            model_input = scheduler.scale_model_input(latents, timestep)
            prediction = _predict(pipeline.unet, model_input, timestep, conditions, num_branches, scales)
            unet_rows += len(latents) * num_branches
            if start:
                prediction = start.correct(scheduler, prediction, model_input, timestep)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
            if after_step:
                after_step(latents)
    return Sampled(latents, unet_rows)


def _share(sharing: Sharing, draws: list[PairDraw], step: int, num_branches: int, device: torch.device) -> None:
    sharing.set([step < draw.share_steps for draw in draws], num_branches, device)


def _predict(
    unet: Any,
    latents: torch.Tensor,
    timestep: torch.Tensor,
    conditions: Conditions,
    num_branches: int,
    scales: torch.Tensor,
) -> torch.Tensor:
    """The guided prediction (2P, 4, h, w) in float32."""
    predictions = unet(
        latents.to(unet.dtype).repeat(num_branches, 1, 1, 1),
        timestep,
        encoder_hidden_states=conditions.hidden,
        timestep_cond=conditions.guidance,
        added_cond_kwargs=conditions.added,
        return_dict=False,
    )[0].float()
    if num_branches == 1:
        return predictions
    uncond, text = predictions.chunk(2)
    return uncond + scales[:, None, None, None] * (text - uncond)


def _make_conditions(
    pipeline: Any, texts: PromptEmbeds, null: PromptEmbeds, scales: torch.Tensor, size: tuple[int, int]
) -> tuple[Conditions, int]:
    """The conditions, and of how many branches they are: [null, text], or text alone where no pair is guided.

    A UNet that was distilled with guidance as an input (`time_cond_proj_dim`) is told the scale, and needs no branch.
    """
    unet, guidance = pipeline.unet, None
    distilled_width = unet.config.get("time_cond_proj_dim")
    is_guided = bool((scales > 1).any()) and distilled_width is None
    if is_guided:
        texts = concatenate([null.rows([0] * len(scales)), texts])
    texts = texts.to(unet.device, unet.dtype)
    if distilled_width is not None:
        guidance = pipeline.get_guidance_scale_embedding(scales.cpu() - 1, embedding_dim=distilled_width)
        guidance = guidance.to(unet.device, unet.dtype)
    # original size, crop, target size; in float32, as half precision would round the sizes
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=unet.device)
    added = added_conditions(texts.pooled, time_ids.repeat(len(texts.hidden), 1))
    return Conditions(texts.hidden, added, guidance), 2 if is_guided else 1


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> tuple[np.ndarray, list[bool]]:
    """Latents (N, 4, h, w) -> uint8 pixels (N, H, W, 3), and whether all values of each were finite numbers."""
    decoded, finite = [], []
    with vae_in_its_precision(pipeline) as vae:
        unscaled = unscale_latents(latents.float(), vae.config).to(vae.dtype)
        for part in unscaled.split(DECODE_BATCH):
            pixels = vae.decode(part, return_dict=False)[0].float()  # (n, 3, H, W) in [-1, 1]
            finite += pixels.isfinite().flatten(1).all(dim=1).tolist()
            pixels = (pixels.nan_to_num(0.0) / 2 + 0.5).clamp(0, 1) * 255
            decoded.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(decoded).numpy(), finite
