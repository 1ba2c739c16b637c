"""What an edit is conditioned on, encoded: instructions and images. A run keeps it, so that each is encoded once."""

from __future__ import annotations

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
HOOKS = {"_hf_hook", "_diffusers_hook"}  # of accelerate and diffusers, where a model is offloaded
IMAGE_MEMORY = 2**28  # bytes of image latents that a run keeps: 4,000 images of SD 1.5 at 512 in float32


class Encodings:
    """The encoded prompts and images of one pipeline, for as long as its encoders stay as they are.

    encoder: a training run's, which has the prompts already and may stand on another device than the UNet; None makes
    one of the pipeline, which spells textual inversions out.
    """

    def __init__(self, pipeline: Any, encoder: PromptEncoder | None = None) -> None:
        self._pipeline, self._encoder, self._is_own = pipeline, encoder, encoder is None
        self._told: set[str] = set()
        self._images: OrderedDict[tuple, torch.Tensor] = OrderedDict()  # (1, 4, h, w) each, on the UNet's device

    def encode_prompts(
        self, prompts: list[str], negative_prompt: str | None = None, branches: Collection[str] = BRANCHES
    ) -> dict[str, PromptEmbeds]:
        """What each branch is told, N rows for N prompts, on the UNet's device.

        The null prompt is encoded where a branch other than the text's is asked for, and then once.
        """
        device = device_of(self._pipeline)
        with torch.autocast(device.type, enabled=False):  # what is kept must not depend on who asked first
            if self._encoder is None:
                self._encoder = make_prompt_encoder(self._pipeline)
                self._encoder.tokenizers = [_SpellingTokenizer(self._pipeline, t) for t in self._encoder.tokenizers]
            encoder = self._encoder
            embeds = {"text": encoder(prompts)}
            if others := set(branches) - {"text"}:
                null = encoder.null_embeds if negative_prompt is None else encoder([negative_prompt])
                embeds |= dict.fromkeys(others, null.rows([0] * len(prompts)))
        for text in sorted(encoder.truncated - self._told) if self._is_own else ():
            logger.warning("longer than the text encoder reads, so its end has no effect: %.60s...", text)
        self._told |= encoder.truncated
        place = dict(device=device, dtype=encoder.text_encoders[-1].dtype)
        return {branch: values.to(**place) for branch, values in embeds.items()}

    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """B images of one size -> the image condition (B, 4, h, w).

        It is the mode of the VAE's posterior, unscaled (paper, section 3.2), but for CosXL editors. One image at a
        time: in a batch, its last bits would depend on its neighbours, and an edit on what it was batched with.
        """
        rows = []
        for image in images:
            picture = image.convert("RGB")
            key = (picture.size, hashlib.blake2b(picture.tobytes()).digest())
            if key not in self._images:
                self._images[key] = _encode_image(self._pipeline, picture)
            self._images.move_to_end(key)
            rows.append(self._images[key])
        while sum(latents.nbytes for latents in self._images.values()) > IMAGE_MEMORY:
            self._images.popitem(last=False)
        return torch.cat(rows)


def _encode_image(pipeline: Any, picture: Image.Image) -> torch.Tensor:
    with vae_in_its_precision(pipeline) as vae:
        pixels = pipeline.image_processor.preprocess([picture]).to(device_of(pipeline), vae.dtype)  # in [-1, 1]
        encoded = vae.encode(pixels)
    # AutoencoderTiny has no posterior, its latents are the answer.
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    latents = latents.to(pipeline.unet.dtype)
    return latents * vae.config.scaling_factor if getattr(pipeline, "is_cosxl_edit", False) else latents


def device_of(pipeline: Any) -> torch.device:
    """Where the UNet runs: with offloading its hooks know, else where it is.

    `_execution_device` alone would follow the text encoders, which a training run may keep on the CPU.
    """
    # Hooks stand on the model, its layers or its blocks: asking a thousand modules at each edit takes milliseconds.
    unet = pipeline.unet
    modules = [unet, *unet.children(), *(block for part in unet.children() for block in part.children())]
    hooked = any(not HOOKS.isdisjoint(vars(module)) for module in modules)
    return pipeline._execution_device if hooked else pipeline.unet.device


def is_sdxl(pipeline: Any) -> bool:
    return getattr(pipeline, "text_encoder_2", None) is not None


@contextmanager
def vae_in_its_precision(pipeline: Any) -> Iterator[AutoencoderKL]:
    """The VAE, out of autocast, and in float32 where it says that float16 is too narrow for it, as SDXL's own does."""
    vae = pipeline.vae
    is_narrow = is_sdxl(pipeline) and vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if is_narrow:
        vae.to(torch.float32)
    try:
        with torch.autocast(device_of(pipeline).type, enabled=False):
            yield vae
    finally:
        if is_narrow:
            vae.to(torch.float16)


class _SpellingTokenizer:
    """A tokenizer for prompts that name textual inversions: each stands for as many tokens as it was trained with."""

    def __init__(self, pipeline: Any, tokenizer: Any) -> None:
        self._convert, self._tokenizer = pipeline.maybe_convert_prompt, tokenizer
        self.model_max_length = tokenizer.model_max_length

    def __call__(self, prompt: str, **settings: Any) -> Any:
        return self._tokenizer(self._convert(prompt, self._tokenizer), **settings)
