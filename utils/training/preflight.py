"""Everything that is checked before a model is loaded, and what the checks find out."""

import json
import logging
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path

from accelerate import Accelerator
from PIL import Image

from utils.data.held_out import MAX_HELD_OUT, hold_out, hold_out_first
from utils.data.samples import check_first_rows
from utils.data.sources import Source, open_mix, open_source, sources_digest
from utils.errors import InputError
from utils.hub import check_push_rights
from utils.image_sources import load_image_source
from utils.models.adapter_files import AdapterContent
from utils.models.noise_schedules import NoiseSchedule, make_noise_schedule
from utils.models.stable_diffusion import EDITOR_CHANNELS, Configs, read_configs
from utils.training.agreement import require_equal, run_everywhere, run_on_main
from utils.training.checkpoints import Progress, check_same_run, read_progress
from utils.training.eval_rows import EvalRow, read_eval_rows
from utils.training.initial_adapter import digest_adapter, read_initial_adapter
from utils.training.memory_saving import find_block_problems
from utils.training.optimizer_checks import check_lr_schedule, find_optimizer_problems
from utils.training.resuming import agree_on_checkpoint, prepare_output_dir
from utils.training.settings import DataOptions, RunOptions, Settings
from utils.training.training_log import cut_log

logger = logging.getLogger(__name__)

NUM_CHECKED_ROWS = 8


@dataclass
class RunPlan:
    """What the checks found out.

    checkpoint: the one to resume from. needs_widening: the base is a text-to-image model. steps_per_epoch: infinite for
    a stream.
    """

    sources: list[Source]
    held_out: list[Source]
    eval_rows: list[EvalRow]
    validation_pairs: list[tuple[Image.Image, str]]  # (image, edit prompt)
    schedule: NoiseSchedule
    checkpoint: Path | None
    progress: Progress
    samples_per_step: int
    max_train_steps: int
    steps_per_epoch: float
    needs_widening: bool
    trains_conv_in: bool
    repo_id: str | None
    changed: dict[str, tuple]  # of --allow_changed: name -> (before, now)
    initial_adapter: AdapterContent | None  # of --init_adapter


def run_preflight(accelerator: Accelerator, settings: Settings, check_base: Callable[[Configs, str], None]) -> RunPlan:
    """Check the base model, output folder, checkpoint, dataset, settings and the right to push. Raises `InputError`."""
    configs, initial_adapter = run_everywhere(accelerator, lambda: check_model(accelerator, settings, check_base))
    schedule = run_everywhere(accelerator, lambda: make_noise_schedule(configs.scheduler, settings.objective))
    if settings.objective.snr_gamma and schedule.has_zero_terminal_snr:
        logger.warning(
            "--snr_gamma gives the last timestep of a schedule with zero terminal SNR the weight 0: drop one of them"
        )
    run_on_main(accelerator, lambda: prepare_output_dir(settings))
    checkpoint = agree_on_checkpoint(accelerator, settings)
    progress = read_progress(checkpoint) if checkpoint else Progress()
    if settings.run.seed is not None:
        progress.seed = settings.run.seed
    elif not checkpoint:
        progress.seed = run_on_main(accelerator, lambda: secrets.randbelow(2**31))
    sources, held_out = run_everywhere(accelerator, lambda: open_checked_sources(settings, progress.seed))
    samples = settings.data.train_batch_size * settings.loop.gradient_accumulation_steps * accelerator.num_processes
    max_train_steps, steps_per_epoch = count_steps(settings.run, sources, samples)
    identity = describe_run(settings, accelerator, sources, progress.seed, samples, max_train_steps)
    if initial_adapter:
        identity["init_adapter"] = digest_adapter(initial_adapter)  # its folder may have been moved
    require_equal(accelerator, identity, "data and settings")
    check_lr_schedule(settings.optimization, max_train_steps)
    changed = check_same_run(progress, identity, settings.run.allow_changed or ()) if checkpoint else {}
    for name, (old, new) in changed.items():
        logger.warning("--allow_changed: %s is %s from step %d on, and was %s", name, new, progress.global_step, old)
        progress.changes.append([progress.global_step, name, old, new])
    progress.identity = identity
    needs_widening = configs.unet.get("in_channels", 4) != EDITOR_CHANNELS
    return RunPlan(
        sources=sources,
        held_out=held_out,
        eval_rows=run_everywhere(accelerator, lambda: read_eval_rows(settings, held_out)),
        validation_pairs=run_everywhere(accelerator, lambda: load_validation_pairs(settings.run)),
        schedule=schedule,
        checkpoint=checkpoint,
        progress=progress,
        samples_per_step=samples,
        max_train_steps=max_train_steps,
        steps_per_epoch=steps_per_epoch,
        needs_widening=needs_widening,
        trains_conv_in=needs_widening or settings.adapter.lora_target == "all",
        repo_id=run_on_main(accelerator, lambda: check_repository(settings)),
        changed=changed,
        initial_adapter=initial_adapter,
    )


