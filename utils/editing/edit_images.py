"""Images and instructions -> edited images. Used by the edit service, by validation in training, and by calibration.

The result is that of diffusers' `StableDiffusionInstructPix2PixPipeline` and `StableDiffusionXLInstructPix2PixPipeline`
for the same seed, scheduler and settings. Unlike diffusers: only the guidance branches that are needed are evaluated
(utils/editing/guidance.py), every image has its own generator, images may differ in size, and the scheduler of the
pipeline is not changed.
"""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image, ImageOps

from utils.editing.encodings import Encodings, device_of, is_sdxl, vae_in_its_precision
from utils.editing.guidance import batch_coefficients, coefficients_of_steps
from utils.editing.sampling import denoise, fresh_scheduler
from utils.errors import InputError, is_out_of_memory
from utils.models.latents import unscale_latents

Editor = StableDiffusionInstructPix2PixPipeline | StableDiffusionXLInstructPix2PixPipeline
logger = logging.getLogger(__name__)
MAX_SIDES_RATIO = 4  # the longer side of an edited image, in multiples of the resolution
DECODED_PIXELS = 2**20  # decoded at once: four images of 512x512; a whole batch needs gigabytes


class OutOfMemory(InputError):
    """The images do not fit into the memory of the device at once."""


@dataclass(frozen=True)
class SamplingSettings:
    """The settings of diffusers' pipelines, by their names and with their meanings, and three more.

    guidance_scale, image_guidance_scale: one for all images, or one per image; negative_prompt: in place of the null
    prompt; eta: None is the scheduler's own default (TCD: 0.3); guidance_rescale: strength in [0, 1]
    (`guidance.rescale`); guidance_interval: (start, stop) as fractions of the steps, outside only the instruction is
    followed; scheduler: instead of the pipeline's.
    """

    num_inference_steps: int = 20
    guidance_scale: float | list[float] = 7.5
    image_guidance_scale: float | list[float] = 1.5
    negative_prompt: str | None = None
    eta: float | None = 0.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    scheduler: Any | None = None

    def list_scales(self, count: int) -> list[tuple[float, float]]:
        """The (text, image) guidance scales of each of `count` images. Raises ValueError on a mismatch."""
        given = (self.guidance_scale, self.image_guidance_scale)
        listed = [scale if isinstance(scale, list) else [scale] * count for scale in given]
        if any(len(scales) != count for scales in listed):
            raise ValueError(f"{count} images need {count} guidance scales of each kind, got {given[0]} and {given[1]}")
        return list(zip(*listed, strict=True))


DEFAULTS = SamplingSettings()


def fit_image(image: Image.Image, resolution: int, multiple: int = 64, crop: bool = True) -> Image.Image:
    """Resize and crop an image to a size that the model accepts, close to its aspect ratio.

    As in the original edit_cli.py: the longer side becomes `resolution`, the shorter side is rounded up to a multiple
    of 64 and the longer side, scaled with it, down to one; the rest is cropped evenly. Without `crop` the whole image
    is squeezed to that size instead, so that the edit can be resized to the input's size and matches it.
    multiple: 64 for Stable Diffusion, whose VAE and UNet halve the sides three times each (`size_multiple`).
    Raises InputError where a side would be longer than four times the resolution.
    """
    width, height = image.size
    short, long = min(width, height), max(width, height)
    # Integers: the floats of the original can lose a multiple of 64 by rounding.
    fitted_short = -(-short * resolution // (long * multiple)) * multiple
    fitted_long = long * fitted_short // short // multiple * multiple
    if fitted_long > MAX_SIDES_RATIO * max(resolution, multiple):
        raise InputError(
            f"the image is {width}x{height} pixels, too narrow to be edited at a resolution of {resolution}"
        )
    size = (fitted_short, fitted_long) if width < height else (fitted_long, fitted_short)
    if not crop:
        return image.resize(size, Image.Resampling.LANCZOS)
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def size_multiple(pipeline: Editor) -> int:
    """The number that divides the sides of an image: 2 for each halving by VAE and UNet (SD: 64)."""
    return pipeline.vae_scale_factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)


