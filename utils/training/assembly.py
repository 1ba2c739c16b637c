"""The order of a run: check, load, train, publish."""

import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from utils.compilation import compile_blocks, find_missing_compiler
from utils.data.prompt_cache import store_prompts
from utils.data.samples import BadRowLimit, list_prompts
from utils.hub import redact
from utils.models.adapters import add_adapter, cast_frozen
from utils.models.conditioning import GPU_BATCH, PromptEncoder, make_prompt_encoder
from utils.models.quantization import quantize_linears
from utils.models.stable_diffusion import Configs, StableDiffusion, load_stable_diffusion, widen_conv_in
from utils.quiet import hide_progress_bars
from utils.runtime import frozen_dtype, start_accelerator, vae_dtype
from utils.training.batch_size import fit_batch_size
from utils.training.checkpoints import Progress
from utils.training.cuda_graphs import GraphedUNet, find_obstacle
from utils.training.dry_run import run_dry
from utils.training.ema import MovingAverage
from utils.training.evaluation import validate_edits
from utils.training.loop import TrainingState, fit
from utils.training.memory_saving import checkpoint_blocks
from utils.training.objective import Objective
from utils.training.optimizers import apply_changed_settings, make_lr_schedule, make_optimizer
from utils.training.out_of_memory import explaining_out_of_memory
from utils.training.preflight import RunPlan, count_rows, run_preflight, write_settings
from utils.training.profiling import make_profiler
from utils.training.publishing import BestWeights, publish
from utils.training.session import Batches, TrainingSession
from utils.training.settings import Settings
from utils.training.sharding_settings import Sharding, take_sharding
from utils.training.validation import validate

logger = logging.getLogger(__name__)
WANDB_RUN = "wandb-run.json"


def train_editor(settings: Settings, check_base: Callable[[Configs, str], None]) -> int:
    """Check, load, train and publish. Returns the exit code: 0, or 128 + the signal that stopped the run.

    check_base(configs, name) raises `InputError` for a base model that the script does not train. A text-to-image UNet
    is widened.
    """
    with explaining_out_of_memory(settings):
        return _train_editor(settings, check_base)


def _train_editor(settings: Settings, check_base: Callable[[Configs, str], None]) -> int:
    hide_progress_bars()
    sharding = take_sharding(os.environ, settings)
    accelerator = start_accelerator(settings.machine, needs_cpu_group=sharding is not None)
    plan = run_preflight(accelerator, settings, check_base)
    parts = load_stable_diffusion(settings.model)
    if plan.needs_widening:
        widen_conv_in(parts.unet)
    objective = make_objective(accelerator, parts, plan, settings)
    state = make_training_state(accelerator, parts.unet, settings, plan, sharding)
    if plan.checkpoint:
        fresh = [dict(group) for group in state.optimizer.param_groups]
        state.load(plan.checkpoint)
        if plan.changed:
            apply_changed_settings(state.optimizer, fresh, state.lr_scheduler)
        logger.warning("resuming from %s at step %d", plan.checkpoint, plan.progress.global_step)
    write_settings(accelerator, settings, plan)  # replaces an earlier run's, so only once the models are loaded
    session = TrainingSession(settings, plan, parts, objective, state)
    if settings.run.auto_batch_size and sharding:
        logger.warning("--auto_batch_size is ignored: the weights are divided between processes")
    elif settings.run.auto_batch_size:
        session = fit_batch_size(session)
    best = BestWeights(settings.output_dir, settings.validation.save_best)
    with closing(session.training_batches()) as batches:
        if settings.run.dry_run:
            return run_dry(session, batches)
        start_trackers(accelerator, settings)
        exit_code = train(session, batches, best)
    if exit_code == 0:
        state.unshard()
    accelerator.wait_for_everyone()
    accelerator.end_training()  # the others do not wait for the upload
    if exit_code == 0 and accelerator.is_main_process:
        report_skipped(objective, plan.progress)
        publish(session, best)
    return exit_code


