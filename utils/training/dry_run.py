"""What `--dry_run` shows: the first pairs as they will be trained on, and what the whole run needs."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from utils.contact_sheets import draw_grid
from utils.data.sources import Source
from utils.training.loop import Trainee, fit
from utils.training.optimizers import count_state_bytes
from utils.training.session import Run

MAX_PAIRS = 16


def take_dry_run(run: Run, batches: Iterator[dict]) -> int:
    """Draw the first batches, take one real step, and say what the whole run would need. Saves only `dry_run.png`."""
    plan, output_dir, seen = run.plan, run.settings.output_dir, []
    one_step = replace(
        run.settings.loop, max_train_steps=plan.progress.global_step + 1, logging_steps=1, checkpointing_steps=1 << 62
    )
    with tempfile.TemporaryDirectory() as folder:
        exit_code = fit(
            run.accelerator,
            run.trainee,
            run.objective,
            batches,
            plan.progress,
            one_step,
            Path(folder),
            on_batch=seen.append,
            on_step=lambda step: None,
        )
        if run.accelerator.is_main_process:
            entry = json.loads((Path(folder) / "training_log.jsonl").read_text().splitlines()[-1])
            draw_pairs(seen).save(output_dir / "dry_run.png")
            report_dry_run(entry, run.trainee, plan.samples_per_step, plan.max_train_steps, output_dir)
            report_data([*plan.sources, *plan.held_out], plan.progress.seed)
    return exit_code


def report_data(sources: list[Source], seed: int) -> None:
    """Print what a quick look at some rows finds. These are warnings: nothing fails for them."""
    from utils.checks.quick_check import quick_check

    print("\n".join(f"  {line}" for line in quick_check(sources, seed)), flush=True)


def draw_pairs(batches: list[dict]) -> Image.Image:
    """Original | edited | instruction of the first pairs, after cropping and mirroring."""
    rows, labels = [], []
    for batch in batches:
        for original, edited, prompt in zip(
            batch["original_pixels"], batch["edited_pixels"], batch["prompts"], strict=True
        ):
            rows.append([Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in (original, edited)])
            labels.append(prompt)
    return draw_grid(rows[:MAX_PAIRS], labels[:MAX_PAIRS], cell=max(192, max(rows[0][0].size)))


def size_in_gb(tensors: list[torch.Tensor]) -> float:
    """Bytes of tensors in units of 10^9."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9


def report_dry_run(entry: dict, trainee: Trainee, samples_per_step: int, max_steps: int, output_dir: Path) -> None:
    """Print the estimate. entry: the log entry of the one step that was taken."""
    trained = [value for value in trainee.model.parameters() if value.requires_grad]
    frozen = [value for value in trainee.model.parameters() if not value.requires_grad]
    # Fused, a gradient lives no longer than it takes to make the next.
    gradients = [max(trained, key=lambda value: value.nbytes)] if trainee.is_fused else trained
    optimizer = count_state_bytes(trainee.optimizer) / 1e9
    ema = size_in_gb(list(trainee.ema.state_dict().values())) if trainee.ema else 0.0
    seconds = samples_per_step / entry["samples_per_second"]
    duration = datetime.timedelta(seconds=round(seconds * max_steps))
    print(
        f"dry run: everything was checked, and one step of {samples_per_step} samples taken: loss {entry['loss']:.4f}\n"
        f"  memory: {size_in_gb(trained):.3f} GB weights trained, {size_in_gb(frozen):.3f} GB frozen, "
        f"{size_in_gb(gradients):.3f} GB gradients, {optimizer:.3f} GB optimizer, "
        f"{ema:.3f} GB moving average; the peak was {entry['peak_memory_gb']:.3f} GB\n"
        f"  time: {seconds:.2f} s for this step (the first is the slowest), so {max_steps} steps take at most about "
        f"{duration}\n"
        f"  the first pairs are drawn in {output_dir / 'dry_run.png'}; nothing was saved or pushed",
        flush=True,
    )