def native_resolution(pipeline: Editor) -> int:
    """The side in pixels of the square images that the UNet was trained on (SD 1.x: 512, SDXL: 1024)."""
    sample_size = pipeline.unet.config.sample_size or (128 if is_sdxl(pipeline) else 64)
    return pipeline.vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size))


def fit_to_model(image: Image.Image, pipeline: Editor, resolution: int | None = None, crop: bool = True) -> Image.Image:
    """`fit_image` for a model; the default resolution is the native one (SD 512 or 768, SDXL 1024), at most 1024."""
    return fit_image(image, resolution or min(1024, native_resolution(pipeline)), size_multiple(pipeline), crop)


def edit_images(
    pipeline: Editor,
    images: list[Image.Image],
    prompts: list[str],
    seeds: list[int],
    settings: SamplingSettings = DEFAULTS,
    **options: Any,
) -> list[Image.Image]:
    """Edit image i with instruction i; the edited images in the same order and of the same sizes.

    options: of `edit_pixels`. `image.info["flagged"]` is True if the safety checker replaced an image by a black one;
    "overflowed" is True if the model gave NaN, which is black.
    """
    edited = []
    for values, is_flagged in zip(*edit_pixels(pipeline, images, prompts, seeds, settings, **options), strict=True):
        # (3, H, W) in [0, 1] -> (H, W, 3) bytes, rounded as the pipelines do
        known = values.nan_to_num(0.0)
        edited.append(Image.fromarray((known.permute(1, 2, 0).numpy() * 255).round().astype("uint8")))
        edited[-1].info |= {"flagged": is_flagged, "overflowed": not torch.equal(known, values)}
    return edited


