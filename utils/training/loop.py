"""fit(): accumulate, update, log, validate, checkpoint."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from utils.errors import InputError
from utils.runtime import StopSignal
from utils.training.checkpoints import Progress, load_training_state, save_checkpoint
from utils.training.ema import MovingAverage
from utils.training.objective import Objective
from utils.training.optimizers import averaged_weights
from utils.training.trained_weights import put_weights, read_trained, save_trained
from utils.training.training_log import append_log


@dataclass(frozen=True)
class LoopOptions:
    """The fields are flags; `max_train_steps` is resolved from the epochs before."""

    max_train_steps: int
    gradient_accumulation_steps: int = 1
    max_grad_norm: float = 1.0
    logging_steps: int = 10
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = None


@dataclass
class Trainee:
    """What training changes, and what must be saved to go on with it.

    unet: as `accelerator.prepare` returned it. `model` is the UNet inside.
    """

    unet: torch.nn.Module
    model: UNet2DConditionModel
    ema: MovingAverage | None
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler | None = None

    @property
    def is_fused(self) -> bool:
        """Whether the weights change during the backward pass already."""
        return hasattr(self.optimizer.optimizer, "grad_norm")

    def save(self, output_dir: Path, progress: Progress, limit: int | None) -> Path:
        """Write a checkpoint; see `save_checkpoint`."""
        models = {"unet": lambda folder: save_trained(folder, self.model)}
        if self.ema:
            models["unet_ema"] = lambda folder: save_trained(folder, self.model, self.ema.state_dict())
        # The learning rate is a function of the step alone; its schedule is kept for the count of steps.
        state = {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        return save_checkpoint(output_dir, progress, models, state, limit)

    def load(self, checkpoint: Path) -> None:
        """Take over everything that `save` wrote. Raises `InputError` when it is of another model."""
        put_weights(self.model, read_trained(checkpoint / "unet", self.model))
        state = load_training_state(checkpoint)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.load_state_dict(read_trained(checkpoint / "unet_ema", self.model))

    @contextmanager
    def published_weights(self) -> Iterator[None]:
        """Within the context the model has the weights that would be published: averaged, where an average is kept."""
        with averaged_weights(self.optimizer), self.ema.swapped_into(self.model) if self.ema else nullcontext():
            yield


@dataclass
class Window:
    """What happened since the last log entry; the numbers stay on the device until then."""

    losses: list[torch.Tensor] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)  # of each micro-batch
    samples: int = 0
    started: float = field(default_factory=time.monotonic)

    def read(self, accelerator: Accelerator, first_step: int) -> dict[str, float]:
        """The one host sync: means over steps and processes. Raises `InputError` at a loss that is not finite."""
        losses, norms = torch.stack(self.losses), torch.stack(self.norms)
        self._stop_at_nan(losses.tolist(), norms.tolist(), first_step, may_skip=accelerator.scaler is not None)
        elapsed = time.monotonic() - self.started
        return {
            "loss": accelerator.reduce(losses.mean(), "mean").item(),
            "grad_norm": norms[-1].item(),
            "samples_per_second": self.samples * accelerator.num_processes / max(elapsed, 1e-9),
            "peak_memory_gb": peak_memory_gb(),
        }

    def _stop_at_nan(self, losses: list[float], norms: list[float], first_step: int, may_skip: bool) -> None:
        """A scaler skips steps with infinite gradients by itself, so there only the loss counts."""
        per_step = len(self.rows) // len(losses)
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if loss - loss != 0 or (norm - norm != 0 and not may_skip):
                rows = sum(self.rows[index * per_step : (index + 1) * per_step], [])
                raise InputError(
                    f"training stopped: at step {first_step + index} the loss is {loss}, the gradient's norm {norm}. "
                    f"Rows of that step: {', '.join(rows)}. Look at them; a lower --learning_rate or "
                    "--mixed_precision=bf16 may help. The checkpoints before it stand"
                )


def peak_memory_gb() -> float:
    """The most memory that the run has held, in 10^9 bytes: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def fit(
    accelerator: Accelerator,
    trainee: Trainee,
    objective: Objective,
    batches: Iterator[dict],
    progress: Progress,
    options: LoopOptions,
    output_dir: Path,
    on_batch: Callable[[dict], None],
    on_step: Callable[[int], None],
) -> int:
    """Train until `max_train_steps`. Returns 0, or the exit code of the signal that stopped it after a checkpoint.

    on_batch sees every micro-batch (bad rows are counted there), on_step every finished step (validation), and the
    step that a resumed run starts from once more.
    """
    if progress.global_step:
        on_step(progress.global_step)
    window = Window()
    bar = tqdm(
        total=options.max_train_steps,
        initial=progress.global_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
        mininterval=1.0,
    )
    with StopSignal() as stop, bar, logging_redirect_tqdm():
        while progress.global_step < options.max_train_steps:
            samples_before = window.samples
            take_step(accelerator, trainee, objective, batches, progress, options, window, on_batch)
            progress.global_step += 1
            progress.draws += (window.samples - samples_before) * accelerator.num_processes
            if trainee.ema:
                trainee.ema.update(trainee.model, progress.global_step)
            bar.update()

            is_last = progress.global_step == options.max_train_steps
            is_checkpoint = progress.global_step % options.checkpointing_steps == 0
            is_logged = progress.global_step % options.logging_steps == 0
            should_stop = _agree_to_stop(accelerator, stop, at_sync=is_logged or is_checkpoint or is_last)
            if is_logged or is_checkpoint or is_last or should_stop:
                window = log_window(accelerator, trainee, window, progress, output_dir, bar)
            if not should_stop:  # a signal leaves little time: the resumed run catches up on this step's validation
                on_step(progress.global_step)
            if (is_checkpoint or should_stop) and accelerator.is_main_process:
                trainee.save(output_dir, progress, options.checkpoints_total_limit)
            if should_stop:
                break
            if not window.losses:
                window.started = time.monotonic()  # validation and checkpoints are not training time
        accelerator.wait_for_everyone()
    return stop.exit_code if progress.global_step < options.max_train_steps else 0


