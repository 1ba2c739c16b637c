"""Prompt embeddings equal the stock pipeline's; the conditioning dropout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline

from utils import conditioning
from utils.conditioning import PromptEncoder, drop_images, drop_prompts, dropout_masks
from utils.draws import sample_draws

PROMPTS = ["make it red", "", "a word " * 250, "ünïcödé 🙂 <|endoftext|>", "make it red"]


@pytest.fixture(scope="module")
def pipeline(tiny_editor: Path) -> StableDiffusionInstructPix2PixPipeline:
    return StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)


@pytest.fixture
def encoder(pipeline: StableDiffusionInstructPix2PixPipeline) -> PromptEncoder:
    return PromptEncoder(pipeline.tokenizer, pipeline.text_encoder)


@torch.no_grad()
def encode_as_the_pipeline(pipeline: StableDiffusionInstructPix2PixPipeline, prompt: str) -> tuple:
    """(prompt embeddings, null embeddings) of the stock pipeline, each (1, 77, D)."""
    prompt_embeds, null_embeds, null_again = pipeline._encode_prompt(prompt, torch.device("cpu"), 1, True).chunk(3)
    assert torch.equal(null_embeds, null_again)
    return prompt_embeds, null_embeds


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS[:4])
def test_embeddings_are_those_of_the_stock_pipeline(encoder, pipeline, prompt: str) -> None:
    prompt_embeds, null_embeds = encode_as_the_pipeline(pipeline, prompt)
    assert torch.equal(encoder([prompt]), prompt_embeds)
    assert torch.equal(encoder.null_embeds, null_embeds)
    assert encoder.null_embeds.shape == (1, 77, pipeline.text_encoder.config.hidden_size)


def test_embeddings_do_not_depend_on_the_batch_or_the_cache(encoder, pipeline) -> None:
    together = encoder(PROMPTS)
    again = encoder(PROMPTS[::-1]).flip(0)  # all from the cache
    alone = torch.cat([PromptEncoder(pipeline.tokenizer, pipeline.text_encoder)([prompt]) for prompt in PROMPTS])
    assert torch.equal(together, again)
    assert torch.equal(together, alone)
    assert not together.requires_grad


def test_a_small_cache_changes_nothing(encoder, pipeline, monkeypatch) -> None:
    roomy = [encoder([prompt, "other"]) for prompt in PROMPTS]
    monkeypatch.setattr(conditioning, "CACHED_PROMPTS", 1)
    forgetful = PromptEncoder(pipeline.tokenizer, pipeline.text_encoder)
    for prompt, expected in zip(PROMPTS, roomy, strict=True):
        assert torch.equal(forgetful([prompt, "other"]), expected)
        assert len(forgetful._cache) <= 2
    assert torch.equal(forgetful(PROMPTS), encoder(PROMPTS))  # a batch larger than the cache


def test_each_prompt_is_encoded_once(encoder, monkeypatch) -> None:
    encoded = []
    real = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda prompt: encoded.append(prompt) or real(prompt))
    encoder(["one", "two", "one"])
    encoder(["two", "three"])
    assert encoded == ["one", "two", "three"]


def test_long_prompts_are_noted(encoder) -> None:
    fits, long = "a" * 75, "a" * 76  # one token a letter, and two for start and end: 77 fit
    encoder([fits, long, "a word " * 250, long])
    assert encoder.truncated == {long, "a word " * 250}


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.25])
def test_dropout_at_its_boundaries(p: float) -> None:
    edges = torch.tensor([p, 2 * p, 3 * p], dtype=torch.float32)
    below = torch.nextafter(edges, torch.zeros(()))
    uniform = torch.stack([torch.zeros(()), below[0], edges[0], below[1], edges[1], below[2], edges[2], torch.ones(())])
    is_prompt_null, is_image_null = dropout_masks(uniform, p)
    assert is_prompt_null.tolist() == [True, True, True, True, False, False, False, False]
    assert is_image_null.tolist() == [False, False, True, True, True, True, False, False]


def test_no_dropout() -> None:
    is_prompt_null, is_image_null = dropout_masks(torch.tensor([0.0, 0.5]), 0.0)
    assert not is_prompt_null.any()
    assert not is_image_null.any()


def test_dropout_of_real_draws_has_the_shares_of_the_paper() -> None:
    uniform = torch.tensor([sample_draws(3, draw, (1, 1, 1), 1000)["u_dropout"] for draw in range(20_000)])
    is_prompt_null, is_image_null = (mask.numpy() for mask in dropout_masks(uniform.float(), 0.05))
    kinds = [is_prompt_null & ~is_image_null, is_image_null & ~is_prompt_null, is_prompt_null & is_image_null]
    assert np.mean(kinds, axis=1) == pytest.approx(0.05, abs=0.007)  # more than four standard errors


def test_dropped_samples_alone_are_changed() -> None:
    is_null = torch.tensor([True, False, True])
    embeds, null_embeds = torch.randn(3, 77, 8), torch.randn(1, 77, 8)
    dropped = drop_prompts(embeds, null_embeds, is_null)
    assert torch.equal(dropped, torch.stack([null_embeds[0], embeds[1], null_embeds[0]]))
    latents = torch.randn(3, 4, 2, 2)
    latents[0, 0, 0, 0] = torch.inf  # zeros, not zero times what was there
    assert torch.equal(
        drop_images(latents, is_null), torch.stack([torch.zeros(4, 2, 2), latents[1], torch.zeros(4, 2, 2)])
    )
