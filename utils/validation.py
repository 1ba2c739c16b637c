"""What a run shows of itself: edited pictures, a held-out loss, the training curve. None of it disturbs training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from utils.editing import edit_images, fit_image, size_multiple
from utils.objective import Objective

NUM_INFERENCE_STEPS, GUIDANCE_SCALE, IMAGE_GUIDANCE_SCALE = 20, 7.0, 1.5  # as diffusers validates
LABEL_HEIGHT = 16
QUARTERS = 4


@dataclass(frozen=True)
class ValidationOptions:
    """The fields are flags."""

    num_validation_images: int = 4
    validation_epochs: int = 1
    validation_steps: int | None = None
    save_best: bool = False


def is_validation_step(step: int, max_steps: int, steps_per_epoch: float, options: ValidationOptions) -> bool:
    """Whether to validate after optimizer step `step`: every so many steps or epochs, and at the end."""
    if step == max_steps:
        return True
    if options.validation_steps:
        return step % options.validation_steps == 0
    period = steps_per_epoch * options.validation_epochs
    return int(step / period) > int((step - 1) / period)


def sample_edits(
    pipeline: DiffusionPipeline, pairs: list[tuple[Image.Image, str]], num_images: int, seed: int, resolution: int
) -> list[list[Image.Image]]:
    """For every (image, instruction): the image as the model takes it and `num_images` edits, seeded with seed + 0, 1, ..."""
    rows = []
    for image, prompt in pairs:
        fitted = fit_image(image, resolution, size_multiple(pipeline))
        edits = edit_images(
            pipeline, [fitted] * num_images, [prompt] * num_images, seeds=[seed + index for index in range(num_images)],
            num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE,
            image_guidance_scale=IMAGE_GUIDANCE_SCALE,
        )  # fmt: skip
        rows.append([fitted, *edits])
    return rows


def draw_grid(rows: list[list[Image.Image]], labels: list[str], cell: int | None = None) -> Image.Image:
    """A sheet with one labelled row of pictures each; every picture is fitted into a square of `cell` pixels."""
    cell = cell or max(max(image.size) for row in rows for image in row)
    width = max(len(row) for row in rows) * cell
    sheet = Image.new("RGB", (width, len(rows) * (cell + LABEL_HEIGHT)), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = index * (cell + LABEL_HEIGHT)
        pen.text((3, top + 2), label.encode("latin-1", "replace").decode("latin-1"), fill="black")
        for column, image in enumerate(row):
            scale = cell / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            sheet.paste(image.resize(size, resample), (column * cell, top + LABEL_HEIGHT))
    return sheet


def log_images(accelerator: Accelerator, images: dict[str, list[Image.Image]], step: int) -> None:
    """Send pictures, by title, to every tracker of the run."""
    for tracker in accelerator.trackers:
        if tracker.name == "comet_ml":
            for title, pictures in images.items():
                for index, picture in enumerate(pictures):
                    tracker.writer.log_image(picture, name=f"{title} {index}", step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({t: [trackio.Image(p) for p in ps] for t, ps in images.items()}, step=step)
        elif tracker.name == "tensorboard":
            stacks = {title: np.stack([np.asarray(p) for p in ps]) for title, ps in images.items()}
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


def read_log(output_dir: Path) -> list[dict]:
    """The entries of `training_log.jsonl`; a line cut off by a kill is left out."""
    path = output_dir / "training_log.jsonl"
    entries = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


def cut_log(output_dir: Path, last_step: int) -> None:
    """Forget what a killed run logged after the checkpoint that it goes on from."""
    kept = [entry for entry in read_log(output_dir) if entry["step"] <= last_step]
    unfinished = output_dir / ".unfinished-training_log.jsonl"
    unfinished.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    unfinished.rename(output_dir / "training_log.jsonl")


def draw_curve(output_dir: Path) -> Path | None:
    """Draw loss, held-out loss and learning rate over the steps into `training_curve.png`; None without entries."""
    entries = read_log(output_dir)
    training = [entry for entry in entries if "loss" in entry]
    if not training:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axis = figure.add_subplot()
    steps = [entry["step"] for entry in training]
    losses = np.array([entry["loss"] for entry in training])
    loss_axis.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1)
    loss_axis.plot(steps, _smooth(losses), color="tab:blue", label="training loss (smoothed)")
    held_out = [entry for entry in entries if "held_out_loss" in entry]
    if held_out:
        loss_axis.plot(
            [entry["step"] for entry in held_out], [entry["held_out_loss"] for entry in held_out],
            "o-", color="tab:orange", markersize=3, label="held-out loss",
        )  # fmt: skip
    if losses.min() > 0:
        loss_axis.set_yscale("log")
    loss_axis.set(xlabel="optimizer step", ylabel="loss")
    rate_axis = loss_axis.twinx()
    rate_axis.plot(steps, [entry["lr"] for entry in training], color="tab:gray", linestyle=":", label="learning rate")
    rate_axis.set_ylabel("learning rate")
    rate_axis.set_ylim(bottom=0)
    handles = [handle for axis in (loss_axis, rate_axis) for handle in axis.get_legend_handles_labels()[0]]
    loss_axis.legend(handles=handles, loc="upper right")
    path = output_dir / "training_curve.png"
    figure.savefig(path, dpi=110)
    return path


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over about a twentieth of the run, shorter at the ends."""
    width = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(len(values))
    low, high = np.maximum(ends - width, 0), np.minimum(ends + width + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
