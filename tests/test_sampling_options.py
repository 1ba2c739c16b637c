"""Negative prompts, guidance rescale, Karras sigmas, offloading, overflow and decoding in parts."""

import copy
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionInstructPix2PixPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image

import infer
from tests.edits import make_service
from tests.pairs import make_noise
from utils.cli import pick
from utils.editing import edit_images as editing
from utils.editing import editor_setup
from utils.editing.edit_images import SamplingSettings, edit_images, edit_pixels, fit_image
from utils.editing.editor_setup import offload_editor, open_editor
from utils.editing.flags import EditorOptions
from utils.editing.guidance import rescale
from utils.editing.jobs import Job
from utils.editing.loading import load_editor
from utils.editing.records import read_record
from utils.editing.settings import EditSettings
from utils.errors import InputError
from utils.training.flags import parse_training_flags
from utils.training.settings import ValidationOptions
from utils.training.validation import sampling_settings

TWO_STEPS = SamplingSettings(num_inference_steps=2)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    make_noise((40, 60)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def edit(*flags: object) -> int:
    return infer.main([str(flag) for flag in flags])


def test_negative_prompt_and_karras_sigmas_equal_stock(tiny_editor, photo, capsys):
    """By flags and by a line of jobs; both are recorded, so `--repeat` makes the same edit."""
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tiny_editor)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    fitted, generator = fit_image(Image.open(photo), 32, 4), torch.Generator().manual_seed(7)
    settings = dict(num_inference_steps=4, guidance_scale=7.5, image_guidance_scale=1.5, generator=generator)
    expected = np.asarray(pipeline("snow", fitted, negative_prompt="blurry", **settings).images[0], int)

    out, model = photo.with_name("out.png"), ("--model", tiny_editor, "--seed", 7)
    flags = ("--negative_prompt", "blurry", "--karras_sigmas", "--scheduler", "euler", "--steps", 4)
    assert edit(*model, "--input", photo, "--output", out, "--edit", "snow", *flags) == 0
    row = {"image": "photo.png", "edit": "snow", "steps": 4, "scheduler": "euler"}
    row |= {"negative_prompt": "blurry", "karras_sigmas": True}
    photo.with_name("jobs.jsonl").write_text(json.dumps(row))
    assert edit(*model, "--jobs", photo.with_name("jobs.jsonl"), "--output", photo.parent / "jobs") == 0
    for path in (out, photo.parent / "jobs/photo.png"):
        assert np.abs(np.asarray(Image.open(path), int) - expected).max() <= 1
        recorded = read_record(path)["settings"]
        assert (recorded["negative_prompt"], recorded["karras_sigmas"]) == ("blurry", True)
    assert edit("--repeat", out, "--model", tiny_editor) == 0
    assert "identical to" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--karras_sigmas",), "--karras_sigmas has no effect on DDIMScheduler: choose --scheduler euler, heun"),
        (("--eta", 0.5, "--scheduler", "euler"), "--eta 0.5 has no effect on EulerDiscreteScheduler"),
        (("--guidance_rescale", 1.5), "--guidance_rescale 1.5: must be from 0 to 1"),
        (("--negative_prompt", "x" * 2001), "must be text of at most 2000 characters"),
        (("--offload", "model", "--device", "cpu"), "--offload model needs a GPU"),
        (("--offload", "sequential", "--compile"), "--compile has no effect with --offload sequential"),
    ],
    ids=lambda value: str(value[0])[:20] if isinstance(value, tuple) else "",
)
def test_settings_without_effect_are_refused(tiny_editor, photo, capsys, flags, message):
    with pytest.raises(SystemExit):
        edit("--model", tiny_editor, "--input", photo, "--edit", "snow", "--steps", 2, *flags)
    assert message in capsys.readouterr().err


