"""Shared self-attention equals the logits of the paper's code; without it, pairs equal images of stock pipelines."""

import importlib

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from data_preparation.pairs.candidates import draw_candidate
from data_preparation.pairs.models import ModelChoice, load_pipeline
from data_preparation.pairs.prompt_to_prompt import AttentionSources, count_shared_steps, shared_self_attention
from data_preparation.pairs.sampling import PairDraw, PhotographStart, decode, encode_photograph, sample_pairs
from data_preparation.pairs.settings import PRESETS
from utils.editing.schedulers import choose_scheduler
from utils.models.conditioning import make_prompt_encoder
from utils.models.latents import unscale_latents

CAPTIONS = [("a house", "a house at night"), ("a dog", "a cat"), ("trees", "trees in fog")]
STOCHASTIC = ("euler_a", "lcm", "tcd", "ddpm", "dpm++_sde")  # schedulers that draw noise at their steps


class ReferenceAttention:
    """Explicit logits in float64; in marked pairs, those of the first image replace those of the second.

    The UNet batch has the 2P rows of the pairs, once per branch of guidance.
    """

    def __init__(self, is_shared: list[bool], num_branches: int):
        self.is_shared, self.num_branches = is_shared, num_branches

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.reshape(shape[0], shape[1], -1).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows, length, _ = hidden_states.shape
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        size = query.shape[-1] // attn.heads
        outputs = []
        logits = {}
        for row in range(rows):
            heads = []
            for head in range(attn.heads):
                part = slice(head * size, (head + 1) * size)
                logits[row, head] = query[row, :, part].double() @ key[row, :, part].double().T / size**0.5
                used = logits[row, head]
                pair = row % (2 * len(self.is_shared)) // 2
                if encoder_hidden_states is None and row % 2 == 1 and self.is_shared[pair]:
                    used = logits[row - 1, head]
                weights = used.exp() / used.exp().sum(-1, keepdim=True)
                heads.append(weights @ value[row, :, part].double())
            outputs.append(torch.cat(heads, -1))
        output = attn.to_out[0](torch.stack(outputs).to(hidden_states.dtype))
        if residual.ndim == 4:
            output = output.transpose(1, 2).reshape(shape)
        return (output + residual if attn.residual_connection else output) / attn.rescale_output_factor


