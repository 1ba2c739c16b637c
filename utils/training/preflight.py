"""Everything that is looked for before a model is loaded, and what was found."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers import DDPMScheduler
from PIL import Image

from utils.atomic_files import make_writable, remove_unfinished
from utils.data.batches import check_first_rows
from utils.data.sources import Source, hold_out, open_mix, open_source, sources_digest
from utils.errors import InputError
from utils.hub import check_push_rights
from utils.models.noise_schedules import make_noise_schedule
from utils.models.stable_diffusion import EDITOR_CHANNELS, Configs, read_configs
from utils.pictures import load_picture
from utils.training.checkpoints import Progress, check_same_run, choose_checkpoint, list_checkpoints, read_progress
from utils.training.gradient_checkpointing import find_block_problems
from utils.training.optimizer_checks import check_lr_schedule, find_optimizer_problems
from utils.training.settings import DataOptions, RunOptions, Settings
from utils.training.training_log import cut_log

FIRST_ROWS = 8


@dataclass
class Plan:
    """What the checks found, all before a model is loaded."""

    sources: list[Source]
    held_out: list[Source]
    pairs: list[tuple[Image.Image, str]]
    schedule: DDPMScheduler
    checkpoint: Path | None
    progress: Progress
    samples_per_step: int
    max_train_steps: int
    steps_per_epoch: float
    is_widened: bool = False  # the base is a text-to-image model
    trains_conv_in: bool = True
    repo_id: str | None = None


def make_plan(accelerator: Accelerator, settings: Settings, check_base: Callable[[Configs, str], None]) -> Plan:
    """Look for everything that can be wrong. Raises `InputError`, one for all problems of a kind."""
    configs = read_configs(settings.model)
    check_base(configs, settings.model.name)
    check_model_flags(accelerator, configs, settings)
    schedule = make_noise_schedule(configs.scheduler, settings.objective)
    prepare_output_dir(accelerator, settings)
    checkpoint = progress = None
    if settings.run.resume_from_checkpoint:
        checkpoint = choose_checkpoint(settings.output_dir, settings.run.resume_from_checkpoint)
        progress = read_progress(checkpoint) if checkpoint else None
    elif list_checkpoints(settings.output_dir) and not settings.run.dry_run:
        raise InputError(
            f"--output_dir {settings.output_dir} holds checkpoints of a former run: go on from them with "
            "--resume_from_checkpoint latest, or name another folder (or remove them)"
        )
    seed = settings.run.seed if settings.run.seed is not None else progress.seed if progress else draw_seed()
    sources, held_out = open_sources(settings.data, seed)
    check_first_rows(sources, settings.geometry, FIRST_ROWS)
    samples = settings.data.train_batch_size * settings.loop.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps, steps_per_epoch = count_steps(settings.run, sources, samples)
    check_lr_schedule(settings.optimization, max_train_steps)
    identity = describe_run(settings, accelerator, sources, seed, samples, max_train_steps)
    if progress:
        check_same_run(progress, identity)
    plan = Plan(
        sources,
        held_out,
        load_pairs(settings.run),
        schedule,
        checkpoint,
        progress or Progress(),
        samples,
        max_train_steps,
        steps_per_epoch,
    )
    plan.progress.seed, plan.progress.identity = seed, identity
    plan.is_widened = configs.unet.get("in_channels", 4) != EDITOR_CHANNELS
    plan.trains_conv_in = plan.is_widened or settings.adapter.lora_target == "all"
    plan.repo_id = agree_on_repository(accelerator, settings)
    return plan


def check_model_flags(accelerator: Accelerator, configs: Configs, settings: Settings) -> None:
    """Refuse flags that this base has no use for, or that name what it does not have. Raises `InputError`."""
    problems = find_block_problems(settings.run.gradient_checkpointing_blocks or [], configs.unet)
    problems += find_optimizer_problems(
        settings.optimization,
        max_grad_norm=settings.loop.max_grad_norm,
        use_ema=settings.run.use_ema,
        gradient_accumulation_steps=settings.loop.gradient_accumulation_steps,
        has_adapter=settings.adapter.lora_rank is not None,
        mixed_precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        has_gpu=accelerator.device.type == "cuda",
    )
    crops = ("crops_coords_top_left_h", "crops_coords_top_left_w")
    if not configs.is_sdxl and any(getattr(settings.objective, name) is not None for name in crops):
        problems.append(f"--{crops[0]} and --{crops[1]} belong to SDXL, and {settings.model.name} is none: drop them")
    other = "pytorch_lora_weights.safetensors" if publishes_pipeline(settings) else "model_index.json"
    if (settings.output_dir / other).exists() and not settings.run.resume_from_checkpoint:
        problems.append(
            f"--output_dir {settings.output_dir} holds {other} of a former run, and this run leaves "
            f"{'a whole editor' if publishes_pipeline(settings) else 'an adapter'} there: name another folder"
        )
    if problems:
        raise InputError.from_problems(problems)


def publishes_pipeline(settings: Settings) -> bool:
    """Whether the run leaves a whole pipeline, and not an adapter."""
    return settings.adapter.lora_rank is None or settings.adapter.merge_adapter


def prepare_output_dir(accelerator: Accelerator, settings: Settings) -> None:
    """Make the folder, see that it can be written to, and clear away what a killed run left unfinished."""
    if accelerator.is_main_process:
        make_writable(settings.output_dir, "--output_dir")
        if settings.machine.report_to in ("tensorboard", "all"):
            make_writable(settings.output_dir / settings.machine.logging_dir, "--logging_dir")
        remove_unfinished(settings.output_dir)
    accelerator.wait_for_everyone()


def draw_seed() -> int:
    """A seed for a run that was given none; the same on all processes."""
    return broadcast_object_list([secrets.randbelow(2**31)])[0]


def open_sources(options: DataOptions, seed: int) -> tuple[list[Source], list[Source]]:
    """The rows to train on and those held out."""
    if options.train_mix:
        sources = open_mix(
            options.train_mix, max_train_samples=options.max_train_samples, cache_dir=options.cache_dir, seed=seed
        )
    else:
        names = (
            "dataset_name",
            "dataset_config_name",
            "train_data_dir",
            "streaming",
            "max_train_samples",
            "cache_dir",
            "original_image_column",
            "edit_prompt_column",
            "edited_image_column",
        )
        chosen = {name: getattr(options, name) for name in names}
        sources = [open_source(**chosen, split=options.dataset_split, seed=seed)]
    return hold_out(sources, options.validation_split, seed) if options.validation_split else (sources, [])


def count_rows(sources: list[Source]) -> int | None:
    """Rows of all sources together; None for a stream."""
    return None if any(source.is_streaming for source in sources) else sum(len(source.rows) for source in sources)


def count_steps(run: RunOptions, sources: list[Source], samples_per_step: int) -> tuple[int, float]:
    """(optimizer steps of the run, optimizer steps of one pass over the rows)."""
    rows = count_rows(sources)
    steps_per_epoch = rows / samples_per_step if rows else float("inf")
    return run.max_train_steps or max(1, round(steps_per_epoch * run.num_train_epochs)), steps_per_epoch


def load_pairs(run: RunOptions) -> list[tuple[Image.Image, str]]:
    """The validation pictures with their instructions; one of either serves all of the other."""
    images, prompts = run.val_image_url or [], run.validation_prompt or []
    if not images:
        return []
    pictures = [load_picture(image, "--val_image_url") for image in images]
    count = max(len(pictures), len(prompts))
    return [pair for pair, _ in zip(zip(cycle(pictures), cycle(prompts)), range(count), strict=False)]


def describe_run(
    settings: Settings,
    accelerator: Accelerator,
    sources: list[Source],
    seed: int,
    samples_per_step: int,
    max_train_steps: int,
) -> dict:
    """What must not change when a run goes on: the data, the batches, and how weights are updated from them."""
    fixed = asdict(settings.geometry) | asdict(settings.objective) | asdict(settings.optimization)
    fixed |= {name: value for name, value in asdict(settings.adapter).items() if name != "merge_adapter"}
    fixed |= {"use_ema": settings.run.use_ema, "ema_decay": settings.run.ema_decay}
    fixed |= {"max_grad_norm": settings.loop.max_grad_norm, "mixed_precision": accelerator.mixed_precision}
    fixed |= {"validation_split": settings.data.validation_split, "seed": seed}
    fixed["base"] = Path(settings.model.pretrained_model_name_or_path).name  # a folder may have been moved
    if settings.optimization.lr_scheduler not in ("constant", "constant_with_warmup"):
        fixed["max_train_steps"] = max_train_steps  # the learning rate of every step hangs on the last
    if settings.geometry.resize_mode == "bucket":
        fixed["samples per micro-step"] = settings.data.train_batch_size * accelerator.num_processes
    per_step = "samples per step (train_batch_size x gradient_accumulation_steps x processes)"
    return {"dataset": sources_digest(sources), per_step: samples_per_step} | fixed


def agree_on_repository(accelerator: Accelerator, settings: Settings) -> str | None:
    """The repository to push to, made and checked by the main process alone; None without --push_to_hub."""
    options = settings.publishing
    if not options.push_to_hub:
        return None
    repo_id = None
    if accelerator.is_main_process:
        repo_id = check_push_rights(
            options.hub_model_id,
            options.hub_token,
            settings.output_dir,
            options.hub_private_repo,
            create=not settings.run.dry_run,
        )
    return broadcast_object_list([repo_id])[0]


def write_settings(accelerator: Accelerator, settings: Settings, plan: Plan) -> None:
    """Keep the flags in `args.json`, without the token."""
    if not accelerator.is_main_process or settings.run.dry_run:
        return
    values = settings.by_flag() | {"seed": plan.progress.seed, "max_train_steps": plan.max_train_steps}
    (settings.output_dir / "args.json").write_text(json.dumps(values, indent=1) + "\n")
    cut_log(settings.output_dir, plan.progress.global_step)