def check_model(
    accelerator: Accelerator, settings: Settings, check_base: Callable[[Configs, str], None]
) -> tuple[Configs, AdapterContent | None]:
    """The configurations of the base model, and the adapter of --init_adapter. Raises `InputError`."""
    configs = read_configs(settings.model)
    check_base(configs, settings.model.name)
    check_model_flags(accelerator, configs, settings)
    if not settings.adapter.init_adapter:
        return configs, None
    what = f"the model {settings.model.name}"
    return configs, read_initial_adapter(settings.adapter.init_adapter, configs.unet, what, settings.model.cache_dir)


def check_model_flags(accelerator: Accelerator, configs: Configs, settings: Settings) -> None:
    """Refuse flags that do not work with this base model, optimizer or output folder. Raises `InputError`."""
    problems = find_block_problems(settings.run.gradient_checkpointing_blocks or [], configs.unet)
    problems += find_optimizer_problems(
        settings.optimization,
        max_grad_norm=settings.loop.max_grad_norm,
        use_ema=settings.run.use_ema,
        gradient_accumulation_steps=settings.loop.gradient_accumulation_steps,
        has_adapter=settings.adapter.is_used,
        mixed_precision=accelerator.mixed_precision,
        num_processes=accelerator.num_processes,
        has_gpu=accelerator.device.type == "cuda",
    )
    crops = (settings.objective.crops_coords_top_left_h, settings.objective.crops_coords_top_left_w)
    if not configs.is_sdxl and crops != (None, None):
        problems.append(
            "--crops_coords_top_left_h and --crops_coords_top_left_w only work with SDXL, and "
            f"{settings.model.name} is not an SDXL model; drop them"
        )
    result, other = ("a pipeline", "pytorch_lora_weights.safetensors")
    if not publishes_pipeline(settings):
        result, other = ("an adapter", "model_index.json")
    if (settings.output_dir / other).exists() and not settings.run.resume_from_checkpoint:
        problems.append(
            f"--output_dir {settings.output_dir} contains {other} of an earlier run, and this run writes {result}; "
            "name another folder"
        )
    if problems:
        raise InputError.from_problems(problems)


def publishes_pipeline(settings: Settings) -> bool:
    """Whether the run writes a whole pipeline, not an adapter alone."""
    return not settings.adapter.is_used or settings.adapter.merge_adapter


def open_checked_sources(settings: Settings, seed: int) -> tuple[list[Source], list[Source]]:
    """(rows to train on, held-out rows), of which the first were decoded."""
    sources, held_out = open_sources(settings.data, seed)
    check_first_rows(sources, settings.geometry, NUM_CHECKED_ROWS)
    return sources, held_out


def open_sources(options: DataOptions, seed: int) -> tuple[list[Source], list[Source]]:
    """(rows to train on, held-out rows)."""
    if options.train_mix:
        sources = open_mix(
            options.train_mix, max_train_samples=options.max_train_samples, cache_dir=options.cache_dir, seed=seed
        )
    else:
        source = open_source(
            options.dataset_name,
            options.dataset_config_name,
            options.train_data_dir,
            options.dataset_split,
            options.streaming,
            options.max_train_samples,
            options.cache_dir,
            options.original_image_column,
            options.edit_prompt_column,
            options.edited_image_column,
            seed,
        )
        sources = [source]
    limit = options.validation_samples
    if options.streaming and limit:
        rest, first = hold_out_first(sources[0], limit)
        return [rest], [first]
    if options.validation_split:
        return hold_out(sources, options.validation_split, seed, limit or MAX_HELD_OUT)
    return sources, []


