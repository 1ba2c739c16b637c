"""Prompt embeddings, SDXL's added conditions, and the conditioning dropout that trains the unconditional branches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

GPU_BATCH = 64  # `PromptEncoder.batch_size` of training on a GPU
# Bytes of main memory for embeddings: 13,000 prompts of SDXL in 16 bits, 17,000 of SD 1.5.
PROMPT_CACHE_BYTES = 4 * 10**9


class PromptEmbeds(NamedTuple):
    """hidden (B, 77, D): input of the cross-attention; pooled (B, P): one vector per prompt, SDXL only."""

    hidden: torch.Tensor
    pooled: torch.Tensor | None = None

    def to(self, *args: Any, **kwargs: Any) -> PromptEmbeds:
        return PromptEmbeds(*(value if value is None else value.to(*args, **kwargs) for value in self))

    def rows(self, indices: list[int] | slice) -> PromptEmbeds:
        return PromptEmbeds(*(value if value is None else value[indices] for value in self))


def concatenate(embeds: list[PromptEmbeds]) -> PromptEmbeds:
    """One batch of all."""
    return PromptEmbeds(*(None if values[0] is None else torch.cat(values) for values in zip(*embeds, strict=True)))


class PromptEncoder:
    """Instructions => prompt embeddings, as the Stable Diffusion and SDXL pipelines compute them.

    tokenizers, text_encoders: one each for SD; two for SDXL, the second of which gives the pooled embeddings.
    zero_null: the null prompt is zeros (SDXL's `force_zeros_for_empty_prompt`) and not the encoded "".
    stored: gives the embeddings of prompts that are already encoded (`data/prompt_cache.py`), or None; asked first.
    Each other prompt is encoded once and cached on the CPU, up to `PROMPT_CACHE_BYTES`. Without `caches`, every call
    encodes its prompts on the device, and nothing waits for it: for a stream, or more prompts than the cache holds.
    batch_size: prompts that are encoded together, filled up to this number. With 1, the last bits do not depend on the
    other prompts; with more, on a prompt's place among them. One at a time leaves a GPU mostly idle.
    `truncated` collects the prompts that are longer than the text encoder's context; their end has no effect.
    """

    def __init__(
        self, tokenizers: list[CLIPTokenizer], text_encoders: list[CLIPTextModel], zero_null: bool = False
    ) -> None:
        self.tokenizers = tokenizers
        self.text_encoders = text_encoders
        self.truncated: set[str] = set()
        self.device = _device_of(text_encoders[0])
        self.caches, self.batch_size = True, 1
        self.stored: Callable[[list[str]], PromptEmbeds | None] | None = None
        self._zero_null = zero_null
        self._cache: OrderedDict[str, PromptEmbeds] = OrderedDict()  # batch size 1 each

    @cached_property
    def null_embeds(self) -> PromptEmbeds:
        """The null prompt, batch size 1, on `device`. Encoded on first use: editing without guidance never needs it."""
        return self.as_null(self.encode([""]))

    def as_null(self, encoded: PromptEmbeds) -> PromptEmbeds:
        """The null prompt's embeddings, where `encoded` is the encoded ""."""
        if not self._zero_null:
            return encoded
        return PromptEmbeds(*(value if value is None else torch.zeros_like(value) for value in encoded))

    def __call__(self, prompts: list[str]) -> PromptEmbeds:
        """Embeddings of B prompts, on `device`."""
        if self.stored and (embeds := self.stored(prompts)):
            return embeds
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        if missing and not self.caches:
            encoded = self.encode(distinct := list(dict.fromkeys(prompts)))
            return encoded.rows([distinct.index(prompt) for prompt in prompts])
        if missing:
            encoded = self.encode(missing).to("cpu")
            self._cache |= {prompt: encoded.rows([index]) for index, prompt in enumerate(missing)}
        for prompt in prompts:
            self._cache.move_to_end(prompt)
        embeds = concatenate([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > max(self.capacity, len(prompts)):
            self._cache.popitem(last=False)
        if self.device.type == "cuda":  # from pageable memory, the copy would wait for the GPU's work
            embeds = PromptEmbeds(*(value if value is None else value.pin_memory() for value in embeds))
        return embeds.to(self.device, non_blocking=True)

    @property
    def capacity(self) -> int:
        """Number of prompts that fit into the cache; all embeddings have the same size."""
        embeds = next(iter(self._cache.values()), None) or self.null_embeds
        return PROMPT_CACHE_BYTES // sum(value.nbytes for value in embeds if value is not None)

    def encode_all(self, prompts: Iterable[str], show_progress: bool = True) -> bool:
        """Encode the null prompt and all prompts of a run, then move the text encoders to the CPU.

        Returns False, and leaves the text encoders where they are, if the prompts do not fit into the cache; on a GPU,
        they are not cached then.
        """
        distinct = list(dict.fromkeys(prompts))
        _ = self.null_embeds
        if len(distinct) > self.capacity:
            self.caches = self.device.type != "cuda"
            return False
        with tqdm(
            total=len(distinct),
            desc="encoding prompts",
            unit="prompt",
            disable=not show_progress or len(distinct) < 100,
        ) as bar:
            for start in range(0, len(distinct), self.batch_size):
                self(distinct[start : start + self.batch_size])
                bar.update(min(self.batch_size, len(distinct) - start))
        for text_encoder in self.text_encoders:
            text_encoder.to("cpu")
        return True

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> PromptEmbeds:
        """Encode any number of prompts, in batches of one shape, and cache nothing."""
        parts = []
        for start in range(0, len(prompts), self.batch_size):
            own = prompts[start : start + self.batch_size]
            filled = self._encode_batch(own + own[-1:] * (self.batch_size - len(own)))
            parts.append(PromptEmbeds(*(value if value is None else value[: len(own)] for value in filled)))
        return concatenate(parts)

    def _encode_batch(self, prompts: list[str]) -> PromptEmbeds:
        with torch.autocast(_device_of(self.text_encoders[0]).type, enabled=False):  # the same bits in every caller
            pairs = zip(self.tokenizers, self.text_encoders, strict=True)
            outputs = [self._run(prompts, tokenizer, text_encoder) for tokenizer, text_encoder in pairs]
        if len(outputs) == 1:
            return PromptEmbeds(outputs[0][0]).to(self.device)
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return PromptEmbeds(hidden, outputs[-1][0]).to(self.device)

    def _run(self, prompts: list[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> Any:
        length = tokenizer.model_max_length
        lengths = map(len, tokenizer(prompts, verbose=False).input_ids)
        self.truncated |= {prompt for prompt, count in zip(prompts, lengths, strict=True) if count > length}
        inputs = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        inputs = inputs.to(_device_of(text_encoder))
        has_mask = getattr(text_encoder.config, "use_attention_mask", False) and len(self.text_encoders) == 1
        mask = inputs.attention_mask if has_mask else None
        return text_encoder(inputs.input_ids, attention_mask=mask, output_hidden_states=len(self.text_encoders) > 1)


def _device_of(module: torch.nn.Module) -> torch.device:
    """Where a model runs: one whose weights are loaded layer by layer (accelerate) has them on no device."""
    if module.device.type != "meta":
        return module.device
    devices = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in module.modules())
    return torch.device(next(device for device in devices if device is not None))


def make_prompt_encoder(model: Any) -> PromptEncoder:
    """The prompt encoder of a diffusers pipeline or of a `StableDiffusion`."""
    suffixes = [""] if getattr(model, "text_encoder_2", None) is None else ["", "_2"]
    config = getattr(model, "config", {})
    zero_null = config.get("force_zeros_for_empty_prompt", getattr(model, "force_zeros_for_empty_prompt", False))
    return PromptEncoder(
        [getattr(model, f"tokenizer{suffix}") for suffix in suffixes],
        [getattr(model, f"text_encoder{suffix}") for suffix in suffixes],
        zero_null=bool(zero_null) and len(suffixes) == 2,
    )


def added_conditions(pooled: torch.Tensor | None, time_ids: torch.Tensor | None) -> dict[str, torch.Tensor] | None:
    """`added_cond_kwargs` of SDXL's UNet: pooled (B, P) and time ids (B, 6); None for Stable Diffusion 1.x/2.x.

    Time ids: original size, top left corner of the crop, target size, each (height, width) (2307.01952, section 2.2).
    """
    return None if pooled is None else {"text_embeds": pooled, "time_ids": time_ids}


def dropout_masks(uniform: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples get the null prompt and which the null image: two bool tensors (B,). uniform: (B,) in [0, 1).

    The prompt is null for u < 2p and the image for p <= u < 3p: p each alone and p both (paper, section 3.2.1).
    """
    is_prompt_null = uniform < 2 * probability
    is_image_null = (uniform >= probability) & (uniform < 3 * probability)
    return is_prompt_null, is_image_null


def drop_prompts(embeds: PromptEmbeds, null_embeds: PromptEmbeds, is_null: torch.Tensor) -> PromptEmbeds:
    """Replace hidden and pooled embeddings by the null prompt's (batch size 1) where `is_null` (B,)."""
    hidden = torch.where(is_null[:, None, None], null_embeds.hidden.to(embeds.hidden.dtype), embeds.hidden)
    if embeds.pooled is None:
        return PromptEmbeds(hidden)
    pooled = torch.where(is_null[:, None], null_embeds.pooled.to(embeds.pooled.dtype), embeds.pooled)
    return PromptEmbeds(hidden, pooled)


def drop_images(original_latents: torch.Tensor, is_null: torch.Tensor) -> torch.Tensor:
    """Replace latents (B, C, h, w) by the null image, which is zeros, where `is_null` (B,)."""
    return original_latents.masked_fill(is_null[:, None, None, None], 0.0)
