"""--dry_run: one real step, the first training pairs as images, and an estimate of what the whole run needs."""

import datetime
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

from utils.contact_sheets import draw_grid
from utils.training.ema import local_part
from utils.training.loop import TrainingState, fit
from utils.training.optimizers import count_state_bytes
from utils.training.session import Batches, TrainingSession
from utils.training.training_log import read_log

MAX_PAIRS = 16


def run_dry(session: TrainingSession, batches: Batches) -> int:
    """Take one real step and print what the whole run would need. Saves only `dry_run.png`; returns the exit code."""
    from utils.checks.findings import quick_check

    plan, output_dir, seen = session.plan, session.settings.output_dir, []
    one_step = replace(
        session.settings.loop,
        max_train_steps=plan.progress.global_step + 1,
        logging_steps=1,
        checkpointing_steps=1 << 62,
    )
    with tempfile.TemporaryDirectory() as folder:
        exit_code = fit(
            session.state,
            session.objective,
            batches,
            one_step,
            Path(folder),
            on_batch=seen.append,
            on_step=lambda step: None,
        )
        if session.accelerator.is_main_process:
            entry = read_log(Path(folder))[-1]
            draw_pairs(seen).save(output_dir / "dry_run.png")
            print_estimate(entry, session.state, plan.samples_per_step, plan.max_train_steps, output_dir)
            # These are warnings, not errors.
            warnings = quick_check([*plan.sources, *plan.held_out], plan.progress.seed)
            print("\n".join(f"  {line}" for line in warnings), flush=True)
    return exit_code


def draw_pairs(batches: list[dict]) -> Image.Image:
    """Original and edited image with the prompt for the first pairs, after cropping and mirroring."""
    rows, prompts = [], []
    for batch in batches:
        for original, edited in zip(batch["original_pixels"], batch["edited_pixels"], strict=True):
            rows.append([Image.fromarray(pixels.permute(1, 2, 0).numpy()) for pixels in (original, edited)])
        prompts += batch["prompts"]
    return draw_grid(rows[:MAX_PAIRS], prompts[:MAX_PAIRS], cell=max(192, max(rows[0][0].size)))


def print_estimate(entry: dict, state: TrainingState, samples_per_step: int, max_steps: int, output_dir: Path) -> None:
    """Print memory and time. entry: the log entry of the step."""
    trained = [local_part(value).nbytes for value in state.model.parameters() if value.requires_grad]
    bytes_of = {
        "trained weights": sum(trained),
        "frozen weights": sum(value.nbytes for value in state.model.parameters() if not value.requires_grad),
        "gradients": max(trained) if state.fused_backward else sum(trained),
        "optimizer": count_state_bytes(state.optimizer),
        "EMA": sum(local_part(value).nbytes for value in state.ema.state_dict().values()) if state.ema else 0,
    }
    seconds = samples_per_step / entry["samples_per_second"]
    duration = datetime.timedelta(seconds=round(seconds * max_steps))
    print(
        f"dry run: all checks passed; the loss of one step of {samples_per_step} samples is {entry['loss']:.4f}\n"
        f"  memory: {', '.join(f'{size / 1e9:.3f} GB {part}' for part, size in bytes_of.items())}; "
        f"peak {entry['peak_memory_gb']:.3f} GB\n"
        f"  time: {seconds:.2f} s for this step (the first is the slowest), at most about {duration} for "
        f"{max_steps} steps\n"
        f"  the first pairs are drawn in {output_dir / 'dry_run.png'}; nothing else was saved or pushed",
        flush=True,
    )
