"""Noise schedule, targets, loss weights and the published scheduler, against their formulas."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
)

from utils.errors import InputError
from utils.models.noise_schedules import (
    ObjectiveOptions,
    make_inference_scheduler,
    make_noise_schedule,
    min_snr_weights,
    offset_noise,
    per_sample_loss,
)

# As Stable Diffusion 1.x and 2.x publish it.
PUBLISHED = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    steps_offset=1,
    set_alpha_to_one=False,
)
ZERO_SNR = ObjectiveOptions(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def base_scheduler(scheduler_class: type[SchedulerMixin], **changes: object) -> SchedulerMixin:
    return scheduler_class.from_config(PUBLISHED | changes)


# ---- the schedule trained with --------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_stable_diffusion() -> None:
    schedule = make_noise_schedule(dict(base_scheduler(PNDMScheduler).config), ObjectiveOptions())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(schedule.scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=0)
    assert len(schedule) == 1000
    assert schedule.prediction_type == "epsilon"


def test_the_base_says_what_is_predicted_and_the_flag_overrules_it() -> None:
    base = dict(base_scheduler(PNDMScheduler, prediction_type="v_prediction").config)
    assert make_noise_schedule(base, ObjectiveOptions()).prediction_type == "v_prediction"
    overruled = make_noise_schedule(base, ObjectiveOptions(prediction_type="epsilon"))
    assert overruled.prediction_type == "epsilon"


def test_rescaled_betas_end_in_noise_alone() -> None:
    schedule = make_noise_schedule(dict(base_scheduler(PNDMScheduler).config), ZERO_SNR)
    plain = make_noise_schedule(dict(base_scheduler(PNDMScheduler).config), ObjectiveOptions())
    root, last, first = (plain.scheduler.alphas_cumprod.double().sqrt()[index] for index in (slice(None), -1, 0))
    expected = ((root - last) * first / (first - last)) ** 2  # 2305.08891, algorithm 1
    torch.testing.assert_close(schedule.scheduler.alphas_cumprod.double(), expected, rtol=1e-4, atol=1e-9)
    assert schedule.scheduler.alphas_cumprod[-1] == 0
    latents, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    assert torch.equal(schedule.scheduler.add_noise(latents, noise, torch.tensor([999, 999])), noise)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        ({}, ObjectiveOptions(rescale_betas_zero_snr=True), "--prediction_type v_prediction"),
        ({"rescale_betas_zero_snr": True}, ObjectiveOptions(), "--prediction_type v_prediction"),
        ({"prediction_type": "sample"}, ObjectiveOptions(), "prediction type 'sample'"),
    ],
)
def test_what_cannot_be_trained_is_refused(base: dict, options: ObjectiveOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_noise_schedule(PUBLISHED | base, options)


# ---- target and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_of_each_prediction_type(prediction_type: str) -> None:
    schedule = make_noise_schedule(PUBLISHED, ObjectiveOptions(prediction_type=prediction_type))
    latents, noise = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    timesteps = torch.tensor([0, 17, 500, 999])
    alpha_bar = schedule.scheduler.alphas_cumprod[timesteps].double()[:, None, None, None]
    velocity = alpha_bar.sqrt() * noise.double() - (1 - alpha_bar).sqrt() * latents.double()
    expected = noise if prediction_type == "epsilon" else velocity.float()
    torch.testing.assert_close(schedule.make_target(latents, noise, timesteps), expected, rtol=1e-5, atol=1e-5)


def test_min_snr_weights() -> None:
    snr = torch.tensor([0.0, 0.25, 5.0, 80.0], dtype=torch.float64)
    alphas_cumprod, timesteps = snr / (1 + snr), torch.arange(4)
    for_velocity = min_snr_weights(alphas_cumprod, timesteps, 5.0, "v_prediction")
    torch.testing.assert_close(for_velocity, torch.tensor([0.0, 0.2, 5 / 6, 5 / 81]), rtol=1e-6, atol=0)
    for_noise = min_snr_weights(alphas_cumprod, timesteps[1:], 5.0, "epsilon")
    torch.testing.assert_close(for_noise, torch.tensor([1.0, 1.0, 5 / 80]), rtol=1e-6, atol=0)


def test_min_snr_weights_of_a_whole_schedule_with_zero_terminal_snr_are_finite() -> None:
    schedule = make_noise_schedule(PUBLISHED, ZERO_SNR)
    weights = min_snr_weights(schedule.scheduler.alphas_cumprod, torch.arange(1000), 5.0, "v_prediction")
    assert weights.isfinite().all()
    assert weights[-1] == 0


def test_offset_noise_moves_whole_channels() -> None:
    noise, channel_noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 1, 1)
    assert offset_noise(noise, channel_noise, 0.0) is noise
    moved = offset_noise(noise, channel_noise, 0.1) - noise
    torch.testing.assert_close(moved, 0.1 * channel_noise.expand(2, 4, 3, 3), rtol=0, atol=1e-6)


def test_the_loss_is_a_mean_per_sample_in_float32() -> None:
    target = torch.zeros(2, 4, 8, 8)
    prediction = torch.stack([torch.full((4, 8, 8), 300.0), torch.full((4, 8, 8), 0.5)]).half()
    loss = per_sample_loss(prediction, target)  # 300² is beyond the range of float16
    assert loss.dtype == torch.float32
    assert loss.tolist() == [90000.0, 0.25]


# ---- the scheduler saved with the editor ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_the_published_scheduler_is_the_base_s_own(scheduler_class: type[SchedulerMixin]) -> None:
    base = base_scheduler(scheduler_class)
    schedule = make_noise_schedule(dict(base.config), ObjectiveOptions(prediction_type="v_prediction"))
    published = make_inference_scheduler(base, schedule)
    assert type(published) is scheduler_class
    expected = dict(base.config) | {"prediction_type": "v_prediction"}
    assert {name: value for name, value in published.config.items() if name[0] != "_"} == {
        name: value for name, value in expected.items() if name[0] != "_"
    }


@pytest.mark.parametrize(
    ("base", "published_class"),
    [
        (base_scheduler(PNDMScheduler), DDIMScheduler),
        (base_scheduler(PNDMScheduler, rescale_betas_zero_snr=False), DDIMScheduler),  # a key PNDM keeps, not heeds
        (base_scheduler(DDIMScheduler), DDIMScheduler),
        (base_scheduler(DDPMScheduler), DDPMScheduler),
        (base_scheduler(EulerDiscreteScheduler), EulerDiscreteScheduler),
    ],
    ids=["PNDM", "PNDM with a key of DDIM", "DDIM", "DDPM", "Euler"],
)
def test_zero_terminal_snr_is_published_with_a_scheduler_that_starts_from_noise_alone(
    base: SchedulerMixin, published_class: type[SchedulerMixin]
) -> None:
    schedule = make_noise_schedule(dict(base.config), ZERO_SNR)
    published = make_inference_scheduler(base, schedule)
    assert type(published) is published_class
    published.set_timesteps(20)
    assert int(published.timesteps[0]) == 999
    assert published.config.prediction_type == "v_prediction"
    assert published.config.timestep_spacing == "trailing"
    # Euler divides by alpha and so keeps a trace of it, 2^-24.
    torch.testing.assert_close(published.alphas_cumprod, schedule.scheduler.alphas_cumprod, rtol=1e-6, atol=1e-7)


def test_the_published_scheduler_gives_back_the_image_of_a_perfect_prediction(tmp_path) -> None:
    base = base_scheduler(PNDMScheduler)
    schedule = make_noise_schedule(dict(base.config), ZERO_SNR)
    make_inference_scheduler(base, schedule).save_pretrained(tmp_path)
    published = DDIMScheduler.from_pretrained(tmp_path)
    image, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    published.set_timesteps(10)
    sample = noise
    for timestep in published.timesteps:
        alpha_bar = published.alphas_cumprod[timestep]
        velocity = (alpha_bar.sqrt() * sample - image) / (1 - alpha_bar).sqrt()  # v of a model that knows the image
        sample = published.step(velocity, timestep, sample).prev_sample
    alpha_bar = published.alphas_cumprod[0]  # where DDIM ends with set_alpha_to_one off
    expected = alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


# ---- CosXL ----------------------------------------------------------------------------------------------------------

EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "prediction_type": "v_prediction"}


def test_the_schedule_of_an_edm_model_is_that_of_its_scheduler() -> None:
    """Against EDMEulerScheduler of diffusers: the input of the UNet, what it is told of the noise, and its target."""
    schedule = make_noise_schedule(EDM, ObjectiveOptions())
    edm = EDMEulerScheduler(sigma_data=1.0, **{key: value for key, value in EDM.items() if key != "_class_name"})
    torch.manual_seed(0)
    timesteps = torch.tensor([0, 250, 500, 750, 999])
    latents, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    noisy, target = (
        schedule.scheduler.add_noise(latents, noise, timesteps),
        schedule.make_target(latents, noise, timesteps),
    )
    told = schedule.unet_timesteps(timesteps)
    for index in range(5):
        sigma = torch.exp(4 * told[index].double())
        sample = latents[index] + sigma * noise[index]
        torch.testing.assert_close(noisy[index], edm.precondition_inputs(sample, sigma), rtol=1e-4, atol=1e-4)
        assert told[index] == pytest.approx(edm.precondition_noise(sigma).item(), rel=1e-5)
        denoised = edm.precondition_outputs(sample, target[index], sigma)
        torch.testing.assert_close(denoised, latents[index], rtol=1e-3, atol=1e-2 * max(1.0, sigma.item() / 10))
    ends = torch.exp(4 * schedule.unet_timesteps(torch.tensor([0, 999])).double())
    assert ends.tolist() == pytest.approx([0.002, 120.0], rel=1e-4)


def test_other_models_are_told_the_number_of_the_timestep() -> None:
    schedule, timesteps = make_noise_schedule({}, ObjectiveOptions()), torch.tensor([3, 999])
    assert torch.equal(schedule.unet_timesteps(timesteps), timesteps)


@pytest.mark.parametrize(
    "options", [ObjectiveOptions(prediction_type="epsilon"), ObjectiveOptions(rescale_betas_zero_snr=True)]
)
def test_an_edm_model_keeps_its_objective(options: ObjectiveOptions) -> None:
    with pytest.raises(InputError, match="EDM"):
        make_noise_schedule(EDM, options)
