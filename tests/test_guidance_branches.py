"""Guidance with one to three branches against the stock pipelines, for few-step schedulers, SD and SDXL."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from tests.edits import counting
from utils.editing.edit_images import SamplingSettings, edit_pixels
from utils.editing.guidance import branch_coefficients, coefficients_of_steps
from utils.editing.schedulers import SCHEDULERS, choose_scheduler
from utils.errors import InputError

FEW_STEPS = {
    "lcm": ("lcm", None),
    "euler trailing": ("euler", "trailing"),
    "euler ancestral": ("euler_a", None),
    "ddim": ("ddim", None),
    "ddim trailing, eta 0.7": ("ddim", "trailing"),
    "tcd": ("tcd", None),
}
ETA = {"tcd": 0.3, "ddim trailing, eta 0.7": 0.7}
PROMPT, SEED, STEPS = "make it night", 7, 4
FAMILIES = ["sd", "sdxl"]


@pytest.fixture
def photo(photos) -> Image.Image:
    return photos[0]


def editor_with(loaded_editors: dict[str, DiffusionPipeline], family: str, scheduler: str) -> DiffusionPipeline:
    """A pipeline with shared weights and a scheduler of `FEW_STEPS`."""
    pipeline = copy.copy(loaded_editors[family])
    pipeline.scheduler = choose_scheduler(pipeline.scheduler, *FEW_STEPS[scheduler])
    return pipeline


def stock_pixels(pipeline: DiffusionPipeline, photo: Image.Image, **settings) -> torch.Tensor:
    """(3, H, W), with the same seed."""
    size = dict(height=photo.height, width=photo.width) if hasattr(pipeline, "text_encoder_2") else {}
    generator = torch.Generator().manual_seed(SEED)
    edited = pipeline(PROMPT, image=photo, output_type="np", generator=generator, **size, **settings).images
    return torch.from_numpy(edited)[0].permute(2, 0, 1)


@torch.no_grad()
def three_branches(
    pipeline: DiffusionPipeline, photo: Image.Image, s_text: float, s_image: float, eta: float | None = None
) -> torch.Tensor:
    """Equation 3 of the paper, with every branch evaluated at every step; (3, H, W)."""
    if hasattr(pipeline, "text_encoder_2"):
        text, null, pooled, null_pooled = pipeline.encode_prompt(PROMPT, device="cpu", do_classifier_free_guidance=True)
        time_ids = torch.tensor([[photo.height, photo.width, 0, 0, photo.height, photo.width]], dtype=torch.float32)
        added = {"text": dict(text_embeds=pooled, time_ids=time_ids)}
        added["null"] = dict(text_embeds=null_pooled, time_ids=time_ids)
    else:
        text, null, _ = pipeline._encode_prompt(PROMPT, "cpu", 1, do_classifier_free_guidance=True).chunk(3)
        added = {"text": None, "null": None}
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
    original = pipeline.vae.encode(pixels).latent_dist.mode()
    generator = torch.Generator().manual_seed(SEED)
    latents = torch.randn(original.shape, generator=generator) * scheduler.init_noise_sigma
    extra = pipeline.prepare_extra_step_kwargs(generator, eta)
    if eta is None:
        extra.pop("eta", None)
    for timestep in scheduler.timesteps:
        noisy = scheduler.scale_model_input(latents, timestep)

        def predict(embeds: torch.Tensor, kind: str, image: torch.Tensor, noisy=noisy, timestep=timestep):
            model_input = torch.cat([noisy, image], dim=1)
            settings = dict(encoder_hidden_states=embeds, added_cond_kwargs=added[kind])
            return pipeline.unet(model_input, timestep, **settings).sample.double()

        e_text, e_image = predict(text, "text", original), predict(null, "null", original)
        e_none = predict(null, "null", torch.zeros_like(original))
        guided = (e_none + s_image * (e_image - e_none) + s_text * (e_text - e_image)).float()
        latents = scheduler.step(guided, timestep, latents, **extra, return_dict=False)[0]
    decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(("scales", "branches"), [((2.0, 1.0), 2), ((7.5, 1.0), 2), ((1.5, 1.5), 2), ((3.0, 1.5), 3)])
@pytest.mark.parametrize("scheduler", FEW_STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_three_branches_of_stock(
    loaded_editors, photo, family: str, scheduler: str, scales: tuple[float, float], branches: int
) -> None:
    """Stock evaluates 3 rows per step, ours those that are needed, and the images are equal to 1e-4."""
    pipeline = editor_with(loaded_editors, family, scheduler)
    settings = dict(num_inference_steps=STEPS, guidance_scale=scales[0], image_guidance_scale=scales[1])
    settings["eta"] = ETA.get(scheduler, 0.0)
    with counting(pipeline) as stock:
        expected = stock_pixels(pipeline, photo, **settings)
    with counting(pipeline) as ours:
        edited = edit_pixels(pipeline, [photo], [PROMPT], [SEED], SamplingSettings(**settings))[0][0]
    assert stock["rows"] == [3] * STEPS and ours["rows"] == [branches] * STEPS
    assert expected.std() > 0.02, "a flat image proves nothing"
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("scales", "branches"),
    [((1.0, 1.0), 1), ((1.0, 1.5), 3), ((2.0, 0.9), 3), ((0.0, 1.5), 2), ((0.5, 0.5), 2), ((0.0, 0.0), 1)],
)
@pytest.mark.parametrize("scheduler", ["lcm", "euler trailing", "euler ancestral", "ddim", "tcd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_follows_the_formula_where_stock_drops_guidance(
    loaded_editors, photo, family: str, scheduler: str, scales: tuple[float, float], branches: int
) -> None:
    """s_T <= 1 or s_I < 1: stock evaluates one branch, ours all that the formula needs."""
    pipeline = editor_with(loaded_editors, family, scheduler)
    settings = dict(num_inference_steps=STEPS, guidance_scale=scales[0], image_guidance_scale=scales[1])
    with counting(pipeline) as counts:
        edited = edit_pixels(pipeline, [photo], [PROMPT], [SEED], SamplingSettings(eta=None, **settings))[0][0]
    assert counts["rows"] == [branches] * STEPS
    torch.testing.assert_close(edited, three_branches(pipeline, photo, *scales), rtol=0, atol=1e-4)
    with counting(pipeline) as counts:
        stock = stock_pixels(pipeline, photo, eta=ETA.get(scheduler, 0.0), **settings)
    assert counts["rows"] == [1] * STEPS
    is_same = (stock - edited).abs().max() <= 1e-4
    assert bool(is_same) == (scales == (1.0, 1.0))


@pytest.mark.parametrize("family", FAMILIES)
def test_eta_of_tcd(loaded_editors, photo, family: str) -> None:
    """Stock pipelines pass eta 0 to TCD. Ours pass 0 by default, and with None keep the scheduler's own 0.3."""
    pipeline = editor_with(loaded_editors, family, "tcd")
    settings = dict(num_inference_steps=STEPS, guidance_scale=2.0, image_guidance_scale=1.0)

    def edit(**eta: float | None) -> torch.Tensor:
        return edit_pixels(pipeline, [photo], [PROMPT], [SEED], SamplingSettings(**eta, **settings))[0][0]

    torch.testing.assert_close(edit(), stock_pixels(pipeline, photo, **settings), rtol=0, atol=1e-4)
    torch.testing.assert_close(edit(eta=None), stock_pixels(pipeline, photo, eta=0.3, **settings), rtol=0, atol=1e-4)
    assert torch.equal(edit(), edit(eta=0.0)) and torch.equal(edit(eta=None), edit(eta=0.3))
    assert (edit() - edit(eta=None)).abs().max() > 1e-3
    other = editor_with(loaded_editors, family, "ddim")
    same = [
        edit_pixels(other, [photo], [PROMPT], [SEED], SamplingSettings(eta=eta, **settings))[0][0]
        for eta in (None, 0.0)
    ]
    assert torch.equal(*same)


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
def test_original_inference_steps(loaded_editors, photo, scheduler: str) -> None:
    """The timesteps of a distillation are in the configuration of the scheduler: those of DMD2."""
    pipeline = editor_with(loaded_editors, "sd", scheduler)
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, original_inference_steps=4)
    seen = []
    hook = pipeline.unet.register_forward_hook(lambda module, inputs, output: seen.append(int(inputs[1])))
    settings = dict(num_inference_steps=4, guidance_scale=2.0, image_guidance_scale=1.0)
    try:
        edited = edit_pixels(pipeline, [photo], [PROMPT], [SEED], SamplingSettings(**settings))[0][0]
    finally:
        hook.remove()
    assert seen == [999, 749, 499, 249]
    torch.testing.assert_close(edited, stock_pixels(pipeline, photo, **settings), rtol=0, atol=1e-4)
    with pytest.raises(InputError, match="5 steps are not possible with the scheduler"):
        edit_pixels(pipeline, [photo], [PROMPT], [0], SamplingSettings(num_inference_steps=5))
    again = choose_scheduler(pipeline.scheduler, scheduler)  # the name of the model's own scheduler
    assert again.config.original_inference_steps == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_interval(loaded_editors, photo, family: str) -> None:
    """The rows of each step; the interval (0, 1) is no change, and an empty one is an edit with scales 1 and 1."""
    pipeline = editor_with(loaded_editors, family, "ddim")
    settings = dict(num_inference_steps=4, guidance_scale=5.0, image_guidance_scale=1.5)

    def edit(interval: tuple[float, float] | None) -> tuple[torch.Tensor, list[int]]:
        with counting(pipeline) as counts:
            edited = edit_pixels(
                pipeline, [photo], [PROMPT], [SEED], SamplingSettings(guidance_interval=interval, **settings)
            )[0][0]
        return edited, counts["rows"]

    whole, rows = edit(None)
    assert rows == [3] * 4
    assert torch.equal(edit((0.0, 1.0))[0], whole)
    half, rows = edit((0.25, 0.75))
    assert rows == [1, 3, 3, 1]
    none, rows = edit((0.0, 0.1))
    assert rows == [1] * 4
    torch.testing.assert_close(none, three_branches(pipeline, photo, 1.0, 1.0), rtol=0, atol=1e-4)
    assert all((half - other).abs().max() > 1e-3 for other in (whole, none))


