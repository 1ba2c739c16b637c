"""Noise schedules, targets, loss weights and the saved scheduler, compared with their formulas."""

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

# The scheduler configuration of Stable Diffusion 1.x and 2.x.
STABLE_DIFFUSION = dict(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    steps_offset=1,
    set_alpha_to_one=False,
)
ZERO_SNR = ObjectiveOptions(prediction_type="v_prediction", rescale_betas_zero_snr=True)


def base_scheduler(scheduler_class: type[SchedulerMixin], **changes: object) -> SchedulerMixin:
    return scheduler_class.from_config(STABLE_DIFFUSION | changes)


# ---- noise schedule of training --------------------------------------------------------------------------------------


def test_schedule_equals_stable_diffusion() -> None:
    schedule = make_noise_schedule(dict(base_scheduler(PNDMScheduler).config), ObjectiveOptions())
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(schedule.scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=0)
    assert len(schedule) == 1000
    assert schedule.prediction_type == "epsilon"


def test_flag_overrides_the_prediction_type_of_the_base() -> None:
    base = dict(base_scheduler(PNDMScheduler, prediction_type="v_prediction").config)
    assert make_noise_schedule(base, ObjectiveOptions()).prediction_type == "v_prediction"
    overridden = make_noise_schedule(base, ObjectiveOptions(prediction_type="epsilon"))
    assert overridden.prediction_type == "epsilon"


def test_rescaled_betas_end_in_pure_noise() -> None:
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
def test_unsupported_prediction_types_are_refused(base: dict, options: ObjectiveOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_noise_schedule(STABLE_DIFFUSION | base, options)


# ---- target and weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target_of_each_prediction_type(prediction_type: str) -> None:
    schedule = make_noise_schedule(STABLE_DIFFUSION, ObjectiveOptions(prediction_type=prediction_type))
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


def test_min_snr_weights_are_finite_at_zero_terminal_snr() -> None:
    schedule = make_noise_schedule(STABLE_DIFFUSION, ZERO_SNR)
    weights = min_snr_weights(schedule.scheduler.alphas_cumprod, torch.arange(1000), 5.0, "v_prediction")
    assert weights.isfinite().all()
    assert weights[-1] == 0


def test_offset_noise_shifts_whole_channels() -> None:
    noise, channel_noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 1, 1)
    assert offset_noise(noise, channel_noise, 0.0) is noise
    shift = offset_noise(noise, channel_noise, 0.1) - noise
    torch.testing.assert_close(shift, 0.1 * channel_noise.expand(2, 4, 3, 3), rtol=0, atol=1e-6)


def test_loss_is_a_mean_per_sample_in_float32() -> None:
    target = torch.zeros(2, 4, 8, 8)
    prediction = torch.stack([torch.full((4, 8, 8), 300.0), torch.full((4, 8, 8), 0.5)]).half()
    loss = per_sample_loss(prediction, target)  # 300² is beyond the range of float16
    assert loss.dtype == torch.float32
    assert loss.tolist() == [90000.0, 0.25]


# ---- the scheduler saved with the editor ----------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_class", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_saved_scheduler_has_the_class_of_the_base(scheduler_class: type[SchedulerMixin]) -> None:
    base = base_scheduler(scheduler_class)
    schedule = make_noise_schedule(dict(base.config), ObjectiveOptions(prediction_type="v_prediction"))
    scheduler = make_inference_scheduler(base, schedule)
    assert type(scheduler) is scheduler_class
    expected = dict(base.config) | {"prediction_type": "v_prediction"}
    assert {name: value for name, value in scheduler.config.items() if name[0] != "_"} == {
        name: value for name, value in expected.items() if name[0] != "_"
    }


