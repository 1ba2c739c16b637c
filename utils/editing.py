"""Image + instruction -> edited image, batched. Used by infer.py, by validation during training and by evaluation.

The arithmetic is that of diffusers' `StableDiffusionInstructPix2PixPipeline`, which serves as the holder of the
components: for the same seed, scheduler and settings the edit is the same. Unlike diffusers, only the guidance
branches that count are evaluated (utils/guidance.py), a step draws from the given generators alone, images may differ
in size, and the pipeline's own scheduler is never touched.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline as Editor
from diffusers import UNet2DConditionModel
from PIL import Image, ImageOps

from utils.conditioning import PromptEncoder
from utils.errors import InputError
from utils.guidance import branch_coefficients, combine

logger = logging.getLogger(__name__)
MAX_SIDES_RATIO = 4  # the longer side of an edited image, in multiples of the resolution


def fit_image(image: Image.Image, resolution: int, multiple: int = 64) -> Image.Image:
    """Resize and crop an image to sides that the model can take, keeping its aspect ratio as nearly as they allow.

    As in the original edit_cli.py: the longer side goes to `resolution`; then the shorter one is raised to a multiple
    of 64, the longer one grows with it and is lowered to one. What is left over is cropped evenly; Lanczos.
    64 is what Stable Diffusion needs: its VAE halves the sides three times and its UNet three times more. `multiple`
    is that number for the model at hand (`size_multiple`), so that a small model can take small images.
    Raises InputError where a side would be more than four times the resolution (a strip, not a picture).
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    # Integers where the original has floats: there, 0.1 + 0.2 style rounding can lose a whole multiple of 64.
    fitted_short = -(-short * resolution // (long * multiple)) * multiple
    fitted_long = long * fitted_short // short // multiple * multiple
    if fitted_long > MAX_SIDES_RATIO * max(resolution, multiple):
        raise InputError(f"the image is {width}x{height} pixels, too long and thin to be edited at {resolution}")
    size = (fitted_short, fitted_long) if width < height else (fitted_long, fitted_short)
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def size_multiple(pipeline: Editor) -> int:
    """What the sides of an image must be a multiple of: every halving by the VAE and by the UNet (SD: 8 * 8 = 64)."""
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def native_resolution(pipeline: Editor) -> int:
    """The side, in pixels, of the square images that the model's UNet was made for (SD 1.x: 512)."""
    sample_size = pipeline.unet.config.sample_size or 64
    return pipeline.vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size))


def fit_to_model(image: Image.Image, pipeline: Editor, resolution: int | None = None) -> Image.Image:
    """`fit_image` with the multiple of the model; the resolution is 512, or the model's own where that is less."""
    return fit_image(image, resolution or min(512, native_resolution(pipeline)), size_multiple(pipeline))


def save_image(image: Image.Image, path: Path) -> None:
    """Written beside its place and renamed into it: a file that stands is whole. Raises InputError, as on a full disk.

    The suffix decides the format.
    """
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        image.save(unfinished, quality=95)
        unfinished.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


def edit_images(pipeline: Editor, images: list[Image.Image], prompts: list[str], **settings: Any) -> list[Image.Image]:
    """Edit image i by instruction i; the edited images in the same order and of the sizes given.

    `settings` are the keyword arguments of `edit_pixels`. Where the pipeline has a safety checker and it objects, the
    image comes back black, with `image.info["flagged"] = True`, and a warning is logged.
    """
    edited = []
    for pixels, is_flagged in zip(*edit_pixels(pipeline, images, prompts, **settings), strict=True):
        # (3, H, W) in [0, 1] -> (H, W, 3) bytes, rounded as the pipelines do
        edited.append(Image.fromarray((pixels.permute(1, 2, 0).numpy() * 255).round().astype("uint8")))
        edited[-1].info["flagged"] = is_flagged
    return edited


