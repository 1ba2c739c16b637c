"""--eval_steps: edits of rows that are not trained on, by the weights to be published, compared with their targets."""

import numpy as np
import torch

from utils.compilation import without_compiling
from utils.contact_sheets import draw_grid
from utils.editing.edit_images import edit_images
from utils.pixel_metrics import pixel_scores
from utils.training.agreement import run_on_main
from utils.training.publishing import BestWeights
from utils.training.session import TrainingSession
from utils.training.training_log import append_log
from utils.training.validation import log_images, make_validation_editor, sampling_settings, save_sheet

MAX_BATCH = 8
NO_EDIT = "no_edit_psnr"


def validate_edits(session: TrainingSession, best: BestWeights, step: int) -> None:
    """After every --eval_steps steps and the last one: edit, score, log, draw, and save the best weights so far."""
    settings, progress = session.settings, session.plan.progress
    every = settings.validation.eval_steps
    is_due = every and (step % every == 0 or step == session.plan.max_train_steps)
    if not is_due or progress.evaluated_step == step:
        return
    session.state.model.eval()
    is_compiled = settings.run.compile
    with session.state.published_weights(), torch.no_grad(), without_compiling(is_compiled):
        unet = session.state.whole_unet()
        scores = run_on_main(session.accelerator, lambda: score_edits(session, unet, step))
        session.accelerator.log(scores, step=step)
        score = scores.get(f"eval_{best.metric}")
        is_best = score is not None and best.is_better(score, progress.best_scores.get(best.metric))
        if is_best:
            progress.best_scores[best.metric] = score
        if session.accelerator.is_main_process:
            append_log(settings.output_dir, {"step": step} | scores)
            if is_best:
                best.save(unet, step, score)
    session.state.model.train()
    progress.evaluated_step = step


def score_edits(session: TrainingSession, unet: torch.nn.Module, step: int) -> dict[str, float]:
    """The mean scores of one edit of each row, by their names in the log; draws validation/eval-step-N.png."""
    rows, settings, edits = session.plan.eval_rows, session.settings, []
    editor, encodings = make_validation_editor(session, unet)
    sampling = sampling_settings(settings.validation)
    seeds = [session.plan.progress.seed + index for index in range(len(rows))]
    for start in range(0, len(rows), MAX_BATCH):
        part = rows[start : start + MAX_BATCH]
        images, prompts = [row.original for row in part], [row.prompt for row in part]
        with session.accelerator.autocast():
            edits += edit_images(editor, images, prompts, seeds[start:][: len(part)], sampling, encodings=encodings)
    found = [pixel_scores(np.asarray(edit), np.asarray(row.edited)) for edit, row in zip(edits, rows, strict=True)]
    means = {f"eval_{name}": float(np.nanmean([one[name] for one in found])) for name in ("psnr", "ssim", "l1")}
    means[f"eval_{NO_EDIT}"] = float(
        np.mean([pixel_scores(np.asarray(row.original), np.asarray(row.edited))["psnr"] for row in rows])
    )
    shown = [[row.original, edit, row.edited] for row, edit in zip(rows, edits, strict=True)]
    labels = [[row.prompt, f"edit at step {step}", "target"] for row in rows]
    save_sheet(
        draw_grid(shown, labels, cell=max(128, *rows[0].original.size)), settings.output_dir, f"eval-step-{step}"
    )
    log_images(session.accelerator, {f"eval/{i} {row.prompt}": shown[i] for i, row in enumerate(rows[:4])}, step)
    return {name: value for name, value in means.items() if np.isfinite(value)}
