"""Samples the two images of a pair side by side, from the same noise and with shared self-attention.

Unlike the pipelines of diffusers, each pair of a batch has its own seed, guidance scale and number of shared steps.
Latents and schedulers use float32 whatever the dtype of the UNet, so that the noise does not depend on it.
"""

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from data_preparation.pairs.prompt_to_prompt import shared_self_attention
from utils.editing.encodings import device_of, vae_in_its_precision
from utils.editing.sampling import fresh_scheduler
from utils.models.conditioning import PromptEmbeds, added_conditions, concatenate
from utils.models.latents import encode_moments, scale_latents, unscale_latents

DECODE_BATCH = 8  # images that the VAE decodes at once: its activations are much larger than those of the UNet


@dataclass(frozen=True)
class PairDraw:
    """The random values of a pair.

    share_steps: number of first steps with shared attention, computed from `threshold` if that was drawn; guidance: up
    to 1 is none.
    """

    seed: int
    share_steps: int
    guidance: float = 0.0
    threshold: float | None = None


@dataclass(frozen=True)
class PhotographStart:
    """Start both images of each pair from the noised latents of a photograph (SDEdit, 2108.01073).

    latents: (P, 4, h, w), scaled; num_steps: the last steps of the schedule, which run. keeps_photograph: the first
    image remains the photograph. At each step the UNet sees it with the noise of that step, which provides the queries
    and keys for the second image; the prediction for the first is replaced by the exact one. The second image then has
    the geometry of the photograph itself, not of a similar image.
    """

    latents: torch.Tensor
    num_steps: int
    keeps_photograph: bool = False

    def add_noise(self, scheduler: Any, noise: torch.Tensor) -> torch.Tensor:
        """The photographs with the noise of the first step, for both images of each pair: (2P, 4, h, w)."""
        skipped = scheduler.num_inference_steps - self.num_steps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)
        first = scheduler.timesteps[skipped : skipped + 1]
        return scheduler.add_noise(self.latents.repeat_interleave(2, dim=0), noise, first.repeat(len(noise)))

    def correct(
        self, scheduler: Any, prediction: torch.Tensor, model_input: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The prediction (2P, 4, h, w), exact for the first images if they remain the photographs."""
        if not self.keeps_photograph:
            return prediction
        signal, sigma = _noise_level(scheduler, timestep)
        noise = (model_input[::2] - signal * self.latents) / sigma
        targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * self.latents, "sample": self.latents}
        corrected = prediction.clone()
        corrected[::2] = targets[scheduler.config.prediction_type]
        return corrected


def _noise_level(scheduler: Any, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(signal, sigma) of the UNet input at a step: signal * latents + sigma * noise, with signal^2 + sigma^2 = 1."""
    if hasattr(scheduler, "is_scale_input_called"):  # the Euler family, whose latents are clean + sigma * noise
        ratio = scheduler.sigmas[scheduler.step_index]
        signal = (ratio**2 + 1) ** -0.5
        return signal, ratio * signal
    signal_power = scheduler.alphas_cumprod.to(timestep.device)[timestep.long()]
    return signal_power**0.5, (1 - signal_power) ** 0.5


class SampledPairs(NamedTuple):
    """latents: (2P, 4, h, w) float32, first and second image of each pair; unet_rows: rows that the UNet evaluated."""

    latents: torch.Tensor
    unet_rows: int


class Conditions(NamedTuple):
    """Inputs of the UNet for K branches: prompt embeddings, SDXL's conditions, guidance of a distilled UNet."""

    hidden: torch.Tensor  # (K * 2P, 77, D)
    added: dict[str, torch.Tensor] | None
    guidance: torch.Tensor | None  # (K * 2P, E)
    num_branches: int


@torch.no_grad()
def sample_pairs(
    pipeline: Any,
    scheduler: Any,
    num_inference_steps: int,
    texts: PromptEmbeds,
    null: PromptEmbeds,
    draws: list[PairDraw],
    resolution: int,
    start: PhotographStart | None = None,
) -> SampledPairs:
    """Denoise P pairs.

    texts: embeddings of 2P captions, first and second of each pair; null: 1 row; resolution: side in pixels. Both
    images of a pair have a CPU generator with the seed of the pair: the initial noise and that of each step (ancestral,
    LCM, TCD, SDE) is the same for both, and on every device. Raises InputError for steps that the scheduler does not
    support.
    """
    device = device_of(pipeline)
    scheduler = fresh_scheduler(scheduler, num_inference_steps, device)
    generators = [torch.Generator().manual_seed(draw.seed) for draw in draws for _ in range(2)]
    extra = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    side = resolution // pipeline.vae_scale_factor
    shape = (1, pipeline.vae.config.latent_channels, side, side)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(device)
    latents = start.add_noise(scheduler, noise) if start else noise * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps[num_inference_steps - start.num_steps if start else 0 :]
    scales = torch.tensor([draw.guidance for draw in draws for _ in range(2)], device=device)  # (2P,)
    conditions = _make_conditions(pipeline, texts, null, scales, resolution)
    with shared_self_attention(pipeline.unet) as sources:
        for step, timestep in enumerate(timesteps):
            sources.set([step < draw.share_steps for draw in draws], conditions.num_branches, device)
            model_input = scheduler.scale_model_input(latents, timestep)
            prediction = _predict(pipeline.unet, model_input, timestep, conditions, scales)
            if start:
                prediction = start.correct(scheduler, prediction, model_input, timestep)
            latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
    return SampledPairs(latents, len(timesteps) * len(latents) * conditions.num_branches)


def _predict(
    unet: Any, latents: torch.Tensor, timestep: torch.Tensor, conditions: Conditions, scales: torch.Tensor
) -> torch.Tensor:
    """The guided prediction (2P, 4, h, w) in float32."""
    predictions = unet(
        latents.to(unet.dtype).repeat(conditions.num_branches, 1, 1, 1),
        timestep,
        encoder_hidden_states=conditions.hidden,
        timestep_cond=conditions.guidance,
        added_cond_kwargs=conditions.added,
        return_dict=False,
    )[0].float()
    if conditions.num_branches == 1:
        return predictions
    uncond, text = predictions.chunk(2)
    return uncond + scales[:, None, None, None] * (text - uncond)


def _make_conditions(
    pipeline: Any, texts: PromptEmbeds, null: PromptEmbeds, scales: torch.Tensor, resolution: int
) -> Conditions:
    """Conditions of the branches [null, text], or of text only if no pair has guidance.

    A UNet distilled with guidance as an input (`time_cond_proj_dim`) gets the scale and needs no null branch.
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
    # Original size, crop, target size, in float32: half precision would round the sizes.
    size = (resolution, resolution)
    time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=unet.device)
    added = added_conditions(texts.pooled, time_ids.repeat(len(texts.hidden), 1))
    return Conditions(texts.hidden, added, guidance, 2 if is_guided else 1)


@torch.no_grad()
def encode_photograph(pipeline: Any, photograph: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) -> scaled latents (1, 4, h, w) in float32: the mode of the VAE posterior."""
    with vae_in_its_precision(pipeline) as vae:
        mode = encode_moments(vae, torch.from_numpy(photograph).permute(2, 0, 1)[None]).chunk(2, dim=1)[0]
        return scale_latents(mode, vae.config).to(device_of(pipeline))


@torch.no_grad()
def decode(pipeline: Any, latents: torch.Tensor) -> tuple[np.ndarray, list[bool]]:
    """Latents (N, 4, h, w) -> uint8 images (N, H, W, 3), and whether all values of each image were finite."""
    decoded, finite = [], []
    with vae_in_its_precision(pipeline) as vae:
        unscaled = unscale_latents(latents.float(), vae.config).to(vae.dtype)
        for part in unscaled.split(DECODE_BATCH):
            pixels = vae.decode(part, return_dict=False)[0].float()  # (n, 3, H, W) in [-1, 1]
            finite += pixels.isfinite().flatten(1).all(dim=1).tolist()
            pixels = (pixels.nan_to_num(0.0) / 2 + 0.5).clamp(0, 1) * 255
            decoded.append(pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(decoded).numpy(), finite