def test_coefficients_of_steps() -> None:
    weights = branch_coefficients(7.5, 1.5)
    is_on = [step == weights for step in coefficients_of_steps(weights, 10, (0.2, 0.5))]
    assert is_on == [False] * 2 + [True] * 3 + [False] * 5
    assert all(sum(step.values()) == 1 for step in coefficients_of_steps(weights, 10, (0.2, 0.5)))
    with pytest.raises(ValueError, match="0 <= START <= STOP <= 1"):
        coefficients_of_steps(weights, 10, (0.5, 0.2))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if not name.startswith("edm")])
def test_every_scheduler_edits(loaded_editors, photo, name: str) -> None:
    """Equal to stock with the same scheduler, whose betas and prediction type are those of the model's own."""
    pipeline = copy.copy(loaded_editors["sd"])
    pipeline.scheduler = choose_scheduler(pipeline.scheduler, name)
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name][0]
    config = pipeline.scheduler.config
    assert (config.beta_end, config.beta_schedule, config.prediction_type) == (0.012, "scaled_linear", "epsilon")
    assert not config.get("clip_sample", False)
    settings = dict(num_inference_steps=5, guidance_scale=2.0, image_guidance_scale=1.0)
    edited = edit_pixels(
        loaded_editors["sd"], [photo], [PROMPT], [SEED], SamplingSettings(scheduler=pipeline.scheduler, **settings)
    )[0][0]
    torch.testing.assert_close(edited, stock_pixels(pipeline, photo, **settings), rtol=0, atol=1e-4)


