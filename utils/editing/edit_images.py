"""Image + instruction -> edited image, batched. Used by infer.py, by validation during training and by evaluation.

The arithmetic is that of diffusers' `StableDiffusionInstructPix2PixPipeline` and
`StableDiffusionXLInstructPix2PixPipeline`, which serve as the holders of the components: for the same seed, scheduler
and settings the edit is the same. Unlike diffusers, only the guidance branches that count are evaluated
(utils/editing/guidance.py), a step draws from the given generators alone, images may differ in size, and the pipeline's
own scheduler is never touched.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image, ImageOps

from utils.editing.encodings import Encodings, device_of, is_sdxl, vae_in_its_precision
from utils.editing.guidance import batch_coefficients, coefficients_of_steps
from utils.editing.sampling import denoise, fresh_scheduler, make_generators
from utils.errors import InputError
from utils.models.conditioning import PromptEncoder
from utils.models.latents import unscale_latents

Editor = StableDiffusionInstructPix2PixPipeline | StableDiffusionXLInstructPix2PixPipeline
logger = logging.getLogger(__name__)
MAX_SIDES_RATIO = 4  # the longer side of an edited image, in multiples of the resolution


class OutOfMemory(InputError):
    """An edit that does not fit into the memory of its device: with fewer images at once it may."""


def fit_image(image: Image.Image, resolution: int, multiple: int = 64, crop: bool = True) -> Image.Image:
    """Resize and crop an image to sides that the model can take, keeping its aspect ratio as nearly as they allow.

    As in the original edit_cli.py: the longer side goes to `resolution`; then the shorter one is raised to a multiple
    of 64, the longer one grows with it and is lowered to one. What is left over is cropped evenly; Lanczos.
    Without `crop` all of the image is kept and is squeezed by that little, so that the edit can be brought to the
    input's own size again and lies on it.
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
    if not crop:
        return image.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def size_multiple(pipeline: Editor) -> int:
    """What the sides of an image must be a multiple of: every halving by the VAE and by the UNet (SD: 8 * 8 = 64)."""
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def native_resolution(pipeline: Editor) -> int:
    """The side, in pixels, of the square images that the model's UNet was made for (SD 1.x: 512, SDXL: 1024)."""
    sample_size = pipeline.unet.config.sample_size or (128 if is_sdxl(pipeline) else 64)
    return pipeline.vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size))


def fit_to_model(image: Image.Image, pipeline: Editor, resolution: int | None = None, crop: bool = True) -> Image.Image:
    """`fit_image` with the multiple of the model; the resolution is 512, for SDXL 1024, or the model's own if less."""
    default = min(1024 if is_sdxl(pipeline) else 512, native_resolution(pipeline))
    return fit_image(image, resolution or default, size_multiple(pipeline), crop)


