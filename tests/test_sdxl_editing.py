"""Editing with SDXL against the stock pipeline, and the null condition of training against that of inference."""

import copy
import logging
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from PIL import Image

from utils.editing.edit_images import (
    SamplingSettings,
    edit_images,
    edit_pixels,
    fit_to_model,
    native_resolution,
    size_multiple,
)
from utils.editing.encodings import Encodings
from utils.editing.loading import load_editor
from utils.models.conditioning import PromptEmbeds, drop_prompts, make_prompt_encoder

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EDM = dict(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
SCHEDULERS = {
    "ddim": ("DDIMScheduler", BETAS),
    "euler": ("EulerDiscreteScheduler", BETAS),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", BETAS),
    "edm": ("EDMEulerScheduler", EDM | dict(sigma_schedule="exponential")),
}
PROMPTS = ["make it night", "turn it into a drawing"]
SIZE = (40, 24)
SCALES = dict(guidance_scale=7.5, image_guidance_scale=1.5)  # the stock pipelines' defaults differ


@pytest.fixture
def editor(loaded_editors) -> StableDiffusionXLInstructPix2PixPipeline:
    """A pipeline whose attributes a test may change; the weights are shared."""
    return copy.copy(loaded_editors["sdxl"])


def set_scheduler(pipeline: DiffusionPipeline, name: str) -> None:
    scheduler_class, config = SCHEDULERS[name]
    pipeline.scheduler = getattr(diffusers, scheduler_class)(**config)


def stock_pixels(pipeline: DiffusionPipeline, image: Image.Image, prompt: str, seed: int, **settings) -> torch.Tensor:
    """One edit (3, H, W): stock SDXL resizes to its native size unless the image's own is given."""
    edited = pipeline(
        prompt,
        image=image,
        height=image.height,
        width=image.width,
        output_type="np",
        generator=torch.Generator().manual_seed(seed),
        **settings,
    ).images
    return torch.from_numpy(edited)[0].permute(2, 0, 1)


def assert_equals_stock(pipeline: DiffusionPipeline, image: Image.Image, **settings) -> torch.Tensor:
    settings = dict(num_inference_steps=5) | SCALES | settings
    expected = stock_pixels(pipeline, image, PROMPTS[0], 3, **settings)
    pixels, flags = edit_pixels(pipeline, [image], PROMPTS[:1], [3], SamplingSettings(**settings))
    assert pixels[0].shape == (3, SIZE[1], SIZE[0]) and flags == [False]
    assert expected.std() > 0.02, "a flat image proves nothing"
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-4)
    return expected


@pytest.mark.parametrize("scales", [(7.5, 1.5), (5.0, 1.0), (1.5, 1.5)], ids=str)
@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler ancestral"])
def test_equals_stock(editor, photos, scheduler: str, scales: tuple[float, float]) -> None:
    set_scheduler(editor, scheduler)
    assert_equals_stock(editor, photos[0], guidance_scale=scales[0], image_guidance_scale=scales[1])


def test_equals_stock_for_each_null_prompt(editor, photos) -> None:
    """Zeros, the encoded "" and a given prompt are three different edits, each the stock pipeline's."""
    set_scheduler(editor, "ddim")
    zeros = assert_equals_stock(editor, photos[0])
    given = assert_equals_stock(editor, photos[0], negative_prompt="blurry")
    empty = assert_equals_stock(editor, photos[0], negative_prompt="")
    editor.register_to_config(force_zeros_for_empty_prompt=False)
    try:
        encoded = assert_equals_stock(editor, photos[0])
    finally:
        editor.register_to_config(force_zeros_for_empty_prompt=True)
    assert torch.equal(encoded, empty)
    assert all(not torch.equal(*pair) for pair in ((zeros, given), (zeros, encoded), (given, encoded)))


def test_equals_stock_for_cosxl(editor, photos) -> None:
    """Continuous noise levels, v-prediction, and an image condition that is scaled."""
    set_scheduler(editor, "edm")
    unscaled = assert_equals_stock(editor, photos[0])
    editor.is_cosxl_edit = True
    scaled = assert_equals_stock(editor, photos[0])
    assert (scaled - unscaled).abs().max() > 1e-3


def test_equals_stock_for_a_vae_with_means(editor, photos) -> None:
    """As in Playground, where the latents of each channel are normalised."""
    set_scheduler(editor, "euler")
    plain = assert_equals_stock(editor, photos[0])
    before = editor.vae.config
    editor.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, -0.4], latents_std=[1.1, 0.9, 1.2, 0.8])
    try:
        shifted = assert_equals_stock(editor, photos[0])
    finally:
        editor.vae._internal_dict = before
    assert not torch.equal(plain, shifted)


@pytest.mark.parametrize("scheduler", ["euler ancestral", "edm"])
def test_an_edit_does_not_depend_on_its_batch(editor, photos, scheduler: str) -> None:
    """Images of two sizes: each equals the edit of it alone, with its own size conditions."""
    set_scheduler(editor, scheduler)
    editor.is_cosxl_edit = scheduler == "edm"
    images, prompts = [photos[0], photos[1].resize((32, 32)), photos[1]], ["a", "b", "c"]
    together, _ = edit_pixels(editor, images, prompts, [5, 6, 7], SamplingSettings(num_inference_steps=3))
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        alone = edit_pixels(editor, [image], [prompt], [5 + row], SamplingSettings(num_inference_steps=3))[0][0]
        assert alone.shape == (3, image.height, image.width)
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-4)  # EDM's noise is 120 times larger


