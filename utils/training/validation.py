"""What a run shows of itself: edited pictures, a held-out loss, the training curve. None of it disturbs training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from utils.contact_sheets import draw_grid
from utils.editing.edit_images import edit_images, fit_image, size_multiple
from utils.models.conditioning import PromptEncoder
from utils.models.noise_schedules import make_published_scheduler
from utils.models.stable_diffusion import make_editor
from utils.training.objective import Objective
from utils.training.preflight import count_rows
from utils.training.publishing import BestWeights
from utils.training.session import Run
from utils.training.settings import ValidationOptions
from utils.training.training_log import append_log, draw_curve

NUM_INFERENCE_STEPS, GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE = 20, 7.0, 1.5  # as diffusers validates
QUARTERS = 4


def validate(run: Run, best: BestWeights, step: int) -> None:
    """Where `step` is one to validate after: held-out loss, edited pictures and the curve, with the EMA weights."""
    plan, trainee, options = run.plan, run.trainee, run.settings.validation
    is_due = is_validation_step(step, plan.max_train_steps, plan.steps_per_epoch, options)
    if not is_due or plan.progress.validated_step == step:
        return
    trainee.model.eval()
    with trainee.published_weights(), torch.no_grad():
        if plan.held_out:
            measure_held_out(run, best, step)
        if plan.pairs and run.accelerator.is_main_process:
            editor = make_editor(run.parts, make_published_scheduler(run.parts.scheduler, plan.schedule))
            with run.accelerator.autocast():
                rows = sample_edits(
                    editor,
                    plan.pairs,
                    options.num_validation_images,
                    plan.progress.seed,
                    run.settings.geometry.resolution,
                    run.objective.encode_prompts,
                )
            show_edits(run.accelerator, run.settings.output_dir, plan.pairs, rows, step)
    trainee.model.train()
    plan.progress.validated_step = step
    if run.accelerator.is_main_process:
        draw_curve(run.settings.output_dir)


def measure_held_out(run: Run, best: BestWeights, step: int) -> None:
    """Log the held-out loss, and keep the weights where it is the best so far."""
    progress = run.plan.progress
    losses = held_out_loss(
        run.accelerator, run.objective, run.trainee.unet, run.held_out_batches(), count_rows(run.plan.held_out)
    )
    run.accelerator.log(losses, step=step)
    best_loss = float("inf") if progress.best_loss is None else progress.best_loss
    is_best = losses["held_out_loss"] < best_loss  # never so for NaN
    if is_best:
        progress.best_loss = losses["held_out_loss"]
    if run.accelerator.is_main_process:
        append_log(run.settings.output_dir, {"step": step} | losses)
        if is_best:
            best.keep(run.trainee.model, step, losses["held_out_loss"])


def is_validation_step(step: int, max_steps: int, steps_per_epoch: float, options: ValidationOptions) -> bool:
    """Whether to validate after optimizer step `step`: every so many steps or epochs, and at the end."""
    if step == max_steps:
        return True
    if options.validation_steps:
        return step % options.validation_steps == 0
    period = steps_per_epoch * options.validation_epochs
    return int(step / period) > int((step - 1) / period)


def sample_edits(
    pipeline: DiffusionPipeline,
    pairs: list[tuple[Image.Image, str]],
    num_images: int,
    seed: int,
    resolution: int,
    encode_prompts: PromptEncoder,
) -> list[list[Image.Image]]:
    """For every (image, instruction): the image as the model takes it and `num_images` edits, from `seed` on."""
    rows = []
    for image, prompt in pairs:
        fitted = fit_image(image, resolution, size_multiple(pipeline))
        edits = edit_images(
            pipeline,
            [fitted] * num_images,
            [prompt] * num_images,
            seeds=[seed + index for index in range(num_images)],
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            image_guidance_scale=IMAGE_GUIDANCE_SCALE,
            encode_prompts=encode_prompts,
        )
        rows.append([fitted, *edits])
    return rows


def log_images(accelerator: Accelerator, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send pictures, by title, to every tracker of the run."""
    single = {f"{title} {index}": picture for title, stack in images.items() for index, picture in enumerate(stack)}
    for tracker in accelerator.trackers:
        if tracker.name == "comet_ml":
            for title, picture in single.items():
                tracker.writer.log_image(picture, name=title, step=step)
        elif tracker.name == "trackio":  # which drops lists of pictures without a word
            import trackio

            tracker.log({title: trackio.Image(picture) for title, picture in single.items()}, step=step)
        elif tracker.name == "tensorboard":
            stacks = {title: np.stack([np.asarray(picture) for picture in stack]) for title, stack in images.items()}
            tracker.log_images(stacks, step=step, dataformats="NHWC")
        else:
            tracker.log_images(images, step=step)


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator, objective: Objective, unet: torch.nn.Module, batches: Iterator[dict], num_rows: int
) -> dict[str, float]:
    """Mean loss over rows never trained on, with the same noise and timesteps every time.

    batches: this process's share of the rows' first pass, from its start. Every row is taken once in each quarter of
    the timesteps, so the figures of the quarters compare: `held_out_loss_q1` is the least noise.
    """
    quarter_length = len(objective.schedule) // QUARTERS
    sums = torch.zeros(QUARTERS, device=accelerator.device, dtype=torch.float64)
    counted, first_draw = 0, accelerator.process_index
    while counted * accelerator.num_processes + first_draw < num_rows:
        batch = next(batches)
        batch_size = len(batch["rows"])
        # Rank r's k-th sample is draw r + k N of the pass; what lies beyond its end belongs to the next pass.
        draws = first_draw + (counted + torch.arange(batch_size)) * accelerator.num_processes
        is_counted = (draws < num_rows).to(accelerator.device)
        for quarter in range(QUARTERS):
            timesteps = quarter * quarter_length + batch["timesteps"] % quarter_length
            with accelerator.autocast():
                loss = objective(unet, batch | {"timesteps": timesteps})
            sums[quarter] += (loss * is_counted).double().sum()
        counted += batch_size
    means = (accelerator.reduce(sums, "sum") / num_rows).tolist()
    return {"held_out_loss": sum(means) / QUARTERS} | {f"held_out_loss_q{q + 1}": m for q, m in enumerate(means)}


def show_edits(
    accelerator: Accelerator,
    output_dir: Path,
    pairs: list[tuple[Image.Image, str]],
    rows: list[list[Image.Image]],
    step: int,
) -> None:
    """Save the pictures of a validation as `validation/step-N.png`, each row the picture and its edits; log them."""
    sheet = draw_grid(rows, [prompt for _, prompt in pairs], cell=max(128, *(max(row[0].size) for row in rows)))
    folder = output_dir / "validation"
    folder.mkdir(exist_ok=True)
    unfinished = folder / f".unfinished-step-{step}.png"
    sheet.save(unfinished)
    unfinished.rename(folder / f"step-{step}.png")
    log_images(
        accelerator,
        {f"validation/{i} {pair[1]}": row for i, (pair, row) in enumerate(zip(pairs, rows, strict=True))},
        step,
    )