def make_objective(accelerator: Accelerator, parts: StableDiffusion, plan: RunPlan, settings: Settings) -> Objective:
    """Freeze the VAE and the text encoders in their dtypes, and move the VAE to the device."""
    dtype = frozen_dtype(accelerator)
    of_vae = vae_dtype(settings.run.vae_precision, parts.is_sdxl, dtype)
    parts.vae.requires_grad_(False)
    parts.vae.to(accelerator.device, dtype=of_vae)
    for text_encoder in parts.text_encoders:
        text_encoder.requires_grad_(False)
        text_encoder.to(dtype=dtype)
    encode_prompts = prepare_prompts(accelerator, parts, plan, settings)
    condition_scale = parts.vae.config.scaling_factor if parts.is_cosxl_edit else 1.0
    return Objective(
        parts.vae, encode_prompts, plan.schedule.to(accelerator.device), settings.objective, condition_scale
    )


def prepare_prompts(
    accelerator: Accelerator, parts: StableDiffusion, plan: RunPlan, settings: Settings
) -> PromptEncoder:
    """The prompt encoder. If all prompts are known in advance, they are encoded, and its weights leave the device."""
    encode_prompts = make_prompt_encoder(parts)
    encode_prompts.device = accelerator.device
    if accelerator.device.type == "cuda":
        encode_prompts.batch_size = GPU_BATCH
    is_known = count_rows(plan.sources) is not None and not settings.run.dry_run

    def list_all() -> Iterator[str]:
        validation_prompts = (prompt for _, prompt in plan.validation_pairs)
        eval_prompts = (row.prompt for row in plan.eval_rows)
        return chain(*map(list_prompts, plan.sources + plan.held_out), validation_prompts, eval_prompts)

    folder = Path(settings.data.latent_cache_dir or settings.output_dir / "prompt-cache")
    if is_known and store_prompts(accelerator, folder, list_all, encode_prompts):
        return encode_prompts
    for text_encoder in parts.text_encoders:
        text_encoder.to(accelerator.device)
    if is_known:
        encode_prompts.encode_all(list_all(), show_progress=accelerator.is_main_process)
    elif accelerator.device.type == "cuda":
        encode_prompts.caches = False  # of a stream, whose prompts are not known
    return encode_prompts


def make_training_state(
    accelerator: Accelerator,
    unet: UNet2DConditionModel,
    settings: Settings,
    plan: RunPlan,
    sharding: Sharding | None = None,
) -> TrainingState:
    """Move the UNet to the device and make its adapter, EMA, optimizer and learning-rate schedule."""
    prepare_weights(accelerator, unet, settings, plan)
    unet.train()
    if settings.run.gradient_checkpointing or settings.run.gradient_checkpointing_blocks:
        checkpoint_blocks(unet, settings.run.gradient_checkpointing_blocks)
    elif sharding and sharding.checkpoint_activations:
        checkpoint_blocks(unet, None)
    if settings.machine.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if sharding and accelerator.num_processes == 1:
        logger.warning("one process has nothing to share: the weights are not divided")
        sharding = None
    if sharding:  # divided a block at a time, so that the whole UNet is never on a device
        from utils.training.sharded_state import ShardedState
        from utils.training.sharding import shard_unet

        shard_unet(unet, accelerator, sharding.blocks, sharding.reshard_after_forward, sharding.offload)
    else:
        unet.to(accelerator.device)
    if settings.run.compile:
        compile_for_training(unet, accelerator.device.type)
    run = settings.run
    ema = MovingAverage(unet, run.ema_decay, run.ema_device, run.ema_update_interval) if run.use_ema else None
    parameters = [value for value in unet.parameters() if value.requires_grad]
    optimizer = make_optimizer(parameters, settings.optimization, plan.samples_per_step)
    lr_schedule = make_lr_schedule(optimizer, settings.optimization, plan.max_train_steps)
    if sharding:  # the processes already share the weights; accelerate adds autocast
        prepared = accelerator.prepare_model(unet, device_placement=False, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer)
        return ShardedState(accelerator, prepared, unet, ema, optimizer, lr_schedule, plan.progress)
    prepared, optimizer = accelerator.prepare(unet, optimizer)
    if should_use_graphs(accelerator, settings):
        prepared = GraphedUNet(prepared)
    return TrainingState(accelerator, prepared, unet, ema, optimizer, lr_schedule, plan.progress)


def should_use_graphs(accelerator: Accelerator, settings: Settings) -> bool:
    """Whether the steps replay CUDA graphs: not by default with gradient checkpointing, a sign of scarce memory."""
    run = settings.run
    obstacle = find_obstacle(accelerator.num_processes, settings.optimization.fused_backward)
    if run.cuda_graphs == "yes" and obstacle:
        logger.warning("--cuda_graphs yes is ignored: %s", obstacle)
    is_recomputed = run.gradient_checkpointing or run.gradient_checkpointing_blocks
    is_wanted = run.cuda_graphs == "yes" or (run.cuda_graphs == "auto" and not is_recomputed)
    return is_wanted and not obstacle


