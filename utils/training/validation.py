"""Validation during training: images, a held-out loss and the training curve. It does not change the training."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from PIL import Image

from utils.compilation import without_compiling
from utils.contact_sheets import draw_grid
from utils.editing.edit_images import SamplingSettings, edit_images, fit_image, size_multiple
from utils.editing.encodings import Encodings
from utils.models.noise_schedules import make_inference_scheduler
from utils.models.stable_diffusion import make_editor
from utils.runtime import frozen_dtype
from utils.training.objective import Objective
from utils.training.preflight import count_rows
from utils.training.publishing import BestWeights
from utils.training.session import TrainingSession
from utils.training.settings import ValidationOptions
from utils.training.training_log import append_log, draw_curve

NUM_QUARTERS = 4


def validate(session: TrainingSession, best: BestWeights, step: int) -> None:
    """After steps at which validation is due: held-out loss, validation images and curve, with the EMA weights."""
    plan, options = session.plan, session.settings.validation
    is_due = is_validation_step(step, plan.max_train_steps, plan.steps_per_epoch, options)
    if not is_due or plan.progress.validated_step == step:
        return
    session.state.model.eval()
    is_compiled = session.settings.run.compile
    with session.state.published_weights(), torch.no_grad(), without_compiling(is_compiled):
        if plan.held_out:
            log_held_out_loss(session, best, step)
        if plan.validation_pairs:
            unet = session.state.whole_unet()
            if session.accelerator.is_main_process:
                rows = make_validation_images(session, unet)
                save_validation_images(session.settings.output_dir, plan.validation_pairs, rows, step)
                titles = [f"validation/{index} {prompt}" for index, (_, prompt) in enumerate(plan.validation_pairs)]
                log_images(session.accelerator, dict(zip(titles, rows, strict=True)), step)
    session.state.model.train()
    plan.progress.validated_step = step
    if session.accelerator.is_main_process:
        draw_curve(session.settings.output_dir)


def is_validation_step(step: int, max_steps: int, steps_per_epoch: float, options: ValidationOptions) -> bool:
    """Whether to validate after optimizer step `step`: every few steps or epochs, and at the end."""
    if step == max_steps:
        return True
    if options.validation_steps:
        return step % options.validation_steps == 0
    period = steps_per_epoch * options.validation_epochs
    return int(step / period) > int((step - 1) / period)


# ---- the held-out loss ----------------------------------------------------------------------------------------------


def log_held_out_loss(session: TrainingSession, best: BestWeights, step: int) -> None:
    """Measure and log the held-out loss, and save the weights if it is the lowest so far."""
    progress = session.plan.progress
    losses = held_out_loss(
        session.accelerator,
        session.objective,
        session.state.unet,
        session.held_out_batches(),
        count_rows(session.plan.held_out),
    )
    session.accelerator.log(losses, step=step)
    is_best = best.metric in (None, "loss") and best.is_better(losses["held_out_loss"], progress.best_loss)
    if is_best:
        progress.best_loss = losses["held_out_loss"]
    unet = session.state.whole_unet() if is_best and best.metric else None
    if session.accelerator.is_main_process:
        append_log(session.settings.output_dir, {"step": step} | losses)
        if unet is not None:
            best.save(unet, step, losses["held_out_loss"])


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, objective: Objective, unet: torch.nn.Module, batches: Iterator[dict], num_rows: int
) -> dict[str, float]:
    """Mean loss of the held-out rows, with the same noise and timesteps every time.

    batches: this process's share of the rows, from the first. Every row is used once in each quarter of the timesteps,
    so the losses of the quarters can be compared: `held_out_loss_q1` has the least noise.
    """
    quarter_length = len(objective.schedule) // NUM_QUARTERS
    sums = torch.zeros(NUM_QUARTERS, device=accelerator.device, dtype=torch.float64)
    num_seen, first_draw = 0, accelerator.process_index
    while num_seen * accelerator.num_processes + first_draw < num_rows:
        batch = objective.encode(next(batches))
        batch_size = len(batch["rows"])
        # Rank r's k-th sample is draw r + k N; draws beyond the last row repeat rows of the next epoch.
        draws = first_draw + (num_seen + torch.arange(batch_size)) * accelerator.num_processes
        is_counted = (draws < num_rows).to(accelerator.device)
        for quarter in range(NUM_QUARTERS):
            timesteps = quarter * quarter_length + batch["timesteps"] % quarter_length
            with accelerator.autocast():
                loss = objective(unet, batch | {"timesteps": timesteps})
            sums[quarter] += (loss * is_counted).double().sum()
        num_seen += batch_size
    means = (accelerator.reduce(sums, "sum") / num_rows).tolist()
    return {"held_out_loss": sum(means) / NUM_QUARTERS} | {f"held_out_loss_q{q + 1}": m for q, m in enumerate(means)}


# ---- validation images ----------------------------------------------------------------------------------------------


def make_validation_images(session: TrainingSession, unet: UNet2DConditionModel) -> list[list[Image.Image]]:
    """For every (image, prompt): the resized image, then `num_validation_images` edits."""
    plan, options = session.plan, session.settings.validation
    num_images, sampling = options.num_validation_images, sampling_settings(options)
    (editor, encodings), rows = make_validation_editor(session, unet), []
    for image, prompt in plan.validation_pairs:
        resized = fit_image(image, session.settings.geometry.resolution, size_multiple(editor))
        seeds = [plan.progress.seed + index for index in range(num_images)]
        with session.accelerator.autocast():
            edits = edit_images(
                editor, [resized] * num_images, [prompt] * num_images, seeds, sampling, encodings=encodings
            )
        rows.append([resized, *edits])
    return rows


def make_validation_editor(session: TrainingSession, unet: UNet2DConditionModel) -> tuple[DiffusionPipeline, Encodings]:
    """The editor of the current weights, and what encodes its prompts."""
    parts = session.parts
    if unet is not parts.unet:  # gathered for this
        parts = replace(parts, unet=unet.to(session.accelerator.device, frozen_dtype(session.accelerator)))
    editor = make_editor(parts, make_inference_scheduler(parts.scheduler, session.plan.schedule))
    return editor, Encodings(editor, session.objective.encode_prompts)


def sampling_settings(options: ValidationOptions) -> SamplingSettings:
    return SamplingSettings(
        num_inference_steps=options.validation_num_inference_steps,
        guidance_scale=options.validation_guidance_scale,
        image_guidance_scale=options.validation_image_guidance_scale,
        guidance_rescale=options.validation_guidance_rescale,
        negative_prompt=options.validation_negative_prompt,
    )


def save_validation_images(
    output_dir: Path, pairs: list[tuple[Image.Image, str]], rows: list[list[Image.Image]], step: int
) -> None:
    """Save a contact sheet as `validation/step-N.png`; each row is an image and its edits."""
    sheet = draw_grid(rows, [prompt for _, prompt in pairs], cell=max(128, *(max(row[0].size) for row in rows)))
    save_sheet(sheet, output_dir, f"step-{step}")


def save_sheet(sheet: Image.Image, output_dir: Path, name: str) -> None:
    """Save `validation/NAME.png`."""
    folder = output_dir / "validation"
    folder.mkdir(exist_ok=True)
    unfinished = folder / f".unfinished-{name}.png"
    sheet.save(unfinished)
    unfinished.rename(folder / f"{name}.png")


def log_images(accelerator: Accelerator, images: dict[str, list[Image.Image]], step: int) -> None:
    """Log images, by title, to every tracker."""
    single = {f"{title} {index}": image for title, row in images.items() for index, image in enumerate(row)}
    for tracker in accelerator.trackers:
        if tracker.name == "comet_ml":
            for title, image in single.items():
                tracker.writer.log_image(image, name=title, step=step)
        elif tracker.name == "trackio":  # it silently ignores lists of images
            import trackio

            tracker.log({title: trackio.Image(image) for title, image in single.items()}, step=step)
        elif tracker.name == "tensorboard":
            stacks = {title: np.stack([np.asarray(image) for image in row]) for title, row in images.items()}
            tracker.log_images(stacks, step=step, dataformats="NHWC")
        else:
            tracker.log_images(images, step=step)
