"""From flags to a published editor: the order in which a run checks, loads, trains and publishes."""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from PIL import Image

from utils.card import ModelFacts
from utils.checkpoints import Progress
from utils.conditioning import PromptEncoder
from utils.data import BadRowLimit, make_loader
from utils.diffusion import ObjectiveOptions, make_published_scheduler
from utils.dry_run import draw_pairs, report_dry_run
from utils.loop import Trainee, append_log, fit
from utils.models import MovingAverage, StableDiffusion, load_stable_diffusion, make_editor
from utils.objective import Objective
from utils.optimization import make_lr_schedule, make_optimizer
from utils.plan import Plan, Settings, count_rows, make_plan, write_settings
from utils.publishing import BestWeights, publish
from utils.quiet import hide_progress_bars
from utils.runtime import follow_the_launcher, frozen_dtype, start_accelerator
from utils.validation import (
    draw_curve,
    draw_grid,
    held_out_loss,
    is_validation_step,
    log_images,
    read_log,
    sample_edits,
)

logger = logging.getLogger(__name__)


def train_editor(
    settings: Settings,
    check_base: Callable[[dict, str], None],
    prepare_unet: Callable[[UNet2DConditionModel], None],
) -> int:
    """Check, load, train, publish. Returns the exit code: 0, or 128 + the signal that stopped the run.

    check_base(unet_config, name) refuses a model that is not the script's; prepare_unet makes an editor's UNet of it.
    """
    follow_the_launcher()
    hide_progress_bars()
    accelerator = start_accelerator(settings.machine)
    plan = make_plan(accelerator, settings, check_base)
    write_settings(accelerator, settings, plan)

    parts = load_stable_diffusion(settings.model)
    prepare_unet(parts.unet)
    objective = make_objective(accelerator, parts, plan.schedule, settings.objective)
    trainee = make_trainee(accelerator, parts.unet, settings, plan)
    if plan.checkpoint:
        trainee.load(plan.checkpoint)
        logger.warning("going on from %s, step %d", plan.checkpoint, plan.progress.global_step)
    batches = open_batches(accelerator, settings, plan, parts, objective)
    if settings.run.dry_run:
        return dry_run(accelerator, settings, plan, parts, objective, trainee, batches)

    start_trackers(accelerator, settings)
    best = BestWeights(settings.output_dir, enabled=settings.validation.save_best)
    limit = BadRowLimit(settings.data.max_bad_rows, count_rows(plan.sources))
    limit.add(plan.progress.bad_rows)

    def count_bad_rows(batch: dict) -> None:
        limit.add(batch["bad_rows"], num_drawn=plan.progress.draws)
        plan.progress.bad_rows += [list(row) for row in batch["bad_rows"]]

    exit_code = fit(
        accelerator, trainee, objective, batches, plan.progress,
        replace(settings.loop, max_train_steps=plan.max_train_steps), settings.output_dir, on_batch=count_bad_rows,
        on_step=lambda step: validate(accelerator, settings, plan, parts, objective, trainee, best, step),
    )  # fmt: skip
    if exit_code == 0 and accelerator.is_main_process:
        report_prompts(objective, plan.progress)
        finish(settings, plan, trainee, best)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return exit_code


# --- models ---


def make_objective(
    accelerator: Accelerator, parts: StableDiffusion, schedule: DDPMScheduler, options: ObjectiveOptions
) -> Objective:
    """Freeze VAE and text encoder, bring them to the device in 16 bits where that is asked for."""
    for model in (parts.vae, parts.text_encoder):
        model.requires_grad_(False)
        model.to(accelerator.device, dtype=frozen_dtype(accelerator))
    return Objective(parts.vae, PromptEncoder(parts.tokenizer, parts.text_encoder), schedule, options)


def make_trainee(accelerator: Accelerator, unet: UNet2DConditionModel, settings: Settings, plan: Plan) -> Trainee:
    """Bring the UNet to the device, with its moving average, optimizer and learning-rate schedule."""
    unet.to(accelerator.device).train()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if settings.run.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if settings.machine.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    ema = MovingAverage(unet, settings.run.ema_decay) if settings.run.use_ema else None
    optimizer = make_optimizer(list(unet.parameters()), settings.optimization, plan.samples_per_step)
    lr_schedule = make_lr_schedule(optimizer, settings.optimization, plan.max_train_steps)
    prepared, optimizer = accelerator.prepare(unet, optimizer)
    return Trainee(prepared, unet, ema, optimizer, lr_schedule, accelerator.scaler)


