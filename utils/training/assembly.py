"""From flags to a published editor: the order in which a run checks, loads, trains and publishes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import chain

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from utils.data.batches import BadRowLimit
from utils.data.samples import list_prompts
from utils.hub import redact
from utils.models.adapters import add_adapter, cast_frozen
from utils.models.conditioning import make_prompt_encoder
from utils.models.quantization import quantize_linears
from utils.models.stable_diffusion import Configs, StableDiffusion, load_stable_diffusion, widen_conv_in
from utils.quiet import hide_progress_bars
from utils.runtime import DTYPES, frozen_dtype, start_accelerator
from utils.training.checkpoints import Progress
from utils.training.dry_run import take_dry_run
from utils.training.ema import MovingAverage
from utils.training.gradient_checkpointing import checkpoint_blocks
from utils.training.loop import Trainee, fit
from utils.training.objective import Objective
from utils.training.optimizers import make_lr_schedule, make_optimizer
from utils.training.preflight import Plan, count_rows, make_plan, write_settings
from utils.training.publishing import BestWeights, finish
from utils.training.session import Run
from utils.training.settings import Settings
from utils.training.validation import validate

logger = logging.getLogger(__name__)


def train_editor(settings: Settings, check_base: Callable[[Configs, str], None]) -> int:
    """Check, load, train, publish. Returns the exit code: 0, or 128 + the signal that stopped the run.

    check_base(configs, name) refuses a model that is not the script's. A text-to-image model's UNet is widened.
    """
    hide_progress_bars()
    accelerator = start_accelerator(settings.machine)
    plan = make_plan(accelerator, settings, check_base)

    parts = load_stable_diffusion(settings.model)
    if plan.is_widened:
        widen_conv_in(parts.unet)
    objective = make_objective(accelerator, parts, plan, settings)
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
            accelerator,
            trainee,
            objective,
            batches,
            plan.progress,
            replace(settings.loop, max_train_steps=plan.max_train_steps),
            settings.output_dir,
            on_batch=count_bad_rows,
            on_step=lambda step: validate(run, best, step),
        )
    if exit_code == 0 and accelerator.is_main_process:
        report_prompts(objective, plan.progress)
        finish(run, best)
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return exit_code


def make_objective(accelerator: Accelerator, parts: StableDiffusion, plan: Plan, settings: Settings) -> Objective:
    """Freeze VAE and text encoders, bring them to the device in 16 bits where that is asked for.

    When every prompt is known beforehand, all are encoded now, and the text encoders leave the device.
    """
    dtype = frozen_dtype(accelerator)
    vae_dtype = DTYPES.get(settings.run.vae_precision, torch.float32 if parts.is_sdxl else dtype)
    for model, model_dtype in ((parts.vae, vae_dtype), *((encoder, dtype) for encoder in parts.text_encoders)):
        model.requires_grad_(False)
        model.to(accelerator.device, dtype=model_dtype)
    encode_prompts = make_prompt_encoder(parts)
    if count_rows(plan.sources) is not None and not settings.run.dry_run:
        prompts = chain(*map(list_prompts, plan.sources + plan.held_out), (prompt for _, prompt in plan.pairs))
        encode_prompts.encode_all(prompts, show_progress=accelerator.is_main_process)
    scale = parts.vae.config.scaling_factor if parts.is_cosxl_edit else 1.0
    return Objective(parts.vae, encode_prompts, plan.schedule, settings.objective, scale)


def make_trainee(accelerator: Accelerator, unet: UNet2DConditionModel, settings: Settings, plan: Plan) -> Trainee:
    """Bring the UNet to the device, with its adapter, moving average, optimizer and learning-rate schedule."""
    prepare_weights(accelerator, unet, settings, plan)
    unet.to(accelerator.device).train()
    if accelerator.device.type == "cuda":
        unet.to(memory_format=torch.channels_last)
    if settings.run.gradient_checkpointing or settings.run.gradient_checkpointing_blocks:
        checkpoint_blocks(unet, settings.run.gradient_checkpointing_blocks)
    if settings.machine.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    ema = MovingAverage(unet, settings.run.ema_decay, settings.run.ema_device) if settings.run.use_ema else None
    parameters = [value for value in unet.parameters() if value.requires_grad]
    optimizer = make_optimizer(parameters, settings.optimization, plan.samples_per_step)
    lr_schedule = make_lr_schedule(optimizer, settings.optimization, plan.max_train_steps)
    prepared, optimizer = accelerator.prepare(unet, optimizer)
    return Trainee(prepared, unet, ema, optimizer, lr_schedule, accelerator.scaler)


def prepare_weights(accelerator: Accelerator, unet: UNet2DConditionModel, settings: Settings, plan: Plan) -> None:
    """What is trained: an adapter on a frozen base, in 16 bits or quantised, or all weights, in float32 or bf16."""
    if settings.adapter.lora_rank is None:
        if settings.optimization.weights_dtype == "bf16":
            unet.to(torch.bfloat16)
        return
    unet.requires_grad_(False)
    dtype = frozen_dtype(accelerator)
    if settings.adapter.quantize_base:
        quantize_linears(unet, settings.adapter.quantize_base, accelerator.device, dtype)
    torch.manual_seed(plan.progress.seed)  # of the adapter's first weights
    add_adapter(unet, settings.adapter, train_conv_in=plan.trains_conv_in)
    cast_frozen(unet, dtype)


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
            len(truncated),
            next(iter(truncated)),
        )
    skipped = {row for row, _ in progress.bad_rows}
    if skipped:
        logger.warning("%d bad rows were skipped: %s", len(skipped), ", ".join(sorted(skipped)[:20]))
