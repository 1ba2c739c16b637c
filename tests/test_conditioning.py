"""Prompt embeddings equal those of the stock pipelines of SD and SDXL; conditioning dropout."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)

from utils.data.draws import sample_draws
from utils.models import conditioning
from utils.models.conditioning import (
    PromptEmbeds,
    PromptEncoder,
    added_conditions,
    concatenate,
    drop_images,
    drop_prompts,
    dropout_masks,
    make_prompt_encoder,
)

PROMPTS = ["make it red", "", "a word " * 250, "ünïcödé 🙂 <|endoftext|>", "make it red"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipeline(request: pytest.FixtureRequest, tiny_editor: Path, tiny_sdxl_editor: Path) -> DiffusionPipeline:
    if request.param == "sd":
        return StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    return StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tiny_sdxl_editor)


@pytest.fixture
def encoder(pipeline: DiffusionPipeline) -> PromptEncoder:
    return make_prompt_encoder(pipeline)


@torch.no_grad()
def encode_as_the_pipeline(pipeline: DiffusionPipeline, prompt: str) -> tuple[PromptEmbeds, PromptEmbeds]:
    """Embeddings of the prompt and of the null prompt by the stock pipeline, batch size 1."""
    if isinstance(pipeline, StableDiffusionXLInstructPix2PixPipeline):
        hidden, null_hidden, pooled, null_pooled = pipeline.encode_prompt(
            prompt, device=torch.device("cpu"), do_classifier_free_guidance=True
        )
        return PromptEmbeds(hidden, pooled), PromptEmbeds(null_hidden, null_pooled)
    prompt_embeds, null_embeds, null_again = pipeline._encode_prompt(prompt, torch.device("cpu"), 1, True).chunk(3)
    assert torch.equal(null_embeds, null_again)
    return PromptEmbeds(prompt_embeds), PromptEmbeds(null_embeds)


def are_equal(embeds: PromptEmbeds, others: PromptEmbeds) -> bool:
    """Whether both are bit-identical, including the pooled embeddings."""
    pairs = zip(embeds, others, strict=True)
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


# ---- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", PROMPTS[:4])
def test_embeddings_equal_the_stock_pipeline(encoder, pipeline, prompt: str) -> None:
    prompt_embeds, null_embeds = encode_as_the_pipeline(pipeline, prompt)
    assert are_equal(encoder([prompt]), prompt_embeds)
    assert are_equal(encoder.null_embeds, null_embeds)
    is_sdxl = len(encoder.text_encoders) == 2
    assert encoder.null_embeds.hidden.shape == (1, 77, 96 if is_sdxl else 32)
    assert (encoder.null_embeds.pooled is not None) == is_sdxl
    assert not is_sdxl or encoder.null_embeds.pooled.shape == (1, 48)


def test_embeddings_do_not_depend_on_batch_or_cache(encoder, pipeline) -> None:
    together = encoder(PROMPTS)
    again = encoder(PROMPTS[::-1]).rows([4, 3, 2, 1, 0])  # all from the cache
    alone = concatenate([make_prompt_encoder(pipeline)([prompt]) for prompt in PROMPTS])
    assert are_equal(together, again)
    assert are_equal(together, alone)
    assert not together.hidden.requires_grad


@pytest.mark.parametrize("caches", [True, False])
def test_batches_of_one_shape(encoder, pipeline, caches) -> None:
    """As in training on a GPU: the embeddings are those of one prompt at a time up to rounding, and repeatable."""
    batched = make_prompt_encoder(pipeline)
    batched.batch_size, batched.caches = 4, caches
    prompts = [*PROMPTS, PROMPTS[0]]
    together, expected = batched(prompts), encoder(prompts)
    assert are_equal(together, batched(prompts))
    for one, other in zip(together, expected, strict=True):
        assert one is other is None or torch.allclose(one, other, rtol=0, atol=1e-5)
    assert bool(batched._cache) == caches and batched.truncated == encoder.truncated


def size_of(embeds: PromptEmbeds) -> int:
    return sum(value.nbytes for value in embeds if value is not None)


def test_small_cache_gives_equal_embeddings(encoder, pipeline, monkeypatch) -> None:
    expected_all = [encoder([prompt, "other"]) for prompt in PROMPTS]
    assert encoder.capacity > 1000
    monkeypatch.setattr(conditioning, "PROMPT_CACHE_BYTES", size_of(expected_all[0]) // 2)
    small = make_prompt_encoder(pipeline)
    assert small.capacity == 1
    for prompt, expected in zip(PROMPTS, expected_all, strict=True):
        assert are_equal(small([prompt, "other"]), expected)
        assert len(small._cache) <= 2
    assert are_equal(small(PROMPTS), encoder(PROMPTS))  # a batch larger than the cache


def count_encodings(encoder: PromptEncoder, monkeypatch) -> list[str]:
    encoded = []
    real = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda prompts: encoded.extend(prompts) or real(prompts))
    return encoded


def test_each_prompt_is_encoded_once(encoder, monkeypatch) -> None:
    encoded = count_encodings(encoder, monkeypatch)
    encoder(["one", "two", "one"])
    encoder(["two", "three"])
    assert encoded == ["one", "two", "three"]


def test_encode_all(encoder, monkeypatch) -> None:
    """Includes the null prompt. New prompts can be encoded later; too many prompts are not encoded."""
    encoded = count_encodings(encoder, monkeypatch)
    assert encoder.encode_all(["one", "two", "one"], show_progress=False)
    assert encoded == ["", "one", "two"]
    encoder(["two", "one"])
    null = encoder.null_embeds
    assert encoded == ["", "one", "two"]
    encoder(["three"])
    assert encoded == ["", "one", "two", "three"]
    monkeypatch.setattr(conditioning, "PROMPT_CACHE_BYTES", size_of(null))
    assert not encoder.encode_all(["four", "five"], show_progress=False)
    assert encoded == ["", "one", "two", "three"]


def test_truncated_prompts_are_collected(encoder) -> None:
    fits, long = "a" * 75, "a" * 76  # one token per letter, and two for start and end
    encoder([fits, long, "a word " * 250, long])
    assert encoder.truncated == {long, "a word " * 250}


def test_added_conditions() -> None:
    assert added_conditions(None, torch.zeros(2, 6)) is None
    added = added_conditions(torch.ones(2, 48), torch.zeros(2, 6))
    assert added.keys() == {"text_embeds", "time_ids"} and added["text_embeds"].all()


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


def test_dropout_frequencies_equal_the_paper() -> None:
    uniform = torch.tensor([sample_draws(3, draw, (1, 1, 1), 1000)["u_dropout"] for draw in range(20_000)])
    is_prompt_null, is_image_null = (mask.numpy() for mask in dropout_masks(uniform.float(), 0.05))
    kinds = [is_prompt_null & ~is_image_null, is_image_null & ~is_prompt_null, is_prompt_null & is_image_null]
    assert np.mean(kinds, axis=1) == pytest.approx(0.05, abs=0.007)  # more than four standard errors


def test_only_dropped_samples_change() -> None:
    is_null = torch.tensor([True, False, True])
    embeds = PromptEmbeds(torch.randn(3, 77, 8), torch.randn(3, 5))
    null_embeds = PromptEmbeds(torch.randn(1, 77, 8), torch.randn(1, 5))
    expected = concatenate([null_embeds, embeds.rows([1]), null_embeds])
    assert are_equal(drop_prompts(embeds, null_embeds, is_null), expected)
    without_pooled = drop_prompts(PromptEmbeds(embeds.hidden), PromptEmbeds(null_embeds.hidden), is_null)
    assert are_equal(without_pooled, PromptEmbeds(expected.hidden))
    latents = torch.randn(3, 4, 2, 2)
    latents[0, 0, 0, 0] = torch.inf  # replaced, not multiplied by zero
    assert torch.equal(
        drop_images(latents, is_null), torch.stack([torch.zeros(4, 2, 2), latents[1], torch.zeros(4, 2, 2)])
    )


def test_embeddings_do_not_depend_on_autocast(tiny_sdxl_editor: Path) -> None:
    """Validation may encode a prompt first, under autocast, and training then uses the cache."""
    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(tiny_sdxl_editor)
    expected = make_prompt_encoder(pipeline)(["make it red"])
    with torch.autocast("cpu", torch.bfloat16):
        actual = make_prompt_encoder(pipeline)(["make it red"])
    assert torch.equal(actual.hidden, expected.hidden) and torch.equal(actual.pooled, expected.pooled)
