"""Scores of edits with a known exact result, as in the toy world, where each instruction is a function of the image."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from utils.pixels import decode_image


def read_rgb(path: Path) -> np.ndarray:
    """An RGB image as uint8 (h, w, 3)."""
    return np.asarray(decode_image(path))


def score_edit(
    edited: np.ndarray, original: np.ndarray, results: Mapping[str, np.ndarray], task: str
) -> dict[str, float]:
    """Compare one edit, uint8 (h, w, 3), with the exact results of all tasks on its original.

    accuracy: 1 if the edit is closer (mean squared error) to the exact result of its own `task` than to those of the
    other tasks and to the original, else 0. psnr, no_edit_psnr: of the edit and of the original to that result, in dB.
    """
    targets = {"no edit": original, **results}
    errors = {name: np.mean((target.astype(float) - edited) ** 2) for name, target in targets.items()}
    no_edit_error = np.mean((results[task].astype(float) - original) ** 2)
    is_right = min(errors, key=errors.get) == task
    return {"accuracy": float(is_right), "psnr": _psnr(errors[task]), "no_edit_psnr": _psnr(no_edit_error)}


def mean_scores(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score."""
    return {name: round(float(np.mean([score[name] for score in scores])), 3) for name in scores[0]}


def _psnr(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB, for pixels in [0, 255]."""
    return float(10 * np.log10(255**2 / max(mean_squared_error, 1e-3)))