def save_image(image: Image.Image, path: Path, **settings: Any) -> None:
    """Written beside its place and renamed into it: a file that stands is whole. Raises InputError, as on a full disk.

    The suffix decides the format; `settings` go to Pillow.
    """
    unfinished = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        image.save(unfinished, **{"quality": 95} | settings)
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
    guidance_scale: float | list[float] = 7.5,
    image_guidance_scale: float | list[float] = 1.5,
    seeds: list[int] | None = None,
    generators: list[torch.Generator] | None = None,
    negative_prompt: str | None = None,
    eta: float | None = 0.0,
    encode_prompts: PromptEncoder | None = None,
    on_step: Callable[[int, int], None] | None = None,
    guidance_interval: tuple[float, float] | None = None,
    scheduler: Any | None = None,
    encodings: Encodings | None = None,
) -> tuple[list[torch.Tensor], list[bool]]:
    """The edited images as float32 (3, H, W) in [0, 1] on the CPU, and whether the safety checker blacked each out.

    Images of one size form a batch. Each distinct prompt and image is encoded once, with `encodings` once for all calls
    that are given the same. One seed or generator for each image, so that an edit does not depend on what it is batched
    with; seeds become CPU generators, which draw the same on every device; without either the noise is fresh. The
    global random state is neither read nor changed. A guidance scale is one for all images, or a list of one for each.
    `negative_prompt` is the null prompt (default: the one of training). `eta` goes to the schedulers that know it: 0 as
    the pipelines give it, None is the scheduler's own default, which for TCD is 0.3. `guidance_interval` is the share
    of the steps, (start, stop) in [0, 1], in which guidance is on; outside it the UNet follows the instruction alone,
    in one branch. `scheduler` takes the place of the pipeline's. `encode_prompts` is a training run's encoder, which
    has the prompts already and may stand on another device than the UNet. `on_step(done, total)` is called after each
    denoising step; what it raises ends the edit. Works inside autocast, which the UNet alone follows; sides of an image
    that are no multiple of the VAE's factor are resized down to one.
    Raises ValueError for lists that do not match, InputError for a number of steps that the scheduler cannot do, and
    OutOfMemory.
    """
    if len(images) != len(prompts):
        raise ValueError(f"as many prompts as images are needed: got {len(images)} images, {len(prompts)} prompts")
    if not images:
        return [], []
    generators = make_generators(seeds, generators, len(images))
    scales = _list_scales(guidance_scale, image_guidance_scale, len(images))
    encodings = encodings or Encodings(pipeline, encode_prompts)
    batches, steps_done = _group_by_size(images), itertools.count(1)
    edited: dict[int, tuple[torch.Tensor, bool]] = {}
    with _evaluating(pipeline), _explaining_out_of_memory():
        embeds = encodings.encode_prompts(prompts, negative_prompt, batch_coefficients(scales))
        for rows in batches:
            fresh = fresh_scheduler(scheduler or pipeline.scheduler, num_inference_steps, device_of(pipeline))
            after_step = on_step and partial(_report, on_step, steps_done, len(batches) * len(fresh.timesteps))
            image_latents = encodings.encode_images([images[row] for row in rows])  # (B, 4, h, w)
            height, width = (side * pipeline.vae_scale_factor for side in image_latents.shape[2:])
            coefficients = batch_coefficients([scales[row] for row in rows])
            latents = denoise(
                pipeline.unet,
                fresh,
                {branch: embeds[branch].rows(rows) for branch in embeds},
                image_latents,
                (height, width),
                coefficients_of_steps(coefficients, len(fresh.timesteps), guidance_interval),
                [generators[row] for row in rows],
                eta,
                after_step,
            )
            edited.update(zip(rows, _decode(pipeline, latents), strict=True))
    pipeline.maybe_free_model_hooks()  # hands the memory back where the pipeline was set to offload to the CPU
    return [edited[row][0] for row in sorted(edited)], [edited[row][1] for row in sorted(edited)]


def _report(on_step: Callable[[int, int], None], steps_done: Iterator[int], total: int) -> None:
    on_step(next(steps_done), total)


def _list_scales(text: float | list[float], image: float | list[float], count: int) -> list[tuple[float, float]]:
    """The guidance scales (text, image) of each of `count` images. Raises ValueError on a mismatch."""
    listed = [scale if isinstance(scale, list) else [scale] * count for scale in (text, image)]
    if any(len(scales) != count for scales in listed):
        raise ValueError(f"{count} images need {count} guidance scales of each kind, got {', '.join(map(str, listed))}")
    return list(zip(*listed, strict=True))


def _decode(pipeline: Editor, latents: torch.Tensor) -> list[tuple[torch.Tensor, bool]]:
    """(B, 4, h, w) -> B times the pixels (3, H, W) in [0, 1] with whether the safety checker objected."""
    with vae_in_its_precision(pipeline) as vae:
        unscaled = unscale_latents(latents.float(), vae.config).to(vae.dtype)
        decoded = vae.decode(unscaled, return_dict=False)[0]  # (B, 3, H, W) in [-1, 1]
    flags = None
    if hasattr(pipeline, "run_safety_checker"):  # SDXL's pipelines have none
        decoded, flags = pipeline.run_safety_checker(decoded, latents.device, pipeline.text_encoder.dtype)
    flags = [bool(flag) for flag in flags] if flags is not None else [False] * len(decoded)
    if getattr(pipeline, "watermark", None) is not None:
        decoded = pipeline.watermark.apply_watermark(decoded)
    pixels = (decoded.float() / 2 + 0.5).clamp(0, 1).cpu()
    if not pixels.isfinite().all():
        logger.warning("the edit contains values that are no numbers: %s is too narrow here, try fp32", vae.dtype)
        pixels = pixels.nan_to_num(0.0)
    if any(flags):
        logger.warning("the safety checker objected to %d of %d edits, which are black now", sum(flags), len(flags))
        pixels[torch.tensor(flags)] = 0.0
    return list(zip(pixels, flags, strict=True))


def _group_by_size(images: list[Image.Image]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    return list(groups.values())


@contextmanager
def _explaining_out_of_memory() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError, and what the CPU and mps raise in its stead
        if not any(words in str(error) for words in ("out of memory", "not enough memory", "can't allocate memory")):
            raise
        raise OutOfMemory("out of memory: take fewer images at once, smaller ones, or half precision") from error


@contextmanager
def _evaluating(pipeline: Editor) -> Iterator[None]:
    """Evaluation mode, then each module back as it was: an adapter's dropout would disturb the edit and the RNG."""
    models = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
