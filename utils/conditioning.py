"""Prompt embeddings, and the dropout that trains the unconditional branches."""

from __future__ import annotations

from collections import OrderedDict

import torch
from transformers import CLIPTextModel, CLIPTokenizer

CACHED_PROMPTS = 4096  # about 0.5 GB of float32 embeddings of SD 1.5


class PromptEncoder:
    """Instructions => prompt embeddings (B, 77, D), as the Stable Diffusion pipelines encode them.

    Each distinct prompt is encoded once while it stays among the last `CACHED_PROMPTS`. The null prompt is the encoded
    "", which is what the pipeline uses for guidance. `truncated` holds the prompts that were longer than the text
    encoder reads; their tail has no effect.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.truncated: set[str] = set()
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()  # each (1, 77, D)
        self.null_embeds = self._encode("")  # (1, 77, D)

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        for prompt in prompts:
            if prompt not in self._cache:
                self._cache[prompt] = self._encode(prompt)
            self._cache.move_to_end(prompt)
        embeds = torch.cat([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > max(CACHED_PROMPTS, len(prompts)):
            self._cache.popitem(last=False)
        return embeds

    @torch.no_grad()
    def _encode(self, prompt: str) -> torch.Tensor:
        """One prompt at a time: in a batch, its last bits would depend on its neighbours, and resume on the cache."""
        length = self.tokenizer.model_max_length
        if len(self.tokenizer(prompt, verbose=False).input_ids) > length:
            self.truncated.add(prompt)
        inputs = self.tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.text_encoder.device)
        has_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self.text_encoder(inputs.input_ids, attention_mask=inputs.attention_mask if has_mask else None)[0]


def dropout_masks(uniform: torch.Tensor, probability: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples lose their prompt and which their image, from one uniform draw in [0, 1) each: two bools (B,).

    The prompt is null for u < 2p and the image for p <= u < 3p: p each alone and p both (paper, section 3.2.1).
    """
    is_prompt_null = uniform < 2 * probability
    is_image_null = (uniform >= probability) & (uniform < 3 * probability)
    return is_prompt_null, is_image_null


def drop_prompts(prompt_embeds: torch.Tensor, null_embeds: torch.Tensor, is_null: torch.Tensor) -> torch.Tensor:
    """Put the null prompt (1, L, D) in the place of the samples marked in `is_null` (B,); embeds (B, L, D)."""
    return torch.where(is_null[:, None, None], null_embeds.to(prompt_embeds.dtype), prompt_embeds)


def drop_images(original_latents: torch.Tensor, is_null: torch.Tensor) -> torch.Tensor:
    """A null image is zeros: latents (B, C, h, w), marks (B,)."""
    return original_latents.masked_fill(is_null[:, None, None, None], 0.0)
