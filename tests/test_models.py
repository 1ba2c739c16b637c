"""Loading and widening the UNet, and the learning-rate schedules."""

import json
import math
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DConditionModel

from tests.tiny import make_components
from utils.errors import InputError
from utils.models import latents
from utils.models.stable_diffusion import (
    Configs,
    ModelOptions,
    load_stable_diffusion,
    require_editor,
    require_text_to_image,
    widen_conv_in,
)
from utils.training.checkpoints import Progress
from utils.training.flags import LR_SCHEDULERS
from utils.training.loop import LoopOptions, TrainingState, fit
from utils.training.optimizers import OptimizationOptions, make_lr_schedule, make_optimizer


def load_unet(folder: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


# ---- widening -------------------------------------------------------------------------------------------------------


def test_widened_unet_equals_the_base_for_any_image(tiny_base: Path) -> None:
    base, widened = load_unet(tiny_base), load_unet(tiny_base)
    widen_conv_in(widened)
    noisy, text = torch.randn(3, 4, 16, 16), torch.randn(3, 77, 32)
    timesteps = torch.tensor([0, 500, 999])
    with torch.no_grad():
        expected = base(noisy, timesteps, text).sample
        for image in (torch.zeros(3, 4, 16, 16), torch.randn(3, 4, 16, 16), 1e4 * torch.randn(3, 4, 16, 16)):
            assert torch.equal(widened(torch.cat([noisy, image], dim=1), timesteps, text).sample, expected)


def test_bias_is_copied_and_image_channels_are_zero(tiny_base: Path) -> None:
    base, widened = load_unet(tiny_base), load_unet(tiny_base)
    widen_conv_in(widened)
    assert base.conv_in.bias.abs().max() > 0.01  # otherwise the next line proves nothing
    assert torch.equal(widened.conv_in.bias, base.conv_in.bias)
    assert torch.equal(widened.conv_in.weight[:, :4], base.conv_in.weight)
    assert not widened.conv_in.weight[:, 4:].any()
    assert widened.config.in_channels == 8


def test_image_channels_have_gradients_and_widened_unet_is_reloaded(tiny_base: Path, tmp_path: Path) -> None:
    widened = load_unet(tiny_base)
    widen_conv_in(widened)
    widened(torch.randn(1, 8, 16, 16), 10, torch.randn(1, 77, 32)).sample.square().mean().backward()
    assert widened.conv_in.weight.grad[:, 4:].abs().min() > 0
    assert widened.conv_in.bias.grad is not None
    widened.save_pretrained(tmp_path / "unet")
    reloaded = load_unet(tmp_path)
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in widened.state_dict().items())


TRAIN, TRAIN_SDXL = (partial(require_text_to_image, is_sdxl=is_sdxl) for is_sdxl in (False, True))


def configs(in_channels: int, is_sdxl: bool) -> Configs:
    return Configs({"in_channels": in_channels, "addition_embed_type": "text_time" if is_sdxl else None}, {}, {})