def count_rows(sources: list[Source]) -> int | None:
    """Rows of all sources together; None for a stream."""
    return None if any(source.is_streaming for source in sources) else sum(len(source.rows) for source in sources)


def count_steps(run: RunOptions, sources: list[Source], samples_per_step: int) -> tuple[int, float]:
    """(optimizer steps of the run, optimizer steps per epoch)."""
    rows = count_rows(sources)
    steps_per_epoch = rows / samples_per_step if rows else float("inf")
    return run.max_train_steps or max(1, round(steps_per_epoch * run.num_train_epochs)), steps_per_epoch


def load_validation_pairs(run: RunOptions) -> list[tuple[Image.Image, str]]:
    """The validation images with their prompts; a single image or prompt is combined with all of the others."""
    images = [load_image_source(image, "--val_image_url") for image in run.val_image_url or []]
    prompts = run.validation_prompt or []
    count = max(len(images), len(prompts)) if images else 0
    return [pair for pair, _ in zip(zip(cycle(images), cycle(prompts)), range(count), strict=False)]


def describe_run(
    settings: Settings,
    accelerator: Accelerator,
    sources: list[Source],
    seed: int,
    samples_per_step: int,
    max_train_steps: int,
) -> dict:
    """What must not change when the run is resumed: the data, the batches, and how the weights are updated."""
    fixed = asdict(settings.geometry) | asdict(settings.objective) | asdict(settings.optimization)
    fixed |= {name: value for name, value in asdict(settings.adapter).items() if name != "merge_adapter"}
    fixed |= {"use_ema": settings.run.use_ema, "ema_decay": settings.run.ema_decay}
    fixed["ema_update_interval"] = settings.run.ema_update_interval
    fixed |= {"max_grad_norm": settings.loop.max_grad_norm, "mixed_precision": accelerator.mixed_precision}
    fixed |= {"validation_split": settings.data.validation_split, "seed": seed}
    fixed["validation_samples"] = settings.data.validation_samples
    vae = settings.model.pretrained_vae_model_name_or_path
    fixed |= {"revision": settings.model.revision, "vae": vae and Path(vae).name}
    fixed["vae_precision"] = settings.run.vae_precision
    fixed["base"] = Path(settings.model.pretrained_model_name_or_path).name  # a folder may have been moved
    if settings.optimization.lr_scheduler not in ("constant", "constant_with_warmup"):
        fixed["max_train_steps"] = max_train_steps  # every learning rate depends on the number of steps
    if settings.data.cache_crops > 1:
        fixed["cache_crops"] = settings.data.cache_crops
    if settings.geometry.resize_mode == "bucket":
        fixed["samples per micro-step"] = settings.data.train_batch_size * accelerator.num_processes
    per_step = "samples per step (train_batch_size x gradient_accumulation_steps x processes)"
    return {"dataset": sources_digest(sources), per_step: samples_per_step} | fixed


def check_repository(settings: Settings) -> str | None:
    """The repository to push to, created and checked; None without --push_to_hub."""
    options = settings.publishing
    if not options.push_to_hub:
        return None
    return check_push_rights(
        options.hub_model_id,
        options.hub_token,
        settings.output_dir,
        options.hub_private_repo,
        create=not settings.run.dry_run,
    )


def write_settings(accelerator: Accelerator, settings: Settings, plan: RunPlan) -> None:
    """Write the flags to `args.json`, without the access token, and cut the log of an earlier run."""
    if not accelerator.is_main_process or settings.run.dry_run:
        return
    values = settings.by_flag() | {"seed": plan.progress.seed, "max_train_steps": plan.max_train_steps}
    (settings.output_dir / "args.json").write_text(json.dumps(values, indent=1) + "\n")
    cut_log(settings.output_dir, plan.progress.global_step)