@pytest.mark.parametrize(
    ("base", "expected_class"),
    [
        (base_scheduler(PNDMScheduler), DDIMScheduler),
        (
            base_scheduler(PNDMScheduler, rescale_betas_zero_snr=False),
            DDIMScheduler,
        ),  # a key that PNDM stores and ignores
        (base_scheduler(DDIMScheduler), DDIMScheduler),
        (base_scheduler(DDPMScheduler), DDPMScheduler),
        (base_scheduler(EulerDiscreteScheduler), EulerDiscreteScheduler),
    ],
    ids=["PNDM", "PNDM with a key of DDIM", "DDIM", "DDPM", "Euler"],
)
def test_scheduler_for_zero_terminal_snr_starts_from_pure_noise(
    base: SchedulerMixin, expected_class: type[SchedulerMixin]
) -> None:
    schedule = make_noise_schedule(dict(base.config), ZERO_SNR)
    scheduler = make_inference_scheduler(base, schedule)
    assert type(scheduler) is expected_class
    scheduler.set_timesteps(20)
    assert int(scheduler.timesteps[0]) == 999
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    # Euler divides by alpha, so it keeps 2^-24.
    torch.testing.assert_close(scheduler.alphas_cumprod, schedule.scheduler.alphas_cumprod, rtol=1e-6, atol=1e-7)


def test_perfect_predictions_give_the_image(tmp_path) -> None:
    base = base_scheduler(PNDMScheduler)
    schedule = make_noise_schedule(dict(base.config), ZERO_SNR)
    make_inference_scheduler(base, schedule).save_pretrained(tmp_path)
    scheduler = DDIMScheduler.from_pretrained(tmp_path)
    image, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    scheduler.set_timesteps(10)
    sample = noise
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep]
        velocity = (alpha_bar.sqrt() * sample - image) / (1 - alpha_bar).sqrt()  # v of a perfect model
        sample = scheduler.step(velocity, timestep, sample).prev_sample
    alpha_bar = scheduler.alphas_cumprod[0]  # the last step of DDIM with set_alpha_to_one=False
    expected = alpha_bar.sqrt() * image + (1 - alpha_bar).sqrt() * noise
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


# ---- CosXL ----------------------------------------------------------------------------------------------------------

EDM = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 120.0, "prediction_type": "v_prediction"}


def test_schedule_of_edm_models_equals_their_scheduler() -> None:
    """Compared with diffusers' EDMEulerScheduler: input, timesteps and target of the UNet."""
    schedule = make_noise_schedule(EDM, ObjectiveOptions())
    edm = EDMEulerScheduler(sigma_data=1.0, **{key: value for key, value in EDM.items() if key != "_class_name"})
    torch.manual_seed(0)
    timesteps = torch.tensor([0, 250, 500, 750, 999])
    latents, noise = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    noisy, target = (
        schedule.scheduler.add_noise(latents, noise, timesteps),
        schedule.make_target(latents, noise, timesteps),
    )
    c_noise = schedule.unet_timesteps(timesteps)
    for index in range(5):
        sigma = torch.exp(4 * c_noise[index].double())
        sample = latents[index] + sigma * noise[index]
        torch.testing.assert_close(noisy[index], edm.precondition_inputs(sample, sigma), rtol=1e-4, atol=1e-4)
        assert c_noise[index] == pytest.approx(edm.precondition_noise(sigma).item(), rel=1e-5)
        denoised = edm.precondition_outputs(sample, target[index], sigma)
        torch.testing.assert_close(denoised, latents[index], rtol=1e-3, atol=1e-2 * max(1.0, sigma.item() / 10))
    ends = torch.exp(4 * schedule.unet_timesteps(torch.tensor([0, 999])).double())
    assert ends.tolist() == pytest.approx([0.002, 120.0], rel=1e-4)


def test_other_unets_receive_the_timesteps() -> None:
    schedule, timesteps = make_noise_schedule({}, ObjectiveOptions()), torch.tensor([3, 999])
    assert torch.equal(schedule.unet_timesteps(timesteps), timesteps)


@pytest.mark.parametrize(
    "options", [ObjectiveOptions(prediction_type="epsilon"), ObjectiveOptions(rescale_betas_zero_snr=True)]
)
def test_edm_models_keep_their_noise_schedule(options: ObjectiveOptions) -> None:
    with pytest.raises(InputError, match="EDM"):
        make_noise_schedule(EDM, options)
