"""From flags to a published editor: the order in which a run checks, loads, trains and publishes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel

from utils.checkpoints import Progress
from utils.conditioning import PromptEncoder
from utils.data import BadRowLimit
from utils.diffusion import ObjectiveOptions
from utils.dry_run import take_dry_run
from utils.hub import redact
from utils.loop import Trainee, fit
from utils.models import MovingAverage, StableDiffusion, load_stable_diffusion
from utils.objective import Objective
from utils.optimization import make_lr_schedule, make_optimizer
from utils.plan import Plan, count_rows, make_plan, write_settings
from utils.publishing import BestWeights, finish
from utils.quiet import hide_progress_bars
from utils.run import Run
from utils.runtime import frozen_dtype, start_accelerator
from utils.settings import Settings
from utils.validation import validate

logger = logging.getLogger(__name__)


def train_editor(
    settings: Settings,
    check_base: Callable[[dict, str], None],
    prepare_unet: Callable[[UNet2DConditionModel], None],
) -> int:
    """Check, load, train, publish. Returns the exit code: 0, or 128 + the signal that stopped the run.

    check_base(unet_config, name) refuses a model that is not the script's; prepare_unet makes an editor's UNet of it.
    """
    hide_progress_bars()
    accelerator = start_accelerator(settings.machine)
    plan = make_plan(accelerator, settings, check_base)

    parts = load_stable_diffusion(settings.model)
    prepare_unet(parts.unet)
    objective = make_objective(accelerator, parts, plan.schedule, settings.objective)
    trainee = make_trainee(accelerator, parts.unet, settings, plan)
    if plan.checkpoint:
        trainee.load(plan.checkpoint)
        logger.warning("going on from %s, step %d", plan.checkpoint, plan.progress.global_step)
    write_settings(accelerator, settings, plan)  # not before the models stand: it takes the place of a former run's
    run = Run(accelerator, settings, plan, parts, objective, trainee)
    with closing(run.training_batches()) as batches:
        if settings.run.dry_run:
            return take_dry_run(run, batches)
        start_trackers(accelerator, settings)
        best = BestWeights(settings.output_dir, enabled=settings.validation.save_best)
        limit = BadRowLimit(settings.data.max_bad_rows, count_rows(plan.sources))
        limit.add(plan.progress.bad_rows)

        def count_bad_rows(batch: dict) -> None:
            if batch["bad_rows"]:
                limit.add(batch["bad_rows"], num_drawn=plan.progress.draws)
                plan.progress.bad_rows = [list(row) for row in limit.reasons.items()]

        exit_code = fit(
            accelerator, trainee, objective, batches, plan.progress,
            replace(settings.loop, max_train_steps=plan.max_train_steps), settings.output_dir,
            on_batch=count_bad_rows, on_step=lambda step: validate(run, best, step),
        )  # fmt: skip
    if exit_code == 0 and accelerator.is_main_process:
        report_prompts(objective, plan.progress)
        finish(run, best)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return exit_code


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


def start_trackers(accelerator: Accelerator, settings: Settings) -> None:
    """Open the trackers; their files lie in output_dir. wandb keeps the command line, so the token leaves it first."""
    sys.argv = redact(sys.argv)
    values = settings.by_flag()
    config = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}
    accelerator.init_trackers(
        "instruct-pix2pix", config=config, init_kwargs={"wandb": {"dir": str(settings.output_dir)}}
    )


def report_prompts(objective: Objective, progress: Progress) -> None:
    """Say at the end what was left out of account."""
    truncated = objective.encode_prompts.truncated
    if truncated:
        logger.warning(
            "%d distinct prompts were longer than the text encoder reads; their tails had no effect. One is: %.100s",
            len(truncated), next(iter(truncated)),
        )  # fmt: skip
    skipped = {row for row, _ in progress.bad_rows}
    if skipped:
        logger.warning("%d bad rows were skipped: %s", len(skipped), ", ".join(sorted(skipped)[:20]))