@torch.no_grad()  # not inference_mode: its tensors cannot be used in training afterwards
def edit_pixels(
    pipeline: Editor,
    images: list[Image.Image],
    prompts: list[str],
    seeds: list[int],
    settings: SamplingSettings = DEFAULTS,
    *,
    encodings: Encodings | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[list[torch.Tensor], list[bool]]:
    """The edited images as float32 (3, H, W) in [0, 1] on the CPU, and whether the safety checker replaced each.

    Pixels are NaN where the model overflows in its precision; an overflow of the VAE alone is repaired in float32.

    Images of one size are a batch; sides that are no multiple of the VAE's factor are rounded down to one. Seeds become
    CPU generators, so an edit depends neither on its batch nor on the device, and the global random state is not used.
    encodings: shared by several calls, so that each prompt and image is encoded once. on_step(done, total) is called
    after each denoising step; an exception that it raises ends the edit. Under autocast only the UNet is affected.
    Raises ValueError for lists of different lengths, InputError for an impossible number of steps, and OutOfMemory.
    """
    if not len(images) == len(prompts) == len(seeds):
        raise ValueError(f"got {len(images)} images, {len(prompts)} prompts and {len(seeds)} seeds: give one per image")
    if not images:
        return [], []
    scales = settings.list_scales(len(images))
    encodings = encodings or Encodings(pipeline)
    batches, steps_done = _group_by_size(images), itertools.count(1)
    edited: dict[int, tuple[torch.Tensor, bool]] = {}
    with _evaluating(pipeline), explaining_out_of_memory():
        embeds = encodings.encode_prompts(prompts, settings.negative_prompt, batch_coefficients(scales))
        for rows in batches:
            scheduler = settings.scheduler or pipeline.scheduler
            scheduler = fresh_scheduler(scheduler, settings.num_inference_steps, device_of(pipeline))
            total = len(batches) * len(scheduler.timesteps)
            image_latents = encodings.encode_images([images[row] for row in rows])  # (B, 4, h, w)
            height, width = (side * pipeline.vae_scale_factor for side in image_latents.shape[2:])
            coefficients = batch_coefficients([scales[row] for row in rows])
            latents = denoise(
                pipeline.unet,
                scheduler,
                {branch: embeds[branch].rows(rows) for branch in embeds},
                image_latents,
                (height, width),
                coefficients_of_steps(coefficients, len(scheduler.timesteps), settings.guidance_interval),
                [torch.Generator().manual_seed(seeds[row]) for row in rows],
                settings.eta,
                on_step and (lambda total=total: on_step(next(steps_done), total)),
                settings.guidance_rescale,
            )
            edited.update(zip(rows, _decode(pipeline, latents), strict=True))
    pipeline.maybe_free_model_hooks()  # frees the memory of a pipeline that is offloaded to the CPU
    return [edited[row][0] for row in sorted(edited)], [edited[row][1] for row in sorted(edited)]


def _decode(pipeline: Editor, latents: torch.Tensor) -> list[tuple[torch.Tensor, bool]]:
    """(B, 4, h, w) -> for each image the pixels (3, H, W) in [0, 1] and whether the safety checker flagged it."""
    pixels_each = latents.shape[2] * latents.shape[3] * pipeline.vae_scale_factor**2
    parts = latents.split(max(1, DECODED_PIXELS // pixels_each))
    return [decoded for part in parts for decoded in _decode_part(pipeline, part)]


def _decode_part(pipeline: Editor, latents: torch.Tensor) -> list[tuple[torch.Tensor, bool]]:
    """`_decode` of as many images as are decoded at once."""
    decoded = _run_decoder(pipeline, latents, in_float32=False)
    overflows = ~_are_finite(decoded) & _are_finite(latents)  # (B,)
    if overflows.any() and pipeline.vae.dtype != torch.float32:
        logger.warning("the VAE overflows in %s: decoding in float32", pipeline.vae.dtype)
        decoded = _run_decoder(pipeline, latents, in_float32=True)
    flags = None
    if hasattr(pipeline, "run_safety_checker"):  # the pipelines of SDXL have none
        decoded, flags = pipeline.run_safety_checker(decoded, latents.device, pipeline.text_encoder.dtype)
    flags = [bool(flag) for flag in flags] if flags is not None else [False] * len(decoded)
    if getattr(pipeline, "watermark", None) is not None:
        decoded = pipeline.watermark.apply_watermark(decoded)
    decoded = decoded.float().cpu()
    pixels = (decoded / 2 + 0.5).clamp(0, 1).where(decoded.isfinite(), torch.nan)
    if any(flags):
        logger.warning(
            "the safety checker flagged %d of %d edits and replaced them by black images", sum(flags), len(flags)
        )
        pixels[torch.tensor(flags)] = 0.0
    return list(zip(pixels, flags, strict=True))


def _are_finite(values: torch.Tensor) -> torch.Tensor:
    """(B, ...) -> (B,)."""
    return values.isfinite().flatten(1).all(1)


def _run_decoder(pipeline: Editor, latents: torch.Tensor, in_float32: bool) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    with vae_in_its_precision(pipeline, in_float32) as vae:
        unscaled = unscale_latents(latents.float(), vae.config).to(vae.dtype)
        return vae.decode(unscaled, return_dict=False)[0]


def _group_by_size(images: list[Image.Image]) -> list[list[int]]:
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    return list(groups.values())


@contextmanager
def explaining_out_of_memory(
    message: str = "out of memory: use fewer images at once, a lower resolution or half precision",
) -> Iterator[None]:
    """Raise OutOfMemory with `message` where the memory of the device or of the process is too small."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(message) from error


@contextmanager
def _evaluating(pipeline: Editor) -> Iterator[None]:
    """Evaluation mode, in which an adapter has no dropout; afterwards every module has its former mode."""
    models = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
    training = [module for model in models if model is not None for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
