"""Photographs on disk: which there are, reading them, square crops of them."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def row_generator(seed: int, row: int) -> np.random.Generator:
    """Counter-based randomness: (seed, row) always draws the same, in whatever order rows are made."""
    return np.random.Generator(np.random.Philox(key=[seed, row]))


def list_photographs(folder: Path, split: str = "all") -> list[Path]:
    """Sorted image files below `folder`; where it has a metadata.jsonl, only those of `split` (train, heldout, all)."""
    metadata = folder / "metadata.jsonl"
    if split != "all" and metadata.exists():
        rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines() if line.strip()]
        return sorted(folder / row["file_name"] for row in rows if row.get("split") == split)
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_photograph(path: Path) -> np.ndarray | None:
    """uint8 RGB (H, W, 3), turned upright by its EXIF, or None when the file holds no readable image."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    return None if image is None else np.ascontiguousarray(image[..., ::-1])


def centre_square(image: np.ndarray, resolution: int) -> np.ndarray:
    """The largest square in the middle, at (resolution, resolution): the view on which edits are scored."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return _resize(image[top : top + side, left : left + side], resolution)


def random_square(image: np.ndarray, resolution: int, rng: np.random.Generator) -> np.ndarray:
    """A square of half to all of the shorter side, anywhere, mirrored half the time, at (resolution, resolution)."""
    height, width = image.shape[:2]
    side = round(min(height, width) * rng.uniform(0.5, 1.0))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    square = _resize(image[top : top + side, left : left + side], resolution)
    return np.ascontiguousarray(square[:, ::-1]) if rng.random() < 0.5 else square


def _resize(square: np.ndarray, resolution: int) -> np.ndarray:
    shrinks = square.shape[0] >= resolution
    return cv2.resize(square, (resolution, resolution), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