@torch.no_grad()  # not inference_mode: its tensors could not take part in training afterwards
def edit_pixels(
    pipeline: Editor,
    images: list[Image.Image],
    prompts: list[str],
    *,
    num_inference_steps: int = 20,
    guidance_scale: float = 7.5,
    image_guidance_scale: float = 1.5,
    seeds: list[int] | None = None,
    generators: list[torch.Generator] | None = None,
    negative_prompt: str | None = None,
    eta: float = 0.0,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[list[torch.Tensor], list[bool]]:
    """The edited images as float32 (3, H, W) in [0, 1] on the CPU, and whether the safety checker blacked each out.

    Images of one size form a batch. Each distinct prompt and image is encoded once. One seed or generator for each
    image, so that an edit does not depend on what it is batched with; seeds become CPU generators, which draw the same
    on every device; without either the noise is fresh. The global random state is neither read nor changed.
    `negative_prompt` (default "") is the null prompt. `eta` goes to the schedulers that know it (0, as the pipelines).
    `on_step(done, total)` is called after each denoising step. Works inside autocast; sides of an image that are no
    multiple of the VAE's factor are resized down to one. Raises ValueError for lists that do not match and InputError
    for a number of steps that the scheduler cannot do.
    """
    if len(images) != len(prompts):
        raise ValueError(f"as many prompts as images are needed: got {len(images)} images, {len(prompts)} prompts")
    if not images:
        return [], []
    generators = _make_generators(seeds, generators, len(images))
    coefficients = branch_coefficients(guidance_scale, image_guidance_scale)
    batches, steps_done = _group_by_size(images), itertools.count(1)
    edited: dict[int, tuple[torch.Tensor, bool]] = {}
    with _evaluating(pipeline.unet, pipeline.vae, pipeline.text_encoder), _explaining_out_of_memory():
        conditions = _encode_prompts(pipeline, prompts, negative_prompt or "", coefficients)
        for rows in batches:
            scheduler = _fresh_scheduler(pipeline, num_inference_steps)
            steps = len(batches) * len(scheduler.timesteps)
            after_step = (lambda total=steps: on_step(next(steps_done), total)) if on_step else None
            text_embeds = torch.cat([condition[row] for condition in conditions for row in rows])  # (K*B, 77, D)
            image_latents = _encode_images(pipeline, [images[row] for row in rows])  # (B, 4, h, w)
            noise_from = [generators[row] for row in rows]
            latents = _denoise(
                pipeline.unet, scheduler, text_embeds, image_latents, coefficients, noise_from, eta, after_step
            )
            edited.update(zip(rows, _decode(pipeline, latents), strict=True))
    pipeline.maybe_free_model_hooks()  # hands the memory back where the pipeline was set to offload to the CPU
    return [edited[row][0] for row in range(len(images))], [edited[row][1] for row in range(len(images))]


def _denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    text_embeds: torch.Tensor,
    image_latents: torch.Tensor,
    coefficients: dict[str, float],
    generators: list[torch.Generator],
    eta: float,
    after_step: Callable[[], None] | None,
) -> torch.Tensor:
    """The sampling loop: prompt embeddings of K branches (K*B, 77, D), image latents (B, 4, h, w) -> (B, 4, h, w)."""
    null_image = torch.zeros_like(image_latents)
    images = torch.cat([null_image if branch == "uncond" else image_latents for branch in coefficients])
    known = inspect.signature(scheduler.step).parameters
    extra = {name: value for name, value in (("eta", eta), ("generator", generators)) if name in known}

    latents = _draw_noise(generators, image_latents.shape[1:], text_embeds.dtype, image_latents.device)
    latents = latents.to(image_latents.dtype) * scheduler.init_noise_sigma  # (B, 4, h, w)
    text_embeds = text_embeds.to(images.dtype)
    for timestep in scheduler.timesteps:
        # Only the noisy half is scaled to the scheduler's taste: the image latents are always as the VAE gave them.
        noisy = scheduler.scale_model_input(latents, timestep).repeat(len(coefficients), 1, 1, 1)
        model_input = torch.cat([noisy.to(images.dtype), images], dim=1)  # (K*B, 8, h, w)
        predictions = unet(model_input, timestep, encoder_hidden_states=text_embeds, return_dict=False)[0]
        # Autocast predicts in half precision; the latents are carried in the UNet's own.
        prediction = combine(predictions, coefficients).to(latents.dtype)  # (B, 4, h, w)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        if after_step:
            after_step()
    return latents


