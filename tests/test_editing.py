"""Editing against the stock pipeline, and against a plain loop from the paper where the stock pipeline differs."""

import copy
import logging
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image, ImageOps

from tests.edits import counting, make_safety_checker
from utils.editing.edit_images import (
    SamplingSettings,
    edit_images,
    edit_pixels,
    fit_image,
    fit_to_model,
    native_resolution,
    size_multiple,
)
from utils.editing.encodings import Encodings
from utils.editing.loading import load_editor
from utils.errors import InputError
from utils.models.conditioning import PromptEncoder

TRAILING = dict(timestep_spacing="trailing")
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "ddim v-prediction, zero terminal SNR": (
        "DDIMScheduler",
        dict(prediction_type="v_prediction", rescale_betas_zero_snr=True, **TRAILING),
    ),
    "pndm": ("PNDMScheduler", dict(skip_prk_steps=True)),
    "pndm with Runge-Kutta": ("PNDMScheduler", dict(skip_prk_steps=False)),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler trailing": ("EulerDiscreteScheduler", TRAILING),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++ multistep": ("DPMSolverMultistepScheduler", {}),
    "dpm++ sde": ("DPMSolverMultistepScheduler", dict(algorithm_type="sde-dpmsolver++")),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
PROMPTS = ["make it night", "turn it into a drawing"]


def set_scheduler(pipeline: StableDiffusionInstructPix2PixPipeline, name: str) -> None:
    base = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler_class, config = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, scheduler_class)(**base, **config)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def stock_pixels(
    pipeline: StableDiffusionInstructPix2PixPipeline, images: list, prompts: list, **settings
) -> torch.Tensor:
    edited = pipeline(prompts, image=images, output_type="np", **settings).images
    return torch.from_numpy(edited).permute(0, 3, 1, 2)


@pytest.mark.parametrize("scales", [(7.5, 1.5), (2.0, 1.0)], ids=str)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_stock(editor, photos, scheduler: str, scales: tuple[float, float]) -> None:
    """Two images with a generator each, for every kind of scheduler: the same pixels as diffusers' own pipeline."""
    set_scheduler(editor, scheduler)
    settings = dict(num_inference_steps=5, guidance_scale=scales[0], image_guidance_scale=scales[1])
    expected = stock_pixels(editor, photos, PROMPTS, generator=generators(3, 4), **settings)
    pixels, flags = edit_pixels(editor, photos, PROMPTS, [3, 4], SamplingSettings(**settings))
    pixels = torch.stack(pixels)
    assert pixels.shape == (2, 3, 24, 40) and pixels.dtype == torch.float32 and flags == [False, False]
    assert expected.std() > 0.02, "a flat image proves nothing"
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_equals_stock_with_defaults(editor, photos, seed: int) -> None:
    """One image, 20 steps, a negative prompt, as bytes of an image."""
    set_scheduler(editor, "euler ancestral")
    settings = dict(num_inference_steps=20, negative_prompt="blurry")
    expected = editor("swap sky", image=photos[0], generator=generators(seed)[0], **settings).images[0]
    edited = edit_images(editor, photos[:1], ["swap sky"], [seed], SamplingSettings(**settings))[0]
    difference = np.abs(np.asarray(edited).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1  # rounding to bytes


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "lcm"])
@pytest.mark.parametrize("scales", [(1.0, 1.5), (0.5, 1.5), (7.5, 0.5), (0.0, 0.0), (1.0, 1.0)], ids=str)
def test_follows_the_formula_where_stock_does_not(editor, photos, scheduler: str, scales: tuple[float, float]) -> None:
    """s_T <= 1 or s_I < 1: a plain three-branch loop from the paper's equation 3, one image at a time."""
    set_scheduler(editor, scheduler)
    settings = dict(num_inference_steps=4, guidance_scale=scales[0], image_guidance_scale=scales[1])
    pixels, _ = edit_pixels(editor, photos, PROMPTS, [3, 4], SamplingSettings(**settings))
    for image, prompt, seed, edited in zip(photos, PROMPTS, (3, 4), pixels, strict=True):
        torch.testing.assert_close(edited, plain_edit(editor, image, prompt, seed, 4, *scales), rtol=0, atol=1e-4)


