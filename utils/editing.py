"""Image + instruction -> edited image, batched. Used by infer.py, by validation during training and by evaluation.

The arithmetic is that of diffusers' `StableDiffusionInstructPix2PixPipeline` and
`StableDiffusionXLInstructPix2PixPipeline`, which serve as the holders of the components: for the same seed, scheduler
and settings the edit is the same. Unlike diffusers, only the guidance branches that count are evaluated
(utils/guidance.py), a step draws from the given generators alone, images may differ in size, and the pipeline's own
scheduler is never touched.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from PIL import Image, ImageOps

from utils.conditioning import PromptEmbeds, PromptEncoder, concatenate, make_prompt_encoder
from utils.errors import InputError
from utils.guidance import branch_coefficients
from utils.latents import unscale_latents
from utils.sampling import denoise, fresh_scheduler, make_generators

Editor = StableDiffusionInstructPix2PixPipeline | StableDiffusionXLInstructPix2PixPipeline
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
    """The side, in pixels, of the square images that the model's UNet was made for (SD 1.x: 512, SDXL: 1024)."""
    sample_size = pipeline.unet.config.sample_size or (128 if _is_sdxl(pipeline) else 64)
    return pipeline.vae_scale_factor * (sample_size if isinstance(sample_size, int) else max(sample_size))


def fit_to_model(image: Image.Image, pipeline: Editor, resolution: int | None = None) -> Image.Image:
    """`fit_image` with the multiple of the model; the resolution is 512, for SDXL 1024, or the model's own if less."""
    default = min(1024 if _is_sdxl(pipeline) else 512, native_resolution(pipeline))
    return fit_image(image, resolution or default, size_multiple(pipeline))


def _is_sdxl(pipeline: Editor) -> bool:
    return getattr(pipeline, "text_encoder_2", None) is not None


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
    encode_prompts: PromptEncoder | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[list[torch.Tensor], list[bool]]:
    """The edited images as float32 (3, H, W) in [0, 1] on the CPU, and whether the safety checker blacked each out.

    Images of one size form a batch. Each distinct prompt and image is encoded once. One seed or generator for each
    image, so that an edit does not depend on what it is batched with; seeds become CPU generators, which draw the same
    on every device; without either the noise is fresh. The global random state is neither read nor changed.
    `negative_prompt` is the null prompt (default: the one of training). `eta` goes to the schedulers that know it (0,
    as the pipelines). `encode_prompts` is a training run's encoder, which has the prompts already and may stand on
    another device than the UNet. `on_step(done, total)` is called after each denoising step. Works inside autocast,
    which the UNet alone follows; sides of an image that are no multiple of the VAE's factor are resized down to one.
    Raises ValueError for lists that do not match and InputError for a number of steps that the scheduler cannot do.
    """
    if len(images) != len(prompts):
        raise ValueError(f"as many prompts as images are needed: got {len(images)} images, {len(prompts)} prompts")
    if not images:
        return [], []
    generators = make_generators(seeds, generators, len(images))
    coefficients = branch_coefficients(guidance_scale, image_guidance_scale)
    batches, steps_done = _group_by_size(images), itertools.count(1)
    edited: dict[int, tuple[torch.Tensor, bool]] = {}
    models = [getattr(pipeline, name, None) for name in ("unet", "vae", "text_encoder", "text_encoder_2")]
    with _evaluating(*(model for model in models if model is not None)), _explaining_out_of_memory():
        texts, null = _encode_prompts(pipeline, prompts, negative_prompt, encode_prompts)
        for rows in batches:
            scheduler = fresh_scheduler(pipeline.scheduler, num_inference_steps, _device_of(pipeline))
            steps = len(batches) * len(scheduler.timesteps)
            after_step = (lambda total=steps: on_step(next(steps_done), total)) if on_step else None
            branches = [texts.rows(rows) if branch == "text" else null.rows([0] * len(rows)) for branch in coefficients]
            image_latents = _encode_images(pipeline, [images[row] for row in rows])  # (B, 4, h, w)
            height, width = (side * pipeline.vae_scale_factor for side in image_latents.shape[2:])
            latents = denoise(
                pipeline.unet, scheduler, concatenate(branches), image_latents, (height, width), coefficients,
                [generators[row] for row in rows], eta, after_step,
            )  # fmt: skip
            edited.update(zip(rows, _decode(pipeline, latents), strict=True))
    pipeline.maybe_free_model_hooks()  # hands the memory back where the pipeline was set to offload to the CPU
    return [edited[row][0] for row in range(len(images))], [edited[row][1] for row in range(len(images))]