def test_without_guidance_the_user_is_told_what_did_nothing(tiny_editor, photo, capsys):
    scales = ("--cfg-text", 1, "--cfg-image", 1, "--steps", 1)
    more = ("--negative_prompt", "x", "--guidance_rescale", 0.5)
    out = photo.with_name("out.png")
    assert edit("--model", tiny_editor, "--input", photo, "--edit", "snow", "--output", out, *scales, *more) == 0
    assert "--negative_prompt and --guidance_rescale had no effect" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_rescale_equals_the_paper(dtype):
    """arXiv 2305.08891, equations 15 and 16, per image; diffusers has the same formula."""
    generator = torch.Generator().manual_seed(0)
    text, combined = (torch.randn(3, 4, 8, 8, generator=generator, dtype=torch.float64) * s for s in (1.0, 5.0))
    rescaled = rescale(combined.to(dtype), text.to(dtype), 0.7)
    assert rescaled.dtype == dtype
    for row in range(3):
        factor = 0.7 * text[row].std() / combined[row].std() + 0.3
        torch.testing.assert_close(rescaled[row].double(), combined[row] * factor, rtol=2e-3, atol=2e-3)
    if dtype == torch.float64:
        torch.testing.assert_close(rescaled, rescale_noise_cfg(combined, text, 0.7))
    assert torch.equal(rescale(combined.to(dtype), text.to(dtype), 0.0), combined.to(dtype))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_guidance_rescale_of_an_edit(loaded_editors, photo, kind):
    """It equals a loop with the formula in place of ours, and an image alone equals one of a batch."""
    pipeline = copy.copy(loaded_editors[kind])
    zero_snr = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **zero_snr)
    image = fit_image(Image.open(photo), 32, 4)
    settings = SamplingSettings(num_inference_steps=3, guidance_rescale=0.7)
    edited = edit_pixels(pipeline, [image] * 2, ["snow", "rain"], [1, 2], settings)[0]
    alone = edit_pixels(pipeline, [image], ["rain"], [2], settings)[0][0]
    torch.testing.assert_close(edited[1], alone, rtol=0, atol=1e-5)
    plain = edit_pixels(pipeline, [image], ["rain"], [2], SamplingSettings(num_inference_steps=3))[0][0]
    assert (alone - plain).abs().max() > 1e-3

    step = DDIMScheduler.step
    predictions = []
    hook = pipeline.unet.register_forward_hook(lambda module, inputs, output: predictions.append(output[0]))

    def rescaling_step(self, guided, *inputs, **options):
        return step(self, rescale_noise_cfg(guided, predictions[-1][:1], 0.7), *inputs, **options)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DDIMScheduler, "step", rescaling_step)
            stock = edit_pixels(pipeline, [image], ["rain"], [2], SamplingSettings(num_inference_steps=3))[0][0]
    finally:
        hook.remove()
    torch.testing.assert_close(alone, stock, rtol=0, atol=1e-5)


def test_recommended_resolution_and_rescale(tiny_editor, photo, capsys):
    """Of an editor's adapted.json; flags override them."""
    model = shutil.copytree(tiny_editor, photo.parent / "editor")
    (model / "adapted.json").write_text(json.dumps({"recommended": {"resolution": 64, "guidance_rescale": 0.5}}))
    flags = ("--model", model, "--input", photo, "--edit", "snow", "--steps", 1, "--seed", 1)
    assert edit(*flags, "--output", photo.with_name("a.png")) == 0
    assert "recommended by this editor: guidance_rescale 0.5, resolution 64" in capsys.readouterr().out
    assert edit(*flags, "--output", photo.with_name("b.png"), "--resolution", 32) == 0
    sizes = [Image.open(photo.with_name(name)).size for name in ("a.png", "b.png")]
    assert sizes == [(64, 44), (36, 24)]
    assert read_record(photo.with_name("a.png"))["settings"]["guidance_rescale"] == 0.5
    (model / "adapted.json").write_text(json.dumps({"recommended": {"resolution": 4}}))
    with pytest.raises(InputError, match="resolution 4: must be from 8 to 4096"):
        open_editor(EditorOptions(str(model), device="cpu"))


@pytest.mark.parametrize("name", ["tiny_editor", "tiny_sdxl_editor"])
def test_offloaded_editors_edit_the_same(name, request, photo):
    """The device is the CPU here; a GPU, and --offload sequential, which needs one, are in test_gpu.py."""
    folder, image = request.getfixturevalue(name), [Image.open(photo).resize((32, 32))]
    expected = edit_pixels(load_editor(folder), image, ["snow"], [1], TWO_STEPS)[0][0]
    pipeline = load_editor(folder)
    offload_editor(pipeline, "model", "cpu")
    for _ in range(2):
        torch.testing.assert_close(edit_pixels(pipeline, image, ["snow"], [1], TWO_STEPS)[0][0], expected)