def take_step(
    accelerator: Accelerator,
    trainee: Trainee,
    objective: Objective,
    batches: Iterator[dict],
    progress: Progress,
    options: LoopOptions,
    window: Window,
    on_batch: Callable[[dict], None],
) -> None:
    """One optimizer step: gradients of all micro-batches, clipped, applied. No host sync."""
    step_loss = 0.0
    # An adapter's dropout draws from torch's generator: as a function of the step and the process, resume is exact.
    seed_torch(progress, salt=1 + accelerator.process_index)
    for micro_step in range(options.gradient_accumulation_steps):
        batch = next(batches)
        on_batch(batch)
        is_last = micro_step == options.gradient_accumulation_steps - 1
        # Gradients travel between processes once a step, with the last micro-batch.
        with nullcontext() if is_last else accelerator.no_sync(trainee.unet):
            loss = objective(trainee.unet, batch).mean() / options.gradient_accumulation_steps
            accelerator.backward(loss)
        step_loss = step_loss + loss.detach()
        window.rows.append(batch["rows"])
        window.samples += len(batch["rows"])
    norm = find_grad_norm(accelerator, trainee, options.max_grad_norm)
    if not trainee.is_fused:
        seed_torch(progress)  # stochastic rounding must be the same on every process
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.lr_scheduler.step()
    window.losses.append(step_loss)
    window.norms.append(norm.detach())


def find_grad_norm(accelerator: Accelerator, trainee: Trainee, max_grad_norm: float) -> torch.Tensor:
    """The norm of the step's gradients, which are clipped to `max_grad_norm` where that is not 0."""
    if trainee.is_fused:  # they are gone by now
        return trainee.optimizer.optimizer.grad_norm()
    return accelerator.clip_grad_norm_(trainee.unet.parameters(), max_grad_norm or math.inf)


def seed_torch(progress: Progress, salt: int = 0) -> None:
    """Seed torch's generators by the run's seed and the step."""
    torch.manual_seed(np.random.SeedSequence([progress.seed, progress.global_step, salt]).generate_state(1)[0].item())


def log_window(
    accelerator: Accelerator, trainee: Trainee, window: Window, progress: Progress, output_dir: Path, bar: tqdm
) -> Window:
    """Write the log entry of the steps since the last one, and begin the next window."""
    entry = window.read(accelerator, first_step=progress.global_step - len(window.losses) + 1)
    entry["lr"] = trainee.lr_scheduler.get_last_lr()[0]
    accelerator.log(entry, step=progress.global_step)
    if accelerator.is_main_process:
        bar.set_postfix(loss=f"{entry['loss']:.4f}", lr=f"{entry['lr']:.2e}", refresh=False)
        append_log(output_dir, {"step": progress.global_step} | entry)
    return Window()


def _agree_to_stop(accelerator: Accelerator, stop: StopSignal, at_sync: bool) -> bool:
    """Whether to stop after this step. Several processes must agree, and ask each other only where they sync anyway."""
    if accelerator.num_processes == 1:
        return stop.received is not None
    if not at_sync:
        return False
    wish = torch.tensor(float(int(stop.received or 0)), device=accelerator.device)
    number = int(accelerator.gather(wish).max().item())
    if number and stop.received is None:
        stop._note(number, None)
    return bool(number)