def open_batches(
    accelerator: Accelerator, settings: Settings, plan: Plan, parts: StableDiffusion, objective: Objective
) -> Iterator[dict]:
    """The endless stream of this process's micro-batches, from where the run stands."""
    samples_per_micro_step = settings.data.train_batch_size * accelerator.num_processes
    return iter(
        _make_loader(accelerator, settings, plan, parts, plan.sources, settings.geometry,
                     plan.progress.draws // samples_per_micro_step, settings.data.dataloader_num_workers)
    )  # fmt: skip


def _make_loader(accelerator, settings, plan, parts, sources, geometry, start_batch, num_workers):
    return make_loader(
        sources, geometry, seed=plan.progress.seed, batch_size=settings.data.train_batch_size,
        latent_channels=parts.vae.config.latent_channels, vae_scale_factor=parts.latent_scale,
        num_train_timesteps=len(plan.schedule), rank=accelerator.process_index, world_size=accelerator.num_processes,
        start_batch=start_batch, num_workers=num_workers, pin_memory=accelerator.device.type == "cuda",
    )  # fmt: skip


def start_trackers(accelerator: Accelerator, settings: Settings) -> None:
    """Open the trackers; their files lie in output_dir."""
    values = {key: value for concern in asdict(settings).values() for key, value in concern.items()}
    values.pop("hub_token")
    config = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}
    accelerator.init_trackers(
        "instruct-pix2pix", config=config, init_kwargs={"wandb": {"dir": str(settings.output_dir)}}
    )


# --- during and after training ---


def validate(
    accelerator: Accelerator,
    settings: Settings,
    plan: Plan,
    parts: StableDiffusion,
    objective: Objective,
    trainee: Trainee,
    best: BestWeights,
    step: int,
) -> None:
    """Where step is one to validate after: held-out loss, edited pictures and the curve, with the EMA weights."""
    is_due = is_validation_step(step, plan.max_train_steps, plan.steps_per_epoch, settings.validation)
    if not is_due or plan.progress.validated_step == step:
        return
    trainee.model.eval()
    with trainee.ema.swapped_into(trainee.model) if trainee.ema else nullcontext(), torch.no_grad():
        if plan.held_out:
            measure_held_out(accelerator, settings, plan, parts, objective, trainee, best, step)
        if plan.pairs and accelerator.is_main_process:
            scheduler = make_published_scheduler(parts.scheduler, plan.schedule)
            with accelerator.autocast():
                rows = sample_edits(
                    make_editor(parts, scheduler), plan.pairs, settings.validation.num_validation_images,
                    plan.progress.seed, settings.geometry.resolution,
                )  # fmt: skip
            show_edits(accelerator, settings.output_dir, plan.pairs, rows, step)
    trainee.model.train()
    plan.progress.validated_step = step
    if accelerator.is_main_process:
        draw_curve(settings.output_dir)


def measure_held_out(
    accelerator: Accelerator,
    settings: Settings,
    plan: Plan,
    parts: StableDiffusion,
    objective: Objective,
    trainee: Trainee,
    best: BestWeights,
    step: int,
) -> None:
    """Log the held-out loss, and keep the weights where it is the best so far."""
    geometry = replace(settings.geometry, center_crop=True, random_flip=False)
    batches = iter(_make_loader(accelerator, settings, plan, parts, plan.held_out, geometry, 0, 0))
    losses = held_out_loss(accelerator, objective, trainee.unet, batches, count_rows(plan.held_out))
    accelerator.log(losses, step=step)
    is_best = plan.progress.best_loss is None or losses["held_out_loss"] < plan.progress.best_loss
    if is_best:
        plan.progress.best_loss = losses["held_out_loss"]
    if accelerator.is_main_process:
        append_log(settings.output_dir, {"step": step} | losses)
        if is_best:
            best.keep(trainee.model, step, losses["held_out_loss"])


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
    log_images(accelerator, {f"validation/{i} {pair[1]}": row for i, (pair, row) in enumerate(zip(pairs, rows, strict=True))}, step)


