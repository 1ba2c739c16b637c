"""What is measured between two entries of the training log."""

import logging
import math
import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from utils.errors import InputError
from utils.runtime import peak_process_memory

logger = logging.getLogger(__name__)
# The share of time that may pass waiting for data, and the seconds after which it is judged, once in a run.
MAX_WAITING, JUDGED_AFTER = 0.1, 60.0


@dataclass
class DataWait:
    """How long a run has waited for data, since its first log entry: the loader's processes start before it."""

    waited: float = 0.0
    elapsed: float = 0.0
    has_started: bool = False
    is_judged: bool = False

    def add(self, waited: float, elapsed: float) -> None:
        """Add the time of a log entry; warn once where the share is large."""
        if not self.has_started or self.is_judged:
            self.has_started = True
            return
        self.waited, self.elapsed = self.waited + waited, self.elapsed + elapsed
        if self.elapsed < JUDGED_AFTER:
            return
        self.is_judged = True
        if self.waited > MAX_WAITING * self.elapsed:
            logger.warning(
                "%.0f %% of the time passes waiting for data: raise --dataloader_num_workers, or encode the images "
                "once with --cache_latents",
                100 * self.waited / self.elapsed,
            )


@dataclass
class RunningMetrics:
    """Metrics of the steps since the last log entry; losses and norms stay on the device until then."""

    losses: list[torch.Tensor] = field(default_factory=list)
    grad_norms: list[torch.Tensor] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)  # of each micro-batch
    num_samples: int = 0
    waiting: float = 0.0  # seconds in which the loader had no batch ready
    num_skipped: int = 0  # updates that the gradient scaler skipped
    start_time: float = field(default_factory=time.monotonic)

    def summarize(self, accelerator: Accelerator, first_step: int) -> dict[str, float]:
        """Means over steps and processes, with a host sync. Raises `InputError` if the loss is not finite."""
        losses, norms = torch.stack(self.losses), torch.stack(self.grad_norms)
        self._check_finite(losses.tolist(), norms.tolist(), first_step, has_scaler=accelerator.scaler is not None)
        elapsed = time.monotonic() - self.start_time
        skipped = {"skipped_updates": self.num_skipped} if self.num_skipped else {}
        return skipped | {
            "loss": accelerator.reduce(losses.mean(), "mean").item(),
            "grad_norm": norms[-1].item(),
            "data_wait": self.waiting / max(elapsed, 1e-9),
            "samples_per_second": self.num_samples * accelerator.num_processes / max(elapsed, 1e-9),
            "peak_memory_gb": peak_memory_gb(),
        }

    def _check_finite(self, losses: list[float], norms: list[float], first_step: int, has_scaler: bool) -> None:
        """A gradient scaler skips steps with infinite gradients, so with one only the loss is checked."""
        per_step = len(self.rows) // len(losses)
        for index, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss) or not (math.isfinite(norm) or has_scaler):
                rows = sum(self.rows[index * per_step : (index + 1) * per_step], [])
                raise InputError(
                    f"training stopped: at step {first_step + index} the loss is {loss} and the gradient norm {norm}. "
                    f"Look at the rows of that step ({', '.join(rows)}); a lower --learning_rate or "
                    "--mixed_precision=bf16 may help. Earlier checkpoints are kept"
                )


def peak_memory_gb() -> float:
    """Peak memory in 10^9 bytes: of the GPU, or of the process on machines without one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_process_memory() / 1e9