def compile_for_training(unet: UNet2DConditionModel, device: str) -> None:
    """Compile the UNet's blocks, or say why not."""
    if missing := find_missing_compiler(device):
        logger.warning("--compile is ignored: it needs %s, which is not installed", missing)
    else:
        num_blocks = compile_blocks(unet)
        logger.warning("--compile: the first step compiles %d blocks, which takes minutes", num_blocks)


def prepare_weights(accelerator: Accelerator, unet: UNet2DConditionModel, settings: Settings, plan: RunPlan) -> None:
    """Set the dtype of the UNet, or freeze it (16 bits or quantized) and add an adapter."""
    if not settings.adapter.is_used:
        if settings.optimization.weights_dtype == "bf16":
            unet.to(torch.bfloat16)
        return
    unet.requires_grad_(False)
    dtype = frozen_dtype(accelerator)
    if settings.adapter.quantize_base:
        quantize_linears(unet, settings.adapter.quantize_base, accelerator.device, dtype)
    torch.manual_seed(plan.progress.seed)  # for the adapter's initial weights
    add_adapter(unet, settings.adapter, train_conv_in=plan.trains_conv_in, initial=plan.initial_adapter)
    cast_frozen(unet, dtype)


def start_trackers(accelerator: Accelerator, settings: Settings) -> None:
    """Start the trackers, whose files are in output_dir. wandb stores the command line, so the token is removed."""
    sys.argv = redact(sys.argv)
    values = settings.by_flag()
    config = {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in values.items()}
    project = settings.run.tracker_project_name or os.environ.get("WANDB_PROJECT") or "instruct-pix2pix"
    wandb = {"dir": str(settings.output_dir)} | find_wandb_run(accelerator, settings)
    if settings.run.tracker_run_name:
        wandb["name"] = settings.run.tracker_run_name
    accelerator.init_trackers(project, config=config, init_kwargs={"wandb": wandb})


def find_wandb_run(accelerator: Accelerator, settings: Settings) -> dict[str, str]:
    """The id of the run in wandb, written to output_dir, so that a resumed run continues it."""
    path = settings.output_dir / WANDB_RUN
    if settings.machine.report_to not in ("wandb", "all") or not accelerator.is_main_process:
        return {}
    if os.environ.get("WANDB_RUN_ID"):
        return {"resume": "allow"}
    if not (settings.run.resume_from_checkpoint and path.is_file()):
        path.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n")
    return {"id": json.loads(path.read_text())["id"], "resume": "allow"}


def train(session: TrainingSession, batches: Batches, best: BestWeights) -> int:
    """Train with validation and a limit of bad rows; returns the exit code of `fit`."""
    settings, progress = session.settings, session.plan.progress
    limit = BadRowLimit(settings.data.max_bad_rows, count_rows(session.plan.sources))
    limit.add(progress.bad_rows)
    profiler = make_profiler(settings.run.profile, session.accelerator.is_main_process)

    def count_bad_rows(batch: dict) -> None:
        if batch["bad_rows"]:
            limit.add(batch["bad_rows"], num_drawn=progress.draws)
            progress.bad_rows = [list(row) for row in limit.reasons.items()]

    def on_step(step: int) -> None:
        if profiler:
            profiler.count_step()
        validate(session, best, step)
        validate_edits(session, best, step)

    with closing(profiler) if profiler else nullcontext():
        return fit(
            session.state,
            session.objective,
            batches,
            replace(settings.loop, max_train_steps=session.plan.max_train_steps),
            settings.output_dir,
            on_batch=count_bad_rows,
            on_step=on_step,
        )


def report_skipped(objective: Objective, progress: Progress) -> None:
    """Log the truncated prompts and the bad rows."""
    truncated = objective.encode_prompts.truncated
    if truncated:
        logger.warning(
            "%d prompts were longer than the text encoder's limit and were truncated, for example: %.100s",
            len(truncated),
            next(iter(truncated)),
        )
    skipped = {row for row, _ in progress.bad_rows}
    if skipped:
        logger.warning("%d bad rows were skipped: %s", len(skipped), ", ".join(sorted(skipped)[:20]))