@pytest.fixture
def overflowing(tiny_editor):
    """An editor whose decoder overflows in float16, and one in float32 with the same weights."""
    pipelines = [load_editor(tiny_editor), load_editor(tiny_editor)]
    for pipeline in pipelines:
        for part in (pipeline.vae.encoder, pipeline.vae.decoder):
            weight = part.conv_in.weight.data  # the norm after it makes large values harmless in float32
            weight *= 6e4 / weight.abs().max()
    pipelines[0].vae.half()
    return pipelines


def test_a_vae_that_overflows_is_run_again_in_float32(overflowing, photo, caplog):
    """Encoder and decoder; its weights are in float16 again afterwards."""
    image = [Image.open(photo).resize((32, 32))]
    half, single = (edit_images(pipeline, image, ["snow"], [1], TWO_STEPS)[0] for pipeline in overflowing)
    assert np.abs(np.asarray(half, int) - np.asarray(single, int)).max() <= 2 and np.asarray(half).std() > 1
    assert "decoding in float32" in caplog.text and "encoding in float32" in caplog.text
    assert not half.info["overflowed"] and overflowing[0].vae.dtype == torch.float16


def test_an_edit_with_nan_is_a_failure_and_no_black_image(tiny_editor, photo, capsys):
    """The UNet itself overflows; the exit code is 1, the other images of the run are saved."""
    broken = load_editor(tiny_editor)
    make_noise((32, 32), seed=3).save(photo.with_name("other.png"))
    broken.unet.conv_out.bias.data[0] = torch.nan
    broken.save_pretrained(photo.parent / "broken")
    out = photo.with_name("out.png")
    flags = ("--model", photo.parent / "broken", "--input", photo, "--edit", "snow", "--steps", 1, "--output", out)
    assert edit(*flags) == 1 and not out.exists()
    printed = capsys.readouterr()
    assert printed.err.count("its edit has NaN values: give --dtype bf16 or fp32") == 1
    assert printed.out.startswith("0 of 1 edited")


def test_a_batch_is_decoded_in_parts(editor, photo, monkeypatch):
    """As many images at once as `DECODED_PIXELS` allows, at least one; the edits are the same."""
    images, seeds = [Image.open(photo).resize((32, 32))] * 5, list(range(5))
    sizes: list[int] = []
    hook = editor.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    whole = edit_pixels(editor, images, ["snow"] * 5, seeds, TWO_STEPS)[0]
    for pixels, expected in ((2 * 32 * 32, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(editing, "DECODED_PIXELS", pixels)
        sizes.clear()
        parts = edit_pixels(editor, images, ["snow"] * 5, seeds, TWO_STEPS)[0]
        assert sizes == expected
        torch.testing.assert_close(torch.stack(parts), torch.stack(whole), rtol=0, atol=1e-5)
    hook.remove()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError(), OSError(12, "Cannot allocate memory")]
)
def test_too_little_memory_for_the_model(tiny_editor, photo, capsys, monkeypatch, error):
    """One message with what to do, and not the advice for damaged files."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", fail)
    with pytest.raises(SystemExit):
        edit("--model", tiny_editor, "--input", photo, "--edit", "snow")
    message = capsys.readouterr().err
    assert "needs more memory than there is" in message and editor_setup.LOADING_ADVICE in message
    assert message.count("\n") == 1


def test_an_impossible_eta_of_a_job_without_output(editor, photo, caplog):
    job = Job("photo.png", photo.read_bytes, "snow", EditSettings(steps=1, eta=0.5, scheduler="euler_a"), seed=1)
    with caplog.at_level(logging.WARNING), pytest.raises(InputError, match="--eta 0.5 has no effect"):
        list(make_service(editor).edit([job]))


def test_flags_of_validation_images():
    """Every setting of the validation images is a flag."""
    values = dict(num_inference_steps=3, guidance_scale=4.0, image_guidance_scale=1.2, guidance_rescale=0.7)
    flags = [f"--validation_{name}={value}" for name, value in values.items()]
    given = ["--pretrained_model_name_or_path=a", "--dataset_name=b", "--validation_negative_prompt=dark", *flags]
    options = pick(parse_training_flags(given, ""), ValidationOptions)
    assert sampling_settings(options) == SamplingSettings(**values, negative_prompt="dark")