@pytest.mark.parametrize(
    ("scales", "branches"), [((7.5, 1.5), 3), ((7.5, 1.0), 2), ((1.5, 1.5), 2), ((0.0, 1.5), 2), ((1.0, 1.0), 1)]
)
def test_rows_of_the_unet(editor, photos, scales: tuple[float, float], branches: int) -> None:
    """Per step one UNet call of branches x images rows, with as many added conditions."""
    set_scheduler(editor, "ddim")
    rows, added = [], []

    def record(module, inputs, settings, output) -> None:
        rows.append(inputs[0].shape[0])
        added.append({name: value.clone() for name, value in settings["added_cond_kwargs"].items()})

    hook = editor.unet.register_forward_hook(record, with_kwargs=True)
    try:
        settings = dict(num_inference_steps=3, guidance_scale=scales[0], image_guidance_scale=scales[1])
        edit_pixels(editor, photos, PROMPTS, [0, 1], SamplingSettings(**settings))
    finally:
        hook.remove()
    assert rows == [2 * branches] * 3
    assert added[0]["time_ids"].tolist() == [[24, 40, 0, 0, 24, 40]] * (2 * branches)
    assert added[0]["text_embeds"].shape == (2 * branches, 48)
    is_null = (added[0]["text_embeds"] == 0).all(dim=1).tolist()
    expected = [weight for weight in (scales[0], scales[1] - scales[0], 1 - scales[1]) if weight]
    text_rows = 2 if scales[0] else 0
    assert len(expected) == branches and is_null == [False] * text_rows + [True] * (2 * branches - text_rows)


def test_a_given_encoder_is_not_run_again(editor, photos) -> None:
    """Prompts that a training run has encoded are not encoded again, and the edit is the same."""
    set_scheduler(editor, "ddim")
    expected = edit_pixels(editor, photos, PROMPTS, [1, 2], SamplingSettings(num_inference_steps=2))[0]
    encoder = make_prompt_encoder(editor)
    assert encoder.encode_all(PROMPTS, show_progress=False)
    runs = []
    hooks = [model.register_forward_hook(lambda *_: runs.append(1)) for model in encoder.text_encoders]
    try:
        settings, encodings = SamplingSettings(num_inference_steps=2), Encodings(editor, encoder)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            pixels = edit_pixels(editor, photos, PROMPTS, [1, 2], settings, encodings=encodings)[0]
        assert not runs
        edit_pixels(editor, photos, ["another", PROMPTS[1]], [1, 2], settings, encodings=encodings)
    finally:
        for hook in hooks:
            hook.remove()
    assert len(runs) == 2  # two text encoders, one prompt
    assert all(torch.equal(*pair) for pair in zip(pixels, expected, strict=True))


def test_autocast_does_not_change_the_embeddings(editor, photos) -> None:
    """Validation runs inside autocast, and training uses the embeddings that the encoder keeps."""
    plain, under_autocast = make_prompt_encoder(editor), make_prompt_encoder(editor)
    with torch.autocast("cpu", torch.bfloat16):
        edit_pixels(
            editor,
            photos[:1],
            PROMPTS[:1],
            [0],
            SamplingSettings(num_inference_steps=1),
            encodings=Encodings(editor, under_autocast),
        )
    assert torch.equal(plain(PROMPTS[:1]).hidden, under_autocast(PROMPTS[:1]).hidden)


def test_vae_in_float16_is_run_in_float32(editor, photos) -> None:
    """If its configuration says that it overflows. Afterwards it is in float16 again."""
    vae = copy.deepcopy(editor.vae).half()
    editor.vae, seen = vae, []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
        for part in (vae.encoder, vae.decoder)
    ]
    set_scheduler(editor, "ddim")
    settings = dict(num_inference_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        edit_pixels(editor, photos[:1], PROMPTS[:1], [0], SamplingSettings(**settings))
    assert seen == [(torch.float32, torch.float32)] * 2
    assert {value.dtype for value in vae.parameters()} == {torch.float16}
    for hook in hooks:
        hook.remove()


def test_runs_where_the_unet_is(editor, photos, monkeypatch) -> None:
    """Not on the device of the text encoders, which a training run moves away when every prompt is encoded."""
    expected = edit_pixels(editor, photos[:1], PROMPTS[:1], [0], SamplingSettings(num_inference_steps=2))[0][0]

    def fail(self) -> torch.device:
        raise AssertionError("used the device of the text encoders")

    monkeypatch.setattr(DiffusionPipeline, "_execution_device", property(fail))
    pixels = edit_pixels(editor, photos[:1], PROMPTS[:1], [0], SamplingSettings(num_inference_steps=2))[0][0]
    assert torch.equal(pixels, expected)


def test_offloaded_models(tiny_sdxl_editor: Path, photos) -> None:
    """The hooks of offloaded models decide on the device."""
    settings = dict(num_inference_steps=2)
    expected = edit_pixels(load_editor(tiny_sdxl_editor), photos[:1], PROMPTS[:1], [0], SamplingSettings(**settings))[
        0
    ][0]
    offloaded = load_editor(tiny_sdxl_editor)
    offloaded.enable_model_cpu_offload(device="cpu")
    grouped = load_editor(tiny_sdxl_editor)
    grouped.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    for pipeline in (offloaded, grouped):
        pixels = edit_pixels(pipeline, photos[:1], PROMPTS[:1], [0], SamplingSettings(**settings))[0][0]
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-4)