@torch.no_grad()
def plain_edit(pipeline, image: Image.Image, prompt: str, seed: int, steps: int, s_text: float, s_image: float):
    def encode(text: str) -> torch.Tensor:
        ids = pipeline.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return pipeline.text_encoder(ids)[0]

    generator = torch.Generator().manual_seed(seed)
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    original = pipeline.vae.encode(pixels).latent_dist.mean
    latents = torch.randn(original.shape, generator=generator) * scheduler.init_noise_sigma
    extra = {"generator": generator} if "Euler" in type(scheduler).__name__ or "LCM" in type(scheduler).__name__ else {}
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)

        def predict(text: str, condition: torch.Tensor, noisy=noisy, timestep=timestep) -> torch.Tensor:
            model_input = torch.cat([noisy, condition], dim=1)
            return pipeline.unet(model_input, timestep, encoder_hidden_states=encode(text)).sample

        e_text, e_image, e_none = predict(prompt, original), predict("", original), predict("", 0 * original)
        guided = e_none + s_image * (e_image - e_none) + s_text * (e_text - e_image)
        latents = scheduler.step(guided, timestep, latents, **extra).prev_sample
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("scales", "branches"),
    [((7.5, 1.5), 3), ((7.5, 1.0), 2), ((1.5, 1.5), 2), ((0.0, 1.5), 2), ((1.0, 1.0), 1), ((0.0, 0.0), 1)],
)
def test_rows_of_the_unet(editor, photos, scales: tuple[float, float], branches: int) -> None:
    """One UNet call per step, with branches x images rows."""
    set_scheduler(editor, "ddim")
    settings = SamplingSettings(num_inference_steps=3, guidance_scale=scales[0], image_guidance_scale=scales[1])
    with counting(editor) as counts:
        edit_pixels(editor, photos, PROMPTS, [0, 1], settings)
    assert counts["rows"] == [2 * branches] * 3


def test_each_image_and_prompt_is_encoded_once(editor, photos) -> None:
    """Six edits of two images with two instructions: two images and three texts (with the null prompt) are encoded."""
    set_scheduler(editor, "ddim")
    images = [photos[0], photos[1], photos[0].copy(), photos[1], photos[0], photos[1]]
    with counting(editor) as counts:
        edit_pixels(editor, images, PROMPTS * 3, list(range(6)), SamplingSettings(num_inference_steps=1))
    assert (counts["texts"], counts["images"]) == (3, 2)


@pytest.mark.parametrize(("scales", "expected"), [((1.0, 1.0), ["x"]), ((2.0, 1.0), ["", "x"])], ids=str)
def test_null_prompt_is_encoded_only_if_needed(editor, photos, monkeypatch, scales, expected) -> None:
    encoded, encode = [], PromptEncoder.encode
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, prompts: encoded.extend(prompts) or encode(self, prompts))
    settings = dict(num_inference_steps=2, guidance_scale=scales[0], image_guidance_scale=scales[1])
    encodings = Encodings(editor)
    for _ in range(2):
        edit_pixels(editor, photos, ["x", "x"], [0, 1], SamplingSettings(**settings), encodings=encodings)
    assert sorted(encoded) == expected


def test_images_with_scales_of_their_own(editor, photos) -> None:
    """Images of two sizes: each edit equals the edit of the image alone with its scales."""
    images = [*photos, photos[0].resize((32, 32)), photos[1].resize((32, 32))]
    text, image = [7.5, 3.0, 1.0, 2.0], [1.5, 1.2, 1.0, 1.0]
    settings = dict(num_inference_steps=3)
    together, _ = edit_pixels(
        editor,
        images,
        ["x"] * 4,
        [5, 6, 7, 8],
        SamplingSettings(guidance_scale=text, image_guidance_scale=image, **settings),
    )
    for row in range(4):
        scales = dict(guidance_scale=text[row], image_guidance_scale=image[row])
        alone = edit_pixels(editor, [images[row]], ["x"], [5 + row], SamplingSettings(**scales, **settings))[0][0]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="4 images need 4 guidance scales of each kind"):
        edit_pixels(editor, images, ["x"] * 4, [0] * 4, SamplingSettings(guidance_scale=[7.5, 3.0]))


def test_an_edit_does_not_depend_on_its_batch(editor, photos) -> None:
    """Images of two sizes in any order, with a scheduler that draws noise: each equals the edit of it alone."""
    set_scheduler(editor, "euler ancestral")
    images = [photos[0], photos[1].resize((32, 32)), photos[1], photos[0].crop((0, 0, 32, 24))]
    prompts, settings = ["a", "b", "c", "d"], dict(num_inference_steps=3)
    steps = []
    together, _ = edit_pixels(
        editor,
        images,
        prompts,
        [5, 6, 7, 8],
        SamplingSettings(**settings),
        on_step=lambda *report: steps.append(report),
    )
    assert steps == [(step, 9) for step in range(1, 10)]  # three sizes, three steps each
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = edit_pixels(editor, [image], [prompt], [5 + row], SamplingSettings(**settings))[0][0]
        assert alone.shape == (3, image.height, image.width)
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)


