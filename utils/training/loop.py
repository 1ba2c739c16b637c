"""The training loop: accumulate, update, log, validate, checkpoint."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.errors import InputError
from utils.models.adapters import has_adapter
from utils.runtime import StopSignal
from utils.training.agreement import StopAgreement
from utils.training.checkpoint_writer import CheckpointWriter
from utils.training.checkpoints import (
    Progress,
    load_training_state,
    put_weights,
    read_trained,
    save_checkpoint,
    save_trained,
)
from utils.training.ema import MovingAverage
from utils.training.memory_saving import FusedBackward
from utils.training.metrics import DataWait, RunningMetrics
from utils.training.objective import Objective
from utils.training.optimizers import averaged_weights, restore_paging
from utils.training.training_log import append_log

MAX_SKIPPED = 100  # the scaler halves its scale each time: 65536 becomes smaller than any gradient needs after 40


@dataclass(frozen=True)
class LoopOptions:
    """The fields are flags; `max_train_steps` is computed from the epochs where it is not given."""

    max_train_steps: int
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None


@dataclass
class TrainingState:
    """What training changes, and what a checkpoint contains.

    unet: the UNet as `accelerator.prepare` returned it; `model` is the UNet inside.
    """

    accelerator: Accelerator
    unet: torch.nn.Module
    model: UNet2DConditionModel
    ema: MovingAverage | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    progress: Progress
    num_skipped_in_a_row: int = 0
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)

    @property
    def fused_backward(self) -> FusedBackward | None:
        """The optimizer inside accelerate's wrapper, if it updates the weights during the backward pass."""
        return self.optimizer.optimizer if isinstance(self.optimizer.optimizer, FusedBackward) else None

    def save(self, output_dir: Path, limit: int | None, in_background: bool = False) -> None:
        """Write a checkpoint, in the main process; see `save_checkpoint`. Every process calls it.

        in_background: may return before it is written; `writer.wait` waits for it.
        """
        if not self.accelerator.is_main_process:
            return
        is_whole = not has_adapter(self.model)  # an adapter is small, and is read from the model
        weights = {"unet": self.model.state_dict() if is_whole else None}
        if self.ema:
            weights["unet_ema"] = self.ema.state_dict()
        state = {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}
        if self.accelerator.scaler:
            state["scaler"] = self.accelerator.scaler.state_dict()

        def write(progress: Progress, weights: dict, state: dict) -> None:
            models = {name: partial(save_trained, unet=self.model, weights=weights[name]) for name in weights}
            save_checkpoint(output_dir, progress, models, state, limit)

        self.writer.submit(write, self.progress, weights, state, in_background=in_background and is_whole)

    def load(self, checkpoint: Path) -> None:
        """Load what `save` wrote, also in a sharded run. Raises `InputError` for the checkpoint of another model."""
        state = load_training_state(checkpoint)
        if (checkpoint / "shards").is_dir():
            from utils.training.sharding import load_shards

            load_shards(checkpoint, self.model, self.ema, self.optimizer.optimizer, state["optimizer"])
        else:
            self._load_whole(checkpoint, state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.accelerator.scaler and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _load_whole(self, checkpoint: Path, optimizer_state: dict) -> None:
        put_weights(self.model, read_trained(checkpoint / "unet", self.model))
        self.optimizer.load_state_dict(optimizer_state)
        restore_paging(self.optimizer.optimizer)
        if self.ema:
            self.ema.load_state_dict(read_trained(checkpoint / "unet_ema", self.model))

    def clip_gradients(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients to at most `max_norm`; returns their norm before, a scalar on the device."""
        return self.accelerator.clip_grad_norm_(self.unet.parameters(), max_norm)

    def whole_unet(self) -> UNet2DConditionModel | None:
        """The UNet with its current weights, at least in the main process. Every process calls it."""
        return self.model

    def unshard(self) -> None:
        """After the last step: `model` has the weights to publish where they were divided between processes."""

    @contextmanager
    def published_weights(self) -> Iterator[None]:
        """Within the context the model has the weights that would be published: the averaged ones, if there are any."""
        with averaged_weights(self.optimizer), self.ema.swapped_into(self.model) if self.ema else nullcontext():
            yield


def fit(
    state: TrainingState,
    objective: Objective,
    batches: Iterator[dict],
    options: LoopOptions,
    output_dir: Path,
    on_batch: Callable[[dict], None],
    on_step: Callable[[int], None],
) -> int:
    """Train until `max_train_steps`. Returns 0, or the exit code of the signal that stopped it after a checkpoint.

    on_batch is called with every micro-batch (to count bad rows), on_step after every step (to validate), and for a
    resumed run also with the step of the checkpoint.
    """
    accelerator, progress, metrics = state.accelerator, state.progress, RunningMetrics()
    data_wait = DataWait(is_judged=not accelerator.is_main_process)
    if progress.global_step:
        on_step(progress.global_step)
    bar = tqdm(
        total=options.max_train_steps,
        initial=progress.global_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
        mininterval=1.0,
    )
    with StopSignal() as stop, bar, logging_redirect_tqdm():
        agreement = StopAgreement(accelerator, stop)
        while progress.global_step < options.max_train_steps:
            num_samples = train_step(state, objective, batches, options, metrics, on_batch)
            progress.global_step += 1
            progress.draws += num_samples * accelerator.num_processes
            if state.ema and not state.optimizer.step_was_skipped:
                state.ema.update(state.model, progress.global_step)
            bar.update()

            is_last = progress.global_step == options.max_train_steps
            is_checkpoint = progress.global_step % options.checkpointing_steps == 0
            is_logged = progress.global_step % options.logging_steps == 0 or is_checkpoint or is_last
            should_stop = agreement.should_stop()
            if is_logged or should_stop:
                log_metrics(state, metrics, output_dir, bar)
                data_wait.add(metrics.waiting, time.monotonic() - metrics.start_time)
                metrics = RunningMetrics()
            if not should_stop:  # a signal leaves little time; a resumed run validates this step
                on_step(progress.global_step)
            if is_checkpoint or should_stop:
                is_more = not (should_stop or is_last)
                state.save(output_dir, options.checkpoints_total_limit, in_background=is_more)
            if should_stop:
                break
            if not metrics.losses:
                metrics.start_time = time.monotonic()  # do not count validation and checkpoints
        agreement.close()
        state.writer.wait()
        accelerator.wait_for_everyone()
    return stop.exit_code if progress.global_step < options.max_train_steps else 0


def train_step(
    state: TrainingState,
    objective: Objective,
    batches: Iterator[dict],
    options: LoopOptions,
    metrics: RunningMetrics,
    on_batch: Callable[[dict], None],
) -> int:
    """One optimizer step without a host sync; returns the number of samples of this process."""
    accelerator, step_loss, num_samples = state.accelerator, 0.0, 0
    # An adapter's dropout uses torch's generator: seeded by step and process, it does not depend on resuming.
    seed_torch(state.progress, salt=1 + accelerator.process_index)
    for micro_step in range(options.gradient_accumulation_steps):
        started = time.monotonic()
        batch = next(batches)
        metrics.waiting += time.monotonic() - started
        on_batch(batch)
        is_last = micro_step == options.gradient_accumulation_steps - 1
        # Processes average their gradients once per step, with the last micro-batch.
        with nullcontext() if is_last else accelerator.no_sync(state.unet):
            loss = objective(state.unet, batch).mean() / options.gradient_accumulation_steps
            accelerator.backward(loss)
        step_loss = step_loss + loss.detach()
        metrics.rows.append(batch["rows"])
        num_samples += len(batch["rows"])
    if state.fused_backward:
        grad_norm = state.fused_backward.grad_norm()
    else:
        grad_norm = state.clip_gradients(options.max_grad_norm or math.inf)
        seed_torch(state.progress)  # stochastic rounding must be the same in every process
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.optimizer.step_was_skipped:  # by the gradient scaler of fp16: no update, so the schedule waits, too
        metrics.num_skipped += 1
        count_skipped(state)
    else:
        state.num_skipped_in_a_row = 0
        state.lr_scheduler.step()
    metrics.losses.append(step_loss)
    metrics.grad_norms.append(grad_norm.detach())
    metrics.num_samples += num_samples
    return num_samples


def count_skipped(state: TrainingState) -> None:
    """Count a skipped update. Raises `InputError` where the scaler does not find a scale: nothing is trained."""
    state.num_skipped_in_a_row += 1
    if state.num_skipped_in_a_row >= MAX_SKIPPED:
        raise InputError(
            f"training stopped: the gradients of the last {MAX_SKIPPED} steps overflow in fp16, so nothing is learned: "
            "use --mixed_precision bf16 (or no). Earlier checkpoints are kept"
        )


def seed_torch(progress: Progress, salt: int = 0) -> None:
    """Seed torch's generators from the run's seed and the step."""
    torch.manual_seed(np.random.SeedSequence([progress.seed, progress.global_step, salt]).generate_state(1)[0].item())


def log_metrics(state: TrainingState, metrics: RunningMetrics, output_dir: Path, bar: tqdm) -> None:
    """Write the metrics since the last log entry to the trackers, the log file and the progress bar."""
    step = state.progress.global_step
    entry = metrics.summarize(state.accelerator, first_step=step - len(metrics.losses) + 1)
    entry["lr"] = state.lr_scheduler.get_last_lr()[0]
    state.accelerator.log(entry, step=step)
    if state.accelerator.is_main_process:
        bar.set_postfix(loss=f"{entry['loss']:.4f}", lr=f"{entry['lr']:.2e}", refresh=False)
        append_log(output_dir, {"step": step} | entry)
