"""Photographs on disk: which there are, reading them, square crops of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from utils.json_lines import read_json_lines
from utils.pixels import BadRow

MIN_SIDE = 64  # of a photograph that pairs are made of
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}


def seeded_rng(seed: int, row: int) -> np.random.Generator:
    """Counter-based randomness: (seed, row) always draws the same, in whatever order rows are made."""
    return np.random.Generator(np.random.Philox(key=[seed, row]))


def read_metadata(folder: Path) -> list[dict]:
    """The rows of metadata.jsonl in `folder`, [] without that file. Raises InputError for a line that is not JSON."""
    metadata = folder / "metadata.jsonl"
    return [row for _, row in read_json_lines(metadata)] if metadata.exists() else []


def list_photographs(folder: Path, split: str = "all") -> list[Path]:
    """Sorted image files below `folder`; where its metadata.jsonl names splits, only those of `split` (or all)."""
    rows = read_metadata(folder) if split != "all" else []
    if any("split" in row for row in rows):
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


def fit_image(image: np.ndarray, resolution: int, is_square: bool = False) -> np.ndarray:
    """The whole view with its shorter side at `resolution`, or the square in its middle.

    A smaller picture is not enlarged. Sides are cut to multiples of 8, which is what an autoencoder takes. Raises
    BadRow for a picture below 64 pixels.
    """
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise BadRow(f"is too small: {width}x{height} pixels, each side must have at least {MIN_SIDE}")
    if is_square:
        return centre_square(image, min(resolution, min(height, width) // 8 * 8))
    scale = min(1.0, resolution / min(height, width))
    size = (
        (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
        if scale < 1
        else (width, height)
    )
    image = image if scale == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    height, width = (side // 8 * 8 for side in image.shape[:2])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _resize(square: np.ndarray, resolution: int) -> np.ndarray:
    shrinks = square.shape[0] >= resolution
    return cv2.resize(square, (resolution, resolution), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