@pytest.mark.parametrize(
    ("check", "in_channels", "is_sdxl", "words"),
    [
        (TRAIN, 8, False, "finetune_instruct_pix2pix.py"),
        (TRAIN_SDXL, 8, True, "finetune_instruct_pix2pix.py"),
        (TRAIN, 4, True, "train_instruct_pix2pix_sdxl.py"),
        (TRAIN_SDXL, 4, False, "train_instruct_pix2pix.py"),
        (require_editor, 4, False, "train_instruct_pix2pix.py"),
        (require_editor, 4, True, "train_instruct_pix2pix_sdxl.py"),
        (TRAIN, 9, False, "9 channels"),
        (TRAIN_SDXL, 9, True, "9 channels"),
        (require_editor, 9, False, "9 channels"),
    ],
)
def test_wrong_base_names_the_right_script(check, in_channels: int, is_sdxl: bool, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(configs(in_channels, is_sdxl), "some/model")


@pytest.mark.parametrize(
    ("check", "in_channels", "is_sdxl"),
    [(TRAIN, 4, False), (TRAIN_SDXL, 4, True), (require_editor, 8, False), (require_editor, 8, True)],
)
def test_right_base_is_accepted(check, in_channels: int, is_sdxl: bool) -> None:
    assert check(configs(in_channels, is_sdxl), "some/model") is None


def test_scheduler_is_loaded_in_its_class(tiny_base: Path, tmp_path: Path) -> None:
    assert type(load_stable_diffusion(ModelOptions(str(tiny_base))).scheduler) is DDIMScheduler
    other = tmp_path / "other"
    other.mkdir()
    for part in tiny_base.iterdir():
        if part.name != "scheduler":
            (other / part.name).symlink_to(part)
    PNDMScheduler().save_pretrained(other / "scheduler")
    assert type(load_stable_diffusion(ModelOptions(str(other))).scheduler) is PNDMScheduler


# ---- learning rate --------------------------------------------------------------------------------------------------

PEAK, WARMUP, STEPS = 3e-4, 4, 20


def learning_rate(name: str, step: int) -> float:
    """After optimizer step `step` of `STEPS`."""
    if name == "constant":
        return PEAK
    if step < WARMUP:
        return PEAK * step / WARMUP
    progress = (step - WARMUP) / (STEPS - WARMUP)
    if name == "constant_with_warmup":
        return PEAK
    if name == "linear":
        return PEAK * (1 - progress)
    if name == "polynomial":  # of power 1, down to 1e-7
        return (PEAK - 1e-7) * (1 - progress) + 1e-7
    return PEAK * (1 + math.cos(math.pi * progress)) / 2 if progress < 1 else 0.0  # one cycle has no restart


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_learning_rate_counts_optimizer_steps(name: str, accumulation: int, tmp_path: Path) -> None:
    """In the log of the real loop, and as used by the optimizer."""
    model = torch.nn.Linear(2, 1)
    options = OptimizationOptions(learning_rate=PEAK, lr_scheduler=name, lr_warmup_steps=WARMUP)
    optimizer = make_optimizer(list(model.parameters()), options, samples_per_step=accumulation)
    schedule = make_lr_schedule(optimizer, options, STEPS)
    used = []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))
    accelerator = Accelerator(cpu=True)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    batch = {"rows": ["train[0]"], "x": torch.ones(1, 2)}
    fit(
        TrainingState(accelerator, prepared, model, None, prepared_optimizer, schedule, Progress()),
        lambda network, batch: network(batch["x"]).square().mean(dim=1),
        repeat(batch),
        LoopOptions(STEPS, accumulation, logging_steps=1, checkpointing_steps=1000),
        tmp_path,
        on_batch=lambda batch: None,
        on_step=lambda step: None,
    )
    log = [json.loads(line) for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    expected = [learning_rate(name, step) for step in range(STEPS + 1)]
    assert [entry["lr"] for entry in log] == pytest.approx(expected[1:], rel=1e-9, abs=1e-18)
    assert used == pytest.approx(expected[:-1], rel=1e-9, abs=1e-18)


def test_scale_lr_multiplies_by_the_samples_per_step() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    options = OptimizationOptions(learning_rate=1e-5, scale_lr=True)
    assert make_optimizer(parameters, options, samples_per_step=24).param_groups[0]["lr"] == pytest.approx(2.4e-4)


def test_images_are_encoded_in_slices(tmp_path, monkeypatch):
    """At most so many pixels at a time, with the moments of encoding all at once."""
    vae, sizes = make_components(tmp_path)["vae"], []
    pixels = torch.randint(0, 256, (5, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole, encode = latents.encode_moments(vae, pixels), vae.encode
    monkeypatch.setattr(vae, "encode", lambda images: sizes.append(len(images)) or encode(images))
    monkeypatch.setattr(latents, "MAX_ENCODED_PIXELS", 2 * 32 * 48)
    torch.testing.assert_close(latents.encode_moments(vae, pixels), whole, rtol=0, atol=1e-5)
    monkeypatch.setattr(latents, "MAX_ENCODED_PIXELS", 1)
    latents.encode_moments(vae, pixels[:2])
    assert sizes == [2, 2, 1, 1, 1]