def report_prompts(objective: Objective, progress: Progress) -> None:
    """Say at the end what was left out of account."""
    truncated = objective.encode_prompts.truncated
    if truncated:
        logger.warning(
            "%d distinct prompts were longer than the text encoder reads; their tails had no effect. One of them: %.100s",
            len(truncated), next(iter(truncated)),
        )  # fmt: skip
    skipped = {row for row, _ in progress.bad_rows}
    if skipped:
        logger.warning("%d bad rows were skipped: %s", len(skipped), ", ".join(sorted(skipped)[:20]))


def finish(settings: Settings, plan: Plan, trainee: Trainee, best: BestWeights) -> None:
    """Publish the editor: float32 throughout, with the best or the averaged weights where they were kept."""
    results = {}
    kept = best.load()
    if kept:
        trainee.model.load_state_dict(kept[0])
        results = {"held-out loss": kept[1]["held_out_loss"], "at step": kept[1]["global_step"]}
    elif trainee.ema:
        trainee.model.load_state_dict(trainee.ema.state_dict())
    unet = trainee.model.to("cpu", memory_format=torch.contiguous_format)
    parts = load_stable_diffusion(settings.model, unet=unet)  # the frozen ones anew: in memory they may have 16 bits
    pipeline = make_editor(parts, make_published_scheduler(parts.scheduler, plan.schedule))
    curve = draw_curve(settings.output_dir)
    held_out = [entry["held_out_loss"] for entry in read_log(settings.output_dir) if "held_out_loss" in entry]
    if held_out and not results:
        results = {"held-out loss": held_out[-1]}
    samples = sorted((settings.output_dir / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
    facts = ModelFacts(
        base_model=settings.model.pretrained_model_name_or_path,
        command=["accelerate", "launch", *sys.argv],
        repo_id=plan.repo_id,
        datasets=name_datasets(settings, plan),
        hyperparameters={"steps": plan.progress.global_step, "samples per step": plan.samples_per_step}
        | asdict(settings.objective) | asdict(settings.optimization) | asdict(settings.geometry)
        | {"use_ema": settings.run.use_ema, "seed": plan.progress.seed},
        results=results,
        widget=save_inputs(settings.output_dir, plan.pairs),
        samples=[f"validation/{path.name}" for path in samples[-1:]],
        curve=curve.name if curve else None,
        resolution=settings.geometry.resolution,
    )  # fmt: skip
    publish(pipeline, settings.output_dir, facts, settings.publishing, plan.repo_id)


def name_datasets(settings: Settings, plan: Plan) -> list[str]:
    """Ids or folders of what was trained on."""
    if settings.data.train_mix:
        return [source.name.rsplit(":", 1)[0] for source in plan.sources]
    return [settings.data.dataset_name or settings.data.train_data_dir]


def save_inputs(output_dir: Path, pairs: list[tuple[Image.Image, str]]) -> list[tuple[str, str]]:
    """Keep the validation pictures for the card's widgets: (path in output_dir, instruction) each."""
    widget = []
    for index, (image, prompt) in enumerate(pairs):
        path = Path("validation") / f"input-{index}.png"
        (output_dir / path).parent.mkdir(exist_ok=True)
        image.save(output_dir / path)
        widget.append((str(path), prompt))
    return widget


def dry_run(
    accelerator: Accelerator,
    settings: Settings,
    plan: Plan,
    parts: StableDiffusion,
    objective: Objective,
    trainee: Trainee,
    batches: Iterator[dict],
) -> int:
    """Draw the first batches, take one real step, and say what the whole run would need. Saves only `dry_run.png`."""
    seen = []
    with tempfile.TemporaryDirectory() as folder:
        one_step = replace(settings.loop, max_train_steps=plan.progress.global_step + 1, logging_steps=1,
                           checkpointing_steps=1 << 62)  # fmt: skip
        exit_code = fit(
            accelerator, trainee, objective, batches, plan.progress, one_step, Path(folder), on_batch=seen.append,
            on_step=lambda step: None,
        )  # fmt: skip
        if accelerator.is_main_process:
            entry = json.loads((Path(folder) / "training_log.jsonl").read_text().splitlines()[-1])
            draw_pairs(seen).save(settings.output_dir / "dry_run.png")
            report_dry_run(entry, trainee, plan.samples_per_step, plan.max_train_steps, settings.output_dir)
    return exit_code