def test_choosing_a_scheduler() -> None:
    own = diffusers.EulerAncestralDiscreteScheduler(beta_end=0.013, timestep_spacing="leading")
    assert choose_scheduler(own).config.timestep_spacing == "leading"
    assert choose_scheduler(own, "ddim", "trailing").config.timestep_spacing == "trailing"
    assert not choose_scheduler(own, "ddim").config.clip_sample  # the default of the class is True
    assert type(choose_scheduler(own, "EulerDiscreteScheduler")) is diffusers.EulerDiscreteScheduler
    sde = choose_scheduler(own, "dpm++_sde")
    assert choose_scheduler(sde).config.algorithm_type == "sde-dpmsolver++"
    assert choose_scheduler(sde, "unipc").config.solver_type == "bh2"
    edm = diffusers.EDMEulerScheduler(sigma_max=120.0)
    assert choose_scheduler(edm, "edm_dpm++").config.sigma_max == 120.0
    for scheduler, name, spacing, message in (
        (own, "eulr", None, "--scheduler eulr is unknown"),
        (own, "edm_euler", None, "other noise levels"),
        (edm, "euler", None, "choose edm_euler"),
        (own, "lcm", "trailing", "no effect on LCMScheduler"),
        (edm, None, "trailing", "no effect on EDMEulerScheduler"),
    ):
        with pytest.raises(InputError, match=message):
            choose_scheduler(scheduler, name, spacing)