def test_watermark_of_the_pipeline(editor, photos) -> None:
    """Only if the pipeline has one."""

    class Watermark:
        def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
            assert images.shape == (1, 3, SIZE[1], SIZE[0])
            return torch.ones_like(images)

    assert editor.watermark is None
    editor.watermark = Watermark()
    assert (edit_pixels(editor, photos[:1], PROMPTS[:1], [0], SamplingSettings(num_inference_steps=1))[0][0] == 1).all()


def test_warning_about_long_prompts(editor, photos, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        edit_images(editor, photos[:1], ["very " * 100], [0], SamplingSettings(num_inference_steps=1))
    assert caplog.text.count("too long for the text encoder") == 1


def test_sizes_of_the_model(editor, monkeypatch) -> None:
    assert size_multiple(editor) == 4 and native_resolution(editor) == 32
    photo = Image.new("RGB", (3000, 1500))
    assert fit_to_model(photo, editor).size == (32, 16)
    monkeypatch.setattr(editor, "vae_scale_factor", 128)  # a native side of 2048
    assert max(fit_to_model(photo, editor).size) == 1024


# ---- the null condition: training's equals that of the stock pipelines at inference ---------------------------------


@torch.no_grad()
def test_null_condition_of_sd(tiny_editor: Path) -> None:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    embeds = pipeline._encode_prompt("make it red", torch.device("cpu"), 1, do_classifier_free_guidance=True)
    _, image_branch, uncond_branch = embeds.chunk(3)
    null = make_prompt_encoder(pipeline).null_embeds
    assert torch.equal(null.hidden, image_branch) and torch.equal(null.hidden, uncond_branch)
    assert null.hidden.any() and null.pooled is None


@torch.no_grad()
@pytest.mark.parametrize("force_zeros", [True, False])
def test_null_condition_of_sdxl(editor, force_zeros: bool) -> None:
    editor.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    try:
        hidden, null_hidden, pooled, null_pooled = editor.encode_prompt(
            "make it red", device=torch.device("cpu"), do_classifier_free_guidance=True
        )
        encoder = make_prompt_encoder(editor)
    finally:
        editor.register_to_config(force_zeros_for_empty_prompt=True)
    null, text = encoder.null_embeds, encoder(["make it red"])
    assert torch.equal(null.hidden, null_hidden) and torch.equal(null.pooled, null_pooled)
    assert torch.equal(text.hidden, hidden) and torch.equal(text.pooled, pooled)
    assert null.hidden.any() == null.pooled.any() == (not force_zeros)


@torch.no_grad()
@pytest.mark.parametrize("force_zeros", [True, False])
def test_null_condition_of_sdxl_loaded_for_training(tiny_sdxl_editor: Path, force_zeros: bool, tmp_path: Path) -> None:
    """The training scripts read `force_zeros_for_empty_prompt` from the folder."""
    from utils.models.stable_diffusion import ModelOptions, load_stable_diffusion

    pipeline = StableDiffusionXLInstructPix2PixPipeline.from_pretrained(
        tiny_sdxl_editor, force_zeros_for_empty_prompt=force_zeros, add_watermarker=False
    )
    pipeline.save_pretrained(tmp_path / "editor")
    parts = load_stable_diffusion(ModelOptions(str(tmp_path / "editor")))
    _, null_hidden, _, null_pooled = pipeline.encode_prompt("x", device="cpu", do_classifier_free_guidance=True)
    null = make_prompt_encoder(parts).null_embeds
    assert torch.equal(null.hidden, null_hidden) and torch.equal(null.pooled, null_pooled)
    assert null.hidden.any() == null.pooled.any() == (not force_zeros)


@pytest.mark.parametrize("force_zeros", [True, False])
def test_dropout_replaces_both_embeddings(editor, force_zeros: bool) -> None:
    """A dropped row has the null embeddings, hidden and pooled, bit for bit; the other rows are unchanged."""
    encoder = make_prompt_encoder(editor)
    null = encoder.null_embeds if force_zeros else encoder([""])
    embeds = encoder(["one", "two", "three"])
    dropped = drop_prompts(embeds, null, torch.tensor([True, False, True]))
    for value, kept, empty in zip(dropped, embeds, null, strict=True):
        assert torch.equal(value, torch.stack([empty[0], kept[1], empty[0]]))
    assert isinstance(dropped, PromptEmbeds) and dropped.pooled.shape == (3, 48)