def _device_of(pipeline: Editor) -> torch.device:
    """Where the UNet runs: with offloading its hooks know, else where it is.

    `_execution_device` alone would follow the text encoders, which a training run may keep on the CPU.
    """
    hooked = any(
        hasattr(module, hook) for module in pipeline.unet.modules() for hook in ("_hf_hook", "_diffusers_hook")
    )
    return pipeline._execution_device if hooked else pipeline.unet.device


class _SpellingTokenizer:
    """A tokenizer for prompts that name textual inversions: each stands for as many tokens as it was trained with."""

    def __init__(self, pipeline: Editor, tokenizer: Any) -> None:
        self._convert, self._tokenizer = pipeline.maybe_convert_prompt, tokenizer
        self.model_max_length = tokenizer.model_max_length

    def __call__(self, prompt: str, **settings: Any) -> Any:
        return self._tokenizer(self._convert(prompt, self._tokenizer), **settings)


def _encode_prompts(
    pipeline: Editor, prompts: list[str], negative_prompt: str | None, encoder: PromptEncoder | None
) -> tuple[PromptEmbeds, PromptEmbeds]:
    """Embeddings of the N prompts and of the null prompt (1 row), on the UNet's device."""
    device = _device_of(pipeline)
    with torch.autocast(device.type, enabled=False):  # what a run's encoder keeps must not depend on who asked first
        is_own = encoder is None
        if is_own:
            encoder = make_prompt_encoder(pipeline)
            encoder.tokenizers = [_SpellingTokenizer(pipeline, tokenizer) for tokenizer in encoder.tokenizers]
        texts = encoder(prompts)
        null = encoder.null_embeds if negative_prompt is None else encoder([negative_prompt])
    for text in encoder.truncated if is_own else ():
        logger.warning("longer than the text encoder reads, so its end has no effect: %.60s...", text)
    place = dict(device=device, dtype=encoder.text_encoders[-1].dtype)
    return texts.to(**place), null.to(**place)


def _encode_images(pipeline: Editor, images: list[Image.Image]) -> torch.Tensor:
    """B images of one size -> the image condition (B, 4, h, w), each distinct image encoded once.

    It is the mode of the VAE's posterior, unscaled (paper, section 3.2), but for CosXL editors.
    """
    distinct: dict[bytes, int] = {}
    pictures, rows = [], []
    for image in images:
        picture = image.convert("RGB")
        digest = hashlib.blake2b(picture.tobytes()).digest()
        if digest not in distinct:
            distinct[digest] = len(distinct)
            pictures.append(picture)
        rows.append(distinct[digest])
    device = _device_of(pipeline)
    with _in_its_precision(pipeline) as vae:
        pixels = pipeline.image_processor.preprocess(pictures).to(device, vae.dtype)  # (D, 3, H, W) in [-1, 1]
        encoded = vae.encode(pixels)
    # AutoencoderTiny has no posterior, its latents are the answer.
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    latents = latents.to(pipeline.unet.dtype)[rows]
    return latents * vae.config.scaling_factor if getattr(pipeline, "is_cosxl_edit", False) else latents


def _decode(pipeline: Editor, latents: torch.Tensor) -> list[tuple[torch.Tensor, bool]]:
    """(B, 4, h, w) -> B times the pixels (3, H, W) in [0, 1] with whether the safety checker objected."""
    with _in_its_precision(pipeline) as vae:
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


@contextmanager
def _in_its_precision(pipeline: Editor) -> Iterator[AutoencoderKL]:
    """The VAE, out of autocast, and in float32 where it says that float16 is too narrow for it, as SDXL's own does."""
    vae = pipeline.vae
    is_narrow = _is_sdxl(pipeline) and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if is_narrow:
        vae.to(torch.float32)
    try:
        with torch.autocast(_device_of(pipeline).type, enabled=False):
            yield vae
    finally:
        if is_narrow:
            vae.to(torch.float16)


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
