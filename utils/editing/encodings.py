"""Encoded instructions and images of a run. Each is encoded once."""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL
from PIL import Image

from utils.editing.guidance import BRANCHES
from utils.models.conditioning import PromptEmbeds, PromptEncoder, make_prompt_encoder

logger = logging.getLogger(__name__)
HOOKS = {"_hf_hook", "_diffusers_hook"}  # attributes that accelerate and diffusers add to offloaded modules
IMAGE_MEMORY = 2**28  # bytes of image latents to keep: 4,000 images of SD 1.5 at 512 pixels in float32


class Encodings:
    """The encoded prompts and images of one pipeline. Create a new one when its VAE or text encoders change.

    encoder: of a training run; it has encoded the prompts already, and may be on another device than the UNet.
    """

    def __init__(self, pipeline: Any, encoder: PromptEncoder | None = None) -> None:
        self._pipeline, self._encoder, self._is_own = pipeline, encoder, encoder is None
        self._reported: set[str] = set()
        self._images: OrderedDict[tuple, torch.Tensor] = OrderedDict()  # (1, 4, h, w) each, on the UNet's device

    def encode_prompts(
        self, prompts: list[str], negative_prompt: str | None = None, branches: Collection[str] = BRANCHES
    ) -> dict[str, PromptEmbeds]:
        """Branch -> N rows for N prompts, on the UNet's device.

        The null prompt is encoded once, and only if a branch other than "text" is needed.
        """
        device = device_of(self._pipeline)
        with torch.autocast(device.type, enabled=False):  # the same embeddings inside and outside autocast
            if self._encoder is None:
                self._encoder = make_prompt_encoder(self._pipeline)
            encoder = self._encoder
            embeds = {"text": encoder(prompts)}
            if others := set(branches) - {"text"}:
                null = encoder.null_embeds if negative_prompt is None else encoder([negative_prompt])
                embeds |= dict.fromkeys(others, null.rows([0] * len(prompts)))
        for text in sorted(encoder.truncated - self._reported) if self._is_own else ():
            logger.warning("the instruction is too long for the text encoder, its end has no effect: %.60s...", text)
        self._reported |= encoder.truncated
        place = dict(device=device, dtype=encoder.text_encoders[-1].dtype)
        return {branch: values.to(**place) for branch, values in embeds.items()}

    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """B images of one size -> image latents (B, 4, h, w): the mode of the VAE's posterior (paper, section 3.2).

        Unscaled, except for CosXL editors. Encoded one by one, because the last bits would depend on the batch.
        """
        rows = []
        for image in images:
            rgb = image.convert("RGB")
            key = (rgb.size, hashlib.blake2b(rgb.tobytes()).digest())
            if key not in self._images:
                self._images[key] = _encode_image(self._pipeline, rgb)
            self._images.move_to_end(key)
            rows.append(self._images[key])
        while sum(latents.nbytes for latents in self._images.values()) > IMAGE_MEMORY:
            self._images.popitem(last=False)
        return torch.cat(rows)


def _encode_image(pipeline: Any, image: Image.Image) -> torch.Tensor:
    """(1, 4, h, w); in float32 where it overflows otherwise."""
    latents = _encode(pipeline, image, in_float32=False)
    if not latents.isfinite().all() and pipeline.vae.dtype != torch.float32:
        logger.warning("the VAE overflows in %s: encoding in float32", pipeline.vae.dtype)
        latents = _encode(pipeline, image, in_float32=True)
    return latents


def _encode(pipeline: Any, image: Image.Image, in_float32: bool) -> torch.Tensor:
    with vae_in_its_precision(pipeline, in_float32) as vae:
        pixels = pipeline.image_processor.preprocess([image]).to(device_of(pipeline), vae.dtype)  # in [-1, 1]
        encoded = vae.encode(pixels)
    # AutoencoderTiny has no posterior: it returns the latents.
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    latents = latents.to(pipeline.unet.dtype)
    return latents * vae.config.scaling_factor if getattr(pipeline, "is_cosxl_edit", False) else latents


def device_of(pipeline: Any) -> torch.device:
    """The device that the UNet runs on, also if it is offloaded.

    `_execution_device` alone follows the text encoders, which a training run may keep on the CPU.
    """
    # Hooks are on the model, its layers or its blocks; looking at all modules would take milliseconds per edit.
    unet = pipeline.unet
    modules = [unet, *unet.children(), *(block for part in unet.children() for block in part.children())]
    is_offloaded = any(not HOOKS.isdisjoint(vars(module)) for module in modules)
    return pipeline._execution_device if is_offloaded else pipeline.unet.device


def is_sdxl(pipeline: Any) -> bool:
    return getattr(pipeline, "text_encoder_2", None) is not None


def vae_overflows(pipeline: Any) -> bool:
    """Whether the VAE is known to overflow in the float16 that it has (SDXL's `force_upcast`)."""
    vae = pipeline.vae
    return is_sdxl(pipeline) and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)


@contextmanager
def vae_in_its_precision(pipeline: Any, in_float32: bool = False) -> Iterator[AutoencoderKL]:
    """The VAE outside autocast, in float32 on request and where it would overflow in float16."""
    vae, own = pipeline.vae, pipeline.vae.dtype
    is_raised = own != torch.float32 and (in_float32 or vae_overflows(pipeline))
    if is_raised:
        vae.to(torch.float32)
    try:
        with torch.autocast(device_of(pipeline).type, enabled=False):
            yield vae
    finally:
        if is_raised:
            vae.to(own)