def make_attention_unet() -> UNet2DConditionModel:
    """With separate attention blocks, which normalise inputs (B, C, h, w)."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    ).eval()


@pytest.fixture(scope="module")
def pipelines(tiny_base, tiny_sdxl):
    return {
        "sd": load_pipeline(ModelChoice(str(tiny_base)), torch.float32, "cpu"),
        "sdxl": load_pipeline(ModelChoice(str(tiny_sdxl)), torch.float32, "cpu"),
    }


def unet_inputs(unet: UNet2DConditionModel, rows: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    inputs = dict(sample=draw(rows, 4, 16, 16), encoder_hidden_states=draw(rows, 7, unet.config.cross_attention_dim))
    added = dict(text_embeds=draw(rows, 48), time_ids=draw(rows, 6)) if unet.config.addition_embed_type else None
    return inputs | dict(timestep=500, added_cond_kwargs=added, return_dict=False)


@torch.no_grad()
@pytest.mark.parametrize("num_branches", [1, 2], ids=["unguided", "guided"])
@pytest.mark.parametrize("kind", ["sd", "sdxl", "attention blocks"])
def test_sharing_equals_the_reference(pipelines, kind, num_branches):
    unet = make_attention_unet() if kind == "attention blocks" else pipelines[kind].unet
    unet.double()
    try:
        is_shared = [True, False, True]
        inputs = unet_inputs(unet, 6 * num_branches)
        plain = unet(**inputs)[0]
        with shared_self_attention(unet) as sources:
            assert torch.equal(unet(**inputs)[0], plain)  # nothing is shared yet
            sources.set(is_shared, num_branches)
            ours = unet(**inputs)[0]
        former = unet.attn_processors
        unet.set_attn_processor(ReferenceAttention(is_shared, num_branches))
        reference = unet(**inputs)[0]
        unet.set_attn_processor(former)
    finally:
        unet.float()
    assert (ours - reference).abs().max() < 1e-12
    first = torch.arange(6 * num_branches) % 2 == 0
    unshared = torch.arange(6 * num_branches) % 6 // 2 == 1
    assert (ours - plain)[first].abs().max() < 1e-12  # the first image of a pair does not change
    assert (ours - plain)[unshared].abs().max() < 1e-12
    assert (ours - plain)[~first & ~unshared].flatten(1).abs().amax(1).min() > 1e-4


def test_rows_of_the_sources():
    sources = AttentionSources()
    sources.set([True], 2)  # unconditional 1 and 2, conditional 1 and 2
    assert sources.rows.tolist() == [0, 0, 2, 2]
    sources.set([False, True, True], 1)
    assert sources.rows.tolist() == [0, 1, 2, 2, 4, 4]
    sources.set([False, False], 2)
    assert sources.rows is None


def test_the_original_processors_are_restored(pipelines):
    unet = pipelines["sd"].unet
    former = unet.attn_processors
    with pytest.raises(KeyboardInterrupt), shared_self_attention(unet):
        assert all(unet.attn_processors[name] is not former[name] for name in former)
        raise KeyboardInterrupt
    assert all(unet.attn_processors[name] is former[name] for name in former)


def test_shared_steps_equal_the_reference():
    for steps in (2, 4, 30, 100):
        for threshold in [0.0, 0.1, 1 / 3, 0.5, 0.9, 1.0, 1.01]:
            active = [threshold > step / (steps - 1) for step in range(steps)]
            shared = count_shared_steps(threshold, steps)
            assert active == [step < shared for step in range(steps)]
    shared = [draw_candidate(0, 3, sample, PRESETS["ip2p"].settings, 100) for sample in range(300)]
    assert all(0.1 <= draw.threshold <= 0.9 and 7.5 <= draw.guidance <= 15 for draw in shared)
    assert min(draw.share_steps for draw in shared) < 15 and max(draw.share_steps for draw in shared) > 85
    fast = [draw_candidate(1, item, 0, PRESETS["fast"].settings, 4) for item in range(200)]
    assert {draw.share_steps for draw in fast} == {1, 2, 3}
    assert len({draw.seed for draw in shared + fast}) == 500


def sample(pipeline, draws, scheduler="ddim", steps=4, captions=CAPTIONS, **settings):
    encoder = make_prompt_encoder(pipeline)
    texts = encoder([text for pair in captions[: len(draws)] for text in pair])
    chosen = choose_scheduler(pipeline.scheduler, scheduler)
    return sample_pairs(pipeline, chosen, steps, texts, encoder.null_embeds, draws, 32, **settings)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(("scheduler", "guidance"), [("euler_a", 7.5), ("ddim", 3.0), ("lcm", 0.0), ("dpm++_sde", 2.0)])
def test_without_sharing_pairs_equal_stock_pipelines(pipelines, kind, scheduler, guidance):
    pipeline = pipelines[kind]
    draws = [PairDraw(seed, 0, guidance + seed * (guidance > 0)) for seed in range(2)]
    sampled = sample(pipeline, draws, scheduler)
    stock_class = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    stock = stock_class.from_pipe(pipeline)
    stock.scheduler = choose_scheduler(pipeline.scheduler, scheduler)
    stock.set_progress_bar_config(disable=True)
    for pair, draw in enumerate(draws):
        expected = stock(
            list(CAPTIONS[pair]),
            num_inference_steps=4,
            guidance_scale=draw.guidance,
            height=32,
            width=32,
            generator=[torch.Generator().manual_seed(draw.seed) for _ in range(2)],
            output_type="latent",
        ).images
        alone = sample(pipeline, [draw], scheduler, captions=[CAPTIONS[pair]]).latents
        # Relative to their deviation: random weights give latents of up to 25.
        assert (alone - expected).abs().max() < 1e-5 * expected.std()
        assert (sampled.latents[2 * pair : 2 * pair + 2] - expected).abs().max() < 1e-5 * expected.std()


def test_guidance_as_an_input_of_a_distilled_unet(pipelines):
    """As in LCM_Dreamshaper: the scale is an input, and no second branch is needed."""
    pipeline = pipelines["sd"]
    torch.manual_seed(0)
    distilled = UNet2DConditionModel.from_config(pipeline.unet.config, time_cond_proj_dim=16).eval()
    changed = StableDiffusionPipeline(**pipeline.components | {"unet": distilled}, requires_safety_checker=False)
    changed.scheduler = choose_scheduler(pipeline.scheduler, "lcm")
    changed.set_progress_bar_config(disable=True)
    sampled = sample(changed, [PairDraw(0, 0, 4.0)], "lcm")
    expected = changed(
        list(CAPTIONS[0]),
        num_inference_steps=4,
        guidance_scale=4.0,
        height=32,
        width=32,
        generator=[torch.Generator().manual_seed(0) for _ in range(2)],
        output_type="latent",
    ).images
    assert sampled.unet_rows == 4 * 2
    assert (sampled.latents - expected).abs().max() < 1e-5 * expected.std()
    other = sample(changed, [PairDraw(0, 0, 8.0)], "lcm").latents
    assert (sampled.latents - other).abs().max() > 1e-3


def test_each_pair_has_its_own_guidance_and_rows_are_counted(pipelines):
    pipeline, seen = pipelines["sd"], []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        together = sample(pipeline, [PairDraw(0, 2, 2.0), PairDraw(1, 3, 9.0)])
        assert together.unet_rows == sum(seen) == 4 * 2 * 2 * 2  # steps, branches, pairs, images
        alone = sample(pipeline, [PairDraw(1, 3, 9.0)], captions=CAPTIONS[1:])
        assert (together.latents[2:] - alone.latents).abs().max() < 1e-5
        seen.clear()
        assert sample(pipeline, [PairDraw(0, 2)]).unet_rows == sum(seen) == 4 * 2
    finally:
        handle.remove()


@pytest.mark.parametrize("scheduler", STOCHASTIC)
def test_a_pair_has_the_same_noise_at_every_step(pipelines, scheduler, monkeypatch):
    chosen = choose_scheduler(pipelines["sd"].scheduler, scheduler)
    module, drawn = importlib.import_module(type(chosen).__module__), []
    draw = module.randn_tensor
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: drawn.append(draw(*a, **k)) or drawn[-1])
    draws = [PairDraw(5, 2, 3.0), PairDraw(6, 1, 3.0)]
    sampled = sample(pipelines["sd"], draws, scheduler)
    assert len(drawn) >= 3  # some draw none at the last step
    for noise in drawn:
        assert torch.equal(noise[0], noise[1]) and torch.equal(noise[2], noise[3])
        assert not torch.equal(noise[0], noise[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(sampled.latents[0], sampled.latents[1])
    same, steps = [("a dog", "a dog")] * 2, []
    handle = pipelines["sd"].unet.register_forward_pre_hook(lambda module, inputs: steps.append(inputs[0]))
    try:
        steps.append(sample(pipelines["sd"], draws, scheduler, captions=same).latents)
    finally:
        handle.remove()
    assert len(steps) == 5 and all(torch.equal(latents[::2], latents[1::2]) for latents in steps)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_sharing_changes_only_the_second_image_of_its_pair(pipelines, kind):
    apart = sample(pipelines[kind], [PairDraw(3, 0), PairDraw(4, 0)]).latents
    shared = sample(pipelines[kind], [PairDraw(3, 4), PairDraw(4, 0)]).latents
    assert (shared[[0, 2, 3]] - apart[[0, 2, 3]]).abs().max() < 1e-5
    assert (shared[1] - apart[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("scheduler", "prediction_type"),
    [
        *((name, "v_prediction") for name in ("ddim", "euler_a", "lcm", "dpm++")),
        *((name, "epsilon") for name in ("ddim", "euler_a", "euler", "lcm", "dpm++", "ddpm")),
        ("lcm", "sample"),
    ],
)
def test_a_real_original_remains_the_photograph(pipelines, scheduler, prediction_type):
    pipeline = pipelines["sd"]
    photographs = list(np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8))
    latents = torch.cat([encode_photograph(pipeline, photograph) for photograph in photographs])
    mode = pipeline.vae.encode(torch.from_numpy(photographs[0]).permute(2, 0, 1)[None] / 127.5 - 1).latent_dist.mode()
    assert (unscale_latents(latents[:1], pipeline.vae.config) - mode).abs().max() < 1e-5
    encoder = make_prompt_encoder(pipeline)
    own = choose_scheduler(pipeline.scheduler, scheduler)
    chosen = type(own).from_config(own.config, prediction_type=prediction_type)
    texts = encoder([text for pair in CAPTIONS[:2] for text in pair])
    start = PhotographStart(latents, num_steps=6, keeps_photograph=True)
    sampled = sample_pairs(
        pipeline, chosen, 10, texts, encoder.null_embeds, [PairDraw(0, 3), PairDraw(1, 3)], 32, start
    )
    assert sampled.unet_rows == 6 * 4
    # The last step of DDIM leaves the noise of the first timestep, with a deviation of 0.03.
    assert (sampled.latents[::2] - latents).abs().max() < (0.15 if scheduler == "ddim" else 1e-3)
    assert (sampled.latents[1::2] - latents).abs().max() > 0.2
    images, finite = decode(pipeline, sampled.latents)
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8 and finite == [True] * 4
    sampled.latents[2, 0, 0, 0] = float("nan")
    assert decode(pipeline, sampled.latents)[1] == [True, True, False, True]


def test_starting_from_photographs_equals_stock_image_to_image(pipelines):
    """Without sharing, for the same noise."""
    from diffusers import StableDiffusionImg2ImgPipeline

    pipeline = pipelines["sd"]
    latents = encode_photograph(pipeline, np.full((32, 32, 3), 90, np.uint8))
    stock = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    stock.scheduler = choose_scheduler(pipeline.scheduler, "euler_a")
    stock.set_progress_bar_config(disable=True)
    encoder = make_prompt_encoder(pipeline)
    texts = encoder(list(CAPTIONS[0]))
    sampled = sample_pairs(
        pipeline,
        stock.scheduler,
        10,
        texts,
        encoder.null_embeds,
        [PairDraw(7, 0)],
        32,
        PhotographStart(latents, num_steps=5),
    )
    for row in range(2):  # the stock pipeline accepts latents with 4 channels
        expected = stock(
            CAPTIONS[0][row],
            image=latents,
            strength=0.5,
            num_inference_steps=10,
            guidance_scale=0.0,
            generator=torch.Generator().manual_seed(7),
            output_type="latent",
        ).images[0]
        assert (sampled.latents[row] - expected).abs().max() < 1e-5