def _fresh_scheduler(pipeline: Editor, num_inference_steps: int) -> Any:
    """A copy set to the number of steps: the pipeline's own may be in use for training, and many keep state."""
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    try:
        scheduler.set_timesteps(num_inference_steps, device=pipeline._execution_device)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        name = type(scheduler).__name__
        raise InputError(f"{num_inference_steps} steps cannot be done by this model's {name}: {error}") from error
    return scheduler


def _encode_prompts(
    pipeline: Editor,
    prompts: list[str],
    null_prompt: str,
    coefficients: dict[str, float],
) -> list[list[torch.Tensor]]:
    """For each branch, for each image, the prompt embedding (1, 77, D); each distinct text is encoded once."""
    encoder = PromptEncoder(pipeline.tokenizer, pipeline.text_encoder)

    def encode(texts: list[str]) -> list[torch.Tensor]:
        # A prompt may name a textual inversion, which stands for several tokens.
        texts = [pipeline.maybe_convert_prompt(text, pipeline.tokenizer) for text in texts]
        embeds = torch.cat([encoder([text]) if text else encoder.null_embeds for text in texts])
        return list(embeds.to(pipeline._execution_device, pipeline.text_encoder.dtype).split(1))

    null = encode([null_prompt]) * len(prompts)
    conditions = [encode(prompts) if branch == "text" else null for branch in coefficients]
    for text in encoder.truncated:
        logger.warning("longer than the text encoder reads, so its end has no effect: %.60s...", text)
    return conditions


def _encode_images(pipeline: Editor, images: list[Image.Image]) -> torch.Tensor:
    """B images of one size -> the mode of the VAE's posterior, unscaled (B, 4, h, w), each distinct image once."""
    distinct: dict[bytes, int] = {}
    pictures, rows = [], []
    for image in images:
        picture = image.convert("RGB")
        digest = hashlib.blake2b(picture.tobytes()).digest()
        if digest not in distinct:
            distinct[digest] = len(distinct)
            pictures.append(picture)
        rows.append(distinct[digest])
    vae, device = pipeline.vae, pipeline._execution_device
    pixels = pipeline.image_processor.preprocess(pictures).to(device, vae.dtype)  # (D, 3, H, W) in [-1, 1]
    encoded = vae.encode(pixels)
    # AutoencoderTiny has no posterior, its latents are the answer.
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents.to(pipeline.unet.dtype)[rows]


def _decode(pipeline: Editor, latents: torch.Tensor) -> list[tuple[torch.Tensor, bool]]:
    """(B, 4, h, w) -> B times the pixels (3, H, W) in [0, 1] with whether the safety checker objected."""
    vae = pipeline.vae
    decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]  # in [-1, 1]
    decoded, flags = pipeline.run_safety_checker(decoded, latents.device, pipeline.text_encoder.dtype)
    flags = [bool(flag) for flag in flags] if flags is not None else [False] * len(decoded)
    pixels = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()
    if not pixels.isfinite().all():
        logger.warning("the edit contains values that are no numbers: %s is too narrow here, try fp32", vae.dtype)
        pixels = pixels.nan_to_num(0.0)
    if any(flags):
        logger.warning("the safety checker objected to %d of %d edits, which are black now", sum(flags), len(flags))
        pixels[torch.tensor(flags)] = 0.0
    return list(zip(pixels, flags, strict=True))


def _make_generators(
    seeds: list[int] | None, generators: list[torch.Generator] | None, count: int
) -> list[torch.Generator]:
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


def _group_by_size(images: list[Image.Image]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    return list(groups.values())


@contextmanager
def _explaining_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("out of memory: take fewer images at once, smaller ones, or half precision") from error


@contextmanager
def _evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module back as it was: an adapter's dropout would disturb the edit and the RNG."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
