"""Prompt embeddings, SDXL's added conditions, and the dropout that trains the unconditional branches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

PROMPT_MEMORY = 4 * 10**9  # bytes of main memory for embeddings: 13,000 prompts of SDXL in 16 bits, 17,000 of SD 1.5


class PromptEmbeds(NamedTuple):
    """hidden (B, 77, D), what the UNet attends to; pooled (B, P), one vector for the whole prompt, SDXL alone."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, *place: Any, **settings: Any) -> PromptEmbeds:
        return PromptEmbeds(*(value if value is None else value.to(*place, **settings) for value in self))

    def rows(self, indices: list[int]) -> PromptEmbeds:
        return PromptEmbeds(*(value if value is None else value[indices] for value in self))


def concatenate(embeds: list[PromptEmbeds]) -> PromptEmbeds:
    """One batch of all."""
    return PromptEmbeds(*(None if values[0] is None else torch.cat(values) for values in zip(*embeds, strict=True)))


class PromptEncoder:
    """Instructions => prompt embeddings, as the Stable Diffusion and SDXL pipelines encode them.

    tokenizers, text_encoders: one of each for SD; for SDXL two, of which the second gives the pooled embedding.
    Each distinct prompt is encoded once while all fit into `PROMPT_MEMORY`, where they wait on the CPU.
    The null prompt is what the pipeline uses for guidance: the encoded "", or zeros of both with `zero_null` (SDXL's
    `force_zeros_for_empty_prompt`). `truncated` holds the prompts that were longer than a text encoder reads; their
    tail has no effect.
    """

    def __init__(
        self, tokenizers: list[CLIPTokenizer], text_encoders: list[CLIPTextModel], zero_null: bool = False
    ) -> None:
        self.tokenizers = tokenizers
        self.text_encoders = text_encoders
        self.truncated: set[str] = set()
        self.device = text_encoders[0].device
        self._zero_null = zero_null
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()  # each of batch 1

    @cached_property
    def null_embeds(self) -> PromptEmbeds:
        """The null prompt, batch 1, on `device`; encoded when it is first asked for, which editing without guidance
        never does."""
        null = self._encode("")
        return PromptEmbeds(*map(_zeros_like, null)) if self._zero_null else null

    def __call__(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings of B prompts, on the device that the text encoders were on."""
        for prompt in prompts:
            if prompt not in self._cache:
                self._cache[prompt] = self._encode(prompt).to("cpu")
            self._cache.move_to_end(prompt)
        embeds = concatenate([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > max(self.capacity, len(prompts)):
            self._cache.popitem(last=False)
        return embeds.to(self.device, non_blocking=True)

    @property
    def capacity(self) -> int:
        """Prompts whose embeddings are kept; all have the size of any."""
        embeds = next(iter(self._cache.values()), None) or self.null_embeds
        return PROMPT_MEMORY // sum(value.nbytes for value in embeds if value is not None)

    def encode_all(self, prompts: Iterable[str], show_progress: bool = True) -> bool:
        """Encode every prompt of a run, the null prompt first, and send the encoders off their device.

        False where they are too many; the encoders stay then.
        """
        distinct = list(dict.fromkeys(prompts))
        _ = self.null_embeds
        if len(distinct) > self.capacity:
            return False
        for prompt in tqdm(distinct, desc="encoding", unit="prompt", disable=not show_progress or len(distinct) < 100):
            self([prompt])
        for text_encoder in self.text_encoders:
            text_encoder.to("cpu")
        return True

    @torch.no_grad()
    def _encode(self, prompt: str) -> PromptEmbeds:
        """One prompt at a time: in a batch, its last bits would depend on its neighbours, and resume on the cache."""
        pairs = zip(self.tokenizers, self.text_encoders, strict=True)
        with torch.autocast(self.text_encoders[0].device.type, enabled=False):  # else who asks first decides the bits
            outputs = [self._run(prompt, tokenizer, text_encoder) for tokenizer, text_encoder in pairs]
        if len(outputs) == 1:
            return PromptEmbeds(outputs[0][0]).to(self.device)
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return PromptEmbeds(hidden, outputs[-1][0]).to(self.device)

    def _run(self, prompt: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Any:
        length = tokenizer.model_max_length
        if len(tokenizer(prompt, verbose=False).input_ids) > length:
            self.truncated.add(prompt)
        inputs = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        inputs = inputs.to(text_encoder.device)
        has_mask = getattr(text_encoder.config, "use_attention_mask", False) and len(self.text_encoders) == 1
        mask = inputs.attention_mask if has_mask else None
        return text_encoder(inputs.input_ids, attention_mask=mask, output_hidden_states=len(self.text_encoders) > 1)


def _zeros_like(value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else torch.zeros_like(value)


def make_prompt_encoder(holder: Any) -> PromptEncoder:
    """The encoder of a pipeline, or of a `StableDiffusion`: whatever holds the components under diffusers' names."""
    suffixes = [""] if getattr(holder, "text_encoder_2", None) is None else ["", "_2"]
    config = getattr(holder, "config", {})
    zero_null = config.get("force_zeros_for_empty_prompt", getattr(holder, "force_zeros_for_empty_prompt", False))
    return PromptEncoder(
        [getattr(holder, f"tokenizer{suffix}") for suffix in suffixes],
        [getattr(holder, f"text_encoder{suffix}") for suffix in suffixes],
        zero_null=bool(zero_null) and len(suffixes) == 2,
    )


def added_conditions(pooled: torch.Tensor | None, time_ids: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
    """What SDXL's UNet takes beside the prompt: pooled (B, P) and time ids (B, 6); None for Stable Diffusion 1.x/2.x.

    Time ids: original size, top left corner of the crop, target size, each (height, width) (2307.01952, section 2.2).
    """
    return None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}


def dropout_masks(uniform: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples lose their prompt and which their image, from one uniform draw in [0, 1) each: two bools (B,).

    The prompt is null for u < 2p and the image for p <= u < 3p: p each alone and p both (paper, section 3.2.1).
    """
    is_prompt_null = uniform < 2 * probability
    is_image_null = (uniform >= probability) & (uniform < 3 * probability)
    return is_prompt_null, is_image_null


def drop_prompts(embeds: PromptEmbeds, null_embeds: PromptEmbeds, is_null: torch.Tensor) -> PromptEmbeds:
    """Put the null prompt (batch 1) in the place of the samples marked in `is_null` (B,): hidden and pooled both."""
    hidden = torch.where(is_null[:, None, None], null_embeds.hidden.to(embeds.hidden.dtype), embeds.hidden)
    if embeds.pooled is None:
        return PromptEmbeds(hidden)
    return PromptEmbeds(
        hidden, torch.where(is_null[:, None], null_embeds.pooled.to(embeds.pooled.dtype), embeds.pooled)
    )


def drop_images(original_latents: torch.Tensor, is_null: torch.Tensor) -> torch.Tensor:
    """A null image is zeros: latents (B, C, h, w), marks (B,)."""
    return original_latents.masked_fill(is_null[:, None, None, None], 0.0)