def test_does_not_disturb_training(editor, photos) -> None:
    """Scheduler, train/eval modes, gradients and the global random state are unchanged."""
    set_scheduler(editor, "euler")
    editor.scheduler.set_timesteps(7)
    editor.unet.train()
    editor.unet.down_blocks[0].eval()
    modes = [module.training for module in editor.unet.modules()]
    before = torch.random.get_rng_state(), editor.scheduler.timesteps.clone(), np.random.get_state()[1].copy()
    try:
        edit_images(editor, photos, PROMPTS, [0, 0], SamplingSettings(num_inference_steps=2))
        assert [module.training for module in editor.unet.modules()] == modes
    finally:
        editor.unet.eval()
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert torch.equal(editor.scheduler.timesteps, before[1])
    assert (np.random.get_state()[1] == before[2]).all()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in editor.unet.parameters())


def test_half_precision_equals_stock(editor, tiny_editor: Path, photos) -> None:
    """A pipeline in bfloat16 draws its noise in bfloat16, and the edit is close to that of the stock pipeline."""
    half = load_editor(tiny_editor, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    expected = stock_pixels(half, photos, PROMPTS, generator=generators(3, 4), num_inference_steps=4)
    pixels = torch.stack(edit_pixels(half, photos, PROMPTS, [3, 4], SamplingSettings(num_inference_steps=4))[0])
    assert (pixels - expected).abs().mean() < 0.02


def test_autocast_with_frozen_models_in_half_precision(tiny_editor: Path, photos) -> None:
    """As in mixed-precision training: a float32 UNet beside a VAE and a text encoder in bfloat16."""
    mixed = load_editor(tiny_editor)
    expected = torch.stack(edit_pixels(mixed, photos, PROMPTS, [3, 4], SamplingSettings(num_inference_steps=4))[0])
    noise = dict(num_inference_steps=4)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = torch.stack(edit_pixels(mixed, photos, PROMPTS, [3, 4], SamplingSettings(**noise))[0])
    assert (autocast - expected).abs().mean() < 0.02
    mixed.vae.to(torch.bfloat16)
    mixed.text_encoder.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.stack(edit_pixels(mixed, photos, PROMPTS, [3, 4], SamplingSettings(**noise))[0]).isfinite().all()
    assert torch.stack(edit_pixels(mixed, photos, PROMPTS, [3, 4], SamplingSettings(**noise))[0]).isfinite().all()


def make_picky_checker(liked: Image.Image, disliked: Image.Image):
    """A safety checker, and its processor, that flags only images like `disliked`."""
    torch.manual_seed(0)
    checker, processor = make_safety_checker()
    with torch.no_grad():
        pixels = processor([disliked, liked], return_tensors="pt").pixel_values
        embeds = checker.visual_projection(checker.vision_model(pixels)[1])  # (2, 64)
        centred = embeds[0] / embeds[0].norm() - embeds[1] / embeds[1].norm()
        checker.concept_embeds.zero_()[0] = checker.special_care_embeds.zero_()[0] = centred
        checker.concept_embeds_weights.fill_(1.0)[0] = checker.special_care_embeds_weights.fill_(1.0)[0] = 0.0
    return checker, processor


def test_safety_checker(editor, photos, caplog) -> None:
    """A flagged image is black, as from the stock pipeline; the other one is unchanged."""
    set_scheduler(editor, "ddim")
    settings = dict(num_inference_steps=2)
    unchecked = edit_images(editor, photos, PROMPTS, [1, 2], SamplingSettings(**settings))
    checker, processor = make_picky_checker(liked=unchecked[1], disliked=unchecked[0])
    checked_editor = copy.copy(editor)
    checked_editor.register_modules(safety_checker=checker, feature_extractor=processor)
    with caplog.at_level(logging.WARNING):
        checked = edit_images(checked_editor, photos, PROMPTS, [1, 2], SamplingSettings(**settings))
    assert not np.asarray(checked[0]).any() and checked[0].info["flagged"]
    assert checked[1] == unchecked[1] and not checked[1].info["flagged"]
    assert "flagged 1 of 2 edits" in caplog.text


def test_warnings_about_long_prompts_and_nan(editor, photos, monkeypatch, caplog) -> None:
    long = "very " * 100
    with caplog.at_level(logging.WARNING):
        edit_images(editor, photos[:1], [long], [0], SamplingSettings(num_inference_steps=1))
    assert "too long for the text encoder" in caplog.text
    monkeypatch.setattr(editor.vae, "decode", lambda latents, return_dict: (torch.full((1, 3, 24, 40), torch.nan),))
    edited = edit_images(editor, photos[:1], ["x"], [0], SamplingSettings(num_inference_steps=1))
    assert edited[0].info["overflowed"] and not np.asarray(edited[0]).any()


def test_invalid_arguments(editor, photos) -> None:
    set_scheduler(editor, "lcm")
    with pytest.raises(InputError, match="60 steps are not possible with the scheduler LCMScheduler"):
        edit_images(editor, photos, PROMPTS, [0, 0], SamplingSettings(num_inference_steps=60))
    for prompts, seeds in ((PROMPTS[:1], [1, 2]), (PROMPTS, [1])):
        with pytest.raises(ValueError, match=f"2 images, {len(prompts)} prompts and {len(seeds)} seeds"):
            edit_images(editor, photos, prompts, seeds)


@pytest.mark.parametrize(
    ("size", "resolution", "multiple", "expected"),
    [
        ((512, 512), 512, 64, (512, 512)),
        ((1024, 768), 512, 64, (512, 384)),
        ((768, 1024), 512, 64, (384, 512)),
        ((1000, 600), 512, 64, (512, 320)),  # 307.2 -> 320, and 533 -> 512
        ((640, 427), 512, 64, (512, 384)),
        ((100, 100), 500, 64, (512, 512)),
        ((41, 25), 32, 4, (32, 20)),
        ((8, 8), 1, 4, (4, 4)),
    ],
)
def test_fit_image(size, resolution: int, multiple: int, expected) -> None:
    assert fit_image(Image.new("RGB", size), resolution, multiple).size == expected


def test_fit_image_as_edit_cli(monkeypatch) -> None:
    """The sizes of the original edit_cli.py, except where its float rounding loses a multiple of 64."""
    monkeypatch.setattr(ImageOps, "fit", lambda image, size, method: Image.new("L", size))
    random = np.random.default_rng(0)
    differing = 0
    for width, height in random.integers(200, 2000, (300, 2)).tolist():
        short = min(width, height)
        factor = int(np.ceil(short * (512 / max(width, height)) / 64)) * 64 / short
        original = (int(width * factor // 64) * 64, int(height * factor // 64) * 64)
        size = fit_image(Image.new("L", (width, height)), 512).size
        differing += size != original
        assert all(ours - theirs in (0, 64) for ours, theirs in zip(size, original, strict=True))
    assert differing < 30


def test_fit_image_refuses_a_narrow_image() -> None:
    with pytest.raises(InputError, match="20000x10 pixels, too narrow"):
        fit_image(Image.new("RGB", (20000, 10)), 512)


def test_sizes_of_the_model(editor) -> None:
    assert size_multiple(editor) == 4 and native_resolution(editor) == 32


def test_the_default_resolution_is_that_of_the_training(editor, monkeypatch) -> None:
    for native, longer_side in ((32, 32), (768, 768), (2048, 1024)):
        monkeypatch.setattr("utils.editing.edit_images.native_resolution", lambda _, native=native: native)
        assert fit_to_model(Image.new("RGB", (90, 90)), editor).size == (longer_side, longer_side)


def test_load_editor_refuses(tiny_base: Path, tiny_editor: Path, tmp_path: Path) -> None:
    """One message that names the model and the problem."""

    def damaged(name: str, file: str, content: bytes | None) -> Path:
        folder = shutil.copytree(tiny_editor, tmp_path / name)
        shutil.rmtree(folder / file) if content is None else (folder / file).write_bytes(content)
        return folder

    (tmp_path / "model.ckpt").write_bytes(b"x")
    xl = damaged("xl", "model_index.json", b'{"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}')
    cases = {
        tmp_path / "nothing": "does not exist",
        tmp_path / "model.ckpt": "model.ckpt cannot be read",
        tiny_base: "4 channels.*train_instruct_pix2pix.py",
        xl: "StableDiffusionXLInstructPix2PixPipeline without tokenizer, text_encoder",
        tmp_path: "holds a model in a subfolder",
        "somebody/some-model": "Hub cannot be reached",
        damaged(
            "cut", "unet/diffusion_pytorch_model.safetensors", b"\x10\0\0\0"
        ): "unet/diffusion_pytorch_model.safetensors is truncated",
        damaged("json", "unet/config.json", b"{"): "not a valid JSON",
        damaged("index", "model_index.json", b"[]"): "damaged",
        damaged("half", "text_encoder", None): "incomplete: missing text_encoder",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            load_editor(name)
    with pytest.raises(InputError, match="has no variant fp16: remove --variant"):
        load_editor(tiny_editor, variant="fp16")
