"""Shared by the benchmarks of adapted toy editors: adapting, editing the held-out photographs, contact sheets."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
CELL = 128


def adapt(editor: Path, source: Path, weight: float, folder: Path) -> Path:
    """Run adapt_distill.py; returns the folder of editor + weight * (source - toy base)."""
    if not (folder / "model_index.json").exists():
        command = [
            sys.executable,
            "adapt_distill.py",
            "--model",
            editor,
            "--distilled",
            source,
            "--base",
            REPOSITORY / "assets/toy-sd",
            "--weight",
            weight,
            "--output_dir",
            folder,
        ]
        if code := subprocess.run([str(word) for word in command], cwd=REPOSITORY).returncode:
            raise SystemExit(code)
    return folder


def read_photographs(demo: Path) -> list[Image.Image]:
    from utils.pixels import decode_image

    """The held-out photographs of `make demo`, in the size of the model."""
    return [decode_image(path) for path in sorted((demo / "heldout").glob("*.png"))]


def edit_photographs(
    pipeline: Any, photographs: list[Image.Image], steps: int, scales: tuple[float, float]
) -> dict[str, list[Image.Image]]:
    """Edits of every photograph with the first phrasing of each of the ten instructions and seed 0, by task."""
    from data_preparation.instructions import read_phrasings
    from data_preparation.toy_edits import EDITS
    from utils.editing.edit_images import SamplingSettings, edit_images

    count = len(photographs)
    return {
        task: edit_images(
            pipeline,
            photographs,
            [read_phrasings(f"toy/{task}")[0][0]] * count,
            [0] * count,
            SamplingSettings(num_inference_steps=steps, guidance_scale=scales[0], image_guidance_scale=scales[1]),
        )
        for task in EDITS
    }


def save_sheet(rows: list[list[Image.Image]], labels: list[str], path: Path) -> None:
    """Draw rows of images with a label each."""
    from utils.contact_sheets import draw_grid

    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(rows, labels, CELL).save(path)
